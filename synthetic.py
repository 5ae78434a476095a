"""Synthetic chest films for the demo, the notebook, the self-checks and the tests; none of them shows a person.

`film` draws one from a seed: body outline, lung fields with vessels, ribs, clavicles, spine, heart, diaphragm, stomach
bubble, positioning, exposure, noise and a side marker; pneumonia is one to three soft patchy opacities inside the
lungs. `write_dataset` lays out class folders with the published file names, so that the ordinary commands run on them
unchanged, and manifest.csv with the age, sex and a short note of each film. x runs from the patient's right to the
left and y downwards, both from 0 to 1; brightness is that of a film on a light box, bone bright and air dark.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

CLASSES = ("NORMAL", "PNEUMONIA")
COLUMNS = ("path", "label", "split", "patient_id", "age", "sex", "text")
Film = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.floating[Any]]

NOTES = {
    "infection": (
        "Fever and cough for {n} days.",
        "Productive cough, oxygen saturation {s} %.",
        "Shortness of breath and chills since yesterday.",
        "Crackles at the {side} base, raised CRP.",
        "Fever of unknown origin, focus?",
    ),
    "other": (
        "Film before an operation.",
        "Chest pain on the {side}, rib fracture?",
        "Routine control, no complaints.",
        "Cough for {n} weeks, smoker.",
        "Weight loss, mass?",
        "Position of the central line?",
    ),
    "named": ("Pneumonia, control after {n} days of antibiotics.", "Pneumonia last year, control."),
    "empty": ("",),
}
NOTE_SHARES = {"NORMAL": (0.20, 0.66, 0.04, 0.10), "PNEUMONIA": (0.55, 0.25, 0.10, 0.10)}
"""How often a note of each kind stands with a film of each class: a note helps, but decides nothing."""


@dataclass(frozen=True)
class Body:
    """What stays the same in all films of a patient; lengths are shares of the film's side."""

    age: int
    female: bool
    width: float
    """From the midline to the side of the lungs."""
    apex: float
    base: float
    """Height of the top of the diaphragm on the left."""
    heart: float
    """From the midline to the apex of the heart."""
    rib_spacing: float
    rib_slope: float
    vessels: int
    """Seed of the pattern of vessels."""


def body_of(seed: int | tuple[int, int]) -> Body:
    """The patient of this seed."""
    rng = np.random.default_rng(seed)
    age = int(np.clip(rng.normal(55, 20), 18, 95))
    return Body(
        age=age,
        female=bool(rng.random() < 0.5),
        width=rng.uniform(0.36, 0.42),
        apex=rng.uniform(0.09, 0.15),
        base=rng.uniform(0.74, 0.82),
        heart=rng.uniform(0.17, 0.23) + 0.0004 * (age - 55),
        rib_spacing=rng.uniform(0.088, 0.108),
        rib_slope=rng.uniform(0.7, 1.3),
        vessels=int(rng.integers(2**31)),
    )


def film(*, pneumonia: bool, seed: int, size: int = 224, anatomy_seed: int | None = None) -> Film:
    """One synthetic film, uint8 (size, size). `anatomy_seed` fixes the patient while `seed` varies the exposure."""
    body = body_of((0, seed) if anatomy_seed is None else (1, anatomy_seed))
    rng = np.random.default_rng((2, seed))
    x, y = _positioned(size, rng)
    lungs = _lungs(x, y, body)
    image = 0.62 + 0.10 * y - 0.44 * lungs
    image += _vessels(x, y, body, size) * lungs
    image += _middle(x, y, body)
    image += _bones(x, y, body) * (0.45 + 0.55 * lungs)
    if body.female:
        image += 0.09 * (_blob(x, y, 0.27, 0.68, 0.15, 0.13) + _blob(x, y, 0.73, 0.68, 0.15, 0.13))
    if pneumonia:
        image += _opacities(x, y, body, rng, size) * lungs
    return _exposed(image * _outline(x, y), rng, size)


def _positioned(size: int, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """x and y of each pixel in the body's own frame: the patient stands a little turned, aside, nearer or farther."""
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) / size
    turn, scale = float(rng.normal(0, 0.025)), float(rng.uniform(0.94, 1.06))
    right, down = x - 0.5 - float(rng.normal(0, 0.015)), y - 0.5 - float(rng.normal(0, 0.015))
    return 0.5 + scale * (right + turn * down), 0.5 + scale * (down - turn * right)


def _blob(x: Plane, y: Plane, cx: float, cy: float, rx: float, ry: float) -> Plane:
    return np.exp(-(((x - cx) / rx) ** 2) - ((y - cy) / ry) ** 2)


def _step(value: Plane, width: float) -> Plane:
    """0 below zero and 1 above, over about `width` to both sides."""
    return 1 / (1 + np.exp(np.clip(-value * (2.5 / width), -30, 30)))


def _outline(x: Plane, y: Plane) -> Plane:
    """1 inside the body: neck, shoulders sloping to the arms, sides."""
    aside = np.abs(x - 0.5)
    shoulder = 0.02 + 0.22 * np.clip((aside - 0.13) / 0.37, 0, 1) ** 1.5
    side = 0.53 - 0.05 * _step(y - 0.45, 0.2)
    return _step(y - shoulder, 0.02) * _step(side - aside, 0.02)


def _lungs(x: Plane, y: Plane, body: Body) -> Plane:
    """1 inside the lungs: a rounded apex, straight sides, the heart and the domes of the diaphragm cut out."""
    aside, left = np.abs(x - 0.5), x > 0.5
    down = np.clip((y - body.apex) / (body.base - body.apex), 0, 1.3)
    outer = body.width * np.sqrt(np.clip(1 - np.clip(1 - 1.15 * down, 0, 1) ** 2.4, 0, 1)) - 0.03 * (down > 1.2)
    inner = 0.06 + 0.02 * down + np.where(left, _bulge(down, 0.22, 0.09, 0.04), _bulge(down, 0.85, 0.22, 0.045))
    inner = inner + 0.012 * _bulge(down, 0.48, 0.10, 1.0)
    # The right dome stands higher, over the liver; both fall to the sides into a sharp angle.
    dome = body.base - 0.025 * ~left + 1.9 * (aside - 0.19) ** 2
    inside = _step(outer - aside, 0.012) * _step(aside - inner, 0.012) * _step(y - body.apex, 0.02)
    return inside * _step(dome - y, 0.009) * (1 - 0.9 * _heart(x, y, body))


def _bulge(down: Plane, at: float, over: float, by: float) -> Plane:
    return by * np.exp(-(((down - at) / over) ** 2))


def _heart(x: Plane, y: Plane, body: Body) -> Plane:
    """1 inside the shadow of the heart: an egg whose apex points down to the left."""
    cx, cy = 0.5 + 0.25 * body.heart, body.base - 0.11
    along, across = 0.78 * (x - cx) + 0.62 * (y - cy), -0.62 * (x - cx) + 0.78 * (y - cy)
    radius = np.sqrt((along / (1.05 * body.heart)) ** 2 + (across / ((0.78 - 0.5 * along) * body.heart)) ** 2)
    return _step(1 - radius, 0.13)


def _middle(x: Plane, y: Plane, body: Body) -> Plane:
    """Spine, windpipe, great vessels, the roots of the lungs, the stomach bubble."""
    disc = 0.02 * np.cos(2 * np.pi * y / 0.062)
    image = (0.10 + disc) * _blob(x, y, 0.5, 0.55, 0.05, 0.7)
    image -= 0.13 * _blob(x, y, 0.5, 0.10, 0.022, 0.16)
    image += 0.05 * _blob(x, y, 0.56, 0.27, 0.045, 0.05)
    image += 0.07 * (_blob(x, y, 0.40, 0.45, 0.04, 0.06) + _blob(x, y, 0.605, 0.42, 0.04, 0.06))
    image += 0.04 * _heart(x, y, body)
    return image - 0.16 * _blob(x, y, 0.66, body.base + 0.10, 0.06, 0.035) * (1 - _heart(x, y, body))


def _bones(x: Plane, y: Plane, body: Body) -> Plane:
    """Ribs behind, their fainter front ends, collar bones and shoulder blades."""
    aside = np.abs(x - 0.5)
    out = aside / body.width
    back = body.rib_slope * (0.16 * out**2.2 - 0.06 * out)
    front = body.rib_slope * (-0.24 * out + 0.10)
    chest = _step(y - 0.6 * body.apex, 0.03) * _step(1.08 * body.width - aside, 0.02)
    image = 0.10 * _bands((y - back) / body.rib_spacing) * chest * _step(aside - 0.05, 0.02)
    image += 0.04 * _bands((y - front) / (1.25 * body.rib_spacing)) * chest * _step(aside - 0.17, 0.04)
    collar = body.apex + 0.075 - 0.14 * np.clip(aside - 0.03, 0, 1) + 0.018 * np.sin(14 * aside)
    image += 0.20 * np.exp(-(((y - collar) / 0.018) ** 2)) * _step(aside - 0.05, 0.015) * _step(0.40 - aside, 0.03)
    return image + 0.07 * _blob(aside, y, 0.40, 0.25, 0.055, 0.15)


def _bands(phase: Plane) -> Plane:
    """A rib once a unit of `phase`: bright at both edges, a little less between them."""
    across = np.abs(phase - np.round(phase)) / 0.24
    return np.exp(-(across**6)) * (0.65 + 0.35 * across**2)


def _vessels(x: Plane, y: Plane, body: Body, size: int) -> Plane:
    """Branching streaks that run out from the roots of the lungs and thin out, as brightness of this patient."""
    canvas = np.zeros((size, size), np.float32)
    rng = np.random.default_rng(body.vessels)
    for side in (-1, 1):
        for angle in np.linspace(-1.2, 1.3, 7) + rng.uniform(-0.15, 0.15, 7):
            _branch(canvas, np.array([0.5 + 0.10 * side, 0.43 + 0.05 * angle]), side, float(angle), 0.30, 0.010, rng)
    # The streaks are drawn in the body's frame and follow the positioning of the film.
    maps = ((x * size - 0.5).astype(np.float32), (y * size - 0.5).astype(np.float32))
    moved = cv2.remap(canvas, *maps, cv2.INTER_LINEAR)
    return np.asarray(cv2.GaussianBlur(moved, (0, 0), sigmaX=max(0.3, size / 224 * 0.9)))


def _branch(
    canvas: npt.NDArray[np.float32],
    start: Plane,
    side: int,
    angle: float,
    length: float,
    width: float,
    rng: np.random.Generator,
) -> None:
    """Draw one vessel on `canvas`, and those that leave it."""
    size = len(canvas)
    end = start + length * np.array([side * np.cos(angle), np.sin(angle)]) * rng.uniform(0.35, 0.5)
    ends = [tuple(int(value) for value in np.round(point * size * 16)) for point in (start, end)]
    thickness = max(1, round(width * size))
    cv2.line(canvas, ends[0], ends[1], 9 * width, thickness, cv2.LINE_AA, 4)
    if width > 0.004:
        for bend in (rng.uniform(0.1, 0.6), -rng.uniform(0.1, 0.6)):
            _branch(canvas, end, side, angle + bend, 0.8 * length, 0.68 * width, rng)


def _opacities(x: Plane, y: Plane, body: Body, rng: np.random.Generator, size: int) -> Plane:
    """One to three soft opacities of varying size, density and place, patchy as air between them leaves them."""
    blobs = []
    for _ in range(int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))):
        aside = rng.choice([-1, 1]) * body.width * rng.uniform(0.45, 0.8)
        height = body.apex + (body.base - body.apex) * rng.beta(3, 2)
        rx, ry = rng.uniform(0.06, 0.16, 2)
        blobs.append(rng.uniform(0.2, 0.45) * _blob(x, y, 0.5 + aside, height, rx, ry))
    coarse = rng.normal(1, 0.35, (14, 14)).astype(np.float32)
    patches = np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), np.float32)
    return np.max(blobs, axis=0) * np.clip(patches, 0.3, 1.6)


def _exposed(image: Plane, rng: np.random.Generator, size: int) -> Film:
    """The film as it comes out of the reader: gamma, gain, unsharpness, quantum noise, collimation, marker."""
    image = np.clip(image, 0, 1) ** rng.uniform(0.85, 1.3) * rng.uniform(0.9, 1.12)
    image = image + 0.015
    blurred: Plane = np.asarray(cv2.GaussianBlur(image, (0, 0), sigmaX=max(0.25, size / 224 * rng.uniform(0.4, 0.9))))
    noisy = blurred + rng.normal(0, rng.uniform(0.008, 0.022), image.shape) * np.sqrt(blurred + 0.15)
    picture = np.ascontiguousarray(np.clip(noisy * 255, 0, 255).astype(np.uint8))
    if rng.random() < 0.35:
        _collimate(picture, rng)
    _mark(picture, str(rng.choice(["L", "R"])), rng)
    return picture


def _collimate(picture: Film, rng: np.random.Generator) -> None:
    top, bottom, first, last = (round(len(picture) * share) for share in rng.uniform(0, 0.035, 4))
    kept = picture[top : len(picture) - bottom, first : len(picture) - last].copy()
    picture[:] = 4
    picture[top : len(picture) - bottom, first : len(picture) - last] = kept


def _mark(picture: Film, letter: str, rng: np.random.Generator) -> None:
    """The side marker of the technician, on the side it names."""
    size = len(picture)
    x = (0.86 if letter == "L" else 0.05) + rng.uniform(0, 0.04)
    corner = (int(size * x), int(size * rng.uniform(0.09, 0.16)))
    cv2.putText(picture, letter, corner, cv2.FONT_HERSHEY_SIMPLEX, size / 340, 235, max(1, size // 160), cv2.LINE_AA)


def note(*, label: str, rng: np.random.Generator) -> str:
    """What the ward writes on the request: telling, not telling, now and then the diagnosis itself, or nothing."""
    kind = str(rng.choice(list(NOTES), p=NOTE_SHARES[label]))
    words = str(rng.choice(NOTES[kind]))
    return words.format(n=rng.integers(2, 9), s=rng.integers(86, 97), side=rng.choice(["left", "right"]))


def write_dataset(
    folder: Path, *, patients_per_class: dict[str, int], films_per_patient: int = 2, size: int = 224, seed: int = 0
) -> int:
    """Write DIR/SPLIT/CLASS/*.jpeg for every split named in `patients_per_class`; returns the number of films.

    DIR/manifest.csv lists them with patient, age, sex and note.
    """
    rows: list[Sequence[object]] = []
    patient = 0
    for split, patients in patients_per_class.items():
        for label in CLASSES:
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for _ in range(patients):
                patient += 1
                who = seed * 1_000_003 + patient
                body = body_of((1, who))
                for number in range(films_per_patient):
                    exposure = seed * 1_000_003 + len(rows) + 1
                    name = f"{split}/{label}/{_file_name(label, patient, number)}"
                    picture = film(pneumonia=label == "PNEUMONIA", seed=exposure, size=size, anatomy_seed=who)
                    Image.fromarray(picture).save(folder / name, quality=92)
                    words = note(label=label, rng=np.random.default_rng((3, exposure)))
                    sex = "F" if body.female else "M"
                    rows.append((name, label, split, _patient_name(label, patient), body.age, sex, words))
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])
    return len(rows)


def _patient_name(label: str, patient: int) -> str:
    if label == "NORMAL":
        return f"IM-{patient:04d}"
    return f"person{patient}_{'bacteria' if patient % 2 else 'virus'}"


def _file_name(label: str, patient: int, number: int) -> str:
    running = f"-{number + 1:04d}" if label == "NORMAL" else f"_{number + 1}"
    return f"{_patient_name(label, patient)}{running}.jpeg"


def write_text_encoder(folder: Path, notes: Sequence[str], *, seed: int = 0) -> Path:
    """A folder with a two-layer BERT of random weights and a WordPiece vocabulary of `notes`; asks no network."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(notes, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    config.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(BertModel(config).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
