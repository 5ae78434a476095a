"""The tour: synthetic films, a small network trained on them, measured, and used; no network, about a minute.

    python main.py demo --output-dir demo_output

Writes synthetic_films/, run/ (the run folder), evaluation/ and predictions/ under the output folder, each made by the
same functions as the published verbs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import predict
import synthetic
import train
from config import Overrides, resolve
from runtime import log, require_writable

SETTINGS: Overrides = {
    "data.image_size": 96,
    "data.batch_size": 16,
    "data.augmentation_prob": 0.3,
    "model.model_type": "resnet10t",
    "model.pretrained": False,
    "training.num_epochs": 3,
    "training.learning_rate": 2e-3,
    "training.backbone_lr": 2e-3,
    "training.ema_decay": 0.9,
}
"""A network and a schedule small enough for two cores and a minute, from random weights."""


def demo(output_dir: Path, *, overrides: Sequence[Overrides] = ()) -> dict[str, Any]:
    """Run the tour; what was made and how well the model does on held-out patients."""
    started = time.perf_counter()
    # A name that nobody gives a folder of films worth keeping: what stands there goes.
    films = output_dir / "synthetic_films"
    paths = {"data.data_dir": str(films), "data.cache_dir": str(output_dir / "cache")}
    config = resolve(SETTINGS, *overrides, paths, {"runtime.output_dir": str(output_dir / "run")})
    require_writable(output_dir)
    shutil.rmtree(films, ignore_errors=True)
    count = synthetic.write_dataset(films, patients_per_class={"train": 150, "test": 40}, size=96)
    log.info("%d synthetic films in %s", count, films)
    result = train.train(config)
    best = Path(result.best_model)
    machine = {"runtime.device": config.runtime.device, "runtime.precision": config.runtime.precision}
    report = evaluate.evaluate(best, [paths, machine], output_dir=output_dir / "evaluation")
    predicted = predict.predict(
        [str(films / "test" / "PNEUMONIA")],
        checkpoint=best,
        output_dir=output_dir / "predictions",
        device=config.runtime.device,
        precision=config.runtime.precision,
    )
    return {
        "seconds": time.perf_counter() - started,
        "films": count,
        "test": report["metrics"],
        "n": report["n"],
        "n_patients": report["n_patients"],
        "artefacts": {
            "run": str(output_dir / "run"),
            "evaluation": str(output_dir / "evaluation"),
            "predictions": predicted["predictions"],
        },
        "checkpoint": str(best),
    }


def summary(result: dict[str, Any]) -> str:
    """What was made, how well it does, and where to go on."""
    auroc = result["test"]["auc_roc"]
    made = "\n".join(f"  {name:11} {path}" for name, path in result["artefacts"].items())
    return (
        f"{result['films']} synthetic films, trained and measured in {result['seconds']:.0f} s; test AUROC "
        f"{auroc['value']:.3f} ({auroc['ci_low']:.3f} to {auroc['ci_high']:.3f}) on {result['n']} films of "
        f"{result['n_patients']} patients\n{made}\ngo on with:\n"
        f"  python main.py evaluate --checkpoint {result['checkpoint']} --split val\n"
        "  python main.py train --data-dir YOUR_FILMS --model resnet50 --epochs 50\n"
        "  python main.py train --help"
    )
