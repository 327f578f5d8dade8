"""The commands `impressions` and `skew` on a recommender's own workdir."""

import shutil

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cluster import impressions_report
from recsys.errors import DataError
from recsys.impressions import Impression, table_of
from tests.live_events import Told, archive
from tests.small import Small, config_of


@pytest.fixture
def config(small: Small, tmp_path):
    """The small recommender with a page of its version, one of a version that is gone, and a click on the first."""
    shutil.copytree(small.config.base, tmp_path, dirs_exist_ok=True)
    found = config_of(tmp_path)
    at = 1_700_100_000
    values = [("item_n", [1.0, 2.0])]
    pages = [
        Impression(
            name,
            "u3",
            at * 1000,
            float(at),
            version,
            "",
            None,
            "{}",
            [],
            ["i1", "i3"],
            [1, 2],
            [1.0, 1.0],
            [0.5, 0.4],
            1.0,
            None,
            None,
            [],
            values,
        )
        for name, version in (("r1", small.version), ("r2", "v000099-00000000"))
    ]
    folder = tmp_path / "state" / "impressions"
    folder.mkdir()
    pq.write_table(table_of(pages), folder / "1.parquet")
    archive(tmp_path / "state" / "events", [Told("u3", "i3", at + 10, request_id="r1")])
    return found


def test_pages_and_clicks_become_examples(config, tmp_path):
    told = Console(record=True, width=120)
    n = impressions_report.join(config, told, output=tmp_path / "e.parquet", folder=None, events=None, window_h=1.0)
    assert n == 4
    rows = pq.read_table(tmp_path / "e.parquet").to_pylist()
    assert [(r["request_id"], r["item_id"], r["label"]) for r in rows] == [
        ("r1", "i1", 0),
        ("r1", "i3", 1),
        ("r2", "i1", 0),
        ("r2", "i3", 0),
    ]
    assert "positives" in told.export_text()


def test_a_version_without_aggregates_and_one_that_is_gone_are_told(config):
    told = Console(record=True, width=160)
    with pytest.raises(DataError, match="None of 1 logged pages holds a feature value"):
        impressions_report.skew(config, told, folder=None, events=None)
    text = told.export_text()
    assert "v000099-00000000 is not in the registry any more" in text
    assert "0 pages compared, 1 without values: 0 mismatches" in text


def test_no_impressions_is_a_sentence(config, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no impressions"):
        impressions_report.skew(config, Console(), folder=str(tmp_path / "none"), events=None)
