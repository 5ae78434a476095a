"""Agreement between raters, beyond chance: the kappa family, with intervals.

Two raters              cohen_kappa, kappa_from_table, pairwise_kappa (all pairs, Light's mean)
Any number of raters    fleiss_kappa, conger_kappa, gwet_ac, krippendorff_alpha

1 is perfect, 0 what chance gives, below 0 worse. Ratings of several raters are a table (subjects, raters) of numbers
or strings; a missing one is NaN, None or ''. Two standard errors exist: that at the estimate (for intervals) and that
under no agreement (only to test kappa = 0); they are kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from errors import DataError, nearest
from estimates import Estimate, FloatArray, IntArray, not_estimable, wald

WEIGHTS = ("unweighted", "linear", "quadratic")


@dataclass(frozen=True)
class Kappa:
    """Kappa of two raters with its interval, and the test of no agreement."""

    estimate: Estimate
    se_null: float
    """Standard error if the raters agreed by chance only."""
    z_null: float
    p_null: float
    """Two-sided."""


def category_weights(values: ArrayLike, weights: str) -> FloatArray:
    """Agreement weights (q, q) of categories: 1 on the diagonal; linear and quadratic fall with the distance.

    `values` are the categories' numbers, or their ranks where they are names.
    """
    if weights not in WEIGHTS:
        raise DataError(f"weights {weights!r} are not one of {', '.join(WEIGHTS)}{nearest(weights, WEIGHTS)}")
    position = np.asarray(values, dtype=np.float64)
    if weights == "unweighted" or len(position) < 2:
        return np.eye(len(position))
    distance = np.abs(position[:, None] - position) / np.ptp(position)
    return 1 - (distance if weights == "linear" else distance**2)


def cohen_kappa(
    first: ArrayLike,
    second: ArrayLike,
    *,
    weights: str = "unweighted",
    categories: Sequence[Any] | None = None,
    level: float = 0.95,
) -> Kappa:
    """Cohen's kappa of two raters (N,) each; films that one of them left out are dropped.

    `weights` unweighted, linear or quadratic, by position in `categories` (default: the sorted ratings present; give
    the whole scale for ordered ones). See `kappa_from_table`.
    """
    ratings = _as_ratings(np.column_stack([_as_object(first), _as_object(second)]), categories)
    both = (ratings.codes >= 0).all(axis=1)
    a, b = ratings.codes[both].T
    table = np.bincount(a * ratings.size + b, minlength=ratings.size**2).reshape(ratings.size, ratings.size)
    return kappa_from_table(table, weights=weights, level=level)


def kappa_from_table(table: ArrayLike, *, weights: str = "unweighted", level: float = 0.95) -> Kappa:
    """Kappa from the square table of counts of two raters, in [−1, 1].

    Asymptotic standard errors of Fleiss, Cohen & Everitt 1969: at the estimate for the Wald interval (as vcd), under
    the null for the test (as irr). The limits are not cut at 1 (nor are vcd's). NaN with a reason where chance
    agreement is complete (one category only).
    """
    counts = np.asarray(table, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise DataError(f"a table of two raters is square, but this one has shape {counts.shape}")
    n = counts.sum()
    if n == 0:
        return _no_kappa("no subject was rated by both")
    w = category_weights(np.arange(len(counts)), weights)
    p = counts / n
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    observed, expected = (w * p).sum(), (w * np.outer(rows, columns)).sum()
    if expected >= 1 - 1e-12:
        return _no_kappa("both raters used one category only")
    kappa = (observed - expected) / (1 - expected)
    # Mean weight of each row and column category against the other rater.
    marginal = (w @ columns)[:, None] + (rows @ w)[None, :]
    at_estimate = (p * (w - marginal * (1 - kappa)) ** 2).sum() - (kappa - expected * (1 - kappa)) ** 2
    at_null = (np.outer(rows, columns) * (w - marginal) ** 2).sum() - expected**2
    scale = (1 - expected) * np.sqrt(n)
    se, se_null = np.sqrt(max(0.0, at_estimate)) / scale, np.sqrt(max(0.0, at_null)) / scale
    z = kappa / se_null if se_null else float("nan")
    estimate = wald(kappa, se, level=level, method="Wald, Fleiss-Cohen-Everitt standard error")
    return Kappa(estimate, float(se_null), float(z), float(2 * stats.norm.sf(abs(z))))


def _no_kappa(reason: str) -> Kappa:
    nan = float("nan")
    return Kappa(not_estimable(reason), nan, nan, nan)


@dataclass(frozen=True)
class PairwiseKappa:
    """Kappa of every pair of raters."""

    pairs: dict[tuple[str, str], Kappa]
    light: float
    """Their mean (Light 1971)."""


def pairwise_kappa(
    ratings: ArrayLike,
    *,
    raters: Sequence[str] | None = None,
    weights: str = "unweighted",
    categories: Sequence[Any] | None = None,
    level: float = 0.95,
) -> PairwiseKappa:
    """Cohen's kappa of all pairs of columns of `ratings` (subjects, raters), and Light's mean of them."""
    table = _as_object(ratings)
    names = [str(rater) for rater in (range(1, table.shape[1] + 1) if raters is None else raters)]
    scale = _as_ratings(table, categories).categories
    pairs = {
        (names[i], names[j]): cohen_kappa(table[:, i], table[:, j], weights=weights, categories=scale, level=level)
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }
    return PairwiseKappa(pairs, float(np.mean([kappa.estimate.value for kappa in pairs.values()])))


@dataclass(frozen=True)
class _Ratings:
    """A table of ratings as category numbers."""

    codes: IntArray
    """(subjects, raters), −1 where missing."""
    categories: list[Any]

    @property
    def size(self) -> int:
        return len(self.categories)

    @property
    def counts(self) -> FloatArray:
        """How many raters put each subject in each category (subjects, q)."""
        return np.stack([(self.codes == k).sum(axis=1) for k in range(self.size)], axis=1).astype(np.float64)

    def values(self) -> FloatArray:
        """The categories as numbers; their ranks where they are names."""
        try:
            return np.array([float(category) for category in self.categories])
        except (TypeError, ValueError):
            return np.arange(self.size, dtype=np.float64)


def _as_object(ratings: ArrayLike) -> NDArray[np.object_]:
    return np.asarray(ratings).astype(object)


def _missing(item: Any) -> bool:
    return item is None or item != item or item == ""


def _as_ratings(ratings: ArrayLike, categories: Sequence[Any] | None) -> _Ratings:
    table = _as_object(ratings)
    if table.ndim != 2 or table.shape[1] < 2:
        raise DataError(f"ratings have shape {table.shape}; expected one row per subject and at least two raters")
    present = {item for item in table.ravel() if not _missing(item)}
    try:
        known = sorted(present) if categories is None else list(categories)
    except TypeError:
        known = sorted(present, key=str)
    if unknown := present - set(known):
        raise DataError(f"rating {next(iter(unknown))!r} is not one of the categories {known}")
    number = {category: index for index, category in enumerate(known)}
    codes = np.array([[-1 if _missing(item) else number[item] for item in row] for row in table], dtype=np.int64)
    return _Ratings(codes.reshape(table.shape), known)


@dataclass(frozen=True)
class MultiKappa:
    """A kappa of several raters."""

    estimate: Estimate
    se_null: float = float("nan")
    """Standard error if the raters agreed by chance only (Fleiss 1979); for the test alone."""
    z_null: float = float("nan")
    p_null: float = float("nan")
    per_category: dict[Any, float] = field(default_factory=dict)
    """Kappa of each category against all others."""
    per_category_z: dict[Any, float] = field(default_factory=dict)


def fleiss_kappa(
    ratings: ArrayLike,
    *,
    weights: str = "unweighted",
    categories: Sequence[Any] | None = None,
    level: float = 0.95,
) -> MultiKappa:
    """Fleiss' kappa of `ratings` (subjects, raters) (1971), missing ones allowed.

    The interval uses Gwet's standard error at the estimate with Student's t on subjects − 1 (as irrCAC). The null SE,
    z and the per-category kappas (as irr's kappam.fleiss) need unweighted, complete ratings; else they are NaN or
    empty.
    """
    r = _as_ratings(ratings, categories)
    w = category_weights(r.values(), weights)
    counts = r.counts
    if reason := _too_few(counts):
        return MultiKappa(not_estimable(reason))
    share = _mean_share(counts)
    chance = float(share @ w @ share)
    if chance >= 1 - 1e-12:
        return MultiKappa(not_estimable("all ratings are in one category"))
    chance_by_subject = (counts @ ((w + w.T) @ share / 2)) / np.maximum(counts.sum(axis=1), 1)
    estimate = _gwet_estimate(counts, w, chance, chance_by_subject, level, "Fleiss")
    if weights != "unweighted" or (r.codes < 0).any():
        return MultiKappa(estimate)
    return _with_null_test(estimate, counts, r.categories)


def _too_few(counts: FloatArray) -> str:
    """Why no coefficient can be computed; '' when it can."""
    rated_twice = int((counts.sum(axis=1) >= 2).sum())
    return "" if rated_twice >= 2 else f"{rated_twice} subjects have two ratings or more"


def _mean_share(counts: FloatArray) -> FloatArray:
    """Mean over subjects of the share of their ratings in each category (q,)."""
    rated = counts[counts.sum(axis=1) > 0]
    return (rated / rated.sum(axis=1, keepdims=True)).mean(axis=0)


def _pair_agreement(counts: FloatArray, w: FloatArray) -> FloatArray:
    """Weighted share of agreeing pairs of raters per subject; NaN with fewer than two ratings."""
    raters = counts.sum(axis=1)
    agreeing = (counts * (counts @ w.T - 1)).sum(axis=1)
    return np.divide(agreeing, raters * (raters - 1), out=np.full(len(raters), np.nan), where=raters >= 2)


def _gwet_estimate(
    counts: FloatArray, w: FloatArray, chance: float, chance_by_subject: FloatArray, level: float, name: str
) -> Estimate:
    """(agreement − chance)/(1 − chance) with the linearised variance over subjects of Gwet 2008 and 2014."""
    rated = counts.sum(axis=1) > 0
    agreement, chance_by_subject = _pair_agreement(counts[rated], w), chance_by_subject[rated]
    n, twice = len(agreement), ~np.isnan(agreement)
    value = float((agreement[twice].mean() - chance) / (1 - chance))
    pairs = np.where(twice, n / twice.sum() * (np.nan_to_num(agreement) - chance), 0.0) / (1 - chance)
    linearised = pairs - 2 * (1 - value) * (chance_by_subject - chance) / (1 - chance)
    se = float(np.sqrt(((linearised - value) ** 2).sum() / (n * (n - 1))))
    return wald(value, se, level=level, method=f"{name}, Gwet's linearised variance, t", high=1.0, df=n - 1)


def _with_null_test(estimate: Estimate, counts: FloatArray, categories: Sequence[Any]) -> MultiKappa:
    """Fleiss, Nee & Landis 1979: variances under no agreement, the same number of raters for every subject."""
    n, raters = len(counts), counts.sum(axis=1)[0]
    p = counts.sum(axis=0) / (n * raters)
    spread = p * (1 - p)
    skew = (spread * (1 - 2 * p)).sum()
    scale = n * raters * (raters - 1)
    se_null = float(np.sqrt(2 * (spread.sum() ** 2 - skew)) / (spread.sum() * np.sqrt(scale)))
    z = estimate.value / se_null
    used = spread > 0
    within = (counts * (raters - counts)).sum(axis=0)[used]
    by_category = 1 - within / (scale * spread[used])
    labels = [category for category, flag in zip(categories, used) if flag]
    return MultiKappa(
        estimate,
        se_null,
        float(z),
        float(2 * stats.norm.sf(abs(z))),
        dict(zip(labels, map(float, by_category))),
        dict(zip(labels, map(float, by_category / np.sqrt(2 / scale)))),
    )


def gwet_ac(
    ratings: ArrayLike,
    *,
    weights: str = "unweighted",
    categories: Sequence[Any] | None = None,
    level: float = 0.95,
) -> Estimate:
    """Gwet's AC1 (unweighted) or AC2 (linear, quadratic) of `ratings` (subjects, raters), missing ones allowed.

    Steady where one category dominates and kappa collapses (Gwet 2008). Interval with Student's t (as irrCAC). NaN
    with a reason where all ratings are in one category or fewer than two subjects have two ratings.
    """
    r = _as_ratings(ratings, categories)
    counts, q = r.counts, r.size
    if reason := _too_few(counts):
        return not_estimable(reason)
    if q < 2:
        return not_estimable("all ratings are in one category; give the whole scale as categories")
    w = category_weights(r.values(), weights)
    share = _mean_share(counts)
    scale = w.sum() / (q * (q - 1))
    chance = float(scale * (share * (1 - share)).sum())
    chance_by_subject = scale * (counts @ (1 - share)) / np.maximum(counts.sum(axis=1), 1)
    name = "AC1" if weights == "unweighted" else "AC2"
    return _gwet_estimate(counts, w, chance, chance_by_subject, level, name)


def conger_kappa(
    ratings: ArrayLike,
    *,
    weights: str = "unweighted",
    categories: Sequence[Any] | None = None,
    level: float = 0.95,
) -> Estimate:
    """Conger's exact kappa of `ratings` (subjects, raters) (1980): each rater keeps its own marginal distribution.

    With two raters it is Cohen's. Complete ratings only. Jackknife interval over subjects with Student's t.
    """
    r = _as_ratings(ratings, categories)
    if (r.codes < 0).any():
        missing = int((r.codes < 0).sum())
        raise DataError(f"Conger's kappa needs complete ratings, but {missing} are missing; use fleiss_kappa")
    w = category_weights(r.values(), weights)
    if len(r.codes) < 2:
        return not_estimable("fewer than two subjects")
    value = _conger(r.codes, w)
    if np.isnan(value):
        return not_estimable("all ratings are in one category")
    without = np.array([_conger(np.delete(r.codes, i, axis=0), w) for i in range(len(r.codes))])
    return _jackknife(value, without, level=level, name="Conger")


def _conger(codes: IntArray, w: FloatArray) -> float:
    raters = codes.shape[1]
    one_hot = np.eye(len(w))[codes]
    observed = np.nanmean(_pair_agreement(one_hot.sum(axis=1), w))
    marginals = one_hot.mean(axis=0)
    total = marginals.sum(axis=0)
    same_rater = np.einsum("rk,kl,rl->", marginals, w, marginals)
    expected = (total @ w @ total - same_rater) / (raters * (raters - 1))
    return float((observed - expected) / (1 - expected)) if expected < 1 - 1e-12 else float("nan")


def _jackknife(value: float, without: FloatArray, *, level: float, name: str) -> Estimate:
    n = len(without)
    se = float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))
    if np.isnan(se):
        return not_estimable("leaving out one subject leaves one category only", value=value)
    return wald(value, se, level=level, method=f"{name}, jackknife over subjects, t", high=1.0, df=n - 1)


ALPHA_METRICS = ("nominal", "ordinal", "interval", "ratio")


def krippendorff_alpha(
    ratings: ArrayLike,
    *,
    metric: str = "nominal",
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
    categories: Sequence[Any] | None = None,
) -> Estimate:
    """Krippendorff's alpha of `ratings` (subjects, raters), missing ones allowed: 1 − observed/expected disagreement.

    `metric` nominal, ordinal (ranks in `categories`, or sorted), interval or ratio (numbers). Percentile interval from
    `n_boot` resamples of subjects. NaN with a reason where all ratings are equal or no subject has two.
    """
    if metric not in ALPHA_METRICS:
        raise DataError(f"metric {metric!r} is not one of {', '.join(ALPHA_METRICS)}{nearest(metric, ALPHA_METRICS)}")
    r = _as_ratings(ratings, categories)
    if metric in ("interval", "ratio") and any(not isinstance(item, (int, float, np.number)) for item in r.categories):
        found = r.categories[0]
        raise DataError(f"{metric} alpha needs numbers, but the ratings hold {found!r}; use nominal or ordinal")
    counts = r.counts
    counts = counts[counts.sum(axis=1) >= 2]
    if len(counts) == 0:
        return not_estimable("no subject has two ratings")
    value = _alpha(counts.sum(axis=0)[None], _coincidences(counts).sum(axis=0)[None], r.values(), metric)[0]
    if np.isnan(value):
        return not_estimable("all ratings are in one category")
    if not 0 < level < 1:
        raise DataError(f"confidence level {level!r} is not between 0 and 1; 0.95 is usual")
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=n_boot).astype(np.float64)
    coincidences = np.tensordot(weights, _coincidences(counts), axes=1)
    replicates = _alpha(weights @ counts, coincidences, r.values(), metric)
    # Resamples whose ratings are all equal have no expected disagreement, hence no alpha.
    low, high = np.nanquantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    se = float(np.nanstd(replicates, ddof=1))
    return Estimate(float(value), float(low), float(high), f"bootstrap of subjects, {n_boot} resamples", se)


def _coincidences(counts: FloatArray) -> FloatArray:
    """Each subject's pairs of values by different raters, over raters − 1 (subjects, q, q)."""
    pairs = counts[:, :, None] * counts[:, None, :]
    index = np.arange(counts.shape[1])
    pairs[:, index, index] -= counts
    return pairs / (counts.sum(axis=1) - 1)[:, None, None]


def _alpha(totals: FloatArray, coincidences: FloatArray, values: FloatArray, metric: str) -> FloatArray:
    """Alpha (b,) from category totals (b, q) and coincidence matrices (b, q, q)."""
    distance = _distances(totals, values, metric)
    n = totals.sum(axis=1)
    observed = (coincidences * distance).sum(axis=(1, 2))
    expected = (totals[:, :, None] * totals[:, None, :] * distance).sum(axis=(1, 2)) / (n - 1)
    return 1 - np.divide(observed, expected, out=np.full(len(n), np.nan), where=expected > 0)


def _distances(totals: FloatArray, values: FloatArray, metric: str) -> FloatArray:
    """Squared distances between categories (1 or b, q, q); ordinal ones depend on how often each rank was used."""
    if metric == "ordinal":
        # Midranks: half of either end and all between.
        position = np.cumsum(totals, axis=1) - totals / 2
        return (position[:, :, None] - position[:, None, :]) ** 2
    gap = values[:, None] - values
    if metric == "nominal":
        squared = (gap != 0).astype(np.float64)
    elif metric == "interval":
        squared = gap**2
    else:
        together = values[:, None] + values
        squared = np.divide(gap, together, out=np.zeros_like(gap), where=together != 0) ** 2
    return squared[None]
