"""train.py: the loss, the schedule, the loop; a run that is killed and resumed equals one that was not."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import train
from config import Config, TrainingConfig, resolve, to_yaml
from errors import ConfigError, DataError, UserError
from models import create_model
from tests.conftest import TINY

ROOT = Path(train.__file__).parent
TIMING = ["images_per_s", "seconds", "peak_memory_mb"]


def changed(config: Config, **settings: Any) -> Config:
    from config import flatten

    names = {name.replace("__", "."): value for name, value in settings.items()}
    return resolve(flatten(config.to_dict(), source=""), names)


# --- schedule, loss, mixing ---


def test_the_schedule_warms_up_linearly_and_ends_at_zero() -> None:
    factors = [train.warmup_cosine(step=step, warmup_steps=10, total_steps=110) for step in range(110)]
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert factors[10] == 1 and all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[60] == pytest.approx(0.5) and factors[-1] < 1e-3


def test_without_warmup_the_schedule_starts_at_the_peak() -> None:
    assert train.warmup_cosine(step=0, warmup_steps=0, total_steps=5) == 1


@pytest.fixture
def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 3, generator=generator), torch.randint(0, 3, (20,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_hard_targets_equals_torch(
    logits_and_labels: tuple[torch.Tensor, torch.Tensor], smoothing: float
) -> None:
    logits, labels = logits_and_labels
    config = TrainingConfig(label_smoothing=smoothing)
    ours = train.classification_loss(logits, F.one_hot(labels, 3).float(), config=config, weights_C=None)
    assert torch.allclose(ours, F.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_focal_loss_equals_its_formula_film_by_film(logits_and_labels: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = logits_and_labels
    p = logits.softmax(1)[range(20), labels]
    expected = (-((1 - p) ** 2.0) * p.log()).mean()
    config = TrainingConfig(loss="focal", focal_gamma=2.0)
    assert torch.allclose(
        train.classification_loss(logits, F.one_hot(labels, 3).float(), config=config, weights_C=None), expected
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_loss_at_gamma_zero_is_cross_entropy(
    logits_and_labels: tuple[torch.Tensor, torch.Tensor], smoothing: float
) -> None:
    logits, labels = logits_and_labels
    targets, weights = F.one_hot(labels, 3).float(), torch.tensor([1.0, 2.0, 0.5])
    losses = [
        train.classification_loss(
            logits,
            targets,
            config=TrainingConfig(loss=name, focal_gamma=0.0, label_smoothing=smoothing),
            weights_C=weights,
        )
        for name in ("focal", "cross_entropy")
    ]
    assert torch.allclose(*losses)


def test_class_weights_scale_each_films_loss(logits_and_labels: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = logits_and_labels
    weights = torch.tensor([1.0, 3.0, 0.2])
    each = F.cross_entropy(logits, labels, reduction="none")
    ours = train.classification_loss(logits, F.one_hot(labels, 3).float(), config=TrainingConfig(), weights_C=weights)
    assert torch.allclose(ours, (each * weights[labels]).mean())


IMAGES = torch.arange(4 * 3 * 8 * 8, dtype=torch.float32).reshape(4, 3, 8, 8)
TARGETS = torch.eye(4)


def mixed(images: torch.Tensor, **drawn: Any) -> tuple[torch.Tensor, torch.Tensor]:
    mixing = train.draw_mixing(4, **drawn)
    assert mixing is not None
    return train.mix_batch(images, TARGETS, mixing, rows_B=np.arange(4), partners_B=mixing.partner_B)


@pytest.mark.parametrize("seed", range(10))
def test_mixup_mixes_films_and_targets_by_the_same_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, targets = mixed(IMAGES, mixup_alpha=1.0, cutmix_alpha=0.0, rng=rng)
    # Targets are the identity, so each row of the mixed targets says which films went in and how much of each.
    assert torch.allclose(images, torch.einsum("bn,nchw->bchw", targets, IMAGES), rtol=1e-4)
    assert torch.allclose(targets.sum(1), torch.ones(4))


@pytest.mark.parametrize("seed", range(10))
def test_cutmix_targets_are_the_shares_of_the_area(seed: int) -> None:
    owner = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    rng = np.random.default_rng(seed)
    images, targets = mixed(owner, mixup_alpha=0.0, cutmix_alpha=1.0, rng=rng)
    for image, target in zip(images, targets):
        shares = torch.stack([(image[0] == film).float().mean() for film in range(4)])
        assert torch.allclose(shares, target, atol=1e-6)


def test_without_mixing_nothing_is_drawn() -> None:
    rng = np.random.default_rng(0)
    assert train.draw_mixing(4, mixup_alpha=0.0, cutmix_alpha=0.0, rng=rng) is None
    assert rng.random() == np.random.default_rng(0).random()


def test_the_weight_average_equals_its_recursion_and_skips_frozen_weights() -> None:
    torch.manual_seed(0)
    model = create_model("test_resnet", 2, False, freeze_backbone=True, hidden_features=4)
    average = train.WeightAverage(model, decay=0.9)
    expected = model.head[1].weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            model.head[1].weight.add_(0.1)
        average.update(model, step=step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.head[1].weight.detach()
    assert torch.allclose(average.model.head[1].weight, expected, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(average.model.backbone.parameters(), model.backbone.parameters()))


@pytest.mark.parametrize(
    ("value", "best", "mode", "better"),
    [
        (0.9, None, "max", True),
        (0.9, 0.8, "max", True),
        (0.8, 0.8, "max", False),
        (0.7, 0.8, "min", True),
        (math.nan, None, "max", False),
        (math.nan, 0.1, "min", False),
    ],
)
def test_improvement_has_a_direction_and_nan_is_none(value: float, best: float | None, mode: str, better: bool) -> None:
    assert train.improves(value, best, mode) is better


@pytest.mark.parametrize("n_classes", [2, 3])
def test_validation_figures_agree_with_scikit_learn(n_classes: int) -> None:
    from sklearn import metrics as sk

    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(200, n_classes)), rng.integers(0, n_classes, 200)
    logits[np.arange(200), labels] += 1
    ours = train.validation_figures(logits, labels, positive=1 if n_classes == 2 else None)
    prob = torch.from_numpy(logits).softmax(1).numpy()
    predicted = prob.argmax(1)
    scores = prob[:, 1] if n_classes == 2 else prob
    assert ours["auc_roc"] == pytest.approx(sk.roc_auc_score(labels, scores, multi_class="ovr"))
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert ours["f1"] == pytest.approx(sk.f1_score(labels, predicted, average="binary" if n_classes == 2 else "macro"))
    assert ours["loss"] == pytest.approx(sk.log_loss(labels, prob))


# --- a run ---


def test_a_run_fills_its_folder(trained: Path) -> None:
    names = {item.name for item in trained.iterdir()}
    assert names == {
        "best_model.pth", "checkpoint_epoch_1.pth", "checkpoint_epoch_2.pth", "config.yaml", "split.csv", "history.csv",
        "training_curves.png", "environment.json",
    }  # fmt: skip
    history = pd.read_csv(trained / "history.csv")
    assert list(history["epoch"]) == [1, 2]
    for column in ("train_loss", "val_loss", "val_auc_roc", "lr_head", "lr_backbone", *TIMING):
        assert history[column].notna().all()
    assert json.loads((trained / "environment.json").read_text())["libraries"]["torch"]


def test_the_best_checkpoint_alone_says_everything_needed_to_predict(trained: Path) -> None:
    content = torch.load(trained / "best_model.pth", weights_only=True)
    assert content["classes"] == ["NORMAL", "PNEUMONIA"]
    assert content["preprocess"]["image_size"] == 32 and content["temperature"] > 0
    assert content["operating_point"]["positive_class"] == "PNEUMONIA"
    assert 0 < content["operating_point"]["threshold"] < 1
    assert content["provenance"]["seed"] == 42 and content["provenance"]["manifest_digest"]
    assert "training_state" not in content


def test_training_learns_the_films(tiny: Config) -> None:
    result = train.train(
        changed(
            tiny,
            training__num_epochs=12,
            training__learning_rate=1e-2,
            training__backbone_lr=1e-2,
            data__augmentation_prob=0.0,
        )
    )
    assert result.best_score > 0.8


def weights(folder: Path, name: str = "best_model.pth") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model_state_dict"]


def assert_same_run(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    histories = [pd.read_csv(folder / "history.csv").drop(columns=TIMING) for folder in (a, b)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny: Config, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.train(changed(tiny, training__seed=seed, runtime__output_dir=str(tmp_path / name)))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(weights(tmp_path / "a")["head.1.weight"], weights(tmp_path / "c")["head.1.weight"])


FEATURES = {
    "plain": {},
    "ema": {"training__ema_decay": 0.9},
    "accumulation": {"training__accumulation_steps": 4},
    "mixing": {"training__mixup_alpha": 0.4, "training__cutmix_alpha": 0.5},
    "sampler": {"data__balance": "sampler"},
    "both": {"data__balance": "sampler_and_loss"},
    "focal": {"training__loss": "focal", "training__label_smoothing": 0.1},
    "frozen": {"model__freeze_backbone": True},
    "unfreezing": {"model__freeze_backbone": True, "training__unfreeze_schedule": {2: 1, 3: -1}},
    "no_clip": {"training__gradient_clip": 0.0},
    "min_loss": {"training__monitor": "loss", "training__monitor_mode": "min"},
    "sensitivity": {"training__operating_point": "sensitivity", "training__operating_point_target": 0.9},
    "fp32": {"training__use_amp": False},
    "bf16": {"runtime__precision": "bf16"},
    "rgb": {"data__colour": "rgb"},
    "no_cache": {"data__pixel_cache": False},
    "progressive": {"training__progressive_resizing": 16},
    "on_device": {"data__augment_on": "device", "data__min_crop_scale": 0.6},
    "linear_head": {"model__hidden_features": 0},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_resuming_after_an_epoch_equals_never_having_stopped(tiny: Config, tmp_path: Path, feature: str) -> None:
    whole = changed(tiny, training__num_epochs=3, runtime__output_dir=str(tmp_path / "whole"), **FEATURES[feature])
    train.train(whole)
    first = tmp_path / "whole" / "checkpoint_epoch_1.pth"
    path, config = train.resume_config(first, {"runtime.output_dir": str(tmp_path / "resumed")})
    train.train(config, resume=path)
    a, b = (pd.read_csv(tmp_path / name / "history.csv").drop(columns=TIMING) for name in ("whole", "resumed"))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    last = [weights(tmp_path / name, "checkpoint_epoch_3.pth") for name in ("whole", "resumed")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


# Runs in a process of its own: a test process that signals itself takes its neighbours down when anything goes wrong.
SIGNALLED = """
import itertools, os, sys
import main, train
step, count = train.Fit._step, itertools.count(1)
def counted(fit):
    step(fit)
    if next(count) == int(sys.argv[2]):
        os.kill(os.getpid(), int(sys.argv[1]))
train.Fit._step = counted
sys.exit(main.main(["train", "--quiet", "--config", sys.argv[3], "--output-dir", sys.argv[4]]))
"""


@pytest.mark.parametrize(("signal_number", "after"), [(signal.SIGTERM, 3), (signal.SIGINT, 7)])
def test_a_signal_in_mid_epoch_saves_and_the_resumed_run_equals_the_undisturbed_one(
    tiny: Config, tmp_path: Path, signal_number: int, after: int
) -> None:
    whole = changed(tiny, runtime__output_dir=str(tmp_path / "whole"), runtime__threads=1, training__ema_decay=0.9)
    train.train(whole)
    (tmp_path / "c.yaml").write_text(to_yaml(whole))
    broken = tmp_path / "broken"
    command = [
        sys.executable,
        "-c",
        SIGNALLED,
        str(int(signal_number)),
        str(after),
        str(tmp_path / "c.yaml"),
        str(broken),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 128 + signal_number, done.stderr
    assert "go on with: python main.py train --resume" in done.stderr
    assert (broken / checkpoint.INTERRUPTED).exists()
    path, config = train.resume_config(broken)
    train.train(config, resume=path)
    assert_same_run(tmp_path / "whole", broken)
    assert not (broken / checkpoint.INTERRUPTED).exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_at_a_random_moment_and_resuming_equals_the_undisturbed_run(
    films: Path, tmp_path: Path, workers: int
) -> None:
    sets = {**TINY, "training.num_epochs": 6, "data.augmentation_prob": 0.8}
    flags = [word for name, value in sets.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    environment = {**os.environ, "MEDIMG_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def command(folder: str, *more: str) -> list[str]:
        given = [] if more else ["--data-dir", str(films), "--workers", str(workers), *flags]
        out = [] if more else ["--output-dir", str(tmp_path / folder)]
        return [sys.executable, str(ROOT / "main.py"), "train", "--quiet", *given, *out, *more]

    subprocess.run(command("whole"), check=True, env=environment, timeout=240)
    process = subprocess.Popen(command("killed"), env=environment)
    first = tmp_path / "killed" / "checkpoint_epoch_1.pth"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(float(np.random.default_rng(os.getpid()).uniform(0, 0.5)))
    process.kill()
    process.wait()
    subprocess.run(command("killed", "--resume", str(tmp_path / "killed")), check=True, env=environment, timeout=240)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_new_run_moves_the_old_one_into_the_archive(tiny: Config) -> None:
    folder = Path(tiny.runtime.output_dir)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    short = changed(tiny, training__num_epochs=1)
    train.train(short)
    before = (folder / "best_model.pth").read_bytes()
    train.train(changed(short, training__seed=7))
    archived = list((folder / "archive").iterdir())
    assert len(archived) == 1 and archived[0].name.endswith("-test_efficientnet")
    assert (archived[0] / "best_model.pth").read_bytes() == before != (folder / "best_model.pth").read_bytes()
    assert (folder / "notes.txt").read_text() == "mine"


def test_resuming_an_earlier_epoch_sets_the_later_ones_aside(tiny: Config) -> None:
    folder = Path(tiny.runtime.output_dir)
    train.train(changed(tiny, training__num_epochs=3))
    path, config = train.resume_config(folder / "checkpoint_epoch_1.pth", {"training.num_epochs": 2})
    train.train(config, resume=path)
    archived = {item.name for item in next((folder / "archive").iterdir()).iterdir()}
    assert {"checkpoint_epoch_2.pth", "checkpoint_epoch_3.pth"} <= archived
    assert len(pd.read_csv(folder / "history.csv")) == 2


def test_early_stopping_ends_after_the_stated_patience(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.7, 0.7, 0.6, 0.9])
    real = train.validation_figures
    monkeypatch.setattr(train, "validation_figures", lambda *a, **k: {**real(*a, **k), "auc_roc": next(scores)})
    result = train.train(changed(tiny, training__num_epochs=9, training__early_stopping_patience=2))
    assert (result.epochs, result.best_epoch, result.best_score) == (4, 2, 0.7)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_batch(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = train.classification_loss, itertools.count(1)
    monkeypatch.setattr(
        train,
        "classification_loss",
        lambda *a, **k: real(*a, **k) * (float("nan") if next(count) == 12 else 1.0),
    )
    fits: list[train.Fit] = []
    start = train.Fit.__init__
    monkeypatch.setattr(train.Fit, "__init__", lambda fit, *a, **k: (start(fit, *a, **k), fits.append(fit))[0])
    with pytest.raises(
        UserError, match=r"epoch 2, batch 3: the loss is nan .films train/.*lower training.learning_rate"
    ):
        train.train(tiny)
    assert fits[0].standing.step == 11
    assert all(torch.isfinite(item).all() for item in fits[0].model.state_dict().values())
    assert checkpoint.load(Path(tiny.runtime.output_dir) / "checkpoint_epoch_1.pth")


@pytest.mark.parametrize(("bad", "check_every"), [(12, 4), (10, 50), (18, 50)])
def test_where_losses_are_looked_at_late_nothing_is_stepped_in_between(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, bad: int, check_every: int
) -> None:
    real, count = train.classification_loss, itertools.count(1)
    monkeypatch.setattr(
        train, "classification_loss", lambda *a, **k: real(*a, **k) * (float("nan") if next(count) == bad else 1.0)
    )
    fits: list[train.Fit] = []
    standing: list[dict[str, torch.Tensor]] = []
    start, step = train.Fit.__init__, train.Fit._step

    def started(fit: train.Fit, *args: Any, **settings: Any) -> None:
        start(fit, *args, **settings)
        fit.check_every = check_every  # as on a GPU
        fits.append(fit)

    def stepped(fit: train.Fit) -> None:
        step(fit)
        standing.append({name: item.detach().clone() for name, item in fit.model.named_parameters()})

    monkeypatch.setattr(train.Fit, "__init__", started)
    monkeypatch.setattr(train.Fit, "_step", stepped)
    with pytest.raises(UserError, match=rf"epoch 2, batch {bad - 9}: the loss is nan .films train/"):
        train.train(tiny)
    good = standing[bad - 2]
    assert all(torch.equal(item, good[name]) for name, item in fits[0].model.named_parameters())
    assert not (Path(tiny.runtime.output_dir) / "checkpoint_epoch_2.pth").exists()


def test_losses_looked_at_late_give_the_same_run(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.train(changed(tiny, runtime__output_dir=str(tmp_path / "at_once")))
    start = train.Fit.__init__

    def started(fit: train.Fit, *args: Any, **settings: Any) -> None:
        start(fit, *args, **settings)
        fit.check_every = 5

    monkeypatch.setattr(train.Fit, "__init__", started)
    train.train(changed(tiny, runtime__output_dir=str(tmp_path / "late")))
    assert_same_run(tmp_path / "at_once", tmp_path / "late")


def test_progressive_resizing_trains_small_and_validates_at_full_size(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    forward = train.Classifier.forward

    def watched(model: train.Classifier, images: torch.Tensor) -> torch.Tensor:
        seen.append((model.training, images.shape[-1]))
        return forward(model, images)

    monkeypatch.setattr(train.Classifier, "forward", watched)
    train.train(changed(tiny, training__progressive_resizing=16, training__num_epochs=3))
    assert [side for training, side in seen if training] == [16] * 9 + [16] * 9 + [32] * 9
    assert {side for training, side in seen if not training} <= {32}


def test_a_network_of_one_size_is_not_resized(tiny: Config) -> None:
    config = changed(tiny, model__model_type="test_vit", data__image_size=160, training__progressive_resizing=96)
    with pytest.raises(ConfigError, match="progressive_resizing: test_vit takes films of one size only"):
        train.train(config)


def test_accumulated_batches_step_like_one_large_batch(tiny: Config, tmp_path: Path) -> None:
    # Norms of the backbone stand still, so that only the sum of gradients matters; dropout off, fp32.
    shared = {
        "model__freeze_backbone": True, "model__dropout_rate": 0.0, "training__use_amp": False,
        "training__num_epochs": 1, "data__augmentation_prob": 0.0, "data__balance": "none",
    }  # fmt: skip
    whole = changed(tiny, data__batch_size=24, runtime__output_dir=str(tmp_path / "a"), **shared)
    parts = changed(
        tiny, data__batch_size=8, training__accumulation_steps=3, runtime__output_dir=str(tmp_path / "b"), **shared
    )
    train.train(whole)
    train.train(parts)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-5) for name in a)


def test_the_head_and_the_backbone_move_at_their_own_rates(tiny: Config) -> None:
    train.train(changed(tiny, training__learning_rate=1e-3, training__backbone_lr=1e-5, training__num_epochs=1))
    row = pd.read_csv(Path(tiny.runtime.output_dir) / "history.csv").iloc[0]
    assert row["lr_head"] == pytest.approx(100 * row["lr_backbone"])


def test_gradual_unfreezing_changes_only_what_is_open(tiny: Config) -> None:
    config = changed(
        tiny, model__freeze_backbone=True, training__unfreeze_schedule={2: 1}, training__keep_checkpoints=5
    )
    train.train(config)
    folder = Path(config.runtime.output_dir)
    one, two = weights(folder, "checkpoint_epoch_1.pth"), weights(folder, "checkpoint_epoch_2.pth")
    moved = {name for name in one if name.startswith("backbone.") and not torch.equal(one[name], two[name])}
    assert moved
    model = create_model("test_efficientnet", 2, False, hidden_features=16)
    opened = {f"backbone.{name}" for name in model.stages()[-1]}
    assert {name for name in moved if name in dict(model.named_parameters())} <= opened


def test_a_multi_class_run_has_no_threshold(films: Path, tmp_path: Path) -> None:
    paths = sorted((films / "train").rglob("*.jpeg"))
    rows = []
    for path in paths:
        subtype = "normal" if path.name.startswith("IM") else path.name.split("_")[1]
        rows.append({"path": str(path), "label": subtype})
    pd.DataFrame(rows).to_csv(tmp_path / "m.csv", index=False)
    result = train.train(
        resolve(TINY, {"data.manifest": str(tmp_path / "m.csv"), "runtime.output_dir": str(tmp_path / "run")})
    )
    assert result.operating_point == {"rule": "argmax", "positive_class": None}
    assert checkpoint.load(result.best_model)["classes"] == ["bacteria", "normal", "virus"]


# --- mistakes ---


def test_resuming_with_another_setting_names_the_fields(trained: Path) -> None:
    with pytest.raises(ConfigError, match="data.batch_size was 8, now 4; training.seed was 42, now 1; drop these"):
        train.resume_config(trained / "checkpoint_epoch_1.pth", {"training.seed": 1, "data.batch_size": 4})


def test_resuming_with_the_same_settings_and_another_folder_or_patience_is_allowed(trained: Path) -> None:
    overrides = {"training.seed": 42, "training.early_stopping_patience": 3, "runtime.output_dir": "elsewhere"}
    _, config = train.resume_config(trained / "checkpoint_epoch_1.pth", overrides)
    assert config.runtime.output_dir == "elsewhere" and config.training.early_stopping_patience == 3


def test_resuming_from_the_best_model_says_that_it_holds_weights_only(tiny: Config, trained: Path) -> None:
    with pytest.raises(ConfigError, match="holds weights only; resume from a checkpoint_epoch"):
        train.train(tiny, resume=trained / "best_model.pth")


def test_resuming_on_other_films_is_refused(trained: Path, tmp_path: Path) -> None:
    import synthetic

    synthetic.write_dataset(tmp_path / "other", patients_per_class={"train": 9}, size=32, seed=4)
    overrides = {"data.data_dir": str(tmp_path / "other"), "runtime.output_dir": str(tmp_path / "run")}
    path, config = train.resume_config(trained / "checkpoint_epoch_1.pth", overrides)
    with pytest.raises(DataError, match="are not those it was trained on"):
        train.train(config, resume=path)


def test_a_checkpoint_finds_its_films_from_another_folder(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluate import evaluate

    monkeypatch.chdir(films.parent)
    short = {"data.data_dir": films.name, "runtime.output_dir": str(tmp_path / "run"), "training.num_epochs": 1}
    train.train(resolve(TINY, short))
    assert checkpoint.load(tmp_path / "run" / "best_model.pth")["config"]["data"]["data_dir"] == films.name
    monkeypatch.chdir(tmp_path)
    measured = evaluate(tmp_path / "run" / "best_model.pth", output_dir=tmp_path / "measured")
    assert measured["n"] == 40
    path, config = train.resume_config(tmp_path / "run", {"training.num_epochs": 2})
    assert train.train(config, resume=path).epochs == 2


def test_out_of_memory_says_which_batch_size_to_try(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Fit, "_backward", greedy)
    with pytest.raises(UserError, match="at batch size 8; try --batch-size 4 --set training.accumulation_steps=2"):
        train.train(tiny)


def test_a_batch_larger_than_the_training_split_is_refused(tiny: Config) -> None:
    with pytest.raises(DataError, match="batch size 500 is larger than the training split .72 films."):
        train.train(changed(tiny, data__batch_size=500))


def test_an_output_folder_that_is_a_file_is_refused(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        train.train(changed(tiny, runtime__output_dir=str(tmp_path / "file")))


def test_films_too_small_for_bf16_gradients_on_a_cpu_are_trained_in_fp32(tiny: Config) -> None:
    cpu = torch.device("cpu")
    wanted = changed(tiny, runtime__precision="bf16")
    assert train.safe_precision(wanted, cpu) == "bf16"
    assert train.safe_precision(changed(wanted, data__image_size=16), cpu) == "fp32"
    assert train.safe_precision(changed(wanted, training__progressive_resizing=16), cpu) == "fp32"
    assert train.safe_precision(changed(wanted, training__progressive_resizing=32), cpu) == "bf16"


@pytest.mark.parametrize(("precision", "use_amp"), [("fp16", True), ("bf16", False)])
def test_a_precision_that_cannot_be_is_refused(tiny: Config, precision: str, use_amp: bool) -> None:
    with pytest.raises(ConfigError, match="runtime.precision"):
        train.train(changed(tiny, runtime__precision=precision, training__use_amp=use_amp))
