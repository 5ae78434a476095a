"""completion.py: scripts that the shells accept, and that complete verbs, flags, choices and files."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import command_line
import completion
import main
from config import resolve
from errors import ConfigError
from fusion import FUSIONS
from runtime import resolve_device

ROOT = Path(main.__file__).parent


def written(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main.main(["completion", shell]) == 0
    path = folder / f"completion.{shell}"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


def completed(script: Path, line: list[str]) -> list[str]:
    """What bash offers for the last word of `line`."""
    code = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _medimg_python; echo "${COMPREPLY[*]}"'
    done = subprocess.run(
        ["bash", "-c", code, "bash", str(script), *line], capture_output=True, text=True, timeout=30, cwd=ROOT
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shell_accepts_its_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = written(shell, tmp_path, capsys)
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_verb_is_in_every_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["completion", shell, "--json"]) == 0
    script = json.loads(capsys.readouterr().out)["script"]
    assert all(verb in script for verb in main.VERBS) and "--positive-class" in script


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("python main.py cros", {"crossval"}),
        ("python3 ./main.py train", {"train", "train_multimodal"}),
        ("python main.py train --epo", {"--epochs"}),
        ("python main.py train --model ", set(completion.MODELS)),
        ("python main.py evaluate --split t", {"train", "test"}),
        ("python main.py train --epochs 3 --manifest READ", {"README.md"}),
        ("python main.py train --output-dir tes", {"tests"}),
        ("python main.py predict READ", {"README.md"}),
        ("python main.py train --recipe vi", {"vit"}),
        ("python main.py completion f", {"fish"}),
        ("python another.py cros", set()),
    ],
)
def test_bash_completes(line: str, offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(completed(written("bash", tmp_path, capsys), line.split(" "))) == offered


@pytest.mark.parametrize("flag", sorted(completion.CHOICES))
def test_every_choice_offered_is_accepted(flag: str) -> None:
    for value in completion.CHOICES[flag]:
        resolve({command_line.FLAGS[flag].field: value})


@pytest.mark.parametrize("flag", sorted(set(completion.CHOICES) - {"--device", "--fusion"}))
def test_the_choices_offered_are_all_that_the_configuration_takes(flag: str) -> None:
    with pytest.raises(ConfigError, match="is not one of ") as refused:
        resolve({command_line.FLAGS[flag].field: "another"})
    taken = str(refused.value).split("is not one of ")[1].split(";")[0]
    assert set(completion.CHOICES[flag]) == set(taken.split(", "))


def test_the_devices_offered_are_all_there_are_but_for_numbers() -> None:
    with pytest.raises(ConfigError, match="use auto, cpu") as refused:
        resolve_device("another")
    known = re.split(", | or ", str(refused.value).split("; use ")[1])
    assert {*completion.CHOICES["--device"], "cuda:N"} == set(known)


def test_the_fusions_offered_are_all_there_are() -> None:
    assert set(completion.CHOICES["--fusion"]) == set(FUSIONS)


def test_every_flag_that_names_files_or_folders_completes_them() -> None:
    parser = main.build_parser(main.VERBS)[0]
    completion.script(parser, "bash")
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    marked = {
        flag
        for of_verb in verbs.choices.values()
        for action in of_verb._actions
        if hasattr(action, "complete")
        for flag in action.option_strings
    }
    assert {"--checkpoint", "--bundle", "--config", "--manifest", "--weights", "--data-dir", "--output-dir", "--resume",
            "--predictions", "--validation-predictions", "--table", "--text-model", "--api-keys-file", "--exclude",
            "--checkpoints", "--mask-terms", "--write-manifest", "--triton-repository"} <= marked  # fmt: skip


def test_a_shell_that_is_not_known_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(["completion", "tcsh"])
    assert stopped.value.code == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
