"""Files of items and users reach the live catalogue: on an embedded store that nobody runs, and refused row by row."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.catalogue import rows_of
from cluster.cli import app
from cluster.embedded import EmbeddedValkey
from cluster.redis_items import RedisItemLog
from cluster.redis_store import RedisStore
from recsys.config import Config
from tests.small import config_of, write_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    config_of(tmp_path)
    return tmp_path


def run(folder: Path, *words: str):
    return CliRunner().invoke(app, [*words, "-c", str(folder / "small.yaml")])


def told(config: Config):
    with EmbeddedValkey(config.place("store")) as server:
        log = RedisItemLog(server.url)
        found = {r.item_id: (r.columns, r.title) for r in log.since(0).records}
        log.close()
    return found


def test_items_of_a_csv_and_of_json_lines_are_kept_and_deleted_ones_too(folder: Path) -> None:
    (folder / "new.csv").write_text("sku,name,price\nn1,New one,7\n007,Bond,\nbad,Bad,dear\n")
    done = run(folder, "items", "upsert", str(folder / "new.csv"))
    assert done.exit_code == 2, "one row was refused"
    assert "2 items upserted, 1 refused:" in done.output
    assert "Row 3, 'bad': 'columns.price': expected a finite number, got 'dear'." in done.output
    (folder / "more.jsonl").write_text('{"sku": "n1", "colour": "red"}\n{"sku": 5, "price": 1.5}\n')
    assert "2 items upserted" in run(folder, "items", "upsert", str(folder / "more.jsonl")).output
    (folder / "gone.txt").write_text("i2\n\n007\n")
    assert "2 items deleted" in run(folder, "items", "delete", str(folder / "gone.txt")).output
    (folder / "gone.csv").write_text("sku\ni4\n")
    assert "1 item deleted" in run(folder, "items", "delete", str(folder / "gone.csv")).output
    assert told(config_of(folder)) == {
        "n1": ({"price": 7.0, "colour": "red"}, "New one"),
        "5": ({"price": 1.5}, None),
        "i2": (None, None),
        "007": (None, None),
        "i4": (None, None),
    }


def test_profiles_of_a_file_are_kept_and_forgotten(folder: Path) -> None:
    (folder / "people.csv").write_text("uid,country\nu1,be\nu2,\n")
    assert "2 users upserted" in run(folder, "users", "upsert", str(folder / "people.csv")).output
    config = config_of(folder)

    async def profiles(url: str):
        store = RedisStore(url, config.store, config.history)
        states = await store.read(["u1", "u2"], timeout_s=5)
        await store.close()
        return [s.profile for s in states]

    with EmbeddedValkey(config.place("store")) as server:
        assert asyncio.run(profiles(server.url)) == [{"country": "be"}, {}]
    (folder / "left.txt").write_text("u1\n")
    assert "1 user deleted" in run(folder, "users", "delete", str(folder / "left.txt")).output
    with EmbeddedValkey(config.place("store")) as server:
        assert asyncio.run(profiles(server.url)) == [{}, {}]


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    assert "there is no file" in run(folder, "items", "upsert", str(folder / "none.csv")).output
    (folder / "odd.jsonl").write_text('{"name": "x"}\n')
    told = run(folder, "items", "upsert", str(folder / "odd.jsonl")).output
    assert """line 1 is {"name": "x"}, expected an object with 'sku'. Nothing was changed.""" in told
    (folder / "odd.jsonl").write_text('{"sku": "x"}\n\n{"sku": y}\n')
    assert "line 3 is not JSON (Expecting value: line 1 column 9" in run(folder, "items", "upsert", str(folder / "odd.jsonl")).output


def test_a_user_told_of_twice_in_a_file_keeps_what_each_line_says(folder: Path) -> None:
    config = config_of(folder)
    small = folder / "small.yaml"
    small.write_text(small.read_text().replace("{country: category}", "{country: category, city: category}"))
    (folder / "people.jsonl").write_text('{"uid": "u1", "country": "be"}\n{"uid": "u1", "city": "gent"}\n{"uid": "u1", "city": "brugge"}\n')
    assert "3 users upserted" in run(folder, "users", "upsert", str(folder / "people.jsonl")).output

    async def profile(url: str):
        store = RedisStore(url, config.store, config.history)
        (state,) = await store.read(["u1"], timeout_s=5)
        await store.close()
        return state.profile

    with EmbeddedValkey(config.place("store")) as server:
        assert asyncio.run(profile(server.url)) == {"country": "be", "city": "brugge"}


def test_what_a_request_would_refuse_is_refused_of_a_file_row_by_row(folder: Path) -> None:
    rows = {
        '{"sku": ["a"]}': "['a'] is no id; expected a text or a number.",
        '{"sku": true}': "True is no id; expected a text or a number.",
        '{"sku": "a\\u0000b"}': "the id 'a\\x00b' holds a NUL character; take another.",
        '{"sku": "\\ud800"}': "the id '\\ud800' holds bytes that are no UTF-8.",
        json.dumps({"sku": "x" * 257}): "has 257 bytes; at most 256 are taken (serve.limits.id_bytes).",
        '{"sku": "t1", "name": ["x"]}': "'t1': the title is ['x']; expected a text of at most 1,000 characters.",
        json.dumps({"sku": "t2", "name": "x" * 1_001}): "expected a text of at most 1,000 characters.",
        '{"sku": "t3", "name": "\\ud800"}': "'t3': str is not valid UTF-8",
        '{"sku": "t4", "colour": "\\ud800"}': "'t4': str is not valid UTF-8",
    }
    (folder / "odd.jsonl").write_text("\n".join([*rows, '{"sku": "good", "name": "Good"}']))
    found = rows_of(config_of(folder), "items", folder / "odd.jsonl")
    assert found.taken == [("good", {}, "Good")]
    for n, (said, words) in enumerate(zip(found.refused, rows.values(), strict=True), 1):
        assert said.startswith(f"Row {n}")
        assert words in said
    (folder / "gone.txt").write_text("i2\n" + "x" * 257 + "\n")
    done = run(folder, "items", "delete", str(folder / "gone.txt"))
    assert done.exit_code == 2
    assert "1 item deleted, 1 refused:" in done.output
    assert "- Line 2: the id 'xxx" in done.output


def test_ids_of_a_warehouse_are_decimals(folder: Path) -> None:
    """And one that is no number at all is refused."""
    pq.write_table(pa.table({"sku": pa.array([Decimal(1), Decimal(27)], pa.decimal128(10, 0))}), folder / "rows.parquet")
    assert rows_of(config_of(folder), "items", folder / "rows.parquet").taken == [("1", {}, None), ("27", {}, None)]
    (folder / "far.jsonl").write_text('{"sku": 1e400}')
    assert "inf is no id; expected a text or a number." in rows_of(config_of(folder), "items", folder / "far.jsonl").refused[0]


def test_a_file_that_is_no_text_or_nested_without_end_is_named(folder: Path) -> None:
    for name in ("bad.jsonl", "bad.txt"):
        (folder / name).write_bytes(b"i1\n\xff")
        done = run(folder, "items", "delete", str(folder / name))
        assert done.exit_code == 2
        assert "the byte 0xFF at offset 3 is not UTF-8. Save it as UTF-8; nothing was changed." in done.output.replace("\n", "")
    (folder / "deep.jsonl").write_text('{"sku": ' + "[" * 50_000 + "]" * 50_000 + "}")
    assert "line 1 is not JSON" in run(folder, "items", "upsert", str(folder / "deep.jsonl")).output


def test_rules_of_a_file_are_set_shown_and_cleared(folder: Path) -> None:
    (folder / "rules.yaml").write_text(
        "blocks: [{column: item_id, values: [i2, 7]}]\nnovelty: {weight: 0.5}\npins: [{item_id: 242, place: 1}]\n"
    )
    assert "Live rules 1 are in the store." in run(folder, "rules", "set", str(folder / "rules.yaml")).output
    shown = run(folder, "rules", "show", "-s", "rules.blocks=[{column: colour, values: [red]}]").output
    assert "# rules of the configuration; live rules 1 lie over it" in shown
    assert "  - {column: item_id, values: [i2, 7]}  # live" in shown
    assert "  - {column: colour, values: [red]}  # configuration" in shown
    assert "  - {item_id: '242', place: 1}  # live" in shown
    assert "  weight: 0.5  # live" in shown
    assert "  half_life_h: 720.0  # configuration" in shown
    assert "are taken back (2)" in run(folder, "rules", "clear").output
    shown = run(folder, "rules", "show").output
    assert "# live" not in shown
    assert "blocks: []" in shown


def test_a_file_of_faulty_rules_changes_nothing_and_says_where(folder: Path) -> None:
    wrong = folder / "rules.yaml"
    for text, words in {
        "blocks:\n- {column: brand, values: [x]}\n": f"{wrong}:1: blocks.0.column names 'brand', which no item column declares",
        "unwanted: 3\nblock: []\n": f"{wrong}:2: block is not a known key. Did you mean 'blocks'?",
        "new_items: {factor: .inf}\n": "a number is not finite",
        "- 1\n": str(wrong),
    }.items():
        wrong.write_text(text)
        done = run(folder, "rules", "set", str(wrong))
        assert done.exit_code == 2
        assert words in " ".join(done.output.replace("\n", "").split()), done.output
    assert "# live" not in run(folder, "rules", "show").output
