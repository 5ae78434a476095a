"""Training in several processes equals training in one: steps, figures, weights, stops and restarts."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import checkpoint
import train
from config import Config
from data_preprocessing import Request
from errors import CollectiveError, ConfigError, UserError
from objective import draw_mixing
from process_group import ALONE, Group
from runtime import Interrupted
from tests import processes
from tests.test_train import TIMING, assert_same_run, changed, weights


def trained(group: Group, config: Config, resume: Path | None = None) -> dict[str, Any]:
    """A run in a process: its result, and the loss of each batch of the last epoch."""
    path, config = (None, config) if resume is None else train.resume_config(resume, of(config), processes=group.size)
    fits: list[train.Fit] = []
    start = train.Fit.__init__

    def started(fit: train.Fit, *args: Any, **settings: Any) -> None:
        start(fit, *args, **settings)
        fits.append(fit)

    train.Fit.__init__ = started  # type: ignore[method-assign]
    try:
        result = train.train(config, resume=path, group=group)
    finally:
        train.Fit.__init__ = start  # type: ignore[method-assign]
    losses = group.sum_(fits[0]._losses.clone(), what="the losses, for the test")
    return {
        "epochs": result.epochs,
        "best": result.best_epoch,
        "losses": losses.tolist(),
        "step": fits[0].standing.step,
    }


def of(config: Config) -> dict[str, Any]:
    """What a continuation may change."""
    return {"runtime.output_dir": config.runtime.output_dir, "training.num_epochs": config.training.num_epochs}


def in_processes(size: int, config: Config, folder: Path, **settings: Any) -> dict[str, Any]:
    """The run `config` with the same films a step, shared by `size` processes, into `folder`."""
    each = config.data.batch_size // size
    own = changed(config, data__batch_size=each, runtime__output_dir=str(folder), **settings)
    results = processes.run(size, trained, own) if size > 1 else [trained(ALONE, own)]
    assert all(item == results[0] for item in results), results
    return results[0]


def assert_nearly_the_same_run(a: Path, b: Path) -> None:
    """Equal but for the order in which numbers were added up.

    Of the weights only the head's are compared: a bias before a batch norm has no gradient but rounding, which Adam
    brings to the size of a step. What such weights do is nothing, as the figures say.
    """
    histories = [pd.read_csv(folder / "history.csv").drop(columns=TIMING) for folder in (a, b)]
    pd.testing.assert_frame_equal(*histories, rtol=1e-4, atol=2e-5)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        if name.startswith("head."):
            assert torch.allclose(left[name], right[name], rtol=1e-3, atol=2e-4), name


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"training__ema_decay": 0.9, "data__balance": "sampler"},
    "accumulation": {
        "training__accumulation_steps": 4, "training__loss": "focal", "training__label_smoothing": 0.1,
        "training__gradient_clip": 0.1,
    },
    "mixing": {"training__mixup_alpha": 0.4, "training__cutmix_alpha": 0.5},
    "cached": {"model__freeze_backbone": True, "training__unfreeze_schedule": {2: 1}},
    "frozen_norm": {"training__batch_norm": "frozen", "data__augment_on": "device"},
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_two_processes_train_like_one(small: Config, tmp_path: Path, feature: str) -> None:
    one, two = (in_processes(size, small, tmp_path / str(size), **FEATURES[feature]) for size in (1, 2))
    assert one["step"] == two["step"]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4, abs=2e-5)
    assert_nearly_the_same_run(tmp_path / "1", tmp_path / "2")


def test_three_processes_with_everything_on_train_like_one(small: Config, tmp_path: Path) -> None:
    everything = {name: value for item in FEATURES.values() for name, value in item.items() if "batch_norm" not in name}
    everything |= {"model__freeze_backbone": False, "training__unfreeze_schedule": {}, "training__gradient_clip": 1.0}
    one, three = (in_processes(size, small, tmp_path / str(size), **everything) for size in (1, 3))
    assert one["losses"] == pytest.approx(three["losses"], rel=1e-4, abs=2e-5)
    assert_nearly_the_same_run(tmp_path / "1", tmp_path / "3")


# --- resuming at another number of processes ---


def test_a_step_keeps_its_films_in_any_number_of_processes(small: Config, tmp_path: Path) -> None:
    config = changed(small, data__batch_size=8, training__num_epochs=1, runtime__output_dir=str(tmp_path))
    train.train(config)
    # Three processes share 8 films as 3, 3 and 2; two as 4 and 4.
    for epochs, size in ((2, 3), (3, 2)):
        processes.run(size, trained, changed(config, training__num_epochs=epochs), tmp_path)
    assert list(pd.read_csv(tmp_path / "history.csv")["epoch"]) == [1, 2, 3]
    stored = checkpoint.load(tmp_path / "checkpoint_epoch_3.pth")
    assert stored["training_state"]["films_per_step"] == 8 and stored["training_state"]["standing"]["step"] == 27
    assert stored["config"]["data"]["batch_size"] == 4


def test_a_continuation_in_three_processes_equals_the_undisturbed_run_in_one(small: Config, tmp_path: Path) -> None:
    config = changed(small, data__batch_size=8, training__num_epochs=2, runtime__output_dir=str(tmp_path / "whole"))
    train.train(config)
    rest = changed(config, runtime__output_dir=str(tmp_path / "rest"))
    processes.run(3, trained, rest, tmp_path / "whole" / "checkpoint_epoch_1.pth")
    assert_nearly_the_same_run(tmp_path / "whole", tmp_path / "rest")


def test_another_batch_size_is_refused_by_the_films_of_a_step(small: Config, tmp_path: Path) -> None:
    config = changed(small, training__num_epochs=1)
    train.train(config)
    path = Path(config.runtime.output_dir)
    assert train.resume_config(path, {"data.batch_size": 6}, processes=2)[1].data.batch_size == 6
    with pytest.raises(ConfigError, match="data.batch_size was 6, now 12"):
        train.resume_config(path, {"data.batch_size": 12}, processes=2)


def test_more_processes_than_films_of_a_step_are_refused(small: Config, tmp_path: Path) -> None:
    train.train(changed(small, data__batch_size=2, training__num_epochs=1, runtime__output_dir=str(tmp_path)))
    more = changed(small, training__num_epochs=2, runtime__output_dir=str(tmp_path))
    for error in processes.run(3, trained, more, tmp_path):
        assert isinstance(error, ConfigError), error
        assert "3 processes for steps of 2 films: start at most 2" in str(error)


# --- rates, batch norm, parts ---


def rates(group: Group, config: Config) -> list[float]:
    fit = made(group, config)
    return [item["peak_lr"] for item in fit.optimizer.param_groups]


def made(group: Group, config: Config) -> train.Fit:
    prepared = group.from_node(lambda: train.prepare(config), what="films")
    folder, device = Path(config.runtime.output_dir), torch.device("cpu")
    return train.Fit(config, prepared, folder=folder, device=device, precision="fp32", group=group)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 2**0.5), ("linear", 2.0)])
def test_both_rates_follow_the_scaling_rule(small: Config, rule: str, factor: float) -> None:
    own = changed(small, training__lr_scaling=rule, training__learning_rate=1e-2, training__backbone_lr=1e-3)
    assert set(rates(ALONE, own)) == {1e-2, 1e-3}
    both = processes.run(2, rates, own)
    assert both[0] == both[1]
    assert sorted(set(both[0])) == pytest.approx([1e-3 * factor, 1e-2 * factor])


def statistics_of(group: Group, config: Config) -> list[torch.Tensor]:
    fit = made(group, config)
    fit._begin_epoch()
    fit._choose_route()
    batch = next(iter(fit._batches([fit._part(0).request])))
    fit._backward(batch, share=1.0)
    before = [item.clone() for item in norms(fit.model)]
    train.average_statistics(fit.model, group)
    after = [item.clone() for item in norms(fit.model)]
    return [torch.cat([item.flatten() for item in items]) for items in (before, after)]


def norms(model: torch.nn.Module) -> list[torch.Tensor]:
    return [item for name, item in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


def test_local_batch_norm_keeps_its_own_statistics_until_they_are_averaged(small: Config) -> None:
    (one, mean), (two, same) = processes.run(2, statistics_of, changed(small, training__batch_norm="local"))
    assert not torch.allclose(one, two)
    assert torch.allclose(mean, (one + two) / 2) and torch.equal(mean, same)


def test_synchronised_batch_norm_keeps_equal_statistics(small: Config) -> None:
    (one, _), (two, _) = processes.run(2, statistics_of, small)
    assert torch.equal(one, two)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_parts_of_a_batch_are_the_batch_and_bring_their_partners(size: int) -> None:
    request = Request(1, np.random.default_rng(0).permutation(100)[:13])
    mixing = draw_mixing(13, mixup_alpha=0.4, cutmix_alpha=0.0, rng=np.random.default_rng(1))
    assert mixing is not None
    parts = [train.part_of(request, Group(rank, size).bounds(13), mixing) for rank in range(size)]
    assert sum(part.share for part in parts) == pytest.approx(1)
    own = np.concatenate([part.request.positions[part.rows_B] for part in parts])
    assert np.array_equal(own, request.positions)
    partners = np.concatenate([part.request.positions[part.partners_B] for part in parts])
    assert np.array_equal(partners, request.positions[mixing.partner_B])
    assert all(len(set(part.request.positions)) == len(part.request.positions) for part in parts)


# --- signals, losses that are not finite ---


def stopped(group: Group, config: Config) -> str:
    """A run whose second process gets SIGTERM after its third step."""
    step = train.Fit._step

    def counted(fit: train.Fit) -> None:
        step(fit)
        if fit.standing.step == 3 and group.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, after the scheduler's

    train.Fit._step = counted  # type: ignore[method-assign]
    try:
        train.train(config, group=group)
    except Interrupted as error:
        group.wait(what="the others, for the test")
        return str(error)
    return "ran to its end"


def test_a_signal_to_one_process_stops_all_at_one_step_and_the_run_goes_on_equal(small: Config, tmp_path: Path) -> None:
    whole = changed(small, runtime__output_dir=str(tmp_path / "whole"), data__batch_size=6)
    broken = changed(whole, runtime__output_dir=str(tmp_path / "broken"))
    processes.run(2, trained, whole)
    said = processes.run(2, stopped, broken)
    assert said[0] == said[1] and "stopped in epoch 1 after batch 4; go on with" in said[0]
    assert checkpoint.newest(tmp_path / "broken").name == checkpoint.INTERRUPTED
    processes.run(2, trained, broken, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def diverged(group: Group, config: Config) -> None:
    """A run in which the second process meets a loss that is not finite in its fourth batch."""
    loss = train.Fit._loss

    def broken(fit: train.Fit, *tensors: torch.Tensor) -> torch.Tensor:
        bad = group.rank == 1 and fit.standing.batch == 3
        return loss(fit, *tensors) * (float("nan") if bad else 1.0)

    train.Fit._loss = broken  # type: ignore[method-assign]
    train.train(config, group=group)


def test_a_loss_that_is_not_finite_on_one_process_ends_all_with_the_same_line(small: Config) -> None:
    errors = processes.run(2, diverged, changed(small, data__batch_size=6))
    assert all(isinstance(error, UserError) for error in errors)
    assert str(errors[0]) == str(errors[1]) and "epoch 1, batch 4: the loss is nan" in str(errors[0])


# --- starting, and starting again ---


def test_a_mistake_on_the_first_process_is_every_ones_error(small: Config, tmp_path: Path) -> None:
    wrong = changed(small, data__data_dir=str(tmp_path / "nowhere"))
    errors = processes.run(2, trained, wrong)
    assert len({str(error) for error in errors}) == 1 and "no such data folder" in str(errors[0])


def lost(group: Group, config: Config) -> None:
    step = train.Fit._step

    def counted(fit: train.Fit) -> None:
        step(fit)
        if fit.standing.step == 2 and group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train.Fit._step = counted  # type: ignore[method-assign]
    train.train(config, group=group)


def test_who_is_left_says_during_what_another_process_was_lost(small: Config) -> None:
    left, killed = processes.run(2, lost, changed(small, data__batch_size=6))
    assert killed is None
    assert isinstance(left, CollectiveError), left
    assert "process 0 of 2: the " in str(left) and "another process is gone" in str(left)


def test_only_the_start_that_left_a_checkpoint_goes_on_from_it(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    overrides = [{"runtime.output_dir": small.runtime.output_dir, "data.batch_size": 99}]
    assert train.configured(overrides, resume=None, processes=1)[0] is None
    train.train(changed(small, training__num_epochs=1))
    path, config = train.configured(overrides, resume=None, processes=2)
    assert path is not None and path.name == "checkpoint_epoch_1.pth" and config.data.batch_size == 6
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    assert train.configured(overrides, resume=None, processes=1)[0] is None


@pytest.mark.parametrize("given", ["none", None])
def test_a_start_without_a_name_is_known_by_who_made_it(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    from process_group import launch_name

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if given:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", given)
    assert launch_name() == (None if given is None else f"{os.uname().nodename}:{os.getppid()}")
