"""Data sets at the edge of what a data set is: each works end to end, or is refused with a sentence that says what to do."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster.registry import Registry
from cluster.registry_url import open_registry
from recsys import packing
from recsys.config import Config, load
from recsys.errors import DataError
from recsys.funnel import Funnel, FunnelRequest
from tests.small import publish

ROOT = Path(__file__).parents[2]
DAY = 86_400
START = 1_700_000_000
YAML = """
extends: {base}
name: odd
workdir: {workdir}
data:
  interactions: {{path: log.csv{log}}}
  {data}
split: {split}
features: {{dim: 4, history: {{length: 10, recent: 2}}}}
examples: {{window_events: 2, recalled: 4, max_moments: 500}}
recall: {{merge: {{limit: 40, quota: 20}}}}
coarse_rank: {{keep: 30}}
fine_rank: {{keep: 20, model: {{dim: 4, hidden: [8]}}, training: {{epochs: 1, batch_size: 256, granule: 64}}}}
two_tower: {{refit: false, model: {{dim: 4, user_hidden: [], item_hidden: []}}, training: {{epochs: 1, batch_size: 1024, granule: 64}}}}
"""


def config_of(folder: Path, header: str, rows: Iterable[str], *, split: str = "{by: time}", log: str = "", data: str = "") -> Config:
    (folder / "log.csv").write_text("\n".join([header, *rows]) + "\n", "utf-8")
    text = YAML.format(base=ROOT / "configs" / "base.yaml", workdir=folder / "state", log=log, data=data or "labels: {}", split=split)
    (folder / "odd.yaml").write_text(text, "utf-8")
    return load([folder / "odd.yaml"])


def lived_through(config: Config, *users: str) -> list[list[str]]:
    """Prepared, trained, judged, published, loaded from the registry again, asked: the item ids of each user's page."""
    registry: Registry = open_registry(config.place("registry"))
    version = publish(config, registry)
    folder = registry.local_copy(version)
    funnel = Funnel.load(folder)
    assert packing.differences(funnel, folder) == []
    queries = funnel.queries([FunnelRequest(user_id=user, k=5, at=START + 1e6) for user in users])
    return [[item.item_id for item in page] for page in funnel.page(queries, funnel.recommend(queries))]


def clicks(users: int = 20, items: int = 15, each: int = 8) -> list[tuple[int, int, int]]:
    """(user, item, n-th): every user takes `each` different items."""
    return [(u, (u + 4 * n) % items, n) for n in range(each) for u in range(users)]


TIMED = ", time: ts"


def test_interactions_and_nothing_else(tmp_path):
    config = config_of(tmp_path, "user_id,item_id,ts", [f"u{u},i{i},{START + n * DAY + u}" for u, i, n in clicks()], log=TIMED)
    known, nobody = lived_through(config, "u1", "nobody")
    assert len(set(known)) == 5
    assert len(set(nobody)) == 5, "who nobody knows gets what is popular"


@pytest.mark.parametrize("split", ["{by: time}", "{by: leave_one_out}", "{by: random, per_user: true}"])
def test_without_times_the_order_of_the_log_counts(tmp_path, split):
    config = config_of(tmp_path, "user_id,item_id", [f"u{u},i{i}" for u, i, _ in clicks()], split=split)
    (page,) = lived_through(config, "u1")
    assert len(page) == 5


def test_ids_are_any_text(tmp_path):
    names = ["zoë b.", "李小龙", "a/b?c", "  padded  ", "007", "7", "-1", "🙂", 'quote"d', "None of it"]
    rows = [f'"{names[u % 10].replace(chr(34), chr(34) * 2)}","ítem № {i}",{START + n * DAY + u}' for u, i, n in clicks(10)]
    config = config_of(tmp_path, "user_id,item_id,ts", rows, log=TIMED)
    pages = lived_through(config, "zoë b.", "李小龙", "padded", "007", "7", "🙂")
    assert all(len(page) == 5 for page in pages)
    assert all(item.startswith("ítem № ") for page in pages for item in page)
    assert Funnel.load(open_registry(config.place("registry")).local_copy("production")).users.row("007") >= 0


def test_one_user_with_100_000_events(tmp_path):
    rows = [f"whale,i{n % 60},{START + n}" for n in range(100_000)]
    rows += [f"u{u},i{(u + 7 * n) % 60},{START + 9_000 * n + u}" for n in range(10) for u in range(30)]
    config = config_of(tmp_path, "user_id,item_id,ts", rows, log=TIMED)
    whale, other = lived_through(config, "whale", "u3")
    assert whale == [], "all 60 items were had, and nothing had comes again"
    assert len(other) == 5


def test_a_catalogue_of_one_item(tmp_path):
    config = config_of(tmp_path, "user_id,item_id,ts", [f"u{n},only,{START + n * DAY}" for n in range(40)], log=TIMED)
    had, fresh = lived_through(config, "u1", "nobody")
    assert had == []
    assert fresh == ["only"]


def test_one_user_alone(tmp_path):
    config = config_of(tmp_path, "user_id,item_id,ts", [f"me,i{n},{START + n * DAY}" for n in range(40)], log=TIMED)
    me, fresh = lived_through(config, "me", "nobody")
    assert me == []
    assert len(fresh) == 5


def test_every_user_has_one_event(tmp_path):
    rows = [f"u{n},i{n % 12},{START + n * 3600}" for n in range(200)]
    config = config_of(tmp_path, "user_id,item_id,ts", rows, log=TIMED)
    (page,) = lived_through(config, "u5")
    assert len(page) == 5
    assert "i5" not in page
    alone = config_of(tmp_path, "user_id,item_id,ts", rows, log=TIMED, split="{by: leave_one_out}")
    with pytest.raises(DataError, match=r"split by leave_one_out: test is empty .* Change split"):
        lived_through(alone, "u5")


def test_all_events_at_the_same_second(tmp_path):
    rows = [f"u{u},i{i},{START}" for u, i, _ in clicks()]
    with pytest.raises(DataError, match=r"split by time: .* is empty .* Change split"):
        lived_through(config_of(tmp_path, "user_id,item_id,ts", rows, log=TIMED), "u1")
    config = config_of(tmp_path, "user_id,item_id,ts", rows, log=TIMED, split="{by: leave_one_out}")
    (page,) = lived_through(config, "u1")
    assert len(page) == 5


def test_an_item_file_with_missing_rows_cells_and_items_nobody_had(tmp_path):
    lines = ["item_id,colour,price,about", *(f"i{n},{'red' if n % 3 else ''},{n if n % 2 else ''},words here {n}" for n in range(0, 15, 2))]
    (tmp_path / "items.csv").write_text("\n".join([*lines, "new,blue,3,never seen", ",lost,1,no id"]) + "\n")
    items = "items: {path: items.csv, columns: {colour: category, price: number, about: text}}"
    rows = [f"u{u},i{i},{START + n * DAY + u}" for u, i, n in clicks()]
    config = config_of(tmp_path, "user_id,item_id,ts", rows, log=TIMED, data=items)
    (page,) = lived_through(config, "u1")
    assert len(page) == 5


def labelled(folder: Path, label: int) -> Config:
    """A log of impressions with this one label on every row."""
    rows = [f"u{u},i{i},{START + n * DAY + u},{label}" for u, i, n in clicks()]
    data = "labels: {click: {column: is_click}}\n  impressions: true"
    return config_of(folder, "user_id,item_id,ts,is_click", rows, log=TIMED, data=data)


def test_labels_that_are_all_positive(tmp_path):
    (page,) = lived_through(labelled(tmp_path, 1), "u1")
    assert len(page) == 5


def test_labels_without_a_positive_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no positive among them. Check data.labels"):
        lived_through(labelled(tmp_path, 0), "u1")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("user_id,item_id,ts\n", "is empty: it has a header but no rows"),
        ("user_id,item_id,ts\n,,\n", "Nothing is left|no row|nothing"),
        ("user_id,item_id,ts\nu,i,1700000000\n", "is empty .* Change split"),
    ],
)
def test_a_log_of_nothing_or_of_one_event_is_refused(tmp_path, content, said):
    config = config_of(tmp_path, "", [], log=TIMED)
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        lived_through(config, "u1")
