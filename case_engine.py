"""Runs a multimodal network: cases in, logits and features out, by torch or from an ONNX file.

The counterparts of `engines.TorchEngine` and `engines.OnnxEngine`; a batch is an array of `multimodal.Rows`, which is
cut and stacked like films. Legend: B batch, X heads, M modalities, C classes, D features.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines import HostScaling, InputScaling, Outputs, openvino_core
from multimodal import CaseInputs, CaseReader, Everything, MultimodalClassifier, Rows
from runtime import autocast

ONNX_NAMES = {
    "image_BCHW": "input",
    "has_image_B": "has_image",
    "ids_BT": "token_ids",
    "mask_BT": "token_mask",
    "table_BK": "table",
    "has_table_B": "has_table",
}
"""Field of `CaseInputs` → input of an exported model."""


class CaseTorchEngine:
    """Eager torch inference of cases."""

    def __init__(
        self, model: MultimodalClassifier, reader: CaseReader, *, device: torch.device, precision: str
    ) -> None:
        self.name = f"torch {precision}"
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        self.reader, self.device, self.precision = reader, device, precision
        self.to_input = InputScaling(reader.spec).to(device)

    def inputs(self, rows: Rows) -> CaseInputs:
        """The tensors of a batch on the device, films normalised."""
        films = torch.from_numpy(np.ascontiguousarray(rows["film"])) if "image" in self.reader.modalities else None
        return self.reader.inputs(rows, None if films is None else self.to_input(films)).to(self.device)

    @torch.inference_mode()
    def everything(self, rows: Rows) -> Everything:
        """All heads, features and weights of a batch."""
        with autocast(self.device, self.precision):
            return self.model.everything(self.inputs(rows))

    def logits(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Fused logits (B, C)."""
        return self.outputs(rows)[0]

    def outputs(self, rows: Rows) -> Outputs:
        """Fused logits (B, C) and pooled features of the first modality (B, D)."""
        said = self.everything(rows)
        return said.logits_BC.float().cpu().numpy(), said.features_BD.float().cpu().numpy()


class CaseOnnxEngine:
    """An exported multimodal model on ONNX Runtime, or read by OpenVINO, on the CPU."""

    def __init__(self, path: Path, reader: CaseReader, *, precision: str, kind: str = "onnxruntime") -> None:
        self.name, self.reader, self.precision = f"{kind} {precision}", reader, precision
        self.device = torch.device("cpu")
        self._to_input = HostScaling(reader.spec)
        if kind == "onnxruntime":
            self._run = _onnxruntime(path)
        else:
            self._run = _openvino(path)

    def inputs(self, rows: Rows) -> dict[str, npt.NDArray[Any]]:
        """Input name → array."""
        image = self._to_input(rows["film"]) if "image" in self.reader.modalities else None
        case = self.reader.inputs(rows, None if image is None else torch.from_numpy(image))
        own = {item.name: getattr(case, item.name) for item in fields(case)}
        return {ONNX_NAMES[name]: item.numpy() for name, item in own.items() if item is not None}

    def logits(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Fused logits (B, C)."""
        return self.outputs(rows)[0]

    def outputs(self, rows: Rows) -> Outputs:
        """Fused logits (B, C) and pooled features of the first modality (B, D)."""
        return self._run(self.inputs(rows))


def _onnxruntime(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feeds: tuple(session.run(["logits", "features"], feeds))


def _openvino(path: Path) -> Any:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    core = openvino_core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
    request = compiled.create_infer_request()

    def run(feeds: dict[str, npt.NDArray[Any]]) -> Outputs:
        request.infer(feeds)
        return request.get_tensor("logits").data.copy(), request.get_tensor("features").data.copy()

    return run
