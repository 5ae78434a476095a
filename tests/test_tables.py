"""The published tables: rows are measured once, resumed, and printed beside what was promised."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

import predictor
from benchmarks import table_jobs, table_measures, table_render, tables
from benchmarks.table_jobs import Job, Options
from errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def options(work: Path, **given: Any) -> Options:
    """Those of a smoke run into `work`."""
    words = ["--work", str(work), "--smoke"]
    for name, value in given.items():
        words += [f"--{name}", str(value)]
    return tables.options_of(tables.parser().parse_args(words))


def job(row: str, work: Any) -> Job:
    return Job(1, row, "part", work, 0)


# --- jobs ------------------------------------------------------------------------------------------------------


def test_a_row_is_measured_once_and_one_that_fails_does_not_keep_the_next_waiting(tmp_path: Path) -> None:
    calls: list[str] = []

    def fine(_: Options) -> dict[str, Any]:
        calls.append("fine")
        return {"value": 1.5}

    def fails(_: Options) -> dict[str, Any]:
        calls.append("fails")
        raise ConfigError("this row needs --films")

    chosen, where = [job("bad", fails), job("good", fine)], options(tmp_path)
    assert tables.run_all(chosen, where) == ["1.bad.part"]
    assert tables.run_all(chosen, where) == ["1.bad.part"]
    assert calls == ["fails", "fine", "fails"]
    (record,) = tables.results(tmp_path)
    assert record["result"] == {"value": 1.5} and record["smoke"] and record["machine"]["cores"] == os.cpu_count()
    assert record["command"].endswith("--rows good --smoke")


def test_every_row_has_one_name_and_all_four_tables_have_rows(tmp_path: Path) -> None:
    names = [each.name for each in table_jobs.jobs(options(tmp_path))]
    assert len(set(names)) == len(names)
    assert {name[0] for name in names} == {"1", "2", "3", "4"}
    shown = {*table_render.MODELS, *table_jobs.NETWORKS, *table_render.WAYS, *table_render.PEERS}
    rows = {each.row for each in table_jobs.jobs(options(tmp_path))}
    assert {row for row in rows if not row.startswith(("engines_", "server_"))} == shown


def test_what_is_compared_takes_turns(tmp_path: Path) -> None:
    rounds = [each for each in table_jobs.jobs(options(tmp_path)) if each.table == 3]
    ways = list(table_jobs.TRAINING_WAYS)
    assert [each.row for each in rounds] == ways * 2
    assert [each.part for each in rounds] == ["round1"] * len(ways) + ["round2"] * len(ways)


def test_a_row_without_what_it_needs_says_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --films"):
        table_jobs.TRAININGS["resnet50"][0](options(tmp_path))
    with pytest.raises(ConfigError, match="run table 1 first, or give --checkpoint resnet50=FILE"):
        table_jobs.measured(options(tmp_path), "resnet50")


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 3: "):
        table_jobs.call([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_signal_reaches_the_command_which_may_save_before_it_ends(tmp_path: Path) -> None:
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    child = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    time.sleep(0.2); pathlib.Path({str(saved)!r}).touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    parent = (
        f"import signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks import table_jobs, tables\n"
        "signal.signal(signal.SIGTERM, tables._stop)\n"
        f"table_jobs.call([sys.executable, '-c', {child!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 120
    while not ready.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == tables.STOPPED
    assert saved.exists()


@pytest.mark.slow
def test_a_row_is_trained_measured_and_gone_on_with(films: Path, tmp_path: Path) -> None:
    where = options(tmp_path, films=films)
    train = table_jobs.TRAININGS["resnet50"][0]
    first = train(where)
    assert first["model"] == "test_resnet" and first["epochs"] == 1 and not first["weights"]
    assert train(where)["epochs_s"] == first["epochs_s"]  # nothing was left to train
    found = table_jobs.measured(where, "resnet50")
    assert found["n"] == 24
    assert 0 < found["latency"]["network_ms"] < found["latency"]["film_ms"]


# --- films -----------------------------------------------------------------------------------------------------


def test_a_part_of_the_films_holds_whole_patients_and_no_more_than_asked_for_by_one(
    films: Path, tmp_path: Path
) -> None:
    whole = table_measures.subset(films, tmp_path / "all.csv", {"train": 10**6, "val": 10**6, "test": 10**6})
    part = table_measures.subset(films, tmp_path / "part.csv", {"train": 21, "test": 9})
    everything, some = pd.read_csv(whole), pd.read_csv(part)
    assert everything.groupby("patient_id").size().eq(2).all()
    assert some.groupby("patient_id").size().eq(2).all()
    assert some["split"].value_counts().to_dict() == {"train": 22, "test": 10}
    assert set(map(tuple, some.to_numpy())) <= set(map(tuple, everything.to_numpy()))


# --- measures --------------------------------------------------------------------------------------------------


def test_variants_are_taken_from_what_was_made_and_the_exported_network_loses_nothing(
    trained: Path, optimized: Path, tmp_path: Path
) -> None:
    made, folder = tmp_path / "made", tmp_path / "variants"
    made.mkdir()
    shutil.copy(optimized / "model.onnx", made / "pruned.onnx")
    shutil.copy(optimized / "model_int8.onnx", made / "pruned_int8.onnx")
    checkpoint = trained / "best_model.pth"
    source = table_measures.make_variants(checkpoint, folder, bundle_made=optimized, pruned_made=made, prune_epochs=0)
    assert source == {"full": "bundle", "pruned": "made before"}
    lost = table_measures.accuracy_lost(checkpoint, folder)
    for split in ("val", "test"):
        exported = lost["exported"][split]
        assert exported["accuracy"]["difference"] == 0
        # Logits differ by rounding, which can swap two films whose scores are nearly equal.
        assert exported["auc_roc"]["difference"] == pytest.approx(0, abs=0.01)
    assert lost["quantised"] == lost["both"]  # the same file
    sizes = table_measures.megabytes(checkpoint, folder)
    weights = sum(item.numel() for item in predictor.load(checkpoint).engine.model.state_dict().values()) * 4 / 1e6  # type: ignore[attr-defined]
    assert sizes["before"] == pytest.approx(weights, rel=0.01)  # counters of batches are the only integers
    assert sizes["exported"] == (optimized / "model.onnx").stat().st_size / 1e6


def test_sides_take_turns_and_the_first_round_is_not_counted(trained: Path) -> None:
    stored = predictor.load(trained / "best_model.pth")
    seen: list[tuple[str, int]] = []
    sides = {name: lambda films, name=name: seen.append((name, len(films))) for name in "ab"}
    rates = table_measures.in_turns(sides, stored, batch=16, rounds=2)
    assert [name for name, _ in seen] == ["a", "a", "b", "b"] * 3  # each is called once untimed, once timed
    assert {count for _, count in seen} == {16}
    assert {name: len(values) for name, values in rates.items()} == {"a": 2, "b": 2}


# --- tables ----------------------------------------------------------------------------------------------------


def record(table: int, row: str, part: str, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "table": table,
        "row": row,
        "part": part,
        "date": "2026-11-23T10:00:00+00:00",
        "command": f"python benchmarks/tables.py --work DIR --rows {row}",
        "load_before": 0.5,
        "machine": {"cpu": "a processor", "cores": 2},
        "smoke": False,
        "result": result,
    }


def measured(accuracy: float, area: float) -> dict[str, Any]:
    def estimate(value: float) -> dict[str, float]:
        return {"value": value, "ci_low": value - 0.03, "ci_high": value + 0.02}

    names = ("precision", "sensitivity", "f1")
    metrics = {"accuracy": estimate(accuracy), "auc_roc": estimate(area), **{name: estimate(0.9) for name in names}}
    return {
        "n": 312,
        "n_patients": 211,
        "metrics": metrics,
        "at_0.5": {"accuracy": estimate(0.91)},
        "latency": {"network_ms": 31.25, "film_ms": 33.0},
    }


def test_a_row_stands_beside_the_published_figures_and_says_why_it_misses(tmp_path: Path) -> None:
    facts = {"model": "x", "image_size": 160, "weights": False, "epoch": 4, "command": ["train", "--data-dir", "FILMS"]}
    records = [
        record(1, "resnet50", "measure", measured(0.93, 0.955)),
        record(1, "resnet50", "train", facts),
        record(1, "densenet121", "measure", measured(0.92, 0.96)),
        record(1, "densenet121", "train", facts),
    ]
    text = table_render.render(records, tmp_path)
    resnet, densenet = ("\n".join(line for line in text.splitlines() if line[2:].startswith(name)) for name in NAMES)
    assert "0.955 (0.925 to 0.975) | 0.930 (0.900 to 0.950)" in resnet and "| 31.2 | 92.5 %, 0.96, 12 |" in resnet
    assert "misses AUROC: " in resnet and "accuracy" not in resnet.split("misses")[1]
    assert "misses" not in densenet and "random weights" in densenet
    assert "`python main.py train --data-dir FILMS`" in resnet
    assert "2 cores of a processor" in text and "One row: `python benchmarks/tables.py --work DIR --rows ROW`" in text
    assert ElementTree.parse(tmp_path / "table1.svg").getroot().tag.endswith("svg")


NAMES = ("ResNet-50, fine-tuned", "DenseNet-121")


def test_losses_are_points_and_speeds_are_ratios_of_the_same_round(tmp_path: Path) -> None:
    loss = {"difference": 0.004, "ci_low": -0.001, "ci_high": 0.009}
    both_splits = {split: {"accuracy": loss, "auc_roc": loss} for split in ("val", "test")}
    rates = {"torch": [10.0, 20.0], "exported": [20.0, 40.0]}
    rates |= {name: [30.0, 80.0] for name in table_render.VARIANTS}
    records = [
        record(
            2,
            "resnet50",
            "accuracy",
            {
                "megabytes": {"before": 98.2, **dict.fromkeys(table_render.VARIANTS, 24.8)},
                "lost": dict.fromkeys(table_render.VARIANTS, both_splits),
                "weights": {"model": "resnet50", "image_size": 224, "weights": False, "epoch": 3},
            },
        ),
        record(2, "resnet50", "speed", {"films_per_s": {"16": rates, "1": rates}}),
    ]
    text = table_render.render(records, tmp_path)
    assert text.endswith("The networks: resnet50 at 224 px from random weights, epoch 3.")
    line = next(line for line in text.splitlines() if "quantised to INT8" in line)
    assert "98.2 → 24.8 MB | +0.40 (−0.10 to +0.90)" in line
    assert "3.5× (3.0–4.0)" in line and "1.8× (1.5–2.0)" in line  # 30/10 and 80/20; 30/20 and 80/40, half to even
    assert line.endswith("98 → 25 MB, 0.4 points, 2.1× |")


@pytest.mark.parametrize(
    ("megabytes", "difference", "low", "times", "said"),
    [
        (25.4, 0.004, 0.0, 2.1, ""),
        (26.0, 0.004, 0.0, 2.0, "; misses size and speed-up"),
        (25.0, 0.005, 0.001, 3.0, "; misses accuracy, though its interval holds the promise"),
        (25.0, 0.009, 0.006, 3.0, "; misses accuracy, by what rounding costs"),
    ],
)
def test_a_compressed_network_that_misses_says_what(
    megabytes: float, difference: float, low: float, times: float, said: str
) -> None:
    lost = {"difference": difference, "ci_low": low, "ci_high": 0.02}
    shown = table_render._promised_size("resnet50", "quantised", megabytes=megabytes, lost=lost, times=times)
    assert shown == f"98 → 25 MB, 0.4 points, 2.1×{said}"
    assert table_render._promised_size("resnet50", "both", megabytes=99, lost=lost, times=0.1) == "–"


def test_a_peer_that_is_ahead_is_named(tmp_path: Path) -> None:
    def race(rate: float, reached: float | None) -> dict[str, Any]:
        return {
            "images_per_s": rate,
            "seconds_to_target": reached,
            "epochs": [{"auroc": 0.96}],
            "largest_process_mb": 900.0,
            "task": {
                "model": "m",
                "image_size": 224,
                "batch_size": 32,
                "epochs": 2,
                "learning_rate": 3e-4,
                "threads": 2,
            },
        }

    found = {"this_program": race(40, 60), "plain_loop": race(50, 61), "fastai_loop": race(10, None)}
    text = table_render.render([record(4, row, "round1", result) for row, result in found.items()], tmp_path)
    assert "Ahead of this program: PyTorch and timm in films/s." in text
    assert "| fastai | 10.0 | not reached |" in text
    behind = {"this_program": race(60, 50), "plain_loop": race(50, 61)}
    text = table_render.render([record(4, row, "round1", result) for row, result in behind.items()], tmp_path)
    assert "By medians none is ahead of this program here." in text


def test_a_server_and_an_engine_that_are_ahead_are_named(tmp_path: Path) -> None:
    serving = {"fastapi": {"pairs": [[50.0, 10.0], [60.0, 10.0]]}, "litserve": {"pairs": [[50.0, 80.0], [60.0, 61.0]]}}
    rates = {"bundle": [9.0], "torch": [3.0], "torch bf16": [4.0], "onnxruntime": [10.0]}
    text = table_render.render(
        [
            record(4, "server_resnet50", "serve", serving),
            record(4, "engines_resnet50", "speed", {"films_per_s": {"16": rates, "1": {**rates, "bundle": [20.0]}}}),
        ],
        tmp_path,
    )
    assert "| resnet50 against plain FastAPI handler, torch fp32 | 55.0 (50.0–60.0) | 10.0 (10.0–10.0) | 5.50×" in text
    assert "Ahead of this program: LitServe, the same engine (resnet50)." in text
    assert "Ahead of this program: ONNX Runtime fp32 (resnet50)." in text


def test_training_epochs_are_scaled_from_the_median_rate(tmp_path: Path) -> None:
    def way(rate: float) -> dict[str, float]:
        return {"images_per_s": rate, "peak_memory_mb": 900, "largest_process_mb": 1000, "whole_command_s": 50}

    records = [record(3, "fp32", f"round{n}", way(rate)) for n, rate in ((1, 8.0), (2, 10.0))]
    records += [record(3, "mixed", f"round{n}", way(rate)) for n, rate in ((1, 20.0), (2, 16.0))]
    text = table_render.render(records, tmp_path)
    far = record(3, "frozen_cached", "round1", way(5000.0))
    table_render.render([*records, far], tmp_path)
    axis = (tmp_path / "table3.svg").read_text()
    assert "<!-- 1,000 -->" in axis and "mathdefault" not in axis
    line = next(line for line in text.splitlines() if line.startswith("| bf16, all layers |"))
    assert f"| 18.0 (16.0–20.0) | 2.00× | {4471 / 18:.0f} s | 50 s (50–50) | 1000 MiB |" in line


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    assert table_render.render([], tmp_path) == "nothing measured yet"


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        ({"value": 0.91234, "ci_low": 0.88, "ci_high": 0.94}, "0.912 (0.880 to 0.940)"),
        ({"value": 0.9, "ci_low": None, "ci_high": None}, "0.900"),
        ({"difference": -0.004, "ci_low": -0.01, "ci_high": 0.002}, "−0.004 (−0.010 to 0.002)"),
        ({"value": None}, "–"),
        (None, "–"),
    ],
)
def test_estimates_are_shown_with_their_intervals(estimate: dict[str, Any] | None, shown: str) -> None:
    assert table_render.interval(estimate) == shown


def test_tables_are_put_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Results\n\n{tables.BEGIN}\nold\n{tables.END}\n\nrest\n")
    tables.put_into(page, "| new |")
    assert page.read_text() == f"# Results\n\n{tables.BEGIN}\n| new |\n{tables.END}\n\nrest\n"
    page.write_text(f"{tables.END} {tables.BEGIN}")
    with pytest.raises(ConfigError, match="put both where the tables go"):
        tables.put_into(page, "| new |")


def test_pictures_are_named_from_the_page_that_shows_them(tmp_path: Path) -> None:
    one, figures = [record(1, "lite0", "measure", measured(0.9, 0.9))], tmp_path / "docs" / "figures"
    assert "](figures/table1.svg)" in table_render.render(one, figures)
    assert "](docs/figures/table1.svg)" in table_render.render(one, figures, page_folder=tmp_path)


def test_a_row_names_its_command_without_the_paths_of_this_machine(films: Path, tmp_path: Path) -> None:
    where = options(tmp_path, films=films, weights=tmp_path / "w.safetensors")
    assert where.without_places(["train", str(films), str(where.weights)]) == ["train", "FILMS", "WEIGHTS"]
    given = ["--work", str(tmp_path), "--rounds", "3", "--checkpoint", "resnet50=a.pth"]
    command = tables._command(tables.options_of(tables.parser().parse_args(given)), job("resnet50", None))
    assert command.endswith("--work DIR --rounds 3 --checkpoint NETWORK=PATH --rows resnet50")


def test_smoke_runs_are_marked(tmp_path: Path) -> None:
    one = {**record(1, "lite0", "measure", measured(0.9, 0.9)), "smoke": True}
    assert "A smoke run" in table_render.render([json.loads(json.dumps(one))], tmp_path)
