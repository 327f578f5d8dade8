"""Filters: from JSON to conditions, and from conditions to the items that pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.core import Vocabulary
from recsys.data.columns import ColumnConfig
from recsys.errors import BundleError, RequestError
from recsys.features.catalogue import Catalogue
from recsys.features.filters import Filters

COLUMNS = {
    "genres": ColumnConfig(kind="tags", separator="|"),
    "colour": ColumnConfig(kind="category", min_count=5),
    "title": ColumnConfig(kind="text"),
    "price": ColumnConfig(kind="number", max_value=1000),
    "picture": ColumnConfig(kind="vector", dim=2),
}
FRAME = pd.DataFrame(
    {
        "genres": ["Comedy|Drama", "Comedy", "Horror", None, "Drama|Horror|Drama"],
        "colour": ["red", "blue", None, "007", "red"],
        "title": ["Toy Story", "A toy's story", "Heat", None, "The Story"],
        "price": [5, "20", None, 12.5, 99_999],
        "picture": ["1,0", [0, 1], None, "1", "0,0"],
    }
)
ITEMS = Vocabulary(["a", "b", "c", "d", "e"])


@pytest.fixture(scope="module")
def filters() -> Filters:
    return Filters(Catalogue.of(COLUMNS, FRAME, 5), ITEMS)


def passing(filters: Filters, asked: dict[str, Any]) -> str:
    """The ids that pass, in one word."""
    wanted = filters.parse(asked)
    return "".join(ITEMS.outside(filters.mask(wanted).rows)) if wanted else "abcde"


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        ({}, "abcde"),
        ({"genres": "Comedy"}, "ab"),
        ({"genres": ["Comedy", "Horror"]}, "abce"),
        ({"genres": {"all": ["Drama", "Horror"]}}, "e"),
        ({"genres": {"none": ["Comedy"]}}, "cde"),  # d has no genre at all
        ({"genres": {"any": ["Drama"], "none": ["Horror"]}}, "a"),
        ({"genres": []}, ""),
        ({"genres": ["Western"]}, ""),  # no item has it: nothing passes, and that is an answer
        ({"genres": ["Western", "Horror"]}, "ce"),
        ({"colour": "red"}, "ae"),  # below min_count for models, not for filters
        ({"colour": ["007"]}, "d"),
        ({"colour": 7}, ""),
        ({"price": {"min": 5}}, "abd"),  # e is out of range, c has none
        ({"price": {"min": 5.5, "max": 20}}, "bd"),
        ({"price": [5, 12.5]}, "ad"),
        ({"price": {"none": [5]}}, "bcde"),
        ({"title": "story"}, "abe"),
        ({"title": "toy STORY"}, "ab"),
        ({"title": {"all": ["story", "the"]}}, "e"),
        ({"title": "?!"}, ""),
        ({"item_id": ["c", "nobody", "a"]}, "ac"),
        ({"item_id": {"none": ["c"]}, "genres": "Horror"}, "e"),
        ({"colour": "red", "price": {"max": 5}}, "a"),
    ],
)
def test_what_passes(filters, asked, ids):
    assert passing(filters, asked) == ids


@pytest.mark.parametrize(
    ("asked", "code", "field", "told"),
    [
        (
            {"genre": "x"},
            "unknown_field",
            "filter.genre",
            "'filter.genre' is no item column that can be filtered by. Did you mean 'genres'? Known",
        ),
        ({"zzz": "x"}, "unknown_field", "filter.zzz", "Known: item_id, genres, colour, title, price."),
        ({"picture": "x"}, "unknown_field", "filter.picture", "no item column that can be filtered by"),
        ({"genres": {"some": ["x"]}}, "unknown_field", "filter.genres.some", "a key 'some'; known: any, all, none, min, max."),
        ({"genres": {}}, "empty_list", "filter.genres", "asks nothing"),
        ({"genres": {"min": 1}}, "wrong_type", "filter.genres", "holds no numbers, so it has no min or max"),
        ({"price": {"all": [1]}}, "wrong_type", "filter.price", "holds one number per item"),
        ({"price": ["cheap"]}, "wrong_type", "filter.price.any", "expected a number, got 'cheap'"),
        ({"price": {"min": True}}, "wrong_type", "filter.price.min", "expected a number, got 'True'"),
        ({"price": {"min": 2, "max": 1}}, "invalid_value", "filter.price", "min 2 is above max 1"),
        ({"genres": [None]}, "wrong_type", "filter.genres.any", "expected texts or numbers, got 'None'"),
        ({"genres": [["x"]]}, "wrong_type", "filter.genres.any", "expected texts or numbers"),
        ({"item_id": ["x"] * 1_001}, "too_many_items", "filter.item_id.any", "has 1001 values; at most 1000 are taken"),
        ({"title": ["x"] * 21}, "too_many_items", "filter.title.any", "has 21 values; at most 20 are taken"),
        ({f"c{n}": 1 for n in range(17)}, "too_many_items", "filter", "has 17 columns; at most 16 are taken"),
    ],
)
def test_what_is_refused_and_why(filters, asked, code, field, told):
    with pytest.raises(RequestError) as caught:
        filters.parse(asked)
    assert (caught.value.code, caught.value.field, caught.value.status) == (code, field, 422)
    assert told in str(caught.value)


def test_equal_filters_share_one_bitmap_and_a_batch_mixes_them(filters):
    a, b = filters.parse({"genres": ["Comedy", "Drama"]}), filters.parse({"genres": ["Drama", "Comedy", "Drama"]})
    assert a == b
    allowed = filters.allowed([a, None, b, filters.parse({"price": {"max": 6}})])
    assert len(allowed.masks) == 2
    assert allowed.of.tolist() == [0, -1, 0, 1]
    assert filters.mask(a) is filters.mask(b)


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        ({"genres": "Comedy"}, ""),
        ({"genres": {"all": ["Comedy"], "none": ["Drama"]}}, ""),
        ({"genres": []}, ""),
        ({"price": {"min": 5}}, ""),
        ({"price": {"max": 5, "none": [3]}}, ""),
        ({"genres": {"none": ["Comedy"]}}, "abcde"),
        ({"price": {"none": [5]}}, "abcde"),
    ],
)
def test_of_a_column_that_another_version_has_no_item_holds_anything(filters, asked, ids):
    """Asked for, nothing passes; forbidden, everything does: a block in newer rules must not empty the pages of an older version."""
    other = Filters(Catalogue(5), ITEMS)
    assert "".join(ITEMS.outside(other.mask(filters.parse(asked)).rows)) == ids


def test_a_loaded_catalogue_filters_alike(filters, tmp_path: Path):
    Catalogue.of(COLUMNS, FRAME, 5).save(tmp_path)
    loaded = Filters(Catalogue.load(tmp_path), ITEMS)
    for asked in ({"genres": "Comedy"}, {"price": {"min": 6}}, {"title": "story"}, {"colour": "007"}):
        assert passing(loaded, asked) == passing(filters, asked)
    (tmp_path / "column0.codes.npy").unlink()
    with pytest.raises(BundleError, match=r"cannot be read .* Restore the bundle or publish it again"):
        Catalogue.load(tmp_path)


TAGS = st.lists(st.lists(st.sampled_from("xyz"), max_size=3), min_size=1, max_size=12)


@given(cells=TAGS, wanted=st.lists(st.sampled_from("xyzw"), max_size=3), unwanted=st.lists(st.sampled_from("xyzw"), max_size=2))
def test_a_bitmap_is_what_sets_say(cells, wanted, unwanted):
    frame = pd.DataFrame({"tags": [" ".join(c) for c in cells]})
    items = Vocabulary([str(i) for i in range(len(cells))])
    filters = Filters(Catalogue.of({"tags": ColumnConfig(kind="tags")}, frame, len(cells)), items)
    asked = filters.parse({"tags": {"any": wanted, "none": unwanted}})
    assert asked is not None
    expected = [bool(set(c) & set(wanted)) and not set(c) & set(unwanted) for c in cells]
    np.testing.assert_array_equal(filters.mask(asked).items, expected)
