"""The audit finds what was planted and little else, says it in files, and its exit code tells whether it is grave."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import audit
import main
import synthetic
from data_preprocessing import Manifest
from errors import ConfigError, DataError
from tests.planted import Planted, encoded, pairs, plant, recall_and_precision


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    films = [synthetic.film(pneumonia=bool(seed % 2), seed=seed, size=160) for seed in range(130)]
    return plant(tmp_path_factory.mktemp("planted"), films)


@pytest.fixture(scope="module")
def folder(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an audit of the planted set."""
    folder = tmp_path_factory.mktemp("audit")
    audit.audit(planted.manifest, output_dir=folder, write_manifest=folder / "out.csv")
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


def findings(report: dict, kind: str, **facts: object) -> list[dict]:
    return [
        item
        for item in report["findings"]
        if item["kind"] == kind and all(item.get(name) == value for name, value in facts.items())
    ]


def write_films(folder: Path, names: list[str], *, size: int = 64) -> None:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Films of another size are other films, not the same ones drawn anew.
        path.write_bytes(encoded(synthetic.film(pneumonia=bool(seed % 2), seed=100 * size + seed, size=size)))


# --- the planted set -------------------------------------------------------------------------------------------


def test_copies_are_found_however_they_were_changed(report: dict, planted: Planted) -> None:
    found = pairs(report, "exact_duplicate", "near_duplicate")
    recall, precision = recall_and_precision(found, planted.copies | planted.conflicts)
    assert recall >= 0.95 and precision >= 0.99


def test_copies_across_splits_are_errors_and_within_a_split_warnings(report: dict, planted: Planted) -> None:
    for severity, across in (("error", True), ("warning", False)):
        items = [
            item
            for kind in ("exact_duplicate", "near_duplicate")
            for finding in findings(report, kind, severity=severity)
            for item in finding["examples"]
        ]
        assert items and all((len(set(item["splits"])) > 1) == across for item in items)


def test_leaking_patients_are_found_and_no_other(report: dict, planted: Planted) -> None:
    (finding,) = findings(report, "patient_leak", severity="error")
    found = {item["patient"] for item in finding["examples"]}
    assert recall_and_precision(found, planted.leaking) == (1, 1) and finding["count"] == 20


def test_pictures_with_two_labels_are_found_and_no_other(report: dict, planted: Planted) -> None:
    (finding,) = findings(report, "label_conflict", scope="picture")
    found = {frozenset(item["paths"]) for item in finding["examples"]}
    recall, precision = recall_and_precision(found, planted.conflicts)
    assert recall >= 0.95 and precision >= 0.99 and finding["severity"] == "error"


def test_corrupt_files_are_found_by_kind_and_no_other(report: dict, planted: Planted) -> None:
    (finding,) = findings(report, "unreadable")
    assert {item["path"] for item in finding["examples"]} == planted.corrupt
    assert finding["reasons"] == {"empty": 5, "truncated": 5, "non_image": 5}


def test_pixels_stored_in_another_format_are_the_same_pixels(report: dict, planted: Planted) -> None:
    assert pairs(report, "exact_duplicate") == planted.conflicts


# --- files and exit codes --------------------------------------------------------------------------------------


def test_every_finding_has_the_documented_fields(report: dict) -> None:
    assert report["errors"] == sum(item["severity"] == "error" for item in report["findings"]) >= 4
    for item in report["findings"]:
        assert item["severity"] in ("error", "warning", "info") and item["remedy"] and item["count"] >= 0
        assert isinstance(item["examples"], list)
    ranks = [("error", "warning", "info").index(item["severity"]) for item in report["findings"]]
    assert ranks == sorted(ranks)


def test_the_page_stands_alone_and_shows_the_films(folder: Path, report: dict) -> None:
    page = (folder / "audit.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") > 10 and "http" not in page
    for item in report["findings"]:
        assert item["title"].split("'")[0][:30].replace("&", "&amp;") in page


def test_the_list_of_items_has_a_row_a_film(folder: Path, report: dict) -> None:
    with (folder / "findings.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert sum(row["kind"] == "unreadable" for row in rows) == 15
    assert sum(row["kind"] == "patient_leak" for row in rows) == 40


def test_the_manifest_written_is_the_one_read(folder: Path, planted: Planted) -> None:
    written = pd.read_csv(folder / "out.csv", dtype=str, keep_default_na=False)
    given = pd.read_csv(planted.manifest, dtype=str)
    assert list(written.columns) == ["path", "label", "split", "patient_id", "age", "sex", "view"]
    assert [(folder / path).resolve().name for path in written["path"]] == list(given["path"])
    assert (written[["label", "split", "patient_id"]] == given[["label", "split", "patient_id"]]).all().all()


def test_nothing_is_left_in_the_folder_but_the_results(folder: Path) -> None:
    assert {item.name for item in folder.iterdir()} == {"audit.json", "audit.html", "findings.csv", "out.csv"}


def test_grave_findings_exit_with_3_and_json_goes_to_stdout(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_films(
        tmp_path / "films", [f"{split}/A/{split}{number}.jpg" for split in ("train", "test") for number in (1, 2)]
    )
    write_films(tmp_path / "films", ["train/B/b.jpg", "test/B/c.jpg"], size=80)
    words = ["audit", str(tmp_path / "films"), "--output-dir", str(tmp_path / "out"), "--json", "--quiet"]
    code = main.main(words)
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["errors"] == 0
    (tmp_path / "films" / "train" / "B" / "bad.jpg").write_bytes(b"")
    assert main.main(words) == 3
    assert json.loads(capsys.readouterr().out)["findings"][0]["kind"] == "unreadable"


def test_sound_films_exit_with_0_and_say_a_line(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["audit", "--data-dir", str(films), "--output-dir", str(tmp_path / "out"), "--workers", "1"]) in (
        0,
        3,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("136 films of 68 patients, 136 readable") and "audit.html" in lines[-2]
    assert lines[-1].startswith("next: ") and lines[-1].endswith(f"python main.py train --data-dir {films}")


def test_nothing_to_audit_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["audit", str(tmp_path / "gone"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "no such folder or CSV" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said_before_the_work(planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        audit.audit(planted.manifest, output_dir=tmp_path / "file" / "out")


def test_an_unknown_column_is_still_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("film,label\na.png,A\n", encoding="utf-8")
    with pytest.raises(DataError, match="no column 'path'"):
        audit.audit(tmp_path / "m.csv", output_dir=tmp_path / "out")


# --- single findings -------------------------------------------------------------------------------------------


def test_subtype_and_number_are_one_reading_and_the_number_alone_another(tmp_path: Path) -> None:
    names = ["train/P/person1_bacteria_1.jpg", "test/P/person1_virus_2.jpg", "train/P/person2_virus_3.jpg",
             "test/P/person2_virus_4.jpg", "train/N/IM-1-1.jpg", "test/N/IM-2-1.jpg"]  # fmt: skip
    write_films(tmp_path, names)
    report = audit.audit(tmp_path, output_dir=tmp_path / "out")
    sure, maybe = findings(report, "patient_leak")
    assert sure["severity"] == "error" and [item["patient"] for item in sure["examples"]] == ["person2_virus"]
    assert maybe["severity"] == "warning" and maybe["reading"] == "file names: number alone"
    assert {item["patient"] for item in maybe["examples"]} == {"person1", "person2"}


def test_balance_validation_and_prevalence_are_judged_by_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for split, normal, ill in (("train", 180, 20), ("val", 5, 5), ("test", 30, 70)):
        for number in range(normal + ill):
            name = f"{split}{number}.png"
            Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(tmp_path / name)
            rows.append({"path": name, "label": "ILL" if number >= normal else "NORMAL", "split": split})
    pd.DataFrame(rows).to_csv(tmp_path / "m.csv", index=False)
    report = audit.audit(tmp_path / "m.csv", output_dir=tmp_path / "out")
    assert findings(report, "small_validation")[0]["films"] == {"ILL": 5, "NORMAL": 5}
    assert findings(report, "class_imbalance")[0]["severity"] == "info"
    shift = findings(report, "prevalence_shift")[0]["difference"]
    assert shift["value"] == pytest.approx(0.1 - 0.7) and shift["ci_high"] < 0


def test_an_acquisition_that_gives_the_label_away_is_an_error(tmp_path: Path) -> None:
    rows = []
    for number in range(60):
        label = ("NORMAL", "ILL")[number % 2]
        side = 70 if label == "ILL" else 64
        film = synthetic.film(pneumonia=False, seed=number, size=side)
        Image.fromarray(film).save(tmp_path / f"{number}.png")
        rows.append(
            {"path": f"{number}.png", "label": label, "view": "PA", "site": "north" if number % 4 < 3 else "south"}
        )
    pd.DataFrame(rows).to_csv(tmp_path / "m.csv", index=False)
    report = audit.audit(tmp_path / "m.csv", output_dir=tmp_path / "out")
    found = {item["nuisance"]: item for item in findings(report, "shortcut")}
    assert found["width"]["severity"] == "error" and found["width"]["auroc"]["value"] == 1
    assert audit.exit_code(report) == 3 and "view" not in found


def test_films_that_stand_out_are_listed(tmp_path: Path) -> None:
    write_films(tmp_path, [f"A/{number}.jpg" for number in range(20)], size=120)
    write_films(tmp_path, [f"B/{number}.jpg" for number in range(20, 40)], size=124)
    grey = np.array(Image.open(tmp_path / "A" / "3.jpg"))
    Image.fromarray(np.full_like(grey, 3)).save(tmp_path / "A" / "blank.png")
    Image.fromarray(grey[:40]).save(tmp_path / "A" / "wide.png")
    Image.fromarray(np.stack([grey, grey // 2, grey // 3], axis=2)).save(tmp_path / "B" / "colour.png")
    Image.fromarray(grey.astype(np.uint16) * 200).save(tmp_path / "B" / "deep.png")
    report = audit.audit(tmp_path, output_dir=tmp_path / "out")
    for kind, name in (
        ("blank", "A/blank.png"),
        ("aspect", "A/wide.png"),
        ("colour_mode", "B/colour.png"),
        ("bit_depth", "B/deep.png"),
    ):
        (finding,) = findings(report, kind)
        assert [item["path"] for item in finding["examples"]] == [name]


def test_films_without_labels_are_audited_for_what_can_be_told(tmp_path: Path) -> None:
    write_films(tmp_path, ["a.jpg", "b.jpg"])
    report = audit.audit(tmp_path, output_dir=tmp_path / "out")
    assert findings(report, "unlabelled")[0]["severity"] == "info" and report["classes"] == []
    assert report["errors"] == 0


def test_one_class_alone_is_an_error(tmp_path: Path) -> None:
    write_films(tmp_path, ["A/a.jpg", "A/b.jpg"])
    report = audit.audit(tmp_path, output_dir=tmp_path / "out")
    assert findings(report, "class_imbalance")[0]["severity"] == "error"


def test_notes_that_name_the_diagnosis_are_an_error(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        label = ("OTHER", "COVID-19")[number % 2]
        write_films(tmp_path, [f"{number}.jpg"], size=32 + number)
        note = "PCR positive for covid19, cough" if label == "COVID-19" and number % 3 else "cough and fever"
        rows.append({"path": f"{number}.jpg", "label": label, "text": note})
    pd.DataFrame(rows).to_csv(tmp_path / "m.csv", index=False)
    (finding,) = findings(audit.audit(tmp_path / "m.csv", output_dir=tmp_path / "out"), "text_leak")
    named = [row for row in rows if "covid" in row["text"]]
    assert finding["severity"] == "error" and finding["count"] == len(named)
    assert {item["nuisance"] for item in finding["words"]} >= {"names COVID-19", "pcr", "covid19"}


# --- short form ------------------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the short form says, line by line."""
    lines: list[str] = []
    monkeypatch.setattr(audit.log, "warning", lambda form, *values: lines.append(form % values))
    return lines


def test_the_short_form_names_copies_and_columns_that_tell(said: list[str], tmp_path: Path) -> None:
    n = 80
    table = pd.DataFrame(
        {
            "path": [str(tmp_path / f"{row}.png") for row in range(n)],
            "label": [row % 2 for row in range(n)],
            "split": ["test" if row % 5 == 0 else "train" for row in range(n)],
            "patient_id": [f"p{row}" for row in range(n)],
            "view": ["AP" if row % 2 else "PA" for row in range(n)],
        }
    )
    hashes = np.arange(n)
    hashes[1] = hashes[5] = 0  # copies in train and test, of both labels
    audit.say_briefly(Manifest(table, ("A", "B"), tmp_path), hashes, source="films/m.csv")
    text = " | ".join(said)
    assert "1 group of identical files in different splits" in text and "with different labels" in text
    assert "view alone tells" in text and "AUROC 1.00" in text and "python main.py audit films/m.csv" in text


def test_the_short_form_is_silent_where_all_is_well(said: list[str], tmp_path: Path) -> None:
    table = pd.DataFrame({"path": ["a", "b"], "label": [0, 1], "split": "train", "patient_id": ["p", "q"]})
    audit.say_briefly(Manifest(table, ("A", "B"), tmp_path), np.array([1, 2]), source="films")
    assert said == []


# --- labels as training reads them -----------------------------------------------------------------------------


def test_of_several_findings_an_empty_label_is_none_and_their_order_says_nothing(tmp_path: Path) -> None:
    labels = ["Effusion|Mass", "Mass|Effusion", "Mass", "", "none", "No Finding"]
    names = [f"{number}.png" for number in range(len(labels))]
    write_films(tmp_path, names)
    pd.DataFrame({"path": names, "label": labels}).to_csv(tmp_path / "films.csv", index=False)
    found = audit.audit(tmp_path / "films.csv", {"data.task": "multilabel"}, output_dir=tmp_path / "out")
    assert set(found["classes"]) == {"Effusion|Mass", "Mass", "No Finding"} and not findings(found, "unlabelled")
    (empty,) = findings(audit.audit(tmp_path / "films.csv", output_dir=tmp_path / "single"), "unlabelled")
    assert empty["count"] == 1 and empty["severity"] == "error"


def test_a_class_read_from_the_names_is_the_audits_class_too(tmp_path: Path) -> None:
    write_films(tmp_path / "films", ["a_virus_1.png", "b_virus_2.png", "IM-1.png", "strange.png"])
    pattern = {"data.label_regex": r"(?P<virus>_virus_)|(?P<normal>IM-)"}
    found = audit.audit(tmp_path / "films", pattern, output_dir=tmp_path / "out")
    assert found["classes"] == ["normal", "virus"]
    (unnamed,) = findings(found, "unlabelled")
    assert [item["path"] for item in unnamed["examples"]] == ["strange.png"]
