"""Versioned checkpoints: a dict of tensors and plain values, written beside and renamed, read with weights_only.

Knows no model. A checkpoint that cannot be written leaves the previous one untouched; one that is truncated, newer
or not made of tensors and plain values is refused with one line.
"""

from __future__ import annotations

import errno
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from errors import CheckpointError, first_line
from runtime import atomic_write

FORMAT_VERSION = 1
REQUIRED: dict[str, type | tuple[type, ...]] = {
    "model_state_dict": dict,
    "config": dict,
    "classes": list,
    "preprocess": dict,
    "temperature": (int, float),
    "operating_point": dict,
    "provenance": dict,
    "seen_films": torch.Tensor,
}
EPOCH_FILE = re.compile(r"^checkpoint_epoch_(\d+)\.pth$")
INTERRUPTED = "checkpoint_interrupted.pth"
BEST = "best_model.pth"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (plus `format_version`) to `path` atomically; CheckpointError when the disk refuses it.

    Serialised in memory first: a full disk then meets one plain write, whose error names the reason.
    """
    assert not REQUIRED.keys() - content.keys(), f"checkpoint lacks {REQUIRED.keys() - content.keys()}"
    buffer = io.BytesIO()
    torch.save({**content, "format_version": FORMAT_VERSION}, buffer)
    try:
        with atomic_write(path) as stream:
            stream.write(buffer.getbuffer())
    except OSError as error:
        size = buffer.getbuffer().nbytes / 2**20
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
        raise CheckpointError(
            f"{path}: cannot write {size:.0f} MiB: {reason}; the previous checkpoint stays; free space, then "
            "go on with --resume"
        ) from None


def load(path: str | Path, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint; CheckpointError for a missing, truncated, foreign, newer or unsafe file."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a checkpoint file in it, for example {path / BEST}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; train one first (python main.py train)")
    try:
        _require_whole(path)
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = first_line(error).split(". ")[0]
        raise CheckpointError(f"{path}: truncated or damaged checkpoint ({reason}); use an earlier one") from None
    except Exception as error:  # of bytes that are no pickle the unpickler raises whatever it trips over
        if isinstance(error, pickle.UnpicklingError) and re.search("Unsupported|GLOBAL|weights_only", str(error), re.I):
            raise CheckpointError(
                f"{path}: refused: it holds objects other than tensors and plain values, which could run code"
            ) from None
        raise CheckpointError(f"{path}: not a checkpoint, or damaged; use another one") from None
    return _checked(path, content)


def _require_whole(path: Path) -> None:
    """BadZipFile when a stored tensor no longer matches its checksum, which torch.load does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")


def _checked(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or "format_version" not in content:
        raise CheckpointError(f"{path}: not a checkpoint of this program (no format_version); as weights use --weights")
    version = content["format_version"]
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {version!r} is newer than this program reads ({FORMAT_VERSION}); update the program"
        )
    if absent := [name for name in REQUIRED if name not in content]:
        raise CheckpointError(f"{path}: incomplete checkpoint: no {', '.join(absent)}")
    for name, kind in REQUIRED.items():
        if not isinstance(content[name], kind):
            raise CheckpointError(f"{path}: damaged checkpoint: {name} is {type(content[name]).__name__}")
    return content


def epoch_files(folder: Path) -> list[tuple[int, Path]]:
    """(epoch, path) of every checkpoint_epoch_<N>.pth in `folder`, oldest first."""
    found = [(int(match.group(1)), item) for item in folder.glob("*.pth") if (match := EPOCH_FILE.match(item.name))]
    return sorted(found)


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest `count` epoch checkpoints."""
    for _, path in epoch_files(folder)[:-count]:
        path.unlink(missing_ok=True)


def newest(folder: Path) -> Path:
    """The checkpoint a resume of `folder` starts from: the one saved on interruption, else the last epoch's."""
    if (folder / INTERRUPTED).exists():
        return folder / INTERRUPTED
    files = epoch_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: holds no checkpoint_epoch_<N>.pth to resume from")
    return files[-1][1]
