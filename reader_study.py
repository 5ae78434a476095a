"""Multi-reader multi-case (MRMC) analysis: do readers do better with one modality than with another?

    python main.py reader_study --table T.csv

Reads a table `reader,modality,case,truth,score` with one row per reading; gives the content of
`reader_study.json`. Never fills in a reading that was not made: a method that needs every cell says which readers
skipped which share of the cases, and the U-statistics take the table as it is.

Methods, each with its paper:
  or     Obuchowski & Rockette 1995 with the degrees of freedom of Hillis 2007, Stat Med 26:596
  dbm    Dorfman, Berbaum & Metz 1992 in the form of Hillis, Berbaum & Metz 2008, Acad Radiol 15:647
  ustat  Gallas 2006, Acad Radiol 13:353 ("one-shot"); Gallas et al. 2009, Commun Stat A 38:2586

Axes: G a reading session (one reader with one modality), K cases, P positive and N negative cases, I modalities,
J readers, U resampling units (cases, or clusters of cases).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from auroc import auroc, newcombe_interval, roc_points
from errors import ConfigError, DataError, examples, nearest
from estimates import tail_probability, two_sided_quantile
from proportions import proportion_interval
from reader_table import (
    CASES_IN_BOTH,
    CASES_IN_MODALITIES,
    CASES_IN_READERS,
    FACTORIAL,
    MIXED,
    Array,
    Readings,
    Study,
    build_study,
    clean_table,
    load_table,
    make_readings,
    require_both_classes,
)

__all__ = ["load_table", "reader_roc_points", "reader_study"]

METHODS = ("or", "dbm", "ustat")
COVARIANCES = ("jackknife", "delong", "bootstrap", "unbiased", "obuchowski")
OWN_COVARIANCE = {"dbm": "jackknife", "ustat": "unbiased"}
"""Methods that leave no choice of covariance."""
HEADLINE = ("difference", "se", "ci_low", "ci_high", "f_statistic", "df_num", "df_den", "p_value")
OUTCOMES = ("auc", "sensitivity", "specificity")


# ------------------------------------------------------------------- covariance of the sessions' outcomes (G × G)


def _placements(data: Readings) -> tuple[Array, Array]:
    """DeLong's structural components less the outcome, (G, P) and (G, N); 0 where unread."""
    theta = data.theta_G[:, None]
    component_GP = data.wins_GP / data.read_GN.sum(axis=1)[:, None]
    component_GN = data.wins_GN / data.read_GP.sum(axis=1)[:, None]
    return (component_GP - theta) * data.read_GP, (component_GN - theta) * data.read_GN


def _delong(data: Readings) -> Array:
    """DeLong, DeLong & Clarke-Pearson 1988, Biometrics 44:837; sessions with no case in common get 0."""
    scaled = [
        part / np.sqrt(read.sum(axis=1) * (read.sum(axis=1) - 1))[:, None]
        for part, read in zip(_placements(data), (data.read_GP, data.read_GN))
    ]
    return np.asarray(sum(part @ part.T for part in scaled))


def _obuchowski(data: Readings) -> Array:
    """Obuchowski 1997, Biometrics 53:567: clusters may hold positive and negative cases."""
    part_GP, part_GN = _placements(data)
    positive = part_GP @ _membership(data.unit_P, data.units)
    negative = part_GN @ _membership(data.unit_N, data.units)
    with_positive, with_negative = len(np.unique(data.unit_P)), len(np.unique(data.unit_N))
    if min(with_positive, with_negative) < 2:
        raise DataError(
            "reader study: all cases of one truth are in one cluster, so no covariance between clusters exists; "
            "name another cluster column or leave it out"
        )
    count_P, count_N = len(data.unit_P), len(data.unit_N)
    cross = positive @ negative.T
    return np.asarray(
        with_positive / (with_positive - 1) * (positive @ positive.T) / count_P**2
        + with_negative / (with_negative - 1) * (negative @ negative.T) / count_N**2
        + data.units / (data.units - 1) * (cross + cross.T) / (count_P * count_N)
    )


def _membership(unit: NDArray[np.intp], units: int) -> Array:
    """(cases, units) indicator; an all-zero row for a stand-in."""
    return np.asarray((unit[:, None] == np.arange(units)[None, :]).astype(float))


def _leave_one_out(data: Readings) -> Array:
    """(G, U) outcome of each session without each unit; the full outcome where it did not read the unit."""
    member_P, member_N = _membership(data.unit_P, data.units), _membership(data.unit_N, data.units)
    left = data.wins_GP.sum(axis=1)[:, None] - data.wins_GP @ member_P - data.wins_GN @ member_N
    if data.clustered:
        # Pairs within the unit were taken off twice.
        within_GPN = data.success_GPN * (data.unit_P[:, None] == data.unit_N[None, :])
        left += within_GPN.sum(axis=2) @ member_P
    positives = data.read_GP.sum(axis=1)[:, None] - data.read_GP @ member_P
    negatives = data.read_GN.sum(axis=1)[:, None] - data.read_GN @ member_N
    if (positives * negatives == 0).any():
        raise DataError(
            "reader study: one cluster holds every positive or every negative case of a reader, so the jackknife "
            "cannot leave it out; name another cluster column or leave it out"
        )
    return np.asarray(left / (positives * negatives))


def _jackknife(data: Readings) -> Array:
    """(n - 1)/n times the cross-products of the centred leave-one-out outcomes (Efron 1982)."""
    centred = _leave_one_out(data)
    centred = centred - centred.mean(axis=1, keepdims=True)
    return np.asarray((data.units - 1) / data.units * (centred @ centred.T))


def _bootstrap(data: Readings, *, n_boot: int, seed: int) -> Array:
    """Covariance over resamples of the cases within each truth, or of whole clusters where there are clusters."""
    generator = np.random.default_rng(seed)
    if data.clustered:
        count_BU = generator.multinomial(data.units, np.full(data.units, 1 / data.units), size=n_boot).astype(float)
        weight_BP, weight_BN = _unit_weights(count_BU, data.unit_P), _unit_weights(count_BU, data.unit_N)
    else:
        weight_BP, weight_BN = (_case_weights(generator, unit, n_boot) for unit in (data.unit_P, data.unit_N))
    pairs_BG = (weight_BP @ data.read_GP.T) * (weight_BN @ data.read_GN.T)
    kept = (pairs_BG > 0).all(axis=1)
    if kept.sum() < n_boot / 2:
        raise DataError("reader study: most bootstrap resamples lack a class; use covariance jackknife")
    hits_GB = np.stack([((weight_BP[kept] @ part) * weight_BN[kept]).sum(axis=1) for part in data.success_GPN])
    return np.atleast_2d(np.cov(hits_GB / pairs_BG[kept].T))


def _case_weights(generator: np.random.Generator, unit: NDArray[np.intp], n_boot: int) -> Array:
    if (unit < 0).all():
        return np.ones((n_boot, len(unit)))
    return generator.multinomial(len(unit), np.full(len(unit), 1 / len(unit)), size=n_boot).astype(float)


def _unit_weights(count_BU: Array, unit: NDArray[np.intp]) -> Array:
    return np.where(unit < 0, 1.0, count_BU[:, unit])


def _unbiased(top: Array, bottom: Array) -> Array:
    """Product of two outcomes less the unbiased estimate of the product of their expectations (Gallas 2007)."""
    biased = top[3] / bottom[3]
    return np.asarray(biased - np.tensordot(_APART, top, 1) / np.tensordot(_APART, bottom, 1))


_APART = np.array([1.0, -1.0, -1.0, 1.0])
"""Takes the sums of `_moment_sums` to the sum over pairs that share neither a positive nor a negative case."""


def _moment_sums(data: Readings) -> tuple[Array, Array]:
    """(4, G, G) sums of products of successes of two sessions, and how many products each sum holds.

    The pairs of products share: both cases, the positive, the negative, or are any (Gallas 2006, appendix).
    """
    flat = data.success_GPN.reshape(len(data.success_GPN), -1)
    by_positive, by_negative, total = data.wins_GP, data.wins_GN, data.wins_GP.sum(axis=1)
    same_positive, same_negative = data.read_GP @ data.read_GP.T, data.read_GN @ data.read_GN.T
    positives, negatives = data.read_GP.sum(axis=1), data.read_GN.sum(axis=1)
    sums = (flat @ flat.T, by_positive @ by_positive.T, by_negative @ by_negative.T, np.outer(total, total))
    counts = (
        same_positive * same_negative,
        same_positive * np.outer(negatives, negatives),
        same_negative * np.outer(positives, positives),
        np.outer(data.pairs_G, data.pairs_G),
    )
    return np.stack(sums), np.stack(counts)


def _covariance(data: Readings, study: Study, *, covariance: str, n_boot: int, seed: int) -> Array:
    if covariance == "bootstrap":
        return _bootstrap(data, n_boot=n_boot, seed=seed)
    if covariance in ("unbiased", "delong") and data.clustered:
        raise ConfigError(f"covariance {covariance!r} knows no clusters; use obuchowski, jackknife or bootstrap")
    if covariance == "obuchowski" and study.design != FACTORIAL:
        raise ConfigError(f"covariance 'obuchowski' needs a factorial design, not {study.design}; use jackknife")
    makers: dict[str, Callable[[Readings], Array]] = {
        "delong": _delong,
        "jackknife": _jackknife,
        "unbiased": lambda readings: _unbiased(*_moment_sums(readings)),
        "obuchowski": _obuchowski,
    }
    return makers[covariance](data)


# ----------------------------------------------------------------------------------------- Obuchowski-Rockette


@dataclass(frozen=True)
class Components:
    """Error variance and covariances of the Obuchowski-Rockette model, averaged over the sessions they concern."""

    error: float
    cov1: float
    """Same reader, different modalities."""
    cov2: float
    """Different readers, same modality."""
    cov3: float
    """Different readers, different modalities."""

    @property
    def excess(self) -> float:
        """Cov2 - Cov3, which the model bounds by 0 from below (Hillis 2007)."""
        return max(self.cov2 - self.cov3, 0.0)


def _components(cov_GG: Array, study: Study) -> Components:
    """Averages over pairs of sessions; a pair whose cases cannot overlap by design has covariance 0."""
    same_modality = study.modality_G[:, None] == study.modality_G[None, :]
    same_reader = study.reader_G[:, None] == study.reader_G[None, :]
    pairs = (~same_modality & same_reader, same_modality & ~same_reader, ~same_modality & ~same_reader)
    cov1, cov2, cov3 = (float(cov_GG[chosen].mean()) if chosen.any() else 0.0 for chosen in pairs)
    if study.design in (CASES_IN_READERS, CASES_IN_BOTH):
        cov2 = cov3 = 0.0
    if study.design in (CASES_IN_MODALITIES, CASES_IN_BOTH):
        cov1 = cov3 = 0.0
    return Components(float(np.diag(cov_GG).mean()), cov1, cov2, cov3)


def _mean_squares(theta_G: Array, study: Study) -> dict[str, float]:
    """Two-way ANOVA of the outcomes: T (modality), R (reader), TR; or T and R(T) where readers are nested."""
    by_modality = [theta_G[study.modality_G == i] for i in range(len(study.modalities))]
    count, overall = len(study.modalities), theta_G.mean()
    squares = {"T": math.nan}
    if count > 1:
        squares["T"] = sum(len(v) * (v.mean() - overall) ** 2 for v in by_modality) / (count - 1)
    if not study.crossed:
        within = sum(((v - v.mean()) ** 2).sum() for v in by_modality)
        return squares | {"R(T)": float(within / (len(theta_G) - count))}
    theta_IJ = np.stack(by_modality)
    readers = theta_IJ.shape[1]
    residual = theta_IJ - theta_IJ.mean(axis=1, keepdims=True) - theta_IJ.mean(axis=0) + overall
    if readers > 1:
        squares["R"] = float(count * theta_IJ.mean(axis=0).var(ddof=1))
    if readers > 1 and count > 1:
        squares["TR"] = float((residual**2).sum() / ((count - 1) * (readers - 1)))
    return squares


@dataclass(frozen=True)
class Comparison:
    """A test that all modalities are equal, and what an interval for a difference needs."""

    ms_t: float
    denominator: float
    df_num: int
    df_den: float
    """Infinite for the chi-square test of fixed readers."""
    readers_I: Array
    """Readers per modality."""

    def se(self, a: int, b: int) -> float:
        return math.sqrt((1 / self.readers_I[a] + 1 / self.readers_I[b]) * self.denominator)


def _compare(squares: dict[str, float], parts: Components, study: Study, *, readers: str, cases: str) -> Comparison:
    """Hillis 2007 (crossed) and Hillis 2014, Stat Med 33:330 (readers nested in modalities)."""
    readers_I = np.bincount(study.modality_G).astype(float)
    modalities, sessions = len(readers_I), float(readers_I.sum())
    if study.crossed:
        base, base_df = squares.get("TR", math.nan), (modalities - 1) * (readers_I[0] - 1)
        spread, fixed = readers_I[0], parts.error - parts.cov1 - parts.excess
    else:
        base, base_df = squares["R(T)"], sessions - modalities
        spread = (sessions**2 - float((readers_I**2).sum())) / (sessions * (modalities - 1))
        fixed = parts.error - parts.cov2
    if readers == "fixed":
        denominator, df_den = fixed + spread * parts.excess, math.inf
    elif cases == "fixed":
        denominator, df_den = base, float(base_df)
    else:
        denominator = base + spread * parts.excess
        df_den = _hillis_df(denominator, base, float(base_df))
    return Comparison(squares["T"], denominator, modalities - 1, df_den, readers_I)


def _hillis_df(total: float, mean_square: float, df: float) -> float:
    """Hillis 2007: df·(total/mean_square)²; infinite when the readers do not vary at all."""
    return math.inf if mean_square == 0 else df * (total / mean_square) ** 2


def _modality_mean(
    theta_J: Array, cov_JJ: Array, design: str, *, readers: str, cases: str
) -> tuple[float, float, dict[str, float]]:
    """Standard error and degrees of freedom of one modality's mean over readers, and what they are made of."""
    count = len(theta_J)
    parts = {"var_error": float(np.diag(cov_JJ).mean()), "cov2": 0.0}
    if count > 1 and design not in (CASES_IN_READERS, CASES_IN_BOTH):
        parts["cov2"] = float(cov_JJ[~np.eye(count, dtype=bool)].mean())
    shared = max(parts["cov2"], 0.0)
    if readers == "fixed":
        return math.sqrt(max(parts["var_error"] + (count - 1) * shared, 0.0) / count), math.inf, parts
    parts["ms_r"] = float(theta_J.var(ddof=1))
    if cases == "fixed":
        return math.sqrt(parts["ms_r"] / count), count - 1.0, parts
    total = parts["ms_r"] + count * shared
    return math.sqrt(total / count), _hillis_df(total, parts["ms_r"], count - 1.0), parts


def _obuchowski_rockette(
    study: Study, data: Readings, cov_GG: Array, *, readers: str, cases: str, level: float
) -> dict[str, Any]:
    theta_G = data.theta_G
    parts, squares = _components(cov_GG, study), _mean_squares(theta_G, study)
    means: list[dict[str, Any]] = []
    for i, name in enumerate(study.modalities):
        chosen = study.modality_G == i
        within = cov_GG[np.ix_(chosen, chosen)]
        se, df, made_of = _modality_mean(theta_G[chosen], within, study.design, readers=readers, cases=cases)
        interval = _interval(float(theta_G[chosen].mean()), se, df, level, unit=True)
        means.append({"modality": name, **interval, **made_of})
    result: dict[str, Any] = {"per_modality": means}
    if len(means) > 1:
        comparison = _compare(squares, parts, study, readers=readers, cases=cases)
        result |= _tests(comparison, means, level)
        squares["denominator"] = comparison.denominator
    return result | {
        "per_reader": _per_reader(study, data, np.diag(cov_GG), level),
        "per_reader_difference": _per_reader_difference(study, theta_G, cov_GG, level),
        "mean_squares": squares,
        "variance_components": _variance_components(squares, parts, len(study.modalities)),
    }


def _variance_components(squares: dict[str, float], parts: Components, modalities: int) -> dict[str, float]:
    components = {"error": parts.error, "cov1": parts.cov1, "cov2": parts.cov2, "cov3": parts.cov3}
    if "TR" in squares:
        components["reader"] = (squares["R"] - squares["TR"]) / modalities - parts.cov1 + parts.cov3
        components["reader_by_modality"] = squares["TR"] - parts.error + parts.cov1 + parts.cov2 - parts.cov3
    elif "R(T)" in squares or "R" in squares:
        components["reader"] = squares.get("R(T)", squares.get("R", math.nan)) - parts.error + parts.cov2
    return components


# ------------------------------------------------------------------------------------------ estimates and tests


def _interval(value: float, se: float, df: float, level: float, *, unit: bool = False) -> dict[str, float]:
    """Estimate, standard error and t interval (normal at infinite df); `unit` keeps it within [0, 1].

    NaN limits where the standard error is 0 or undefined: no interval has zero width.
    """
    half = two_sided_quantile(level, df=df) * se if se**2 > _NO_VARIANCE else math.nan
    low, high = value - half, value + half
    if unit:
        low, high = max(low, 0.0), min(high, 1.0)
    return {"estimate": value, "se": se, "df": _finite(df), "ci_low": low, "ci_high": high}


def _finite(df: float) -> float:
    """Degrees of freedom for the report, where an infinite number (a normal reference) is NaN."""
    return df if math.isfinite(df) else math.nan


def _difference(a: dict[str, Any], b: dict[str, Any], se: float, df: float, level: float) -> dict[str, Any]:
    value = a["estimate"] - b["estimate"]
    statistic = value / se if se**2 > _NO_VARIANCE else math.nan
    p_value = math.nan if math.isnan(statistic) else tail_probability(statistic, alternative="two-sided", df=df)
    label = "t" if math.isfinite(df) else "z"
    names = {"first": a["modality"], "second": b["modality"], "comparison": f"{a['modality']} - {b['modality']}"}
    return names | _interval(value, se, df, level) | {label: statistic, "p_value": p_value}


def _tests(comparison: Comparison, means: list[dict[str, Any]], level: float) -> dict[str, Any]:
    """The test that all modalities are equal, every pairwise difference, and the difference of the first two."""
    pairs = [(a, b) for a in range(len(means)) for b in range(a + 1, len(means))]
    pairwise = [_difference(means[a], means[b], comparison.se(a, b), comparison.df_den, level) for a, b in pairs]
    f = comparison.ms_t / comparison.denominator if comparison.denominator > 0 else math.nan
    test: dict[str, Any] = {"test": "F", "f_statistic": f, "df_num": comparison.df_num}
    test["df_den"] = _finite(comparison.df_den)
    if math.isinf(comparison.df_den):
        test |= {"test": "chi2", "chi2": f * comparison.df_num}
        test["p_value"] = float(stats.chi2.sf(test["chi2"], comparison.df_num))
    else:
        test["p_value"] = float(stats.f.sf(f, comparison.df_num, comparison.df_den))
    return test | {"pairwise": pairwise}


def _per_reader(study: Study, data: Readings, variance_G: Array, level: float) -> list[dict[str, Any]]:
    """Each session's outcome; an interval of zero width (all ranked rightly) gives way to a score-type one."""
    rows = []
    for g, (reader, modality) in enumerate(study.sessions):
        read_K = ~np.isnan(study.score_GK[g])
        positive, negative = int((read_K & study.truth_K).sum()), int((read_K & ~study.truth_K).sum())
        value, variance = float(data.theta_G[g]), float(variance_G[g])
        row: dict[str, Any] = {"reader": reader, "modality": modality}
        row |= _interval(value, math.sqrt(max(variance, 0.0)), math.inf, level, unit=True)
        if variance < _NO_VARIANCE:
            row["ci_low"], row["ci_high"], row["interval"] = _score_interval(
                value, data.outcome, positive, negative, level
            )
        rows.append(row | {"n_positive": positive, "n_negative": negative})
    return rows


def _score_interval(value: float, outcome: str, positive: int, negative: int, level: float) -> tuple[float, float, str]:
    why = "as the estimated variance is 0"
    if outcome == "auc":
        return *newcombe_interval(value, n_pos=positive, n_neg=negative, level=level), f"Newcombe 2006, {why}"
    n = positive if outcome == "sensitivity" else negative
    return *proportion_interval(value * n, n, level=level, method="wilson"), f"Wilson, {why}"


_NO_VARIANCE = 1e-18
"""What rounding leaves of a variance of 0."""


def _per_reader_difference(study: Study, theta_G: Array, cov_GG: Array, level: float) -> list[dict[str, Any]]:
    """Each reader's differences, from that reader's own error variance and Cov1 (for these readers alone)."""
    if not study.crossed or len(study.modalities) < 2:
        return []
    rows = []
    for j, reader in enumerate(study.readers):
        of_reader = np.flatnonzero(study.reader_G == j)
        block = cov_GG[np.ix_(of_reader, of_reader)]
        off = block[~np.eye(len(block), dtype=bool)].mean()
        cov1 = 0.0 if study.design in (CASES_IN_MODALITIES, CASES_IN_BOTH) else float(off)
        se = math.sqrt(max(2 * (float(np.diag(block).mean()) - cov1), 0.0))
        rows += _reader_rows(study, theta_G[of_reader], reader, se=se, df=math.inf, level=level)
    return rows


def _reader_rows(
    study: Study, theta_I: Array, reader: str, *, se: float, df: float, level: float
) -> list[dict[str, Any]]:
    ends = [{"modality": name, "estimate": float(value)} for name, value in zip(study.modalities, theta_I)]
    pairs = [(a, b) for k, a in enumerate(ends) for b in ends[k + 1 :]]
    return [{"reader": reader} | _difference(a, b, se, df, level) for a, b in pairs]


# --------------------------------------------------------------------------------------- Dorfman-Berbaum-Metz


def _dorfman_berbaum_metz(study: Study, data: Readings, *, readers: str, cases: str, level: float) -> dict[str, Any]:
    """Three-way ANOVA of jackknife pseudovalues, with the denominators and df of Hillis, Berbaum & Metz 2008."""
    if study.design != FACTORIAL:
        raise ConfigError(f"method 'dbm' needs a factorial design, not {study.design}; use method or or ustat")
    units = data.units
    pseudo_GU = units * data.theta_G[:, None] - (units - 1) * _leave_one_out(data)
    pseudo_IJK = pseudo_GU.reshape(len(study.modalities), len(study.readers), units)
    means = []
    for name, pseudo_JK in zip(study.modalities, pseudo_IJK):
        se, df = _dbm_mean(_anova(pseudo_JK, "RC"), *pseudo_JK.shape, readers=readers, cases=cases)
        means.append({"modality": name} | _interval(float(pseudo_JK.mean()), se, df, level, unit=True))
    variance_G = pseudo_GU.var(axis=1, ddof=1) / units
    result: dict[str, Any] = {"per_modality": means, "per_reader": _per_reader(study, data, variance_G, level)}
    squares = _anova(pseudo_IJK, "TRC") if len(means) > 1 else _anova(pseudo_IJK[0], "RC")
    if len(means) > 1:
        comparison = _dbm_compare(squares, pseudo_IJK.shape, readers=readers, cases=cases)
        result |= _tests(comparison, means, level) | {"per_reader_difference": []}
        for j, reader in enumerate(study.readers):
            of_reader = _anova(pseudo_IJK[:, j], "TC")
            se, df = math.sqrt(2 * of_reader["TC"] / units), (len(means) - 1.0) * (units - 1)
            rows = _reader_rows(study, pseudo_IJK[:, j].mean(axis=1), reader, se=se, df=df, level=level)
            result["per_reader_difference"] += rows
        result["variance_components"] = _dbm_components(squares, pseudo_IJK.shape)
        squares["denominator"] = comparison.denominator * units
    return result | {"mean_squares": squares}


def _anova(values: Array, names: str) -> dict[str, float]:
    """Mean squares of every effect of a full crossing with one value per cell; `names` has a letter per axis."""
    squares: dict[str, float] = {}
    effects: dict[frozenset[int], Array] = {frozenset(): np.asarray(values.mean(keepdims=True))}
    axes = range(values.ndim)
    for effect in sorted((frozenset(a for a in axes if code >> a & 1) for code in range(1, 2**values.ndim)), key=len):
        averaged = values.mean(axis=tuple(a for a in axes if a not in effect), keepdims=True)
        effects[effect] = averaged - sum(part for inner, part in effects.items() if inner < effect)
        freedom = math.prod(values.shape[a] - 1 for a in effect)
        repeats = values.size / effects[effect].size
        name = "".join(names[a] for a in sorted(effect))
        squares[name] = float(repeats * (effects[effect] ** 2).sum() / freedom) if freedom else math.nan
    return squares


def _dbm_compare(squares: dict[str, float], shape: tuple[int, ...], *, readers: str, cases: str) -> Comparison:
    modalities, count, units = shape
    base_df = float((modalities - 1) * (count - 1))
    if readers == "fixed":
        denominator, df = squares["TC"], float((modalities - 1) * (units - 1))
    elif cases == "fixed":
        denominator, df = squares["TR"], base_df
    else:
        denominator = squares["TR"] + max(squares["TC"] - squares["TRC"], 0.0)
        df = _hillis_df(denominator, squares["TR"], base_df)
    # Pseudovalues are on the scale of one case: dividing by their number gives Comparison the scale of outcomes.
    return Comparison(squares["T"] / units, denominator / units, modalities - 1, df, np.full(modalities, float(count)))


def _dbm_mean(squares: dict[str, float], count: int, units: int, *, readers: str, cases: str) -> tuple[float, float]:
    if readers == "fixed":
        return math.sqrt(squares["C"] / (count * units)), units - 1.0
    if cases == "fixed":
        return math.sqrt(squares["R"] / (count * units)), count - 1.0
    total = squares["R"] + max(squares["C"] - squares["RC"], 0.0)
    return math.sqrt(total / (count * units)), _hillis_df(total, squares["R"], count - 1.0)


def _dbm_components(squares: dict[str, float], shape: tuple[int, ...]) -> dict[str, float]:
    modalities, count, units = shape
    ms = squares
    return {
        "reader": (ms["R"] - ms["TR"] - ms["RC"] + ms["TRC"]) / (modalities * units),
        "case": (ms["C"] - ms["TC"] - ms["RC"] + ms["TRC"]) / (modalities * count),
        "reader_by_modality": (ms["TR"] - ms["TRC"]) / units,
        "modality_by_case": (ms["TC"] - ms["TRC"]) / count,
        "reader_by_case": (ms["RC"] - ms["TRC"]) / modalities,
        "error": ms["TRC"],
    }


# ---------------------------------------------------------------------------------------------- U-statistics


@dataclass(frozen=True)
class Moments:
    """The covariance of two modalities' reader-averaged outcomes, and the parts its df is made of (Gallas 2009)."""

    covariance: float
    biased_NDR: Array
    """Biased components of variance of negative cases, positive cases and readers."""
    df_NDR: Array
    shared_readers: int


def _moments(sums: Array, counts: Array, study: Study, a: int, b: int) -> Moments:
    """Equations 13-19 of Gallas et al. 2009: eight moments by which of reader, negative and positive are shared."""
    pair = np.ix_(study.modality_G == a, study.modality_G == b)
    same_reader = (study.reader_G[:, None] == study.reader_G[None, :])[pair]
    top = np.array([[s[pair][same_reader].sum() for s in sums], [s[pair].sum() for s in sums]])
    bottom = np.array([[c[pair][same_reader].sum() for c in counts], [c[pair].sum() for c in counts]])
    biased = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    apart = np.diff(bottom @ _APART)[0]
    if apart <= 0:
        raise DataError(
            "reader study: no two readings differ in reader, positive and negative case, so the U-statistics have "
            "nothing to compare; more readers or cases are needed"
        )
    covariance = biased[1, 3] - float(np.diff(top @ _APART)[0]) / apart
    shared = bool(same_reader.any())
    biased_NDR = np.array([biased[1, 2], biased[1, 1], biased[0, 3] if shared else biased[1, 3]]) - biased[1, 3]
    share_NDR = np.array([bottom[1, 2], bottom[1, 1], bottom[0, 3]]) / bottom[1, 3]
    with np.errstate(divide="ignore"):
        df_NDR = np.round(1 / share_NDR - 1)
    return Moments(float(covariance), biased_NDR, df_NDR, int(same_reader.sum()))


def _bdg_df(variance: float, biased_NDR: Array, df_NDR: Array) -> float:
    """Satterthwaite df from the components of negatives, positives and readers, at least the smallest of theirs.

    A constant class (sensitivity, specificity) has no component and no say.
    """
    if variance <= 0:
        return math.nan
    varying = biased_NDR != 0
    if not varying.any():
        return math.inf
    spread = float((biased_NDR[varying] ** 2 / df_NDR[varying] ** 3).sum())
    return max(variance**2 / spread, float(df_NDR[varying].min()))


def _u_statistics(study: Study, data: Readings, *, readers: str, level: float) -> dict[str, Any]:
    """Reader-averaged outcomes (weighted by the pairs a reader ranked) and their unbiased variances.

    Random readers: the one-shot variance with t on the df of Gallas 2009. Fixed readers: the unbiased covariances of
    the sessions, with a normal reference.
    """
    if data.clustered:
        raise ConfigError("method 'ustat' knows no clusters; use method or with covariance obuchowski")
    sums, counts = _moment_sums(data)
    cov_GG = _unbiased(sums, counts)
    count = len(study.modalities)
    weight_IG = np.stack([np.where(study.modality_G == i, data.pairs_G, 0.0) for i in range(count)])
    weight_IG /= weight_IG.sum(axis=1, keepdims=True)
    theta_I = weight_IG @ data.theta_G
    if readers == "fixed":
        cov_II, df_II = weight_IG @ cov_GG @ weight_IG.T, np.full((count, count), math.inf)
    else:
        cov_II, df_II = _one_shot(study, sums, counts)
    means = [
        {"modality": name, "variance": float(cov_II[i, i])}
        | _interval(float(theta_I[i]), _root(cov_II[i, i]), df_II[i, i], level, unit=True)
        for i, name in enumerate(study.modalities)
    ]
    result: dict[str, Any] = {"per_modality": means, "per_reader": _per_reader(study, data, np.diag(cov_GG), level)}
    result["per_reader_difference"] = _per_reader_difference(study, data.theta_G, cov_GG, level)
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
        result["pairwise"] = [_u_difference(means, cov_II, df_II, a, b, level) for a, b in pairs]
        result |= _wald(theta_I, cov_II, float(np.min([df_II[pair] for pair in pairs])))
    return result


def _root(variance: float) -> float:
    return math.sqrt(variance) if variance >= 0 else math.nan


def _one_shot(study: Study, sums: Array, counts: Array) -> tuple[Array, Array]:
    """(I, I) covariances of the modalities, and df: of each mean on the diagonal, of each difference off it."""
    count = len(study.modalities)
    moments = {(a, b): _moments(sums, counts, study, a, b) for a in range(count) for b in range(a, count)}
    cov_II, df_II = np.empty((count, count)), np.empty((count, count))
    for (a, b), shared in moments.items():
        cov_II[a, b] = cov_II[b, a] = shared.covariance
        first, second = moments[a, a], moments[b, b]
        if a == b:
            df_II[a, a] = _bdg_df(first.covariance, first.biased_NDR, first.df_NDR)
            continue
        variance = first.covariance + second.covariance - 2 * shared.covariance
        df_II[a, b] = df_II[b, a] = _bdg_df(variance, *_difference_parts(first, second, shared))
    return cov_II, df_II


def _difference_parts(first: Moments, second: Moments, shared: Moments) -> tuple[Array, Array]:
    """Components of a difference and their df; readers who share no modality count as two independent samples."""
    parts = first.biased_NDR + second.biased_NDR - 2 * shared.biased_NDR
    df = np.minimum(first.df_NDR, second.df_NDR)
    if shared.shared_readers:
        return parts, df
    return np.r_[parts[:2], first.biased_NDR[2], second.biased_NDR[2]], np.r_[df[:2], first.df_NDR[2], second.df_NDR[2]]


def _u_difference(
    means: list[dict[str, Any]], cov_II: Array, df_II: Array, a: int, b: int, level: float
) -> dict[str, Any]:
    variance = float(cov_II[a, a] + cov_II[b, b] - 2 * cov_II[a, b])
    se, df = _root(variance), float(df_II[a, b])
    row = _difference(means[a], means[b], se, df, level) | {"variance": variance}
    normal = _difference(means[a], means[b], se, math.inf, level)
    row["normal"] = {name: normal[name] for name in ("z", "p_value", "ci_low", "ci_high")}
    if 1 <= df <= 50:
        # iMRMC prints the p-value at the integer below the df, and the normal one beyond 50.
        row["p_value_integer_df"] = _difference(means[a], means[b], se, math.floor(df), level)["p_value"]
    return row


def _wald(theta_I: Array, cov_II: Array, df: float) -> dict[str, Any]:
    """F = Wald statistic/(I - 1) of no difference; its df_den is the smallest among the pairwise differences."""
    contrast = np.eye(len(theta_I))[1:] - np.eye(len(theta_I))[:1]
    difference, spread = contrast @ theta_I, contrast @ cov_II @ contrast.T
    freedom = len(difference)
    test: dict[str, Any] = {"test": "F", "f_statistic": math.nan, "df_num": freedom, "df_den": _finite(df)}
    if np.linalg.eigvalsh(spread).min() <= _NO_VARIANCE:
        return test | {"p_value": math.nan}
    test["f_statistic"] = float(difference @ np.linalg.solve(spread, difference)) / freedom
    if math.isinf(df):
        test |= {"test": "chi2", "chi2": test["f_statistic"] * freedom}
        return test | {"p_value": float(stats.chi2.sf(test["chi2"], freedom))}
    return test | {"p_value": float(stats.f.sf(test["f_statistic"], freedom, df))}


# --------------------------------------------------------------------------------------------------- the door


def reader_study(
    table: pd.DataFrame,
    *,
    method: str = "or",
    covariance: str | None = None,
    readers: str = "random",
    cases: str = "random",
    outcome: str = "auc",
    threshold: float | None = None,
    modalities: Sequence[str] | None = None,
    cluster: str | None = None,
    missing: str = "error",
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare modalities over readers and cases; the content of `reader_study.json`.

    `table` has one row per reading: reader, modality, case, truth (0/1), score (higher is more positive), and a
    cluster column by name where a patient gives several cases. `method` is or, dbm or ustat (see the module).
    `covariance` (for or) is jackknife, delong, bootstrap, unbiased or, by default where there are clusters,
    obuchowski; the default is jackknife otherwise. Random readers (cases) generalise to others like them, fixed ones
    speak of these alone. `outcome` is auc, sensitivity or specificity (called positive at score >= threshold).
    `modalities` chooses them and their order: differences are first minus second; one alone gives its mean. The
    designs (factorial; cases nested in readers or modalities; readers nested in modalities) are read off the
    identifiers. Readings not made: method ustat uses what there is; the others refuse (`missing="error"`) or, with
    `missing="available"`, let each pair of sessions speak for the cases it has (or; jackknife, unbiased, bootstrap).

    Estimates in [0, 1], differences in [-1, 1]. NaN where undefined, with the reason under `reasons`: no spread
    among readers and cases, an infinite df (chi-square and normal references), more than two modalities for the
    one `difference` (see `pairwise`). Sources: Obuchowski & Rockette 1995; Hillis 2007, 2014; Hillis, Berbaum & Metz
    2008; Gallas 2006; Gallas et al. 2009; Obuchowski 1997.
    """
    if covariance and method in OWN_COVARIANCE and covariance != OWN_COVARIANCE[method]:
        raise ConfigError(f"covariance {covariance!r} belongs to method or; method {method} has its own, so drop it")
    covariance = covariance or ("obuchowski" if cluster and method == "or" else "jackknife")
    _check_options(method=method, covariance=covariance, outcome=outcome, readers=readers, cases=cases, missing=missing)
    if not 0 < level < 1:
        raise ConfigError(f"level {level!r} is not between 0 and 1; 0.95 is usual")
    if covariance == "obuchowski" and not cluster:
        raise ConfigError("covariance 'obuchowski' needs a cluster column (cluster=NAME)")
    clean = clean_table(table, cluster=cluster, where="reader study")
    study = build_study(clean, modalities=modalities, cluster=cluster)
    _require_readers(study, readers)
    require_both_classes(study, outcome)
    if method != "ustat":
        _require_readings(study, method=method, covariance=covariance, missing=missing)
    data = make_readings(study, outcome, threshold)
    if method == "or":
        cov_GG = _covariance(data, study, covariance=covariance, n_boot=n_boot, seed=seed)
        result = _obuchowski_rockette(study, data, cov_GG, readers=readers, cases=cases, level=level)
    elif method == "dbm":
        result = _dorfman_berbaum_metz(study, data, readers=readers, cases=cases, level=level)
    else:
        result = _u_statistics(study, data, readers=readers, level=level)
    settings = {
        "method": method,
        "covariance_method": OWN_COVARIANCE.get(method, covariance),
        "outcome": outcome,
        "threshold": threshold,
        "level": level,
        "random": [name for name, value in (("readers", readers), ("cases", cases)) if value == "random"],
    }
    return _report(settings, study, result)


def _check_options(**options: str) -> None:
    known = {
        "method": METHODS,
        "covariance": COVARIANCES,
        "outcome": OUTCOMES,
        "readers": ("random", "fixed"),
        "cases": ("random", "fixed"),
        "missing": ("error", "available"),
    }
    for name, value in options.items():
        if value not in known[name]:
            choices = ", ".join(known[name])
            raise ConfigError(f"{name} {value!r} is not one of {choices}{nearest(str(value), known[name])}")
    if options["cases"] == "fixed" and (options["readers"] == "fixed" or options["method"] == "ustat"):
        raise ConfigError("fixed cases need random readers and method or or dbm; nothing would vary otherwise")


def _require_readers(study: Study, readers: str) -> None:
    counts = np.bincount(study.modality_G)
    if readers == "random" and (alone := np.flatnonzero(counts < 2)).size:
        g = int(np.flatnonzero(study.modality_G == alone[0])[0])
        raise DataError(
            f"reader study: only reader {study.sessions[g][0]!r} read modality {study.sessions[g][1]!r}; random "
            "readers need at least two in each modality: add readers, or use fixed readers (--readers fixed) to "
            "speak of this one"
        )


def _require_readings(study: Study, *, method: str, covariance: str, missing: str) -> None:
    """Refuse a table with holes, unless it was asked for and the covariance can do without."""
    if study.design == MIXED:
        raise DataError(
            f"reader study: some of the {len(study.readers)} readers used every modality and some did not, which "
            f"method {method!r} cannot analyse; use method ustat (--method ustat)"
        )
    if not study.skipped:
        return
    able = method == "or" and covariance in ("jackknife", "unbiased", "bootstrap")
    if able and missing == "available":
        return
    listed = examples([f"{name!r} ({lost} of {of})" for name, (lost, of) in study.skipped.items()], count=8)
    offer = " (or missing available with method or)" if missing == "error" else ""
    raise DataError(
        f"reader study: readings are missing for {len(study.skipped)} reader(s): {listed}; add them, leave those cases "
        f"out for everybody, or use method ustat (--method ustat){offer}"
    )


def _report(settings: dict[str, Any], study: Study, result: dict[str, Any]) -> dict[str, Any]:
    """The result with the study's description and the headline difference in front."""
    pairwise = result.setdefault("pairwise", [])
    headline: dict[str, Any] = dict.fromkeys(HEADLINE, math.nan)
    if len(pairwise) == 1:
        headline |= {name: pairwise[0][name] for name in ("se", "ci_low", "ci_high", "comparison")}
        headline["difference"] = pairwise[0]["estimate"]
    description = {
        "design": study.design,
        "modalities": study.modalities,
        "readers": len(study.readers),
        "cases": len(study.cases),
        "n_positive": int(study.truth_K.sum()),
        "n_negative": int((~study.truth_K).sum()),
        "clusters": None if study.cluster_K is None else int(study.cluster_K.max()) + 1,
        "readings_missing": {name: lost for name, (lost, _) in study.skipped.items()},
    }
    return settings | description | headline | result | {"reasons": _reasons(study, headline | result)}


def _reasons(study: Study, result: dict[str, Any]) -> dict[str, str]:
    """Why the numbers that are NaN are."""
    reasons = {}
    if len(study.modalities) == 1:
        reasons["difference"] = "one modality: there is nothing to compare, see per_modality"
    elif len(study.modalities) > 2:
        reasons["difference"] = "more than two modalities: see pairwise"
    if len(study.modalities) > 1 and math.isnan(result["p_value"]):
        reasons["p_value"] = "neither readers nor cases vary enough to estimate a variance of the difference"
    if any(math.isnan(row["ci_low"]) for row in result["per_modality"]):
        reasons["per_modality"] = "the estimated variance of a mean is 0 or negative, so it has no interval"
    if result.get("test") == "chi2":
        reasons["df_den"] = "a chi-square test: the denominator is taken as known (infinite df)"
    return reasons


def reader_roc_points(table: pd.DataFrame, *, modalities: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Empirical ROC points of every reader with every modality, for plots.

    One dict per session: reader, modality, auc and the lists fpr, tpr, threshold (called positive at score >=
    threshold; the first is infinite), from (0, 0) to (1, 1). Raises DataError where a reader saw one class only.
    """
    study = build_study(clean_table(table, cluster=None, where="reader study"), modalities=modalities, cluster=None)
    require_both_classes(study, "auc")
    curves = []
    for (reader, modality), score_K in zip(study.sessions, study.score_GK):
        read_K = ~np.isnan(score_K)
        truth, score = study.truth_K[read_K], score_K[read_K]
        fpr, tpr, threshold = roc_points(truth, score)
        points = {"fpr": fpr.tolist(), "tpr": tpr.tolist(), "threshold": threshold.tolist()}
        curves.append({"reader": reader, "modality": modality, "auc": auroc(truth, score)} | points)
    return curves
