"""The content of metrics.json: everything that is said of a set of predictions, as plain values.

    films = read_predictions("predictions.csv")
    report = assess(films, operating_point={"rule": "fixed", "threshold": 0.5}, settings=EvaluationConfig())

Films and patients      flow, characteristics
Performance             metrics with intervals, operating points, at a stated prevalence
Calibration             calibration, recalibration
Shift and abstention    scores against validation's, prevalence without labels, accuracy against coverage
Use and fairness        decision curve, subgroups, agreement with readers, worst errors

Thresholds, temperatures and isotonic maps are chosen on validation films and applied to the films measured; without
validation films they are left out and the report says so. Undefined is NaN with a "reason". Reads and writes no files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from agreement import Kappa, cohen_kappa, fleiss_kappa, gwet_ac, krippendorff_alpha
from auroc import absent_class
from calibration import (
    adjust_prior,
    apply_temperature,
    brier,
    brier_decomposition,
    calibration_in_the_large,
    expected_calibration_error,
    fit_isotonic,
    fit_temperature,
    log_loss,
    observed_to_expected,
    reliability_bins,
    spiegelhalter_z,
    top_label,
)
from clinical import decision_curve, subgroup_fairness
from config import EvaluationConfig
from errors import ConfigError, DataError, nearest
from estimates import Estimate, FloatArray, IntArray, UndefinedMetricWarning, not_estimable, two_sided_quantile
from metrics import choose_threshold, evaluate_predictions
from prediction_table import READER_PREFIX, Predictions, rank_threshold
from proportions import clustered_proportion, predictive_values, proportion
from score_shift import decision_margin, estimate_prevalence, moved_threshold, score_shift, selective

SUBGROUP_COLUMNS = ("age", "sex", "view", "site")
MAX_GROUPS = 50
"""A column of words with more distinct values than this names films or patients, not groups."""
RESAMPLED_FILMS = 100_000_000
"""Films × resamples of a decision curve at most; and of each subgroup: beyond, there are fewer resamples."""
SUBGROUP_RESAMPLES = 1000
MIN_RESAMPLES = 100
"""Enough for the standard deviation of an interval to 7 %."""
CROSSED_FILMS = 2_000_000
"""Films × pairs of columns at most: beyond, intersections would take longer than all the rest."""
MOST_POINTS = 200
"""Of a curve that is drawn."""
NOT_PROBABILITIES = "the scores are not probabilities"
PROBABILITY_METRICS = ("brier", "log_loss", "ece", "calibration_slope", "calibration_intercept")
CURVE_THRESHOLDS = np.round(np.arange(0.01, 1.0, 0.01), 2)


def assess(
    films: Predictions,
    *,
    operating_point: Mapping[str, Any],
    settings: EvaluationConfig,
    seed: int = 0,
    validation: Predictions | None = None,
    no_validation: str = "no validation films were given",
) -> dict[str, Any]:
    """Measure `films` at `operating_point` (rule, threshold); the content of metrics.json.

    `validation` are films of other patients on which the further operating points and the recalibration are chosen;
    where there are none, `no_validation` says why. Three or more classes have no operating point, subgroups, decision
    curve or isotonic map.
    """
    moved = shift(films, validation, operating_point, settings, no_validation=no_validation)
    if settings.adapt_prevalence:
        operating_point = _adapted(operating_point, moved)
    report = _metrics(films, operating_point, settings, seed)
    report["operating_point"] = dict(operating_point)
    report["films"] = {"by_split": flow(films), "characteristics": characteristics(films)}
    report["operating_points"] = operating_points(
        films, validation, operating_point, settings=settings, no_validation=no_validation
    )
    report["at_prevalence"] = at_prevalence(films, validation, operating_point, settings)
    report["calibration"] = calibration(films, validation, level=settings.level, no_validation=no_validation)
    report["shift"] = moved
    report["abstention"] = abstention(films, operating_point, settings)
    report["decision_curve"] = net_benefit(films, settings, seed)
    report["subgroups"] = subgroups(films, operating_point, settings, seed)
    report["agreement"] = reader_agreement(films, operating_point, settings, seed)
    report["worst_errors"] = worst_errors(films, operating_point, count=settings.worst_errors)
    return report


def _threshold(operating_point: Mapping[str, Any]) -> float:
    return float(operating_point.get("threshold", 0.5))


def _metrics(
    films: Predictions, operating_point: Mapping[str, Any], settings: EvaluationConfig, seed: int
) -> dict[str, Any]:
    with warnings.catch_warnings():
        # The report says of each undefined metric why it is.
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        report = evaluate_predictions(
            films.labels,
            films.probabilities,
            classes=films.classes,
            positive_class=films.positive_class,
            threshold=rank_threshold(films, _threshold(operating_point)),
            groups=films.patients,
            level=settings.level,
            n_boot=settings.bootstrap_resamples,
            seed=seed,
            proportion_interval=settings.proportion_interval,
        )
    return report if films.raw is None else _without_probabilities(report)


def _without_probabilities(report: dict[str, Any]) -> dict[str, Any]:
    """Ranks stood in for raw scores: what speaks of probabilities is undefined."""
    undefined = not_estimable(NOT_PROBABILITIES).as_report()
    for name in PROBABILITY_METRICS:
        report["metrics"][name] = dict(undefined)
    for estimates in report["per_class"].values():
        estimates["brier"] = dict(undefined)
    report["at_0.5"] = {"reason": NOT_PROBABILITIES}
    return report


# --- films and patients ----------------------------------------------------------------------------------------


def flow(films: Predictions) -> dict[str, dict[str, Any]]:
    """Split → films, patients, films by class; a table without splits is one group."""
    return {
        str(name) or "all": {
            "n": len(rows),
            "n_patients": int(rows["patient_id"].nunique()),
            "by_class": {label: int((rows["label"] == label).sum()) for label in films.classes},
        }
        for name, rows in films.table.groupby("split", sort=True)
    }


def characteristics(films: Predictions) -> dict[str, dict[str, Any]]:
    """Age, sex, view, site as far as they are known: median and quartiles, or counts, overall and by class."""
    labels = films.table["label"]
    described = {}
    for name in (name for name in SUBGROUP_COLUMNS if name in films.table.columns):
        column = films.table[name].str.strip()
        blank = column == ""
        number = pd.to_numeric(column, errors="coerce")
        of_class = {label: (labels == label).to_numpy() for label in films.classes}
        of_class = {"all": np.ones(len(films), dtype=bool), **of_class}
        numeric = bool(number[~blank].notna().all() and (~blank).any() and number.nunique() > 2)
        describe = _quartiles if numeric else _counts
        described[name] = {
            "kind": "number" if numeric else "category",
            "missing": int(blank.sum()),
            "by_class": {
                label: describe((number if numeric else column)[chosen]) for label, chosen in of_class.items()
            },
        }
    return described


def _quartiles(values: pd.Series) -> dict[str, float]:
    known = values.dropna()
    if known.empty:
        return {"n": 0, "median": math.nan, "q1": math.nan, "q3": math.nan}
    q1, median, q3 = (float(value) for value in known.quantile([0.25, 0.5, 0.75]))
    return {"n": len(known), "median": median, "q1": q1, "q3": q3}


def _counts(values: pd.Series) -> dict[str, int]:
    counts = values[values != ""].value_counts().sort_index()
    return {str(name): int(count) for name, count in counts.items()}


def worst_errors(films: Predictions, operating_point: Mapping[str, Any], *, count: int) -> list[dict[str, Any]]:
    """The films called wrongly with the most confidence: in a binary task, furthest beyond the threshold."""
    called = films.called(_threshold(operating_point))
    if films.positive_class is None:
        surety = films.probabilities.max(axis=1)
    else:
        surety = np.abs(films.scores - _threshold(operating_point))
    wrong = np.flatnonzero(called != films.labels)
    worst = wrong[np.argsort(-surety[wrong], kind="stable")][:count]
    return [
        {
            "path": str(films.table["path"].iloc[row]),
            "patient_id": str(films.table["patient_id"].iloc[row]),
            "label": films.classes[films.labels[row]],
            "prediction": films.classes[called[row]],
            "score": float(films.scores[row] if films.positive_class else films.probabilities[row].max()),
        }
        for row in worst.tolist()
    ]


# --- operating points ------------------------------------------------------------------------------------------


def rates_at(films: Predictions, threshold: float, *, level: float, method: str) -> dict[str, Any]:
    """Sensitivity, specificity, precision and NPV at a threshold, with intervals; clustered where patients repeat."""
    y, called = films.outcome, (films.scores >= threshold).astype(np.int64)
    counted = {
        "sensitivity": (y == 1, called == 1),
        "specificity": (y == 0, called == 0),
        "precision": (called == 1, y == 1),
        "npv": (called == 0, y == 0),
    }
    estimates = {
        name: _rate(hit[among], films.patients, among, level=level, method=method)
        for name, (among, hit) in counted.items()
    }
    return {"n": len(films), "n_patients": films.n_patients} | {
        name: {**estimate.as_report(), "standard_error": estimate.standard_error}
        for name, estimate in estimates.items()
    }


def _rate(
    hits: NDArray[np.bool_], patients: IntArray | None, among: NDArray[np.bool_], *, level: float, method: str
) -> Estimate:
    if patients is None:
        return proportion(int(hits.sum()), len(hits), level=level, method=method)
    return clustered_proportion(hits, patients[among], level=level, method=method)


def operating_points(
    films: Predictions,
    validation: Predictions | None,
    operating_point: Mapping[str, Any],
    *,
    settings: EvaluationConfig,
    no_validation: str,
) -> dict[str, Any]:
    """The headline operating point, 0.5, and those chosen on validation: applied to both, the headline first."""
    if films.positive_class is None:
        return {"rows": [], "reason": "several classes: the most probable one is predicted"}
    reason = "" if validation is not None else no_validation
    if validation is not None and (absent := absent_class(validation.outcome)):
        reason = f"validation has {absent}"
    points: list[dict[str, Any]] = [{**operating_point, "headline": True}]
    if films.raw is None:
        points.append({"rule": "fixed", "target": None, "threshold": 0.5, "headline": False})
    if validation is not None and not reason:
        points += _chosen(validation, settings)
    measure = partial(rates_at, level=settings.level, method=settings.proportion_interval)
    rows = [
        {
            **{name: point.get(name) for name in ("rule", "target", "threshold", "headline")},
            "validation": measure(validation, point["threshold"]) if validation is not None else None,
            "test": measure(films, point["threshold"]),
        }
        for point in _distinct(points)
    ]
    return {"rows": rows} | ({"reason": reason} if reason else {})


def _chosen(validation: Predictions, settings: EvaluationConfig) -> list[dict[str, Any]]:
    rules = (
        ("youden", None),
        ("sensitivity", settings.target_sensitivity),
        ("specificity", settings.target_specificity),
    )
    points = (choose_threshold(validation.outcome, validation.scores, rule=rule, target=to) for rule, to in rules)
    return [{"rule": p.rule, "target": p.target, "threshold": p.threshold, "headline": False} for p in points]


def _distinct(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that repeat an earlier rule at the same threshold."""
    kept: list[dict[str, Any]] = []
    for point in points:
        # The stored threshold came from float32 logits: the same choice again differs in the last digits.
        twin = (
            p
            for p in kept
            if p["rule"] == point["rule"] and math.isclose(p["threshold"], point["threshold"], rel_tol=1e-3)
        )
        if next(twin, None) is None:
            kept.append(point)
    return kept


def at_prevalence(
    films: Predictions,
    validation: Predictions | None,
    operating_point: Mapping[str, Any],
    settings: EvaluationConfig,
) -> dict[str, Any] | None:
    """PPV and NPV at the stated prevalence, and what prior correction does; None where none is stated."""
    if settings.prevalence is None:
        return None
    if films.positive_class is None:
        return {"prevalence": settings.prevalence, "reason": "a prevalence is stated for two classes only"}
    rates = rates_at(films, _threshold(operating_point), level=settings.level, method=settings.proportion_interval)
    values = predictive_values_at(
        rates["sensitivity"], rates["specificity"], prevalence=settings.prevalence, level=settings.level
    )
    report = {"prevalence": settings.prevalence, **{name: item.as_report() for name, item in values.items()}}
    prior, source = prior_of(films, validation)
    report |= {"prior_from": prior, "prior_source": source}
    if films.raw is None and 0 < prior < 1:
        before = films.scores
        after = adjust_prior(before, prior_from=prior, prior_to=settings.prevalence)
        report["mean_probability"] = {"as_predicted": float(before.mean()), "corrected": float(after.mean())}
        moved = adjust_prior(np.array([_threshold(operating_point)]), prior_from=prior, prior_to=settings.prevalence)
        report["threshold_corrected"] = float(moved[0])
    return report


# --- shift and abstention --------------------------------------------------------------------------------------


def shift(
    films: Predictions,
    validation: Predictions | None,
    operating_point: Mapping[str, Any],
    settings: EvaluationConfig,
    *,
    no_validation: str = "",
) -> dict[str, Any]:
    """Scores of the films against those of validation, and what they say of prevalence without a look at the labels.

    Also the threshold moved to the prevalence estimated, and what it gives. "reason" where there is nothing to say.
    """
    reason = no_validation if validation is None else ""
    if films.positive_class is None or films.raw is not None:
        reason = NOT_PROBABILITIES if films.raw is not None else "several classes"
    elif validation is not None and (absent := absent_class(validation.outcome)):
        reason = f"validation has {absent}"
    if validation is None or reason:
        return {"reason": reason}
    prior, before = float(validation.outcome.mean()), _threshold(operating_point)
    prevalence = estimate_prevalence(films.scores, prior=prior, groups=films.patients, level=settings.level)
    found = score_shift(films.scores, validation.outcome, validation.scores, prevalence=prevalence.value)
    threshold = moved_threshold(before, prior_from=prior, prior_to=prevalence.value)
    measure = partial(rates_at, films, level=settings.level, method=settings.proportion_interval)
    return {
        "validation_prevalence": prior,
        "prevalence": prevalence.as_report(),
        "true_prevalence": float(films.outcome.mean()),
        **{name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(found).items()},
        "threshold": before,
        "threshold_at_prevalence": threshold,
        "at_threshold": measure(before),
        "at_threshold_at_prevalence": measure(threshold),
    }


def _adapted(operating_point: Mapping[str, Any], moved: Mapping[str, Any]) -> dict[str, Any]:
    """The operating point at the prevalence that the scores speak of."""
    if "reason" in moved:
        raise ConfigError(f"evaluation.adapt_prevalence: no prevalence can be estimated here: {moved['reason']}")
    return {
        **operating_point,
        "threshold": moved["threshold_at_prevalence"],
        "adapted_from": moved["threshold"],
        "adapted_to_prevalence": moved["prevalence"]["value"],
    }


def abstention(films: Predictions, operating_point: Mapping[str, Any], settings: EvaluationConfig) -> dict[str, Any]:
    """Accuracy when the least sure films are left to a reader; sure is far from the operating point."""
    if films.positive_class is None:
        certainty, of = films.probabilities.max(axis=1), "the probability of the class called"
    elif films.raw is None:
        certainty, of = decision_margin(films.scores, _threshold(operating_point)), "the way from the operating point"
    else:
        certainty, of = np.abs(films.scores - _threshold(operating_point)), "the distance from the threshold"
    right = films.called(_threshold(operating_point)) == films.labels
    found = selective(right.astype(np.int64), certainty, films.patients, level=settings.level)
    shown = np.unique(np.linspace(0, len(found.coverage) - 1, MOST_POINTS).astype(int))
    return {
        "certainty": of,
        "area": found.area,
        "rows": list(found.rows),
        "coverage": found.coverage[shown].tolist(),
        "accuracy": found.accuracy[shown].tolist(),
    }


def prior_of(films: Predictions, validation: Predictions | None) -> tuple[float, str]:
    """The prevalence the probabilities were calibrated at: that of validation, else that of the films measured."""
    if validation is not None:
        return float(validation.outcome.mean()), "validation films"
    return float(films.outcome.mean()), "films measured"


def predictive_values_at(
    sensitivity: Mapping[str, Any], specificity: Mapping[str, Any], *, prevalence: float, level: float
) -> dict[str, Estimate]:
    """PPV and NPV at `prevalence` with logit intervals (Mercaldo, Lau & Zhou 2007, Stat Med 26:2170).

    Takes estimates with value, ci_low, ci_high and standard_error. Where a rate is 0 or 1 the logit has no variance:
    the limits of sensitivity and specificity are put in instead, which is conservative.
    """
    se, sp = float(sensitivity["value"]), float(specificity["value"])
    if math.isnan(se) or math.isnan(sp):
        nothing = not_estimable("sensitivity or specificity is undefined")
        return {"ppv": nothing, "npv": nothing}
    ppv, npv = predictive_values(se, sp, prevalence=prevalence)
    if not (0 < se < 1 and 0 < sp < 1):
        low = predictive_values(sensitivity["ci_low"], specificity["ci_low"], prevalence=prevalence)
        high = predictive_values(sensitivity["ci_high"], specificity["ci_high"], prevalence=prevalence)
        method = "limits of sensitivity and specificity put in (conservative)"
        return {
            name: not_estimable("nobody would be called so") if math.isnan(value) else Estimate(value, *ends, method)
            for name, value, ends in (("ppv", ppv, (low[0], high[0])), ("npv", npv, (low[1], high[1])))
        }
    spread_se, spread_sp = sensitivity["standard_error"], specificity["standard_error"]
    of_ppv = math.hypot(spread_se / se, spread_sp / (1 - sp))
    of_npv = math.hypot(spread_se / (1 - se), spread_sp / sp)
    z = two_sided_quantile(level)
    return {name: _logit_interval(value, z * s) for name, value, s in (("ppv", ppv, of_ppv), ("npv", npv, of_npv))}


def _logit_interval(value: float, half: float) -> Estimate:
    centre = float(special.logit(value))
    low, high = (float(special.expit(centre + sign * half)) for sign in (-1, 1))
    return Estimate(value, low, high, "logit, delta method (Mercaldo 2007)")


# --- calibration -----------------------------------------------------------------------------------------------


def calibration(
    films: Predictions, validation: Predictions | None, *, level: float, no_validation: str
) -> dict[str, Any]:
    """Reliability, ECE, Brier and its parts, tests, and what recalibration on validation does to the films measured.

    Of the positive class in a binary task, of the top label otherwise. Slope and intercept stand under "metrics".
    """
    if films.raw is not None:
        return {"reason": NOT_PROBABILITIES}
    y, p = _calibrated_view(films)
    in_the_large = calibration_in_the_large(y, p, level=level, groups=films.patients)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        z, p_value = spiegelhalter_z(y, p)
        ratio = observed_to_expected(y, p)
    tests: dict[str, Any] = {"statistic": z, "p_value": p_value}
    if films.patients is not None:
        tests["reason"] = "takes films as independent; films of one patient make p too small"
    return {
        "of": films.positive_class or "the most probable class",
        "bins": {strategy: _bins(y, p, strategy, level) for strategy in ("equal_width", "equal_mass")},
        "ece": {s: expected_calibration_error(y, p, strategy=s) for s in ("equal_width", "equal_mass")},
        "mce": expected_calibration_error(y, p, norm="max"),
        "brier": asdict(brier_decomposition(y, p)),
        "in_the_large": in_the_large.as_report(),
        "observed_to_expected": ratio,
        "spiegelhalter": tests,
        "recalibration": recalibration(films, validation, no_validation=no_validation),
    }


def _calibrated_view(films: Predictions) -> tuple[IntArray, FloatArray]:
    if films.positive_class is None:
        return top_label(films.labels, films.probabilities)
    return films.outcome, films.scores


def _bins(y: IntArray, p: FloatArray, strategy: str, level: float) -> list[dict[str, float]]:
    bins = reliability_bins(y, p, strategy=strategy, level=level)
    names = ("low", "high", "count", "mean_probability", "observed", "ci_low", "ci_high")
    return [dict(zip(names, row)) for row in zip(*(getattr(bins, name).tolist() for name in names))]


def recalibration(films: Predictions, validation: Predictions | None, *, no_validation: str) -> dict[str, Any]:
    """Temperature and isotonic scaling fitted on validation: log loss, Brier score and ECE before and after."""
    if validation is None:
        return {"reason": no_validation}
    if validation.raw is not None:
        return {"reason": f"in validation {NOT_PROBABILITIES}"}
    # The clip keeps a probability of exactly 0 finite; it is that of the calibration logits.
    logits = np.log(np.clip(validation.probabilities, 1e-10, 1))
    temperature = fit_temperature(logits, validation.labels)
    report: dict[str, Any] = {
        "fitted_on": {"n": len(validation), "n_patients": validation.n_patients},
        "as_predicted": _losses(films, films.probabilities),
        "temperature": {"value": temperature} | _losses(films, scaled(films.probabilities, temperature)),
    }
    if films.positive_class is not None:
        report["isotonic"] = _losses(films, isotonic(films, validation))
    return report


def scaled(probabilities: FloatArray, temperature: float) -> FloatArray:
    """Probabilities (N, K) softened (above 1) or sharpened (below) by a temperature."""
    return apply_temperature(np.log(np.clip(probabilities, 1e-10, 1)), temperature)


def isotonic(films: Predictions, validation: Predictions) -> FloatArray:
    """(N, 2) probabilities of `films` after the isotonic map fitted on validation."""
    mapped = fit_isotonic(validation.outcome, validation.scores)(films.scores)
    return np.column_stack([1 - mapped, mapped] if films.positive == 1 else [mapped, 1 - mapped])


def _losses(films: Predictions, probabilities: FloatArray) -> dict[str, float]:
    if films.positive_class is None:
        outcome, p = top_label(films.labels, probabilities)
        squared = brier(films.labels, probabilities)
    else:
        outcome, p = films.outcome, probabilities[:, films.positive]
        squared = brier(outcome, p)
    losses = {"log_loss": log_loss(films.labels, probabilities), "brier": squared}
    return losses | {"ece": expected_calibration_error(outcome, p)}


# --- use and fairness ------------------------------------------------------------------------------------------


def _resamples(wanted: int, n: int) -> int:
    return min(wanted, max(RESAMPLED_FILMS // n, MIN_RESAMPLES))


def net_benefit(films: Predictions, settings: EvaluationConfig, seed: int) -> dict[str, Any]:
    """The decision curve, at the stated prevalence where there is one; a reason where there is none."""
    if films.positive_class is None:
        return {"reason": "a decision curve is for two classes"}
    if films.raw is not None:
        return {"reason": NOT_PROBABILITIES}
    if settings.prevalence is not None and (absent := absent_class(films.outcome)):
        return {"reason": f"a stated prevalence needs both classes, but there are {absent}"}
    return decision_curve(
        films.outcome,
        films.scores,
        CURVE_THRESHOLDS,
        groups=films.patients,
        n_boot=_resamples(settings.bootstrap_resamples, len(films)),
        seed=seed,
        level=settings.level,
        prevalence=settings.prevalence,
    )


def subgroup_columns(films: Predictions, wanted: Sequence[str] | None) -> list[str]:
    """The columns to compare groups by: those asked for, else those of SUBGROUP_COLUMNS that say something."""
    known = [name for name in films.table.columns if name not in ("path", "patient_id", "label")]
    if wanted is None:
        return [name for name in SUBGROUP_COLUMNS if name in known and films.table[name].str.strip().any()]
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"evaluation.subgroups: the films have no column {name!r}{nearest(name, known)}; there are "
                f"{', '.join(known) or 'none'}"
            )
    return list(wanted)


def subgroups(
    films: Predictions, operating_point: Mapping[str, Any], settings: EvaluationConfig, seed: int
) -> dict[str, Any]:
    """Every metric within groups and the gaps between them (clinical.subgroup_fairness), or why there are none."""
    names = subgroup_columns(films, settings.subgroups)
    if not names:
        return {"columns": {}, "intersections": {}, "reason": "the films name no age, sex, view or site"}
    if films.positive_class is None:
        return {"columns": {}, "intersections": {}, "reason": "gaps between groups are for two classes"}
    for name in names:
        _refuse_names(films.table[name])
    threshold = _threshold(operating_point)
    crossed = settings.intersections and len(films) * math.comb(len(names), 2) <= CROSSED_FILMS
    report = subgroup_fairness(
        films.outcome,
        films.probabilities[:, films.positive],
        subgroups={name: list(films.table[name]) for name in names},
        threshold=rank_threshold(films, threshold),
        classes=[films.classes[1 - films.positive], films.positive_class],
        groups=films.patients,
        min_n=settings.min_subgroup,
        intersections=crossed,
        level=settings.level,
        n_boot=_resamples(min(settings.bootstrap_resamples, SUBGROUP_RESAMPLES), len(films)),
        seed=seed,
        proportion_interval=settings.proportion_interval,
    )
    report["threshold"] = threshold
    if settings.intersections and not crossed and len(names) > 1:
        report["intersections_reason"] = f"left out for {len(films):,} films: name two columns with --subgroups"
    return report if films.raw is None else _without_calibration(report)


def _refuse_names(column: pd.Series) -> None:
    values = column[column.str.strip() != ""]
    if pd.to_numeric(values, errors="coerce").isna().any() and (count := values.nunique()) > MAX_GROUPS:
        raise ConfigError(
            f"evaluation.subgroups: {column.name!r} has {count} different values, e.g. {values.iloc[0]!r}; choose a "
            "column of few groups"
        )


def _without_calibration(report: dict[str, Any]) -> dict[str, Any]:
    undefined = not_estimable(NOT_PROBABILITIES).as_report()
    for section in (*report["columns"].values(), *report["intersections"].values()):
        section["gaps"].pop("calibration", None)
        for group in section["groups"].values():
            if "metrics" in group:
                group["metrics"] |= {name: dict(undefined) for name in PROBABILITY_METRICS}
    return report


# --- readers ---------------------------------------------------------------------------------------------------


def reader_agreement(
    films: Predictions, operating_point: Mapping[str, Any], settings: EvaluationConfig, seed: int
) -> dict[str, Any] | None:
    """Model and readers (columns reader_<NAME>) on the same films; None where no reader is named.

    Cohen's kappa of each pair, then Fleiss' kappa, Krippendorff's alpha and Gwet's AC1 of the readers among themselves
    and with the model as one more.
    """
    columns = [name for name in films.table.columns if name.startswith(READER_PREFIX)]
    if not columns:
        return None
    readers = [name.removeprefix(READER_PREFIX) for name in columns]
    ratings = np.column_stack([_calls(films, name) for name in columns])
    model = np.array(films.classes, dtype=object)[films.called(_threshold(operating_point))]
    everyone = np.column_stack([model, ratings])
    options: dict[str, Any] = {"categories": list(films.classes), "level": settings.level}
    names = ["model", *readers]
    pairs = [
        {"first": names[i], "second": names[j], **_kappa_report(cohen_kappa(everyone[:, i], everyone[:, j], **options))}
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]
    n_boot = _resamples(settings.bootstrap_resamples, len(films))
    groups = {"readers_and_model": everyone} | ({"readers": ratings} if len(readers) > 1 else {})
    return {
        "names": readers,
        "films_rated": {name: int((ratings[:, i] != "").sum()) for i, name in enumerate(readers)},
        "cohen_kappa": pairs,
        **{name: _group_agreement(table, options, n_boot=n_boot, seed=seed) for name, table in groups.items()},
    }


def _calls(films: Predictions, column: str) -> NDArray[np.object_]:
    """A reader's calls as class names, '' where the film was not read; 0 and 1 stand for negative and positive."""
    text = films.table[column].str.strip()
    if films.positive_class is not None and set(text) <= {"", "0", "1"}:
        text = text.map({"": "", "0": films.classes[1 - films.positive], "1": films.positive_class})
    strangers = ~text.isin(["", *films.classes])
    if strangers.any():
        row = int(np.flatnonzero(strangers)[0])
        raise DataError(
            f"{films.source}: film {films.table['path'].iloc[row]}: {column} is {text.iloc[row]!r}, not one of "
            f"{', '.join(films.classes)}{nearest(text.iloc[row], films.classes)}; leave it blank where not read"
        )
    return text.to_numpy(dtype=object)


def _kappa_report(kappa: Kappa) -> dict[str, Any]:
    return kappa.estimate.as_report()


def _group_agreement(
    ratings: NDArray[np.object_], options: Mapping[str, Any], *, n_boot: int, seed: int
) -> dict[str, Any]:
    return {
        "fleiss_kappa": fleiss_kappa(ratings, **options).estimate.as_report(),
        "krippendorff_alpha": krippendorff_alpha(ratings, n_boot=n_boot, seed=seed, **options).as_report(),
        "gwet_ac1": gwet_ac(ratings, **options).as_report(),
    }
