"""The graph of a program with its groups and costs, in files that other tools read: GraphML and DOT."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphcomp.base import atomic_file, write_text
from graphcomp.inspection.characters import legal
from graphcomp.inspection.inspection import Inspection
from graphcomp.ir import Program
from graphcomp.measure import with_macs

if TYPE_CHECKING:
    import networkx as nx

_SHADES = 0.618
"""Part of the colour wheel between one group and the next: neighbours differ, however many there are."""


def grouped(program: Program, inspection: Inspection) -> "nx.MultiDiGraph":
    """`with_macs(program)` whose nodes also say which groups their channels belong to.

    Args:
        program: what was inspected.
        inspection: of the program; numbers of groups are its.

    Returns:
        A graph whose nodes have `groups`, as in "1,3", and `pinned`, why they must stay, where these apply.
    """
    graph = with_macs(program)
    for row in inspection.nodes:
        groups = dict.fromkeys(str(s.group) for s in row.segments if s.group is not None)
        reasons = dict.fromkeys(s.pinned for s in row.segments if s.pinned is not None)
        graph.add_node(
            row.name,
            **({"groups": ",".join(groups)} if groups else {}),
            **({"pinned": "; ".join(reasons)} if reasons else {}),
        )
    return graph


def write_graphml(graph: "nx.MultiDiGraph", path: str | Path) -> None:
    """Write a graph as GraphML, whole or not at all; `networkx.read_graphml` reads it.

    Characters that XML cannot write are replaced by U+FFFD.

    Raises:
        OutputError: naming the file and the reason.
    """
    import networkx as nx

    shown = nx.MultiDiGraph(**_legal(graph.graph))
    shown.add_nodes_from((name, _legal(facts)) for name, facts in graph.nodes.items())
    shown.add_edges_from((a, b, _legal(facts)) for a, b, facts in graph.edges(data=True))
    with atomic_file(Path(path)) as temporary:
        nx.write_graphml_xml(shown, temporary, prettyprint=True)


def write_dot(graph: "nx.MultiDiGraph", path: str | Path) -> None:
    """Write a graph in Graphviz's language, whole or not at all: `dot -Tsvg F`.

    Each node shows its name, operator, shape and groups; what sits on one group only has its colour, and what
    is pinned a dashed border.

    Raises:
        OutputError: naming the file and the reason.
    """
    lines = [f"digraph {_quoted(str(graph.graph.get('model', '')))} {{", *_STYLE]
    lines += [f"  {_quoted(name)} [{_look(name, facts)}];" for name, facts in graph.nodes.items()]
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in graph.edges()]
    write_text(Path(path), "\n".join([*lines, "}", ""]))


_STYLE = (
    '  node [shape="box", style="filled", fillcolor="white", fontname="Helvetica", fontsize="10"];',
    '  edge [color="gray40"];',
)


def _look(name: str, facts: Mapping[str, Any]) -> str:
    groups = str(facts.get("groups", ""))
    said = [name, facts.get("operator", ""), facts.get("shape", ""), groups and f"group {groups}"]
    look = {"label": "\n".join(str(line) for line in said if line), "tooltip": str(facts.get("text", name))}
    if groups.isdecimal():
        look["fillcolor"] = f"{int(groups) * _SHADES % 1:.3f} 0.2 1"
    if "pinned" in facts:
        look |= {"style": "filled,dashed", "tooltip": f"{look['tooltip']}\npinned: {facts['pinned']}"}
    return ", ".join(f"{key}={_quoted(value)}" for key, value in look.items())


def _quoted(text: str) -> str:
    r"""A string of Graphviz's language that shows `text` as it is.

    Within quotes a quote ends the string unless a backslash is in front of it, and in labels a backslash
    begins an escape (`\N`, the node's name). So every backslash is doubled, and is one for both readers: the
    parser keeps the pair, the label shows one. New lines are `\n`. `&` begins an entity of HTML. Graphviz
    would stop at a NUL; control characters and halves of surrogate pairs are replaced.
    """
    text = legal(text).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
    return '"' + re.sub("\r\n?|\n", r"\\n", text) + '"'


def _legal(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: legal(value) if isinstance(value, str) else value for key, value in facts.items()}
