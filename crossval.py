"""Patient-grouped K-fold cross-validation: every film predicted by models that never saw its patient.

    python main.py crossval --data-dir data/chest_xray --model resnet50 --folds 5 --repeats 2

Trains one model a fold by `train`, on films of the training and validation splits only: test is left alone, so that a
recipe may be chosen by what comes out here. A fold that is done is not trained again, one that was stopped goes on.
Writes crossval.json, predictions.csv (out of fold), folds.csv, the folds' run folders, and what makes the folds' models
one predictor (`fold_ensemble`). Legend: N films, K folds, R repeats, C classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

import checkpoint
import fold_ensemble
import train
from auroc import absent_class, placements
from calibration import brier_terms, log_loss_terms
from config import Config
from data_preprocessing import Manifest, load_manifest, positive_class
from errors import ConfigError, DataError
from estimates import Estimate, FloatArray, IntArray, as_groups, count_groups, not_estimable, sum_by_group, wald
from evaluate import predict_rows
from predictor import decide, load, softmax
from proportions import clustered_proportion
from runtime import code_version, library_versions, log, require_writable, to_json, write_json, write_text

SETTINGS = "crossval_settings.json"
FOLD_PREDICTIONS = "out_of_fold.csv"


@dataclass(frozen=True)
class Fold:
    """One model's share of the work."""

    repeat: int
    """From 1."""
    number: int
    """From 1."""
    held_out: IntArray
    """Positions of its films in the table."""

    def folder(self, root: Path) -> Path:
        return root / f"repeat_{self.repeat}" / f"fold_{self.number}"


def crossval(config: Config, *, folds: int, repeats: int, output_dir: Path) -> dict[str, Any]:
    """Cross-validate `config`; the content of crossval.json. UserError kinds for the user's mistakes."""
    if folds < 2 or repeats < 1:
        raise ConfigError(f"--folds {folds} --repeats {repeats}: at least 2 folds and 1 repeat")
    if config.data.multilabel:
        raise ConfigError("data.task=multilabel: folds are of one class a film; train and evaluate findings instead")
    require_writable(output_dir)
    manifest, left_out = development_films(load_manifest(config.data))
    positive = positive_class(manifest.classes, config.data.positive_class)
    _claim(output_dir, config, folds, repeats, manifest)
    parts, models = [], []
    for fold in assign_folds(manifest, folds=folds, repeats=repeats, seed=config.training.seed):
        log.info("repeat %d of %d, fold %d of %d", fold.repeat, repeats, fold.number, folds)
        parts.append(_predicted(fold, manifest, config, output_dir))
        models.append(fold.folder(output_dir) / checkpoint.BEST)
    films = pd.concat(parts, ignore_index=True)
    mean = LogOddsMean.of(films, manifest.classes)
    chosen = train.calibrated(mean.logits_NC, mean.labels_N, manifest.classes, positive, config)
    result = {
        "folds": folds,
        "repeats": repeats,
        "n": len(manifest),
        "n_patients": int(manifest.table["patient_id"].nunique()),
        "test_films_left_alone": left_out,
        "classes": list(manifest.classes),
        "positive_class": positive,
        "model": config.model.model_type,
        "seed": config.training.seed,
        **_report(films, manifest.classes, positive, level=config.evaluation.level),
        "ensemble": {"members": len(models), **chosen},
    }
    write_json(output_dir / "crossval.json", result)
    write_text(output_dir / "folds.csv", pd.DataFrame(result["per_fold"]).to_csv(index=False))
    predictions = predictions_csv(films, manifest.classes, positive)
    write_text(output_dir / "predictions.csv", predictions.to_csv(index=False))
    own = mean.as_table(manifest.classes, positive, **chosen)
    write_text(output_dir / fold_ensemble.VALIDATION, own.to_csv(index=False))
    provenance = {
        "manifest_digest": manifest.digest(),
        "seed": config.training.seed,
        "folds": folds,
        "repeats": repeats,
        "code_version": code_version(),
        "libraries": library_versions(),
    }
    facts = {"classes": list(manifest.classes), **chosen, "config": config.to_dict(), "provenance": provenance}
    fold_ensemble.write(output_dir, models, facts)
    return result


def development_films(manifest: Manifest) -> tuple[Manifest, int]:
    """The films that are not test, and how many are."""
    table = manifest.table[manifest.table["split"] != "test"].reset_index(drop=True)
    if table.empty:
        raise DataError(f"{manifest.root}: every film is of split test, which cross-validation leaves alone")
    return Manifest(table, manifest.classes, manifest.root), len(manifest) - len(table)


def assign_folds(manifest: Manifest, *, folds: int, repeats: int, seed: int) -> Iterator[Fold]:
    """Folds stratified by class and grouped by patient; repeat r is drawn from seed + r − 1."""
    from sklearn.model_selection import StratifiedGroupKFold

    table = manifest.table
    patients = table.groupby("label")["patient_id"].nunique().reindex(range(len(manifest.classes)), fill_value=0)
    # One fold is held out and one patient more is needed in what remains, for validation beside training.
    if patients.min() < max(folds, 3):
        name = manifest.classes[int(patients.argmin())]
        raise DataError(
            f"class {name!r} has films of {patients.min()} patient(s) outside test; {folds} folds need at least "
            f"{max(folds, 3)} of every class: lower --folds"
        )
    for repeat in range(1, repeats + 1):
        splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed + repeat - 1)
        for number, (_, held_out) in enumerate(splitter.split(table, table["label"], table["patient_id"]), start=1):
            yield Fold(repeat, number, held_out.astype(np.int64))


# --- one fold --------------------------------------------------------------------------------------------------


def _claim(folder: Path, config: Config, folds: int, repeats: int, manifest: Manifest) -> None:
    """Note what this folder's folds are trained with; ConfigError when those in it were trained otherwise."""
    settings = config.to_dict()
    own = {name: settings[name] for name in ("data", "model", "training")}
    wanted = json.loads(to_json({**own, "folds": folds, "films": manifest.digest()}))
    path = folder / SETTINGS
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != wanted:
        raise ConfigError(
            f"--output-dir {folder}: holds folds trained with other settings or films; name another folder or "
            "remove that one"
        )
    write_json(path, wanted)


def _predicted(fold: Fold, manifest: Manifest, config: Config, root: Path) -> pd.DataFrame:
    """The held-out films of a fold with their probabilities and calls, from its model, trained if need be."""
    folder = fold.folder(root)
    known = folder / FOLD_PREDICTIONS
    if known.exists():
        texts = dict.fromkeys(("path", "patient_id", "label", "called"), str)
        return pd.read_csv(known, keep_default_na=False, dtype=texts)
    own = _write_manifest(fold, manifest, folder)
    data = replace(config.data, manifest=str(own), classes=list(manifest.classes), exclude=None, label_regex=None)
    wanted = replace(config, data=data, runtime=replace(config.runtime, output_dir=str(folder)))
    train.train(wanted, resume=_unfinished(folder))
    predictor = load(folder / checkpoint.BEST, device=config.runtime.device, precision=config.runtime.precision)
    rows = manifest.table.iloc[fold.held_out]
    films, _ = predict_rows(predictor, manifest, rows.assign(split="test"), config)
    table = films.table[["path", "patient_id", "label"]].assign(repeat=fold.repeat, fold=fold.number)
    table["called"] = np.array(films.classes, dtype=object)[films.called(predictor.threshold)]
    table["threshold"] = predictor.threshold
    for k, name in enumerate(films.classes):
        table[f"probability_{name}"] = films.probabilities[:, k]
    write_text(known, table.to_csv(index=False))
    return table


def _write_manifest(fold: Fold, manifest: Manifest, folder: Path) -> Path:
    """The table a fold trains from: its own films are test, validation is drawn from the others' patients."""
    rows = manifest.table.drop(columns=["row"], errors="ignore")
    split = np.full(len(rows), "train", dtype=object)
    split[fold.held_out] = "test"
    table = rows.assign(
        path=[os.path.relpath(path, folder) for path in rows["path"]],
        label=[manifest.classes[code] for code in rows["label"]],
        split=split,
    )
    path = folder / "manifest.csv"
    write_text(path, table.to_csv(index=False))
    return path


def _unfinished(folder: Path) -> Path | None:
    """The checkpoint that a stopped fold goes on from."""
    begun = (folder / checkpoint.INTERRUPTED).exists() or checkpoint.epoch_files(folder)
    return checkpoint.newest(folder) if begun else None


# --- what all folds say ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutOfFold:
    """Films predicted by models that did not see their patients; a film stands here once a repeat."""

    labels: IntArray
    """(N,) index into classes."""
    called: IntArray
    """(N,) class called at the operating point of the fold's own model."""
    p: FloatArray
    """(N, C)."""
    patients: IntArray
    """(N,) patient numbers."""
    models: IntArray
    """(N,) number of the model that predicted the film."""
    positive: int | None
    """Index of the positive class; None for several classes."""

    def of(self, model: int) -> OutOfFold:
        """The films of one model."""
        chosen = self.models == model
        arrays = {name: value[chosen] for name, value in vars(self).items() if name != "positive"}
        return replace(self, **arrays)

    def losses(self) -> dict[str, FloatArray]:
        """Each film's Brier score and log loss, (N,)."""
        truth, scores = self.labels, self.p
        if self.positive is not None:
            truth, scores = (self.labels == self.positive).astype(np.int64), self.p[:, self.positive]
        return {"brier": brier_terms(truth, scores), "log_loss": log_loss_terms(truth, scores)}

    def counted(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Rate → the films (N,) it is a share of."""
        everything = np.ones(len(self.labels), dtype=bool)
        if self.positive is None:
            return {"accuracy": everything}
        diseased, called = self.labels == self.positive, self.called == self.positive
        return {
            "accuracy": everything,
            "sensitivity": diseased,
            "specificity": ~diseased,
            "precision": called,
            "npv": ~called,
        }


def out_of_fold(films: pd.DataFrame, classes: Sequence[str], positive: str | None) -> OutOfFold:
    """From columns label, called, probability_<CLASS>…, patient_id, repeat and fold."""

    def codes(column: str) -> IntArray:
        return np.array([classes.index(name) for name in films[column]], dtype=np.int64)

    return OutOfFold(
        labels=codes("label"),
        called=codes("called"),
        p=films[[f"probability_{name}" for name in classes]].to_numpy(np.float64),
        patients=as_groups(films["patient_id"].to_numpy(), n=len(films)),
        models=np.asarray(films.groupby(["repeat", "fold"]).ngroup(), dtype=np.int64),
        positive=None if positive is None else classes.index(positive),
    )


def pooled(films: OutOfFold, *, level: float) -> dict[str, Estimate]:
    """Each metric over all folds and repeats; the AUROC is the mean over models.

    Patients are the clusters, so that a repeat narrows no interval by counting a patient twice. The intervals hold for
    the models trained (LeDell, Petersen and van der Laan 2015, Electron J Stat 9:1583): they do not speak of training
    anew.
    """
    right = films.called == films.labels
    return {
        "auc_roc": mean_auroc(films, level=level),
        **{
            name: clustered_proportion(right[chosen], films.patients[chosen], level=level, method="wilson")
            for name, chosen in films.counted().items()
        },
        **{name: _clustered_mean(terms, films.patients, level=level) for name, terms in films.losses().items()},
    }


def mean_auroc(films: OutOfFold, *, level: float) -> Estimate:
    """Mean over models of the AUROC of the positive class, or of the mean over classes of class against rest.

    The variance sums each patient's influence on it over all models. NaN with a reason when a fold lacks a class.
    """
    ranked = range(films.p.shape[1]) if films.positive is None else [films.positive]
    pieces = [(films.models == model, code) for model in np.unique(films.models) for code in ranked]
    areas, influence = [], np.zeros(len(films.labels))
    for chosen, code in pieces:
        outcome = (films.labels[chosen] == code).astype(np.int64)
        if absent_class(outcome):
            return not_estimable("a fold holds no film of one of the classes")
        placement = placements(outcome, films.p[chosen, code])
        areas.append(float(placement[outcome == 1].mean()))
        size = np.where(outcome == 1, outcome.sum(), len(outcome) - outcome.sum())
        influence[chosen] += (placement - areas[-1]) / size / len(pieces)
    method = "mean over models, influence values clustered by patient"
    return wald(
        float(np.mean(areas)), _clustered_se(influence, films.patients), level=level, method=method, low=0.0, high=1.0
    )


def _clustered_mean(terms: FloatArray, patients: IntArray, *, level: float) -> Estimate:
    mean = float(terms.mean())
    se = _clustered_se((terms - mean) / len(terms), patients)
    return wald(mean, se, level=level, method="mean, clustered by patient", low=0.0)


def _clustered_se(influence: FloatArray, patients: IntArray) -> float:
    clusters = count_groups(patients)
    if clusters < 2:
        return float("nan")
    return float(np.sqrt(clusters / (clusters - 1) * (sum_by_group(influence, patients) ** 2).sum()))


def of_each_model(films: OutOfFold) -> list[dict[str, float]]:
    """What every model reached on the films held out from it; undefined is NaN."""
    rows = []
    for model in np.unique(films.models):
        own = films.of(model)
        right = own.called == own.labels
        rates = {name: right[chosen].mean() if chosen.any() else np.nan for name, chosen in own.counted().items()}
        losses = {name: terms.mean() for name, terms in own.losses().items()}
        values = {"auc_roc": mean_auroc(own, level=0.95).value, **rates, **losses}
        counts = {"n": len(own.labels), "n_patients": len(np.unique(own.patients))}
        rows.append(counts | {name: float(value) for name, value in values.items()})
    return rows


# --- files and words -------------------------------------------------------------------------------------------


def _report(films: pd.DataFrame, classes: Sequence[str], positive: str | None, *, level: float) -> dict[str, Any]:
    """`{"metrics", "per_fold"}`."""
    predicted = out_of_fold(films, classes, positive)
    rows = of_each_model(predicted)
    spreads = {name: float(np.std([row[name] for row in rows], ddof=1)) for name in rows[0]}
    metrics = {
        name: {**estimate.as_report(), "sd_between_folds": spreads[name]}
        for name, estimate in pooled(predicted, level=level).items()
    }
    first = films[["repeat", "fold", "threshold"]].drop_duplicates(["repeat", "fold"])
    return {"metrics": metrics, "per_fold": [{**one, **row} for one, row in zip(first.to_dict(orient="records"), rows)]}


def predictions_csv(films: pd.DataFrame, classes: Sequence[str], positive: str | None) -> pd.DataFrame:
    """predictions.csv: each film once, its probabilities the mean over repeats, called at 0.5 or as the likeliest.

    Folds have thresholds of their own; at which a film is called in each is in out_of_fold.csv of the fold.
    """
    columns = [f"probability_{name}" for name in classes]
    mean = films.groupby("path", sort=False, as_index=False).agg(
        {"patient_id": "first", "label": "first", **dict.fromkeys(columns, "mean")}
    )
    codes = decide(mean[columns].to_numpy(np.float64), classes, positive, 0.5)
    mean.insert(2, "split", "val")
    mean.insert(4, "prediction", np.array(classes, dtype=object)[codes])
    return mean


@dataclass(frozen=True)
class LogOddsMean:
    """Out-of-fold films as `fold_ensemble` joins models: each once, its log probabilities averaged over repeats."""

    table: pd.DataFrame
    """path, patient_id, label."""
    labels_N: IntArray
    logits_NC: FloatArray

    @classmethod
    def of(cls, films: pd.DataFrame, classes: Sequence[str]) -> LogOddsMean:
        """Of columns path, patient_id, label, probability_<CLASS>….

        A repeat's model stands for the mean of its folds' models, which no film outside test can be shown: all but one
        of them were trained on it.
        """
        columns = [f"probability_{name}" for name in classes]
        logs = films[columns].clip(lower=np.finfo(np.float64).tiny).transform(np.log)
        known = films[["path", "patient_id", "label"]].join(logs)
        first = {"patient_id": "first", "label": "first"}
        mean = known.groupby("path", sort=False, as_index=False).agg(first | dict.fromkeys(columns, "mean"))
        labels = np.array([classes.index(name) for name in mean["label"]], dtype=np.int64)
        return cls(mean[["path", "patient_id", "label"]], labels, mean[columns].to_numpy(np.float64))

    def as_table(
        self, classes: Sequence[str], positive: str | None, *, temperature: float, operating_point: dict[str, Any]
    ) -> pd.DataFrame:
        """The films as a predictions.csv of the ensemble."""
        probabilities_NC = softmax(self.logits_NC, temperature)
        codes = decide(probabilities_NC, classes, positive, float(operating_point.get("threshold", 0.5)))
        table = self.table.assign(split="val", prediction=np.array(classes, dtype=object)[codes])
        for k, name in enumerate(classes):
            table[f"probability_{name}"] = probabilities_NC[:, k]
        return table


def summary(result: dict[str, Any]) -> str:
    """The result as a table for the terminal."""
    lines = [
        f"{result['n']} films of {result['n_patients']} patients, {result['folds']} folds, {result['repeats']} "
        f"repeat{'s' if result['repeats'] > 1 else ''}; {result['test_films_left_alone']} test films left alone",
        f"{'':14}{'value':>8}   interval            SD between folds",
    ]
    for name, item in result["metrics"].items():
        numbers = [item[key] for key in ("value", "ci_low", "ci_high", "sd_between_folds")]
        value, low, high, spread = ("undefined" if np.isnan(number) else f"{number:.4f}" for number in numbers)
        lines.append(f"{name:14}{value:>8}   {low} to {high}    {spread}")
    return "\n".join(lines)
