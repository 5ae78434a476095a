"""The table of a reader study: read, checked, and turned into arrays with its design recognised.

One row per reading: reader, modality, case, truth (0/1), score. Never fills in a reading that was not made.

Axes: G a reading session (one reader with one modality), K cases, P positive and N negative cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from csv_table import read_text_table
from errors import ConfigError, DataError, examples, nearest

Array = NDArray[np.float64]

COLUMNS = ("reader", "modality", "case", "truth", "score")

FACTORIAL = "factorial"
CASES_IN_READERS = "cases nested in readers"
CASES_IN_MODALITIES = "cases nested in modalities"
CASES_IN_BOTH = "cases nested in readers and modalities"
READERS_IN_MODALITIES = "readers nested in modalities"
MIXED = "mixed"


# ---------------------------------------------------------------------------------------------------- the table


def load_table(path: str | Path, *, cluster: str | None = None) -> pd.DataFrame:
    """A reader study table from a CSV file: columns reader, modality, case, truth (0/1), score [, cluster].

    Identifiers are kept as text ("007" stays "007"). Raises DataError in one line for whatever `reader_study`
    could not use.
    """
    table = read_text_table(Path(path), what="reader study table")
    return clean_table(table, cluster=cluster, where=str(path))


def clean_table(table: pd.DataFrame, *, cluster: str | None, where: str) -> pd.DataFrame:
    """The needed columns with text identifiers, boolean truth and float scores, or a DataError."""
    if cluster in ("truth", "score", "reader", "modality", "case"):
        raise ConfigError(
            f"the cluster column (--cluster) cannot be {cluster!r}; name the column of the patient or slide"
        )
    wanted = [*COLUMNS, *([cluster] if cluster and cluster not in COLUMNS else [])]
    if missing := [name for name in wanted if name not in table.columns]:
        found = ", ".join(map(str, table.columns)) or "no columns"
        raise DataError(f"{where}: column {', '.join(missing)} missing; found {found}; rename or add it")
    if table.empty:
        raise DataError(f"{where}: no readings; the table needs one row per reader, modality and case")
    clean = table[wanted].reset_index(drop=True).copy()
    for name in wanted:
        if (empty := clean[name].isna() | (clean[name].astype(str).str.strip() == "")).any():
            _refuse_rows(where, empty, f"{name} is empty or NaN", "give the value or leave the row out")
    for name in set(wanted) - {"truth", "score"}:
        clean[name] = clean[name].map(_identifier)
    clean["truth"] = _binary_truth(clean["truth"], where)
    clean["score"] = _numeric_score(clean["score"], where)
    _check_consistency(clean, cluster=cluster, where=where)
    return clean


def _identifier(value: Any) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _refuse_rows(where: str, bad: pd.Series, found: str, remedy: str) -> None:
    rows = examples([int(row) + 1 for row in np.flatnonzero(bad)])
    raise DataError(f"{where}: data row {rows}: {found}; {remedy}")


def _binary_truth(column: pd.Series, where: str) -> pd.Series:
    number = pd.to_numeric(column.astype(str).str.strip().replace({"True": "1", "False": "0"}), errors="coerce")
    if (bad := ~number.isin([0, 1])).any():
        found = examples(sorted({repr(value) for value in column[bad].astype(str)}))
        _refuse_rows(where, bad, f"truth is {found}", "truth must be 0 (absent) or 1 (present)")
    return number == 1


def _numeric_score(column: pd.Series, where: str) -> pd.Series:
    score = pd.to_numeric(column, errors="coerce").astype(float)
    if (bad := score.isna()).any():
        found = examples(sorted({repr(str(value)) for value in column[bad]}))
        _refuse_rows(where, bad, f"score is {found}", "scores must be numbers; leave a reading not made out")
    return score


def _check_consistency(table: pd.DataFrame, *, cluster: str | None, where: str) -> None:
    if (repeated := table.duplicated(["reader", "modality", "case"])).any():
        _refuse_rows(where, repeated, "reader, modality and case repeat an earlier row", "keep one reading")
    truths = table.groupby("case")["truth"].nunique()
    if (torn := truths[truths > 1]).size:
        raise DataError(f"{where}: truth differs between rows of case {examples(torn.index)}; correct it")
    if cluster:
        clusters = table.groupby("case")[cluster].nunique()
        if (torn := clusters[clusters > 1]).size:
            raise DataError(f"{where}: case {examples(torn.index)} is in more than one {cluster}; correct it")


def _natural(names: Sequence[str]) -> list[str]:
    """Sorted as numbers where all are numbers ('2' before '10'), else as text."""
    try:
        return sorted(names, key=float)
    except ValueError:
        return sorted(names)


# ---------------------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Study:
    """One table turned into arrays; see the module docstring for the axes."""

    modalities: list[str]
    readers: list[str]
    cases: list[str]
    truth_K: NDArray[np.bool_]
    score_GK: Array
    """NaN where the session did not read the case."""
    modality_G: NDArray[np.intp]
    reader_G: NDArray[np.intp]
    cluster_K: NDArray[np.intp] | None
    design: str
    skipped: dict[str, tuple[int, int]] = field(default_factory=dict)
    """reader → (readings not made, readings the design expects), for readers who skipped any."""

    @property
    def sessions(self) -> list[tuple[str, str]]:
        return [(self.readers[j], self.modalities[i]) for j, i in zip(self.reader_G, self.modality_G)]

    @property
    def crossed(self) -> bool:
        """Whether every reader used every modality."""
        return len(self.reader_G) == len(self.readers) * len(self.modalities)


def build_study(table: pd.DataFrame, *, modalities: Sequence[str] | None, cluster: str | None) -> Study:
    names = _choose_modalities(table, modalities)
    table = table[table["modality"].isin(names)]
    readers, cases = _natural(list(table["reader"].unique())), _natural(list(table["case"].unique()))
    wide = table.pivot(index=["modality", "reader"], columns="case", values="score").reindex(columns=cases)
    order = sorted(wide.index, key=lambda pair: (names.index(pair[0]), readers.index(pair[1])))
    wide = wide.loc[order]
    truth = table.drop_duplicates("case").set_index("case")["truth"].reindex(cases).to_numpy(dtype=bool)
    codes = None
    if cluster:
        column = table.drop_duplicates("case").set_index("case")[cluster].reindex(cases)
        codes = pd.factorize(column)[0].astype(np.intp)
    modality_G = np.array([names.index(modality) for modality, _ in order], dtype=np.intp)
    reader_G = np.array([readers.index(reader) for _, reader in order], dtype=np.intp)
    score_GK = wide.to_numpy(dtype=float)
    design, expected_GK = _design(~np.isnan(score_GK), modality_G, reader_G)
    skipped = _skipped(~np.isnan(score_GK), expected_GK, reader_G, readers)
    return Study(names, readers, cases, truth, score_GK, modality_G, reader_G, codes, design, skipped)


def _choose_modalities(table: pd.DataFrame, modalities: Sequence[str] | None) -> list[str]:
    found = _natural(list(table["modality"].unique()))
    if modalities is None:
        if len(found) == 1:
            raise DataError(
                f"reader study: only modality {found[0]!r} in the table, so there is nothing to compare; add the "
                f"readings of another, or name it (--modalities {found[0]}) for its mean over readers alone"
            )
        return found
    chosen = [_identifier(name) for name in modalities]
    if unknown := [name for name in chosen if name not in found]:
        raise ConfigError(f"modality {unknown[0]!r} is not in the table{nearest(unknown[0], found)}; found {found}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(f"modalities {chosen} must name each modality once")
    return chosen


def _design(
    read_GK: NDArray[np.bool_], modality_G: NDArray[np.intp], reader_G: NDArray[np.intp]
) -> tuple[str, NDArray[np.bool_]]:
    """The design the case identifiers spell out, and the readings it expects.

    Nested cases are recognised as in MRMCaov: a case read by one reader only, or in one modality only.
    """
    by_reader = np.array([read_GK[reader_G == j].any(axis=0) for j in range(reader_G.max() + 1)])
    by_modality = np.array([read_GK[modality_G == i].any(axis=0) for i in range(modality_G.max() + 1)])
    in_readers = len(by_reader) > 1 and bool((by_reader.sum(axis=0) == 1).all())
    in_modalities = len(by_modality) > 1 and bool((by_modality.sum(axis=0) == 1).all())
    if len(reader_G) < len(by_reader) * len(by_modality):
        one_each = len(reader_G) == len(by_reader)
        return (READERS_IN_MODALITIES if one_each else MIXED), np.ones_like(read_GK)
    if in_readers and in_modalities:
        return CASES_IN_BOTH, read_GK
    if in_readers:
        return CASES_IN_READERS, by_reader[reader_G]
    if in_modalities:
        return CASES_IN_MODALITIES, by_modality[modality_G]
    return FACTORIAL, np.ones_like(read_GK)


def _skipped(
    read_GK: NDArray[np.bool_], expected_GK: NDArray[np.bool_], reader_G: NDArray[np.intp], readers: list[str]
) -> dict[str, tuple[int, int]]:
    lost_G, expected_G = (expected_GK & ~read_GK).sum(axis=1), expected_GK.sum(axis=1)
    counts = {
        name: (int(lost_G[reader_G == j].sum()), int(expected_G[reader_G == j].sum())) for j, name in enumerate(readers)
    }
    return {name: count for name, count in counts.items() if count[0]}


def require_both_classes(study: Study, outcome: str) -> None:
    """At least two readings of each class a session's outcome is made of; one leaves no variance."""
    for g, (reader, modality) in enumerate(study.sessions):
        read = ~np.isnan(study.score_GK[g])
        positive, negative = int((read & study.truth_K).sum()), int((read & ~study.truth_K).sum())
        needed = {"auc": min(positive, negative), "sensitivity": positive, "specificity": negative}[outcome]
        if needed < 2:
            raise DataError(
                f"reader study: reader {reader!r} with modality {modality!r} read {positive} positive and "
                f"{negative} negative cases; {outcome} needs at least 2 of each class it counts"
            )


@dataclass(frozen=True)
class Readings:
    """Positive and negative readings whose AUC is the outcome, session by session; NaN where unread."""

    outcome: str
    positive_GP: Array
    negative_GN: Array
    unit_P: NDArray[np.intp]
    unit_N: NDArray[np.intp]
    """The resampling unit (case or cluster) of each case; -1 for the stand-ins of `_against_a_constant`."""
    clustered: bool

    @property
    def units(self) -> int:
        return int(max(self.unit_P.max(), self.unit_N.max())) + 1

    @cached_property
    def read_GP(self) -> Array:
        return (~np.isnan(self.positive_GP)).astype(float)

    @cached_property
    def read_GN(self) -> Array:
        return (~np.isnan(self.negative_GN)).astype(float)

    @cached_property
    def wins_GP(self) -> Array:
        """Negatives each positive outranks, ties half; 0 where unread."""
        pairs = zip(self.positive_GP, self.negative_GN)
        return np.stack([_outranked(p, n) for p, n in pairs]) * self.read_GP

    @cached_property
    def wins_GN(self) -> Array:
        """Positives that outrank each negative, ties half; 0 where unread."""
        pairs = zip(-self.negative_GN, -self.positive_GP)
        return np.stack([_outranked(n, p) for n, p in pairs]) * self.read_GN

    @cached_property
    def success_GPN(self) -> Array:
        """1 where the pair is ordered rightly, 1/2 where tied, 0 where wrongly or where one of them was not read."""
        high, low = self.positive_GP[:, :, None], self.negative_GN[:, None, :]
        return (high > low) + (high == low) / 2

    @property
    def pairs_G(self) -> Array:
        return np.asarray(self.read_GP.sum(axis=1) * self.read_GN.sum(axis=1))

    @property
    def theta_G(self) -> Array:
        return np.asarray(self.wins_GP.sum(axis=1) / self.pairs_G)


def _outranked(high: Array, low: Array) -> Array:
    """How many of `low` each of `high` outranks, ties half; NaN are not counted among `low`."""
    ordered = np.sort(low[~np.isnan(low)])
    return (np.searchsorted(ordered, high, side="left") + np.searchsorted(ordered, high, side="right")) / 2


def make_readings(study: Study, outcome: str, threshold: float | None) -> Readings:
    """The readings that make `outcome` (auc, sensitivity or specificity), with their resampling units."""
    counted_K = {"auc": np.ones_like(study.truth_K), "sensitivity": study.truth_K, "specificity": ~study.truth_K}
    counted = np.flatnonzero(counted_K[outcome])
    truth, score = study.truth_K[counted], study.score_GK[:, counted]
    labels = counted if study.cluster_K is None else study.cluster_K[counted]
    unit = pd.factorize(labels)[0].astype(np.intp)
    positive_GP, negative_GN, unit_P, unit_N = score[:, truth], score[:, ~truth], unit[truth], unit[~truth]
    if outcome == "sensitivity":
        positive_GP, negative_GN, unit_N = _against_a_constant(positive_GP, threshold)
    if outcome == "specificity":
        negative_GN, positive_GP, unit_P = _against_a_constant(negative_GN, threshold)
    return Readings(outcome, positive_GP, negative_GN, unit_P, unit_N, study.cluster_K is not None)


def _against_a_constant(score_GK: Array, threshold: float | None) -> tuple[Array, Array, NDArray[np.intp]]:
    """Calls (score >= threshold) of one class and a constant other class: their AUC is the share called rightly.

    The device of Gallas, Pennello & Myers 2007, J Opt Soc Am A 24:B70, which turns sensitivity and specificity
    into AUCs. Two stand-ins, so that the formulas that leave one out stay defined.
    """
    if threshold is None:
        if not np.isin(score_GK[~np.isnan(score_GK)], (0, 1)).all():
            raise ConfigError("sensitivity and specificity need a threshold, as the scores are not all 0 or 1")
        threshold = 0.5
    call_GK = np.where(np.isnan(score_GK), np.nan, (score_GK >= threshold).astype(float))
    return call_GK, np.full((len(score_GK), 2), 0.5), np.full(2, -1, dtype=np.intp)
