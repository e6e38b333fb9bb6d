"""What passes that split layers into factors share."""

from dataclasses import replace
from typing import ClassVar

from graphcomp.factors import read_factors, rewrite, simulate
from graphcomp.ir import Program
from graphcomp.pipeline import Outlook
from graphcomp.records import Plan


class Factoring:
    """The verbs of passes whose plans name factors: `{"factors": [Factor, …]}`, and a multiple of widths."""

    name: ClassVar[str]

    def foresee(self, outlook: Outlook) -> Outlook:
        """Some layers become two, the second one in front of the same normalisation."""
        return replace(outlook, names=False)

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Write the product of the factors into every weight, and zeros into the columns that go."""
        return simulate(program, read_factors(plan.decisions))

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Put the factors in the place of every weight, and take out channels that nobody reads."""
        multiple = plan.decisions.get("multiple", 1)
        return rewrite(program, read_factors(plan.decisions), self.name, multiple)
