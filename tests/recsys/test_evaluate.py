"""The report: who takes part and what is fitted for that, baselines as defined, given lists, bins, seeds, JSON."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from recsys import contenders as who_is
from recsys.baselines import NAMES, baselines
from recsys.contenders import assemble, contenders, fit_here
from recsys.core import UNKNOWN
from recsys.errors import ConfigError
from recsys.evaluate import bins, judge_here, report, users_of_items
from recsys.held_out import against_given
from recsys.metrics import Relevant, mean_of_users
from recsys.prepared import prepare
from recsys.recall.ease import EASEConfig
from recsys.recipe import Recipe
from recsys.report import Report, Row, mean_over_seeds
from tests.small import Small, config_of, recipe_of, write_data


@pytest.fixture(scope="module")
def steps(small: Small) -> Recipe:
    return recipe_of(small.config)


def untrained(config):
    """A recipe that may not train anything."""
    steps = recipe_of(config)

    def refuse(*args, name, **kwargs):
        raise AssertionError(f"{name} was trained, but no row asked for it")

    steps.train = refuse
    return steps


def judged(steps, models=None, protocol="next_item", held_out=None):
    held_out = held_out or steps.held_out(protocol)
    who = contenders(steps.config, models, steps.prepared.log.n_items)
    judge, rows = assemble(steps, who, held_out, width=20)
    known = steps.prepared.log.where(steps.cut.judged_mask)
    counts = np.bincount(known.item, minlength=known.n_items)
    found = judge_here(judge, held_out)
    return report(found, held_out, counts, protocol=protocol, rows=rows, item_users=users_of_items(known)), found


def test_rows_of_channels_alone_train_nothing_and_have_the_baselines_beside_them(tmp_path):
    write_data(tmp_path)
    found, _ = judged(untrained(config_of(tmp_path)), ["popular", "item_cf"])
    assert [row.model for row in found.rows] == ["popular", "item_cf", *NAMES]
    assert {row.kind for row in found.rows if row.model in NAMES} == {"baseline"}


def test_merged_of_channels_that_need_no_model_trains_nothing(tmp_path):
    write_data(tmp_path)
    found, answers = judged(untrained(config_of(tmp_path, "recall.channels.two_tower=null")), ["merged"])
    assert "merged" in {row.model for row in found.rows}
    assert set(answers.kept) == {"merged"}


def test_a_type_that_is_not_configured_takes_part_with_its_defaults(tmp_path):
    write_data(tmp_path)
    config = config_of(tmp_path)
    assert "ease" not in config.recall.channels
    who = contenders(config, ["ease"], 40)
    assert who.channels == {"ease": EASEConfig()}
    with pytest.raises(ConfigError, match=r"no row 'eese'\. Rows: .*two_tower.*merged.*Markov; with defaults also .*ease"):
        contenders(config, ["eese"], 40)


def test_every_row_is_there_and_the_same_configuration_is_fitted_once(steps, monkeypatch):
    times = []
    fit_one = who_is.fit_one
    monkeypatch.setattr(who_is, "fit_one", lambda config, known: times.append(config) or fit_one(config, known))
    found, _ = judged(steps)
    rows = {row.model: row for row in found.rows}
    assert list(rows) == ["two_tower", "item_cf", "markov", "realtime", "popular", "merged", "coarse", "fine", "funnel", *NAMES]
    assert len(times) == len(set(times)) == len([c for c in steps.config.recall.channels if c not in ("two_tower", "realtime")]) + 3
    assert rows["Markov"].same_as == "markov"  # its defaults, and nobody's history is longer than the service's
    assert rows["Markov"].metrics()["ndcg@10"] == rows["markov"].metrics()["ndcg@10"]
    assert rows["Pop"].same_as is None


def test_a_baseline_sees_the_whole_history_where_the_service_does_not(tmp_path):
    write_data(tmp_path)
    config = config_of(tmp_path, "features.history.length=2", "features.history.recent=1")
    found, _ = judged(untrained(config), ["markov"])
    rows = {row.model: row for row in found.rows}
    assert rows["Markov"].same_as is None
    assert not np.array_equal(rows["Markov"].values["ndcg@10"], rows["markov"].values["ndcg@10"])


def test_item_knn_is_the_definition(steps):
    """Cosine, the nearest neighbours kept per candidate, shrink 0, no weights: scores summed over the whole history."""
    held_out, known = steps.held_out("next_item"), steps.prepared.log.where(steps.cut.judged_mask)
    config = baselines(known.n_items)["ItemKNN"].model_copy(update={"neighbors": 6})
    channel, _ = fit_here({"it": config}, known)["it"]
    queries = held_out.queries(np.arange(len(held_out)))
    items, scores = channel.recall(queries, 5)
    X = known.matrix().toarray().astype(np.float64)
    norm = np.linalg.norm(X, axis=0)
    cosine = X.T @ X / np.maximum(np.outer(norm, norm), 1e-12)
    np.fill_diagonal(cosine, 0)
    for j in range(known.n_items):  # a candidate keeps its six nearest; ties to the smaller row
        order = np.lexsort((np.arange(known.n_items), -cosine[j]))
        cosine[j, order[6:]] = 0
    for b in range(len(held_out)):
        history = [i for i in queries.history[b] if i != UNKNOWN]
        score = cosine[:, history].sum(1)
        score[[i for i in queries.exclude[b] if i != UNKNOWN]] = -1
        best = np.sort(score)[::-1]
        np.testing.assert_allclose(scores[b][items[b] >= 0], best[:5][best[:5] > 0], rtol=1e-5)


def test_ease_that_does_not_fit_is_left_out_with_its_sentence(steps, monkeypatch):
    monkeypatch.setattr(who_is, "baselines", lambda n: baselines(n) | {"EASE": EASEConfig(max_gib=1e-9)})
    found, _ = judged(untrained(steps.config), ["popular"])
    assert "EASE" not in {row.model for row in found.rows}
    assert "needs 0.0 GiB for its inverse" in found.skipped["EASE"]
    with pytest.raises(ConfigError, match="GiB"):  # where it is configured, that is an error
        judged(untrained(steps.config.model_copy(update={"recall": steps.config.recall.model_copy(update={"channels": {"ease": EASEConfig(max_gib=1e-9)}})})), ["ease"])  # fmt: skip


def test_ncf_is_the_rank_among_the_given_items_and_says_so(steps):
    log = steps.prepared.log
    held_out = against_given(steps.held_out("next_item"), log, negatives=5, given=None, seed=3)
    found, answers = judged(steps, None, "ncf", held_out)
    counts = np.bincount(log.item[steps.cut.judged_mask], minlength=log.n_items)
    hits = []
    for row, positive in zip(held_out.given, held_out.relevant.items, strict=True):
        items = [int(i) for i in row if i != UNKNOWN]
        rank = 1 + sum((counts[i], -i) > (counts[positive], -positive) for i in items)
        hits.append(rank <= 5)
    pop = next(row for row in found.rows if row.model == "Pop")
    assert pop.metrics()["hit@5"] == pytest.approx(np.mean(hits))
    for lists in answers.ranked.values():  # no row answers anything that was not given, the funnel included
        for ranked, given in zip(lists, held_out.given, strict=True):
            assert set(ranked.tolist()) - {UNKNOWN} <= set(given.tolist())
    assert found.as_json()["sampled"] is True


def test_stage_recall_and_cumulative_seconds(steps):
    found, answers = judged(steps)
    rows = {row.model: row for row in found.rows}
    assert found.stage_recall["merged"] >= found.stage_recall["coarse"] >= found.stage_recall["fine"] >= found.stage_recall["funnel"]
    assert rows["funnel"].seconds["predict"] == pytest.approx(sum(answers.seconds[s] for s in ("merged", "coarse", "fine", "funnel")))
    assert found.stage_recall["funnel"] == pytest.approx(rows["funnel"].metrics()["recall@20"])  # lists are judged 20 deep


def test_bins_hold_everybody_once_and_zero_stands_alone():
    at, found = bins(np.array([0, 0, 1, 1, 1, 1, 2, 3, 8, 9]), "users")
    assert found[0] == {"from": 0, "to": 0, "users": 2}
    assert sum(b["users"] for b in found) == 10
    assert all(a["to"] < b["from"] for a, b in pairwise(found))
    assert at.tolist() == sorted(at.tolist())
    assert bins(np.empty(0, np.int64), "users")[1] == []


def test_breakdowns_are_means_over_their_bins(steps):
    found, answers = judged(steps, ["popular"])
    pop = next(row for row in found.rows if row.model == "Pop")
    held_out = steps.held_out("next_item")
    assert [b["users"] for b in found.history_bins] == [60]
    assert pop.by_history == pytest.approx([pop.metrics()["ndcg@10"]])
    counts = np.bincount(steps.prepared.log.item[steps.cut.judged_mask], minlength=41)
    for b, share in zip(found.popularity_bins, pop.by_popularity, strict=True):
        inside = [(u, i) for u, i in enumerate(held_out.relevant.items) if b["from"] <= counts[i] <= b["to"]]
        assert share == pytest.approx(np.mean([i in answers.ranked["Pop"][u, :10] for u, i in inside]))


def test_json_has_the_promised_keys_and_no_nan(steps):
    document = judged(steps, ["popular", "two_tower"])[0].as_json()
    text = json.dumps(document, allow_nan=False)
    row = json.loads(text)["rows"][0]
    assert {"model", "metrics", "seconds"} <= set(row)
    assert {"fit", "predict"} == set(row["seconds"])
    assert set(row["interval"]) == set(row["metrics"]) - {"coverage@10", "gini@10"}
    assert document["test"].startswith("paired t-test")
    best = document["best"]
    others = [r for r in document["rows"] if r["model"] != best and not r["same_as"]]
    assert all(r["against"][best]["ndcg@10"]["p_holm"] >= r["against"][best]["ndcg@10"]["p"] for r in others)


def seed_report(values, warm):
    rows = [Row(name, {"ndcg@10": np.array(v)}, {"coverage@10": c}, {"fit": 1.0}, {"fit": 2.0}) for name, v, c in values]
    return Report("top_n", rows, len(warm), np.array(warm), 10)


def test_several_seeds_are_averaged_and_users_counted_once():
    one = seed_report([("a", [0.0, 1.0], 0.2), ("b", [1.0, math.nan], 0.4)], [True, True])
    two = seed_report([("a", [1.0, 1.0, 0.5], 0.4), ("b", [0.0, 0.0, 0.0], 0.4)], [True, False, True])
    found = mean_over_seeds([one, two], [np.array([3, 5]), np.array([3, 4, 5])])
    a, b = found.rows
    assert a.metrics()["ndcg@10"] == pytest.approx((0.5 + 2.5 / 3) / 2)  # the mean of the seeds' means
    assert a.metrics()["coverage@10"] == pytest.approx(0.3)
    assert a.spread["ndcg@10"] == pytest.approx(np.std([0.5, 2.5 / 3], ddof=1))
    assert a.values["ndcg@10"].tolist() == [0.5, 1.0, 0.75]  # users 3, 4, 5
    assert b.values["ndcg@10"].tolist() == [0.5, 0.0, 0.0]
    assert (found.users, found.seeds, a.seconds["fit"], a.mib["fit"]) == (3, 2, 2.0, 2.0)
    assert mean_over_seeds([one], [np.array([3, 5])]) is one


def test_means_do_not_depend_on_how_users_are_chunked(steps, monkeypatch):
    held_out = steps.held_out("next_item")
    who = contenders(steps.config, None, steps.prepared.log.n_items)
    judge, _ = assemble(steps, who, held_out, width=20)
    whole = judge_here(judge, held_out)
    monkeypatch.setattr("recsys.judging.CHUNK", 7)
    told = []
    small_chunks = judge_here(judge, held_out, told.append)
    assert sum(told) == 60
    for name, lists in whole.ranked.items():
        np.testing.assert_array_equal(lists, small_chunks.ranked[name], err_msg=name)
    assert mean_of_users(whole.agreement) == pytest.approx(mean_of_users(small_chunks.agreement))


def test_an_empty_test_gives_an_empty_report_not_an_error():
    relevant = Relevant.of([])
    assert len(relevant) == 0
    assert math.isnan(mean_of_users(np.empty(0)))


def test_a_log_without_times_and_a_catalogue_of_one_are_judged(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n" + "".join(f"{u},only\n" for u in range(5) for _ in range(4)))
    (tmp_path / "c.yaml").write_text(
        "name: one\ndata: {interactions: {path: log.csv}}\nsplit: {by: leave_one_out}\nrecall: {exclude_seen: false}\n"
    )
    from recsys.config import load

    config = load([tmp_path / "c.yaml"], [f"workdir={tmp_path}"])
    found, _ = judged(untrained(config).__class__(config, prepare(config), tmp_path, untrained(config).train), ["popular"])
    assert next(row for row in found.rows if row.model == "popular").metrics()["hit@5"] == 1.0
