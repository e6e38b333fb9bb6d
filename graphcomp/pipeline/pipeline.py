"""Passes, plans, and the pipeline that runs one after the other and checks each.

A pass *plans* (pure data), *simulates* (values change, shapes do not: all accuracy loss is here) and
*rewrites* (shapes change, the function does not). The pipeline holds every pass to the last claim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from graphcomp.errors import GraphcompError, PassError
from graphcomp.ir import Program
from graphcomp.pipeline.contract import (
    Context,
    Demanding,
    Earlier,
    ExportingPass,
    Foreseen,
    IterativePass,
    Outlook,
    Pass,
    TrainingPass,
    held,
)
from graphcomp.pipeline.once import all_kept, run_once
from graphcomp.pipeline.rounds import run_rounds
from graphcomp.records import Step

Observer = Callable[[Step, Program], None]
"""Called after every pass with its record and its result."""


@dataclass(frozen=True)
class Pipeline:
    """Ordered passes, and observers that see every result (checkpoints, printing).

    Attributes:
        passes, observers: see above.
        allow_nothing: a run in which no pass changes anything, and none learns, is no error.
        recall: reads the result of a pass back, given its index and name, where an observer saved it; None:
            results are held in memory while a pass that trains is still to come, which may learn from them.
    """

    passes: Sequence[Pass]
    observers: Sequence[Observer] = ()
    recall: Callable[[int, str], Program] | None = None
    allow_nothing: bool = False

    def run(
        self, program: Program, context: Context, done: Sequence[Step] = ()
    ) -> tuple[Program, list[Step]]:
        """Run the passes after the first `len(done)` ones.

        Args:
            program: what the next pass gets; it works on what the program computes in eval mode.
            context: what passes may look at; with `done`, `earlier` holds what these passes yielded.
            done: records of the passes that ran before.

        Raises:
            PassError: naming the passes that ran before; the last good program is the observers'. Or none of
                the passes changed anything or learned: naming what they left alone, and why.
        """
        steps = list(done)
        program = program.in_eval_mode()
        if not done:
            context = replace(context, earlier=(held("input", program),))
        for index in range(len(done), len(self.passes)):
            step, program = self._step(index, program, context)
            steps.append(step)
            for observe in self.observers:
                observe(step, program)
            context = replace(context, earlier=(*context.earlier, *self._earlier(index, program)))
        idle = not any(step.changed or step.learned for step in steps) and not exporting(self.passes)
        if idle and steps and not self.allow_nothing:
            raise _nothing(steps)
        return program, steps

    def _earlier(self, index: int, program: Program) -> tuple[Earlier, ...]:
        """What later passes may learn from."""
        name, recall = self.passes[index].name, self.recall
        if recall is not None:
            return (Earlier(name, lambda: recall(index, name)),)
        if any(isinstance(later, TrainingPass) for later in self.passes[index + 1 :]):
            return (held(name, program),)
        return ()

    def _step(self, index: int, program: Program, context: Context) -> tuple[Step, Program]:
        pass_ = self.passes[index]
        try:
            return run_pass(pass_, program, context, index)
        except GraphcompError as error:
            before = " > ".join(["trace", *(p.name for p in self.passes[:index])])
            raise PassError(f"pass {pass_.name!r} failed after {before}: {error}") from error


def _nothing(steps: Sequence[Step]) -> PassError:
    places: dict[str, list[str]] = {}
    for left in (k for step in steps for k in step.plan.kept):
        places.setdefault(left.reason, []).append(left.where)
    said = [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}: {why}"
        for why, names in places.items()
    ]
    reasons = "; ".join(said[:5]) or "the network has nothing that they work on"
    names = " > ".join(step.name for step in steps)
    return PassError(
        f"{names}: found nothing to change ({reasons}), expected something; "
        "ask for more, or allow it: --allow-nothing, or allow_nothing: true in a recipe"
    )


def run_pass(pass_: Pass, program: Program, context: Context, index: int = 0) -> tuple[Step, Program]:
    """Run and verify one pass: a single step, or all that it emits, if it goes over several rounds."""
    strategy = pass_.iteration if isinstance(pass_, IterativePass) else None
    if strategy is None:
        return run_once(pass_, program, context, index)
    program = program.in_eval_mode()
    step, result = run_rounds(strategy, program, context, index)
    plan = step.plan.model_copy(update={"kept": all_kept(pass_, program, result, step.plan.kept)})
    return step.model_copy(update={"plan": plan}), result


def exporting(passes: Sequence[Pass]) -> ExportingPass | None:
    """The pass that is carried out on the exported file, if there is one: the last."""
    last = passes[-1] if passes else None
    return last if isinstance(last, ExportingPass) else None


def check_order(passes: Sequence[Pass], program: Program, context: Context, *, trained: bool = True) -> None:
    """Refuse passes that cannot work on this program, with this data or in this order, before any runs.

    Args:
        passes: in order.
        program: what the first one gets.
        context: of the run.
        trained: False if the program's weights are known to be random.

    Raises:
        PassError: naming the first such pass, the ones before it, and the reason.
    """
    for pass_, behind in pairwise(passes):
        if isinstance(pass_, ExportingPass):
            raise PassError(
                f"pass {pass_.name!r}: found {behind.name!r} behind it, expected nothing: it is carried "
                "out on the exported file; put it last"
            )
    start = replace(context, earlier=(held("input", program),))
    outlook = Outlook(program, start, untrained=frozenset() if trained else frozenset({0}))
    for index, pass_ in enumerate(passes):
        if isinstance(pass_, Demanding):
            try:
                pass_.require(outlook)
            except GraphcompError as error:
                before = " > ".join(["trace", *(p.name for p in passes[:index])])
                raise PassError(f"pass {pass_.name!r} cannot work after {before}: {error}") from error
        if index + 1 < len(passes):
            outlook = _after(pass_, outlook)


def _after(pass_: Pass, outlook: Outlook) -> Outlook:
    after = replace(outlook, names=False, plain=False)
    if isinstance(pass_, Foreseen):
        after = pass_.foresee(outlook)
    index, untrained = len(outlook.context.earlier), after.untrained
    trains = isinstance(pass_, TrainingPass) or (
        isinstance(pass_, IterativePass) and pass_.iteration is not None
    )
    if index - 1 in untrained and not trains:
        untrained |= {index}
    steps = (*outlook.context.earlier, held(pass_.name, after.program))
    return replace(after, context=replace(outlook.context, earlier=steps), untrained=untrained)
