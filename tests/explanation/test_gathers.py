"""Gathers that passes left: which there are, in which form they are in the file, and whose time is theirs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphcomp.explanation.attribution import AttributedKernel, Source
from graphcomp.explanation.explanation import explain_bench, split
from graphcomp.explanation.gathers import ChannelPick, find_gathers, price
from graphcomp.explanation.profiling import Node, Operator, Profile
from graphcomp.factors.decompose import Factor
from graphcomp.factors.surgery import rewrite, simulate
from graphcomp.ir.program import Program
from graphcomp.onnx.export import export_onnx
from tests.explaining import bench, timing
from tests.tiny import traced


class Readers(nn.Module):
    """Three layers read one tensor, and the network has a selection of its own at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.register_buffer("order", torch.arange(16).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return torch.index_select(self.a(x) + self.b(x) + self.c(x), 1, self.order)  # type: ignore[arg-type]


def picking() -> tuple[Program, Program]:
    """a and b read the same ten channels; c reads four others; 0 to 13 are read by somebody."""
    program = traced(Readers(), 1, 3, 8, 8)
    factors = [
        Factor(layer="a", keep=list(range(10)), rank=4),
        Factor(layer="b", keep=list(range(10))),
        Factor(layer="c", keep=[10, 11, 12, 13]),
    ]
    return program, rewrite(simulate(program, factors), factors, "cc")


def test_what_passes_left_is_found_with_its_readers() -> None:
    """The tensor has 14 channels now, since nobody reads two of them. The network's own is no pass's."""
    program, result = picking()
    assert find_gathers(program) == []
    first, second = find_gathers(result)
    assert first == ChannelPick(first.node, ("a.0", "b"), "cc", 10, 14)
    assert second == ChannelPick(second.node, ("c",), "cc", 4, 14)


def test_a_network_without_gathers() -> None:
    """What one layer does not read goes with its producer, and nothing is picked."""
    program = traced(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)), 1, 3, 8, 8)
    factors = [Factor(layer="1", keep=[0, 3, 9])]
    assert find_gathers(rewrite(simulate(program, factors), factors, "cc")) == []


@pytest.mark.slow
def test_gathers_that_are_measured_now(tmp_path: Path) -> None:
    """From programs to files to traces: the node's name leads from one to the other."""
    files = tmp_path / "base.onnx", tmp_path / "new.onnx"
    programs = picking()
    for program, path in zip(programs, files, strict=True):
        export_onnx(program, path, batches=(1,))
    timed = bench(timing(2.0, 1.5, 1.5))
    found = explain_bench(timed, files, traced_runs=6, traced_seconds=0.1, program=programs[1])
    assert [(g.readers, g.channels, g.of, g.form) for g in found.gathers] == [
        (["a.0", "b"], 10, 14, "gather"),
        (["c"], 4, 14, "gather"),
    ]
    for gather in found.gathers:
        assert gather.ms is not None and gather.layout_ms is not None and gather.made_by == "cc"
        assert gather.share == pytest.approx((gather.ms + gather.layout_ms) / 1.5)
    measured = [row.new_ms for row in found.rows if row.new_operators == ["Gather"]]
    assert len(measured) == 3 and {g.ms for g in found.gathers} <= set(measured)  # and the network's own
    assert explain_bench(timed, files, traced_runs=6, traced_seconds=0.1).gathers == []


# kernels that were never run


def kernel(op: str, ms: float, reads: str, makes: str, key: str = "") -> AttributedKernel:
    node = Node(f"n_{makes}", op, "", tuple(reads.split()), tuple(makes.split()))
    operator = Operator(node, ms, "CPUExecutionProvider", (), ())
    macs = int(op == "Conv")
    sources = (Source(key, op, key, key, "cc", macs, 0, tuple(reads.split()), ()),) if key else ()
    return AttributedKernel(operator, sources, "a", "cc", key, macs, "plain")


def test_whose_time_is_a_gathers() -> None:
    """A third of the reorder that two others read, all of the one behind it, nothing of one elsewhere."""
    kernels = [
        kernel("Conv", 5.0, "x w", "y", "stem"),
        kernel("ReorderOutput", 0.3, "y", "plain"),
        kernel("Gather", 0.2, "plain index", "picked", "pick"),
        kernel("Relu", 1.0, "plain", "z", "relu"),
        kernel("Add", 1.0, "plain z", "sum", "add"),
        kernel("ReorderInput", 0.4, "picked", "blocked"),
        kernel("ReorderInput", 0.9, "sum", "other"),
        kernel("Conv", 2.0, "blocked w", "out", "a"),
        kernel("Conv", 0.5, "other m/select", "few", "choose"),
    ]
    found = [ChannelPick(node, ("a",), "cc", 4, 16) for node in ("pick", "choose", "gone", "stem")]
    pick, choose, gone, stem = price(found, kernels, 10.0)
    assert (pick.form, pick.ms, pick.layout_ms) == ("gather", 0.2, pytest.approx(0.1 + 0.4))
    assert pick.share == pytest.approx(0.07)
    assert (choose.form, choose.ms, choose.layout_ms) == ("convolution", 0.5, pytest.approx(0.9))
    for merged in (gone, stem):
        assert (merged.form, merged.ms, merged.layout_ms, merged.share) == ("merged", None, None, None)


def test_times_are_those_of_the_rows() -> None:
    """What tracing costs beyond the chain is taken off here as it is there."""
    before = [kernel("Conv", 4.2, "x w", "y", "a")]
    after = [kernel("Conv", 2.2, "x w", "y", "a"), kernel("Gather", 0.4, "y index", "z", "pick")]
    row, traced_once = timing(4.0, 2.2, 1.0), Profile((), 9, 1.0, 0.3)
    picked = [ChannelPick("pick", ("a",), "cc", 4, 16)]
    found = split(bench(row), row, (before, after), (traced_once, traced_once), picked)
    assert [(g.node, g.ms) for g in found.gathers] == [("pick", pytest.approx(0.2))]
    assert [r.new_ms for r in found.rows if r.new_operators == ["Gather"]] == [found.gathers[0].ms]
    assert found.gathers[0].share == pytest.approx(0.2 / 2.2)
