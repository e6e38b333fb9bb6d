"""What fits take of memory: that much is kept free while activations wait."""

from collections.abc import Iterable, Mapping

from graphcomp.ir import Program
from graphcomp.measure import bytes_to_solve, matrix_shape
from graphcomp.passes.refit.comparison import are_few
from graphcomp.passes.refit.holders import kind_of
from graphcomp.passes.refit.lines import Line
from graphcomp.passes.refit.rows import rows_in
from graphcomp.passes.refit.units import Unit


def bytes_to_fit(shape: tuple[int, int, int], rows: int, *, is_free: bool) -> int:
    """What the fit of a layer takes.

    Args:
        shape: of W, (g, o, K).
        rows: of all processes together.
        is_free: whether any W may be fitted.
    """
    g, o, k = shape
    if is_free and are_few(rows, k):  # W as it was, as it is and in float32; rows and the space of them
        return bytes_to_solve(g, o, rows) + 8 * g * k * (3 * o + 4 * rows)
    return bytes_to_solve(g, o, k)


def bytes_to_improve(program: Program, line: Line) -> int:
    """What the steps of a line take: sums and steps of all its layers, one that is solved, activations."""
    shapes = [matrix_shape(program.layer(name)) for name in line.layers]
    held = sum(g * (k * k + 6 * o * k + 2 * o * o) for g, o, k in shapes)
    solved = max(g * (3 * k * k + 3 * o * k + 2 * o * o) for g, o, k in shapes)
    return 8 * (held + solved) + line.bytes_at_once


def most_needed(
    program: Program,
    units: Iterable[Unit],
    lines: Mapping[str, Line],
    samples: int,
    positions: int,
    memory: int,
) -> int:
    """Of all fits that memory has room for."""
    needed = [_of(program, unit, samples, positions) for unit in units]
    needed += [bytes_to_improve(program, line) for line in lines.values()]
    return max((n for n in needed if n <= memory), default=0)


def _of(program: Program, unit: Unit, samples: int, positions: int) -> int:
    layer = program.layer(unit.layer)
    g, o, _ = matrix_shape(layer)
    k = matrix_shape(program.layer(unit.source))[2]
    rows = sum(rows_in(program, call, samples, positions) for call in unit.calls)
    return bytes_to_fit((g, o, k), rows, is_free=kind_of(unit, layer).is_free)
