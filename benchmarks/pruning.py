"""What structured pruning gains here: size, films per second in each engine, and on real films accuracy stage by stage.

    python benchmarks/pruning.py --models resnet50 efficientnet_b4 densenet121 --amount 0.3 --repeats 5
    python benchmarks/pruning.py --models --checkpoint checkpoints/best_model.pth --epochs 1 --films 1500

The first kind uses random weights, whose values do not change the time: the unpruned and the pruned network run
batches of 16 in turn (A B A B …) in OpenVINO and ONNX Runtime, both in fp32; medians are shown. The second prunes a
trained checkpoint and fine-tunes it on `--films` of its training films.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engines
import predictor
import pruning
from data_preprocessing import FilmBatches, Manifest
from models import Classifier, create_model
from optimization import training_films
from runtime import StopRequest, resolve_device, resolve_precision, setup_logging
from train import Prepared

BATCH = 16


def openvino_fp32(model: Classifier, images_BCHW: np.ndarray) -> Callable[[], object]:
    """One pass of a batch."""
    openvino = engines.import_openvino()
    example = torch.zeros((2, *images_BCHW.shape[1:]))
    graph = openvino.convert_model(model, example_input=example, input=[-1, *images_BCHW.shape[1:]])
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = engines.openvino_core().compile_model(graph, "CPU", options)
    return lambda: compiled([images_BCHW])


def onnxruntime_fp32(model: Classifier, images_BCHW: np.ndarray) -> Callable[[], object]:
    """One pass of a batch."""
    content = io.BytesIO()
    example = torch.zeros((2, *images_BCHW.shape[1:]))
    torch.onnx.export(model, (example,), content, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the other engine needs the cores
    session = onnxruntime.InferenceSession(content.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": images_BCHW})


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def speed(name: str, *, amount: float, round_to: int | None, repeats: int, image_size: int) -> None:
    """Print size and speed of one architecture before and after pruning."""
    torch.manual_seed(0)
    model = create_model(name, 2, False, image_size=image_size).eval()
    pruned = pruning.prune(model, amount=amount, image_size=image_size, round_to=round_to)
    print(f"{name} at {image_size} px, amount {amount:g}: {pruning.describe(pruned)}")
    images_BCHW = np.random.default_rng(0).standard_normal((BATCH, 3, image_size, image_size), dtype=np.float32)
    for label, build in (("OpenVINO fp32", openvino_fp32), ("ONNX Runtime fp32", onnxruntime_fp32)):
        a, b = build(model, images_BCHW), build(pruned.model, images_BCHW)
        a(), b()  # the first pass prepares the kernels
        pairs = [(seconds(a), seconds(b)) for _ in range(repeats)]
        ratios = [before / after for before, after in pairs]
        before, after = (BATCH / statistics.median(column) for column in zip(*pairs))
        print(
            f"  {label}: {before:.1f} to {after:.1f} films/s, {statistics.median(ratios):.2f} times "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def accuracy(path: Path, *, amount: float, epochs: int, films: int, seed: int) -> None:
    """Print validation figures of a trained checkpoint at each stage of pruning and fine-tuning."""
    stored = predictor.load(path, device="cpu", precision="fp32")
    config = stored.config
    prepared = fewer(training_films(stored, config), films, seed=seed)
    device = resolve_device(config.runtime.device)
    precision = resolve_precision(config.runtime.precision, device)
    with StopRequest() as stop:
        result = pruning.prune_and_distil(
            prepared,
            config,
            amount=amount,
            epochs=epochs,
            device=device,
            precision=precision,
            stop=stop,
        )
    print(f"{path}: {config.model.model_type}, {precision}, fine-tuned on {len(prepared.train_set)} films an epoch")
    for stage in result.stages:
        figures = stage.validation
        print(
            f"  {stage.name:>12}: AUROC {figures['auc_roc']:.4f}, accuracy {figures['accuracy']:.4f}, "
            f"loss {figures['loss']:.4f}" + ("  <- kept" if stage.name == result.best else "")
        )


def fewer(prepared: Prepared, films: int, *, seed: int) -> Prepared:
    """The same with `films` of its training films, drawn at random."""
    table = prepared.manifest.table
    rows = table.index[table["split"] == "train"].to_numpy()
    unwanted = np.random.default_rng(seed).permutation(rows)[films:]
    manifest = Manifest(table.drop(index=unwanted), prepared.manifest.classes, prepared.manifest.root)
    train_set = FilmBatches(manifest.split("train"), prepared.train_set.pixels, None)
    return dataclasses.replace(prepared, manifest=manifest, train_set=train_set)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["resnet50", "efficientnet_b4", "densenet121"])
    parser.add_argument("--amount", type=float, default=0.3)
    parser.add_argument("--round-to", type=int)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--films", type=int, default=10**9, help="training films used in fine-tuning")
    arguments = parser.parse_args()
    setup_logging(quiet=False)
    warnings.simplefilter("ignore")  # tracers' remarks on constants
    for name in arguments.models:
        speed(
            name,
            amount=arguments.amount,
            round_to=arguments.round_to,
            repeats=arguments.repeats,
            image_size=arguments.image_size,
        )
    if arguments.checkpoint:
        accuracy(arguments.checkpoint, amount=arguments.amount, epochs=arguments.epochs, films=arguments.films, seed=0)


if __name__ == "__main__":
    main()
