"""Sample size and power of diagnostic accuracy and reader studies, before they are run.

One AUC               one_auc (power), auc_precision_sample_size (precision)
Two AUCs, same cases  paired_auc (pilot variances by paired_auc_pilot), partial_auc_pair (binormal parameters)
Reader studies        mrmc_power, mrmc_cases, mrmc_readers (pilot components by mrmc_pilot), mrmc_conjectured
Proportions           precision_sample_size, accuracy_cohort, two_proportions
Agreement             kappa_sample_size, kappa_precision

Numbers of cases come back unrounded where the formula gives a real number: round up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, optimize, stats
from statsmodels.stats.power import NormalIndPower

from auroc import delong
from errors import ConfigError, DataError

Array = NDArray[np.float64]


def _check_share(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"{name} {value!r} is not between 0 and 1; correct it")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name} {value!r} is not above 0")


# ------------------------------------------------------------------------------------------------- one or two AUCs


def _tail(alpha: float, two_sided: bool) -> float:
    return alpha / 2 if two_sided else alpha


def _cases(delta: float, null: float, alternative: float, *, alpha: float, power: float) -> float:
    """Positive cases that tell delta from 0; variances are per positive case, alpha is one tail."""
    if delta == 0:
        raise ConfigError("the difference to detect is 0; no number of cases is enough")
    z_alpha, z_beta = stats.norm.ppf(alpha), stats.norm.ppf(1 - power)
    return float((z_alpha * math.sqrt(null) + z_beta * math.sqrt(alternative)) ** 2 / delta**2)


def _power(delta: float, null: float, alternative: float, *, alpha: float, cases: float) -> float:
    z = math.sqrt(cases) * abs(delta) + stats.norm.ppf(alpha) * math.sqrt(null)
    return float(stats.norm.cdf(z / math.sqrt(alternative)))


def _alpha(delta: float, null: float, alternative: float, *, power: float, cases: float) -> float:
    z = math.sqrt(cases) * abs(delta) + stats.norm.ppf(1 - power) * math.sqrt(alternative)
    return float(stats.norm.sf(z / math.sqrt(null)))


def binormal_auc_variance(auc: float, *, ratio: float = 1.0) -> float:
    """Variance of an AUC times the number of positive cases, `ratio` negatives per positive.

    Obuchowski & McClish 1997 as written in Obuchowski, Lieber & Wians 2004, Clin Chem 50:1118, formula 3. Its printed
    1.414 stands for √2 and is kept, as the reference software keeps it.
    """
    a = float(stats.norm.ppf(auc)) * 1.414
    return 0.0099 * math.exp(-(a**2) / 2) * ((5 * a**2 + 8) + (a**2 + 8) / ratio)


def one_auc(
    *,
    auc: float | None = None,
    n_positive: float | None = None,
    n_negative: float | None = None,
    power: float | None = None,
    alpha: float | None = 0.05,
    ratio: float = 1.0,
    two_sided: bool = True,
) -> dict[str, float]:
    """An AUC against 0.5: leave out the cases, the power, the alpha (None) or the AUC, and get it.

    `ratio` is negatives per positive, used where only one of the two numbers is given or none. Obuchowski, Lieber &
    Wians 2004, Clin Chem 50:1118 (as pROC::power.roc.test). Raises ConfigError unless exactly one is left out.
    """
    _check_share(auc=auc, power=power, alpha=alpha)
    _check_positive(n_positive=n_positive, n_negative=n_negative, ratio=ratio)
    if n_positive is None and n_negative is not None:
        n_positive = n_negative / ratio
    if n_positive is not None:
        ratio = ratio if n_negative is None else n_negative / n_positive
    if [auc, n_positive, power, alpha].count(None) != 1:
        raise ConfigError("leave out exactly one of auc, power, alpha and the numbers of cases")
    null, sides = 0.0792 * (1 + 1 / ratio), 2 if two_sided else 1
    if auc is None:
        assert n_positive and power and alpha
        auc = _detectable_auc(n_positive, null, ratio=ratio, alpha=alpha / sides, power=power)
    delta, variance = auc - 0.5, binormal_auc_variance(auc, ratio=ratio)
    if n_positive is None:
        assert power and alpha
        n_positive = _cases(delta, null, variance, alpha=alpha / sides, power=power)
    elif power is None:
        assert alpha
        power = _power(delta, null, variance, alpha=alpha / sides, cases=n_positive)
    elif alpha is None:
        alpha = sides * _alpha(delta, null, variance, power=power, cases=n_positive)
    assert alpha is not None and power is not None
    answer = {"auc": auc, "n_positive": n_positive, "n_negative": n_positive * ratio}
    return answer | {"n_total": n_positive * (1 + ratio), "power": power, "alpha": alpha}


def _detectable_auc(cases: float, null: float, *, ratio: float, alpha: float, power: float) -> float:
    def excess(auc: float) -> float:
        variance = binormal_auc_variance(auc, ratio=ratio)
        return _cases(auc - 0.5, null, variance, alpha=alpha, power=power) - cases

    low, high = 0.5 + 1e-6, 1 - 1e-9
    if excess(high) > 0:
        raise ConfigError(f"{cases:g} positive cases detect no AUC below 1 with power {power:g}; plan for more")
    return float(optimize.brentq(excess, low, high, xtol=1e-12))


@dataclass(frozen=True)
class PairedAuc:
    """Two AUCs on the same cases: the difference to detect, and variances per positive case."""

    delta: float
    variance_a: float
    variance_b: float
    covariance: float
    ratio: float
    """Negatives per positive."""

    @property
    def null(self) -> float:
        """Variance of the difference if both were like a (as pROC: the first curve is the reference)."""
        return 2 * self.variance_a - 2 * self.covariance

    @property
    def alternative(self) -> float:
        return self.variance_a + self.variance_b - 2 * self.covariance


def paired_auc_pilot(labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike) -> PairedAuc:
    """Difference and DeLong variances of two scores on the same pilot cases; labels 0/1, all arrays (N,)."""
    result = delong(labels, np.column_stack([np.asarray(scores_a, float), np.asarray(scores_b, float)]))
    cov = result.covariance * result.n_pos
    delta = float(result.auc[0] - result.auc[1])
    return PairedAuc(delta, float(cov[0, 0]), float(cov[1, 1]), float(cov[0, 1]), result.n_neg / result.n_pos)


def paired_auc(
    pilot: PairedAuc,
    *,
    n_positive: float | None = None,
    power: float | None = None,
    alpha: float | None = 0.05,
    two_sided: bool = True,
) -> dict[str, float]:
    """Two AUCs on the same cases: leave out the positive cases, the power or the alpha (None), and get it.

    Obuchowski & McClish 1997, Stat Med 16:1529; Obuchowski, Lieber & Wians 2004 (as pROC::power.roc.test).
    """
    _check_share(power=power, alpha=alpha)
    _check_positive(n_positive=n_positive)
    if [n_positive, power, alpha].count(None) != 1:
        raise ConfigError("leave out exactly one of n_positive, power and alpha")
    if pilot.null <= 0 or pilot.alternative <= 0:
        raise DataError("the two scores rank the pilot cases alike, so their difference has no variance to plan with")
    sides, spread = 2 if two_sided else 1, (pilot.delta, pilot.null, pilot.alternative)
    if n_positive is None:
        assert power and alpha
        n_positive = _cases(*spread, alpha=alpha / sides, power=power)
    elif power is None:
        assert alpha
        power = _power(*spread, alpha=alpha / sides, cases=n_positive)
    elif alpha is None:
        alpha = sides * _alpha(*spread, power=power, cases=n_positive)
    assert alpha is not None and power is not None
    numbers = {"n_positive": n_positive, "n_negative": n_positive * pilot.ratio}
    return numbers | {"n_total": n_positive * (1 + pilot.ratio), "power": power, "alpha": alpha, "delta": pilot.delta}


@dataclass(frozen=True)
class Binormal:
    """A binormal ROC curve: TPR = Φ(a + b·Φ⁻¹(FPR)), its area taken over a range of FPR."""

    a: float
    b: float
    fpr: tuple[float, float] = (0.0, 1.0)

    def derivatives(self) -> tuple[float, float]:
        """Derivatives of the area in a and in b (Obuchowski & McClish 1997, table 1; sign of g as in pROC)."""
        a, b, square = self.a, self.b, 1 + self.b**2
        decay = math.exp(-(a**2) / (2 * square))
        low, high = ((stats.norm.ppf(rate) + a * b / square) * math.sqrt(square) for rate in self.fpr)
        mass = float(stats.norm.cdf(high) - stats.norm.cdf(low))
        edge = math.exp(-(low**2) / 2) - math.exp(-(high**2) / 2)
        in_a = decay * mass / math.sqrt(2 * math.pi * square)
        in_b = decay * edge / (2 * math.pi * square) - a * b * decay * mass / math.sqrt(2 * math.pi * square**3)
        return in_a, in_b

    def variance(self, ratio: float) -> float:
        """Of the area, times the positive cases: formula 4 as printed, which leaves out the covariance of a and b."""
        f, g = self.derivatives()
        spread = 1 + self.b**2 / ratio + self.a**2 / 2
        return f**2 * spread + g**2 * self.b**2 * (1 + ratio) / (2 * ratio)


def partial_auc_pair(
    curve_a: Binormal,
    curve_b: Binormal,
    *,
    delta: float,
    corr_positive: float,
    corr_negative: float,
    ratio: float = 1.0,
) -> PairedAuc:
    """Conjectured (partial) areas of two binormal curves on the same cases, for `paired_auc`.

    `corr_positive` and `corr_negative` are the correlations of the two scores within each truth. Obuchowski & McClish
    1997, formulas 4 and 5.
    """
    _check_positive(ratio=ratio, b_a=curve_a.b, b_b=curve_b.b)
    (f1, g1), (f2, g2) = curve_a.derivatives(), curve_b.derivatives()
    a1, b1, a2, b2, ra, rn = curve_a.a, curve_a.b, curve_b.a, curve_b.b, corr_positive, corr_negative
    covariance = (
        f1 * f2 * (ra + rn * b1 * b2 / ratio + ra**2 * a1 * a2 / 2)
        + g1 * g2 * b1 * b2 * (rn**2 + ratio * ra**2) / (2 * ratio)
        + f1 * g2 * ra**2 * a1 * b2 / 2
        + f2 * g1 * ra**2 * a2 * b1 / 2
    )
    return PairedAuc(delta, curve_a.variance(ratio), curve_b.variance(ratio), covariance, ratio)


# ---------------------------------------------------------------------------------------------- reader studies


@dataclass(frozen=True)
class MrmcPilot:
    """Obuchowski-Rockette components of a pilot study with `cases` cases."""

    reader_by_modality: float
    error: float
    cov1: float
    cov2: float
    cov3: float
    cases: float
    effect: float = math.nan
    """The difference the pilot saw."""

    @property
    def excess(self) -> float:
        return max(self.cov2 - self.cov3, 0.0)


def mrmc_pilot(result: Mapping[str, Any]) -> MrmcPilot:
    """The components in a `reader_study` result of method or, with two modalities and a factorial design."""
    parts = result.get("variance_components", {})
    if "reader_by_modality" not in parts or "cov1" not in parts:
        raise DataError("the pilot must be a reader study by method='or' in which every reader used every modality")
    counted = {"sensitivity": result["n_positive"], "specificity": result["n_negative"]}
    return MrmcPilot(
        reader_by_modality=parts["reader_by_modality"],
        error=parts["error"],
        cov1=parts["cov1"],
        cov2=parts["cov2"],
        cov3=parts["cov3"],
        cases=counted.get(result["outcome"], result["cases"]),
        effect=result["difference"],
    )


def mrmc_power(
    pilot: MrmcPilot,
    *,
    readers: int,
    cases: ArrayLike,
    effect: float | None = None,
    alpha: float = 0.05,
    random: str = "both",
) -> dict[str, Any]:
    """Power to see `effect` (default: the pilot's) between two modalities with these readers and cases.

    `random` is both, cases (fixed readers: chi-square, df_den NaN) or readers (fixed cases). `cases` may be an array:
    then power, ncp and df_den are arrays. Hillis, Obuchowski & Berbaum 2011, Acad Radiol 18:129. Power in (alpha, 1).
    """
    if random not in ("both", "cases", "readers"):
        raise ConfigError(f"random {random!r} is not one of both, cases, readers")
    _check_share(alpha=alpha)
    if readers < (1 if random == "cases" else 2):
        raise ConfigError(f"{readers} reader(s): random readers need at least 2")
    number = np.asarray(cases, dtype=float)
    if (number <= 1).any():
        raise ConfigError("a study needs at least 2 cases")
    effect = pilot.effect if effect is None else effect
    scale = pilot.cases / number
    reader_part = max(pilot.reader_by_modality, 0.0)
    alone = reader_part + scale * (pilot.error - pilot.cov1 - pilot.excess)
    if random == "cases":
        # The test of fixed readers is a chi-square: its denominator counts as known.
        denominator, df = (
            scale * (pilot.error - pilot.cov1 + (readers - 1) * pilot.excess),
            np.full_like(number, np.nan),
        )
    elif random == "readers":
        denominator, df = alone, np.full_like(number, readers - 1.0)
    else:
        denominator = alone + scale * readers * pilot.excess
        df = (readers - 1) * (denominator / alone) ** 2
    if not (denominator > 0).all():
        raise DataError("the pilot's components leave no variance for the difference; use a larger pilot")
    ncp = effect**2 * readers / 2 / denominator
    if random == "cases":
        power = stats.ncx2.sf(stats.chi2.ppf(1 - alpha, 1), 1, ncp)
    else:
        power = stats.ncf.sf(stats.f.ppf(1 - alpha, 1, df), 1, df, ncp)
    return {name: float(v) if np.ndim(v) == 0 else v for name, v in (("power", power), ("ncp", ncp), ("df_den", df))}


def mrmc_cases(
    pilot: MrmcPilot,
    *,
    readers: int,
    power: float = 0.8,
    effect: float | None = None,
    alpha: float = 0.05,
    random: str = "both",
    max_cases: int = 100_000,
) -> dict[str, float]:
    """The fewest cases that reach `power` with these readers, in the pilot's mix of truths; and the power they give.

    ConfigError where even `max_cases` do not (too few readers).
    """
    _check_share(power=power)
    low, high = 1, 2

    def reached(cases: int) -> float:
        return float(
            mrmc_power(pilot, readers=readers, cases=cases, effect=effect, alpha=alpha, random=random)["power"]
        )

    while reached(high) < power:
        if high >= max_cases:
            raise ConfigError(
                f"{readers} readers do not reach power {power:g} with {max_cases} cases "
                f"({reached(max_cases):.3f}); add readers or plan for a larger effect"
            )
        low, high = high, min(2 * high, max_cases)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= power else (middle, high)
    return {"cases": float(high), "power": reached(high)}


def mrmc_readers(
    pilot: MrmcPilot,
    *,
    cases: float,
    power: float = 0.8,
    effect: float | None = None,
    alpha: float = 0.05,
    random: str = "both",
    max_readers: int = 1000,
) -> dict[str, float]:
    """The fewest readers that reach `power` with these cases, and the power they give."""
    _check_share(power=power)
    for readers in range(1 if random == "cases" else 2, max_readers + 1):
        got = mrmc_power(pilot, readers=readers, cases=cases, effect=effect, alpha=alpha, random=random)["power"]
        if got >= power:
            return {"readers": float(readers), "power": got}
    raise ConfigError(f"{max_readers} readers do not reach power {power:g} with {cases:g} cases; add cases")


def mrmc_conjectured(
    *,
    readers: int,
    delta: float,
    theta: float,
    range_between: float,
    range_within: float,
    r1: float,
    r2: float = 0.3,
    r3: float = 0.3,
    rb: float = 0.8,
    ratio: float = 1.0,
    readings: int = 1,
    power: float = 0.8,
    alpha: float = 0.05,
    outcome: str = "auc",
    sessions: int = 2,
    range_rule: str = "normal",
    binomial: bool = False,
    icc: float | None = None,
    lesions: float | None = None,
) -> dict[str, float]:
    """Cases for a two-modality reader study without a pilot, from conjectured ranges and correlations.

    `range_between` is the spread of accuracies across readers, `range_within` of one reader over `sessions`; both
    become standard deviations by the expected range of a normal sample (`range_rule="normal"`) or as a quarter of
    the range ("quarter"). `r1`, `r2`, `r3` are the correlations of accuracies: same reader, same modality, neither;
    `rb` that of a reader's true accuracies in the two modalities; `ratio` negatives per positive. `outcome`
    sensitivity, or `binomial` for the bound of Blume 2009, uses theta(1 - theta). `icc` and `lesions` per diseased
    case inflate for lesions within a case. Obuchowski 2000, AJR 175:603; Obuchowski & Hillis 2011, AJR 197:W821 (as
    MRMCsamplesize). ConfigError where no number of cases is enough.
    """
    _check_share(delta=delta, theta=theta, range_between=range_between, range_within=range_within)
    _check_share(r1=r1, r2=r2, r3=r3, rb=rb, power=power, alpha=alpha)
    _check_positive(ratio=ratio)
    if outcome not in ("auc", "sensitivity") or range_rule not in ("normal", "quarter"):
        raise ConfigError(f"outcome {outcome!r}, range_rule {range_rule!r}: auc or sensitivity, normal or quarter")
    normal = range_rule == "normal"
    between = range_between / (expected_range(readers) if normal else 4)
    within = range_within / (expected_range(sessions) if normal else 4)
    ncp = noncentrality_f(power=power, alpha=alpha, df_num=1, df_den=readers - 1)
    reader_by_modality = between**2 * (1 - rb)
    room = readers * delta**2 / (2 * ncp) - reader_by_modality - within**2 / readings
    case_variance = room / ((1 - r1) + (readers - 1) * (r2 - r3))
    if not case_variance > 0:
        raise ConfigError(f"{readers} readers cannot show a difference of {delta:g} however many cases; add readers")
    error = case_variance + within**2
    use_binomial = outcome == "sensitivity" or binomial
    one_case = theta * (1 - theta) if use_binomial else binormal_auc_variance(theta, ratio=ratio)
    sizes = _round_cases(one_case / case_variance, ratio=ratio, icc=icc, lesions=lesions)
    components = {"reader": between**2, "within": within**2, "reader_by_modality": reader_by_modality, "error": error}
    return components | {"cov1": r1 * error, "cov2": r2 * error, "cov3": r3 * error, "ncp": ncp} | sizes


def _round_cases(units: float, *, ratio: float, icc: float | None, lesions: float | None) -> dict[str, float]:
    """Whole positive units, the diseased cases that carry them, controls and their sum."""
    whole = math.ceil(units)
    if (icc is None) != (lesions is None):
        raise ConfigError("icc and lesions (per diseased case) go together")
    diseased, inflated = whole, whole
    if icc is not None and lesions is not None:
        inflated = math.ceil(whole * (1 + (lesions - 1) * icc))
        diseased = math.ceil(inflated / lesions)
    controls = math.ceil(diseased * ratio)
    numbers = {"units": whole, "units_inflated": inflated, "n_positive": diseased, "n_negative": controls}
    return {name: float(value) for name, value in (numbers | {"n_total": diseased + controls}).items()}


def expected_range(n: int) -> float:
    """Expected range of n standard normal values (1.128 for two), n at least 2. Tippett 1925."""
    if n < 2:
        raise ConfigError(f"a range needs at least 2 values, not {n}")

    def density(x: float) -> float:
        return float(n * x * stats.norm.cdf(x) ** (n - 1) * stats.norm.pdf(x))

    return 2 * float(integrate.quad(density, -np.inf, np.inf, epsabs=1e-12, epsrel=1e-12)[0])


def noncentrality_f(*, power: float, alpha: float, df_num: float, df_den: float) -> float:
    """The noncentrality at which an F test of level alpha has this power; power must exceed alpha."""
    _check_share(power=power, alpha=alpha)
    _check_positive(df_num=df_num, df_den=df_den)
    if power <= alpha:
        raise ConfigError(f"power {power:g} must be above alpha {alpha:g}")
    critical = stats.f.ppf(1 - alpha, df_num, df_den)

    def short(ncp: float) -> float:
        return float(stats.ncf.sf(critical, df_num, df_den, ncp)) - power

    high = 1.0
    while short(high) < 0:
        high *= 2
    return float(optimize.brentq(short, 0.0, high, xtol=1e-12))


# ----------------------------------------------------------------------------------------------- proportions


def precision_sample_size(p: float, *, margin: float, level: float = 0.95, share: float = 1.0) -> float:
    """Subjects to recruit so that a proportion near `p` has a Wald interval of ± `margin`; unrounded.

    `share` is the part of the subjects the proportion is about: the prevalence for sensitivity, 1 - prevalence for
    specificity. Buderer 1996, Acad Emerg Med 3:895 (as epiR::epi.ssdxsesp).
    """
    _check_share(p=p, margin=margin, level=level)
    if not 0 < share <= 1:
        raise ConfigError(f"share {share!r} is not in (0, 1]")
    z = float(stats.norm.ppf(0.5 + level / 2))
    return z**2 * p * (1 - p) / (margin**2 * share)


def accuracy_cohort(
    *, sensitivity: float, specificity: float, prevalence: float, margin: float, level: float = 0.95
) -> dict[str, float]:
    """Subjects of a cohort that gives both sensitivity and specificity within ± `margin` (Buderer 1996).

    Unrounded numbers for each, and the larger one rounded up as `n_total`.
    """
    _check_share(prevalence=prevalence)
    for_sensitivity = precision_sample_size(sensitivity, margin=margin, level=level, share=prevalence)
    for_specificity = precision_sample_size(specificity, margin=margin, level=level, share=1 - prevalence)
    total = float(math.ceil(max(for_sensitivity, for_specificity)))
    return {"n_for_sensitivity": for_sensitivity, "n_for_specificity": for_specificity, "n_total": total}


def auc_precision_sample_size(
    auc: float,
    *,
    margin: float,
    power: float = 0.8,
    alpha: float = 0.05,
    ratio: float = 1.0,
    outcome: str = "auc",
    icc: float | None = None,
    lesions: float | None = None,
) -> dict[str, float]:
    """Cases of a standalone study that shows an AUC (or sensitivity) within `margin` with this power.

    (z_alpha/2 + z_power)²·variance/margin², with lesions within a case as in `mrmc_conjectured`. Flahault, Cadilhac &
    Thomas 2005; Zhou, Obuchowski & McClish 2011, ch. 6 (as MRMCsamplesize::sampleSize_Standalone).
    """
    _check_share(auc=auc, margin=margin, power=power, alpha=alpha)
    variance = auc * (1 - auc) if outcome == "sensitivity" else binormal_auc_variance(auc, ratio=ratio)
    z = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power))
    return _round_cases(z**2 * variance / margin**2, ratio=ratio, icc=icc, lesions=lesions)


def two_proportions(
    p1: float,
    p2: float,
    *,
    power: float | None = None,
    n: float | None = None,
    alpha: float = 0.05,
    method: str = "normal",
    two_sided: bool = True,
) -> dict[str, float]:
    """Two independent proportions, n per group: leave out the power or n, and get it; unrounded.

    `method` normal pools the variance under the null (R's power.prop.test); arcsine uses Cohen's h (pwr.2p.test).
    """
    _check_share(p1=p1, p2=p2, power=power, alpha=alpha)
    if (power is None) == (n is None):
        raise ConfigError("leave out exactly one of power and n")
    if p1 == p2:
        raise ConfigError("the two proportions are equal; there is no difference to detect")
    if method == "arcsine":
        effect = abs(2 * math.asin(math.sqrt(p1)) - 2 * math.asin(math.sqrt(p2)))
        sides = "two-sided" if two_sided else "larger"
        solve = NormalIndPower().solve_power
        found = float(solve(effect_size=effect, nobs1=n, alpha=alpha, power=power, alternative=sides))
        return {"n": n if n is not None else found, "power": power if power is not None else found, "alpha": alpha}
    if method != "normal":
        raise ConfigError(f"method {method!r} is not one of normal, arcsine")
    if n is not None and n <= 0:
        raise ConfigError(f"n: {n:g} is not a number of films in each group")
    mean, tail = (p1 + p2) / 2, alpha / (2 if two_sided else 1)
    null, alternative = 2 * mean * (1 - mean), p1 * (1 - p1) + p2 * (1 - p2)
    if n is None:
        assert power is not None
        n = _cases(p1 - p2, null, alternative, alpha=tail, power=power)
    else:
        power = _power(p1 - p2, null, alternative, alpha=tail, cases=n)
    assert power is not None
    return {"n": n, "power": power, "alpha": alpha}


# ------------------------------------------------------------------------------------------------- agreement


def _agreement_counts(kappa: float, prevalence: float, raters: int) -> Array:
    """Probabilities of 0 … raters positive calls on one subject when all pairs of raters share this kappa.

    A share kappa of subjects is called alike by all; the others are called independently.
    """
    independent = stats.binom.pmf(np.arange(raters + 1), raters, prevalence)
    alike = np.zeros(raters + 1)
    alike[0], alike[-1] = 1 - prevalence, prevalence
    return np.asarray(kappa * alike + (1 - kappa) * independent)


def _fit_distance(assumed: Array, tested: Array) -> float:
    return float(((assumed - tested) ** 2 / tested).sum())


def kappa_sample_size(
    kappa_null: float,
    kappa: float,
    *,
    prevalence: float,
    raters: int = 2,
    power: float = 0.8,
    alpha: float = 0.05,
) -> float:
    """Subjects, each rated yes/no by every rater, to tell `kappa` from `kappa_null`; unrounded.

    The goodness-of-fit test of Donner & Eliasziw 1992, Stat Med 11:1511; Altaye, Donner & Klar 2001, Biometrics
    57:584 for several raters (as kappaSize::PowerBinary).
    """
    _check_share(kappa_null=kappa_null, kappa=kappa, prevalence=prevalence, power=power, alpha=alpha)
    if raters < 2 or kappa == kappa_null:
        raise ConfigError(
            f"{raters} raters, kappa {kappa:g} against {kappa_null:g}: two raters and two values are needed"
        )
    critical = stats.chi2.ppf(1 - alpha, 1)
    ncp = optimize.brentq(lambda value: stats.ncx2.sf(critical, 1, value) - power, 1e-9, 1000.0)
    distance = _fit_distance(*(_agreement_counts(k, prevalence, raters) for k in (kappa, kappa_null)))
    return float(ncp / distance)


def kappa_precision(
    kappa: float,
    *,
    lower: float,
    upper: float | None = None,
    prevalence: float,
    raters: int = 2,
    alpha: float = 0.05,
) -> int:
    """Subjects for which the goodness-of-fit interval of `kappa` keeps within [lower, upper].

    Without `upper` the interval is one-sided. Donner & Rotondi 2010, Int J Biostat 6:31 (as kappaSize::CIBinary).
    """
    _check_share(kappa=kappa, lower=lower, upper=upper, prevalence=prevalence, alpha=alpha)
    if not lower < kappa or (upper is not None and not kappa < upper):
        raise ConfigError(f"kappa {kappa:g} must lie between lower {lower:g} and upper {upper}")
    critical = float(stats.chi2.ppf(1 - (alpha if upper is not None else 2 * alpha), 1))
    expected = _agreement_counts(kappa, prevalence, raters)
    bounds = [bound for bound in (lower, upper) if bound is not None]
    nearest_bound = min(_fit_distance(expected, _agreement_counts(bound, prevalence, raters)) for bound in bounds)
    return math.ceil(critical / nearest_bound)
