"""What an audit keeps of a film: a row of numbers and a 64×64 thumbnail; the pixels are dropped at once.

    scan = scan_films(paths, thumbnails_NHW)

Films are read in threads (decoding lets go of the interpreter) or, where they are many, in processes, a few chunks
ahead of whoever reads the results, so that memory does not grow with their number. Legend: N films, H and W of a film
or thumbnail.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from duplicates import SIDE
from errors import DataError
from preprocess import MAX_PIXELS, Pixels, PreprocessSpec, apply, decode
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
APART = 16
"""Pixels from one to the next that are looked at for colour."""
STANDS_OUT = 70
"""Grey levels by which burned-in text is brighter than its neighbourhood; ribs and tubes stay below."""
CHUNK = 32
"""Films a worker reads before it hands in results."""
PROCESSES_FROM = 10_000
"""From this many films on the workers are processes: small films leave threads waiting for one another's Python, and
what that costs on so many is more than half a second of starting an interpreter for each."""

# Luminance table of the JPEG standard (ITU-T T.81, K.1), in the zigzag order of the file. Encoders scale it.
STANDARD_TABLE = np.array(
    [
        16, 11, 12, 14, 12, 10, 16, 14, 13, 14, 18, 17, 16, 19, 24, 40, 26, 24, 22, 22, 24, 49, 35, 37, 29, 40, 58, 51,
        61, 60, 57, 51, 56, 55, 64, 72, 92, 78, 64, 68, 87, 69, 55, 56, 80, 109, 81, 87, 95, 98, 103, 104, 103, 62, 77,
        113, 121, 112, 100, 120, 92, 101, 103, 99,
    ]
)  # fmt: skip


class Picture(NamedTuple):
    """What is looked at of a film."""

    grey_HW: Uint8Array
    """At its own size, but films deeper than 8 bits are shrunk."""
    width: int
    height: int
    bits: int
    channels: int
    colour: bool


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
    cv2.setNumThreads(1)  # the films are shared out among workers already
    try:
        chunks = _in_chunks(paths, workers or os.cpu_count() or 1)
        for start, part in progress(chunks, total=len(paths), label="reading films", step=CHUNK):
            rows = slice(start, start + len(part.facts))
            scan.facts[rows], thumbnails_NHW[rows] = part.facts, part.thumbnails_NHW
            scan.faults |= {start + row: fault for row, fault in part.faults.items()}
    finally:
        cv2.setNumThreads(threads)
    return scan


class Part(NamedTuple):
    """What was read of a chunk of films."""

    facts: npt.NDArray[Any]
    thumbnails_NHW: Uint8Array
    faults: dict[int, Fault]
    """By place in the chunk."""


def _in_chunks(paths: Sequence[str], workers: int) -> Iterator[tuple[int, Part]]:
    """(first row, what was read), in order; a few chunks are read ahead and no more."""
    pool = _workers(len(paths), workers)
    under_way: deque[tuple[int, Future[Part]]] = deque()
    try:
        for start in range(0, len(paths), CHUNK):
            under_way.append((start, pool.submit(_read_chunk, paths[start : start + CHUNK])))
            if len(under_way) >= 3 * workers:
                first, done = under_way.popleft()
                yield first, done.result()
        for first, done in under_way:
            yield first, done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _workers(films: int, workers: int) -> Executor:
    """Threads, or processes that start as fresh interpreters: a fork would inherit locks of this process' threads."""
    if films < PROCESSES_FROM:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one answers it
    cv2.setNumThreads(1)


def _read_chunk(paths: Sequence[str]) -> Part:
    facts, faults = np.zeros(len(paths), FACTS), {}
    thumbnails_NHW = np.zeros((len(paths), SIDE, SIDE), np.uint8)
    for row, path in enumerate(paths):
        try:
            facts[row] = film_facts(Path(path).read_bytes(), thumbnails_NHW[row])
        except DataError as error:
            faults[row] = Fault(kind_of_fault(str(error)), str(error).replace("uploaded image", path, 1))
        except OSError as error:
            faults[row] = Fault(MISSING, f"{path}: cannot be read ({error.strerror})")
    facts["border"] = np.where(facts["readable"], border_shares(thumbnails_NHW), 0)
    return Part(facts, thumbnails_NHW, faults)


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


def film_facts(data: bytes, thumbnail_HW: Uint8Array) -> Facts:
    """One row of FACTS from a file's bytes; writes the thumbnail (64, 64). DataError as `preprocess.decode`."""
    film = _plain_jpeg(data) or _picture(decode(data))
    grey = shrink(film.grey_HW)
    thumbnail_HW[:] = thumbnail(grey)
    mean, deviation = cv2.meanStdDev(grey)
    return (
        True,
        film.width,
        film.height,
        len(data),
        short_hash(thumbnail_HW.tobytes() + b"%d %d" % (film.width, film.height)),
        film.bits,
        film.channels,
        film.colour,
        jpeg_quality(data),
        mean[0, 0] / 255,
        deviation[0, 0] / 255,
        0.0,  # the border is measured on all thumbnails of a chunk at once
        marker_share(grey),
    )


def _picture(pixels: Pixels) -> Picture:
    height, width = pixels.shape[:2]
    if pixels.dtype != np.uint8:
        return Picture(eight_bit_grey(pixels), width, height, 8 * pixels.dtype.itemsize, 1, False)
    return _eight_bit_picture(Image.fromarray(pixels))


def _eight_bit_picture(image: Image.Image) -> Picture:
    """Of grey or RGB pixels."""
    width, height = image.size
    if image.mode == "L":
        return Picture(np.asarray(image), width, height, 8, 1, False)
    few = (-(-width // APART), -(-height // APART))
    sample_HWC = np.asarray(image.resize(few, Image.Resampling.NEAREST))
    if (sample_HWC == sample_HWC[..., :1]).all():
        # Equal channels need no weighing, which takes three times as long as taking one.
        return Picture(np.asarray(image.getchannel("G")), width, height, 8, 3, False)
    colour = channel_spread(sample_HWC) > COLOUR
    return Picture(np.asarray(image.convert("L")), width, height, 8, 3, colour)


def _plain_jpeg(data: bytes) -> Picture | None:
    """An upright JPEG, as `decode` would have it; None for other files and for faults, which `decode` names.

    Its colours are never laid out as an array, which takes half as long as decoding.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            if image.width * image.height > MAX_PIXELS or image.mode not in ("L", "RGB") or not upright:
                return None
            return _eight_bit_picture(image)
    except Exception:  # whatever it is, decode meets it again
        return None


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
    return _eight_bit_picture(Image.fromarray(pixels)).grey_HW if pixels.ndim == 3 else pixels


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
        if Path(first).samefile(second) or filecmp.cmp(first, second, shallow=False):
            return True
        a, b = decode(first), decode(second)
    except (DataError, OSError):
        return False
    if a.shape[:2] != b.shape[:2] or a.dtype != b.dtype:
        return False
    if a.ndim != b.ndim:
        a, b = np.atleast_3d(a), np.atleast_3d(b)
    return bool((a == b).all())
