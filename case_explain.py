"""The verb `explain` for models that read notes: heat map and word attributions side by side.

    python main.py explain cases.csv --checkpoint checkpoints/best_model.pth

Reads films, or tables that name films with their notes. Writes for each case <name>_overlay.png, <name>_attribution.npz
and, where there is a note, <name>_words.json; over all of them explanation.json and explanation_report.html. Models of
films alone go to `explain`. Never changes the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import explain as film_explain
from attribution import Explained
from case_engine import CaseTorchEngine
from errors import ConfigError
from explain import Film, Settings, class_index, film_pictures, film_row, open_model, output_names, write_film
from explain_report import case_html
from predictor import Unreadable, find_cases, none_readable, softmax
from preprocess import has_film
from runtime import code_version, log, progress, require_writable, write_json, write_text
from word_attribution import film_maps, values, words

SHOWN_CASES = 12
"""Cases in the report; all of them are in the folder."""


def explain(
    sources: Sequence[str],
    *,
    checkpoint: Path | None,
    output_dir: Path,
    settings: Settings,
    bundle: Path | None = None,
    device: str = "auto",
    model_type: str | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """Explain every film or case among `sources`; the content of explanation.json.

    `note` is that of every film. UserError kinds for the user's mistakes; cases that cannot be read are listed, and an
    error when that is all.
    """
    explained = open_model(checkpoint, bundle, device=device, model_type=model_type)
    if explained.predictor.reader is None:
        if note is not None:
            raise ConfigError(f"--text: {explained.checkpoint} reads films alone; drop the flag")
        return film_explain.explain(
            sources, checkpoint=checkpoint, bundle=bundle, output_dir=output_dir, settings=settings, explained=explained
        )
    cases = find_cases(sources)
    explained.predictor.attach(cases if note is None else cases.assign(text=note))
    require_writable(output_dir)
    return _explained(explained, cases["path"].tolist(), output_dir, settings)


def _explained(explained: Explained, paths: Sequence[str], folder: Path, settings: Settings) -> dict[str, Any]:
    names = output_names(paths)
    rows: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    unreadable: list[Unreadable] = []
    for name, path in zip(names, progress(paths, total=len(paths), label="explaining")):
        made = _case(explained, path, folder, name, settings)
        if isinstance(made, Unreadable):
            unreadable.append(made)
            continue
        row, picture = made
        rows.append(row)
        pictures += [picture] if len(pictures) < SHOWN_CASES else []
    if not rows:
        raise none_readable(unreadable, "cases")
    for item in unreadable:
        log.warning("unreadable: %s", item.reason)
    predictor = explained.predictor
    result = {
        "cases": len(rows),
        "unreadable": [item.path for item in unreadable],
        "model": predictor.config.model.model_type,
        "fusion": predictor.config.multimodal.fusion,
        "checkpoint": explained.checkpoint.name,
        "classes": list(predictor.classes),
        "target": settings.target or "predicted class",
        "methods": list(settings.methods),
        "code_version": code_version(),
        "per_film": rows,
    }
    write_json(folder / "explanation.json", result)
    write_text(folder / "explanation_report.html", case_html(result, pictures))
    return result


def _case(
    explained: Explained, path: str, folder: Path, name: str, settings: Settings
) -> tuple[dict[str, Any], dict[str, Any]] | Unreadable:
    """A case's line in explanation.json and its part of the page."""
    predictor, engine = explained.predictor, explained.predictor.engine
    assert isinstance(engine, CaseTorchEngine)
    row = predictor.decoded(path)
    if isinstance(row, Unreadable):
        return row
    batch: Any = np.stack([row])
    said = engine.everything(batch)
    probabilities_C = softmax(said.logits_BC.float().cpu().numpy(), predictor.temperature)[0]
    prediction = int(predictor.decide(probabilities_C[None])[0])
    wanted = class_index(explained, settings.target)
    target = prediction if wanted is None else wanted
    note = str(predictor.notes.get(path, {}).get("text", ""))
    about = {
        "words": [asdict(item) for item in words(engine, batch, note, target=target)],
        "values": [asdict(item) for item in values(engine, batch, target=target)],
        "weights": None
        if said.weights_BM is None
        else dict(zip(engine.reader.modalities, (float(value) for value in said.weights_BM[0]))),
    }
    has_map = bool(batch["has_film"][0]) and "image" in engine.reader.modalities
    found = film_maps(engine, batch, methods=settings.methods, target=target, layer=settings.layer) if has_map else {}
    film = Film(
        path,
        batch["film"][0],
        probabilities_C,
        prediction,
        target,
        {method: item.raw_BSS[0] for method, item in found.items()},
        {method: item.map_BSS[0] for method, item in found.items()},
    )
    files: dict[str, Any] = write_film(film, folder, name, predictor.classes, opacity=settings.opacity)
    if about["words"]:
        write_json(folder / f"{name}_words.json", {"note": note, **about})
        files["words"] = f"{name}_words.json"
    picture = film_pictures(film, predictor.classes, settings.opacity)
    shown = Path(path).name if has_film(path) else "no film"
    return film_row(film, predictor.classes) | about | {"files": files}, {**picture, **about, "name": shown}


def summary(result: dict[str, Any]) -> str:
    """The result in words."""
    if "cases" not in result:
        return film_explain.summary(result)
    lost = f", {len(result['unreadable'])} unreadable" if result["unreadable"] else ""
    return f"{result['cases']} cases explained by {', '.join(result['methods'])} and by their words{lost}"
