"""Tables that grow by id: known ids keep their rows wherever they are now, new ones begin as the unknown row they were served as."""

from collections import Counter

import numpy as np
import torch
from safetensors.torch import save_file

from recsys.core import id_hash
from recsys.features.encoders import Table
from recsys.features.schema import Field
from recsys.growing import grown, new_ids, rows_of


def table(*counts: str, buckets: int = 2) -> Table:
    return Table.fit(Counter("".join(counts)), min_count=1, buckets=buckets)


def test_rows_go_by_id_and_new_ids_begin_in_their_hash_bucket():
    old, new = table("aab"), table("bbbcca")  # old rows: 0 missing, 1 2 unknown, a 3, b 4; new: b 3, c 4, a 5
    bucket = 1 + id_hash("c") % 2
    assert rows_of(old, new).tolist() == [0, 1, 2, 4, bucket, 3]
    assert new_ids(old, new) == 1
    assert new_ids(new, old) == 0


def test_weights_of_every_part_are_taken_over(tmp_path):
    old, new = table("aab"), table("bbbcca")
    weight = torch.arange(10.0).reshape(5, 2)
    save_file(
        {"embeddings.tables.item_id": weight, "embeddings.tables.hour": torch.ones(3, 2), "mlp.0.weight": torch.eye(2)},
        tmp_path / "model.safetensors",
    )
    fields = [Field("item_id", "item", "one", "item_id", new.size, 2), Field("hour", "context", "one", "hour", 3, 2)]
    found = grown(tmp_path, {"item_id": old}, {"item_id": new}, fields)
    assert isinstance(found, dict)
    np.testing.assert_array_equal(found["embeddings.tables.item_id"][3], weight[4])  # b
    np.testing.assert_array_equal(found["embeddings.tables.item_id"][5], weight[3])  # a
    np.testing.assert_array_equal(found["mlp.0.weight"], torch.eye(2))


def test_what_has_no_ids_to_go_by_is_refused_with_a_reason(tmp_path):
    old, new = table("aab"), table("bbbcca")
    save_file({"embeddings.tables.item_id": torch.zeros(5, 2), "embeddings.tables.hour": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    fields = [Field("item_id", "item", "one", "item_id", new.size, 2), Field("hour", "context", "one", "hour", 7, 2)]
    assert grown(tmp_path, {"item_id": old}, {"item_id": new}, fields) == (
        "table 'hour' has 7 rows, the serving version's 3, and its rows have no ids"
    )
    other, fields[1] = table("bbbcca", buckets=1), Field("hour", "context", "one", "hour", 3, 2)
    assert grown(tmp_path, {"item_id": old}, {"item_id": other}, fields) == "table 'item_id' has 1 hash buckets, the serving version's 2"
