"""cc: collaborative compression (Li et al. 2021, "Towards Compact CNNs via Collaborative Compression").

Channel pruning and low-rank decomposition of every layer, decided together from the loss's mean gradient G:

    units     of a weight W: its input channels, and its singular directions       `_cc_units`, METHODS 1.1
    loss      of a changed weight X: S[(G * (X - W))^2]                            `_cc_units`, (1.2)
    GCRO      a rate for every layer; together they meet the global rate           `_gcro`, (1.3)
    MSHC      which units a layer gives up for its rate                            `_mshc`, (1.4)
    weights   the best rank-R approximation of the original W[:, K], two factors   `factors.surgery`
    paying    layers that all this makes slower on the target stay, if asked for   `budget.restoring`

The rate is one of MACs of the whole network. Only readers change: a layer reads the channels K of its input;
channels that nobody reads then go with their producers. `multiple=1` gives the numbers of the paper. Rounded
up, every layer still meets its rate, and what all give up beyond the global one is handed back (`hand_back`).

`only` compresses a region: the analysis is that of the whole network all the same (Liu's study, METHODS 1.6).
It is kept on disk layer by layer, so that other rates and regions of the same network take no time.

`fit=responses` decides by what layers lose of what they compute instead, without labels (`_responses`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from graphcomp.base import Progress, distributed, part
from graphcomp.bases import OPTIONS, Factoring, Globs, matches, missed, not_asked, options_of, require_matches
from graphcomp.budget import (
    REVERT_FACTORS,
    Revert,
    is_asked,
    paying_factors,
)
from graphcomp.errors import DataError
from graphcomp.factors import Factor, candidates, layer_macs
from graphcomp.ir import Program
from graphcomp.measure import macs, mean_gradients
from graphcomp.passes.cc.analysis import Analysis, side_by_side
from graphcomp.passes.cc.decided import Allocated, CompressibleLayer, hand_back, settled
from graphcomp.passes.cc.forms import Compression
from graphcomp.passes.cc.gcro import Slope, solve_rates
from graphcomp.passes.cc.layers import network_ends, too_large
from graphcomp.passes.cc.mshc import Lookahead
from graphcomp.passes.cc.responses import bought, response_forms
from graphcomp.pipeline import Concern, Context, Outlook, require_data
from graphcomp.records import LeftAlone, Plan

GRADIENT_PART, TIMED_PART = 0.5, 0.2
"""Of the progress bar: of what is decided without a clock, and of all where times are measured."""


@dataclass(frozen=True, config=OPTIONS)
class CC(Factoring):
    """Decide about channels and ranks of every layer together, under one global rate (Li et al. 2021)."""

    name: ClassVar[str] = "cc"
    concern: ClassVar[Concern] = "weights"

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
            description="widths and ranks are rounded up to it; default from the target, 1 switches it off"
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

    def require(self, outlook: Outlook) -> None:
        """Data, labelled for gradients, and layers for every glob."""
        require_data(self.fit, outlook.context, labels=self.fit == "gradients")
        if outlook.names:
            self._layers(outlook.program)

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide for all layers; PassError if the rate cannot be met."""
        multiple = self.multiple or context.target.multiple
        names, kept = self._layers(program)
        untimed = 1 - TIMED_PART if is_asked(self.revert, False, context.clock) else 1
        timing = replace(context, progress=part(context.progress, untimed, 1 - untimed))
        context = replace(context, progress=part(context.progress, 0, untimed))
        if self.fit == "responses":
            rows, unjudged = self._by_responses(program, context, names, multiple)
            kept += unjudged
        else:
            gradients = self._gradients(program, context, names)
            # What follows needs no data, and the others would only do it again.
            rows = distributed.on_first(lambda: self._decide(program, context, gradients, multiple))
        wanted = [row.factor for row in rows if not row.reason]
        paid = paying_factors(program, wanted, self.revert, timing.clock, multiple)
        rows, split_no_more = settled(rows, paid)
        kept += split_no_more
        kept += [LeftAlone(where=row.factor.layer, reason=row.reason) for row in rows if row.reason]
        factors = [row.factor for row in rows if not row.reason]
        split = sum(f.rank is not None for f in factors)
        reached = self._reached(program, rows) if paid.slower else {}
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"factors": [f.model_dump(mode="json") for f in factors], "multiple": multiple},
            kept=kept,
            summary=f"compressed {len(factors)} of {len(rows)} layers, {split} of them into two factors"
            + missed(**reached.get("target", {})),
            evidence={
                "multiple": multiple,
                "layers": [row.model_dump(mode="json") for row in rows],
                **reached,
                **paid.evidence("layers", str),
            },
        )

    def _layers(self, program: Program) -> tuple[list[str], list[LeftAlone]]:
        """The layers to analyse, and why the others are not."""
        found = candidates(program)
        require_matches((*(self.include or ()), *self.exclude, *self.only), found, "include/exclude/only")
        doubts = network_ends(program) | too_large(program, found) if self.include is None else {}
        included = ("*",) if self.include is None else self.include
        reasons = {n: not_asked([n], included, self.exclude) or found[n] or doubts.get(n) for n in found}
        kept = [LeftAlone(where=name, reason=reason) for name, reason in reasons.items() if reason]
        return [name for name, reason in reasons.items() if not reason], kept

    def _reached(self, program: Program, rows: Sequence[Allocated]) -> dict[str, Any]:
        """What is asked for and what is left before channels that nobody reads go; not of a region."""
        if self.only != ("*",):
            return {}
        gone = sum(row.macs * row.reached for row in rows if not row.reason)
        return {"target": {"of": "macs", "asked": 1 - self.rate, "reached": 1 - gone / macs(program)}}

    def _gradients(self, program: Program, context: Context, names: Sequence[str]) -> dict[str, Tensor]:
        """The mean gradient of every layer's weight, by layer."""
        if not names:
            return {}
        if context.data is None:
            raise DataError("gradients: found no data, expected labelled samples; give --data")
        weights = [f"{name}.weight" for name in names]
        tell = part(context.progress, 0, GRADIENT_PART)
        found = mean_gradients(program, context.data.train, weights, samples=self.samples, progress=tell)
        return {name: found[weight] for name, weight in zip(names, weights, strict=True)}

    def _by_responses(
        self, program: Program, context: Context, names: Sequence[str], multiple: int
    ) -> tuple[list[Allocated], list[LeftAlone]]:
        """One row a layer that can be judged, and why the others cannot."""
        if not names:
            return [], []
        forms, unjudged = response_forms(program, names, context, self.name, multiple, self.ceiling)
        rows = distributed.on_first(lambda: bought(program, forms, self.rate))
        rows = [
            row.model_copy(update={"reason": row.reason or self._outside(row.factor.layer)}) for row in rows
        ]
        return rows, [LeftAlone(where=layer, reason=reason) for layer, reason in unjudged.items()]

    def _outside(self, layer: str) -> str | None:
        return None if matches([layer], self.only) else "outside of the region (only)"

    def _decide(
        self, program: Program, context: Context, gradients: Mapping[str, Tensor], multiple: int
    ) -> list[Allocated]:
        """One row a layer."""
        if not gradients:
            return []
        tell = part(context.progress, GRADIENT_PART, 1 - GRADIENT_PART)
        layers = self._analysed(program, gradients, multiple, part(tell, 0, 0.2))
        rates = solve_rates(
            [layer.analysis.fit for layer in layers],
            [layer.macs for layer in layers],
            macs(program),
            self.rate,
            [min(self.ceiling, layer.most) for layer in layers],
            slope=self.slope,
            official_clip=self.official_clip,
        )
        goals = [(1 - rate) * layer.macs for layer, rate in zip(layers, rates, strict=True)]
        counter = counted(part(tell, 0.2, 0.8), "units", len(layers))
        forms = side_by_side(lambda pair: pair[0].form(pair[1]), zip(layers, goals, strict=True), counter)
        if multiple > 1:
            forms = hand_back(layers, goals, forms)
        return [self._row(*decided) for decided in zip(layers, rates, forms, strict=True)]

    def _analysed(
        self, program: Program, gradients: Mapping[str, Tensor], multiple: int, tell: Progress
    ) -> list[CompressibleLayer]:
        def analysed(name: str) -> CompressibleLayer:
            weight = program.tensors[f"{name}.weight"]
            analysis = Analysis(weight, gradients[name], self.gamma, self.step, self.lookahead)
            return CompressibleLayer(name, analysis, layer_macs(program, Factor(layer=name)), multiple)

        return side_by_side(analysed, gradients, counted(tell, "curves", len(gradients)))

    def _row(self, layer: CompressibleLayer, rate: float, form: Compression) -> Allocated:
        shape, fit = layer.analysis.shape, layer.analysis.fit
        factor = layer.factor(form)
        return Allocated(
            factor=factor,
            reason=(layer.reason(rate) if form.removed == 0 else None) or self._outside(layer.name),
            rate=rate,
            reached=1 - shape.macs(len(form.keep), factor.rank) / shape.macs(),
            macs=layer.macs,
            channels=shape.channels,
            full_rank=shape.directions,
            fit=None if fit is None else (fit.a, fit.b),
            exact=layer.analysis.exact,
            removed=layer.analysis.units[: form.removed],
        )


def counted(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """A progress bar by number."""
    return lambda done: progress(f"{what}: {done} of {total} layers", done / total)
