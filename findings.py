"""Several findings a film: cells like `effusion|mass`, and the whole number that a film's findings travel as.

    codes = encoded(["effusion|mass", "No Finding"], ["effusion", "mass"])        # [3, 0]
    matrix(codes, 2)                                                              # [[1, 1], [0, 0]]

Bit k of the number stands for finding k: so findings pass splits, loaders and caches as a class label does, and become
a row of 0 and 1 where a loss or a metric asks. Legend: N films, C findings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

SEPARATOR = "|"
NONE = "No Finding"
WORDS_FOR_NONE = frozenset({"", "none", "no finding", "no_finding", "normal"})
"""In small letters; a film so labelled has none of the findings."""
MOST = 62
"""Findings that fit into one int64."""


def parts_of(cell: str) -> list[str]:
    """What a cell names, words for no finding included."""
    return [part.strip() for part in cell.split(SEPARATOR)]


def named(cell: str) -> list[str]:
    """The findings a cell names, in its order; [] for none."""
    return [part for part in parts_of(cell) if part.lower() not in WORDS_FOR_NONE]


def is_contradictory(cell: str) -> bool:
    """Whether a cell names a finding and says in words that there is none."""
    return bool(named(cell)) and any(part and part.lower() in WORDS_FOR_NONE for part in parts_of(cell))


def encoded(cells: Iterable[str], names: Sequence[str]) -> IntArray:
    """(N,) findings of each cell as bits in the order of `names`; others are not counted."""
    bit = {name: 1 << k for k, name in enumerate(names)}
    return np.array([sum(bit.get(name, 0) for name in set(named(cell))) for cell in cells], dtype=np.int64)


def matrix(codes_N: IntArray, count: int) -> IntArray:
    """(N, C) 1 where a film has the finding."""
    return (np.asarray(codes_N, dtype=np.int64)[:, None] >> np.arange(count)) & 1


def written(present_C: Iterable[int | bool], names: Sequence[str]) -> str:
    """A cell for a row of 0 and 1: `effusion|mass`, or `No Finding`."""
    return SEPARATOR.join(name for name, present in zip(names, present_C) if present) or NONE


def strata(codes_N: IntArray, count: int, *, least: int) -> IntArray:
    """(N,) the rarest finding each film has, or C for none: what a split is stratified by.

    Strata of fewer than `least` films join those without a finding, and where these are too few, all are one.
    """
    present_NC = matrix(codes_N, count)
    rarest = np.argsort(present_NC.sum(axis=0), kind="stable")
    stratum_N = np.full(len(present_NC), count, dtype=np.int64)
    for k in rarest[::-1]:
        stratum_N[present_NC[:, k] == 1] = k
    sizes = np.bincount(stratum_N, minlength=count + 1)
    stratum_N[sizes[stratum_N] < least] = count
    return np.zeros_like(stratum_N) if 0 < (stratum_N == count).sum() < least else stratum_N


def probabilities(
    logits_BC: FloatArray, points: Mapping[str, Mapping[str, Any]], names: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Calibrated probability (B, C) of each finding by itself: sigmoid of slope · logit + intercept (Platt 1999)."""
    slope_C = np.array([points[name]["slope"] for name in names], dtype=np.float64)
    intercept_C = np.array([points[name]["intercept"] for name in names], dtype=np.float64)
    # The sigmoid by tanh, which does not overflow.
    return 0.5 * (1 + np.tanh(0.5 * (logits_BC.astype(np.float64) * slope_C + intercept_C)))


def thresholds(points: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> npt.NDArray[np.float64]:
    """(C,) probability from which each finding is called."""
    return np.array([points[name]["threshold"] for name in names], dtype=np.float64)


def leading(probabilities_BC: FloatArray, thresholds_C: FloatArray) -> IntArray:
    """(B,) the finding that stands highest above its threshold, or least below it, in log odds."""
    p_BC, t_C = np.clip(probabilities_BC, 1e-9, 1 - 1e-9), np.clip(thresholds_C, 1e-9, 1 - 1e-9)
    return (np.log(p_BC / (1 - p_BC)) - np.log(t_C / (1 - t_C))).argmax(axis=1)


def confidence(probabilities_C: FloatArray, called_C: npt.NDArray[np.bool_]) -> float:
    """Probability of the likeliest finding called; that the likeliest of all is absent where none is called."""
    return float(probabilities_C[called_C].max() if called_C.any() else 1 - probabilities_C.max())
