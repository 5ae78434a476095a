"""Structured pruning that really shrinks a classifier, and fine-tuning with the unpruned one as teacher.

    pruned = prune(model, amount=0.3, image_size=224)              # a smaller copy: .model, .before, .after
    result = prune_and_distil(prepared, config, amount=0.3, epochs=3, device=device, precision="bf16", stop=stop)

Whole channels and attention heads leave the graph (Torch-Pruning's dependency graph, Fang 2023), so every engine gets
faster; nothing is masked. Fine-tuning reads the training films and chooses its epoch on validation; it writes nothing
and never looks at the test split. Legend: B batch, H height, W width, C channels or classes.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from data_preprocessing import (
    Augmenter,
    Batch,
    FilmBatches,
    Loader,
    Request,
    positive_class,
    sequential_requests,
    training_requests,
)
from engines import FloatEngine, InputScaling, OpenVinoFloatEngine, TorchFloatEngine, openvino_version
from errors import ConfigError, UserError, first_line
from models import Classifier, count_parameters, parameter_groups
from objective import classification_loss, improves, loss_weights, validation_figures, warmup_cosine
from preprocess import PreprocessSpec
from runtime import Interrupted, StopRequest, autocast, log, memory_advice, progress
from train import Prepared, WeightAverage

AUTOMATIC = -1
"""Widths become multiples of 16, a vector of AVX-512 in fp32, from WIDE channels on, and of 8 below. DenseNet-121's
growth of 32 goes to 16 with it, 1.9 times as fast in ONNX Runtime; at 24 every concatenation is misaligned and it is
1.3 times as fast."""
WIDE = 32
RECALIBRATION_FILMS = 512
"""Enough for batch statistics: one film gives a layer thousands of positions a channel."""
LEARNING_RATE = 3e-4
"""Peak rate of fine-tuning (AdamW), for head and backbone alike: both were trained."""
TEMPERATURE = 2.0
"""Softens teacher and student alike before they are compared."""
TEACHER_SHARE = 0.7
"""Weight of the teacher's word in the loss; the rest is the label's."""
EMA_DECAY = 0.99
"""Of the moving average that is validated and kept, where the configuration names none."""

POSITION_TABLES = ("rel_pos", "relative_position_bias_table", "attention_biases")
"""What timm calls tables of attention by relative position; the dependency graph does not follow their heads."""


# --- pruning ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What a network weighs."""

    parameters: int
    macs: int
    """Multiply-accumulates of one film."""


@dataclass(frozen=True)
class Pruned:
    """A smaller copy of a classifier."""

    model: Classifier
    """In eval mode, every parameter trainable; its pooled features are fewer than the original's."""
    before: Size
    after: Size


def prune(model: Classifier, *, amount: float, image_size: int, round_to: int | None = None) -> Pruned:
    """A copy of `model` without the least important `amount` (in (0, 0.9]) of every layer's channels and heads.

    Widths are rounded to the nearest multiple of `round_to` (None: 16 from 32 channels on, 8 below), never to none. The
    head's hidden layer and the classes stay. ConfigError for an amount out of range or too small to remove anything,
    and for a network that cannot be pruned, naming it.
    """
    if not 0 < amount <= 0.9:
        raise ConfigError(
            f"optimization.pruning_amount: {amount!r} is out of range; it must be above 0 and at most 0.9"
        )
    smaller = copy.deepcopy(model).eval().requires_grad_(True)
    film_BCHW = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)
    try:
        before = size_of(smaller, film_BCHW)
        _shrink(smaller, film_BCHW, amount=amount, round_to=round_to or AUTOMATIC)
        after = size_of(smaller, film_BCHW)
    except Exception as error:
        raise ConfigError(
            f"model.model_type: {_name(model)} cannot be pruned ({first_line(error)}); optimise it without --prune"
        ) from error
    if after.macs == before.macs:
        raise ConfigError(
            f"optimization.pruning_amount: {amount:g} of the channels of {_name(model)} rounds to none; raise it"
        )
    return Pruned(smaller, before, after)


class _Importance:
    """Batch-norm scales of a channel where it has any, else the L2 norm of all weights that read or write it.

    On a ResNet-50 of real films, halved in multiply-accumulates and recalibrated, validation AUROC stood at 0.981 by
    scales and at 0.971 by all weights (unpruned 0.981).
    """

    def __init__(self) -> None:
        self._by_scale = torch_pruning.importance.BNScaleImportance()
        self._by_weight = torch_pruning.importance.GroupMagnitudeImportance(p=2)

    def __call__(self, group: torch_pruning.Group) -> Tensor | None:
        scores = self._by_scale(group)
        return self._by_weight(group) if scores is None else scores


class _Pruner(torch_pruning.pruner.BasePruner):
    """Torch-Pruning's own rounds down, which takes half of a layer of 15 channels when a tenth was asked for."""

    def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
        return current_channels - rounded_width(current_channels - n_pruned, current_channels, round_to)


def rounded_width(wanted: int, current: int, round_to: int) -> int:
    """The multiple of `round_to` nearest to `wanted`, at least one of them and at most `current`."""
    step = (16 if current >= WIDE else 8) if round_to == AUTOMATIC else round_to
    return min(current, max(step, round(wanted / step) * step))


def _shrink(model: Classifier, film_BCHW: Tensor, *, amount: float, round_to: int) -> None:
    if any(getattr(item, name, None) is not None for item in model.modules() for name in POSITION_TABLES):
        raise ValueError("its attention has position tables by head")
    blocks: list[Any] = [item for item in model.modules() if hasattr(item, "qkv") and hasattr(item, "num_heads")]
    fused = [block.fused_attn for block in blocks]
    for block in blocks:
        block.fused_attn = False  # the tracer follows matrix products, not the fused kernel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about bare parameters, which it prunes rightly unasked
        pruner = _Pruner(
            model,
            film_BCHW,
            _Importance(),
            pruning_ratio=amount,
            round_to=round_to,
            ignored_layers=[model.head],
            num_heads={block.qkv: block.num_heads for block in blocks},
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=amount if blocks else 0.0,
        )
        pruner.step()
    for block, was_fused in zip(blocks, fused):
        block.num_heads = block.qkv.out_features // (3 * block.head_dim)
        block.attn_dim = block.num_heads * block.head_dim
        block.fused_attn = was_fused


def size_of(model: nn.Module, images_BCHW: Tensor) -> Size:
    """Parameters, and multiply-accumulates of one of `images_BCHW`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images_BCHW)
    return Size(count_parameters(model).total, counter.get_total_flops() // (2 * len(images_BCHW)))


def _name(model: Classifier) -> str:
    facts = getattr(model.backbone, "pretrained_cfg", None) or {}
    return str(facts.get("architecture") or type(model.backbone).__name__)


# --- batch-norm statistics -------------------------------------------------------------------------------------


@torch.no_grad()
def recalibrate(
    model: Classifier, films: Iterable[Tensor], *, spec: PreprocessSpec, device: torch.device, precision: str
) -> None:
    """Set the batch-norm statistics to those of `films` (uint8 batches (B, H, W, C)), each batch weighing the same.

    Taking channels out shifts what later layers see; no weight has to change to put their statistics right. A network
    without batch norm stays as it is.
    """
    norms = [item for item in model.modules() if isinstance(item, _BatchNorm) and item.track_running_stats]
    if not norms:
        return
    momenta = [item.momentum for item in norms]
    to_input = InputScaling(spec).to(device)
    model.to(device).eval()
    for item in norms:
        item.reset_running_stats()
        item.momentum = None  # a plain mean over the batches
        item.train()
    for films_BHWC in films:
        with autocast(device, precision):
            model.features(to_input(films_BHWC))
    for item, momentum in zip(norms, momenta):
        item.momentum = momentum
    model.eval()


# --- fine-tuning with a teacher --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What validation says of the model at one point of the way."""

    name: str
    """unpruned, pruned, recalibrated or epoch <N>."""
    validation: dict[str, float]
    """loss, auc_roc, accuracy, balanced_accuracy, f1."""
    films_per_s: float | None = None
    """Of fine-tuning; None where there was none."""


@dataclass(frozen=True)
class Distilled:
    """A pruned and fine-tuned classifier and how it came about."""

    model: Classifier
    """In eval mode. What was fitted on the original (temperature, operating point, input gate) must be fitted anew.
    A checkpoint that holds its weights also holds the key `pruned`, by which `predictor.load` knows to narrow."""
    before: Size
    after: Size
    best: str
    """Name of the stage whose weights `model` holds."""
    stages: tuple[Stage, ...]


def prune_and_distil(
    prepared: Prepared,
    config: Config,
    *,
    amount: float,
    epochs: int,
    device: torch.device,
    precision: str,
    stop: StopRequest,
    learning_rate: float = LEARNING_RATE,
) -> Distilled:
    """Prune `prepared.model` (trained; it stays as it is), put batch norm right and fine-tune with it as teacher.

    The pruned model before fine-tuning is a candidate too, so `epochs` may be 0; best is by training.monitor on
    validation. UserError kinds for the user's mistakes; Interrupted after a signal, when nothing of it is kept.
    """
    pruned = prune(prepared.model, amount=amount, image_size=config.data.image_size)
    log.info("pruned by %g: %s", amount, describe(pruned))
    work = Distillation(
        pruned.model, prepared, config, epochs=epochs, learning_rate=learning_rate, device=device, precision=precision
    )
    torch.manual_seed(config.training.seed)  # dropout reads torch's generator
    with memory_advice(config.data.batch_size):
        stages, best, model = work.run(stop)
    return Distilled(model, pruned.before, pruned.after, best, tuple(stages))


def describe(pruned: Pruned) -> str:
    """'24.6 M parameters to 12.2 M, 4.13 G multiply-accumulates to 2.07 G'."""
    before, after = pruned.before, pruned.after
    return (
        f"{before.parameters / 1e6:.1f} M parameters to {after.parameters / 1e6:.1f} M, "
        f"{before.macs / 1e9:.3g} G multiply-accumulates to {after.macs / 1e9:.3g} G"
    )


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """KL divergence of the student from the softened teacher, times temperature² (Hinton 2015: gradients keep size)."""
    student = F.log_softmax(student_BC / temperature, dim=1)
    teacher = F.log_softmax(teacher_BC / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def teacher_engine(
    model: Classifier, spec: PreprocessSpec, film_shape: tuple[int, ...], *, device: torch.device, precision: str
) -> FloatEngine:
    """What turns uint8 films (B, H, W, C) into the teacher's logits: OpenVINO on a CPU that has it, else torch."""
    whole = nn.Sequential(InputScaling(spec), copy.deepcopy(model)).eval()
    if device.type == "cpu" and openvino_version() is not None:
        try:
            return OpenVinoFloatEngine(whole, film_shape, precision=precision)
        except Exception as error:
            log.info("the teacher runs in torch: OpenVINO does not take it (%s)", first_line(error))
    return TorchFloatEngine(whole, device=device, precision=precision)


class Distillation:
    """A pruned student, the trained teacher it came from, and the films that both see."""

    def __init__(
        self,
        student: Classifier,
        prepared: Prepared,
        config: Config,
        *,
        epochs: int,
        learning_rate: float,
        device: torch.device,
        precision: str,
    ) -> None:
        self.student = student.to(device).to(memory_format=torch.channels_last)
        self.spec, self.classes, self.val_set = prepared.spec, prepared.manifest.classes, prepared.val_set
        self.config, self.settings = config, config.training
        self.device, self.precision, self.epochs = device, precision, epochs
        rows, pixels = prepared.manifest.split("train"), prepared.train_set.pixels
        self.train_set = FilmBatches(rows, pixels, Augmenter(config.data, seed=self.settings.seed))
        self.clean_set = FilmBatches(rows, pixels, None)
        film_shape = self.clean_set[sequential_requests(1, 1)[0]].inputs.shape[1:]
        self.teacher = teacher_engine(prepared.model, self.spec, tuple(film_shape), device=device, precision=precision)
        self.to_input = InputScaling(self.spec).to(device)
        labels, balance = self.train_set.labels, config.data.balance
        self.weights_C = loss_weights(labels, len(self.classes), balance=balance, device=device)
        groups = parameter_groups(
            self.student,
            learning_rate=learning_rate,
            backbone_lr=learning_rate,
            weight_decay=self.settings.weight_decay,
        )
        self.optimizer = torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.step, self.steps = 0, epochs * len(self._requests(1))

    def run(self, stop: StopRequest) -> tuple[list[Stage], str, Classifier]:
        """Recalibrate, fine-tune and validate; (every stage, the best one's name, its weights in a model)."""
        stages = [Stage("unpruned", self._figures(self.teacher))]
        log.info("%s", _stage_line(stages[-1], best=False))
        stages.append(Stage("pruned", self._figures(self._student_engine(self.student))))
        log.info("%s", _stage_line(stages[-1], best=False))
        self._recalibrate(stop)
        average = WeightAverage(self.student, self.settings.ema_decay or EMA_DECAY)
        best, best_name, best_score = average.model, "", None
        for epoch in range(self.epochs + 1):
            films_per_s = self._train_epoch(epoch, average, stop) if epoch else None
            name = f"epoch {epoch}" if epoch else "recalibrated"
            stages.append(Stage(name, self._figures(self._student_engine(average.model)), films_per_s))
            score = stages[-1].validation[self.settings.monitor]
            if not best_name or improves(score, best_score, self.settings.monitor_mode):
                best, best_name = copy.deepcopy(average.model), name
                best_score = None if np.isnan(score) else score
            log.info("%s", _stage_line(stages[-1], best=best_name == name))
        return stages, best_name, best.eval()

    # -- films --

    def _requests(self, epoch: int) -> list[Request]:
        return training_requests(
            self.train_set.labels,
            batch_size=self.config.data.batch_size,
            seed=self.settings.seed,
            epoch=epoch,
            n_classes=len(self.classes),
            weighted=self.config.data.balance in ("sampler", "sampler_and_loss"),
        )

    def _recalibrate(self, stop: StopRequest) -> None:
        size = self.config.data.batch_size
        requests = self._requests(0)[: max(1, RECALIBRATION_FILMS // size)]
        films = (batch.inputs for batch in self._until(stop, Loader(self.clean_set, workers=0)(requests)))
        shown = progress(films, total=len(requests) * size, label="batch-norm statistics", step=size)
        recalibrate(self.student, shown, spec=self.spec, device=self.device, precision=self.precision)

    @staticmethod
    def _until(stop: StopRequest, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if stop.signal is not None:
                raise Interrupted(stop.signal, "stopped while fine-tuning the pruned model; nothing of it was kept")
            yield batch

    # -- an epoch --

    def _train_epoch(self, epoch: int, average: WeightAverage, stop: StopRequest) -> float:
        """Films per second."""
        requests, size = self._requests(epoch), self.config.data.batch_size
        batches = self._until(stop, Loader(self.train_set, workers=0)(requests))
        label = f"fine-tuning {epoch}/{self.epochs}"
        started = time.perf_counter()
        self.student.train()
        for batch in progress(batches, total=len(requests) * size, label=label, step=size):
            self._update(self._loss(batch))
            average.update(self.student, step=self.step)
        return len(requests) * size / (time.perf_counter() - started)

    def _loss(self, batch: Batch) -> Tensor:
        teacher_BC = torch.from_numpy(self.teacher(batch.inputs.numpy())).to(self.device)
        with autocast(self.device, self.precision):
            logits_BC = self.student(self.to_input(batch.inputs)).float()
        targets_BC = F.one_hot(batch.labels_B.to(self.device), len(self.classes)).float()
        labelled = classification_loss(logits_BC, targets_BC, config=self.settings, weights_C=self.weights_C)
        taught = distillation_loss(logits_BC, teacher_BC, temperature=TEMPERATURE)
        loss = TEACHER_SHARE * taught + (1 - TEACHER_SHARE) * labelled
        if not torch.isfinite(loss):
            raise UserError(
                f"fine-tuning the pruned model: the loss is {loss.item()} in step {self.step + 1} of {self.steps}; "
                "compute with --precision fp32, or prune less"
            )
        return loss

    def _update(self, loss: Tensor) -> None:
        warmup_steps = round(self.settings.warmup_fraction * self.steps)
        factor = warmup_cosine(step=self.step, warmup_steps=warmup_steps, total_steps=self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.scaler.scale(loss).backward()
        if self.settings.gradient_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    # -- validation --

    def _student_engine(self, model: Classifier) -> FloatEngine:
        whole = nn.Sequential(self.to_input, model)
        return TorchFloatEngine(whole, device=self.device, precision=self.precision)

    def _figures(self, engine: Callable[..., np.ndarray]) -> dict[str, float]:
        requests = sequential_requests(len(self.val_set), self.config.data.batch_size)
        logits = [engine(batch.inputs.numpy()) for batch in Loader(self.val_set, workers=0)(requests)]
        return validation_figures(np.concatenate(logits), self.val_set.labels, positive=self._positive_index())

    def _positive_index(self) -> int | None:
        positive = positive_class(self.classes, self.config.data.positive_class)
        return None if positive is None else self.classes.index(positive)


def _stage_line(stage: Stage, *, best: bool) -> str:
    rate = "" if stage.films_per_s is None else f", {stage.films_per_s:.1f} films/s"
    return (
        f"{stage.name}: val loss {stage.validation['loss']:.4f}, val AUROC {stage.validation['auc_roc']:.4f}, "
        f"val accuracy {stage.validation['accuracy']:.4f}{rate}" + ("  <- best" if best else "")
    )
