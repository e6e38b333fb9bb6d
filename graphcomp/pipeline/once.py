"""One pass, once: plan, simulate or train, rewrite, verify, and the record of it."""

import time
from dataclasses import replace

from graphcomp.base import distributed
from graphcomp.ir import Program, is_same
from graphcomp.pipeline import verify
from graphcomp.pipeline.accounting import unaccounted
from graphcomp.pipeline.contract import Concerned, Context, Pass, TrainingPass, within, work_name
from graphcomp.records import Fit, LeftAlone, Step, Training


def run_once(pass_: Pass, program: Program, context: Context, index: int = 0) -> tuple[Step, Program]:
    """Plan, simulate, rewrite and verify one pass, as a single step."""
    program = program.in_eval_mode()
    started = time.perf_counter()
    tell = context.progress
    tell(f"{pass_.name}: plan", 0.0)
    plan = distributed.broadcast(pass_.plan(program, within(context, f"{pass_.name}: ", 0.0, 0.4)))
    learned: Training | Fit | None = None
    if isinstance(pass_, TrainingPass):
        place = replace(context, workdir=context.workdir and context.workdir / work_name(index, pass_.name))
        simulated, learned = pass_.train(program, plan, within(place, f"{pass_.name}: ", 0.05, 0.45))
    else:
        tell(f"{pass_.name}: simulate", 0.4)
        simulated = pass_.simulate(program, plan)
    tell(f"{pass_.name}: rewrite", 0.5)
    result = pass_.rewrite(simulated, plan)
    tell(f"{pass_.name}: verify", 0.6)
    verify.check(result)
    if learned is None:
        error = verify.verify_pass(pass_, program, plan, context.seed)
    else:
        error = verify.verify_trained(pass_.name, program, result)
    plan = plan.model_copy(update={"kept": all_kept(pass_, program, result, plan.kept)})
    result = replace(result, history=(*program.history, plan.model_dump(mode="json", exclude={"bulk"})))
    tell(f"{pass_.name}: evaluate", 0.8)
    changed, after = context.drift(program, simulated), context.snapshot(result)
    tell(f"{pass_.name}: done", 1.0)
    step = Step(
        index=index,
        plan=plan,
        drift=changed,
        verify_error=error,
        seconds=time.perf_counter() - started,
        changed=not is_same(program, result),
        training=learned if isinstance(learned, Training) else None,
        fit=learned if isinstance(learned, Fit) else None,
        after=after,
    )
    return step, result


def all_kept(pass_: Pass, before: Program, after: Program, kept: list[LeftAlone]) -> list[LeftAlone]:
    """What a pass left alone, with what it does not say itself."""
    more = unaccounted(pass_.concern, before, after, kept) if isinstance(pass_, Concerned) else []
    return [*kept, *more]
