"""findings.py: label cells of several findings, and the bits they travel as."""

from __future__ import annotations

import numpy as np
import pytest

import findings

NAMES = ("effusion", "mass", "nodule")


@pytest.mark.parametrize("cell", ["", "none", "None", "No Finding", "no_finding", "NORMAL", " | "])
def test_words_for_no_finding_name_none(cell: str) -> None:
    assert findings.named(cell) == [] and not findings.is_contradictory(cell)


def test_findings_are_read_with_blanks_around_them() -> None:
    assert findings.named("mass | effusion") == ["mass", "effusion"]


@pytest.mark.parametrize("cell", ["No Finding|mass", "mass|none"])
def test_a_finding_beside_none_is_contradictory(cell: str) -> None:
    assert findings.is_contradictory(cell)


def test_a_trailing_separator_contradicts_nothing() -> None:
    assert not findings.is_contradictory("mass|") and findings.named("mass|") == ["mass"]


def test_bits_stand_for_findings_in_their_order_and_others_are_not_counted() -> None:
    codes = findings.encoded(["nodule|effusion", "hernia", "mass|mass", ""], NAMES)
    assert codes.tolist() == [5, 0, 2, 0]
    assert findings.matrix(codes, 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_all_findings_that_fit_come_back_as_they_were() -> None:
    names = [f"f{k}" for k in range(findings.MOST)]
    cells = ["|".join(names), names[-1], names[0]]
    rows = findings.matrix(findings.encoded(cells, names), len(names))
    assert [findings.written(row, names) for row in rows] == cells


def test_a_film_without_findings_is_written_as_such() -> None:
    assert findings.written([0, 0, 0], NAMES) == "No Finding"


def test_a_film_is_of_the_stratum_of_its_rarest_finding() -> None:
    cells = ["effusion"] * 6 + ["effusion|mass"] * 3 + [""] * 4 + ["effusion|nodule"]
    strata = findings.strata(findings.encoded(cells, NAMES), 3, least=3)
    # The nodule is of one film only: it joins the films without a finding.
    assert strata.tolist() == [0] * 6 + [1] * 3 + [3] * 4 + [3]


def test_strata_too_small_even_together_are_one() -> None:
    strata = findings.strata(findings.encoded(["effusion", "mass", "", "effusion"], NAMES), 3, least=3)
    assert len(set(strata.tolist())) == 1


POINTS = {
    "effusion": {"threshold": 0.5, "slope": 1.0, "intercept": 0.0},
    "mass": {"threshold": 0.1, "slope": 2.0, "intercept": -1.0},
}


def test_probabilities_are_sigmoids_by_themselves_also_of_extreme_logits() -> None:
    logits = np.array([[0.0, 0.5], [800.0, -900.0]], dtype=np.float32)
    p = findings.probabilities(logits, POINTS, NAMES[:2])
    assert p[0].tolist() == [0.5, 0.5] and p[1].tolist() == [1.0, 0.0]
    assert findings.probabilities(np.array([[1.0, 1.0]]), POINTS, NAMES[:2])[0] == pytest.approx(
        [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-1))]
    )


def test_the_leading_finding_stands_highest_above_its_own_threshold() -> None:
    thresholds = findings.thresholds(POINTS, NAMES[:2])
    p = np.array([[0.6, 0.3], [0.9, 0.12], [0.0, 1.0], [1.0, 0.0]])
    assert findings.leading(p, thresholds).tolist() == [1, 0, 1, 0]


def test_confidence_is_of_the_likeliest_finding_called_or_of_the_absence_of_all() -> None:
    assert findings.confidence(np.array([0.7, 0.2]), np.array([True, True])) == 0.7
    assert findings.confidence(np.array([0.3, 0.2]), np.array([False, False])) == pytest.approx(0.7)
    assert findings.confidence(np.array([0.8, 0.2]), np.array([False, True])) == 0.2
