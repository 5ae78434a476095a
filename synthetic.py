"""Synthetic chest films for the demo, the self-checks and the tests; none of them shows a person.

`film` draws one from a seed: body, lung fields, ribs, spine, heart, diaphragm, exposure, noise and a side marker;
pneumonia is one to three soft opacities inside a lung. `write_dataset` lays out class folders with the published
file names, so that the ordinary commands run on them unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

CLASSES = ("NORMAL", "PNEUMONIA")
Film = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.floating[Any]]


def film(*, pneumonia: bool, seed: int, size: int = 224, anatomy_seed: int | None = None) -> Film:
    """One synthetic film, uint8 (size, size). `anatomy_seed` fixes the patient while `seed` varies the exposure."""
    body = np.random.default_rng((0 if anatomy_seed is None else 1, seed if anatomy_seed is None else anatomy_seed))
    exposure = np.random.default_rng((2, seed))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    x += float(exposure.uniform(-0.03, 0.03))
    lungs = _lung_field(x, y, body)
    image = 0.75 - 0.5 * lungs + 0.25 * _blob(x, y, 0.5, 0.5, 0.045, 0.6)
    image += 0.28 * _blob(x, y, 0.56, 0.66, 0.15 * body.uniform(0.85, 1.2), 0.16)
    image += 0.05 * _ribs(x, y, body) * lungs
    if pneumonia:
        image += _opacities(x, y, exposure) * lungs
    outside = np.clip((np.abs(x - 0.5) - 0.44) * 12, 0, 1)
    image = image * (1 - outside)
    return _expose(image, exposure, size)


def _blob(x: Plane, y: Plane, cx: float, cy: float, rx: float, ry: float) -> Plane:
    return np.exp(-(((x - cx) / rx) ** 2) - ((y - cy) / ry) ** 2).astype(np.float32)


def _lung_field(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Two soft ellipses with a sharper lower edge, the diaphragm; 1 inside the lungs."""
    base = rng.uniform(0.76, 0.84)
    left = ((x - 0.31) / rng.uniform(0.14, 0.18)) ** 2 + ((y - 0.47) / rng.uniform(0.31, 0.38)) ** 2
    right = ((x - 0.69) / rng.uniform(0.13, 0.17)) ** 2 + ((y - 0.47) / rng.uniform(0.31, 0.38)) ** 2
    inside = 1 / (1 + np.exp(9 * (np.minimum(left, right) - 1)))
    return (inside / (1 + np.exp(60 * (y - base - 0.05 * np.cos(9 * (x - 0.3)))))).astype(np.float32)


def _ribs(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    spacing = rng.uniform(46, 54)
    return np.maximum(0, np.sin(spacing * (y + 0.35 * (np.abs(x - 0.5) - 0.2) ** 2 * 4))).astype(np.float32)


def _opacities(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    total: Plane = np.zeros(x.shape)
    for _ in range(int(rng.integers(1, 4))):
        side = rng.choice([0.31, 0.69])
        centre = (side + rng.uniform(-0.07, 0.07), rng.uniform(0.35, 0.7))
        width, height = rng.uniform(0.05, 0.13, size=2)
        total = total + rng.uniform(0.16, 0.34) * _blob(x, y, *centre, width, height)
    return total


def _expose(image: Plane, rng: np.random.Generator, size: int) -> Film:
    image = np.clip(image, 0, 1) ** rng.uniform(0.8, 1.25) * rng.uniform(0.8, 1.05)
    blurred: Plane = np.asarray(cv2.GaussianBlur(image, (0, 0), sigmaX=size / 224 * 0.8))
    noisy = blurred + rng.normal(0, 0.025, image.shape)
    picture = np.ascontiguousarray(np.clip(noisy * 255, 0, 255).astype(np.uint8))
    corner = (int(size * rng.choice([0.06, 0.86])), int(size * 0.12))
    cv2.putText(picture, "L", corner, cv2.FONT_HERSHEY_SIMPLEX, size / 320, 230, max(1, size // 160))
    return picture


def write_dataset(
    folder: Path, *, patients_per_class: dict[str, int], films_per_patient: int = 2, size: int = 224, seed: int = 0
) -> int:
    """Write DIR/SPLIT/CLASS/*.jpeg for every split named in `patients_per_class`; returns the number of films."""
    patient = written = 0
    for split, patients in patients_per_class.items():
        for label in CLASSES:
            target = folder / split / label
            target.mkdir(parents=True, exist_ok=True)
            for _ in range(patients):
                patient += 1
                for number in range(films_per_patient):
                    written += 1
                    picture = film(
                        pneumonia=label == "PNEUMONIA",
                        seed=seed * 1_000_003 + written,
                        size=size,
                        anatomy_seed=seed * 1_000_003 + patient,
                    )
                    Image.fromarray(picture).save(target / _file_name(label, patient, number), quality=92)
    return written


def _file_name(label: str, patient: int, number: int) -> str:
    if label == "NORMAL":
        return f"IM-{patient:04d}-{number + 1:04d}.jpeg"
    kind = "bacteria" if patient % 2 else "virus"
    return f"person{patient}_{kind}_{number + 1}.jpeg"
