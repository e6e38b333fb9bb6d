"""Samples of networks with several inputs: from files, from Python, drawn; and what does not fit."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphcomp
from graphcomp.data import augmented
from graphcomp.data.augment import CropAndFlip, ResizedCropAndFlip
from graphcomp.data.npz import SHARE
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data
from graphcomp.errors import DataError
from graphcomp.ir.program import Program
from graphcomp.measure import require_inputs
from tests.learnable import SHAPE, make_data
from tests.several import (
    EVAL,
    NUMBERS,
    TRAIN,
    archive,
    fused,
    listed,
    samples,
    tokens,
    two_input_data,
)

KINDS = ["file", "file without labels", "order", "name", "unlabelled"]


@pytest.fixture(scope="module")
def program() -> Program:
    return fused()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_come_in_the_order_of_the_inputs(tmp_path: Path, program: Program, kind: str) -> None:
    data = two_input_data(tmp_path, kind, program)
    given = samples()
    for split, part, count in ((data.train, "train", TRAIN), (data.eval, "eval", EVAL)):
        assert len(split) == count and split.labelled == ("label" not in kind)
        seen = list(split.batches(20))
        for i, name in enumerate(("image", "numbers")):
            x = torch.cat([batch[i] for batch, _ in seen])
            assert x.dtype == torch.float32 and torch.equal(x, torch.from_numpy(given[part][name])), name
        if split.labelled:
            assert torch.equal(torch.cat([y for _, y in seen]), torch.from_numpy(given[part]["y"]))
    assert data.num_classes == (4 if data.labelled else None)


def test_one_set_is_halved(tmp_path: Path, program: Program) -> None:
    given = samples()["train"]
    np.savez(tmp_path / "d.npz", **given)
    for data in (
        load_data(f"npz:{tmp_path}/d.npz", program=program, seed=0),
        load_data(listed("name")["train"], program=program, seed=0),
    ):
        assert (len(data.train), len(data.eval)) == (48, 48)
        together = torch.cat([s.fetch(s.indices)[1] for s in (data.train, data.eval)])
        assert torch.equal(together.sort(0)[0], torch.from_numpy(given["numbers"]).sort(0)[0])


def test_every_way_of_writing_a_sample(program: Program) -> None:
    """With a label beside the inputs, in a tuple or under its name: the same as with one apart."""
    nested = listed("order")["train"]
    flat = [(image, numbers, y) for (image, numbers), y in nested]
    named = [{"label": y, "image": image, "numbers": numbers} for image, numbers, y in flat]
    expected = load_data(nested, program=program, seed=0)
    for given in (flat, named, [([a, b], y) for a, b, y in flat], _Own(flat)):
        found = load_data(given, program=program, seed=0)
        assert found.train.fingerprint() == expected.train.fingerprint()
        assert torch.equal(found.train.labels, expected.train.labels)


class _Own:
    """A dataset that is no torch one."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        image, numbers, y = self.rows[index]
        return (torch.from_numpy(image).double(), numbers.tolist()), np.int32(y)


def test_one_input_from_python() -> None:
    images, _, labels = samples()["train"].values()
    labelled = load_data(list(zip(images, labels, strict=True)), input_shape=SHAPE, seed=0)
    assert labelled.num_classes == 4
    bare = load_data(list(images), input_shape=SHAPE, seed=0)
    assert not bare.labelled and torch.equal(bare.train.fetch(np.arange(9))[0], torch.from_numpy(images[:9]))
    values = load_data(
        [(x, [0.5, y]) for x, y in zip(images, labels, strict=True)], input_shape=SHAPE, seed=0
    )
    assert values.regression and values.train.labels.shape == (48, 2)
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    assert load_data(dataset, input_shape=SHAPE, seed=0).train.fingerprint() == labelled.train.fingerprint()


def test_a_dataset_in_a_file(tmp_path: Path, program: Program) -> None:
    """By the name of a function, or of the dataset itself; with options; hashed by what is in it."""
    archive(tmp_path)
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "from pathlib import Path\n"
        "with np.load(Path(__file__).parent / 'two.npz') as file:\n    stored = dict(file)\n"
        "def rows(part):\n"
        "    names = ('image', 'numbers', 'y')\n"
        "    return list(zip(*(stored[f'{n}_{part}'] for n in names)))\n"
        "def make():\n    return {'train': rows('train'), 'eval': rows('test')}\n"
        "ready = rows('train')\n"
        "class Lazy:\n"
        "    def __len__(self): return len(ready)\n"
        "    def __getitem__(self, i): return ready[i]\n"
    )
    made = load_data(f"{tmp_path}/own.py:make", program=program, seed=0)
    assert (len(made.train), len(made.eval)) == (TRAIN, EVAL)
    assert made.train.fingerprint() == load_data(listed("order"), program=program, seed=0).train.fingerprint()
    for name in ("ready", "Lazy"):
        found = load_data(f"{tmp_path}/own.py:{name}?limit=12", program=program, seed=0)
        assert (len(found.train), len(found.eval)) == (12, 12) and found.num_classes == 4


def test_random_samples_for_every_input(program: Program) -> None:
    data = load_data("random", program=program, seed=0)
    image, numbers = data.train.fetch(data.train.indices)
    assert image.shape[1:] == SHAPE and numbers.shape[1:] == (NUMBERS,) and not data.labelled
    alone = load_data("random", input_shape=SHAPE, seed=0)
    assert torch.equal(image, alone.train.fetch(alone.train.indices)[0])  # whatever is beside it
    assert abs(float(np.corrcoef(image.flatten(1)[:, 0], numbers[:, 0])[0, 1])) < 0.4
    words, mask = (load_data("random", program=tokens(), seed=0)).train.fetch(np.arange(64))
    assert words.dtype == torch.int64 and int(words.min()) >= 0 and 15 < int(words.max()) < 20
    assert mask.dtype == torch.float32
    assert torch.isfinite(tokens()(words, mask)).all()


def test_float64_inputs_get_float64(program: Program) -> None:
    data = load_data("random", program=program.to(torch.float64), seed=0)
    assert [x.dtype for x in data.train.fetch(np.arange(2))] == [torch.float64] * 2


def test_by_name_without_a_program(tmp_path: Path) -> None:
    shapes = {"numbers": (NUMBERS,), "image": SHAPE}
    data = load_data(archive(tmp_path), input_shape=shapes, seed=0)
    assert [tuple(x.shape[1:]) for x in data.train.fetch(np.arange(2))] == [(NUMBERS,), SHAPE]


def test_an_input_may_be_called_like_labels(tmp_path: Path) -> None:
    x, y = np.ones((4, 2), np.float32), np.zeros((4, 3), np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=y, labels=np.arange(4) % 2)
    data = load_data(f"npz:{tmp_path}/d.npz", input_shape={"x": (2,), "y": (3,)}, seed=0)
    assert data.labelled and [float(t.mean()) for t in data.train.fetch(np.arange(2))] == [1, 0]
    np.savez(tmp_path / "d.npz", x=x, y=y)
    assert not load_data(f"npz:{tmp_path}/d.npz", input_shape={"x": (2,), "y": (3,)}, seed=0).labelled


def test_images_are_normalised_and_numbers_are_not(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    left, right = (rng.randint(0, 256, (8, 4, 4, c)).astype(np.uint8) for c in (3, 1))
    np.savez(tmp_path / "d.npz", left=left, right=right, n=np.ones((8, 2), np.float32))
    shapes = {"left": (3, 4, 4), "n": (2,), "right": (1, 4, 4)}
    with pytest.raises(DataError, match="one for each of the 1 channels"):
        load_data(f"npz:{tmp_path}/d.npz", input_shape=shapes, seed=0)
    spec = f"npz:{tmp_path}/d.npz?mean=0.5,0.5,0.5&std=0.25,0.25,0.25&right.mean=0.5&right.std=2"
    split = load_data(spec, input_shape=shapes, seed=0).train
    a, n, b = split.fetch(split.indices)
    expected = torch.from_numpy(left[split.indices]).permute(0, 3, 1, 2) / 255
    assert torch.allclose(a, (expected - 0.5) / 0.25, atol=1e-6)
    expected = torch.from_numpy(right[split.indices]).permute(0, 3, 1, 2) / 255
    assert torch.allclose(b, (expected - 0.5) / 2, atol=1e-6)
    assert torch.equal(n, torch.ones(4, 2))
    assert [pixels is not None for pixels in split.pixels] == [True, False, True]


def test_what_is_registered_stays_so() -> None:
    """Augmentations move all images of a sample alike, and keep the classes of a mask."""
    images = torch.rand(6, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    mask = (images * 5).long()
    beside = torch.ones(6, 2)
    for augmentation in (CropAndFlip(), ResizedCropAndFlip()):
        random = np.random.RandomState(1).random_sample((6, augmentation.numbers))
        one, other, numbers = augmented(augmentation, (images, images.clone(), beside), random)
        assert torch.equal(one, other) and not torch.equal(one, images) and numbers is beside
        (found,) = augmented(augmentation, (mask,), random)
        assert set(found.unique().tolist()) <= {0, 1, 2, 3, 4} and found.dtype == torch.int64


# ---------------------------------------------------------------------- what does not fit


IMAGE, VECTOR = np.zeros(SHAPE, np.float32), np.zeros(NUMBERS, np.float32)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((IMAGE,), "[0]: found 1 tensor(s), expected one for each of image (3x8x8), numbers (5)"),
        ((IMAGE, VECTOR, 1, 2), "found 4 tensor(s)"),
        (({"image": IMAGE}, 1), "found image, expected image (3x8x8), numbers (5)"),
        ({"image": IMAGE, "numbers": VECTOR, "mask": 1}, "found image, numbers, mask"),
        ((VECTOR, IMAGE), "[0]: image: found torch.float32 of 5, expected torch.float32 of 3x8x8"),
        ((IMAGE, VECTOR.astype(np.int64)), "numbers: found torch.int64 of 5, expected torch.float32 of 5"),
        ((IMAGE, None), "numbers: found a NoneType, expected a tensor of 5"),
        ((IMAGE, VECTOR + np.nan), "numbers: found 5 NaN or infinite values"),
        (((IMAGE, VECTOR), -1), "labels: found labels from -1"),
        (((IMAGE, VECTOR), "cat"), "labels"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(program: Program, sample: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data([sample] * 4, program=program, seed=0)
    assert message in str(caught.value)


def test_datasets_that_are_none(program: Program) -> None:
    good = listed("order")["train"]
    with pytest.raises(DataError, match=r"found a DataLoader, expected samples with len"):
        load_data(torch.utils.data.DataLoader(good), program=program, seed=0)
    with pytest.raises(DataError, match="found datasets train, val, expected train and eval"):
        load_data({"train": good, "val": good}, program=program, seed=0)
    with pytest.raises(DataError, match="labels of another kind in one set"):
        load_data({"train": good, "eval": listed("unlabelled")["eval"]}, program=program, seed=0)
    with pytest.raises(DataError, match=r"labels: .*expected one kind for all samples"):
        load_data([*good[:3], (good[0][0], [1, 2])], program=program, seed=0)
    with pytest.raises(DataError, match="labels"):
        load_data([*good[:3], good[0][0]], program=program, seed=0)
    with pytest.raises(DataError, match="found no calibration samples"):
        load_data([], program=program, seed=0)

    class Broken(_Own):
        def __getitem__(self, index: int) -> Any:
            raise KeyError("lost")

    with pytest.raises(DataError, match=r"\[0\]: found KeyError: 'lost', expected a sample"):
        load_data(Broken([1, 2]), program=program, seed=0)


def test_sources_of_one_image_say_what_the_network_takes(program: Program) -> None:
    with pytest.raises(DataError, match=r"takes image \(3x8x8\) and numbers \(5\).*npz:FILE"):
        load_data("digits", program=program, seed=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"numbers": None}, "found arrays image or y, expected image, numbers, y or image_train"),
        ({"numbers": np.zeros((5, NUMBERS), np.float32)}, "expected as many samples of every input"),
        (
            {"numbers": np.zeros((12, 4), np.float32)},
            "found samples of shape 4, expected 5 as the model takes",
        ),
        ({"image_test": np.zeros((2, *SHAPE), np.float32)}, "found arrays image or image_test"),
        ({"numbers": np.array([{}] * 12)}, "unreadable file"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, program: Program, changed: dict[str, Any], message: str
) -> None:
    given = {name: array[:12] for name, array in samples()["train"].items()} | changed
    np.savez(tmp_path / "d.npz", **{name: array for name, array in given.items() if array is not None})
    with pytest.raises(DataError) as caught:
        load_data(f"npz:{tmp_path}/d.npz", program=program, seed=0)
    assert message in str(caught.value)


def test_whole_numbers_are_checked(tmp_path: Path) -> None:
    mask = np.ones((8, 6), np.float32)
    for words, message in (
        (np.full((8, 6), 20), r"numbers from 20 to 20, expected 0 to 19, which tokens \(6\) takes"),
        (np.full((8, 6), 0.5), "found float64, expected torch.int64"),
        (np.ones((8, 6), bool), "found bool, expected torch.int64"),
        (np.ones((8, 7), np.int8), "found samples of shape 7, expected 6 as the model takes them for tokens"),
    ):
        np.savez(tmp_path / "d.npz", tokens=words, mask=mask)
        with pytest.raises(DataError, match=message):
            load_data(f"npz:{tmp_path}/d.npz", program=tokens(), seed=0)
    with pytest.raises(DataError, match=r"\[1\]: tokens: found numbers from -1 to -1, expected 0 to 19"):
        load_data([(np.full(6, 1 - 2 * i), mask[0]) for i in range(2)], program=tokens(), seed=0)
    np.savez(tmp_path / "d.npz", tokens=np.full((8, 6), 3, np.int16), mask=mask)
    found = load_data(f"npz:{tmp_path}/d.npz", program=tokens(), seed=0).train.fetch(np.arange(2))
    assert found[0].dtype == torch.int64 and int(found[0].sum()) == 36


def _hostile(path: Path, shape: str, payload: bytes) -> None:
    """An array whose header says what it likes."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    header = text.ljust(117) + "\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("x", "y"):
            stream = io.BytesIO()
            np.save(stream, np.zeros(4, np.int64))
            content = stream.getvalue()
            if name == "x":
                content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + payload
            file.writestr(f"{name}.npy", content)


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.npz"
    _hostile(path, "(4000000000000, 3)", b"\0" * 48)
    with pytest.raises(DataError, match=r"unreadable file .*x of .* bytes for float32"):
        load_data(f"npz:{path}", input_shape=(3,), seed=0)
    _hostile(path, "(4, 3)", b"\0" * 48)
    assert len(load_data(f"npz:{path}", input_shape=(3,), seed=0).train) == 2

    class Full:
        available = SHARE * 300

    monkeypatch.setattr("graphcomp.data.npz.psutil.virtual_memory", Full)
    with pytest.raises(DataError, match="of memory that are free"):
        load_data(f"npz:{path}", input_shape=(3,), seed=0)


def test_data_of_another_network_are_refused(program: Program) -> None:
    with pytest.raises(
        DataError, match=r"found 1 tensor\(s\) a sample, expected one for each of image, numbers"
    ):
        graphcomp.compile(program, "l1{ratio=0.5, multiple=1}", data=make_data())
    swapped = load_data(
        [(numbers, image) for image, numbers in listed("unlabelled")["train"]],
        input_shape={"a": (NUMBERS,), "b": SHAPE},
        seed=0,
    )
    with pytest.raises(DataError, match=r"image: found torch.float32 of shape \(5,\)"):
        require_inputs(program, swapped)


def test_data_objects_and_specs_are_taken_alike(tmp_path: Path, program: Program) -> None:
    def kept(data: Any) -> str:
        return str(graphcomp.compile(program, "pfa{energy=0.9, multiple=1}", data=data).program)

    spec = archive(tmp_path)
    loaded = graphcomp.load_data(spec, program=program, seed=0)
    assert isinstance(loaded, Data)
    assert kept(spec) == kept(loaded) == kept(listed("order"))
