"""Whom a network is fitted to, and what was done to that one since.

An earlier program counts as it is written now: passes that only write a network in another form are carried
out on it, too (`Reshaping`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import TypeAdapter

from graphcomp.bases import RowRemoval, find_step, load_saved, load_step, no_such_step
from graphcomp.compiler import is_program_dir
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.passes.refit.lineage import Replay
from graphcomp.pipeline import Context, KeepingRows, Reshaping, TrainingPass
from graphcomp.records import Plan


class _Recorded(RowRemoval):
    """What any removal of rows comes to, whoever planned it."""

    name: ClassVar[str] = "refit"


class _Learned:
    """A training, whoever planned it."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """An earlier program.

    Attributes:
        label: who it is, for people.
        earlier: as it was.
        since: the plans that made the network out of it, oldest first.
    """

    label: str
    earlier: Program
    since: Sequence[Plan]

    @property
    def original(self) -> Program:
        """It, written as the network is."""
        program = self.earlier
        for plan in self.since:
            pass_ = _pass_of(plan)
            if isinstance(pass_, Reshaping):
                program = pass_.follow(program, plan)
        return program

    @property
    def is_same(self) -> bool:
        """Whether nothing since could have changed what it computes."""
        return all(isinstance(_pass_of(plan), Reshaping) for plan in self.since)

    @property
    def replays(self) -> list[Replay]:
        """What carries out the plans that may have moved rows."""
        still = TrainingPass | _Learned | KeepingRows
        passes = [(_pass_of(plan), plan) for plan in self.since]
        return [_replay(pass_, plan) for pass_, plan in passes if not isinstance(pass_, still)]


def find_teacher(asked: str | int | None, program: Program, context: Context, own: str) -> Teacher:
    """The program that is asked for.

    Args:
        asked: a step by name or number, or a directory; None: what was trained last before the last removals.
        program: the network that it is to teach.
        context: knows the run's earlier programs.
        own: name of the pass that asks: what it yielded before is nobody's teacher by default.

    Raises:
        PassError: no such program, or one that the network was not made from.
    """
    names = [earlier.name for earlier in context.earlier]
    index = _default(context, own) if asked is None else find_step(asked, names)
    if index is not None:
        label, earlier = load_step(context, index)
    else:
        label = place_of(asked, names)
        earlier = load_saved(label)
    count = len(earlier.history)
    if list(program.history[:count]) != list(earlier.history):
        raise PassError(
            f"teacher: found {label}, whose history is no beginning of this network's, expected a "
            "program that this one was made from; name an earlier step"
        )
    return Teacher(label, earlier, [Plan.model_validate(plan) for plan in program.history[count:]])


def place_of(asked: str | int | None, names: Sequence[str]) -> str:
    """The directory of a saved program; PassError if there is none."""
    if isinstance(asked, str) and is_program_dir(asked):
        return asked
    raise no_such_step(repr(asked), names)


def _default(context: Context, own: str) -> int:
    """What was trained last before the last removals: trained by them or after them does not count."""
    removed = False
    for index in reversed(range(1, len(context.earlier))):
        name = context.earlier[index].name
        made_by = _kind(name)
        if made_by is None or name == own or issubclass(made_by, Reshaping):
            continue
        if hasattr(made_by, "iteration"):
            if removed and _trained(context, index):
                return index
            removed = True
        elif not hasattr(made_by, "train"):
            removed = True
        elif removed:
            return index
    return 0


def _trained(context: Context, index: int) -> bool:
    """Whether a pass that may go over several rounds did."""
    before, after = (context.earlier[i].load().history for i in (index - 1, index))
    plans = [Plan.model_validate(plan) for plan in after[len(before) :]]
    return any(isinstance(_pass_of(plan), TrainingPass | _Learned) for plan in plans)


def _kind(name: str) -> Any:
    """The class of a pass by its name; None if there is none."""
    from graphcomp.passes import PASSES  # which offers this pass

    return PASSES.get(name)


def _pass_of(plan: Plan) -> Any:
    """The pass that made a plan; of one that is part of another, what its plan comes to."""
    if (kind := _kind(plan.name)) is not None:
        return TypeAdapter(kind).validate_python(plan.options)
    if "rows" in plan.decisions:
        return _Recorded()
    if "epochs" in plan.options:
        return _Learned()
    raise PassError(
        f"teacher: found the pass {plan.name!r} in this network's history, expected passes of this version; "
        "fit to a later step"
    )


def _replay(pass_: Any, plan: Plan) -> Replay:
    return lambda program: pass_.rewrite(program, plan)
