"""Which layers can be split or read a part of their channels, and what they cost then."""

from collections.abc import Iterable, Sequence
from typing import cast

from torch import fx, nn

from graphcomp.errors import SurgeryError
from graphcomp.factors.decompose import Factor, Kind, Plane, macs_after
from graphcomp.ir import Program, is_hooked
from graphcomp.measure import plane_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def candidates(program: Program) -> dict[str, str | None]:
    """Every convolution and linear layer, in the order of the graph -> why it must stay as it is, or None."""
    layers = program.called_modules().items()
    return {t: obstacle(program, t) for t, m in layers if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)}


def obstacle(program: Program, layer: str) -> str | None:
    """Why a layer can neither be factored nor read a part of its channels; None if it can."""
    module = program.called_modules().get(layer)
    if module is None:
        return "it is no layer that the network calls"
    if type(module) not in (*CONVOLUTIONS, nn.Linear):
        return f"{type(module).__name__} is neither a convolution nor a linear layer"
    if getattr(module, "groups", 1) != 1:
        return f"a convolution with {module.groups} groups"
    return irreplaceable(program, layer)


def irreplaceable(program: Program, layer: str) -> str | None:
    """Why no other module can take the place of a called layer with a weight; None if one can."""
    module = program.called_modules()[layer]
    if is_hooked(module):
        return "it has forward hooks"
    weight = f"{layer}.weight"
    shared = [name for name, t in program.tensors.items() if t is program.tensors[weight] and name != weight]
    if shared:
        return f"its weight is tied to {shared[0]}"
    if any(n.op == "get_attr" and n.target == weight for n in program.graph.nodes):
        return "its weight is also used as a tensor"
    return None


def checked(program: Program, factors: Sequence[Factor]) -> dict[str, Factor]:
    """Factors by layer, `keep` null where it is all; SurgeryError if they do not fit the program."""
    by_layer = {f.layer: f for f in factors}
    if len(by_layer) < len(factors):
        twice = next(f.layer for i, f in enumerate(factors) if f.layer in {g.layer for g in factors[:i]})
        raise SurgeryError(f"{twice}: found two factors, expected one a layer")
    for layer, factor in by_layer.items():
        reason = obstacle(program, layer)
        if reason is not None:
            raise SurgeryError(f"{layer}: found a factor, expected none: {reason}; exclude the layer")
        shape = program.tensors[f"{layer}.weight"].shape
        if factor.keep is not None and factor.keep[-1] >= shape[1]:
            raise SurgeryError(
                f"{layer}: found input channel {factor.keep[-1]}, expected 0 to {shape[1] - 1}; "
                "use a plan made for this program"
            )
        if factor.rank is not None and not can_be(shape, factor.kind):
            raise SurgeryError(
                f"{layer}: found {factor.kind} for a weight of shape {tuple(shape)}, expected "
                f"{'a 2-d' if factor.kind == 'spatial' else 'a'} kernel; use svd"
            )
        if factor.keep is not None and len(factor.keep) == shape[1]:
            by_layer[layer] = factor.model_copy(update={"keep": None})
    return by_layer


def can_be(shape: Sequence[int], kind: Kind) -> bool:
    """Whether a weight (n, c, *kernel) can be split this way."""
    return kind == "svd" or (len(shape) == 4 if kind == "spatial" else len(shape) > 2)


def planes(program: Program, layers: Iterable[str]) -> dict[str, list[tuple[Plane, Plane]]]:
    """Spatial sizes behind and in front of every call of each of these layers; one scan of the graph."""
    found: dict[str, list[tuple[Plane, Plane]]] = {layer: [] for layer in layers}
    for node in program.graph.nodes:
        if node.op == "call_module" and node.target in found:
            rank = program.tensors[f"{node.target}.weight"].ndim
            behind, before = (program.shape(x) or () for x in (node, cast(fx.Node, node.args[0])))
            found[node.target].append((plane_of(behind, rank), plane_of(before, rank)))
    return found


def layer_macs(program: Program, factor: Factor, at: Sequence[tuple[Plane, Plane]] | None = None) -> int:
    """Multiply-accumulates of all calls of a layer after `factor`, for one sample.

    Args:
        program, factor: see above.
        at: the layer's `planes`, for those who ask often; None: they are looked up.
    """
    shape = program.tensors[f"{factor.layer}.weight"].shape
    if at is None:
        at = planes(program, [factor.layer])[factor.layer]
    return sum(macs_after(shape, factor, after, before) for after, before in at)
