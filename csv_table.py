"""CSV files that users write, read as text; whatever is wrong with one is a single line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd

from errors import DataError, first_line


def read_text_table(path: Path, *, what: str) -> pd.DataFrame:
    """The table as strings, empty cells as ''. DataError for a file that is missing, no CSV, not UTF-8 or ragged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig", skipinitialspace=True
            )
    except FileNotFoundError:
        raise DataError(f"{path}: no such {what}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; save it as CSV in UTF-8") from None
    except pd.errors.ParserWarning:
        raise DataError(
            f"{path}: rows have more fields than the header; remove trailing commas or quote them"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable CSV ({first_line(error)})") from None
    if len(table.columns) == 1 and any(mark in table.columns[0] for mark in ";\t"):
        raise DataError(f"{path}: one column {table.columns[0]!r}; separate the fields by commas")
    for name in table.columns:
        nul = table.index[table[name].str.contains("\0", regex=False)]
        if len(nul):
            raise DataError(f"{path}:{nul[0] + 2}: a NUL byte in column {name!r}; correct the row")
    return table
