"""A nuisance that tells the label is found with the AUROC it has; one that does not is not."""

from __future__ import annotations

import numpy as np
import pytest

from auroc import auroc_ci
from shortcuts import class_stems, names_class, nuisances, telling_words

RNG = np.random.default_rng(7)
N = 400
LABELS = np.array([0, 1] * (N // 2))
PATIENTS = [f"p{row // 2}" for row in range(N)]
CLASSES = ("NORMAL", "PNEUMONIA")


def tried(**columns: np.ndarray) -> dict:
    found = nuisances(columns, LABELS, classes=CLASSES, patients=PATIENTS, positive_class="PNEUMONIA")
    return {item.name: item for item in found}


def test_a_number_has_its_own_auroc_and_clustered_interval() -> None:
    width = LABELS * 0.8 + RNG.normal(size=N)
    found = tried(width=width)["width"]
    expected = auroc_ci(LABELS, width, groups=PATIENTS)
    assert (found.auroc.value, found.auroc.ci) == (expected.value, expected.ci)
    assert found.how == "higher" and found.p_adjusted < 1e-6
    assert tried(width=-width)["width"].how == "lower"


def test_a_middle_value_that_means_disease_is_found_in_parts_of_the_range() -> None:
    size = np.where(LABELS == 1, RNG.normal(size=N) * 0.2, RNG.choice([-1, 1], N) * RNG.uniform(0.8, 1.2, N))
    found = tried(size=size)["size"]
    assert found.how == "tenths" and found.auroc.ci_low > 0.9


def test_two_views_have_the_auroc_of_the_two_by_two_table() -> None:
    view = np.where(RNG.random(N) < np.where(LABELS == 1, 0.8, 0.3), "AP", "PA")
    found = tried(view=view)["view"]
    ap = view == "AP"
    expected = 0.5 + (ap[LABELS == 1].mean() - ap[LABELS == 0].mean()) / 2
    assert found.auroc.value == pytest.approx(expected) and found.how == "AP"
    assert found.shares["AP"] == (int(ap.sum()), int((ap & (LABELS == 1)).sum()))


def test_many_sites_are_scored_on_other_patients_films() -> None:
    own = np.array([f"site{patient}" for patient in PATIENTS])  # a site a patient tells nothing of other patients
    assert tried(site=own)["site"].auroc.ci_low < 0.6
    telling = np.array([f"site{label}{RNG.integers(4)}" for label in LABELS])
    assert tried(site=telling)["site"].auroc.value > 0.95


def test_what_tells_nothing_is_rarely_significant_after_adjustment() -> None:
    found = nuisances(
        {f"noise{number}": RNG.normal(size=N) for number in range(40)},
        LABELS, classes=CLASSES, patients=PATIENTS, positive_class="PNEUMONIA",
    )  # fmt: skip
    assert len(found) == 40 and sum(item.p_adjusted < 0.05 for item in found) <= 1


def test_unknown_numbers_are_left_out_and_unknown_categories_are_one() -> None:
    age = np.where(np.arange(N) < 100, np.nan, RNG.normal(size=N))
    sex = np.where(LABELS == 1, "", "F")
    found = tried(age=age, sex=sex)
    assert found["age"].films == 300
    assert found["sex"].auroc.value == 1 and set(found["sex"].shares) == {"(empty)", "F"}


def test_constants_and_tiny_classes_are_not_tried() -> None:
    assert tried(bits=np.array(["8"] * N)) == {}
    few = nuisances(
        {"x": np.arange(12.0)}, np.array([1] + [0] * 11), classes=CLASSES, patients=[str(n) for n in range(12)]
    )
    assert few == []


def test_of_three_classes_the_one_told_best_is_named() -> None:
    labels = np.arange(N) % 3
    found = nuisances(
        {"x": np.where(labels == 2, 1.0, 0.0) + RNG.normal(size=N) * 0.1}, labels,
        classes=("A", "B", "C"), patients=[str(row) for row in range(N)],
    )  # fmt: skip
    assert [item.positive_class for item in found] == ["C"] and found[0].auroc.value > 0.99


def test_class_names_are_words_that_give_a_note_away() -> None:
    assert class_stems("COVID-19") == ["covid"] and class_stems("OTHER") == []
    assert names_class(frozenset({"covid19", "film"}), ["covid"]) and not names_class(frozenset({"film"}), ["covid"])


def test_notes_that_name_the_class_are_listed_and_telling_words_found() -> None:
    notes = [
        "Pneumonia seen on the left" if label and row % 3 else f"film of the chest {'with fever' if label else 'clear'}"
        for row, label in enumerate(LABELS)
    ]
    found = telling_words(notes, LABELS, classes=CLASSES, patients=PATIENTS, positive_class="PNEUMONIA")
    assert list(found.naming["PNEUMONIA"]) == [row for row in range(N) if LABELS[row] and row % 3]
    words = {item.name: item for item in found.words}
    assert words["clear"].auroc.value == 1 and words["clear"].how == "lower"
    assert words["names PNEUMONIA"].auroc.value == words["pneumonia"].auroc.value > 0.8
