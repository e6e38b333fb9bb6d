"""What all passes that remove channels share: options and the three verbs.

A criterion judges channels and nothing else; how many go is decided in `budget.allocation`, how they go in
`channels.surgery`, and which may go here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.base import distributed
from graphcomp.bases.compensation import calibrated
from graphcomp.bases.options import (
    JOIN,
    OPTIONS,
    TARGET,
    Asked,
    Globs,
    JoinOption,
    TargetOption,
    is_greedy,
    not_asked,
    options_of,
    require_matches,
)
from graphcomp.bases.outcome import missed, moved, moved_evidence, restated, summary, untouched
from graphcomp.budget import (
    REVERT,
    Allocation,
    Cost,
    Judgement,
    LatencyCost,
    Paying,
    Revert,
    cost_of,
    group_left_alone,
    latency,
    paying,
)
from graphcomp.channels import (
    ChannelGroup,
    Channels,
    Granularity,
    JoinPolicy,
    Removal,
    analyse,
    opaque_layers,
    round_up,
)
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.pipeline import Concern, Context, Outlook, require_data
from graphcomp.records import LeftAlone, Plan, Width


class RowRemoval:
    """The two verbs of passes whose plans name rows: `{"join": policy, "rows": {layer: output rows}}`.

    Plans by which heads or groups go whole have a `"granularity"` as well.
    """

    name: ClassVar[str]

    def foresee(self, outlook: Outlook) -> Outlook:
        """The same layers, narrower."""
        return outlook

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Zeros where the removed channels are read."""
        return _planned(program, plan).mask()

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Take the channels out."""
        return _planned(program, plan).apply(self.name)


def _planned(program: Program, plan: Plan) -> Removal:
    decided = plan.decisions
    channels = analyse(program, decided["join"], decided.get("granularity", "channel"))
    return Removal.from_rows(channels, decided["rows"])


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
        Field(
            description="kept counts are rounded up to it, or to a divisor that is at most half of what a "
            "group has; default from the target, 1 switches it off"
        ),
    ] = None
    include: Annotated[
        Globs, Field(description="globs on module paths; a group is considered if any producer matches")
    ] = ("*",)
    exclude: Annotated[Globs, Field(description="globs on module paths; and if none of these matches")] = ()
    join: Annotated[
        JoinOption,
        Field(description=f"{JOIN}; project: coupled, and judged by what the additions yield"),
    ] = "couple"
    granularity: Annotated[
        Granularity,
        Field(
            description="channel: all heads of an attention, and all groups of a GroupNorm, lose equally "
            "many of their channels; head, group: these go whole, each judged by the sum over its channels, "
            "and counted and rounded as channels are"
        ),
    ] = "channel"
    allocation: Annotated[
        Asked | Literal["calibrated", "random"],
        Field(
            description="how a target is met: uniform: the same share of every group; greedy: step by step "
            "what saves most for the importance lost; calibrated: for the error of the outputs, measured on "
            "data, that stays once other channels make up for it; random: widths drawn from the run's seed; "
            "auto: greedy for a latency, else uniform "
            "beside layers that go whole (see min_channels), as many as lose least"
        ),
    ] = "auto"
    revert: Annotated[Revert, Field(description=REVERT)] = "auto"

    @model_validator(mode="after")
    def _random_widths_have_a_target(self) -> Self:
        if self.allocation == "random" and self.target is None:
            raise ValueError(
                "found allocation=random without target, expected both: widths are drawn until one is met"
            )
        return self

    @property
    @abstractmethod
    def share(self) -> float | None:
        """What share every group is to preserve; None if a target or the criterion's own rule decides."""

    @abstractmethod
    def judge(self, channels: Channels, groups: Sequence[ChannelGroup], context: Context) -> Judgement:
        """The order of the channels of these groups, and what keeping some of them preserves."""

    def require(self, outlook: Outlook) -> None:
        """Layers for every glob; data where losses are measured."""
        if self.target is not None and self.calibrates:
            require_data(self.name, outlook.context)
        if outlook.names and (self.include != ("*",) or self.exclude):
            self._candidates(analyse(outlook.program, self._policy, self.granularity))

    def plan(self, program: Program, context: Context) -> Plan:
        """Choose the channels; PassError if a target cannot be met."""
        channels = analyse(program, self._policy, self.granularity)
        groups, kept = self._candidates(channels)
        multiple = self.multiple or context.target.multiple
        judgement = self.judge(channels, groups, context)
        if self.target is not None and self.calibrates:
            judged = [g for g in groups if g not in judgement.unjudged]
            half = {g: round_up(len(g.channels) // 2, g, multiple, self.min_channels) for g in judged}
            judgement = calibrated(judgement, channels, half, context, self.name)
        kept += [LeftAlone(where=g.name, reason=reason) for g, reason in judgement.unjudged.items()]
        judged = [g for g in groups if g not in judgement.unjudged]
        if self.allocation == "random":
            judgement = judgement.at_random(judged, context.seed)
        allocation = Allocation(channels, judged, judgement, multiple, self.min_channels)
        shares, met = self._shares(allocation, context)
        wanted = allocation.wanted(shares) if shares is not None else {g: judgement.counts[g] for g in judged}
        removal, refused = allocation.removal(wanted).feasible(judgement.scores)
        kept += [LeftAlone(where=node, reason=reason) for node, reason in refused.items()]
        kept += untouched(judged, removal, multiple, self.min_channels)
        is_timed = "latency" in (self.target or {})
        paid = paying(removal, judgement.scores, self.revert, is_timed, context.clock)
        kept += [
            LeftAlone(where=g.name, reason=group_left_alone(g, removal, x)) for g, x in paid.slower.items()
        ]
        removal = paid.choice
        reached = self._reached(removal, met, paid)
        heads = {} if self.granularity == "channel" else {"granularity": self.granularity}
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"join": self._policy, "rows": removal.rows, **heads},
            kept=kept,
            summary=summary(removal)
            + moved(removal.shifts)
            + restated(removal.restated)
            + missed(**reached.get("target", {})),
            evidence={
                "multiple": multiple,
                "groups": self._widths(allocation, shares, wanted, removal),
                **reached,
                **met,
                **moved_evidence(removal.shifts),
                **paid.evidence("groups", lambda group: group.name),
            },
        )

    @property
    def calibrates(self) -> bool:
        """Whether a target is met by losses that are measured on data."""
        return self.allocation == "calibrated"

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
        whole = cost(Removal.of(allocation.channels))
        shares = self._meet(allocation, float(amount) * whole, cost)
        if shares is None:
            raise self._infeasible(counter, amount, allocation, cost)
        return shares, {}

    def _reached(
        self, removal: Removal, met: Mapping[str, Any], paid: Paying[Removal, ChannelGroup]
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
            cost = cost_of(counter, removal.channels)
            asked, reached = float(amount), cost(removal) / cost(Removal.of(removal.channels))
        return {"target": {"of": counter, "asked": asked, "reached": reached}}

    def _meet(self, allocation: Allocation, goal: float, cost: Cost) -> dict[ChannelGroup, float] | None:
        if self.calibrates or is_greedy(self.allocation, self.target):
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
        watch = context.clock.stopwatch(channels.program)
        asked = watch.ratio_of(amount)
        cost = LatencyCost(channels, context.clock.model(channels.program))
        whole = cost(Removal.of(channels))

        def build(shares: dict[ChannelGroup, float]) -> Program:
            removal, _ = allocation.choose(shares).feasible(scores)
            return removal.apply(self.name)

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
        whole = cost(Removal.of(allocation.channels))
        fewest = 1 if self.allocation == "uniform" else 0
        least = cost(allocation.removal(dict.fromkeys(allocation.groups, fewest))) / whole
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
        removal: Removal,
    ) -> list[dict[str, Any]]:
        """What was decided for every group that was judged, as JSON."""
        evidence = allocation.judgement.evidence
        return [
            self.record(
                group=g.name,
                channels=len(g.channels),
                share=None if shares is None or self.allocation == "random" else shares[g],
                wanted=wanted[g],
                kept=removal.kept(g),
                **evidence.get(g, {}),
            ).model_dump(mode="json", exclude_unset=True)
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
            elif group.producers:
                reason = not_asked(group.producers, self.include, self.exclude)
            if reason is not None:
                kept.append(LeftAlone(where=group.name, reason=reason))
            elif group.producers and not group.derived:
                groups.append(group)
        kept += [LeftAlone(where=layer, reason=why) for layer, why in opaque_layers(channels.program).items()]
        return groups, kept
