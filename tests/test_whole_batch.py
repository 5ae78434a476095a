"""whole_batch.py: dropout and batch norm of parts are those of the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from process_group import ALONE, Group
from tests import processes
from whole_batch import Rows, follow_whole_batch, hold_batch_norm

CPU = torch.device("cpu")
LAYERS: dict[str, dict[str, Any]] = {
    "2d": {"kind": nn.BatchNorm2d},
    "1d": {"kind": nn.BatchNorm1d},
    "with_activation": {"kind": BatchNormAct2d},
    "no_affine": {"kind": nn.BatchNorm2d, "affine": False},
    "cumulative": {"kind": nn.BatchNorm2d, "momentum": None},
    "untracked": {"kind": nn.BatchNorm2d, "track_running_stats": False},
    "bf16": {"kind": nn.BatchNorm2d, "dtype": torch.bfloat16},
}


def through(group: Group, name: str) -> dict[str, Tensor]:
    """Two batches through a layer: outputs, gradients and statistics of the whole, put together from the parts."""
    settings = dict(LAYERS[name])
    kind, dtype = settings.pop("kind"), settings.pop("dtype", torch.float32)
    generator = torch.Generator().manual_seed(0)
    shape = (13, 5) if kind is nn.BatchNorm1d else (13, 5, 3, 4)
    layer = kind(5, **settings)
    if layer.affine:
        layer.weight.data.uniform_(0.5, 2, generator=generator)
        layer.bias.data.normal_(generator=generator)
    follow_whole_batch(nn.Sequential(layer), Rows(), group, batch_norm="sync", device=CPU)
    start, stop = group.bounds(13)
    found: dict[str, Tensor] = {}
    for number in range(2):
        films = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
        wanted = torch.randn(shape, generator=generator)
        own = films[start:stop].contiguous().requires_grad_()
        outputs = layer(own)
        (outputs.float() * wanted[start:stop]).sum().backward()
        assert own.grad is not None
        for key, part in (("outputs", outputs.detach()), ("gradients", own.grad)):
            found[f"{key} {number}"] = torch.cat(group.each(lambda part=part: part, what=key))
    found |= {f"{key}.grad": group.sum_(item.grad, what=key) for key, item in layer.named_parameters()}
    return found | dict(layer.named_buffers())


@pytest.mark.parametrize("name", LAYERS)
def test_synchronised_batch_norm_of_two_unequal_parts_is_that_of_the_whole(name: str) -> None:
    expected = through(ALONE, name)
    assert len(expected) >= 4
    # bf16 has 8 bits: an output of some units is known to a few hundredths.
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if name == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
    for found in processes.run(2, through, name):
        assert found.keys() == expected.keys()
        for key, item in expected.items():
            assert torch.allclose(found[key].float(), item.float(), **tolerance), key


def test_batch_norm_in_evaluation_needs_no_other_process() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    images = torch.randn(2, 3, 4, 4)
    expected = model(images)
    follow_whole_batch(model, Rows(), Group(rank=1, size=2), batch_norm="sync", device=CPU)
    assert type(model[0]) is not nn.BatchNorm2d and torch.equal(model(images), expected)


def test_held_batch_norm_keeps_its_statistics_in_training() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).train()
    hold_batch_norm(model)
    before = copy.deepcopy(model[0].state_dict())
    model(torch.randn(4, 3, 2, 2))
    assert all(torch.equal(item, before[name]) for name, item in model[0].state_dict().items())
    assert model.training and model[0].weight.requires_grad


@pytest.mark.parametrize("shape", [(13, 7), (13, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_dropout_of_the_parts_is_torchs_of_the_whole(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    films = torch.randn(shape, dtype=dtype, requires_grad=True)
    torch.manual_seed(3)
    expected = nn.Dropout(0.3)(films)
    parts = []
    for rank in range(size):
        model, rows = nn.Sequential(nn.Dropout(0.3)), Rows()
        follow_whole_batch(model, rows, Group(rank, size), batch_norm="sync", device=CPU)
        start, stop = Group(rank, size).bounds(13)
        rows.are(start, stop, of=13)
        torch.manual_seed(3)
        parts.append(model(films[start:stop]))
    assert torch.equal(torch.cat(parts), expected)


def test_a_copied_network_shares_the_rows() -> None:
    model, rows = nn.Sequential(nn.Dropout(0.3)), Rows()
    follow_whole_batch(model, rows, ALONE, batch_norm="sync", device=CPU)
    assert copy.deepcopy(model)[0].rows is rows


def test_dropout_that_is_off_changes_and_draws_nothing() -> None:
    model = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5)).eval()
    follow_whole_batch(model, Rows(), ALONE, batch_norm="sync", device=CPU)
    model[0].train()
    films, state = torch.randn(4, 3), torch.get_rng_state()
    assert torch.equal(model(films), films) and torch.equal(torch.get_rng_state(), state)
