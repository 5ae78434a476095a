"""Two binary tests on the same films: McNemar and its kin, also when a patient gives several films.

Which is right more often    mcnemar, clustered_mcnemar, paired_difference
Predictive values            relative_predictive_value, predictive_value_test
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from errors import DataError, nearest
from estimates import Estimate, FloatArray, as_groups, as_labels, not_estimable, sum_by_group, two_sided_quantile
from proportions import invert_score_test, proportion_interval


@dataclass(frozen=True)
class McNemar:
    """A test of equal proportions on pairs, from the films where just one of the two tests is positive (or right)."""

    statistic: float
    """Chi-square with 1 df; the smaller discordant count for the exact and mid-p tests."""
    p_value: float
    method: str
    b: int
    """Pairs with only the first positive."""
    c: int
    """Pairs with only the second positive."""
    odds_ratio: float = float("nan")
    """b / c"""
    odds_ratio_ci: tuple[float, float] = (float("nan"), float("nan"))
    """Exact conditional limits."""


MCNEMAR_METHODS = ("exact", "midp", "asymptotic", "corrected")


def mcnemar(b: int, c: int, *, method: str = "exact", level: float = 0.95) -> McNemar:
    """McNemar's test from the discordant counts; p = 1 when there are none.

    `method` is exact (binomial, two-sided), midp (Fagerland 2013), asymptotic (chi-square) or corrected (Edwards'
    continuity correction, R's default).
    """
    if method not in MCNEMAR_METHODS:
        raise DataError(
            f"McNemar {method!r} is not one of {', '.join(MCNEMAR_METHODS)}{nearest(method, MCNEMAR_METHODS)}"
        )
    if min(b, c) < 0:
        raise DataError(f"discordant counts {b} and {c} cannot be negative")
    statistic, p = _mcnemar_p(b, c, method)
    low, high = proportion_interval(b, b + c, level=level, method="clopper_pearson")
    limits = (low / (1 - low) if low < 1 else float("inf"), high / (1 - high) if high < 1 else float("inf"))
    ratio = b / c if c else float("inf") if b else float("nan")
    return McNemar(statistic, p, f"McNemar, {method}", int(b), int(c), ratio, limits)


def _mcnemar_p(b: int, c: int, method: str) -> tuple[float, float]:
    n, smaller = b + c, min(b, c)
    if method in ("exact", "midp"):
        tail = float(stats.binom.cdf(smaller, n, 0.5))
        if method == "midp":
            tail -= float(stats.binom.pmf(smaller, n, 0.5)) / 2
        return float(smaller), min(1.0, 2 * tail)
    if n == 0:
        return 0.0, 1.0
    shift = min(1, abs(b - c)) if method == "corrected" else 0
    chi2 = (abs(b - c) - shift) ** 2 / n
    return chi2, float(stats.chi2.sf(chi2, 1))


CLUSTERED_METHODS = ("obuchowski", "durkalski", "yang", "eliasziw")


def clustered_mcnemar(first: ArrayLike, second: ArrayLike, groups: ArrayLike, *, method: str = "obuchowski") -> McNemar:
    """McNemar's test for patients with several films: chi-square with 1 df.

    `first`, `second` (N,) of 0/1 (positive, or right), `groups` (N,) patients. `method` is obuchowski (1998),
    durkalski (2003, every patient counts the same), yang (2010) or eliasziw (Eliasziw & Donner 1991). p = 1 when no
    pair is discordant; NaN where the variance is 0 or not estimable.
    """
    if method not in CLUSTERED_METHODS:
        raise DataError(
            f"clustered McNemar {method!r} is not one of {', '.join(CLUSTERED_METHODS)}"
            f"{nearest(method, CLUSTERED_METHODS)}"
        )
    x, y = as_labels(first), as_labels(second)
    if len(x) != len(y):
        raise DataError(f"the first test has {len(x)} results, the second {len(y)}; pair them film by film")
    codes = as_groups(np.asarray(groups), n=len(x))
    kinds = [(x & y), x & (1 - y), (1 - x) & y, (1 - x) & (1 - y)]
    cells = sum_by_group(np.column_stack(kinds).astype(np.float64), codes)
    chi2 = _CLUSTERED[method](cells)
    b, c = (int(cells[:, k].sum()) for k in (1, 2))
    if b + c == 0:
        chi2 = 0.0
    return McNemar(chi2, float(stats.chi2.sf(chi2, 1)), f"McNemar clustered by patient, {method}", b, c)


def _divide(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else float("nan")


def _obuchowski(cells: FloatArray) -> float:
    net, clusters = cells[:, 1] - cells[:, 2], len(cells)
    return _divide((clusters - 1) / clusters * net.sum() ** 2, (net**2).sum())


def _durkalski(cells: FloatArray) -> float:
    share = (cells[:, 1] - cells[:, 2]) / cells.sum(axis=1)
    return _divide(share.sum() ** 2, (share**2).sum())


def _yang(cells: FloatArray) -> float:
    # The mean of the variances under the null and around the estimate.
    net, size, clusters = cells[:, 1] - cells[:, 2], cells.sum(axis=1), len(cells)
    around = net - size * net.sum() / size.sum()
    return _divide((clusters - 1) / clusters * net.sum() ** 2, ((net**2).sum() + (around**2).sum()) / 2)


def _eliasziw(cells: FloatArray) -> float:
    """McNemar's chi-square over a design effect from the intra-patient correlation of the four outcomes."""
    size, share, clusters = cells.sum(axis=1), cells.sum(axis=0) / cells.sum(), len(cells)
    discordant = cells[:, 1] + cells[:, 2]
    involved = int((discordant > 0).sum())
    mean_size, mean_discordant = size.mean(), discordant.sum() / max(1, involved)
    if clusters < 2 or involved < 2 or mean_size == 1:
        return _divide((cells[:, 1] - cells[:, 2]).sum() ** 2, discordant.sum())
    typical = mean_size - ((size - mean_size) ** 2).sum() / (clusters * (clusters - 1) * mean_size)
    between = ((cells - size[:, None] * share) ** 2 / size[:, None]).sum() / clusters
    within = (cells * (size[:, None] - cells) / size[:, None]).sum() / (clusters * (mean_size - 1))
    pooled = _divide(between - within, between + (typical - 1) * within)
    correlation = pooled / (pooled + (share[1] + share[2]) * (1 - pooled))
    spread = ((discordant[discordant > 0] - mean_discordant) ** 2).sum()
    typical_discordant = mean_discordant - spread / (involved * (involved - 1) * mean_discordant)
    effective = typical_discordant + involved * (mean_discordant - typical_discordant)
    mcnemar_chi2 = (cells[:, 1] - cells[:, 2]).sum() ** 2 / discordant.sum()
    return _divide(mcnemar_chi2, 1 + (effective - 1) * correlation)


_CLUSTERED = {"obuchowski": _obuchowski, "durkalski": _durkalski, "yang": _yang, "eliasziw": _eliasziw}

PAIRED_INTERVALS = ("tango", "wald", "agresti_min", "bonett_price")


def paired_difference(
    b: float, c: float, n: float, *, level: float = 0.95, method: str = "tango", shrink: bool = False
) -> Estimate:
    """(b − c)/n: first minus second proportion on the same n films, b and c the discordant counts; in [−1, 1].

    `method` is tango (score, 1998), wald, agresti_min (2005, half a film in each cell) or bonett_price (2012, one in
    each discordant cell). The last two lie around the observed difference, as in DTComPair; `shrink` puts them around
    (b − c)/(n + 2), as published. For second minus first exchange b and c. NaN with a reason for no films.
    """
    if method not in PAIRED_INTERVALS:
        raise DataError(
            f"interval {method!r} is not one of {', '.join(PAIRED_INTERVALS)}{nearest(method, PAIRED_INTERVALS)}"
        )
    if n == 0:
        return not_estimable("no films")
    added, grown = {"agresti_min": (0.5, 2.0), "bonett_price": (1.0, 2.0)}.get(method, (0.0, 0.0))
    adjusted = (b - c) / (n + grown)
    centre = adjusted if shrink else (b - c) / n
    se = float(np.sqrt(max(0.0, (b + c + 2 * added) / (n + grown) - adjusted**2) / (n + grown)))
    if method == "tango":
        low, high = _tango(b, c, n, two_sided_quantile(level))
    else:
        half = two_sided_quantile(level) * se
        low, high = centre - half, centre + half
    return Estimate(float((b - c) / n), max(-1.0, float(low)), min(1.0, float(high)), method, se)


def _tango(b: float, c: float, n: float, z: float) -> tuple[float, float]:
    """The differences that Tango's score test does not reject."""

    def excess(difference: float) -> float:
        # Restricted maximum likelihood of the probability that only the second is positive.
        linear = -b - c + (2 * n - b + c) * difference
        root = np.sqrt(max(0.0, linear**2 + 8 * n * c * difference * (1 - difference)))
        only_second = (root - linear) / (4 * n)
        variance = n * (2 * only_second + difference * (1 - difference))
        return float((b - c - n * difference) ** 2 - z**2 * max(0.0, variance))

    return invert_score_test(excess, (b - c) / n)


def relative_predictive_value(
    truth: ArrayLike, first: ArrayLike, second: ArrayLike, *, which: str = "ppv", level: float = 0.95
) -> tuple[Estimate, float]:
    """PPV (or NPV) of the first test over that of the second on the same films, and the p-value of a ratio of 1.

    All arrays (N,) of 0/1. Log interval by the delta method (Moskowitz & Pepe 2006); `standard_error` is that of the
    log. NaN with a reason where a predictive value is undefined or 0.
    """
    outcome, called = _predictive(truth, first, second, which)
    totals = called.sum(axis=0)
    values = (called * outcome[:, None]).sum(axis=0) / np.maximum(totals, 1)
    if not (totals.all() and values.all()):
        return not_estimable(f"a {which} is undefined or 0"), float("nan")
    influence = called * (outcome[:, None] - values) / (totals * values)
    se = float(np.sqrt(((influence[:, 0] - influence[:, 1]) ** 2).sum()))
    ratio = float(values[0] / values[1])
    half = two_sided_quantile(level) * se
    p = float(2 * stats.norm.sf(abs(np.log(ratio)) / se)) if se else 1.0
    limits = float(ratio * np.exp(-half)), float(ratio * np.exp(half))
    return Estimate(ratio, *limits, "log, delta method (Moskowitz & Pepe 2006)", se), p


def predictive_value_test(
    truth: ArrayLike, first: ArrayLike, second: ArrayLike, *, which: str = "ppv", weighted: bool = True
) -> tuple[float, float]:
    """Chi-square (1 df) and p-value of equal PPVs (or NPVs) on the same films, arrays (N,) of 0/1.

    The generalised score test (Leisenring 2000), or its weighted form (Kosinski 2013). NaN where undefined.
    """
    outcome, called = _predictive(truth, first, second, which)
    totals = called.sum(axis=0)
    if not totals.all():
        return float("nan"), float("nan")
    pooled = (called * outcome[:, None]).sum() / totals.sum()
    if weighted:
        values = (called * outcome[:, None]).sum(axis=0) / totals
        shared = (called.all(axis=1) * (outcome - pooled) ** 2).sum() / totals.sum()
        variance = (pooled * (1 - pooled) - 2 * shared) * (1 / totals).sum()
        chi2 = _divide((values[0] - values[1]) ** 2, variance)
    else:
        centred = (called * (np.array([0.0, 1.0]) - totals[1] / totals.sum())).sum(axis=1)
        chi2 = _divide((outcome * centred).sum() ** 2, (((outcome - pooled) * centred) ** 2).sum())
    return chi2, float(stats.chi2.sf(chi2, 1))


def _predictive(truth: ArrayLike, first: ArrayLike, second: ArrayLike, which: str) -> tuple[FloatArray, FloatArray]:
    """Outcome (N,) and calls (N, 2) such that the share of outcomes among calls is the predictive value asked for."""
    if which not in ("ppv", "npv"):
        raise DataError(f"predictive value {which!r} is neither ppv nor npv")
    d, x, y = as_labels(truth), as_labels(first), as_labels(second)
    if not len(d) == len(x) == len(y):
        raise DataError(f"truth and tests have {len(d)}, {len(x)} and {len(y)} films; pair them film by film")
    calls = np.column_stack([x, y])
    return (d, calls) if which == "ppv" else (1 - d, 1 - calls)  # type: ignore[return-value]
