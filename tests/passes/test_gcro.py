"""GCRO: the removal curve, its fit, and how the layers share the rate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcomp.errors import PassError
from graphcomp.passes.cc.gcro import OFFICIAL_CLIP, Fit, fit_exponential, removal_curve, solve_rates
from tests.naive_cc import curve, weights
from tests.passes.test_cc_units import SHAPES, TOY_G, TOY_W

TWO = [Fit(math.log(0.01), 5.0), Fit(math.log(0.05), 3.0)]


def test_g1_1_curve_and_fit() -> None:
    rates, losses = removal_curve(TOY_W, TOY_G)
    order = np.argsort(rates, kind="stable")
    assert rates[order].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert (losses / losses.max())[order].tolist() == pytest.approx([0.2, 0.555556, 1, 1, 1], abs=5e-7)
    fit = fit_exponential(rates, losses)
    assert fit is not None
    assert (fit.a, fit.b) == pytest.approx((0.177202, 1.840592), abs=5e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_curve_is_the_definition(shape: tuple[int, ...]) -> None:
    weight, gradient = weights(*shape, seed=2)
    for found, expected in zip(removal_curve(weight, gradient), curve(weight, gradient), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_fit_is_the_weighted_least_squares_line() -> None:
    rng = np.random.default_rng(0)
    rates, losses = rng.uniform(-0.5, 1, 40), rng.uniform(0.1, 7, 40)
    losses[rates > 0.5] *= 3
    fit = fit_exponential(rates, losses)
    some = rates > 0
    share = losses[some] / losses[some].max()
    b, log_a = np.polyfit(rates[some], np.log(share + 1e-10), 1, w=share**0.25)  # weights are squared there
    assert fit is not None
    assert (fit.log_a, fit.b) == pytest.approx((log_a, b))


@pytest.mark.parametrize(
    ("rates", "losses"),
    [
        ([], []),
        ([0.5], [1.0]),
        ([0.5, 0.5], [1.0, 2.0]),  # one rate only
        ([-0.1, 0.0, 0.5], [1.0, 2.0, 3.0]),
        ([0.2, 0.5, 1.0], [0.0, 0.0, 0.0]),  # no gradient
        ([0.2, 0.5, 1.0], [3.0, 2.0, 1.0]),  # falls
        ([0.2, 0.5, 1.0], [0.0, 0.0, 1.0]),  # only one point has a weight
    ],
)
def test_no_fit(rates: list[float], losses: list[float]) -> None:
    assert fit_exponential(np.array(rates), np.array(losses)) is None


def test_no_fit_without_a_gradient() -> None:
    weight, gradient = weights(4, 5, 3, 3)
    assert fit_exponential(*removal_curve(weight, torch.zeros_like(gradient))) is None


@pytest.mark.parametrize(
    ("rate", "log_x", "rates"),
    [
        (0.3, -1.139581, (0.371230, 0.252513)),
        (0.5, -0.425295, (0.514087, 0.490608)),
        (0.8, 0.646134, (0.728373, 0.847751)),
    ],
)
def test_g1_4_two_layers(rate: float, log_x: float, rates: tuple[float, float]) -> None:
    """T1.2: not the same rate for all; where nothing is clipped the slope has a closed form."""
    found = solve_rates(TWO, [4, 6], 10, rate, [0.95, 0.95])
    assert found == pytest.approx(rates, abs=5e-7)
    for fit, r in zip(TWO, found, strict=True):
        assert fit.log_slope + fit.b * r == pytest.approx(log_x, abs=5e-7)


layers = st.lists(
    st.tuples(st.floats(-12, 0), st.floats(0.3, 12), st.integers(1, 10**8), st.floats(0.05, 1)),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=50)
@given(layers, st.floats(0, 1), st.integers(0, 10**8))
def test_t1_12_the_rate_is_met(
    drawn: list[tuple[float, float, int, float]], part: float, others: int
) -> None:
    fits, macs = [Fit(log_a, b) for log_a, b, _, _ in drawn], [m for _, _, m, _ in drawn]
    ceilings = [c for *_, c in drawn]
    total = sum(macs) + others
    most = sum(m * c for m, c in zip(macs, ceilings, strict=True)) / total
    lower, rate = (np.array(solve_rates(fits, macs, total, most * p, ceilings)) for p in (part / 2, part))
    assert abs(float(rate @ np.array(macs)) - most * part * total) < 1e-9 * total
    assert (lower <= rate + 1e-12).all()
    assert ((rate >= 0) & (rate <= np.array(ceilings))).all()
    inside = (rate > 1e-9) & (rate < np.array(ceilings) - 1e-9)
    slopes = [f.log_slope + f.b * r for f, r, i in zip(fits, rate, inside, strict=True) if i]
    assert not slopes or max(slopes) - min(slopes) < 1e-6


@settings(deadline=None, max_examples=30)
@given(layers, st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_per_flop_has_the_least_loss(
    drawn: list[tuple[float, float, int, float]], part: float, seed: int
) -> None:
    """No other rates that give up as much lose less in total."""
    fits, macs = [Fit(log_a, b) for log_a, b, _, _ in drawn], np.array([m for _, _, m, _ in drawn], float)
    ceilings = np.array([c for *_, c in drawn])
    rate = part * float(macs @ ceilings) / float(macs.sum())
    best = np.array(
        solve_rates(
            fits, macs.astype(int).tolist(), int(macs.sum()), rate, ceilings.tolist(), slope="per_flop"
        )
    )

    def loss(rates: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        return sum(f.a * math.exp(f.b * r) for f, r in zip(fits, rates, strict=True))

    rng = np.random.default_rng(seed)
    for _ in range(20):
        i, j = rng.integers(len(macs), size=2)
        moved = min(best[i] * macs[i], (ceilings[j] - best[j]) * macs[j]) * rng.random()
        other = best.copy()
        other[i] -= moved / macs[i]
        other[j] += moved / macs[j]
        assert loss(other) >= loss(best) * (1 - 1e-9)


def test_official_clip() -> None:
    """While solving, a layer at its ceiling counts .90, so that the others give up more."""
    free, official = (solve_rates(TWO, [4, 6], 10, 0.89, [0.95] * 2, official_clip=o) for o in (False, True))
    assert free == pytest.approx([(8.9 - 5.7) / 4, 0.95])
    assert official == pytest.approx([(8.9 - 6 * OFFICIAL_CLIP) / 4, 0.95])
    with pytest.raises(PassError, match=r"expected at most 0\.9000"):
        solve_rates(TWO, [4, 6], 10, 0.91, [0.95] * 2, official_clip=True)


def test_infeasible_names_the_most() -> None:
    with pytest.raises(PassError, match=r"rate: found 0.48, expected at most 0.4750, .* 2 layers of 3"):
        solve_rates([*TWO, None], [4, 6, 10], 20, 0.48, [0.95] * 3)
    assert solve_rates([*TWO, None], [4, 6, 10], 20, 0.475, [0.95] * 3) == pytest.approx([0.95, 0.95, 0])


def test_layers_that_give_nothing() -> None:
    assert solve_rates([*TWO, None], [4, 6, 10], 20, 0.0, [0.95] * 3) == [0, 0, 0]
    assert solve_rates(TWO, [4, 6], 10, 0.3, [0.95, 0.0])[1] == 0
