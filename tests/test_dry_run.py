"""dry_run.py: one batch of everything, an estimate near the truth, and nothing written."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

import dry_run
import main
import train
from config import Config, Overrides, resolve
from errors import DataError
from tests.conftest import TINY


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def settings(films: Path, folder: Path, **further: object) -> Config:
    own: Overrides = {"data.data_dir": str(films), "runtime.output_dir": str(folder / "run")}
    return resolve(TINY, own, {"data.cache_dir": str(folder / "cache")}, further)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_estimate_is_near_what_the_run_takes(frozen: bool, films: Path, tmp_path: Path) -> None:
    config = settings(films, tmp_path, **{"model.freeze_backbone": frozen, "training.num_epochs": 4})
    found = dry_run.dry_run(config)
    started = time.perf_counter()
    train.train(config)
    took = time.perf_counter() - started
    # Seconds beside other jobs vary threefold; an estimate in other units is off by more. Counts are tested below.
    assert took / 6 < found["estimate"]["seconds"] < 6 * took
    assert found["estimate"]["seconds"] == pytest.approx(sum(found["estimate"]["seconds_by_part"].values()))
    assert (found["estimate"]["seconds_by_part"]["frozen_layers"] > 0) == frozen
    written = (tmp_path / "run" / "checkpoint_epoch_4.pth").stat().st_size / 2**20
    assert found["measured"]["checkpoint_mib"] == pytest.approx(written, rel=0.05)
    run_folder = sum(path.stat().st_size for path in (tmp_path / "run").glob("*.pth")) / 2**20
    # best_model.pth of the real run holds the input gate as well, a few hundred KiB.
    assert found["estimate"]["run_folder_mib"] == pytest.approx(run_folder, abs=0.5)


def test_counts_are_those_of_the_run(films: Path, tmp_path: Path) -> None:
    config = settings(films, tmp_path)
    found, result = dry_run.dry_run(config), train.prepare(config)
    assert found["films"] == {name: len(result.manifest.split(name)) for name in ("train", "val", "test")}
    assert found["estimate"]["steps_an_epoch"] == len(result.train_set) // config.data.batch_size
    assert found["estimate"]["pixel_cache_mib"] * 2**20 == len(result.manifest) * 32 * 32 * result.spec.channels
    measured, parts = found["measured"], found["estimate"]["seconds_by_part"]
    epochs, n_val = config.training.num_epochs, len(result.val_set)
    assert epochs > 1
    assert parts["training"] == pytest.approx(measured["step_s"] * found["estimate"]["steps_an_epoch"] * epochs)
    assert parts["validation"] == pytest.approx(measured["validate_s"] * n_val * epochs)
    assert parts["saving"] == pytest.approx(measured["save_s"] * epochs)
    assert parts["decoding"] == pytest.approx(measured["decode_s"] * len(result.manifest))
    assert 0 < found["trainable"] <= found["parameters"] and found["estimate"]["memory_mib"] > 100


def test_a_hundred_times_the_epochs_train_a_hundred_times_as_long(films: Path, tmp_path: Path) -> None:
    few, many = (
        dry_run.dry_run(settings(films, tmp_path, **{"training.num_epochs": count}))["estimate"] for count in (2, 200)
    )
    # Single steps of milliseconds beside other jobs: a hundredfold is told from once.
    assert 20 < many["seconds_by_part"]["training"] / few["seconds_by_part"]["training"] < 500


def test_nothing_is_written_and_an_older_run_stays(films: Path, tmp_path: Path) -> None:
    config = settings(films, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best_model.pth").write_text("of an older run")
    before = files_below(tmp_path) | files_below(films)
    dry_run.dry_run(config)
    assert files_below(tmp_path) | files_below(films) == before
    assert (tmp_path / "run" / "best_model.pth").read_text() == "of an older run"


def test_a_batch_of_one_class_is_given_the_others(films: Path, tmp_path: Path) -> None:
    labels = np.array([0, 0, 0, 1, 2, 1])
    assert dry_run._with_every_class(np.array([1, 2]), labels).tolist() == [1, 2, 3, 4]
    found = dry_run.dry_run(settings(films, tmp_path, **{"data.batch_size": 2, "data.balance": "loss"}))
    assert np.isfinite(found["measured"]["losses"]).all()


def test_the_verb_prints_json_and_lines(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--dry-run", "--data-dir", str(films), "--output-dir", str(tmp_path / "run")]
    for name, value in TINY.items():
        words += ["--set", f"{name}={value}"] if name != "training.num_epochs" else ["--epochs", "2"]
    assert main.main([*words, "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["estimate"]["epochs"] == 2
    assert main.main([*words, "--epochs", "3"]) == 0
    said = capsys.readouterr().out
    assert "the run      3 epochs: about" in said and "nothing was written" in said
    assert max(map(len, said.splitlines())) <= 120
    assert not (tmp_path / "run").exists()


def test_mistakes_are_those_of_train(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="batch size 5000 is larger than the training split"):
        dry_run.dry_run(settings(films, tmp_path, **{"data.batch_size": 5000}))
    assert main.main(["train", "--dry-run", "--resume", str(tmp_path)]) == 2
    assert "--dry-run tries a new run; drop --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, words: str) -> None:
    assert dry_run.duration(seconds) == words
