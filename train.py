"""Fit a classifier: one visible loop, resumable bit for bit.

    python main.py train --model resnet50 --epochs 50
    python main.py train --model resnet50 --resume checkpoints/checkpoint_epoch_20.pth

Reads the films and, if asked, pretrained weights. Writes the run folder: best_model.pth, checkpoint_epoch_<N>.pth,
config.yaml, split.csv, history.csv, training_curves.png, environment.json. Never looks at the test split: epoch,
temperature and operating point are chosen on validation. Legend: B batch, H height, W width, C channels or classes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import audit
import checkpoint
import gate
import head_search
import plots
from array_cache import default_folder
from calibration import fit_temperature
from compilation import compiled_network
from config import Config, Overrides, config_from_dict, differing_fields, flatten, located, resolve, to_yaml
from data_preprocessing import (
    Augmenter,
    Batch,
    FilmBatches,
    Loader,
    Manifest,
    Request,
    ResidentFilms,
    can_be_resident,
    describe,
    excluded_films,
    file_digests,
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
from depthwise import speed_up_depthwise
from device_augmentation import DeviceAugmenter
from engines import InputScaling, TorchEngine
from errors import ConfigError, DataError, UserError, examples
from feature_cache import CannotCache, FeatureCache, Tail, open_features
from finding_objective import (
    calibrated_findings,
    finding_figures,
    finding_loss,
    finding_weights,
    uncalibrated_findings,
)
from findings import matrix
from metrics import choose_threshold
from models import (
    Classifier,
    check_model_name,
    count_parameters,
    has_fixed_grid,
    make_head,
    model_from_config,
    normalisation,
    parameter_groups,
    require_weights_file,
)
from objective import (
    Mixing,
    classification_loss,
    draw_mixing,
    improves,
    loss_weights,
    mix_batch,
    progressive_side,
    shrunk,
    validation_figures,
    warmup_cosine,
)
from predictor import load_state, softmax
from preprocess import PreprocessSpec
from process_group import ALONE, Group, launch_name
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
from tracking import Tracker
from whole_batch import Rows, average_statistics, follow_whole_batch, hold_batch_norm

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

RESUMABLE_CHANGES = (
    "runtime.",
    "evaluation.",
    "optimization.",
    "serving.",
    "training.num_epochs",
    "training.early_stopping_patience",
    "training.keep_checkpoints",
    "training.input_gate",
    "data.data_dir",
    "data.manifest",
    "data.cache_dir",
    "data.pixel_cache",
)
"""Fields that may differ between a run and its continuation; any other would make it a different run."""
CHECK_EVERY = 50
"""On a GPU the losses stay there and are looked at every so many steps: looking makes the CPU wait for the GPU."""


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
    excluded: int = 0
    """Films that data.exclude left out."""


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


def resume_config(path: Path, *overrides: Overrides, processes: int = 1) -> tuple[Path, Config]:
    """(checkpoint file, its configuration with the permitted overrides); a folder stands for its newest checkpoint.

    A step keeps its films: data.batch_size becomes what each of `processes` then has at most. ConfigError lists the
    fields that an override would change although they make the run what it is.
    """
    if path.is_dir():
        path = checkpoint.newest(path)
    content = checkpoint.load(path)
    stored = located(config_from_dict(content["config"], source=str(path)), path)
    each = math.ceil(content.get("training_state", {}).get("films_per_step", stored.data.batch_size) / processes)
    stored = replace(stored, data=replace(stored.data, batch_size=each))
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


def configured(overrides: Sequence[Overrides], *, resume: Path | None, processes: int) -> tuple[Path | None, Config]:
    """(checkpoint to go on from, configuration) of a run as the command line asks for it.

    Where torchrun starts the processes anew, that is the newest checkpoint of what it has started before.
    """
    folder = Path(resolve(*overrides).runtime.output_dir)
    if resume is not None and not any("runtime.output_dir" in layer for layer in overrides):
        folder = resume if resume.is_dir() else resume.parent
    if (left := _left_by_this_launch(folder)) is not None:
        log.warning("started anew: going on from %s", left)
        # The films of a step stand in the checkpoint, also when fewer processes come back.
        kept = [{name: value for name, value in layer.items() if name != "data.batch_size"} for layer in overrides]
        return resume_config(left, *kept, {"runtime.output_dir": str(folder)}, processes=processes)
    if resume is None:
        return None, resolve(*overrides)
    return resume_config(resume, *overrides, processes=processes)


def _left_by_this_launch(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` if it is of the torchrun that started this process."""
    try:
        launch = json.loads((folder / "environment.json").read_text(encoding="utf-8")).get("launch")
    except (OSError, ValueError, AttributeError):
        return None
    has_any = checkpoint.epoch_files(folder) or (folder / checkpoint.INTERRUPTED).exists()
    return checkpoint.newest(folder) if launch is not None and launch == launch_name() and has_any else None


def train(
    config: Config,
    *,
    resume: Path | None = None,
    group: Group = ALONE,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    kind: type[Fit] | None = None,
) -> TrainResult:
    """Train as `config` says, or go on from the checkpoint `resume`, and fill the run folder; with all of `group`.

    `kind` is the run of another kind of model, a subclass of Fit. `on_epoch` gets each row of history.csv once it is
    written, and may end the run by raising. Raises UserError kinds for the user's mistakes and Interrupted after a
    signal, with everything saved.
    """
    kind = kind or Fit
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    precision = group.from_main(lambda: safe_precision(config, device), what="the precision")
    stored = group.from_main(lambda: checkpoint.load(resume) if resume else None, what="the checkpoint to go on from")
    folder = Path(config.runtime.output_dir)
    group.from_main(lambda: require_writable(folder), what="the run folder")
    trackers: list[Tracker] = []
    group.from_main(lambda: trackers.append(Tracker(config.runtime.tracker, folder)), what="the tracker")
    tracker = trackers[0] if trackers else Tracker("none", folder)
    torch.manual_seed(config.training.seed)  # the generators of all processes stand alike: see whole_batch
    prepared, drawn = group.from_node(
        lambda: (kind.prepare(config, random_weights=stored is not None), torch.get_rng_state()),
        what="the films and the first weights",
    )
    torch.set_rng_state(drawn)
    fit = kind(config, prepared, folder=folder, device=device, precision=precision, group=group)
    if stored is not None and resume is not None:
        fit.restore(stored, source=resume)
    fit.standing = group.from_main(lambda: _arrange(fit, resume), what="the run folder")
    fit.on_epoch = tracker.heard_by(on_epoch)
    tracker.settings(flatten(config.to_dict(), source="the configuration"))
    with StopRequest(of_many=group.size > 1) as stop, tracker.following(folder):
        return fit.run(stop)


def _arrange(fit: Fit, resumed: Path | None) -> Standing:
    """Make the run folder ready for `fit`; where the run then stands."""
    if resumed is None:
        _open_folder(fit.folder)
    else:
        _set_later_files_aside(fit.folder, resumed, fit.standing)
        _bring_best(fit.folder, resumed, fit.standing)
    facts = {**environment(fit.device, fit.precision), "processes": fit.group.size, "launch": launch_name()}
    _write_facts(fit.folder, fit.config, fit.prepared.manifest, facts)
    return fit.standing


def safe_precision(config: Config, device: torch.device) -> str:
    """The resolved precision; fp32 where bf16 would give wrong gradients."""
    precision = resolve_precision(config.runtime.precision, device, use_amp=config.training.use_amp)
    side = config.training.progressive_resizing or config.data.image_size
    # oneDNN's bf16 leaves weight gradients unwritten (NaN, or whatever lay there) where a 3 × 3 kernel of stride 2
    # meets a map of one pixel: in the last stage, below 32 px. Seen in torch 2.14 with AVX512-BF16.
    if device.type == "cpu" and precision == "bf16" and side < 32:
        log.info("films of %d px are trained in fp32: the bf16 gradients of maps of one pixel are wrong on CPUs", side)
        return "fp32"
    return precision


def manifest_of(config: Config, *, random_weights: bool = False) -> Manifest:
    """The films of a run; mistakes that can be seen before a film is opened end it here, before anything is said."""
    check_model_name(config.model.model_type)
    if config.model.weights is not None and not random_weights:
        require_weights_file(Path(config.model.weights))
    manifest = load_manifest(config.data)
    positive_of(manifest, config)
    return manifest


def prepare(
    config: Config, *, random_weights: bool = False, build: Callable[[Manifest], Any] | None = None
) -> Prepared:
    """Read, split and decode the films and build the model; the cheap checks come before the long work.

    `build` makes another model than the configured classifier of films.
    """
    seed = config.training.seed
    manifest = split_manifest(manifest_of(config, random_weights=random_weights), config.data, seed=seed)
    if config.training.progressive_resizing and has_fixed_grid(config.model.model_type):
        raise ConfigError(
            f"training.progressive_resizing: {config.model.model_type} takes films of one size only; set it to 0"
        )
    log.info("%s", describe(manifest))
    torch.manual_seed(seed)
    with memory_advice(config.data.batch_size):
        model = (
            build(manifest)
            if build is not None
            else model_from_config(
                config.model,
                num_classes=len(manifest.classes),
                image_size=config.data.image_size,
                random=random_weights,
            )
        )
    mean, std = normalisation(model)
    channels = resolve_channels(config.data, list(manifest.split("train")["path"]), seed=seed)
    data = config.data
    spec = PreprocessSpec(
        data.image_size, data.resize, channels, mean, std, data.dicom_window, data.dicom_body_part.strip().lower()
    )
    digest = manifest.digest()
    digests = file_digests(list(manifest.table["path"]))
    manifest, pixels = open_pixels(manifest, spec, config.data, digests)
    hashes = film_hashes(list(manifest.table["path"]), digests)
    audit.say_briefly(manifest, hashes, source=config.data.manifest or config.data.data_dir)
    seen = hashes[(manifest.table["split"] != "test").to_numpy()]
    on_device = config.data.augment_on == "device" or (
        config.data.augment_on == "auto" and resolve_device(config.runtime.device).type == "cuda"
    )
    augmenter = DeviceAugmenter(config.data, seed=seed) if on_device else Augmenter(config.data, seed=seed)
    train_set = FilmBatches(manifest.split("train"), pixels, augmenter)
    excluded = len(excluded_films(Path(config.data.exclude))) if config.data.exclude else 0
    val_set = FilmBatches(manifest.split("val"), pixels, None)
    return Prepared(manifest, digest, seen, spec, train_set, val_set, model, excluded)


def positive_of(manifest: Manifest, config: Config) -> str | None:
    """The positive class of a binary task; None for several classes, and where each finding is its own."""
    return None if manifest.multilabel else positive_class(manifest.classes, config.data.positive_class)


def calibrated(
    logits_NC: FloatArray, labels: IntArray, classes: Sequence[str], positive: str | None, config: Config
) -> dict[str, Any]:
    """Temperature and operating point from validation logits, as the configuration asks."""
    if config.data.multilabel:
        return calibrated_findings(logits_NC, labels, classes, config.training)
    temperature = fit_temperature(logits_NC, labels)
    if positive is None:
        return {"temperature": temperature, "operating_point": {"rule": "argmax", "positive_class": None}}
    index, settings = list(classes).index(positive), config.training
    targeted = settings.operating_point in ("sensitivity", "specificity")
    point = choose_threshold(
        labels == index,
        softmax(logits_NC, temperature)[:, index],
        rule=settings.operating_point,
        target=settings.operating_point_target if targeted else None,
    )
    return {"temperature": temperature, "operating_point": {**asdict(point), "positive_class": positive}}


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

    verb = "train"
    prepare: Callable[..., Prepared] = staticmethod(prepare)
    """Reads the films and builds the model of a run of this kind."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        *,
        folder: Path,
        device: torch.device,
        precision: str,
        group: Group = ALONE,
    ) -> None:
        self.config, self.prepared, self.folder = config, prepared, folder
        self.device, self.precision, self.group = device, precision, group
        self.films_per_step = config.data.batch_size * group.size
        self.classes = prepared.manifest.classes
        self.multilabel = config.data.multilabel
        self.positive = positive_of(prepared.manifest, config)
        self.model = prepared.model.to(device).to(memory_format=torch.channels_last)
        if device.type == "cpu":
            speed_up_depthwise(self.model)
        self.rows = Rows()
        self._follow_whole_batch()
        self.to_input = InputScaling(prepared.spec).to(device)
        workers = _worker_count(config.runtime.workers, device, processes=group.local_size)
        self.stop: StopRequest | None = None
        self.on_epoch: Callable[[dict[str, float]], None] | None = None
        self.network: torch.nn.Module = self.model
        self.features: FeatureCache | None = None
        self.feature_engine: str | None = None
        self.compiled: bool | None = None
        self._cut: int | None = None
        self._no_cache = ""
        self._routed_for = -1
        self.loader: Callable[[Sequence[Request]], Iterator[Batch]] = Loader(
            prepared.train_set, workers=workers, pin_memory=device.type == "cuda"
        )
        self.val_loader = Loader(prepared.val_set, workers=0)
        settings = config.training
        self.optimizer = self._new_optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.check_every = CHECK_EVERY if device.type == "cuda" else 1
        self.average = WeightAverage(self.model, settings.ema_decay) if settings.ema_decay else None
        labels, balance = prepared.train_set.labels, config.data.balance
        weigh = finding_weights if self.multilabel else loss_weights
        self.weights_C = weigh(labels, len(self.classes), balance=balance, device=device)
        self.standing = Standing()
        point = {"rule": "argmax"} if self.positive is None else {"rule": "fixed", "threshold": 0.5}
        self.calibrated: dict[str, Any] = {
            "temperature": 1.0,
            "operating_point": {**point, "positive_class": self.positive},
        }
        if self.multilabel:
            self.calibrated = uncalibrated_findings(self.classes)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        settings = self.config.training
        batches = len(self.prepared.train_set) // self.films_per_step
        return settings.num_epochs * math.ceil(batches / settings.accumulation_steps)

    def _follow_whole_batch(self) -> None:
        batch_norm = self.config.training.batch_norm
        follow_whole_batch(self.model, self.rows, self.group, batch_norm=batch_norm, device=self.device)

    def _new_optimizer(self) -> torch.optim.AdamW:
        settings = self.config.training
        rule = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[settings.lr_scaling]
        groups = parameter_groups(
            self.model,
            learning_rate=settings.learning_rate * self.group.size**rule,
            backbone_lr=settings.backbone_lr * self.group.size**rule,
            weight_decay=settings.weight_decay,
        )
        return torch.optim.AdamW(groups, fused=self.device.type in ("cpu", "cuda"))

    # -- the loop --

    def run(self, stop: StopRequest) -> TrainResult:
        """Train to the last epoch, to the end of patience, or to a signal."""
        self.stop = stop
        if self.films_per_step < self.group.size:
            raise ConfigError(
                f"{self.group.size} processes for steps of {self.films_per_step} films: start at most "
                f"{self.films_per_step}, so that each has one"
            )
        self._announce()
        started = time.perf_counter()
        if self._begins_with_features():
            self._open_stages()
            self._begin_with_features()
        while not self._finished():
            self._open_stages()
            epoch_started, first_batch = time.perf_counter(), self.standing.batch
            self._train_epoch(stop)
            trained_s = time.perf_counter() - epoch_started
            films = (self.standing.batch - first_batch) * self.films_per_step
            self._close_epoch(films_per_s=films / trained_s, started=epoch_started)
            if (number := self._signal(stop)) is not None:
                self._end_interrupted(number)
        seconds = time.perf_counter() - started
        return self.group.from_main(lambda: self._finish(seconds), what="the end of the run on the first process")

    def _signal(self, stop: StopRequest) -> int | None:
        """The signal at which all processes stop here, if any."""
        return self.group.any_signal(stop.signal, what=f"the vote on stopping in epoch {self.standing.epoch}")

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
        if any(not item.requires_grad for item in self.model.backbone.parameters()):
            self._open_features()
        waiting = self.features is None and isinstance(self.loader, Loader)
        if waiting and can_be_resident(self.prepared.train_set, self.device):
            self.loader = ResidentFilms(self.prepared.train_set, self.device)
        # A head alone is too little work to be worth compiling.
        if self.config.training.compile != "off" and (self.features is None or self._cut is not None):
            self._compile()
        self.network = self._parallel(self.network)

    def _parallel(self, network: torch.nn.Module) -> torch.nn.Module:
        return self.group.parallel(network, every_batch=self.config.training.accumulation_steps == 1)

    def _open_features(self) -> None:
        settings, found, self._no_cache = self.config.training, None, ""
        try:
            if not settings.feature_cache:
                raise CannotCache("training.feature_cache is off")
            if settings.mixup_alpha or settings.cutmix_alpha:
                raise CannotCache("MixUp and CutMix mix films, not their features")
            if settings.progressive_resizing:
                raise CannotCache("progressive resizing changes the films from epoch to epoch")
            found = open_features(
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
                group=self.group,
            )
        except CannotCache as reason:
            self._no_cache = str(reason)
        # All or none: on one machine the disk may be too small.
        reasons = self.group.each(lambda: self._no_cache, what="whether frozen layers can be cached")
        self._no_cache = next(filter(None, reasons), "")
        if found is None or self._no_cache:
            log.info("frozen layers run in every step: %s", self._no_cache)
            return
        self.features, self._cut = found
        self.feature_engine = self.features.engine
        self.network = Tail(self.model, self._cut)

    def _compile(self) -> None:
        """Compile the network of the steps, if the settings and the probe (or the run being resumed) say so."""
        if self.compiled is False:
            return
        requests = self._requests()
        part = part_of(requests[0], self.group.bounds(self.films_per_step), None)
        self.rows.are(part.start, part.stop, of=part.count)
        batch = next(iter(self._batches([part.request])))
        targets_BC = self._targets(batch)
        self._train_mode()
        eager = self.network
        self.network = compiled_network(
            eager,
            self._inputs(batch),
            lambda logits_BC: self._loss(logits_BC, targets_BC),
            wanted="on" if self.compiled else self.config.training.compile,
            steps=len(requests) * (self.config.training.num_epochs - self.standing.epoch + 1),
            device=self.device,
            precision=self.precision,
        )
        self.compiled = self.network is not eager

    # -- a head from cached features, before the first epoch --

    def _begins_with_features(self) -> bool:
        settings = self.config.training
        return not self.standing.step and (settings.head_search or settings.head_start == "logistic")

    def _begin_with_features(self) -> None:
        """Search the heads, or give the linear head its logistic start."""
        searched = self.config.training.head_search
        if self.features is None or self._cut is not None:
            raise ConfigError(
                f"training.{'head_search' if searched else 'head_start=logistic'}: works on cached features, and there "
                f"are none here: {self._no_cache}; change that or drop the setting"
            )
        if searched:
            self._search_heads(self.features)
            return
        head_search.start_logistic(
            self.model.head, self.features, n_classes=len(self.classes), weights_C=self.weights_C
        )
        if self.average is not None:
            self.average = WeightAverage(self.model, self.config.training.ema_decay)

    def _search_heads(self, features: FeatureCache) -> None:
        """Train the grid of heads; the best becomes this run's, its best epoch the best model."""
        settings = self.config.training
        candidates = head_search.grid(self.config.model, settings)
        log.info("head search: %d heads at once on cached features", len(candidates))
        found = self.group.from_main(
            lambda: head_search.search(
                features,
                candidates,
                settings=settings,
                n_classes=len(self.classes),
                positive=self._positive_index(),
                weights_C=self.weights_C,
                requests_of=self._requests,
                device=self.device,
                precision=self.precision,
                stop=self.stop,
            ),
            what="the head search on the first process",
        )
        head_search.announce(found, monitor=settings.monitor)
        self._write("head_search.csv", pd.DataFrame(found.table).to_csv(index=False))
        self._adopt(found)
        self.calibrated = self._calibrate(self._validation_logits(), self.prepared.val_set.labels)
        self._save(checkpoint.BEST, epoch=self.standing.best_epoch, resumable=False)
        self._save(f"checkpoint_epoch_{found.epochs}.pth", epoch=found.epochs, resumable=True)
        self._write("history.csv", pd.DataFrame(self.standing.history).to_csv(index=False))

    def _adopt(self, found: head_search.Found) -> None:
        """Make the best head, its settings and its history those of the run, which then stands after its last epoch."""
        best, progress = found.candidate, found.progress
        hidden, dropout = best.hidden_features, best.dropout_rate
        self.config = replace(
            self.config,
            model=replace(self.config.model, hidden_features=hidden, dropout_rate=dropout),
            training=replace(self.config.training, learning_rate=best.learning_rate, weight_decay=best.weight_decay),
        )
        self._write("config.yaml", to_yaml(self.config))
        width = found.head["1.weight"].shape[1]
        head = make_head(width, num_classes=len(self.classes), dropout_rate=dropout, hidden_features=hidden)
        head.load_state_dict(found.head)
        self.model.head = head.to(self.device)
        self._follow_whole_batch()
        self.network = self._parallel(Tail(self.model, self._cut))
        self.optimizer = self._new_optimizer()
        rows = [{**row, "lr_backbone": 0.0, "peak_memory_mb": peak_memory_mb(self.device)} for row in progress.history]
        self.standing = Standing(
            epoch=found.epochs + 1,
            step=found.epochs * len(self._requests()),
            best_score=progress.best_score,
            best_epoch=progress.best_epoch,
            stale_epochs=found.epochs - progress.best_epoch,
            history=rows,
        )

    # -- an epoch --

    def _batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        return self.loader(requests) if self.features is None else self.features.train_batches(requests)

    def _begin_epoch(self) -> list[Request]:
        self._epoch_requests = self._requests()
        self._losses = torch.zeros(len(self._epoch_requests), device=self.device)
        self._checked = self.standing.batch
        self._broken = torch.zeros((), device=self.device)
        self._train_mode()
        return self._epoch_requests

    def _train_mode(self) -> None:
        self.model.train()
        self.network.train()
        if self.config.training.batch_norm == "frozen":
            hold_batch_norm(self.model)

    def _train_epoch(self, stop: StopRequest) -> None:
        requests = self._begin_epoch()
        accumulation = self.config.training.accumulation_steps
        own = [self._part(batch).request for batch in range(self.standing.batch, len(requests))]
        for batch in self._progress(self._batches(own), requests):
            position = self.standing.batch
            first = position - position % accumulation
            together = min(accumulation, len(requests) - first)
            last = position + 1 == first + together
            with memory_advice(self.config.data.batch_size), self._reducing(last):
                self._backward(batch, share=1 / together)
            self.standing.batch += 1
            if self.standing.batch % self.check_every == 0:
                self._check_losses(self.standing.batch)
            if last:
                self._step()
                number = self._signal(stop)
                if number is not None and self.standing.batch < len(requests):
                    self._check_losses(self.standing.batch)
                    self._end_interrupted(number)
        self._check_losses(self.standing.batch)

    @contextlib.contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        """Average gradients over the processes in the `last` batch of a step only; until then each adds up its own."""
        network: Any = self.network
        apart = contextlib.nullcontext() if last or self.group.size == 1 else network.no_sync()
        what = f"the gradients of epoch {self.standing.epoch}, batch {self.standing.batch + 1}"
        with self.group.naming(what), apart:
            yield

    def _part(self, batch: int) -> Part:
        """What this process does of the epoch's batch number `batch` (from 0)."""
        settings, request = self.config.training, self._epoch_requests[batch]
        mixing = draw_mixing(
            len(request.positions),
            mixup_alpha=settings.mixup_alpha,
            cutmix_alpha=settings.cutmix_alpha,
            rng=np.random.default_rng((settings.seed, 2, self.standing.epoch, batch)),
        )
        return part_of(request, self.group.bounds(len(request.positions)), mixing)

    def _requests(self, epoch: int | None = None) -> list[Request]:
        """The batches of `epoch`, or of the one under way."""
        return training_requests(
            self.prepared.train_set.labels,
            batch_size=self.films_per_step,
            seed=self.config.training.seed,
            epoch=epoch or self.standing.epoch,
            n_classes=len(self.classes),
            weighted=self.config.data.balance in ("sampler", "sampler_and_loss"),
        )

    def _progress(self, batches: Iterator[Batch], requests: Sequence[Request]) -> Iterator[Batch]:
        size = self.films_per_step
        label = f"epoch {self.standing.epoch}/{self.config.training.num_epochs}"
        return progress(batches, total=(len(requests) - self.standing.batch) * size, label=label, step=size)

    def _backward(self, batch: Batch, *, share: float) -> Tensor:
        """Add the gradient of this process' part of one batch, times `share`; the part's loss.

        Nothing here waits for a GPU: the loss is looked at later, and until then no step is taken that it would break.
        """
        part = self._part(self.standing.batch)
        self.rows.are(part.start, part.stop, of=part.count)
        images_BCHW, targets_BC = self._inputs(batch), self._targets(batch)
        if part.mixing is not None:
            images_BCHW, targets_BC = mix_batch(
                images_BCHW, targets_BC, part.mixing, rows_B=part.rows_B, partners_B=part.partners_B
            )
        with autocast(self.device, self.precision):
            logits_BC = self.network(images_BCHW)
        loss = self._loss(logits_BC.float(), targets_BC)
        self._note_loss(loss.detach() * part.share)
        # Gradients are averaged over processes that hold unequal parts: each counts as much as it has films.
        self.scaler.scale(loss * (share * part.share * self.group.size)).backward()
        return loss.detach()

    def _inputs(self, batch: Batch) -> Tensor:
        """What the network of this step takes: normalised films, or cached features as they are."""
        if self.features is not None:
            return batch.inputs.to(self.device)
        epoch, full = self.standing.epoch, self.config.data.image_size
        films_BHWC = self.prepared.train_set.finished(batch, epoch=epoch, device=self.device)
        if start := self.config.training.progressive_resizing:
            side = progressive_side(epoch=epoch, epochs=self.config.training.num_epochs, start=start, full=full)
            films_BHWC = shrunk(films_BHWC, side)
        return self.to_input(films_BHWC)

    def _targets(self, batch: Batch) -> Tensor:
        if self.multilabel:
            present_BC = torch.from_numpy(matrix(batch.labels_B.numpy(), len(self.classes)))
            return present_BC.float().to(self.device, non_blocking=True)
        return F.one_hot(batch.labels_B, len(self.classes)).float().to(self.device, non_blocking=True)

    def _loss(self, logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
        if self.multilabel:
            return finding_loss(logits_BC, targets_BC, config=self.config.training, weights_2C=self.weights_C)
        return classification_loss(logits_BC, targets_BC, config=self.config.training, weights_C=self.weights_C)

    def _note_loss(self, loss: Tensor) -> None:
        """Keep this process' part of the loss of the batch under way on the device."""
        self._losses[self.standing.batch] = loss
        torch.maximum(self._broken, (~loss.isfinite()).float(), out=self._broken)

    def _check_losses(self, count: int) -> None:
        """Add up the losses of the epoch's first `count` batches; the first that is not finite ends the run here."""
        losses = self.group.sum_(self._losses[self._checked : count].clone(), what="the losses")
        for batch, value in enumerate(losses.tolist(), start=self._checked):
            if not math.isfinite(value):
                raise self._not_finite(value, batch)
            self.standing.loss_sum += value
        self._checked = count

    def _not_finite(self, value: float, batch: int) -> UserError:
        rows = self.prepared.manifest.split("train").iloc[self._epoch_requests[batch].positions]
        films = [self.prepared.manifest.relative_path(path) for path in rows["path"]]
        return UserError(
            f"epoch {self.standing.epoch}, batch {batch + 1}: the loss is {value} (films "
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
        if self.check_every > 1 and not self.scaler.is_enabled():
            # The fused step then leaves everything as it is, as it does for a scaler that found an overflow.
            self.group.max_(self._broken, what="whether a loss is not finite")
            self.optimizer.found_inf = self._broken  # type: ignore[attr-defined]
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
        if self.config.training.batch_norm == "local":
            for model in {id(item): item for item in (self.model, self._deployed())}.values():
                average_statistics(model, self.group)
        what = f"the validation logits of epoch {self.standing.epoch}"
        with memory_advice(self.config.data.batch_size):
            logits_NC = np.concatenate(self.group.spread(requests, self._logits_by_batch, what=what))
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
        validation, calibration = self.group.from_main(
            lambda: (
                self._figures(logits_NC, labels),
                self._calibrate(logits_NC, labels),
            ),
            what=f"the figures of epoch {standing.epoch}",
        )
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
        self.calibrated = calibration
        if better:  # first: a kill between the two files then costs an epoch, not the best model
            self._save(checkpoint.BEST, epoch=standing.epoch, resumable=False)
        log.info("%s", self._epoch_line(row, better=better))
        finished = standing.epoch
        standing.epoch, standing.batch, standing.loss_sum = finished + 1, 0, 0.0
        self._save(f"checkpoint_epoch_{finished}.pth", epoch=finished, resumable=True)
        if self.group.is_main:
            (self.folder / checkpoint.INTERRUPTED).unlink(missing_ok=True)
            checkpoint.keep_newest(self.folder, settings.keep_checkpoints)
        self._write("history.csv", pd.DataFrame(standing.history).to_csv(index=False))
        if self.on_epoch is not None:
            self.on_epoch(row)

    def _figures(self, logits_NC: FloatArray, labels: IntArray) -> dict[str, float]:
        if self.multilabel:
            return finding_figures(logits_NC, labels)
        return validation_figures(logits_NC, labels, positive=self._positive_index())

    def _positive_index(self) -> int | None:
        return None if self.positive is None else self.classes.index(self.positive)

    def _calibrate(self, logits_NC: FloatArray, labels: IntArray) -> dict[str, Any]:
        return calibrated(logits_NC, labels, self.classes, self.positive, self.config)

    def _is_incomplete(self) -> bool:
        """Whether the whole network still has to see the validation films at the end."""
        return self.features is not None or self.config.training.input_gate

    def _complete_with_whole_network(self, best: dict[str, Any]) -> dict[str, Any]:
        """Choose temperature and operating point anew with the whole network, and fit the input gate.

        Another engine computed the cached features, and its rounding may move a threshold.
        """
        load_state(self.model, best["model_state_dict"], source=checkpoint.BEST)
        engine = TorchEngine(self.model, self.prepared.spec, device=self.device, precision=self.precision)
        requests = sequential_requests(len(self.prepared.val_set), self.config.data.batch_size)
        val = gate.describe(engine.outputs, (batch.inputs.numpy() for batch in self.val_loader(requests)))
        complete = {**best, **self._calibrate(val.logits_NC, self.prepared.val_set.labels)}
        if self.config.training.input_gate:
            complete |= self._input_gate(engine, val)
        checkpoint.save(self.folder / checkpoint.BEST, complete)
        return complete

    def _input_gate(self, engine: TorchEngine, val: gate.Described) -> dict[str, Any]:
        """{'input_gate': its state}; nothing where there are too few films."""
        films = self.prepared.train_set
        views = None if self.features is None else self.features.views
        films_run = films_a_run(len(films), len(self.standing.history), views=views)
        chosen = np.linspace(0, len(films) - 1, gate.reference_count(len(films), films_run)).astype(int)
        batches = np.array_split(films.store_rows[chosen], math.ceil(len(chosen) / self.config.data.batch_size))
        images = (np.stack([films.pixels[int(row)] for row in rows]) for rows in batches)
        try:
            state = gate.fit(gate.describe(engine.outputs, images), val)
        except gate.CannotFit as reason:
            log.info("no input gate: %s", reason)
            return {}
        log.info("input gate: %s", gate.summary(state))
        return {"input_gate": state}

    def _epoch_line(self, row: dict[str, float], *, better: bool) -> str:
        monitored = self.config.training.monitor
        return (
            f"epoch {row['epoch']}/{self.config.training.num_epochs}: loss {row['train_loss']:.4f}, "
            f"val {row['val_loss']:.4f}, AUROC {row['val_auc_roc']:.4f}, accuracy {row['val_accuracy']:.4f}, "
            f"{row['images_per_s']:.1f} films/s, {row['seconds']:.0f} s" + (f", best {monitored}" if better else "")
        )

    # -- saving and resuming --

    def _write(self, name: str, text: str) -> None:
        if self.group.is_main:
            write_text(self.folder / name, text)

    def _save(self, name: str, *, epoch: int, resumable: bool) -> None:
        if not self.group.is_main:
            return
        content = {
            "model_state_dict": self._deployed().state_dict(),
            "config": self.config.to_dict(),
            "classes": list(self.classes),
            "preprocess": self.prepared.spec.to_dict(),
            **self.calibrated,
            "seen_films": torch.from_numpy(self.prepared.seen),
            "provenance": self._provenance(epoch),
            **self._further_content(),
        }
        if resumable:
            content["training_state"] = self._training_state()
        checkpoint.save(self.folder / name, content)

    def _further_content(self) -> dict[str, Any]:
        """What checkpoints of this kind of run hold besides."""
        return {}

    def _provenance(self, epoch: int) -> dict[str, Any]:
        facts = environment(self.device, self.precision)
        chosen = ("code_version", "python", "libraries", "device", "precision")
        return {
            "epoch": epoch,
            "seed": self.config.training.seed,
            "manifest_digest": self.prepared.digest,
            "excluded_films": self.prepared.excluded,
            **{name: facts[name] for name in chosen},
        }

    def _training_state(self) -> dict[str, Any]:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "standing": asdict(self.standing),
            "films_per_step": self.films_per_step,
            "torch_rng": torch.get_rng_state(),
            "feature_engine": self.feature_engine,
            "compiled": self.compiled,
        }
        if self.average is not None:
            state["model"] = self.model.state_dict()
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, stored: dict[str, Any], *, source: Path) -> None:
        """Stand where the checkpoint stood; DataError when the films are not those it was trained on."""
        if "multimodal" in stored and type(self) is Fit:
            raise ConfigError(f"--resume {source}: reads notes; go on with: main.py train_multimodal --resume {source}")
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
        self.feature_engine, self.compiled = state["feature_engine"], state.get("compiled")
        self.standing = Standing(**state["standing"])
        self.films_per_step = state.get("films_per_step", stored["config"]["data"]["batch_size"])
        self.calibrated = {name: stored[name] for name in ("temperature", "operating_point")}
        torch.set_rng_state(state["torch_rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _end_interrupted(self, number: int) -> None:
        """Save where the run stands, with the calibration of the last whole epoch, and leave."""
        name = checkpoint.INTERRUPTED if self.standing.batch else f"checkpoint_epoch_{self.standing.epoch - 1}.pth"
        if self.standing.batch:
            self._save(name, epoch=self.standing.epoch, resumable=True)
        self.group.wait(what="the checkpoint to be written")  # torchrun ends all when the first one leaves
        raise Interrupted(
            number,
            f"stopped in epoch {self.standing.epoch} after batch {self.standing.batch}; go on with: "
            f"python main.py {self.verb} --resume {self.folder / name}",
        )

    # -- words --

    def _announce(self) -> None:
        count = count_parameters(self.model)
        settings = self.config.training
        log.info(
            "%s on %s in %s: %.1f M parameters, %.1f M trainable; %s films a step; %d epochs at most",
            self.config.model.model_type,
            self.device,
            self.precision,
            count.total / 1e6,
            count.trainable / 1e6,
            self._films_a_step(),
            settings.num_epochs,
        )
        if self.standing.step:
            log.info("resumed at epoch %d, batch %d", self.standing.epoch, self.standing.batch)

    def _films_a_step(self) -> str:
        """'16', or '64 (16 x 2 processes x 2 accumulated)' where a step is more than a batch."""
        size, processes = self.config.data.batch_size, self.group.size
        accumulated = self.config.training.accumulation_steps
        total = self.films_per_step * accumulated
        return f"{total}" if total == size else f"{total} ({size} x {processes} processes x {accumulated} accumulated)"

    def _finish(self, seconds: float) -> TrainResult:
        standing = self.standing
        if not standing.best_epoch:
            raise UserError(
                f"validation {self.config.training.monitor} was never a number, so no epoch is best; the last "
                "checkpoint stands: lower the learning rates or choose another training.monitor"
            )
        plots.training_curves(standing.history, self.folder / "training_curves.png")
        best = checkpoint.load(self.folder / checkpoint.BEST)
        if self._is_incomplete():
            best = self._complete_with_whole_network(best)
        row = standing.history[standing.best_epoch - 1]
        validation = {name[4:]: value for name, value in row.items() if name.startswith("val_")}
        log.info(
            "done in %.0f s: best epoch %d with validation %s %.4f, temperature %.2f, threshold %s",
            seconds,
            standing.best_epoch,
            self.config.training.monitor,
            standing.best_score,
            best["temperature"],
            self._threshold_in_words(best["operating_point"]),
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

    def _threshold_in_words(self, point: Mapping[str, Any]) -> str:
        if self.multilabel:
            return "of each finding in the checkpoint"
        return f"{point['threshold']:.3f}" if self.positive else "argmax"


@dataclass(frozen=True)
class Part:
    """What one process does of a batch."""

    request: Request
    """Its own films, then those of other processes that MixUp or CutMix mixes them with."""
    start: int
    """Its own films are [start, stop) of the batch's `count`."""
    stop: int
    count: int
    mixing: Mixing | None
    partners_B: IntArray
    """Where in the request stands the film that each of its own is mixed with."""

    @property
    def rows_B(self) -> IntArray:
        """Where in the request its own films stand."""
        return np.arange(self.stop - self.start)

    @property
    def share(self) -> float:
        """Its own films among the batch's."""
        return (self.stop - self.start) / self.count


def part_of(request: Request, bounds: tuple[int, int], mixing: Mixing | None) -> Part:
    """The films [start, stop) = `bounds` of the batch `request`, with the partners that `mixing` gives them."""
    (start, stop), count = bounds, len(request.positions)
    own = np.arange(start, stop)
    partners = own if mixing is None else mixing.partner_B[start:stop]
    foreign = np.setdiff1d(partners, own)
    there = np.concatenate([own, foreign])
    order = np.argsort(there)
    partners_B = order[np.searchsorted(there, partners, sorter=order)]
    return Part(Request(request.epoch, request.positions[there]), start, stop, count, mixing, partners_B)


def films_a_run(films: int, epochs: int, *, views: int | None) -> int:
    """Films sent through the network in a run, a step's backward pass counted as two; cached layers run once a view."""
    return films * (views or 3 * epochs)


def _worker_count(wanted: int, device: torch.device, *, processes: int) -> int:
    """0 on a CPU, where processes would take the network's own cores; up to 8 beside each of a machine's GPUs."""
    if wanted >= 0:
        return wanted
    return 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) // processes))
