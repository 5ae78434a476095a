"""Arrays computed once and kept on disk: keyed by what they were made from, checked when opened, built under a lock.

A file is written beside and renamed when whole; its facts (shape, type, CRC) lie in a JSON file of the same name.
Damaged, truncated or half-written, it is built again. Two processes that want the same array build it once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from errors import DataError
from runtime import atomic_write, log, write_text

Array = npt.NDArray[Any]


def default_folder(wanted: str | None) -> Path:
    """`data.cache_dir`, else $MEDIMG_CACHE_DIR, else ~/.cache/medimg."""
    return Path(wanted or os.environ.get("MEDIMG_CACHE_DIR") or Path.home() / ".cache" / "medimg")


def key_of(parts: Iterable[str]) -> str:
    """A short hash of everything the array depends on."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


class Writer:
    """Appends rows to the file under construction."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.crc = 0

    def __call__(self, rows: Array) -> None:
        """Append one row or several, C-contiguous and of the array's type."""
        data = np.ascontiguousarray(rows).data
        self.crc = zlib.crc32(data, self.crc)
        self._stream.write(data)


def open_or_build(
    path: Path, *, shape: tuple[int, ...], dtype: Any, build: Callable[[Writer], dict[str, Any]], what: str, remedy: str
) -> dict[str, Any]:
    """The facts of the whole array at `path`, built first when it is absent or damaged.

    `build` writes all rows in order and returns facts of its own. DataError (with `remedy`) when the disk would not
    hold the array or refuses it.
    """
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            facts = checked_facts(path)
            if facts is None:
                _require_space(path.parent, shape, dtype, what=what, remedy=remedy)
                facts = _build(path, shape=shape, dtype=dtype, build=build)
    except OSError as error:
        raise DataError(f"{path.parent}: the {what} cannot be written ({error.strerror}); {remedy}") from None
    return facts


def size_of(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _require_space(folder: Path, shape: tuple[int, ...], dtype: Any, *, what: str, remedy: str) -> None:
    size = size_of(shape, dtype)
    if shutil.disk_usage(folder).free < size * 1.05:
        raise DataError(f"{folder}: the {what} needs {size / 2**30:.1f} GiB, more than is free there; {remedy}")


def _build(
    path: Path, *, shape: tuple[int, ...], dtype: Any, build: Callable[[Writer], dict[str, Any]]
) -> dict[str, Any]:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    path.with_suffix(".json").unlink(missing_ok=True)
    with atomic_write(path) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        writer = Writer(stream)
        own = build(writer)
    facts = {"shape": list(shape), "crc32": writer.crc, **own}
    write_text(path.with_suffix(".json"), json.dumps(facts))
    return facts


def checked_facts(path: Path) -> dict[str, Any] | None:
    """The facts beside a whole and undamaged array, else None."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        array = np.load(path, mmap_mode="r")
        if list(array.shape) == facts["shape"] and _crc(array) == facts["crc32"]:
            return facts
        log.warning("%s: damaged; building it again", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s: damaged; building it again", path)
    return None


def _crc(array: Array) -> int:
    crc = 0
    for start in range(0, len(array), 256):
        crc = zlib.crc32(np.ascontiguousarray(array[start : start + 256]).data, crc)
    return crc
