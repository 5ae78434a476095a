"""Paired tests against statsmodels, sums over binomial tails and inverted tests."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from errors import DataError
from paired_tests import (
    CLUSTERED_METHODS,
    MCNEMAR_METHODS,
    PAIRED_INTERVALS,
    clustered_mcnemar,
    mcnemar,
    paired_difference,
    predictive_value_test,
    relative_predictive_value,
)

DISCORDANT = [(0, 1), (3, 3), (10, 2), (150, 86), (0, 9)]


@pytest.mark.parametrize(("b", "c"), DISCORDANT)
def test_mcnemar_is_statsmodels(b: int, c: int) -> None:
    table = [[20, b], [c, 30]]
    for method, options in (
        ("exact", {"exact": True}),
        ("asymptotic", {"exact": False, "correction": False}),
        ("corrected", {"exact": False, "correction": True}),
    ):
        expected = statsmodels_mcnemar(table, **options)
        if method == "corrected" and b == c:
            continue  # statsmodels corrects a difference of 0 to −1
        assert mcnemar(b, c, method=method).p_value == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(("b", "c"), DISCORDANT)
def test_mid_p_is_the_exact_p_less_the_point_probability(b: int, c: int) -> None:
    exact, mid = (mcnemar(b, c, method=method).p_value for method in ("exact", "midp"))
    if b != c:
        assert mid == pytest.approx(exact - stats.binom.pmf(min(b, c), b + c, 0.5))


@pytest.mark.parametrize("method", MCNEMAR_METHODS)
def test_mcnemar_does_not_care_which_test_is_first(method: str) -> None:
    forth, back = mcnemar(7, 2, method=method), mcnemar(2, 7, method=method)
    assert forth.p_value == back.p_value
    assert forth.odds_ratio == pytest.approx(1 / back.odds_ratio)
    assert forth.odds_ratio_ci == pytest.approx((1 / back.odds_ratio_ci[1], 1 / back.odds_ratio_ci[0]))
    assert mcnemar(0, 0, method=method).p_value == 1
    assert mcnemar(4, 4, method=method).p_value == pytest.approx(1, abs=1e-12)


def paired(seed: int, n: int = 120, patients: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(2, size=n), (rng.random(n) < 0.7).astype(int), rng.integers(patients, size=n)


@pytest.mark.parametrize("seed", range(4))
def test_films_of_their_own_make_the_clustered_test_mcnemars(seed: int) -> None:
    x, y, _ = paired(seed)
    n = len(x)
    b, c = int((x & (1 - y)).sum()), int(((1 - x) & y).sum())
    plain = mcnemar(b, c, method="asymptotic").statistic
    alone = {m: clustered_mcnemar(x, y, np.arange(n), method=m).statistic for m in CLUSTERED_METHODS}
    assert alone["durkalski"] == pytest.approx(plain) == pytest.approx(alone["eliasziw"])
    assert alone["obuchowski"] == pytest.approx(plain * (n - 1) / n)


@pytest.mark.parametrize("method", CLUSTERED_METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_clustered_tests_do_not_care_which_test_is_first_or_how_films_lie(seed: int, method: str) -> None:
    x, y, patients = paired(seed)
    order = np.random.default_rng(seed).permutation(len(x))
    forth = clustered_mcnemar(x, y, patients, method=method)
    back = clustered_mcnemar(y[order], x[order], [f"p{i}" for i in patients[order]], method=method)
    assert forth.statistic == pytest.approx(back.statistic)
    assert (forth.b, forth.c) == (back.c, back.b)


@pytest.mark.parametrize("method", ["obuchowski", "durkalski", "yang"])
def test_copies_within_a_patient_teach_the_clustered_test_nothing(method: str) -> None:
    x, y, _ = paired(0)
    once = clustered_mcnemar(x, y, np.arange(120), method=method)
    copied = clustered_mcnemar(np.tile(x, 3), np.tile(y, 3), np.tile(np.arange(120), 3), method=method)
    assert copied.statistic == pytest.approx(once.statistic)


@pytest.mark.parametrize("method", CLUSTERED_METHODS)
def test_tests_that_never_differ_have_p_1(method: str) -> None:
    assert clustered_mcnemar([1, 0, 1], [1, 0, 1], [1, 1, 2], method=method).p_value == 1


PAIRS = [(5, 3, 40), (0, 0, 10), (10, 0, 10), (0, 7, 50), (1, 0, 1), (75, 30, 400)]


@pytest.mark.parametrize("level", [0.9, 0.99])
@pytest.mark.parametrize(("b", "c", "n"), PAIRS)
def test_tango_limits_are_where_the_score_test_just_rejects(b: int, c: int, n: int, level: float) -> None:
    z = stats.norm.isf((1 - level) / 2)
    for limit in paired_difference(b, c, n, level=level).ci:
        if abs(limit) > 1 - 1e-6:
            continue
        # Restricted maximum likelihood by brute force over the probability that only the second is positive.
        only_second = np.linspace(max(0.0, -limit), (1 - limit) / 2, 400_001)[1:-1]
        only_first = only_second + limit
        concordant = 1 - only_first - only_second
        # 0 · log(p) is left out, not 0 · log(0).
        fit = sum(k * np.log(p) for k, p in ((b, only_first), (c, only_second), (n - b - c, concordant)) if k)
        best = int(np.argmax(fit))
        se = np.sqrt((only_first[best] + only_second[best] - limit**2) / n)
        assert abs((b - c) / n - limit) / se == pytest.approx(z, rel=2e-3)


@pytest.mark.parametrize("n", [1, 10, 300])
def test_tango_limits_without_discordant_films_are_in_closed_form(n: int) -> None:
    z2 = stats.norm.isf(0.025) ** 2
    assert paired_difference(0, 0, n).ci == pytest.approx((-z2 / (n + z2), z2 / (n + z2)))


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("method", PAIRED_INTERVALS)
@pytest.mark.parametrize(("b", "c", "n"), PAIRS)
def test_paired_differences_mirror(b: int, c: int, n: int, method: str, shrink: bool) -> None:
    forth = paired_difference(b, c, n, method=method, shrink=shrink)
    back = paired_difference(c, b, n, method=method, shrink=shrink)
    assert back.ci == pytest.approx((-forth.ci_high, -forth.ci_low), abs=1e-9)
    assert -1 <= forth.ci_low <= forth.ci_high <= 1
    if not shrink:
        assert forth.ci_low <= forth.value + 1e-9 and forth.value <= forth.ci_high + 1e-9


@pytest.mark.parametrize("which", ["ppv", "npv"])
@pytest.mark.parametrize("seed", range(3))
def test_relative_predictive_values_follow_the_jackknife(seed: int, which: str) -> None:
    rng = np.random.default_rng(seed)
    d = rng.integers(2, size=300)
    x, y = ((rng.random(300) < 0.2 + 0.6 * d).astype(int) for _ in range(2))
    ratio, p = relative_predictive_value(d, x, y, which=which)

    def log_ratio(keep: np.ndarray) -> float:
        hit = 1 if which == "ppv" else 0
        values = [(d[keep] == hit)[test[keep] == hit].mean() for test in (x, y)]
        return np.log(values[0] / values[1])

    everyone = np.arange(300)
    without = np.array([log_ratio(np.delete(everyone, i)) for i in everyone])
    se = np.sqrt(299 / 300 * ((without - without.mean()) ** 2).sum())
    assert np.log(ratio.value) == pytest.approx(log_ratio(everyone))
    # Delta method and jackknife agree to order 1/n.
    assert ratio.standard_error == pytest.approx(se, rel=0.02)
    assert (p < 0.05) == (not ratio.ci_low <= 1 <= ratio.ci_high)
    for weighted in (False, True):
        chi2, p_score = predictive_value_test(d, x, y, which=which, weighted=weighted)
        assert p_score == pytest.approx(stats.chi2.sf(chi2, 1))
        assert p_score == pytest.approx(p, abs=0.05)


def test_a_test_that_is_never_positive_has_no_predictive_value() -> None:
    ratio, p = relative_predictive_value([0, 1], [0, 0], [1, 1])
    assert np.isnan(ratio.value) and np.isnan(p) and "undefined" in ratio.reason
    assert np.isnan(predictive_value_test([0, 1], [0, 0], [1, 1])).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mcnemar(1, 2, method="exakt"), "did you mean 'exact'"),
        (lambda: mcnemar(-1, 2), "cannot be negative"),
        (lambda: clustered_mcnemar([1], [0], [1], method="durkalsky"), "did you mean 'durkalski'"),
        (lambda: clustered_mcnemar([1, 0], [0], [1]), "pair them film by film"),
        (lambda: paired_difference(1, 2, 3, method="tong"), "did you mean 'tango'"),
        (lambda: relative_predictive_value([1], [1], [1], which="lr"), "neither ppv nor npv"),
        (lambda: relative_predictive_value([1, 0], [1], [1]), "pair them film by film"),
    ],
)
def test_bad_input_is_named(call: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        call()  # type: ignore[operator]


def test_no_films_have_no_paired_difference() -> None:
    assert "no films" in paired_difference(0, 0, 0).reason
