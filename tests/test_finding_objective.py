"""finding_objective.py: the loss, figures and calibration of several findings, against independent answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, roc_auc_score

from config import TrainingConfig
from finding_objective import calibrated_findings, finding_figures, finding_loss, finding_weights, uncalibrated_findings
from findings import matrix, probabilities
from objective import draw_mixing, mix_batch

NAMES = ("effusion", "mass", "nodule")


@pytest.fixture
def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, generator=generator), (torch.rand(40, 3, generator=generator) < 0.3).float()


def test_the_loss_is_binary_cross_entropy_as_torch_has_it(
    logits_and_targets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, targets = logits_and_targets
    ours = finding_loss(logits, targets, config=TrainingConfig(), weights_2C=None)
    assert torch.allclose(ours, F.binary_cross_entropy_with_logits(logits, targets))


def test_weights_are_those_of_pos_weight(logits_and_targets: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets = logits_and_targets
    weights = torch.tensor([[1.0, 1.0, 1.0], [2.0, 5.0, 0.5]])
    ours = finding_loss(logits, targets, config=TrainingConfig(), weights_2C=weights)
    assert torch.allclose(ours, F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights[1]))


def test_label_smoothing_moves_targets_towards_one_half(
    logits_and_targets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, targets = logits_and_targets
    ours = finding_loss(logits, targets, config=TrainingConfig(label_smoothing=0.2), weights_2C=None)
    assert torch.allclose(ours, F.binary_cross_entropy_with_logits(logits, targets * 0.8 + 0.1))


def test_the_focal_loss_is_that_of_torchvision(logits_and_targets: tuple[torch.Tensor, torch.Tensor]) -> None:
    from torchvision.ops import sigmoid_focal_loss

    logits, targets = logits_and_targets
    ours = finding_loss(logits, targets, config=TrainingConfig(loss="focal", focal_gamma=2.0), weights_2C=None)
    assert torch.allclose(ours, sigmoid_focal_loss(logits, targets, alpha=-1, gamma=2.0, reduction="mean"))


def test_extreme_logits_give_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[900.0, -900.0]], requires_grad=True)
    for name in ("cross_entropy", "focal"):
        loss = finding_loss(logits, torch.tensor([[0.0, 1.0]]), config=TrainingConfig(loss=name), weights_2C=None)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all() and loss > 100


def test_mixup_gives_each_finding_the_share_of_its_film(
    logits_and_targets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    _, targets = logits_and_targets
    films = torch.arange(40.0).view(40, 1, 1, 1)
    mixing = draw_mixing(40, mixup_alpha=1.0, cutmix_alpha=0.0, rng=np.random.default_rng(0))
    assert mixing is not None
    _, mixed = mix_batch(films, targets, mixing, rows_B=np.arange(40), partners_B=mixing.partner_B)
    expected = mixing.share * targets + (1 - mixing.share) * targets[torch.from_numpy(mixing.partner_B)]
    assert torch.allclose(mixed, expected) and ((mixed > 0) & (mixed < 1)).any()


CODES = np.array([0, 1, 1, 0, 2, 3, 0, 0], dtype=np.int64)  # 3 of 8 films with the first, 2 with the second


def test_weights_let_presence_and_absence_count_alike() -> None:
    weights = finding_weights(CODES, 2, balance="loss", device=torch.device("cpu"))
    assert weights is not None
    counts = np.array([[5, 6], [3, 2]])
    assert torch.allclose(weights.double() * torch.from_numpy(counts), torch.full((2, 2), 4.0).double())


def test_without_balance_there_are_no_weights() -> None:
    assert finding_weights(CODES, 2, balance="none", device=torch.device("cpu")) is None


def test_figures_are_the_means_over_findings_that_scikit_learn_gives() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, 80)  # the third finding is of no film
    logits = rng.normal(0, 1, (80, 3)).astype(np.float32) + matrix(codes, 3)
    truth, called, p = matrix(codes, 3), (logits >= 0).astype(int), 1 / (1 + np.exp(-logits.astype(np.float64)))
    figures = finding_figures(logits, codes)
    both = [0, 1]
    assert figures["auc_roc"] == pytest.approx(np.mean([roc_auc_score(truth[:, k], logits[:, k]) for k in both]))
    recalls = [balanced_accuracy_score(truth[:, k], called[:, k]) for k in both]
    assert figures["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert figures["f1"] == pytest.approx(np.mean([f1_score(truth[:, k], called[:, k]) for k in both]))
    assert figures["accuracy"] == pytest.approx((truth == called).mean())
    losses = [log_loss(truth[:, k], p[:, k], labels=[0, 1]) for k in range(3)]
    assert figures["loss"] == pytest.approx(np.mean(losses))


def test_figures_without_any_finding_are_undefined_not_zero() -> None:
    figures = finding_figures(np.zeros((5, 2), dtype=np.float32), np.zeros(5, dtype=np.int64))
    assert math.isnan(figures["auc_roc"]) and math.isnan(figures["balanced_accuracy"])


def calibrated(codes: np.ndarray, logits: np.ndarray, **settings: object) -> dict[str, dict[str, float]]:
    found = calibrated_findings(logits, codes, NAMES[: logits.shape[1]], TrainingConfig(**settings))  # type: ignore[arg-type]
    assert found["temperature"] == 1.0 and found["operating_point"]["positive_class"] is None
    return found["operating_point"]["findings"]


def test_slope_and_intercept_are_those_of_a_logistic_regression() -> None:
    rng = np.random.default_rng(1)
    codes = (rng.random(400) < 0.2).astype(np.int64)
    logits = np.column_stack([3 * codes + rng.normal(2, 2, 400), rng.normal(0, 1, 400)]).astype(np.float32)
    found = calibrated(codes, logits)["effusion"]
    fitted = LogisticRegression(C=np.inf, tol=1e-8).fit(logits[:, :1].astype(np.float64), codes)
    assert found["slope"] == pytest.approx(fitted.coef_[0, 0], rel=1e-3)
    assert found["intercept"] == pytest.approx(fitted.intercept_[0], rel=1e-3)
    p = probabilities(logits, calibrated(codes, logits), NAMES[:2])[:, 0]
    assert p.mean() == pytest.approx(codes.mean(), abs=1e-3)  # what weights in the loss had moved up is brought back


def test_each_finding_has_the_threshold_that_its_own_films_ask_for() -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 4, 300)
    logits = (rng.normal(0, 1, (300, 2)) + 2 * matrix(codes, 2)).astype(np.float32)
    found = calibrated(codes, logits, operating_point="sensitivity", operating_point_target=0.9)
    p = probabilities(logits, found, NAMES[:2])
    for k, name in enumerate(NAMES[:2]):
        caught = p[matrix(codes, 2)[:, k] == 1, k] >= found[name]["threshold"]
        assert caught.mean() >= 0.9 and found[name]["sensitivity"] == pytest.approx(caught.mean())


def test_a_finding_that_validation_lacks_is_called_from_one_half_on_and_not_calibrated() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 2, 100)
    found = calibrated(codes, rng.normal(0, 1, (100, 2)).astype(np.float32))["mass"]
    assert (found["rule"], found["threshold"], found["slope"], found["intercept"]) == ("fixed", 0.5, 1.0, 0.0)


def test_a_rare_finding_gets_its_prevalence_back_by_the_intercept_alone() -> None:
    rng = np.random.default_rng(5)
    codes = np.r_[np.ones(4, dtype=np.int64), np.zeros(96, dtype=np.int64)]
    logits = rng.normal(0, 1, (100, 2)).astype(np.float32) + 1
    found = calibrated(codes, logits)
    assert found["effusion"]["slope"] == 1.0
    assert probabilities(logits, found, NAMES[:2])[:, 0].mean() == pytest.approx(0.04, abs=1e-6)


def test_scores_that_stand_the_wrong_way_round_are_not_turned() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 2, 200)
    logits = (rng.normal(0, 1, (200, 2)) - 2 * matrix(codes, 2)).astype(np.float32)
    assert calibrated(codes, logits)["effusion"]["slope"] == 1.0


def test_before_validation_every_finding_is_called_from_one_half_on() -> None:
    point = uncalibrated_findings(NAMES)["operating_point"]["findings"]
    assert [own["threshold"] for own in point.values()] == [0.5] * 3
