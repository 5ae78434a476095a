"""tune.py: what can be searched, that a study is resumed and shared, and that its best settings are those it writes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest

import main
import plots
import train
import tune
from config import Overrides, load_config_from_yaml, resolve
from errors import ConfigError, DataError, UserError
from process_group import Group
from tests import processes
from tests.conftest import TINY
from tune import Dimension, parse_dimension

SEARCH = ["training.learning_rate=1e-4..1e-1:log", "model.hidden_features=0|16", "data.rotation_degrees=0..30"]
SMALL = [parse_dimension(SEARCH[0])]


@pytest.fixture
def shared(films: Path) -> list[Overrides]:
    """Settings of trials that take about a second."""
    return [{**TINY, "data.data_dir": str(films), "training.num_epochs": 2, "runtime.precision": "fp32"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.learning_rate=1e-4..1e-2:log", Dimension("training.learning_rate", 1e-4, 1e-2, True)),
        ("model.dropout_rate=0..0.5", Dimension("model.dropout_rate", 0.0, 0.5)),
        ("training.cached_views=1..8", Dimension("training.cached_views", 1, 8)),
        ("data.batch_size=8|16|32", Dimension("data.batch_size", choices=(8, 16, 32))),
        ("data.resize=squash|pad", Dimension("data.resize", choices=("squash", "pad"))),
        ("model.freeze_backbone=true|false", Dimension("model.freeze_backbone", choices=(True, False))),
        ("data.positive_class=null|A", Dimension("data.positive_class", choices=(None, "A"))),
    ],
)
def test_a_field_is_searched_in_a_range_or_among_choices(text: str, expected: Dimension) -> None:
    assert parse_dimension(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.learning_rate", "write section.field=LOW..HIGH"),
        ("training.learnin_rate=1..2", "did you mean 'training.learning_rate'"),
        ("training.learning_rate=1..x", "'1..x' is not LOW..HIGH with two numbers"),
        ("training.learning_rate=1..2..3", "is not LOW..HIGH with two numbers"),
        ("training.learning_rate=2..1", "LOW must be below HIGH"),
        ("training.learning_rate=0..1:log", "above 0 on a logarithmic scale"),
        ("data.resize=1..2", "data.resize holds no number"),
        ("data.batch_size=1.5..4", "is a whole number; so must be its bounds"),
        ("data.batch_size=8", "give two or more plain values"),
    ],
)
def test_a_search_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_dimension(text)


def test_bounds_are_checked_before_the_first_trial(shared: list[Overrides], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.dropout_rate: 1.5 is out of range"):
        tune.tune(shared, search=["model.dropout_rate=0..1.5"], trials=1, output_dir=tmp_path)
    with pytest.raises(ConfigError, match="model.dropout_rate is named twice"):
        tune.tune(shared, search=["model.dropout_rate=0..0.5"] * 2, trials=1, output_dir=tmp_path)
    with pytest.raises(ConfigError, match="--trials 0: make at least one"):
        tune.tune(shared, trials=0, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def studied(films: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study of four trials, two at first. Not to be changed."""
    folder = tmp_path_factory.mktemp("tuned")
    settings = [{**TINY, "data.data_dir": str(films), "runtime.precision": "fp32"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "pixel_cache"))
        first = tune.tune(settings, search=SEARCH, trials=2, output_dir=folder)
        assert sum(first["trials"].values()) == 2
        return folder, tune.tune(settings, search=SEARCH, trials=4, output_dir=folder)


def test_a_study_goes_on_until_it_has_its_trials(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    table = pd.read_csv(folder / "trials.csv")
    assert list(table["trial"]) == [0, 1, 2, 3] and set(table["state"]) <= {"complete", "pruned"}
    assert result["best_value"] == table["value"].max()
    assert json.loads((folder / "tune.json").read_text()) == json.loads(json.dumps(result))
    assert (folder / "tuning.png").stat().st_size > 5000


def test_the_best_settings_are_those_of_the_best_trial_and_train_takes_them(
    studied: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, result = studied
    best = load_config_from_yaml(folder / "best.yaml")
    ran = load_config_from_yaml(folder / "trials" / f"{result['best_trial']:04d}" / "config.yaml")
    for name in ("learning_rate", "num_epochs", "seed"):
        assert getattr(best.training, name) == getattr(ran.training, name)
    assert best.training.learning_rate == result["best_settings"]["training.learning_rate"]
    assert best.training.input_gate and best.training.keep_checkpoints == 3  # the trials' thrift is not the recipe's
    again = main.main(
        ["train", "--quiet", "--config", str(folder / "best.yaml"), "--output-dir", str(tmp_path / "run")]
    )
    assert again == 0
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert history["val_auc_roc"].max() == result["best_value"]


def test_only_the_best_trial_keeps_weights(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    kept = [path.relative_to(folder / "trials") for path in (folder / "trials").rglob("*.pth")]
    assert kept == [Path(f"{result['best_trial']:04d}") / "best_model.pth"]


def test_another_search_or_recipe_in_the_same_study_is_refused(
    studied: tuple[Path, dict[str, Any]], films: Path
) -> None:
    folder, _ = studied
    settings: Overrides = {**TINY, "data.data_dir": str(films), "runtime.precision": "fp32"}
    with pytest.raises(ConfigError, match="searches .*learning_rate.*name another with --study"):
        tune.tune([settings], search=SEARCH[:1], trials=4, output_dir=folder)
    with pytest.raises(ConfigError, match="made with another training.num_epochs; ask for the same"):
        tune.tune([{**settings, "training.num_epochs": 3}], search=SEARCH, trials=4, output_dir=folder)


def test_the_same_seed_proposes_the_same_trials(shared: list[Overrides], tmp_path: Path) -> None:
    for name in ("a", "b"):
        tune.tune(shared, search=SEARCH[:1], trials=2, output_dir=tmp_path / name)
    tables = [pd.read_csv(tmp_path / name / "trials.csv").drop(columns="seconds") for name in ("a", "b")]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["training.learning_rate"].nunique() == 2


def worked(group: Group, settings: list[Overrides], folder: Path) -> list[int]:
    """The trials that one of several workers has made."""
    made: list[int] = []
    real = tune._objective

    def counted(trial: optuna.Trial, *rest: Any) -> float:
        made.append(trial.number)
        return real(trial, *rest)

    tune._objective = counted
    tune.tune(settings, search=SEARCH[:1], trials=5, output_dir=folder)
    return made


def test_two_workers_share_a_study_and_make_no_trial_twice(shared: list[Overrides], tmp_path: Path) -> None:
    tune.tune(shared, search=SEARCH[:1], trials=1, output_dir=tmp_path)
    first, second = processes.run(2, worked, shared, tmp_path)
    assert first and second and len({*first, *second}) == len(first) + len(second) == 4
    table = pd.read_csv(tmp_path / "trials.csv")
    done = table[table["state"].isin(["complete", "pruned"])]
    assert len(done) == 5 and done["training.learning_rate"].nunique() == 5


def test_of_two_workers_that_begin_the_last_trial_one_gives_way(
    shared: list[Overrides], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tune._open_study(f"sqlite:///{tmp_path / 'study.db'}", "study", resolve(*shared), SMALL)
    optuna.load_study(
        study_name="study", storage=f"sqlite:///{tmp_path / 'study.db'}"
    ).ask()  # under way in another worker, and not seen by the count that comes first
    seen = iter([[], study.trials, study.trials, study.trials])
    monkeypatch.setattr(tune, "_settled", lambda study: next(seen))
    monkeypatch.setattr(tune, "_objective", lambda *_: pytest.fail("made the trial again"))
    with pytest.raises(UserError, match="none of the 2 trials"):
        tune.tune(shared, search=SEARCH[:1], trials=1, output_dir=tmp_path)
    assert [item.state.name for item in study.trials] == ["RUNNING", "FAIL"]


def test_a_trial_clearly_below_the_median_is_broken_off() -> None:
    study = optuna.create_study(direction="maximize", pruner=tune.below_median())
    for value in (0.9, 0.91, 0.92, 0.93, 0.94):
        trial = study.ask()
        judge = tune._judge(trial, "auc_roc")
        for epoch in (1, 2, 3):
            judge({"epoch": epoch, "val_auc_roc": value})
        study.tell(trial, value)
    poor = tune._judge(study.ask(), "auc_roc")
    poor({"epoch": 1, "val_auc_roc": 0.5})  # the first epoch says too little
    with pytest.raises(optuna.TrialPruned, match="below the median in epoch 2"):
        poor({"epoch": 2, "val_auc_roc": 0.5})


def test_a_trial_that_diverges_is_set_aside_and_a_mistake_ends_the_study(
    shared: list[Overrides], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [{**shared[0], "data.data_dir": str(tmp_path / "nowhere")}]
    with pytest.raises(DataError, match="no such data folder"):
        tune.tune(wrong, search=SEARCH[:1], trials=2, output_dir=tmp_path / "a")
    loss = train.classification_loss
    monkeypatch.setattr(train, "classification_loss", lambda *a, **k: loss(*a, **k) * float("nan"))
    with pytest.raises(UserError, match="none of the 2 trials came to an end"):
        tune.tune(shared, search=SEARCH[:1], trials=2, output_dir=tmp_path / "b")


def test_a_storage_that_cannot_be_opened_is_named_without_its_password(shared: list[Overrides], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--storage nosuch://me:\*\*\*@host/db: cannot be opened"):
        tune.tune(shared, trials=1, output_dir=tmp_path, storage="nosuch://me:secret@host/db")


def test_the_figure_shows_the_best_so_far(tmp_path: Path) -> None:
    trials = [(0, 0.7), (2, 0.9), (3, 0.8)]
    for importances in ({}, {"training.learning_rate": 0.8, "model.dropout_rate": 0.2}):
        plots.tuning(trials, importances, tmp_path / "t.svg", monitor="loss", maximize=False)
        text = (tmp_path / "t.svg").read_text()
        assert text.count("<svg") == 1 and ("variance" in text or not importances)


def test_a_trial_runs_in_a_thread_too(shared: list[Overrides], tmp_path: Path) -> None:
    """Signals are watched in the main thread only; a notebook may tune elsewhere."""
    found: list[dict[str, Any]] = []
    work = threading.Thread(
        target=lambda: found.append(tune.tune(shared, search=SEARCH[:1], trials=1, output_dir=tmp_path))
    )
    work.start()
    work.join()
    assert found[0]["trials"]["complete"] == 1
