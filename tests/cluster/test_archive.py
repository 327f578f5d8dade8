"""Parquet of a partition: a quiet log does not leave a file a minute for ever, and nobody notices how files are merged."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from cluster.archive import KEEP_S, MERGE_AT, Archive, ArchivedRow
from cluster.ingest import Ingest
from recsys.data import event_files
from recsys.features.store import NewEvent
from tests.cluster.consumers import archived_all, config_of, each_is_in_parquet_once, load, same_as_the_batch_road, some_events, told


def rows(first: int, n: int) -> list[ArchivedRow]:
    return [ArchivedRow(NewEvent("u", f"i{k}", "click", k, None, f"e{k}", None, None), k, 1_000 + k) for k in range(first, first + n)]


def filled(root: Path, files: int, each: int = 2) -> Archive:
    """So many files of one partition; entry numbers with a dead letter between the files."""
    made = Archive(str(root), 0)
    made.take(1)
    for f in range(files):
        first = f * (each + 1)
        made.append(rows(first, each), f"{first}-0", first + each + 1)
    return made


def on_disk(root: Path) -> set[str]:
    return {path.name for path in (root / "p0000").iterdir()} - {"manifest.json"}


def grown_old(root: Path, names: set[str]) -> None:
    for name in names:
        os.utime(root / "p0000" / name, (time.time() - KEEP_S - 1,) * 2)


def merged(made: Archive, most_rows: int = 1_000) -> None:
    run = made.mergeable(most_rows)
    made.put_for(run, made.merge(run))


def test_only_the_newest_files_that_fit_into_one_are_merged_and_only_where_they_are_many(tmp_path):
    few = filled(tmp_path / "few", MERGE_AT - 1)
    assert few.mergeable(1_000) == ()
    many = filled(tmp_path / "many", MERGE_AT + 3)
    assert many.mergeable(2 * MERGE_AT - 1) == ()
    assert many.mergeable(2 * MERGE_AT) == many.manifest.files[3:]
    before, n, written = event_files.read(str(tmp_path / "many")), many.manifest.n, many.manifest.files[-1].written
    merged(many, 2 * MERGE_AT)
    assert [f.name for f in many.manifest.files][2:] == ["000000000006-000000000008.parquet", "000000000009-000000000104.parquet"]
    assert (many.manifest.n, many.manifest.files[-1].written) == (n, written)
    assert event_files.read(str(tmp_path / "many")).equals(before)
    assert event_files.read(str(tmp_path / "many"), {0: 10})["position"].to_pylist()[:2] == [10, 12]
    assert event_files.manifests(str(tmp_path / "many"))[0] == many.manifest


def test_who_reads_by_the_manifest_of_before_finds_its_files_for_an_hour(tmp_path):
    made = filled(tmp_path, MERGE_AT)
    old, small = made.manifest, on_disk(tmp_path)
    fs, path = event_files.opened(str(tmp_path))
    reader = event_files.pages(fs, path, old, 0)
    seen = [next(reader)]
    merged(made)
    Archive(str(tmp_path), 0).take(2)  # another owner comes meanwhile
    seen += list(reader)
    assert sum(len(table) for table in seen) == 2 * MERGE_AT
    assert small < on_disk(tmp_path)
    one = on_disk(tmp_path) - small
    grown_old(tmp_path, one)
    for f in range(MERGE_AT, 2 * MERGE_AT):
        made.append(rows(3 * f, 2), f"{3 * f}-0", 3 * f + 3)
    merged(made)
    assert on_disk(tmp_path) & (small | one) == one, "the first ones were merged more than an hour ago, their heir just now"
    assert [f.rows for f in made.manifest.files] == [4 * MERGE_AT]


@pytest.mark.parametrize("before_the_manifest", [True, False])
def test_a_kill_while_files_are_merged_loses_nothing_and_leaves_nothing(tmp_path, before_the_manifest):
    made = filled(tmp_path, MERGE_AT)
    rows_before, small = event_files.read(str(tmp_path)), on_disk(tmp_path)
    run = made.mergeable(1_000)
    one = made.merge(run)
    if not before_the_manifest:
        made.put_for(run, one)
    after = Archive(str(tmp_path), 0)
    manifest = after.take(2)
    assert event_files.read(str(tmp_path)).equals(rows_before)
    if before_the_manifest:
        assert on_disk(tmp_path) == small == {f.name for f in manifest.files}
    else:
        grown_old(tmp_path, {one.name})
        after.take(3)
        assert on_disk(tmp_path) == {one.name} == {f.name for f in manifest.files}


def test_a_manifest_that_cannot_be_written_does_not_count(tmp_path, monkeypatch):
    """The log is trimmed behind what the manifest in memory says: it must not be ahead of the one on disk."""
    made = filled(tmp_path, 2)
    held = made.manifest

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cluster.archive._spill", full)
    with pytest.raises(OSError, match="No space left"):
        made.append(rows(6, 2), "6-0", 8)
    assert made.manifest == held == event_files.manifests(str(tmp_path))[0]


def test_a_consumer_keeps_its_files_few(url, tmp_path, monkeypatch):
    """At most 5 rows a file, merged from 4 files on: four of one row become one, which has no room for four more."""
    monkeypatch.setattr("cluster.archive.MERGE_AT", 4)
    config = config_of(tmp_path, partitions=1, parquet_rows=5)
    events = some_events(14)

    async def scenario():
        ingest = Ingest(config, url, load)
        for one in events:
            await told(config, url, [one])
            await archived_all(ingest)
        files = ingest.held.owned[0].archive.manifest.files
        await same_as_the_batch_road(config, url, tmp_path)
        await ingest.close()
        return [f.rows for f in files]

    assert asyncio.run(scenario()) == [4, 4, 4, 1, 1]
    each_is_in_parquet_once(tmp_path, events)
