"""The main job on real films and real weights; skipped where MEDIMG_ASSETS is not set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import main
from config import DataConfig
from data_preprocessing import cached_pixels, load_manifest, resolve_channels, split_manifest
from models import create_model
from preprocess import PreprocessSpec, apply, decode

pytestmark = pytest.mark.realdata


def test_the_published_films_split_by_patient_without_a_leak(assets: Path) -> None:
    config = DataConfig(data_dir=str(assets / "data" / "chest_xray"))
    manifest = split_manifest(load_manifest(config), config, seed=42)
    counts = manifest.counts()
    assert counts["test"] == {"NORMAL": 117, "PNEUMONIA": 195}
    assert counts["train"]["NORMAL"] + counts["val"]["NORMAL"] == 1341
    assert counts["train"]["PNEUMONIA"] + counts["val"]["PNEUMONIA"] == 3875
    assert manifest.table["patient_id"].nunique() == 3865
    assert (manifest.table.groupby("patient_id")["split"].nunique() == 1).all()
    prevalence = [counts[split]["PNEUMONIA"] / sum(counts[split].values()) for split in ("train", "val")]
    assert abs(prevalence[0] - prevalence[1]) < 0.01


def test_grey_films_stored_as_rgb_are_seen_to_be_grey(assets: Path) -> None:
    paths = sorted(str(item) for item in (assets / "data" / "chest_xray" / "train" / "NORMAL").iterdir())
    assert resolve_channels(DataConfig(), paths, seed=0) == 1


@pytest.mark.parametrize("resize", ["squash", "pad", "crop"])
def test_full_size_films_come_out_square_with_their_range(assets: Path, resize: str) -> None:
    paths = sorted((assets / "data" / "chest_xray_raw").rglob("*.jpeg"))
    assert len(paths) == 48
    for path in paths:
        pixels = apply(PreprocessSpec(resize=resize), decode(path))
        assert pixels.shape == (224, 224, 1) and np.ptp(pixels) > 100


def test_a_squashed_full_size_film_is_the_published_small_copy(assets: Path) -> None:
    """Whoever shrank the films squeezed them: our squash must see what those copies show."""
    compared = 0
    for raw in sorted((assets / "data" / "chest_xray_raw").rglob("*.jpeg")):
        small = list((assets / "data" / "chest_xray").glob(f"*/*/{raw.name}"))
        if small:
            a = apply(PreprocessSpec(), decode(raw)).astype(float)
            b = apply(PreprocessSpec(), decode(small[0])).astype(float)
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98, raw.name
            compared += 1
    assert compared > 10


def test_real_weights_fill_the_backbone(assets: Path) -> None:
    model = create_model("tf_efficientnet_lite0", 2, weights=assets / "weights" / "tf_efficientnet_lite0.safetensors")
    # A trained stem is far from timm's random one, whose kernels have mean 0.
    assert model.backbone.conv_stem.weight.abs().max() > 1


@pytest.mark.slow
def test_a_frozen_backbone_tells_pneumonia_from_normal(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """300 training films and one minute: far from the best, and far from chance."""
    films = assets / "data" / "chest_xray"
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (("train", 200), ("test", 60)):
        for label in ("NORMAL", "PNEUMONIA"):
            paths = sorted((films / split / label).iterdir())
            rows += [
                {"path": str(paths[i]), "label": label, "split": split}
                for i in rng.choice(len(paths), count, replace=False)
            ]
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    words = [
        "train", "--manifest", str(tmp_path / "manifest.csv"), "--model", "tf_efficientnet_lite0", "--weights",
        str(assets / "weights" / "tf_efficientnet_lite0.safetensors"), "--freeze-backbone", "--epochs", "4",
        "--batch-size", "16", "--output-dir", str(tmp_path / "run"), "--device", "cpu", "--quiet",
    ]  # fmt: skip
    assert main.main(words) == 0
    words = [
        "evaluate",
        "--checkpoint",
        str(tmp_path / "run" / "best_model.pth"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main.main([*words, "--device", "cpu", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"]["auc_roc"]["value"] > 0.85
    assert report["n"] == 120


def test_the_cache_of_real_films_is_what_is_decoded(assets: Path, tmp_path: Path) -> None:
    paths = sorted(str(item) for item in (assets / "data" / "chest_xray_raw").rglob("*.jpeg"))
    store, unreadable = cached_pixels(paths, PreprocessSpec(image_size=96), tmp_path)
    assert not unreadable
    assert np.array_equal(store[7], apply(PreprocessSpec(image_size=96), decode(paths[7])))
