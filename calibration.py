"""Calibration: do 100 films given 0.8 hold 80 positives? Measures, tests, and the two ways to mend it.

Scores                  brier, brier_decomposition, log_loss, expected_calibration_error
Reliability             reliability_bins, hosmer_lemeshow, spiegelhalter_z, observed_to_expected
Logistic recalibration  logistic_recalibration, calibration_in_the_large
Mending                 fit_temperature, apply_temperature, fit_isotonic, adjust_prior
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats
from sklearn.isotonic import IsotonicRegression
from statsmodels.stats.proportion import proportion_confint

from errors import DataError
from estimates import (
    Estimate,
    FloatArray,
    IntArray,
    as_groups,
    as_labels,
    as_probabilities,
    not_estimable,
    refuse_nan,
    sum_by_group,
    undefined,
    wald,
)

LOGIT_CLIP = 1e-10
"""Probabilities nearer to 0 or 1 than this are moved here before a logit is taken: at 0 and 1 it is infinite."""

TEMPERATURE_RANGE = (0.02, 50.0)
"""Beyond these the negative log-likelihood has no minimum that data can place."""


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean squared error of the probability, 0 (perfect) to 1; over K columns (N, K) summed, 0 to 2. Brier 1950."""
    return float(brier_terms(*_outcome(labels, probabilities)).mean())


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean −log of the probability given to the truth, 0 (perfect) upwards; probabilities clipped to float64's eps."""
    return float(log_loss_terms(*_outcome(labels, probabilities)).mean())


def _outcome(labels: ArrayLike, probabilities: ArrayLike) -> tuple[IntArray, FloatArray]:
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim == 2:
        refuse_nan(p, "probabilities")
        return as_labels(labels, n_classes=p.shape[1]), p
    y = as_labels(labels)
    return y, as_probabilities(p, n=len(y))


def brier_terms(labels: IntArray, probabilities: FloatArray) -> FloatArray:
    """Each film's squared error (N,), from probabilities (N,) of class 1 or (N, K)."""
    if probabilities.ndim == 1:
        return (probabilities - labels) ** 2
    truth = probabilities[np.arange(len(labels)), labels]
    return (probabilities**2).sum(axis=1) - 2 * truth + 1


def log_loss_terms(labels: IntArray, probabilities: FloatArray) -> FloatArray:
    """Each film's −log probability of the truth (N,), from probabilities (N,) of class 1 or (N, K)."""
    if probabilities.ndim == 1:
        truth = np.where(labels == 1, probabilities, 1 - probabilities)
    else:
        truth = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.clip(truth, np.finfo(np.float64).eps, 1.0))


@dataclass(frozen=True)
class ReliabilityBins:
    """Occupied probability bins, in order."""

    low: FloatArray
    high: FloatArray
    count: IntArray
    mean_probability: FloatArray
    observed: FloatArray
    """Share of positives."""
    ci_low: FloatArray
    """Wilson limits of `observed`."""
    ci_high: FloatArray

    @property
    def gap(self) -> FloatArray:
        return np.abs(self.mean_probability - self.observed)


def bin_index(probabilities: FloatArray, *, n_bins: int, strategy: str = "equal_width") -> tuple[IntArray, FloatArray]:
    """Each film's bin (N,) and the edges (B + 1,). Bins are [low, high), the last closed.

    equal_width cuts [0, 1] evenly; equal_mass at quantiles of the probabilities, equal ones staying together.
    """
    if strategy not in ("equal_width", "equal_mass"):
        raise DataError(f"bins {strategy!r} are neither equal_width nor equal_mass")
    even = np.linspace(0.0, 1.0, n_bins + 1)
    edges = even if strategy == "equal_width" else np.unique(np.quantile(probabilities, even))
    if len(edges) < 2:
        edges = np.array([edges[0], edges[0]])
    return np.searchsorted(edges[1:-1], probabilities, side="right").astype(np.int64), edges


def reliability_bins(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    n_bins: int = 10,
    strategy: str = "equal_width",
    level: float = 0.95,
    last_closed: bool = True,
) -> ReliabilityBins:
    """Observed share of positives against mean probability, per occupied bin, with Wilson intervals.

    `labels` (N,) of 0/1, `probabilities` (N,). The material of a reliability diagram.
    """
    y = as_labels(labels)
    p = as_probabilities(probabilities, n=len(y))
    index, edges = bin_index(p, n_bins=n_bins, strategy=strategy)
    if not last_closed:
        index, edges = np.where(p == 1, len(edges) - 1, index), np.append(edges, 1.0)
    count = np.bincount(index, minlength=len(edges) - 1)
    used = np.flatnonzero(count)
    positives = np.bincount(index, weights=y, minlength=len(count))[used]
    low, high = proportion_confint(positives, count[used], alpha=1 - level, method="wilson")
    return ReliabilityBins(
        low=edges[:-1][used],
        high=edges[1:][used],
        count=count[used].astype(np.int64),
        mean_probability=np.bincount(index, weights=p, minlength=len(count))[used] / count[used],
        observed=positives / count[used],
        ci_low=np.asarray(low),
        ci_high=np.asarray(high),
    )


def top_label(labels: ArrayLike, probabilities: ArrayLike) -> tuple[IntArray, FloatArray]:
    """Multi-class calibration as a binary one: was the top class right (N,), and how sure was the model (N,)."""
    y, p = _outcome(labels, probabilities)
    return (p.argmax(axis=1) == y).astype(np.int64), np.minimum(p.max(axis=1), 1.0)


def expected_calibration_error(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    n_bins: int = 10,
    strategy: str = "equal_width",
    norm: str = "l1",
    last_closed: bool = True,
) -> float:
    """Gap between mean probability and observed share over bins, in [0, 1], 0 is best. Naeini 2015.

    `probabilities` (N,) of class 1, or (N, K), of which the top label counts (Guo 2017). `norm` l1 averages the
    gaps by bin size (ECE), l2 is their root mean square (RMSCE), max the largest (MCE). `last_closed` False gives
    probabilities of exactly 1 a bin of their own, as torchmetrics does (on float32 values).
    """
    y, p = _outcome(labels, probabilities)
    if p.ndim == 2:
        y, p = top_label(y, p)
    bins = reliability_bins(y, p, n_bins=n_bins, strategy=strategy, last_closed=last_closed)
    weight = bins.count / bins.count.sum()
    norms = {"l1": (weight * bins.gap).sum(), "l2": np.sqrt((weight * bins.gap**2).sum()), "max": bins.gap.max()}
    if norm not in norms:
        raise DataError(f"norm {norm!r} is not one of {', '.join(norms)}")
    return float(norms[norm])


@dataclass(frozen=True)
class BrierDecomposition:
    """Brier = reliability − resolution + uncertainty + within_bin (Murphy 1973; Stephenson 2008 for the last)."""

    brier: float
    reliability: float
    """Squared gap between probability and observed share, 0 is best."""
    resolution: float
    """Spread of the observed shares, larger is better."""
    uncertainty: float
    """prevalence × (1 − prevalence): what the data bring."""
    within_bin: float
    """What binning itself adds or hides; 0 when every distinct probability is its own bin."""


def brier_decomposition(
    labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int | None = 10, strategy: str = "equal_width"
) -> BrierDecomposition:
    """Murphy's decomposition over bins; `n_bins` None takes each distinct probability as a bin (exact)."""
    y = as_labels(labels)
    p = as_probabilities(probabilities, n=len(y))
    if n_bins is None:
        index = np.unique(p, return_inverse=True)[1]
    else:
        index = bin_index(p, n_bins=n_bins, strategy=strategy)[0]
    count = np.bincount(index)
    safe = np.maximum(count, 1)
    mean_p, observed = np.bincount(index, weights=p) / safe, np.bincount(index, weights=y) / safe
    prevalence, total = float(y.mean()), brier(y, p)
    reliability = float((count * (mean_p - observed) ** 2).sum() / len(y))
    resolution = float((count * (observed - prevalence) ** 2).sum() / len(y))
    uncertainty = prevalence * (1 - prevalence)
    residual = total - (reliability - resolution + uncertainty)
    return BrierDecomposition(total, reliability, resolution, uncertainty, residual)


def spiegelhalter_z(labels: ArrayLike, probabilities: ArrayLike) -> tuple[float, float]:
    """Spiegelhalter's z and two-sided p of perfect calibration (1986); NaN with a warning if all are 0, ½ or 1."""
    y = as_labels(labels)
    p = as_probabilities(probabilities, n=len(y))
    variance = float(((1 - 2 * p) ** 2 * p * (1 - p)).sum())
    if variance == 0:
        return undefined("spiegelhalter_z", "every probability is 0, 1/2 or 1"), float("nan")
    z = float(((y - p) * (1 - 2 * p)).sum() / np.sqrt(variance))
    return z, float(2 * stats.norm.sf(abs(z)))


def hosmer_lemeshow(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    n_bins: int = 10,
    strategy: str = "equal_mass",
    df: int | None = None,
) -> tuple[float, int, float]:
    """Hosmer-Lemeshow chi-square, degrees of freedom (occupied bins − 2 unless given) and p-value.

    Give `df` = the number of bins when the probabilities come from a model fitted on other data.
    """
    bins = reliability_bins(labels, probabilities, n_bins=n_bins, strategy=strategy)
    spread = bins.count * bins.mean_probability * (1 - bins.mean_probability)
    difference = bins.count * (bins.observed - bins.mean_probability)
    if (spread[difference != 0] == 0).any():
        return float("inf"), df or len(bins.count) - 2, 0.0
    chi2 = float(np.divide(difference**2, spread, out=np.zeros_like(spread), where=spread > 0).sum())
    degrees = len(bins.count) - 2 if df is None else df
    return chi2, degrees, float(stats.chi2.sf(chi2, degrees)) if degrees > 0 else float("nan")


def observed_to_expected(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Observed positives over the sum of probabilities; 1 is best, above 1 the model under-predicts."""
    y = as_labels(labels)
    expected = float(as_probabilities(probabilities, n=len(y)).sum())
    return y.sum() / expected if expected else undefined("observed_to_expected", "every probability is 0")


@dataclass(frozen=True)
class Recalibration:
    """logit P(y = 1) = intercept + slope × logit(p)."""

    slope: Estimate
    """1 is best; below 1 the probabilities are too extreme."""
    intercept: Estimate
    """0 is best."""


def clipped_logit(probabilities: FloatArray) -> FloatArray:
    return special.logit(np.clip(probabilities, LOGIT_CLIP, 1 - LOGIT_CLIP))


def logistic_recalibration(
    labels: ArrayLike, probabilities: ArrayLike, *, level: float = 0.95, groups: ArrayLike | None = None
) -> Recalibration:
    """Calibration slope and intercept fitted jointly by maximum likelihood (Cox 1958), with Wald intervals.

    `groups` (N,) of patients give cluster-robust standard errors. Probabilities within 1e-10 of 0 or 1 are moved
    there and `reason` says how many. NaN with a reason when one class is absent, the probabilities are constant,
    or they separate the classes (no finite slope).
    """
    y = as_labels(labels)
    p = as_probabilities(probabilities, n=len(y))
    logit = clipped_logit(p)
    if reason := _no_fit(y, logit):
        return Recalibration(not_estimable(reason), not_estimable(reason))
    design = np.column_stack([np.ones_like(logit), logit])
    return _recalibration(design, y, np.zeros_like(logit), level, groups, note=clip_note(p))


def _recalibration(
    design: FloatArray, y: IntArray, offset: FloatArray, level: float, groups: ArrayLike | None, note: str
) -> Recalibration:
    beta, covariance, method = _fit_logistic(design, y, offset, groups)
    if not np.isfinite(beta).all():
        failed = not_estimable("the maximum-likelihood fit does not converge: the probabilities nearly separate")
        return Recalibration(failed, failed)
    intercept, slope = (
        wald(float(beta[i]), float(np.sqrt(covariance[i, i])), level=level, method=method, reason=note) for i in (0, 1)
    )
    return Recalibration(slope, intercept)


def calibration_in_the_large(
    labels: ArrayLike, probabilities: ArrayLike, *, level: float = 0.95, groups: ArrayLike | None = None
) -> Estimate:
    """The intercept with the slope held at 1: 0 is best, above 0 the model under-predicts. NaN with a reason when
    one class is absent."""
    y = as_labels(labels)
    p = as_probabilities(probabilities, n=len(y))
    if y.min() == y.max():
        return not_estimable(f"all films are of class {y[0]}")
    beta, covariance, method = _fit_logistic(np.ones((len(y), 1)), y, clipped_logit(p), groups)
    return wald(float(beta[0]), float(np.sqrt(covariance[0, 0])), level=level, method=method, reason=clip_note(p))


def clip_note(probabilities: FloatArray) -> str:
    """How many probabilities lie at 0 or 1, for the reader of a logit; '' for none."""
    count = int(((probabilities < LOGIT_CLIP) | (probabilities > 1 - LOGIT_CLIP)).sum())
    return f"{count} probabilities of 0 or 1 were clipped to {LOGIT_CLIP:g} from it" if count else ""


def _no_fit(labels: IntArray, logit: FloatArray) -> str:
    """Why the slope has no finite maximum-likelihood estimate; '' when it has one."""
    if labels.min() == labels.max():
        return f"all films are of class {labels[0]}"
    if np.ptp(logit) == 0:
        return "every film has the same probability"
    positive, negative = logit[labels == 1], logit[labels == 0]
    if positive.min() >= negative.max() or positive.max() <= negative.min():
        return "the probabilities separate the classes: no finite slope"
    return ""


def _fit_logistic(
    design: FloatArray, y: IntArray, offset: FloatArray, groups: ArrayLike | None
) -> tuple[FloatArray, FloatArray, str]:
    """Maximum likelihood for one or two coefficients: (coefficients, covariance, how the covariance was made).

    By hand because statsmodels needs 20 times the memory at 10⁶ films and warns instead of failing. NaN without
    convergence.
    """
    beta, inverse = _newton(design, y, offset)
    codes = as_groups(None if groups is None else np.asarray(groups), n=len(y))
    clusters = int(codes.max()) + 1
    if clusters == len(y):
        return beta, inverse, "Wald, maximum likelihood"
    residual = y - special.expit(design @ beta + offset)
    score = sum_by_group(design * residual[:, None], codes)
    sandwich = inverse @ (score.T @ score) @ inverse
    # One patient leaves no variance between patients.
    factor = clusters / (clusters - 1) if clusters > 1 else float("nan")
    return beta, sandwich * factor, "Wald, clustered by patient (sandwich)"


def _newton(design: FloatArray, y: IntArray, offset: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Coefficients and inverse information; NaN without convergence in 100 steps."""
    beta = np.zeros(design.shape[1])
    # Offset or slope 1, intercept 0: the probabilities as they stand.
    beta[1:] = 1.0
    loss = _negative_log_likelihood(design, y, offset, beta)
    for _ in range(100):
        probability = special.expit(design @ beta + offset)
        information = design.T @ (design * (probability * (1 - probability))[:, None])
        if np.linalg.cond(information) > 1e15:
            break
        step = np.linalg.solve(information, design.T @ (y - probability))
        # Newton can overshoot far from the optimum; the likelihood is concave, so halving suffices.
        while (tried := _negative_log_likelihood(design, y, offset, beta + step)) > loss + 1e-9 * abs(loss):
            step = step / 2
        beta, loss = beta + step, tried
        if np.abs(step).max() < 1e-10:
            return beta, np.asarray(np.linalg.inv(information), dtype=np.float64)
    return np.full_like(beta, np.nan), np.full((len(beta), len(beta)), np.nan)


def _negative_log_likelihood(design: FloatArray, y: IntArray, offset: FloatArray, beta: FloatArray) -> float:
    eta = design @ beta + offset
    return float((np.logaddexp(0, eta) - y * eta).sum())


def fit_temperature(logits_NC: ArrayLike, labels_N: ArrayLike) -> float:
    """The temperature T > 0 that minimises the log loss of softmax(logits / T) (Guo 2017); above 1 it softens.

    `logits_NC` (N, C), or (N,) / (N, 1) of the positive class. 1.0 where the loss has no minimum between 0.02 and
    50: all films right (T → 0), or logits no better than chance (T → ∞).
    """
    z = np.asarray(logits_NC, dtype=np.float64)
    z = z[:, None] if z.ndim == 1 else z
    if z.shape[1] == 1:
        z = np.column_stack([np.zeros(len(z)), z[:, 0]])
    if not np.isfinite(z).all():
        raise DataError(
            f"row {np.flatnonzero(~np.isfinite(z).all(axis=1))[0]}: logits are not finite; temperature needs them"
        )
    y = as_labels(labels_N, n_classes=z.shape[1])
    if len(y) != len(z):
        raise DataError(f"{len(z)} rows of logits but {len(y)} labels")
    truth = z[np.arange(len(y)), y].mean()

    def slope(inverse_temperature: float) -> float:
        weights = special.softmax(z * inverse_temperature, axis=1)
        return float(np.einsum("nc,nc->", weights, z) / len(y) - truth)

    low, high = 1 / TEMPERATURE_RANGE[1], 1 / TEMPERATURE_RANGE[0]
    # The loss is convex in 1/T: an inner minimum exists just when its slope changes sign.
    if slope(low) >= 0 or slope(high) <= 0:
        return 1.0
    return 1 / float(optimize.brentq(slope, low, high, xtol=1e-12))


def apply_temperature(logits_NC: ArrayLike, temperature: float) -> FloatArray:
    """softmax(logits / T) (N, C)."""
    if not temperature > 0:
        raise DataError(f"temperature {temperature!r} is not above 0")
    return np.asarray(special.softmax(np.asarray(logits_NC, dtype=np.float64) / temperature, axis=1))


@dataclass(frozen=True)
class IsotonicMap:
    """A non-decreasing, piecewise linear map of probabilities, flat beyond its ends."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __call__(self, probabilities: ArrayLike) -> FloatArray:
        return np.interp(np.asarray(probabilities, dtype=np.float64), self.x, self.y)


def fit_isotonic(labels: ArrayLike, probabilities: ArrayLike) -> IsotonicMap:
    """Isotonic regression of the outcome on the probability (Zadrozny & Elkan 2002), fitted on validation films."""
    y = as_labels(labels)
    p = as_probabilities(probabilities, n=len(y))
    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(p, y)
    return IsotonicMap(tuple(map(float, model.X_thresholds_)), tuple(map(float, model.y_thresholds_)))


def adjust_prior(probabilities: ArrayLike, *, prior_from: ArrayLike, prior_to: ArrayLike) -> FloatArray:
    """Probabilities for another prevalence (Saerens 2002), the class-conditional scores being the same.

    (N,) of the positive class with two prevalences, or (N, K) with two vectors (K,) that sum to 1.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    refuse_nan(p, "probabilities")
    before, after = (np.asarray(prior, dtype=np.float64) for prior in (prior_from, prior_to))
    if p.ndim == 1:
        return adjust_prior(
            np.column_stack([1 - p, p]),
            prior_from=np.array([1 - before, before]),
            prior_to=np.array([1 - after, after]),
        )[:, 1]
    if (before <= 0).any() or (before >= 1).any() or (after < 0).any() or (after > 1).any():
        raise DataError("priors lie in [0, 1], and the one the model was trained at strictly inside")
    weighted = p * (after / before)
    return weighted / weighted.sum(axis=1, keepdims=True)
