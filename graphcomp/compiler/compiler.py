"""From a model and a recipe to a directory that can be deployed, checked and resumed.

    OUT/model.onnx       the compressed network            OUT/program/      the same, for PyTorch
    OUT/baseline.onnx    the original, what it is timed against
    OUT/model-dense.onnx the result again, if model.onnx stores weights as DCT coefficients: larger, portable
    OUT/plans/           what each pass decided            OUT/report.json, report.html
    OUT/checkpoints/     program and record after each pass; OUT/state.json says of what run they are

Every file appears whole or not at all; after an interruption the last finished pass is the place to resume.
Results of an earlier run stay until those of this one are all there. One run at a time works in a directory.
"""

import difflib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from graphcomp.base import (
    LOCK,
    Progress,
    atomic_entries,
    distributed,
    locked,
    part,
    quiet,
    read_record,
    remove,
    sweep,
    unfinished,
    write_text,
)
from graphcomp.bases import options_of
from graphcomp.compiler.classes import restrict_head
from graphcomp.compiler.models import is_program_dir, load_model, load_weights
from graphcomp.compiler.recipe import ExportOptions, Recipe
from graphcomp.data import Data, load_data
from graphcomp.errors import DataError, LoadError, OutputError, RecipeError
from graphcomp.explanation import TRACED_RUNS, TRACED_SECONDS, explain_bench
from graphcomp.ir import Program, load, numbers_of, save, trace
from graphcomp.measure import Corruption, count_outputs, require_classes, require_images, robustness
from graphcomp.onnx import Exports, Stored, export_onnx
from graphcomp.pipeline import Context, Earlier, Pass, Pipeline, check_order, held, verify, work_name
from graphcomp.records import (
    Bench,
    CorruptedScore,
    Evaluation,
    Explanation,
    Export,
    Record,
    Report,
    Robustness,
    Snapshot,
    Step,
)
from graphcomp.report import write_report
from graphcomp.runtime import Provider, Target, benchmark, environment, find_target, probe
from graphcomp.version import __version__

SHARE = 8
"""How many times the size of one input has to be free."""
LARGEST_RANK = 8
"""Dimensions of an input, with the batch."""


@dataclass(frozen=True)
class Job:
    """Everything that decides what a run computes.

    Attributes:
        model: `torchvision:NAME`, `models:NAME`, `file.py:factory` or a saved program directory.
        recipe: data, target, seed, export and benchmark options.
        passes: made from the recipe.
        weights: file of weights, None for those that come with the model (if any).
        input_shape: with the batch, e.g. (1, 3, 224, 224); None for the model's own.
    """

    model: str
    recipe: Recipe
    passes: Sequence[Pass]
    weights: Path | None = None
    input_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Source:
    """A model that was loaded.

    Attributes:
        program: the network.
        weights: the file that its weights came from, if they came from one.
        data: spec of data that belongs to it.
        remarks: what has to be said about its weights, wherever results are shown.
        trained: False if its weights are known to be random.
    """

    program: Program
    weights: Path | None
    data: str | None
    remarks: tuple[str, ...] = ()
    trained: bool = True


class State(Record):
    """`state.json`: what run a directory belongs to, so that only the same run resumes it."""

    fingerprint: dict[str, Any]
    started: str
    baseline: Snapshot


def load_source(
    model: str, weights: Path | None = None, input_shape: tuple[int, ...] | None = None
) -> Source:
    """Load and trace a model.

    Raises:
        LoadError: unknown model, unreadable or unfitting weights, NaN weights, no input shape.
        TraceError: a model that cannot be traced, or an input shape that it does not take.
        VerifyError: weights that no result could be exported with, naming the tensor.
    """
    if is_program_dir(model):
        program = load(model)
        if weights is not None or input_shape is not None:
            raise LoadError(
                f"{model}: found a saved program with --weights or --input-shape, expected neither"
            )
        return _checked(Source(program, None, None))
    loaded = load_model(model)
    weights = weights or loaded.default_weights
    said = load_weights(loaded.module, weights) if weights is not None else loaded.untrained
    shape = input_shape or ((1, *loaded.input_shape) if loaded.input_shape else None)
    if shape is None:
        raise LoadError(f"{model}: found no input shape, expected one; give --input-shape, e.g. 1,3,224,224")
    _check_memory(shape)
    generator = torch.Generator().manual_seed(0)
    program = trace(loaded.module, torch.randn(shape, generator=generator), copy_weights=False)
    untrained = weights is None and loaded.untrained is not None
    return _checked(Source(program, weights, loaded.default_data, (said,) if said else (), not untrained))


def data_of(job: Job, source: Source) -> tuple[str, Data]:
    """The spec of a job's data, and the data: of the recipe's classes only, if it names some.

    Raises:
        DataError: see `open_data` and `Data.only`.
    """
    spec = job.recipe.data or source.data or "random"
    data = open_data(spec, source.program, job.recipe.seed)
    return spec, data if job.recipe.classes is None else data.only(job.recipe.classes)


def digests(data: Data) -> dict[str, str]:
    """Hashes of the samples, by which work on them is recognised (`Split.fingerprint`)."""
    return {"train": data.train.fingerprint(), "eval": data.eval.fingerprint()}


def _checked(source: Source) -> Source:
    verify.check(source.program)
    verify.check_outputs(source.program)
    return source


def _check_memory(shape: Sequence[int]) -> None:
    """A network's activations take a multiple of its input: a size that cannot work is no reason to try."""
    if len(shape) > LARGEST_RANK or max(shape) >= 1 << 31:
        raise LoadError(
            f"--input-shape: found {len(shape)} sizes, the largest {str(max(shape))[:20]}, expected at most "
            f"{LARGEST_RANK} that are no larger than a layer can be; e.g. 1,3,224,224"
        )
    needed, free = 4 * math.prod(shape), psutil.virtual_memory().available
    if SHARE * needed > free:
        raise LoadError(
            f"--input-shape: found {','.join(map(str, shape))}, which takes {needed / 2**30:.3g} GiB for one "
            f"input, expected {SHARE} times less than the {free / 2**30:.3g} GiB of memory that are free"
        )


def _restricted(source: Source, recipe: Recipe) -> Source:
    """The source with a head for the recipe's classes only."""
    assert recipe.classes is not None
    return replace(source, program=restrict_head(source.program, recipe.classes, recipe.head, recipe.seed))


def build(
    job: Job, out: Path, *, resume: bool = False, overwrite: bool = False, progress: Progress = quiet
) -> Report:
    """Run a whole job into `out`.

    Of several processes (see `distributed`) each calls this with the same arguments. Only the first one
    writes into `out`, which all can read.

    Args:
        job: what to do.
        out: output directory.
        resume: go on after the last finished pass of the same job in `out`.
        overwrite: throw away what an earlier run left in `out`.
        progress: told what is going on.

    Raises:
        GraphcompError: see `graphcomp.errors`; nothing half-written is left, finished passes stay resumable.
    """
    with ExitStack() as stack:
        distributed.on_first(lambda: stack.enter_context(locked(out)))
        return _build(job, out, resume, overwrite, progress)


def _build(job: Job, out: Path, resume: bool, overwrite: bool, progress: Progress) -> Report:
    clock, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    job.recipe.require_consistent()
    if resume and overwrite:
        raise RecipeError("resume: found overwrite as well, expected one of them; leave one out")
    target = find_target(job.recipe.target)
    if job.recipe.bench is not False:
        options = job.recipe.bench
        # Fails now rather than after the passes.
        distributed.on_first(partial(_prove, options.provider or target.provider, options.cuda_graphs))
    progress("load the model", 0.0)
    source = load_source(job.model, job.weights, job.input_shape)
    spec, data = data_of(job, source)
    if job.recipe.classes is not None:
        source = _restricted(source, job.recipe)
    if job.recipe.robustness is not False:
        require_images(data.eval, source.program.example_inputs[0].shape[1:])  # fails now, as `probe` does
    threads = job.recipe.bench.threads if job.recipe.bench is not False else 1
    timed = _is_timed_on(target, job.recipe)
    context = Context(target, data, job.recipe.seed, threads=threads, timed=timed)
    check_order(job.passes, source.program, context, trained=source.trained)
    fingerprint = distributed.on_first(lambda: _fingerprint(job, source.program, spec, data, target.name))
    first = distributed.is_first()
    state = distributed.on_first(lambda: _open(out, fingerprint, resume, overwrite))
    if state is None:
        progress("evaluate the baseline", 0.05)
        baseline = context.snapshot(source.program)
        state = State(fingerprint=fingerprint, started=started, baseline=baseline)
        if first:
            write_text(out / "state.json", state.model_dump_json(indent=2))
    done = distributed.on_first(lambda: _finished(out, job.passes))
    program = load(_place(out, len(done) - 1, done[-1].name)) if done else source.program
    share = 0.6 / len(job.passes)
    told = _Scaled(progress, share, len(done), len(job.passes))
    recall = _recall(out)
    known = [Earlier(s.name, partial(recall, i, s.name)) for i, s in enumerate(done)]
    earlier = (held("input", source.program), *known)
    context = replace(context, progress=told, workdir=_running(out), earlier=earlier)
    observers = [_checkpoint(out)] if first else []
    pipeline = Pipeline(job.passes, observers, recall, job.recipe.allows_nothing)
    program, steps = pipeline.run(program, context, done)
    damaged = _robustness(job.recipe, data, (source.program, program), progress)
    exports = context.exports
    run = _Run(job, out, target, spec, data, source, state, program, steps, damaged, exports, clock)
    return distributed.on_first(lambda: _deliver(run, progress))  # measured while the others wait


@dataclass(frozen=True)
class _Run:
    """A run whose passes are done."""

    job: Job
    out: Path
    target: Target
    spec: str
    data: Data
    source: Source
    state: State
    program: Program
    steps: list[Step]
    robustness: Robustness | None
    exports: Exports
    clock: float


def _deliver(run: _Run, progress: Progress) -> Report:
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
    progress("done", 1.0)
    return report


def _report(run: _Run, place: Path, progress: Progress) -> Report:
    """Export into `place`, and time what is there."""
    out, recipe, provider = run.out, run.job.recipe, run.target.provider
    exported = recipe.export
    told = part(progress, 0.74, 0.05, "export the baseline: ")
    base = _export(run.source.program, place / BASE, exported, None, "coefficients", run.exports, told)
    stored: Stored = "dense" if exported.dct == "dense" else "coefficients"
    told = part(progress, 0.79, 0.05, "export the result: ")
    new = _export(run.program, place / MODEL, exported, provider, stored, run.exports, told)
    twice = new.dct is not None and exported.dct == "both"
    told = part(progress, 0.84, 0.01, "export the dense result: ")
    dense = (
        _export(run.program, place / DENSE, exported, provider, "dense", run.exports, told) if twice else None
    )
    span = (0.85, 0.91) if dense else (0.85, 0.97)
    files = place / BASE, place / MODEL
    bench = _bench(recipe, files, provider, out, progress, span)
    explanation = _explain(recipe, bench, files, progress, span[1], run.program)
    dct_bench = (
        _bench(recipe, (place / DENSE, place / MODEL), provider, out, progress, (0.92, 0.99))
        if dense
        else None
    )
    return Report(
        model=run.job.model,
        weights=str(run.source.weights) if run.source.weights else None,
        remarks=list(run.source.remarks),
        data=run.data.description if run.spec != "random" else "random",
        target=run.target.name,
        seed=recipe.seed,
        input_shape=run.job.input_shape,
        recipe=_effective(run.job, run.data.spec, run.target.name),
        baseline=run.state.baseline,
        final=run.steps[-1].after,
        steps=[step.brief() for step in run.steps],
        export=new,
        baseline_export=base,
        dense_export=dense,
        bench=bench,
        dct_bench=dct_bench,
        robustness=run.robustness,
        explanation=explanation,
        environment=environment(),
        started=run.state.started,
        seconds=time.perf_counter() - run.clock,
    )


def _prove(provider: Provider, cuda_graphs: bool) -> None:
    probe(provider, cuda_graphs=cuda_graphs)


def _is_timed_on(target: Target, recipe: Recipe) -> bool:
    """Whether the run measures times where the result is for, and not only somewhere else."""
    return recipe.bench is not False and recipe.bench.provider in (None, target.provider)


class _Scaled:
    """Maps each pass's own progress into its share of the whole."""

    def __init__(self, progress: Progress, share: float, first: int, count: int) -> None:
        self.progress, self.share, self.index, self.count = progress, share, first, count

    def __call__(self, message: str, fraction: float) -> None:
        self.progress(
            f"[{self.index + 1}/{self.count}] {message}", 0.1 + self.share * (self.index + fraction)
        )
        self.index += fraction >= 1.0


def _effective(job: Job, data: str, target: str) -> dict[str, Any]:
    """The recipe as it ran, valid as a recipe file."""
    recipe = job.recipe.model_dump(mode="json", exclude_none=True, exclude={"weights"})
    passes = [{p.name: _plain(options_of(p))} for p in job.passes]
    weights = {"weights": str(job.weights)} if job.weights else {}
    recipe["allow_nothing"] = job.recipe.allows_nothing
    return {**recipe, **weights, "passes": passes, "data": data, "target": target, "model": job.model}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}


def _fingerprint(job: Job, program: Program, spec: str, data: Data, target: str) -> dict[str, Any]:
    return {
        "graphcomp": __version__,
        "model": job.model,
        "weights": program.fingerprint(),
        "input_shape": [list(x.shape) for x in program.example_inputs],
        "passes": [{p.name: options_of(p)} for p in job.passes],
        "data": spec,
        "samples": digests(data),
        "classes": job.recipe.classes,
        "target": target,
        "seed": job.recipe.seed,
    }


# ---------------------------------------------------------------------- the output directory

MODEL, DENSE, BASE = "model.onnx", "model-dense.onnx", "baseline.onnx"
RESULTS = (BASE, DENSE, MODEL, "program", "report.html", "report.json")
"""What is for the reader, and stays until its successor takes its place."""
WORK = ("state.json", "plans", "checkpoints")
"""What a run is resumed from."""
OWN = frozenset({*RESULTS, *WORK, "entries"})


def _open(out: Path, fingerprint: dict[str, Any], resume: bool, overwrite: bool) -> State | None:
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
    foreign = [n for n in present if n not in OWN and unfinished(n) not in OWN]
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


def _checkpoint(out: Path) -> Callable[[Step, Program], None]:
    """Save each result; the step's record comes last and makes the checkpoint count."""

    def saved(step: Step, program: Program) -> None:
        place = _place(out, step.index, step.name)
        write_text(out / step.plan_file, step.plan.model_dump_json(indent=2))
        save(program, place)
        write_text(place.with_suffix(".json"), step.brief().model_dump_json(indent=2))
        shutil.rmtree(_running(out), ignore_errors=True)

    return saved


def _recall(out: Path) -> Callable[[int, str], Program]:
    """Read a checkpoint back: what later passes learn from."""

    def recalled(index: int, name: str) -> Program:
        distributed.on_first(lambda: None)  # not before the first process has written it
        return load(_place(out, index, name))

    return recalled


def _running(out: Path) -> Path:
    """Where a pass that takes long keeps its state until it is finished."""
    return out / "checkpoints" / "running"


def _place(out: Path, index: int, name: str) -> Path:
    return out / "checkpoints" / work_name(index, name)


def _finished(out: Path, passes: Sequence[Pass]) -> list[Step]:
    """Steps that an interrupted run finished."""
    steps: list[Step] = []
    for index, pass_ in enumerate(passes):
        record = _place(out, index, pass_.name).with_suffix(".json")
        if not record.exists():
            break
        steps.append(read_record(record, Step, "a step's record; use --overwrite"))
    return steps


def _export(
    program: Program,
    path: Path,
    options: ExportOptions,
    provider: Provider | None = None,
    dct: Stored = "coefficients",
    known: Exports | None = None,
    told: Progress = quiet,
) -> Export:
    batches = (1, 2, 5) if options.dynamic_batch else (1,)
    record = export_onnx(
        program,
        path,
        opset=options.opset,
        batches=batches,
        tolerance=options.tolerance,
        dynamic_batch=options.dynamic_batch,
        provider=provider,
        dct=dct,
        known=known,
        progress=told,
    )
    return record.model_copy(update={"path": path.name})


def _bench(
    recipe: Recipe,
    files: tuple[Path, Path],
    provider: Provider,
    out: Path,
    progress: Progress,
    span: tuple[float, float],
) -> Bench | None:
    """Time two files, which will lie in `out`."""
    if recipe.bench is False:
        return None
    options = recipe.bench

    def tell(message: str, fraction: float) -> None:
        progress(f"benchmark: {message}", span[0] + (span[1] - span[0]) * fraction)

    found = benchmark(
        *files,
        provider=options.provider or provider,
        batches=options.batches,
        threads=options.threads,
        runs=options.runs,
        seconds=options.seconds,
        cuda_graphs=options.cuda_graphs,
        progress=tell,
    )
    base, new = (f.model_copy(update={"path": str(out / Path(f.path).name)}) for f in (found.base, found.new))
    return found.model_copy(update={"base": base, "new": new})


def _robustness(
    recipe: Recipe, data: Data, programs: tuple[Program, Program], progress: Progress
) -> Robustness | None:
    """Scores of baseline and result on damaged images, if they are asked for; collective."""
    if recipe.robustness is False:
        return None
    corruptions = recipe.robustness.corruptions()

    def tell(message: str, _: float) -> None:
        progress(message, 0.7)

    baseline, final = (
        robustness(program, data.eval, corruptions, seed=recipe.seed, progress=tell) for program in programs
    )
    return Robustness(baseline=baseline, final=final)


def evaluate_source(
    source: Source,
    data: Data,
    *,
    model: str,
    corruptions: Sequence[Corruption] = (),
    seed: int = 0,
    progress: Progress = quiet,
) -> Evaluation:
    """What a model costs and how good it is, on damaged images too if `corruptions` are given.

    Raises:
        DataError: labels that do not belong to the network; no labels to score damaged images by.
    """
    progress("evaluate", 0.1)
    found = Context(find_target("auto"), data, seed).snapshot(source.program)
    scores: list[CorruptedScore] = []
    if corruptions:
        scores = robustness(source.program, data.eval, corruptions, seed=seed, progress=progress)
    return Evaluation(
        model=model,
        weights=str(source.weights) if source.weights else None,
        remarks=list(source.remarks),
        data=data.description,
        seed=seed,
        snapshot=found,
        robustness=scores,
    )


def _explain(
    recipe: Recipe,
    bench: Bench | None,
    files: tuple[Path, Path],
    progress: Progress,
    at: float,
    program: Program,
) -> Explanation | None:
    """On CPUs; on GPUs it depends on the runtime's build whether it tells how long its operators take."""
    if recipe.bench is False or bench is None or bench.provider != "cpu":
        return None
    return explain_bench(
        bench,
        files,
        traced_runs=min(recipe.bench.runs, TRACED_RUNS),
        traced_seconds=min(recipe.bench.seconds, TRACED_SECONDS),
        progress=lambda what, fraction: progress(f"explain: {what}", at),
        program=program,
    )


# ---------------------------------------------------------------------- without a directory


@dataclass(frozen=True)
class Compiled:
    """Result of `graphcomp.compile`: the program, and a record a pass."""

    program: Program
    steps: list[Step]


def compile_program(
    program: Program,
    passes: Sequence[Pass],
    *,
    data: Data | None = None,
    target: str = "auto",
    seed: int = 0,
    allow_nothing: bool = False,
) -> Compiled:
    """Run passes on a program in memory; every one is verified.

    Raises:
        RecipeError: no passes, or an unknown target.
        DataError: a number of classes that is not that of a classifier's outputs.
        PassError: naming the pass, the ones before it and the reason (its cause); `program` is untouched.
            Or no pass changed anything, unless `allow_nothing`.
    """
    if not passes:
        raise RecipeError("passes: found none, expected at least one")
    if data is not None:
        require_classes(program, data)
    context = Context(find_target(target), data, seed)
    check_order(passes, program, context)
    result, steps = Pipeline(passes, allow_nothing=allow_nothing).run(program, context)
    return Compiled(result, steps)


def need_data(spec: str | None, program: Program, seed: int) -> Data | None:
    """Load a data spec for a program."""
    return None if spec is None else open_data(spec, program, seed)


def open_data(spec: str, program: Program, seed: int) -> Data:
    """The data that `spec` names, for this program: of its input shape, and with as many classes as outputs.

    Raises:
        DataError: see `data.sources`; or a number of classes that is not that of a classifier's outputs.
    """
    if not program.example_inputs:
        raise DataError("the program has no inputs, expected one")
    outputs = count_outputs(program)
    shape = tuple(program.example_inputs[0].shape[1:])
    numbers = numbers_of(program)[0]
    data = load_data(spec, input_shape=shape, seed=seed, outputs=outputs, numbers=numbers)
    require_classes(program, data)
    return data
