"""`graphcomp compile`."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graphcomp.cli.console import interrupted, out_console, progress_shown, warn
from graphcomp.cli.options import (
    Inputs,
    InputShapes,
    Start,
    Until,
    Weights,
    inputs_of,
    refuse_idle,
    shapes_of,
)
from graphcomp.cli.recipes import recipe_of
from graphcomp.errors import RecipeError

LONGEST_ID = 18
"""Digits of a number that is still a class's id."""


def compile_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="see below; default: the recipe's model")] = None,
    weights: Weights = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML file with passes and options")] = None,
    passes: Annotated[
        str | None, typer.Option("--passes", help='e.g. "fold-bn, l1{ratio=0.5}"; see `graphcomp passes`')
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="digits, imagefolder:DIR, cifar10:DIR, cifar100:DIR, npz:FILE, FILE.py:NAME or random; "
            "?limit=N&mean=…&std=…",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option("--classes", help="only these, by id or name: data, and logits of the result; 0,3,5"),
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="with --classes: slice (keep their rows) or random")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="auto or a target's name")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0)] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory", help="GiB of activations and statistics held at once (a quarter of the machine's)"
        ),
    ] = None,
    input_shape: InputShapes = None,
    start: Start = None,
    until: Until = None,
    inputs: Inputs = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last finished pass")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run's results")] = False,
    allow_nothing: Annotated[
        bool, typer.Option("--allow-nothing", help="a result that no pass changed is no error")
    ] = False,
    bench: Annotated[
        bool | None, typer.Option("--bench/--no-bench", help="time the result against the original (yes)")
    ] = None,
    robustness: Annotated[
        bool | None,
        typer.Option(
            "--robustness/--no-robustness", help="score baseline and result on damaged images as well"
        ),
    ] = None,
    dct: Annotated[
        Literal["coefficients", "dense", "both"] | None,
        typer.Option("--dct", help="how the ONNX file stores weights that the pass `dct` made (both)"),
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option("--dynamic", help="of any size in the ONNX file beside the batch: height,width"),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option("--class-names", help="file with a name a line, for the metadata of the ONNX files"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="output directory")] = Path("out"),
) -> None:
    """Compress MODEL (torchvision:NAME, models:NAME, X.py:factory, X.onnx or a saved program) into OUT."""
    from graphcomp.compiler import BenchOptions, Job, RobustnessOptions, build
    from graphcomp.report import describe, robustness_table, summary_table

    if resume and overwrite:
        raise RecipeError(
            "--resume: found --overwrite as well, expected one of them; leave one out: --resume goes on with "
            "what an earlier run left, --overwrite throws it away"
        )
    plan, made = recipe_of(recipe, passes)
    changes: dict[str, Any] = {"data": data, "target": target, "seed": seed, "head": _head(head)}
    changes |= {"start": start, "until": until}
    changes["arguments"] = inputs_of(inputs) or None
    changes["allow_nothing"] = allow_nothing or None
    changes["classes"] = None if classes is None else _classes(classes)
    if memory is not None:
        changes["memory"] = _positive(memory)
    plan = plan.model_copy(update={k: v for k, v in changes.items() if v is not None})
    if plan.classes is None:
        advice = "add --classes, or leave it out"
        refuse_idle(context, "without --classes", {"head": "--head"}, advice)
    if bench is not None:
        timing = (plan.bench or BenchOptions()) if bench else False
        plan = plan.model_copy(update={"bench": timing})
    if robustness is not None:
        strength = (plan.robustness or RobustnessOptions()) if robustness else False
        plan = plan.model_copy(update={"robustness": strength})
    written = {
        "dct": dct,
        "class_names": class_names,
        "dynamic": None if dynamic is None else _dynamic(dynamic),
    }
    written = {k: v for k, v in written.items() if v is not None}
    plan = plan.model_copy(update={"export": plan.export.model_copy(update=written)})
    name = model or plan.model
    if name is None:
        raise RecipeError("MODEL: found none, expected one on the command line or as `model:` in the recipe")
    own = plan.weights if model is None or plan.model in (None, model) else None  # of another model otherwise
    file = weights or (Path(own) if own else None)
    job = Job(name, plan, made, file, shapes_of(input_shape))
    try:
        with progress_shown() as progress:
            report = build(job, out, resume=resume, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt as error:
        interrupted(error)
        raise typer.Exit(130) from None
    if dct is not None and report.export.dct is None:
        warn(
            "--dct: no layer of the result stores DCT coefficients, so it had no effect; the pass `dct` does"
        )
    out_console.print(summary_table(report))
    damaged = robustness_table(report)
    if damaged is not None:
        out_console.print(damaged)
    for line in describe(report.explanation) if report.explanation else []:
        out_console.print(line)
    for step in report.steps:
        out_console.print(f"{step.index + 1}. {step.name}: {step.summary}")
    names = ["model.onnx"]
    names += ["model-dense.onnx"] if report.dense_export else []
    names += [report.quantized.path] if report.quantized and report.quantized.path else []
    print(f"results in {out}: {', '.join(names)}, program/, plans/, report.json, report.html")


def _classes(text: str) -> tuple[int | str, ...]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or not all(parts):
        raise RecipeError(
            f"--classes: found {text!r}, expected two or more classes by id or name such as 0,3,5 or cat,dog"
        )
    ids = [part.isascii() and part.isdecimal() and len(part) <= LONGEST_ID for part in parts]
    return tuple(int(part) if is_id else part for part, is_id in zip(parts, ids, strict=True))


def _positive(memory: float) -> float:
    if not 0 < memory < math.inf:
        raise RecipeError(f"--memory: found {memory:g}, expected GiB above 0, such as 4")
    return memory


def _dynamic(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= {"batch", "height", "width"}:
        raise RecipeError(f"--dynamic: found {text!r}, expected height, width or both: height,width")
    return tuple(dict.fromkeys(("batch", *names)))


def _head(text: str | None) -> str | None:
    if text not in (None, "slice", "random"):
        raise RecipeError(f"--head: found {text!r}, expected slice or random")
    return text
