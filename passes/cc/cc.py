"""cc: collaborative compression (Li et al. 2021, "Towards Compact CNNs via Collaborative Compression").

Channel pruning and low-rank decomposition of every layer, decided together from the loss's mean gradient G:

    units     of a weight W: its input channels, and its singular directions       `units`, METHODS 1.1
    loss      of a changed weight X: S[(G * (X - W))^2]                            `units`, (1.2)
    GCRO      a rate for every layer; together they meet the global rate           `gcro`, (1.3)
    MSHC      which units a layer gives up for its rate                            `mshc`, (1.4)
    weights   the best rank-R approximation of the original W[:, K], two factors   `factors.surgery`
    paying    layers that all this makes slower on the target stay, if asked for   `budget.restoring`

The rate is one of MACs of the whole network. Only readers change: a layer reads the channels K of its input;
channels that nobody reads then go with their producers. `multiple=1` gives the numbers of the paper. Rounded
up, every layer still meets its rate, and what all give up beyond the global one is handed back (`hand_back`).

`only` compresses a region: the analysis is that of the whole network all the same (Liu's study, METHODS 1.6).
It is kept on disk layer by layer, so that other rates and regions of the same network take no time.

`fit=responses` decides by what layers lose of what they compute instead, without labels (`responses`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from graphcomp.base import distributed, part
from graphcomp.bases import OPTIONS, Factoring, missed, options_of
from graphcomp.budget import is_asked, paying_factors
from graphcomp.ir import Program
from graphcomp.measure import macs
from graphcomp.passes.cc.buying import bought
from graphcomp.passes.cc.decided import Allocated, settled
from graphcomp.passes.cc.gradients import by_gradients
from graphcomp.passes.cc.options import Options
from graphcomp.passes.cc.responses import response_forms
from graphcomp.pipeline import Concern, Context, Outlook, require_data
from graphcomp.records import LeftAlone, Plan

TIMED_PART = 0.2
"""Of the progress bar, where times are measured."""


@dataclass(frozen=True, config=OPTIONS)
class CC(Options, Factoring):
    """Decide about channels and ranks of every layer together, under one global rate (Li et al. 2021)."""

    name: ClassVar[str] = "cc"
    concern: ClassVar[Concern] = "weights"

    def require(self, outlook: Outlook) -> None:
        """Data, labelled for gradients, and layers for every glob."""
        require_data(self.fit, outlook.context, labels=self.fit == "gradients")
        if outlook.names:
            self.layers(outlook.program)

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide for all layers; PassError if the rate cannot be met."""
        multiple = self.multiple or context.target.multiple
        names, kept = self.layers(program)
        untimed = 1 - TIMED_PART if is_asked(self.revert, False, context.clock) else 1
        timing = replace(context, progress=part(context.progress, untimed, 1 - untimed))
        context = replace(context, progress=part(context.progress, 0, untimed))
        if self.fit == "responses":
            rows, unjudged = self._by_responses(program, context, names, multiple)
            kept += unjudged
        else:
            rows = by_gradients(program, names, context.data, self, multiple, context.progress)
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

    def _reached(self, program: Program, rows: Sequence[Allocated]) -> dict[str, Any]:
        """What is asked for and what is left before channels that nobody reads go; not of a region."""
        if self.only != ("*",):
            return {}
        gone = sum(row.macs * row.reached for row in rows if not row.reason)
        return {"target": {"of": "macs", "asked": 1 - self.rate, "reached": 1 - gone / macs(program)}}

    def _by_responses(
        self, program: Program, context: Context, names: Sequence[str], multiple: int
    ) -> tuple[list[Allocated], list[LeftAlone]]:
        """One row a layer that can be judged, and why the others cannot."""
        if not names:
            return [], []
        forms, unjudged = response_forms(program, names, context, self.name, multiple, self.ceiling)
        rows = distributed.on_first(lambda: bought(program, forms, self.rate))
        rows = [
            row.model_copy(update={"reason": row.reason or self.outside(row.factor.layer)}) for row in rows
        ]
        return rows, [LeftAlone(where=layer, reason=reason) for layer, reason in unjudged.items()]
