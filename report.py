"""report.html and model_card.md of an evaluation, from the content of metrics.json.

    html = report_html(result, drawn, thumbnails(result["worst_errors"], root))

One self-contained page: figures as SVG, films as small JPEGs, no script and no network. What the program cannot know
(intended use, ethics, funding, …) stands there as a named blank.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import modality_report
import shift_report
from checklist import BLANK, checklist, open_items, rule_in_words
from errors import DataError
from figures import shown_thresholds
from page import (
    DASH,
    card,
    facts,
    figure,
    interval,
    number,
    p_value,
    page,
    percent,
    section,
    side,
    span,
    stacked,
    table,
    text,
    warning,
)
from preprocess import decode

METRIC_NAMES = {
    "auc_roc": "AUROC",
    "auc_pr": "Average precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision (PPV)",
    "npv": "NPV",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1",
    "cohen_kappa": "Cohen's kappa",
    "mcc": "Matthews correlation",
    "brier": "Brier score",
    "log_loss": "Log loss",
    "ece": "ECE",
    "calibration_slope": "Calibration slope",
    "calibration_intercept": "Calibration intercept",
}
GAP_NAMES = {
    "equal_opportunity": "Sensitivity (equal opportunity)",
    "false_positive_rate": "False positive rate",
    "equalized_odds": "Equalised odds (the worse of the two)",
    "predictive_parity": "PPV (predictive parity)",
    "demographic_parity": "Share called positive",
    "auc": "AUROC",
    "calibration": "Calibration in the large",
}
RULES = {
    "fixed": "Fixed",
    "youden": "Youden index",
    "sensitivity": "Sensitivity at least",
    "specificity": "Specificity at least",
}
CURVE_ROWS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
THUMBNAIL = 200
"""Longer side of a thumbnail, in pixels."""


def thumbnails(errors: Sequence[Mapping[str, Any]], root: Path) -> dict[str, str]:
    """Path → base64 JPEG of those films that lie below `root` (or elsewhere, by absolute path) and can be read."""
    pictures = {}
    for error in errors:
        try:
            pixels = decode(root / error["path"])
        except DataError:
            continue
        if pixels.dtype != np.uint8:
            low, high = int(pixels.min()), int(pixels.max())
            pixels = ((pixels.astype(np.float64) - low) * (255 / max(1, high - low))).astype(np.uint8)
        image = Image.fromarray(pixels)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        pictures[error["path"]] = base64.b64encode(buffer.getvalue()).decode("ascii")
    return pictures


def report_html(result: Mapping[str, Any], drawn: Mapping[str, str], pictures: Mapping[str, str]) -> str:
    """The page; `drawn` are the figures of figures.evaluation_figures as SVG, `pictures` as from `thumbnails`."""
    binary = result["positive_class"] is not None
    parts = [
        _title(result),
        _summary(result),
        _films(result),
        _performance(result, drawn),
        modality_report.section_html(result.get("modalities")),
        _operating_points(result) if binary else _per_class(result),
        _calibration(result, drawn),
        shift_report.section_html(result, drawn),
        _utility(result, drawn) if binary else "",
        _subgroups(result, drawn) if binary else "",
        _agreement(result),
        _errors(result, pictures),
        _checklist(result),
        _record(result),
    ]
    return page(f"Evaluation of {_subject(result)}", *parts)


def _subject(result: Mapping[str, Any]) -> str:
    return str(result["model"] or result["source"]["file"])


def _title(result: Mapping[str, Any]) -> str:
    source = result["source"]
    kind = "checkpoint" if source["kind"] == "checkpoint" else "predictions of another program"
    positive = result["positive_class"]
    task = f"{positive} against {_other(result)}" if positive else " / ".join(result["classes"])
    return (
        f"<h1>Evaluation of {text(_subject(result))}</h1>"
        f"<p class='subtitle'>{text(task)} · {kind} {text(source['file'])} · split {text(result['split'])} · "
        f"{text(result['provenance']['evaluated'][:10])}</p>\n"
    )


def _other(result: Mapping[str, Any]) -> str:
    return next(name for name in result["classes"] if name != result["positive_class"])


# --- summary and films -----------------------------------------------------------------------------------------


def _summary(result: Mapping[str, Any]) -> str:
    metrics = result["metrics"]
    names = (
        "auc_roc",
        "sensitivity",
        "specificity",
        "ece" if metrics["ece"]["value"] == metrics["ece"]["value"] else "mcc",
    )
    cards = "".join(card(METRIC_NAMES[name], number(metrics[name]["value"]), _limits(metrics[name])) for name in names)
    average = " Rates and areas are averages over classes." if result["average"] == "macro" else ""
    said = (
        f"<p>{result['n']:,} films of {result['n_patients']:,} patients"
        f"{_prevalence_words(result)}. Operating point: {text(rule_in_words(result['operating_point']))}."
        f"{average} Intervals are {_level(result)}"
        f"{', clustered by patient' if result['n_patients'] < result['n'] else ''}.</p>\n"
    )
    return f"<div class='cards'>{cards}</div>\n{said}{_remarks(result)}"


def _limits(estimate: Mapping[str, Any]) -> str:
    low, high = number(estimate["ci_low"]), number(estimate["ci_high"])
    return text(estimate.get("reason", "")) if low == DASH else f"{low} to {high}"


def _level(result: Mapping[str, Any]) -> str:
    return f"{100 * result['level']:g} %"


def _prevalence_words(result: Mapping[str, Any]) -> str:
    if result["positive_class"] is None:
        return ""
    counts = dict(zip(result["classes"], (sum(row) for row in result["confusion_matrix"])))
    positives = counts[result["positive_class"]]
    return f", {percent(positives, result['n'])} of them {text(result['positive_class'])}"


def _remarks(result: Mapping[str, Any]) -> str:
    """What a reader must know before the numbers."""
    remarks = []
    if reason := result["operating_points"].get("reason"):
        remarks.append(f"Nothing was chosen on validation: {text(reason)}.")
    if not result["films"]["patients_known"]:
        remarks.append("The data name no patients: each film counts as its own, so intervals may be too narrow.")
    if result["unreadable"]:
        remarks.append(f"{len(result['unreadable'])} films could not be read and are left out; they are listed below.")
    smallest = min(sum(row) for row in result["confusion_matrix"])
    if smallest < 30:
        remarks.append(f"One class has {smallest} films only.")
    return "".join(map(warning, remarks))


def _films(result: Mapping[str, Any]) -> str:
    films, classes = result["films"], result["classes"]
    rows = [
        [text(split), f"{part['n']:,}", f"{part['n_patients']:,}"]
        + [percent(part["by_class"][name], part["n"]) for name in classes]
        for split, part in films["by_split"].items()
    ]
    marks = {k: "strong" for k, split in enumerate(films["by_split"]) if split == result["split"]}
    right = range(1, 3 + len(classes))
    parts = [table(["Partition", "Films", "Patients", *map(text, classes)], rows, numbers=right, marks=marks)]
    shared = films["patients_in_several_splits"]
    said = f"{shared} patients stand in several partitions" if shared else "no patient stands in two partitions"
    if films["patients_known"]:
        parts.append(f"<p class='note'>Measured: {text(result['split'])}. Of the films listed, {said}.</p>")
    if result["unreadable"]:
        listed = "<br>".join(map(text, result["unreadable"][:20]))
        parts.append(f"<h3>Films left out</h3><p class='note'>{listed}</p>")
    if result["provenance"]["excluded_by"]:
        parts.append(
            f"<p class='note'>Excluded beforehand: the films in {text(result['provenance']['excluded_by'])}.</p>"
        )
    return section("Films and patients", *parts, _characteristics(result))


def _characteristics(result: Mapping[str, Any]) -> str:
    described, groups = result["films"]["characteristics"], ["all", *result["classes"]]
    if not described:
        return "<p class='note'>The data say nothing of age, sex, view or site.</p>"
    rows: list[list[str]] = []
    marks = {}
    for name, column in described.items():
        of = [column["by_class"][group] for group in groups]
        if column["kind"] == "number":
            rows.append([f"{text(name)}, median (quartiles)", *map(_quartiles, of)])
        else:
            marks[len(rows)] = "group"
            rows.append([text(name)])
            values = sorted({value for counts in of for value in counts})
            for value in values:
                shares = [percent(counts.get(value, 0), sum(counts.values())) for counts in of]
                rows.append([text(value), *shares])
        if column["missing"]:
            rows.append([f"{text(name)} not given", f"{column['missing']:,}", *[""] * len(result["classes"])])
    head = ["", "All", *map(text, result["classes"])]
    right = range(1, len(head))
    return "<h3>Who was measured</h3>" + table(head, rows, numbers=right, marks=marks, caption="Films, not patients.")


def _quartiles(part: Mapping[str, float]) -> str:
    return f"{number(part['median'], 0)} ({number(part['q1'], 0)}{DASH}{number(part['q3'], 0)})"


# --- performance -----------------------------------------------------------------------------------------------


def _performance(result: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    rows = [
        [text(name), number(item["value"]), span(item), text(_method(item))]
        for key, name in METRIC_NAMES.items()
        for item in [result["metrics"][key]]
    ]
    head = ["Metric", "Value", f"{_level(result)} interval", "Interval by"]
    parts = [table(head, rows, numbers=[1, 2])]
    for name, words in _CURVES.items():
        if name in drawn:
            parts.append(side(drawn[name], f"<p class='note'>{words}</p>"))
    parts.append(figure(drawn["confusion_matrix"], "At the headline operating point.", kind="narrow"))
    if "score_histogram" in drawn:
        parts.append(figure(drawn["score_histogram"], "What the model gave the films of each class.", kind="narrow"))
    return section("Performance", *parts)


_CURVES = {
    "roc_curve": "Receiver operating characteristic. The marks are the operating points listed "
    "below. The band is a pointwise bootstrap of patients, the dotted diagonal is chance.",
    "precision_recall_curve": "Precision (positive predictive value) against recall (sensitivity). The dotted line is "
    "the prevalence in these films, which is what chance would give.",
}


def _method(item: Mapping[str, Any]) -> str:
    method = "" if item["method"] == "none" else item["method"].replace("_", " ")
    method = method[:1].upper() + method[1:]
    return "; ".join(part for part in (method, item.get("reason", "")) if part)


def _per_class(result: Mapping[str, Any]) -> str:
    names = ("sensitivity", "specificity", "precision", "auc_roc", "auc_pr")
    rows = [
        [text(label), *(interval(estimates[name]) for name in names)]
        for label, estimates in result["per_class"].items()
    ]
    head = ["Class", *(METRIC_NAMES[name] for name in names)]
    return section("Each class against the rest", table(head, rows, numbers=range(1, 6)))


def _operating_points(result: Mapping[str, Any]) -> str:
    points = result["operating_points"]
    rows: list[list[str]] = []
    marks: dict[int, str] = {}
    for point in points["rows"]:
        for where, name in (("validation", "validation"), ("test", f"measured: {result['split']}")):
            if point[where] is None:
                continue
            if point["headline"]:
                marks[len(rows)] = "strong"
            first = where == "validation" or point["validation"] is None
            rule = f"{_rule_name(point)}{' (headline)' if point['headline'] else ''}" if first else ""
            rates = [stacked(point[where][key]) for key in ("sensitivity", "specificity", "precision", "npv")]
            rows.append([rule, number(point["threshold"], 4) if first else "", text(name), *rates])
    head = ["Rule", "Threshold", "Films", "Sensitivity", "Specificity", "PPV", "NPV"]
    said = points.get("reason")
    caption = (
        f"Fixed thresholds only: {text(said)}." if said
        else "Each threshold was chosen on validation, or stated in advance, and then applied to the films measured."
    )  # fmt: skip
    parts = [table(head, rows, numbers=[1, 3, 4, 5, 6], marks=marks, caption=caption)]
    return section("Operating points", *parts, _at_prevalence(result))


def _rule_name(point: Mapping[str, Any]) -> str:
    name = RULES.get(point["rule"], point["rule"])
    return f"{name} {point['target']:g}" if point["rule"] in ("sensitivity", "specificity") else name


def _at_prevalence(result: Mapping[str, Any]) -> str:
    stated = result["at_prevalence"]
    if not stated:
        return ""
    if "ppv" not in stated:
        return f"<p class='note'>{text(stated['reason'])}</p>"
    pairs = [
        ("PPV", f"{interval(stated['ppv'])} {text(_method(stated['ppv']))}"),
        ("NPV", f"{interval(stated['npv'])} {text(_method(stated['npv']))}"),
        ("Prior of the probabilities", f"{number(stated['prior_from'])} ({text(stated['prior_source'])})"),
    ]
    if "mean_probability" in stated:
        mean = stated["mean_probability"]
        words = f"{number(mean['as_predicted'])} as predicted, {number(mean['corrected'])} corrected"
        pairs += [
            ("Mean probability", words),
            ("Threshold on corrected probabilities", number(stated["threshold_corrected"], 4)),
        ]
    return f"<h3>Where {number(100 * stated['prevalence'], 1)} % of the films are positive</h3>" + facts(pairs)


# --- calibration and utility -----------------------------------------------------------------------------------


def _calibration(result: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    found = result["calibration"]
    if "bins" not in found:
        return section("Calibration", f"<p>Not measured: {text(found['reason'])}.</p>")
    metrics, parts, test = result["metrics"], found["brier"], found["spiegelhalter"]
    pairs = [
        ("ECE, equal width", number(found["ece"]["equal_width"])),
        ("ECE, equal mass", number(found["ece"]["equal_mass"])),
        ("Largest gap of a bin", number(found["mce"])),
        ("Slope (1 is best)", stacked(metrics["calibration_slope"])),
        ("Intercept (0 is best)", stacked(metrics["calibration_intercept"])),
        ("In the large (0 is best)", stacked(found["in_the_large"])),
        ("Observed over expected", number(found["observed_to_expected"])),
        ("Brier score", f"{number(parts['brier'], 4)}"),
        ("its reliability", number(parts["reliability"], 4)),
        ("less its resolution", number(parts["resolution"], 4)),
        ("plus its uncertainty", number(parts["uncertainty"], 4)),
        ("plus what binning adds", number(parts["within_bin"], 4)),
        ("Spiegelhalter", f"z = {number(test['statistic'], 2)}, p {text(p_value(test['p_value']))}"),
    ]
    caption = f"Of {text(found['of'])}: observed share with Wilson intervals; below, how many films were given what."
    both = side(drawn["reliability_diagram"], facts(pairs), f"<p class='note'>{caption}</p>")
    return section("Calibration", both, _recalibration(found["recalibration"]), _bins(found["bins"]["equal_width"]))


def _recalibration(found: Mapping[str, Any]) -> str:
    if "as_predicted" not in found:
        return f"<p class='note'>No recalibration: {text(found['reason'])}.</p>"
    named = {
        "As predicted": found["as_predicted"],
        f"Temperature {found['temperature']['value']:.3f}": found["temperature"],
        "Isotonic": found.get("isotonic"),
    }
    rows = [
        [name, *(number(losses[key], 4) for key in ("log_loss", "brier", "ece"))]
        for name, losses in named.items()
        if losses
    ]
    fitted = found["fitted_on"]
    caption = (
        f"Fitted on {fitted['n']:,} validation films of {fitted['n_patients']:,} patients, applied to those measured."
    )
    return "<h3>Recalibration</h3>" + table(
        ["", "Log loss", "Brier score", "ECE"], rows, numbers=[1, 2, 3], caption=caption
    )


def _bins(bins: Sequence[Mapping[str, float]]) -> str:
    rows = [
        [
            f"{row['low']:.1f}{DASH}{row['high']:.1f}",
            f"{int(row['count']):,}",
            number(row["mean_probability"]),
            f"{number(row['observed'])} ({number(row['ci_low'])}{DASH}{number(row['ci_high'])})",
        ]
        for row in bins
    ]
    head = ["Probability", "Films", "Mean probability", "Observed share (Wilson interval)"]
    return "<h3>Reliability by bin</h3>" + table(head, rows, numbers=[1, 2, 3])


def _utility(result: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    curve = result["decision_curve"]
    if "net_benefit" not in curve:
        return section("Clinical utility", f"<p>No decision curve: {text(curve['reason'])}.</p>")
    thresholds = [round(value, 4) for value in curve["thresholds"]]
    rows = []
    for at in (thresholds.index(value) for value in CURVE_ROWS if value <= shown_thresholds(curve)):
        cell = {key: values[at] for key, values in curve["net_benefit"].items()}
        avoided = curve["net_interventions_avoided"]["value"][at]
        rows.append(
            [f"{thresholds[at]:.0%}", interval(cell), number(curve["treat_all"]["value"][at]), number(100 * avoided, 1)]
        )
    head = ["Threshold probability", "Net benefit of the model", "Treating all", "Interventions avoided per 100"]
    words = (
        "<p>Net benefit weighs true positives against false ones at the odds of the threshold probability, the risk at "
        "which treating and not treating are worth the same (Vickers &amp; Elkin 2006). Treating nobody has 0.</p>"
    )
    note = f"Prevalence {number(curve['prevalence'])}; bands from {curve['n_boot']:,} resamples of patients."
    return section(
        "Clinical utility",
        words,
        figure(drawn["decision_curve"], note, kind="narrow"),
        table(head, rows, numbers=range(4)),
    )


# --- subgroups, readers, errors --------------------------------------------------------------------------------


def _subgroups(result: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    found = result["subgroups"]
    if not found["columns"]:
        return section("Subgroups", f"<p>Not compared: {text(found['reason'])}.</p>")
    words = (
        f"<p>Groups of fewer than {found['min_n']} films are counted and not judged. P-values are adjusted together "
        f"for the {found['tests']} tests made here (Holm). A gap that is not shown to differ from 0 is not shown to be "
        "absent: look at its interval.</p>"
    )
    forests = [
        figure(drawn[name], "The dashed line is the value over all films.")
        for name in ("subgroup_auroc", "subgroup_sensitivity", "subgroup_specificity")
        if name in drawn
    ]
    crossed = found["intersections"]
    parts = [
        words,
        _group_table(found["columns"]),
        *forests,
        "<h3>Gaps between groups</h3>",
        _gap_table(found["columns"]),
    ]
    if "intersections_reason" in found:
        parts.append(f"<p class='note'>Two columns at a time: {text(found['intersections_reason'])}.</p>")
    if crossed:
        parts += ["<h3>Two columns at a time</h3>", _group_table(crossed), _gap_table(crossed)]
    return section("Subgroups", *parts, new_page=True)


def _group_table(columns: Mapping[str, Any]) -> str:
    rows: list[list[str]] = []
    marks = {}
    for name, column in columns.items():
        marks[len(rows)] = "group"
        missing = column["missing"]["n"]
        rows.append([text(name) + (f" (not given for {missing:,} films)" if missing else "")])
        rows += [_group_row(label, group) for label, group in column["groups"].items()]
    head = ["Group", "Films", "Patients", "Positive", "AUROC", "Sensitivity", "Specificity", "ECE"]
    return table(head, rows, numbers=range(1, 8), marks=marks)


def _group_row(label: str, group: Mapping[str, Any]) -> list[str]:
    first = [text(label), f"{group['n']:,}", f"{group['n_patients']:,}", percent(group["n_positive"], group["n"])]
    if "metrics" not in group:
        return [*first, "too few to say", "", "", ""]
    metrics = group["metrics"]
    return [*first, *(stacked(metrics[name], 2) for name in ("auc_roc", "sensitivity", "specificity", "ece"))]


def _gap_table(columns: Mapping[str, Any]) -> str:
    rows: list[list[str]] = []
    marks = {}
    for name, column in columns.items():
        marks[len(rows)] = "group"
        rows.append([text(name)])
        rows += [_gap_row(GAP_NAMES[key], column["gaps"][key]) for key in GAP_NAMES if key in column["gaps"]]
    head = ["Gap in", "Highest", "Lowest", "Difference", "p", "p adjusted"]
    caption = "Highest less lowest group. With three groups or more the two are chosen as extremes after the fact."
    return table(head, rows, numbers=[3, 4, 5], marks=marks, caption=caption)


def _gap_row(name: str, gap: Mapping[str, Any]) -> list[str]:
    if "highest" not in gap:
        return [name, "too few to say", "", "", "", ""]
    by_group = gap.get("by_group", {})
    ends = [
        f"{text(gap[end])}" + (f" ({number(by_group[gap[end]])})" if gap[end] in by_group else "")
        for end in ("highest", "lowest")
    ]
    shown = interval({**gap, "value": gap["difference"]})
    return [name, *ends, shown, text(p_value(gap["p_value"])), text(p_value(gap["p_adjusted"]))]


def _agreement(result: Mapping[str, Any]) -> str:
    found = result["agreement"]
    if not found:
        return ""
    rows = [
        [text(pair["first"]), text(pair["second"]), interval(pair), text(_method(pair))]
        for pair in found["cohen_kappa"]
    ]
    parts = [
        "<h3>Cohen's kappa of each pair</h3>",
        table(["First", "Second", "Kappa", "Interval by"], rows, numbers=[2]),
    ]
    named = {"fleiss_kappa": "Fleiss' kappa", "krippendorff_alpha": "Krippendorff's alpha", "gwet_ac1": "Gwet's AC1"}
    groups = {"readers": "Readers among themselves", "readers_and_model": "Readers and model"}
    held = {key: name for key, name in groups.items() if key in found}
    rows = [[name, *(interval(found[key][which]) for key in held)] for which, name in named.items()]
    parts += ["<h3>All together</h3>", table(["", *held.values()], rows, numbers=range(1, 3))]
    return section("Agreement with readers", *parts)


def _errors(result: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    errors = result["worst_errors"]
    if not errors:
        return section("Most confident errors", "<p>No film was called wrongly, or none was to be shown.</p>")
    score = "probability" if result["calibration"].get("bins") else "score"
    what = f"{score} of {result['positive_class']}" if result["positive_class"] else "probability of the prediction"
    words = (
        "<p class='lead'>The films called wrongly with the most confidence, worst first; the number is the "
        f"{text(what)}.</p>"
    )
    shown = [error for error in errors if error["path"] in pictures]
    tiles = "".join(_tile(error, pictures[error["path"]]) for error in shown)
    rest = [error for error in errors if error["path"] not in pictures]
    rows = [[text(e["path"]), text(e["label"]), text(e["prediction"]), number(e["score"])] for e in rest]
    listed = table(["Film", "Truth", "Prediction", score.capitalize()], rows, numbers=[3]) if rest else ""
    return section("Most confident errors", words, f"<div class='films'>{tiles}</div>" if tiles else "", listed)


def _tile(error: Mapping[str, Any], picture: str) -> str:
    words = (
        f"<b>{text(error['label'])}</b> called {text(error['prediction'])}, {number(error['score'])}<br>"
        f"{text(Path(error['path']).name)}"
    )
    image = f"<img alt='{text(Path(error['path']).name)}' src='data:image/jpeg;base64,{picture}'>"
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


# --- checklist and record --------------------------------------------------------------------------------------


def _checklist(result: Mapping[str, Any]) -> str:
    rows = [
        [
            *(text(part) for part in (item.topic, item.tripod, item.claim, item.stard, item.status)),
            text(item.answer) + ("<i class='blank'>to be completed: </i>" if item.status == BLANK else ""),
        ]
        for item in checklist(result)
    ]
    words = (
        "<p>Item numbers of TRIPOD+AI (2024), CLAIM (2024) and STARD-AI (2025); topics in our own words. What this run "
        "knows is filled in; what is open only the authors can say. A dash claims no item of that guideline.</p>"
    )
    head = ["Topic", "TRIPOD+AI", "CLAIM", "STARD-AI", "Status", "Here"]
    return section("Reporting checklist", words, table(head, rows), new_page=True)


def _record(result: Mapping[str, Any]) -> str:
    provenance, source = result["provenance"], result["source"]
    pairs = [
        ("Evaluated", text(provenance["evaluated"])),
        ("Source", f"{text(source['kind'])} {text(source['file'])}"),
        ("SHA-256", f"<code>{text(source['sha256'])}</code>"),
        *([("Data", text(provenance["data"]))] if provenance["data"] else []),
        ("Program", f"{text(provenance['code_version'])}, python {text(provenance['python'])}"),
        ("Libraries", text(", ".join(f"{n} {v}" for n, v in provenance["libraries"].items()))),
        ("Seed", text(provenance["seed"])),
        ("Settings", text(", ".join(f"{n}={v}" for n, v in provenance["settings"].items()))),
    ]
    if trained := source.get("trained_with"):
        keys = ("epoch", "seed", "code_version", "device", "precision", "manifest_digest")
        pairs.append(("Trained with", text(", ".join(f"{key} {trained[key]}" for key in keys if key in trained))))
    sign = "".join(f"<div>{name}</div>" for name in ("Prepared by, date", "Reviewed by, date", "Approved by, date"))
    return section("Record", facts(pairs), f"<div class='sign'>{sign}</div>")


# --- model card ------------------------------------------------------------------------------------------------


def model_card(result: Mapping[str, Any]) -> str:
    """A model card (Mitchell 2019) in Markdown: what is known, and what is to be completed."""
    metrics = result["metrics"]
    lines = [
        f"# Model card: {_plain(_subject(result))}",
        "",
        "## Model",
        f"- Task: {_plain(' / '.join(result['classes']))}"
        + (f"; positive class {_plain(result['positive_class'])}" if result["positive_class"] else ""),
        f"- Source: {_plain(result['source']['file'])}, SHA-256 `{result['source']['sha256']}`",
        f"- Operating point: {_plain(rule_in_words(result['operating_point']))}",
        f"- Temperature: {number(result['temperature'])}",
        "",
        "## Evaluation data",
        f"- {result['n']} films of {result['n_patients']} patients, split {_plain(result['split'])} of "
        f"{_plain(result['provenance']['data'] or result['source']['file'])}; {len(result['unreadable'])} unreadable "
        "films left out",
        "",
        f"## Performance ({_level(result)} intervals)",
        "",
        "| metric | value | interval | by |",
        "|---|---:|---|---|",
        *(
            f"| {name} | {number(item['value'])} | {span(item)} | {_plain(_method(item))} |"
            for key, name in METRIC_NAMES.items()
            for item in [metrics[key]]
        ),
        "",
        "## Groups",
        *_card_groups(result["subgroups"]),
        "",
        "## To be completed by the authors",
        *(f"- {topic}: ..." for topic in open_items(checklist(result))),
        "",
    ]
    return "\n".join(lines)


def _card_groups(found: Mapping[str, Any]) -> list[str]:
    if not found["columns"]:
        return [f"Not compared: {found['reason']}."]
    rows = ["| column | group | films | sensitivity | specificity | AUROC |", "|---|---|---:|---|---|---|"]
    for name, column in found["columns"].items():
        for label, group in column["groups"].items():
            measured = group.get("metrics")
            keys = ("sensitivity", "specificity", "auc_roc")
            cells = [interval(measured[key], 2) for key in keys] if measured else ["too few to say", "", ""]
            rows.append(f"| {_plain(name)} | {_plain(label)} | {group['n']} | {' | '.join(cells)} |")
    return rows


def _plain(value: Any) -> str:
    """Text that cannot break a Markdown table or start markup."""
    return str(value).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
