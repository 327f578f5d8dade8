"""The KuaiRand slice by configuration alone (skipped where the data is not at hand)."""

import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from pyarrow import csv

from recsys.config import load as load_config
from recsys.data.events import Dataset, load
from recsys.data.sources import DataConfig
from recsys.data.split import SplitConfig

FOLDER = Path(os.environ.get("KUAIRAND_DIR") or Path(__file__).parents[3] / "shared/data/kuairand_pure").absolute()
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the KuaiRand slice is not in {FOLDER}; set KUAIRAND_DIR")

CONFIG = """
interactions: {path: log_20220425_20220506.parquet, format: kuairand, context: {tab: category, hour: {kind: hour, timezone: Asia/Shanghai}}}
labels: {click: {column: is_click}, long_view: {column: long_view}, like: {column: is_like}}
impressions: true
items:
  path: video_features_basic_pure.parquet
  format: kuairand
  columns: {author: {kind: id, column: author_id}, tag: {kind: tags, separator: ","}, duration: {kind: number, column: video_duration, scale: log}}
users: {path: user_features_pure.parquet, format: kuairand, columns: {active: {kind: category, column: user_active_degree}}}
history: {path: history_before_20220425.parquet, user: user_id, items: watch_seq}
"""


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load(DataConfig.model_validate(yaml.safe_load(CONFIG)), FOLDER, keep=("date",))


def test_rows_are_accounted_for(dataset):
    assert dataset.account.rows() == [("rows read", 198_895), ("dropped: duplicate", 5_312), ("kept", 193_583)]


def test_every_user_and_video_of_the_tables_has_a_row(dataset):
    log = dataset.interactions
    assert (log.n_users, log.n_items) == (27_285, 7_583)
    assert (len(dataset.users), len(dataset.items)) == (27_285, 7_583)
    assert dataset.users["active"].notna().all()
    assert log.labels["click"].mean() == pytest.approx(0.44925, abs=1e-5)
    assert (np.diff(log.past.indptr) > 0).sum() > 26_000
    assert np.diff(log.past.indptr).max() == 50


def test_the_test_days_hold_the_rows_of_the_protocol_and_train_holds_nothing_later(dataset):
    log = dataset.interactions
    split = SplitConfig(column="date", valid_from=20220504, test_from=20220505).split(log)
    assert split.test.sum() == 26_651
    # 765 and 150 rows carry the earlier date at a later time: the log's days turn over before midnight.
    assert (split.train.sum(), split.valid.sum()) == (149_732 - 765, 17_200 - 150)
    assert log.time[split.train].max() < log.time[split.valid].min()
    assert log.time[split.valid].max() < log.time[split.test].min()


def test_the_published_csv_files_are_read_by_the_configuration_that_names_them(dataset, tmp_path, monkeypatch):
    rows = pq.read_table(FOLDER / "log_20220425_20220506.parquet")
    early = pc.less(rows["date"], 20220501)
    for name, part in (("4_08_to_4_21", rows.filter(early)), ("4_22_to_5_08", rows.filter(pc.invert(early)))):
        csv.write_csv(part, tmp_path / f"log_standard_{name}_pure.csv")
    for name in ("video_features_basic_pure", "user_features_pure"):
        csv.write_csv(pq.read_table(FOLDER / f"{name}.parquet"), tmp_path / f"{name}.csv")
    monkeypatch.setenv("KUAIRAND_DIR", str(tmp_path))
    config = load_config([Path(__file__).parents[2] / "configs" / "kuairand_csv.yaml"])
    found = load(config.data, config.base, keep=("date",))
    same = dataset.interactions
    assert found.account.rows() == dataset.account.rows()
    for column in ("user", "item"):
        np.testing.assert_array_equal(
            getattr(found.interactions, f"{column}s").outside(getattr(found.interactions, column)),
            getattr(same, f"{column}s").outside(getattr(same, column)),
        )
    np.testing.assert_array_equal(found.interactions.time, same.time)
    degrees = dict(zip(found.interactions.users.ids.to_pylist(), found.users["user_active_degree"], strict=True))
    assert degrees == dict(zip(same.users.ids.to_pylist(), dataset.users["active"], strict=True))
