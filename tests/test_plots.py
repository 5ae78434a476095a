"""Figures are written whole, say what they measured, and hold for odd data."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import plots
from errors import DataError

Drawing = tuple[str, tuple, dict]


def films(n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.concatenate([[0, 1], rng.integers(2, size=n - 2)])
    return y, np.clip(rng.beta(2, 2, size=n) + 0.25 * (y - 0.5), 0.01, 0.99)


Y, P = films()
HISTORY = [
    {"epoch": i, "train_loss": 1 / i, "val_loss": 1.2 / i, "val_auc_roc": 1 - 0.3 / i, "lr_head": 0.1**i}
    for i in range(1, 6)
]
NET_BENEFIT = {
    "thresholds": [0.1, 0.2, 0.3],
    "prevalence": 0.3,
    "net_benefit": {"value": [0.25, 0.2, 0.1], "ci_low": [0.2, 0.1, 0.0], "ci_high": [0.3, 0.25, 0.2]},
    "treat_all": {"value": [0.22, 0.1, 0.0]},
}
FOREST = [
    {"label": "Sex"},
    {"label": "F", "n": 1200, "value": 0.9, "ci_low": 0.85, "ci_high": 0.94},
    {"label": "M", "value": float("nan"), "reason": "too few to say"},
]
READERS = [
    {"reader": reader, "modality": modality, "auc": 0.8, "fpr": [0, 0.2, 1], "tpr": [0, 0.7, 1]}
    for reader in "abcde"
    for modality in ("aided", "alone")
]
DRAWINGS: list[Drawing] = [
    ("confusion_matrix", ([[50, 3], [4, 60]], ["NORMAL", "PNEUMONIA"]), {}),
    ("confusion_matrix", (np.eye(9) * 7, [f"finding {i}" for i in range(9)]), {"title": "Test"}),
    ("confusion_matrix", ([[0, 0], [1, 2]], ["absent", "present"]), {}),
    ("roc_curve", (Y, P), {"threshold": 0.5}),
    ("roc_curve", (Y, P), {"threshold": {"Youden": 0.4, "sensitivity": 0.3}, "others": {"b": 1 - P}, "groups": Y}),
    ("roc_curve", (np.zeros(5, dtype=int), P[:5]), {}),
    ("precision_recall_curve", (Y, P), {"threshold": 0.5, "ci": (0.7, 0.6, 0.8)}),
    ("precision_recall_curve", (Y, P), {"threshold": 2.0}),
    ("precision_recall_curve", (np.ones(5, dtype=int), P[:5]), {}),
    ("reliability_diagram", (Y, P), {}),
    ("reliability_diagram", (Y, P), {"strategy": "equal_mass", "recalibrated": P**0.5}),
    ("reliability_diagram", ([0, 1], [0.0, 1.0]), {}),
    ("score_histogram", (Y, P), {"threshold": 0.5}),
    ("score_histogram", (Y, 9 * P - 5), {}),
    ("decision_curve", (NET_BENEFIT,), {}),
    ("training_curves", (HISTORY,), {"title": "Run"}),
    ("training_curves", ([],), {}),
    ("training_curves", ([{"epoch": "1", "train_loss": "", "val_loss": None, "lr_head": 0.0}],), {}),
    ("subgroup_forest", (FOREST,), {"overall": {"value": 0.88, "ci_low": 0.8, "ci_high": 0.9, "n": 9}}),
    ("reader_roc_curves", (READERS,), {}),
    ("reader_roc_curves", (READERS[:1],), {"title": "One"}),
]
IDS = [f"{name}-{index}" for index, (name, _, _) in enumerate(DRAWINGS)]


@pytest.mark.parametrize(("name", "given", "options"), DRAWINGS, ids=IDS)
def test_a_figure_is_a_png_of_print_quality_with_ink_and_no_clipped_edge(
    name: str, given: tuple, options: dict, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.png"
    assert getattr(plots, name)(*given, path, **options) is None
    with Image.open(path) as image:
        assert image.info["dpi"][0] >= 150
        grey = np.asarray(image.convert("L"))
    assert 0.0005 < (grey < 128).mean() < 0.5
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    assert border.min() == 255, "ink touches the edge"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("name", "given", "options"), DRAWINGS, ids=IDS)
def test_a_figure_for_a_page_is_one_svg_element(name: str, given: tuple, options: dict) -> None:
    svg = plots.as_svg(getattr(plots, name), *given, **options)
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert not re.search(r'(href|src)="(https?:|file:)', svg)


def test_suffixes_choose_the_format_and_others_are_refused(tmp_path: Path) -> None:
    plots.confusion_matrix([[1, 0], [0, 1]], ["a", "b"], tmp_path / "m.svg")
    plots.confusion_matrix([[1, 0], [0, 1]], ["a", "b"], tmp_path / "m.pdf")
    assert (tmp_path / "m.svg").read_text().startswith("<?xml") and (tmp_path / "m.pdf").read_bytes()[:4] == b"%PDF"
    with pytest.raises(DataError, match="written as .png, .svg or .pdf, not '.jpg'"):
        plots.confusion_matrix([[1]], ["a"], tmp_path / "m.jpg")


def test_a_buffer_gets_a_png() -> None:
    buffer = io.BytesIO()
    plots.confusion_matrix([[1, 0], [0, 1]], ["a", "b"], buffer)
    assert buffer.getvalue()[:4] == b"\x89PNG" == plots.as_png(plots.roc_curve, Y, P)[:4]


def test_a_figure_that_fails_leaves_the_old_one_and_no_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(b"old")

    def fail(figure: Figure, target: Path, **options: object) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.confusion_matrix([[1, 0], [0, 1]], ["a", "b"], path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.png"] and path.read_bytes() == b"old"


def drawn_text(monkeypatch: pytest.MonkeyPatch, name: str, *given: object, **options: object) -> str:
    """All text of a figure, layouts done."""
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, target: kept.append(figure))
    getattr(plots, name)(*given, "unused.png", **options)
    kept[0].draw_without_rendering()
    return "\n".join(text.get_text() for text in kept[0].findobj(lambda artist: hasattr(artist, "get_text")))


def test_the_legend_of_a_roc_curve_states_area_interval_and_operating_point(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn_text(monkeypatch, "roc_curve", [0, 0, 0, 1, 1], [0.1, 0.2, 0.6, 0.4, 0.9], threshold=0.5)
    assert re.search(r"Model: AUROC 0\.833 \(0\.\d+-1\.000\)", text)
    assert "Operating point (0.5): sens 0.500, spec 0.667" in text
    text = drawn_text(monkeypatch, "roc_curve", Y, P, ci=(0.5, 0.4, 0.6))
    assert "AUROC 0.500 (0.400-0.600)" in text


def test_a_curve_that_cannot_be_drawn_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("roc_curve", "precision_recall_curve"):
        assert "No curve: no positive films" in drawn_text(monkeypatch, name, [0, 0], [0.1, 0.2])


def test_a_confusion_matrix_shows_counts_and_shares_of_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn_text(monkeypatch, "confusion_matrix", [[390, 30], [22, 158]], ["N", "P"])
    for piece in ("390", "30", "22", "158", "92.9%", "7.1%", "12.2%", "87.8%"):
        assert piece in text.splitlines()


def test_a_forest_prints_numbers_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn_text(monkeypatch, "subgroup_forest", FOREST)
    for piece in ("Sex", "F  (n=1,200)", "0.900 (0.850-0.940)", "too few to say"):
        assert piece in text.splitlines()


def test_columns_that_are_missing_from_the_history_have_no_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn_text(monkeypatch, "training_curves", HISTORY)
    assert {"Loss", "Validation metric", "Learning rate", "val loss", "auc roc"} <= set(text.splitlines())
    text = drawn_text(monkeypatch, "training_curves", [{"epoch": 1, "val_loss": 0.3}])
    assert "Learning rate" not in text and "Validation metric" not in text


def test_a_million_points_become_a_curve_of_thousands() -> None:
    x = np.linspace(0, 1, 1_000_000)
    thin_x, thin_y = plots._thinned(x, np.sqrt(x))
    assert len(thin_x) <= plots.CURVE_POINTS and (thin_x[0], thin_x[-1]) == (0, 1)
    # Steps are even along the curve: an area of trapezoids loses less than can be seen.
    assert np.trapezoid(thin_y, thin_x) == pytest.approx(2 / 3, abs=1e-4)


def test_the_band_lies_around_the_curve() -> None:
    grid, low, high = plots._roc_band(Y, P, None, 0.95)
    assert (low <= high).all() and grid[0] == 0 and high[-1] == low[-1] == 1
    fpr, tpr, _ = plots.roc_points(Y, P)
    inside = np.interp(grid, fpr, tpr)
    assert ((low - 0.02 <= inside) & (inside <= high + 0.02)).mean() > 0.95


def test_pyplot_and_its_global_state_stay_out() -> None:
    code = Path(plots.__file__).read_text(encoding="utf-8").split('"""', 2)[2]
    assert "pyplot" not in code and "rcParams" not in code


def test_learning_rates_are_written_as_numbers_not_as_raw_mathematics() -> None:
    history = [{"epoch": epoch, "lr_head": 10.0**-epoch} for epoch in range(1, 5)]
    drawn = plots.as_svg(plots.training_curves, history)
    assert "mathdefault" not in drawn and "0.001" in drawn
