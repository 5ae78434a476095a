"""A data set with known faults, for the tests of the audit: made of synthetic films, or of real ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

Film = npt.NDArray[np.uint8]


def encoded(film: Film, *, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(film).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def cropped(film: Film) -> Film:
    height, width = film.shape[:2]
    y, x = max(1, round(0.02 * height)), max(1, round(0.02 * width))
    return np.ascontiguousarray(film[y : height - y, x : width - x])


def brightened(film: Film) -> Film:
    return np.clip(film.astype(np.float32) * 1.2 + 8, 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[Film], bytes]] = {
    "re-encoded": lambda film: encoded(film, quality=45),
    "resized": lambda film: encoded(cv2.resize(film, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)),
    "cropped": lambda film: encoded(cropped(film)),
    "brightened": lambda film: encoded(brightened(film)),
}


@dataclass
class Planted:
    """Where the faults are."""

    manifest: Path
    copies: set[frozenset[str]] = field(default_factory=set)
    leaking: set[str] = field(default_factory=set)
    conflicts: set[frozenset[str]] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)


def plant(folder: Path, films: Sequence[Film]) -> Planted:
    """Write `films` (at least 130) as a manifest with 40 changed copies, 20 leaking patients, 10 films with a copy of
    the other label and 15 corrupt files; every other film is sound and a patient of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    planted, rows = Planted(folder / "manifest.csv"), []

    def add(name: str, data: bytes, label: str, split: str, patient: str) -> str:
        (folder / name).write_bytes(data)
        rows.append({"path": name, "label": label, "split": split, "patient_id": patient})
        return name

    def label_of(number: int) -> str:
        return ("NORMAL", "PNEUMONIA")[number % 2]

    for number, film in enumerate(films):
        split = ("train", "train", "test")[number % 3]
        patient = f"p{number}"
        if 60 <= number < 100:  # the films of 20 patients, two by two, on both sides
            patient, split = f"leak{number // 2}", ("train", "test")[number % 2]
            planted.leaking.add(patient)
        name = add(f"film{number}.jpg", encoded(film), label_of(number), split, patient)
        if number < 40:
            change = list(CHANGES)[number % 4]
            other = ("train", "test")[number // 4 % 2]
            copy = add(f"copy{number}.jpg", CHANGES[change](film), label_of(number), other, f"c{number}")
            planted.copies.add(frozenset({name, copy}))
        elif number < 50:
            copy = add(f"twin{number}.png", _png(film), label_of(number + 1), split, f"t{number}")
            planted.conflicts.add(frozenset({name, copy}))
    for number in range(15):
        data = encoded(films[100 + number])
        faults = [b"", data[: len(data) // 2], b"Dear colleague, the film is attached."]
        planted.corrupt.add(add(f"bad{number}.jpg", faults[number % 3], label_of(number), "train", f"b{number}"))
    pd.DataFrame(rows).to_csv(planted.manifest, index=False)
    return planted


def _png(film: Film) -> bytes:
    """The pixels a reader of the JPEG gets, stored without loss: equal pixels in other bytes."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encoded(film))).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(report: dict, *kinds: str) -> set[frozenset[str]]:
    """The groups of films that findings of these kinds name."""
    return {
        frozenset(item["paths"])
        for finding in report["findings"]
        if finding["kind"] in kinds and finding.get("scope") != "patient"
        for item in finding["examples"]
    }


def recall_and_precision(found: set, planted: set) -> tuple[float, float]:
    """Shares of what was planted that was found, and of what was found that was planted."""
    return len(found & planted) / len(planted), len(found & planted) / max(1, len(found))
