"""What notes give away: how well they alone predict the label, which words carry it, and which words name it.

    found = note_alone(train_notes, train_labels, notes, classes=classes)
    print(found.words[:10], naming_words(notes, labels, patients, classes=classes))

A bag of words and a logistic regression, nothing of the network under test: what such a simple reader can tell is in
the words themselves. Reads notes as they are given; writes nothing. Legend: N notes, V words, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_preprocessing import NEGATIVE_NAMES

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

WORD = r"(?u)\b[^\W\d_][\w\-]*\w\b"
"""A word begins with a letter; hyphens belong to it."""
SHOWN = 20
"""Words in the lists."""
FEWEST_PATIENTS = 5
"""A word in the notes of fewer patients proves nothing."""
SURE = 0.95
"""Share of a word's patients that are of one class from which on the word gives that class away."""
LEAST_STEM = 4
"""Shorter parts of a class name would be found in any text."""


@dataclass(frozen=True)
class NoteAlone:
    """What a bag of words says."""

    probabilities_NC: FloatArray
    words: list[dict[str, Any]]
    """The words that count most: word, the class it speaks for, its weight (log odds), notes that hold it."""


def note_alone(
    known: Sequence[str], labels: IntArray, notes: Sequence[str], *, classes: Sequence[str]
) -> NoteAlone | None:
    """What a logistic regression on the words of `known` notes (`labels` (N,)) says of `notes`.

    An empty note has no words and gets the classes' prior. None where `known` holds fewer than two classes or no word.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        return None
    counter = CountVectorizer(token_pattern=WORD, binary=True, min_df=2, ngram_range=(1, 2))
    try:
        counts = counter.fit_transform(known)
    except ValueError:  # no word stands in two notes
        return None
    model = LogisticRegression(C=1.0, max_iter=2000).fit(counts, labels)
    found = np.zeros((len(notes), len(classes)))
    found[:, model.classes_] = model.predict_proba(counter.transform(notes))
    return NoteAlone(found, _carrying(model, counter, counts, classes))


def _carrying(model: Any, counter: Any, counts: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
    names = counter.get_feature_names_out()
    frequency = np.asarray(counts.sum(axis=0)).ravel()
    weights_CV = np.vstack([-model.coef_[0], model.coef_[0]]) if len(model.classes_) == 2 else model.coef_
    speaks_for = weights_CV.argmax(axis=0)
    strongest = weights_CV.max(axis=0)
    order = np.argsort(-strongest * np.sqrt(frequency), kind="stable")[:SHOWN]
    return [
        {
            "word": str(names[k]),
            "class": classes[int(model.classes_[speaks_for[k]])],
            "weight": float(strongest[k]),
            "notes": int(frequency[k]),
        }
        for k in order
    ]


def naming_words(
    notes: Sequence[str], labels: IntArray, patients: Sequence[Any], *, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Words that name a class, or that stand with one class almost only; each with the patients it was counted in.

    `kind` is names (a part of a class name) or gives_away (at least SURE of its patients are of `class`, and that is
    more than chance would give to a class of that size, p < 0.01).
    """
    found = {word: "names" for word in _words(notes) if any(word.startswith(stem) for stem in stems(classes))}
    table = _by_patient(notes, labels, patients)
    prior = np.bincount(table["label"], minlength=len(classes)) / max(1, len(table))
    rows = []
    for word in sorted(set().union(*table["words"]) if len(table) else set()):
        holds = table["words"].map(lambda words, word=word: word in words)
        counts = np.bincount(table["label"][holds], minlength=len(classes))
        total, top = int(counts.sum()), int(counts.argmax())
        share = counts[top] / total
        sure = total >= FEWEST_PATIENTS and share >= SURE and prior[top] ** total < 0.01
        if word in found or sure:
            kind = found.get(word, "gives_away")
            rows.append({"word": word, "kind": kind, "class": classes[top], "patients": total, "share": float(share)})
    return sorted(rows, key=lambda row: (row["kind"] != "names", -row["patients"]))


def stems(classes: Sequence[str]) -> list[str]:
    """Lower-case parts of the class names that a note may hold: not those of 'normal', not numbers, not short ones."""
    parts = [part for name in classes if name.lower() not in NEGATIVE_NAMES for part in re.split(r"[\W\d_]+", name)]
    return sorted({part.lower() for part in parts if len(part) >= LEAST_STEM})


def _words(notes: Sequence[str]) -> set[str]:
    return {word for note in notes for word in re.findall(WORD, note.lower())}


def _by_patient(notes: Sequence[str], labels: IntArray, patients: Sequence[Any]) -> pd.DataFrame:
    """One row a patient and class: the words of all their notes."""
    table = pd.DataFrame({"note": list(notes), "label": labels, "patient": list(patients)})
    grouped = table.groupby(["patient", "label"])["note"].agg(" \n ".join).reset_index()
    return grouped.assign(words=grouped["note"].map(lambda note: _words([note])))


def terms_file(found: Sequence[dict[str, Any]]) -> str:
    """`found` as a file for --mask-terms, with what was counted as remarks."""
    lines = ["# Words to blot out of every note: --mask-terms FILE. Look through them: one that is a finding may stay."]
    for row in found:
        lines.append(f"{row['word']}  # {row['kind']}: {row['patients']} patients, {row['share']:.0%} {row['class']}")
    return "\n".join(lines) + "\n"
