"""Lightning as its documentation has it: a LightningModule, Trainer(precision="bf16-mixed"), one-cycle AdamW.

    python benchmarks/peers/lightning_loop.py task.json

Prints a line of JSON an epoch.
"""

from __future__ import annotations

import time
from typing import Any

import common
import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import BinaryAUROC


class Classifier(lightning.LightningModule):
    """The timm network, its loss, its optimizer and its metric."""

    def __init__(self, task: common.Task) -> None:
        super().__init__()
        self.task = task
        self.model = common.new_model(task).to(memory_format=torch.channels_last)
        self.auroc = BinaryAUROC()

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images.to(memory_format=torch.channels_last)), labels)

    def validation_step(self, batch: Any, _: int) -> None:
        images, labels = batch
        logits = self.model(images.to(memory_format=torch.channels_last)).float()
        self.auroc.update(logits.softmax(1)[:, 1], labels)

    def configure_optimizers(self) -> Any:
        rate = self.task.learning_rate
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=0.01, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.started = time.perf_counter()

    def on_validation_epoch_start(self) -> None:
        self.trained_s = time.perf_counter() - self.started

    def on_validation_epoch_end(self) -> None:
        films = int(self.trainer.num_training_batches) * self.task.batch_size
        common.tell(
            self.current_epoch + 1, images_per_s=films / self.trained_s, auroc=float(self.auroc.compute().item())
        )
        self.auroc.reset()


def main() -> None:
    task = common.read_task()
    model = Classifier(task)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=task.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, *(common.loader(task, split, model.model) for split in ("train", "val")))


if __name__ == "__main__":
    main()
