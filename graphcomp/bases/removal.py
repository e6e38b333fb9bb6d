"""What all passes that remove channels share: options and the three verbs.

A criterion judges channels and nothing else; how many go is decided in `budget.allocation`, how they go in
`channels.surgery`, and which may go here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticKnownError

from graphcomp.base import distributed
from graphcomp.budget import (
    REVERT,
    Allocation,
    AllocationRule,
    Cost,
    Judgement,
    LatencyCost,
    Paying,
    Revert,
    Scores,
    cost_of,
    group_left_alone,
    latency,
    latency_model,
    paying,
    stopwatch,
)
from graphcomp.channels import (
    ChannelGroup,
    Channels,
    Drop,
    JoinPolicy,
    Shift,
    analyse,
    drop_of,
    dropped_rows,
    feasible,
    mask,
    no_drop,
    opaque_layers,
    remove,
    round_up,
    shifts,
)
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.pipeline import Concern, Context, Outlook
from graphcomp.records import LeftAlone, Plan, Width

OPTIONS = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def _parse_target(value: Any) -> Any:
    """`macs:0.5` as on the command line, or {"macs": 0.5} as in a recipe."""
    if isinstance(value, str):
        name, found, amount = value.partition(":")
        if not found:
            raise ValueError(
                "expected macs:FRACTION or params:FRACTION, or latency:0.5 or latency:3.5ms for times"
            )
        return {name.strip(): amount.strip()}
    return value


def _parse_amount(value: Any) -> float | str:
    """A fraction, `0.5x` of a time, or milliseconds, which stay a string: `3.5ms`."""
    text = value.strip() if isinstance(value, str) else value
    is_time = isinstance(text, str) and text.endswith("ms")
    number = text.removesuffix("ms").removesuffix("x").strip() if isinstance(text, str) else text
    try:
        if isinstance(number, bool):
            raise TypeError
        parsed = float(number)
    except (TypeError, ValueError):
        raise PydanticKnownError("float_parsing") from None
    if not parsed > 0:
        raise PydanticKnownError("greater_than", {"gt": 0})
    if is_time and math.isfinite(parsed):
        return f"{number}ms"
    if not parsed < 1:
        raise PydanticKnownError("less_than", {"lt": 1})
    return parsed


def _only_latency_is_a_time(target: dict[str, float | str]) -> dict[str, float | str]:
    for name, amount in target.items():
        if name != "latency" and isinstance(amount, str):
            raise ValueError(f"found {amount} of {name}, expected a fraction such as 0.5")
    return target


Goal = Literal["macs", "params", "latency"]
Amount = Annotated[float | str, PlainValidator(_parse_amount, json_schema_input_type=float | str)]
TargetOption = Annotated[
    dict[Goal, Amount],
    BeforeValidator(_parse_target),
    AfterValidator(_only_latency_is_a_time),
    Field(min_length=1, max_length=1),
]
TARGET = (
    "macs:x, params:x or latency:x: what is to be left of the whole network that the pass is given; "
    "latency:3.5ms is measured on the target at batch 1"
)
Globs = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
JoinOption = Literal["couple", "pad", "project"]
JOIN = "couple: both sides of an addition lose the same channels; pad: each keeps its own, padded with zeros"


Asked = AllocationRule | Literal["auto"]
"""How a target is to be met; auto: what `is_greedy` says."""


def is_greedy(allocation: Asked, target: Mapping[Goal, Any] | None) -> bool:
    """Whether a target is met greedily: if that is asked for, or if it is a latency and nothing is."""
    return allocation == "greedy" or (allocation == "auto" and "latency" in (target or {}))


def options_of(pass_: Any) -> dict[str, Any]:
    """A pass's options as plain JSON values."""
    dumped: dict[str, Any] = TypeAdapter(type(pass_)).dump_python(pass_, mode="json")
    return dumped


class RowRemoval:
    """The two verbs of passes whose plans name rows: `{"join": policy, "rows": {layer: output rows}}`."""

    name: ClassVar[str]

    def foresee(self, outlook: Outlook) -> Outlook:
        """The same layers, narrower."""
        return outlook

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Zeros where the removed channels are read."""
        channels = analyse(program, plan.decisions["join"])
        return mask(program, channels, drop_of(channels, plan.decisions["rows"]))

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Take the channels out."""
        channels = analyse(program, plan.decisions["join"])
        return remove(program, channels, drop_of(channels, plan.decisions["rows"]), self.name)


@dataclass(frozen=True, config=OPTIONS)
class ChannelRemoval(RowRemoval, ABC):
    """Base of the passes that remove channels. Derived classes add what a target is solved by."""

    concern: ClassVar[Concern] = "channels"
    record: ClassVar[type[Width]] = Width

    target: Annotated[
        TargetOption | None,
        Field(description=TARGET),
    ] = None
    min_channels: Annotated[
        int,
        Field(
            ge=0,
            description="every group keeps at least this many; 0: a target may take narrow layers whole that "
            "only concatenations read; any other group keeps 1",
        ),
    ] = 0
    multiple: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="kept counts are rounded up to it; default from the target, 1 switches it off"),
    ] = None
    include: Annotated[
        Globs, Field(description="globs on module paths; a group is considered if any producer matches")
    ] = ("*",)
    exclude: Annotated[Globs, Field(description="globs on module paths; and if none of these matches")] = ()
    join: Annotated[
        JoinOption,
        Field(description=f"{JOIN}; project: coupled, and judged by what the additions yield"),
    ] = "couple"
    allocation: Annotated[
        Asked,
        Field(
            description="how a target is met: uniform: the same share of every group; greedy: step by step "
            "what saves most for the importance lost; auto: greedy for a latency, else uniform beside layers "
            "that go whole (see min_channels), as many as lose least"
        ),
    ] = "auto"
    revert: Annotated[Revert, Field(description=REVERT)] = "auto"
    allow_nothing: Annotated[bool, Field(description="removing nothing is no error")] = False

    @property
    @abstractmethod
    def share(self) -> float | None:
        """What share every group is to preserve; None if a target or the criterion's own rule decides."""

    @abstractmethod
    def judge(self, channels: Channels, groups: Sequence[ChannelGroup], context: Context) -> Judgement:
        """The order of the channels of these groups, and what keeping some of them preserves."""

    def require(self, outlook: Outlook) -> None:
        """Layers for every glob."""
        if outlook.names and (self.include != ("*",) or self.exclude):
            self._candidates(analyse(outlook.program, self._policy))

    def plan(self, program: Program, context: Context) -> Plan:
        """Choose the channels; PassError if none can go, unless that is allowed."""
        channels = analyse(program, self._policy)
        groups, kept = self._candidates(channels)
        judgement = self.judge(channels, groups, context)
        kept += [LeftAlone(where=g.name, reason=reason) for g, reason in judgement.unjudged.items()]
        judged = [g for g in groups if g not in judgement.unjudged]
        multiple = self.multiple or context.target.multiple
        allocation = Allocation(channels, judged, judgement, multiple, self.min_channels)
        shares, met = self._shares(allocation, context)
        wanted = allocation.wanted(shares) if shares is not None else {g: judgement.counts[g] for g in judged}
        drop, refused = feasible(channels, allocation.drop(wanted), judgement.scores)
        kept += [LeftAlone(where=node, reason=reason) for node, reason in refused.items()]
        kept += _untouched(judged, drop, multiple, self.min_channels)
        is_timed = "latency" in (self.target or {})
        paid = paying(channels, drop, judgement.scores, self.revert, is_timed, context)
        kept += [LeftAlone(where=g.name, reason=group_left_alone(g, drop, x)) for g, x in paid.slower.items()]
        drop = paid.choice
        if not drop.any() and not self.allow_nothing:
            reasons = "; ".join(f"{k.where}: {k.reason}" for k in kept[:5]) or "there is nothing to remove"
            raise PassError(
                f"found no channel to remove ({reasons}), expected some; set allow_nothing to accept"
            )
        reached = self._reached(channels, drop, met, paid)
        lost = shifts(channels, drop)
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"join": self._policy, "rows": dropped_rows(channels, drop)},
            kept=kept,
            summary=_summary(channels, drop) + _moved(lost) + missed(**reached.get("target", {})),
            evidence={
                "multiple": multiple,
                "groups": self._widths(allocation, shares, wanted, drop),
                **reached,
                **met,
                **_moved_evidence(lost),
                **paid.evidence("groups", lambda group: group.name),
            },
        )

    @property
    def _policy(self) -> JoinPolicy:
        return "pad" if self.join == "pad" else "couple"

    def _shares(
        self, allocation: Allocation, context: Context
    ) -> tuple[dict[ChannelGroup, float] | None, dict[str, Any]]:
        """The share asked for, or those that meet the target; None if the criterion has counts of its own.

        With them what the plan says about times, if these are the target.
        """
        if self.target is None:
            return None if self.share is None else allocation.uniform(self.share), {}
        ((counter, amount),) = self.target.items()
        if counter == "latency":
            found, said = distributed.on_first(lambda: self._meet_latency(allocation, amount, context))
            return dict(zip(allocation.groups, found, strict=True)), said
        cost = cost_of(counter, allocation.channels)
        whole = cost(no_drop(allocation.channels))
        shares = self._meet(allocation, float(amount) * whole, cost)
        if shares is None:
            raise self._infeasible(counter, amount, allocation, cost)
        return shares, {}

    def _reached(
        self, channels: Channels, drop: Drop, met: Mapping[str, Any], paid: Paying[Drop, ChannelGroup]
    ) -> dict[str, Any]:
        """What was asked for, and what part is left in the end: after rounding, and what was restored."""
        if self.target is None:
            return {}
        ((counter, amount),) = self.target.items()
        if counter == "latency":
            asked, reached = met["latency"]["asked"], met["latency"]["measured"]
            if paid.slower and paid.milliseconds is not None:
                reached = paid.milliseconds[2] / paid.milliseconds[0]
        else:
            cost = cost_of(counter, channels)
            asked, reached = float(amount), cost(drop) / cost(no_drop(channels))
        return {"target": {"of": counter, "asked": asked, "reached": reached}}

    def _meet(self, allocation: Allocation, goal: float, cost: Cost) -> dict[ChannelGroup, float] | None:
        if is_greedy(self.allocation, self.target):
            return allocation.buy(goal, cost)
        if self.allocation == "auto":
            return allocation.meet_with_whole_layers(goal, cost)
        return allocation.meet(goal, cost)

    def _meet_latency(
        self, allocation: Allocation, amount: float | str, context: Context
    ) -> tuple[list[float], dict[str, Any]]:
        """Shares by predicted time, corrected until the time that is measured is what was asked for.

        In the order of the groups, which are other objects in every process.
        """
        channels, scores = allocation.channels, allocation.judgement.scores
        watch = stopwatch(channels.program, context)
        asked = watch.ratio_of(amount)
        cost = LatencyCost(channels, latency_model(channels.program, context))
        whole = cost(no_drop(channels))

        def build(shares: dict[ChannelGroup, float]) -> Program:
            drop, _ = feasible(channels, allocation.choose(shares), scores)
            return remove(channels.program, channels, drop, self.name)

        met = latency.meet(
            watch,
            asked,
            propose=lambda goal: self._meet(allocation, goal * whole, cost),
            predict=lambda shares: cost(allocation.choose(shares)) / whole,
            build=build,
        )
        if met is None:
            raise self._infeasible("latency", asked, allocation, cost)
        shares, evidence = met
        return [shares[group] for group in allocation.groups], evidence

    def _infeasible(self, counter: str, amount: float | str, allocation: Allocation, cost: Cost) -> PassError:
        whole = cost(no_drop(allocation.channels))
        fewest = 1 if self.allocation == "uniform" else 0
        least = cost(allocation.drop(dict.fromkeys(allocation.groups, fewest))) / whole
        return PassError(
            f"target {counter}: found {least:.3f} of the {counter} left when every group keeps as few "
            f"channels as min_channels and multiple allow, expected {amount}; ask for less, include more "
            "layers, or set multiple=1"
        )

    def _widths(
        self,
        allocation: Allocation,
        shares: Mapping[ChannelGroup, float] | None,
        wanted: Mapping[ChannelGroup, int],
        drop: Drop,
    ) -> list[dict[str, Any]]:
        """What was decided for every group that was judged, as JSON."""
        evidence = allocation.judgement.evidence
        return [
            self.record(
                group=g.name,
                channels=len(g.channels),
                share=None if shares is None else shares[g],
                wanted=wanted[g],
                kept=int((~drop[g.channels]).sum()),
                **evidence.get(g, {}),
            ).model_dump(mode="json")
            for g in allocation.groups
        ]

    def _candidates(self, channels: Channels) -> tuple[list[ChannelGroup], list[LeftAlone]]:
        groups: list[ChannelGroup] = []
        kept: list[LeftAlone] = []
        layers = {p for g in channels.groups for p in g.producers}
        require_matches((*self.include, *self.exclude), layers)
        for group in channels.groups:
            reason = None
            if group.pinned is not None:
                reason = f"{group.pinned[1]} ({group.pinned[0]})"
            elif not any(fnmatch(p, g) for p in group.producers for g in self.include):
                reason = "not included" if group.producers else None
            elif matches(group.producers, self.exclude):
                reason = "excluded"
            if reason is not None:
                kept.append(LeftAlone(where=group.name, reason=reason))
            elif group.producers and not group.derived:
                groups.append(group)
        kept += [LeftAlone(where=layer, reason=why) for layer, why in opaque_layers(channels.program).items()]
        return groups, kept


@dataclass(frozen=True, config=OPTIONS)
class RatioRemoval(ChannelRemoval):
    """Base of the criteria that only score channels: the same ratio goes everywhere."""

    needs_amount: ClassVar[bool] = True

    join: Annotated[JoinPolicy, Field(description=JOIN)] = "couple"
    ratio: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None,
        Field(description="fraction of each group's channels to remove"),
    ] = None

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = {"ratio": self.ratio is not None, "target": self.target is not None}
        if self.needs_amount or any(given.values()):
            only_one(given, "ratio=0.5")
        return self

    @property
    def share(self) -> float | None:
        """Of the channels: those that stay."""
        return None if self.ratio is None else 1 - self.ratio

    @abstractmethod
    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """Importance by channel id, and group name -> reason for groups that the criterion cannot judge."""

    def own_count(self, scores: Scores, group: ChannelGroup) -> int:
        """How many channels stay if neither ratio nor target says: for criteria with a rule of their own."""
        return len(group.channels)

    def judge(self, channels: Channels, groups: Sequence[ChannelGroup], context: Context) -> Judgement:
        """Every channel preserves as much as any other."""
        scores, unjudged = self.score(channels, context)
        return Judgement(
            scores,
            preserved={g: np.arange(1, len(g.channels) + 1) / len(g.channels) for g in groups},
            counts={g: self.own_count(scores, g) for g in groups},
            unjudged={g: unjudged[g.name] for g in groups if g.name in unjudged},
            worth={g: _held(scores[g.channels]) for g in groups},
        )


def _held(scores: Scores) -> Scores:
    """What part of the sum of scores the 1, 2, … highest hold; shape (n,)."""
    held = np.cumsum(np.sort(np.maximum(scores, 0))[::-1])
    return held / held[-1] if held[-1] > 0 else np.ones_like(held)


def only_one(given: Mapping[str, bool], example: str) -> None:
    """ValueError unless exactly one of the named options is given."""
    found = [name for name, is_given in given.items() if is_given]
    if len(found) > 1:
        raise ValueError(f"found both {' and '.join(found)}, expected one of them")
    if not found:
        raise ValueError(f"found neither {' nor '.join(given)}, expected one of them, e.g. {example}")


def require_matches(globs: Iterable[str], layers: Iterable[str], place: str = "include/exclude") -> None:
    """PassError if a glob matches no layer."""
    known = sorted(layers)
    for glob in globs:
        if glob != "*" and not any(fnmatch(layer, glob) for layer in known):
            raise PassError(
                f"{place}: found no layer that {glob!r} matches, expected one of {', '.join(known[:8])}, …"
            )


def matches(paths: Iterable[str], globs: Sequence[str]) -> bool:
    """Whether any of the module paths matches any of the globs."""
    return any(fnmatch(path, glob) for path in paths for glob in globs)


def _untouched(groups: list[ChannelGroup], drop: Drop, multiple: int, min_channels: int) -> list[LeftAlone]:
    """Groups that could lose channels and lost none."""
    found = []
    for group in groups:
        if drop[group.channels].any():
            continue
        width = len(group.channels)
        if width <= max(min_channels, 1):
            tied = f", coupled at {', '.join(group.coupled_by[:3])}" if group.coupled_by else ""
            reason = f"{width} channel(s) wide{tied}"
        elif round_up(1, group, multiple, min_channels) >= width:
            reason = (
                f"{width} channels are no more than one block of {multiple}, which the target computes anyway"
            )
        else:
            reason = "nothing left to remove after rounding up and the criterion's choice"
        found.append(LeftAlone(where=group.name, reason=reason))
    return found


def _summary(channels: Channels, drop: Drop) -> str:
    groups = [drop[g.channels] for g in channels.groups]
    lost, total = [gone for gone in groups if gone.any()], sum(map(len, groups))
    whole = sum(bool(gone.all()) for gone in lost)
    return f"removed {int(drop.sum())} of {total} coupled channels in {len(lost)} of {len(groups)} groups" + (
        f", {whole} of them whole" if whole else ""
    )


def _moved(lost: Sequence[Shift]) -> str:
    """What the summary adds where removed channels held constants: see `channels.shifts`."""
    if not lost:
        return ""
    border = [s.layer for s in lost if not s.exact]
    more = ", …" if len(border) > 3 else ""
    doubt = f", but for the padded borders of {', '.join(border[:3])}{more}" if border else ""
    return f"; what was constant of them went into the biases of {len(lost)} layers{doubt}"


def _moved_evidence(lost: Sequence[Shift]) -> dict[str, Any]:
    if not lost:
        return {}
    border = [s.layer for s in lost if not s.exact]
    return {"constants": {s.layer: s.channels for s in lost}, "inexact_at_the_border": border}


def missed(of: str = "", asked: float = 1.0, reached: float = 0.0) -> str:
    """What the summary adds where more is left than was asked for."""
    return f"; {reached:.3f} of the {of} left, {asked:.3g} asked for" if reached > asked * 1.001 else ""
