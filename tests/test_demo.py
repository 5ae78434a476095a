"""demo.py and demo_page.py: every part of the tour is made, shown and listed on one page that links to nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import candidates
import demo
import demo_page
import main
import optimization
from config import Overrides
from tests.conftest import TINY

SMALL: Overrides = {**TINY, "training.num_epochs": 1, "evaluation.bootstrap_resamples": 100}
PARTS = {"synthetic_films", "run", "evaluation", "predictions", "explanations", "optimized_models"}


@pytest.fixture(scope="module", params=[False, True], ids=["films", "notes"])
def toured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a tour with a tiny network on few small films, without and with notes, and its result."""
    folder = tmp_path_factory.mktemp("tour")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_CACHE_DIR", str(folder / "elsewhere"))
        patch.setattr(demo, "PATIENTS", {"train": 24, "test": 12})
        patch.setattr(demo, "FILM_SIDE", 40)
        # A fresh process for each candidate takes seconds: it has a test of its own.
        patch.setattr(optimization, "cold_start", lambda *_, **__: candidates.ColdStart(1.5, 300.0))
        return folder, demo.demo(folder, multimodal=request.param, overrides=[SMALL])


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.parts[0] != "cache" and path.suffix != ".jpeg"}


def linked(page: str) -> list[str]:
    return [unquote(link) for link in re.findall(r"(?:href|src)='([^']*)'", page)]


def test_every_part_of_the_tour_was_made(toured: tuple[Path, dict[str, Any]]) -> None:
    folder, result = toured
    text = {"text_encoder"} if result["multimodal"] else set()
    assert {name.split("/")[0] for name in files(folder)} == PARTS | text | {"index.html"}
    assert len(list((folder / "explanations").glob("*_overlay.png"))) == 2 * demo.EXAMPLES
    assert (folder / "optimized_models" / "model_int8.onnx").exists()
    assert (len(list((folder / "explanations").glob("*_words.json"))) > 0) == result["multimodal"]


def test_the_page_lists_every_file_made(toured: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = toured
    page = (folder / "index.html").read_text(encoding="utf-8")
    made = files(folder) - {"index.html"}
    assert {item.relative_to(folder).as_posix() for each in demo_page.listed(folder).values() for item in each} == made
    assert made <= set(linked(page))


def test_what_an_earlier_tour_left_is_not_listed(tmp_path: Path) -> None:
    for name, time in (("modalities.csv", 1_000), ("report.html", 2_000)):
        (tmp_path / "evaluation").mkdir(exist_ok=True)
        (tmp_path / "evaluation" / name).write_text("x")
        os.utime(tmp_path / "evaluation" / name, (time, time))
    assert set(demo_page.listed(tmp_path, since=1_500.5)) == {"evaluation/report.html"}
    assert len(demo_page.listed(tmp_path)) == 2


def test_every_link_of_the_page_leads_to_a_file_beside_it(toured: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = toured
    page = (folder / "index.html").read_text(encoding="utf-8")
    links = linked(page)
    assert len(links) > 30 and not [link for link in links if not (folder / link).is_file()]
    assert "http" not in page and "<script" not in page


def test_the_page_shows_the_examples_with_their_notes(toured: tuple[Path, dict[str, Any]]) -> None:
    folder, result = toured
    page = (folder / "index.html").read_text(encoding="utf-8")
    rows = demo._rows(folder / "synthetic_films" / "examples.csv")
    assert [row["label"] for row in rows] == ["NORMAL"] * demo.EXAMPLES + ["PNEUMONIA"] * demo.EXAMPLES
    assert len({row["patient_id"] for row in rows}) == len(rows) and {row["split"] for row in rows} == {"test"}
    for row in rows:
        assert f"synthetic_films/{row['path']}" in page
        assert f"explanations/{Path(row['path']).stem}_overlay.png" in page
    assert f"{result['test']['auc_roc']['value']:.3f}" in page


def test_ages_and_sexes_were_compared(toured: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = toured
    assert {"age", "sex"} <= set((folder / "evaluation" / "metrics.json").read_text(encoding="utf-8").split('"'))


def test_the_commands_to_go_on_with_parse(toured: tuple[Path, dict[str, Any]]) -> None:
    _, result = toured
    said = demo.summary(result)
    for command in result["commands"]:
        assert f"\n  {command}" in said
        words = command.split()
        assert words[:2] == ["python", "main.py"]
        arguments, extras = main.build_parser(main.VERBS)[0].parse_known_args(words[2:])
        assert arguments.verb == words[2] and not extras


def test_the_demo_verb_takes_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[bool, Sequence[Overrides]]] = []

    def tour(folder: Path, *, multimodal: bool, overrides: Sequence[Overrides]) -> dict[str, Any]:
        asked.append((multimodal, overrides))
        return {}

    monkeypatch.setattr(demo, "demo", tour)
    monkeypatch.setattr(demo, "summary", lambda result: "")
    assert main.main(["demo", "--multimodal", "--epochs", "2", "--output-dir", str(tmp_path)]) == 0
    assert asked[0][0] and asked[0][1][-1]["training.num_epochs"] == 2


def test_the_tour_as_it_stands_ends_with_a_model_that_found_the_opacities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "cold_start", lambda *_, **__: candidates.ColdStart(1.5, 300.0))
    result = demo.demo(tmp_path, overrides=[{"runtime.device": "cpu"}])
    assert result["test"]["auc_roc"]["value"] >= 0.9
    assert all(Path(path).exists() for path in result["artefacts"].values())
    assert "go on with:" in demo.summary(result)
