"""The greedy chain, bit for bit what looking at all pairs gives."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from graphcomp.errors import PassError
from graphcomp.passes.dct import walk
from graphcomp.passes.dct.ordering import OrderDistance, StartNorm, chain

Floats = NDArray[np.float64]
DISTANCES: tuple[OrderDistance, ...] = get_args(OrderDistance)
TOY = np.array([[0.5, -1.0, 0.4, 2.0], [0.1, 0.3, 0.2, -1.5]])


def all_pairs(x: Floats, distance: OrderDistance = "euclidean", start: StartNorm = "l2") -> list[int]:
    """Alg. 1 as METHODS 4.2 writes it."""
    first = int(np.argmax(sum(abs(row) if start == "l1" else row * row for row in x)))
    if distance == "cosine":
        norms = np.sqrt(sum(row * row for row in x))
        x = np.vstack([x / np.where(norms > 0, norms, 1), norms == 0])
    order, left = [first], [j for j in range(x.shape[1]) if j != first]
    while left:
        differences = abs(x[:, left] - x[:, order[-1:]])
        costs = sum(row if distance == "manhattan" else row * row for row in differences)
        order.append(left.pop(int(np.argmin(costs))))
    return order


def chain_by(limit: int, x: Floats, distance: OrderDistance, start: StartNorm = "l2") -> list[int]:
    """The chain with the k-d tree (limit 99) or the scan (limit 1), whatever the number of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "TREE_DIMENSIONS", limit)
        return chain(x, distance, start).tolist()


BOTH = pytest.mark.parametrize("limit", [99, 1], ids=["tree", "scan"])


# ---------------------------------------------------------------------- golden


def test_t4_8_the_chain_of_the_toy() -> None:
    """T4.8, G4.5: columns are ordered, by the chain; by norm it would be [3, 1, 0, 2]."""
    assert chain(TOY).tolist() == [3, 0, 2, 1]
    assert chain(TOY.reshape(1, 8)).tolist() == [3, 0, 2, 5, 6, 4, 1, 7]
    assert np.argsort(-(TOY**2).sum(0)).tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("start", get_args(StartNorm))
def test_the_toy_by_all_distances_and_norms(distance: OrderDistance, start: StartNorm) -> None:
    assert chain(TOY, distance, start).tolist() == all_pairs(TOY, distance, start)


def test_the_start_is_the_largest_by_the_norm_asked_for() -> None:
    x = np.array([[3.0, 2.1, 0.0], [0.0, 2.1, 1.0]])
    assert chain(x, start="l2")[0] == 0
    assert chain(x, start="l1")[0] == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 3.0, -2.0, 3.0, 0.0], [1, 3, 0, 4, 2]),  # the largest magnitude is positive: descending
        ([1.0, -3.0, 2.0, -3.0, 0.0], [1, 3, 4, 0, 2]),  # negative: ascending
        ([-2.0, 2.0], [0, 1]),  # the first of two that are as large
        ([2.0, -2.0, 1.0], [0, 2, 1]),
        ([0.0, -0.0, 0.0], [0, 1, 2]),
        ([7.0], [0]),
    ],
)
def test_one_row_is_sorted(values: list[float], expected: list[int]) -> None:
    """METHODS 4.2: for g = 1 the chain is a monotone sort."""
    assert chain(np.array([values])).tolist() == expected


# ---------------------------------------------------------------------- ties, and exactness


def test_ties_go_to_the_smallest_column() -> None:
    square = np.array([[9.0, 8.0, 9.0, 10.0, 9.0], [9.0, 9.0, 8.0, 9.0, 10.0]])
    assert chain(square).tolist() == all_pairs(square)  # from column 3: 0 is nearest, then 1, 2, 4 are equal
    assert chain(square).tolist()[:3] == [3, 0, 1]


@pytest.mark.slow
def test_equal_columns_follow_one_another() -> None:
    """As in a pruned network: thousands of columns of zeros, one run of increasing columns."""
    x = np.zeros((4, 3000))
    x[:, ::7] = np.random.default_rng(0).normal(size=(4, 429))
    order = chain(x)
    assert order.tolist() == all_pairs(x)
    zeros = np.flatnonzero(~x.any(0))
    at = np.flatnonzero(np.isin(order, zeros))
    assert (np.diff(at) == 1).all() and (order[at] == zeros).all()


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("distance", DISTANCES)
@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    x=st.tuples(st.integers(1, 5), st.integers(1, 90)).flatmap(
        lambda shape: arrays(np.float64, shape, elements=st.integers(-2, 2).map(float))
    ),
    start=st.sampled_from(get_args(StartNorm)),
)
def test_ties_everywhere(limit: int, distance: OrderDistance, x: Floats, start: StartNorm) -> None:
    """Integers: many equal columns, and many distances that are equal."""
    assert chain_by(limit, x, distance, start) == all_pairs(x, distance, start)


def gaussian(generator: np.random.Generator, g: int, m: int) -> Floats:
    return generator.normal(size=(g, m)).astype(np.float32).astype(np.float64)


def sparse(generator: np.random.Generator, g: int, m: int) -> Floats:
    return gaussian(generator, g, m) * (generator.random((g, m)) < 0.2)


def tiny(generator: np.random.Generator, g: int, m: int) -> Floats:
    """Squares of such differences would vanish in float32."""
    return gaussian(generator, g, m) * 1e-30


def far_apart(generator: np.random.Generator, g: int, m: int) -> Floats:
    """A few columns a million times as large as the rest."""
    return gaussian(generator, g, m) * np.where(generator.random(m) < 0.02, 1e6, 1)


def clustered(generator: np.random.Generator, g: int, m: int) -> Floats:
    """Neighbourhoods are used up while others are whole."""
    return gaussian(generator, g, 8)[:, generator.integers(0, 8, m)] + 1e-3 * gaussian(generator, g, m)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", [gaussian, sparse, tiny, far_apart, clustered])
@pytest.mark.parametrize("g", [2, 4, 16])
def test_the_chain_is_that_of_all_pairs(limit: int, kind: Any, distance: OrderDistance, g: int) -> None:
    x = kind(np.random.default_rng(g), g, 500)
    assert chain_by(limit, x, distance) == all_pairs(x, distance)


@BOTH
def test_distances_that_differ_by_the_order_of_summation(limit: int) -> None:
    """Equal in exact arithmetic, an ulp apart in float64: what counts is the sum from first to last row."""
    for seed in range(12):
        generator = np.random.default_rng(seed)
        steps = generator.random(10) + 0.1
        x = 10 - np.array([0 * steps, *(generator.permutation(steps) for _ in range(60))]).T
        assert chain_by(limit, x, "euclidean") == all_pairs(x), seed


def test_a_column_of_zeros_is_orthogonal_to_all_others() -> None:
    """T2.9's convention, 1 - cos = 1: nearer than an obtuse angle, further than an acute one."""
    x = np.array([[5.0, -4.0, 0.0, 3.0], [0.0, 0.1, 0.0, 3.0]])
    assert chain(x, "cosine").tolist() == [0, 3, 2, 1]


def test_parallel_columns_are_equal_by_cosine() -> None:
    x = np.array([[1.0, 0.0, 4.0, 2.0], [0.0, 1.0, 0.0, 0.0]])
    assert chain(x, "cosine").tolist() == [2, 0, 3, 1]  # starts at the largest, not at the first parallel one


@pytest.mark.slow
def test_threads_and_memory_layout_change_nothing() -> None:
    x = gaussian(np.random.default_rng(0), 8, 3000)
    expected = chain(x)
    assert np.array_equal(chain(np.asfortranarray(x)), expected)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert np.array_equal(chain(x), expected)
    finally:
        torch.set_num_threads(before)


def test_the_input_stays_as_it_is() -> None:
    x = gaussian(np.random.default_rng(0), 4, 500)
    before = x.copy()
    chain(x)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_must_be_finite(bad: float) -> None:
    with pytest.raises(PassError, match="found NaN or infinite weights"):
        chain(np.array([[1.0, bad], [0.0, 0.0]]))


# ---------------------------------------------------------------------- cost


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "limit"), [(gaussian, 20), (clustered, 25)])
def test_t4_9_few_pairs_are_looked_at(monkeypatch: pytest.MonkeyPatch, kind: Any, limit: int) -> None:
    """T4.9: all pairs of 30,000 columns would be 15,000 a column; and rebuilt indices are few."""
    x = kind(np.random.default_rng(0), 4, 30_000)
    looked_at, built = [0], [0]
    ranked, build = walk.Walk.ranked, walk.Walk.build

    def counted(self: Any, which: Any, k: int) -> Any:
        found = ranked(self, which, k)
        looked_at[0] += found.size
        return found

    def counted_build(self: Any, here: int) -> None:
        build(self, here)
        built[0] += len(self.index.ids)

    monkeypatch.setattr(walk.Walk, "ranked", counted)
    monkeypatch.setattr(walk.Walk, "build", counted_build)
    order = chain(x)
    assert np.array_equal(np.sort(order), np.arange(30_000))
    assert looked_at[0] < limit * 30_000
    assert built[0] < 8 * 30_000
