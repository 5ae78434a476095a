"""What the reporting guidelines ask for, filled in as far as an evaluation knows it; the blanks are named.

Item numbers of TRIPOD+AI (Collins 2024, BMJ 385:e078378), CLAIM 2024 (Tejani 2024, Radiol Artif Intell 6:e240300) and
STARD-AI (Sounderajah 2025, Nat Med). The topics are in our own words: the guidelines themselves are to be read. "–"
claims no item: it may ask for the topic all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REPORTED, PARTLY, BLANK = "reported", "partly", "open"


@dataclass(frozen=True)
class Item:
    """One topic with the item numbers that ask for it."""

    topic: str
    tripod: str
    claim: str
    stard: str
    status: str
    answer: str


def checklist(result: Mapping[str, Any]) -> list[Item]:
    """Every topic, those the run knows first; `result` is the content of metrics.json."""
    return [*_films(result), *_methods(result), *_results(result), *_blanks()]


def open_items(items: list[Item]) -> list[str]:
    """Topics nobody but the authors can fill in."""
    return [item.topic for item in items if item.status == BLANK]


def _films(result: Mapping[str, Any]) -> list[Item]:
    films, own = result["films"], result["source"].get("films_of_training")
    known = films["patients_known"]
    described = ", ".join(films["characteristics"])
    missing = sum(column["missing"] for column in films["characteristics"].values())
    unreadable = len(result["unreadable"])
    external = {True: "no: the films are of the data set of training", False: "yes: films not used in training"}
    shared = films["patients_in_several_splits"]
    return [
        Item(
            "Flow of films and patients, exclusions", "20a, 21", "35", "24", REPORTED,
            f"{result['n']:,} films of {result['n_patients']:,} patients measured; {unreadable} unreadable left out; "
            "counts by partition under 'Films and patients'",
        ),
        Item(
            "Missing data", "11", "12", "20", PARTLY if described else BLANK,
            f"{missing} missing values among {described}" if described else "no descriptions of patients in the data;",
        ),
        Item(
            "Characteristics by partition and class", "16, 20b", "36", "25, 28, 29", PARTLY if described else BLANK,
            f"{described}: see 'Films and patients'" if described else "age, sex, site are not in the data;",
        ),
        Item(
            "Disjoint partitions", "12a", "19, 20", "–", REPORTED if known and not shared else PARTLY,
            "no patient stands in two partitions" if known and not shared
            else f"{shared} patients in several partitions" if known else "patients are not named in the data",
        ),
        Item(
            "External test", "12d, 23b", "33", "–", PARTLY if own is not None else BLANK,
            external.get(own, "unknown for predictions of another program;"),
        ),
    ]  # fmt: skip


def _methods(result: Mapping[str, Any]) -> list[Item]:
    provenance, point = result["provenance"], result["operating_point"]
    libraries = ", ".join(f"{name} {version}" for name, version in provenance["libraries"].items())
    readers = result["agreement"]
    agreed = f"{len(readers['names'])} readers: see 'Agreement with readers'" if readers else "no readings in the data;"
    return [
        Item("Operating point: value and rationale", "15", "–", "15c", REPORTED, rule_in_words(point)),
        Item(
            "Performance measures and their uncertainty", "12e", "28, 29", "–", REPORTED,
            f"{100 * result['level']:g} % intervals, the method named beside each"
            + (", clustered by patient" if result["n_patients"] < result["n"] else ""),
        ),
        Item(
            "Sample size", "10", "21", "22", PARTLY,
            f"{result['n']:,} films of {result['n_patients']:,} patients at hand; what was planned is to be stated",
        ),
        Item("Agreement of annotators", "–", "18", "12", REPORTED if readers else BLANK, agreed),
        Item(
            "Software, versions, seeds", "18f, 22", "23, 42, 43", "–", REPORTED,
            f"program {provenance['code_version']}, python {provenance['python']}, {libraries}; seed "
            f"{provenance['seed']}",
        ),
    ]  # fmt: skip


def rule_in_words(point: Mapping[str, Any]) -> str:
    if "threshold" not in point:
        return "the most probable of several classes"
    target = point.get("target")
    aimed = f" of {target:g}" if target is not None and point["rule"] in ("sensitivity", "specificity") else ""
    where = "stated in advance" if point["rule"] == "fixed" else "chosen on validation"
    moved = ""
    if "adapted_from" in point:
        moved = f", moved from {point['adapted_from']:.4g} to the prevalence estimated from the scores"
    return f"{point['threshold']:.4g} by rule {point['rule']}{aimed}, {where}{moved}"


def _results(result: Mapping[str, Any]) -> list[Item]:
    binary = result["positive_class"] is not None
    recalibrated = "temperature" in result["calibration"].get("recalibration", {})
    columns = result["subgroups"]["columns"]
    curve = "net_benefit" in result["decision_curve"]
    return [
        Item("Cross-tabulation and estimates with intervals", "23a", "37, 38", "30, 31", REPORTED, "see 'Performance'"),
        Item(
            "Discrimination, calibration and utility together", "12e", "28", "–",
            REPORTED if binary and curve else PARTLY,
            "ROC and precision-recall, calibration, decision curve" if curve else "no decision curve for this task",
        ),
        Item(
            "Recalibration", "12f, 13, 24", "–", "–", REPORTED if recalibrated else PARTLY,
            "temperature and isotonic scaling fitted on validation" if recalibrated
            else result["calibration"].get("recalibration", {}).get("reason", "not done"),
        ),
        Item(
            "Subgroups and fairness", "14, 23a", "–", "23, 35", REPORTED if columns else BLANK,
            f"by {', '.join(columns)}, with adjusted tests" if columns else "no age, sex, view or site in the data;",
        ),
        Item(
            "Failure analysis", "–", "39", "–", PARTLY,
            f"the {len(result['worst_errors'])} most confident errors are shown; their reading is to be written",
        ),
    ]  # fmt: skip


def _blanks() -> list[Item]:
    asked = [
        ("Intended use, users and setting", "3, 27", "3, 6", "–"),
        ("Study design, dates, eligibility of patients", "5, 6", "5, 7, 8", "–"),
        ("Reference standard and its rationale", "8", "14, 15, 16", "–"),
        ("Acquisition of the images, de-identification", "7", "11, 13", "–"),
        ("Robustness to other devices and protocols", "12d", "30", "–"),
        ("Ethical approval and consent", "17", "–", "–"),
        ("Registration and protocol", "18c, 18d", "34, 42", "–"),
        ("Availability of data and code", "18e, 18f", "43", "–"),
        ("Limitations", "26", "40", "–"),
        ("Implications for practice", "25, 27", "41", "–"),
        ("Funding and interests", "18a, 18b", "44", "–"),
    ]
    return [Item(topic, tripod, claim, stard, BLANK, "") for topic, tripod, claim, stard in asked]
