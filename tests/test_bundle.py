"""bundle.py and predictor.load: a bundle is used as it was written, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import bundle
import engines
import evaluate
import main
import predict
import predictor
from errors import CheckpointError, ConfigError
from onnx_export import read_metadata


@pytest.fixture
def copied(optimized: Path, trained: Path, tmp_path: Path) -> Path:
    """A bundle that may be changed, beside the checkpoint it was made from."""
    shutil.copytree(optimized, tmp_path / "bundle")
    facts = json.loads((tmp_path / "bundle" / bundle.FACTS).read_text())
    facts["checkpoint"]["path"] = str(trained / "best_model.pth")
    (tmp_path / "bundle" / bundle.FACTS).write_text(json.dumps(facts))
    return tmp_path / "bundle"


def change(folder: Path, **values: object) -> Path:
    facts = json.loads((folder / bundle.FACTS).read_text())
    (folder / bundle.FACTS).write_text(json.dumps({**facts, **values}))
    return folder


def films_of(folder: Path) -> list[str]:
    return [str(item) for item in sorted((folder / "test").rglob("*.jpeg"))]


def test_it_names_its_checkpoint_relative_to_itself(optimized: Path, trained: Path) -> None:
    facts = json.loads((optimized / bundle.FACTS).read_text())
    assert not Path(facts["checkpoint"]["path"]).is_absolute()
    assert (optimized / facts["checkpoint"]["path"]).resolve() == (trained / "best_model.pth").resolve()
    assert facts["checkpoint"]["sha256"] == bundle.sha256(trained / "best_model.pth")


def test_the_onnx_file_says_what_it_is(optimized: Path) -> None:
    facts = json.loads((optimized / bundle.FACTS).read_text())
    stored = read_metadata(optimized / bundle.FLOAT_FILE)
    assert stored == {name: facts[name] for name in ("classes", "preprocess", "temperature", "operating_point")}


def test_a_bundle_knows_the_films_of_training(optimized: Path, trained: Path) -> None:
    of_checkpoint = predictor.load(trained / "best_model.pth", device="cpu")
    np.testing.assert_array_equal(bundle.read(optimized).seen_films, of_checkpoint.seen_films)


def test_float_bundles_predict_what_the_checkpoint_predicts(copied: Path, trained: Path, films: Path) -> None:
    model = predictor.load(trained / "best_model.pth", device="cpu", precision="fp32")
    paths = films_of(films)[:8]
    expected = [item.probabilities["PNEUMONIA"] for item in model.predict_files(paths)]
    for engine in ("openvino", "onnxruntime"):
        stored = predictor.load(change(copied, engine=engine, precision="fp32", file=bundle.FLOAT_FILE))
        assert stored.engine.name == f"{engine} fp32"
        assert (stored.classes, stored.threshold, stored.spec) == (model.classes, model.threshold, model.spec)
        found = [item.probabilities["PNEUMONIA"] for item in stored.predict_files(paths)]
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_bundle_for_torch_runs_the_checkpoint_itself(copied: Path, trained: Path, films: Path) -> None:
    change(copied, engine="torch", precision="fp32", file=None)
    paths = films_of(films)[:3]
    expected = predictor.load(trained / "best_model.pth", device="cpu", precision="fp32").predict_files(paths)
    found = predictor.load(copied, device="cpu").predict_files(paths)
    assert list(found) == list(expected)
    change(copied, checkpoint={"path": "../elsewhere.pth", "sha256": "0"})
    with pytest.raises(CheckpointError, match="gone or changed; run optimize again"):
        predictor.load(copied)


@pytest.mark.parametrize("name", [bundle.FLOAT_FILE, bundle.INT8_FILE, bundle.RECORDS])
def test_a_changed_byte_is_refused(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: hash mismatch.*run optimize again"):
        predictor.load(copied)


def test_a_missing_file_is_refused(copied: Path) -> None:
    (copied / bundle.INT8_FILE).unlink()
    with pytest.raises(CheckpointError, match="model_int8.onnx: missing from the bundle"):
        predictor.load(copied)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged, not JSON"),
        ("[]", "not the description of a bundle"),
        ('{"format_version": 99}', "format 99 is newer"),
        ('{"format_version": 1}', "classes, preprocess, .* missing or of another kind"),
    ],
)
def test_a_damaged_description_is_one_line(copied: Path, text: str, said: str) -> None:
    (copied / bundle.FACTS).write_text(text)
    with pytest.raises(CheckpointError, match=said) as caught:
        predictor.load(copied)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_hash_is_refused(copied: Path) -> None:
    with pytest.raises(CheckpointError, match="no hash of other.onnx"):
        predictor.load(change(copied, file="other.onnx"))
    hashes = json.loads((copied / bundle.FACTS).read_text())["hashes"]
    rest = {name: digest for name, digest in hashes.items() if name != bundle.RECORDS}
    with pytest.raises(CheckpointError, match="no hash of records.pth"):
        predictor.load(change(copied, file=bundle.FLOAT_FILE, hashes=rest))


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        predictor.load(tmp_path)
    with pytest.raises(CheckpointError, match="no bundle .no bundle.json"):
        bundle.read(tmp_path)


def test_an_engine_missing_here_gives_way_to_one_that_runs_the_same_file(
    copied: Path, films: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change(copied, engine="openvino", precision="int8+bf16", file=bundle.INT8_FILE)
    why = {"openvino": "openvino is not installed (pip install openvino)"}
    monkeypatch.setattr(predictor, "why_absent", lambda kind: why.get(kind))
    caplog.set_level("WARNING", "medimg")
    stored = predictor.load(copied)
    assert stored.engine.name == "onnxruntime int8"
    assert "pip install openvino" in caplog.text and "using onnxruntime" in caplog.text
    monkeypatch.setattr(predictor, "why_absent", lambda kind: f"no {kind} (pip install {kind})")
    with pytest.raises(ConfigError, match="engine openvino: no openvino .pip install openvino"):
        predictor.load(copied)


def test_flags_that_contradict_the_choice_are_refused(optimized: Path) -> None:
    with pytest.raises(ConfigError, match="--precision fp16: .* was chosen in"):
        predictor.load(optimized, precision="fp16")
    with pytest.raises(ConfigError, match="--model resnet50: .* holds a test_efficientnet"):
        predictor.load(optimized, model_type="resnet50")


def test_predict_takes_a_bundle(optimized: Path, films: Path, tmp_path: Path) -> None:
    result = predict.predict([str(films / "test")], checkpoint=optimized, output_dir=tmp_path)
    assert result["films"] == sum(result["predicted"].values()) == 40
    table = pd.read_csv(tmp_path / "predictions.csv")
    np.testing.assert_allclose(table[["probability_NORMAL", "probability_PNEUMONIA"]].sum(axis=1), 1, atol=1e-5)


def test_evaluate_takes_a_bundle_and_names_what_ran(optimized: Path, tmp_path: Path) -> None:
    found = evaluate.evaluate(optimized, [{"evaluation.bootstrap_resamples": 100}], output_dir=tmp_path)
    assert found["n"] == 40
    assert found["source"]["sha256"] == bundle.sha256(optimized / bundle.FACTS)
    assert found["source"]["engine"] == predictor.load(optimized).engine.name


def test_measuring_a_bundle_on_films_it_was_trained_on_is_refused(
    optimized: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(films / "train", tmp_path / "other" / "test")
    words = ["evaluate", "--bundle", str(optimized), "--data-dir", str(tmp_path / "other"), "--quiet"]
    assert main.main([*words, "--output-dir", str(tmp_path / "out")]) == 2
    assert "were trained or validated on" in capsys.readouterr().err


def test_the_triton_repository_describes_the_chosen_file(optimized: Path) -> None:
    facts = json.loads((optimized / bundle.FACTS).read_text())
    folder = optimized / "triton" / "test_efficientnet"
    assert bundle.sha256(folder / "1" / "model.onnx") in facts["hashes"].values()
    text = (folder / "config.pbtxt").read_text()
    assert 'platform: "onnxruntime_onnx"' in text and "dynamic_batching" in text
    assert 'name: "input" data_type: TYPE_FP32 dims: [ 3, 32, 32 ]' in text
    assert 'name: "logits" data_type: TYPE_FP32 dims: [ 2 ]' in text
    quoted = next(line for line in text.splitlines() if 'key: "classes"' in line).split("string_value: ")[1]
    assert json.loads(json.loads(quoted[: quoted.rindex('"') + 1])) == facts["classes"]


def test_the_engines_module_knows_every_engine_a_bundle_may_name() -> None:
    assert set(engines.PROVIDERS) | {"openvino"} == set(engines.ONNX_ENGINES)
