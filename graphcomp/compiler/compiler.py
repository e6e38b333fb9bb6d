"""From a model and a recipe to a directory that can be deployed, checked and resumed.

    OUT/model.onnx       the compressed network            OUT/program/      the same, for PyTorch
    OUT/baseline.onnx    the original, what it is timed against
    OUT/model-dense.onnx the result again, if model.onnx stores weights as DCT coefficients: larger, portable
    OUT/model-int8.onnx  the result in 8 bits, if the recipe ends with `quantize` and that is faster
    OUT/plans/           what each pass decided            OUT/report.json, report.html
    OUT/checkpoints/     program and record after each pass; OUT/state.json says of what run they are

Every file appears whole or not at all; after an interruption the last finished pass is the place to resume.
Results of an earlier run stay until those of this one are all there. One run at a time works in a directory.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from graphcomp.base import Progress, distributed, locked, quiet, write_record
from graphcomp.bases import options_of
from graphcomp.compiler.class_names import with_class_names, without_class_names
from graphcomp.compiler.folder import (
    State,
    checkpointing,
    finished_steps,
    open_folder,
    place_of,
    recalling,
    running_place,
)
from graphcomp.compiler.recipe import BenchOptions, Recipe
from graphcomp.compiler.results import Run, deliver, runtimes
from graphcomp.compiler.source import (
    Job,
    Source,
    data_of,
    digests,
    load_source,
    restricted,
)
from graphcomp.data import Data
from graphcomp.errors import RecipeError
from graphcomp.ir import Program, load
from graphcomp.measure import Corruption, require_classes, require_images, require_inputs, robustness
from graphcomp.pipeline import Context, Earlier, Pass, Pipeline, check_order, exporting, held
from graphcomp.records import CorruptedScore, Evaluation, Report, Robustness, Step
from graphcomp.runtime import Target, find_target, probe
from graphcomp.version import __version__


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
    target = find_target(job.recipe.target, eight_bits=exporting(job.passes) is not None)
    if job.recipe.bench is not False:
        # Fails now rather than after the passes.
        distributed.on_first(partial(_prove, job.recipe.bench, target))
    progress("load the model", 0.0)
    source = load_source(job.model, job.weights, job.input_shape, job.recipe.region, job.recipe.arguments)
    spec, data, classes = data_of(job, source)
    if classes is not None:
        source = restricted(source, classes, job.recipe)
    if job.recipe.export.class_names is not None:
        source = with_class_names(source, Path(job.recipe.export.class_names), classes)
    elif classes is not None:
        source = without_class_names(source)
    if job.recipe.robustness is not False:
        require_images(data.eval, source.program)  # fails now, as `probe` does
    threads = job.recipe.bench.threads if job.recipe.bench is not False else 1
    timed = _is_timed_on(target, job.recipe)
    context = Context(target, data, job.recipe.seed, threads=threads, timed=timed).holding(job.recipe.budget)
    check_order(job.passes, source.program, context, trained=source.trained)
    fingerprint = distributed.on_first(
        lambda: _fingerprint(job, source.program, spec, data, classes, target.name)
    )
    first = distributed.is_first()
    state = distributed.on_first(lambda: open_folder(out, fingerprint, resume, overwrite))
    if state is None:
        progress("evaluate the baseline", 0.05)
        baseline = context.snapshot(source.program)
        state = State(fingerprint=fingerprint, started=started, baseline=baseline)
        if first:
            write_record(out / "state.json", state)
    done = distributed.on_first(lambda: finished_steps(out, job.passes))
    program = load(place_of(out, len(done) - 1, done[-1].name)) if done else source.program
    share = 0.6 / len(job.passes)
    told = _Scaled(progress, share, len(done), len(job.passes))
    recall = recalling(out)
    known = [Earlier(s.name, partial(recall, i, s.name)) for i, s in enumerate(done)]
    earlier = (held("input", source.program), *known)
    context = replace(context, progress=told, workdir=running_place(out), earlier=earlier)
    observers = [checkpointing(out)] if first else []
    pipeline = Pipeline(job.passes, observers, recall, job.recipe.allows_nothing)
    program, steps = pipeline.run(program, context, done)
    damaged = _robustness(job.recipe, data, (source.program, program), progress)
    run = Run(job, out, spec, data, source, state, program, steps, damaged, context, clock)
    return distributed.on_first(lambda: deliver(run, progress))  # measured while the others wait


def _prove(options: BenchOptions, target: Target) -> None:
    for provider, cuda_graphs, precision in runtimes(options, target):
        probe(provider, cuda_graphs=cuda_graphs, precision=precision)


def _is_timed_on(target: Target, recipe: Recipe) -> bool:
    """Whether the run measures times where the result is for, and not only somewhere else."""
    return recipe.bench is not False and target.provider in (recipe.bench.provider or (target.provider,))


class _Scaled:
    """Maps each pass's own progress into its share of the whole."""

    def __init__(self, progress: Progress, share: float, first: int, count: int) -> None:
        self.progress, self.share, self.index, self.count = progress, share, first, count

    def __call__(self, message: str, fraction: float) -> None:
        self.progress(
            f"[{self.index + 1}/{self.count}] {message}", 0.1 + self.share * (self.index + fraction)
        )
        self.index += fraction >= 1.0


def _fingerprint(
    job: Job, program: Program, spec: str, data: Data, classes: Sequence[int] | None, target: str
) -> dict[str, Any]:
    return {
        "graphcomp": __version__,
        "model": job.model,
        "weights": program.fingerprint(),
        "input_shape": [list(x.shape) for x in program.example_inputs],
        "interface": program.interface.model_dump(mode="json", exclude_defaults=True),
        "passes": [{p.name: options_of(p)} for p in job.passes],
        "data": spec,
        "samples": digests(data),
        "classes": classes,
        "target": target,
        "seed": job.recipe.seed,
    }


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
        RecipeError: no passes, one that is carried out on a file, or an unknown target.
        DataError: samples that are not for this network's inputs, or a number of classes that is not that of
            a classifier's outputs.
        PassError: naming the pass, the ones before it and the reason (its cause); `program` is untouched.
            Or no pass changed anything, unless `allow_nothing`.
    """
    if not passes:
        raise RecipeError("passes: found none, expected at least one")
    written = exporting(passes)
    if written is not None:
        raise RecipeError(
            f"passes: found {written.name}, which is carried out on an exported file, expected passes on a "
            "program; leave it out and give the exported file to quantize_onnx, or use build"
        )
    if data is not None:
        require_inputs(program, data)
        require_classes(program, data)
    context = Context(find_target(target), data, seed)
    check_order(passes, program, context)
    result, steps = Pipeline(passes, allow_nothing=allow_nothing).run(program, context)
    return Compiled(result, steps)
