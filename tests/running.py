"""What tests of passes share: one pass, run and verified, with its plan at hand."""

from graphcomp.ir import Program
from graphcomp.pipeline import Context, Pass
from graphcomp.pipeline.pipeline import run_pass as run
from graphcomp.records import Plan, Step


def run_pass(pass_: Pass, program: Program, context: Context, index: int = 0) -> tuple[Step, Plan, Program]:
    """The record of the pass, what it decided, and the result."""
    step, result = run(pass_, program, context, index)
    return step, step.plan, result
