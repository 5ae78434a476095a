"""Show where a model looks on films, and whether these maps can be believed.

    python main.py explain films/ --checkpoint checkpoints/best_model.pth --method gradcam,occlusion

Reads films and a checkpoint (or the bundle made from one). Writes for each film <name>_overlay.png and
<name>_attribution.npz (with several methods <name>_<method>_…), and over all of them explanation.json and
explanation_report.html. Never changes the model, and never shows a map without the checks beside it.
Legend: B batch, S side of the film in pixels, C channels or classes, K cells.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

import attribution_checks as checks
from attribution import (
    Attribution,
    Explained,
    FloatArray,
    Uint8Array,
    attributions,
    check_methods,
    heat_map,
    overlay,
    torch_model,
)
from data_preprocessing import patients_of, prefetch
from errors import ConfigError, DataError, nearest
from estimates import as_groups, not_estimable
from explain_report import SUSPECT, explanation_html
from predictor import Unreadable, find_films, none_readable
from preprocess import apply, decode
from resampling import Sampling, mean_statistic
from runtime import code_version, log, progress, require_writable, write_json, write_text

__all__ = ["explain", "explain_films", "heat_map", "overlay", "summary", "torch_model"]

SHOWN_FILMS = 12
"""Films in the report; all of them are in the folder."""
MIN_FILMS = 8
"""From this many films on a remark draws a conclusion; percentiles of fewer are too narrow."""
SAME_MAP = 0.5
"""A rank correlation with the map of a randomised network below this counts as another map."""


@dataclass(frozen=True)
class Film:
    """One film, what the model says of it and where that comes from."""

    path: str
    image_SSC: Uint8Array
    probabilities_C: FloatArray
    prediction: int
    """Class index, by the operating point."""
    target: int
    """Class index that is explained."""
    raw: dict[str, npt.NDArray[np.float32]]
    """Method → attribution (S, S) in its own units."""
    maps: dict[str, npt.NDArray[np.float32]]
    """Method → evidence for the target (S, S), scaled to [0, 1]."""


@dataclass(frozen=True)
class Settings:
    """What is asked of `explain`."""

    methods: tuple[str, ...] = ("gradcam",)
    target: str | None = None
    """The class explained on every film; None takes each film's predicted class, or its leading finding."""
    layer: str | None = None
    """Module whose activations are mapped; None takes the last feature stage."""
    opacity: float = 0.5
    """Cover of the hottest place; in [0, 1]."""
    sanity_films: int = 16
    """Films the checks are made on, evenly spread; 0 leaves the checks out."""
    batch_size: int = 16
    seed: int = 42
    level: float = 0.95
    """Coverage of the intervals."""
    n_boot: int = 2000

    def __post_init__(self) -> None:
        check_methods(self.methods)
        if not 0 <= self.opacity <= 1:
            raise ConfigError(f"--opacity: {self.opacity:g} is out of range; give 0 (film only) to 1 (map only)")
        if self.sanity_films < 0:
            raise ConfigError(f"--sanity-films: {self.sanity_films} is no number of films; 0 leaves the checks out")


# --- films -----------------------------------------------------------------------------------------------------


def explain_films(explained: Explained, paths: Sequence[str], settings: Settings) -> Iterator[Film | Unreadable]:
    """Every film explained, in order, streamed; the next batches are decoded meanwhile."""
    target = class_index(explained, settings.target)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        chunks = [paths[start : start + settings.batch_size] for start in range(0, len(paths), settings.batch_size)]
        decoded = (list(pool.map(lambda path: _decoded(explained, path), chunk)) for chunk in chunks)
        for chunk, images in zip(chunks, prefetch(decoded, depth=2)):
            readable = [item for item in images if not isinstance(item, Unreadable)]
            done = iter(_explained(explained, np.stack(readable), target, settings) if readable else [])
            for path, image in zip(chunk, images):
                yield image if isinstance(image, Unreadable) else Film(path, image, *next(done))


def _decoded(explained: Explained, path: str) -> Uint8Array | Unreadable:
    try:
        return apply(explained.spec, decode(path, explained.spec))
    except DataError as error:
        return Unreadable(path, str(error))


def class_index(explained: Explained, name: str | None) -> int | None:
    """The position of class `name`; ConfigError when the model has no such class."""
    if name is None:
        return None
    if name not in explained.classes:
        raise ConfigError(
            f"--target: {name!r} is not a class of the model; use one of {', '.join(explained.classes)}"
            f"{nearest(name, explained.classes)}"
        )
    return explained.classes.index(name)


def _explained(
    explained: Explained, images_BSSC: Uint8Array, target: int | None, settings: Settings
) -> Iterator[tuple[FloatArray, int, int, dict[str, Any], dict[str, Any]]]:
    probabilities_BC = explained.predictor.probabilities(images_BSSC)
    predictions_B = explained.predictor.decide(probabilities_BC)
    targets_B = predictions_B if target is None else np.full(len(images_BSSC), target)
    found = _attributed(explained, images_BSSC, targets_B, settings)
    for row in range(len(images_BSSC)):
        raw = {name: item.raw_BSS[row] for name, item in found.items()}
        maps = {name: item.map_BSS[row] for name, item in found.items()}
        yield probabilities_BC[row], int(predictions_B[row]), int(targets_B[row]), raw, maps


def _attributed(
    explained: Explained, images_BSSC: Uint8Array, targets_B: npt.NDArray[np.int64], settings: Settings
) -> dict[str, Attribution]:
    return attributions(
        explained.model,
        explained.spec,
        images_BSSC,
        methods=settings.methods,
        target=targets_B,
        device=explained.device,
        layer=settings.layer,
        seed=settings.seed,
    )


# --- the verb --------------------------------------------------------------------------------------------------


def explain(
    sources: Sequence[str],
    *,
    checkpoint: Path | None,
    output_dir: Path,
    settings: Settings,
    bundle: Path | None = None,
    device: str = "auto",
    model_type: str | None = None,
    explained: Explained | None = None,
) -> dict[str, Any]:
    """Explain every film among `sources` (files or folders); the content of explanation.json.

    UserError kinds for the user's mistakes; films that cannot be read are listed, and an error when that is all.
    """
    paths = find_films(sources)
    explained = explained or open_model(checkpoint, bundle, device=device, model_type=model_type)
    require_writable(output_dir)
    names = output_names(paths)
    spread = _spread(len(paths), settings.sanity_films)
    shown = _spread(len(paths), SHOWN_FILMS)
    rows: list[dict[str, Any]] = []
    unreadable: list[Unreadable] = []
    checked: list[Film] = []
    pictures: list[dict[str, Any]] = []
    results = explain_films(explained, paths, settings)
    for position, film in enumerate(progress(results, total=len(paths), label="explaining")):
        if isinstance(film, Unreadable):
            unreadable.append(film)
            continue
        files = write_film(film, output_dir, names[position], explained.classes, opacity=settings.opacity)
        said = _said(explained, film)
        rows.append(film_row(film, explained.classes) | said | {"files": files})
        checked += [film] if position in spread else []
        pictures += [film_pictures(film, explained.classes, settings.opacity) | said] if position in shown else []
    if not rows:
        raise none_readable(unreadable)
    for item in unreadable:
        log.warning("unreadable: %s", item.reason)
    result = _result(explained, settings, rows, unreadable, checked)
    write_json(output_dir / "explanation.json", result)
    write_text(output_dir / "explanation_report.html", explanation_html(result, pictures))
    return result


def open_model(
    checkpoint: Path | None, bundle: Path | None, *, device: str = "auto", model_type: str | None = None
) -> Explained:
    """The model to explain: of a bundle's checkpoint, or of the checkpoint alone."""
    if bundle is not None:
        if not bundle.is_dir():
            raise ConfigError(f"--bundle {bundle}: no such folder; name one that optimize wrote")
        explained = torch_model(bundle, checkpoint=checkpoint, device=device)
    elif checkpoint is not None:
        explained = torch_model(checkpoint, device=device)
    else:
        raise ConfigError("explain: name the model with --checkpoint FILE, or --bundle DIR that optimize wrote")
    own = explained.predictor.config.model.model_type
    if model_type is not None and model_type != own:
        raise ConfigError(f"--model {model_type}: {explained.checkpoint} holds a {own}; drop the flag or correct it")
    return explained


def _said(explained: Explained, film: Film) -> dict[str, str]:
    """What takes the place of the predicted class where a film may have several findings."""
    stored = explained.predictor
    return {"prediction": stored.prediction(film.path, film.probabilities_C).prediction} if stored.multilabel else {}


def _spread(total: int, count: int) -> set[int]:
    """Up to `count` of `total` positions, evenly spread."""
    return set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()) if total else set()


def output_names(paths: Sequence[str]) -> list[str]:
    """The stem of each path, numbered where several films share it."""
    taken: dict[str, int] = {}
    for path in paths:
        name = stem = Path(path).stem
        while name in taken:
            taken[stem] += 1
            name = f"{stem}_{taken[stem]}"
        taken[name] = 1
    return list(taken)


def write_film(
    film: Film, folder: Path, name: str, classes: Sequence[str], *, opacity: float
) -> dict[str, dict[str, str]]:
    """Write overlay and arrays of each method; method → the two file names."""
    files = {}
    for method, map_SS in film.maps.items():
        stem = name if len(film.maps) == 1 else f"{name}_{method}"
        picture, arrays = f"{stem}_overlay.png", f"{stem}_attribution.npz"
        (folder / picture).write_bytes(_encoded(overlay(film.image_SSC, map_SS, opacity=opacity), ".png"))
        np.savez(
            folder / arrays,
            attribution=film.raw[method],
            map=map_SS,
            image=film.image_SSC,
            method=method,
            target_class=classes[film.target],
            probability=float(film.probabilities_C[film.target]),
        )
        files[method] = {"overlay": picture, "attribution": arrays}
    return files


def film_row(film: Film, classes: Sequence[str]) -> dict[str, Any]:
    """A film's line in explanation.json."""
    masks = checks.region_masks(film.image_SSC)
    return {
        "path": film.path,
        "prediction": classes[film.prediction],
        "probabilities": {name: float(value) for name, value in zip(classes, film.probabilities_C)},
        "target": classes[film.target],
        "pointing": {
            method: {name: {"share": share, "area": area} for name, (share, area) in checks.shares(item, masks).items()}
            for method, item in film.maps.items()
        },
    }


def film_pictures(film: Film, classes: Sequence[str], opacity: float) -> dict[str, Any]:
    """A film and its overlays as base64 JPEG, with what is said of it."""
    pictures = {method: overlay(film.image_SSC, item, opacity=opacity) for method, item in film.maps.items()}
    plain = overlay(film.image_SSC, np.zeros(film.image_SSC.shape[:2]), opacity=0)
    return {
        "name": Path(film.path).name,
        "target": classes[film.target],
        "probability": float(film.probabilities_C[film.target]),
        "prediction": classes[film.prediction],
        "film": base64.b64encode(_encoded(plain, ".jpg")).decode("ascii"),
        "overlays": {
            method: base64.b64encode(_encoded(item, ".jpg")).decode("ascii") for method, item in pictures.items()
        },
    }


def _encoded(image_RGB: Uint8Array, suffix: str) -> bytes:
    return cv2.imencode(suffix, np.ascontiguousarray(image_RGB[..., ::-1]))[1].tobytes()


# --- checks and summary ----------------------------------------------------------------------------------------


def _result(
    explained: Explained,
    settings: Settings,
    rows: Sequence[dict[str, Any]],
    unreadable: Sequence[Unreadable],
    checked: Sequence[Film],
) -> dict[str, Any]:
    patients = patients_of([row["path"] for row in rows], explained.predictor.config.data.patient_id_regex)
    sanity = _sanity(explained, settings, checked) if checked else {}
    methods = {}
    for name in settings.methods:
        pointing = _pointing([row["pointing"][name] for row in rows], patients, settings)
        methods[name] = {**sanity.get(name, {}), "pointing": pointing}
        methods[name]["remarks"] = remarks(methods[name])
    return {
        "films": len(rows),
        "patients": len(set(patients)),
        "unreadable": [item.path for item in unreadable],
        "model": explained.predictor.config.model.model_type,
        "checkpoint": explained.checkpoint.name,
        "classes": list(explained.classes),
        "target": settings.target or "predicted class",
        "level": settings.level,
        "sanity_films": len(checked),
        "code_version": code_version(),
        "methods": methods,
        "per_film": list(rows),
    }


def _mean(
    values: Sequence[float], patients: Sequence[str], settings: Settings, low: float, high: float
) -> dict[str, Any]:
    """The mean with its interval, resampled by patient; values that are NaN are left out and counted."""
    array = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(array)
    if not known.any():
        return not_estimable("the maps are flat").as_report() | {"n": 0}
    codes = as_groups(np.asarray(patients, dtype=object)[known], n=int(known.sum()))
    sampling = Sampling(codes, settings.level, settings.n_boot, settings.seed)
    replicates = sampling.replicates({"mean": mean_statistic(array[known], codes)})["mean"]
    estimate = sampling.interval(float(array[known].mean()), replicates, low=low, high=high)
    return estimate.as_report() | {"n": int(known.sum())}


def _pointing(films: Sequence[dict[str, Any]], patients: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Region → mean share of the attribution and of the area, and their difference; text where there is some.

    `verdict`: towards or past the region where the interval of the difference is on that side of 0, else even; unknown
    where nothing can be concluded.
    """
    regions = {}
    for region in ("centre", "border", "text"):
        present = [row for row, film in enumerate(films) if film[region]["area"] > 0]
        share = [films[row][region]["share"] for row in present]
        area = [films[row][region]["area"] for row in present]
        who = [patients[row] for row in present]
        excess = _mean([a - b for a, b in zip(share, area)], who, settings, -1.0, 1.0)
        regions[region] = {
            "films": len(present),
            "share": _mean(share, who, settings, 0.0, 1.0),
            "area": float(np.mean(area)) if area else float("nan"),
            "excess": excess,
            "verdict": _side(excess),
        }
    return regions


def _side(excess: dict[str, Any]) -> str:
    if _unknown(excess):
        return "unknown"
    if excess["ci_low"] > 0:
        return "towards"
    return "past" if excess["ci_high"] < 0 else "even"


def _sanity(explained: Explained, settings: Settings, films: Sequence[Film]) -> dict[str, Any]:
    """Method → randomisation, deletion and insertion on `films`."""
    log.info("checking the maps on %d films: randomised weights, deletion and insertion", len(films))
    patients = patients_of([film.path for film in films], explained.predictor.config.data.patient_id_regex)
    images_BSSC = np.stack([film.image_SSC for film in films])
    targets_B = np.array([film.target for film in films], dtype=np.int64)
    likeness = _likeness(explained, settings, films, images_BSSC, targets_B)
    rng = np.random.default_rng(settings.seed)
    random_order = np.stack([rng.permutation(checks.GRID**2) for _ in films])
    by_chance = _curves(explained, settings, images_BSSC, targets_B, random_order)
    found: dict[str, Any] = {}
    for name in settings.methods:
        order = np.stack([checks.cell_order(film.maps[name], rng) for film in films])
        own = _curves(explained, settings, images_BSSC, targets_B, order)
        found[name] = {
            "randomisation": {
                depth: {
                    "spearman": _mean(pairs[:, 0].tolist(), patients, settings, -1.0, 1.0),
                    "ssim": _mean(pairs[:, 1].tolist(), patients, settings, -1.0, 1.0),
                    "flat": int(np.isnan(pairs[:, 0]).sum()),
                }
                for depth, pairs in likeness[name].items()
            },
            "deletion": _curve_report(own[0], by_chance[0], patients, settings, better=-1),
            "insertion": _curve_report(own[1], by_chance[1], patients, settings, better=1),
        }
    return found


def _batches(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _likeness(
    explained: Explained,
    settings: Settings,
    films: Sequence[Film],
    images_BSSC: Uint8Array,
    targets_B: npt.NDArray[np.int64],
) -> dict[str, dict[str, FloatArray]]:
    """Method → depth → (B, 2): Spearman and SSIM of each film's map with that of the randomised network."""
    likeness: dict[str, dict[str, FloatArray]] = {name: {} for name in settings.methods}
    for depth in checks.DEPTHS:
        twin = checks.randomised(explained.model, depth=depth, seed=settings.seed)
        parts: dict[str, list[FloatArray]] = {name: [] for name in settings.methods}
        for part in _batches(len(films), settings.batch_size):
            found = attributions(
                twin,
                explained.spec,
                images_BSSC[part],
                methods=settings.methods,
                target=targets_B[part],
                device=explained.device,
                layer=settings.layer,
                seed=settings.seed,
            )
            for name, item in found.items():
                parts[name].append(item.map_BSS)
        for name, maps in parts.items():
            pairs = [checks.similarity(film.maps[name], other) for film, other in zip(films, np.concatenate(maps))]
            likeness[name][depth] = np.array(pairs)
    return likeness


def _curves(
    explained: Explained,
    settings: Settings,
    images_BSSC: Uint8Array,
    targets_B: npt.NDArray[np.int64],
    order_BK: npt.NDArray[np.int64],
) -> tuple[FloatArray, FloatArray]:
    """Deletion and insertion curves (B, steps) of all films, by batch."""
    deleted, inserted = [], []
    for part in _batches(len(images_BSSC), settings.batch_size):
        targets = targets_B[part]

        def probability(images: Uint8Array, targets: npt.NDArray[np.int64] = targets) -> FloatArray:
            return explained.predictor.probabilities(images)[np.arange(len(images)), targets]

        down, up = checks.curves(probability, images_BSSC[part], order_BK[part])
        deleted.append(down)
        inserted.append(up)
    return np.concatenate(deleted), np.concatenate(inserted)


def _curve_report(
    own_BN: FloatArray, chance_BN: FloatArray, patients: Sequence[str], settings: Settings, *, better: int
) -> dict[str, Any]:
    """Areas of the map's order and of a random one, and the gain: positive where the map's order is the better."""
    own_B, chance_B = checks.area_under(own_BN), checks.area_under(chance_BN)
    return {
        "auc": _mean(own_B.tolist(), patients, settings, 0.0, 1.0),
        "random_auc": _mean(chance_B.tolist(), patients, settings, 0.0, 1.0),
        "gain": _mean((better * (own_B - chance_B)).tolist(), patients, settings, -1.0, 1.0),
        "curve": own_BN.mean(axis=0).tolist(),
        "random_curve": chance_BN.mean(axis=0).tolist(),
    }


# --- words -----------------------------------------------------------------------------------------------------


def remarks(method: dict[str, Any]) -> list[dict[str, str]]:
    """What follows from a method's numbers: `severity` ok, unknown or warning, and `text`."""
    found = [_pointing_remark(region, method["pointing"][region]) for region in ("border", "text", "centre")]
    if "randomisation" in method:
        found += [_randomisation_remark(method["randomisation"]["all"])]
        found += [_curve_remark(name, method[name]) for name in ("deletion", "insertion")]
    return [item for item in found if item]


REGION_WORDS = {"border": "the border", "text": "burned-in text", "centre": "the central lung field"}


def _pointing_remark(region: str, facts: dict[str, Any]) -> dict[str, str]:
    where, verdict = REGION_WORDS[region], facts["verdict"]
    if not facts["films"]:
        return {"severity": "ok", "text": f"no {where} was found on these films"}
    share, area = facts["share"]["value"], facts["area"]
    numbers = f"{100 * share:.1f} % of the attribution on {100 * area:.1f} % of the area"
    if verdict == "unknown":
        return {"severity": "unknown", "text": f"{where}: {numbers}; no conclusion from so few films or flat maps"}
    if verdict == SUSPECT[region]:
        looks = "past" if verdict == "past" else "at"
        return {"severity": "warning", "text": f"the model looks {looks} {where}: {numbers}"}
    return {"severity": "ok", "text": f"{where}: {numbers}"}


def _unknown(estimate: dict[str, Any]) -> bool:
    """Whether nothing can be concluded: no interval, or one of so few films that it is not to be relied on."""
    return estimate["n"] < MIN_FILMS or bool(np.isnan([estimate["ci_low"], estimate["ci_high"]]).any())


def _randomisation_remark(facts: dict[str, Any]) -> dict[str, str]:
    spearman = facts["spearman"]
    said = f"rank correlation {spearman['value']:.2f} with the maps of a network of shuffled weights"
    if spearman["n"] == 0:
        return {"severity": "ok", "text": "with shuffled weights nothing is left of the maps: they are flat"}
    if _unknown(spearman):
        return {"severity": "unknown", "text": f"{said}; no conclusion from so few films"}
    if spearman["ci_high"] < SAME_MAP:
        return {"severity": "ok", "text": f"the maps change with the model: {said}"}
    return {"severity": "warning", "text": f"the maps hardly depend on what the model has learnt: {said}"}


def _curve_remark(name: str, facts: dict[str, Any]) -> dict[str, str]:
    gain = facts["gain"]
    said = f"{name}: area {facts['auc']['value']:.3f} against {facts['random_auc']['value']:.3f} in random order"
    if _unknown(gain):
        return {"severity": "unknown", "text": f"{said}; no conclusion from so few films"}
    if gain["ci_low"] > 0:
        return {"severity": "ok", "text": f"{said}: the places named matter to the model"}
    return {"severity": "warning", "text": f"{said}: on these films the map is not shown to beat a random order"}


def summary(result: dict[str, Any]) -> str:
    """The remarks as lines for the terminal."""
    lost = f", {len(result['unreadable'])} unreadable" if result["unreadable"] else ""
    lines = [f"{result['films']} films of {result['patients']} patients{lost}; {result['model']}, {result['target']}"]
    for name, method in result["methods"].items():
        marked = [("! " if item["severity"] == "warning" else "") + item["text"] for item in method["remarks"]]
        lines += [f"{name}: {said}" for said in marked]
    return "\n".join(lines)
