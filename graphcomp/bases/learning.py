"""The verbs of passes that learn from data."""

from typing import ClassVar

from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.pipeline import Outlook
from graphcomp.records import Plan


class Learning:
    """The verbs of passes that change values by learning from data, and leave the structure as it is."""

    name: ClassVar[str]

    def foresee(self, outlook: Outlook) -> Outlook:
        """Structure stays."""
        return outlook

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Refuse: a plan is not enough to learn from; PassError."""
        raise PassError(
            f"{self.name}: found a plan without data, expected data to learn from; run the pass in a pipeline"
        )

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Nothing: what was learned has the shapes that it had."""
        return program
