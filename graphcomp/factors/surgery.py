"""Layers that read a part of their input channels, and layers split into factors, exactly.

What a weight is split into is `factors.decompose`'s; here it is done to programs. Every factor carries the
stride, padding and dilation of the axes that it has the kernel of, only the last one a bias, and nothing
comes in between, so the factors are one convolution with their product as its weight: `simulate` writes that
product (same graph, same shapes), `rewrite` puts the factors there. Every padding mode pads each axis by
itself and does not mix channels, so this holds for all of them.

What a layer does not read any more goes, where possible, with its producer (`channels.surgery`): a channel
that no layer reads is removed. For the rest an `index_select` picks what the layer reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from graphcomp.channels import Channels, Marks, Removal, analyse, round_up
from graphcomp.factors.decompose import Factor, approximate
from graphcomp.factors.layers import checked, layer_macs
from graphcomp.factors.replacing import Rewriter
from graphcomp.ir import Program, editable


def simulate(program: Program, factors: Sequence[Factor]) -> Program:
    """Every weight replaced by what its factor keeps of it: the same graph with the same shapes.

    Raises:
        SurgeryError: naming a layer that its factor does not fit.
    """
    replaced = {
        f"{layer}.weight": approximate(program.tensors[f"{layer}.weight"], factor)
        for layer, factor in checked(program, factors).items()
    }
    return replace(program, module=editable(program, replaced))


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
    by_layer = checked(program, factors)
    program, by_layer = _without_unread(program, by_layer, pass_name, multiple)
    return Rewriter(program, by_layer, pass_name).run()


def unread(channels: Channels, factors: Mapping[str, Factor]) -> Marks:
    """The channels that some layer stops reading and that nothing else reads: no layer, no statistics."""
    read, touched = channels.marks(), channels.marks()
    for axis in channels.axes:
        if axis.reads:
            factor = factors.get(axis.layer)
            kept = _kept(len(axis.channels), factor)
            read[axis.channels[kept]] = True
            touched[axis.channels[~kept]] = True
    for mixing in channels.mixings:
        read[mixing.channels] = True
    return touched & ~read


def _kept(width: int, factor: Factor | None) -> Marks:
    if factor is None or factor.keep is None:
        return np.ones(width, bool)
    kept = np.zeros(width, bool)
    kept[factor.keep] = True
    return kept


def removable(channels: Channels, factors: Mapping[str, Factor], multiple: int) -> Marks:
    """`unread`, but so many fewer that what stays of every group is a multiple."""
    unused = unread(channels, factors)
    for group in channels.groups:
        gone = group.channels[unused[group.channels]]
        kept = len(group.channels) - len(gone)
        unused[gone[: round_up(kept, group, multiple, 1) - kept]] = False
    return unused


def _without_unread(
    program: Program, factors: dict[str, Factor], pass_name: str, multiple: int
) -> tuple[Program, dict[str, Factor]]:
    """Remove what nobody reads, and say the same about the columns that are left."""
    if all(f.keep is None for f in factors.values()):
        return program, factors
    channels = analyse(program)
    wanted = Removal(channels, removable(channels, factors, multiple))
    removal, _ = wanted.feasible(np.zeros(len(channels.channel_of)))
    if not removal:
        return program, factors
    smaller = removal.apply(pass_name)
    gone = {a.layer: removal.gone[a.channels] for a in channels.axes if a.reads and a.layer in factors}
    left = {layer: _renumbered(f, gone.get(layer)) for layer, f in factors.items()}
    return smaller, {layer: _worthwhile(program, smaller, factors[layer], f) for layer, f in left.items()}


def _renumbered(factor: Factor, gone: Marks | None) -> Factor:
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
