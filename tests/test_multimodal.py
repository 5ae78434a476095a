"""multimodal, fusion, case_training: what can be learned together, what is missing, what must not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import case_training
import checkpoint
import fusion
import multimodal
import predictor
import text_encoder
from case_training import by_length, kept_modalities, train_multimodal
from config import Config, ModelConfig, MultimodalConfig, resolve
from data_preprocessing import Request
from errors import CheckpointError, ConfigError, DataError
from multimodal import CaseHead, CaseInputs
from tests.cases import TINY_CASES, write_bert, write_cases

CAN_SOLVE_XOR = ("concatenation", "cross_attention", "gated", "film", "bilinear")


def configured(manifest: Path, bert: Path, folder: Path, **settings: Any) -> Config:
    own = {"data.manifest": str(manifest), "multimodal.text_model": str(bert), "runtime.output_dir": str(folder)}
    return resolve(TINY_CASES, own, {name.replace("__", "."): value for name, value in settings.items()})


# --- fusion ----------------------------------------------------------------------------------------------------


def cases_of(*, present: list[list[float]], tokens: bool, seed: int = 0) -> CaseInputs:
    """Random encoded cases, `present` (B, 3) says which of film, note and table each has."""
    generator = torch.Generator().manual_seed(seed)
    present_BM = torch.tensor(present)
    mask_BT = torch.ones(len(present), 5) * present_BM[:, 1:2]
    return CaseInputs(
        has_image_B=present_BM[:, 0],
        mask_BT=mask_BT,
        table_BK=torch.randn(len(present), 4, generator=generator),
        has_table_B=present_BM[:, 2],
        image_features=torch.randn(len(present), *([9] if tokens else []), 24, generator=generator),
        text_features=torch.randn(len(present), *([5] if tokens else []), 16, generator=generator),
    )


def head_of(name: str) -> CaseHead:
    torch.manual_seed(0)
    settings = MultimodalConfig(fusion=name, width=32)
    return CaseHead({"image": 24, "text": 16, "table": 4}, num_classes=3, settings=settings, model=ModelConfig()).eval()


@pytest.mark.parametrize("name", fusion.FUSIONS)
def test_every_registered_fusion_gives_finite_logits_whatever_is_missing(name: str) -> None:
    head = head_of(name)
    present = [[a, b, c] for a in (0.0, 1.0) for b in (0.0, 1.0) for c in (0.0, 1.0)]
    said = head(cases_of(present=present, tokens=head.fusion.needs_tokens))
    assert said.heads_BXC.shape == (8, 4, 3) and said.heads_BXC.isfinite().all()
    if said.weights_BM is not None:
        torch.testing.assert_close(said.weights_BM.sum(dim=1), torch.ones(8))
        shown = torch.tensor(present)
        assert (said.weights_BM[1:][shown[1:] == 0] < 1e-6).all()


@pytest.mark.parametrize("name", fusion.FUSIONS)
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_what_stands_in_the_place_of_a_missing_modality_is_not_looked_at(name: str, missing: int) -> None:
    head = head_of(name)
    present = [[1.0, 1.0, 1.0]] * 2
    for row in present:
        row[missing] = 0.0
    case = cases_of(present=present, tokens=head.fusion.needs_tokens)
    field = ("image_features", "text_features", "table_BK")[missing]
    other = replace(case, **{field: getattr(case, field) * -7 + 3})
    assert torch.equal(head(case).heads_BXC, head(other).heads_BXC)


@pytest.mark.parametrize("name", fusion.FUSIONS)
def test_padding_of_a_note_changes_nothing(name: str) -> None:
    head = head_of(name)
    case = cases_of(present=[[1.0, 1.0, 1.0]] * 2, tokens=True)
    if not head.fusion.needs_tokens:
        case = replace(case, image_features=case.image_features.mean(dim=1))
    longer = torch.cat([case.text_features, torch.randn(2, 6, 16)], dim=1)
    wide = replace(case, text_features=longer, mask_BT=torch.cat([case.mask_BT, torch.zeros(2, 6)], dim=1))
    torch.testing.assert_close(head(case).heads_BXC, head(wide).heads_BXC, rtol=1e-5, atol=1e-6)


def test_an_unknown_fusion_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gated'"):
        fusion.fusion_class("gatted")


def test_a_new_fusion_is_one_class() -> None:
    class Loudest(fusion.Fusion):
        name = "loudest"
        least = 1

        def output_width(self) -> int:
            return self.width

        def forward(self, encoded: fusion.Encoded) -> fusion.Fused:
            return fusion.Fused(self.classifier(encoded.vectors_BMW.amax(dim=1)), None)

    try:
        said = head_of("loudest")(cases_of(present=[[1.0, 1.0, 0.0]], tokens=False))
        assert said.heads_BXC.shape == (1, 4, 3)
    finally:
        del fusion.FUSIONS["loudest"]


def test_a_fusion_that_needs_two_modalities_says_so() -> None:
    with pytest.raises(ConfigError, match="gated joins 2 modalities or more, and there is text only"):
        fusion.create_fusion("gated", modalities=["text"], width=8, num_classes=2, dropout_rate=0, hidden=8, heads=2)


# --- the task neither can solve alone --------------------------------------------------------------------------


def branch_scores(folder: Path, manifest: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and positive-class scores (N, X) of the test cases, fused first."""
    stored = predictor.load(folder / "best_model.pth", device="cpu", precision="fp32")
    table = pd.read_csv(folder / "split.csv")
    known = pd.read_csv(manifest, keep_default_na=False).set_index("path")
    test = table[table["split"] == "test"].reset_index(drop=True)
    rows = test.join(known[["text", "age", "sex"]], on="path")
    rows["path"] = [str(manifest.parent / name) for name in rows["path"]]
    stored.attach(rows)
    decoded = np.stack([stored.decoded(path) for path in rows["path"]])
    logits_NXC = stored.engine.everything(decoded).heads_BXC.numpy()
    return (rows["label"] == "PNEUMONIA").to_numpy(), logits_NXC[..., 1] - logits_NXC[..., 0]


@pytest.mark.parametrize("name", [*CAN_SOLVE_XOR, "late"])
def test_xor_of_film_and_word_is_solved_together_and_not_alone(
    name: str, xor_cases: Path, bert: Path, tmp_path: Path
) -> None:
    config = configured(
        xor_cases,
        bert,
        tmp_path,
        multimodal__fusion=name,
        training__num_epochs=40,
        training__learning_rate=5e-3,
        training__early_stopping_patience=8,
        multimodal__modality_dropout=0.05,
        data__test_fraction=0.4,
    )
    train_multimodal(config)
    labels, scores = branch_scores(tmp_path, xor_cases)
    fused, image, text = (roc_auc_score(labels, scores[:, head]) for head in range(3))
    assert image == pytest.approx(0.5, abs=0.1) and text == pytest.approx(0.5, abs=0.1)
    if name == "late":
        assert fused < 0.75  # an average cannot say that the note turns the film's meaning round
    else:
        assert fused >= 0.95


# --- training --------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(xor_cases: Path, bert: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model__freeze_backbone": False,
        "multimodal__text_layers": 1,
        "training__num_epochs": 3,
        "training__keep_checkpoints": 5,
        "data__augmentation_prob": 0.5,
        "multimodal__fusion": "cross_attention",
    }
    train_multimodal(configured(xor_cases, bert, tmp_path / "whole", **settings))
    train_multimodal(configured(xor_cases, bert, tmp_path / "parts", **settings))
    for path in (tmp_path / "parts").glob("*3.pth"):
        path.unlink()
    path, config = case_training.resume_config(tmp_path / "parts")
    train_multimodal(config, resume=path)
    whole, parts = (checkpoint.load(tmp_path / name / "checkpoint_epoch_3.pth") for name in ("whole", "parts"))
    for name, value in whole["model_state_dict"].items():
        assert torch.equal(value, parts["model_state_dict"][name]), name
    assert whole["multimodal"] == parts["multimodal"]


def test_frozen_encoders_run_once_a_view_and_once_a_note(
    xor_cases: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDIMG_CACHE_DIR", str(tmp_path / "cache"))
    notes = 0
    counted = text_encoder.TextEncoder.forward

    def count(self: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        nonlocal notes
        notes += len(ids_BT)
        return counted(self, ids_BT, mask_BT)

    films: list[int] = []
    whole = multimodal.film_features

    def film_features(backbone: Any, image_BCHW: torch.Tensor, *, tokens: bool) -> torch.Tensor:
        films.append(len(image_BCHW))
        return whole(backbone, image_BCHW, tokens=tokens)

    monkeypatch.setattr(text_encoder.TextEncoder, "forward", count)
    for module in (multimodal, case_training):
        monkeypatch.setattr(module, "film_features", film_features)
    config = configured(xor_cases, bert, tmp_path / "run", training__num_epochs=6, training__cached_views=2)
    config = replace(config, data=replace(config.data, augmentation_prob=0.5))
    train_multimodal(config)
    split = pd.read_csv(tmp_path / "run" / "split.csv")["split"].value_counts()
    # Both encoders see the validation cases once more at the end, for the operating points of the whole network.
    assert notes <= 4 + split["val"]  # four different notes
    probes = 64  # of the cut, and of the engines that contend for the frozen part
    assert sum(films) <= 2 * split["train"] + 2 * split["val"] + probes


def test_modality_dropout_takes_what_is_there_but_never_the_last_one() -> None:
    present = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]] * 500, dtype=np.float32)
    kept = kept_modalities(present, 0.5, np.random.default_rng(0))
    left = kept * present
    assert (left.sum(axis=1)[present.sum(axis=1) > 0] >= 1).all()
    assert (kept[1::4, 0] == 1).all()
    gone = 1 - left[0::4].mean()
    assert 0.4 < gone < 0.5  # half, less what is given back to those that lost all
    assert (kept_modalities(present, 0.0, np.random.default_rng(0)) == 1).all()


def test_batches_sorted_by_length_hold_the_same_films_in_batches_of_like_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 200, 256)
    requests = [Request(3, part) for part in rng.permutation(256).reshape(16, 16)]
    found = by_length(requests, lengths, seed=1, epoch=3)
    assert sorted(np.concatenate([item.positions for item in found])) == list(range(256))
    spread = [np.ptp(lengths[item.positions]) for item in found]
    assert np.mean(spread) < 0.3 * np.mean([np.ptp(lengths[item.positions]) for item in requests])
    again = by_length(requests, lengths, seed=1, epoch=3)
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(found, again))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("missing", ["text", "film"])
def test_rows_may_lack_their_note_or_their_film(missing: str, share: float, bert: Path, tmp_path: Path) -> None:
    lost = {"no_text": share} if missing == "text" else {"no_film": share}
    manifest = write_cases(tmp_path / "data", count=120, xor=False, **lost)
    config = configured(manifest, bert, tmp_path / "run", multimodal__modalities=["image", "text"])
    train_multimodal(config)
    stored = predictor.load(tmp_path / "run" / "best_model.pth")
    rows = pd.read_csv(manifest, keep_default_na=False)
    rows["path"] = [str(manifest.parent / (name or "no-film-x")) for name in rows["path"]]
    stored.attach(rows)
    results = list(stored.predict_files(list(rows["path"])))
    assert len(results) == 120
    assert all(0 <= item.probabilities["PNEUMONIA"] <= 1 for item in results)


def test_the_order_and_the_company_of_cases_change_no_bit(trained_cases: Path, xor_cases: Path) -> None:
    stored = predictor.load(trained_cases / "best_model.pth")
    rows = pd.read_csv(xor_cases, keep_default_na=False).head(20)
    rows["path"] = [str(xor_cases.parent / name) for name in rows["path"]]
    rows.loc[3, "text"] = "dense lungs . " * 20
    stored.attach(rows)
    forward = {item.path: item.probabilities for item in stored.predict_files(list(rows["path"]))}
    backward = {item.path: item.probabilities for item in stored.predict_files(list(rows["path"])[::-1], batch_size=3)}
    assert forward == backward


# --- the checkpoint --------------------------------------------------------------------------------------------


def test_a_checkpoint_alone_is_enough_to_predict(
    xor_cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bert(tmp_path / "bert")
    train_multimodal(configured(xor_cases, folder, tmp_path / "run"))
    (folder / "vocab.txt").unlink()
    (folder / "config.json").unlink()
    monkeypatch.chdir(tmp_path)
    stored = predictor.load(tmp_path / "run" / "best_model.pth")
    case = stored.case(np.full((32, 32, 1), 99, np.uint8), {"text": "dense lungs"})
    assert stored.exact_outputs(np.stack([case]))[0].sum() == pytest.approx(1)


def test_a_checkpoint_holds_plain_values_and_operating_points_of_every_head(trained_cases: Path) -> None:
    content = checkpoint.load(trained_cases / "best_model.pth")
    assert content["multimodal"]["modalities"] == ["image", "text", "table"]
    assert set(content["branches"]) == {"image", "text", "table"}
    assert all(item["temperature"] > 0 for item in content["branches"].values())


def test_a_run_goes_on_without_the_folder_of_its_text_encoder(xor_cases: Path, tmp_path: Path) -> None:
    import shutil

    folder = write_bert(tmp_path / "bert")
    train_multimodal(configured(xor_cases, folder, tmp_path / "run", training__num_epochs=1))
    shutil.rmtree(folder)
    path, config = case_training.resume_config(tmp_path / "run", {"training.num_epochs": 2})
    assert train_multimodal(config, resume=path).epochs == 2


def test_train_refuses_to_go_on_with_a_model_that_reads_notes(trained_cases: Path) -> None:
    import train

    path, config = train.resume_config(trained_cases)
    with pytest.raises(ConfigError, match="train_multimodal --resume"):
        train.train(config, resume=path)


def test_changed_notes_stop_a_resume(xor_cases: Path, bert: Path, tmp_path: Path) -> None:
    manifest = write_cases(tmp_path / "data", count=80)
    train_multimodal(configured(manifest, bert, tmp_path / "run"))
    manifest.write_text(manifest.read_text().replace("dense", "clear"))
    path, config = case_training.resume_config(tmp_path / "run")
    with pytest.raises(DataError, match="the notes or the table are not those"):
        train_multimodal(config, resume=path)


# --- mistakes --------------------------------------------------------------------------------------------------


def test_data_without_notes_are_answered_with_a_table_that_would_do(films: Path, bert: Path, tmp_path: Path) -> None:
    config = resolve(TINY_CASES, {"data.data_dir": str(films), "runtime.output_dir": str(tmp_path / "run")})
    with pytest.raises(DataError, match="no notes") as stopped:
        train_multimodal(config)
    example = str(stopped.value).split("would do:\n")[1]
    assert len(example.splitlines()) == 3
    (tmp_path / "example.csv").write_text(example)
    table = pd.read_csv(tmp_path / "example.csv")
    assert list(table.columns) == ["path", "label", "patient_id", "text"] and len(table) == 2


def test_a_column_that_is_not_there_is_named(xor_cases: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'weight'.*age, sex"):
        train_multimodal(configured(xor_cases, bert, tmp_path, multimodal__columns=["weight"]))


def test_settings_of_film_models_are_refused(xor_cases: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.mixup_alpha: is for models that read films alone"):
        train_multimodal(configured(xor_cases, bert, tmp_path, training__mixup_alpha=0.2))


def test_a_row_without_a_film_is_an_error_where_films_are_all_there_is(bert: Path, tmp_path: Path) -> None:
    import train

    manifest = write_cases(tmp_path / "data", count=40, no_film=0.5)
    with pytest.raises(DataError, match="empty path"):
        train.train(configured(manifest, bert, tmp_path / "run"))


def test_a_damaged_description_is_one_line(trained_cases: Path, tmp_path: Path) -> None:
    content = checkpoint.load(trained_cases / "best_model.pth")
    del content["multimodal"]["terms"]
    checkpoint.save(tmp_path / "damaged.pth", content)
    with pytest.raises(CheckpointError, match="damaged"):
        predictor.load(tmp_path / "damaged.pth")


def test_self_check_says_ok(capsys: pytest.CaptureFixture[str]) -> None:
    multimodal.self_check()
    assert capsys.readouterr().out.endswith("multimodal: ok\n")
