import errno
import io
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import graphcomp
from graphcomp.channels import JoinPolicy
from graphcomp.errors import OutputError
from graphcomp.inspection.drawing import write_svg
from graphcomp.inspection.inspection import Coupling, Group, Inspection, Pin, inspect, write_json
from graphcomp.inspection.layout import Skip, assign_lanes
from graphcomp.inspection.text import ending, fitting, render, some
from graphcomp.measure.cost import params_trainable
from tests.nets import TRAPS

SVG = "{http://www.w3.org/2000/svg}"


class Residual(nn.Module):
    """stem and two share their channels through the addition; one and deep are alone; head is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.two = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.deep = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = x + self.two(torch.relu(self.bn(self.one(x))))
        return self.head(self.deep(x).mean((2, 3)))


class Mixed(nn.Module):
    """A depthwise convolution, a concatenation, and a name that XML and rich's markup would choke on."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a<&'>[red]": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(3, 4, 1)})
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(12, 6, 1, groups=2)

    def forward(self, x: Tensor) -> Any:
        a = self.depthwise(self.parts["a<&'>[red]"](x))
        return self.grouped(torch.cat([a, self.parts["b"](x)], 1))


def inspected(
    net: nn.Module, join: JoinPolicy = "couple", shape: tuple[int, ...] = (1, 3, 8, 8)
) -> Inspection:
    return inspect(graphcomp.trace(net, torch.zeros(shape)), join)


@pytest.fixture(scope="module")
def residual() -> Inspection:
    return inspected(Residual())


@pytest.fixture(scope="module")
def mixed() -> Inspection:
    return inspected(Mixed())


def by_name(found: Inspection) -> dict[str, Group]:
    return {group.name: group for group in found.groups}


def text(found: Inspection, width: int = 100) -> str:
    out = io.StringIO()
    render(found, Console(file=out, width=width))
    return out.getvalue()


def picture(found: Inspection, path: Path) -> ET.Element:
    write_svg(found, path)
    return ET.fromstring(path.read_text(encoding="utf-8"))


def rows(svg: ET.Element) -> dict[str, ET.Element]:
    return {g.attrib["data-node"]: g for g in svg.iter(f"{SVG}g") if "data-node" in g.attrib}


def fills(row: ET.Element) -> list[str]:
    return [r.attrib["fill"] for r in row.iter(f"{SVG}rect") if r.attrib["class"].split()[0] == "of"]


PADDED = ("conv-used-on-two-scales", "grouped-resnext", "inplace-add", "option-a-shortcuts")
CASES: list[tuple[str, JoinPolicy]] = [(name, "couple") for name in sorted(TRAPS)]
CASES += [(name, "pad") for name in PADDED]


# ---- content


def test_an_addition_couples_both_of_its_producers(residual: Inspection) -> None:
    group = by_name(residual)["stem"]
    assert group.producers == {"stem": 8, "two": 8}
    assert group.readers == ["one", "deep"]
    assert group.coupled_by == [Coupling(node="add", what="add")]
    assert (group.channels, group.removable, group.pinned) == (8, True, None)


def test_a_layer_alone_is_coupled_with_nothing(residual: Inspection) -> None:
    group = by_name(residual)["one"]
    assert (group.producers, group.readers, group.coupled_by) == ({"one": 12}, ["two"], [])


def test_the_output_is_pinned_by_name(residual: Inspection) -> None:
    group = by_name(residual)["head"]
    assert group.pinned == Pin(node="output", reason="network output")
    assert not group.removable
    assert [(p.reason, p.nodes, p.groups, p.channels) for p in residual.pinned] == [
        ("network output", ["output"], [group.number], 5)
    ]


def test_groups_are_numbered_in_graph_order(residual: Inspection) -> None:
    assert [(g.number, g.name) for g in residual.groups] == [
        (1, "stem"),
        (2, "one"),
        (3, "deep"),
        (4, "head"),
    ]


def test_cost_of_a_group_counts_rows_and_columns_once(residual: Inspection) -> None:
    groups = by_name(residual)
    # one's rows, the normalisation, and two's columns
    assert groups["one"].params == 12 * 8 * 9 + 2 * 12 + 8 * 12 * 9
    assert groups["one"].macs == (12 * 8 * 9 + 8 * 12 * 9) * 64
    # stem with its bias, all of one (read) and two (made), deep without its bias
    assert groups["stem"].params == 8 * 27 + 8 + 12 * 8 * 9 + 8 * 12 * 9 + 6 * 8
    assert groups["head"].params == 6 * 5 + 5
    assert groups["head"].macs == 6 * 5


def test_cost_of_a_group_in_a_grouped_convolution(mixed: Inspection) -> None:
    """Its first half reads 6 channels of a; its second half reads 2 of a and 4 of b."""
    a, b = mixed.groups[0], by_name(mixed)["parts.b"]
    assert a.params == 8 * 3 + 8 + 8 * 9 + 8 + 3 * 6 + 3 * 2
    assert b.params == 4 * 3 + 4 + 3 * 4
    assert b.macs == (4 * 3 + 3 * 4) * 64


def test_convolutions_in_groups_are_named_as_couplings(mixed: Inspection) -> None:
    assert mixed.groups[0].coupled_by == [
        Coupling(node="depthwise", what="conv 8->8 k3 s1 g8 (depthwise)"),
        Coupling(node="grouped", what="conv 12->6 k1 s1 g2 (grouped)"),
    ]


def test_totals_are_those_of_the_counters(residual: Inspection) -> None:
    assert residual.totals.params_trainable == params_trainable(
        graphcomp.trace(Residual(), torch.zeros(1, 3, 8, 8))
    )
    assert residual.totals.macs == sum(row.macs for row in residual.layers)
    assert residual.totals.channels_removable == 8 + 12 + 6
    assert residual.totals.channels_pinned == 5
    assert [row.name for row in residual.layers] == ["stem", "one", "two", "deep", "head"]


def test_nodes_say_what_they_are_and_which_groups_they_carry(mixed: Inspection) -> None:
    nodes = {node.name: node for node in mixed.nodes}
    cat = nodes["cat"]
    assert (cat.kind, cat.op, cat.shape) == ("cat", "cat ([%depthwise, %parts_b], 1)", (1, 12, 8, 8))
    assert [(s.group, s.channels) for s in cat.segments] == [(1, 8), (by_name(mixed)["parts.b"].number, 4)]
    assert [(s.group, s.channels, s.pinned) for s in nodes["x"].segments] == [(None, 3, "network input")]


def test_padded_joins_are_derived_sums() -> None:
    found = inspected(Residual(), "pad")
    (total,) = [group for group in found.groups if group.derived]
    assert total.coupled_by == [Coupling(node="add", what="add (padded)")]
    assert (total.producers, total.readers, total.removable) == ({}, ["deep"], False)
    assert by_name(found)["two"].producers == {"two": 8}
    assert found.totals.channels_derived == 8


@pytest.mark.parametrize(("name", "join"), CASES)
def test_every_trap_adds_up_and_can_be_drawn(name: str, join: JoinPolicy, tmp_path: Path) -> None:
    net, shape = TRAPS[name]()
    found = inspected(net.eval(), join, shape)
    total = found.totals
    held = total.channels_removable + total.channels_pinned + total.channels_derived
    assert sum(group.channels for group in found.groups) == held
    for node in found.nodes:
        if node.segments:
            assert sum(s.channels for s in node.segments) in (node.shape or ())
    parameters = sum(p.numel() for p in net.parameters())
    assert all(0 <= g.params <= parameters and 0 <= g.macs <= total.macs for g in found.groups)
    drawn = picture(found, tmp_path / "net.svg")
    ends = {node.name for node in found.nodes if node.kind in ("input", "output")}
    assert ends <= rows(drawn).keys()


# ---- text


def test_tables_fit_100_columns_and_show_the_facts(residual: Inspection) -> None:
    shown = text(residual)
    assert max(map(len, shown.splitlines())) <= 100
    for fact in (
        "stem, two",
        "coupled by add",
        "network output",
        "4 head",
        "26 channels removable in 3 groups, 5",
    ):
        assert fact in " ".join(shown.split())


def test_names_are_not_markup(mixed: Inspection) -> None:
    assert "parts.a<&'>[red]" in text(mixed)


def test_long_lists_are_shortened() -> None:
    assert some(["a", "b", "c", "d"]) == "a, b +2 more"
    assert some(["a", "b"]) == "a, b"
    assert fitting(["aaaa", "bbbb", "c" * 9], 18) == "aaaa, bbbb +1 more"
    assert fitting(["aaaa", "bbbb", "cccc"], 3) == "aaaa +2 more"
    assert ending("one.two.three.four", 12) == "\N{HORIZONTAL ELLIPSIS}three.four"


# ---- files


def test_json_round_trip(mixed: Inspection, tmp_path: Path) -> None:
    write_json(mixed, tmp_path / "inspection.json")
    written = (tmp_path / "inspection.json").read_text(encoding="utf-8")
    assert Inspection.model_validate_json(written) == mixed
    assert json.loads(written)["groups"][0]["name"] == "parts.a<&'>[red]"


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("write", "name"), [(write_json, "net.json"), (write_svg, "net.svg")])
def test_a_full_disk_leaves_the_old_file(
    write: Callable[[Inspection, Path], None],
    name: str,
    residual: Inspection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=rf"{name}: found 'No space left on device', expected"):
        write(residual, tmp_path / name)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(name, "old")]


# ---- picture


def test_every_layer_and_join_has_one_row_and_one_box(residual: Inspection, tmp_path: Path) -> None:
    drawn = rows(picture(residual, tmp_path / "net.svg"))
    assert list(drawn) == ["x", "stem", "one", "two", "add", "deep", "head", "output"]
    boxes = {
        n: [r for r in row.iter(f"{SVG}rect") if r.attrib["class"].startswith("box")]
        for n, row in drawn.items()
    }
    assert all(len(found) == 1 for found in boxes.values())
    tops = [float(found[0].attrib["y"]) for found in boxes.values()]
    assert tops == sorted(set(tops))


def test_other_nodes_are_named_in_the_row_they_follow(residual: Inspection, tmp_path: Path) -> None:
    row = rows(picture(residual, tmp_path / "net.svg"))["one"]
    assert "conv 8 \N{RIGHTWARDS ARROW} 12 k3 s1, bn, relu" in [t.text for t in row.iter(f"{SVG}text")]


def test_coupled_layers_share_a_colour_that_no_other_has(residual: Inspection, tmp_path: Path) -> None:
    drawn = rows(picture(residual, tmp_path / "net.svg"))
    assert fills(drawn["stem"]) == fills(drawn["two"]) == fills(drawn["add"])
    assert len({fills(drawn[name])[0] for name in ("stem", "one", "deep", "head")}) == 4
    assert fills(drawn["head"]) == fills(drawn["x"]) == ["url(#pinned)"]
    assert "pinned: network output" in "".join(drawn["head"].itertext())


def test_a_concatenation_shows_its_parts_in_proportion(mixed: Inspection, tmp_path: Path) -> None:
    drawn = rows(picture(mixed, tmp_path / "net.svg"))
    parts = [r for r in drawn["cat"].iter(f"{SVG}rect") if r.attrib["class"].split()[0] == "of"]
    first, second = (float(r.attrib["width"]) for r in parts)
    assert first / second == pytest.approx(2, rel=1e-3)
    assert fills(drawn["cat"]) == fills(drawn["depthwise"]) + fills(drawn["parts_b"])


def test_names_are_escaped_and_nothing_is_fetched(mixed: Inspection, tmp_path: Path) -> None:
    drawn = picture(mixed, tmp_path / "net.svg")
    assert "parts.a<&'>[red]" in [t.text for t in drawn.iter(f"{SVG}text")]
    written = (tmp_path / "net.svg").read_text(encoding="utf-8").replace(SVG[1:-1], "")
    assert "http" not in written
    assert "<script" not in written


def test_characters_that_xml_cannot_write_are_replaced(mixed: Inspection, tmp_path: Path) -> None:
    group = mixed.groups[0].model_copy(update={"name": "a\x00\x1b[2Jb"})
    drawn = picture(mixed.model_copy(update={"groups": [group, *mixed.groups[1:]]}), tmp_path / "net.svg")
    assert "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[2Jb" in [
        t.text for t in drawn.iter(f"{SVG}text")
    ]


def test_skips_that_overlap_get_lanes_of_their_own() -> None:
    skips = [Skip(*skip) for skip in [(0, [9]), (1, [3, 5]), (2, [4]), (5, [8]), (6, [7])]]
    lanes = assign_lanes(skips)
    for a in skips:
        for b in skips:
            if a is not b and a.source < b.readers[-1] and b.source < a.readers[-1]:
                assert lanes[a.source] != lanes[b.source]
    assert lanes[2] == 0  # the shortest is innermost
    assert lanes[1] == lanes[5]  # one ends where the other begins
    assert lanes[0] == max(lanes.values()) == 2


def test_hovering_explains_a_row_in_full(residual: Inspection, tmp_path: Path) -> None:
    title = rows(picture(residual, tmp_path / "net.svg"))["two"].find(f"{SVG}title")
    assert title is not None
    assert title.text == (
        "two: conv 12->8 k3 s1 (%relu)\n864 params, 55,296 MACs a sample\n"
        "8 of group 1 stem (8 channels): coupled by add"
    )
