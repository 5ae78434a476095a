"""The films to look at again: those the model is most wrong, least sure and most influenced by, with maps.

    python main.py explain --worst 24 --split test --checkpoint checkpoints/best_model.pth --output-dir review
    python main.py train --exclude review/review.csv

Reads a checkpoint and a labelled split; writes contact_sheet.html, contact_sheet.png and review.csv, in whose column
`mark` a reader writes exclude where the label is wrong or the film useless. Never changes a label itself.
Legend: N films, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch

import evaluate
from attribution import Explained, FloatArray, Uint8Array, overlay
from config import Overrides, flatten, resolve
from data_preprocessing import IntArray, Manifest
from engines import TorchEngine
from errors import ConfigError, DataError, examples
from explain import Film, Settings, explain_films, film_pictures, open_model
from explain_report import contact_sheet_html, reasons_in_words
from predictor import Unreadable, softmax
from preprocess import apply, decode
from runtime import atomic_write, log, progress, require_writable, write_text

REASONS = ("wrong", "unsure", "influential")
DAMPING = 0.01
"""Added to the curvature, as a share of its mean diagonal: it bounds the influence along directions no film fills."""
MAX_HIDDEN = 256
"""Features the influence is computed in; wider ones are projected onto their leading directions."""
TILE = 224
"""Side of a film on the contact sheet, in pixels."""
COLUMNS = 3
"""Films beside one another on the contact sheet, each with its map."""


def review(
    *,
    checkpoint: Path | None,
    overrides: Sequence[Overrides],
    count: int,
    output_dir: Path,
    settings: Settings,
    bundle: Path | None = None,
    model_type: str | None = None,
) -> dict[str, Any]:
    """Find the `count` films of a split to look at again and write the sheet; what was found.

    UserError kinds for the user's mistakes; unreadable films are an error unless data.skip_unreadable.
    """
    if count < 1:
        raise ConfigError(f"--worst: {count} is no number of films; ask for 1 or more")
    runtime = resolve(*overrides).runtime
    explained = open_model(checkpoint, bundle, device=runtime.device, model_type=model_type)
    stored = explained.predictor
    if stored.multilabel:
        raise ConfigError(
            "--worst: looks for films of a wrong class, and this model has several findings a film; the report.html "
            "that evaluate writes for each finding shows its worst errors"
        )
    config = resolve(flatten(stored.config.to_dict(), source=str(explained.checkpoint)), *overrides)
    manifest, _ = evaluate.evaluation_manifest(stored, config)
    rows = manifest.split(config.evaluation.split)
    if rows.empty:
        raise DataError(f"split {config.evaluation.split!r} has no films in {manifest.root}; choose with --split")
    require_writable(output_dir)
    rows, logits_NC, hidden_NF = _outputs(explained, rows, config.data.batch_size, config.data.skip_unreadable)
    labels_N = rows["label"].to_numpy(np.int64)
    probabilities_NC = softmax(logits_NC, stored.temperature)
    scores = {
        "wrong": -np.log(np.maximum(probabilities_NC[np.arange(len(rows)), labels_N], 1e-12)),
        "unsure": -margin(probabilities_NC, stored.positive_class, stored.threshold, stored.classes),
        "influential": self_influence(hidden_NF, softmax(logits_NC, 1.0), labels_N),
    }
    chosen = worst(scores, count)
    films = _explain_chosen(explained, rows, chosen, settings)
    table = _table(manifest, rows, films, list(chosen.values()), list(chosen), explained, scores)
    _write(table, films, explained, settings, output_dir, config.evaluation.split)
    return {
        "split": config.evaluation.split,
        "films": len(rows),
        "chosen": len(table),
        "by_reason": {name: int(sum(name in reasons for reasons in chosen.values())) for name in REASONS},
        "misclassified": int((stored.decide(probabilities_NC) != labels_N).sum()),
        "review": str(output_dir / "review.csv"),
        "sheet": str(output_dir / "contact_sheet.html"),
    }


# --- which films -----------------------------------------------------------------------------------------------


def _outputs(
    explained: Explained, rows: pd.DataFrame, batch_size: int, skip_unreadable: bool
) -> tuple[pd.DataFrame, FloatArray, FloatArray]:
    """The readable rows, their logits (N, C), and what enters the last linear layer (N, F)."""
    engine = explained.predictor.engine
    assert isinstance(engine, TorchEngine)
    kept, logits, hidden, unreadable = [], [], [], []
    starts = range(0, len(rows), batch_size)
    for start in progress(starts, total=len(rows), label="predicting", step=batch_size):
        images = []
        for position in range(start, min(start + batch_size, len(rows))):
            try:
                images.append(apply(explained.spec, decode(rows["path"].iloc[position], explained.spec)))
                kept.append(position)
            except DataError as error:
                unreadable.append(str(error))
        if images:
            logits_BC, features_BF = engine.outputs(np.stack(images))
            logits.append(logits_BC)
            hidden.append(_last_hidden(explained, features_BF))
    if unreadable and not skip_unreadable:
        raise DataError(
            f"{len(unreadable)} of {len(rows)} films cannot be read: {examples(unreadable)} (--skip-unreadable leaves "
            "them out)"
        )
    if not kept:
        raise DataError(f"none of the {len(rows)} films can be read, e.g. {unreadable[0]}")
    for reason in unreadable:
        log.warning("left out: %s", reason)
    return rows.iloc[kept], np.concatenate(logits), np.concatenate(hidden)


@torch.inference_mode()
def _last_hidden(explained: Explained, features_BF: FloatArray) -> FloatArray:
    before_last = explained.model.head[:-1]
    return before_last(torch.from_numpy(features_BF).to(explained.device)).float().cpu().numpy()


def margin(probabilities_NC: FloatArray, positive: str | None, threshold: float, classes: Sequence[str]) -> FloatArray:
    """How far each film is from another prediction (N,): from the threshold, or between the two likeliest classes."""
    if positive is not None:
        return np.abs(probabilities_NC[:, list(classes).index(positive)] - threshold)
    ordered = np.sort(probabilities_NC, axis=1)
    return ordered[:, -1] - ordered[:, -2]


def self_influence(hidden_NF: FloatArray, probabilities_NC: FloatArray, labels_N: IntArray) -> FloatArray:
    """How much a film's own loss would change if the last layer were fitted without it (N,): gᵀ H⁻¹ g, 0 or more.

    g is the gradient of the film's cross-entropy in the last linear layer, H the mean curvature over these films plus
    `DAMPING` (Koh and Liang 2017, self-influence, for the last layer only). High where only memory explains the label:
    wrong labels and odd films. For films outside training: what the layer would have to unlearn if they were added.
    """
    rows_NF = _projected(hidden_NF.astype(np.float64))
    count, width = rows_NF.shape
    classes = probabilities_NC.shape[1]
    residual_NC = probabilities_NC - np.eye(classes)[labels_N]
    gradient_NP = np.einsum("nc,nf->ncf", residual_NC, rows_NF).reshape(count, classes * width)
    curvature = np.zeros((classes * width,) * 2)
    for a in range(classes):
        for b in range(a, classes):
            weight_N = probabilities_NC[:, a] * ((a == b) - probabilities_NC[:, b])
            block = (rows_NF * weight_N[:, None]).T @ rows_NF / count
            curvature[a * width : (a + 1) * width, b * width : (b + 1) * width] = block
            curvature[b * width : (b + 1) * width, a * width : (a + 1) * width] = block
    damping = DAMPING * max(np.trace(curvature) / len(curvature), 1e-12)
    solved = np.linalg.solve(curvature + damping * np.eye(len(curvature)), gradient_NP.T)
    return np.einsum("np,pn->n", gradient_NP, solved)


def _projected(hidden_NF: FloatArray) -> FloatArray:
    """Centred features on their leading directions, and a column of ones for the bias."""
    centred = hidden_NF - hidden_NF.mean(axis=0)
    if centred.shape[1] > MAX_HIDDEN:
        _, _, directions = np.linalg.svd(centred, full_matrices=False)
        centred = centred @ directions[:MAX_HIDDEN].T
    return np.column_stack([centred, np.ones(len(centred))])


def worst(scores: Mapping[str, FloatArray], count: int) -> dict[int, list[str]]:
    """Position → its reasons, of up to `count` films: the rankings take turns, highest score first."""
    orders = {name: np.argsort(-values, kind="stable") for name, values in scores.items()}
    total = len(next(iter(orders.values())))
    chosen: dict[int, list[str]] = {}
    for place in range(total):
        for name, order in orders.items():
            film = int(order[place])
            if film in chosen:
                chosen[film].append(name)
            elif len(chosen) < count:
                chosen[film] = [name]
        if len(chosen) == min(count, total):
            break
    return chosen


# --- the sheet -------------------------------------------------------------------------------------------------


def _explain_chosen(
    explained: Explained, rows: pd.DataFrame, chosen: Mapping[int, Sequence[str]], settings: Settings
) -> list[Film]:
    paths = [rows["path"].iloc[position] for position in chosen]
    found = explain_films(explained, paths, replace(settings, methods=settings.methods[:1]))
    films = []
    for film in progress(found, total=len(paths), label="explaining"):
        if isinstance(film, Unreadable):
            raise DataError(film.reason)
        films.append(film)
    return films


def _table(
    manifest: Manifest,
    rows: pd.DataFrame,
    films: Sequence[Film],
    reasons: Sequence[Sequence[str]],
    positions: Sequence[int],
    explained: Explained,
    scores: Mapping[str, FloatArray],
) -> pd.DataFrame:
    """review.csv: a film a row, `mark` empty."""
    classes = explained.classes
    return pd.DataFrame(
        {
            "path": [manifest.relative_path(film.path) for film in films],
            "label": [classes[rows["label"].iloc[position]] for position in positions],
            "prediction": [classes[film.prediction] for film in films],
            "probability": [f"{film.probabilities_C[film.prediction]:.4f}" for film in films],
            "reason": [" ".join(items) for items in reasons],
            "loss": [f"{scores['wrong'][position]:.4f}" for position in positions],
            "influence": [f"{scores['influential'][position]:.4g}" for position in positions],
            "mark": "",
        }
    )


def _write(
    table: pd.DataFrame, films: Sequence[Film], explained: Explained, settings: Settings, folder: Path, split: str
) -> None:
    write_text(folder / "review.csv", table.to_csv(index=False))
    method = settings.methods[0]
    pictures = [film_pictures(film, explained.classes, settings.opacity) for film in films]
    rows: list[dict[str, Any]] = [dict(zip(table.columns, row)) for row in table.itertuples(index=False)]
    model = explained.predictor.config.model.model_type
    html = contact_sheet_html(rows, pictures, method=method, model=model, split=split)
    write_text(folder / "contact_sheet.html", html)
    pairs = [
        np.hstack([overlay(film.image_SSC, film.maps[method], opacity=opacity) for opacity in (0, settings.opacity)])
        for film in films
    ]
    sheet = contact_sheet(pairs, rows)
    with atomic_write(folder / "contact_sheet.png") as stream:
        stream.write(cv2.imencode(".png", np.ascontiguousarray(sheet[..., ::-1]))[1].tobytes())


def contact_sheet(pairs: Sequence[Uint8Array], rows: Sequence[Mapping[str, Any]]) -> Uint8Array:
    """Films beside their maps (S, 2 S, 3) in COLUMNS, RGB, over three lines: label and prediction, reasons, file."""
    height, width = TILE + 50, 2 * TILE + 8
    sheet = np.full((-(-len(pairs) // COLUMNS) * height, COLUMNS * width, 3), 255, dtype=np.uint8)
    for number, (picture, row) in enumerate(zip(pairs, rows)):
        top, left = number // COLUMNS * height, number % COLUMNS * width
        sheet[top : top + TILE, left : left + 2 * TILE] = cv2.resize(picture, (2 * TILE, TILE))
        said = (
            f"{number + 1}. {row['label']}, called {row['prediction']} {float(row['probability']):.2f}",
            reasons_in_words(row["reason"]),
            Path(row["path"]).name[:68],
        )
        for line, words in enumerate(said):
            place = (left + 3, top + TILE + 13 + 15 * line)
            cv2.putText(sheet, words, place, cv2.FONT_HERSHEY_SIMPLEX, 0.36, (30, 30, 30), 1, cv2.LINE_AA)
    return sheet


def summary(result: Mapping[str, Any]) -> str:
    """What was found, and what to do with it."""
    reasons = ", ".join(f"{name} {count}" for name, count in result["by_reason"].items())
    return (
        f"{result['chosen']} of {result['films']} films of split {result['split']} to look at again ({reasons}; "
        f"{result['misclassified']} films of the split are misclassified)\n"
        f"look at {result['sheet']}, write exclude into the column mark of {result['review']}, then train --exclude it"
    )
