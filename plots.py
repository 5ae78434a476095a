"""Figures from numbers, readable in black and white: PNG or SVG by suffix.

Discrimination          roc_curve, precision_recall_curve, reader_roc_curves, score_histogram
Tables and rates        confusion_matrix, subgroup_forest
Probabilities           reliability_diagram, decision_curve
Training                training_curves

Every function draws to a path (written beside and renamed) or into a BytesIO; `as_svg` and `as_png` return the figure
itself, for a page. No pyplot, no global state. Reads no files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from auroc import absent_class, auroc_ci, average_precision, patient_weights, roc_points, score_tally
from calibration import expected_calibration_error, reliability_bins
from errors import DataError
from estimates import FloatArray, IntArray, as_groups, as_labels, as_probabilities, as_scores

Target = str | Path | BytesIO | tuple[Any, ...]
"""Where a figure goes; a tuple of targets gets the same figure each."""

# Okabe & Ito: told apart by every kind of colour vision, and of different lightness in grey.
BLACK, BLUE, VERMILION, GREEN, PURPLE, GREY = "#1a1a1a", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a"
STYLES = [(BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"), (BLACK, (0, (5, 1, 1, 1)))]
MARKERS = ["o", "s", "^", "D", "v"]
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#08519c"])

DPI = 200
BAND_RESAMPLES = 200
BAND_GROUPS = 500
"""Distinct scores kept apart in a confidence band: more cannot be seen."""
CURVE_POINTS = 2000
"""Points drawn of a curve at most."""


class _Svg(BytesIO):
    """Bytes that ask for SVG."""


def as_svg(draw: Callable[..., None], *args: Any, **kwargs: Any) -> str:
    """The figure that `draw(*args, target, **kwargs)` makes, as an <svg> element to put into a page."""
    buffer = _Svg()
    draw(*args, buffer, **kwargs)
    text = buffer.getvalue().decode()
    return text[text.index("<svg") :]


def to_file_and_svg(draw: Callable[[Target], None], path: Path) -> str:
    """Draw once into the file `path`, and return the same figure as an <svg> element."""
    return as_svg(lambda buffer: draw((path, buffer)))


def as_png(draw: Callable[..., None], *args: Any, **kwargs: Any) -> bytes:
    """The figure that `draw(*args, target, **kwargs)` makes, as PNG."""
    buffer = BytesIO()
    draw(*args, buffer, **kwargs)
    return buffer.getvalue()


def _save(figure: Figure, target: Target) -> None:
    for words in figure.findobj(Text):  # a class may be called $x$: no text here is mathematics
        words.set_parse_math(False)
    if isinstance(target, tuple):
        for each in target:
            _save(figure, each)
        return
    if isinstance(target, BytesIO):
        figure.savefig(target, format="svg" if isinstance(target, _Svg) else "png", dpi=DPI)
        return
    path = Path(target)
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg", "pdf"):
        raise DataError(f"{path}: figures are written as .png, .svg or .pdf, not {path.suffix or 'without a suffix'!r}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format=kind, dpi=DPI)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A figure (inches) in constrained layout and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    flat = list(axes.ravel())
    for axis in flat:
        _plain(axis)
    return figure, flat


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_linewidth(0.7)
    axis.tick_params(width=0.7, length=3, labelsize=8)
    axis.grid(visible=True, linewidth=0.4, color="#dddddd")
    axis.set_axisbelow(True)


def _label(axis: Axes, x: str, y: str, title: str = "") -> None:
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    if title:
        axis.set_title(title, fontsize=10, loc="left")


def _legend(axis: Axes, **place: Any) -> None:
    axis.legend(fontsize=7.5, frameon=True, framealpha=0.9, edgecolor="none", handlelength=2.6, **place)


def _unit_square(axis: Axes) -> None:
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axis.set_xticks(np.linspace(0, 1, 6))
    axis.set_yticks(np.linspace(0, 1, 6))


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f}-{high:.3f})" if math.isfinite(low) else f"{value:.3f}"


# --- tables ---------------------------------------------------------------------------------------------------


def confusion_matrix(matrix: ArrayLike, classes: Sequence[str], path: Target, *, title: str = "") -> None:
    """Counts (K, K), rows the truth, beside the same as shares of each row; shades follow the shares."""
    counts = np.asarray(matrix, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    size = max(2.6, 0.55 * len(classes) + 1.2)
    longest = max(len(name) for name in classes)
    figure, axes = _figure(2 * size + 1 + 0.06 * longest, size + 0.7 + 0.04 * longest, 1, 2)
    _cells(axes[0], counts, shares, classes, "{:.0f}")
    _cells(axes[1], 100 * shares, shares, classes, "{:.1f}%" if len(classes) < 8 else "{:.0f}")
    _label(axes[0], "Predicted", "True", "Films")
    _label(axes[1], "Predicted", "", "Share of the true class")
    if title:
        figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _cells(axis: Axes, numbers: FloatArray, shades: FloatArray, classes: Sequence[str], form: str) -> None:
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.imshow(shades, cmap=SHADES, vmin=0, vmax=1.15, aspect="equal")
    slanted = max(len(name) for name in classes) * len(classes) > 24
    axis.set_xticks(range(len(classes)), classes, rotation=40 if slanted else 0, ha="right" if slanted else "center")
    axis.set_yticks(range(len(classes)), classes)
    axis.tick_params(length=0)
    size = 10 if len(classes) <= 4 else 8 if len(classes) <= 8 else 6
    for (row, column), number in np.ndenumerate(numbers):
        colour = "white" if shades[row, column] > 0.55 else BLACK
        axis.text(column, row, form.format(number), ha="center", va="center", fontsize=size, color=colour)


def subgroup_forest(
    rows: Sequence[Mapping[str, Any]],
    path: Target,
    *,
    metric: str = "AUROC",
    overall: Mapping[str, Any] | None = None,
    limits: tuple[float, float] | None = None,
    title: str = "",
) -> None:
    """One line per subgroup: point, interval, n and the numbers in print.

    `rows` hold label, value, ci_low, ci_high and, when known, n and reason (shown where the value is NaN); a row with
    a label alone is a heading. `overall` (value, ci_low, ci_high) draws the dashed line to compare with.
    """
    lines = [*rows, {"label": "All", **overall}] if overall else list(rows)
    figure, (axis,) = _figure(7.2, 1.1 + 0.26 * len(lines))
    axis.grid(visible=False, axis="y")
    axis.spines["left"].set_visible(False)
    for position, row in enumerate(lines):
        _forest_line(axis, position, row)
    if overall:
        axis.axvline(overall["value"], color=GREY, linestyle="--", linewidth=0.9, zorder=0)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_yticks(range(len(lines)), [_forest_label(row) for row in lines])
    for text, row in zip(axis.get_yticklabels(), lines):
        text.set_fontweight("bold" if "value" not in row else "normal")
    axis.tick_params(axis="y", length=0)
    if limits:
        axis.set_xlim(*limits)
    _label(axis, f"{metric} with interval", "", title)
    _save(figure, path)


def _forest_label(row: Mapping[str, Any]) -> str:
    return f"{row['label']}  (n={row['n']:,})" if row.get("n") is not None else str(row["label"])


def _forest_line(axis: Axes, position: int, row: Mapping[str, Any]) -> None:
    if "value" not in row:
        return
    value = row["value"]
    if value is None or math.isnan(value):
        said = row.get("reason") or "not estimable"
    else:
        low, high = row.get("ci_low", math.nan), row.get("ci_high", math.nan)
        axis.plot([low, high], [position, position], color=BLACK, linewidth=1.1, solid_capstyle="butt")
        axis.plot(
            [value], [position], marker="s", markersize=4.5, color=BLUE, markeredgecolor=BLACK, markeredgewidth=0.5
        )
        said = _interval(value, low, high)
    beside = axis.get_yaxis_transform()
    axis.text(1.02, position, said, transform=beside, fontsize=8, va="center", family="monospace", clip_on=False)


# --- discrimination -------------------------------------------------------------------------------------------


def roc_curve(
    labels: ArrayLike,
    scores: ArrayLike,
    path: Target,
    *,
    threshold: float | Mapping[str, float] | None = None,
    ci: tuple[float, float, float] | None = None,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    band: bool = True,
    name: str = "Model",
    others: Mapping[str, ArrayLike] | None = None,
    title: str = "",
) -> None:
    """ROC curve of `labels` (N,) and `scores` (N,), a pointwise bootstrap band, AUROC with interval in the legend.

    `threshold` marks one operating point, or several by name (score >= threshold). `ci` (value, low, high) spares the
    computation of the interval; `groups` (N,) of patients go into it and the band. `others` adds scores of other
    models on the same films.
    """
    y, s = _scored(labels, scores)
    figure, (axis,) = _figure(4.6, 4.7)
    if reason := absent_class(y):
        _nothing_to_draw(axis, reason)
        _save(figure, path)
        return
    if band:
        grid, low, high = _roc_band(y, s, groups, level)
        axis.fill_between(grid, low, high, color=BLUE, alpha=0.15, linewidth=0)
    for (label, values), (colour, line) in zip({name: s, **(others or {})}.items(), _cycle(STYLES)):
        fpr, sensitivity, _ = roc_points(y, values)
        estimate = auroc_ci(y, values, level=level, groups=groups)
        shown = ci if ci and label == name else (estimate.value, *estimate.ci)
        x, height = _thinned(fpr, sensitivity)
        axis.plot(x, height, color=colour, linestyle=line, linewidth=1.4, label=f"{label}: AUROC {_interval(*shown)}")
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    for point, marker in zip(_points(threshold).items(), _cycle(MARKERS)):
        sensitivity_at, specificity_at = _rates(y, s, point[1])
        said = f"{point[0]} ({point[1]:.3g}): sens {sensitivity_at:.3f}, spec {specificity_at:.3f}"
        axis.plot(1 - specificity_at, sensitivity_at, **_mark(marker), label=said)
    _unit_square(axis)
    _label(axis, "1 - specificity", "Sensitivity", title)
    _legend(axis, loc="lower right")
    _save(figure, path)


def _nothing_to_draw(axis: Axes, reason: str) -> None:
    _unit_square(axis)
    axis.text(0.5, 0.5, f"No curve: {reason}", ha="center", va="center", fontsize=10)


def _scored(labels: ArrayLike, scores: ArrayLike) -> tuple[IntArray, FloatArray]:
    y = as_labels(labels)
    return y, as_scores(scores, n=len(y))


def _cycle(items: Sequence[Any]) -> list[Any]:
    return list(items) * 10


def _points(threshold: float | Mapping[str, float] | None) -> dict[str, float]:
    if threshold is None:
        return {}
    return dict(threshold) if isinstance(threshold, Mapping) else {"Operating point": float(threshold)}


def _mark(marker: str) -> dict[str, Any]:
    return {
        "marker": marker,
        "markersize": 6,
        "markerfacecolor": "white",
        "markeredgecolor": BLACK,
        "markeredgewidth": 1.2,
        "linestyle": "none",
        "zorder": 5,
    }


def _rates(labels: IntArray, scores: FloatArray, threshold: float) -> tuple[float, float]:
    called = scores >= threshold
    return float(called[labels == 1].mean()), float((~called[labels == 0]).mean())


def _thinned(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """A curve of at most CURVE_POINTS points, evenly along both axes."""
    if len(x) <= CURVE_POINTS:
        return x, y
    along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], CURVE_POINTS)))
    return x[kept], y[kept]


def _roc_band(
    labels: IntArray, scores: FloatArray, groups: ArrayLike | None, level: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Pointwise bootstrap limits of the sensitivity on a grid of false positive rates."""
    codes = as_groups(None if groups is None else np.asarray(groups), n=len(labels))
    tally = score_tally(labels, scores, codes, max_groups=BAND_GROUPS)
    half = tally.shape[0] // 2
    grid = np.linspace(0, 1, 201)
    curves: list[FloatArray] = []
    rng = np.random.default_rng(0)
    chunk = int(np.clip(10_000_000 // tally.shape[1], 1, 100))
    for weights in patient_weights(tally.shape[1], n_boot=BAND_RESAMPLES, rng=rng, chunk=chunk):
        for sums in (tally @ weights).T:
            negatives, positives = (np.cumsum(part[::-1]) for part in (sums[:half], sums[half:]))
            if negatives[-1] and positives[-1]:
                # Started at 0: a vertical first step has its whole height at a false positive rate of 0.
                curves.append(np.interp(grid, negatives / negatives[-1], positives / positives[-1]))
    low, high = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return grid, low, high


def precision_recall_curve(
    labels: ArrayLike,
    scores: ArrayLike,
    path: Target,
    *,
    threshold: float | Mapping[str, float] | None = None,
    ci: tuple[float, float, float] | None = None,
    name: str = "Model",
    others: Mapping[str, ArrayLike] | None = None,
    title: str = "",
) -> None:
    """Precision against recall of `labels` (N,) and `scores` (N,), with the prevalence as the line of chance.

    `threshold` marks operating points as in `roc_curve`; `ci` (value, low, high) puts an interval of the average
    precision into the legend.
    """
    y, s = _scored(labels, scores)
    prevalence = float(y.mean())
    figure, (axis,) = _figure(4.6, 4.7)
    if reason := absent_class(y):
        _nothing_to_draw(axis, reason)
        _save(figure, path)
        return
    for (label, values), (colour, line) in zip({name: s, **(others or {})}.items(), _cycle(STYLES)):
        recall, precision = _thinned(*_precision_recall(y, np.asarray(values, dtype=np.float64)))
        area = average_precision(y, values)
        said = _interval(*ci) if ci and label == name else f"{area:.3f}"
        axis.plot(
            recall,
            precision,
            color=colour,
            linestyle=line,
            linewidth=1.4,
            drawstyle="steps-pre",
            label=f"{label}: AP {said}",
        )
    axis.axhline(prevalence, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), label=f"Prevalence {prevalence:.3f}")
    for point, marker in zip(_points(threshold).items(), _cycle(MARKERS)):
        called = s >= point[1]
        if called.any():
            recall_at, precision_at = float(called[y == 1].mean()), float(y[called].mean())
            said = f"{point[0]} ({point[1]:.3g}): precision {precision_at:.3f}, recall {recall_at:.3f}"
            axis.plot(recall_at, precision_at, **_mark(marker), label=said)
    _unit_square(axis)
    _label(axis, "Recall (sensitivity)", "Precision (PPV)", title)
    _legend(axis, loc="lower left")
    _save(figure, path)


def _precision_recall(labels: IntArray, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Recall and precision at every distinct score, from the strictest threshold on."""
    fpr, recall, _ = roc_points(labels, scores)
    n_pos = labels.sum()
    true_positives, false_positives = recall[1:] * n_pos, fpr[1:] * (len(labels) - n_pos)
    precision = true_positives / (true_positives + false_positives)
    return recall, np.concatenate([precision[:1], precision])


def reader_roc_curves(curves: Sequence[Mapping[str, Any]], path: Target, *, title: str = "") -> None:
    """One small ROC plot per reader, a line per modality; `curves` as from reader_study.reader_roc_points."""
    readers = list(dict.fromkeys(curve["reader"] for curve in curves))
    modalities = list(dict.fromkeys(curve["modality"] for curve in curves))
    style = dict(zip(modalities, _cycle(STYLES)))
    marker = dict(zip(modalities, _cycle(MARKERS)))
    columns = min(4, math.ceil(math.sqrt(len(readers))))
    rows = math.ceil(len(readers) / columns)
    figure, axes = _figure(2.5 * columns + 0.3, 2.6 * rows + 0.5, rows, columns, sharex=True, sharey=True)
    for axis in axes[len(readers) :]:
        axis.set_visible(False)
    for axis, reader in zip(axes, readers):
        for curve in (curve for curve in curves if curve["reader"] == reader):
            colour, line = style[curve["modality"]]
            few = len(curve["fpr"]) <= 12
            axis.plot(
                curve["fpr"],
                curve["tpr"],
                color=colour,
                linestyle=line,
                linewidth=1.2,
                marker=marker[curve["modality"]] if few else None,
                markersize=3,
                label=f"{curve['modality']}: {curve['auc']:.3f}",
            )
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.7, linestyle=(0, (1, 2)))
        _unit_square(axis)
        axis.tick_params(labelbottom=True)
        axis.set_title(f"Reader {reader}", fontsize=9, loc="left")
        _legend(axis, loc="lower right", title="AUROC", title_fontsize=7.5)
    figure.supxlabel("1 - specificity", fontsize=9)
    figure.supylabel("Sensitivity", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    _save(figure, path)


def score_histogram(
    labels: ArrayLike,
    scores: ArrayLike,
    path: Target,
    *,
    classes: Sequence[str] = ("negative", "positive"),
    threshold: float | None = None,
    n_bins: int = 40,
    title: str = "",
) -> None:
    """How the scores (N,) of the two classes lie, one above the line and one below, each as a share of its class."""
    y, s = _scored(labels, scores)
    low, high = (0.0, 1.0) if s.min() >= 0 and s.max() <= 1 else (float(s.min()), float(s.max()))
    edges = np.linspace(low, high, n_bins + 1)
    figure, (axis,) = _figure(5.6, 3.2)
    for label, sign, colour, hatch in ((1, 1, VERMILION, ""), (0, -1, BLUE, "////")):
        count = np.histogram(s[y == label], bins=edges)[0]
        share = sign * count / max(1, count.sum())
        axis.stairs(
            share,
            edges,
            fill=True,
            label=f"{classes[label]} (n={count.sum():,})",
            facecolor="white" if hatch else colour,
            edgecolor=colour,
            hatch=hatch,
            linewidth=0.8,
        )
    axis.axhline(0, color=BLACK, linewidth=0.7)
    if threshold is not None:
        axis.axvline(threshold, color=BLACK, linewidth=1, linestyle="--", label=f"threshold {threshold:.3g}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0%}")
    _label(axis, "Score", "Share of the class", title)
    _legend(axis, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.16))
    _save(figure, path)


def score_shift(report: Mapping[str, Any], path: Target, *, title: str = "") -> None:
    """Scores of the films measured, in bars, against what validation's classes give at two prevalences, in lines.

    `report` has edges (B + 1,), observed, expected and expected_at_prevalence (B,), validation_prevalence, prevalence.
    """
    figure, (axis,) = _figure(5.6, 3.2)
    edges = np.asarray(report["edges"], dtype=np.float64)
    axis.stairs(report["observed"], edges, fill=True, facecolor=GREY, alpha=0.35, label="Films measured")
    lines = (
        ("expected", report["validation_prevalence"], BLUE, "--"),
        ("expected_at_prevalence", report["prevalence"]["value"], VERMILION, "-"),
    )
    for name, prevalence, colour, line in lines:
        label = f"Validation's classes at prevalence {prevalence:.2f}"
        axis.stairs(report[name], edges, color=colour, linestyle=line, linewidth=1.3, label=label)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label(axis, "Score", "Share of the films", title)
    _legend(axis, loc="upper center", bbox_to_anchor=(0.5, 1.34))
    _save(figure, path)


def accuracy_against_coverage(report: Mapping[str, Any], path: Target, *, title: str = "") -> None:
    """Accuracy of the surest films against their share, with intervals at the coverages of the table.

    `report` has coverage and accuracy (C,) and rows with coverage and accuracy {value, ci_low, ci_high}.
    """
    figure, (axis,) = _figure(5.6, 3.2)
    axis.plot(report["coverage"], report["accuracy"], color=BLUE, linewidth=1.4)
    rows = [row for row in report["rows"] if row["accuracy"]["ci_low"] is not None]
    value, low, high = (np.array([row["accuracy"][key] for row in rows]) for key in ("value", "ci_low", "ci_high"))
    bars = np.maximum(0, np.stack([value - low, high - value]))
    at = [row["coverage"] for row in rows]
    axis.errorbar(at, value, yerr=bars, color=BLUE, linestyle="none", marker="o", markersize=4, capsize=2)
    axis.set_xlim(1.02, 0)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label(axis, "Films decided, the surest first", "Accuracy of these", title)
    _save(figure, path)


# --- probabilities --------------------------------------------------------------------------------------------


def reliability_diagram(
    labels: ArrayLike,
    probabilities: ArrayLike,
    path: Target,
    *,
    n_bins: int = 10,
    strategy: str = "equal_width",
    level: float = 0.95,
    recalibrated: ArrayLike | None = None,
    title: str = "",
) -> None:
    """Observed share against mean probability with Wilson bars, over a histogram of the probabilities (N,).

    `recalibrated` (N,) adds the same films after temperature or isotonic scaling.
    """
    y = as_labels(labels)
    figure, (axis, below) = _figure(4.6, 5.4, 2, 1, sharex=True, height_ratios=[4, 1])
    series = {"As predicted" if recalibrated is not None else "Model": probabilities}
    if recalibrated is not None:
        series["Recalibrated"] = recalibrated
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), label="Perfect calibration")
    for (name, values), (colour, line), marker in zip(series.items(), STYLES, MARKERS):
        p = as_probabilities(values, n=len(y))
        bins = reliability_bins(y, p, n_bins=n_bins, strategy=strategy, level=level)
        ece = expected_calibration_error(y, p, n_bins=n_bins, strategy=strategy)
        bars = np.maximum(0, np.stack([bins.observed - bins.ci_low, bins.ci_high - bins.observed]))
        axis.errorbar(
            bins.mean_probability,
            bins.observed,
            yerr=bars,
            color=colour,
            linestyle=line,
            linewidth=1.2,
            elinewidth=0.9,
            capsize=2,
            marker=marker,
            markersize=4,
            label=f"{name}: ECE {ece:.3f}",
        )
        below.stairs(*np.histogram(p, bins=np.linspace(0, 1, 41)), color=colour, linestyle=line, linewidth=1)
    _unit_square(axis)
    axis.set_aspect("auto")
    _label(axis, "", "Observed share of positives", title)
    _label(below, "Predicted probability", "Films")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    _legend(axis, loc="upper left")
    _save(figure, path)


def decision_curve(report: Mapping[str, Any], path: Target, *, name: str = "Model", title: str = "") -> None:
    """Net benefit of the model, with its band, against treating all and none.

    `report` is that of clinical.decision_curve: thresholds, prevalence, net_benefit and treat_all.
    """
    thresholds = np.asarray(report["thresholds"], dtype=np.float64)
    order = np.argsort(thresholds)
    x = thresholds[order]
    figure, (axis,) = _figure(5.6, 3.8)
    model = report["net_benefit"]
    if "ci_low" in model:
        low, high = (np.asarray(model[key], dtype=np.float64)[order] for key in ("ci_low", "ci_high"))
        axis.fill_between(x, low, high, color=BLUE, alpha=0.15, linewidth=0)
    lines = ((name, model, BLUE, "-"), ("Treat all", report["treat_all"], VERMILION, "--"))
    for label, curve, colour, line in lines:
        height = np.asarray(curve["value"], dtype=np.float64)[order]
        axis.plot(x, height, color=colour, linestyle=line, linewidth=1.4, label=label)
    axis.axhline(0, color=BLACK, linewidth=0.9, linestyle=":", label="Treat none")
    # Treating all falls without bound; what lies far below treating none decides nothing.
    top = max(float(report["prevalence"]), float(np.nanmax(np.asarray(model["value"], dtype=np.float64))))
    axis.set_ylim(-0.3 * top, 1.08 * top)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label(axis, "Threshold probability", "Net benefit", title)
    _legend(axis, loc="upper right")
    _save(figure, path)


# --- optimisation ---------------------------------------------------------------------------------------------


def speed_against_accuracy(
    points: Sequence[Mapping[str, Any]], path: Target, *, budget: float, title: str = ""
) -> None:
    """Throughput (films/s, log scale) and AUROC lost of each candidate, those on the Pareto front joined.

    `points`: dicts with name, throughput, auc_drop, ci_low, ci_high (of the drop; NaN draws none), accepted, chosen.
    """
    figure, (axis,) = _figure(7.2, 4.4)
    shown = [point for point in points if np.isfinite(point["auc_drop"])]
    axis.axhline(budget, color=VERMILION, linestyle="--", linewidth=1.0, label=f"Budget ({budget:g})")
    front, best = [], np.inf
    for point in sorted(shown, key=lambda item: -item["throughput"]):
        if point["auc_drop"] < best:
            front.append(point)
            best = point["auc_drop"]
    axis.step(
        [item["throughput"] for item in front],
        [item["auc_drop"] for item in front],
        where="post",
        color=GREY,
        linewidth=0.9,
        label="Pareto front",
    )
    for number, point in enumerate(shown, start=1):
        colour = GREEN if point["chosen"] else BLUE if point["accepted"] else VERMILION
        x, y = point["throughput"], point["auc_drop"]
        axis.vlines(x, point["ci_low"], point["ci_high"], color=colour, linewidth=0.8, alpha=0.6)
        mark = {"marker": "*", "s": 120} if point["chosen"] else {"marker": "o" if point["accepted"] else "X", "s": 34}
        axis.scatter([x], [y], color=colour, zorder=3, label=f"{number}  {point['name']}", **mark)
        axis.annotate(str(number), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=7.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    _label(axis, "Films per second, batches of 16", "AUROC lost against the float model", title)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    _save(figure, path)


# --- training -------------------------------------------------------------------------------------------------


def training_curves(history: Sequence[Mapping[str, Any]], path: Target, *, title: str = "") -> None:
    """Losses, validation metrics and learning rates by epoch, from the rows of history.csv.

    `history` has one mapping per epoch with columns such as epoch, train_loss, val_loss, val_auc_roc, lr_head. Missing
    columns are left out; values that are missing, empty or NaN leave a gap.
    """
    columns = {name: _column(history, name) for name in dict.fromkeys(key for row in history for key in row)}
    epochs = columns.get("epoch", np.arange(1, len(history) + 1, dtype=np.float64))
    panels = [
        ("Loss", [name for name in columns if name.endswith("loss")], "linear"),
        ("Validation metric", [name for name in columns if _is_metric(name)], "linear"),
        (
            "Learning rate",
            [name for name in columns if name == "lr" or name.startswith(("lr_", "learning_rate"))],
            "log",
        ),
    ]
    panels = [
        (label, [name for name in names if not np.isnan(columns[name]).all()], scale) for label, names, scale in panels
    ]
    panels = [panel for panel in panels if panel[1]] or [("", [], "linear")]
    figure, axes = _figure(3.3 * len(panels) + 0.3, 3.1, 1, len(panels))
    for axis, (label, names, scale) in zip(axes, panels):
        _history_panel(axis, epochs, {name: columns[name] for name in names}, scale)
        _label(axis, "Epoch", label)
    if title:
        figure.suptitle(title, fontsize=10)
    _save(figure, path)


def tuning(
    trials: Sequence[tuple[int, float]],
    importances: Mapping[str, float],
    path: Target,
    *,
    monitor: str,
    maximize: bool,
) -> None:
    """The figure of each finished trial, the best so far, and how much each searched field matters.

    `trials` are (number, value); `importances` field → share in [0, 1], its panel left out when empty.
    """
    figure, axes = _figure(3.6 * (2 if importances else 1) + 0.3, 3.1, 1, 2 if importances else 1)
    numbers = np.array([number for number, _ in trials])
    values = np.array([value for _, value in trials], dtype=np.float64)
    best = (np.maximum if maximize else np.minimum).accumulate(values)
    axes[0].plot(numbers, values, "o", markersize=4, label="Trial")
    axes[0].step(numbers, best, where="post", label="Best so far")
    _label(axes[0], "Trial", f"Validation {monitor}")
    _legend(axes[0])
    if importances:
        names = list(importances)[::-1]
        axes[1].barh(names, [importances[name] for name in names])
        _label(axes[1], "Share of the variance explained", "")
    _save(figure, path)


def _is_metric(name: str) -> bool:
    return name.startswith("val_") and not name.endswith("loss") and "threshold" not in name


def _column(history: Sequence[Mapping[str, Any]], name: str) -> FloatArray:
    return np.array([_number(row.get(name)) for row in history], dtype=np.float64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _history_panel(axis: Axes, epochs: FloatArray, columns: Mapping[str, FloatArray], scale: str) -> None:
    few = len(epochs) <= 25
    for (name, values), (colour, line), marker in zip(columns.items(), _cycle(STYLES), _cycle(MARKERS)):
        label = name.removeprefix("val_").replace("_", " ") if not name.endswith("loss") else name.replace("_", " ")
        axis.plot(
            epochs,
            values,
            color=colour,
            linestyle=line,
            linewidth=1.3,
            marker=marker if few else None,
            markersize=3,
            label=label,
        )
    positive = all((values[~np.isnan(values)] > 0).all() for values in columns.values())
    if scale == "log" and positive:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")  # the usual powers of ten are mathematics, which _save turns off
        axis.yaxis.set_minor_formatter("")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    if len(epochs):
        axis.set_xlim(float(np.nanmin(epochs)) - 0.5, float(np.nanmax(epochs)) + 0.5)
    if columns:
        _legend(axis, loc="best")
