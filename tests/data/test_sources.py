"""Data sources: what they yield, and the one error that each bad input gets."""

import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import graphcomp.data.arrays
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data, Split
from graphcomp.errors import DataError

SHAPE = (3, 32, 32)
FIRST_DIGITS = [11, 23, 24, 25, 28]  # the bundled weights have not seen these: never update this list


def load(spec: str, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Data:
    return load_data(spec, input_shape=shape, seed=seed)


def everything(split):
    batches = list(split.batches(7))
    return torch.cat([x for (x,), _ in batches]), torch.cat([y for _, y in batches])


# --- digits and random


def test_digits():
    data = load("digits")
    assert (len(data.train), len(data.eval), data.num_classes) == (1438, 359, 10)
    assert data.labelled
    (x,), y = next(data.eval.batches(8))
    assert (x.shape, x.dtype, y.dtype) == ((8, 3, 32, 32), torch.float32, torch.int64)
    assert torch.equal(x[:, :, ::4, ::4], x[:, :, 3::4, 3::4])  # nearest upsampling by 4
    assert not set(data.train.indices) & set(data.eval.indices)
    counts = torch.bincount(data.eval.labels)
    assert counts.max() - counts.min() <= 2


def test_the_split_of_digits_never_moves():
    first, second = load("digits", seed=0), load("digits", seed=1)
    assert np.array_equal(first.eval.indices, second.eval.indices)
    assert first.eval.indices[:5].tolist() == FIRST_DIGITS


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install graphcomp\[demo\]"):
        load("digits")


def test_random_has_no_labels():
    data = load("random", (5, 4))
    assert data.num_classes is None
    assert not data.labelled and not data.train.labelled
    x, y = everything(data.train)
    assert x.shape == (64, 5, 4)
    assert not y.any()
    assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1
    assert not torch.equal(x, everything(data.eval)[0])


@pytest.mark.parametrize(
    ("limit", "expected"), [("", 64), ("?limit=1", 1), ("?limit=64", 64), ("?limit=200", 200)]
)
def test_random_draws_as_many_as_are_asked_for(limit: str, expected: int) -> None:
    data = load_data(f"random{limit}", input_shape=(3, 4, 4), seed=0)
    for split in (data.train, data.eval):
        ((x,), _), *rest = split.batches(1000)
        assert len(split) == len(x) == expected and not rest
        assert len(x.unique(dim=0)) == expected


def test_random_follows_the_seed():
    a, b, c = (everything(load("random", (4,), seed=s).train)[0] for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# --- batches, limit


def test_batches_cover_all_samples_once_in_order_or_shuffled():
    split = load("digits?limit=50").eval
    sizes = [len(y) for _, y in split.batches(16)]
    assert sizes == [16, 16, 16, 2]
    _, y = everything(split)
    assert torch.equal(y, split.labels)
    shuffled = torch.cat([y for _, y in split.batches(16, shuffle_seed=1)])
    again = torch.cat([y for _, y in split.batches(16, shuffle_seed=1)])
    assert torch.equal(shuffled, again)
    assert not torch.equal(shuffled, y)
    assert torch.equal(shuffled.sort()[0], y.sort()[0])


def test_shuffled_images_keep_their_labels(tmp_path):
    labels = np.arange(20) % 5
    x = np.broadcast_to(labels[:, None, None, None], (20, 3, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=labels)
    for (images,), y in load(f"npz:{tmp_path}/d.npz", (3, 2, 2)).train.batches(3, shuffle_seed=5):
        assert torch.equal(images[:, 0, 0, 0].long(), y)


def test_limit_is_a_seeded_stratified_subset():
    whole, a, b, c = load("digits"), *(load("digits?limit=100", seed=s) for s in (0, 0, 1))
    assert len(a.train) == len(a.eval) == 100
    assert "limited to 100 of 1438 and 100 of 359" in a.description
    assert torch.equal(torch.bincount(a.train.labels), torch.full((10,), 10))
    assert np.array_equal(a.train.indices, b.train.indices)
    assert not np.array_equal(a.train.indices, c.train.indices)
    assert not np.array_equal(a.train.indices, whole.train.indices[:100])
    assert len(load("digits?limit=5000").train) == 1438


def test_only_some_classes_relabelled():
    data = load("digits")
    some = data.only([7, 2])
    assert (some.num_classes, some.description) == (2, f"{data.description}; classes 2, 7 only")
    for whole, part in ((data.train, some.train), (data.eval, some.eval)):
        assert set(part.labels.tolist()) == {0, 1}
        assert len(part) == int(((whole.labels == 2) | (whole.labels == 7)).sum())
        images, labels = everything(part)
        chosen = (whole.labels == 2) | (whole.labels == 7)
        assert torch.equal(images, everything(whole)[0][chosen])
        assert torch.equal(labels, (whole.labels[chosen] == 7).long())


@pytest.mark.parametrize(
    ("spec", "message"), [("digits", "found no sample of class 11"), ("random", "without labels")]
)
def test_only_needs_samples_of_every_class(spec, message):
    with pytest.raises(DataError, match=message):
        load(spec).only([2, 11])


def test_a_batch_needs_a_size():
    with pytest.raises(DataError, match="batch size: found 0"):
        load("random").train.batches(0)


# --- the spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "mnist",
            "found source 'mnist', expected one of digits, imagefolder:DIR, cifar10:DIR, cifar100:DIR, "
            "npz:FILE, random",
        ),
        ("", "found source ''"),
        ("npz", "found 'npz', expected 'npz:FILE'"),
        ("digits:x", "found 'digits:x', expected 'digits'"),
        ("digits?mean=0&std=1", "found option 'mean', expected limit"),
        ("digits?", "found option ''"),
        ("digits?limit", "found limit=''"),
        ("digits?limit=-3", "found limit='-3'"),
        ("digits?limit=0", "found limit='0'"),
        ("digits?limit=3&limit=4", "'limit' twice"),
        ("npz:x?mean=0,0,0", "only one of mean and std"),
        ("npz:x?mean=a,b&std=1,1", "found mean='a,b', expected numbers"),
        ("npz:x?mean=0&std=0", "found std='0', expected positive"),
        ("npz:x?mean=nan&std=1", "found mean='nan'"),
    ],
)
def test_a_bad_spec_is_named(spec, message):
    with pytest.raises(DataError) as caught:
        load(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(("shape", "seed"), [((), 0), ((3, 0, 4), 0), ((3, 4, 4), -1)])
def test_bad_shape_or_seed(shape, seed):
    with pytest.raises(DataError, match=r"input shape|seed"):
        load("random", shape, seed)


def test_a_source_that_does_not_fit_the_model():
    with pytest.raises(DataError, match="found samples of shape 3x32x32, expected 3x224x224"):
        load("digits", (3, 224, 224))


# --- npz


def npz(path: Path, **arrays) -> str:
    np.savez(path / "d.npz", **arrays)
    return f"npz:{path}/d.npz"


def images(n: int = 12, shape: tuple[int, ...] = (4, 6, 3)) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (n, *shape)).astype(np.uint8)


LABELS = np.arange(12) % 3


def test_npz_uint8_is_normalised_like_imagenet(tmp_path):
    x = images()
    data = load(npz(tmp_path, x=x, y=LABELS), (3, 4, 6))
    assert (len(data.train), len(data.eval), data.num_classes) == (6, 6, 3)
    assert sorted([*data.train.indices, *data.eval.indices]) == list(range(12))
    assert torch.bincount(data.train.labels).tolist() == [2, 2, 2]
    expected = (
        x[data.eval.indices].transpose(0, 3, 1, 2) / 255 - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))
    ) / (np.reshape([0.229, 0.224, 0.225], (3, 1, 1)))
    assert torch.allclose(everything(data.eval)[0], torch.from_numpy(expected).float(), atol=1e-6)


def test_npz_float_is_taken_as_it_is_or_normalised(tmp_path):
    x = np.random.RandomState(0).randn(12, 2, 4, 6)
    spec = npz(tmp_path, x=x, y=LABELS)
    plain = load(spec, (2, 4, 6)).eval
    expected = torch.from_numpy(x[plain.indices]).float()
    assert torch.equal(everything(plain)[0], expected)
    scaled = everything(load(f"{spec}?mean=1,2&std=2,4", (2, 4, 6)).eval)[0]
    assert torch.allclose(
        scaled, (expected - torch.tensor([1.0, 2]).view(2, 1, 1)) / torch.tensor([2.0, 4]).view(2, 1, 1)
    )
    assert torch.equal(everything(plain)[0], expected)  # normalising a batch leaves the source alone


def test_npz_with_its_own_test_set(tmp_path):
    data = load(
        npz(tmp_path, x_train=images(), y_train=LABELS, x_test=images(2), y_test=np.array([0, 7])), (3, 4, 6)
    )
    assert (len(data.train), len(data.eval), data.num_classes) == (12, 2, 8)
    assert "own test set" in data.description


FLOATS = np.zeros((12, 3, 4, 6), np.float32)
WITH_NAN = FLOATS.copy()
WITH_NAN[0, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": images()}, "found arrays a, expected x, y or x_train, y_train, x_test, y_test (y where"),
        ({}, "found arrays nothing"),
        ({"x": images(), "y": LABELS, "labels": LABELS}, "found arrays labels or x or y"),
        ({"x": images(), "y": LABELS, "x_test": images()}, "found arrays x or x_test or y"),
        ({"x": images(0), "y": LABELS[:0]}, "found no calibration samples"),
        ({"x": images(1), "y": LABELS[:1]}, "samples, expected at least one"),
        ({"x": images(), "y": LABELS[:5]}, "labels of shape (5,), expected integers of shape (12,)"),
        ({"x": images(), "y": LABELS.astype(bool)}, "found bool labels"),
        ({"x": images(), "y": np.zeros((12, 2, 2))}, "found float64 of shape (12, 2, 2), expected (12,) or"),
        ({"x": images(), "y": np.zeros(5)}, "found float64 of shape (5,), expected (12,) or (12, k)"),
        ({"x": images(), "y": np.full(12, np.inf)}, "found 12 NaN or infinite values"),
        ({"x": images(), "y": LABELS - 1}, "found labels from -1 to 1, expected 0 or larger"),
        ({"x": images(), "y": LABELS.astype(np.uint64) + 2**63}, "expected 0 or larger, below 2**63"),
        ({"x": images(12, (3, 4, 6)), "y": LABELS}, "found samples of shape 6x3x4, expected 3x4x6"),
        ({"x": images(12, (4, 6)), "y": LABELS}, "found uint8 of shape (12, 4, 6)"),
        ({"x": LABELS, "y": LABELS}, "found int64, expected uint8 (N, H, W, C) or float"),
        ({"x": FLOATS[:, :2], "y": LABELS}, "found samples of shape 2x4x6"),
        ({"x": WITH_NAN, "y": LABELS}, "found 1 NaN or infinite values"),
        ({"x": FLOATS.astype(np.float64) + 1e300, "y": LABELS}, "NaN or infinite"),
        ({"x": np.array([{}] * 12), "y": LABELS}, "unreadable file"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    with pytest.raises(DataError) as caught:
        load(npz(tmp_path, **arrays), (3, 4, 6))
    assert message in str(caught.value)


def test_npz_statistics_must_match_the_channels(tmp_path):
    grey = npz(tmp_path, x=images(12, (4, 6, 1)), y=LABELS)
    with pytest.raises(
        DataError, match="found 3 mean and 3 std values, expected one for each of the 1 channels"
    ):
        load(grey, (1, 4, 6))
    assert everything(load(f"{grey}?mean=0.5&std=0.5", (1, 4, 6)).eval)[0].shape == (6, 1, 4, 6)


def test_npz_files_that_are_none(tmp_path):
    whole = Path(npz(tmp_path, x=images(), y=LABELS).removeprefix("npz:"))
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([1, 2]))
    damaged = bytearray(whole.read_bytes())
    damaged[300] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    for name in ("cut", "text", "empty", "pickle", "damaged"):
        with pytest.raises(DataError, match="unreadable file"):
            load(f"npz:{tmp_path}/{name}.npz", (3, 4, 6))
    np.save(tmp_path / "single.npy", LABELS)
    with pytest.raises(DataError, match="found a single array"):
        load(f"npz:{tmp_path}/single.npy")
    with pytest.raises(DataError, match="found no such file"):
        load(f"npz:{tmp_path}/absent.npz")


# --- cifar10


def write_cifar(folder: Path, protocol: int = 4, keys=str) -> np.ndarray:
    folder.mkdir(parents=True)
    rng = np.random.RandomState(0)
    rows = rng.randint(0, 256, (6, 20, 3072)).astype(np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        content = {
            keys("data"): rows[i],
            keys("labels"): [k % 10 for k in range(20)],
            keys("batch_label"): keys(name),
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return rows


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10(tmp_path, protocol):
    rows = write_cifar(tmp_path / "cifar-10-batches-py", protocol)
    spec = f"cifar10:{tmp_path}?mean=0,0,0&std=1,1,1"
    data = load(spec)
    assert (len(data.train), len(data.eval), data.num_classes) == (100, 20, 10)
    x, y = everything(data.eval)
    assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(rows[5].reshape(20, 3, 32, 32)))
    assert y.tolist() == [k % 10 for k in range(20)]
    inside = load(f"cifar10:{tmp_path / 'cifar-10-batches-py'}?mean=0,0,0&std=1,1,1")
    assert torch.equal(everything(inside.train)[0], everything(data.train)[0])


def test_cifar10_as_python_2_wrote_it(tmp_path):
    """The published files: byte strings for keys, types and raw data, numpy's old module names."""
    write_cifar(tmp_path / "c")
    rows = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    (tmp_path / "c" / "test_batch").write_bytes(python_2_pickle(rows, [3, 9]))
    data = load(f"cifar10:{tmp_path / 'c'}?mean=0,0,0&std=1,1,1")
    x, y = everything(data.eval)
    assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(rows.reshape(2, 3, 32, 32)))
    assert y.tolist() == [3, 9]


def python_2_pickle(rows: np.ndarray, labels: list[int]) -> bytes:
    def string(text: bytes) -> bytes:
        return b"T" + len(text).to_bytes(4, "little") + text

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n("
        + integer(0)
        + b"t"
        + string(b"b")
        + b"tR"
    )
    shape = b"(" + integer(rows.shape[0]) + integer(rows.shape[1]) + b"t"
    array += b"(" + integer(1) + shape + dtype + b"\x89" + string(rows.tobytes()) + b"tb"
    ids = b"(" + b"".join(integer(v) for v in labels) + b"l"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + ids + b"u."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.array([object()]), "labels": [0]}, "unreadable file"),
        ({"data": np.zeros((1, 3072)), "labels": [0]}, "array of float64"),
        ({"data": np.zeros((1, 3000), np.uint8), "labels": [0]}, "found data of uint8 (1, 3000)"),
        (
            {"data": np.zeros((1, 3072), np.uint8), "labels": [10]},
            "found labels from 10 to 10, expected 0 to 9",
        ),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [1, 2]}, "labels of shape (2,)"),
        (
            {"data": np.zeros((1, 3072), np.uint8), "labels": [2**70]},
            f"found labels from {2**70} to {2**70}, exp",
        ),
        (
            {"data": np.zeros((1, 3072), np.uint8), "labels": np.array([2**63], np.uint64)},
            f"to {2**63}, expec",
        ),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-(2**63)]}, f"found labels from {-(2**63)} to "),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "labels that are not integers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [True]}, "labels that are not integers"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "found no data and labels"),
        ([1], "found a list"),
    ],
)
def test_bad_cifar10(tmp_path, content, message):
    write_cifar(tmp_path / "c")
    (tmp_path / "c" / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError) as caught:
        load(f"cifar10:{tmp_path / 'c'}")
    assert message in str(caught.value)


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_runs_in_a_cifar10_batch(tmp_path):
    write_cifar(tmp_path / "c")
    (tmp_path / "c" / "test_batch").write_bytes(pickle.dumps({"data": Exploit(tmp_path / "ran")}))
    with pytest.raises(DataError, match=r"it refers to \w+.mkdir"):
        load(f"cifar10:{tmp_path / 'c'}")
    assert not (tmp_path / "ran").exists()


def test_an_array_that_was_never_filled(tmp_path):
    write_cifar(tmp_path / "c")
    bare = b"cnumpy._core.multiarray\n_reconstruct\n(tR"
    (tmp_path / "c" / "test_batch").write_bytes(b"(S'data'\n" + bare + b"S'labels'\n(ld.")
    with pytest.raises(DataError, match="found data of int64"):
        load(f"cifar10:{tmp_path / 'c'}")


def test_damaged_or_absent_cifar10(tmp_path):
    write_cifar(tmp_path / "c")
    batch = tmp_path / "c" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"data_batch_3: found an unreadable file"):
        load(f"cifar10:{tmp_path / 'c'}")
    batch.unlink()
    with pytest.raises(DataError, match="found no data_batch_3"):
        load(f"cifar10:{tmp_path / 'c'}")
    with pytest.raises(DataError, match="found no such directory"):
        load(f"cifar10:{tmp_path / 'absent'}")


# --- cifar100, and names of classes

FINE = [f"fine {i:02}" for i in range(100)]
COARSE = [f"coarse {i:02}" for i in range(20)]


def write_cifar100(folder: Path, protocol: int = 4, meta: object = None) -> np.ndarray:
    """Six images, of classes 0, 17, …; the coarse class is a fifth of the fine one."""
    folder.mkdir(parents=True)
    rows = np.random.RandomState(0).randint(0, 256, (2, 6, 3072)).astype(np.uint8)
    fine = [17 * k % 100 for k in range(6)]
    for row, name in zip(rows, ("train", "test"), strict=True):
        content = {"data": row, "fine_labels": fine, "coarse_labels": [f // 5 for f in fine]}
        (folder / name).write_bytes(pickle.dumps({**content, "filenames": ["a.png"] * 6}, protocol=protocol))
    names = {"fine_label_names": FINE, "coarse_label_names": COARSE} if meta is None else meta
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=protocol))
    return rows


@pytest.mark.parametrize("protocol", range(6))
def test_cifar100(tmp_path, protocol):
    rows = write_cifar100(tmp_path / "cifar-100-python", protocol)
    plain = "mean=0,0,0&std=1,1,1"
    data = load(f"cifar100:{tmp_path}?{plain}")
    assert (len(data.train), len(data.eval), data.num_classes) == (6, 6, 100)
    x, y = everything(data.eval)
    assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(rows[1].reshape(6, 3, 32, 32)))
    assert y.tolist() == [0, 17, 34, 51, 68, 85] and data.names == {n: i for i, n in enumerate(FINE)}
    coarse = load(f"cifar100:{tmp_path / 'cifar-100-python'}?labels=coarse&{plain}")
    assert everything(coarse.eval)[1].tolist() == [0, 3, 6, 10, 13, 17]
    assert coarse.num_classes == 20 and list(coarse.names) == COARSE
    assert coarse.description.endswith("with coarse labels: 6 for calibration and training, 6 for evaluation")


def test_classes_by_name(tmp_path):
    """Names and ids may be mixed; what is left has the names that are left, under new ids."""
    write_cifar100(tmp_path / "c")
    data = load(f"cifar100:{tmp_path / 'c'}")
    ids = data.ids_of(["fine 68", 17, "fine 00"])
    assert ids == (68, 17, 0)
    some = data.only(ids)
    assert some.names == {"fine 00": 0, "fine 17": 1, "fine 68": 2}
    assert some.eval.labels.tolist() == [0, 1, 2]
    assert some.description.endswith("classes fine 00 (0), fine 17 (17), fine 68 (68) only")
    with pytest.raises(DataError, match=r"found the name 'fien 68', .* names of .*did you mean fine 68"):
        data.ids_of(["fien 68", 1])


def test_names_are_known_only_where_the_data_say_them(tmp_path):
    write_cifar100(tmp_path / "c")
    (tmp_path / "c" / "meta").unlink()
    data = load(f"cifar100:{tmp_path / 'c'}")
    assert data.names == {}
    with pytest.raises(DataError, match="expected ids: these data have no names"):
        data.ids_of(["bowl", "snail"])
    write_cifar(tmp_path / "ten")
    assert load(f"cifar10:{tmp_path / 'ten'}").names == {}
    names = [*"abcdefghij"]
    (tmp_path / "ten" / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": [n.encode() for n in names]})
    )
    assert load(f"cifar10:{tmp_path / 'ten'}").names == {n: i for i, n in enumerate(names)}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (
            {"fine_label_names": FINE[:99]},
            "found 99 names under 'fine_label_names', expected 100 different ones",
        ),
        ({"fine_label_names": [*FINE[:99], FINE[0]]}, "found 100 names"),
        ({"fine_label_names": [*FINE[:99], 7]}, "names that are not short words"),
        ({"fine_label_names": [*FINE[:99], "\x1b[2J"]}, "names that are not short words"),
        ({"fine_label_names": [*FINE[:99], "x" * 101]}, "names that are not short words"),
        ({"fine_label_names": "name"}, "found 0 names"),
        ({}, "found 0 names"),
        ([FINE], "found a list"),
    ],
)
def test_bad_names_of_classes(tmp_path, meta, message):
    write_cifar100(tmp_path / "c", meta=meta)
    with pytest.raises(DataError) as caught:
        load(f"cifar100:{tmp_path / 'c'}")
    assert message in str(caught.value)


def test_bad_cifar100(tmp_path):
    write_cifar100(tmp_path / "c")
    for spec, message in (
        (f"cifar100:{tmp_path / 'c'}?labels=rough", "found labels='rough', expected fine or coarse"),
        (f"cifar10:{tmp_path / 'c'}?labels=fine", "found option 'labels'"),
        (f"cifar10:{tmp_path / 'c'}", "found no data_batch_1"),
        (f"cifar100:{tmp_path / 'absent'}", "unpack cifar-100-python.tar.gz"),
    ):
        with pytest.raises(DataError) as caught:
            load(spec)
        assert message in str(caught.value)
    wrong = {"data": np.zeros((1, 3072), np.uint8), "fine_labels": [100], "coarse_labels": [0]}
    (tmp_path / "c" / "test").write_bytes(pickle.dumps(wrong))
    with pytest.raises(DataError, match="found labels from 100 to 100, expected 0 to 99"):
        load(f"cifar100:{tmp_path / 'c'}")
    (tmp_path / "c" / "test").write_bytes(pickle.dumps({**wrong, "fine_labels": [2**70]}))
    with pytest.raises(DataError, match=f"found labels from {2**70} to {2**70}, expected 0 to 99"):
        load(f"cifar100:{tmp_path / 'c'}")
    (tmp_path / "c" / "meta").write_bytes(pickle.dumps({"fine_label_names": Exploit(tmp_path / "ran")}))
    write_cifar100(tmp_path / "d", meta={"fine_label_names": Exploit(tmp_path / "ran")})
    with pytest.raises(DataError, match=r"it refers to \w+.mkdir"):
        load(f"cifar100:{tmp_path / 'd'}")
    assert not (tmp_path / "ran").exists()


# --- imagefolder


def write_images(
    folder: Path, colours: dict[str, int], count: int = 4, size: tuple[int, int] = (8, 6)
) -> None:
    for name, level in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (level, 0, 255)).save(folder / name / f"{i}.png")


PLAIN = "?mean=0,0,0&std=1,1,1"


def test_imagefolder_with_train_and_val(tmp_path):
    write_images(tmp_path / "train", {"ant": 10, "bee": 200})
    write_images(tmp_path / "val", {"bee": 200}, 3)
    data = load(f"imagefolder:{tmp_path}{PLAIN}", (3, 6, 8))
    assert (len(data.train), len(data.eval), data.num_classes) == (8, 3, 2)
    x, y = everything(data.eval)
    assert y.tolist() == [1, 1, 1]
    assert torch.equal(x[:, 0] * 255, torch.full((3, 6, 8), 200.0))
    assert "train and val" in data.description


def test_imagefolder_is_split_into_halves(tmp_path):
    write_images(tmp_path, {"ant": 10, "bee": 200})
    (tmp_path / "notes.txt").touch()
    data = load(f"imagefolder:{tmp_path}{PLAIN}", (3, 6, 8))
    assert torch.bincount(data.train.labels).tolist() == torch.bincount(data.eval.labels).tolist() == [2, 2]
    assert "fixed stratified split into halves" in data.description
    for (x,), y in data.train.batches(3, shuffle_seed=0):
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), torch.tensor([10, 200])[y])


@pytest.mark.parametrize("size", [(8, 6), (80, 30), (31, 99), (5, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_imagefolder_resizes_to_the_model(tmp_path, size, channels):
    write_images(tmp_path, {"ant": 100}, 2, size)
    options = PLAIN if channels == 3 else "?mean=0&std=1"
    x, _ = everything(load(f"imagefolder:{tmp_path}{options}", (channels, 6, 8)).eval)
    assert x.shape == (1, channels, 6, 8)
    assert float(x.std(dim=(2, 3)).max()) < 0.01


def test_the_centre_is_cropped(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 15:25] = 255
    (tmp_path / "a").mkdir()
    for name in ("1.png", "2.png"):
        Image.fromarray(pixels).save(tmp_path / "a" / name)
    x, _ = everything(load(f"imagefolder:{tmp_path}{PLAIN}", (3, 10, 10)).eval)
    assert torch.allclose(x, x.flip(3), atol=0.01)
    white = x[0, 0, 5] > 0.5  # the middle 10 of the 17.5 pixels that ten show
    assert white.tolist() == [False] * 2 + [True] * 6 + [False] * 2


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in range(3):
        Image.new("RGB", (4, 4), (80 * i, 0, 0)).save(tmp_path / f"{i:04d}_n0.jpg")
    data = load(f"imagefolder:{tmp_path}", (3, 4, 4))
    assert {len(data.train), len(data.eval)} == {1, 2} and not data.labelled and data.num_classes is None
    batches = [x for half in (data.train, data.eval) for (x,), _ in half.batches(1)]
    reds = {round(float(x[0, 0, 0, 0]), 3) for x in batches}
    assert len(reds) == 3
    with pytest.raises(DataError, match="found classes and a folder without class folders"):
        load(f"imagefolder:{tmp_path}?classes=index", (3, 4, 4))
    (tmp_path / "0000_n0.jpg").unlink()
    (tmp_path / "0001_n0.jpg").unlink()
    with pytest.raises(DataError, match="found 1 image, expected at least 2"):
        load(f"imagefolder:{tmp_path}", (3, 4, 4))


def test_a_flat_folder_of_a_split_is_no_imagefolder(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for i in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / part / f"{i:04d}_n0.jpg")
    with pytest.raises(DataError, match="found 3 images and no class folders, expected <class>/<image>"):
        load(f"imagefolder:{tmp_path}")


def test_folders_that_say_their_output_may_differ(tmp_path):
    """An image of each class: half of the classes to fit on, the others to judge by."""
    write_images(tmp_path / "train", {"0003_ant": 1, "0005_cow": 1})
    write_images(tmp_path / "val", {"0004_bee": 2, "0005_cow": 1})
    data = load_data(f"imagefolder:{tmp_path}", input_shape=(3, 4, 4), seed=0, outputs=10)
    assert set(data.train.labels.tolist()) == {3, 5}
    assert set(data.eval.labels.tolist()) == {4, 5}
    with pytest.raises(DataError, match="found class folder '0004_bee', expected only those of"):
        load_data(f"imagefolder:{tmp_path}?classes=sorted", input_shape=(3, 4, 4), seed=0)


def test_bad_imagefolder(tmp_path):
    with pytest.raises(DataError, match="found no such directory"):
        load(f"imagefolder:{tmp_path / 'absent'}")
    write_images(tmp_path / "train", {"ant": 1})
    with pytest.raises(DataError, match=r"found train alone, expected train and val \(or test\)"):
        load(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "test", {"cow": 1})
    with pytest.raises(DataError, match="found class folder 'cow', expected only those of"):
        load(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(DataError, match="cow: found no images"):
        load(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match="found a model that takes 7, expected 1xHxW or 3xHxW"):
        load(f"imagefolder:{tmp_path}", (7,))


def test_a_corrupted_image_is_named_when_it_is_due(tmp_path):
    write_images(tmp_path, {"ant": 1}, 2)
    for file in (tmp_path / "ant").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    data = load(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match=r"ant/\d.png: found an unreadable image"):
        next(data.train.batches(1))


# --- fingerprints


def test_a_fingerprint_is_of_the_samples_in_their_order():
    data = load("digits")
    whole, again = data.train.fingerprint(), load("digits").train.fingerprint()
    assert whole == again and len(whole) == 64
    reversed_ = data.train.subset(np.arange(len(data.train))[::-1].copy())
    others = [data.eval, data.train.subset(np.arange(100)), reversed_]
    assert len({whole, *(split.fingerprint() for split in others)}) == 4
    assert load("digits?limit=50", seed=1).train.fingerprint() != load("digits?limit=50").train.fingerprint()


def test_a_fingerprint_is_of_labels_too():
    data = load("digits?limit=50")
    labels = data.train.labels.clone()
    labels[3] += 1
    assert replace(data.train, labels=labels).fingerprint() != data.train.fingerprint()
    assert replace(data.train, labelled=False).fingerprint() != data.train.fingerprint()


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_a_fingerprint_sees_pixels_and_normalisation(tmp_path, kind):
    """Whatever the file is called."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (12, 4, 5, 3), dtype=np.uint8)
    x = x if kind == "uint8" else x.transpose(0, 3, 1, 2).astype(np.float32)
    changed = x.copy()
    changed[3, 2, 1, 0] += 1
    for name, pixels in (("a", x), ("b", x), ("c", changed)):
        np.savez(
            tmp_path / f"{name}.npz", x_train=pixels, y_train=np.arange(12), x_test=x, y_test=np.arange(12)
        )
    a, b, c = (load(f"npz:{tmp_path}/{name}.npz", (3, 4, 5)).train.fingerprint() for name in "abc")
    assert a == b != c
    other = load(f"npz:{tmp_path}/a.npz?mean=0.1,0.1,0.1&std=1,1,1", (3, 4, 5)).train.fingerprint()
    assert other not in (a, c)


def test_a_fingerprint_of_random_samples_follows_the_seed():
    prints = [load("random", seed=s).train.fingerprint() for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_a_fingerprint_of_images_is_of_their_files(tmp_path):
    """Path, size and time of change, without decoding them; and the size that they are brought to."""
    write_images(tmp_path, {"ant": 3, "bee": 3})
    data = load(f"imagefolder:{tmp_path}")
    before = data.train.fingerprint()
    assert load(f"imagefolder:{tmp_path}").train.fingerprint() == before
    assert load(f"imagefolder:{tmp_path}", (3, 16, 16)).train.fingerprint() != before
    for file in tmp_path.rglob("*.png"):
        os.utime(file, (0, 0))
    assert load(f"imagefolder:{tmp_path}").train.fingerprint() != before
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"no image")
    assert data.train.fingerprint() != before


def test_a_fingerprint_of_an_image_that_is_gone(tmp_path):
    write_images(tmp_path, {"ant": 3, "bee": 3})
    data = load(f"imagefolder:{tmp_path}")
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"ant/\d.png: found no file"):
        data.train.fingerprint()


def test_a_fingerprint_of_samples_that_only_a_function_knows():
    x = torch.randn(10, 3)
    splits = [Split(torch.zeros(10, dtype=torch.int64), np.arange(10), lambda i: (x[i],)) for _ in range(2)]
    before = [split.fingerprint() for split in splits]
    assert before[0] == before[1]
    x[9, 2] += 1
    assert splits[0].fingerprint() != before[0]


def test_arrays_are_hashed_once(tmp_path, monkeypatch):
    """Also of parts that are made anew at every call; other parts, and other sources, by themselves."""
    hashed = []
    identity = graphcomp.data.arrays.identity

    def counting(samples, indices, request):
        hashed.append(len(indices))
        return identity(samples, indices, request)

    monkeypatch.setattr(graphcomp.data.arrays, "identity", counting)
    train = load("digits").train
    first = [train.subset(np.arange(n)).fingerprint() for n in (50, 60, 50, 60)]
    assert hashed == [50, 60] and first[:2] == first[2:] and first[0] != first[1]
    assert train.subset(np.arange(50)[::-1].copy()).fingerprint() not in first
    assert load("digits").train.subset(np.arange(50)).fingerprint() == first[0]
    assert hashed == [50, 60, 50, 50]


@pytest.mark.parametrize("shape", [(12,), (12, 3)])
def test_npz_with_values(tmp_path, shape):
    """Floats are values to predict: halves, limits and held-out parts work without classes."""
    y = np.random.RandomState(0).randn(*shape)
    data = load(npz(tmp_path, x=images(), y=y), (3, 4, 6))
    assert data.regression and data.labelled and data.num_classes is None
    assert (len(data.train), len(data.eval)) == (6, 6)
    assert data.train.labels.dtype == torch.float32
    expected = torch.from_numpy(y[data.eval.indices]).float()
    assert torch.equal(data.eval.labels, expected) and torch.equal(everything(data.eval)[1], expected)
    train, held_out = data.train.hold_out(1 / 3)
    assert sorted([*train.indices, *held_out.indices]) == sorted(data.train.indices) and len(held_out) == 2
    assert len(load(f"{data.spec}?limit=4", (3, 4, 6)).eval) == 4
    other = load(npz(tmp_path, x=images(), y=y + 1), (3, 4, 6))
    assert other.eval.fingerprint() != data.eval.fingerprint()
    with pytest.raises(DataError, match=r"classes: found .* with values, expected whole numbers"):
        data.only([0, 1])


def test_classes_are_no_regression(tmp_path):
    assert not load(npz(tmp_path, x=images(), y=LABELS), (3, 4, 6)).regression
    assert not load("random").regression
    arrays = {"x_train": images(), "y_train": LABELS, "x_test": images(2), "y_test": np.zeros(2)}
    with pytest.raises(DataError, match="found classes in one set and values in the other"):
        load(npz(tmp_path, **arrays), (3, 4, 6))


def test_pixels_of_images_are_known(tmp_path):
    """Mean and std of bytes; floats may be anything."""
    bytes_ = load(npz(tmp_path, x=images(), y=LABELS), (3, 4, 6)).eval
    ((_, std),) = bytes_.pixels
    assert std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert load(npz(tmp_path, x=FLOATS, y=LABELS), (3, 4, 6)).eval.pixels == ()
