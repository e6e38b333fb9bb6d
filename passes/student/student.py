"""student: the network with narrow residual trunks that is to learn from this one (Aghli & Ribeiro 2021).

    a layer whose output meets another's at an addition gets  max(1, round(fraction * n))  of n filters
    every other layer keeps its own                                                     (METHODS 2.1, 2.5)

Layers that meet keep their widths equal, since they lose the same channels. Where a shortcut pads with zeros
(option A) the channels of one stage are among those of the next: `widths` gives each stage what it lacks. Of
the channels that may stay those with the largest l1 norms of their filters do, summed over the layers.

    init=slice     the filters that stay keep their weights
    init=random    all weights are drawn anew, W ~ N(0, 2 / fan-in) with the narrow layer's fan-in (He et al.
                   2015), biases are 0, normalisations start from the identity

Drawing changes values, so `simulate` does it, in the wide network and with the fan-in that will be left, and
`rewrite` is the same exact removal as that of every criterion.
"""

from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, Globs, RowRemoval, matches, norm_scores, options_of, unprunable_layers
from graphcomp.budget import Allocation, Judgement
from graphcomp.channels import Channels, Removal, analyse
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.passes.student.drawing import drawn, without_rule
from graphcomp.passes.student.widths import kept_counts, others, rows_of
from graphcomp.pipeline import Concern, Context, Outlook
from graphcomp.records import LeftAlone, Plan, Width


def _parse_fraction(value: Any) -> Any:
    """`1/32` as well as 0.03125."""
    try:
        return float(Fraction(value)) if isinstance(value, str) else value
    except (ValueError, ZeroDivisionError):
        raise ValueError("expected a fraction such as 1/2 or 0.5") from None


@dataclass(frozen=True, config=OPTIONS)
class Student(RowRemoval):
    """Make the layers narrow that residual additions hold together: a student for `distil`."""

    name: ClassVar[str] = "student"
    concern: ClassVar[Concern] = "channels"

    fraction: Annotated[
        float,
        BeforeValidator(_parse_fraction, json_schema_input_type=float | str),
        Field(gt=0, lt=1, description="of the filters of layers that meet at additions, e.g. 1/32"),
    ] = 0.5
    also: Annotated[
        Globs, Field(description="globs on other layers to make as narrow, e.g. the stem; default none")
    ] = ()
    init: Annotated[
        Literal["random", "slice"], Field(description="random: all weights are drawn anew; slice: kept")
    ] = "random"
    multiple: Annotated[
        int, Field(ge=1, description="widths are rounded up to it; by default they are the fraction's")
    ] = 1
    seed: Annotated[int | None, Field(ge=0, lt=2**32, description="of init=random; default: the run's")] = (
        None
    )

    def require(self, outlook: Outlook) -> None:
        """Layers that meet at additions, or for every glob."""
        if outlook.names:
            self._narrowed(analyse(outlook.program))

    def foresee(self, outlook: Outlook) -> Outlook:
        """The same layers, narrower, and with init=random nothing is left of what they had learned."""
        drawn = frozenset({len(outlook.context.earlier)} if self.init == "random" else ())
        return replace(outlook, untrained=outlook.untrained | drawn)

    def plan(self, program: Program, context: Context) -> Plan:
        """Choose the layers and the channels; PassError if there is no such layer."""
        channels = analyse(program)
        layers = self._narrowed(channels)
        counts = kept_counts(channels, layers, self.fraction)
        scores = norm_scores(channels)
        allocation = Allocation(channels, list(counts), Judgement(scores, {}), self.multiple, min_channels=0)
        removal, refused = allocation.removal(counts).feasible(scores)
        unset = without_rule(program) if self.init == "random" else []
        widths = {n: ids for n, ids in rows_of(channels).items() if n in layers}
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={
                "join": "couple",
                "rows": removal.rows,
                "init": self.init,
                "seed": context.seed if self.seed is None else self.seed,
            },
            kept=[
                *(LeftAlone(where=node, reason=reason) for node, reason in refused.items()),
                *(
                    LeftAlone(where=g.name, reason="prunable: keeps its width")
                    for g in others(channels, layers)
                ),
                *(LeftAlone(where=n, reason="its weights stay: no rule to draw them by") for n in unset),
            ],
            summary=f"{len(layers)} layers at {self.fraction:.4g} of their width, "
            + ("weights drawn anew" if self.init == "random" else "with the weights that are left"),
            evidence={
                "layers": {n: [len(ids), int((~removal.gone[ids]).sum())] for n, ids in widths.items()},
                "groups": [
                    Width(
                        group=g.name,
                        channels=len(g.channels),
                        share=self.fraction,
                        wanted=counts[g],
                        kept=removal.kept(g),
                    ).model_dump(mode="json")
                    for g in counts
                ],
            },
        )

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Draw the weights (init=random), and zeros where the removed channels are read."""
        if plan.decisions["init"] == "random":
            channels = analyse(program, plan.decisions["join"])
            removal = Removal.from_rows(channels, plan.decisions["rows"])
            program = drawn(removal, plan.decisions["seed"])
        return super().simulate(program, plan)

    def _narrowed(self, channels: Channels) -> list[str]:
        every = {p for g in channels.removable for p in g.producers}
        for glob in self.also:
            if not any(matches([layer], [glob]) for layer in every):
                raise PassError(
                    f"also: found no layer that {glob!r} matches, expected one of "
                    f"{', '.join(sorted(every)[:8])}, …"
                )
        layers = unprunable_layers(channels) | {n for n in every if matches([n], self.also)}
        if not layers:
            raise PassError(
                "found no layers that meet at an addition, expected a residual network; name layers with also"
            )
        return [n for n in rows_of(channels) if n in layers]
