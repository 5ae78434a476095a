"""The loop a careful user writes with PyTorch and timm: bf16, channels last, fused AdamW, one-cycle, worker processes.

    python benchmarks/peers/plain_loop.py task.json

Prints a line of JSON an epoch.
"""

from __future__ import annotations

import time
from typing import Any

import common
import torch
import torch.nn.functional as F


def bf16() -> Any:
    """Mixed precision on the CPU."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def validate(model: Any, films: Any) -> float:
    """AUROC on validation."""
    model.eval()
    scores, labels = [], []
    with torch.inference_mode(), bf16():
        for images, truth in films:
            logits = model(images.to(memory_format=torch.channels_last)).float()
            scores.append(logits[:, 1] - logits[:, 0])
            labels.append(truth)
    return common.auroc(torch.cat(scores), torch.cat(labels))


def main() -> None:
    task = common.read_task()
    model = common.new_model(task).to(memory_format=torch.channels_last)
    train, val = (common.loader(task, split, model) for split in ("train", "val"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.01, fused=True)
    steps = len(train) * task.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=task.learning_rate, total_steps=steps)
    for epoch in range(1, task.epochs + 1):
        started = time.perf_counter()
        model.train()
        for images, labels in train:
            with bf16():
                loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        rate = len(train) * task.batch_size / (time.perf_counter() - started)
        common.tell(epoch, images_per_s=rate, auroc=validate(model, val))


if __name__ == "__main__":
    main()
