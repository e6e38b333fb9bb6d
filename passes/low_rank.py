"""low-rank: one layer becomes two (or three) thinner ones of fewer multiply-accumulates.

    svd      conv kh x kw (c -> R), conv 1x1 (R -> n)          W as (n, c kh kw)
    spatial  conv kh x 1 (c -> R), conv 1 x kw (R -> n)        W as (c kh, n kw) (Jaderberg et al. 2014)
    tucker2  conv 1x1 (c -> R_in), kh x kw, 1x1 (R -> n)       truncated HOSVD of W (Kim et al. 2016)

    energy(R) = (s_1^2 + ... + s_R^2) / sum s_i^2,  R = the smallest rank of at least the energy asked for

`target` is met by one energy for all layers, the largest that meets it: what a target can be met by are the
energies at which some layer's rank changes, and a binary search over these is exact. Or greedily, step by
step by what saves most for the energy lost, log(before / after): layers that the target is met without stay
whole. Ranks are rounded up to what the target's kernels compute anyway. A target of `latency` is met greedily
by predicted times, unless said otherwise, and corrected by measured ones; layers that it would not make
faster stay as well. Layers that would not get cheaper stay, and the plan says by how much: an svd pays below
R = n c k / (c k + n) (METHODS 1.1). Where the run measures times, so do layers that would get slower
(`revert`, see `budget.restoring`). Needs no data. 1x1 convolutions and linear layers have no kernel to split,
so all kinds are svd there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.base import distributed
from graphcomp.bases import (
    OPTIONS,
    TARGET,
    Asked,
    Globs,
    TargetOption,
    is_greedy,
    matches,
    missed,
    only_one,
    options_of,
    require_matches,
)
from graphcomp.budget import (
    REVERT_FACTORS,
    LayerClock,
    Preserved,
    Revert,
    Step,
    fewest,
    greedy,
    largest,
    latency,
    layer_left_alone,
    paying_factors,
    rungs,
)
from graphcomp.errors import PassError
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
    read_factors,
    rewrite,
    simulate,
    unfold,
)
from graphcomp.ir import Program
from graphcomp.measure import macs, params_trainable
from graphcomp.pipeline import Concern, Context, Outlook
from graphcomp.records import LeftAlone, Plan


@dataclass(frozen=True, config=OPTIONS)
class LowRank:
    """Split layers into thinner ones by singular values (SVD, spatial 3x1 + 1x3, or Tucker-2)."""

    name: ClassVar[str] = "low-rank"
    concern: ClassVar[Concern] = "weights"

    rank: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="the same for every layer, of tucker2 both")
    ] = None
    ratio: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None, Field(description="rank as a share of the full rank")
    ] = None
    energy: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None,
        Field(description="share of the squared singular values that every layer keeps at least"),
    ] = None
    target: Annotated[
        TargetOption | None,
        Field(description=TARGET),
    ] = None
    allocation: Annotated[
        Asked,
        Field(
            description="how a target is met: uniform: the same energy in every layer; greedy: step by step "
            "what saves most for the energy lost; auto: greedy for a latency, else uniform"
        ),
    ] = "auto"
    kind: Annotated[
        Kind, Field(description="svd; spatial: kh x 1 then 1 x kw; tucker2: 1x1, kh x kw, 1x1")
    ] = "svd"
    multiple: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="ranks are rounded up to it; default from the target, 1 switches it off"),
    ] = None
    include: Annotated[Globs, Field(description="globs on module paths of layers")] = ("*",)
    exclude: Annotated[Globs, Field(description="globs on module paths of layers to leave alone")] = ()
    revert: Annotated[Revert, Field(description=REVERT_FACTORS)] = "auto"
    allow_nothing: Annotated[bool, Field(description="factoring nothing is no error")] = False

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        amounts = ("rank", "ratio", "energy", "target")
        only_one({name: getattr(self, name) is not None for name in amounts}, "energy=0.9")
        return self

    def require(self, outlook: Outlook) -> None:
        """Layers for every glob."""
        if outlook.names:
            require_matches((*self.include, *self.exclude), candidates(outlook.program))

    def foresee(self, outlook: Outlook) -> Outlook:
        """Some layers become two, the second one in front of the same normalisation."""
        return dataclasses.replace(outlook, names=False)

    def plan(self, program: Program, context: Context) -> Plan:
        """Choose ranks; PassError if the target cannot be met, or if nothing gets cheaper. Collective."""
        # It needs no data, so the others would only do it again.
        return distributed.on_first(lambda: self._plan(program, context))

    def _plan(self, program: Program, context: Context) -> Plan:
        multiple = self.multiple or context.target.multiple
        layers, kept = self._layers(program, multiple)
        clock: LayerClock | None = None
        timed: dict[str, Any] = {}
        energies: Energies | None = None
        if self.energy is not None:
            energies = dict.fromkeys(layers, self.energy)
        if "latency" in (self.target or {}):
            clock = LayerClock(program, context.clock.model(program), [x.factor(x.full) for x in layers])
            energies, timed = self._meet_latency(program, layers, clock, context)
        elif self.target is not None:
            energies = self._meet(program, layers)
        made, left = self._chosen(layers, energies, clock)
        kept += left
        revert = self.revert if clock is None else "never"  # by times already
        paid = paying_factors(program, list(made.values()), revert, context.clock)
        for layer, factor in made.items():
            if layer.name in paid.slower:
                reason = layer_left_alone(factor, None, paid.slower[layer.name], layer.shape[1])
                kept.append(LeftAlone(where=layer.name, reason=reason))
        made = {layer: factor for layer, factor in made.items() if layer.name in paid.choice}
        reached = self._reached(program, made) if paid.slower else {}
        if not made and not self.allow_nothing:
            reasons = "; ".join(f"{k.where}: {k.reason}" for k in kept[:5]) or "the network has no such layer"
            raise PassError(
                f"found no layer that factors make cheaper ({reasons}), expected some; "
                "set allow_nothing to accept"
            )
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"factors": [f.model_dump(mode="json") for f in made.values()]},
            kept=kept,
            summary=f"factored {len(made)} of {len(made) + len(kept)} layers ({self.kind})"
            + missed(**reached.get("target", {})),
            evidence={
                "multiple": multiple,
                "energy": None
                if energies is None or self._is_greedy
                else next(iter(energies.values()), None),
                "layers": [layer.evidence(factor) for layer, factor in made.items()],
                **timed,
                **reached,
                **paid.evidence("layers", str),
            },
        )

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Write the product of the factors into every weight."""
        return simulate(program, read_factors(plan.decisions))

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Put the factors in the place of every weight."""
        return rewrite(program, read_factors(plan.decisions), self.name)

    def _layers(self, program: Program, multiple: int) -> tuple[list["_Layer"], list[LeftAlone]]:
        """The layers that can be factored, and why the others cannot."""
        found = candidates(program)
        require_matches((*self.include, *self.exclude), found)
        layers, kept, at = [], [], planes(program, (name for name, why in found.items() if why is None))
        for name, obstacle in found.items():
            reason = self._not_asked(name) or obstacle
            if reason is None:
                layer = _Layer(program, name, self.kind, multiple, at[name])
                reason = None if can_be(layer.shape, layer.kind) else f"{self.kind} needs a 2-d kernel"
            if reason is None:
                layers.append(layer)
            else:
                kept.append(LeftAlone(where=name, reason=reason))
        return layers, kept

    def _not_asked(self, name: str) -> str | None:
        if not any(fnmatch(name, glob) for glob in self.include):
            return "not included"
        return "excluded" if matches([name], self.exclude) else None

    @property
    def _is_greedy(self) -> bool:
        return self.target is not None and is_greedy(self.allocation, self.target)

    def _wanted(self, layer: "_Layer", energy: float | None) -> tuple[int, ...]:
        """Ranks before rounding."""
        if self.rank is not None:
            return (self.rank,) * len(layer.full)
        if self.ratio is not None:
            return tuple(math.ceil(self.ratio * full - 1e-9) for full in layer.full)
        assert energy is not None
        return layer.wanted(energy)

    def _chosen(
        self, layers: Sequence["_Layer"], energies: "Energies | None", clock: LayerClock | None
    ) -> tuple[dict["_Layer", Factor], list[LeftAlone]]:
        """The factors that pay, in MACs and, if time is the target, in predicted time; and the others."""
        made, kept = {}, []
        for layer in layers:
            energy = None if energies is None else energies.get(layer, 0.0)
            factor = layer.factor(self._wanted(layer, energy))
            reason = layer.loss(factor) if layer.macs(factor) >= layer.dense else None
            if reason is None and clock is not None:
                reason = _time_loss(clock, factor)
            if reason is None and energies is not None and layer not in energies:
                reason = "the target is met without it"
            if reason is None:
                made[layer] = factor
            else:
                kept.append(LeftAlone(where=layer.name, reason=reason))
        return made, kept

    def _meet_latency(
        self, program: Program, layers: Sequence["_Layer"], clock: LayerClock, context: Context
    ) -> tuple["Energies", dict[str, Any]]:
        """Energies by predicted time, corrected until what is measured is what was asked for."""
        watch = context.clock.stopwatch(program)
        asked = watch.ratio_of((self.target or {})["latency"])

        def saving(layer: _Layer, factor: Factor) -> float:
            return clock.saving(factor) if layer.macs(factor) < layer.dense else 0.0

        def left(energies: Energies) -> float:
            saved = sum(map(clock.saving, self._chosen(layers, energies, clock)[0].values()))
            return 1 - saved / clock.whole

        def propose(goal: float) -> Energies | None:
            if self._is_greedy:
                return _bought(layers, saving, clock.whole, goal * clock.whole)
            return _one_for_all(layers, lambda energies: left(energies) <= goal)

        def build(energies: Energies) -> Program:
            factors = list(self._chosen(layers, energies, clock)[0].values())
            return rewrite(simulate(program, factors), factors, self.name)

        met = latency.meet(watch, asked, propose, left, build)
        if met is None:
            raise _out_of_reach("latency", "time", left(dict.fromkeys(layers, 0.0)), asked)
        return met

    def _reached(self, program: Program, made: Mapping["_Layer", Factor]) -> dict[str, Any]:
        """What was asked for, and what part is left with these factors; nothing without a target."""
        if self.target is None:
            return {}
        ((counter, fraction),) = self.target.items()
        whole = _counted(program, counter)
        left = whole - sum(layer.saving(factor, counter) for layer, factor in made.items())
        return {"target": {"of": counter, "asked": float(fraction), "reached": left / whole}}

    def _meet(self, program: Program, layers: Sequence["_Layer"]) -> "Energies":
        """Energies that meet the target."""
        ((counter, fraction),) = (self.target or {}).items()
        fraction = float(fraction)
        whole = _counted(program, counter)

        def left(energies: Energies) -> int:
            return whole - sum(x.saving(x.factor(x.wanted(e)), counter) for x, e in energies.items())

        if self._is_greedy:
            found = _bought(layers, lambda x, f: x.saving(f, counter), whole, fraction * whole)
        else:
            found = _one_for_all(layers, lambda energies: left(energies) <= fraction * whole)
        if found is None:
            raise _out_of_reach(counter, counter, left(dict.fromkeys(layers, 0.0)) / whole, fraction)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """One layer that can be factored, with what its ranks preserve and cost."""

    program: Program
    name: str
    asked: Kind
    multiple: int
    planes: Sequence[tuple[Plane, Plane]]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.program.tensors[f"{self.name}.weight"].shape)

    @cached_property
    def kind(self) -> Kind:
        return self.asked if math.prod(self.shape[2:]) > 1 else "svd"

    @cached_property
    def full(self) -> tuple[int, ...]:
        return full_ranks(self.shape, self.kind)

    @cached_property
    def preserved(self) -> tuple[Preserved, ...]:
        """By every rank 1, 2, …: the share of the energy that it keeps, for tucker2 of either side."""
        matrices = unfold(self.program.tensors[f"{self.name}.weight"], self.kind)
        return tuple(_shares(energies(matrix).cpu().numpy()) for matrix in matrices)

    @cached_property
    def rungs(self) -> Preserved:
        """The energies at which rounded ranks change, ascending."""
        step = self.multiple
        return np.unique([e for shares in self.preserved for e in (*shares[step - 1 :: step], shares[-1])])

    @cached_property
    def dense(self) -> int:
        return self.macs(Factor(layer=self.name))

    def macs(self, factor: Factor) -> int:
        return layer_macs(self.program, factor, self.planes)

    def wanted(self, energy: float) -> tuple[int, ...]:
        """The lowest ranks that keep this much."""
        return tuple(fewest(preserved, energy) for preserved in self.preserved)

    def factor(self, wanted: Sequence[int]) -> Factor:
        """With the ranks rounded up and clipped."""
        rank, *rest = (math.ceil(r / self.multiple) * self.multiple for r in wanted)
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
        """Minus the logarithm of the energy that the ranks keep, of both sides together."""
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


Energies = Mapping[_Layer, float]
"""What share of its energy every layer that is factored keeps at least."""


def _one_for_all(layers: Sequence[_Layer], meets: Callable[[Energies], bool]) -> Energies | None:
    """The largest energy, the same for all layers, that meets a target; None if none does."""
    every = rungs(shares for layer in layers for shares in layer.preserved)
    index = largest(every, lambda energy: meets(dict.fromkeys(layers, energy)))
    return None if index is None else dict.fromkeys(layers, every[index])


def _bought(
    layers: Sequence[_Layer], saving: Callable[[_Layer, Factor], float], whole: float, goal: float
) -> Energies | None:
    """What saves most for the energy lost, step by step, until the goal is met; None if it cannot be."""
    ladders = _Ladders(layers, saving, whole)
    kept = greedy(dict.fromkeys(layers, 0), ladders.cost, goal, ladders)
    return None if kept is None else {x: float(x.rungs[i - 1]) for x, i in kept.items() if i}


class _Ladders:
    """What can be bought of layers: their rungs, from 1 on; 0 is a layer as it is.

    Args:
        saving: what a layer's factors save.
        whole: what all costs without factors.
    """

    def __init__(
        self, layers: Sequence[_Layer], saving: Callable[[_Layer, Factor], float], whole: float
    ) -> None:
        self.whole = whole
        self.savings: dict[_Layer, NDArray[Any]] = {}
        self.losses: dict[_Layer, NDArray[Any]] = {}
        for layer in layers:
            factors = [layer.factor(layer.wanted(energy)) for energy in layer.rungs]
            self.savings[layer] = np.array([0, *(saving(layer, factor) for factor in factors)])
            self.losses[layer] = np.array([0.0, *(layer.lost(factor) for factor in factors)])

    def cost(self, choice: Mapping[_Layer, int]) -> float:
        """Of a rung for every layer."""
        return self.whole - float(sum(self.savings[layer][i] for layer, i in choice.items()))

    def steps(self, layer: _Layer, choice: Mapping[_Layer, int], cost: float) -> Iterator[Step[int]]:
        """The rung that saves most for the energy lost from here."""
        saved = self.savings[layer] - self.savings[layer][choice[layer]]
        lost = np.maximum(self.losses[layer] - self.losses[layer][choice[layer]], 1e-12)
        if (saved > 0).any():
            best = int(np.where(saved > 0, saved / lost, -np.inf).argmax())
            yield Step(best, cost - float(saved[best]), float(lost[best]))

    def taken(self, layer: _Layer, before: int, choice: Mapping[_Layer, int]) -> None:
        """Nothing: layers save and lose by themselves."""


def _out_of_reach(counter: str, of: str, least: float, asked: float) -> PassError:
    return PassError(
        f"target {counter}: found {least:.3f} of the {of} left at the lowest ranks (rounded up to the "
        f"multiple), expected {asked}; ask for less, include more layers, or set multiple=1"
    )


def _counted(program: Program, counter: str) -> int:
    return macs(program) if counter == "macs" else params_trainable(program)


def _time_loss(clock: LayerClock, factor: Factor) -> str | None:
    """Why factors are not made although they have fewer MACs; None if they are faster."""
    before, after = clock.milliseconds(factor.as_one_weight()), clock.milliseconds(factor)
    if after < before:
        return None
    return f"rank {rank_text(factor)} is predicted to take {after:.3g} ms, one weight {before:.3g} ms"


def _shares(energies: Preserved) -> Preserved:
    """Cumulative and relative; a weight of zeros is preserved by rank 1."""
    total = energies.sum()
    return np.cumsum(energies) / total if total > 0 else np.ones_like(energies)
