"""Fine-tuning steps of the published networks, whole and last stage only, against the loop a user would write.

    python benchmarks/finetune_step.py --models resnet50 efficientnet_b4 densenet121 --repeats 3

Prints, each from interleaved runs (A B A B …, medians):
1. whole network: this program's step against fp32, NCHW, torch.optim.AdamW, on one resident batch;
2. last stage open: this program's step on cached outputs of the frozen stages against the same plain loop with the same
   parameters frozen; and the ratio over a whole run, with the one pass that fills the cache counted in.
Films are synthetic: their content does not change the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training_step import make_fit, own_step, plain_step, report, timed

import synthetic
import train
from config import Config, resolve
from data_preprocessing import Request
from feature_cache import cut_model, engine_candidates
from models import create_model
from runtime import peak_memory_mb


def configured(model: str, folder: Path, *, batch_size: int, tail: bool) -> Config:
    """A run on the synthetic films: the whole network, or the last stage on cached features."""
    frozen = {"model.freeze_backbone": True, "training.unfreeze_schedule": {1: 1}} if tail else {}
    return resolve(
        {
            "data.data_dir": str(folder / "films"),
            "data.cache_dir": str(folder),
            "data.batch_size": batch_size,
            "data.test_fraction": 0.0,
            "model.model_type": model,
            "model.pretrained": False,
            "runtime.device": "cpu",
            "runtime.output_dir": str(folder / "run"),
            **frozen,
        }
    )


def paired(name: str, fit: train.Fit, model: str, *, tail: bool, repeats: int) -> tuple[float, float]:
    """Print the ratio of the two steps; films per second of (this program, the plain loop), medians."""
    size = fit.config.data.batch_size
    films = next(iter(fit.loader(fit._requests()[:1])))
    images = fit.to_input(films.inputs).contiguous(memory_format=torch.contiguous_format)
    other = create_model(model, 2, False, freeze_backbone=tail)
    if tail:
        other.unfreeze_layers(num_layers=1)
    plain = plain_step(other.train(), images, films.labels_B)
    ours = own_step(fit, next(iter(fit._batches(fit._requests()[:1]))))
    a, b = [], []
    for repeat in range(repeats + 1):
        row = timed(ours, size), timed(plain, size)
        if repeat:  # the first round warms up
            a.append(row[0])
            b.append(row[1])
    report(name, a, b, ("this program", "plain fp32 NCHW loop"))
    return sorted(a)[len(a) // 2], sorted(b)[len(b) // 2]


def tail_run(fit: train.Fit, ours: float, plain: float, *, epochs: int) -> None:
    """Print the ratio over a run of `epochs` epochs, the pass through the frozen stages counted in."""
    assert fit.features is not None
    cut = cut_model(fit.model, fit.prepared.spec)
    films = fit.prepared.val_set[Request(0, np.arange(min(32, len(fit.prepared.val_set))))].inputs.numpy()
    makers = engine_candidates(cut, films.shape[1:], device=fit.device, precision=fit.precision)
    engine = makers[fit.features.engine]()
    engine(films)
    extraction = max(timed(lambda: engine(films), len(films)) for _ in range(2))
    seconds = fit.features.views / extraction + epochs / ours
    print(
        f"  a run of {epochs} epochs: {fit.features.views} views at {extraction:.1f} films/s on "
        f"{fit.features.engine}, then steps: {epochs / plain / seconds:.2f} times the plain loop"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "efficientnet_b4", "densenet121"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50, help="of the run that the tail's ratio is stated for")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--only", choices=("whole", "tail"), default=None)
    arguments = parser.parse_args()
    print(f"batch {arguments.batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), arguments.batch_size
        counts = {"train": max(24, size // 2), "val": 12}
        synthetic.write_dataset(folder / "films", patients_per_class=counts, size=arguments.size)
        for model in arguments.models:
            if arguments.only != "tail":
                fit = make_fit(configured(model, folder, batch_size=size, tail=False), folder)
                label = f"{model}, whole network, {fit.precision}"
                paired(label, fit, model, tail=False, repeats=arguments.repeats)
            if arguments.only != "whole":
                fit = make_fit(configured(model, folder, batch_size=size, tail=True), folder)
                fit._open_stages()
                if fit.features is None:
                    print(f"{model}, last stage: the frozen stages cannot be cached ({fit._no_cache})")
                    continue
                label = f"{model}, last stage on cached features, {fit.precision}"
                ours, plain = paired(label, fit, model, tail=True, repeats=arguments.repeats)
                tail_run(fit, ours, plain, epochs=arguments.epochs)
    print(f"peak memory of this process {peak_memory_mb(torch.device('cpu')):.0f} MiB")


if __name__ == "__main__":
    main()
