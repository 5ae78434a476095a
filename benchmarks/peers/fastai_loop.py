"""fastai as its documentation has it: ImageDataLoaders, aug_transforms, vision_learner, fit_one_cycle.

    python benchmarks/peers/fastai_loop.py task.json

In fp32: `Learner.to_bf16` enters CUDA's autocast whatever the device, so a CPU has no mixed precision to ask for.
"""

from __future__ import annotations

import time
from typing import Any

import common
import pandas as pd
from fastai.callback.schedule import Learner  # noqa: F401  # adds fit_one_cycle
from fastai.learner import Callback
from fastai.metrics import RocAucBinary
from fastai.vision.augment import Resize, ResizeMethod, aug_transforms
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import vision_learner


class Tell(Callback):
    """Prints each epoch; runs after the recorder has the metric."""

    order = 60

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def before_train(self) -> None:
        self.began = time.perf_counter()

    def after_train(self) -> None:
        self.trained_s = time.perf_counter() - self.began

    def after_epoch(self) -> None:
        films = len(self.dls.train) * self.batch_size
        common.tell(self.epoch + 1, images_per_s=films / self.trained_s, auroc=float(self.recorder.values[-1][-1]))


def data(task: common.Task) -> Any:
    """Training and validation batches, augmented a batch at a time."""
    rows = [
        {"path": path, "label": str(label), "valid": split == "val"}
        for split in ("train", "val")
        for path, label in common.films(task, split)
    ]
    return ImageDataLoaders.from_df(
        pd.DataFrame(rows),
        path="/",
        label_col="label",
        valid_col="valid",
        item_tfms=Resize(task.image_size, method=ResizeMethod.Squish),
        batch_tfms=aug_transforms(max_rotate=15, max_warp=0),
        bs=task.batch_size,
        num_workers=task.workers,
    )


def main() -> None:
    task = common.read_task()
    dls = data(task)
    given = {"pretrained_cfg_overlay": {"file": task.weights}} if task.weights else {}
    learner = vision_learner(
        dls, task.model, pretrained=bool(task.weights), metrics=RocAucBinary(), cbs=Tell(task.batch_size), **given
    )
    learner.unfreeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(task.epochs, lr_max=task.learning_rate)


if __name__ == "__main__":
    main()
