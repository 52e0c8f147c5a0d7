"""UCI folders and IDX files."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bayesdl.data import read_idx, read_uci
from bayesdl.errors import DataError, FileError

TABLE = np.column_stack([np.arange(10.0), np.arange(10) % 3, np.arange(10) * 0.5])
TRAIN = np.array([[9, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]], np.uint16)
TEST = np.array([[8, 7, 0], [7, 8, 9]], np.uint16)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "yacht"
    path.mkdir()
    write_table(path, TABLE)
    np.savez(path / "splits.npz", train=TRAIN, test=TEST)
    return path


def write_table(folder, table):
    text = "\n".join(",".join(map(repr, row)) for row in table.tolist())
    (folder / "data.csv.gz").write_bytes(gzip.compress(text.encode()))


def test_positions_keep_their_order(folder):
    data = read_uci(folder)
    assert (data.name, data.task, len(data.splits), data.current) == ("yacht", "regression", 2, "0")
    assert data.x.tolist() == TABLE[:, :2].tolist()
    for k in range(2):
        assert data.split(k).train.x.tolist() == TABLE[TRAIN[k], :2].tolist()
        assert data.split(k).test.y.tolist() == TABLE[TEST[k], 2].tolist()
    assert data.train.rows == data.split(0).train.rows


def test_folds(folder):
    fold = np.arange(10, dtype=np.uint8) % 3
    np.savez(folder / "splits.npz", fold=fold)
    data = read_uci(folder)
    assert list(data.splits) == ["0", "1", "2"]
    for k in range(3):
        assert data.split(k).test.rows.index.tolist() == np.flatnonzero(fold == k).tolist()
        assert data.split(k).train.rows.index.tolist() == np.flatnonzero(fold != k).tolist()


def test_an_unpacked_table_and_a_last_column_of_labels(folder):
    (folder / "data.csv.gz").unlink()
    np.savetxt(folder / "data.csv", np.column_stack([TABLE[:, 0], TABLE[:, 1]]), delimiter=",")
    assert read_uci(folder, task="classification").classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"train": TRAIN, "test": TEST[:1]}, "equally many splits"),
        ({"train": TRAIN[0], "test": TEST[0]}, r"\[splits, rows\]"),
        ({"train": TRAIN, "test": TEST + 5}, "split 0 names row 13; the table has 10 rows"),
        ({"train": TRAIN, "test": np.array([[1, 7, 8]] * 2)}, "names a row twice.*disjoint"),
        ({"train": TRAIN.astype(float), "test": TEST}, "whole numbers.*float64"),
        ({"train": TRAIN}, "train and test, or fold alone; it holds train"),
        ({"other": TRAIN}, "none of them"),
        ({"fold": np.zeros(10, int)}, "at least two folds"),
        ({"fold": np.arange(10) * 2}, "numbers 0 to K-1"),
        ({"fold": np.arange(9)}, r"shape \(9,\), but the table has 10 rows"),
    ],
)
def test_bad_splits(folder, arrays, words):
    np.savez(folder / "splits.npz", **arrays)
    with pytest.raises(DataError, match=words):
        read_uci(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"a,b\n1,2\n", "not a table of numbers"),
        (b"1,2\n3\n", "not a table"),
        (b"1\n2\n", "one column only"),
        (b"\xff\xfe", "not a table"),
        (b"1,nan\n" * 10, "not finite"),
        (b"1,,2\n" * 10, "not a table"),
    ],
)
def test_bad_tables(folder, content, words):
    (folder / "data.csv.gz").write_bytes(gzip.compress(content))
    np.savez(folder / "splits.npz", fold=np.arange(10) % 2)
    with pytest.raises(DataError, match=words):
        read_uci(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileError, match=r"not a folder; it should hold data\.csv\.gz and splits\.npz"):
        read_uci(tmp_path / "boston")
    (folder / "splits.npz").unlink()
    with pytest.raises(FileError, match=r"splits\.npz does not exist"):
        read_uci(folder)
    (folder / "data.csv.gz").unlink()
    with pytest.raises(FileError, match=r"data\.csv\.gz does not exist"):
        read_uci(folder)


def test_arrays_of_objects_are_never_unpickled(folder):
    np.savez(folder / "splits.npz", fold=np.array([{}] * 10, dtype=object))
    with pytest.raises(FileError, match="plain arrays"):
        read_uci(folder)


@given(st.integers(0, 2**30), st.binary(max_size=4), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_a_damaged_archive_is_a_named_error(folder, position, content, cut):
    path = folder / "splits.npz"
    np.savez_compressed(path, train=TRAIN, test=TEST)
    raw = bytearray(path.read_bytes())
    position %= len(raw)
    raw[position : position + len(content)] = content
    path.write_bytes(bytes(raw[:position] if cut else raw))
    try:
        data = read_uci(folder)
    except (DataError, FileError):
        return
    assert len(data.train) + len(data.test) <= 10


def idx(array, magic=None):
    header = magic or bytes([0, 0, 8, array.ndim])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


IMAGES = np.arange(4 * 2 * 3).reshape(4, 2, 3) * 11 % 256
LABELS = np.array([3, 0, 1, 3])


@pytest.fixture
def pair(tmp_path):
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    images.write_bytes(idx(IMAGES))
    labels.write_bytes(idx(LABELS))
    return images, labels


def test_images_are_floats_in_the_unit_interval(pair):
    data = read_idx(*pair)
    assert data.x.shape == (4, 1, 2, 3)
    assert data.x.dtype == torch.float32
    np.testing.assert_array_equal((data.x[:, 0] * 255).round().numpy(), IMAGES)
    assert data.y.tolist() == LABELS.tolist()
    assert data.classes == ("0", "1", "2", "3")
    assert read_idx(pair[0]).rows == data.rows


def test_packed_files_are_the_same_data(pair):
    images, labels = (path.with_suffix(".gz") for path in pair)
    for packed, path in zip((images, labels), pair, strict=True):
        packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_idx(images).rows == read_idx(*pair).rows


def test_labels_that_cannot_be_found(pair, tmp_path):
    pair[1].unlink()
    with pytest.raises(FileError, match=r"labels-idx1-ubyte does not exist.*read_idx\(images, labels\)"):
        read_idx(pair[0])
    other = pair[0].rename(tmp_path / "pictures")
    with pytest.raises(FileError, match="No labels were given"):
        read_idx(other)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (idx(LABELS), idx(LABELS), "starts with 00 00 08 01, but an IDX file of images.*00 00 08 03.*swapped"),
        (idx(IMAGES), idx(IMAGES), "IDX file of labels"),
        (idx(IMAGES, magic=b"\0\0\x0d\3"), idx(LABELS), "00 00 0d 03"),
        (b"", idx(LABELS), "starts with nothing"),
        (idx(IMAGES)[:9], idx(LABELS), "ends within its header"),
        (idx(IMAGES)[:-1], idx(LABELS), "announces 4 x 2 x 3 = 24 bytes but holds 23"),
        (idx(IMAGES) + b"\0", idx(LABELS), "holds 25"),
        (idx(IMAGES), idx(LABELS[:3]), "4 images and .* holds 3 labels"),
        (idx(IMAGES[:0]), idx(LABELS[:0]), "holds no images"),
        (idx(IMAGES), idx(LABELS * 0), "two different classes"),
    ],
)
def test_bad_idx_files(pair, images, labels, words):
    for path, content in zip(pair, (images, labels), strict=True):
        path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_idx(*pair)


def test_a_damaged_gzip_stream(pair):
    pair[0].write_bytes(gzip.compress(idx(IMAGES))[:-4])
    with pytest.raises(FileError, match="damaged gzip"):
        read_idx(*pair)


# -- the real files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["boston", "yacht", "naval", "airfoil", "wine_red"])
def test_real_uci_folders_agree_with_numpy(shared, name):
    path = shared / "data" / "uci" / name
    table = np.loadtxt(path / "data.csv.gz", delimiter=",")
    splits = np.load(path / "splits.npz")
    data = read_uci(path)
    last = len(data.splits) - 1
    np.testing.assert_array_equal(data.x, table[:, :-1])
    np.testing.assert_array_equal(data.y, table[:, -1])
    if "fold" in splits:
        train, test = np.flatnonzero(splits["fold"] != last), np.flatnonzero(splits["fold"] == last)
    else:
        train, test = splits["train"][last], splits["test"][last]
    np.testing.assert_array_equal(data.split(last).train.x, table[train, :-1])
    np.testing.assert_array_equal(data.split(last).test.y, table[test, -1])
    assert len(data.train) + len(data.test) == len(table)
    assert torch.isfinite(data.standardised().x).all()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "notmnist"])
def test_real_idx_files(shared, name):
    path = shared / "data" / "images" / name / "t10k-images-idx3-ubyte.gz"
    data = read_idx(path)
    raw = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    assert len(data) == 10_000
    assert data.n_classes == 10
    np.testing.assert_array_equal(data.x, raw.astype(np.float32) / np.float32(255))
    assert torch.bincount(data.y).min() > 800
