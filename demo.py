"""The tour: synthetic films, a small network trained on them, measured, explained, compressed; no network, a minute.

    python main.py demo --output-dir demo_output
    python main.py demo --multimodal --output-dir demo_output

Writes synthetic_films/, run/ (the run folder), evaluation/, predictions/, explanations/ and optimized_models/ under the
output folder, each made by the same functions as the published verbs (with notes also text_encoder/), and index.html,
which shows and lists all of it.
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import case_explain
import case_optimization
import case_training
import demo_page
import evaluate
import explain
import optimization_report
import predict
import synthetic
import train
from config import Overrides, resolve
from runtime import log, require_writable

SETTINGS: Overrides = {
    "data.image_size": 96,
    "data.batch_size": 8,
    "data.min_crop_scale": 1.0,
    "data.gamma": 0.0,
    "data.augmentation_prob": 0.1,
    "model.model_type": "resnet10t",
    "model.pretrained": False,
    "training.num_epochs": 3,
    "training.learning_rate": 2e-3,
    "training.backbone_lr": 2e-3,
    "training.ema_decay": 0.9,
}
"""A network and a schedule small enough for two cores and a minute, from random weights."""
CASE_SETTINGS: Overrides = {
    "multimodal.columns": ["age", "sex"],
    "multimodal.text_layers": -1,
    "multimodal.text_lr": 2e-3,
    "multimodal.max_tokens": 32,
    "multimodal.width": 64,
}
"""With notes. The text encoder starts from random weights, so all of it is trained."""
QUICK: Overrides = {
    "optimization.engines": ["onnxruntime"],
    "optimization.rounds": 3,
    "optimization.max_sensitivity_drop": 0.02,
    "optimization.max_accuracy_drop": 0.02,
}
"""Compression with one engine beside torch, timed a few times. Of 58 validation films with pneumonia one is 0.017."""
PATIENTS = {"train": 200, "test": 50}
"""Of each class; two films each."""
FILM_SIDE = 160
EXAMPLES = 4
"""Test films of each class that are predicted, explained and shown."""


def demo(output_dir: Path, *, multimodal: bool = False, overrides: Sequence[Overrides] = ()) -> dict[str, Any]:
    """Run the tour; what was made and how well the model does on held-out patients."""
    started, since = time.perf_counter(), time.time()
    # A name that nobody gives a folder of films worth keeping: what stands there goes.
    films = output_dir / "synthetic_films"
    paths: Overrides = {
        "data.manifest": str(films / "manifest.csv"),
        "data.cache_dir": str(output_dir / "cache"),
        "multimodal.text_model": str(output_dir / "text_encoder"),
    }
    cases = CASE_SETTINGS if multimodal else {}
    config = resolve(SETTINGS, cases, *overrides, paths, {"runtime.output_dir": str(output_dir / "run")})
    require_writable(output_dir)
    shutil.rmtree(films, ignore_errors=True)

    log.info("1/6 films")
    count = synthetic.write_dataset(films, patients_per_class=PATIENTS, size=FILM_SIDE)
    examples = _write_examples(films)
    log.info("%d synthetic films in %s", count, films)
    log.info("2/6 train")
    if multimodal:
        notes = [row["text"] for row in _rows(films / "manifest.csv") if row["split"] == "train"]
        synthetic.write_text_encoder(output_dir / "text_encoder", notes)
        trained = case_training.train_multimodal(config)
    else:
        trained = train.train(config)
    best = Path(trained.best_model)
    log.info("3/6 evaluate")
    machine = {"runtime.device": config.runtime.device, "runtime.precision": config.runtime.precision}
    report = evaluate.evaluate(best, [paths, machine], output_dir=output_dir / "evaluation")
    log.info("4/6 predict")
    predicted = predict.predict(
        [str(examples)],
        checkpoint=best,
        output_dir=output_dir / "predictions",
        device=config.runtime.device,
        precision=config.runtime.precision,
    )
    log.info("5/6 explain")
    shown = [str(films / row["path"]) for row in _rows(examples)]
    case_explain.explain(
        [str(examples)] if multimodal else shown,
        checkpoint=best,
        output_dir=output_dir / "explanations",
        settings=explain.Settings(sanity_films=2 * EXAMPLES, seed=config.training.seed),
        device=config.runtime.device,
    )
    log.info("6/6 optimize")
    smaller = case_optimization.optimize(best, [paths, machine, QUICK], output_dir=output_dir / "optimized_models")
    result = {
        "seconds": time.perf_counter() - started,
        "films": count,
        "multimodal": multimodal,
        "test": report["metrics"],
        "n": report["n"],
        "n_patients": report["n_patients"],
        "optimized": optimization_report.verdict(smaller),
        "page": str(output_dir / "index.html"),
        "artefacts": {
            "run": str(output_dir / "run"),
            "evaluation": str(output_dir / "evaluation"),
            "predictions": predicted["predictions"],
            "explanations": str(output_dir / "explanations"),
            "optimized": str(output_dir / "optimized_models"),
        },
        "checkpoint": str(best),
        "commands": commands(output_dir, best, multimodal=multimodal),
    }
    demo_page.write(output_dir, result, examples=_rows(examples), report=report, since=since)
    return result


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _write_examples(films: Path) -> Path:
    """films/examples.csv: the first film of the first test patients of each class."""
    first = {row["patient_id"]: row for row in reversed(_rows(films / "manifest.csv")) if row["split"] == "test"}
    ordered = sorted(first.values(), key=lambda row: row["path"])
    chosen = [row for label in synthetic.CLASSES for row in [r for r in ordered if r["label"] == label][:EXAMPLES]]
    path = films / "examples.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=synthetic.COLUMNS)
        writer.writeheader()
        writer.writerows(chosen)
    return path


def commands(output_dir: Path, best: Path, *, multimodal: bool) -> list[str]:
    """What to type next: with what the tour made, then with films of one's own."""
    films = output_dir / "synthetic_films"
    if multimodal:
        look, own = f"explain {films / 'examples.csv'}", "train_multimodal --manifest YOUR_CASES.csv"
    else:
        look, own = f"explain --worst 12 --manifest {films / 'manifest.csv'}", "train --data-dir YOUR_FILMS"
    return [
        f"python main.py api --bundle {output_dir / 'optimized_models'}",
        f"python main.py evaluate --checkpoint {best} --split val",
        f"python main.py {look} --checkpoint {best}",
        f"python main.py audit {films / 'manifest.csv'}",
        f"python main.py {own} --model resnet50 --epochs 50",
    ]


def summary(result: dict[str, Any]) -> str:
    """What was made, how well it does, and where to go on."""
    auroc = result["test"]["auc_roc"]
    made = "\n".join(f"  {name:12} {path}" for name, path in result["artefacts"].items())
    go_on = "\n".join(f"  {command}" for command in result["commands"])
    return (
        f"{result['films']} synthetic films, trained, measured, explained and compressed in {result['seconds']:.0f} s\n"
        f"test AUROC {auroc['value']:.3f} ({auroc['ci_low']:.3f} to {auroc['ci_high']:.3f}) on {result['n']} films of "
        f"{result['n_patients']} patients\n{result['optimized']}\n"
        f"{made}\nlook at {result['page']}\ngo on with:\n{go_on}"
    )
