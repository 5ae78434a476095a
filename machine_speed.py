"""How fast this machine decodes, augments and trains, and which of them bounds a run.

    python main.py doctor --benchmark --model resnet50

Films are synthetic JPEG files made in memory: their content does not change the time. Every rate is in films per
second. Reads and writes nothing.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from config import Config
from data_preprocessing import Augmenter
from device_augmentation import DeviceAugmenter
from engines import InputScaling
from feature_cache import PROBE_FILMS, CannotCache, cut_model, engine_candidates
from models import create_model
from preprocess import PreprocessSpec, apply, decode
from runtime import autocast, log, resolve_device, resolve_precision

SECONDS = 2.0
"""How long each rate is measured."""
RAW_SIDE = 1024
"""Side in pixels of the films that are decoded; those of the published set have 400 to 2,900."""
BATCH = {"cpu": 16, "cuda": 64, "mps": 16}


def measure(config: Config) -> dict[str, Any]:
    """All rates for the network, image size and device that `config` names, and one line on what bounds a run."""
    device = resolve_device(config.runtime.device)
    precision = resolve_precision(config.runtime.precision, device)
    side = config.data.image_size
    spec = PreprocessSpec(side)
    log.info("decoding and augmenting")
    rates: dict[str, Any] = {"decode": _decoding(spec), "augment": _augmenting(config, device)}
    rates["step"] = {}
    for kind in dict.fromkeys(("fp32", precision)):
        log.info("training steps of %s in %s", config.model.model_type, kind)
        rates["step"][kind] = _steps(config, device=device, precision=kind)
    log.info("frozen layers, engine by engine")
    rates["frozen"] = _frozen(config, device=device, precision=precision)
    facts = {"model": config.model.model_type, "image_size": side, "device": str(device), "precision": precision}
    measured = {**facts, "films_per_s": rates, "bound": bound(rates, precision=precision, device=device.type)}
    return {**measured, "lines": _lines(measured)}


def bound(rates: dict[str, Any], *, precision: str, device: str) -> str:
    """What a run here waits for: the slowest of the parts that work at the same time."""
    step = rates["step"][precision]["whole"]
    decoding, augmenting = rates["decode"]["all_threads"], rates["augment"]
    where = "device" if device == "cuda" else "cpu"
    prepared = augmenting[where]
    fastest = max(rates["frozen"].values(), default=0.0)
    frozen = f"; frozen layers run once at {fastest:.0f} films/s" if fastest else ""
    if prepared < step:
        return (
            f"augmentation ({prepared:.0f} films/s) is slower than the step ({step:.0f}): more --workers, or a lower "
            f"data.augmentation_prob{frozen}"
        )
    first = f"; the first epoch waits for decoding ({decoding:.0f})" if decoding < step else ""
    return f"the training step bounds a run ({step:.1f} films/s){first}{frozen}"


def _rate(work: Callable[[], int], *, seconds: float = SECONDS) -> float:
    """Films per second of `work`, which returns how many films it did; one call warms up, the median call counts."""
    work()
    rates: list[float] = []
    ends = time.perf_counter() + seconds
    while not rates or time.perf_counter() < ends:
        started = time.perf_counter()
        films = work()
        rates.append(films / (time.perf_counter() - started))
    return statistics.median(rates)


def _decoding(spec: PreprocessSpec) -> dict[str, float]:
    """From JPEG bytes to the network's square, on one thread and on all."""
    jpegs = [_jpeg(seed) for seed in range(8)]

    def prepare(data: bytes) -> None:
        apply(spec, decode(data))

    def serial() -> int:
        for data in jpegs:
            prepare(data)
        return len(jpegs)

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        together = _rate(lambda: len(list(pool.map(prepare, jpegs * threads))))
    return {"one_thread": _rate(serial), "all_threads": together}


def _jpeg(seed: int) -> bytes:
    """A grey film with coarse and fine structure, as JPEG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).resize((RAW_SIDE, RAW_SIDE))
    film = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (RAW_SIDE, RAW_SIDE))
    buffer = io.BytesIO()
    Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _augmenting(config: Config, device: torch.device) -> dict[str, float]:
    """Film by film on one CPU thread, and whole batches on the device."""
    films = _films(config.data.image_size, 32)
    one = Augmenter(config.data, seed=0)
    many = DeviceAugmenter(config.data, seed=0)
    there = torch.from_numpy(films).to(device)

    def by_film() -> int:
        for index, film in enumerate(films):
            one(film, epoch=1, index=index)
        return len(films)

    def by_batch() -> int:
        many(there, epoch=1, rows=np.arange(len(films)))
        _wait(device)
        return len(films)

    return {"cpu": _rate(by_film), "device": _rate(by_batch)}


def _films(side: int, count: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _steps(config: Config, *, device: torch.device, precision: str) -> dict[str, float]:
    """A full fine-tuning step of the training loop, and its forward, backward and optimizer parts."""
    size, side = BATCH[device.type], config.data.image_size
    model = create_model(config.model.model_type, 2, False, image_size=side)
    model = model.to(device).to(memory_format=torch.channels_last).train()
    scaling = InputScaling(PreprocessSpec(side)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda"))
    films, labels = torch.from_numpy(_films(side, size)).to(device), torch.arange(size, device=device) % 2
    seconds: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def step() -> int:
        marks = [time.perf_counter()]

        def mark() -> None:
            _wait(device)
            marks.append(time.perf_counter())

        with autocast(device, precision):
            logits = model(scaling(films))
        loss = F.cross_entropy(logits.float(), labels)
        mark()
        loss.backward()
        mark()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark()
        for name, start, end in zip(seconds, marks, marks[1:]):
            seconds[name].append(end - start)
        return size

    whole = _rate(step, seconds=3 * SECONDS)
    return {"whole": whole, **{name: size / statistics.median(values[1:]) for name, values in seconds.items()}}


def _frozen(config: Config, *, device: torch.device, precision: str) -> dict[str, float]:
    """The whole backbone without gradients, on every engine that a run with a frozen backbone would try."""
    side = config.data.image_size
    model = create_model(config.model.model_type, 2, False, freeze_backbone=True, image_size=side)
    films = _films(side, PROBE_FILMS)
    try:
        cut = cut_model(model, PreprocessSpec(side))
    except CannotCache as reason:
        log.info("no frozen layers to time: %s", reason)
        return {}
    rates = {}
    for make in engine_candidates(cut, films.shape[1:], device=device, precision=precision).values():
        engine = make()
        rates[engine.name] = _rate(lambda engine=engine: len(engine(films)))  # type: ignore[misc]
    return rates


def _lines(measured: dict[str, Any]) -> list[str]:
    """The rates, for the terminal."""
    rates = measured["films_per_s"]
    lines = [f"speed of this machine, films/s, {measured['model']} at {measured['image_size']} px"]
    decode, augment = rates["decode"], rates["augment"]
    lines += [
        f"decode     {decode['one_thread']:.0f} on one thread, {decode['all_threads']:.0f} on all ({RAW_SIDE} px JPEG)",
        f"augment    {augment['cpu']:.0f} on one CPU thread, {augment['device']:.0f} as batches ({measured['device']})",
    ]
    for kind, step in rates["step"].items():
        parts = ", ".join(f"{name} {step[name]:.1f}" for name in ("forward", "backward", "optimizer"))
        lines.append(f"step       {step['whole']:.1f} in {kind} ({parts})")
    frozen = ", ".join(f"{name} {rate:.1f}" for name, rate in rates["frozen"].items()) or "not to be had"
    return [*lines, f"frozen     {frozen}", f"bound      {measured['bound']}"]
