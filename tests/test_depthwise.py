"""depthwise.py: the fast gradients are the gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from depthwise import speed_up_depthwise
from models import create_model


def gradients(layer: nn.Module, images: Tensor, direction: Tensor, *, bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
    images = images.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        outputs = layer(images)
    (outputs.float() * direction).sum().backward()
    return outputs.detach().float(), images.grad.clone(), layer.weight.grad.clone()


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("side", [7, 12])
def test_outputs_and_gradients_are_those_of_torch(
    kind: type[nn.Conv2d], bf16: bool, stride: int, kernel: int, side: int
) -> None:
    torch.manual_seed(0)
    padding = 0 if kind is Conv2dSame else kernel // 2
    slow = kind(16, 16, kernel, stride, padding, groups=16, bias=False).to(memory_format=torch.channels_last)
    fast = copy.deepcopy(slow)
    assert speed_up_depthwise(fast) == 1 and type(fast) is not type(slow)
    images = torch.randn(3, 16, side, side).contiguous(memory_format=torch.channels_last)
    direction = torch.randn_like(slow(images))
    expected = gradients(copy.deepcopy(slow).double(), images.double(), direction, bf16=False)
    for found, exact in zip(gradients(fast, images, direction, bf16=bf16), expected):
        error = (found - exact).norm() / exact.norm()
        assert error < (1e-2 if bf16 else 1e-5)  # bf16 keeps 8 bits


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(5, 2, 0), (5, 1, 4), (7, 2, 1)])
def test_any_padding_gives_the_gradients_of_torch(kernel: int, stride: int, padding: int) -> None:
    slow = nn.Conv2d(8, 8, kernel, stride, padding, groups=8, bias=False)
    fast = copy.deepcopy(slow)
    speed_up_depthwise(fast)
    images = torch.randn(2, 8, 13, 13)
    direction = torch.randn_like(slow(images))
    for a, b in zip(*(gradients(layer, images, direction, bf16=False) for layer in (slow, fast))):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False),
        nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=8, bias=False),
    ],
)
def test_other_convolutions_are_left_alone(layer: nn.Conv2d) -> None:
    assert speed_up_depthwise(nn.Sequential(layer)) == 0 and type(layer) is nn.Conv2d


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_a_whole_network_learns_the_same_and_keeps_its_names(name: str) -> None:
    torch.manual_seed(0)
    slow = create_model(name, 2, False, hidden_features=8).train()
    fast = copy.deepcopy(slow)
    speed_up_depthwise(fast)
    assert fast.state_dict().keys() == slow.state_dict().keys()
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    for model in (slow, fast):
        torch.manual_seed(1)  # dropout
        model(images)[:, 0].sum().backward()
    for (key, a), b in zip(slow.named_parameters(), fast.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max()) + 1e-7), key


def test_without_gradients_nothing_is_different() -> None:
    slow = create_model("test_efficientnet", 2, False, hidden_features=8).eval()
    fast = copy.deepcopy(slow)
    speed_up_depthwise(fast)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(slow(images), fast(images))
