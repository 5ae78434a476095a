"""device_augmentation.py: whole batches get, in the mean, what the CPU augmenter gives film by film."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

import device_augmentation as da
import train
from config import Config, DataConfig
from data_preprocessing import Augmenter, Request, ResidentFilms, can_be_resident
from errors import ConfigError
from tests.test_train import TIMING, changed

SIDE = 64
ROWS = np.arange(4000)


def augmenter(seed: int = 0, **settings: Any) -> da.DeviceAugmenter:
    return da.DeviceAugmenter(DataConfig(image_size=SIDE, **settings), seed=seed)


def film() -> Any:
    """A smooth grey film with structure, (S, S) uint8."""
    rng = np.random.default_rng(0)
    rough = cv2.GaussianBlur(rng.normal(size=(SIDE, SIDE)), (0, 0), 4)
    return cv2.normalize(rough, None, 20, 235, cv2.NORM_MINMAX).astype(np.uint8)


def as_batch(image: Any, count: int = 1) -> torch.Tensor:
    return torch.from_numpy(image)[None, None].float().repeat(count, 1, 1, 1)


# --- draws ---


def test_uniform_numbers_are_uniform_and_independent() -> None:
    drawn = da.uniforms(da.film_keys(seed=3, epoch=2, rows=np.arange(20_000)), 20).numpy()
    # 5 standard errors of the mean and variance of 20,000 uniform draws.
    assert np.abs(drawn.mean(0) - 0.5).max() < 5 * math.sqrt(1 / 12 / 20_000)
    assert np.abs(drawn.var(0) - 1 / 12).max() < 5 * math.sqrt(1 / 180 / 20_000)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(20)).max() < 5 / math.sqrt(20_000)


def test_splitmix_gives_its_published_sequence() -> None:
    # The first outputs for seed 1234567 (Steele's generator adds the golden ratio before it mixes).
    golden = -7046029254386353131
    state = torch.tensor([1234567]) + golden * torch.arange(1, 4)
    inverse = pow(golden % 2**64, -1, 2**64)
    counters = torch.tensor([(int(item) * inverse + 2**63) % 2**64 - 2**63 for item in state])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(item) % 2**64 for item in da.mix(counters)] == expected


@pytest.mark.parametrize("other", [{"epoch": 2}, {"seed": 1}])
def test_a_film_is_changed_alike_in_any_batch_and_otherwise_in_another_epoch_or_run(other: dict[str, int]) -> None:
    films = torch.randint(0, 256, (6, SIDE, SIDE, 1), dtype=torch.uint8)
    rows = np.array([9, 4, 700, 1, 2, 3])
    whole = augmenter(augmentation_prob=1.0)(films, epoch=1, rows=rows)
    assert whole.dtype == torch.uint8 and whole.shape == films.shape
    part = augmenter(augmentation_prob=1.0)(films[2:4], epoch=1, rows=rows[2:4])
    assert torch.equal(whole[2:4], part)
    moved = augmenter(other.get("seed", 0), augmentation_prob=1.0)(films, epoch=other.get("epoch", 1), rows=rows)
    assert all(not torch.equal(a, b) for a, b in zip(whole, moved))


def test_switched_off_the_films_are_untouched() -> None:
    films = torch.randint(0, 256, (2, SIDE, SIDE, 1), dtype=torch.uint8)
    assert augmenter(augmentation_prob=0.0)(films, epoch=1, rows=np.arange(2)) is films


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_probabilities_and_ranges_are_those_of_the_cpu_augmenter(p: float) -> None:
    config = DataConfig(
        image_size=SIDE,
        augmentation_prob=p,
        rotation_degrees=12,
        brightness_contrast=0.15,
        gamma=0.6,
        min_crop_scale=0.5,
    )
    draw = da.DeviceAugmenter(config, seed=5).draw(epoch=1, rows=ROWS)
    by_name = {type(item).__name__: item for item in Augmenter(config, seed=5).pipeline.transforms}
    happened = {
        "RandomResizedCrop": draw.crop,
        "RandomGamma": draw.gamma != 1,
        "Rotate": draw.angle != 0,
        "HorizontalFlip": draw.flip,
        "RandomBrightnessContrast": draw.contrast != 1,
        "CLAHE": draw.clahe,
        "GaussNoise": draw.noise,
        "GaussianBlur": draw.blur,
        "CoarseDropout": draw.holes > 0,
        "GridDropout": draw.grid,
    }
    assert set(happened) == set(by_name)
    for name, mask in happened.items():
        expected = by_name[name].p
        assert abs(mask.double().mean() - expected) < 5 * math.sqrt(expected / len(ROWS)), name
    changed_levels = draw.contrast != 1
    ranges = {
        "angle": (draw.angle[draw.angle != 0], by_name["Rotate"].limit),
        "contrast": (draw.contrast[changed_levels] - 1, by_name["RandomBrightnessContrast"].contrast_limit),
        "brightness": (draw.brightness[changed_levels] / 255, by_name["RandomBrightnessContrast"].brightness_limit),
        "gamma": (draw.gamma[draw.gamma != 1], np.array(by_name["RandomGamma"].gamma_limit) / 100),
        "clip": (draw.clip_limit, by_name["CLAHE"].clip_limit),
        "noise": (draw.noise_std / 255, by_name["GaussNoise"].std_range),
        "blur": (draw.blur_sigma, by_name["GaussianBlur"].sigma_limit),
    }
    for name, (values, (low, high)) in ranges.items():
        assert low <= values.min() and values.max() <= high, name
        # 5 standard errors of the mean of uniform draws
        assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * len(values)), name


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize(("crop", "gamma"), [(1.0, 0.0), (0.6, 0.0), (1.0, 0.8)])
def test_augmented_films_look_alike_in_the_mean_on_cpu_and_device(p: float, crop: float, gamma: float) -> None:
    config = DataConfig(image_size=SIDE, augmentation_prob=p, min_crop_scale=crop, gamma=gamma)
    image, count = film(), 600
    one = Augmenter(config, seed=1)
    cpu = np.stack([one(image[:, :, None], epoch=1, index=index) for index in range(count)])[..., 0].astype(float)
    many = da.DeviceAugmenter(config, seed=1)
    films = torch.from_numpy(image)[None, :, :, None].repeat(count, 1, 1, 1)
    device = many(films, epoch=1, rows=np.arange(count)).numpy()[..., 0].astype(float)
    for statistic in (lambda x: x.mean((1, 2)), lambda x: x.std((1, 2)), lambda x: (x == 0).mean((1, 2))):
        a, b = statistic(cpu), statistic(device)
        error = math.sqrt((a.var() + b.var()) / count)
        assert abs(a.mean() - b.mean()) < 5 * error + 1e-3
        assert 0.75 < (a.std() + 1e-6) / (b.std() + 1e-6) < 1.33
    # The mean film, where every change has left its mark; grey levels of 0 to 255.
    assert np.abs(cv2.blur(cpu.mean(0) - device.mean(0), (9, 9))).max() < 12


# --- each change against an independent answer ---


def drawn(**fields: Any) -> da.Draw:
    draw = augmenter(augmentation_prob=0.0, min_crop_scale=1.0).draw(epoch=1, rows=np.arange(1))
    return replace(draw, **{name: torch.tensor(value) for name, value in fields.items()})


def test_without_crop_rotation_and_flip_resampling_changes_nothing() -> None:
    assert torch.allclose(da.resample(as_batch(film()), drawn()), as_batch(film()), atol=1e-2)


def test_a_flip_mirrors_left_and_right() -> None:
    flipped = da.resample(as_batch(film()), drawn(flip=[True]))
    assert torch.allclose(flipped, as_batch(film()).flip(3), atol=1e-2)


@pytest.mark.parametrize("angle", [15.0, -7.0, 90.0])
def test_a_rotation_is_that_of_opencv(angle: float) -> None:
    turned = da.resample(as_batch(film()), drawn(angle=[angle]))[0, 0].numpy()
    centre = ((SIDE - 1) / 2, (SIDE - 1) / 2)
    options = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_CONSTANT}
    both = [
        cv2.warpAffine(
            film().astype(np.float32), cv2.getRotationMatrix2D(centre, sign * angle, 1), (SIDE, SIDE), **options
        )
        for sign in (1, -1)
    ]  # which way is positive does not matter: angles are drawn from a symmetric range
    assert min(np.abs(turned - other).mean() for other in both) < 0.5


def test_gamma_raises_shares_of_white_to_a_power() -> None:
    films = torch.tensor([0.0, 64.0, 255.0]).view(1, 1, 1, 3).repeat(2, 1, 1, 1)
    bent = da.bend(films, torch.tensor([1.0, 2.0]))[:, 0, 0]
    assert bent[0].tolist() == pytest.approx([0, 64, 255])
    assert bent[1].tolist() == pytest.approx([0, 255 * (64 / 255) ** 2, 255])


def test_a_crop_is_that_part_of_the_film_enlarged() -> None:
    half = da.resample(as_batch(film()), drawn(crop=[True], crop_scale=[[0.5, 0.5]], crop_centre=[[-0.5, 0.5]]))
    part = film()[SIDE // 2 :, : SIDE // 2]
    expected = cv2.resize(part, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR).astype(float)
    inner = np.abs(half[0, 0].numpy() - expected)[2:-2, 2:-2]
    assert inner.max() < 1.5


def test_a_rotated_crop_sees_nothing_beyond_the_crop() -> None:
    white = torch.full((1, 1, SIDE, SIDE), 255.0)
    turned = da.resample(white, drawn(crop=[True], crop_scale=[[0.5, 0.5]], crop_centre=[[0.0, 0.0]], angle=[45.0]))
    assert turned[0, 0, 0, 0] == 0 and turned[0, 0, SIDE // 2, SIDE // 2] == 255


@pytest.mark.parametrize("side", [64, 100])
@pytest.mark.parametrize("clip", [1.0, 1.7, 4.0])
def test_clahe_is_that_of_opencv(side: int, clip: float) -> None:
    image = cv2.resize(film(), (side, side))
    expected = cv2.createCLAHE(clip, (8, 8)).apply(image).astype(float)
    found = da.clahe(as_batch(image), torch.tensor([clip], dtype=torch.float64))[0, 0].numpy()
    difference = np.abs(found - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005  # one level where a half is rounded


def test_clahe_of_a_colour_film_without_colour_is_that_of_its_grey() -> None:
    grey, clip = as_batch(film()), torch.tensor([2.0])
    assert torch.allclose(da.clahe(grey.repeat(1, 3, 1, 1), clip), da.clahe(grey, clip).repeat(1, 3, 1, 1), atol=0.6)


def test_noise_is_gaussian_of_the_stated_size() -> None:
    grey = torch.full((2, 1, 128, 128), 128.0)
    noise = da.add_noise(grey, torch.tensor([1, 2]), torch.tensor([5.0, 10.0])) - 128
    for found, std in zip(noise, (5, 10)):
        assert abs(found.mean()) < 5 * std / 128
        assert found.std() == pytest.approx(std, rel=0.04)
        assert (found.abs() < std).double().mean() == pytest.approx(0.6827, abs=0.02)
    assert abs(float(torch.corrcoef(noise.flatten(1))[0, 1])) < 0.04


@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0])
def test_a_blur_is_opencvs_with_the_same_kernel(sigma: float) -> None:
    taps = int(sigma * 3.5) * 2 + 1
    expected = cv2.GaussianBlur(film().astype(np.float32), (taps, taps), sigma, borderType=cv2.BORDER_REFLECT_101)
    found = da.blur(as_batch(film(), 2), torch.tensor([sigma, 1.0], dtype=torch.float64))[0, 0].numpy()
    assert np.allclose(found, expected, atol=1e-2)


def test_holes_black_out_their_boxes_and_no_more() -> None:
    boxes = torch.tensor([[[0, 0, 4, 8], [10, 10, 20, 30], [0, 0, 64, 64], [0, 0, 0, 0]]])
    holed = da.black_out(torch.ones(1, 1, SIDE, SIDE), boxes, torch.tensor([2]))[0, 0]
    expected = torch.ones(SIDE, SIDE)
    expected[0:4, 0:8] = 0
    expected[10:20, 10:30] = 0
    assert torch.equal(holed, expected)


def test_holes_have_the_drawn_size_and_stay_inside() -> None:
    boxes = augmenter().draw(epoch=1, rows=ROWS).hole_box
    sizes = boxes[..., 2:] - boxes[..., :2]
    assert boxes.min() >= 0 and boxes.max() <= SIDE
    assert sizes.min() >= int(0.05 * SIDE) and sizes.max() <= int(0.15 * SIDE)


@pytest.mark.parametrize("unit", [8, 10, 5])
def test_a_grid_blacks_out_one_small_rectangle_in_each_cell(unit: int) -> None:
    white = torch.ones(3, 1, SIDE, SIDE)
    keys, units = da.film_keys(seed=0, epoch=1, rows=np.arange(3)), torch.full((3,), unit)
    black = (da.black_grid(white, keys, units) == 0)[:, 0].numpy()
    cells = SIDE // unit
    for mask in black:
        count, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
        assert 0.5 * cells**2 <= count - 1 <= cells**2  # rectangles of neighbouring cells may touch
    expected = (max(1, int(0.3 * SIDE / cells)) / (SIDE / cells)) ** 2
    assert black.mean() == pytest.approx(expected, rel=0.15)


# --- in a run ---


def test_a_run_augmented_on_the_device_resumes_bit_for_bit(tiny: Config, tmp_path: Path) -> None:
    settings = {"data__augment_on": "device", "data__augmentation_prob": 0.8, "training__num_epochs": 3}
    train.train(changed(tiny, runtime__output_dir=str(tmp_path / "whole"), **settings))
    path, config = train.resume_config(
        tmp_path / "whole" / "checkpoint_epoch_1.pth", {"runtime.output_dir": str(tmp_path / "resumed")}
    )
    train.train(config, resume=path)
    a, b = (pd.read_csv(tmp_path / name / "history.csv").drop(columns=TIMING) for name in ("whole", "resumed"))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_cached_views_of_a_device_augmented_run_are_those_its_epochs_would_draw(tiny: Config, tmp_path: Path) -> None:
    from feature_cache import cut_model, open_features

    frozen = {"model__freeze_backbone": True, "training__use_amp": False}
    made = train.prepare(changed(tiny, data__augment_on="device", data__augmentation_prob=1.0, **frozen))
    cpu = torch.device("cpu")
    cache, _ = open_features(
        made.model, made.spec, made.train_set, made.val_set, views=2, folder=tmp_path, device=cpu, precision="fp32"
    )
    positions = np.array([5, 0, 17])
    (cached,) = cache.train_batches([Request(2, positions)])
    films = made.train_set.finished(made.train_set[Request(2, positions)], epoch=2, device=cpu)
    with torch.inference_mode():
        expected = cut_model(made.model, made.spec).prefix(films)
    assert torch.allclose(cached.inputs, expected, rtol=1e-3, atol=1e-4)


def test_resident_films_give_the_batches_of_the_loader(tiny: Config) -> None:
    train_set = train.prepare(changed(tiny, data__augment_on="device")).train_set
    request = Request(1, np.array([3, 1, 40]))
    (batch,) = ResidentFilms(train_set, torch.device("cpu"))([request])
    loaded = train_set[request]
    assert all(torch.equal(a, b) for a, b in zip(batch, loaded))
    assert not can_be_resident(train_set, torch.device("cpu"))


def test_an_unknown_place_to_augment_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.augment_on: 'gpu' is not one of auto, cpu, device"):
        DataConfig(augment_on="gpu")
