"""dicom.py: the tags that matter come out pseudonymised, group films by patient, and name nobody anywhere."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

import dicom
import synthetic
from config import DataConfig, resolve
from data_preprocessing import load_manifest
from dicom import read_tags
from errors import ConfigError, DataError
from tests.test_dicom import BORN, DEEP, FILM, KEY, NAME, PATIENT, film

# --- tags ------------------------------------------------------------------------------------------------------


def test_tags_are_read_and_name_nobody() -> None:
    data = film(
        DEEP,
        bits=12,
        PatientAge="045Y",
        ViewPosition="PA",
        BodyPartExamined="CHEST",
        ImageLaterality="U",
        InstitutionName="Charité",
    )
    tags = read_tags(data, key=KEY)
    assert (tags.view, tags.age, tags.sex, tags.modality, tags.body_part) == ("PA", 45.0, "F", "CR", "CHEST")
    assert (tags.laterality, tags.photometric, tags.rows, tags.columns, tags.bits_stored) == (
        "U",
        "MONOCHROME2",
        40,
        36,
        12,
    )
    assert not any(word in repr(tags) for word in (NAME, PATIENT, BORN, "1.2.3.4", "Charité"))


def test_pseudonyms_hang_on_the_key_and_tell_patients_apart() -> None:
    def patient(key: bytes, **tags: Any) -> str:
        return read_tags(film(FILM, **tags), key=key).patient_id

    assert patient(KEY) == patient(KEY, StudyInstanceUID="1.9", PatientName="Other^Name")
    assert patient(KEY) != patient(b"x" * 32)
    assert patient(KEY) != patient(KEY, PatientID="MRN-4711-0816")
    assert patient(KEY) != patient(KEY, IssuerOfPatientID="elsewhere")


@pytest.mark.parametrize("placeholder", ["", "ANONYMOUS", "Anonymized", "XX", "0000", "unknown"])
def test_a_placeholder_is_no_patient_the_study_stands_in(placeholder: str) -> None:
    def tags(study: str) -> dicom.DicomTags:
        return read_tags(film(FILM, PatientID=placeholder, StudyInstanceUID=study), key=KEY)

    assert tags("1.2.3").patient_id == tags("1.2.3").study_id != ""
    assert tags("1.2.3").patient_id != tags("1.2.4").patient_id


@pytest.mark.parametrize(
    ("tags", "age"),
    [
        ({"PatientAge": "045Y"}, 45),
        ({"PatientAge": "62"}, 62),
        ({"PatientAge": "018M"}, 1.5),
        ({"PatientAge": "026W"}, 0.5),
        ({"PatientAge": "010D"}, 0.03),
        ({"PatientAge": "097Y"}, 90),
        ({"PatientAge": "999Y"}, None),
        ({"PatientAge": "old"}, 60),
        ({}, 60),
        ({"PatientBirthDate": "1964.08.13"}, 59),
        ({"PatientBirthDate": "20300101"}, None),
        ({"PatientBirthDate": "19649912"}, None),
        ({"PatientBirthDate": None}, None),
    ],
)
def test_age_comes_from_the_tag_or_from_the_dates(tags: dict[str, Any], age: float | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = film(FILM, **tags)
    assert read_tags(data, key=KEY).age == age


@pytest.mark.parametrize(
    ("tags", "view"),
    [
        ({"ViewPosition": "AP"}, "AP"),
        ({"ViewPosition": "LL"}, "LATERAL"),
        ({"ViewPosition": "LATERAL"}, "LATERAL"),
        ({"SeriesDescription": "view: PA"}, "PA"),
        ({"SeriesDescription": "Thorax p.a. Erika"}, "PA"),
        ({"SeriesDescription": "MAP of Paris"}, ""),
        ({}, ""),
    ],
)
def test_view_comes_from_position_or_description_as_one_of_three_words(tags: dict[str, Any], view: str) -> None:
    assert read_tags(film(FILM, **tags), key=KEY).view == view


def test_view_comes_from_its_code() -> None:
    code = Dataset()
    code.CodeMeaning = "postero-anterior"
    assert read_tags(film(FILM, ViewCodeSequence=Sequence([code])), key=KEY).view == "PA"


def test_text_typed_into_a_code_does_not_come_out() -> None:
    tags = read_tags(film(FILM, BodyPartExamined="ERIKA M", Modality="ERIKA", PatientSex="X"), key=KEY)
    assert (tags.body_part, tags.modality, tags.sex) == ("", "", "")


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG" + bytes(200)])
def test_a_file_without_tags_is_said_to_have_none(data: bytes) -> None:
    with pytest.raises(DataError, match="not a DICOM file"):
        read_tags(data, key=KEY)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.dcm: cannot be read"):
        read_tags(tmp_path / "none.dcm", key=KEY)


def test_the_key_is_made_once_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDIMG_PSEUDONYM_KEY", raising=False)
    key = dicom.pseudonym_key(tmp_path / "new")
    path = tmp_path / "new" / "pseudonym.key"
    assert len(key) == 32 and dicom.pseudonym_key(tmp_path / "new") == key != dicom.pseudonym_key(tmp_path / "other")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("not hex")
    with pytest.raises(DataError, match="not a key"):
        dicom.pseudonym_key(tmp_path / "new")


def test_the_environment_gives_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIMG_PSEUDONYM_KEY", "correct horse battery staple")
    key = dicom.pseudonym_key(tmp_path)
    assert len(key) == 32 and not list(tmp_path.iterdir())
    monkeypatch.setenv("MEDIMG_PSEUDONYM_KEY", "short")
    with pytest.raises(DataError, match="less than 16 characters"):
        dicom.pseudonym_key(tmp_path)


# --- the whole way ---------------------------------------------------------------------------------------------


def write_dicom_films(folder: Path, *, patients: int = 8) -> None:
    """Class folders of two films a patient, under names that do not tell the patient."""
    for split in ("train", "test"):
        for name in ("NORMAL", "PNEUMONIA"):
            (folder / split / name).mkdir(parents=True)
            for number in range(patients):
                for view in range(2):
                    seed = 1000 * len(split) + 100 * len(name) + 2 * number + view
                    pixels = synthetic.film(pneumonia=name == "PNEUMONIA", seed=seed, size=32).astype(np.uint16) * 16
                    data = film(
                        4095 - pixels,
                        bits=12,
                        PhotometricInterpretation="MONOCHROME1",
                        PatientID=f"{PATIENT}-{split}-{name}-{number}",
                        BodyPartExamined="CHEST",
                        WindowCenter=2048,
                        WindowWidth=4096,
                    )
                    (folder / split / name / f"IM{number:03d}{view}.{'dcm' if view else '00001'}").write_bytes(data)


@pytest.fixture(scope="module")
def dicom_films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dicom_films")
    write_dicom_films(folder)
    return folder


def test_films_of_one_patient_are_grouped_by_the_tags(dicom_films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIMG_PSEUDONYM_KEY", "a key for this test only")
    table = load_manifest(DataConfig(data_dir=str(dicom_films))).table
    assert len(table) == 64 and table["patient_id"].nunique() == 32
    assert (table.groupby("patient_id").size() == 2).all()
    assert not table["patient_id"].str.contains("MRN").any()


def test_a_regex_and_a_manifest_go_before_the_tags(dicom_films: Path, tmp_path: Path) -> None:
    by_name = load_manifest(DataConfig(data_dir=str(dicom_films), patient_id_regex=r"IM(\d{3})")).table
    assert set(by_name["patient_id"]) == {f"{number:03d}" for number in range(8)}
    rows = [f"{path},{label},p{row}" for row, (path, label) in enumerate(zip(by_name["path"], by_name["label"]))]
    (tmp_path / "films.csv").write_text("\n".join(["path,label,patient_id", *rows]))
    given = load_manifest(DataConfig(manifest=str(tmp_path / "films.csv"))).table
    assert list(given["patient_id"]) == [f"p{row}" for row in range(64)]


def test_a_directory_file_and_notes_are_no_films(dicom_films: Path, tmp_path: Path) -> None:
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "IM1").write_bytes(film(FILM))
        (tmp_path / name / "DICOMDIR").write_bytes(film(FILM))
        (tmp_path / name / "README").write_text("notes about these films, long enough to be looked at " * 5)
    assert [Path(path).name for path in load_manifest(DataConfig(data_dir=str(tmp_path))).table["path"]] == ["IM1"] * 2


@pytest.mark.slow
def test_nothing_that_names_a_patient_is_written_or_said(
    dicom_films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Train, evaluate and predict on DICOM with a damaged film among them; then search every byte left behind."""
    import main

    monkeypatch.setenv("MEDIMG_CACHE_DIR", str(tmp_path / "cache"))
    tiny = ["--device", "cpu", "--set", "model.hidden_features=16", "--set", "data.val_fraction=0.25"]
    run = ["train", "--data-dir", str(dicom_films), "--model", "test_efficientnet", "--no-pretrained", "--epochs", "1"]
    run += ["--image-size", "32", "--batch-size", "8", "--workers", "0", "--output-dir", str(tmp_path / "run"), *tiny]
    assert main.main(run) == 0
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "cut.dcm").write_bytes(film(FILM)[:-100])
    (broken / "hand.dcm").write_bytes(film(FILM, BodyPartExamined="HAND"))
    (broken / "good.dcm").write_bytes(film(FILM))
    best = str(tmp_path / "run" / "best_model.pth")
    assert (
        main.main(
            ["predict", str(broken), str(dicom_films), "--checkpoint", best, "--output-dir", str(tmp_path / "out")]
        )
        == 0
    )
    assert main.main(["evaluate", "--checkpoint", best, "--output-dir", str(tmp_path / "eval")]) == 0
    said = "".join(capfd.readouterr())
    assert "HAND, not chest" in said and "truncated" in said
    secrets = [NAME, "Mustermann", "Erika", PATIENT, BORN]
    assert not [word for word in secrets if word in said]
    files = [
        item for part in ("run", "cache", "out", "eval") for item in (tmp_path / part).rglob("*") if item.is_file()
    ]
    assert {".pth", ".npy", ".csv", ".json", ".html"} <= {item.suffix for item in files}
    found = [(item.name, word) for item in files for word in secrets if word.encode() in unpacked(item)]
    assert not found


def unpacked(path: Path) -> bytes:
    """A file's bytes, with those inside it where it is a zip archive, as checkpoints are."""
    import zipfile

    data = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            data += b"".join(archive.read(name) for name in archive.namelist())
    return data


@pytest.mark.parametrize("value", ["second", "0", "-1", "1.5"])
def test_a_window_that_is_none_of_those_known_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="data.dicom_window"):
        resolve({"data.dicom_window": value})


def test_window_and_body_part_can_be_set() -> None:
    config = resolve({"data.dicom_window": 2, "data.dicom_body_part": "hand"})
    assert (config.data.dicom_window, config.data.dicom_body_part) == ("2", "hand")
    with pytest.raises(ConfigError, match="data.dicom_body_part"):
        resolve({"data.dicom_body_part": " "})
