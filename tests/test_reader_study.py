"""Multi-reader multi-case analysis against brute force, textbook tests, other modules and simulation."""

from __future__ import annotations

import json
import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import auc as area_under
from sklearn.metrics import roc_auc_score
from statsmodels.stats.anova import AnovaRM

from auroc import clustered_auroc, delong, delong_test
from errors import ConfigError, DataError
from reader_study import load_table, reader_roc_points, reader_study


def simulate(
    *, readers: int = 4, modalities: int = 2, positive: int = 12, negative: int = 15, seed: int = 0, shift: float = 1.2
) -> pd.DataFrame:
    """A crossed study after Roe & Metz 1997: case, reader and their interactions are normal; no true difference."""
    rng = np.random.default_rng(seed)
    truth = np.repeat([1, 0], [positive, negative])
    case = rng.normal(0, 0.5, len(truth))
    rows = []
    by_modality = rng.normal(0, 0.5, (modalities, len(truth)))
    by_reader = rng.normal(0, 0.4, (readers, len(truth)))
    skill = rng.normal(0, 0.2, (modalities, readers))
    for i, j in product(range(modalities), range(readers)):
        noise = rng.normal(0, 0.6, len(truth))
        score = truth * (shift + skill[i, j]) + case + by_modality[i] + by_reader[j] + noise
        rows += [
            {"reader": f"r{j}", "modality": "abc"[i], "case": f"c{k}", "truth": int(t), "score": round(s, 1)}
            for k, (t, s) in enumerate(zip(truth, score))
        ]
    return pd.DataFrame(rows)


def sessions_of(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    return {key: rows.sort_values("case") for key, rows in table.groupby(["modality", "reader"])}


def wide_scores(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, pd.Index]:
    """Truth (K,), scores (K, G) in the order modality, reader, and the cases."""
    wide = table.pivot(index="case", columns=["modality", "reader"], values="score").sort_index(axis=1)
    truth = table.drop_duplicates("case").set_index("case")["truth"].reindex(wide.index).to_numpy()
    return truth, wide.to_numpy(), wide.index


def averaged(cov: np.ndarray, readers: int) -> dict[str, float]:
    """Error, Cov1, Cov2 and Cov3 by their definitions, session by session."""
    pairs: dict[str, list[float]] = {"error": [], "cov1": [], "cov2": [], "cov3": []}
    for g, h in product(range(len(cov)), repeat=2):
        same_modality, same_reader = g // readers == h // readers, g % readers == h % readers
        name = {(True, True): "error", (False, True): "cov1", (True, False): "cov2", (False, False): "cov3"}
        pairs[name[same_modality, same_reader]].append(cov[g, h])
    return {name: float(np.mean(values)) for name, values in pairs.items() if values}


def components(table: pd.DataFrame, **options: Any) -> dict[str, float]:
    parts = reader_study(table, **options)["variance_components"]
    return {name: parts[name] for name in ("error", "cov1", "cov2", "cov3")}


# ----------------------------------------------------------------------------------------------- covariances


def test_jackknife_components_equal_recomputing_every_auc_without_each_case() -> None:
    table = simulate()
    truth, scores, _ = wide_scores(table)
    keep = ~np.eye(len(truth), dtype=bool)
    left = np.array([[roc_auc_score(truth[rows], column[rows]) for rows in keep] for column in scores.T])
    cov = np.cov(left) * (len(truth) - 1) ** 2 / len(truth)
    assert components(table) == pytest.approx(averaged(cov, 4), rel=1e-10)


def test_delong_components_equal_those_of_the_fast_delong_covariance() -> None:
    table = simulate(modalities=3)
    truth, scores, _ = wide_scores(table)
    expected = averaged(delong(truth, scores).covariance, 4)
    assert components(table, covariance="delong") == pytest.approx(expected, rel=1e-10)


def test_obuchowski_components_equal_those_of_the_clustered_auroc() -> None:
    table = simulate()
    table["patient"] = table["case"].str[1:].astype(int) % 9
    truth, scores, cases = wide_scores(table)
    expected = averaged(clustered_auroc(truth, scores, [int(case[1:]) % 9 for case in cases])[1], 4)
    assert components(table, cluster="patient") == pytest.approx(expected, rel=1e-10)


def test_one_case_per_cluster_makes_obuchowski_delong() -> None:
    table = simulate()
    table["patient"] = "p" + table["case"]
    assert components(table, cluster="patient") == pytest.approx(components(table, covariance="delong"), rel=1e-10)


def test_one_case_per_cluster_leaves_the_jackknife_unchanged() -> None:
    table = simulate()
    table["patient"] = "p" + table["case"]
    clustered = components(table, cluster="patient", covariance="jackknife")
    assert clustered == pytest.approx(components(table), rel=1e-10)


def test_clustered_jackknife_equals_recomputing_without_each_cluster() -> None:
    table = simulate()
    table["patient"] = table["case"].str[1:].astype(int) % 9
    truth, scores, cases = wide_scores(table)
    patient = np.array([int(case[1:]) % 9 for case in cases])
    left = np.array([[roc_auc_score(truth[patient != p], s[patient != p]) for p in range(9)] for s in scores.T])
    expected = averaged(np.cov(left) * 8**2 / 9, 4)
    assert components(table, cluster="patient", covariance="jackknife") == pytest.approx(expected, rel=1e-10)


def test_unbiased_components_equal_summing_over_pairs_that_share_no_case() -> None:
    table = simulate(positive=4, negative=5)
    truth, scores, _ = wide_scores(table)
    success = [success_matrix(column, truth) for column in scores.T]
    cov = np.array([[a.mean() * b.mean() - apart(a, b) for b in success] for a in success])
    assert components(table, covariance="unbiased") == pytest.approx(averaged(cov, 4), rel=1e-10)


def success_matrix(score: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.array([[(p > n) + (p == n) / 2 for n in score[truth == 0]] for p in score[truth == 1]])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean product of two successes that share neither the positive nor the negative case."""
    ranges = [range(a.shape[0]), range(a.shape[1])] * 2
    return float(np.mean([a[i, j] * b[k, m] for i, j, k, m in product(*ranges) if i != k and j != m]))


def test_bootstrap_components_are_near_delong_and_repeat_with_the_seed() -> None:
    table = simulate(positive=30, negative=30)
    boot = components(table, covariance="bootstrap", n_boot=20_000)
    # The bootstrap divides by n where DeLong divides by n - 1, and 20,000 draws leave noise of about 2e-5.
    assert boot == pytest.approx(components(table, covariance="delong"), rel=0.1, abs=5e-5)
    assert boot == components(table, covariance="bootstrap", n_boot=20_000)
    assert boot != components(table, covariance="bootstrap", n_boot=20_000, seed=1)


def test_clustered_bootstrap_components_are_near_obuchowski() -> None:
    table = simulate(positive=60, negative=60)
    table["patient"] = table["case"].str[1:].astype(int) % 40
    boot = components(table, cluster="patient", covariance="bootstrap", n_boot=3000)
    assert boot == pytest.approx(components(table, cluster="patient"), rel=0.15, abs=5e-5)


# ------------------------------------------------------------------------------------- against textbook tests


def test_fixed_cases_with_two_modalities_is_the_paired_t_test_of_reader_aucs() -> None:
    result = reader_study(simulate(), cases="fixed")
    auc = pd.DataFrame(result["per_reader"]).pivot(index="reader", columns="modality", values="estimate")
    expected = stats.ttest_rel(auc["a"], auc["b"])
    assert result["p_value"] == pytest.approx(expected.pvalue)
    assert result["pairwise"][0]["t"] == pytest.approx(expected.statistic)
    interval = expected.confidence_interval()
    assert [result["ci_low"], result["ci_high"]] == pytest.approx([interval.low, interval.high])


def test_fixed_cases_with_three_modalities_is_the_repeated_measures_anova_of_reader_aucs() -> None:
    result = reader_study(simulate(modalities=3), cases="fixed")
    auc = pd.DataFrame(result["per_reader"])
    expected = AnovaRM(auc, "estimate", "reader", within=["modality"]).fit().anova_table.iloc[0]
    assert result["f_statistic"] == pytest.approx(expected["F Value"])
    assert (result["df_num"], result["df_den"]) == (expected["Num DF"], expected["Den DF"])
    assert result["p_value"] == pytest.approx(expected["Pr > F"])


def test_readers_nested_in_modalities_with_fixed_cases_is_the_two_sample_t_test() -> None:
    table = simulate(readers=7)
    table = table[(table["modality"] == "a") == table["reader"].isin(["r0", "r1", "r2"])]
    result = reader_study(table, cases="fixed")
    auc = pd.DataFrame(result["per_reader"]).groupby("modality")["estimate"].apply(list)
    expected = stats.ttest_ind(auc["a"], auc["b"])
    assert result["design"] == "readers nested in modalities"
    assert result["p_value"] == pytest.approx(expected.pvalue)
    assert result["df_den"] == 5


@pytest.mark.parametrize("method", ["or", "ustat"])
def test_one_fixed_reader_is_the_paired_comparison_of_two_aucs(method: str) -> None:
    table = simulate(readers=1, positive=40, negative=50)
    truth, scores, _ = wide_scores(table)
    expected = delong_test(truth, scores[:, 0], scores[:, 1])
    options: dict[str, Any] = {"covariance": "delong"} if method == "or" else {}
    result = reader_study(table, readers="fixed", method=method, **options)
    # The U-statistic's variance is unbiased, DeLong's slightly too large.
    near = 1e-9 if method == "or" else 0.03
    assert result["se"] == pytest.approx(expected.standard_error, rel=near)
    if method == "or":
        assert result["p_value"] == pytest.approx(expected.p_value)
        assert result["chi2"] == pytest.approx(expected.statistic**2)


def test_fixed_readers_average_over_the_covariance_matrix() -> None:
    table = simulate(modalities=3)
    truth, scores, _ = wide_scores(table)
    cov = delong(truth, scores).covariance
    result = reader_study(table, readers="fixed", covariance="delong")
    for i, row in enumerate(result["per_modality"]):
        block = cov[4 * i : 4 * i + 4, 4 * i : 4 * i + 4]
        assert row["se"] == pytest.approx(math.sqrt(block.mean()))
    parts = averaged(cov, 4)
    denominator = parts["error"] - parts["cov1"] + 3 * (parts["cov2"] - parts["cov3"])
    assert result["chi2"] == pytest.approx(2 * result["mean_squares"]["T"] / denominator)
    assert result["p_value"] == pytest.approx(stats.chi2.sf(result["chi2"], 2))


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("outcome", ["auc", "sensitivity", "specificity"])
def test_dorfman_berbaum_metz_equals_obuchowski_rockette_with_the_jackknife(modalities: int, outcome: str) -> None:
    table = simulate(modalities=modalities, positive=25, negative=25, seed=3)
    threshold = None if outcome == "auc" else 0.5
    classic, pseudo = (
        reader_study(table, method=method, outcome=outcome, threshold=threshold) for method in ("or", "dbm")
    )
    for name in ("f_statistic", "df_num", "df_den", "p_value"):
        assert pseudo[name] == pytest.approx(classic[name], rel=1e-6)
    for one, other in zip(pseudo["per_modality"], classic["per_modality"]):
        assert one["se"] == pytest.approx(other["se"], rel=1e-6)
        assert one["df"] == pytest.approx(other["df"], rel=1e-6)


def test_obuchowski_rockette_with_unbiased_covariances_has_the_variance_of_the_u_statistic() -> None:
    table = simulate(positive=20, negative=25, seed=5)
    classic, gallas = reader_study(table, covariance="unbiased"), reader_study(table, method="ustat")
    assert classic["variance_components"]["cov2"] > classic["variance_components"]["cov3"]
    assert classic["se"] == pytest.approx(gallas["se"], rel=1e-9)


# --------------------------------------------------------------------------------------------- U-statistics


def one_shot_by_hand(table: pd.DataFrame, a: str, b: str) -> float:
    """Product of two modality means less the mean product over readings that share no reader and no case."""
    rows = [(m, r, t) for (m, r), t in sessions_of(table).items() if m in (a, b)]
    pairs = {
        (m, r): [
            (p, n, (s > z) + (s == z) / 2)
            for p, s in t[t["truth"] == 1][["case", "score"]].itertuples(index=False)
            for n, z in t[t["truth"] == 0][["case", "score"]].itertuples(index=False)
        ]
        for m, r, t in rows
    }
    first = [(r, *item) for (m, r), items in pairs.items() if m == a for item in items]
    second = [(r, *item) for (m, r), items in pairs.items() if m == b for item in items]
    means = [float(np.mean([item[3] for item in side])) for side in (first, second)]
    free = [x[3] * y[3] for x, y in product(first, second) if x[0] != y[0] and x[1] != y[1] and x[2] != y[2]]
    return means[0] * means[1] - float(np.mean(free))


def test_one_shot_variance_equals_brute_force_with_missing_reads() -> None:
    table = simulate(readers=3, positive=5, negative=6, seed=2).drop(index=[0, 7, 20, 33])
    result = reader_study(table, method="ustat")
    by_hand = {(a, b): one_shot_by_hand(table, a, b) for a, b in (("a", "a"), ("b", "b"), ("a", "b"))}
    for row in result["per_modality"]:
        assert row["variance"] == pytest.approx(by_hand[row["modality"], row["modality"]], rel=1e-9)
    expected = by_hand["a", "a"] + by_hand["b", "b"] - 2 * by_hand["a", "b"]
    assert result["pairwise"][0]["variance"] == pytest.approx(expected, rel=1e-9)
    assert result["readings_missing"] == {"r0": 3, "r1": 1}


def test_one_shot_variance_equals_brute_force_when_each_reader_reads_its_own_cases() -> None:
    table = simulate(readers=3, positive=6, negative=6, seed=4)
    own = table["case"].str[1:].astype(int) % 3 == table["reader"].str[1:].astype(int)
    table = table[own]
    result = reader_study(table, method="ustat")
    assert result["design"] == "cases nested in readers"
    assert result["per_modality"][0]["variance"] == pytest.approx(one_shot_by_hand(table, "a", "a"), rel=1e-9)


def test_sensitivity_by_u_statistics_equals_the_shares_called_and_their_unbiased_variance() -> None:
    table = simulate(readers=3, positive=9, negative=8)
    result = reader_study(table, method="ustat", outcome="sensitivity", threshold=0.5, modalities=["a"])
    diseased = table[(table["truth"] == 1) & (table["modality"] == "a")]
    calls = diseased.assign(call=diseased["score"] >= 0.5).pivot(index="reader", columns="case", values="call")
    hit = calls.to_numpy(float)
    free = [
        hit[r, i] * hit[s, k]
        for r, s in product(range(3), repeat=2)
        for i, k in product(range(9), repeat=2)
        if r != s and i != k
    ]
    assert result["per_modality"][0]["estimate"] == pytest.approx(hit.mean())
    assert result["per_modality"][0]["variance"] == pytest.approx(hit.mean() ** 2 - np.mean(free))


def test_more_than_two_modalities_report_every_pair_and_no_single_difference() -> None:
    for method in ("or", "dbm", "ustat"):
        result = reader_study(simulate(modalities=3), method=method)
        assert [row["comparison"] for row in result["pairwise"]] == ["a - b", "a - c", "b - c"]
        assert math.isnan(result["difference"]) and "pairwise" in result["reasons"]["difference"]
        assert result["df_num"] == 2 and 0 < result["p_value"] < 1


def test_u_statistics_of_a_pair_do_not_depend_on_the_third_modality() -> None:
    table = simulate(modalities=3)
    whole = reader_study(table, method="ustat")["pairwise"][1]
    pair = reader_study(table, method="ustat", modalities=["a", "c"])["pairwise"][0]
    for name in ("estimate", "se", "df", "p_value"):
        assert whole[name] == pytest.approx(pair[name])


# ---------------------------------------------------------------------------------------------------- designs


def nested(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    return table.assign(case=table[[*columns, "case"]].agg(".".join, axis=1))


def test_cases_nested_in_readers_have_no_covariance_between_readers() -> None:
    result = reader_study(nested(simulate(), "reader"))
    assert result["design"] == "cases nested in readers"
    assert result["variance_components"]["cov2"] == result["variance_components"]["cov3"] == 0
    assert result["p_value"] == pytest.approx(reader_study(simulate(), cases="fixed")["p_value"])


def test_cases_nested_in_modalities_have_no_covariance_between_modalities() -> None:
    result = reader_study(nested(simulate(), "modality"), covariance="delong")
    crossed = components(simulate(), covariance="delong")
    parts = result["variance_components"]
    assert result["design"] == "cases nested in modalities"
    assert parts["cov1"] == parts["cov3"] == 0
    assert [parts["error"], parts["cov2"]] == pytest.approx([crossed["error"], crossed["cov2"]])


def test_cases_read_once_only_have_no_covariances_at_all() -> None:
    result = reader_study(nested(simulate(), "reader", "modality"))
    assert result["design"] == "cases nested in readers and modalities"
    assert [result["variance_components"][f"cov{i}"] for i in (1, 2, 3)] == [0, 0, 0]


def test_one_modality_alone_gives_its_row_of_the_full_analysis() -> None:
    table = simulate()
    for method in ("or", "dbm", "ustat"):
        whole = reader_study(table, method=method)["per_modality"][1]
        alone = reader_study(table, method=method, modalities=["b"])
        assert alone["per_modality"][0] == pytest.approx(whole)
        assert math.isnan(alone["p_value"]) and "nothing to compare" in alone["reasons"]["difference"]


def test_specificity_is_the_sensitivity_of_the_other_truth() -> None:
    table = simulate(positive=20, negative=20)
    call = (table["score"] >= 0.6).astype(int)
    mirrored = table.assign(truth=1 - table["truth"], score=1 - call)
    direct = reader_study(table, outcome="specificity", threshold=0.6)
    other = reader_study(mirrored, outcome="sensitivity")
    assert [direct[name] for name in ("difference", "se", "df_den", "p_value")] == pytest.approx(
        [other[name] for name in ("difference", "se", "df_den", "p_value")]
    )
    normal = table[table["truth"] == 0]
    expected = (normal["score"] < 0.6).groupby(normal["modality"]).mean()
    assert [row["estimate"] for row in direct["per_modality"]] == pytest.approx(list(expected))


# ------------------------------------------------------------------------------------------------------- laws


def test_the_order_of_rows_and_rising_transforms_of_scores_change_nothing() -> None:
    table = simulate()
    expected = reader_study(table)
    changed = table.sample(frac=1, random_state=1).assign(score=lambda rows: np.exp(rows["score"]))
    result = reader_study(changed)
    for name in ("difference", "se", "f_statistic", "df_den", "p_value"):
        assert result[name] == pytest.approx(expected[name], rel=1e-9)


def test_swapping_the_modalities_turns_the_sign_only() -> None:
    for method in ("or", "dbm", "ustat"):
        one, other = (reader_study(simulate(), method=method, modalities=order) for order in ("ab", "ba"))
        assert other["difference"] == pytest.approx(-one["difference"])
        assert other["ci_low"] == pytest.approx(-one["ci_high"])
        assert other["p_value"] == pytest.approx(one["p_value"])


def test_a_higher_level_widens_every_interval_and_leaves_the_p_value() -> None:
    narrow, wide = (reader_study(simulate(), level=level) for level in (0.9, 0.99))
    assert wide["ci_low"] < narrow["ci_low"] < narrow["ci_high"] < wide["ci_high"]
    assert wide["p_value"] == narrow["p_value"]
    assert (narrow["p_value"] < 0.1) == (not narrow["ci_low"] <= 0 <= narrow["ci_high"])


def test_negative_cov2_less_cov3_counts_as_zero() -> None:
    tables = (simulate(readers=3, positive=6, negative=6, seed=seed) for seed in range(100))
    table, parts = next(
        (table, parts)
        for table, parts in ((table, components(table)) for table in tables)
        if parts["cov2"] < parts["cov3"]
    )
    random, fixed = reader_study(table), reader_study(table, readers="fixed")
    assert random["mean_squares"]["denominator"] == random["mean_squares"]["TR"]
    assert fixed["mean_squares"]["denominator"] == pytest.approx(parts["error"] - parts["cov1"])


def test_numeric_identifiers_sort_as_numbers() -> None:
    table = simulate(readers=11).assign(reader=lambda rows: rows["reader"].str[1:].astype(int))
    order = [row["reader"] for row in reader_study(table)["per_reader"][:11]]
    assert order == [str(j) for j in range(11)]


def test_perfect_readers_give_nan_with_a_reason_and_intervals_of_some_width() -> None:
    table = simulate().assign(score=lambda rows: rows["truth"].astype(float))
    for method in ("or", "dbm", "ustat"):
        result = reader_study(table, method=method)
        assert math.isnan(result["p_value"]) and "vary" in result["reasons"]["p_value"]
        assert result["difference"] == 0
        assert all(row["ci_low"] < row["ci_high"] == 1 for row in result["per_reader"])


def test_the_result_is_plain_json_with_the_published_fields() -> None:
    for method in ("or", "dbm", "ustat"):
        result = json.loads(json.dumps(reader_study(simulate(), method=method)))
        published = "difference ci_low ci_high f_statistic df_num df_den p_value per_modality per_reader"
        assert set(published.split()) | {"covariance_method", "readers", "cases"} <= set(result)
        assert (result["readers"], result["cases"]) == (4, 27)


def test_roc_points_enclose_the_area_of_each_reader() -> None:
    table = simulate()
    curves = reader_roc_points(table)
    expected = {(row["reader"], row["modality"]): row["estimate"] for row in reader_study(table)["per_reader"]}
    for curve in curves:
        assert area_under(curve["fpr"], curve["tpr"]) == pytest.approx(expected[curve["reader"], curve["modality"]])
        assert (curve["fpr"][0], curve["tpr"][0], curve["fpr"][-1], curve["tpr"][-1]) == (0, 0, 1, 1)
        assert curve["auc"] == pytest.approx(expected[curve["reader"], curve["modality"]])
    assert len(curves) == 8


def test_the_test_keeps_its_level_when_the_modalities_are_alike() -> None:
    p_values = [reader_study(simulate(readers=5, positive=25, negative=25, seed=s))["p_value"] for s in range(150)]
    # 5 % of 150 is 7.5 with a standard deviation of 2.7; the method is known to lean to the safe side.
    assert 1 <= sum(p < 0.05 for p in p_values) <= 16
    assert 0.35 < np.mean(p_values) < 0.65


# ------------------------------------------------------------------------------------------------- bad tables


def edited(change: str) -> pd.DataFrame:
    table = simulate()
    row = table.index[3]
    if change == "no score column":
        return table.drop(columns="score")
    if change == "no rows":
        return table.iloc[:0]
    if change == "nan score":
        return table.assign(score=table["score"].where(table.index != row))
    if change == "text score":
        return table.assign(score=table["score"].astype(str).where(table.index != row, "high"))
    if change == "truth 2":
        return table.assign(truth=table["truth"].where(table["truth"] == 0, 2))
    if change == "torn truth":
        return table.assign(truth=table["truth"].where(table.index != row, 0))
    if change == "repeated":
        return pd.concat([table, table.iloc[[5]]])
    if change == "empty reader":
        return table.assign(reader=table["reader"].where(table.index != row, ""))
    if change == "one reader":
        return table[table["reader"] == "r0"]
    if change == "one modality":
        return table[table["modality"] == "a"]
    if change == "one class":
        return table[(table["reader"] != "r2") | (table["truth"] == 1)]
    if change == "skipped":
        return table.drop(index=[0, 1, 40])
    return table[(table["reader"] != "r2") | (table["modality"] == "a")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no score column", "column score missing; found reader, modality, case, truth"),
        ("no rows", "no readings"),
        ("nan score", "data row 4: score is empty or NaN"),
        ("text score", "data row 4: score is 'high'; scores must be numbers"),
        ("truth 2", "truth is '2'; truth must be 0 .* or 1"),
        ("torn truth", "truth differs between rows of case c3"),
        ("repeated", "data row 217: reader, modality and case repeat"),
        ("empty reader", "data row 4: reader is empty"),
        ("one reader", "only reader 'r0' read modality 'a'; .*--readers fixed"),
        ("one modality", r"only modality 'a' in the table.*--modalities a"),
        ("one class", "reader 'r2' with modality 'a' read 12 positive and 0 negative cases"),
        ("skipped", r"missing for 2 reader\(s\): 'r0' \(2 of 54\), 'r1' \(1 of 54\); .*--method ustat"),
        ("half a reader", "some of the 4 readers used every modality and some did not.*--method ustat"),
    ],
)
def test_a_bad_table_is_refused_in_one_line_that_says_what_to_do(change: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        reader_study(edited(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dbn"}, "method 'dbn' is not one of or, dbm, ustat; did you mean 'dbm'"),
        ({"covariance": "jacknife"}, "did you mean 'jackknife'"),
        ({"readers": "fixed", "cases": "fixed"}, "fixed cases need random readers"),
        ({"level": 95}, "level 95 is not between 0 and 1"),
        ({"outcome": "sensitivity"}, "need a threshold"),
        ({"modalities": ["a", "d"]}, "modality 'd' is not in the table"),
        ({"covariance": "obuchowski"}, "needs a cluster column"),
    ],
)
def test_a_wrong_option_is_a_config_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reader_study(simulate(), **options)


def test_skipped_cases_can_be_analysed_by_what_each_reader_read() -> None:
    complete, holes = simulate(positive=30, negative=30), simulate(positive=30, negative=30).drop(index=[0, 1, 40])
    assert reader_study(complete, missing="available")["p_value"] == reader_study(complete)["p_value"]
    whole = reader_study(complete)
    for options in ({}, {"covariance": "unbiased"}, {"covariance": "bootstrap"}):
        available = reader_study(holes, missing="available", **options)
        assert available["se"] == pytest.approx(whole["se"], rel=0.1)
        assert available["readings_missing"] == {"r0": 3}
    with pytest.raises(DataError, match="ustat"):
        reader_study(holes, missing="available", covariance="delong")


def test_a_csv_file_reads_back_with_identifiers_as_text(tmp_path: Path) -> None:
    table = simulate().assign(case=lambda rows: "00" + rows["case"].str[1:])
    path = tmp_path / "T.csv"
    table.to_csv(path, index=False)
    loaded = load_table(path)
    assert "000" in set(loaded["case"])
    assert reader_study(loaded)["p_value"] == pytest.approx(reader_study(table)["p_value"])


def test_an_unreadable_file_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.csv: no such reader study table"):
        load_table(tmp_path / "nothing.csv")
    (tmp_path / "bad.csv").write_text("reader,modality,case,truth\nr0,a,c0,1\n")
    with pytest.raises(DataError, match=r"bad\.csv: column score missing"):
        load_table(tmp_path / "bad.csv")


def test_infinite_scores_rank_and_tie_like_any_other() -> None:
    table = simulate()
    high = table["score"] >= 1.5
    capped = table.assign(score=table["score"].where(~high, 1e6))
    infinite = table.assign(score=table["score"].where(~high, math.inf))
    for options in ({}, {"covariance": "unbiased"}, {"method": "ustat"}):
        assert reader_study(infinite, **options)["p_value"] == reader_study(capped, **options)["p_value"]


def test_a_reader_who_misses_nothing_gets_wilsons_interval_for_sensitivity() -> None:
    table = simulate()
    faultless = (table["reader"] == "r0") & (table["truth"] == 1)
    table = table.assign(score=table["score"].where(~faultless, 9.0))
    row = reader_study(table, outcome="sensitivity", threshold=0.5)["per_reader"][0]
    assert (row["estimate"], row["ci_high"]) == (1, 1)
    # Wilson's lower limit for n of n is n/(n + z²).
    assert row["ci_low"] == pytest.approx(12 / (12 + stats.norm.ppf(0.975) ** 2))
    assert "Wilson" in row["interval"]


def test_u_statistics_of_fixed_readers_average_the_unbiased_covariances() -> None:
    table = simulate(positive=20, negative=20)
    parts = components(table, covariance="unbiased")
    fixed = reader_study(table, method="ustat", readers="fixed")
    variance = 2 / 4 * (parts["error"] - parts["cov1"] + 3 * (parts["cov2"] - parts["cov3"]))
    assert fixed["se"] == pytest.approx(math.sqrt(variance))
    assert fixed["p_value"] == pytest.approx(2 * stats.norm.sf(abs(fixed["difference"]) / fixed["se"]))


def test_a_large_study_takes_seconds() -> None:
    table = simulate(readers=15, positive=400, negative=600)
    started = time.perf_counter()
    reader_study(table)
    reader_study(table, method="ustat")
    # Half a second each on one core; the bound leaves room for a busy machine.
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("method", ["dbm", "ustat"])
def test_a_covariance_that_the_method_does_not_take_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=f"covariance 'delong' belongs to method or; method {method} has its own"):
        reader_study(pd.DataFrame(), method=method, covariance="delong")
