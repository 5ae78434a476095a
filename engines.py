"""What computes: a batch of uint8 films in, logits or features out, on one device at one precision.

Training, prediction and measurement all turn uint8 films into network input through `to_input`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from errors import ConfigError
from models import Classifier
from preprocess import PreprocessSpec
from runtime import autocast, cpu_flags, silence_openvino

Outputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Logits (B, classes) and pooled features (B, F)."""


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

    def outputs(self, images_BHWC: npt.NDArray[np.uint8]) -> Outputs:
        """Logits (B, classes) and pooled backbone features (B, F) of one pass."""


class TorchEngine:
    """torch inference: eager, or compiled at the first batch of each size."""

    def __init__(
        self,
        model: Classifier,
        spec: PreprocessSpec,
        *,
        device: torch.device,
        precision: str,
        compiled: bool = False,
    ) -> None:
        self.name = f"torch {precision}" + (" compiled" if compiled else "")
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        self.device, self.precision = device, precision
        self.to_input = InputScaling(spec).to(device)
        self._features = torch.compile(self.model.features) if compiled else self.model.features

    def logits(self, images_BHWC: npt.NDArray[np.uint8] | Tensor) -> npt.NDArray[np.float32]:
        """Logits (B, classes) of uint8 films (B, H, W, C)."""
        return self.outputs(images_BHWC)[0]

    @torch.inference_mode()
    def outputs(self, images_BHWC: npt.NDArray[np.uint8] | Tensor) -> Outputs:
        """Logits (B, classes) and pooled backbone features (B, F) of one pass over uint8 films (B, H, W, C)."""
        with autocast(self.device, self.precision):
            features_BF = self._features(self.to_input(torch.as_tensor(images_BHWC)))
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
    """The openvino package, kept from reporting to its maker."""
    silence_openvino()
    import openvino

    return openvino


@functools.cache
def openvino_core() -> Any:
    """The one Core of the process, never let go.

    A Core's CPU plugin gives its thread another signal stack and takes it back when the Core goes. Two Cores that go in
    the order they came, or one that goes in another thread, leave the thread with a signal stack that is no longer
    memory: the next signal with a Python handler (a loader's child that ends, SIGTERM) is a segmentation fault.
    """
    return import_openvino().Core()


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
        self.compiled = openvino_core().compile_model(graph, "CPU", options)
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


# --- whole classifiers from an ONNX file -----------------------------------------------------------------------


@dataclass(frozen=True)
class EngineKind:
    """A library that can run an exported classifier."""

    module: str
    """What has to be importable."""
    install: str
    """The line that installs it."""
    precisions: tuple[str, ...]
    """What it can compute in; int8+bf16 is INT8 with bf16 where a layer is not quantised."""


ONNX_ENGINES = {
    "onnxruntime": EngineKind("onnxruntime", "pip install onnxruntime", ("fp32", "int8")),
    "openvino": EngineKind("openvino", "pip install openvino", ("fp32", "bf16", "int8", "int8+bf16")),
    "cuda": EngineKind("onnxruntime", "pip install onnxruntime-gpu", ("fp32",)),
    "tensorrt": EngineKind("onnxruntime", "pip install onnxruntime-gpu tensorrt", ("fp32", "fp16", "int8")),
}
"""By the name used in bundle.json and with --engines."""
PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's names of what computes."""
MOST_A_REQUEST = 8
"""Films that OpenVINO computes together at most: more fill the caches, fewer repeat the reading of weights."""


def why_absent(kind: str) -> str | None:
    """Why engine `kind` cannot run here, with the line that installs it; None when it can."""
    facts = ONNX_ENGINES[kind]
    if importlib.util.find_spec(facts.module) is None:
        return f"{facts.module} is not installed ({facts.install})"
    if kind in ("cuda", "tensorrt"):
        import onnxruntime

        if not torch.cuda.is_available():
            return "there is no CUDA GPU here"
        if PROVIDERS[kind] not in onnxruntime.get_available_providers():
            return f"the ONNX Runtime installed has no {PROVIDERS[kind]} ({facts.install})"
    return None


def precisions_here(kind: str) -> tuple[str, ...]:
    """The precisions of engine `kind` that this processor computes in."""
    has_bf16 = bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})
    return tuple(name for name in ONNX_ENGINES[kind].precisions if has_bf16 or "bf16" not in name)


def onnx_engine(
    kind: str, path: Path, spec: PreprocessSpec, *, precision: str, threads: int = 0
) -> OnnxRuntimeEngine | OpenVinoEngine:
    """Engine `kind` on an ONNX file of `export_to_onnx`; ConfigError when it is not installed here."""
    if reason := why_absent(kind):
        raise ConfigError(f"engine {kind}: {reason}")
    if kind == "openvino":
        return OpenVinoEngine(path, spec, precision=precision, threads=threads)
    return OnnxRuntimeEngine(path, spec, precision=precision, kind=kind, threads=threads)


class OnnxRuntimeEngine:
    """ONNX Runtime, on the CPU or through one of its GPU providers."""

    def __init__(
        self, path: Path, spec: PreprocessSpec, *, precision: str, kind: str = "onnxruntime", threads: int = 0
    ) -> None:
        import onnxruntime

        self.name = f"{kind} {precision}"
        self.device = torch.device("cpu" if kind == "onnxruntime" else "cuda")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Its threads would go on spinning after a batch, on cores that decoding needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        provider_options = {"trt_fp16_enable": precision == "fp16", "trt_int8_enable": precision == "int8"}
        wanted: list[Any] = [(PROVIDERS[kind], provider_options) if kind == "tensorrt" else PROVIDERS[kind]]
        self._session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        self._to_input = HostScaling(spec)

    def logits(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Logits (B, classes) of uint8 films (B, H, W, C)."""
        return self.outputs(images_BHWC)[0]

    def outputs(self, images_BHWC: npt.NDArray[np.uint8]) -> Outputs:
        """Logits (B, classes) and pooled backbone features (B, F) of one pass."""
        logits_BC, features_BF = self._session.run(["logits", "features"], {"input": self._to_input(images_BHWC)})
        return logits_BC, features_BF


class HostScaling:
    """What `InputScaling` does, in numpy: uint8 films (B, H, W, 1 or 3) to float32 (B, 3, H, W), normalised."""

    def __init__(self, spec: PreprocessSpec) -> None:
        scaling = InputScaling(spec)
        self._scale, self._shift = scaling.scale.numpy(), scaling.shift.numpy()

    def __call__(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """float32 (B, 3, H, W)."""
        inputs_BCHW = np.multiply(images_BHWC.transpose(0, 3, 1, 2), self._scale, dtype=np.float32, order="C")
        inputs_BCHW += self._shift
        return inputs_BCHW


class OpenVinoEngine:
    """OpenVINO on the CPU: one film on all cores, or a batch in parts, a core each."""

    def __init__(self, path: Path, spec: PreprocessSpec, *, precision: str, threads: int = 0) -> None:
        openvino = import_openvino()
        self.name = f"openvino {precision}"
        self._film_shape = (spec.image_size, spec.image_size, spec.channels)
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if "bf16" in precision else "f32",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        }
        core, graph = openvino_core(), _film_graph(openvino, path, spec)
        streams = core.compile_model(graph, "CPU", {**options, "PERFORMANCE_HINT": "THROUGHPUT"})
        self.lanes = int(streams.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        """Films computed at the same time, a core each: so many threads may call `stream` at once."""
        self._idle = SimpleQueue[Any]()
        for _ in range(self.lanes):
            self._idle.put(streams.create_infer_request())
        graph.reshape([1, *self._film_shape])
        alone = core.compile_model(graph, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
        self._single, self._alone = alone.create_infer_request(), threading.Lock()
        self._exact_alone: bool | None = None
        self._exact_sizes: tuple[int, ...] | None = None

    def logits(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Logits (B, classes) of uint8 films (B, H, W, C)."""
        return self.outputs(images_BHWC)[0]

    def outputs(self, images_BHWC: npt.NDArray[np.uint8]) -> Outputs:
        """Logits (B, classes) and pooled backbone features (B, F) of one pass."""
        count = len(images_BHWC)
        if count == 1:
            return self._run_alone(images_BHWC)
        return self._in_parts(images_BHWC, min(MOST_A_REQUEST, -(-count // self.lanes)))

    def stream(self, films: Iterable[npt.NDArray[np.uint8]]) -> Iterator[Outputs]:
        """The outputs of each film (1, H, W, C), in order: the same bits however many films there are."""
        together = list(films)
        if not together:
            return
        computes = self._alone.locked() or self._idle.qsize() < self.lanes
        if len(together) == 1 and not computes and self._alone_is_exact():
            yield self._run_alone(together[0])
            return
        worth_it = len(together) >= 2 * MOST_A_REQUEST
        sizes = self._sizes_that_are_exact() if worth_it else (1,)
        size = next(size for size in sizes if size * self.lanes <= len(together) or size == 1)
        logits_BC, features_BF = self._in_parts(np.concatenate(together), size, rest=1)
        yield from ((logits_BC[k : k + 1], features_BF[k : k + 1]) for k in range(len(together)))

    def _in_parts(self, images_BHWC: npt.NDArray[np.uint8], size: int, *, rest: int | None = None) -> Outputs:
        """The outputs of a batch, `size` films a request; what is left over in requests of `rest`."""
        whole = len(images_BHWC) - len(images_BHWC) % size if rest else len(images_BHWC)
        parts = [images_BHWC[k : k + size] for k in range(0, whole, size)]
        parts += [images_BHWC[k : k + 1] for k in range(whole, len(images_BHWC))]
        return _joined(list(self._ring(parts)))

    # A kernel is chosen by shape and by the number of threads, so bits may differ between ways of cutting a batch.
    # Whether they do is found out on noise, once, when it first matters.

    def _alone_is_exact(self) -> bool:
        if self._exact_alone is None:
            films = self._noise(2)
            alone = [self._run_alone(films[k : k + 1]) for k in range(2)]
            self._exact_alone = _same_bits(_joined(alone), self._in_parts(films, 1))
        return self._exact_alone

    def _sizes_that_are_exact(self) -> tuple[int, ...]:
        if self._exact_sizes is None:
            films = self._noise(MOST_A_REQUEST)
            singly = self._in_parts(films, 1)
            wider = (size for size in (8, 4, 2) if _same_bits(self._in_parts(films, size), singly))
            self._exact_sizes = (*wider, 1)
        return self._exact_sizes

    def _noise(self, count: int) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(0).integers(0, 256, (count, *self._film_shape), dtype=np.uint8)

    def _run_alone(self, film_1HWC: npt.NDArray[np.uint8]) -> Outputs:
        with self._alone:
            self._single.infer({0: film_1HWC})
            return _copied(self._single)

    def _ring(self, parts: Iterable[npt.NDArray[np.uint8]]) -> Iterator[Outputs]:
        running = deque[Any]()
        try:
            for images_BHWC in parts:
                try:
                    # Who has a request running takes that one again: waiting for another thread's could last for ever.
                    request = self._idle.get(block=not running)
                except Empty:
                    running[0].wait()
                    yield _copied(running[0])
                    request = running.popleft()
                running.append(request)
                request.start_async({0: images_BHWC})
            while running:
                running[0].wait()
                yield _copied(running[0])
                self._idle.put(running.popleft())
        finally:
            for request in running:
                with contextlib.suppress(RuntimeError):
                    request.wait()
                self._idle.put(request)


def _joined(parts: Sequence[Outputs]) -> Outputs:
    logits, features = zip(*parts)
    return np.concatenate(logits), np.concatenate(features)


def _same_bits(a: Outputs, b: Outputs) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(a, b))


def _copied(request: Any) -> Outputs:
    """The results of a finished request; its buffers are used again."""
    return request.get_tensor("logits").data.copy(), request.get_tensor("features").data.copy()


def _film_graph(openvino: Any, path: Path, spec: PreprocessSpec) -> Any:
    """The graph of an ONNX file, taking uint8 films (B, H, W, C): scaling is part of it."""
    from openvino import opset13 as ops
    from openvino.preprocess import PrePostProcessor

    processor = PrePostProcessor(openvino_core().read_model(str(path)))
    film = processor.input("input")
    film.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    film.tensor().set_shape([-1, spec.image_size, spec.image_size, spec.channels])
    film.model().set_layout(openvino.Layout("NCHW"))
    scaling = InputScaling(spec)
    scale, shift = (value.reshape(1, 1, 1, 3).numpy() for value in (scaling.scale, scaling.shift))

    def normalised(image: Any) -> Any:
        # One channel times three scales is three channels: a grey film needs no repeating first.
        return ops.add(ops.multiply(image, ops.constant(scale)), ops.constant(shift)).output(0)

    film.preprocess().convert_element_type(openvino.Type.f32).custom(normalised)
    return processor.build()
