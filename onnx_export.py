"""A classifier as an ONNX file that any engine runs: dynamic batch, checked, with what it needs to be used inside.

    from onnx_export import export_to_onnx
    export_to_onnx(model=model, output_path="model.onnx", input_shape=(1, 3, 224, 224))

One float32 input `input` (B, 3, H, W), normalised, and two outputs: `logits` (B, classes) and, where the model has
them, pooled `features` (B, F). Further inputs of a multimodal model keep their names. The model itself is left alone.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from errors import ConfigError, first_line
from runtime import atomic_write

OPSET = 17
"""Old enough for every engine of the last years, new enough for LayerNormalization as one operator."""
METADATA_PREFIX = "medimg."
FloatArray = npt.NDArray[np.floating[Any]]


class _WithFeatures(nn.Module):
    """Logits and pooled features of one pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.features(*inputs)
        # What a multimodal model hands to its head is more than the features that are an output.
        return self.model.head(features), features if isinstance(features, Tensor) else self.model.pooled(features)


def export_to_onnx(
    model: nn.Module,
    output_path: str | Path,
    input_shape: Sequence[int] = (1, 3, 224, 224),
    opset_version: int = OPSET,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    further_axes: Mapping[str, str] | None = None,
) -> Path:
    """Write `model` to `output_path`, checked by onnx.checker; its path.

    `example_inputs` (name → tensor with the batch first) stands in for `input_shape` where a model takes more than
    images; `further_axes` names the second axis of those whose length may vary besides the batch. `metadata` (plain
    values) is stored in the file. ConfigError names an operator that ONNX does not have.
    """
    path = Path(output_path)
    inputs = dict(example_inputs or {"input": torch.zeros(tuple(input_shape))})
    # A copy: the exporter folds batch norm into the convolutions and writes the folded weights into the module.
    whole = copy.deepcopy(model).cpu().float().eval().to(memory_format=torch.contiguous_format)
    has_features = hasattr(whole, "features") and hasattr(whole, "head")
    outputs = ["logits", "features"] if has_features else ["logits"]
    buffer = io.BytesIO()
    module = _WithFeatures(whole) if has_features else whole
    _trace(module, inputs, outputs, opset_version, buffer, further_axes or {})
    graph = onnx.load_from_string(buffer.getvalue())
    if metadata:
        _store_metadata(graph, metadata)
    onnx.checker.check_model(graph)
    save_onnx(graph, path)
    return path


def _trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    opset_version: int,
    buffer: io.BytesIO,
    further_axes: Mapping[str, str],
) -> None:
    names = list(inputs)
    # Two rows: a batch of one could be taken for a constant.
    arguments = tuple(item if len(item) > 1 else torch.cat([item, item]) for item in inputs.values())
    try:
        # The exporter prints its graph on stdout when it fails: that is for its makers.
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            # About the exporter's age, and about Python numbers that come from shapes that stay fixed.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                arguments,
                buffer,  # type: ignore[arg-type]
                input_names=names,
                output_names=list(outputs),
                dynamic_axes={
                    name: {0: "batch"} | ({1: further_axes[name]} if name in further_axes else {})
                    for name in (*names, *outputs)
                },
                opset_version=opset_version,
                dynamo=False,
            )
    except torch.onnx.errors.UnsupportedOperatorError as error:
        raise ConfigError(
            f"ONNX opset {opset_version} has no operator for {_operator_of(error)}; choose a model without it, or a "
            "higher opset_version"
        ) from None
    except (torch.onnx.errors.OnnxExporterError, ValueError) as error:
        raise ConfigError(f"the model cannot be written as ONNX ({first_line(error)}); choose another model") from None


def _operator_of(error: Exception) -> str:
    """'aten::name' out of the exporter's message."""
    return next((word.strip("'\",.") for word in str(error).split() if "::" in word), first_line(error))


def save_onnx(graph: Any, path: Path) -> None:
    """Write an ONNX model atomically."""
    with atomic_write(path) as stream:
        stream.write(graph.SerializeToString())


# --- what the file says of itself ------------------------------------------------------------------------------


def _store_metadata(graph: Any, metadata: Mapping[str, Any]) -> None:
    known = {item.key: item.value for item in graph.metadata_props}
    stored = {f"{METADATA_PREFIX}{name}": json.dumps(value) for name, value in metadata.items()}
    onnx.helper.set_model_props(graph, {**known, **stored})


def read_metadata(path: Path) -> dict[str, Any]:
    """What `export_to_onnx` stored in the file."""
    graph = onnx.load(str(path), load_external_data=False)
    return {
        item.key[len(METADATA_PREFIX) :]: json.loads(item.value)
        for item in graph.metadata_props
        if item.key.startswith(METADATA_PREFIX)
    }


# --- parity ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """How far an ONNX file's logits are from torch's, over all films and batch sizes."""

    largest: float
    mean: float
    batch_sizes: tuple[int, ...]
    films: int


def parity(
    expected: Callable[[Any], FloatArray],
    found: Callable[[Any], FloatArray],
    films: npt.NDArray[Any],
    *,
    batch_sizes: Iterable[int] = (1, 2, 5, 16),
) -> Parity:
    """Absolute differences of two engines' logits on `films`, cut into batches of each size in turn."""
    sizes = tuple(batch_sizes)
    reference = np.concatenate([expected(films[start : start + 16]) for start in range(0, len(films), 16)])
    gaps = [
        np.abs(found(films[start : start + size]) - reference[start : start + size])
        for size in sizes
        for start in range(0, len(films), size)
    ]
    every = np.concatenate([gap.ravel() for gap in gaps]).astype(np.float64)
    return Parity(float(every.max()), float(every.mean()), sizes, len(films))
