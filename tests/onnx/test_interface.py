"""Names, metadata, doc strings and open axes of a program are in its file, and work there."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import ValueInfoProto
from torch import Tensor, nn

from graphcomp.errors import ExportError, LoadError
from graphcomp.ir import Interface, Port, Program, trace
from graphcomp.onnx import Dynamic, export_onnx, read_onnx
from graphcomp.onnx.interface import HISTORY_PROP, read_history
from tests.tiny import traced


class Skip(nn.Module):
    """An encoder, a decoder that is as large as what it is joined with, and scores that peak at 8e-6."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.c = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(x)
        b = F.interpolate(self.b(a), size=a.shape[-2:], mode="bilinear")
        y = self.c(torch.cat([a, b], 1))
        return y, torch.sigmoid(y - 16)


class Flat(nn.Module):
    """Linear on a map of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8 * 16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))  # type: ignore[no-any-return]


class Last(nn.Module):
    """Channels last, in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


SPOKEN = Interface(
    inputs=(Port(name="images:0", doc="RGB", axes={0: "N b", 2: "h?", 3: "w"}),),
    outputs=(Port(name="613", doc="boxes"), Port(name="scores/all")),
    metadata={"names": "{0: 'person'}", "stride": "32"},
    doc="a detector",
    graph_doc="its graph",
    opset=20,
)


def shape(value: ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def spoken() -> Program:
    program = replace(traced(Skip(), 1, 3, 32, 32), interface=SPOKEN)
    return replace(program, history=({"name": "l1", "summary": "half", "evidence": {"scores": [1]}},))


@pytest.mark.slow
def test_what_a_file_said_of_itself_is_in_the_file_again(tmp_path: Path) -> None:
    program = spoken()
    record = export_onnx(program, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert [v.name for v in model.graph.input] == ["images:0"]
    assert [v.name for v in model.graph.output] == ["613", "scores/all"]
    assert shape(model.graph.input[0]) == ["N b", 3, "h?", "w"]
    assert [v.doc_string for v in (*model.graph.input, *model.graph.output)] == ["RGB", "boxes", ""]
    assert (model.doc_string, model.graph.doc_string) == ("a detector", "its graph")
    assert (record.opset, model.opset_import[0].version) == (20, 20)
    props = {p.key: p.value for p in model.metadata_props}
    assert read_history(props.pop(HISTORY_PROP)) == ({"name": "l1", "summary": "half"},)
    assert props == SPOKEN.metadata
    assert list(record.parity) == ["1", "2", "5", "3x64x96", "3x96x32", "3x39x43"]
    again = read_onnx(tmp_path / "m.onnx", {"images:0": (1, 3, 32, 32)})
    told = again.interface
    assert (told.metadata, told.doc, told.graph_doc) == (SPOKEN.metadata, SPOKEN.doc, SPOKEN.graph_doc)
    assert (told.inputs, told.opset) == (SPOKEN.inputs, 20)
    assert [(p.name, p.doc) for p in told.outputs] == [("613", "boxes"), ("scores/all", "")]
    assert again.history == ({"name": "l1", "summary": "half"},)
    # at a size that nobody compared at
    x = torch.randn(3, 3, 48, 80, generator=torch.Generator().manual_seed(3))
    found = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    y, scores = found.run(["613", "scores/all"], {"images:0": x.numpy()})
    expected, tiny = (t.detach().numpy() for t in program(x))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert tiny.max() < 8e-6 and scores.max() < 8e-6
    # at one whose halves are rounded: the skip says what is resized to, and not the input
    x = torch.randn(1, 3, 45, 37, generator=torch.Generator().manual_seed(4))
    (y,) = found.run(["613"], {"images:0": x.numpy()})
    np.testing.assert_allclose(again(x)[0].detach().numpy(), y, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "size", "dynamic", "found"),
    [
        (Skip, (1, 3, 32, 32), ("batch", "height", "width"), ["batch", 3, "height", "width"]),
        (Skip, (1, 3, 32, 32), ("width",), [1, 3, 32, "width"]),
        (Skip, (1, 3, 32, 32), (), [1, 3, 32, 32]),
        (Last, (1, 32, 32, 3), ("batch", "height", "width"), ["batch", "height", "width", 3]),
    ],
)
def test_sizes_are_open_on_request(
    net: type[nn.Module], size: tuple[int, ...], dynamic: Sequence[Dynamic], found: list[Any], tmp_path: Path
) -> None:
    export_onnx(traced(net(), *size), tmp_path / "m.onnx", dynamic=dynamic)
    assert shape(onnx.load(tmp_path / "m.onnx").graph.input[0]) == found


def test_the_node_that_bakes_a_size_in_is_named(tmp_path: Path) -> None:
    text = r"^head \(head\): found .*, expected a network that runs at batch 2 and size 3x64x96; .* dynamic"
    with pytest.raises(ExportError, match=text):
        export_onnx(traced(Flat(), 1, 3, 32, 32), tmp_path / "m.onnx", dynamic=("batch", "height", "width"))
    assert not (tmp_path / "m.onnx").exists()


def test_vectors_have_no_height(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"dynamic: found height for inputs of \[2\] dimensions"):
        export_onnx(traced(nn.Linear(3, 4), 1, 3), tmp_path / "m.onnx", dynamic=("height",))


def test_an_interface_of_another_network_is_refused(tmp_path: Path) -> None:
    other = replace(traced(nn.Linear(3, 4), 1, 3), interface=SPOKEN)
    with pytest.raises(ExportError, match=r"interface\.inputs\.0: found axis 2, expected one of 2"):
        export_onnx(other, tmp_path / "m.onnx")


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "nul",
        "[" * 100_000,
        json.dumps([{"a": deep(300)}]),
        '[{"a": "' + "b" * (1 << 20) + '"}]',
    ],
)
def test_a_history_that_no_program_has_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match=r"metadata 'graphcomp\.history': found"):
        read_history(text)


@pytest.mark.slow
def test_a_history_without_end_is_shortened(tmp_path: Path) -> None:
    plan = {"name": "pfa", "summary": "s", "decisions": {"drop": "0" * (1 << 20)}}
    export_onnx(replace(traced(nn.Linear(3, 4), 1, 3), history=(plan,)), tmp_path / "m.onnx")
    (entry,) = onnx.load(tmp_path / "m.onnx").metadata_props
    assert read_history(entry.value) == ({"name": "pfa", "summary": "s"},)


def test_sizes_that_the_network_was_specialised_to_are_not_opened(tmp_path: Path) -> None:
    """At other sizes program and file would agree, and both be another network than the module."""

    class Enlarged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.conv(x), size=(int(x.shape[2] * 1.5), int(x.shape[3] * 1.5)))

    program = trace(Enlarged().eval(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ExportError, match=r"height or width .*\(specialised by Enlarged:\d+\)"):
        export_onnx(program, tmp_path / "x.onnx", dynamic=("batch", "height", "width"))
    assert not (tmp_path / "x.onnx").exists()
    export_onnx(program, tmp_path / "x.onnx")
