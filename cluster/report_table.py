"""The tables of a report in the terminal: quality with intervals and significance, what lies beyond accuracy, cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

QUALITY = ("ndcg@10", "recall@10", "hit@10", "mrr@10", "auc", "gauc", "logloss", "calibration", "rmse")
BEYOND = ("coverage@10", "novelty@10", "diversity@10", "long_tail@10", "popularity_lift@10")


def tables(document: Mapping[str, Any]) -> list[Table]:
    """The tables of a document that `Report.as_json` gave."""
    beyond = _shown(document, BEYOND)
    return [_quality(document), *([_beyond(document, beyond)] if beyond else []), _cost(document)]


def _quality(document: Mapping[str, Any]) -> Table:
    rows, lead = document["rows"], document["lead"]
    names = _shown(document, QUALITY) or [lead]
    table = Table(header_style="bold", title=_title(document), title_justify="left", caption_justify="left")
    reference = document["best"]
    for name in ("row", names[0], "± 95 %", f"against {reference}", *names[1:]):
        table.add_column(name, justify="left" if name == "row" else "right", no_wrap=True)
    for row in sorted(rows, key=lambda r: _number(r["metrics"].get(lead)), reverse=True):
        low, high = row["interval"].get(names[0], [None, None])
        half = f"{(high - low) / 2:.4f}" if low is not None and high is not None else ""
        metrics = [_four(row["metrics"].get(name)) for name in names]
        style = "bold" if row["model"] == reference else "dim" if row["kind"] == "baseline" else None
        table.add_row(_name(row), metrics[0], half, _against(row, reference, names[0]), *metrics[1:], style=style)
    table.caption = _caption(document)
    return table


def _beyond(document: Mapping[str, Any], names: list[str]) -> Table:
    table = _table("beyond accuracy", [name.replace("_", " ").replace("@10", "") for name in names])
    table.caption = (
        "of the first ten: share of the catalogue shown, bits of surprise, 1 - likeness by users in common, share outside the\nmost popular fifth, how much more popular than the user's own history"
        if "novelty@10" in names
        else None
    )
    for row in document["rows"]:
        table.add_row(_name(row), *(_three(row["metrics"].get(n)) for n in names))
    return table


def _cost(document: Mapping[str, Any]) -> Table:
    some_cold, lead = any(row["cold"] for row in document["rows"]), document["lead"]
    table = _table(
        "cost" if not some_cold else "warm and cold users, and cost",
        [*([f"{lead} warm", "cold"] if some_cold else []), "fit s", "predict s", "peak MiB"],
    )
    for row in document["rows"]:
        parts = [_four((row[part] or {}).get(lead)) for part in ("warm", "cold")] if some_cold else []
        peak = max((v for v in row["peak_mib"].values() if v is not None), default=None)
        seconds = [_short(row["seconds"].get(part)) for part in ("fit", "predict")]
        table.add_row(_name(row), *parts, *seconds, "" if peak is None else f"{peak:,.0f}")
    return table


def _table(title: str, names: list[str]) -> Table:
    table = Table(header_style="bold", title=title, title_justify="left", caption_justify="left")
    for name in ("row", *names):
        table.add_column(name, justify="left" if name == "row" else "right", no_wrap=name == "row")
    return table


def _title(document: Mapping[str, Any]) -> str:
    label = f"{document['protocol']}{' (sampled)' if document['sampled'] else ''}"
    if document["protocol"] == "ctr":
        return f"{label}: {document['test_rows']:,} test rows of {document['users']:,} users"
    ranked = "given items only: not comparable with full-catalogue figures" if document["sampled"] else f"all {document['items']:,} items"
    seeds = f", mean of {document['seeds']} splits" if document["seeds"] > 1 else ""
    return f"{label}: {document['users']:,} users, {document['warm_users']:,} with a history; {ranked}, seen filtered{seeds}"


def _caption(document: Mapping[str, Any]) -> str:
    lines = [f"* {document['test']}"] if len(document["rows"]) > 1 else []
    if document["stage_recall"]:
        losses = ", ".join(f"{name} {_three(share)}" for name, share in document["stage_recall"].items())
        spearman = document["coarse_fine_spearman"]
        lines.append(
            f"of what users took next, still there after: {losses}"
            + (f"; coarse-fine Spearman {spearman:.3f}" if spearman is not None else "")
        )
    lines += [f"no row {name}: {why}" for name, why in document["skipped"].items()]
    return escape("\n".join(lines))


def _against(row: Mapping[str, Any], reference: str, metric: str) -> str:
    found = row["against"].get(reference, {}).get(metric)
    if found is None or found["difference"] is None:
        return "best" if row["model"] == reference else ""
    return f"{found['difference']:+.4f}{'*' if found['significant'] else ' '}"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['model']} (= {row['same_as']})" if row["same_as"] else str(row["model"])


def _shown(document: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Those of the names that a row has; with other lengths of list than ten, the first of these."""
    have = {n for row in document["rows"] for n in row["metrics"]}
    ks = document["ks"]
    first = [n if n in have or not ks else f"{n.split('@')[0]}@{ks[0]}" for n in names]
    return [n for n in dict.fromkeys(first) if n in have]


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"
