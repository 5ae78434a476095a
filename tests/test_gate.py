"""The input gate: films like those trained on pass, anything else is refused with a reason, at the stated rate."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch

import checkpoint
import gate
import predictor
import runtime
import synthetic
import train
from config import Config
from errors import CheckpointError
from gate import CannotFit, Described, Gate, GateResult, describe, fit, refit, tail_threshold
from preprocess import apply, decode

Images = npt.NDArray[np.uint8]
SIDE = 48


def drawn_films(count: int, *, first: int) -> Images:
    """(count, SIDE, SIDE, 1) synthetic chest films, every other one with pneumonia."""
    drawn = [synthetic.film(pneumonia=seed % 2 == 0, seed=seed, size=SIDE) for seed in range(first, first + count)]
    return np.stack(drawn)[..., None]


def outputs(images_BHWC: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A stand-in network: 24 features, local means and contrasts of the film."""
    small = np.stack(
        [cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).reshape(8, 8, -1) for image in images_BHWC]
    )
    blocks = small.astype(np.float32).mean(axis=3).reshape(-1, 4, 2, 4, 2)
    features = np.concatenate(
        [blocks.mean(axis=(2, 4)).reshape(-1, 16), blocks.std(axis=(2, 4)).reshape(-1, 16)[:, ::2]], 1
    )
    return features[:, :2], features


def described(images: Images) -> Described:
    return describe(outputs, [images[:7], images[7:]])


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return fit(described(drawn_films(160, first=0)), described(drawn_films(80, first=1000)))


def judge(state: dict[str, Any], picture: npt.NDArray[Any]) -> GateResult:
    """The gate's word on a picture (SIDE, SIDE) or (H, W, 3), preprocessed as a grey model would."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if picture.ndim == 3 else picture
    image = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., None]
    return Gate.from_state(state).check(picture, image, outputs(image[None])[1][0])


def test_new_films_of_the_same_kind_pass(state: dict[str, Any]) -> None:
    refused = [judge(state, film[..., 0]) for film in drawn_films(200, first=5000)]
    # 1 % is set; with 80 validation films the tail is an estimate, so 4 % of 200 leaves room for three errors of it.
    assert sum(not item.in_distribution for item in refused) <= 8


def test_a_film_that_passes_has_no_reason_and_a_score_up_to_one(state: dict[str, Any]) -> None:
    results = [judge(state, film[..., 0]) for film in drawn_films(20, first=6000)]
    assert all(item.reason == "" and 0 <= item.score <= 1 for item in results if item.in_distribution)


UPRIGHT = drawn_films(12, first=7000)[..., 0]
STRANGE: dict[str, tuple[Callable[[Images], Images], str]] = {
    "negative": (lambda film: 255 - film, "inverted"),
    "upside down": (lambda film: film[::-1, ::-1].copy(), "upside down|unlike"),
    "quarter turn": (lambda film: np.rot90(film).copy(), "turned by 90|unlike"),
    "three quarter turn": (lambda film: np.rot90(film, 3).copy(), "turned by 90|unlike"),
    "black": (np.zeros_like, "blank"),
    "white": (lambda film: np.full_like(film, 255), "blank"),
    "noise": (
        lambda film: np.random.default_rng(int(film[20, 20])).integers(0, 256, film.shape, dtype=np.uint8),
        "unlike|turned|inverted|upside",
    ),
    "stripes": (lambda film: np.tile((np.arange(SIDE) // 6 % 2 * 200).astype(np.uint8), (SIDE, 1)), "unlike|turned"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_upright_film_is_refused_with_its_reason(state: dict[str, Any], name: str) -> None:
    change, reason = STRANGE[name]
    results = [judge(state, change(film)) for film in UPRIGHT]
    refused = [item for item in results if not item.in_distribution]
    assert len(refused) == len(results)
    assert all(item.score > 1 for item in refused)
    assert all(any(word in item.reason for word in reason.split("|")) for item in refused)


def test_a_darker_and_a_slightly_turned_film_are_not_called_inverted_or_turned(
    state: dict[str, Any],
) -> None:
    turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), 5, 1)
    for film in UPRIGHT:
        for changed in ((film * 0.7).astype(np.uint8), cv2.warpAffine(film, turn, (SIDE, SIDE))):
            assert "looks" not in judge(state, changed).reason


def test_a_colour_picture_is_refused_even_when_its_grey_version_passes(state: dict[str, Any]) -> None:
    film = next(item for item in UPRIGHT if judge(state, item).in_distribution)
    grey = np.repeat(film[..., None], 3, axis=2)
    tinted = (grey * np.array([1.0, 0.7, 0.4])).astype(np.uint8)
    assert judge(state, grey).in_distribution
    assert "colour" in judge(state, tinted).reason


def test_colour_is_no_reason_where_the_model_was_trained_on_colour() -> None:
    tint = np.array([1.0, 0.7, 0.4])
    train, val = ((drawn_films(count, first=first) * tint).astype(np.uint8) for count, first in ((100, 0), (60, 1000)))
    own = fit(described(train), described(val))
    picture = (drawn_films(1, first=9000)[0] * tint).astype(np.uint8)
    assert "colour" not in Gate.from_state(own).check(picture, picture, outputs(picture[None])[1][0]).reason


def test_a_strip_is_refused(state: dict[str, Any]) -> None:
    strip = np.tile(UPRIGHT[0], (1, 4))
    assert "strip of 192x48" in judge(state, strip).reason


def test_deep_pixels_are_judged_like_any_other(state: dict[str, Any]) -> None:
    film = next(item for item in UPRIGHT if judge(state, item).in_distribution)
    image = film[..., None]
    result = Gate.from_state(state).check(film.astype(np.uint16) * 257, image, outputs(image[None])[1][0])
    assert result == judge(state, film)


def test_features_far_from_the_training_films_are_refused_though_the_picture_looks_right(state: dict[str, Any]) -> None:
    film = UPRIGHT[0][..., None]
    result = Gate.from_state(state).check(film, film, outputs(film[None])[1][0] + 500)
    assert not result.in_distribution and "unlike" in result.reason


def test_features_that_are_not_numbers_are_refused_with_a_finite_score(state: dict[str, Any]) -> None:
    film = UPRIGHT[0][..., None]
    result = Gate.from_state(state).check(film, film, np.full(24, np.nan, dtype=np.float32))
    assert not result.in_distribution and result.score == gate.WORST


def test_the_state_survives_a_checkpoint_read_with_weights_only(state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    assert [judge(stored, film) for film in UPRIGHT] == [judge(state, film) for film in UPRIGHT]


def test_fitting_twice_gives_the_same_gate(state: dict[str, Any]) -> None:
    again = fit(described(drawn_films(160, first=0)), described(drawn_films(80, first=1000)))
    assert again["thresholds"] == state["thresholds"] and again["typical"] == state["typical"]


def test_the_stated_false_refusals_are_those_counted_on_the_validation_films(state: dict[str, Any]) -> None:
    val = described(drawn_films(80, first=1000))
    own = Gate.from_state(state).scores(val.layouts_ND, val.features_NF)
    # The stored tensors are single precision: a film at the very threshold may fall either way.
    assert state["facts"]["false_refusals_on_val"] == pytest.approx((own > 1).any(axis=1).mean(), abs=1 / 80)
    assert state["facts"] == {**state["facts"], "train_films": 160, "val_films": 80, "false_refusals_set": 0.01}


def test_mahalanobis_distance_equals_the_textbook_formula_when_every_direction_is_kept() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4000, 5)) @ (np.eye(5) + 0.4)  # well conditioned: shrinking moves it little
    reference = gate.Reference.of(np.concatenate([rows, np.zeros((4000, 1))], axis=1), most=5)
    centred = rows - rows.mean(axis=0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", centred, np.linalg.inv(np.cov(centred.T, bias=True)), centred))
    found, remainder = reference.distances(np.concatenate([rows, np.full((4000, 1), 3.0)], axis=1))
    # Ledoit-Wolf shrinks by about 1/4000 here.
    np.testing.assert_allclose(found, expected, rtol=0.02)
    np.testing.assert_allclose(remainder, 3.0, rtol=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.0025])
def test_the_tail_of_an_exponential_law_is_found_from_few_scores(share: float) -> None:
    draws = np.random.default_rng(0).exponential(size=(300, 400))
    found = np.array([tail_threshold(row, share) for row in draws])
    # The true quantile is -ln(share); the mean excess of 40 values has a relative error of 16 %.
    assert abs(np.median(found) + np.log(share)) < 0.1 * -np.log(share)


def test_the_threshold_is_never_below_the_scores_own_quantile() -> None:
    scores = np.concatenate([np.random.default_rng(0).uniform(size=990), np.full(10, 50.0)])
    assert tail_threshold(scores, 0.005) >= 50.0


def test_scores_that_are_all_alike_still_leave_room() -> None:
    assert tail_threshold(np.full(50, 2.0), 0.0025) > 2.0


def test_refitting_makes_room_for_another_engine_and_moves_nothing_else(state: dict[str, Any]) -> None:
    val = described(drawn_films(80, first=1000))
    rough = Described(val.layouts_ND, np.round(val.features_NF / 12) * 12, val.spreads_N, val.logits_NC)
    again = refit(state, rough)
    assert again["thresholds"][3] > state["thresholds"][3]
    assert again["thresholds"][:2] == pytest.approx(state["thresholds"][:2], rel=1e-4)
    assert torch.equal(again["features"]["directions"], state["features"]["directions"])
    assert again["facts"]["false_refusals_on_val"] <= 0.05


def test_too_few_films_give_no_gate() -> None:
    few, enough = described(drawn_films(15, first=0)), described(drawn_films(20, first=100))
    with pytest.raises(CannotFit, match="15 training and 20 validation films are too few; 16"):
        fit(few, enough)


def test_features_that_are_not_finite_give_no_gate() -> None:
    val = described(drawn_films(20, first=100))
    broken = Described(val.layouts_ND, val.features_NF * np.nan, val.spreads_N, val.logits_NC)
    with pytest.raises(CannotFit, match="not finite"):
        fit(val, broken)


def test_a_gate_of_another_version_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="input_gate: version 99 is not 1; update"):
        Gate.from_state({**state, "version": 99})


@pytest.mark.parametrize(
    ("available", "films_run", "expected"), [(72, 432, 72), (4471, 1000, 100), (4471, 17884, 537), (90000, 9e6, 2000)]
)
def test_the_films_fitted_on_follow_from_the_length_of_the_run(available: int, films_run: int, expected: int) -> None:
    assert gate.reference_count(available, films_run) == expected


def test_describing_in_other_batches_changes_nothing() -> None:
    images = drawn_films(20, first=0)
    one, other = describe(outputs, [images]), describe(outputs, [images[:3], images[3:]])
    np.testing.assert_array_equal(one.layouts_ND, other.layouts_ND)
    np.testing.assert_array_equal(one.features_NF, other.features_NF)


def test_layouts_do_not_depend_on_exposure() -> None:
    images = drawn_films(5, first=0) // 2
    one, other = describe(outputs, [images]), describe(outputs, [images * 2])
    np.testing.assert_allclose(one.layouts_ND, other.layouts_ND, atol=2e-3)


def test_a_finished_run_holds_a_gate_that_its_own_films_pass(trained: Path, films: Path) -> None:
    own = predictor.load(trained / "best_model.pth", device="cpu")
    assert own.input_gate is not None
    fitted = Gate.from_state(own.input_gate)
    paths = sorted((films / "test" / "PNEUMONIA").glob("*.jpeg"))
    images = np.stack([apply(own.spec, decode(path)) for path in paths])
    features = own.engine.outputs(images)[1]
    results = [fitted.check(decode(path), image, row) for path, image, row in zip(paths, images, features)]
    assert sum(not item.in_distribution for item in results) <= 2
    assert not fitted.check(255 - decode(paths[0]), 255 - images[0], features[0]).in_distribution


def test_training_without_a_gate_stores_none(tiny: Config) -> None:
    config = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, input_gate=False, num_epochs=1))
    result = train.train(config)
    assert "input_gate" not in checkpoint.load(result.best_model)


def test_too_few_validation_films_are_said_and_stop_nothing(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gate, "MIN_FILMS", 1000)
    monkeypatch.setattr(runtime.log, "propagate", True)
    caplog.set_level("INFO", logger=runtime.log.name)
    result = train.train(dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, num_epochs=1)))
    assert "input_gate" not in checkpoint.load(result.best_model)
    assert "no input gate: 72 training and 24 validation films are too few" in caplog.text
