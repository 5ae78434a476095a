"""From a folder or table of films to batches: manifest, patient split, pixel cache, augmentation, order, loading.

    python data_preprocessing.py            # a short self-check on synthetic films

A film's augmentation is drawn from (seed, epoch, index) and an epoch's order from (seed, epoch), never from a live
stream: workers, ranks and resumption cannot change them. A patient never stands in two splits; test is never
touched when validation has to be rebuilt. Legend: B batch, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import queue
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

import array_cache
import dicom
import findings
from config import DataConfig
from csv_table import read_films, read_text_table, refuse_repeated, refuse_rows, require_columns
from device_augmentation import CROP_RATIO, DeviceAugmenter
from errors import ConfigError, DataError, examples, nearest
from preprocess import IMAGE_SUFFIXES, NO_FILM, PreprocessSpec, apply, decode, has_colour, has_film, is_film
from runtime import log, progress, write_text

Item = TypeVar("Item")
Uint8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

SPLITS = ("train", "val", "test")
MIN_VAL_PER_CLASS = 20
"""With fewer validation films of a class its sensitivity moves by 5 points a film: too few to choose a threshold."""
CACHE_VERSION = 2
"""Raised whenever `preprocess` changes what it returns, so that no stale pixels are read."""

# The chest X-ray pneumonia set numbers patients anew for bacteria and virus: number and subtype are the key.
PUBLISHED_NAMES = re.compile(r"^(person\d+_(?:bacteria|virus)|(?:NORMAL2-)?IM-\d+)")
NEGATIVE_NAMES = frozenset(
    {"normal", "negative", "neg", "healthy", "control", "benign", "other", "none", "no_finding", "no finding", "0"}
)


# --- manifest --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """The films of a task: one row each, with label, split and patient."""

    table: pd.DataFrame
    """Columns path (str, absolute), label (int), split (train, val, test), patient_id (str), row (int, position in
    the pixel store) and whatever else the CSV brought (text, age, sex, view, site, …)."""
    classes: tuple[str, ...]
    """Class names in the order of the labels."""
    root: Path
    """Folder the paths are written relative to in split.csv and predictions.csv."""
    multilabel: bool = False
    """Whether a label is the film's findings as bits (see `findings`) rather than the number of its class."""

    def __len__(self) -> int:
        return len(self.table)

    def split(self, name: str) -> pd.DataFrame:
        """The rows of one split ('all' for every row)."""
        return self.table if name == "all" else self.table[self.table["split"] == name]

    def counts(self) -> dict[str, dict[str, int]]:
        """Split → class → number of films."""
        return {
            split: dict(zip(self.classes, self.films_of(rows["label"]).tolist()))
            for split in SPLITS
            if len(rows := self.split(split))
        }

    def films_of(self, labels: pd.Series) -> IntArray:
        """(C,) how many of these films are of each class, or have each finding."""
        codes = labels.to_numpy(np.int64)
        if self.multilabel:
            return findings.matrix(codes, len(self.classes)).sum(axis=0)
        return np.bincount(codes, minlength=len(self.classes)).astype(np.int64)

    def written(self, label: int) -> str:
        """A label as tables have it: the class, or the findings like effusion|mass."""
        if self.multilabel:
            return findings.written(findings.matrix(np.array([label]), len(self.classes))[0], self.classes)
        return self.classes[label]

    def relative_path(self, path: str) -> str:
        """`path` as written in tables: relative to the root where it lies below it."""
        return os.path.relpath(path, self.root) if Path(path).is_relative_to(self.root) else path

    def digest(self) -> str:
        """Hash of which film has which label in which split; stored in checkpoints to notice changed data."""
        rows = sorted(
            f"{self.relative_path(path)}|{self.written(label)}|{split}"
            for path, label, split in zip(self.table["path"], self.table["label"], self.table["split"])
        )
        return hashlib.blake2b("\n".join(rows).encode(), digest_size=16).hexdigest()


def positive_class(classes: Sequence[str], wanted: str | None) -> str | None:
    """The 'disease' class of a binary task: `wanted`, else the one not named like normal; None if not binary."""
    if wanted is not None and wanted not in classes:
        known = ", ".join(classes)
        raise ConfigError(f"data.positive_class: {wanted!r} is not one of {known}{nearest(wanted, classes)}")
    if len(classes) != 2:
        return None
    if wanted is not None:
        return wanted
    diseased = [name for name in classes if name.lower() not in NEGATIVE_NAMES]
    return diseased[0] if len(diseased) == 1 else classes[1]


def load_manifest(config: DataConfig, *, classes: Sequence[str] | None = None) -> Manifest:
    """Read class folders or a CSV, as `config` says; splits are those the data name ('' where they name none).

    `classes` (a checkpoint's) fixes the order of the labels; a class outside it is a DataError.
    """
    wanted = list(classes) if classes is not None else config.classes
    if config.manifest is not None:
        root = Path(config.manifest).resolve().parent
        rows = _read_csv(Path(config.manifest), config)
    else:
        if config.multilabel:
            raise DataError(
                f"{config.data_dir}: data.task=multilabel needs a --manifest with the lines path,label and, for "
                "example, films/1.png,effusion|mass"
            )
        root = Path(config.data_dir).resolve()
        rows = _read_folders(Path(config.data_dir), named_by_film=config.label_regex is not None)
    if config.label_regex is not None:
        rows["label"] = _all_named_labels(rows["path"], config.label_regex, root)
    where = config.manifest or config.data_dir
    if config.multilabel:
        names = _finding_names(rows["label"], wanted, where=where)
        table = rows.assign(label=findings.encoded(rows["label"], names))
    else:
        names = _class_names(rows["label"], wanted, where=where)
        table = rows.assign(label=rows["label"].map({name: code for code, name in enumerate(names)}).astype(np.int64))
    table["patient_id"] = _patient_ids(table, config.patient_id_regex)
    if config.exclude:
        # A checkpoint's list speaks of the films it was trained on; other data need not hold them.
        table = _without_excluded(table, Path(config.exclude), root, must_hold=classes is None)
    return Manifest(table.reset_index(drop=True), tuple(names), root, config.multilabel)


def _read_folders(folder: Path, *, named_by_film: bool = False) -> pd.DataFrame:
    """The films below `folder`; where their own names tell the class, they need not lie in class folders."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such data folder; put films into {folder}/train/CLASS/ and {folder}/test/CLASS/, "
            "or name another with --data-dir or --manifest"
        )
    splits = [name for name in SPLITS if (folder / name).is_dir()]
    rows: list[tuple[str, str, str]] = []
    passed_over = 0
    for split in splits or [""]:
        inside = [folder / split] if named_by_film else (folder / split).iterdir()
        for class_folder in sorted(item for item in inside if item.is_dir()):
            if class_folder.name.startswith((".", "__")):
                continue
            files = sorted(item for item in class_folder.rglob("*") if item.is_file() and item.name[0] != ".")
            films = [item for item in files if is_film(item)]
            passed_over += len(files) - len(films)
            if not films:
                raise DataError(
                    f"{class_folder}: no films in this class folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))}); "
                    "add some or remove the folder"
                )
            rows += [(str(film.resolve()), class_folder.name, split) for film in films]
    if not rows:
        raise DataError(f"{folder}: no class folders with films; expected {folder}/train/CLASS/* or {folder}/CLASS/*")
    if passed_over:
        log.info("%s: %d files without an image suffix passed over", folder, passed_over)
    return pd.DataFrame(rows, columns=["path", "label", "split"])


def _read_csv(path: Path, config: DataConfig) -> pd.DataFrame:
    header = "the header must name path,label and may name split,patient_id,text,age,sex,view,site"
    needed = ("path",) if config.label_regex is not None else ("path", "label")
    may_be_empty = {"label": config.multilabel, "path": config.films_may_lack}
    filled = [name for name in needed if not may_be_empty[name]]
    table = read_films(path, what="manifest", header=header, filled=filled, needed=needed)
    table["split"] = table["split"] if "split" in table.columns else ""
    allowed = SPLITS if (table["split"] != "").any() else ("",)
    wrong = ~table["split"].isin(list(allowed))
    if wrong.any():
        found = f"split {table['split'][wrong].iloc[0]!r} is not one of {', '.join(SPLITS)}"
        refuse_rows(wrong, found, "correct the row", where=path)
    table["path"] = film_paths(path, table["path"])
    refuse_repeated(table["path"], where=path)
    return table


def named_labels(paths: Iterable[str], pattern: str, root: Path) -> list[str]:
    """The class that each film's path below `root` names, '' for films that name none.

    The named group that matches is the class; without named groups it is the text of the first group.
    """
    regex = _compile(pattern, setting="data.label_regex")
    if not regex.groups:
        raise ConfigError(
            f"data.label_regex: {pattern!r} has no group; name one a class, like '(?P<virus>_virus_)|(?P<normal>IM-)', "
            "or enclose the class in the first"
        )
    return [_named_label(regex, Path(os.path.relpath(path, root)).as_posix()) for path in paths]


def _all_named_labels(paths: Sequence[str], pattern: str, root: Path) -> list[str]:
    """`named_labels`; DataError for films that name no class."""
    labels = named_labels(paths, pattern, root)
    if unnamed := [os.path.relpath(path, root) for path, label in zip(paths, labels) if not label]:
        raise DataError(
            f"data.label_regex: {len(unnamed)} of {len(labels)} films name no class, e.g. {examples(unnamed)}; correct "
            f"{pattern!r}, move these films away, or set it to null where folders or a column tell the class"
        )
    return labels


def _named_label(regex: re.Pattern[str], name: str) -> str:
    found = regex.search(name)
    if found is None:
        return ""
    named = [group for group, text in found.groupdict().items() if text]
    return (named[0] if named else "") if regex.groupindex else found.group(1) or ""


def film_paths(path: Path, names: Iterable[str]) -> list[str]:
    """The films that a CSV at `path` names, absolute; a row that names none gets a path that `has_film` refuses."""
    folder = path.resolve().parent
    named = (name.strip() or f"{NO_FILM}{path.stem}-{line}" for line, name in enumerate(names, start=2))
    return [str((folder / name).resolve()) for name in named]


def _class_names(labels: pd.Series, wanted: Sequence[str] | None, *, where: str) -> list[str]:
    found = sorted(labels.unique())
    if wanted is None:
        if len(found) < 2:
            raise DataError(f"{where}: only one class ({found[0]!r}), of at least two; add films of another")
        return found
    strangers = labels.index[~labels.isin(list(wanted))]
    if len(strangers):
        label = labels[strangers[0]]
        line = f":{strangers[0] + 2}" if where.endswith(".csv") else ""
        raise DataError(
            f"{where}{line}: label {label!r} is not one of {', '.join(wanted)}{nearest(label, wanted)}; "
            "correct it or add it to data.classes"
        )
    return list(wanted)


def _finding_names(labels: pd.Series, wanted: Sequence[str] | None, *, where: str) -> list[str]:
    """The findings to learn, in order: those `wanted`, the others said and not counted, else all there are, sorted."""
    refuse_rows(labels.map(findings.is_contradictory), "a finding and none in one label", "correct it", where=where)
    counts = Counter(name for cell in labels for name in set(findings.named(cell)))
    names = sorted(counts) if wanted is None else list(wanted)
    if not 2 <= len(names) <= findings.MOST:
        raise DataError(
            f"{where}: {len(names)} finding(s) with data.task=multilabel; it takes 2 to {findings.MOST}: a single one "
            "is data.task=classes with a label for films without it, and data.classes chooses among many"
        )
    if others := {name: count for name, count in sorted(counts.items()) if name not in names}:
        log.info("findings that are not learned: %s", ", ".join(f"{name} {count}" for name, count in others.items()))
    return names


def _patient_ids(table: pd.DataFrame, pattern: str | None) -> list[str]:
    """The CSV's patient_id where it has one, else read from the file name, else from DICOM tags as a keyed hash.

    A film that none of them places is its own patient.
    """
    given = table["patient_id"] if "patient_id" in table.columns else pd.Series("", index=table.index)
    regex = _compile(pattern, setting="data.patient_id_regex") if pattern else PUBLISHED_NAMES
    known = [patient or _named_patient(regex, path) for path, patient in zip(table["path"], given)]
    tagged = _tagged_patients([path for path, patient in zip(table["path"], known) if not patient])
    known = [patient or tagged.get(path, "") for path, patient in zip(table["path"], known)]
    if unplaced := known.count(""):
        log.info(
            "%d of %d films name no patient: each counts as its own (set data.patient_id_regex to change it)",
            unplaced,
            len(table),
        )
    own = _own_names([path for path, patient in zip(table["path"], known) if not patient])
    return [patient or own[path] for path, patient in zip(table["path"], known)]


def _own_names(paths: Sequence[str]) -> dict[str, str]:
    """Path → the film's name without suffix; where several share it, as much of the path as tells them apart."""
    names = {path: Path(path).stem for path in paths}
    parts = 1
    while shared := {name for name, films in Counter(names.values()).items() if films > 1}:
        names = {p: "/".join(Path(p).parts[-parts:]) if name in shared else name for p, name in names.items()}
        parts += 1
    return names


def _named_patient(regex: re.Pattern[str], path: str) -> str:
    found = regex.search(Path(path).name)
    return (found.group(1) if found.groups() else found.group(0)) if found else ""


def _tagged_patients(paths: Sequence[str]) -> dict[str, str]:
    """Path → pseudonym, of the DICOM files among `paths`; those that cannot be read are reported when decoded."""
    films = [path for path in paths if Path(path).suffix.lower() not in IMAGE_SUFFIXES - dicom.SUFFIXES]
    if not films:
        return {}
    key = dicom.pseudonym_key()

    def patient(path: str) -> str:
        try:
            return dicom.read_tags(path, key=key).patient_id
        except DataError:
            return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(films, progress(pool.map(patient, films), total=len(films), label="reading tags")))


def patients_of(paths: Sequence[str], pattern: str | None) -> list[str]:
    """The patient that each file name names; a film that names none is its own."""
    return _patient_ids(pd.DataFrame({"path": list(paths)}), pattern)


def _compile(pattern: str, *, setting: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{setting}: {pattern!r} is not a regular expression ({error})") from None


def excluded_films(path: Path) -> list[str]:
    """The films that a list or a review.csv leaves out, as written there: every row, or those marked `exclude`.

    DataError for a table without a column `path`, and for a mark that is neither exclude, keep nor empty.
    """
    listed = read_text_table(path, what="list of films to exclude")
    require_columns(listed, ("path",), "list one film a row under that header", where=path)
    if "mark" not in listed.columns:
        return list(listed["path"])
    marks = listed["mark"].str.strip().str.lower()
    unknown = ~marks.isin(["", "exclude", "keep"])
    if unknown.any():
        found = f"mark {listed['mark'][unknown].iloc[0]!r} is not known"
        refuse_rows(unknown, found, "write exclude, keep or nothing", where=path)
    return list(listed["path"][marks == "exclude"])


def _without_excluded(table: pd.DataFrame, path: Path, root: Path, *, must_hold: bool) -> pd.DataFrame:
    """`table` without the films that `path` lists; DataError naming those it does not hold, where it must."""
    unwanted = {str((root / name).resolve()): name for name in excluded_films(path)}
    held = set(table["path"])
    absent = [name for film, name in unwanted.items() if film not in held]
    if absent and must_hold:
        raise DataError(
            f"{path}: {len(absent)} films to exclude are not among the data: {examples(absent)}; write their paths "
            f"relative to {root}"
        )
    kept = table[~table["path"].isin(list(unwanted))]
    log.info("%s: %d films excluded", path, len(table) - len(kept))
    return kept


# --- patient split ---------------------------------------------------------------------------------------------


def split_manifest(manifest: Manifest, config: DataConfig, *, seed: int) -> Manifest:
    """Every row with a split, no patient in two of them.

    Splits the data name are kept. A missing test split is drawn from all patients; a validation split that is
    missing, or too small to choose a threshold on, is drawn from training and validation patients together.
    Stratified by class, grouped by patient, fixed by `seed`. DataError when a patient stands in two splits.
    """
    table = manifest.table.copy()
    check_no_leak(table)
    table.loc[table["split"] == "", "split"] = "train"
    if not (table["split"] == "test").any() and config.test_fraction > 0:
        table = _hold_out(table, "test", config.test_fraction, seed=seed, task=manifest)
    if reason := _validation_lacks(table, config.val_fraction, manifest):
        table.loc[table["split"] == "val", "split"] = "train"
        table = _hold_out(table, "val", config.val_fraction, seed=seed, task=manifest)
        log.info("validation: %s; rebuilt from %.0f %% of the training patients", reason, 100 * config.val_fraction)
    complete = replace(manifest, table=table.assign(row=np.arange(len(table))))
    require_every_class(complete)
    return complete


def require_every_class(manifest: Manifest) -> None:
    """DataError when training or validation lacks a class; training a finding, or films without it."""
    table, classes = manifest.table, manifest.classes
    if manifest.multilabel:
        _require_every_finding(manifest)
        return
    for split in ("train", "val"):
        absent = set(range(len(classes))) - set(table.loc[table["split"] == split, "label"])
        if absent:
            raise DataError(
                f"{split} split: no readable film of class {classes[min(absent)]!r}; every class needs films of at "
                "least two patients outside test"
            )


def _require_every_finding(manifest: Manifest) -> None:
    labels = manifest.split("train")["label"]
    for name, count in zip(manifest.classes, manifest.films_of(labels)):
        if count in (0, len(labels)):
            raise DataError(
                f"train split: {'no film has' if count == 0 else 'every film has'} the finding {name!r}, so it cannot "
                "be learned; leave it out of data.classes or add films"
            )
    if manifest.split("val").empty:
        raise DataError("val split: no readable film; it needs films of at least one patient")


def check_no_leak(table: pd.DataFrame) -> None:
    """DataError when a patient's films stand in more than one split."""
    splits_of = table.groupby("patient_id")["split"].nunique()
    shared = sorted(splits_of.index[splits_of > 1])
    if shared:
        where = sorted(table.loc[table["patient_id"] == shared[0], "split"].unique())
        raise DataError(
            f"{len(shared)} patients are in more than one split, e.g. {shared[0]!r} in {' and '.join(where)}; "
            "give each patient one split, or set data.patient_id_regex if the file names are read wrongly"
        )


def _validation_lacks(table: pd.DataFrame, fraction: float, task: Manifest) -> str | None:
    """Why validation must be rebuilt, or None when it may stand."""
    labels = {name: table[table["split"] == name]["label"] for name in ("train", "val")}
    if labels["val"].empty:
        return "the data name no validation split"
    counts, train = task.films_of(labels["val"]), task.films_of(labels["train"])
    # Findings may be too rare for any split: what is asked of every class is asked of the commonest of them.
    least = np.max if task.multilabel else np.min
    if least(counts) < MIN_VAL_PER_CLASS and least(train) * fraction > least(counts):
        return f"the given {len(labels['val'])} films are too few to choose a threshold"
    return None


def _hold_out(table: pd.DataFrame, name: str, fraction: float, *, seed: int, task: Manifest) -> pd.DataFrame:
    """Move about `fraction` of the training patients into split `name`, stratified by class or by rarest finding."""
    from sklearn.model_selection import StratifiedGroupKFold

    pool = table[table["split"] == "train"]
    least = _rarest_class(pool, name, task)
    folds = int(min(max(2, round(1 / fraction)), least))
    strata = pool["label"].to_numpy(np.int64)
    if task.multilabel:
        strata = findings.strata(strata, len(task.classes), least=folds)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    _, held_out = next(splitter.split(pool, strata, pool["patient_id"]))
    moved = table.copy()
    moved.loc[pool.index[held_out], "split"] = name
    return moved


def _rarest_class(pool: pd.DataFrame, name: str, task: Manifest) -> int:
    """Patients of the class that has fewest, or of all where findings may be rare; DataError for fewer than two."""
    if task.multilabel:
        if (there := pool["patient_id"].nunique()) < 2:
            raise DataError(f"films of {there} patient(s) to split; a {name} split needs at least two patients")
        return there
    patients = pool.groupby("label")["patient_id"].nunique().reindex(range(len(task.classes)), fill_value=0)
    least = int(patients.min())
    if least < 2:
        raise DataError(
            f"class {task.classes[int(patients.argmin())]!r} has films of {least} patient(s) to split; a {name} split "
            "needs at least two patients of every class"
        )
    return least


def write_split(manifest: Manifest, path: Path) -> None:
    """Write split.csv: path,label,split,patient_id, paths relative to the data."""
    table = pd.DataFrame(
        {
            "path": [manifest.relative_path(item) for item in manifest.table["path"]],
            "label": [manifest.written(code) for code in manifest.table["label"]],
            "split": manifest.table["split"],
            "patient_id": manifest.table["patient_id"],
        }
    )
    write_text(path, table.to_csv(index=False))


def describe(manifest: Manifest) -> str:
    """One line a split: films by class and patients."""
    lines = []
    for split, counts in manifest.counts().items():
        shares = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines.append(
            f"{split:>5}: {len(manifest.split(split))} films of {manifest.split(split)['patient_id'].nunique()} "
            f"patients ({shares})"
        )
    return "\n".join(lines)


# --- pixels ----------------------------------------------------------------------------------------------------


class PixelStore(Protocol):
    """Where the uint8 films of a manifest come from, by row."""

    def __getitem__(self, row: int) -> Uint8Array:
        """Film `row`, (S, S, C) uint8; not to be written to."""


class CachedPixels:
    """Films in one memory-mapped file. Pickles as its path, so that worker processes map it without copying."""

    RELEASE_EVERY = 512
    """Reads after which the mapped pages are given back: else all films come to count as this process' memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._array = np.load(path, mmap_mode="r")
        self._reads = 0

    def __getitem__(self, row: int) -> Uint8Array:
        self._reads += 1
        if self._reads % self.RELEASE_EVERY == 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._array._mmap.madvise(mmap.MADV_DONTNEED)  # films handed out stay valid: they are read again
        return self._array[row]

    def __len__(self) -> int:
        return len(self._array)

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedPixels, (self.path,)


class DecodedPixels:
    """Films decoded anew at every read; for data too large for a cache."""

    def __init__(self, paths: Sequence[str], spec: PreprocessSpec) -> None:
        self.paths, self.spec = list(paths), spec

    def __getitem__(self, row: int) -> Uint8Array:
        return _film_of(self.paths[row], self.spec)


def resolve_channels(config: DataConfig, paths: Sequence[str], *, seed: int) -> int:
    """1 or 3: what `data.colour` says, or for 'auto' whether any of 64 films drawn from `paths` shows colour."""
    if config.colour != "auto":
        return 1 if config.colour == "grey" else 3
    drawn = np.random.default_rng((seed, len(paths))).permutation(len(paths))[:64]
    for position in sorted(drawn):
        try:
            if has_colour(decode(paths[position])):
                return 3
        except DataError:
            continue  # reported with all other unreadable films when the pixels are read
    return 1


def open_pixels(
    manifest: Manifest, spec: PreprocessSpec, config: DataConfig, digests: Mapping[str, str] | None = None
) -> tuple[Manifest, PixelStore]:
    """The manifest's pixels, from the cache (built on first use) or decoded on the fly.

    `digests` are the `file_digests` of its films where they are known already. Unreadable films stop the run with a
    DataError, or with `data.skip_unreadable` leave the returned manifest.
    """
    paths = list(manifest.table["path"])
    if not config.pixel_cache:
        if config.skip_unreadable:
            raise ConfigError("data.skip_unreadable: needs data.pixel_cache=true, which finds the unreadable films")
        return manifest, DecodedPixels(paths, spec)
    store, unreadable = cached_pixels(paths, spec, array_cache.default_folder(config.cache_dir), digests)
    if unreadable and not config.skip_unreadable:
        raise DataError(
            f"{len(unreadable)} of {len(paths)} films cannot be read: {next(iter(unreadable.values()))}"
            + (f"; also {examples(list(unreadable)[1:])}" if len(unreadable) > 1 else "")
            + " (--skip-unreadable leaves them out and lists them)"
        )
    for reason in unreadable.values():
        log.warning("left out: %s", reason)
    kept = manifest.table[~manifest.table["path"].isin(list(unreadable))]
    complete = replace(manifest, table=kept)
    require_every_class(complete)
    return complete, store


def cached_pixels(
    paths: Sequence[str], spec: PreprocessSpec, folder: Path, digests: Mapping[str, str] | None = None
) -> tuple[CachedPixels, dict[str, str]]:
    """The pixels of `paths` in order, and the unreadable ones with the reason (their rows are black and unused).

    The cache file is keyed by the films' content, their order and the spec.
    """
    digests = digests or file_digests(paths)
    geometry = f"{CACHE_VERSION}|{spec.image_size}|{spec.resize}|{spec.channels}"
    geometry += f"|{spec.dicom_window}|{spec.dicom_body_part}"
    path = folder / "pixels" / f"{array_cache.key_of([geometry, *(digests[name] for name in paths)])}.npy"
    facts = array_cache.open_or_build(
        path,
        shape=(len(paths), spec.image_size, spec.image_size, spec.channels),
        dtype=np.uint8,
        build=lambda write: _decode_all(paths, spec, write),
        what="pixel cache",
        remedy="set data.cache_dir to a larger disk or data.pixel_cache=false",
    )
    return CachedPixels(path), {paths[int(row)]: reason for row, reason in facts["unreadable"].items()}


def _decode_all(paths: Sequence[str], spec: PreprocessSpec, write: array_cache.Writer) -> dict[str, Any]:
    unreadable: dict[str, str] = {}
    black = np.zeros((spec.image_size, spec.image_size, spec.channels), dtype=np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(lambda name: _decode_or_reason(name, spec), paths)
        for row, result in enumerate(progress(decoded, total=len(paths), label="decoding films")):
            if isinstance(result, str):
                unreadable[str(row)] = result
            write(black if isinstance(result, str) else result)
    return {"unreadable": unreadable}


def file_digests(paths: Sequence[str]) -> dict[str, str]:
    """Path → hash of the file's content."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(_file_digest, paths)))


def film_hashes(paths: Sequence[str], digests: Mapping[str, str] | None = None) -> IntArray:
    """A 64-bit hash of each file's content, by which a film is known again under any name.

    `digests` are their `file_digests` where they are known already: the files are then not read again.
    """
    digests = digests or file_digests(paths)
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(digests[name].encode(), digest_size=8).digest(), "big", signed=True)
            for name in paths
        ],
        dtype=np.int64,
    )


def _file_digest(path: str) -> str:
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        return f"unreadable {path} {error.errno}"


def _film_of(path: str, spec: PreprocessSpec) -> Uint8Array:
    """The film as a model sees it; a black one for a row that has none."""
    if has_film(path):
        return apply(spec, decode(path, spec))
    return np.zeros((spec.image_size, spec.image_size, spec.channels), dtype=np.uint8)


def _decode_or_reason(path: str, spec: PreprocessSpec) -> Uint8Array | str:
    try:
        return np.ascontiguousarray(_film_of(path, spec))
    except DataError as error:
        return str(error)


# --- augmentation ----------------------------------------------------------------------------------------------


class Augmenter:
    """The published pipeline, every probability scaled by `augmentation_prob`; drawn from (seed, epoch, index).

    Rotation ±15°, horizontal flip, brightness and contrast, CLAHE, Gaussian noise, blur, coarse dropout and grid
    dropout; gamma when `gamma` is above 0, and of every film a random resized crop when `min_crop_scale` is below 1.
    """

    def __init__(self, config: DataConfig, *, seed: int) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations as A

        p = config.augmentation_prob
        side = config.image_size
        crop = (
            [A.RandomResizedCrop((side, side), scale=(config.min_crop_scale, 1.0), ratio=CROP_RATIO, p=1.0)]
            if config.min_crop_scale < 1
            else []
        )
        gamma = [A.RandomGamma(gamma_limit=(100 / (1 + config.gamma), 100 * (1 + config.gamma)), p=p)]
        change = config.brightness_contrast
        self.seed = seed
        self.active = p > 0
        self.settings = (seed, p, side, config.rotation_degrees, change, config.min_crop_scale, config.gamma)
        self.pipeline = A.Compose(
            [
                *crop,
                A.Rotate(limit=config.rotation_degrees, border_mode=cv2.BORDER_CONSTANT, p=p),
                A.HorizontalFlip(p=p),
                A.RandomBrightnessContrast(brightness_limit=change, contrast_limit=change, p=p),
                *(gamma if config.gamma else []),
                A.CLAHE(clip_limit=(1.0, 2.0), p=0.6 * p),
                A.GaussNoise(std_range=(0.01, 0.04), p=0.6 * p),
                A.GaussianBlur(sigma_limit=(0.3, 1.0), blur_limit=0, p=0.4 * p),
                A.CoarseDropout(
                    num_holes_range=(1, 4), hole_height_range=(0.05, 0.15), hole_width_range=(0.05, 0.15), p=0.6 * p
                ),
                A.GridDropout(ratio=0.3, unit_size_range=(max(4, side // 12), max(5, side // 6)), p=0.2 * p),
            ]
        )

    def __call__(self, image: Uint8Array, *, epoch: int, index: int) -> Uint8Array:
        """An augmented copy of `image` (H, W, C) uint8, the same for the same (seed, epoch, index)."""
        if not self.active:
            return image
        generator = np.random.default_rng((self.seed, epoch, index))
        self.pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        return self.pipeline(image=np.ascontiguousarray(image))["image"]


# --- order, balance and loading --------------------------------------------------------------------------------


def class_weights(labels: IntArray, n_classes: int) -> npt.NDArray[np.float64]:
    """Weight per class, (n_classes,): n / (n_classes · count), so that the weights average 1 over the films."""
    counts = np.bincount(labels, minlength=n_classes)
    return len(labels) / (n_classes * np.maximum(counts, 1))


def epoch_order(labels: IntArray, *, seed: int, epoch: int, n_classes: int, weighted: bool) -> IntArray:
    """Positions of one epoch: a permutation, or as many draws with replacement, the classes equally likely."""
    generator = np.random.default_rng((seed, 1, epoch))
    if not weighted:
        return generator.permutation(len(labels))
    weights = class_weights(labels, n_classes)[labels]
    return generator.choice(len(labels), size=len(labels), p=weights / weights.sum())


class Batch(NamedTuple):
    """Films as they leave the loader; normalisation happens on the device."""

    inputs: torch.Tensor
    """Films, uint8 (B, H, W, C); or, from a feature cache, what the frozen layers made of them, float32 (B, ...)."""
    labels_B: torch.Tensor
    """int64."""
    positions_B: torch.Tensor
    """int64 positions in the split's table."""


class Request(NamedTuple):
    """Which films to prepare, and for which epoch; all a worker needs to know."""

    epoch: int
    positions: IntArray


class FilmBatches(torch.utils.data.Dataset[Batch]):
    """A split as a map from `Request` to `Batch`; holds no state that an epoch could change.

    An `Augmenter` works here, film by film; a `DeviceAugmenter` only in `finished`, where the batch has arrived.
    """

    def __init__(self, rows: pd.DataFrame, pixels: PixelStore, augmenter: Augmenter | DeviceAugmenter | None) -> None:
        self.pixels = pixels
        self.augmenter = augmenter if augmenter is not None and augmenter.active else None
        self.store_rows = rows["row"].to_numpy(np.int64)
        self.labels = rows["label"].to_numpy(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, request: Request) -> Batch:
        images = [self._film(int(position), request.epoch) for position in request.positions]
        return Batch(
            torch.from_numpy(np.stack(images)),
            torch.from_numpy(self.labels[request.positions]),
            torch.from_numpy(np.asarray(request.positions)),
        )

    def _film(self, position: int, epoch: int) -> Uint8Array:
        row = int(self.store_rows[position])
        image = self.pixels[row]
        return self.augmenter(image, epoch=epoch, index=row) if isinstance(self.augmenter, Augmenter) else image

    def finished(self, batch: Batch, *, epoch: int, device: torch.device) -> torch.Tensor:
        """The films of `batch` on `device`, uint8 (B, H, W, C), with what augmentation is left to do there."""
        films = batch.inputs.to(device, non_blocking=True)
        if not isinstance(self.augmenter, DeviceAugmenter):
            return films
        return self.augmenter(films, epoch=epoch, rows=self.store_rows[batch.positions_B.numpy()])


class _Requests(torch.utils.data.Sampler[Request]):
    """The list the loader walks; replaced each epoch so that persistent workers live on."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class Loader:
    """Prepares batches ahead of the model: in worker processes, or with 0 workers in one thread of this process."""

    def __init__(self, dataset: FilmBatches, *, workers: int, pin_memory: bool = False) -> None:
        self.dataset, self.workers = dataset, workers
        if workers == 0:
            cv2.setNumThreads(1)  # the preparing thread must not take the cores the network computes on
        self._requests = _Requests()
        self._loader = (
            torch.utils.data.DataLoader(
                dataset,
                batch_size=None,
                sampler=self._requests,
                num_workers=workers,
                prefetch_factor=2,
                persistent_workers=True,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # the default one would draw from the stream that dropout reads
                worker_init_fn=_one_thread_each,
            )
            if workers > 0
            else None
        )

    def __call__(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """The batches of `requests`, in order."""
        if self._loader is None:
            return prefetch((self.dataset[request] for request in requests), depth=2)
        self._requests.requests = list(requests)
        return self._from_workers(iter(self._loader))

    @staticmethod
    def _from_workers(batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, with a worker's DataError reduced to its own line: torch wraps it in the worker's traceback."""
        try:
            yield from batches
        except DataError as error:
            line = str(error).strip().splitlines()[-1]
            raise DataError(line.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")) from None


RESIDENT_SHARE = 0.4
"""Of the device's free memory that resident films may take; the rest is for the network."""


class ResidentFilms:
    """A split's films, all kept in the device's memory; gives batches as `Loader` does."""

    def __init__(self, dataset: FilmBatches, device: torch.device) -> None:
        assert not isinstance(dataset.augmenter, Augmenter)
        self.dataset = dataset
        first = dataset.pixels[int(dataset.store_rows[0])]
        self.films = torch.empty((len(dataset), *first.shape), dtype=torch.uint8, device=device)
        for start in range(0, len(dataset), 256):
            positions = np.arange(start, min(start + 256, len(dataset)))
            self.films[start : start + 256] = dataset[Request(0, positions)].inputs.to(device)

    def __call__(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """The batches of `requests`, in order."""
        for request in requests:
            positions_B = torch.from_numpy(request.positions)
            there = positions_B.to(self.films.device, non_blocking=True)
            yield Batch(self.films[there], torch.from_numpy(self.dataset.labels[request.positions]), positions_B)


def can_be_resident(dataset: FilmBatches, device: torch.device) -> bool:
    """Whether the films fit beside the network in a GPU's memory, and nothing is to be done to them on the way."""
    if device.type != "cuda" or isinstance(dataset.augmenter, Augmenter):
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return len(dataset) * dataset.pixels[int(dataset.store_rows[0])].nbytes < RESIDENT_SHARE * free


def _one_thread_each(worker: int) -> None:
    cv2.setNumThreads(0)


def sequential_requests(count: int, batch_size: int) -> list[Request]:
    """Every position once, in order; for measuring."""
    return [Request(0, np.arange(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]


def training_requests(
    labels: IntArray, *, batch_size: int, seed: int, epoch: int, n_classes: int, weighted: bool
) -> list[Request]:
    """The full batches of one epoch in their drawn order; what does not fill a batch waits for another epoch."""
    if batch_size > len(labels):
        raise DataError(
            f"batch size {batch_size} is larger than the training split ({len(labels)} films); lower --batch-size"
        )
    order = epoch_order(labels, seed=seed, epoch=epoch, n_classes=n_classes, weighted=weighted)
    full = len(order) // batch_size
    return [Request(epoch, part) for part in order[: full * batch_size].reshape(full, batch_size)]


def prefetch(items: Iterable[Item], *, depth: int) -> Iterator[Item]:
    """Yield `items`, produced up to `depth` ahead in a thread; errors surface here, an early end stops the thread."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, ready, stopped), daemon=True)
    thread.start()
    try:
        while True:
            ended, value = ready.get()
            if ended:
                if value is not None:
                    raise value
                return
            yield value
    finally:
        stopped.set()
        thread.join()


def _produce(items: Iterable[Any], ready: queue.Queue[tuple[bool, Any]], stopped: threading.Event) -> None:
    def put(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.05)
                return
            except queue.Full:
                continue

    try:
        for item in items:
            put((False, item))
            if stopped.is_set():
                return
        put((True, None))
    except BaseException as error:  # handed to the consuming thread, which raises it
        put((True, error))


def self_check(say: Callable[[str], None] = print) -> None:
    """Make films, read them back through every step of this module, and say what came out."""
    import tempfile

    import synthetic

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.write_dataset(folder / "films", patients_per_class={"train": 12, "test": 4}, size=64)
        config = DataConfig(data_dir=str(folder / "films"), image_size=64, cache_dir=str(folder), val_fraction=0.25)
        manifest = split_manifest(load_manifest(config), config, seed=0)
        say(describe(manifest))
        manifest, pixels = open_pixels(manifest, PreprocessSpec(image_size=64), config)
        dataset = FilmBatches(manifest.split("train"), pixels, Augmenter(config, seed=0))
        requests = training_requests(dataset.labels, batch_size=8, seed=0, epoch=1, n_classes=2, weighted=False)
        shapes = [tuple(batch.inputs.shape) for batch in Loader(dataset, workers=0)(requests)]
        say(f"data_preprocessing: ok ({len(shapes)} batches of {shapes[0]})")


if __name__ == "__main__":
    self_check()
