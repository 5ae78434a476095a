"""The page of an audit: what is wrong, how badly, what to do, and the films it is about.

    html = report_html(report, root)        # `report` is the content of audit.json

One file that fetches nothing; films are shown small, those that cannot be read are listed only.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2

from errors import DataError
from film_facts import eight_bit_grey
from page import card, facts, number, p_value, page, percent, section, span, table, text, warning
from preprocess import decode
from shortcuts import WORDS

SHOWN_GROUPS = 6
"""Groups of films shown of a finding."""
SHOWN_FILMS = 8
"""Single films shown of a finding, and films of one group."""
LISTED = 12
"""Items listed of a finding that has nothing to show."""
IN_A_CELL = 6
"""Films listed in one cell of a table."""
SIDE = 220
"""Longer side of a picture, in pixels."""
PICTURED = (
    "exact_duplicate",
    "near_duplicate",
    "blank",
    "size",
    "aspect",
    "intensity",
    "colour_mode",
    "border",
    "marker",
)
NAMES = {"error": "Error", "warning": "Warning", "info": "Note"}
HOW = {"higher": "higher values", "lower": "lower values", "tenths": "parts of the range", "categories": "its values"}
MEANINGS = {
    "error": "would invalidate results",
    "warning": "may mislead",
    "info": "worth knowing",
}


def report_html(report: Mapping[str, Any], root: Path) -> str:
    """audit.html; paths in `report` are relative to `root`."""
    found = report["findings"]
    return page(
        f"Data audit: {Path(report['source']).name}",
        f"<h1>Data audit</h1><p class='subtitle'>{text(report['source'])}</p>",
        _cards(report),
        _summary(found),
        _films(report),
        *(_severity(report, severity, root) for severity in NAMES),
        _shortcuts(report),
    )


def _cards(report: Mapping[str, Any]) -> str:
    unread = report["n"] - report["n_readable"]
    cards = [
        card("Films", number(report["n"]), f"{unread:,} cannot be read" if unread else "all can be read"),
        card("Patients", number(report["n_patients"]), text(report["patients_read_from"])),
        card("Errors", number(report["errors"]), MEANINGS["error"]),
        card("Warnings", number(report["warnings"]), MEANINGS["warning"]),
    ]
    return f"<div class='cards'>{''.join(cards)}</div>"


def _summary(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return section("Findings", "<p>Nothing was found wrong.</p>")
    rows = [[NAMES[item["severity"]], text(item["kind"]), text(item["title"])] for item in found]
    marks = {row: "strong" for row, item in enumerate(found) if item["severity"] == "error"}
    return section("Findings", table(["", "Kind", "What was found"], rows, marks=marks))


def _films(report: Mapping[str, Any]) -> str:
    classes = report["classes"]
    if not classes:
        return ""
    rows = []
    for split, counts in report["splits"].items():
        total = sum(counts.values())
        rows.append([text(split), number(total), *(percent(counts[name], total) for name in classes)])
    return section(
        "Films by split and class", table(["Split", "Films", *map(text, classes)], rows, numbers=range(1, 99))
    )


def _severity(report: Mapping[str, Any], severity: str, root: Path) -> str:
    chosen = [item for item in report["findings"] if item["severity"] == severity and item["kind"] != "shortcut"]
    if not chosen:
        return ""
    return section(f"{NAMES[severity]}s", *(_finding(item, root) for item in chosen))


def _finding(item: Mapping[str, Any], root: Path) -> str:
    title = f"<h3>{text(item['title'])}</h3>"
    remedy = f"<p>{text(item['remedy'])}</p>"
    if item["severity"] == "error":
        remedy = warning(text(item["remedy"]))
    shows_groups = item["kind"] == "label_conflict" and item.get("scope") == "picture"
    if item["kind"] in PICTURED or shows_groups:
        return title + remedy + _pictures(item, root)
    if item["kind"] == "text_leak":
        return title + remedy + _words(item["words"]) + _list(item)
    return title + remedy + _list(item)


def _pictures(item: Mapping[str, Any], root: Path) -> str:
    examples = item["examples"]
    grouped = "paths" in examples[0]
    shown = examples[: SHOWN_GROUPS if grouped else SHOWN_FILMS]
    tiles = [
        _tile(path, f"{number}. {_caption(example, position)}" if grouped else _caption(example, position), root)
        for number, example in enumerate(shown, start=1)
        for position, path in enumerate(example["paths"][:SHOWN_FILMS] if grouped else [example["path"]])
    ]
    return f"<div class='films'>{''.join(tiles)}</div>" + _more(item["count"] - len(shown))


def _caption(item: Mapping[str, Any], position: int) -> str:
    if "paths" in item:
        words = [item[name][position] for name in ("labels", "splits") if item.get(name) and item[name][position]]
        words += [f"correlation {item['correlation']:.3f}"] if "correlation" in item and position else []
    else:
        words = [f"{name} {value}" for name, value in item.items() if name != "path"]
    return text(", ".join(words))


def _tile(path: str, caption: str, root: Path) -> str:
    picture = _picture(root / path)
    image = f"<img alt='{text(Path(path).name)}' src='data:image/jpeg;base64,{picture}'>" if picture else ""
    return f"<figure>{image}<figcaption><b>{caption}</b> {text(path)}</figcaption></figure>"


def _picture(path: Path) -> str:
    """Base64 JPEG, '' where the film cannot be read."""
    try:
        grey = eight_bit_grey(decode(path))
    except DataError:
        return ""
    scale = min(1.0, SIDE / max(grey.shape))
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    _, data = cv2.imencode(".jpg", cv2.resize(grey, size, interpolation=cv2.INTER_AREA), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return base64.b64encode(data.tobytes()).decode("ascii")


def _list(item: Mapping[str, Any]) -> str:
    examples = item["examples"]
    if not examples:
        return ""
    names = [name for name in examples[0] if name != "patients"]
    rows = [[_cell(example[name]) for name in names] for example in examples[:LISTED]]
    return table([name.capitalize() for name in names], rows) + _more(max(item["count"], len(examples)) - len(rows))


def _cell(value: Any) -> str:
    if not isinstance(value, list):
        return text(value)
    rest = [f"and {len(value) - IN_A_CELL} more"] if len(value) > IN_A_CELL else []
    return "<br>".join(text(part) for part in [*value[:IN_A_CELL], *rest])


def _more(count: int) -> str:
    return f"<p class='note'><br>And {count:,} more: see findings.csv.</p>" if count > 0 else ""


def _words(words: Sequence[Mapping[str, Any]]) -> str:
    if not words:
        return ""
    return table(
        ["Word", "Tells", "AUROC", "95 % interval", "Adjusted p"], [_row(item) for item in words], numbers=[2, 3, 4]
    )


def _row(item: Mapping[str, Any]) -> list[str]:
    return [
        text(WORDS.get(item["nuisance"], item["nuisance"])),
        text(f"{item['positive_class']}: {HOW.get(item['how'], item['how'])}"),
        number(item["auroc"]["value"]),
        span(item["auroc"]),
        p_value(item["p_adjusted"]),
    ]


def _shortcuts(report: Mapping[str, Any]) -> str:
    tried = report["nuisances"]
    if not tried:
        return ""
    flagged = {item["nuisance"]: item for item in report["findings"] if item["kind"] == "shortcut"}
    rows = [
        [*_row(item), NAMES[flagged[item["nuisance"]]["severity"]] if item["nuisance"] in flagged else ""]
        for item in tried
    ]
    words = (
        "<p>Each of these alone, before any training, against the label. 0.5 is chance; what stands well above it, a "
        "network may learn in place of the disease. Intervals are clustered by patient, p-values adjusted (Holm).</p>"
    )
    head = ["Nuisance", "Tells", "AUROC", "95 % interval", "Adjusted p", ""]
    advice = facts([(WORDS.get(name, name), text(item["remedy"])) for name, item in flagged.items()]) if flagged else ""
    shares = "".join(_shares(item) for item in tried if item["nuisance"] in flagged and item["shares"])
    return section("Shortcuts", words, table(head, rows, numbers=[2, 3, 4]), advice, shares)


def _shares(item: Mapping[str, Any]) -> str:
    rows = [
        [text(level), number(found["films"]), percent(found["of_the_class"], found["films"])]
        for level, found in item["shares"].items()
    ]
    title = f"<h3>{text(item['nuisance'])}</h3>"
    return title + table(["Value", "Films", text(item["positive_class"])], rows, numbers=[1, 2])
