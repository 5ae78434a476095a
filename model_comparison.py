"""Two models on the same films: their difference in every metric, paired tests, and who is called otherwise.

    report = compare_predictions(labels, probabilities_a, probabilities_b, groups=patients)

Every difference is a − b. Undefined is NaN with a reason, never 0. Reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auroc import (
    absent_class,
    auroc,
    average_precision,
    clustered_auroc_test,
    delong_test,
    macro_auroc,
    macro_influence,
)
from calibration import (
    brier,
    brier_terms,
    expected_calibration_error,
    log_loss,
    log_loss_terms,
    logistic_recalibration,
    top_label,
)
from errors import DataError
from estimates import (
    Estimate,
    FloatArray,
    IntArray,
    TestResult,
    as_class_probabilities,
    as_groups,
    as_labels,
    as_probabilities,
    as_scores,
    not_estimable,
    sum_by_group,
    tail_probability,
    wald,
)
from paired_tests import clustered_mcnemar, mcnemar
from resampling import (
    Sampling,
    Tallied,
    binary_replicates,
    binary_statistics,
    confusion_matrix,
    confusion_metrics,
    confusion_statistic,
    ece_statistic,
    mean_statistic,
)


@dataclass(frozen=True)
class Reclassification:
    """Net reclassification improvement: positives that moved up less down, plus negatives that moved down less up."""

    total: Estimate
    """In [−2, 2]; above 0 the new model is better."""
    positives: Estimate
    """In [−1, 1]."""
    negatives: Estimate
    """In [−1, 1]."""


def net_reclassification(
    labels: ArrayLike,
    old: ArrayLike,
    new: ArrayLike,
    *,
    thresholds_old: ArrayLike | None = None,
    thresholds_new: ArrayLike | None = None,
    level: float = 0.95,
    groups: ArrayLike | None = None,
) -> Reclassification:
    """Net reclassification improvement of `new` over `old` scores (N,) (Pencina 2008), with Wald intervals.

    With thresholds (one or several per model; the old ones serve both by default) a film moves when its category
    does; without, when its score does (continuous, Pencina 2011). The standard errors are not those under the null;
    `groups` (N,) make them cluster-robust. NaN with a reason when a class is absent.
    """
    y = as_labels(labels)
    before, after = as_scores(old, n=len(y), name="old scores"), as_scores(new, n=len(y), name="new scores")
    if reason := absent_class(y):
        return Reclassification(*[not_estimable(reason)] * 3)
    if thresholds_old is not None:
        cuts = thresholds_old if thresholds_new is None else thresholds_new
        before = np.digitize(before, np.atleast_1d(thresholds_old)).astype(np.float64)
        after = np.digitize(after, np.atleast_1d(cuts)).astype(np.float64)
    move = np.sign(after - before)
    codes = as_groups(None if groups is None else np.asarray(groups), n=len(y))
    means = {label: float(move[y == label].mean()) for label in (0, 1)}
    influence = {label: np.where(y == label, (move - means[label]) / (y == label).sum(), 0.0) for label in (0, 1)}
    parts = (
        (means[1] - means[0], influence[1] - influence[0], 2.0),
        (means[1], influence[1], 1.0),
        (-means[0], -influence[0], 1.0),
    )
    return Reclassification(*(_influence_interval(value, part, codes, level, bound) for value, part, bound in parts))


def _influence_interval(value: float, influence: FloatArray, codes: IntArray, level: float, bound: float) -> Estimate:
    clusters = int(codes.max()) + 1
    clustered = clusters < len(codes)
    # Pencina divides by n; between patients n − 1 is the sandwich's custom.
    factor = clusters / max(1, clusters - 1) if clustered else 1.0
    se = float(np.sqrt(factor * (sum_by_group(influence, codes) ** 2).sum()))
    method = "Wald, clustered by patient" if clustered else "Wald"
    return wald(value, se, level=level, method=method, low=-bound, high=bound)


def compare_predictions(
    labels: ArrayLike,
    probabilities_a: ArrayLike,
    probabilities_b: ArrayLike,
    *,
    threshold_a: float = 0.5,
    threshold_b: float = 0.5,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Two models on the same films, JSON-ready: every difference is a − b.

    `labels` (N,), probabilities (N,) of class 1 or (N, K); two columns are read as their second. "auc_roc" is the
    paired DeLong test (Obuchowski's where patients give several films; for K > 2 the macro area by influence values),
    "mcnemar" compares who is right, "net_reclassification" is that of b over a (None for K > 2), "metrics" holds each
    metric's difference with a bootstrap interval over the same resampled patients.
    """
    a, b = _columns(probabilities_a), _columns(probabilities_b)
    if a.shape[1:] != b.shape[1:]:
        raise DataError(f"model a has {a.shape[-1]} classes, model b {b.shape[-1]}; compare models of the same classes")
    n_classes = 2 if a.ndim == 1 else a.shape[1]
    y = as_labels(labels, n_classes=n_classes)
    sides = [_side(y, p, threshold, name) for name, p, threshold in (("a", a, threshold_a), ("b", b, threshold_b))]
    sampling = Sampling(as_groups(groups, n=len(y)), level, n_boot, seed)
    return {
        "n": len(y),
        "n_patients": sampling.patients,
        "level": level,
        "thresholds": {"a": threshold_a, "b": threshold_b} if n_classes == 2 else None,
        "auc_roc": _compare_auroc(y, sides[0].p, sides[1].p, sampling),
        "mcnemar": _compare_right(sides[0].predictions == y, sides[1].predictions == y, sampling),
        "net_reclassification": _compare_classes(y, sides, (threshold_a, threshold_b), sampling),
        "metrics": _compare_metrics(y, sides, sampling),
    }


@dataclass(frozen=True)
class _Side:
    """One of two models."""

    p: FloatArray
    """(N,) of class 1, or (N, K)"""
    predictions: IntArray


def _columns(probabilities: ArrayLike) -> FloatArray:
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim == 2 and p.shape[1] == 2:
        as_class_probabilities(p, n=len(p), n_classes=2)
        return p[:, 1]
    return p


def _side(labels: IntArray, p: FloatArray, threshold: float, name: str) -> _Side:
    if p.ndim == 1:
        p = as_probabilities(p, n=len(labels), name=f"probabilities of {name}")
        return _Side(p, (p >= threshold).astype(np.int64))
    p = as_class_probabilities(p, n=len(labels), n_classes=p.shape[1], name=f"probabilities of {name}")
    return _Side(p, p.argmax(axis=1).astype(np.int64))


def _compare_auroc(y: IntArray, a: FloatArray, b: FloatArray, sampling: Sampling) -> dict[str, Any]:
    if a.ndim == 2:
        return _compare_macro_auroc(y, a, b, sampling)
    if reason := absent_class(y):
        nan = float("nan")
        return _test_report(TestResult(nan, nan, "none", first=nan, second=nan, reason=reason))
    if sampling.clustered:
        return _test_report(clustered_auroc_test(y, a, b, sampling.codes, level=sampling.level))
    return _test_report(delong_test(y, a, b, level=sampling.level))


def _compare_macro_auroc(y: IntArray, a: FloatArray, b: FloatArray, sampling: Sampling) -> dict[str, Any]:
    first, second = (macro_auroc(y, p, level=sampling.level, groups=sampling.codes) for p in (a, b))
    if first.reason:
        nan = float("nan")
        return _test_report(TestResult(nan, nan, "none", reason=first.reason))
    influence = macro_influence(y, a)[1] - macro_influence(y, b)[1]
    per_patient = sum_by_group(influence, sampling.codes)
    se = float(np.sqrt(sampling.patients / max(1, sampling.patients - 1) * (per_patient**2).sum()))
    difference = wald(first.value - second.value, se, level=sampling.level, method=first.method)
    z = difference.value / se if se else float("nan") if difference.value else 0.0
    p_value = tail_probability(z, alternative="two-sided") if not np.isnan(z) else z
    result = TestResult(z, p_value, first.method, difference.value, *difference.ci, se)
    return _test_report(replace(result, first=first.value, second=second.value))


def _test_report(test: TestResult) -> dict[str, Any]:
    report = {
        "a": test.first,
        "b": test.second,
        "difference": test.difference,
        "ci_low": test.ci_low,
        "ci_high": test.ci_high,
        "p_value": test.p_value,
        "method": test.method,
    }
    return {**report, "reason": test.reason} if test.reason else report


def _compare_right(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_], sampling: Sampling) -> dict[str, Any]:
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    if sampling.clustered:
        test = clustered_mcnemar(right_a, right_b, sampling.codes, method="obuchowski")
    else:
        # The chi-square is near enough from 25 discordant films on; below, the exact test.
        test = mcnemar(only_a, only_b, method="exact" if only_a + only_b < 25 else "asymptotic")
    return {
        "statistic": test.statistic,
        "p_value": test.p_value,
        "method": test.method,
        "only_a_right": only_a,
        "only_b_right": only_b,
    }


def _compare_classes(
    y: IntArray, sides: Sequence[_Side], thresholds: tuple[float, float], sampling: Sampling
) -> dict[str, Any] | None:
    if sides[0].p.ndim == 2:
        return None
    old, new = (side.p for side in sides)
    at_threshold = net_reclassification(
        y,
        old,
        new,
        thresholds_old=thresholds[0],
        thresholds_new=thresholds[1],
        level=sampling.level,
        groups=sampling.codes,
    )
    continuous = net_reclassification(y, old, new, level=sampling.level, groups=sampling.codes)
    return {
        name: {part: getattr(result, part).as_report() for part in ("total", "positives", "negatives")}
        for name, result in (("categorical", at_threshold), ("continuous", continuous))
    }


def _compare_metrics(y: IntArray, sides: Sequence[_Side], sampling: Sampling) -> dict[str, Any]:
    statistics = {
        f"{name}:{key}": statistic
        for name, side in zip("ab", sides)
        for key, statistic in _side_statistics(y, side, sampling.codes).items()
    }
    raw = sampling.replicates(statistics)
    points, samples = [], []
    for name, side in zip("ab", sides):
        own = {key[2:]: value for key, value in raw.items() if key.startswith(f"{name}:")}
        samples.append(_side_replicates(own, side, sampling))
        points.append(_side_values(y, side))
    return {
        name: _difference_report(points[0][name], points[1][name], samples[0][name] - samples[1][name], sampling)
        for name in samples[0]
    }


def _side_statistics(y: IntArray, side: _Side, codes: IntArray) -> dict[str, Tallied]:
    if side.p.ndim == 1:
        statistics = binary_statistics(y, side.p, 0.5, codes)
        return {**statistics, "confusion": confusion_statistic(y, side.predictions, 2, codes)}
    outcome, top = top_label(y, side.p)
    return {
        "confusion": confusion_statistic(y, side.predictions, side.p.shape[1], codes),
        "brier": mean_statistic(brier_terms(y, side.p), codes),
        "log_loss": mean_statistic(log_loss_terms(y, side.p), codes),
        "ece": ece_statistic(outcome, top, codes),
    }


def _side_replicates(raw: Mapping[str, FloatArray], side: _Side, sampling: Sampling) -> dict[str, FloatArray]:
    if side.p.ndim == 1:
        return binary_replicates(raw, sampling)
    k = side.p.shape[1]
    plain = {name: raw[name] for name in ("brier", "log_loss", "ece")}
    return {**confusion_metrics(raw["confusion"].reshape(-1, k, k)), **plain}


def _side_values(y: IntArray, side: _Side) -> dict[str, float]:
    binary = side.p.ndim == 1
    k = 2 if binary else side.p.shape[1]
    matrix = confusion_matrix(y, side.predictions, n_classes=k)
    rates = confusion_metrics(matrix, positive=1 if binary else None)
    outcome, p = (y, side.p) if binary else top_label(y, side.p)
    fit = logistic_recalibration(outcome, p)
    both = binary and not absent_class(y)
    return {
        **{name: float(rate) for name, rate in rates.items()},
        "auc_roc": auroc(y, p) if both else float("nan"),
        "auc_pr": average_precision(y, p) if both else float("nan"),
        "brier": brier(y, side.p),
        "log_loss": log_loss(y, side.p),
        "ece": expected_calibration_error(outcome, p),
        "calibration_slope": fit.slope.value,
        "calibration_intercept": fit.intercept.value,
    }


def _difference_report(a: float, b: float, sample: FloatArray, sampling: Sampling) -> dict[str, Any]:
    if np.isnan(a) or np.isnan(b):
        estimate = not_estimable("undefined for one of the two models")
    else:
        estimate = sampling.interval(a - b, sample, low=-np.inf, high=np.inf)
    report = estimate.as_report()
    return {"a": a, "b": b, "difference": report.pop("value"), **report}
