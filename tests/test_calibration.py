"""Calibration against scikit-learn, statsmodels and definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize, special
from sklearn import metrics as sklearn_metrics

from calibration import (
    adjust_prior,
    apply_temperature,
    brier,
    brier_decomposition,
    calibration_in_the_large,
    expected_calibration_error,
    fit_isotonic,
    fit_temperature,
    hosmer_lemeshow,
    log_loss,
    logistic_recalibration,
    observed_to_expected,
    reliability_bins,
    spiegelhalter_z,
    top_label,
)
from errors import DataError
from estimates import UndefinedMetricWarning

SEEDS = range(4)


def sample(seed: int, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes and overconfident probabilities."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    return (rng.random(n) < special.expit(truth)).astype(int), special.expit(1.7 * truth - 0.4)


def multiclass(seed: int, n: int = 300, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(k, size=n)
    return y, 3 * (rng.normal(size=(n, k)) + 0.8 * np.eye(k)[y])


@pytest.mark.parametrize("seed", SEEDS)
def test_brier_and_log_loss_are_scikit_learns(seed: int) -> None:
    y, p = sample(seed)
    assert brier(y, p) == pytest.approx(sklearn_metrics.brier_score_loss(y, p))
    assert log_loss(y, p) == pytest.approx(sklearn_metrics.log_loss(y, p))
    labels, logits = multiclass(seed)
    q = apply_temperature(logits, 1.0)
    assert log_loss(labels, q) == pytest.approx(sklearn_metrics.log_loss(labels, q))
    assert brier(labels, q) == pytest.approx(((q - np.eye(4)[labels]) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_binary_brier_score_is_half_the_two_column_one(seed: int) -> None:
    y, p = sample(seed)
    assert brier(y, np.column_stack([1 - p, p])) == pytest.approx(2 * brier(y, p))
    assert log_loss(y, np.column_stack([1 - p, p])) == pytest.approx(log_loss(y, p))


def test_certainty_that_was_wrong_costs_a_finite_amount() -> None:
    assert log_loss([1], [0.0]) == pytest.approx(-np.log(np.finfo(float).eps))
    assert log_loss([1, 0], [1.0, 0.0]) == 0


@pytest.mark.parametrize("n_bins", [5, 10, None])
@pytest.mark.parametrize("strategy", ["equal_width", "equal_mass"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_parts_of_the_brier_score_add_up(seed: int, strategy: str, n_bins: int | None) -> None:
    y, p = sample(seed)
    p = np.round(p, 1)
    parts = brier_decomposition(y, p, n_bins=n_bins, strategy=strategy)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    assert total == pytest.approx(parts.brier) == pytest.approx(brier(y, p))
    assert parts.uncertainty == pytest.approx(y.mean() * (1 - y.mean()))
    assert min(parts.reliability, parts.resolution) >= 0
    if n_bins is None:
        assert parts.within_bin == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("n_bins", [1, 10, 15])
@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_error_equals_the_sum_over_bins(seed: int, n_bins: int, norm: str) -> None:
    y, p = sample(seed)
    index = np.minimum((p * n_bins).astype(int), n_bins - 1)
    members = [index == k for k in range(n_bins) if (index == k).any()]
    gaps = np.array([abs(p[m].mean() - y[m].mean()) for m in members])
    weights = np.array([m.mean() for m in members])
    expected = {"l1": weights @ gaps, "l2": np.sqrt(weights @ gaps**2), "max": gaps.max()}[norm]
    assert expected_calibration_error(y, p, n_bins=n_bins, norm=norm) == pytest.approx(expected)


def test_equal_mass_bins_hold_equally_many_films_and_lose_none() -> None:
    y, p = sample(0, n=403)
    bins = reliability_bins(y, p, strategy="equal_mass")
    assert bins.count.sum() == 403
    assert bins.count.max() - bins.count.min() <= 1


def test_equal_probabilities_share_a_bin_whatever_their_order() -> None:
    y, p = np.tile([0, 1], 50), np.repeat([0.2, 0.8], 50)
    forth = expected_calibration_error(y, p, strategy="equal_mass")
    assert forth == expected_calibration_error(y[::-1], p[::-1], strategy="equal_mass") == pytest.approx(0.3)
    assert reliability_bins(y, np.full(100, 0.4), strategy="equal_mass").count.tolist() == [100]


def test_the_last_bin_is_closed_unless_asked_otherwise() -> None:
    y, p = [1, 1, 0], [0.95, 1.0, 0.0]
    assert reliability_bins(y, p).count.tolist() == [1, 2]
    assert reliability_bins(y, p, last_closed=False).count.tolist() == [1, 1, 1]


def test_calibration_error_of_many_classes_is_that_of_the_top_label() -> None:
    y, logits = multiclass(0)
    p = apply_temperature(logits, 1.0)
    right, sure = top_label(y, p)
    assert (right == (p.argmax(axis=1) == y)).all() and (sure == p.max(axis=1)).all()
    assert expected_calibration_error(y, p) == expected_calibration_error(right, sure)


@pytest.mark.parametrize("seed", SEEDS)
def test_spiegelhalters_z_is_its_definition(seed: int) -> None:
    y, p = sample(seed)
    z, probability = spiegelhalter_z(y, p)
    expected = ((y - p) * (1 - 2 * p)).sum() / np.sqrt((p * (1 - p) * (1 - 2 * p) ** 2).sum())
    assert z == pytest.approx(expected) and 0 <= probability <= 1


def test_spiegelhalters_z_of_coins_is_undefined() -> None:
    with pytest.warns(UndefinedMetricWarning, match="0, 1/2 or 1"):
        assert np.isnan(spiegelhalter_z([0, 1], [0.5, 0.5])[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_recalibration_is_the_logistic_regression_of_statsmodels(seed: int) -> None:
    y, p = sample(seed)
    design = sm.add_constant(special.logit(p))
    model = sm.GLM(y, design, family=sm.families.Binomial()).fit(tol=1e-12)
    ours = logistic_recalibration(y, p, level=0.9)
    np.testing.assert_allclose([ours.intercept.value, ours.slope.value], model.params, rtol=1e-8)
    np.testing.assert_allclose([ours.intercept.ci, ours.slope.ci], model.conf_int(0.1), rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_clustered_recalibration_is_the_sandwich_of_statsmodels(seed: int) -> None:
    y, p = sample(seed)
    patients = np.random.default_rng(seed).integers(120, size=len(y))
    design = sm.add_constant(special.logit(p))
    model = sm.GLM(y, design, family=sm.families.Binomial()).fit(
        tol=1e-12, cov_type="cluster", cov_kwds={"groups": patients, "use_correction": False}
    )
    n_patients = len(np.unique(patients))
    ours = logistic_recalibration(y, p, groups=patients)
    errors = [ours.intercept.standard_error, ours.slope.standard_error]
    np.testing.assert_allclose(errors, model.bse * np.sqrt(n_patients / (n_patients - 1)), rtol=1e-6)
    assert "clustered by patient" in ours.slope.method


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_in_the_large_is_the_offset_model_of_statsmodels(seed: int) -> None:
    y, p = sample(seed)
    model = sm.GLM(y, np.ones(len(y)), family=sm.families.Binomial(), offset=special.logit(p)).fit(tol=1e-12)
    ours = calibration_in_the_large(y, p)
    assert ours.value == pytest.approx(model.params[0], rel=1e-8)
    assert ours.ci == pytest.approx(tuple(model.conf_int()[0]), rel=1e-6)


def test_certain_probabilities_are_clipped_and_that_is_said() -> None:
    y, p = sample(0)
    p[:3] = [0.0, 1.0, 1.0]
    fit = logistic_recalibration(y, p)
    assert np.isfinite(fit.slope.value) and "3 probabilities of 0 or 1 were clipped" in fit.slope.reason


@pytest.mark.parametrize(
    ("y", "p", "said"),
    [
        ([0, 0], [0.1, 0.2], "all films are of class 0"),
        ([0, 1], [0.3, 0.3], "same probability"),
        ([0, 0, 1], [0.1, 0.2, 0.7], "separate the classes"),
        ([0, 0, 1], [0.1, 0.3, 0.3], "separate the classes"),
        ([1, 1, 0], [0.1, 0.2, 0.7], "separate the classes"),
    ],
)
def test_a_slope_that_is_not_finite_says_why(y: list[int], p: list[float], said: str) -> None:
    fit = logistic_recalibration(y, p)
    assert np.isnan(fit.slope.value) and np.isnan(fit.intercept.value) and said in fit.slope.reason


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_temperature_minimises_the_log_loss(seed: int, scale: float) -> None:
    y, logits = multiclass(seed)
    logits = logits * scale
    search = optimize.minimize_scalar(
        lambda t: log_loss(y, apply_temperature(logits, np.exp(t))), bounds=(-4, 4), method="bounded"
    )
    # The loss is flat at its minimum: a search by values finds it to the root of its precision.
    assert fit_temperature(logits, y) == pytest.approx(np.exp(search.x), rel=1e-4)


def test_temperature_scales_with_the_logits_and_ignores_shifts() -> None:
    y, logits = multiclass(0)
    once = fit_temperature(logits, y)
    assert fit_temperature(7 * logits, y) == pytest.approx(7 * once)
    assert fit_temperature(logits + np.arange(len(y))[:, None], y) == pytest.approx(once)
    assert (apply_temperature(logits, once).argmax(axis=1) == logits.argmax(axis=1)).all()


def test_one_logit_column_is_the_positive_class() -> None:
    y, p = sample(0)
    z = special.logit(p)
    two = fit_temperature(np.column_stack([np.zeros_like(z), z]), y)
    assert fit_temperature(z, y) == pytest.approx(two) == pytest.approx(fit_temperature(z[:, None], y))


@pytest.mark.parametrize("logits", [[[0, 5], [5, 0]], [[5, 0], [0, 5]]])
def test_temperature_stays_1_where_no_temperature_is_best(logits: list[list[float]]) -> None:
    assert fit_temperature(logits, [1, 0]) == 1.0


def test_isotonic_map_is_monotone_and_calibrates_its_own_films() -> None:
    y, p = sample(0)
    mapped = fit_isotonic(y, p)(p)
    assert (np.diff(mapped[np.argsort(p)]) >= 0).all() and mapped.min() >= 0 and mapped.max() <= 1
    assert brier(y, mapped) < brier(y, p)
    assert brier_decomposition(y, mapped, n_bins=None).reliability == pytest.approx(0, abs=1e-6)


def test_prior_correction_is_bayes_rule_and_undoes_itself() -> None:
    p = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    odds = special.logit(0.05) - special.logit(0.5)
    expected = special.expit(special.logit(p) + odds)
    moved = adjust_prior(p, prior_from=0.5, prior_to=0.05)
    np.testing.assert_allclose(moved, expected)
    np.testing.assert_allclose(adjust_prior(moved, prior_from=0.05, prior_to=0.5), p)


def test_prior_correction_of_many_classes_keeps_rows_at_1() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), size=10)
    moved = adjust_prior(p, prior_from=[0.2, 0.3, 0.5], prior_to=[0.6, 0.3, 0.1])
    np.testing.assert_allclose(moved.sum(axis=1), 1)
    assert (moved[:, 0] > p[:, 0]).all()


def test_hosmer_lemeshow_counts_occupied_bins() -> None:
    y, p = sample(0)
    chi2, df, probability = hosmer_lemeshow(y, p, n_bins=10)
    assert (df, hosmer_lemeshow(y, p, df=10)[1]) == (8, 10)
    assert chi2 > 0 and 0 <= probability <= 1
    assert hosmer_lemeshow([1, 1, 0], [0.0, 0.9, 0.5])[2] == 0.0


def test_observed_to_expected_is_1_for_the_prevalence() -> None:
    assert observed_to_expected([0, 1, 1, 0], [0.5] * 4) == 1
    with pytest.warns(UndefinedMetricWarning, match="every probability is 0"):
        assert np.isnan(observed_to_expected([0, 1], [0.0, 0.0]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: brier([0, 1], [0.1, 1.2]), "row 1: probabilities hold 1.2, outside"),
        (lambda: brier([0, 1], [[0.1, np.nan], [0.5, 0.5]]), "row 0: probabilities hold NaN"),
        (lambda: expected_calibration_error([0, 1], [0.1, 0.2], norm="l3"), "norm 'l3'"),
        (lambda: reliability_bins([0, 1], [0.1, 0.2], strategy="deciles"), "'deciles' are neither"),
        (lambda: fit_temperature([[0, np.inf]], [1]), "row 0: logits are not finite"),
        (lambda: fit_temperature([[0, 1]], [1, 0]), "1 rows of logits but 2 labels"),
        (lambda: apply_temperature([[0, 1]], 0), "temperature 0 is not above 0"),
        (lambda: adjust_prior([0.2], prior_from=1.0, prior_to=0.5), "priors lie in"),
    ],
)
def test_bad_input_is_named(call: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        call()  # type: ignore[operator]
