"""Whether a heat map can be believed, and where the evidence lies.

Randomised weights      randomised, similarity          (Adebayo 2018: the map must change with the model)
Deletion, insertion     curves                          (Petsiuk 2018: the places named must matter to the model)
Pointing                region_masks, text_mask, shares (lung field, border, burned-in text)

Every function looks at films as the model saw them. Legend: B batch, S side in pixels, G cells a side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from fold_ensemble import FoldEnsemble
from models import Classifier

FloatArray = npt.NDArray[np.floating[Any]]
Uint8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

DEPTHS = ("head", "last_stage", "all")
"""How much of the network is randomised: from the output downwards, as in the cascade of Adebayo 2018."""
GRID = 14
"""Cells a side that deletion, insertion and their random order go by: no method gains from finer maps."""
STEPS = 10
"""Steps of the deletion and insertion curves; each changes a STEPS-th of the cells."""
COMPARED_SIDE = 28
"""Maps are compared at this side: finer than the layers they come from, and single pixels weigh little."""
BORDER = 1 / 14
"""Width of the border, as a share of the side."""
TEXT_SIDE = 224
"""Larger films are looked at in this size for text: a stroke is then a few pixels wide."""
CENTRE = (0.5, 0.47, 0.36, 0.38)
"""Central lung field: an ellipse by centre x, y and half-axes, as shares of the side. Drawn on films, not segmented."""


# --- randomised weights ----------------------------------------------------------------------------------------


def randomised(model: Classifier, *, depth: str, seed: int) -> Classifier:
    """A copy of `model` with the entries of each tensor of weights shuffled, in the part of it that `depth` names.

    Shuffled rather than drawn anew: the scale of every layer stays, so that signals neither vanish nor overflow.
    """
    if isinstance(model, FoldEnsemble):
        members: Any = [randomised(item, depth=depth, seed=seed + k) for k, item in enumerate(model.classifiers)]
        twins: Any = FoldEnsemble(members, model.temperatures)
        return twins
    stages = model.stages()
    opened = {"head": [], "last_stage": stages[-1], "all": [name for names in stages for name in names]}[depth]
    chosen = {f"backbone.{name}" for name in opened}
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in twin.named_parameters():
            if name in chosen or name.startswith("head."):
                order = torch.randperm(values.numel(), generator=generator).to(values.device)
                values.copy_(values.flatten()[order].view_as(values))
    return twin


def similarity(first_SS: FloatArray, second_SS: FloatArray) -> tuple[float, float]:
    """Spearman correlation and SSIM of two maps in [0, 1], from -1 to 1; NaN where one of them is flat."""
    a, b = (_reduced(item, COMPARED_SIDE) for item in (first_SS, second_SS))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan"), float("nan")
    return float(stats.spearmanr(a, b, axis=None).statistic), ssim(a, b)


def _reduced(map_SS: FloatArray, side: int) -> npt.NDArray[np.float32]:
    return np.asarray(cv2.resize(map_SS.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA), np.float32)


def ssim(first: FloatArray, second: FloatArray) -> float:
    """Mean structural similarity of two images in [0, 1] (Wang 2004: Gaussian of 1.5 pixels, K1 0.01, K2 0.03)."""

    def local(values: FloatArray) -> npt.NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(values.astype(np.float64), (11, 11), 1.5, borderType=cv2.BORDER_REFLECT))

    mean_a, mean_b = local(first), local(second)
    covariance = local(first * second) - mean_a * mean_b
    variance = local(first**2) - mean_a**2 + local(second**2) - mean_b**2
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return float((luminance * (2 * covariance + 0.03**2) / (variance + 0.03**2)).mean())


# --- deletion and insertion ------------------------------------------------------------------------------------


def curves(
    probability: Callable[[Uint8Array], FloatArray], images_BSSC: Uint8Array, order_BK: npt.NDArray[np.int64]
) -> tuple[FloatArray, FloatArray]:
    """Probability of the explained class as cells are deleted, and as they are inserted: both (B, STEPS + 1).

    `probability` gives it (B,) for a batch; `order_BK` ranks the GRID² cells of each film. A deleted cell takes the
    film's mean grey; insertion starts from the film blurred until nothing small is left in it.
    """
    side = images_BSSC.shape[1]
    rank_BSS = np.stack([_cell_ranks(order, side) for order in order_BK])[..., None]
    grey = np.broadcast_to(images_BSSC.mean(axis=(1, 2), keepdims=True).round().astype(np.uint8), images_BSSC.shape)
    blurred = np.stack([_blurred(item) for item in images_BSSC])
    deleted, inserted = [], []
    for count in np.linspace(0, GRID**2, STEPS + 1):
        deleted.append(probability(np.where(rank_BSS < count, grey, images_BSSC)))
        inserted.append(probability(np.where(rank_BSS < count, images_BSSC, blurred)))
    return np.stack(deleted, axis=1), np.stack(inserted, axis=1)


def cell_order(map_SS: FloatArray, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """The GRID² cells from most to least attribution; ties in random order."""
    means = _reduced(map_SS, GRID).ravel()
    return np.lexsort((rng.random(GRID**2), -means))


def area_under(curve_BN: FloatArray) -> FloatArray:
    """Area under curves over the share of cells changed, 0 to 1, by the trapezoid rule: (B,)."""
    return (curve_BN[:, 1:] + curve_BN[:, :-1]).mean(axis=1) / 2


def _cell_ranks(order_K: npt.NDArray[np.int64], side: int) -> npt.NDArray[np.int64]:
    """(S, S): when each pixel's cell has its turn."""
    rank = np.empty(GRID**2, dtype=np.int64)
    rank[order_K] = np.arange(GRID**2)
    cell = np.arange(side) * GRID // side
    return rank.reshape(GRID, GRID)[np.ix_(cell, cell)]


def _blurred(image_SSC: Uint8Array) -> Uint8Array:
    blurred = cv2.GaussianBlur(image_SSC, (0, 0), image_SSC.shape[0] / 14)
    return np.asarray(blurred, np.uint8).reshape(image_SSC.shape)


# --- pointing --------------------------------------------------------------------------------------------------


def region_masks(image_SSC: Uint8Array) -> dict[str, BoolArray]:
    """The central lung field, the border and burned-in text of a film, each (S, S)."""
    side = image_SSC.shape[0]
    along = (np.arange(side) + 0.5) / side
    edge = np.minimum(along, 1 - along)
    return {
        "centre": _centre(side),
        "border": np.minimum(edge[None, :], edge[:, None]) < BORDER,
        "text": text_mask(image_SSC),
    }


def _centre(side: int) -> BoolArray:
    along = (np.arange(side) + 0.5) / side
    column, row, half_width, half_height = CENTRE
    return ((along[None, :] - column) / half_width) ** 2 + ((along[:, None] - row) / half_height) ** 2 <= 1


def text_mask(image_SSC: Uint8Array) -> BoolArray:
    """Where letters and markers are burned in (S, S): small, bright, sharp-edged and outside the central lung field.

    A simple detector: it finds printed letters and side markers, and misses faint ones.
    """
    grey = image_SSC.mean(axis=2).astype(np.float32)
    side = min(image_SSC.shape[0], TEXT_SIDE)
    grey = np.asarray(_reduced(grey, side).round(), np.uint8)
    stroke = cv2.getStructuringElement(cv2.MORPH_RECT, (max(3, side // 24),) * 2)
    raised = cv2.morphologyEx(grey, cv2.MORPH_TOPHAT, stroke)
    edges = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    candidates = ((raised > 70) & (grey > 120)).astype(np.uint8)
    count, label, facts, _ = cv2.connectedComponentsWithStats(candidates, connectivity=8)
    kept = np.zeros(grey.shape, dtype=np.uint8)
    for index in range(1, count):
        width, height, area = facts[index, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT, cv2.CC_STAT_AREA]]
        inside = label == index
        # Ribs are soft, catheters and the edges of the collimator are long and thin.
        compact = max(width, height) <= min(side / 7, 5 * min(width, height))
        if compact and area >= (side / 112) ** 2 and edges[inside].mean() > 90:
            kept[inside] = 1
    grown = cv2.dilate(kept, np.ones((max(3, side // 56),) * 2, np.uint8))
    found = cv2.resize(grown, image_SSC.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    return found & ~_centre(image_SSC.shape[0])


def shares(map_SS: FloatArray, masks: Mapping[str, BoolArray]) -> dict[str, tuple[float, float]]:
    """Region → (share of the attribution, share of the area); the first is NaN for a map that is 0 everywhere."""
    total = float(map_SS.sum())
    return {
        name: (float(map_SS[mask].sum()) / total if total > 0 else float("nan"), float(mask.mean()))
        for name, mask in masks.items()
    }
