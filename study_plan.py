"""Sample size and power from the command line: one plan by name, its parameters as NAME=VALUE.

    python main.py reader_study --plan one_auc auc=0.8 power=0.9
    python main.py reader_study --table pilot.csv --plan mrmc_cases readers=6 effect=0.05 power=0.8

Every function of `sample_size` can be reached; where one needs a pilot it comes from the table or from its numbers.
What a parameter means stands in the function it goes to.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import sample_size
from errors import ConfigError, DataError, nearest
from reader_study import reader_study

Value = float | int | str | bool | None


def mrmc_components(
    *,
    reader_by_modality: float,
    error: float,
    cov1: float,
    cov2: float,
    cov3: float,
    pilot_cases: float,
    pilot_effect: float = math.nan,
) -> sample_size.MrmcPilot:
    """A reader-study pilot from its Obuchowski-Rockette components."""
    return sample_size.MrmcPilot(reader_by_modality, error, cov1, cov2, cov3, pilot_cases, pilot_effect)


def paired_components(
    *, delta: float, variance_a: float, variance_b: float, covariance: float, ratio: float = 1.0
) -> sample_size.PairedAuc:
    """A pilot of two AUCs on the same cases; variances are per positive case."""
    return sample_size.PairedAuc(delta, variance_a, variance_b, covariance, ratio)


def partial_components(
    *,
    a1: float,
    b1: float,
    a2: float,
    b2: float,
    delta: float,
    corr_positive: float,
    corr_negative: float,
    fpr_low: float = 0.0,
    fpr_high: float = 1.0,
    ratio: float = 1.0,
) -> sample_size.PairedAuc:
    """A pilot of two (partial) areas from binormal parameters."""
    area = (fpr_low, fpr_high)
    curves = sample_size.Binormal(a1, b1, area), sample_size.Binormal(a2, b2, area)
    return sample_size.partial_auc_pair(
        *curves, delta=delta, corr_positive=corr_positive, corr_negative=corr_negative, ratio=ratio
    )


PLANS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "one_auc": (sample_size.one_auc, None),
    "paired_auc": (sample_size.paired_auc, paired_components),
    "partial_auc": (sample_size.paired_auc, partial_components),
    "auc_precision": (sample_size.auc_precision_sample_size, None),
    "mrmc_power": (sample_size.mrmc_power, mrmc_components),
    "mrmc_cases": (sample_size.mrmc_cases, mrmc_components),
    "mrmc_readers": (sample_size.mrmc_readers, mrmc_components),
    "mrmc_conjectured": (sample_size.mrmc_conjectured, None),
    "precision": (sample_size.precision_sample_size, None),
    "accuracy_cohort": (sample_size.accuracy_cohort, None),
    "two_proportions": (sample_size.two_proportions, None),
    "kappa": (sample_size.kappa_sample_size, None),
    "kappa_precision": (sample_size.kappa_precision, None),
}
"""Name → the function that answers, and the one that makes its pilot from numbers (None: it needs none)."""


def plan(
    words: Sequence[str], *, pilot: pd.DataFrame | None = None, study: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Answer `words`: the name of a plan, then NAME=VALUE each.

    `pilot` is the table of a reader study, `study` the options it is analysed with (for mrmc_*); for paired_auc the
    table must hold one reader with two modalities. Returns {"plan", "parameters", "answer"}.
    """
    name, given = words[0], _parameters(words[1:])
    if name not in PLANS:
        raise ConfigError(f"--plan {name!r} is not one of {', '.join(PLANS)}{nearest(name, PLANS)}")
    answer, from_numbers = PLANS[name]
    arguments = []
    own = dict(given)
    if from_numbers is not None:
        if pilot is not None and name != "partial_auc":
            arguments.append(_pilot_of(name, pilot, study or {}))
        else:
            made = {key: own.pop(key) for key in list(own) if key in inspect.signature(from_numbers).parameters}
            arguments.append(_call(name, from_numbers, made, but=own))
    found = _call(name, answer, own, *arguments)
    return {"plan": name, "parameters": given, "answer": _plain(found)}


def _pilot_of(name: str, table: pd.DataFrame, study: Mapping[str, Any]) -> Any:
    if name.startswith("mrmc"):
        return sample_size.mrmc_pilot(reader_study(table, **study))
    wide = table.pivot_table(index="case", columns=["reader", "modality"], values="score", aggfunc="first").dropna()
    if wide.shape[1] != 2:
        raise DataError(f"--plan {name}: the pilot must hold one reader with two modalities, found {wide.shape[1]}")
    truth = table.drop_duplicates("case").set_index("case")["truth"].reindex(wide.index).astype(np.int64)
    return sample_size.paired_auc_pilot(truth, wide.iloc[:, 0], wide.iloc[:, 1])


def _parameters(words: Sequence[str]) -> dict[str, Value]:
    given: dict[str, Value] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"--plan: {word!r} is not of the form NAME=VALUE, such as power=0.8")
        given[name.strip().replace("-", "_")] = _value(value.strip())
    return given


def _value(word: str) -> Value:
    if word.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[word.lower()]
    try:
        number = float(word)
    except ValueError:
        return word
    return int(number) if number.is_integer() and "." not in word and "e" not in word.lower() else number


def _call(
    name: str,
    function: Callable[..., Any],
    given: Mapping[str, Value],
    *first: Any,
    but: Mapping[str, Value] | None = None,
) -> Any:
    """`function` with parameters checked by name; `but` are further ones given for the same plan."""
    parameters = list(inspect.signature(function).parameters.values())[len(first) :]
    known = [parameter.name for parameter in parameters]
    if unknown := [key for key in given if key not in known]:
        raise ConfigError(
            f"--plan {name}: unknown parameter {unknown[0]!r}{nearest(unknown[0], known)}; it takes {', '.join(known)}"
        )
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.name not in given]
    if needed:
        from_table = " (or give a pilot with --table)" if but is not None else ""
        raise ConfigError(f"--plan {name}: {', '.join(needed)} missing{from_table}; write {needed[0]}=VALUE")
    for parameter in parameters:
        wanted, value = str(parameter.annotation), given.get(parameter.name)
        if isinstance(value, str) and "str" not in wanted:
            raise ConfigError(f"--plan {name}: {parameter.name}={value} is not a number; write {parameter.name}=NUMBER")
    return function(*first, **given)


def _plain(found: Any) -> dict[str, Any]:
    """A mapping of plain values; a single number is called n."""
    if not isinstance(found, Mapping):
        return {"n": float(found)}
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}


def summary(result: Mapping[str, Any]) -> str:
    """The answer, a line each; numbers of cases are rounded up beside the exact ones."""
    given = " ".join(f"{name}={value}" for name, value in result["parameters"].items())
    lines = [f"{result['plan']} {given}".rstrip()]
    answer = dict(result["answer"])
    if {"n_positive", "n_negative", "n_total"} <= set(answer):
        # Whole cases of each truth: their sum may be one more than the rounded total.
        answer["n_total"] = sum(_whole(answer[name]) for name in ("n_positive", "n_negative"))
    lines += [f"  {name:20} {_shown(name, value)}" for name, value in answer.items()]
    return "\n".join(lines)


def _whole(cases: float) -> int:
    return math.ceil(cases - 1e-9)


def _shown(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "undefined"
    counts = name == "n" or name.startswith("n_") or name in ("cases", "readers", "units")
    return f"{_whole(value)} ({value:.2f})" if counts and not value.is_integer() else f"{value:.6g}"
