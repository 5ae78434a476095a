"""`train --dry-run`: one batch of everything, and what the whole run would take here.

    python main.py train --model resnet50 --epochs 50 --dry-run

Reads the manifest and a few films; builds the model, decodes, augments, steps, validates and saves in a temporary
folder. Estimates time, memory and disk of the run that the same command without the flag would be. Writes nothing into
the run folder.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

import checkpoint
import gate
import train
from config import Config
from data_preprocessing import SPLITS, FilmBatches, Request, sequential_requests, training_requests
from feature_cache import EXTRACTION_BATCH, choose_engine, cut_model
from models import count_parameters
from runtime import memory_advice, peak_memory_mb, resolve_device
from train import Fit, Prepared

Result = TypeVar("Result")

TIMED_STEPS = 3
"""Steps after a first one, whose time is that of starting; their median counts."""
MIB = 2**20


class HeldFilms:
    """A few decoded films by their row in the manifest, as a store of pixels."""

    def __init__(self, films: dict[int, npt.NDArray[np.uint8]]) -> None:
        self.films = films

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        return self.films[row]


@dataclass(frozen=True)
class Measured:
    """How long single things took here."""

    prepare_s: float
    """Reading and hashing the manifest's files, splitting, building the model."""
    decode_s: float
    """A film, with all cores at work."""
    load_s: float
    """A batch of decoded films, loaded and augmented."""
    step_s: float
    """A batch loaded, forward, backward and stepped."""
    validate_s: float
    """A validation film as an epoch sees it."""
    whole_network_s: float
    """A validation film through the whole network."""
    extract_s: float
    """A film through the frozen layers, where their outputs are kept; else 0."""
    engine_s: float
    """Choosing and building the engine that runs them."""
    save_s: float
    """What an epoch writes."""
    checkpoint_mib: float
    best_model_mib: float
    losses: list[float]
    """Of the steps; each on the films of the same batch, augmented anew."""


def dry_run(config: Config) -> dict[str, Any]:
    """One batch of everything that `train` would do with `config`; facts, measurements and the estimate.

    UserError kinds for the user's mistakes, as `train` raises them.
    """
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    precision = train.safe_precision(config, device)
    with tempfile.TemporaryDirectory(prefix="medimg-dry-run-") as name:
        scratch = Path(name)
        # Films are decoded when they are read: only those of the batches are.
        data = replace(config.data, pixel_cache=False, skip_unreadable=False, cache_dir=str(scratch))
        training = replace(config.training, compile="off", progressive_resizing=0)
        trial = replace(config, data=data, training=training)
        torch.manual_seed(config.training.seed)
        prepare_s, whole = _timed(lambda: train.prepare(trial))
        few, decode_s = _few(whole, trial)
        run = Rehearsal(trial, few, folder=scratch, device=device, precision=precision)
        found = _measured(run, prepare=prepare_s, decode=decode_s)
        count = count_parameters(run.model)
        return {
            "model": config.model.model_type,
            "device": device.type,
            "precision": precision,
            "parameters": count.total,
            "trainable": count.trainable,
            "films": {name: len(whole.manifest.split(name)) for name in SPLITS},
            "batch_size": config.data.batch_size,
            "output_dir": config.runtime.output_dir,
            "measured": asdict(found),
            "estimate": _estimate(config, whole, run, found),
            "remarks": _remarks(config, run),
        }


def _few(whole: Prepared, config: Config) -> tuple[Prepared, float]:
    """`whole` with the films of one batch of either kind, decoded, and the seconds a film took."""
    labels, size = whole.train_set.labels, config.data.batch_size
    first, *_ = training_requests(
        labels,
        batch_size=size,
        seed=config.training.seed,
        epoch=1,
        n_classes=len(whole.manifest.classes),
        weighted=False,
    )
    train_rows = whole.manifest.split("train").iloc[_with_every_class(first.positions, labels)]
    val_rows = whole.manifest.split("val").iloc[:size]
    rows = pd.concat([train_rows, val_rows])["row"].to_numpy(np.int64)
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        films = dict(zip(rows.tolist(), pool.map(whole.train_set.pixels.__getitem__, rows.tolist())))
    seconds = (time.perf_counter() - started) / len(rows)
    held = HeldFilms(films)
    train_set = FilmBatches(train_rows, held, whole.train_set.augmenter)
    manifest = replace(whole.manifest, table=pd.concat([train_rows, val_rows]))
    few = replace(whole, manifest=manifest, train_set=train_set, val_set=FilmBatches(val_rows, held, None))
    return few, seconds


def _with_every_class(positions: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`positions` and the first film of each class that they lack: the weights of a class without films are none."""
    absent = np.setdiff1d(labels, labels[positions])
    return np.concatenate([positions, [int(np.argmax(labels == label)) for label in absent]]).astype(np.int64)


# --- measuring -------------------------------------------------------------------------------------------------


class Rehearsal(Fit):
    """A run of which single things are done once, in a folder that goes."""

    def stages(self) -> None:
        """Open what the first epoch trains; where layers are frozen, compute their outputs for the few films."""
        self._open_stages()

    def step(self) -> float:
        """Load, augment, forward, backward and step one batch, as an epoch of its own; its loss."""
        self._begin_epoch()
        (batch,) = self._batches([self._part(0).request])
        with memory_advice(self.config.data.batch_size):
            loss = self._backward(batch, share=1.0)
        self._check_losses(1)
        self._step()
        self.standing.epoch += 1
        return float(loss)

    def load(self) -> None:
        """Load and augment one batch."""
        for batch in self._batches(self._requests()[:1]):
            self._inputs(batch)

    def validate(self) -> None:
        """The validation films as an epoch sees them."""
        self._validation_logits()

    def validate_whole(self) -> None:
        """The validation films through the whole network."""
        requests = sequential_requests(len(self.prepared.val_set), self.config.data.batch_size)
        list(self._whole_network_logits(self._deployed(), requests))

    def extraction(self) -> float:
        """Seconds for a film to be loaded, augmented and sent through the frozen layers, by the engine chosen."""
        assert self.features is not None
        films = self.prepared.train_set
        request = Request(1, np.arange(len(films))[: EXTRACTION_BATCH.get(self.device.type, 16)])
        loading, batch = _timed(lambda: films[request])
        images = batch.inputs.numpy()
        cut, wanted = cut_model(self.model, self.prepared.spec), self.features.engine
        engine = choose_engine(cut, images, device=self.device, precision=self.precision, wanted=wanted)
        engine(images)
        return (loading + _timed(lambda: engine(images))[0]) / len(images)

    def save(self) -> list[Path]:
        """What an epoch writes at most: the checkpoint to resume from, and the best model."""
        names = ("checkpoint_epoch_1.pth", checkpoint.BEST)
        for name in names:
            self._save(name, epoch=1, resumable=name != checkpoint.BEST)
        return [self.folder / name for name in names]


def _measured(run: Rehearsal, *, prepare: float, decode: float) -> Measured:
    opening, _ = _timed(run.stages)
    few = len(run.prepared.val_set)
    extract = engine = 0.0
    if run.features is not None:
        extract = run.extraction()
        engine = max(0.0, opening - extract * (run.features.views * len(run.prepared.train_set) + few))
    steps = [_timed(run.step) for _ in range(1 + TIMED_STEPS)]
    saving, files = _timed(run.save)
    return Measured(
        prepare_s=prepare,
        decode_s=decode,
        load_s=statistics.median(_timed(run.load)[0] for _ in range(TIMED_STEPS)),
        step_s=statistics.median(seconds for seconds, _ in steps[1:]),
        validate_s=min(_timed(run.validate)[0] for _ in range(2)) / few,
        whole_network_s=min(_timed(run.validate_whole)[0] for _ in range(2)) / few,
        extract_s=extract,
        engine_s=engine,
        save_s=saving,
        checkpoint_mib=files[0].stat().st_size / MIB,
        best_model_mib=files[1].stat().st_size / MIB,
        losses=[loss for _, loss in steps],
    )


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


# --- the estimate ----------------------------------------------------------------------------------------------


def _estimate(config: Config, whole: Prepared, run: Rehearsal, found: Measured) -> dict[str, Any]:
    """Seconds by part, memory and disk of the whole run, if no epoch is spared by early stopping."""
    settings, size = config.training, config.data.batch_size
    films, epochs = len(whole.manifest), settings.num_epochs
    n_train, n_val = len(whole.train_set), len(whole.val_set)
    steps, seen = n_train // size, 1 if config.data.pixel_cache else epochs
    views = run.features.views if run.features is not None else None
    cached = 0 if views is None else views * n_train + n_val
    end = 0
    if run.features is not None or settings.input_gate:
        end += n_val
    if settings.input_gate:
        end += gate.reference_count(n_train, train.films_a_run(n_train, epochs, views=views))
    parts = {
        "reading": found.prepare_s,
        "decoding": found.decode_s * (films if seen == 1 else seen * (n_train + n_val)),
        "frozen_layers": found.engine_s + found.extract_s * cached,
        "training": found.step_s * steps * epochs,
        "validation": found.validate_s * n_val * epochs,
        "saving": found.save_s * epochs,
        "end": found.whole_network_s * end,
    }
    side, channels = whole.spec.image_size, whole.spec.channels
    width = 0 if run.features is None else run.features.array[:1].nbytes
    features = cached * width / MIB
    kept = min(epochs, settings.keep_checkpoints)
    return {
        "seconds": sum(parts.values()),
        "seconds_by_part": parts,
        "epoch_s": found.step_s * steps + found.validate_s * n_val + found.save_s,
        "steps_an_epoch": steps,
        "epochs": epochs,
        "memory_mib": peak_memory_mb(run.device) + (features if run.device.type == "cpu" else 0.0),
        "pixel_cache_mib": films * side * side * channels / MIB if config.data.pixel_cache else 0.0,
        "feature_cache_mib": features,
        "run_folder_mib": kept * found.checkpoint_mib + found.best_model_mib,
    }


def _remarks(config: Config, run: Rehearsal) -> list[str]:
    settings = config.training
    said = {
        "compilation was not tried": settings.compile != "off",
        "the search for a head, before the first epoch, is not counted": settings.head_search,
        "early epochs with smaller films are counted at full size": settings.progressive_resizing > 0,
        "stages that open later make later epochs longer": any(epoch > 1 for epoch in settings.unfreeze_schedule),
        "early stopping may end the run sooner": settings.early_stopping_patience > 0,
        "films that were decoded before need no decoding": config.data.pixel_cache,
    }
    return [words for words, holds in said.items() if holds]


def summary(result: dict[str, Any]) -> str:
    """What was tried, and what the run would take, in lines."""
    tried, estimate, films = result["measured"], result["estimate"], result["films"]
    step, load = f"{tried['step_s']:.3g} s", f"{tried['load_s']:.2g} s"
    parts = [f"{name.replace('_', ' ')} {duration(s)}" for name, s in estimate["seconds_by_part"].items() if s >= 1]
    disk = estimate["pixel_cache_mib"] + estimate["feature_cache_mib"]
    return "\n".join(
        [
            f"{result['model']} on {result['device']} in {result['precision']}, {result['trainable']:,} of "
            f"{result['parameters']:,} parameters trained",
            f"films        {films['train']:,} to train on, {films['val']:,} to validate, {films['test']:,} to test",
            f"a batch      {result['batch_size']} films: {step}, {load} of it loading; loss "
            f"{tried['losses'][0]:.3f} to {tried['losses'][-1]:.3f}",
            f"an epoch     {estimate['steps_an_epoch']:,} batches: about {duration(estimate['epoch_s'])}",
            f"the run      {estimate['epochs']} epochs: about {duration(estimate['seconds'])}",
            *([f"             of it {', '.join(parts)}"] if parts else []),
            f"memory       about {estimate['memory_mib']:,.0f} MiB",
            f"disk         {estimate['run_folder_mib']:,.0f} MiB in {result['output_dir']}, {disk:,.0f} MiB in caches",
            *(f"note: {words}" for words in result["remarks"]),
            "nothing was written; the same command without --dry-run trains",
        ]
    )


def duration(seconds: float) -> str:
    """'12 s', '3 min 20 s' or '2 h 05 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
