"""What a report says: its numbers as text, its sentences, its rows; nothing that the record does not hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphcomp.records import BatchTiming, Bench, CorruptedScore, Interval, ModelFile, Report, Score
from graphcomp.report.scores import (
    TOP5,
    Verdict,
    change,
    judge,
    judge_speed,
    measure_of,
    score_text,
    share_text,
    value_text,
)


def count_text(value: int) -> str:
    """`1,234`."""
    return f"{value:,}"


def short_text(value: float) -> str:
    """`1.23 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # 999,999 is 1 M, not 1e+03 k
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def bytes_text(value: int) -> str:
    """`1.23 MB`."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value} B"


def percent_text(before: float, after: float) -> str:
    """`-12.3 %`; says so if nothing changed."""
    if before == after:
        return "unchanged"
    return f"{100 * (after - before) / before:+.1f} %" if before else "was nothing"


def ratio_text(value: float) -> str:
    """`1.23x`."""
    return f"{value:.2f}x"


def ms_text(value: float) -> str:
    """`1.234 ms`."""
    decimals = 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:.{decimals}f} ms"


def error_text(value: float) -> str:
    """Two digits."""
    return f"{value:.2g}"


def interval_text(interval: Interval) -> str:
    """`1.23x [1.20, 1.26]`."""
    return f"{interval.value:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def points_text(before: Score | None, after: Score | None) -> str:
    """`+0.12 points`, of errors per cent; empty if they do not compare."""
    if before is None or after is None or before.measure != after.measure:
        return ""
    if after.measure == "error":
        return percent_text(before.value, after.value)
    return f"{100 * (after.value - before.value):+.2f} points"


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; `theory` is what the MAC ratio promises, where that applies."""

    label: str
    before: str
    after: str
    change: str
    theory: str = ""


@dataclass(frozen=True)
class KeptGroup:
    """Everything that was left alone for one reason, as (step, place)."""

    reason: str
    places: tuple[tuple[str, str], ...]


def describe_timing(
    timing: BatchTiming, before: Score | None = None, after: Score | None = None, where: str = ""
) -> tuple[str, Verdict]:
    """One plain sentence: what was measured at this batch size, beside what the MACs promised and what it
    cost in accuracy; and how good both together are. `where`: the runtime, where it has to be told.
    """
    speedup, theory = timing.quoted, timing.theoretical
    said, verdict = judge_speed(timing, before, after)
    spread = f"95 % interval of the speedup {speedup.low:.2f} to {speedup.high:.2f}"
    if timing.verdict.startswith("faster") and 0 < theory < math.inf:
        promise = f"realised {100 * speedup.value / theory:.0f} % of the theoretical {ratio_text(theory)}"
    else:
        promise = f"theory says {ratio_text(theory)}"
    return f"Batch {timing.batch}{where}: {said} ({spread}); {promise}.", verdict


def comparison(report: Report) -> list[Row]:
    """The before/after table: parameters, MACs, accuracy, file size and a row for each batch size timed."""
    old, new = report.baseline, report.final
    files = (report.baseline_export.bytes, report.export.bytes)
    before, after = old.score, new.score
    rows = [
        _count_row("Trainable params", old.params_trainable, new.params_trainable),
        _count_row("Params + buffers", old.params_state, new.params_state),
        _count_row("MACs per sample", old.macs, new.macs),
        Row(measure_of(before), score_text(before), score_text(after), points_text(before, after)),
        *_top5_row(before, after),
        Row("ONNX file", bytes_text(files[0]), bytes_text(files[1]), percent_text(*files)),
    ]
    if report.dense_export:
        dense = report.dense_export.bytes
        rows.append(
            Row(
                "  with dense weights", bytes_text(files[0]), bytes_text(dense), percent_text(files[0], dense)
            )
        )
    benches = report.benches
    return rows + [_time_row(t, where_text(b, benches)) for b in benches for t in b.batches]


def where_text(bench: Bench, benches: Sequence[Bench]) -> str:
    """`, openvino`, where it is not ONNX Runtime on the CPU alone that was asked for."""
    return "" if len(benches) == 1 and bench.provider == "cpu" else f", {bench.runtime}"


def _top5_row(before: Score | None, after: Score | None) -> list[Row]:
    """Nothing where one of them has no top-5."""
    if before is None or after is None or before.top5 is None or after.top5 is None:
        return []
    change = f"{100 * (after.top5 - before.top5):+.2f} points"
    return [Row(TOP5, share_text(before.top5), share_text(after.top5), change)]


def _count_row(label: str, before: int, after: int) -> Row:
    return Row(label, count_text(before), count_text(after), percent_text(before, after))


def _time_row(timing: BatchTiming, where: str) -> Row:
    clock = "CPU time" if timing.busy else "Time"
    times, change = timing.quoted_ms, interval_text(timing.quoted)
    return Row(
        f"{clock}, batch {timing.batch}{where}",
        ms_text(times[0]),
        ms_text(times[1]),
        change,
        ratio_text(timing.theoretical),
    )


@dataclass(frozen=True)
class RobustnessRow:
    """One kind of damage: how good baseline and result are on images that were damaged so."""

    label: str
    before: Score
    after: Score


def robustness_rows(report: Report) -> list[RobustnessRow]:
    """Undamaged images first; nothing if it was not asked for."""
    found, old, new = report.robustness, report.baseline.score, report.final.score
    if found is None or old is None or new is None:
        return []
    rows = [RobustnessRow("none", old, new)]
    for before, after in zip(found.baseline, found.final, strict=True):
        rows.append(RobustnessRow(damage_text(before), before.score, after.score))
    return rows


def damage_text(row: CorruptedScore) -> str:
    """What was done to images."""
    said = {
        "motion-blur": f"motion blur, {100 * row.amount:g} % of the side",
        "occlusion": f"occlusion, {100 * row.amount:g} % of the area",
        "brightness": f"brightness x {row.amount:g}",
    }
    return said.get(row.corruption, f"{row.corruption} {row.amount:g}")


def headlines(report: Report) -> list[tuple[str, Verdict]]:
    """What was measured, a sentence a batch size, with how good that is; says so if nothing was."""
    before, after = report.baseline.score, report.final.score
    if report.bench is None or not report.bench.batches:
        said, verdict = judge(None, before, after)
        measured = f"{said[0].upper()}{said[1:]}."
        return [(f"{measured} MACs are not time: nothing here says that the result is faster.", verdict)]
    benches = report.benches
    return [describe_timing(t, before, after, where_text(b, benches)) for b in benches for t in b.batches]


def describe_loss(report: Report) -> list[str]:
    """What would repair a score that fell and that nothing repaired; nothing otherwise."""
    lost = report.final.score
    if lost is None or change(report.baseline.score, lost) != "lost":
        return []
    repairs = [step for step in report.steps if step.learned is not None or step.start]
    changed = [step for step in report.steps if step.drift is not None and step not in repairs]
    if not changed or (repairs and repairs[-1].index > changed[-1].index):
        return []
    by = points_text(report.baseline.score, lost).lstrip("+-")
    fell = f"Accuracy fell by {by}" if lost.higher_is_better else f"The error grew by {by}"
    place = " (in front of fold-bn)" if any(step.name == "fold-bn" for step in report.steps) else ""
    return [
        f"{fell}, and nothing behind {changed[-1].name} repairs it: add refit, which needs neither labels "
        f"nor training, or train on with finetune{place}, or both."
    ]


def describe_half(report: Report) -> list[str]:
    """What storing weights as float16 gains; nothing where they are stored as they are."""
    half = report.export.half
    if half is None:
        return []
    error = max(report.export.parity.values(), default=0.0)
    said = (
        f"{half.tensors} weights are stored as float16 and cast back when the file is loaded: "
        f"{bytes_text(half.float16_bytes)} for {bytes_text(half.float32_bytes)}, outputs at most "
        f"{error_text(error)} of their largest value off."
    )
    kept = ", ".join(f"{name} ({why})" for name, why in list(half.kept.items())[:3])
    return [f"{said} In float32: {kept}." if kept else said]


def describe_dct(report: Report) -> list[str]:
    """What storing DCT coefficients gains and what it does not; nothing for a result without DCT layers."""
    stored, dense = report.export.dct, report.dense_export
    if stored is None:
        return []
    layers = f"{stored.layers} layer{'s' if stored.layers != 1 else ''}"
    if stored.stored == "dense":
        return [f"The weights of {layers} with DCT coefficients are stored dense: the file gains nothing."]
    size = f"The weights of {layers} are stored as DCT coefficients: {bytes_text(report.export.bytes)}"
    size += f", with dense weights {bytes_text(dense.bytes)}" if dense else ""
    speed = "The gain is size, not speed: the weights are rebuilt when the file is loaded"
    if report.dct_bench is None:
        return [f"{size}. {speed}."]
    old, new = report.dct_bench.base, report.dct_bench.new
    times = (f"batch {t.batch}: {interval_text(t.quoted)}" for t in report.dct_bench.batches)
    return [
        f"{size}. {speed} ({_load(new)}; dense: {_load(old)}). Then it runs at this multiple of the dense "
        f"file's speed: {'; '.join(times)}."
    ]


def _load(file: ModelFile) -> str:
    if file.load_cpu_seconds is None:
        return f"{file.load_seconds:.2f} s"
    return f"{file.load_seconds:.2f} s with {file.load_cpu_seconds:.2f} s of CPU time"


def group_kept(report: Report) -> list[KeptGroup]:
    """What every pass left alone, by reason, the most frequent reason first."""
    places: dict[str, list[tuple[str, str]]] = {}
    for step in report.steps:
        for kept in step.plan.kept:
            places.setdefault(kept.reason, []).append((f"{step.index + 1} {step.name}", kept.where))
    groups = [KeptGroup(reason, tuple(where)) for reason, where in places.items()]
    return sorted(groups, key=lambda group: -len(group.places))


def notes(report: Report) -> list[str]:
    """What a careful reader should know before quoting a number of this report."""
    remarks = [sentence(remark) for remark in report.remarks]
    return [*remarks, *_size_notes(report), *_accuracy_notes(report), *_timing_notes(report)]


def sentence(remark: str) -> str:
    """A remark as one."""
    return f"{remark[0].upper()}{remark[1:]}."


def _size_notes(report: Report) -> list[str]:
    old, new = report.baseline, report.final
    found = [
        "MACs count convolutions, linear layers and matrix products; bias, normalisation, activation and "
        "pooling cost time but no MACs. The theoretical speedup is the ratio of MACs, nothing more."
    ]
    if (old.params_state, old.macs) == (new.params_state, new.macs):
        found.append("Nothing became smaller: parameters and MACs are what they were.")
    return found


def _accuracy_notes(report: Report) -> list[str]:
    old, new = report.baseline.score, report.final.score
    if old is None or new is None:
        return [why_no_accuracy(report)]
    what, kind = (
        ("The mean absolute error is", "normal")
        if new.measure == "error"
        else ("Accuracy is top-1", "Wilson")
    )
    found = [
        f"{what} on {count_text(new.samples)} samples of {report.data} with a 95 % {kind} interval; "
        "it holds for data like these and says nothing about others."
    ]
    if value_text(old) != value_text(new) and change(old, new) == "kept":
        found.append(
            "What was measured after lies within the interval before: the difference may be chance. "
            "More evaluation samples would tell."
        )
    if report.robustness:
        found.append(
            "Baseline and result saw the same damaged images. How strong the damage is was chosen: compare "
            "within a row."
        )
    return found


def why_no_accuracy(report: Report) -> str:
    """Why there is no score."""
    drifts = [step.drift for step in report.steps if step.drift]
    if report.data.partition(":")[0] == "random":
        reason = "the data are random and have no labels"
    elif drifts and all(drift.top1_agreement is None for drift in drifts):
        reason = "the outputs are not those of a classifier"
    else:
        reason = f"the data ({report.data}) gave no labels to compare with"
    return f"Accuracy was not measured: {reason}. The drift of each step is all that is known of its loss."


def _timing_notes(report: Report) -> list[str]:
    if report.bench is None or not report.bench.batches:
        return ["Time was not measured."]
    found = [
        "Time is that of the two exported ONNX files in one process, interleaved; the speedup is the ratio "
        "of medians with a bootstrap 95 % interval. It holds for this machine, runtime and thread count."
    ]
    benches = report.benches
    if busy := [f"{t.batch}{where_text(b, benches)}" for b in benches for t in b.batches if t.busy]:
        found.append(
            f"The machine was busy at batch {', '.join(busy)}: wall time exceeded CPU time by over 10 %. "
            "There the speedup is quoted in CPU time."
        )
    if copies := report.bench.new.memcpy_nodes:
        found.append(f"The result copies between host and device inside the graph ({copies} Memcpy nodes).")
    if any(bench.environment != report.environment for bench in benches):
        found.append("Time was measured in another environment than the rest; see the table of timings.")
    return found
