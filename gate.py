"""Is this film one the model was trained to read?

    state = fit(describe(engine.outputs, train_batches), describe(engine.outputs, val_batches))   # after training
    result = Gate.from_state(state).check(pixels, image_HWC, features_F)                          # per prediction
    if not result.in_distribution: print(result.reason)

A classifier answers for a photograph as readily as for a film. Rules refuse what needs no statistics: blank, colour,
a strip. Fitted checks compare a film's layout and its features with up to 2,000 training films; their thresholds come
from validation films, of which they refuse together about `FALSE_REFUSALS`. Never looks at a label; never learns
from what it is shown. Legend: N films, H height, W width, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from errors import CheckpointError
from preprocess import Pixels, has_colour

FloatArray = npt.NDArray[np.float64]
Uint8Array = npt.NDArray[np.uint8]

VERSION = 1
FALSE_REFUSALS = 0.01
"""Share of validation films that the fitted checks are set to refuse, all together."""
MAX_REFERENCE = 2000
"""Training films that are enough to fit on."""
LEAST_REFERENCE = 100
"""Training films that it is fitted on however short the run, where there are so many."""
REFERENCE_SHARE = 0.03
"""Training films to fit on, per film that the run sent through the network."""
MIN_FILMS = 16
"""Fewer training or validation films than this describe no distribution."""
MAX_DIMENSIONS = 128
"""Directions of the feature space in which distances are measured; what lies outside them is one number more."""
LAYOUT_SIDE = 32
"""Films are compared pixel by pixel at this many pixels a side."""
BLANK = 4.0
"""Standard deviation of the grey levels (0..255) below which there is nothing to see."""
COLOUR = 8.0
"""Mean spread between the channels (0..255) that grey films do not reach; JPEG noise stays below 3."""
STRIP = 3.0
"""Longer side over shorter side from which a picture is no film of this kind."""
WORST = 99.0
"""Scores end here, so that they stay finite."""

CHECKS = ("orientation", "layout", "features", "remainder")
UNLIKE = "unlike the films this model was trained on: another body part, projection or kind of picture"


@dataclass(frozen=True)
class GateResult:
    """What the gate says of one film."""

    in_distribution: bool
    reason: str
    """In words for a user; empty when the film passes."""
    score: float
    """0 is a typical film, above 1 is refused, at most 99."""


class CannotFit(Exception):
    """Why these films give no gate."""


@dataclass(frozen=True)
class Reference:
    """What training films look like: a mean and the directions they vary in, for their layout and their features."""

    mean: FloatArray
    """(D,)"""
    directions: FloatArray
    """(K, D), orthonormal rows."""
    whitening: FloatArray
    """(K, K): coordinates along the directions to coordinates of unit covariance."""

    @classmethod
    def of(cls, rows_ND: FloatArray, *, most: int) -> Reference:
        """The leading directions of `rows_ND`, their covariance shrunk as Ledoit and Wolf (2004) do."""
        from sklearn.covariance import ledoit_wolf
        from sklearn.utils.extmath import randomized_svd

        mean = rows_ND.mean(axis=0)
        centred = rows_ND - mean
        count = max(1, min(most, len(rows_ND) // 4, rows_ND.shape[1] - 1))
        directions = randomized_svd(centred, count, random_state=0)[2]
        covariance, _ = ledoit_wolf(centred @ directions.T, assume_centered=True)
        values, vectors = np.linalg.eigh(covariance)
        return cls(mean, directions, (vectors / np.sqrt(np.maximum(values, 1e-12))).T)

    def distances(self, rows_ND: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mahalanobis distance (N,) along the directions, and length (N,) of what is left outside them."""
        centred = rows_ND - self.mean
        along = centred @ self.directions.T
        outside = centred - along @ self.directions
        return np.linalg.norm(along @ self.whitening.T, axis=1), np.linalg.norm(outside, axis=1)

    def to_state(self) -> dict[str, torch.Tensor]:
        """Tensors, for the checkpoint."""
        return {name: torch.from_numpy(value.astype(np.float32, order="C")) for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Reference:
        """What `to_state` stored."""
        return cls(**{name: state[name].double().cpu().numpy() for name in ("mean", "directions", "whitening")})


@dataclass(frozen=True)
class Gate:
    """The fitted gate of one model."""

    layout: Reference
    features: Reference
    typical: FloatArray
    """Median score of the validation films, per check."""
    thresholds: FloatArray
    """Score above which a film is refused, per check."""
    colour_limit: float
    """Mean spread between channels above which a picture counts as coloured."""
    facts: Mapping[str, Any]
    """Numbers of films and the share of validation films refused."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Gate:
        """The gate a checkpoint or bundle stored; CheckpointError when a newer program wrote it."""
        if state.get("version") != VERSION:
            raise CheckpointError(f"input_gate: version {state.get('version')!r} is not {VERSION}; update the program")
        return cls(
            Reference.from_state(state["layout"]),
            Reference.from_state(state["features"]),
            np.asarray(state["typical"], dtype=np.float64),
            np.asarray(state["thresholds"], dtype=np.float64),
            float(state["colour_limit"]),
            dict(state["facts"]),
        )

    def to_state(self) -> dict[str, Any]:
        """Plain values and tensors, readable with weights_only=True."""
        return {
            "version": VERSION,
            "layout": self.layout.to_state(),
            "features": self.features.to_state(),
            "typical": self.typical.tolist(),
            "thresholds": self.thresholds.tolist(),
            "colour_limit": self.colour_limit,
            "facts": dict(self.facts),
        }

    def check(self, pixels: Pixels, image_HWC: Uint8Array, features_F: npt.NDArray[np.floating[Any]]) -> GateResult:
        """Judge one film by its pixels as decoded, its preprocessed image and the features of the serving engine."""
        if reason := self._broken_rule(pixels, image_HWC):
            return GateResult(False, reason, WORST)
        scores = self.scores(_layouts(image_HWC[None]), features_F[None].astype(np.float64))[0]
        scores = np.clip(np.nan_to_num(scores, nan=WORST), 0.0, WORST)
        worst = int(scores.argmax())
        score = float(scores[worst])
        if score <= 1:
            return GateResult(True, "", score)
        pose, back_D = _turned(self.layout, image_HWC)
        is_turned = worst == 0 or (scores[0] > 1 and self._is_laid_out_well(back_D))
        return GateResult(False, f"it looks {pose}" if is_turned else UNLIKE, score)

    def _is_laid_out_well(self, row_D: FloatArray) -> bool:
        distance = self.layout.distances(row_D[None])[0][0]
        return bool(distance <= self.thresholds[1])

    def scores(self, layouts_ND: FloatArray, features_NF: FloatArray) -> FloatArray:
        """(N, checks): 0 for a typical film, 1 at the threshold."""
        raw = _raw_scores(self.layout, self.features, layouts_ND, features_NF)
        return (raw - self.typical) / (self.thresholds - self.typical)

    def _broken_rule(self, pixels: Pixels, image_HWC: Uint8Array) -> str:
        height, width = pixels.shape[:2]
        if float(image_HWC.std()) < BLANK:
            return "blank: every pixel is nearly the same"
        if max(height, width) > STRIP * min(height, width):
            return f"a strip of {width}x{height} pixels, not a film"
        step = max(1, min(height, width) // 256)  # a few hundred rows show colour as well as all of them
        if has_colour(pixels[::step, ::step], tolerance=self.colour_limit):
            return "a colour picture: the films this model was trained on are grey"
        return ""


@dataclass(frozen=True)
class Described:
    """Films as the gate sees them, and the logits that came with them."""

    layouts_ND: FloatArray
    features_NF: FloatArray
    spreads_N: FloatArray
    """Mean spread between the channels, in grey levels."""
    logits_NC: npt.NDArray[np.float32]


Outputs = Callable[[Uint8Array], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
"""An engine's `outputs`: uint8 films (B, S, S, C) to logits (B, classes) and features (B, F)."""


def reference_count(films: int, films_run: int) -> int:
    """How many of `films` training films to fit on, so that a run of `films_run` forward passes grows by few per cent.

    A function of the run's length alone, so that a resumed run fits on the same films.
    """
    return min(films, MAX_REFERENCE, max(LEAST_REFERENCE, round(REFERENCE_SHARE * films_run)))


def describe(outputs: Outputs, batches: Iterable[Uint8Array]) -> Described:
    """Run preprocessed films (B, S, S, C) through an engine, batch by batch; the films themselves are not kept."""
    layouts, features, spreads, logits = [], [], [], []
    for images_BHWC in batches:
        logits_BC, features_BF = outputs(images_BHWC)
        layouts.append(_layouts(images_BHWC))
        features.append(features_BF.astype(np.float64))
        spreads.append([_spread(image) for image in images_BHWC])
        logits.append(logits_BC)
    return Described(*(np.concatenate(part) for part in (layouts, features, spreads, logits)))


def fit(train: Described, val: Described) -> dict[str, Any]:
    """The gate's state, for the checkpoint.

    CannotFit when there are too few films to describe a distribution, or features are not finite.
    """
    if min(len(train.layouts_ND), len(val.layouts_ND)) < MIN_FILMS:
        found = f"{len(train.layouts_ND)} training and {len(val.layouts_ND)} validation films"
        raise CannotFit(f"{found} are too few; {MIN_FILMS} of each are needed")
    if not (np.isfinite(train.features_NF).all() and np.isfinite(val.features_NF).all()):
        raise CannotFit("features that are not finite")
    layout = Reference.of(train.layouts_ND, most=LAYOUT_SIDE)
    features = Reference.of(train.features_NF, most=MAX_DIMENSIONS)
    facts = {"train_films": len(train.layouts_ND)}
    return _with_thresholds(layout, features, max(COLOUR, 1.5 * float(val.spreads_N.max())), facts, val)


def refit(state: Mapping[str, Any], val: Described) -> dict[str, Any]:
    """`state` with thresholds for another engine of the same network, whose rounding moves features (INT8).

    Another network, such as a pruned one, needs `fit`: its features mean something else.
    """
    gate = Gate.from_state(state)
    assert val.features_NF.shape[1] == len(gate.features.mean), "another network: its gate is fitted, not refitted"
    return _with_thresholds(gate.layout, gate.features, gate.colour_limit, gate.facts, val)


def _with_thresholds(
    layout: Reference, features: Reference, colour_limit: float, facts: Mapping[str, Any], val: Described
) -> dict[str, Any]:
    raw = _raw_scores(layout, features, val.layouts_ND, val.features_NF)
    thresholds = np.array([tail_threshold(column, FALSE_REFUSALS / len(CHECKS)) for column in raw.T])
    thresholds[0] = max(thresholds[0], 0.0)  # below 0 the film as it stands is still the best match
    refused = float((raw > thresholds).any(axis=1).mean())
    said = {**facts, "val_films": len(raw), "false_refusals_set": FALSE_REFUSALS, "false_refusals_on_val": refused}
    return Gate(layout, features, np.median(raw, axis=0), thresholds, colour_limit, said).to_state()


def summary(state: Mapping[str, Any]) -> str:
    """One line for the log."""
    facts = state["facts"]
    return (
        f"fitted on {facts['train_films']} training films; refuses {100 * facts['false_refusals_on_val']:.1f} % of "
        f"{facts['val_films']} validation films (set to at most {100 * facts['false_refusals_set']:.0f} %)"
    )


def tail_threshold(scores_N: FloatArray, share: float) -> float:
    """The score that about `share` of such films exceed; never below the same quantile of `scores_N` itself.

    Beyond the highest tenth of the scores an exponential tail is assumed: a hundred films say nothing directly of
    what one film in four hundred does.
    """
    start = float(np.quantile(scores_N, 0.9))
    excess = scores_N[scores_N > start] - start
    mean_excess = float(excess.mean()) if len(excess) else 0.0
    tail = start + mean_excess * float(np.log(0.1 / share))
    # Scores that are all alike would leave no room at all.
    room = 1e-3 + 0.1 * abs(float(np.median(scores_N)))
    return max(tail, float(np.quantile(scores_N, 1 - share)), float(np.median(scores_N)) + room)


# --- scores ----------------------------------------------------------------------------------------------------


def _raw_scores(layout: Reference, features: Reference, layouts_ND: FloatArray, features_NF: FloatArray) -> FloatArray:
    """(N, checks), larger is stranger."""
    near, remainder = features.distances(features_NF)
    return np.stack([_misfit(layout, layouts_ND), layout.distances(layouts_ND)[0], near, remainder], axis=1)


def _layouts(images_NHWC: Uint8Array) -> FloatArray:
    """Each film as a row of LAYOUT_SIDE² grey values with mean 0 and length 1: exposure and contrast drop out."""
    size = (LAYOUT_SIDE, LAYOUT_SIDE)
    small = [cv2.resize(image, size, interpolation=cv2.INTER_AREA).reshape(*size, -1) for image in images_NHWC]
    rows = np.stack(small).mean(axis=3, dtype=np.float64).reshape(len(small), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _poses(layout: Reference) -> dict[str, FloatArray]:
    """The mean film as it stands and turned, as rows to correlate with."""
    mean = layout.mean / max(float(np.linalg.norm(layout.mean)), 1e-9)
    turns = ("", "turned by 90°", "upside down", "turned by 90°")
    square = mean.reshape(LAYOUT_SIDE, LAYOUT_SIDE)
    poses = {f"{name}#{count}": np.rot90(square, count).ravel() for count, name in enumerate(turns)}
    return {**poses, "inverted (a negative)#": -mean}


def _misfit(layout: Reference, rows_ND: FloatArray) -> FloatArray:
    """(N,): how much better the mean film fits when turned or inverted; below 0 the film stands as it should."""
    correlation = rows_ND @ np.stack(list(_poses(layout).values())).T
    return correlation[:, 1:].max(axis=1) - correlation[:, 0]


def _turned(layout: Reference, image_HWC: Uint8Array) -> tuple[str, FloatArray]:
    """(which turn or inversion would make the film fit best, in words; its row with that undone)."""
    poses, row_D = _poses(layout), _layouts(image_HWC[None])[0]
    correlation = np.stack(list(poses.values())) @ row_D
    name, count = list(poses)[1 + int(correlation[1:].argmax())].split("#")
    square = row_D.reshape(LAYOUT_SIDE, LAYOUT_SIDE)
    return name, np.rot90(square, -int(count)).ravel() if count else -row_D


def _spread(image_HWC: Uint8Array) -> float:
    """Mean spread between the channels, in grey levels."""
    return float(np.ptp(image_HWC.astype(np.int16), axis=2).mean())
