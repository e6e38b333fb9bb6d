"""`graphcomp study`."""

from pathlib import Path
from typing import Annotated

import typer

from graphcomp.cli.console import err_console, interrupted, tell
from graphcomp.cli.options import InputShapes, Weights, labels_of, refuse_idle, settings_of, shapes_of
from graphcomp.cli.recipes import or_bundled


def study_command(
    context: typer.Context,
    study: Annotated[
        Path, typer.Argument(help="YAML file: a recipe with placeholders, and a grid of values")
    ],
    weights: Weights = None,
    data: Annotated[str | None, typer.Option("--data", help="instead of the recipe's")] = None,
    input_shape: InputShapes = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="keep finished cells, go on with the others")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="cells at a time; default: half of the cores")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="only list the cells")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="in the size of its `quick`: seconds, to see that it works")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="cells with this label, e.g. rate=0.5; several of one axis: any of them"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="instead of the study's setting, e.g. 'training={epochs: 1}'"),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="then evaluate every saved program again, each in another process"),
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="output directory")] = Path("out"),
) -> None:
    """Run every cell of STUDY's grid into OUT and compare them; exit code 1 if some failed.

    STUDY may be one of recipes/ wherever graphcomp is installed.
    """
    from graphcomp.base import locked
    from graphcomp.passes import PASSES
    from graphcomp.study import (
        CellProgress,
        check_cells,
        expand,
        finished,
        load_study,
        prepare,
        reading_of,
        run_study,
        workers_for,
        write_results,
    )

    path = or_bundled(study)
    own = str(weights) if weights else None
    changed, chosen = settings_of(settings), labels_of(only)
    shapes = shapes_of(input_shape)
    shape = shapes and shapes.get("", shapes)
    plan = load_study(path, shape, quick=quick, settings=changed, weights=own, data=data)
    if show:
        idle = {"resume": "--resume", "workers": "--workers", "out": "--out", "check": "--check"}
        refuse_idle(context, "with --list, which runs nothing", idle, "leave one out")
    cells = expand(plan, PASSES, str(study), chosen)
    reading = reading_of(plan, cells, str(study), whole=not (quick or chosen))
    if show:
        for cell in cells:
            print(cell.name)
        return
    count = workers_for(cells, workers or plan.workers)
    with locked(out):
        prepare(out, path.read_text(), resume)
        try:
            left = len(cells) - len(finished(cells, out))
            with CellProgress(err_console, left) as shown:
                outcome = run_study(
                    cells, out, engine=plan.engine, workers=count, told=shown.told, ended=shown.ended
                )
        except KeyboardInterrupt:
            text = f"{out}: finished cells are kept; --resume goes on with the others"
            interrupted(KeyboardInterrupt(text))
            raise typer.Exit(130) from None
        write_results(cells, outcome, out, reading)
        differing = _checked(check_cells(cells, out, count)) if check else 0
    print(f"results in {out}: results.csv, study.html, cells/")
    for name, failure in outcome.failures.items():
        tell("failed", "bold red", f"{name}: {failure.message}")
    if outcome.failures:
        failed, where = f"{len(outcome.failures)} of {len(cells)}", "tracebacks are in cells/*.error.txt"
        tell("error", "bold red", f"{out}: {failed} cells failed; {where}, --resume runs them again")
    if outcome.failures or differing:
        raise typer.Exit(1)


def _checked(found: dict[str, str | None]) -> int:
    """Say which programs are not what the table says; how many."""
    wrong = {name: said for name, said in found.items() if said is not None}
    for name, said in wrong.items():
        tell("differs", "bold red", f"{name}: {said}")
    print(
        f"{len(found) - len(wrong)} of {len(found)} programs, read by another process, are as the table says"
    )
    return len(wrong)
