"""prediction_table.py, assessment.py, evaluate.py: any program's predictions measured, and every bad table refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

import assessment
import evaluate
import main
from config import EvaluationConfig
from errors import ConfigError, DataError
from prediction_table import Predictions, rank_threshold, read_predictions

FAST = {"evaluation.bootstrap_resamples": 200}


def made_up(n: int = 200, *, seed: int = 0, films_per_patient: int = 2) -> pd.DataFrame:
    """Predictions of a fair model with age, sex and two readers."""
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    p = np.round(1 / (1 + np.exp(-(3 * y - 1.5 + rng.normal(0, 1.5, n)))), 6)
    calls = np.where(rng.random((2, n)) < 0.85, y, ~y)
    return pd.DataFrame(
        {
            "path": [f"s{seed}/{i}.png" for i in range(n)],
            "patient_id": [f"s{seed}p{i // films_per_patient}" for i in range(n)],
            "label": np.where(y, "PNEUMONIA", "NORMAL"),
            "probability_NORMAL": np.round(1 - p, 6),
            "probability_PNEUMONIA": p,
            "age": rng.integers(20, 80, n),
            "sex": rng.choice(["F", "M"], n),
            "reader_ann": np.where(calls[0], "PNEUMONIA", "NORMAL"),
            "reader_bob": np.where(calls[1], "1", "0"),
        }
    )


def write(table: pd.DataFrame, path: Path) -> Path:
    table.to_csv(path, index=False)
    return path


def measured(tmp_path: Path, table: pd.DataFrame, *layers: dict[str, Any], **options: Any) -> dict[str, Any]:
    """metrics.json of a table, written nowhere."""
    path = write(table, tmp_path / "predictions.csv")
    return evaluate.assess_table(path, [FAST, *layers], **options)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluated_table")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    """200 films measured with validation films and a stated prevalence."""
    validation = write(made_up(300, seed=1), folder / "validation.csv")
    path = write(made_up(), folder / "predictions.csv")
    layers = [FAST, {"evaluation.prevalence": 0.05}]
    return evaluate.evaluate_table(path, layers, output_dir=folder / "out", validation_predictions=validation)


# --- reading ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="label"), r"p.csv: no column 'label'"),
        (lambda t: t.drop(columns="path"), r"p.csv: no column 'path'"),
        (lambda t: t.drop(columns=["probability_NORMAL", "probability_PNEUMONIA"]), "no probabilities"),
        (lambda t: t.assign(path=["x"] * len(t)), r"p.csv:3: x is listed twice"),
        (lambda t: t.assign(label=["", *t["label"][1:]]), r"p.csv:2: empty label"),
        (lambda t: t.assign(label=[*t["label"][:-1], "TB"]), r"p.csv:201: label 'TB' has no probability column"),
        (lambda t: t.head(0), "p.csv: the predictions file has no rows"),
        (
            lambda t: t.assign(probability_NORMAL=[1.2, *t["probability_NORMAL"][1:]]),
            r"p.csv:2: probability_NORMAL is 1.2, outside \[0, 1\]; apply sigmoid",
        ),
        (
            lambda t: t.assign(probability_NORMAL=[np.nan, *t["probability_NORMAL"][1:]]),
            r"p.csv:2: probability_NORMAL is ''; give a number",
        ),
        (
            lambda t: t.assign(probability_NORMAL=["NaN", *t["probability_NORMAL"][1:]]),
            r"p.csv:2: probability_NORMAL is 'NaN'",
        ),
        (
            lambda t: t.assign(probability_NORMAL=t["probability_NORMAL"] / 2),
            r"p.csv:2: the probabilities sum to .* not 1 \(200 such rows\)",
        ),
    ],
)
def test_a_bad_table_is_refused_with_file_and_line(tmp_path: Path, change: Any, message: str) -> None:
    path = write(change(made_up()), tmp_path / "p.csv")
    with pytest.raises(DataError, match=message):
        read_predictions(path)


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.csv: no such predictions file"):
        read_predictions(tmp_path / "nowhere.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="empty.csv: not a readable CSV"):
        read_predictions(tmp_path / "empty.csv")


@pytest.mark.parametrize("column", ["probability", "score", "probability_PNEUMONIA"])
def test_one_column_of_the_positive_class_says_what_two_say(tmp_path: Path, column: str) -> None:
    table = made_up()
    both = read_predictions(write(table, tmp_path / "two.csv"))
    table[column] = table["probability_PNEUMONIA"]
    dropped = [name for name in ("probability_NORMAL", "probability_PNEUMONIA") if name != column]
    one = read_predictions(write(table.drop(columns=dropped), tmp_path / "one.csv"))
    assert one.classes == both.classes and one.positive_class == both.positive_class == "PNEUMONIA"
    np.testing.assert_allclose(one.probabilities, both.probabilities, atol=2e-6)


def test_labels_of_0_and_1_are_negative_and_positive(tmp_path: Path) -> None:
    table = made_up()
    y = (table["label"] == "PNEUMONIA").astype(int)
    plain = pd.DataFrame({"path": table["path"], "label": y, "score": table["probability_PNEUMONIA"]})
    films = read_predictions(write(plain, tmp_path / "p.csv"))
    assert films.classes == ("0", "1") and films.positive_class == "1"
    assert films.outcome.tolist() == y.tolist()
    assert not films.patients_known and films.patients is None


def test_the_positive_class_can_be_chosen(tmp_path: Path) -> None:
    films = read_predictions(write(made_up(), tmp_path / "p.csv"), positive="NORMAL")
    assert films.scores.tolist() == made_up()["probability_NORMAL"].tolist()
    with pytest.raises(ConfigError, match="'NORMALE' is not one of .*did you mean 'NORMAL'"):
        read_predictions(tmp_path / "p.csv", positive="NORMALE")


def test_one_column_cannot_speak_of_three_labels(tmp_path: Path) -> None:
    table = pd.DataFrame({"path": list("abc"), "label": ["x", "y", "z"], "score": [0.1, 0.2, 0.3]})
    with pytest.raises(DataError, match="one score column but 3 labels"):
        read_predictions(write(table, tmp_path / "p.csv"))


def test_scores_that_are_no_probabilities_need_a_threshold_and_keep_their_ranks(tmp_path: Path) -> None:
    table = made_up()
    y = (table["label"] == "PNEUMONIA").to_numpy()
    score = np.round(10 * table["probability_PNEUMONIA"] - 5, 2).to_numpy()
    raw = pd.DataFrame({"path": table["path"], "label": table["label"], "score": score})
    with pytest.raises(DataError, match=r"score is -?[\d.]+, outside \[0, 1\]"):
        measured(tmp_path, raw)
    report = measured(tmp_path, raw, {"evaluation.threshold": 1.5})
    values = {name: item["value"] for name, item in report["metrics"].items()}
    assert values["auc_roc"] == pytest.approx(sk.roc_auc_score(y, score))
    assert values["auc_pr"] == pytest.approx(sk.average_precision_score(y, score))
    assert values["sensitivity"] == pytest.approx((score >= 1.5)[y].mean())
    assert np.isnan(values["brier"]) and report["metrics"]["brier"]["reason"] == "the scores are not probabilities"
    assert report["operating_points"]["rows"][0]["threshold"] == 1.5
    assert report["calibration"] == report["decision_curve"] == {"reason": "the scores are not probabilities"}


@pytest.mark.parametrize("threshold", [-9.0, -1.0, 0.0, 0.3, 2.0, 9.0])
def test_a_rank_threshold_calls_the_same_films(threshold: float) -> None:
    raw = np.array([-1.0, 0.0, 0.0, 0.5, 2.0, 2.0, 7.0])
    films = Predictions(pd.DataFrame(), np.zeros(7, dtype=np.int64), np.empty((7, 2)), ("n", "p"), "p", raw=raw)
    ranks = (np.unique(raw, return_inverse=True)[1] + 1) / (len(np.unique(raw)) + 1)
    assert ((ranks >= rank_threshold(films, threshold)) == (raw >= threshold)).all()


# --- what is measured ---


def test_metrics_agree_with_scikit_learn(report: dict[str, Any]) -> None:
    table = made_up()
    y, p = table["label"] == "PNEUMONIA", table["probability_PNEUMONIA"]
    expected = {
        "auc_roc": sk.roc_auc_score(y, p),
        "auc_pr": sk.average_precision_score(y, p),
        "sensitivity": sk.recall_score(y, p >= 0.5),
        "precision": sk.precision_score(y, p >= 0.5),
        "brier": sk.brier_score_loss(y, p),
        "log_loss": sk.log_loss(y, p),
        "mcc": sk.matthews_corrcoef(y, p >= 0.5),
    }
    assert {name: report["metrics"][name]["value"] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert (report["n"], report["n_patients"]) == (200, 100)


def test_every_file_is_written(report: dict[str, Any], folder: Path) -> None:
    written = {item.name for item in (folder / "out").iterdir()}
    assert written >= {
        "metrics.json", "predictions.csv", "report.html", "model_card.md", "confusion_matrix.png", "roc_curve.png",
        "precision_recall_curve.png", "reliability_diagram.png", "decision_curve.png", "subgroup_auroc.png",
    }  # fmt: skip
    assert json.loads((folder / "out" / "metrics.json").read_text())["split"] == "all"


def test_operating_points_are_chosen_on_validation_and_applied_to_both(report: dict[str, Any]) -> None:
    rows = {row["rule"]: row for row in report["operating_points"]["rows"]}
    assert list(rows) == ["fixed", "youden", "sensitivity", "specificity"]
    assert rows["fixed"]["headline"] and rows["fixed"]["threshold"] == 0.5
    validation, test = made_up(300, seed=1), made_up()
    for rule, rate in (("sensitivity", "sensitivity"), ("specificity", "specificity")):
        point = rows[rule]
        assert point["target"] == 0.95 and point["validation"][rate]["value"] >= 0.95
        for films, name in ((validation, "validation"), (test, "test")):
            called = films["probability_PNEUMONIA"] >= point["threshold"]
            truth = films["label"] == "PNEUMONIA"
            assert point[name]["sensitivity"]["value"] == pytest.approx(called[truth].mean())
            assert point[name]["specificity"]["value"] == pytest.approx((~called)[~truth].mean())


def test_without_validation_only_fixed_points_are_shown_and_it_says_so(tmp_path: Path) -> None:
    report = measured(tmp_path, made_up(), {"evaluation.threshold": 0.3})
    points = report["operating_points"]
    assert [row["threshold"] for row in points["rows"]] == [0.3, 0.5]
    assert "no validation films were given" in points["reason"]
    assert "no validation films were given" in report["calibration"]["recalibration"]["reason"]


def test_rows_of_split_val_serve_as_validation(tmp_path: Path) -> None:
    both = pd.concat([made_up().assign(split="test"), made_up(300, seed=1).assign(split="val")])
    report = measured(tmp_path, both)
    assert report["n"] == 200 and report["split"] == "test"
    assert report["calibration"]["recalibration"]["fitted_on"] == {"n": 300, "n_patients": 150}
    assert set(report["films"]["by_split"]) == {"test", "val"}


def test_a_patient_in_two_splits_or_in_validation_and_test_is_an_error(tmp_path: Path) -> None:
    shared = made_up().assign(split=["test", "val"] * 100)
    with pytest.raises(DataError, match="100 patients are in more than one split"):
        measured(tmp_path, shared)
    validation = write(made_up(20).assign(path=[f"v{i}" for i in range(20)]), tmp_path / "v.csv")
    with pytest.raises(DataError, match="10 patients are both in validation"):
        measured(tmp_path, made_up(), validation_predictions=validation)


def test_a_split_the_table_does_not_have_names_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"split 'train' has no films; there are test \(200\)"):
        measured(tmp_path, made_up().assign(split="test"), {"evaluation.split": "train"})


def test_a_split_cannot_be_chosen_from_a_table_that_names_none(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="predictions.csv: names no split, so it has no 'val' films; drop --split to take all 200"
    ):
        measured(tmp_path, made_up(), {"evaluation.split": "val"})
    for split in ("test", "all"):
        assert measured(tmp_path, made_up(), {"evaluation.split": split})["n"] == 200


def test_a_table_of_one_other_split_is_measured_whole(tmp_path: Path) -> None:
    assert measured(tmp_path, made_up().assign(split="external"))["split"] == "external"


def test_temperature_on_validation_lowers_the_loss_of_an_overconfident_model(tmp_path: Path) -> None:
    def sharpened(table: pd.DataFrame) -> pd.DataFrame:
        p = table["probability_PNEUMONIA"].clip(1e-4, 1 - 1e-4)
        sharp = 1 / (1 + np.exp(-4 * np.log(p / (1 - p))))
        return table.assign(probability_PNEUMONIA=sharp, probability_NORMAL=1 - sharp)

    validation = write(sharpened(made_up(400, seed=1)), tmp_path / "v.csv")
    report = measured(tmp_path, sharpened(made_up(400)), validation_predictions=validation)
    found = report["calibration"]["recalibration"]
    assert found["temperature"]["value"] > 2
    for key in ("log_loss", "brier", "ece"):
        assert found["temperature"][key] < found["as_predicted"][key]
    assert found["isotonic"]["ece"] < found["as_predicted"]["ece"]


def test_calibration_holds_reliability_tests_and_a_brier_score_that_adds_up(report: dict[str, Any]) -> None:
    found = report["calibration"]
    assert sum(row["count"] for row in found["bins"]["equal_width"]) == 200
    parts = found["brier"]
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within_bin"]
    assert total == pytest.approx(parts["brier"]) == report["metrics"]["brier"]["value"]
    assert set(found["ece"]) == {"equal_width", "equal_mass"}
    assert 0 <= found["spiegelhalter"]["p_value"] <= 1


# --- prevalence, groups, readers ---


def test_predictive_values_at_a_prevalence_are_those_of_bayes(report: dict[str, Any]) -> None:
    sensitivity = report["metrics"]["sensitivity"]["value"]
    specificity = report["metrics"]["specificity"]["value"]
    stated = report["at_prevalence"]
    true, false = 0.05 * sensitivity, 0.95 * (1 - specificity)
    assert stated["ppv"]["value"] == pytest.approx(true / (true + false))
    assert stated["ppv"]["ci_low"] < stated["ppv"]["value"] < stated["ppv"]["ci_high"]
    assert stated["prior_source"] == "validation films"


def test_the_prior_corrected_threshold_calls_the_same_films(report: dict[str, Any], folder: Path) -> None:
    table = pd.read_csv(folder / "out" / "predictions.csv")
    corrected = table["prior_corrected_PNEUMONIA"] >= report["at_prevalence"]["threshold_corrected"]
    assert (corrected == (table["probability_PNEUMONIA"] >= 0.5)).all()


def test_the_logit_interval_of_predictive_values_is_that_of_mercaldo() -> None:
    # Mercaldo, Lau & Zhou 2007, formula of the logit method, written out for 80/100 and 180/200 at 10 %.
    se, sp, n_pos, n_neg, prevalence = 0.8, 0.9, 100, 200, 0.1
    rates = [
        {"value": value, "ci_low": 0.0, "ci_high": 1.0, "standard_error": np.sqrt(value * (1 - value) / n)}
        for value, n in ((se, n_pos), (sp, n_neg))
    ]
    found = assessment.predictive_values_at(*rates, prevalence=prevalence, level=0.95)
    ppv = se * prevalence / (se * prevalence + (1 - sp) * (1 - prevalence))
    sd = np.sqrt((1 - se) / se / n_pos + sp / (1 - sp) / n_neg)
    limits = [1 / (1 + np.exp(-(np.log(ppv / (1 - ppv)) + z * sd))) for z in (-1.959964, 1.959964)]
    assert found["ppv"].value == pytest.approx(ppv)
    # The quantile is written with seven digits.
    assert found["ppv"].ci == pytest.approx(limits, abs=1e-6)


def test_predictive_values_without_errors_keep_an_interval() -> None:
    perfect = {"value": 1.0, "ci_low": 0.9, "ci_high": 1.0, "standard_error": 0.0}
    found = assessment.predictive_values_at(perfect, perfect, prevalence=0.1, level=0.95)
    assert found["ppv"].ci == pytest.approx((0.09 / (0.09 + 0.09), 1.0))
    assert "conservative" in found["ppv"].method


def test_subgroups_are_those_the_films_name(report: dict[str, Any]) -> None:
    assert list(report["subgroups"]["columns"]) == ["age", "sex"]
    women = report["subgroups"]["columns"]["sex"]["groups"]["F"]
    table = made_up().query("sex == 'F'")
    truth = table["label"] == "PNEUMONIA"
    assert women["n"] == len(table)
    expected = sk.roc_auc_score(truth, table["probability_PNEUMONIA"])
    assert women["metrics"]["auc_roc"]["value"] == pytest.approx(expected)


def test_unknown_and_endless_subgroup_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'sexe'; did you mean 'sex'"):
        measured(tmp_path, made_up(), {"evaluation.subgroups": "sexe"})
    named = made_up().assign(hospital=[f"h{i}" for i in range(200)])
    with pytest.raises(ConfigError, match="'hospital' has 200 different values"):
        measured(tmp_path, named, {"evaluation.subgroups": "hospital"})


def test_groups_below_the_stated_size_are_not_judged(tmp_path: Path) -> None:
    table = made_up().assign(sex=["X"] * 5 + ["F"] * 195)
    report = measured(tmp_path, table, {"evaluation.subgroups": "sex", "evaluation.min_subgroup": 10})
    assert report["subgroups"]["columns"]["sex"]["too_few"] == ["X"]


def test_agreement_of_model_and_readers_is_cohens_kappa_of_each_pair(report: dict[str, Any]) -> None:
    table = made_up()
    model = np.where(table["probability_PNEUMONIA"] >= 0.5, "PNEUMONIA", "NORMAL")
    pairs = {(pair["first"], pair["second"]): pair["value"] for pair in report["agreement"]["cohen_kappa"]}
    assert set(pairs) == {("model", "ann"), ("model", "bob"), ("ann", "bob")}
    assert pairs["model", "ann"] == pytest.approx(sk.cohen_kappa_score(model, table["reader_ann"]))
    for group in ("readers", "readers_and_model"):
        assert set(report["agreement"][group]) == {"fleiss_kappa", "krippendorff_alpha", "gwet_ac1"}


def test_a_readers_unknown_call_is_refused_and_a_blank_one_is_not(tmp_path: Path) -> None:
    table = made_up()
    blank = table.assign(reader_ann=["", *table["reader_ann"][1:]])
    assert measured(tmp_path, blank)["agreement"]["films_rated"]["ann"] == 199
    with pytest.raises(DataError, match="reader_ann is 'pneumonia', not one of NORMAL, PNEUMONIA; leave it blank"):
        measured(tmp_path, table.assign(reader_ann=["pneumonia", *table["reader_ann"][1:]]))


def test_the_worst_errors_are_the_furthest_beyond_the_threshold(report: dict[str, Any]) -> None:
    table = made_up()
    p, truth = table["probability_PNEUMONIA"], table["label"] == "PNEUMONIA"
    wrong = (p >= 0.5) != truth
    expected = table["path"][wrong][(p[wrong] - 0.5).abs().sort_values(ascending=False, kind="stable").index]
    assert [error["path"] for error in report["worst_errors"]] == expected.head(12).tolist()


def test_the_decision_curve_at_a_stated_prevalence_starts_there(report: dict[str, Any]) -> None:
    curve = report["decision_curve"]
    assert curve["prevalence"] == 0.05 and len(curve["thresholds"]) == 99
    assert curve["treat_all"]["value"][0] == pytest.approx(0.05 - 0.95 * 0.01 / 0.99)


# --- several classes, one class ---


def test_three_classes_are_measured_without_an_operating_point(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 120)
    p = rng.dirichlet(np.ones(3), 120) + 2 * np.eye(3)[y]
    p /= p.sum(axis=1, keepdims=True)
    table = pd.DataFrame({"path": [f"{i}" for i in range(120)], "label": np.array(["a", "b", "c"])[y]})
    for k, name in enumerate("abc"):
        table[f"probability_{name}"] = p[:, k]
    validation = table.assign(path=[f"v{i}" for i in range(120)])
    report = evaluate.evaluate_table(
        write(table, tmp_path / "p.csv"),
        [FAST],
        output_dir=tmp_path / "out",
        validation_predictions=write(validation, tmp_path / "v.csv"),
    )
    assert report["positive_class"] is None and report["operating_points"]["rows"] == []
    assert report["metrics"]["accuracy"]["value"] == pytest.approx((p.argmax(axis=1) == y).mean())
    assert "isotonic" not in report["calibration"]["recalibration"]
    assert "several classes" in report["operating_points"]["reason"]
    assert (tmp_path / "out" / "report.html").exists()


def test_films_of_one_class_give_nan_with_reasons_and_a_report(tmp_path: Path) -> None:
    table = made_up().query("label == 'PNEUMONIA'")
    path = write(table, tmp_path / "p.csv")
    report = evaluate.evaluate_table(path, [FAST, {"evaluation.prevalence": 0.1}], output_dir=tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored["metrics"]["auc_roc"]["value"] is None
    assert "no films of class NORMAL" in stored["metrics"]["auc_roc"]["reason"]
    assert np.isnan(report["metrics"]["specificity"]["value"])


# --- shift and abstention ---


def test_the_prevalence_is_estimated_from_the_scores_alone(report: dict[str, Any]) -> None:
    found = report["shift"]
    truth = (made_up()["label"] == "PNEUMONIA").mean()
    assert found["true_prevalence"] == pytest.approx(truth)
    assert found["prevalence"]["ci_low"] < found["prevalence"]["value"] < found["prevalence"]["ci_high"]
    assert found["threshold"] == report["operating_point"]["threshold"] == 0.5
    assert found["at_threshold"]["sensitivity"]["value"] == report["metrics"]["sensitivity"]["value"]


def test_the_operating_point_moves_to_the_prevalence_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = write(made_up(300, seed=1), tmp_path / "v.csv")
    table = made_up(600, seed=2)
    rare = pd.concat([table[table["label"] == "NORMAL"], table[table["label"] == "PNEUMONIA"][:40]])
    plain, moved = (
        measured(tmp_path, rare, {"evaluation.adapt_prevalence": on}, validation_predictions=validation)
        for on in (False, True)
    )
    assert moved["operating_point"]["threshold"] == plain["shift"]["threshold_at_prevalence"] > 0.5
    assert moved["operating_point"]["adapted_from"] == 0.5
    for name in ("sensitivity", "specificity"):
        expected = plain["shift"]["at_threshold_at_prevalence"][name]["value"]
        assert moved["metrics"][name]["value"] == pytest.approx(expected)
    assert moved["metrics"]["specificity"]["value"] > plain["metrics"]["specificity"]["value"]


@pytest.mark.parametrize(
    ("raw", "reason"), [(False, "no validation films were given"), (True, "are not probabilities")]
)
def test_without_scores_of_validation_nothing_is_said_and_nothing_moved(tmp_path: Path, raw: bool, reason: str) -> None:
    table = made_up()
    if raw:
        table["score"] = 10 * table.pop("probability_PNEUMONIA")
        del table["probability_NORMAL"]
    layers = {"evaluation.threshold": 5.0 if raw else 0.5}
    assert reason in measured(tmp_path, table, layers)["shift"]["reason"]
    with pytest.raises(ConfigError, match=f"adapt_prevalence: no prevalence can be estimated here: .*{reason}"):
        measured(tmp_path, table, layers, {"evaluation.adapt_prevalence": True})


def test_the_surest_films_are_decided_first(report: dict[str, Any]) -> None:
    found = report["abstention"]
    assert found["rows"][0]["coverage"] == 1.0
    assert found["rows"][0]["accuracy"]["value"] == pytest.approx(report["metrics"]["accuracy"]["value"])
    assert found["rows"][-1]["accuracy"]["value"] > found["rows"][0]["accuracy"]["value"]
    assert len(found["coverage"]) == len(found["accuracy"]) <= 200 and found["coverage"][-1] == 1.0


# --- the door ---


def test_measuring_its_own_predictions_again_gives_the_same_numbers(report: dict[str, Any], folder: Path) -> None:
    again = evaluate.assess_table(folder / "out" / "predictions.csv", [FAST])[0]
    assert again["metrics"]["auc_roc"] == report["metrics"]["auc_roc"]
    assert list(again["subgroups"]["columns"]) == ["age", "sex"]


def test_a_checkpoint_shows_its_operating_point_first_and_those_of_validation(trained: Path, tmp_path: Path) -> None:
    report = evaluate.evaluate(trained / "best_model.pth", [FAST], output_dir=tmp_path)
    rows = report["operating_points"]["rows"]
    assert rows[0]["headline"] and rows[0]["threshold"] == report["operating_point"]["threshold"]
    assert {row["rule"] for row in rows} == {"fixed", "stable_youden", "youden", "sensitivity", "specificity"}
    assert len([row for row in rows if row["rule"] == "youden"]) == 1
    # Six digits: the stored threshold was chosen on logits of the training process.
    assert rows[0]["validation"]["sensitivity"]["value"] == pytest.approx(
        report["operating_point"]["sensitivity"], abs=1e-6
    )
    assert report["source"]["films_of_training"] is True
    assert "data:image/jpeg;base64" in (tmp_path / "report.html").read_text() or not report["worst_errors"]


def test_a_stated_threshold_wins_over_the_checkpoints(trained: Path, tmp_path: Path) -> None:
    report = evaluate.evaluate(trained / "best_model.pth", [FAST, {"evaluation.threshold": 0.25}], output_dir=tmp_path)
    assert report["operating_point"]["threshold"] == 0.25 and report["operating_point"]["rule"] == "fixed"


def test_another_positive_class_than_the_checkpoints_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.positive_class: 'NORMAL' is not that of the checkpoint .'PNEUMONIA'"):
        evaluate.evaluate(trained / "best_model.pth", [{"data.positive_class": "NORMAL"}], output_dir=tmp_path)


def test_films_of_training_that_have_gone_are_named_as_the_reason(
    trained: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, config = evaluate.configured(trained / "best_model.pth", [], None)
    stored.config.data.data_dir = str(tmp_path / "gone")
    assert evaluate.validation_films(stored, None, config)[1].startswith("the films of training are not at")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "nowhere.csv"], "nowhere.csv: no such predictions file"),
        (["--checkpoint", "x.pth", "--validation-predictions", "v.csv"], "goes with --predictions"),
        (["--predictions", "p.csv", "--prevalence", "2"], "evaluation.prevalence: 2.0 is not between 0 and 1"),
        (["--predictions", "p.csv", "--min-subgroup", "0"], "evaluation.min_subgroup: 0 is out of range"),
        (["--predictions", "p.csv", "--interval", "wilsson"], "did you mean 'wilson'"),
        (["--predictions", "p.csv", "--checkpoint", "x.pth"], "not allowed with argument"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main.main(["evaluate", *words])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and message in lines[0]


def test_evaluate_of_a_table_prints_json(
    folder: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--predictions", str(folder / "predictions.csv"), "--output-dir", str(folder / "cli")]
    fast = ["--set", "evaluation.bootstrap_resamples=200", "--set", "evaluation.intersections=false"]
    assert main.main([*words, *fast, "--interval", "clopper_pearson", "--level", "0.9", "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["level"] == 0.9 and "clopper_pearson" in printed["metrics"]["sensitivity"]["method"]
    assert printed["subgroups"]["intersections"] == {}


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="evaluation.threshold: nan is not a number"):
        EvaluationConfig(threshold=float("nan"))
    with pytest.raises(ConfigError, match="evaluation.target_sensitivity: 1.5 is out of range"):
        EvaluationConfig(target_sensitivity=1.5)
