"""The line `next: python main.py ...` at the end of verbs: a command that parses and names what the verb just made."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import numpy as np
import pytest

import main
from tests.test_reader_study_verb import study_table


def predictions(path: Path, *, help_: float) -> str:
    """A table of 60 films of 60 patients whose scores speak for the class the more, the larger `help_`."""
    rng = np.random.default_rng(1)
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label", "patient_id", "probability"])
        for number in range(60):
            ill = number % 2
            score = 1 / (1 + np.exp(-rng.normal(help_ * (2 * ill - 1))))
            rows.writerow([f"{number}.png", "PNEUMONIA" if ill else "NORMAL", f"p{number}", f"{score:.4f}"])
    return str(path)


def next_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words after python main.py in the last line that the verb printed."""
    assert main.main(words) in (0, 3), capsys.readouterr().err
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: ")
    _, command = last.split("python main.py ")
    found = shlex.split(command)
    arguments, extras = main.build_parser(main.VERBS)[0].parse_known_args(found)
    assert arguments.verb == found[0] and not extras
    return found


def test_after_the_machine_was_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert next_command(["doctor"], capsys)[0] in ("audit", "demo")


def test_after_an_audit_its_films_are_trained_on(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(tmp_path)]
    assert next_command(["audit", str(films), *out], capsys) == ["train", "--data-dir", str(films)]
    table = str(films / "manifest.csv")
    assert next_command(["audit", table, *out], capsys) == ["train", "--manifest", table]


def test_after_a_comparison_the_better_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, poor = predictions(tmp_path / "good.csv", help_=2), predictions(tmp_path / "poor.csv", help_=0.2)
    for pair in ((good, poor), (poor, good)):
        words = ["compare", "--predictions", *pair, "--output-dir", str(tmp_path / "out")]
        assert next_command(words, capsys) == ["evaluate", "--predictions", good]


def test_after_a_reader_study_the_next_one_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study_table().to_csv(tmp_path / "t.csv", index=False)
    words = ["reader_study", "--table", str(tmp_path / "t.csv"), "--output-dir", str(tmp_path / "out")]
    planned = next_command(words, capsys)
    assert planned[:3] == ["reader_study", "--table", str(tmp_path / "t.csv")] and "readers=4" in planned
    assert main.main([*planned, "--output-dir", str(tmp_path / "plan")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {tmp_path / 'plan' / 'study_plan.json'}"


def test_after_training_predicting_and_explaining(
    trained: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = str(trained / "best_model.pth")
    film = str(next((films / "test" / "NORMAL").iterdir()))
    out = ["--output-dir", str(tmp_path)]
    assert next_command(["predict", film, "--checkpoint", best, *out], capsys)[:2] == ["explain", film]
    words = ["explain", film, "--checkpoint", best, "--sanity-films", "0", *out]
    assert next_command(words, capsys) == ["optimize", "--checkpoint", best]
    assert next_command(["evaluate", "--checkpoint", best, *out], capsys)[-2:] == ["--checkpoint", best]
