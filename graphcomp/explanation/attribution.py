"""Which layer and which pass every operator of the runtime comes from.

The runtime renames what it fuses and rewrites: a convolution in the blocked layout is called after the tensor
that it makes (`relu_3_nchwc`), whatever it does on the way (`conv`, `conv + relu`, `conv + add + relu`).
Going back takes three steps, on names and on how the graph hangs together, never on the order of nodes:

1. An operator belongs to the exported node of its name, or to the one that makes the tensor that it is called
   after, or to the one whose 8 bit weight it reads, or to the one whose output it has.
2. A convolution or matrix product that no operator belongs to was fused with what reads it.
3. Any other node that is left was fused into what it reads; an addition into that operand whose operator
   takes a tensor more.

What the runtime adds by itself (reorders between layouts, copies between devices) belongs to no node of the
file.
The exported node says the rest in its metadata (`onnx.origins`): module, fx node and pass. Files of other
exporters have none of it: there the origins are given, if the file is compared with what was made from it
(`onnx.origins_in`); else a node is its own layer. No pass is to blame then.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from graphcomp.errors import BenchError
from graphcomp.explanation.profiling import Operator, Profile
from graphcomp.explanation.quantised import ROUNDING, dequantised
from graphcomp.onnx import MODULE_PROP, NODE_PROP, PASS_PROP, SELECT, Origin
from graphcomp.runtime import NodeWork, OnnxFile, node_work

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["AttributedKernel", "Source", "attribute"]

N = TypeVar("N", str, int)

BLOCKED = "com.microsoft.nchwc"
ADDED = frozenset({"ReorderInput", "ReorderOutput", "MemcpyFromHost", "MemcpyToHost"})
EIGHT_BITS = frozenset({"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger"})
ROUNDED = "8 bits"
"""The form of operators that read or make bytes."""
NOT_A_PASS = frozenset({"", "trace"})
TENSOR_CORES = re.compile(r"tensorop|hmma|imma|s1688|s16816|s884|tf32|wgmma", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One node of the exported file.

    Attributes:
        key: the fx node's name, the same in both files for what is the same.
        module: path of the module, or the fx node's name for a function.
        made_by: the pass that made or last changed it; None if none did.
        macs, elements: see `runtime.onnxfile.NodeWork`; 0 for what only rounds.
        weight: the stored tensor of 8 bits that its weight is dequantised from; empty for others.
    """

    name: str
    op: str
    key: str
    module: str
    made_by: str | None
    macs: int
    elements: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: str = ""

    @property
    def selects(self) -> bool:
        """Whether it multiplies only to pick channels (`onnx.selection`)."""
        return self.macs > 0 and any(name.endswith(SELECT) for name in self.inputs[1:2])


@dataclass(frozen=True)
class AttributedKernel:
    """One operator of the runtime and where it comes from.

    Attributes:
        operator: with its time.
        sources: the exported nodes that it computes, in the order of the file; none of what was added.
        layer: module path of the convolution or matrix product that it is, or that comes before it; one that
            only picks channels is none.
        made_by: the pass that made or last changed it or, if none did, the nearest thing that it depends on.
        carries: key of the last node that is computed once it is done; of what was added, of the value that
            it moves.
        computed: multiply-accumulates that are carried out, whole blocks of channels included.
        form: how it computes: blocked, plain or in 8 bits on CPUs, on which cores on GPUs.
    """

    operator: Operator
    sources: tuple[Source, ...]
    layer: str
    made_by: str | None
    carries: str
    computed: int
    form: str

    @property
    def ms(self) -> float:
        """Milliseconds of one run."""
        return self.operator.ms

    @property
    def macs(self) -> int:
        """Multiply-accumulates that the network asks for."""
        return sum(s.macs for s in self.sources)

    @property
    def selects(self) -> bool:
        """Whether it multiplies only to pick channels."""
        return self.main is not None and self.main.selects

    @property
    def main(self) -> Source | None:
        """The exported node that it is named after: the one that multiplies, or the first."""
        return _main(self.sources)


def attribute(
    file: OnnxFile,
    profile: Profile,
    batch: int,
    multiple: int = 1,
    origins: Mapping[str, Origin] | None = None,
) -> list[AttributedKernel]:
    """Every operator of a profile with its layer and pass.

    Args:
        file: what was profiled.
        profile: of the file at this batch.
        batch: samples a run.
        multiple: what a GPU's kernels round channels up to; on CPUs the trace shows it.
        origins: of nodes that do not say it themselves, by their first output.

    Raises:
        BenchError: naming a convolution or matrix product that cannot be found in the runtime's graph.
    """
    stored = dequantised(file.model)
    sources = [_source(work, origins or {}, stored) for work in node_work(file, batch)]
    operators = profile.operators
    owners = _Owners(sources, operators).find()
    lost = next((s for s in sources if s.macs and s.name not in owners), None)
    if lost is not None:
        raise BenchError(
            f"{file.path}: found no operator of the runtime that computes {lost.op} {lost.name!r}, expected "
            "one; give every node a name of its own, as graphcomp's exports have"
        )
    of: dict[int, list[Source]] = defaultdict(list)
    for source in sources:
        if source.name in owners:
            of[owners[source.name]].append(source)
    graph = _Graph(operators, [tuple(of[i]) for i in range(len(operators))])
    return [
        AttributedKernel(
            o, s, graph.layer(i), graph.pass_of(i), graph.carries(i), _computed(o, s, multiple), _form(o)
        )
        for i, (o, s) in enumerate(zip(operators, graph.sources, strict=True))
    ]


def _source(work: NodeWork, origins: Mapping[str, Origin], stored: Mapping[str, str]) -> Source:
    node = work.node
    name = node.name or node.output[0]
    given = origins.get(node.output[0], Origin(name, name, ""))
    said = {p.key: p.value for p in node.metadata_props}
    made_by = said.get(PASS_PROP, given.made_by)
    return Source(
        name=name,
        op=node.op_type,
        key=said.get(NODE_PROP, given.node),
        module=said.get(MODULE_PROP, given.module),
        made_by=None if made_by in NOT_A_PASS else made_by,
        macs=work.macs,
        elements=0 if node.op_type in ROUNDING else work.elements,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        weight=stored.get(node.input[1], "") if work.macs else "",
    )


def _main(sources: Sequence[Source]) -> Source | None:
    return next((s for s in sources if s.macs), sources[0] if sources else None)


class _Owners:
    """The search for the operator of every exported node."""

    def __init__(self, sources: Sequence[Source], operators: Sequence[Operator]) -> None:
        self.sources, self.operators = sources, operators
        self.named = {s.name: s for s in sources}
        self.makers = {tensor: s for s in sources for tensor in s.outputs}
        self.weights = {s.weight: s for s in sources if s.weight}
        made = {s.name: [self.makers[t].name for t in s.inputs if t in self.makers] for s in sources}
        self.flow = _flow(made)
        self.owners: dict[str, int] = {}

    def find(self) -> dict[str, int]:
        """Name of an exported node -> index of its operator."""
        for naming in (self._by_name, self._by_weight, self._by_output):
            for index, operator in enumerate(self.operators):
                source = naming(operator)
                if source is not None:
                    self.owners.setdefault(source.name, index)
        named = dict(self.owners)
        for source in self.sources:
            if source.macs and source.name not in self.owners:
                self._settle(source, self._behind(source, named))
        for source in self.sources:
            if not source.macs and source.name not in self.owners:
                self._settle(source, self._before(source))
        return self.owners

    def _settle(self, source: Source, owner: int | None) -> None:
        if owner is not None:
            self.owners[source.name] = owner

    def _by_name(self, operator: Operator) -> Source | None:
        node = operator.node
        same = self.named.get(node.name)
        made = re.fullmatch(r"(.+?)_nchwc(_token_\d+)?", node.name)
        return same or (self.makers.get(made[1]) if made and node.domain == BLOCKED else None)

    def _by_weight(self, operator: Operator) -> Source | None:
        return next((self.weights[t] for t in operator.node.inputs if t in self.weights), None)

    def _by_output(self, operator: Operator) -> Source | None:
        node = operator.node
        if node.op in ADDED or node.op == "Transpose" or node.name in self.named:
            return None
        made = (self.makers.get(tensor) for tensor in node.outputs)
        return next((s for s in made if s is not None and s.name not in self.owners), None)

    def _behind(self, source: Source, named: Mapping[str, int]) -> int | None:
        """The nearest operator that computes a reader."""
        behind = _from(self.flow, source.name)
        return next((named[reader] for reader in behind if reader in named), None)

    def _before(self, source: Source) -> int | None:
        """The operator of what it reads."""
        made = [self.makers[tensor] for tensor in source.inputs if tensor in self.makers]
        owners = [self.owners[s.name] for s in made if s.name in self.owners]
        operands = [sum(map(bool, self.operators[i].node.inputs)) for i in owners]
        return owners[operands.index(max(operands))] if owners else None


class _Graph:
    """The runtime's graph: what comes before and behind an operator."""

    def __init__(self, operators: Sequence[Operator], sources: Sequence[tuple[Source, ...]]) -> None:
        self.operators, self.sources = operators, sources
        maker = {tensor: i for i, o in enumerate(operators) for tensor in o.node.outputs}
        self.flow = _flow(
            {i: [maker[t] for t in o.node.inputs if t in maker] for i, o in enumerate(operators)}
        )

    def layer(self, index: int) -> str:
        """Module path of the nearest convolution or matrix product, itself or before it."""
        found = self._nearest(index, self._own_layer)
        return found or "input"

    def _own_layer(self, index: int) -> str | None:
        made = self.sources[index]
        return next((s.module for s in made if s.macs and not s.selects), None)

    def carries(self, index: int) -> str:
        """Key of the exported node whose value it makes or moves."""
        found = self._nearest(index, lambda i: self.sources[i][-1].key if self.sources[i] else None)
        return found or "input"

    def pass_of(self, index: int) -> str | None:
        """A reorder into plain layout is due to who reads it, anything else to itself or what is before."""
        if self.operators[index].node.op == "ReorderOutput":
            readers = (self._own_pass(i) for i in self.flow[index])
            for name in readers:
                if name is not None:
                    return name
        return self._nearest(index, self._own_pass)

    def _own_pass(self, index: int) -> str | None:
        main = _main(self.sources[index])
        made = [main.made_by] if main is not None else []
        return next((m for m in (*made, *(s.made_by for s in self.sources[index])) if m is not None), None)

    def _nearest(self, index: int, ask: Callable[[int], str | None]) -> str | None:
        answers = map(ask, _from(self.flow, index, reverse=True))
        return next((answer for answer in answers if answer is not None), None)


def _flow(made: Mapping[N, Sequence[N]]) -> "nx.DiGraph":
    """Edges to every node from those that make what it reads."""
    import networkx as nx  # takes a third of a second

    graph = nx.DiGraph()
    graph.add_nodes_from(made)
    graph.add_edges_from((maker, node) for node, makers in made.items() for maker in makers)
    return graph


def _from(graph: "nx.DiGraph", start: N, *, reverse: bool = False) -> Iterator[N]:
    """A node and all behind it (`reverse`: in front of it), the nearest first."""
    import networkx as nx

    return chain([start], (node for _, node in nx.bfs_edges(graph, start, reverse=reverse)))


def _computed(operator: Operator, sources: Sequence[Source], multiple: int) -> int:
    """From the shapes of the trace, which are those in memory: blocks are whole there."""
    macs = sum(s.macs for s in sources)
    if not macs or len(operator.inputs) < 2 or not operator.outputs or operator.node.op in EIGHT_BITS:
        return macs
    weight = operator.inputs[1]
    if operator.node.domain == BLOCKED:
        return math.prod(operator.outputs[0]) * math.prod(weight[1:])
    rounded = [math.ceil(size / multiple) * multiple for size in weight[:2]]
    return macs * math.prod(rounded) // math.prod(weight[:2])


def _form(operator: Operator) -> str:
    if operator.kernels:
        return "tensor cores" if any(map(TENSOR_CORES.search, operator.kernels)) else "CUDA cores"
    if operator.node.op in EIGHT_BITS | ROUNDING or operator.node.op.startswith("QLinear"):
        return ROUNDED
    return "blocked" if operator.node.domain == BLOCKED else "plain"
