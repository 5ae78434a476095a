"""predict, explain, optimize and the server with models that read notes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

import bundle
import case_engine
import case_explain
import case_optimization
import engines
import main
import predictor
import quantization
from config import resolve
from errors import CheckpointError, ConfigError, DataError
from explain import Settings
from multimodal import CaseReader, new_model
from onnx_export import parity, save_onnx
from preprocess import PreprocessSpec, apply, decode
from tabular import TableSpec
from tests.cases import TINY_CASES, film
from tests.test_inference_api import make, started
from word_attribution import values, words


def few_cases(folder: Path, manifest: Path) -> Path:
    """Four cases of `manifest` and one without a film."""
    table = pd.read_csv(manifest, keep_default_na=False).head(4)
    table["path"] = [str(manifest.parent / name) for name in table["path"]]
    extra = {"path": "", "label": "NORMAL", "patient_id": "p9", "text": "dense lungs 👍", "age": "44", "sex": "F"}
    path = folder / "few.csv"
    pd.concat([table, pd.DataFrame([extra])]).to_csv(path, index=False)
    return path


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(film(bright_left=True, rng=np.random.default_rng(5))).save(stream, "PNG")
    return stream.getvalue()


# --- predict ---------------------------------------------------------------------------------------------------


def test_a_table_of_cases_is_predicted_with_its_notes(trained_cases: Path, xor_cases: Path, tmp_path: Path) -> None:
    source = few_cases(tmp_path, xor_cases)
    model = str(trained_cases / "best_model.pth")
    assert main.main(["predict", str(source), "--checkpoint", model, "--output-dir", str(tmp_path / "out")]) == 0
    found = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(found) == 5 and Path(found["path"].iloc[4]).name.startswith("no-film-")
    stored = predictor.load(model)
    stored.attach(predictor.find_cases([str(source)]))
    expected = [item.confidence for item in stored.predict_files(list(found["path"]))]
    np.testing.assert_allclose(found["confidence"], expected, atol=1e-6)


def test_the_note_of_the_command_line_changes_the_answer(trained_cases: Path, xor_cases: Path, tmp_path: Path) -> None:
    source, model = str(xor_cases.parent / "films" / "case0001.png"), str(trained_cases / "best_model.pth")
    answers = []
    for note in ("dense lungs", "clear lungs"):
        main.main(["predict", source, "--text", note, "--checkpoint", model, "--output-dir", str(tmp_path), "--quiet"])
        answers.append(pd.read_csv(tmp_path / "predictions.csv")["probability_PNEUMONIA"][0])
    assert abs(answers[0] - answers[1]) > 0.1


def test_a_note_for_a_model_of_films_alone_is_refused(trained: Path, films: Path, tmp_path: Path) -> None:
    import predict

    with pytest.raises(ConfigError, match="reads films alone"):
        predict.predict([str(films)], checkpoint=trained / "best_model.pth", output_dir=tmp_path, note="x")


def test_a_word_in_a_numeric_column_makes_the_case_unreadable(trained_cases: Path) -> None:
    stored = predictor.load(trained_cases / "best_model.pth")
    with pytest.raises(DataError, match="age 'old' in row 1 is not a number"):
        stored.case(None, {"age": "old"})


@pytest.mark.parametrize("note", ["", "x" * 50_000, "dense " * 10_000, "肺部清晰", "👩‍⚕️🤒", "a\0b", "\ud83e"])
def test_any_note_is_answered(note: str, trained_cases: Path) -> None:
    stored = predictor.load(trained_cases / "best_model.pth")
    case = stored.case(np.full((32, 32, 1), 80, np.uint8), {"text": note})
    probabilities, _ = stored.exact_outputs(np.stack([case]))
    assert np.isfinite(probabilities).all()


# --- explain ---------------------------------------------------------------------------------------------------


def test_a_case_is_explained_by_its_film_and_its_words(trained_cases: Path, xor_cases: Path, tmp_path: Path) -> None:
    source = few_cases(tmp_path, xor_cases)
    result = case_explain.explain(
        [str(source)],
        checkpoint=trained_cases / "best_model.pth",
        output_dir=tmp_path / "out",
        settings=Settings(methods=("gradcam", "occlusion")),
    )
    assert result["cases"] == 5
    first, last = result["per_film"][0], result["per_film"][-1]
    assert [item["word"] for item in first["words"]][:2] == ["fever", ","]
    assert {item["word"] for item in first["values"]} == {"age", "sex"}
    assert set(first["files"]) == {"gradcam", "occlusion", "words"} and set(last["files"]) == {"words"}
    assert (tmp_path / "out" / "case0000_gradcam_overlay.png").exists()
    page = (tmp_path / "out" / "explanation_report.html").read_text(encoding="utf-8")
    assert "no film" in page and "👍" in page and "Weight of image" in page


def test_the_word_that_decides_has_the_strongest_evidence(trained_cases: Path) -> None:
    stored = predictor.load(trained_cases / "best_model.pth")
    engine: Any = stored.engine
    note = "fever , dense lungs ."
    picture = film(bright_left=True, rng=np.random.default_rng(0))[..., None]
    row = np.stack([stored.case(picture, {"text": note})])
    found = {item.word: abs(item.evidence) for item in words(engine, row, note, target=1)}
    assert list(found) == ["fever", ",", "dense", "lungs", "."]
    assert max(found, key=lambda word: found[word]) == "dense"


def test_the_evidence_of_a_word_is_the_logit_lost_without_it(trained_cases: Path) -> None:
    stored = predictor.load(trained_cases / "best_model.pth", precision="fp32")
    engine: Any = stored.engine
    row = np.stack([stored.case(np.full((32, 32, 1), 80, np.uint8), {"text": "dense", "age": "60"})])
    (alone,) = words(engine, row, "dense", target=1)
    whole = engine.logits(row)[0, 1]
    hidden = engine.inputs(row)
    hidden.mask_BT[:, 1] = 0
    without = engine.model(hidden)[0, 1].item()
    assert alone.evidence == pytest.approx(whole - without, abs=1e-4)
    ages = [item for item in values(engine, row, target=1) if item.word == "age"]
    no_age = engine.logits(np.stack([stored.case(np.full((32, 32, 1), 80, np.uint8), {"text": "dense"})]))[0, 1]
    assert ages[0].evidence == pytest.approx(whole - no_age, abs=1e-4)


# --- ONNX ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def optimized_cases(trained_cases: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("optimized_cases")
    budget = {f"optimization.max_{name}_drop": 1 for name in ("auc", "sensitivity", "accuracy")}
    report = case_optimization.optimize(
        trained_cases / "best_model.pth",
        [budget | {"optimization.rounds": 1, "optimization.engines": ["onnxruntime"]}],
        output_dir=folder,
    )
    return folder, report


def test_the_exported_file_takes_any_batch_and_any_length(
    optimized_cases: tuple[Path, dict[str, Any]], trained_cases: Path
) -> None:
    folder, report = optimized_cases
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert {item.name for item in session.get_inputs()} == set(case_engine.ONNX_NAMES.values())
    stored = predictor.load(trained_cases / "best_model.pth", precision="fp32")
    notes = ["", "dense", "clear lungs " * 12, "fever , cough . " * 6]
    picture = film(bright_left=True, rng=np.random.default_rng(0))[..., None]
    rows = np.stack([stored.case(picture if k % 3 else None, {"text": notes[k % 4]}) for k in range(11)])
    exported = case_engine.CaseOnnxEngine(folder / "model.onnx", stored.reader, precision="fp32")
    found = parity(stored.engine.logits, exported.logits, rows, batch_sizes=(1, 3, 11))
    assert found.largest < 1e-4
    assert report["networks"]["full"]["parity"]["largest"] < 1e-4


@pytest.mark.parametrize("fusion", ["concatenation", "cross_attention", "film", "bilinear", "late"])
def test_every_fusion_is_exported(fusion: str, xor_cases: Path, bert: Path, tmp_path: Path) -> None:

    config = resolve(TINY_CASES, {"multimodal.text_model": str(bert), "multimodal.fusion": fusion})
    table = TableSpec.fit({"age": ["20", "60"]})
    modalities = ("image", "text", "table")
    model, notes = new_model(config, modalities=modalities, table=table, classes=("a", "b"), random_image=True)
    reader = CaseReader(PreprocessSpec(32), modalities, table, notes)
    engine = case_engine.CaseTorchEngine(model, reader, device=torch.device("cpu"), precision="fp32")
    films = [film(bright_left=True, rng=np.random.default_rng(k))[..., None] if k % 3 else None for k in range(7)]
    rows = reader.rows(films, {"text": ["", "dense", "clear lungs " * 12, "a", "b", "", "fever"], "age": ["3"] * 7})
    path = case_optimization.export(engine, rows, tmp_path / "model.onnx", metadata={})
    exported = case_engine.CaseOnnxEngine(path, reader, precision="fp32")
    assert parity(engine.logits, exported.logits, rows, batch_sizes=(1, 7)).largest < 1e-4


def test_int8_is_made_and_its_differences_are_reported(optimized_cases: tuple[Path, dict[str, Any]]) -> None:
    folder, report = optimized_cases
    assert (folder / "model_int8.onnx").exists()
    rows = {row["name"]: row for row in report["candidates"]}
    assert rows["onnxruntime int8"]["size_mb"] < rows["onnxruntime fp32"]["size_mb"]
    assert rows["onnxruntime int8"]["accuracy"]["drop"]["auc_roc"] < 0.05


def test_a_bundle_predicts_as_its_checkpoint(
    optimized_cases: tuple[Path, dict[str, Any]], trained_cases: Path, xor_cases: Path
) -> None:
    folder, report = optimized_cases
    assert bundle.is_bundle(folder) and report["chosen"] is not None
    cases = predictor.find_cases([str(xor_cases)]).head(12)
    answers = []
    for source in (folder, trained_cases / "best_model.pth"):
        stored = predictor.load(source, precision="auto" if source == folder else "fp32")
        stored.attach(cases)
        answers.append([item.probabilities["PNEUMONIA"] for item in stored.predict_files(list(cases["path"]))])
    tolerance = 0.05 if "int8" in report["chosen"] else 1e-4
    np.testing.assert_allclose(answers[0], answers[1], atol=tolerance)


@pytest.mark.realdata
def test_real_encoders_become_onnx_with_both_inputs_and_int8_a_quarter_of_its_size(
    assets: Path, tmp_path: Path
) -> None:
    """An ImageNet encoder and MiniLM under new heads, on real films with their notes."""
    own = {
        "model.model_type": "tf_efficientnet_lite0",
        "model.weights": str(assets / "weights" / "tf_efficientnet_lite0.safetensors"),
        "model.freeze_backbone": True,
        "multimodal.text_model": str(assets / "weights" / "minilm"),
        "multimodal.fusion": "gated",
    }
    modalities = ("image", "text")
    torch.manual_seed(0)
    model, notes = new_model(resolve(own), modalities=modalities, table=TableSpec(()), classes=("a", "b"))
    reader = CaseReader(PreprocessSpec(224, mean=(0.5,) * 3, std=(0.5,) * 3), modalities, TableSpec(()), notes)
    manifest = assets / "data" / "covid_notes" / "manifest.csv"
    cases = pd.read_csv(manifest, keep_default_na=False).head(16)
    films = [apply(reader.spec, decode(str(manifest.parent / path), reader.spec)) for path in cases["path"]]
    rows = reader.rows([None, *films[1:]], {"text": [*cases["text"][:-1], ""]})
    engine = case_engine.CaseTorchEngine(model, reader, device=torch.device("cpu"), precision="fp32")
    path = case_optimization.export(engine, rows, tmp_path / "model.onnx", metadata={})
    exported = case_engine.CaseOnnxEngine(path, reader, precision="fp32")
    assert len(set(rows["length"].tolist())) > 8  # notes of many lengths
    assert parity(engine.logits, exported.logits, rows, batch_sizes=(1, 3, 16)).largest < 1e-4
    calibration = [exported.inputs(rows[k : k + 1]) for k in range(1, 9)]
    int8 = tmp_path / "int8.onnx"
    quantization.recipes()["NNCF asymmetric"](path, int8, calibration)
    save_onnx(quantization.with_small_weights(onnx.load(str(int8))), int8)
    exact_NC, rounded_NC = engine.logits(rows), case_engine.CaseOnnxEngine(int8, reader, precision="int8").logits(rows)
    # Of heads that learned nothing the logits are small beside the rounding: 0.4 here, 0.08 once trained; 1 is silence.
    assert np.linalg.norm(rounded_NC - exact_NC) < 0.6 * np.linalg.norm(exact_NC)
    assert int8.stat().st_size < 0.3 * path.stat().st_size


def test_the_engines_of_cases_share_the_one_core_of_the_process(
    optimized_cases: tuple[Path, dict[str, Any]], trained_cases: Path
) -> None:
    made = engines.openvino_core.cache_info().currsize
    stored = predictor.load(trained_cases / "best_model.pth", precision="fp32")
    assert stored.reader is not None
    found = case_engine.CaseOnnxEngine(
        optimized_cases[0] / "model.onnx", stored.reader, precision="fp32", kind="openvino"
    )
    rows = np.stack([stored.case(None, {"text": "dense"})])
    np.testing.assert_allclose(found.logits(rows), stored.engine.logits(rows), atol=1e-3)
    assert made <= engines.openvino_core.cache_info().currsize == 1
    source = Path(case_engine.__file__).read_text(encoding="utf-8")
    assert ".Core(" not in source


def test_pruning_of_cases_is_refused(trained_cases: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--prune"):
        case_optimization.optimize(
            trained_cases / "best_model.pth", [{"optimization.prune": True}], output_dir=tmp_path
        )


def test_a_damaged_bundle_is_one_line(optimized_cases: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(optimized_cases[0], folder)
    with (folder / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="hash mismatch"):
        predictor.load(folder)


# --- the server ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(trained_cases: Path) -> Iterator[TestClient]:
    client = started(make(trained_cases))
    yield client
    client.__exit__(None, None, None)


def upload() -> dict[str, Any]:
    return {"file": ("film", png())}


def test_a_note_sent_with_a_film_is_read(client: TestClient, trained_cases: Path) -> None:
    stored = predictor.load(trained_cases / "best_model.pth", device="cpu", precision="fp32")
    answers = []
    for note in ("dense lungs", "clear lungs", ""):
        found = client.post("/predict", files=upload(), data={"text": note, "age": "50", "sex": "F"}).json()
        case = stored.case(apply(stored.spec, decode(png())), {"text": note, "age": "50", "sex": "F"})
        expected = stored.exact_outputs(np.stack([case]))[0][0]
        assert list(found["probabilities"].values()) == expected.tolist()
        answers.append(found["probabilities"]["PNEUMONIA"])
    assert len(set(answers)) == 3


def test_a_film_alone_is_answered_as_a_case_without_a_note(client: TestClient) -> None:
    alone = client.post("/predict", files=upload()).json()
    assert alone["probabilities"] == client.post("/predict", files=upload(), data={"text": ""}).json()["probabilities"]


def test_a_batch_takes_a_case_for_each_file(client: TestClient) -> None:
    files = [("files", ("a", png())), ("files", ("b", png()))]
    cases = [{"text": "dense lungs"}, {"text": "clear lungs", "age": 61}]
    found = client.post("/predict/batch", files=files, data={"cases": json.dumps(cases)}).json()["predictions"]
    single = client.post("/predict", files=upload(), data={"text": "clear lungs", "age": "61"}).json()
    assert found[1]["probabilities"] == single["probabilities"] != found[0]["probabilities"]


@pytest.mark.parametrize("cases", ["{", "[]", "[1, 2]", '{"text": "x"}'])
def test_cases_that_are_no_list_for_the_files_are_refused(cases: str, client: TestClient) -> None:
    files = [("files", ("a", png())), ("files", ("b", png()))]
    assert client.post("/predict/batch", files=files, data={"cases": cases}).status_code == 422


@pytest.mark.parametrize(
    "note", ["x" * 50_000, "dense " * 10_000, "肺部清晰", "👩‍⚕️🤒", "a\0b", "<script>", "'; DROP TABLE films; --"]
)
def test_any_note_is_answered_over_http(note: str, client: TestClient) -> None:
    answer = client.post("/predict", files=upload(), data={"text": note})
    assert answer.status_code == 200 and sum(answer.json()["probabilities"].values()) == pytest.approx(1)


def test_a_value_that_is_no_number_is_refused_with_its_reason(client: TestClient) -> None:
    answer = client.post("/predict", files=upload(), data={"age": "old"})
    assert answer.status_code == 422 and "age" in answer.json()["detail"]


def test_an_explanation_names_the_words(client: TestClient) -> None:
    found = client.post("/explain", files=upload(), data={"text": "fever , dense lungs"}).json()
    assert [item["word"] for item in found["words"]] == ["fever", ",", "dense", "lungs"]
    assert found["overlay_png"]


def test_the_server_says_what_it_reads(client: TestClient) -> None:
    assert client.get("/model/info").json()["reads"] == ["text", "age", "sex"]


def test_a_note_to_a_model_of_films_alone_is_refused(trained: Path) -> None:
    client = started(make(trained))
    try:
        assert client.get("/model/info").json()["reads"] == []
        assert client.post("/predict", files=upload(), data={"text": "dense"}).status_code == 422
    finally:
        client.__exit__(None, None, None)
