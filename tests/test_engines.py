"""engines.py: every engine gives what torch gives, and a film's answer does not depend on its neighbours."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import engines
from errors import ConfigError
from models import Classifier, create_model
from onnx_export import export_to_onnx
from preprocess import PreprocessSpec

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(0)
    return create_model("test_efficientnet", 3, pretrained=False, hidden_features=16).eval()


@pytest.fixture(scope="module")
def path(model: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_to_onnx(model, tmp_path_factory.mktemp("engines") / "m.onnx", (1, 3, SIZE, SIZE))


def films(count: int, channels: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, channels), dtype=np.uint8)


def by_hand(model: Classifier, images_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and features with the normalisation written out in double precision."""
    images = np.broadcast_to(images_BHWC, (*images_BHWC.shape[:3], 3)) / 255.0
    inputs = torch.from_numpy(((images - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.inference_mode():
        features = model.features(inputs)
        return model.head(features).numpy(), features.numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("count", [1, 5, 19])
def test_an_engine_gives_what_torch_gives(model: Classifier, path: Path, kind: str, channels: int, count: int) -> None:
    spec = PreprocessSpec(image_size=SIZE, channels=channels, mean=MEAN, std=STD)
    engine = engines.onnx_engine(kind, path, spec, precision="fp32", threads=1)
    images = films(count, channels)
    found, expected = engine.outputs(images), by_hand(model, images)
    for a, b in zip(found, expected):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_array_equal(engine.logits(images), found[0])
    assert engine.name == f"{kind} fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("count", [6, 21])
def test_a_streamed_film_has_the_same_bits_alone_and_among_others(path: Path, count: int, precision: str) -> None:
    spec = PreprocessSpec(image_size=SIZE, channels=1, mean=MEAN, std=STD)
    engine = engines.onnx_engine("openvino", path, spec, precision=precision, threads=2)
    assert isinstance(engine, engines.OpenVinoEngine)
    images = np.split(films(count, 1), count)
    together = list(engine.stream(images))
    assert len(together) == count
    for film, (logits, features) in zip(images, together):
        ((alone_logits, alone_features),) = engine.stream([film])
        np.testing.assert_array_equal(alone_logits, logits)
        np.testing.assert_array_equal(alone_features, features)


def test_threads_that_stream_at_once_get_the_bits_of_one_alone(path: Path) -> None:
    """More threads than requests, singly and in batches: nobody's film is overwritten and nobody waits for ever."""
    spec = PreprocessSpec(image_size=SIZE, channels=1, mean=MEAN, std=STD)
    engine = engines.onnx_engine("openvino", path, spec, precision="fp32", threads=2)
    assert isinstance(engine, engines.OpenVinoEngine) and engine.lanes == 2
    images = np.split(films(24, 1), 24)
    expected = [logits for logits, _ in engine.stream(images)]

    def ask(start: int) -> bool:
        count = 1 + start % 5
        found = engine.stream(images[start : start + count])
        return all(np.array_equal(row, logits) for row, (logits, _) in zip(expected[start:], found))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, [*range(20)] * 10, timeout=60))


def test_a_stream_of_nothing_is_empty(path: Path) -> None:
    spec = PreprocessSpec(image_size=SIZE, channels=1)
    engine = engines.onnx_engine("openvino", path, spec, precision="fp32", threads=1)
    assert isinstance(engine, engines.OpenVinoEngine)
    assert list(engine.stream([])) == []


def test_results_are_copies_that_later_films_do_not_overwrite(path: Path) -> None:
    spec = PreprocessSpec(image_size=SIZE, channels=1)
    engine = engines.onnx_engine("openvino", path, spec, precision="fp32", threads=1)
    first, _ = engine.outputs(films(1, 1))
    kept = first.copy()
    engine.outputs(films(3, 1)[:1])
    np.testing.assert_array_equal(first, kept)


def test_scaling_on_the_host_equals_scaling_in_torch() -> None:
    spec = PreprocessSpec(image_size=SIZE, channels=1, mean=MEAN, std=STD)
    images = films(3, 1)
    expected = engines.InputScaling(spec)(torch.from_numpy(images)).numpy()
    found = engines.HostScaling(spec)(images)
    assert found.flags.c_contiguous
    # One multiplication and one addition against a fused one.
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_engine_that_is_not_installed_is_named_with_its_install_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine openvino: .* not installed \(pip install openvino\)"):
        engines.onnx_engine("openvino", path, PreprocessSpec(image_size=SIZE), precision="fp32")


def test_a_gpu_engine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engines.why_absent("tensorrt") == "there is no CUDA GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "pip install onnxruntime-gpu" in str(engines.why_absent("cuda"))


def test_bf16_is_offered_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "cpu_flags", lambda: frozenset({"avx2"}))
    assert engines.precisions_here("openvino") == ("fp32", "int8")
    monkeypatch.setattr(engines, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    assert engines.precisions_here("openvino") == ("fp32", "bf16", "int8", "int8+bf16")


def test_a_signal_is_handled_after_engines_have_gone(path: Path) -> None:
    code = f"""
import gc, os, signal
from pathlib import Path
import engines
from preprocess import PreprocessSpec

signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
spec = PreprocessSpec(image_size={SIZE})
held = [engines.OpenVinoEngine(Path({str(path)!r}), spec, precision="fp32", threads=1) for _ in range(2)]
while held:
    held.pop(0)
    gc.collect()
    os.kill(os.getpid(), signal.SIGUSR1)
"""
    # In a process of its own: with a Core for each engine it ended with a segmentation fault.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["handled"] * 2), done.stderr
