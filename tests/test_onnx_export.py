"""onnx_export.py: an ONNX file computes what torch computes, and says what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import onnx_export
from errors import ConfigError
from models import create_model
from optimization import export_to_onnx as published


def run(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip((item.name for item in session.get_outputs()), session.run(None, inputs)))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_logits_and_features_equal_those_of_torch_for_any_batch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = 160 if name == "test_vit" else 32
    model = create_model(name, 3, pretrained=False, hidden_features=8).eval()
    path = onnx_export.export_to_onnx(model, tmp_path / "m.onnx", (1, 3, size, size))
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, size, size)
        found = run(path, {"input": images.numpy()})
        with torch.inference_mode():
            features = model.features(images)
            logits = model.head(features)
        # float32 sums in another order.
        np.testing.assert_allclose(found["logits"], logits.numpy(), atol=2e-5)
        np.testing.assert_allclose(found["features"], features.numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b4", "densenet121"])
def test_the_published_models_export(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name, 2, pretrained=False, hidden_features=8).eval()
    path = onnx_export.export_to_onnx(model, tmp_path / "m.onnx", (1, 3, 64, 64))
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images).numpy()
    np.testing.assert_allclose(run(path, {"input": images.numpy()})["logits"], expected, atol=1e-4)


def test_exporting_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("test_efficientnet", 2, pretrained=False, hidden_features=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.training
    onnx_export.export_to_onnx(model, tmp_path / "m.onnx", (1, 3, 32, 32))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_published_call_and_its_opset(tmp_path: Path) -> None:
    model = create_model(model_type="test_resnet", num_classes=2, pretrained=False)
    published(model=model, output_path=str(tmp_path / "m.onnx"), input_shape=(1, 3, 32, 32), opset_version=14)
    graph = onnx.load(str(tmp_path / "m.onnx"))
    assert graph.opset_import[0].version == 14
    assert [item.name for item in graph.graph.input] == ["input"]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_metadata_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    facts = {"classes": ["a", "b"], "temperature": 1.25, "operating_point": {"rule": "youden", "threshold": 0.31}}
    path = onnx_export.export_to_onnx(nn.Flatten(), tmp_path / "m.onnx", (1, 3, 4, 4), metadata=facts)
    assert onnx_export.read_metadata(path) == facts


def test_a_model_of_several_inputs_keeps_their_names(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return image.mean((2, 3)) + tokens.float().mean(1, keepdim=True)

    inputs = {"input": torch.zeros(1, 3, 4, 4), "input_ids": torch.zeros(1, 7, dtype=torch.long)}
    path = onnx_export.export_to_onnx(Both(), tmp_path / "m.onnx", example_inputs=inputs)
    image = np.ones((5, 3, 4, 4), np.float32)
    tokens = np.arange(35).reshape(5, 7)
    found = run(path, {"input": image, "input_ids": tokens})["logits"]
    np.testing.assert_allclose(found, np.repeat(1 + tokens.mean(1, keepdims=True), 3, axis=1), rtol=1e-6)


def test_an_operator_onnx_lacks_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bessel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ConfigError, match="no operator for aten::special_bessel_j0") as caught:
        onnx_export.export_to_onnx(Bessel(), tmp_path / "m.onnx", (1, 3, 4, 4))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()
    assert capsys.readouterr().out == ""


def test_parity_counts_every_film_in_every_batch_size() -> None:
    films = np.arange(7, dtype=np.float32)[:, None]
    found = onnx_export.parity(lambda x: 2 * x, lambda x: 2 * x + len(x) * 0.5, films, batch_sizes=(1, 3))
    # Batches of 1 are 0.5 off; of 3: two of 1.5 and a last one of 1 film, 0.5.
    assert found.largest == 1.5
    assert found.mean == pytest.approx((7 * 0.5 + 6 * 1.5 + 0.5) / 14)
    assert (found.batch_sizes, found.films) == ((1, 3), 7)
