"""What training minimises and what validation says: the schedule, the losses, mixing, the figures of an epoch.

Pure functions; the loop and the head search share them. Legend: B batch, H height, W width, C channels or classes,
N films.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from auroc import auroc, multiclass_auroc
from config import TrainingConfig
from data_preprocessing import class_weights
from predictor import decide, softmax

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]


def warmup_cosine(*, step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor on the peak rate before optimizer step `step` (from 0): linear up, then a half cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def classification_loss(
    logits_BC: Tensor, targets_BC: Tensor, *, config: TrainingConfig, weights_C: Tensor | None
) -> Tensor:
    """Mean cross-entropy or focal loss (Lin 2017) of soft targets (rows sum to 1), classes weighted by `weights_C`."""
    smoothing = config.label_smoothing
    if config.loss == "cross_entropy":
        return F.cross_entropy(logits_BC, targets_BC, weight=weights_C, label_smoothing=smoothing)
    targets_BC = targets_BC * (1 - smoothing) + smoothing / targets_BC.shape[1]
    log_prob_BC = F.log_softmax(logits_BC, dim=1)
    terms_BC = -targets_BC * (1 - log_prob_BC.exp()) ** config.focal_gamma * log_prob_BC
    return (terms_BC if weights_C is None else terms_BC * weights_C).sum(dim=1).mean()


@dataclass(frozen=True)
class Mixing:
    """How the films of a batch are mixed with one another."""

    share: float
    """Of its own film in each result of MixUp; for CutMix, of the area kept, before the cut is rounded to pixels."""
    partner_B: IntArray
    """Which film each is mixed with."""
    centre: tuple[float, float] | None
    """Of CutMix' rectangle, as shares of height and width; None for MixUp."""


def draw_mixing(count: int, *, mixup_alpha: float, cutmix_alpha: float, rng: np.random.Generator) -> Mixing | None:
    """MixUp (Zhang 2018) or CutMix (Yun 2019) of `count` films, from `rng` alone; None where both are off."""
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return None
    use_cutmix = cutmix_alpha > 0 and (mixup_alpha == 0 or rng.random() < 0.5)
    alpha = cutmix_alpha if use_cutmix else mixup_alpha
    share, partner_B = float(rng.beta(alpha, alpha)), rng.permutation(count)
    return Mixing(share, partner_B, (rng.random(), rng.random()) if use_cutmix else None)


def mix_batch(
    images_NCHW: Tensor, targets_NC: Tensor, mixing: Mixing, *, rows_B: IntArray, partners_B: IntArray
) -> tuple[Tensor, Tensor]:
    """The films `rows_B` of `images_NCHW` and their targets, mixed with the films `partners_B` of the same tensors."""
    own, partner = (torch.from_numpy(item).to(images_NCHW.device) for item in (rows_B, partners_B))
    images_BCHW, others_BCHW = images_NCHW[own], images_NCHW[partner]
    share = mixing.share
    if mixing.centre is None:
        images_BCHW = torch.lerp(others_BCHW, images_BCHW, share)
    else:
        height, width = images_NCHW.shape[2:]
        (top, bottom), (left, right) = (_cut(side, share, at) for side, at in zip((height, width), mixing.centre))
        images_BCHW[:, :, top:bottom, left:right] = others_BCHW[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return images_BCHW, torch.lerp(targets_NC[partner], targets_NC[own], share)


def _cut(length: int, share: float, centre: float) -> tuple[int, int]:
    half, middle = length * math.sqrt(1 - share) / 2, length * centre
    return max(0, round(middle - half)), min(length, round(middle + half))


SIDE_STEP = 16
"""Sides of progressive resizing are multiples of this, so that only a few sizes occur."""


def progressive_side(*, epoch: int, epochs: int, start: int, full: int) -> int:
    """Side in pixels of the films of `epoch` (from 1): from `start`, growing, to `full` from 3/4 of `epochs` on."""
    share = (epoch - 1) / max(1.0, 0.75 * epochs)
    if share >= 1 or epoch >= epochs:
        return full
    return max(start, int(start + share * (full - start)) // SIDE_STEP * SIDE_STEP)


def shrunk(films_BHWC: Tensor, side: int) -> Tensor:
    """Films (B, side, side, C) of grey levels, averaged down without aliasing; the films themselves at full size."""
    if films_BHWC.shape[1] == side:
        return films_BHWC
    films_BCHW = films_BHWC.permute(0, 3, 1, 2).float()
    resized = F.interpolate(films_BCHW, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized.permute(0, 2, 3, 1)


def loss_weights(labels: IntArray, n_classes: int, *, balance: str, device: torch.device) -> Tensor | None:
    """Weight per class in the loss, float32 (C,) on `device`; None where `balance` asks for none."""
    if balance not in ("loss", "sampler_and_loss"):
        return None
    return torch.tensor(class_weights(labels, n_classes), dtype=torch.float32, device=device)


def improves(value: float, best: float | None, mode: str) -> bool:
    """Whether `value` beats `best` in direction `mode`; NaN never does."""
    if math.isnan(value):
        return False
    return best is None or (value > best if mode == "max" else value < best)


def validation_figures(logits_NC: FloatArray, labels: IntArray, *, positive: int | None) -> dict[str, float]:
    """loss, auc_roc, accuracy, balanced_accuracy and f1 of validation logits, at threshold 0.5 or by argmax."""
    prob_NC = softmax(logits_NC, 1.0)
    n_classes = prob_NC.shape[1]
    names = [str(code) for code in range(n_classes)]
    predicted = decide(prob_NC, names, None if positive is None else names[positive], 0.5)
    measured = range(n_classes) if positive is None else [positive]
    recalls = [float((predicted[labels == code] == code).mean()) for code in range(n_classes)]
    return {
        "loss": float(-np.log(np.maximum(prob_NC[np.arange(len(labels)), labels], 1e-300)).mean()),
        "auc_roc": _validation_auroc(prob_NC, labels, positive),
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "f1": float(np.mean([_f1(predicted, labels, code) for code in measured])),
    }


def _validation_auroc(prob_NC: FloatArray, labels: IntArray, positive: int | None) -> float:
    if positive is not None:
        return auroc(labels == positive, prob_NC[:, positive])
    return multiclass_auroc(labels, prob_NC)


def _f1(predicted: IntArray, labels: IntArray, code: int) -> float:
    hits = ((predicted == code) & (labels == code)).sum()
    return float(2 * hits / max(1, (predicted == code).sum() + (labels == code).sum()))
