"""The confusion matrix, and a bootstrap of patients that needs only weighted sums.

Confusion matrix        confusion_matrix, confusion_metrics, confusion_reason
Bootstrap               Sampling, Tallied, bootstrap_metrics and the statistics it draws

A resample gives each patient a weight: how often it was drawn. Every metric here is a function of sums of such
weights (films per cell, squared errors, films per score), so 100 resamples are one sparse matrix product. 2,000
resamples of 10,000 films take a second for all sixteen metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy.sparse import csr_matrix

from auroc import (
    absent_class,
    auroc,
    auroc_from_counts,
    average_precision,
    average_precision_from_counts,
    patient_weights,
    percentile_interval,
    score_tally,
)
from calibration import bin_index, brier_terms, clipped_logit, log_loss_terms, logistic_recalibration
from errors import DataError
from estimates import Estimate, FloatArray, IntArray, as_groups, as_labels, as_probabilities, not_estimable, wald

CONFUSION_NAMES = (
    "accuracy",
    "balanced_accuracy",
    "precision",
    "sensitivity",
    "specificity",
    "npv",
    "f1",
    "cohen_kappa",
    "mcc",
)
"""Metrics of the confusion matrix: they change with the threshold."""

MAX_SCORE_GROUPS = 4000
"""Distinct scores kept apart in a bootstrap of ranking metrics; more are merged and the shift is put back."""

BOOTSTRAP_BUDGET = 200_000_000
"""Patients × resamples drawn at most; beyond it there are fewer resamples."""

PERCENTILE_RESAMPLES = 1000
"""With fewer resamples than this the limits are value ± z × bootstrap SD: tails need more draws than an SD."""

MIN_RESAMPLES = 200

MIN_DEFINED = 20
"""Resamples in which a statistic must be defined, and half of them all, to speak of its spread."""

BLOCK_CELLS = 10_000_000
"""Patients × resamples held in memory at once (80 MB)."""


# --- the confusion matrix -------------------------------------------------------------------------------------


def confusion_matrix(labels: IntArray, predictions: IntArray, *, n_classes: int) -> IntArray:
    """Counts (K, K): rows the truth, columns the prediction."""
    return np.bincount(labels * n_classes + predictions, minlength=n_classes**2).reshape(n_classes, n_classes)


def confusion_metrics(matrix: ArrayLike, *, positive: int | None = None) -> dict[str, FloatArray]:
    """The nine confusion metrics of matrices (…, K, K), rows the truth, as arrays of shape (…).

    `positive` chooses the class that precision, sensitivity, specificity, NPV and F1 speak of; None averages them
    over all classes with equal weight (macro). Undefined is NaN: sensitivity, F1 and balanced accuracy where a class
    has no films, precision and NPV where it is never (or always) predicted, kappa where all films are of one class,
    MCC where a row or column holds everything. MCC for K classes after Gorodkin 2004.
    """
    m = np.asarray(matrix, dtype=np.float64)
    hit = np.diagonal(m, axis1=-2, axis2=-1)
    truth, called = m.sum(axis=-1), m.sum(axis=-2)
    total = truth.sum(axis=-1)
    rest = total[..., None] - truth - called + hit
    present = truth > 0
    recall = _ratio(hit, truth)
    per_class = {
        "precision": _ratio(hit, called),
        "sensitivity": recall,
        "specificity": _ratio(rest, total[..., None] - truth),
        "npv": _ratio(rest, total[..., None] - called),
        "f1": np.where(present, _ratio(2 * hit, truth + called), np.nan),
    }
    rates = {name: rate.mean(axis=-1) if positive is None else rate[..., positive] for name, rate in per_class.items()}
    expected = (truth * called).sum(axis=-1)
    observed = hit.sum(axis=-1)
    spread = (total**2 - (truth**2).sum(axis=-1)) * (total**2 - (called**2).sum(axis=-1))
    kappa = _ratio(observed * total - expected, total**2 - expected)
    return {
        "accuracy": _ratio(observed, total),
        "balanced_accuracy": recall.mean(axis=-1),
        **rates,
        "cohen_kappa": np.where(present.sum(axis=-1) > 1, kappa, np.nan),
        "mcc": _ratio(observed * total - expected, np.sqrt(spread)),
    }


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=np.asarray(denominator) > 0)


def confusion_reason(name: str, matrix: IntArray, classes: Sequence[str], positive: int | None) -> str:
    """Why a confusion metric is NaN."""
    truth, called = matrix.sum(axis=1), matrix.sum(axis=0)
    absent = [label for label, count in zip(classes, truth) if not count]
    never = [label for label, count in zip(classes, called) if not count]
    if name in ("precision", "npv") and positive is not None:
        which = classes[positive] if name == "precision" else f"anything but {classes[positive]}"
        return f"the model never predicts {which}"
    if absent:
        return f"no films of class {', '.join(absent)}"
    if name == "npv":
        return "the model predicts one class only"
    return f"the model never predicts {', '.join(never)}"


# --- the bootstrap --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tallied:
    """A statistic that needs of a resample only weighted sums over patients."""

    tally: csr_matrix
    """(cells, P)"""
    reduce: Callable[[FloatArray], FloatArray]
    """Sums (cells, b) → replicates (b,) or (b, m)."""


@dataclass(frozen=True)
class Sampling:
    """Who is resampled, how often, and how an interval is written down."""

    codes: IntArray
    """Patient number of each film (N,)."""
    level: float
    n_boot: int
    seed: int
    proportion_interval: str = "wilson"

    def __post_init__(self) -> None:
        if self.n_boot < 1:
            raise DataError(f"n_boot is {self.n_boot}, but an interval needs resamples; 2000 are usual")

    @property
    def patients(self) -> int:
        return int(self.codes.max()) + 1

    @property
    def clustered(self) -> bool:
        return self.patients < len(self.codes)

    @property
    def resamples(self) -> int:
        affordable = BOOTSTRAP_BUDGET // self.patients
        # Too few for percentiles are enough for an SD (to 5 %) with the least there may be.
        return min(self.n_boot, affordable if affordable >= PERCENTILE_RESAMPLES else MIN_RESAMPLES)

    @property
    def unit(self) -> str:
        return "patients" if self.clustered else "films"

    def replicates(self, statistics: Mapping[str, Tallied]) -> dict[str, FloatArray]:
        """Bootstrap replicates (b,) or (b, m) of every statistic, all on the same resamples."""
        blocks = patient_weights(
            self.patients,
            n_boot=self.resamples,
            rng=np.random.default_rng(self.seed),
            chunk=int(np.clip(BLOCK_CELLS // self.patients, 1, 100)),
        )
        parts: dict[str, list[FloatArray]] = {name: [] for name in statistics}
        for weights in blocks:
            for name, statistic in statistics.items():
                parts[name].append(statistic.reduce(statistic.tally @ weights))
        return {name: np.concatenate(part) for name, part in parts.items()}

    def interval(
        self, value: float, replicates: FloatArray, *, low: float, high: float, wide: bool = False
    ) -> Estimate:
        """Percentile limits, or value ± z·SD for few resamples and where `wide` (a statistic biased upwards)."""
        if self.patients < 2:
            return not_estimable("one patient only: no variance between patients", value=value)
        defined = replicates[~np.isnan(replicates)]
        lost = len(replicates) - len(defined)
        note = f"undefined in {lost} of {len(replicates)} resamples, which were left out" if lost else ""
        if len(defined) < max(MIN_DEFINED, len(replicates) / 2):
            return not_estimable(note or "too few resamples for an interval", value=value)
        se = float(defined.std(ddof=1))
        name = f"bootstrap of {self.unit}, {len(replicates)} resamples"
        if wide or len(replicates) < PERCENTILE_RESAMPLES:
            how = f"{name}, value ± z × SD"
            return wald(value, se, level=self.level, method=how, low=low, high=high, reason=note)
        limits = percentile_interval(defined, level=self.level)
        # Rounding and discreteness can leave the value just outside its own percentiles.
        return Estimate(value, min(limits[0], value), max(limits[1], value), f"{name}, percentile", se, note)


def _sums_tally(cells: IntArray, values: FloatArray, codes: IntArray, n_cells: int) -> csr_matrix:
    return csr_matrix((values, (cells, codes)), shape=(n_cells, int(codes.max()) + 1))


def confusion_statistic(labels: IntArray, predictions: IntArray, n_classes: int, codes: IntArray) -> Tallied:
    tally = _sums_tally(labels * n_classes + predictions, np.ones(len(labels)), codes, n_classes**2)
    return Tallied(tally, lambda counts: counts.T)


def mean_statistic(terms: FloatArray, codes: IntArray) -> Tallied:
    n = len(terms)
    cells = np.repeat([0, 1], n)
    tally = _sums_tally(cells, np.concatenate([terms, np.ones(n)]), np.tile(codes, 2), 2)
    return Tallied(tally, lambda sums: sums[0] / sums[1])


def ece_statistic(outcome: IntArray, probabilities: FloatArray, codes: IntArray, n_bins: int = 10) -> Tallied:
    index = bin_index(probabilities, n_bins=n_bins)[0]
    n = len(outcome)
    cells = np.concatenate([index, np.full(n, n_bins)])
    values = np.concatenate([probabilities - outcome, np.ones(n)])
    tally = _sums_tally(cells, values, np.tile(codes, 2), n_bins + 1)
    return Tallied(tally, lambda sums: np.abs(sums[:-1]).sum(axis=0) / sums[-1])


def ranking_statistic(
    labels: IntArray,
    scores: FloatArray,
    codes: IntArray,
    reduce: Callable[[FloatArray, FloatArray], FloatArray],
    exact: float,
) -> Tallied:
    """AUROC or average precision; what merging scores shifts is put back, so replicates centre on `exact`."""
    tally = score_tally(labels, scores, codes, max_groups=MAX_SCORE_GROUPS)
    half = tally.shape[0] // 2

    def on_counts(counts: FloatArray) -> FloatArray:
        return reduce(counts[:half], counts[half:])

    shift = exact - float(on_counts(tally @ np.ones((tally.shape[1], 1)))[0])
    return Tallied(tally, lambda counts: on_counts(counts) + shift)


def _recalibration_statistic(
    labels: IntArray, probabilities: FloatArray, codes: IntArray, exact: tuple[float, float]
) -> Tallied:
    """Calibration intercept and slope (b, 2), the logits of merged scores averaged."""
    tally = score_tally(labels, probabilities, codes, max_groups=MAX_SCORE_GROUPS)
    half = tally.shape[0] // 2
    film_tally = score_tally(labels, probabilities, max_groups=MAX_SCORE_GROUPS)
    films = film_tally[:half] + film_tally[half:]
    logit = (films @ clipped_logit(probabilities)) / np.asarray(films.sum(axis=1)).ravel()

    def reduce(counts: FloatArray) -> FloatArray:
        return _weighted_recalibration(logit, counts[:half], counts[half:], exact)

    shift = np.array(exact) - reduce(tally @ np.ones((tally.shape[1], 1)))
    return Tallied(tally, lambda counts: reduce(counts) + shift)


def _weighted_recalibration(
    logit: FloatArray, negatives: FloatArray, positives: FloatArray, start: tuple[float, float]
) -> FloatArray:
    """Logistic fits (b, 2) to class counts per logit (G, b): Newton from the full-data solution."""
    n = negatives + positives
    beta = np.tile(np.array(start), (n.shape[1], 1))
    gradient_target = np.stack([positives.sum(axis=0), logit @ positives])
    # Four steps from so near a start reach 1e-8; a separated resample has no solution and becomes NaN.
    for _ in range(4):
        probability = special.expit(beta[:, 0] + logit[:, None] * beta[:, 1])
        expected = n * probability
        information = expected * (1 - probability)
        a, b, c = information.sum(axis=0), logit @ information, logit**2 @ information
        g0, g1 = gradient_target - np.stack([expected.sum(axis=0), logit @ expected])
        determinant = a * c - b**2
        usable = determinant > 1e-9
        step = np.stack([c * g0 - b * g1, a * g1 - b * g0]) / np.where(usable, determinant, np.nan)
        beta = beta + step.T
    return beta


def bootstrap_metrics(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    threshold: float = 0.5,
    groups: ArrayLike | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """Bootstrap replicates (b,) of every binary metric of metrics.json, by name.

    `labels` (N,) of 0/1, `probabilities` (N,) of class 1, `groups` (N,) patients, who are then resampled whole. b is
    `n_boot`, less beyond 2·10⁸ patients × resamples. NaN where a resample leaves a metric undefined, and throughout
    where the films themselves do.
    """
    y = as_labels(labels)
    p = as_probabilities(probabilities, n=len(y))
    sampling = Sampling(as_groups(None if groups is None else np.asarray(groups), n=len(y)), 0.95, n_boot, seed)
    return binary_replicates(sampling.replicates(binary_statistics(y, p, threshold, sampling.codes)), sampling)


def binary_statistics(y: IntArray, p: FloatArray, threshold: float, codes: IntArray) -> dict[str, Tallied]:
    statistics = {
        "confusion": confusion_statistic(y, (p >= threshold).astype(np.int64), 2, codes),
        "brier": mean_statistic(brier_terms(y, p), codes),
        "log_loss": mean_statistic(log_loss_terms(y, p), codes),
        "ece": ece_statistic(y, p, codes),
    }
    if not absent_class(y):
        statistics["auc_roc"] = ranking_statistic(y, p, codes, auroc_from_counts, auroc(y, p))
        statistics["auc_pr"] = ranking_statistic(y, p, codes, average_precision_from_counts, average_precision(y, p))
    fit = logistic_recalibration(y, p)
    if not np.isnan(fit.slope.value):
        exact = (fit.intercept.value, fit.slope.value)
        statistics["recalibration"] = _recalibration_statistic(y, p, codes, exact)
    return statistics


def binary_replicates(raw: Mapping[str, FloatArray], sampling: Sampling) -> dict[str, FloatArray]:
    nowhere = np.full(sampling.resamples, np.nan)
    recalibration = raw.get("recalibration", np.column_stack([nowhere, nowhere]))
    return {
        **confusion_metrics(raw["confusion"].reshape(-1, 2, 2), positive=1),
        **{name: raw.get(name, nowhere) for name in ("auc_roc", "auc_pr", "brier", "log_loss", "ece")},
        "calibration_intercept": recalibration[:, 0],
        "calibration_slope": recalibration[:, 1],
    }
