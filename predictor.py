"""From a checkpoint to probabilities: the one way a film is predicted, on the command line, in a notebook or served.

    predictor = load("checkpoints/best_model.pth")
    for result in predictor.predict_files(paths): print(result.path, result.prediction, result.probabilities)

A film travels decode → apply(spec) → engine → logits → temperature → probabilities → operating point → prediction.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import checkpoint
from config import Config, config_from_dict
from engines import Engine, TorchEngine
from errors import CheckpointError, ConfigError, DataError, examples
from models import model_from_config
from preprocess import IMAGE_SUFFIXES, PreprocessSpec, apply, decode, spec_from_dict
from runtime import memory_advice, resolve_device, resolve_precision

FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one film."""

    path: str
    prediction: str
    """Class name: by the operating point in a binary task, else the most probable."""
    probabilities: dict[str, float]
    """Class name → calibrated probability; they sum to 1."""

    @property
    def confidence(self) -> float:
        """Probability of the predicted class."""
        return self.probabilities[self.prediction]


@dataclass(frozen=True)
class Unreadable:
    """A film that could not be decoded, and why."""

    path: str
    reason: str


class Predictor:
    """A model with everything that stands between a file and a decision."""

    def __init__(
        self,
        engine: Engine,
        *,
        spec: PreprocessSpec,
        classes: Sequence[str],
        temperature: float,
        operating_point: dict[str, Any],
        config: Config,
        provenance: dict[str, Any],
        seen_films: npt.NDArray[np.int64],
    ) -> None:
        self.engine, self.spec, self.classes = engine, spec, tuple(classes)
        self.temperature, self.operating_point = temperature, operating_point
        self.config, self.provenance = config, provenance
        self.seen_films = seen_films

    @property
    def positive_class(self) -> str | None:
        """The class the operating point speaks of; None in a multi-class task."""
        return self.operating_point.get("positive_class")

    @property
    def threshold(self) -> float:
        """Probability of the positive class from which a film is called positive."""
        return float(self.operating_point.get("threshold", 0.5))

    def probabilities(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Calibrated probabilities (B, classes) of preprocessed uint8 films (B, S, S, C)."""
        with memory_advice(len(images_BHWC)):
            return softmax(self.engine.logits(images_BHWC), self.temperature)

    def decide(self, probabilities_BC: FloatArray) -> npt.NDArray[np.int64]:
        """Class index per row: the operating point in a binary task, else the most probable class."""
        return decide(probabilities_BC, self.classes, self.positive_class, self.threshold)

    def predict_files(self, paths: Sequence[str], *, batch_size: int = 16) -> Iterator[Prediction | Unreadable]:
        """One result a path, in order, streamed: films are decoded ahead in threads while the model computes."""
        for chunk, images in self._decoded_batches(paths, batch_size):
            readable = [item for item in images if not isinstance(item, Unreadable)]
            rows: Iterator[FloatArray] = iter(self.probabilities(np.stack(readable)) if readable else [])
            for path, image in zip(chunk, images):
                yield image if isinstance(image, Unreadable) else self._prediction(path, next(rows))

    def _decoded_batches(
        self, paths: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[str], list[npt.NDArray[np.uint8] | Unreadable]]]:
        # Never more than a few batches are held: a folder of any size streams in bounded memory.
        remaining = iter(paths)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            ahead: list[tuple[list[str], list[Future[npt.NDArray[np.uint8] | Unreadable]]]] = []
            while True:
                while len(ahead) < 3 and (chunk := list(islice(remaining, batch_size))):
                    ahead.append((chunk, [pool.submit(self._decode, path) for path in chunk]))
                if not ahead:
                    return
                chunk, futures = ahead.pop(0)
                yield chunk, [future.result() for future in futures]

    def _decode(self, path: str) -> npt.NDArray[np.uint8] | Unreadable:
        try:
            return apply(self.spec, decode(path))
        except DataError as error:
            return Unreadable(path, str(error))

    def _prediction(self, path: str, probabilities_C: FloatArray) -> Prediction:
        index = int(self.decide(probabilities_C[None])[0])
        by_class = {name: float(value) for name, value in zip(self.classes, probabilities_C)}
        return Prediction(path, self.classes[index], by_class)


def softmax(logits_BC: FloatArray, temperature: float) -> npt.NDArray[np.float64]:
    """Probabilities (B, classes) in double precision; `temperature` above 1 makes them less sure."""
    scaled = logits_BC.astype(np.float64) / temperature
    exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


def decide(
    probabilities_BC: FloatArray, classes: Sequence[str], positive: str | None, threshold: float
) -> npt.NDArray[np.int64]:
    """Class index per row: positive from `threshold` on in a binary task, the most probable class otherwise."""
    if positive is None:
        return probabilities_BC.argmax(axis=1)
    index = list(classes).index(positive)
    return np.where(probabilities_BC[:, index] >= threshold, index, 1 - index).astype(np.int64)


def load(
    path: str | Path, *, device: str = "auto", precision: str = "auto", model_type: str | None = None
) -> Predictor:
    """The predictor a checkpoint holds; `model_type`, when given, is only checked against it.

    CheckpointError for a checkpoint that is missing, damaged, newer, unsafe, or of another model.
    """
    content = checkpoint.load(path)
    config = config_from_dict(content["config"], source=str(path))
    if model_type is not None and model_type != config.model.model_type:
        raise ConfigError(
            f"--model {model_type}: {path} holds a {config.model.model_type}; drop the flag or correct it"
        )
    spec = spec_from_dict(content["preprocess"])
    model = model_from_config(
        config.model, num_classes=len(content["classes"]), image_size=spec.image_size, random=True
    )
    load_state(model, content["model_state_dict"], source=str(path))
    torch_device = resolve_device(device)
    chosen = resolve_precision(precision, torch_device)
    return Predictor(
        TorchEngine(model, spec, device=torch_device, precision=chosen),
        spec=spec,
        classes=content["classes"],
        temperature=float(content["temperature"]),
        operating_point=content["operating_point"],
        config=config,
        provenance=content["provenance"],
        seen_films=content["seen_films"].numpy(),
    )


def load_state(model: Any, state: dict[str, Any], *, source: str) -> None:
    """Fill `model`; CheckpointError naming keys when the state belongs to another architecture."""
    own = model.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise CheckpointError(
            f"{source}: weights of another architecture: {len(wrong)} keys differ ({examples(wrong)})"
        )
    model.load_state_dict(state)


def find_films(sources: Sequence[str]) -> list[str]:
    """The image files among `sources`, folders searched through; DataError for one that is missing or holds none."""
    found: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            films = sorted(str(item) for item in path.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
            if not films:
                raise DataError(f"{path}: no films in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
            found += films
        elif path.exists():
            found.append(str(path))
        else:
            raise DataError(f"{path}: no such file or folder")
    return found
