"""The rows of the four tables as jobs: what each calls, on what, and what it keeps. See benchmarks/tables.py."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import table_measures as measures
from checkpoint import load as read_checkpoint
from errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
LITE = "tf_efficientnet_lite0"
NETWORKS = ("resnet50", "efficientnet_b4", "densenet121")
PEERS = ("this_program", "plain_loop", "lightning_loop", "fastai_loop")
FROM_RANDOM = (
    *("--recipe", "robust", "--no-pretrained", "--image-size", "160"),
    *("--set", "training.monitor=auc_roc", "--set", "training.monitor_mode=max"),
)
"""The cheapest fair way from random weights on a CPU: small films that grow, bf16, crops, a moving average; no MixUp,
which wants more epochs than these. Judged by AUROC: the loss of a network this young is mostly its temperature's,
which is fitted afterwards."""


@dataclass(frozen=True)
class Options:
    """Where things are, and how long the measuring may take."""

    films: Path | None
    weights: Path | None
    notes: Path | None
    text_model: Path | None
    work: Path
    recipe: str
    checkpoints: dict[str, Path]
    """Row of table 1, or network of table 2 → a checkpoint made before."""
    bundles: dict[str, Path]
    pruned: dict[str, Path]
    serving: dict[str, Path]
    """Network → what benchmarks/serve.py --json kept."""
    peer_python: Path
    prune_epochs: int
    rounds: int
    smoke: bool

    @property
    def data(self) -> list[str]:
        """The flag that names the films."""
        if self.smoke:
            counts = {"train": 80, "val": 44, "test": 24}
            return ["--manifest", str(self._subset("films", counts))]
        return ["--data-dir", str(needed(self.films, "--films"))]

    @property
    def few(self) -> list[str]:
        """A stated part of the films, for what is timed and not judged."""
        counts = {"train": 64, "val": 44} if self.smoke else {"train": 256, "val": 64}
        return ["--manifest", str(self._subset("few", counts)), "--set", "data.test_fraction=0"]

    @property
    def for_peers(self) -> Path:
        """The films of the race to a validation AUROC."""
        counts = {"train": 64, "val": 44} if self.smoke else {"train": 1024, "val": 745}
        return self._subset("peers", counts)

    def _subset(self, name: str, counts: dict[str, int]) -> Path:
        path = self.work / f"{name}.csv"
        if not path.exists():
            measures.subset(needed(self.films, "--films"), path, counts)
        return path

    def model(self, name: str) -> str:
        """The network of a row; in a smoke run one of a few thousand weights."""
        return {"resnet50": "test_resnet"}.get(name, "test_efficientnet") if self.smoke else name

    def words(self, words: Sequence[str]) -> list[str]:
        """Flags of a training; in a smoke run one epoch of small films follows and wins."""
        short = ["--epochs", "1", "--image-size", "64", "--batch-size", "16"]
        quick = ["--set", "training.progressive_resizing=0"]
        return [*words, *short, *quick] if self.smoke else list(words)

    def without_places(self, words: Sequence[str]) -> list[str]:
        """A command with the paths of this machine by the names of what is there."""
        named = {"FILMS": self.films, "WEIGHTS": self.weights, "NOTES": self.notes, "MINILM": self.text_model}
        names = {str(path): name for name, path in named.items() if path}
        return [names.get(word, word) for word in words]

    def checkpoint(self, row: str) -> Path:
        """The trained model of a row: one given, else that of this folder."""
        if row in self.checkpoints:
            return self.checkpoints[row]
        made = self.work / row / "run" / "best_model.pth"
        if not made.exists():
            raise ConfigError(f"{row}: no trained model yet; run table 1 first, or give --checkpoint {row}=FILE")
        return made


def needed(value: Path | None, flag: str) -> Path:
    """`value`; ConfigError when it was not given."""
    if value is None:
        raise ConfigError(f"this row needs {flag}")
    return value


@dataclass(frozen=True)
class Job:
    """One thing to measure; its result is kept under its name."""

    table: int
    row: str
    part: str
    work: Callable[[Options], dict[str, Any]]
    minutes: float
    """Expected, on two cores alone."""

    @property
    def name(self) -> str:
        return f"{self.table}.{self.row}.{self.part}"


def jobs(options: Options) -> list[Job]:
    """All of them, in the order they run: rounds of what is compared take turns (A B A B …)."""
    return [*_performance(), *_compression(), *_training(options), *_peers(options)]


# --- processes -------------------------------------------------------------------------------------------------


def call(command: Sequence[str | Path], *, environment: dict[str, str] | None = None) -> tuple[str, float, float]:
    """Standard output, seconds and peak memory (MiB, of the largest process) of a command.

    A signal that ends this process is handed on first, and the command may save what it has.
    """
    log = os.environ.get("TABLES_LOG") or os.devnull
    started = time.perf_counter()
    with (
        Path(log).open("a") as errors,
        subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            text = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    if process.returncode:
        shown = " ".join(str(word) for word in command)
        raise RuntimeError(f"ended with {process.returncode}: {shown}; what it said is in {log}")
    return text, time.perf_counter() - started, usage.ru_maxrss / 1024


def verb(*words: str | Path) -> tuple[dict[str, Any], float, float]:
    """What a verb of main.py prints as JSON; seconds; peak memory."""
    text, seconds, memory = call([sys.executable, ROOT / "main.py", *words, "--json"])
    return json.loads(text), seconds, memory


def history(folder: Path) -> list[dict[str, float]]:
    """The epochs of a run folder."""
    with (folder / "history.csv").open(newline="") as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]


# --- table 1: models -------------------------------------------------------------------------------------------


def trained(options: Options, row: str, words: Sequence[str | Path], *, name: str = "train") -> dict[str, Any]:
    """Train into the row's folder, going on from what stands there; or take the checkpoint that was given."""
    command = options.without_places([name, *map(str, words)])
    if row in options.checkpoints:
        return {"trained": "before", "command": command, **_facts(options.checkpoints[row])}
    folder = options.work / row / "run"
    going_on = any(folder.glob("checkpoint_*.pth"))
    start = ["--resume", folder] if going_on else [*words, "--output-dir", folder]
    verb(name, *start)
    epochs = history(folder)
    return {
        "command": command,
        "epochs": len(epochs),
        "epochs_s": sum(epoch["seconds"] for epoch in epochs),
        **_facts(folder / "best_model.pth"),
    }


def _facts(checkpoint: Path) -> dict[str, Any]:
    content = read_checkpoint(checkpoint)
    config = content["config"]
    return {
        "model": config["model"]["model_type"],
        "image_size": config["data"]["image_size"],
        "weights": bool(config["model"]["weights"] or config["model"]["pretrained"]),
        "epoch": content["provenance"]["epoch"],
    }


def measured(options: Options, row: str) -> dict[str, Any]:
    """`evaluate` on the test films, and the time of one film."""
    checkpoint, folder = options.checkpoint(row), options.work / row / "evaluation"
    report, _, _ = verb("evaluate", "--checkpoint", checkpoint, "--output-dir", folder)
    kept = ("n", "n_patients", "operating_point", "metrics", "at_0.5")
    return {
        **{name: report.get(name) for name in kept},
        "latency": measures.latency(checkpoint, films=12 if options.smoke else 60),
    }


def _from_random(name: str, epochs: int) -> Callable[[Options], dict[str, Any]]:
    def work(options: Options) -> dict[str, Any]:
        words = ["--model", options.model(name), "--epochs", str(epochs), *FROM_RANDOM]
        return trained(options, name, options.words([*options.data, *words]))

    return work


def _frozen(options: Options) -> dict[str, Any]:
    words = ["--recipe", "resnet50_frozen", "--model", options.model("resnet50"), "--no-pretrained", "--epochs", "20"]
    words += ["--set", "training.cached_views=2"]
    return trained(options, "resnet50_frozen", options.words([*options.data, *words]))


def _lite_start(options: Options) -> list[str]:
    if options.smoke:
        return ["--model", options.model(LITE), "--no-pretrained"]
    return ["--model", LITE, "--weights", str(needed(options.weights, "--weights"))]


def _lite_frozen(options: Options) -> dict[str, Any]:
    words = [*options.data, *_lite_start(options), "--freeze-backbone", "--epochs", "20"]
    return trained(options, "lite0_frozen", options.words(words))


def _lite(options: Options) -> dict[str, Any]:
    words = [*options.data, *_lite_start(options), "--recipe", options.recipe]
    return trained(options, "lite0", options.words(words))


def _with_notes(options: Options) -> dict[str, Any]:
    words = ["--manifest", str(needed(options.notes, "--notes")), *_lite_start(options), "--freeze-backbone"]
    words += ["--text-model", str(needed(options.text_model, "--text-model")), "--fusion", "gated", "--epochs", "30"]
    return trained(options, "multimodal", options.words(words), name="train_multimodal")


TRAININGS: dict[str, tuple[Callable[[Options], dict[str, Any]], float]] = {
    "lite0": (_lite, 25),
    "lite0_frozen": (_lite_frozen, 2),
    "resnet50_frozen": (_frozen, 3),
    "multimodal": (_with_notes, 1),
    "resnet50": (_from_random("resnet50", 8), 15),
    "densenet121": (_from_random("densenet121", 8), 13),
    "efficientnet_b4": (_from_random("efficientnet_b4", 8), 18),
}
"""Row of table 1 → how it is trained, and the minutes that takes on two cores alone."""


def _performance() -> list[Job]:
    rows = []
    for row, (train, minutes) in TRAININGS.items():
        rows.append(Job(1, row, "train", train, minutes))
        rows.append(Job(1, row, "measure", partial(measured, row=row), 0.5))
    return rows


# --- table 2: optimisation -------------------------------------------------------------------------------------


def _made(options: Options, network: str) -> dict[str, Any]:
    return measures.make_variants(
        options.checkpoint(network),
        options.work / "variants" / network,
        bundle_made=options.bundles.get(network),
        pruned_made=options.pruned.get(network),
        prune_epochs=0 if options.smoke else options.prune_epochs,
    )


def _lost(options: Options, network: str) -> dict[str, Any]:
    checkpoint, folder = options.checkpoint(network), options.work / "variants" / network
    return {
        "megabytes": measures.megabytes(checkpoint, folder),
        "lost": measures.accuracy_lost(checkpoint, folder),
        "weights": _facts(checkpoint),
    }


def _sped_up(options: Options, network: str) -> dict[str, Any]:
    rounds = 2 if options.smoke else 6
    folder = options.work / "variants" / network
    return {"films_per_s": measures.variant_speeds(options.checkpoint(network), folder, rounds=rounds)}


def _compression() -> list[Job]:
    rows = []
    for network in NETWORKS:
        rows.append(Job(2, network, "make", partial(_made, network=network), 6))
        rows.append(Job(2, network, "accuracy", partial(_lost, network=network), 3))
        rows.append(Job(2, network, "speed", partial(_sped_up, network=network), 1.5))
    return rows


# --- table 3: training -----------------------------------------------------------------------------------------

TRAINING_WAYS: dict[str, tuple[str, list[str], float]] = {
    "fp32": ("train", ["--precision", "fp32"], 1.6),
    "mixed": ("train", ["--precision", "bf16"], 0.8),
    "two_processes": ("distributed", ["--precision", "bf16", "--nproc-per-node", "2", "--batch-size", "16"], 0.8),
    "frozen": ("train", ["--precision", "bf16", "--freeze-backbone", "--set", "training.feature_cache=false"], 0.4),
    "frozen_cached": ("train", ["--freeze-backbone", "--set", "training.cached_views=1"], 0.3),
}
"""Row of table 3 → verb, what it adds, minutes of a round. Two processes share the films of a step."""


def _timed(options: Options, way: str, number: int) -> dict[str, Any]:
    """Two epochs on the few films; the second is the figure, the first warms up."""
    name, words, _ = TRAINING_WAYS[way]
    folder = options.work / "training" / f"{way}{number}"
    epochs = 2
    start = [*options.few, "--model", options.model("resnet50"), "--no-pretrained", "--batch-size", "32"]
    if options.smoke:
        start += ["--image-size", "64"]
    start += ["--epochs", str(epochs), "--set", "training.input_gate=false", "--output-dir", str(folder)]
    _, seconds, memory = verb(name, *start, *words)
    last = history(folder)[-1]
    kept = {key: last[key] for key in ("images_per_s", "seconds", "peak_memory_mb")}
    return {**kept, "whole_command_s": seconds, "largest_process_mb": memory, "epochs": epochs}


def _training(options: Options) -> list[Job]:
    return [
        Job(3, way, f"round{number}", partial(_timed, way=way, number=number), minutes)
        for number in range(1, options.rounds + 1)
        for way, (_, _, minutes) in TRAINING_WAYS.items()
    ]


# --- table 4: peers --------------------------------------------------------------------------------------------

TARGET_AUROC = 0.95


def raced(options: Options, peer: str) -> dict[str, Any]:
    """The epochs of a peer on the common task, and the seconds until validation AUROC reaches the target."""
    folder = options.work / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    task = {
        "manifest": str(options.for_peers),
        "model": options.model(LITE),
        "weights": None if options.smoke else str(needed(options.weights, "--weights")),
        "image_size": 64 if options.smoke else 224,
        "batch_size": 32,
        "epochs": 2,
        "learning_rate": 3e-4,
        "threads": os.cpu_count(),
        "workers": os.cpu_count(),
    }
    (folder / "task.json").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")
    text, seconds, memory = call(
        [options.peer_python, ROOT / "benchmarks" / "peers" / f"{peer}.py", folder / "task.json"]
    )
    epochs = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    reached = [epoch["seconds"] for epoch in epochs if epoch["auroc"] >= TARGET_AUROC]
    return {
        "task": {name: value for name, value in task.items() if name not in ("manifest", "weights")},
        "epochs": epochs,
        "seconds_to_target": reached[0] if reached else None,
        "images_per_s": epochs[-1]["images_per_s"],
        "whole_command_s": seconds,
        "largest_process_mb": memory,
    }


def _engines(options: Options, network: str) -> dict[str, Any]:
    folder = options.bundles.get(network)
    if folder is None:
        folder = options.work / "bundles" / network
        if not (folder / "bundle.json").exists():
            budget = ["--max-auc-drop", "1", "--max-accuracy-drop", "1", "--max-sensitivity-drop", "1"]
            extra = budget if options.smoke else []
            verb("optimize", "--checkpoint", options.checkpoint(network), "--output-dir", folder, *extra)
    rounds = 2 if options.smoke else 6
    return {"films_per_s": measures.engine_speeds(options.checkpoint(network), folder, rounds=rounds)}


def _server(options: Options, network: str) -> dict[str, Any]:
    """The comparisons of benchmarks/serve.py, run here or taken from the file it kept."""
    if network in options.serving:
        return json.loads(options.serving[network].read_text(encoding="utf-8"))
    target = options.work / f"serving_{network}.json"
    words: list[str | Path] = ["--checkpoint", options.checkpoint(network), "--json", target]
    words += ["--skip", "latency", "overload", "memory"]
    if network in options.bundles:
        words += ["--bundle", options.bundles[network]]
    words += ["--seconds", "1" if options.smoke else "6", "--rounds", "1" if options.smoke else "2"]
    call([options.peer_python, ROOT / "benchmarks" / "serve.py", *words], environment={"OMP_WAIT_POLICY": "PASSIVE"})
    return json.loads(target.read_text(encoding="utf-8"))


def _peers(options: Options) -> list[Job]:
    races = [
        Job(4, peer, f"round{number}", partial(raced, peer=peer), 2.5)
        for number in range(1, options.rounds + 1)
        for peer in PEERS
    ]
    engines = [Job(4, f"engines_{name}", "speed", partial(_engines, network=name), 1) for name in NETWORKS[:2]]
    servers = [Job(4, f"server_{name}", "serve", partial(_server, network=name), 3) for name in NETWORKS[:2]]
    return [*races, *engines, *servers]
