"""score_shift.py: prevalence without labels, scores against validation's, accuracy against coverage."""

from __future__ import annotations

import numpy as np
import pytest

import score_shift as ss
from calibration import adjust_prior
from errors import DataError


def calibrated(n: int, prevalence: float, seed: int, *, prior: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Labels at `prevalence`, and the true posterior at `prior` of a score that is N(±1, 1)."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < prevalence).astype(int)
    score = rng.normal(2 * labels - 1, 1)
    return labels, prior / (prior + (1 - prior) * np.exp(-2 * score))


def em(p: np.ndarray, prior: float) -> float:
    share = prior
    for _ in range(5000):
        share = float(adjust_prior(p, prior_from=prior, prior_to=share).mean())
    return share


@pytest.mark.parametrize("prior", [0.3, 0.5, 0.74])
@pytest.mark.parametrize("prevalence", [0.05, 0.4, 0.9])
def test_prevalence_is_where_the_em_ends(prior: float, prevalence: float) -> None:
    _, p = calibrated(400, prevalence, 3, prior=prior)
    assert ss.estimate_prevalence(p, prior=prior).value == pytest.approx(em(p, prior), abs=1e-8)


def test_intervals_of_prevalence_cover_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(300):
        found = ss.estimate_prevalence(calibrated(300, 0.2, seed)[1], prior=0.5)
        covered += found.ci_low <= 0.2 <= found.ci_high
    assert 0.92 <= covered / 300 <= 0.98


def test_films_of_one_patient_count_as_one_observation() -> None:
    _, p = calibrated(300, 0.3, 0)
    once = ss.estimate_prevalence(p, prior=0.5)
    twice = ss.estimate_prevalence(np.repeat(p, 2), prior=0.5, groups=np.repeat(np.arange(300), 2))
    assert twice.value == pytest.approx(once.value, abs=1e-9)
    assert twice.standard_error == pytest.approx(once.standard_error, rel=1e-6)
    alone = ss.estimate_prevalence(np.repeat(p, 2), prior=0.5)
    assert alone.standard_error == pytest.approx(once.standard_error / np.sqrt(2), rel=1e-6)


@pytest.mark.parametrize(("p", "end"), [([0.0, 0.1, 0.01], 0.0), ([1.0, 0.9, 0.99], 1.0)])
def test_a_prevalence_at_the_end_has_no_interval_and_says_why(p: list[float], end: float) -> None:
    found = ss.estimate_prevalence(p, prior=0.5)
    assert found.value == end and np.isnan(found.ci_low) and "end of the range" in found.reason


@pytest.mark.parametrize("prior", [0.0, 1.0, float("nan")])
def test_an_impossible_prior_is_refused(prior: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        ss.estimate_prevalence([0.5], prior=prior)


@pytest.mark.parametrize("prior_to", [0.05, 0.5, 0.8])
def test_a_moved_threshold_calls_what_the_corrected_probability_would(prior_to: float) -> None:
    p = np.linspace(0.0013, 0.9991, 1000)
    moved = ss.moved_threshold(0.4, prior_from=0.6, prior_to=prior_to)
    np.testing.assert_array_equal(p >= moved, adjust_prior(p, prior_from=0.6, prior_to=prior_to) >= 0.4)


def test_scores_of_the_same_kind_show_no_shift() -> None:
    labels, p = calibrated(4000, 0.5, 1)
    found = ss.score_shift(calibrated(4000, 0.5, 2)[1], labels, p, prevalence=0.5)
    assert found.distance < 0.04 and found.p_value > 0.01 and found.distance_at_prevalence < 0.04
    for shares in (found.observed, found.expected, found.expected_at_prevalence):
        assert shares.sum() == pytest.approx(1)


def test_a_shift_of_prevalence_alone_is_explained_by_prevalence() -> None:
    labels, p = calibrated(4000, 0.5, 1)
    measured = calibrated(4000, 0.1, 2)[1]
    prevalence = ss.estimate_prevalence(measured, prior=0.5).value
    found = ss.score_shift(measured, labels, p, prevalence=prevalence)
    assert found.distance > 0.2 and found.p_value < 1e-6 and found.distance_at_prevalence < 0.04
    assert (
        np.abs(found.observed - found.expected_at_prevalence).sum()
        < 0.2
        < np.abs(found.observed - found.expected).sum()
    )


def test_a_class_that_scores_otherwise_is_not_explained_by_prevalence() -> None:
    labels, p = calibrated(4000, 0.5, 1)
    measured = np.clip(calibrated(4000, 0.5, 2)[1] * 0.5 + 0.25, 0, 1)
    prevalence = ss.estimate_prevalence(measured, prior=0.5).value
    assert ss.score_shift(measured, labels, p, prevalence=prevalence).distance_at_prevalence > 0.15


def test_the_distance_without_mixing_is_scipys() -> None:
    labels, p = calibrated(500, 0.3, 1)
    measured = calibrated(300, 0.6, 2)[1]
    found = ss.score_shift(measured, labels, p, prevalence=float(labels.mean()))
    assert found.distance_at_prevalence == pytest.approx(found.distance, abs=1e-12)


def test_validation_of_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="one class only"):
        ss.score_shift([0.5], [1, 1], [0.5, 0.6], prevalence=0.5)


def test_accuracy_against_coverage_is_counted_from_the_surest_film() -> None:
    rng = np.random.default_rng(0)
    right, sure = rng.integers(0, 2, 50), rng.random(50)
    found = ss.selective(right, sure)
    order = np.argsort(-sure)
    expected = [right[order[:count]].mean() for count in range(1, 51)]
    np.testing.assert_allclose(found.accuracy, expected)
    np.testing.assert_allclose(found.coverage, np.arange(1, 51) / 50)
    assert found.area == pytest.approx(np.mean(1 - np.array(expected)))
    assert [row["n"] for row in found.rows] == [50, 48, 45, 40, 35, 25]
    assert found.rows[0]["accuracy"]["value"] == pytest.approx(right.mean())
    assert found.rows[0]["accuracy"]["ci_low"] < right.mean() < found.rows[0]["accuracy"]["ci_high"]


def test_films_equally_sure_are_decided_together() -> None:
    found = ss.selective([1, 0, 1, 1], [0.9, 0.5, 0.5, 0.1], coverages=(0.5,))
    np.testing.assert_allclose(found.coverage, [0.25, 0.75, 1.0])
    assert found.rows[0] | {"accuracy": None} == {"coverage": 0.75, "least_certainty": 0.5, "n": 3, "accuracy": None}


def test_a_certainty_for_each_film_is_asked_for() -> None:
    with pytest.raises(DataError, match="one per film"):
        ss.selective([1, 0], [0.5])


def test_the_margin_is_the_share_of_the_way_to_the_end() -> None:
    np.testing.assert_allclose(ss.decision_margin([0.0, 0.1, 0.2, 0.6, 1.0], 0.2), [1, 0.5, 0, 0.5, 1])
    np.testing.assert_allclose(ss.decision_margin([0.0, 0.5, 1.0], 0.0), [0, 0.5, 1])
    np.testing.assert_allclose(ss.decision_margin([0.0, 0.5, 1.0], 1.0), [1, 0.5, 0])
