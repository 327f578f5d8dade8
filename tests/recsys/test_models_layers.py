"""Tables: widths, shared initial numbers, pooling by hand, and what an absent field gives."""

import pytest
import torch

from recsys.errors import ConfigError
from recsys.features.schema import Field
from recsys.models.layers import INIT_BLOCK, FieldEmbeddings, Table, init_rows, mlp, tables_of


def field(name: str, shape: str = "one", *, table: str = "t", size: int = 5, dim: int = 2, width: int = 1, combiner: str = "mean") -> Field:
    return Field(name, "user", shape, table, size, dim, width, combiner)  # type: ignore[arg-type]


def test_a_row_holds_embedding_first_order_weights_of_each_user_of_the_table_and_padding_to_four():
    fields = [field("a"), field("h", "sequence", width=3), field("b", table="u", dim=16)]
    tables = tables_of(fields, linear=True)
    assert [(t.name, t.dim, t.linear, t.width) for t in tables] == [("t", 2, ("a", "h"), 4), ("u", 16, ("b",), 20)]
    assert [t.width for t in tables_of(fields, embed=False, linear=True)] == [4, 4]
    assert [t.width for t in tables_of(fields)] == [4, 16]


def test_fields_that_share_a_table_must_agree_on_it():
    with pytest.raises(ConfigError, match=r"share table 't' but disagree.*a \(5 x 2\), b \(6 x 2\)"):
        tables_of([field("a"), field("b", size=6)])


def test_initial_numbers_depend_on_seed_and_table_alone_so_every_sharding_draws_the_same():
    table = Table("t", INIT_BLOCK + 100, 3, ())
    whole = init_rows(table, 0, table.size, std=0.1, seed=3)
    a, b = INIT_BLOCK - 7, INIT_BLOCK + 9
    torch.testing.assert_close(init_rows(table, a, b, std=0.1, seed=3), whole[a:b], rtol=0, atol=0)
    assert not torch.equal(init_rows(table, a, b, std=0.1, seed=4), whole[a:b])
    assert whole[:, 3].abs().max() == 0, "padding starts at zero and has no gradient"
    assert abs(float(whole[:, :3].std()) - 0.1) < 0.005


def test_pooling_by_hand_padding_is_skipped_and_an_empty_bag_is_zero():
    fields = [
        field("one"),
        field("mean", "bag", width=3),
        field("sum", "bag", width=3, combiner="sum"),
        field("each", "sequence", width=3, combiner="none"),
    ]
    layer = FieldEmbeddings(fields, tables_of(fields), std=0.0, seed=0)
    with torch.no_grad():
        layer.tables["t"][:] = torch.arange(5.0)[:, None].expand(5, 4)
        layer.tables["t"][0] = 100.0
    bags = torch.tensor([[0, 2, 4], [0, 0, 0]])
    out = layer({"one": torch.tensor([3, 0]), "mean": bags, "sum": bags, "each": bags}, 2)
    assert out.pooled["one"][:, 0].tolist() == [3.0, 100.0], "a missing `one` value is looked up: row 0 is learned"
    assert out.pooled["mean"][:, 0].tolist() == [3.0, 0.0]
    assert out.pooled["sum"][:, 0].tolist() == [6.0, 0.0]
    assert out.sequence["each"][:, :, 0].tolist() == [[0.0, 2.0, 4.0], [0.0, 0.0, 0.0]]
    assert out.mask["each"].tolist() == [[False, True, True], [False, False, False]]


def test_a_field_that_was_not_given_is_zero():
    fields = [field("a"), field("b")]
    layer = FieldEmbeddings(fields, tables_of(fields), std=1.0, seed=0)
    out = layer({"b": torch.tensor([1, 2, 3])}, 3)
    assert out.pooled["a"].tolist() == [[0.0] * 4] * 3
    assert out.values.shape == (3, 8)


def test_no_hidden_widths_make_one_linear_layer():
    assert len(mlp(3, (), 2)) == 1
    assert [type(m).__name__ for m in mlp(3, (4,), 2, dropout=0.1)] == ["Linear", "ReLU", "Dropout", "Linear"]
