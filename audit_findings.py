"""The findings of an audit: from films that were read to what is wrong with them, how badly, and what to do.

    found = all_findings(evidence, config, classes=classes, positive=positive, tried=tried)

Each kind of finding is one function from the evidence to a list, empty where all is well.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from config import DataConfig
from data_preprocessing import MIN_VAL_PER_CLASS, SPLITS
from duplicates import connected
from film_facts import NON_IMAGE, Scan
from film_list import FilmList
from proportions import difference_of_proportions
from shortcuts import Nuisance, nuisances, telling_words

ERROR, WARNING, INFO = "error", "warning", "info"
SEVERITIES = (ERROR, WARNING, INFO)
MAX_EXAMPLES = 200
"""Examples of a finding in audit.json; findings.csv has them all."""
IMBALANCE, STRONG_IMBALANCE = 0.2, 0.05
"""Share of the training films below which the rarest class is worth a note, and a warning."""
SHIFT = 0.05
"""Difference of prevalence between two splits that is worth a warning, if more than chance."""
STRONG, CLEAR = 0.9, 0.55
"""Lower confidence bound of a nuisance's AUROC from which it is an error (if it is no anatomy), and a warning."""
ALPHA = 0.05
OUTLYING = 6.0
"""Robust standard deviations (from the median, by the median absolute deviation) from which a film stands out."""
ASPECT = 1.8
"""Factor from the median of width / height from which a film's shape is unusual."""
BLANK = 0.02
"""Contrast below which a film shows nothing."""
BORDERED = 0.01
"""Share of the area in borders of one level that is worth a note."""
MARKED = 0.0005
"""Share of the film in burned-in text that is worth a note: an R of 1/40 of the side."""
METADATA = ("view", "site", "age", "sex", "hospital", "position", "projection", "manufacturer", "scanner", "device")
"""Columns of a manifest that are tried as shortcuts."""
ANATOMICAL = frozenset({"mean", "contrast", "bytes", "age", "sex"})
"""Nuisances that disease itself may change, or that go with it: a warning at most."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    kind: str
    severity: str
    count: int
    """Groups, films, patients or classes, as `title` says."""
    title: str
    """One line for a reader, with the count in it."""
    remedy: str
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Every item."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else belongs to this kind, such as the AUROC of a shortcut."""

    def as_report(self) -> dict[str, Any]:
        """Plain values for audit.json."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "count": self.count,
            "title": self.title,
            "remedy": self.remedy,
            **self.facts,
            "examples": self.examples[:MAX_EXAMPLES],
        }


def some(count: int, name: str) -> str:
    """'1 film', '1,200 films'."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Evidence:
    """The films, what was read of them, and which of them are one picture."""

    films: FilmList
    scan: Scan
    exact: list[list[int]]
    """Groups of rows with equal pixels."""
    near: list[tuple[list[int], float]]
    """Groups of rows that show one picture in different pixels, with their least correlation."""

    @property
    def readable(self) -> npt.NDArray[np.int64]:
        """Rows of the films that could be read."""
        return np.flatnonzero(self.scan.facts["readable"])

    def paths(self, rows: Iterable[int]) -> list[str]:
        """Paths as written in reports."""
        return [self.films.shown(row) for row in rows]


# --- findings --------------------------------------------------------------------------------------------------


def all_findings(
    evidence: Evidence,
    config: DataConfig,
    *,
    classes: Sequence[str],
    positive: str | None,
    tried: Sequence[Nuisance],
) -> list[Finding]:
    """Every finding, the gravest first; `tried` are the nuisances of `tried_nuisances`."""
    found = [
        *_unreadable(evidence),
        *_faulty_rows(evidence.films),
        *_duplicates(evidence),
        *_label_conflicts(evidence),
        *_leaks(evidence.films),
        *_balance(evidence.films, classes, positive),
        *_outliers(evidence, config.image_size),
        *_shortcuts(tried),
        *_notes(evidence.films, classes, positive),
    ]
    return sorted(found, key=lambda item: SEVERITIES.index(item.severity))


def _unreadable(evidence: Evidence) -> list[Finding]:
    faults = evidence.scan.faults
    if not faults:
        return []
    items = [
        {"path": path, "reason": fault.kind, "detail": fault.line}
        for (_, fault), path in zip(faults.items(), evidence.paths(faults))
    ]
    reasons = Counter(fault.kind for fault in faults.values())
    listed = ", ".join(f"{name} {count}" for name, count in reasons.items())
    return [
        Finding(
            "unreadable",
            ERROR,
            len(items),
            f"{some(len(items), 'film')} cannot be read ({listed})",
            "Fetch them again or remove them; train --skip-unreadable leaves them out and lists them.",
            items,
            {"reasons": dict(reasons)},
        )
    ]


def _faulty_rows(films: FilmList) -> list[Finding]:
    found = []
    if films.passed_over:
        found.append(
            Finding(
                NON_IMAGE,
                INFO,
                len(films.passed_over),
                f"{some(len(films.passed_over), 'file')} passed over: no film by the name",
                "Nothing to do, unless films are among them: give those an image suffix.",
                [{"path": path} for path in films.passed_over],
            )
        )
    if films.faults:
        found.append(
            Finding(
                "faulty_row",
                ERROR,
                len(films.faults),
                f"{some(len(films.faults), 'wrong row')} in the table: {films.faults[0][0]}: {films.faults[0][1]}",
                "Correct these rows; training refuses the table as it stands.",
                [{"path": where, "detail": what} for where, what in films.faults],
            )
        )
    unlabelled = [row for row, label in enumerate(films.label) if not label]
    if unlabelled:
        found.append(
            Finding(
                "unlabelled",
                INFO if len(unlabelled) == len(films.label) else ERROR,
                len(unlabelled),
                f"{some(len(unlabelled), 'film')} without a label",
                "Put them into a class folder, or fill in the column label.",
                [{"path": films.shown(row)} for row in unlabelled],
            )
        )
    return found


def _duplicates(evidence: Evidence) -> list[Finding]:
    exact = [(group, 1.0) for group in evidence.exact]
    return [
        *_duplicates_of(evidence, "exact_duplicate", exact, "hold the same pixels"),
        *_duplicates_of(evidence, "near_duplicate", evidence.near, "show the same picture"),
    ]


def _duplicates_of(
    evidence: Evidence, kind: str, groups: Sequence[tuple[list[int], float]], what: str
) -> list[Finding]:
    films = evidence.films
    items: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for rows, correlation in groups:
        splits = [films.split[row] for row in rows]
        item: dict[str, Any] = {"paths": evidence.paths(rows), "splits": splits}
        item |= {"labels": [films.label[row] for row in rows], "patients": [films.patient[row] for row in rows]}
        if kind == "near_duplicate":
            item["correlation"] = round(correlation, 4)
        items[len(set(splits)) > 1].append(item)
    found = []
    if across := items[True]:
        found.append(
            Finding(
                kind,
                ERROR,
                len(across),
                f"{some(len(across), 'group')} of films that {what} in different splits",
                "Keep each picture in one split: what was trained on must not be measured on.",
                across,
                {"scope": "across splits"},
            )
        )
    if within := items[False]:
        strangers = sum(len(set(item["patients"])) > 1 for item in within)
        noted = f", {strangers} of them of different patients" if strangers else ""
        found.append(
            Finding(
                kind,
                WARNING,
                len(within),
                f"{some(len(within), 'group')} of films that {what} within a split{noted}",
                "Keep one of each group (train --exclude FILE.csv): copies count twice and narrow the intervals.",
                within,
                {"scope": "within a split"},
            )
        )
    return found


def _label_conflicts(evidence: Evidence) -> list[Finding]:
    pairs = [(rows[0], row) for rows in [*evidence.exact, *(rows for rows, _ in evidence.near)] for row in rows[1:]]
    items, films = [], evidence.films
    for rows in connected(pairs):
        labels, splits = [films.label[row] for row in rows], [films.split[row] for row in rows]
        if len(set(labels) - {""}) > 1:
            items.append({"paths": evidence.paths(rows), "labels": labels, "splits": splits})
    found = []
    if items:
        found.append(
            Finding(
                "label_conflict",
                ERROR,
                len(items),
                f"{some(len(items), 'picture')} with different labels in different copies",
                "Find out which label is true and remove the other copy.",
                items,
                {"scope": "picture"},
            )
        )
    return [*found, *_patients_with_two_labels(evidence)]


def _patients_with_two_labels(evidence: Evidence) -> list[Finding]:
    films = evidence.films
    items = []
    for patient, rows in _rows_by(films.patient).items():
        labels = [films.label[row] for row in rows]
        if len(set(labels) - {""}) > 1:
            items.append({"patient": patient, "paths": evidence.paths(rows), "labels": labels})
    if not items:
        return []
    return [
        Finding(
            "label_conflict",
            INFO,
            len(items),
            f"{some(len(items), 'patient')} with films of different labels",
            "Right where disease came or went between two films; else correct the labels or the patient column.",
            items,
            {"scope": "patient"},
        )
    ]


def _rows_by(names: Sequence[str]) -> dict[str, list[int]]:
    """Name → the rows that bear it, in order."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


def _leaks(films: FilmList) -> list[Finding]:
    found: list[Finding] = []
    known: set[int] = set()
    for how, patients in films.readings.items():
        shared = {
            patient: rows for patient, rows in _rows_by(patients).items() if len({films.split[row] for row in rows}) > 1
        }
        # A second reading is worth a word only for films that the first one does not name.
        rows_shared = {row for rows in shared.values() for row in rows}
        if rows_shared <= known:
            continue
        known |= rows_shared
        items = [
            {
                "patient": patient,
                "splits": sorted({films.split[row] for row in rows}),
                "paths": [films.shown(row) for row in rows],
            }
            for patient, rows in shared.items()
        ]
        first = how == next(iter(films.readings))
        if first:
            remedy = "Give each patient one split, or delete the split column and let train draw one by patient."
        else:
            remedy = "Find out how the names are to be read; set data.patient_id_regex or add a column patient_id."
        reading = "" if first else f", if the patient is read from {how}"
        found.append(
            Finding(
                "patient_leak",
                ERROR if first else WARNING,
                len(items),
                f"{some(len(items), 'patient')} in more than one split{reading}",
                remedy,
                items,
                {"reading": how},
            )
        )
    return found


def _balance(films: FilmList, classes: Sequence[str], positive: str | None) -> list[Finding]:
    if len(classes) == 1:
        title = f"all labelled films are {classes[0]!r}"
        return [Finding("class_imbalance", ERROR, 1, title, "A classifier needs films of at least two classes.")]
    if not classes:
        return []
    counts = counts_by_split(films, classes)
    return [*_small_validation(counts), *_imbalance(counts), *_prevalence_shift(counts, positive)]


def counts_by_split(films: FilmList, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Split ('' where none) → class → films."""
    found = Counter(zip(films.split, films.label))
    splits = [name for name in ("", *SPLITS) if name in set(films.split)]
    return {split: {name: found[split, name] for name in classes} for split in splits}


def _small_validation(counts: dict[str, dict[str, int]]) -> list[Finding]:
    val = counts.get("val", {})
    if set(counts) == {""} or (val and min(val.values()) >= MIN_VAL_PER_CLASS):
        return []
    there = ", ".join(f"{name} {count}" for name, count in val.items()) or "none at all"
    return [
        Finding(
            "small_validation",
            WARNING if val else INFO,
            sum(val.values()),
            f"validation films are too few to choose a threshold: {there}, wanted {MIN_VAL_PER_CLASS} a class",
            "train draws a larger one from the training patients (data.val_fraction); or give more films to val.",
            facts={"films": val},
        )
    ]


def _imbalance(counts: dict[str, dict[str, int]]) -> list[Finding]:
    training = counts.get("train") or counts.get("") or next(iter(counts.values()))
    rarest = min(training, key=lambda name: training[name])
    share = training[rarest] / max(1, sum(training.values()))
    if share >= IMBALANCE:
        return []
    return [
        Finding(
            "class_imbalance",
            WARNING if share < STRONG_IMBALANCE else INFO,
            training[rarest],
            f"{rarest} is {100 * share:.1f} % of the training films ({training[rarest]})",
            "data.balance=loss (the default) or sampler evens the classes out; judge by AUROC, not by accuracy.",
            facts={"films": training},
        )
    ]


def _prevalence_shift(counts: dict[str, dict[str, int]], positive: str | None) -> list[Finding]:
    train, test = counts.get("train", {}), counts.get("test", {})
    n_train, n_test = sum(train.values()), sum(test.values())
    if not (n_train and n_test):
        return []
    found = []
    for name in [positive] if positive else list(train):
        difference = difference_of_proportions(train[name], n_train, test[name], n_test)
        if abs(difference.value) <= SHIFT or difference.ci_low <= 0 <= difference.ci_high:
            continue
        found.append(
            Finding(
                "prevalence_shift",
                WARNING,
                1,
                f"{name} is {100 * train[name] / n_train:.1f} % of train and {100 * test[name] / n_test:.1f} % of test",
                "Probabilities learned at one prevalence are wrong at the other: evaluate --prevalence states it.",
                facts={"difference": difference.as_report()},
            )
        )
    return found


# --- what stands out -------------------------------------------------------------------------------------------


def _outliers(evidence: Evidence, image_size: int) -> list[Finding]:
    rows, facts = evidence.readable, evidence.scan.facts[evidence.readable]
    if not len(rows):
        return []
    aspect = np.log(facts["width"] / facts["height"])
    short = np.minimum(facts["width"], facts["height"])
    blank = facts["contrast"] < BLANK
    shown = {
        "width": facts["width"],
        "height": facts["height"],
        "bits": facts["bits"],
        "mean": np.round(facts["mean"].astype(np.float64), 3),
        "contrast": np.round(facts["contrast"].astype(np.float64), 3),
        "border": np.round(facts["border"].astype(np.float64), 3),
        "marker": np.round(facts["marker"].astype(np.float64), 4),
    }

    def finding(
        kind: str, severity: str, where: npt.NDArray[np.bool_], what: str, remedy: str, columns: tuple[str, ...]
    ) -> list[Finding]:
        chosen = np.flatnonzero(where)
        if not len(chosen):
            return []
        if kind in ("border", "marker"):
            chosen = chosen[np.argsort(-facts[kind][chosen], kind="stable")]  # the clearest first
        items = [
            {"path": path} | {name: shown[name][position].item() for name in columns}
            for position, path in zip(chosen, evidence.paths(rows[chosen]))
        ]
        return [Finding(kind, severity, len(items), f"{some(len(items), 'film')} {what}", remedy, items)]

    look = "Look at them: other views, other body parts and screenshots do not belong here."
    enlarged = "They are enlarged; a smaller --image-size loses nothing."
    goes_along = "Check that the depth does not go with the class or the site."
    told = "the shortcuts say whether it tells the class"
    names_nobody = "Check that the text names nobody"
    odd_level = (_outlying(facts["mean"]) | _outlying(facts["contrast"])) & ~blank
    odd_size = short * 3 < np.median(short)
    small = (short < image_size) & ~odd_size
    odd_shape = np.abs(aspect - np.median(aspect)) > np.log(ASPECT)
    other_depth = facts["bits"] != _mode(facts["bits"])
    other_colour = facts["colour"] != _mode(facts["colour"])
    bordered = (facts["border"] > BORDERED) & ~blank
    marked = (facts["marker"] > MARKED) & ~blank
    found = [
        ("blank", WARNING, blank, "with next to nothing on them", "Remove them.", ("mean", "contrast")),
        ("size", WARNING, odd_size, "far smaller than the rest", look, ("width", "height")),
        ("small", INFO, small, f"smaller than the {image_size} pixels a model sees", enlarged, ("width", "height")),
        ("aspect", WARNING, odd_shape, "of an unusual shape", look, ("width", "height")),
        ("intensity", WARNING, odd_level, "unusually dark, bright, flat or harsh", look, ("mean", "contrast")),
        ("bit_depth", INFO, other_depth, "of another bit depth than most", goes_along, ("bits",)),
        ("colour_mode", INFO, other_colour, "coloured where most are grey, or the other way round", look, ()),
        ("border", INFO, bordered, "with a border of one level", f"Crop it; {told}", ("border",)),
        (
            "marker",
            INFO,
            marked,
            "with what seems to be text burned in near the edge",
            f"{names_nobody}; {told}",
            ("marker",),
        ),
    ]
    return [item for parts in found for item in finding(*parts)]


def _outlying(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    away = np.abs(values - np.median(values))
    spread = 1.4826 * float(np.median(away))
    return away > OUTLYING * spread if spread > 0 else np.zeros(len(values), bool)


def _mode(values: npt.NDArray[Any]) -> Any:
    found, counts = np.unique(values, return_counts=True)
    return found[counts.argmax()]


# --- shortcuts -------------------------------------------------------------------------------------------------


def tried_nuisances(evidence: Evidence, classes: Sequence[str], positive: str | None) -> list[Nuisance]:
    """What is known of a film beside its anatomy, each tried alone against the label; best first."""
    films = evidence.films
    rows = [row for row in evidence.readable.tolist() if films.label[row]]
    if len(classes) < 2 or not rows:
        return []
    facts = evidence.scan.facts[rows]
    columns: dict[str, npt.NDArray[Any]] = {
        name: facts[name].astype(np.float64)
        for name in ("width", "height", "bytes", "mean", "contrast", "border", "marker")
    }
    columns["aspect"] = facts["width"] / facts["height"]
    columns["quality"] = np.where(facts["quality"] > 0, facts["quality"].astype(np.float64), np.nan)
    columns["bits"] = facts["bits"].astype(str)
    columns["stored channels"] = facts["channels"].astype(str)
    suffixes = [os.path.splitext(films.path[row])[1].lower() for row in rows]  # noqa: PTH122 - Path takes ten times as long
    columns["format"] = np.array(suffixes)
    columns |= metadata_columns(films.table.iloc[rows])
    labels = label_codes([films.label[row] for row in rows], classes)
    patients = [films.patient[row] for row in rows]
    return nuisances(columns, labels, classes=classes, patients=patients, positive_class=positive)


def metadata_columns(table: pd.DataFrame) -> dict[str, npt.NDArray[Any]]:
    """The columns of a manifest that say how a film came about; age as numbers, NaN where it is none."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in table.columns:
        if name.lower() not in METADATA or not (table[name] != "").any():
            continue
        if name.lower() == "age":
            columns[name] = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64)
        else:
            columns[name] = table[name].to_numpy(str)
    return columns


def label_codes(labels: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Class numbers (N,) of class names."""
    code_of = {name: code for code, name in enumerate(classes)}
    return np.array([code_of[label] for label in labels], dtype=np.int64)


def _shortcuts(tried: Sequence[Nuisance]) -> list[Finding]:
    found = []
    for item in tried:
        low = item.auroc.ci_low
        if not (item.p_adjusted < ALPHA and low > 0.5):
            continue
        strong = low >= STRONG and item.name.lower() not in ANATOMICAL
        found.append(
            Finding(
                "shortcut",
                ERROR if strong else WARNING if low >= CLEAR else INFO,
                item.films,
                f"{item.words} alone tells {item.positive_class} with AUROC {item.auroc.value:.3f} "
                f"({low:.3f}–{item.auroc.ci_high:.3f})",
                _shortcut_remedy(item),
                facts=item.as_report(),
            )
        )
    return found


def _shortcut_remedy(item: Nuisance) -> str:
    if item.name in ("mean", "contrast"):
        return "Disease may change it; augmentation of brightness and contrast keeps a model from leaning on it."
    if item.name in ("border", "marker"):
        return "Crop or mask it, and look at explain maps: they show whether a model looks there."
    if item.name in ("width", "height", "aspect", "bytes", "quality", "bits", "format", "stored channels"):
        return "Classes come from different sources or software: export all films in one way, then audit again."
    return f"Match or balance the classes over it, and report results within its groups: --subgroups {item.name}."


def _notes(films: FilmList, classes: Sequence[str], positive: str | None) -> list[Finding]:
    texts = films.table["text"].tolist() if "text" in films.table.columns else []
    rows = [row for row, note in enumerate(texts) if note and films.label[row]]
    if not rows or len(classes) < 2:
        return []
    notes = [texts[row] for row in rows]
    found = telling_words(
        notes,
        label_codes([films.label[row] for row in rows], classes),
        classes=classes,
        patients=[films.patient[row] for row in rows],
        positive_class=positive,
    )
    telling = [item for item in found.words if item.p_adjusted < ALPHA and item.auroc.ci_low >= CLEAR]
    named = sum(len(places) for places in found.naming.values())
    if not named and not telling:
        return []
    items: list[dict[str, Any]] = [
        {"path": films.shown(rows[place]), "names": name, "note": notes[place][:200]}
        for name, places in found.naming.items()
        for place in places
    ]
    words = ", ".join(f"{item.name!r} {item.auroc.value:.2f}" for item in telling[:5])
    parts = [f"{named} of {len(notes)} notes name the class of their film"] if named else []
    parts += [f"words that tell it by being there (AUROC): {words}"] if telling else []
    return [
        Finding(
            "text_leak",
            ERROR if named else WARNING,
            named or len(telling),
            "; ".join(parts),
            "Remove diagnosis and test results from the notes, or do not train on the column text.",
            items,
            {"words": [item.as_report() for item in telling[:50]]},
        )
    ]
