"""The evaluation report as one self-contained HTML page: tables, drawings, and what was done in words. No scripts, no network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from recsys.report_plots import Point, dots, lines, scatter, small_bars, waterfall
from recsys.report_words import METRICS, PROTOCOLS, STYLE

QUALITY = (
    "ndcg",
    "recall",
    "hit",
    "mrr",
    "precision",
    "map",
    "auc",
    "gauc",
    "logloss",
    "calibration",
    "calibration_error",
    "f1",
    "rmse",
    "mae",
)
BEYOND = ("coverage", "novelty", "diversity", "long_tail", "popularity_lift", "gini")
LOWER_IS_BETTER = {"logloss", "calibration_error", "rmse", "mae"}
NAMED = 6
"""Curves that are named."""
Document = Mapping[str, Any]


def page(name: str, report: Document) -> str:
    """The HTML of a document as `Report.as_json` gives it, with `config` where it is known."""
    rows = sorted(report["rows"], key=lambda r: -_value(r, report["lead"]))
    protocol = str(report["protocol"])
    title = f"{escape(name)} · {escape(protocol)}{' (sampled)' if report.get('sampled') else ''}"
    sections = [
        _section("Which row is best", _overview(report, rows)),
        _section("All figures", _table(report, rows)),
        _section("By length of list", _by_k(rows)),
        _section("Accuracy is not all", _tradeoffs(report, rows)),
        _section(
            "What each stage loses", waterfall("Share of what users took next that is still there after each stage", report["stage_recall"])
        ),
        _section(
            "For whom",
            _bins(
                report,
                rows,
                "by_history",
                report["history_bins"],
                "events of history" if protocol != "ctr" else "training rows of the user",
            ),
        ),
        _section("For which items", _bins(report, rows, "by_popularity", report["popularity_bins"], "training events of the item")),
        _section("Is it more than chance", _significance(report, rows)),
        _section("What it took", _cost(rows)),
        _section("How this was measured", _words(report)),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{STYLE}</style>'
        f"<header><h1>{title}</h1><p>{_lead(report, rows)}</p></header><main>{''.join(sections)}</main></html>"
    )


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{body}</section>" if body else ""


def _lead(report: Document, rows: Sequence[Document]) -> str:
    """The report in two sentences."""
    if not rows:
        return "No row took part."
    best = next((r for r in rows if r["model"] == report["best"]), rows[0])
    metric, users = report["lead"], f"{report['users']:,} users"
    low, high = best["interval"].get(metric, [None, None])
    within = f" (95 % interval {low:.4f} to {high:.4f})" if low is not None and high is not None else ""
    found = f"<b>{escape(str(best['model']))}</b> is best with {metric} {_value(best, metric):.4f}{within}, judged on {users}."
    tied = [r["model"] for r in rows if (t := r["against"].get(report["best"], {}).get(metric)) and not t["significant"]]
    if tied:
        found += f" Not told apart from it: {escape(', '.join(tied))}."
    return found


def _value(row: Document, metric: str) -> float:
    value = row["metrics"].get(metric)
    return float("-inf") if value is None else float(value)


def _overview(report: Document, rows: Sequence[Document]) -> str:
    metric = report["lead"]
    points = [Point(r["model"], r["kind"], _value(r, metric), *r["interval"].get(metric, [None, None])[:2]) for r in rows]
    kinds = [k for k in ("stage", "channel", "ranker", "baseline") if any(r["kind"] == k for r in rows)]
    legend = "".join(f'<span><i class="{k}"></i>{k}</span>' for k in kinds)
    return f'<p class="legend">{legend}</p>' + _figure(
        dots(f"{metric} by row, with 95 % intervals", points), f"{metric}; bars are 95 % confidence intervals over users"
    )


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>" if drawing else ""


def _table(report: Document, rows: Sequence[Document]) -> str:
    have = list(dict.fromkeys(n for r in rows for n in r["metrics"]))
    ks = report["ks"]
    shown = [
        n
        for m in (*QUALITY, *BEYOND)
        for n in have
        if n.split("@")[0] == m and ("@p" in n or len(ks) < 2 or n.endswith(f"@{_middle(ks)}") or "@" not in n)
    ]
    best = {n: _best(rows, n) for n in shown if n.split("@")[0] in QUALITY}
    head = "".join(f'<th scope="col">{escape(n.replace("_", " "))}</th>' for n in shown)
    body = "".join(
        f'<tr class="{r["kind"]}"><th scope="row"><i class="{r["kind"]}"></i>{escape(_name(r))}</th>'
        + "".join(f"<td{' class=top' if best.get(n) == r['model'] else ''}>{_cell(r, n, report)}</td>" for n in shown)
        + "</tr>"
        for r in rows
    )
    note = f"<p class=note>Bold: best of the column. ▽ significantly below {escape(str(report['best']))}, △ above (Holm-corrected p &lt; 0.05). ± half the 95 % interval.</p>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="All figures"><table><tr><th scope="col">row</th>{head}</tr>{body}</table></div>{note}'


def _middle(ks: Sequence[int]) -> int:
    return 10 if 10 in ks else ks[0]


def _best(rows: Sequence[Document], metric: str) -> str | None:
    known = [(r["metrics"][metric], r["model"]) for r in rows if r["metrics"].get(metric) is not None]
    if not known:
        return None
    if metric == "calibration":
        return str(min(known, key=lambda v: abs(v[0] - 1))[1])
    choose = min if metric.split("@", maxsplit=1)[0] in LOWER_IS_BETTER else max
    return str(choose(known, key=lambda v: v[0])[1])


def _name(row: Document) -> str:
    return f"{row['model']} (= {row['same_as']})" if row["same_as"] else str(row["model"])


def _cell(row: Document, metric: str, report: Document) -> str:
    value = row["metrics"].get(metric)
    if value is None:
        return "–"
    low, high = row["interval"].get(metric, [None, None])
    half = f"<small>±{(high - low) / 2:.3f}</small>" if low is not None and high is not None else ""
    test = row["against"].get(report["best"], {}).get(metric)
    mark = "" if not test or not test["significant"] else "▽" if test["difference"] < 0 else "△"
    return f"{value:.4f}{mark}{half}"


def _by_k(rows: Sequence[Document]) -> str:
    kinds = {r["model"]: r["kind"] for r in rows}
    bold = list(dict.fromkeys([*(r["model"] for r in rows if r["model"] == "funnel"), *(r["model"] for r in rows)]))[:NAMED]
    drawn = []
    for metric, label in (("ndcg", "NDCG"), ("recall", "Recall")):
        curves = {r["model"]: r["curve"].get(metric) or [] for r in rows if not r["same_as"]}
        drawn.append(
            _figure(
                lines(f"{label} by length of list", curves, kinds, bold=bold, x_label="k"), f"{label}@k; the best {len(bold)} are named"
            )
        )
    return f'<div class="pair">{"".join(drawn)}</div>' if any(drawn) else ""


def _tradeoffs(report: Document, rows: Sequence[Document]) -> str:
    metric, drawn = report["lead"], []
    for other, words in (
        ("coverage@10", "share of the catalogue shown to anybody"),
        ("novelty@10", "novelty: bits of surprise of an item shown"),
    ):
        points = [
            (r["model"], r["kind"], _or_nan(r["metrics"].get(other)), _or_nan(r["metrics"].get(metric))) for r in rows if not r["same_as"]
        ]
        drawn.append(
            _figure(
                scatter(f"{metric} against {other}", points, x_label=words, y_label=metric),
                f"up: more accurate; right: {'more of the catalogue' if other[0] == 'c' else 'less known items'}",
            )
        )
    return f'<div class="pair">{"".join(drawn)}</div>' if any(drawn) else ""


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _bins(report: Document, rows: Sequence[Document], key: str, bins: Sequence[Document], what: str) -> str:
    rows = [r for r in rows if not r["same_as"] and len(r[key]) == len(bins)]
    values = [v for r in rows for v in r[key] if v is not None and math.isfinite(v)]
    if not values or not bins:
        return ""
    labels = [_range(b) for b in bins]
    panels = "".join(small_bars(r["model"], r["kind"], r[key], max(values), [str(b["from"]) for b in bins]) for r in rows)
    counted = next(k for k in bins[0] if k not in ("from", "to"))
    sizes = ", ".join(f"{label}: {b[counted]:,}" for label, b in zip(labels, bins, strict=True))
    measure = report["lead"] if key == "by_history" or report["protocol"] == "ctr" else "share of sought items found in the first 10"
    unit = {"users": "users", "items": "sought items", "rows": "test rows"}[counted]
    return f'<div class="small">{panels}</div><p class="note">{escape(measure)} by {escape(what)}, one scale for all; a bar is named by where its bin begins. {unit.capitalize()} in each: {sizes}.</p>'


def _range(b: Document) -> str:
    low, high = b["from"], b["to"]
    return str(low) if low == high else f"{low}–{high}"


def _significance(report: Document, rows: Sequence[Document]) -> str:
    metric, drawn = report["lead"], []
    for reference in report["compared_with"]:
        points = []
        for r in rows:
            test = r["against"].get(reference, {}).get(metric)
            if test is not None and test["difference"] is not None:
                points.append(
                    Point(
                        r["model"],
                        r["kind"],
                        test["difference"],
                        test["interval"][0],
                        test["interval"][1],
                        "*" if test["significant"] else " ",
                    )
                )
        drawing = dots(f"{metric} less that of {reference}", points, zero=True)
        drawn.append(_figure(drawing, f"{metric} less that of {reference}, user by user; * p < 0.05 after Holm"))
    pair = f'<div class="pair">{"".join(drawn)}</div>' if any(drawn) else ""
    return f'{pair}<p class="note">{escape(report["test"])}.</p>' if pair else ""


def _cost(rows: Sequence[Document]) -> str:
    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    body = "".join(
        f'<tr><th scope="row"><i class="{r["kind"]}"></i>{escape(_name(r))}</th><td>{number(r["seconds"].get("fit"), 2)}</td>'
        f"<td>{number(r['seconds'].get('predict'), 2)}</td><td>{number(r['peak_mib'].get('fit'), 0)}</td><td>{number(r['peak_mib'].get('predict'), 0)}</td></tr>"
        for r in rows
    )
    head = "".join(f'<th scope="col">{h}</th>' for h in ("row", "fit s", "predict s", "fit MiB", "predict MiB"))
    return (
        f'<div class="scroll"><table class="narrow"><tr>{head}</tr>{body}</table></div><p class="note">A stage takes what all up to it take. '
        "MiB: peak above what the process held before; – was not measured (models trained by gradient, in processes of their own).</p>"
    )


def _words(report: Document) -> str:
    protocol = PROTOCOLS[str(report["protocol"])]
    asked = dict.fromkeys(n.split("@")[0] for r in report["rows"] for n in r["metrics"])
    defined = "".join(f"<dt>{escape(n.replace('_', ' '))}</dt><dd>{escape(METRICS[n])}</dd>" for n in asked if n in METRICS)
    account = "".join(f"<tr><th scope=row>{escape(str(n))}</th><td>{v:,}</td></tr>" for n, v in report["account"])
    skipped = "".join(f"<p>No row {escape(n)}: {escape(why)}</p>" for n, why in report["skipped"].items())
    parts = [f"<p>{escape(protocol)}</p>", skipped, f"<h3>The data</h3><table class=narrow>{account}</table>" if account else ""]
    warm = report.get("warm_users")
    if warm is not None and report["protocol"] != "ctr":
        parts.append(f"<p>{report['users']:,} users were judged, {warm:,} of them with a history. {_warm(report)}</p>")
    parts.append(f"<details><summary>What the figures mean</summary><dl>{defined}</dl></details>")
    if report.get("config"):
        parts.append(
            f"<details><summary>Configuration</summary><pre>{escape(json.dumps(report['config'], indent=1, default=str))}</pre></details>"
        )
    return "".join(parts)


def _warm(report: Document) -> str:
    metric = report["lead"]
    rows = [r for r in report["rows"] if r["warm"] and r["cold"]]
    if not rows:
        return ""
    said = [f"{r['model']} {_or_nan(r['warm'].get(metric)):.4f} / {_or_nan(r['cold'].get(metric)):.4f}" for r in rows]
    return escape(f"{metric} of warm / cold users: {', '.join(said)}.")
