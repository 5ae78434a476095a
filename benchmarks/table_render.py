"""The four tables as Markdown and figures, from the results that benchmarks/tables.py kept. Measures nothing."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import plots

Record = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Record]]
"""Row → part → record."""
MODELS = {
    "resnet50_frozen": ("ResNet-50, frozen", (0.852, 0.91, 12)),
    "resnet50": ("ResNet-50, fine-tuned", (0.925, 0.96, 12)),
    "efficientnet_b4": ("EfficientNet-B4", (0.938, 0.97, 18)),
    "densenet121": ("DenseNet-121", (0.913, 0.95, 10)),
    "multimodal": ("film and note", (0.951, 0.98, 25)),
    "lite0_frozen": ("`tf_efficientnet_lite0`, frozen", None),
    "lite0": ("`tf_efficientnet_lite0`, fine-tuned", None),
}
"""Row → its name, and what was published: accuracy, AUROC, milliseconds a film."""
SIZES = {"resnet50": (98, 25, 0.4, 2.1), "efficientnet_b4": (77, 20, 0.6, 1.9)}
"""Network → what was published of its quantised form: MB before and after, points of accuracy lost, speed-up."""
VARIANTS = {"quantised": "quantised to INT8", "pruned": "pruned 30 %", "both": "pruned and quantised"}
WAYS = {
    "fp32": "fp32, all layers",
    "mixed": "bf16, all layers",
    "two_processes": "bf16, all layers, 2 processes",
    "frozen": "bf16, frozen, no cache",
    "frozen_cached": "frozen, features cached",
}
PEERS = {
    "this_program": "this program",
    "plain_loop": "PyTorch and timm",
    "lightning_loop": "Lightning",
    "fastai_loop": "fastai",
}
SIDES = {
    "bundle": "this program's bundle",
    "torch": "torch fp32",
    "torch bf16": "torch bf16, channels last",
    "onnxruntime": "ONNX Runtime fp32",
}
LOGARITHMIC_FROM = 15
"""Panels whose values differ by more than this factor get a logarithmic axis."""
EPOCH_FILMS = 4471
"""Training films of the chest X-ray pneumonia set, validation held out."""


def render(records: Sequence[Record], figures: Path, *, page_folder: Path | None = None) -> str:
    """The tables that have results, as Markdown for a page in `page_folder` (by default that above the figures).

    One SVG each is written under `figures`.
    """
    if not records:
        return "nothing measured yet"
    figures.mkdir(parents=True, exist_ok=True)
    link = Path(os.path.relpath(figures, page_folder or figures.parent)).as_posix()
    parts = []
    for number, (title, write) in enumerate(TABLES, start=1):
        rows: dict[str, dict[str, Record]] = {}
        for record in records:
            if record["table"] == number:
                rows.setdefault(record["row"], {})[record["part"]] = record
        text = write(rows, figures / f"table{number}.svg") if rows else ""
        if text:
            place = f"{link}/table{number}.svg"
            shown = f"![{title}]({place})\n\n" if (figures / f"table{number}.svg").exists() else ""
            parts.append(f"### {title}\n\n{measured_on(rows)}\n\n{shown}{text}")
    return "\n\n".join(parts)


def measured_on(rows: Rows) -> str:
    """Dates, machine and command of a table."""
    records = [record for parts in rows.values() for record in parts.values()]
    dates = sorted({record["date"][:10] for record in records})
    machines = {(record["machine"]["cores"], record["machine"]["cpu"] or "a CPU") for record in records}
    where = " and ".join(f"{cores} cores of {cpu}" for cores, cpu in sorted(machines))
    command = min((record["command"].rsplit(" --rows ", 1)[0] for record in records), key=len)
    smoke = " **A smoke run: tiny networks on a few films.**" if any(record["smoke"] for record in records) else ""
    busy = max(record["load_before"] for record in records)
    return (
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} on {where}, load before a row at "
        f"most {busy:.1f}.{smoke} One row: `{command} --rows ROW`."
    )


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(estimate: Mapping[str, Any] | None, *, scale: float = 1.0, digits: int = 3, sign: bool = False) -> str:
    """0.912 (0.880 to 0.940); a dash for what is not there."""
    key = "value" if estimate and "value" in estimate else "difference"
    if estimate is None or estimate.get(key) is None:
        return "–"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    shown = form.format(scale * estimate[key]).replace("-", "−")
    low, high = estimate.get("ci_low"), estimate.get("ci_high")
    if low is None or high is None:
        return shown
    ends = " to ".join(form.format(scale * end).replace("-", "−") for end in (low, high))
    return f"{shown} ({ends})"


def spread(values: Sequence[float], *, digits: int = 1, unit: str = "") -> str:
    """Median and range of the rounds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}{unit}"
    return f"{statistics.median(values):.{digits}f}{unit} ({min(values):.{digits}f}–{max(values):.{digits}f})"


# --- figures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One kind of mark in a panel: values by row, NaN where there is none, with interval ends or none."""

    name: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def dots(labels: Sequence[str], panels: Mapping[str, Sequence[Series]], path: Path) -> None:
    """Rows as marks in panels side by side, one unit a panel; the first row on top."""
    height = 1.1 + 0.34 * len(labels)
    figure, axes = plots._figure(2.4 + 2.9 * len(panels), height, 1, len(panels), sharey=True)
    places = np.arange(len(labels))[::-1]
    for axis, (unit, series) in zip(axes, panels.items()):
        for number, one in enumerate(series):
            colour, offset = plots.STYLES[number][0], 0.12 * (number - (len(series) - 1) / 2)
            values, at = np.asarray(one.values, dtype=float), places - offset
            axis.plot(values, at, plots.MARKERS[number], color=colour, markersize=4.5, label=one.name)
            if one.low is not None and one.high is not None:
                axis.hlines(at, one.low, one.high, color=colour, linewidth=1.0)
        plots._label(axis, unit, "")
        known = np.concatenate([one.values for one in series])
        known = known[np.isfinite(known)]
        if len(known) and 0 < LOGARITHMIC_FROM * known.min() < known.max():
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:,g}")  # dollars are plain in these figures: no powers of ten
        if len(series) > 1:
            axis.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    axes[0].set_yticks(places, [label.replace("`", "") for label in labels])
    axes[0].set_ylim(-0.6, len(labels) - 0.4)
    plots._save(figure, path)


def _estimates(name: str, found: Sequence[Mapping[str, Any] | None]) -> Series:
    """A series of estimates with their intervals."""

    def column(key: str) -> list[float]:
        return [float("nan") if item is None or item.get(key) is None else float(item[key]) for item in found]

    key = "value" if any(item and "value" in item for item in found) else "difference"
    return Series(name, column(key), column("ci_low"), column("ci_high"))


def _rates(name: str, rounds: Sequence[Sequence[float]]) -> Series:
    """A series of medians with the range of the rounds."""
    return Series(
        name, [statistics.median(one) for one in rounds], [min(one) for one in rounds], [max(one) for one in rounds]
    )


# --- table 1 ---------------------------------------------------------------------------------------------------


def performance(rows: Rows, figure: Path) -> str:
    """Models on the test films, published figures beside."""
    shown = [row for row in MODELS if "measure" in rows.get(row, {})]
    if not shown:
        return ""
    results = {row: rows[row]["measure"]["result"] for row in shown}
    lines = [
        [
            MODELS[row][0],
            *(
                interval(results[row]["metrics"][name])
                for name in ("auc_roc", "accuracy", "precision", "sensitivity", "f1")
            ),
            _at_half(results[row]),
            f"{results[row]['latency']['network_ms']:.1f}",
            _promised(row),
        ]
        for row in shown
    ]
    headings = ["model", "AUROC", "accuracy", "precision", "recall", "F1", "accuracy at 0.5", "ms a film"]
    metrics = [results[row]["metrics"] for row in shown]
    promised = [MODELS[row][1] or (float("nan"),) * 3 for row in shown]
    panels = {
        "AUROC": [
            _estimates("measured", [item["auc_roc"] for item in metrics]),
            Series("published", [item[1] for item in promised]),
        ],
        "Accuracy": [
            _estimates("measured", [item["accuracy"] for item in metrics]),
            Series("published", [item[0] for item in promised]),
        ],
    }
    dots([MODELS[row][0] for row in shown], panels, figure)
    note = (
        "Intervals are 95 %, clustered by patient; accuracy, precision, recall and F1 at the threshold that validation "
        "chose; ms: the network alone, one film, torch on this CPU (the published ones name no machine)."
    )
    remarks = "\n".join(
        f"- {MODELS[row][0]}: {_remark(row, results[row], rows[row].get('train', {}).get('result', {}))}."
        for row in shown
    )
    return markdown([*headings, "published: accuracy, AUROC, ms"], lines) + f"\n\n{note}\n\n{remarks}"


def _at_half(result: Mapping[str, Any]) -> str:
    found = (result.get("at_0.5") or {}).get("accuracy")
    return interval(found if isinstance(found, Mapping) else None if found is None else {"value": found})


def _promised(row: str) -> str:
    published = MODELS[row][1]
    return "–" if published is None else f"{100 * published[0]:.1f} %, {published[1]:.2f}, {published[2]}"


def _remark(row: str, result: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """What the row is, and why it misses where it does."""
    said = [*_trained_by(training), f"{result['n']} films of {result['n_patients']} patients"]
    if training:
        epochs = f" of {training['epochs']}" if "epochs" in training else ""
        said.append(f"{training['image_size']} px, epoch {training['epoch']}{epochs}")
        said.append("ImageNet weights" if training["weights"] else "random weights: no ImageNet weights at hand")
    if row == "multimodal":
        said.append("COVID-19 against other findings, for no note exists for the other films")
    published = MODELS[row][1]
    if published is None:
        return "; ".join(said)
    accuracy, area = (result["metrics"][name]["value"] for name in ("accuracy", "auc_roc"))
    missed = [
        name
        for name, value, promised in (("accuracy", accuracy, published[0]), ("AUROC", area, published[1]))
        if value is None or value < promised
    ]
    if missed:
        # With ImageNet weights given, the reason of a row meant to begin from random ones would not be true.
        known = row == "multimodal" or training.get("weights") is False
        said.append(f"misses {' and '.join(missed)}" + (f": {WHY[row]}" if known else ""))
    return "; ".join(said)


def _trained_by(training: Mapping[str, Any]) -> list[str]:
    """The command that trained the model of a row."""
    if "command" not in training:
        return []
    before = ", trained before" if training.get("trained") == "before" else ""
    return [f"`python main.py {' '.join(training['command'])}`{before}"]


FEW = "a few epochs on small films, nothing learned before"
WHY = {
    "resnet50_frozen": "only a head was trained, on features of a network that has learned nothing",
    **dict.fromkeys(("resnet50", "efficientnet_b4", "densenet121"), FEW),
    "multimodal": "another task, on few patients, with both encoders frozen",
}
"""Why a row that misses does so."""


# --- table 2 ---------------------------------------------------------------------------------------------------


def compression(rows: Rows, figure: Path) -> str:
    """What quantising and pruning cost and gain."""
    networks = [row for row in rows if {"accuracy", "speed"} <= set(rows[row])]
    if not networks:
        return ""
    lines, labels = [], []
    lost: dict[str, list[Any]] = {"validation": [], "test": []}
    fast: dict[str, list[list[float]]] = {"batch 16": [], "one film": []}
    for network in networks:
        facts, rates = (rows[network][part]["result"] for part in ("accuracy", "speed"))
        for variant, words in VARIANTS.items():
            speed = {batch: _ratios(rates["films_per_s"][batch], variant, "torch") for batch in ("16", "1")}
            alone = _ratios(rates["films_per_s"]["16"], variant, "exported")
            found = facts["lost"][variant]
            sizes = facts["megabytes"]
            lines.append(
                [
                    f"{network}, {words}",
                    f"{sizes['before']:.1f} → {sizes[variant]:.1f} MB",
                    *(interval(found[split]["accuracy"], scale=100, digits=2, sign=True) for split in ("val", "test")),
                    interval(found["test"]["auc_roc"], digits=4, sign=True),
                    spread(speed["16"], unit="×"),
                    spread(speed["1"], unit="×"),
                    spread(alone, unit="×"),
                    _promised_size(
                        network,
                        variant,
                        megabytes=sizes[variant],
                        lost=found["val"]["accuracy"],
                        times=statistics.median(speed["16"]),
                    ),
                ]
            )
            labels.append(f"{network}, {variant}")
            lost["validation"].append(_scaled(found["val"]["accuracy"], 100))
            lost["test"].append(_scaled(found["test"]["accuracy"], 100))
            fast["batch 16"].append(speed["16"])
            fast["one film"].append(speed["1"])
    dots(
        labels,
        {
            "Times as fast as eager torch fp32": [_rates(name, rounds) for name, rounds in fast.items()],
            "Accuracy lost (points)": [_estimates(name, found) for name, found in lost.items()],
        },
        figure,
    )
    headings = ["network", "size", "accuracy lost on validation", "on test", "AUROC lost on test"]
    headings += ["speed-up at batch 16", "at batch 1", "at batch 16 over the exported float file", "published"]
    note = (
        "Losses are in points (positive is lost), paired, 95 % clustered by patient, each side at its own threshold; "
        "speed-ups against eager torch fp32, all variants in OpenVINO, in turns, median and range of the rounds; the "
        "last ratio leaves out what the engine alone gives. The networks: "
    )
    return markdown(headings, lines) + f"\n\n{note}{'; '.join(_compressed(row, rows[row]) for row in networks)}."


def _compressed(network: str, parts: Mapping[str, Record]) -> str:
    """The network that was compressed."""
    facts = parts["accuracy"]["result"]["weights"]
    start = "ImageNet weights" if facts["weights"] else "random weights"
    return f"{network} at {facts['image_size']} px from {start}, epoch {facts['epoch']}"


def _ratios(rates: Mapping[str, Sequence[float]], above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(rates[above], rates[below])]


def _scaled(estimate: Mapping[str, Any], scale: float) -> dict[str, Any]:
    return {
        key: None if estimate[key] is None else scale * estimate[key] for key in ("difference", "ci_low", "ci_high")
    }


def _promised_size(network: str, variant: str, *, megabytes: float, lost: Mapping[str, Any], times: float) -> str:
    """What was published of this row, and where it is missed on validation, at batch 16."""
    if variant != "quantised" or network not in SIZES:
        return "–"
    before, after, points, speed_up = SIZES[network]
    said = f"{before} → {after} MB, {points} points, {speed_up}×"
    missed = ["size"] if round(megabytes) > after else []
    missed += ["speed-up"] if times < speed_up else []
    if round(100 * lost["difference"], 2) > points:
        inside = 100 * lost["ci_low"] <= points
        missed.append("accuracy, " + ("though its interval holds the promise" if inside else "by what rounding costs"))
    return said + (f"; misses {' and '.join(missed)}" if missed else "")


# --- table 3 ---------------------------------------------------------------------------------------------------


def training(rows: Rows, figure: Path) -> str:
    """How fast training is, by the way it is done."""
    shown = [row for row in WAYS if row in rows]
    if not shown:
        return ""
    rounds = {row: [record["result"] for _, record in sorted(rows[row].items())] for row in shown}
    rates = {row: [item["images_per_s"] for item in found] for row, found in rounds.items()}
    base = statistics.median(rates[shown[0]])
    lines = []
    for row in shown:
        rate = statistics.median(rates[row])
        memory = [max(item["largest_process_mb"], item["peak_memory_mb"]) for item in rounds[row]]
        whole = [item["whole_command_s"] for item in rounds[row]]
        lines.append(
            [
                WAYS[row],
                spread(rates[row]),
                f"{rate / base:.2f}×",
                f"{EPOCH_FILMS / rate:.0f} s",
                spread(whole, digits=0, unit=" s"),
                f"{statistics.median(memory):.0f} MiB",
            ]
        )
    memory_gb = [statistics.median([item["largest_process_mb"] for item in rounds[row]]) / 1024 for row in shown]
    panels = {
        "Films per second": [_rates("", [rates[row] for row in shown])],
        "Peak memory of a process (GiB)": [Series("", memory_gb)],
    }
    dots([WAYS[row] for row in shown], panels, figure)
    headings = ["ResNet-50, 224 px, 32 films a step", "films/s", f"against {WAYS[shown[0]]}"]
    headings += [f"epoch of {EPOCH_FILMS:,} films", "whole command of 2 epochs", "peak memory of a process"]
    note = (
        "Films per second of the second epoch, loading and augmentation included, median and range of the rounds, in "
        "turns; the epoch is scaled from it, without validation. With features cached, each film goes through the "
        "frozen layers once, before the first epoch: that is in the whole command (256 training films), not the epoch. "
        "Of 2 processes each has half the cores: they are for machines with several GPUs."
    )
    return markdown(headings, lines) + f"\n\n{note}"


# --- table 4 ---------------------------------------------------------------------------------------------------


def beside(rows: Rows, figure: Path) -> str:
    """Beside what users would otherwise run: training, inference, serving."""
    parts = [part for part in (_race(rows, figure), _engines(rows), _servers(rows)) if part]
    return "\n\n".join(parts)


def _race(rows: Rows, figure: Path) -> str:
    shown = [peer for peer in PEERS if peer in rows]
    if not shown:
        return ""
    rounds = {peer: [record["result"] for _, record in sorted(rows[peer].items())] for peer in shown}
    rates = {peer: [item["images_per_s"] for item in found] for peer, found in rounds.items()}
    reached = {peer: [item["seconds_to_target"] or float("inf") for item in found] for peer, found in rounds.items()}
    lines = [
        [
            PEERS[peer],
            spread(rates[peer]),
            spread(reached[peer], digits=0) if np.isfinite(reached[peer]).all() else "not reached",
            ", ".join(f"{item['epochs'][-1]['auroc']:.4f}" for item in rounds[peer]),
            f"{statistics.median(item['largest_process_mb'] for item in rounds[peer]):.0f} MiB",
        ]
        for peer in shown
    ]
    panels = {
        "Films per second": [_rates("", [rates[peer] for peer in shown])],
        "Seconds to AUROC 0.95": [_rates("", [_finite(reached[peer]) for peer in shown])],
    }
    dots([PEERS[peer] for peer in shown], panels, figure)
    task = rounds[shown[0]][0]["task"]
    note = (
        f"{task['model']}, all layers, {task['image_size']} px, {task['batch_size']} films a step, {task['epochs']} "
        f"epochs, peak rate {task['learning_rate']:g}, {task['threads']} threads; seconds from the start of the "
        "process, judged after each epoch. bf16 but in fastai, whose mixed precision is CUDA's; "
        "this program decodes each film once, before the first epoch: that is in its seconds, not in its films/s. The "
        "others: `pip install -r benchmarks/peers/requirements.txt`. "
    )
    headings = ["training", "films/s", "s to validation AUROC 0.95", "AUROC at the end", "peak memory"]
    return markdown(headings, lines) + f"\n\n{note}{_where_peers_win(rates, reached)}"


def _finite(values: Sequence[float]) -> list[float]:
    return [value if np.isfinite(value) else float("nan") for value in values]


def _where_peers_win(rates: Mapping[str, Sequence[float]], reached: Mapping[str, Sequence[float]]) -> str:
    """By medians."""
    if "this_program" not in rates:
        return ""
    own = {name: statistics.median(values["this_program"]) for name, values in (("r", rates), ("s", reached))}
    won = [f"{PEERS[peer]} in films/s" for peer in rates if statistics.median(rates[peer]) > own["r"]]
    won += [f"{PEERS[peer]} in time" for peer in reached if statistics.median(reached[peer]) < own["s"]]
    return _ahead(won)


def _ahead(won: Sequence[str]) -> str:
    return f"Ahead of this program: {', '.join(won)}." if won else "By medians none is ahead of this program here."


def _engines(rows: Rows) -> str:
    lines, ahead = [], []
    for row, parts in rows.items():
        if not row.startswith("engines_"):
            continue
        rates = parts["speed"]["result"]["films_per_s"]
        for side, words in SIDES.items():
            cells = [spread(rates[batch][side]) for batch in ("16", "1")]
            ratios = [
                "–" if side == "bundle" else spread(_ratios(rates[batch], "bundle", side), unit="×")
                for batch in ("16", "1")
            ]
            if min(statistics.median(_ratios(rates[batch], "bundle", side)) for batch in ("16", "1")) < 1:
                ahead.append(f"{words} ({row.removeprefix('engines_')})")
            lines.append([f"{row.removeprefix('engines_')}, {words}", *cells, *ratios])
    if not lines:
        return ""
    headings = ["inference", "films/s, batch 16", "batch 1", "bundle over it, batch 16", "batch 1"]
    return f"{markdown(headings, lines)}\n\n{_ahead(ahead)}"


def _servers(rows: Rows) -> str:
    lines, ahead = [], []
    for row, parts in rows.items():
        if not row.startswith("server_"):
            continue
        found = parts["serve"]["result"]
        for kind, words in (
            ("fastapi", "plain FastAPI handler, torch fp32"),
            ("litserve", "LitServe, the same engine"),
        ):
            if kind not in found:
                continue
            ours, theirs = zip(*found[kind]["pairs"])
            ratios = [a / b for a, b in found[kind]["pairs"]]
            cells = [spread(ours), spread(theirs), spread(ratios, digits=2, unit="×")]
            lines.append([f"{row.removeprefix('server_')} against {words}", *cells])
            if statistics.median(ratios) < 1:
                ahead.append(f"{words} ({row.removeprefix('server_')})")
    if not lines:
        return ""
    headings = ["serving, 16 clients", "this server, films/s", "the other", "ratio"]
    return f"{markdown(headings, lines)}\n\n{_ahead(ahead)}"


TABLES = (
    ("Model performance on the test films", performance),
    ("What compression costs and gains", compression),
    ("How fast training is", training),
    ("Beside what users would otherwise run", beside),
)
