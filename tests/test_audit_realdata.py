"""The audit on real films; skipped where MEDIMG_ASSETS is not set."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import audit
from film_facts import eight_bit_grey
from preprocess import decode
from tests.planted import pairs, plant, recall_and_precision
from tests.test_audit import findings

pytestmark = pytest.mark.realdata


@pytest.fixture(autouse=True)
def _own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIMG_PSEUDONYM_KEY", "a key for these tests alone")


@pytest.mark.slow
def test_the_published_films_hold_the_copies_their_bytes_show_and_no_leak(assets: Path, tmp_path: Path) -> None:
    source = assets / "data" / "chest_xray"
    report = audit.audit(source, output_dir=tmp_path)
    counts = Counter(hashlib.sha256(path.read_bytes()).digest() for path in source.rglob("*.jpeg"))
    same_bytes = sum(count > 1 for count in counts.values())
    assert len(pairs(report, "exact_duplicate")) >= same_bytes >= 26
    assert not findings(report, "near_duplicate"), "chest films are alike; none of these is a changed copy"
    assert report["errors"] == 0 and report["n"] == 5528 and report["n_patients"] == 3865
    (leak,) = findings(report, "patient_leak")
    assert leak["severity"] == "warning" and leak["reading"] == "file names: number alone"
    shift = findings(report, "prevalence_shift")[0]["difference"]
    assert shift["value"] == pytest.approx(3875 / 5216 - 195 / 312)


def test_view_and_label_are_seen_to_go_together(assets: Path, tmp_path: Path) -> None:
    source = assets / "data" / "nih_pneumonia" / "manifest.csv"
    report = audit.audit(source, {"data.positive_class": "PNEUMONIA"}, output_dir=tmp_path)
    view = next(item for item in findings(report, "shortcut") if item["nuisance"] == "view")
    table = pd.read_csv(source)
    shares = (table["view"] == "PA").groupby(table["label"]).mean()
    assert view["auroc"]["value"] == pytest.approx(0.5 + abs(shares["PNEUMONIA"] - shares["NORMAL"]) / 2)
    assert view["severity"] == "warning" and view["auroc"]["ci_low"] > 0.55


def test_notes_that_name_the_diagnosis_are_found_and_so_are_films_published_twice(assets: Path, tmp_path: Path) -> None:
    report = audit.audit(assets / "data" / "covid_notes" / "manifest.csv", output_dir=tmp_path)
    (leak,) = findings(report, "text_leak")
    table = pd.read_csv(assets / "data" / "covid_notes" / "manifest.csv")
    named = table["text"].str.lower().str.contains("covid") & (table["label"] == "COVID-19")
    assert leak["severity"] == "error" and leak["count"] == named.sum() > 20
    days = [pair for pair in pairs(report, "near_duplicate") if any("syndrome-ards-day" in path for path in pair)]
    assert len(days) == 3 and audit.exit_code(report) == 3


def test_dicom_variants_of_one_film_are_one_picture_and_tags_fill_the_manifest(assets: Path, tmp_path: Path) -> None:
    report = audit.audit(assets / "data" / "dicom", output_dir=tmp_path, write_manifest=tmp_path / "m.csv")
    lossless = {f"extremity_mono1_{kind}.dcm" for kind in ("j2kr", "jlsl", "jpll", "rle")}
    assert frozenset(lossless) in pairs(report, "exact_duplicate")
    table = pd.read_csv(tmp_path / "m.csv", dtype=str, keep_default_na=False).set_index("path")
    assert len(table) == report["n"] == 11
    same = {patient for path, patient in table["patient_id"].items() if Path(str(path)).name in lossless}
    assert len(same) == 1


def test_faults_planted_in_real_films_are_found(assets: Path, tmp_path: Path) -> None:
    paths = sorted((assets / "data" / "chest_xray").rglob("*.jpeg"))
    drawn = np.random.default_rng(3).permutation(len(paths))[:400]
    planted = plant(tmp_path / "films", [eight_bit_grey(decode(paths[row])) for row in drawn])
    report = audit.audit(planted.manifest, output_dir=tmp_path / "out")
    found = pairs(report, "exact_duplicate", "near_duplicate")
    recall, precision = recall_and_precision(found, planted.copies | planted.conflicts)
    assert recall >= 0.95 and precision >= 0.99
    (corrupt,) = findings(report, "unreadable")
    assert {item["path"] for item in corrupt["examples"]} == planted.corrupt
    (leak,) = findings(report, "patient_leak", severity="error")
    assert {item["patient"] for item in leak["examples"]} == planted.leaking
    conflicts = {
        frozenset(item["paths"]) for item in findings(report, "label_conflict", scope="picture")[0]["examples"]
    }
    assert recall_and_precision(conflicts, planted.conflicts) == (1, 1)
