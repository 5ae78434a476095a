"""What 30 epochs on frozen encoders cost beside one pass through each encoder per cached view.

    python benchmarks/multimodal_cost.py CASES.csv --weights FILE.safetensors --text-model FOLDER

Trains by `train_multimodal` with an empty cache and adds up the seconds of its parts: the passes through the frozen
encoders (one an augmented view and film, one a note), the steps of all epochs, validation, the checkpoint that every
epoch writes, and what comes after the last epoch (the whole network over the validation cases, the input gate). Prints
each part in seconds and as a share of the passes. Reads films and weights, keeps nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import checkpoint
from case_training import CaseFit, NoteFeatures, train_multimodal
from config import Config, resolve
from runtime import setup_logging

PARTS: dict[str, tuple[Any, str]] = {
    "both encoders, one pass a view": (CaseFit, "_choose_route"),
    "of it notes": (NoteFeatures, "_build"),
    "steps": (CaseFit, "_train_epoch"),
    "validation": (CaseFit, "_validation_logits"),
    "checkpoints": (checkpoint, "save"),
    "after the last epoch": (CaseFit, "_complete_with_whole_network"),
}
"""Part → what does it."""


@contextmanager
def timed(owner: Any, name: str, seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds up in `seconds[part]` what calls of `owner.name` take."""
    plain: Callable[..., Any] = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started

    setattr(owner, name, run)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def settings(arguments: argparse.Namespace, folder: Path) -> Config:
    """The run that is timed."""
    return resolve(
        {
            "data.manifest": arguments.manifest,
            "data.cache_dir": str(folder / "cache"),
            "model.model_type": arguments.model,
            "model.weights": arguments.weights,
            "model.freeze_backbone": True,
            "multimodal.text_model": arguments.text_model,
            "multimodal.fusion": arguments.fusion,
            "training.num_epochs": arguments.epochs,
            "training.early_stopping_patience": 0,
            "runtime.output_dir": str(folder / "run"),
        }
    )


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Part → seconds."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        for part, where in PARTS.items():
            stack.enter_context(timed(*where, seconds, part))
        config = settings(arguments, Path(name))
        # Films are decoded and engines chosen once a machine: neither is a pass through an encoder.
        train_multimodal(replace(config, training=replace(config.training, num_epochs=1)))
        for features in (Path(name) / "cache" / "features").iterdir():
            features.unlink()
        seconds.clear()
        train_multimodal(config)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("manifest", help="CSV with path,label,patient_id,text")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--text-model", required=True)
    parser.add_argument("--fusion", default="gated")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    setup_logging(quiet=True)
    torch.set_num_threads(arguments.threads)
    seconds = measure(arguments)
    whole = seconds["both encoders, one pass a view"]
    for part in PARTS:
        print(f"{part:32} {seconds.get(part, 0.0):7.1f} s {100 * seconds.get(part, 0.0) / whole:6.1f} %")


if __name__ == "__main__":
    main()
