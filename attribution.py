"""Where in a film a class score comes from: class activation maps, gradients, occlusion; one call for any timm model.

    explained = torch_model("checkpoints/best_model.pth")
    maps_BSS = heat_map(explained.model, explained.spec, images_BHWC, method="gradcam", target=1)
    picture = overlay(images_BHWC[0], maps_BSS[0])

The rules are those of pytorch-grad-cam and captum; what is explained is the logit of one class, computed in float32.
A map lies on the film as the model saw it (after `preprocess.apply`), pixel on pixel. Legend: B batch, S side of the
film in pixels, H and W the layer's own grid, C channels.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import predictor
from bundle import sha256
from engines import InputScaling, TorchEngine
from errors import CheckpointError, ConfigError, nearest
from fold_ensemble import FoldEnsemble, is_ensemble
from models import Classifier
from predictor import Predictor
from preprocess import PreprocessSpec
from runtime import memory_advice

FloatArray = npt.NDArray[np.floating[Any]]
Uint8Array = npt.NDArray[np.uint8]
CPU = torch.device("cpu")

CAMS = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "hirescam": "HiResCAM", "layercam": "LayerCAM"}
"""Method → class of pytorch-grad-cam; all of them need the activations and gradients of one layer only."""
PIXEL_METHODS = ("integrated_gradients", "occlusion", "shap")
METHODS = (*CAMS, *PIXEL_METHODS)

MIN_GRID = 4
"""A coarser last layer (deep networks on small films) would place evidence to half a film: an earlier stage is used."""
IG_STEPS = 32
"""Points on the path from the black film; Gauss-Legendre, so the sum meets the logit difference to a few per cent."""
SHAP_SAMPLES = 16
"""Random points between a uniform film and the film, per film."""
SHAP_NOISE = 0.1
"""Standard deviation of the noise on each of them, in normalised units."""
SMOOTHING = 1 / 56
"""Gaussian on the maps of single-pixel methods, as a share of the side; the raw attribution stays unsmoothed."""


@dataclass(frozen=True)
class Attribution:
    """What one method says of a batch."""

    raw_BSS: npt.NDArray[np.float32]
    """Evidence for the class in the method's own units; signed for the pixel methods, never negative for the maps."""
    map_BSS: npt.NDArray[np.float32]
    """Evidence for the class (its positive part), each film scaled to [0, 1]; all 0 where there is none."""


@dataclass(frozen=True)
class Explained:
    """A torch model with what stood in its checkpoint."""

    predictor: Predictor
    checkpoint: Path

    @property
    def model(self) -> Classifier:
        """The network, in eval mode."""
        engine = self.predictor.engine
        if not isinstance(engine, TorchEngine):
            raise ConfigError(f"{self.checkpoint}: reads notes beside films; use main.py explain CASES.csv")
        return engine.model

    @property
    def spec(self) -> PreprocessSpec:
        """How a film becomes the array the model sees."""
        return self.predictor.spec

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.predictor.classes

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device


# --- the model -------------------------------------------------------------------------------------------------


def torch_model(path: str | Path, *, checkpoint: str | Path | None = None, device: str = "auto") -> Explained:
    """The torch model of a checkpoint, or of the checkpoint that a bundle folder was made from.

    `checkpoint` names it where it has moved since; its hash is compared with the bundle's. CheckpointError when it is
    missing, or not the one the bundle was made from.
    """
    path = Path(path)
    is_bundle = path.is_dir() and not is_ensemble(path)
    source = _bundle_checkpoint(path, checkpoint) if is_bundle else path
    return Explained(predictor.load(source, device=device, precision="fp32"), source)


def _bundle_checkpoint(bundle: Path, given: str | Path | None) -> Path:
    """The checkpoint that bundle.json names, or `given` in its place, its hash checked."""
    try:
        facts = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["checkpoint"]
        named, digest = str(facts["path"]), str(facts["sha256"])
    except OSError:
        raise CheckpointError(
            f"{bundle}: is a folder without bundle.json; name a checkpoint file, or a folder that optimize wrote"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{bundle / 'bundle.json'}: names no checkpoint it was made from; name that alone, with --checkpoint"
        ) from None
    found = bundle / named if given is None else Path(given)
    if not found.is_file():
        raise CheckpointError(
            f"{bundle}: explanations need the checkpoint it was made from, and {found} is not there; say "
            "where it is now with --checkpoint"
        )
    if sha256(found) != digest:
        raise CheckpointError(f"{found}: not the checkpoint that {bundle} was made from (its SHA-256 differs)")
    return found


# --- attribution -----------------------------------------------------------------------------------------------


def heat_map(
    model: Classifier,
    spec: PreprocessSpec,
    images_BHWC: Uint8Array,
    *,
    method: str = "gradcam",
    target: int | npt.NDArray[np.int64] | None = None,
    device: torch.device = CPU,
) -> npt.NDArray[np.float32]:
    """Evidence for class `target` in each film (B, S, S, C), scaled to [0, 1]: (B, S, S).

    `target` is one class for all films or one each (B,); None takes each film's most probable class.
    """
    return attributions(model, spec, images_BHWC, methods=[method], target=target, device=device)[method].map_BSS


def attributions(
    model: Classifier,
    spec: PreprocessSpec,
    images_BHWC: Uint8Array,
    *,
    methods: Sequence[str],
    target: int | npt.NDArray[np.int64] | None = None,
    device: torch.device = CPU,
    layer: str | None = None,
    seed: int = 0,
) -> dict[str, Attribution]:
    """What each of `methods` says of the films; the activation maps share one pass.

    `layer` names the module whose activations are mapped, None takes the last feature stage; `seed` is that of shap.
    """
    check_methods(methods)
    model.to(device).eval()
    inputs_BCHW = InputScaling(spec).to(device)(torch.tensor(images_BHWC))  # a copy: decoded films are read-only
    with memory_advice(len(images_BHWC)), torch.autocast(device.type, enabled=False):
        targets_B = _targets(model, inputs_BCHW, target)
        if isinstance(model, FoldEnsemble):
            settings: dict[str, Any] = {"methods": methods, "device": device, "layer": layer, "seed": seed}
            settings["target"] = targets_B.cpu().numpy()
            found = [attributions(member, spec, images_BHWC, **settings) for member in model.classifiers]
            return _mean_of_members(model, found)
        results: dict[str, Attribution] = {}
        if cams := [name for name in methods if name in CAMS]:
            results |= _activation_maps(model, inputs_BCHW, targets_B, methods=cams, layer=layer)
        for name in methods:
            if name not in CAMS:
                raw_BSS = PIXEL_RULES[name](model, spec, inputs_BCHW, targets_B, seed)
                results[name] = Attribution(raw_BSS, _scaled(_smoothed(np.maximum(raw_BSS, 0))))
    return {name: results[name] for name in methods}


def _mean_of_members(ensemble: FoldEnsemble, found: Sequence[dict[str, Attribution]]) -> dict[str, Attribution]:
    """What the members' maps say of their mean, whose logits are those of the members, each at its temperature."""
    results = {}
    for name in found[0]:
        scaled = [item[name].raw_BSS / own for item, own in zip(found, ensemble.temperatures)]
        raw_BSS = np.stack(scaled).mean(axis=0).astype(np.float32)
        evidence_BSS = raw_BSS if name in CAMS else _smoothed(np.maximum(raw_BSS, 0))
        results[name] = Attribution(raw_BSS, _scaled(evidence_BSS))
    return results


def check_methods(methods: Sequence[str]) -> None:
    """ConfigError for a method that is not known."""
    for name in methods:
        if name not in METHODS:
            raise ConfigError(f"--method: {name!r} is not one of {', '.join(METHODS)}{nearest(name, METHODS)}")


@torch.no_grad()
def _targets(model: Classifier, inputs_BCHW: Tensor, target: int | npt.NDArray[np.int64] | None) -> Tensor:
    if target is None:
        return model(inputs_BCHW).argmax(dim=1)
    given = np.broadcast_to(np.asarray(target, dtype=np.int64), (len(inputs_BCHW),))
    return torch.from_numpy(given.copy()).to(inputs_BCHW.device)


def _smoothed(maps_BSS: FloatArray) -> npt.NDArray[np.float32]:
    sigma = SMOOTHING * maps_BSS.shape[-1]
    return np.stack([cv2.GaussianBlur(item.astype(np.float32), (0, 0), sigma) for item in maps_BSS])


def _scaled(maps_BHW: FloatArray, side: int | None = None) -> npt.NDArray[np.float32]:
    """Each map's range brought to [0, 1], then resized to `side`, the way pytorch-grad-cam does both."""
    from pytorch_grad_cam.utils.image import scale_cam_image

    return scale_cam_image(scale_cam_image(maps_BHW, None if side is None else (side, side)))


# --- class activation maps -------------------------------------------------------------------------------------


def _activation_maps(
    model: Classifier, inputs_BCHW: Tensor, targets_B: Tensor, *, methods: Sequence[str], layer: str | None
) -> dict[str, Attribution]:
    import pytorch_grad_cam

    side = inputs_BCHW.shape[-1]
    activations_BCHW, gradients_BCHW = activations_and_gradients(model, inputs_BCHW, targets_B, layer=layer)
    results = {}
    for name in methods:
        # Its rule alone is used: the library's own pass would go back to the pixels, and to every weight.
        rule = getattr(pytorch_grad_cam, CAMS[name])(model, [])
        cam_BHW = np.maximum(rule.get_cam_image(None, None, None, activations_BCHW, gradients_BCHW, False), 0)
        raw_BSS = np.stack([cv2.resize(item, (side, side)) for item in cam_BHW.astype(np.float32)])
        results[name] = Attribution(raw_BSS, _scaled(cam_BHW, side))
    return results


def activations_and_gradients(
    model: Classifier, inputs_BCHW: Tensor, targets_B: Tensor, *, layer: str | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Output of a layer and the gradient of the target logits with respect to it, both (B, C, H, W).

    Nothing is kept of what lies before the layer, and the gradient goes back no further than to it.
    """
    name = layer or target_layer(model, inputs_BCHW.shape[-1])
    leaf, logits_BC = _pass_with_leaf(model, inputs_BCHW, name)
    if leaf is None and layer is None:
        name = _last_spatial_layer(model, inputs_BCHW[:1])
        leaf, logits_BC = _pass_with_leaf(model, inputs_BCHW, name)
    if leaf is None:
        raise ConfigError(f"--layer: {name!r} gives no feature map; name a module whose output is one")
    score = logits_BC.gather(1, targets_B[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, leaf)
    return _as_maps(model, name, leaf), _as_maps(model, name, gradient)


def target_layer(model: Classifier, side: int) -> str:
    """Name of the module at the end of the last feature stage whose grid is not too coarse for films of `side`.

    Where a class token alone is read out, the patch tokens that leave the last block have no gradient: there it is
    the first norm of that block.
    """
    stages: Any = getattr(model.backbone, "feature_info", None) or []
    known = list(stages if isinstance(stages, list) else stages.info)
    fine = [item for item in known if math.ceil(side / item["reduction"]) >= MIN_GRID] or known[:1]
    if not fine:
        return _last_spatial_layer(model, torch.zeros(1, 3, side, side, device=next(model.parameters()).device))
    name = f"backbone.{fine[-1]['module']}"
    if getattr(model.backbone, "num_prefix_tokens", 0) and f"{name}.norm1" in dict(model.named_modules()):
        return f"{name}.norm1"
    return name


def _pass_with_leaf(model: Classifier, inputs_BCHW: Tensor, name: str) -> tuple[Tensor | None, Tensor]:
    """Logits, computed from a leaf that stands for the output of module `name`; None where that is no tensor."""
    leaves: list[Tensor] = []
    own = threading.get_ident()

    def take(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        # A server may be predicting with the same model in another thread; its pass stays as it is.
        if threading.get_ident() != own or not isinstance(output, Tensor):
            return None
        torch.set_grad_enabled(True)  # until the end of the no_grad block below
        leaves[:] = [output.detach().clone().requires_grad_()]
        return leaves[0].clone()  # what follows may work in place

    with _hook(_submodule(model, name), take), torch.no_grad():
        logits_BC = model(inputs_BCHW)
    return (leaves[0] if leaves else None), logits_BC


def _submodule(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name not in modules:
        hint = nearest(name, modules, count=3) or "; leave it out for the last feature stage"
        raise ConfigError(f"--layer: the model has no module {name!r}{hint}")
    return modules[name]


@contextlib.contextmanager
def _hook(module: nn.Module, function: Any) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def _last_spatial_layer(model: Classifier, input_1CHW: Tensor) -> str:
    """Name of the last module of the backbone that puts out a feature map of at least MIN_GRID cells a side."""
    found: list[str] = []

    def note(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3] >= MIN_GRID:
                found.append(name)

        return look

    with contextlib.ExitStack() as hooks:
        for name, module in model.backbone.named_modules():
            if name:
                hooks.enter_context(_hook(module, note(f"backbone.{name}")))
        model(input_1CHW)
    if not found:
        raise ConfigError("explain: this network has no feature map; use occlusion, integrated_gradients or shap")
    return found[-1]


def _as_maps(model: Classifier, name: str, values: Tensor) -> npt.NDArray[np.float32]:
    """A layer's output as (B, C, H, W): channels-last grids turned, tokens laid out on their square grid."""
    if values.ndim == 4 and values.shape[1] == values.shape[2] != values.shape[3]:
        values = values.permute(0, 3, 1, 2)
    elif values.ndim == 3:
        extra = int(getattr(model.backbone, "num_prefix_tokens", 0))
        tokens = values.shape[1]
        prefix = extra if math.isqrt(tokens - extra) ** 2 == tokens - extra else 0
        side = math.isqrt(tokens - prefix)
        if side * side != tokens - prefix:
            raise ConfigError(f"--layer: {name!r} gives {tokens} tokens, which fill no square grid; name another")
        values = values[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    elif values.ndim != 4:
        raise ConfigError(f"--layer: {name!r} gives an output of shape {tuple(values.shape)}, no feature map")
    return values.detach().float().cpu().numpy()


# --- pixel methods ---------------------------------------------------------------------------------------------


def _uniform(spec: PreprocessSpec, level: float, like: Tensor) -> Tensor:
    """Network input (1, 3, S, S) of a film that is `level` (0 to 1) everywhere."""
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    return ((level - mean) / std).view(1, 3, 1, 1).expand(1, -1, *like.shape[2:]).to(like)


def _integrated_gradients(
    model: Classifier, spec: PreprocessSpec, inputs_BCHW: Tensor, targets_B: Tensor, seed: int
) -> npt.NDArray[np.float32]:
    """Sundararajan 2017, on the straight path from the black film."""
    from captum.attr import IntegratedGradients

    values = IntegratedGradients(model).attribute(
        inputs_BCHW,
        baselines=_uniform(spec, 0.0, inputs_BCHW).expand_as(inputs_BCHW),
        target=targets_B,
        n_steps=IG_STEPS,
        internal_batch_size=max(8, len(inputs_BCHW)),
    )
    return _per_pixel(values)


def _occlusion(
    model: Classifier, spec: PreprocessSpec, inputs_BCHW: Tensor, targets_B: Tensor, seed: int
) -> npt.NDArray[np.float32]:
    """Zeiler 2014: what the logit loses when a square of a seventh of the side is set to the film's mean grey."""
    from captum.attr import Occlusion

    side = inputs_BCHW.shape[-1]
    window, stride = max(2, side // 7), max(1, side // 14)
    with torch.inference_mode():
        values = Occlusion(model).attribute(
            inputs_BCHW,
            sliding_window_shapes=(3, window, window),
            strides=(3, stride, stride),
            baselines=inputs_BCHW.mean(dim=(2, 3), keepdim=True).expand_as(inputs_BCHW),
            target=targets_B,
            perturbations_per_eval=max(1, 16 // len(inputs_BCHW)),
        )
    return values[:, 0].float().cpu().numpy()  # a window covers all channels: each holds the whole loss


def _shap(
    model: Classifier, spec: PreprocessSpec, inputs_BCHW: Tensor, targets_B: Tensor, seed: int
) -> npt.NDArray[np.float32]:
    """Expected gradients (Erion 2021), which approximate SHAP values, against black, dark and mid-grey films."""
    from captum.attr import GradientShap

    with _seeded(seed):
        values = GradientShap(model).attribute(
            inputs_BCHW,
            baselines=torch.cat([_uniform(spec, level, inputs_BCHW) for level in (0.0, 0.25, 0.5)]),
            n_samples=SHAP_SAMPLES,
            stdevs=SHAP_NOISE,
            target=targets_B,
        )
    return _per_pixel(values)


PIXEL_RULES = {"integrated_gradients": _integrated_gradients, "occlusion": _occlusion, "shap": _shap}


def _per_pixel(values_BCHW: Tensor) -> npt.NDArray[np.float32]:
    """Channels of a grey film are copies of one pixel: its attribution is their sum."""
    return values_BCHW.detach().sum(dim=1).float().cpu().numpy()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """captum draws from the global generators of torch and numpy: set for the block, put back after it."""
    state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


# --- picture ---------------------------------------------------------------------------------------------------


def overlay(image_HWC: Uint8Array, map_HW: FloatArray, *, opacity: float = 0.5) -> Uint8Array:
    """The film under its map, RGB (S, S, 3): hottest places covered to `opacity`, cold ones not at all."""
    grey_HW3 = np.broadcast_to(image_HWC if image_HWC.ndim == 3 else image_HWC[..., None], (*image_HWC.shape[:2], 3))
    heat_HW = np.clip(map_HW, 0, 1).astype(np.float32)
    # Short of the end of the scale, whose dark red would look like a shadow.
    colour_BGR = cv2.applyColorMap(np.round(heat_HW * 225).astype(np.uint8), cv2.COLORMAP_TURBO)
    cover = opacity * heat_HW[..., None]
    return np.round(grey_HW3 * (1 - cover) + colour_BGR[..., ::-1] * cover).astype(np.uint8)
