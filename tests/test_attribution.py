"""Heat maps: equal to the reference library and to a computation by hand, on every kind of network."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import attribution
from attribution import CAMS, METHODS, attributions, heat_map, overlay, target_layer, torch_model
from engines import InputScaling
from errors import CheckpointError, ConfigError
from models import Classifier, create_model
from preprocess import PreprocessSpec

SIDE = 96
SPEC = PreprocessSpec(image_size=SIDE)


def network(name: str, side: int = SIDE, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return create_model(name, 3, pretrained=False, hidden_features=16, image_size=side).eval()


def noise(count: int = 3, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def inputs(images: np.ndarray) -> torch.Tensor:
    return InputScaling(PreprocessSpec(image_size=images.shape[1]))(torch.as_tensor(images))


def tokens_to_grid(values: torch.Tensor) -> torch.Tensor:
    side = int((values.shape[1] - 1) ** 0.5)
    return values[:, 1:].transpose(1, 2).reshape(len(values), -1, side, side)


@pytest.mark.parametrize("method", CAMS)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_cam_equals_that_of_the_reference_library(name: str, method: str) -> None:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    side = 160 if name == "test_vit" else SIDE
    model, images = network(name, side), noise(side=side)
    layer = model.backbone.blocks[-1].norm1 if name == "test_vit" else model.backbone.get_submodule("layer3")
    reshape = tokens_to_grid if name == "test_vit" else None
    reference = getattr(pytorch_grad_cam, CAMS[method])(model, [layer], reshape_transform=reshape)
    names = {module: key for key, module in model.named_modules()}
    ranges = []
    for target in range(3):
        expected = reference(inputs(images), [ClassifierOutputTarget(target)] * 3)
        found = attributions(
            model, PreprocessSpec(image_size=side), images, methods=[method], target=target, layer=names[layer]
        )
        # The rules are the library's own: what may differ is the rounding of the gradients.
        assert np.abs(found[method].map_BSS - expected).max() < 1e-4
        ranges.append(np.ptp(expected))
    assert max(ranges) > 0.5


def test_grad_cam_equals_a_computation_by_hand() -> None:
    """Selvaraju 2017 from its formula: channel weights are mean gradients, the map is the positive part of the sum."""
    model, images = network("test_resnet"), noise()
    kept: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        kept["activation"] = output

    handle = model.backbone.get_submodule("layer3").register_forward_hook(keep)
    model(inputs(images))[:, 0].sum().backward()
    handle.remove()
    activation, gradient = kept["activation"].detach().numpy(), kept["activation"].grad.numpy()
    for number, map_SS in enumerate(heat_map(model, SPEC, images, target=0)):
        cam = sum(gradient[number, k].mean() * activation[number, k] for k in range(activation.shape[1]))
        cam = np.maximum(cam, 0)
        cam = cv2.resize((cam - cam.min()) / (cam - cam.min()).max(), (SIDE, SIDE))
        expected = (cam - cam.min()) / (cam - cam.min()).max()
        # The library adds 1e-7 to the divisor, which shows for gradients as small as a random network's.
        assert np.abs(map_SS - expected).max() < 1e-3


def test_hires_cam_sums_to_the_score_of_a_linear_read_out() -> None:
    """Draelos 2020: with average pooling and one linear layer the raw map's sum is the logit without its bias."""
    model, images = network("test_resnet", 160), noise(side=160)
    model.head = nn.Sequential(nn.Linear(model.head[1].in_features, 3))
    activations, gradients = attribution.activations_and_gradients(
        model, inputs(images), torch.tensor([0, 1, 2]), layer="backbone.layer4"
    )
    with torch.inference_mode():
        logits = model(inputs(images)) - model.head[0].bias
    expected = [float(logits[number, number]) for number in range(3)]
    assert np.allclose((activations * gradients).sum(axis=(1, 2, 3)), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "side", "layer", "grid"),
    [
        ("test_resnet", 128, "backbone.layer4", 4),
        ("test_resnet", 64, "backbone.layer3", 4),  # layer4 would have 2 cells a side
        ("test_efficientnet", 32, "backbone.blocks.2", 4),
        ("test_convnext", 160, "backbone.stages.3", 5),
        ("test_mambaout", 160, "backbone.stages.3", 5),  # channels last
        ("test_vit", 160, "backbone.blocks.5.norm1", 10),  # a class token
        ("test_vit3", 160, "backbone.blocks.8.norm1", 10),  # register tokens
        ("densenet121", 128, "backbone.features.norm5", 4),
        ("swin_tiny_patch4_window7_224", 128, "backbone.layers.3", 4),
    ],
)
def test_the_last_feature_stage_is_mapped(name: str, side: int, layer: str, grid: int) -> None:
    model = network(name, side)
    assert target_layer(model, side) == layer
    activations, gradients = attribution.activations_and_gradients(
        model, inputs(noise(1, side)), torch.zeros(1, dtype=torch.long)
    )
    assert activations.shape == gradients.shape and activations.shape[2:] == (grid, grid)
    assert np.abs(gradients).max() > 0


def test_a_network_without_a_usable_last_stage_is_searched_for_its_last_map() -> None:
    model = network("hrnet_w18_small", 64)  # its stages put out lists
    activations, _ = attribution.activations_and_gradients(
        model, inputs(noise(1, 64)), torch.zeros(1, dtype=torch.long)
    )
    assert activations.shape[2] == activations.shape[3] >= attribution.MIN_GRID


@pytest.mark.parametrize("method", METHODS)
def test_the_map_lies_where_the_evidence_is(method: str) -> None:
    """A network that measures the brightness of one quarter of the film must be shown to look there."""
    model = Classifier(Brightness(), num_classes=2, dropout_rate=0.0, hidden_features=0)
    with torch.no_grad():
        model.head[-1].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        model.head[-1].bias.zero_()
    images = np.full((2, 64, 64, 1), 40, dtype=np.uint8)
    images[0, 8:24, 40:56] = 220  # upper right, which the network reads
    images[1, 8:24, 40:56] = 180
    spec = PreprocessSpec(image_size=64, mean=(0.0,) * 3, std=(1.0,) * 3)
    maps = attributions(model, spec, images, methods=[method], target=1, layer="backbone.conv")[method].map_BSS
    for map_SS in maps:
        row, column = np.unravel_index(map_SS.argmax(), map_SS.shape)
        assert row < 32 <= column
        assert map_SS[:32, 32:].sum() > 0.8 * map_SS.sum()
        assert map_SS.min() >= 0 and map_SS.max() == pytest.approx(1, abs=1e-3)


class Brightness(nn.Module):
    """Channel 0 is the brightness of the upper right quarter, channel 1 that of the rest."""

    num_features = 2
    feature_info = ({"module": "conv", "reduction": 4, "num_chs": 2},)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.AvgPool2d(4), Quarter())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean(dim=(2, 3))


class Quarter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grey = images.mean(dim=1, keepdim=True) * self.gain
        inside = torch.zeros_like(grey)
        half = grey.shape[-1] // 2
        inside[..., :half, half:] = 1
        return torch.cat([grey * inside, grey * (1 - inside)], dim=1)


def test_integrated_gradients_sum_to_the_difference_of_the_logits() -> None:
    model, images = network("test_resnet", 64), noise(2, 64)
    raw = attributions(model, SPEC, images, methods=["integrated_gradients"], target=1)
    with torch.inference_mode():
        there, black = model(inputs(images))[:, 1], model(inputs(np.zeros_like(images)))[:, 1]
    difference = (there - black).numpy()
    error = np.abs(raw["integrated_gradients"].raw_BSS.sum(axis=(1, 2)) - difference)
    # 32 points on a path over kinks of ReLUs.
    assert (error < 0.05 * np.abs(difference).max() + 1e-5).all()


def test_occlusion_is_what_the_logit_loses() -> None:
    model, images = network("test_resnet", 56), noise(1, 56)
    raw = attributions(model, PreprocessSpec(image_size=56), images, methods=["occlusion"], target=0)
    normalised = inputs(images)
    grey = normalised.mean(dim=(2, 3), keepdim=True)
    with torch.inference_mode():
        whole = float(model(normalised)[0, 0])
        covered = normalised.clone()
        covered[:, :, :8, :8] = grey
        lost = whole - float(model(covered)[0, 0])
    # Only the first window covers the corner pixel.
    assert raw["occlusion"].raw_BSS[0, 0, 0] == pytest.approx(lost, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", ["gradcam", "shap"])
def test_a_map_repeats_and_leaves_the_random_streams_alone(method: str) -> None:
    model, images = network("test_resnet", 64), noise(2, 64)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    first = heat_map(model, SPEC, images, method=method, target=1)
    drawn = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert torch.equal(drawn[0], torch.rand(1)) and drawn[1] == np.random.rand()  # noqa: NPY002
    assert np.array_equal(first, heat_map(model, SPEC, images, method=method, target=1))


def test_a_film_has_the_same_map_alone_as_in_a_batch() -> None:
    model, images = network("test_resnet"), noise()
    together = heat_map(model, SPEC, images, target=1)
    alone = heat_map(model, SPEC, images[1:2], target=1)
    assert np.abs(together[1] - alone[0]).max() < 1e-3


def test_no_target_means_the_most_probable_class_and_targets_may_differ() -> None:
    model, images = network("test_resnet"), noise()
    with torch.inference_mode():
        best = model(inputs(images)).argmax(dim=1).numpy()
    assert np.array_equal(heat_map(model, SPEC, images), heat_map(model, SPEC, images, target=best))
    mixed = heat_map(model, SPEC, images, target=np.array([0, 1, 2]))
    assert np.allclose(mixed[2], heat_map(model, SPEC, images, target=2)[2], atol=1e-4)


def test_weights_and_gradients_of_the_model_are_left_alone() -> None:
    model = network("test_resnet")
    before = {name: item.clone() for name, item in model.state_dict().items()}
    heat_map(model, SPEC, noise(), target=1)
    assert all(torch.equal(item, before[name]) for name, item in model.state_dict().items())
    assert all(item.grad is None and item.requires_grad for item in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_predictions_in_another_thread_are_not_disturbed() -> None:
    model, images = network("test_resnet"), noise(1)
    with torch.inference_mode():
        expected = model(inputs(images))
    found: list[torch.Tensor] = []

    def serve() -> None:
        with torch.inference_mode():
            for _ in range(20):
                found.append(model(inputs(images)))

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(5):
        heat_map(model, SPEC, images, target=1)
    thread.join()
    assert len(found) == 20
    assert all(torch.allclose(item, expected, atol=1e-5) for item in found)


def test_flat_evidence_is_a_map_of_zeros() -> None:
    model = network("test_resnet")
    with torch.no_grad():
        model.head[-1].weight.zero_()
    result = attributions(model, SPEC, noise(), methods=["gradcam", "layercam"], target=0)
    assert all((item.map_BSS == 0).all() and (item.raw_BSS == 0).all() for item in result.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["gradcamm"]}, "'gradcamm' is not one of .* did you mean 'gradcam'"),
        ({"methods": ["gradcam"], "layer": "backbone.layer5"}, "no module 'backbone.layer5'; did you mean"),
        ({"methods": ["gradcam"], "layer": "head"}, "'head' gives an output of shape"),
    ],
)
def test_a_wrong_method_or_layer_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attributions(network("test_resnet"), SPEC, noise(1), **settings)


# --- overlay ---------------------------------------------------------------------------------------------------


def test_an_overlay_colours_hot_places_and_leaves_cold_ones_as_they_are() -> None:
    image = np.full((8, 8, 1), 100, dtype=np.uint8)
    heat = np.zeros((8, 8), dtype=np.float32)
    heat[2, 5] = 1
    picture = overlay(image, heat, opacity=0.5)
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    changed = (picture != 100).any(axis=2)
    assert changed[2, 5] and changed.sum() == 1
    red, _, blue = picture[2, 5].astype(int)
    assert red > blue


def test_an_overlay_of_no_opacity_is_the_film() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(overlay(colour, np.ones((8, 8)), opacity=0), colour)


# --- the model of a checkpoint or a bundle ---------------------------------------------------------------------


def bundle(folder: Path, *, path: str, content: bytes) -> Path:
    folder.mkdir()
    facts = {"checkpoint": {"path": path, "sha256": hashlib.sha256(content).hexdigest()}}
    (folder / "bundle.json").write_text(json.dumps(facts))
    return folder


def test_the_model_of_a_checkpoint_knows_its_classes(trained: Path) -> None:
    explained = torch_model(trained / "best_model.pth", device="cpu")
    assert explained.classes == ("NORMAL", "PNEUMONIA")
    assert explained.spec.image_size == 32 and explained.device.type == "cpu"
    assert heat_map(explained.model, explained.spec, noise(2, 32)).shape == (2, 32, 32)


def test_a_bundle_is_explained_through_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    source = trained / "best_model.pth"
    folder = bundle(tmp_path / "b", path=str(source), content=source.read_bytes())
    assert torch_model(folder, device="cpu").checkpoint == source


def test_a_moved_checkpoint_is_named_and_can_be_given(trained: Path, tmp_path: Path) -> None:
    source = trained / "best_model.pth"
    folder = bundle(tmp_path / "b", path="/gone/best_model.pth", content=source.read_bytes())
    with pytest.raises(CheckpointError, match="/gone/best_model.pth is not there; say where it is now with --check"):
        torch_model(folder)
    assert torch_model(folder, checkpoint=source, device="cpu").checkpoint == source


def test_another_checkpoint_than_the_bundle_s_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", path=str(trained / "best_model.pth"), content=b"another")
    with pytest.raises(CheckpointError, match="not the checkpoint that .* was made from"):
        torch_model(folder)


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder without bundle.json"):
        torch_model(tmp_path)
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no checkpoint it was made from"):
        torch_model(tmp_path)
