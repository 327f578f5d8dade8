"""From a prepared log to a funnel: which rows each part may learn from, and what the ranker's examples hold."""

from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys import examples
from recsys.core import UNKNOWN
from recsys.data import live_log
from recsys.errors import RayfunnelError
from recsys.evaluate import evaluate_funnel
from recsys.evidence import EVIDENCE, evidence
from recsys.prepared import Prepared, prepare
from recsys.recipe import Recipe, cut
from tests.live_events import Told, archive
from tests.small import Small, config_of, recipe_of, write_data


@pytest.fixture(scope="module")
def steps(small: Small) -> Recipe:
    return recipe_of(small.config)


def test_the_window_is_each_users_newest_training_events(steps):
    found, log = cut(steps.prepared, steps.config), steps.prepared.log
    # 10 events a user: 8 train, 1 valid, 1 test; the window takes the last 2 of the 8.
    assert np.bincount(log.user[found.base]).tolist() == [6] * 60
    assert np.bincount(log.user[found.window]).tolist() == [2] * 60
    assert np.bincount(log.user[found.valid]).tolist() == [1] * 60
    for user in range(60):
        of = [rows[log.user[rows] == user] for rows in (found.base, found.window, found.valid)]
        assert of[0].max() < of[1].min() <= of[1].max() < of[2].min()


def test_the_base_channels_know_nothing_of_the_window(steps):
    found, log = cut(steps.prepared, steps.config), steps.prepared.log
    funnel = steps.funnel(found.base_mask, steps.base_tower, None)
    counts = funnel.channels["popular"].counts
    assert (counts > 0).sum() == len(np.unique(log.item[found.base]))
    assert len(funnel.past.items) == len(found.base)


def test_a_split_by_time_takes_the_newest_share_of_train_as_the_window(tmp_path):
    write_data(tmp_path)
    config = config_of(tmp_path, "split.by=time", "examples.window_share=0.25")
    prepared = prepare(config)
    found = cut(prepared, config)
    assert prepared.log.time[found.base].max() < prepared.log.time[found.window].min()
    assert prepared.log.time[found.window].max() < prepared.log.time[found.valid].min()
    assert len(found.window) == pytest.approx(0.25 * prepared.split.train.sum(), abs=1)


def test_the_rankers_examples_are_found_positives_and_their_fellow_candidates(steps):
    funnel = steps.funnel(steps.cut.base_mask, steps.base_tower, None)
    at = steps.cut.window[:40]
    columns = examples.ranker_examples(funnel, steps.moments, at, steps.config.examples, seed=1)
    positives = columns["label"] == 1
    log = steps.prepared.log
    for moment in np.unique(columns["moment"]):
        rows = columns["moment"] == moment
        assert positives[rows].sum() == 1
        assert columns["item"][rows & positives][0] == log.item[at[moment]]
        assert len(np.unique(columns["item"][rows])) == rows.sum() <= 6  # the positive and 5 others
    # evidence of a row is what the funnel says of that item at that moment
    queries = steps.moments.queries(at[:1])
    candidates = funnel.coarse_rank(queries, funnel.recall(queries))
    for item, says in zip(columns["item"][columns["moment"] == 0], columns[EVIDENCE][columns["moment"] == 0], strict=True):
        slot = np.flatnonzero(candidates.items[0] == item)[0]
        np.testing.assert_allclose(says, evidence(candidates)[0, slot], atol=1e-5)  # one query in a batch of 40 and alone


def test_an_exposure_that_was_clicked_later_is_a_positive_at_its_own_instant_and_the_click_no_moment(tmp_path):
    write_data(tmp_path)
    events = []
    for n in range(300):
        user, item, at = n % 60, 2 * (n * 7 % 20) + n % 2, 1_700_100_000 + 60 * n
        events.append(Told(f"u{user}", f"i{item}", at, "impression", context={"device": "web"}))
        if n % 3 == 0:
            events.append(Told(f"u{user}", f"i{item}", at + 5, "click", context={"device": "web"}))
    archive(tmp_path / "events", events)
    pq.write_table(live_log.read(str(tmp_path / "events")), tmp_path / "live.parquet")
    settings = (
        "data.impressions=true",
        f"data.interactions.live={tmp_path / 'live.parquet'}",
        "split.by=time",
        "recall.exclude_seen=false",
    )
    steps = recipe_of(config_of(tmp_path, *settings, "examples.window_share=0.3"))
    log, found = steps.prepared.log, steps.cut
    window = found.window[found.lessons.rows[found.window]]
    live = window[log.time[window] >= 1_700_100_000]
    assert len(live) > 100
    assert {log.event_names[e] for e in log.event[live]} == {"impression"}, "every click answers one of the exposures"
    clicked = live[found.lessons.taken[live]]
    assert 0.3 < len(clicked) / len(live) < 0.37, "every third"
    assert not log.positive[clicked].any()
    assert log.positive[found.window].sum() > len(clicked), "the tower and the merge learn from the clicks themselves"
    assert log.positive[found.valid].sum() > 10
    funnel = steps.funnel(found.base_mask, steps.base_tower, None)
    columns = examples.ranker_examples(funnel, steps.moments, live, steps.config.examples, taken=found.lessons.taken, seed=1)
    positives = columns["label"] == 1
    assert positives.sum() > len(clicked) / 2, "those that recall finds"
    assert np.isin(live[columns["moment"][positives]], clicked).all()
    np.testing.assert_array_equal(columns["item"][positives], log.item[live[columns["moment"][positives]]])


def test_two_tower_examples_carry_the_log_probability_of_their_item(steps):
    at = steps.cut.base[:100]
    popularity = np.bincount(steps.prepared.log.item[steps.cut.base], minlength=steps.prepared.log.n_items).astype(float)
    columns = examples.two_tower_examples(steps.prepared, steps.moments, at, popularity)
    item = columns["item"][7]
    assert columns["log_q"][7] == pytest.approx(np.log(popularity[item] / popularity.sum()), abs=1e-5)
    assert columns["history"].shape == (100, 10)
    assert columns["recent"].shape == (100, 3)
    np.testing.assert_array_equal(columns["history"][:, -3:], columns["recent"])


def test_a_stranger_has_an_unseen_id_three_events_at_most_and_the_user_table(steps):
    at, popularity = steps.cut.base[-100:], np.ones(steps.prepared.log.n_items)
    whole = examples.two_tower_examples(steps.prepared, steps.moments, at, popularity)
    dice = examples.Dice(0.5, np.random.default_rng(3))
    columns = examples.two_tower_examples(steps.prepared, steps.moments, at, popularity, dice=dice)
    known = np.unique(steps.prepared.user_columns["user_id"])
    new = ~np.isin(columns["user_id"], known)
    assert 30 < new.sum() < 70
    np.testing.assert_array_equal(columns["history"][~new], whole["history"][~new])
    padding = whole["history"].min()
    kept = (columns["history"][new] != padding).sum(1)
    assert set(kept.tolist()) == {0, 1, 2, 3}
    for was, now, n in zip(whole["history"][new], columns["history"][new], kept, strict=True):
        assert now[len(now) - n :].tolist() == was[len(was) - n :].tolist()  # the newest
    for name in set(whole) - {"user_id", "history", "recent"}:
        np.testing.assert_array_equal(columns[name], whole[name])


def test_a_ranker_meets_strangers_as_every_stage_before_it_does(steps):
    funnel = steps.funnel(steps.cut.base_mask, steps.base_tower, None)
    at = steps.cut.window[:40]
    columns = examples.ranker_examples(
        funnel, steps.moments, at, steps.config.examples, seed=1, dice=examples.Dice(1.0, np.random.default_rng(3))
    )
    queries = steps.moments.queries(at)
    examples.Dice(1.0, np.random.default_rng(3)).forget(queries)
    queries.memo["fields"] = funnel.space.estranged(funnel.user_fields(queries), queries, np.ones(40, bool))
    candidates = funnel.coarse_rank(queries, funnel.recall(queries))
    says = evidence(candidates)
    for moment, item, said in zip(columns["moment"], columns["item"], columns[EVIDENCE], strict=True):
        np.testing.assert_allclose(said, says[moment, np.flatnonzero(candidates.items[moment] == item)[0]], atol=1e-6)
    assert not np.isin(columns["user_id"], np.unique(steps.prepared.user_columns["user_id"])).any()


def test_making_examples_counts_up_to_what_it_announced(tmp_path):
    write_data(tmp_path)
    steps, seen = recipe_of(config_of(tmp_path)), {}

    @contextmanager
    def bar(name, total):
        done = []
        yield done.append
        seen[name] = (total, sum(done))

    steps.bar = bar
    assert steps.ranker.exists()
    # 60 users: 6 events each in base, 2 in the window, 1 in valid.
    assert seen == {"examples of two_tower": (480, 480), "examples of fine_rank": (180, 180)}


def test_examples_on_disk_are_shuffled_granules_with_their_schema(steps):
    assert steps.base_tower.exists()
    folder = steps.folder / "examples" / "two_tower"
    assert examples.are_written(folder)
    parquet = pq.ParquetFile(folder / "train.parquet")
    assert parquet.metadata.num_rows == 360
    assert parquet.metadata.row_group(0).num_rows == 32


def test_the_same_configuration_gives_the_same_bundle(tmp_path):
    hashes = set()
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        write_data(folder)
        config = config_of(folder)
        steps = recipe_of(config)
        hashes.add(tuple(np.round(steps.judged().vectors[:5, :3].ravel(), 5).tolist()))
    assert len(hashes) == 1


def test_held_out_items_are_those_the_user_has_not_had(steps):
    held_out, split, log = steps.held_out(), steps.prepared.split, steps.prepared.log
    assert len(held_out) == 60
    test = np.flatnonzero(split.test)
    queries = held_out.queries(np.arange(60))
    for b, (a, e) in enumerate(zip(held_out.relevant.indptr[:-1], held_out.relevant.indptr[1:], strict=True)):
        assert held_out.relevant.items[a:e].tolist() == log.item[test[log.user[test] == queries.users[b]]].tolist()
        assert not set(held_out.relevant.items[a:e].tolist()) & set(queries.exclude[b].tolist())
    assert held_out.warm.all()


def test_the_report_has_every_channel_stage_and_what_each_cut_loses(steps):
    counts = np.bincount(steps.prepared.log.item, minlength=steps.prepared.log.n_items)
    report = evaluate_funnel(steps.judged(), steps.held_out(), counts, protocol="next_item")
    rows = {row.model: row.metrics()["ndcg@10"] for row in report.rows}
    assert list(rows) == ["two_tower", "item_cf", "markov", "realtime", "popular", "merged", "coarse", "fine", "funnel"]
    # 10 unseen items of the user's half, one of them right, against 20 unseen in all: knowing the half beats popularity.
    assert rows["item_cf"] > rows["popular"]
    loss = report.stage_recall
    assert loss["merged"] >= loss["coarse"] >= loss["fine"] >= loss["funnel"]
    document = report.as_json()
    assert document["protocol"] == "next_item"
    assert set(document["rows"][0]) >= {"model", "metrics", "seconds"}
    report.keep(["fine"])
    assert [row.model for row in report.rows] == ["fine"]
    with pytest.raises(RayfunnelError, match="no row 'bogus'"):
        report.keep(["bogus"])


def test_what_was_prepared_reads_back_as_it_was(steps, tmp_path):
    steps.prepared.save(tmp_path)
    back, log = Prepared.load(tmp_path), steps.prepared.log
    for name in ("user", "item", "time", "event", "value"):
        np.testing.assert_array_equal(getattr(back.log, name), getattr(log, name))
    assert back.log.event_names == log.event_names
    assert back.log.context["device"].tolist() == log.context["device"].tolist()
    np.testing.assert_array_equal(back.split.train, steps.prepared.split.train)
    np.testing.assert_array_equal(back.item_columns["price"], steps.prepared.item_columns["price"])
    assert back.titles.to_pylist() == steps.prepared.titles.to_pylist()


def test_evidence_of_an_item_nobody_recalled_is_empty_and_deepest():
    from recsys.core import Candidates

    given = Candidates(
        np.array([[4, UNKNOWN]], np.int32),
        np.array([[0.5, -np.inf]], np.float32),
        ("a", "b"),
        np.array([[[2.0, np.nan], [np.nan, np.nan]]], np.float32),
        np.array([[[1, 0], [0, 0]]], np.int16),
        stage="coarse_rank",
        merged=np.array([[3.0, -np.inf]], np.float32),
    )
    says = evidence(given)[0]
    # found a, b; score against the channel's best a, b; depth a = log 2 / log 1001, b deepest; merge against its best; coarse score
    np.testing.assert_allclose(says[0], [1, 0, 1, 0, np.log(2) / np.log(1001), 1, 1, 0.5], atol=1e-6)
    np.testing.assert_allclose(says[1], [0, 0, 0, 0, 1, 1, 0, 0], atol=1e-6)
