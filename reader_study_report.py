"""A reader study from its table to reader_study.json, per-reader ROC curves and a short report.

    python main.py reader_study --table T.csv --method or --covariance jackknife

Reads a CSV `reader,modality,case,truth,score` (one row per reading); writes reader_study.json, reader_roc.png,
reader_study.html and reader_study.md. The statistics are those of `reader_study`; nothing is computed here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plots
from errors import ConfigError
from page import facts, figure, interval, number, p_value, page, section, stacked, table, text
from reader_study import load_table, reader_roc_points, reader_study
from runtime import code_version, labelled, write_json, write_text

METHOD_NAMES = {
    "or": "Obuchowski-Rockette with the degrees of freedom of Hillis",
    "dbm": "Dorfman-Berbaum-Metz (Hillis 2008)",
    "ustat": "U-statistics of Gallas",
}
OUTCOME_NAMES = {"auc": "AUROC", "sensitivity": "Sensitivity", "specificity": "Specificity"}


def study_report(
    path: Path,
    *,
    output_dir: Path,
    cluster: str | None = None,
    modalities: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Analyse the study in `path` and write the results; `options` are those of reader_study.reader_study.

    Returns the content of reader_study.json.
    """
    readings = load_table(path, cluster=cluster)
    result = reader_study(readings, cluster=cluster, modalities=modalities, **options)
    result |= {"table": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    result["code_version"] = code_version()
    curves = [] if _binary(readings["score"]) else reader_roc_points(readings, modalities=modalities)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output-dir {output_dir}: cannot be written ({error.strerror}); name another folder"
        ) from None
    write_json(output_dir / "reader_study.json", result)
    drawing = _draw(curves, output_dir / "reader_roc.png") if curves else ""
    write_text(output_dir / "reader_study.html", study_html(result, drawing))
    write_text(output_dir / "reader_study.md", study_markdown(result))
    return result


def _binary(scores: Any) -> bool:
    """Whether the readings are calls of 0 and 1, whose ROC curve is a single point."""
    return set(scores.unique()) <= {0.0, 1.0}


def _draw(curves: Sequence[Mapping[str, Any]], path: Path) -> str:
    return plots.to_file_and_svg(lambda target: plots.reader_roc_curves(curves, target), path)


# --- words -----------------------------------------------------------------------------------------------------


def _test_words(result: Mapping[str, Any]) -> str:
    """The test of no difference: 'F(1, 15.26) = 4.46, p 0.052'."""
    if "p_value" not in result or result["p_value"] is None or math.isnan(result["p_value"]):
        return "no test"
    if result.get("test") == "chi2":
        return f"chi-square({result['df_num']}) = {number(result['chi2'], 3)}, p {p_value(result['p_value'])}"
    degrees = number(result["df_den"], 2)
    return f"F({result['df_num']}, {degrees}) = {number(result['f_statistic'], 3)}, p {p_value(result['p_value'])}"


def _generalises(result: Mapping[str, Any]) -> str:
    """Whom the result speaks of."""
    random = result["random"]
    if random == ["readers", "cases"]:
        return "random readers and random cases: speaks of other readers and cases like these"
    if random == ["cases"]:
        return "fixed readers, random cases: speaks of these readers and other cases"
    return "random readers, fixed cases: speaks of other readers and these cases"


def _pairs(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was analysed and how, as plain text."""
    outcome = OUTCOME_NAMES[result["outcome"]]
    if result["threshold"] is not None:
        outcome += f" at a score of at least {result['threshold']:g}"
    pairs = [
        ("Outcome", outcome),
        ("Design", f"{result['design']}; {result['readers']} readers"),
        ("Cases", f"{result['cases']} ({result['n_positive']} positive, {result['n_negative']} negative)"),
        ("Method", f"{METHOD_NAMES[result['method']]}, {result['covariance_method']} covariance"),
        ("Generalisation", _generalises(result)),
    ]
    if result["clusters"] is not None:
        pairs.append(("Clusters", str(result["clusters"])))
    if result["readings_missing"]:
        listed = ", ".join(f"{name} {count}" for name, count in result["readings_missing"].items())
        pairs.append(("Readings not made", listed))
    return pairs


def _differences(result: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for pair in result["pairwise"]:
        p = p_value(pair.get("p_value"))
        rows.append([pair["comparison"], interval({**pair, "value": pair["estimate"]}, 4), p])
    return rows


def summary(result: Mapping[str, Any]) -> str:
    """The study as a table for the terminal."""
    level = f"{100 * result['level']:g} % interval"
    lines = [labelled(f"{name + ':':18}", value) for name, value in _pairs(result)]
    lines.append(f"{'modality':24}{OUTCOME_NAMES[result['outcome']]:>12}   {level}")
    for row in result["per_modality"]:
        lines.append(f"{row['modality']:24}{_fixed(row['estimate']):>12}   {_limits(row)}")
    for pair in result["pairwise"]:
        name = pair["comparison"]
        lines.append(f"{name:24}{_fixed(pair['estimate']):>12}   {_limits(pair)}   p {p_value(pair.get('p_value'))}")
    if result["pairwise"]:
        lines.append(f"no difference between modalities: {_test_words(result)}")
    lines += [f"{name}: {reason}" for name, reason in result["reasons"].items()]
    return "\n".join(lines)


def _fixed(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def _limits(row: Mapping[str, Any]) -> str:
    return f"{_fixed(row['ci_low'])} to {_fixed(row['ci_high'])}"


# --- pages -----------------------------------------------------------------------------------------------------


def study_html(result: Mapping[str, Any], drawing: str) -> str:
    """The report as one self-contained page; `drawing` is the <svg> of the readers' ROC curves, or ''."""
    outcome, level = OUTCOME_NAMES[result["outcome"]], f"{100 * result['level']:g} %"
    means = [[text(row["modality"]), interval({**row, "value": row["estimate"]}, 4)] for row in result["per_modality"]]
    parts = [
        "<h1>Reader study</h1>",
        f"<p class='subtitle'>{text(result['table'])} · {text(' against '.join(result['modalities']))}</p>",
        section("Study", facts((name, text(value)) for name, value in _pairs(result))),
        section(
            "Modalities",
            table(["Modality", f"{outcome} over readers ({level} interval)"], means, numbers=[1]),
            _difference_html(result, level),
        ),
        section("Readers", _reader_table(result), figure(drawing, "Empirical ROC curves.") if drawing else ""),
        section(
            "Record",
            facts(
                [
                    ("Table", text(result["table"])),
                    ("SHA-256", f"<code>{text(result['sha256'])}</code>"),
                    ("Program", text(result["code_version"])),
                ]
            ),
        ),
    ]
    return page(f"Reader study {result['table']}", *parts)


def _difference_html(result: Mapping[str, Any], level: str) -> str:
    if not result["pairwise"]:
        return ""
    rows = [[text(cell) for cell in row] for row in _differences(result)]
    reasons = "".join(f"<p class='note'>{text(n)}: {text(why)}.</p>" for n, why in result["reasons"].items())
    head = ["Difference", f"Estimate ({level} interval)", "p"]
    return f"{table(head, rows, numbers=[1, 2])}<p>Test of no difference: {text(_test_words(result))}.</p>{reasons}"


def _reader_table(result: Mapping[str, Any]) -> str:
    modalities = result["modalities"]
    rows = []
    for name in dict.fromkeys(row["reader"] for row in result["per_reader"]):
        own = {row["modality"]: row for row in result["per_reader"] if row["reader"] == name}
        cells = [stacked({**own[m], "value": own[m]["estimate"]}) if m in own else "" for m in modalities]
        rows.append([text(name), *cells])
    return table(["Reader", *map(text, modalities)], rows, numbers=range(1, len(modalities) + 1))


def study_markdown(result: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Reader study", "", *(f"- {name}: {value}" for name, value in _pairs(result)), ""]
    lines += ["| modality | mean over readers |", "|---|---:|"]
    lines += [
        f"| {row['modality']} | {interval({**row, 'value': row['estimate']}, 4)} |" for row in result["per_modality"]
    ]
    if result["pairwise"]:
        lines += ["", "| difference | estimate | p |", "|---|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in _differences(result)]
        lines += ["", f"Test of no difference: {_test_words(result)}."]
    lines += ["", *(f"{name}: {reason}." for name, reason in result["reasons"].items())]
    return "\n".join(lines).rstrip() + "\n"
