"""Image classifiers: any timm backbone under one small head, frozen and unfrozen stage by stage.

    python models.py            # a short self-check on random weights

`create_model` is the door; weights come from a local file, timm's hub (or its cache), or nowhere. A module whose
parameters are all frozen stays in eval mode while the rest trains: batch-norm statistics and dropout stand still.
"""

from __future__ import annotations

import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from config import ModelConfig
from errors import CheckpointError, ConfigError, examples, first_line, nearest

HUB_TIMEOUT_S = 4.0
"""How long to wait for the hub's name and port before saying that there is none."""


class ParameterCount(NamedTuple):
    """Number of scalar parameters."""

    total: int
    trainable: int


def make_head(width: int, *, num_classes: int, dropout_rate: float, hidden_features: int) -> nn.Sequential:
    """features → hidden → classes with dropout before each linear layer; features → classes when hidden is 0."""
    if not hidden_features:
        return nn.Sequential(nn.Dropout(dropout_rate), nn.Linear(width, num_classes))
    return nn.Sequential(
        nn.Dropout(dropout_rate),
        nn.Linear(width, hidden_features),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout_rate),
        nn.Linear(hidden_features, num_classes),
    )


class Classifier(nn.Module):
    """A timm backbone and the head of `make_head`."""

    def __init__(self, backbone: nn.Module, *, num_classes: int, dropout_rate: float, hidden_features: int) -> None:
        super().__init__()
        self.backbone = backbone
        facts: Any = backbone
        width = int(getattr(facts, "head_hidden_size", None) or facts.num_features)
        self.head = make_head(
            width, num_classes=num_classes, dropout_rate=dropout_rate, hidden_features=hidden_features
        )

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Pooled backbone features (B, F) of normalised images (B, 3, H, W)."""
        return self.backbone(images_BCHW)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, 3, H, W)."""
        return self.head(self.features(images_BCHW))

    def stages(self) -> list[list[str]]:
        """Parameter names of the backbone, grouped into its stages from input to output."""
        return [list(names) for names in _stages(self.backbone)]

    def freeze_backbone(self) -> None:
        """Train the head only."""
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def unfreeze_layers(self, num_layers: int = 1) -> None:
        """Train the last `num_layers` stages of the backbone as well; -1 or more than there are opens all of them."""
        if num_layers < -1:
            raise ConfigError(f"unfreeze_layers: {num_layers} is not a number of stages; use 0 or more, or -1 for all")
        stages = self.stages()
        opened = stages if num_layers == -1 else stages[max(0, len(stages) - num_layers) :]
        parameters = dict(self.backbone.named_parameters())
        for names in opened:
            for name in names:
                parameters[name].requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """Like nn.Module.train, but modules with nothing left to train stay in eval mode."""
        super().train(mode)
        if mode:
            keep_frozen_still(self.backbone)
        return self


def keep_frozen_still(module: nn.Module) -> bool:
    """Put every fully frozen submodule into eval mode; whether `module` has a trainable parameter."""
    parameters = list(module.parameters())
    if parameters and not any(item.requires_grad for item in parameters):
        module.eval()
        return False
    for child in module.children():
        keep_frozen_still(child)
    return True


def _stages(backbone: nn.Module) -> list[list[str]]:
    """timm's coarse parameter groups (stem, then a stage or block each); the top-level children where it has none."""
    matcher: Callable[..., Any] | None = getattr(backbone, "group_matcher", None)
    if matcher is not None:
        return list(group_parameters(backbone, matcher(coarse=True)).values())
    groups: OrderedDict[str, list[str]] = OrderedDict()
    for name, _ in backbone.named_parameters():
        groups.setdefault(name.split(".")[0], []).append(name)
    return list(groups.values())


def create_model(
    model_type: str = "resnet50",
    num_classes: int = 2,
    pretrained: bool = True,
    freeze_backbone: bool = False,
    dropout_rate: float = 0.3,
    *,
    hidden_features: int = 512,
    weights: str | Path | None = None,
    image_size: int | None = None,
) -> Classifier:
    """A classifier on the timm backbone `model_type`.

    `weights` (a file in timm layout) wins over `pretrained` (timm's hub or its cache); with neither, weights are
    random from torch's generator. `image_size` matters to networks with a fixed grid, such as ViT. ConfigError for
    an unknown name; CheckpointError for weights that cannot be had or belong to another architecture.
    """
    if num_classes < 2:
        raise ConfigError(f"num_classes: {num_classes} is too few; a classifier needs at least 2")
    check_model_name(model_type)
    backbone = _create_backbone(model_type, image_size)
    if weights is not None:
        load_weights(backbone, Path(weights))
    elif pretrained:
        load_weights(backbone, _pretrained_file(model_type))
    model = Classifier(backbone, num_classes=num_classes, dropout_rate=dropout_rate, hidden_features=hidden_features)
    if freeze_backbone:
        model.freeze_backbone()
    return model


def model_from_config(config: ModelConfig, *, num_classes: int, image_size: int, random: bool = False) -> Classifier:
    """The classifier a configuration describes; `random` skips its pretrained weights (a checkpoint follows)."""
    return create_model(
        config.model_type,
        num_classes,
        config.pretrained and not random,
        config.freeze_backbone,
        config.dropout_rate,
        hidden_features=config.hidden_features,
        weights=None if random else config.weights,
        image_size=image_size,
    )


def check_model_name(name: str) -> None:
    """ConfigError with the nearest names when timm knows no model `name`."""
    if not timm.is_model(name):
        raise ConfigError(
            f"model.model_type: unknown model {name!r}{nearest(name, timm.list_models(), count=3)} "
            "(all names: python -c 'import timm; print(timm.list_models())')"
        )


def has_fixed_grid(name: str) -> bool:
    """Whether the network takes films of one size only."""
    facts: Any = timm.get_pretrained_cfg(name)  # None for a network registered without published weights
    return facts is not None and bool(facts.fixed_input_size)


def _create_backbone(name: str, image_size: int | None) -> nn.Module:
    grid: dict[str, Any] = {"img_size": image_size} if image_size and has_fixed_grid(name) else {}
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **grid)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model.model_type: {name!r} cannot be built for {image_size} px ({error})") from None


def normalisation(model: Classifier) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(mean, std) per channel that the backbone's published weights expect."""
    facts = getattr(model.backbone, "pretrained_cfg", {})
    mean = facts.get("mean", (0.485, 0.456, 0.406))
    std = facts.get("std", (0.229, 0.224, 0.225))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


# --- weights ---------------------------------------------------------------------------------------------------


def load_weights(backbone: nn.Module, path: Path) -> None:
    """Fill `backbone` from a weights file in timm layout, or from a checkpoint of this program; the head is ignored.

    CheckpointError when the file is missing, unreadable, or of another architecture (naming keys).
    """
    state = _without_classifier(_read_weights(path), backbone)
    own = backbone.state_dict()
    absent = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    foreign = [name for name in state if name not in own]
    reshaped = [name for name in state if name in own and state[name].shape != own[name].shape]
    if absent or foreign or reshaped:
        kind = type(backbone).__name__
        facts = [
            f"{len(names)} {what} ({examples(names, count=2)})"
            for what, names in (("missing", absent), ("unexpected", foreign), ("of another shape", reshaped))
            if names
        ]
        raise CheckpointError(
            f"{path}: weights of another architecture than this {kind}: {'; '.join(facts)}; name theirs with --model"
        )
    backbone.load_state_dict(state, strict=False)


def require_weights_file(path: Path) -> None:
    """CheckpointError when there is no file at `path`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; check --weights, or start from random: --no-pretrained")


def _read_weights(path: Path) -> dict[str, Tensor]:
    require_weights_file(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable weights file ({first_line(error)}); fetch it again") from None
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(item, Tensor) for item in state.values()):
        raise CheckpointError(f"{path}: holds no weights by name")
    if any(name.startswith("backbone.") for name in state):
        return {name[len("backbone.") :]: item for name, item in state.items() if name.startswith("backbone.")}
    return dict(state)


def _without_classifier(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    named = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    heads = (named,) if isinstance(named, str) else tuple(named)
    return {name: item for name, item in state.items() if not any(name.startswith(f"{head}.") for head in heads)}


def _pretrained_file(name: str) -> Path:
    """The cached or downloaded weights file that timm publishes for `name`."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    facts: Any = timm.get_pretrained_cfg(name)
    repository = facts and facts.hf_hub_id
    if not repository:
        raise CheckpointError(f"model.pretrained: timm publishes no weights for {name!r}; use --no-pretrained")
    for filename in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, filename)
        if isinstance(cached, str):
            return Path(cached)
    help_line = (
        f"give a local file with --weights FILE.safetensors, start from random with --no-pretrained, or fill the "
        f"cache folder {constants.HF_HUB_CACHE} (repository {repository})"
    )
    if not hub_answers(constants.ENDPOINT):
        raise CheckpointError(f"model.pretrained: no weights of {name!r} in the cache and no hub in reach; {help_line}")
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:
        raise CheckpointError(
            f"model.pretrained: the weights of {name!r} cannot be had ({first_line(error)}); {help_line}"
        ) from None


def hub_answers(endpoint: str) -> bool:
    """Whether the hub's port opens in seconds; its own client would retry for most of a minute."""
    import os

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    address = urlparse(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=HUB_TIMEOUT_S).close()
            answered.set()
        except OSError:
            pass

    # A thread, because the look-up of the name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answered.is_set()


# --- parameters ------------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> ParameterCount:
    """Total and trainable scalar parameters; unpacks as (total, trainable)."""
    sizes = [(item.numel(), item.requires_grad) for item in model.parameters()]
    return ParameterCount(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


def parameter_groups(
    model: Classifier, *, learning_rate: float, backbone_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: head and backbone at their own rates, vectors (biases, norms) without weight decay.

    Frozen parameters are included: they get no gradient, so the optimizer passes them by, and unfreezing them later
    changes neither the groups nor the order that a checkpoint relies on.
    """
    groups = []
    for name, part, rate in (("head", model.head, learning_rate), ("backbone", model.backbone, backbone_lr)):
        for decayed in (True, False):
            parameters = [item for item in part.parameters() if (item.ndim > 1) == decayed]
            if parameters:
                decay = weight_decay if decayed else 0.0
                groups.append({"name": name, "params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    return groups


def self_check(say: Callable[[str], None] = print) -> None:
    """Build the three published models from random weights and show what freezing does to them."""
    for name in ("resnet50", "efficientnet_b4", "densenet121"):
        model = create_model(model_type=name, num_classes=2, pretrained=False, freeze_backbone=True)
        frozen = count_parameters(model)
        model.unfreeze_layers(num_layers=2)
        model.eval()
        with torch.inference_mode():
            logits = model(torch.zeros(1, 3, 64, 64))
        say(
            f"{name}: {frozen.total / 1e6:.1f} M parameters, {frozen.trainable / 1e6:.2f} M trainable frozen, "
            f"{count_parameters(model).trainable / 1e6:.1f} M with 2 of {len(model.stages())} stages open, "
            f"logits {tuple(logits.shape)}"
        )
    say("models: ok")


if __name__ == "__main__":
    self_check()
