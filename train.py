"""Fit a classifier: one visible loop, resumable bit for bit.

    python main.py train --model resnet50 --epochs 50
    python main.py train --model resnet50 --resume checkpoints/checkpoint_epoch_20.pth

Reads the films and, if asked, pretrained weights. Writes the run folder: best_model.pth, checkpoint_epoch_<N>.pth,
config.yaml, split.csv, history.csv, training_curves.png, environment.json. Never looks at the test split: epoch,
temperature and operating point are chosen on validation. Legend: B batch, H height, W width, C channels or classes.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import plots
from array_cache import default_folder
from auroc import auroc, multiclass_auroc
from calibration import fit_temperature
from config import Config, Overrides, TrainingConfig, config_from_dict, differing_fields, flatten, resolve, to_yaml
from data_preprocessing import (
    Augmenter,
    Batch,
    FilmBatches,
    Loader,
    Manifest,
    Request,
    class_weights,
    describe,
    film_hashes,
    load_manifest,
    open_pixels,
    positive_class,
    resolve_channels,
    sequential_requests,
    split_manifest,
    training_requests,
    write_split,
)
from engines import InputScaling, TorchEngine
from errors import ConfigError, DataError, UserError, examples
from feature_cache import CannotCache, FeatureCache, Tail, open_features
from metrics import choose_threshold
from models import Classifier, count_parameters, model_from_config, normalisation, parameter_groups
from predictor import decide, load_state, softmax
from preprocess import PreprocessSpec
from runtime import (
    Interrupted,
    StopRequest,
    archive,
    autocast,
    environment,
    log,
    memory_advice,
    peak_memory_mb,
    progress,
    require_writable,
    resolve_device,
    resolve_precision,
    run_files,
    write_json,
    write_text,
)

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

RESUMABLE_CHANGES = (
    "runtime.",
    "evaluation.",
    "optimization.",
    "training.num_epochs",
    "training.early_stopping_patience",
    "training.keep_checkpoints",
    "data.data_dir",
    "data.manifest",
    "data.cache_dir",
    "data.pixel_cache",
)
"""Fields that may differ between a run and its continuation; any other would make it a different run."""


# --- the pieces of a step --------------------------------------------------------------------------------------


def warmup_cosine(*, step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor on the peak rate before optimizer step `step` (from 0): linear up, then a half cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def classification_loss(
    logits_BC: Tensor, targets_BC: Tensor, *, config: TrainingConfig, weights_C: Tensor | None
) -> Tensor:
    """Mean cross-entropy or focal loss (Lin 2017) of soft targets (rows sum to 1), classes weighted by `weights_C`."""
    smoothing = config.label_smoothing
    if config.loss == "cross_entropy":
        return F.cross_entropy(logits_BC, targets_BC, weight=weights_C, label_smoothing=smoothing)
    targets_BC = targets_BC * (1 - smoothing) + smoothing / targets_BC.shape[1]
    log_prob_BC = F.log_softmax(logits_BC, dim=1)
    terms_BC = -targets_BC * (1 - log_prob_BC.exp()) ** config.focal_gamma * log_prob_BC
    return (terms_BC if weights_C is None else terms_BC * weights_C).sum(dim=1).mean()


def mix_batch(
    images_BCHW: Tensor, targets_BC: Tensor, *, mixup_alpha: float, cutmix_alpha: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """MixUp (Zhang 2018) or CutMix (Yun 2019) of a batch with a permutation of itself; both from `rng` alone."""
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return images_BCHW, targets_BC
    use_cutmix = cutmix_alpha > 0 and (mixup_alpha == 0 or rng.random() < 0.5)
    alpha = cutmix_alpha if use_cutmix else mixup_alpha
    share = float(rng.beta(alpha, alpha))
    partner = torch.from_numpy(rng.permutation(len(images_BCHW))).to(images_BCHW.device)
    if use_cutmix:
        height, width = images_BCHW.shape[2:]
        top, bottom = _cut(height, share, rng)
        left, right = _cut(width, share, rng)
        images_BCHW = images_BCHW.clone()
        images_BCHW[:, :, top:bottom, left:right] = images_BCHW[partner, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images_BCHW = torch.lerp(images_BCHW[partner], images_BCHW, share)
    return images_BCHW, torch.lerp(targets_BC[partner], targets_BC, share)


def _cut(length: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    half = length * math.sqrt(1 - share) / 2
    centre = rng.uniform(0, length)
    return max(0, round(centre - half)), min(length, round(centre + half))


class WeightAverage:
    """Exponential moving average of what training changes: trainable parameters and float buffers.

    The decay grows from 0.1 towards `decay` over the first steps, (1 + t) / (10 + t), so that the random start is
    forgotten.
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self, model: Classifier, *, step: int) -> None:
        """Move the average towards `model` after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        moving: dict[str, Tensor] = {name: item for name, item in model.named_parameters() if item.requires_grad}
        moving |= {name: item for name, item in model.named_buffers() if item.is_floating_point()}
        torch._foreach_lerp_([own[name] for name in moving], list(moving.values()), 1 - decay)


# --- a run -----------------------------------------------------------------------------------------------------


@dataclass
class Standing:
    """How far a run is; plain values only, stored in every checkpoint."""

    epoch: int = 1
    """The epoch under way, from 1."""
    batch: int = 0
    """Batches of it already trained on."""
    step: int = 0
    """Optimizer steps since the start."""
    loss_sum: float = 0.0
    """Sum of this epoch's batch losses."""
    best_score: float | None = None
    best_epoch: int = 0
    stale_epochs: int = 0
    """Epochs since the best one."""
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """Films, specification and first weights of a run."""

    manifest: Manifest
    digest: str
    """Of the split before unreadable films were left out, so that the same data are known again."""
    seen: IntArray
    """Content hashes of the training and validation films; no other data may be measured on them."""
    spec: PreprocessSpec
    train_set: FilmBatches
    val_set: FilmBatches
    model: Classifier


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    output_dir: str
    best_model: str
    best_epoch: int
    epochs: int
    monitor: str
    best_score: float
    temperature: float
    operating_point: dict[str, Any]
    validation: dict[str, float]


def resume_config(path: Path, *overrides: Overrides) -> tuple[Path, Config]:
    """(checkpoint file, its configuration with the permitted overrides); a folder stands for its newest checkpoint.

    ConfigError lists the fields that an override would change although they make the run what it is.
    """
    if path.is_dir():
        path = checkpoint.newest(path)
    stored = config_from_dict(checkpoint.load(path)["config"], source=str(path))
    layers = [flatten(stored.to_dict(), source=str(path)), {"runtime.output_dir": str(path.parent)}, *overrides]
    wanted = resolve(*layers)
    changed = [name for name in differing_fields(stored, wanted) if not name.startswith(RESUMABLE_CHANGES)]
    if changed:
        was, now = flatten(stored.to_dict(), source=""), flatten(wanted.to_dict(), source="")
        facts = "; ".join(f"{name} was {was[name]!r}, now {now[name]!r}" for name in changed)
        raise ConfigError(
            f"--resume {path}: the run was made with other settings: {facts}; drop these or start a new run"
        )
    return path, wanted


def train(config: Config, *, resume: Path | None = None) -> TrainResult:
    """Train as `config` says, or go on from the checkpoint `resume`, and fill the run folder.

    Raises UserError kinds for the user's mistakes and Interrupted after a signal, with everything saved.
    """
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    precision = resolve_precision(config.runtime.precision, device, use_amp=config.training.use_amp)
    stored = checkpoint.load(resume) if resume else None
    folder = Path(config.runtime.output_dir)
    require_writable(folder)
    prepared = prepare(config, random_weights=stored is not None)
    fit = Fit(config, prepared, folder=folder, device=device, precision=precision)
    if stored is None or resume is None:
        _open_folder(folder)
    else:
        fit.restore(stored, source=resume)
        _set_later_files_aside(folder, resume, fit.standing)
        _bring_best(folder, resume, fit.standing)
    _write_facts(folder, config, prepared.manifest, environment(device, precision))
    with StopRequest() as stop:
        return fit.run(stop)


def prepare(config: Config, *, random_weights: bool = False) -> Prepared:
    """Read, split and decode the films and build the model; the cheap checks come before the long work."""
    seed = config.training.seed
    manifest = split_manifest(load_manifest(config.data), config.data, seed=seed)
    positive_class(manifest.classes, config.data.positive_class)
    log.info("%s", describe(manifest))
    torch.manual_seed(seed)
    with memory_advice(config.data.batch_size):
        model = model_from_config(
            config.model,
            num_classes=len(manifest.classes),
            image_size=config.data.image_size,
            random=random_weights,
        )
    mean, std = normalisation(model)
    channels = resolve_channels(config.data, list(manifest.split("train")["path"]), seed=seed)
    spec = PreprocessSpec(config.data.image_size, config.data.resize, channels, mean, std)
    digest = manifest.digest()
    manifest, pixels = open_pixels(manifest, spec, config.data)
    seen = film_hashes(list(manifest.table.loc[manifest.table["split"] != "test", "path"]))
    augmenter = Augmenter(config.data, seed=seed)
    train_set = FilmBatches(manifest.split("train"), pixels, augmenter)
    return Prepared(manifest, digest, seen, spec, train_set, FilmBatches(manifest.split("val"), pixels, None), model)


def _open_folder(folder: Path) -> None:
    if moved := archive(folder, run_files(folder)):
        log.info("the earlier run in %s was moved to %s", folder, moved)


def _set_later_files_aside(folder: Path, resumed: Path, standing: Standing) -> None:
    """Archive what an abandoned continuation left: checkpoints and a best model from epochs not yet trained here."""
    done = standing.epoch - 1
    later = [path for epoch, path in checkpoint.epoch_files(folder) if epoch > done]
    best, interrupted = folder / checkpoint.BEST, folder / checkpoint.INTERRUPTED
    if interrupted.exists():
        later.append(interrupted)
    if best.exists() and checkpoint.load(best)["provenance"]["epoch"] > done:
        later.append(best)
    later = [path for path in later if path.resolve() != resumed.resolve()]
    if moved := archive(folder, later):
        log.info("files of epochs after %d were moved to %s", done, moved)


def _bring_best(folder: Path, resumed: Path, standing: Standing) -> None:
    """Make folder/best_model.pth the best epoch up to now; where its weights are lost, the search starts anew."""
    if not standing.best_epoch:
        return
    kept = f"checkpoint_epoch_{standing.best_epoch}.pth"
    for path in (folder / checkpoint.BEST, resumed.parent / checkpoint.BEST, resumed.parent / kept, resumed):
        content = checkpoint.load(path) if path.exists() else None
        if content is not None and content["provenance"]["epoch"] == standing.best_epoch:
            content.pop("training_state", None)
            checkpoint.save(folder / checkpoint.BEST, content)
            return
    log.warning("the weights of the best epoch, %d, are not here: the best is sought from now on", standing.best_epoch)
    standing.best_score, standing.best_epoch = None, 0


def _write_facts(folder: Path, config: Config, manifest: Manifest, facts: dict[str, Any]) -> None:
    write_text(folder / "config.yaml", to_yaml(config))
    write_split(manifest, folder / "split.csv")
    write_json(folder / "environment.json", {"model": config.model.model_type, **facts})


class Fit:
    """One run: the model with its optimizer, films, standing and folder."""

    def __init__(
        self, config: Config, prepared: Prepared, *, folder: Path, device: torch.device, precision: str
    ) -> None:
        self.config, self.prepared, self.folder = config, prepared, folder
        self.device, self.precision = device, precision
        self.classes = prepared.manifest.classes
        self.positive = positive_class(self.classes, config.data.positive_class)
        self.model = prepared.model.to(device).to(memory_format=torch.channels_last)
        self.to_input = InputScaling(prepared.spec).to(device)
        workers = _worker_count(config.runtime.workers, device)
        self.stop: StopRequest | None = None
        self.network: torch.nn.Module = self.model
        self.features: FeatureCache | None = None
        self.feature_engine: str | None = None
        self._routed_for = -1
        self.loader = Loader(prepared.train_set, workers=workers, pin_memory=device.type == "cuda")
        self.val_loader = Loader(prepared.val_set, workers=0)
        settings = config.training
        groups = parameter_groups(
            self.model,
            learning_rate=settings.learning_rate,
            backbone_lr=settings.backbone_lr,
            weight_decay=settings.weight_decay,
        )
        self.optimizer = torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.average = WeightAverage(self.model, settings.ema_decay) if settings.ema_decay else None
        self.weights_C = self._loss_weights()
        batches = len(prepared.train_set) // config.data.batch_size
        self.total_steps = settings.num_epochs * math.ceil(batches / settings.accumulation_steps)
        self.standing = Standing()
        point = {"rule": "argmax"} if self.positive is None else {"rule": "fixed", "threshold": 0.5}
        self.calibrated: dict[str, Any] = {
            "temperature": 1.0,
            "operating_point": {**point, "positive_class": self.positive},
        }

    def _loss_weights(self) -> Tensor | None:
        if self.config.data.balance not in ("loss", "sampler_and_loss"):
            return None
        weights = class_weights(self.prepared.train_set.labels, len(self.classes))
        return torch.tensor(weights, dtype=torch.float32, device=self.device)

    # -- the loop --

    def run(self, stop: StopRequest) -> TrainResult:
        """Train to the last epoch, to the end of patience, or to a signal."""
        self.stop = stop
        self._announce()
        started = time.perf_counter()
        while not self._finished():
            self._open_stages()
            epoch_started, first_batch = time.perf_counter(), self.standing.batch
            self._train_epoch(stop)
            trained_s = time.perf_counter() - epoch_started
            films = (self.standing.batch - first_batch) * self.config.data.batch_size
            self._close_epoch(films_per_s=films / trained_s, started=epoch_started)
            if stop.signal is not None:
                self._end_interrupted(stop.signal)
        return self._finish(time.perf_counter() - started)

    def _finished(self) -> bool:
        settings, standing = self.config.training, self.standing
        patience = settings.early_stopping_patience
        return standing.epoch > settings.num_epochs or (patience > 0 and standing.stale_epochs >= patience)

    def _open_stages(self) -> None:
        for epoch, stages in sorted(self.config.training.unfreeze_schedule.items()):
            if epoch <= self.standing.epoch:
                self.model.unfreeze_layers(num_layers=stages)
        trainable = count_parameters(self.model).trainable
        if trainable != self._routed_for:
            self._routed_for = trainable
            self._choose_route()

    def _choose_route(self) -> None:
        """Run only what trains, on cached outputs of what is frozen, where that can be; else the whole network."""
        self.network, self.features = self.model, None
        if not any(not item.requires_grad for item in self.model.backbone.parameters()):
            return
        settings = self.config.training
        try:
            if not settings.feature_cache:
                raise CannotCache("training.feature_cache is off")
            if settings.mixup_alpha or settings.cutmix_alpha:
                raise CannotCache("MixUp and CutMix mix films, not their features")
            self.features, self._cut = open_features(
                self.model,
                self.prepared.spec,
                self.prepared.train_set,
                self.prepared.val_set,
                views=settings.cached_views,
                folder=default_folder(self.config.data.cache_dir),
                device=self.device,
                precision=self.precision,
                engine=self.feature_engine,
                stop=self.stop,
            )
        except CannotCache as reason:
            log.info("frozen layers run in every step: %s", reason)
            return
        self.feature_engine = self.features.engine
        self.network = Tail(self.model, self._cut)

    def _train_epoch(self, stop: StopRequest) -> None:
        requests = self._requests()
        accumulation = self.config.training.accumulation_steps
        self.model.train()
        self.network.train()
        prepare_batches = self.loader if self.features is None else self.features.train_batches
        pending = self._progress(prepare_batches(requests[self.standing.batch :]), requests)
        for batch in pending:
            position = self.standing.batch
            group_start = position - position % accumulation
            group = min(accumulation, len(requests) - group_start)
            with memory_advice(self.config.data.batch_size):
                loss = self._backward(batch, share=1 / group)
            self.standing.loss_sum += loss
            self.standing.batch += 1
            if self.standing.batch == group_start + group:
                self._step()
                if stop.signal is not None and self.standing.batch < len(requests):
                    self._end_interrupted(stop.signal)

    def _requests(self) -> list[Request]:
        return training_requests(
            self.prepared.train_set.labels,
            batch_size=self.config.data.batch_size,
            seed=self.config.training.seed,
            epoch=self.standing.epoch,
            n_classes=len(self.classes),
            weighted=self.config.data.balance in ("sampler", "sampler_and_loss"),
        )

    def _progress(self, batches: Iterator[Batch], requests: Sequence[Request]) -> Iterator[Batch]:
        size = self.config.data.batch_size
        label = f"epoch {self.standing.epoch}/{self.config.training.num_epochs}"
        return progress(batches, total=(len(requests) - self.standing.batch) * size, label=label, step=size)

    def _backward(self, batch: Batch, *, share: float) -> float:
        """Add the gradient of one batch, times `share`; its loss. A loss that is not finite ends the run here."""
        settings = self.config.training
        targets_BC = F.one_hot(batch.labels_B.to(self.device), len(self.classes)).float()
        rng = np.random.default_rng((settings.seed, 2, self.standing.epoch, self.standing.batch))
        images_BCHW, targets_BC = mix_batch(
            self._inputs(batch),
            targets_BC,
            mixup_alpha=settings.mixup_alpha,
            cutmix_alpha=settings.cutmix_alpha,
            rng=rng,
        )
        with autocast(self.device, self.precision):
            logits_BC = self.network(images_BCHW)
        loss = classification_loss(logits_BC.float(), targets_BC, config=settings, weights_C=self.weights_C)
        value = loss.item()
        if not math.isfinite(value):
            raise self._not_finite(value, batch)
        self.scaler.scale(loss * share).backward()
        return value

    def _inputs(self, batch: Batch) -> Tensor:
        """What the network of this step takes: normalised films, or cached features as they are."""
        return self.to_input(batch.inputs) if self.features is None else batch.inputs.to(self.device)

    def _not_finite(self, value: float, batch: Batch) -> UserError:
        rows = self.prepared.manifest.split("train").iloc[batch.positions_B.tolist()]
        films = [self.prepared.manifest.relative_path(path) for path in rows["path"]]
        return UserError(
            f"epoch {self.standing.epoch}, batch {self.standing.batch + 1}: the loss is {value} (films "
            f"{examples(films)}); nothing was stepped and the last checkpoint stands: lower training.learning_rate and "
            "training.backbone_lr, or compute with --precision fp32"
        )

    def _step(self) -> None:
        settings = self.config.training
        factor = warmup_cosine(
            step=self.standing.step,
            warmup_steps=round(settings.warmup_fraction * self.total_steps),
            total_steps=self.total_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        if settings.gradient_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.standing.step += 1
        if self.average is not None:
            self.average.update(self.model, step=self.standing.step)

    # -- validation and the end of an epoch --

    def _deployed(self) -> Classifier:
        """The weights that validation measures and best_model.pth holds: the average where one is kept."""
        return self.model if self.average is None else self.average.model

    def _validation_logits(self) -> FloatArray:
        requests = sequential_requests(len(self.prepared.val_set), self.config.data.batch_size)
        with memory_advice(self.config.data.batch_size):
            logits_NC = np.concatenate(list(self._logits_by_batch(requests)))
        if not np.isfinite(logits_NC).all():
            raise UserError(
                f"epoch {self.standing.epoch}: the validation logits are not finite; the last checkpoint stands: lower "
                "training.learning_rate and training.backbone_lr"
            )
        return logits_NC

    def _logits_by_batch(self, requests: Sequence[Request]) -> Iterator[FloatArray]:
        if self.features is None:
            yield from self._whole_network_logits(self._deployed(), requests)
            return
        tail = Tail(self._deployed().eval(), self._cut).train(False)
        for batch in self.features.val_batches(requests):
            with torch.inference_mode(), autocast(self.device, self.precision):
                yield tail(self._inputs(batch)).float().cpu().numpy()

    def _whole_network_logits(self, model: Classifier, requests: Sequence[Request]) -> Iterator[FloatArray]:
        """Logits of the validation films by the way that a prediction will take."""
        engine = TorchEngine(model, self.prepared.spec, device=self.device, precision=self.precision)
        return (engine.logits(batch.inputs) for batch in self.val_loader(requests))

    def _close_epoch(self, *, films_per_s: float, started: float) -> None:
        """Measure, write the row, keep the best, save; then stand at the start of the next epoch."""
        standing, settings = self.standing, self.config.training
        logits_NC, labels = self._validation_logits(), self.prepared.val_set.labels
        validation = validation_figures(logits_NC, labels, positive=self._positive_index())
        rates = {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        row = {
            "epoch": standing.epoch,
            "train_loss": standing.loss_sum / max(1, standing.batch),
            **{f"val_{name}": value for name, value in validation.items()},
            **rates,
            "images_per_s": films_per_s,
            "seconds": time.perf_counter() - started,
            "peak_memory_mb": peak_memory_mb(self.device),
        }
        standing.history.append(row)
        better = improves(validation[settings.monitor], standing.best_score, settings.monitor_mode)
        if better:
            standing.best_score, standing.best_epoch = validation[settings.monitor], standing.epoch
        standing.stale_epochs = standing.epoch - standing.best_epoch
        self.calibrated = self._calibrate(logits_NC, labels)
        if better:  # first: a kill between the two files then costs an epoch, not the best model
            self._save(checkpoint.BEST, epoch=standing.epoch, resumable=False)
        log.info("%s", self._epoch_line(row, better=better))
        finished = standing.epoch
        standing.epoch, standing.batch, standing.loss_sum = finished + 1, 0, 0.0
        self._save(f"checkpoint_epoch_{finished}.pth", epoch=finished, resumable=True)
        (self.folder / checkpoint.INTERRUPTED).unlink(missing_ok=True)
        checkpoint.keep_newest(self.folder, settings.keep_checkpoints)
        write_text(self.folder / "history.csv", pd.DataFrame(standing.history).to_csv(index=False))

    def _positive_index(self) -> int | None:
        return None if self.positive is None else self.classes.index(self.positive)

    def _calibrate(self, logits_NC: FloatArray, labels: IntArray) -> dict[str, Any]:
        """Temperature and operating point from validation logits."""
        temperature = fit_temperature(logits_NC, labels)
        index = self._positive_index()
        if index is None:
            return {"temperature": temperature, "operating_point": {"rule": "argmax", "positive_class": None}}
        settings = self.config.training
        targeted = settings.operating_point in ("sensitivity", "specificity")
        point = choose_threshold(
            labels == index,
            softmax(logits_NC, temperature)[:, index],
            rule=settings.operating_point,
            target=settings.operating_point_target if targeted else None,
        )
        return {"temperature": temperature, "operating_point": {**asdict(point), "positive_class": self.positive}}

    def _calibrate_whole_network(self, best: dict[str, Any]) -> dict[str, Any]:
        """Choose temperature and operating point anew with the whole network.

        Another engine computed the cached features, and its rounding may move a threshold.
        """
        load_state(self.model, best["model_state_dict"], source=checkpoint.BEST)
        requests = sequential_requests(len(self.prepared.val_set), self.config.data.batch_size)
        logits_NC = np.concatenate(list(self._whole_network_logits(self.model, requests)))
        calibrated = {**best, **self._calibrate(logits_NC, self.prepared.val_set.labels)}
        checkpoint.save(self.folder / checkpoint.BEST, calibrated)
        return calibrated

    def _epoch_line(self, row: dict[str, float], *, better: bool) -> str:
        monitored = self.config.training.monitor
        return (
            f"epoch {row['epoch']}/{self.config.training.num_epochs}: train loss {row['train_loss']:.4f}, "
            f"val loss {row['val_loss']:.4f}, val AUROC {row['val_auc_roc']:.4f}, "
            f"val accuracy {row['val_accuracy']:.4f}, {row['images_per_s']:.1f} films/s, {row['seconds']:.0f} s"
            + (f"  <- best {monitored}" if better else "")
        )

    # -- saving and resuming --

    def _save(self, name: str, *, epoch: int, resumable: bool) -> None:
        content = {
            "model_state_dict": self._deployed().state_dict(),
            "config": self.config.to_dict(),
            "classes": list(self.classes),
            "preprocess": self.prepared.spec.to_dict(),
            **self.calibrated,
            "seen_films": torch.from_numpy(self.prepared.seen),
            "provenance": self._provenance(epoch),
        }
        if resumable:
            content["training_state"] = self._training_state()
        checkpoint.save(self.folder / name, content)

    def _provenance(self, epoch: int) -> dict[str, Any]:
        facts = environment(self.device, self.precision)
        chosen = ("code_version", "python", "libraries", "device", "precision")
        return {
            "epoch": epoch,
            "seed": self.config.training.seed,
            "manifest_digest": self.prepared.digest,
            **{name: facts[name] for name in chosen},
        }

    def _training_state(self) -> dict[str, Any]:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "standing": asdict(self.standing),
            "torch_rng": torch.get_rng_state(),
            "feature_engine": self.feature_engine,
        }
        if self.average is not None:
            state["model"] = self.model.state_dict()
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, stored: dict[str, Any], *, source: Path) -> None:
        """Stand where the checkpoint stood; DataError when the films are not those it was trained on."""
        if "training_state" not in stored:
            raise ConfigError(
                f"--resume {source}: holds weights only; resume from a checkpoint_epoch_<N>.pth, or start a new "
                "run from it with --weights"
            )
        if stored["provenance"]["manifest_digest"] != self.prepared.digest:
            raise DataError(
                f"--resume {source}: the films, labels or splits are not those it was trained on; restore them or "
                "start a new run"
            )
        state = stored["training_state"]
        load_state(self.model, state.get("model", stored["model_state_dict"]), source=str(source))
        if self.average is not None:
            load_state(self.average.model, stored["model_state_dict"], source=str(source))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.feature_engine = state["feature_engine"]
        self.standing = Standing(**state["standing"])
        self.calibrated = {name: stored[name] for name in ("temperature", "operating_point")}
        torch.set_rng_state(state["torch_rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _end_interrupted(self, number: int) -> None:
        """Save where the run stands, with the calibration of the last whole epoch, and leave."""
        name = checkpoint.INTERRUPTED if self.standing.batch else f"checkpoint_epoch_{self.standing.epoch - 1}.pth"
        if self.standing.batch:
            self._save(name, epoch=self.standing.epoch, resumable=True)
        raise Interrupted(
            number,
            f"stopped in epoch {self.standing.epoch} after batch {self.standing.batch}; go on with: "
            f"python main.py train --resume {self.folder / name}",
        )

    # -- words --

    def _announce(self) -> None:
        count = count_parameters(self.model)
        settings = self.config.training
        log.info(
            "%s on %s in %s: %.1f M parameters, %.1f M trainable; batch %d x %d; %d epochs at most",
            self.config.model.model_type,
            self.device,
            self.precision,
            count.total / 1e6,
            count.trainable / 1e6,
            self.config.data.batch_size,
            settings.accumulation_steps,
            settings.num_epochs,
        )
        if self.standing.step:
            log.info("resumed at epoch %d, batch %d", self.standing.epoch, self.standing.batch)

    def _finish(self, seconds: float) -> TrainResult:
        standing = self.standing
        if not standing.best_epoch:
            raise UserError(
                f"validation {self.config.training.monitor} was never a number, so no epoch is best; the last "
                "checkpoint stands: lower the learning rates or choose another training.monitor"
            )
        plots.training_curves(standing.history, self.folder / "training_curves.png")
        best = checkpoint.load(self.folder / checkpoint.BEST)
        if self.features is not None:
            best = self._calibrate_whole_network(best)
        row = standing.history[standing.best_epoch - 1]
        validation = {name[4:]: value for name, value in row.items() if name.startswith("val_")}
        log.info(
            "done in %.0f s: best epoch %d with validation %s %.4f, temperature %.2f, threshold %s\n"
            "next: python main.py evaluate --checkpoint %s",
            seconds,
            standing.best_epoch,
            self.config.training.monitor,
            standing.best_score,
            best["temperature"],
            f"{best['operating_point']['threshold']:.3f}" if self.positive else "argmax",
            self.folder / checkpoint.BEST,
        )
        return TrainResult(
            output_dir=str(self.folder),
            best_model=str(self.folder / checkpoint.BEST),
            best_epoch=standing.best_epoch,
            epochs=len(standing.history),
            monitor=self.config.training.monitor,
            best_score=float(standing.best_score or 0.0),
            temperature=best["temperature"],
            operating_point=best["operating_point"],
            validation=validation,
        )


def _worker_count(wanted: int, device: torch.device) -> int:
    """0 on a CPU, where processes would take the network's own cores; up to 8 beside a GPU."""
    if wanted >= 0:
        return wanted
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def improves(value: float, best: float | None, mode: str) -> bool:
    """Whether `value` beats `best` in direction `mode`; NaN never does."""
    if math.isnan(value):
        return False
    return best is None or (value > best if mode == "max" else value < best)


def validation_figures(logits_NC: FloatArray, labels: IntArray, *, positive: int | None) -> dict[str, float]:
    """loss, auc_roc, accuracy, balanced_accuracy and f1 of validation logits, at threshold 0.5 or by argmax."""
    prob_NC = softmax(logits_NC, 1.0)
    n_classes = prob_NC.shape[1]
    names = [str(code) for code in range(n_classes)]
    predicted = decide(prob_NC, names, None if positive is None else names[positive], 0.5)
    measured = range(n_classes) if positive is None else [positive]
    recalls = [float((predicted[labels == code] == code).mean()) for code in range(n_classes)]
    return {
        "loss": float(-np.log(np.maximum(prob_NC[np.arange(len(labels)), labels], 1e-300)).mean()),
        "auc_roc": _validation_auroc(prob_NC, labels, positive),
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "f1": float(np.mean([_f1(predicted, labels, code) for code in measured])),
    }


def _validation_auroc(prob_NC: FloatArray, labels: IntArray, positive: int | None) -> float:
    if positive is not None:
        return auroc(labels == positive, prob_NC[:, positive])
    return multiclass_auroc(labels, prob_NC)


def _f1(predicted: IntArray, labels: IntArray, code: int) -> float:
    hits = ((predicted == code) & (labels == code)).sum()
    return float(2 * hits / max(1, (predicted == code).sum() + (labels == code).sum()))
