"""What is left of a network's operators after a removal, and what that takes: before anything is removed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from graphcomp.budget.calls import Call, Operator, calls
from graphcomp.budget.model import LatencyModel
from graphcomp.channels import Channels, Ints, Marks, Removal, compact
from graphcomp.runtime import Kernel


class Remaining:
    """The operators of a program after a removal, from its labels alone."""

    def __init__(self, channels: Channels) -> None:
        self.order = channels.program.order
        self.calls = calls(channels.program)
        self.joins = [(j, _plane(channels, j.node)) for j in channels.joins]
        self._of: dict[fx.Node, tuple[NDArray[Any], NDArray[Any]]] = {}
        for call in self.calls:
            for node in (call.node, call.source):
                if node not in self._of:
                    self._of[node] = _channel_shares(channels, node)

    def operators(self, removal: Removal) -> list[Operator | None]:
        """Every call with the widths that stay, then every join; None for one that costs nothing."""
        gone, idle = removal.gone, removal.idle.nodes
        left = {node: 1 - float(gone[ids] @ share) for node, (ids, share) in self._of.items()}
        found: list[Operator | None] = []
        for call in self.calls:
            if idle[self.order[call.node]]:
                found.append(None)
                continue
            into, out = round(call.into * left[call.source]), round(call.out * left[call.node])
            if call.kernel.is_square:
                into = out = max(into, out)
            found.append((call.kernel, into, out))
        return found + [part for join, plane in self.joins for part in self._selections(join, plane, gone)]

    def touching(self, members: Ints) -> Marks:
        """Which of `operators` read or make any of these channels, in their order."""
        holds = {node: bool(np.isin(ids, members).any()) for node, (ids, _) in self._of.items()}
        found = [holds[call.source] or holds[call.node] for call in self.calls]
        found += [bool(np.isin(ids, members).any()) for join, _ in self.joins for ids in join.operands]
        return np.array(found)

    def widest(self) -> list[Operator]:
        """All that can be asked for at their full widths."""
        selections = [_selection(join.node, plane, len(join.result)) for join, plane in self.joins]
        return [call.operator for call in (*self.calls, *selections) if call is not None]

    def _selections(self, join: Any, plane: tuple[int, ...] | None, gone: Marks) -> list[Operator | None]:
        """Zeros that are put back where one operand of an addition has lost what the other keeps."""
        kept = ~gone[join.result]
        call = _selection(join.node, plane, int(kept.sum()))
        padded = [bool((gone[operand] & kept).any()) for operand in join.operands]
        return [call.operator if call is not None and p else None for p in padded]


class LatencyCost:
    """Predicted milliseconds of a program after a removal.

    Args:
        channels: of the program.
        model: predicts its operators.
        only: which of `Remaining.operators` to count; None: all.
    """

    def __init__(self, channels: Channels, model: LatencyModel, only: Marks | None = None) -> None:
        self.model, self.only = model, only
        self.after = Remaining(channels)
        if only is None:
            model.prepare(self.after.widest())
        else:
            model.prepare(op for op in self._counted(Removal.of(channels)) if op is not None)

    def __call__(self, removal: Removal) -> float:
        """Milliseconds without the channels that go."""
        return float(self.parts(removal).sum())

    def parts(self, removal: Removal) -> NDArray[np.float64]:
        """The same by operator."""
        found = self._counted(removal)
        return np.array([0.0 if op is None else self.model.milliseconds(*op) for op in found])

    def _counted(self, removal: Removal) -> list[Operator | None]:
        found = self.after.operators(removal)
        return found if self.only is None else [op for op, use in zip(found, self.only, strict=True) if use]


def _plane(channels: Channels, node: fx.Node) -> tuple[int, ...] | None:
    shape = channels.program.shape(node)
    return tuple(shape[2:]) if shape is not None and len(shape) == 4 else None


def _selection(node: fx.Node, plane: tuple[int, ...] | None, width: int) -> Call | None:
    return None if plane is None else Call(node, node, Kernel("move", plane), width, width)


def _channel_shares(channels: Channels, node: fx.Node) -> tuple[NDArray[Any], NDArray[Any]]:
    """The channels that a node's value consists of, and what share of it each is."""
    labels = channels.values[node]
    if isinstance(labels, tuple):  # outputs in front of states, which have the same channels
        labels = labels[0]
    if not isinstance(labels, Tensor):
        return np.zeros(1, np.int64), np.zeros(1)
    ids, counts = np.unique(channels.channel_of[compact(labels).flatten().numpy()], return_counts=True)
    return ids, counts / counts.sum()
