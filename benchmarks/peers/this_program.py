"""This program on the task of its peers: `train.train` with the same films, size, batch, rate and epochs.

    python benchmarks/peers/this_program.py task.json

Pixels are decoded into a cache that is empty at the start; precision is that of
the peers, bf16; augmentation and schedule are the defaults.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common

import train
from config import Config, resolve
from runtime import setup_logging


def configured(task: common.Task, folder: str) -> Config:
    """The run, with nothing cached before it."""
    return resolve(
        {
            "data.manifest": task.manifest,
            "data.cache_dir": f"{folder}/cache",
            "data.test_fraction": 0.0,
            "data.image_size": task.image_size,
            "data.batch_size": task.batch_size,
            "model.model_type": task.model,
            "model.weights": task.weights,
            "model.pretrained": False,
            "training.num_epochs": task.epochs,
            "training.learning_rate": task.learning_rate,
            "training.backbone_lr": task.learning_rate,
            "runtime.device": "cpu",
            "runtime.precision": "bf16",
            "runtime.output_dir": f"{folder}/run",
            "runtime.threads": task.threads,
        }
    )


def tell(row: dict[str, float]) -> None:
    """An epoch of history.csv as the peers print theirs."""
    common.tell(int(row["epoch"]), images_per_s=row["images_per_s"], auroc=row["val_auc_roc"])


def main() -> None:
    task = common.read_task()
    setup_logging(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        train.train(configured(task, folder), on_epoch=tell)


if __name__ == "__main__":
    main()
