"""What a run delivers once its passes are done: program, files, times and the report of all of it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from graphcomp.base import Progress, atomic_entries, part, quiet, remove, write_record
from graphcomp.bases import options_of
from graphcomp.compiler.folder import BASE, DENSE, INT8, MODEL, State, stray_data
from graphcomp.compiler.recipe import BenchOptions, ExportOptions, Recipe
from graphcomp.compiler.source import Job, Source
from graphcomp.data import Data
from graphcomp.explanation import TRACED_RUNS, TRACED_SECONDS, explain_bench
from graphcomp.ir import Program, Shape, save
from graphcomp.onnx import Exports, Stored, Timing, Weights, export_onnx, input_names
from graphcomp.pipeline import Context, exporting
from graphcomp.records import Bench, Explanation, Export, Quantized, Report, Robustness, Step
from graphcomp.report import write_report
from graphcomp.runtime import Precision, Provider, Target, asked_of, benchmark, environment


@dataclass(frozen=True)
class Run:
    """A run whose passes are done."""

    job: Job
    out: Path
    spec: str
    data: Data
    source: Source
    state: State
    program: Program
    steps: list[Step]
    robustness: Robustness | None
    context: Context
    clock: float


def deliver(run: Run, progress: Progress) -> Report:
    """Save, export, time and report the result."""
    out = run.out
    with atomic_entries(out) as place:
        progress("save the program", 0.72)
        save(run.program, place / "program")
        progress("export the baseline", 0.74)
        report = _report(run, place, progress)
        write_report(report, place)
    if report.dense_export is None:
        remove(out / DENSE)  # of an earlier run
    if report.quantized is None or report.quantized.path is None:
        remove(out / INT8)
    exports = (report.baseline_export, report.export, report.dense_export)
    for name in stray_data(out, [one.data for one in exports if one is not None]):
        remove(out / name)
    progress("done", 1.0)
    return report


def _report(run: Run, place: Path, progress: Progress) -> Report:
    """Export into `place`, and time what is there."""
    recipe, target, asked = run.job.recipe, run.context.target, _asked(run.job)
    provider, known = target.provider, run.context.exports
    exported = recipe.export
    told = part(progress, 0.74, 0.05, "export the baseline: ")
    base = _export(run.source.program, place / BASE, exported, None, "coefficients", known, told)
    stored: Stored = "dense" if exported.dct == "dense" else "coefficients"
    told = part(progress, 0.79, 0.05, "export the result: ")
    new = _export(run.program, place / MODEL, exported, provider, stored, known, told, exported.weights)
    twice = new.dct is not None and exported.dct == "both"
    told = part(progress, 0.84, 0.01, "export the dense result: ")
    dense = (
        _export(run.program, place / DENSE, exported, provider, "dense", known, told, exported.weights)
        if twice
        else None
    )
    told = part(progress, 0.85, 0.05, "quantize: ")
    steps, quantized = _quantize(run, place, MODEL if dense is None else DENSE, told)
    span = (0.9, 0.93) if dense else (0.9, 0.97)
    files = place / BASE, place / MODEL
    shapes = _shapes(run.program)
    benches = _benches(recipe, files, target, progress, span, shapes)
    explanation = _explain(recipe, benches, files, progress, span[1], run.program)
    pair = place / DENSE, place / MODEL
    stored_otherwise = _benches(recipe, pair, target, progress, (0.94, 0.99), shapes, most=1) if dense else []
    return Report(
        model=run.job.model,
        weights=str(run.source.weights) if run.source.weights else None,
        remarks=[*run.source.remarks, *opset_remarks(run.source.program, new)],
        data=run.data.description if run.spec != "random" else "random",
        target=target.name,
        seed=recipe.seed,
        input_shape=asked.get(""),
        input_shapes={name: shape for name, shape in asked.items() if name},
        recipe=_effective(run.job, run.data.spec, target.name),
        baseline=run.state.baseline,
        final=steps[-1].after,
        steps=[step.brief() for step in steps],
        export=new,
        baseline_export=base,
        dense_export=dense,
        bench=next(iter(benches), None),
        other_benches=benches[1:],
        dct_bench=next(iter(stored_otherwise), None),
        quantized=quantized,
        robustness=run.robustness,
        explanation=explanation,
        environment=environment(),
        started=run.state.started,
        seconds=time.perf_counter() - run.clock,
    )


def _quantize(run: Run, place: Path, source: str, progress: Progress) -> tuple[list[Step], Quantized | None]:
    """Carry out a pass on the file of the result, if the last one is for that; its plan is complete now."""
    pass_, steps = exporting(run.job.passes), list(run.steps)
    if pass_ is None:
        return steps, None
    started, options = time.perf_counter(), run.job.recipe.bench
    timing = None
    if options is not False:
        providers = tuple(one.provider for one in runtimes(options, run.context.target))
        timing = Timing(options.threads, options.batches, options.runs, options.seconds, providers)
    context = replace(run.context, progress=progress)
    plan, made = pass_.export(run.program, place / source, place / INT8, steps[-1].plan, context, timing)
    seconds = steps[-1].seconds + time.perf_counter() - started
    steps[-1] = steps[-1].model_copy(update={"plan": plan, "seconds": seconds})
    write_record(run.out / steps[-1].plan_file, plan)
    moved = [bench.moved("") for bench in made.benches]
    path = None if made.path is None else INT8
    update = {"path": path, "source": source, "bench": next(iter(moved), None), "other_benches": moved[1:]}
    return steps, made.model_copy(update=update)


def opset_remarks(program: Program, export: Export) -> list[str]:
    """That the result has another operator set than the file that the program was read from, if so."""
    told = program.interface.opset
    return [] if told in (None, export.opset) else [f"opset {told} in the file, {export.opset} in the result"]


def _asked(job: Job) -> dict[str, tuple[int, ...]]:
    shape = job.input_shape
    return {"": shape} if isinstance(shape, tuple) else dict(shape or {})


def _effective(job: Job, data: str, target: str) -> dict[str, Any]:
    """The recipe as it ran, valid as a recipe file."""
    recipe = job.recipe.model_dump(mode="json", exclude_none=True, exclude={"weights", "arguments"})
    if job.recipe.arguments:  # None is a value there
        recipe |= job.recipe.model_dump(mode="json", include={"arguments"})
    passes = [{p.name: _plain(options_of(p))} for p in job.passes]
    weights = {"weights": str(job.weights)} if job.weights else {}
    recipe["allow_nothing"] = job.recipe.allows_nothing
    return {**recipe, **weights, "passes": passes, "data": data, "target": target, "model": job.model}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}


def _export(
    program: Program,
    path: Path,
    options: ExportOptions,
    provider: Provider | None = None,
    dct: Stored = "coefficients",
    known: Exports | None = None,
    told: Progress = quiet,
    weights: Weights = "fp32",
) -> Export:
    record = export_onnx(
        program,
        path,
        opset=options.opset,
        tolerance=options.tolerance,
        dynamic=options.dynamic,
        provider=provider,
        dct=dct,
        weights=weights,
        known=known,
        progress=told,
    )
    return record.model_copy(update={"path": path.name})


def _shapes(program: Program) -> dict[str, Shape]:
    """Of the example inputs, by the names that they have in files: what is open in these is timed so."""
    names, inputs = input_names(program), program.example_inputs
    return {name: tuple(x.shape) for name, x in zip(names, inputs, strict=True)}


class Runtime(NamedTuple):
    """Where the result is timed, and how: see `open_session`."""

    provider: Provider
    cuda_graphs: bool
    precision: Precision


def runtimes(options: BenchOptions, target: Target) -> list[Runtime]:
    """On the target unless others were asked for; see `asked_of` for who gets options of GPUs."""
    providers = options.provider or (target.provider,)
    asked = asked_of(providers)

    def precision(provider: Provider) -> Precision:
        if options.precision is not None:
            return options.precision if provider in asked else "fp32"
        return target.precision if provider == target.provider else "fp32"

    return [Runtime(p, options.cuda_graphs and p in asked, precision(p)) for p in providers]


def _benches(
    recipe: Recipe,
    files: tuple[Path, Path],
    target: Target,
    progress: Progress,
    span: tuple[float, float],
    shapes: Mapping[str, Shape],
    most: int | None = None,
) -> list[Bench]:
    """Time two files of the output directory in every runtime that was asked for, or the first `most`."""
    if recipe.bench is False:
        return []
    options = recipe.bench

    def tell(message: str, fraction: float) -> None:
        progress(f"benchmark: {message}", span[0] + (span[1] - span[0]) * fraction)

    found = [
        benchmark(
            *files,
            provider=provider,
            batches=options.batches,
            threads=options.threads,
            runs=options.runs,
            seconds=options.seconds,
            cuda_graphs=cuda_graphs,
            precision=precision,
            input_shapes=shapes,
            progress=tell,
        )
        for provider, cuda_graphs, precision in runtimes(options, target)[:most]
    ]
    return [bench.moved("") for bench in found]


def _explain(
    recipe: Recipe,
    benches: Sequence[Bench],
    files: tuple[Path, Path],
    progress: Progress,
    at: float,
    program: Program,
) -> Explanation | None:
    """On CPUs; on GPUs it depends on the runtime's build whether it tells how long its operators take."""
    bench = next((one for one in benches if one.provider == "cpu"), None)
    if recipe.bench is False or bench is None:
        return None
    return explain_bench(
        bench,
        files,
        traced_runs=min(recipe.bench.runs, TRACED_RUNS),
        traced_seconds=min(recipe.bench.seconds, TRACED_SECONDS),
        input_shapes=_shapes(program),
        progress=lambda what, fraction: progress(f"explain: {what}", at),
        program=program,
    )
