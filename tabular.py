"""Columns of a manifest as numbers a network can read: standardised, one-hot, and 'missing' a value of its own.

    spec = TableSpec.fit({"age": ["63", ""], "sex": ["F", "M"]})
    vectors = spec.encode({"age": ["71", "?"], "sex": ["", "M"]}, where="cases.csv")

The specification is plain values and travels in the checkpoint. A category unseen in training counts as missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from errors import DataError

FloatArray = npt.NDArray[np.float32]

MOST_LEVELS = 20
"""Categories of a column that count; rarer ones are taken as missing."""
LIMIT = 5.0
"""Standardised values end here: an age of 2,000 must not decide by itself."""
MISSING = frozenset({"", "nan", "na", "n/a", "none", "null", "?", "unknown"})


@dataclass(frozen=True)
class Column:
    """How one column is read."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    levels: tuple[str, ...] = ()
    """Categories; none for numbers."""

    @property
    def width(self) -> int:
        """Numbers that it becomes: its value or levels, and whether it is missing."""
        return (len(self.levels) or 1) + 1

    def encode(self, values: Sequence[Any], *, where: str) -> FloatArray:
        """(N, width); DataError for a value of a numeric column that is no number."""
        rows = np.zeros((len(values), self.width), dtype=np.float32)
        for row, value in enumerate(values):
            text = plain(value)
            if self.levels:
                rows[row, self.levels.index(text) if text in self.levels else -1] = 1
            elif text:
                rows[row, 0] = np.clip((_number(text, self.name, row, where) - self.mean) / self.std, -LIMIT, LIMIT)
            else:
                rows[row, -1] = 1
        return rows


@dataclass(frozen=True)
class TableSpec:
    """The columns a model reads, in order."""

    columns: tuple[Column, ...]

    @property
    def width(self) -> int:
        """Length of a row's vector."""
        return sum(column.width for column in self.columns)

    @classmethod
    def fit(cls, table: Mapping[str, Sequence[Any]]) -> TableSpec:
        """Numbers where every value given is one, else categories; DataError for a column without a value."""
        return cls(tuple(_fitted(name, [plain(value) for value in values]) for name, values in table.items()))

    def encode(self, table: Mapping[str, Sequence[Any]], *, count: int, where: str) -> FloatArray:
        """(count, width); a column that `table` lacks is missing in every row."""
        absent = [""] * count
        parts = [column.encode(list(table.get(column.name, absent)), where=where) for column in self.columns]
        return np.concatenate(parts, axis=1) if parts else np.zeros((count, 0), dtype=np.float32)

    def missing(self) -> FloatArray:
        """(width,): the vector of a row that gives nothing."""
        return self.encode({}, count=1, where="")[0]

    def to_state(self) -> list[dict[str, Any]]:
        """Plain values, for the checkpoint."""
        return [{**vars(column), "levels": list(column.levels)} for column in self.columns]

    @classmethod
    def from_state(cls, state: Sequence[Mapping[str, Any]]) -> TableSpec:
        """What `to_state` stored."""
        return cls(tuple(Column(**{**item, "levels": tuple(item["levels"])}) for item in state))


def plain(value: Any) -> str:
    """A cell as text; '' where it says nothing."""
    text = "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()
    return "" if text.lower() in MISSING else text


def _fitted(name: str, values: Sequence[str]) -> Column:
    given = [value for value in values if value]
    if not given:
        raise DataError(f"column {name!r} has no value in the training rows; drop it from --columns")
    numbers = [_as_number(value) for value in given]
    if None not in numbers:
        array = np.array(numbers, dtype=np.float64)
        return Column(name, mean=float(array.mean()), std=float(array.std()) or 1.0)
    counted = Counter(given)
    return Column(name, levels=tuple(sorted(level for level, _ in counted.most_common(MOST_LEVELS))))


def _as_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _number(text: str, name: str, row: int, where: str) -> float:
    value = _as_number(text)
    if value is None:
        raise DataError(f"{where}: {name} {text!r} in row {row + 1} is not a number; correct it or leave it empty")
    return value
