"""What a file says of itself stays with a program, whatever is done with it, and is read as data only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graphcomp.errors import LoadError
from graphcomp.ir import Interface, Port, Program, is_same, load, save
from graphcomp.ir.saved import storage
from tests.tiny import tiny_program

SPOKEN = Interface(
    inputs=(Port(name="images:0", doc="RGB", axes={0: "N", 2: "height"}),),
    outputs=(Port(name="613", axes={0: "N"}),),
    metadata={"names": "{0: 'person', 1: 'bicycle'}", "stride": "32"},
    doc="a detector",
    graph_doc="its graph",
    opset=11,
    producer="pytorch 1.9",
    remarks=("weights of float16 are read as float32",),
)


def spoken() -> Program:
    return replace(tiny_program(), interface=SPOKEN)


def test_a_program_keeps_it() -> None:
    program = spoken()
    assert program.clone().interface == SPOKEN
    assert program.to(torch.float64).interface == SPOKEN
    program.module.train()
    assert program.in_eval_mode() is not program
    assert program.in_eval_mode().interface == SPOKEN


def test_it_is_no_part_of_what_a_program_computes() -> None:
    assert is_same(spoken(), tiny_program())
    assert spoken().fingerprint() == tiny_program().fingerprint()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    save(spoken(), tmp_path / "program")
    assert load(tmp_path / "program").interface == SPOKEN
    save(tiny_program(), tmp_path / "plain")
    assert load(tmp_path / "plain").interface == Interface()
    assert "interface" not in json.loads((tmp_path / "plain" / storage.PROGRAM_FILE).read_text())


# ---- what a stranger may have written --------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "two inputs of one": ({"inputs": [{"name": "a"}, {"name": "b"}]}, r"interface\.inputs: found 2 ports"),
    "two outputs of one": ({"outputs": [{"name": "a"}, {"name": "b"}]}, r"interface\.outputs: found 2 ports"),
    "no such axis": (
        {"inputs": [{"name": "a", "axes": {"4": "n"}}]},
        r"interface\.inputs\.0: found axis 4, expected",
    ),
    "axis from the end": ({"inputs": [{"name": "a", "axes": {"-1": "n"}}]}, r"interface\.inputs\.0\.axes"),
    "one name twice": (
        {"outputs": [{"name": "a"}, {"name": "a"}]},
        r"interface: .*found two ports called 'a'",
    ),
    "no name": ({"inputs": [{"name": ""}]}, r"interface\.inputs\.0\.name"),
    "a name without end": ({"inputs": [{"name": "a" * 5000}]}, r"interface\.inputs\.0\.name"),
    "a name that is no text": ({"inputs": [{"name": "\ud800"}]}, r"interface\.inputs\.0\.name"),
    "metadata that is no text": ({"metadata": {"a": {"b": 1}}}, r"interface\.metadata\.a"),
    "metadata without end": ({"metadata": {str(i): "" for i in range(5000)}}, r"interface\.metadata"),
    "no opset": ({"opset": -1}, r"interface\.opset"),
    "something else": ({"code": "print()"}, r"interface\.code"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_file_says_is_refused(name: str, tmp_path: Path) -> None:
    save(tiny_program(), tmp_path / "program")
    file = tmp_path / "program" / storage.PROGRAM_FILE
    interface, message = REFUSED[name]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"interface": interface}))
    with pytest.raises(LoadError, match=message):
        load(tmp_path / "program")


def test_what_would_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    other = replace(spoken(), interface=Interface(inputs=(Port(name="a"), Port(name="b"))))
    with pytest.raises(LoadError, match=r"interface\.inputs: found 2 ports, expected 1"):
        save(other, tmp_path / "program")
    assert not (tmp_path / "program").exists()


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SPOKEN.opset = 18
