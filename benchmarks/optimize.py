"""What a bundle is worth: its chosen engine against eager torch fp32, as a user has it before `optimize`.

    python benchmarks/optimize.py checkpoints/best_model.pth=optimized_models --rounds 12

Each argument is CHECKPOINT=BUNDLE. The two sides take turns (A B A B …) with the same number of threads, on the same
films of noise: plain torch gets normalised float32 NCHW tensors that are ready beforehand, the bundle gets uint8
films and normalises them itself. Prints medians and the median of the pairwise ratios, at batch 16 and batch 1, and
the sizes on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bundle
import predictor
from engines import InputScaling, TorchEngine
from models import Classifier

WARM_UP = 2


def plain_torch(checkpoint: Path) -> Classifier:
    """The trained network in eager torch, float32, NCHW."""
    engine = predictor.load(checkpoint, device="cpu", precision="fp32").engine
    assert isinstance(engine, TorchEngine)
    return engine.model.to(memory_format=torch.contiguous_format)


def seconds(call: Callable[[], object], *, repeats: int) -> float:
    """Wall time of one call, the mean of a few."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def weights_megabytes(checkpoint: Path) -> float:
    """Size of the weights in MB (10^6 bytes)."""
    state = torch.load(checkpoint, weights_only=True)["model_state_dict"]
    return float(sum(item.numel() * item.element_size() for item in state.values()) / 1e6)


def compare(checkpoint: Path, folder: Path, *, batch: int, rounds: int) -> dict[str, float]:
    """Films per second of both sides in turns, and the median ratio of the pairs."""
    stored = predictor.load(folder)
    model = plain_torch(checkpoint)
    side, channels = stored.spec.image_size, stored.spec.channels
    films = np.random.default_rng(0).integers(0, 256, (batch, side, side, channels), dtype=np.uint8)
    images = InputScaling(stored.spec)(torch.from_numpy(films)).contiguous(memory_format=torch.contiguous_format)
    repeats = max(1, 8 // batch)
    theirs, ours = [], []
    with torch.inference_mode():
        for turn in range(WARM_UP + rounds):
            stored.engine.outputs(films[:1])
            b = seconds(lambda: stored.engine.outputs(films), repeats=repeats)
            model(images[:1])
            a = seconds(lambda: model(images), repeats=repeats)
            if turn >= WARM_UP:
                theirs.append(batch / a)
                ours.append(batch / b)
    ratios = [mine / plain for mine, plain in zip(ours, theirs)]
    return {
        "torch": statistics.median(theirs),
        "bundle": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="CHECKPOINT=BUNDLE")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="of both sides; 0 leaves torch's choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} pairs")
    for pair in arguments.pairs:
        checkpoint, folder = (Path(name) for name in pair.split("=", 1))
        facts = json.loads((folder / bundle.FACTS).read_text(encoding="utf-8"))
        weights_mb = weights_megabytes(checkpoint)
        size = (folder / facts["file"]).stat().st_size / 1e6 if facts["file"] else weights_mb
        name = f"{facts['config']['model']['model_type']}, {facts['network']} network, {facts['engine']}"
        print(f"{name} {facts['precision']}: weights {weights_mb:.1f} MB, file {size:.1f} MB")
        for batch in (16, 1):
            found = compare(checkpoint, folder, batch=batch, rounds=arguments.rounds)
            print(
                f"  batch {batch}: torch fp32 {found['torch']:.1f} films/s, bundle {found['bundle']:.1f} films/s, "
                f"ratio {found['ratio']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"
            )


if __name__ == "__main__":
    main()
