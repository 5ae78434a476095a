"""main.py: the surface of the command line, its speed, and one line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import main
from config import Config

ROOT = Path(main.__file__).parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "main.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_no_help_imports_a_heavy_library() -> None:
    code = (
        "import sys, main\n"
        "for words in ([], *([verb] for verb in main.VERBS)):\n"
        "    try: main.main([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pandas', 'timm', 'cv2', 'yaml', 'rich', 'PIL', 'scipy', 'matplotlib'}\n"
        "print(sorted(set(sys.modules) & heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stderr.strip() == "[]" and done.stdout.count("usage:") == 1 + len(main.VERBS)


@pytest.mark.parametrize("verb", ["", *main.VERBS])
def test_help_of_every_verb_is_instant(verb: str) -> None:
    before = os.times()
    assert run(*([verb] if verb else []), "--help").returncode == 0
    after = os.times()
    # Processor time of the child, not the clock: other test processes use the same cores.
    assert (after.children_user - before.children_user) + (after.children_system - before.children_system) < 0.3


@pytest.mark.parametrize("verb", main.VERBS)
def test_help_of_a_verb_shows_its_example(verb: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main([verb, "--help"])
    assert stopped.value.code == 0


@pytest.mark.parametrize("verb", main.VERBS)
def test_the_example_of_a_verb_parses(verb: str) -> None:
    words = main.VERBS[verb].example.split()
    assert words[:3] == ["python", "main.py", verb]
    arguments, extras = main.build_parser(main.VERBS)[0].parse_known_args(words[2:])
    assert arguments.verb == verb and not extras


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "train --model resnet50 --epochs 50",
        "train --model efficientnet_b4 --epochs 50 --batch-size 16",
        "train --model resnet50 --resume checkpoints/checkpoint_epoch_20.pth",
        "evaluate --checkpoint checkpoints/best_model.pth --model resnet50 --output-dir evaluation_results",
        "compare --predictions A.csv B.csv",
        "reader_study --table T.csv",
    ],
)
def test_published_command_parses(command: str) -> None:
    assert main.build_parser(main.VERBS)[0].parse_known_args(command.split())[1] == []


def test_the_surface_of_train_is_frozen() -> None:
    parser = main.build_parser(main.VERBS)[1]["train"]
    flags = {name for name in parser._option_string_actions if name.startswith("--") and not name.startswith("--no-")}
    assert flags == {
        "--help", "--data-dir", "--manifest", "--model", "--weights", "--pretrained", "--freeze-backbone", "--epochs",
        "--batch-size", "--image-size", "--seed", "--device", "--precision", "--workers", "--skip-unreadable",
        "--exclude", "--positive-class", "--head-search", "--output-dir", "--resume", "--recipe", "--config", "--set",
        "--dry-run", "--tracker", "--json", "--quiet",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trane"], "unknown verb 'trane'; did you mean 'train'"),
        (["train", "--epoch", "3"], "did you mean '--epochs'"),
        (["train", "--epochs", "three"], "argument --epochs: invalid int value: 'three'"),
        (["train", "--seed", "99999999999999999999"], "training.seed: 99999999999999999999 is out of range"),
        (["train", "--set", "training.learning_rate=.inf"], "training.learning_rate: inf is out of range"),
        (["train", "--epochs", "0"], "training.num_epochs: 0 is out of range"),
        (["train", "--set", "training.epochs=3"], "--set: unknown setting 'training.epochs'"),
        (["train", "--set", "seed"], "write it as section.field=value"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["train", "--data-dir", "nowhere"], "nowhere: no such data folder"),
        (["train", "--manifest", "nowhere.csv"], "nowhere.csv: no such manifest"),
        (["train", "--resume", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
        (["train", "--device", "tpu"], "'tpu' is no device"),
        (["train", "--device", "cuda:99"], "cuda:99"),
        (["evaluate"], "one of the arguments --checkpoint --bundle --predictions is required"),
        (["evaluate", "--checkpoint", "nowhere.pth"], "nowhere.pth: no such checkpoint; train one first"),
        (["predict", "nowhere.jpeg", "--checkpoint", "x.pth"], "nowhere.jpeg: no such file or folder"),
        (["predict", "x.jpeg", "--bundle", "nowhere"], "--bundle nowhere: no folder that optimize finished"),
        (["evaluate", "--bundle", "nowhere"], "--bundle nowhere: no folder that optimize finished"),
        (["api", "--bundle", "nowhere"], "--bundle nowhere: no folder that optimize finished"),
        (["train", "--config", str(ROOT)], "cannot be read as a configuration file (Is a directory)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main.main(words)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.pth"
    path.write_text("this is text\n")
    for words in (
        ["evaluate", "--checkpoint", path],
        ["train", "--resume", path],
        ["compare", "--checkpoints", path, path],
    ):
        folder = [] if words[0] == "train" else ["--output-dir", tmp_path / "out"]
        assert main.main([str(word) for word in (*words, *folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}: not a checkpoint, or damaged; use another one")


def test_a_demo_that_cannot_run_touches_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "mine.jpeg").write_text("a film")
    assert main.main(["demo", "--epochs", "0", "--output-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: training.num_epochs: 0 is out of range; it must be at least 1"
    ]
    assert [item.name for item in tmp_path.rglob("*")] == ["films", "mine.jpeg"]


def test_hyphens_are_accepted_in_a_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(main.VERBS, "two_words", main.Verb(lambda arguments: 0, "s", "e", ()))
    assert main.main(["two-words"]) == 0


def test_config_prints_what_flags_and_set_make_of_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["config", "--epochs", "3", "--no-pretrained", "--set", "data.balance=sampler", "--json"]
    assert main.main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["training"]["num_epochs"] == 3
    assert printed["model"]["pretrained"] is False
    assert printed["data"]["balance"] == "sampler"


def test_an_unexpected_fault_keeps_its_traceback_and_exits_with_1() -> None:
    code = (
        "import main; main.VERBS['doctor'] = main.Verb(lambda a: 1 / 0, 's', 'e', ()); "
        "main.sys.exit(main.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_doctor_reports_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["libraries"]["torch"] and facts["cpu_count"] >= 1


def test_train_takes_the_positive_class() -> None:
    arguments = main.build_parser(main.VERBS)[0].parse_args(["train", "--positive-class", "NORMAL", "--head-search"])
    flags = main.layers(arguments)[-1]
    assert flags["data.positive_class"] == "NORMAL" and flags["training.head_search"] is True


def test_sigterm_before_there_is_anything_to_save_is_one_line() -> None:
    code = (
        "import os, signal, sys, main\n"
        "stop = lambda arguments: os.kill(os.getpid(), signal.SIGTERM) or 0\n"
        "main.VERBS['doctor'] = main.Verb(stop, 's', 'e', ())\n"
        "sys.exit(main.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (143, "stopped before there was anything to save")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main.main(["demo", "--output-dir", str(tmp_path / "file"), "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "file" in lines[0]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} main.py config | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (141, "")


def test_flags_win_over_the_file_and_the_file_over_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text("training: {num_epochs: 7, ema_decay: 0.5}\n", encoding="utf-8")
    words = ["config", "--recipe", "robust", "--config", str(tmp_path / "own.yaml"), "--epochs", "3", "--json"]
    assert main.main(words) == 0
    training = json.loads(capsys.readouterr().out)["training"]
    assert (training["progressive_resizing"], training["ema_decay"], training["num_epochs"]) == (96, 0.5, 3)


def test_an_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "--recipe", "robus"]) == 2
    err = capsys.readouterr().err
    assert "--recipe robus: not one of convnext, densenet121" in err and "robust" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in main.RECIPES.glob("*.yaml")))
def test_a_recipe_is_a_configuration_that_holds_together(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config", "--recipe", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) != json.loads(json.dumps(Config().to_dict()))


@pytest.mark.parametrize("flag", ["--write-manifest", "--output-dir"])
def test_an_audit_names_the_flag_of_a_place_that_cannot_be_written(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    target = tmp_path / "file" / ("m.csv" if flag == "--write-manifest" else "out")
    words = ["audit", str(films), "--output-dir", str(tmp_path / "out"), flag, str(target), "--quiet"]
    assert main.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {flag} {tmp_path}/file") and "cannot be written" in line
    assert not list(tmp_path.rglob("audit.*"))  # before anything was read


def test_sigterm_while_a_mistake_is_being_told_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def tell(line: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        told.append(line)

    monkeypatch.setattr(main, "_say_once", tell)
    before = signal.getsignal(signal.SIGTERM)
    assert main.main(["predict", "nowhere.jpeg", "--checkpoint", "x.pth"]) == 2
    assert len(told) == 1 and "nowhere.jpeg" in told[0]
    assert signal.getsignal(signal.SIGTERM) is before
