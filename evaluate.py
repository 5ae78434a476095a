"""Measure a checkpoint on a held-out split, or the predictions of any other program, and write a report to sign.

    python main.py evaluate --checkpoint checkpoints/best_model.pth --split test
    python main.py evaluate --predictions theirs.csv --validation-predictions theirs_val.csv --prevalence 0.05
    python evaluate.py            # a short self-check on synthetic predictions

Reads the checkpoint and the films, or the table; writes metrics.json, predictions.csv, report.html, model_card.md and
the figures as PNG. Never chooses anything on the films it measures: operating points, temperature and isotonic map
come from validation, and the headline operating point from the checkpoint or the command line.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import bundle
import finding_evaluation
import modality_report
import plots
import report as pages
from assessment import assess, flow, prior_of
from calibration import adjust_prior
from config import Config, Overrides, flatten, resolve
from data_preprocessing import Manifest, check_no_leak, film_hashes, load_manifest, split_manifest
from errors import ConfigError, DataError, examples
from estimates import FloatArray
from figures import FIGURES, evaluation_figures
from metrics import evaluate_predictions
from prediction_table import Predictions, of_split, read_predictions, refuse_shared
from predictor import Prediction, Predictor, Unreadable, described_by, load, predict_together
from process_group import ALONE, Group
from runtime import code_version, library_versions, log, progress, require_writable, write_json, write_text
from text_encoder import read_terms

OWN_COLUMNS = ("path", "label", "split", "patient_id", "row", "text")
"""Columns of a manifest that are not carried into predictions.csv as they are."""


def evaluate(
    checkpoint: Path,
    overrides: Sequence[Overrides] = (),
    *,
    output_dir: Path,
    model_type: str | None = None,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Measure `checkpoint` on the split that its configuration, overlaid by `overrides`, names; write the results.

    Returns the content of metrics.json; of several processes, which share the predictions, only the first one measures
    and writes, and the others return nothing. UserError kinds for the user's mistakes.
    """
    require_writable(output_dir)
    stored, config = configured(checkpoint, overrides, model_type)
    point = _operating_point(stored.operating_point, config)
    manifest, own = evaluation_manifest(stored, config)
    rows = rows_of(manifest, config.evaluation.split)
    if not own or stored.out_of_fold is not None:
        refuse_seen(stored, manifest, rows)
    films, unreadable = predict_rows(stored, manifest, rows, config, group)
    validation, no_validation = validation_films(stored, manifest if own else None, config, group)
    if not group.is_main:
        return {}
    facts = {
        "split": config.evaluation.split,
        "model": stored.config.model.model_type,
        "temperature": stored.temperature,
        # The films of a report are named relative to the data: where those lie is nobody else's concern.
        "unreadable": [reason.removeprefix(f"{manifest.root}{os.sep}") for reason in unreadable],
        "source": {
            "kind": "checkpoint",
            "file": checkpoint.name,
            "sha256": bundle.sha256(described_by(checkpoint)),
            "engine": stored.engine.name,
            "films_of_training": own,
            "trained_with": stored.provenance,
        },
    }
    facts["provenance"] = _provenance(config)
    if stored.multilabel:
        return _measure_findings(films, validation, no_validation, point, manifest, config, facts, output_dir)
    result = assess(
        films,
        operating_point=point,
        settings=config.evaluation,
        seed=config.training.seed,
        validation=validation,
        no_validation=no_validation,
    )
    result |= facts
    result["films"] |= _flow_of(_as_table(manifest))
    if stored.reader is not None:
        _measure_modalities(stored, manifest, rows, config, output_dir, result, own=own)
    _write(result, films, validation, output_dir, root=manifest.root)
    return result


def _measure_findings(
    films: Predictions,
    validation: Predictions | None,
    no_validation: str,
    point: dict[str, Any],
    manifest: Manifest,
    config: Config,
    facts: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """A report for each finding in a folder of its own, and one over all of them; the content of its metrics.json."""
    seed, folders = config.training.seed, finding_evaluation.folder_names(films.classes)
    chosen_on = {} if validation is None else finding_evaluation.views(validation)
    everything = finding_evaluation.views(_as_table(manifest, np.zeros((len(manifest), len(films.classes)))))
    results: dict[str, dict[str, Any]] = {}
    views = finding_evaluation.views(films).items()
    for name, own in progress(views, total=len(views), label="measuring", unit="findings"):
        results[name] = assess(
            own,
            operating_point=finding_evaluation.point_of(point, name),
            settings=config.evaluation,
            seed=seed,
            validation=chosen_on.get(name),
            no_validation=no_validation,
        )
        results[name] |= facts
        results[name]["films"] |= _flow_of(everything[name])
        (folder / folders[name]).mkdir(exist_ok=True)
        _write(results[name], own, chosen_on.get(name), folder / folders[name], root=manifest.root)
    result = finding_evaluation.summarised(films, results, point, config.evaluation, seed=seed) | facts
    write_json(folder / "metrics.json", result)
    write_text(folder / "predictions.csv", finding_evaluation.predictions_csv(films, point).to_csv(index=False))
    write_text(folder / "report.html", finding_evaluation.report_html(result))
    return result


def _measure_modalities(
    stored: Predictor,
    manifest: Manifest,
    rows: pd.DataFrame,
    config: Config,
    folder: Path,
    result: dict[str, Any],
    *,
    own: bool,
) -> None:
    """What each modality contributes, into `result`, modalities.csv and leaking_terms.txt."""
    known = manifest.table[manifest.table["split"] != "test"] if own and config.evaluation.split == "test" else None
    measured = modality_report.measure(stored, rows, known, config)
    if measured is None:
        return
    result["modalities"] = measured.result
    table = measured.per_case.assign(path=[manifest.relative_path(path) for path in measured.per_case["path"]])
    write_text(folder / "modalities.csv", table.to_csv(index=False))
    (folder / "leaking_terms.txt").unlink(missing_ok=True)
    if measured.terms is not None:
        write_text(folder / "leaking_terms.txt", measured.terms)


def evaluate_table(
    predictions: Path,
    overrides: Sequence[Overrides] = (),
    *,
    output_dir: Path,
    validation_predictions: Path | None = None,
) -> dict[str, Any]:
    """Measure a predictions CSV of any program; `validation_predictions` is one of films nothing is measured on.

    Without the second, rows of split val in the first serve as validation when another split is measured. Writes the
    results; returns the content of metrics.json.
    """
    require_writable(output_dir)
    result, films, validation = assess_table(predictions, overrides, validation_predictions=validation_predictions)
    _write(result, films, validation, output_dir, root=predictions.resolve().parent)
    return result


def assess_table(
    predictions: Path, overrides: Sequence[Overrides] = (), *, validation_predictions: Path | None = None
) -> tuple[dict[str, Any], Predictions, Predictions | None]:
    """What `evaluate_table` finds, without writing it: the content of metrics.json, the films, those of validation."""
    config = resolve(*overrides)
    if config.data.multilabel:
        raise ConfigError(
            "data.task=multilabel: a predictions table is of one task; measure each finding by itself, such as the "
            "FINDING/predictions.csv that evaluate --checkpoint writes"
        )
    settings, positive = config.evaluation, config.data.positive_class
    everything = read_predictions(predictions, positive=positive, raw_scores=settings.threshold is not None)
    if everything.patients_known and everything.table["split"].nunique() > 1:
        check_no_leak(everything.table)
    films = of_split(everything, split_of(everything, overrides, settings.split))
    validation, no_validation = _table_validation(everything, films, validation_predictions, config)
    _tell_patients(films)
    point: dict[str, Any] = {"rule": "argmax", "positive_class": None}
    if films.positive_class is not None:
        given = settings.threshold
        if given is not None and films.raw is None:
            check_threshold(given)
        point = {"rule": "fixed", "target": given, "threshold": 0.5 if given is None else given}
        point["positive_class"] = films.positive_class
    result = assess(
        films,
        operating_point=point,
        settings=settings,
        seed=config.training.seed,
        validation=validation,
        no_validation=no_validation,
    )
    result |= {
        "split": " and ".join(sorted(set(films.table["split"]))) or "all",
        "model": None,
        "temperature": None,
        "unreadable": [],
        "source": {"kind": "predictions", "file": predictions.name, "sha256": bundle.sha256(predictions)},
        "provenance": _provenance(config) | {"data": None, "excluded_by": None},
    }
    result["films"] |= _flow_of(everything)
    return result, films, validation


# --- films of a checkpoint -------------------------------------------------------------------------------------


def configured(checkpoint: Path, overrides: Sequence[Overrides], model_type: str | None) -> tuple[Predictor, Config]:
    """The predictor a checkpoint holds, and its configuration overlaid by `overrides`."""
    runtime = resolve(*overrides).runtime
    stored = load(checkpoint, device=runtime.device, precision=runtime.precision, model_type=model_type)
    layers = [flatten(stored.config.to_dict(), source=str(checkpoint)), *overrides]
    config = resolve(*layers)
    if config.data.multilabel != stored.multilabel:
        raise ConfigError(f"data.task: {checkpoint} was trained with {stored.config.data.task}; drop the setting")
    if stored.reader is not None and any("multimodal.mask_terms" in layer for layer in overrides):
        terms = read_terms(Path(config.multimodal.mask_terms)) if config.multimodal.mask_terms else []
        stored = modality_report.masked_predictor(stored, terms)
    return stored, config


def _operating_point(stored: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The checkpoint's, unless the command line states a threshold."""
    wanted, given = config.data.positive_class, config.evaluation.threshold
    if wanted is not None and wanted != stored.get("positive_class"):
        raise ConfigError(
            f"data.positive_class: {wanted!r} is not that of the checkpoint ({stored.get('positive_class')!r}), whose "
            "threshold speaks of it; drop the flag, or evaluate its predictions.csv"
        )
    if given is None or stored.get("positive_class") is None:
        return dict(stored)
    check_threshold(given)
    return {"rule": "fixed", "target": given, "threshold": given, "positive_class": stored["positive_class"]}


def check_threshold(threshold: float) -> None:
    """ConfigError for a threshold that no probability could be compared with."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"evaluation.threshold: {threshold:g} is not a probability; give one from 0 to 1")


def evaluation_manifest(predictor: Predictor, config: Config) -> tuple[Manifest, bool]:
    """The films to measure on, and whether they are those of training: then split as in training.

    Other films are split as the data name it; those that name no split are all taken as test.
    """
    manifest = load_manifest(config.data, classes=predictor.classes)
    resplit = _as_trained(manifest, predictor)
    if resplit is not None:
        return resplit, True
    log.info("these are not the films the model was trained on: their own splits are used")
    table = manifest.table
    if (table["split"] == "").all():
        table = table.assign(split="test")
    return replace(manifest, table=table.assign(row=np.arange(len(table)))), False


def rows_of(manifest: Manifest, split: str) -> pd.DataFrame:
    """The films of one split ('all' for every film); DataError naming the splits there are when it has none."""
    rows = manifest.split(split)
    if rows.empty:
        counts = (f"{name} ({len(manifest.split(name))})" for name in manifest.counts())
        raise DataError(
            f"split {split!r} has no films in {manifest.root}; there are {', '.join(counts)}: choose with --split"
        )
    return rows


def refuse_seen(predictor: Predictor, manifest: Manifest, rows: pd.DataFrame, *, run: str = "") -> None:
    """DataError when films of other data are, by content, films that the model was trained or chosen on."""
    seen = np.isin(film_hashes(list(rows["path"])), predictor.seen_films)
    if seen.any():
        first = manifest.relative_path(rows["path"].iloc[int(np.flatnonzero(seen)[0])])
        raise DataError(
            f"{int(seen.sum())} of the {len(rows)} films to measure were trained or validated on{run}, e.g. {first}: "
            "the data are not those of training but share films with them; restore them, or leave these out with "
            "--set data.exclude=FILE.csv"
        )


def _as_trained(manifest: Manifest, predictor: Predictor) -> Manifest | None:
    """`manifest` split as in training, by the settings and the seed of training; None where these are other films."""
    trained, digest = predictor.config, predictor.provenance["manifest_digest"]
    if predictor.out_of_fold is not None:  # trained on everything but test: there is nothing to split anew
        table = manifest.table
        known = Manifest(table[table["split"] != "test"], manifest.classes, manifest.root)
        named = table.assign(split=table["split"].replace("", "train"))
        return Manifest(named, manifest.classes, manifest.root) if known.digest() == digest else None
    try:
        resplit = split_manifest(manifest, trained.data, seed=trained.training.seed)
    except DataError:
        return None  # films that could not be trained on can still be measured on
    return resplit if resplit.digest() == digest else None


def validation_films(
    predictor: Predictor, trained_on: Manifest | None, config: Config, group: Group = ALONE
) -> tuple[Predictions | None, str]:
    """The validation split of the training run, predicted; or None and why there is none.

    `trained_on` is the manifest of training where that is what is measured; else it is looked for where the
    checkpoint says it was. Of an ensemble of folds the out-of-fold films are its validation.
    """
    if predictor.out_of_fold is not None:
        return read_predictions(predictor.out_of_fold, positive=predictor.positive_class, classes=predictor.classes), ""
    if trained_on is not None and config.evaluation.split != "test":
        return None, f"split {config.evaluation.split} is measured: validation is kept for test and for other films"
    if trained_on is None:
        stored = predictor.config
        try:
            manifest = load_manifest(stored.data, classes=predictor.classes)
        except DataError:
            return None, f"the films of training are not at {stored.data.manifest or stored.data.data_dir}"
        trained_on = _as_trained(manifest, predictor)
        if trained_on is None:
            return None, "the films of training have changed since, so its validation split is not known"
    log.info("predicting the validation split of training, on which operating points and calibration are chosen")
    return predict_rows(predictor, trained_on, trained_on.split("val"), config, group)[0], ""


def predict_rows(
    predictor: Predictor, manifest: Manifest, rows: pd.DataFrame, config: Config, group: Group = ALONE
) -> tuple[Predictions, list[str]]:
    """Every film of `rows` predicted, in order, and those that cannot be read.

    DataError for unreadable films unless the configuration leaves them out (they are then listed), and for none left.
    """
    predictor.attach(rows)
    results = predict_together(predictor, list(rows["path"]), batch_size=config.data.batch_size, group=group)
    kept: list[Prediction] = []
    positions: list[int] = []
    unreadable: list[str] = []
    for position, result in enumerate(progress(results, total=len(rows), label="predicting")):
        if isinstance(result, Unreadable):
            unreadable.append(result.reason)
        else:
            kept.append(result)
            positions.append(position)
    if unreadable and not config.data.skip_unreadable:
        raise DataError(
            f"{len(unreadable)} of {len(rows)} films cannot be read: {examples(unreadable)} "
            "(--skip-unreadable leaves them out and lists them)"
        )
    if not kept:
        raise DataError(f"none of the {len(rows)} films can be read, e.g. {unreadable[0]}")
    probabilities = np.array([[item.probabilities[name] for name in predictor.classes] for item in kept])
    films = _as_table(
        replace(manifest, table=rows.iloc[positions]),
        probabilities,
        positive=predictor.positive_class,
    )
    return films, unreadable


def _as_table(
    manifest: Manifest, probabilities: FloatArray | None = None, *, positive: str | None = None
) -> Predictions:
    """The films of a manifest as a predictions table; without probabilities, to be counted only."""
    rows = manifest.table
    further = {name: rows[name].fillna("").astype(str).to_numpy() for name in rows if name not in OWN_COLUMNS}
    table = pd.DataFrame(
        {
            "path": [manifest.relative_path(path) for path in rows["path"]],
            "patient_id": rows["patient_id"].to_numpy(),
            "split": rows["split"].to_numpy(),
            "label": [manifest.written(code) for code in rows["label"]],
            **further,
        }
    )
    p = np.empty((0, len(manifest.classes))) if probabilities is None else probabilities
    labels = rows["label"].to_numpy(np.int64)
    return Predictions(table, labels, p, manifest.classes, positive, str(manifest.root))


# --- films of a table ------------------------------------------------------------------------------------------


def split_of(films: Predictions, overrides: Sequence[Overrides], split: str) -> str:
    """The split asked for; unasked, test where the table has one, else all of a table of one other split."""
    asked = any("evaluation.split" in layer for layer in overrides)
    named = set(films.table["split"])
    return "all" if not asked and len(named) == 1 else split


def _table_validation(
    everything: Predictions, films: Predictions, path: Path | None, config: Config
) -> tuple[Predictions | None, str]:
    if path is not None:
        validation = read_predictions(
            path,
            positive=films.positive_class,
            classes=films.classes,
            raw_scores=config.evaluation.threshold is not None,
        )
        if (validation.table["split"] == "val").any():
            validation = of_split(validation, "val")
        refuse_shared(films, validation)
        return validation, ""
    chosen = (everything.table["split"] == "val").to_numpy()
    if chosen.any() and not (films.table["split"] == "val").any():
        return everything.take(chosen), ""
    return None, "no validation films were given (--validation-predictions FILE.csv)"


def _tell_patients(films: Predictions) -> None:
    if not films.patients_known:
        log.info("%s names no patient_id: each film counts as its own patient", films.source)


# --- the record ------------------------------------------------------------------------------------------------


def _provenance(config: Config) -> dict[str, Any]:
    return {
        "evaluated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "code_version": code_version(),
        "python": platform.python_version(),
        "libraries": library_versions(),
        "seed": config.training.seed,
        "settings": config.to_dict()["evaluation"],
        "data": Path(config.data.manifest or config.data.data_dir).name,
        "excluded_by": Path(config.data.exclude).name if config.data.exclude else None,
    }


def _flow_of(films: Predictions) -> dict[str, Any]:
    return {
        "by_split": flow(films),
        "patients_known": films.patients_known,
        "patients_in_several_splits": int((films.table.groupby("patient_id")["split"].nunique() > 1).sum()),
    }


# --- files -----------------------------------------------------------------------------------------------------


def _write(
    result: dict[str, Any],
    films: Predictions,
    validation: Predictions | None,
    folder: Path,
    *,
    root: Path,
) -> None:
    write_json(folder / "metrics.json", result)
    write_text(folder / "predictions.csv", predictions_csv(films, validation, result).to_csv(index=False))
    figures = evaluation_figures(films, validation, result)
    for name in set(FIGURES) - set(figures):  # of an earlier evaluation into this folder
        (folder / f"{name}.png").unlink(missing_ok=True)
    drawn = {name: plots.to_file_and_svg(draw, folder / f"{name}.png") for name, draw in figures.items()}
    thumbnails = pages.thumbnails(result["worst_errors"], root)
    write_text(folder / "report.html", pages.report_html(result, drawn, thumbnails))
    write_text(folder / "model_card.md", pages.model_card(result))


def predictions_csv(films: Predictions, validation: Predictions | None, result: Mapping[str, Any]) -> pd.DataFrame:
    """predictions.csv: path, patient_id, split, label, prediction, probability_<CLASS>…, then what else is known."""
    called = films.called(float(result["operating_point"].get("threshold", 0.5)))
    own = ["path", "patient_id", "split", "label"]
    columns: dict[str, Any] = {name: films.table[name].to_numpy() for name in own}
    columns["prediction"] = np.array(films.classes, dtype=object)[called]
    if films.raw is None:
        columns |= {f"probability_{name}": films.probabilities[:, k] for k, name in enumerate(films.classes)}
    else:
        columns["score"] = films.raw
    prevalence = (result["at_prevalence"] or {}).get("prevalence")
    prior = prior_of(films, validation)[0] if films.positive_class else 0.0
    if prevalence and films.raw is None and 0 < prior < 1:
        corrected = adjust_prior(films.scores, prior_from=prior, prior_to=prevalence)
        columns[f"prior_corrected_{films.positive_class}"] = corrected
    further = [name for name in films.table.columns if name not in own and name not in columns]
    return pd.DataFrame(columns | {name: films.table[name].to_numpy() for name in further})


def summary(report: dict[str, Any]) -> str:
    """The result as a table for the terminal."""
    if report.get("task") == "multilabel":
        return finding_evaluation.summary(report)
    point = report["operating_point"]
    rule = f"threshold {point['threshold']:.3f} by {point['rule']}" if "threshold" in point else "the likeliest class"
    lines = [
        f"{report['n']} films of {report['n_patients']} patients, split {report['split']}, {rule}",
        f"{'':22}{'value':>8}   {100 * report.get('level', 0.95):g} % interval",
    ]
    for name, item in report["metrics"].items():
        lines.append(f"{name:22}{_number(item['value']):>8}   {_number(item['ci_low'])} to {_number(item['ci_high'])}")
    if reason := report.get("operating_points", {}).get("reason"):
        lines += [f"only fixed operating points: {reason}"[:80]]
    lines += modality_report.lines(report.get("modalities"))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def self_check(say: Callable[[str], None] = print) -> None:
    """Measure made-up predictions of 200 patients and print the table."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    positive = 1 / (1 + np.exp(-(2 * labels - 1 + rng.normal(0, 1, 200))))
    report = evaluate_predictions(
        labels,
        np.column_stack([1 - positive, positive]),
        classes=("NORMAL", "PNEUMONIA"),
        positive_class="PNEUMONIA",
        threshold=0.5,
        n_boot=200,
    )
    say(summary({**report, "split": "made up", "operating_point": {"rule": "fixed", "threshold": 0.5}}))
    say("evaluate: ok")


if __name__ == "__main__":
    self_check()
