"""A run's settings, figures and files, also told to MLflow or TensorBoard; a tracker that fails never stops the run.

python main.py train --tracker mlflow                      # mlflow.db in the run folder
MLFLOW_TRACKING_URI=http://tracker:5000 python main.py train --tracker mlflow
python main.py train --tracker tensorboard                 # then: tensorboard --logdir checkpoints/tensorboard
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from checkpoint import BEST
from errors import ConfigError, first_line
from runtime import Interrupted, log

REGISTERED = "medical-image-classifier"
EXPERIMENT = "medical-image-classification"
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""No reports to its maker; and a server that is away is given up on in seconds, not in minutes."""
FILES = ("config.yaml", "history.csv", "training_curves.png", "environment.json")
LONGEST_PARAMETER = 500
"""Characters of a value that every MLflow store takes."""


class Backend(Protocol):
    """Where a run is told to."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """The configuration, flat: 'training.num_epochs' → 50."""

    def figures(self, values: Mapping[str, float], *, step: int) -> None:
        """What was measured after `step`."""

    def close(self, status: str, files: Sequence[Path], model: Path | None) -> None:
        """The end: FINISHED, KILLED or FAILED, the files to keep, and the model of a finished run."""


class Mlflow:
    """A run of MLflow; the model of a finished run is registered."""

    def __init__(self, folder: Path) -> None:
        for name, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        store = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", store)
        self.client = MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI", uri))
        known = self.client.get_experiment_by_name(EXPERIMENT)
        files = (folder / "mlflow_artifacts").resolve().as_uri() if uri == store else None
        experiment = known.experiment_id if known else self.client.create_experiment(EXPERIMENT, files)
        self.run = self.client.create_run(experiment, run_name=folder.name).info

    def settings(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.client.log_param(self.run.run_id, name, str(value)[:LONGEST_PARAMETER])

    def figures(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run.run_id, name, value, step=step)

    def close(self, status: str, files: Sequence[Path], model: Path | None) -> None:
        for path in files:
            self.client.log_artifact(self.run.run_id, str(path))
        if model is not None:
            self.client.log_artifact(self.run.run_id, str(model))
            if not self.client.search_registered_models(f"name='{REGISTERED}'"):
                self.client.create_registered_model(REGISTERED)
            self.client.create_model_version(REGISTERED, f"{self.run.artifact_uri}/{model.name}", self.run.run_id)
        self.client.set_terminated(self.run.run_id, status)


class TensorBoard:
    """Event files in folder/tensorboard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def settings(self, values: Mapping[str, Any]) -> None:
        table = "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {values[name]} |" for name in values)])
        self.writer.add_text("settings", table)

    def figures(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name.replace("_", "/", 1), value, step)

    def close(self, status: str, files: Sequence[Path], model: Path | None) -> None:
        self.writer.close()


BACKENDS: dict[str, Callable[[Path], Backend]] = {"mlflow": Mlflow, "tensorboard": TensorBoard}
PACKAGES = {"mlflow": "mlflow-skinny sqlalchemy alembic", "tensorboard": "tensorboard"}


class Tracker:
    """Tells a backend about a run; after its first failure it is silent."""

    def __init__(self, name: str, folder: Path) -> None:
        """ConfigError when the tracker is not installed."""
        self.name, self.backend = name, None
        if name == "none":
            return
        try:
            self.backend = self._quietly(BACKENDS[name], folder)
        except ImportError as error:
            raise ConfigError(
                f"--tracker {name}: {first_line(error)}; pip install {PACKAGES[name]}, or --tracker none"
            ) from None

    def settings(self, values: Mapping[str, Any]) -> None:
        """The configuration, flat."""
        if self.backend is not None:
            self._quietly(self.backend.settings, values)

    def figures(self, row: Mapping[str, Any], *, step: int) -> None:
        """One row of the history; what is not a finite number is left out."""
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
        if self.backend is not None:
            finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
            self._quietly(self.backend.figures, finite, step=step)

    def heard_by(self, further: Callable[[dict[str, float]], None] | None) -> Callable[[dict[str, float]], None]:
        """What tells a row of the history here, and then to `further`."""

        def tell(row: dict[str, float]) -> None:
            self.figures(row, step=int(row["epoch"]))
            if further is not None:
                further(row)

        return tell

    @contextlib.contextmanager
    def following(self, folder: Path) -> Iterator[None]:
        """Tell how the run in `folder` ends, with its files and, if it finished, its model."""
        files = [folder / name for name in FILES]
        try:
            yield
        except BaseException as error:
            self.close("KILLED" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "FAILED", files)
            raise
        self.close("FINISHED", files, folder / BEST)

    def close(self, status: str, files: Sequence[Path] = (), model: Path | None = None) -> None:
        """The end of the run: FINISHED, KILLED or FAILED."""
        if self.backend is not None:
            there = [path for path in files if path.exists()]
            self._quietly(self.backend.close, status, there, model)
        self.backend = None

    def _quietly(self, act: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # remarks of the tracker's libraries on each other
                return act(*arguments, **named)
        except ImportError:
            raise
        except Exception as error:  # a server that is away, a full disk, a protocol of another version
            log.warning("tracker %s failed (%s): the run goes on without it", self.name, first_line(error))
            self.backend = None
            return None
