"""reader_study_report.py, study_plan.py and their verb: the same numbers as from Python, every plan reachable."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import command_line
import main
import sample_size
import study_plan
from errors import ConfigError, DataError
from reader_study import load_table, reader_study
from reader_study_report import study_report, summary


def study_table(*, readers: int = 4, cases: int = 40, ratings: bool = True) -> pd.DataFrame:
    """Readers with and without assistance; the assistance helps."""
    rng = np.random.default_rng(0)
    rows = []
    for case in range(cases):
        truth = case % 2
        for reader in range(readers):
            for modality, help_ in (("without", 1.0), ("with", 1.8)):
                score = help_ * truth + rng.normal(0, 1)
                rows.append((f"r{reader}", modality, f"c{case}", truth, round(2 * score) if ratings else score > 0.5))
    return pd.DataFrame(rows, columns=["reader", "modality", "case", "truth", "score"]).astype({"score": float})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "t.csv"
    study_table().to_csv(path, index=False)
    return path


def run(*words: str) -> int:
    try:
        return main.main(["reader_study", *words])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_the_verb_gives_what_the_function_gives(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--table", str(table), "--output-dir", str(tmp_path), "--modalities", "with,without", "--json", "--quiet"]
    assert run(*words, "--covariance", "delong", "--readers", "fixed", "--level", "0.9") == 0
    printed = json.loads(capsys.readouterr().out)
    expected = reader_study(
        load_table(table), modalities=["with", "without"], covariance="delong", readers="fixed", level=0.9
    )
    for key in ("difference", "ci_low", "ci_high", "p_value"):
        assert printed[key] == pytest.approx(expected[key])
    assert printed["difference"] > 0 and printed["covariance_method"] == "delong" and printed["df_den"] is None
    assert printed["reasons"]["df_den"]
    fields = {"f_statistic", "df_num", "per_modality", "per_reader", "readers", "cases"}
    assert fields <= set(json.loads((tmp_path / "reader_study.json").read_text()))


def test_every_file_is_written_and_the_page_stands_alone(table: Path, tmp_path: Path) -> None:
    result = study_report(table, output_dir=tmp_path)
    assert {item.name for item in tmp_path.iterdir()} == {
        "reader_study.json", "reader_roc.png", "reader_study.html", "reader_study.md",
    }  # fmt: skip
    page = (tmp_path / "reader_study.html").read_text()
    assert page.count("<svg") == 1 and not re.findall(r"(?:src|href)=['\"]http", page)
    assert f"{abs(result['difference']):.4f}" in page
    assert "| with |" in (tmp_path / "reader_study.md").read_text()


def test_the_table_in_the_terminal_names_design_method_and_test(table: Path, tmp_path: Path) -> None:
    words = summary(study_report(table, output_dir=tmp_path))
    assert "factorial; 4 readers" in words and "Obuchowski-Rockette" in words
    assert re.search(r"no difference between modalities: F\(1, [\d.]+\) = [\d.]+, p", words)


@pytest.mark.parametrize("method", ["or", "dbm", "ustat"])
def test_every_method_is_reachable(table: Path, tmp_path: Path, method: str) -> None:
    assert run("--table", str(table), "--method", method, "--output-dir", str(tmp_path), "--quiet") == 0
    assert json.loads((tmp_path / "reader_study.json").read_text())["method"] == method


def test_calls_of_0_and_1_are_analysed_without_a_curve(tmp_path: Path) -> None:
    study_table(ratings=False).to_csv(tmp_path / "t.csv", index=False)
    words = ["--table", str(tmp_path / "t.csv"), "--outcome", "sensitivity", "--quiet"]
    assert run(*words, "--output-dir", str(tmp_path / "out")) == 0
    assert not (tmp_path / "out" / "reader_roc.png").exists()


def test_sensitivity_at_a_threshold(table: Path, tmp_path: Path) -> None:
    words = ["--table", str(table), "--outcome", "sensitivity", "--threshold", "2", "--quiet"]
    assert run(*words, "--output-dir", str(tmp_path)) == 0
    stored = json.loads((tmp_path / "reader_study.json").read_text())
    readings = study_table().query("truth == 1 and modality == 'with'")
    found = {row["modality"]: row["estimate"] for row in stored["per_modality"]}
    assert found["with"] == pytest.approx((readings["score"] >= 2).mean())


def test_one_modality_alone_gives_its_mean(table: Path, tmp_path: Path) -> None:
    assert run("--table", str(table), "--modalities", "with", "--output-dir", str(tmp_path), "--quiet") == 0
    stored = json.loads((tmp_path / "reader_study.json").read_text())
    assert len(stored["per_modality"]) == 1 and stored["difference"] is None and stored["reasons"]["difference"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--table T.csv is missing"),
        (["--table", "nowhere.csv"], "nowhere.csv: no such reader study table"),
        (["--table", "TABLE", "--method", "orr"], "method 'orr' is not one of or, dbm, ustat"),
        (["--table", "TABLE", "--covariance", "jacknife"], "did you mean 'jackknife'"),
        (["--table", "TABLE", "--cluster", "patient"], "column patient missing"),
        (["--table", "TABLE", "--outcome", "sensitivity"], "need a threshold"),
        (["--plan", "one_auk"], "did you mean 'one_auc'"),
        (["--plan", "one_auc", "power"], "'power' is not of the form NAME=VALUE"),
        (["--plan", "one_auc", "acu=0.8"], "unknown parameter 'acu'; did you mean 'auc'?"),
        (["--plan", "one_auc", "auc=high", "power=0.8"], "auc=high is not a number"),
        (["--plan", "one_auc", "auc=0.8"], "leave out exactly one of"),
        (["--plan", "precision", "p=0.9"], "margin missing; write margin=VALUE"),
        (["--plan", "mrmc_cases", "readers=5"], "pilot_cases missing (or give a pilot with --table)"),
        (["--table", "TABLE", "--plan", "paired_auc", "power=0.8"], "one reader with two modalities, found 8"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(table) if word == "TABLE" else word for word in words]
    assert run(*words, "--output-dir", str(tmp_path)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


# --- plans ---

COMPONENTS = {"reader_by_modality": 2e-4, "error": 8e-4, "cov1": 3.5e-4, "cov2": 3.4e-4, "cov3": 2.4e-4}
PLANS: dict[str, tuple[dict[str, Any], Any]] = {
    "one_auc": ({"auc": 0.8, "power": 0.9}, lambda: sample_size.one_auc(auc=0.8, power=0.9)),
    "paired_auc": (
        {"delta": 0.05, "variance_a": 0.1, "variance_b": 0.12, "covariance": 0.05, "power": 0.8},
        lambda: sample_size.paired_auc(sample_size.PairedAuc(0.05, 0.1, 0.12, 0.05, 1.0), power=0.8),
    ),
    "partial_auc": (
        {"a1": 2.6, "b1": 1, "a2": 1.9, "b2": 1, "fpr_high": 0.2, "delta": 0.037, "corr_positive": 0.6,
         "corr_negative": 0.6, "power": 0.8},
        lambda: sample_size.paired_auc(
            sample_size.partial_auc_pair(
                sample_size.Binormal(2.6, 1, (0, 0.2)), sample_size.Binormal(1.9, 1, (0, 0.2)), delta=0.037,
                corr_positive=0.6, corr_negative=0.6,
            ),
            power=0.8,
        ),
    ),
    "auc_precision": (
        {"auc": 0.85, "margin": 0.05}, lambda: sample_size.auc_precision_sample_size(0.85, margin=0.05)
    ),
    "mrmc_power": (
        {**COMPONENTS, "pilot_cases": 114, "readers": 6, "cases": 251, "effect": 0.05},
        lambda: sample_size.mrmc_power(
            sample_size.MrmcPilot(**COMPONENTS, cases=114), readers=6, cases=251, effect=0.05
        ),
    ),
    "mrmc_cases": (
        {**COMPONENTS, "pilot_cases": 114, "readers": 6, "effect": 0.05},
        lambda: sample_size.mrmc_cases(sample_size.MrmcPilot(**COMPONENTS, cases=114), readers=6, effect=0.05),
    ),
    "mrmc_readers": (
        {**COMPONENTS, "pilot_cases": 114, "cases": 200, "pilot_effect": 0.05},
        lambda: sample_size.mrmc_readers(sample_size.MrmcPilot(**COMPONENTS, cases=114, effect=0.05), cases=200),
    ),
    "mrmc_conjectured": (
        {"readers": 10, "delta": 0.1, "theta": 0.75, "range_between": 0.1, "range_within": 0.05, "r1": 0.47},
        lambda: sample_size.mrmc_conjectured(
            readers=10, delta=0.1, theta=0.75, range_between=0.1, range_within=0.05, r1=0.47
        ),
    ),
    "precision": (
        {"p": 0.9, "margin": 0.05}, lambda: {"n": sample_size.precision_sample_size(0.9, margin=0.05)}
    ),
    "accuracy_cohort": (
        {"sensitivity": 0.9, "specificity": 0.8, "prevalence": 0.1, "margin": 0.05},
        lambda: sample_size.accuracy_cohort(sensitivity=0.9, specificity=0.8, prevalence=0.1, margin=0.05),
    ),
    "two_proportions": (
        {"p1": 0.9, "p2": 0.8, "power": 0.8, "method": "arcsine", "two_sided": False},
        lambda: sample_size.two_proportions(0.9, 0.8, power=0.8, method="arcsine", two_sided=False),
    ),
    "kappa": (
        {"kappa_null": 0.4, "kappa": 0.7, "prevalence": 0.3},
        lambda: {"n": sample_size.kappa_sample_size(0.4, 0.7, prevalence=0.3)},
    ),
    "kappa_precision": (
        {"kappa": 0.7, "lower": 0.5, "prevalence": 0.3},
        lambda: {"n": sample_size.kappa_precision(0.7, lower=0.5, prevalence=0.3)},
    ),
}  # fmt: skip


def test_every_plan_is_tried_here_and_described_in_the_help() -> None:
    described = re.findall(r"^  (\w+) ", command_line.PLAN_HELP, flags=re.M)
    assert set(PLANS) == set(study_plan.PLANS) == set(described)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_on_the_command_line_answers_as_the_function(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, expected = PLANS[name]
    words = [f"{key}={value}" for key, value in given.items()]
    assert run("--plan", name, *words, "--output-dir", str(tmp_path), "--json", "--quiet") == 0
    answer = json.loads(capsys.readouterr().out)["answer"]
    assert answer == pytest.approx(expected(), nan_ok=True)
    assert json.loads((tmp_path / "study_plan.json").read_text())["plan"] == name


def test_a_parameter_named_in_the_help_exists() -> None:
    import inspect

    text = re.sub(r"\n {4,}(?=\w)", " ", command_line.PLAN_HELP.split("\n", 1)[1].split("\nexample")[0])
    for line in text.splitlines():
        name, _, words = line.strip().partition(" ")
        functions = [f for f in study_plan.PLANS[name] if f is not None]
        known = {key for function in functions for key in inspect.signature(function).parameters}
        named = set(re.findall(r"\w+", words)) - {"and", "or", "table", "the", "components"}
        assert named <= known, name


def test_a_pilot_table_gives_its_components(table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--table", str(table), "--plan", "mrmc_cases", "readers=6", "effect=0.1"]
    assert run(*words, "--output-dir", str(tmp_path), "--json", "--quiet") == 0
    pilot = sample_size.mrmc_pilot(reader_study(load_table(table)))
    expected = sample_size.mrmc_cases(pilot, readers=6, effect=0.1)
    assert json.loads(capsys.readouterr().out)["answer"] == pytest.approx(expected)


def test_a_pilot_of_one_reader_plans_two_aucs_on_the_same_cases() -> None:
    readings = study_table(readers=1)
    found = study_plan.plan(["paired_auc", "power=0.8"], pilot=readings)["answer"]
    wide = readings.pivot(index="case", columns="modality", values="score")
    truth = readings.drop_duplicates("case").set_index("case")["truth"].reindex(wide.index)
    pilot = sample_size.paired_auc_pilot(truth, wide["with"], wide["without"])
    assert found == pytest.approx(sample_size.paired_auc(pilot, power=0.8))


def test_the_answer_in_words_rounds_cases_up() -> None:
    words = study_plan.summary(study_plan.plan(["one_auc", "auc=0.73", "power=0.95", "ratio=1.7"]))
    assert re.search(r"n_positive +30 \(29.67\)", words) and re.search(r"n_total +81", words)


def test_a_pilot_of_the_wrong_method_is_refused() -> None:
    with pytest.raises(DataError, match="must be a reader study by method='or'"):
        study_plan.plan(["mrmc_cases", "readers=5"], pilot=study_table(), study={"method": "ustat"})
    with pytest.raises(ConfigError, match="unknown parameter 'reeders'; did you mean 'readers'"):
        study_plan.plan(["mrmc_cases", "reeders=5"], pilot=study_table())
