"""What the pass `quantize` came to, in words: which file to ship, what that costs and what was checked."""

from dataclasses import dataclass

from graphcomp.errors import some_of
from graphcomp.records import Quantized, Report
from graphcomp.report.words import Row, bytes_text, interval_text, ms_text, percent_text, ratio_text


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
    said = [_shipped(made), _lost(made), _checked(made)]
    if (together := _together(report)) is not None:
        said.insert(1, together)
    return said


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
    if made.bench is None:
        return f"In 8 bits the result is {size}; no race was run, so that which file is faster is not known."
    times = "; ".join(
        f"batch {t.batch}: {t.verdict}, {interval_text(t.quoted)}, {ms_text(t.quoted_ms[1])} for "
        f"{ms_text(t.quoted_ms[0])}"
        for t in made.bench.batches
    )
    if made.path is None:
        return (
            f"8 bits do not pay on this machine ({times} in float32): ship {made.source}; no 8 bit file was "
            "written."
        )
    return f"Ship {made.path}: {size} ({made.source}), and {times}."


def _together(report: Report) -> str | None:
    made, bench = report.quantized, report.bench
    if made is None or made.bench is None or made.path is None or bench is None:
        return None
    firsts = bench.batches[0], made.bench.batches[0]
    both = firsts[0].quoted.value * firsts[1].quoted.value
    return (
        f"With the passes before it that is about {ratio_text(both)} of the original's speed at batch "
        f"{firsts[0].batch} (the product of two measurements)."
    )


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
