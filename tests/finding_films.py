"""Films with two findings that come and go independently, for the tests of data.task=multilabel."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd

NAMES = ("effusion", "mass")
SIDE = 32


def write_findings(folder: Path, *, patients: int = 90, seed: int = 0) -> Path:
    """A manifest of two films a patient with splits: an effusion is a bright base, a mass a bright disc above it."""
    rng = np.random.default_rng(seed)
    rows = []
    (folder / "films").mkdir(parents=True)
    for patient in range(patients):
        split = "test" if patient % 3 == 2 else "val" if patient % 6 == 1 else "train"
        for view in range(2):
            effusion, mass = rng.random(2) < (0.5, 0.35)
            name = f"films/{patient:03d}_{view}.png"
            cv2.imwrite(str(folder / name), film(effusion=effusion, mass=mass, rng=rng))
            cell = "|".join(name for name, there in zip(NAMES, (effusion, mass)) if there)
            rows.append((name, cell or rng.choice(["", "No Finding", "none"]), split, f"p{patient}"))
    manifest = folder / "manifest.csv"
    pd.DataFrame(rows, columns=["path", "label", "split", "patient_id"]).to_csv(manifest, index=False)
    return manifest


def film(*, effusion: bool, mass: bool, rng: np.random.Generator) -> np.ndarray:
    """A noisy grey film (SIDE, SIDE) uint8."""
    image = rng.normal(90, 14, (SIDE, SIDE))
    if effusion:
        image[SIDE - 9 :] += 55
    if mass:
        y, x = np.mgrid[:SIDE, :SIDE]
        centre = rng.integers(7, SIDE - 7), rng.integers(6, 14)
        image[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 22] += 70
    return np.clip(image, 0, 255).astype(np.uint8)
