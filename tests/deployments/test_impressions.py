"""The log of impressions of a replica: sampled by request, bounded, whole files, and never in the way of an answer."""

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import orjson
import pytest

from deployments.fine_rank import FineRank
from deployments.impressions import ImpressionLog, sampled
from deployments.rollout import Rollout, loader
from deployments.service import Service
from recsys.core import Candidates, Used
from recsys.features.store import MemoryStore
from recsys.funnel import STAGES
from recsys.impressions import picked, read
from recsys.serve_config import ImpressionsConfig, ServeConfig
from tests.small import Small


@pytest.fixture(scope="module")
def rollout(small: Small):
    found = Rollout(small.registry, loader(*STAGES), poll_s=3600)
    found.start()
    yield found
    found.stop()


def answers(service: Service, n: int) -> list[dict]:
    async def ask() -> list[dict]:
        bodies = [orjson.dumps({"user_id": f"u{i}", "k": 4, "context": {"device": "web"}, "timeout_ms": 20_000}) for i in range(n)]
        try:
            return [orjson.loads(await service.recommend(body, f"req{i}")) for i, body in enumerate(bodies)]
        finally:
            await service._batcher.drain()
            if service._impressions is not None:
                await service._impressions.stop()

    return asyncio.run(ask())


def service(rollout: Rollout, log: ImpressionLog) -> Service:
    return Service(ServeConfig(), rollout, MemoryStore(), impressions=log)


def test_every_page_is_logged_as_it_was_answered(rollout, tmp_path, small):
    log = ImpressionLog(tmp_path, ImpressionsConfig(sample=1.0))
    told = answers(service(rollout, log), 6)
    found = {r["request_id"]: r for r in read(str(tmp_path)).to_pylist()}
    assert len(found) == 6
    for n, answer in enumerate(told):
        row = found[f"req{n}"]
        assert row["items"] == [i["item_id"] for i in answer["items"]]
        assert row["scores"] == pytest.approx([i["score"] for i in answer["items"]])
        assert row["positions"] == [1, 2, 3, 4]
        assert row["propensities"] == [1.0] * 4
        assert (row["user_id"], row["model_version"]) == (f"u{n}", small.version)
        assert row["context"] == '{"device": "web"}'
    assert log.state() == {"logged": 6, "waiting": 0, "dropped": 0, "failed": 0}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_sample_goes_by_the_request_id():
    ids = [f"request-{n}" for n in range(20_000)]
    share = sum(sampled(i, 0.1) for i in ids) / len(ids)
    assert share == pytest.approx(0.1, abs=0.01)  # 4.7 standard deviations
    assert {i for i in ids if sampled(i, 0.05)} < {i for i in ids if sampled(i, 0.1)}
    assert not any(sampled(i, 0.0) for i in ids)
    assert all(sampled(i, 1.0) for i in ids)


def test_beyond_the_bound_pages_are_dropped_and_counted_and_answers_go_on(rollout, tmp_path):
    log = ImpressionLog(tmp_path, ImpressionsConfig(sample=1.0, most_waiting=2, flush_s=1_000))
    assert len(answers(service(rollout, log), 5)) == 5
    assert log.state() == {"logged": 2, "waiting": 0, "dropped": 3, "failed": 0}


def test_a_service_that_ends_writes_what_waits_and_the_version_tells_what_was_lost(rollout, tmp_path):
    log = ImpressionLog(tmp_path, ImpressionsConfig(sample=1.0, most_waiting=2, flush_s=1_000))

    async def ask() -> dict:
        one = service(rollout, log)
        for n in range(3):
            await one.recommend(orjson.dumps({"user_id": "u1", "timeout_ms": 20_000}), f"req{n}")
        told = (await one.version())["impressions"]
        await one.close()
        return told

    assert asyncio.run(ask()) == {"logged": 0, "waiting": 2, "dropped": 1, "failed": 0}
    assert [r["request_id"] for r in read(str(tmp_path)).to_pylist()] == ["req0", "req1"]


def test_a_workdir_may_be_a_uri(rollout, tmp_path):
    root = f"{tmp_path.as_uri()}/not/made/yet"
    log = ImpressionLog(root, ImpressionsConfig(sample=1.0))
    told = answers(service(rollout, log), 3)
    assert read(root)["items"].to_pylist() == [[item["item_id"] for item in answer["items"]] for answer in told]
    assert read(root).equals(read(str(tmp_path / "not")))


def test_the_end_waits_for_a_write_that_is_under_way(rollout, tmp_path, monkeypatch):
    log, begun, go = ImpressionLog(tmp_path, ImpressionsConfig(sample=1.0, flush_s=0.001)), threading.Event(), threading.Event()
    write = log._write

    def slow(waiting) -> None:
        begun.set()
        assert go.wait(30)
        write(waiting)

    monkeypatch.setattr(log, "_write", slow)

    async def ask() -> None:
        await service(rollout, log).recommend(orjson.dumps({"user_id": "u1", "timeout_ms": 20_000}), "req")
        assert await asyncio.to_thread(begun.wait, 30)
        ending = asyncio.create_task(log.stop())
        await asyncio.sleep(0)
        go.set()
        await ending
        assert log.state() == {"logged": 1, "waiting": 0, "dropped": 0, "failed": 0}

    asyncio.run(ask())
    assert len(read(str(tmp_path))) == 1


def test_a_disk_that_refuses_costs_impressions_not_answers(rollout, tmp_path, caplog):
    (tmp_path / "taken").write_text("a file where the folder should be")
    log = ImpressionLog(tmp_path / "taken", ImpressionsConfig(sample=1.0))
    told = answers(service(rollout, log), 3)
    assert all(len(answer["items"]) == 4 for answer in told)
    assert log.state()["failed"] == 3
    assert "could not be written" in caplog.text


@pytest.mark.parametrize(("logged", "rows"), [([False, True, True], [1, 2]), ([False, False, False], None)])
def test_a_fine_stage_of_its_own_sends_values_of_logged_pages_alone(logged, rows):
    ranked = Candidates.given(np.array([[4, 5], [6, 7], [8, 9]], np.int32), ())
    price = np.arange(6.0).reshape(3, 2, 1)
    ranked.used = Used(np.arange(3), ranked.items, {"age": np.array([[1.0], [2.0], [3.0]])}, {"price": price}, 5.0, (7, 9))
    queries = SimpleNamespace(logged=np.array(logged))
    sent = FineRank.take(SimpleNamespace(fine_rank=lambda *_: ranked), queries, ranked).used
    if rows is None:
        assert sent is None
        return
    assert sent.rows.tolist() == rows
    seen = picked(sent, 2, np.array([9, 8]))
    assert seen.query_fields["age"].tolist() == [3.0]
    assert seen.pair_fields["price"].tolist() == [[5.0], [4.0]]
    assert (seen.snapshot_s, seen.snapshot_counted) == (5.0, (7, 9))
    assert picked(sent, 0, np.array([4])) is None
