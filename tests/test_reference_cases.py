"""AUROC, operating points, proportions, paired tests, agreement and calibration against the field's software.

    MEDIMG_ASSETS=DIR python -m pytest tests/test_reference_cases.py

Every expected number of every case is compared, within the tolerance the case states.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import special

import agreement
import auroc
import calibration
import metrics
import paired_tests
import proportions

FOLDER = Path(os.environ["MEDIMG_ASSETS"]) / "reference" / "clinical" if "MEDIMG_ASSETS" in os.environ else None
AREAS = (
    "auc",
    "operating_point",
    "clustered",
    "bootstrap",
    "proportion",
    "mcnemar",
    "kappa",
    "calibration",
    "multiplicity",
)
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(FOLDER is None, reason="MEDIMG_ASSETS is not set; it names the folder with the cases"),
]
Case = dict[str, Any]


def _load_cases() -> dict[str, Case]:
    if FOLDER is None:
        return {}
    content = json.loads((FOLDER / "cases.json").read_text())
    cases = content["cases"] if isinstance(content, dict) else content
    return {c["id"]: c for c in cases if c["area"] in AREAS or c["id"].startswith("auc-subgroup")}


CASES = _load_cases()


def _table(case: Case) -> pd.DataFrame:
    assert FOLDER is not None
    return pd.read_csv(FOLDER / case["data"])


# ----------------------------------------------------------------------------------------------- discrimination


def _single_auc(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    y = (table[given["y"]] == given["positive"]).astype(int)
    higher = given["higher_is_positive"]
    result = auroc.delong(y, table[given["score"]], higher_is_positive=higher)
    ci = {
        level: auroc.auroc_ci(y, table[given["score"]], level=level / 100, higher_is_positive=higher).ci
        for level in (90, 95)
    }
    return {
        "auc": result.auc[0],
        "delong_var": result.covariance[0, 0],
        "ci95": ci[95],
        "ci90": ci[90],
        "n_pos": result.n_pos,
        "n_neg": result.n_neg,
    }


def _paired_auc(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    y, a, b = (table[given[name]] for name in ("y", "score_a", "score_b"))
    tests = {side: auroc.delong_test(y, a, b, alternative=side) for side in ("two-sided", "greater", "less")}
    both = tests["two-sided"]
    return {
        "auc_a": both.first,
        "auc_b": both.second,
        "z": both.statistic,
        "p_two_sided": both.p_value,
        "p_greater": tests["greater"].p_value,
        "p_less": tests["less"].p_value,
        "diff_ci95": both.ci,
        "delong_cov": auroc.delong(y, np.column_stack([a, b])).covariance[0, 1],
    }


def _independent_auc(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    y = table[given["y"]]
    test = auroc.delong_test_independent(y, table[given["score_a"]], y, table[given["score_b"]])
    return {"D": test.statistic, "df": test.df, "p_two_sided": test.p_value}


def _subgroup_auc(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    sides, got = {}, {}
    for name, part in table.groupby(given["group"]):
        short, y, score = str(name).lower(), part[given["y"]], part[given["score"]]
        sides[short] = y, score
        estimate = auroc.auroc_ci(y, score)
        got |= {f"auc_{short}": estimate.value, f"ci95_{short}": estimate.ci}
        got[f"n_pos_neg_{short}"] = [int(y.sum()), int((1 - y).sum())]
    test = auroc.delong_test_independent(*sides["male"], *sides["female"])
    normal = test.difference / test.standard_error
    return got | {"D": test.statistic, "df": test.df, "p_two_sided": test.p_value, "z_if_normal_reference": normal}


def _bootstrap_auc(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    draws = auroc.bootstrap_auroc(
        table[given["y"]], table[given["score"]], n_boot=10_000, stratified=given["stratified"], seed=1
    )[:, 0]
    return {"ci95": auroc.percentile_interval(draws), "var": draws.var(ddof=1)}


def _bootstrap_auc_test(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    y, a, b = (table[given[name]] for name in ("y", "score_a", "score_b"))
    test = auroc.bootstrap_auroc_test(y, a, b, n_boot=10_000, seed=1, stratified=given["stratified"])
    return {"z": test.statistic, "p": test.p_value}


def _partial_auc(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    return {
        f"{name}_{focus[:4]}_100_90": auroc.partial_auroc(
            table[given["y"]], table[given["score"]], low=0.9, high=1.0, focus=focus, corrected=name == "mcclish"
        )
        for name in ("pauc", "mcclish")
        for focus in ("specificity", "sensitivity")
    }


def _average_precision(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    return {name: auroc.average_precision(table[given["y"]], table[name]) for name in given["scores"]}


def _degenerate_auc(case: Case) -> dict[str, Any]:
    got = {}
    for name, given in case["inputs"].items():
        estimate = auroc.auroc_ci(given["y"], given["score"], raw=True)
        got |= {f"{name}_auc": estimate.value, f"{name}_delong_var": estimate.standard_error**2}
        got[f"{name}_ci"] = estimate.ci
        flagged = auroc.auroc_ci(given["y"], given["score"])
        assert flagged.ci_low < flagged.ci_high and "DeLong" in flagged.reason
    return got


def _per_reader_auc(case: Case) -> dict[str, Any]:
    table, got = _table(case), {}
    for (modality, reader), part in table.groupby(["modality", "reader"]):
        estimate = auroc.auroc_ci(part["truth"], part["score"])
        got[f"mod{modality}_reader{reader}"] = {
            "auc": estimate.value,
            "delong_var": estimate.standard_error**2,
            "ci95": estimate.ci,
        }
    for reader, part in table.groupby("reader"):
        wide = part.pivot(index=["case", "truth"], columns="modality", values="score").reset_index()
        test = auroc.delong_test(wide["truth"], wide[1], wide[2])
        got[f"paired_reader{reader}"] = {"z": test.statistic, "p": test.p_value, "diff_ci95": test.ci}
    return got


def _hand_till(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    return {"auc": auroc.hand_till(table[given["y"]], table[given["score"]])}


def _softmax(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    logits = table.filter(like="logit").to_numpy()
    return table["label"].to_numpy(), logits


def _multiclass(case: Case) -> dict[str, Any]:
    y, logits = _softmax(_table(case))
    p = calibration.apply_temperature(logits, 1.0)
    predicted = p.argmax(axis=1)
    rates = metrics.confusion_metrics(metrics.confusion_matrix(y, predicted, n_classes=p.shape[1]))
    got = {
        f"auc_{scheme}_{average}": auroc.multiclass_auroc(y, p, scheme=scheme, average=average)
        for scheme in ("ovr", "ovo")
        for average in ("macro", "weighted")
    }
    kappas = {
        name: agreement.cohen_kappa(y, predicted, weights=weights).estimate.value
        for name, weights in (("kappa", "unweighted"), ("kappa_lin", "linear"), ("kappa_quad", "quadratic"))
    }
    return got | {
        "auc_micro": auroc.multiclass_auroc(y, p, average="micro"),
        **kappas,
        "f1_macro": rates["f1"],
        "bacc": rates["balanced_accuracy"],
        "mcc": rates["mcc"],
        "acc": rates["accuracy"],
        "top2": np.mean([label in row for label, row in zip(y, np.argsort(p, axis=1)[:, -2:])]),
    }


def _youden(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    y, score = table[given["y"]], table[given["score"]]
    point = metrics.choose_threshold(y, score, rule="youden")
    called = (score >= point.threshold).astype(int)
    (tn, fp), (fn, tp) = metrics.confusion_matrix(y.to_numpy(), called.to_numpy(), n_classes=2)
    diagnostics = proportions.diagnostic_table(tp, fp, fn, tn)
    return {
        "sensitivity": point.sensitivity,
        "specificity": point.specificity,
        **{name: diagnostics[name].value for name in ("ppv", "npv", "accuracy")},
        **{"tp": tp, "fp": fp, "tn": tn, "fn": fn},
        "threshold_midpoint": point.threshold,
        "youden_J": diagnostics["youden"].value,
    }


# ------------------------------------------------------------------------------------------------------ clusters


def _clustered_auc(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    y, score, patient = (table[given[name]] for name in ("y", "score", "cluster"))
    estimate = auroc.auroc_ci(y, score, groups=patient)
    return {
        "auc": estimate.value,
        "var": auroc.clustered_auroc(y, score, patient)[1][0, 0],
        "se": estimate.standard_error,
        "ci95": estimate.ci,
        "unclustered_delong_var": auroc.delong(y, score).covariance[0, 0],
    }


def _clustered_auc_pair(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    assert given["score_b"] == "-age"
    y, a, b, patient = table[given["y"]], table[given["score_a"]], -table["age"], table[given["cluster"]]
    covariance = auroc.clustered_auroc(y, np.column_stack([a, b]), patient)[1]
    test = auroc.clustered_auroc_test(y, a, b, patient)
    return {
        "auc_a": test.first,
        "var_a": covariance[0, 0],
        "auc_b": test.second,
        "var_b": covariance[1, 1],
        "diff_a_minus_b": test.difference,
        "var_diff": test.standard_error**2,
        "diff_ci95": test.ci,
        "p": test.p_value,
    }


def _clustered_rates(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    called = table[given["score"]] >= given["threshold"]
    got = {}
    for label, hit, name, short in ((1, called, "sens", "pos"), (0, ~called, "spec", "neg")):
        chosen = table[given["y"]] == label
        estimate = proportions.clustered_proportion(hit[chosen], table[given["cluster"]][chosen])
        got |= {name: estimate.value, f"se_{name}": estimate.standard_error, f"n_{short}": int(chosen.sum())}
        got[f"clusters_{short}"] = table[given["cluster"]][chosen].nunique()
        got["tp" if label else "tn"] = int(hit[chosen].sum())
    return got


def _clustered_bootstrap(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    y, score, patient = (table[given[name]] for name in ("y", "score", "cluster"))
    # The scores are risks 6 to 12; any rising map into [0, 1] keeps ranks and the threshold.
    draws = metrics.bootstrap_metrics(y, score / 100, threshold=given["threshold"] / 100, groups=patient, n_boot=4000)
    point = metrics.operating_point(y, score, threshold=given["threshold"])
    got = {"auc": auroc.auroc(y, score), "sens": point.sensitivity, "spec": point.specificity}
    for name, metric in (("auc", "auc_roc"), ("sens", "sensitivity"), ("spec", "specificity")):
        got |= {f"se_{name}": draws[metric].std(ddof=1), f"ci95_{name}": auroc.percentile_interval(draws[metric])}
    rows = auroc.bootstrap_auroc(y, score, n_boot=4000, stratified=False)[:, 0]
    return got | {"naive_row_bootstrap_se_auc": rows.std(ddof=1)}


# --------------------------------------------------------------------------------------------------- proportions


def _one_proportion(case: Case) -> list[Any]:
    names = {
        "wilson": "wilson",
        "wilson_cc": "wilson_cc",
        "clopper_pearson": "clopper_pearson",
        "agresti_coull": "agresti_coull",
        "jeffreys_qbeta": "jeffreys",
        "wald_unclipped": "wald",
    }
    level = case["inputs"]["level"]
    return [
        {
            "x": x,
            "n": n,
            **{key: proportions.proportion_interval(x, n, level=level, method=name) for key, name in names.items()},
        }
        for x, n in case["inputs"]["x_n"]
    ]


def _two_proportions(case: Case) -> list[Any]:
    names = {"newcombe_hybrid_score": "newcombe", "miettinen_nurminen": "miettinen_nurminen", "wald": "wald"}
    rows = []
    for row in case["expected"]:
        x1, n1, x2, n2 = (row[name] for name in ("x1", "n1", "x2", "n2"))
        estimates = {
            key: proportions.difference_of_proportions(x1, n1, x2, n2, level=case["inputs"]["level"], method=name)
            for key, name in names.items()
        }
        table = [[x1, n1 - x1], [x2, n2 - x2]]
        chi2, p = proportions.chi_square_test(table)
        rows.append(
            {
                **{"x1": x1, "n1": n1, "x2": x2, "n2": n2, "diff": estimates["wald"].value},
                **{key: estimate.ci for key, estimate in estimates.items()},
                **{"pearson_chi2": chi2, "pearson_p": p, "fisher_p": proportions.fisher_test(table)},
            }
        )
    return rows


def _diagnostic_table(case: Case) -> dict[str, Any]:
    tables = {
        short: proportions.diagnostic_table(**case["inputs"], method=name)
        for short, name in (("exact", "clopper_pearson"), ("wilson", "wilson"))
    }
    shares = {
        "se": "sensitivity",
        "sp": "specificity",
        "pv.pos": "ppv",
        "pv.neg": "npv",
        "diag.ac": "accuracy",
        "ap": "apparent_prevalence",
    }
    ratios = {"lr.pos": "lr_positive", "lr.neg": "lr_negative", "diag.or": "diagnostic_odds_ratio"}
    exact = tables["exact"]
    return {
        **{k: {"est": exact[v].value, **{s: t[v].ci for s, t in tables.items()}} for k, v in shares.items()},
        **{k: {"est": exact[v].value, "ci_log": exact[v].ci} for k, v in ratios.items()},
        "youden": {"est": exact["youden"].value},
    }


def _p_adjust(case: Case) -> dict[str, Any]:
    return {name: proportions.adjust_p_values(case["inputs"]["p"], method=name) for name in case["expected"]}


# -------------------------------------------------------------------------------------------------- paired tests


def _clustered_mcnemar(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    a, b, patient = (table[given[name]] for name in ("test_a", "test_b", "cluster"))
    plain = paired_tests.mcnemar(int((a & ~b & 1).sum()), int((b & ~a & 1).sum()), method="asymptotic")
    got = {"mcnemar": plain}
    for name in paired_tests.CLUSTERED_METHODS:
        got[name] = paired_tests.clustered_mcnemar(a, b, patient, method=name)
    return {name: {"chi2": test.statistic, "p": test.p_value} for name, test in got.items()}


def _paired_accuracy(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    d, y1, y2 = (table[given[name]] for name in ("truth", "test1", "test2"))
    got: dict[str, Any] = {}
    intervals: dict[str, dict[str, Any]] = {}
    for label, name in ((1, "sens"), (0, "spec")):
        right1, right2 = (y1 == label)[d == label], (y2 == label)[d == label]
        only2, only1, n = int((right2 & ~right1).sum()), int((right1 & ~right2).sum()), len(right1)
        test = paired_tests.mcnemar(only2, only1, method="asymptotic")
        got |= {f"{name}1": right1.mean(), f"{name}2": right2.mean()}
        got |= {f"{name}_mcnemar_chi2_nocc": test.statistic, f"{name}_p": test.p_value}
        got[f"{name}_exact_p"] = paired_tests.mcnemar(only2, only1, method="exact").p_value
        for method in paired_tests.PAIRED_INTERVALS:
            estimate = paired_tests.paired_difference(only2, only1, n, method=method)
            got[f"{name}_diff_2_minus_1"] = estimate.value
            intervals.setdefault(f"diff_ci95_{method}", {})[name] = estimate.ci
    for which in ("ppv", "npv"):
        ratio, p = paired_tests.relative_predictive_value(d, y2, y1, which=which)
        got |= {f"rel_{which}": ratio.value, f"rel_{which}_ci": ratio.ci, f"rel_{which}_p": p}
        weighted, p_weighted = paired_tests.predictive_value_test(d, y1, y2, which=which)
        got |= {f"{which}_weighted_gen_score_chi2": weighted, f"{which}_weighted_gen_score_p": p_weighted}
        got[f"{which}_gen_score_chi2"] = paired_tests.predictive_value_test(d, y1, y2, which=which, weighted=False)[0]
    return got | intervals


def _mcnemar(case: Case) -> dict[str, Any]:
    b, c = case["inputs"]["b"], case["inputs"]["c"]
    tests = {name: paired_tests.mcnemar(b, c, method=name) for name in paired_tests.MCNEMAR_METHODS}
    return {
        "chi2_cc": tests["corrected"].statistic,
        "p_cc": tests["corrected"].p_value,
        "chi2": tests["asymptotic"].statistic,
        "p": tests["asymptotic"].p_value,
        "p_exact": tests["exact"].p_value,
        "discordant_ratio_b_over_c": tests["exact"].odds_ratio,
        "or_ci95_exact": tests["exact"].odds_ratio_ci,
    }


# ----------------------------------------------------------------------------------------------------- agreement


def _fleiss(case: Case) -> dict[str, Any]:
    ratings = _table(case)[case["inputs"]["raters"]]
    fleiss, ac1 = agreement.fleiss_kappa(ratings), agreement.gwet_ac(ratings)
    return {
        "kappa": fleiss.estimate.value,
        "z_null": fleiss.z_null,
        "se_null": fleiss.se_null,
        "exact_conger_kappa": agreement.conger_kappa(ratings).value,
        "per_category_kappa": {str(k): v for k, v in fleiss.per_category.items()},
        "per_category_z": {str(k): v for k, v in fleiss.per_category_z.items()},
        "gwet_large_sample_se": fleiss.estimate.standard_error,
        "gwet_ci95": fleiss.estimate.ci,
        "light_kappa": agreement.pairwise_kappa(ratings).light,
        "gwet_ac1": ac1.value,
        "gwet_ac1_se": ac1.standard_error,
        "krippendorff_alpha_nominal": agreement.krippendorff_alpha(ratings, n_boot=100).value,
    }


def _named_kappa(kappa: agreement.Kappa) -> dict[str, Any]:
    return {
        "kappa": kappa.estimate.value,
        "ase": kappa.estimate.standard_error,
        "ci95": kappa.estimate.ci,
        "z_null": kappa.z_null,
        "se_null": kappa.se_null,
        "p_null": kappa.p_null,
    }


def _cohen(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    kappa = agreement.cohen_kappa(
        table[given["a"]],
        table[given["b"]],
        weights=given.get("weights", "unweighted"),
        categories=given["categories"],
    )
    return _named_kappa(kappa)


def _kappa_of_table(case: Case) -> dict[str, Any]:
    (counts,) = case["inputs"].values()
    return {name: _named_kappa(agreement.kappa_from_table(counts, weights=name)) for name in agreement.WEIGHTS}


def _krippendorff(case: Case) -> dict[str, Any]:
    ratings = _table(case)[case["inputs"]["raters"]]
    return {name: agreement.krippendorff_alpha(ratings, metric=name, n_boot=200).value for name in case["expected"]}


# --------------------------------------------------------------------------------------------------- calibration


def _binary_calibration(case: Case) -> dict[str, Any]:
    table, given = _table(case), case["inputs"]
    y, p = table[given["y"]].to_numpy(), table[given["prob"]].to_numpy()
    ece = calibration.expected_calibration_error
    z, z_p = calibration.spiegelhalter_z(y, p)
    fit, large = calibration.logistic_recalibration(y, p), calibration.calibration_in_the_large(y, p)
    logits = special.logit(p)
    temperature = calibration.fit_temperature(logits, y)
    chi2, df, hl_p = calibration.hosmer_lemeshow(y, p, strategy="equal_width")
    bins = calibration.reliability_bins(y, p)
    return {
        **{"n": len(y), "events": y.sum(), "auc": auroc.auroc(y, p), "brier": calibration.brier(y, p)},
        **{"log_loss": calibration.log_loss(y, p), "average_precision": auroc.average_precision(y, p)},
        **{f"ece_{b}_equal_width": ece(y, p, n_bins=b) for b in (10, 15)},
        **{f"mce_{b}_equal_width": ece(y, p, n_bins=b, norm="max") for b in (10, 15)},
        **{"rms_ce_10": ece(y, p, norm="l2"), "ece_10_equal_mass": ece(y, p, strategy="equal_mass")},
        **{"spiegelhalter_z": z, "spiegelhalter_p": z_p},
        **{"slope": fit.slope.value, "slope_se": fit.slope.standard_error, "slope_ci95_wald": fit.slope.ci},
        **{"intercept_joint": fit.intercept.value, "intercept_joint_ci95": fit.intercept.ci},
        **{"calibration_in_the_large_offset": large.value, "citl_se": large.standard_error, "citl_ci95": large.ci},
        "o_over_e": calibration.observed_to_expected(y, p),
        "temperature": temperature,
        "log_loss_after_temperature": calibration.log_loss(y, special.expit(logits / temperature)),
        **{"hosmer_lemeshow_10_equal_width_chi2": chi2, "hl_p_df8": hl_p if df == 8 else None},
        "reliability_curve_uniform10": {"observed": bins.observed, "mean_pred": bins.mean_probability},
    }


def _multiclass_calibration(case: Case) -> dict[str, Any]:
    y, logits = _softmax(_table(case))
    temperature = calibration.fit_temperature(logits, y)
    got: dict[str, Any] = {"temperature": temperature, "accuracy": (logits.argmax(axis=1) == y).mean()}
    for when, t in (("before", 1.0), ("after", temperature)):
        p = calibration.apply_temperature(logits, t)
        got[f"log_loss_{when}"] = calibration.log_loss(y, p)
        got[f"brier_sum_over_classes_{when}"] = calibration.brier(y, p)
        for bins in (10, 15):
            got[f"ece{bins}_{when}"] = calibration.expected_calibration_error(y, p, n_bins=bins)
        got[f"mce10_{when}"] = calibration.expected_calibration_error(y, p, norm="max")
        # torchmetrics computes in float32, where two confidences round to 1 and get a bin of their own.
        single = p.astype(np.float32)
        got[f"rms_ce_15_{when}"] = calibration.expected_calibration_error(
            y, single, n_bins=15, norm="l2", last_closed=False
        )
    return got


# ----------------------------------------------------------------------------------------------------- all of it

BY_PREFIX: dict[str, Callable[[Case], Any]] = {
    "auc-delong-paired": _paired_auc,
    "auc-delong-unpaired": _independent_auc,
    "auc-delong-vandyke": _per_reader_auc,
    "auc-delong-asah": _single_auc,
    "auc-subgroup": _subgroup_auc,
    "auc-bootstrap-paired": _bootstrap_auc_test,
    "auc-bootstrap": _bootstrap_auc,
    "auc-partial": _partial_auc,
    "auc-edge": _degenerate_auc,
    "auc-multiclass-handtill": _hand_till,
    "ap-": _average_precision,
    "multiclass-metrics": _multiclass,
    "oppoint-youden": _youden,
    "cluster-auc-paired": _clustered_auc_pair,
    "cluster-auc": _clustered_auc,
    "cluster-bootstrap": _clustered_bootstrap,
    "cluster-sens-spec": _clustered_rates,
    "cluster-mcnemar": _clustered_mcnemar,
    "binom-ci": _one_proportion,
    "two-proportions": _two_proportions,
    "confusion-2x2": _diagnostic_table,
    "paired-tests": _paired_accuracy,
    "mcnemar": _mcnemar,
    "kappa-fleiss": _fleiss,
    "kappa-krippendorff": _krippendorff,
    "kappa-mspatients": _kappa_of_table,
    "kappa-": _cohen,
    "calibration-multiclass": _multiclass_calibration,
    "calibration-": _binary_calibration,
    "multiplicity": _p_adjust,
}


def _compute(case: Case) -> Any:
    prefix = next(prefix for prefix in BY_PREFIX if case["id"].startswith(prefix))
    return BY_PREFIX[prefix](case)


def _leaves(expected: Any, got: Any, path: str = "") -> Iterator[tuple[str, float, float, float]]:
    """(where, expected, tolerance, got) for every number of the case; one we do not compute is an error."""
    if isinstance(expected, dict) and set(expected) == {"value", "tol"}:
        yield path, expected["value"], expected["tol"], got
    elif isinstance(expected, dict):
        for key, item in expected.items():
            yield from _leaves(item, got[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(got), path
        for index, item in enumerate(expected):
            yield from _leaves(item, got[index], f"{path}[{index}]")
    else:
        yield path, expected, 0.0, got


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_number_agrees_with_the_reference_software(name: str) -> None:
    case = CASES[name]
    wrong = [
        f"{where}: {got!r} is not {expected!r} ± {tolerance:g}"
        for where, expected, tolerance, got in _leaves(case["expected"], _compute(case))
        # R's last digit: a tolerance of 0 on a float stands for equality after rounding.
        if not abs(got - expected) <= tolerance + 1e-15
    ]
    assert not wrong, "\n".join(wrong)


def test_ignoring_clusters_understates_the_variance_of_pooled_readings() -> None:
    """Five readers' scores of the same cases are no independent films (trap 8 of the cases' README)."""
    assert FOLDER is not None
    table = pd.read_csv(FOLDER / "vandyke.csv")
    for _, part in table.groupby("modality"):
        clustered = auroc.clustered_auroc(part["truth"], part["score"], part["case"])[1][0, 0]
        assert clustered > 2 * auroc.delong(part["truth"], part["score"]).covariance[0, 0]
