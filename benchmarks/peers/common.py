"""What the training peers share: the task, the films it names, and one JSON line an epoch.

A task is a JSON file: `manifest` (a CSV of path,label,split with splits train and val), `model` (a timm name),
`weights` (a file in timm layout, or null for random), `image_size`, `batch_size`, `epochs`, `learning_rate`, `threads`,
`workers`. Seconds count from the start of the process, so libraries and first reads are in them.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchvision.transforms import v2


@dataclass(frozen=True)
class Task:
    """What every peer trains on, and for how long."""

    manifest: str
    model: str
    weights: str | None
    image_size: int
    batch_size: int
    epochs: int
    learning_rate: float
    threads: int
    workers: int


def read_task() -> Task:
    """The task named on the command line."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    return task


def films(task: Task, split: str) -> list[tuple[str, int]]:
    """(path, class) of each film of a split; classes are numbered in the order of their names."""
    with Path(task.manifest).open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    classes = sorted({row["label"] for row in rows})
    return [(row["path"], classes.index(row["label"])) for row in rows if row["split"] == split]


def new_model(task: Task) -> Any:
    """The timm network with a linear head of two classes."""
    given = {"pretrained_cfg_overlay": {"file": task.weights}} if task.weights else {}
    return timm.create_model(task.model, pretrained=bool(task.weights), num_classes=2, **given)


class Films(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Decoded and augmented anew each time, as torchvision's tutorials have it."""

    def __init__(self, task: Task, split: str, model: Any) -> None:
        facts = timm.data.resolve_data_config(model=model)
        side = (task.image_size, task.image_size)
        light = [v2.RandomHorizontalFlip(), v2.RandomRotation(15), v2.ColorJitter(0.2, 0.2)]
        self.rows = films(task, split)
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(side, antialias=True),
                *(light if split == "train" else []),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(facts["mean"], facts["std"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        path, label = self.rows[row]
        return self.transform(Image.open(path).convert("RGB")), label


def loader(task: Task, split: str, model: Any) -> torch.utils.data.DataLoader[tuple[Tensor, int]]:
    """Batches; those of training shuffled, the last short one dropped."""
    training = split == "train"
    return torch.utils.data.DataLoader(
        Films(task, split, model),
        batch_size=task.batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=task.workers,
        persistent_workers=task.workers > 0,
    )


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Of class 1."""
    return float(roc_auc_score(labels.numpy(), scores.numpy()))


def since_start() -> float:
    """Seconds this process has been there."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def tell(epoch: int, *, images_per_s: float, auroc: float) -> None:
    """Print the epoch as a line of JSON."""
    row = {"epoch": epoch, "seconds": since_start(), "images_per_s": images_per_s, "auroc": auroc}
    print(json.dumps(row), flush=True)
