"""One layer that can be split: what its ranks preserve, save and lose."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphcomp.budget import Preserved, fewest
from graphcomp.channels import multiple_for, round_within
from graphcomp.factors import (
    Factor,
    Kind,
    Plane,
    break_even,
    can_be,
    candidates,
    energies,
    full_ranks,
    layer_macs,
    params_after,
    planes,
    rank_text,
    ranks,
    unfold,
)
from graphcomp.ir import Program
from graphcomp.records import LeftAlone


@dataclasses.dataclass(frozen=True, eq=False)
class SplitLayer:
    """One layer that can be factored, with what its ranks preserve and cost.

    Attributes:
        program, name, asked, multiple, planes: what is split, how, to ranks of which multiple, and where.
        responses: what each rank loses of the outputs (`responses`); None: of its weight.
    """

    program: Program
    name: str
    asked: Kind
    multiple: int
    planes: Sequence[tuple[Plane, Plane]]
    responses: NDArray[np.float64] | None = None

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of its weight."""
        return tuple(self.program.tensors[f"{self.name}.weight"].shape)

    @cached_property
    def kind(self) -> Kind:
        """How it is split: without a kernel there is but one way."""
        return self.asked if math.prod(self.shape[2:]) > 1 else "svd"

    @cached_property
    def full(self) -> tuple[int, ...]:
        """The largest useful ranks."""
        return full_ranks(self.shape, self.kind)

    @cached_property
    def preserved(self) -> tuple[Preserved, ...]:
        """By every rank 1, 2, …: the share of the energy that it keeps, for tucker2 of either side."""
        if self.responses is not None:
            return (shares_of(self.responses),)
        matrices = unfold(self.program.tensors[f"{self.name}.weight"], self.kind)
        return tuple(shares_of(energies(matrix).cpu().numpy()) for matrix in matrices)

    @cached_property
    def rungs(self) -> Preserved:
        """The energies at which rounded ranks change, ascending."""
        sides = [
            (shares, multiple_for(full, self.multiple))
            for shares, full in zip(self.preserved, self.full, strict=True)
        ]
        return np.unique([e for shares, step in sides for e in (*shares[step - 1 :: step], shares[-1])])

    @cached_property
    def dense(self) -> int:
        """Its multiply-accumulates as one weight."""
        return self.macs(Factor(layer=self.name))

    def macs(self, factor: Factor) -> int:
        """Multiply-accumulates of all its calls after a factor, for one sample."""
        return layer_macs(self.program, factor, self.planes)

    def wanted(self, energy: float) -> tuple[int, ...]:
        """The lowest ranks that keep this much."""
        return tuple(fewest(preserved, energy) for preserved in self.preserved)

    def factor(self, wanted: Sequence[int]) -> Factor:
        """With the ranks rounded up and clipped."""
        rank, *rest = (
            round_within(r, self.multiple, full) for r, full in zip(wanted, self.full, strict=True)
        )
        whole = Factor(layer=self.name, rank=rank, kind=self.kind, rank_in=rest[0] if rest else None)
        rank, *rest = ranks(self.shape, whole)
        return whole.model_copy(update={"rank": rank, "rank_in": rest[0] if rest else None})

    def saving(self, factor: Factor, counter: str) -> int:
        """What the factors save; nothing if they are not made since they would cost more."""
        saved = self.dense - self.macs(factor)
        if saved <= 0 or counter == "macs":
            return max(saved, 0)
        weight = self.program.tensors[f"{self.name}.weight"]
        return (weight.numel() - params_after(self.shape, factor)) * weight.requires_grad

    def loss(self, factor: Factor) -> str:
        """Why factors are not made."""
        pays = f"; two factors pay below rank {break_even(self.shape):.1f}" if self.kind == "svd" else ""
        return (
            f"rank {rank_text(factor)} would cost {self.macs(factor):,} MACs, one weight {self.dense:,}{pays}"
        )

    def lost(self, factor: Factor) -> float:
        """Minus the logarithm of the energy that the ranks keep, of both sides together; of responses what
        the outputs lose.
        """
        if self.responses is not None:
            return float(self.responses[self.kept(factor)[0] :].sum())
        return -sum(
            math.log(max(p[k - 1], 1e-300)) for p, k in zip(self.preserved, self.kept(factor), strict=True)
        )

    def kept(self, factor: Factor) -> list[int]:
        """The ranks, one a side."""
        return [factor.rank or 0, factor.rank_in or 0][: len(self.full)]

    def evidence(self, factor: Factor) -> dict[str, Any]:
        """What was decided, in numbers."""
        kept = self.kept(factor)
        return {
            "layer": self.name,
            "kind": self.kind,
            "full": list(self.full),
            "kept": kept,
            "energy": [round(float(p[k - 1]), 6) for p, k in zip(self.preserved, kept, strict=True)],
            "macs": [self.dense, self.macs(factor)],
        }


Responses = tuple[dict[str, NDArray[np.float64]], dict[str, str]]
"""What `response_energies` finds."""

Energies = Mapping[SplitLayer, float]
"""What share of its energy every layer that is factored keeps at least."""


def split_layers(
    program: Program,
    kind: Kind,
    multiple: int,
    not_asked: Callable[[str], str | None],
    responses: Responses | None,
) -> tuple[list[SplitLayer], list[LeftAlone]]:
    """The layers that can be factored, and why the others cannot: `not_asked` says it of those left out."""
    found = candidates(program)
    layers, kept, at = [], [], planes(program, (name for name, why in found.items() if why is None))
    for name, obstacle in found.items():
        reason = not_asked(name) or obstacle
        if reason is None and responses is not None:
            reason = responses[1].get(name)
        if reason is None:
            energies = None if responses is None else responses[0][name]
            layer = SplitLayer(program, name, kind, multiple, at[name], energies)
            reason = None if can_be(layer.shape, layer.kind) else f"{kind} needs a 2-d kernel"
        if reason is None:
            layers.append(layer)
        else:
            kept.append(LeftAlone(where=name, reason=reason))
    return layers, kept


def shares_of(energies: Preserved) -> Preserved:
    """Cumulative and relative; a weight of zeros is preserved by rank 1."""
    total = energies.sum()
    return np.cumsum(energies) / total if total > 0 else np.ones_like(energies)
