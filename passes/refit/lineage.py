"""Which layer and which rows of an earlier program the rows of a compressed one are, by the recorded plans.

Every row of the earlier program gets a number of its own, written into the biases of a copy; then the plans
of all passes since are carried out on that copy, as they were on the program. What is left of the numbers
says which rows are left: whatever a pass removes, splits or renames takes the biases along. So there is no
rule a pass, and none by name. Passes that change values only, or the form in which a weight is stored, move
no row.
"""

import base64
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from graphcomp.ir import Program, editable
from graphcomp.measure import is_mixing, matrix_shape

WHOLE = 1e-3
"""A bias that is further from an integer is no number of a row: something was added to it."""

Replay = Callable[[Program], Program]
"""Carries out one recorded plan."""


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the outputs of a layer come from.

    Attributes:
        layer: module path in the earlier program.
        rows: which of its output channels they are, in order.
    """

    layer: str
    rows: NDArray[np.int64]


def packed(origin: Origin) -> str:
    """The rows of an origin as text: 32 bits each, little-endian, zlib, base64."""
    return base64.b64encode(zlib.compress(origin.rows.astype("<i4").tobytes())).decode()


def unpacked(layer: str, rows: str) -> Origin:
    """What `packed` was given, of a layer of the earlier program."""
    found = np.frombuffer(zlib.decompress(base64.b64decode(rows)), "<i4")
    return Origin(layer, found.astype(np.int64))


def origins(earlier: Program, replays: Sequence[Replay]) -> dict[str, Origin]:
    """For every layer, after some plans, that yields rows of the earlier program: which they are."""
    numbered, first, end = _numbered(earlier)
    for replay in replays:
        numbered = replay(numbered)
    names = list(first)
    starts = np.array([first[name] for name in names])
    found = {}
    for path, module in numbered.called_modules().items():
        bias = getattr(module, "bias", None)
        if not is_mixing(module) or bias is None:
            continue
        exact = bias.detach().numpy()
        numbers = exact.round().astype(np.int64)
        at = np.searchsorted(starts, numbers, side="right") - 1
        is_whole = np.abs(exact - numbers).max() < WHOLE and numbers.min() > 0 and numbers.max() < end
        if is_whole and len(np.unique(at)) == 1:
            found[path] = Origin(names[at[0]], numbers - starts[at[0]])
    return found


@torch.no_grad()
def _numbered(program: Program) -> tuple[Program, dict[str, int], int]:
    """A float64 copy whose layers have a bias of running numbers, the first number of each, and the end."""
    copy = program.to(torch.float64)
    module = editable(copy)
    first: dict[str, int] = {}
    count = 1  # 0 is no row
    done: dict[int, str] = {}
    for path in copy.called_modules():
        layer = module.get_submodule(path)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            _neutralise(layer)
        if not is_mixing(layer) or id(layer) in done:
            continue
        done[id(layer)] = path
        g, o, _ = matrix_shape(layer)
        first[path] = count
        layer.register_parameter("bias", nn.Parameter(torch.arange(count, count + g * o).double()))
        count += g * o
    module.recompile()
    return replace(copy, module=module), first, count


def _neutralise(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Make a normalisation the identity, so that folding it leaves the numbers."""
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.zero_()
