"""models.py: every family freezes, opens and trains the same way; wrong weights and names are refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from errors import CheckpointError, ConfigError

FAMILIES = [
    "test_resnet",
    "test_efficientnet",
    "test_vit",
    "test_convnext",
    "test_byobnet",
    "test_mambaout",
    "densenet121",
]


def tiny(name: str = "test_efficientnet", **settings: object) -> models.Classifier:
    settings.setdefault("hidden_features", 8)
    return models.create_model(name, 2, False, image_size=32 if "vit" not in name else 160, **settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_unfreezing_opens_the_last_stages_and_nothing_else(name: str) -> None:
    model = tiny(name, freeze_backbone=True)
    assert models.count_parameters(model).trainable == sum(item.numel() for item in model.head.parameters())
    model.unfreeze_layers(num_layers=2)
    opened = {name for name, item in model.backbone.named_parameters() if item.requires_grad}
    assert opened == set(model.stages()[-1]) | set(model.stages()[-2])
    model.unfreeze_layers(num_layers=-1)
    assert models.count_parameters(model).trainable == models.count_parameters(model).total


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_hold_every_backbone_parameter_once(name: str) -> None:
    model = tiny(name)
    listed = [item for stage in model.stages() for item in stage]
    assert sorted(listed) == sorted(item for item, _ in model.backbone.named_parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_backbone_stands_still_while_the_head_trains(name: str) -> None:
    torch.manual_seed(0)
    model = tiny(name, freeze_backbone=True).train()
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    images = torch.randn(4, 3, 160 if "vit" in name else 32, 160 if "vit" in name else 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert not any(module.training for module in model.backbone.modules())


def test_the_open_tail_trains_and_the_frozen_batch_norms_stay_in_eval() -> None:
    model = tiny("test_resnet", freeze_backbone=True)
    model.unfreeze_layers(num_layers=1)
    model.train()
    norms = {name: module for name, module in model.backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    frozen = [module for module in norms.values() if not module.weight.requires_grad]
    opened = [module for module in norms.values() if module.weight.requires_grad]
    assert frozen and opened
    assert not any(module.training for module in frozen) and all(module.training for module in opened)


def test_eval_mode_reaches_every_module() -> None:
    model = tiny("test_resnet", freeze_backbone=True)
    model.unfreeze_layers(num_layers=-1)
    model.train().eval()
    assert not any(module.training for module in model.modules())


def test_a_backbone_without_stages_of_its_own_is_grouped_by_its_children() -> None:
    backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert models._stages(backbone) == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]


def test_a_negative_number_of_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match="-2 is not a number of stages"):
        tiny().unfreeze_layers(num_layers=-2)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b4", "densenet121"])
def test_a_published_model_has_the_published_head(name: str) -> None:
    model = models.create_model(
        model_type=name, num_classes=3, pretrained=False, freeze_backbone=True, dropout_rate=0.4
    )
    kinds = [type(item).__name__ for item in model.head]
    assert kinds == ["Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert (model.head[1].out_features, model.head[4].out_features, model.head[0].p) == (512, 3, 0.4)


def test_features_feed_the_head() -> None:
    model = tiny().eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model.head(model.features(images)))


def test_count_parameters_unpacks_and_agrees_with_torch() -> None:
    model = tiny(freeze_backbone=True)
    total, trainable = models.count_parameters(model)
    assert total == sum(item.numel() for item in model.parameters())
    assert trainable == sum(item.numel() for item in model.parameters() if item.requires_grad)


def test_parameter_groups_hold_every_parameter_once_at_its_own_rate() -> None:
    model = tiny(freeze_backbone=True)
    groups = models.parameter_groups(model, learning_rate=1e-3, backbone_lr=1e-4, weight_decay=0.1)
    listed = [id(item) for group in groups for item in group["params"]]
    assert sorted(listed) == sorted(id(item) for item in model.parameters())
    for group in groups:
        assert group["lr"] == (1e-3 if group["name"] == "head" else 1e-4)
        assert all((item.ndim > 1) == (group["weight_decay"] == 0.1) for item in group["params"])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet5O", "resnet50"), ("efficientnet-b4", "efficientnet_b4"), ("densnet121", "densenet121")],
)
def test_an_unknown_model_is_answered_with_near_names(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown model '{name}'.*'{nearest}'"):
        models.create_model(name, pretrained=False)


def test_one_class_is_too_few() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        models.create_model("test_resnet", num_classes=1, pretrained=False)


# --- weights ---


def test_timm_weights_fill_the_backbone_and_skip_the_classifier(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    source = timm.create_model("test_efficientnet", num_classes=7)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = tiny(weights=tmp_path / "w.safetensors")
    state = source.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.backbone.state_dict().items())


def test_weights_of_a_checkpoint_of_ours_fill_the_backbone(trained: Path) -> None:
    model = tiny(weights=trained / "best_model.pth")
    state = torch.load(trained / "best_model.pth", weights_only=True)["model_state_dict"]
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in model.backbone.state_dict().items())


def test_weights_of_another_architecture_are_refused_by_key(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"another architecture than this EfficientNet: \d+ missing .*unexpected"):
        tiny(weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such weights file"), (b"", "not a readable weights file"), (b"text", "not a readable weights file")],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_weights_file_that_is_none_is_refused(
    tmp_path: Path, content: bytes | None, message: str, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        tiny(weights=path)


def test_a_pickle_that_would_run_code_is_refused_as_weights(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        tiny(weights=tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_without_a_hub_pretrained_weights_end_in_seconds_and_name_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"no hub in reach; .*--weights FILE.*--no-pretrained.*cache folder"):
        models.create_model("resnet18", pretrained=True)
    assert time.perf_counter() - started < 10


def test_the_normalisation_is_that_of_the_weights() -> None:
    assert models.normalisation(models.create_model("tf_efficientnet_lite0", pretrained=False)) == (
        (0.5,) * 3,
        (0.5,) * 3,
    )
    assert models.normalisation(tiny("test_resnet"))[0] == models.timm.get_pretrained_cfg("test_resnet").mean
