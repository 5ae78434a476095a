"""crossval.py: folds by patient, out-of-fold predictions, what is said of them, and going on after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import checkpoint
import crossval as cv
import main
from auroc import auroc, clustered_auroc
from config import Config, resolve
from data_preprocessing import load_manifest
from errors import ConfigError, DataError
from runtime import to_json
from tests.conftest import TINY


@pytest.fixture(scope="module")
def config(films: Path) -> Config:
    return resolve(TINY, {"data.data_dir": str(films), "training.num_epochs": 1})


@pytest.fixture(scope="module")
def done(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("crossval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "pixel_cache"))
        return folder, cv.crossval(config, folds=2, repeats=2, output_dir=folder)


# --- folds -----------------------------------------------------------------------------------------------------


def test_every_film_outside_test_is_held_out_once_a_repeat_and_with_its_patient(config: Config) -> None:
    manifest, left = cv.development_films(load_manifest(config.data))
    assert left == 40 and not (manifest.table["split"] == "test").any()
    folds = list(cv.assign_folds(manifest, folds=4, repeats=3, seed=5))
    assert [(fold.repeat, fold.number) for fold in folds] == [(r, k) for r in (1, 2, 3) for k in (1, 2, 3, 4)]
    for repeat in (1, 2, 3):
        own = [fold.held_out for fold in folds if fold.repeat == repeat]
        assert sorted(np.concatenate(own)) == list(range(len(manifest)))
        patients = [set(manifest.table["patient_id"].iloc[rows]) for rows in own]
        assert sum(map(len, patients)) == len(set.union(*patients))
        shares = [manifest.table["label"].iloc[rows].mean() for rows in own]
        assert max(shares) - min(shares) < 0.1
    assert not np.array_equal(folds[0].held_out, folds[4].held_out)


def test_the_same_seed_gives_the_same_folds(config: Config) -> None:
    manifest, _ = cv.development_films(load_manifest(config.data))
    first, second = (list(cv.assign_folds(manifest, folds=3, repeats=2, seed=1)) for _ in range(2))
    assert all(np.array_equal(a.held_out, b.held_out) for a, b in zip(first, second))
    assert np.array_equal(first[3].held_out, next(cv.assign_folds(manifest, folds=3, repeats=1, seed=2)).held_out)


def test_too_few_patients_for_the_folds_are_counted(config: Config) -> None:
    manifest, _ = cv.development_films(load_manifest(config.data))
    with pytest.raises(DataError, match=r"24 patient\(s\) outside test; 30 folds need at least 30 of every class"):
        next(cv.assign_folds(manifest, folds=30, repeats=1, seed=0))


@pytest.mark.parametrize(("folds", "repeats"), [(1, 1), (5, 0)])
def test_fewer_than_two_folds_or_one_repeat_are_refused(
    config: Config, tmp_path: Path, folds: int, repeats: int
) -> None:
    with pytest.raises(ConfigError, match="at least 2 folds and 1 repeat"):
        cv.crossval(config, folds=folds, repeats=repeats, output_dir=tmp_path)


def test_data_that_are_all_test_are_refused(films: Path, config: Config, tmp_path: Path) -> None:
    rows = [f"{path},{path.parent.name},test" for path in sorted(films.rglob("*.jp*g"))]
    (tmp_path / "films.csv").write_text("path,label,split\n" + "\n".join(rows), encoding="utf-8")
    all_test = replace(config, data=replace(config.data, manifest=str(tmp_path / "films.csv")))
    with pytest.raises(DataError, match="every film is of split test"):
        cv.crossval(all_test, folds=2, repeats=1, output_dir=tmp_path / "out")


# --- a run -----------------------------------------------------------------------------------------------------


def test_no_model_saw_the_patients_it_is_measured_on(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    for fold in sorted(folder.glob("repeat_*/fold_*")):
        split = pd.read_csv(fold / "split.csv")
        held_out = set(split.loc[split["split"] == "test", "patient_id"])
        assert held_out and not held_out & set(split.loc[split["split"] != "test", "patient_id"])
        assert set(pd.read_csv(fold / cv.FOLD_PREDICTIONS)["patient_id"]) == held_out


def test_the_tables_hold_what_the_folds_predicted(done: tuple[Path, dict[str, Any]]) -> None:
    folder, result = done
    parts = [
        pd.read_csv(path) for path in sorted(folder.glob("repeat_*/fold_*/*.csv")) if path.name == cv.FOLD_PREDICTIONS
    ]
    table = pd.read_csv(folder / "predictions.csv").set_index("path")
    assert len(table) == result["n"] == 96 and result["n_patients"] == 48 and result["test_films_left_alone"] == 40
    means = pd.concat(parts).groupby("path")["probability_PNEUMONIA"].mean()
    np.testing.assert_allclose(table["probability_PNEUMONIA"], means[table.index], atol=1e-12)
    assert not any(Path(path).is_absolute() for path in table.index)
    folds = pd.read_csv(folder / "folds.csv")
    assert list(zip(folds["repeat"], folds["fold"])) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row, part in zip(result["per_fold"], parts):
        truth = (part["label"] == "PNEUMONIA").to_numpy(int)
        assert row["auc_roc"] == pytest.approx(auroc(truth, part["probability_PNEUMONIA"]))
        assert row["accuracy"] == pytest.approx((part["called"] == part["label"]).mean())
        called = np.where(part["probability_PNEUMONIA"] >= part["threshold"], "PNEUMONIA", "NORMAL")
        assert (called == part["called"]).all()
    assert result["metrics"]["auc_roc"]["value"] == pytest.approx(folds["auc_roc"].mean())
    assert result["metrics"]["auc_roc"]["sd_between_folds"] == pytest.approx(folds["auc_roc"].std())
    assert json.loads((folder / "crossval.json").read_text())["metrics"]["accuracy"]["value"] > 0


def test_evaluate_reads_the_out_of_fold_predictions(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    words = ["evaluate", "--predictions", str(done[0] / "predictions.csv"), "--output-dir", str(tmp_path), "--quiet"]
    assert main.main(words) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["n"] == 96


def test_folds_that_are_done_are_not_trained_again(
    done: tuple[Path, dict[str, Any]], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = done
    monkeypatch.setattr(cv.train, "train", lambda *_, **__: pytest.fail("trained again"))
    again = cv.crossval(config, folds=2, repeats=2, output_dir=folder)
    assert to_json(again) == to_json(result)  # text, for an undefined precision is no equal of itself


def test_other_settings_are_refused_where_folds_lie(done: tuple[Path, dict[str, Any]], config: Config) -> None:
    other = replace(config, training=replace(config.training, learning_rate=1e-4))
    with pytest.raises(ConfigError, match="holds folds trained with other settings"):
        cv.crossval(other, folds=2, repeats=2, output_dir=done[0])


def test_a_stopped_fold_goes_on_from_its_checkpoint(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = replace(config, training=replace(config.training, num_epochs=2))
    whole = cv.crossval(two, folds=2, repeats=1, output_dir=tmp_path / "whole")
    kept = checkpoint.save

    def stop_after_the_first_epoch(path: Path, content: dict[str, Any]) -> None:
        kept(path, content)
        if path.name == "checkpoint_epoch_1.pth":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop_after_the_first_epoch)
    with pytest.raises(KeyboardInterrupt):
        cv.crossval(two, folds=2, repeats=1, output_dir=tmp_path / "stopped")
    monkeypatch.setattr(checkpoint, "save", kept)
    resumed = cv.crossval(two, folds=2, repeats=1, output_dir=tmp_path / "stopped")
    assert resumed["per_fold"] == whole["per_fold"]


def test_the_verb_prints_the_table_and_the_json(
    done: tuple[Path, dict[str, Any]], films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["crossval", "--data-dir", str(films), "--folds", "2", "--repeats", "2", "--output-dir", str(done[0])]
    for name, value in {**TINY, "training.num_epochs": 1}.items():
        words += ["--set", f"{name}={value}"]
    assert main.main([*words, "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folds"] == 2
    assert main.main(words) == 0
    out = capsys.readouterr().out
    assert "96 films of 48 patients, 2 folds, 2 repeats; 40 test films left alone" in out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("written", "next")))


# --- estimates -------------------------------------------------------------------------------------------------


def predicted(n: int, seed: int, *, models: int = 1, per_patient: int = 1) -> cv.OutOfFold:
    rng = np.random.default_rng(seed)
    patients = np.arange(n) // per_patient
    labels = rng.integers(0, 2, n)
    p = 1 / (1 + np.exp(-rng.normal(2 * labels - 1, 1.5)))
    return cv.OutOfFold(
        labels=labels,
        called=(p >= 0.5).astype(np.int64),
        p=np.column_stack([1 - p, p]),
        patients=patients,
        models=patients % models,
        positive=1,
    )


def repeated(films: cv.OutOfFold) -> cv.OutOfFold:
    """Every film a second time, predicted alike by other models."""
    twice = {name: np.concatenate([value, value]) for name, value in vars(films).items() if name != "positive"}
    twice["models"][len(films.models) :] += films.models.max() + 1
    return replace(films, **twice)


@pytest.mark.parametrize("per_patient", [1, 3])
def test_the_auroc_of_one_fold_is_obuchowskis(per_patient: int) -> None:
    films = predicted(300, 0, per_patient=per_patient)
    found = cv.mean_auroc(films, level=0.95)
    areas, covariance = clustered_auroc(films.labels, films.p[:, 1], films.patients)
    assert found.value == pytest.approx(areas[0])
    # Factors n/(n - 1) apart.
    assert found.standard_error == pytest.approx(np.sqrt(covariance[0, 0]), rel=0.02)


def test_the_variance_over_folds_is_that_of_independent_films() -> None:
    films = predicted(400, 1, models=4)
    own = [cv.mean_auroc(films.of(model), level=0.95).standard_error for model in range(4)]
    found = cv.mean_auroc(films, level=0.95)
    assert found.standard_error == pytest.approx(np.sqrt(np.sum(np.square(own))) / 4, rel=0.02)
    assert found.value == pytest.approx(np.mean([auroc(films.of(m).labels, films.of(m).p[:, 1]) for m in range(4)]))


def test_a_repeat_that_says_the_same_narrows_no_interval() -> None:
    films = predicted(300, 2, models=3)
    once, twice = cv.pooled(films, level=0.95), cv.pooled(repeated(films), level=0.95)
    for name, estimate in once.items():
        for value, other in zip((estimate.value, *estimate.ci), (twice[name].value, *twice[name].ci)):
            assert other == pytest.approx(value, abs=1e-9), name


def test_intervals_of_the_mean_auroc_cover_as_often_as_they_say() -> None:
    truth = 0.8286  # of N(1, 1.5) against N(-1, 1.5): the normal distribution function at 2 / (1.5 √2)
    found = [cv.mean_auroc(predicted(240, seed, models=3), level=0.95) for seed in range(300)]
    covered = np.mean([item.ci_low <= truth <= item.ci_high for item in found])
    assert 0.91 <= covered <= 0.98


def test_losses_and_rates_are_those_of_the_films() -> None:
    films = predicted(200, 3)
    found = cv.pooled(films, level=0.95)
    p, y = films.p[:, 1], films.labels
    assert found["brier"].value == pytest.approx(((p - y) ** 2).mean())
    assert found["log_loss"].value == pytest.approx(-np.log(np.where(y == 1, p, 1 - p)).mean())
    assert found["sensitivity"].value == pytest.approx(films.called[y == 1].mean())
    assert found["npv"].value == pytest.approx(1 - y[films.called == 0].mean())
    assert found["brier"].standard_error == pytest.approx(((p - y) ** 2).std(ddof=1) / np.sqrt(200), rel=1e-6)


def test_a_fold_without_a_class_has_no_auroc_and_says_why() -> None:
    films = predicted(100, 4, models=2)
    films.labels[films.models == 0] = 1
    found = cv.mean_auroc(films, level=0.95)
    assert np.isnan(found.value) and "no film of one of the classes" in found.reason


def test_several_classes_have_accuracy_and_the_mean_of_class_against_rest() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 120)
    labels = rng.integers(0, 3, 120)
    films = cv.OutOfFold(labels, p.argmax(1), p, np.arange(120), np.arange(120) % 2, positive=None)
    found = cv.pooled(films, level=0.95)
    assert set(found) == {"auc_roc", "accuracy", "brier", "log_loss"}
    areas = [auroc(labels[m::2] == k, p[m::2, k]) for m in range(2) for k in range(3)]
    assert found["auc_roc"].value == pytest.approx(np.mean(areas))
