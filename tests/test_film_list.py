"""Folders and tables are read whatever is wrong with them, and what is wrong is taken down."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import DataError
from film_list import list_films


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def csv(folder: Path, *lines: str) -> Path:
    path = folder / "m.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_folders_give_split_and_class(tmp_path: Path) -> None:
    touch(tmp_path, "train/A/1.png", "train/B/deep/2.png", "test/A/3.jpg", "train/A/notes.txt", "train/A/.hidden.png")
    films = list_films(tmp_path)
    found = {(films.shown(row), films.split[row], films.label[row]) for row in range(3)}
    assert found == {
        ("train/A/1.png", "train", "A"),
        ("train/B/deep/2.png", "train", "B"),
        ("test/A/3.jpg", "test", "A"),
    }
    assert films.passed_over == ["train/A/notes.txt"]


def test_folders_without_splits_give_classes_alone(tmp_path: Path) -> None:
    touch(tmp_path, "A/1.png", "B/2.png", "3.png")
    films = list_films(tmp_path)
    assert films.split == ["", "", ""] and sorted(films.label) == ["", "A", "B"]


def test_a_table_is_read_although_rows_are_wrong(tmp_path: Path) -> None:
    path = csv(
        tmp_path, "path,label,split,patient_id", "a.png,A,train,p1", ",A,train,p2", "b.png,B,fold3,p3",
        "a.png,B,train,p1", "c.png,,test,p4",
    )  # fmt: skip
    films = list_films(path)
    assert [films.shown(row) for row in range(3)] == ["a.png", "b.png", "c.png"]
    assert films.split == ["train", "", "test"] and films.label == ["A", "B", ""]
    assert [where for where, _ in films.faults] == ["line 3", "line 4", "line 5"]
    assert "listed again with another label" in films.faults[2][1]


def test_published_names_are_read_both_ways(tmp_path: Path) -> None:
    touch(tmp_path, "train/P/person1_bacteria_2.jpeg", "test/P/person1_virus_9.jpeg", "test/N/NORMAL2-IM-7-1.jpeg")
    films = list_films(tmp_path)
    assert list(films.readings) == ["file names: number and subtype", "file names: number alone"]
    by_name = dict(zip((Path(path).name for path in films.path), films.readings["file names: number alone"]))
    assert by_name["person1_bacteria_2.jpeg"] == by_name["person1_virus_9.jpeg"] == "person1"
    assert len(set(films.patient)) == 3


def test_names_that_end_in_a_number_suggest_a_second_reading(tmp_path: Path) -> None:
    touch(tmp_path, *(f"A/anna_{number}.png" for number in range(3)), "A/bert-1.png")
    films = list_films(tmp_path)
    assert sorted(films.readings["file names up to their last number"]) == ["anna", "anna", "anna", "bert"]


def test_one_name_for_all_films_is_no_reading(tmp_path: Path) -> None:
    touch(tmp_path, *(f"A/film_{number}.png" for number in range(60)))
    assert list(list_films(tmp_path).readings) == ["every film its own patient"]


def test_the_column_and_the_configured_pattern_come_first(tmp_path: Path) -> None:
    path = csv(tmp_path, "path,label,patient_id", "person1_virus_1.png,A,x", "person1_virus_2.png,A,")
    assert list_films(path).patient == ["x", "person1_virus"]
    touch(tmp_path / "d", "A/k7_1.png", "A/k7_2.png")
    films = list_films(tmp_path / "d", patient_pattern=r"^(k\d+)_")
    assert films.patient == ["k7", "k7"] and next(iter(films.readings)) == "data.patient_id_regex"


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["film,label", "a.png,A"], "no column 'path'"),
        (["path,label"], "no films; expected"),
    ],
)
def test_a_table_with_nothing_to_judge_is_an_error(lines: list[str], match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        list_films(csv(tmp_path, *lines))


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or CSV"):
        list_films(tmp_path / "gone")
    with pytest.raises(DataError, match="no films; expected"):
        list_films(tmp_path)


def test_a_single_film_is_no_table(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    with pytest.raises(DataError, match="1.png: is a single film; name its folder"):
        list_films(tmp_path / "1.png")
    with pytest.raises(DataError, match="no such folder or CSV"):
        list_films(tmp_path / "2.png")
