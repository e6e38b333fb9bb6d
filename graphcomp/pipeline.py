"""Passes, plans, and the pipeline that runs one after the other and checks each.

A pass *plans* (pure data), *simulates* (values change, shapes do not: all accuracy loss is here) and
*rewrites* (shapes change, the function does not). The pipeline holds every pass to the last claim.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from pydantic import Field

from graphcomp import verify
from graphcomp.cost import snapshot
from graphcomp.data import Data
from graphcomp.errors import GraphcompError, PassError
from graphcomp.evaluate import accuracy, drift, first_inputs
from graphcomp.program import Program
from graphcomp.records import Accuracy, Kept, Record, Snapshot, Step
from graphcomp.targets import Target

DRIFT_SAMPLES = 250


class Plan(Record):
    """What a pass decided: JSON, saved beside the result, diffable, replayable without the data."""

    name: str = Field(description="the pass")
    options: dict[str, Any] = Field(default_factory=dict)
    decisions: dict[str, Any] = Field(default_factory=dict, description="read by simulate and rewrite only")
    kept: list[Kept] = Field(default_factory=list, description="what was left alone, and why")
    summary: str = ""


@dataclass(frozen=True)
class Context:
    """What a pass may look at while it plans.

    Attributes:
        target: where the result will run.
        data: calibration (`train`) and evaluation (`eval`) data; None if the user gave none.
        seed: of everything random.
        progress: called with a message and a fraction in [0, 1].
    """

    target: Target
    data: Data | None = None
    seed: int = 0
    progress: Callable[[str, float], None] = field(default=lambda message, fraction: None)

    def evaluate(self, program: Program) -> Accuracy | None:
        """Accuracy on the evaluation data, None if there is none."""
        return None if self.data is None else accuracy(program, self.data.eval)


class Pass(Protocol):
    """One method. Implementations are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide, from the program and the context; change nothing."""
        ...

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Change values: the same graph with the same shapes."""
        ...

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Change structure: a smaller graph with the same function as the simulated `program`."""
        ...


Observer = Callable[[int, Step, Plan, Program], None]
"""Called after every pass with its index, record, plan and result."""


@dataclass(frozen=True)
class Pipeline:
    """Ordered passes, and observers that see every result (checkpoints, printing)."""

    passes: Sequence[Pass]
    observers: Sequence[Observer] = ()

    def run(
        self, program: Program, context: Context, done: Sequence[Step] = ()
    ) -> tuple[Program, list[Step]]:
        """Run the passes after the first `len(done)` ones.

        Raises:
            PassError: naming the passes that ran before; the last good program is the observers'.
        """
        steps = list(done)
        for index in range(len(done), len(self.passes)):
            step, plan, program = self._step(index, program, context)
            steps.append(step)
            for observe in self.observers:
                observe(index, step, plan, program)
        return program, steps

    def _step(self, index: int, program: Program, context: Context) -> tuple[Step, Plan, Program]:
        pass_ = self.passes[index]
        try:
            return run_pass(pass_, program, context, index)
        except GraphcompError as error:
            before = " > ".join(["trace", *(p.name for p in self.passes[:index])])
            raise PassError(f"pass {pass_.name!r} failed after {before}: {error}") from error


def run_pass(pass_: Pass, program: Program, context: Context, index: int = 0) -> tuple[Step, Plan, Program]:
    """Plan, simulate, rewrite and verify one pass."""
    started = time.perf_counter()
    tell = context.progress
    tell(f"{pass_.name}: plan", 0.0)
    plan = pass_.plan(program, context)
    tell(f"{pass_.name}: simulate", 0.4)
    simulated = pass_.simulate(program, plan)
    tell(f"{pass_.name}: rewrite", 0.5)
    result = pass_.rewrite(simulated, plan)
    tell(f"{pass_.name}: verify", 0.6)
    verify.check(result)
    error = verify.verify_pass(pass_, program, plan, context.seed)
    result = replace(result, history=(*program.history, plan.model_dump(mode="json")))
    tell(f"{pass_.name}: evaluate", 0.8)
    changed = None
    if simulated is not program and context.data is not None:
        changed = drift(program, simulated, first_inputs(context.data.train, DRIFT_SAMPLES))
    after: Snapshot = snapshot(result, context.evaluate(result))
    tell(f"{pass_.name}: done", 1.0)
    step = Step(
        index=index,
        name=pass_.name,
        options=plan.options,
        summary=plan.summary,
        plan_file=plan_file(index, pass_.name),
        kept=plan.kept,
        drift=changed,
        verify_error=error,
        seconds=time.perf_counter() - started,
        after=after,
    )
    return step, plan, result


def plan_file(index: int, name: str) -> str:
    """Where a plan is saved, relative to the output directory."""
    return f"plans/{index + 1:02d}-{name}.json"
