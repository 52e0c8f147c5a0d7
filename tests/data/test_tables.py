from __future__ import annotations

import gzip

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bayesdl.data import Dataset, read_csv, read_inputs
from bayesdl.errors import DataError, FileError

PLAIN = "age,bmi,price\n31,20.5,1.5\n40,22,2.5\n52,31e0,3.0\n"
MIXED = "age,city,price\n31,Rome,1.5\n40,Oslo,2.5\n52,Rome,3.0\n"
NAMES = "id,price\n" + "".join(f"name{i},{i}.5\n" for i in range(60))
COUNTS = "id,price\n" + "".join(f"{i},{3 * i}\n" for i in range(60))
HOLES = "age,bmi,price\n31,,1.5\n40,22,2.5\n52,NA,3.0\n53,25,3.5\n"


@pytest.fixture
def write(tmp_path):
    def write(content, name="table.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_plain_table(write):
    data = read_csv(write(PLAIN), "price")
    assert (data.name, data.x_names, data.y_name, data.task) == ("table.csv", ("age", "bmi"), "price", "regression")
    assert data.x.tolist() == [[31, 20.5], [40, 22], [52, 31]]
    assert data.y.tolist() == [1.5, 2.5, 3.0]
    assert data.rows == Dataset.from_arrays(data.x, data.y).rows


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", " , "),
        PLAIN.replace("age", '"age"'),
        PLAIN + "\n\n",
        "\n" + PLAIN,
        PLAIN.replace("31,", "+31.,").rstrip(),
    ],
)
def test_spellings_of_the_same_table(write, text):
    data = read_csv(write(text), "price")
    assert data.x_names == ("age", "bmi")
    assert data.x.tolist() == [[31, 20.5], [40, 22], [52, 31]]


def test_gzip_and_quoted_separators(write):
    text = '"age; in years","city, state",y\n1,"Rome, IT",0\n2,"Oslo, NO",1\n'
    data = read_csv(write(gzip.compress(text.encode()), "table.csv.gz"), "y", encode="onehot")
    assert data.x_names == ("age; in years", "city, state=Oslo, NO", "city, state=Rome, IT")


def test_onehot(write):
    data = read_csv(write(MIXED), "price", encode="onehot")
    assert data.x_names == ("age", "city=Oslo", "city=Rome")
    assert data.x.tolist() == [[31, 0, 1], [40, 1, 0], [52, 0, 1]]


def test_missing_rows_are_dropped_when_asked_for(write):
    data = read_csv(write(HOLES), "price", missing="drop")
    assert data.x.tolist() == [[40, 22], [53, 25]]
    assert data.rows.index.tolist() == [0, 1]


def test_a_missing_target_drops_the_row_as_well(write):
    assert read_csv(write("a,y\n1,\n2,3.5\n4,?\n"), "y", missing="drop").y.tolist() == [3.5]


def test_columns_are_left_out_when_asked_for(write):
    assert read_csv(write(MIXED), "price", drop=["city"]).x_names == ("age",)


@pytest.mark.parametrize(
    ("target", "task", "expected_task", "classes"),
    [
        (["0", "1"], None, "classification", ("0", "1")),
        (["2", "10"], None, "classification", ("2", "10")),
        (["no", "yes"], None, "classification", ("no", "yes")),
        (["1.0", "2.0"], None, "regression", ()),
        (["1", "2"], "regression", "regression", ()),
        (["1.0", "2.0"], "classification", "classification", ("1", "2")),
    ],
)
def test_the_target_says_the_task(write, target, task, expected_task, classes):
    data = read_csv(write(f"a,y\n1,{target[0]}\n2,{target[1]}\n"), "y", task=task)
    assert (data.task, data.classes) == (expected_task, classes)


BOTH = "encode='onehot'.*missing='drop'"


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (MIXED, {}, f"column 'city' holds text, such as 'Rome' in line 2.*{BOTH}"),
        (MIXED.replace("31", "old"), {}, f"columns 'age', 'city' hold text.*{BOTH}"),
        (HOLES, {}, f"2 of 4 rows have missing values, the first in line 2, column 'bmi'.*{BOTH}"),
        (HOLES.replace("22", "").replace("25", "nan"), {"missing": "drop"}, "every row has a missing value"),
        (PLAIN, {"target": "prize"}, "no column 'prize'. Did you mean 'price'"),
        (PLAIN, {"target": "Price"}, "Did you mean 'price'"),
        (PLAIN, {"target": "zzz"}, "There are: age, bmi, price"),
        (PLAIN, {"drop": ["aeg"]}, "no column 'aeg'. Did you mean 'age'"),
        (PLAIN, {"drop": ["price"]}, "the target and in drop"),
        (PLAIN, {"drop": ["age", "bmi"]}, "the only column"),
        ("1,2\n3,4\n", {}, "header line missing"),
        (PLAIN, {"encode": "label"}, "encode='onehot', not 'label'"),
        (PLAIN, {"missing": "mean"}, "missing='drop', not 'mean'"),
        (PLAIN, {"task": "rank"}, "no task 'rank'"),
        ("", {}, "empty.*header"),
        (" \n\n", {}, "empty"),
        ("age,price\n", {}, "header line but no rows"),
        ("age,age,price\n1,2,3\n", {}, "'age' stands for more than one column"),
        (",age,price\n0,2,3\n", {}, "column 1 has no name.*index=False"),
        ("age,price\n1,2\n1,2,3\n", {}, "line 3 has 3 cells, the header has 2"),
        ("age,price\n1\n", {}, "line 2 has 1 cells"),
        ("price\n1.5\n", {}, "only column"),
        ("age,price\n1,inf\n2,3\n", {}, "1 infinite values.*'inf'.*line 2, column 'price'"),
        ("age,price\n1e999,1.5\n2,3.5\n", {}, "'1e999'.*column 'age'"),
        (b"age,price\n\xff\xfe,2\n", {}, r"not UTF-8 text \(byte 10\)"),
        ('age,price\n"1,2\n', {}, "line 1 or later is not readable as CSV"),
        ("age,price\n" + "9" * 200_000 + ",1\n", {}, "field larger than"),
        ("age" * 60_000 + ",price\n1,2\n", {}, "field larger than"),
        ("age,price\n1,2\n3,2\n", {}, "one class only"),
        ("age,price\n1,x\n3,y\n", {"task": "regression"}, r"y \('price'\) holds text"),
        (NAMES, {"encode": "onehot"}, r"60 different texts.*drop=\['id'\]"),
        (COUNTS, {}, "task='classification' or task='regression'"),
        ("age,price\n1_000,2.5\n2,3.5\n", {}, "'1_000' in line 2"),
    ],
)
def test_bad_tables_are_named_errors(write, text, options, words):
    path = write(text)
    target = options.pop("target", "price")
    with pytest.raises(DataError, match=words) as caught:
        read_csv(path, target, **options)
    assert list(path.parent.iterdir()) == [path]
    if not {"encode", "missing"} & set(options) or "line" in words:
        assert str(caught.value).startswith(str(path))


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(FileError, match=r"nowhere\.csv does not exist"):
        read_csv(tmp_path / "nowhere.csv", "y")
    with pytest.raises(FileError, match="cannot be read"):
        read_csv(tmp_path, "y")
    with pytest.raises(FileError, match="damaged gzip"):
        read_csv(write(gzip.compress(PLAIN.encode())[:-9], "t.csv.gz"), "price")


cell = st.one_of(
    st.text(alphabet='ab1.,;"\n\r\t -e?\x00é', max_size=5), st.sampled_from(["1", "2.5", "NA", "inf", "nan"])
)
junk = st.one_of(
    st.binary(max_size=60),
    st.text(alphabet='xy1.,;"\n\r\t ', max_size=60),
    st.lists(st.tuples(cell, cell), max_size=6).map(lambda rows: "\n".join(["x,y", *(",".join(row) for row in rows)])),
)


@given(
    junk,
    st.sampled_from([None, "onehot"]),
    st.sampled_from([None, "drop"]),
    st.sampled_from([None, "regression", "classification"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_file_is_a_named_error_or_finite_data(write, content, encode, missing, task):
    path = write(content)
    try:
        data = read_csv(path, "y", encode=encode, missing=missing, task=task)
    except (DataError, FileError):
        return
    assert len(data) > 0
    assert torch.isfinite(data.x).all()
    assert torch.isfinite(data.y.double()).all()
    if data.task == "classification":
        assert 0 <= int(data.y.min()) <= int(data.y.max()) < data.n_classes


def test_inputs_without_a_target(write):
    path = write(MIXED)
    x, names = read_inputs(path, encode="onehot", drop=["price"])
    data = read_csv(path, "price", encode="onehot")
    assert names == data.x_names
    assert torch.equal(x, data.x)
    assert read_inputs(write(PLAIN))[1] == ("age", "bmi", "price")
    assert len(read_inputs(write(HOLES), missing="drop")[0]) == 2


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (MIXED, {}, "column 'city' holds text"),
        (HOLES, {}, "2 of 4 rows have missing values"),
        (PLAIN, {"drop": ["age", "bmi", "price"]}, "no column to predict from"),
        (PLAIN, {"drop": ["aeg"]}, "Did you mean 'age'"),
        (PLAIN, {"encode": "one-hot"}, "encode='onehot'"),
    ],
)
def test_unusable_inputs(write, content, options, words):
    with pytest.raises(DataError, match=words):
        read_inputs(write(content), **options)
