"""What all passes that remove channels share: options, allocation, and the three verbs.

A criterion scores channels and nothing else; how many go, which may go, and how they go is decided here and
in `graphcomp.surgery`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.channels import ChannelGroup, Channels, JoinPolicy, analyse
from graphcomp.cost import layer_row, layer_weight, params_trainable
from graphcomp.errors import PassError
from graphcomp.pipeline import Context, Plan
from graphcomp.program import Program
from graphcomp.records import Kept
from graphcomp.surgery import Drop, drop_of, dropped_rows, feasible, legalise, mask, no_drop, remove

Scores = NDArray[np.float64]
"""Importance by channel id; the lowest go first."""

Ratios = dict[str, float]
"""Group name -> fraction of its channels to remove."""

OPTIONS = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def _parse_target(value: Any) -> Any:
    """`macs:0.5` as on the command line, or {"macs": 0.5} as in a recipe."""
    if isinstance(value, str):
        name, found, amount = value.partition(":")
        if not found:
            raise ValueError("expected macs:FRACTION or params:FRACTION")
        return {name.strip(): amount.strip()}
    return value


Budget = Annotated[
    dict[Literal["macs", "params"], Annotated[float, Field(gt=0, lt=1)]],
    BeforeValidator(_parse_target),
    Field(min_length=1, max_length=1),
]
Globs = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]


def options_of(pass_: Any) -> dict[str, Any]:
    """A pass's options as plain JSON values."""
    dumped: dict[str, Any] = TypeAdapter(type(pass_)).dump_python(pass_, mode="json")
    return dumped


@dataclass(frozen=True, config=OPTIONS)
class ChannelRemoval(ABC):
    """Base of the passes that remove channels.

    Options:
        ratio: fraction of each group's channels to remove, in [0, 1).
        target: {"macs": x} or {"params": x}: the same ratio everywhere, the smallest that brings the whole
            network down to the fraction x of what this pass was given.
        min_channels: every group keeps at least this many.
        multiple: kept counts are rounded up to it; default from the target, 1 switches it off.
        include, exclude: globs on module paths; a group is considered if any of its producers is included
            and none is excluded.
        join: "couple" (both sides of an addition lose the same channels) or "pad" (each keeps its own and is
            padded with zeros).
        allow_nothing: removing nothing is an error unless this is set.
    """

    name: ClassVar[str]

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    target: Budget | None = None
    min_channels: Annotated[int, Field(ge=1)] = 1
    multiple: Annotated[int, Field(ge=1)] | None = None
    include: Globs = ("*",)
    exclude: Globs = ()
    join: JoinPolicy = "couple"
    allow_nothing: bool = False

    needs_amount: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.ratio is not None and self.target is not None:
            raise ValueError("found both ratio and target, expected one of them")
        if self.needs_amount and self.ratio is None and self.target is None:
            raise ValueError("found neither ratio nor target, expected one of them, e.g. ratio=0.5")
        return self

    @abstractmethod
    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """Importance by channel id, and group name -> reason for groups that the criterion cannot judge."""

    def keep_counts(self, scores: Scores, group: ChannelGroup, ratio: float) -> int:
        """How many of a group's channels stay, before rounding."""
        return len(group.channels) - math.floor(ratio * len(group.channels) + 1e-9)

    def plan(self, program: Program, context: Context) -> Plan:
        """Choose the channels; PassError if none can go, unless that is allowed."""
        channels = analyse(program, self.join)
        scores, unjudged = self.score(channels, context)
        multiple = self.multiple or context.target.multiple
        groups, kept = self._candidates(channels, unjudged)

        def choose(ratios: Ratios) -> Drop:
            drop = no_drop(channels)
            for group in groups:
                keep = self.keep_counts(scores, group, ratios[group.name])
                _drop_lowest(drop, group, scores, round_up(keep, group, multiple, self.min_channels))
            return legalise(channels, drop, scores)

        ratios = self._ratios(channels, groups, scores, choose)
        drop, refused = feasible(channels, choose(ratios), scores)
        kept += [Kept(where=node, reason=reason) for node, reason in refused.items()]
        kept += _untouched(groups, drop, multiple, self.min_channels)
        if not drop.any() and not self.allow_nothing:
            reasons = "; ".join(f"{k.where}: {k.reason}" for k in kept[:5]) or "there is nothing to remove"
            raise PassError(
                f"found no channel to remove ({reasons}), expected some; set allow_nothing to accept"
            )
        gone = dropped_rows(channels, drop)
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"join": self.join, "rows": gone, "ratios": ratios, "multiple": multiple},
            kept=kept,
            summary=_summary(channels, drop),
        )

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Zeros where the removed channels are read."""
        channels = analyse(program, plan.decisions["join"])
        return mask(program, channels, drop_of(channels, plan.decisions["rows"]))

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Take the channels out."""
        channels = analyse(program, plan.decisions["join"])
        return remove(program, channels, drop_of(channels, plan.decisions["rows"]), self.name)

    def _candidates(
        self, channels: Channels, unjudged: dict[str, str]
    ) -> tuple[list[ChannelGroup], list[Kept]]:
        groups: list[ChannelGroup] = []
        kept: list[Kept] = []
        layers = {p for g in channels.groups for p in g.producers}
        for glob in (*self.include, *self.exclude):
            if glob != "*" and not any(fnmatch(layer, glob) for layer in layers):
                raise PassError(
                    f"include/exclude: found no layer that {glob!r} matches, expected one of "
                    f"{', '.join(sorted(layers)[:8])}, …"
                )
        for group in channels.groups:
            reason = None
            if group.pinned is not None:
                reason = f"{group.pinned[1]} ({group.pinned[0]})"
            elif not any(fnmatch(p, g) for p in group.producers for g in self.include):
                reason = "not included" if group.producers else None
            elif excluded(group.producers, self.exclude):
                reason = "excluded"
            elif group.name in unjudged:
                reason = unjudged[group.name]
            if reason is not None:
                kept.append(Kept(where=group.name, reason=reason))
            elif group.producers and not group.derived:
                groups.append(group)
        return groups, kept

    def _ratios(
        self,
        channels: Channels,
        groups: list[ChannelGroup],
        scores: Scores,
        choose: Callable[[Ratios], Drop],
    ) -> Ratios:
        """The given ratio for every group, or ratios that meet the target."""
        uniform = {g.name: self.ratio or 0.0 for g in groups}
        if self.target is None:
            return uniform
        ((counter, fraction),) = self.target.items()
        cost = CostModel(channels)
        goal = fraction * cost(no_drop(channels), counter)

        def meets(ratios: Ratios) -> bool:
            return cost(choose(ratios), counter) <= goal

        low, high = 0.0, 1.0
        if not meets(dict.fromkeys(uniform, high)):
            least = cost(choose(dict.fromkeys(uniform, high)), counter) / goal * fraction
            raise PassError(
                f"target {counter}: found {least:.3f} of the {counter} left when only {self.min_channels} "
                f"channels a group (rounded up to the multiple) stay, expected {fraction}; ask for less, "
                "include more layers, or set multiple=1"
            )
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if meets(dict.fromkeys(uniform, middle)) else (middle, high)
        return _refill(dict.fromkeys(uniform, high), low, groups, scores, choose, meets)


def _refill(
    ratios: Ratios,
    low: float,
    groups: list[ChannelGroup],
    scores: Scores,
    choose: Callable[[Ratios], Drop],
    meets: Callable[[Ratios], bool],
) -> Ratios:
    """Rounding makes groups of one width jump together, past the target: give back what there is room for.

    The groups that would lose the largest share of their importance by the jump get theirs back first.
    """
    more, less = choose(ratios), choose(dict.fromkeys(ratios, low))

    def regained(group: ChannelGroup) -> float:
        back = group.channels[more[group.channels] & ~less[group.channels]]
        return float(scores[back].sum() / max(float(scores[group.channels].sum()), 1e-300))

    for group in sorted(groups, key=regained, reverse=True):
        trial = {**ratios, group.name: low}
        if regained(group) > 0 and meets(trial):
            ratios = trial
    return ratios


def excluded(paths: Iterable[str], globs: Sequence[str]) -> bool:
    """Whether any of the module paths matches any of the globs."""
    return any(fnmatch(path, glob) for path in paths for glob in globs)


def round_up(keep: int, group: ChannelGroup, multiple: int, min_channels: int) -> int:
    """Kept channels after rounding up: to the multiple, and to equal numbers in every block."""
    total, blocks = len(group.channels), int(group.blocks.max()) + 1
    step = math.lcm(multiple, blocks)
    keep = max(keep, min_channels)
    return min(total, math.ceil(keep / step) * step) if total % blocks == 0 else total


def _drop_lowest(drop: Drop, group: ChannelGroup, scores: Scores, keep: int) -> None:
    blocks = int(group.blocks.max()) + 1
    for block in range(blocks):
        members = group.channels[group.blocks == block]
        order = members[np.argsort(scores[members], kind="stable")]
        drop[order[: len(members) - keep // blocks]] = True


def _untouched(groups: list[ChannelGroup], drop: Drop, multiple: int, min_channels: int) -> list[Kept]:
    """Groups that could lose channels and lost none."""
    found = []
    for group in groups:
        if drop[group.channels].any():
            continue
        width = len(group.channels)
        if width <= min_channels:
            tied = f", coupled at {', '.join(group.coupled_by[:3])}" if group.coupled_by else ""
            reason = f"{width} channel(s) wide{tied}"
        elif round_up(1, group, multiple, min_channels) >= width:
            reason = (
                f"{width} channels are no more than one block of {multiple}, which the target computes anyway"
            )
        else:
            reason = "nothing left to remove after rounding up and the criterion's choice"
        found.append(Kept(where=group.name, reason=reason))
    return found


def _summary(channels: Channels, drop: Drop) -> str:
    touched = sum(bool(drop[g.channels].any()) for g in channels.groups)
    total = sum(len(g.channels) for g in channels.groups)
    return (
        f"removed {int(drop.sum())} of {total} coupled channels in {touched} of {len(channels.groups)} groups"
    )


class CostModel:
    """Parameters and MACs of a program after a removal, from the axes alone."""

    def __init__(self, channels: Channels) -> None:
        program, self.axes = channels.program, channels.axes
        self.total_params = params_trainable(program)
        self.sizes: dict[str, tuple[int, bool]] = {}
        name_of: dict[int, str] = {}  # a tied weight is on the axes under one of its names
        for axis in self.axes:
            for name, _ in axis.tensors:
                tensor = program.tensors[name]
                self.sizes[name] = tensor.numel(), tensor.requires_grad
                name_of[id(tensor)] = name
        self.macs: dict[str, int] = {}
        for node in program.graph.nodes:
            row = layer_row(program, node)
            if row is not None:
                weight = name_of.get(id(layer_weight(program, node)), "")
                self.macs[weight] = self.macs.get(weight, 0) + row.macs

    def __call__(self, drop: Drop, counter: Literal["macs", "params"]) -> float:
        """The counter after the removal."""
        left = dict.fromkeys(self.sizes, 1.0)
        for axis in self.axes:
            fraction = 1 - float(drop[axis.channels].mean())
            for name, _ in axis.tensors:
                left[name] *= fraction
        if counter == "macs":
            return sum(m * left.get(weight, 1.0) for weight, m in self.macs.items())
        lost = sum(n * (1 - left[name]) for name, (n, trainable) in self.sizes.items() if trainable)
        return self.total_params - lost
