"""Why a network is not as much faster as it is smaller: theory against practice, operator by operator.

Theory says `T_base r` with r = MACs_new / MACs_base; practice says `T_new`: both measured by
`runtime.bench`, without a trace. The gap `T_new - r T_base` is split with the times of operators from two
traces of other runs (`explanation.profiling`), matched between the files by module (`attribution`). A
layer that was factored is the group of its factors. Below, t is an operator's time, m its MACs, c the MACs it
carries out: whole blocks of channels included. Every part is a difference that begins where the one before
it ended:

- **theory** of a convolution or matrix product: `t_base m_new / m_base`. Of any other operator, which has no
  MACs: t_base by the ratio of elements that it reads and writes. 0 for what the base does not have, except
  for a multiplication without a counterpart: its MACs at the average rate of the base.
- **padding**: `t_base (c_new / c_base - m_new / m_base)`: blocks that are partly filled, at the base's rate.
- **kernel**: `t_new - t_base c_new / c_base` where the operator computes in another way than in the base
  (blocked -> plain: the runtime leaves its blocked layout, and multiplies images made of columns).
- **intensity**: the same difference where it computes in the same way. Fewer operations for each byte that
  moves, and fixed costs of an operator: what is left when work shrinks and nothing else changes.
- **fusion**: the time of operators that run by themselves but are computed inside of another one in the base
  or do not occur there; less the theory of those that stood alone in the base and are fused now.
- **layout**: `t_new - theory` of operators that compute nothing: Reorder, Pad, Gather, Slice, Transpose, and
  convolutions that only pick channels (`onnx.selection`; called Select), whatever they multiply.
- **mix**: the sum of theories less r times the sum of base times. It is there without any fault of the new
  network: the time of the base is not spread like its MACs, so that removing half of them never was half of
  the time.
- **host**: what is left: `(T_new - sum t_new) - r (T_base - sum t_base)`. Time between operators does not
  shrink with MACs. This part closes the sum: whatever the traces get wrong ends in it, too, so it is shown by
  itself, beside the times outside of operators that it comes from (`TracedFile`).

Operators cannot take longer together than the run that they are part of. Where they seem to in one of the
files, tracing costs more there than it does on the chain that its cost was measured on: that cost is raised,
for all operators of both files alike, as far as needed and to twice as much at most. Nothing else is scaled.

All but *host* and *mix* is known by operator and pass. The parts sum to the gap exactly; the interval of the
gap is that of the speedup. TensorRT runs a network as one operator: there is nothing to split, and it is
refused.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from graphcomp.base import Progress, quiet
from graphcomp.explanation.attribution import ROUNDED, AttributedKernel, attribute
from graphcomp.explanation.gathers import ChannelPick, find_gathers, price
from graphcomp.explanation.matching import Matching
from graphcomp.explanation.profiling import Profile, trace_pair
from graphcomp.explanation.quantised import is_quantised, origins_by_tensor
from graphcomp.ir import Program, Shape
from graphcomp.onnx import NODE_PROP, Origin, origins_in
from graphcomp.records import (
    BatchTiming,
    Bench,
    ExplainedRow,
    Explanation,
    Interval,
    Part,
    PartKind,
    TracedFile,
)
from graphcomp.runtime import TARGETS, OnnxFile, Provider, benchmark, check_inputs, onnxfile, random_inputs

KINDS: tuple[PartKind, ...] = get_args(PartKind)

TRACED_RUNS, TRACED_SECONDS = 100, 5.0
TIMED_SHARE = 0.65
"""Of the progress; tracing has the rest."""


def explain(
    base: str | Path,
    new: str | Path,
    *,
    provider: Provider = "cpu",
    batch: int = 1,
    threads: int = 1,
    runs: int = 200,
    seconds: float = 10.0,
    traced_runs: int = TRACED_RUNS,
    traced_seconds: float = TRACED_SECONDS,
    seed: int = 0,
    input_shapes: Mapping[str, Shape] | None = None,
    progress: Progress = quiet,
) -> Explanation:
    """Time two ONNX files against each other, trace both, and split the gap between theory and practice.

    Args:
        base, new: files that take the same inputs; with the metadata of `export_onnx`, parts have passes.
        provider, threads: where.
        batch: samples a run.
        runs, seconds: of the benchmark, see `runtime.bench.benchmark`.
        traced_runs, traced_seconds: of the traces, see `explanation.profiling.trace_pair`.
        seed: of the inputs.
        input_shapes: of files that leave more than the batch open, see `runtime.bench.benchmark`.
        progress: told what is going on.

    Raises:
        BenchError: a file cannot be read, the two differ in their inputs or have no layer in common, or a
            trace does not say where time went. ProviderError: the provider does not work here.
        LoadError: one file is another exporter's, the other is ours, and `onnx.read_onnx` refuses the first.
    """
    bench = benchmark(
        base,
        new,
        provider=provider,
        batches=(batch,),
        threads=threads,
        runs=runs,
        seconds=seconds,
        seed=seed,
        input_shapes=input_shapes,
        progress=lambda what, fraction: progress(what, TIMED_SHARE * fraction),
    )
    found = explain_bench(
        bench,
        (Path(base), Path(new)),
        traced_runs=traced_runs,
        traced_seconds=traced_seconds,
        seed=seed,
        input_shapes=input_shapes,
        progress=lambda what, fraction: progress(what, TIMED_SHARE + (1 - TIMED_SHARE) * fraction),
    )
    return found.model_copy(update={"bench": bench})


def explain_bench(
    bench: Bench,
    files: tuple[Path, Path],
    *,
    traced_runs: int = TRACED_RUNS,
    traced_seconds: float = TRACED_SECONDS,
    seed: int = 0,
    input_shapes: Mapping[str, Shape] | None = None,
    progress: Progress = quiet,
    program: Program | None = None,
) -> Explanation:
    """`explain` for files that were timed before, at the first batch size of that benchmark.

    With the `program` that the second file was exported from, it also says what picking channels costs.
    """
    read = onnxfile.read(files[0], input_shapes), onnxfile.read(files[1], input_shapes)
    check_inputs(*read)
    provider, timing = cast(Provider, bench.provider), bench.batches[0]
    feeds = random_inputs(read[0], timing.batch, seed)
    profiles = trace_pair(
        read, feeds, provider, bench.threads, runs=traced_runs, seconds=traced_seconds, tell=progress
    )
    multiple = TARGETS["cuda-tf32"].multiple if bench.tf32 else 1
    base, new = (
        attribute(f, p, timing.batch, multiple, o)
        for f, p, o in zip(read, profiles, _origins(read, input_shapes), strict=True)
    )
    return split(bench, timing, (base, new), profiles, find_gathers(program) if program else [])


def _origins(
    files: tuple[OnnxFile, OnnxFile], input_shapes: Mapping[str, Shape] | None
) -> tuple[Mapping[str, Origin], Mapping[str, Origin]]:
    """A file of another exporter beside one of ours is read as a run reads it, which names its layers.

    Beside a file in 8 bits, tensors of one name tell more, whoever wrote the two.
    """
    tagged = [any(p.key == NODE_PROP for n in f.model.graph.node for p in n.metadata_props) for f in files]
    if not all(tagged) and any(is_quantised(f.model) for f in files):
        here, there = (f.model for f in files)
        pair = origins_by_tensor(here, there), origins_by_tensor(there, here)
        if all(pair):
            # One of them names the layers of both: the one that says more of itself.
            return ({}, pair[1]) if tagged[0] or not tagged[1] else (pair[0], {})
    first, second = (
        origins_in(f.path, input_shapes) if any(tagged) and not has_tags else {}
        for f, has_tags in zip(files, tagged, strict=True)
    )
    return first, second


def split(
    bench: Bench,
    timing: BatchTiming,
    kernels: tuple[Sequence[AttributedKernel], Sequence[AttributedKernel]],
    profiles: tuple[Profile, Profile],
    picked: Sequence[ChannelPick] = (),
) -> Explanation:
    """The gap of a benchmark's row in its parts.

    Args:
        bench, timing: one row of a benchmark.
        kernels: operators of base and candidate.
        profiles: that they come from.
        picked: selections of the candidate's program.

    Raises:
        BenchError: if the two have no layer in common.
    """
    measured, speedup = timing.quoted_ms, timing.quoted
    extra = _more_cost(measured, kernels, profiles)
    kernels = _without(kernels[0], extra), _without(kernels[1], extra)
    base, new = (
        TracedFile(
            measured_ms=ms,
            operators_ms=sum(k.ms for k in side),
            trace_cost_ms=profile.cost_ms + extra,
            traced_run_ms=profile.run_ms,
            runs=profile.runs,
            operators=len(side),
            busy=profile.busy,
        )
        for ms, side, profile in zip(measured, kernels, profiles, strict=True)
    )
    rows = Matching(*kernels).rows()
    share = 1 / timing.theoretical
    outside = [side.measured_ms - side.operators_ms for side in (base, new)]
    whole = {
        "mix": sum(row.theory_ms for row in rows) - share * base.operators_ms,
        "host": outside[1] - share * outside[0],
    }
    return Explanation(
        provider=bench.provider,
        threads=bench.threads,
        batch=timing.batch,
        clock="CPU" if timing.busy else "wall",
        theoretical=timing.theoretical,
        speedup=speedup,
        theory_ms=share * base.measured_ms,
        gap=Interval(
            value=new.measured_ms - share * base.measured_ms,
            low=new.measured_ms * (1 - share * speedup.high),
            high=new.measured_ms * (1 - share * speedup.low),
        ),
        base=base,
        new=new,
        parts=[_part(kind, rows, whole.get(kind)) for kind in KINDS],
        rows=rows,
        gathers=price(picked, kernels[1], measured[1]),
    )


def _more_cost(
    measured: Sequence[float],
    kernels: tuple[Sequence[AttributedKernel], Sequence[AttributedKernel]],
    profiles: tuple[Profile, Profile],
) -> float:
    """Milliseconds an operator that tracing costs beyond what was measured on the chain."""
    excess = ((sum(k.ms for k in side) - ms) / len(side) for ms, side in zip(measured, kernels, strict=True))
    return min(max(0.0, *excess), profiles[0].cost_ms)


def _without(kernels: Sequence[AttributedKernel], extra: float) -> list[AttributedKernel]:
    return [replace(k, operator=replace(k.operator, ms=max(0.0, k.operator.ms - extra))) for k in kernels]


def _part(kind: PartKind, rows: Iterable[ExplainedRow], whole: float | None) -> Part:
    by_pass: dict[str, float] = defaultdict(float)
    if whole is not None:
        by_pass[""] = whole
    for row in rows:
        if kind in row.parts:
            by_pass[_pass_of(row, kind)] += row.parts[kind]
    return Part(kind=kind, ms=sum(by_pass.values()), by_pass=dict(by_pass))


def _pass_of(row: ExplainedRow, kind: PartKind) -> str:
    """A layer that became 8 bits was last changed, as a layer, by another pass; its width is that one's."""
    rounded = ROUNDED in row.new_form and ROUNDED not in row.base_form
    return "quantize" if rounded and kind != "padding" else row.made_by or ""
