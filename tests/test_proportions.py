"""Proportions against exact tail sums, statsmodels and inverted tests."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from errors import DataError
from proportions import (
    DIFFERENCE_INTERVALS,
    PROPORTION_INTERVALS,
    adjust_p_values,
    clustered_proportion,
    diagnostic_table,
    difference_of_proportions,
    predictive_values,
    proportion,
    proportion_interval,
)

COUNTS = [(0, 1), (1, 1), (0, 20), (1, 29), (5, 10), (20, 20), (58, 72), (950, 1000)]
LEVELS = [0.8, 0.95, 0.99]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", PROPORTION_INTERVALS)
@pytest.mark.parametrize(("count", "n"), COUNTS)
def test_limits_mirror_when_hits_and_misses_are_exchanged(count: int, n: int, method: str, level: float) -> None:
    low, high = proportion_interval(count, n, level=level, method=method)
    mirrored = proportion_interval(n - count, n, level=level, method=method)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert low <= high


@pytest.mark.parametrize("method", PROPORTION_INTERVALS)
@pytest.mark.parametrize(("count", "n"), COUNTS)
def test_clipped_limits_hold_the_value_within_0_and_1(count: int, n: int, method: str) -> None:
    low, high = proportion_interval(count, n, method=method, clip=True)
    assert 0 <= low <= high <= 1
    if method != "jeffreys":  # at 0 and n Jeffreys' equal tails leave the value out
        assert low <= count / n <= high
    widths = [np.subtract(*proportion_interval(count, n, level=level, method=method)[::-1]) for level in LEVELS]
    assert widths == sorted(widths)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("count", "n"), COUNTS)
def test_clopper_pearson_limits_leave_half_the_error_in_each_binomial_tail(count: int, n: int, level: float) -> None:
    low, high = proportion_interval(count, n, level=level, method="clopper_pearson")
    if count:
        assert stats.binom.sf(count - 1, n, low) == pytest.approx((1 - level) / 2)
    if count < n:
        assert stats.binom.cdf(count, n, high) == pytest.approx((1 - level) / 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("count", "n"), COUNTS)
def test_wilson_limits_are_where_the_score_test_just_rejects(count: int, n: int, level: float) -> None:
    z = stats.norm.isf((1 - level) / 2)
    for limit in proportion_interval(count, n, level=level):
        if 0 < limit < 1:
            assert abs(count / n - limit) / np.sqrt(limit * (1 - limit) / n) == pytest.approx(z)


def test_no_films_have_no_proportion() -> None:
    assert np.isnan(proportion_interval(0, 0)).all()
    estimate = proportion(0, 0)
    assert np.isnan(estimate.value) and "denominator is 0" in estimate.reason


@pytest.mark.parametrize(
    ("count", "n", "method", "said"),
    [(3, 2, "wilson", "3 of 2 is no proportion"), (1, 2, "wilsn", "did you mean 'wilson'"), (-1, 2, "wald", "no prop")],
)
def test_impossible_proportions_are_named(count: int, n: int, method: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        proportion_interval(count, n, method=method)


# --- clusters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_clustered_standard_error_is_statsmodels_cluster_robust_mean(seed: int) -> None:
    rng = np.random.default_rng(seed)
    patients, hits = rng.integers(30, size=100), rng.random(100) < 0.7
    model = sm.OLS(hits.astype(float), np.ones(100)).fit(cov_type="cluster", cov_kwds={"groups": patients})
    estimate = clustered_proportion(hits, patients)
    assert estimate.value == pytest.approx(hits.mean())
    assert estimate.standard_error == pytest.approx(model.bse[0])


def test_copies_within_a_patient_teach_nothing_about_a_proportion() -> None:
    hits = np.array([1, 1, 0, 1, 0, 1, 1, 1])
    once = clustered_proportion(hits, np.arange(8))
    copied = clustered_proportion(np.tile(hits, 4), np.tile(np.arange(8), 4))
    assert copied.ci == pytest.approx(once.ci)


def test_a_perfect_clustered_proportion_is_bounded_by_the_number_of_patients() -> None:
    estimate = clustered_proportion(np.ones(40), np.repeat(np.arange(10), 4), method="wilson")
    assert estimate.ci == pytest.approx(proportion_interval(10, 10))


def test_one_patient_or_no_film_gives_no_interval() -> None:
    assert "one patient only" in clustered_proportion([1, 0], ["a", "a"]).reason
    assert "denominator is 0" in clustered_proportion([], []).reason


# --- two proportions ------------------------------------------------------------------------------------------

TABLES = [(56, 70, 48, 80), (9, 10, 3, 10), (10, 10, 0, 20), (6, 7, 2, 7), (0, 5, 0, 9), (5, 5, 9, 9), (1, 100, 0, 3)]


@pytest.mark.parametrize("method", DIFFERENCE_INTERVALS)
@pytest.mark.parametrize("table", TABLES)
def test_differences_mirror_when_groups_are_exchanged(table: tuple[int, int, int, int], method: str) -> None:
    x1, n1, x2, n2 = table
    forth = difference_of_proportions(x1, n1, x2, n2, method=method)
    back = difference_of_proportions(x2, n2, x1, n1, method=method)
    assert back.ci == pytest.approx((-forth.ci_high, -forth.ci_low), abs=1e-9)
    assert -1 <= forth.ci_low <= forth.ci_high <= 1
    if method != "agresti_caffo":  # centred on the adjusted difference
        assert forth.ci_low <= forth.value + 1e-12 and forth.value <= forth.ci_high + 1e-12


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("table", TABLES)
def test_score_limits_are_where_the_restricted_likelihood_test_just_rejects(
    table: tuple[int, int, int, int], level: float
) -> None:
    x1, n1, x2, n2 = table
    z = stats.norm.isf((1 - level) / 2)
    for limit in difference_of_proportions(*table, level=level, method="mee").ci:
        if abs(limit) > 1 - 1e-6:
            continue
        # The restricted maximum by brute force, independent of the closed form of the cubic.
        p2 = np.linspace(max(0, -limit), min(1, 1 - limit), 200_001)[1:-1]
        p1 = p2 + limit
        fit = stats.binom.logpmf(x1, n1, np.clip(p1, 0, 1)) + stats.binom.logpmf(x2, n2, p2)
        best = int(np.argmax(fit))
        se = np.sqrt(p1[best] * (1 - p1[best]) / n1 + p2[best] * (1 - p2[best]) / n2)
        # The grid knows the maximum to 1e-5, of variances down to 1e-2.
        assert abs(x1 / n1 - x2 / n2 - limit) / se == pytest.approx(z, rel=5e-3)


def test_an_empty_group_has_no_difference() -> None:
    assert "empty" in difference_of_proportions(0, 0, 1, 2).reason
    with pytest.raises(DataError, match="did you mean 'newcombe'"):
        difference_of_proportions(1, 2, 1, 2, method="newcomb")


# --- the 2×2 table --------------------------------------------------------------------------------------------


def test_likelihood_ratios_and_odds_ratio_fit_together() -> None:
    table = diagnostic_table(40, 10, 5, 45)
    ratio = table["lr_positive"].value / table["lr_negative"].value
    assert table["diagnostic_odds_ratio"].value == pytest.approx(ratio) == pytest.approx(40 * 45 / (10 * 5))
    assert table["youden"].value == pytest.approx(40 / 45 + 45 / 55 - 1)
    assert table["youden"].ci_low < table["youden"].value < table["youden"].ci_high


def test_an_empty_cell_leaves_ratios_undefined_and_says_so() -> None:
    table = diagnostic_table(10, 0, 0, 10)
    for name in ("lr_positive", "lr_negative", "diagnostic_odds_ratio"):
        assert np.isnan(table[name].value) and "a cell of the 2×2 table is 0" in table[name].reason
    assert table["youden"].value == 1 and table["youden"].ci_low < 0.8
    assert "a class is absent" in diagnostic_table(0, 1, 0, 2)["youden"].reason


@pytest.mark.parametrize("prevalence", [0.01, 0.3, 0.9])
def test_predictive_values_follow_bayes_rule(prevalence: float) -> None:
    ppv, npv = predictive_values(0.9, 0.8, prevalence=prevalence)
    assert ppv / (1 - ppv) == pytest.approx(prevalence / (1 - prevalence) * 0.9 / 0.2)
    assert (1 - npv) / npv == pytest.approx(prevalence / (1 - prevalence) * 0.1 / 0.8)


def test_predictive_values_at_the_samples_prevalence_are_the_samples() -> None:
    table = diagnostic_table(40, 10, 5, 45)
    ppv, npv = predictive_values(
        table["sensitivity"].value, table["specificity"].value, prevalence=table["prevalence"].value
    )
    assert (ppv, npv) == pytest.approx((table["ppv"].value, table["npv"].value))


def test_predictive_values_of_nobody_are_undefined() -> None:
    assert np.isnan(predictive_values(0.0, 1.0, prevalence=0.1)[0])
    with pytest.raises(DataError, match="prevalence 2 is not"):
        predictive_values(0.9, 0.9, prevalence=2)


# --- many tests -----------------------------------------------------------------------------------------------


ADJUSTMENTS = ["holm", "hochberg", "hommel", "bonferroni", "benjamini_hochberg", "benjamini_yekutieli"]


@pytest.mark.parametrize("method", ADJUSTMENTS)
def test_adjusted_p_values_keep_their_order_and_skip_what_was_not_tested(method: str) -> None:
    p = [0.03, np.nan, 0.001, 0.8]
    adjusted = adjust_p_values(p, method=method)
    assert np.isnan(adjusted[1])
    assert adjusted[2] <= adjusted[0] <= adjusted[3] <= 1
    assert all(a >= b for a, b in zip(adjusted, p) if not np.isnan(b))
    if method != "benjamini_yekutieli":  # dearer by 1 + 1/2 + 1/3
        assert adjusted[2] == pytest.approx(0.003)
    assert adjust_p_values([], method=method) == []


def test_unknown_adjustments_and_impossible_p_values_are_named() -> None:
    with pytest.raises(DataError, match="did you mean 'bonferroni'"):
        adjust_p_values([0.1], method="bonferoni")
    with pytest.raises(DataError, match="between 0 and 1"):
        adjust_p_values([1.1])
