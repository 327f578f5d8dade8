"""The evaluation report as one self-contained HTML page: a table, and bars that show it at a glance. No scripts, no network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

SHOWN = ("ndcg@10", "recall@10", "hit@10", "mrr@10", "auc", "gauc", "logloss", "coverage@10", "long_tail@10")

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem;color:#1d2733;background:#fff}
table{border-collapse:collapse;width:100%}td,th{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #dde3ea;white-space:nowrap}
td:first-child,th:first-child{text-align:left}.scroll{overflow-x:auto}.bar{background:#3b7dd8;height:.9rem;border-radius:2px;min-width:1px}
.best td{font-weight:600}.row{display:grid;grid-template-columns:8rem 1fr 4.5rem;gap:.6rem;align-items:center;margin:.15rem 0}
.row span:last-child{text-align:right}
@media(prefers-color-scheme:dark){body{background:#12171d;color:#dfe6ee}td,th{border-color:#2b3440}}
"""


def page(name: str, report: Mapping[str, Any]) -> str:
    """The HTML of a report as `Report.as_json` gives it."""
    rows = report["rows"]
    names = [n for n in SHOWN if any(n in row["metrics"] for row in rows)]
    lead = names[0] if names else ""
    best = max((row["metrics"].get(lead, float("-inf")) for row in rows), default=0)
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    body = "".join(
        f"<tr{' class=best' if row['metrics'].get(lead) == best else ''}><td>{escape(row['model'])}</td>"
        + "".join(f"<td>{row['metrics'].get(n, float('nan')):.4f}</td>" for n in names)
        + "</tr>"
        for row in rows
    )
    parts = [_bars(f"{lead} by row", {row["model"]: row["metrics"].get(lead, 0.0) for row in rows})]
    if report.get("stage_recall"):
        parts.append(_bars("Of what users took next, still there after each stage", report["stage_recall"]))
    title = f"{escape(name)}: {escape(str(report['protocol']))}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><title>{title}</title>"
        f"<style>{_STYLE}</style><h1>{title}</h1><p>{report.get('users', 0):,} users, full catalogue, what was seen filtered out.</p>"
        f"<div class=scroll><table><tr><th>model</th>{head}</tr>{body}</table></div>{''.join(parts)}</html>"
    )


def _bars(title: str, values: Mapping[str, float]) -> str:
    top = max(values.values(), default=0) or 1
    lines = "".join(
        f"<div class=row><span>{escape(k)}</span><div class=bar style='width:{100 * max(v, 0) / top:.1f}%'></div><span>{v:.4f}</span></div>"
        for k, v in values.items()
    )
    return f"<h2>{escape(title)}</h2>{lines}"
