"""The augmentations of training for whole batches, where the network computes.

The same changes, from the same ranges and with the same probabilities, as `data_preprocessing.Augmenter` makes film by
film on the CPU; the single draws differ. A film's draw is a hash of (seed, epoch, row), so that batch, worker, rank
and resumption cannot change it. Crop, rotation and flip are one resampling. Legend: B films, N films that a change
falls on, H height, W width, S side, C channels, K numbers drawn, T tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from config import DataConfig

CROP_RATIO = (3 / 4, 4 / 3)
"""Width over height of a random crop, before it is stretched to the film's square (Szegedy 2015)."""
CROP_TRIES = 10
MOST_HOLES = 4
CLAHE_TILES = 8
LARGEST_KERNEL = 7
"""Taps of the widest blur: 2 · int(3.5 σ) + 1 for σ = 1."""
GRID_RATIO = 0.3
NUMBERS = 32 + 2 * CROP_TRIES
"""Uniform numbers drawn for a film."""


def mix(counter: Tensor) -> Tensor:
    """splitmix64 (Steele 2014) of int64 counters; int64 arithmetic wraps, and its shifts are made logical by masks."""
    counter = counter * -7046029254386353131
    counter = (counter ^ ((counter >> 30) & (2**34 - 1))) * -4658895280553007687
    counter = (counter ^ ((counter >> 27) & (2**37 - 1))) * -7723592293110705685
    return counter ^ ((counter >> 31) & (2**33 - 1))


def film_keys(*, seed: int, epoch: int, rows: npt.NDArray[np.int64]) -> Tensor:
    """One int64 key a film, (B,), from (seed, epoch, row)."""
    run = mix(mix(torch.tensor([seed])) ^ epoch)
    return mix(mix(run) ^ torch.from_numpy(np.asarray(rows, dtype=np.int64)))


def uniforms(keys_B: Tensor, count: int) -> Tensor:
    """float64 (B, count) in [0, 1)."""
    hashed = mix(keys_B[:, None] + torch.arange(1, count + 1, device=keys_B.device))
    return ((hashed >> 11) & (2**53 - 1)).double() / 2**53


@dataclass(frozen=True)
class Draw:
    """What is done to each film; masks say whether, the other fields how much. All on the CPU, first axis B."""

    keys: Tensor
    crop: Tensor
    """bool."""
    crop_scale: Tensor
    """(B, 2) share of width and height kept; 1 where not cropped."""
    crop_centre: Tensor
    """(B, 2) in [-1, 1]; 0 where not cropped."""
    angle: Tensor
    """Degrees, counter-clockwise; 0 where not rotated."""
    flip: Tensor
    contrast: Tensor
    """Factor; 1 where unchanged."""
    brightness: Tensor
    """Added grey levels."""
    gamma: Tensor
    """Power; 1 where unchanged."""
    clahe: Tensor
    clip_limit: Tensor
    noise: Tensor
    noise_std: Tensor
    """Grey levels."""
    blur: Tensor
    blur_sigma: Tensor
    """Pixels."""
    holes: Tensor
    """Number of rectangles blacked out; 0 for none."""
    hole_box: Tensor
    """int64 (B, 4 holes, top left bottom right)."""
    grid: Tensor
    grid_unit: Tensor
    """Side of a grid cell, pixels."""


class DeviceAugmenter:
    """Augments uint8 batches on the device they lie on."""

    def __init__(self, config: DataConfig, *, seed: int) -> None:
        self.seed, self.p, self.side = seed, config.augmentation_prob, config.image_size
        self.rotation, self.change = config.rotation_degrees, config.brightness_contrast
        self.min_crop, self.gamma = config.min_crop_scale, config.gamma
        self.active = self.p > 0
        self.settings = ("device", seed, self.p, self.side, self.rotation, self.change, self.min_crop, self.gamma)

    def __call__(self, films_BHWC: Tensor, *, epoch: int, rows: npt.NDArray[np.int64]) -> Tensor:
        """Augmented uint8 films (B, H, W, C); `rows` (B,) are their positions in the pixel store."""
        if not self.active:
            return films_BHWC
        draw = self.draw(epoch=epoch, rows=rows)
        films = films_BHWC.permute(0, 3, 1, 2).float()
        films = resample(films, draw)
        films = _levels(films, draw)
        films = _on_some(films, draw.clahe, lambda some, at: clahe(some, draw.clip_limit[at]))
        films = _on_some(films, draw.noise, lambda some, at: add_noise(some, draw.keys[at], draw.noise_std[at]))
        films = _on_some(films, draw.blur, lambda some, at: blur(some, draw.blur_sigma[at]))
        films = _on_some(films, draw.holes > 0, lambda some, at: black_out(some, draw.hole_box[at], draw.holes[at]))
        films = _on_some(films, draw.grid, lambda some, at: black_grid(some, draw.keys[at], draw.grid_unit[at]))
        return films.round_().to(torch.uint8).permute(0, 2, 3, 1)

    def draw(self, *, epoch: int, rows: npt.NDArray[np.int64]) -> Draw:
        """What is done to the films `rows` in `epoch`."""
        keys = film_keys(seed=self.seed, epoch=epoch, rows=rows)
        number = iter(uniforms(keys, NUMBERS).unbind(1))
        p, side = self.p, self.side

        def happens(share: float) -> Tensor:
            return next(number) < share

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * next(number)

        crop = happens(1.0 if self.min_crop < 1 else 0.0)
        scale, centre = self._crop(torch.stack([next(number) for _ in range(2 * CROP_TRIES + 2)], dim=1))
        rotated, angle = happens(p), between(-self.rotation, self.rotation)
        flip = happens(p)
        changed = happens(p)
        contrast, brightness = between(-self.change, self.change), between(-self.change, self.change)
        bent, gamma = happens(p if self.gamma else 0.0), between(1 / (1 + self.gamma), 1 + self.gamma)
        clahe_on, clip_limit = happens(0.6 * p), between(1, 2)
        noise_on, noise_std = happens(0.6 * p), between(0.01 * 255, 0.04 * 255)
        blur_on, sigma = happens(0.4 * p), between(0.3, 1.0)
        holed, count = happens(0.6 * p), between(1, MOST_HOLES + 1).long()
        grid_on = happens(0.2 * p)
        unit = between(max(4, side // 12), max(5, side // 6)).long()
        return Draw(
            keys,
            crop,
            torch.where(crop[:, None], scale, 1.0),
            torch.where(crop[:, None], centre, 0.0),
            torch.where(rotated, angle, 0.0),
            flip,
            torch.where(changed, 1 + contrast, 1.0),
            torch.where(changed, 255 * brightness, 0.0),
            torch.where(bent, gamma, 1.0),
            clahe_on,
            clip_limit,
            noise_on,
            noise_std,
            blur_on,
            sigma,
            torch.where(holed, count, 0),
            self._boxes(keys),
            grid_on,
            unit,
        )

    def _crop(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Kept share and centre of a random resized crop; the first of ten tries that fits, else the whole film."""
        area = self.min_crop + (1 - self.min_crop) * numbers[:, :CROP_TRIES]
        ratio = torch.exp(
            math.log(CROP_RATIO[0]) + math.log(CROP_RATIO[1] / CROP_RATIO[0]) * numbers[:, CROP_TRIES : 2 * CROP_TRIES]
        )
        sizes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2)
        fits = (sizes <= 1).all(dim=2)
        first = fits.int().argmax(dim=1)
        size = torch.where(fits.any(dim=1)[:, None], sizes[torch.arange(len(sizes)), first], 1.0)
        return size, (1 - size) * (2 * numbers[:, -2:] - 1)

    def _boxes(self, keys: Tensor) -> Tensor:
        drawn = uniforms(mix(keys), 4 * MOST_HOLES).view(-1, MOST_HOLES, 4)
        sizes = (self.side * (0.05 + 0.1 * drawn[..., :2])).long()
        corners = ((self.side - sizes + 1) * drawn[..., 2:]).long()
        return torch.cat([corners, corners + sizes], dim=2)


def _on_some(films_BCHW: Tensor, chosen_B: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`films_BCHW` with `change(films_NCHW, positions_N)` done to the chosen ones."""
    at = chosen_B.nonzero().squeeze(1)  # on the CPU, where the draw is: nothing waits for the device
    if len(at):
        there = at.to(films_BCHW.device, non_blocking=True)
        films_BCHW.index_copy_(0, there, change(films_BCHW.index_select(0, there), at))
    return films_BCHW


def _column(values_N: Tensor, like: Tensor) -> Tensor:
    """A number a film, ready to be combined with films (N, C, H, W)."""
    return values_N.to(like.device, like.dtype, non_blocking=True).view(-1, 1, 1, 1)


# --- the changes: float films (N, C, H, W) of grey levels in [0, 255] ------------------------------------------


def resample(films_BCHW: Tensor, draw: Draw) -> Tensor:
    """Crop, rotate and flip in one bilinear resampling; what a rotation brings in from outside is black."""
    turn = torch.deg2rad(draw.angle)
    sign = torch.where(draw.flip, -1.0, 1.0)
    zero = torch.zeros_like(turn)
    across = torch.stack([sign * turn.cos(), -turn.sin(), zero], dim=1)
    down = torch.stack([sign * turn.sin(), turn.cos(), zero], dim=1)
    theta = torch.stack([across, down], dim=1).to(films_BCHW.device, films_BCHW.dtype, non_blocking=True)
    grid_BHW2 = F.affine_grid(theta, list(films_BCHW.shape), align_corners=False)
    scale, centre = (
        item.to(films_BCHW.device, films_BCHW.dtype, non_blocking=True)[:, None, None]
        for item in (draw.crop_scale, draw.crop_centre)
    )
    # Beyond the edge of the crop lies more film, which a rotation of the cropped film would not see.
    inside = ((grid_BHW2.abs() <= 1).all(dim=3) | ~draw.crop.to(films_BCHW.device)[:, None, None])[:, None]
    sampled = F.grid_sample(films_BCHW, grid_BHW2 * scale + centre, align_corners=False)
    return sampled * inside


def _levels(films_BCHW: Tensor, draw: Draw) -> Tensor:
    changed = torch.addcmul(_column(draw.brightness, films_BCHW), films_BCHW, _column(draw.contrast, films_BCHW))
    changed = changed.clamp_(0, 255)
    return _on_some(changed, draw.gamma != 1, lambda some, at: bend(some, draw.gamma[at]))


def bend(films_NCHW: Tensor, gamma_N: Tensor) -> Tensor:
    """Grey levels, as shares of white, raised to each film's power."""
    return (films_NCHW / 255) ** _column(gamma_N, films_NCHW) * 255


def clahe(films_NCHW: Tensor, clip_limits_N: Tensor) -> Tensor:
    """Contrast-limited adaptive histogram equalisation on 8 × 8 tiles, as OpenCV does it; of the luma of colour films.

    Source: Zuiderveld 1994; the redistribution of clipped counts follows opencv/modules/imgproc/src/clahe.cpp.
    """
    if films_NCHW.shape[1] == 3:
        luma = (films_NCHW * films_NCHW.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return (films_NCHW + clahe(luma, clip_limits_N) - luma).clamp_(0, 255)
    count, _, height, width = films_NCHW.shape
    grey_NHW = films_NCHW[:, 0].round().long()
    down, across = (-side % CLAHE_TILES for side in (height, width))
    padded = F.pad(films_NCHW.round(), (0, across, 0, down), mode="reflect")[:, 0].long()
    tile_h, tile_w = padded.shape[1] // CLAHE_TILES, padded.shape[2] // CLAHE_TILES
    tables_NT = _tile_tables(padded, tile_h, tile_w, clip_limits_N)
    top, bottom, share_y = _tile_neighbours(height, tile_h, films_NCHW)
    left, right, share_x = _tile_neighbours(width, tile_w, films_NCHW)
    flat = tables_NT.reshape(count, -1)

    def looked_up(tile_y: Tensor, tile_x: Tensor) -> Tensor:
        tile = tile_y[:, None] * CLAHE_TILES + tile_x[None, :]
        return flat.gather(1, (tile * 256 + grey_NHW).view(count, -1)).view(count, height, width)

    upper = torch.lerp(looked_up(top, left), looked_up(top, right), share_x[None, None, :])
    lower = torch.lerp(looked_up(bottom, left), looked_up(bottom, right), share_x[None, None, :])
    return torch.lerp(upper, lower, share_y[None, :, None]).round()[:, None]


def _tile_tables(padded_NHW: Tensor, tile_h: int, tile_w: int, clip_limits_N: Tensor) -> Tensor:
    """Grey level → equalised grey level of every tile, (N, T, 256)."""
    count, area = len(padded_NHW), tile_h * tile_w
    tiles = padded_NHW.view(count, CLAHE_TILES, tile_h, CLAHE_TILES, tile_w).transpose(2, 3).reshape(count, -1, area)
    counts = torch.zeros((count, tiles.shape[1], 256), dtype=torch.int64, device=padded_NHW.device)
    counts.scatter_add_(2, tiles, torch.ones_like(tiles))
    limit = (clip_limits_N * area / 256).long().clamp_(min=1).to(counts.device).view(-1, 1, 1)
    excess = (counts - limit).clamp_(min=0).sum(dim=2, keepdim=True)
    residual = excess % 256
    step = (256 // residual.clamp(min=1)).clamp_(min=1)
    level = torch.arange(256, device=counts.device)
    extra = ((level % step == 0) & (level // step < residual)).long()
    summed = (torch.minimum(counts, limit) + excess // 256 + extra).cumsum(dim=2)
    return (summed.float() * (255 / area)).round_().clamp_(0, 255)


def _tile_neighbours(length: int, tile: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel of a side: the tile whose centre lies before it, the next one, and the share of the next."""
    at = torch.arange(length, device=like.device, dtype=like.dtype) / tile - 0.5
    before = at.floor()
    first, second = (item.long().clamp_(0, CLAHE_TILES - 1) for item in (before, before + 1))
    return first, second, at - before


def add_noise(films_NCHW: Tensor, keys_N: Tensor, std_N: Tensor) -> Tensor:
    """Gaussian noise, by Box and Muller, from a hash of the film's key and the pixel."""
    pixels = torch.arange(films_NCHW[0].numel(), device=films_NCHW.device)
    hashed = mix(mix(keys_N.to(films_NCHW.device, non_blocking=True) ^ 1)[:, None] + pixels)
    high = (((hashed >> 32) & (2**32 - 1)).float() + 1) / 2**32
    low = (hashed & (2**32 - 1)).float() / 2**32
    normal = ((-2 * high.clamp_(max=1).log()).sqrt() * (2 * math.pi * low).cos()).view_as(films_NCHW)
    return torch.addcmul(films_NCHW, normal, _column(std_N, films_NCHW)).clamp_(0, 255)


def blur(films_NCHW: Tensor, sigma_N: Tensor) -> Tensor:
    """Gaussian blur, each film with its own kernel of 2 · int(3.5 σ) + 1 taps."""
    count, channels, height, width = films_NCHW.shape
    radius = LARGEST_KERNEL // 2
    tap = torch.arange(-radius, radius + 1)
    kernels = torch.exp(-0.5 * (tap / sigma_N[:, None]) ** 2) * (tap.abs() <= (sigma_N[:, None] * 3.5).floor())
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    kernels = kernels.to(films_NCHW.device, films_NCHW.dtype, non_blocking=True)
    flat = F.pad(films_NCHW, (radius,) * 4, mode="reflect").view(1, count * channels, height + 6, width + 6)
    for shape in ((-1, 1, LARGEST_KERNEL, 1), (-1, 1, 1, LARGEST_KERNEL)):
        flat = F.conv2d(flat, kernels.view(shape), groups=count * channels)
    return flat.view(count, channels, height, width)


def black_out(films_NCHW: Tensor, boxes_N44: Tensor, holes_N: Tensor) -> Tensor:
    """Films with the first `holes_N` of their boxes black."""
    boxes = torch.where(torch.arange(MOST_HOLES)[None, :, None] < holes_N[:, None, None], boxes_N44, 0)
    top, left, bottom, right = boxes.to(films_NCHW.device, non_blocking=True)[..., None].unbind(2)
    rows, columns = (torch.arange(side, device=films_NCHW.device) for side in films_NCHW.shape[2:])
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    covered = (in_rows[:, :, :, None] & in_columns[:, :, None, :]).any(dim=1, keepdim=True)
    return films_NCHW.masked_fill(covered, 0)


def black_grid(films_NCHW: Tensor, keys_N: Tensor, units_N: Tensor) -> Tensor:
    """Films with a black rectangle, 0.3 of the cell's side, somewhere in each cell of a grid."""
    count, _, height, width = films_NCHW.shape
    device = films_NCHW.device
    starts, lengths, cells = zip(*(_cells(side, units_N, device) for side in (height, width)))
    most = int(max((height // units_N).max(), (width // units_N).max()))
    offsets = uniforms(mix(keys_N ^ 2).to(device, non_blocking=True), 2 * most * most).view(count, 2, -1)
    cell = (cells[0][:, :, None] * most + cells[1][:, None, :]).view(count, -1)
    covered = torch.ones((count, height, width), dtype=torch.bool, device=device)
    for axis, shape in enumerate(((count, height, 1), (count, 1, width))):
        length = lengths[axis].view(shape)
        hole = (length * GRID_RATIO).long().clamp(min=1)
        drawn = offsets[:, axis].gather(1, cell).view(count, height, width)
        first = starts[axis].view(shape) + ((length - hole + 1) * drawn).long()
        at = torch.arange((height, width)[axis], device=device).view(shape[1:])
        covered &= (at >= first) & (at < first + hole)
    return films_NCHW.masked_fill(covered[:, None], 0)


def _cells(side: int, units_N: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel of a side, (N, side): where its grid cell starts, how long it is, and which it is."""
    number = (side // units_N).to(device)[:, None]
    at = torch.arange(side, device=device)[None, :]
    cell = at * number // side
    start = -(-cell * side // number)
    end = -(-(cell + 1) * side // number)
    return start, end - start, cell
