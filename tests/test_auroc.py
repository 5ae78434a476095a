"""AUROC and its variances against counting pairs, scikit-learn and themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from auroc import (
    auroc,
    auroc_ci,
    auroc_from_counts,
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
    multiclass_auroc,
    newcombe_interval,
    partial_auroc,
    patient_weights,
    percentile_interval,
    roc_points,
    score_tally,
)
from errors import DataError
from estimates import UndefinedMetricWarning

SEEDS = range(6)


def sample(seed: int, n: int = 60, levels: int | None = None, m: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) with both classes and scores (n, m) that know something of them; few `levels` make ties."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([[0, 1], rng.integers(2, size=n - 2)])
    scores = rng.normal(size=(n, m)) + 0.8 * y[:, None] + 0.5 * rng.normal(size=(n, 1))
    if levels:
        scores = np.round(scores * levels / 4)
    return y, scores if m > 1 else scores[:, 0]


def counted_pairs(y: np.ndarray, s: np.ndarray) -> np.ndarray:
    """1, ½ or 0 for every (positive, negative) pair."""
    return (np.sign(s[y == 1][:, None] - s[y == 0]) + 1) / 2


@pytest.mark.parametrize("levels", [None, 2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_auroc_equals_counting_ordered_pairs_when_scores_tie(seed: int, levels: int | None) -> None:
    y, s = sample(seed, levels=levels)
    assert auroc(y, s) == pytest.approx(counted_pairs(y, s).mean(), abs=1e-12)
    assert auroc(y, s) == pytest.approx(sklearn_metrics.roc_auc_score(y, s), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_turning_the_scores_round_turns_the_area_round(seed: int) -> None:
    y, s = sample(seed, levels=4)
    assert auroc(y, -s) == pytest.approx(1 - auroc(y, s))
    assert auroc(y, s, higher_is_positive=False) == pytest.approx(auroc(y, -s))
    assert auroc_ci(y, s, higher_is_positive=False).value == pytest.approx(auroc(1 - y, s))


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_delong_covariance_equals_its_definition_over_all_pairs(seed: int, levels: int | None) -> None:
    y, scores = sample(seed, levels=levels, m=3)
    pairs = [counted_pairs(y, column) for column in scores.T]
    v10, v01 = np.array([p.mean(axis=1) for p in pairs]), np.array([p.mean(axis=0) for p in pairs])
    expected = np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]
    result = delong(y, scores)
    np.testing.assert_allclose(result.covariance, expected, atol=1e-14)
    np.testing.assert_allclose(result.auc, [p.mean() for p in pairs], atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_film_a_patient_makes_the_clustered_variance_delongs(seed: int) -> None:
    y, scores = sample(seed, m=2)
    _, covariance = clustered_auroc(y, scores, np.arange(len(y)))
    np.testing.assert_allclose(covariance, delong(y, scores).covariance, rtol=1e-12)
    plain = delong_test(y, scores[:, 0], scores[:, 1])
    clustered = clustered_auroc_test(y, scores[:, 0], scores[:, 1], [f"p{i}" for i in range(len(y))])
    assert clustered.p_value == pytest.approx(plain.p_value)


@pytest.mark.parametrize("copies", [2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_copying_every_film_within_its_patient_teaches_nothing(seed: int, copies: int) -> None:
    y, s = sample(seed)
    patients = np.tile(np.arange(len(y)), copies)
    clustered = auroc_ci(np.tile(y, copies), np.tile(s, copies), groups=patients)
    once = auroc_ci(y, s)
    assert (clustered.value, *clustered.ci) == pytest.approx((once.value, *once.ci))


def test_a_third_of_the_variance_is_lost_when_copies_count_as_films() -> None:
    y, s = sample(0)
    assert delong(np.tile(y, 3), np.tile(s, 3)).covariance[0, 0] < 0.4 * delong(y, s).covariance[0, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_higher_levels_give_wider_intervals(seed: int) -> None:
    y, s = sample(seed)
    widths = [np.diff(auroc_ci(y, s, level=level).ci)[0] for level in (0.8, 0.9, 0.95, 0.99)]
    assert widths == sorted(widths)


@pytest.mark.parametrize(
    ("auc", "n_pos", "n_neg"), list(itertools.product([0.0, 0.3, 0.5, 0.9, 1.0], [1, 5, 80], [3, 50]))
)
def test_newcombe_interval_holds_the_value_and_mirrors(auc: float, n_pos: int, n_neg: int) -> None:
    low, high = newcombe_interval(auc, n_pos=n_pos, n_neg=n_neg)
    assert 0 <= low <= auc <= high <= 1 and low < high
    mirrored = newcombe_interval(1 - auc, n_pos=n_pos, n_neg=n_neg)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_a_perfect_ranking_still_has_an_interval_and_says_which() -> None:
    y, s = np.repeat([0, 1], [6, 4]), np.arange(10.0)
    estimate = auroc_ci(y, s)
    assert estimate.ci_high == 1 and 0.3 < estimate.ci_low < 0.9
    assert "Newcombe" in estimate.method and "DeLong has no usable variance" in estimate.reason
    assert auroc_ci(y, s, raw=True).ci == (1.0, 1.0)


def test_a_single_positive_has_an_interval_too() -> None:
    estimate = auroc_ci([0, 0, 1, 0], [0.1, 0.2, 0.3, 0.9])
    assert estimate.ci_low < estimate.value < estimate.ci_high


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_equal_scores_do_not_differ(alternative: str) -> None:
    y, s = sample(1)
    test = delong_test(y, s, 2 * s + 1, alternative=alternative)
    assert (test.p_value, test.difference) == (1.0, pytest.approx(0.0, abs=1e-12))


@pytest.mark.parametrize("seed", SEEDS)
def test_exchanging_the_models_exchanges_the_sides(seed: int) -> None:
    y, scores = sample(seed, m=2)
    a, b = scores.T
    forth, back = delong_test(y, a, b, alternative="greater"), delong_test(y, b, a, alternative="less")
    assert forth.p_value == pytest.approx(back.p_value)
    assert forth.difference == pytest.approx(-back.difference)
    assert forth.ci == pytest.approx((-back.ci_high, -back.ci_low))
    assert forth.p_value + delong_test(y, a, b, alternative="less").p_value == pytest.approx(1)


def test_a_difference_without_variance_is_undefined() -> None:
    test = delong_test([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1])
    assert np.isnan(test.p_value) and "variance" in test.reason


def test_independent_test_uses_the_sum_of_variances() -> None:
    (y1, s1), (y2, s2) = sample(0), sample(1, n=90)
    test = delong_test_independent(y1, s1, y2, s2)
    variance = delong(y1, s1).covariance[0, 0] + delong(y2, s2).covariance[0, 0]
    assert test.statistic == pytest.approx((auroc(y1, s1) - auroc(y2, s2)) / np.sqrt(variance))
    assert 58 < test.df < 150
    assert np.isnan(delong_test_independent([0, 1], [0, 1], [0, 1], [0, 1]).p_value)


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("max_fpr", [0.05, 0.1, 0.37, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_corrected_partial_area_is_scikit_learns(seed: int, max_fpr: float, levels: int | None) -> None:
    y, s = sample(seed, levels=levels)
    expected = sklearn_metrics.roc_auc_score(y, s, max_fpr=max_fpr)
    if expected >= 0.5:
        assert partial_auroc(y, s, low=1 - max_fpr, corrected=True) == pytest.approx(expected)


@pytest.mark.parametrize("focus", ["specificity", "sensitivity"])
@pytest.mark.parametrize("seed", range(3))
def test_partial_areas_add_up_to_the_area(seed: int, focus: str) -> None:
    y, s = sample(seed, levels=6)
    cuts = [0, 0.13, 0.5, 0.77, 1]
    parts = [partial_auroc(y, s, low=low, high=high, focus=focus) for low, high in itertools.pairwise(cuts)]
    assert sum(parts) == pytest.approx(auroc(y, s))
    assert partial_auroc(y, -s, low=0, high=1, higher_is_positive=False) == pytest.approx(auroc(y, s))


def test_partial_area_of_a_perfect_curve_is_its_range_and_its_correction_1() -> None:
    assert partial_auroc([0, 0, 1], [1, 2, 3], low=0.8) == pytest.approx(0.2)
    assert partial_auroc([0, 0, 1], [1, 2, 3], low=0.8, corrected=True) == pytest.approx(1)


def test_correction_below_the_diagonal_is_undefined() -> None:
    with pytest.warns(UndefinedMetricWarning, match="below the diagonal"):
        assert np.isnan(partial_auroc([0, 0, 1, 1], [3, 4, 1, 2], corrected=True))


@pytest.mark.parametrize("levels", [None, 2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_average_precision_is_scikit_learns(seed: int, levels: int | None) -> None:
    y, s = sample(seed, levels=levels)
    assert average_precision(y, s) == pytest.approx(sklearn_metrics.average_precision_score(y, s))


@pytest.mark.parametrize("seed", SEEDS)
def test_roc_points_are_scikit_learns(seed: int) -> None:
    y, s = sample(seed, levels=5)
    fpr, tpr, thresholds = sklearn_metrics.roc_curve(y, s, drop_intermediate=False)
    ours = roc_points(y, s)
    np.testing.assert_allclose(ours[0], fpr)
    np.testing.assert_allclose(ours[1], tpr)
    np.testing.assert_allclose(ours[2], thresholds)


@pytest.mark.parametrize("average", ["macro", "weighted"])
@pytest.mark.parametrize("scheme", ["ovr", "ovo"])
@pytest.mark.parametrize("seed", range(3))
def test_multiclass_areas_are_scikit_learns(seed: int, scheme: str, average: str) -> None:
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(4), rng.integers(4, size=60)])
    p = rng.dirichlet(np.ones(4), size=64) + 0.2 * np.eye(4)[y]
    p /= p.sum(axis=1, keepdims=True)
    expected = sklearn_metrics.roc_auc_score(y, p, multi_class=scheme, average=average)
    assert multiclass_auroc(y, p, scheme=scheme, average=average) == pytest.approx(expected)
    if (scheme, average) == ("ovo", "macro"):
        assert hand_till(y, p) == pytest.approx(expected)


def test_hand_till_skips_levels_without_films_and_orients_each_pair() -> None:
    # 1 v 3 and 1 v 5 perfect, 3 v 5 perfect the other way round.
    assert hand_till([1, 1, 3, 3, 5, 5], [0, 1, 8, 9, 4, 5]) == pytest.approx(1.0)


def test_an_absent_class_has_no_area_among_many() -> None:
    with pytest.warns(UndefinedMetricWarning, match="no films of class 2"):
        assert np.isnan(multiclass_auroc([0, 1, 1], np.eye(3)[[0, 1, 1]]))
    with pytest.warns(UndefinedMetricWarning, match="all films are of class 4"):
        assert np.isnan(hand_till([4, 4], [1, 2]))


# --- the bootstrap --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("seed", range(4))
def test_weighted_counts_equal_repeating_the_films(seed: int, levels: int | None) -> None:
    y, s = sample(seed, levels=levels)
    weights = next(patient_weights(len(y), n_boot=20, rng=np.random.default_rng(seed)))
    counts = score_tally(y, s) @ weights
    half = len(counts) // 2
    areas = auroc_from_counts(counts[:half], counts[half:])
    precisions = average_precision_from_counts(counts[:half], counts[half:])
    for column, area, precision in zip(weights.T, areas, precisions):
        repeated = np.repeat(np.arange(len(y)), column.astype(int))
        assert area == pytest.approx(auroc(y[repeated], s[repeated]))
        assert precision == pytest.approx(average_precision(y[repeated], s[repeated]))


def test_patients_are_drawn_whole_and_as_many_as_there_are() -> None:
    weights = np.concatenate(list(patient_weights(7, n_boot=250, rng=np.random.default_rng(0))), axis=1)
    assert weights.shape == (7, 250) and (weights.sum(axis=0) == 7).all()
    assert weights.mean() == 1 and weights.var() == pytest.approx(6 / 7, abs=0.05)


def test_strata_keep_their_size() -> None:
    strata = np.array([0, 0, 0, 1, 1])
    (weights,) = patient_weights(5, n_boot=50, rng=np.random.default_rng(0), strata=strata)
    assert (weights[:3].sum(axis=0) == 3).all() and (weights[3:].sum(axis=0) == 2).all()


def test_merging_scores_moves_the_areas_little() -> None:
    y, s = sample(0, n=5000)
    exact, merged = score_tally(y, s), score_tally(y, s, max_groups=500)
    ones = np.ones((len(y), 1))
    assert merged.shape[0] <= 1000 < exact.shape[0]
    assert (merged @ ones).sum() == len(y)
    for reduce in (auroc_from_counts, average_precision_from_counts):
        halves = [np.split(tally @ ones, 2) for tally in (exact, merged)]
        a, b = (reduce(*half)[0] for half in halves)
        assert a == pytest.approx(b, abs=2e-3)


def test_a_rare_class_keeps_its_own_scores_when_neighbours_are_merged() -> None:
    y, s = np.zeros(5000, dtype=int), np.arange(5000.0)
    y[-20:] = 1
    merged = score_tally(y, s, max_groups=200)
    positives = (merged @ np.ones((5000, 1)))[merged.shape[0] // 2 :]
    assert (positives > 0).sum() == 20


def test_the_bootstrap_is_a_function_of_its_seed() -> None:
    y, s = sample(0)
    first, again, other = (bootstrap_auroc(y, s, n_boot=50, seed=seed) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("seed", range(3))
def test_bootstrap_and_delong_agree_on_the_standard_error(seed: int) -> None:
    y, scores = sample(seed, n=300, m=2)
    draws = bootstrap_auroc(y, scores, n_boot=2000, seed=seed)
    # 2000 resamples know an SD to 1.6 %; four of those, and 2 % for DeLong's n − 1.
    np.testing.assert_allclose(draws.std(axis=0), np.sqrt(np.diag(delong(y, scores).covariance)), rtol=0.085)
    boot, exact = bootstrap_auroc_test(y, *scores.T, seed=seed), delong_test(y, *scores.T)
    assert boot.statistic == pytest.approx(exact.statistic, rel=0.1)


def test_percentiles_leave_undefined_resamples_out() -> None:
    assert percentile_interval([0.1, np.nan, 0.1]) == (0.1, 0.1)
    assert np.isnan(percentile_interval([np.nan])).all()


# --- what cannot be measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("y", "missing"), [([0, 0], "positive"), ([1, 1], "negative")])
def test_one_class_has_no_area(y: list[int], missing: str) -> None:
    with pytest.warns(UndefinedMetricWarning, match=f"no {missing} films"):
        assert np.isnan(auroc(y, [0.1, 0.2]))
    assert auroc_ci(y, [0.1, 0.2]).reason == f"no {missing} films"
    for function in (delong, roc_points):
        with pytest.raises(DataError, match=f"no {missing} films"):
            function(y, [0.1, 0.2])


@pytest.mark.parametrize(
    ("y", "s", "said"),
    [
        ([0, 1], [0.1, np.nan], "row 1: scores hold NaN"),
        ([0, 1], [0.1, 0.2, 0.3], "scores have shape"),
        ([0, 2], [0.1, 0.2], "row 1: label .*2.* is outside 0"),
        ([0, np.nan], [0.1, 0.2], "row 1: label .*nan.* is outside 0"),
        (["a", "b"], [0.1, 0.2], "give class numbers"),
        ([], [], "at least one film"),
        ([[0, 1]], [[0.1, 0.2]], "labels have shape"),
    ],
)
def test_bad_input_is_named(y: list, s: list, said: str) -> None:
    with pytest.raises(DataError, match=said):
        auroc(y, s)


def test_bad_options_are_named() -> None:
    y, s = sample(0)
    with pytest.raises(DataError, match="alternative 'both' is not one of"):
        delong_test(y, s, s + y, alternative="both")
    with pytest.raises(DataError, match="confidence level 95 is not between"):
        auroc_ci(y, s, level=95)
    with pytest.raises(DataError, match="partial AUROC over recall"):
        partial_auroc(y, s, focus="recall")
    with pytest.raises(DataError, match="scheme 'all'"):
        multiclass_auroc(y, np.column_stack([-s, s]), scheme="all")
    with pytest.raises(DataError, match="average 'harmonic'"):
        multiclass_auroc(y, np.column_stack([-s, s]), average="harmonic")
    with pytest.raises(DataError, match="one patient per film"):
        auroc_ci(y, s, groups=[1, 2])
    with pytest.raises(DataError, match="row 1: patient identifier is missing"):
        auroc_ci([0, 1], [1, 2], groups=["a", None])


def test_infinite_scores_are_ranks_like_others() -> None:
    assert auroc([0, 0, 1, 1], [-np.inf, 1, 1, np.inf]) == pytest.approx(0.875)
