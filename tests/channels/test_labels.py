"""Arithmetic on label tensors: the same numbers as on full tensors, without materialising them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphcomp.channels.labels import along, canonical, compact, components, concatenate, varying


def full(vector: list[int], axis: int, shape: tuple[int, ...]) -> Tensor:
    """What `along` stands for, written out."""
    out = torch.zeros(shape, dtype=torch.int64)
    for i, value in enumerate(vector):
        out.select(axis, i).fill_(value)
    return out


def stored(labels: Tensor) -> int:
    return compact(labels).numel()


def test_along_lays_a_vector_on_one_axis_and_stores_nothing_else() -> None:
    labels = along(torch.tensor([7, 8, 9]), 1, (1, 3, 56, 56))
    assert torch.equal(labels, full([7, 8, 9], 1, (1, 3, 56, 56)))
    assert varying(labels) == (1,)
    assert stored(labels) == 3


def test_varying_ignores_axes_of_one_element() -> None:
    assert varying(along(torch.tensor([7]), 1, (1, 1, 4, 4))) == ()


def test_compact_keeps_the_axes_asked_for() -> None:
    labels = along(torch.tensor([1, 2]), 1, (3, 2, 4, 5))
    assert compact(labels).shape == (1, 2, 1, 1)
    assert compact(labels, keep=(2,)).shape == (1, 2, 4, 1)


def test_canonical_broadcasts_what_is_constant() -> None:
    labels = canonical(full([4, 5, 6], 1, (1, 3, 8, 8)))
    assert torch.equal(labels, full([4, 5, 6], 1, (1, 3, 8, 8)))
    assert stored(labels) == 3


def test_canonical_keeps_what_differs() -> None:
    labels = torch.arange(24).reshape(1, 2, 3, 4)
    assert torch.equal(canonical(labels), labels)
    assert stored(canonical(labels)) == 24


@pytest.mark.parametrize("axis", [1, -3])
def test_concatenate_stays_broadcast(axis: int) -> None:
    parts = [along(torch.tensor(v), 1, (1, len(v), 8, 8)) for v in ([1, 2], [3], [1, 2])]
    joined = concatenate(parts, axis)
    assert torch.equal(joined, full([1, 2, 3, 1, 2], 1, (1, 5, 8, 8)))
    assert stored(joined) == 5


def test_concatenate_along_a_plane() -> None:
    a, b = (along(torch.tensor(v), 1, (1, 2, 4, 4)) for v in ([1, 2], [3, 4]))
    assert torch.equal(concatenate([a, b], 2), torch.cat([a, b], 2))


@pytest.mark.slow
@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(
            st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=60)
        )
    )
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_components_are_the_smallest_members(case: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = case
    expected = list(range(count))
    for _ in range(count):  # the slow way: spread the smaller label until nothing changes
        for a, b in edges:
            expected[a] = expected[b] = min(expected[a], expected[b])
    a, b = (np.array([e[i] for e in edges], np.int64) for i in (0, 1))
    assert components(count, a, b).tolist() == expected


def test_components_of_a_long_chain() -> None:
    count = 100_000
    shuffled = np.random.default_rng(0).permutation(count)
    assert not components(count, shuffled[:-1], shuffled[1:]).any()


@given(
    shape=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    data=st.data(),
)
def test_concatenated_labels_are_torchs(shape: list[int], sizes: list[int], data: st.DataObject) -> None:
    """Broadcast along any axes or none, of any sizes, nothing among them."""
    axis = data.draw(st.integers(0, len(shape) - 1))
    parts = []
    for i, size in enumerate(sizes):
        whole = [*shape[:axis], size, *shape[axis + 1 :]]
        thin = [min(n, 1) if data.draw(st.booleans()) else n for n in whole]
        parts.append(torch.arange(1, math.prod(thin) + 1).reshape(thin).mul(i + 1).expand(whole))
    assert torch.equal(concatenate(parts, axis), torch.cat(parts, axis))
