"""Area under the ROC curve: exact value, DeLong and clustered variance, tests, partial area, bootstrap, multi-class.

Value and interval      auroc, delong, auroc_ci, clustered_auroc, newcombe_interval
Two curves              delong_test, delong_test_independent, clustered_auroc_test, bootstrap_auroc_test
Curves and parts        roc_points, partial_auroc, average_precision
Bootstrap               bootstrap_auroc, percentile_interval, patient_weights
Several classes         multiclass_auroc, macro_auroc, hand_till
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats
from scipy.sparse import csr_matrix

from errors import DataError
from estimates import (
    Estimate,
    FloatArray,
    IntArray,
    TestResult,
    as_groups,
    as_labels,
    as_scores,
    count_groups,
    not_estimable,
    sum_by_group,
    tail_probability,
    two_sided_quantile,
    undefined,
    wald,
)

ABSENT = {0: "no negative films", 1: "no positive films"}


def absent_class(labels: IntArray) -> str:
    """Which of the two classes is missing, in words; '' when both are there."""
    positives = int(labels.sum())
    return ABSENT[1] if positives == 0 else ABSENT[0] if positives == len(labels) else ""


def placements(labels: IntArray, scores: FloatArray) -> FloatArray:
    """Each film's placement (N,): the share of the other class it is ranked correctly against, ties half.

    The mean over positives, and over negatives, is the AUROC. O(n log n) by midranks (Sun & Xu 2014).
    """
    positive = labels == 1
    n_pos = int(positive.sum())
    n_neg = len(labels) - n_pos
    overall = stats.rankdata(scores)
    placement = np.empty(len(scores))
    placement[positive] = (overall[positive] - stats.rankdata(scores[positive])) / n_neg
    placement[~positive] = 1 - (overall[~positive] - stats.rankdata(scores[~positive])) / n_pos
    return placement


def auroc(labels: ArrayLike, scores: ArrayLike, *, higher_is_positive: bool = True) -> float:
    """Area under the ROC curve in [0, 1], 0.5 for chance: P(positive > negative) + P(tie)/2.

    `labels` (N,) of 0/1 and `scores` (N,). NaN with a warning when one class is absent. Mann & Whitney 1947.
    """
    y = as_labels(labels)
    s = as_scores(scores, n=len(y))
    if reason := absent_class(y):
        return undefined("auc_roc", reason)
    return float(placements(y, s if higher_is_positive else -s)[y == 1].mean())


@dataclass(frozen=True)
class Delong:
    """AUROCs of m scores on the same films with their covariance."""

    auc: FloatArray
    """(m,)"""
    covariance: FloatArray
    """(m, m)"""
    n_pos: int
    n_neg: int
    placement: FloatArray
    """(N, m)"""


def delong(labels: ArrayLike, scores: ArrayLike, *, higher_is_positive: bool = True) -> Delong:
    """AUROCs of `scores` (N,) or (N, m) and their DeLong covariance, in O(m·n log n) (Sun & Xu 2014).

    Raises DataError unless both classes are there; a class with one film has an infinite variance of its own, and
    its part of the covariance is NaN.
    """
    y, columns = _checked(labels, scores, higher_is_positive)
    if reason := absent_class(y):
        raise DataError(f"AUROC needs both classes, but there are {reason}")
    placement = np.column_stack([placements(y, column) for column in columns.T])
    auc = placement[y == 1].mean(axis=0)
    covariance = sum(_mean_covariance(placement[y == label]) for label in (0, 1))
    assert isinstance(covariance, np.ndarray)
    n_pos = int(y.sum())
    return Delong(auc, covariance, n_pos, len(y) - n_pos, placement)


def _checked(labels: ArrayLike, scores: ArrayLike, higher_is_positive: bool) -> tuple[IntArray, FloatArray]:
    y = as_labels(labels)
    array = np.asarray(scores, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    columns = np.column_stack([as_scores(column, n=len(y)) for column in array.T])
    return y, columns if higher_is_positive else -columns


def _mean_covariance(rows: FloatArray) -> FloatArray:
    """Covariance of the column means of `rows` (n, m)."""
    m = rows.shape[1]
    if len(rows) < 2:
        return np.full((m, m), np.nan)
    return np.cov(rows, rowvar=False).reshape(m, m) / len(rows)


def auroc_ci(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    level: float = 0.95,
    groups: ArrayLike | None = None,
    higher_is_positive: bool = True,
    raw: bool = False,
) -> Estimate:
    """AUROC with its interval: DeLong, or Obuchowski 1997 when `groups` (N,) give a patient several films.

    Wald on the AUC scale, clipped to [0, 1] (as pROC). Where that variance is 0 or not estimable (AUC of 0 or 1, a
    single positive) it is replaced by Newcombe's score-type interval and `method` says so; `raw` keeps the
    zero-width one. NaN with a reason when one class is absent.
    """
    y, columns = _checked(labels, scores, higher_is_positive)
    if reason := absent_class(y):
        return not_estimable(reason)
    codes = as_groups(None if groups is None else np.asarray(groups), n=len(y))
    clusters = int(codes.max()) + 1
    if clusters == 1:
        value = float(placements(y, columns[:, 0])[y == 1].mean())
        return not_estimable("one patient only: no variance between patients", value=value)
    if clusters < len(y):
        auc, covariance = _clustered(y, columns, codes)
        method = "Obuchowski 1997, clustered by patient"
    else:
        result = delong(y, columns)
        auc, covariance, method = result.auc, result.covariance, "DeLong"
    variance = float(covariance[0, 0])
    if raw or variance > 0:
        return wald(float(auc[0]), np.sqrt(variance), level=level, method=method, low=0.0, high=1.0)
    return _score_type(float(auc[0]), y, codes, level=level, replaced=method)


def _score_type(auc: float, labels: IntArray, codes: IntArray, *, level: float, replaced: str) -> Estimate:
    n_pos, n_neg = (count_groups(codes[labels == label]) for label in (1, 0))
    low, high = newcombe_interval(auc, n_pos=n_pos, n_neg=n_neg, level=level)
    why = f"{replaced} has no usable variance here (AUROC {auc:g}, {n_pos} positive and {n_neg} negative patients)"
    return Estimate(auc, low, high, "Newcombe 2006 method 5 (score type)", 0.0, reason=why)


def newcombe_interval(auc: float, *, n_pos: int, n_neg: int, level: float = 0.95) -> tuple[float, float]:
    """Score-type interval of an AUROC from its value and the two sample sizes; never of zero width.

    Method 5 of Newcombe 2006 (Stat Med 25:559): solves |auc − θ| = z·SD(θ) with the exponential-model variance of
    Hanley & McNeil 1982 and the mean of the sample sizes in place of each.
    """
    z = two_sided_quantile(level)
    mean_size = (n_pos + n_neg) / 2

    def excess(theta: float) -> float:
        spread = (1 - theta) / (2 - theta) + theta / (1 + theta)
        variance = theta * (1 - theta) * (1 + (mean_size - 1) * spread) / (n_pos * n_neg)
        return (auc - theta) ** 2 - z**2 * variance

    low = 0.0 if auc <= 0 else float(optimize.brentq(excess, 0.0, auc - 1e-12 if auc < 1 else 1 - 1e-12))
    high = 1.0 if auc >= 1 else float(optimize.brentq(excess, auc + 1e-12, 1.0))
    return low, high


def delong_test(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    *,
    level: float = 0.95,
    alternative: str = "two-sided",
    higher_is_positive: bool = True,
) -> TestResult:
    """AUROC of a minus AUROC of b on the same films (paired DeLong 1988); `alternative` speaks of a − b.

    All arrays (N,). p = 1 when the two curves are the same; NaN with a reason when the variance of a real
    difference is 0.
    """
    result = delong(labels, np.column_stack([scores_a, scores_b]), higher_is_positive=higher_is_positive)
    return _difference_test(result.auc, result.covariance, level=level, alternative=alternative, method="paired DeLong")


def _difference_test(
    auc: FloatArray, covariance: FloatArray, *, level: float, alternative: str, method: str
) -> TestResult:
    difference = float(auc[0] - auc[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    # Rounding leaves ±1e-19 where the two rankings are the same.
    se = 0.0 if variance < 1e-18 else float(np.sqrt(variance))
    half = two_sided_quantile(level) * se
    reason = ""
    if se > 0:
        z = difference / se
    else:
        z = 0.0 if difference == 0 else float("nan")
        reason = "" if difference == 0 else "the variance of the difference is 0"
    p = tail_probability(z, alternative=alternative) if not np.isnan(z) else float("nan")
    if se == 0 and difference == 0:
        p = 1.0
    return TestResult(
        statistic=z,
        p_value=p,
        method=method,
        difference=difference,
        ci_low=difference - half if not reason else float("nan"),
        ci_high=difference + half if not reason else float("nan"),
        standard_error=se,
        first=float(auc[0]),
        second=float(auc[1]),
        reason=reason,
    )


def delong_test_independent(
    labels_a: ArrayLike,
    scores_a: ArrayLike,
    labels_b: ArrayLike,
    scores_b: ArrayLike,
    *,
    level: float = 0.95,
    alternative: str = "two-sided",
    higher_is_positive: bool = True,
) -> TestResult:
    """AUROC of a minus AUROC of b on different patients: DeLong variances, Welch-Satterthwaite t (as pROC)."""
    a = delong(labels_a, scores_a, higher_is_positive=higher_is_positive)
    b = delong(labels_b, scores_b, higher_is_positive=higher_is_positive)
    variance_a, variance_b = (float(side.covariance[0, 0]) for side in (a, b))
    difference = float(a.auc[0] - b.auc[0])
    se = float(np.sqrt(variance_a + variance_b))
    if not se > 0:
        reason = "DeLong's variance is 0 or not estimable in both groups"
        return TestResult(float("nan"), float("nan"), "independent DeLong", difference, reason=reason)
    # As pROC: each curve counts as one sample of n_pos + n_neg films.
    df = se**4 / sum(
        variance**2 / (side.n_pos + side.n_neg - 1) for variance, side in ((variance_a, a), (variance_b, b))
    )
    half = two_sided_quantile(level, df=df) * se
    return TestResult(
        statistic=difference / se,
        p_value=tail_probability(difference / se, alternative=alternative, df=df),
        method="independent DeLong, Welch t",
        difference=difference,
        ci_low=difference - half,
        ci_high=difference + half,
        standard_error=se,
        df=float(df),
        first=float(a.auc[0]),
        second=float(b.auc[0]),
    )


def _clustered(labels: IntArray, columns: FloatArray, codes: IntArray) -> tuple[FloatArray, FloatArray]:
    """AUROCs (m,) and Obuchowski's covariance (m, m) with patients `codes` (N,) as clusters."""
    clusters = int(codes.max()) + 1
    placement = np.column_stack([placements(labels, column) for column in columns.T])
    auc = placement[labels == 1].mean(axis=0)
    sums = {}
    factor = {}
    for label in (0, 1):
        chosen = labels == label
        centred = np.where(chosen[:, None], placement - auc, 0.0)
        sums[label] = sum_by_group(centred, codes) / chosen.sum()
        present = count_groups(codes[chosen])
        factor[label] = present / (present - 1) if present > 1 else float("nan")
    cross = sums[1].T @ sums[0]
    covariance = sum(factor[label] * sums[label].T @ sums[label] for label in (0, 1))
    assert isinstance(covariance, np.ndarray)
    across = clusters / (clusters - 1) if clusters > 1 else float("nan")
    return auc, covariance + across * (cross + cross.T)


def clustered_auroc(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, *, higher_is_positive: bool = True
) -> tuple[FloatArray, FloatArray]:
    """AUROCs (m,) of `scores` (N,) or (N, m) and their covariance (m, m), clustered by patient (N,).

    Obuchowski 1997 (Biometrics 53:567). Raises DataError unless both classes are there.
    """
    y, columns = _checked(labels, scores, higher_is_positive)
    if reason := absent_class(y):
        raise DataError(f"AUROC needs both classes, but there are {reason}")
    return _clustered(y, columns, as_groups(np.asarray(groups), n=len(y)))


def clustered_auroc_test(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    groups: ArrayLike,
    *,
    level: float = 0.95,
    alternative: str = "two-sided",
    higher_is_positive: bool = True,
) -> TestResult:
    """AUROC of a minus AUROC of b on the same films, patients (N,) as clusters (Obuchowski 1997)."""
    auc, covariance = clustered_auroc(
        labels, np.column_stack([scores_a, scores_b]), groups, higher_is_positive=higher_is_positive
    )
    return _difference_test(
        auc, covariance, level=level, alternative=alternative, method="Obuchowski 1997, clustered by patient"
    )


def roc_points(labels: ArrayLike, scores: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """False positive rate, sensitivity and threshold (score >= threshold is positive) at every distinct score.

    Each (G + 1,), from the strictest threshold (+inf: nothing positive) to the laxest. DataError when a class is
    absent.
    """
    y = as_labels(labels)
    s = as_scores(scores, n=len(y))
    if reason := absent_class(y):
        raise DataError(f"a ROC curve needs both classes, but there are {reason}")
    values, group = np.unique(s, return_inverse=True)
    positives = np.bincount(group, weights=y, minlength=len(values))[::-1]
    negatives = np.bincount(group, weights=1 - y, minlength=len(values))[::-1]
    sensitivity = np.concatenate([[0.0], np.cumsum(positives)]) / positives.sum()
    false_positive_rate = np.concatenate([[0.0], np.cumsum(negatives)]) / negatives.sum()
    return false_positive_rate, sensitivity, np.concatenate([[np.inf], values[::-1]])


def partial_auroc(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    low: float = 0.9,
    high: float = 1.0,
    focus: str = "specificity",
    corrected: bool = False,
    higher_is_positive: bool = True,
) -> float:
    """Area over specificities (or sensitivities) from `low` to `high`, in [0, high − low].

    `corrected` rescales it so that chance is 0.5 and perfection 1 (McClish 1989); that is NaN with a warning for a
    curve below the diagonal there, as in pROC. NaN with a warning when one class is absent.
    """
    if focus not in ("specificity", "sensitivity") or not 0 <= low < high <= 1:
        raise DataError(
            f"partial AUROC over {focus} {low:g}-{high:g}: name specificity or sensitivity, 0 <= low < high <= 1"
        )
    y = as_labels(labels)
    s = as_scores(scores, n=len(y))
    if reason := absent_class(y):
        return undefined("partial auc_roc", reason)
    fpr, sensitivity, _ = roc_points(y, s if higher_is_positive else -s)
    # Over sensitivity the curve is read from the other side: specificity as a function of sensitivity.
    x, height = (1 - fpr, sensitivity) if focus == "specificity" else (sensitivity, 1 - fpr)
    area = _area_between(x, height, low, high)
    if not corrected:
        return area
    smallest, largest = (high - low) * (2 - low - high) / 2, high - low
    if area < smallest:
        return undefined("corrected partial auc_roc", "the curve runs below the diagonal in this range")
    return (1 + (area - smallest) / (largest - smallest)) / 2


def _area_between(x: FloatArray, height: FloatArray, low: float, high: float) -> float:
    """Area under the polyline (x, height), x monotone, between two abscissas."""
    start, end = (x[:-1], x[1:]) if x[-1] >= x[0] else (x[1:], x[:-1])
    left, right = (height[:-1], height[1:]) if x[-1] >= x[0] else (height[1:], height[:-1])
    a, b = np.clip(start, low, high), np.clip(end, low, high)
    width = np.where(end > start, end - start, 1.0)
    slope = (right - left) / width
    middle = left + slope * ((a + b) / 2 - start)
    return float((middle * (b - a)).sum())


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the precision-recall curve as a step function, in [0, 1]; chance is the prevalence.

    The sum of precision × gain in recall over distinct thresholds (no interpolation). NaN with a warning when one
    class is absent: without negatives it is 1 whatever the scores.
    """
    y = as_labels(labels)
    s = as_scores(scores, n=len(y))
    if reason := absent_class(y):
        return undefined("auc_pr", reason)
    negatives, positives = _split(score_tally(y, s) @ np.ones((len(y), 1)))
    return float(average_precision_from_counts(negatives, positives)[0])


def score_tally(
    labels: IntArray, scores: FloatArray, codes: IntArray | None = None, *, max_groups: int | None = None
) -> csr_matrix:
    """Sparse counts (2G, P): row g is negatives, row G + g positives with the g-th smallest score; columns patients.

    Times a column of patient weights it gives the class counts per score of that resample, which is all that
    ranking metrics need. With more than `max_groups` distinct scores neighbours are merged, each class contributing
    half of the groups, so that a rare class keeps its resolution.
    """
    group = np.unique(scores, return_inverse=True)[1]
    if max_groups is not None and group.max() >= max_groups:
        mass = np.where(labels == 1, 0.5 / labels.sum(), 0.5 / (len(labels) - labels.sum()))
        per_score = np.bincount(group, weights=mass)
        middle = np.cumsum(per_score) - per_score / 2
        group = np.unique(np.floor(middle * max_groups), return_inverse=True)[1][group]
    n_groups = int(group.max()) + 1
    columns = np.arange(len(labels)) if codes is None else codes
    entries = np.ones(len(labels))
    return csr_matrix((entries, (group + n_groups * labels, columns)), shape=(2 * n_groups, int(columns.max()) + 1))


def _split(counts: FloatArray) -> tuple[FloatArray, FloatArray]:
    half = len(counts) // 2
    return counts[:half], counts[half:]


def auroc_from_counts(negatives: FloatArray, positives: FloatArray) -> FloatArray:
    """AUROC (b,) from class counts per ascending score (G, b); NaN where a class is absent."""
    below = np.cumsum(negatives, axis=0)
    total = below[-1] * positives.sum(axis=0)
    wins = np.einsum("gb,gb->b", positives, below - negatives / 2)
    return np.divide(wins, total, out=np.full(len(total), np.nan), where=total > 0)


def average_precision_from_counts(negatives: FloatArray, positives: FloatArray) -> FloatArray:
    """Average precision (b,) from class counts per ascending score (G, b); NaN where a class is absent."""
    true_positives = np.cumsum(positives[::-1], axis=0)
    called = true_positives + np.cumsum(negatives[::-1], axis=0)
    precision = np.divide(true_positives, called, out=np.zeros_like(called), where=called > 0)
    total = true_positives[-1]
    both = (total > 0) & (called[-1] > total)
    area = np.einsum("gb,gb->b", positives[::-1], precision)
    return np.divide(area, total, out=np.full(len(total), np.nan), where=both)


def patient_weights(
    n_patients: int, *, n_boot: int, rng: np.random.Generator, chunk: int = 100, strata: IntArray | None = None
) -> Iterator[FloatArray]:
    """How often each patient is drawn, in blocks (P, b) of bootstrap resamples, n_boot columns in all.

    With `strata` (P,) each stratum keeps its size.
    """
    labels = np.zeros(n_patients, dtype=np.int64) if strata is None else strata
    members = [np.flatnonzero(labels == stratum) for stratum in np.unique(labels)]
    for start in range(0, n_boot, chunk):
        width = min(chunk, n_boot - start)
        weights = np.zeros((n_patients, width))
        for member in members:
            weights[member] = _draw_counts(len(member), width, rng)
        yield weights


def _draw_counts(size: int, width: int, rng: np.random.Generator) -> FloatArray:
    drawn = rng.integers(size, size=(width, size)) * width + np.arange(width)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * width).reshape(size, width).astype(np.float64)


def bootstrap_auroc(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    stratified: bool = True,
    groups: ArrayLike | None = None,
    higher_is_positive: bool = True,
) -> FloatArray:
    """Bootstrap replicates (n_boot, m) of the AUROCs of `scores` (N,) or (N, m), the same resamples for all.

    Films are drawn within each class (`stratified`), or, given `groups` (N,), whole patients are drawn. A resample
    without one of the classes gives NaN.
    """
    y, columns = _checked(labels, scores, higher_is_positive)
    codes = as_groups(None if groups is None else np.asarray(groups), n=len(y))
    strata = y if stratified and groups is None else None
    tallies = [score_tally(y, column, codes) for column in columns.T]
    blocks = patient_weights(int(codes.max()) + 1, n_boot=n_boot, rng=np.random.default_rng(seed), strata=strata)
    return np.concatenate(
        [np.column_stack([auroc_from_counts(*_split(tally @ weights)) for tally in tallies]) for weights in blocks]
    )


def percentile_interval(replicates: ArrayLike, *, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap limits of replicates (n_boot,), undefined resamples left out; NaN if all are."""
    values = np.asarray(replicates, dtype=np.float64)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_auroc_test(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    alternative: str = "two-sided",
    stratified: bool = True,
    groups: ArrayLike | None = None,
    higher_is_positive: bool = True,
) -> TestResult:
    """AUROC of a minus AUROC of b: z from the bootstrap SD of the difference, percentile limits (as pROC)."""
    scores = np.column_stack([scores_a, scores_b])
    auc = delong(labels, scores, higher_is_positive=higher_is_positive).auc
    replicates = bootstrap_auroc(
        labels,
        scores,
        n_boot=n_boot,
        seed=seed,
        stratified=stratified,
        groups=groups,
        higher_is_positive=higher_is_positive,
    )
    differences = replicates[:, 0] - replicates[:, 1]
    se = float(np.nanstd(differences, ddof=1))
    covariance = np.array([[se**2, 0.0], [0.0, 0.0]])
    kind = "patients" if groups is not None else "films within class" if stratified else "films"
    result = _difference_test(
        auc, covariance, level=level, alternative=alternative, method=f"bootstrap of {kind}, {n_boot} resamples"
    )
    low, high = percentile_interval(differences, level=level)
    return replace(result, ci_low=low, ci_high=high)


def multiclass_auroc(
    labels: ArrayLike, probabilities: ArrayLike, *, scheme: str = "ovr", average: str = "macro"
) -> float:
    """AUROC of K classes in [0, 1] from class scores (N, K), each column ranked on its own.

    `scheme` ovr (one class against the rest; macro, weighted by prevalence, or micro over all N × K decisions) or
    ovo (mean over pairs, Hand & Till 2001; macro or weighted by the pair's share). NaN with a warning when a class
    is absent.
    """
    scores = np.asarray(probabilities, dtype=np.float64)
    n_classes = scores.shape[1]
    y = as_labels(labels, n_classes=n_classes)
    counts = np.bincount(y, minlength=n_classes)
    if (counts == 0).any():
        return undefined("auc_roc", f"no films of class {int(np.flatnonzero(counts == 0)[0])}")
    if (scheme, average) == ("ovr", "micro"):
        return auroc(np.eye(n_classes, dtype=np.int64)[y].ravel(), scores.ravel())
    if scheme == "ovr":
        values = [auroc(y == k, scores[:, k]) for k in range(n_classes)]
        weights = counts.astype(np.float64)
    elif scheme == "ovo":
        pairs = [(i, j) for j in range(n_classes) for i in range(j)]
        values = [_pair_auroc(y, scores, i, j) for i, j in pairs]
        weights = np.array([counts[i] + counts[j] for i, j in pairs], dtype=np.float64)
    else:
        raise DataError(f"scheme {scheme!r} is neither ovr nor ovo")
    if average not in ("macro", "weighted"):
        raise DataError(f"average {average!r} is not one of macro, weighted, or micro with ovr")
    return float(np.average(values, weights=weights if average == "weighted" else None))


def macro_auroc(
    labels: ArrayLike, probabilities: ArrayLike, *, level: float = 0.95, groups: ArrayLike | None = None
) -> Estimate:
    """Mean one-vs-rest AUROC over classes (N, K) with an interval from summed influence values.

    The influence of a film on one AUROC is its placement minus the area, over its class size: with one class this is
    DeLong's variance, with `groups` Obuchowski's, up to factors n/(n − 1). NaN with a reason when a class is absent.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    y = as_labels(labels, n_classes=p.shape[1])
    codes = as_groups(None if groups is None else np.asarray(groups), n=len(y))
    counts = np.bincount(y, minlength=p.shape[1])
    if (counts == 0).any() or p.shape[1] < 2:
        return not_estimable(f"no films of class number {', '.join(map(str, np.flatnonzero(counts == 0)))}")
    area, influence = macro_influence(y, p)
    clusters = int(codes.max()) + 1
    if clusters < 2:
        return not_estimable("one patient only: no variance between patients", value=area)
    se = float(np.sqrt(clusters / (clusters - 1) * (sum_by_group(influence, codes) ** 2).sum()))
    method = "macro one-vs-rest, infinitesimal jackknife" + (", clustered by patient" if clusters < len(y) else "")
    if se > 0:
        return wald(area, se, level=level, method=method, low=0.0, high=1.0)
    # Every class is ranked alike: the smallest one bounds what is known.
    smallest = min(len(np.unique(codes[y == k])) for k in range(p.shape[1]))
    low, high = newcombe_interval(area, n_pos=smallest, n_neg=max(1, clusters - smallest), level=level)
    why = f"every class has the same AUROC of {area:g} without variance"
    return Estimate(area, low, high, "Newcombe 2006 method 5 on the smallest class", 0.0, reason=why)


def macro_influence(labels: IntArray, p: FloatArray) -> tuple[float, FloatArray]:
    """Macro AUROC and each film's influence on it (N,)."""
    areas, influence = zip(*(_influence((labels == k).astype(np.int64), p[:, k]) for k in range(p.shape[1])))
    return float(np.mean(areas)), np.mean(influence, axis=0)


def _influence(labels: IntArray, scores: FloatArray) -> tuple[float, FloatArray]:
    placement = placements(labels, scores)
    area = float(placement[labels == 1].mean())
    return area, (placement - area) / np.where(labels == 1, labels.sum(), len(labels) - labels.sum())


def _pair_auroc(labels: IntArray, scores: FloatArray, i: int, j: int) -> float:
    chosen = (labels == i) | (labels == j)
    is_i = labels[chosen] == i
    return (auroc(is_i, scores[chosen, i]) + auroc(~is_i, scores[chosen, j])) / 2


def hand_till(labels: ArrayLike, scores: ArrayLike) -> float:
    """Hand-Till AUROC of one score (N,) for ordered or unordered classes `labels` (N,) of any values.

    The mean over pairs of classes present, each pair in the direction of its medians (pROC multiclass.roc). Class
    scores (N, K) give `multiclass_auroc(scheme="ovo")`.
    """
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim == 2:
        return multiclass_auroc(labels, s, scheme="ovo")
    y = np.asarray(labels)
    s = as_scores(s, n=len(y))
    classes = np.unique(y)
    if len(classes) < 2:
        return undefined("auc_roc", f"all films are of class {classes[0]}")
    pairs = [(low, high) for index, high in enumerate(classes) for low in classes[:index]]
    return float(np.mean([_directed_pair(s[y == low], s[y == high]) for low, high in pairs]))


def _directed_pair(low: FloatArray, high: FloatArray) -> float:
    labels = np.repeat([0, 1], [len(low), len(high)])
    return auroc(labels, np.concatenate([low, high]), higher_is_positive=bool(np.median(low) <= np.median(high)))
