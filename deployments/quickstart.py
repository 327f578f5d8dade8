"""The first tour: data, training, a live service, and three pages that show what it does."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import pipeline
from cluster.registry_url import open_registry
from cluster.runtime import serving_environment, start_ray
from cluster.steps import fetch
from deployments.serving import check_port, cpus_for, running, until_interrupted
from recsys.config import Config
from recsys.funnel import Funnel

PATIENCE_S = 30.0
CLICKS = 3


def tour(config: Config, console: Console, *, stay: bool) -> None:
    """Bring the data, train what is stale, serve, print three pages; with `stay`, keep serving until Ctrl-C.

    Raises RayfunnelError with a sentence where a step cannot be done.
    """
    started = time.perf_counter()
    check_port(config.serve)  # before minutes of training, not after
    # Training starts Ray, and serving needs its environment in it from the start.
    start_ray(num_cpus=cpus_for(config), env=serving_environment(config.serve))
    fetch(config, console)
    version = pipeline.train(config, console)
    registry = open_registry(config.place("registry"))
    if registry.aliases().get("production") != version:
        registry.promote(version)  # the tour shows what it has just made
    known = _known_user(Funnel.load(registry.local_copy(version), stages=()))
    with running(config, console.print) as url:
        console.print(f"Serving version [bold]{version}[/] at [bold]{url}[/] after {time.perf_counter() - started:.0f} s")
        first = _show(console, f"A known user, {known}", _post(url, "/v1/recommend", {"user_id": known, "k": 10}))
        _show(console, "A new user", _post(url, "/v1/recommend", {"user_id": "somebody new", "k": 10}))
        clicked = [item["item_id"] for item in first["items"][:CLICKS]]
        told = _post(url, "/v1/events", [{"user_id": known, "item_id": item, "event": "click"} for item in clicked])
        console.print(
            f"Posted {told['accepted']} clicks of user {known}: {', '.join(item.get('title') or item['item_id'] for item in first['items'][:CLICKS])}"
        )
        _show(console, f"User {known} again, after the clicks", _post(url, "/v1/recommend", {"user_id": known, "k": 10}))
        body = json.dumps({"user_id": known, "k": 3})
        console.print(f"Ask it yourself: curl {url}/v1/recommend -d '{body}'", highlight=False, soft_wrap=True)
        if stay:
            console.print(f"Still serving at {url} (documents: {url}/docs). Ctrl-C stops everything.")
            until_interrupted()


def _known_user(funnel: Funnel) -> str:
    """User 196 of MovieLens, as in every example; elsewhere, the user with the most history."""
    if funnel.users.row("196") >= 0:
        return "196"
    lengths = funnel.past.indptr[1:] - funnel.past.indptr[:-1]
    return funnel.users.outside([int(lengths.argmax())])[0]


def _post(url: str, path: str, body: Any) -> dict[str, Any]:
    asked = urllib.request.Request(f"{url}{path}", data=json.dumps(body).encode(), headers={"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:  # noqa: S310  our own http URL
        found: dict[str, Any] = json.load(answer)
    return found


def _show(console: Console, title: str, page: dict[str, Any]) -> dict[str, Any]:
    table = Table("", "item", "title", "score", "recalled by", title=title, title_justify="left", header_style="bold")
    for n, item in enumerate(page["items"], 1):
        table.add_row(str(n), item["item_id"], item.get("title") or "", f"{item['score']:.4f}", ", ".join(item["sources"]))
    console.print(table)
    timings = ", ".join(f"{name} {ms:.1f}" for name, ms in page["timings_ms"].items())
    degraded = ", ".join(f"{d['stage']}: {d['rung']} ({d['reason']})" for d in page["degraded"]) or "nothing"
    console.print(f"  milliseconds: {timings}\n  degraded: {degraded}; version {page['model_version']}\n", highlight=False)
    return page
