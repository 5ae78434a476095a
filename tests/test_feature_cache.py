"""feature_cache.py: training on cached features equals training through the frozen layers, only faster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import array_cache
import engines
import feature_cache as fc
import train
from config import Config
from data_preprocessing import Request
from models import create_model
from preprocess import PreprocessSpec
from tests.test_train import TIMING, assert_same_run, changed, weights

ROOT = Path(fc.__file__).parent
FAMILIES = [
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_byobnet",
    "test_mambaout",
    "test_vit",
    "densenet121",
]
FP32 = {"training__use_amp": False, "model__freeze_backbone": True}


def frozen(name: str, stages: int) -> Any:
    torch.manual_seed(0)
    model = create_model(name, 2, False, freeze_backbone=True, hidden_features=8, image_size=side(name))
    if stages:
        model.unfreeze_layers(num_layers=stages)
    return model.eval()


def side(name: str) -> int:
    return 160 if "vit" in name else 64


@pytest.mark.parametrize("stages", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_then_tail_is_the_whole_network(name: str, stages: int) -> None:
    model, spec = frozen(name, stages), PreprocessSpec(image_size=side(name))
    cut = fc.cut_model(model, spec)
    films = torch.randint(0, 256, (3, side(name), side(name), 1), dtype=torch.uint8)
    with torch.inference_mode():
        parts = fc.Tail(model, cut.position).train(False)(cut.prefix(films))
        whole = model(engines.InputScaling(spec)(films))
    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "densenet121"])
def test_the_tail_trains_the_networks_own_open_parameters(name: str, stages: int) -> None:
    model = frozen(name, stages)
    cut = fc.cut_model(model, PreprocessSpec(image_size=side(name)))
    tail = fc.Tail(model, cut.position)
    tail(torch.randn(2, *cut.row_shape)).sum().backward()
    trained = {name for name, item in model.named_parameters() if item.grad is not None}
    assert trained == {name for name, item in model.named_parameters() if item.requires_grad}


def test_a_network_with_nothing_frozen_is_not_cut() -> None:
    model = create_model("test_resnet", 2, False, hidden_features=8)
    with pytest.raises(fc.CannotCache, match="no stage is frozen"):
        fc.cut_model(model, PreprocessSpec(image_size=64))


def test_a_network_that_does_more_between_its_stages_is_not_cut() -> None:
    model = frozen("test_resnet", 1)

    class Odd(type(model.backbone)):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward_features(x) + x.mean()

    model.backbone.__class__ = Odd
    with pytest.raises(fc.CannotCache, match="does more between its stages"):
        fc.cut_model(model, PreprocessSpec(image_size=64))


ROUTES = {
    "frozen": {},
    "one_stage": {"training__unfreeze_schedule": {1: 1}},
    "two_stages": {"training__unfreeze_schedule": {1: 2}},
    "gradual": {"training__unfreeze_schedule": {2: 1, 3: 2}},
    "ema": {"training__unfreeze_schedule": {1: 1}, "training__ema_decay": 0.9},
    "accumulation": {"training__accumulation_steps": 2},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_cached_and_uncached_training_agree_step_by_step_without_augmentation(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, route: str
) -> None:
    losses: dict[bool, list[float]] = {True: [], False: []}
    backward = train.Fit._backward
    for cached in (True, False):

        def recorded(fit: train.Fit, batch: Any, *, share: float, into: list[float] = losses[cached]) -> float:
            into.append(backward(fit, batch, share=share))
            return into[-1]

        monkeypatch.setattr(train.Fit, "_backward", recorded)
        rates = {"training__learning_rate": 3e-4, "training__backbone_lr": 3e-4}
        settings = {"data__augmentation_prob": 0.0, "training__num_epochs": 3, **rates, **FP32, **ROUTES[route]}
        config = changed(
            tiny,
            model__model_type=name,
            training__feature_cache=cached,
            runtime__output_dir=str(tmp_path / str(cached)),
            **settings,
        )
        train.train(config)
    # float32 sums in another order; Adam divides by the gradient's size and so amplifies what is near zero.
    assert np.allclose(losses[True], losses[False], rtol=2e-3, atol=1e-4)
    assert np.allclose(losses[True][:5], losses[False][:5], rtol=1e-4, atol=1e-5)
    a, b = weights(tmp_path / "True", "checkpoint_epoch_3.pth"), weights(tmp_path / "False", "checkpoint_epoch_3.pth")
    assert a.keys() == b.keys()
    joined = [np.concatenate([state[key].float().numpy().ravel() for key in sorted(state)]) for state in (a, b)]
    assert fc.relative_error(*joined) < 1e-3


def prepared(tiny: Config, **settings: Any) -> tuple[Config, train.Prepared]:
    config = changed(tiny, **{**FP32, **settings})
    return config, train.prepare(config)


def opened(tiny: Config, folder: Path, *, views: int = 2, **settings: Any) -> tuple[fc.FeatureCache, train.Prepared]:
    _, made = prepared(tiny, **settings)
    cache, _ = fc.open_features(
        made.model,
        made.spec,
        made.train_set,
        made.val_set,
        views=views,
        folder=folder,
        device=torch.device("cpu"),
        precision="fp32",
    )
    return cache, made


def test_the_views_are_those_that_uncached_epochs_would_draw(tiny: Config, tmp_path: Path) -> None:
    cache, made = opened(tiny, tmp_path, views=2, data__augmentation_prob=1.0)
    cut = fc.cut_model(made.model, made.spec)
    positions = np.array([5, 0, 17])
    for epoch, view in ((1, 1), (2, 2), (3, 1)):
        (cached,) = cache.train_batches([Request(epoch, positions)])
        films = made.train_set[Request(view, positions)]
        with torch.inference_mode():
            expected = cut.prefix(films.inputs)
        assert torch.allclose(cached.inputs, expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(cached.labels_B, films.labels_B)


def test_validation_features_are_of_the_clean_films(tiny: Config, tmp_path: Path) -> None:
    cache, made = opened(tiny, tmp_path, data__augmentation_prob=1.0)
    positions = np.arange(4)
    (cached,) = cache.val_batches([Request(0, positions)])
    with torch.inference_mode():
        expected = fc.cut_model(made.model, made.spec).prefix(made.val_set[Request(0, positions)].inputs)
    assert torch.allclose(cached.inputs, expected, rtol=1e-3, atol=1e-4)


def test_without_augmentation_one_view_is_kept(tiny: Config, tmp_path: Path) -> None:
    cache, made = opened(tiny, tmp_path, views=4, data__augmentation_prob=0.0)
    assert cache.views == 1 and len(cache.array) == len(made.train_set) + len(made.val_set)


def test_a_second_run_computes_nothing(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tiny, tmp_path)
    monkeypatch.setattr(fc, "choose_engine", lambda *a, **k: pytest.fail("extracted again"))
    opened(tiny, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"training__seed": 7},
        {"data__augmentation_prob": 0.9},
        {"data__rotation_degrees": 5.0},
        {"data__image_size": 48},
        {"data__resize": "pad", "data__image_size": 40},
        {"model__model_type": "test_resnet"},
        {"training__unfreeze_schedule": {1: 1}},
    ],
)
def test_whatever_changes_the_features_makes_another_file(
    tiny: Config, tmp_path: Path, settings: dict[str, Any]
) -> None:
    first, _ = opened(tiny, tmp_path)
    _, made = prepared(tiny, **settings)
    if "training__unfreeze_schedule" in settings:
        made.model.unfreeze_layers(num_layers=1)
    second, _ = fc.open_features(
        made.model,
        made.spec,
        made.train_set,
        made.val_set,
        views=2,
        folder=tmp_path,
        device=torch.device("cpu"),
        precision="fp32",
    )
    assert first.path != second.path


def test_changed_weights_never_reuse_the_features(tiny: Config, tmp_path: Path) -> None:
    first, made = opened(tiny, tmp_path)
    with torch.no_grad():
        next(made.model.backbone.parameters()).mul_(1.01)
    changed_digest = fc.cut_model(made.model, made.spec).digest
    assert changed_digest != fc.cut_model(prepared(tiny)[1].model, made.spec).digest
    assert first.path.exists()


def test_the_trained_head_and_tail_do_not_make_the_features_stale(tiny: Config) -> None:
    _, made = prepared(tiny)
    made.model.unfreeze_layers(num_layers=1)
    before = fc.cut_model(made.model, made.spec).digest
    with torch.no_grad():
        for item in made.model.parameters():
            if item.requires_grad:
                item.add_(0.1)
    assert fc.cut_model(made.model, made.spec).digest == before


def test_a_damaged_feature_file_is_computed_again(tiny: Config, tmp_path: Path) -> None:
    cache, _ = opened(tiny, tmp_path)
    expected = np.array(cache.array)
    data = bytearray(cache.path.read_bytes())
    data[-3] ^= 64
    cache.path.write_bytes(data)
    again, _ = opened(tiny, tmp_path)
    assert np.array_equal(again.array, expected)
    assert array_cache.checked_facts(again.path) is not None


def test_half_precision_features_that_overflow_are_refused() -> None:
    with pytest.raises(fc.CannotCache, match="do not fit float16"):
        fc._storable(np.array([1e6]), np.float16)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"training__mixup_alpha": 0.4}, "MixUp and CutMix mix films"),
        ({"training__feature_cache": False}, "training.feature_cache is off"),
    ],
)
def test_where_the_cache_cannot_be_training_goes_its_ordinary_way_and_says_so(
    tiny: Config, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], reason: str
) -> None:
    with caplog.at_level("INFO", logger="medimg"):
        result = train.train(changed(tiny, **{**FP32, **settings}))
    assert result.epochs == 2 and f"frozen layers run in every step: {reason}" in caplog.text


def test_a_disk_that_would_not_hold_the_features_is_said_with_the_size(
    tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDIMG_CACHE_DIR", str(tmp_path / "cache"))  # other tests may have left such features
    train.prepare(tiny)  # the pixel cache is there before the disk is full
    import shutil

    monkeypatch.setattr(array_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    config = changed(tiny, data__cache_dir=None, **FP32)
    with caplog.at_level("INFO", logger="medimg"):
        assert train.train(config).epochs == 2
    assert "the feature cache needs 0.0 GiB, more than is free there" in caplog.text


def test_a_cached_run_resumes_bit_for_bit_in_another_folder(tiny: Config, tmp_path: Path) -> None:
    settings = {**FP32, "training__unfreeze_schedule": {2: 1}, "training__num_epochs": 4, "training__ema_decay": 0.9}
    whole = changed(tiny, runtime__output_dir=str(tmp_path / "whole"), training__keep_checkpoints=9, **settings)
    train.train(whole)
    for epoch in (1, 3):
        first = tmp_path / "whole" / f"checkpoint_epoch_{epoch}.pth"
        path, config = train.resume_config(first, {"runtime.output_dir": str(tmp_path / f"resumed{epoch}")})
        train.train(config, resume=path)
        assert_same_run(tmp_path / "whole", tmp_path / f"resumed{epoch}")


def test_a_cached_run_is_the_same_twice(tiny: Config, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train.train(
            changed(
                tiny, runtime__output_dir=str(tmp_path / name), data__cache_dir=str(tmp_path / f"cache_{name}"), **FP32
            )
        )
    a, b = (pd.read_csv(tmp_path / name / "history.csv").drop(columns=TIMING) for name in "ab")
    pd.testing.assert_frame_equal(a, b, check_exact=True)


# --- engines ---


@pytest.mark.parametrize("stages", [0, 1])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_openvino_gives_what_torch_gives(name: str, stages: int) -> None:
    cut = fc.cut_model(frozen(name, stages), PreprocessSpec(image_size=side(name)))
    films = np.random.default_rng(0).integers(0, 256, (20, side(name), side(name), 1), dtype=np.uint8)
    torch_rows = engines.TorchFloatEngine(cut.prefix, device=torch.device("cpu"), precision="fp32")(films)
    engine = engines.OpenVinoFloatEngine(cut.prefix, films.shape[1:], precision="fp32")
    assert fc.relative_error(engine(films), torch_rows) < 1e-4
    streamed = list(engine.stream([films[:7], films[7:8], films[8:]]))
    assert np.allclose(np.concatenate(streamed), torch_rows, rtol=1e-3, atol=1e-4)


def test_importing_openvino_loads_no_reporter() -> None:
    code = (
        "import sys, engines; engines.import_openvino(); "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry') and sys.modules[name]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


class Fake:
    """An engine that is off by a stated share."""

    def __init__(self, name: str, rows: Any, share: float) -> None:
        self.name, self.rows, self.share = name, rows, share

    def __call__(self, films: Any) -> Any:
        return self.rows(films) * (1 + self.share)

    def stream(self, batches: Any) -> Any:
        return map(self, batches)


@pytest.mark.parametrize(("share", "chosen"), [(0.0, "openvino"), (0.5, "torch fp32")])
def test_an_unfaithful_engine_is_never_chosen_however_fast(
    monkeypatch: pytest.MonkeyPatch, share: float, chosen: str
) -> None:
    cut = fc.cut_model(frozen("test_resnet", 0), PreprocessSpec(image_size=64))
    films = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 1), dtype=np.uint8)
    rows = engines.TorchFloatEngine(cut.prefix, device=torch.device("cpu"), precision="fp32")
    monkeypatch.setattr(fc, "OpenVinoFloatEngine", lambda *a, **k: Fake("openvino", rows, share))
    monkeypatch.setattr(fc, "openvino_version", lambda: "x")
    monkeypatch.setattr(fc, "_seconds", lambda engine, films: 0.1 if engine.name == "openvino" else 1.0)
    engine = fc.choose_engine(cut, films, device=torch.device("cpu"), precision="fp32", wanted=None)
    assert engine.name == chosen


def test_the_engine_of_a_resumed_run_is_taken_without_a_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = fc.cut_model(frozen("test_resnet", 0), PreprocessSpec(image_size=64))
    films = np.zeros((4, 64, 64, 1), dtype=np.uint8)
    monkeypatch.setattr(fc, "_seconds", lambda engine, films: pytest.fail("timed"))
    engine = fc.choose_engine(cut, films, device=torch.device("cpu"), precision="fp32", wanted="torch fp32")
    assert engine.name == "torch fp32"


def test_the_stored_operating_point_is_that_of_the_whole_network(tiny: Config, tmp_path: Path) -> None:
    from data_preprocessing import sequential_requests
    from predictor import load, softmax

    config = changed(tiny, **FP32)
    result = train.train(config)
    made = train.prepare(config)
    predictor = load(result.best_model, device="cpu", precision="fp32")
    batches = [made.val_set[request].inputs for request in sequential_requests(len(made.val_set), 8)]
    logits = np.concatenate([predictor.engine.logits(batch) for batch in batches])
    assert predictor.temperature == pytest.approx(train.fit_temperature(logits, made.val_set.labels), rel=1e-4)
    point = train.choose_threshold(
        made.val_set.labels == 1, softmax(logits, predictor.temperature)[:, 1], rule="youden"
    )
    assert predictor.threshold == pytest.approx(point.threshold, rel=1e-4)


def test_a_signal_while_the_frozen_layers_run_stops_at_the_next_batch(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, real = [], fc._storable

    class Stopped(train.StopRequest):
        def __enter__(self) -> train.StopRequest:
            requests.append(self)
            return self

        def __exit__(self, *exc: object) -> None:
            return None

    requests: list[Stopped] = []

    def counted(*arguments: Any) -> Any:
        stored.append(1)
        if len(stored) == 2:
            requests[0].signal = 15
        return real(*arguments)

    monkeypatch.setattr(train, "StopRequest", Stopped)
    monkeypatch.setattr(fc, "_storable", counted)
    with pytest.raises(train.Interrupted, match="stopped while the frozen layers ran"):
        train.train(changed(tiny, data__cache_dir=str(tmp_path / "own"), **FP32))
    assert len(stored) == 2
    assert not list((tmp_path / "own" / "features").glob("*.npy"))
