"""Many heads trained at once on cached features: a grid of heads, learning rates and weight decays, one pass for all.

    python main.py train --model resnet50 --freeze-backbone --head-search

Candidates of one shape are stacked: their first layers are one matrix product over the batch that all of them share,
and each has its own rate, decay, gradient norm and best epoch. Also the logistic regression that a linear head may
start from. Reads features, writes nothing. Legend: N candidates, B batch, F features, H hidden, C classes, M films.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig, TrainingConfig
from data_preprocessing import Request, sequential_requests
from errors import UserError
from feature_cache import FeatureCache
from models import make_head
from objective import classification_loss, improves, validation_figures, warmup_cosine
from runtime import Interrupted, StopRequest, autocast, log

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

RATES = (0.3, 1.0, 3.0)
"""Learning rates tried, as multiples of training.learning_rate."""
DECAYS = (1.0, 10.0)
"""Weight decays tried, as multiples of training.weight_decay."""
NARROW = 4
"""The narrow head is this many times narrower than the configured one."""
VALIDATION_BATCH = 512


@dataclass(frozen=True)
class Candidate:
    """One head with its rates."""

    hidden_features: int
    dropout_rate: float
    learning_rate: float
    weight_decay: float


@dataclass
class Progress:
    """How a candidate has done so far."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_score: float | None = None
    best_loss: float = math.inf
    best_epoch: int = 0


@dataclass(frozen=True)
class Found:
    """The best candidate of a search."""

    candidate: Candidate
    head: dict[str, Tensor]
    """State of its head at its best epoch, by the names of `models.make_head`."""
    progress: Progress
    epochs: int
    table: list[dict[str, Any]]
    """A row a candidate, in the order of the grid: what it is and what it reached."""


def grid(model: ModelConfig, training: TrainingConfig) -> list[Candidate]:
    """The configured head first, a narrower one and a linear one, each at every rate and decay."""
    hidden, dropout = model.hidden_features or 512, model.dropout_rate
    lighter = round(dropout / 3, 3) if dropout else 0.3
    heads = [(model.hidden_features, dropout), (hidden, dropout), (max(1, hidden // NARROW), dropout)]
    heads += [(max(1, hidden // NARROW), lighter), (0, dropout), (0, lighter)]
    decays = [training.weight_decay * factor for factor in DECAYS] if training.weight_decay else [0.0, 0.01]
    return [
        Candidate(width, rate_of_dropout, training.learning_rate * factor, decay)
        for width, rate_of_dropout in dict.fromkeys(heads)
        for factor in RATES
        for decay in decays
    ]


class Stack:
    """Candidates whose heads have one shape: parameters (N, ...) and an optimizer that treats each slice by itself."""

    def __init__(self, candidates: Sequence[Candidate], head: torch.nn.Sequential, *, device: torch.device) -> None:
        self.dropout = candidates[0].dropout_rate
        self.names = [name for name, _ in head.named_parameters()]
        self.leaves = [
            item.detach().to(device).expand(len(candidates), *item.shape).clone().requires_grad_()
            for item in head.parameters()
        ]
        self.slices = [[torch.nn.Parameter(leaf.detach()[n]) for leaf in self.leaves] for n in range(len(candidates))]
        groups: list[dict[str, Any]] = []
        for candidate, own in zip(candidates, self.slices):
            for decayed in (True, False):
                decay = candidate.weight_decay if decayed else 0.0
                parameters = [item for item in own if (item.ndim > 1) == decayed]
                groups.append({"params": parameters, "lr": candidate.learning_rate, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
        self.peaks: list[float] = [group["lr"] for group in groups]

    def logits(self, features_BF: Tensor, *, training: bool) -> Tensor:
        """Logits (N, B, C). In training they share the dropout of the features, not of the hidden layer."""
        features_BF = F.dropout(features_BF, self.dropout, training)
        count = len(self.slices)
        weight, bias = self.leaves[0], self.leaves[1]
        outputs = F.linear(features_BF, weight.flatten(0, 1), bias.flatten()).view(len(features_BF), count, -1)
        outputs_NBX = outputs.transpose(0, 1)
        if len(self.leaves) == 2:
            return outputs_NBX
        hidden_NBH = F.dropout(F.relu(outputs_NBX), self.dropout, training)
        return torch.baddbmm(self.leaves[3][:, None], hidden_NBH, self.leaves[2].transpose(1, 2))

    def step(self, *, factor: float, clip: float) -> None:
        """One optimizer step of every candidate at `factor` of its peak rate, its own gradient norm cut to `clip`."""
        grads = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        if clip:
            norms_N = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
            share_N = (clip / (norms_N + 1e-6)).clamp_(max=1)
            for grad in grads:
                grad.mul_(share_N.view(-1, *[1] * (grad.ndim - 1)))
        for n, own in enumerate(self.slices):
            for item, grad in zip(own, grads):
                item.grad = grad[n]
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        self.optimizer.step()
        for leaf in self.leaves:
            leaf.grad = None

    def state(self, n: int) -> dict[str, Tensor]:
        """A copy of candidate n's head."""
        return {name: item.detach().cpu().clone() for name, item in zip(self.names, self.slices[n])}


def search(
    features: FeatureCache,
    candidates: Sequence[Candidate],
    *,
    settings: TrainingConfig,
    n_classes: int,
    positive: int | None,
    weights_C: Tensor | None,
    requests_of: Callable[[int], list[Request]],
    device: torch.device,
    precision: str,
    stop: StopRequest | None = None,
) -> Found:
    """Train all `candidates` on the batches `requests_of(epoch)` gives, and keep the best epoch of the best of them.

    Best is by settings.monitor on validation, ties by validation loss. The same seed gives the same result; torch's
    own random stream is left where it was. UserError when no candidate was ever measurable.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        stacks = _stacks(features, candidates, settings, n_classes, weights_C, device)
        followed = {n: Progress() for n in range(len(candidates))}
        best: tuple[int, dict[str, Tensor]] | None = None
        for epoch in range(1, settings.num_epochs + 1):
            started = time.perf_counter()
            requests = requests_of(epoch)
            with autocast(device, precision):
                losses_N = _train_epoch(features, stacks, requests, epoch, settings, n_classes, weights_C, device, stop)
            films_per_s = sum(len(item.positions) for item in requests) / (time.perf_counter() - started)
            with autocast(device, precision):
                logits_NMC = _validation_logits(features, stacks, len(candidates), device)
            factor = _factor(epoch * len(requests) - 1, len(requests), settings)
            for n, item in followed.items():
                figures = _figures(logits_NMC[n], features.val_labels, positive)
                item.history.append(
                    {
                        "epoch": epoch,
                        "train_loss": float(losses_N[n]),
                        **{f"val_{name}": value for name, value in figures.items()},
                        "lr_head": candidates[n].learning_rate * factor,
                        "images_per_s": films_per_s,
                        "seconds": time.perf_counter() - started,
                    }
                )
                if _note(item, figures, settings) and (best is None or _leads(item, followed[best[0]], settings)):
                    best = n, _state(stacks, n)
            patience = settings.early_stopping_patience
            if patience and all(epoch - item.best_epoch >= patience for item in followed.values()):
                break
    if best is None:
        raise UserError(
            f"validation {settings.monitor} was never a number for any head; lower training.learning_rate or choose "
            "another training.monitor"
        )
    table = [_row(candidate, followed[n], chosen=n == best[0]) for n, candidate in enumerate(candidates)]
    return Found(candidates[best[0]], best[1], followed[best[0]], epoch, table)


def _stacks(
    features: FeatureCache,
    candidates: Sequence[Candidate],
    settings: TrainingConfig,
    n_classes: int,
    weights_C: Tensor | None,
    device: torch.device,
) -> list[tuple[list[int], Stack]]:
    """(positions in the grid, their stack) for every shape of head; heads of one shape start from the same weights."""
    by_shape: dict[tuple[int, float], list[int]] = {}
    for n, candidate in enumerate(candidates):
        by_shape.setdefault((candidate.hidden_features, candidate.dropout_rate), []).append(n)
    stacks = []
    for (hidden, dropout), members in by_shape.items():
        width = features.array.shape[1]
        head = make_head(width, num_classes=n_classes, dropout_rate=dropout, hidden_features=hidden)
        if settings.head_start == "logistic" and not hidden:
            start_logistic(head, features, n_classes=n_classes, weights_C=weights_C)
        stacks.append((members, Stack([candidates[n] for n in members], head, device=device)))
    return stacks


def _train_epoch(
    features: FeatureCache,
    stacks: Sequence[tuple[list[int], Stack]],
    requests: list[Request],
    epoch: int,
    settings: TrainingConfig,
    n_classes: int,
    weights_C: Tensor | None,
    device: torch.device,
    stop: StopRequest | None,
) -> FloatArray:
    """Mean training loss of each candidate, (N,), over one epoch of steps."""
    sums = [torch.zeros(len(members), device=device) for members, _ in stacks]
    for number, batch in enumerate(features.train_batches(requests)):
        if stop is not None and stop.signal is not None:
            raise Interrupted(stop.signal, "stopped during the head search; the same command starts it again")
        factor = _factor((epoch - 1) * len(requests) + number, len(requests), settings)
        inputs_BF = batch.inputs.to(device)
        targets_BC = F.one_hot(batch.labels_B, n_classes).float().to(device)
        for summed, (_, stack) in zip(sums, stacks):
            logits_NBC = stack.logits(inputs_BF, training=True).float()
            loss_of = partial(classification_loss, targets_BC=targets_BC, config=settings, weights_C=weights_C)
            losses_N = torch.func.vmap(loss_of)(logits_NBC)
            losses_N.sum().backward()  # no parameter is shared, so each slice gets the gradient of its own loss
            stack.step(factor=factor, clip=settings.gradient_clip)
            summed += losses_N.detach()
    means = np.zeros(sum(len(members) for members, _ in stacks))
    for summed, (members, _) in zip(sums, stacks):
        means[members] = (summed / len(requests)).cpu().numpy()
    return means


def _factor(step: int, steps_per_epoch: int, settings: TrainingConfig) -> float:
    """Share of the peak rate at a step, as in the training loop."""
    total_steps = settings.num_epochs * steps_per_epoch
    warmup_steps = round(settings.warmup_fraction * total_steps)
    return warmup_cosine(step=step, warmup_steps=warmup_steps, total_steps=total_steps)


@torch.no_grad()
def _validation_logits(
    features: FeatureCache, stacks: Sequence[tuple[list[int], Stack]], count: int, device: torch.device
) -> FloatArray:
    """Logits (N, M, C) of the validation films."""
    requests = sequential_requests(len(features.val_labels), VALIDATION_BATCH)
    batches = [batch.inputs.to(device) for batch in features.val_batches(requests)]
    logits: list[FloatArray] = [np.empty(0)] * count
    for members, stack in stacks:
        outputs_NMC = torch.cat([stack.logits(inputs_BF, training=False) for inputs_BF in batches], dim=1)
        for own, n in zip(outputs_NMC.float().cpu().numpy(), members):
            logits[n] = own
    return np.stack(logits)


def _figures(logits_MC: FloatArray, labels: IntArray, positive: int | None) -> dict[str, float]:
    """The validation figures of a candidate; all NaN once it has diverged."""
    diverged = not np.isfinite(logits_MC).all()
    figures = validation_figures(np.zeros_like(logits_MC) if diverged else logits_MC, labels, positive=positive)
    return dict.fromkeys(figures, math.nan) if diverged else figures


def _note(item: Progress, figures: dict[str, float], settings: TrainingConfig) -> bool:
    """Whether the last epoch is the candidate's best so far; then it is noted as that."""
    score, loss = figures[settings.monitor], figures["loss"]
    tied = score == item.best_score and loss < item.best_loss
    if not tied and not improves(score, item.best_score, settings.monitor_mode):
        return False
    item.best_score, item.best_loss, item.best_epoch = score, loss, len(item.history)
    return True


def _leads(item: Progress, leader: Progress, settings: TrainingConfig) -> bool:
    if item is leader:
        return True
    assert item.best_score is not None
    tied = item.best_score == leader.best_score and item.best_loss < leader.best_loss
    return tied or improves(item.best_score, leader.best_score, settings.monitor_mode)


def _state(stacks: Sequence[tuple[list[int], Stack]], n: int) -> dict[str, Tensor]:
    members, stack = next((members, stack) for members, stack in stacks if n in members)
    return stack.state(members.index(n))


def _row(candidate: Candidate, item: Progress, *, chosen: bool) -> dict[str, Any]:
    measured = item.history[item.best_epoch - 1] if item.best_epoch else {}
    figures = {name: value for name, value in measured.items() if name.startswith("val_")}
    return {**asdict(candidate), "best_epoch": item.best_epoch, **figures, "chosen": chosen}


def announce(found: Found, *, monitor: str) -> None:
    """One line: which head won, and what the configured one reached."""
    candidate, configured = found.candidate, [row for row in found.table if same_head(row, found.table[0])]
    scores = [row[f"val_{monitor}"] for row in configured if row["best_epoch"]]
    log.info(
        "head search: of %d heads the best is %s with dropout %.2g, learning rate %.2g, weight decay %.2g: validation "
        "%s %.4f in epoch %d (the configured head: %s)",
        len(found.table),
        f"{candidate.hidden_features} hidden" if candidate.hidden_features else "linear",
        candidate.dropout_rate,
        candidate.learning_rate,
        candidate.weight_decay,
        monitor,
        found.progress.best_score,
        found.progress.best_epoch,
        f"at best {max(scores, key=lambda score: -score if monitor == 'loss' else score):.4f}" if scores else "never",
    )


def same_head(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows of the table are of one head, at whatever rates."""
    return all(row[name] == other[name] for name in ("hidden_features", "dropout_rate"))


# --- the logistic start ----------------------------------------------------------------------------------------


def start_logistic(
    head: torch.nn.Sequential, features: FeatureCache, *, n_classes: int, weights_C: Tensor | None
) -> None:
    """Give a linear head the weights of the logistic regression on the first view of the training films."""
    (batch,) = features.train_batches([Request(1, np.arange(len(features.train_labels)))])
    weight_CF, bias_C = logistic_regression(
        batch.inputs.numpy(),
        features.train_labels,
        n_classes=n_classes,
        class_weights=None if weights_C is None else weights_C.cpu().numpy().astype(np.float64),
    )
    head[-1].load_state_dict({"weight": torch.from_numpy(weight_CF), "bias": torch.from_numpy(bias_C)})


def logistic_regression(
    features_MF: FloatArray, labels: IntArray, *, n_classes: int, class_weights: FloatArray | None
) -> tuple[FloatArray, FloatArray]:
    """Weight (C, F) and bias (C,) minimising the summed cross-entropy plus half the squared norm of the weights.

    The penalty is on standardised features (as with C = 1 in scikit-learn); L-BFGS from zero.
    """
    from scipy.optimize import minimize

    mean, std = features_MF.mean(axis=0), features_MF.std(axis=0)
    std = np.where(std > 1e-8, std, 1.0)
    inputs = ((features_MF - mean) / std).astype(np.float32)
    targets = np.eye(n_classes)[labels]
    film_weights = (np.ones(n_classes) if class_weights is None else class_weights)[labels][:, None]
    width = inputs.shape[1]

    def loss_and_gradient(flat: FloatArray) -> tuple[float, FloatArray]:
        weight, bias = flat[: n_classes * width].reshape(n_classes, width), flat[n_classes * width :]
        logits = (inputs @ weight.T.astype(np.float32)).astype(np.float64) + bias
        logits -= logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(axis=1, keepdims=True))
        excess = film_weights * (np.exp(logits - log_sum) - targets)
        loss = float((film_weights * targets * (log_sum - logits)).sum() + 0.5 * (weight**2).sum())
        gradient = (excess.T.astype(np.float32) @ inputs).astype(np.float64) + weight
        return loss, np.concatenate([gradient.ravel(), excess.sum(axis=0)])

    found = minimize(
        loss_and_gradient, np.zeros(n_classes * (width + 1)), jac=True, method="L-BFGS-B", options={"maxiter": 200}
    ).x
    weight = found[: n_classes * width].reshape(n_classes, width) / std
    return weight.astype(np.float32), (found[n_classes * width :] - weight @ mean).astype(np.float32)
