"""A predictions.csv of this or any other program: read, checked line by line, and turned into arrays.

    films = read_predictions("predictions.csv", positive_class="PNEUMONIA")

Columns `path,label` and one of
  probability_<CLASS> for every class      each in [0, 1], each row summing to 1
  probability, or one probability_<CLASS>  of the positive class, in [0, 1]
  score                                    the same, or any number where it is asked for (`raw_scores`)
and, when known, patient_id, split, age, sex, view, site, reader_<NAME> and others, which are kept as text. Never
guesses: a value that cannot be used is an error with file and line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from csv_table import read_films, refuse_repeated, refuse_rows
from data_preprocessing import NEGATIVE_NAMES, positive_class
from errors import DataError, examples, nearest
from estimates import ROW_SUM_TOLERANCE, FloatArray, IntArray

PREFIX = "probability_"
SINGLE = ("probability", "score")
READER_PREFIX = "reader_"
KNOWN = ("path", "patient_id", "split", "label", "prediction")


@dataclass(frozen=True)
class Predictions:
    """Films with their truth and what a model said of each."""

    table: pd.DataFrame
    """One row a film: path, patient_id, split, label (text), and whatever else is known of it (text)."""
    labels: IntArray
    """(N,) index into classes."""
    probabilities: FloatArray
    """(N, K) in the order of classes; ranks in (0, 1) where `raw` holds scores."""
    classes: tuple[str, ...]
    positive_class: str | None
    """The 'disease' class of a binary task; None for several classes."""
    source: str = ""
    """Where they come from, for error messages and reports."""
    raw: FloatArray | None = None
    """(N,) scores that are no probabilities; None where the model gave probabilities."""
    patients_known: bool = True
    """False where nothing names the patients, so that each film counts as its own."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def positive(self) -> int:
        """Index of the positive class; binary tasks only."""
        assert self.positive_class is not None
        return self.classes.index(self.positive_class)

    @cached_property
    def outcome(self) -> IntArray:
        """(N,) 1 for the positive class; binary tasks only."""
        return (self.labels == self.positive).astype(np.int64)

    @property
    def scores(self) -> FloatArray:
        """(N,) what thresholds speak of: the positive class's probability, or the raw score."""
        return self.probabilities[:, self.positive] if self.raw is None else self.raw

    @cached_property
    def patients(self) -> IntArray | None:
        """(N,) patient numbers, or None where every film is of another patient."""
        codes, names = pd.factorize(self.table["patient_id"])
        return None if len(names) == len(codes) else codes.astype(np.int64)

    @property
    def n_patients(self) -> int:
        return int(self.table["patient_id"].nunique())

    def called(self, threshold: float) -> IntArray:
        """(N,) predicted class: positive from `threshold` on, or the most probable of several classes."""
        if self.positive_class is None:
            return self.probabilities.argmax(axis=1).astype(np.int64)
        return np.where(self.scores >= threshold, self.positive, 1 - self.positive)

    def take(self, chosen: npt.NDArray[np.bool_] | IntArray) -> Predictions:
        """The films chosen by a mask or by positions."""
        return replace(
            self,
            table=self.table.loc[chosen].reset_index(drop=True)
            if chosen.dtype == bool
            else self.table.iloc[chosen].reset_index(drop=True),
            labels=self.labels[chosen],
            probabilities=self.probabilities[chosen],
            raw=None if self.raw is None else self.raw[chosen],
        )


# --- reading ---------------------------------------------------------------------------------------------------


def read_predictions(
    path: str | Path,
    *,
    positive: str | None = None,
    classes: Sequence[str] | None = None,
    raw_scores: bool = False,
) -> Predictions:
    """The films of a predictions CSV.

    `positive` names the disease class (else the one not named like normal), `classes` (of a table this one must
    match) fixes the order of classes, `raw_scores` lets a `score` column hold any number. DataError with file and line
    for whatever cannot be used.
    """
    where = Path(path)
    table = read_films(where, what="predictions file", header="predictions need path,label and probabilities")
    refuse_repeated(table["path"], where=where)
    columns = [name for name in table.columns if name.startswith(PREFIX)]
    single = next((name for name in SINGLE if name in table.columns), None)
    if len(columns) >= 2:
        return _of_classes(table, columns, where=where, positive=positive, classes=classes)
    if columns:
        single, positive = columns[0], positive or columns[0].removeprefix(PREFIX)
    if single is None:
        raise DataError(
            f"{where}: no probabilities{nearest(PREFIX, table.columns)}; add a column probability_<CLASS> for each "
            f"class, or one column probability (or score) of the positive class (found: {', '.join(table.columns)})"
        )
    return _of_positive(table, single, where=where, positive=positive, classes=classes, raw_scores=raw_scores)


def _numbers(column: pd.Series, *, where: Path) -> FloatArray:
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        remedy = "give a number, or leave the film out and say so"
        refuse_rows(~np.isfinite(values), f"{column.name} is {column.iloc[bad[0]]!r}", remedy, where=where)
    return values


def _probabilities(column: pd.Series, *, where: Path) -> FloatArray:
    values = _numbers(column, where=where)
    outside = (values < 0) | (values > 1)
    if outside.any():
        found = f"{column.name} is {values[outside][0]:g}, outside [0, 1]"
        refuse_rows(outside, found, "apply sigmoid or softmax to logits first", where=where)
    return values


def _of_classes(
    table: pd.DataFrame, columns: list[str], *, where: Path, positive: str | None, classes: Sequence[str] | None
) -> Predictions:
    names = [name.removeprefix(PREFIX) for name in columns]
    if classes is not None and sorted(classes) != sorted(names):
        raise DataError(f"{where}: classes {', '.join(names)} are not those expected: {', '.join(classes)}")
    names = list(classes or names)
    p = np.column_stack([_probabilities(table[PREFIX + name], where=where) for name in names])
    off = np.abs(p.sum(axis=1) - 1) > ROW_SUM_TOLERANCE
    if off.any():
        found = f"the probabilities sum to {p[off][0].sum():.4g}, not 1"
        refuse_rows(off, found, "give one column per class, after softmax", where=where)
    return _predictions(table, p, names, positive_class(names, positive), where=where, raw=None)


def _of_positive(
    table: pd.DataFrame,
    column: str,
    *,
    where: Path,
    positive: str | None,
    classes: Sequence[str] | None,
    raw_scores: bool,
) -> Predictions:
    names = list(classes or _two_classes(table["label"], positive, where=where))
    chosen = positive_class(names, positive)
    assert chosen is not None
    raw = _numbers(table[column], where=where) if raw_scores and column == "score" else None
    if raw is not None and raw.min() >= 0 and raw.max() <= 1:
        raw = None
    if raw is None:
        p = _probabilities(table[column], where=where)
    else:
        p = _ranks(raw)
    both = np.column_stack([1 - p, p] if names.index(chosen) == 1 else [p, 1 - p])
    return _predictions(table, both, names, chosen, where=where, raw=raw)


def _two_classes(labels: pd.Series, positive: str | None, *, where: Path) -> list[str]:
    """The two classes of a table with one score column, negative first."""
    found = sorted(labels.unique())
    if len(found) > 2:
        raise DataError(
            f"{where}: one score column but {len(found)} labels ({examples(found)}); give one column "
            "probability_<CLASS> per class"
        )
    if len(found) == 2:
        chosen = positive_class(found, positive)
        return sorted(found, key=lambda name: name == chosen)
    only = found[0]
    is_positive = only == positive or (positive is None and only.lower() not in NEGATIVE_NAMES)
    return [f"not {only}", only] if is_positive else [only, positive or f"not {only}"]


def _predictions(
    table: pd.DataFrame,
    probabilities: FloatArray,
    classes: list[str],
    positive: str | None,
    *,
    where: Path,
    raw: FloatArray | None,
) -> Predictions:
    codes = table["label"].map({name: code for code, name in enumerate(classes)})
    strangers = codes.isna()
    if strangers.any():
        label = table["label"][int(np.flatnonzero(strangers)[0])]
        hint = nearest(label, classes)
        refuse_rows(strangers, f"label {label!r} has no probability column{hint}", f"there are {classes}", where=where)
    patients, known = _patients(table)
    dropped = {"path", "label", "patient_id", "split", "prediction", *SINGLE}
    further = [name for name in table.columns if name not in dropped and not name.startswith(PREFIX)]
    films = pd.DataFrame(
        {
            "path": table["path"],
            "patient_id": patients,
            "split": table["split"] if "split" in table.columns else "",
            "label": table["label"],
            **{name: table[name] for name in further},
        }
    )
    return Predictions(
        films,
        codes.to_numpy().astype(np.int64),
        probabilities,
        tuple(classes),
        positive,
        str(where),
        raw,
        patients_known=known,
    )


def _patients(table: pd.DataFrame) -> tuple[pd.Series, bool]:
    """The patient of each film; a film that names none is its own."""
    if "patient_id" not in table.columns:
        return table["path"], False
    given = table["patient_id"]
    return given.where(given != "", table["path"]), bool((given != "").any())


# --- raw scores ------------------------------------------------------------------------------------------------


def _ranks(scores: FloatArray) -> FloatArray:
    """Scores as ranks in (0, 1): whatever only depends on their order stays as it is."""
    distinct, rank = np.unique(scores, return_inverse=True)
    return (rank + 1) / (len(distinct) + 1)


def rank_threshold(films: Predictions, threshold: float) -> float:
    """The threshold on `films.probabilities` that calls the same films positive as `threshold` on the scores."""
    if films.raw is None:
        return threshold
    distinct = np.unique(films.raw)
    return (int(np.searchsorted(distinct, threshold, side="left")) + 0.5) / (len(distinct) + 1)


# --- splits ----------------------------------------------------------------------------------------------------


def of_split(films: Predictions, split: str) -> Predictions:
    """The films of one split; a table that names no split is all test. DataError naming those there are."""
    named = films.table["split"]
    if split == "all" or (split == "test" and (named == "").all()):
        return films
    if (named == "").all():
        raise DataError(
            f"{films.source}: names no split, so it has no {split!r} films; drop --split to take all {len(films)}, or "
            "add a column split"
        )
    chosen = (named == split).to_numpy()
    if not chosen.any():
        found = ", ".join(f"{name or '(blank)'} ({count})" for name, count in named.value_counts().items())
        raise DataError(f"{films.source}: split {split!r} has no films; there are {found}: choose with --split")
    return films if chosen.all() else films.take(chosen)


def refuse_shared(measured: Predictions, validation: Predictions) -> None:
    """DataError when a patient or film of validation is also measured: a threshold chosen on it would flatter."""
    for column, what in (("patient_id", "patients"), ("path", "films")):
        if shared := set(measured.table[column]) & set(validation.table[column]):
            raise DataError(
                f"{len(shared)} {what} are both in validation ({validation.source}) and in the films measured, e.g. "
                f"{min(shared)!r}; what is chosen on them cannot be tested on them"
            )
