"""Agreement against scikit-learn, statsmodels, counting pairs, and the jackknife."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats import inter_rater

from agreement import (
    ALPHA_METRICS,
    WEIGHTS,
    cohen_kappa,
    conger_kappa,
    fleiss_kappa,
    gwet_ac,
    kappa_from_table,
    krippendorff_alpha,
    pairwise_kappa,
)
from errors import DataError

SEEDS = range(5)


def ratings(seed: int, n: int = 40, raters: int = 4, categories: int = 4, missing: float = 0.0) -> np.ndarray:
    """Ratings 1 … categories around a common truth; the first subjects show every category."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(1, categories + 1, size=n)
    noise = rng.integers(1, categories + 1, size=(n, raters))
    table = np.where(rng.random((n, raters)) < 0.6, truth[:, None], noise).astype(float)
    table[:categories] = np.arange(1, categories + 1)[:, None]
    table[rng.random((n, raters)) < missing] = np.nan
    return table


def table_of(a: np.ndarray, b: np.ndarray, categories: int = 4) -> np.ndarray:
    return np.array([[((a == i) & (b == j)).sum() for j in range(1, categories + 1)] for i in range(1, categories + 1)])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_cohens_kappa_is_scikit_learns_and_its_errors_statsmodels(seed: int, weights: str) -> None:
    a, b = ratings(seed, raters=2).T
    kappa = cohen_kappa(a, b, weights=weights)
    expected = cohen_kappa_score(a, b, weights=None if weights == "unweighted" else weights)
    assert kappa.estimate.value == pytest.approx(expected)
    wt = None if weights == "unweighted" else {"linear": "linear", "quadratic": "quadratic"}[weights]
    other = inter_rater.cohens_kappa(table_of(a, b), wt=wt)
    assert kappa.estimate.standard_error == pytest.approx(np.sqrt(other.var_kappa))
    assert kappa.se_null == pytest.approx(np.sqrt(other.var_kappa0))
    assert kappa.z_null == pytest.approx(other.z_value)
    assert kappa.p_null == pytest.approx(other.pvalue_two_sided)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_standard_error_of_kappa_is_the_jackknifes(seed: int, weights: str) -> None:
    a, b = ratings(seed, n=200, raters=2).T
    kappa = cohen_kappa(a, b, weights=weights)
    index = np.arange(200)
    without = [
        cohen_kappa(a[index != i], b[index != i], weights=weights, categories=[1, 2, 3, 4]).estimate.value
        for i in index
    ]
    se = np.sqrt(199 / 200 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert kappa.estimate.standard_error == pytest.approx(se, rel=0.02)


def test_exchanging_raters_changes_nothing_and_reversing_the_scale_neither() -> None:
    a, b = ratings(0, raters=2).T
    for weights in WEIGHTS:
        value = cohen_kappa(a, b, weights=weights).estimate
        assert cohen_kappa(b, a, weights=weights).estimate.ci == pytest.approx(value.ci)
        assert cohen_kappa(5 - a, 5 - b, weights=weights).estimate.ci == pytest.approx(value.ci)


def test_unused_ends_of_the_scale_do_not_change_weighted_kappa_but_unused_middles_do() -> None:
    a, b = [1, 2, 2, 4, 4, 1], [1, 2, 4, 4, 2, 2]
    assert cohen_kappa(a, b, weights="linear").estimate.value != pytest.approx(
        cohen_kappa(a, b, weights="linear", categories=[1, 2, 3, 4]).estimate.value
    )
    assert cohen_kappa(a, b, weights="linear", categories=[1, 2, 3, 4]).estimate.value == pytest.approx(
        cohen_kappa(a, b, weights="linear", categories=[0, 1, 2, 3, 4, 5]).estimate.value
    )


def test_perfect_agreement_is_1_without_variance() -> None:
    kappa = cohen_kappa(["a", "b", "b"], ["a", "b", "b"])
    assert kappa.estimate.value == 1 and kappa.estimate.standard_error == 0 and kappa.p_null < 0.1


@pytest.mark.parametrize("missing", [None, "", np.nan])
def test_films_that_one_rater_left_out_are_dropped(missing: object) -> None:
    a, b = np.array([1, 2, 1, 2, missing], dtype=object), np.array([1, 2, 2, 2, 1], dtype=object)
    assert cohen_kappa(a, b).estimate.value == cohen_kappa(a[:4], b[:4]).estimate.value


def test_one_category_has_no_kappa() -> None:
    kappa = cohen_kappa([1, 1], [1, 1])
    assert np.isnan(kappa.estimate.value) and "one category only" in kappa.estimate.reason
    assert "no subject was rated by both" in cohen_kappa([1, None], [None, 1]).estimate.reason
    for coefficient in (fleiss_kappa([[1, 1], [1, 1]]).estimate, gwet_ac([[1, 1], [1, 1]])):
        assert np.isnan(coefficient.value) and "one category" in coefficient.reason
    assert "one category" in krippendorff_alpha([[1, 1], [1, 1]]).reason
    assert "one category" in conger_kappa([[1, 1], [1, 1]]).reason


@pytest.mark.parametrize("seed", SEEDS)
def test_light_is_the_mean_of_all_pairs(seed: int) -> None:
    table = ratings(seed)
    result = pairwise_kappa(table, raters=list("wxyz"))
    pairs = list(itertools.combinations(range(4), 2))
    assert len(result.pairs) == 6 and ("w", "z") in result.pairs
    expected = [cohen_kappa_score(table[:, i], table[:, j]) for i, j in pairs]
    assert result.light == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("seed", SEEDS)
def test_fleiss_kappa_is_statsmodels(seed: int) -> None:
    table = ratings(seed)
    counts = np.stack([(table == k).sum(axis=1) for k in range(1, 5)], axis=1)
    assert fleiss_kappa(table).estimate.value == pytest.approx(inter_rater.fleiss_kappa(counts))


@pytest.mark.parametrize("seed", SEEDS)
def test_per_category_kappas_average_to_fleiss(seed: int) -> None:
    table = ratings(seed)
    result = fleiss_kappa(table)
    share = {k: (table == k).mean() for k in (1.0, 2.0, 3.0, 4.0)}
    weights = np.array([share[k] * (1 - share[k]) for k in result.per_category])
    assert np.average(list(result.per_category.values()), weights=weights) == pytest.approx(result.estimate.value)


@pytest.mark.parametrize("coefficient", [lambda t: fleiss_kappa(t).estimate, gwet_ac])
@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("seed", SEEDS)
def test_gwets_standard_error_is_near_the_jackknifes(seed: int, missing: float, coefficient) -> None:
    table = ratings(seed, n=150, missing=missing)
    estimate = coefficient(table)
    without = np.array([coefficient(np.delete(table, i, axis=0)).value for i in range(150)])
    se = np.sqrt(149 / 150 * ((without - without.mean()) ** 2).sum())
    assert estimate.standard_error == pytest.approx(se, rel=0.05)
    assert estimate.ci_low < estimate.value < estimate.ci_high


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_congers_kappa_of_two_raters_is_cohens(seed: int, weights: str) -> None:
    table = ratings(seed, raters=2)
    expected = cohen_kappa(table[:, 0], table[:, 1], weights=weights).estimate.value
    assert conger_kappa(table, weights=weights).value == pytest.approx(expected)


def test_congers_kappa_refuses_missing_ratings() -> None:
    with pytest.raises(DataError, match="1 are missing; use fleiss_kappa"):
        conger_kappa([[1, 2], [1, None]])


def test_ac1_stays_high_where_kappa_collapses() -> None:
    table = np.zeros((100, 2))
    table[0, 0] = table[1, 1] = 1
    assert fleiss_kappa(table).estimate.value < 0
    assert gwet_ac(table).value > 0.95


@pytest.mark.parametrize("seed", SEEDS)
def test_ac2_with_two_categories_is_ac1(seed: int) -> None:
    table = ratings(seed, categories=2)
    assert gwet_ac(table, weights="quadratic").ci == pytest.approx(gwet_ac(table).ci)


def alpha_by_pairs(table: np.ndarray, metric: str) -> float:
    """Krippendorff's definition, pair of values by pair of values."""
    units = [row[~np.isnan(row)] for row in table]
    units = [unit for unit in units if len(unit) >= 2]
    values = np.concatenate(units)
    ordered, counts = np.unique(values, return_counts=True)

    def distance(a: float, b: float) -> float:
        if metric == "nominal":
            return float(a != b)
        if metric == "interval":
            return (a - b) ** 2
        if metric == "ratio":
            return ((a - b) / (a + b)) ** 2
        low, high = sorted((a, b))
        between = counts[(ordered >= low) & (ordered <= high)].sum()
        return float(between - (counts[ordered == a][0] + counts[ordered == b][0]) / 2) ** 2

    observed = sum(
        sum(distance(a, b) for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units
    ) / len(values)
    expected = sum(distance(a, b) for a, b in itertools.permutations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - observed / expected


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("metric", ALPHA_METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_alpha_equals_its_definition_over_all_pairs(seed: int, metric: str, missing: float) -> None:
    table = ratings(seed, n=15, missing=missing)
    assert krippendorff_alpha(table, metric=metric, n_boot=20).value == pytest.approx(alpha_by_pairs(table, metric))


def test_alphas_interval_holds_the_value_and_follows_the_seed() -> None:
    table = ratings(0)
    first, again, other = (krippendorff_alpha(table, seed=seed, n_boot=500) for seed in (1, 1, 2))
    assert first == again != other
    assert first.ci_low < first.value < first.ci_high
    wide = krippendorff_alpha(table, seed=1, n_boot=500, level=0.99)
    assert wide.ci_low < first.ci_low and wide.ci_high > first.ci_high


def test_alphas_interval_agrees_with_resampling_subjects_one_by_one() -> None:
    table = ratings(1, n=14, missing=0.1)
    rng = np.random.default_rng(0)
    draws = [alpha_by_pairs(table[rng.integers(14, size=14)], "ordinal") for _ in range(150)]
    # 150 and 2000 resamples know their SDs to 6 % and 2 %.
    assert krippendorff_alpha(table, metric="ordinal").standard_error == pytest.approx(np.std(draws), rel=0.2)


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [3, 2, 1, 0]])
def test_several_raters_have_no_order(order: list[int]) -> None:
    table = ratings(0, missing=0.1)
    for coefficient in (lambda t: fleiss_kappa(t).estimate, gwet_ac, krippendorff_alpha):
        assert coefficient(table[:, order]).value == pytest.approx(coefficient(table).value)


def test_names_serve_as_categories() -> None:
    table = ratings(0)
    names = np.array(["a", "b", "c", "d"])[table.astype(int) - 1]
    assert fleiss_kappa(names).estimate == fleiss_kappa(table).estimate
    assert gwet_ac(names, weights="linear", categories=list("abcd")).value == pytest.approx(
        gwet_ac(table, weights="linear").value
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: kappa_from_table([[1, 2, 3], [1, 2, 3]]), "is square"),
        (lambda: cohen_kappa([1, 2], [1, 2], weights="square"), "weights 'square' are not one of"),
        (lambda: cohen_kappa([1, 5], [1, 2], categories=[1, 2]), "rating 5 is not one of the categories"),
        (lambda: fleiss_kappa([[1], [2]]), "at least two raters"),
        (lambda: krippendorff_alpha([[1, 2], [2, 2]], metric="ordinl"), "did you mean 'ordinal'"),
        (lambda: krippendorff_alpha([["a", "b"], ["a", "a"]], metric="interval"), "needs numbers"),
        (lambda: krippendorff_alpha([[1, 2], [2, 2]], level=1.5), "confidence level"),
    ],
)
def test_bad_input_is_named(call: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        call()  # type: ignore[operator]


def test_too_few_doubly_rated_subjects_give_no_coefficient() -> None:
    table = [[1, 2], [1, None], [None, 2]]
    for estimate in (fleiss_kappa(table).estimate, gwet_ac(table)):
        assert "1 subjects have two ratings or more" in estimate.reason
    assert "no subject has two" in krippendorff_alpha([[1, None], [None, 2]]).reason
