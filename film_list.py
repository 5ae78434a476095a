"""The films of a folder or table, read to be judged: what `load_manifest` refuses is taken down here instead.

    films = list_films(Path("data/chest_xray"))

Nothing is decoded. A table that is no CSV, or has no column `path`, is still a DataError: there is nothing to judge.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from csv_table import read_text_table
from data_preprocessing import PUBLISHED_NAMES, SPLITS, patients_of
from errors import DataError, nearest
from preprocess import is_film

PERSON_ALONE = re.compile(r"^(person\d+|(?:NORMAL2-)?IM-\d+)")
"""The published names read without the subtype."""
NUMBERED = re.compile(r"^(.*?[^\W_].*?)[-_ .]*\d+$")
"""A name and the number of the film at its end."""
MAX_FILMS_A_PATIENT = 50
"""Where a reading of the names gives someone more films than this, it does not read patients."""


@dataclass
class FilmList:
    """What a folder or table names."""

    source: Path
    """The folder or CSV, as given."""
    root: Path
    """Folder that paths are written relative to."""
    table: pd.DataFrame
    """A row a film, all text: path (absolute), label, split ('' where none), patient_id and the CSV's other columns."""
    readings: dict[str, list[str]]
    """How patients may be read → patient of each film; the first is the one that training uses."""
    passed_over: list[str] = field(default_factory=list)
    """Files of a folder that are no films by their name."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """Rows that had to be left out or changed: (path or line, what is wrong)."""

    @cached_property
    def path(self) -> list[str]:
        return self.table["path"].tolist()

    @cached_property
    def label(self) -> list[str]:
        return self.table["label"].tolist()

    @cached_property
    def split(self) -> list[str]:
        return self.table["split"].tolist()

    @cached_property
    def patient(self) -> list[str]:
        return self.table["patient_id"].tolist()

    def shown(self, row: int) -> str:
        """The path of a film as written in reports."""
        return self.relative(self.path[row])

    def relative(self, path: str) -> str:
        """`path` as written in reports: relative to the root where it lies below it."""
        return os.path.relpath(path, self.root) if Path(path).is_relative_to(self.root) else path


def list_films(source: Path, *, patient_pattern: str | None = None) -> FilmList:
    """The films of a folder DIR/[SPLIT/][CLASS/]* or of a CSV with `path` and, when known, label,split,patient_id."""
    if source.is_dir():
        root, faults = source.resolve(), list[tuple[str, str]]()
        table, passed_over = _from_folder(root)
    elif source.is_file() and is_film(source):
        raise DataError(f"{source}: is a single film; name its folder, or a CSV that lists films")
    elif source.is_file():
        root, passed_over = source.resolve().parent, []
        table, faults = _from_csv(source)
    else:
        raise DataError(f"{source}: no such folder or CSV; name the data with audit DIR or audit FILE.csv")
    if table.empty:
        raise DataError(f"{source}: no films; expected DIR/train/CLASS/*, DIR/CLASS/* or a CSV with a column path")
    readings = _readings(table, patient_pattern)
    table["patient_id"] = next(iter(readings.values()))
    return FilmList(source, root, table, readings, passed_over, faults)


def _from_folder(root: Path) -> tuple[pd.DataFrame, list[str]]:
    rows, passed_over = [], []
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith((".", "__")))
        parts = Path(folder).relative_to(root).parts
        split = parts[0] if parts and parts[0] in SPLITS else ""
        rest = parts[1:] if split else parts
        for name in sorted(names):
            path = Path(folder) / name
            if name.startswith("."):
                continue
            if is_film(path):
                rows.append((str(path), rest[0] if rest else "", split))
            else:
                passed_over.append(str(path.relative_to(root)))
    return pd.DataFrame(rows, columns=["path", "label", "split"], dtype=str), passed_over


def _from_csv(source: Path) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    table = read_text_table(source, what="manifest")
    if "path" not in table.columns:
        raise DataError(
            f"{source}: no column 'path'{nearest('path', table.columns)}; found: {', '.join(table.columns)}"
        )
    faults: list[tuple[str, str]] = []
    for column in ("label", "split"):
        table[column] = table[column].str.strip() if column in table.columns else ""
    blank = table["path"].str.strip() == ""
    faults += [(f"line {row + 2}", "empty path") for row in table.index[blank]]
    table = table[~blank].copy()
    for row in table.index[~table["split"].isin(["", *SPLITS])]:
        faults.append((f"line {row + 2}", f"split {table.at[row, 'split']!r} is not one of {', '.join(SPLITS)}"))
        table.at[row, "split"] = ""
    folder = source.resolve().parent
    table["path"] = [os.path.normpath(folder / name) for name in table["path"]]
    faults += _repeated_rows(table)
    return table.drop_duplicates("path").reset_index(drop=True), faults


def _repeated_rows(table: pd.DataFrame) -> list[tuple[str, str]]:
    faults, seen = [], dict[str, tuple[str, str]]()
    for row, path, label, split in zip(table.index, table["path"], table["label"], table["split"]):
        if path not in seen:
            seen[path] = (label, split)
            continue
        before = seen[path]
        other = [name for name, now, then in zip(("label", "split"), (label, split), before) if now != then]
        found = f"{path} is listed again" + (f" with another {' and '.join(other)}" if other else "")
        faults.append((f"line {row + 2}", found))
    return faults


def _readings(table: pd.DataFrame, pattern: str | None) -> dict[str, list[str]]:
    names = [Path(path).name for path in table["path"]]
    readings: dict[str, list[str]] = {}
    if "patient_id" in table.columns and (table["patient_id"] != "").any():
        given = dict(zip(table["path"], table["patient_id"]))
        unnamed = [path for path, patient in given.items() if not patient]
        given |= dict(zip(unnamed, patients_of(unnamed, pattern))) if unnamed else {}
        readings["the column patient_id"] = list(given.values())
    else:
        how = "data.patient_id_regex" if pattern else "file names: number and subtype"
        published = bool(pattern) or any(PUBLISHED_NAMES.search(name) for name in names)
        readings[how if published else "every film its own patient"] = patients_of(list(table["path"]), pattern)
    first = next(iter(readings.values()))
    for how, found in _other_readings(names):
        if found != first and max(Counter(found).values()) <= MAX_FILMS_A_PATIENT:
            readings[how] = found
    return readings


def _other_readings(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Readings that some file names suggest beside the one in use."""
    if any(PERSON_ALONE.search(name) for name in names):
        found = [PERSON_ALONE.search(name) for name in names]
        return [("file names: number alone", [hit.group(1) if hit else name for hit, name in zip(found, names)])]
    stems = [Path(name).stem for name in names]
    hits = [NUMBERED.search(stem) for stem in stems]
    return [("file names up to their last number", [hit.group(1) if hit else stem for hit, stem in zip(hits, stems)])]
