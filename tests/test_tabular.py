"""tabular: numbers standardised, words one-hot, missing a value of its own."""

from __future__ import annotations

import numpy as np
import pytest

from errors import DataError
from tabular import TableSpec, plain


def test_numbers_are_standardised_and_words_are_one_hot() -> None:
    spec = TableSpec.fit({"age": ["20", "40", "60", ""], "sex": ["F", "M", "F", "?"]})
    found = spec.encode({"age": ["40", "60", "nan"], "sex": ["M", "", "F"]}, count=3, where="t.csv")
    spread = np.std([20, 40, 60])
    expected = [[0, 0, 0, 1, 0], [20 / spread, 0, 0, 0, 1], [0, 1, 1, 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert spec.width == 5


def test_a_missing_column_is_missing_in_every_row() -> None:
    spec = TableSpec.fit({"age": ["20", "40"], "sex": ["F", "M"]})
    np.testing.assert_array_equal(spec.encode({}, count=2, where="t.csv"), np.stack([spec.missing()] * 2))


def test_an_outlier_is_cut_and_an_unseen_word_is_missing() -> None:
    spec = TableSpec.fit({"age": ["20", "40"], "sex": ["F", "M"]})
    found = spec.encode({"age": ["1e9"], "sex": ["X"]}, count=1, where="t.csv")[0]
    assert found.tolist() == [5.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("value", ["old", "1,5", "--", "inf"])
def test_a_word_among_numbers_names_its_row(value: str) -> None:
    spec = TableSpec.fit({"age": ["20", "40"]})
    with pytest.raises(DataError, match=r"t\.csv: age .* in row 2 is not a number"):
        spec.encode({"age": ["30", value]}, count=2, where="t.csv")


def test_a_column_without_values_is_an_error() -> None:
    with pytest.raises(DataError, match="column 'age' has no value"):
        TableSpec.fit({"age": ["", "?"]})


def test_a_constant_number_does_not_divide_by_zero() -> None:
    spec = TableSpec.fit({"age": ["30", "30"]})
    assert np.isfinite(spec.encode({"age": ["31"]}, count=1, where="")).all()


def test_the_state_is_plain_and_gives_the_same_vectors() -> None:
    spec = TableSpec.fit({"age": ["20", "40"], "sex": ["F", "M"]})
    again = TableSpec.from_state(spec.to_state())
    values = {"age": ["33"], "sex": ["M"]}
    assert again == spec
    np.testing.assert_array_equal(again.encode(values, count=1, where=""), spec.encode(values, count=1, where=""))


@pytest.mark.parametrize("value", [None, float("nan"), "", " N/A ", "unknown", "?"])
def test_what_says_nothing_is_missing(value: object) -> None:
    assert plain(value) == ""
