"""A network given the widths of a pruned one, so that a pruned checkpoint is loaded like any other.

Pruning removes channels and whole attention heads; which, only its weights tell, and their shapes are enough: no
tracing, no Torch-Pruning. Weights that do not fit the architecture are left for the loader to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def narrow(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give every layer of `model` the width that its weights have in `state`; the values are still to be loaded."""
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        for name, item in module.named_parameters(recurse=False):
            if (stored := state.get(path + name)) is not None and stored.dim() == item.dim():
                setattr(module, name, nn.Parameter(item.new_zeros(stored.shape), requires_grad=item.requires_grad))
        for name, item in module.named_buffers(recurse=False):
            if (stored := state.get(path + name)) is not None and stored.dim() == item.dim():
                module.register_buffer(name, torch.zeros_like(stored, device=item.device))
        _note_widths(module)
    for module in model.modules():
        _note_heads(module)


def _note_widths(module: Any) -> None:
    """Bring what a layer says of itself into line with its weights."""
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups == module.in_channels
        module.out_channels, inputs = module.weight.shape[0], module.weight.shape[1]
        module.groups = module.out_channels if depthwise and module.groups > 1 else module.groups
        module.in_channels = inputs * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
        module.num_features = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        module.normalized_shape = tuple(module.weight.shape)


def _note_heads(module: Any) -> None:
    if hasattr(module, "qkv") and hasattr(module, "head_dim"):
        module.num_heads = module.qkv.out_features // (3 * module.head_dim)
        module.attn_dim = module.num_heads * module.head_dim
