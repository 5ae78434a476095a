"""model_comparison.py: a comparison against the tests it is made of, reclassification counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from auroc import delong_test, macro_auroc
from errors import DataError
from metrics import NAMES
from model_comparison import compare_predictions, net_reclassification
from paired_tests import clustered_mcnemar, mcnemar
from tests.test_metrics import predictions


def two_models(seed: int = 0, n: int = 200, k: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y, a = predictions(seed, n, k)
    b = 0.6 * a + 0.4 * np.random.default_rng(seed + 100).dirichlet(np.ones(k), size=n)
    return y, a, b


def test_a_comparison_holds_the_tests_of_its_parts() -> None:
    y, a, b = two_models()
    result = compare_predictions(y, a, b, threshold_b=0.4, n_boot=300)
    test = delong_test(y, a[:, 1], b[:, 1])
    for name, value in (("difference", test.difference), ("p_value", test.p_value), ("ci_low", test.ci_low)):
        assert result["auc_roc"][name] == value
    right_a, right_b = (a[:, 1] >= 0.5) == y, (b[:, 1] >= 0.4) == y
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    method = "exact" if only_a + only_b < 25 else "asymptotic"
    assert result["mcnemar"]["p_value"] == mcnemar(only_a, only_b, method=method).p_value
    for name, entry in result["metrics"].items():
        assert entry["difference"] == pytest.approx(entry["a"] - entry["b"]), name
        assert entry["ci_low"] <= entry["difference"] <= entry["ci_high"], name
    assert set(result["metrics"]) == set(NAMES)
    assert json.loads(json.dumps(result)) == result


def test_a_clustered_comparison_uses_clustered_tests() -> None:
    y, a, b = two_models()
    patients = np.arange(200) // 4
    result = compare_predictions(y, a, b, groups=patients, n_boot=200)
    right = [(p[:, 1] >= 0.5) == y for p in (a, b)]
    assert result["mcnemar"]["p_value"] == clustered_mcnemar(*right, patients).p_value
    assert "Obuchowski" in result["auc_roc"]["method"] and result["n_patients"] == 50
    assert all("patients" in entry["method"] for entry in result["metrics"].values())


def test_exchanging_the_models_turns_every_difference_round() -> None:
    y, a, b = two_models()
    forth, back = compare_predictions(y, a, b, n_boot=200), compare_predictions(y, b, a, n_boot=200)
    for name, entry in forth["metrics"].items():
        other = back["metrics"][name]
        assert (-other["ci_high"], -other["ci_low"]) == pytest.approx((entry["ci_low"], entry["ci_high"])), name
    assert back["auc_roc"]["p_value"] == pytest.approx(forth["auc_roc"]["p_value"])


def test_a_model_does_not_differ_from_itself() -> None:
    y, a, _ = two_models()
    result = compare_predictions(y, a, a, n_boot=50)
    assert result["auc_roc"]["p_value"] == 1 == result["mcnemar"]["p_value"]
    assert all(entry["ci_low"] == entry["ci_high"] == 0 for entry in result["metrics"].values())


def test_one_column_of_probabilities_is_that_of_class_1() -> None:
    y, a, b = two_models()
    assert compare_predictions(y, a[:, 1], b[:, 1], n_boot=50) == compare_predictions(y, a, b, n_boot=50)


def test_models_of_several_classes_are_compared_by_macro_averages() -> None:
    y, a, b = two_models(k=4)
    result = compare_predictions(y, a, b, n_boot=200)
    expected = macro_auroc(y, a).value - macro_auroc(y, b).value
    assert result["auc_roc"]["difference"] == pytest.approx(expected)
    assert result["auc_roc"]["ci_low"] < expected < result["auc_roc"]["ci_high"]
    assert result["net_reclassification"] is None and result["thresholds"] is None
    assert {"accuracy", "brier", "ece"} <= set(result["metrics"])


def test_models_that_do_not_fit_together_are_refused() -> None:
    y, a, _ = two_models(k=4)
    with pytest.raises(DataError, match="model a has 4 classes, model b 3"):
        compare_predictions(y, a, a[:, :3])
    with pytest.raises(DataError, match="probabilities of b have shape"):
        compare_predictions([0, 1, 1], [0.1, 0.2, 0.3], [0.1, 0.2])


# --- reclassification -----------------------------------------------------------------------------------------


def test_reclassification_counts_moves_up_and_down() -> None:
    y = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0])
    old = np.array([0.2, 0.2, 0.2, 0.8, 0.2, 0.8, 0.8, 0.2, 0.2])
    new = np.array([0.8, 0.8, 0.3, 0.1, 0.8, 0.2, 0.9, 0.1, 0.1])
    result = net_reclassification(y, old, new, thresholds_old=0.5)
    # Positives: 2 up, 1 down of 4. Negatives: 1 up, 1 down of 5.
    assert result.positives.value == pytest.approx(1 / 4)
    assert result.negatives.value == pytest.approx(0)
    assert result.total.value == pytest.approx(1 / 4)
    assert result.positives.standard_error == pytest.approx(np.sqrt((3 / 4 - 1 / 16) / 4))
    assert result.total.standard_error == pytest.approx(np.sqrt((3 / 4 - 1 / 16) / 4 + (2 / 5) / 5))
    continuous = net_reclassification(y, old, new)
    assert continuous.positives.value == pytest.approx((3 - 1) / 4)
    assert continuous.negatives.value == pytest.approx((3 - 2) / 5)


def test_several_thresholds_make_several_categories() -> None:
    y, old, new = [1, 0], [0.15, 0.85], [0.45, 0.45]
    assert net_reclassification(y, old, new, thresholds_old=0.5).total.value == 1
    assert net_reclassification(y, old, new, thresholds_old=[0.3, 0.6]).total.value == 2
    moved = net_reclassification(y, old, new, thresholds_old=0.5, thresholds_new=0.4)
    assert moved.total.value == pytest.approx(1.0)


def test_clusters_widen_reclassification_and_an_absent_class_undoes_it() -> None:
    y, a, b = two_models()
    copies = [np.tile(x, 2) for x in (y, a[:, 1], b[:, 1])]
    plain, once = net_reclassification(*copies).total, net_reclassification(y, a[:, 1], b[:, 1]).total
    clustered = net_reclassification(*copies, groups=np.tile(np.arange(200), 2)).total
    assert clustered.standard_error == pytest.approx(once.standard_error, rel=0.01)
    assert plain.standard_error == pytest.approx(once.standard_error / np.sqrt(2))
    assert "no positive films" in net_reclassification([0, 0], [0.1, 0.2], [0.2, 0.1]).total.reason
