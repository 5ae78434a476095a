"""Subgroup fairness against fairlearn and statsmodels; decision curves against counting."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from fairlearn import metrics as fairlearn
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep

from auroc import delong, delong_test_independent
from clinical import decision_curve, subgroup_fairness
from errors import ConfigError, DataError
from proportions import adjust_p_values


def films(n: int = 600, seed: int = 0, sites: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities and a site code; sites differ in prevalence and in how well the model ranks."""
    rng = np.random.default_rng(seed)
    site = rng.integers(0, sites, n)
    labels = (rng.random(n) < 0.3 + 0.1 * site).astype(int)
    logit = (labels - 0.5) * (1.0 + 0.5 * site) + rng.normal(0, 1, n)
    return labels, 1 / (1 + np.exp(-logit)), site


def gaps_of(labels: np.ndarray, probabilities: np.ndarray, column: Any, **options: Any) -> dict[str, Any]:
    report = subgroup_fairness(labels, probabilities, subgroups={"site": column}, n_boot=200, **options)
    return report["columns"]["site"]["gaps"]


# --------------------------------------------------------------------------------------------- gaps


@pytest.mark.parametrize("sites", [2, 3, 4])
@pytest.mark.parametrize("threshold", [0.4, 0.6])
def test_gaps_agree_with_fairlearn(sites: int, threshold: float) -> None:
    labels, probabilities, site = films(sites=sites, seed=sites)
    gaps = gaps_of(labels, probabilities, site, threshold=threshold)
    calls = (probabilities >= threshold).astype(int)
    common = {"y_true": labels, "y_pred": calls, "sensitive_features": site}
    odds, parity, opportunity = (gaps[k] for k in ("equalized_odds", "demographic_parity", "equal_opportunity"))
    assert odds["difference"] == pytest.approx(fairlearn.equalized_odds_difference(**common))
    assert odds["mean_difference"] == pytest.approx(fairlearn.equalized_odds_difference(**common, agg="mean"))
    assert odds["ratio"] == pytest.approx(fairlearn.equalized_odds_ratio(**common))
    assert parity["difference"] == pytest.approx(fairlearn.demographic_parity_difference(**common))
    assert parity["ratio"] == pytest.approx(fairlearn.demographic_parity_ratio(**common))
    assert opportunity["difference"] == pytest.approx(fairlearn.equal_opportunity_difference(**common))
    assert opportunity["ratio"] == pytest.approx(fairlearn.equal_opportunity_ratio(**common))


def test_predictive_parity_is_the_gap_in_precision() -> None:
    labels, probabilities, site = films()
    called = probabilities >= 0.5
    precision = [labels[called & (site == s)].mean() for s in range(3)]
    gap = gaps_of(labels, probabilities, site)["predictive_parity"]
    assert gap["difference"] == pytest.approx(max(precision) - min(precision))
    assert (gap["highest"], gap["lowest"]) == (str(np.argmax(precision)), str(np.argmin(precision)))


def test_the_sensitivity_gap_of_two_subgroups_has_walds_interval_and_pearsons_test() -> None:
    labels, probabilities, site = films(sites=2)
    gap = gaps_of(labels, probabilities, site, level=0.9)["equal_opportunity"]
    hit = [(probabilities >= 0.5)[(labels == 1) & (site == s)] for s in range(2)]
    p, n = [h.mean() for h in hit], [len(h) for h in hit]
    half = stats.norm.ppf(0.95) * math.sqrt(sum(a * (1 - a) / b for a, b in zip(p, n)))
    assert [gap["ci_low"], gap["ci_high"]] == pytest.approx([abs(p[0] - p[1]) - half, abs(p[0] - p[1]) + half])
    table = [[h.sum(), (~h).sum()] for h in hit]
    assert gap["p_value"] == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue)


def test_the_sensitivity_gap_by_patient_has_the_cluster_robust_error_of_a_regression() -> None:
    labels, probabilities, site = films(sites=2)
    patient = np.random.default_rng(1).integers(0, 150, len(labels))
    gap = gaps_of(labels, probabilities, site, groups=patient)["equal_opportunity"]
    diseased = labels == 1
    design = sm.add_constant(site[diseased].astype(float))
    outcome = (probabilities[diseased] >= 0.5).astype(float)
    clusters = {"groups": patient[diseased], "use_correction": False}
    fit = sm.OLS(outcome, design).fit(cov_type="cluster", cov_kwds=clusters)
    count = len(np.unique(patient[diseased]))
    se = fit.bse[1] * math.sqrt(count / (count - 1))
    assert (gap["ci_high"] - gap["ci_low"]) / 2 == pytest.approx(1.959964 * se, rel=1e-6)
    centred = (
        (outcome - outcome.mean()) * np.where(site[diseased] == 1, 1, -1) / np.bincount(site[diseased])[site[diseased]]
    )
    null_variance = (np.bincount(patient[diseased], weights=centred) ** 2).sum() * count / (count - 1)
    assert gap["statistic"] == pytest.approx(fit.params[1] ** 2 / null_variance, rel=1e-6)


def test_films_repeated_within_patients_widen_the_gaps_but_move_nothing() -> None:
    labels, probabilities, site = films(sites=2)
    single = gaps_of(labels, probabilities, site)
    copies = [np.repeat(array, 3) for array in (labels, probabilities, site, np.arange(len(labels)))]
    tripled = gaps_of(*copies[:3], groups=copies[3])
    for name, gap in single.items():
        assert tripled[name]["difference"] == pytest.approx(gap["difference"])
        width, other = (row["ci_high"] - row["ci_low"] for row in (gap, tripled[name]))
        # P/(P - 1) for patients, n/(n - 1) within classes for films: they differ by under one per cent.
        assert other == pytest.approx(width, rel=0.015)


def test_the_auroc_gap_of_two_subgroups_is_the_unpaired_delong_test() -> None:
    labels, probabilities, site = films(sites=2)
    gap = gaps_of(labels, probabilities, site)["auc"]
    sides = [(labels[site == s], probabilities[site == s]) for s in (int(gap["highest"]), int(gap["lowest"]))]
    test = delong_test_independent(*sides[0], *sides[1])
    assert (gap["statistic"], gap["df"], gap["p_value"]) == pytest.approx((test.statistic, test.df, test.p_value))


def test_the_auroc_gap_of_three_subgroups_is_cochrans_heterogeneity_statistic() -> None:
    labels, probabilities, site = films()
    gap = gaps_of(labels, probabilities, site)["auc"]
    fits = [delong(labels[site == s], probabilities[site == s]) for s in range(3)]
    auc, weight = np.array([fit.auc[0] for fit in fits]), 1 / np.array([fit.covariance[0, 0] for fit in fits])
    q = (weight * (auc - np.average(auc, weights=weight)) ** 2).sum()
    assert gap["statistic"] == pytest.approx(q)
    assert gap["p_value"] == pytest.approx(stats.chi2.sf(q, 2))


def test_the_calibration_gap_compares_observed_shares_less_mean_probabilities() -> None:
    labels, probabilities, site = films(sites=2)
    gap = gaps_of(labels, probabilities, site)["calibration"]
    off = [(labels - probabilities)[site == s] for s in range(2)]
    assert gap["difference"] == pytest.approx(abs(off[0].mean() - off[1].mean()))
    half = 1.959964 * math.sqrt(sum(values.var() / len(values) for values in off))
    assert gap["ci_high"] - gap["difference"] == pytest.approx(half)
    pooled = (labels - probabilities).mean()
    null_variance = sum(((values - pooled) ** 2).mean() / len(values) for values in off)
    assert gap["statistic"] == pytest.approx(gap["difference"] ** 2 / null_variance)


def test_a_subgroup_that_is_always_right_is_still_tested() -> None:
    labels, probabilities, site = films(sites=2)
    probabilities = np.where((site == 1) & (labels == 1), 0.99, probabilities)
    patient = np.arange(len(labels)) // 2
    gap = gaps_of(labels, probabilities, site, groups=patient)["equal_opportunity"]
    assert gap["by_group"]["1"] == 1
    assert 0 < gap["p_value"] < 0.001


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_rate_of_one_still_gives_its_gap_a_width_newcombes_over_patients(repeats: int) -> None:
    labels, site = np.ones(80, dtype=int), np.repeat([0, 1], 40)
    labels[::2] = 0
    probabilities = np.where(labels == 1, 0.9, 0.1)
    probabilities[[1, 3]] = 0.2  # two of the twenty positives of site 0 are missed, none of site 1
    again = [np.repeat(values, repeats) for values in (labels, probabilities, site)]
    patients = np.repeat(np.arange(80), repeats)
    gap = gaps_of(*again, threshold=0.5, groups=patients)["equal_opportunity"]
    low, high = confint_proportions_2indep(20, 20, 18, 20, method="newcomb", compare="diff")
    assert gap["interval"] == "newcombe"
    assert (gap["ci_low"], gap["ci_high"]) == pytest.approx((low, high))


def test_a_model_alike_in_all_subgroups_is_rarely_called_unfair() -> None:
    p_values = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        labels, site = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
        probabilities = np.clip(0.5 + 0.2 * (labels - 0.5) + rng.normal(0, 0.2, 300), 0, 1)
        gaps = subgroup_fairness(labels, probabilities, subgroups={"s": site}, n_boot=20)["columns"]["s"]["gaps"]
        p_values += [gaps["equal_opportunity"]["p_value"], gaps["auc"]["p_value"], gaps["equalized_odds"]["p_value"]]
    # 5 % of 72 correlated tests is 3.6; the standard deviation, were they all alike in threes, is 3.
    assert sum(p < 0.05 for p in p_values) < 13


def test_p_values_are_adjusted_by_holm_over_every_gap() -> None:
    labels, probabilities, site = films()
    sex = np.random.default_rng(5).choice(["F", "M"], len(labels))
    report = subgroup_fairness(labels, probabilities, subgroups={"site": site, "sex": sex}, n_boot=20)
    sections = [*report["columns"].values(), *report["intersections"].values()]
    gaps = [gap for section in sections for gap in section["gaps"].values()]
    assert [gap["p_adjusted"] for gap in gaps] == pytest.approx(adjust_p_values([gap["p_value"] for gap in gaps]))
    assert report["tests"] == len(gaps) == 21


def test_given_predictions_replace_the_threshold() -> None:
    labels, probabilities, site = films()
    calls = (probabilities >= 0.7).astype(int)
    by_threshold = subgroup_fairness(labels, probabilities, subgroups={"s": site}, threshold=0.7, n_boot=20)
    by_calls = subgroup_fairness(labels, probabilities, subgroups={"s": site}, predictions=calls, n_boot=20)
    for name, gap in by_threshold["columns"]["s"]["gaps"].items():
        assert by_calls["columns"]["s"]["gaps"][name]["difference"] == gap["difference"]
    for group, row in by_threshold["columns"]["s"]["groups"].items():
        other = by_calls["columns"]["s"]["groups"][group]["metrics"]
        assert {k: v["value"] for k, v in other.items()} == {k: v["value"] for k, v in row["metrics"].items()}


# --------------------------------------------------------------------------------------------- the subgroups


def test_missing_values_are_counted_and_left_out() -> None:
    labels, probabilities, site = films()
    column = [
        None if i % 10 == 0 else math.nan if i % 10 == 1 else "" if i % 10 == 2 else s for i, s in enumerate(site)
    ]
    row = subgroup_fairness(labels, probabilities, subgroups={"site": column}, n_boot=20)["columns"]["site"]
    assert row["missing"] == {"n": 180, "share": pytest.approx(0.3)}
    assert sum(group["n"] for group in row["groups"].values()) == 420


def test_ages_fall_into_bands_that_hold_their_lower_edge() -> None:
    labels, probabilities, _ = films(n=8)
    ages = [0, 17, 18, 39, 40, 64.9, 80, -1]
    row = subgroup_fairness(labels, probabilities, subgroups={"age": ages}, n_boot=20)["columns"]["age"]
    assert {name: group["n"] for name, group in row["groups"].items()} == {
        "0-17": 2, "18-39": 2, "40-64": 2, "80+": 1,
    }  # fmt: skip
    assert row["missing"]["n"] == 1


def test_other_numbers_fall_into_quartiles_or_the_edges_given() -> None:
    labels, probabilities, _ = films()
    dose = np.linspace(0, 1, len(labels))
    quartiles = subgroup_fairness(labels, probabilities, subgroups={"dose": dose}, n_boot=20)["columns"]["dose"]
    assert [group["n"] for group in quartiles["groups"].values()] == [150, 150, 150, 150]
    halves = {"dose": [0.0, 0.5, 2.0]}
    given = subgroup_fairness(labels, probabilities, subgroups={"dose": dose}, bands=halves, n_boot=20)
    assert list(given["columns"]["dose"]["groups"]) == ["0 to <0.5", "0.5 to <2"]


def test_a_numbered_site_keeps_its_values_when_bands_are_none() -> None:
    labels, probabilities, _ = films()
    site = np.arange(len(labels)) % 15
    row = subgroup_fairness(labels, probabilities, subgroups={"site": site}, bands={"site": None}, n_boot=20)
    assert list(row["columns"]["site"]["groups"]) == [str(s) for s in range(15)]


def test_intersections_cross_two_columns() -> None:
    labels, probabilities, site = films()
    sex = np.array(["F", "M"])[np.arange(len(labels)) % 2]
    report = subgroup_fairness(labels, probabilities, subgroups={"sex": sex, "site": site}, n_boot=20)
    cells = report["intersections"]["sex × site"]["groups"]
    assert cells["F & 2"]["n"] == ((sex == "F") & (site == 2)).sum()
    assert cells["F & 2"]["n_positive"] == labels[(sex == "F") & (site == 2)].sum()
    none = subgroup_fairness(
        labels, probabilities, subgroups={"sex": sex, "site": site}, intersections=False, n_boot=20
    )
    assert none["intersections"] == {}


def test_small_subgroups_are_described_but_not_judged() -> None:
    labels, probabilities, site = films()
    site = np.where(np.arange(len(site)) < 19, 9, site)
    row = subgroup_fairness(labels, probabilities, subgroups={"site": site}, n_boot=20)["columns"]["site"]
    assert row["too_few"] == ["9"] and "metrics" not in row["groups"]["9"]
    assert row["groups"]["9"]["reason"] == "too few to say: 19 films, below 20"
    assert "9" not in row["gaps"]["equal_opportunity"]["by_group"]


def test_subgroups_without_positives_take_no_part_in_the_sensitivity_gap() -> None:
    labels, probabilities, site = films()
    labels = np.where(site == 0, 0, labels)
    gaps = gaps_of(labels, probabilities, site)
    assert gaps["equal_opportunity"]["left_out"] == gaps["auc"]["left_out"] == ["0"]
    assert set(gaps["demographic_parity"]["by_group"]) == {"0", "1", "2"}
    alone = gaps_of(np.where(site < 2, 0, labels), probabilities, site)["equal_opportunity"]
    assert math.isnan(alone["p_value"]) and "fewer than two subgroups" in alone["reason"]


def test_the_metrics_of_a_subgroup_are_those_of_its_films() -> None:
    labels, probabilities, site = films()
    row = subgroup_fairness(labels, probabilities, subgroups={"site": site}, n_boot=20)["columns"]["site"]
    chosen = site == 1
    hit = (probabilities[chosen & (labels == 1)] >= 0.5).mean()
    assert row["groups"]["1"]["metrics"]["sensitivity"]["value"] == pytest.approx(hit)
    assert row["groups"]["1"]["prevalence"]["value"] == pytest.approx(labels[chosen].mean())


def test_the_fairness_report_is_plain_json() -> None:
    labels, probabilities, site = films(n=60)
    report = subgroup_fairness(labels, probabilities, subgroups={"site": site}, n_boot=20)
    assert json.loads(json.dumps(report))["columns"]["site"]["groups"].keys() == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subgroups": {}}, DataError, "name at least one column"),
        ({"subgroups": {"sex": ["F"]}}, DataError, "'sex' has 1 values for 600 films"),
        ({"subgroups": {"age": ["old"] * 600}}, DataError, "'age' is to be banded but is not numeric, e.g. 'old'"),
        ({"intersections": [("site", "sexx")]}, ConfigError, "intersection names 'sexx'"),
        ({"bands": {"sit": [0, 1]}}, ConfigError, "bands name 'sit', .*did you mean 'site'"),
        ({"bands": {"site": [1, 0]}}, ConfigError, "rising edges"),
        ({"classes": ["a", "b", "c"]}, ConfigError, "two classes"),
        ({"predictions": [1, 0]}, DataError, "2 predictions for 600 labels"),
    ],
)
def test_a_wrong_fairness_request_says_what_to_do(options: dict[str, Any], error: type, message: str) -> None:
    labels, probabilities, site = films()
    with pytest.raises(error, match=message):
        subgroup_fairness(labels, probabilities, **({"subgroups": {"site": site}, "n_boot": 20} | options))


# --------------------------------------------------------------------------------------------- decision curves


def test_net_benefit_is_what_counting_gives_in_any_order_of_thresholds() -> None:
    labels, probabilities, _ = films()
    probabilities = probabilities.round(2)
    thresholds = [0.5, 0.1, 0.33, 0.9, 0.1]
    curve = decision_curve(labels, probabilities, thresholds, n_boot=0)
    for t, value, everyone in zip(thresholds, curve["net_benefit"]["value"], curve["treat_all"]["value"]):
        treated = probabilities >= t
        count = (labels[treated] == 1).sum() - (labels[treated] == 0).sum() * t / (1 - t)
        assert value == pytest.approx(count / len(labels))
        assert everyone == pytest.approx((labels.sum() - (1 - labels).sum() * t / (1 - t)) / len(labels))


def test_treating_everybody_is_the_curve_of_a_model_that_always_says_yes() -> None:
    labels, _, _ = films()
    curve = decision_curve(labels, np.ones(len(labels)), [0.2, 0.6], n_boot=100)
    for name in ("value", "ci_low", "ci_high"):
        assert curve["net_benefit"][name] == pytest.approx(curve["treat_all"][name])
    assert curve["net_interventions_avoided"]["value"] == pytest.approx([0, 0], abs=1e-12)


def test_a_perfect_model_is_worth_the_prevalence_at_every_threshold() -> None:
    labels, _, _ = films()
    curve = decision_curve(labels, labels.astype(float), [0.05, 0.5, 0.95], n_boot=0)
    assert curve["net_benefit"]["value"] == pytest.approx([labels.mean()] * 3)
    per_film = curve["net_interventions_avoided"]["value"]
    assert per_film == pytest.approx([1 - labels.mean()] * 3)


def test_the_samples_own_prevalence_stated_changes_no_value() -> None:
    labels, probabilities, _ = films()
    plain = decision_curve(labels, probabilities, [0.2, 0.5], n_boot=0)
    stated = decision_curve(labels, probabilities, [0.2, 0.5], n_boot=0, prevalence=float(labels.mean()))
    assert stated["net_benefit"]["value"] == pytest.approx(plain["net_benefit"]["value"])
    assert stated["treat_all"]["value"] == pytest.approx(plain["treat_all"]["value"])


def test_a_stated_prevalence_equals_weighting_the_classes_to_it() -> None:
    labels, probabilities, _ = films()
    treated = probabilities >= 0.3
    expected = treated[labels == 1].mean() * 0.05 - treated[labels == 0].mean() * 0.95 * 0.3 / 0.7
    curve = decision_curve(labels, probabilities, [0.3], prevalence=0.05, n_boot=50)
    assert curve["net_benefit"]["value"] == pytest.approx([expected])
    # A stated prevalence is known, so that treating all has no sampling error.
    assert curve["treat_all"]["ci_low"] == curve["treat_all"]["ci_high"]


def test_harm_is_taken_off_the_model_alone() -> None:
    labels, probabilities, _ = films()
    plain, harmed = (decision_curve(labels, probabilities, [0.3], n_boot=0, harm=harm) for harm in (0.0, 0.02))
    assert harmed["net_benefit"]["value"][0] == pytest.approx(plain["net_benefit"]["value"][0] - 0.02)
    assert harmed["treat_all"] == plain["treat_all"]


def test_bootstrap_intervals_have_the_width_of_the_standard_error_and_repeat_with_the_seed() -> None:
    labels, probabilities, _ = films(n=2000)
    curve = decision_curve(labels, probabilities, [0.4], n_boot=2000)
    treated = probabilities >= 0.4
    worth = treated * np.where(labels == 1, 1.0, -0.4 / 0.6)
    width = curve["net_benefit"]["ci_high"][0] - curve["net_benefit"]["ci_low"][0]
    # Percentiles of 2,000 draws: about 3 % of noise in each limit.
    assert width == pytest.approx(2 * 1.96 * worth.std() / math.sqrt(2000), rel=0.08)
    assert decision_curve(labels, probabilities, [0.4], n_boot=2000) == curve


def test_films_repeated_within_patients_leave_the_interval_alone() -> None:
    labels, probabilities, _ = films()
    single = decision_curve(labels, probabilities, [0.4], n_boot=400)
    copies = [np.repeat(array, 3) for array in (labels, probabilities, np.arange(len(labels)))]
    clustered = decision_curve(copies[0], copies[1], [0.4], groups=copies[2], n_boot=400)
    assert clustered["net_benefit"]["ci_low"] == pytest.approx(single["net_benefit"]["ci_low"])
    assert (clustered["n"], clustered["n_patients"]) == (1800, 600)


def test_nothing_is_avoided_at_threshold_zero_and_the_report_says_so() -> None:
    labels, probabilities, _ = films()
    curve = decision_curve(labels, probabilities, [0.0, 0.2], n_boot=50)
    assert math.isnan(curve["net_interventions_avoided"]["value"][0])
    assert "threshold 0" in curve["reason"]
    assert curve["net_benefit"]["value"][0] == pytest.approx(labels.mean())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda y, p: decision_curve(y, p, [1.0]), ConfigError, r"lie in \[0, 1\), found 1.0"),
        (lambda y, p: decision_curve(y, p, []), ConfigError, "found none"),
        (lambda y, p: decision_curve(y, p + 1, [0.5]), DataError, "outside"),
        (lambda y, p: decision_curve(y, p, [0.5], prevalence=1.5), ConfigError, "prevalence 1.5"),
        (lambda y, p: decision_curve(0 * y, p, [0.5], prevalence=0.1), DataError, "films of both classes"),
    ],
)
def test_a_wrong_decision_curve_request_says_what_to_do(call: Callable[..., Any], error: type, message: str) -> None:
    labels, probabilities, _ = films(n=50)
    with pytest.raises(error, match=message):
        call(labels, probabilities)
