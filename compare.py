"""Two models on the same films: who is better, by how much, and how sure is that.

    python main.py compare --predictions A.csv B.csv
    python main.py compare --checkpoints A.pth B.pth --data-dir data/chest_xray --margin 0.02

Reads two prediction tables (as `evaluate` does) or two checkpoints and their films; writes comparison.json and
roc_curves.png. Every difference is A − B. Films are matched by path: none is left out unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

import evaluate
import plots
from assessment import NOT_PROBABILITIES, PROBABILITY_METRICS
from config import Config, Overrides, resolve
from data_preprocessing import Manifest
from errors import ConfigError, DataError, examples
from estimates import FloatArray, two_sided_quantile
from metrics import compare_predictions
from page import p_value
from prediction_table import Predictions, of_split, rank_threshold, read_predictions
from runtime import require_writable, write_json

Sides = tuple[Predictions, Predictions, Sequence[float], Config]
"""The predictions of A and of B, from where on each calls a film positive, and the settings of the comparison."""


def compare(
    first: Path,
    second: Path,
    overrides: Sequence[Overrides] = (),
    *,
    checkpoints: bool = False,
    output_dir: Path,
    thresholds: Sequence[float] | None = None,
    margin: float | None = None,
) -> dict[str, Any]:
    """Compare two predictions CSVs of the same films, or two checkpoints; the content of comparison.json.

    `thresholds` of A and B; without them 0.5, or each checkpoint's own. `margin` asks besides whether one is not worse
    by more than that. The films of two checkpoints are those of the first one's split, overlaid by `overrides`.
    """
    if thresholds is not None and not all(map(math.isfinite, thresholds)):
        raise ConfigError(f"--thresholds {thresholds[0]:g} {thresholds[1]:g}: not numbers")
    if margin is not None and not 0 < margin < 1:
        raise ConfigError(f"--margin {margin:g} is not between 0 and 1; give the loss of AUROC that would still do")
    require_writable(output_dir)
    read = _of_checkpoints if checkpoints else _of_tables
    a, b, points, config = read(first, second, overrides, thresholds)
    b = matched(a, b)
    known = _patients(a, b)
    result = _compared(a, b, points, known, config)
    result = {"models": {"a": str(first), "b": str(second)}, "classes": list(a.classes)} | result
    if margin is not None:
        result["non_inferiority"] = non_inferiority(result["auc_roc"], margin=margin, level=config.evaluation.level)
    _write(result, a, b, known, output_dir)
    return result


def _of_tables(first: Path, second: Path, overrides: Sequence[Overrides], thresholds: Sequence[float] | None) -> Sides:
    config = resolve(*overrides)
    sides = [
        read_predictions(path, positive=config.data.positive_class, raw_scores=thresholds is not None)
        for path in (first, second)
    ]
    a, b = (of_split(side, evaluate.split_of(side, overrides, config.evaluation.split)) for side in sides)
    return a, b, thresholds or (0.5, 0.5), config


def _of_checkpoints(
    first: Path, second: Path, overrides: Sequence[Overrides], thresholds: Sequence[float] | None
) -> Sides:
    for point in thresholds or ():
        evaluate.check_threshold(point)
    stored, config = evaluate.configured(first, overrides, None)
    other, _ = evaluate.configured(second, overrides, None)
    if stored.multilabel or other.multilabel:
        raise ConfigError(
            "compare: these models have several findings a film; evaluate both and compare one finding by "
            "--predictions A/FINDING/predictions.csv B/FINDING/predictions.csv"
        )
    manifest, _ = evaluate.evaluation_manifest(stored, config)
    rows = evaluate.rows_of(manifest, config.evaluation.split)
    for name, predictor in (("A", stored), ("B", other)):
        if predictor.provenance["manifest_digest"] != manifest.digest():
            evaluate.refuse_seen(predictor, manifest, rows, run=f" by {name}")
    a, _ = evaluate.predict_rows(stored, manifest, rows, config)
    b, _ = evaluate.predict_rows(other, *_relabelled(manifest, rows, other.classes), config)
    return a, b, thresholds or (stored.threshold, other.threshold), config


def _relabelled(manifest: Manifest, rows: pd.DataFrame, classes: Sequence[str]) -> tuple[Manifest, pd.DataFrame]:
    """The same films with their labels in the order of another model's classes."""
    if sorted(classes) != sorted(manifest.classes):
        raise DataError(f"A has classes {', '.join(manifest.classes)}, B {', '.join(classes)}; compare the same task")
    code = {k: list(classes).index(name) for k, name in enumerate(manifest.classes)}
    table = rows.assign(label=rows["label"].map(code))
    return Manifest(table, tuple(classes), manifest.root), table


# --- the same films --------------------------------------------------------------------------------------------


def matched(a: Predictions, b: Predictions) -> Predictions:
    """`b` in the order of `a`'s films; DataError naming what differs in films, classes, truth or patients."""
    if a.classes != b.classes:
        if sorted(a.classes) != sorted(b.classes):
            raise DataError(f"A has classes {', '.join(a.classes)}, B {', '.join(b.classes)}; compare the same task")
        order = [b.classes.index(name) for name in a.classes]
        back = np.argsort(order)
        b = replace(b, classes=a.classes, probabilities=b.probabilities[:, order], labels=back[b.labels])
    if a.positive_class != b.positive_class:
        raise DataError(f"the positive class is {a.positive_class} in A, {b.positive_class} in B; set --positive-class")
    row_of = {path: row for row, path in enumerate(b.table["path"])}
    only_a = [path for path in a.table["path"] if path not in row_of]
    only_b = sorted(set(row_of) - set(a.table["path"]))
    if only_a or only_b:
        parts = [
            f"{len(only)} of the films of {name} are not in the other ({examples(only)})"
            for name, only in (("A", only_a), ("B", only_b))
            if only
        ]
        raise DataError(f"A and B must hold the same films: {'; '.join(parts)}; give both the same table of films")
    b = b.take(np.array([row_of[path] for path in a.table["path"]], dtype=np.int64))
    _refuse_difference(a, b)
    return b


def _refuse_difference(a: Predictions, b: Predictions) -> None:
    differing = np.flatnonzero(a.labels != b.labels)
    if differing.size:
        row = int(differing[0])
        raise DataError(
            f"{differing.size} films have another label in B than in A, e.g. {a.table['path'].iloc[row]}: "
            f"{a.classes[a.labels[row]]} in A, {b.classes[b.labels[row]]} in B; correct the tables"
        )
    if a.patients_known and b.patients_known:
        torn = np.flatnonzero((a.table["patient_id"] != b.table["patient_id"]).to_numpy())
        if torn.size:
            raise DataError(f"{torn.size} films have another patient_id in B, e.g. {a.table['path'].iloc[torn[0]]}")


def _patients(a: Predictions, b: Predictions) -> Predictions:
    """The one of the two that names patients, `a` where both or none do."""
    return b if b.patients_known and not a.patients_known else a


# --- the comparison --------------------------------------------------------------------------------------------


def _compared(
    a: Predictions, b: Predictions, thresholds: Sequence[float], known: Predictions, config: Config
) -> dict[str, Any]:
    settings = config.evaluation
    result = compare_predictions(
        _labels(a),
        _probabilities(a),
        _probabilities(b),
        threshold_a=rank_threshold(a, thresholds[0]),
        threshold_b=rank_threshold(b, thresholds[1]),
        groups=known.patients,
        level=settings.level,
        n_boot=settings.bootstrap_resamples,
        seed=config.training.seed,
    )
    if a.positive_class is not None:
        result["thresholds"] = {"a": float(thresholds[0]), "b": float(thresholds[1])}
    if a.raw is not None or b.raw is not None:
        for name in PROBABILITY_METRICS:
            result["metrics"][name] = dict.fromkeys(result["metrics"][name], math.nan) | {"reason": NOT_PROBABILITIES}
    return {"positive_class": a.positive_class} | result | {"patients_known": known.patients_known}


def _labels(films: Predictions) -> Any:
    return films.labels if films.positive_class is None else films.outcome


def _probabilities(films: Predictions) -> FloatArray:
    return films.probabilities if films.positive_class is None else films.probabilities[:, films.positive]


def non_inferiority(auc: Mapping[str, Any], *, margin: float, level: float) -> dict[str, Any]:
    """Is each model's AUROC at most `margin` below the other's? One-sided tests at (1 − level)/2.

    `auc` holds difference (a − b), ci_low and ci_high, a symmetric interval of coverage `level`. NaN where that has no
    width.
    """
    difference, low, high = (float(auc[key]) for key in ("difference", "ci_low", "ci_high"))
    se = (high - low) / 2 / two_sided_quantile(level)
    p = {
        name: float(stats.norm.sf((sign * difference + margin) / se)) if se > 0 else math.nan
        for name, sign in (("a", 1), ("b", -1))
    }
    return {
        "margin": margin,
        "alpha_one_sided": (1 - level) / 2,
        "a_not_inferior_to_b": {"shown": low > -margin, "ci_low": low, "p_value": p["a"]},
        "b_not_inferior_to_a": {"shown": -high > -margin, "ci_low": -high, "p_value": p["b"]},
    }


def _write(result: dict[str, Any], a: Predictions, b: Predictions, known: Predictions, folder: Path) -> None:
    write_json(folder / "comparison.json", result)
    if a.positive_class is not None:
        plots.roc_curve(
            a.outcome,
            _probabilities(a),
            folder / "roc_curves.png",
            groups=known.patients,
            level=result["level"],
            band=False,
            name="A",
            others={"B": _probabilities(b)},
        )


# --- words -----------------------------------------------------------------------------------------------------


def summary(result: Mapping[str, Any]) -> str:
    """The comparison as a table for the terminal."""
    auc, mcnemar = result["auc_roc"], result["mcnemar"]
    lines = [
        *(f"{key.upper()} {result['models'][key]}{_positive_from(result, key)}" for key in ("a", "b")),
        f"{result['n']} films of {result['n_patients']} patients; differences are A - B",
        f"{'':22}{'A':>9}{'B':>9}{'A - B':>9}   {100 * result['level']:g} % interval",
        f"{'auc_roc':22}{_cells(auc)}   p {p_value(auc['p_value'])}",
        *(f"{name:22}{_cells(item)}" for name, item in result["metrics"].items() if name != "auc_roc"),
        f"right only in A: {mcnemar['only_a_right']}, only in B: {mcnemar['only_b_right']}; "
        f"{mcnemar['method']}: p {p_value(mcnemar['p_value'])}",
    ]
    if (moved := result["net_reclassification"]) is not None:
        total = moved["categorical"]["total"]
        lines.append(
            f"net reclassification of B over A: {_number(total['value'])} ({_number(total['ci_low'])} to "
            f"{_number(total['ci_high'])})"
        )
    if "non_inferiority" in result:
        found = result["non_inferiority"]
        for one, other in ("ab", "ba"):
            test = found[f"{one}_not_inferior_to_{other}"]
            shown = "shown" if test["shown"] else "not shown"
            lines.append(
                f"{one.upper()} not inferior to {other.upper()} by more than {found['margin']:g} AUROC: {shown} "
                f"(p {p_value(test['p_value'])})"
            )
    return "\n".join(lines)


def _cells(item: Mapping[str, Any]) -> str:
    numbers = "".join(f"{_number(item[key]):>9}" for key in ("a", "b", "difference"))
    return f"{numbers}   {_number(item['ci_low'])} to {_number(item['ci_high'])}"


def _number(value: float | None) -> str:
    return "undef." if value is None or math.isnan(value) else f"{value:.4f}"


def _positive_from(result: Mapping[str, Any], key: str) -> str:
    return f", positive from {result['thresholds'][key]:.3f}" if "thresholds" in result else ""
