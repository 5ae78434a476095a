"""How fast films are explained, against one forward and backward pass of the same network over the same films.

    python benchmarks/explain.py --model resnet50 --films 100 --pairs 2

Prints medians and the ratio of interleaved runs (A B A B …): A is `heat_map` (Grad-CAM, each film's most probable
class), B is forward and backward of the whole network as a user would write them. Films are random and weights too:
neither changes the time. Also prints the rate of pytorch-grad-cam called directly, once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attribution import heat_map, target_layer
from engines import InputScaling
from models import Classifier, create_model
from preprocess import PreprocessSpec
from runtime import resolve_device


def batches(films: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (films[start : start + size] for start in range(0, len(films), size))


def explained(model: Classifier, spec: PreprocessSpec, films: np.ndarray, size: int, device: torch.device) -> None:
    """A: every film's heat map."""
    for batch in batches(films, size):
        heat_map(model, spec, batch, device=device)


def forward_backward(
    model: Classifier, spec: PreprocessSpec, films: np.ndarray, size: int, device: torch.device
) -> None:
    """B: the score of the most probable class, and its gradient for every weight."""
    to_input = InputScaling(spec).to(device)
    for batch in batches(films, size):
        model.zero_grad()
        model(to_input(torch.from_numpy(batch))).max(dim=1).values.sum().backward()


def library(model: Classifier, spec: PreprocessSpec, films: np.ndarray, size: int, device: torch.device) -> None:
    """pytorch-grad-cam by itself."""
    from pytorch_grad_cam import GradCAM

    to_input = InputScaling(spec).to(device)
    with GradCAM(model, [model.get_submodule(target_layer(model, spec.image_size))]) as cam:
        for batch in batches(films, size):
            cam(to_input(torch.from_numpy(batch)), None)


def rate(work: Callable[[], None], films: int, device: torch.device) -> float:
    """Films per second."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return films / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--films", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-library", action="store_true", help="leave pytorch-grad-cam by itself out")
    options = parser.parse_args()
    device = resolve_device(options.device)
    spec = PreprocessSpec()
    model = create_model(options.model, 2, pretrained=False, image_size=spec.image_size)
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    films = np.random.default_rng(0).integers(0, 256, (options.films, 224, 224, 1), dtype=np.uint8)
    for work in (explained, forward_backward):  # first calls choose kernels and import the library
        work(model, spec, films[: options.batch_size], options.batch_size, device)
    a, b = [], []
    for _ in range(options.pairs):
        for work, rates in ((explained, a), (forward_backward, b)):
            measured = rate(lambda w=work: w(model, spec, films, options.batch_size, device), len(films), device)
            rates.append(measured)
    ratio = statistics.median(x / y for x, y in zip(a, b))
    print(
        f"{options.model} on {device.type}, {options.films} films: explained {statistics.median(a):.2f} films/s, "
        f"forward and backward {statistics.median(b):.2f} films/s, ratio {ratio:.2f} (of {len(a)} pairs: "
        f"{min(x / y for x, y in zip(a, b)):.2f} to {max(x / y for x, y in zip(a, b)):.2f})"
    )
    if not options.no_library:
        alone = rate(lambda: library(model, spec, films, options.batch_size, device), len(films), device)
        print(f"pytorch-grad-cam by itself: {alone:.2f} films/s")


if __name__ == "__main__":
    main()
