"""The figures of an evaluation, by name: what each shows is taken from the predictions and from metrics.json.

    for name, draw in evaluation_figures(films, validation, result).items(): draw(folder / f"{name}.png")

The same functions draw into a page (`plots.as_svg`) and into files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import plots
from assessment import scaled
from calibration import top_label
from prediction_table import Predictions

Draw = Callable[[plots.Target], None]

RULE_NAMES = {
    "fixed": "Fixed",
    "youden": "Youden",
    "stable_youden": "Youden, middle",
    "sensitivity": "Target sensitivity",
    "specificity": "Target specificity",
}
FOREST_METRICS = {"auc_roc": "AUROC", "sensitivity": "Sensitivity", "specificity": "Specificity"}
FIGURES = (
    "confusion_matrix",
    "roc_curve",
    "precision_recall_curve",
    "score_histogram",
    "reliability_diagram",
    "score_shift",
    "coverage",
    "decision_curve",
    *(f"subgroup_{name.lower()}" for name in FOREST_METRICS.values()),
)
"""Every figure an evaluation may write."""
MAX_FOREST_ROWS = 40


def evaluation_figures(
    films: Predictions, validation: Predictions | None, result: Mapping[str, Any]
) -> dict[str, Draw]:
    """Name → a function that draws it to a path or buffer; figures the task does not have are left out."""
    figures: dict[str, Draw] = {
        "confusion_matrix": lambda target: plots.confusion_matrix(result["confusion_matrix"], films.classes, target),
        "coverage": partial(plots.accuracy_against_coverage, result["abstention"]),
    }
    if films.positive_class is None:
        outcome, p = top_label(films.labels, films.probabilities)
        return figures | {
            "reliability_diagram": lambda target: plots.reliability_diagram(outcome, p, target, level=result["level"])
        }
    figures |= _ranking_figures(films, result)
    if "observed" in result["shift"]:
        figures["score_shift"] = partial(plots.score_shift, result["shift"])
    if films.raw is None:
        figures["reliability_diagram"] = _reliability(films, validation, result)
        if "net_benefit" in result["decision_curve"]:
            figures["decision_curve"] = partial(_draw_decision_curve, result["decision_curve"])
    return figures | _forests(result)


def _ranking_figures(films: Predictions, result: Mapping[str, Any]) -> dict[str, Draw]:
    y, s = films.outcome, films.scores
    points = operating_point_marks(result)
    options: dict[str, Any] = {"threshold": points, "ci": _limits(result, "auc_roc"), "groups": films.patients}
    negative = films.classes[1 - films.positive]
    threshold = float(result["operating_point"]["threshold"])
    return {
        "roc_curve": lambda target: plots.roc_curve(y, s, target, level=result["level"], **options),
        "precision_recall_curve": lambda target: plots.precision_recall_curve(
            y, s, target, threshold=points, ci=_limits(result, "auc_pr")
        ),
        "score_histogram": lambda target: plots.score_histogram(
            y, s, target, classes=(negative, str(films.positive_class)), threshold=threshold
        ),
    }


def operating_point_marks(result: Mapping[str, Any]) -> dict[str, float]:
    """Legend name → threshold of every operating point shown."""
    marks: dict[str, float] = {}
    for row in result["operating_points"]["rows"]:
        name = RULE_NAMES.get(row["rule"], row["rule"])
        if row["rule"] in ("sensitivity", "specificity"):
            name = f"{name} {row['target']:g}"
        marks[name + (", headline" if row["headline"] else "")] = float(row["threshold"])
    return marks


def _limits(result: Mapping[str, Any], name: str) -> tuple[float, float, float] | None:
    item = result["metrics"][name]
    return None if math.isnan(item["value"]) else (item["value"], item["ci_low"], item["ci_high"])


def _reliability(films: Predictions, validation: Predictions | None, result: Mapping[str, Any]) -> Draw:
    options: dict[str, Any] = {"level": result["level"]}
    temperature = result["calibration"]["recalibration"].get("temperature", {}).get("value", 1.0)
    # Within 10 % the two curves lie on each other.
    if validation is not None and abs(math.log(temperature)) > 0.1:
        options["recalibrated"] = scaled(films.probabilities, temperature)[:, films.positive]
    return partial(_draw_reliability, films, options)


def _draw_reliability(films: Predictions, options: Mapping[str, Any], target: plots.Target) -> None:
    plots.reliability_diagram(films.outcome, films.scores, target, **options)


def shown_thresholds(curve: Mapping[str, Any]) -> float:
    """The largest threshold probability worth showing: where positives are rare, nobody waits for a high risk."""
    return min(0.99, max(0.2, 4 * float(curve["prevalence"])))


def _draw_decision_curve(curve: Mapping[str, Any], target: plots.Target) -> None:
    shown = [k for k, value in enumerate(curve["thresholds"]) if value <= shown_thresholds(curve)]
    cut = {
        name: {key: [values[k] for k in shown] for key, values in curve[name].items()}
        for name in ("net_benefit", "treat_all")
    }
    kept = {"thresholds": [curve["thresholds"][k] for k in shown], "prevalence": curve["prevalence"]}
    plots.decision_curve(kept | cut, target)


def _forests(result: Mapping[str, Any]) -> dict[str, Draw]:
    figures: dict[str, Draw] = {}
    for metric, name in FOREST_METRICS.items():
        rows = forest_rows(result["subgroups"], metric)
        if rows:
            overall = result["metrics"][metric]
            figures[f"subgroup_{name.lower()}"] = partial(_draw_forest, rows, name, overall)
    return figures


def _draw_forest(rows: list[dict[str, Any]], name: str, overall: Mapping[str, Any], target: plots.Target) -> None:
    defined = not math.isnan(overall["value"])
    plots.subgroup_forest(rows, target, metric=name, overall=overall if defined else None)


def forest_rows(subgroups: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """Headings and one line a group, of single columns, for `plots.subgroup_forest`."""
    rows: list[dict[str, Any]] = []
    for column, section in subgroups["columns"].items():
        rows.append({"label": column})
        for label, group in section["groups"].items():
            estimate = group.get("metrics", {}).get(metric, {"value": math.nan, "reason": "too few to say"})
            rows.append({"label": label, "n": group["n"], **_short(estimate)})
    return rows[:MAX_FOREST_ROWS]


def _short(estimate: Mapping[str, Any]) -> dict[str, Any]:
    """The estimate with a reason that fits beside a line."""
    reason = str(estimate.get("reason", ""))
    return {**estimate, "reason": reason if len(reason) <= 18 else "not estimable"}
