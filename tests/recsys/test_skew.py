"""Skew: values logged through a simulated day are those of the log, and a bug in one road is named by feature."""

import copy
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from recsys.config import Config
from recsys.core import Candidates, Queries, Vocabulary
from recsys.data.interactions import Interactions
from recsys.features.generate import told
from recsys.features.groups import Row
from recsys.features.live_items import ItemChange, MemoryItemLog
from recsys.features.records import COUNTED, counted_field
from recsys.features.states import ItemSnapshot
from recsys.funnel import Funnel, FunnelRequest
from recsys.impressions import impression, picked, table_of
from recsys.skew import Came, compared
from tests.recsys.test_features_live import AGGREGATES
from tests.small import bundled


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    steps, _, bundle = bundled(tmp_path_factory.mktemp("skew"), f"features.aggregates={json.dumps(AGGREGATES)}")
    return steps.config, steps.prepared.log, bundle


def day(config: Config, log: Interactions, funnel: Funnel) -> tuple[list, Interactions]:
    """A day in service: events of known and new users are counted as they come, the item snapshot is replaced now and then, and
    pages are logged in between. Gives the pages and the log with the day's events behind it."""
    source, stream = funnel.live.source, funnel.live.source.stream
    for user in funnel.users.ids.to_pylist():
        stream.of_user[user] = source.read_user(user)
    rng = np.random.default_rng(5)
    start, pages, events = float(log.time.max()) + 100, [], []
    for n in range(400):
        at = start + 200.0 * n + float(rng.random())
        user, item = f"u{rng.integers(60)}", f"i{rng.integers(40)}"
        context = {"device": ("phone", "web")[n % 2]}
        events.append((user, item, at, context["device"]))
        labels = {"positive": 1.0}
        stream.apply(Row(at, len(log) + n, user, item, "click", float("nan"), labels, context, told=True))
        if n % 17 == 0:
            fresh = ItemSnapshot.of(funnel.live.inputs, source.coder, stream.of_items, at)
            source.snapshot = dataclasses.replace(fresh, counted=(n + 1,))
        if n % 5 == 0:
            asker = f"u{rng.integers(60)}"
            counters = stream.pack(stream.of_user.get(asker, {})) + counted_field(n + 1)[COUNTED]
            request = FunnelRequest(asker, 5, at + 30.0 + float(rng.random()), context=context, counters=counters)
            queries = funnel.queries([request])
            candidates = funnel.recommend(queries)
            page = funnel.page(queries, candidates)[0]
            seen = picked(candidates.used, 0, funnel.items.rows([i.item_id for i in page]))
            pages.append(impression(request, f"r{n}", page, seen, version=funnel.version))
    users, items, times, devices = zip(*events, strict=True)
    whole = dataclasses.replace(
        log,
        user=np.concatenate([log.user, log.users.rows(list(users))]),
        item=np.concatenate([log.item, log.items.rows(list(items))]),
        time=np.concatenate([log.time, np.array(times)]),
        event=np.concatenate([log.event, np.zeros(len(events), np.int8)]),
        value=np.concatenate([log.value, np.full(len(events), np.nan, np.float32)]),
        labels={n: np.concatenate([x, np.ones(len(events), np.float32)]) for n, x in log.labels.items()},
        context={"device": np.concatenate([log.context["device"], np.array(devices, object)])},
        session=None,
    )
    return pages, whole


def came(log: Interactions, whole: Interactions, config: Config) -> Came:
    """The day's events came in behind the log, one after another."""
    live = np.arange(len(whole)) - len(log)
    return Came(whole, told(whole, config.history), np.where(live < 0, -1, 0), live)


def test_a_simulated_day_has_no_mismatch(served):
    config, log, bundle = served
    funnel = Funnel.load(bundle)
    pages, whole = day(config, log, funnel)
    assert len({p.snapshot_s for p in pages}) > 10  # the snapshot moved on
    assert len({p.user_counted for p in pages}) == 80
    report = compared(table_of(pages), Funnel.load(bundle, stages=("fine_rank",)), came(log, whole, config))
    assert report.pages == 80
    assert report.without == 0
    assert report.mismatches == 0, report
    live = set(AGGREGATES)
    assert set(report.features) == live
    assert report.features["item_n"].compared == 80 * 5
    assert min(s.compared for s in report.features.values()) >= 80


def test_a_live_item_has_its_own_counters_on_a_page_and_the_log_gives_the_same(served):
    """`new` came after the training: five clicks, of which each page knows those that its snapshot counts. `ghost` was clicked and
    never told of; `quiet` told of and never clicked."""
    config, log, bundle = served
    funnel = Funnel.load(bundle)
    items = MemoryItemLog()
    items.change([ItemChange("quiet", {"colour": "red", "price": 5}), ItemChange("new", {"colour": "red", "price": 5})])
    funnel.follow(items.since(0).records)
    source, stream = funnel.live.source, funnel.live.source.stream
    start, pages, counts = float(log.time.max()) + 100, [], []
    for n in range(6):
        at = start + 60.0 * n
        fresh = ItemSnapshot.of(funnel.live.inputs, source.coder, stream.of_items, at)
        source.snapshot = dataclasses.replace(fresh, counted=(2 * n,))
        counters = stream.pack(source.read_user("u3")) + counted_field(0)[COUNTED]
        request = FunnelRequest("u3", 4, at + 10, context={"device": "web"}, counters=counters)
        queries = funnel.queries([request])
        ranked = funnel.rank(queries, [["new", "quiet", "cold", "i1"]])
        page = funnel.page(queries, ranked)[0]
        seen = picked(ranked.used, 0, funnel.items.rows([i.item_id for i in page]))
        pages.append(impression(request, f"r{n}", page, seen, version=funnel.version))
        place = {i.item_id: slot for slot, i in enumerate(page)}
        of = {name: {i: x[slot].tolist() for i, slot in place.items()} for name, x in seen_fields(seen, 4).items()}
        counts.append(of["item_n"]["new"][0])
        assert of["item_n"]["quiet"] == of["item_n"]["cold"], "nobody clicked either"
        assert of["item_device_n"]["quiet"] == of["item_device_n"]["cold"]
        assert (of["item_n"]["new"] == of["item_n"]["cold"]) == (n == 0)
        assert of["reach"]["new"] == of["reach"]["quiet"] != of["reach"]["cold"], "keys of its columns wait for a version that has it"
        for m, item in enumerate(("new", "ghost")):
            stream.apply(
                Row(
                    at + 20 + m, len(log) + 2 * n + m, f"u{n}", item, "click", float("nan"), {"positive": 1.0}, {"device": "web"}, told=True
                )
            )
    assert all(a < b for a, b in itertools.pairwise(counts))
    events = [(f"u{n}", item, start + 60.0 * n + 20 + m) for n in range(6) for m, item in enumerate(("new", "ghost"))]
    whole = dataclasses.replace(
        log,
        items=(known := Vocabulary([*log.items.ids.to_pylist(), "ghost", "new"])),
        user=np.concatenate([log.user, log.users.rows([u for u, _, _ in events])]),
        item=np.concatenate([log.item, known.rows([i for _, i, _ in events])]),
        time=np.concatenate([log.time, [t for _, _, t in events]]),
        event=np.concatenate([log.event, np.zeros(12, np.int8)]),
        value=np.concatenate([log.value, np.full(12, np.nan, np.float32)]),
        labels={n: np.concatenate([x, np.ones(12, np.float32)]) for n, x in log.labels.items()},
        context={"device": np.concatenate([log.context["device"], np.array(["web"] * 12, object)])},
        session=None,
    )
    report = compared(table_of(pages), Funnel.load(bundle, stages=("fine_rank",)), came(log, whole, config))
    assert (report.pages, report.without, report.mixed) == (6, 0, 0)
    assert report.mismatches == 0, report
    assert report.features["item_n"].compared == 6 * 4


def seen_fields(seen, k: int) -> dict[str, np.ndarray]:
    """Field -> (k, W) values of a page's items."""
    return {name: np.asarray(x).reshape(k, -1) for name, x in seen.pair_fields.items()}


def test_an_injected_bug_in_one_road_is_named(served, monkeypatch):
    config, log, bundle = served
    funnel = Funnel.load(bundle)
    honest = ItemSnapshot.of.__func__

    def forgets_the_newest(cls, inputs, coder, states, at):
        """Counts as of an hour before what it says."""
        return dataclasses.replace(honest(cls, inputs, coder, states, at - 5 * 3_600), at=at)

    monkeypatch.setattr(ItemSnapshot, "of", classmethod(forgets_the_newest))
    pages, whole = day(config, log, funnel)
    monkeypatch.undo()
    report = compared(table_of(pages), Funnel.load(bundle, stages=("fine_rank",)), came(log, whole, config))
    wrong = {name for name, s in report.features.items() if s.mismatches}
    assert "item_device_n" in wrong
    assert wrong <= {"item_n", "item_device_n", "reach"}
    assert re.match(r"r\d+ \(\S+ of item \w+, now \S+; counters of [\d.]+\)$", report.features["item_device_n"].example)


def test_a_feature_scaled_otherwise_is_named_and_no_other(served, monkeypatch):
    config, log, bundle = served
    funnel = Funnel.load(bundle)
    funnel.live.inputs.scales["user_n"] = (0.0, 1.0)
    pages, whole = day(config, log, funnel)
    report = compared(table_of(pages), Funnel.load(bundle, stages=("fine_rank",)), came(log, whole, config))
    assert {name for name, s in report.features.items() if s.mismatches} == {"user_n"}


def test_pages_of_other_versions_and_without_values_are_counted_not_compared(served):
    config, log, bundle = served
    funnel = Funnel.load(bundle)
    request = FunnelRequest("u1", 3, float(log.time.max()) + 1)
    queries = funnel.queries([request])
    page = funnel.page(queries, funnel.recommend(queries))[0]
    bare = impression(request, "r1", page, None, version=funnel.version)
    other = bare._replace(request_id="r2", model_version="v9")
    report = compared(table_of([bare, other]), funnel, Came.of_files(log, told(log, config.history)))
    assert (report.pages, report.without, report.mismatches) == (0, 1, 0)


def test_a_fine_stage_of_its_own_sends_back_what_it_saw_of_logged_pages_alone(served):
    funnel = Funnel.load(served[2])
    at = float(served[1].time.max()) + 60
    requests = [FunnelRequest(f"u{n}", 5, at, context={"device": "web"}) for n in range(3)]

    def recalled() -> tuple[Queries, Candidates]:
        queries = funnel.queries(requests)
        queries.logged = np.array([False, True, True])
        return queries, funnel.coarse_rank(queries, funnel.recall(queries))

    here = funnel.fine_rank(*recalled()).used
    queries, candidates = copy.deepcopy(recalled())  # what crosses to another process, and what does not
    assert queries.memo == {}
    ranked = funnel.fine_rank(queries, candidates)
    ranked.used = ranked.used.where(queries.logged)
    assert ranked.used.rows.tolist() == [1, 2]
    later = ranked.take([2, 0])  # row 1 was answered meanwhile; row 2 is the first now
    assert later.used.rows.tolist() == [0]
    wanted = ranked.items[2, :4]
    there, same = picked(later.used, 0, wanted), picked(here, 2, wanted)
    assert there.query_fields.keys() == same.query_fields.keys() != set()
    assert there.pair_fields.keys() == same.pair_fields.keys() != set()
    for name, values in {**same.query_fields, **same.pair_fields}.items():
        np.testing.assert_array_equal({**there.query_fields, **there.pair_fields}[name], values)
    assert (there.snapshot_s, there.snapshot_counted) == (same.snapshot_s, same.snapshot_counted)
    assert picked(later.used, 1, wanted) is None  # nobody asked for its values
    assert here.where(np.zeros(3, bool)) is None
    assert here.where(None) is None
