"""Training on several findings a film: the loss, the figures of an epoch, calibration and a threshold for each finding.

Every finding is a question of its own, answered by a sigmoid. Legend: B batch, N films, C findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

from auroc import absent_class, auroc
from calibration import calibration_in_the_large, logistic_recalibration
from config import TrainingConfig
from findings import matrix
from metrics import choose_threshold

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

LEAST_FOR_SLOPE = 10
"""Validation films with a finding, and without it, from which its slope is fitted too; an intercept needs one."""


def finding_loss(logits_BC: Tensor, targets_BC: Tensor, *, config: TrainingConfig, weights_2C: Tensor | None) -> Tensor:
    """Mean binary cross-entropy or focal loss (Lin 2017) over films and findings; soft targets in [0, 1].

    `weights_2C` weighs a finding's absence (row 0) and presence (row 1); label smoothing moves targets towards 1/2.
    """
    targets_BC = targets_BC * (1 - config.label_smoothing) + config.label_smoothing / 2
    log_absent_BC, log_present_BC = F.logsigmoid(-logits_BC), F.logsigmoid(logits_BC)
    absent_BC, present_BC = (targets_BC - 1) * log_absent_BC, -targets_BC * log_present_BC
    if config.loss == "focal":
        absent_BC = absent_BC * log_present_BC.exp() ** config.focal_gamma
        present_BC = present_BC * log_absent_BC.exp() ** config.focal_gamma
    if weights_2C is not None:
        absent_BC, present_BC = absent_BC * weights_2C[0], present_BC * weights_2C[1]
    return (absent_BC + present_BC).mean()


def finding_weights(codes_N: IntArray, count: int, *, balance: str, device: torch.device) -> Tensor | None:
    """(2, C) weights of absence and presence, which average 1 over the films; None where `balance` asks for none."""
    if balance != "loss":
        return None
    present_NC = matrix(codes_N, count)
    counts_2C = np.stack([(1 - present_NC).sum(axis=0), present_NC.sum(axis=0)])
    return torch.tensor(len(codes_N) / (2 * np.maximum(counts_2C, 1)), dtype=torch.float32, device=device)


def finding_figures(logits_NC: FloatArray, codes_N: IntArray) -> dict[str, float]:
    """loss, auc_roc, accuracy, balanced_accuracy and f1 of validation logits at 0.5: means over the findings.

    Over those that validation has films with and without; NaN where there is none.
    """
    z_NC, y_NC = logits_NC.astype(np.float64), matrix(codes_N, logits_NC.shape[1])
    called_NC = z_NC >= 0
    both = [k for k, y in enumerate(y_NC.T) if not absent_class(y)]
    hits = (called_NC & (y_NC == 1)).sum(axis=0)
    named = called_NC.sum(axis=0) + y_NC.sum(axis=0)
    recalls = [[(called_NC[y_NC[:, k] == side, k] == side).mean() for side in (0, 1)] for k in both]
    return {
        "loss": float((np.logaddexp(0, z_NC) - y_NC * z_NC).mean()),
        "auc_roc": float(np.mean([auroc(y_NC[:, k], z_NC[:, k]) for k in both])) if both else float("nan"),
        "accuracy": float((called_NC == y_NC).mean()),
        "balanced_accuracy": float(np.mean(recalls)) if both else float("nan"),
        "f1": float(np.mean([2 * hits[k] / max(1, named[k]) for k in both])) if both else float("nan"),
    }


def calibrated_findings(
    logits_NC: FloatArray, codes_N: IntArray, names: Sequence[str], settings: TrainingConfig
) -> dict[str, Any]:
    """Calibration and threshold of each finding from validation logits, as a checkpoint keeps them.

    Weights in the loss move the probabilities of rare findings far up: slope and intercept bring them back, which one
    temperature cannot, so that it stays 1.
    """
    y_NC = matrix(codes_N, len(names))
    points = {name: _point(logits_NC[:, k].astype(np.float64), y_NC[:, k], settings) for k, name in enumerate(names)}
    point = {"rule": settings.operating_point, "positive_class": None, "findings": points}
    return {"temperature": 1.0, "operating_point": point}


def uncalibrated_findings(names: Sequence[str]) -> dict[str, Any]:
    """The same before there is a validation: plain sigmoids, called from 0.5 on."""
    point = {"rule": "fixed", "target": None, "threshold": 0.5, "slope": 1.0, "intercept": 0.0}
    points = {name: dict(point) for name in names}
    return {"temperature": 1.0, "operating_point": {"rule": "fixed", "positive_class": None, "findings": points}}


def _point(z_N: npt.NDArray[np.float64], y_N: IntArray, settings: TrainingConfig) -> dict[str, Any]:
    slope, intercept = _platt(z_N, y_N)
    p_N = special.expit(slope * z_N + intercept)
    rule = "fixed" if absent_class(y_N) else settings.operating_point
    target = settings.operating_point_target if rule in ("sensitivity", "specificity") else None
    return {**asdict(choose_threshold(y_N, p_N, rule=rule, target=target)), "slope": slope, "intercept": intercept}


def _platt(z_N: npt.NDArray[np.float64], y_N: IntArray) -> tuple[float, float]:
    """Slope and intercept by maximum likelihood (Platt 1999); slope 1 for few films and where scores would turn."""
    if absent_class(y_N):
        return 1.0, 0.0
    p_N = special.expit(z_N)
    if min(int(y_N.sum()), int((1 - y_N).sum())) >= LEAST_FOR_SLOPE:
        fit = logistic_recalibration(y_N, p_N)
        if fit.slope.value > 0:  # NaN where the scores separate the films
            return fit.slope.value, fit.intercept.value
    intercept = calibration_in_the_large(y_N, p_N).value
    return 1.0, intercept if np.isfinite(intercept) else 0.0
