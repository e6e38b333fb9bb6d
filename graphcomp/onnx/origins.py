"""Where each node of a file comes from: tags that survive the exporter, and metadata that says it.

Every ONNX node carries `graphcomp.module` (module path, or the fx node's name for a function),
`graphcomp.node` (the fx node's name: a module that is called twice has two) and `graphcomp.pass` (the pass
that made or last changed it). The tags travel in `node.meta["custom"]`, which torch.export and its
decompositions preserve. Names of weights would not do: the exporter merges equal initialisers, so a BatchNorm
can end up reading another one's bias. A Conv into which the exporter folded a BatchNorm comes tagged as the
BatchNorm and is traced back to its convolution. What the exporter itself writes (source paths of this
machine, dumps of fx nodes; 2.6 % of a ShuffleNet's file) is dropped.
"""

import ast
import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from onnx import ModelProto
from torch import fx
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from graphcomp.ir import PASS_KEY, Program
from graphcomp.onnx.weights import Rebuilt
from graphcomp.runtime import HEAVY

MODULE_PROP = "graphcomp.module"
NODE_PROP = "graphcomp.node"
PASS_PROP = "graphcomp.pass"

TAG = "graphcomp"
# Operators whose ONNX form is merged into the heavy node before it, which then carries their tag.
_ABSORBED = re.compile(r"aten::(\w*batch_norm\w*|add|sub|mul|div)")
_MULTIPLIES = re.compile(r"aten::(conv\w*|linear|addmm|mm|bmm|baddbmm|matmul|mv|dot|einsum)")


@dataclass(frozen=True)
class Origin:
    """Where an ONNX node comes from, as it is written into the file."""

    module: str
    node: str
    made_by: str


def node_tags(result: ONNXProgram) -> dict[str, str]:
    """The fx node of every node by name; makes names of nodes and values unique on the way.

    A node that came without a tag belongs to its nearest neighbour that has one, readers first.
    """
    # The exporter names outputs without looking whether a value inside has that name already.
    ir_passes.NameFixPass()(result.model)
    aten = {n.name: n for n in cast(ExportedProgram, result.exported_program).graph.nodes}
    nodes: list[ir.Node] = list(result.model.graph)
    tags = {node: tag for node in nodes if (tag := _tag(node, aten)) is not None}
    for node in reversed(nodes):
        _inherit(node, node.successors(), tags)
    for node in nodes:
        _inherit(node, node.predecessors(), tags)
    return {cast(str, node.name): tags.get(node, "output") for node in nodes}


def origin_of(node: fx.Node) -> Origin:
    """What a file says of what was made for an fx node."""
    module = cast(str, node.target) if node.op == "call_module" else node.name
    return Origin(module, node.name, str(node.meta.get(PASS_KEY, "trace")))


def _inherit(node: ir.Node, neighbours: Sequence[ir.Node], tags: dict[ir.Node, str]) -> None:
    near = next((tags[n] for n in neighbours if n in tags), None)
    if near is not None:
        tags.setdefault(node, near)


def _tag(node: ir.Node, aten: Mapping[str, fx.Node]) -> str | None:
    """The name of the fx node that an ONNX node was made for; None if the exporter does not say."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    names = [ast.literal_eval(scopes)[-1]] if scopes else []
    # Rewritten nodes lose their metadata, but their outputs keep the name, Split's with a suffix.
    names += [re.sub(r"_split_\d+$", "", value.name) for value in node.outputs if value.name]
    source = next((aten[name] for name in names if name in aten), None)
    if source is None:
        return None
    if node.op_type in HEAVY and _ABSORBED.fullmatch(_operator(source)):
        source = _multiplication_before(source) or source
    return _tag_of(source)


def _tag_of(node: fx.Node) -> str | None:
    return cast("str | None", node.meta.get("custom", {}).get(TAG))


def _operator(node: fx.Node) -> str:
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""


def _multiplication_before(node: fx.Node) -> fx.Node | None:
    """The nearest convolution, linear layer or matrix product that `node` depends on."""
    level = dict.fromkeys(node.all_input_nodes)
    while level:
        for candidate in level:
            if _MULTIPLIES.fullmatch(_operator(candidate)):
                return candidate
        level = dict.fromkeys(source for n in level for source in n.all_input_nodes)
    return None


def tags_of(exported: ExportedProgram) -> dict[str, str]:
    """Operator name → fx name, before and after decomposition, for error messages."""
    nodes = list(exported.graph.nodes)
    # May fail for the reason that the export did; then the message has the operator's own name.
    with contextlib.suppress(Exception):
        nodes += exported.run_decompositions().graph.nodes
    return {node.name: tag for node in nodes if (tag := _tag_of(node)) is not None}


def origins_of_weights(program: Program, rebuilt: Rebuilt) -> dict[str, Origin | None]:
    """The layer for the node that yields its weight; None for those before it, which several layers share."""
    readers = {n.target: n for n in reversed(program.graph.nodes) if n.op == "call_module"}
    inner: dict[str, Origin | None] = dict.fromkeys(rebuilt.nodes)
    return inner | {name: origin_of(readers[target]) for target, name in rebuilt.last.items()}


def annotate(model: ModelProto, origins: Mapping[str, Origin | None]) -> None:
    """Replace all metadata and documentation strings of the model by the origins of its nodes."""
    graph = model.graph
    for item in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for node in graph.node:
        origin = origins[node.name]
        if origin is None:
            continue
        for key, value in (
            (MODULE_PROP, origin.module),
            (NODE_PROP, origin.node),
            (PASS_PROP, origin.made_by),
        ):
            node.metadata_props.add(key=key, value=value)


def place_of(error: BaseException, program: Program, tags: Mapping[str, str] | None = None) -> str:
    """The module or node that an error speaks of; "export" if it names none."""
    match = re.search(r"(?:While executing|translating node) %(\w+)", str(error))
    if match is None:
        return "export"
    name = (tags or {}).get(match[1], match[1])
    node = next((n for n in program.graph.nodes if n.name == name), None)
    return f"{origin_of(node).module} ({match[1]})" if node is not None and node.op == "call_module" else name
