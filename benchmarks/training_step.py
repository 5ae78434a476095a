"""How fast a full fine-tuning step is here, and how much of it the training loop keeps.

    python benchmarks/training_step.py --model resnet50 --repeats 5

Prints two ratios, each from interleaved runs (A B A B …, medians):
1. this program's step (bf16 where the CPU computes in it, channels-last, fused AdamW) against the loop a user would
   write (fp32, NCHW, torch.optim.AdamW), both on one resident batch;
2. the program's training loop, fed from the pixel cache with augmentation on, against its own step on one resident
   batch. Films are synthetic: their content does not change the time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import synthetic
import train
from config import Config, resolve
from data_preprocessing import Batch
from models import create_model
from runtime import resolve_device, resolve_precision


def plain_step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """One step of the loop most tutorials show."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def own_step(fit: train.Fit, batch: Batch) -> Callable[[], None]:
    """One step of the program's loop on a batch that is already there."""

    def step() -> None:
        fit.standing.batch = 0
        fit._begin_epoch()
        fit._backward(batch, share=1.0)
        fit._step()

    return step


def loop_epoch(fit: train.Fit, source: Callable[[list], Iterator[Batch]], batches: int) -> float:
    """Films per second of the program's own epoch loop over `source`."""
    fit.loader = source
    fit.standing.batch, fit.standing.loss_sum = 0, 0.0
    started = time.perf_counter()
    with train.StopRequest() as stop:
        fit._train_epoch(stop)
    assert fit.standing.batch == batches
    return batches * fit.config.data.batch_size / (time.perf_counter() - started)


def timed(step: Callable[[], None], films: int) -> float:
    """Films per second of one call."""
    started = time.perf_counter()
    step()
    return films / (time.perf_counter() - started)


def report(name: str, a: list[float], b: list[float], what: tuple[str, str]) -> None:
    """The medians, and the median of the pairwise ratios a / b."""
    ratio = statistics.median(x / y for x, y in zip(a, b))
    print(
        f"{name}: {what[0]} {statistics.median(a):.1f} films/s, {what[1]} {statistics.median(b):.1f} films/s, "
        f"ratio {ratio:.3f} (of {len(a)} pairs: {min(x / y for x, y in zip(a, b)):.3f} to "
        f"{max(x / y for x, y in zip(a, b)):.3f})"
    )


def make_fit(config: Config, folder: Path) -> train.Fit:
    """A run ready to step."""
    device = resolve_device(config.runtime.device)
    precision = resolve_precision(config.runtime.precision, device)
    return train.Fit(config, train.prepare(config), folder=folder, device=device, precision=precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=6, help="batches of one timed epoch of the loop")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    size, batches = arguments.batch_size, arguments.batches
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patients = size * batches // 4 + 8
        synthetic.write_dataset(folder / "films", patients_per_class={"train": patients, "val": 12}, size=224)
        config = resolve(
            {
                "data.data_dir": str(folder / "films"),
                "data.cache_dir": str(folder),
                "data.batch_size": size,
                "data.test_fraction": 0.0,
                "model.model_type": arguments.model,
                "model.pretrained": False,
                "runtime.device": "cpu",
            }
        )
        fit = make_fit(config, folder)
        batch = next(fit.loader(fit._requests()))
        labels = batch.labels_B
        images = fit.to_input(batch.inputs).contiguous(memory_format=torch.contiguous_format)
        plain = plain_step(create_model(arguments.model, 2, False), images, labels)

        ours = own_step(fit, batch)
        count = len(fit._requests())
        fast = fit.loader
        measured: dict[str, list[float]] = {"plain": [], "ours": [], "loop": [], "resident": []}
        for repeat in range(arguments.repeats + 1):
            row = {
                "plain": timed(plain, size),
                "ours": timed(ours, size),
                "loop": loop_epoch(fit, fast, count),
                "resident": loop_epoch(fit, lambda requests: itertools.repeat(batch, len(requests)), count),
            }
            for key, value in row.items():
                if repeat:  # the first round warms up
                    measured[key].append(value)
    threads = torch.get_num_threads()
    print(f"{arguments.model}, batch {size}, {threads} threads, {fit.precision}, torch {torch.__version__}")
    report("full fine-tuning step", measured["ours"], measured["plain"], ("this program", "plain fp32 NCHW loop"))
    report("training loop", measured["loop"], measured["resident"], ("from the cache", "resident batch"))


if __name__ == "__main__":
    main()
