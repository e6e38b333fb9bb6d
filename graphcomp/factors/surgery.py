"""Layers that read a part of their input channels, and layers split into factors, exactly.

What a weight is split into is `factors.decompose`'s; here it is done to programs. Every factor carries the
stride, padding and dilation of the axes that it has the kernel of, only the last one a bias, and nothing
comes in between, so the factors are one convolution with their product as its weight: `simulate` writes that
product (same graph, same shapes), `rewrite` puts the factors there. Every padding mode pads each axis by
itself and does not mix channels, so this holds for all of them.

What a layer does not read any more goes, where possible, with its producer (`channels.surgery`): a channel
that no layer reads is removed. For the rest an `index_select` picks what the layer reads.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphcomp.channels import (
    Channels,
    Drop,
    analyse,
    feasible,
    insert_select,
    layer_name,
    no_drop,
    remove,
    round_up,
    sync_attributes,
)
from graphcomp.errors import SurgeryError
from graphcomp.factors.decompose import (
    Factor,
    Kind,
    Plane,
    approximate,
    decompose,
    macs_after,
    read_factors,
)
from graphcomp.ir import (
    PASS_KEY,
    Program,
    acts_in_place,
    assemble,
    editable,
    eliminate_dead_nodes,
    parts,
    same_memory,
)

__all__ = [
    "Factor",
    "Kind",
    "approximate",
    "can_be",
    "candidates",
    "irreplaceable",
    "layer_macs",
    "layers_of",
    "macs_after",
    "obstacle",
    "planes",
    "read_factors",
    "region",
    "removable",
    "rewrite",
    "simulate",
    "unread",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# ---------------------------------------------------------------------- which layers


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
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    weight = f"{layer}.weight"
    shared = [name for name, t in program.tensors.items() if t is program.tensors[weight] and name != weight]
    if shared:
        return f"its weight is tied to {shared[0]}"
    if any(n.op == "get_attr" and n.target == weight for n in program.graph.nodes):
        return "its weight is also used as a tensor"
    return None


def _checked(program: Program, factors: Sequence[Factor]) -> dict[str, Factor]:
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

    def plane(node: fx.Node, rank: int) -> Plane:
        shape = program.shape(node) or ()
        return shape[len(shape) - (rank - 2) :] if rank > 2 else shape[1:-1]

    for node in program.graph.nodes:
        if node.op == "call_module" and node.target in found:
            rank = program.tensors[f"{node.target}.weight"].ndim
            found[node.target].append((plane(node, rank), plane(cast(fx.Node, node.args[0]), rank)))
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


# ---------------------------------------------------------------------- simulate


def simulate(program: Program, factors: Sequence[Factor]) -> Program:
    """Every weight replaced by what its factor keeps of it: the same graph with the same shapes.

    Raises:
        SurgeryError: naming a layer that its factor does not fit.
    """
    replaced = {
        f"{layer}.weight": approximate(program.tensors[f"{layer}.weight"], factor)
        for layer, factor in _checked(program, factors).items()
    }
    return Program(editable(program, replaced), program.example_inputs, program.history)


# ---------------------------------------------------------------------- rewrite


def rewrite(program: Program, factors: Sequence[Factor], pass_name: str, multiple: int = 1) -> Program:
    """Fewer channels read, and factors in the place of weights; computes what `simulate` does.

    A layer `a.b` of rank R becomes `a.b.0`, `a.b.1` (and `a.b.2`). Channels that no layer reads any more are
    removed; a layer whose input still has others gets an `index_select`, one for all that read the same.

    Args:
        program: what `simulate` made with the same factors.
        factors: at most one a layer.
        pass_name: recorded on every node that changes.
        multiple: of the channels that nobody reads so many stay that widths are multiples of it.

    Raises:
        SurgeryError: naming a layer that its factor does not fit. `program` is untouched.
    """
    by_layer = _checked(program, factors)
    program, by_layer = _without_unread(program, by_layer, pass_name, multiple)
    return _Rewriter(program, by_layer, pass_name).run()


def unread(channels: Channels, factors: Mapping[str, Factor]) -> Drop:
    """The channels that some layer stops reading and that no other layer reads."""
    read, touched = no_drop(channels), no_drop(channels)
    for axis in channels.axes:
        if axis.reads:
            factor = factors.get(layer_name(axis))
            kept = _kept(len(axis.channels), factor)
            read[axis.channels[kept]] = True
            touched[axis.channels[~kept]] = True
    return touched & ~read


def _kept(width: int, factor: Factor | None) -> Drop:
    if factor is None or factor.keep is None:
        return np.ones(width, bool)
    kept = np.zeros(width, bool)
    kept[factor.keep] = True
    return kept


def removable(channels: Channels, factors: Mapping[str, Factor], multiple: int) -> Drop:
    """`unread`, but so many fewer that what stays of every group is a multiple."""
    drop = unread(channels, factors)
    for group in channels.groups:
        gone = group.channels[drop[group.channels]]
        kept = len(group.channels) - len(gone)
        drop[gone[: round_up(kept, group, multiple, 1) - kept]] = False
    return drop


def _without_unread(
    program: Program, factors: dict[str, Factor], pass_name: str, multiple: int
) -> tuple[Program, dict[str, Factor]]:
    """Remove what nobody reads, and say the same about the columns that are left."""
    if all(f.keep is None for f in factors.values()):
        return program, factors
    channels = analyse(program)
    wanted = removable(channels, factors, multiple)
    drop, _ = feasible(channels, wanted, np.zeros(len(channels.channel_of)))
    if not drop.any():
        return program, factors
    smaller = remove(program, channels, drop, pass_name)
    gone = {layer_name(a): drop[a.channels] for a in channels.axes if a.reads and layer_name(a) in factors}
    left = {layer: _renumbered(f, gone.get(layer)) for layer, f in factors.items()}
    return smaller, {layer: _worthwhile(program, smaller, factors[layer], f) for layer, f in left.items()}


def _renumbered(factor: Factor, gone: Drop | None) -> Factor:
    """`keep` as positions among the columns that are left."""
    if factor.keep is None or gone is None:
        return factor
    position = np.cumsum(~gone) - 1
    keep = position[factor.keep].tolist()
    return factor.model_copy(update={"keep": None if len(keep) == int((~gone).sum()) else keep})


def _worthwhile(before: Program, after: Program, old: Factor, new: Factor) -> Factor:
    """One weight again where factors saved something only before rows of the layer went."""
    saved = layer_macs(before, old) < layer_macs(before, old.as_one_weight())
    if saved and layer_macs(after, new) >= layer_macs(after, new.as_one_weight()):
        return new.as_one_weight()
    return new


class _Rewriter:
    """One rewrite: modules replaced, calls replaced, gathers in front."""

    def __init__(self, program: Program, factors: dict[str, Factor], pass_name: str) -> None:
        self.program, self.factors, self.pass_name = program, factors, pass_name
        self.root, self.graph = parts(program, self.sliced_weights())
        self.gathers: dict[tuple[Any, ...], fx.Node] = {}
        nodes = list(program.graph.nodes)
        self.new = dict(zip(nodes, self.graph.nodes, strict=True))
        self.order = {node: i for i, node in enumerate(nodes)}
        self.writers = [n for n in nodes if n.all_input_nodes and acts_in_place(program.module, n)]

    def sliced_weights(self) -> dict[str, Tensor]:
        names = {f"{layer}.weight": f.keep for layer, f in self.factors.items() if f.keep is not None}
        return {name: self.program.tensors[name].detach()[:, keep] for name, keep in names.items()}

    def run(self) -> Program:
        names = {layer: self.install(factor) for layer, factor in self.factors.items()}
        for old in self.program.graph.nodes:
            if old.op == "call_module" and old.target in self.factors:
                self.replace(old, self.factors[old.target], names[old.target])
        eliminate_dead_nodes(self.graph, self.root)  # a gather that another one took the place of
        self.graph.lint()
        module = assemble(self.program, self.root, self.graph)
        return Program(module, self.program.example_inputs, self.program.history)

    def install(self, factor: Factor) -> list[str]:
        """Put the layer's new modules in its place; their paths."""
        owner, _, leaf = factor.layer.rpartition(".")
        layer = cast(nn.Conv2d, self.root.get_submodule(factor.layer))
        if factor.rank is None:
            sync_attributes(layer, layer, None)
            return [factor.layer]
        modules = layers_of(layer, decompose(layer.weight, factor), factor.kind)
        self.root.get_submodule(owner)._modules[leaf] = nn.Sequential(*modules)
        return [f"{factor.layer}.{i}" for i in range(len(modules))]

    def replace(self, old: fx.Node, factor: Factor, names: list[str]) -> None:
        """Calls of the new modules instead of one of the layer."""
        if factor.keep is None and factor.rank is None:
            return
        node = self.new[old]
        x = cast(fx.Node, node.args[0])
        with self.graph.inserting_before(node):
            if factor.keep is not None:
                x = self.gathered(old, factor.keep)
            for name in names:
                x = self.graph.call_module(name, (x,))
                x.meta = {**node.meta, PASS_KEY: self.pass_name}
        node.replace_all_uses_with(x)
        self.graph.erase_node(node)
        self.new[old] = x

    def gathered(self, reader: fx.Node, keep: list[int]) -> fx.Node:
        """The kept channels of what a reader reads, picked once for all that see the same values."""
        read = cast(fx.Node, reader.args[0])
        weight = self.program.tensors[f"{reader.target}.weight"]
        axis = len(self.program.shape(read) or ()) - (weight.ndim - 2) - 1
        source, positions = self.picked_from(reader, read, axis, torch.tensor(keep))
        key = (source, axis, tuple(positions.tolist()), self.writes_before(reader, source))
        if key not in self.gathers:
            self.gathers[key] = insert_select(
                self.root, self.graph, self.new[source], axis, positions, reader.name, self.pass_name
            )
        return self.gathers[key]

    def picked_from(
        self, reader: fx.Node, source: fx.Node, axis: int, positions: Tensor
    ) -> tuple[fx.Node, Tensor]:
        """Past an `index_select` that feeds the reader: one picks what two would."""
        while source.target is torch.index_select and source.args[1:2] == (axis,) and not source.kwargs:
            index, base = cast(fx.Node, source.args[2]), cast(fx.Node, source.args[0])
            rewritten = self.writes_before(reader, base) != self.writes_before(source, base)
            if index.op != "get_attr" or rewritten:
                break
            source, positions = base, self.program.tensors[cast(str, index.target)][positions]
        return source, positions

    def writes_before(self, reader: fx.Node, read: fx.Node) -> int:
        """How often what is read has been changed in place: two readers may see different values of it."""
        values, at = self.program.values, self.order[reader]
        return sum(
            self.order[w] < at and same_memory(values[w.all_input_nodes[0]], values[read])
            for w in self.writers
        )


def layers_of(layer: nn.Module, weights: Sequence[Tensor], kind: Kind) -> list[nn.Module]:
    """Layers with these weights that together replace one; the last one has its bias."""
    every = tuple(range(len(getattr(layer, "kernel_size", ()))))
    axes = {"svd": (every, ()), "spatial": ((0,), (1,)), "tucker2": ((), every, ())}[kind]
    bias = cast(nn.Parameter | None, layer.bias)
    last = len(weights) - 1
    return [_layer(layer, w, bias if i == last else None, axes[i]) for i, w in enumerate(weights)]


def _layer(like: nn.Module, weight: Tensor, bias: nn.Parameter | None, axes: Sequence[int]) -> nn.Module:
    """A layer with the geometry that `like` has along `axes`, and a kernel of 1 along the others."""
    old = cast(nn.Conv2d, like)
    n, c, *kernel = weight.shape
    if isinstance(like, nn.Linear):
        new: nn.Module = nn.Linear(c, n, bias is not None, device="meta")
    else:
        new = type(old)(
            c,
            n,
            tuple(kernel),  # type: ignore[arg-type]
            stride=_along(axes, old.stride, 1),
            padding=_along(axes, old.padding, 0) if axes else 0,
            dilation=_along(axes, old.dilation, 1),
            bias=bias is not None,
            padding_mode=old.padding_mode if axes else "zeros",
            device="meta",
        )
    new.weight = nn.Parameter(
        weight.to(old.weight.dtype).contiguous(), requires_grad=old.weight.requires_grad
    )
    if bias is not None:
        new.bias = bias
    return new


def _along(axes: Sequence[int], values: Any, neutral: int) -> Any:
    """The values on these axes only; "same" and "valid" padding mean that by themselves."""
    if isinstance(values, str):
        return values
    return tuple(v if d in axes else neutral for d, v in enumerate(values))


# ---------------------------------------------------------------------- regions


def region(
    dense: Program, compressed: Program, include: Sequence[str], exclude: Sequence[str] = ()
) -> Program:
    """The dense network with only a region compressed, from two saved programs (METHODS 1.6).

    The choices are those of the whole network; layers outside of the region keep their dense weights.

    Args:
        dense: what the compressing pass was given.
        compressed: what came out of it; only its plan is read.
        include, exclude: globs on module paths of `dense`.

    Raises:
        SurgeryError: if `compressed` was not made from `dense` by one pass that factors layers, or no layer
            matches one of the globs.
    """
    plans = compressed.history[len(dense.history) :]
    if compressed.history[: len(dense.history)] != dense.history or len(plans) != 1:
        raise SurgeryError(
            f"region: found a history of {len(compressed.history)} plans, expected that of the dense program "
            f"({len(dense.history)} plans) and one more; give the program that the pass started from"
        )
    (plan,) = plans
    factors = read_factors(plan["decisions"])
    for glob in (*include, *exclude):
        if not any(fnmatch(layer, glob) for layer in candidates(dense)):
            raise SurgeryError(f"region: found no layer that {glob!r} matches, expected a module path")
    chosen = [f for f in factors if _within(f.layer, include, exclude)]
    multiple = plan["decisions"].get("multiple", 1)
    result = rewrite(simulate(dense, chosen), chosen, plan["name"], multiple)
    plan = {
        **plan,
        "decisions": {**plan["decisions"], "factors": [f.model_dump(mode="json") for f in chosen]},
        "summary": f"{len(chosen)} of {len(factors)} layers of: {plan['summary']}",
    }
    return Program(result.module, result.example_inputs, (*dense.history, plan))


def _within(layer: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return any(fnmatch(layer, g) for g in include) and not any(fnmatch(layer, g) for g in exclude)
