"""cc by responses: what forms lose against dense algebra, which of them are taken, and on whole networks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from graphcomp.errors import PassError
from graphcomp.measure import macs
from graphcomp.passes import CC, Refit
from graphcomp.passes.cc.buying import bought
from graphcomp.passes.cc.responses import Form, Forms, forms_of
from graphcomp.passes.cc.units import WeightShape
from graphcomp.pipeline import Pipeline, verify
from tests.fitting import samples
from tests.tiny import SHAPE, context, tiny_program


def problem(channels: int, kernel: int, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, G and f of a layer whose columns go together, so far apart that the ridge changes little."""
    generator = torch.Generator().manual_seed(seed)
    k = channels * kernel
    a = torch.randn(20 * k, k, generator=generator, dtype=torch.float64)
    a += 0.5 / k**0.5 * a @ torch.randn(k, k, generator=generator, dtype=torch.float64)
    w = torch.randn(outputs, k, generator=generator, dtype=torch.float64)
    return w, a.T @ a / len(a), torch.rand(outputs, generator=generator, dtype=torch.float64) + 0.1


def least(w: Tensor, gram: Tensor, f: Tensor, columns: list[int], rank: int) -> float:
    """The least weighted error of all weights of a rank on some columns, by whitening these."""
    values, vectors = torch.linalg.eigh(gram[columns][:, columns])
    root = f.sqrt().unsqueeze(1)
    told = root * w @ gram[:, columns] @ vectors / values.sqrt()
    best = torch.linalg.svdvals(told)[:rank].square().sum()
    return float((root * w @ gram * (root * w)).sum() - best)


@given(st.integers(1, 6), st.sampled_from([1, 4]), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_losses_are_those_of_the_best_weights_of_the_form(
    channels: int, kernel: int, outputs: int, seed: int
) -> None:
    w, gram, f = problem(channels, kernel, outputs, seed)
    shape = WeightShape(outputs, channels, kernel)
    power = float(((f.unsqueeze(1) * w) @ gram * w).sum())
    for form, lost, near in forms_of(w, gram, f, shape, 1, 1.0):
        columns = [c * kernel + i for c in form.keep for i in range(kernel)]
        expected = least(w, gram, f, columns, form.rank or outputs)
        assert lost == pytest.approx(expected, rel=2e-2, abs=5e-3 * power)  # but for the ridge
        left = float((f.unsqueeze(1) * (w - near) @ gram * (w - near)).sum())
        assert left == pytest.approx(expected, rel=2e-2, abs=5e-3 * power)
        outside = [i for i in range(w.shape[1]) if i not in columns]
        assert not near[:, outside].any() and torch.linalg.matrix_rank(near) <= (form.rank or outputs)
        assert form.macs == shape.macs(len(form.keep), form.rank) <= shape.macs()


def test_widths_and_ranks_are_multiples_and_no_more_goes_than_the_ceiling() -> None:
    w, gram, f = problem(12, 9, 16, 0)
    shape = WeightShape(16, 12, 9)
    forms = [form for form, _, _ in forms_of(w, gram, f, shape, 4, 0.6)]
    assert {len(form.keep) for form in forms} == {8, 12}  # 4 channels would be a third of the MACs
    assert {form.rank for form in forms} <= {None, 4, 8, 12}
    assert min(form.macs for form in forms) >= 0.4 * shape.macs()


def market() -> list[Forms]:
    """Two layers of 100 MACs a channel: the second loses a tenth."""
    shape = WeightShape(10, 10, 10)
    forms = [Form(tuple(range(n)), None, shape.macs(n)) for n in (10, 8, 5)]
    return [
        Forms(name, shape, 10000, forms, scale * np.array([0.0, 1, 3]))
        for name, scale in (("a", 1), ("b", 0.1))
    ]


def test_what_saves_most_for_what_is_lost_goes_first() -> None:
    program = tiny_program()
    whole = macs(program)
    for saved, expected in ((1999, (10, 8)), (5000, (10, 5)), (6000, (8, 5))):
        rows = bought(program, market(), saved / whole)
        assert tuple(len(row.factor.keep or range(10)) for row in rows) == expected
        assert [row.reason is None for row in rows] == [n < 10 for n in expected]
    with pytest.raises(PassError, match="expected at most"):
        bought(program, market(), 10001 / whole)


def test_the_pass_needs_no_labels_and_refit_makes_up_for_it() -> None:
    program = tiny_program()
    x = torch.randn(300, *SHAPE[1:], generator=torch.Generator().manual_seed(3))
    data = context(samples(x))
    distance = []
    for passes in (
        [CC(rate=0.4, fit="responses", multiple=4)],
        [CC(rate=0.4, fit="responses", multiple=4), Refit()],
    ):
        small, steps = Pipeline(passes).run(program, data)
        assert steps[0].verify_error < verify.TOLERANCE
        assert macs(small) <= 0.6 * macs(program)
        distance.append(float((small(x) - program(x)).detach().square().sum()))
    assert distance[1] < distance[0]


def test_no_rate_no_change() -> None:
    program = tiny_program()
    x = torch.randn(300, *SHAPE[1:], generator=torch.Generator().manual_seed(3))
    plan = CC(rate=0.0, fit="responses").plan(program, context(samples(x)))
    assert plan.decisions["factors"] == []


def test_options_of_the_other_rule_are_refused() -> None:
    with pytest.raises(ValidationError, match="gamma with fit=responses"):
        CC(rate=0.5, fit="responses", gamma=0.5)
