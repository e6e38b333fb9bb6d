"""Cells that repeat each other: mean, deviation and best of their scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from statistics import fmean, stdev

from graphcomp.study.reading import Value
from graphcomp.study.table import Findings

Row = dict[str, Value]


@dataclass(frozen=True)
class Spread:
    """Scores of cells that differ by chance alone.

    Attributes:
        cells: how many there are.
        mean: of their scores.
        deviation: the sample's, with n - 1; None of one cell.
        best: the highest accuracy, or the smallest error.
        names: of the cells.
    """

    cells: int
    mean: float
    deviation: float | None
    best: float
    names: tuple[str, ...]


def collapsed(found: Sequence[Findings], repeats: Sequence[str]) -> list[tuple[Findings, Spread | None]]:
    """One for all cells that differ only along the axes of `repeats`, in the order of the first ones.

    Its score is the mean, with the deviation as interval (NaN of one cell); its confusion matrix is the sum;
    of what is left of the network the first one's counts stand for all. Without such axes, the cells
    themselves. A cell without a score has no spread.
    """
    if not repeats:
        return [(cell, None) for cell in found]
    groups: dict[tuple[tuple[str, str], ...], list[Findings]] = {}
    for cell in found:
        rest = tuple((axis, label) for axis, label in cell.result.labels.items() if axis not in repeats)
        groups.setdefault(rest, []).append(cell)
    return [_one(dict(rest), cells) for rest, cells in groups.items()]


def _one(labels: dict[str, str], cells: Sequence[Findings]) -> tuple[Findings, Spread | None]:
    first = cells[0].result.model_copy(update={"labels": labels})
    matrices = [cell.result.confusion for cell in cells if cell.result.confusion is not None]
    if len(matrices) == len(cells) and len({len(matrix) for matrix in matrices}) == 1:
        added = [[sum(counts) for counts in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
        first = first.model_copy(update={"confusion": added})
    scored = [cell for cell in cells if cell.score is not None]
    spread = _spread(scored)
    score = scored[0].score if scored else None
    if spread is not None and score is not None:
        bar = nan if spread.deviation is None else spread.deviation  # of one cell it is unknown: no bar
        changed = {"value": spread.mean, "low": spread.mean - bar, "high": spread.mean + bar}
        final = first.final.model_copy(update={"score": score.model_copy(update=changed)})
        first = first.model_copy(update={"final": final})
    return replace(cells[0], result=first), spread


def _spread(cells: Sequence[Findings]) -> Spread | None:
    scores = [cell.score for cell in cells if cell.score is not None]
    if not scores or len({score.measure for score in scores}) > 1:
        return None
    values = [score.value for score in scores]
    return Spread(
        cells=len(values),
        mean=fmean(values),
        deviation=stdev(values) if len(values) > 1 else None,
        best=max(values) if scores[0].higher_is_better else min(values),
        names=tuple(cell.result.name for cell in cells),
    )


def with_spreads(rows: Sequence[Row], spreads: Sequence[Spread | None]) -> list[Row]:
    """The table's rows with what their cell and its repetitions have in common, in columns of their own."""
    by_cell = {name: spread for spread in spreads if spread is not None for name in spread.names}
    return [row | _columns(by_cell.get(str(row["cell"]))) for row in rows] if by_cell else list(rows)


def _columns(spread: Spread | None) -> Row:
    if spread is None:
        return dict.fromkeys(("repeats", "mean", "std", "best"))
    return {
        "repeats": spread.cells,
        "mean": spread.mean,
        "std": spread.deviation,
        "best": spread.best,
    }
