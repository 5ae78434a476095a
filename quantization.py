"""INT8 by static post-training quantisation: one ONNX file with QuantizeLinear/DequantizeLinear pairs for every engine.

    made = quantise(Path("model.onnx"), Path("model_int8.onnx"), calibration, judge=judge)

Weights are stored as int8, a scale for each output channel; activation ranges come from calibration films. Several
recipes are tried and the one whose logits are nearest to the float model's is kept. What rounding adds to every film's
logits alike is taken off in the file. Where accuracy still suffers, the blocks that hurt are found by giving each its
floats back in turn, and compute in float. NNCF does the work where it is installed, else ONNX Runtime's own tool. Never
looks at a label itself: the judge does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from errors import ConfigError, first_line
from onnx_export import save_onnx
from runtime import log, silence_openvino

FloatArray = npt.NDArray[np.floating[Any]]
Inputs = FloatArray | Mapping[str, npt.NDArray[Any]]
"""What a network is shown once: a normalised film (1, 3, H, W), or a case's inputs by name."""
Recipe = Callable[[Path, Path, Sequence[Inputs]], None]
"""Reads a float ONNX file, writes its INT8 twin, shown inputs (1, 3, H, W) to learn ranges from."""

QUANTISED_OPERATORS = frozenset({"Conv", "Gemm", "MatMul"})
GATES = re.compile(r"/(se|attn_se|gate)/|squeeze|excite", re.IGNORECASE)
"""Names of the nodes of squeeze-excite gates, the layers most often spoilt by INT8."""
LARGE = 1024
"""Weights from which on four bytes each are too many."""
MOST_IN_FLOAT = 0.5
"""Share of the blocks beyond which leaving more of them in float is no quantisation any more."""


@dataclass(frozen=True)
class Judgement:
    """What an INT8 file gives against the float model."""

    error: float
    """L2 norm of the logits' difference over that of the float logits, `shift` added."""
    reason: str | None
    """Why it is not good enough; None when it is."""
    shift: tuple[float, ...]
    """What each class's logit lacks on average of the float model's: the operating point was chosen for those."""


class Judge(Protocol):
    """Runs an INT8 file on validation films."""

    def __call__(self, path: Path, *, quick: bool) -> Judgement:
        """`quick`: error and shift alone, on few films; no reason is given."""


@dataclass(frozen=True)
class Quantised:
    """An INT8 file and how it came about."""

    path: Path
    recipe: str
    errors: dict[str, float]
    """Recipe → relative error of its logits, for every recipe tried."""
    error: float
    """Of the file as kept."""
    shift: tuple[float, ...]
    """Added to the logits in the file, for each class; see `Judgement`."""
    left_in_float: tuple[str, ...] = field(default=())
    """Blocks that compute in float because INT8 hurt there, worst first; their weights are stored as int8."""
    reason: str | None = None
    """Why it is still not good enough; None when it is."""


def quantise(source: Path, target: Path, calibration: Sequence[Inputs], *, judge: Judge) -> Quantised:
    """Write the INT8 twin of `source` to `target`; how it came about.

    `calibration` are normalised inputs (1, 3, H, W). ConfigError when no tool is installed or none takes the graph.
    """
    assert len(calibration), "no calibration films"
    found: dict[str, Judgement] = {}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        files = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(recipes())}
        refused = ""
        for name, recipe in recipes().items():
            try:
                recipe(source, files[name], calibration)
                save_onnx(with_small_weights(onnx.load(str(files[name]))), files[name])
            except Exception as error:  # a tool's own failure on this graph: another recipe may take it
                refused = f"{name}: {first_line(error)}"
                log.info("INT8 by %s is not possible (%s)", name, first_line(error))
                continue
            found[name] = judge(files[name], quick=False)
            log.info("INT8 by %s: relative error of the logits %.4f", name, found[name].error)
        if not found:
            raise ConfigError(f"INT8: no tool takes this model ({refused}); optimise it with --no-quantize")
        best = min(found, key=lambda name: (found[name].reason is not None, found[name].error))
        errors = {name: item.error for name, item in found.items()}
        kept = onnx.load(str(files[best]))
        left: list[str] = []
        judged = found[best]
        if judged.reason is not None:
            log.info("INT8 costs too much (%s): looking for the layers that hurt", judged.reason)
            kept, left, judged = _spare_what_hurts(kept, onnx.load(str(source)), judged, judge, Path(folder))
    save_onnx(shifted(kept, judged.shift), target)
    return Quantised(target, best, errors, judged.error, judged.shift, tuple(left), judged.reason)


def shifted(graph: Any, shift: Sequence[float]) -> Any:
    """`graph` with `shift` added to its logits (bias correction, Nagel 2019, at the one place where it decides)."""
    last = next(node for node in graph.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "logits/rounded"
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shift, dtype=np.float32), "logits/shift"))
    graph.graph.node.append(onnx.helper.make_node("Add", ["logits/rounded", "logits/shift"], ["logits"]))
    return graph


# --- recipes ---------------------------------------------------------------------------------------------------


def recipes() -> dict[str, Recipe]:
    """The ways of quantising that are installed here, by name; ConfigError when there is none."""
    if importlib.util.find_spec("nncf") is not None:
        return {
            "NNCF symmetric": lambda *paths: _nncf(*paths, preset="PERFORMANCE"),
            "NNCF asymmetric": lambda *paths: _nncf(*paths, preset="MIXED"),
        }
    if importlib.util.find_spec("onnxruntime") is not None:
        return {"ONNX Runtime min-max": _onnxruntime}
    raise ConfigError("INT8: neither nncf nor onnxruntime is installed (pip install nncf); or use --no-quantize")


def _import_nncf() -> Any:
    """nncf, kept from reporting to its maker and from filling the log."""
    silence_openvino()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the libraries it imports
        import nncf
    nncf.set_log_level(logging.ERROR)
    return nncf


def _nncf(source: Path, target: Path, calibration: Sequence[Inputs], *, preset: str) -> None:
    """Ranges from the smallest to the largest value of all films; NNCF's own means over films cut off what decides."""
    nncf = _import_nncf()
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    graph = onnx.load(str(source))
    attention = any(node.op_type == "Softmax" for node in graph.graph.node)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it draws its progress on stdout
        warnings.simplefilter("ignore")
        made = nncf.quantize(
            graph,
            nncf.Dataset([_feed(item) for item in calibration]),
            preset=nncf.QuantizationPreset[preset],
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            ignored_scope=nncf.IgnoredScope(names=_last_layer(graph)),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
            ),
        )
    save_onnx(made, target)


def _onnxruntime(source: Path, target: Path, calibration: Sequence[Inputs]) -> None:
    from onnxruntime import quantization

    class Films(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._films = iter(calibration)

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            film = next(self._films, None)
            return None if film is None else _feed(film)

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it asks for a pre-processing that changes nothing here
    try:
        quantization.quantize_static(
            str(source),
            str(target),
            Films(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=[*QUANTISED_OPERATORS, "Add", "Mul", "MaxPool", "GlobalAveragePool"],
            per_channel=True,
            nodes_to_exclude=_last_layer(onnx.load(str(source))),
            extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
        )
    finally:
        root.setLevel(level)


def _feed(item: Inputs) -> dict[str, npt.NDArray[Any]]:
    """Name → array: a film is the one input called `input`, a case names its own."""
    return dict(item) if isinstance(item, Mapping) else {"input": item}


def _last_layer(graph: Any) -> list[str]:
    """The layer that gives the logits: a few thousand weights that decide, not worth four bytes less each."""
    return [node.name for node in graph.graph.node if "logits" in node.output]


# --- weights a tool left in float ------------------------------------------------------------------------------


def with_small_weights(graph: Any) -> Any:
    """`graph` with the float weights of large layers stored as int8, a scale for each output channel.

    NNCF leaves squeeze-excite gates in float: their activations stay so, but their weights need not take four bytes.
    """
    weights = {item.name: item for item in graph.graph.initializer}
    users = Counter(name for node in graph.graph.node for name in node.input)
    nodes = []
    for node in graph.graph.node:
        weight = weights.get(node.input[1]) if node.op_type in QUANTISED_OPERATORS else None
        shared = weight is not None and users[node.input[1]] > 1
        if weight is not None and not shared and "logits" not in node.output and _is_large(node, weight):
            nodes += _stored_small(graph, weight, axis=_output_axis(node, weight))
            node.input[1] = nodes[-1].output[0]
        nodes.append(node)
    nodes = list(_copies(nodes))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    del graph.graph.value_info[:]  # shapes that every engine infers for itself, and that need not be true any more
    _drop_unused(graph)
    return graph


def _is_large(node: Any, weight: Any) -> bool:
    plain = node.op_type == "Conv" or len(weight.dims) == 2
    return plain and weight.data_type == onnx.TensorProto.FLOAT and int(np.prod(weight.dims)) >= LARGE


def _output_axis(node: Any, weight: Any) -> int:
    if node.op_type == "Conv":
        return 0
    transposed = any(item.name == "transB" and item.i for item in node.attribute)
    return 0 if transposed else len(weight.dims) - 1


def _stored_small(graph: Any, weight: Any, *, axis: int) -> list[Any]:
    """The nodes that give `weight` back from its int8 twin, which is added to the graph."""
    values = onnx.numpy_helper.to_array(weight)
    others = tuple(item for item in range(values.ndim) if item != axis)
    scale = np.maximum(np.abs(values).max(axis=others, keepdims=True), 1e-12) / 127
    rounded = np.round(values / scale).astype(np.int8)
    parts = {
        "int8": rounded.reshape(len(rounded), -1),
        "scale": scale.reshape(-1).astype(np.float32),
        "shape": np.array(values.shape, dtype=np.int64),
    }
    names = {part: f"{weight.name}/{part}" for part in parts}
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(value, names[part]) for part, value in parts.items())
    flat, restored = f"{weight.name}/flat", f"{weight.name}/restored"
    # OpenVINO (2026.4) takes int8 weights that feed a convolution for a quantised layer and computes nonsense where the
    # activations are float; a reshape between hides them from it.
    return [
        onnx.helper.make_node("DequantizeLinear", [names["int8"], names["scale"]], [flat], axis=axis),
        onnx.helper.make_node("Reshape", [flat, names["shape"]], [restored]),
    ]


# --- layers that hurt ------------------------------------------------------------------------------------------


def _spare_what_hurts(
    quantised: Any, original: Any, judged: Judgement, judge: Judge, folder: Path
) -> tuple[Any, list[str], Judgement]:
    """Give blocks their floats back, the one that helps most first, until the judge is content."""
    blocks = blocks_of(original)
    trial = folder / "trial.onnx"

    def judged_without(names: Sequence[str], *, quick: bool) -> tuple[Any, Judgement]:
        nodes = [node for name in names for node in blocks[name]]
        graph = with_small_weights(with_floats(quantised, original, nodes))
        save_onnx(graph, trial)
        return graph, judge(trial, quick=quick)

    alone = {name: judged_without([name], quick=True)[1].error for name in blocks}
    ranked = sorted(alone, key=lambda name: alone[name])
    left: list[str] = []
    best = quantised
    for name in ranked[: max(1, int(MOST_IN_FLOAT * len(blocks)))]:
        graph, found = judged_without([*left, name], quick=False)
        if found.error >= judged.error and found.reason is not None:
            continue
        best, judged = graph, found
        left.append(name)
        log.info("%s stays in float: relative error %.4f", name, found.error)
        if found.reason is None:
            break
    return best, left, judged


def blocks_of(graph: Any) -> dict[str, list[str]]:
    """The quantisable blocks of a network, name → its nodes: all squeeze-excite gates as one, then block by block."""
    blocks: dict[str, list[str]] = {}
    for node in graph.graph.node:
        gate = GATES.search(node.name)
        name = "squeeze-excite gates" if gate else _block_name(node.name)
        blocks.setdefault(name, []).append(node.name)
    kinds = {node.name: node.op_type for node in graph.graph.node}
    return {name: nodes for name, nodes in blocks.items() if any(kinds[node] in QUANTISED_OPERATORS for node in nodes)}


def _block_name(node: str) -> str:
    """'layer1.0' of '/backbone/layer1/layer1.0/conv1/Conv': the innermost numbered part, or the layer's own name."""
    parts = [part for part in node.split("/") if part]
    numbered = [part for part in parts[:-1] if re.search(r"\.\d+$|\d+$", part)]
    own = ".".join(parts[1:-1]) or node
    return numbered[min(1, len(numbered) - 1)] if numbered else own


def with_floats(quantised: Any, original: Any, nodes: Sequence[str]) -> Any:
    """A copy of a quantised graph in which `nodes` compute with their original floats."""
    graph = onnx.ModelProto()
    graph.CopyFrom(quantised)
    producer = {output: node for node in graph.graph.node for output in node.output}
    original_node = {node.name: node for node in original.graph.node}
    floats = {item.name: item for item in original.graph.initializer}
    chosen = set(nodes)
    for node in graph.graph.node:
        if node.name in chosen and node.name in original_node:
            for position, name in enumerate(original_node[node.name].input):
                if name in floats:
                    node.input[position] = _restored(graph, floats[name])
                else:
                    node.input[position] = _unrounded(producer, node.input[position])
    _drop_unused(graph)
    return graph


def _restored(graph: Any, weight: Any) -> str:
    """The name of a float weight of the original, put beside what quantisation made of it."""
    name = f"{weight.name}/float"
    if all(item.name != name for item in graph.graph.initializer):
        kept = graph.graph.initializer.add()
        kept.CopyFrom(weight)
        kept.name = name
    return name


def _unrounded(producer: dict[str, Any], name: str) -> str:
    """What went into the QuantizeLinear/DequantizeLinear pair that gave `name`, or `name` itself."""
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        node = producer.get(name)
        if node is None or node.op_type != kind:
            break
        name = node.input[0]
    return name


def _drop_unused(graph: Any) -> None:
    """Take out nodes and weights that no output depends on any more."""
    needed = {item.name for item in graph.graph.output}
    kept = []
    for node in reversed(graph.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    nodes = list(_copies(reversed(kept)))
    weights = list(_copies(item for item in graph.graph.initializer if item.name in needed))
    for repeated, items in ((graph.graph.node, nodes), (graph.graph.initializer, weights)):
        del repeated[:]
        repeated.extend(items)


def _copies(items: Any) -> Iterator[Any]:
    for item in items:
        twin = type(item)()
        twin.CopyFrom(item)
        yield twin
