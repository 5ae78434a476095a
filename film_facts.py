"""What an audit keeps of a film: a row of numbers and a 64×64 thumbnail; the pixels are dropped at once.

    scan = scan_films(paths, thumbnails_NHW)

Films are read in threads (decoding lets go of the interpreter), a few chunks ahead of whoever reads the results, so
that memory does not grow with their number. Legend: N films, H and W of a film or thumbnail.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from duplicates import SIDE
from errors import DataError
from preprocess import Pixels, PreprocessSpec, apply, decode
from runtime import progress

Uint8Array = npt.NDArray[np.uint8]
Facts = tuple[Any, ...]
"""One row of FACTS."""

FACTS = np.dtype(
    [
        ("readable", "?"),
        ("width", "i4"),
        ("height", "i4"),
        ("bytes", "i8"),  # of the file
        ("picture", "u8"),  # hash of size and thumbnail: equal for equal pixels, and seldom otherwise
        ("bits", "u1"),  # per sample, as decoded
        ("channels", "u1"),
        ("colour", "?"),  # channels that differ by more than coding noise
        ("quality", "u1"),  # of a JPEG, 1 to 100; 0 where it is none
        ("mean", "f4"),  # of the grey levels, 0 black to 1 white
        ("contrast", "f4"),  # their standard deviation, on the same scale
        ("border", "f4"),  # share of the area in edge rows and columns of one level
        ("marker", "f4"),  # share of the outer frame that is thin and far brighter than what surrounds it
    ]
)
EMPTY, TRUNCATED, NON_IMAGE, DAMAGED, MISSING = "empty", "truncated", "non_image", "damaged", "missing"
REFUSED = "refused"
"""Intact, and not a film this program reads: too large, several frames, another body part."""
ENOUGH = 112
"""Films are shrunk by whole factors while their shorter side stays at least this long; facts need no more pixels."""
FRAME = 0.2
"""Depth of the outer frame that burned-in text is sought in, as a share of the side."""
AROUND = 1 / 12
"""Side of the neighbourhood that burned-in text is compared with, as a share of the shorter side."""
FLAT = 8
"""Grey levels that a border of one level may vary by: JPEG rings at its inner edge."""
COLOUR = 8.0
"""Mean spread of the channels, in levels, from which a film counts as coloured; as `preprocess.has_colour`."""
STANDS_OUT = 70
"""Grey levels by which burned-in text is brighter than its neighbourhood; ribs and tubes stay below."""
CHUNK = 32
"""Films a thread works on before it hands in results."""

# Luminance table of the JPEG standard (ITU-T T.81, K.1), in the zigzag order of the file. Encoders scale it.
STANDARD_TABLE = np.array(
    [
        16, 11, 12, 14, 12, 10, 16, 14, 13, 14, 18, 17, 16, 19, 24, 40, 26, 24, 22, 22, 24, 49, 35, 37, 29, 40, 58, 51,
        61, 60, 57, 51, 56, 55, 64, 72, 92, 78, 64, 68, 87, 69, 55, 56, 80, 109, 81, 87, 95, 98, 103, 104, 103, 62, 77,
        113, 121, 112, 100, 120, 92, 101, 103, 99,
    ]
)  # fmt: skip


class Fault(NamedTuple):
    """Why a film could not be read."""

    kind: str
    """empty, truncated, non_image, damaged, refused or missing."""
    line: str
    """What the decoder says, with the path."""


@dataclass
class Scan:
    """What was read of the films, row by row."""

    facts: npt.NDArray[Any]
    """(N,) of FACTS; zeros where a film could not be read."""
    faults: dict[int, Fault] = field(default_factory=dict)
    """Row of each film that could not be read → why."""


def scan_films(paths: Sequence[str], thumbnails_NHW: Uint8Array, *, workers: int | None = None) -> Scan:
    """Read every film once: its facts, its thumbnail into `thumbnails_NHW` (N, 64, 64), or why it cannot be read."""
    scan = Scan(np.zeros(len(paths), FACTS))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the films are shared out among threads already
    try:
        chunks = _in_chunks(paths, thumbnails_NHW, workers or os.cpu_count() or 1)
        for start, facts, faults in progress(chunks, total=len(paths), label="reading films", step=CHUNK):
            scan.facts[start : start + len(facts)] = facts
            scan.faults |= {start + row: fault for row, fault in faults.items()}
    finally:
        cv2.setNumThreads(threads)
    return scan


def _in_chunks(
    paths: Sequence[str], thumbnails_NHW: Uint8Array, workers: int
) -> Iterator[tuple[int, npt.NDArray[Any], dict[int, Fault]]]:
    """(first row, facts, faults by place in the chunk), in order; a few chunks are read ahead and no more."""
    pool = ThreadPoolExecutor(workers)
    under_way: deque[tuple[int, Future[tuple[npt.NDArray[Any], dict[int, Fault]]]]] = deque()
    try:
        for start in range(0, len(paths), CHUNK):
            part = slice(start, start + CHUNK)
            under_way.append((start, pool.submit(_read_chunk, paths[part], thumbnails_NHW[part])))
            if len(under_way) >= 3 * workers:
                first, done = under_way.popleft()
                yield first, *done.result()
        for first, done in under_way:
            yield first, *done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_chunk(paths: Sequence[str], thumbnails_NHW: Uint8Array) -> tuple[npt.NDArray[Any], dict[int, Fault]]:
    facts, faults = np.zeros(len(paths), FACTS), {}
    for row, (path, thumbnail_HW) in enumerate(zip(paths, thumbnails_NHW)):
        try:
            data = Path(path).read_bytes()
            facts[row] = film_facts(data, decode(data), thumbnail_HW)
        except DataError as error:
            faults[row] = Fault(kind_of_fault(str(error)), str(error).replace("uploaded image", path, 1))
        except OSError as error:
            faults[row] = Fault(MISSING, f"{path}: cannot be read ({error.strerror})")
    facts["border"] = np.where(facts["readable"], border_shares(thumbnails_NHW), 0)
    return facts, faults


def kind_of_fault(line: str) -> str:
    """empty, truncated, non_image, damaged or refused, from the decoder's line."""
    if "file is empty" in line:
        return EMPTY
    if "not an image" in line or "that is no film" in line:
        return NON_IMAGE
    detail = line.partition("truncated image (")[2] or line
    if any(word in detail.lower() for word in ("truncated", "premature", "end of", "cut off")):
        return TRUNCATED
    return DAMAGED if "damaged" in line else REFUSED


def film_facts(data: bytes, pixels: Pixels, thumbnail_HW: Uint8Array) -> Facts:
    """One row of FACTS from a file's bytes and its pixels; writes the thumbnail (64, 64)."""
    grey = shrink(eight_bit_grey(pixels))
    height, width = pixels.shape[:2]
    thumbnail_HW[:] = thumbnail(grey)
    mean, deviation = cv2.meanStdDev(grey)
    return (
        True,
        width,
        height,
        len(data),
        short_hash(thumbnail_HW.tobytes() + b"%d %d" % (width, height)),
        8 * pixels.dtype.itemsize,
        1 if pixels.ndim == 2 else pixels.shape[2],
        pixels.ndim == 3 and channel_spread(pixels[::16, ::16]) > COLOUR,
        jpeg_quality(data),
        mean[0, 0] / 255,
        deviation[0, 0] / 255,
        0.0,  # the border is measured on all thumbnails of a chunk at once
        marker_share(grey),
    )


def thumbnail(grey_HW: Uint8Array) -> Uint8Array:
    """(64, 64): the mean of the pixels around each place; a tenth of the time of exact area weights."""
    height, width = grey_HW.shape
    window = (max(1, round(width / SIDE)), max(1, round(height / SIDE)))
    return cv2.resize(cv2.blur(grey_HW, window), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR).astype(np.uint8)


def channel_spread(pixels_HWC: Pixels) -> float:
    """Mean difference between the brightest and the darkest of three channels, in levels."""
    red, green, blue = pixels_HWC[..., 0], pixels_HWC[..., 1], pixels_HWC[..., 2]
    darkest, brightest = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    return float((brightest - darkest).mean())


def short_hash(data: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def eight_bit_grey(pixels: Pixels) -> Uint8Array:
    """(H, W) uint8 of pixels of any depth and colour, at their own size; deep films as `preprocess.apply` maps them."""
    if pixels.dtype != np.uint8:
        side = max(pixels.shape[:2])
        squashed = apply(PreprocessSpec(image_size=min(side, 2 * ENOUGH)), pixels)[..., 0]
        height, width = (max(1, round(squashed.shape[0] * length / side)) for length in pixels.shape[:2])
        return cv2.resize(squashed, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False) if pixels.ndim == 3 else pixels


def shrink(grey_HW: Uint8Array) -> Uint8Array:
    """Means of 2×2 pixels, again and again while `ENOUGH` is left; an odd row or column at the end is cut.

    Halving takes a third of the time of going to the final size at once, and exactness is nothing to facts.
    """
    height, width = grey_HW.shape
    while min(height, width) >= 2 * ENOUGH:
        height, width = height // 2, width // 2
        whole = grey_HW[: 2 * height, : 2 * width]
        grey_HW = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return grey_HW


def border_shares(films_NHW: Uint8Array) -> npt.NDArray[np.float64]:
    """Share of the area (N,) in edge rows and columns of one level, in [0, 1]; 1 for a blank film."""
    inside = np.ones(len(films_NHW))
    for along in (1, 2):
        varied = films_NHW.max(axis=along) - films_NHW.min(axis=along) > FLAT
        length = varied.shape[1]
        flat_ends = varied.argmax(axis=1) + varied[:, ::-1].argmax(axis=1)
        inside *= np.where(varied.any(axis=1), (length - flat_ends) / length, 0)
    return 1 - inside


def marker_share(grey_HW: Uint8Array) -> float:
    """Share of the film that lies in its outer frame and is far brighter than what surrounds it, as text is; [0, 1]."""
    height, width = grey_HW.shape
    around = max(3, round(min(height, width) * AROUND)) | 1
    raised = cv2.subtract(grey_HW, cv2.blur(grey_HW, (around, around)))  # saturates at 0
    top, left = round(height * FRAME), round(width * FRAME)
    raised[top : height - top, left : width - left] = 0
    return cv2.countNonZero(cv2.threshold(raised, STANDS_OUT, 255, cv2.THRESH_TOZERO)[1]) / raised.size


def jpeg_quality(data: bytes) -> int:
    """The encoder's quality setting, 1 to 100, as its luminance table tells; 0 for anything but a JPEG."""
    if data[:2] != b"\xff\xd8":
        return 0
    place = data.find(b"\xff\xdb", 2, 4096)
    return _quality_of_table(data[place + 4 : place + 69]) if place > 0 else 0


@lru_cache(maxsize=1024)
def _quality_of_table(segment: bytes) -> int:
    if len(segment) < 65 or segment[0] != 0:  # 0: table number 0, one byte an entry
        return 0
    table = np.frombuffer(segment[1:], np.uint8)
    if table.max() == 1:
        return 100
    scale = 100 * float((table / STANDARD_TABLE).mean())
    return int(np.clip(round(5000 / scale if scale > 100 else (200 - scale) / 2), 1, 100))


def same_pixels(first: str, second: str) -> bool:
    """Whether two files hold the same bytes, or the same pixels; a grey film stored as RGB is the grey film."""
    try:
        if filecmp.cmp(first, second, shallow=False):
            return True
        a, b = decode(first), decode(second)
    except (DataError, OSError):
        return False
    if a.shape != b.shape and a.dtype == b.dtype == np.uint8:
        a, b = eight_bit_grey(a), eight_bit_grey(b)
    return a.dtype == b.dtype and np.array_equal(a, b)
