"""Predict films or whole folders into a CSV, streamed.

    python main.py predict films/ --checkpoint checkpoints/best_model.pth --output-dir predictions

Writes predictions.csv (path,prediction,confidence,probability_<CLASS>…, and call_<FINDING>… of 0 or 1 where a film may
have several findings), row by row in bounded memory, and unreadable.csv when films could not be read. Never stops at a
bad film, never leaves one out silently.
"""

from __future__ import annotations

import collections
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from errors import ConfigError
from findings import NONE, SEPARATOR
from predictor import Prediction, Predictor, Unreadable, find_cases, load, none_readable, predict_together
from process_group import ALONE, Group
from runtime import log, progress


def predict(
    sources: Sequence[str],
    *,
    checkpoint: Path,
    output_dir: Path,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "auto",
    model_type: str | None = None,
    note: str | None = None,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Predict every film among `sources` (files, folders, or tables that name films); counts, and the files written.

    What tables say beside the films, or `note` of every film, goes to models that read it. The processes of `group`
    share the work; the first one writes, the others get its result.
    """
    cases = find_cases(sources)
    paths = cases["path"].tolist()
    predictor = load(checkpoint, device=device, precision=precision, model_type=model_type)
    if note is not None and predictor.reader is None:
        raise ConfigError(f"--text: {checkpoint} reads films alone; drop the flag")
    predictor.attach(cases if note is None else cases.assign(text=note))
    results = predict_together(predictor, paths, batch_size=batch_size, group=group)
    if group.is_main:
        written = _write(results, predictor, len(paths), output_dir)
    else:
        collections.deque(results, maxlen=0)
    return group.from_main(lambda: written, what="the predictions written by the first process")


def _write(
    results: Iterator[Prediction | Unreadable], predictor: Predictor, count: int, output_dir: Path
) -> dict[str, Any]:
    classes = predictor.classes
    calls = [f"call_{name}" for name in classes] if predictor.multilabel else []
    counts = dict.fromkeys([*classes, NONE] if predictor.multilabel else classes, 0)
    unreadable: list[Unreadable] = []
    target = output_dir / "predictions.csv"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["path", "prediction", "confidence", *(f"probability_{name}" for name in classes), *calls])
            for result in progress(results, total=count, label="predicting"):
                if isinstance(result, Unreadable):
                    unreadable.append(result)
                    continue
                for name in result.prediction.split(SEPARATOR) if predictor.multilabel else [result.prediction]:
                    counts[name] += 1
                values = [result.confidence, *result.probabilities.values()]
                called = [int(value) for value in (result.called or {}).values()]
                rows.writerow([result.path, result.prediction, *(f"{value:.6f}" for value in values), *called])
        listed = _write_unreadable(unreadable, output_dir)
    except OSError as error:
        raise ConfigError(f"--output-dir {output_dir}: cannot be written ({error.strerror}); name another") from None
    if len(unreadable) == count:
        raise none_readable(unreadable)
    for item in unreadable:
        log.warning("unreadable: %s", item.reason)
    return {
        "films": count,
        "predicted": counts,
        "unreadable": [item.path for item in unreadable],
        "predictions": str(target),
        "unreadable_list": listed,
    }


def _write_unreadable(unreadable: Sequence[Unreadable], folder: Path) -> str | None:
    """unreadable.csv, or None and no stale file of an earlier run when everything was readable."""
    path = folder / "unreadable.csv"
    if not unreadable:
        path.unlink(missing_ok=True)
        return None
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "reason"])
        rows.writerows([item.path, item.reason] for item in unreadable)
    return str(path)


def summary(result: dict[str, Any]) -> str:
    """The counts in words."""
    counts = ", ".join(f"{name} {count}" for name, count in result["predicted"].items())
    lost = (
        f"; {len(result['unreadable'])} unreadable, listed in {result['unreadable_list']}"
        if result["unreadable"]
        else ""
    )
    return f"{result['films']} films: {counts}{lost}\nwritten to {result['predictions']}"
