"""The measurements of a classifier, each with an interval; the one door to the project's statistics.

    report = evaluate_predictions(labels, probabilities, classes=["NORMAL", "PNEUMONIA"], positive_class="PNEUMONIA")

Whole reports           evaluate_predictions
Operating points        choose_threshold, operating_point
Registry                METRICS (name → function, bounds, what it needs), NAMES
Two models              model_comparison: compare_predictions, net_reclassification
Discrimination          auroc: DeLong, Obuchowski, partial area, bootstrap, multi-class
Calibration             calibration: Brier, ECE, slope, temperature, isotonic, prior correction
Proportions             proportions: intervals by name, differences, 2×2 tables, p-value adjustment
Paired tests            paired_tests: McNemar, clustered McNemar, paired differences, predictive values
Agreement of raters     agreement: Cohen, Fleiss, Conger, Krippendorff, Gwet
Resampling              resampling: confusion matrices, bootstrap_metrics

Everything those modules offer can be imported from here too. Class 1 is the positive class; a film is positive when
score >= threshold. Undefined is NaN with a reason, never 0. Reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from agreement import (
    ALPHA_METRICS,
    WEIGHTS,
    Kappa,
    MultiKappa,
    PairwiseKappa,
    cohen_kappa,
    conger_kappa,
    fleiss_kappa,
    gwet_ac,
    kappa_from_table,
    krippendorff_alpha,
    pairwise_kappa,
)
from auroc import (
    Delong,
    absent_class,
    auroc,
    auroc_ci,
    average_precision,
    average_precision_from_counts,
    bootstrap_auroc,
    bootstrap_auroc_test,
    clustered_auroc,
    clustered_auroc_test,
    delong,
    delong_test,
    delong_test_independent,
    hand_till,
    macro_auroc,
    multiclass_auroc,
    newcombe_interval,
    partial_auroc,
    percentile_interval,
    roc_points,
)
from calibration import (
    BrierDecomposition,
    IsotonicMap,
    Recalibration,
    ReliabilityBins,
    adjust_prior,
    apply_temperature,
    brier,
    brier_decomposition,
    brier_terms,
    calibration_in_the_large,
    expected_calibration_error,
    fit_isotonic,
    fit_temperature,
    hosmer_lemeshow,
    log_loss,
    log_loss_terms,
    logistic_recalibration,
    observed_to_expected,
    reliability_bins,
    spiegelhalter_z,
    top_label,
)
from errors import DataError, nearest
from estimates import (
    ROW_SUM_TOLERANCE,
    Estimate,
    FloatArray,
    IntArray,
    TestResult,
    UndefinedMetricWarning,
    as_class_probabilities,
    as_groups,
    as_labels,
    as_scores,
    not_estimable,
    sum_by_group,
    undefined,
    wald,
)
from model_comparison import Reclassification, compare_predictions, net_reclassification
from paired_tests import (
    CLUSTERED_METHODS,
    MCNEMAR_METHODS,
    PAIRED_INTERVALS,
    McNemar,
    clustered_mcnemar,
    mcnemar,
    paired_difference,
    predictive_value_test,
    relative_predictive_value,
)
from proportions import (
    DIFFERENCE_INTERVALS,
    PROPORTION_INTERVALS,
    adjust_p_values,
    chi_square_test,
    clustered_proportion,
    diagnostic_table,
    difference_of_proportions,
    fisher_test,
    predictive_values,
    proportion,
    proportion_interval,
)
from resampling import (
    CONFUSION_NAMES,
    Sampling,
    bootstrap_metrics,
    confusion_matrix,
    confusion_metrics,
    confusion_reason,
    confusion_statistic,
    ece_statistic,
    ranking_statistic,
)

__all__ = [
    "ALPHA_METRICS",
    "CLUSTERED_METHODS",
    "CONFUSION_NAMES",
    "DIFFERENCE_INTERVALS",
    "MCNEMAR_METHODS",
    "METRICS",
    "NAMES",
    "PAIRED_INTERVALS",
    "PROPORTION_INTERVALS",
    "ROW_SUM_TOLERANCE",
    "RULES",
    "WEIGHTS",
    "BrierDecomposition",
    "Delong",
    "Estimate",
    "FloatArray",
    "IntArray",
    "IsotonicMap",
    "Kappa",
    "McNemar",
    "Metric",
    "MultiKappa",
    "OperatingPoint",
    "PairwiseKappa",
    "Recalibration",
    "Reclassification",
    "ReliabilityBins",
    "TestResult",
    "UndefinedMetricWarning",
    "adjust_p_values",
    "adjust_prior",
    "apply_temperature",
    "auroc",
    "auroc_ci",
    "average_precision",
    "bootstrap_auroc",
    "bootstrap_auroc_test",
    "bootstrap_metrics",
    "brier",
    "brier_decomposition",
    "calibration_in_the_large",
    "calibration_intercept",
    "calibration_slope",
    "chi_square_test",
    "choose_threshold",
    "clustered_auroc",
    "clustered_auroc_test",
    "clustered_mcnemar",
    "clustered_proportion",
    "cohen_kappa",
    "compare_predictions",
    "confusion_matrix",
    "confusion_metrics",
    "conger_kappa",
    "delong",
    "delong_test",
    "delong_test_independent",
    "diagnostic_table",
    "difference_of_proportions",
    "evaluate_predictions",
    "expected_calibration_error",
    "fisher_test",
    "fit_isotonic",
    "fit_temperature",
    "fleiss_kappa",
    "gwet_ac",
    "hand_till",
    "hosmer_lemeshow",
    "kappa_from_table",
    "krippendorff_alpha",
    "log_loss",
    "logistic_recalibration",
    "macro_auroc",
    "mcnemar",
    "metric_of_predictions",
    "multiclass_auroc",
    "net_reclassification",
    "newcombe_interval",
    "observed_to_expected",
    "operating_point",
    "paired_difference",
    "pairwise_kappa",
    "partial_auroc",
    "percentile_interval",
    "predictive_value_test",
    "predictive_values",
    "proportion",
    "proportion_interval",
    "relative_predictive_value",
    "reliability_bins",
    "roc_points",
    "spiegelhalter_z",
    "top_label",
]

NAMES = (
    *CONFUSION_NAMES[:7],
    "auc_roc",
    "auc_pr",
    "cohen_kappa",
    "mcc",
    "brier",
    "log_loss",
    "ece",
    "calibration_slope",
    "calibration_intercept",
)

# --- operating points -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold, the rule that chose it and what it gave on the films it was chosen on."""

    rule: str
    target: float | None
    threshold: float
    """A film is positive when score >= threshold."""
    sensitivity: float
    specificity: float
    n: int
    """Films it was chosen on."""


RULES = ("fixed", "youden", "stable_youden", "closest_topleft", "sensitivity", "specificity")
STABLE_WITHIN = 0.02
"""Youden's index that stable_youden gives away at most at the ends of its range."""


def choose_threshold(labels: ArrayLike, scores: ArrayLike, *, rule: str, target: float | None = None) -> OperatingPoint:
    """The threshold (score >= threshold is positive) that `rule` chooses; choose it on validation, never on test.

    youden maximises sensitivity + specificity (Youden 1950) and closest_topleft minimises the distance to the corner
    of the ROC plot, of ties the most sensitive; stable_youden takes the middle, in log-odds of scores that are
    probabilities, of all thresholds within STABLE_WITHIN of the largest index, for where classes hardly overlap the
    maximum hangs on single films; sensitivity gives the best specificity among thresholds whose
    sensitivity reaches `target`; specificity the reverse; fixed takes `target` (0.5 without one). Thresholds lie
    midway between neighbouring scores. DataError when a class is absent.
    """
    if rule not in RULES:
        raise DataError(f"rule {rule!r} is not one of {', '.join(RULES)}{nearest(rule, RULES)}")
    y = as_labels(labels)
    s = as_scores(scores, n=len(y))
    if rule == "fixed":
        return operating_point(y, s, threshold=0.5 if target is None else target)
    if reason := absent_class(y):
        raise DataError(f"a threshold by {rule} needs both classes, but there are {reason}; use rule fixed")
    if rule in ("sensitivity", "specificity") and (target is None or not 0 < target <= 1):
        raise DataError(f"rule {rule} needs a target in (0, 1], but it is {target}")
    values, group = np.unique(s, return_inverse=True)
    # At cut g, films with score >= values[g] are positive; the last cut calls nothing positive.
    true_positives = np.append(np.cumsum(np.bincount(group, weights=y)[::-1])[::-1], 0).astype(np.int64)
    false_positives = np.append(np.cumsum(np.bincount(group, weights=1 - y)[::-1])[::-1], 0).astype(np.int64)
    n_pos = int(y.sum())
    if rule == "stable_youden":
        threshold = _stable_youden(values, true_positives / n_pos - false_positives / (len(y) - n_pos))
    else:
        threshold = _midway(values, _best_cut(true_positives, false_positives, n_pos, len(y) - n_pos, rule, target))
    chosen = operating_point(y, s, threshold=threshold)
    return OperatingPoint(rule, target, chosen.threshold, chosen.sensitivity, chosen.specificity, len(y))


def _best_cut(
    true_positives: IntArray, false_positives: IntArray, n_pos: int, n_neg: int, rule: str, target: float | None
) -> int:
    if rule == "youden":
        # In whole numbers, so that equal J are equal.
        return int(np.argmax(true_positives * n_neg - false_positives * n_pos))
    if rule == "closest_topleft":
        return int(np.argmin((1 - true_positives / n_pos) ** 2 + (false_positives / n_neg) ** 2))
    assert target is not None
    # A target typed as a decimal (0.9 of 10 films) must count as reached by 9 of them.
    slack = 1e-12
    if rule == "sensitivity":
        return int(np.flatnonzero(true_positives >= target * n_pos - slack)[-1])
    return int(np.flatnonzero(n_neg - false_positives >= target * n_neg - slack)[0])


def _stable_youden(values: FloatArray, index_of_cut: FloatArray) -> float:
    """The middle of the thresholds whose Youden index is within STABLE_WITHIN of the largest."""
    near = np.flatnonzero(index_of_cut >= index_of_cut.max() - STABLE_WITHIN)
    low, high = _midway(values, int(near[0])), _midway(values, int(near[-1]))
    if values[0] >= 0 and values[-1] <= 1 and low > 0 and high < 1:
        return float(expit((logit(low) + logit(high)) / 2))
    return low + (high - low) / 2


def _midway(values: FloatArray, cut: int) -> float:
    """A threshold just between values[cut − 1] and values[cut]; beyond the ends, midway to 0 or 1 for probabilities."""
    unit = values[0] >= 0 and values[-1] <= 1
    margin = max(1.0, float(np.ptp(values)))
    below = values[cut - 1] if cut > 0 else (0.0 if unit else values[0] - margin)
    if cut == len(values):
        return float((below + 1) / 2) if unit and below < 1 else float(np.nextafter(below, np.inf))
    middle = below + (values[cut] - below) / 2
    return float(middle if below < middle else values[cut])


def operating_point(labels: ArrayLike, scores: ArrayLike, *, threshold: float) -> OperatingPoint:
    """Sensitivity and specificity at a given threshold; NaN where a class is absent."""
    y = as_labels(labels)
    s = as_scores(scores, n=len(y))
    rates = confusion_metrics(confusion_matrix(y, (s >= threshold).astype(np.int64), n_classes=2), positive=1)
    return OperatingPoint(
        "fixed", threshold, float(threshold), float(rates["sensitivity"]), float(rates["specificity"]), len(y)
    )


# --- one model ------------------------------------------------------------------------------------------------


def evaluate_predictions(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    classes: Sequence[str],
    positive_class: str | None,
    threshold: float = 0.5,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
    proportion_interval: str = "wilson",
) -> dict[str, Any]:
    """Every metric of NAMES with its interval, JSON-ready; undefined is NaN with a "reason".

    `labels` (N,) are class numbers, `probabilities` (N, K) in the order of `classes`, `groups` (N,) patients. With
    `positive_class` (two classes) a film is positive when that column >= `threshold`. Without it the most probable
    class is predicted, rates and areas are macro averages over classes, Brier sums over classes, and calibration
    (ECE, slope, intercept) is that of the top label; there is no "at_0.5" then. Intervals are clustered by patient as
    soon as one patient has two films, and each "method" says how it was made.
    """
    classes = list(classes)
    y = as_labels(labels, n_classes=len(classes))
    p = as_class_probabilities(probabilities, n=len(y), n_classes=len(classes))
    positive = _positive_index(classes, positive_class)
    codes = as_groups(groups, n=len(y))
    task = _Task(y, p, classes, positive, Sampling(codes, level, n_boot, seed, proportion_interval))
    predictions = task.predict(threshold)
    at_half = {} if positive is None else {"at_0.5": task.predict(0.5)}
    replicates = task.replicates({"chosen": predictions, **at_half})
    chosen = task.confusion_report(predictions, replicates.get("chosen"))
    measured = {**chosen["metrics"], **task.probability_metrics(replicates)}
    return {
        "n": len(y),
        "n_patients": task.sampling.patients,
        "classes": classes,
        "positive_class": positive_class,
        "average": "macro" if positive is None else "binary",
        "level": level,
        "operating_point": {"threshold": None if positive is None else float(threshold)},
        "metrics": {name: measured[name].as_report() for name in NAMES},
        "confusion_matrix": chosen["confusion_matrix"],
        "at_0.5": _flat(task.confusion_report(at_half["at_0.5"], replicates.get("at_0.5"))) if at_half else {},
        "per_class": {
            name: {metric: estimate.as_report() for metric, estimate in estimates.items()}
            for name, estimates in task.per_class(predictions, replicates).items()
        },
    }


def _flat(report: Mapping[str, Any]) -> dict[str, Any]:
    names = {name: estimate.as_report() for name, estimate in report["metrics"].items()}
    return {**names, "confusion_matrix": report["confusion_matrix"]}


def _positive_index(classes: Sequence[str], positive_class: str | None) -> int | None:
    if positive_class is None:
        return None
    if positive_class not in classes:
        raise DataError(f"positive class {positive_class!r} is not one of {', '.join(classes)}")
    if len(classes) != 2:
        raise DataError(f"a positive class is for two classes, but there are {len(classes)}; leave it out")
    return list(classes).index(positive_class)


@dataclass(frozen=True)
class _Task:
    """One set of predictions under evaluation."""

    y: IntArray
    p: FloatArray
    classes: list[str]
    positive: int | None
    sampling: Sampling

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    def predict(self, threshold: float) -> IntArray:
        if self.positive is None:
            return self.p.argmax(axis=1).astype(np.int64)
        return np.where(self.p[:, self.positive] >= threshold, self.positive, 1 - self.positive)

    def outcome(self) -> tuple[IntArray, FloatArray]:
        """The binary view that calibration speaks of: the positive class, or the top label."""
        if self.positive is None:
            return top_label(self.y, self.p)
        return (self.y == self.positive).astype(np.int64), self.p[:, self.positive]

    def replicates(self, predictions: Mapping[str, IntArray]) -> dict[str, FloatArray]:
        """One bootstrap pass for all that needs one: ECE, average precision, clustered confusion matrices."""
        codes = self.sampling.codes
        statistics = {"ece": ece_statistic(*self.outcome(), codes)}
        for k in range(self.n_classes):
            labels = (self.y == k).astype(np.int64)
            if not absent_class(labels):
                exact = average_precision(labels, self.p[:, k])
                statistics[f"auc_pr:{k}"] = ranking_statistic(
                    labels, self.p[:, k], codes, average_precision_from_counts, exact
                )
        if self.sampling.clustered:
            for name, predicted in predictions.items():
                statistics[name] = confusion_statistic(self.y, predicted, self.n_classes, codes)
        return self.sampling.replicates(statistics)

    def confusion_report(self, predictions: IntArray, replicates: FloatArray | None) -> dict[str, Any]:
        """`{"metrics": {NAME: Estimate}, "confusion_matrix"}` of the threshold-dependent metrics."""
        matrix = confusion_matrix(self.y, predictions, n_classes=self.n_classes)
        draws = self._matrices(matrix, replicates)
        estimates = {
            name: self._confusion_estimate(name, self.positive, predictions, matrix, draws) for name in CONFUSION_NAMES
        }
        return {"metrics": estimates, "confusion_matrix": matrix.tolist()}

    def _matrices(self, matrix: IntArray, replicates: FloatArray | None) -> FloatArray:
        """Resampled confusion matrices (b, K, K). Films drawn one by one are a multinomial draw of the cells."""
        if replicates is None:
            rng = np.random.default_rng(self.sampling.seed)
            cells = rng.multinomial(len(self.y), matrix.ravel() / len(self.y), size=self.sampling.n_boot)
            replicates = cells.astype(np.float64)
        return replicates.reshape(-1, self.n_classes, self.n_classes)

    def _confusion_estimate(
        self, name: str, positive: int | None, predictions: IntArray, matrix: IntArray, draws: FloatArray
    ) -> Estimate:
        value = float(confusion_metrics(matrix, positive=positive)[name])
        if np.isnan(value):
            return not_estimable(confusion_reason(name, matrix, self.classes, positive))
        counted = self._as_proportion(name, positive, predictions)
        if counted is not None:
            return self._proportion(counted[0][counted[1]], counted[1])
        low = -1.0 if name in ("cohen_kappa", "mcc") else 0.0
        sample = confusion_metrics(draws, positive=positive)[name]
        if _spread(sample) > 0:
            return self.sampling.interval(value, sample, low=low, high=1.0)
        return self._jeffreys(name, positive, matrix, value)

    def _as_proportion(
        self, name: str, positive: int | None, predictions: IntArray
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
        """Which films are hits and which are counted, for a metric that is a plain proportion; else None."""
        right = predictions == self.y
        counted = {"accuracy": np.ones(len(self.y), dtype=bool)}
        if positive is not None:
            counted["sensitivity"] = self.y == positive
            counted["specificity"] = self.y != positive
            counted["precision"] = predictions == positive
            counted["npv"] = predictions != positive
            right = (predictions == positive) == (self.y == positive) if name != "accuracy" else right
        return (right, counted[name]) if name in counted else None

    def _proportion(self, hits: NDArray[np.bool_], counted: NDArray[np.bool_]) -> Estimate:
        sampling = self.sampling
        name, level = sampling.proportion_interval, sampling.level
        if sampling.clustered:
            return clustered_proportion(hits, sampling.codes[counted], level=level, method=name)
        return proportion(int(hits.sum()), len(hits), level=level, method=name)

    def _jeffreys(self, name: str, positive: int | None, matrix: IntArray, value: float) -> Estimate:
        """Where every resample is the same (nothing was ever wrong), the posterior of the cells still has width."""
        cells = matrix.ravel() * (self.sampling.patients / len(self.y)) + 2 / self.n_classes**2
        draws = np.random.default_rng(self.sampling.seed).dirichlet(cells, size=max(self.sampling.n_boot, 1000))
        sample = confusion_metrics(draws.reshape(-1, self.n_classes, self.n_classes), positive=positive)[name]
        low, high = percentile_interval(sample, level=self.sampling.level)
        why = f"every bootstrap resample gives {value:g}"
        method = "posterior of the confusion matrix (two films spread over the cells as prior)"
        return Estimate(value, min(low, value), max(high, value), method, reason=why)

    def per_class(self, predictions: IntArray, replicates: Mapping[str, FloatArray]) -> dict[str, dict[str, Estimate]]:
        """Each class against the rest, at the predictions made."""
        matrix = confusion_matrix(self.y, predictions, n_classes=self.n_classes)
        draws = self._matrices(matrix, replicates.get("chosen"))
        return {
            label: {
                **{
                    name: self._confusion_estimate(name, k, predictions, matrix, draws)
                    for name in ("precision", "sensitivity", "specificity", "npv", "f1")
                },
                "auc_roc": auroc_ci(self.y == k, self.p[:, k], level=self.sampling.level, groups=self.sampling.codes),
                "auc_pr": self._average_precision([k], replicates),
                "brier": self._mean(brier_terms((self.y == k).astype(np.int64), self.p[:, k]), high=1.0),
            }
            for k, label in enumerate(self.classes)
        }

    def probability_metrics(self, replicates: Mapping[str, FloatArray]) -> dict[str, Estimate]:
        """The metrics that no threshold touches."""
        outcome, p = self.outcome()
        chosen = list(range(self.n_classes)) if self.positive is None else [self.positive]
        binary = self.positive is not None
        ece = expected_calibration_error(outcome, p)
        fit = logistic_recalibration(outcome, p, level=self.sampling.level, groups=self.sampling.codes)
        return {
            "auc_roc": self._auroc(),
            "auc_pr": self._average_precision(chosen, replicates),
            "brier": self._mean(brier_terms(outcome if binary else self.y, p if binary else self.p), high=2.0 - binary),
            "log_loss": self._log_loss(),
            "ece": self.sampling.interval(ece, replicates["ece"], low=0.0, high=1.0, wide=True),
            "calibration_slope": fit.slope,
            "calibration_intercept": fit.intercept,
        }

    def _log_loss(self) -> Estimate:
        truth = self.p[np.arange(len(self.y)), self.y]
        estimate = self._mean(log_loss_terms(self.y, self.p), high=np.inf)
        ruled_out = int((truth == 0).sum())
        note = f"{ruled_out} films whose true class had probability 0, clipped to 2.2e-16"
        return replace(estimate, reason=note) if ruled_out else estimate

    def _auroc(self) -> Estimate:
        absent = [name for k, name in enumerate(self.classes) if not (self.y == k).any()]
        if absent:
            return not_estimable(f"no films of class {', '.join(absent)}")
        if self.positive is None:
            return macro_auroc(self.y, self.p, level=self.sampling.level, groups=self.sampling.codes)
        outcome, p = self.outcome()
        return auroc_ci(outcome, p, level=self.sampling.level, groups=self.sampling.codes)

    def _average_precision(self, classes: Sequence[int], replicates: Mapping[str, FloatArray]) -> Estimate:
        missing = [self.classes[k] for k in classes if f"auc_pr:{k}" not in replicates]
        if missing:
            return not_estimable(f"all or no films are of class {', '.join(missing)}")
        values = [average_precision(self.y == k, self.p[:, k]) for k in classes]
        sample = np.mean([replicates[f"auc_pr:{k}"] for k in classes], axis=0)
        value = float(np.mean(values))
        if _spread(sample) > 0 or value < 1:
            return self.sampling.interval(value, sample, low=0.0, high=1.0)
        smallest = min(len(np.unique(self.sampling.codes[self.y == k])) for k in classes)
        # Boyd 2013 treats average precision as a proportion of the positives.
        bound = proportion(smallest, smallest, level=self.sampling.level)
        return Estimate(
            value, bound.ci_low, bound.ci_high, "Wilson on the positive patients", reason="every resample gives 1"
        )

    def _mean(self, terms: FloatArray, *, high: float) -> Estimate:
        patients = self.sampling.patients
        if patients < 2:
            return not_estimable("one patient only: no variance between patients", value=float(terms.mean()))
        residuals = sum_by_group(terms - terms.mean(), self.sampling.codes)
        se = float(np.sqrt(patients / (patients - 1) * (residuals**2).sum()) / len(terms))
        method = "Wald, clustered by patient" if self.sampling.clustered else "Wald"
        note = "every film has the same error: no variance" if se < 1e-15 else ""
        return wald(float(terms.mean()), se, level=self.sampling.level, method=method, low=0.0, high=high, reason=note)


def _spread(sample: FloatArray) -> float:
    """Range of the defined replicates, 0 for none."""
    defined = sample[~np.isnan(sample)]
    return float(np.ptp(defined)) if defined.size else 0.0


# --- the registry ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A metric of binary labels (N,) and what it needs beside them."""

    name: str
    function: Callable[[ArrayLike, ArrayLike], float]
    """(labels, values) → value; NaN with an UndefinedMetricWarning where undefined."""
    needs: str
    """What the values (N,) are: "predictions" of 0/1, "scores" (any ranking) or "probabilities" of class 1."""
    low: float = 0.0
    high: float = 1.0
    best: float = 1.0
    """What a perfect model gets."""


def metric_of_predictions(name: str) -> Callable[[ArrayLike, ArrayLike], float]:
    """The confusion metric `name` as a function of labels (N,) and predictions (N,), class 1 positive."""

    def measure(labels: ArrayLike, predictions: ArrayLike) -> float:
        y = as_labels(labels)
        called = as_labels(as_scores(predictions, n=len(y), name="predictions"))
        matrix = confusion_matrix(y, called, n_classes=2)
        value = float(confusion_metrics(matrix, positive=1)[name])
        if np.isnan(value):
            return undefined(name, confusion_reason(name, matrix, ("0", "1"), 1))
        return value

    return measure


def calibration_slope(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Slope of the logistic recalibration, 1 is best; NaN with a warning where it is not finite."""
    slope = logistic_recalibration(labels, probabilities).slope
    return undefined("calibration_slope", slope.reason) if np.isnan(slope.value) else slope.value


def calibration_intercept(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Intercept of the logistic recalibration, 0 is best; NaN with a warning where it is not finite."""
    intercept = logistic_recalibration(labels, probabilities).intercept
    return undefined("calibration_intercept", intercept.reason) if np.isnan(intercept.value) else intercept.value


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *(
            Metric(
                name, metric_of_predictions(name), "predictions", low=-1.0 if name in ("cohen_kappa", "mcc") else 0.0
            )
            for name in CONFUSION_NAMES
        ),
        Metric("auc_roc", auroc, "scores"),
        Metric("auc_pr", average_precision, "scores"),
        Metric("brier", brier, "probabilities", best=0.0),
        Metric("log_loss", log_loss, "probabilities", high=float("inf"), best=0.0),
        Metric("ece", expected_calibration_error, "probabilities", best=0.0),
        Metric("calibration_slope", calibration_slope, "probabilities", -float("inf"), float("inf"), 1.0),
        Metric("calibration_intercept", calibration_intercept, "probabilities", -float("inf"), float("inf"), 0.0),
    )
}
"""Every metric of NAMES for two classes."""
