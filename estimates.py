"""What every statistic takes and returns: checked arrays in, an `Estimate` with its interval out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from errors import DataError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ROW_SUM_TOLERANCE = 1e-3
"""A row of probabilities may miss 1 by this much: float16 and four printed decimals stay within it."""


class UndefinedMetricWarning(UserWarning):
    """A statistic has no value on these data (one class absent, no variance); it is NaN, never 0."""


def undefined(name: str, reason: str) -> float:
    """NaN, with a warning that says which statistic has no value and why."""
    warnings.warn(f"{name} is undefined: {reason}", UndefinedMetricWarning, stacklevel=3)
    return float("nan")


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its confidence interval."""

    value: float
    ci_low: float
    ci_high: float
    method: str
    """How the interval was made, in words for a report."""
    standard_error: float = float("nan")
    """NaN where the interval does not come from a standard error."""
    reason: str = ""
    """Why the value or the interval is NaN, or what the reader must know about it."""

    @property
    def ci(self) -> tuple[float, float]:
        return self.ci_low, self.ci_high

    def as_report(self) -> dict[str, Any]:
        """`{"value", "ci_low", "ci_high", "method"}`, and `"reason"` when there is one."""
        report = asdict(self)
        del report["standard_error"]
        if not self.reason:
            del report["reason"]
        return report


@dataclass(frozen=True)
class TestResult:
    """A test of two quantities: first minus second."""

    __test__ = False  # pytest collects classes named Test*

    statistic: float
    p_value: float
    method: str
    difference: float = float("nan")
    ci_low: float = float("nan")
    ci_high: float = float("nan")
    standard_error: float = float("nan")
    df: float = float("inf")
    """Degrees of freedom of the reference distribution; infinite for the normal."""
    first: float = float("nan")
    second: float = float("nan")
    reason: str = ""

    @property
    def ci(self) -> tuple[float, float]:
        return self.ci_low, self.ci_high


def not_estimable(reason: str, *, value: float = float("nan"), method: str = "none") -> Estimate:
    """An estimate without an interval, and why."""
    return Estimate(value, float("nan"), float("nan"), method, reason=reason)


def wald(
    value: float,
    standard_error: float,
    *,
    level: float,
    method: str,
    low: float = -np.inf,
    high: float = np.inf,
    df: float = np.inf,
    reason: str = "",
) -> Estimate:
    """value ± quantile × standard error, clipped to [low, high]; Student's t where `df` is finite."""
    half = two_sided_quantile(level, df=df) * standard_error
    return Estimate(
        value=float(value),
        ci_low=float(max(low, value - half)),
        ci_high=float(min(high, value + half)),
        method=method,
        standard_error=float(standard_error),
        reason=reason,
    )


def two_sided_quantile(level: float, *, df: float = np.inf) -> float:
    """The quantile that leaves (1 − level)/2 in each tail: 1.96 for 0.95."""
    if not 0 < level < 1:
        raise DataError(f"confidence level {level!r} is not between 0 and 1; 0.95 is usual")
    tail = 0.5 + level / 2
    return float(stats.norm.ppf(tail) if np.isinf(df) else stats.t.ppf(tail, df))


def tail_probability(statistic: float, *, alternative: str, df: float = np.inf) -> float:
    """P-value of a normal or t statistic; `alternative` is two-sided, greater or less."""
    upper = float(stats.norm.sf(statistic) if np.isinf(df) else stats.t.sf(statistic, df))
    lower = float(stats.norm.cdf(statistic) if np.isinf(df) else stats.t.cdf(statistic, df))
    choices = {"two-sided": 2 * min(upper, lower), "greater": upper, "less": lower}
    if alternative not in choices:
        raise DataError(f"alternative {alternative!r} is not one of {', '.join(choices)}")
    return min(1.0, choices[alternative])


def as_labels(labels: ArrayLike, *, n_classes: int = 2) -> IntArray:
    """Class numbers (N,) in 0 … n_classes − 1."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0:
        raise DataError(f"labels have shape {array.shape}; give one class number per film, at least one film")
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise DataError(f"labels are {array.dtype}, e.g. {array[0]!r}; give class numbers 0 … {n_classes - 1}")
    number = array.astype(np.float64)
    bad = np.flatnonzero(~((number >= 0) & (number < n_classes) & (number == np.floor(number))))
    if bad.size:
        raise DataError(
            f"row {bad[0]}: label {array[bad[0]]!r} is outside 0 … {n_classes - 1} "
            f"({bad.size} such rows); correct the labels or the class list"
        )
    return array.astype(np.int64)


def as_scores(scores: ArrayLike, *, n: int, name: str = "scores") -> FloatArray:
    """Finite scores (N,), larger meaning more likely positive; ±inf is allowed, NaN is not."""
    array = np.asarray(scores, dtype=np.float64)
    if array.shape != (n,):
        raise DataError(f"{name} have shape {array.shape}, but there are {n} labels; give one score per label")
    refuse_nan(array, name)
    return array


def refuse_nan(array: FloatArray, name: str) -> None:
    bad = np.flatnonzero(np.isnan(array).reshape(len(array), -1).any(axis=1))
    if bad.size:
        raise DataError(
            f"row {bad[0]}: {name} hold NaN ({bad.size} such rows); drop these films or find why the model failed"
        )


def as_probabilities(probabilities: ArrayLike, *, n: int, name: str = "probabilities") -> FloatArray:
    """Probabilities of the positive class (N,), each in [0, 1]."""
    array = as_scores(probabilities, n=n, name=name)
    refuse_outside_unit(array, name)
    return array


def refuse_outside_unit(array: FloatArray, name: str) -> None:
    outside = ((array < 0) | (array > 1)).reshape(len(array), -1)
    bad = np.flatnonzero(outside.any(axis=1))
    if bad.size:
        value = array.reshape(len(array), -1)[bad[0]][outside[bad[0]]][0]
        raise DataError(
            f"row {bad[0]}: {name} hold {value:g}, outside [0, 1] ({bad.size} such rows); "
            "apply sigmoid or softmax to logits first"
        )


def as_class_probabilities(
    probabilities: ArrayLike, *, n: int, n_classes: int, name: str = "probabilities"
) -> FloatArray:
    """Class probabilities (N, K): each in [0, 1], each row summing to 1."""
    array = np.asarray(probabilities, dtype=np.float64)
    if array.shape != (n, n_classes):
        raise DataError(
            f"{name} have shape {array.shape}; expected ({n}, {n_classes}): one row per label, one column per class"
        )
    refuse_nan(array, name)
    refuse_outside_unit(array, name)
    sums = array.sum(axis=1)
    bad = np.flatnonzero(np.abs(sums - 1) > ROW_SUM_TOLERANCE)
    if bad.size:
        raise DataError(
            f"row {bad[0]}: {name} sum to {sums[bad[0]]:.4g}, not 1 ({bad.size} such rows); "
            "give one column per class, after softmax"
        )
    return array


def as_groups(groups: Sequence[Any] | NDArray[Any] | None, *, n: int) -> IntArray:
    """Cluster numbers 0 … P − 1 (N,) from patient identifiers, in the order of their first film.

    Without identifiers every film is its own patient. Renaming patients changes nothing, in a bootstrap neither.
    """
    if groups is None:
        return np.arange(n, dtype=np.int64)
    array = np.asarray(groups)
    if array.shape != (n,):
        raise DataError(f"groups have shape {array.shape}, but there are {n} labels; give one patient per film")
    named = array.dtype.kind in "iu"  # a whole number cannot be missing
    missing = (
        [] if named else [row for row, item in enumerate(array.tolist()) if item is None or item != item or item == ""]
    )
    if missing:
        raise DataError(
            f"row {missing[0]}: patient identifier is missing ({len(missing)} such rows); "
            "fill it in, or leave the groups out"
        )
    # Identifiers of several types cannot be sorted as they are.
    keys = array.astype(str) if array.dtype == object else array
    _, first, codes = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes].astype(np.int64)


def count_groups(codes: IntArray) -> int:
    """How many different clusters are among these cluster numbers (n,)."""
    # A tenth of the time of np.unique at 10⁶ films.
    return int(np.count_nonzero(np.bincount(codes)))


def sum_by_group(values: FloatArray, codes: IntArray) -> FloatArray:
    """Column sums of `values` (N,) or (N, m) within each cluster: (P,) or (P, m)."""
    if values.ndim == 1:
        return np.bincount(codes, weights=values).astype(np.float64)
    return np.column_stack([np.bincount(codes, weights=column) for column in values.T])
