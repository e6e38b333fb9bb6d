"""Results of studies that nobody ran, for what is made of them."""

from typing import Any

from graphcomp.measure.evaluate import wilson
from graphcomp.passes import PASSES
from graphcomp.records import LayerRow, Score, Snapshot
from graphcomp.study.grid import Cell, Study, expand
from graphcomp.study.run import CellResult

NAMES = ("cat", "dog", "owl")
MATRIX = [[8, 2, 0], [1, 9, 0], [3, 3, 4]]


def snapshot(macs: dict[str, int], top1: float | None = None) -> Snapshot:
    """Of layers by name; a parameter for every ten MACs."""
    layers = [
        LayerRow(name=n, kind="Conv2d", in_channels=1, out_channels=1, params=m // 10, macs=m)
        for n, m in macs.items()
    ]
    low, high = wilson(round(100 * (top1 or 0)), 100)
    score = None if top1 is None else Score(measure="accuracy", value=top1, samples=100, low=low, high=high)
    total = sum(macs.values())
    return Snapshot(
        params_trainable=total // 10, params_state=total // 10, macs=total, score=score, layers=layers
    )


def cells(**grid: Any) -> list[Cell]:
    """A grid of cells of any meaning."""
    recipe = {
        "model": "models:x",
        "passes": [{"l1": {"ratio": 0.5}}],
        "data": "any:" + "-".join(f"${axis}" for axis in grid),
    }
    return expand(Study.model_validate({"recipe": recipe, "grid": grid}), PASSES)


def result(cell: Cell, after: dict[str, int], top1: float | None = 0.7, **changes: Any) -> CellResult:
    """As if `cell` had been run: from layers a and b of 600 and 400 MACs to `after`."""
    made = CellResult(
        name=cell.name,
        labels=dict(cell.labels),
        key=cell.key,
        data="some",
        baseline=snapshot({"a": 600, "b": 400}, None if top1 is None else 0.9),
        final=snapshot(after, top1),
        confusion=None if top1 is None else MATRIX,
        bench=None,
        warnings=[],
        seconds=1.5,
    )
    return made.model_copy(update=changes)


def with_error(cell: Cell, mae: float) -> CellResult:
    """As if `cell` were about values: from an error of 0.2 to `mae`."""
    made = result(cell, {"a": 300, "b": 400}, None)
    before, after = (
        Score(measure="error", value=e, samples=50, low=e - 0.01, high=e + 0.01) for e in (0.2, mae)
    )
    baseline, final = made.baseline, made.final
    return made.model_copy(
        update={
            "baseline": baseline.model_copy(update={"score": before}),
            "final": final.model_copy(update={"score": after}),
        }
    )
