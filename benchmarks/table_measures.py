"""What the rows of benchmarks/tables.py measure beside the verbs: latency, compressed variants, engines in turns."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import torch

import bundle
import predictor
from array_cache import default_folder
from benchmarks.optimize import plain_torch, seconds, weights_megabytes
from config import DataConfig
from data_preprocessing import cached_pixels, load_manifest, split_manifest
from engines import HostScaling, InputScaling, onnx_engine
from evaluate import evaluation_manifest, rows_of
from metrics import compare_predictions
from onnx_export import read_metadata
from optimization import Optimization
from predictor import Predictor, softmax

VARIANTS = {"exported": "fp32", "quantised": "int8", "pruned": "fp32", "both": "int8"}
"""What `optimize` makes of a network → the precision it is run in; exported is the float file of the unpruned one."""
ENGINE = "openvino"
"""Runs all variants, so that they differ by what was done to the network alone."""
WARM_UP = 5


# --- films -----------------------------------------------------------------------------------------------------


def subset(films: Path, path: Path, counts: Mapping[str, int], *, seed: int = 0) -> Path:
    """Write a manifest of about `counts` films a split, whole patients drawn at random, split as training splits."""
    config = DataConfig(data_dir=str(films))
    manifest = split_manifest(load_manifest(config), config, seed=42)
    rows = pd.concat([_some_patients(manifest.split(split), count, seed) for split, count in counts.items()])
    rows = rows.assign(label=[manifest.classes[code] for code in rows["label"]])
    path.parent.mkdir(parents=True, exist_ok=True)
    rows[["path", "label", "split", "patient_id"]].to_csv(path, index=False)
    return path


def _some_patients(rows: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    order = np.random.default_rng(seed).permutation(np.unique(rows["patient_id"].to_numpy(str)))
    rank = dict(zip(order, range(len(order))))
    by_turn = rows.iloc[np.argsort([rank[name] for name in rows["patient_id"]], kind="stable")]
    return by_turn[by_turn["patient_id"].isin(set(by_turn["patient_id"].iloc[:count]))]


# --- latency ---------------------------------------------------------------------------------------------------


def latency(checkpoint: Path, *, films: int) -> dict[str, float]:
    """Milliseconds of one film, medians over `films` test films: the network alone, and from the file to a decision."""
    loaded = predictor.load(checkpoint, device="cpu")
    manifest, _ = evaluation_manifest(loaded, loaded.config)
    rows = rows_of(manifest, "test").iloc[:films]
    loaded.attach(rows)
    network, whole = [], []
    for path in rows["path"]:
        started = time.perf_counter()
        one, _ = loaded.readable([path])
        decoded = time.perf_counter()
        loaded.engine.outputs(one)
        ended = time.perf_counter()
        network.append(ended - decoded)
        whole.append(ended - started)
    kept = slice(min(WARM_UP, len(rows) - 1), None)
    return {
        "network_ms": 1000 * statistics.median(network[kept]),
        "film_ms": 1000 * statistics.median(whole[kept]),
        "films": len(network[kept]),
    }


# --- compressed variants ---------------------------------------------------------------------------------------


def make_variants(
    checkpoint: Path, folder: Path, *, bundle_made: Path | None, pruned_made: Path | None, prune_epochs: int
) -> dict[str, Any]:
    """Fill `folder` with an ONNX file a variant: from a bundle and pruned files, or by `optimize`'s own steps.

    `pruned_made` holds pruned.onnx and pruned_int8.onnx. Returns where each came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = {}
    if bundle_made is not None:
        _take(bundle_made / bundle.FLOAT_FILE, folder / "exported.onnx")
        _take(bundle_made / bundle.INT8_FILE, folder / "quantised.onnx")
        source["full"] = "bundle"
    if pruned_made is not None:
        _take(pruned_made / "pruned.onnx", folder / "pruned.onnx")
        _take(pruned_made / "pruned_int8.onnx", folder / "both.onnx")
        source["pruned"] = "made before"
    missing = [name for name in ("full", "pruned") if name not in source]
    if missing:
        source |= _optimised(checkpoint, folder, missing, prune_epochs=prune_epochs)
    return source


def _take(source: Path, target: Path) -> None:
    partial = target.with_suffix(".partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


def _optimised(checkpoint: Path, folder: Path, networks: Sequence[str], *, prune_epochs: int) -> dict[str, Any]:
    """The files of these networks, made as the verb makes them; nothing is judged or timed here."""
    stored = predictor.load(checkpoint, device="cpu", precision="fp32")
    config = dataclasses.replace(
        stored.config, optimization=dataclasses.replace(stored.config.optimization, pruning_epochs=prune_epochs)
    )
    source: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Optimization(checkpoint, stored, config, Path(name))
        work.standing = work._reference()
        for network in networks:
            made = work._network("full", work.model) if network == "full" else work._pruned()
            files = ("exported", "quantised") if network == "full" else ("pruned", "both")
            for path, variant in zip((made.float_file, made.int8_file), files):
                assert path is not None
                _take(path, folder / f"{variant}.onnx")
            source[network] = made.facts
    return source


def variant_paths(folder: Path) -> dict[str, Path]:
    """Variant → its file."""
    return {name: folder / f"{name}.onnx" for name in VARIANTS}


def megabytes(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Size in MB (10^6 bytes) of the weights in the checkpoint (`before`) and of each variant's file."""
    return {
        "before": weights_megabytes(checkpoint),
        **{name: path.stat().st_size / 1e6 for name, path in variant_paths(folder).items()},
    }


def accuracy_lost(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Variant → split → accuracy and AUROC lost against the float network in torch: paired, clustered by patient."""
    stored = predictor.load(checkpoint, device="cpu", precision="fp32")
    manifest, _ = evaluation_manifest(stored, stored.config)
    found: dict[str, Any] = {name: {} for name in VARIANTS}
    for split in ("val", "test"):
        rows = rows_of(manifest, split)
        pixels, _ = cached_pixels(list(rows["path"]), stored.spec, default_folder(None))
        images = np.stack([pixels[row] for row in range(len(rows))])
        before = softmax(_logits(stored.engine, images), stored.temperature)
        for name, path in variant_paths(folder).items():
            engine, about = onnx_engine(ENGINE, path, stored.spec, precision=VARIANTS[name]), read_metadata(path)
            after = softmax(_logits(engine, images), float(about["temperature"]))
            found[name][split] = _differences(stored, rows, before, after, about["operating_point"])
    return found


def _logits(engine: Any, images: np.ndarray) -> np.ndarray:
    return np.concatenate([engine.logits(images[start : start + 16]) for start in range(0, len(images), 16)])


def _differences(
    stored: Predictor, rows: pd.DataFrame, before: np.ndarray, after: np.ndarray, point: Mapping[str, Any]
) -> dict[str, Any]:
    """What is lost: a − b of the paired comparison, each side at its own operating point."""
    positive = stored.classes.index(str(stored.positive_class))
    compared = compare_predictions(
        (rows["label"] == positive).to_numpy(np.int64),
        before[:, positive],
        after[:, positive],
        threshold_a=stored.threshold,
        threshold_b=float(point["threshold"]),
        groups=rows["patient_id"].to_numpy(),
    )
    kept = ("a", "b", "difference", "ci_low", "ci_high")
    found = {"accuracy": compared["metrics"]["accuracy"], "auc_roc": compared["auc_roc"]}
    return {"n": len(rows), **{name: {key: item[key] for key in kept} for name, item in found.items()}}


# --- engines in turns ------------------------------------------------------------------------------------------


def variant_speeds(checkpoint: Path, folder: Path, *, rounds: int) -> dict[str, Any]:
    """Films per second of eager torch fp32 and of every variant, at batch 16 and 1, in turns."""
    stored = predictor.load(checkpoint, device="cpu", precision="fp32")
    engines = {
        name: onnx_engine(ENGINE, path, stored.spec, precision=VARIANTS[name])
        for name, path in variant_paths(folder).items()
    }
    sides: dict[str, Callable[[np.ndarray], object]] = {"torch": _eager(checkpoint, stored)}
    sides |= {name: engine.outputs for name, engine in engines.items()}
    return {str(batch): in_turns(sides, stored, batch=batch, rounds=rounds) for batch in (16, 1)}


def engine_speeds(checkpoint: Path, folder: Path, *, rounds: int) -> dict[str, Any]:
    """Films per second of a bundle, of eager torch, and of plain ONNX Runtime on the exported file.

    Torch runs in fp32 as most users have it, and in bf16 and channels last, as its tuning guide has it for CPUs.
    """
    import onnxruntime

    stored = predictor.load(folder)
    scale = HostScaling(stored.spec)
    session = onnxruntime.InferenceSession(str(folder / bundle.FLOAT_FILE), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    tuned = _eager(checkpoint, stored, layout=torch.channels_last)

    def bf16(films: np.ndarray) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tuned(films)

    sides: dict[str, Callable[[np.ndarray], object]] = {
        "bundle": stored.engine.outputs,
        "torch": _eager(checkpoint, stored),
        "torch bf16": bf16,
        "onnxruntime": lambda films: session.run(None, {name: scale(films)}),
    }
    return {str(batch): in_turns(sides, stored, batch=batch, rounds=rounds) for batch in (16, 1)}


def _eager(
    checkpoint: Path, stored: Predictor, *, layout: torch.memory_format = torch.contiguous_format
) -> Callable[[np.ndarray], object]:
    """The trained network in eager torch, fp32 and by default NCHW, its films scaled before."""
    model, scale = plain_torch(checkpoint).to(memory_format=layout), InputScaling(stored.spec)

    def call(films: np.ndarray) -> object:
        with torch.inference_mode():
            return model(scale(torch.from_numpy(films)).contiguous(memory_format=layout))

    return call


def in_turns(
    sides: Mapping[str, Callable[[np.ndarray], object]], stored: Predictor, *, batch: int, rounds: int
) -> dict[str, list[float]]:
    """Side → films per second in each round (A B C A B C …), uint8 films of noise in; the first round warms up."""
    side, channels = stored.spec.image_size, stored.spec.channels
    films = np.random.default_rng(0).integers(0, 256, (batch, side, side, channels), dtype=np.uint8)
    repeats = max(1, 8 // batch)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, call in sides.items():
            call(films)  # not timed: the caches were another's a moment ago
            rate = batch / seconds(partial(call, films), repeats=repeats)
            if turn:
                rates[name].append(rate)
    return rates
