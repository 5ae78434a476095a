"""explain --worst: which films are chosen, and what train --exclude makes of the marks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

import main
import review
import train
from checkpoint import load
from config import Config, DataConfig, resolve
from data_preprocessing import excluded_films, load_manifest
from errors import DataError
from explain import Settings
from explain_report import reasons_in_words
from tests.conftest import TINY


@pytest.fixture(scope="module")
def reviewed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A review of the test split. Not to be changed."""
    out = tmp_path_factory.mktemp("reviewed")
    result = review.review(
        checkpoint=trained / "best_model.pth",
        overrides=[{"evaluation.split": "test", "runtime.device": "cpu"}],
        count=9,
        output_dir=out,
        settings=Settings(batch_size=8),
    )
    return out, result


def test_the_sheet_and_the_list_hold_the_same_films(reviewed: tuple[Path, dict]) -> None:
    out, result = reviewed
    table = pd.read_csv(out / "review.csv", keep_default_na=False)
    assert list(table.columns[:5]) == ["path", "label", "prediction", "probability", "reason"]
    assert len(table) == result["chosen"] == 9 and (table["mark"] == "").all()
    assert table["path"].str.startswith("test/").all()
    page = (out / "contact_sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 18
    assert all(Path(name).name in page for name in table["path"])
    assert cv2.imread(str(out / "contact_sheet.png")).shape == (3 * (review.TILE + 50), 3 * (2 * review.TILE + 8), 3)


def test_the_sheet_shows_each_film_beside_its_map_and_says_why() -> None:
    films = [np.full((64, 128, 3), level, np.uint8) for level in (40, 160)]
    rows = [{"label": "A", "prediction": "B", "probability": "0.9", "reason": "wrong", "path": "a.png"}] * 2
    sheet = review.contact_sheet(films, rows)
    assert (sheet[: review.TILE, : 2 * review.TILE] == 40).all()
    assert (sheet[: review.TILE, 2 * review.TILE + 8 :][:, : 2 * review.TILE] == 160).all()
    assert reasons_in_words("wrong unsure influential") == "most wrong, least sure, most influential"


def test_the_first_of_each_ranking_is_chosen(reviewed: tuple[Path, dict], trained: Path) -> None:
    from predictor import load as load_predictor

    table = pd.read_csv(reviewed[0] / "review.csv", keep_default_na=False)
    predictor = load_predictor(trained / "best_model.pth", device="cpu", precision="fp32")
    folder = Path(predictor.config.data.data_dir)
    paths = sorted(str(item.relative_to(folder)) for item in (folder / "test").rglob("*.jpeg"))
    found = list(predictor.predict_files([str(folder / name) for name in paths]))
    of_label = {name: item.probabilities[Path(name).parent.name] for name, item in zip(paths, found)}
    away = {name: abs(item.probabilities["PNEUMONIA"] - predictor.threshold) for name, item in zip(paths, found)}
    assert table["path"][0] == min(of_label, key=of_label.__getitem__)
    unsure = table["path"][table["reason"].str.contains("unsure")]
    assert min(away, key=away.__getitem__) in set(unsure)
    assert {word for reason in table["reason"] for word in reason.split()} == set(review.REASONS)


def test_rankings_take_turns_and_a_film_may_have_several_reasons() -> None:
    scores = {
        "wrong": np.array([5.0, 4, 3, 2, 1]),
        "unsure": np.array([5.0, 0, 0, 0, 4]),
        "influential": np.array([0.0, 1, 2, 9, 8]),
    }
    assert review.worst(scores, 4) == {
        0: ["wrong", "unsure"],
        3: ["influential"],
        1: ["wrong"],
        4: ["unsure", "influential"],
    }
    assert len(review.worst(scores, 99)) == 5


def test_the_margin_is_the_distance_from_another_prediction() -> None:
    binary = np.array([[0.7, 0.3], [0.55, 0.45]])
    assert np.allclose(review.margin(binary, "b", 0.4, ("a", "b")), [0.1, 0.05])
    several = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert np.allclose(review.margin(several, None, 0.5, ("a", "b", "c")), [0.2, 0.7])


def test_self_influence_is_the_change_of_loss_when_a_film_is_left_out() -> None:
    """Koh and Liang 2017, against refitting a damped logistic regression without each film."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(60, 3))
    labels = (hidden[:, 0] + 0.8 * rng.normal(size=60) > 0).astype(np.int64)
    labels[7] = 1 - int(hidden[7, 0] > 0)
    features = torch.tensor(np.column_stack([hidden - hidden.mean(axis=0), np.ones(60)]))
    targets = torch.tensor(labels)

    def fitted(kept: torch.Tensor) -> torch.Tensor:
        weight = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            value = torch.nn.functional.cross_entropy(features[kept] @ weight.T, targets[kept], reduction="sum") / 60
            value = value + 0.5 * 1e-3 * (weight**2).sum()
            value.backward()
            return value

        solver.step(loss)
        return weight.detach()

    every = torch.arange(60)
    weight = fitted(every)
    probabilities = torch.softmax(features @ weight.T, dim=1).numpy()
    found = review.self_influence(hidden, probabilities, labels) / 60
    single = torch.nn.functional.cross_entropy
    truth = [
        float(single(features[i : i + 1] @ fitted(every[every != i]).T, targets[i : i + 1]))
        - float(single(features[i : i + 1] @ weight.T, targets[i : i + 1]))
        for i in range(60)
    ]
    assert np.corrcoef(found, truth)[0, 1] > 0.95
    assert set(np.argsort(found)[-3:]) & set(np.argsort(truth)[-2:])


def test_wide_features_are_reduced_without_changing_who_stands_out() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(80, 400)) @ np.diag(0.9 ** np.arange(400))
    labels = (hidden[:, 0] > 0).astype(np.int64)
    labels[5] = 1 - labels[5]
    positive = 1 / (1 + np.exp(-4 * hidden[:, 0]))
    found = review.self_influence(hidden, np.column_stack([1 - positive, positive]), labels)
    assert found.shape == (80,) and found.argmax() == 5 and found.min() >= 0


# --- train --exclude -------------------------------------------------------------------------------------------


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_only_films_marked_exclude_are_left_out(films: Path, tmp_path: Path) -> None:
    names = [str(item.relative_to(films)) for item in sorted((films / "train" / "NORMAL").iterdir())[:3]]
    listed = write(tmp_path / "review.csv", "path,mark", f"{names[0]},Exclude ", f"{names[1]},", f"{names[2]},keep")
    whole = load_manifest(DataConfig(data_dir=str(films)))
    kept = load_manifest(DataConfig(data_dir=str(films), exclude=listed))
    gone = set(whole.table["path"]) - set(kept.table["path"])
    assert {Path(item).name for item in gone} == {Path(names[0]).name}


def test_a_list_without_marks_is_left_out_whole(films: Path, tmp_path: Path) -> None:
    names = [str(item.relative_to(films)) for item in sorted((films / "train" / "NORMAL").iterdir())[:2]]
    assert excluded_films(Path(write(tmp_path / "list.csv", "path", *names))) == names


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["path,mark", "train/NORMAL/ghost.jpeg,exclude"],
            "1 films to exclude are not among the data: train/NORMAL/gho",
        ),
        (["path,mark", "a.jpeg,relabel"], r"review.csv:2: mark 'relabel' is not known; write exclude, keep or nothing"),
        (["film,mark", "a.jpeg,exclude"], "no column 'path'"),
    ],
)
def test_a_list_that_cannot_be_followed_is_an_error(
    films: Path, tmp_path: Path, lines: list[str], message: str
) -> None:
    listed = write(tmp_path / "review.csv", *lines)
    with pytest.raises(DataError, match=message):
        load_manifest(DataConfig(data_dir=str(films), exclude=listed))


def test_a_checkpoint_s_list_does_not_stand_in_the_way_of_other_films(films: Path, tmp_path: Path) -> None:
    listed = write(tmp_path / "review.csv", "path,mark", "train/NORMAL/of_training.jpeg,exclude")
    config = DataConfig(data_dir=str(films), exclude=listed)
    assert len(load_manifest(config, classes=["NORMAL", "PNEUMONIA"])) == len(load_manifest(DataConfig(str(films))))


def test_marked_films_are_left_out_of_training_and_counted_in_the_checkpoint(
    films: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", "--worst", "4", "--split", "train", "--checkpoint", str(trained / "best_model.pth")]
    words += ["--device", "cpu", "--quiet", "--json", "--output-dir", str(tmp_path / "review")]
    assert main.main(words) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "train"
    path = tmp_path / "review" / "review.csv"
    table = pd.read_csv(path, keep_default_na=False)
    table["mark"] = ["exclude", "", "exclude", "keep"]
    table.to_csv(path, index=False)
    run = tmp_path / "run"
    settings = {"data.data_dir": str(films), "runtime.output_dir": str(run), "data.exclude": str(path)}
    config: Config = resolve({**TINY, "training.num_epochs": 1}, settings)
    train.train(config)
    split = set(pd.read_csv(run / "split.csv")["path"])
    assert split.isdisjoint(table["path"][[0, 2]]) and split >= set(table["path"][[1, 3]])
    assert load(run / "best_model.pth")["provenance"]["excluded_films"] == 2


def test_an_unreadable_film_is_named_or_left_out(films: Path, trained: Path, tmp_path: Path) -> None:
    copied = tmp_path / "films"
    shutil.copytree(films, copied)
    sorted((copied / "test" / "NORMAL").iterdir())[0].write_bytes(b"")
    overrides = {"data.data_dir": str(copied), "runtime.device": "cpu"}
    with pytest.raises(DataError, match="1 of 40 films cannot be read"):
        review.review(
            checkpoint=trained / "best_model.pth",
            overrides=[overrides],
            count=3,
            output_dir=tmp_path / "out",
            settings=Settings(),
        )
    result = review.review(
        checkpoint=trained / "best_model.pth",
        overrides=[overrides | {"data.skip_unreadable": True}],
        count=3,
        output_dir=tmp_path / "out",
        settings=Settings(),
    )
    assert result["films"] == 39
