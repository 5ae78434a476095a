"""Are these the films a model was tuned for? Their scores against validation's, prevalence without labels, abstention.

Nothing here looks at the labels of the films measured, but `selective`, which says what abstaining would have bought.
Legend: N films, M validation films, K coverages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import brentq

from calibration import clipped_logit
from errors import DataError
from estimates import (
    Estimate,
    FloatArray,
    IntArray,
    as_groups,
    as_labels,
    as_probabilities,
    not_estimable,
    sum_by_group,
    wald,
)
from proportions import clustered_proportion

COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
BINS = 20


def estimate_prevalence(
    probabilities: ArrayLike, *, prior: float, groups: ArrayLike | None = None, level: float = 0.95
) -> Estimate:
    """Prevalence among unlabelled films from calibrated probabilities (N,) of a model tuned at prevalence `prior`.

    The maximum of the likelihood that the EM of Saerens, Latinne and Decaestecker (2002, Neural Comput 14:21) climbs:
    it is concave, so its root is found directly. Holds when only the prevalence differs (label shift). The standard
    error is the sandwich, clustered by patient; NaN with a reason at 0 and 1.
    """
    if not 0 < prior < 1:
        raise DataError(f"prior {prior!r}: the prevalence a model was tuned at lies between 0 and 1")
    values = np.asarray(probabilities, dtype=np.float64)
    p = as_probabilities(values, n=len(values))
    if not len(p):
        return not_estimable("there are no films")
    positive, negative = p / prior, (1 - p) / (1 - prior)

    def terms(share: float) -> FloatArray:
        """Derivative of each film's log-likelihood in the prevalence."""
        density = share * positive + (1 - share) * negative
        return np.divide(positive - negative, density, out=np.full_like(p, np.inf), where=density > 0)

    method = "maximum likelihood under label shift (Saerens 2002), sandwich clustered by patient"
    at_ends = float(np.sum(terms(0.0))), float(np.sum(terms(1.0)))
    if at_ends[0] <= 0 or at_ends[1] >= 0:
        share = 0.0 if at_ends[0] <= 0 else 1.0
        return not_estimable("the likelihood is highest at the end of the range", value=share, method=method)
    share = brentq(lambda value: float(np.sum(terms(value))), 1e-12, 1 - 1e-12, xtol=1e-12)
    scores = terms(share)
    codes = as_groups(None if groups is None else np.asarray(groups), n=len(p))
    se = float(np.sqrt((sum_by_group(scores, codes) ** 2).sum()) / (scores**2).sum())
    return wald(share, se, level=level, method=method, low=0.0, high=1.0)


def moved_threshold(threshold: float, *, prior_from: float, prior_to: float) -> float:
    """Where `threshold` on probabilities corrected to `prior_to` lies on the model's own probabilities."""
    ends = clipped_logit(np.array([threshold, prior_from, prior_to]))
    return float(1 / (1 + np.exp(-(ends[0] + ends[1] - ends[2]))))


@dataclass(frozen=True)
class ScoreShift:
    """Scores of unlabelled films against those of validation."""

    edges: FloatArray
    """(B + 1,) of the bins, 0 to 1."""
    observed: FloatArray
    """(B,) share of the films measured."""
    expected: FloatArray
    """(B,) what validation's classes give at validation's prevalence."""
    expected_at_prevalence: FloatArray
    """(B,) what they give at the prevalence estimated."""
    distance: float
    """Kolmogorov–Smirnov distance of the scores from validation's."""
    p_value: float
    """Of that distance, films taken as independent."""
    distance_at_prevalence: float
    """The distance that is left once validation's classes are mixed at the prevalence estimated."""


def score_shift(
    scores: ArrayLike, validation_labels: ArrayLike, validation_scores: ArrayLike, *, prevalence: float
) -> ScoreShift:
    """Compare `scores` (N,) in [0, 1] with those of labelled validation films (M,).

    A shift of prevalence alone leaves `distance_at_prevalence` near 0; what remains is a change in how a class scores.
    """
    observed = as_probabilities(scores, n=len(np.asarray(scores)))
    labels = as_labels(validation_labels)
    reference = as_probabilities(validation_scores, n=len(labels))
    parts = [reference[labels == code] for code in (0, 1)]
    if not all(len(part) for part in parts):
        raise DataError("validation holds one class only; scores of both are needed to say what was expected")
    edges: FloatArray = np.linspace(0, 1, BINS + 1)
    own = labels.mean()

    def mixed(share: float) -> FloatArray:
        negative, positive = (np.histogram(part, edges)[0] / len(part) for part in parts)
        return share * positive + (1 - share) * negative

    test = stats.ks_2samp(observed, reference)
    return ScoreShift(
        edges=edges,
        observed=np.histogram(observed, edges)[0] / len(observed),
        expected=mixed(float(own)),
        expected_at_prevalence=mixed(prevalence),
        distance=float(test.statistic),
        p_value=float(test.pvalue),
        distance_at_prevalence=_distance_to_mixture(observed, parts, prevalence),
    )


def _distance_to_mixture(observed: FloatArray, parts: Sequence[FloatArray], share: float) -> float:
    """Largest difference of the distribution functions, over all scores that occur."""
    at = np.unique(np.concatenate([observed, *parts]))
    below = [np.searchsorted(np.sort(part), at, side="right") / len(part) for part in (observed, *parts)]
    return float(np.abs(below[0] - (1 - share) * below[1] - share * below[2]).max())


def decision_margin(scores: ArrayLike, threshold: float) -> FloatArray:
    """How far scores (N,) lie from the operating point, as a share of the way to 0 or to 1: 0 to 1."""
    p = np.asarray(scores, dtype=np.float64)
    above = (p - threshold) / max(1 - threshold, 1e-12)
    return np.where(p >= threshold, above, (threshold - p) / max(threshold, 1e-12)).clip(0, 1)


@dataclass(frozen=True)
class Selective:
    """Accuracy when the least sure films are left to a reader."""

    coverage: FloatArray
    """(C,) share of films decided, from few to all."""
    accuracy: FloatArray
    """(C,) of the films decided."""
    area: float
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017): mean risk over coverages; 0 is best."""
    rows: tuple[dict[str, Any], ...]
    """For each of the coverages asked for: coverage, least certainty, accuracy with interval, films."""


def selective(
    right: ArrayLike,
    certainty: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    coverages: Sequence[float] = COVERAGES,
    level: float = 0.95,
) -> Selective:
    """Accuracy against coverage: `right` (N,) is 1 where the call was right, `certainty` (N,) orders the films.

    Films of equal certainty are decided or left together. Intervals are Wilson's on the effective sample size.
    """
    hits = as_labels(right).astype(np.float64)
    sure = np.asarray(certainty, dtype=np.float64)
    if sure.shape != hits.shape:
        raise DataError(f"certainty has shape {sure.shape}, but there are {len(hits)} films; give one per film")
    codes = as_groups(None if groups is None else np.asarray(groups), n=len(hits))
    order = np.argsort(-sure, kind="stable")
    last_of_tie = np.append(np.diff(sure[order]) != 0, True)
    counts: IntArray = np.flatnonzero(last_of_tie) + 1
    accuracy = np.cumsum(hits[order])[counts - 1] / counts
    rows = []
    for wanted in coverages:
        at = int(np.searchsorted(counts, wanted * len(hits) - 1e-9))
        count = int(counts[min(at, len(counts) - 1)])
        decided = order[:count]
        estimate = clustered_proportion(hits[decided], codes[decided], level=level, method="wilson")
        rows.append(
            {
                "coverage": count / len(hits),
                "least_certainty": float(sure[order[count - 1]]),
                "n": count,
                "accuracy": estimate.as_report(),
            }
        )
    area = float(((1 - accuracy) * np.diff(counts, prepend=0)).sum() / len(hits))
    return Selective(counts / len(hits), accuracy, area, tuple(rows))
