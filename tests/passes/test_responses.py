"""low-rank by responses: losses against dense algebra, and what `refit` makes of the ranks."""

import pytest
import torch
from pydantic import ValidationError

from graphcomp.bases.reading import TOO_FEW
from graphcomp.errors import DataError
from graphcomp.measure import Gram
from graphcomp.passes import FoldBN, LowRank, Refit
from graphcomp.passes.low_rank.responses import _spectrum
from graphcomp.pipeline import Pipeline
from tests.bases.test_compensation import Wide, many
from tests.tiny import SHAPE, context, tiny_program, traced


def test_the_tail_is_what_the_best_factors_lose() -> None:
    a = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    a = a - a.mean(0)
    gram, f = a.T @ a / len(a), torch.rand(5, dtype=torch.float64) + 0.1
    w = torch.randn(5, 6, dtype=torch.float64)
    values, nearest = _spectrum(w, Gram(len(a), torch.zeros(1, 6), gram.unsqueeze(0)), f)
    for rank in range(1, 6):
        near = nearest(rank)
        assert torch.linalg.matrix_rank(near) == rank
        lost = float((f * ((a @ (w - near).T) ** 2).mean(0)).sum())
        assert lost == pytest.approx(values[rank:].sum(), abs=1e-9)
        u, s, vt = torch.linalg.svd(w)  # the weight's own factors lose no less
        plain = u[:, :rank] * s[:rank] @ vt[:rank]
        assert lost <= float((f * ((a @ (w - plain).T) ** 2).mean(0)).sum()) + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
def test_refit_makes_the_factors_those_of_the_responses(fold: bool) -> None:
    program, data = tiny_program(), many(600, *SHAPE[1:])
    x = next(data.eval.batches(64))[0][0]
    passes = [FoldBN()] if fold else []
    asked = LowRank(target={"macs": 0.6}, multiple=1, fit="responses", exclude=("stem",))
    distances = []
    for repair in ([], [Refit()]):
        small, steps = Pipeline([*passes, asked, *repair]).run(program, context(data))
        distances.append(float((small(x) - program(x)).detach().square().sum()))
    assert steps[-1].fit is not None and any(row.layer == "outer.1" for row in steps[-1].fit.layers)
    assert distances[1] < 0.8 * distances[0]


def test_layers_with_too_few_rows_stay() -> None:
    data = many(100, 3, 8, 8)
    _, steps = Pipeline([LowRank(ratio=0.3, multiple=1, fit="responses")]).run(
        traced(Wide(), 1, 3, 8, 8), context(data)
    )
    assert ("fc", f"it {TOO_FEW}") in {(k.where, k.reason) for k in steps[0].plan.kept}


def test_what_cannot_be() -> None:
    with pytest.raises(DataError, match="found no data"):
        LowRank(energy=0.9, fit="responses").plan(tiny_program(), context())
    with pytest.raises(ValidationError, match="fit=responses with kind=spatial, expected svd"):
        LowRank(energy=0.9, fit="responses", kind="spatial")
