"""Which films are the same picture: candidates by hashing, each verified by aligning the two.

    pairs = near_pairs(thumbnails_NHW)

Chest films are all alike, so the hash looks at what makes a film differ from the other films of the set (its
principal components), and a candidate counts only when its fine structure agrees after alignment. Never compares
all pairs: the work grows with the films and with how many really are alike. Legend: N films, H and W of a thumbnail.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

Uint8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

SIDE = 64
"""Of a thumbnail, in pixels: fine enough that ribs of two films of one patient disagree, 4 KB a film."""
COARSE = 32
"""Side the descriptors are computed at."""
FREQUENCIES = 10
"""Cosine frequencies per axis of a descriptor."""
COMPONENTS = 64
"""Principal components kept of a descriptor; the sign of each is one bit of the hash."""
FILMS_PER_COMPONENT = 5
"""Of fewer films fewer components are kept: the last would only describe how single films differ."""
KEYED = 32
"""Of these, the largest are used as keys: their bits flip least."""
TABLES = 6
"""Hash tables, each keyed by its own bits: one bit that flips does not lose a pair."""
CROP = 0.02
"""Share of a side that a copy may have lost; every film is also looked up as if it had lost it."""
BRIGHTER = 1.25
"""Every film is also looked up as if it had been brightened by this much, whites lost; that moves descriptors."""
BITS = 20
"""Most bits of 64 in which candidates differ; copies differ in 3 on average, unrelated films in 32."""
REACH = 3.75
"""Largest distance of candidates, in standard deviations between films; unrelated films lie near √(2·64) = 11."""
VARIANCE_FLOOR = 0.001
"""Share of the largest component's variance below which a component is not stretched: there copies differ too."""
SAME = 0.85
"""Correlation of the fine structure from which two aligned films are one picture. Two exposures of one patient in one
position reach 0.83 at most among 6,200 films looked at; copies that were changed fall to 0.87 at worst."""
MAX_BUCKET = 64
"""Films of one key that a film is compared with; only sets of near-identical films have more."""
UNEXPLAINED = (0.028, 0.07)
"""Share of a film's contrast that the grey levels of its copy may leave unexplained (smoothed, after alignment): when
the fine structure agrees to 0.93 or less, and when to 0.95 or more. Copies leave up to 0.025, or 0.066 where they were
cropped and alignment is not perfect; different films of one patient leave 0.14, drawn films that are alike 0.03."""
STRETCH, TURN = 0.06, 0.02
"""Most that a copy may be stretched, and its rows and columns leaned; 2 % cropped at each side stretch it by 4 %."""
CHUNK = 2048
"""Films worked on at a time."""
POPCOUNT = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)


@dataclass(frozen=True)
class Pair:
    """Two films, by row, that show the same picture."""

    first: int
    second: int
    correlation: float
    """Of the fine structure after alignment, in [SAME, 1]."""


def near_pairs(thumbnails_NHW: Uint8Array, *, workers: int | None = None) -> list[Pair]:
    """Pairs of rows of `thumbnails_NHW` (N, 64, 64) that show one picture, first < second, sorted.

    Finds copies that were re-encoded, resized, brightened or darkened, or lost up to 2 % at any side. Films without
    structure (blank) belong to no pair. Deterministic.
    """
    # One thread of the matrix library for each of ours: its own would wait for a core and take one while they do.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        candidates = candidate_pairs(thumbnails_NHW, pool)
        scores = pool.map(lambda pair: same_picture(thumbnails_NHW[pair[0]], thumbnails_NHW[pair[1]]), candidates)
        return [Pair(int(i), int(j), score) for (i, j), score in zip(candidates, scores) if score >= SAME]


# --- candidates ------------------------------------------------------------------------------------------------


class Points(NamedTuple):
    """Films as points of the whitened space, with the signs of their coordinates packed."""

    place: FloatArray
    """(N, components) float32."""
    bits: npt.NDArray[np.uint64]
    """(N,)"""
    keys: IntArray
    """(N, TABLES): of each table some of the bits as one number."""


@dataclass(frozen=True)
class Space:
    """What makes a film of this set differ from the others: directions of variance 1, and the bits tables go by."""

    centre: FloatArray
    """(D,)"""
    scaling: FloatArray
    """(D, components)"""
    bits_of_keys: FloatArray
    """(components, TABLES): what each bit adds to each table's key; sums stay below 2^24, where float32 is exact."""

    def points(self, descriptors: FloatArray) -> Points:
        """Films by their descriptors (N, D)."""
        place = (descriptors - self.centre) @ self.scaling
        signs = place > 0
        packed = np.zeros((len(place), COMPONENTS // 8), np.uint8)
        packed[:, : -(-signs.shape[1] // 8)] = np.packbits(signs, axis=1)
        keys = signs.astype(np.float32) @ self.bits_of_keys
        return Points(place, packed.view(np.uint64).ravel(), keys.astype(np.int64))


class Table(NamedTuple):
    """Which films have which key."""

    start: IntArray
    """Key → where its films begin in `films`."""
    films: IntArray


def candidate_pairs(thumbnails_NHW: Uint8Array, pool: Executor) -> IntArray:
    """Pairs (P, 2) worth aligning, first < second, sorted; films of constant grey are left out."""
    coarse = _coarse(thumbnails_NHW)
    rows = np.flatnonzero(_has_structure(coarse))
    if len(rows) < 2:
        return np.empty((0, 2), np.int64)
    coarse = coarse[rows]
    plain = _cosine_map(0.0, 0.0)
    starts = range(0, len(rows), CHUNK)
    own = np.concatenate(list(pool.map(lambda start: next(_descriptors(coarse[start : start + CHUNK], plain)), starts)))
    space = _space(own)
    base = space.points(own)
    tables = [_table(keys) for keys in base.keys.T]
    views = np.concatenate([_cosine_map(low, high) for low in (0.0, CROP) for high in (0.0, CROP)], axis=1)

    def look_up(start: int) -> IntArray:
        films = coarse[start : start + CHUNK]
        overexposed = cv2.convertScaleAbs(films, alpha=BRIGHTER, beta=0).astype(np.uint8)  # saturates at 255
        looks = itertools.chain(_descriptors(films, views), _descriptors(overexposed, plain))
        return np.unique(np.concatenate([_look_up(space.points(look), start, base, tables) for look in looks]))

    codes = np.unique(np.concatenate(list(pool.map(look_up, starts))))
    return rows[np.column_stack(np.divmod(codes, len(rows)))]


def _coarse(thumbnails_NHW: Uint8Array) -> Uint8Array:
    """(N, COARSE²): means of 2×2 pixels."""
    coarse = np.empty((len(thumbnails_NHW), COARSE * COARSE), np.uint8)
    for row, film in enumerate(thumbnails_NHW):
        coarse[row] = cv2.resize(film, (COARSE, COARSE), interpolation=cv2.INTER_AREA).ravel()
    return coarse


def _has_structure(coarse: Uint8Array) -> npt.NDArray[np.bool_]:
    return np.concatenate(
        [np.empty(0, np.bool_)]
        + [coarse[start : start + CHUNK].std(axis=1, dtype=np.float32) > 1 for start in range(0, len(coarse), CHUNK)]
    )


def _cosine_map(cut_low: float, cut_high: float) -> FloatArray:
    """(COARSE, FREQUENCIES): cosine transform of a line without its cut ends, each pixel held constant.

    Integrals over the part of a pixel that is left: interpolating a stretched line would blur it, and blur is not
    what cropping does.
    """
    edge = (np.arange(COARSE + 1) / COARSE - cut_low) / (1 - cut_low - cut_high)
    edge = np.clip(edge, 0, 1)[:, None]
    wave = np.pi * np.arange(1, FREQUENCIES)
    integral = np.concatenate([edge, np.sin(wave * edge) / wave], axis=1)
    return np.diff(integral, axis=0).astype(np.float32)


def _descriptors(coarse: Uint8Array, maps: FloatArray) -> Iterator[FloatArray]:
    """Of films, and of the same films cropped, (N, D) of unit length each: the cosine coefficients but the mean, which
    brightness and contrast do not change.

    `maps` (COARSE, n · FREQUENCIES) are n cosine maps; each pair of them, one down and one across, is a view.
    """
    films, width = len(coarse), maps.shape[1]
    across = (coarse.reshape(-1, COARSE).astype(np.float32) @ maps).reshape(films, COARSE, width)
    both = (across.transpose(0, 2, 1).reshape(-1, COARSE) @ maps).reshape(films, width, width)
    parts = [slice(start, start + FREQUENCIES) for start in range(0, width, FREQUENCIES)]
    for left_right, top_bottom in itertools.product(parts, parts):
        values = both[:, left_right, top_bottom].reshape(films, -1)[:, 1:]
        yield values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-6)


def _space(descriptors: FloatArray) -> Space:
    """The principal components of `descriptors` (N, D), largest first."""
    variance, axes = np.linalg.eigh(np.cov(descriptors, rowvar=False).astype(np.float64))
    kept = int(np.clip(len(descriptors) // FILMS_PER_COMPONENT, 6, COMPONENTS))
    largest = slice(None, -kept - 1, -1)
    spread = np.sqrt(np.maximum(variance[largest], VARIANCE_FLOOR * max(variance[-1], 1e-12)))
    scaling = (axes[:, largest] / spread).astype(np.float32)
    return Space(descriptors.mean(axis=0), scaling, _bits_of_keys(kept, len(descriptors)))


def _bits_of_keys(components: int, films: int) -> FloatArray:
    """(components, TABLES), see Space: about as many keys as films, so that a bucket holds a few."""
    length = int(np.clip(round(np.log2(films)) - 1, 1, min(22, components // 2)))
    generator = np.random.default_rng(0)
    weights = np.zeros((components, TABLES), np.float32)
    for table in range(TABLES):
        weights[generator.permutation(min(components, KEYED))[:length], table] = 2.0 ** np.arange(length)
    return weights


def _table(keys: IntArray) -> Table:
    counts = np.bincount(keys)
    return Table(np.concatenate([[0], np.cumsum(counts)]), np.argsort(keys, kind="stable"))


def _look_up(looked_up: Points, offset: int, base: Points, tables: Sequence[Table]) -> IntArray:
    """Codes first · N + second of the films that lie within reach of a looked-up one and share a key with it.

    `looked_up` are films `offset` and following.
    """
    found = [np.empty(0, np.int64)]
    for keys, table in zip(looked_up.keys.T, tables):
        known = np.minimum(keys, len(table.start) - 2)
        start = table.start[known]
        count = np.where(keys == known, np.minimum(table.start[known + 1] - start, MAX_BUCKET), 0)
        left = np.repeat(np.arange(len(keys)), count)
        place_in_bucket = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
        right = table.films[np.repeat(start, count) + place_in_bucket]
        alike = (_differing_bits(looked_up.bits[left], base.bits[right]) <= BITS) & (left + offset != right)
        left, right = left[alike], right[alike]
        near = np.square(looked_up.place[left] - base.place[right]).sum(axis=1) < REACH**2
        left, right = left[near] + offset, right[near]
        found.append(np.minimum(left, right) * len(base.bits) + np.maximum(left, right))
    return np.unique(np.concatenate(found))


def _differing_bits(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]) -> Uint8Array:
    counts = POPCOUNT[(first ^ second).view(np.uint16).reshape(-1, 4)]
    return counts[:, 0] + counts[:, 1] + counts[:, 2] + counts[:, 3]


# --- verification ----------------------------------------------------------------------------------------------


def same_picture(first_HW: Uint8Array, second_HW: Uint8Array) -> float:
    """Correlation in [-1, 1] of the fine structure of two thumbnails, the second aligned to the first; 0 if not one.

    They are one picture when, besides, nothing but grey levels tells them apart: each grey level of one stands for one
    of the other, up to `UNEXPLAINED`.
    """
    first, second = first_HW.astype(np.float32), second_HW.astype(np.float32)
    best = 0.0
    for moved in _alignments(first, second):
        correlation = _correlation(_fine_structure(first), _fine_structure(moved))
        allowed = float(np.interp(correlation, (0.93, 0.95), UNEXPLAINED))
        if correlation > max(best, SAME) and _unexplained(first, moved) < allowed:
            best = correlation
        if best > 0.98:
            break
    return best


def _alignments(first: FloatArray, second: FloatArray) -> Iterator[FloatArray]:
    """`second` as it is, and moved onto `first` where that takes no more than cropping does.

    By the enhanced correlation coefficient (Evangelidis & Psarakis 2008), affine.
    """
    yield second
    place: Any = np.eye(2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)
    try:
        _, place = cv2.findTransformECC(first, second, place, cv2.MOTION_AFFINE, stop, None, 5)  # type: ignore[call-overload]
    except cv2.error:  # no convergence: the two have nothing in common
        return
    if (np.abs(place[:, :2] - np.eye(2)) <= [[STRETCH, TURN], [TURN, STRETCH]]).all():
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        moved: Any = cv2.warpAffine(second, place, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        yield moved


def _unexplained(first: FloatArray, second: FloatArray) -> float:
    """Share of a film's contrast that the other's grey levels do not explain, in whichever direction explains more.

    Brightening saturates: the brightened film follows from the other, and not the other way round.
    """
    inner = slice(3, -3)
    a, b = first[inner, inner], second[inner, inner]
    return min(fit(x, y) for x, y in ((a, b), (b, a)) for fit in (_left_by_steps, _left_by_curve))


def _left_by_steps(x: FloatArray, y: FloatArray) -> float:
    """What is left of y after the mean of y at each level of x: right for curves with corners."""
    edges = np.unique(np.quantile(x, np.arange(1, 129) / 129))
    step = np.digitize(x.ravel(), edges)
    count = np.bincount(step)
    used = count > 0
    middle, level = (np.bincount(step, weights=values.ravel())[used] / count[used] for values in (x, y))
    return _smooth_share(y - np.interp(x.ravel(), middle, level).reshape(y.shape), y)


def _left_by_curve(x: FloatArray, y: FloatArray) -> float:
    """What is left of y after a cubic in x: right where few pixels have a level."""
    powers = (x.ravel() - 128) / 128
    basis = np.stack([powers**degree for degree in range(4)], axis=1)
    weights, *_ = np.linalg.lstsq(basis, y.ravel(), rcond=None)
    return _smooth_share(y - (basis @ weights).reshape(y.shape), y)


def _smooth_share(rest: FloatArray, whole: FloatArray) -> float:
    """Spread of `rest` as a share of that of `whole`; smoothed, for coding noise is no difference."""
    spread = float(whole.std())
    return float(cv2.GaussianBlur(rest.astype(np.float32), (0, 0), 1.5).std()) / spread if spread > 0 else 1.0


def _fine_structure(film_HW: FloatArray) -> FloatArray:
    """Detail finer than about 4 thumbnail pixels at even contrast: exposure drops out, and so does the common shape."""
    detail = film_HW - cv2.GaussianBlur(film_HW, (0, 0), 2)
    contrast = np.sqrt(cv2.GaussianBlur(detail * detail, (0, 0), 4))
    # 3 levels: below that it is coding noise, which must not be stretched.
    return (detail / (contrast + 3))[4:-4, 4:-4]


def _correlation(a: FloatArray, b: FloatArray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum()) / size if size > 1e-6 else 0.0


# --- groups ----------------------------------------------------------------------------------------------------


def connected(pairs: Iterable[Sequence[int]]) -> list[list[int]]:
    """Groups of items that pairs join, directly or through others; each sorted, in order of their first item."""
    leader: dict[int, int] = {}

    def find(item: int) -> int:
        leader.setdefault(item, item)
        while leader[item] != item:
            leader[item] = leader[leader[item]]
            item = leader[item]
        return item

    for first, second in pairs:
        low, high = sorted((find(first), find(second)))
        leader[high] = low
    groups: dict[int, list[int]] = {}
    for item in sorted(leader):
        groups.setdefault(find(item), []).append(item)
    return list(groups.values())


def same_key(keys: Sequence[Any]) -> Iterator[list[int]]:
    """Groups of two or more positions whose keys are equal, in order of their first position."""
    order = sorted(range(len(keys)), key=lambda position: (keys[position], position))
    groups = (list(group) for _, group in itertools.groupby(order, key=lambda position: keys[position]))
    yield from sorted(group for group in groups if len(group) > 1)
