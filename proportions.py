"""Proportions: one of them, two independent ones, the 2×2 diagnostic table, and many p-values at once.

One proportion          proportion_interval, proportion, clustered_proportion
Two independent ones    difference_of_proportions, chi_square_test, fisher_test
2×2 diagnostic table    diagnostic_table, predictive_values
Several tests           adjust_p_values
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from errors import DataError, nearest
from estimates import Estimate, as_groups, not_estimable, sum_by_group, two_sided_quantile

_STATSMODELS_NAMES = {"wilson": "wilson", "clopper_pearson": "beta", "jeffreys": "jeffreys"}
PROPORTION_INTERVALS = ("wilson", "wilson_cc", "clopper_pearson", "agresti_coull", "jeffreys", "wald")


def proportion_interval(
    count: float, n: float, *, level: float = 0.95, method: str = "wilson", clip: bool = False
) -> tuple[float, float]:
    """Confidence limits of count/n; (NaN, NaN) for n = 0. `count` and `n` may be fractional (effective sizes).

    `method` is wilson (Wilson 1927), wilson_cc (Newcombe 1998, with continuity correction), clopper_pearson
    (exact), agresti_coull, jeffreys (equal-tailed, no rule at 0 and n) or wald. Agresti-Coull and Wald may pass
    0 or 1: `clip` cuts them there.
    """
    if method not in PROPORTION_INTERVALS:
        known = ", ".join(PROPORTION_INTERVALS)
        raise DataError(f"interval {method!r} is not one of {known}{nearest(method, PROPORTION_INTERVALS)}")
    if not 0 <= count <= n:
        raise DataError(f"{count:g} of {n:g} is no proportion; the count lies between 0 and the number tried")
    if n == 0:
        return float("nan"), float("nan")
    low, high = _limits(count, n, level=level, method=method)
    return (max(0.0, low), min(1.0, high)) if clip else (low, high)


def _limits(count: float, n: float, *, level: float, method: str) -> tuple[float, float]:
    z = two_sided_quantile(level)
    if method in _STATSMODELS_NAMES:
        low, high = proportion_confint(count, n, alpha=1 - level, method=_STATSMODELS_NAMES[method])
        # Rounding takes Wilson's limit to 1 − 1e-16 where every film counts.
        ends = method == "wilson"
        return 0.0 if ends and count == 0 else float(low), 1.0 if ends and count == n else float(high)
    if method == "wilson_cc":
        return _wilson_cc(count, n, z)
    # statsmodels clips Agresti-Coull and Wald to [0, 1]; R does not.
    size = n + z**2 if method == "agresti_coull" else n
    centre = (count + z**2 / 2) / size if method == "agresti_coull" else count / n
    half = z * np.sqrt(centre * (1 - centre) / size)
    return float(centre - half), float(centre + half)


def _wilson_cc(count: float, n: float, z: float) -> tuple[float, float]:
    # As R's prop.test: the correction shrinks to |count − n/2| near one half.
    shift = min(0.5, abs(count - n / 2))

    def bound(sign: int) -> float:
        p = (count + sign * shift) / n
        centre = p + z**2 / (2 * n)
        half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return float((centre + sign * half) / (1 + z**2 / n))

    low = 0.0 if count == 0 else max(0.0, bound(-1))
    return low, 1.0 if count == n else min(1.0, bound(+1))


def proportion(count: float, n: float, *, level: float = 0.95, method: str = "wilson") -> Estimate:
    """count/n in [0, 1] with the interval named `method`; NaN with a reason for n = 0."""
    if n == 0:
        return not_estimable("nothing to count: the denominator is 0")
    low, high = proportion_interval(count, n, level=level, method=method, clip=True)
    value = count / n
    return Estimate(value, low, high, method, float(np.sqrt(value * (1 - value) / n)))


def clustered_proportion(
    successes: ArrayLike, groups: ArrayLike, *, level: float = 0.95, method: str = "wald"
) -> Estimate:
    """A proportion (N,) of 0/1 over films whose patients (N,) give several: cluster-robust standard error.

    The linearised ratio estimator with factor P/(P − 1), as survey::svymean(ids = ~patient). `method` wald gives
    value ± z·SE within [0, 1]; any other name gives that interval on the effective sample size p(1 − p)/SE², which
    is the number of patients where the SE is 0. NaN with a reason for no films or one patient.
    """
    values = np.asarray(successes, dtype=np.float64)
    if values.size == 0:
        return not_estimable("nothing to count: the denominator is 0")
    codes = as_groups(np.asarray(groups), n=len(values))
    clusters = int(codes.max()) + 1
    p = float(values.mean())
    if clusters < 2:
        return not_estimable("one patient only: no variance between patients", value=p)
    residuals = sum_by_group(values - p, codes)
    se = float(np.sqrt(clusters / (clusters - 1) * (residuals**2).sum()) / len(values))
    return design_effect_interval(p, se, clusters=clusters, level=level, method=method)


def design_effect_interval(p: float, se: float, *, clusters: int, level: float, method: str) -> Estimate:
    """Interval of a proportion from its cluster-robust SE: Wald, or a named one on the effective sample size."""
    if method == "wald":
        half = two_sided_quantile(level) * se
        return Estimate(p, max(0.0, p - half), min(1.0, p + half), "wald, clustered by patient (ratio estimator)", se)
    size = p * (1 - p) / se**2 if se > 0 else float(clusters)
    low, high = proportion_interval(p * size, size, level=level, method=method, clip=True)
    return Estimate(p, low, high, f"{method} on the effective sample size, clustered by patient", se)


DIFFERENCE_INTERVALS = ("newcombe", "miettinen_nurminen", "mee", "wald", "agresti_caffo")


def difference_of_proportions(
    count1: float, n1: float, count2: float, n2: float, *, level: float = 0.95, method: str = "newcombe"
) -> Estimate:
    """count1/n1 − count2/n2 of two independent samples, in [−1, 1]; NaN with a reason where a sample is empty.

    `method` is newcombe (hybrid Wilson score, method 10 of Newcombe 1998), miettinen_nurminen (score, 1985), mee
    (the same without the factor N/(N − 1)), wald or agresti_caffo.
    """
    if method not in DIFFERENCE_INTERVALS:
        known = ", ".join(DIFFERENCE_INTERVALS)
        raise DataError(f"interval {method!r} is not one of {known}{nearest(method, DIFFERENCE_INTERVALS)}")
    if n1 == 0 or n2 == 0:
        return not_estimable("one of the two samples is empty")
    p1, p2 = count1 / n1, count2 / n2
    se = float(np.sqrt(p1 * (1 - p1) / n1 + p2 * (1 - p2) / n2))
    if method in ("miettinen_nurminen", "mee"):
        low, high = _score_limits(p1, n1, p2, n2, level=level, unbiased=method == "miettinen_nurminen")
    elif method == "wald":
        half = two_sided_quantile(level) * se
        low, high = p1 - p2 - half, p1 - p2 + half
    else:
        name = {"newcombe": "newcomb", "agresti_caffo": "agresti-caffo"}[method]
        low, high = confint_proportions_2indep(count1, n1, count2, n2, method=name, compare="diff", alpha=1 - level)
    return Estimate(p1 - p2, max(-1.0, float(low)), min(1.0, float(high)), method, se)


def _score_limits(p1: float, n1: float, p2: float, n2: float, *, level: float, unbiased: bool) -> tuple[float, float]:
    """Differences that a score test does not reject. By hand: statsmodels 0.15 fails or errs on small tables."""
    z = two_sided_quantile(level)
    factor = (n1 + n2) / (n1 + n2 - 1) if unbiased else 1.0
    observed = p1 - p2

    def excess(difference: float) -> float:
        q1, q2 = _restricted_proportions(p1, n1, p2, n2, difference)
        variance = (q1 * (1 - q1) / n1 + q2 * (1 - q2) / n2) * factor
        return (observed - difference) ** 2 - z**2 * variance

    return invert_score_test(excess, observed)


def invert_score_test(excess: Callable[[float], float], observed: float) -> tuple[float, float]:
    """The differences around `observed` in [−1, 1] where `excess` is not above 0, by root-finding to either side."""
    # At the observed difference itself the variance can be 0, which would pass for a root.
    edge, step = 1 - 1e-12, 1e-9
    low, high = -1.0, 1.0
    if observed - step > -edge and excess(-edge) > 0:
        low = float(optimize.brentq(excess, -edge, observed - step, xtol=1e-13))
    if observed + step < edge and excess(edge) > 0:
        high = float(optimize.brentq(excess, observed + step, edge, xtol=1e-13))
    return low, high


def _restricted_proportions(p1: float, n1: float, p2: float, n2: float, difference: float) -> tuple[float, float]:
    """Maximum-likelihood proportions whose difference is fixed: a cubic in closed form (Farrington & Manning 1990)."""
    ratio = n2 / n1
    a = 1 + ratio
    b = -(1 + ratio + p1 + ratio * p2 + difference * (ratio + 2))
    c = difference**2 + difference * (2 * p1 + ratio + 1) + p1 + ratio * p2
    d = -p1 * difference * (1 + difference)
    v = b**3 / (27 * a**3) - b * c / (6 * a**2) + d / (2 * a)
    u = np.copysign(np.sqrt(max(0.0, b**2 / (9 * a**2) - c / (3 * a))), v)
    angle = (np.pi + np.arccos(np.clip(v / u**3, -1, 1))) / 3 if u else np.pi / 3
    q1 = float(np.clip(2 * u * np.cos(angle) - b / (3 * a), 0, 1))
    return q1, float(np.clip(q1 - difference, 0, 1))


def diagnostic_table(
    tp: float, fp: float, fn: float, tn: float, *, level: float = 0.95, method: str = "wilson"
) -> dict[str, Estimate]:
    """Everything a 2×2 table says: sensitivity, specificity, ppv, npv, accuracy, prevalence, apparent_prevalence with
    the interval named `method`; likelihood ratios with Simel's log interval (1991), the diagnostic odds ratio with
    Woolf's, the Youden index with the square-and-add one (Newcombe). NaN with a reason where a denominator is 0.
    """
    diseased, healthy, positive, negative = tp + fn, fp + tn, tp + fp, fn + tn
    counts = {
        "sensitivity": (tp, diseased),
        "specificity": (tn, healthy),
        "ppv": (tp, positive),
        "npv": (tn, negative),
        "accuracy": (tp + tn, diseased + healthy),
        "prevalence": (diseased, diseased + healthy),
        "apparent_prevalence": (positive, diseased + healthy),
    }
    table = {name: proportion(count, n, level=level, method=method) for name, (count, n) in counts.items()}
    ratios = {
        "lr_positive": _ratio_of_proportions(tp, diseased, fp, healthy, level),
        "lr_negative": _ratio_of_proportions(fn, diseased, tn, healthy, level),
        "diagnostic_odds_ratio": _odds_ratio(tp, fp, fn, tn, level),
    }
    return {**table, **ratios, "youden": _youden(table["sensitivity"], table["specificity"])}


def _log_interval(value: float, log_variance: float, level: float, method: str) -> Estimate:
    half = two_sided_quantile(level) * np.sqrt(log_variance)
    return Estimate(
        value, float(value * np.exp(-half)), float(value * np.exp(half)), method, float(np.sqrt(log_variance))
    )


def _ratio_of_proportions(count1: float, n1: float, count2: float, n2: float, level: float) -> Estimate:
    if not (count1 and count2 and n1 and n2):
        return not_estimable("a cell of the 2×2 table is 0")
    variance = 1 / count1 - 1 / n1 + 1 / count2 - 1 / n2
    return _log_interval(count1 / n1 / (count2 / n2), variance, level, "log (Simel 1991)")


def _odds_ratio(tp: float, fp: float, fn: float, tn: float, level: float) -> Estimate:
    if not (tp and fp and fn and tn):
        return not_estimable("a cell of the 2×2 table is 0")
    return _log_interval(tp * tn / (fp * fn), 1 / tp + 1 / fp + 1 / fn + 1 / tn, level, "log (Woolf)")


def _youden(sensitivity: Estimate, specificity: Estimate) -> Estimate:
    if np.isnan(sensitivity.value) or np.isnan(specificity.value):
        return not_estimable("a class is absent")
    value = sensitivity.value + specificity.value - 1
    down = np.hypot(sensitivity.value - sensitivity.ci_low, specificity.value - specificity.ci_low)
    up = np.hypot(sensitivity.ci_high - sensitivity.value, specificity.ci_high - specificity.value)
    return Estimate(value, float(value - down), float(value + up), "square-and-add (Newcombe)")


def adjust_p_values(p_values: ArrayLike, *, method: str = "holm") -> list[float]:
    """Adjusted p-values in the order given, as R's p.adjust; NaN stays NaN and does not count as a test.

    `method` is holm, hochberg, hommel, bonferroni, benjamini_hochberg or benjamini_yekutieli.
    """
    names = {
        "holm": "holm",
        "hochberg": "simes-hochberg",
        "hommel": "hommel",
        "bonferroni": "bonferroni",
        "benjamini_hochberg": "fdr_bh",
        "benjamini_yekutieli": "fdr_by",
    }
    if method not in names:
        raise DataError(f"adjustment {method!r} is not one of {', '.join(names)}{nearest(method, names)}")
    p = np.asarray(p_values, dtype=np.float64)
    if ((p < 0) | (p > 1)).any():
        raise DataError("p-values lie between 0 and 1")
    adjusted = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        adjusted[tested] = multipletests(p[tested], method=names[method])[1]
    return [float(value) for value in adjusted]


def predictive_values(sensitivity: float, specificity: float, *, prevalence: float) -> tuple[float, float]:
    """PPV and NPV at a stated prevalence (Bayes); NaN where nobody would be called positive, or negative."""
    if not 0 <= prevalence <= 1:
        raise DataError(f"prevalence {prevalence!r} is not between 0 and 1")
    true_positive, false_positive = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    true_negative, false_negative = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    called_positive, called_negative = true_positive + false_positive, true_negative + false_negative
    ppv = true_positive / called_positive if called_positive else float("nan")
    npv = true_negative / called_negative if called_negative else float("nan")
    return ppv, npv


def chi_square_test(table: ArrayLike, *, correct: bool = False) -> tuple[float, float]:
    """Pearson's chi-square statistic and p-value of a table of counts; `correct` is Yates' correction."""
    result = stats.chi2_contingency(np.asarray(table), correction=correct)
    return float(result.statistic), float(result.pvalue)


def fisher_test(table: ArrayLike) -> float:
    """Two-sided p-value of Fisher's exact test on a 2×2 table."""
    return float(stats.fisher_exact(np.asarray(table)).pvalue)
