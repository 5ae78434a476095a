"""explanation_report.html and the contact sheet of a review, from plain values and small JPEGs.

    html = explanation_html(result, pictures)

One self-contained page each: no script and no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from page import facts, figure, interval, number, page, section, table, text, warning

METHOD_NAMES = {
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "hirescam": "HiRes-CAM",
    "layercam": "Layer-CAM",
    "integrated_gradients": "Integrated gradients",
    "occlusion": "Occlusion",
    "shap": "SHAP (expected gradients)",
}
DEPTH_NAMES = {"head": "Head only", "last_stage": "Head and last stage", "all": "All layers"}
REGION_NAMES = {"centre": "Central lung field", "border": "Border", "text": "Burned-in text"}
SUSPECT = {"centre": "past", "border": "towards", "text": "towards"}
"""The verdict of each region that a reader must be told of."""
OWN, CHANCE = "#08519c", "#777777"
"""Colours of the map's order and of the random one."""


def explanation_html(result: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    """The page; `pictures` are as from explain.film_pictures."""
    methods = result["methods"]
    parts = [
        "<h1>Where the model looks</h1>",
        f"<p class='subtitle'>{text(result['model'])} · {text(result['checkpoint'])} · {result['films']:,} films of "
        f"{result['patients']:,} patients · evidence for {_target(result)}</p>",
        _verdict(result),
        section("Films", _examples(pictures, list(methods)), _how_to_read()),
        section("Where the evidence lies", _pointing(result), _regions_note()),
        _sanity(result) if result["sanity_films"] else "",
        section("Record", _record(result)),
    ]
    return page(f"Where {result['model']} looks", *parts)


def case_html(result: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    """The page of cases: film, maps and the words of the note side by side."""
    cells = []
    for item in pictures:
        said = f"{text(item['name'])}<br>evidence for {text(item['target'])}, probability {number(item['probability'])}"
        drawn = [figure(jpeg(item["film"], item["name"]), said)]
        drawn += [
            figure(jpeg(data, f"{item['name']} {method}"), _name(method)) for method, data in item["overlays"].items()
        ]
        cells.append(f"<div class='films'>{''.join(drawn)}</div>{_note(item)}")
    return page(
        f"What {result['model']} and the notes say",
        "<h1>Where film and note say it</h1>",
        f"<p class='subtitle'>{text(result['model'])}, fusion {text(result['fusion'])} · "
        f"{text(result['checkpoint'])} · {result['cases']:,} cases · evidence for {_target(result)}</p>",
        warning(f"{len(result['unreadable'])} cases could not be read.") if result["unreadable"] else "",
        section("Cases", *cells),
        "<p class='note'>A word's colour is what the logit loses without it: orange speaks for the class, blue against "
        "it, each note scaled to its strongest word. A map shows what moves the score, not where disease is; maps of "
        "cases are not checked against shuffled weights.</p>",
        section("Record", facts([("Program", text(result["code_version"]))])),
    )


def _note(item: Mapping[str, Any]) -> str:
    """The note, its words coloured by their evidence, and what else is known of the case."""
    strongest = max((abs(word["evidence"]) for word in item["words"]), default=0.0) or 1.0
    marked = " ".join(
        f"<span style='background:{_colour(word['evidence'] / strongest)}' title='{word['evidence']:+.3f}'>"
        f"{text(word['word'])}</span>"
        for word in item["words"]
    )
    rows = [("Note", marked or "none")]
    rows += [(value["word"], f"{value['evidence']:+.3f}") for value in item["values"]]
    rows += [(f"Weight of {name}", number(value, 2)) for name, value in (item["weights"] or {}).items()]
    return facts(rows)


def _colour(share: float) -> str:
    """CSS colour of evidence in [-1, 1]."""
    return f"rgba({'230,120,0' if share > 0 else '40,110,200'},{0.55 * abs(share):.2f})"


def _target(result: Mapping[str, Any]) -> str:
    return "each film's predicted class" if result["target"] == "predicted class" else text(result["target"])


def _name(method: str) -> str:
    return text(METHOD_NAMES[method])


def _verdict(result: Mapping[str, Any]) -> str:
    """What must not be missed, a box a method; then, a line a method, what was found to be in order."""
    boxes, lines = [], []
    for name, method in result["methods"].items():
        warnings = [text(item["text"]) for item in method["remarks"] if item["severity"] == "warning"]
        others = [text(item["text"]) for item in method["remarks"] if item["severity"] != "warning"]
        boxes += [warning(f"<b>{_name(name)}:</b> {'. <br>'.join(warnings)}.")] if warnings else []
        lines += [f"<li><b>{_name(name)}:</b> {'; '.join(others)}.</li>"] if others else []
    if not result["sanity_films"]:
        boxes.append(warning("The maps were not checked (no sanity films): they may say nothing of the model."))
    if result["unreadable"]:
        boxes.append(warning(f"{len(result['unreadable'])} films could not be read and are left out."))
    return "".join(boxes) + (f"<ul class='note'>{''.join(lines)}</ul>\n" if lines else "")


def _examples(pictures: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    """A film and its overlays side by side; two films a row where there is one method."""
    columns = 4 if len(methods) == 1 else 1 + len(methods)
    cells = []
    for item in pictures:
        said = f"{text(item['name'])}<br>evidence for {text(item['target'])}, probability {number(item['probability'])}"
        if item["prediction"] != item["target"]:
            said += f"; called {text(item['prediction'])}"
        cells.append(figure(jpeg(item["film"], item["name"]), said))
        for method in methods:
            cells.append(figure(jpeg(item["overlays"][method], f"{item['name']} {method}"), _name(method)))
    return f"<div class='films' style='grid-template-columns:repeat({columns},1fr)'>{''.join(cells)}</div>\n"


def jpeg(data: str, description: str) -> str:
    """An <img> of base64 JPEG."""
    return f"<img alt='{text(description)}' src='data:image/jpeg;base64,{data}'>"


def _how_to_read() -> str:
    return (
        "<p class='note'><br>Each overlay is scaled to its own film: the hottest place is the strongest evidence on "
        "that film, however weak that is. A map shows what moves the score of a class, not where disease is.</p>\n"
    )


def _pointing(result: Mapping[str, Any]) -> str:
    rows: list[list[str]] = []
    marks: dict[int, str] = {}
    for method, facts_of in result["methods"].items():
        for region, found in facts_of["pointing"].items():
            if found["verdict"] == SUSPECT[region]:
                marks[len(rows)] = "strong"
            rows.append(
                [
                    _name(method),
                    REGION_NAMES[region],
                    f"{found['films']:,}",
                    interval(found["share"]),
                    number(found["area"]),
                    interval(found["excess"]),
                ]
            )
    head = ["Method", "Region", "Films", "Share of attribution", "Share of area", "Difference"]
    return table(head, rows, numbers=range(2, 6), marks=marks)


def _regions_note() -> str:
    return (
        "<p class='note'>A map without a preference has the share of the area. Marked rows point away from the lungs: "
        "more than its area on the border or on text, or less on the lung field. The lung field is a fixed ellipse, "
        "not a segmentation; the border is a fourteenth of the side; text is found by a simple detector of small, "
        "bright, sharp-edged marks.</p>\n"
    )


def _sanity(result: Mapping[str, Any]) -> str:
    count = result["sanity_films"]
    changed, ordered, drawings = [], [], []
    for method, found in result["methods"].items():
        for depth, values in found["randomisation"].items():
            flat = f"{values['flat']:,}"
            cells = [interval(values["spearman"], 2), interval(values["ssim"], 2), flat]
            changed.append([_name(method), DEPTH_NAMES[depth], *cells])
        for name in ("deletion", "insertion"):
            curve = found[name]
            cells = [interval(curve["auc"]), interval(curve["random_auc"]), interval(curve["gain"])]
            ordered.append([_name(method), name.capitalize(), *cells])
            areas = f"{number(curve['auc']['value'])}, random {number(curve['random_auc']['value'])}"
            caption = f"{_name(method)}, {name}: {areas}"
            drawings.append(figure(curve_svg(curve["curve"], curve["random_curve"]), caption))
    return section(
        f"Whether the maps can be believed ({count} films)",
        "<h3>Shuffled weights</h3>",
        table(
            ["Method", "Shuffled", "Rank correlation with the own map", "SSIM", "Flat maps"],
            changed,
            numbers=[2, 3, 4],
            caption="A map that stays the same when the network has forgotten everything shows the film, not the "
            "network (Adebayo 2018).",
        ),
        "<h3>Deletion and insertion</h3>",
        table(
            ["Method", "Order", "Area, by the map", "Area, random order", "Gain"],
            ordered,
            numbers=[2, 3, 4],
            caption="Mean probability of the explained class while cells are greyed out from the hottest on (lower is "
            "better), or uncovered on the blurred film (higher is better) (Petsiuk 2018). A gain is positive where the "
            "map's order beats a random one.",
        ),
        f"<div class='films'>{''.join(drawings)}</div>",
        f"<p class='note'><br>Blue: by the map. Grey, dashed: random order. Across: share of cells changed; up: "
        f"probability from 0 to 1. Intervals are {100 * result['level']:g} %, resampled by patient.</p>",
    )


def curve_svg(own: Sequence[float], chance: Sequence[float]) -> str:
    """Two curves over [0, 1] × [0, 1] as a small drawing."""
    lines = "".join(
        f"<polyline fill='none' stroke='{colour}' stroke-width='1.5' stroke-dasharray='{dash}' "
        f"points='{_points(values)}'/>"
        for values, colour, dash in ((chance, CHANCE, "4 3"), (own, OWN, "none"))
    )
    frame = "<rect x='1' y='1' width='118' height='78' fill='none' stroke='#c9c9c9'/>"
    return f"<svg viewBox='0 0 120 80' role='img' aria-label='probability curves'>{frame}{lines}</svg>"


def _points(values: Sequence[float]) -> str:
    last = max(1, len(values) - 1)
    return " ".join(f"{1 + 118 * k / last:.1f},{79 - 78 * value:.1f}" for k, value in enumerate(values))


def _record(result: Mapping[str, Any]) -> str:
    rows = [
        ("Checkpoint", text(result["checkpoint"])),
        ("Methods", ", ".join(_name(name) for name in result["methods"])),
        ("Program", text(result["code_version"])),
    ]
    return facts(rows)


# --- contact sheet ---------------------------------------------------------------------------------------------


REASON_WORDS = {
    "wrong": "most wrong: the label has the least probability",
    "unsure": "least sure: nearest to another prediction",
    "influential": "most influential: its own loss would change most if the last layer were fitted without it",
}


def reasons_in_words(reasons: str) -> str:
    """'wrong influential' as 'most wrong, most influential'."""
    most = {"unsure": "least sure"}
    return ", ".join(most.get(reason, f"most {reason}") for reason in reasons.split())


def contact_sheet_html(
    rows: Sequence[Mapping[str, Any]],
    pictures: Sequence[Mapping[str, Any]],
    *,
    method: str,
    model: str,
    split: str,
) -> str:
    """The films to look at again, each beside its map; `rows` are those of review.csv."""
    cells = []
    for place, (row, item) in enumerate(zip(rows, pictures), start=1):
        said = f"<b>{place}.</b> label <b>{text(row['label'])}</b><br>{text(row['path'])}"
        cells.append(figure(jpeg(item["film"], item["name"]), said))
        said = (
            f"called <b>{text(row['prediction'])}</b> ({text(row['probability'])}); map: evidence for "
            f"{text(item['target'])}<br>{reasons_in_words(row['reason'])}"
        )
        cells.append(figure(jpeg(item["overlays"][method], f"{item['name']} {method}"), said))
    reasons = "".join(f"<li>{text(words)}</li>" for words in REASON_WORDS.values())
    return page(
        "Films to look at again",
        "<h1>Films to look at again</h1>",
        f"<p class='subtitle'>{text(model)} · split {text(split)} · {len(rows)} films · {_name(method)}</p>",
        f"<p>Chosen because they are</p><ul>{reasons}</ul>",
        "<p>Where a label is wrong or a film useless, write <code>exclude</code> into its row of the column "
        "<code>mark</code> in review.csv, then train again with <code>--exclude review.csv</code>. Look at the film "
        "before the map: the map shows the model's reasons, not the truth.</p>",
        f"<div class='films'>{''.join(cells)}</div>",
    )
