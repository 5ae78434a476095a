"""optimization.py, candidates.py, optimization_report.py: measured, judged, refused or chosen."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bundle
import candidates
import gate
import main
import optimization
import optimization_report
import predictor
from config import OptimizationConfig, flatten, resolve
from engines import onnx_engine
from errors import CheckpointError, ConfigError, DataError
from preprocess import PreprocessSpec


@pytest.fixture(scope="module")
def report(optimized: Path) -> dict[str, Any]:
    return json.loads((optimized / "optimization_report.json").read_text())


# --- the whole way -------------------------------------------------------------------------------------------------


def test_every_engine_and_precision_here_is_a_candidate(report: dict[str, Any]) -> None:
    names = [row["name"] for row in report["candidates"]]
    assert names[0] == report["baseline"] == "torch fp32"
    assert {"onnxruntime fp32", "onnxruntime int8", "openvino fp32", "openvino int8"} <= set(names)
    assert len(names) == len(set(names))
    assert "compile" in {item["candidate"] for item in report["skipped"]}


def test_a_row_holds_speed_start_size_and_accuracy(report: dict[str, Any]) -> None:
    for row in report["candidates"]:
        assert row["speed"]["throughput"] > 0 and 0 < row["speed"]["p50_ms"] <= row["speed"]["p95_ms"]
        assert row["speed"]["batches"] == 2 and row["speed"]["singles"] == 2 * candidates.SINGLES
        assert row["size_mb"] > 0 and row["cold_start"]["seconds"] == 1.5
        for name in ("auc_roc", "sensitivity", "specificity", "brier", "ece"):
            assert {"value", "ci_low", "ci_high"} <= set(row["accuracy"]["metrics"][name])
        assert row["accuracy"]["flips"] >= 0


def test_the_float_model_loses_nothing_against_itself(report: dict[str, Any]) -> None:
    (same,) = [row for row in report["candidates"] if row["name"] == "torch fp32"]
    assert same["accuracy"]["drop"] == dict.fromkeys(optimization.BUDGETED, 0.0)
    assert same["accuracy"]["flips"] == 0


def test_the_bundle_is_what_the_report_chose(optimized: Path, report: dict[str, Any]) -> None:
    (row,) = [row for row in report["candidates"] if row["name"] == report["chosen"]]
    facts = json.loads((optimized / bundle.FACTS).read_text())
    assert (facts["engine"], facts["precision"], facts["network"]) == (row["engine"], row["precision"], "full")
    assert facts["passed"] is True
    assert predictor.load(optimized).engine.name == report["chosen"]
    others = [item["speed"]["throughput"] for item in report["candidates"]]
    assert row["speed"]["throughput"] >= (1 - optimization.NEAR_TIE) * max(others)


def validation_films(stored: predictor.Predictor) -> np.ndarray:
    config = resolve(flatten(stored.config.to_dict(), source="checkpoint"))
    val = optimization.training_films(stored, config).val_set
    return np.stack([val.pixels[int(row)] for row in val.store_rows])


def test_the_gate_of_a_bundle_has_thresholds_for_its_own_engine(optimized: Path, trained: Path) -> None:
    own = predictor.load(trained / "best_model.pth", device="cpu", precision="fp32")
    stored = bundle.read(optimized).input_gate
    assert own.input_gate is not None and stored is not None
    outputs = predictor.load(optimized).engine.outputs
    expected = gate.refit(own.input_gate, gate.describe(outputs, candidates.batches_of(validation_films(own))))
    np.testing.assert_allclose(stored["thresholds"], expected["thresholds"], rtol=1e-5)
    assert stored["thresholds"] != own.input_gate["thresholds"]
    assert torch.equal(stored["features"]["mean"], own.input_gate["features"]["mean"])


def test_int8_keeps_the_mean_logits_of_the_float_model(optimized: Path, trained: Path, report: dict[str, Any]) -> None:
    stored = predictor.load(trained / "best_model.pth", device="cpu", precision="fp32")
    films = validation_films(stored)
    file = optimized / bundle.INT8_FILE
    rounded = onnx_engine(optimization.onnx_kind(), file, stored.spec, precision="int8").logits(films)
    shift = report["networks"]["full"]["quantisation"]["shift"]
    assert np.abs(shift).max() > 1e-5  # there was something to take off
    # Kernels differ with the size of a batch, by less than the shift itself.
    exact = stored.engine.logits(films)
    np.testing.assert_allclose(rounded.mean(axis=0), exact.mean(axis=0), atol=0.2 * np.abs(shift).max())


def test_the_report_is_words_and_a_picture_too(optimized: Path, report: dict[str, Any]) -> None:
    text = (optimized / "optimization_report.md").read_text()
    for row in report["candidates"]:
        assert f"| {row['name']} |" in text
    assert "Chosen: " in text and "INT8 file" in text
    assert (optimized / "optimization_report.png").read_bytes()[:4] == b"\x89PNG"
    assert optimization.summary(report).splitlines()[-1].startswith("chosen: ")


def test_nothing_else_is_left_in_the_folder(optimized: Path) -> None:
    assert {item.name for item in optimized.iterdir()} == {
        *(bundle.FACTS, bundle.FLOAT_FILE, bundle.INT8_FILE, bundle.RECORDS, "triton"),
        *(f"optimization_report.{kind}" for kind in ("json", "md", "png")),
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a run of seconds."""
    monkeypatch.setattr(optimization, "cold_start", lambda *_, **__: candidates.ColdStart(1.0, 1.0))
    return ["--no-quantize", "--engines", "onnxruntime", "--set", "optimization.rounds=1", "--device", "cpu"]


def test_nothing_inside_the_budget_keeps_the_float_model_and_exits_with_3(
    trained: Path, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimization, "refusal", lambda *_: "AUROC falls by 0.2000, more than 0.005")
    words = ["optimize", "--checkpoint", str(trained / "best_model.pth"), "--output-dir", str(tmp_path), "--json"]
    assert main.main([*words, *quick, "--quiet"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert said["chosen"] is None
    assert all(row["reason"] for row in said["candidates"])
    facts = json.loads((tmp_path / bundle.FACTS).read_text())
    assert (facts["engine"], facts["precision"], facts["passed"]) == ("torch", "fp32", False)
    assert predictor.load(tmp_path, device="cpu").engine.name == "torch fp32"
    assert "the float model is kept" in (tmp_path / "optimization_report.md").read_text()


def test_without_quantisation_there_is_no_int8_file_even_of_an_earlier_run(
    trained: Path, optimized: Path, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "choose", lambda rows, **_: rows[-1])  # whatever a busy machine measures
    shutil.copytree(optimized, tmp_path / "out")
    words = ["optimize", "--checkpoint", str(trained / "best_model.pth"), "--output-dir", str(tmp_path / "out")]
    assert main.main([*words, *quick, "--quiet"]) == 0
    assert not (tmp_path / "out" / bundle.INT8_FILE).exists()
    assert set(bundle.read(tmp_path / "out").facts["hashes"]) == {bundle.FLOAT_FILE, bundle.RECORDS}


def test_a_pruned_network_is_a_candidate_with_an_operating_point_of_its_own(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "cold_start", lambda *_, **__: candidates.ColdStart(1.0, 1.0))
    settings = {
        "prune": True,
        "quantize": False,
        "pruning_amount": 0.5,
        "pruning_epochs": 0,
        "engines": ["openvino"],
        "rounds": 1,
        "max_auc_drop": 1,
        "max_sensitivity_drop": 1,
        "max_accuracy_drop": 1,
    }
    overrides = {f"optimization.{name}": value for name, value in settings.items()}
    monkeypatch.setattr(optimization, "choose", lambda rows, **_: rows[-1])
    made = optimization.optimize(trained / "best_model.pth", [overrides], output_dir=tmp_path)
    assert made["chosen"].endswith("pruned")
    pruned = made["networks"]["pruned"]
    assert pruned["pruning"]["after"]["macs"] < pruned["pruning"]["before"]["macs"]
    assert pruned["float_mb"] < made["networks"]["full"]["float_mb"]
    facts = bundle.read(tmp_path).facts
    assert facts["network"] == "pruned"
    original = predictor.load(trained / "best_model.pth", device="cpu")
    assert facts["temperature"] != original.temperature
    features = predictor.load(tmp_path).engine.outputs(np.zeros((1, 32, 32, 1), np.uint8))[1]
    assert features.shape[1] < original.engine.outputs(np.zeros((1, 32, 32, 1), np.uint8))[1].shape[1]


# --- the user's mistakes -------------------------------------------------------------------------------------------


def test_films_that_have_gone_are_named_with_the_flag_that_helps(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="validation films of training, and they cannot be read: .*--data-dir"):
        optimization.optimize(
            trained / "best_model.pth", [{"data.data_dir": str(tmp_path / "gone")}], output_dir=tmp_path / "out"
        )


def test_other_films_than_those_of_training_are_refused(trained: Path, films: Path, tmp_path: Path) -> None:
    shutil.copytree(films, tmp_path / "films")
    for path in sorted((tmp_path / "films" / "train" / "NORMAL").iterdir())[:4]:
        path.unlink()
    with pytest.raises(DataError, match="does not hold the films this checkpoint was trained on"):
        optimization.optimize(
            trained / "best_model.pth", [{"data.data_dir": str(tmp_path / "films")}], output_dir=tmp_path / "out"
        )


def test_the_same_films_in_another_place_are_known_again(
    trained: Path, films: Path, tmp_path: Path, quick: list[str]
) -> None:
    shutil.copytree(films, tmp_path / "moved")
    words = ["optimize", "--checkpoint", str(trained / "best_model.pth"), "--data-dir", str(tmp_path / "moved")]
    # 3 where a busy machine made the float model the faster: not what is asked here.
    assert main.main([*words, *quick, "--quiet", "--output-dir", str(tmp_path / "out")]) in (0, 3)


def test_other_preprocessing_than_that_of_training_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preprocessing is that of the checkpoint"):
        optimization.optimize(trained / "best_model.pth", [{"data.image_size": 48}], output_dir=tmp_path)


def test_a_bundle_is_not_optimised_again(optimized: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder; name the checkpoint file"):
        optimization.optimize(optimized, output_dir=tmp_path)


def test_an_engine_that_is_not_installed_is_skipped_and_named(
    trained: Path, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = optimization.why_absent
    gone = "tensorrt is not installed (pip install onnxruntime-gpu tensorrt)"
    monkeypatch.setattr(optimization, "why_absent", lambda kind: gone if kind == "tensorrt" else find(kind))
    overrides = {"optimization.quantize": False, "optimization.rounds": 1}
    made = optimization.optimize(
        trained / "best_model.pth",
        [{**overrides, "optimization.engines": ["tensorrt", "onnxruntime"]}],
        output_dir=tmp_path,
    )
    assert {"candidate": "tensorrt", "reason": gone} in made["skipped"]
    assert made["chosen"] == "onnxruntime fp32"


def test_compiling_needs_a_compiler(
    trained: Path, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization.shutil, "which", lambda name: None)
    settings = {"quantize": False, "rounds": 1, "engines": ["compile", "onnxruntime"]}
    overrides = {f"optimization.{name}": value for name, value in settings.items()}
    made = optimization.optimize(
        trained / "best_model.pth", [{**overrides, "runtime.device": "cpu"}], output_dir=tmp_path
    )
    assert {"candidate": "compile", "reason": "no C++ compiler here (apt install g++)"} in made["skipped"]


def test_a_candidate_that_fails_to_start_is_skipped_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("not a model")
    broken = candidates.Candidate("full", "onnxruntime", "fp32", tmp_path / "m.onnx")
    found = candidates.try_build(broken, PreprocessSpec(image_size=8), None, np.zeros((1, 8, 8, 1), np.uint8))
    assert isinstance(found, str) and "InvalidProtobuf" in found


def test_neither_onnx_engine_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "why_absent", lambda kind: f"{kind} is not installed (pip install {kind})")
    with pytest.raises(ConfigError, match="pip install openvino"):
        optimization.onnx_kind()


@pytest.mark.parametrize(
    ("name", "value"), [("engines", ["openvno"]), ("objective", "speed"), ("max_auc_drop", -0.1), ("rounds", 0)]
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"optimization.{name}"):
        resolve({f"optimization.{name}": value})


# --- the verdict ---------------------------------------------------------------------------------------------------


def standing(labels: np.ndarray, positive: np.ndarray, threshold: float = 0.5) -> optimization.Standing:
    films = optimization.ValidationFilms(np.empty((len(labels), 0)), labels, np.arange(len(labels)))
    both = np.column_stack([1 - positive, positive])
    return optimization.Standing(films, ("N", "P"), "P", threshold, both, both)


LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
BEFORE = np.array([0.1, 0.2, 0.3, 0.6, 0.4, 0.7, 0.8, 0.9])


def columns(positive: np.ndarray) -> np.ndarray:
    return np.column_stack([1 - positive, positive])


def test_drops_are_counted_at_each_models_own_threshold() -> None:
    after = BEFORE.copy()
    after[5] = 0.35  # a positive film falls below the 0.6 and 0.4 of others and below 0.5
    drops = optimization.drops_of(standing(LABELS, BEFORE), columns(after), 0.5)
    # Ordered pairs of 16: 15 before (0.4 < 0.6), 14 after (0.35 and 0.4 < 0.6).
    assert drops == pytest.approx({"auc_roc": 1 / 16, "sensitivity": 1 / 4, "accuracy": 1 / 8})
    lower = optimization.drops_of(standing(LABELS, BEFORE), columns(after), 0.35)
    assert lower == pytest.approx({"auc_roc": 1 / 16, "sensitivity": -1 / 4, "accuracy": -1 / 8})


def test_a_shift_that_spares_auroc_and_sensitivity_is_refused_for_its_accuracy() -> None:
    accuracy = optimization.judged(standing(LABELS, BEFORE), columns(np.minimum(BEFORE + 0.35, 1.0)), 0.5)
    assert accuracy["drop"]["auc_roc"] == 0 > accuracy["drop"]["sensitivity"]
    reason = optimization.refusal(accuracy, OptimizationConfig())
    assert reason is not None and reason.startswith("accuracy falls by 0.1250, more than 0.006 (95 % interval ")


def test_a_candidate_outside_the_budget_is_refused_with_the_interval() -> None:
    after = BEFORE.copy()
    after[5] = 0.35
    accuracy = optimization.judged(standing(LABELS, BEFORE), columns(after), 0.5)
    assert accuracy["flips"] == 1
    reason = optimization.refusal(accuracy, OptimizationConfig())
    assert reason is not None and reason.startswith("AUROC falls by 0.0625, more than 0.005 (95 % interval ")
    lenient = OptimizationConfig(max_auc_drop=0.1)
    assert str(optimization.refusal(accuracy, lenient)).startswith("sensitivity falls by 0.2500, more than 0.01")
    laxer = dataclasses.replace(lenient, max_sensitivity_drop=0.25, max_accuracy_drop=0.125)
    assert optimization.refusal(accuracy, laxer) is None


def test_a_gain_is_never_refused() -> None:
    nothing = OptimizationConfig(max_auc_drop=0, max_sensitivity_drop=0, max_accuracy_drop=0)
    assert optimization.over_budget(dict.fromkeys(optimization.BUDGETED, -0.1), nothing) is None


def test_what_cannot_be_measured_does_not_pass() -> None:
    assert "cannot be measured" in str(
        optimization.over_budget(dict.fromkeys(optimization.BUDGETED, float("nan")), OptimizationConfig())
    )
    broken = columns(np.full(8, np.nan))
    accuracy = optimization.judged(standing(LABELS, BEFORE), broken, 0.5)
    assert "cannot be measured" in str(optimization.refusal(accuracy, OptimizationConfig()))


def test_several_classes_are_judged_by_macro_averages() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    certain = np.eye(3)[labels] * 0.8 + 0.2 / 3
    films = optimization.ValidationFilms(np.empty((6, 0)), labels, np.arange(6))
    found = optimization.Standing(films, ("a", "b", "c"), None, 0.5, certain, certain)
    worse = certain.copy()
    worse[4] = [0.7, 0.29, 0.01]
    drops = optimization.drops_of(found, worse, 0.5)
    assert drops["sensitivity"] == drops["accuracy"] == pytest.approx(1 / 6) and 0 < drops["auc_roc"] < 1
    assert optimization.judged(found, worse, 0.5)["flips"] == 1


def row(name: str, throughput: float, p50_ms: float, *, accepted: bool = True) -> dict[str, Any]:
    return {"name": name, "accepted": accepted, "speed": {"throughput": throughput, "p50_ms": p50_ms}}


def test_the_fastest_accepted_candidate_is_chosen_by_the_objective() -> None:
    base = row("base", 20, 50)
    rows = [base, row("batches", 300, 10), row("singles", 200, 5), row("refused", 900, 1, accepted=False)]
    assert optimization.choose(rows, baseline=base, objective="throughput")["name"] == "batches"
    assert optimization.choose(rows, baseline=base, objective="latency")["name"] == "singles"


def test_near_ties_are_decided_by_the_other_measure() -> None:
    base = row("base", 20, 50)
    rows = [base, row("a", 300, 10), row("b", 295, 6), row("c", 280, 1)]
    assert optimization.choose(rows, baseline=base, objective="throughput")["name"] == "b"


def test_nothing_faster_than_the_baseline_is_no_choice() -> None:
    base = row("base", 20, 50)
    assert optimization.choose([base, row("slow", 10, 90)], baseline=base, objective="throughput") is None
    assert optimization.choose([base], baseline=base, objective="latency") is None


def test_films_are_drawn_in_the_proportions_of_their_classes() -> None:
    labels = np.repeat([0, 1, 2], [300, 690, 10])
    chosen = optimization.drawn(labels, 100, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [30, 69, 1]
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, optimization.drawn(labels, 100, seed=1))
    np.testing.assert_array_equal(optimization.drawn(labels, 1000, seed=1), np.arange(1000))


# --- timing --------------------------------------------------------------------------------------------------------


class Counted:
    """An engine that notes whose turn it was."""

    def __init__(self, name: str, turns: list[tuple[str, int]]) -> None:
        self.name, self.turns = name, turns

    def outputs(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.turns.append((self.name, len(images)))
        return np.zeros((len(images), 2), np.float32), np.zeros((len(images), 1), np.float32)

    def logits(self, images: np.ndarray) -> np.ndarray:
        return self.outputs(images)[0]


def test_candidates_take_turns() -> None:
    turns: list[tuple[str, int]] = []
    engines = {name: Counted(name, turns) for name in "abc"}
    found = candidates.measure(engines, np.zeros((4, 8, 8, 1), np.uint8), rounds=2)
    order = [name for name, count in turns if count == candidates.BATCH]
    assert order == list("abc") * 3
    assert {speed.batches for speed in found.values()} == {2}
    assert {speed.singles for speed in found.values()} == {2 * candidates.SINGLES}


def test_a_cold_start_counts_from_a_fresh_process(optimized: Path) -> None:
    stored = bundle.read(optimized)
    spec = PreprocessSpec(image_size=32, channels=1)
    candidate = candidates.Candidate("full", "onnxruntime", "fp32", stored.folder / bundle.FLOAT_FILE)
    found = candidates.cold_start(candidate, spec, threads=1)
    assert 0.1 < found.seconds < 300 and 50 < found.memory_mb < 5000 and found.reason == ""


def test_a_cold_start_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "COLD_START_LIMIT_S", 0.01)
    candidate = candidates.Candidate("full", "onnxruntime", "fp32", tmp_path / "m.onnx")
    found = candidates.cold_start(candidate, PreprocessSpec(image_size=8), threads=1)
    assert np.isnan(found.seconds) and np.isnan(found.memory_mb) and found.reason == "no answer within 0.01 s"


def test_torch_candidates_run_the_model_in_memory(trained: Path) -> None:
    engine = predictor.load(trained / "best_model.pth", device="cpu", precision="fp32").engine
    candidate = candidates.Candidate("full", "torch", "bf16", trained / "best_model.pth")
    built = candidate.build(PreprocessSpec(image_size=32, channels=1), engine.model)
    assert built.name == "torch bf16"
    assert (candidate.name, candidate.device) == ("torch bf16", "cpu")
    assert torch.is_tensor(next(built.model.parameters()))


def test_an_undefined_number_is_written_as_such() -> None:
    assert optimization_report._number(None, 2) == optimization_report._number(float("nan"), 2) == "undefined"


def test_a_triton_repository_that_cannot_be_written_is_said_before_the_work(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="--triton-repository .*file/models: cannot be written"):
        optimization.optimize(
            trained / "best_model.pth", output_dir=tmp_path / "out", triton_repository=tmp_path / "file" / "models"
        )
    assert not list((tmp_path / "out").iterdir())
