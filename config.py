"""Every setting of the program: typed, documented under the field, checked when built.

    python main.py config --set training.num_epochs=5        # print the resolved configuration as YAML

Precedence, in `resolve`: default < recipe < YAML file < flag < `--set`. Unknown keys are errors with the nearest known
name. Imports neither torch nor any other heavy library, so that `--help` stays instant.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import ConfigError, nearest


def _check_range(
    section: str, name: str, value: float, low: float, high: float = math.inf, *, open_high: bool = False
) -> None:
    inside = (low <= value < high if open_high else low <= value <= high) and math.isfinite(value)
    if not inside:
        bound = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high:g}"
        raise ConfigError(f"{section}.{name}: {value!r} is out of range; it must be at least {low:g}{bound}")


def _check_choice(section: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{section}.{name}: {value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}"
        )


@dataclass
class DataConfig:
    """Where the films are, how they are split, brought to size, augmented and balanced."""

    data_dir: str = "data/chest_xray"
    """Folder DIR/{train,val,test}/CLASS/* or DIR/CLASS/*; ignored when `manifest` is set."""
    manifest: str | None = None
    """CSV with path,label and, when known, split,patient_id,text,age,sex,view,site; paths relative to the CSV."""
    classes: list[str] | None = None
    """Class names in the order of the model's outputs; None takes those found, sorted. Of findings, those learned."""
    positive_class: str | None = None
    """The class that is 'disease' in a binary task; None takes the one not named like normal/negative/other."""
    task: str = "classes"
    """classes (a film has exactly one) or multilabel: a manifest's `label` names findings like effusion|mass, and is
    empty, none or No Finding where there is none; each is answered by itself."""
    label_regex: str | None = None
    """Pattern searched in each film's path below the data: its named groups are classes, of which the one that matches
    is the film's; without named groups the class is the text of the first. It wins over folders and `label`."""
    patient_id_regex: str | None = None
    """Pattern searched in the file name; its first group (or whole match) is the patient. None: the published names."""
    val_fraction: float = 0.15
    """Share of training patients held out when validation has to be made; in [0.02, 0.5]."""
    test_fraction: float = 0.15
    """Share of patients held out as test when the data name no test split; in [0, 0.5]."""
    exclude: str | None = None
    """CSV with a `path` column: these films are left out of every split; with a `mark` column too (a review.csv), those
    marked exclude."""
    films_may_lack: bool = False
    """Rows of a manifest may have no film, only a note; train_multimodal sets it."""
    skip_unreadable: bool = False
    """Leave films that cannot be decoded out, and list them, instead of stopping."""
    batch_size: int = 32
    """Films per step of each process, before accumulation."""
    image_size: int = 224
    """Side of the square the model sees, in pixels; in [16, 2048]."""
    resize: str = "squash"
    """How a film becomes square: squash (all anatomy, aspect lost), pad (black bars), crop (centre, sides lost)."""
    colour: str = "auto"
    """grey, rgb, or auto: grey when a sample of the training films has no colour. Grey is three times less to move."""
    dicom_window: str = "first"
    """Which window of a DICOM film: first, a number from 1 among those it stores, or percentile (from its pixels)."""
    dicom_body_part: str = "chest"
    """DICOM films whose tags name another body part are refused: chest, another word like hand, or any."""
    augmentation_prob: float = 0.5
    """Scales the probability of each augmentation but the crop, which every film gets; 0 is none at all; in [0, 1]."""
    rotation_degrees: float = 15.0
    """Rotation is drawn from ± this many degrees; in [0, 180]."""
    brightness_contrast: float = 0.2
    """Brightness and contrast are changed by up to ± this share; in [0, 1]."""
    min_crop_scale: float = 0.4
    """Smallest share of the film's area that the random crop of every film keeps; 1 never crops; in [0.1, 1]."""
    gamma: float = 0.65
    """Grey levels are raised to a power between 1 / (1 + gamma) and 1 + gamma; in [0, 4]."""
    augment_on: str = "auto"
    """cpu (film by film, beside the network), device (whole batches where the network computes), or auto: the device
    when it is a CUDA GPU. Both draw from the same ranges; the single draws differ."""
    balance: str = "loss"
    """Class balancing: none, sampler (draws), loss (weights) or sampler_and_loss (both, which counts rarity twice)."""
    pixel_cache: bool = True
    """Decode each film once into a memory-mapped uint8 file instead of once per epoch."""
    cache_dir: str | None = None
    """Folder of the pixel cache; None: $MEDIMG_CACHE_DIR, else ~/.cache/medimg."""

    @property
    def multilabel(self) -> bool:
        """Whether a film may have several findings."""
        return self.task == "multilabel"

    def __post_init__(self) -> None:
        _check_choice("data", "task", self.task, ("classes", "multilabel"))
        _check_range("data", "val_fraction", self.val_fraction, 0.02, 0.5)
        _check_range("data", "test_fraction", self.test_fraction, 0.0, 0.5)
        _check_range("data", "batch_size", self.batch_size, 1)
        _check_range("data", "image_size", self.image_size, 16, 2048)
        _check_range("data", "augmentation_prob", self.augmentation_prob, 0, 1)
        _check_range("data", "rotation_degrees", self.rotation_degrees, 0, 180)
        _check_range("data", "brightness_contrast", self.brightness_contrast, 0, 1)
        _check_range("data", "min_crop_scale", self.min_crop_scale, 0.1, 1)
        _check_range("data", "gamma", self.gamma, 0, 4)
        _check_choice("data", "resize", self.resize, ("squash", "pad", "crop"))
        if not (self.dicom_window.isdecimal() and int(self.dicom_window) >= 1):
            _check_choice("data", "dicom_window", self.dicom_window, ("first", "percentile", "1"))
        if not self.dicom_body_part.strip():
            raise ConfigError("data.dicom_body_part: is empty; name a body part, or any to take all")
        _check_choice("data", "augment_on", self.augment_on, ("auto", "cpu", "device"))
        if repeated := sorted(name for name in set(self.classes or ()) if (self.classes or []).count(name) > 1):
            raise ConfigError(f"data.classes: {repeated[0]!r} stands there more than once; name each class once")
        _check_choice("data", "colour", self.colour, ("auto", "grey", "rgb"))
        _check_choice("data", "balance", self.balance, ("none", "sampler", "loss", "sampler_and_loss"))


@dataclass
class ModelConfig:
    """The network and where its first weights come from."""

    model_type: str = "resnet50"
    """resnet50, efficientnet_b4, densenet121 or any other timm model name."""
    pretrained: bool = True
    """Start from the weights timm knows for this name (asks a hub, or its cache)."""
    weights: str | None = None
    """A local weights file in timm layout (.safetensors, .pth); needs no network and overrides `pretrained`."""
    freeze_backbone: bool = False
    """Train the head only; batch-norm statistics and dropout of the backbone stand still too."""
    dropout_rate: float = 0.3
    """Dropout before each of the head's two linear layers; in [0, 1)."""
    hidden_features: int = 512
    """Width of the head's hidden layer; 0 is a linear head."""

    def __post_init__(self) -> None:
        _check_range("model", "dropout_rate", self.dropout_rate, 0, 1, open_high=True)
        _check_range("model", "hidden_features", self.hidden_features, 0)


@dataclass
class TrainingConfig:
    """The optimisation: rates, schedule, loss, mixing, averaging, stopping."""

    learning_rate: float = 1e-3
    """Peak rate of the head (AdamW)."""
    backbone_lr: float = 1e-4
    """Peak rate of the backbone (AdamW)."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices and kernels; biases and norm weights are spared."""
    num_epochs: int = 50
    """Upper bound; early stopping may end sooner."""
    warmup_fraction: float = 0.05
    """Share of all optimizer steps spent warming up; in [0, 1)."""
    early_stopping_patience: int = 10
    """Epochs without a better `monitor` before training ends; 0 never stops early."""
    monitor: str = "auc_roc"
    """Validation figure that chooses the best epoch: auc_roc, accuracy, balanced_accuracy, f1 or loss."""
    monitor_mode: str = "max"
    """Direction of `monitor`: max or min (loss wants min). NaN is never an improvement."""
    use_amp: bool = True
    """Mixed precision where the device has it (bf16, else fp16 on GPUs); False computes in fp32."""
    accumulation_steps: int = 1
    """Batches whose gradients are added up before one optimizer step."""
    gradient_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    loss: str = "cross_entropy"
    """cross_entropy or focal; of several findings a film the binary ones."""
    focal_gamma: float = 2.0
    """Focusing exponent of the focal loss (Lin 2017); in [0, 10]."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes; in [0, 1)."""
    mixup_alpha: float = 0.0
    """Beta parameter of MixUp (Zhang 2018); 0 is off."""
    cutmix_alpha: float = 0.0
    """Beta parameter of CutMix (Yun 2019); 0 is off. With both on, each batch takes one of the two."""
    ema_decay: float = 0.0
    """Decay per step of the weights' moving average, used for validation and kept as the best model; 0 is off."""
    unfreeze_schedule: dict[int, int] = field(default_factory=dict)
    """Epoch (from 1) → number of last backbone stages trained from then on; -1 is all. Needs freeze_backbone."""
    feature_cache: bool = True
    """Run frozen layers once per film and view, not in every step; off with MixUp, CutMix or progressive resizing."""
    cached_views: int = 4
    """Augmented views of each training film that the feature cache holds; epochs go round them; in [1, 64]."""
    head_search: bool = False
    """Train many heads at once on the cached features and keep the best on validation; needs a frozen backbone."""
    head_start: str = "random"
    """First weights of the head: random, or logistic (the regression on cached features; needs a linear head)."""
    compile: str = "off"
    """off, on, or auto: torch.compile only where a short probe finds it faster over the whole run."""
    progressive_resizing: int = 0
    """Side in pixels of the first epochs' films, growing to data.image_size by three quarters of the epochs; 0 is
    off. Validation is always at full size."""
    operating_point: str = "stable_youden"
    """How validation chooses the threshold: youden, stable_youden (the middle of all that are within 0.02 of the
    largest Youden index), sensitivity, specificity or fixed (0.5)."""
    operating_point_target: float = 0.95
    """The sensitivity or specificity to reach when `operating_point` names one; in (0, 1)."""
    input_gate: bool = True
    """Fit what tells, at each prediction, whether a film is like those trained on; a few per cent of the run's time."""
    batch_norm: str = "sync"
    """With several processes: sync (statistics of all their films, so that the result does not depend on how many there
    are), local (of each process' own, without talk between them) or frozen (those of the first weights, also alone)."""
    lr_scaling: str = "none"
    """What several processes, and so larger steps, do to both rates: none, linear (times the processes; Goyal 2017) or
    sqrt (times its root)."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoint_epoch_<N>.pth stay."""
    seed: int = 42
    """Of the split, the order, the augmentation, the head's first weights and dropout."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "backbone_lr", "weight_decay", "gradient_clip", "mixup_alpha"):
            _check_range("training", name, getattr(self, name), 0)
        for name in ("cutmix_alpha", "early_stopping_patience"):
            _check_range("training", name, getattr(self, name), 0)
        _check_range("training", "seed", self.seed, 0, 2**63 - 1)
        for name in ("num_epochs", "accumulation_steps", "keep_checkpoints"):
            _check_range("training", name, getattr(self, name), 1)
        for name in ("warmup_fraction", "label_smoothing", "ema_decay"):
            _check_range("training", name, getattr(self, name), 0, 1, open_high=True)
        _check_range("training", "cached_views", self.cached_views, 1, 64)
        _check_range("training", "progressive_resizing", self.progressive_resizing, 0, 2048)
        _check_choice("training", "head_start", self.head_start, ("random", "logistic"))
        _check_choice("training", "compile", self.compile, ("off", "on", "auto"))
        _check_choice("training", "batch_norm", self.batch_norm, ("sync", "local", "frozen"))
        _check_choice("training", "lr_scaling", self.lr_scaling, ("none", "linear", "sqrt"))
        _check_range("training", "focal_gamma", self.focal_gamma, 0, 10)
        _check_range("training", "operating_point_target", self.operating_point_target, 0.01, 0.999)
        _check_choice("training", "monitor", self.monitor, MONITORS)
        _check_choice("training", "monitor_mode", self.monitor_mode, ("max", "min"))
        _check_choice("training", "loss", self.loss, ("cross_entropy", "focal"))
        _check_choice(
            "training",
            "operating_point",
            self.operating_point,
            ("youden", "stable_youden", "sensitivity", "specificity", "fixed"),
        )
        if (self.monitor == "loss") != (self.monitor_mode == "min"):
            better = "min" if self.monitor == "loss" else "max"
            raise ConfigError(
                f"training.monitor_mode: {self.monitor_mode!r} is the wrong way round for "
                f"training.monitor={self.monitor!r}; set training.monitor_mode={better}"
            )
        for epoch, stages in self.unfreeze_schedule.items():
            if not (isinstance(epoch, int) and isinstance(stages, int) and epoch >= 1 and stages >= -1):
                raise ConfigError(
                    f"training.unfreeze_schedule: {epoch!r}: {stages!r} is not an epoch from 1 and a number of "
                    "stages (-1 for all); write it like {3: 1, 6: -1}"
                )


MONITORS = ("auc_roc", "accuracy", "balanced_accuracy", "f1", "loss")


@dataclass
class MultimodalConfig:
    """Models that read a film with a note and a table; read by train_multimodal, ignored elsewhere."""

    modalities: list[str] | None = None
    """image, text, table; None takes the film and what else the data have."""
    fusion: str = "concatenation"
    """How they are joined: a name of `fusion.FUSIONS`, such as concatenation, cross_attention, gated, film, bilinear,
    late."""
    text_model: str = "dmis-lab/biobert-base-cased-v1.2"
    """A BERT-family model: a hub name, or a local folder with config.json, weights and tokenizer."""
    text_layers: int = 0
    """Last layers of the text encoder that are trained; 0 freezes all of it, -1 trains all."""
    text_lr: float = 2e-5
    """Peak rate of the text encoder (AdamW)."""
    max_tokens: int = 256
    """Tokens read of a note; the rest is cut off and said so; in [8, 8192], at most what the encoder takes."""
    columns: list[str] | None = None
    """Columns of the manifest that the model reads, such as age,sex; numbers are standardised, words one-hot."""
    mask_terms: str | None = None
    """File with a word or phrase a line: blotted out of every note, in training and in every prediction after it."""
    width: int = 256
    """Length of the vector that each modality becomes before they are joined; a multiple of `heads`."""
    heads: int = 4
    """Attention heads of cross_attention."""
    modality_dropout: float = 0.15
    """Probability that a row's modality is taken away in a training step, never the last one; in [0, 1)."""
    branch_loss: float = 0.5
    """Weight of the losses of the single-modality heads that are trained beside the fused one; above 0."""

    def __post_init__(self) -> None:
        for name in self.modalities or ():
            _check_choice("multimodal", "modalities", name, MODALITIES)
        _check_range("multimodal", "text_layers", self.text_layers, -1)
        _check_range("multimodal", "text_lr", self.text_lr, 0)
        _check_range("multimodal", "max_tokens", self.max_tokens, 8, 8192)
        _check_range("multimodal", "heads", self.heads, 1)
        _check_range("multimodal", "width", self.width, 1)
        _check_range("multimodal", "modality_dropout", self.modality_dropout, 0, 1, open_high=True)
        _check_range("multimodal", "branch_loss", self.branch_loss, 1e-6)
        if self.width % self.heads:
            raise ConfigError(f"multimodal.width: {self.width} is no multiple of multimodal.heads={self.heads}")


MODALITIES = ("image", "text", "table")


@dataclass
class EvaluationConfig:
    """How a trained model is measured."""

    split: str = "test"
    """Which split is measured: train, val, test or all."""
    level: float = 0.95
    """Coverage of the intervals; in [0.5, 0.999]."""
    bootstrap_resamples: int = 2000
    """Resamples of patients for the intervals without a closed form; in [100, 100000]."""
    proportion_interval: str = "wilson"
    """Interval of sensitivity, specificity and the like; on the effective sample size where patients give several."""
    threshold: float | None = None
    """Positive from this probability on, stated in advance. None: the checkpoint's, or 0.5 for a table."""
    target_sensitivity: float = 0.95
    """One of the operating points shown reaches this sensitivity on validation; in (0, 1)."""
    target_specificity: float = 0.95
    """One of the operating points shown reaches this specificity on validation; in (0, 1)."""
    prevalence: float | None = None
    """Share of positives where the model will be used, for PPV, NPV and prior correction; in (0, 1)."""
    adapt_prevalence: bool = False
    """Move the operating point to the prevalence that the scores of the films themselves speak of, labels unseen."""
    subgroups: list[str] | None = None
    """Columns to compare groups by; None takes those of age, sex, view, site that the films name."""
    min_subgroup: int = 20
    """A group of fewer films is counted and not judged."""
    intersections: bool = True
    """Also compare groups by every pair of those columns."""
    worst_errors: int = 12
    """How many of the most confident errors the report shows; in [0, 100]."""

    def __post_init__(self) -> None:
        _check_choice("evaluation", "split", self.split, ("train", "val", "test", "all"))
        _check_range("evaluation", "level", self.level, 0.5, 0.999)
        _check_range("evaluation", "bootstrap_resamples", self.bootstrap_resamples, 100, 100_000)
        _check_range("evaluation", "target_sensitivity", self.target_sensitivity, 0.001, 0.999)
        _check_range("evaluation", "target_specificity", self.target_specificity, 0.001, 0.999)
        _check_range("evaluation", "min_subgroup", self.min_subgroup, 1)
        _check_range("evaluation", "worst_errors", self.worst_errors, 0, 100)
        if self.prevalence is not None and not 0 < self.prevalence < 1:
            raise ConfigError(
                f"evaluation.prevalence: {self.prevalence!r} is not between 0 and 1; give the share of positives"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"evaluation.threshold: {self.threshold!r} is not a number")
        _check_choice(
            "evaluation",
            "proportion_interval",
            self.proportion_interval,
            ("wilson", "wilson_cc", "clopper_pearson", "agresti_coull", "jeffreys"),
        )


ENGINES = ("torch", "compile", "onnxruntime", "openvino", "cuda", "tensorrt")


@dataclass
class OptimizationConfig:
    """What `optimize` makes of a checkpoint."""

    quantize: bool = True
    """Make INT8 candidates."""
    prune: bool = False
    """Make structurally pruned candidates."""
    pruning_amount: float = 0.3
    """Share of channels removed; in [0, 0.9]."""
    pruning_epochs: int = 3
    """Epochs of fine-tuning a pruned model, the unpruned one its teacher; 0 only puts batch norm right."""
    max_auc_drop: float = 0.005
    """A candidate whose AUROC on validation is lower than the float model's by more than this is refused; in [0, 1]."""
    max_sensitivity_drop: float = 0.01
    """The same for sensitivity at the stored operating point; in [0, 1]."""
    max_accuracy_drop: float = 0.006
    """The same for accuracy there; in [0, 1]. The default is the most that the published INT8 figures lose."""
    objective: str = "throughput"
    """What is chosen by: throughput (films/s in batches of 16) or latency (one film). The other decides near ties."""
    engines: list[str] | None = None
    """torch, compile, onnxruntime, openvino, cuda, tensorrt; None tries all but compile, which takes minutes."""
    validation_films: int = 1000
    """Most validation films that candidates are judged on, drawn by class."""
    calibration_films: int = 128
    """Most validation films that INT8 ranges are learned from, drawn by class."""
    rounds: int = 8
    """Times that the candidates are timed in turn; medians are reported."""

    def __post_init__(self) -> None:
        for name in ("max_auc_drop", "max_sensitivity_drop", "max_accuracy_drop"):
            _check_range("optimization", name, getattr(self, name), 0, 1)
        for name in ("validation_films", "calibration_films", "rounds"):
            _check_range("optimization", name, getattr(self, name), 1)
        _check_choice("optimization", "objective", self.objective, ("throughput", "latency"))
        for engine in self.engines or ():
            _check_choice("optimization", "engines", engine, ENGINES)
        _check_range("optimization", "pruning_amount", self.pruning_amount, 0, 0.9)
        _check_range("optimization", "pruning_epochs", self.pruning_epochs, 0)


@dataclass
class ServingConfig:
    """The inference server: where it listens, what it takes on, what it refuses."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    max_queue: int = 64
    """Films taken on at one time, from arrival to answer; the next one is refused with 503."""
    max_wait_ms: float = 500.0
    """A film is refused with 503 when it would be answered later than this; 2 max_batch films are always taken on."""
    max_batch: int = 8
    """Most films the engine computes together."""
    latency_budget_ms: float = 100.0
    """A batch is made no larger than can be computed in this time, and never waited for longer."""
    deadline_s: float = 30.0
    """A request not answered within this many seconds gets a 503."""
    body_timeout_s: float = 60.0
    """A body not received within this many seconds is given up."""
    decode_threads: int = 0
    """Threads that decode films; 0 takes one for every two cores."""
    max_file_mb: float = 64.0
    """Largest file, in MiB."""
    max_body_mb: float = 256.0
    """Largest request body, in MiB; bodies being held together stay below four of these."""
    max_files: int = 32
    """Most files of one request to /predict/batch."""
    max_pixels: int = 100_000_000
    """Films of more pixels are refused before they are decoded."""
    api_keys_file: str | None = None
    """One name:key a line; beside it, $MEDIMG_API_KEYS holds name:key,name:key. With neither, anyone may ask."""
    rate_limit: float = 0.0
    """Requests a second for each key, on average; 0 does not limit."""
    rate_burst: int = 20
    """Requests a key may make at once before `rate_limit` holds."""
    cors_origins: list[str] | None = None
    """Origins whose pages may read the answers, such as https://viewer.example; None allows no other origin."""
    abstain: bool = False
    """Refuse films the input gate does not accept with 422 instead of answering with a remark."""
    audit_log: str | None = None
    """JSON lines, appended: time, key name, keyed content hash, result, model version."""
    record_scores: str | None = None
    """JSON file with a histogram of scores for each day, to see drift by."""

    def __post_init__(self) -> None:
        _check_range("serving", "port", self.port, 0, 65535)
        for name in ("max_queue", "max_batch", "max_files", "max_pixels", "rate_burst"):
            _check_range("serving", name, getattr(self, name), 1)
        for name in ("latency_budget_ms", "max_wait_ms", "rate_limit", "decode_threads"):
            _check_range("serving", name, getattr(self, name), 0)
        for name in ("deadline_s", "body_timeout_s", "max_file_mb", "max_body_mb"):
            _check_range("serving", name, getattr(self, name), 0.001)


@dataclass
class RuntimeConfig:
    """The machine, not the result: none of these fields changes what is learned."""

    output_dir: str = "checkpoints"
    """Where the run folder is written."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """auto, fp32, bf16 or fp16; auto takes bf16 where the device computes in it."""
    workers: int = -1
    """Processes that prepare batches; 0 uses a thread of this one; -1 chooses."""
    threads: int = 0
    """CPU threads of torch; 0 leaves its own choice."""
    tracker: str = "none"
    """none, mlflow or tensorboard: who else is told of the run."""
    collective_timeout_s: float = 600.0
    """Seconds after which a process gives up on others that do not answer, naming what it waited for."""

    def __post_init__(self) -> None:
        _check_choice("runtime", "precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        _check_range("runtime", "workers", self.workers, -1, 256)
        _check_range("runtime", "threads", self.threads, 0, 1024)
        _check_choice("runtime", "tracker", self.tracker, ("none", "mlflow", "tensorboard"))
        _check_range("runtime", "collective_timeout_s", self.collective_timeout_s, 1)


@dataclass
class Config:
    """The whole configuration: one section a stage."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    multimodal: MultimodalConfig = field(default_factory=MultimodalConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        if self.training.unfreeze_schedule and not self.model.freeze_backbone:
            raise ConfigError(
                "training.unfreeze_schedule: there is nothing to unfreeze while model.freeze_backbone is false; "
                "set model.freeze_backbone=true or drop the schedule"
            )
        if self.training.progressive_resizing > self.data.image_size:
            raise ConfigError(
                f"training.progressive_resizing: starts at {self.training.progressive_resizing} px, above "
                f"data.image_size={self.data.image_size}; start lower, or at 0 to switch it off"
            )
        self._check_head()
        self._check_findings()

    def _check_findings(self) -> None:
        """What speaks of one class a film means nothing where a film has several findings."""
        if not self.data.multilabel:
            return
        in_the_way = {
            "data.label_regex": self.data.label_regex is not None,
            "data.positive_class": self.data.positive_class is not None,
            "data.balance": self.data.balance in ("sampler", "sampler_and_loss"),
            "training.head_search": self.training.head_search,
            "training.head_start": self.training.head_start == "logistic",
            "evaluation.threshold": self.evaluation.threshold is not None,
            "evaluation.prevalence": self.evaluation.prevalence is not None,
        }
        for name, given in in_the_way.items():
            if given:
                raise ConfigError(f"{name}: is of one class a film; drop it, or data.task=multilabel")

    def _check_head(self) -> None:
        """A search and a logistic start work on the features of a backbone that stays frozen."""
        wanted = "training.head_search" if self.training.head_search else "training.head_start=logistic"
        if not self.training.head_search and self.training.head_start == "random":
            return
        if not self.model.freeze_backbone:
            raise ConfigError(f"{wanted}: needs a frozen backbone; add --freeze-backbone or drop it")
        if self.training.head_search:
            in_the_way = {
                "training.unfreeze_schedule": bool(self.training.unfreeze_schedule),
                "training.ema_decay": self.training.ema_decay > 0,
                "training.accumulation_steps": self.training.accumulation_steps > 1,
            }
            for name, given in in_the_way.items():
                if given:
                    raise ConfigError(f"{name}: cannot be had together with {wanted}; drop one of the two")
        elif self.model.hidden_features:
            raise ConfigError(f"{wanted}: starts a linear head; set model.hidden_features=0 as well")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dict, section → field → value."""
        return dataclasses.asdict(self)


Overrides = Mapping[str, Any]
"""Dotted field name ('training.num_epochs') → value."""


TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def _coerce(name: str, value: Any, annotation: Any) -> Any:
    """`value` as the field's type, or a ConfigError. YAML reads 1e-4 as text and 1 as int: both may be floats."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if union else (annotation,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    origin = typing.get_origin(wanted) or wanted
    try:
        if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    if name == "training.compile" and isinstance(value, bool):
        return "on" if value else "off"  # YAML reads the words on and off as booleans
    if origin is list and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if origin is list and isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    if origin is str and isinstance(value, (int, float, Path)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    shown = getattr(wanted, "__name__", str(wanted))
    raise ConfigError(f"{name}: {value!r} is not of type {shown}; give {TYPE_WORDS.get(wanted, 'a value that is')}")


@functools.cache
def field_types() -> Mapping[str, Any]:
    """Every dotted field name with its annotation, in the order of definition."""
    names = {}
    for section in dataclasses.fields(Config):
        section_class = typing.get_type_hints(Config)[section.name]
        for name, annotation in typing.get_type_hints(section_class).items():
            names[f"{section.name}.{name}"] = annotation
    return names


def flatten(nested: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """{'data': {'batch_size': 8}} → {'data.batch_size': 8}; unknown sections and keys are errors naming `source`."""
    known = field_types()
    sections = {name.split(".")[0] for name in known}
    flat: dict[str, Any] = {}
    for section, values in nested.items():
        if section not in sections:
            raise ConfigError(f"{source}: unknown section {section!r}{nearest(str(section), sections)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: section {section!r} must hold `field: value` lines, found {values!r}")
        for key, value in values.items():
            check_known(f"{section}.{key}", source=source)
            flat[f"{section}.{key}"] = value
    return flat


def check_known(name: str, *, source: str) -> None:
    """ConfigError with the nearest name when `name` is no dotted field."""
    known = field_types()
    if name not in known:
        leaf = name.rsplit(".", 1)[-1]
        by_leaf = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == leaf]
        hint = f"; did you mean {by_leaf[0]!r}?" if by_leaf else nearest(name, known)
        raise ConfigError(f"{source}: unknown setting {name!r}{hint or '; python main.py config lists them all'}")


def parse_assignment(text: str) -> tuple[str, Any]:
    """'training.num_epochs=5' → ('training.num_epochs', 5); the value is read as YAML."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r}: write it as section.field=value, for example training.num_epochs=5")
    check_known(name.strip(), source="--set")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: the value is not valid YAML; quote it") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The dotted overrides a YAML file holds."""
    import yaml

    try:
        nested = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; check the name, and the folder you are in") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot be read as a configuration file (it is no text)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file ({error.strerror})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "syntax error"
        raise ConfigError(f"{path}{where}: not valid YAML: {problem}") from None
    if nested is None:
        return {}
    if not isinstance(nested, Mapping):
        raise ConfigError(f"{path}: must hold sections such as `training:`, found {type(nested).__name__}")
    return flatten(nested, source=str(path))


def resolve(*layers: Overrides) -> Config:
    """Defaults overlaid by each layer in turn (YAML, then flags); the one place where precedence is decided."""
    annotations = field_types()
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for name, value in layer.items():
            check_known(name, source="configuration")
            section, key = name.split(".")
            merged.setdefault(section, {})[key] = _coerce(name, value, annotations[name])
    sections = typing.get_type_hints(Config)
    return Config(**{section: sections[section](**values) for section, values in merged.items()})


def load_config_from_yaml(path: str | Path) -> Config:
    """The configuration a YAML file describes, over the defaults."""
    return resolve(read_yaml(path))


BEFORE_THEY_WERE: Overrides = {"data.gamma": 0.0}
"""Settings whose default would change what a run stored without them does."""


def config_from_dict(nested: Mapping[str, Any], *, source: str) -> Config:
    """The configuration a checkpoint or run folder stored; settings newer than it have values that change nothing."""
    return resolve(BEFORE_THEY_WERE, flatten(nested, source=source))


def located(config: Config, source: str | Path) -> Config:
    """`config`, stored in the checkpoint or bundle `source`, with data paths found from another working folder too.

    A relative path that is not here is taken from the nearest folder above `source` that has it: run folders mostly
    lie in the project whose films they were trained on.
    """
    found: dict[str, Any] = {}
    for name in ("data_dir", "manifest", "exclude"):
        stored = getattr(config.data, name)
        if stored is None or _is_there(Path(stored)):
            continue
        above = (folder / stored for folder in Path(source).resolve().parents)
        if there := next(filter(_is_there, above), None):
            found[name] = str(there)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **found))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # in a folder that may not be looked into
        return False


def to_yaml(config: Config) -> str:
    """The resolved configuration, ready for `--config`."""
    import yaml

    return yaml.safe_dump(config.to_dict(), sort_keys=False)


def differing_fields(a: Config, b: Config) -> list[str]:
    """Dotted names whose values differ, in the order of definition."""
    left, right = flatten(a.to_dict(), source="a"), flatten(b.to_dict(), source="b")
    return [name for name in left if left[name] != right[name]]
