"""tracking.py: what MLflow and TensorBoard are told, and a tracker that fails."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from config import Config
from errors import ConfigError
from runtime import Interrupted
from tracking import EXPERIMENT, REGISTERED, Tracker

ROWS = [{"epoch": 1, "train_loss": 0.5, "val_auc_roc": 0.8, "name": "text"}, {"epoch": 2, "train_loss": float("nan")}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "history.csv").write_text("epoch\n1\n", encoding="utf-8")
    (tmp_path / "best_model.pth").write_bytes(b"weights")
    return tmp_path


def told(tracker: Tracker, folder: Path, status: str = "FINISHED") -> None:
    tracker.settings({"training.num_epochs": 2, "data.classes": None, "long": "x" * 2000})
    for step, row in enumerate(ROWS, start=1):
        tracker.figures(row, step=step)
    tracker.close(status, [folder / "history.csv", folder / "absent.csv"], folder / "best_model.pth")


def test_mlflow_holds_settings_figures_files_and_the_registered_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    told(Tracker("mlflow", folder), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLAlchemy's, about MLflow
        client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}", f"sqlite:///{folder / 'mlflow.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
        (version,) = client.search_model_versions(f"name='{REGISTERED}'")
        losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert run.info.status == "FINISHED" and run.data.params["training.num_epochs"] == "2"
    assert run.data.metrics == {"epoch": 2.0, "train_loss": 0.5, "val_auc_roc": 0.8}
    assert [(item.step, item.value) for item in losses] == [(1, 0.5)]
    artefacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert sorted(item.name for item in artefacts.iterdir()) == ["best_model.pth", "history.csv"]
    assert version.run_id == run.info.run_id and version.source.endswith("/best_model.pth")
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled() and not capfd.readouterr().err


def test_tensorboard_holds_the_figures_by_step(folder: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    told(Tracker("tensorboard", folder), folder)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["epoch", "train/loss", "val/auc_roc"]
    assert [(item.step, item.value) for item in events.Scalars("epoch")] == [(1, 1.0), (2, 2.0)]
    assert events.Scalars("train/loss")[0].value == 0.5


def test_without_a_tracker_nothing_is_imported_or_written(folder: Path) -> None:
    before = set(folder.iterdir())
    told(Tracker("none", folder), folder)
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_with_its_install_line(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"mlflow": "mlflow", "tensorboard": "torch.utils.tensorboard"}[name], None)
    with pytest.raises(ConfigError, match=rf"--tracker {name}: .*; pip install .*{name}"):
        Tracker(name, folder)


def test_a_server_that_is_away_ends_the_tracker_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING):
        told(Tracker("mlflow", folder), folder)
    warned = [record.getMessage() for record in caplog.records if "tracker mlflow failed" in record.getMessage()]
    assert len(warned) == 1 and "the run goes on without it" in warned[0]


def test_a_tracker_that_fails_later_is_told_nothing_more(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        calls = 0

        def settings(self, values: Any) -> None:
            pass

        def figures(self, values: Any, *, step: int) -> None:
            Failing.calls += 1
            raise OSError("disk full")

        def close(self, *_: Any) -> None:
            raise AssertionError("told after its failure")

    tracker = Tracker("none", folder)
    tracker.name, tracker.backend = "failing", Failing()
    with caplog.at_level(logging.WARNING):
        told(tracker, folder)
    assert Failing.calls == 1 and "tracker failing failed (disk full)" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (Interrupted(15, "stopped"), "KILLED"), (ValueError("fault"), "FAILED")]
)
def test_the_end_of_a_run_is_told_as_it_was(
    folder: Path, error: Exception | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[str, bool]] = []
    tracker = Tracker("none", folder)
    monkeypatch.setattr(tracker, "close", lambda status, files, model=None: ends.append((status, model is not None)))
    with contextlib.suppress(Interrupted, ValueError), tracker.following(folder):
        if error is not None:
            raise error
    assert ends == [(status, status == "FINISHED")]


def test_training_tells_its_epochs_settings_and_end(tiny: Config) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train.train(replace(tiny, runtime=replace(tiny.runtime, tracker="tensorboard")))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(tiny.runtime.output_dir) / "tensorboard")).Reload()
    assert [item.step for item in events.Scalars("val/auc_roc")] == [1, 2]
    (settings,) = events.Tensors("settings/text_summary")
    assert b"| training.num_epochs | 2 |" in settings.tensor_proto.string_val[0]
