"""What it costs to pick channels: the gathers that passes left in a network, and their measured times.

A layer that reads a part of a tensor's channels has them picked by an `index_select`; channels that no layer
reads are taken out of the tensor instead, and where that is all of the rest nothing is picked. The exported
file has what is left in one of three forms (`onnx.selection` chose the fastest):

    gather       an operator of its own, in plain layout: its time, and that of the reorders that it brings
    convolution  a 1x1 convolution of zeros and ones: its time, and the same
    merged       no operator: the weights around it have zeros, and their layers compute all channels again

Times are those of the runtime's trace of the final file (`explanation.profiling`): measured in place, not on
a copy of the operator. Of what is merged there is none, since it is a part of its neighbours' times.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphcomp.explanation.attribution import ADDED, NOT_A_PASS, AttributedKernel
from graphcomp.ir import PASS_KEY, Program
from graphcomp.records import Gather, GatherForm

__all__ = ["ChannelPick", "find_gathers", "price"]


@dataclass(frozen=True)
class ChannelPick:
    """One selection that a pass left in a program.

    Attributes:
        node: name of the fx node.
        readers: module paths of the layers that read it, names of other nodes that do.
        made_by: the pass.
        channels, of: that are picked, and of how many.
    """

    node: str
    readers: tuple[str, ...]
    made_by: str
    channels: int
    of: int


def find_gathers(program: Program) -> list[ChannelPick]:
    """The selections that passes left, in the order of the graph."""
    found = []
    for node in program.graph.nodes:
        made_by = str(node.meta.get(PASS_KEY, ""))
        if node.target is not torch.index_select or made_by in NOT_A_PASS:
            continue
        source, axis, _ = node.args
        before, after = program.shape(source), program.shape(node)
        if before is not None and after is not None:
            readers = tuple(map(_place, node.users))
            found.append(ChannelPick(node.name, readers, made_by, after[axis], before[axis]))
    return found


def _place(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def price(found: Sequence[ChannelPick], kernels: Sequence[AttributedKernel], whole_ms: float) -> list[Gather]:
    """The selections with their times.

    Args:
        found: of the program that was exported.
        kernels: of the trace of its file.
        whole_ms: of a run, which shares are of.
    """
    by_key = {k.main.key: k for k in kernels if k.main is not None and (k.selects or _gathers(k))}
    reads = Counter(tensor for k in kernels for tensor in k.operator.node.inputs)

    def priced(one: ChannelPick) -> Gather:
        kernel = by_key.get(one.node)
        form: GatherForm = "merged" if kernel is None else "convolution" if kernel.selects else "gather"
        ms = None if kernel is None else kernel.ms
        layout = None if kernel is None else _reorders(kernel, kernels, reads)
        return Gather(
            node=one.node,
            readers=list(one.readers),
            made_by=one.made_by,
            channels=one.channels,
            of=one.of,
            form=form,
            ms=ms,
            layout_ms=layout,
            share=None if ms is None or layout is None else (ms + layout) / whole_ms,
        )

    return [priced(one) for one in found]


def _gathers(kernel: AttributedKernel) -> bool:
    return kernel.operator.node.op == "Gather"


def _reorders(kernel: AttributedKernel, kernels: Sequence[AttributedKernel], reads: Counter[str]) -> float:
    """Milliseconds of what the runtime added beside it; of what others read as well, an equal part."""
    node, total = kernel.operator.node, 0.0
    for other in kernels:
        beside = other.operator.node
        if beside.op in ADDED:
            total += sum(other.ms / reads[t] for t in beside.outputs if t in node.inputs)
            total += other.ms * any(t in node.outputs for t in beside.inputs)
    return total
