"""CSV files that users write, read as text; whatever is wrong with one is a single line."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from errors import DataError, first_line, nearest


def read_text_table(path: Path, *, what: str) -> pd.DataFrame:
    """The table as strings, empty cells as ''. DataError for a file that is missing, no CSV, not UTF-8 or ragged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig", skipinitialspace=True
            )
    except FileNotFoundError:
        raise DataError(f"{path}: no such {what}; check the name, and the folder you are in") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, not a CSV; name the {what} in it") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{path}: not a readable CSV (it is empty); begin with a line that names its columns") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; save it as CSV in UTF-8") from None
    except pd.errors.ParserWarning:
        raise DataError(
            f"{path}: rows have more fields than the header; remove trailing commas or quote them"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable CSV ({first_line(error)}); save it as CSV in UTF-8") from None
    if len(table.columns) == 1 and any(mark in table.columns[0] for mark in ";\t"):
        raise DataError(f"{path}: one column {table.columns[0]!r}; separate the fields by commas")
    for name in table.columns:
        nul = table[name].str.contains("\0", regex=False)
        refuse_rows(nul, f"a NUL byte in column {name!r}", "correct the row", where=path)
    return table


def read_films(
    path: Path,
    *,
    what: str,
    header: str,
    filled: Sequence[str] = ("path", "label"),
    needed: Sequence[str] = ("path", "label"),
) -> pd.DataFrame:
    """A table of films: `path` and `label` in every row, blanks around label, split and patient_id cut off.

    `header` says in an error which columns such a table has, `needed` which it must have, `filled` which cells must not
    be empty. DataError as of `read_text_table`, and for a missing column, no rows, and a row without path or label.
    """
    table = read_text_table(path, what=what)
    require_columns(table, needed, header, where=path)
    if table.empty:
        raise DataError(f"{path}: the {what} has no rows; add one for each film")
    for column in ("label", "split", "patient_id"):
        if column in table.columns:
            table[column] = table[column].str.strip()
    for column in filled:
        refuse_rows(table[column].str.strip() == "", f"empty {column}", "fill it in or delete the row", where=path)
    return table


def require_columns(table: pd.DataFrame, needed: Sequence[str], header: str, *, where: Path) -> None:
    """DataError naming the first of the `needed` columns that is missing, and those there are."""
    for name in needed:
        if name not in table.columns:
            raise DataError(
                f"{where}: no column {name!r}{nearest(name, table.columns)}; {header} "
                f"(found: {', '.join(table.columns)})"
            )


def refuse_repeated(paths: pd.Series, *, where: Path) -> None:
    """DataError when a film stands in two rows."""
    repeated = paths[paths.duplicated()]
    if len(repeated):
        raise DataError(f"{where}:{repeated.index[0] + 2}: {repeated.iloc[0]} is listed twice; keep one row a film")


def refuse_rows(bad: pd.Series | npt.NDArray[np.bool_], found: str, remedy: str, *, where: str | Path) -> None:
    """DataError naming the first line of `bad` (N,), if there is one."""
    rows = np.flatnonzero(bad)
    if rows.size:
        count = f" ({rows.size} such rows)" if rows.size > 1 else ""
        raise DataError(f"{where}:{rows[0] + 2}: {found}{count}; {remedy}")
