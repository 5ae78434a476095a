"""Several findings a film from manifest to report: data.task=multilabel through every verb."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from sklearn.metrics import average_precision_score, roc_auc_score

import evaluate
import finding_evaluation
import main
import predict
import predictor
import train
from checkpoint import load as load_checkpoint
from config import Config, ServingConfig, flatten, resolve
from data_preprocessing import load_manifest, split_manifest
from errors import ConfigError, DataError
from inference_api import create_app
from prediction_table import Predictions
from serving_security import ApiKeys
from serving_service import Service
from tests.conftest import TINY
from tests.finding_films import NAMES, write_findings

SETTINGS: dict[str, Any] = TINY | {
    "data.task": "multilabel",
    "data.augmentation_prob": 0.0,
    "training.num_epochs": 10,
    "training.warmup_fraction": 0.2,
    "training.ema_decay": 0.9,
    "model.dropout_rate": 0.1,
    "training.early_stopping_patience": 0,
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_findings(tmp_path_factory.mktemp("findings"))


@pytest.fixture(scope="module")
def run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "pixel_cache"))
        train.train(resolve(SETTINGS, {"data.manifest": str(manifest), "runtime.output_dir": str(folder)}))
    return folder


@pytest.fixture(scope="module")
def measured(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("measured")
    overrides = [{"evaluation.bootstrap_resamples": 200}]
    return folder, evaluate.evaluate(run / "best_model.pth", overrides, output_dir=folder)


def changed(manifest: Path, folder: Path, **settings: Any) -> Config:
    own = {"data.manifest": str(manifest), "runtime.output_dir": str(folder)}
    return resolve(SETTINGS, own, {name.replace("__", "."): value for name, value in settings.items()})


# --- measuring ---


def test_two_independent_findings_are_learned(measured: tuple[Path, dict[str, Any]]) -> None:
    _, result = measured
    areas = {name: own["metrics"]["auc_roc"]["value"] for name, own in result["per_finding"].items()}
    assert list(areas) == list(NAMES) and min(areas.values()) >= 0.9, areas


def test_the_report_says_of_each_finding_what_its_predictions_give(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, result = measured
    table = pd.read_csv(folder / "predictions.csv", keep_default_na=False)
    for name in NAMES:
        truth = table["label"].str.split("|").map(lambda found, name=name: name in found).to_numpy()
        p, called = table[f"probability_{name}"].to_numpy(), table[f"call_{name}"].to_numpy() == 1
        own = result["per_finding"][name]
        expected = {
            "auc_roc": roc_auc_score(truth, p),
            "auc_pr": average_precision_score(truth, p),
            "sensitivity": called[truth].mean(),
            "specificity": (~called[~truth]).mean(),
        }
        assert own["films"] == truth.sum()
        assert {metric: own["metrics"][metric]["value"] for metric in expected} == pytest.approx(expected)
        assert all(own["metrics"][m]["ci_low"] <= v <= own["metrics"][m]["ci_high"] for m, v in expected.items())


def test_the_mean_is_over_findings_and_its_interval_holds_it(measured: tuple[Path, dict[str, Any]]) -> None:
    _, result = measured
    for metric in finding_evaluation.MEANS:
        values = [own["metrics"][metric]["value"] for own in result["per_finding"].values()]
        mean = result["metrics"][metric]
        assert mean["value"] == pytest.approx(np.mean(values))
        assert mean["ci_low"] <= mean["value"] <= mean["ci_high"]


def test_each_finding_has_a_report_of_its_own_and_one_page_links_them(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, result = measured
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name in NAMES:
        own = json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))
        told = result["per_finding"][name]["metrics"]
        assert own["positive_class"] == name and all(own["metrics"][metric] == told[metric] for metric in ("f1", "npv"))
        assert f"href='{name}/report.html'" in page
        assert (folder / name / "report.html").stat().st_size > 10_000 and (folder / name / "predictions.csv").exists()
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["task"] == "multilabel"


def test_the_summary_fits_a_terminal(measured: tuple[Path, dict[str, Any]]) -> None:
    lines = evaluate.summary(measured[1]).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 2 + len(NAMES) + 1
    assert [line.split()[0] for line in lines[2:]] == [*NAMES, "mean"]


def test_the_table_of_one_finding_is_measured_like_any_other(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, result = measured
    own = evaluate.evaluate_table(folder / "mass" / "predictions.csv", output_dir=tmp_path)
    expected = result["per_finding"]["mass"]["metrics"]["auc_roc"]["value"]
    assert own["metrics"]["auc_roc"]["value"] == pytest.approx(expected)


def films(codes: list[int], p: list[list[float]], names: tuple[str, ...] = NAMES) -> Predictions:
    count = len(codes)
    table = pd.DataFrame({"path": range(count), "patient_id": range(count), "split": "test", "label": ""})
    return Predictions(table, np.array(codes), np.array(p), names, None)


def test_a_view_is_the_finding_against_its_absence() -> None:
    view = finding_evaluation.views(films([0, 2, 3], [[0.1, 0.2], [0.3, 0.9], [0.8, 0.7]]))["mass"]
    assert view.outcome.tolist() == [0, 1, 1] and view.scores.tolist() == [0.2, 0.9, 0.7]
    assert view.positive_class == "mass" and view.table["label"].tolist() == ["not mass", "mass", "mass"]


def test_a_finding_no_film_has_is_left_out_of_the_mean_and_named() -> None:
    settings = resolve({"evaluation.bootstrap_resamples": 100}).evaluation
    rng = np.random.default_rng(0)
    made = films(rng.integers(0, 2, 40).tolist(), rng.random((40, 2)).tolist())
    point = {"findings": {name: {"rule": "fixed", "target": None, "threshold": 0.5} for name in NAMES}}
    results = {
        name: evaluate.assess(own, operating_point=finding_evaluation.point_of(point, name), settings=settings)
        for name, own in finding_evaluation.views(made).items()
    }
    mean = finding_evaluation.means(made, results, settings, seed=0)["auc_roc"]
    assert mean.value == results["effusion"]["metrics"]["auc_roc"]["value"]
    assert "without mass" in mean.reason


def test_names_that_no_folder_can_have_are_told_apart() -> None:
    named = finding_evaluation.folder_names(["a/b", "a b", "A_B", "//", "ok"])
    assert list(named.values()) == ["a_b", "a_b_2", "A_B_3", "finding", "ok"]


# --- training and predicting ---


def test_predict_writes_a_probability_and_a_call_for_each_finding(run: Path, manifest: Path, tmp_path: Path) -> None:
    result = predict.predict([str(manifest.parent)], checkpoint=run / "best_model.pth", output_dir=tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv", keep_default_na=False)
    head = [
        "path",
        "prediction",
        "confidence",
        "probability_effusion",
        "probability_mass",
        "call_effusion",
        "call_mass",
    ]
    assert list(table.columns) == head
    for name in NAMES:
        threshold = load_checkpoint(run / "best_model.pth")["operating_point"]["findings"][name]["threshold"]
        assert ((table[f"probability_{name}"] >= threshold) == (table[f"call_{name}"] == 1)).mean() > 0.99
        assert result["predicted"][name] == table[f"call_{name}"].sum()
    none = (table["call_effusion"] == 0) & (table["call_mass"] == 0)
    assert ((table["prediction"] == "No Finding") == none).all() and result["predicted"]["No Finding"] == none.sum()
    both = (table["call_effusion"] == 1) & (table["call_mass"] == 1)
    assert both.any() and (table["prediction"][both] == "effusion|mass").all()


def test_a_resumed_run_equals_an_undisturbed_one(manifest: Path, tmp_path: Path) -> None:
    settings = {"training__num_epochs": 2, "training__mixup_alpha": 0.3, "training__label_smoothing": 0.1}
    whole = train.train(changed(manifest, tmp_path / "whole", **settings))
    for name in ("checkpoint_epoch_1.pth", "best_model.pth"):
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    path, config = train.resume_config(tmp_path / "part" / "checkpoint_epoch_1.pth")
    train.train(config, resume=path)
    a, b = (load_checkpoint(tmp_path / folder / "checkpoint_epoch_2.pth") for folder in ("whole", "part"))
    assert all(torch.equal(a["model_state_dict"][name], b["model_state_dict"][name]) for name in a["model_state_dict"])
    assert a["operating_point"] == b["operating_point"] and whole.epochs == 2


def test_a_frozen_backbone_trains_on_cached_features_with_the_focal_loss(manifest: Path, tmp_path: Path) -> None:
    frozen = changed(manifest, tmp_path, model__freeze_backbone=True, training__loss="focal", training__num_epochs=2)
    result = train.train(frozen)
    assert result.epochs == 2 and set(result.operating_point["findings"]) == set(NAMES)


def test_explain_maps_the_finding_asked_for_and_says_all_that_are_called(
    run: Path, manifest: Path, tmp_path: Path
) -> None:
    film = manifest.parent / "films" / "002_0.png"
    words = ["explain", str(film), "--checkpoint", str(run / "best_model.pth"), "--output-dir", str(tmp_path)]
    assert main.main([*words, "--target", "mass"]) == 0
    told = json.loads((tmp_path / "explanation.json").read_text(encoding="utf-8"))["per_film"][0]
    said = next(predictor.load(run / "best_model.pth").predict_files([str(film)]))
    assert isinstance(said, predictor.Prediction)
    assert told["target"] == "mass" and told["prediction"] == said.prediction


def test_the_server_answers_with_findings_beside_the_published_fields(run: Path, manifest: Path) -> None:
    film = manifest.parent / "films" / "002_0.png"
    loaded = predictor.load(run / "best_model.pth")
    said = next(loaded.predict_files([str(film)]))
    assert isinstance(said, predictor.Prediction)
    service = Service(loaded, ServingConfig(), source=run / "best_model.pth", keys=ApiKeys({}))
    with TestClient(create_app(service)) as client:
        while not service.queue.ready:
            time.sleep(0.005)
        answer = client.post("/predict", files={"file": film.read_bytes()}).json()
        explained = client.post("/explain", files={"file": film.read_bytes()}).json()
        info = client.get("/model/info").json()
    assert answer["prediction"] == said.prediction and answer["confidence"] == said.confidence
    assert answer["probabilities"] == said.probabilities
    assert said.called is not None and answer["findings"] == [name for name, called in said.called.items() if called]
    assert set(answer["thresholds"]) == set(NAMES) and answer["positive_class"] is None and answer["threshold"] is None
    assert explained["target"] in NAMES and set(info["operating_point"]["findings"]) == set(NAMES)


# --- what it does not take ---


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["optimize", "--checkpoint", "BEST"], "several findings a film"),
        (["explain", "--worst", "3", "--checkpoint", "BEST"], "several findings a film"),
        (["compare", "--checkpoints", "BEST", "BEST"], "compare one finding"),
        (["crossval", "--manifest", "CSV", "--set", "data.task=multilabel"], "one class a film"),
        (["train_multimodal", "--manifest", "CSV", "--set", "data.task=multilabel"], "read films alone"),
        (["train", "--manifest", "CSV", "--set", "data.task=multilabel", "--head-search"], "training.head_search"),
        (["train", "--data-dir", "DIR", "--set", "data.task=multilabel"], "needs a --manifest"),
        (["train", "--manifest", "CSV", "--set", "data.task=multilable"], "did you mean 'multilabel'"),
        (["evaluate", "--checkpoint", "BEST", "--set", "evaluation.threshold=0.3"], "evaluation.threshold"),
        (["evaluate", "--checkpoint", "BEST", "--set", "data.task=classes"], "was trained with multilabel"),
        (["evaluate", "--predictions", "CSV", "--set", "data.task=multilabel"], "each finding by itself"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_is_of_one_class_a_film_is_refused_in_one_line(
    words: list[str], found: str, run: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"BEST": str(run / "best_model.pth"), "CSV": str(manifest), "DIR": str(manifest.parent)}
    assert main.main([there.get(word, word) for word in words] + ["--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert found in said and "\n" not in said


@pytest.mark.parametrize("setting", ["data.positive_class=mass", "data.balance=sampler", "data.label_regex=(a)"])
def test_settings_of_one_class_a_film_are_refused(setting: str) -> None:
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=name):
        resolve({"data.task": "multilabel", name: value})


def written(folder: Path, cells: list[str]) -> Config:
    rows = [(f"{number}.png", cell) for number, cell in enumerate(cells)]
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(folder / "m.csv", index=False)
    return resolve({"data.manifest": str(folder / "m.csv"), "data.task": "multilabel"})


def test_a_label_that_contradicts_itself_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"m\.csv:3: a finding and none"):
        load_manifest(written(tmp_path, ["a|b", "none|a"]).data)


def test_one_finding_is_no_task_of_several(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 finding\(s\).*takes 2 to 62"):
        load_manifest(written(tmp_path, ["a", ""]).data)


def test_classes_choose_findings_and_the_others_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = written(tmp_path, ["a|rare", "b", "", "a|b"])
    with caplog.at_level("INFO"):
        found = load_manifest(resolve(flatten(config.to_dict(), source=""), {"data.classes": ["b", "a"]}).data)
    assert found.table["label"].tolist() == [2, 1, 0, 3] and "rare 1" in caplog.text


def test_a_finding_that_training_lacks_is_named(tmp_path: Path) -> None:
    config = written(tmp_path, ["a", "b", "a|b", ""] * 10).data
    config = resolve({"data.manifest": config.manifest, "data.task": "multilabel", "data.classes": ["a", "b", "c"]})
    with pytest.raises(DataError, match="no film has the finding 'c'"):
        split_manifest(load_manifest(config.data), config.data, seed=0)


def test_drawn_splits_keep_patients_together_and_spread_a_rare_finding(tmp_path: Path) -> None:
    cells = ["a"] * 60 + ["a|rare"] * 20 + [""] * 60 + ["b"] * 60
    rows = [(f"{number}.png", cell, f"p{number // 2}") for number, cell in enumerate(cells)]
    pd.DataFrame(rows, columns=["path", "label", "patient_id"]).to_csv(tmp_path / "m.csv", index=False)
    config = resolve({"data.manifest": str(tmp_path / "m.csv"), "data.task": "multilabel"}).data
    drawn = split_manifest(load_manifest(config), config, seed=0)
    assert drawn.table.groupby("patient_id")["split"].nunique().max() == 1
    counts = drawn.counts()
    assert all(2 <= counts[split]["rare"] <= 4 for split in ("val", "test")) and counts["train"]["rare"] >= 12
    assert drawn.digest() == split_manifest(load_manifest(config), config, seed=0).digest()
