"""The command line. It only parses, shows and maps errors to exit codes; the work is in `compiler.compiler`.

Exit codes: 0 done, 1 an error that is explained in one message, 2 wrong usage, 130 interrupted.
"""

import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from graphcomp.base import distributed, is_file
from graphcomp.errors import DistributedError, GraphcompError, GraphcompWarning, RecipeError

app = typer.Typer(
    name="graphcomp",
    help="Makes trained CNNs smaller and measurably faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# What is shown holds names that users chose: no text is markup, an emoji code, or highlighted as code.
out_console, err_console = (
    Console(stderr=stderr, markup=False, emoji=False, highlight=False) for stderr in (False, True)
)

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
        warnings.simplefilter("always", GraphcompWarning)
        warnings.showwarning = _warn
    try:
        distributed.join()
        if not distributed.is_first():
            sys.stdout = sys.stderr = io.StringIO()  # one process speaks for all
        app(standalone_mode=True)
    except SystemExit as stop:
        if not stop.code:
            distributed.leave()
        elif distributed.is_first():  # wrong usage, in all of them alike
            distributed.said()
        else:
            distributed.wait_until_said()
        raise
    except GraphcompError as error:
        _fail(error, debug)
    except KeyboardInterrupt as error:
        _interrupted(error)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError) as error:
        _fail(error, debug)
    except Exception:
        _speak_first()
        raise


def _tell(kind: str, style: str, text: str) -> None:
    """`kind: text` on stderr, whole: a terminal wraps it, a file keeps it on one line."""
    err_console.print(Text.assemble((f"{kind}:", style), " ", text), soft_wrap=True)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    _tell("warning", "yellow", str(message))


def _speak_first() -> None:
    """Of several processes, the first one that fails says why; the others end without a word."""
    if not distributed.is_first_to_fail():
        distributed.wait_until_said()
        sys.exit(1)
    if not distributed.is_first():
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def _interrupted(error: KeyboardInterrupt) -> None:
    """A pass that was stopped says itself how far it came."""
    text = str(error) or "finished passes are kept; the same command with --resume goes on"
    _tell("interrupted", "", text)


def _fail(error: BaseException, debug: bool) -> None:
    _speak_first()
    if debug:
        raise error
    text = str(error) or type(error).__name__
    _tell("error", "bold red", text)
    distributed.said()
    sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        from graphcomp import __version__

        print(__version__)
        raise typer.Exit
    count, command = distributed.world_size(), context.invoked_subcommand
    if count > 1 and command != "compile":
        raise DistributedError(
            f"graphcomp {command}: found {count} processes, expected one: only `graphcomp compile` runs in "
            "several; start it without torchrun"
        )


_COUNTS = re.compile(r"(?<![\w\[/])\d[\d,.:%]*")
"""Numbers that change while one thing is done ("250 of 1,000"), not those of a step ("[1/2]", "l1")."""

EVERY = 30.0
"""Seconds after which what counts on is printed again, where there is no bar."""


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal, plain lines elsewhere."""
    if not err_console.is_terminal:
        shown: dict[str, float] = {}

        def line(message: str, fraction: float) -> None:
            kind, now = _COUNTS.sub("#", message), time.monotonic()
            if now - shown.get(kind, -math.inf) >= EVERY and not message.startswith("benchmark: "):
                shown[kind] = now
                err_console.print(f"{fraction:4.0%}  {message}", soft_wrap=True)

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


def _providers(text: str) -> list[Any]:
    from graphcomp.runtime import PROVIDERS

    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found or set(found) - set(PROVIDERS):
        raise RecipeError(f"--provider: found {text!r}, expected {', '.join(PROVIDERS)}, or several of them")
    return found


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


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, whatever its value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_idle(context: typer.Context, where: str, options: dict[str, str], advice: str) -> None:
    """RecipeError if an option stands there that changes nothing; `options`: parameter -> option."""
    for name, option in options.items():
        if _given(context, name):
            raise RecipeError(f"{option}: found it {where}, where it has no effect, expected one; {advice}")


@app.command("compile")
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
    out: Annotated[Path, typer.Option("--out", "-o", help="output directory")] = Path("out"),
) -> None:
    """Compress MODEL (torchvision:NAME, models:NAME, file.py:factory or a saved program) into OUT."""
    from graphcomp.compiler import BenchOptions, Job, RobustnessOptions, build
    from graphcomp.report import describe, robustness_table, summary_table

    if resume and overwrite:
        raise RecipeError(
            "--resume: found --overwrite as well, expected one of them; leave one out: --resume goes on with "
            "what an earlier run left, --overwrite throws it away"
        )
    plan, made = _recipe(recipe, passes)
    changes: dict[str, Any] = {"data": data, "target": target, "seed": seed, "head": _head(head)}
    changes["classes"] = None if classes is None else _class_ids(classes)
    plan = plan.model_copy(update={k: v for k, v in changes.items() if v is not None})
    if plan.classes is None:
        advice = "add --classes, or leave it out"
        _refuse_idle(context, "without --classes", {"head": "--head"}, advice)
    if bench is not None:
        timing = (plan.bench or BenchOptions()) if bench else False
        plan = plan.model_copy(update={"bench": timing})
    if robustness is not None:
        strength = (plan.robustness or RobustnessOptions()) if robustness else False
        plan = plan.model_copy(update={"robustness": strength})
    if dct is not None:
        plan = plan.model_copy(update={"export": plan.export.model_copy(update={"dct": dct})})
    name = model or plan.model
    if name is None:
        raise RecipeError("MODEL: found none, expected one on the command line or as `model:` in the recipe")
    own = plan.weights if model is None or plan.model in (None, model) else None  # of another model otherwise
    file = weights or (Path(own) if own else None)
    job = Job(name, plan, made, file, _shape(input_shape))
    try:
        with _progress() as progress:
            report = build(job, out, resume=resume, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt as error:
        _interrupted(error)
        raise typer.Exit(130) from None
    if dct is not None and report.export.dct is None:
        _warn(
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
    files = "model.onnx, model-dense.onnx" if report.dense_export else "model.onnx"
    print(f"results in {out}: {files}, program/, plans/, report.json, report.html")


def _recipe(path: Path | None, passes: str | None) -> tuple[Any, list[Any]]:
    from graphcomp.compiler import Recipe, load_recipe, make_passes, parse_passes
    from graphcomp.passes import PASSES

    if passes is not None and path is not None:
        raise RecipeError(
            f"--passes: found --recipe {path} as well, which has passes of its own, expected one of them; "
            "leave --passes out, or write them into the recipe"
        )
    if passes is not None:
        return Recipe(passes=[passes]), parse_passes(passes, PASSES)
    if path is None:
        raise RecipeError(
            'found neither --recipe nor --passes, expected one, e.g. --passes "fold-bn, l1{ratio=0.5}"'
        )
    recipe = load_recipe(_or_bundled(path), PASSES)
    return recipe, make_passes(recipe, PASSES)


def _or_bundled(path: Path) -> Path:
    """`models/demo.yaml` is there in every folder."""
    if is_file(path) or path.parts[:1] != ("models",):
        return path
    import graphcomp.models

    return Path(graphcomp.models.__file__).parent / path.relative_to("models")


@app.command("study")
def study_command(
    context: typer.Context,
    study: Annotated[
        Path, typer.Argument(help="YAML file: a recipe with placeholders, and a grid of values")
    ],
    weights: Weights = None,
    data: Annotated[str | None, typer.Option("--data", help="instead of the recipe's")] = None,
    input_shape: InputShape = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="keep finished cells, go on with the others")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="cells at a time; default: half of the cores")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="only list the cells")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="output directory")] = Path("out"),
) -> None:
    """Run every cell of STUDY's grid into OUT and compare them; exit code 1 if some failed."""
    from graphcomp.base import locked
    from graphcomp.passes import PASSES
    from graphcomp.study import (
        CellProgress,
        expand,
        finished,
        load_study,
        prepare,
        run_study,
        workers_for,
        write_results,
    )

    path = _or_bundled(study)
    plan = load_study(path, _shape(input_shape), weights=str(weights) if weights else None, data=data)
    if show:
        idle = {"resume": "--resume", "workers": "--workers", "out": "--out"}
        _refuse_idle(context, "with --list, which runs nothing", idle, "leave one out")
    cells = expand(plan, PASSES, str(study))
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
            _interrupted(KeyboardInterrupt(text))
            raise typer.Exit(130) from None
        write_results(cells, outcome, out, plan.class_names)
    print(f"results in {out}: results.csv, study.html, cells/")
    for name, failure in outcome.failures.items():
        _tell("failed", "bold red", f"{name}: {failure.message}")
    if outcome.failures:
        failed, where = f"{len(outcome.failures)} of {len(cells)}", "tracebacks are in cells/*.error.txt"
        _tell("error", "bold red", f"{out}: {failed} cells failed; {where}, --resume runs them again")
        raise typer.Exit(1)


@app.command("inspect")
def inspect_command(
    model: Model,
    weights: Weights = None,
    input_shape: InputShape = None,
    join: Annotated[Literal["couple", "pad"], typer.Option("--join", help="policy at additions")] = "couple",
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything as JSON")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw the groups on the network")] = None,
    graphml_file: Annotated[
        Path | None, typer.Option("--graphml", help="write the graph with its groups and costs as GraphML")
    ] = None,
    dot_file: Annotated[Path | None, typer.Option("--dot", help="write it for Graphviz")] = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="also print the program, one node a line")] = False,
) -> None:
    """Show MODEL's nodes, coupled channel groups and why, what is pinned and why, params and MACs."""
    from graphcomp.compiler import load_source
    from graphcomp.inspection import (
        grouped,
        inspect,
        render,
        write_dot,
        write_graphml,
        write_json,
        write_svg,
    )

    program = load_source(model, weights, _shape(input_shape)).program
    inspection = inspect(program, join)
    if nodes:
        print(program)
    render(inspection, out_console)
    if json_file is not None:
        write_json(inspection, json_file)
    if svg_file is not None:
        write_svg(inspection, svg_file)
    if graphml_file is not None:
        write_graphml(grouped(program, inspection), graphml_file)
    if dot_file is not None:
        write_dot(grouped(program, inspection), dot_file)


@app.command("evaluate")
def evaluate_command(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str | None, typer.Option("--data", help="as for compile; default: what comes with the model")
    ] = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="also on images that are blurred, hidden, dark or bright")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of damage and of ?limit=N")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result as JSON")] = None,
) -> None:
    """Show how good MODEL is on the evaluation data: top-1 accuracy, or the mean error of values."""
    from graphcomp.base import write_text
    from graphcomp.compiler import RobustnessOptions, evaluate_source, load_source, open_data
    from graphcomp.report import evaluation_table

    source = load_source(model, weights, _shape(input_shape))
    spec = data or source.data
    if spec is None:
        raise RecipeError("--data: found none, expected labelled data such as cifar10:DIR to evaluate on")
    if not robustness and "limit=" not in spec and not spec.startswith("random"):
        where = f"with {spec}, all of which is used,"
        _refuse_idle(context, where, {"seed": "--seed"}, "add --robustness or ?limit=N, or leave it out")
    loaded = open_data(spec, source.program, seed)
    corruptions = RobustnessOptions().corruptions() if robustness else []
    with _progress() as progress:
        found = evaluate_source(
            source, loaded, model=model, corruptions=corruptions, seed=seed, progress=progress
        )
    out_console.print(evaluation_table(found))
    if json_file is not None:
        write_text(json_file, found.model_dump_json(indent=2))


@app.command("bench")
def bench_command(
    base: Annotated[Path, typer.Argument(help="ONNX file of the original")],
    new: Annotated[Path, typer.Argument(help="ONNX file of the compressed network")],
    provider: Annotated[
        str, typer.Option("--provider", help="cpu, cuda or tensorrt; several, e.g. cpu,cuda, side by side")
    ] = "cpu",
    batch: Annotated[str, typer.Option("--batch", help="batch sizes, e.g. 1,8,32")] = "1",
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    runs: Annotated[int, typer.Option("--runs", min=1, help="runs of each model at most")] = 200,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="seconds a batch size at most")
    ] = 10.0,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="record and replay launches on GPUs; not yet run on one")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="write the result as JSON, of several providers a list of results"),
    ] = None,
) -> None:
    """Time two ONNX files against each other: interleaved, with intervals, without silent fallback."""
    from graphcomp.base import write_text
    from graphcomp.runtime import benchmark, format_table, probe, sweep_table

    batches, providers = _integers(batch, "--batch"), _providers(provider)
    graphs = {p: cuda_graphs and (p != "cpu" or len(providers) == 1) for p in providers}  # CPUs have none
    for one in providers:  # all of them before any is timed: none is left out in silence
        probe(one, threads, cuda_graphs=graphs[one])
    with _progress() as progress:
        results = [
            benchmark(
                base, new, provider=one, batches=batches, threads=threads, runs=runs, seconds=seconds,
                cuda_graphs=graphs[one], progress=progress,
            )
            for one in providers
        ]  # fmt: skip
    for result in results:
        out_console.print(format_table(result))
    if len(batches) > 1 or len(results) > 1:
        out_console.print(sweep_table(results))
    if json_file is not None:
        plain = [result.model_dump(mode="json") for result in results]
        write_text(json_file, json.dumps(plain if len(plain) > 1 else plain[0], indent=2))


@app.command("explain")
def explain_command(
    base: Annotated[Path, typer.Argument(help="ONNX file of the original")],
    new: Annotated[Path, typer.Argument(help="ONNX file of the compressed network")],
    provider: Annotated[Literal["cpu", "cuda", "tensorrt"], typer.Option("--provider")] = "cpu",
    batch: Annotated[int, typer.Option("--batch", min=1, help="samples a run")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    runs: Annotated[int, typer.Option("--runs", min=1, help="timed runs of each model at most")] = 200,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="seconds of timing at most")] = 10.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result as JSON")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw the waterfall")] = None,
) -> None:
    """Say why NEW is not as much faster than BASE as it is smaller: by reason, by layer and by pass."""
    from graphcomp.base import write_text
    from graphcomp.explanation import explain
    from graphcomp.report import describe, layer_table, part_table, waterfall_file

    with _progress() as progress:
        found = explain(
            base, new, provider=provider, batch=batch, threads=threads, runs=runs, seconds=seconds,
            progress=progress,
        )  # fmt: skip
    for line in describe(found):
        out_console.print(line)
    out_console.print(part_table(found))
    out_console.print(layer_table(found))
    for file, text in ((json_file, found.model_dump_json(indent=2)), (svg_file, waterfall_file(found))):
        if file is not None:
            write_text(file, text)


@app.command("calibrate-target")
def calibrate_target_command(
    target: Annotated[str, typer.Option("--target", help="auto or a target's name")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    networks: Annotated[
        str, typer.Option("--networks", help="of torchvision, to compare predictions with; empty: none")
    ] = "resnet18,mobilenet_v2",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result as JSON")] = None,
) -> None:
    """Measure how widths become time on this machine, and how well times are predicted."""
    from graphcomp.base import write_text
    from graphcomp.budget import calibrate, tables
    from graphcomp.runtime import find_target

    names = [name.strip() for name in networks.split(",") if name.strip()]
    with _progress() as progress:
        found = calibrate(find_target(target), threads, names, progress)
    for table in tables(found):
        out_console.print(table)
    if json_file is not None:
        write_text(json_file, json.dumps(found.as_json(), indent=2))


@app.command("passes")
def passes_command(
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """List every pass with its options and defaults."""
    from pydantic import TypeAdapter

    from graphcomp.passes import PASSES

    schemas = {name: TypeAdapter(kind).json_schema() for name, kind in PASSES.items()}
    if as_json:
        print(json.dumps(schemas, indent=2))
        return
    for name, kind in PASSES.items():
        head = (kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        table = Table(title=f"{name}: {head}", title_justify="left", title_style="bold", expand=False)
        for column in ("option", "type", "default"):
            table.add_column(column, overflow="fold")
        for option in fields(kind):
            schema = schemas[name].get("properties", {}).get(option.name, {})
            table.add_row(option.name, _type(schema), json.dumps(schema.get("default")))
        out_console.print(table)


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "$ref" in schema:
        return f"options of {schema['$ref'].rpartition('/')[2]}"
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object":
        return "{macs: x} or {params: x} or {latency: x}" if "macs" in json.dumps(schema) else "mapping"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    return " ".join([kind, *limits])


@app.command("doctor")
def doctor_command() -> None:
    """Check versions, instruction set, providers that really work, conflicts; say what to do."""
    from graphcomp.runtime import diagnose, render

    findings = diagnose()
    out_console.print(render(findings))
    if any(finding.essential and not finding.ok for finding in findings):
        raise typer.Exit(1)
