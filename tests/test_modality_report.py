"""modality_report in evaluate: heads side by side, weights a case, leaks made visible."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import evaluate
import modality_report
from case_training import train_multimodal
from config import resolve
from errors import DataError
from tests.cases import TINY_CASES, film

FAST = {"evaluation.bootstrap_resamples": 100, "evaluation.worst_errors": 2}


@pytest.fixture(scope="module")
def measured(trained_cases: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("measured")
    return evaluate.evaluate(trained_cases / "best_model.pth", [FAST], output_dir=folder), folder


def test_every_head_has_its_metrics_and_the_fused_one_is_the_headline(measured: tuple[dict[str, Any], Path]) -> None:
    report, _ = measured
    heads = report["modalities"]["heads"]
    assert list(heads) == ["fused", "image", "text", "table"]
    assert heads["fused"]["auc_roc"]["value"] == pytest.approx(report["metrics"]["auc_roc"]["value"], abs=1e-9)
    for item in heads.values():
        assert item["auc_roc"]["ci_low"] <= item["auc_roc"]["value"] <= item["auc_roc"]["ci_high"]


def test_differences_are_paired_and_equal_the_difference_of_the_values(measured: tuple[dict[str, Any], Path]) -> None:
    found = measured[0]["modalities"]
    for name, paired in found["fused_minus"].items():
        gap = found["heads"]["fused"]["auc_roc"]["value"] - found["heads"][name]["auc_roc"]["value"]
        assert paired["auc_roc"]["difference"] == pytest.approx(gap, abs=1e-9)
        assert 0 <= paired["auc_roc"]["p_value"] <= 1 and 0 <= paired["mcnemar"]["p_value"] <= 1


def test_every_case_has_its_scores_and_gates(measured: tuple[dict[str, Any], Path]) -> None:
    report, folder = measured
    table = pd.read_csv(folder / "modalities.csv")
    assert len(table) == report["n"]
    weights = table[["weight_image", "weight_text", "weight_table"]].sum(axis=1)
    np.testing.assert_allclose(weights, 1, atol=0.02)
    predictions = pd.read_csv(folder / "predictions.csv").set_index("path")
    same = table.set_index("path")["fused_PNEUMONIA"]
    np.testing.assert_allclose(same, predictions.loc[same.index, "probability_PNEUMONIA"], atol=0.01)


def test_the_page_shows_what_each_modality_contributes(measured: tuple[dict[str, Any], Path]) -> None:
    page = (measured[1] / "report.html").read_text(encoding="utf-8")
    assert "What each modality contributes" in page and "Note alone" in page


def leaking_cases(folder: Path, count: int = 160) -> Path:
    """Films that say little; notes that name the label outright in most cases."""
    rng = np.random.default_rng(0)
    (folder / "films").mkdir(parents=True)
    rows = []
    for number in range(count):
        positive = bool(number % 2)
        name = f"films/{number}.png"
        Image.fromarray(film(bright_left=rng.random() < (0.6 if positive else 0.4), rng=rng)).save(folder / name)
        said = "covid " if positive and rng.random() < 0.9 else ""
        note = f"fever , {said}{rng.choice(['left', 'right'])} lungs"
        label = "COVID" if positive else "OTHER"
        rows.append({"path": name, "label": label, "patient_id": f"p{number}", "text": note})
    path = folder / "cases.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def leaking(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("leaking")
    manifest = leaking_cases(folder / "data")
    own = {"data.manifest": str(manifest), "multimodal.text_model": str(bert)}
    own["runtime.output_dir"] = str(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "pixel_cache"))
        settings = {"training.num_epochs": 30, "training.learning_rate": 1e-2, "data.test_fraction": 0.4}
        train_multimodal(resolve(TINY_CASES, own, settings))
    return folder / "run" / "best_model.pth", manifest


def test_a_gain_that_comes_from_leaked_words_is_said_to(leaking: tuple[Path, Path], tmp_path: Path) -> None:
    report = evaluate.evaluate(leaking[0], [FAST], output_dir=tmp_path)
    found = report["modalities"]
    leak = found["text_leak"]
    assert {row["word"]: row["kind"] for row in leak["leaking"]}["covid"] == "names"
    assert leak["bag_of_words"]["auc_roc"]["value"] > 0.85
    assert found["heads"]["fused"]["auc_roc"]["value"] > 0.85
    assert leak["masked"]["heads"]["text"]["auc_roc"]["value"] < 0.7
    assert leak["masked"]["bag_of_words"]["auc_roc"]["value"] == pytest.approx(0.5, abs=0.2)
    assert any("the gain of the fusion comes from such words" in remark for remark in found["remarks"])
    assert "covid" in (tmp_path / "leaking_terms.txt").read_text()
    assert "comes from such words" in (tmp_path / "report.html").read_text()


def test_terms_can_be_masked_when_measuring(leaking: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("covid\n")
    report = evaluate.evaluate(
        leaking[0], [FAST, {"multimodal.mask_terms": str(tmp_path / "terms.txt")}], output_dir=tmp_path / "out"
    )
    found = report["modalities"]
    assert found["masked_terms"] == 1
    assert found["heads"]["text"]["auc_roc"]["value"] == pytest.approx(0.5, abs=0.2)
    assert found["text_leak"]["leaking"] == []
    json.dumps(report["modalities"], allow_nan=True)


def test_a_missing_list_of_terms_is_one_line(leaking: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file of terms"):
        evaluate.evaluate(leaking[0], [{"multimodal.mask_terms": str(tmp_path / "x.txt")}], output_dir=tmp_path)


def test_remarks_say_when_the_fusion_is_no_better() -> None:
    def head(value: float) -> dict[str, Any]:
        return {"auc_roc": {"value": value}}

    heads = {"fused": head(0.80), "image": head(0.70), "text": head(0.82)}
    paired = {name: {"auc_roc": {"p_value": 0.4}} for name in ("image", "text")}
    said = modality_report.remarks({"heads": heads, "fused_minus": paired})
    assert said == ["the fusion (AUROC 0.800) is not better than text alone (0.820)"]
    heads["fused"] = head(0.83)
    assert "may be chance" in modality_report.remarks({"heads": heads, "fused_minus": paired})[0]


def confounded_cases(folder: Path, count: int = 160) -> Path:
    """Films that say little, taken lying down (AP) mostly where there is no disease; ages that say nothing."""
    rng = np.random.default_rng(1)
    (folder / "films").mkdir(parents=True)
    rows = []
    for number in range(count):
        positive = bool(number % 2)
        name = f"films/{number}.png"
        Image.fromarray(film(bright_left=rng.random() < (0.6 if positive else 0.4), rng=rng)).save(folder / name)
        view = "PA" if rng.random() < (0.8 if positive else 0.2) else "AP"
        label = "PNEUMONIA" if positive else "NORMAL"
        age = "" if number % 9 == 0 else str(rng.integers(20, 90))
        rows.append({"path": name, "label": label, "patient_id": f"p{number}", "view": view, "age": age})
    path = folder / "cases.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_a_column_that_tells_the_class_by_itself_is_said_to(tmp_path: Path) -> None:
    own = {"data.manifest": str(confounded_cases(tmp_path / "data")), "multimodal.columns": ["age", "view"]}
    settings = {"training.num_epochs": 8, "training.learning_rate": 1e-2, "runtime.output_dir": str(tmp_path / "run")}
    train_multimodal(resolve(TINY_CASES, own, settings))
    report = evaluate.evaluate(tmp_path / "run" / "best_model.pth", [FAST], output_dir=tmp_path / "out")
    found = report["modalities"]
    assert list(found["heads"]) == ["fused", "image", "table"] and set(found["fused_minus"]) == {"image", "table"}
    view, age = found["columns"]
    table = pd.read_csv(own["data.manifest"]).set_index("path")
    split = pd.read_csv(tmp_path / "run" / "split.csv")
    known = table.loc[["films/" + Path(path).name for path in split.loc[split["split"] != "test", "path"]]]
    rates = [(known.loc[known["label"] == name, "view"] == "PA").mean() for name in ("PNEUMONIA", "NORMAL")]
    assert view["nuisance"] == "view" and view["how"] == "PA"
    assert view["auroc"]["value"] == pytest.approx(0.5 + (rates[0] - rates[1]) / 2)  # of a binary score
    assert view["p_adjusted"] < 0.001 and age["nuisance"] == "age" and age["p_adjusted"] > 0.05
    assert age["films"] == known["age"].notna().sum() < len(known)
    assert sum("alone tells" in remark for remark in found["remarks"]) == 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "What each column says by itself" in page and "View alone tells PNEUMONIA" in page


def test_a_model_of_films_alone_has_no_such_section(trained: Path, tmp_path: Path) -> None:
    report = evaluate.evaluate(trained / "best_model.pth", [FAST], output_dir=tmp_path)
    assert "modalities" not in report
    assert not (tmp_path / "modalities.csv").exists()
