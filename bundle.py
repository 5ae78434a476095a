"""The folder `optimize` writes: the chosen network as ONNX, and all that is needed to predict with it.

model.onnx (float), model_int8.onnx (when INT8 was made), bundle.json (plain facts, and the SHA-256 of every other
file) and records.pth (hashes of the films of training, the input gate). bundle.json is written last: a folder without
it is no bundle. Reading one checks every hash. Knows no engine.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from errors import CheckpointError, first_line
from runtime import atomic_write, write_json

FORMAT_VERSION = 1
FACTS = "bundle.json"
FLOAT_FILE, INT8_FILE, RECORDS = "model.onnx", "model_int8.onnx", "records.pth"
Kinds = type | tuple[type, ...]
REQUIRED: dict[str, Kinds] = {
    "classes": list,
    "preprocess": dict,
    "temperature": (int, float),
    "operating_point": dict,
    "config": dict,
    "provenance": dict,
    "engine": str,
    "precision": str,
    "file": (str, type(None)),
    "hashes": dict,
    "checkpoint": dict,
}
AGAIN = "run optimize again, or restore it"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what they were when it was written."""

    folder: Path
    facts: dict[str, Any]
    """The content of bundle.json."""
    seen_films: npt.NDArray[np.int64]
    input_gate: dict[str, Any] | None

    @property
    def model_file(self) -> Path | None:
        """The ONNX file to run; None when torch runs the checkpoint itself."""
        return None if self.facts["file"] is None else self.folder / self.facts["file"]

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint was that it was made from."""
        return self.folder / self.facts["checkpoint"]["path"]


def is_bundle(path: str | Path) -> bool:
    """Whether `path` is a folder that `optimize` finished."""
    return (Path(path) / FACTS).is_file()


def write(
    folder: Path,
    facts: Mapping[str, Any],
    *,
    checkpoint: Path,
    seen_films: npt.NDArray[np.int64],
    input_gate: dict[str, Any] | None,
) -> None:
    """Write records.pth and, last, bundle.json beside the ONNX files that already lie in `folder`."""
    buffer = io.BytesIO()
    torch.save({"seen_films": torch.from_numpy(seen_films), "input_gate": input_gate}, buffer)
    with atomic_write(folder / RECORDS) as stream:
        stream.write(buffer.getbuffer())
    files = [name for name in (FLOAT_FILE, INT8_FILE, RECORDS) if (folder / name).exists()]
    complete = {
        "format_version": FORMAT_VERSION,
        **facts,
        "checkpoint": {"path": _relative(checkpoint, folder), "sha256": sha256(checkpoint)},
        "hashes": {name: sha256(folder / name) for name in files},
    }
    assert not set(REQUIRED) - set(complete), f"bundle lacks {set(REQUIRED) - set(complete)}"
    write_json(folder / FACTS, complete)


def _relative(path: Path, folder: Path) -> str:
    try:
        return os.path.relpath(path.resolve(), folder.resolve())
    except ValueError:  # another drive
        return str(path.resolve())


def read(folder: str | Path) -> Bundle:
    """The bundle in `folder`, every hash checked; CheckpointError when it is missing, damaged or newer."""
    folder = Path(folder)
    facts = read_description(
        folder / FACTS,
        kind="a bundle",
        absent=f"{folder}: no bundle (no {FACTS}); name a folder that optimize finished",
        required=REQUIRED,
        newest=FORMAT_VERSION,
        again=AGAIN,
    )
    for name, digest in facts["hashes"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing from the bundle; {AGAIN}")
        if sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: hash mismatch, it is not the file optimize wrote; {AGAIN}")
    for name in (RECORDS, facts["file"]):
        if name is not None and name not in facts["hashes"]:
            raise CheckpointError(f"{folder / FACTS}: names no hash of {name}; {AGAIN}")
    try:
        records = torch.load(folder / RECORDS, map_location="cpu", weights_only=True)
        return Bundle(folder, facts, records["seen_films"].numpy(), records["input_gate"])
    except (OSError, RuntimeError, KeyError, AttributeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{folder / RECORDS}: damaged ({first_line(error)}); {AGAIN}") from None


def read_description(
    path: Path, *, kind: str, absent: str, required: Mapping[str, Kinds], newest: int, again: str
) -> dict[str, Any]:
    """The JSON that describes a model of several files; CheckpointError when it is missing, damaged or newer.

    `kind` is what it describes (a bundle), `absent` the line for none at all, `again` what to do about damage.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(absent) from None
    except ValueError:
        raise CheckpointError(f"{path}: damaged, not JSON; {again}") from None
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path}: not the description of {kind} (no format_version); {again}")
    if version > newest:
        raise CheckpointError(f"{path}: format {version} is newer than this program reads ({newest}); update")
    if wrong := [name for name, kinds in required.items() if not isinstance(facts.get(name), kinds)]:
        raise CheckpointError(f"{path}: damaged: {', '.join(wrong)} missing or of another kind; {again}")
    return facts


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- Triton ----------------------------------------------------------------------------------------------------


def write_triton_repository(
    folder: Path, model_file: Path, *, name: str, facts: Mapping[str, Any], features: int, max_batch: int = 16
) -> None:
    """A Triton model repository of one ONNX model with dynamic batching: folder/<name>/{config.pbtxt,1/model.onnx}.

    Its input is normalised float32 (3, S, S): what to do to a film is in the parameter `preprocess`.
    """
    side = facts["preprocess"]["image_size"]
    parameters = {key: facts[key] for key in ("classes", "preprocess", "temperature", "operating_point")}
    lines = [
        f'name: "{name}"',
        'platform: "onnxruntime_onnx"',
        f"max_batch_size: {max_batch}",
        f'input [ {{ name: "input" data_type: TYPE_FP32 dims: [ 3, {side}, {side} ] }} ]',
        "output [",
        f'  {{ name: "logits" data_type: TYPE_FP32 dims: [ {len(facts["classes"])} ] }},',
        f'  {{ name: "features" data_type: TYPE_FP32 dims: [ {features} ] }}',
        "]",
        f"dynamic_batching {{ preferred_batch_size: [ 4, 8, {max_batch} ] max_queue_delay_microseconds: 2000 }}",
        *(
            f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(json.dumps(value))} }} }}'
            for key, value in parameters.items()
        ),
    ]
    target = folder / name
    with atomic_write(target / "1" / "model.onnx") as stream:
        stream.write(model_file.read_bytes())
    with atomic_write(target / "config.pbtxt") as stream:
        stream.write(("\n".join(lines) + "\n").encode())
