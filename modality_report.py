"""What each modality contributes: every head on the same cases, side by side, and what the notes give away.

Used by `evaluate` where the model reads notes or tables: the content of `modalities` in metrics.json, modalities.csv
(a row a case), leaking_terms.txt and the section of the report. The heads of the single modalities were trained in the
same run as the fusion, so that a difference is not one of luck or effort. Chooses nothing on the cases it measures.
Legend: N cases, X heads (the fused one first), M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from case_engine import CaseTorchEngine
from config import Config
from estimates import IntArray
from metrics import evaluate_predictions
from model_comparison import compare_predictions
from page import interval, number, p_value, section, table, text, warning
from predictor import Predictor, softmax
from runtime import progress
from shortcuts import nuisances
from tabular import plain
from text_leak import naming_words, note_alone, terms_file

FloatArray = npt.NDArray[np.floating[Any]]

SHOWN_METRICS = ("auc_roc", "accuracy", "sensitivity", "specificity", "brier")
RESAMPLES = 500
"""Of the bootstrap behind the intervals of the metrics that have no closed form."""
BATCH = 16
CHANCE = 0.05
"""Adjusted p-value below which a column alone is said to tell the class."""
GAIN = 0.01
"""An AUROC gain of the fusion below this is not spoken of."""


@dataclass(frozen=True)
class Cases:
    """The measured cases as the network saw them."""

    rows: pd.DataFrame
    """Of the manifest, in order."""
    logits_NXC: npt.NDArray[np.float32]
    weights_NM: npt.NDArray[np.float32] | None
    present_NM: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """What `measure` found."""

    result: dict[str, Any]
    """For metrics.json."""
    per_case: pd.DataFrame
    """modalities.csv."""
    terms: str | None
    """leaking_terms.txt; None where notes are not read or nothing leaks."""


def measure(predictor: Predictor, rows: pd.DataFrame, known: pd.DataFrame | None, config: Config) -> Measured | None:
    """Every head of `predictor` on the cases `rows`; `known` are cases the notes' words may be learned from.

    None for a model of films alone. Cases that cannot be read are left out, as in the evaluation itself.
    """
    engine = predictor.engine
    if predictor.reader is None or not isinstance(engine, CaseTorchEngine):
        return None
    cases = run(predictor, rows)
    settings: dict[str, Any] = {
        "groups": cases.rows["patient_id"].tolist(),
        "level": config.evaluation.level,
        "n_boot": min(RESAMPLES, config.evaluation.bootstrap_resamples),
        "seed": config.training.seed,
    }
    labels = cases.rows["label"].to_numpy(np.int64)
    heads = head_probabilities(predictor, cases.logits_NXC)
    points = {name: threshold_of(predictor, name) for name in heads}
    if config.evaluation.threshold is not None:
        points["fused"] = config.evaluation.threshold
    result: dict[str, Any] = {
        "modalities": list(predictor.reader.modalities),
        "fusion": predictor.config.multimodal.fusion,
        "masked_terms": len(predictor.reader.terms),
        "present": {name: int(cases.present_NM[:, k].sum()) for k, name in enumerate(predictor.reader.modalities)},
        "heads": {name: _metrics(predictor, labels, p, points[name], settings) for name, p in heads.items()},
        "fused_minus": {
            name: _difference(predictor, labels, heads["fused"], p, (points["fused"], points[name]), settings)
            for name, p in heads.items()
            if name != "fused"
        },
        "weights": _weights(predictor.reader.modalities, cases.weights_NM),
    }
    if "table" in predictor.reader.modalities:
        result["columns"] = _columns(predictor, cases.rows if known is None else known)
    terms = None
    if "text" in predictor.reader.modalities:
        result["text_leak"], terms = _leak(predictor, cases, points, known, settings)
    result["remarks"] = remarks(result)
    return Measured(result, _per_case(predictor, cases, heads), terms)


def run(predictor: Predictor, rows: pd.DataFrame) -> Cases:
    """All heads on the readable cases among `rows`."""
    engine, reader = predictor.engine, predictor.reader
    assert isinstance(engine, CaseTorchEngine) and reader is not None
    predictor.attach(rows)
    kept, logits, weights, present = [], [], [], []
    starts = range(0, len(rows), BATCH)
    for start in progress(starts, total=len(starts), label="every modality", unit="batches"):
        batch, positions = predictor.readable(rows["path"].iloc[start : start + BATCH].tolist())
        if not positions:
            continue
        said = engine.everything(batch)
        kept += [start + k for k in positions]
        logits.append(said.heads_BXC.float().cpu().numpy())
        if said.weights_BM is not None:
            weights.append(said.weights_BM.float().cpu().numpy())
        has = {"image": batch["has_film"], "text": batch["length"] > 0, "table": batch["has_table"]}
        present.append(np.stack([has[name] for name in reader.modalities], axis=1))
    joined = np.concatenate(weights) if weights else None
    return Cases(rows.iloc[kept], np.concatenate(logits), joined, np.concatenate(present))


def head_probabilities(predictor: Predictor, logits_NXC: FloatArray) -> dict[str, FloatArray]:
    """Head → probabilities (N, C), each at its own temperature."""
    assert predictor.reader is not None
    names = ("fused", *predictor.reader.modalities)
    return {
        name: softmax(logits_NXC[:, head], predictor.head_calibration(name)["temperature"])
        for head, name in enumerate(names)
    }


def threshold_of(predictor: Predictor, head: str) -> float:
    """The head's threshold from validation; 0.5 where there is none."""
    return float(predictor.head_calibration(head)["operating_point"].get("threshold", 0.5))


def _metrics(
    predictor: Predictor, labels: IntArray, p_NC: FloatArray, threshold: float, settings: Mapping[str, Any]
) -> dict[str, Any]:
    report = evaluate_predictions(
        labels,
        p_NC,
        classes=predictor.classes,
        positive_class=predictor.positive_class,
        threshold=threshold,
        **settings,
    )
    return {name: report["metrics"][name] for name in SHOWN_METRICS} | {"threshold": threshold}


def _difference(
    predictor: Predictor,
    labels: IntArray,
    fused_NC: FloatArray,
    other_NC: FloatArray,
    thresholds: tuple[float, float],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Fused minus other: AUROC with its paired test, and McNemar's."""
    y, a, b = labels, fused_NC, other_NC
    if predictor.positive_class is not None:
        index = predictor.classes.index(predictor.positive_class)
        y, a, b = (labels == index).astype(np.int64), a[:, index], b[:, index]
    paired = compare_predictions(y, a, b, threshold_a=thresholds[0], threshold_b=thresholds[1], **settings)
    return {"auc_roc": paired["auc_roc"], "mcnemar": paired["mcnemar"]}


def _weights(modalities: Sequence[str], weights_NM: FloatArray | None) -> dict[str, Any] | None:
    if weights_NM is None:
        return None
    low, middle, high = np.quantile(weights_NM, [0.25, 0.5, 0.75], axis=0)
    return {
        name: {"q1": float(low[k]), "median": float(middle[k]), "q3": float(high[k])}
        for k, name in enumerate(modalities)
    }


def _columns(predictor: Predictor, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """How well each column of the table tells the class before any network, best first; as of `shortcuts`."""
    assert predictor.reader is not None
    own: dict[str, Any] = {}
    for column in predictor.reader.table.columns:
        texts = [plain(value) for value in rows[column.name]] if column.name in rows else [""] * len(rows)
        own[column.name] = texts if column.levels else pd.to_numeric(pd.Series(texts), errors="coerce").to_numpy(float)
    found = nuisances(
        own,
        rows["label"].to_numpy(np.int64),
        classes=predictor.classes,
        patients=rows["patient_id"].tolist(),
        positive_class=predictor.positive_class,
    )
    return [item.as_report() for item in found]


def _per_case(predictor: Predictor, cases: Cases, heads: Mapping[str, FloatArray]) -> pd.DataFrame:
    assert predictor.reader is not None
    positive = predictor.positive_class
    index = None if positive is None else predictor.classes.index(positive)
    columns: dict[str, Any] = {
        "path": cases.rows["path"].to_numpy(),
        "patient_id": cases.rows["patient_id"].to_numpy(),
        "label": [predictor.classes[code] for code in cases.rows["label"]],
    }
    for name, p_NC in heads.items():
        if index is None:
            columns[f"{name}_prediction"] = [predictor.classes[k] for k in p_NC.argmax(axis=1)]
        else:
            columns[f"{name}_{positive}"] = p_NC[:, index]
    for k, name in enumerate(predictor.reader.modalities):
        columns[f"has_{name}"] = cases.present_NM[:, k]
        if cases.weights_NM is not None:
            columns[f"weight_{name}"] = cases.weights_NM[:, k]
    return pd.DataFrame(columns)


# --- what notes give away --------------------------------------------------------------------------------------


def _leak(
    predictor: Predictor,
    cases: Cases,
    points: Mapping[str, float],
    known: pd.DataFrame | None,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Any], str | None]:
    """How well words alone predict, which of them leak, and every head again with those blotted out."""
    assert predictor.reader is not None
    labels = cases.rows["label"].to_numpy(np.int64)
    notes = _notes(predictor, cases.rows)
    source = cases.rows if known is None else known
    own_notes, own_labels = _notes(predictor, source), source["label"].to_numpy(np.int64)
    leaking = naming_words(own_notes, own_labels, source["patient_id"].tolist(), classes=predictor.classes)
    found: dict[str, Any] = {
        "learned_from": "the films measured" if known is None else "training and validation notes",
        "bag_of_words": None,
        "words": [],
        "leaking": leaking,
        "masked": None,
    }
    bag = None if known is None else note_alone(own_notes, own_labels, notes, classes=predictor.classes)
    if bag is not None:
        found["bag_of_words"] = _metrics(predictor, labels, bag.probabilities_NC, 0.5, settings)
        found["words"] = bag.words
    if not leaking:
        return found, None
    masked = masked_predictor(predictor, [row["word"] for row in leaking])
    found["masked"] = _without_leaks(masked, cases.rows, points, known, settings)
    return found, terms_file(leaking)


def _without_leaks(
    masked: Predictor,
    rows: pd.DataFrame,
    points: Mapping[str, float],
    known: pd.DataFrame | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Every head of a predictor that masks the leaking words, and a bag of words learned without them.

    The bag is learned anew because what is missing may say as much as the word did.
    """
    labels = rows["label"].to_numpy(np.int64)
    heads = head_probabilities(masked, run(masked, rows).logits_NXC)
    bag = None
    if known is not None:
        own_labels = known["label"].to_numpy(np.int64)
        bag = note_alone(_notes(masked, known), own_labels, _notes(masked, rows), classes=masked.classes)
    return {
        "bag_of_words": None if bag is None else _metrics(masked, labels, bag.probabilities_NC, 0.5, settings),
        "heads": {name: _metrics(masked, labels, p, points[name], settings) for name, p in heads.items()},
        "fused_minus": {
            name: _difference(masked, labels, heads["fused"], p, (points["fused"], points[name]), settings)
            for name, p in heads.items()
            if name != "fused"
        },
    }


def _notes(predictor: Predictor, rows: pd.DataFrame) -> list[str]:
    assert predictor.reader is not None
    return predictor.reader.texts(rows["text"].tolist() if "text" in rows else [""] * len(rows))


def masked_predictor(predictor: Predictor, terms: Sequence[str]) -> Predictor:
    """A twin of `predictor`, on the same network, that reads notes without `terms` too."""
    import copy

    assert predictor.reader is not None
    twin = copy.copy(predictor)
    twin.reader = replace(predictor.reader, terms=tuple(dict.fromkeys([*predictor.reader.terms, *terms])))
    twin.notes = {}
    return twin


# --- words and page --------------------------------------------------------------------------------------------


def best_alone(heads: Mapping[str, Any]) -> tuple[str, float]:
    """The modality with the highest AUROC, and that."""
    alone = {name: item["auc_roc"]["value"] for name, item in heads.items() if name != "fused"}
    name = max(alone, key=lambda item: -1.0 if np.isnan(alone[item]) else alone[item])
    return name, alone[name]


def gain_of(heads: Mapping[str, Any]) -> float:
    """AUROC of the fusion over that of the film alone, or over the best other modality where films are not read."""
    other = heads["image"]["auc_roc"]["value"] if "image" in heads else best_alone(heads)[1]
    return float(heads["fused"]["auc_roc"]["value"] - other)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a fusion before its number."""
    heads, said = result["heads"], []
    name, alone = best_alone(heads)
    fused = heads["fused"]["auc_roc"]["value"]
    if fused < alone:
        said.append(f"the fusion (AUROC {fused:.3f}) is not better than {name} alone ({alone:.3f})")
    elif result["fused_minus"][name]["auc_roc"].get("p_value", 1.0) > 0.05:
        said.append(f"the gain of the fusion over {name} alone ({alone:.3f}) may be chance")
    for column in result.get("columns", []):
        if column["p_adjusted"] < CHANCE:
            said.append(
                f"{column['nuisance']} alone tells {column['positive_class']} with AUROC "
                f"{column['auroc']['value']:.2f}: where that is a habit of the place and not of the disease, train "
                "without that column"
            )
    leak = result.get("text_leak")
    if not leak or not leak["leaking"]:
        return said
    named = [row["word"] for row in leak["leaking"]]
    listed = ", ".join(named[:6]) + (" …" if len(named) > 6 else "")
    said.append(f"{len(named)} words of the notes name the label or stand with one class almost only: {listed}")
    before, after = gain_of(heads), gain_of(leak["masked"]["heads"])
    if before > GAIN and after < before / 2:
        said.append(
            f"the gain of the fusion comes from such words: {before:+.3f} AUROC over the film with them, {after:+.3f} "
            "without; train again with --mask-terms leaking_terms.txt for the honest figure"
        )
    return said


def lines(result: Mapping[str, Any] | None) -> list[str]:
    """For the terminal: the AUROC of every head, then the remarks."""
    if not result:
        return []
    areas = ", ".join(f"{name} {item['auc_roc']['value']:.4f}" for name, item in result["heads"].items())
    return [f"AUROC side by side: {areas}", *(f"note: {remark}" for remark in result["remarks"])]


HEAD_NAMES = {"fused": "Fused", "image": "Film alone", "text": "Note alone", "table": "Table alone"}


def section_html(result: Mapping[str, Any] | None) -> str:
    """The report's section; nothing where films are all that is read."""
    if not result:
        return ""
    leak = result.get("text_leak")
    parts = [
        "".join(warning(f"{text(item[:1].upper() + item[1:])}.") for item in result["remarks"]),
        _heads_table(result["heads"], result["fused_minus"]),
        f"<p class='note'>Heads of single modalities were trained in the same run. Fusion: {text(result['fusion'])}; "
        f"{result['masked_terms']} terms blotted out of the notes. Cases with: {_counts(result['present'])}.</p>\n",
        _weights_table(result["weights"]),
        _columns_table(result.get("columns", [])),
        _leak_html(leak) if leak else "",
    ]
    return section("What each modality contributes", *parts)


def _counts(present: Mapping[str, int]) -> str:
    return ", ".join(f"{text(HEAD_NAMES[name].split()[0].lower())} {count:,}" for name, count in present.items())


def _heads_table(heads: Mapping[str, Any], minus: Mapping[str, Any]) -> str:
    rows = []
    for name, item in heads.items():
        paired = minus.get(name, {}).get("auc_roc")
        compared = ["", ""] if paired is None else [_paired(paired), p_value(paired.get("p_value"))]
        rows.append([HEAD_NAMES[name], *(interval(item[metric]) for metric in SHOWN_METRICS), *compared])
    head = ["", "AUROC", "Accuracy", "Sensitivity", "Specificity", "Brier", "Fused minus it, AUROC", "p"]
    return table(head, rows, numbers=range(1, 8), marks={0: "strong"})


def _paired(paired: Mapping[str, Any]) -> str:
    return interval({"value": paired["difference"], "ci_low": paired["ci_low"], "ci_high": paired["ci_high"]})


def _weights_table(weights: Mapping[str, Any] | None) -> str:
    if weights is None:
        return "<p class='note'>This fusion has no weights a case; its parts can only be compared as above.</p>\n"
    rows = [
        [HEAD_NAMES[name].split()[0], number(item["median"], 2), f"{number(item['q1'], 2)} to {number(item['q3'], 2)}"]
        for name, item in weights.items()
    ]
    return "<h3>Weights in the fusion</h3>" + table(["", "Median", "Quartiles"], rows, numbers=(1, 2))


def _columns_table(columns: Sequence[Mapping[str, Any]]) -> str:
    if not columns:
        return ""
    rows = []
    for item in columns:
        shares = item["shares"].items()
        split = ", ".join(f"{text(level)} {of['of_the_class']:,} of {of['films']:,}" for level, of in shares)
        tells = text(f"{item['positive_class']}: {item['how']}")
        rows.append([text(item["nuisance"]), tells, interval(item["auroc"]), p_value(item["p_adjusted"]), split])
    head = ["Column", "Tells", "AUROC", "p, adjusted", "Cases of the class"]
    return "<h3>What each column says by itself</h3>" + table(head, rows, numbers=(2, 3))


def _leak_html(leak: Mapping[str, Any]) -> str:
    parts = ["<h3>What the notes give away</h3>"]
    if leak["bag_of_words"] is not None:
        parts.append(
            f"<p>A bag of words, learned from {text(leak['learned_from'])}, reaches AUROC "
            f"{interval(leak['bag_of_words']['auc_roc'])} from the notes alone.</p>\n"
        )
        rows = [
            [text(row["word"]), text(row["class"]), number(row["weight"], 2), f"{row['notes']:,}"]
            for row in leak["words"]
        ]
        parts.append(table(["Word", "Speaks for", "Log odds", "Notes"], rows, numbers=(2, 3)))
    if not leak["leaking"]:
        return "".join([*parts, "<p>No word names a class or stands with one class almost only.</p>\n"])
    rows = []
    for row in leak["leaking"][:20]:
        kind = text(row["kind"].replace("_", " "))
        rows.append([text(row["word"]), kind, text(row["class"]), f"{row['patients']:,}", number(row["share"], 2)])
    parts.append(table(["Leaking word", "Kind", "Class", "Patients", "Share"], rows, numbers=(3, 4)))
    bag = leak["masked"]["bag_of_words"]
    again = "" if bag is None else f" A bag of words learned without them reaches {interval(bag['auc_roc'])}."
    parts.append(
        f"<p>The same network on notes without these words (leaking_terms.txt):</p><p class='note'>{again}</p>"
    )
    parts.append(_heads_table(leak["masked"]["heads"], leak["masked"]["fused_minus"]))
    return "".join(parts)
