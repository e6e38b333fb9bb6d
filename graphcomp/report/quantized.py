"""What the pass `quantize` came to, in words: which file to ship, what that costs and what was checked."""

from dataclasses import dataclass

from graphcomp.errors import some_of
from graphcomp.records import BatchTiming, Quantized, Report
from graphcomp.report.words import (
    Row,
    bytes_text,
    interval_text,
    ms_text,
    percent_text,
    ratio_text,
    where_text,
)


@dataclass(frozen=True)
class QuantizedRow:
    """One layer: its name, dB, steps from itself as written, and why it is in float, as text."""

    name: str
    snr: str
    steps: str
    note: str


def describe_quantized(report: Report) -> list[str]:
    """Sentences; nothing without the pass."""
    made = report.quantized
    if made is None:
        return []
    return [_shipped(made), *_together(report), _lost(made), _checked(made)]


@dataclass(frozen=True)
class RuntimeRow:
    """Speeds at one batch size, a text for each runtime."""

    label: str
    speeds: tuple[str, ...]


def runtime_rows(report: Report) -> list[RuntimeRow]:
    """What was timed, side by side in the runtimes of `Report.benches`; nothing for one."""
    benches, made = report.benches, report.quantized
    if len(benches) < 2:
        return []
    eight = {bench.runtime: bench for bench in made.benches} if made else {}
    rows = []
    for index, first in enumerate(benches[0].batches):
        rows.append(
            RuntimeRow(f"batch {first.batch}", tuple(_speed(bench.batches[index]) for bench in benches))
        )
        others = [eight.get(bench.runtime) for bench in benches]
        cells = [
            next((_speed(t) for t in one.batches if t.batch == first.batch), "") if one else "not timed"
            for one in others
        ]
        if made is not None and (eight or made.not_timed):
            rows.append(RuntimeRow(f"batch {first.batch}, 8 bits against {made.source}", tuple(cells)))
    return rows


def _speed(timing: BatchTiming) -> str:
    return f"{interval_text(timing.quoted)}{' (CPU time)' if timing.busy else ''}"


def quantized_rows(report: Report) -> list[Row]:
    """Of the before/after table: the 8 bit file against the baseline; nothing where it is not shipped."""
    made = report.quantized
    if made is None or made.path is None:
        return []
    sizes = report.baseline_export.bytes, made.int8_bytes
    return [Row("  in 8 bits", bytes_text(sizes[0]), bytes_text(sizes[1]), percent_text(*sizes))]


def quantized_layers(made: Quantized) -> list[QuantizedRow]:
    """Layers in 8 bits, then those in float."""
    rows = [
        QuantizedRow(
            layer.name,
            "" if layer.snr_db is None else f"{layer.snr_db:.1f} dB",
            "" if layer.steps is None else str(layer.steps),
            made.in_float.get(layer.name, ""),
        )
        for layer in made.layers
    ]
    named = {layer.name for layer in made.layers}
    return rows + [
        QuantizedRow(n, "", "", f"in float: {why}") for n, why in made.in_float.items() if n not in named
    ]


def _shipped(made: Quantized) -> str:
    size = f"{bytes_text(made.int8_bytes)} for {bytes_text(made.float_bytes)}"
    benches = made.benches
    if not benches and not made.not_timed:
        return f"In 8 bits the result is {size}; no race was run, so that which file is faster is not known."
    parts = [
        f"batch {t.batch}{where_text(bench, benches)}: {t.verdict}, {interval_text(t.quoted)}, "
        f"{ms_text(t.quoted_ms[1])} for {ms_text(t.quoted_ms[0])}"
        for bench in benches
        for t in bench.batches
    ]
    times = "; ".join([*parts, *(f"{name}: not timed, {why}" for name, why in made.not_timed.items())])
    if made.path is None:
        return (
            f"8 bits do not pay on this machine ({times} in float32): ship {made.source}; no 8 bit file was "
            "written."
        )
    return f"Ship {made.path}: {size} ({made.source}), and {times}."


def _together(report: Report) -> list[str]:
    """Products of two speedups that have a file, a runtime and a batch size in common; only of such."""
    made = report.quantized
    if made is None or made.path is None or made.source != report.export.path:
        return []
    said = []
    for bench, other in ((b, o) for b in report.benches for o in made.benches):
        if (bench.runtime, bench.threads) != (other.runtime, other.threads):
            continue
        common = [(b, o) for b in bench.batches for o in other.batches if b.batch == o.batch][:1]
        said += [
            f"With the passes before it that is about {ratio_text(b.quoted.value * o.quoted.value)} of the "
            f"original's speed at batch {b.batch}{where_text(bench, report.benches)} (the product of two "
            "measurements)."
            for b, o in common
        ]
    return said


def _lost(made: Quantized) -> str:
    said = f"Signal to noise of the outputs is {made.snr_db:.1f} dB on {made.held_out} samples held out"
    if made.accuracy is None or made.score is None:
        return f"{said}; without labels that is all that is known of the loss."
    points, low, high = (100 * x for x in (made.accuracy.value, made.accuracy.low, made.accuracy.high))
    return (
        f"{said}; top-1 is {100 * made.score.value:.2f} %, {points:+.2f} points from the float file on the "
        f"same {made.score.samples:,} samples (95 % interval {low:+.2f} to {high:+.2f})."
    )


def _checked(made: Quantized) -> str:
    steps = [layer.steps for layer in made.layers if layer.steps is not None]
    named = {layer.name for layer in made.layers}
    count, of = len(named - made.in_float.keys()), len(named | made.in_float.keys())
    said = f"{count} of {of} convolutions and products are fused in 8 bits (grid {made.grid})"
    if made.kernels != "cpu":
        said = (
            f"{count} of {of} convolutions and products are in 8 bits (grid {made.grid}) in the terms of "
            f"{made.kernels}, computed here as they are written; what it fuses is not known"
        )
    if steps:
        said += (
            f"; {len(steps)} were compared with themselves as written, on samples and on 0 and 255: "
            f"at most {max(steps)} step{'s' if max(steps) != 1 else ''} of their output apart"
        )
    if made.saturating:
        said += (
            f"; on x86 without VNNI sums of {len(made.saturating)} of them can saturate without a word: for "
            "such machines quantise with the target cpu-avx2-int8 (grid=pairs)"
        )
    left = [f"{name} ({why})" for name, why in made.in_float.items()]
    return f"{said}. In float: {some_of(left, 5)}." if left else f"{said}. Nothing is left in float."
