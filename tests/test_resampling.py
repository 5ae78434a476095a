"""The bootstrap of sums against resampling films and patients one by one."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import special

from metrics import METRICS, NAMES
from resampling import Sampling, bootstrap_metrics, confusion_matrix, confusion_metrics, patient_weights


def sample(seed: int, n: int = 300, patients: int = 90) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities and patients whose films resemble each other."""
    rng = np.random.default_rng(seed)
    patient = np.concatenate([np.arange(patients), rng.integers(patients, size=n - patients)])
    own = rng.normal(size=patients)[patient]
    y = (own + rng.normal(size=n) > 0).astype(int)
    return y, special.expit(1.2 * own + rng.normal(size=n)), patient


def by_hand(name: str, y: np.ndarray, p: np.ndarray, threshold: float) -> float:
    metric = METRICS[name]
    return metric.function(y, (p >= threshold).astype(int) if metric.needs == "predictions" else p)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_replicates_equal_measuring_the_repeated_films(name: str, clustered: bool) -> None:
    y, p, patient = sample(0)
    codes = patient if clustered else np.arange(len(y))
    draws = bootstrap_metrics(y, p, threshold=0.4, groups=codes, n_boot=10, seed=5)[name]
    weights = next(patient_weights(codes.max() + 1, n_boot=10, rng=np.random.default_rng(5)))
    for replicate, column in zip(draws, weights.T):
        films = np.repeat(np.arange(len(y)), column[codes].astype(int))
        # Four Newton steps reach the recalibration of a resample to 1e-6; everything else is exact.
        assert replicate == pytest.approx(by_hand(name, y[films], p[films], 0.4), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_merging_scores_keeps_the_spread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y, p, patient = sample(1, n=1000, patients=400)
    exact = bootstrap_metrics(y, p, groups=patient, n_boot=300)[name]
    monkeypatch.setattr("resampling.MAX_SCORE_GROUPS", 100)
    merged = bootstrap_metrics(y, p, groups=patient, n_boot=300)[name]
    assert merged.std() == pytest.approx(exact.std(), rel=0.02)
    assert merged.mean() == pytest.approx(exact.mean(), abs=0.1 * exact.std())


def test_films_of_one_patient_widen_the_spread() -> None:
    y, p, patient = sample(2)
    films, patients = bootstrap_metrics(y, p), bootstrap_metrics(y, p, groups=patient)
    for name in ("accuracy", "auc_roc", "brier", "log_loss", "mcc"):
        assert patients[name].std() > 1.1 * films[name].std()


def test_one_class_leaves_its_metrics_undefined_in_every_resample() -> None:
    draws = bootstrap_metrics([0, 0, 0], [0.1, 0.2, 0.7], n_boot=5)
    assert np.isnan(draws["auc_roc"]).all() and np.isnan(draws["calibration_slope"]).all()
    assert np.isfinite(draws["accuracy"]).all()


def test_a_seed_is_a_bootstrap() -> None:
    y, p, _ = sample(0)
    first, again, other = (bootstrap_metrics(y, p, n_boot=20, seed=seed)["brier"] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_many_patients_get_fewer_resamples_and_limits_from_their_spread() -> None:
    sampling = Sampling(np.arange(1_000_000), 0.95, 2000, 0)
    assert sampling.resamples == 200
    interval = sampling.interval(0.5, np.random.default_rng(0).normal(0.5, 0.01, size=200), low=0, high=1)
    assert "200 resamples, value ± z × SD" in interval.method
    assert Sampling(np.arange(10_000), 0.95, 2000, 0).resamples == 2000


def test_undefined_resamples_are_left_out_and_counted() -> None:
    sampling = Sampling(np.arange(50), 0.95, 2000, 0)
    replicates = np.random.default_rng(0).random(2000)
    replicates[:7] = np.nan
    assert "undefined in 7 of 2000 resamples" in sampling.interval(0.5, replicates, low=0, high=1).reason
    assert np.isnan(sampling.interval(0.5, np.full(2000, np.nan), low=0, high=1).ci_low)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_confusion_metrics_of_many_matrices_are_those_of_each(k: int) -> None:
    rng = np.random.default_rng(k)
    matrices = rng.integers(1, 30, size=(4, k, k))
    for positive in (None, 0, k - 1):
        together = confusion_metrics(matrices, positive=positive)
        for index, matrix in enumerate(matrices):
            alone = confusion_metrics(matrix, positive=positive)
            assert all(together[name][index] == pytest.approx(float(alone[name])) for name in alone)


def test_the_confusion_matrix_has_the_truth_in_rows() -> None:
    matrix = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), n_classes=3)
    assert matrix.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


@pytest.mark.slow
def test_two_thousand_resamples_of_ten_thousand_films_take_seconds() -> None:
    y, p, patient = sample(0, n=10_000, patients=4000)
    start = time.process_time()
    draws = bootstrap_metrics(y, p, groups=patient)
    assert set(draws) == set(NAMES) and all(len(values) == 2000 for values in draws.values())
    # About 1 s on one core; the issue asks for 5, and a busy machine may take twice that.
    assert time.process_time() - start < 10
