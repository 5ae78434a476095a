"""synthetic.py: films that look like chest films, patients, notes that help and do not decide, a text encoder."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import synthetic
from config import resolve
from data_preprocessing import load_manifest, patients_of
from text_encoder import load_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic")
    assert synthetic.write_dataset(path, patients_per_class={"train": 60, "test": 12}, size=24) == 288
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def drawn(count: int = 24, *, pneumonia: bool = False) -> np.ndarray:
    films = [synthetic.film(pneumonia=pneumonia, seed=seed, size=96) for seed in range(count)]
    return np.stack(films).astype(np.float64)


def test_a_film_is_given_by_its_seeds() -> None:
    one = synthetic.film(pneumonia=True, seed=3, size=64, anatomy_seed=8)
    assert (one == synthetic.film(pneumonia=True, seed=3, size=64, anatomy_seed=8)).all()
    assert (one != synthetic.film(pneumonia=True, seed=4, size=64, anatomy_seed=8)).any()
    assert one.shape == (64, 64) and one.dtype == np.uint8


@pytest.mark.parametrize("size", [16, 33, 96, 300])
def test_any_size_is_drawn_with_a_full_range_of_grey(size: int) -> None:
    film = synthetic.film(pneumonia=True, seed=1, size=size)
    assert film.shape == (size, size) and film.min() < 40 and film.max() > 150


def test_lungs_are_darker_than_heart_spine_and_belly_and_the_air_outside_is_black() -> None:
    mean = drawn().mean(axis=0)

    def at(x: float, y: float) -> float:
        row, column = int(y * 96), int(x * 96)
        return float(mean[row - 3 : row + 4, column - 3 : column + 4].mean())

    lungs = [at(0.28, 0.5), at(0.72, 0.45)]
    solid = [at(0.5, 0.55), at(0.56, 0.68), at(0.3, 0.93), at(0.12, 0.3)]
    assert max(lungs) < min(solid) - 30
    assert at(0.04, 0.05) < 0.4 * min(lungs)


def test_the_heart_lies_to_the_left_and_the_right_dome_stands_higher() -> None:
    mean = drawn().mean(axis=0)
    lower = mean[int(0.62 * 96) : int(0.72 * 96)]
    assert lower[:, int(0.60 * 96) : int(0.66 * 96)].mean() > lower[:, int(0.34 * 96) : int(0.40 * 96)].mean() + 15
    domes = mean[int(0.74 * 96) : int(0.79 * 96)]
    assert domes[:, int(0.27 * 96) : int(0.34 * 96)].mean() > domes[:, int(0.75 * 96) : int(0.82 * 96)].mean()


def test_pneumonia_brightens_the_lungs_and_nothing_else() -> None:
    pairs = [
        [synthetic.film(pneumonia=ill, seed=seed, size=96, anatomy_seed=seed).astype(float) for ill in (False, True)]
        for seed in range(40)
    ]
    # Same patient, same positioning; gamma and noise are drawn after the opacities and differ.
    difference = np.mean([ill - well for well, ill in pairs], axis=0)
    lungs = np.r_[difference[40:60, 20:34].ravel(), difference[40:60, 62:76].ravel()]
    assert lungs.mean() > 8 > abs(difference[85:94, 10:86].mean())


def test_opacities_vary_in_size_and_place() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64] / 64
    body = synthetic.body_of((1, 1))
    found = [synthetic._opacities(x, y, body, rng, 64) for _ in range(60)]
    areas = np.array([(item > 0.1).mean() for item in found])
    centres = np.array([np.unravel_index(item.argmax(), item.shape) for item in found]) / 64
    assert areas.max() > 3 * areas.min() > 0
    assert centres[:, 1].min() < 0.35 and centres[:, 1].max() > 0.65 and np.ptp(centres[:, 0]) > 0.3


def test_films_of_a_patient_are_nearer_than_those_of_another() -> None:
    def film(patient: int, seed: int) -> np.ndarray:
        drawn = synthetic.film(pneumonia=False, seed=seed, size=64, anatomy_seed=patient).astype(float)
        return (drawn - drawn.mean()) / drawn.std()

    same = [np.abs(film(p, 10 * p) - film(p, 10 * p + 1)).mean() for p in range(20)]
    other = [np.abs(film(p, 10 * p) - film(p + 50, 10 * p + 1)).mean() for p in range(20)]
    assert np.mean(same) < np.mean(other)


def test_the_manifest_lists_every_film_and_the_loader_reads_it(folder: Path, rows: list[dict[str, str]]) -> None:
    assert {row["path"] for row in rows} == {path.relative_to(folder).as_posix() for path in folder.rglob("*.jpeg")}
    manifest = load_manifest(resolve({"data.manifest": str(folder / "manifest.csv")}).data)
    assert manifest.counts() == {name: {"NORMAL": n, "PNEUMONIA": n} for name, n in (("train", 120), ("test", 24))}
    assert [row["patient_id"] for row in rows] == patients_of([row["path"] for row in rows], None)
    with Image.open(folder / rows[0]["path"]) as picture:
        assert picture.size == (24, 24)


def test_a_patient_has_several_films_and_one_age_and_sex(rows: list[dict[str, str]]) -> None:
    counts = Counter(row["patient_id"] for row in rows)
    assert set(counts.values()) == {2}
    assert len({(row["patient_id"], row["age"], row["sex"], row["split"]) for row in rows}) == len(counts)
    assert {row["sex"] for row in rows} == {"F", "M"} and all(18 <= int(row["age"]) <= 95 for row in rows)


def test_notes_help_and_do_not_decide() -> None:
    rng = np.random.default_rng(5)
    labels = np.arange(1200) % 2
    notes = [synthetic.note(label=synthetic.CLASSES[label], rng=rng) for label in labels]
    words = CountVectorizer(binary=True)
    counts = words.fit_transform(notes[:800])
    scores = LogisticRegression(max_iter=1000).fit(counts, labels[:800]).predict_proba(words.transform(notes[800:]))
    assert 0.65 < roc_auc_score(labels[800:], scores[:, 1]) < 0.9
    naming = np.array(["pneumonia" in note.lower() for note in notes])
    assert 0 < naming[labels == 1].mean() < 0.25 and naming[labels == 0].any()
    assert 0.03 < np.mean([not note for note in notes]) < 0.2
    assert not any("{" in note for note in notes)


def test_age_and_sex_say_nothing_of_the_class(tmp_path: Path) -> None:
    bodies = [synthetic.body_of((1, seed)) for seed in range(2000)]
    labels = np.arange(2000) % 2
    for values in ([body.age for body in bodies], [body.female for body in bodies]):
        # Three standard errors of an AUROC of 1,000 against 1,000.
        assert abs(roc_auc_score(labels, values) - 0.5) < 3 * 0.013


def test_the_text_encoder_is_read_like_any_other_and_knows_the_words(tmp_path: Path) -> None:
    notes = ["Fever and cough for 3 days.", "Film before an operation."]
    folder = synthetic.write_text_encoder(tmp_path / "bert", notes)
    encoder, reader = load_text_encoder(str(folder), max_tokens=32, trained_layers=-1)
    ids, mask = reader.read([*notes, ""]).tensors()
    assert encoder(ids, mask).shape == (3, ids.shape[1], encoder.width)
    words = [word for word, _ in reader.words(notes[0])]
    assert words == ["Fever", "and", "cough", "for", "3", "days."]
    assert mask.sum(dim=1).tolist()[2] == 0 and 1 not in ids[:2].tolist()[0]  # 1 is [UNK]
    again = synthetic.write_text_encoder(tmp_path / "again", notes)
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
