"""Depthwise convolutions whose gradients are not slow on a CPU.

oneDNN has no fast kernels for two gradients of depthwise convolutions, and these are most of a step of EfficientNet: in
bf16 the input's gradient at stride 2 (40 ms where fp32 takes 1 ms), and the weight's gradient of kernels above 3 × 3
(50 ms where 3 × 3 takes 0.2 ms). Here the first is computed in fp32 and the second as 3 × 3 gradients of shifted films,
four for a 5 × 5 kernel: the same sums in another order. Measured with torch 2.14 on AVX512-BF16, 2026-11-23.
Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

Pair = tuple[int, int]


class _Depthwise(torch.autograd.Function):
    """conv2d with one filter a channel, dilation 1 and no bias."""

    @staticmethod
    def forward(context: Any, images_BCHW: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        context.save_for_backward(images_BCHW, weight)
        context.stride, context.padding = stride, padding
        return F.conv2d(images_BCHW, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        images_BCHW, weight = context.saved_tensors
        grad_BCHW = grads[0].contiguous(memory_format=torch.channels_last)
        wants_images, wants_weight = context.needs_input_grad[:2]
        to_images = _image_gradient(grad_BCHW, images_BCHW, weight, context) if wants_images else None
        to_weight = _weight_gradient(grad_BCHW, images_BCHW, weight, context) if wants_weight else None
        return to_images, to_weight, None, None


def _gradients(
    grad_BCHW: Tensor, images_BCHW: Tensor, weight: Tensor, stride: Pair, padding: Pair, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten.convolution_backward(
        grad_BCHW, images_BCHW, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), (*wanted, False)
    )
    return found[0], found[1]


def _image_gradient(grad_BCHW: Tensor, images_BCHW: Tensor, weight: Tensor, context: Any) -> Tensor:
    dtype = images_BCHW.dtype
    if dtype == torch.bfloat16 and max(context.stride) > 1:
        grad_BCHW, weight = grad_BCHW.float(), weight.float()
        images_BCHW = torch.empty_like(images_BCHW, dtype=torch.float32)  # only its shape is read
    return _gradients(grad_BCHW, images_BCHW, weight, context.stride, context.padding, (True, False))[0].to(dtype)


def _weight_gradient(grad_BCHW: Tensor, images_BCHW: Tensor, weight: Tensor, context: Any) -> Tensor:
    side = weight.shape[-1]
    if side <= 3:
        return _gradients(grad_BCHW, images_BCHW, weight, context.stride, context.padding, (False, True))[1]
    (down, across), (pad_h, pad_w) = context.stride, context.padding
    padded = F.pad(images_BCHW, (pad_w, pad_w, pad_h, pad_h))
    height, width = (step * (length - 1) + 3 for step, length in zip((down, across), grad_BCHW.shape[2:]))
    found, corner = torch.empty_like(weight), weight[:, :, :3, :3].contiguous()
    for top in range(0, side - 2, 2):
        for left in range(0, side - 2, 2):
            seen = padded[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
            part = _gradients(grad_BCHW, seen, corner, context.stride, (0, 0), (False, True))[1]
            found[:, :, top : top + 3, left : left + 3] = part
    return found


class _FastGradients(nn.Conv2d):
    """A depthwise convolution that takes the fast way wherever a gradient will be asked for."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        weight, padding = self.weight, self.padding
        trained = torch.is_grad_enabled() and (images_BCHW.requires_grad or weight.requires_grad)
        if not trained or images_BCHW.device.type != "cpu":
            return super().forward(images_BCHW)
        if isinstance(self, Conv2dSame):
            images_BCHW, padding = pad_same(images_BCHW, list(weight.shape[-2:]), list(self.stride)), (0, 0)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            images_BCHW, weight = images_BCHW.to(dtype), weight.to(dtype)
        outputs_BCHW = _Depthwise.apply(images_BCHW, weight, self.stride, padding)
        return outputs_BCHW if self.bias is None else outputs_BCHW + self.bias.to(outputs_BCHW.dtype).view(1, -1, 1, 1)


class _Fast(_FastGradients):
    pass


class _FastSame(_FastGradients, Conv2dSame):
    pass


def speed_up_depthwise(model: nn.Module) -> int:
    """Let the depthwise convolutions of `model` take the fast way on a CPU; how many do. Weights and names stay."""
    count = 0
    for module in model.modules():
        if type(module) in (nn.Conv2d, Conv2dSame) and _is_depthwise(module):
            module.__class__ = _FastSame if isinstance(module, Conv2dSame) else _Fast
            count += 1
    return count


def _is_depthwise(module: Any) -> bool:
    square = module.kernel_size[0] == module.kernel_size[1] and module.kernel_size[0] in (3, 5, 7)
    plain = module.dilation == (1, 1) and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return square and plain and module.groups == module.in_channels == module.out_channels > 1
