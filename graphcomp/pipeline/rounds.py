"""Passes that go over several rounds: prune, train, measure, and again, until a rule says that it is enough.

    course → next pass → plan, simulate or train, rewrite, verify → course → …         → result: some round's

Every round is an ordinary pass (`pipeline.once.run_once`), and all that the method sees of them is the
record of the finished ones. So it can be interrupted anywhere: a finished round is a saved program and a
record, written last, and a round that trains has its own state.

Rounds are judged by samples held out from the training data, which none of them learns from. To a round these
are its evaluation data: it has no way to the real ones, which only the result is shown to.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from graphcomp.base import cache, distributed, load_state, read_record, save_state, write_record
from graphcomp.data import Data, Split
from graphcomp.errors import DataError, GraphcompError, LoadError, PassError
from graphcomp.ir import Program, is_same, load, save
from graphcomp.pipeline.contract import (
    NEED_NO_LABELS,
    Context,
    Course,
    Pass,
    Strategy,
    TrainingPass,
    within,
    work_name,
)
from graphcomp.pipeline.momenta import cut_momenta
from graphcomp.pipeline.once import run_once
from graphcomp.records import LayerRow, Plan, Record, Snapshot, Step

ROUNDS, RUNNING, BEGINNING = "rounds", "running", "start.json"
"""In the working directory: finished rounds, the state of the running one, and what they belong to."""

RECORD, MOMENTA = ".json", ".momenta.safetensors"
"""Beside the program of a finished round."""

R = TypeVar("R", bound=Record)


def run_rounds(
    strategy: Strategy, program: Program, context: Context, index: int = 0
) -> tuple[Step, Program]:
    """Run what a strategy emits until it emits no more, and take the program that it names.

    The step holds those of the rounds; its verification error is the worst of all rounds. The plan holds
    the plans of the rounds that are kept, and so does the history of the program.

    Args:
        strategy: the method.
        program: to start from.
        context: with labelled data. With a working directory an interrupted run goes on after the last
            finished round, and inside a training.
        index: of the pass in its pipeline.

    Raises:
        DataError: no labelled data, or too few to hold some out.
        PassError: naming the round that failed.
        LoadError: a damaged state, or that of another run.
        KeyboardInterrupt: stopped by the user; finished rounds are kept.
    """
    judges = held_out_samples(strategy.name, context.data, strategy.held_out)
    place = context.workdir and context.workdir / work_name(index, strategy.name)
    inner = replace(
        context,
        data=context.data and replace(context.data, eval=judges),
        workdir=place and place / RUNNING,
        momenta={} if strategy.keeps_momenta else None,
    )
    saved = _Saved(place, strategy, inner, program)
    course, programs = saved.restored() or _begun(strategy, program, inner, saved)
    while (pass_ := strategy.next_pass(course)) is not None:
        number = len(course.rounds) + 1
        told = _told(inner, strategy, number)
        with _named(number, pass_):
            step, result = _round(pass_, programs[number - 1], told, course)
        course = replace(course, rounds=(*course.rounds, step))
        needed = {number, strategy.result(course)}
        programs = {n: p for n, p in {**programs, number: result}.items() if n in needed}
        saved.round(course, programs, inner.momenta)
    return _finished(strategy, course, program, programs, context, index)


def held_out_samples(name: str, data: Data | None, fraction: float) -> Split:
    """The training samples by which rounds are judged: those that passes which train hold out as well.

    Args:
        name: of the pass, for messages.
        data: the run's.
        fraction: of the training samples.

    Raises:
        DataError: no labelled data, or too few.
    """
    if data is None or not data.labelled:
        found = "no data" if data is None else "data without labels"
        raise DataError(
            f"{name}: found {found}, expected samples with labels to judge every round by; give labelled "
            f"--data ({NEED_NO_LABELS})"
        )
    learned, judges = data.train.hold_out(fraction)
    if not len(judges) or not len(learned):
        raise DataError(
            f"{name}: found {len(data.train)} samples, expected enough to hold out {fraction:g} of them; "
            "give more data or another held_out"
        )
    return judges


def _begun(
    strategy: Strategy, program: Program, inner: Context, saved: "_Saved"
) -> tuple[Course, dict[int, Program]]:
    started = time.perf_counter()
    start = inner.snapshot(program)
    tell = within(inner, f"{strategy.name}: ", 0.0, _share(strategy))
    plan = distributed.broadcast(strategy.plan(program, tell))
    course = Course(plan, start, time.perf_counter() - started)
    saved.beginning(course)
    return course, {0: program}


def _share(strategy: Strategy) -> float:
    """Of the progress, for one round; the plan counts as one, and 1.0 is for the end of all."""
    return 0.99 / (strategy.most_rounds + 1)


def _told(inner: Context, strategy: Strategy, number: int) -> Context:
    """A round's own part of the progress, and random numbers of its own."""
    share = _share(strategy)
    inner = replace(inner, seed=(inner.seed + number) % 2**32)
    return within(inner, f"{strategy.name} [{number}/{strategy.most_rounds}]: ", share * number, share)


@contextmanager
def _named(number: int, pass_: Pass) -> Iterator[None]:
    try:
        yield
    except GraphcompError as error:
        raise PassError(f"round {number} ({pass_.name}): {error}") from error


def _round(pass_: Pass, program: Program, inner: Context, course: Course) -> tuple[Step, Program]:
    """One round; what an optimiser remembers is cut like the program."""
    step, result = run_once(pass_, program, inner, len(course.rounds))
    momenta = inner.momenta
    if momenta and not isinstance(pass_, TrainingPass):
        cut = cut_momenta(momenta, program, lambda held: pass_.rewrite(held, step.plan))
        momenta.clear()
        momenta.update(cut)
    before = course.rounds[-1].after if course.rounds else course.start
    removed = removed_channels(before.layers, step.after.layers)
    return step.model_copy(update={"removed": removed}), result


# ---------------------------------------------------------------------- the record


def _finished(
    strategy: Strategy,
    course: Course,
    program: Program,
    programs: Mapping[int, Program],
    context: Context,
    index: int,
) -> tuple[Step, Program]:
    chosen = strategy.result(course)
    result = programs[chosen]
    context.progress(f"{strategy.name}: evaluate", 0.99)
    changed, after = context.drift(program, result), context.snapshot(result)
    context.progress(f"{strategy.name}: done", 1.0)
    plans = [step.plan for step in course.rounds[:chosen]]
    left = next((p.kept for p in reversed(plans) if p.kept), [])
    plan = course.plan.model_copy(
        update={
            "decisions": {**course.plan.decisions, "rounds": [p.model_dump(mode="json") for p in plans]},
            "summary": f"{_summary(course, chosen)}; {strategy.ending(course)}",
            "kept": [*course.plan.kept, *(k for k in left if k not in course.plan.kept)],
        }
    )
    step = Step(
        index=index,
        plan=plan,
        drift=changed,
        verify_error=max((step.verify_error for step in course.rounds), default=0.0),
        seconds=course.seconds + sum(step.seconds for step in course.rounds),
        changed=not is_same(program, result),
        start=course.start.without_layers(),
        rounds=list(course.rounds),
        kept_rounds=chosen,
        after=after,
    )
    return step, result


def lost_points(course: Course, number: int) -> float:
    """By how many points the held-out accuracy after a round is lower than that of the program as it came.

    Raises:
        PassError: if it was not measured: the network is no classifier.
    """
    before, after = course.start.score, course.snapshots[number].score
    if before is None or after is None or before.measure != "accuracy":
        raise PassError("rounds: found no accuracy, expected that of a classifier on labelled samples")
    return round(100 * (before.value - after.value), 9)  # counts over one number of samples, but for rounding


def removed_channels(before: Sequence[LayerRow], after: Sequence[LayerRow]) -> dict[str, int]:
    """How many output channels each layer has lost, those that lost some."""
    left = {row.name: row.out_channels for row in after}
    lost = {row.name: row.out_channels - left.get(row.name, 0) for row in before}
    return {name: count for name, count in lost.items() if count}


def _summary(course: Course, kept: int) -> str:
    """`kept 8 of 10 rounds: 126 channels removed, held-out accuracy 98.60 -> 97.90 %`."""
    removed = sum(sum(step.removed.values()) for step in course.rounds[:kept])
    text = f"kept {kept} of {len(course.rounds)} rounds: {removed} channels removed"
    first, last = course.start.score, course.snapshots[kept].score
    if first is None or last is None or first.measure != "accuracy":
        return text
    return f"{text}, held-out accuracy {100 * first.value:.2f} -> {100 * last.value:.2f} %"


# ---------------------------------------------------------------------- the working directory


class _Beginning(Record):
    """What the rounds of a working directory belong to."""

    key: str
    plan: Plan
    start: Snapshot
    seconds: float


class _Saved:
    """Finished rounds on disk: the record of each, the programs that are still needed, the last momenta."""

    def __init__(self, place: Path | None, strategy: Strategy, inner: Context, program: Program) -> None:
        self.place, self.strategy, self.inner, self.program = place, strategy, inner, program
        self.key = (
            ""
            if place is None or inner.data is None
            else cache.identity(
                program=program.fingerprint(),
                train=inner.data.train.fingerprint(),
                strategy=repr(strategy),
                seed=inner.seed,
                target=inner.target.name,
            )
        )

    # -------------------------------------------------------------- writing, in the first process

    def beginning(self, course: Course) -> None:
        """Before the first round."""
        if self.place is not None and distributed.is_first():
            record = _Beginning(key=self.key, plan=course.plan, start=course.start, seconds=course.seconds)
            _write(self.place / BEGINNING, record)

    def round(
        self, course: Course, programs: Mapping[int, Program], momenta: Mapping[str, Tensor] | None
    ) -> None:
        """After each; its record comes last and makes it count. Then what is not needed any more goes."""
        if self.place is None or not distributed.is_first():
            return
        number = len(course.rounds)
        save(programs[number], self._at(number))
        if momenta is not None:
            save_state(self._at(number, MOMENTA), self.key, {}, momenta)
        _write(self._at(number, RECORD), course.rounds[-1])
        shutil.rmtree(self.place / RUNNING, ignore_errors=True)
        for old in set(range(1, number)) - set(programs):
            shutil.rmtree(self._at(old), ignore_errors=True)
        for old in range(1, number):
            self._at(old, MOMENTA).unlink(missing_ok=True)

    # -------------------------------------------------------------- reading, in all

    def restored(self) -> tuple[Course, dict[int, Program]] | None:
        """Where an interrupted run stopped; None if there was none."""
        if self.place is None:
            return None
        course: Course | None = distributed.on_first(self._course)
        if course is None:
            return None
        number = len(course.rounds)
        needed = {number, self.strategy.result(course)}
        programs = {n: load(self._at(n)) if n else self.program for n in needed}
        if number and self.inner.momenta is not None:
            found = load_state(self._at(number, MOMENTA), self.key)
            self.inner.momenta.update(found[1] if found else {})
        self.inner.progress(f"{self.strategy.name}: goes on after round {number}", 0.0)
        return course, programs

    def _course(self) -> Course | None:
        assert self.place is not None
        if not (self.place / BEGINNING).exists():
            return None
        begun = _read(self.place / BEGINNING, _Beginning)
        if begun.key != self.key:
            raise LoadError(
                f"{self.place}: found the rounds of another run, expected those of this program, data and "
                "options; delete it to start this pass anew"
            )
        rounds: list[Step] = []
        while (path := self._at(len(rounds) + 1, RECORD)).exists():
            rounds.append(_read(path, Step))
        return Course(begun.plan, begun.start, begun.seconds, tuple(rounds))

    def _at(self, number: int, suffix: str = "") -> Path:
        assert self.place is not None
        return self.place / ROUNDS / f"{number:03d}{suffix}"


def _write(path: Path, record: Record) -> None:
    write_record(path, record)


def _read(path: Path, kind: type[R]) -> R:
    return read_record(path, kind, f"the record of a round; delete {path.parent} to start this pass anew")
