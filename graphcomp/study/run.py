"""A study's cells: run, kept, resumed.

    OUT/study.yaml            what was asked for
    OUT/results.csv           one row a cell; results.parquet too if pyarrow is installed
    OUT/study.html            the same as plots and tables
    OUT/cells/NAME/           the run of one cell, as `graphcomp compile` leaves it
    OUT/cells/NAME.json       its result; written last, and with it the cell is finished
    OUT/cells/NAME.error.txt  instead: why it failed

Names end with a hash of the cell's recipe, weights, model and samples: with others it is another cell.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydantic import Field

from graphcomp.base import LOCK, Engine, Failure, Tell, Told, read_record, run_tasks, write_text
from graphcomp.compiler import build
from graphcomp.data import Data, load_data
from graphcomp.errors import GraphcompWarning, OutputError, RecipeError
from graphcomp.ir import Program, load
from graphcomp.measure import confusion, count_outputs
from graphcomp.records import Bench, Record, Report, Robustness, Snapshot
from graphcomp.runtime import cores
from graphcomp.study.grid import Cell, waves

CELLS = "cells"
STUDY = "study.yaml"

Ended = Callable[[str, Failure | None], None]
"""Called with the name of a cell that has ended, and why it failed, if it did."""


class CellResult(Record):
    """What came out of one cell."""

    name: str
    labels: dict[str, str] = Field(description="what the cell is on every axis of the grid")
    key: str = Field(description="hash of recipe, weights, model and samples")
    data: str
    baseline: Snapshot
    final: Snapshot
    confusion: list[list[int]] | None = Field(
        description="of the final network, a row for each true class; null without labels or classifier"
    )
    class_names: list[str] | None = Field(
        default=None, description="of the rows of `confusion`, where the data have names for all of them"
    )
    bench: Bench | None
    robustness: Robustness | None = Field(default=None, description="scores on damaged images, if asked for")
    warnings: list[str]
    seconds: float = Field(description="of the run; if it was resumed, of its last part")


@dataclass(frozen=True)
class Outcome:
    """All results, and why the other cells have none, by cell name."""

    results: dict[str, CellResult] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)


def run_cell(cell: Cell, out: Path, tell: Tell) -> CellResult:
    """Run one cell, or finish a run that was interrupted, and write its result.

    Raises:
        GraphcompError: see `compiler.build`.
    """
    place = out / CELLS / cell.name
    resume = (place / "state.json").exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", GraphcompWarning)
        report = build(cell.job, place, resume=resume, overwrite=not resume, progress=tell)
        tell("classes", 0.99)
        matrix, names = _confusion(report, place)
    result = CellResult(
        name=cell.name,
        labels=dict(cell.labels),
        key=cell.key,
        data=report.data,
        baseline=report.baseline,
        final=report.final,
        confusion=matrix,
        class_names=names,
        bench=report.bench and report.bench.moved(f"{CELLS}/{cell.name}"),
        robustness=report.robustness,
        warnings=list(dict.fromkeys(str(w.message) for w in caught)),
        seconds=report.seconds,
    )
    write_text(_record(out, cell), result.model_dump_json(indent=1))
    _error(out, cell.name).unlink(missing_ok=True)
    return result


def left_by(report: Report, place: Path) -> tuple[Program, Data]:
    """The network that a run left, read back, and its data.

    Raises:
        LoadError, DataError: what is there no more, or damaged.
    """
    program = load(place / "program")
    some = report.recipe.get("classes") is not None
    data = load_data(
        report.recipe["data"],
        program=program,
        seed=report.seed,
        outputs=None if some else count_outputs(program),
    )
    return program, data.only(data.ids_of(report.recipe["classes"])) if some else data


def _confusion(report: Report, place: Path) -> tuple[list[list[int]] | None, list[str] | None]:
    """Of the network that the run left, and what its classes are called."""
    program, data = left_by(report, place)
    matrix = confusion(program, data.eval)
    if matrix is None:
        return None, None
    names = {i: name for name, i in data.names.items()}
    return matrix.tolist(), [names[i] for i in range(len(matrix))] if len(names) == len(matrix) else None


def _record(out: Path, cell: Cell) -> Path:
    return out / CELLS / f"{cell.name}.json"


def _error(out: Path, name: str) -> Path:
    return out / CELLS / f"{name}.error.txt"


# ---------------------------------------------------------------------- all cells


def workers_for(cells: Sequence[Cell], asked: int | None) -> int:
    """How many cells run at a time: half of the cores by default, but one where time is measured.

    Raises:
        RecipeError: several are asked for although time is measured.
    """
    timed = next((cell for cell in cells if cell.job.recipe.bench is not False), None)
    if timed is None:
        return min(asked or max(1, cores() // 2), len(cells))
    if asked not in (None, 1):
        raise RecipeError(
            f"workers: found {asked} with `bench` in the recipe, expected 1: cells that run side by side "
            "would time each other; leave out `bench`, or use --workers 1"
        )
    return 1


def prepare(out: Path, text: str, resume: bool) -> None:
    """Make `out` ready for a study; `text` is its file, kept for the reader.

    Raises:
        OutputError: something is there and this is not the same study to go on with.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: found a file, expected a directory; choose another -o")
    present = out.exists() and any(p.name != LOCK for p in out.iterdir())
    if present and not (resume and (out / STUDY).exists()):
        advice = "choose another -o" if resume else "use --resume to go on with a study, or another -o"
        raise OutputError(f"{out}: found files, expected an empty or new directory; {advice}")
    write_text(out / STUDY, text)


def finished(cells: Sequence[Cell], out: Path) -> dict[str, CellResult]:
    """Results that are there already.

    Raises:
        LoadError: naming a damaged file.
    """
    found = {}
    for cell in cells:
        path = _record(out, cell)
        if path.exists():
            found[cell.name] = read_record(path, CellResult, "a cell's result; delete the file")
    return found


def run_study(
    cells: Sequence[Cell],
    out: Path,
    *,
    engine: Engine = "local",
    workers: int = 1,
    told: Told = lambda name, message, fraction: None,
    ended: Ended = lambda name, failure: None,
) -> Outcome:
    """Run the cells that have no result in `out` yet.

    Args:
        cells: of the study.
        out: made ready by `prepare`.
        engine: see `workers.run_tasks`.
        workers: cells at a time; each gets its share of the cores.
        told: how far a cell is.
        ended: which one has ended; not called for those that were there.

    Raises:
        RecipeError: an engine that is not installed. LoadError: a damaged result of an earlier run.
        KeyboardInterrupt: finished cells are kept, and what the others had finished.
    """
    outcome = Outcome(finished(cells, out))
    todo = [cell for cell in cells if cell.name not in outcome.results]
    for wave in waves(todo):
        threads = max(1, cores() // min(workers, len(wave)))
        tasks = {cell.name: partial(run_cell, cell, out) for cell in wave}
        with closing(run_tasks(tasks, engine, workers, threads, told)) as results:
            for name, found in results:
                _keep(outcome, out, name, found)
                ended(name, outcome.failures.get(name))
    return outcome


def _keep(outcome: Outcome, out: Path, name: str, found: CellResult | Failure) -> None:
    if not isinstance(found, Failure):
        outcome.results[name] = found
        return
    outcome.failures[name] = found
    write_text(_error(out, name), f"{found.message}\n\n{found.trace}")


def in_order(cells: Sequence[Cell], results: Mapping[str, CellResult]) -> list[CellResult]:
    """The results in the order of the grid."""
    return [results[cell.name] for cell in cells if cell.name in results]
