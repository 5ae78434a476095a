"""Layers that act on a step's whole batch although each process holds a part of it: dropout and batch norm.

Dropout draws the mask of the whole batch on every process, from generators that stand alike, and takes its rows. Batch
norm takes the statistics of the whole batch: on GPUs torch's SyncBatchNorm, which refuses CPUs; there the one below.
So a step does not depend on the number of processes. Names and shapes of weights stay. Legend: B batch, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from process_group import Group

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Rows:
    """Which rows of the step's batch this process holds; shared by the layers of a network, set before each batch."""

    def __init__(self) -> None:
        self.start, self.stop, self.count = 0, 0, 0

    def are(self, start: int, stop: int, *, of: int) -> None:
        """Rows [start, stop) of `of`."""
        self.start, self.stop, self.count = start, stop, of

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        return self  # a copy of the network holds rows of the same batch


class _Dropout(nn.Dropout):
    """Dropout whose mask is drawn for the whole batch."""

    rows: Rows

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return inputs
        rows = self.rows
        if rows.stop - rows.start != len(inputs):  # not the batch of a step
            return F.dropout(inputs, self.p, True)
        # As torch does it on CPUs, to the last bit: the mask has the type of the inputs and holds 0 and 1 / (1 - p).
        mask = inputs.new_empty((rows.count, *inputs.shape[1:])).bernoulli_(1 - self.p).div_(1 - self.p)
        return inputs * mask[rows.start : rows.stop]


class _Norm(torch.autograd.Function):
    """Batch norm by the statistics of all processes' films; gloo, CPU."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Tensor, bias: Tensor, layer: Any) -> Tensor:
        mean_C, variance_C, count = _statistics(inputs)
        _track(layer, mean_C, variance_C * (count / max(1, count - 1)))
        context.save_for_backward(inputs, weight, mean_C, variance_C)
        context.eps, context.count = layer.eps, count
        return F.batch_norm(inputs, mean_C, variance_C, weight, bias, False, 0.0, layer.eps)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        inputs, weight, mean_C, variance_C = context.saved_tensors
        invstd_C = (variance_C + context.eps).rsqrt()
        # With fixed statistics the library's own kernel gives the first term and both sums in one pass.
        to_inputs, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], inputs, weight, mean_C, variance_C, mean_C, invstd_C, False, context.eps, [True, True, True]
        )
        sums_2C = torch.stack([to_weight, to_bias])
        dist.all_reduce(sums_2C)
        slope_C = -weight * invstd_C * invstd_C * sums_2C[0] / context.count
        offset_C = -weight * invstd_C * sums_2C[1] / context.count - slope_C * mean_C
        shape = (1, -1, *[1] * (inputs.ndim - 2))
        slope, offset = (item.view(shape).to(inputs.dtype) for item in (slope_C, offset_C))
        return to_inputs.add_(torch.addcmul(offset, inputs, slope)), to_weight, to_bias, None


def _statistics(inputs: Tensor) -> tuple[Tensor, Tensor, int]:
    """(mean, biased variance, values per channel) over all processes, joined as in Chan (1979)."""
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    variance_C, mean_C = torch.var_mean(inputs.float(), axes, correction=0)
    own = torch.cat([mean_C, variance_C, mean_C.new_tensor([inputs.numel() / inputs.shape[1]])])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    means, variances, counts = torch.stack(parts).split([len(mean_C), len(mean_C), 1], dim=1)
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    return mean, variance, int(counts.sum())


def _track(layer: Any, mean_C: Tensor, unbiased_C: Tensor) -> None:
    if not layer.track_running_stats:
        return
    layer.num_batches_tracked.add_(1)
    momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean_C, momentum)
    layer.running_var.lerp_(unbiased_C, momentum)


def _normed(layer: Any, inputs: Tensor) -> Tensor:
    weight = inputs.new_ones(layer.num_features, dtype=torch.float32) if layer.weight is None else layer.weight
    bias = torch.zeros_like(weight) if layer.bias is None else layer.bias
    return _Norm.apply(inputs, weight, bias, layer)


class _Norm1d(nn.BatchNorm1d):
    def forward(self, inputs: Tensor) -> Tensor:
        return _normed(self, inputs) if self.training else super().forward(inputs)


class _Norm2d(nn.BatchNorm2d):
    def forward(self, inputs: Tensor) -> Tensor:
        return _normed(self, inputs) if self.training else super().forward(inputs)


class _NormAct2d(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_normed(self, x))) if self.training else super().forward(x)


_SYNCHRONISED = {nn.BatchNorm1d: _Norm1d, nn.BatchNorm2d: _Norm2d, BatchNormAct2d: _NormAct2d}


def follow_whole_batch(model: nn.Module, rows: Rows, group: Group, *, batch_norm: str, device: torch.device) -> None:
    """Let dropout, and with `batch_norm` sync also batch norm, of `model` act on the whole batch; in place."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = _Dropout
            module.rows = rows  # type: ignore[assignment]
    if group.size > 1 and batch_norm == "sync":
        if device.type == "cpu":
            for module in model.modules():
                module.__class__ = _SYNCHRONISED.get(type(module), type(module))
        else:
            convert_sync_batchnorm(model)


def hold_batch_norm(model: nn.Module) -> None:
    """Keep the running statistics of every batch norm as they are, in training too."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()


def average_statistics(model: nn.Module, group: Group) -> None:
    """Give every process the mean of the processes' running statistics, where each has kept its own."""
    if group.size == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    moving = [item for layer in layers for item in layer.buffers() if item.is_floating_point()]
    if moving:
        flat = torch.cat([item.flatten() for item in moving])
        group.sum_(flat, what="the running statistics of batch norm").div_(group.size)
        for item, part in zip(moving, flat.split([item.numel() for item in moving])):
            item.copy_(part.view_as(item))
