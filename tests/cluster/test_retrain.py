"""`rayfunnel retrain`: new events to a promoted version, refused by the gate, repeated, killed, with new ids and other features."""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cluster import retrain as retraining
from cluster.registry import Registry
from cluster.retrain import retrain, taken_by
from cluster.taken import ELSEWHERE, TAKEN, covered, taken_in
from cluster.workdir import Passing
from recsys.config import Config
from recsys.data import event_files
from recsys.errors import BundleError, DataError, RetrainRefusedError
from recsys.funnel import Funnel, FunnelRequest, PageItem
from recsys.impressions import impression, table_of
from tests.live_events import Told, archive
from tests.small import config_of, publish, write_data

LATER = 1_700_100_000
TOLERANT = "retrain.gate.at_least=-100"


def console() -> Console:
    return Console(record=True, width=300, force_terminal=False)


def new_events(n: int = 240, *, start: float = LATER, flip: bool = False) -> list[Told]:
    """Users take items of their own half (or, flipped, of the other); every tenth event is a new user's, every seventh of a new item."""
    rng = np.random.default_rng(n)
    told = []
    for k in range(n):
        u = int(rng.integers(60))
        user = f"new{u % 6}" if k % 10 == 0 else f"u{u}"
        item = f"fresh{u % 2}" if k % 7 == 0 else f"i{2 * int(rng.integers(20)) + (u + flip) % 2}"
        told.append(Told(user, item, start + 60 * k, context={"device": "web"}))
    return told


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A published version, and its folder to copy."""
    folder = tmp_path_factory.mktemp("retrain")
    write_data(folder)
    config = config_of(folder)
    publish(config, Registry(config.place("registry")))
    return folder


@pytest.fixture
def at(trained, tmp_path) -> Path:
    """A copy of the trained workdir for one test."""
    import shutil

    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def registry(config: Config) -> Registry:
    return Registry(config.place("registry"))


def test_new_events_become_a_promoted_version_that_knows_new_ids(at):
    config = config_of(at, TOLERANT)
    first = registry(config).resolve("production")
    archive(Path(config.place("events")), new_events())
    told = console()
    done = retrain(config, told)
    held = registry(config)
    assert (done.promoted, done.warm, done.new_events) == (True, True, 240)
    assert held.resolve("production") == done.version != first
    assert held.resolve("previous") == first
    manifest = held.manifest(done.version)
    assert manifest.parent_version == first
    assert manifest.metrics["protocol"] == "rolling"
    assert sum(taken_by(held, done.version).values()) == 240
    assert "tables grow by" in told.export_text()
    funnel = Funnel.load(held.bundles / done.version)
    assert funnel.users.row("new0") >= 0
    assert funnel.items.row("fresh1") >= 0
    page = funnel.page(q := funnel.queries([FunnelRequest("u3", 5, LATER + 20_000)]), funnel.recommend(q))[0]
    assert len(page) == 5
    assert "live" not in manifest.config["data"]["interactions"]


def test_what_was_taken_is_not_taken_again(at):
    config = config_of(at, TOLERANT)
    events = Path(config.place("events"))
    archive(events, new_events())
    first = retrain(config, console(), promote=False)
    held = registry(config)
    assert not first.promoted
    assert held.resolve("production") != first.version
    again = retrain(config, console(), promote=False)
    assert (again.version, again.verdict) == (first.version, None)  # nothing was trained
    assert len(held.versions()) == 2
    promoted = retrain(config, console())
    assert promoted.version == first.version == held.resolve("production")
    nothing = retrain(config, console())
    assert nothing.version is None
    assert nothing.sentence == f"Nothing new since {first.version}: 0 new events. Nothing to do."
    assert len(held.versions()) == 2
    archive(events, new_events(150, start=LATER + 100_000))
    second = retrain(config, console())
    assert second.new_events == 150
    assert held.manifest(second.version).parent_version == first.version
    assert sum(taken_by(held, second.version).values()) == 390


def pages_of(events: list[Told], at: Path, *, variant: str = "default") -> None:
    """Log a page of three for every event: its item taken or not, and two others that nobody asked for."""
    shown = []
    for n, told in enumerate(events):
        request = FunnelRequest(told.user, 3, told.time_s - 5, context={"device": "web"})
        page = [
            PageItem(item, 0.5, [], None, None) for item in (told.item, "i38", "i39") if item not in ("i38", "i39") or item != told.item
        ]
        shown.append(impression(request, f"r{n}", page, None, version="v", variant=variant))
    at.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(shown), at / "one.parquet")


def test_logged_pages_are_lessons_of_the_ranker_beside_the_events(at):
    """Of 240 events the first 144 (1 - .2 - .2) are learnt from, and so are their pages; those of the held-out part are not."""
    config = config_of(at, TOLERANT)
    events = [told._replace(request_id=f"r{n}") for n, told in enumerate(new_events())]
    archive(Path(config.place("events")), events)
    pages_of(events, Path(config.place("events")).parent / "impressions")
    told = console()
    assert retrain(config, told).warm
    lines = [line for line in told.export_text().splitlines() if "pages of the service" in line]
    assert len(lines) == 2, "of the window and of validation"
    pages, pairs, taken = (int(x) for x in re.findall(r"\d+", lines[0].replace(",", "")))
    assert 140 <= pages <= 144, "a page is asked for 5 s before its event, and the newest user's is before the window"
    assert 2 * pages <= pairs <= 3 * pages
    assert 0 < taken <= pages


def test_a_log_of_impressions_is_retrained_on_impressions_and_clicks_that_come_one_by_one(tmp_path):
    """Every click has its exposure before it: the ranker learns at the exposures, the tower and the weights from the clicks."""
    write_data(tmp_path)
    settings = ("data.impressions=true", "recall.exclude_seen=false")
    config = config_of(tmp_path, TOLERANT, *settings)
    publish(config, registry(config))
    events = []
    for n, one in enumerate(new_events()):
        events.append(one._replace(event="impression"))
        if n % 2 == 0:
            events.append(one._replace(time_s=one.time_s + 5))
    archive(Path(config.place("events")), events)
    done = retrain(config, console())
    assert done.warm
    assert done.new_events == 360
    assert registry(config).aliases()["production"] == done.version


def test_a_version_that_is_worse_is_refused_and_the_serving_one_stays(at):
    config = config_of(at, "retrain.gate.at_least=100")
    serving = registry(config).resolve("production")
    archive(Path(config.place("events")), new_events())
    with pytest.raises(RetrainRefusedError, match=rf"not published and {serving} stays: ndcg@10 [\d.]+, the serving version's [\d.]+"):
        retrain(config, console())
    assert registry(config).versions() == [serving]
    # What was refused counts as new until a version has it.
    assert retrain(config_of(at, TOLERANT), console()).new_events == 240


def test_a_retrain_leaves_its_version_and_no_folders(at):
    """One that was refused may be repeated: what it made stays for a day."""

    def folders() -> set[Path]:
        return {folder for part in ("data", "examples", "runs") for folder in (Path(config_of(at).root) / part).glob("*")}

    before = folders()
    archive(Path(config_of(at).place("events")), new_events())
    with pytest.raises(RetrainRefusedError):
        retrain(config_of(at, "retrain.gate.at_least=100"), console())
    refused = folders() - before
    assert len(refused) >= 4, "the events, the log, examples and checkpoints"
    retrain(config_of(at, TOLERANT), console())
    left = folders() - before
    assert left, "of the refused one"
    assert left < refused
    archive(Path(config_of(at).place("events")), new_events(150, start=LATER + 100_000))
    for folder in left:
        os.utime(folder / Passing.MARK, (time.time() - 90_000,) * 2)
    retrain(config_of(at, TOLERANT), console())
    assert folders() == before


def test_folders_of_runs_go_by_their_name_at_once_and_two_may_sweep(at, monkeypatch):
    """A removal that is cut short leaves nothing under the name that a later run would take for whole; the next sweep ends it."""
    config = config_of(at)
    old, data = time.time() - 90_000, Path(config.root) / "data"
    passing = Passing(config)
    for name in ("one", "two"):
        (passing.mark(data / name) / "prepared.json").write_text("{}")
        os.utime(data / name / Passing.MARK, (old, old))
    with monkeypatch.context() as cut_short:
        cut_short.setattr("cluster.workdir.shutil.rmtree", lambda *_, **__: None)
        Passing(config).sweep()
    assert not (data / "one").exists()
    assert not (data / "two").exists()
    assert len(list(data.glob(".gone-*"))) == 2
    passing.clear()  # of what somebody else has removed
    passing.sweep()
    assert not list(data.glob(".gone-*"))


def test_too_few_events_wait_for_more(at):
    config = config_of(at)
    archive(Path(config.place("events")), new_events(99))
    done = retrain(config, console())
    assert done.version is None
    assert "99 new events" in done.sentence
    assert "fewer than the 100 of retrain.min_events" in done.sentence


def test_a_kill_while_publishing_takes_nothing(at, monkeypatch):
    config = config_of(at, TOLERANT)
    serving = registry(config).resolve("production")
    archive(Path(config.place("events")), new_events())

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(retraining.packing, "pack", killed)
    with pytest.raises(KeyboardInterrupt):
        retrain(config, console())
    assert registry(config).versions() == [serving]
    monkeypatch.undo()
    assert retrain(config, console()).new_events == 240


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("fine_rank.model.hidden=[8]", "fine_rank: the serving version's deepfm is configured otherwise"),
        ("features.history.recent=2", "recent"),
        ("features.item_id.dim=4", "item_id"),
        ("recall.channels.popular=null", "this configuration by"),
    ],
)
def test_where_more_than_ids_differ_it_fits_anew_and_says_why(at, setting, reason):
    config = config_of(at, TOLERANT, setting)
    archive(Path(config.place("events")), new_events())
    told = console()
    done = retrain(config, told)
    assert not done.warm
    assert "fitting anew" in (text := told.export_text())
    assert reason in text
    assert json.loads((registry(config).bundles / done.version / TAKEN).read_text())["warm"] is False


def test_events_from_a_file_are_taken_like_those_of_the_workdir(at):
    config = config_of(at, TOLERANT)
    archive(at / "elsewhere", new_events())
    pq.write_table(event_files.read(str(at / "elsewhere")), at / "all.parquet")
    done = retrain(config, console(), events=str(at / "all.parquet"))
    assert done.new_events == 240
    assert sum(taken_by(registry(config), done.version).values()) == 240


def file_of(at: Path, name: str, events: list[Told]) -> str:
    """These events as a file from elsewhere, whose positions begin at 0 as in every other one."""
    archive(at / name, events, partitions=1)
    pq.write_table(event_files.read(str(at / name)), at / f"{name}.parquet")
    return str(at / f"{name}.parquet")


def test_a_file_leaves_the_own_log_where_it_is(at):
    """The file has positions 0 to 239, the log begins at 0 as well: none of its 120 events was taken."""
    config = config_of(at, TOLERANT)
    file = file_of(at, "elsewhere", new_events())
    first = retrain(config, console(), events=file)
    assert first.new_events == 240
    archive(Path(config.place("events")), new_events(120, start=LATER + 100_000), partitions=1)
    own = retrain(config, console())
    assert own.new_events == 120
    assert own.promoted
    taken = taken_in(registry(config).bundles / own.version)
    assert (taken.positions, taken.log, taken.own, len(taken.elsewhere)) == ({0: 120}, {0: 120}, True, 240)
    for again in (retrain(config, console()), retrain(config, console(), events=file)):
        assert again.sentence == f"Nothing new since {own.version}: 0 new events. Nothing to do."


def test_the_own_log_leaves_a_file_where_it_is(at):
    """The log is at 120; a file of 110 has positions 0 to 109, and another one has them again."""
    config = config_of(at, TOLERANT)
    archive(Path(config.place("events")), new_events(120), partitions=1)
    assert retrain(config, console()).new_events == 120
    files = [file_of(at, name, new_events(110, start=LATER + start)) for name, start in (("one", 100_000), ("two", 200_000))]
    for n, file in enumerate(files):
        unpromoted = retrain(config, console(), events=file, promote=False)
        assert (unpromoted.new_events, unpromoted.verdict is None) == (110, False)
        done = retrain(config, console(), events=file)
        assert (done.version, done.verdict) == (unpromoted.version, None), "nothing was trained again"
        taken = taken_in(registry(config).bundles / done.version)
        assert (taken.positions, taken.log, taken.own, len(taken.elsewhere)) == ({0: 110}, {0: 120}, False, 110 * (n + 1))
    for events in (*files, None):
        assert retrain(config, console(), events=events).sentence.startswith(f"Nothing new since {done.version}: 0 new events.")


def test_a_copy_of_the_log_holds_nothing_new_and_the_log_nothing_that_its_copy_had(at):
    """A copy of the log's first 120 events is known; with 110 more it is taken for these, and the log has then none that are new."""
    config = config_of(at, TOLERANT)
    own = Path(config.place("events"))
    archive(own, new_events(120))
    copy = file_of(at, "copy", new_events(120))
    assert retrain(config, console()).new_events == 120
    assert retrain(config, console(), events=copy).new_events == 0
    later = new_events(110, start=LATER + 100_000)
    copy = file_of(at, "longer", [*new_events(120), *later])
    assert retrain(config, console(), events=copy).new_events == 110
    archive(own, later)
    assert retrain(config, console()).new_events == 0


@pytest.mark.parametrize(("own", "log", "positions"), [(True, {0: 7}, {0: 7}), (False, {}, None)])
def test_what_bundles_said_before_sources_were_told_apart_is_read(tmp_path, own, log, positions):
    """Of a version that took a file last, the one numbering of all sources is not believed."""
    (tmp_path / TAKEN).write_text(json.dumps({"positions": {"0": 7}, "own": own, "until_ms": 5}))
    taken = taken_in(tmp_path)
    assert (taken.positions, taken.log, len(taken.elsewhere)) == ({0: 7}, log, 0)
    assert (covered(tmp_path).positions, covered(tmp_path).until_ms == 5) == (positions, not own)
    assert not (tmp_path / ELSEWHERE).exists()


def test_events_that_the_log_holds_already_are_not_new_to_anybody(at):
    config = config_of(at, TOLERANT)
    lines = (at / "log.csv").read_text().splitlines()[1:]
    old = [Told(u, i, float(t)) for u, i, t, _ in (line.split(",") for line in lines[-150:])]
    archive(Path(config.place("events")), [*old, *new_events()])
    done = retrain(config, console())
    assert done.promoted
    held = registry(config)
    funnel = Funnel.load(held.bundles / done.version)
    counts = np.diff(funnel.past.indptr)
    assert counts.sum() <= 600 + 240


def test_nothing_serving_and_no_events_are_sentences(tmp_path):
    write_data(tmp_path)
    config = config_of(tmp_path)
    with pytest.raises(BundleError, match="No version is production"):
        retrain(config, console())


def test_a_folder_without_events_is_a_sentence(at):
    config = config_of(at)
    with pytest.raises(DataError, match="does not exist"):
        retrain(config, console())
    (at / "empty").mkdir()
    with pytest.raises(DataError, match="Is the ingestion running"):
        retrain(config, console(), events=str(at / "empty"))
    (at / "bad.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        retrain(config, console(), events=str(at / "bad.parquet"))


def test_events_of_one_instant_cannot_be_cut(at):
    config = config_of(at)
    archive(Path(config.place("events")), [Told(f"u{n % 60}", f"i{n % 40}", LATER) for n in range(120)])
    with pytest.raises(DataError, match="cannot be cut by time"):
        retrain(config, console())
