"""quantization.py: INT8 files are small, near the float model, and give back floats where asked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import quantization
from engines import openvino_core
from errors import ConfigError
from models import create_model
from onnx_export import export_to_onnx, save_onnx
from quantization import Judgement


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("test_efficientnet", 2, pretrained=False, hidden_features=16).eval()
    return export_to_onnx(model, tmp_path_factory.mktemp("q") / "m.onnx", (1, 3, 32, 32))


@pytest.fixture(scope="module")
def films() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 3, 32, 32)).astype(np.float32) for _ in range(6)]


def logits(path: Path, films: list[np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": np.concatenate(films)})[0]


def error(path: Path, source: Path, films: list[np.ndarray]) -> float:
    wanted = logits(source, films)
    return float(np.linalg.norm(logits(path, films) - wanted) / np.linalg.norm(wanted))


def content(path: Path, source: Path, films: list[np.ndarray]) -> Judgement:
    """A judge who finds every file good enough and shifts nothing."""
    return Judgement(error(path, source, films), None, (0.0, 0.0))


@pytest.fixture(scope="module")
def made(source: Path, films: list[np.ndarray]) -> quantization.Quantised:
    target = source.with_name("int8.onnx")
    return quantization.quantise(source, target, films, judge=lambda path, quick: content(path, source, films))


def test_the_recipe_with_the_smallest_error_is_kept(made: quantization.Quantised) -> None:
    assert len(made.errors) == 2
    assert made.error == made.errors[made.recipe] == min(made.errors.values())
    assert made.left_in_float == () and made.reason is None


def test_the_file_computes_in_int8_with_a_scale_for_each_channel(made: quantization.Quantised, source: Path) -> None:
    graph = onnx.load(str(made.path))
    onnx.checker.check_model(graph)
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["QuantizeLinear"] and kinds["DequantizeLinear"]
    weights = [item for item in graph.graph.initializer if len(item.dims) == 4 and np.prod(item.dims) > 1024]
    assert {item.data_type for item in weights} == {onnx.TensorProto.INT8}
    scales = {item.name: item for item in graph.graph.initializer}
    by_weight = {node.input[0]: node.input[1] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    for weight in weights:
        assert list(scales[by_weight[weight.name]].dims) == [weight.dims[0]]
    assert made.path.stat().st_size < 0.5 * source.stat().st_size


def test_weights_a_tool_left_in_float_are_stored_in_a_quarter_of_the_room(
    source: Path, films: list[np.ndarray]
) -> None:
    small = quantization.with_small_weights(onnx.load(str(source)))
    onnx.checker.check_model(small)
    target = source.with_name("small.onnx")
    save_onnx(small, target)
    assert target.stat().st_size < 0.4 * source.stat().st_size
    # Eight bits of weights alone, activations untouched.
    assert 0 < error(target, source, films) < 0.01
    # OpenVINO once computed nonsense from int8 weights beside float activations.
    compiled = openvino_core().compile_model(str(target), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(np.concatenate(films))["logits"], logits(target, films), atol=1e-5)


def test_the_last_layer_keeps_its_floats(made: quantization.Quantised, source: Path) -> None:
    (last,) = [node for node in onnx.load(str(source)).graph.node if "logits" in node.output]
    (same,) = [node for node in onnx.load(str(made.path)).graph.node if node.name == last.name]
    assert same.op_type == "Gemm" and list(same.input[1:]) == list(last.input[1:])
    assert not any("dq_" in name or "Dequant" in name for name in same.input)


def test_what_the_judge_finds_missing_is_added_to_the_logits(
    source: Path, films: list[np.ndarray], tmp_path: Path
) -> None:
    shift = (0.25, -0.5)
    moved = quantization.quantise(
        source, tmp_path / "q.onnx", films, judge=lambda *_, **__: Judgement(0.1, None, shift)
    )
    onnx.checker.check_model(onnx.load(str(moved.path)))
    first = quantization.quantise(
        source, tmp_path / "p.onnx", films, judge=lambda *_, **__: Judgement(0.1, None, (0.0, 0.0))
    )
    assert moved.recipe == first.recipe and moved.shift == shift
    gap = logits(moved.path, films) - logits(first.path, films)
    np.testing.assert_allclose(gap, np.tile(shift, (len(films), 1)), atol=1e-6)


def test_int8_is_near_the_float_model(made: quantization.Quantised) -> None:
    # 8 bits through a dozen layers; unquantised noise would be of order 1.
    assert 0 < made.error < 0.1


def test_giving_all_floats_back_gives_the_float_model(
    made: quantization.Quantised, source: Path, films: list[np.ndarray], tmp_path: Path
) -> None:
    original = onnx.load(str(source))
    nodes = [node.name for node in original.graph.node]
    restored = quantization.with_floats(onnx.load(str(made.path)), original, nodes)
    save_onnx(restored, tmp_path / "f.onnx")
    assert not any("Quantize" in node.op_type for node in restored.graph.node)
    assert all(item.data_type != onnx.TensorProto.INT8 for item in restored.graph.initializer)
    np.testing.assert_allclose(logits(tmp_path / "f.onnx", films), logits(source, films), atol=1e-6)


def test_giving_one_block_back_leaves_the_others_in_int8(
    made: quantization.Quantised, source: Path, tmp_path: Path
) -> None:
    original = onnx.load(str(source))
    blocks = quantization.blocks_of(original)
    name = next(iter(blocks))
    graph = quantization.with_floats(onnx.load(str(made.path)), original, blocks[name])
    onnx.checker.check_model(graph)
    before = Counter(node.op_type for node in onnx.load(str(made.path)).graph.node)["DequantizeLinear"]
    after = Counter(node.op_type for node in graph.graph.node)["DequantizeLinear"]
    assert 0 < after < before


def test_blocks_that_hurt_are_left_in_float_until_the_judge_is_content(
    source: Path, films: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, recipe = next(iter(quantization.recipes().items()))
    monkeypatch.setattr(quantization, "recipes", lambda: {name: recipe})

    def strict(path: Path, *, quick: bool) -> Judgement:
        found = error(path, source, films)
        return Judgement(found, None if quick or found < limit else "too far off", (0.0, 0.0))

    recipe(source, source.with_name("plain.onnx"), films)
    limit = 0.8 * error(source.with_name("plain.onnx"), source, films)
    made = quantization.quantise(source, source.with_name("strict.onnx"), films, judge=strict)
    assert made.left_in_float
    assert made.error < min(made.errors.values())
    assert (made.reason is None) == (made.error < limit)
    assert set(made.left_in_float) <= set(quantization.blocks_of(onnx.load(str(source))))
    # They compute in float, but do not take four bytes a weight again.
    weights = [item for item in onnx.load(str(made.path)).graph.initializer if np.prod(item.dims) >= quantization.LARGE]
    assert weights and {item.data_type for item in weights} == {onnx.TensorProto.INT8}


def test_squeeze_excite_gates_are_one_block() -> None:
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Identity(x) }'
    )
    del graph.graph.node[:]
    for name in (
        "/backbone/blocks.0/blocks.0.1/se/conv_reduce/Conv",
        "/backbone/blocks.1/blocks.1.0/se/conv_expand/Conv",
    ):
        graph.graph.node.add(op_type="Conv", name=name)
    graph.graph.node.add(op_type="Conv", name="/backbone/blocks.1/blocks.1.0/conv_pw/Conv")
    graph.graph.node.add(op_type="Relu", name="/backbone/act1/Relu")
    assert list(quantization.blocks_of(graph)) == ["squeeze-excite gates", "blocks.1.0"]
    assert len(quantization.blocks_of(graph)["squeeze-excite gates"]) == 2


def test_without_nncf_onnx_runtime_does_it(
    source: Path, films: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = quantization.importlib.util.find_spec
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None if name == "nncf" else find(name))
    made = quantization.quantise(
        source, tmp_path / "q.onnx", films, judge=lambda path, quick: content(path, source, films)
    )
    assert made.recipe == "ONNX Runtime min-max"
    assert made.error < 0.1


def test_with_no_tool_the_line_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install nncf"):
        quantization.recipes()


def test_a_graph_no_tool_takes_is_one_line(
    source: Path, films: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(quantization, "recipes", lambda: {"only": broken})
    with pytest.raises(ConfigError, match="no tool takes this model .only: no such luck"):
        quantization.quantise(
            source, source.with_name("x.onnx"), films, judge=lambda path, quick: Judgement(0, None, ())
        )
