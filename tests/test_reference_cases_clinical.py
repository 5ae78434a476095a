"""Reader studies, decision curves, sample sizes and fairness gaps against the reference software of the field.

    MEDIMG_ASSETS=DIR python -m pytest tests/test_reference_cases_clinical.py

Every expected number of every case is compared, within the tolerance the case states.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from clinical import decision_curve, subgroup_fairness
from reader_study import reader_study
from sample_size import (
    Binormal,
    MrmcPilot,
    accuracy_cohort,
    mrmc_cases,
    mrmc_conjectured,
    mrmc_pilot,
    mrmc_power,
    one_auc,
    paired_auc,
    paired_auc_pilot,
    partial_auc_pair,
    two_proportions,
)

FOLDER = Path(os.environ["MEDIMG_ASSETS"]) / "reference" / "clinical" if "MEDIMG_ASSETS" in os.environ else None
AREAS = ("mrmc", "decision_curve", "sample_size")
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(FOLDER is None, reason="MEDIMG_ASSETS is not set; it names the folder with the cases"),
]


def _load_cases() -> dict[str, dict[str, Any]]:
    if FOLDER is None:
        return {}
    content = json.loads((FOLDER / "cases.json").read_text())
    cases = content["cases"] if isinstance(content, dict) else content
    return {c["id"]: c for c in cases if c["area"] in AREAS or c["id"] == "fairness-compas-propublica"}


CASES = _load_cases()


def _table(name: str) -> pd.DataFrame:
    assert FOLDER is not None
    return pd.read_csv(FOLDER / name)


# ------------------------------------------------------------------------------------------------ reader studies


def _ends(row: dict[str, Any]) -> list[float]:
    return [row["ci_low"], row["ci_high"]]


def _obuchowski_rockette(case: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The result of `reader_study` under the names of the reference cases."""
    table = _table(case["data"])
    nested = case["inputs"]["case"]
    if nested != "case":
        outer = "reader" if "reader" in nested else "modality"
        table["case"] = table[outer].astype(str) + "." + table["case"].astype(str)
    result = reader_study(table, **options)
    squares, parts = result["mean_squares"], result["variance_components"]
    got: dict[str, Any] = {"ms_t": squares["T"], "ms_tr": squares["TR"], "denominator": squares["denominator"]}
    got |= {"F": result["f_statistic"], "df1": result["df_num"], "df2": result["df_den"], "p": result["p_value"]}
    got |= {"chi2": result.get("chi2"), "df": result["df_num"]}
    got |= {f"var_Cov{i}": parts[f"cov{i}"] for i in (1, 2, 3)}
    got |= {"var_Error": parts["error"], "var_R": parts["reader"], "var_TR": parts["reader_by_modality"]}
    got["diffs"] = [_named(row) for row in result["pairwise"]]
    got["means"] = [row | {"ci95": _ends(row)} for row in result["per_modality"]]
    got["per_reader_diff"] = [_named(row) for row in result["per_reader_difference"]]
    return got


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"ci95": _ends(row), "p": row["p_value"]}


def _dbm(case: dict[str, Any]) -> dict[str, Any]:
    result = reader_study(_table(case["data"]), method="dbm")
    parts = result["variance_components"]
    names = {
        "VarR": "reader",
        "VarC": "case",
        "VarTR": "reader_by_modality",
        "VarTC": "modality_by_case",
        "VarRC": "reader_by_case",
        "VarErr": "error",
    }
    return {
        "mean_squares": result["mean_squares"],
        "var_components": {short: parts[name] for short, name in names.items()},
        "F": result["f_statistic"],
        "df2": result["df_den"],
        "p": result["p_value"],
        "diff": result["difference"],
        "se": result["se"],
        "ci95": _ends(result),
    }


def _u_statistics(case: dict[str, Any]) -> dict[str, Any]:
    result = reader_study(_table(case["data"]), method="ustat")
    (a, b), (pair,) = result["per_modality"], result["pairwise"]
    return {
        "auc_a": a["estimate"],
        "var_a": a["variance"],
        "auc_b": b["estimate"],
        "var_b": b["variance"],
        "diff_a_minus_b": result["difference"],
        "var_diff": pair["variance"],
        "p_normal": pair["normal"]["p_value"],
        "ci95_normal": _ends(pair["normal"]),
        "df_bdg_single": [a["df"], b["df"]],
        "df_bdg_diff": result["df_den"],
        "p_bdg_as_printed": pair["p_value_integer_df"],
    }


def _clustered(case: dict[str, Any]) -> dict[str, Any]:
    inputs = case["inputs"]
    wide = _table(case["data"]).rename(columns={inputs["modality"]: "modality", inputs["cluster"]: "cluster"})
    modalities = [inputs["modality_a"], inputs["modality_b"]]
    keys = ["targetID", "cluster", "modality", "truth"]
    table = wide.melt(id_vars=keys, value_vars=inputs["readers"], var_name="reader", value_name="score")
    table = table.rename(columns={"targetID": "case"})
    result = reader_study(table, cluster="cluster", modalities=modalities)
    means, parts = result["per_modality"], result["variance_components"]
    return {
        "F": result["f_statistic"],
        "ddf": result["df_den"],
        "p": result["p_value"],
        "auc_mean": [row["estimate"] for row in means],
        "se_diff": result["se"],
        "se_single": [row["se"] for row in means],
        "df_single": [row["df"] for row in means],
        "cov1": parts["cov1"],
        "cov2": parts["cov2"],
        "cov3": parts["cov3"],
        "var_error": parts["error"],
    }


# ------------------------------------------------------------------------------------------- decision curves


def _net_benefit(case: dict[str, Any]) -> dict[str, Any]:
    table, thresholds = _table(case["data"]), case["inputs"]["thresholds"]
    got: dict[str, Any] = {}
    for model in case["inputs"]["models"]:
        curve = decision_curve(table[case["inputs"]["y"]], table[model], thresholds, n_boot=0)
        got[model] = _by_threshold(curve, "net_benefit")
        got["all"], got["none"] = _by_threshold(curve, "treat_all"), _by_threshold(curve, "treat_none")
    return got


def _avoided(case: dict[str, Any]) -> dict[str, Any]:
    table, model = _table(case["data"]), case["inputs"]["model"]
    thresholds = [float(t) for t in case["expected"][model]]
    curve = decision_curve(table[case["inputs"]["y"]], table[model], thresholds, n_boot=0)
    return {model: _by_threshold(curve, "net_interventions_avoided")}


def _by_threshold(curve: dict[str, Any], name: str) -> dict[str, float]:
    return {f"{t:g}": value for t, value in zip(curve["thresholds"], curve[name]["value"])}


# ------------------------------------------------------------------------------------------------ sample sizes


def _single_auc(case: dict[str, Any]) -> dict[str, Any]:
    a, b, c = (case["inputs"][name] for name in "abc")
    size_b = one_auc(auc=b["auc"], power=b["power"], ratio=b["kappa"])
    return {
        "a_power": one_auc(auc=a["auc"], n_positive=a["ncases"], n_negative=a["ncontrols"])["power"],
        "b_ncases": size_b["n_positive"],
        "b_ncontrols": size_b["n_negative"],
        "c_ncases": one_auc(auc=c["auc"], power=c["power"], ratio=c["kappa"])["n_positive"],
    }


def _paired_delong(case: dict[str, Any]) -> dict[str, Any]:
    table, inputs = _table(case["data"]), case["inputs"]
    pilot = paired_auc_pilot(table[inputs["y"]], table[inputs["score_a"]], table[inputs["score_b"]])
    size = paired_auc(pilot, power=0.9, alpha=inputs["alpha"])
    return {
        "power_at_41_72": paired_auc(pilot, n_positive=41, alpha=inputs["alpha"])["power"],
        "ncases_power90": size["n_positive"],
        "ncontrols_power90": size["n_negative"],
    }


def _obuchowski_mcclish(case: dict[str, Any]) -> dict[str, Any]:
    v = case["inputs"]
    curves = [Binormal(v[f"A{i}"], v[f"B{i}"], tuple(v["FPR_range"])) for i in (1, 2)]
    plan = partial_auc_pair(*curves, delta=v["delta"], corr_positive=v["ra"], corr_negative=v["rn"])
    return {"ncases": paired_auc(plan, power=v["power"], alpha=v["alpha"])["n_positive"]}


def _mrmc_power(case: dict[str, Any]) -> dict[str, Any]:
    v = case["inputs"]
    pilot = MrmcPilot(v["VarTR"], v["Var"], v["Cov1"], v["Cov2"], v["Cov3"], cases=v["KStar"], effect=v["effect"])
    result = mrmc_power(pilot, readers=v["J"], cases=v["K"], alpha=v["alpha"])
    return {"power": result["power"], "ncp": result["ncp"], "ddf": result["df_den"]}


def _mrmc_cases(case: dict[str, Any]) -> dict[str, Any]:
    pilot = mrmc_pilot(reader_study(_table(case["data"])))
    stated = {
        name: _size(mrmc_cases(pilot, readers=6, effect=0.05, random=random))
        for name, random in (("rrrc", "both"), ("frrc", "cases"))
    }
    observed = {f"J{readers}": _size(mrmc_cases(pilot, readers=readers)) for readers in range(6, 11)}
    return {"effect_005_J6": stated, "observed_effect": observed}


def _size(result: dict[str, float]) -> dict[str, float]:
    return {"K": result["cases"], "power": result["power"]}


def _conjectured(case: dict[str, Any]) -> dict[str, Any]:
    v = case["inputs"]
    result = mrmc_conjectured(
        readers=v["J"],
        delta=v["delta"],
        theta=v["theta"],
        range_between=v["rangeb"],
        range_within=v["rangew"],
        ratio=v["R"],
        **{name: v[name] for name in ("r1", "r2", "r3", "rb", "power", "alpha")},
    )
    return {
        "varTR": result["reader_by_modality"],
        "varE": result["error"],
        "cov1": result["cov1"],
        "cov2": result["cov2"],
        "units_diseased": result["n_positive"],
        "controls": result["n_negative"],
        "total": result["n_total"],
    }


def _precision(case: dict[str, Any]) -> dict[str, Any]:
    v = case["inputs"]
    size = accuracy_cohort(
        sensitivity=v["sens"], specificity=v["spec"], prevalence=v["prevalence"], margin=v["epsilon"]
    )
    return {
        "n_total_for_sens_unrounded": size["n_for_sensitivity"],
        "n_total_for_spec_unrounded_or_ceiled": size["n_for_specificity"],
    }


def _proportions(case: dict[str, Any]) -> dict[str, Any]:
    v = case["inputs"]
    return {
        method: two_proportions(v["p1"], v["p2"], power=v["power"], alpha=v["alpha"], method=method)["n"]
        for method in ("arcsine", "normal")
    }


# --------------------------------------------------------------------------------------------------- fairness


def _compas(case: dict[str, Any]) -> dict[str, Any]:
    labels, calls, race = _expanded(case["inputs"])
    column = subgroup_fairness(labels, calls, subgroups={"race": race}, n_boot=200)["columns"]["race"]
    gaps = column["gaps"]
    tpr, fpr, odds, parity = (
        gaps[name] for name in ("equal_opportunity", "false_positive_rate", "equalized_odds", "demographic_parity")
    )
    got = {name.lower(): _rates_of(column["groups"][name]["metrics"]) for name in ("Black", "White")}
    return got | {
        "tpr": {"B": tpr["by_group"]["Black"], "W": tpr["by_group"]["White"]},
        "equalized_odds_difference_worst": odds["difference"],
        "equalized_odds_difference_mean": odds["mean_difference"],
        "equalized_odds_ratio": odds["ratio"],
        "demographic_parity_difference": parity["difference"],
        "demographic_parity_ratio": parity["ratio"],
        "equal_opportunity_difference": tpr["difference"],
        "tpr_gap_wald_ci95": _ends(tpr),
        "tpr_chi2": tpr["statistic"],
        "fpr_gap_wald_ci95": _ends(fpr),
        "fpr_chi2": fpr["statistic"],
    }


def _expanded(counts: dict[str, dict[str, int]]) -> tuple[Sequence[int], Sequence[float], list[str]]:
    cells = {"tp": (1, 1.0), "fn": (1, 0.0), "fp": (0, 1.0), "tn": (0, 0.0)}
    rows = [(*cells[cell], race) for race, of in counts.items() for cell, n in of.items() for _ in range(n)]
    labels, calls, race = zip(*rows)
    return labels, calls, list(race)


def _rates_of(metrics: dict[str, Any]) -> dict[str, float]:
    value = {name: metrics[name]["value"] for name in ("sensitivity", "specificity", "precision", "npv")}
    return {
        "fpr_pct": 100 * (1 - value["specificity"]),
        "fnr_pct": 100 * (1 - value["sensitivity"]),
        "ppv": value["precision"],
        "npv": value["npv"],
        "lr_pos": value["sensitivity"] / (1 - value["specificity"]),
        "lr_neg": (1 - value["sensitivity"]) / value["specificity"],
    }


# --------------------------------------------------------------------------------------------------- the test

COMPUTE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "mrmc-vandyke-auc-rrrc-jackknife": _obuchowski_rockette,
    "mrmc-vandyke-auc-frrc-jackknife": lambda case: _obuchowski_rockette(case, readers="fixed"),
    "mrmc-vandyke-auc-rrfc": lambda case: _obuchowski_rockette(case, cases="fixed"),
    "mrmc-vandyke-auc-rrrc-delong": lambda case: _obuchowski_rockette(case, covariance="delong"),
    "mrmc-vandyke-auc-rrrc-unbiased": lambda case: _obuchowski_rockette(case, covariance="unbiased"),
    "mrmc-vandyke-sensitivity-rrrc": lambda case: _obuchowski_rockette(case, outcome="sensitivity", threshold=3),
    "mrmc-vandyke-cases-nested-in-readers": _obuchowski_rockette,
    "mrmc-vandyke-cases-nested-in-modalities": _obuchowski_rockette,
    "mrmc-vandyke-dbm": _dbm,
    "mrmc-imrmc-example": _u_statistics,
    "mrmc-imrmc-splitplot": _u_statistics,
    "mrmc-imrmc-vandyke": _u_statistics,
    "mrmc-clustered-mitotic-scannerA-wsi": _clustered,
    "mrmc-clustered-mitotic-scannerA-roi": _clustered,
    "dca-binary": _net_benefit,
    "dca-net-interventions-avoided": _avoided,
    "samplesize-auc-single": _single_auc,
    "samplesize-auc-paired-delong": _paired_delong,
    "samplesize-auc-obuchowski-mcclish": _obuchowski_mcclish,
    "samplesize-mrmc-vandyke-power": _mrmc_power,
    "samplesize-mrmc-vandyke-K": _mrmc_cases,
    "samplesize-mrmc-conjectured-1": _conjectured,
    "samplesize-precision-sens-spec": _precision,
    "samplesize-two-proportions": _proportions,
    "fairness-compas-propublica": _compas,
}


def _leaves(expected: Any, got: Any, path: str = "") -> Iterator[tuple[str, Any, Any, float | None]]:
    """Every expected number with what was computed under the same name, and its tolerance."""
    if isinstance(expected, dict) and "value" in expected:
        yield path, expected["value"], got, expected["tol"]
    elif isinstance(expected, dict):
        for name, inner in expected.items():
            yield from _leaves(inner, got[name], f"{path}/{name}")
    elif isinstance(expected, list):
        assert len(expected) == len(got), path
        for i, inner in enumerate(expected):
            yield from _leaves(inner, got[i], f"{path}[{i}]")
    else:
        yield path, expected, got, None


@pytest.mark.parametrize("identifier", sorted(COMPUTE))
def test_every_number_of_the_case_is_within_its_tolerance(identifier: str) -> None:
    case = CASES[identifier]
    misses = []
    for path, expected, got, tolerance in _leaves(case["expected"], COMPUTE[identifier](case)):
        near = got == expected if tolerance is None else math.isclose(got, expected, rel_tol=1e-12, abs_tol=tolerance)
        if not near:
            misses.append(f"{path}: {got!r}, expected {expected!r} ± {tolerance}")
    assert not misses, "\n".join(misses)


def test_every_case_of_these_areas_is_computed() -> None:
    assert set(CASES) == set(COMPUTE)


def test_ignoring_clusters_understates_the_pooled_variance_2_6_fold() -> None:
    table = _table("vandyke.csv")
    pooled = table[table["modality"] == 1].assign(reader="all", modality="pooled", patient=table["case"])
    pooled["case"] = np.arange(len(pooled))
    variance = {
        name: reader_study(pooled, readers="fixed", modalities=["pooled"], covariance=name, cluster=cluster)
        for name, cluster in (("obuchowski", "patient"), ("delong", None))
    }
    se = {name: result["per_modality"][0]["se"] for name, result in variance.items()}
    assert (se["obuchowski"] / se["delong"]) ** 2 == pytest.approx(2.6, abs=0.1)


def test_fixed_readers_by_dorfman_berbaum_metz_give_the_p_value_of_rjafroc() -> None:
    result = reader_study(_table("vandyke.csv"), method="dbm", readers="fixed")
    assert (result["test"], result["df_den"]) == ("F", 113)
    assert result["p_value"] == pytest.approx(0.0210349686, abs=5e-11)


def test_the_headline_of_the_cases_readme_is_reproduced() -> None:
    table = _table("vandyke.csv")
    headline = reader_study(table)
    assert headline["difference"] == pytest.approx(-0.043800, abs=5e-7)
    assert headline["p_value"] == pytest.approx(0.0516657, abs=5e-8)
    published = {"delong": 0.051233, "unbiased": 0.051162}
    for covariance, p_value in published.items():
        assert reader_study(table, covariance=covariance)["p_value"] == pytest.approx(p_value, abs=5e-7)
