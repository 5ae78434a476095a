"""How well what is not anatomy predicts the label: size, coding, exposure, borders, view, site, age, sex, words.

    found = nuisances(columns, labels, classes=("NORMAL", "PNEUMONIA"), patients=patients)

A network learns whatever predicts the label. What does so alone, before any training, is a shortcut it will find.
Each AUROC has an interval clustered by patient, and each p-value is adjusted for the number of nuisances tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from threadpoolctl import threadpool_limits

from auroc import auroc, auroc_ci
from estimates import Estimate, FloatArray, IntArray, as_groups, two_sided_quantile
from proportions import adjust_p_values

FOLDS = 5
"""A category is scored by the share of positives among other patients' films, in so many parts."""
BINS = 10
"""Equal parts a numeric nuisance is also cut into: a middle size may mean disease where small and large do not."""
MIN_FILMS = 10
"""Films of the class, and of the others, from which on a nuisance is judged."""
MAX_WORDS = 200
"""Words of notes whose AUROC gets an interval: those that differ most between the classes."""
MIN_WORD_FILMS = 5
MIN_WORD_PATIENTS = 3
VAGUE = frozenset(
    {"other", "none", "unknown", "positive", "negative", "pos", "neg", "yes", "not", "the", "and", "class"}
)
"""Words of class names that do not tell the class when a note holds them."""
WORDS = {
    "bytes": "file size",
    "mean": "mean brightness",
    "border": "border of one level",
    "marker": "text near the edge",
    "aspect": "width / height",
    "quality": "JPEG quality",
    "bits": "bit depth",
    "format": "file format",
}
"""How a reader is told of a nuisance, where its name does not say it."""
WORD = re.compile(r"[a-z0-9]{3,}(?:-[a-z0-9]+)*")


@dataclass(frozen=True)
class Nuisance:
    """How well one thing alone tells one class from the rest."""

    name: str
    positive_class: str
    auroc: Estimate
    p_value: float
    p_adjusted: float
    films: int
    """Films on which it is known."""
    how: str
    """Which values mean the class: 'higher', 'lower', or one of two categories. 'categories' and 'tenths': of several,
    each scored by the share of the class among other patients' films."""
    shares: dict[str, tuple[int, int]]
    """Category → (films, of these of the class); the most frequent, empty for a number."""

    @property
    def words(self) -> str:
        """The name, for a reader."""
        return WORDS.get(self.name, self.name)

    def as_report(self) -> dict[str, Any]:
        """Plain values for audit.json."""
        return {
            "nuisance": self.name,
            "positive_class": self.positive_class,
            "auroc": self.auroc.as_report(),
            "p_value": self.p_value,
            "p_adjusted": self.p_adjusted,
            "films": self.films,
            "how": self.how,
            "shares": {level: {"films": n, "of_the_class": k} for level, (n, k) in self.shares.items()},
        }


def nuisances(
    columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]],
    labels: IntArray,
    *,
    classes: Sequence[str],
    patients: Sequence[str],
    positive_class: str | None = None,
) -> list[Nuisance]:
    """Every column (N,) of numbers (NaN unknown) or texts ('' unknown) tried against `labels` (N,), best first.

    With two classes against `positive_class`; with more, each class against the rest and the best one kept.
    """
    targets = [positive_class] if len(classes) == 2 and positive_class else list(classes)
    groups = as_groups(np.asarray(patients), n=len(labels))
    with threadpool_limits(1, user_api="blas"):  # products this small wait longer for threads than they take
        tried = [
            found
            for name, values in columns.items()
            for target in targets
            for found in _try(name, np.asarray(values), labels == list(classes).index(target), target, groups)
        ]
    adjusted = adjust_p_values([item.p_value for item in tried]) if tried else []
    best: dict[str, Nuisance] = {}
    for item, p_adjusted in zip(tried, adjusted):
        item = Nuisance(**{**vars(item), "p_adjusted": p_adjusted})
        if item.name not in best or item.auroc.ci_low > best[item.name].auroc.ci_low:
            best[item.name] = item
    return sorted(best.values(), key=lambda item: -item.auroc.ci_low)


def _try(
    name: str, values: npt.NDArray[Any], positive: npt.NDArray[np.bool_], target: str, patients: IntArray
) -> list[Nuisance]:
    numeric = values.dtype.kind in "fiub"
    known = ~np.isnan(values.astype(np.float64)) if numeric else np.ones(len(values), bool)
    values, y, groups = values[known], positive[known].astype(np.int64), patients[known]
    if min(y.sum(), len(y) - y.sum()) < MIN_FILMS or len(np.unique(values)) < 2:
        return []

    def result(score: FloatArray, how: str, shares: dict[str, tuple[int, int]], sides: int) -> Nuisance | None:
        estimate = auroc_ci(y, score, groups=groups)
        if np.isnan(estimate.ci_low):
            return None
        return Nuisance(name, target, estimate, _p_value(estimate, sides), float("nan"), len(y), how, shares)

    def ranked(numbers: FloatArray, words: tuple[str, str], shares: dict[str, tuple[int, int]]) -> Nuisance | None:
        rising = auroc(y, numbers) >= 0.5
        return result(numbers if rising else -numbers, words[0 if rising else 1], shares, 2)

    if not numeric:
        levels = np.array([str(value).strip() or "(empty)" for value in values])
        names, codes = np.unique(levels, return_inverse=True)
        shares = _shares(levels, y)
        if len(names) == 2:
            return _present([ranked(codes.astype(np.float64), (str(names[1]), str(names[0])), shares)])
        return _present([result(_learned_scores(levels, y, _folds(groups)), "categories", shares, 1)])
    numbers = values.astype(np.float64)
    found = [ranked(numbers, ("higher", "lower"), {})]
    if len(np.unique(numbers)) > 2:
        edges = np.unique(np.quantile(numbers, np.arange(1, BINS) / BINS))
        found.append(result(_learned_scores(np.digitize(numbers, edges), y, _folds(groups)), "tenths", {}, 1))
    return _present(found)


def _present(found: Sequence[Nuisance | None]) -> list[Nuisance]:
    return [item for item in found if item is not None]


def _folds(groups: IntArray) -> IntArray:
    """Part (N,) of each film; all films of a patient in one."""
    codes = as_groups(groups, n=len(groups))
    return np.random.default_rng(0).permutation(int(codes.max()) + 1)[codes] % FOLDS


def _learned_scores(levels: npt.NDArray[Any], y: IntArray, folds: IntArray) -> FloatArray:
    """Each film's score (N,): the share of positives among the films of its level in the other parts."""
    _, codes = np.unique(levels, return_inverse=True)
    total = np.zeros((FOLDS, int(codes.max()) + 1))
    positive = np.zeros_like(total)
    np.add.at(total, (folds, codes), 1)
    np.add.at(positive, (folds, codes), y)
    elsewhere, positive_elsewhere = total.sum(axis=0) - total, positive.sum(axis=0) - positive
    share = positive_elsewhere.sum(axis=1, keepdims=True) / np.maximum(1, elsewhere.sum(axis=1, keepdims=True))
    # One film's worth of the overall share keeps a rare level from 0 and 1. The share itself is taken off: a part with
    # many positives leaves few elsewhere, and would be ranked low for that alone.
    return ((positive_elsewhere + share) / (elsewhere + 1) - share)[folds, codes]


def _shares(levels: npt.NDArray[Any], y: IntArray) -> dict[str, tuple[int, int]]:
    names, codes, counts = np.unique(levels, return_inverse=True, return_counts=True)
    positive = np.bincount(codes, weights=y)
    order = np.argsort(-counts, kind="stable")[:12]
    return {str(names[level]): (int(counts[level]), int(positive[level])) for level in order}


def _p_value(estimate: Estimate, sides: int) -> float:
    """Of an AUROC of 0.5; one-sided for scores that were learned, whose direction is given."""
    error = estimate.standard_error
    if not error > 0:
        error = (estimate.ci_high - estimate.ci_low) / (2 * two_sided_quantile(0.95))
    return float(min(1.0, sides * stats.norm.sf((estimate.value - 0.5) / error))) if error > 0 else float("nan")


# --- notes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """What notes give away."""

    naming: dict[str, IntArray]
    """Class → rows of its films whose note names it."""
    words: list[Nuisance]
    """Words whose mere presence tells a class, best first; class names among them."""


def telling_words(
    notes: Sequence[str],
    labels: IntArray,
    *,
    classes: Sequence[str],
    patients: Sequence[str],
    positive_class: str | None = None,
) -> Words:
    """The words of `notes` (N,) that tell the class by being there: class names, and any other."""
    held = [frozenset(WORD.findall(note.lower())) for note in notes]
    naming, columns = {}, {}
    for code, name in enumerate(classes):
        named = np.array([names_class(words, class_stems(name)) for words in held])
        columns[f"names {name}"] = named.astype(np.float64)
        if len(rows := np.flatnonzero(named & (labels == code))):
            naming[name] = rows
    frequent = _frequent_words(held, patients)
    present = {word: np.zeros(len(held)) for word in frequent}
    for row, words in enumerate(held):
        for word in words & frequent:
            present[word][row] = 1
    distance = {word: _distance(values, labels, len(classes)) for word, values in present.items()}
    columns |= {word: present[word] for word in sorted(present, key=lambda word: -distance[word])[:MAX_WORDS]}
    found = nuisances(columns, labels, classes=classes, patients=patients, positive_class=positive_class)
    # The words that got no interval were tried as well.
    factor = max(1.0, len(present) / MAX_WORDS)
    found = [Nuisance(**{**vars(item), "p_adjusted": min(1.0, item.p_adjusted * factor)}) for item in found]
    return Words(naming, found)


def _frequent_words(held: Sequence[frozenset[str]], patients: Sequence[str]) -> set[str]:
    films: dict[str, int] = {}
    patients_of: dict[str, set[str]] = {}
    for words, patient in zip(held, patients):
        for word in words:
            films[word] = films.get(word, 0) + 1
            patients_of.setdefault(word, set()).add(patient)
    return {
        word for word, count in films.items() if count >= MIN_WORD_FILMS and len(patients_of[word]) >= MIN_WORD_PATIENTS
    }


def class_stems(name: str) -> list[str]:
    """The words of a class name that would give it away: 'COVID-19' → covid; 'OTHER' → none."""
    words = re.findall(r"[a-z]+", name.lower())
    return [word for word in words if len(word) > 2 and word not in VAGUE]


def names_class(words: frozenset[str], stems: Sequence[str]) -> bool:
    """Whether a note's words hold a class name, also as the beginning of a longer word."""
    return any(word.startswith(stem) for word in words for stem in stems)


def _distance(present: FloatArray, labels: IntArray, n_classes: int) -> float:
    """Largest difference between a class and the rest in the share of notes that hold a word."""
    shares = [abs(present[labels == code].mean() - present[labels != code].mean()) for code in range(n_classes)]
    return float(np.nanmax(shares))
