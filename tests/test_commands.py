"""The commands of README and docs, page by page, one after another in a folder as their reader would type them."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import pytest
from safetensors.torch import save_file

import candidates
import main
import optimization
import predictor
import synthetic
from tests.conftest import TINY
from tests.test_dicom import film as dicom_film
from tests.test_docs import COMMANDS, ROOT

SMALLER = {
    **dict.fromkeys(("resnet50", "efficientnet_b4", "tf_efficientnet_lite0"), "test_efficientnet"),
    "checkpoints/checkpoint_epoch_20.pth": "checkpoints/checkpoint_epoch_1.pth",
    **dict.fromkeys(("16", "24"), "4"),
    **dict.fromkeys(("40", "60"), "1"),
}
"""Words that name something larger than a test can wait for: networks, batches, films, trials."""
SETTINGS = TINY | {
    "data.batch_size": 4,
    "training.num_epochs": 1,
    "training.progressive_resizing": 0,
    "training.cached_views": 1,
    "evaluation.bootstrap_resamples": 100,
    "optimization.pruning_epochs": 1,
    "optimization.rounds": 1,
    "optimization.engines": "onnxruntime",
    "multimodal.max_tokens": 16,
    "multimodal.width": 16,
}
ELSEWHERE = {"distributed": "test_launcher", "api": "test_inference_api", "doctor": "test_machine_speed"}
"""Verbs that start processes, serve until they are stopped, or time the machine, and where they are run."""
NOT_HERE = "postgresql"
"""A server of its own."""
PAGES = sorted({fence.page.name for fence, words in COMMANDS if words[:2] == ["python", "main.py"]} - {"results.md"})
"""All but the record of measurements, whose commands name what lay on the machine that measured."""


def commands(page: str) -> list[list[str]]:
    """What `page` tells its reader to type, in order, less what is run elsewhere."""
    words = [words[2:] for fence, words in COMMANDS if fence.page.name == page and words[:2] == ["python", "main.py"]]
    return [item for item in words if item[0] not in ELSEWHERE and not any(NOT_HERE in word for word in item)]


def test_what_is_not_run_here_is_run_elsewhere() -> None:
    assert len(PAGES) > 10
    for verb, name in ELSEWHERE.items():
        assert f'"{verb}", "--' in (ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8")


def table(*, columns: str, prefix: str) -> str:
    """Predictions of a dozen films with `columns` beside them."""
    rows = []
    for k, p in enumerate((0.1, 0.8, 0.3, 0.4, 0.2, 0.9, 0.6, 0.7, 0.15, 0.55, 0.35, 0.65)):
        label = "PNEUMONIA" if k % 2 else "NORMAL"
        rows.append(
            f"{prefix}{k}.png,{label},{prefix}{k // 2},{20 + 5 * k},{'FM'[k % 2]},{'AB'[k % 3 > 0]},"
            + columns.format(p=p, q=1 - p, s=5 * p)
        )
    names = "score" if columns == "{s:.1f}" else "probability_NORMAL,probability_PNEUMONIA"
    return f"path,label,patient_id,age,sex,site,{names}\n" + "\n".join(rows) + "\n"


def readers() -> str:
    """Readings of three readers with and without, a patient every two cases."""
    rows = [
        f"r{reader},{modality},c{case},p{case // 2},{case % 2},{(case * 7 + reader * 3 + way + 4 * (case % 2)) % 5 + 1}"
        for reader in range(3)
        for way, modality in enumerate(("with", "without"))
        for case in range(12)
    ]
    return "reader,modality,case,patient,truth,score\n" + "\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def desk(
    films: Path, trained: Path, optimized: Path, xor_cases: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with all that the pages take for granted. Each page gets a copy."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("data/chest_xray", "films"):
        shutil.copytree(films, folder / name)
    cases = xor_cases.read_text().replace("films/", f"{xor_cases.parent}/films/")
    (folder / "cases.csv").write_text(cases)
    shutil.copytree(trained, folder / "checkpoints")
    for name in ("A.pth", "B.pth"):
        shutil.copy(trained / "best_model.pth", folder / name)
    shutil.copytree(optimized, folder / "optimized_models")
    shutil.copytree(trained, folder / trained.name)  # where the bundle looks for its checkpoint: beside itself
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copy(next((films / "test" / "NORMAL").iterdir()), folder / "film.png")
    synthetic.write_dataset(folder / "elsewhere", patients_per_class={"test": 8}, size=32, seed=9)
    backbone = predictor.load(trained / "best_model.pth").engine.model.backbone  # type: ignore[attr-defined]
    for name in ("resnet50.safetensors", "tf_efficientnet_lite0.safetensors"):
        save_file({key: value.contiguous() for key, value in backbone.state_dict().items()}, folder / name)
    both = "{q:.2f},{p:.2f}"
    for name, content in {
        "A.csv": table(columns=both, prefix="t"),
        "B.csv": table(columns=both, prefix="t"),
        "theirs.csv": table(columns=both, prefix="t"),
        "theirs_val.csv": table(columns=both, prefix="v"),
        "scores.csv": table(columns="{s:.1f}", prefix="t"),
        "T.csv": readers(),
        "pilot.csv": readers(),
        "films.csv": findings(films, ("Effusion", "Infiltration", "Atelectasis")),
    }.items():
        (folder / name).write_text(content)
    write_dicom(films, folder / "dicom_folder", part="CHEST")
    write_dicom(films, folder / "hands", part="HAND")
    return folder


def findings(films: Path, names: tuple[str, ...]) -> str:
    """A manifest of films with none, one or two of `names` each."""
    rows = []
    for k, film in enumerate(sorted(films.rglob("*.jpeg"))):
        found = [name for bit, name in enumerate(names) if k // 2 >> bit & 1]
        rows.append(f"{film},{'|'.join(found) or 'No Finding'},p{k // 2}")
    return "path,label,patient_id\n" + "\n".join(rows) + "\n"


def write_dicom(films: Path, folder: Path, *, part: str) -> None:
    """The films of `films` as DICOM, in the same class folders."""
    for k, film in enumerate(sorted(films.rglob("*.jpeg"))):
        target = folder / film.relative_to(films).with_suffix(".dcm")
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = cv2.imread(str(film), cv2.IMREAD_GRAYSCALE)
        unique = {"PatientID": f"MRN-{k // 2}", "SOPInstanceUID": f"1.2.{k}", "StudyInstanceUID": f"1.3.{k // 2}"}
        target.write_bytes(dicom_film(pixels, BodyPartExamined=part, **unique))


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in PAGES if commands(name)])
def test_the_commands_of_a_page_run_one_after_another(
    page: str,
    desk: Path,
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDIMG_PSEUDONYM_KEY", "k" * 64)
    monkeypatch.setattr(optimization, "cold_start", lambda *_, **__: candidates.ColdStart(1.5, 300.0))
    places = {
        "FOLDER": str(bert),
        "other_hospital.csv": "elsewhere/manifest.csv",
        "evaluation_results/leaking_terms.txt": "examples/terms/covid.txt",  # these notes give nothing away
    }
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={str(value).lower()}")]
    settings += ["--set", f"multimodal.text_model={bert}"]
    for words in commands(page):
        small = [SMALLER.get(word, places.get(word, word)) for word in words]
        code = main.main([small[0], *settings, *small[1:]])  # what the page sets comes later and wins
        said = capfd.readouterr()
        # audit may find something grave, and optimize nothing that is faster on so small a network: 3.
        assert code == 0 or (code == 3 and words[0] in ("audit", "optimize")), (words, said.err)
        assert said.out.strip() and "Warning" not in said.err, (words, said.err)
