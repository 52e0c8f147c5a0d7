from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesdl.data import Dataset, Split, as_dataset
from bayesdl.errors import DataError

N = 12


@pytest.fixture
def data():
    return make()


def make(n=N, offset=0.0, splits=None):
    x = np.stack([np.arange(n) + offset, np.arange(n) ** 2], axis=1)
    return Dataset.from_arrays(x, x[:, 0] * 10, name="numbers", splits=splits)


def still_aligned(data, offset=0.0):
    """Each row holds its own identity as a value, so a row that lost it would show."""
    index = data.rows.index.double()
    assert torch.equal(data.x[:, 0], index + offset)
    assert torch.equal(data.y, 10 * (index + offset))


# -- making one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        torch.as_tensor,
        lambda v: v.tolist(),
        lambda v: torch.as_tensor(v).requires_grad_(),
        pd.DataFrame,
        lambda v: list(torch.as_tensor(v)),
        lambda v: np.asarray(v, np.longdouble),
        lambda v: np.ma.array(v),
        lambda v: np.asfortranarray(v),
    ],
)
def test_every_array_like_gives_the_same_data_and_the_same_rows(convert):
    x, y = np.arange(8.0).reshape(4, 2), np.arange(4.0)
    data = Dataset.from_arrays(convert(x), y)
    assert data.x.tolist() == x.tolist()
    assert data.x.dtype == data.y.dtype == torch.float64
    assert not data.x.requires_grad
    assert data.rows == Dataset.from_arrays(x, y).rows


def test_the_data_are_a_copy():
    x, y = np.zeros((3, 2)), torch.arange(3.0, dtype=torch.float64)
    data = Dataset.from_arrays(x, y)
    x[0, 0] = y[0] = 7
    assert data.x[0, 0] == data.y[0] == 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.uint8, torch.float32),
        (np.float32, torch.float32),
        (np.float16, torch.float32),
        (np.float64, torch.float64),
        (np.int64, torch.float64),
        (bool, torch.float32),
    ],
)
def test_images_stay_float32_where_that_is_exact(dtype, expected):
    assert Dataset.from_arrays(np.ones((2, 1, 3, 3), dtype), [0.0, 1.0]).x.dtype == expected


def test_bfloat16_and_narrow_tables_become_float64():
    assert Dataset.from_arrays(torch.ones(2, 3, dtype=torch.bfloat16), [0.0, 1.0]).x.dtype == torch.float64
    assert Dataset.from_arrays(torch.ones(2, 3), [0.0, 1.0]).x.dtype == torch.float64


def test_names_come_from_a_table_that_has_them():
    frame = pd.DataFrame({"age": [1.0, 2.0], "bmi": [3, 4]})
    data = Dataset.from_arrays(frame, pd.Series([0.5, 1.5], name="risk"))
    assert (data.x_names, data.y_name) == (("age", "bmi"), "risk")
    assert make().x_names == ("x1", "x2")
    assert Dataset.from_arrays([1.0, 2.0], [1.0, 2.0]).x_names == ("x",)
    assert Dataset.from_arrays(np.ones((2, 1, 2, 2)), [1.0, 2.0]).x_names == ()


@pytest.mark.parametrize(
    ("y", "task", "classes", "codes"),
    [
        ([0.5, 1.0, 2.0], "regression", (), [0.5, 1.0, 2.0]),
        ([0, 1, 1], "classification", ("0", "1"), [0, 1, 1]),
        ([7, 3, 7], "classification", ("3", "7"), [1, 0, 1]),
        ([-1, 1, 1], "classification", ("-1", "1"), [0, 1, 1]),
        ([10, 9, 100], "classification", ("9", "10", "100"), [1, 0, 2]),
        ([True, False, True], "classification", ("False", "True"), [1, 0, 1]),
        (["dog", "cat", "dog"], "classification", ("cat", "dog"), [1, 0, 1]),
        (pd.Series(["dog", "cat", "dog"]), "classification", ("cat", "dog"), [1, 0, 1]),
        (np.array([2**64 - 1, 0, 0], np.uint64), "classification", ("0", str(2**64 - 1)), [1, 0, 0]),
        ([[0, 1], [1, 1], [0, 0]], "classification", ("0", "1"), [[0, 1], [1, 1], [0, 0]]),
        ([[0.5, 1], [1, 1], [0, 0]], "regression", (), [[0.5, 1], [1, 1], [0, 0]]),
        ([[1.5], [2.5], [3.5]], "regression", (), [1.5, 2.5, 3.5]),
    ],
)
def test_the_task_and_the_classes_are_read_off_the_target(y, task, classes, codes):
    data = Dataset.from_arrays(np.zeros((3, 1)), y)
    assert (data.task, data.classes, data.y.tolist()) == (task, classes, codes)
    assert data.y.dtype == (torch.float64 if task == "regression" else torch.int64)
    assert data.n_classes == len(classes)


def test_a_given_task_is_followed():
    x = np.zeros((3, 1))
    assert Dataset.from_arrays(x, [0, 4, 2], "regression").y.tolist() == [0.0, 4.0, 2.0]
    assert Dataset.from_arrays(x, [0.0, 4.0, 2.0], "classification").classes == ("0", "2", "4")
    assert Dataset.from_arrays(x, [True, False, True], "regression").y.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("y", "codes"),
    [(["b", "b"], [1, 1]), ([2, 2], [2, 2]), (["c", "a"], [2, 0]), ([0.0, 2.0], [0, 2]), ([True, False], [1, 0])],
)
def test_classes_known_in_advance_may_be_absent_from_y(y, codes):
    assert Dataset.from_arrays([[0.0], [1.0]], y, "classification", classes=["a", "b", "c"]).y.tolist() == codes


def test_numeric_classes_are_looked_up_as_labels_not_as_codes():
    assert Dataset.from_arrays([[0.0], [1.0]], [1, 5], classes=[1, 3, 5]).y.tolist() == [0, 2]


def test_constant_and_duplicate_columns_and_rows_are_kept():
    x = np.array([[1.0, 2.0, 2.0], [1.0, 3.0, 3.0], [1.0, 3.0, 3.0]])
    data = Dataset.from_arrays(x, [1.0, 2.0, 2.0])
    assert data.x.tolist() == x.tolist()
    assert data.rows.index.tolist() == [0, 1, 2]
    assert data.standardised().x[:, 0].tolist() == [0, 0, 0]


X = np.zeros((3, 2))
Y = np.arange(3.0)
HOLED = np.array([[0, 1], [2, np.nan], [np.inf, 3.0]])


@pytest.mark.parametrize(
    ("x", "y", "options", "words"),
    [
        (HOLED, Y, {}, r"x holds 2 values.*first is nan in row 1, column 1 \('x2'\).*missing='drop'"),
        (HOLED, Y, {"x_names": ["a", "bmi"]}, r"column 1 \('bmi'\)"),
        (np.ma.array(X, mask=[[0, 0], [0, 1], [0, 0]]), Y, {}, r"x holds 1 value that is .*row 1, column 1"),
        (X, [0, np.nan, 1], {}, r"y holds 1 value that is not finite.*row 1"),
        (X, [0, np.nan, 1], {"task": "classification"}, r"y holds 1 value that is not finite"),
        (X, [0, np.inf, 1], {"y_name": "price"}, r"y \('price'\) holds 1 value.*inf in row 1"),
        (np.full((2, 1, 2, 2), np.nan), Y[:2], {}, r"row 0, entry \(0, 0, 0\)"),
        (X, Y[:2], {}, "x has 3 rows and y has 2"),
        (np.zeros((0, 2)), [], {}, "no rows"),
        (np.zeros((3, 0)), Y, {}, "no columns"),
        ([], [], {}, "no rows"),
        (X, np.zeros((3, 0)), {}, "nothing to learn"),
        (3.0, Y, {}, "x is a single value"),
        (X, 3.0, {}, "y has 0 dimensions"),
        (X, np.zeros((3, 1, 1)), {}, "y has 3 dimensions"),
        (X.astype(complex), Y, {}, "complex.*real and the imaginary part"),
        (X, Y.astype(complex), {}, "complex"),
        (X, Y.astype(complex), {"task": "classification"}, "dtype complex128.*labels"),
        ([["a", "b"]] * 3, Y, {}, "text.*encode='onehot'"),
        (pd.DataFrame({"a": [1, 2, 3], "sex": ["m", "f", "m"]}), Y, {}, r"row 0, column 1 \('sex'\) holds 'm' \(str\)"),
        (np.array([[1, None]] * 3, dtype=object), Y, {}, "dtype object.*None"),
        (np.array([[1, 2]] * 3, dtype=object), Y, {}, "dtype object.*convert it to floats"),
        (np.array([["2020-01-01"]] * 3, dtype="datetime64[D]"), Y, {}, "dates"),
        (np.array([[1]] * 3, dtype="timedelta64[D]"), Y, {}, "time spans"),
        (np.array([[b"1"]] * 3), Y, {}, "bytes"),
        (np.zeros(3, dtype=[("a", float)]), Y, {}, "records"),
        ([[2**53 + 1], [0], [1]], Y, {}, r"9007199254740993, beyond 2\*\*53.*identifier"),
        ([[-(2**60)], [0], [1]], Y, {}, r"beyond 2\*\*53"),
        ([[10**30], [0], [1]], Y, {}, "dtype object.*oversized"),
        (X, [2**60, 1, 2], {"task": "regression"}, r"beyond 2\*\*53"),
        ([[1.0], [1.0, 2.0]], Y, {}, "x is not an array.*same length"),
        ([torch.zeros(1), torch.zeros(2)], Y, {}, "tensors of different shapes"),
        (scipy.sparse.eye_array(3), Y, {}, r"sparse matrix.*x\.toarray\(\)"),
        (torch.eye(3).to_sparse(), Y, {}, r"sparse tensor.*to_dense\(\)"),
        (X, [1, 1, 1], {}, "one class only.*'1'"),
        (X, ["a", "a", "a"], {}, "one class only.*'a'.*classes"),
        (X, [0.5, 1, 2], {"task": "classification"}, "0.5 at entry 0.*task='regression'"),
        (X, ["a", "b", "c"], {"task": "regression"}, "text, such as 'a'.*task='classification'"),
        (X, ["a", "", "c"], {}, "empty label in row 1"),
        (X, ["a", None, "c"], {}, r"entry 1 holds None \(NoneType\).*without a label"),
        (X, ["a", None, "c"], {"task": "regression"}, "that is task='classification'"),
        (X, [0.5, None, 1.5], {"task": "regression"}, "y has dtype object.*row 1 holds None"),
        (X, [0.5, None, 1.5], {}, "y has dtype object.*holds 0.5"),
        (X, [[0, 1], [2, 0], [1, 1]], {}, "2 columns of labels.*0 or 1"),
        (X, [[0, 0], [0, 0], [0, 0]], {}, "holds 0 everywhere"),
        (X, Y, {"task": "classificaton"}, "no task 'classificaton'. Did you mean 'classification'"),
        (X, Y, {"x_names": ["a"]}, "2 columns but 1 names"),
        (X, Y, {"x_names": ["a", "a"]}, "'a' stands for more than one column"),
        (X, ["a", "b", "dgo"], {"classes": ["a", "b", "dog"]}, "'dgo'.*Did you mean 'dog'"),
        (X, [0, 1, 3], {"classes": ["a", "b", "c"]}, "label '3'"),
        (X, [0, 1, 5], {"classes": ["1", "2", "5"]}, "label '0'"),
        (X, [0, 1, 1], {"classes": ["a", "a"]}, "two different classes"),
        (X, Y, {"task": "regression", "classes": ["a", "b"]}, "regression target has none"),
        (np.zeros((50, 1)), np.arange(50) * 3, {}, "50 different whole numbers.*task='classification' or task="),
        (X, [1e300, 0, 1], {"task": "classification"}, "64-bit"),
    ],
)
def test_bad_arrays_are_named_errors(x, y, options, words):
    with pytest.raises(DataError, match=words):
        Dataset.from_arrays(x, y, **options)


def test_many_consecutive_labels_with_several_rows_each_are_classes():
    y = np.arange(104) % 26
    assert Dataset.from_arrays(np.zeros((104, 1)), y).n_classes == 26
    assert Dataset.from_arrays(np.zeros((104, 1)), y * 2, "classification").n_classes == 26


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_a_pair_becomes_a_dataset_and_a_dataset_stays_itself(data):
    assert as_dataset(data) is data
    pair = as_dataset((data.x, data.y))
    assert pair.rows == data.rows
    assert as_dataset((np.zeros((3, 1)), [2, 0, 1])).y.tolist() == [2, 0, 1]
    assert as_dataset((np.zeros((3, 1)), [5, 0, 1]), "regression").y.tolist() == [5, 0, 1]


@pytest.mark.parametrize("y", [[0, 2, 4], [1, 2, 3], [-1, 1, 1]])
def test_a_pair_never_changes_whole_numbers_behind_the_callers_back(y):
    with pytest.raises(DataError, match=r"not the classes 0\.\.K-1.*task='classification'.*task='regression'"):
        as_dataset((np.zeros((3, 1)), y))


@pytest.mark.parametrize("value", [None, 3, {"x": 1}, [1, 2], (1, 2, 3), np.zeros((2, 2))])
def test_what_is_no_data_is_refused(value):
    with pytest.raises(DataError, match=r"Dataset or a pair \(x, y\); got"):
        as_dataset(value)


# -- rows ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, N - 1), min_size=1, max_size=30), st.integers(0, 5), st.floats(0.1, 0.9))
def test_identities_survive_every_way_of_choosing_rows(index, seed, fraction):
    split = Split(torch.arange(0, N, 2), torch.arange(1, N, 2))
    data = make(splits={"alternate": split})
    chosen = data.subset(index).shuffle(seed)
    still_aligned(chosen)
    assert sorted(chosen.rows.index.tolist()) == sorted(index)
    for part, remainder in (("train", 0), ("test", 1)):
        expected = sorted(row for row in index if row % 2 == remainder)
        if expected:
            still_aligned(getattr(chosen, part))
            assert sorted(getattr(chosen, part).rows.index.tolist()) == expected
    rest, held = data.holdout(fraction, seed)
    still_aligned(rest)
    still_aligned(held)
    assert rest.rows.overlap(held.rows) == 0
    assert Dataset.concat([rest, held]).rows.overlap(data.rows) == N


@given(
    st.lists(st.integers(0, N - 1), min_size=4, max_size=40).filter(lambda rows: len(set(rows)) > 3), st.integers(0, 9)
)
def test_holdout_of_a_bootstrap_sample_leaks_no_row(index, seed):
    rest, held = make().subset(index).holdout(0.4, seed)
    assert rest.rows.overlap(held.rows) == 0
    assert len(rest) + len(held) == len(index)


def test_concatenating_sources_keeps_them_apart():
    a, b = make(5), make(5, offset=100.0)
    whole = Dataset.concat([a, b, a])
    assert len(whole) == 15
    assert whole.rows.overlap(a.rows) == whole.rows.overlap(b.rows) == 5
    still_aligned(whole.subset(whole.rows.isin(b.rows)), offset=100.0)
    assert Dataset.concat([a]).rows == a.rows
    assert whole.name == "numbers"


def test_the_same_source_twice_has_the_same_rows_and_others_do_not():
    assert make().rows == make().rows
    assert make().rows.overlap(make(offset=1.0).rows) == 0
    labels = Dataset.from_arrays(np.zeros((2, 1)), [0, 1])
    floats = Dataset.from_arrays(np.zeros((2, 1)), [0.0, 1.0])
    assert labels.rows == floats.rows


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Dataset.from_arrays(np.zeros((2, 2)), [0, 1]), "differ in task: regression and classification"),
        (Dataset.from_arrays(np.zeros((2, 2)), [0.0, 1.0], x_names=["a", "b"]), "differ in columns"),
        (Dataset.from_arrays(np.zeros((2, 3)), [0.0, 1.0]), "differ in columns"),
        (Dataset.from_arrays(np.zeros((2, 2)), np.zeros((2, 2))), "shape of a target"),
    ],
)
def test_parts_that_do_not_fit_are_not_concatenated(data, other, words):
    with pytest.raises(DataError, match=words):
        Dataset.concat([data, other])
    with pytest.raises(DataError, match="empty"):
        Dataset.concat([])


def test_shuffle_is_seeded_and_leaves_the_global_stream_alone(data):
    before = torch.random.get_rng_state()
    one, same, other = data.shuffle(1), data.shuffle(1), data.shuffle(2)
    assert one.rows == same.rows
    assert one.rows != other.rows
    assert torch.equal(torch.random.get_rng_state(), before)


def test_indexing_forms(data):
    assert len(data[3]) == 1
    assert data[-2:].rows.index.tolist() == [10, 11]
    assert data[data.x[:, 0] > 8].rows.index.tolist() == [9, 10, 11]
    with pytest.raises(TypeError, match="not iterable"):
        iter(data)
    with pytest.raises(DataError, match="leaves none of the 12 rows"):
        data[[]]
    with pytest.raises(DataError, match="Row 12 does not exist"):
        data[12]


# -- splits ----------------------------------------------------------------------------------------------------------


def test_train_and_test_need_a_split(data):
    for part in ("train", "test"):
        with pytest.raises(DataError, match=rf"numbers has no split, so it has no \.{part}.*holdout"):
            getattr(data, part)
    with pytest.raises(DataError, match=r"without splits.*holdout"):
        data.split(0)


def test_the_split_that_is_current_gives_train_and_test_in_its_order():
    first, second = Split(torch.tensor([3, 1]), torch.tensor([0])), Split(torch.tensor([0]), torch.tensor([2, 1]))
    data = make(4, splits={"a": first, "b": second})
    assert data.train.rows.index.tolist() == [3, 1]
    assert data.split(1).test.rows.index.tolist() == [2, 1]
    assert data.split("b").train.rows.index.tolist() == [0]
    assert data.split(1).split(0).train.rows.index.tolist() == [3, 1]
    assert data.train.splits == {}
    for k in (2, -1, "c", 1.0, None):
        with pytest.raises(DataError, match="it has 2: a, b"):
            data.split(k)
    with pytest.raises(DataError, match="no split"):
        data.train.test  # noqa: B018
    with pytest.raises(DataError, match="None of these 1 rows"):
        data[[3]].test  # noqa: B018


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_the_held_out_fraction_lies_between_0_and_1(data, fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        data.holdout(fraction, 0)


def test_holdout_needs_a_row_on_each_side(data):
    with pytest.raises(DataError, match="one side empty"):
        data.holdout(0.01, 0)
    rest, held = data.holdout(0.25, 0)
    assert (len(rest), len(held)) == (9, 3)
    assert data.holdout(0.25, 0)[1].rows == held.rows
    assert data.holdout(0.25, 1)[1].rows != held.rows


# -- scaled ----------------------------------------------------------------------------------------------------------


def test_standardised_scales_by_the_training_rows_and_remembers_them():
    data = make(splits={"a": Split(torch.arange(8), torch.arange(8, N))})
    scaled = data.standardised()
    torch.testing.assert_close(scaled.train.x.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled.train.y.std(correction=0), torch.ones((), dtype=torch.float64))
    assert scaled.rows == data.rows
    assert scaled.test.shaped_by == data.train.rows
    assert data.shaped_by is None
    by_test = data.train.standardised(by=data.test)
    assert by_test.shaped_by == data.test.rows
    assert Dataset.concat([scaled, by_test]).shaped_by.overlap(data.rows) == N
    assert by_test.standardised().shaped_by.overlap(data.rows) == N


def test_standardised_leaves_classes_alone():
    data = Dataset.from_arrays(np.arange(4.0)[:, None], [0, 1, 2, 0]).standardised()
    assert data.y.tolist() == [0, 1, 2, 0]


def test_repr_is_one_line(data):
    assert repr(data) == "Dataset('numbers', regression, 12 rows of 2, target 'y')"
    images = Dataset.from_arrays(
        np.zeros((2, 1, 3, 3)), [0, 1], splits={"a": Split(torch.tensor([0]), torch.tensor([1]))}
    )
    assert repr(images) == "Dataset('data', classification, 2 rows of 1 x 3 x 3, 2 classes, split 'a' of 1)"


def test_a_dataset_made_by_hand_keeps_its_parts_consistent(data):
    from dataclasses import replace

    with pytest.raises(DataError, match="12 rows in x, 11 in y and 12 identities"):
        replace(data, y=data.y[1:])
    with pytest.raises(DataError, match="2 columns but 1 column names"):
        replace(data, x_names=("a",))
    with pytest.raises(DataError, match="no task"):
        replace(data, task="clustering")
