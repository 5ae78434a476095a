"""Fit a classifier of films with notes and tables, with the loop of `train`: resumable bit for bit.

    python main.py train_multimodal --manifest cases.csv --epochs 30
    python main.py train_multimodal --resume checkpoints/checkpoint_epoch_20.pth

Reads the manifest, the films and the encoders' weights; writes the run folder as `train` does. A frozen encoder runs
once a film and view, or once a note; its outputs are kept like those of `feature_cache`. Which modalities a row loses
in a step is drawn from (seed, epoch, batch). Legend: B batch, X heads, M modalities, C classes, T tokens, N cases.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

import array_cache
import checkpoint
import gate
import train
from case_engine import CaseTorchEngine
from config import Config
from data_preprocessing import Batch, Manifest, Request, ResidentFilms, can_be_resident, sequential_requests
from errors import ConfigError, DataError
from feature_cache import CannotCache, open_features
from fusion import fusion_class
from multimodal import (
    CaseInputs,
    CaseReader,
    MultimodalClassifier,
    Rows,
    film_features,
    new_model,
    parameter_groups,
    reader_state,
)
from objective import classification_loss
from predictor import load_state
from preprocess import has_film
from runtime import autocast, log, progress
from tabular import TableSpec
from text_encoder import TextEncoder, bucket_length, padded, pooled, read_terms
from train import Fit, Prepared, TrainResult, resume_config

__all__ = ["resume_config", "train_multimodal"]

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

TEXT_FEATURES_VERSION = 1
"""Raised whenever what is stored of notes changes, so that no stale features are read."""
NOTES_AT_A_TIME = 32
SPARE_PASSES = 0.1
"""Of the passes that a cached run made through the image encoder, how many more its end may cost."""
BATCHES_SORTED_TOGETHER = 8
"""Where notes go through the encoder in every step, so many batches are sorted by length, then drawn in any order."""
EXAMPLE = "path,label,patient_id,text\nfilms/1.png,PNEUMONIA,p1,Fever and cough.\nfilms/2.png,NORMAL,p2,Routine film."


@dataclass(frozen=True, kw_only=True)
class CasePrepared(Prepared):
    """Films, notes and tables of a run."""

    reader: CaseReader
    train_notes: Rows
    """What is known of the training films but their pixels, in the order of the split."""
    val_notes: Rows
    notes_digest: str


def train_multimodal(config: Config, *, resume: Path | None = None) -> TrainResult:
    """Train as `config` says, or go on from the checkpoint `resume`; as of `train.train`."""
    if resume is None:
        return train.train(checked(config), kind=CaseFit)
    # The folder or hub that the text encoder came from need not be here any more: the checkpoint holds it.
    text_state = checkpoint.load(resume).get("multimodal", {}).get("text")

    class Resumed(CaseFit):
        prepare = staticmethod(partial(prepare, text_state=text_state))

    return train.train(checked(config), resume=resume, kind=Resumed)


def checked(config: Config) -> Config:
    """`config` for cases; ConfigError for settings that are about films alone."""
    alone = {
        "training.mixup_alpha": config.training.mixup_alpha > 0,
        "training.cutmix_alpha": config.training.cutmix_alpha > 0,
        "training.progressive_resizing": config.training.progressive_resizing > 0,
        "training.head_search": config.training.head_search,
        "training.head_start": config.training.head_start != "random",
        "training.compile": config.training.compile != "off",
        "data.task=multilabel": config.data.multilabel,
    }
    for name, given in alone.items():
        if given:
            raise ConfigError(f"{name}: is for models that read films alone; drop it, or use train")
    return replace(config, data=replace(config.data, films_may_lack=True))


# --- the data --------------------------------------------------------------------------------------------------


def prepare(
    config: Config, *, random_weights: bool = False, text_state: Mapping[str, Any] | None = None
) -> CasePrepared:
    """Films as of `train.prepare`, with the notes and tables beside them and a multimodal network.

    `text_state` is that of a checkpoint whose text encoder is to be built again, without the weights that follow.
    """
    fusion_class(config.multimodal.fusion)  # a wrong name, and a list that is not there, end it before anything is said
    terms = read_terms(Path(config.multimodal.mask_terms)) if config.multimodal.mask_terms else []
    made: dict[str, Any] = {"terms": tuple(terms)}

    def build(manifest: Manifest) -> MultimodalClassifier:
        made["columns"] = table_columns(config, manifest.table)
        made["modalities"] = modalities_of(config, manifest.table, made["columns"])
        if "table" not in made["modalities"]:
            made["columns"] = []
        rows = manifest.split("train")
        made["table"] = TableSpec.fit({name: rows[name].tolist() for name in made["columns"]})
        model, made["notes"] = new_model(
            config,
            modalities=made["modalities"],
            table=made["table"],
            classes=manifest.classes,
            random_image=random_weights,
            text_state=text_state,
        )
        return model

    prepared = train.prepare(config, random_weights=random_weights, build=build)
    reader = CaseReader(prepared.spec, made["modalities"], made["table"], made["notes"], made["terms"])
    where = str(config.data.manifest or config.data.data_dir)
    notes = {name: notes_of(reader, prepared.manifest.split(name), where=where) for name in ("train", "val")}
    digest = hashlib.blake2b(digest_size=16)
    for rows in notes.values():
        digest.update(rows.tobytes())
    for name, rows in notes.items():
        log.info("%5s: %s", name, _known(reader, rows))
    if reader.notes is not None:
        full = sum(int((rows["length"] == reader.notes.max_tokens).sum()) for rows in notes.values())
        log.info("%d notes fill all %d tokens that are read; longer ones are cut", full, reader.notes.max_tokens)
    return CasePrepared(
        **vars(prepared),
        reader=reader,
        train_notes=notes["train"],
        val_notes=notes["val"],
        notes_digest=digest.hexdigest(),
    )


def notes_of(reader: CaseReader, rows: pd.DataFrame, *, where: str) -> Rows:
    """What a manifest's rows say beside their films."""
    columns = {name: rows[name].tolist() for name in reader.columns if name in rows}
    return reader.notes_of([has_film(path) for path in rows["path"]], columns, where=where)


def _known(reader: CaseReader, rows: Rows) -> str:
    """How many rows have each modality, in words."""
    counts = {"image": rows["has_film"].sum(), "text": (rows["length"] > 0).sum(), "table": rows["has_table"].sum()}
    return ", ".join(f"{counts[name]} of {len(rows)} with {name}" for name in reader.modalities)


def table_columns(config: Config, table: pd.DataFrame) -> list[str]:
    """The columns to read; DataError naming one that the manifest lacks."""
    wanted = config.multimodal.columns or []
    for name in wanted:
        if name in ("path", "label", "split", "patient_id", "text", "row"):
            raise ConfigError(f"multimodal.columns: {name!r} is not a value of a patient; name others, such as age,sex")
        if name not in table:
            found = [item for item in table.columns if item not in ("path", "label", "split", "patient_id", "row")]
            raise DataError(
                f"{config.data.manifest or config.data.data_dir}: no column {name!r}; --columns may name "
                f"{', '.join(found) or 'none: give a --manifest with columns such as age,sex'}"
            )
    return wanted


def modalities_of(config: Config, table: pd.DataFrame, columns: Sequence[str]) -> tuple[str, ...]:
    """Those asked for, else what the data have; DataError with a table that would do where there is the film alone."""
    has_text = "text" in table and bool((table["text"].str.strip() != "").any())
    wanted = config.multimodal.modalities
    if wanted is not None:
        if "table" in wanted and not columns:
            raise ConfigError("multimodal.modalities: a table needs its columns: name them, such as --columns age,sex")
        if "text" in wanted and "text" not in table:
            raise DataError(_no_text(config))
        return tuple(name for name in ("image", "text", "table") if name in wanted)
    found = ("image", *(["text"] if has_text else []), *(["table"] if columns else []))
    if len(found) == 1:
        raise DataError(_no_text(config))
    return found


def _no_text(config: Config) -> str:
    return (
        f"{config.data.manifest or config.data.data_dir}: no notes: train_multimodal needs a --manifest with a column "
        f"text (or --columns of values). This would do:\n{EXAMPLE}"
    )


# --- features of frozen encoders -------------------------------------------------------------------------------


class FilmEncoder(nn.Module):
    """The image encoder of a model as a backbone of its own: what it makes of normalised films."""

    def __init__(self, model: MultimodalClassifier) -> None:
        super().__init__()
        # Two names, because cached features are keyed by the names of the weights: means and tokens are not the same.
        self.tokens = nn.ModuleList([model.backbone] if model.needs_tokens else [])
        self.means = nn.ModuleList([] if model.needs_tokens else [model.backbone])

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, D) or tokens (B, N, D)."""
        return film_features([*self.tokens, *self.means][0], image_BCHW, tokens=len(self.tokens) > 0)


class FilmPart(nn.Module):
    """The part of a model that reads films, in the shape `feature_cache` takes networks apart."""

    def __init__(self, model: MultimodalClassifier) -> None:
        super().__init__()
        self.backbone, self.head = FilmEncoder(model), nn.Identity()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """What the encoder makes of normalised films."""
        return self.head(self.backbone(image_BCHW))


class NoteEncoder(nn.Module):
    """The text encoder of a model as rows: means, or the tokens themselves."""

    def __init__(self, text: TextEncoder, *, tokens: bool) -> None:
        super().__init__()
        self.text, self.tokens = text, tokens

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, D) or (B, T, D)."""
        tokens_BTD = self.text(ids_BT, mask_BT)
        return tokens_BTD if self.tokens else pooled(tokens_BTD, mask_BT)


class NoteFeatures:
    """What a frozen text encoder made of every different note, computed once and kept in a file."""

    def __init__(
        self,
        model: MultimodalClassifier,
        notes: dict[str, Rows],
        *,
        folder: Path,
        device: torch.device,
        precision: str,
    ) -> None:
        assert model.text is not None
        self._encoder = NoteEncoder(model.text, tokens=model.needs_tokens)
        self._device, self._precision = device, precision
        every = np.concatenate([np.column_stack([rows["length"], rows["ids"]]) for rows in notes.values()])
        # Sorted by length, the first column: notes of one length go through the encoder together.
        different, where = np.unique(every, axis=0, return_inverse=True)
        self._lengths, self._ids = different[:, 0].astype(np.int32), different[:, 1:].astype(np.int32)
        starts = np.cumsum([0, *(len(rows) for rows in notes.values())])
        self._row_of = {name: where.ravel()[a:b] for name, a, b in zip(notes, starts, starts[1:])}
        dtype: Any = np.float32 if precision == "fp32" else np.float16
        width = model.text.width
        longest = bucket_length(int(self._lengths.max()), most=self._ids.shape[1])
        shape = (len(different), longest, width) if model.needs_tokens else (len(different), width)
        path = folder / "features" / f"{array_cache.key_of([self._digest(), np.dtype(dtype).name, precision])}.npy"
        array_cache.open_or_build(
            path,
            shape=shape,
            dtype=dtype,
            build=lambda write: self._build(write, shape, dtype),
            what="feature cache",
            remedy="set data.cache_dir to a larger disk or training.feature_cache=false",
        )
        self.array: FloatArray = np.load(path, mmap_mode="r")

    def rows(self, split: str, positions: IntArray, *, length: int) -> Tensor:
        """Features (B, D), or tokens (B, `length`, D), of the notes at `positions` of a split."""
        found = self.array[self._row_of[split][positions]]
        return torch.from_numpy((found if found.ndim == 2 else found[:, :length]).astype(np.float32))

    def _digest(self) -> str:
        digest = hashlib.blake2b(repr((TEXT_FEATURES_VERSION, self._encoder.tokens)).encode(), digest_size=16)
        for name, value in self._encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        for part in (self._lengths, self._ids):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    @torch.inference_mode()
    def _build(self, write: array_cache.Writer, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
        encoder = self._encoder.to(self._device).eval()
        starts = range(0, len(self._lengths), NOTES_AT_A_TIME)
        for start in progress(starts, total=len(starts), label="notes", unit="batches"):
            chunk = slice(start, start + NOTES_AT_A_TIME)
            ids_BT, mask_BT = padded(self._ids[chunk], self._lengths[chunk])
            with autocast(self._device, self._precision):
                found = encoder(ids_BT.to(self._device), mask_BT.to(self._device)).float().cpu().numpy()
            rows = np.zeros((len(found), *shape[1:]), dtype=dtype)
            rows[(slice(None), *(slice(size) for size in found.shape[1:]))] = found
            write(rows)
        return {"notes": len(self._lengths)}


# --- the run ---------------------------------------------------------------------------------------------------


class EveryHead(nn.Module):
    """A multimodal network as the loop trains it: logits of all heads."""

    def __init__(self, model: MultimodalClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, case: CaseInputs) -> Tensor:
        """(B, X, C)."""
        return self.model.everything(case).heads_BXC


class CaseFit(Fit):
    """A run of a multimodal network."""

    verb = "train_multimodal"
    prepare = staticmethod(prepare)
    prepared: CasePrepared

    def __init__(self, config: Config, prepared: CasePrepared, **kwargs: Any) -> None:
        super().__init__(config, prepared, **kwargs)
        if self.group.size > 1:
            raise ConfigError("train_multimodal: runs in one process; start it without torchrun")
        self.network_model: MultimodalClassifier = prepared.model  # type: ignore[assignment]
        self.notes: NoteFeatures | None = None

    def _new_optimizer(self) -> torch.optim.AdamW:
        groups = parameter_groups(self.model, self.config)  # type: ignore[arg-type]
        return torch.optim.AdamW(groups, fused=self.device.type in ("cpu", "cuda"))

    # -- what is frozen runs once --

    def _choose_route(self) -> None:
        model = self.network_model
        self.features, self._cut, self.network = None, None, EveryHead(self.model)  # type: ignore[arg-type]
        if "image" in model.modalities and not _trains(model.backbone):
            self._open_features()
        if model.text is not None and not _trains(model.text) and self.config.training.feature_cache:
            self.notes = NoteFeatures(
                model,
                {"train": self.prepared.train_notes, "val": self.prepared.val_notes},
                folder=array_cache.default_folder(self.config.data.cache_dir),
                device=self.device,
                precision=self.precision,
            )
        if self.features is None and can_be_resident(self.prepared.train_set, self.device):
            self.loader = ResidentFilms(self.prepared.train_set, self.device)

    def _open_features(self) -> None:
        try:
            if not self.config.training.feature_cache:
                raise CannotCache("training.feature_cache is off")
            self.features, self._cut = open_features(
                FilmPart(self.network_model),  # type: ignore[arg-type]
                self.prepared.spec,
                self.prepared.train_set,
                self.prepared.val_set,
                views=self.config.training.cached_views,
                folder=array_cache.default_folder(self.config.data.cache_dir),
                device=self.device,
                precision=self.precision,
                engine=self.feature_engine,
                stop=self.stop,
            )
            self.feature_engine = self.features.engine
        except CannotCache as reason:
            log.info("frozen layers run in every step: %s", reason)

    # -- batches --

    def _requests(self, epoch: int | None = None) -> list[Request]:
        requests = super()._requests(epoch)
        if self.notes is not None or "text" not in self.prepared.reader.modalities:
            return requests
        return by_length(
            requests, self.prepared.train_notes["length"], seed=self.config.training.seed, epoch=requests[0].epoch
        )

    def _batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        if "image" in self.prepared.reader.modalities:
            return super()._batches(requests)
        return _without_films(requests, self.prepared.train_set.labels)

    def _inputs(self, batch: Batch) -> CaseInputs:  # type: ignore[override]
        """The cases of a training batch, some of their modalities taken away."""
        case = self._cases(batch, "train")
        settings, reader = self.config.multimodal, self.prepared.reader
        rng = np.random.default_rng((self.config.training.seed, 3, self.standing.epoch, self.standing.batch))
        present_BM = torch.stack([case.presence(name) for name in reader.modalities], dim=1).cpu().numpy()
        kept_BM = kept_modalities(present_BM, settings.modality_dropout, rng)
        return case.only(torch.from_numpy(kept_BM).to(self.device), reader.modalities)

    def _cases(self, batch: Batch, split: str) -> CaseInputs:
        """The cases of a batch on the device: films or what became of them, notes or what became of them."""
        prepared = self.prepared
        positions = batch.positions_B.numpy()
        rows = (prepared.train_notes if split == "train" else prepared.val_notes)[positions]
        case = prepared.reader.inputs(rows, None)
        if self.notes is not None:
            assert case.mask_BT is not None
            found = self.notes.rows(split, positions, length=case.mask_BT.shape[1])
            case = replace(case, ids_BT=None, text_features=found)
        case = case.to(self.device)
        if "image" not in prepared.reader.modalities:
            return case
        if self.features is not None:
            return replace(case, image_features=batch.inputs.to(self.device))
        films = prepared.train_set if split == "train" else prepared.val_set
        films_BHWC = films.finished(batch, epoch=self.standing.epoch, device=self.device)
        return replace(case, image_BCHW=self.to_input(films_BHWC))

    def _loss(self, logits_BXC: Tensor, targets_BC: Tensor) -> Tensor:
        """The fused head's loss, and a share of the mean loss of the single modalities."""
        losses = [
            classification_loss(logits_BC, targets_BC, config=self.config.training, weights_C=self.weights_C)
            for logits_BC in logits_BXC.unbind(dim=1)
        ]
        return losses[0] + self.config.multimodal.branch_loss * torch.stack(losses[1:]).mean()

    # -- validation --

    def _logits_by_batch(self, requests: Sequence[Request]) -> Iterator[FloatArray]:
        model = self._deployed().eval()
        if "image" not in self.prepared.reader.modalities:
            batches = _without_films(requests, self.prepared.val_set.labels)
        else:
            batches = self.val_loader(requests) if self.features is None else self.features.val_batches(requests)
        for batch in batches:
            with torch.inference_mode(), autocast(self.device, self.precision):
                yield model(self._cases(batch, "val")).float().cpu().numpy()

    def _is_incomplete(self) -> bool:
        return True

    def _complete_with_whole_network(self, best: dict[str, Any]) -> dict[str, Any]:
        """Temperatures and operating points of all heads with the whole network; the input gate."""
        load_state(self.model, best["model_state_dict"], source=checkpoint.BEST)
        reader, val_set = self.prepared.reader, self.prepared.val_set
        model: Any = self.model
        engine = CaseTorchEngine(model, reader, device=self.device, precision=self.precision)
        heads: list[FloatArray] = []

        def outputs(rows: Rows) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
            said = engine.everything(rows)
            heads.append(said.heads_BXC.float().cpu().numpy())
            return heads[-1][:, 0], said.features_BD.float().cpu().numpy()

        batches = [self._whole_rows(request.positions) for request in sequential_requests(len(val_set), 16)]
        val = _described(outputs, batches)
        logits_NXC = np.concatenate(heads)
        fitted = [self._calibrate(logits_NXC[:, head], val_set.labels) for head in range(logits_NXC.shape[1])]
        complete = {**best, **fitted[0], "branches": dict(zip(reader.modalities, fitted[1:]))}
        if self.config.training.input_gate and "image" in reader.modalities:
            complete |= self._case_gate(engine, val)
        checkpoint.save(self.folder / checkpoint.BEST, complete)
        return complete

    def _whole_rows(self, positions: IntArray) -> Rows:
        """Validation cases with their films."""
        notes, val_set = self.prepared.val_notes[positions], self.prepared.val_set
        rows = np.zeros(len(positions), dtype=self.prepared.reader.dtype())
        for name in notes.dtype.names or ():
            rows[name] = notes[name]
        rows["film"] = [val_set.pixels[int(row)] for row in val_set.store_rows[positions]]
        return rows

    def _case_gate(self, engine: CaseTorchEngine, val: gate.Described) -> dict[str, Any]:
        """{'input_gate': its state}, of the cases that have a film; nothing where there are too few."""
        prepared, films = self.prepared, self.prepared.train_set
        views = None if self.features is None else self.features.views
        films_run = train.films_a_run(len(films), len(self.standing.history), views=views)
        own = np.flatnonzero(prepared.train_notes["has_film"])
        most = gate.reference_count(len(own), films_run)
        if views is not None:
            spare = int(SPARE_PASSES * (films_run + len(prepared.val_set))) - len(prepared.val_set)
            most = min(most, max(gate.MIN_FILMS, spare))
        chosen = own[np.linspace(0, len(own) - 1, min(len(own), most)).astype(int)] if len(own) else own
        batches = np.array_split(films.store_rows[chosen], max(1, math.ceil(len(chosen) / 16)))
        rows = [prepared.reader.rows([films.pixels[int(row)] for row in part], {}) for part in batches]
        known = prepared.val_notes["has_film"]
        try:
            if not len(chosen) or not known.any():
                raise gate.CannotFit("there are no films")
            of_films = gate.Described(*(value[known] for value in vars(val).values()))
            state = gate.fit(_described(engine.outputs, rows), of_films)
        except gate.CannotFit as reason:
            log.info("no input gate: %s", reason)
            return {}
        log.info("input gate: %s", gate.summary(state))
        return {"input_gate": state}

    # -- saving and resuming --

    def _further_content(self) -> dict[str, Any]:
        state = reader_state(self.prepared.reader, self.network_model)
        return {"multimodal": {**state, "notes_digest": self.prepared.notes_digest}}

    def restore(self, stored: dict[str, Any], *, source: Path) -> None:
        """As of `train.Fit`; DataError too when notes or values have changed."""
        if "multimodal" not in stored:
            raise ConfigError(f"--resume {source}: a model that reads films alone; go on with: main.py train --resume")
        if stored["multimodal"].get("notes_digest") != self.prepared.notes_digest:
            raise DataError(
                f"--resume {source}: the notes or the table are not those it was trained on; restore them or start a "
                "new run"
            )
        super().restore(stored, source=source)


def _described(outputs: Callable[[Rows], Any], batches: Sequence[Rows]) -> gate.Described:
    """`gate.describe` of cases: their films are what is described."""
    cases = iter(batches)
    return gate.describe(lambda films: outputs(next(cases)), (np.ascontiguousarray(rows["film"]) for rows in batches))


def _trains(part: nn.Module) -> bool:
    return any(item.requires_grad for item in part.parameters())


def _without_films(requests: Sequence[Request], labels: IntArray) -> Iterator[Batch]:
    """Batches of cases whose model looks at no film."""
    for request in requests:
        positions = torch.from_numpy(np.asarray(request.positions))
        yield Batch(torch.empty(len(positions), 0), torch.from_numpy(labels[request.positions]), positions)


def kept_modalities(present_BM: FloatArray, share: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """1 where a modality stays: each goes with probability `share`, but a case never loses the last one it has."""
    kept_BM = (rng.random(present_BM.shape) >= share) | (present_BM == 0)
    favourite = (rng.random(present_BM.shape) * present_BM).argmax(axis=1)
    lost_all = ~(kept_BM & (present_BM > 0)).any(axis=1)
    kept_BM[lost_all, favourite[lost_all]] = True
    return kept_BM.astype(np.float32)


def by_length(requests: Sequence[Request], lengths: IntArray, *, seed: int, epoch: int) -> list[Request]:
    """The films of every few batches sorted by the length of their notes and cut anew; the batches in drawn order."""
    rng = np.random.default_rng((seed, 4, epoch))
    sorted_ones: list[Request] = []
    for start in range(0, len(requests), BATCHES_SORTED_TOGETHER):
        group = requests[start : start + BATCHES_SORTED_TOGETHER]
        positions = np.concatenate([request.positions for request in group])
        ordered = positions[np.argsort(lengths[positions], kind="stable")]
        parts = np.split(ordered, np.cumsum([len(request.positions) for request in group])[:-1])
        sorted_ones += [Request(epoch, parts[k]) for k in rng.permutation(len(parts))]
    return sorted_ones
