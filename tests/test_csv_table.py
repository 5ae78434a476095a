"""csv_table.py: what is wrong with a table of the user is one line with file and line number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from csv_table import read_films, refuse_repeated, refuse_rows
from errors import DataError


def films_of(tmp_path: Path, text: str) -> list[dict[str, str]]:
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    return read_films(path, what="table", header="it needs path,label").to_dict("records")


def test_cells_are_text_and_blanks_around_names_are_cut_off(tmp_path: Path) -> None:
    found = films_of(tmp_path, "path,label,patient_id,age\n007.png, 1 ,p1 ,\n008.png,1,p1,034\n")
    assert found == [
        {"path": "007.png", "label": "1", "patient_id": "p1", "age": ""},
        {"path": "008.png", "label": "1", "patient_id": "p1", "age": "034"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,lable\na,b\n",
            r"t.csv: no column 'label'; did you mean 'lable'\?; it needs path,label \(found: path, la",
        ),
        ("path,label\n", "t.csv: the table has no rows"),
        ("path,label\na,x\n ,x\n ,x\n", r"t.csv:3: empty path \(2 such rows\); fill it in or delete the row"),
        ("path,label\na,x\nb, \n", "t.csv:3: empty label; fill it in"),
        ("path,label\na,x\nb,\0\n", "t.csv:3: a NUL byte in column 'label'; correct the row"),
        ("path;label\na;x\n", "t.csv: one column 'path;label'; separate the fields by commas"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        films_of(tmp_path, text)


def test_a_film_in_two_rows_is_refused_at_the_second(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("path,label\na,x\nb,x\na,y\n")
    table = read_films(path, what="table", header="")
    with pytest.raises(DataError, match="t.csv:4: a is listed twice; keep one row a film"):
        refuse_repeated(table["path"], where=path)
    refuse_repeated(table["path"][:2], where=path)


def test_no_bad_row_is_no_error() -> None:
    refuse_rows(np.zeros(3, dtype=bool), "never", "never", where="t.csv")
