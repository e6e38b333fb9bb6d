"""What cc can be asked for, and which layers that means."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, Globs, matches, not_asked, require_matches
from graphcomp.budget import REVERT_FACTORS, Revert
from graphcomp.factors import candidates
from graphcomp.ir import Program
from graphcomp.passes.cc.gcro import Slope
from graphcomp.passes.cc.layers import network_ends, too_large
from graphcomp.passes.cc.mshc import Lookahead
from graphcomp.records import LeftAlone


@dataclass(frozen=True, config=OPTIONS)
class Options:
    """The fields of a recipe's `cc{…}`."""

    rate: Annotated[float, Field(ge=0, lt=1, description="of the network's MACs, that go")]
    fit: Annotated[
        Literal["gradients", "responses"],
        Field(
            description="what decides: the loss's gradient (the authors), or what the outputs lose, measured "
            "on data without labels; follow it by refit"
        ),
    ] = "gradients"
    only: Annotated[
        Globs,
        Field(description="globs on layers: the region to compress, decided as if all layers were"),
    ] = ("*",)
    samples: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="labelled samples that the gradient is the mean over; null: all (the authors)"),
    ] = 5000
    gamma: Annotated[float, Field(ge=0, description="weight of the lookahead")] = 0.9
    step: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="units that go after one evaluation; default 1 % of the layer's, at least 1"),
    ] = None
    lookahead: Annotated[
        Lookahead,
        Field(description="exact; held: with the singular directions held; auto: held for very large layers"),
    ] = "auto"
    ceiling: Annotated[float, Field(gt=0, le=1, description="of a layer's MACs, at most, that go")] = 0.95
    slope: Annotated[
        Slope, Field(description="of loss over rate: equal (the authors), or per_flop (least total loss)")
    ] = "equal"
    official_clip: Annotated[
        bool, Field(description="count layers beyond the ceiling as the authors' code does")
    ] = False
    multiple: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(
            description="widths and ranks are rounded up to it, or to a divisor that is at most half of what "
            "a layer has; default from the target, 1 switches it off"
        ),
    ] = None
    include: Annotated[
        Globs | None,
        Field(description="globs on layers to analyse; default: all but the first, the last and huge ones"),
    ] = None
    exclude: Annotated[Globs, Field(description="globs on layers to leave out of the analysis")] = ()
    revert: Annotated[Revert, Field(description=REVERT_FACTORS)] = "auto"

    @model_validator(mode="after")
    def _of_one_rule(self) -> Self:
        own = ("samples", "gamma", "step", "lookahead", "slope", "official_clip")
        fields = type(self).__dataclass_fields__
        idle = [name for name in own if getattr(self, name) != fields[name].default]
        if self.fit == "responses" and idle:
            raise ValueError(
                f"found {idle[0]} with fit=responses, where it has no effect; leave one of them out"
            )
        return self

    def layers(self, program: Program) -> tuple[list[str], list[LeftAlone]]:
        """The layers to analyse, and why the others are not."""
        found = candidates(program)
        require_matches((*(self.include or ()), *self.exclude, *self.only), found, "include/exclude/only")
        doubts = network_ends(program) | too_large(program, found) if self.include is None else {}
        included = ("*",) if self.include is None else self.include
        reasons = {n: not_asked([n], included, self.exclude) or found[n] or doubts.get(n) for n in found}
        kept = [LeftAlone(where=name, reason=reason) for name, reason in reasons.items() if reason]
        return [name for name, reason in reasons.items() if not reason], kept

    def outside(self, layer: str) -> str | None:
        """Why a layer that is analysed stays as it is."""
        return None if matches([layer], self.only) else "outside of the region (only)"
