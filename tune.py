"""Search settings: Optuna proposes, training answers, what is clearly worse than the median is broken off.

    python main.py tune --model resnet50 --epochs 10 --trials 40 --search training.learning_rate=1e-4..1e-2:log
    python main.py tune --storage postgresql://user@host/optuna --study chest --trials 200      # on several machines

Any field of the configuration may be searched. The study lies in its storage: the same command goes on with it, and
several at once share it. Chooses on validation alone; test is never looked at. Writes tune.json, best.yaml (for
`train --config`), trials.csv, tuning.png and a run folder for each trial, with weights for the best one only.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import TrialState

import checkpoint
import plots
import train
from config import Config, Overrides, check_known, differing_fields, field_types, flatten, resolve, to_yaml
from errors import ConfigError, UserError, first_line
from runtime import log, require_writable, write_json, write_text

DEFAULT_SEARCH = (
    "training.learning_rate=1e-4..1e-2:log",
    "training.backbone_lr=1e-5..1e-3:log",
    "training.weight_decay=1e-4..1e-1:log",
    "model.dropout_rate=0..0.6",
    "data.augmentation_prob=0..1",
)
"""What is searched when nothing is named."""
HEARTBEAT_S = 60
"""A trial whose process has been silent for three of these is another's to make."""
SETTLED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
"""Trials that count: a failed one is made again."""


@dataclass(frozen=True)
class Dimension:
    """One field that is searched: between `low` and `high`, or among `choices`."""

    field: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: optuna.Trial) -> Any:
        """A value for `trial`."""
        if self.choices:
            return trial.suggest_categorical(self.field, self.choices)
        if _is_integer(self.field):
            return trial.suggest_int(self.field, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.field, self.low, self.high, log=self.log)


def parse_dimension(text: str) -> Dimension:
    """'training.learning_rate=1e-4..1e-2:log', 'data.batch_size=8|16|32' or 'model.dropout_rate=0..0.5'."""
    import yaml

    name, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise ConfigError(
            f"--search {text!r}: write section.field=LOW..HIGH, LOW..HIGH:log or A|B|C, for example {DEFAULT_SEARCH[0]}"
        )
    check_known(name, source="--search")
    if ".." not in values:
        choices = tuple(yaml.safe_load(value) for value in values.split("|"))
        if len(choices) < 2 or not all(isinstance(item, (str, int, float, bool, type(None))) for item in choices):
            raise ConfigError(f"--search {text!r}: give two or more plain values as A|B|C, or a range LOW..HIGH")
        return Dimension(name, choices=choices)
    return _range(name, values, text)


def _range(name: str, values: str, text: str) -> Dimension:
    ends, logarithmic = values.removesuffix(":log"), values.endswith(":log")
    try:
        low, high = (float(end) for end in ends.split(".."))
    except ValueError:
        raise ConfigError(f"--search {text!r}: {values!r} is not LOW..HIGH with two numbers") from None
    if not (_is_integer(name) or _kind(name) is float):
        raise ConfigError(f"--search {text!r}: {name} holds no number; give its values as A|B|C")
    if not low < high or (logarithmic and low <= 0):
        raise ConfigError(f"--search {text!r}: LOW must be below HIGH, and above 0 on a logarithmic scale")
    if _is_integer(name) and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"--search {text!r}: {name} is a whole number; so must be its bounds")
    return Dimension(name, low, high, logarithmic)


def _kind(name: str) -> Any:
    annotation = field_types()[name]
    options = [item for item in typing.get_args(annotation) or (annotation,) if item is not type(None)]
    return options[0]


def _is_integer(name: str) -> bool:
    return _kind(name) is int


def tune(
    overrides: Sequence[Overrides],
    *,
    search: Sequence[str] = (),
    trials: int,
    output_dir: Path,
    storage: str | None = None,
    study_name: str = "study",
) -> dict[str, Any]:
    """Make trials until the study has `trials` of them; the content of tune.json.

    `overrides` are the settings that all trials share. UserError kinds for the user's mistakes.
    """
    if trials < 1:
        raise ConfigError(f"--trials {trials}: make at least one trial")
    dimensions = [parse_dimension(text) for text in search or DEFAULT_SEARCH]
    base = resolve(*overrides)
    _check_bounds(base, dimensions)
    train.manifest_of(base)  # a mistake ends it before a study stands that was made with the mistake
    require_writable(output_dir)
    url = storage or f"sqlite:///{output_dir.resolve() / 'study.db'}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _open_study(url, study_name, base, dimensions)

    def objective(trial: optuna.Trial) -> float:
        if len([item for item in _settled(study) if item.number < trial.number]) >= trials:
            raise _Surplus
        return _objective(trial, base, dimensions, output_dir)

    while len(_settled(study)) < trials:
        study.optimize(objective, n_trials=1, catch=(_Surplus,))
        _keep_best_weights(study, output_dir)
    return _report(study, base, dimensions, output_dir)


class _Surplus(Exception):
    """Two workers have begun the last trial at one moment; this is the second one."""


def _check_bounds(base: Config, dimensions: Sequence[Dimension]) -> None:
    """ConfigError for a field named twice, and for a bound or choice that the configuration refuses."""
    names = [item.field for item in dimensions]
    if repeated := sorted(name for name in set(names) if names.count(name) > 1):
        raise ConfigError(f"--search: {repeated[0]} is named twice; give it one range")
    for item in dimensions:
        for value in item.choices or (item.low, item.high):
            resolve(_flat(base), {item.field: value})


def _flat(config: Config) -> dict[str, Any]:
    return flatten(config.to_dict(), source="configuration")


# --- the study -------------------------------------------------------------------------------------------------


def _open_study(url: str, name: str, base: Config, dimensions: Sequence[Dimension]) -> optuna.Study:
    """The study `name` in its storage, made on first use; ConfigError when it searches or trains something else."""
    directions = optuna.study.StudyDirection
    direction = directions.MAXIMIZE if base.training.monitor_mode == "max" else directions.MINIMIZE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats are
            stored = optuna.storages.RDBStorage(url, heartbeat_interval=HEARTBEAT_S, grace_period=3 * HEARTBEAT_S)
        study = optuna.create_study(
            storage=stored,
            study_name=name,
            direction=direction,
            load_if_exists=True,
            pruner=below_median(),
        )
    except Exception as error:  # SQLAlchemy's, each driver's and a missing driver's errors share no base
        raise ConfigError(
            f"--storage {_without_password(url)}: cannot be opened ({first_line(error)}); name another URL"
        ) from None
    asked: dict[str, Any] = {"search": [repr(item) for item in dimensions], "settings": _settings(base)}
    known = study.user_attrs
    if "settings" not in known:
        for key, value in asked.items():
            study.set_user_attr(key, value)
    elif known["search"] != asked["search"]:
        fields = ", ".join(re.findall("field='([^']+)'", " ".join(known["search"])))
        raise ConfigError(
            f"study {name!r} searches {fields}, or other values of them; ask for the same, or name another with --study"
        )
    elif changed := differing_fields(resolve(known["settings"]), resolve(asked["settings"])):
        raise ConfigError(
            f"study {name!r} was made with another {', '.join(changed)}; ask for the same, or name another with --study"
        )
    return study


def below_median() -> optuna.pruners.BasePruner:
    """Breaks trials off that are below the median of those before, once there are five, from the second epoch on."""
    return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)


def _without_password(url: str) -> str:
    return re.sub(r"(//[^/:@]*):[^@]*@", r"\1:***@", url)


def _settings(base: Config) -> dict[str, Any]:
    """What makes trials comparable; machines may differ in the rest."""
    elsewhere = ("runtime.", "serving.", "data.data_dir", "data.manifest", "data.cache_dir", "data.pixel_cache")
    return {name: value for name, value in _flat(base).items() if not name.startswith(elsewhere)}


def _settled(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=SETTLED)


def _objective(trial: optuna.Trial, base: Config, dimensions: Sequence[Dimension], folder: Path) -> float:
    """Train with the proposed settings; the best validation figure."""
    # By its number, so that workers that start together do not propose the same and a study can be repeated.
    trial.study.sampler = optuna.samplers.TPESampler(seed=_seed(base, trial.number), constant_liar=True)
    proposed = {item.field: item.suggest(trial) for item in dimensions}
    cheap = {"training.input_gate": False, "training.keep_checkpoints": 1}
    own = {"runtime.output_dir": str(_folder(folder, trial.number)), **cheap}
    config = resolve(_flat(base), own, proposed)
    log.info("trial %d: %s", trial.number, ", ".join(f"{name} {_short(value)}" for name, value in proposed.items()))
    try:
        result = train.train(config, on_epoch=_judge(trial, base.training.monitor))
    except UserError as error:
        if type(error) is not UserError:  # a mistake in the settings or the data, which every trial would meet
            raise
        log.info("trial %d: %s", trial.number, error)
        raise optuna.TrialPruned(str(error)) from None
    return result.best_score


def _judge(trial: optuna.Trial, monitor: str) -> Callable[[Mapping[str, float]], None]:
    def judge(row: Mapping[str, float]) -> None:
        value = row[f"val_{monitor}"]
        if np.isfinite(value):
            trial.report(value, int(row["epoch"]))
            if trial.should_prune():
                raise optuna.TrialPruned(f"below the median in epoch {int(row['epoch'])}")

    return judge


def _seed(base: Config, number: int) -> int:
    digest = hashlib.blake2b(f"{base.training.seed}|{number}".encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "big")


def _folder(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04d}"


def _keep_best_weights(study: optuna.Study, folder: Path) -> None:
    """Delete the weights of finished trials but the best one's."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    best = _best(study)
    for trial in finished:
        run = _folder(folder, trial.number)
        shutil.rmtree(run / "archive", ignore_errors=True)
        for path in run.glob("checkpoint_*.pth"):
            path.unlink()
        if best is None or trial.number != best.number:
            (run / checkpoint.BEST).unlink(missing_ok=True)


def _best(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    return study.best_trial if _complete(study) else None


def _complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


# --- the report ------------------------------------------------------------------------------------------------


def _report(study: optuna.Study, base: Config, dimensions: Sequence[Dimension], folder: Path) -> dict[str, Any]:
    best = _best(study)
    if best is None:
        raise UserError(f"none of the {len(study.trials)} trials came to an end; search a narrower, gentler range")
    config = resolve(_flat(base), best.params)
    write_text(folder / "best.yaml", to_yaml(config))
    write_text(folder / "trials.csv", _table(study, dimensions).to_csv(index=False))
    importances = _importances(study)
    plots.tuning(
        [(item.number, float(item.value or 0)) for item in _complete(study)],
        importances,
        folder / "tuning.png",
        monitor=base.training.monitor,
        maximize=base.training.monitor_mode == "max",
    )
    states = {state: len(study.get_trials(deepcopy=False, states=(state,))) for state in TrialState}
    result = {
        "study": study.study_name,
        "monitor": base.training.monitor,
        "best_value": best.value,
        "best_trial": best.number,
        "best_settings": best.params,
        "trials": {state.name.lower(): count for state, count in states.items()},
        "importances": importances,
        "best_yaml": str(folder / "best.yaml"),
    }
    write_json(folder / "tune.json", result)
    return result


def _table(study: optuna.Study, dimensions: Sequence[Dimension]) -> pd.DataFrame:
    rows = [
        {
            "trial": item.number,
            "state": item.state.name.lower(),
            "value": item.value,
            "epochs": max(item.intermediate_values, default=0),
            "seconds": item.duration.total_seconds() if item.duration else None,
            **{dimension.field: item.params.get(dimension.field) for dimension in dimensions},
        }
        for item in study.get_trials(deepcopy=False)
    ]
    return pd.DataFrame(rows)


def _importances(study: optuna.Study) -> dict[str, float]:
    """Share of the figure's variance that each field explains (fANOVA, Hutter 2014); empty with too few trials."""
    complete = _complete(study)
    if len(complete) < 4 or len({item.value for item in complete}) < 2:
        return {}
    return {name: float(value) for name, value in optuna.importance.get_param_importances(study).items()}


def summary(result: Mapping[str, Any]) -> str:
    """The best trial in words."""
    found = ", ".join(f"{name}={_short(value)}" for name, value in result["best_settings"].items())
    counts = ", ".join(f"{count} {name}" for name, count in result["trials"].items() if count)
    return (
        f"{counts}; best is trial {result['best_trial']}: validation {result['monitor']} {result['best_value']:.4f}\n"
        f"{found}\nnext: python main.py train --config {result['best_yaml']}"
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
