"""Whose output a folder is: every way to say so, and no way to be scored by the wrong labels in silence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from graphcomp.compiler.compiler import compile_program
from graphcomp.compiler.source import load_source, open_data
from graphcomp.data.classes import folder_classes
from graphcomp.data.sources import load_data
from graphcomp.errors import DataError
from graphcomp.measure.evaluate import accuracy
from graphcomp.passes import FoldBN
from tests.tiny import traced

SYNSETS = ["n01440764", "n01443537", "n01484850"]
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("names", "outputs", "wanted", "index"),
    [
        (["ant", "bee"], 2, None, [0, 1]),
        (["ant", "bee"], None, None, [0, 1]),
        (["ant", "bee"], 2, "sorted", [0, 1]),
        (["0", "1", "2"], 3, None, [0, 1, 2]),
        (["17", "3"], 20, None, [17, 3]),
        (["17", "3"], None, None, [0, 1]),
        (["17", "3"], None, "index", [17, 3]),
        (["0017_goldfish", "0999-shark", "3 rays"], 1000, None, [17, 999, 3]),
        (["0000_n01440764", "0002_n01484850"], 1000, None, [0, 2]),
        (["2019", "2020"], 2, None, [0, 1]),
        (["1", "0"], 2, "index", [1, 0]),
        ([*map(str, sorted(map(str, range(12))))], 12, "sorted", list(range(12))),
        ([*map(str, sorted(map(str, range(12))))], 12, "index", [0, 1, 10, 11, *range(2, 10)]),
    ],
)
def test_what_names_say(names: list[str], outputs: int | None, wanted: str | None, index: list[int]) -> None:
    found = folder_classes("DIR", names, outputs, wanted)
    assert [found.index[name] for name in names] == index
    assert found.count == (outputs or max(index) + 1)


@pytest.mark.parametrize(
    ("names", "outputs", "wanted", "message"),
    [
        (
            ["ant", "bee"],
            3,
            None,
            r"found 2 class folders \('ant', 'bee'\), expected one for each of the .* 3",
        ),
        (["ant", "bee"], 3, None, r"add \?classes=FILE with a line `folder index` for each, or begin their "),
        (["ant", "bee"], 3, "sorted", "found 2 class folders"),
        (["a", "b", "c", "d"], 3, None, r"found 4 class folders \('a', 'b', 'c', …\)"),
        (["3", "03"], 10, None, "found 2 class folders"),
        (["3", "03"], 10, "index", "found some that begin with the same one"),
        (
            ["3", "x"],
            10,
            "index",
            r"found 1 without \('x'\), expected folders that begin with different numbers",
        ),
        (["3", "10"], 10, None, "found 2 class folders"),
        (["3", "10"], 10, "index", "found index 10 for folder '10', expected 0 to 9"),
        (["1" * 30], 10, None, "found 1 class folders"),
        (sorted(map(str, range(11))), 11, None, r"alphabetical order is not theirs.*\?classes=sorted"),
        (sorted(map(str, range(1, 11))), 10, None, "alphabetical order is not theirs"),
    ],
)
def test_what_names_do_not_say(names: list[str], outputs: int, wanted: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        folder_classes("DIR", names, outputs, wanted)


FILES: dict[str, tuple[str, str]] = {
    "spaces": ("m.txt", "n01440764 0\nn01443537 1\n\n# comment\nn01484850 7\n"),
    "reversed": ("m.txt", "0 n01440764\n1\tn01443537\n7, n01484850\n"),
    "csv": ("m.csv", "folder,index\nn01440764,0\nn01443537,1\nn01484850,7\n"),
    "json": ("m.json", json.dumps({"n01440764": 0, "n01443537": 1, "n01484850": 7})),
    "keras": (
        "m.json",
        json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "fish"], "7": ["n01484850", "shark"]}),
    ),
    "list": ("m.json", json.dumps(["n01440764", "n01443537", *"abcde", "n01484850"])),
    "kaggle": (
        "m.txt",
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, 2\n"
        + "".join(f"x{i} thing\n" for i in range(5))
        + "n01484850 great white shark\n",
    ),
    "lines": ("m.txt", "\n".join(["n01440764", "n01443537", *"abcde", "n01484850"])),
    "windows": ("m.txt", "\ufeffn01440764;0\r\nn01443537;1\r\nn01484850;7\r\n"),
}


@pytest.mark.parametrize("form", FILES)
def test_files_that_map(tmp_path: Path, form: str) -> None:
    name, text = FILES[form]
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = folder_classes("DIR", SYNSETS, 1000, str(tmp_path / name))
    assert [found.index[s] for s in SYNSETS] == [0, 1, 7]
    assert found.count == 1000


def test_torchvisions_file(tmp_path: Path) -> None:
    torch.save((dict.fromkeys(reversed(["m", *SYNSETS]), ("name",)), ["n01440764"]), tmp_path / "meta.bin")
    found = folder_classes("DIR", SYNSETS, 1000, str(tmp_path / "meta.bin"))
    assert [found.index[s] for s in SYNSETS] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, r"\?classes=.*absent: found no such file, expected sorted, index or a file"),
        ("m.txt", "n01440764 0\n", r"nothing about 2 of the 3 folders in DIR \('n01443537', 'n01484850'\)"),
        ("m.txt", "", "found no classes"),
        ("m.json", "{", "found an unreadable file"),
        ("m.json", '{"a": 1.5}', "found '1.5' for 'a', expected an index, a name or a list of names"),
        ("m.txt", "a 0\na 1\n", "found 'a' as 0 and as 1, expected one index"),
        ("m.json", '{"a": -1}', "expected one index from 0"),
        ("m.bin", "junk", "found an unreadable file"),
        (
            "m.txt",
            "n01440764 0\nn01443537 1\nn01484850 1000",
            "index 1000 for folder 'n01484850', expected 0 to 999",
        ),
    ],
)
def test_files_that_do_not_map(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        folder_classes("DIR", SYNSETS, 1000, str(tmp_path / name))


# ---------------------------------------------------------------------- whole data sources


def classifier(outputs: int) -> Any:
    """Says class k for images of brightness k / outputs."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, outputs))
    centres = torch.arange(outputs) / outputs
    with torch.no_grad():  # the nearest centre: 2 c x - c^2 is largest
        net[2].weight.copy_(2 * centres[:, None].repeat(1, 3) / 3)
        net[2].bias.copy_(-centres.square())
    return traced(net, 1, 3, 4, 4)


def folders(root: Path, levels: dict[str, float], count: int = 4) -> None:
    for name, level in levels.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (round(255 * level),) * 3).save(root / name / f"{i}.png")


PLAIN = "mean=0,0,0&std=1,1,1"


def test_folders_of_some_classes_are_scored_by_their_own_outputs(tmp_path: Path) -> None:
    program = classifier(10)
    folders(tmp_path / "d", {"cat": 0.7, "dog": 0.2})
    (tmp_path / "d" / "empty").mkdir()
    (tmp_path / "m.txt").write_text("cat 7\ndog 2\nempty 1\nabsent 3\n")
    with pytest.raises(DataError, match=r"found 3 class folders.*the network's 10 outputs"):
        open_data(f"imagefolder:{tmp_path}/d?{PLAIN}", program, 0)
    data = open_data(f"imagefolder:{tmp_path}/d?{PLAIN}&classes={tmp_path}/m.txt", program, 0)
    assert data.num_classes == 10 and "3 of 10 classes" in data.description
    assert set(data.eval.labels.tolist()) == set(data.train.labels.tolist()) == {2, 7}
    score = accuracy(program, data.eval)
    assert score is not None and score.value == 1


@pytest.mark.parametrize("parts", [("train", "val"), ("train", "test")])
def test_parts_may_have_different_folders_where_a_file_names_them(
    tmp_path: Path, parts: tuple[str, str]
) -> None:
    program = classifier(10)
    folders(tmp_path / parts[0], {"cat": 0.7, "dog": 0.2})
    folders(tmp_path / parts[1], {"dog": 0.2, "eel": 0.4})
    (tmp_path / "m.json").write_text('{"cat": 7, "dog": 2, "eel": 4}')
    data = open_data(f"imagefolder:{tmp_path}?{PLAIN}&classes={tmp_path}/m.json", program, 0)
    assert set(data.train.labels.tolist()) == {2, 7} and set(data.eval.labels.tolist()) == {2, 4}
    score = accuracy(program, data.eval)
    assert score is not None and score.value == 1


def test_what_the_outputs_decided_is_in_the_spec(tmp_path: Path) -> None:
    """So that the same folders read the same without the network."""
    program = classifier(10)
    folders(tmp_path, {"7_cat": 0.7, "2_dog": 0.2})
    data = open_data(f"imagefolder:{tmp_path}?{PLAIN}", program, 0)
    assert data.spec == f"imagefolder:{tmp_path}?{PLAIN}&classes=index"
    again = load_data(data.spec, input_shape=(3, 4, 4), seed=0)
    assert torch.equal(again.eval.labels, data.eval.labels) and set(again.eval.labels.tolist()) == {2, 7}
    score = accuracy(program, data.eval)
    assert score is not None and score.value == 1


def archive(path: Path, labels: list[int]) -> str:
    np.savez(path, x=np.zeros((len(labels), 3, 4, 4), np.float32), y=np.array(labels))
    return f"npz:{path}"


def test_labels_of_arrays_are_counted_too(tmp_path: Path) -> None:
    spec = archive(tmp_path / "d.npz", [0, 1, 2, 0, 1, 2])
    assert open_data(spec, classifier(3), 0).num_classes == 3
    for outputs in (2, 10):
        with pytest.raises(
            DataError, match=f"found 3 classes, expected {outputs}, .*[?]classes={outputs}; else"
        ):
            open_data(spec, classifier(outputs), 0)
    assert open_data(f"{spec}?classes=10", classifier(10), 0).num_classes == 10
    with pytest.raises(DataError, match=r"found label 2, expected 0 to 1"):
        open_data(f"{spec}?classes=2", classifier(2), 0)
    with pytest.raises(DataError, match=r"found classes='ten', expected a whole number"):
        open_data(f"{spec}?classes=ten", classifier(10), 0)


def test_every_labelled_source_is_held_to_the_outputs(tmp_path: Path) -> None:
    digits = traced(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 11)), 1, 3, 32, 32)
    with pytest.raises(DataError, match="digits: found 10 classes, expected 11, the number of the network's"):
        open_data("digits", digits, 0)
    assert open_data("random", digits, 0).num_classes is None
    data = load_data(archive(tmp_path / "d.npz", [0, 1]), input_shape=(3, 4, 4), seed=0)
    with pytest.raises(DataError, match="found 2 classes, expected 5"):  # also where it was loaded apart
        compile_program(classifier(5), [FoldBN()], data=data)


@pytest.mark.skipif(not (SHARED / "imagenet_sample").is_dir(), reason="no sample of ImageNet here")
@pytest.mark.parametrize("naming", ["{index}_{synset}", "{index}", "{synset}"])
def test_every_second_class_of_imagenet(tmp_path: Path, naming: str) -> None:
    """A network with 1,000 outputs scores what it should on the folders of 500 of them."""
    lines = []
    for file in sorted((SHARED / "imagenet_sample").glob("*.jpg")):
        index, synset = file.stem.split("_")
        folder = tmp_path / "d" / naming.format(index=index, synset=synset)
        folder.mkdir(parents=True)
        (folder / file.name).symlink_to(file)
        lines.append(f"{synset} {int(index)}")
    (tmp_path / "synsets.txt").write_text("\n".join(lines))
    weights = SHARED / "weights" / "mobilenet_v2-b0353104.pth"
    program = load_source("torchvision:mobilenet_v2", weights).program
    option = f"&classes={tmp_path}/synsets.txt" if naming == "{synset}" else ""
    if option:
        with pytest.raises(DataError, match="found 500 class folders"):
            open_data(f"imagefolder:{tmp_path}/d", program, 0)
    data = open_data(f"imagefolder:{tmp_path}/d?limit=16{option}", program, 0)
    score = accuracy(program, data.eval)
    assert score is not None and score.value > 0.5
