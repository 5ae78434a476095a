"""From a checkpoint or a bundle to probabilities: the one way a film is predicted, wherever that is.

    predictor = load("checkpoints/best_model.pth")
    for result in predictor.predict_files(paths): print(result.path, result.prediction, result.probabilities)

A film travels decode → apply(spec) → engine → logits → temperature → probabilities → operating point → prediction.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

import bundle
import checkpoint
import findings
import fold_ensemble
from case_engine import CaseOnnxEngine, CaseTorchEngine
from config import Config, config_from_dict, located
from csv_table import read_text_table, require_columns
from data_preprocessing import film_paths
from engines import ONNX_ENGINES, Engine, TorchEngine, onnx_engine, why_absent
from errors import CheckpointError, ConfigError, DataError, examples
from models import model_from_config
from multimodal import CaseReader, build_model, read_state
from narrowing import narrow
from preprocess import IMAGE_SUFFIXES, PreprocessSpec, apply, decode, has_film, is_film, spec_from_dict
from process_group import Group
from runtime import log, memory_advice, resolve_device, resolve_precision

FloatArray = npt.NDArray[np.floating[Any]]

SHARED_BLOCK = 1024
"""Films of each process between two exchanges of predictions: what is held stays bounded."""
WIDEN_FROM = 64
"""From this many films on it pays to find out whether one call may hold several."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one film."""

    path: str
    prediction: str
    """Class name: by the operating point in a binary task, else the most probable. Findings: effusion|mass or No
    Finding."""
    probabilities: dict[str, float]
    """Class name → calibrated probability; they sum to 1, but of findings each is by itself."""
    called: dict[str, bool] | None = None
    """Finding → whether it is called at its threshold; None where a film has one class."""

    @property
    def confidence(self) -> float:
        """Probability of the predicted class; of the likeliest finding called, or that none is there."""
        if self.called is None:
            return self.probabilities[self.prediction]
        return findings.confidence(np.array(list(self.probabilities.values())), np.array(list(self.called.values())))


@dataclass(frozen=True)
class Unreadable:
    """A film that could not be decoded, and why."""

    path: str
    reason: str


def none_readable(unreadable: Sequence[Unreadable], what: str = "films") -> DataError:
    """The error of a run that could read nothing: the first reason, and of how many it stands for all."""
    reason = unreadable[0].reason
    return DataError(reason if len(unreadable) == 1 else f"none of the {len(unreadable)} {what} can be read: {reason}")


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
        input_gate: dict[str, Any] | None = None,
        reader: CaseReader | None = None,
    ) -> None:
        self.engine, self.spec, self.classes = engine, spec, tuple(classes)
        self.temperature, self.operating_point = temperature, operating_point
        self.config, self.provenance = config, provenance
        self.seen_films, self.input_gate = seen_films, input_gate
        # What makes a case of a film with its note and table, where the model reads those; and what is known of films.
        self.reader = reader
        self.branches: dict[str, dict[str, Any]] = {}
        """Modality → temperature and operating point of its own head."""
        self.out_of_fold: Path | None = None
        """Of an ensemble of folds: its out-of-fold predictions, in the place of a validation split."""
        self.notes: dict[str, dict[str, Any]] = {}
        # Films per engine call where an answer must not depend on its neighbours: a kernel is chosen by shape, so calls
        # of one shape agree to the last bit. A GPU is left idle by one film, hence 16 there, filled up with black.
        self.call_sizes: tuple[int, ...] = (16,) if engine_device(engine) == "cuda" and reader is None else (1,)

    @property
    def multilabel(self) -> bool:
        """Whether a film may have several findings, each with a threshold of its own."""
        return self.config.data.multilabel

    @property
    def thresholds(self) -> npt.NDArray[np.float64]:
        """(C,) probability from which each finding is called; where a film may have several."""
        return findings.thresholds(self.operating_point["findings"], self.classes)

    def calibrated(self, logits_BC: FloatArray) -> npt.NDArray[np.float64]:
        """Calibrated probabilities (B, classes) of an engine's logits."""
        if self.multilabel:
            return findings.probabilities(logits_BC, self.operating_point["findings"], self.classes)
        return softmax(logits_BC, self.temperature)

    @property
    def positive_class(self) -> str | None:
        """The class the operating point speaks of; None in a multi-class task."""
        return self.operating_point.get("positive_class")

    @property
    def threshold(self) -> float:
        """Probability of the positive class from which a film is called positive."""
        return float(self.operating_point.get("threshold", 0.5))

    @property
    def lanes(self) -> int:
        """Threads that may call `exact_outputs` at the same time and be faster for it."""
        return getattr(self.engine, "lanes", 1)

    def probabilities(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Calibrated probabilities (B, classes) of preprocessed uint8 films (B, S, S, C)."""
        with memory_advice(len(images_BHWC)):
            return self.calibrated(self.engine.logits(images_BHWC))

    def exact_outputs(
        self, images_BHWC: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
        """Probabilities (B, classes) and features (B, F), each film's the same bits whatever else is in the batch."""
        calls = list(call_shapes(images_BHWC, self.call_sizes))
        stream = getattr(self.engine, "stream", None)
        with memory_advice(max(self.call_sizes)):
            parts = list(stream(calls) if stream else map(self.engine.outputs, calls))
        logits_BC, features_BF = (np.concatenate(rows)[: len(images_BHWC)] for rows in zip(*parts))
        return self.calibrated(logits_BC), features_BF

    def widen_calls(self, *, most: int = 8) -> None:
        """Let one call hold up to `most` films if no bit of eight noise films' answers changes by it."""
        if self.call_sizes != (1,) or getattr(self.engine, "stream", None) or self.reader is not None:
            return
        side, channels = self.spec.image_size, self.spec.channels
        films = np.random.default_rng(0).integers(0, 256, (most, side, side, channels), dtype=np.uint8)
        alone = self.exact_outputs(films)
        sizes = tuple(size for size in (32, 16, 8, 4, 2, 1) if size <= most)
        for size in sizes[:-1]:
            together = list(map(self.engine.outputs, np.split(films, range(size, most, size))))
            logits_BC, features_BF = (np.concatenate(rows) for rows in zip(*together))
            same = np.array_equal(self.calibrated(logits_BC), alone[0])
            if not (same and np.array_equal(features_BF, alone[1])):
                return
        self.call_sizes = sizes

    def decide(self, probabilities_BC: FloatArray) -> npt.NDArray[np.int64]:
        """Class index per row: the operating point in a binary task, else the most probable class.

        Of several findings the one furthest above its threshold, whether or not that is reached.
        """
        if self.multilabel:
            return findings.leading(probabilities_BC, self.thresholds)
        return decide(probabilities_BC, self.classes, self.positive_class, self.threshold)

    def predict_files(self, paths: Sequence[str], *, batch_size: int = 16) -> Iterator[Prediction | Unreadable]:
        """One result a path, in order, streamed: films are decoded ahead in threads while the model computes."""
        if len(paths) >= WIDEN_FROM:
            self.widen_calls()
        for chunk, images in self._decoded_batches(paths, batch_size):
            readable = [item for item in images if not isinstance(item, Unreadable)]
            rows: Iterator[FloatArray] = iter(self.exact_outputs(np.stack(readable))[0] if readable else [])
            for path, image in zip(chunk, images):
                yield image if isinstance(image, Unreadable) else self.prediction(path, next(rows))

    def predict_list(self, paths: Sequence[str], *, batch_size: int) -> list[Prediction | Unreadable]:
        """The same, all at once."""
        return list(self.predict_files(paths, batch_size=batch_size))

    def _decoded_batches(
        self, paths: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[str], list[npt.NDArray[np.uint8] | Unreadable]]]:
        # Never more than a few batches are held: a folder of any size streams in bounded memory.
        remaining = iter(paths)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            ahead: list[tuple[list[str], list[Future[npt.NDArray[np.uint8] | Unreadable]]]] = []
            while True:
                while len(ahead) < 3 and (chunk := list(islice(remaining, batch_size))):
                    ahead.append((chunk, [pool.submit(self.decoded, path) for path in chunk]))
                if not ahead:
                    return
                chunk, futures = ahead.pop(0)
                yield chunk, [future.result() for future in futures]

    def decoded(self, path: str) -> npt.NDArray[Any] | Unreadable:
        """What the engine takes of one film: the film as the model sees it, or its case."""
        try:
            if self.reader is None:
                return apply(self.spec, decode(path, self.spec))
            film = apply(self.spec, decode(path, self.spec)) if has_film(path) else None
            return self.case(film, self.notes.get(path))
        except DataError as error:
            return Unreadable(path, str(error))

    def readable(self, paths: Sequence[str]) -> tuple[npt.NDArray[Any], list[int]]:
        """Those of `paths` that can be read, as one array for the engine, and which they are."""
        decoded = [self.decoded(path) for path in paths]
        kept = {k: item for k, item in enumerate(decoded) if not isinstance(item, Unreadable)}
        return (np.stack(list(kept.values())) if kept else self.blank(0)), list(kept)

    def head_calibration(self, head: str) -> dict[str, Any]:
        """Temperature and operating point of a modality's own head, or of the `fused` one."""
        own = {"temperature": self.temperature, "operating_point": self.operating_point}
        return self.branches.get(head, own)

    def attach(self, table: pd.DataFrame) -> None:
        """Remember the notes and values of a table's films (column `path`), for a model that reads them."""
        if self.reader is None:
            return
        columns = [name for name in self.reader.columns if name in table]
        if "text" in self.reader.columns and "text" not in columns:
            log.warning("the table has no column 'text': every note counts as missing")
        for path, *values in zip(table["path"], *(table[name] for name in columns)):
            self.notes[path] = dict(zip(columns, values))

    def blank(self, count: int) -> npt.NDArray[Any]:
        """`count` black films (or empty cases), to warm an engine up with."""
        side, channels = self.spec.image_size, self.spec.channels
        if self.reader is not None:
            return np.zeros(count, dtype=self.reader.dtype())
        return np.zeros((count, side, side, channels), dtype=np.uint8)

    def case(self, film: npt.NDArray[np.uint8] | None, note: Mapping[str, Any] | None) -> Any:
        """A film (or None) with what is known of it, as a model that reads notes takes it: a row of its array."""
        assert self.reader is not None
        return self.reader.rows([film], {name: [value] for name, value in (note or {}).items()})[0]

    def prediction(self, path: str, probabilities_C: FloatArray) -> Prediction:
        """What these probabilities (C,) of one film come to."""
        by_class = {name: float(value) for name, value in zip(self.classes, probabilities_C)}
        if self.multilabel:
            called_C = probabilities_C >= self.thresholds
            called = dict(zip(self.classes, called_C.tolist()))
            return Prediction(path, findings.written(called_C, self.classes), by_class, called)
        index = int(self.decide(probabilities_C[None])[0])
        return Prediction(path, self.classes[index], by_class)


def predict_together(
    predictor: Predictor, paths: Sequence[str], *, batch_size: int, group: Group
) -> Iterator[Prediction | Unreadable]:
    """`predictor.predict_files`, the work shared by the processes of `group`; every one of them gets every result.

    A film's answer does not depend on who computes it, nor on its neighbours (`exact_outputs`).
    """
    if group.size == 1:
        yield from predictor.predict_files(paths, batch_size=batch_size)
        return
    for first in range(0, len(paths), SHARED_BLOCK * group.size):
        block = paths[first : first + SHARED_BLOCK * group.size]
        start, stop = group.bounds(len(block))
        own = partial(predictor.predict_list, block[start:stop], batch_size=batch_size)
        for part in group.each(own, what="the predictions"):
            yield from part


def engine_device(engine: Engine) -> str:
    """'cpu', 'cuda' or 'mps': where the engine computes."""
    return getattr(getattr(engine, "device", None), "type", "cpu")


def call_shapes(images_BHWC: npt.NDArray[np.uint8], sizes: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
    """`images_BHWC` cut into batches of these sizes only (descending); the last is filled up with black films."""
    start = 0
    while start < len(images_BHWC):
        left = len(images_BHWC) - start
        size = next((size for size in sizes if size <= left), sizes[-1])
        chunk = images_BHWC[start : start + size]
        black = np.zeros((size - len(chunk), *chunk.shape[1:]), dtype=np.uint8)
        yield np.concatenate([chunk, black]) if len(black) else chunk
        start += size


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
    """The predictor of a checkpoint file, a bundle or a crossval folder; `model_type` is only checked against it.

    CheckpointError for one that is missing, damaged, newer, unsafe, or of another model.
    """
    if bundle.is_bundle(path):
        return _load_bundle(bundle.read(path), device=device, precision=precision, model_type=model_type)
    if fold_ensemble.is_ensemble(path):
        return _load_folds(fold_ensemble.read(path), device=device, precision=precision, model_type=model_type)
    content = checkpoint.load(path)
    config = _stored_config(content, path, model_type)
    spec = spec_from_dict(content["preprocess"])
    if "multimodal" in content:
        return _load_cases(content, config, spec, path, device=device, precision=precision)
    model = model_from_config(
        config.model, num_classes=len(content["classes"]), image_size=spec.image_size, random=True
    )
    if "pruned" in content:
        narrow(model, content["model_state_dict"])
    load_state(model, content["model_state_dict"], source=str(path))
    torch_device = resolve_device(device)
    chosen = resolve_precision(precision, torch_device)
    return _of_checkpoint(content, TorchEngine(model, spec, device=torch_device, precision=chosen), spec, config)


def _of_checkpoint(
    content: dict[str, Any], engine: Engine, spec: PreprocessSpec, config: Config, reader: CaseReader | None = None
) -> Predictor:
    """`engine` with what a checkpoint says beside its weights."""
    return Predictor(
        engine,
        spec=spec,
        classes=content["classes"],
        temperature=float(content["temperature"]),
        operating_point=content["operating_point"],
        config=config,
        provenance=content["provenance"],
        seen_films=content["seen_films"].numpy(),
        input_gate=content.get("input_gate"),
        reader=reader,
    )


def _load_cases(
    content: dict[str, Any], config: Config, spec: PreprocessSpec, path: str | Path, *, device: str, precision: str
) -> Predictor:
    """The predictor of a checkpoint that reads notes or tables beside films."""
    reader = read_state(content["multimodal"], spec)
    model = build_model(content["multimodal"], config, classes=content["classes"])
    load_state(model, content["model_state_dict"], source=str(path))
    torch_device = resolve_device(device)
    engine = CaseTorchEngine(model, reader, device=torch_device, precision=resolve_precision(precision, torch_device))
    predictor = _of_checkpoint(content, engine, spec, config, reader)
    predictor.branches = content.get("branches", {})
    return predictor


def described_by(path: Path) -> Path:
    """The file that a model is known by: of a bundle or a crossval folder its description, which holds hashes."""
    if fold_ensemble.is_ensemble(path):
        return fold_ensemble.facts_file(path)
    return path / bundle.FACTS if path.is_dir() else path


def _load_folds(
    stored: fold_ensemble.StoredEnsemble, *, device: str, precision: str, model_type: str | None
) -> Predictor:
    """The mean of the models of a cross-validation."""
    facts = stored.facts
    config = _stored_config(facts, stored.file, model_type)
    members = [load(path, device=device, precision=precision) for path in stored.members]
    first = members[0]
    for path, member in zip(stored.members, members):
        if member.classes != tuple(facts["classes"]) or member.spec != first.spec:
            raise CheckpointError(
                f"{path}: has other classes or sees films otherwise than {stored.members[0]}; give data.classes and "
                "data.colour, and cross-validate again"
            )
    engines = [member.engine for member in members]
    models = [engine.model for engine in engines if isinstance(engine, TorchEngine)]
    model = fold_ensemble.FoldEnsemble(models, [member.temperature for member in members])
    torch_device = resolve_device(device)
    chosen = resolve_precision(precision, torch_device)
    predictor = Predictor(
        fold_ensemble.FoldEngine(model, first.spec, device=torch_device, precision=chosen),
        spec=first.spec,
        classes=facts["classes"],
        temperature=float(facts["temperature"]),
        operating_point=facts["operating_point"],
        config=config,
        provenance=facts["provenance"],
        seen_films=np.unique(np.concatenate([member.seen_films for member in members])),
        input_gate=first.input_gate,
    )
    predictor.out_of_fold = stored.validation
    return predictor


def _stored_config(facts: Mapping[str, Any], path: str | Path, model_type: str | None) -> Config:
    config = located(config_from_dict(facts["config"], source=str(path)), path)
    if model_type is not None and model_type != config.model.model_type:
        raise ConfigError(
            f"--model {model_type}: {path} holds a {config.model.model_type}; drop the flag or correct it"
        )
    return config


def _load_bundle(stored: bundle.Bundle, *, device: str, precision: str, model_type: str | None) -> Predictor:
    """The predictor of a bundle, in the engine and precision that were measured and chosen."""
    facts, name = stored.facts, stored.facts["precision"]
    config = _stored_config(facts, stored.folder, model_type)
    if precision not in ("auto", name):
        raise ConfigError(f"--precision {precision}: {stored.folder} was chosen in {name}; drop the flag")
    spec = spec_from_dict(facts["preprocess"])
    reader = read_state(facts["multimodal"], spec) if "multimodal" in facts else None
    if reader is not None and stored.model_file is not None:
        engine: Engine = CaseOnnxEngine(stored.model_file, reader, precision=name, kind=facts["engine"])
    elif stored.model_file is None:
        engine = _checkpoint_engine(stored, device=device, precision=name)
    else:
        resolve_device(device)
        kind = _engine_here(facts["engine"], name)
        if name not in ONNX_ENGINES[kind].precisions:
            name = "int8" if "int8" in name else "fp32"
        engine = onnx_engine(kind, stored.model_file, spec, precision=name)
        where = engine_device(engine)
        if device != "auto" and not device.startswith(where):
            raise ConfigError(f"--device {device}: {stored.folder} was chosen for {engine.name} on {where}; drop it")
    return Predictor(
        engine,
        spec=spec,
        classes=facts["classes"],
        temperature=float(facts["temperature"]),
        operating_point=facts["operating_point"],
        config=config,
        provenance=facts["provenance"],
        seen_films=stored.seen_films,
        input_gate=stored.input_gate,
        reader=reader,
    )


def _checkpoint_engine(stored: bundle.Bundle, *, device: str, precision: str) -> Engine:
    """torch on the checkpoint that the bundle was made from, its hash checked."""
    path = stored.checkpoint
    if not path.is_file() or bundle.sha256(path) != stored.facts["checkpoint"]["sha256"]:
        raise CheckpointError(f"{stored.folder}: runs the checkpoint {path}, which is gone or changed; {bundle.AGAIN}")
    plain = load(path, device=device, precision=precision.split()[0]).engine
    if isinstance(plain, CaseTorchEngine):
        return plain
    assert isinstance(plain, TorchEngine)
    if "compiled" not in precision:
        return plain
    spec = spec_from_dict(stored.facts["preprocess"])
    return TorchEngine(plain.model, spec, device=plain.device, precision=plain.precision, compiled=True)


def _engine_here(chosen: str, precision: str) -> str:
    """The engine that was chosen, or the first other one here that runs its file; ConfigError when there is none."""
    if chosen not in ONNX_ENGINES:
        raise CheckpointError(f"bundle: engine {chosen!r} is not one of {', '.join(ONNX_ENGINES)}; {bundle.AGAIN}")
    reason = why_absent(chosen)
    if reason is None:
        return chosen
    for kind in ("openvino", "onnxruntime"):
        if kind != chosen and why_absent(kind) is None:
            log.warning("the chosen engine, %s %s, cannot run: %s; using %s", chosen, precision, reason, kind)
            return kind
    raise ConfigError(f"engine {chosen}: {reason}")


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


def find_cases(sources: Sequence[str]) -> pd.DataFrame:
    """The films among `sources` as a table with a column `path`, and what CSV tables among them say of theirs.

    A table's paths are relative to it; a row may have none, if it has a note. DataError for one that names no films.
    """
    parts = []
    for source in sources:
        if Path(source).suffix.lower() != ".csv":
            parts.append(pd.DataFrame({"path": find_films([source])}))
            continue
        table = read_text_table(Path(source), what="table of films")
        require_columns(table, ("path",), "a table to predict names a film a row under that header", where=Path(source))
        table["path"] = film_paths(Path(source), table["path"])
        parts.append(table)
    return pd.concat(parts, ignore_index=True).fillna("")


def find_films(sources: Sequence[str]) -> list[str]:
    """The image files among `sources`, folders searched through; DataError for one that is missing or holds none."""
    found: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            films = sorted(str(item) for item in path.rglob("*") if is_film(item))
            if not films:
                looked_for = ", ".join(sorted(IMAGE_SUFFIXES))
                raise DataError(f"{path}: no films in this folder (looked for {looked_for}); name another")
            found += films
        elif path.exists():
            found.append(str(path))
        else:
            raise DataError(f"{path}: no such file or folder; check the name, and the folder you are in")
    return found
