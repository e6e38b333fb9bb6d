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
(`revert`, see `budget.restoring`). Needs no data, unless `fit=responses`. 1x1 convolutions and linear layers
have no kernel to split, so all kinds are svd there.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.base import distributed
from graphcomp.bases import (
    OPTIONS,
    TARGET,
    Asked,
    Factoring,
    Globs,
    TargetOption,
    is_greedy,
    missed,
    not_asked,
    only_one,
    options_of,
    require_matches,
)
from graphcomp.budget import REVERT_FACTORS, Revert, layer_left_alone, paying_factors
from graphcomp.factors import Kind, candidates
from graphcomp.ir import Program
from graphcomp.passes.low_rank.layer import Energies, Responses, SplitLayer, split_layers
from graphcomp.passes.low_rank.responses import response_energies
from graphcomp.passes.low_rank.targets import chosen, chosen_by, met, reached
from graphcomp.pipeline import Concern, Context, Outlook, require_data
from graphcomp.records import LeftAlone, Plan


@dataclass(frozen=True, config=OPTIONS)
class LowRank(Factoring):
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
    target: Annotated[TargetOption | None, Field(description=TARGET)] = None
    allocation: Annotated[
        Asked,
        Field(
            description="how a target is met: uniform: the same energy in every layer; greedy: step by step "
            "what saves most for what is lost; auto: greedy for a latency or responses, else uniform"
        ),
    ] = "auto"
    fit: Annotated[
        Literal["weights", "responses"],
        Field(
            description="what ranks are to keep: the weights' energy, or what the outputs lose, measured on "
            "data without labels; follow it by refit"
        ),
    ] = "weights"
    kind: Annotated[
        Kind, Field(description="svd; spatial: kh x 1 then 1 x kw; tucker2: 1x1, kh x kw, 1x1")
    ] = "svd"
    multiple: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(
            description="ranks are rounded up to it, or to a divisor that is at most half of the full rank; "
            "default from the target, 1 switches it off"
        ),
    ] = None
    include: Annotated[Globs, Field(description="globs on module paths of layers")] = ("*",)
    exclude: Annotated[Globs, Field(description="globs on module paths of layers to leave alone")] = ()
    revert: Annotated[Revert, Field(description=REVERT_FACTORS)] = "auto"

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        amounts = ("rank", "ratio", "energy", "target")
        only_one({name: getattr(self, name) is not None for name in amounts}, "energy=0.9")
        if self.fit == "responses" and self.kind != "svd":
            raise ValueError(f"found fit=responses with kind={self.kind}, expected svd")
        return self

    def require(self, outlook: Outlook) -> None:
        """Layers for every glob."""
        if self.fit == "responses":
            require_data(self.name, outlook.context)
        if outlook.names:
            require_matches((*self.include, *self.exclude), candidates(outlook.program))

    def plan(self, program: Program, context: Context) -> Plan:
        """Choose ranks; PassError if the target cannot be met. Collective."""
        responses: Responses | None = None
        if self.fit == "responses":
            asked = [n for n, why in candidates(program).items() if not why and not self._not_asked(n)]
            responses = response_energies(program, asked, context, self.name)
        # The rest needs no data, so the others would only do it again.
        return distributed.on_first(lambda: self._plan(program, context, responses))

    def _plan(self, program: Program, context: Context, responses: Responses | None) -> Plan:
        multiple = self.multiple or context.target.multiple
        require_matches((*self.include, *self.exclude), candidates(program))
        layers, kept = split_layers(program, self.kind, multiple, self._not_asked, responses)
        energies: Energies | None = None
        clock, timed = None, dict[str, Any]()
        if self.energy is not None:
            energies = dict.fromkeys(layers, self.energy)
        elif self.target is not None:
            energies, clock, timed = met(program, layers, self.target, context.clock, self._is_greedy)
        if energies is None:
            made, left = chosen(layers, {layer: self._wanted(layer) for layer in layers})
        else:
            made, left = chosen_by(layers, energies, clock)
        kept += left
        revert = self.revert if clock is None else "never"  # by times already
        paid = paying_factors(program, list(made.values()), revert, context.clock)
        kept += [
            LeftAlone(where=x.name, reason=layer_left_alone(f, None, paid.slower[x.name], x.shape[1]))
            for x, f in made.items()
            if x.name in paid.slower
        ]
        made = {layer: factor for layer, factor in made.items() if layer.name in paid.choice}
        left_over = reached(program, self.target, made) if paid.slower else {}
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"factors": [f.model_dump(mode="json") for f in made.values()]},
            kept=kept,
            summary=f"factored {len(made)} of {len(made) + len(kept)} layers ({self.kind})"
            + missed(**left_over.get("target", {})),
            evidence={
                "multiple": multiple,
                "energy": None if self._is_greedy else next(iter((energies or {}).values()), None),
                "layers": [layer.evidence(factor) for layer, factor in made.items()],
                **timed,
                **left_over,
                **paid.evidence("layers", str),
            },
        )

    def _not_asked(self, layer: str) -> str | None:
        return not_asked([layer], self.include, self.exclude)

    @property
    def _is_greedy(self) -> bool:
        """Losses of responses add up over layers, and one share of them says nothing."""
        by_responses = self.fit == "responses" and self.allocation == "auto"
        return self.target is not None and (by_responses or is_greedy(self.allocation, self.target))

    def _wanted(self, layer: SplitLayer) -> tuple[int, ...]:
        """Ranks before rounding, if they are what is asked for."""
        if self.rank is not None:
            return (self.rank,) * len(layer.full)
        assert self.ratio is not None
        return tuple(math.ceil(self.ratio * full - 1e-9) for full in layer.full)
