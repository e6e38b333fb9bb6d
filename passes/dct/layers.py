"""Which layers can be stored as coefficients, and which should not be (METHODS 4.4)."""

from typing import cast

from torch import fx, nn

from graphcomp.factors import irreplaceable
from graphcomp.ir import DctLayer, Program
from graphcomp.measure import layer_row


def is_layer(module: nn.Module) -> bool:
    """Whether it is of a sort whose weight might be stored otherwise."""
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear | DctLayer)


def obstacle(program: Program, layer: str) -> str | None:
    """Why a layer's weight cannot, or by METHODS 4.4 should not, be stored as coefficients."""
    module = program.called_modules()[layer]
    if isinstance(module, DctLayer):
        return "it is stored as coefficients already"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{type(module).__name__} is neither Conv2d nor Linear"
    groups = getattr(module, "groups", 1)
    if groups > 1 and groups == module.in_channels:
        return "a depthwise convolution"
    return irreplaceable(program, layer)


def stems_of(program: Program) -> set[str]:
    """Convolutions that read the network's inputs through nothing that has weights of such a layer."""
    behind: set[fx.Node] = set()
    stems: set[str] = set()
    for node in program.graph.nodes:
        sources = set(node.all_input_nodes)
        row = layer_row(program, node)
        if row is not None or sources & behind:
            behind.add(node)
        if row is not None and not sources & behind and row.kind == "Conv2d":
            stems.add(cast(str, node.target))
    return stems
