"""The same network for some of its classes: a head that yields only their logits.

Slicing is exact (`restricted(x) == original(x)[:, classes]`): it is the surgery of `channels.surgery`,
applied to the one group of channels that no pass may touch. What is compressed afterwards is another, smaller
network than the whole problem would give, since the responses are those of these classes only (PFA, 4.3).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphcomp.channels import Channels, Ints, Removal, analyse
from graphcomp.errors import AnalysisError, RecipeError, SurgeryError, VerifyError
from graphcomp.ir import Program, editable, fresh_inputs
from graphcomp.measure import is_classifier
from graphcomp.pipeline import TOLERANCE, relative_error, scrambled

Head = Literal["slice", "random"]


def restrict_head(program: Program, classes: Sequence[int], head: Head = "slice", seed: int = 0) -> Program:
    """A program with one logit for each of `classes`.

    Args:
        program: a classifier, left as it is; its output is (batch, outputs).
        classes: ids of the outputs to keep; logit i of the result is that of the i-th smallest.
        head: "slice" keeps the rows of these classes; "random" initialises the layer anew, to be trained.
        seed: of "random".

    Raises:
        RecipeError: fewer than two classes, or one that the network has no output for.
        AnalysisError: naming what stands between the last layer and the output.
        VerifyError: if the sliced network does not compute the same logits.
    """
    if not is_classifier(program):
        raise AnalysisError("output: found no (batch, classes) tensor, expected a classifier to restrict")
    wanted = _checked(classes, (program.shape(_logits(program)) or ())[1])
    result = _sliced(program, wanted)
    whole = scrambled(program)
    _check(whole, _sliced(whole, wanted), wanted)
    return result if head == "slice" else _reset(result, seed)


def _logits(program: Program) -> fx.Node:
    output: fx.Node = next(n for n in program.graph.nodes if n.op == "output")
    return output.all_input_nodes[0]


def _checked(classes: Sequence[int], width: int) -> list[int]:
    wanted = sorted(set(classes))
    outside = [c for c in wanted if not 0 <= c < width]
    if outside or len(wanted) < 2:
        found = f"class {outside[0]}" if outside else f"{len(wanted)} class(es)"
        raise RecipeError(f"classes: found {found}, expected two or more between 0 and {width - 1}")
    return wanted


def _logit_channels(channels: Channels) -> Ints:
    """The channel of every logit; AnalysisError unless each is one row of a layer."""
    program = channels.program
    node = _logits(program)
    labels = cast(Tensor, channels.values[node]).expand(program.shape(node) or ())
    ids: Ints = channels.channel_of[labels[0].numpy()]
    produced = [c for g in channels.groups if g.producers for c in g.channels.tolist()]
    if len(np.unique(ids)) != len(ids) or not np.isin(ids, produced).all():
        raise AnalysisError(
            f"{node.name}: found logits that are not the rows of one layer, expected a linear layer or a "
            "convolution at the end; change the head before compiling"
        )
    return ids


def _sliced(program: Program, wanted: Sequence[int]) -> Program:
    channels = analyse(program)
    ids = _logit_channels(channels)
    try:
        return Removal.of(channels, np.delete(ids, wanted)).apply("head")
    except SurgeryError as error:
        raise AnalysisError(f"head: {error}; change the head before compiling") from error


@torch.no_grad()
def _check(whole: Program, sliced: Program, wanted: Sequence[int]) -> None:
    inputs = fresh_inputs(whole, 1, 0, torch.float64)
    error = relative_error(sliced(*inputs), whole(*inputs)[:, list(wanted)])
    if not error <= TOLERANCE:
        raise VerifyError(
            f"head: found logits that differ by {error:.3g} (relative, float64), expected those of the whole "
            "head; this is a bug in graphcomp: please report it"
        )


def _reset(program: Program, seed: int) -> Program:
    """Initialise the layers that yield the logits as torch does."""
    channels = analyse(program)
    ids = _logit_channels(channels)
    names = [n for g in channels.groups if np.isin(g.channels, ids).any() for n in g.producers]
    module = editable(program)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            cast(nn.Linear, module.get_submodule(name)).reset_parameters()
    return replace(program, module=module)
