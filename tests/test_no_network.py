"""In a normal run no verb that reads films, notes or weights opens a connection or prints a warning.

A hub name without a hub is one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import main
from tests.cases import TINY_CASES
from tests.conftest import TINY

ROOT = Path(main.__file__).parent

# An audit hook sees what any Python code does with sockets, whichever library does it, and cannot be taken off again. A
# socket of the machine's own file system asks nobody.
HOOK = textwrap.dedent(
    """
    import sys

    tried = []

    def refuse(event, arguments):
        if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.connect"):
            if event == "socket.connect" and isinstance(arguments[1], (str, bytes)):
                return
            tried.append(f"{event} {arguments[1:] if event == 'socket.connect' else arguments[:2]}")
            raise OSError(f"the network was asked: {tried[-1]}")

    sys.addaudithook(refuse)
    """
)

# Many verbs in one process: libraries take seconds to load. `optimize` would start a process for each candidate.
RUN = HOOK + textwrap.dedent(
    """
    import contextlib, io, json
    import candidates, main, optimization

    optimization.cold_start = lambda *_, **__: candidates.ColdStart(1.5, 300.0)
    for words in json.loads(sys.argv[1]):
        said, told = io.StringIO(), io.StringIO()
        tried.clear()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            code = main.main(words)
        print(json.dumps({"verb": words[0], "code": code, "out": said.getvalue(), "err": told.getvalue(),
                          "tried": list(tried)}), flush=True)
    """
)


def started(code: str, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own; nothing tells the hubs' clients that there is no network."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own |= {"OMP_NUM_THREADS": "1", "MEDIMG_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    own |= {"HF_HOME": str(folder / "hub"), **environment}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=folder, env=own)


def settings(chosen: Mapping[str, Any] = TINY) -> list[str]:
    """`--set` for a tiny run of the tests."""
    return [word for name, value in chosen.items() for word in ("--set", f"{name}={str(value).lower()}")]


VERBS = ("audit", "train", "evaluate", "predict", "explain", "optimize", "train_multimodal", "doctor")


@pytest.fixture(scope="module")
def tour(
    films: Path, xor_cases: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What each verb did, from class folders to a bundle, with sockets that refuse."""
    folder = tmp_path_factory.mktemp("tour")
    model = ["--checkpoint", str(folder / "run" / "best_model.pth")]
    words = {
        "audit": ["audit", str(films)],
        "train": ["train", "--data-dir", str(films), "--output-dir", str(folder / "run"), *settings()],
        "evaluate": ["evaluate", *model, "--set", "evaluation.bootstrap_resamples=100"],
        "predict": ["predict", str(films / "test"), *model],
        "explain": ["explain", str(next((films / "test" / "NORMAL").iterdir())), *model],
        "optimize": [
            *("optimize", *model, "--engines", "onnxruntime,openvino", "--set", "optimization.rounds=1"),
            *(f"--max-{name}-drop=1" for name in ("auc", "sensitivity", "accuracy")),
        ],
        "train_multimodal": [
            *("train_multimodal", "--manifest", str(xor_cases), "--text-model", str(bert)),
            *("--output-dir", str(folder / "cases"), *settings(TINY_CASES)),
        ],
        "doctor": ["doctor"],
    }
    done = started(RUN, json.dumps([[*words[name], "--json"] for name in VERBS]), folder=folder)
    # What is written past Python's streams, by a library's own code, would stand here.
    assert (done.returncode, done.stderr) == (0, "")
    return {facts["verb"]: facts for facts in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_opens_no_connection(verb: str, tour: dict[str, dict[str, Any]]) -> None:
    # optimize may find nothing faster than torch on so small a network, and audit something grave: 3.
    assert tour[verb]["code"] in ((0, 3) if verb in ("audit", "optimize") else (0,))
    assert tour[verb]["tried"] == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_normal_run_warns_of_nothing_and_prints_its_result_alone(verb: str, tour: dict[str, dict[str, Any]]) -> None:
    assert "Warning" not in tour[verb]["err"]
    assert isinstance(json.loads(tour[verb]["out"]), dict)


@pytest.mark.parametrize("ask", ["urllib.request.urlopen('http://127.0.0.1:9')", "httpx.get('http://localhost:9')"])
def test_the_hook_sees_what_libraries_do(ask: str, tmp_path: Path) -> None:
    code = f"{HOOK}\nimport httpx, urllib.request\ntry: {ask}\nexcept Exception: pass\nprint(tried)"
    assert "socket." in started(code, folder=tmp_path).stdout


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["train", "--model", "resnet18", "--image-size", "32"], "--weights FILE.safetensors"),
        (
            ["train_multimodal", "--no-pretrained", "--model", "test_efficientnet", "--text-model", "someone/bert"],
            "folder",
        ),
    ],
    ids=["weights", "text encoder"],
)
def test_a_hub_name_without_a_hub_is_one_line(
    words: list[str], remedy: str, films: Path, xor_cases: Path, tmp_path: Path
) -> None:
    data = ["--data-dir", str(films)] if words[0] == "train" else ["--manifest", str(xor_cases)]
    code = f"{HOOK}\nimport json, main\nsys.exit(main.main(json.loads(sys.argv[1])))"
    line = json.dumps([*words, *data, "--output-dir", str(tmp_path / "run"), "--quiet"])
    done = started(code, line, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (said,) = done.stderr.splitlines()
    assert str(tmp_path / "hub") in said and remedy in said
