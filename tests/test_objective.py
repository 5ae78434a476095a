"""objective.py: the sizes of progressive resizing; the rest is tested through train.py, which it serves."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

import objective


def sides(epochs: int, start: int, full: int) -> list[int]:
    return [
        objective.progressive_side(epoch=epoch, epochs=epochs, start=start, full=full) for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize(("epochs", "start", "full"), [(20, 128, 224), (50, 96, 320), (3, 64, 224), (4, 20, 32)])
def test_sides_grow_from_the_start_to_full_size_for_the_last_quarter(epochs: int, start: int, full: int) -> None:
    found = sides(epochs, start, full)
    assert found[0] == start and found == sorted(found) and found[-1] == full
    assert all(side == full for side in found[epochs - epochs // 4 :])
    assert all(side in (start, full) or side % objective.SIDE_STEP == 0 for side in found)


def test_one_epoch_is_at_full_size() -> None:
    assert sides(1, 64, 224) == [224]


@pytest.mark.parametrize("channels", [1, 3])
def test_shrinking_averages_like_opencvs_area_interpolation(channels: int) -> None:
    films = torch.randint(0, 256, (2, 64, 64, channels), dtype=torch.uint8)
    smooth = np.stack([cv2.GaussianBlur(item.numpy(), (0, 0), 3).reshape(64, 64, channels) for item in films])
    found = objective.shrunk(torch.from_numpy(smooth), 32).numpy()
    expected = np.stack(
        [cv2.resize(item, (32, 32), interpolation=cv2.INTER_AREA).reshape(32, 32, -1) for item in smooth]
    )
    assert found.shape == (2, 32, 32, channels)
    assert np.abs(found - expected).mean() < 1


def test_films_of_the_wanted_side_are_the_same_object() -> None:
    films = torch.zeros(1, 32, 32, 1, dtype=torch.uint8)
    assert objective.shrunk(films, 32) is films
