"""The command line. It only parses, shows and maps errors to exit codes; the work is in `graphcomp.compiler`.

Exit codes: 0 done, 1 an error that is explained in one message, 2 wrong usage, 130 interrupted.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from graphcomp.errors import GraphcompError, RecipeError

app = typer.Typer(
    name="graphcomp",
    help="Makes trained CNNs smaller and measurably faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out_console, err_console = Console(), Console(stderr=True)

Model = Annotated[
    str, typer.Argument(help="torchvision:NAME, models:NAME, path/to/file.py:factory or a saved program")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="safetensors, or a state dict saved by torch.save")
]
InputShape = Annotated[str | None, typer.Option("--input-shape", help="with the batch, e.g. 1,3,224,224")]


def main() -> None:
    """Entry point: every deliberate error becomes one message and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    if not debug:
        warnings.simplefilter("ignore")
    try:
        app(standalone_mode=True)
    except GraphcompError as error:
        _fail(error, debug)
    except KeyboardInterrupt:
        err_console.print(
            "interrupted: finished passes are kept; run the same command with --resume to go on"
        )
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError) as error:
        _fail(error, debug)


def _fail(error: BaseException, debug: bool) -> None:
    if debug:
        raise error
    text = str(error) or type(error).__name__
    err_console.print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
    sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        from graphcomp import __version__

        out_console.print(__version__, highlight=False)
        raise typer.Exit


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal, plain lines elsewhere."""
    if not err_console.is_terminal:
        seen: set[str] = set()

        def line(message: str, fraction: float) -> None:
            if message not in seen and not message.startswith("benchmark: "):
                seen.add(message)
                err_console.print(f"{fraction:4.0%}  {escape(message)}", highlight=False)

        yield line
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err_console, transient=True) as bar:
        task = bar.add_task("start", total=1.0)
        yield lambda message, fraction: bar.update(task, description=message, completed=fraction)


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise RecipeError(
            f"--input-shape: found {text!r}, expected positive sizes with the batch, e.g. 1,3,224,224"
        )
    return (1, *shape[1:])


def _integers(text: str, option: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise RecipeError(f"{option}: found {text!r}, expected positive integers such as 1,8,32")
    return values


def _class_ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.split(","))
    except ValueError:
        ids = ()
    if len(ids) < 2 or min(ids) < 0:
        raise RecipeError(f"--classes: found {text!r}, expected two or more class ids such as 0,3,5")
    return ids


def _head(text: str | None) -> str | None:
    if text not in (None, "slice", "random"):
        raise RecipeError(f"--head: found {text!r}, expected slice or random")
    return text


@app.command("compile")
def compile_command(
    model: Annotated[str | None, typer.Argument(help="see below; default: the recipe's model")] = None,
    weights: Weights = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML file with passes and options")] = None,
    passes: Annotated[
        str | None, typer.Option("--passes", help='e.g. "fold-bn, l1{ratio=0.5}"; see `graphcomp passes`')
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="digits, imagefolder:DIR, cifar10:DIR, npz:FILE or random; ?limit=N&mean=…&std=…"
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="only these: data, and logits of the result; e.g. 0,3,5")
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="with --classes: slice (keep their rows) or random")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="auto or a target's name")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0)] = None,
    input_shape: InputShape = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last finished pass")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run's results")] = False,
    bench: Annotated[
        bool, typer.Option("--bench/--no-bench", help="time the result against the original")
    ] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="output directory")] = Path("out"),
) -> None:
    """Compress MODEL (torchvision:NAME, models:NAME, file.py:factory or a saved program) into OUT."""
    from graphcomp.compiler import Job, build
    from graphcomp.report import summary_table

    plan, made = _recipe(recipe, passes)
    changes: dict[str, Any] = {"data": data, "target": target, "seed": seed, "head": _head(head)}
    changes["classes"] = None if classes is None else _class_ids(classes)
    plan = plan.model_copy(update={k: v for k, v in changes.items() if v is not None})
    if not bench:
        plan = plan.model_copy(update={"bench": False})
    name = model or plan.model
    if name is None:
        raise RecipeError("MODEL: found none, expected one on the command line or as `model:` in the recipe")
    own = plan.weights if model is None or plan.model in (None, model) else None  # of another model otherwise
    file = weights or (Path(own) if own else None)
    job = Job(name, plan, made, file, _shape(input_shape))
    try:
        with _progress() as progress:
            report = build(job, out, resume=resume, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt:
        err_console.print("interrupted: finished passes are kept; the same command with --resume goes on")
        raise typer.Exit(130) from None
    out_console.print(summary_table(report))
    for step in report.steps:
        out_console.print(f"{step.index + 1}. {escape(step.name)}: {escape(step.summary)}", highlight=False)
    out_console.print(
        f"results in {escape(str(out))}: model.onnx, program/, plans/, report.json, report.html"
    )


def _recipe(path: Path | None, passes: str | None) -> tuple[Any, list[Any]]:
    from graphcomp.passes import PASSES
    from graphcomp.recipe import Recipe, load_recipe, make_passes, parse_passes

    if passes is not None and path is not None:
        recipe = load_recipe(path, PASSES)
        return recipe, parse_passes(passes, PASSES)
    if passes is not None:
        return Recipe(passes=[passes]), parse_passes(passes, PASSES)
    if path is None:
        raise RecipeError(
            'found neither --recipe nor --passes, expected one, e.g. --passes "fold-bn, l1{ratio=0.5}"'
        )
    if not path.exists() and path.parts[:1] == ("models",):
        import graphcomp.models

        path = Path(graphcomp.models.__file__).parent / path.relative_to("models")
    recipe = load_recipe(path, PASSES)
    return recipe, make_passes(recipe, PASSES)


@app.command("inspect")
def inspect_command(
    model: Model,
    weights: Weights = None,
    input_shape: InputShape = None,
    join: Annotated[Literal["couple", "pad"], typer.Option("--join", help="policy at additions")] = "couple",
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything as JSON")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw the groups on the network")] = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="also print the program, one node a line")] = False,
) -> None:
    """Show MODEL's nodes, coupled channel groups and why, what is pinned and why, params and MACs."""
    from graphcomp.compiler import load_source
    from graphcomp.inspection import inspect, render, write_json, write_svg

    program = load_source(model, weights, _shape(input_shape)).program
    inspection = inspect(program, join)
    if nodes:
        out_console.print(str(program), markup=False, highlight=False, soft_wrap=True)
    render(inspection, out_console)
    if json_file is not None:
        write_json(inspection, json_file)
    if svg_file is not None:
        write_svg(inspection, svg_file)


@app.command("bench")
def bench_command(
    base: Annotated[Path, typer.Argument(help="ONNX file of the original")],
    new: Annotated[Path, typer.Argument(help="ONNX file of the compressed network")],
    provider: Annotated[Literal["cpu", "cuda", "tensorrt"], typer.Option("--provider")] = "cpu",
    batch: Annotated[str, typer.Option("--batch", help="batch sizes, e.g. 1,8,32")] = "1",
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    runs: Annotated[int, typer.Option("--runs", min=1, help="runs of each model at most")] = 200,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="seconds a batch size at most")
    ] = 10.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result as JSON")] = None,
) -> None:
    """Time two ONNX files against each other: interleaved, with intervals, without silent fallback."""
    from graphcomp.bench import benchmark, format_table
    from graphcomp.storage import atomic_file

    batches = _integers(batch, "--batch")
    with _progress() as progress:
        result = benchmark(
            base, new, provider=provider, batches=batches, threads=threads, runs=runs, seconds=seconds,
            progress=progress,
        )  # fmt: skip
    out_console.print(format_table(result))
    if json_file is not None:
        with atomic_file(json_file) as temporary:
            temporary.write_text(result.model_dump_json(indent=2))


@app.command("passes")
def passes_command(
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """List every pass with its options and defaults."""
    from pydantic import TypeAdapter

    from graphcomp.passes import PASSES

    schemas = {name: TypeAdapter(kind).json_schema() for name, kind in PASSES.items()}
    if as_json:
        out_console.print(json.dumps(schemas, indent=2), markup=False, highlight=False, soft_wrap=True)
        return
    for name, kind in PASSES.items():
        head = (kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        table = Table(title=f"{name}: {escape(head)}", title_justify="left", title_style="bold", expand=False)
        for column in ("option", "type", "default"):
            table.add_column(column, overflow="fold")
        for option in fields(kind):
            schema = schemas[name].get("properties", {}).get(option.name, {})
            table.add_row(option.name, escape(_type(schema)), escape(json.dumps(schema.get("default"))))
        out_console.print(table)


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object":
        return "{macs: x} or {params: x}" if "macs" in json.dumps(schema) else "mapping"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    return " ".join([kind, *limits])


@app.command("doctor")
def doctor_command() -> None:
    """Check versions, instruction set, providers that really work, conflicts; say what to do."""
    from graphcomp.doctor import diagnose, render

    findings = diagnose()
    out_console.print(render(findings))
    essential = [f for f in findings if not f.ok and not _optional(f.name)]
    if essential:
        raise typer.Exit(1)


def _optional(finding: str) -> bool:
    """Accelerators and a busy machine are worth a word, not a failure."""
    return any(word in finding.lower() for word in ("cuda", "tensorrt", "gpu", "load", "busy", "threads"))
