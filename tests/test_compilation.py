"""compilation.py: compiled only where it pays; what is trained and saved is the same network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import compilation
import train
from compilation import Timing
from config import Config, parse_assignment, resolve
from errors import ConfigError
from models import create_model
from tests.test_train import changed, weights

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("timing", "steps", "pays"),
    [
        (Timing(eager=1.0, compiled=0.5, compiling=100), 1000, True),
        (Timing(eager=1.0, compiled=0.5, compiling=100), 199, False),
        (Timing(eager=1.0, compiled=0.95, compiling=1), 10**6, False),
        (Timing(eager=1.0, compiled=2.0, compiling=0), 10**6, False),
    ],
)
def test_compiling_pays_when_the_steps_to_come_win_back_its_time(timing: Timing, steps: int, pays: bool) -> None:
    assert timing.pays(steps) is pays


def decided(monkeypatch: pytest.MonkeyPatch, timing: Timing, wanted: str) -> bool:
    model = create_model("test_resnet", 2, False, hidden_features=4)
    monkeypatch.setattr(compilation, "_probe", lambda *a, **k: timing)
    found = compilation.compiled_network(
        model, torch.zeros(2, 3, 32, 32), torch.sum, wanted=wanted, steps=100, device=CPU, precision="fp32"
    )
    return found is not model


@pytest.mark.parametrize(("fast", "wanted", "used"), [(0.1, "auto", True), (0.99, "auto", False), (0.99, "on", True)])
def test_auto_follows_the_probe_and_on_does_not(
    monkeypatch: pytest.MonkeyPatch, fast: float, wanted: str, used: bool
) -> None:
    assert decided(monkeypatch, Timing(1.0, fast, 10.0), wanted) is used


def test_where_compiling_fails_training_goes_on_and_says_so(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no C++ compiler found\nsecond line")

    monkeypatch.setattr(compilation.torch, "compile", broken)
    with caplog.at_level("INFO", logger="medimg"):
        assert train.train(changed(tiny, training__compile="on", training__num_epochs=1)).epochs == 1
    assert "torch.compile does not work here (no C++ compiler found): training goes on without it" in caplog.text


def test_switched_off_nothing_is_probed(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "compiled_network", lambda *a, **k: pytest.fail("probed"))
    train.train(changed(tiny, training__num_epochs=1))


def test_the_probe_changes_neither_the_network_nor_the_random_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation.torch, "compile", lambda module: module)
    model = create_model("test_resnet", 2, False, hidden_features=4)
    before, stream = {name: item.clone() for name, item in model.state_dict().items()}, torch.get_rng_state()
    compilation.compiled_network(
        model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.sum,
        wanted="on", steps=1, device=CPU, precision="fp32",
    )  # fmt: skip
    assert all(torch.equal(item, before[name]) for name, item in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(item.grad is None for item in model.parameters())


def test_a_resumed_run_decides_as_the_first_did(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def chosen(network: Any, *args: Any, wanted: str, **kwargs: Any) -> Any:
        asked.append(wanted)
        return torch.nn.Sequential(network)

    monkeypatch.setattr(train, "compiled_network", chosen)
    config = changed(tiny, training__compile="auto")
    train.train(config)
    path, again = train.resume_config(Path(config.runtime.output_dir) / "checkpoint_epoch_1.pth")
    train.train(again, resume=path)
    assert asked == ["auto", "on"]
    plain = create_model("test_efficientnet", 2, False, hidden_features=16)
    assert weights(Path(config.runtime.output_dir)).keys() == plain.state_dict().keys()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for the CPU needs a C++ compiler")
def test_a_really_compiled_network_computes_and_trains_the_same_parameters(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network, inputs = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh()), torch.randn(3, 6)
    with caplog.at_level("INFO", logger="medimg"):
        found = compilation.compiled_network(
            network, inputs, torch.sum, wanted="on", steps=1, device=CPU, precision="fp32"
        )
    assert "of compiling: used" in caplog.text
    found(inputs).sum().backward()
    grads = [item.grad.clone() for item in network.parameters()]
    network.zero_grad()
    network(inputs).sum().backward()
    assert all(torch.allclose(a, b.grad, atol=1e-6) for a, b in zip(grads, network.parameters()))


def test_what_is_frozen_stands_still_in_a_compiled_network_too() -> None:
    model = create_model("test_resnet", 2, False, freeze_backbone=True, hidden_features=4)
    torch.compile(model, backend="eager").train()
    assert model.head.training and not any(item.training for item in model.backbone.modules())


@pytest.mark.parametrize(("word", "value"), [("on", "on"), ("off", "off"), ("auto", "auto")])
def test_yaml_words_for_yes_and_no_are_understood(word: str, value: str) -> None:
    name, parsed = parse_assignment(f"training.compile={word}")
    assert resolve({name: parsed}).training.compile == value


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="training.compile: 'maybe' is not one of off, on, auto"):
        resolve({"training.compile": "maybe"})
