"""process_group.py: what processes tell one another, how they share work, and what is said when one does not answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import process_group
from config import Config
from errors import CollectiveError, ConfigError, DataError
from process_group import ALONE, Group
from runtime import Interrupted
from tests import processes


@pytest.mark.parametrize(("count", "size"), [(0, 1), (7, 1), (7, 2), (8, 3), (2, 3), (13, 5)])
def test_the_shares_of_the_processes_are_the_whole_and_nearly_equal(count: int, size: int) -> None:
    bounds = [Group(rank, size).bounds(count) for rank in range(size)]
    assert [position for start, stop in bounds for position in range(start, stop)] == list(range(count))
    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 1


def told(group: Group) -> dict[str, Any]:
    calls: list[int] = []

    def counted() -> int:
        calls.append(group.rank)
        return 7

    squares = group.spread(list(range(8)), lambda items: [item * item for item in items], what="squares")
    return {
        "main": group.from_main(counted, what="a number"),
        "node": group.from_node(counted, what="a number"),
        "calls": calls,
        "each": group.each(lambda: group.rank, what="ranks"),
        "squares": squares,
        "local": (group.local_rank, group.local_size),
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_one_process_makes_every_process_gets(size: int) -> None:
    results = processes.run(size, told) if size > 1 else [told(ALONE)]
    for rank, item in enumerate(results):
        assert (item["main"], item["node"]) == (7, 7)
        assert item["calls"] == ([0, 0] if rank == 0 else [])
        assert item["each"] == list(range(size))
        assert item["squares"] == [n * n for n in range(8)]
        assert item["local"] == (rank, size)


def failing(group: Group, where: int, error: Exception) -> None:
    def make() -> None:
        if group.rank == where:
            raise error

    group.each(make, what="a failure")


@pytest.mark.parametrize("error", [DataError("a film is gone"), Interrupted(15, "stopped")], ids=["mistake", "signal"])
def test_an_error_on_one_process_is_raised_on_all(error: Exception) -> None:
    for found in processes.run(3, failing, 2, error):
        assert type(found) is type(error) and str(found) == str(error)


def first_to_speak(group: Group) -> bool:
    return process_group.speaks_first()


def test_of_processes_that_fail_together_one_speaks() -> None:
    assert sorted(processes.run(3, first_to_speak)) == [False, False, True]


def absent(group: Group) -> None:
    if group.rank == 1:
        time.sleep(6)
        return

    group.sum_(torch.zeros(1), what="the sum of nothing")


def test_a_call_that_is_not_answered_ends_in_time_and_is_named() -> None:
    started = time.monotonic()
    waiting, _ = processes.run(2, absent, timeout_s=2.0)
    assert isinstance(waiting, CollectiveError), waiting
    assert "process 0 of 2: the sum of nothing: not answered by the others within 2 s" in str(waiting)
    assert time.monotonic() - started < 60


def voted(group: Group) -> list[int | None]:
    return [group.any_signal(15 if (group.rank, call) == (1, 2) else None, what="a vote") for call in range(5)]


def test_a_signal_is_everyones_at_the_call_after_and_stays() -> None:
    assert processes.run(2, voted) == [[None, None, None, 15, 15]] * 2


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU: 2 visible"):
        process_group._take_gpu(torch.device("cuda"), 2)
    with pytest.raises(ConfigError, match="'cuda:1' is one GPU for several processes"):
        process_group._take_gpu(torch.device("cuda:1"), 0)


# --- shared work gives the same bits ---


def predictions(group: Group, run: Path, films: Path, folder: Path) -> Any:
    import evaluate
    import predict

    best, target = run / "best_model.pth", folder / f"p{group.size}"
    predict.predict([str(films)], checkpoint=best, output_dir=target, device="cpu", group=group)
    stored, config = evaluate.configured(best, [{"runtime.device": "cpu"}], None)
    manifest, _ = evaluate.evaluation_manifest(stored, config)
    found, unreadable = evaluate.predict_rows(stored, manifest, manifest.split("test"), config, group)
    return found.probabilities, list(found.table["path"]), unreadable


@pytest.mark.parametrize("size", [2, 3])
def test_shared_predictions_are_those_of_one_process_to_the_last_bit(
    trained: Path, films: Path, tmp_path: Path, size: int
) -> None:
    expected, paths, _ = predictions(ALONE, trained, films, tmp_path)
    for found, own_paths, unreadable in processes.run(size, predictions, trained, films, tmp_path):
        assert np.array_equal(found, expected) and own_paths == paths and not unreadable
    files = [(tmp_path / f"p{count}" / "predictions.csv").read_bytes() for count in (1, size)]
    assert files[0] == files[1] and files[0].count(b"\n") == 1 + len(list(films.rglob("*.jpeg")))


def features(group: Group, config: Config) -> tuple[str, Any]:

    import train

    prepared = group.from_node(lambda: train.prepare(config), what="films")
    fit = train.Fit(config, prepared, folder=Path(), device=torch.device("cpu"), precision="fp32", group=group)
    fit._open_stages()
    assert fit.features is not None
    return fit.features.engine, np.array(fit.features.array)


@pytest.mark.parametrize("size", [2, 3])
def test_shared_features_are_those_of_one_process_to_the_last_bit(tiny: Config, tmp_path: Path, size: int) -> None:
    from tests.test_train import changed

    frozen = changed(tiny, model__freeze_backbone=True, data__batch_size=4, training__cached_views=2)
    alone, together = (changed(frozen, data__cache_dir=str(tmp_path / name)) for name in ("alone", "together"))
    engine, expected = features(ALONE, alone)
    for own_engine, found in processes.run(size, features, together):
        assert own_engine == engine and np.array_equal(found, expected)
    assert not list((tmp_path / "together").rglob("*.part*"))
