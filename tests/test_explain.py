"""The verb explain: files, report, checks and remarks on films made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import explain
import main
from errors import ConfigError, DataError
from explain import Settings, output_names, remarks
from preprocess import apply, decode


def run(sources: list[Path], trained: Path, out: Path, **settings: object) -> dict:
    chosen = Settings(**{"sanity_films": 4, "n_boot": 200, **settings})
    return explain.explain(
        [str(item) for item in sources],
        checkpoint=trained / "best_model.pth",
        output_dir=out,
        settings=chosen,
        device="cpu",
    )


@pytest.fixture(scope="module")
def explained(films: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The test films explained by two methods. Not to be changed."""
    out = tmp_path_factory.mktemp("explained")
    return out, run([films / "test"], trained, out, methods=("gradcam", "occlusion"))


def test_every_film_gets_an_overlay_and_its_arrays(explained: tuple[Path, dict], films: Path, trained: Path) -> None:
    out, result = explained
    assert result["films"] == len(result["per_film"]) == 40
    model = explain.torch_model(trained / "best_model.pth", device="cpu")
    for row in result["per_film"][:5]:
        for method in ("gradcam", "occlusion"):
            names = row["files"][method]
            picture = cv2.imread(str(out / names["overlay"]))
            assert picture.shape == (32, 32, 3)
            with np.load(out / names["attribution"]) as arrays:
                assert arrays["attribution"].shape == arrays["map"].shape == (32, 32)
                assert arrays["attribution"].dtype == np.float32
                assert np.array_equal(arrays["image"], apply(model.spec, decode(row["path"])))
                assert str(arrays["method"]) == method and str(arrays["target_class"]) == row["target"]
                assert float(arrays["probability"]) == pytest.approx(row["probabilities"][row["target"]])


def test_what_is_explained_is_what_predict_says(explained: tuple[Path, dict], trained: Path) -> None:
    from predictor import load

    rows = explained[1]["per_film"]
    predictor = load(trained / "best_model.pth", device="cpu", precision="fp32")
    for row, found in zip(rows, predictor.predict_files([row["path"] for row in rows])):
        assert row["prediction"] == row["target"] == found.prediction
        assert row["probabilities"] == pytest.approx(found.probabilities, abs=1e-5)


def test_the_report_holds_the_checks_of_every_method(explained: tuple[Path, dict]) -> None:
    out, result = explained
    stored = json.loads((out / "explanation.json").read_text())
    assert stored["methods"].keys() == {"gradcam", "occlusion"}
    for method in stored["methods"].values():
        assert method["randomisation"].keys() == {"head", "last_stage", "all"}
        assert len(method["deletion"]["curve"]) == len(method["insertion"]["random_curve"])
        assert {item["severity"] for item in method["remarks"]} <= {"ok", "unknown", "warning"}
    page = (out / "explanation_report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == explain.SHOWN_FILMS * 3
    assert "Grad-CAM" in page and "Occlusion" in page and "<script" not in page and "http" not in page
    for words in explain.summary(result).splitlines():
        assert words


def test_the_shares_are_means_over_the_films(explained: tuple[Path, dict]) -> None:
    rows, found = explained[1]["per_film"], explained[1]["methods"]["occlusion"]["pointing"]["border"]
    shares = [row["pointing"]["occlusion"]["border"]["share"] for row in rows]
    assert found["share"]["value"] == pytest.approx(np.nanmean(shares))
    assert found["share"]["ci_low"] < found["share"]["value"] < found["share"]["ci_high"]
    assert explained[1]["patients"] == 20 and "20 patients" not in found["share"]["method"]
    assert "patients" in found["share"]["method"]


def test_one_method_needs_no_name_in_the_files(films: Path, trained: Path, tmp_path: Path) -> None:
    film = sorted((films / "test" / "NORMAL").iterdir())[0]
    result = run([film], trained, tmp_path, sanity_films=0, target="PNEUMONIA")
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        f"{film.stem}_attribution.npz",
        f"{film.stem}_overlay.png",
        "explanation.json",
        "explanation_report.html",
    ]
    assert result["per_film"][0]["target"] == "PNEUMONIA"
    assert "not checked" in (tmp_path / "explanation_report.html").read_text()


def test_one_film_is_explained_without_intervals(films: Path, trained: Path, tmp_path: Path) -> None:
    film = sorted((films / "test" / "NORMAL").iterdir())[0]
    method = run([film], trained, tmp_path)["methods"]["gradcam"]
    assert all(item["severity"] != "warning" for item in method["remarks"] if "few films" in item["text"])
    assert json.loads((tmp_path / "explanation.json").read_text())["films"] == 1


def test_films_of_one_name_do_not_overwrite_each_other() -> None:
    assert output_names(["a/x.png", "b/x.png", "b/y.png", "c/x.jpeg"]) == ["x", "x_2", "y", "x_3"]
    assert output_names(["a/x.png", "b/x.png", "c/x_2.png"]) == ["x", "x_2", "x_2_2"]


def test_an_unreadable_film_is_listed_and_the_others_explained(films: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(sorted((films / "test" / "NORMAL").iterdir())[0], folder / "good.jpeg")
    (folder / "bad.jpeg").write_bytes(b"no film")
    result = run([folder], trained, tmp_path / "out", sanity_films=0)
    assert result["films"] == 1 and [Path(item).name for item in result["unreadable"]] == ["bad.jpeg"]
    (folder / "good.jpeg").unlink()
    with pytest.raises(DataError, match="^[^ ]*bad.jpeg: "):
        run([folder], trained, tmp_path / "out")
    (folder / "worse.jpeg").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 2 films can be read: [^ ]*bad.jpeg: "):
        run([folder], trained, tmp_path / "out")


def test_a_map_lies_on_the_film_as_the_model_saw_it(trained: Path, tmp_path: Path) -> None:
    """A wide film is squashed: overlay and map have the model's frame, not that of the file."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90), dtype=np.uint8)).save(tmp_path / "wide.png")
    run([tmp_path / "wide.png"], trained, tmp_path / "out", sanity_films=0)
    assert cv2.imread(str(tmp_path / "out" / "wide_overlay.png")).shape == (32, 32, 3)


# --- remarks ---------------------------------------------------------------------------------------------------


def estimate(value: float, low: float, high: float) -> dict:
    return {"value": value, "ci_low": low, "ci_high": high, "n": 20}


def numbers(*, border: tuple[float, float], spearman: float, gain: tuple[float, float]) -> dict:
    """A method's numbers; intervals as (low, high) around their middle."""

    def around(limits: tuple[float, float]) -> dict:
        return estimate(sum(limits) / 2, *limits)

    curve = {"auc": estimate(0.5, 0.4, 0.6), "random_auc": estimate(0.6, 0.5, 0.7), "gain": around(gain)}
    region = {"films": 20, "share": estimate(0.4, 0.3, 0.5), "area": 0.27, "verdict": explain._side(around(border))}
    lungs = region | {"verdict": "towards"}
    return {
        "pointing": {"border": region, "text": {"films": 0, "verdict": "unknown"}, "centre": lungs},
        "randomisation": {"all": {"spearman": estimate(spearman, spearman - 0.1, spearman + 0.1), "flat": 0}},
        "deletion": curve,
        "insertion": curve,
    }


def warnings(method: dict) -> list[str]:
    return [item["text"] for item in remarks(method) if item["severity"] == "warning"]


def test_a_model_that_looks_at_the_border_is_said_to() -> None:
    found = warnings(numbers(border=(0.05, 0.2), spearman=0.1, gain=(0.1, 0.2)))
    assert found == ["the model looks at the border: 40.0 % of the attribution on 27.0 % of the area"]


def test_few_films_allow_no_conclusion() -> None:
    assert explain._side({"value": 0.2, "ci_low": 0.1, "ci_high": 0.3, "n": 7}) == "unknown"
    assert explain._side({"value": 0.2, "ci_low": 0.1, "ci_high": 0.3, "n": 8}) == "towards"
    assert explain._side(estimate(-0.2, -0.3, -0.1)) == "past"
    assert explain._side(estimate(0.0, -0.1, 0.1)) == "even"


def test_nothing_is_warned_of_when_all_is_well() -> None:
    assert warnings(numbers(border=(-0.2, -0.05), spearman=0.1, gain=(0.1, 0.2))) == []


def test_maps_that_do_not_depend_on_the_weights_are_called_so() -> None:
    found = warnings(numbers(border=(-0.2, -0.05), spearman=0.9, gain=(0.1, 0.2)))
    assert len(found) == 1 and "hardly depend on what the model has learnt" in found[0]


def test_an_order_no_better_than_chance_is_called_so() -> None:
    found = warnings(numbers(border=(-0.2, -0.05), spearman=0.1, gain=(-0.1, 0.2)))
    assert len(found) == 2 and all("not shown to beat a random order" in item for item in found)


def test_a_model_that_reads_the_border_is_caught(trained: Path, tmp_path: Path) -> None:
    """End to end: only the frame of these films differs, and integrated gradients must say that the border is read."""
    model = explain.torch_model(trained / "best_model.pth", device="cpu")
    frame = torch.zeros(32, 32)
    frame[:2], frame[-2:], frame[:, :2], frame[:, -2:] = 1, 1, 1, 1

    class ReadsFrame(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (images * frame).mean(dim=(2, 3))[:, :1]

    model.model.backbone = ReadsFrame()
    model.model.head = torch.nn.Sequential(torch.nn.Linear(1, 2))
    with torch.no_grad():
        model.model.head[0].weight.copy_(torch.tensor([[-1.0], [1.0]]))
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(60, 255, (32, 32), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(6)]
    settings = Settings(methods=("integrated_gradients",), target="PNEUMONIA", n_boot=200)
    excess = []
    for film in explain.explain_films(model, paths, settings):
        facts = explain.film_row(film, model.classes)["pointing"]["integrated_gradients"]["border"]
        excess.append(facts["share"] - facts["area"])
    assert min(excess) > 0.3


# --- command line ----------------------------------------------------------------------------------------------


def test_the_verb_prints_its_result_as_json(
    films: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", str(films / "test" / "NORMAL"), "--checkpoint", str(trained / "best_model.pth")]
    words += ["--method", "gradcam++,layercam", "--sanity-films", "2", "--device", "cpu", "--quiet", "--json"]
    assert main.main([*words, "--output-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["methods"].keys() == {"gradcam++", "layercam"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "x.pth"], "name films or folders, or ask for the worst ones"),
        (["{film}"], "name the model with --checkpoint FILE, or --bundle DIR"),
        (["{film}", "--checkpoint", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
        (["{film}", "--bundle", "nowhere"], "--bundle nowhere: no such folder"),
        (["nowhere.png", "--checkpoint", "{checkpoint}"], "nowhere.png: no such file or folder"),
        (["{film}", "--checkpoint", "{checkpoint}", "--method", "gradcan"], "did you mean 'gradcam'"),
        (["{film}", "--checkpoint", "{checkpoint}", "--target", "PNEUMONA"], "did you mean 'PNEUMONIA'"),
        (["{film}", "--checkpoint", "{checkpoint}", "--opacity", "2"], "--opacity: 2 is out of range"),
        (["{film}", "--checkpoint", "{checkpoint}", "--sanity-films", "-1"], "--sanity-films: -1"),
        (["{film}", "--checkpoint", "{checkpoint}", "--layer", "backbone.nose"], "no module 'backbone.nose'"),
        (["{film}", "--checkpoint", "{checkpoint}", "--model", "resnet50"], "holds a test_efficientnet"),
        (["{film}", "--worst", "3", "--checkpoint", "{checkpoint}"], "drop the films named"),
        (["--worst", "0", "--checkpoint", "{checkpoint}"], "--worst: 0 is no number of films"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    films: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    film = str(sorted((films / "test" / "NORMAL").iterdir())[0])
    names = {"{film}": film, "{checkpoint}": str(trained / "best_model.pth")}
    words = ["explain", *(names.get(word, word) for word in words), "--device", "cpu", "--output-dir", str(tmp_path)]
    assert main.main([*words, "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_settings_are_checked_when_made() -> None:
    with pytest.raises(ConfigError, match="'scorecam' is not one of"):
        Settings(methods=("scorecam",))


# --- real films ------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_maps_of_real_films_and_real_weights_equal_the_library_s(assets: Path) -> None:
    from pytorch_grad_cam import GradCAM

    from attribution import target_layer
    from engines import InputScaling
    from models import create_model
    from preprocess import PreprocessSpec

    weights = assets / "weights" / "tf_efficientnet_lite0.safetensors"
    torch.manual_seed(0)
    model = create_model("tf_efficientnet_lite0", 2, weights=weights).eval()
    spec = PreprocessSpec(mean=(0.5,) * 3, std=(0.5,) * 3)
    paths = sorted((assets / "data" / "chest_xray" / "test" / "PNEUMONIA").iterdir())[:4]
    images = np.stack([apply(spec, decode(path)) for path in paths])
    layer = model.get_submodule(target_layer(model, 224))
    expected = GradCAM(model, [layer])(InputScaling(spec)(torch.as_tensor(images)), None)
    assert np.ptp(expected, axis=(1, 2)).min() > 0.9
    assert np.abs(explain.heat_map(model, spec, images) - expected).max() < 1e-4


@pytest.mark.realdata
def test_dicom_films_are_explained_like_any_other(assets: Path, trained: Path, tmp_path: Path) -> None:
    film = assets / "data" / "dicom" / "chest_mono2_jpeg_baseline.dcm"
    result = run([film], trained, tmp_path, sanity_films=0)
    assert result["films"] == 1 and (tmp_path / f"{film.stem}_overlay.png").exists()
