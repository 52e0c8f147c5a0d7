from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesdl.data import RowIds
from bayesdl.data.rows import fingerprint, row_index
from bayesdl.errors import DataError

positions = st.lists(st.integers(0, 19), max_size=30)


def as_pairs(rows):
    return [(rows.origins[s], i) for s, i in zip(rows.source.tolist(), rows.index.tolist(), strict=True)]


def both(a, b):
    """Rows of two sources in the order of two lists; even positions of the second list come from source "b"."""
    return RowIds.concat([RowIds.of("a", 20).take(a), RowIds.of("b", 20).take(b)])


@given(positions, positions, positions, positions)
def test_overlap_and_minus_are_those_of_python_sets(a, b, c, d):
    ours, theirs = both(a, b), both(c, d)
    assert ours.overlap(theirs) == len(set(as_pairs(ours)) & set(as_pairs(theirs)))
    assert as_pairs(ours.minus(theirs)) == [pair for pair in as_pairs(ours) if pair not in set(as_pairs(theirs))]
    assert ours.isin(theirs).tolist() == [pair in set(as_pairs(theirs)) for pair in as_pairs(ours)]


@given(positions, positions)
def test_json_round_trip_keeps_order_and_repeats(a, b):
    rows = both(a, b)
    again = RowIds.from_json(json.loads(json.dumps(rows.to_json())))
    assert again == rows
    assert as_pairs(again) == as_pairs(rows)


@given(positions, positions)
def test_unique_gives_the_distinct_rows_and_the_way_back(a, b):
    rows = both(a, b)
    distinct, place = rows.unique()
    assert len(distinct) == len(set(as_pairs(rows)))
    assert distinct.take(place) == rows


@given(positions)
def test_the_order_of_origins_does_not_matter(a):
    one = RowIds.concat([RowIds.of("a", 20), RowIds.of("b", 20)])
    other = RowIds.concat([RowIds.of("b", 20), RowIds.of("a", 20)])
    shifted = [(position + 20) % 40 for position in a]
    assert one.take(a) == other.take(shifted)
    assert one.overlap(other) == 40


def test_json_is_short_for_stretches():
    value = RowIds.of("abc", 10_000).to_json()
    assert value == {"origins": ["abc"], "rows": [[0, "0-9999"]]}
    assert RowIds.of("abc", 9).take([4, 5, 6, 1, 8, 8]).to_json()["rows"] == [[0, "4-6,1,8,8"]]


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"origins": ["a"], "rows": [[0, "x"]]},
        {"origins": ["a"], "rows": [[3, "0-2"]]},
        {"origins": ["a"]},
        {"origins": ["a"], "rows": [[0, "5-2"]]},
        {"origins": ["a"], "rows": 7},
        {"origins": ["a"], "rows": [[0, 3]]},
    ],
)
def test_damaged_json_is_an_error(value):
    with pytest.raises(DataError, match="Not the row identities"):
        RowIds.from_json(value)


def test_equality_looks_at_source_and_order():
    rows = RowIds.of("a", 3)
    assert rows == RowIds.of("a", 3)
    assert rows != RowIds.of("b", 3)
    assert rows != rows.take([1, 0, 2])
    assert rows != RowIds.of("a", 4)
    assert rows != "a"


def test_origin_names_the_source():
    assert RowIds.of("a", 3).origin == "a"
    assert both([1], [2]).origin == "a+b"
    assert repr(RowIds.of("0123456789abcdef", 3)) == "RowIds(3 rows of 01234567)"
    assert len(RowIds.concat([])) == 0


def test_fingerprint_sees_values_shape_dtype_and_order():
    x = torch.arange(6.0)
    assert fingerprint(x) == fingerprint(x.clone())
    assert fingerprint(x.reshape(2, 3).T) == fingerprint(x.reshape(2, 3).T.contiguous())
    others = [x.reshape(2, 3), x.double(), x.flip(0), x + 1e-7 * torch.tensor([0, 1, 0, 0, 0, 0.0])]
    assert len({fingerprint(t) for t in [x, *others]}) == 5


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (2, [2]),
        (-1, [4]),
        (slice(1, None, 2), [1, 3]),
        ([3, 3, 0], [3, 3, 0]),
        (np.array([True, False, True, False, True]), [0, 2, 4]),
        (torch.tensor([-5, 4]), [0, 4]),
        (torch.tensor([False] * 5), []),
        ([], []),
        (np.array([1, 2], np.uint8), [1, 2]),
    ],
)
def test_row_index_takes_every_usual_form(index, expected):
    assert row_index(index, 5).tolist() == expected
    assert row_index(index, 5).dtype == torch.int64


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([5], "Row 5 does not exist.*5 rows, 0 to 4"),
        ([-6], "Row -6 does not exist"),
        ([True, False], "2 entries for 5 rows"),
        ([0.5], "whole numbers or a boolean mask"),
        ([[1]], "one dimension"),
        (["a"], "whole numbers"),
        ("train", "whole numbers"),
    ],
)
def test_row_index_says_what_is_wrong(index, words):
    with pytest.raises(DataError, match=words):
        row_index(index, 5)
