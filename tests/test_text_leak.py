"""text_leak: how well notes alone predict, which words carry it, which name the label."""

from __future__ import annotations

import numpy as np
import pytest

from auroc import auroc
from text_encoder import mask_terms, read_terms
from text_leak import naming_words, note_alone, stems, terms_file

CLASSES = ("COVID-19", "OTHER")


def written(count: int = 200, seed: int = 0) -> tuple[list[str], np.ndarray, list[str]]:
    """Notes of patients: half of those with COVID say so, 'lymphopenia' gives others away, the rest is noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    notes = []
    for label in labels:
        words = list(rng.choice(["fever", "cough", "chest", "film", "left", "right"], 5))
        if label == 0 and rng.random() < 0.5:
            words.append("COVID-19.")
        if label == 0 and rng.random() < 0.3:
            words.append("lymphopenia")
        notes.append(" ".join(words))
    return notes, labels, [f"p{k}" for k in range(count)]


def test_notes_that_say_the_label_predict_it_and_the_words_are_named() -> None:
    notes, labels, _ = written()
    test_notes, test_labels, _ = written(seed=1)
    found = note_alone(notes, labels, test_notes, classes=CLASSES)
    assert found is not None
    assert auroc(test_labels == 0, found.probabilities_NC[:, 0]) > 0.75
    best = {row["word"] for row in found.words[:6] if row["class"] == "COVID-19"}
    assert {"covid-19", "lymphopenia"} <= best


def test_notes_without_a_hint_stay_at_chance() -> None:
    notes, labels, _ = written(600)
    plain = [mask_terms(note, ["covid-19", "lymphopenia"]) for note in notes]
    found = note_alone(plain[:300], labels[:300], plain[300:], classes=CLASSES)
    assert found is not None
    assert auroc(labels[300:] == 0, found.probabilities_NC[:, 0]) == pytest.approx(0.5, abs=0.1)


def test_words_that_name_the_label_and_words_that_give_it_away_are_told_apart() -> None:
    notes, labels, patients = written()
    found = {row["word"]: row for row in naming_words(notes, labels, patients, classes=CLASSES)}
    assert set(found) == {"covid-19", "lymphopenia"}
    assert found["covid-19"]["kind"] == "names" and found["lymphopenia"]["kind"] == "gives_away"
    assert found["lymphopenia"]["class"] == "COVID-19" and found["lymphopenia"]["share"] == 1.0


def test_a_patient_counts_once_however_many_notes() -> None:
    notes, labels = ["rare finding"] * 30 + ["film"] * 30, np.array([0] * 30 + [1] * 30)
    patients = ["one"] * 30 + [f"p{k}" for k in range(30)]
    assert naming_words(notes, labels, patients, classes=("A1", "B1")) == []


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("COVID-19", "OTHER"), ["covid"]),
        (("NORMAL", "PNEUMONIA"), ["pneumonia"]),
        (("Pleural Effusion", "No finding"), ["effusion", "pleural"]),
        (("a", "b"), []),
    ],
)
def test_stems_are_the_parts_of_a_class_name_that_a_note_could_hold(classes: tuple, expected: list[str]) -> None:
    assert stems(classes) == expected


def test_nothing_to_learn_from_is_nothing_found() -> None:
    assert note_alone(["a b"], np.array([0]), ["a"], classes=CLASSES) is None
    assert note_alone(["", ""], np.array([0, 1]), [""], classes=CLASSES) is None
    assert naming_words([], np.array([], dtype=np.int64), [], classes=CLASSES) == []


def test_the_list_of_terms_is_read_back_and_takes_them_out(tmp_path) -> None:
    notes, labels, patients = written()
    found = naming_words(notes, labels, patients, classes=CLASSES)
    path = tmp_path / "leaking_terms.txt"
    path.write_text(terms_file(found), encoding="utf-8")
    terms = read_terms(path)
    assert terms == [row["word"] for row in found]
    assert not any("covid" in mask_terms(note, terms).lower() for note in notes)
