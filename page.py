"""One self-contained HTML page that prints well on A4: its style, tables, figures and numbers.

    html = page("Evaluation", section("Films", table(["Split", "Films"], [["test", "624"]])))

Everything that comes from data goes through `text`; nothing is fetched from a network. Knows nothing of metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

DASH = "–"
MAX_KEPT_ROWS = 16
"""Tables of up to this many rows stay on one page."""

STYLE = """
@page { size: A4; margin: 16mm 15mm 18mm 15mm; }
:root { --ink: #1a1a1a; --soft: #555; --line: #c9c9c9; --tint: #f3f5f7; --accent: #08519c; }
* { box-sizing: border-box; }
html { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
body { margin: 0 auto; max-width: 180mm; padding: 8mm 4mm; color: var(--ink); background: white;
  font: 10pt/1.42 "Helvetica Neue", Helvetica, Arial, "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 19pt; line-height: 1.15; margin: 0 0 1mm; letter-spacing: -0.01em; }
h2 { font-size: 13pt; margin: 9mm 0 2mm; padding-bottom: 1mm; border-bottom: 0.4mm solid var(--ink);
  break-after: avoid; }
h3 { font-size: 10.5pt; margin: 5mm 0 1.5mm; break-after: avoid; }
p { margin: 0 0 2.2mm; orphans: 3; widows: 3; }
.subtitle { color: var(--soft); margin: 0 0 5mm; }
.note, caption, figcaption { color: var(--soft); font-size: 8.5pt; line-height: 1.35; }
.wide { overflow-x: auto; }
.keep { break-inside: avoid; }
table { border-collapse: collapse; width: 100%; margin: 1.5mm 0 3mm; font-size: 8.8pt; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
thead { display: table-header-group; }
tr { break-inside: avoid; }
tr.group { break-after: avoid; }
th { text-align: left; font-weight: 600; border-bottom: 0.3mm solid var(--ink); padding: 0.8mm 2mm 0.8mm 0;
  vertical-align: bottom; }
td { border-bottom: 0.15mm solid var(--line); padding: 0.8mm 2mm 0.8mm 0; vertical-align: top;
  overflow-wrap: break-word; max-width: 95mm; }
.ci { color: var(--soft); font-size: 7.8pt; white-space: nowrap; }
th.n, td.n { text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
tr.strong td { font-weight: 600; background: var(--tint); }
tr.group td { font-weight: 600; border-bottom-color: var(--ink); padding-top: 2mm; }
i.blank { color: #8a4b00; margin-left: 1mm; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.6mm 5mm; margin: 0 0 3mm; font-size: 9pt; }
dl.facts dt { color: var(--soft); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.side dl.facts { font-size: 8.8pt; column-gap: 4mm; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 3mm; margin: 3mm 0 4mm; }
.card { border: 0.25mm solid var(--line); border-top: 0.8mm solid var(--accent); padding: 2mm 2.5mm; }
.card b { display: block; font-size: 17pt; line-height: 1.15; font-variant-numeric: tabular-nums; }
.card span { display: block; font-size: 8.3pt; color: var(--soft); }
.card .name { color: var(--ink); font-weight: 600; font-size: 8.8pt; }
figure { margin: 2mm 0 4mm; break-inside: avoid; }
figure svg, figure img { display: block; width: 100%; height: auto; }
.side { display: grid; grid-template-columns: 100mm 1fr; gap: 6mm; align-items: start; break-inside: avoid; }
.side > :last-child { padding-top: 3mm; }
.lead { break-after: avoid; }
.narrow { max-width: 140mm; }
.films { display: grid; grid-template-columns: repeat(4, 1fr); gap: 3mm; }
.films figure { margin: 0; }
.films img { background: black; aspect-ratio: 1; object-fit: contain; }
.films figcaption { padding-top: 0.8mm; overflow-wrap: anywhere; font-size: 7.8pt; }
.warn { border-left: 1mm solid #b35900; background: #fdf5ec; padding: 1.5mm 3mm; margin: 2mm 0 3mm; font-size: 9pt; }
.sign { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 8mm; margin-top: 12mm; break-inside: avoid; }
.sign div { border-top: 0.25mm solid var(--ink); padding-top: 1mm; font-size: 8.5pt; color: var(--soft); }
@media screen and (max-width: 640px) { .cards, .films, .sign { grid-template-columns: 1fr 1fr; }
  .side { grid-template-columns: 1fr; } }
@media print { body { max-width: none; padding: 0; }
  .newpage { break-before: page; } .wide { overflow: visible; font-size: 80%; }
  .wide td, .wide th { padding: 0.5mm 0.8mm; } }
""".strip()


def text(value: Any) -> str:
    """`value` safe to stand in HTML."""
    return escape(str(value), quote=True)


def number(value: Any, digits: int = 3) -> str:
    """A number with fixed digits; a dash where undefined."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}".replace("-", "−")


def interval(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """'0.912 (0.890–0.931)'; a dash where undefined."""
    value, limits = number(estimate.get("value"), digits), span(estimate, digits)
    return value if DASH in (value, limits) else f"{value} ({limits})"


def span(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """'0.890–0.931', or '−2.4 to −1.3' where a minus would be read as part of the dash; a dash where undefined."""
    low, high = (number(estimate.get(end), digits) for end in ("ci_low", "ci_high"))
    if low == DASH:
        return DASH
    return f"{low} to {high}" if "−" in low + high else f"{low}{DASH}{high}"


def stacked(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """The value with its limits on a second, smaller line, for narrow columns."""
    value, limits = number(estimate.get("value"), digits), span(estimate, digits)
    return value if DASH in (value, limits) else f"{value}<br><span class='ci'>{limits}</span>"


def p_value(value: Any) -> str:
    """'<0.001' or three decimals."""
    shown = number(value)
    return "<0.001" if shown != DASH and value < 0.001 else shown


def percent(part: float, whole: float) -> str:
    """'12 (3.4 %)'."""
    return f"{part:,} ({100 * part / whole:.1f} %)" if whole else f"{part:,}"


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Iterable[int] = (),
    marks: Mapping[int, str] | None = None,
    caption: str = "",
) -> str:
    """A table of ready HTML cells; `numbers` are the columns set right, `marks` row number → class of the row."""
    right = set(numbers)
    marks = marks or {}
    above = "".join(f"<th{_right(k, right)}>{cell}</th>" for k, cell in enumerate(head))
    below = "".join(_row(cells, right, marks.get(index, "")) for index, cells in enumerate(rows))
    said = f"<p class='note'>{caption}</p>" if caption else ""
    # What fits on a page is not torn over two.
    kind = "wide keep" if len(marks) + below.count("<tr") <= MAX_KEPT_ROWS else "wide"
    return f"<div class='{kind}'><table><thead><tr>{above}</tr></thead><tbody>{below}</tbody></table></div>{said}\n"


def _right(column: int, right: set[int]) -> str:
    return " class='n'" if column in right else ""


def _row(cells: Sequence[str], right: set[int], mark: str) -> str:
    if mark == "group":
        return f"<tr class='group'><td colspan='99'>{cells[0]}</td></tr>"
    inside = "".join(f"<td{_right(k, right)}>{cell}</td>" for k, cell in enumerate(cells))
    return f"<tr class='{mark}'>{inside}</tr>" if mark else f"<tr>{inside}</tr>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Name and value, line by line; values are ready HTML."""
    return "<dl class='facts'>" + "".join(f"<dt>{text(n)}</dt><dd>{v}</dd>" for n, v in pairs) + "</dl>\n"


def figure(graphic: str, caption: str = "", *, kind: str = "") -> str:
    """A drawing (ready <svg> or <img>) with its caption."""
    said = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure{f' class={kind!r}' if kind else ''}>{graphic}{said}</figure>\n"


def side(graphic: str, *parts: str) -> str:
    """A drawing at the width it was made for, and what is to be said of it beside it."""
    return f"<div class='side'><figure>{graphic}</figure><div>{''.join(parts)}</div></div>\n"


def card(name: str, value: str, below: str) -> str:
    """One headline number."""
    return f"<div class='card'><span class='name'>{text(name)}</span><b>{value}</b><span>{below}</span></div>"


def warning(html: str) -> str:
    """A remark the reader must not miss."""
    return f"<p class='warn'>{html}</p>\n"


def section(title: str, *parts: str, new_page: bool = False) -> str:
    """A heading and what stands under it."""
    return f"<section{' class=newpage' if new_page else ''}><h2>{text(title)}</h2>\n{''.join(parts)}</section>\n"


def page(title: str, *parts: str) -> str:
    """The whole document."""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{text(title)}</title>\n<style>\n{STYLE}\n</style></head>\n<body>\n{''.join(parts)}</body></html>\n"
    )
