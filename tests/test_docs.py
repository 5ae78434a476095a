"""README.md and docs/: what they tell the reader to type, open and import is there."""

from __future__ import annotations

import ast
import copy
import importlib.util
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from timm.models import _registry as registry

import fusion
import main
import metrics
from config import resolve
from data_preprocessing import load_manifest
from prediction_table import read_predictions
from reader_table import load_table
from study_plan import plan
from tests.test_dicom import DEEP
from tests.test_dicom import film as dicom_film
from tests.test_imports import FLOORS

ROOT = Path(main.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Fence:
    """What stands between two ``` lines."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each line, less variables set before it; a backslash at its end joins the next."""
        if self.language not in ("", "sh", "bash", "console"):
            return []
        lines = self.text.replace("\\\n", " ").replace(".venv/bin/python", "python").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [list(itertools.dropwhile(ASSIGNMENT.fullmatch, line)) for line in words]


def fences(page: Path) -> Iterator[Fence]:
    opened: tuple[int, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            inside.append(line)
        elif opened is None:
            opened, inside = (number, line.removeprefix("```").strip()), []
        else:
            yield Fence(page, *opened, text="\n".join(inside))
            opened = None
    assert opened is None, f"{page}: the fence of line {opened} is not closed"


FENCES = [fence for page in PAGES for fence in fences(page)]
COMMANDS = [(fence, words) for fence in FENCES for words in fence.commands() if words]
VERBS = [pytest.param(words[2:], id=" ".join(words[2:])) for _, words in COMMANDS if words[:2] == ["python", "main.py"]]
OTHERS = [pytest.param(words[1:], id=" ".join(words)) for _, words in COMMANDS if words[0] == "python"]
OTHERS = [item for item in OTHERS if item.values[0][0] != "main.py"]
TARGETS = sorted({words[1] for _, words in COMMANDS if words[0] == "make"})
PYTHON = [pytest.param(fence, id=fence.name) for fence in FENCES if fence.language == "python"]
TABLES = [pytest.param(fence, id=fence.name) for fence in FENCES if fence.language == "csv"]


def test_the_pages_hold_what_these_tests_look_for() -> None:
    assert len(VERBS) > 20 and OTHERS and {"demo", "test"} <= set(TARGETS) and len(PYTHON) >= 8 and len(TABLES) >= 3


@pytest.mark.parametrize("words", VERBS)
def test_every_command_parses_and_its_settings_are_valid(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        arguments, extras = main.build_parser(main.VERBS)[0].parse_known_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    assert arguments.verb == words[0] and not extras
    if arguments.config is None:
        resolve(*main.layers(arguments))


@pytest.mark.parametrize("words", [item for item in VERBS if "--plan" in item.values[0]])
def test_every_plan_that_needs_no_table_has_an_answer(words: list[str]) -> None:
    arguments = main.build_parser(main.VERBS)[0].parse_args(words)
    if arguments.table is None:
        assert plan(arguments.plan)["answer"]


@pytest.mark.parametrize("words", OTHERS)
def test_every_other_python_command_names_a_module_that_runs(words: list[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
    else:
        assert 'if __name__ == "__main__":' in (ROOT / words[0]).read_text(encoding="utf-8")
    files = [word for word in words[1:] if word.endswith(".py")]
    assert all((ROOT / name).is_file() for name in files)


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_is_in_the_makefile(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    files = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in files if not (page.parent / link).exists()]


@pytest.fixture
def _registries_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is gone after it: other tests run over the registries."""
    monkeypatch.setattr(fusion, "FUSIONS", dict(fusion.FUSIONS))
    for name in [name for name in vars(registry) if name.startswith("_model")]:
        monkeypatch.setattr(registry, name, copy.copy(getattr(registry, name)))
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))


@pytest.mark.usefixtures("_registries_as_they_were")
@pytest.mark.parametrize("fence", PYTHON)
def test_every_python_example_runs(
    fence: Fence, trained: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDIMG_PSEUDONYM_KEY", "k" * 64)
    shutil.copytree(trained, tmp_path / "checkpoints")
    picture = next((films / "test" / "NORMAL").iterdir()).read_bytes()
    for name, content in (("film.jpeg", picture), ("film.png", picture), ("film.dcm", dicom_film(DEEP))):
        (tmp_path / name).write_bytes(content)
    # Large networks take tens of seconds here; which one it is changes nothing of what the example shows.
    exec(compile(fence.text.replace("resnet50", "test_efficientnet"), fence.name, "exec"), {"__name__": "__main__"})


def defined(module: str) -> set[str]:
    """Names at the top of one of our modules, read off its source: importing all of them would take seconds."""
    names: set[str] = set()
    for node in ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("fence", PYTHON)
def test_every_name_a_python_example_imports_exists(fence: Fence) -> None:
    for node in ast.walk(ast.parse(fence.text)):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            assert module and importlib.util.find_spec(module.split(".")[0]) is not None, module
        if isinstance(node, ast.ImportFrom) and node.module and (ROOT / f"{node.module}.py").is_file():
            missing = {alias.name for alias in node.names} - defined(node.module)
            assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("fence", TABLES)
def test_every_example_table_is_accepted(fence: Fence, tmp_path: Path) -> None:
    path = tmp_path / "example.csv"
    path.write_text(fence.text, encoding="utf-8")
    read = load_table if fence.text.startswith("reader,modality") else read_predictions
    assert len(read(path)) == len(fence.text.splitlines()) - 1


def test_what_the_kaggle_archive_holds_beside_the_films_is_not_read(films: Path, tmp_path: Path) -> None:
    data = tmp_path / "chest_xray"
    shutil.copytree(films, data)
    shutil.copytree(films, data / "chest_xray")
    shutil.copytree(films, data / "__MACOSX")
    for folder in (data, data / "train", data / "train" / "NORMAL"):
        (folder / ".DS_Store").write_bytes(b"\0")
        (folder / "._film.jpeg").write_bytes(b"\0")
    read = [load_manifest(resolve({"data.data_dir": str(folder)}).data) for folder in (films, data)]
    assert len(read[0].table) == len(read[1].table) and read[0].classes == read[1].classes


def test_every_recipe_has_its_row_with_time_and_score() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows if len(row) == 7 for name in re.findall(r"`(\w+)`", row[1])}
    assert named >= {path.stem for path in main.RECIPES.glob("*.yaml")}


def test_the_module_table_is_the_import_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| \S.* \|$", page, flags=re.MULTILINE)
    assert len(rows) == len({name for _, name in rows})
    assert {(int(floor), name) for floor, name in rows} == {
        (floor, name) for floor, names in enumerate(FLOORS) for name in names
    }
