"""GraphML and DOT: what other tools read is what the analysis found, whatever the names are."""

import re
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcomp.errors import OutputError
from graphcomp.inspection import grouped, inspect, write_dot, write_graphml
from graphcomp.ir import trace

HOSTILE = [
    'a"b',
    "a\\",
    'a\\"; b [label="',
    "<b>&lt;</b>",
    "]]><!--",
    "&quot;",
    "a\nb",
    "a\r\nb",
    "\\N\\G",
    "\x00\x1b[31m\ud800\uffff",
    "}",
    "日本",
]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        out: Tensor = self.head((x + x).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def residual() -> nx.MultiDiGraph:
    program = trace(Residual().eval(), torch.zeros(1, 3, 8, 8))
    return grouped(program, inspect(program))


def test_nodes_say_their_groups(residual: nx.MultiDiGraph) -> None:
    groups = {name: facts.get("groups") for name, facts in residual.nodes.items()}
    assert groups == {
        "x": None,
        "stem": "1",
        "one": "1",
        "add": "1",
        "add_1": "1",
        "mean": "1",
        "head": "2",
        "output": None,
    }
    assert residual.nodes["head"]["pinned"] == "network output"
    assert residual.nodes["stem"]["macs"] == 8 * 3 * 9 * 64


def test_graphml_is_the_graph(residual: nx.MultiDiGraph, tmp_path: Path) -> None:
    write_graphml(residual, tmp_path / "net.graphml")
    again = nx.read_graphml(tmp_path / "net.graphml", force_multigraph=True)
    assert dict(again.nodes) == dict(residual.nodes)
    assert sorted(again.edges(data="operand")) == sorted(residual.edges(data="operand"))


STRING = re.compile(r'"(?:\\.|[^"\\])*"', re.DOTALL)
"""A quoted string of Graphviz's language: any backslash keeps what is behind it."""


def dot(path: Path) -> tuple[dict[str, dict[str, str]], list[tuple[str, str]]]:
    """Nodes and edges of a DOT file, read as Graphviz's grammar has it; anything else in it is an error."""
    text = path.read_text(encoding="utf-8")
    strings = [shown(s) for s in STRING.findall(text)]
    left = STRING.sub('"', text).splitlines()
    nodes, edges = dict[str, dict[str, str]](), list[tuple[str, str]]()
    assert left[0] == 'digraph " {' and left[-1] == "}"
    taken = iter(strings[1:])
    for line in left[1:-1]:
        if line == '  " -> ";':
            edges.append((next(taken), next(taken)))
            continue
        found = re.fullmatch(r'  ("|node|edge) \[(\w+="(?:, \w+=")*)\];', line)
        assert found, line
        name = next(taken) if found[1] == '"' else found[1]
        nodes[name] = {key: next(taken) for key in re.findall(r"(\w+)=", found[2])}
    assert next(taken, None) is None
    del nodes["node"], nodes["edge"]
    return nodes, edges


def shown(quoted: str) -> str:
    """What a label shows: escapes, then entities."""
    text = re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), quoted[1:-1], flags=re.DOTALL)
    assert not re.search(r"&(?!amp;)", text)
    return text.replace("&amp;", "&")


def test_dot_is_the_graph(residual: nx.MultiDiGraph, tmp_path: Path) -> None:
    write_dot(residual, tmp_path / "net.dot")
    nodes, edges = dot(tmp_path / "net.dot")
    assert list(nodes) == list(residual)
    assert sorted(edges) == sorted(residual.edges())
    assert nodes["stem"]["label"] == "stem\nconv2d\n1x8x8x8\ngroup 1"
    assert nodes["stem"]["fillcolor"] == nodes["one"]["fillcolor"] != nodes["head"]["fillcolor"]
    assert nodes["head"]["style"] == "filled,dashed" and "pinned: network output" in nodes["head"]["tooltip"]


def legal(text: str) -> str:
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", lines)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec=None), max_size=20)))
def test_names_of_an_attacker_stay_names(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    graph = nx.MultiDiGraph(model=name)
    graph.add_node("a", operator=name, text=name, shape="1", groups="1", pinned=name)
    graph.add_node("b", operator="add", text="t")
    graph.add_edge("a", "b", operand=name)
    write_dot(graph, folder / "net.dot")
    nodes, edges = dot(folder / "net.dot")
    assert (list(nodes), edges) == (["a", "b"], [("a", "b")])
    assert nodes["a"]["label"] == "\n".join(line for line in ("a", legal(name), "1", "group 1") if line)
    assert nodes["a"]["tooltip"] == f"{legal(name)}\npinned: {legal(name)}"
    write_graphml(graph, folder / "net.graphml")
    again = nx.read_graphml(folder / "net.graphml", force_multigraph=True)
    assert legal(again.nodes["a"].get("operator", "")) == legal(name)
    assert list(again.edges()) == [("a", "b")]


@pytest.mark.parametrize(("write", "name"), [(write_graphml, "net.graphml"), (write_dot, "net.dot")])
def test_a_failure_leaves_the_old_file(
    write: Callable[[nx.MultiDiGraph, Path], None],
    name: str,
    residual: nx.MultiDiGraph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / name).write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=rf"{name}: found 'No space left on device', expected"):
        write(residual, tmp_path / name)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(name, "old")]
