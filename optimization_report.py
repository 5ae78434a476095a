"""optimization_report.json, .md and .png: what `optimize` measured, what it refused and why, what it chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import plots
from runtime import write_json, write_text

NAME = "optimization_report"


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """The three files."""
    write_json(folder / f"{NAME}.json", report)
    write_text(folder / f"{NAME}.md", markdown(report))
    plots.speed_against_accuracy(
        [_point(row, report["chosen"]) for row in report["candidates"]],
        folder / f"{NAME}.png",
        budget=report["settings"]["max_auc_drop"],
        title=f"{report['model']}: speed against accuracy",
    )


def _point(row: Mapping[str, Any], chosen: str | None) -> dict[str, Any]:
    paired = row["accuracy"].get("differences", {}).get("auc_roc", {})
    limits = {name: _or_nan(paired.get(name)) for name in ("ci_low", "ci_high")}
    drop = {"throughput": row["speed"]["throughput"], "auc_drop": row["accuracy"]["drop"]["auc_roc"]}
    return {"name": row["name"], **drop, **limits, "accepted": row["accepted"], "chosen": row["name"] == chosen}


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def verdict(report: Mapping[str, Any]) -> str:
    """What was chosen and how much faster it is, or that nothing was."""
    rows = {row["name"]: row for row in report["candidates"]}
    base = rows[report["baseline"]]["speed"]
    if report["chosen"] is None:
        return (
            f"nothing inside the budget is faster than {report['baseline']}: the float model is kept "
            f"({base['throughput']:.1f} films/s)"
        )
    speed = rows[report["chosen"]]["speed"]
    return (
        f"chosen: {report['chosen']}, {speed['throughput']:.1f} films/s in batches of 16 "
        f"({speed['throughput'] / base['throughput']:.1f} times {report['baseline']}), {speed['p50_ms']:.1f} ms for "
        f"one film ({base['p50_ms'] / speed['p50_ms']:.1f} times)"
    )


HEADINGS = ("candidate", "films/s", "ms p50", "ms p95", "start s", "memory MB", "size MB", "AUROC", "lost", "flips", "")


def _cells(row: Mapping[str, Any], chosen: str | None) -> list[str]:
    speed, start, accuracy = row["speed"], row["cold_start"], row["accuracy"]
    mark = "chosen" if row["name"] == chosen else "" if row["accepted"] else "refused"
    return [
        row["name"],
        _number(speed["throughput"], 1),
        _number(speed["p50_ms"], 1),
        _number(speed["p95_ms"], 1),
        _number(start["seconds"], 1),
        _number(start["memory_mb"], 0),
        _number(row["size_mb"], 1),
        _number(accuracy["metrics"]["auc_roc"]["value"], 4),
        _number(accuracy["drop"]["auc_roc"], 4),
        "" if accuracy["flips"] is None else str(accuracy["flips"]),
        mark,
    ]


def _number(value: float | None, digits: int) -> str:
    if value is None or np.isnan(value):
        return "undefined"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


def text(report: Mapping[str, Any]) -> str:
    """The table for the terminal, the verdict under it."""
    rows = [list(HEADINGS), *(_cells(row, report["chosen"]) for row in report["candidates"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    lines += [f"{item['candidate']} skipped: {item['reason']}" for item in report["skipped"]]
    return "\n".join([*lines, verdict(report)])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    last = len(row) - 1
    return [
        cell.ljust(width) if column in (0, last) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths))
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report in words and tables."""
    films, machine, settings = report["films"], report["machine"], report["settings"]
    parts = [
        f"# Optimisation of {report['model']}",
        f"{verdict(report).capitalize()}.",
        f"{machine['platform']}, {machine['torch_threads']} threads, instruction sets "
        f"{', '.join(machine['instruction_sets']) or 'unknown'}. Judged on {films['n']} validation films of "
        f"{films['patients']} patients. Budget: AUROC {settings['max_auc_drop']:g}, sensitivity "
        f"{settings['max_sensitivity_drop']:g}, accuracy {settings['max_accuracy_drop']:g}; chosen by "
        f"{settings['objective']}. Whole command: {report['seconds']:.0f} s.",
        "![Speed against accuracy](optimization_report.png)",
        "## Candidates",
        f"Timed in turns, medians of {settings['rounds']} batches of 16 and of single films. Start: a fresh process "
        "to its first answer, libraries included. Lost: AUROC against the float model in torch, same films. Flips: "
        "films whose call changes at the operating point.",
        _table(HEADINGS, [_cells(row, report["chosen"]) for row in report["candidates"]]),
        "## Accuracy on validation, with 95 % intervals",
        _table(
            ("candidate", "AUROC", "AUROC lost", "sensitivity", "specificity", "Brier", "ECE"),
            [_accuracy_cells(row) for row in report["candidates"] if "differences" in row["accuracy"]],
        ),
    ]
    refused = [f"- {row['name']}: {row['reason']}" for row in report["candidates"] if not row["accepted"]]
    skipped = [f"- {item['candidate']}: {item['reason']}" for item in report["skipped"]]
    parts += ["## Refused", "\n".join(refused) or "None.", "## Skipped", "\n".join(skipped) or "None."]
    parts += [_network(name, facts) for name, facts in report["networks"].items()]
    return "\n\n".join(parts) + "\n"


def _accuracy_cells(row: Mapping[str, Any]) -> list[str]:
    metrics, paired = row["accuracy"]["metrics"], row["accuracy"]["differences"]
    lost = paired["auc_roc"]
    own = [_interval(metrics[name]) for name in ("sensitivity", "specificity", "brier", "ece")]
    return [row["name"], _interval(metrics["auc_roc"]), _interval({**lost, "value": lost["difference"]}), *own]


def _interval(estimate: Mapping[str, Any]) -> str:
    low, high = (_number(estimate.get(name), 4) for name in ("ci_low", "ci_high"))
    return f"{_number(estimate['value'], 4)} ({low} to {high})"


def _network(name: str, facts: Mapping[str, Any]) -> str:
    agreement = facts["parity"]
    sizes = ", ".join(map(str, agreement["batch_sizes"]))
    lines = [
        f"## The {name} network",
        f"ONNX file {facts['float_mb']:.1f} MB; logits differ from torch by at most {agreement['largest']:.2g} (mean "
        f"{agreement['mean']:.2g}) on {agreement['films']} films in batches of {sizes}.",
    ]
    if (made := facts.get("quantisation")) is not None:
        tried = ", ".join(f"{recipe} {error:.4f}" for recipe, error in made["errors"].items())
        left = ", ".join(made["left_in_float"]) or "none but the last layer"
        shift = ", ".join(f"{value:+.4f}" for value in made["shift"])
        lines.append(
            f"INT8 file {made['int8_mb']:.1f} MB, by {made['recipe']}; relative error of the logits: {tried}; as kept "
            f"{made['error']:.4f}. Added to every film's logits, which rounding had shifted: {shift}. Blocks in float: "
            f"{left}." + (f" Still {made['reason']}." if made["reason"] else "")
        )
    if (pruned := facts.get("pruning")) is not None:
        before, after = pruned["before"], pruned["after"]
        lines.append(
            f"{pruned['amount']:g} of the channels pruned: {before['parameters'] / 1e6:.1f} to "
            f"{after['parameters'] / 1e6:.1f} M parameters, {before['macs'] / 1e9:.2f} to {after['macs'] / 1e9:.2f} G "
            f"multiply-accumulates; best: {pruned['best']}."
        )
    return "\n\n".join(lines)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
