"""Is a classifier fair across subgroups, and is it worth using? Subgroup fairness and decision curves.

Fairness: every metric with its interval in each subgroup (a column of the manifest, or two columns crossed), and the
gaps between subgroups with intervals and tests. A subgroup below a stated size is counted, never judged.
Decision curve: net benefit of treating whom the model calls positive, against treating all and none.

A film is positive when its score >= threshold. Undefined is NaN with a reason, never 0. Reads and writes no files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, stats
from scipy.sparse import csr_matrix, hstack

from auroc import delong_test_independent, patient_weights, percentile_interval, placements
from errors import ConfigError, DataError, examples, nearest
from estimates import (
    FloatArray,
    IntArray,
    UndefinedMetricWarning,
    as_groups,
    as_labels,
    as_probabilities,
    count_groups,
    two_sided_quantile,
)
from metrics import CONFUSION_NAMES, evaluate_predictions
from proportions import adjust_p_values, chi_square_test, difference_of_proportions, fisher_test, proportion

AGE_BANDS = (0.0, 18.0, 40.0, 65.0, 80.0, math.inf)
"""Years; each band holds its lower edge and not its upper one."""

MAX_CATEGORIES = 12
"""A column of numbers with more distinct values than this is cut into quartiles."""

MIN_DENOMINATOR = 5
"""A rate over fewer films than this takes no part in a gap."""


# ------------------------------------------------------------------------------------------------ the subgroups


@dataclass(frozen=True)
class Column:
    """A manifest column as subgroups."""

    name: str
    labels: list[str]
    code: IntArray
    """Index into labels of each film (N,); -1 where the value is missing or outside the bands."""
    banded: bool = False


def _column(name: str, values: Sequence[Any], n: int, bands: Sequence[float] | None, as_is: bool) -> Column:
    """A column read as categories, or in bands where it is an age or has many numbers."""
    if len(values) != n:
        raise DataError(f"subgroup column {name!r} has {len(values)} values for {n} films; give one per film")
    text = ["" if _missing(value) else str(value).strip() for value in values]
    number = None if as_is else _numbers(text)
    if bands is not None and number is None:
        raise DataError(f"subgroup column {name!r} is to be banded but is not numeric, e.g. {_first_text(text)!r}")
    if number is not None and bands is None and len(np.unique(number[~np.isnan(number)])) > MAX_CATEGORIES:
        bands = _quartiles(number)
    if number is not None and bands is not None:
        return _banded(name, number, bands)
    labels = _ordered({value for value in text if value})
    index = {label: i for i, label in enumerate(labels)}
    return Column(name, labels, np.array([index.get(value, -1) for value in text], dtype=np.int64))


def _missing(value: Any) -> bool:
    return value is None or value != value or str(value).strip() == ""


def _numbers(text: Sequence[str]) -> FloatArray | None:
    """The column as floats with NaN for missing values, or None where some value is no number."""
    try:
        return np.array([float(value) if value else math.nan for value in text])
    except ValueError:
        return None


def _first_text(text: Sequence[str]) -> str:
    return next(value for value in text if value and _numbers([value]) is None)


def _ordered(labels: set[str]) -> list[str]:
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)


def _quartiles(number: FloatArray) -> list[float]:
    inner = np.unique(np.nanquantile(number, [0.25, 0.5, 0.75]))
    return [-math.inf, *map(float, inner), math.inf]


def _banded(name: str, number: FloatArray, edges: Sequence[float]) -> Column:
    if list(edges) != sorted(set(edges)) or len(edges) < 2:
        raise ConfigError(f"bands of {name!r} must be at least two rising edges, not {list(edges)}")
    code = np.searchsorted(np.asarray(edges, dtype=float), number, side="right") - 1
    inside = (number >= edges[0]) & (number < edges[-1])
    names = [_band(low, high) for low, high in pairwise(edges)]
    used = np.unique(code[inside])
    labels = [names[i] for i in used]
    return Column(name, labels, np.where(inside, np.searchsorted(used, code), -1).astype(np.int64), banded=True)


def _band(low: float, high: float) -> str:
    """'18-39' for whole edges, '0.5 to <1.5' for others, '80+' and '<18' at the ends."""
    if math.isinf(high):
        return f"{low:g}+"
    if math.isinf(low):
        return f"<{high:g}"
    whole = float(low).is_integer() and float(high).is_integer()
    return f"{low:g}-{high - 1:g}" if whole else f"{low:g} to <{high:g}"


def _crossed(first: Column, second: Column) -> Column:
    pair = np.where((first.code >= 0) & (second.code >= 0), first.code * len(second.labels) + second.code, -1)
    used = np.unique(pair[pair >= 0])
    labels = [f"{first.labels[i // len(second.labels)]} & {second.labels[i % len(second.labels)]}" for i in used]
    code = np.where(pair >= 0, np.searchsorted(used, pair), -1).astype(np.int64)
    return Column(f"{first.name} × {second.name}", labels, code)


def _columns(
    subgroups: Mapping[str, Sequence[Any]],
    n: int,
    age_bands: Sequence[float],
    bands: Mapping[str, Sequence[float] | None],
) -> dict[str, Column]:
    if unknown := [name for name in bands if name not in subgroups]:
        raise ConfigError(f"bands name {unknown[0]!r}, not a subgroup column{nearest(unknown[0], subgroups)}")
    columns = {}
    for name, values in subgroups.items():
        edges = bands[name] if name in bands else age_bands if "age" in name.lower().split("_") else None
        as_is = name in bands and bands[name] is None
        columns[name] = _column(name, list(values), n, edges, as_is)
    return columns


def _intersections(
    columns: Mapping[str, Column], wanted: bool | Sequence[tuple[str, str]]
) -> list[tuple[Column, Column]]:
    pairs = list(combinations(columns, 2)) if wanted is True else [] if wanted is False else list(wanted)
    for name in {name for pair in pairs for name in pair}:
        if name not in columns:
            raise ConfigError(f"intersection names {name!r}, not a subgroup column{nearest(name, columns)}")
    return [(columns[a], columns[b]) for a, b in pairs]


# --------------------------------------------------------------------------------------------------------- gaps


@dataclass(frozen=True)
class Films:
    """What every gap is made of."""

    label: IntArray
    score: FloatArray
    call: IntArray
    patient: IntArray
    level: float

    @property
    def clustered(self) -> bool:
        return int(self.patient.max()) + 1 < len(self.patient)


@dataclass(frozen=True)
class Rates:
    """A mean per subgroup, with the covariance between subgroups (patients may be in several)."""

    names: list[str]
    value: FloatArray
    """(k,)"""
    influence: csr_matrix
    """(patients, k): what each patient adds to each mean's error."""
    null: csr_matrix
    """The same if all subgroups had the pooled mean: what tests of rates rest on, as a rate of 0 or 1 has no spread."""
    scale: float
    """P/(P - 1) where patients are clusters, else 1."""
    counts: IntArray | None = None
    """(k, 2) of yes and no, where the films are independent and the mean is a proportion."""
    left_out: tuple[str, ...] = ()
    binary: bool = False
    """Whether the means are proportions."""

    @property
    def covariance(self) -> FloatArray:
        return np.asarray((self.influence.T @ self.influence).toarray() * self.scale)

    @property
    def null_covariance(self) -> FloatArray:
        return np.asarray((self.null.T @ self.null).toarray() * self.scale)


def _rates(films: Films, column: Column, values: FloatArray, counted: NDArray[np.bool_], binary: bool) -> Rates:
    """Means of `values` over the counted films of each subgroup with enough of them; linearised by patient."""
    index = np.flatnonzero(counted & (column.code >= 0))
    sizes = np.bincount(column.code[index], minlength=len(column.labels))
    kept = np.flatnonzero(sizes >= MIN_DENOMINATOR)
    position = np.full(len(column.labels), -1)
    position[kept] = np.arange(len(kept))
    index = index[position[column.code[index]] >= 0]
    group = position[column.code[index]]
    total = np.bincount(group, weights=values[index], minlength=len(kept))
    mean = total / sizes[kept]
    pooled = values[index].mean() if len(index) else math.nan
    error, null = ((values[index] - centre) / sizes[kept][group] for centre in (mean[group], pooled))
    yes = np.column_stack([total, sizes[kept] - total]).round().astype(np.int64)
    left_out = tuple(name for name, size in zip(column.labels, sizes) if size < MIN_DENOMINATOR)
    counts = yes if binary and not films.clustered else None
    names = [column.labels[i] for i in kept]
    where = (films.patient[index], group)
    rates = _with_influence(films, names, mean, error, null, where, counts, left_out)
    return replace(rates, binary=binary)


def _with_influence(
    films: Films,
    names: list[str],
    value: FloatArray,
    error: FloatArray,
    null: FloatArray,
    where: tuple[IntArray, IntArray],
    counts: IntArray | None,
    left_out: tuple[str, ...],
) -> Rates:
    """Errors of films at (patient, subgroup) `where`, summed by patient."""
    shape = (int(films.patient.max()) + 1, len(names))
    matrix, at_null = (csr_matrix((part, where), shape=shape) for part in (error, null))
    clusters = count_groups(where[0])
    scale = clusters / (clusters - 1) if films.clustered and clusters > 1 else 1.0
    return Rates(names, value, matrix, at_null, scale, counts, left_out)


def _auc_rates(films: Films, column: Column) -> Rates:
    """AUROC per subgroup with both classes, with DeLong's placements as influences."""
    names: list[str] = []
    values: list[float] = []
    parts: list[tuple[IntArray, FloatArray, int]] = []
    left_out: list[str] = []
    for k, name in enumerate(column.labels):
        index = np.flatnonzero(column.code == k)
        label = films.label[index]
        sizes = np.bincount(label, minlength=2)
        if sizes.min() < MIN_DENOMINATOR:
            left_out.append(name)
            continue
        placed = placements(label, films.score[index])
        area = placed[label == 1].mean()
        # DeLong divides by n(n - 1) within each class; between patients the factor is P/(P - 1) for all.
        divisor = sizes if films.clustered else np.sqrt(sizes * (sizes - 1.0))
        parts.append((index, (placed - area) / divisor[label], len(names)))
        names.append(name)
        values.append(float(area))
    patient = np.concatenate([films.patient[index] for index, _, _ in parts]) if parts else np.empty(0, dtype=np.int64)
    error = np.concatenate([error for _, error, _ in parts]) if parts else np.empty(0)
    group = np.concatenate([np.full(len(error), k) for _, error, k in parts]) if parts else np.empty(0, dtype=np.int64)
    return _with_influence(films, names, np.array(values), error, error, (patient, group), None, tuple(left_out))


def _gap(rates: Rates, *, measure: str, level: float, ratio: bool = True) -> dict[str, Any]:
    """Highest minus lowest subgroup with its interval, lowest over highest, and a test that all are equal."""
    if len(rates.names) < 2:
        reason = f"fewer than two subgroups have {MIN_DENOMINATOR} films to count"
        empty = dict.fromkeys(("difference", "ci_low", "ci_high", "statistic", "p_value"), math.nan)
        return {"measure": measure, **empty, "left_out": list(rates.left_out), "reason": reason}
    high, low = int(rates.value.argmax()), int(rates.value.argmin())
    if high == low:
        high, low = 0, 1
    cov = rates.covariance
    difference = float(rates.value[high] - rates.value[low])
    gap: dict[str, Any] = {"measure": measure, "by_group": dict(zip(rates.names, map(float, rates.value)))}
    gap |= {"highest": rates.names[high], "lowest": rates.names[low], "difference": difference}
    gap |= _gap_interval(rates, high, low, level=level)
    if ratio:
        gap |= _ratio(rates.value, cov, high, low, level)
    gap |= _equality_test(rates)
    if len(rates.names) > 2:
        gap["note"] = "the interval is that of the two subgroups named, chosen as the extremes after the fact"
    return gap | {"left_out": list(rates.left_out)}


def _gap_interval(rates: Rates, high: int, low: int, *, level: float) -> dict[str, Any]:
    """Wald's; Newcombe's, its films counted as patients, where a rate is 0 or 1 and so shows no spread of its own."""
    if rates.binary and {float(rates.value[high]), float(rates.value[low])} & {0.0, 1.0}:
        size = rates.influence.getnnz(axis=0)
        gap = difference_of_proportions(
            rates.value[high] * size[high], size[high], rates.value[low] * size[low], size[low], level=level
        )
        return {"ci_low": gap.ci_low, "ci_high": gap.ci_high, "interval": "newcombe"}
    cov = rates.covariance
    half = two_sided_quantile(level) * math.sqrt(max(cov[high, high] + cov[low, low] - 2 * cov[high, low], 0.0))
    difference = float(rates.value[high] - rates.value[low])
    return {"ci_low": difference - half, "ci_high": difference + half, "interval": "wald"}


def _ratio(value: FloatArray, cov: FloatArray, high: int, low: int, level: float) -> dict[str, Any]:
    """Lowest over highest in [0, 1], its interval on the log scale; NaN interval where the lowest is 0."""
    if value[high] == 0:
        return {"ratio": math.nan, "ratio_ci_low": math.nan, "ratio_ci_high": math.nan, "reason": "both rates are 0"}
    ratio = float(value[low] / value[high])
    if ratio == 0:
        why = "the lowest rate is 0: no interval on the log scale"
        return {"ratio": 0.0, "ratio_ci_low": math.nan, "ratio_ci_high": math.nan, "reason": why}
    gradient = np.zeros(len(value))
    gradient[low], gradient[high] = 1 / value[low], -1 / value[high]
    half = two_sided_quantile(level) * math.sqrt(max(float(gradient @ cov @ gradient), 0.0))
    return {"ratio": ratio, "ratio_ci_low": ratio * math.exp(-half), "ratio_ci_high": ratio * math.exp(half)}


def _equality_test(rates: Rates) -> dict[str, Any]:
    """Pearson's chi-square (Fisher's test for two sparse subgroups) of independent films, else robust by patient."""
    if rates.counts is None:
        contrast = _contrast(len(rates.names))
        return _chi_square_of(contrast @ rates.value, contrast @ rates.null_covariance @ contrast.T)
    freedom = len(rates.names) - 1
    expected = np.outer(rates.counts.sum(axis=1), rates.counts.sum(axis=0)) / rates.counts.sum()
    if (expected.sum(axis=0) == 0).any():
        return {"statistic": 0.0, "df": freedom, "p_value": 1.0, "test": "none: every subgroup has the same rate"}
    statistic, p_value = chi_square_test(rates.counts)
    result = {"statistic": statistic, "df": freedom, "p_value": p_value, "test": "Pearson chi-square"}
    if freedom == 1 and expected.min() < 5:
        result |= {"p_value": fisher_test(rates.counts), "test": "Fisher exact (chi-square statistic)"}
    return result


def _contrast(k: int) -> FloatArray:
    """(k - 1, k): each of k values less the first."""
    return np.eye(k)[1:] - np.eye(k)[:1]


def _chi_square_of(difference: FloatArray, spread: FloatArray) -> dict[str, Any]:
    """Chi-square that all differences (d,) with covariance (d, d) are 0; NaN where that is singular.

    With the covariance under equality it is the generalised score test (Boos 1992, Am Stat 46:327), else Wald's.
    """
    freedom = len(difference)
    result: dict[str, Any] = {"statistic": math.nan, "df": freedom, "p_value": math.nan, "test": "robust chi-square"}
    if np.linalg.eigvalsh(spread).min() <= 1e-15:
        return result | {"reason": "a subgroup shows no variance, so equality cannot be tested"}
    statistic = float(difference @ np.linalg.solve(spread, difference))
    return result | {"statistic": statistic, "p_value": float(stats.chi2.sf(statistic, freedom))}


def _equalized_odds(sensitivity: Rates, false_positive: Rates, *, level: float) -> dict[str, Any]:
    """Worst and mean of the sensitivity and false-positive gaps, and the smaller ratio (Hardt, Price & Srebro 2016).

    The worst one has the interval of the gap that is worst. The test is joint: both rates equal in all subgroups.
    """
    shared = [name for name in sensitivity.names if name in false_positive.names]
    parts = [_gap(rates, measure="", level=level) for rates in (sensitivity, false_positive)]
    measure = "sensitivity and false positive rate"
    if len(shared) < 2 or any(len(rates.names) < 2 for rates in (sensitivity, false_positive)):
        lacking = "sensitivity" if len(sensitivity.names) < 2 else "false positive rate"
        undefined = ("difference", "ci_low", "ci_high", "mean_difference", "statistic", "p_value")
        return dict.fromkeys(undefined, math.nan) | {
            "measure": measure,
            "reason": f"fewer than two subgroups have a {lacking} to compare",
            "left_out": sorted(set(sensitivity.left_out) | set(false_positive.left_out)),
        }
    worst = max(parts, key=lambda part: part["difference"])
    cov = _joint_covariance(sensitivity.influence, false_positive.influence, sensitivity.scale)
    k = len(sensitivity.names)
    weight = np.zeros(cov.shape[0])
    for part, names, start in ((parts[0], sensitivity.names, 0), (parts[1], false_positive.names, k)):
        weight[start + names.index(part["highest"])] += 0.5
        weight[start + names.index(part["lowest"])] -= 0.5
    mean = (parts[0]["difference"] + parts[1]["difference"]) / 2
    half = two_sided_quantile(level) * math.sqrt(max(float(weight @ cov @ weight), 0.0))
    chosen = {name: worst[name] for name in ("difference", "ci_low", "ci_high", "highest", "lowest")}
    ratios = [part["ratio"] for part in parts]
    return (
        {"measure": measure, **chosen, "mean_difference": mean, "mean_ci_low": mean - half, "mean_ci_high": mean + half}
        | {"ratio": math.nan if any(map(math.isnan, ratios)) else min(ratios)}
        | _joint_test(parts, (sensitivity, false_positive))
        | {"left_out": sorted(set(sensitivity.left_out) | set(false_positive.left_out))}
    )


def _joint_covariance(first: csr_matrix, second: csr_matrix, scale: float) -> FloatArray:
    both = hstack([first, second]).tocsr()
    return np.asarray((both.T @ both).toarray() * scale)


def _joint_test(parts: Sequence[dict[str, Any]], rates: tuple[Rates, Rates]) -> dict[str, Any]:
    """Positive and negative films are different films: unclustered, the two chi-squares add up."""
    if all(rate.counts is not None for rate in rates):
        statistic, freedom = sum(part["statistic"] for part in parts), sum(part["df"] for part in parts)
        p_value = float(stats.chi2.sf(statistic, freedom))
        return {"statistic": statistic, "df": freedom, "p_value": p_value, "test": "sum of two Pearson chi-squares"}
    contrast = linalg.block_diag(*(_contrast(len(rate.names)) for rate in rates))
    cov = _joint_covariance(rates[0].null, rates[1].null, rates[0].scale)
    value = np.concatenate([rate.value for rate in rates])
    return _chi_square_of(contrast @ value, contrast @ cov @ contrast.T)


def _auc_gap(films: Films, column: Column, *, level: float) -> dict[str, Any]:
    """AUROC gap; between two subgroups of independent films by the unpaired DeLong test (t of Welch, as pROC)."""
    rates = _auc_rates(films, column)
    gap = _gap(rates, measure="AUROC", level=level, ratio=False)
    if films.clustered or len(rates.names) != 2:
        return gap
    chosen = [column.code == column.labels.index(gap[end]) for end in ("highest", "lowest")]
    sides = [(films.label[of], films.score[of]) for of in chosen]
    test = delong_test_independent(*sides[0], *sides[1], level=level)
    names = {"statistic": test.statistic, "df": test.df, "p_value": test.p_value, "test": test.method}
    return gap | names | {"ci_low": test.ci_low, "ci_high": test.ci_high}


def _gaps(films: Films, column: Column) -> dict[str, dict[str, Any]]:
    """Every gap between the subgroups of a column."""
    everyone = np.ones(len(films.label), dtype=bool)
    call, label = films.call.astype(float), films.label.astype(float)
    rates = {
        "equal_opportunity": _rates(films, column, call, films.label == 1, True),
        "false_positive_rate": _rates(films, column, call, films.label == 0, True),
        "demographic_parity": _rates(films, column, call, everyone, True),
        "predictive_parity": _rates(films, column, label, films.call == 1, True),
    }
    measures = {
        "equal_opportunity": "sensitivity",
        "false_positive_rate": "false positive rate",
        "demographic_parity": "share called positive",
        "predictive_parity": "precision (PPV)",
    }
    gaps = {name: _gap(rates[name], measure=measures[name], level=films.level) for name in rates}
    gaps["equalized_odds"] = _equalized_odds(
        rates["equal_opportunity"], rates["false_positive_rate"], level=films.level
    )
    gaps["auc"] = _auc_gap(films, column, level=films.level)
    calibration = _rates(films, column, label - films.score, everyone, False)
    measure = "calibration in the large: observed share less mean probability"
    gaps["calibration"] = _gap(calibration, measure=measure, level=films.level, ratio=False)
    return gaps


# ---------------------------------------------------------------------------------------------------- fairness


def subgroup_fairness(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    subgroups: Mapping[str, Sequence[Any]],
    threshold: float = 0.5,
    predictions: ArrayLike | None = None,
    classes: Sequence[str] = ("negative", "positive"),
    groups: Sequence[Any] | NDArray[Any] | None = None,
    min_n: int = 20,
    age_bands: Sequence[float] = AGE_BANDS,
    bands: Mapping[str, Sequence[float] | None] | None = None,
    intersections: bool | Sequence[tuple[str, str]] = True,
    level: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
    proportion_interval: str = "wilson",
) -> dict[str, Any]:
    """Metrics within subgroups and the gaps between them, JSON-ready.

    `labels` (N,) of 0/1, `probabilities` (N,) of the positive class (the second of `classes`); a film is called
    positive at probability >= `threshold`, or as `predictions` (N,) of 0/1 say. `subgroups` maps a column name to N
    values; missing ones (None, NaN, "") are counted and said. Ages (a column named age) fall into `age_bands`, other
    columns of many numbers into quartiles, or into the edges `bands` gives (None: take its values as they are).
    `intersections` crosses all pairs of columns, the pairs listed, or none. `groups` (N,) are patients: intervals and
    tests are then clustered by patient.

    Gaps are highest minus lowest subgroup, in [0, 1]: equal_opportunity (sensitivity), false_positive_rate,
    equalized_odds (worst, mean, ratio), demographic_parity (share called positive), predictive_parity (PPV), auc,
    calibration (observed share less mean probability); `p_adjusted` is Holm's over every test made here. Subgroups
    below `min_n` films are described and left out of the gaps: too few to say. NaN with a reason where fewer than two
    subgroups can be compared. Hardt, Price & Srebro 2016; DeLong 1988; Holm 1979; definitions as in fairlearn.
    """
    y = as_labels(labels)
    p = as_probabilities(probabilities, n=len(y))
    if not subgroups:
        raise DataError("no subgroup columns; name at least one column of the manifest, such as sex, age, view or site")
    if len(classes) != 2:
        raise ConfigError(f"fairness speaks of two classes, not {len(classes)}; compare one class against the rest")
    call = (p >= threshold).astype(np.int64) if predictions is None else as_labels(predictions)
    if len(call) != len(y):
        raise DataError(f"{len(call)} predictions for {len(y)} labels; give one per film")
    films = Films(y, p, call, as_groups(groups, n=len(y)), level)
    options = {"level": level, "n_boot": n_boot, "seed": seed, "proportion_interval": proportion_interval}
    measure = _Measure(films, list(classes), None if predictions is not None else threshold, min_n, options)
    columns = _columns(subgroups, len(y), age_bands, bands or {})
    crossed = [_crossed(a, b) for a, b in _intersections(columns, intersections)]
    report: dict[str, Any] = {
        "n": len(y),
        "n_patients": int(films.patient.max()) + 1,
        "positive_class": classes[1],
        "threshold": measure.threshold,
        "level": level,
        "min_n": min_n,
        "columns": {column.name: measure.column(column) for column in columns.values()},
        "intersections": {column.name: measure.column(column) for column in crossed},
    }
    return report | {"adjustment": "holm", "tests": _adjust(report)}


@dataclass(frozen=True)
class _Measure:
    """How a column is measured."""

    films: Films
    classes: list[str]
    threshold: float | None
    """None where the predictions were given."""
    min_n: int
    options: dict[str, Any]

    def column(self, column: Column) -> dict[str, Any]:
        missing = column.code < 0
        described = {label: self.group(column.code == k) for k, label in enumerate(column.labels)}
        enough = [k for k, label in enumerate(column.labels) if "metrics" in described[label]]
        # One place more than labels: code -1 (missing) looks up the last one and stays -1.
        renumber = np.full(len(column.labels) + 1, -1)
        renumber[enough] = np.arange(len(enough))
        judged = Column(column.name, [column.labels[k] for k in enough], renumber[column.code].astype(np.int64))
        too_few = [label for label in column.labels if "metrics" not in described[label]]
        return {
            "banded": column.banded,
            "missing": {"n": int(missing.sum()), "share": float(missing.mean())},
            "groups": described,
            "too_few": too_few,
            "gaps": _gaps(self.films, judged),
        }

    def group(self, chosen: NDArray[np.bool_]) -> dict[str, Any]:
        """Size, prevalence and every metric of one subgroup; below min_n only the size and prevalence."""
        y, p = self.films.label[chosen], self.films.score[chosen]
        patients = self.films.patient[chosen]
        positives = int(y.sum())
        row: dict[str, Any] = {"n": len(y), "n_patients": count_groups(patients), "n_positive": positives}
        row["prevalence"] = proportion(positives, len(y), level=self.options["level"]).as_report()
        if len(y) < self.min_n:
            return row | {"reason": f"too few to say: {len(y)} films, below {self.min_n}"}
        report = self._evaluate(y, p, patients, 0.5 if self.threshold is None else self.threshold)
        if self.threshold is None:
            hard = self._evaluate(y, self.films.call[chosen].astype(float), patients, 0.5)
            report["metrics"] |= {name: hard["metrics"][name] for name in CONFUSION_NAMES}
            report["confusion_matrix"] = hard["confusion_matrix"]
        return row | {"metrics": report["metrics"], "confusion_matrix": report["confusion_matrix"]}

    def _evaluate(self, y: IntArray, p: FloatArray, patients: IntArray, threshold: float) -> dict[str, Any]:
        with warnings.catch_warnings():
            # The report says of each undefined metric why it is.
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            return evaluate_predictions(
                y,
                np.column_stack([1 - p, p]),
                classes=self.classes,
                positive_class=self.classes[1],
                threshold=threshold,
                groups=patients,
                **self.options,
            )


def _adjust(report: Mapping[str, Any]) -> int:
    """Write Holm's adjusted p-value beside each p-value; the number of tests."""
    sections = [*report["columns"].values(), *report["intersections"].values()]
    gaps = [gap for section in sections for gap in section["gaps"].values()]
    for gap, adjusted in zip(gaps, adjust_p_values([gap["p_value"] for gap in gaps])):
        gap["p_adjusted"] = adjusted
    return sum(not math.isnan(gap["p_value"]) for gap in gaps)


# ----------------------------------------------------------------------------------------------- decision curve


def decision_curve(
    labels: ArrayLike,
    scores: ArrayLike,
    thresholds: ArrayLike,
    *,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    prevalence: float | None = None,
    harm: float = 0.0,
) -> dict[str, Any]:
    """Net benefit of treating films with score >= threshold, against treating all and none.

    `labels` (N,) of 0/1, `scores` (N,) in [0, 1], `thresholds` (T,) in [0, 1): the probability at which treating and
    not treating are worth the same. Net benefit = TP/N - FP/N·t/(1 - t) - `harm`, at most the prevalence; with
    `prevalence` (of a population a case-control sample does not show) TP/N = sensitivity·prevalence and so on. Net
    interventions avoided = (model - treat all)·(1 - t)/t per film, NaN at t = 0. Percentile intervals over `n_boot`
    resamples of patients (`groups`), none with n_boot=0. Vickers & Elkin 2006, Med Decis Making 26:565; Vickers et
    al. 2008, BMC Med Inform Decis Mak 8:53 (as dcurves).
    """
    y = as_labels(labels)
    p = as_probabilities(scores, n=len(y), name="scores")
    t = np.atleast_1d(np.asarray(thresholds, dtype=float))
    if t.size == 0 or not ((t >= 0) & (t < 1)).all():
        raise ConfigError(f"thresholds must lie in [0, 1), found {examples(t[~((t >= 0) & (t < 1))]) or 'none'}")
    if prevalence is not None and not 0 < prevalence < 1:
        raise ConfigError(f"prevalence {prevalence!r} is not between 0 and 1")
    if prevalence is not None and y.min() == y.max():
        raise DataError("a stated prevalence needs films of both classes; leave it out or add films")
    patient = as_groups(groups, n=len(y))
    order = np.argsort(t, kind="stable")
    tally = _threshold_tally(y, p, patient, t[order])
    curve = _Curve(t[order], prevalence, harm)
    exact = curve(tally @ np.ones((tally.shape[1], 1)))
    draws = _resampled_curves(curve, tally, n_boot=n_boot, seed=seed)
    back = np.argsort(order, kind="stable")
    report: dict[str, Any] = {
        "thresholds": t.tolist(),
        "n": len(y),
        "n_patients": int(patient.max()) + 1,
        "prevalence": float(y.mean()) if prevalence is None else prevalence,
        "harm": harm,
        "level": level,
        "n_boot": n_boot,
    }
    for name, value in exact.items():
        report[name] = _band_of(value[:, 0][back], None if draws is None else draws[name][back], level)
    report["treat_none"] = {"value": [0.0] * len(t)}
    if n_boot == 0:
        report["reason"] = "no intervals: n_boot is 0"
    elif (t == 0).any():
        report["reason"] = "nothing can be avoided at threshold 0, where everybody is treated"
    return report


def _threshold_tally(labels: IntArray, scores: FloatArray, patient: IntArray, thresholds: FloatArray) -> csr_matrix:
    """(2·(T + 1), P): films of each patient by class and by how many of the rising thresholds they reach."""
    reached = np.searchsorted(thresholds, scores, side="right")
    cells = labels * (len(thresholds) + 1) + reached
    shape = (2 * (len(thresholds) + 1), int(patient.max()) + 1)
    return csr_matrix((np.ones(len(labels)), (cells, patient)), shape=shape)


@dataclass(frozen=True)
class _Curve:
    """From sums of `_threshold_tally` (cells, b) to curves (T, b)."""

    thresholds: FloatArray
    prevalence: float | None
    harm: float

    def __call__(self, cells: FloatArray) -> dict[str, FloatArray]:
        half = len(self.thresholds) + 1
        negatives, positives = cells[:half], cells[half:]
        # Films that reach threshold i are those in cells i + 1 and above.
        true_positive = positives[::-1].cumsum(axis=0)[::-1][1:]
        false_positive = negatives[::-1].cumsum(axis=0)[::-1][1:]
        odds = (self.thresholds / (1 - self.thresholds))[:, None]
        n_pos, n_neg = positives.sum(axis=0), negatives.sum(axis=0)
        share, rest, per_pos, per_neg = self._weights(n_pos, n_neg)
        model = true_positive * per_pos - false_positive * per_neg * odds - self.harm
        treat_all = share - rest * odds
        avoided = np.divide(model - treat_all, odds, out=np.full_like(model, np.nan), where=odds > 0)
        best = np.maximum(treat_all, 0.0)
        return {
            "net_benefit": model,
            "treat_all": treat_all,
            "net_interventions_avoided": avoided,
            "gain_over_best_default": model - best,
        }

    def _weights(self, n_pos: FloatArray, n_neg: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Shares of positives and negatives, and what one positive and one negative film weigh."""
        if self.prevalence is None:
            total = n_pos + n_neg
            return n_pos / total, n_neg / total, 1 / total, 1 / total
        share, rest = np.full_like(n_pos, self.prevalence), np.full_like(n_pos, 1 - self.prevalence)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A resample without a class becomes NaN and is left out of the interval.
            return share, rest, np.where(n_pos > 0, share / n_pos, np.nan), np.where(n_neg > 0, rest / n_neg, np.nan)


def _resampled_curves(curve: _Curve, tally: csr_matrix, *, n_boot: int, seed: int) -> dict[str, FloatArray] | None:
    if n_boot == 0:
        return None
    patients = tally.shape[1]
    chunk = int(np.clip(10_000_000 // patients, 1, 200))
    rng = np.random.default_rng(seed)
    blocks = [curve(tally @ weights) for weights in patient_weights(patients, n_boot=n_boot, rng=rng, chunk=chunk)]
    return {name: np.concatenate([block[name] for block in blocks], axis=1) for name in blocks[0]}


def _band_of(value: FloatArray, draws: FloatArray | None, level: float) -> dict[str, list[float]]:
    if draws is None:
        return {"value": value.tolist()}
    limits = [percentile_interval(row, level=level) for row in draws]
    return {"value": value.tolist(), "ci_low": [low for low, _ in limits], "ci_high": [high for _, high in limits]}
