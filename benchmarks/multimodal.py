"""Whether a fusion of film and note beats the better of the two: repeated patient-wise cross-validation.

    python benchmarks/multimodal.py CASES.csv --weights FILE.safetensors --text-model FOLDER \\
        --mask-terms examples/terms/covid.txt --repeats 5 --out results.jsonl

Both encoders are frozen and run once over all films and notes; every fold trains every fusion on those features by the
loop of `train_multimodal`, with and without the terms masked, and scores every head on the patients held out. The epoch
is chosen on a validation split inside the training folds. A result already in --out is not computed again. Prints the
mean AUROC over folds and repeats, and how the fusion differs from the better single modality.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

import case_training
from array_cache import default_folder
from auroc import auroc
from case_engine import CaseTorchEngine
from config import Config, resolve
from data_preprocessing import Batch, FilmBatches, Manifest, Request, cached_pixels, load_manifest, split_manifest
from fusion import FUSIONS, fusion_class
from models import normalisation
from multimodal import CaseInputs, CaseReader, MultimodalClassifier, Rows, new_model
from preprocess import PreprocessSpec
from runtime import StopRequest, setup_logging
from tabular import TableSpec
from text_encoder import read_terms


@dataclass(frozen=True)
class Features:
    """All cases as the frozen encoders see them, in the order of the manifest."""

    model: MultimodalClassifier
    reader: CaseReader
    rows: Rows
    image: Tensor
    text: Tensor

    def case(self, positions: np.ndarray) -> CaseInputs:
        """The cases at these positions, encoded."""
        known = self.reader.inputs(self.rows[positions], None)
        length = known.mask_BT.shape[1] if known.mask_BT is not None else 0
        text = self.text[positions]
        return CaseInputs(
            has_image_B=known.has_image_B,
            mask_BT=known.mask_BT,
            table_BK=known.table_BK,
            has_table_B=known.has_table_B,
            image_features=self.image[positions],
            text_features=text if text.ndim == 2 else text[:, :length],
        )


class InMemory(case_training.CaseFit):
    """A run on features in memory that keeps its best head there too and writes nothing."""

    source: Features
    positions: dict[str, np.ndarray]
    """Split → positions of its cases among all of them."""

    def _choose_route(self) -> None:
        self.network = case_training.EveryHead(self.model)  # type: ignore[arg-type]
        self.features = None
        self.notes = self.source  # type: ignore[assignment]

    def _batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        return case_training._without_films(requests, self.prepared.train_set.labels)

    def _cases(self, batch: Batch, split: str) -> CaseInputs:
        return self.source.case(self.positions[split][batch.positions_B.numpy()])

    def _logits_by_batch(self, requests: Sequence[Request]) -> Iterator[Any]:
        model: Any = self.model.eval()
        with torch.inference_mode():
            for batch in case_training._without_films(requests, self.prepared.val_set.labels):
                yield model(self._cases(batch, "val")).numpy()

    def _save(self, name: str, *, epoch: int, resumable: bool) -> None:
        if not resumable:
            self.best = copy.deepcopy(self.model.head.state_dict())

    def _write(self, name: str, text: str) -> None:
        pass

    def _finish(self, seconds: float) -> Any:
        self.model.head.load_state_dict(self.best)
        return None


def folds(table: pd.DataFrame, repeats: int, count: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(repeat, fold, rows held out), stratified by label and grouped by patient; repeat r is drawn from seed r."""
    for repeat in range(repeats):
        splitter = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=repeat)
        for fold, (_, held_out) in enumerate(splitter.split(table, table["label"], table["patient_id"])):
            yield repeat, fold, held_out


def settings(arguments: argparse.Namespace, manifest: Path, fusion: str, masked: bool, seed: int) -> Config:
    """The run of one fusion on one fold."""
    return case_training.checked(
        resolve(
            {
                "data.manifest": str(manifest),
                "data.augmentation_prob": 0.0,
                "data.val_fraction": 0.2,
                "model.model_type": arguments.model,
                "model.weights": arguments.weights,
                "model.freeze_backbone": True,
                "model.hidden_features": 128,
                "model.dropout_rate": 0.5,
                "multimodal.text_model": arguments.text_model,
                "multimodal.fusion": fusion,
                "multimodal.columns": arguments.columns.split(",") if arguments.columns else None,
                "multimodal.mask_terms": arguments.mask_terms if masked else None,
                "multimodal.width": 128,
                "training.num_epochs": arguments.epochs,
                "training.early_stopping_patience": 0,
                "training.monitor": "loss",
                "training.monitor_mode": "min",
                "training.weight_decay": 0.05,
                "training.cached_views": 1,
                "training.input_gate": False,
                "training.seed": seed,
                "data.batch_size": 16,
            }
        )
    )


@cache
def encoded(arguments: tuple[tuple[str, Any], ...], tokens: bool, masked: bool) -> tuple[Features, Manifest]:
    """All films and notes through the frozen encoders, once for fusions of means and once for those of tokens."""
    options = argparse.Namespace(**dict(arguments))
    name = next(name for name, kind in FUSIONS.items() if kind.needs_tokens == tokens)
    config = settings(options, Path(options.manifest), name, masked, seed=0)
    manifest = load_manifest(config.data)
    manifest = Manifest(manifest.table.assign(row=np.arange(len(manifest))), manifest.classes, manifest.root)
    columns = case_training.table_columns(config, manifest.table)
    # Fitted on all cases: the mean and spread of an age, no label.
    table = TableSpec.fit({name: manifest.table[name].tolist() for name in columns})
    modalities = ("image", "text", "table") if columns else ("image", "text")
    model, notes = new_model(config, modalities=modalities, table=table, classes=manifest.classes)
    mean, std = normalisation(model)  # type: ignore[arg-type]
    spec = PreprocessSpec(config.data.image_size, config.data.resize, 1, mean, std)
    terms = tuple(read_terms(Path(options.mask_terms))) if masked else ()
    reader = CaseReader(spec, modalities, table, notes, terms)
    pixels, _ = cached_pixels(manifest.table["path"].tolist(), spec, default_folder(None))
    films = [pixels[row] for row in range(len(manifest))]
    rows = reader.rows(films, {name: manifest.table[name].tolist() for name in reader.columns})
    engine = CaseTorchEngine(model, reader, device=torch.device("cpu"), precision="fp32")
    image, text = [], []
    with torch.inference_mode():
        for start in range(0, len(rows), 16):
            case = engine.inputs(rows[start : start + 16])
            assert case.image_BCHW is not None and case.ids_BT is not None and case.mask_BT is not None
            image.append(model.image_features(case.image_BCHW))
            text.append(model.text_features(case.ids_BT, case.mask_BT))
    longest = max(item.shape[1] for item in text)
    if tokens:
        text = [torch.nn.functional.pad(item, (0, 0, 0, longest - item.shape[1])) for item in text]
    return Features(model, reader, rows, torch.cat(image).clone(), torch.cat(text).clone()), manifest


def scored(
    config: Config, features: Features, manifest: Manifest, held_out: np.ndarray, folder: Path
) -> dict[str, Any]:
    """Train on the other patients, and the AUROC of every head on those held out."""
    split = np.full(len(manifest), "train", dtype=object)
    split[held_out] = "test"
    table = manifest.table.assign(split=split)
    parted = split_manifest(Manifest(table, manifest.classes, manifest.root), config.data, seed=config.training.seed)
    positions = {name: np.flatnonzero(parted.table["split"] == name) for name in ("train", "val", "test")}
    torch.manual_seed(config.training.seed)
    model = MultimodalClassifier(
        features.reader.modalities,
        image=_Backbone(features.model.backbone),  # type: ignore[arg-type]
        text=features.model.text,
        table_width=features.reader.table.width,
        num_classes=len(manifest.classes),
        settings=config.multimodal,
        model=config.model,
    )
    sets = {name: FilmBatches(parted.split(name), [], None) for name in ("train", "val")}  # type: ignore[arg-type]
    prepared = case_training.CasePrepared(
        manifest=parted,
        digest="",
        seen=np.zeros(0, dtype=np.int64),
        spec=features.reader.spec,
        train_set=sets["train"],
        val_set=sets["val"],
        model=model,  # type: ignore[arg-type]
        reader=features.reader,
        train_notes=features.rows[positions["train"]],
        val_notes=features.rows[positions["val"]],
        notes_digest="",
    )
    fit = InMemory(config, prepared, folder=folder, device=torch.device("cpu"), precision="fp32")
    fit.source, fit.positions = features, positions
    with StopRequest() as stop:
        fit.run(stop)
    with torch.inference_mode():
        logits = model.eval().everything(features.case(positions["test"])).heads_BXC.numpy()
    assert fit.positive is not None
    positive = manifest.classes.index(fit.positive)
    scores = logits[..., positive] - logits[..., 1 - positive]
    labels = (parted.split("test")["label"] == positive).to_numpy()
    return {name: auroc(labels, scores[:, head]) for head, name in enumerate(("fused", *features.reader.modalities))}


class _Backbone:
    """A film encoder where a classifier is expected."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone


def run(arguments: argparse.Namespace) -> None:
    """Every result that is not in --out yet, until --seconds have passed."""
    out, started = Path(arguments.out), time.perf_counter()
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(item["repeat"], item["fold"], item["masked"], item["fusion"]) for item in known}
    key = tuple(sorted(vars(arguments).items()))
    _, manifest = encoded(key, False, False)
    for repeat, fold, held_out in folds(manifest.table, arguments.repeats, arguments.folds):
        for masked in (False, True) if arguments.mask_terms else (False,):
            for fusion in arguments.fusions.split(","):
                if (repeat, fold, masked, fusion) in done:
                    continue
                if time.perf_counter() - started > arguments.seconds:
                    return
                features, _ = encoded(key, fusion_class(fusion).needs_tokens, masked)
                config = settings(arguments, Path(arguments.manifest), fusion, masked, seed=repeat)
                with tempfile.TemporaryDirectory() as name:
                    found = scored(config, features, manifest, held_out, Path(name))
                line = {"repeat": repeat, "fold": fold, "masked": masked, "fusion": fusion, **found}
                with out.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")


def summary(out: Path) -> str:
    """Mean AUROC a fusion, and the differences from the better single modality, fold by fold and of the means."""
    table = pd.DataFrame([json.loads(line) for line in out.read_text().splitlines()])
    # Two processes that write one file may both have run a fold: it counts once.
    table = table.drop_duplicates(["repeat", "fold", "masked", "fusion"])
    alone = [name for name in ("image", "text", "table") if name in table]
    lines = [f"{len(table)} runs; mean over folds and repeats (SD of the repeats' means)"]
    for (masked, fusion), part in table.groupby(["masked", "fusion"], sort=False):
        by_repeat = part.groupby("repeat")[["fused", *alone]].mean()
        cells = [f"{name} {by_repeat[name].mean():.3f} ({by_repeat[name].std():.3f})" for name in ("fused", *alone)]
        gain = by_repeat["fused"] - by_repeat[alone].mean().max()
        said = f"fused - better alone {gain.mean():+.3f}, lowest of {len(gain)} repeats {gain.min():+.3f}"
        lines.append(f"{'masked' if masked else 'as given':8} {fusion:16} {', '.join(cells)}; {said}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("manifest", help="CSV with path,label,patient_id,text")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--text-model", required=True)
    parser.add_argument("--mask-terms", default=None)
    parser.add_argument("--columns", default="")
    parser.add_argument("--fusions", default=",".join(FUSIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after so long")
    parser.add_argument("--out", default="multimodal_results.jsonl")
    arguments = parser.parse_args()
    setup_logging(quiet=True)
    arguments.manifest = str(Path(arguments.manifest).resolve())
    run(arguments)
    if Path(arguments.out).exists():
        print(summary(Path(arguments.out)))


if __name__ == "__main__":
    main()
