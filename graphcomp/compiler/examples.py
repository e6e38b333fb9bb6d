"""Example inputs of a network that is loaded: given with it, or drawn in the shapes that were asked for."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from graphcomp.compiler.models import LoadedModel
from graphcomp.errors import LoadError

SHARE = 8
"""How many times the size of one input has to be free."""


LARGEST_RANK = 8
"""Dimensions of an input, with the batch."""

Shape = tuple[int, ...]


def examples_for(
    loaded: LoadedModel, model: str, shapes: Mapping[str, Shape], arguments: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """A tensor an input, batch 1.

    Args:
        loaded: says what its inputs are, or leaves it to the user.
        model: its spec, for errors.
        shapes: with the batch, which is cut to 1; of the only input under "", of several by the name of
            forward's argument.
        arguments: of forward that are no inputs.

    Raises:
        LoadError: no shape, one of an input that there is not, or one that memory has no room for.
    """
    of_one = {name: (1, *shape[1:]) for name, shape in shapes.items()}
    return tuple(x[:1] if x.dim() else x for x in _examples(loaded, model, of_one, arguments))


def _examples(
    loaded: LoadedModel, model: str, shapes: Mapping[str, Shape], arguments: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    names = _names(loaded.module, arguments)
    own = loaded.examples
    if own is None and loaded.input_shape is not None:
        own = (_drawn((1, *loaded.input_shape)),)
    if "" in shapes:
        if own is not None and len(own) > 1:
            raise LoadError(
                f"--input-shape: found one without a name for {model}, which has {len(own)} inputs, expected "
                f"them by name; e.g. --input-shape {names[0] if names else 'NAME'}=1,3,64,64"
            )
        return (_like(shapes[""], None if own is None else own[0]),)
    unknown = [name for name in shapes if name not in names]
    if unknown:
        raise LoadError(
            f"--input-shape: found {unknown[0]!r:.100} for {model}, expected arguments of forward, which are "
            f"{', '.join(names) or 'without names'}"
        )
    if own is not None:
        given = dict(zip(names, own, strict=False))
        extra = own[len(given) :]  # of forward(*inputs), which have no names
        return (*(_like(shapes[n], x) if n in shapes else x for n, x in given.items()), *extra)
    if not shapes:
        raise LoadError(
            f"{model}: found no input shape, expected one; give --input-shape, e.g. 1,3,224,224, one by name "
            "for each of several inputs; inputs of whole numbers: let the factory return (network, examples)"
        )
    asked = [name for name in names if name in shapes]
    if asked != names[: len(asked)]:
        missing = next(name for name in names if name not in shapes)
        raise LoadError(
            f"--input-shape: found none of {missing!r}, expected one: {asked[-1]!r} comes after it; give "
            f"--input-shape {missing}=..., or --input {missing}=none"
        )
    return tuple(_drawn(shapes[name]) for name in asked)


def _names(module: nn.Module, arguments: Mapping[str, Any]) -> list[str]:
    """Of forward's arguments that may be inputs, in order."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except ValueError:  # what torch.jit.trace has made
        return []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [name for name in named if name not in arguments]


def _drawn(shape: Shape) -> Tensor:
    check_memory(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _like(shape: Shape, example: Tensor | None) -> Tensor:
    """Of another shape; whole numbers as small as those that were given."""
    if example is None or example.is_floating_point():
        return _drawn(shape) if example is None else _drawn(shape).to(example.dtype)
    check_memory(shape)
    return torch.full(shape, int(example.min()), dtype=example.dtype)


def check_memory(shape: Sequence[int]) -> None:
    """A network's activations take a multiple of its input: a size that cannot work is no reason to try."""
    if len(shape) > LARGEST_RANK or max(shape) >= 1 << 31:
        raise LoadError(
            f"--input-shape: found {len(shape)} sizes, the largest {str(max(shape))[:20]}, expected at most "
            f"{LARGEST_RANK} that are no larger than a layer can be; e.g. 1,3,224,224"
        )
    needed, free = 4 * math.prod(shape), psutil.virtual_memory().available
    if SHARE * needed > free:
        raise LoadError(
            f"--input-shape: found {','.join(map(str, shape))}, which takes {needed / 2**30:.3g} GiB for one "
            f"input, expected {SHARE} times less than the {free / 2**30:.3g} GiB of memory that are free"
        )
