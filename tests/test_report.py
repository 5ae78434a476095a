"""report.py, page.py, checklist.py, figures.py: a page that stands alone, escapes everything and names its blanks."""

from __future__ import annotations

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import checklist
import evaluate
import figures
import page
import plots
import report
from tests.test_evaluate import FAST, made_up, write

VOID = {"meta", "br", "img", "path", "use", "line", "rect", "image"}


class Balance(HTMLParser):
    """Checks that elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on films whose names are an attack, two of them there to be shown."""
    folder = tmp_path_factory.mktemp("report")
    table = made_up(160)
    wrong = table.index[(table["probability_PNEUMONIA"] >= 0.5) != (table["label"] == "PNEUMONIA")][:2]
    for number, row in enumerate(wrong):
        name = f"<b>film&{number}.png"
        Image.fromarray(np.full((300, 400), 90, np.uint8)).save(folder / name)
        table.loc[row, "path"] = name
        table.loc[row, "probability_PNEUMONIA"] = 0.0 if table.loc[row, "label"] == "PNEUMONIA" else 1.0
        table.loc[row, "probability_NORMAL"] = 1 - table.loc[row, "probability_PNEUMONIA"]
    table["sex"] = table["sex"].replace({"F": "<script>alert(1)</script>"})
    validation = write(made_up(160, seed=1), folder / "v.csv")
    layers = [FAST, {"evaluation.prevalence": 0.1, "evaluation.worst_errors": 4}]
    evaluate.evaluate_table(
        write(table, folder / "p<i>.csv"), layers, output_dir=folder / "out", validation_predictions=validation
    )
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_the_page_fetches_nothing_and_runs_nothing(text: str) -> None:
    outside = set(re.findall(r"(?:src|href)=['\"]([^'\"]*)", text))
    assert all(target.startswith(("#", "data:image/")) for target in outside)
    assert "<script" not in text and "<link" not in text and "@import" not in text and "url(http" not in text


def test_names_from_the_data_cannot_become_markup(text: str) -> None:
    assert "<b>film" not in text and "p<i>.csv" not in text
    assert html.escape("<script>alert(1)</script>") in text


def test_elements_nest(text: str) -> None:
    balance = Balance()
    balance.feed(re.sub(r"<svg.*?</svg>", "", text, flags=re.S))
    assert balance.open == []


@pytest.mark.parametrize(
    "heading",
    [
        "Films and patients", "Performance", "Operating points", "Calibration", "Shift and abstention",
        "Clinical utility", "Subgroups",
        "Agreement with readers", "Most confident errors", "Reporting checklist", "Record",
    ],
)  # fmt: skip
def test_every_section_is_there(text: str, heading: str) -> None:
    assert f"<h2>{heading}</h2>" in text


def test_every_figure_is_inside_and_beside_the_page(text: str, folder: Path) -> None:
    drawn = sorted(item.stem for item in (folder / "out").glob("*.png"))
    assert text.count("<svg") == len(drawn) >= 11


def test_the_worst_films_are_shown_small_and_the_missing_ones_listed(text: str) -> None:
    pictures = re.findall(r"data:image/jpeg;base64,([^']+)", text)
    assert len(pictures) == 2
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (200, 150)
    assert "film&amp;0.png" in text and "s0/" in text


def test_numbers_of_the_page_are_those_of_the_record(text: str, folder: Path) -> None:
    import json

    metrics = json.loads((folder / "out" / "metrics.json").read_text())["metrics"]
    for name in ("auc_roc", "sensitivity", "brier"):
        assert f"<td class='n'>{metrics[name]['value']:.3f}</td>" in text


def test_a_deep_film_is_windowed_for_its_thumbnail(tmp_path: Path) -> None:
    deep = np.linspace(0, 4000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    pictures = report.thumbnails([{"path": "deep.png"}, {"path": "gone.png"}], tmp_path)
    assert list(pictures) == ["deep.png"]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures["deep.png"]))))
    # JPEG moves the extremes by a few levels.
    assert shown.min() < 15 and shown.max() > 240


# --- checklist and card ---


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plain")
    table = made_up(100).drop(columns=["age", "sex", "patient_id", "reader_ann", "reader_bob"])
    return evaluate.assess_table(write(table, folder / "p.csv"), [FAST])[0]


def test_what_only_the_authors_know_is_a_named_blank(result: dict[str, Any]) -> None:
    blanks = " ".join(checklist.open_items(checklist.checklist(result)))
    for topic in ("Intended use", "Ethical approval", "Registration", "Reference standard", "Limitations", "Funding"):
        assert topic in blanks


def test_what_the_data_do_not_say_is_a_blank_too(result: dict[str, Any]) -> None:
    status = {item.topic: item.status for item in checklist.checklist(result)}
    assert status["Subgroups and fairness"] == checklist.BLANK
    assert status["Agreement of annotators"] == checklist.BLANK
    assert status["Disjoint partitions"] == checklist.PARTLY


def test_every_item_cites_a_guideline_and_every_reported_one_says_where(result: dict[str, Any]) -> None:
    for item in checklist.checklist(result):
        assert {item.tripod, item.claim, item.stard} != {"–"}
        assert item.answer or item.status == checklist.BLANK


def test_the_model_card_names_metrics_groups_and_blanks(folder: Path, result: dict[str, Any]) -> None:
    card = (folder / "out" / "model_card.md").read_text()
    assert "| AUROC | 0." in card and "&lt;script>" in card and "- Intended use, users and setting: ..." in card
    assert "Not compared: the films name no age" in report.model_card(result)


# --- numbers in words ---


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        ({"value": 0.5, "ci_low": 0.25, "ci_high": 0.75}, "0.500 (0.250–0.750)"),
        ({"value": -0.5, "ci_low": -0.75, "ci_high": 0.25}, "−0.500 (−0.750 to 0.250)"),
        ({"value": float("nan"), "ci_low": float("nan"), "ci_high": float("nan")}, "–"),
        ({"value": 1.0, "ci_low": None, "ci_high": None}, "1.000"),
    ],
)
def test_an_interval_is_read_without_doubt(estimate: dict[str, Any], shown: str) -> None:
    assert page.interval(estimate) == shown


@pytest.mark.parametrize(("value", "shown"), [(0.0001, "<0.001"), (0.0421, "0.042"), (float("nan"), "–"), (None, "–")])
def test_a_p_value_is_never_zero(value: float | None, shown: str) -> None:
    assert page.p_value(value) == shown


# --- figures ---


def test_a_figure_goes_into_a_file_and_a_page_at_once(tmp_path: Path) -> None:
    target = tmp_path / "c.png"
    svg = plots.to_file_and_svg(lambda where: plots.confusion_matrix([[3, 1], [0, 2]], ["n", "p"], where), target)
    assert svg.startswith("<svg") and target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("prevalence", "largest"), [(0.01, 0.2), (0.1, 0.4), (0.6, 0.99)])
def test_a_decision_curve_is_shown_as_far_as_anybody_would_decide(prevalence: float, largest: float) -> None:
    assert figures.shown_thresholds({"prevalence": prevalence}) == pytest.approx(largest)


def test_a_forest_has_a_heading_for_each_column_and_says_too_few() -> None:
    group = {"n": 30, "metrics": {"auc_roc": {"value": 0.8, "ci_low": 0.7, "ci_high": 0.9}}}
    rows = figures.forest_rows({"columns": {"sex": {"groups": {"F": group, "M": {"n": 3}}}}}, "auc_roc")
    assert [row["label"] for row in rows] == ["sex", "F", "M"]
    assert rows[2]["reason"] == "too few to say" and "value" not in rows[0]
