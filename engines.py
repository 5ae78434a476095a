"""What computes: a batch of uint8 films in, logits or features out, on one device at one precision.

Training, prediction and measurement all turn uint8 films into network input through `to_input`.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models import Classifier
from preprocess import PreprocessSpec
from runtime import autocast


class InputScaling(nn.Module):
    """uint8 films (B, H, W, 1 or 3) to the network's input (B, 3, H, W), normalised, channels-last, on the device."""

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: PreprocessSpec) -> None:
        super().__init__()
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self.register_buffer("scale", (1.0 / (255.0 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """float32 (B, 3, H, W)."""
        images_BCHW = images_BHWC.to(self.scale.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return torch.addcmul(self.shift, images_BCHW, self.scale).contiguous(memory_format=torch.channels_last)


class Engine(Protocol):
    """Runs a whole classifier: uint8 films in, logits and pooled features out."""

    name: str
    """What computes and how precisely, as in 'openvino int8'."""

    def logits(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Logits (B, classes) of uint8 films (B, H, W, C)."""

    def outputs(self, images_BHWC: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits (B, classes) and pooled backbone features (B, F) of one pass."""


class TorchEngine:
    """Eager torch inference."""

    def __init__(self, model: Classifier, spec: PreprocessSpec, *, device: torch.device, precision: str) -> None:
        self.name = f"torch {precision}"
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        self.device, self.precision = device, precision
        self.to_input = InputScaling(spec).to(device)

    def logits(self, images_BHWC: npt.NDArray[np.uint8] | Tensor) -> npt.NDArray[np.float32]:
        """Logits (B, classes) of uint8 films (B, H, W, C)."""
        return self.outputs(images_BHWC)[0]

    @torch.inference_mode()
    def outputs(
        self, images_BHWC: npt.NDArray[np.uint8] | Tensor
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits (B, classes) and pooled backbone features (B, F) of one pass over uint8 films (B, H, W, C)."""
        with autocast(self.device, self.precision):
            features_BF = self.model.features(self.to_input(torch.as_tensor(images_BHWC)))
            logits_BC = self.model.head(features_BF)
        return logits_BC.float().cpu().numpy(), features_BF.float().cpu().numpy()


class FloatEngine(Protocol):
    """Runs a module that takes uint8 films and gives floating-point rows."""

    name: str

    def __call__(self, films_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Rows (B, ...) of films (B, H, W, C)."""

    def stream(self, batches: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.float32]]:
        """The rows of each batch, in order."""


class TorchFloatEngine:
    """Eager torch."""

    def __init__(self, module: nn.Module, *, device: torch.device, precision: str) -> None:
        self.name = f"torch {precision}"
        self.device, self.precision = device, precision
        self.module = module.to(device).eval()

    @torch.inference_mode()
    def __call__(self, films_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Rows (B, ...) of films (B, H, W, C)."""
        with autocast(self.device, self.precision):
            return self.module(torch.from_numpy(films_BHWC).to(self.device)).float().cpu().numpy()

    def stream(self, batches: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.float32]]:
        """The rows of each batch, in order."""
        return map(self, batches)


def openvino_version() -> str | None:
    """The installed OpenVINO's version, or None."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("openvino")
    return None


def import_openvino() -> Any:
    """The openvino package, kept from reporting to its maker: it does so on import unless its reporter is missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


class OpenVinoFloatEngine:
    """OpenVINO on the CPU, several requests in flight."""

    def __init__(self, module: nn.Module, film_shape: tuple[int, ...], *, precision: str) -> None:
        openvino = import_openvino()
        self.name = f"openvino {precision}"
        example = torch.zeros((2, *film_shape), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on constants are about shapes that stay fixed
            graph = openvino.convert_model(module.cpu().eval(), example_input=example, input=[-1, *film_shape])
        hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision]
        options = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": hint}
        self.compiled = openvino.Core().compile_model(graph, "CPU", options)
        count = int(self.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._requests = [self.compiled.create_infer_request() for _ in range(count)]

    def __call__(self, films_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Rows (B, ...) of films (B, H, W, C)."""
        return np.concatenate(
            list(self.stream([films_BHWC[start : start + 8] for start in range(0, len(films_BHWC), 8)]))
        )

    def stream(self, batches: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.float32]]:
        """The rows of each batch, in order."""
        # A ring of requests waited for in turn keeps the order and needs no callback: those of AsyncInferQueue want
        # the interpreter lock, and destroying the queue while holding it can wait for them for ever.
        idle, running = deque(self._requests), deque[Any]()
        for films_BHWC in batches:
            if not idle:
                yield self._finished(running[0])
                idle.append(running.popleft())
            running.append(idle.popleft())
            running[-1].start_async({0: films_BHWC})
        while running:
            yield self._finished(running.popleft())

    @staticmethod
    def _finished(request: Any) -> npt.NDArray[np.float32]:
        request.wait()
        return request.get_output_tensor().data.copy()
