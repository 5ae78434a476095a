"""Several findings a film, measured: each as the binary task it is, and their means with one page over all.

    for name, own in views(films).items(): print(name, assess(own, ...)["metrics"]["auc_roc"])

A mean is over the findings that have a value; its interval resamples patients, the same for every finding, because one
film speaks of all of them. Reads and writes no files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

import page
from config import EvaluationConfig
from errors import examples
from estimates import Estimate, as_groups, not_estimable
from findings import NONE, matrix, thresholds, written
from prediction_table import Predictions
from resampling import Sampling, bootstrap_metrics

MEANS = (
    "auc_roc",
    "auc_pr",
    "sensitivity",
    "specificity",
    "balanced_accuracy",
    "accuracy",
    "precision",
    "npv",
    "f1",
    "brier",
    "log_loss",
    "ece",
)
SHOWN = ("auc_roc", "auc_pr", "sensitivity", "specificity")
TITLES = {"auc_roc": "AUROC", "auc_pr": "AUPRC", "sensitivity": "Sensitivity", "specificity": "Specificity"}


def views(films: Predictions) -> dict[str, Predictions]:
    """Finding → the films as a task of that finding against its absence; `films.labels` are findings as bits."""
    present_NC = matrix(films.labels, len(films.classes))
    return {name: _view(films, name, present_NC[:, k], k) for k, name in enumerate(films.classes)}


def _view(films: Predictions, name: str, present_N: np.ndarray[Any, Any], k: int) -> Predictions:
    classes = (f"not {name}", name)
    p_N = films.probabilities[:, k]
    return replace(
        films,
        table=films.table.assign(label=np.array(classes, dtype=object)[present_N]),
        labels=present_N,
        probabilities=np.column_stack([1 - p_N, p_N]),
        classes=classes,
        positive_class=name,
    )


def point_of(operating_point: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The operating point of one finding, as one of a binary task."""
    own = operating_point["findings"][name]
    return {key: own[key] for key in ("rule", "target", "threshold")} | {"positive_class": name}


def folder_names(names: Sequence[str]) -> dict[str, str]:
    """Finding → the name of its folder: letters, digits, - and _ of it, numbered where two would share one."""
    folders: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^\w-]+", "_", name).strip("_") or "finding"
        taken = {folder.lower() for folder in folders.values()}
        number = next(n for n in range(1, len(names) + 1) if _numbered(stem, n).lower() not in taken)
        folders[name] = _numbered(stem, number)
    return folders


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}_{number}"


def summarised(
    films: Predictions,
    results: Mapping[str, Mapping[str, Any]],
    operating_point: Mapping[str, Any],
    settings: EvaluationConfig,
    *,
    seed: int,
) -> dict[str, Any]:
    """What metrics.json says of all findings: their means, and each finding's own `results` in short."""
    folders = folder_names(films.classes)
    return {
        "task": "multilabel",
        "n": len(films),
        "n_patients": films.n_patients,
        "classes": list(films.classes),
        "positive_class": None,
        "average": "mean over findings",
        "level": settings.level,
        "operating_point": dict(operating_point),
        "metrics": {name: item.as_report() for name, item in means(films, results, settings, seed=seed).items()},
        "per_finding": {
            name: {
                "films": int(matrix(films.labels, len(films.classes))[:, k].sum()),
                "folder": folders[name],
                "operating_point": point_of(operating_point, name),
                "metrics": results[name]["metrics"],
            }
            for k, name in enumerate(films.classes)
        },
    }


def means(
    films: Predictions, results: Mapping[str, Mapping[str, Any]], settings: EvaluationConfig, *, seed: int
) -> dict[str, Estimate]:
    """Each of MEANS over the findings that have a value, with an interval from resampled patients."""
    codes = as_groups(films.patients, n=len(films))
    sampling = Sampling(codes, settings.level, settings.bootstrap_resamples, seed)
    replicates = {
        name: bootstrap_metrics(
            own.outcome,
            own.scores,
            threshold=float(results[name]["operating_point"]["threshold"]),
            groups=codes,
            n_boot=settings.bootstrap_resamples,
            seed=seed,
        )
        for name, own in views(films).items()
    }
    return {metric: _mean(metric, results, replicates, sampling) for metric in MEANS}


def _mean(
    metric: str,
    results: Mapping[str, Mapping[str, Any]],
    replicates: Mapping[str, Mapping[str, np.ndarray[Any, Any]]],
    sampling: Sampling,
) -> Estimate:
    values = {name: float(result["metrics"][metric]["value"]) for name, result in results.items()}
    defined = [name for name, value in values.items() if not np.isnan(value)]
    if not defined:
        return not_estimable("undefined for every finding")
    sample = np.mean([replicates[name][metric] for name in defined], axis=0)
    mean = float(np.mean([values[name] for name in defined]))
    high = np.inf if metric == "log_loss" else 1.0
    estimate = sampling.interval(mean, sample, low=0.0, high=high, wide=metric == "ece")
    absent = [name for name in values if name not in defined]
    note = f"without {examples(absent)}, where it is undefined" if absent else ""
    return replace(estimate, reason="; ".join(filter(None, [estimate.reason, note])))


def predictions_csv(films: Predictions, operating_point: Mapping[str, Any]) -> pd.DataFrame:
    """path, patient_id, split, label, prediction, probability_<FINDING>…, call_<FINDING>…, then what else is known."""
    called_NC = films.probabilities >= thresholds(operating_point["findings"], films.classes)
    own = ["path", "patient_id", "split", "label"]
    columns: dict[str, Any] = {name: films.table[name].to_numpy() for name in own}
    columns["prediction"] = [written(row, films.classes) for row in called_NC]
    columns |= {f"probability_{name}": films.probabilities[:, k] for k, name in enumerate(films.classes)}
    columns |= {f"call_{name}": called_NC[:, k].astype(int) for k, name in enumerate(films.classes)}
    further = [name for name in films.table.columns if name not in columns]
    return pd.DataFrame(columns | {name: films.table[name].to_numpy() for name in further})


# --- words -----------------------------------------------------------------------------------------------------


def report_html(result: Mapping[str, Any]) -> str:
    """One page over the reports of all findings, with a link to each."""
    rows = [
        [
            f"<a href='{page.text(own['folder'])}/report.html'>{page.text(name)}</a>",
            page.percent(own["films"], result["n"]),
            page.number(own["operating_point"]["threshold"]),
            *(page.stacked(own["metrics"][metric]) for metric in SHOWN),
        ]
        for name, own in result["per_finding"].items()
    ]
    rows.append(["mean", "", "", *(page.stacked(result["metrics"][metric]) for metric in SHOWN)])
    head = ["Finding", "Films", "Threshold", *(TITLES[metric] for metric in SHOWN)]
    caption = (
        f"With {100 * result['level']:g} % intervals, clustered by patient. Every finding is answered by itself at the "
        "threshold chosen for it on validation; its own report says more. A film with none of them is called "
        f"{page.text(NONE)}."
    )
    about = (
        f"{result['n']} films of {result['n_patients']} patients, split {page.text(result['split'])}; "
        f"{page.text(result['model'])}. For research; not a medical device."
    )
    table = page.table(head, rows, numbers=range(1, len(head)), marks={len(rows) - 1: "strong"}, caption=caption)
    title = "Evaluation of several findings"
    return page.page(title, f"<h1>{title}</h1><p class='subtitle'>{about}</p>", table)


def summary(result: Mapping[str, Any]) -> str:
    """The result as a table for the terminal, at most 80 columns."""
    lines = [
        f"{result['n']} films of {result['n_patients']} patients, split {result['split']}, each at its threshold",
        f"{'':20}{'films':>6}   {'AUROC':22}{'AUPRC':>7}{'sens.':>8}{'spec.':>8}",
    ]
    rows = [(name, str(own["films"]), own["metrics"]) for name, own in result["per_finding"].items()]
    for name, films, metrics in [*rows, ("mean", "", result["metrics"])]:
        area = metrics["auc_roc"]
        limits = f"({_number(area['ci_low'])} to {_number(area['ci_high'])})"
        others = "".join(f"{_number(metrics[metric]['value']):>8}" for metric in SHOWN[1:])
        lines.append(f"{name[:20]:20}{films:>6}   {_number(area['value']):6}{limits:16}{others[1:]}")
    return "\n".join(lines)


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
