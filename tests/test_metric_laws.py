"""Laws that every metric of the registry keeps."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from errors import DataError
from metrics import METRICS, NAMES, Metric, UndefinedMetricWarning

ALL = [pytest.param(metric, id=name) for name, metric in METRICS.items()]
# Classes that are fully separated have no finite recalibration.
NOT_RECALIBRATION = [m for m in ALL if not m.values[0].name.startswith("calibration_")]
SEEDS = range(4)

SKLEARN = {
    "accuracy": sklearn_metrics.accuracy_score,
    "balanced_accuracy": sklearn_metrics.balanced_accuracy_score,
    "precision": sklearn_metrics.precision_score,
    "sensitivity": sklearn_metrics.recall_score,
    "specificity": lambda y, v: sklearn_metrics.recall_score(y, v, pos_label=0),
    "npv": lambda y, v: sklearn_metrics.precision_score(y, v, pos_label=0),
    "f1": sklearn_metrics.f1_score,
    "auc_roc": sklearn_metrics.roc_auc_score,
    "auc_pr": sklearn_metrics.average_precision_score,
    "cohen_kappa": sklearn_metrics.cohen_kappa_score,
    "mcc": sklearn_metrics.matthews_corrcoef,
    "brier": sklearn_metrics.brier_score_loss,
    "log_loss": sklearn_metrics.log_loss,
}


def values(metric: Metric, p: np.ndarray) -> np.ndarray:
    return (p >= 0.5).astype(int) if metric.needs == "predictions" else p


def sample(seed: int, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.concatenate([[0, 1], rng.integers(2, size=78)])
    p = np.clip(rng.beta(2, 2, size=80) + 0.2 * (y - 0.5), 0.01, 0.99)
    return y, np.round(p, 1) if ties else p


def test_the_registry_holds_every_name_of_the_report() -> None:
    assert tuple(sorted(METRICS)) == tuple(sorted(NAMES))
    assert all(metric.name == name for name, metric in METRICS.items())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SKLEARN)
def test_values_are_scikit_learns(name: str, seed: int, ties: bool) -> None:
    y, p = sample(seed, ties=ties)
    metric = METRICS[name]
    assert metric.function(y, values(metric, p)) == pytest.approx(SKLEARN[name](y, values(metric, p)))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("metric", ALL)
def test_the_order_of_films_does_not_matter(metric: Metric, seed: int, ties: bool) -> None:
    y, p = sample(seed, ties=ties)
    order = np.random.default_rng(seed).permutation(len(y))
    v = values(metric, p)
    assert metric.function(y[order], v[order]) == pytest.approx(metric.function(y, v), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("metric", ALL)
def test_every_film_twice_changes_nothing(metric: Metric, seed: int) -> None:
    y, p = sample(seed, ties=True)
    v = values(metric, p)
    assert metric.function(np.tile(y, 2), np.tile(v, 2)) == pytest.approx(metric.function(y, v), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("metric", ALL)
def test_values_keep_within_their_bounds(metric: Metric, seed: int) -> None:
    y, p = sample(seed)
    for labels, probabilities in ((y, p), (1 - y, p), (y, 1 - p), (y, p**5)):
        value = metric.function(labels, values(metric, probabilities))
        assert metric.low <= value <= metric.high


@pytest.mark.parametrize(
    "name", ["accuracy", "balanced_accuracy", "auc_roc", "cohen_kappa", "mcc", "brier", "log_loss", "calibration_slope"]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_exchanging_the_names_of_the_classes_changes_nothing(name: str, seed: int) -> None:
    y, p = sample(seed)
    metric = METRICS[name]
    v = values(metric, p)
    assert metric.function(1 - y, 1 - v) == pytest.approx(metric.function(y, v), rel=1e-9)


@pytest.mark.parametrize(("one", "other"), [("sensitivity", "specificity"), ("precision", "npv")])
@pytest.mark.parametrize("seed", SEEDS)
def test_exchanging_the_classes_exchanges_the_rates(one: str, other: str, seed: int) -> None:
    y, p = sample(seed)
    v = (p >= 0.5).astype(int)
    assert METRICS[one].function(1 - y, 1 - v) == pytest.approx(METRICS[other].function(y, v))


@pytest.mark.parametrize("name", ["auc_roc", "auc_pr"])
@pytest.mark.parametrize("seed", SEEDS)
def test_ranking_metrics_see_ranks_only(name: str, seed: int) -> None:
    y, p = sample(seed, ties=True)
    function = METRICS[name].function
    for rising in (lambda x: 100 * x - 3, lambda x: x**3, np.exp):
        assert function(y, rising(p)) == pytest.approx(function(y, p))


@pytest.mark.parametrize("metric", NOT_RECALIBRATION)
def test_a_perfect_model_gets_the_best_value(metric: Metric) -> None:
    y = np.array([0, 1, 1, 0, 0])
    assert metric.function(y, y.astype(float)) == pytest.approx(metric.best)


@pytest.mark.parametrize("metric", NOT_RECALIBRATION)
def test_more_wrong_films_are_further_from_the_best(metric: Metric) -> None:
    y = np.tile([0, 1], 50)
    sure = np.where(y == 1, 0.95, 0.05)
    few, many = (np.where(np.arange(100) % 10 < wrong, 1 - sure, sure) for wrong in (2, 4))
    good, bad = (metric.function(y, values(metric, p)) for p in (few, many))
    assert abs(good - metric.best) < abs(bad - metric.best)


NEEDS_BOTH = {
    0: ("balanced_accuracy", "sensitivity", "f1", "auc_roc", "auc_pr", "cohen_kappa", "calibration_slope"),
    1: ("balanced_accuracy", "specificity", "auc_roc", "auc_pr", "cohen_kappa", "calibration_intercept"),
}


@pytest.mark.parametrize(("label", "name"), [(label, name) for label, names in NEEDS_BOTH.items() for name in names])
def test_an_absent_class_gives_nan_and_a_warning_never_0(label: int, name: str) -> None:
    y = np.full(6, label)
    v = np.array([0, 1, 0, 1, 1, 0]) if METRICS[name].needs == "predictions" else np.linspace(0.1, 0.9, 6)
    with pytest.warns(UndefinedMetricWarning, match=f"{name} is undefined: (no|all) .*films"):
        assert np.isnan(METRICS[name].function(y, v))


@pytest.mark.parametrize("name", ["accuracy", "brier", "log_loss", "ece"])
@pytest.mark.parametrize("label", [0, 1])
def test_what_needs_no_second_class_is_defined_without_it(name: str, label: int) -> None:
    v = [0, 1, 1] if METRICS[name].needs == "predictions" else [0.1, 0.9, 0.8]
    assert np.isfinite(METRICS[name].function([label] * 3, v))


@pytest.mark.parametrize(
    ("name", "v", "said"),
    [
        ("precision", [0, 0, 0], "never predicts 1"),
        ("npv", [1, 1, 1], "never predicts anything but 1"),
        ("mcc", [1, 1, 1], "never predicts 0"),
        ("calibration_slope", [0.5, 0.5, 0.5], "same probability"),
    ],
)
def test_constant_predictions_leave_undefined_what_is_undefined(name: str, v: list, said: str) -> None:
    with pytest.warns(UndefinedMetricWarning, match=said):
        assert np.isnan(METRICS[name].function([0, 1, 1], v))


def test_constant_scores_are_worth_chance() -> None:
    y, constant = [0, 1, 1, 0, 0], np.full(5, 0.3)
    assert METRICS["auc_roc"].function(y, constant) == 0.5
    assert METRICS["auc_pr"].function(y, constant) == pytest.approx(0.4)
    assert METRICS["cohen_kappa"].function(y, np.ones(5)) == 0
    assert METRICS["balanced_accuracy"].function(y, np.ones(5)) == 0.5


@pytest.mark.parametrize("metric", ALL)
def test_nan_is_an_error_that_names_the_row(metric: Metric) -> None:
    with pytest.raises(DataError, match="row 2: .* NaN"):
        metric.function([0, 1, 1], [0.0, 1.0, np.nan])


@pytest.mark.parametrize("metric", ALL)
def test_lengths_that_differ_are_an_error(metric: Metric) -> None:
    with pytest.raises(DataError, match="but there are 2 labels"):
        metric.function([0, 1], [0.0, 1.0, 1.0])


@pytest.mark.parametrize("metric", [m for m in ALL if m.values[0].needs != "scores"])
def test_values_outside_their_range_are_an_error(metric: Metric) -> None:
    with pytest.raises(DataError, match="row 1: .*outside"):
        metric.function([0, 1], [0.0, 2.0])
