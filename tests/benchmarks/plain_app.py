"""What one would write without Ray: FastAPI and uvicorn round the same funnel and store, a request at a time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from cluster.redis_store import RedisStore
from deployments.stage import pin_threads
from recsys.funnel import Funnel, FunnelRequest

BUNDLE, STORE = "PLAIN_APP_BUNDLE", "PLAIN_APP_STORE"
"""Environment variables with the bundle's folder and the store's URL."""


class Ask(BaseModel):
    """The body of a request."""

    user_id: str
    k: int = 10


def create() -> FastAPI:
    """The application, one per worker process."""
    pin_threads(1)
    funnel, store = Funnel.load(Path(os.environ[BUNDLE])), RedisStore(os.environ[STORE])
    app = FastAPI()

    def page(ask: Ask, events: Any) -> list[dict[str, Any]]:
        queries = funnel.queries([FunnelRequest(ask.user_id, ask.k, time.time(), events=events)])
        [items] = funnel.page(queries, funnel.recommend(queries))
        return [{"item_id": i.item_id, "score": i.score, "sources": i.sources, "title": i.title} for i in items]

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/recommend")
    async def recommend(ask: Ask) -> dict[str, Any]:
        [state] = await store.read([ask.user_id], timeout_s=1.0)
        return {"items": await run_in_threadpool(page, ask, state.events), "model_version": funnel.version}

    return app
