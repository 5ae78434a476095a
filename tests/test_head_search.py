"""head_search.py: many heads trained at once equal each trained alone; the best is an ordinary checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import head_search as hs
import predictor
import train
from config import Config, ModelConfig, TrainingConfig
from data_preprocessing import Batch, Request, class_weights
from errors import ConfigError
from models import create_model, make_head
from objective import warmup_cosine
from runtime import Interrupted
from tests.test_train import changed, weights

FROZEN = {"model__freeze_backbone": True, "training__use_amp": False}
SEARCH = {**FROZEN, "training__head_search": True, "training__num_epochs": 3}
CPU = torch.device("cpu")


class Features:
    """Cached features of two overlapping clouds, without a network behind them."""

    def __init__(self, films: int = 96, width: int = 12) -> None:
        rng = np.random.default_rng(0)
        self.array = rng.normal(size=(films + 40, width)).astype(np.float32)
        labels = (self.array[:, :3].sum(1) + rng.normal(size=len(self.array)) > 0).astype(np.int64)
        self.train_labels, self.val_labels = labels[:films], labels[films:]

    def train_batches(self, requests: list[Request]) -> Any:
        for request in requests:
            yield self._batch(request.positions, self.train_labels)

    def val_batches(self, requests: list[Request]) -> Any:
        for request in requests:
            yield self._batch(len(self.train_labels) + request.positions, self.val_labels, request.positions)

    def _batch(self, rows: Any, labels: Any, positions: Any = None) -> Batch:
        positions = rows if positions is None else positions
        return Batch(*(torch.from_numpy(item) for item in (self.array[rows], labels[positions], positions)))


def requests_of(epoch: int) -> list[Request]:
    order = np.random.default_rng(epoch).permutation(96)
    return [Request(epoch, part) for part in order.reshape(6, 16)]


def searched(candidates: list[hs.Candidate], *, stop: Any = None, **settings: Any) -> hs.Found:
    return hs.search(
        Features(),  # type: ignore[arg-type]
        candidates,
        settings=TrainingConfig(**{"num_epochs": 4, "gradient_clip": 0.1, "seed": 3, **settings}),
        n_classes=2,
        positive=1,
        weights_C=torch.tensor([0.8, 1.2]),
        requests_of=requests_of,
        device=CPU,
        precision="fp32",
        stop=stop,
    )


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize(("rate", "decay"), [(1e-2, 0.0), (3e-2, 0.5)])
def test_a_head_trained_among_others_equals_one_trained_alone_in_a_plain_loop(
    hidden: int, rate: float, decay: float
) -> None:
    candidates = [
        hs.Candidate(hidden, 0.0, 1e-3, 0.1),
        hs.Candidate(hidden, 0.0, rate, decay),
        hs.Candidate(3, 0.0, 1, 0),
    ]
    settings = TrainingConfig(num_epochs=4)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head = make_head(12, num_classes=2, dropout_rate=0.0, hidden_features=hidden)
    groups = [
        {"params": [item for item in head.parameters() if item.ndim > 1], "weight_decay": decay},
        {"params": [item for item in head.parameters() if item.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer, features = torch.optim.AdamW(groups, lr=rate), Features()
    losses = []
    for step in range(24):
        (batch,) = features.train_batches([requests_of(1 + step // 6)[step % 6]])
        loss = F.cross_entropy(head(batch.inputs), F.one_hot(batch.labels_B).float(), weight=torch.tensor([0.8, 1.2]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup_cosine(
                step=step, warmup_steps=round(settings.warmup_fraction * 24), total_steps=24
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    alone = [np.mean(losses[start : start + 6]) for start in range(0, 24, 6)]
    only = searched(candidates[1:2])
    assert [item["train_loss"] for item in only.progress.history] == pytest.approx(alone, rel=1e-4)
    among = searched(candidates)
    assert among.table[1]["val_loss"] == pytest.approx(only.table[0]["val_loss"], rel=1e-4)


def test_the_same_seed_finds_the_same_and_leaves_torchs_own_stream_alone() -> None:
    candidates = hs.grid(ModelConfig(hidden_features=8), TrainingConfig())
    before = torch.get_rng_state()
    a, b = searched(candidates), searched(candidates)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.candidate == b.candidate
    assert all(torch.equal(a.head[name], b.head[name]) for name in a.head)
    pd.testing.assert_frame_equal(pd.DataFrame(a.table), pd.DataFrame(b.table), check_exact=True)


@pytest.mark.parametrize(("monitor", "mode", "best"), [("auc_roc", "max", max), ("loss", "min", min)])
def test_the_chosen_head_is_the_best_of_the_table(monitor: str, mode: str, best: Any) -> None:
    found = searched(hs.grid(ModelConfig(hidden_features=8), TrainingConfig()), monitor=monitor, monitor_mode=mode)
    table = pd.DataFrame(found.table)
    assert table["chosen"].sum() == 1
    assert table.loc[table["chosen"], f"val_{monitor}"].item() == best(table[f"val_{monitor}"])
    assert found.progress.best_score == best(row[f"val_{monitor}"] for row in found.progress.history)


def test_a_head_that_diverges_costs_the_others_nothing() -> None:
    sane = hs.Candidate(0, 0.0, 1e-2, 0.0)
    mad = hs.Candidate(0, 0.0, 1e300, 0.0)
    alone, beside = searched([sane]), searched([mad, sane])
    assert beside.candidate == sane
    assert all(torch.allclose(alone.head[name], beside.head[name], rtol=1e-4, atol=1e-6) for name in alone.head)


@pytest.mark.parametrize("hidden", [512, 4, 0])
def test_the_grid_holds_the_configured_head_a_narrower_and_a_linear_one(hidden: int) -> None:
    candidates = hs.grid(ModelConfig(hidden_features=hidden, dropout_rate=0.3), TrainingConfig())
    assert len(set(candidates)) == len(candidates) >= 18
    assert candidates[0].hidden_features == hidden
    assert hs.Candidate(hidden, 0.3, 1e-3, 0.01) in candidates
    assert len({item.hidden_features for item in candidates}) >= 3 and any(not c.hidden_features for c in candidates)


def test_a_search_ends_early_when_no_head_gets_better() -> None:
    found = searched([hs.Candidate(0, 0.0, 0.0, 0.0)], num_epochs=50, early_stopping_patience=2)
    assert found.epochs == 3 and found.progress.best_epoch == 1


def test_a_signal_ends_the_search() -> None:
    with pytest.raises(Interrupted, match="stopped during the head search"):
        searched([hs.Candidate(0, 0.0, 1e-2, 0.0)], stop=SimpleNamespace(signal=signal.SIGTERM))


# --- the logistic start ---


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_logistic_start_agrees_with_scikit_learn(n_classes: int, weighted: bool) -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    features = (rng.normal(size=(300, 6)) * [1, 2, 3, 0.1, 1, 5] + 2).astype(np.float32)
    labels = rng.integers(0, n_classes, 300)
    features[:, 1] += labels
    weights = np.linspace(0.5, 1.5, n_classes) if weighted else None
    weight, bias = hs.logistic_regression(features, labels, n_classes=n_classes, class_weights=weights)
    standardised = (features - features.mean(0)) / features.std(0)
    film_weights = None if weights is None else weights[labels]
    # Two classes have two rows here and one there: half the penalty for the same difference.
    theirs = LogisticRegression(C=2.0 if n_classes == 2 else 1.0, tol=1e-8, max_iter=2000)
    theirs.fit(standardised, labels, sample_weight=film_weights)
    ours = torch.from_numpy(features @ weight.T + bias).softmax(1).numpy()
    assert np.allclose(ours, theirs.predict_proba(standardised), atol=2e-3)


def test_a_run_with_a_logistic_start_begins_where_the_regression_ended(tiny: Config, tmp_path: Path) -> None:
    settings = {**FROZEN, "model__hidden_features": 0, "training__num_epochs": 1, "training__learning_rate": 1e-9}
    # With a rate near zero the head stays where it started.
    train.train(changed(tiny, training__head_start="logistic", **settings))
    head = weights(Path(tiny.runtime.output_dir))
    config = changed(tiny, **settings)
    made = train.prepare(config)
    from feature_cache import open_features

    features, _ = open_features(
        made.model, made.spec, made.train_set, made.val_set, views=4,
        folder=Path(config.data.cache_dir or tmp_path), device=CPU, precision="fp32",
    )  # fmt: skip
    weights_C = class_weights(made.train_set.labels, 2)
    (batch,) = features.train_batches([Request(1, np.arange(len(made.train_set)))])
    weight, _ = hs.logistic_regression(
        batch.inputs.numpy(), made.train_set.labels, n_classes=2, class_weights=weights_C
    )
    assert np.allclose(head["head.1.weight"], weight, rtol=0.05, atol=0.05 * np.abs(weight).max())


# --- a run ---


def test_a_searched_run_ends_in_an_ordinary_checkpoint_that_predicts_what_was_scored(
    tiny: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(tiny, **SEARCH)
    with caplog.at_level("INFO", logger="medimg"):
        result = train.train(config)
    folder = Path(config.runtime.output_dir)
    table = pd.read_csv(folder / "head_search.csv")
    chosen = table[table["chosen"]].iloc[0]
    assert f"head search: of {len(table)} heads the best is" in caplog.text
    assert result.best_score == pytest.approx(chosen["val_auc_roc"]) and result.best_epoch == chosen["best_epoch"]
    stored = predictor.load(folder / "best_model.pth", device="cpu", precision="fp32")
    assert stored.config.model.hidden_features == chosen["hidden_features"]
    assert stored.config.training.learning_rate == pytest.approx(chosen["learning_rate"])
    made = train.prepare(config)
    logits = stored.engine.logits(made.val_set[Request(0, np.arange(len(made.val_set)))].inputs.numpy())
    figures = train.validation_figures(logits, made.val_set.labels, positive=1)
    assert figures["auc_roc"] == pytest.approx(result.best_score, abs=1e-6)
    assert list(pd.read_csv(folder / "history.csv")["epoch"]) == [1, 2, 3]
    assert (folder / "training_curves.png").exists() and not (folder / "checkpoint_epoch_1.pth").exists()


def test_a_searched_run_is_the_same_twice_and_a_resumed_one_has_nothing_left_to_do(
    tiny: Config, tmp_path: Path
) -> None:
    for name in "ab":
        train.train(changed(tiny, **SEARCH, runtime__output_dir=str(tmp_path / name)))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    path, config = train.resume_config(tmp_path / "a")
    again = train.train(config, resume=path)
    assert again.epochs == 3
    assert all(torch.equal(a[name], item) for name, item in weights(tmp_path / "a").items())
    path, config = train.resume_config(tmp_path / "b", {"training.num_epochs": 4})
    assert train.train(config, resume=path).epochs == 4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"training__feature_cache": False}, "head_search: works on cached features.*training.feature_cache is off"),
        ({"training__mixup_alpha": 0.2}, "none here: MixUp and CutMix mix films"),
        ({"training__progressive_resizing": 16}, "progressive resizing changes the films"),
    ],
)
def test_a_search_without_a_cache_is_refused_with_the_reason(
    tiny: Config, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        train.train(changed(tiny, **SEARCH, **settings))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model__freeze_backbone": False}, "head_search: needs a frozen backbone; add --freeze-backbone"),
        ({"training__unfreeze_schedule": {2: 1}}, "unfreeze_schedule: cannot be had together with training.head_sea"),
        ({"training__ema_decay": 0.9}, "ema_decay: cannot be had together"),
        ({"training__head_search": False, "training__head_start": "logistic"}, "set model.hidden_features=0 as well"),
    ],
)
def test_settings_that_contradict_a_search_are_refused(tiny: Config, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        changed(tiny, **{**SEARCH, **settings})


def test_no_hidden_features_is_a_linear_head() -> None:
    model = create_model("test_resnet", 3, False, hidden_features=0).eval()
    assert set(model.head.state_dict()) == {"1.weight", "1.bias"}
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
