"""Programs as graphs of networkx: nothing is lost, and every writer takes them."""

import io
import json

import networkx as nx
import pytest
import torch
from torch import Tensor, fx, nn

from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.measure import macs, with_macs
from tests.nets import TRAPS, Net


def traced(name: str) -> Program:
    net, shape = TRAPS[name]()
    return trace(net.eval(), torch.zeros(shape))


def uses(node: fx.Node) -> list[str]:
    """The oracle: every use, in the order in which fx itself goes through arguments."""
    found: list[str] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n.name))
    return found


@pytest.mark.parametrize("name", TRAPS)
def test_nodes_are_the_programs_and_edges_are_all_uses(name: str) -> None:
    program = traced(name)
    graph = with_macs(program)
    assert list(graph) == [node.name for node in program.graph.nodes]
    assert nx.is_directed_acyclic_graph(graph)
    for node in program.graph.nodes:
        edges = list(graph.in_edges(node.name, data="operand"))
        assert sorted(source for source, _, _ in edges) == sorted(uses(node))
        assert len({operand for _, _, operand in edges}) == len(edges)
        for source, _, operand in edges:
            assert at(node, operand).name == source
        facts = graph.nodes[node.name]
        shape = program.shape(node)
        assert facts.get("shape") == (None if shape is None else "x".join(map(str, shape)))
        assert facts["op"] == node.op and facts["made_by"] == "trace" and facts["text"]
    assert sum(m for _, m in graph.nodes(data="macs", default=0)) == macs(program)
    assert all(type(v) in (str, int) for facts in everything(graph) for v in facts.values())
    assert read_again(graph) == {(a, b, json.dumps(facts)) for a, b, facts in graph.edges(data=True)}


def at(node: fx.Node, operand: str) -> fx.Node:
    """What a node has at the place that an edge names."""
    first, *rest = operand.split(".")
    value = node.args[int(first)] if first.isdecimal() else node.kwargs[first]
    for key in rest:
        if isinstance(value, slice):
            value = getattr(value, key)
        else:
            value = value[int(key)] if isinstance(value, tuple | list) else value[key]  # type: ignore[index,call-overload]
    assert isinstance(value, fx.Node)
    return value


def everything(graph: nx.MultiDiGraph) -> list[dict[str, object]]:
    return [graph.graph, *graph.nodes.values(), *(facts for _, _, facts in graph.edges(data=True))]


def read_again(graph: nx.MultiDiGraph) -> set[tuple[str, str, str]]:
    """The edges of what GraphML holds, the nodes and types of which are checked."""
    again = nx.parse_graphml("\n".join(nx.generate_graphml(graph)), force_multigraph=True)
    assert dict(again.nodes) == dict(graph.nodes) and again.graph["model"] == graph.graph["model"]
    return {(a, b, json.dumps(facts)) for a, b, facts in again.edges(data=True)}


def test_one_value_taken_twice_has_two_edges() -> None:
    program = trace(Net(lambda m, x: x + x), torch.zeros(1, 3))
    graph = program.to_networkx()
    assert sorted(graph.get_edge_data("x", "add")[key]["operand"] for key in (0, 1)) == ["0", "1"]


def test_operands_within_lists_slices_and_names_are_found() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        half = x.size(1) // 2
        return torch.cat([x[:, :half], x], dim=1).clamp(max=x.mean())

    graph = trace(Net(forward), torch.zeros(1, 6)).to_networkx()
    assert {(a, b): o for a, b, o in graph.edges(data="operand")} == {
        ("x", "size"): "0",
        ("size", "floordiv"): "0",
        ("x", "getitem"): "0",
        ("floordiv", "getitem"): "1.1.stop",
        ("getitem", "cat"): "0.0",
        ("x", "cat"): "0.1",
        ("cat", "clamp"): "0",
        ("x", "mean"): "0",
        ("mean", "clamp"): "max",
        ("clamp", "output"): "0",
    }


def test_facts_of_a_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
    graph = with_macs(trace(net.eval(), torch.zeros(1, 3, 8, 8)))
    assert graph.nodes["_0"] == {
        "op": "call_module",
        "operator": "conv2d",
        "text": "conv 3->8 k3 s1 (%input_1)",
        "target": "0",
        "made_by": "trace",
        "shape": "1x8x6x6",
        "channels": 8,
        "params": 216,
        "macs": 216 * 36,
    }
    assert [graph.nodes[n].get("channels") for n in ("_1", "_2", "_3")] == [8, None, 5]
    assert [graph.nodes[n]["params"] for n in ("_1", "_2", "_3")] == [16, 0, 288 * 5 + 5]


def test_every_writer_takes_it() -> None:
    graph = with_macs(traced("mixer"))
    for write in (nx.write_graphml_xml, nx.write_gexf, nx.write_gml):
        write(graph, io.BytesIO())
    json.dumps(nx.node_link_data(graph, edges="edges"))
