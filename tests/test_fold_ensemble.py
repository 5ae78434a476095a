"""fold_ensemble.py: the models of a cross-validation as one predictor, in every verb that takes a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

import attribution
import attribution_checks
import checkpoint
import crossval as cv
import evaluate
import fold_ensemble
import main
import predictor
from calibration import fit_temperature
from case_optimization import optimize
from config import ServingConfig, resolve
from engines import InputScaling
from errors import CheckpointError, ConfigError, DataError
from metrics import choose_threshold
from serving_security import ApiKeys
from serving_service import Service
from tests.conftest import TINY
from tests.test_inference_api import started

FOLDS = (1, 2, 3)


@pytest.fixture(scope="module")
def folder(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cross-validation of three folds, on films of 48 patients. Not to be changed."""
    folder = tmp_path_factory.mktemp("folds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIMG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "pixel_cache"))
        cv.crossval(resolve(TINY, {"data.data_dir": str(films)}), folds=3, repeats=1, output_dir=folder)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of `folder`, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "folds"))


def member_file(folder: Path, fold: int) -> Path:
    return folder / "repeat_1" / f"fold_{fold}" / checkpoint.BEST


def loaded(path: Path) -> predictor.Predictor:
    return predictor.load(path, device="cpu", precision="fp32")


def paths_of_test(films: Path) -> list[str]:
    return sorted(str(path) for path in (films / "test").rglob("*.jp*g"))


@pytest.fixture
def pixels(folder: Path, films: Path) -> Any:
    """Six test films as the models see them, three of each class."""
    stored = loaded(folder)
    return stored.readable(paths_of_test(films)[::7])[0]


# --- the mean --------------------------------------------------------------------------------------------------


def test_the_ensemble_is_the_mean_of_the_members_calibrated_log_odds(folder: Path, pixels: Any) -> None:
    stored = loaded(folder)
    logs = [np.log(loaded(member_file(folder, fold)).probabilities(pixels)) for fold in FOLDS]
    expected = softmax(np.mean(logs, axis=0) / stored.temperature, axis=1)
    np.testing.assert_allclose(stored.probabilities(pixels), expected, atol=1e-6)
    assert np.ptp(expected[:, 0]) > 1e-3 and np.abs(logs[0] - logs[1]).max() > 1e-3  # else any mean would do


@pytest.mark.parametrize("name", ["crossval.json", "ensemble.json"])
def test_folder_and_files_name_the_same_predictor(name: str, folder: Path, pixels: Any) -> None:
    first, second = loaded(folder), loaded(folder / name)
    assert np.array_equal(first.probabilities(pixels), second.probabilities(pixels))
    assert second.engine.name == "torch fp32, 3 folds" and second.threshold == first.threshold


def test_a_film_alone_gets_the_bits_it_gets_among_others(folder: Path, pixels: Any) -> None:
    stored = loaded(folder)
    together, features = stored.exact_outputs(pixels)
    alone = [stored.exact_outputs(pixels[k : k + 1]) for k in range(len(pixels))]
    assert np.array_equal(together, np.concatenate([item[0] for item in alone]))
    first = loaded(member_file(folder, 1)).exact_outputs(pixels)[1]
    assert np.array_equal(features, first)  # those the input gate knows


def test_temperature_and_operating_point_come_from_films_that_no_model_saw(folder: Path) -> None:
    stored = loaded(folder)
    parts = [pd.read_csv(member_file(folder, fold).parent / cv.FOLD_PREDICTIONS) for fold in FOLDS]
    films = pd.concat(parts)
    truth = (films["label"] == "PNEUMONIA").to_numpy()
    logs = np.log(films[["probability_NORMAL", "probability_PNEUMONIA"]].to_numpy())
    temperature = fit_temperature(logs, truth.astype(int))
    assert stored.temperature == pytest.approx(temperature)
    scores = softmax(logs / temperature, axis=1)[:, 1]
    point = choose_threshold(truth, scores, rule=stored.config.training.operating_point)
    assert stored.operating_point["rule"] == point.rule and stored.threshold == pytest.approx(point.threshold)
    assert stored.operating_point["sensitivity"] == pytest.approx(truth[scores >= point.threshold].sum() / truth.sum())
    own = pd.read_csv(folder / fold_ensemble.VALIDATION).set_index("path")
    np.testing.assert_allclose(own.loc[films["path"], "probability_PNEUMONIA"], scores)
    assert ((own["prediction"] == "PNEUMONIA") == (own["probability_PNEUMONIA"] >= stored.threshold)).all()


def test_repeats_are_averaged_as_log_probabilities() -> None:
    p = np.array([[0.05, 0.25, 0.7], [0.9, 0.02, 0.08], [1.0, 0.0, 0.0]])  # the arithmetic mean says n
    films = pd.DataFrame({"path": ["a", "a", "b"], "patient_id": ["x", "x", "y"], "label": ["v", "v", "n"]})
    films[["probability_n", "probability_b", "probability_v"]] = p
    mean = cv.LogOddsMean.of(films, ("n", "b", "v"))
    assert mean.labels_N.tolist() == [2, 0] and mean.table["path"].tolist() == ["a", "b"]
    np.testing.assert_allclose(mean.logits_NC[0], np.log(p[:2]).mean(axis=0))
    assert np.isfinite(mean.logits_NC).all()
    table = mean.as_table(("n", "b", "v"), None, temperature=1.0, operating_point={"rule": "argmax"})
    assert table["prediction"].tolist() == ["v", "n"] and (table["split"] == "val").all()


def test_crossval_json_says_what_was_chosen(folder: Path) -> None:
    said = json.loads((folder / "crossval.json").read_text())["ensemble"]
    stored = loaded(folder)
    assert said["members"] == 3 and said["temperature"] == stored.temperature
    assert said["operating_point"] == stored.operating_point


# --- the verbs -------------------------------------------------------------------------------------------------


def test_every_member_saw_films_that_are_refused_as_test_films(folder: Path, films: Path, tmp_path: Path) -> None:
    stored = loaded(folder)
    seen = [set(loaded(member_file(folder, fold)).seen_films.tolist()) for fold in FOLDS]
    assert set(stored.seen_films.tolist()) == set.union(*seen) and len(stored.seen_films) > max(map(len, seen))
    with pytest.raises(DataError, match="96 of the 96 films to measure were trained or validated on"):
        evaluate.evaluate(
            folder, [{"data.data_dir": str(films), "evaluation.split": "train"}], output_dir=tmp_path / "out"
        )


def test_evaluate_measures_test_with_the_out_of_fold_films_as_validation(
    folder: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--checkpoint", str(folder), "--output-dir", str(tmp_path), "--device", "cpu", "--quiet"]
    assert main.main(words) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())
    stored = predictor.load(folder, device="cpu")
    assert result["n"] == 40 and result["source"]["films_of_training"] is True
    assert result["operating_point"]["threshold"] == stored.threshold
    assert result["source"]["file"] == folder.name and len(result["source"]["sha256"]) == 64
    known = pd.read_csv(tmp_path / "predictions.csv")
    said = [item.probabilities["PNEUMONIA"] for item in stored.predict_files([str(films / p) for p in known["path"]])]
    np.testing.assert_allclose(known["probability_PNEUMONIA"], said, atol=1e-6)
    validation, reason = evaluate.validation_films(stored, None, stored.config)
    assert validation is not None and len(validation.table) == 96 and reason == ""


def test_data_without_a_test_split_leave_nothing_to_measure_the_ensemble_on(films: Path, tmp_path: Path) -> None:
    rows = [f"{path},{path.parent.name}" for path in sorted((films / "train").rglob("*.jp*g"))]
    (tmp_path / "films.csv").write_text("path,label\n" + "\n".join(rows), encoding="utf-8")
    config = resolve(TINY, {"data.manifest": str(tmp_path / "films.csv"), "training.num_epochs": 1})
    cv.crossval(config, folds=2, repeats=1, output_dir=tmp_path / "folds")
    with pytest.raises(DataError, match=r"split 'test' has no films in .*; there are train \(96\)"):
        evaluate.evaluate(tmp_path / "folds", output_dir=tmp_path / "out")


def test_predict_takes_a_crossval_folder(folder: Path, films: Path, tmp_path: Path) -> None:
    words = ["predict", str(films / "test"), "--checkpoint", str(folder / "crossval.json"), "--output-dir"]
    assert main.main([*words, str(tmp_path), "--device", "cpu", "--quiet"]) == 0
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 40


def test_explain_takes_a_crossval_folder(folder: Path, films: Path, tmp_path: Path) -> None:
    words = ["explain", str(films / "test" / "NORMAL"), "--checkpoint", str(folder), "--output-dir", str(tmp_path)]
    assert main.main([*words, "--device", "cpu", "--sanity-films", "4", "--quiet"]) == 0
    assert len(list(tmp_path.glob("*_overlay.png"))) == 20
    said = json.loads((tmp_path / "explanation.json").read_text())
    assert said["sanity_films"] == 4 and said["checkpoint"] == folder.name


def test_the_films_to_look_at_again_are_found(folder: Path, tmp_path: Path) -> None:
    words = ["explain", "--worst", "4", "--split", "test", "--checkpoint", str(folder), "--output-dir", str(tmp_path)]
    assert main.main([*words, "--device", "cpu", "--sanity-films", "0", "--quiet"]) == 0
    assert (tmp_path / "contact_sheet.html").exists()


def test_the_server_answers_and_explains_as_the_command_line(folder: Path, films: Path) -> None:
    stored = loaded(folder)
    service = Service(stored, ServingConfig(), source=folder, keys=ApiKeys({}))
    client = started(service)
    try:
        film = paths_of_test(films)[0]
        answer = client.post("/predict", files={"file": ("film", Path(film).read_bytes())}).json()
        (expected,) = stored.predict_files([film])
        assert answer["probabilities"] == expected.probabilities  # type: ignore[union-attr]
        assert answer["in_distribution"] is not None  # by the gate of the first fold
        assert answer["model_version"].endswith(fold_ensemble.sha256(folder / fold_ensemble.FACTS)[:12])
        assert client.post("/explain", files={"file": ("film", Path(film).read_bytes())}).json()["heat_map_png"]
    finally:
        client.__exit__(None, None, None)


def test_optimize_refuses_several_models(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder, folder / "crossval.json"):
        with pytest.raises(ConfigError, match="the mean of several models; optimize one, such as best_model.pth"):
            optimize(path, output_dir=tmp_path)


def test_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model resnet50: .* holds a test_efficientnet"):
        predictor.load(folder, model_type="resnet50")


# --- explanations ----------------------------------------------------------------------------------------------


def test_the_evidence_for_the_mean_is_that_of_its_own_logits(folder: Path, pixels: Any) -> None:
    stored = loaded(folder)
    engine: Any = stored.engine
    found = attribution.attributions(engine.model, stored.spec, pixels, methods=["occlusion"], target=1)["occlusion"]
    inputs = InputScaling(stored.spec)(torch.tensor(pixels))
    # The rule applied to the network of the mean itself, which knows nothing of members.
    direct = attribution._occlusion(engine.model, stored.spec, inputs, torch.ones(len(pixels), dtype=torch.long), 0)
    np.testing.assert_allclose(found.raw_BSS, direct, atol=1e-5)
    assert np.abs(direct).max() > 1e-3


def test_activation_maps_are_the_members_weighed_by_their_temperatures(folder: Path, pixels: Any) -> None:
    stored = loaded(folder)
    engine: Any = stored.engine
    found = attribution.attributions(engine.model, stored.spec, pixels, methods=["gradcam"], target=1)["gradcam"]
    parts = []
    for fold in FOLDS:
        member: Any = loaded(member_file(folder, fold))
        maps = attribution.attributions(member.engine.model, stored.spec, pixels, methods=["gradcam"], target=1)
        parts.append(maps["gradcam"].raw_BSS / member.temperature)
    np.testing.assert_allclose(found.raw_BSS, np.mean(parts, axis=0), atol=1e-6)
    assert found.map_BSS.min() >= 0 and found.map_BSS.max() == pytest.approx(1, abs=1e-3)


def test_randomising_reaches_every_member(folder: Path, pixels: Any) -> None:
    engine: Any = loaded(folder).engine
    twin: Any = attribution_checks.randomised(engine.model, depth="head", seed=0)
    for own, other in zip(engine.model.classifiers, twin.classifiers):
        assert not torch.equal(own.head[-1].weight, other.head[-1].weight)
        name = next(iter(own.backbone.state_dict()))
        assert torch.equal(own.backbone.state_dict()[name], other.backbone.state_dict()[name])


# --- bad folders -----------------------------------------------------------------------------------------------


def changed(**values: Any) -> Callable[[Path], None]:
    """Sets fields of ensemble.json; None takes one away."""

    def change(folder: Path) -> None:
        path = folder / fold_ensemble.FACTS
        facts = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))

    return change


def swapped(folder: Path) -> None:
    shutil.copyfile(member_file(folder, 1), member_file(folder, 2))


def renamed_class(folder: Path) -> None:
    changed(classes=["NORMAL", "OTHER"])(folder)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unfinished": (lambda folder: (folder / "ensemble.json").unlink(), r"no ensemble .*run crossval again"),
    "not JSON": (lambda folder: (folder / "ensemble.json").write_text("{"), "damaged, not JSON"),
    "no version": (changed(format_version=None), "no format_version"),
    "newer": (changed(format_version=9), r"format 9 is newer than this program reads \(1\)"),
    "no temperature": (changed(temperature=None), "damaged: temperature missing"),
    "members without path": (changed(members=[{"sha256": "x"}]), "members without path"),
    "no members": (changed(members=[]), "names no member"),
    "member gone": (lambda folder: member_file(folder, 2).unlink(), "best_model.pth: missing from the ensemble"),
    "member swapped": (swapped, "fold_2/best_model.pth: hash mismatch"),
    "other classes": (renamed_class, "has other classes or sees films otherwise"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_bad_folder_is_one_line(what: str, copied: Path) -> None:
    damage, words = DAMAGE[what]
    damage(copied)
    with pytest.raises(CheckpointError, match=words) as caught:
        predictor.load(copied)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_crossval_is_named(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["predict", str(films / "test"), "--checkpoint", str(tmp_path / "crossval.json")]) == 2
    assert "no ensemble (no ensemble.json)" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is a folder; name a checkpoint file"):
        predictor.load(tmp_path)


def test_a_moved_folder_predicts_the_same(folder: Path, copied: Path, pixels: Any) -> None:
    assert np.array_equal(loaded(folder).probabilities(pixels), loaded(copied).probabilities(pixels))
