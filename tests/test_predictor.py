"""predictor.py, evaluate.py, predict.py: one way from a file to a decision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import evaluate
import main
import predict
import predictor
from errors import CheckpointError, ConfigError, DataError
from preprocess import apply, decode


@pytest.fixture(scope="module")
def model(trained: Path) -> predictor.Predictor:
    return predictor.load(trained / "best_model.pth", device="cpu", precision="fp32")


def films_of(folder: Path) -> list[str]:
    return [str(item) for item in sorted((folder / "test").rglob("*.jpeg"))]


def test_a_prediction_is_the_one_way_written_out(model: predictor.Predictor, films: Path) -> None:
    path = films_of(films)[3]
    (result,) = model.predict_files([path])
    image = torch.tensor(apply(model.spec, decode(path))).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(model.spec.mean).view(3, 1, 1), torch.tensor(model.spec.std).view(3, 1, 1)
    with torch.inference_mode():
        logits = model.engine.model(((image - mean) / std)[None])
    expected = (logits.double() / model.temperature).softmax(1)[0]
    assert isinstance(result, predictor.Prediction)
    # float32 through a small network in another memory layout: six digits.
    assert list(result.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_the_batch_size_does_not_change_a_prediction(model: predictor.Predictor, films: Path, batch_size: int) -> None:
    paths = films_of(films)
    one = [r.probabilities["PNEUMONIA"] for r in model.predict_files(paths, batch_size=7)]
    other = [r.probabilities["PNEUMONIA"] for r in model.predict_files(paths, batch_size=batch_size)]
    assert one == pytest.approx(other, abs=1e-5)


def test_a_bad_film_yields_its_own_reason_and_no_other_result(
    model: predictor.Predictor, films: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("text")
    paths = [*films_of(films)[:3], str(bad), str(tmp_path / "missing.png"), *films_of(films)[3:5]]
    results = list(model.predict_files(paths, batch_size=4))
    assert [result.path for result in results] == paths
    assert [isinstance(result, predictor.Unreadable) for result in results] == [False] * 3 + [True] * 2 + [False] * 2


def test_a_batch_of_nothing_but_bad_films_is_survived(model: predictor.Predictor, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("text")
    assert [type(item) for item in model.predict_files([str(bad)] * 3, batch_size=2)] == [predictor.Unreadable] * 3


def test_the_operating_point_decides_at_its_threshold() -> None:
    probabilities = np.array([[0.71, 0.29], [0.7, 0.3], [0.1, 0.9]])
    assert predictor.decide(probabilities, ("n", "p"), "p", 0.3).tolist() == [0, 1, 1]
    assert predictor.decide(probabilities[:, ::-1], ("p", "n"), "p", 0.3).tolist() == [1, 0, 0]
    assert predictor.decide(np.array([[0.2, 0.5, 0.3]]), ("a", "b", "c"), None, 0.5).tolist() == [1]


def test_softmax_survives_huge_logits_and_softens_with_temperature() -> None:
    out = predictor.softmax(np.array([[1000.0, 0.0], [2.0, 0.0]]), 2.0)
    assert out[0].tolist() == pytest.approx([1.0, 0.0]) and out[1, 0] == pytest.approx(1 / (1 + np.exp(-1)))


def test_another_model_name_than_the_checkpoints_is_refused(trained: Path) -> None:
    with pytest.raises(ConfigError, match="--model resnet50: .* holds a test_efficientnet"):
        predictor.load(trained / "best_model.pth", model_type="resnet50")


def test_weights_of_another_architecture_in_a_checkpoint_are_named_by_key(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "best_model.pth", weights_only=True)
    content["config"]["model"]["model_type"] = "test_resnet"
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"weights of another architecture: \d+ keys differ .backbone"):
        predictor.load(tmp_path / "x.pth")


def test_an_epoch_checkpoint_predicts_too(trained: Path, films: Path) -> None:
    loaded = predictor.load(trained / "checkpoint_epoch_1.pth", device="cpu")
    assert len(list(loaded.predict_files(films_of(films)[:2]))) == 2


# --- evaluate ---


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate.evaluate(trained / "best_model.pth", output_dir=folder)
    return folder


def test_evaluate_writes_every_file(evaluated: Path) -> None:
    written = {item.name for item in evaluated.iterdir()}
    assert {
        "metrics.json", "predictions.csv", "confusion_matrix.png", "roc_curve.png", "precision_recall_curve.png",
        "reliability_diagram.png",
    } <= written  # fmt: skip


def test_every_metric_of_metrics_json_has_an_interval(evaluated: Path) -> None:
    report = json.loads((evaluated / "metrics.json").read_text())
    assert set(report["metrics"]) == {
        "accuracy", "balanced_accuracy", "precision", "sensitivity", "specificity", "npv", "f1", "auc_roc", "auc_pr",
        "cohen_kappa", "mcc", "brier", "log_loss", "ece", "calibration_slope", "calibration_intercept",
    }  # fmt: skip
    for name, item in report["metrics"].items():
        assert item["ci_low"] <= item["value"] <= item["ci_high"], name
    assert (report["n"], report["n_patients"]) == (40, 20)


def test_metrics_json_is_what_predictions_csv_says(evaluated: Path) -> None:
    from sklearn import metrics as sk

    table = pd.read_csv(evaluated / "predictions.csv")
    report = json.loads((evaluated / "metrics.json").read_text())
    assert list(table.columns) == [
        "path", "patient_id", "split", "label", "prediction", "probability_NORMAL", "probability_PNEUMONIA",
    ]  # fmt: skip
    values = report["metrics"]
    assert values["accuracy"]["value"] == pytest.approx((table["label"] == table["prediction"]).mean())
    assert values["auc_roc"]["value"] == pytest.approx(
        sk.roc_auc_score(table["label"] == "PNEUMONIA", table["probability_PNEUMONIA"])
    )
    matrix = sk.confusion_matrix(table["label"], table["prediction"], labels=["NORMAL", "PNEUMONIA"])
    assert report["confusion_matrix"] == matrix.tolist()


def test_evaluation_on_validation_uses_the_split_of_training(trained: Path, tmp_path: Path) -> None:
    report = evaluate.evaluate(trained / "best_model.pth", [{"evaluation.split": "val"}], output_dir=tmp_path)
    split = pd.read_csv(trained / "split.csv")
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert sorted(table["path"]) == sorted(split.loc[split["split"] == "val", "path"])
    history = pd.read_csv(trained / "history.csv")
    assert report["metrics"]["auc_roc"]["value"] == pytest.approx(history["val_auc_roc"].max())


def test_other_films_without_splits_are_all_measured(trained: Path, films: Path, tmp_path: Path) -> None:
    import synthetic

    synthetic.write_dataset(tmp_path / "other", patients_per_class={"x": 9}, size=32, seed=5)
    report = evaluate.evaluate(
        trained / "best_model.pth", [{"data.data_dir": str(tmp_path / "other" / "x")}], output_dir=tmp_path / "out"
    )
    assert report["n"] == 36


def test_films_of_training_are_refused_as_test_films_under_any_name(trained: Path, films: Path, tmp_path: Path) -> None:
    for label in ("NORMAL", "PNEUMONIA"):
        shutil.copytree(films / "test" / label, tmp_path / "mixed" / label)
    known = sorted((films / "train" / "NORMAL").iterdir())[0]
    shutil.copy(known, tmp_path / "mixed" / "NORMAL" / "IM-7777-0001.jpeg")
    with pytest.raises(
        DataError, match="1 of the 41 films to measure were trained or validated on, e.g. NORMAL/IM-7777"
    ):
        evaluate.evaluate(
            trained / "best_model.pth", [{"data.data_dir": str(tmp_path / "mixed")}], output_dir=tmp_path / "out"
        )


def test_a_split_without_films_names_those_there_are(trained: Path, films: Path, tmp_path: Path) -> None:
    shutil.copytree(films / "test", tmp_path / "films" / "val")
    overrides = [{"data.data_dir": str(tmp_path / "films")}]
    with pytest.raises(DataError, match="split 'test' has no films in .*val .40."):
        evaluate.evaluate(trained / "best_model.pth", overrides, output_dir=tmp_path / "out")


def test_unreadable_films_stop_the_evaluation_or_are_listed(trained: Path, films: Path, tmp_path: Path) -> None:
    folder = tmp_path / "films"
    shutil.copytree(films / "test", folder / "test")
    (folder / "test" / "NORMAL" / "IM-9999-0001.jpeg").write_text("no film")
    overrides = {"data.data_dir": str(folder)}
    with pytest.raises(DataError, match="1 of 41 films cannot be read: .*IM-9999-0001.jpeg.*--skip-unreadable"):
        evaluate.evaluate(trained / "best_model.pth", [overrides], output_dir=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    report = evaluate.evaluate(
        trained / "best_model.pth", [{**overrides, "data.skip_unreadable": True}], output_dir=tmp_path / "out"
    )
    assert report["n"] == 40 and len(report["unreadable"]) == 1
    assert report["unreadable"][0].startswith("test/NORMAL/IM-9999-0001.jpeg: ")
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_class_the_model_does_not_know_is_an_error(trained: Path, films: Path, tmp_path: Path) -> None:
    shutil.copytree(films / "test", tmp_path / "films" / "test")
    (tmp_path / "films" / "test" / "NORMAL").rename(tmp_path / "films" / "test" / "TUBERCULOSIS")
    with pytest.raises(DataError, match="label 'TUBERCULOSIS' is not one of NORMAL, PNEUMONIA"):
        evaluate.evaluate(
            trained / "best_model.pth", [{"data.data_dir": str(tmp_path / "films")}], output_dir=tmp_path / "out"
        )


def test_evaluate_prints_a_table_or_json(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--checkpoint", str(trained / "best_model.pth"), "--output-dir", str(tmp_path), "--quiet"]
    assert main.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "test"
    assert main.main(words[:-1]) == 0
    printed = capsys.readouterr().out
    assert "auc_roc" in printed and max(map(len, printed.splitlines()[:-2])) <= 80


def test_evaluate_self_check_runs(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.self_check()
    assert "evaluate: ok" in capsys.readouterr().out


# --- predict ---


def test_predict_writes_a_row_a_film_and_lists_the_unreadable(trained: Path, films: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    result = predict.predict(
        [str(films / "test"), str(bad)], checkpoint=trained / "best_model.pth", output_dir=tmp_path / "out"
    )
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(table) == 40 == sum(result["predicted"].values())
    assert np.allclose(table["probability_NORMAL"] + table["probability_PNEUMONIA"], 1, atol=2e-6)
    assert pd.read_csv(tmp_path / "out" / "unreadable.csv")["path"].tolist() == [str(bad)]


def test_predict_agrees_with_evaluate_film_by_film(trained: Path, evaluated: Path, films: Path, tmp_path: Path) -> None:
    predict.predict([str(films / "test")], checkpoint=trained / "best_model.pth", output_dir=tmp_path)
    ours = pd.read_csv(tmp_path / "predictions.csv")
    theirs = pd.read_csv(evaluated / "predictions.csv")
    ours["path"] = [str(Path(path).resolve().relative_to(films.resolve())) for path in ours["path"]]
    both = ours.merge(theirs, on="path", suffixes=("", "_evaluated"))
    assert len(both) == 40
    assert np.allclose(both["probability_PNEUMONIA"], both["probability_PNEUMONIA_evaluated"], atol=1e-6)
    assert (both["prediction"] == both["prediction_evaluated"]).all()


def test_predict_removes_a_stale_list_of_unreadable_films(trained: Path, films: Path, tmp_path: Path) -> None:
    (tmp_path / "unreadable.csv").write_text("old")
    predict.predict(films_of(films)[:1], checkpoint=trained / "best_model.pth", output_dir=tmp_path)
    assert not (tmp_path / "unreadable.csv").exists()


def test_a_folder_without_films_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no films in this folder"):
        predictor.find_films([str(tmp_path)])


def test_films_left_out_as_unreadable_do_not_make_the_data_look_changed(films: Path, tmp_path: Path) -> None:
    import train
    from config import resolve
    from tests.conftest import TINY

    shutil.copytree(films, tmp_path / "films")
    (tmp_path / "films" / "train" / "NORMAL" / "IM-9001-0001.jpeg").write_text("no film")
    paths = {"data.data_dir": str(tmp_path / "films"), "runtime.output_dir": str(tmp_path / "run")}
    result = train.train(resolve(TINY, paths, {"data.skip_unreadable": True, "training.num_epochs": 1}))
    report = evaluate.evaluate(Path(result.best_model), [{"evaluation.split": "val"}], output_dir=tmp_path / "out")
    assert report["source"]["films_of_training"]
    split = pd.read_csv(tmp_path / "run" / "split.csv")
    assert "train/NORMAL/IM-9001-0001.jpeg" not in set(split["path"])


@pytest.mark.parametrize("setting", [{"training.seed": 7}, {"data.val_fraction": 0.4}, {"data.test_fraction": 0.4}])
def test_no_setting_of_an_evaluation_can_turn_training_films_into_test_films(
    films: Path, tmp_path: Path, setting: dict[str, float]
) -> None:
    import train
    from config import resolve
    from tests.conftest import TINY

    paths = {"data.data_dir": str(films / "train"), "runtime.output_dir": str(tmp_path / "run")}
    result = train.train(resolve(TINY, paths, {"training.num_epochs": 1}))
    evaluate.evaluate(Path(result.best_model), [setting], output_dir=tmp_path / "out")
    split = pd.read_csv(tmp_path / "run" / "split.csv").set_index("path")["split"]
    measured = pd.read_csv(tmp_path / "out" / "predictions.csv")["path"]
    assert set(split[measured]) == {"test"} and len(measured) == (split == "test").sum()


def test_a_threshold_that_is_no_probability_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluation.threshold: 1.5 is not a probability"):
        evaluate.evaluate(trained / "best_model.pth", [{"evaluation.threshold": 1.5}], output_dir=tmp_path)
