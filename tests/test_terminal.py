"""What verbs print: nothing when quiet, one JSON object when asked, tables of 80 columns, no colour with NO_COLOR."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import main
import runtime
from tests.test_no_network import settings

ROOT = Path(main.__file__).parent
PREDICTIONS = "path,label,patient_id,probability_NORMAL,probability_PNEUMONIA\n" + "".join(
    f"{k}.png,{'PNEUMONIA' if k % 2 else 'NORMAL'},p{k // 2},{1 - p:.2f},{p:.2f}\n"
    for k, p in enumerate((0.1, 0.8, 0.3, 0.4, 0.2, 0.9, 0.6, 0.7, 0.15, 0.55))
)
READERS = "reader,modality,case,truth,score\n" + "".join(
    f"r{reader},{modality},c{case},{case % 2},{(case * 7 + reader * 3 + offset + 4 * (case % 2)) % 11}\n"
    for reader in range(3)
    for offset, modality in enumerate(("with", "without"))
    for case in range(10)
)
FEW = ["--set", "evaluation.bootstrap_resamples=100"]

COMMANDS = {
    "audit": ["audit", "FILMS"],
    "train": ["train", "--data-dir", "FILMS", "--output-dir", "run", *settings(), "--epochs", "1"],
    "evaluate": ["evaluate", "--checkpoint", "CK", *FEW],
    "evaluate a table": ["evaluate", "--predictions", "a.csv", *FEW],
    "compare": ["compare", "--predictions", "a.csv", "a.csv", *FEW],
    "reader_study": ["reader_study", "--table", "readers.csv", *FEW],
    "plan": ["reader_study", "--plan", "one_auc", "auc=0.8", "power=0.8"],
    "predict": ["predict", "FILMS/test", "--checkpoint", "CK"],
    "explain": ["explain", "FILM", "--checkpoint", "CK", "--sanity-films", "0"],
    "worst": ["explain", "--worst", "2", "--checkpoint", "CK", "--sanity-films", "0"],
    "config": ["config"],
    "doctor": ["doctor"],
}


Run = Callable[..., tuple[int, str, str]]


def exit_codes(name: str) -> tuple[int, ...]:
    """Those of a run that went well: audit may find something grave and end with 3."""
    return (0, 3) if name == "audit" else (0,)


@pytest.fixture
def run(
    trained: Path,
    films: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """A verb run in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text(PREDICTIONS)
    (tmp_path / "readers.csv").write_text(READERS)
    places = {"CK": trained / "best_model.pth", "FILMS": films, "FILMS/test": films / "test"}
    places["FILM"] = next((films / "test" / "NORMAL").iterdir())

    def given(name: str, *flags: str) -> tuple[int, str, str]:
        code = main.main([str(places.get(word, word)) for word in (*COMMANDS[name], *flags)])
        said = capfd.readouterr()
        return code, said.out, said.err

    return given


@pytest.mark.parametrize("name", COMMANDS)
def test_a_quiet_verb_says_nothing(name: str, run: Run) -> None:
    code, out, err = run(name, "--quiet")
    assert code in exit_codes(name) and (out, err) == ("", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_object_and_stands_alone_on_stdout(name: str, run: Run) -> None:
    code, out, _ = run(name, "--json")
    assert code in exit_codes(name) and isinstance(json.loads(out), dict)


@pytest.mark.parametrize("name", ["evaluate", "compare", "reader_study", "plan", "doctor", "audit"])
def test_a_table_fits_80_columns(name: str, run: Run) -> None:
    _, out, _ = run(name)
    # A row of a table has its fields set apart by several blanks; sentences wrap wherever they are read.
    rows = [line for line in out.splitlines() if re.search(r"\S {2,}\S", line)]
    assert out.strip() and not [line for line in rows if len(line) > 80 and "/" not in line], rows


PROGRESS = """
import sys
sys.path.insert(0, {root!r})
import runtime
runtime.setup_logging(quiet=False)
for item in runtime.progress(range(40), total=40, label="decoding"): pass
"""


def test_progress_is_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: float(next(seconds)))
    runtime.setup_logging(quiet=False)
    assert list(runtime.progress(range(25), total=25, label="decoding")) == list(range(25))
    assert capfd.readouterr().err.splitlines() == [
        "decoding: 11/25 films, 1.0/s, 14 s left",
        "decoding: 22/25 films, 1.0/s, 3 s left",
    ]


@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_takes_the_colours_off_a_bar(no_color: bool) -> None:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    own, other = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm-256color"}
    environment |= {"NO_COLOR": "1"} if no_color else {}
    code = PROGRESS.format(root=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=other, env=environment)
    os.close(other)
    said = b""
    while True:
        try:
            part = os.read(own, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not part:
            break
        said += part
    os.close(own)
    assert process.wait(timeout=60) == 0 and b"decoding" in said
    colours = re.findall(rb"\x1b\[[0-9;]*3[0-7][0-9;]*m|\x1b\[38;", said)
    assert bool(colours) != no_color
