"""The section of report.html on shift and abstention, from the content of metrics.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from page import facts, figure, interval, number, p_value, section, stacked, table, text


def section_html(result: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """Scores against validation's, the prevalence they speak of, accuracy against coverage."""
    return section("Shift and abstention", _shift(result["shift"], drawn), _abstention(result["abstention"], drawn))


def _shift(found: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    if "observed" not in found:
        return f"<p class='note'>Scores are not compared with those of validation: {text(found['reason'])}.</p>"
    p = p_value(found["p_value"])
    pairs = [
        ("Distance from validation's scores", f"{number(found['distance'])}, p {text(p)}"),
        ("left at the prevalence estimated", number(found["distance_at_prevalence"])),
        ("Prevalence in validation", number(found["validation_prevalence"])),
        ("Prevalence estimated without labels", stacked(found["prevalence"])),
        ("Prevalence by the labels", number(found["true_prevalence"])),
        ("Threshold", number(found["threshold"])),
        ("Threshold at that prevalence", number(found["threshold_at_prevalence"])),
    ]
    note = (
        "<p class='note'>Kolmogorov-Smirnov distances, films taken as independent. What is left at the prevalence "
        "estimated is not explained by prevalence: a class itself scores otherwise than in validation, and then the "
        "estimate (Saerens 2002) and the threshold moved by it are not to be relied on.</p>"
    )
    rows = [
        [words, *(interval(found[name][rate]) for rate in ("sensitivity", "specificity", "precision", "npv"))]
        for words, name in (
            (f"{found['threshold']:.3f}", "at_threshold"),
            (f"{found['threshold_at_prevalence']:.3f}, moved", "at_threshold_at_prevalence"),
        )
    ]
    head = ["Threshold", "Sensitivity", "Specificity", "PPV", "NPV"]
    drawing = figure(drawn["score_shift"], kind="narrow")
    return drawing + facts(pairs) + note + table(head, rows, numbers=range(1, 5))


def _abstention(found: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    words = (
        f"<p>Films ordered by {text(found['certainty'])}: what accuracy would be if the least sure were left to a "
        f"reader. Mean error over all coverages {number(found['area'], 4)} (Geifman &amp; El-Yaniv 2017).</p>"
    )
    rows = [[f"{100 * row['coverage']:.1f} %", f"{row['n']:,}", interval(row["accuracy"])] for row in found["rows"]]
    head = ["Decided", "Films", "Accuracy of these"]
    return (
        "<h3>Abstention</h3>" + words + figure(drawn["coverage"], kind="narrow") + table(head, rows, numbers=range(3))
    )
