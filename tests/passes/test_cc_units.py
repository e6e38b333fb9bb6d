"""Units of a weight: what is left of it, and what it has lost, against the definition."""

from itertools import permutations

import pytest
import torch

from graphcomp.passes.cc.units import Remainder, WeightShape
from tests.naive_cc import Naive, weights

TOY_W = torch.tensor([[2.0, 1, 0], [0, 1, 3]], dtype=torch.float64)
TOY_G = torch.tensor([[1.0, 2, 1], [3, 1, 0.5]], dtype=torch.float64)

SHAPES = [
    (4, 5, 3, 3),
    (6, 5, 1, 1),
    (5, 6),
    (3, 8, 1, 1),
    (9, 2, 2, 2),
    (4, 6, 3),
    (5, 1, 3, 3),
    (1, 4, 1, 1),
]


def alone(state: Remainder) -> list[float]:
    """The loss of every unit if it is the only one to go."""
    channels = (state.importance * state.original.square()).sum((0, 2))
    return torch.cat([channels, state.parts().sum(1)]).tolist()


def test_g1_1_losses_alone() -> None:
    """The last digit too, and T1.3: the sum of squares (5 for channel 1), not the square of the sum (9)."""
    assert alone(Remainder(TOY_W, TOY_G)) == pytest.approx([4, 5, 2.25, 5.167310, 7.720621], abs=5e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_is_the_definition(shape: tuple[int, ...], seed: int) -> None:
    """Any order, down to nothing; also where more directions than columns are left."""
    weight, gradient = weights(*shape, seed=seed)
    state, naive = Remainder(weight, gradient), Naive(weight, gradient)
    order = torch.randperm(len(state.units), generator=torch.Generator().manual_seed(seed)).tolist()
    for unit in order:
        state.remove(unit)
        naive.remove(unit)
        assert state.units == naive.units
        state.diagonalise()
        torch.testing.assert_close(state.current, naive.current[:, naive.channels], rtol=0, atol=1e-12)
        assert state.loss == pytest.approx(naive.loss(naive.current), rel=1e-10, abs=1e-10)
    assert state.loss == pytest.approx(float((weight * gradient).square().sum()), rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triples_stay_singular(shape: tuple[int, ...]) -> None:
    weight, gradient = weights(*shape, seed=5)
    state = Remainder(weight, gradient)
    for unit in state.units[:-1:2]:
        state.remove(unit)
        state.diagonalise()
        flat, rank = state.right.flatten(1), len(state.directions)
        gram = flat @ flat.T
        torch.testing.assert_close(state.left.T @ state.left, torch.eye(rank, dtype=torch.float64))
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-12)
        assert gram.diagonal().tolist() == sorted(gram.diagonal().tolist(), reverse=True)
        torch.testing.assert_close(state.left @ flat, state.current.flatten(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", list(permutations([0, 2, 5])), ids=str)
def test_t1_9_places_of_directions(order: tuple[int, ...]) -> None:
    """Directions 0, 2 and 5 of a diagonal matrix, in any order: the other entries remain."""
    weight = torch.diag(torch.tensor([9.0, 8, 7, 6, 5, 4, 3], dtype=torch.float64))
    state = Remainder(weight, torch.ones_like(weight))
    for direction in order:
        state.remove(7 + direction)
    assert state.directions == [1, 3, 4, 6]
    assert torch.linalg.svdvals(state.current.flatten(1))[:4].tolist() == pytest.approx([8, 6, 5, 3])


def test_t1_9_places_after_channels() -> None:
    """A channel in between reorders the triples, not the places."""
    weight = torch.diag(torch.tensor([9.0, 8, 7, 6, 5, 4, 3], dtype=torch.float64))
    state = Remainder(weight, torch.ones_like(weight), [7 + 1, 2, 7 + 0, 7 + 4])
    # 9 . 7 6 5 4 3, then without the 7: 9 6 5 4 3 0 for directions 0 2 3 4 5 6: 9 and 4 go
    assert state.directions == [2, 3, 5, 6]
    left = torch.linalg.svdvals(state.current.flatten(1)).tolist()
    assert left == pytest.approx([6, 5, 3, 0, 0, 0], abs=1e-12)


def test_t1_13_arguments_are_not_touched() -> None:
    """float64 as well, which a conversion does not copy."""
    weight, gradient = weights(4, 5, 3, 3)
    before = weight.clone(), gradient.clone()
    state = Remainder(weight, gradient)
    for unit in state.units:
        state.remove(unit)
    assert torch.equal(weight, before[0]) and torch.equal(gradient, before[1])


def test_units_that_are_gone() -> None:
    state = Remainder(*weights(3, 4))
    for unit in (1, 4 + 2):
        state.remove(unit)
        with pytest.raises(ValueError, match="not in list"):
            state.remove(unit)


def test_the_last_of_a_kind_can_be_told() -> None:
    state = Remainder(*weights(2, 2), units=[0])
    assert [state.removable(u) for u in state.units] == [False, True, True]


def test_shape() -> None:
    shape = WeightShape.of(torch.zeros(4, 3, 3, 5))
    assert (shape.outputs, shape.channels, shape.kernel) == (4, 3, 15)
    assert (shape.directions, shape.units) == (4, 7)
    assert WeightShape.of(torch.zeros(4, 3)) == WeightShape(4, 3, 1)


@pytest.mark.parametrize(
    ("n", "c", "k", "pays"),
    [(16, 16, 9, 14.4), (32, 32, 9, 28.8), (64, 64, 9, 57.6), (32, 16, 9, 26.18), (64, 32, 9, 52.36),
     (256, 64, 1, 51.2), (64, 256, 1, 51.2)],
)  # fmt: skip
def test_g1_2_break_even(n: int, c: int, k: int, pays: float) -> None:
    """T1.8: two factors cost R (c k + n), the second factor's n R included."""
    shape = WeightShape(n, c, k)
    assert shape.macs(rank=int(pays)) < shape.macs() < shape.macs(rank=int(pays) + 1)
    assert shape.macs() / (shape.macs(rank=1)) == pytest.approx(pays, abs=0.01)
