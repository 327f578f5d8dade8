"""A column says what it holds; parameters that its kind does not take are refused by name."""

import pytest
from pydantic import ValidationError

from recsys.data.columns import ColumnConfig


def test_a_word_is_short_for_its_kind():
    assert ColumnConfig.model_validate("category") == ColumnConfig(kind="category")


def test_a_column_may_be_called_otherwise_in_the_file():
    assert ColumnConfig(kind="text").source("title") == "title"
    assert ColumnConfig(kind="text", column="movie_title").source("title") == "movie_title"


def test_separators_default_to_a_space_and_to_a_comma_for_vectors():
    assert ColumnConfig(kind="tags").splits_on == " "
    assert ColumnConfig(kind="tags", separator="|").splits_on == "|"
    assert ColumnConfig(kind="vector", dim=3).splits_on == ","


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "id", "edges": [1, 2]}, "'edges' is not a parameter of kind 'id'; it belongs to bins"),
        ({"kind": "number", "min_count": 3}, "'min_count' is not a parameter of kind 'number'"),
        ({"kind": "bins"}, "kind 'bins' needs 'edges', such as"),
        ({"kind": "bins", "edges": [2, 1]}, "edges must increase, got [2.0, 1.0]"),
        ({"kind": "vector"}, "kind 'vector' needs 'dim'"),
        ({"kind": "number", "min_value": 5, "max_value": 1}, "min_value 5 is above max_value 1"),
        ({"kind": "hour", "timezone": "Mars/Olympus"}, "unknown timezone 'Mars/Olympus'; give an IANA name"),
        ({"kind": "colour"}, "Input should be 'id'"),
        ({"kind": "id", "colour": 1}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_declaration_is_answered_with_what_is_right(given, said):
    with pytest.raises(ValidationError) as fault:
        ColumnConfig.model_validate(given)
    assert said in str(fault.value)
