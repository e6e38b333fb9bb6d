"""Why a normalisation cannot be merged into the layer in front of it."""

import operator
from typing import cast

from torch import fx, nn

from graphcomp.ir import Program

BatchNorm = nn.modules.batchnorm._BatchNorm
Foldable = (nn.modules.conv._ConvNd, nn.Linear)


def written_out(program: Program) -> list[str]:
    """Normalisations that are no layers: what holds their statistics, or the product with a computed scale.

    Some compute scale and shift from buffers alone, so that only these are in the graph.
    """
    read = [n for n in program.graph.nodes if n.op == "get_attr"]
    held = [str(n.target).rpartition(".")[0] for n in read if str(n.target).endswith(".running_var")]
    scales = [n for n in read if str(n.target).startswith("_tensor_constant")]
    products = [user for n in scales for user in n.users if user.target is operator.mul]
    shifted = [p.name for p in products if any(_shifts(user, scales) for user in p.users)]
    return list(dict.fromkeys([*held, *shifted]))


def _shifts(node: fx.Node, constants: list[fx.Node]) -> bool:
    return node.target is operator.add and any(c in node.all_input_nodes for c in constants)


def obstacle(program: Program, node: fx.Node) -> str | None:
    """Why a normalisation cannot be folded."""
    norm = cast(BatchNorm, program.layer(cast(str, node.target)))
    source = node.all_input_nodes[0]
    if norm.running_mean is None:
        return "it has no running statistics"
    if source.op != "call_module":
        return "no layer in front of it"
    layer = program.layer(cast(str, source.target))
    if not isinstance(layer, Foldable):
        return f"{type(layer).__name__} in front of it, not a convolution or linear layer"
    if isinstance(layer, nn.Linear) and len(program.shape(source) or ()) != 2:
        return "its channels are not the linear layer's outputs"
    if any(m._forward_hooks or m._forward_pre_hooks for m in (layer, norm)):
        return "one of the two has forward hooks"
    if len(source.users) > 1:
        return f"{source.target} feeds other nodes too"
    calls = [n.target for n in program.graph.nodes if n.op == "call_module"]
    if calls.count(source.target) > 1 or calls.count(node.target) > 1:
        return "one of the two is called more than once"
    if _is_shared(program, layer, cast(str, source.target)):
        return f"the weights of {source.target} are used elsewhere too"
    return None


def _is_shared(program: Program, layer: nn.Module, name: str) -> bool:
    """Whether another layer is tied to the weights, or a node reads them by themselves."""
    own = {id(p) for p in layer.parameters()}
    names = [n for n, t in program.tensors.items() if id(t) in own]
    read = {n.target for n in program.graph.nodes if n.op == "get_attr"}
    return any(not n.startswith(f"{name}.") or n in read for n in names)
