"""What is wrong with a data set, said before any training on it.

    python main.py audit data/chest_xray --output-dir audit_results

Reads every film once. Writes audit.json, audit.html, findings.csv (every item of every finding) and, when asked, a
manifest. Changes no film and no label. Exit code 3 when a finding would invalidate results: the same film or patient
on both sides of a split, one film with two labels, films that cannot be read, an acquisition that gives the label away.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

import dicom
import findings
from audit_findings import (
    ALPHA,
    CLEAR,
    ERROR,
    WARNING,
    Evidence,
    Finding,
    all_findings,
    counts_by_split,
    metadata_columns,
    some,
    tried_nuisances,
)
from audit_report import report_html
from config import DataConfig, Overrides, resolve
from data_preprocessing import Manifest, named_labels, positive_class
from duplicates import SIDE, connected, near_pairs, same_key
from errors import DataError, examples
from film_facts import Scan, same_pixels, scan_films
from film_list import FilmList, list_films
from preprocess import IMAGE_SUFFIXES
from runtime import log, require_writable, write_json, write_text
from shortcuts import Nuisance, nuisances

EXIT_INVALID = 3
"""Exit code of the verb when there is a finding of severity error."""


# --- the verb --------------------------------------------------------------------------------------------------


def audit(
    source: Path | None, *overrides: Overrides, output_dir: Path, write_manifest: Path | None = None
) -> dict[str, Any]:
    """Audit a folder or CSV (default: the configured data) into `output_dir`; the content of audit.json.

    DataError where there is nothing to judge; whatever is wrong with the films themselves is a finding.
    """
    config = resolve(*overrides)
    source = source or Path(config.data.manifest or config.data.data_dir)
    require_writable(output_dir)
    if write_manifest is not None:
        require_writable(write_manifest.resolve().parent, flag="--write-manifest")
    started = time.perf_counter()
    films = list_films(source, patient_pattern=config.data.patient_id_regex)
    films.table["label"] = _labels(films, config.data)
    workers = config.runtime.workers if config.runtime.workers > 0 else os.cpu_count() or 1
    evidence = examine(films, workers=workers, scratch=output_dir)
    classes = sorted(set(films.label) - {""})
    positive = positive_class(classes, config.data.positive_class if config.data.positive_class in classes else None)
    seconds = time.perf_counter() - started
    tried = tried_nuisances(evidence, classes, positive)
    found = all_findings(evidence, config.data, classes=classes, positive=positive, tried=tried)
    report = _report(evidence, classes, positive, found, tried, seconds)
    write_json(output_dir / "audit.json", report)
    write_text(output_dir / "findings.csv", _every_item(found))
    write_text(output_dir / "audit.html", report_html(report, films.root))
    if write_manifest is not None:
        _write_manifest(films, write_manifest)
    return report


def _labels(films: FilmList, config: DataConfig) -> list[str]:
    """Each film's label as training reads it; of several findings every combination is a class here."""
    if config.label_regex:
        return named_labels(films.table["path"], config.label_regex, films.root)
    if config.task == "multilabel":
        return [findings.SEPARATOR.join(sorted(findings.named(cell))) or findings.NONE for cell in films.table["label"]]
    return films.table["label"].tolist()


def exit_code(report: dict[str, Any]) -> int:
    """3 when a finding would invalidate results, else 0."""
    return EXIT_INVALID if report["errors"] else 0


def summary(report: dict[str, Any]) -> str:
    """The findings, a line each."""
    lines = [
        f"{report['n']:,} films of {report['n_patients']:,} patients, {report['n_readable']:,} readable "
        f"({report['films_per_second']:.0f} films/s)"
    ]
    lines += [f"{item['severity']:>7}: {item['title']}" for item in report["findings"]]
    return "\n".join(lines)


def examine(films: FilmList, *, workers: int, scratch: Path) -> Evidence:
    """Read every film and find those that are one picture; thumbnails lie in a nameless file in `scratch`."""
    paths = films.path
    with tempfile.TemporaryFile(dir=scratch) as stream:
        thumbnails: npt.NDArray[np.uint8] = np.memmap(stream, np.uint8, "w+", shape=(len(paths), SIDE, SIDE))
        scan = scan_films(paths, thumbnails, workers=workers)
        exact = _equal_films(paths, scan)
        near = _alike_films(thumbnails, scan, exact, workers=workers)
    return Evidence(films, scan, exact, near)


def _equal_films(paths: Sequence[str], scan: Scan) -> list[list[int]]:
    """Groups of rows whose pixels are equal: of one key, and of the same bytes or the same pixels on decoding both."""
    rows = np.flatnonzero(scan.facts["readable"])
    pairs = []
    for group in same_key(scan.facts["picture"][rows].tolist()):
        unlike = [int(rows[place]) for place in group]
        # Of one key and not of the first one's pixels: such films may still be copies of each other.
        while len(unlike) > 1:
            first, *others = unlike
            same = {other for other in others if same_pixels(paths[first], paths[other])}
            pairs += [(first, other) for other in others if other in same]
            unlike = [other for other in others if other not in same]
    return connected(pairs)


def _alike_films(
    thumbnails: npt.NDArray[np.uint8], scan: Scan, exact: list[list[int]], *, workers: int
) -> list[tuple[list[int], float]]:
    """Groups of rows, one of each exact group, that show one picture; with their least correlation."""
    spare = {row for group in exact for row in group[1:]}
    rows = [int(row) for row in np.flatnonzero(scan.facts["readable"]) if row not in spare]
    whole = len(rows) == len(thumbnails)
    pairs = near_pairs(thumbnails if whole else thumbnails[rows], workers=workers)
    least: dict[int, float] = {}
    groups = connected([(rows[pair.first], rows[pair.second]) for pair in pairs])
    of_row = {row: number for number, group in enumerate(groups) for row in group}
    for pair in pairs:
        number = of_row[rows[pair.first]]
        least[number] = min(least.get(number, 1.0), pair.correlation)
    return [(group, least[number]) for number, group in enumerate(groups)]


def _report(
    evidence: Evidence,
    classes: Sequence[str],
    positive: str | None,
    found: Sequence[Finding],
    tried: Sequence[Nuisance],
    seconds: float,
) -> dict[str, Any]:
    films = evidence.films
    count_of = Counter(item.severity for item in found)
    return {
        "source": str(films.source),
        "n": len(films.path),
        "n_readable": len(evidence.readable),
        "n_patients": len(set(films.patient)),
        "patients_read_from": next(iter(films.readings)),
        "classes": list(classes),
        "positive_class": positive,
        "splits": {split or "(none)": counts for split, counts in counts_by_split(films, classes).items()},
        "errors": count_of[ERROR],
        "warnings": count_of[WARNING],
        "findings": [item.as_report() for item in found],
        "nuisances": [item.as_report() for item in tried],
        "seconds": round(seconds, 2),
        "films_per_second": round(len(films.path) / seconds, 1),
    }


def _every_item(found: Sequence[Finding]) -> str:
    """findings.csv: kind,severity,item,path,detail; a row a film, `item` counting the groups of a finding."""
    rows = []
    for finding in found:
        for number, item in enumerate(finding.examples, start=1):
            rest = {name: value for name, value in item.items() if name not in ("path", "paths")}
            detail = "; ".join(f"{name}: {value}" for name, value in rest.items())
            for path in item.get("paths", [item.get("path", "")]):
                rows.append((finding.kind, finding.severity, number, path, detail))
    return pd.DataFrame(rows, columns=["kind", "severity", "item", "path", "detail"]).to_csv(index=False)


# --- manifest --------------------------------------------------------------------------------------------------

MANIFEST_COLUMNS = ("path", "label", "split", "patient_id", "age", "sex", "view")


def _write_manifest(films: FilmList, path: Path) -> None:
    """path,label,split,patient_id,age,sex,view: from the table where it has them, else from DICOM tags as hashes."""
    folder = path.resolve().parent
    columns = {"path": [os.path.relpath(item, folder) for item in films.path]}
    for name in MANIFEST_COLUMNS[1:]:
        columns[name] = films.table[name].tolist() if name in films.table.columns else [""] * len(films.path)
    key = dicom.pseudonym_key()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tags = pool.map(lambda item: _tags_or_none(item, key), films.path)
        for row, found in enumerate(tags):
            if found is not None:
                age = "" if found.age is None else f"{found.age:g}"
                for name, said in (("age", age), ("sex", found.sex), ("view", found.view)):
                    columns[name][row] = columns[name][row] or said
    write_text(path, pd.DataFrame(columns).to_csv(index=False))
    log.info("%s: %d films", path, len(films.path))


def _tags_or_none(path: str, key: bytes) -> dicom.DicomTags | None:
    if Path(path).suffix.lower() in IMAGE_SUFFIXES - dicom.SUFFIXES:
        return None
    try:
        return dicom.read_tags(path, key=key)
    except DataError:
        return None  # no DICOM, or among the unreadable films


# --- short form ------------------------------------------------------------------------------------------------


def say_briefly(manifest: Manifest, hashes: npt.NDArray[np.int64], *, source: str) -> None:
    """Log what `train` should know of its films without reading them again: copies, and what gives the class away.

    `hashes` (N,) are those of the files of `manifest`, row by row. Copies of other pixels take the whole audit.
    """
    table = manifest.table.reset_index(drop=True)
    said = list(_brief_remarks(table, manifest, hashes))
    for remark in said:
        log.warning("data: %s", remark)
    if said:
        log.warning("data: python main.py audit %s says more and shows the films", source)


def _brief_remarks(table: pd.DataFrame, manifest: Manifest, hashes: npt.NDArray[np.int64]) -> Iterable[str]:
    groups = list(same_key(hashes.tolist()))
    for column, what in (("split", "in different splits"), ("label", "with different labels")):
        values = table[column].tolist()
        if wrong := [rows for rows in groups if len({values[row] for row in rows}) > 1]:
            names = examples(Path(table["path"].iloc[row]).name for row in wrong[0])
            yield f"{some(len(wrong), 'group')} of identical files {what}, e.g. {names}"
    if groups:
        yield f"{some(len(groups), 'group')} of identical files in all"
    labels = table["label"].to_numpy(np.int64)
    columns = metadata_columns(table)
    tasks = {manifest.classes: labels}
    if manifest.multilabel:
        present_NC = findings.matrix(labels, len(manifest.classes))
        tasks = {(f"not {name}", name): present_NC[:, k] for k, name in enumerate(manifest.classes)}
    for classes, own in tasks.items():
        against = classes[1] if manifest.multilabel else None
        patients = list(table["patient_id"])
        for item in nuisances(columns, own, classes=classes, patients=patients, positive_class=against):
            if item.p_adjusted < ALPHA and item.auroc.ci_low >= CLEAR:
                yield f"{item.name} alone tells {item.positive_class} with AUROC {item.auroc.value:.2f}"
