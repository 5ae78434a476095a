"""machine_speed.py: every rate is there and positive; the verdict names the slowest part."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import machine_speed
import main
from config import resolve


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_speed, "SECONDS", 0.02)
    monkeypatch.setattr(machine_speed, "RAW_SIDE", 64)


TINY = ["--model", "test_resnet", "--image-size", "64", "--device", "cpu", "--precision", "fp32"]


@pytest.mark.usefixtures("brief")
def test_doctor_measures_the_machine_and_says_what_bounds_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "--benchmark", "--json", "--quiet", *TINY]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed["model"] == "test_resnet" and speed["image_size"] == 64
    rates = speed["films_per_s"]
    assert set(rates) == {"decode", "augment", "step", "frozen"} and "fp32" in rates["step"]
    flat = [*rates["decode"].values(), *rates["augment"].values(), *rates["frozen"].values()]
    flat += [value for step in rates["step"].values() for value in step.values()]
    assert all(math.isfinite(value) and value > 0 for value in flat)
    assert speed["bound"] and any(name.startswith("torch") for name in rates["frozen"])
    printed = "\n".join(speed["lines"])
    assert all(word in printed for word in ("decode", "augment", "step", "forward", "backward", "optimizer", "frozen"))


def test_the_parts_of_a_step_add_up_to_it() -> None:
    config = resolve({"model.model_type": "test_resnet", "data.image_size": 64})
    step = machine_speed._steps(config, device=machine_speed.torch.device("cpu"), precision="fp32")
    seconds = sum(1 / step[name] for name in ("forward", "backward", "optimizer"))
    assert seconds == pytest.approx(1 / step["whole"], rel=0.5)


def rates(decode: float, cpu: float, device: float, step: float) -> dict[str, Any]:
    return {
        "decode": {"one_thread": decode / 2, "all_threads": decode},
        "augment": {"cpu": cpu, "device": device},
        "step": {"bf16": {"whole": step}},
        "frozen": {"torch bf16": 50.0, "openvino bf16": 80.0},
    }


@pytest.mark.parametrize(
    ("measured", "device", "says"),
    [
        (
            rates(400, 900, 200, 10),
            "cpu",
            "the training step bounds a run (10.0 films/s); frozen layers run once at 80",
        ),
        (rates(5, 900, 200, 10), "cpu", "the first epoch waits for decoding (5)"),
        (rates(400, 9, 200, 10), "cpu", "augmentation (9 films/s) is slower than the step (10)"),
        (rates(400, 9, 200, 10), "cuda", "the training step bounds a run"),
    ],
)
def test_the_verdict_names_the_slowest_part(measured: dict[str, Any], device: str, says: str) -> None:
    assert says in machine_speed.bound(measured, precision="bf16", device=device)
