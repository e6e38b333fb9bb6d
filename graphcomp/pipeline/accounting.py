"""Every layer that a pass concerns is changed, or named with the reason why not.

A pass plans with what it can work on, and says why it leaves some of that alone. What it never looks at (an
LSTM, a weight that a function reads, frozen parameters) would go unsaid; so the pipeline compares the network
before and after, and adds what nobody accounted for.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from graphcomp.channels import analyse, opaque_layers
from graphcomp.ir import Program
from graphcomp.records import LeftAlone

Concern = Literal["channels", "weights", "normalisations", "parameters"]
"""What a pass works on: output channels of layers, weights of two dimensions or more, batch normalisations,
or all parameters."""

FUNCTION = "a function reads it, not a layer"
FROZEN = "it is frozen: none of its parameters requires gradients"
NO_GRADIENT = "training did not change it: no gradient reached it"
_CONVOLUTION = nn.modules.conv._ConvNd


def unaccounted(
    concern: Concern, before: Program, after: Program, kept: Iterable[LeftAlone]
) -> list[LeftAlone]:
    """What a pass with `concern` neither changed between two programs nor kept with a reason."""
    named = {k.where for k in kept}
    if concern == "channels":
        found = _same_channels(before, after, named)
    elif concern == "weights":
        found = _same_weights(before, after)
    elif concern == "normalisations":
        found = _same_normalisations(before, after)
    else:
        found = _same_parameters(before, after)
    return [LeftAlone(where=where, reason=reason) for where, reason in found if where not in named]


def holders(program: Program) -> dict[str, list[str]]:
    """Layers that the graph calls, and parameters that its functions read -> names of their parameters."""
    parameters = [n for n, t in program.tensors.items() if isinstance(t, nn.Parameter)]
    found = {
        path: [f"{path}.{name}" for name, _ in layer.named_parameters()]
        for path, layer in program.called_modules().items()
    }
    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    found |= {name: [name] for name in parameters if name in read}
    return {path: names for path, names in found.items() if names}


def _matrices(program: Program) -> dict[str, list[str]]:
    wide = {p: [n for n in names if program.tensors[n].ndim > 1] for p, names in holders(program).items()}
    return {path: names for path, names in wide.items() if names}


def _is_changed(names: Iterable[str], before: Program, after: Program) -> bool:
    return any(n not in after.tensors or not _equal(before.tensors[n], after.tensors[n]) for n in names)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _kind(program: Program, path: str) -> str | None:
    """The class of a layer, None of what only a function reads."""
    layer = program.called_modules().get(path)
    return None if layer is None else type(layer).__name__


# ---------------------------------------------------------------------- what is left, by concern


def _same_channels(before: Program, after: Program, named: set[str]) -> Iterator[tuple[str, str]]:
    """A group is named after one of its layers, and accounts for all of them."""
    opaque, pinned, covered = opaque_layers(before), dict[str, str](), set[str]()
    for group in analyse(before).groups:
        for layer in group.producers:
            if group.pinned is not None:
                pinned.setdefault(layer, f"{group.pinned[1]} ({group.pinned[0]})")
        if group.name in named:
            covered |= set(group.producers)
    for path in _matrices(before):
        if path not in covered and _width(before, path) == _width(after, path):
            kind = _kind(before, path)
            rest = "none of its channels was removed" if kind else FUNCTION
            yield path, opaque.get(path) or pinned.get(path) or rest


def _width(program: Program, path: str) -> object:
    """How many channels a layer yields; what it holds, if it does not say."""
    layer = program.called_modules().get(path)
    if isinstance(layer, _CONVOLUTION):
        return layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return [tuple(program.tensors[n].shape) for n in holders(program).get(path, [])]


def _same_weights(before: Program, after: Program) -> Iterator[tuple[str, str]]:
    for path, names in _matrices(before).items():
        if not _is_changed(names, before, after):
            yield path, _why_no_weight(before, path)


def _why_no_weight(program: Program, path: str) -> str:
    layer = program.called_modules().get(path)
    if layer is None:
        return FUNCTION
    if isinstance(layer, _CONVOLUTION | nn.Linear):
        return "the pass left it as it was"
    return f"{type(layer).__name__} is neither a convolution nor a linear layer"


def _same_normalisations(before: Program, after: Program) -> Iterator[tuple[str, str]]:
    left = after.called_modules()
    for path, layer in before.called_modules().items():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and path in left:
            yield path, "the pass left it as it was"


def _same_parameters(before: Program, after: Program) -> Iterator[tuple[str, str]]:
    layers = holders(before)
    same = [path for path, names in layers.items() if not _is_changed(names, before, after)]
    trained = len(same) < len(layers)
    for path in same:
        if not any(before.tensors[n].requires_grad for n in layers[path]):
            yield path, FROZEN
        elif trained:
            yield path, NO_GRADIENT
