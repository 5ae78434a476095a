"""compare.py: the same films, matched by path; differences with their sign, tests and intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import auroc
import checkpoint
import compare
import main
from data_preprocessing import film_hashes
from errors import ConfigError, DataError
from tests.test_evaluate import FAST, made_up, write


def blurred(table: pd.DataFrame) -> pd.DataFrame:
    """A worse model on the same films, in another order."""
    rng = np.random.default_rng(7)
    p = table["probability_PNEUMONIA"].clip(1e-4, 1 - 1e-4)
    worse = 1 / (1 + np.exp(-np.log(p / (1 - p)) - rng.normal(0, 2, len(table))))
    other = table.assign(probability_PNEUMONIA=worse, probability_NORMAL=1 - worse)
    return other.sample(frac=1, random_state=0)


def compared(tmp_path: Path, a: pd.DataFrame, b: pd.DataFrame, *layers: dict[str, Any], **options: Any) -> Any:
    paths = write(a, tmp_path / "a.csv"), write(b, tmp_path / "b.csv")
    return compare.compare(*paths, [FAST, *layers], output_dir=tmp_path / "out", **options)


def test_the_difference_is_a_less_b_by_delong_on_films_matched_by_path(tmp_path: Path) -> None:
    a = made_up(films_per_patient=1)
    b = blurred(a)
    result = compared(tmp_path, a, b)
    y = (a["label"] == "PNEUMONIA").to_numpy()
    other = b.set_index("path").loc[a["path"], "probability_PNEUMONIA"].to_numpy()
    expected = auroc.delong_test(y, a["probability_PNEUMONIA"], other)
    found = result["auc_roc"]
    assert (found["a"], found["b"]) == pytest.approx((expected.first, expected.second))
    assert (found["difference"], found["p_value"]) == pytest.approx((expected.difference, expected.p_value))
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(stored["auc_roc"]) >= {"a", "b", "difference", "ci_low", "ci_high", "p_value"}
    assert set(stored["mcnemar"]) >= {"statistic", "p_value"}
    assert set(stored["metrics"]["sensitivity"]) >= {"a", "b", "difference", "ci_low", "ci_high"}
    assert (tmp_path / "out" / "roc_curves.png").exists()


def test_films_of_one_patient_are_clustered(tmp_path: Path) -> None:
    result = compared(tmp_path, made_up(), blurred(made_up()))
    assert result["n_patients"] == 100 and "clustered" in result["mcnemar"]["method"]


def test_a_model_against_itself_shows_no_difference(tmp_path: Path) -> None:
    result = compared(tmp_path, made_up(), made_up())
    assert result["auc_roc"]["difference"] == 0 == result["metrics"]["brier"]["difference"]
    assert result["mcnemar"]["p_value"] == 1


def test_exchanging_the_models_changes_the_sign_alone(tmp_path: Path) -> None:
    one = compared(tmp_path, made_up(), blurred(made_up()))["auc_roc"]
    other = compared(tmp_path, blurred(made_up()), made_up())["auc_roc"]
    assert other["difference"] == pytest.approx(-one["difference"])
    assert (other["ci_low"], other["p_value"]) == pytest.approx((-one["ci_high"], one["p_value"]))


def test_patients_named_in_one_table_serve_both(tmp_path: Path) -> None:
    result = compared(tmp_path, made_up().drop(columns="patient_id"), blurred(made_up()))
    assert result["n_patients"] == 100 and result["patients_known"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.iloc[3:],
            r"same films: 3 of the films of A are not in the other \(s0/0.png, s0/1.png, s0/2.png\)",
        ),
        (lambda t: t.assign(path=["new", *t["path"][1:]]), "1 of the films of A .*; 1 of the films of B .*new"),
        (lambda t: t.assign(label=t["label"].map({"NORMAL": "PNEUMONIA", "PNEUMONIA": "NORMAL"})), "200 films have an"),
        (lambda t: t.assign(patient_id="one"), "films have another patient_id in B"),
        (
            lambda t: t.rename(columns={"probability_NORMAL": "probability_OK"}).replace("NORMAL", "OK"),
            "A has classes NORMAL, PNEUMONIA, B OK, PNEUMONIA",
        ),
    ],
)
def test_tables_that_do_not_match_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compared(tmp_path, made_up(), change(made_up()))


def test_columns_in_another_order_are_the_same_classes(tmp_path: Path) -> None:
    a = made_up()
    turned = a[[*a.columns[:3], "probability_PNEUMONIA", "probability_NORMAL", *a.columns[5:]]]
    assert compared(tmp_path, a, turned)["auc_roc"]["difference"] == 0


def test_non_inferiority_is_the_lower_limit_against_the_margin() -> None:
    auc = {"difference": -0.01, "ci_low": -0.03, "ci_high": 0.01}
    found = compare.non_inferiority(auc, margin=0.02, level=0.95)
    assert not found["a_not_inferior_to_b"]["shown"] and found["b_not_inferior_to_a"]["shown"]
    se = 0.02 / stats.norm.ppf(0.975)
    assert found["a_not_inferior_to_b"]["p_value"] == pytest.approx(stats.norm.sf(0.01 / se))
    assert found["alpha_one_sided"] == pytest.approx(0.025)
    wide = compare.non_inferiority(auc, margin=0.05, level=0.95)
    assert wide["a_not_inferior_to_b"]["shown"] and wide["a_not_inferior_to_b"]["p_value"] < 0.025


def test_a_margin_outside_0_and_1_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--margin 2 is not between 0 and 1"):
        compared(tmp_path, made_up(), made_up(), margin=2.0)


def test_thresholds_move_the_calls_of_each_model(tmp_path: Path) -> None:
    result = compared(tmp_path, made_up(), made_up(), thresholds=(0.5, 0.0))
    assert result["metrics"]["sensitivity"]["b"] == 1 > result["metrics"]["sensitivity"]["a"]


def test_thresholds_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--thresholds nan 0.5: not numbers"):
        compared(tmp_path, made_up(), made_up(), thresholds=(math.nan, 0.5))


def test_compare_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = str(write(made_up(), tmp_path / "a.csv")), str(write(blurred(made_up()), tmp_path / "b.csv"))
    words = ["compare", "--predictions", *paths, "--output-dir", str(tmp_path / "out"), "--margin", "0.05"]
    words += ["--set", "evaluation.bootstrap_resamples=200"]
    assert main.main([*words, "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["non_inferiority"]["margin"] == 0.05
    assert main.main(words) == 0
    assert "A not inferior to B by more than 0.05 AUROC: shown" in capsys.readouterr().out


def test_two_checkpoints_are_compared_on_the_films_of_the_first(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(trained / "best_model.pth"), str(trained / "checkpoint_epoch_1.pth")]
    assert main.main(["compare", "--checkpoints", *pair, "--output-dir", str(tmp_path), "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["n"] == 40 and printed["models"]["b"].endswith("checkpoint_epoch_1.pth")


def test_films_that_one_of_the_two_was_trained_on_are_refused(films: Path, trained: Path, tmp_path: Path) -> None:
    content = checkpoint.load(trained / "best_model.pth")
    content["provenance"]["manifest_digest"] = "of another split"
    content["seen_films"] = torch.from_numpy(film_hashes(sorted(map(str, (films / "test").rglob("*.jpeg")))[:3]))
    assert len(content["seen_films"]) == 3
    checkpoint.save(tmp_path / "other.pth", content)
    with pytest.raises(DataError, match="3 of the 40 films to measure were trained or validated on by B"):
        compare.compare(trained / "best_model.pth", tmp_path / "other.pth", checkpoints=True, output_dir=tmp_path)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output-dir .*file/out: cannot be written"):
        compare.compare(Path("a.csv"), Path("b.csv"), output_dir=tmp_path / "file" / "out")
