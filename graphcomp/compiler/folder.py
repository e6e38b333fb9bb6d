"""The output directory: what is in it, and whether a run may begin or go on there."""

import difflib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from graphcomp.base import LOCK, distributed, read_record, remove, sweep, unfinished, write_record
from graphcomp.errors import OutputError, RecipeError
from graphcomp.ir import Program, load, save
from graphcomp.onnx import data_names
from graphcomp.pipeline import Pass, work_name
from graphcomp.records import Record, Snapshot, Step


class State(Record):
    """`state.json`: what run a directory belongs to, so that only the same run resumes it."""

    fingerprint: dict[str, Any]
    started: str
    baseline: Snapshot


MODEL, DENSE, INT8, BASE = "model.onnx", "model-dense.onnx", "model-int8.onnx", "baseline.onnx"


RESULTS = (BASE, DENSE, INT8, MODEL, "program", "report.html", "report.json")
"""What is for the reader, and stays until its successor takes its place."""


WORK = ("state.json", "plans", "checkpoints")
"""What a run is resumed from."""


OWN = frozenset({*RESULTS, *WORK, "entries"})


def stray_data(out: Path, kept: Collection[str | None] = ()) -> list[str]:
    """Files of numbers beside models (see `onnx.storage`) that none of those that are kept is."""
    names = {name for model in (MODEL, DENSE, BASE) for name in data_names(out / model)}
    return sorted(names - set(kept))


def open_folder(out: Path, fingerprint: dict[str, Any], resume: bool, overwrite: bool) -> State | None:
    """Make `out` ready, which is locked; the state of the run that is resumed, if one is."""
    present = sorted(p.name for p in out.iterdir() if p.name != LOCK)
    if resume and "state.json" in present:
        state = _matching_state(out, fingerprint)
        _sweep(out)
        return state
    if present and not overwrite:
        raise OutputError(
            f"{out}: found {len(present)} files, expected an empty or new directory; use --resume to go on "
            "with an interrupted run, --overwrite to replace its results, or choose another -o"
        )
    ours = {*OWN, *stray_data(out)}
    foreign = [n for n in present if n not in ours and unfinished(n) not in OWN]
    if foreign:
        raise OutputError(
            f"{out}: found {foreign[0]!r}, which is not graphcomp's, expected only results; choose another -o"
        )
    _sweep(out)
    for name in WORK:
        remove(out / name)
    return None


def _sweep(out: Path) -> None:
    """Remove what runs that were killed left half-written."""
    sweep(out, OWN)
    for name in ("plans", "checkpoints"):
        sweep(out / name)


def _matching_state(out: Path, fingerprint: dict[str, Any]) -> State:
    state = read_record(out / "state.json", State, "the state of a run; use --overwrite")
    wanted = json.loads(json.dumps(fingerprint))
    for key, value in wanted.items():
        before, now = _differing(key, state.fingerprint.get(key), value)
        if before or now:
            shown = [*(f"\n  - {line}" for line in before), *(f"\n  + {line}" for line in now)]
            raise RecipeError(
                f"--resume: {key}: found {_value(key, now)}, expected {_value(key, before)} as in the "
                f"interrupted run in {out}; use the same command, or --overwrite"
                + ("".join(shown) if len(shown) > 2 else "")
            )
    return state


def _value(key: str, lines: Sequence[str]) -> str:
    return lines[0].removeprefix(f"{key}: ").removeprefix(f"{key}.") if lines else "nothing there"


def _differing(key: str, before: Any, now: Any) -> tuple[list[str], list[str]]:
    """What of a field is another: the values that were, and those that are, each in a line."""
    old, new = (list(_spelled_out(key, value)) for value in (before, now))
    changed = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]
    removed, added = ([line[1:] for line in changed if line[0] == sign] for sign in "-+")
    return removed, added


def _spelled_out(place: str, value: Any) -> Iterator[str]:
    """A line for each value: `passes.l1.ratio: 0.5`. Items have no number: one more moves all behind it."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _spelled_out(f"{place}.{name}", part)
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for part in value:
            yield from _spelled_out(place, part)
    else:
        yield f"{place}: {json.dumps(value)}"


def checkpointing(out: Path) -> Callable[[Step, Program], None]:
    """Save each result; the step's record comes last and makes the checkpoint count."""

    def saved(step: Step, program: Program) -> None:
        place = place_of(out, step.index, step.name)
        write_record(out / step.plan_file, step.plan)
        save(program, place)
        write_record(place.with_suffix(".json"), step.brief())
        shutil.rmtree(running_place(out), ignore_errors=True)

    return saved


def recalling(out: Path) -> Callable[[int, str], Program]:
    """Read a checkpoint back: what later passes learn from.

    The last one is kept: a pass asks for it when it plans, and when it learns.
    """

    @lru_cache(maxsize=1)
    def recalled(index: int, name: str) -> Program:
        distributed.on_first(lambda: None)  # not before the first process has written it
        return load(place_of(out, index, name))

    return recalled


def running_place(out: Path) -> Path:
    """Where a pass that takes long keeps its state until it is finished."""
    return out / "checkpoints" / "running"


def place_of(out: Path, index: int, name: str) -> Path:
    """Of a pass's result; its record is beside it."""
    return out / "checkpoints" / work_name(index, name)


def finished_steps(out: Path, passes: Sequence[Pass]) -> list[Step]:
    """Steps that an interrupted run finished."""
    steps: list[Step] = []
    for index, pass_ in enumerate(passes):
        record = place_of(out, index, pass_.name).with_suffix(".json")
        if not record.exists():
            break
        steps.append(read_record(record, Step, "a step's record; use --overwrite"))
    return steps
