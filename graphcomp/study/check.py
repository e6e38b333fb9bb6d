"""Whether the programs that a study left are what its table says: evaluated again, in other processes."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from graphcomp.base import Failure, Tell, Told, run_in_processes
from graphcomp.measure import confusion, score, snapshot
from graphcomp.report import read_report, score_text
from graphcomp.runtime import cores
from graphcomp.study.grid import Cell
from graphcomp.study.run import CELLS, CellResult, finished, left_by


def check_cells(
    cells: Sequence[Cell], out: Path, workers: int = 1, told: Told = lambda name, message, fraction: None
) -> dict[str, str | None]:
    """Evaluate the saved program of every finished cell in a process that has not made it.

    Args:
        cells: of the study.
        out: where it ran.
        workers: processes at a time.
        told: how far a cell is.

    Returns:
        By the name of every finished cell what is not as its result says; None if all is.

    Raises:
        LoadError: a damaged result.
    """
    results = finished(cells, out)
    tasks = {name: partial(_difference, result, out) for name, result in results.items()}
    found: dict[str, str | None] = {}
    threads = max(1, cores() // max(1, min(workers, len(tasks))))
    with closing(run_in_processes(tasks, workers, threads, told)) as answers:
        for name, said in answers:
            found[name] = said.message if isinstance(said, Failure) else said
    return {name: found[name] for name in results}


def _difference(result: CellResult, out: Path, tell: Tell) -> str | None:
    """What evaluating a cell's program again finds otherwise."""
    place = out / CELLS / result.name
    program, data = left_by(read_report(place / "report.json"), place)
    found, expected = snapshot(program, score(program, data.eval)), result.final
    for counter in ("params_trainable", "params_state", "macs"):
        if (new := getattr(found, counter)) != (old := getattr(expected, counter)):
            return f"found {new:,} {counter}, expected {old:,}"
    if found.score != expected.score:
        said = [score_text(s.score) for s in (found, expected)]
        return f"found {said[0]}, expected {said[1]}"
    matrix = confusion(program, data.eval)
    if (None if matrix is None else matrix.tolist()) != result.confusion:
        return "found another confusion matrix of the same accuracy, expected the same one"
    return None
