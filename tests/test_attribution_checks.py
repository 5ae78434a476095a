"""The checks of heat maps: each against a case whose answer is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

import attribution_checks as checks
from models import create_model


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("test_resnet", 2, pretrained=False, hidden_features=16).eval()


@pytest.mark.parametrize("depth", ["head", "last_stage", "all"])
def test_randomising_shuffles_only_as_deep_as_asked(depth: str) -> None:
    model = network()
    twin = checks.randomised(model, depth=depth, seed=0)
    changed = [name for (name, a), b in zip(model.named_parameters(), twin.parameters()) if not torch.equal(a, b)]
    assert any(name.startswith("head.") for name in changed)
    assert any(name.startswith("backbone.layer4") for name in changed) == (depth != "head")
    assert any(name.startswith("backbone.conv1") for name in changed) == (depth == "all")
    for (_, a), b in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)


def test_randomising_repeats_with_its_seed_and_leaves_the_model_alone() -> None:
    model = network()
    before = [item.clone() for item in model.parameters()]
    first, again, other = (checks.randomised(model, depth="all", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def blob(row: float, column: float, side: int = 56) -> np.ndarray:
    y, x = np.mgrid[0:side, 0:side] / side
    return np.exp(-(((y - row) ** 2 + (x - column) ** 2) / 0.02)).astype(np.float32)


def test_a_map_is_like_itself_and_unlike_one_elsewhere() -> None:
    assert checks.similarity(blob(0.3, 0.3), blob(0.3, 0.3)) == pytest.approx((1, 1))
    spearman, ssim = checks.similarity(blob(0.2, 0.2), blob(0.8, 0.8))
    assert spearman < -0.5 and ssim < 0.7
    assert checks.similarity(blob(0.3, 0.3), blob(0.3, 0.3) ** 3)[0] > 0.999  # ranks only


def test_a_flat_map_is_like_nothing() -> None:
    assert np.isnan(checks.similarity(blob(0.3, 0.3), np.zeros((56, 56)))).all()


def test_ssim_equals_its_formula_window_by_window() -> None:
    rng = np.random.default_rng(0)
    a = cv2.GaussianBlur(rng.random((20, 20)), (0, 0), 2)
    b = np.clip(a + rng.normal(0, 0.02, a.shape), 0, 1)
    kernel = np.outer(cv2.getGaussianKernel(11, 1.5), cv2.getGaussianKernel(11, 1.5))
    padded = [np.pad(item, 5, mode="symmetric") for item in (a, b)]
    values = []
    for row in range(20):
        for column in range(20):
            x, y = (item[row : row + 11, column : column + 11] for item in padded)
            mx, my = (kernel * x).sum(), (kernel * y).sum()
            vx, vy = (kernel * (x - mx) ** 2).sum(), (kernel * (y - my) ** 2).sum()
            cov = (kernel * (x - mx) * (y - my)).sum()
            top = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert checks.ssim(a, b) == pytest.approx(np.mean(values), rel=1e-6)


# --- deletion and insertion ------------------------------------------------------------------------------------


def spotted() -> tuple[np.ndarray, np.ndarray]:
    """A film with one bright cell, and the map that names it."""
    image = np.full((1, 56, 56, 1), 60, dtype=np.uint8)
    image[0, 8:12, 20:24] = 255
    return image, (image[0, ..., 0] > 200).astype(np.float32)


def brightest(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).max(axis=1) / 255


def test_deletion_and_insertion_reward_the_map_that_names_the_evidence() -> None:
    image, map_SS = spotted()
    rng = np.random.default_rng(0)
    order = checks.cell_order(map_SS, rng)
    assert order[0] == 2 * checks.GRID + 5
    good = [checks.area_under(curve)[0] for curve in checks.curves(brightest, image, order[None])]
    bad = [checks.area_under(curve)[0] for curve in checks.curves(brightest, image, order[None, ::-1])]
    assert good[0] < 0.4 < 0.9 < bad[0]
    assert good[1] > 0.9 > 0.5 > bad[1]


def test_the_curves_begin_and_end_with_the_whole_film_and_none_of_it() -> None:
    image, map_SS = spotted()
    order = checks.cell_order(map_SS, np.random.default_rng(0))
    deleted, inserted = checks.curves(brightest, image, order[None])
    assert deleted.shape == inserted.shape == (1, checks.STEPS + 1)
    assert deleted[0, 0] == inserted[0, -1] == 1.0
    assert deleted[0, -1] == pytest.approx(image.mean() / 255, abs=0.005)
    assert inserted[0, 0] < 0.5


def test_the_area_under_a_curve_is_that_of_the_trapezoid_rule() -> None:
    curve = np.random.default_rng(0).random((3, 11))
    assert np.allclose(checks.area_under(curve), np.trapezoid(curve, dx=0.1, axis=1))


# --- pointing --------------------------------------------------------------------------------------------------


def test_the_border_has_the_share_of_area_it_should() -> None:
    masks = checks.region_masks(np.zeros((224, 224, 1), dtype=np.uint8))
    assert masks["border"].mean() == pytest.approx(1 - (12 / 14) ** 2)
    assert masks["centre"].mean() == pytest.approx(np.pi * 0.36 * 0.38, rel=0.01)
    assert not (masks["border"] & masks["centre"]).any()
    assert not masks["text"].any()


def test_an_even_map_has_the_share_of_the_area_everywhere() -> None:
    masks = checks.region_masks(np.zeros((112, 112, 1), dtype=np.uint8))
    for share, area in checks.shares(np.full((112, 112), 0.3, dtype=np.float32), masks).values():
        assert share == pytest.approx(area, abs=1e-5)


def test_a_flat_map_points_nowhere() -> None:
    masks = checks.region_masks(np.zeros((112, 112, 1), dtype=np.uint8))
    share, area = checks.shares(np.zeros((112, 112), dtype=np.float32), masks)["border"]
    assert np.isnan(share) and area > 0


@pytest.mark.parametrize("side", [112, 224, 448])
def test_burned_in_letters_are_found_and_soft_shadows_are_not(side: int) -> None:
    y, x = np.mgrid[0:side, 0:side] / side
    film = (60 + 120 * np.exp(-((x - 0.5) ** 2) / 0.05) + 30 * np.sin(40 * y)).clip(0, 255).astype(np.uint8)
    assert not checks.text_mask(film[..., None]).any()
    lettered = film.copy()
    place = (int(0.04 * side), int(0.14 * side))
    cv2.putText(lettered, "R", place, cv2.FONT_HERSHEY_SIMPLEX, side / 280, 250, max(1, side // 100))
    found = checks.text_mask(lettered[..., None])
    written = lettered != film
    assert found[written].mean() > 0.8
    assert found.mean() < 0.03
