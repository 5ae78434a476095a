"""examples/quickstart.ipynb: a valid notebook without outputs, whose cells run from top to bottom."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest

import main

ROOT = Path(main.__file__).parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def code(notebook: Any) -> list[str]:
    return [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_holds_no_outputs_and_no_counts(notebook: Any) -> None:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_its_code_is_linted_as_ours(notebook: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", str(NOTEBOOK)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_it_uses_no_private_name_and_no_argparse(notebook: Any) -> None:
    text = "\n".join(code(notebook))
    assert "argparse" not in text and "._" not in text and "import _" not in text


def test_it_runs_from_top_to_bottom_and_its_model_found_the_opacities(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)  # where Jupyter starts it
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.path", list(sys.path))
    drawn: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: (drawn.append(len(plt.gcf().axes)), plt.close("all")))
    plt.switch_backend("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(code(notebook)):
        exec(compile(source, f"cell {number}", "exec"), names)
    assert drawn == [6, 1, 2, 6]
    assert names["report"]["metrics"]["auc_roc"]["value"] > 0.75
    assert os.path.commonpath([names["result"].best_model, tmp_path]) == str(tmp_path)
    assert {found.prediction for found in names["predictor"].predict_files(list(names["examples"]["path"]))} <= set(
        names["manifest"].classes
    )
