"""Coupled channels as graphs of networkx: the groups are those of the analysis."""

from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

from graphcomp.channels import analyse
from graphcomp.channels.model import Channels, JoinPolicy
from graphcomp.ir.tracing import trace
from tests.nets import TRAPS

POLICIES: tuple[JoinPolicy, ...] = ("couple", "pad")


def analysed(net: nn.Module, shape: tuple[int, ...], join: JoinPolicy = "couple") -> Channels:
    return analyse(trace(net.eval(), torch.zeros(shape)), join)


@pytest.mark.parametrize("join", POLICIES)
@pytest.mark.parametrize("name", TRAPS)
def test_groups_are_those_of_the_analysis(name: str, join: JoinPolicy) -> None:
    channels = analysed(*TRAPS[name](), join)
    graph = channels.to_networkx()
    order = [node.name for node in channels.program.graph.nodes]
    assert list(graph) == [n for n in order if n in graph]
    into: dict[int, dict[str, set[str]]] = {}
    for source, node, facts in graph.edges(data=True):
        into.setdefault(facts["group"], {}).setdefault(facts["reason"], set()).add(node)
        assert source != node and facts["channels"] > 0
    made: dict[int, set[str]] = {}
    for node, groups in graph.nodes(data="groups"):
        for number in filter(None, groups.split(",")):
            made.setdefault(int(number), set()).add(node)
    producers = {axis.node for axis in channels.axes if axis.role == "out"}
    layer_at = {a.node: graph.nodes[a.node]["layer"] for a in channels.axes if a.node in graph}
    for number, group in enumerate(channels.groups, 1):
        reasons = into.get(number, {})
        tied = {n for why, nodes in reasons.items() if "ties them" in why for n in nodes}
        reads = {n for why, nodes in reasons.items() if "reads them" in why for n in nodes}
        assert set(group.coupled_by) == tied
        assert set(group.readers) == reads
        assert set(group.producers) == {layer_at[n] for n in made.get(number, set()) & producers}
        facts = [f for _, _, f in graph.edges(data=True) if f["group"] == number]
        pin = group.pinned or (None, None)
        assert {(f.get("pinned_at"), f.get("pinned"), f["name"]) for f in facts} <= {(*pin, group.name)}
    everything: list[dict[str, Any]] = [graph.graph, *graph.nodes.values()]
    everything += [facts for _, _, facts in graph.edges(data=True)]
    assert all(type(value) in (str, int) for facts in everything for value in facts.values())
    again = nx.parse_graphml("\n".join(nx.generate_graphml(graph)), force_multigraph=True)
    assert dict(again.nodes) == dict(graph.nodes) and len(again.edges) == len(graph.edges)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.two = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        x = x + self.two(torch.relu(self.bn(self.one(x))))
        return self.head(x.mean((2, 3)))


def test_a_residual_block() -> None:
    graph = analysed(Residual(), (1, 3, 8, 8)).to_networkx()
    assert {(a, b, f["group"], f["channels"], f["reason"]) for a, b, f in graph.edges(data=True)} == {
        ("stem", "one", 1, 8, "reads them"),
        ("one", "bn", 2, 12, "has parameters for each of them"),
        ("one", "two", 2, 12, "reads them"),
        ("stem", "add", 1, 8, "ties them: add"),
        ("two", "add", 1, 8, "ties them: add"),
        ("stem", "head", 1, 8, "reads them"),
    }
    assert {n: f["what"] for n, f in graph.nodes.items() if f["what"] != "layer"} == {"add": "join"}
    assert graph.nodes["head"]["pinned"] == "output: network output"
    assert {n: f["groups"] for n, f in graph.nodes.items()} == {
        "stem": "1",
        "one": "2",
        "bn": "",
        "two": "1",
        "add": "",
        "head": "3",
    }


def test_a_padded_join_makes_channels_of_its_own() -> None:
    graph = analysed(Residual(), (1, 3, 8, 8), "pad").to_networkx()
    padded = {(a, b): f["group"] for a, b, f in graph.edges(data=True) if "padded" in f["reason"]}
    assert set(padded) == {("stem", "add"), ("two", "add")} and len(set(padded.values())) == 2
    assert graph.nodes["add"]["what"] == "join"
    assert graph.nodes["add"]["groups"] not in ("", *map(str, padded.values()))
