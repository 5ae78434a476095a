"""Shared films, configurations and trained runs, all made here; real films come through MEDIMG_ASSETS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import synthetic
from config import Config, resolve

TINY = {
    "model.model_type": "test_efficientnet",
    "model.pretrained": False,
    "model.hidden_features": 16,
    "data.image_size": 32,
    "data.batch_size": 8,
    "data.val_fraction": 0.25,
    "training.num_epochs": 2,
    "training.learning_rate": 3e-3,
    "training.backbone_lr": 3e-3,
    "runtime.device": "cpu",
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread_a_process() -> None:
    """pytest-xdist already uses the cores; more threads would only make the tests wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_pixel_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIMG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "pixel_cache"))


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: 24 training and 10 test patients of each class, two films each, 32 px. Not to be changed."""
    folder = tmp_path_factory.mktemp("films")
    synthetic.write_dataset(folder, patients_per_class={"train": 24, "test": 10}, size=32)
    return folder


@pytest.fixture
def tiny(films: Path, tmp_path: Path) -> Config:
    """A run of seconds on `films` into tmp_path/run."""
    return resolve(TINY, {"data.data_dir": str(films), "runtime.output_dir": str(tmp_path / "run")})


@pytest.fixture
def small(tiny: Config) -> Config:
    """`tiny` in fp32, 6 steps of 12 films an epoch, at rates at which rounding does not grow within a run."""
    gentle = {"training.learning_rate": 1e-3, "training.backbone_lr": 3e-4, "training.keep_checkpoints": 9}
    own = {"data.data_dir": tiny.data.data_dir, "runtime.output_dir": tiny.runtime.output_dir, "data.batch_size": 12}
    # Of five seeds 42 alone draws a film for which rounding decides the sign of a gradient, which Adam makes a step of.
    own |= {"training.seed": 1}
    return resolve(TINY, own, gentle, {"runtime.precision": "fp32"})


@pytest.fixture(scope="session")
def trained(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished two-epoch run on `films`. Not to be changed."""
    import train

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "pixel_cache"))
        train.train(resolve(TINY, {"data.data_dir": str(films), "runtime.output_dir": str(folder)}))
    return folder


@pytest.fixture(scope="session")
def optimized(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that `optimize` made of `trained`, with a Triton repository in it. Not to be changed."""
    import candidates
    import optimization

    folder = tmp_path_factory.mktemp("optimized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "pixel_cache"))
        # A fresh process for each candidate takes seconds: it has a test of its own.
        patch.setattr(optimization, "cold_start", lambda *_, **__: candidates.ColdStart(1.5, 300.0))
        optimization.optimize(
            trained / "best_model.pth",
            # Tiny films are predicted at chance: a budget that lets every candidate through.
            [
                {f"optimization.max_{name}_drop": 1 for name in ("auc", "sensitivity", "accuracy")}
                | {"optimization.rounds": 2}
            ],
            output_dir=folder,
            triton_repository=folder / "triton",
        )
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT of random weights. Not to be changed."""
    from tests.cases import write_bert

    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def xor_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 240 cases whose class neither film nor note tells alone. Not to be changed."""
    from tests.cases import write_cases

    return write_cases(tmp_path_factory.mktemp("xor"), count=240)


@pytest.fixture(scope="session")
def trained_cases(xor_cases: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short run on `xor_cases` with film, note, age and sex. Not to be changed."""
    import case_training
    from tests.cases import TINY_CASES

    folder = tmp_path_factory.mktemp("trained_cases")
    own = {"data.manifest": str(xor_cases), "multimodal.text_model": str(bert), "runtime.output_dir": str(folder)}
    settings = {"multimodal.columns": ["age", "sex"], "multimodal.fusion": "gated", "training.input_gate": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "pixel_cache"))
        case_training.train_multimodal(resolve(TINY_CASES, own, settings, {"training.num_epochs": 12}))
    return folder


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real films, weights and reference cases; tests that ask for it are marked realdata."""
    folder = os.environ.get("MEDIMG_ASSETS")
    if not folder:
        pytest.skip("MEDIMG_ASSETS is not set: no real films, weights or reference cases here")
    return Path(folder)
