"""Sample sizes against numerical differentiation, the tests they plan, published tables and their own inverses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from auroc import delong_test
from errors import ConfigError, DataError
from reader_study import reader_study
from sample_size import (
    Binormal,
    MrmcPilot,
    PairedAuc,
    accuracy_cohort,
    auc_precision_sample_size,
    expected_range,
    kappa_precision,
    kappa_sample_size,
    mrmc_cases,
    mrmc_conjectured,
    mrmc_pilot,
    mrmc_power,
    mrmc_readers,
    noncentrality_f,
    one_auc,
    paired_auc,
    paired_auc_pilot,
    partial_auc_pair,
    precision_sample_size,
    two_proportions,
)
from tests.test_reader_study import simulate

VANDYKE = MrmcPilot(0.00020040252, 0.00080228827, 0.00034661371, 0.00034407483, 0.00023902837, cases=114, effect=0.05)

# ------------------------------------------------------------------------------------------------ one or two AUCs


@pytest.mark.parametrize("left_out", ["auc", "n_positive", "power", "alpha"])
@pytest.mark.parametrize("two_sided", [True, False])
def test_each_number_of_one_auc_is_recovered_from_the_others(left_out: str, two_sided: bool) -> None:
    plan = one_auc(auc=0.77, n_positive=31, n_negative=50, alpha=0.03, two_sided=two_sided)
    given: dict[str, Any] = {name: plan[name] for name in ("auc", "n_positive", "power", "alpha")}
    again = one_auc(**(given | {left_out: None}), ratio=50 / 31, two_sided=two_sided)
    assert again == pytest.approx(plan, rel=1e-8)


def test_a_one_sided_test_at_half_alpha_needs_as_many_cases_as_the_two_sided_one() -> None:
    one_sided = one_auc(auc=0.8, power=0.9, alpha=0.025, two_sided=False)
    assert one_sided["n_positive"] == pytest.approx(one_auc(auc=0.8, power=0.9)["n_positive"])


def binormal_area(a: float, b: float, low: float, high: float) -> float:
    def height(rate: float) -> float:
        return float(stats.norm.cdf(a + b * stats.norm.ppf(rate)))

    return float(integrate.quad(height, low, high, epsabs=1e-13, epsrel=1e-13, limit=500)[0])


@pytest.mark.parametrize(("a", "b"), [(2.6, 1.0), (1.2, 0.7), (0.8, 1.4)])
@pytest.mark.parametrize("fpr", [(0.0, 1.0), (0.0, 0.2), (0.1, 0.5)])
def test_derivatives_of_the_partial_area_equal_finite_differences(a: float, b: float, fpr: tuple[float, float]) -> None:
    step = 1e-4
    in_a = (binormal_area(a + step, b, *fpr) - binormal_area(a - step, b, *fpr)) / (2 * step)
    in_b = (binormal_area(a, b + step, *fpr) - binormal_area(a, b - step, *fpr)) / (2 * step)
    # Central differences err by step²; the quadrature by less.
    assert Binormal(a, b, fpr).derivatives() == pytest.approx((in_a, in_b), abs=1e-6)


def test_identical_curves_with_uncorrelated_scores_double_the_variance() -> None:
    curve = Binormal(1.5, 0.9, (0.0, 0.3))
    plan = partial_auc_pair(curve, curve, delta=0.05, corr_positive=0.0, corr_negative=0.0, ratio=2.0)
    assert plan.covariance == 0
    assert plan.null == plan.alternative == pytest.approx(2 * curve.variance(2.0))


def test_the_pilot_variance_of_a_difference_is_that_of_the_paired_delong_test() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [40, 60])
    a, b = labels + rng.normal(0, 1, 100), labels + rng.normal(0, 1.5, 100)
    pilot, test = paired_auc_pilot(labels, a, b), delong_test(labels, a, b)
    assert pilot.alternative / 40 == pytest.approx(test.standard_error**2)
    assert (pilot.delta, pilot.ratio) == (pytest.approx(test.difference), 1.5)


def test_each_number_of_paired_aucs_is_recovered_from_the_others() -> None:
    pilot = PairedAuc(0.06, 0.05, 0.07, 0.03, ratio=1.7)
    plan = paired_auc(pilot, n_positive=90)
    assert paired_auc(pilot, power=plan["power"])["n_positive"] == pytest.approx(90)
    assert paired_auc(pilot, n_positive=90, power=plan["power"], alpha=None)["alpha"] == pytest.approx(0.05)
    assert plan["n_negative"] == pytest.approx(153)


def test_scores_that_rank_the_pilot_alike_cannot_be_planned_with() -> None:
    with pytest.raises(DataError, match="rank the pilot cases alike"):
        paired_auc(paired_auc_pilot([0, 1, 0, 1, 1], [1, 2, 3, 4, 5], [2, 4, 6, 8, 10]), power=0.8)


# ------------------------------------------------------------------------------------------------ reader studies


def test_power_for_the_pilots_own_size_rests_on_the_pilots_own_test() -> None:
    study = reader_study(simulate(readers=5, positive=30, negative=30, seed=8))
    assert study["variance_components"]["reader_by_modality"] > 0
    assert study["variance_components"]["cov2"] > study["variance_components"]["cov3"]
    plan = mrmc_power(mrmc_pilot(study), readers=5, cases=60)
    assert plan["df_den"] == pytest.approx(study["df_den"])
    assert plan["ncp"] == pytest.approx(study["f_statistic"])
    critical = stats.f.ppf(0.95, 1, study["df_den"])
    assert plan["power"] == pytest.approx(stats.ncf.sf(critical, 1, study["df_den"], study["f_statistic"]))


@pytest.mark.parametrize("random", ["both", "cases", "readers"])
def test_power_against_no_effect_is_alpha(random: str) -> None:
    assert mrmc_power(VANDYKE, readers=6, cases=200, effect=1e-9, random=random)["power"] == pytest.approx(0.05)


def test_power_grows_with_readers_cases_and_effect() -> None:
    by_cases = mrmc_power(VANDYKE, readers=6, cases=[50, 100, 200, 400])["power"]
    by_readers = [mrmc_power(VANDYKE, readers=j, cases=100)["power"] for j in (3, 5, 8, 20)]
    by_effect = [mrmc_power(VANDYKE, readers=6, cases=100, effect=e)["power"] for e in (0.01, 0.03, 0.06)]
    assert all((np.diff(powers) > 0).all() for powers in (by_cases, by_readers, by_effect))


@pytest.mark.parametrize("random", ["both", "cases", "readers"])
def test_the_cases_found_are_the_fewest_that_reach_the_power(random: str) -> None:
    found = mrmc_cases(VANDYKE, readers=7, power=0.9, random=random)
    fewer = mrmc_power(VANDYKE, readers=7, cases=found["cases"] - 1, random=random)["power"]
    assert fewer < 0.9 <= found["power"]


def test_the_readers_found_are_the_fewest_that_reach_the_power() -> None:
    found = mrmc_readers(VANDYKE, cases=200, power=0.9)
    assert mrmc_power(VANDYKE, readers=int(found["readers"]) - 1, cases=200)["power"] < 0.9 <= found["power"]


def test_too_few_readers_for_any_number_of_cases_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 readers do not reach power 0\.99 .*; add readers"):
        mrmc_cases(replace(VANDYKE, effect=0.01), readers=3, power=0.99)


def test_a_pilot_without_crossed_readers_is_refused() -> None:
    with pytest.raises(DataError, match="every reader used every modality"):
        mrmc_pilot(reader_study(simulate(), method="ustat"))


def test_a_pilot_of_sensitivity_counts_its_positive_cases() -> None:
    study = reader_study(simulate(), outcome="sensitivity", threshold=0.5)
    assert mrmc_pilot(study).cases == 12


@pytest.mark.parametrize(("n", "published"), [(2, 1.12838), (5, 2.32593), (10, 3.07751), (20, 3.73495)])
def test_expected_ranges_are_those_of_tippetts_table(n: int, published: float) -> None:
    assert expected_range(n) == pytest.approx(published, abs=5e-6)


def test_noncentrality_tends_to_the_square_of_the_summed_normal_quantiles() -> None:
    limit = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2
    assert noncentrality_f(power=0.8, alpha=0.05, df_num=1, df_den=1e6) == pytest.approx(limit, rel=1e-4)


def test_conjectured_components_give_back_the_power_they_were_planned_for() -> None:
    """With r2 = r3 the plan's own F test, at the case variance of one case over the unrounded cases."""
    plan = mrmc_conjectured(readers=10, delta=0.1, theta=0.75, range_between=0.1, range_within=0.05, r1=0.47)
    case_variance = plan["error"] - plan["within"]
    denominator = plan["reader_by_modality"] + plan["within"] + case_variance * (1 - 0.47)
    assert 10 * 0.1**2 / (2 * denominator) == pytest.approx(plan["ncp"])


def test_lesions_within_a_case_save_cases_and_cost_units() -> None:
    common: dict[str, Any] = {"readers": 20, "delta": 0.05, "theta": 0.75, "range_between": 0.2, "range_within": 0.05}
    plain = mrmc_conjectured(**common, r1=0.47)
    clustered = mrmc_conjectured(**common, r1=0.47, icc=0.5, lesions=1.25)
    assert clustered["units"] == plain["units"] == plain["n_positive"]
    assert clustered["units_inflated"] == math.ceil(plain["units"] * 1.125)
    assert clustered["n_positive"] == math.ceil(clustered["units_inflated"] / 1.25)


def test_readers_who_differ_too_much_are_refused_whatever_the_cases() -> None:
    with pytest.raises(ConfigError, match="however many cases; add readers"):
        mrmc_conjectured(readers=5, delta=0.02, theta=0.75, range_between=0.3, range_within=0.1, r1=0.47)


# ---------------------------------------------------------------------------------- proportions and agreement


def test_half_within_five_points_needs_385_subjects() -> None:
    assert math.ceil(precision_sample_size(0.5, margin=0.05)) == 385


def test_a_cohort_is_as_large_as_its_rarer_class_demands() -> None:
    size = accuracy_cohort(sensitivity=0.9, specificity=0.9, prevalence=0.2, margin=0.05)
    assert size["n_for_sensitivity"] == pytest.approx(4 * size["n_for_specificity"])
    assert size["n_total"] == math.ceil(size["n_for_sensitivity"])


def test_two_proportions_agree_with_the_example_of_rs_power_prop_test() -> None:
    assert two_proportions(0.50, 0.75, power=0.90)["n"] == pytest.approx(76.7, abs=0.05)
    assert two_proportions(0.50, 0.75, n=50)["power"] == pytest.approx(0.740, abs=0.0005)


@pytest.mark.parametrize("method", ["normal", "arcsine"])
@pytest.mark.parametrize("two_sided", [True, False])
def test_power_at_the_size_found_is_the_power_asked_for(method: str, two_sided: bool) -> None:
    n = two_proportions(0.6, 0.7, power=0.85, method=method, two_sided=two_sided)["n"]
    again = two_proportions(0.6, 0.7, n=n, method=method, two_sided=two_sided)
    assert again["power"] == pytest.approx(0.85, abs=1e-6)


def test_a_standalone_auc_study_grows_with_the_square_of_the_precision() -> None:
    wide, narrow = (auc_precision_sample_size(0.85, margin=margin)["n_positive"] for margin in (0.1, 0.05))
    assert narrow == pytest.approx(4 * wide, abs=4)


def test_kappa_for_two_raters_is_the_closed_form_of_donner_and_eliasziw() -> None:
    p, null, kappa = 0.3, 0.4, 0.6
    cells = [p**2 + p * (1 - p) * null, 2 * p * (1 - p) * (1 - null), (1 - p) ** 2 + p * (1 - p) * null]
    distance = (p * (1 - p) * (kappa - null)) ** 2 * (1 / cells[0] + 4 / cells[1] + 1 / cells[2])
    # 7.849 is the noncentrality of a 5 % chi-square test with one df and 80 % power.
    assert kappa_sample_size(null, kappa, prevalence=p) == pytest.approx(7.849 / distance, rel=1e-4)


def test_more_raters_need_fewer_subjects() -> None:
    sizes = [kappa_sample_size(0.4, 0.6, prevalence=0.3, raters=raters) for raters in range(2, 7)]
    assert (np.diff(sizes) < 0).all()


def test_the_kappa_interval_is_within_its_bounds_at_the_size_found_only() -> None:
    n = kappa_precision(0.4, lower=0.3, upper=0.5, prevalence=0.3)
    assert kappa_precision(0.4, lower=0.2, upper=0.6, prevalence=0.3) < n / 3
    assert kappa_precision(0.4, lower=0.3, prevalence=0.3) < n


# ------------------------------------------------------------------------------------------------ wrong requests


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: one_auc(auc=0.8), "exactly one"),
        (lambda: one_auc(auc=1.2, power=0.8), "auc 1.2 is not between 0 and 1"),
        (lambda: one_auc(auc=0.5, power=0.8), "difference to detect is 0"),
        (lambda: one_auc(n_positive=1, power=0.99), "detect no AUC below 1"),
        (lambda: paired_auc(PairedAuc(0.1, 0.1, 0.1, 0.0, 1.0)), "exactly one"),
        (lambda: mrmc_power(VANDYKE, readers=1, cases=100), "at least 2"),
        (lambda: mrmc_power(VANDYKE, readers=5, cases=1), "at least 2 cases"),
        (lambda: mrmc_power(VANDYKE, readers=5, cases=100, random="none"), "not one of both, cases, readers"),
        (lambda: two_proportions(0.5, 0.5, power=0.8), "no difference to detect"),
        (lambda: two_proportions(0.5, 0.6), "exactly one of power and n"),
        (lambda: two_proportions(0.5, 0.6, power=0.8, method="exact"), "not one of normal, arcsine"),
        (lambda: kappa_precision(0.4, lower=0.5, prevalence=0.3), "must lie between"),
        (lambda: kappa_sample_size(0.4, 0.4, prevalence=0.3), "two values are needed"),
        (lambda: noncentrality_f(power=0.04, alpha=0.05, df_num=1, df_den=4), "must be above alpha"),
        (lambda: expected_range(1), "at least 2 values"),
    ],
)
def test_an_impossible_request_is_a_config_error(request_: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request_()
