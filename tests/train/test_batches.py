"""Batches: every sample once an epoch, sizes alike, and nothing but seed and step decides."""

import threading
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcomp.base import distributed
from graphcomp.data.augment import Augmentation, CropAndFlip, Unchanged
from graphcomp.train.batches import Batches, Piece, ahead, noise_seed, part
from tests.learnable import make_split


def batches(samples: int, batch: int, pieces: int = 1, seed: int = 0) -> Batches:
    return Batches(make_split(samples), batch, pieces, Unchanged(), seed)


@given(samples=st.integers(1, 200), batch=st.integers(1, 70), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_sample_once_an_epoch(samples: int, batch: int, epoch: int) -> None:
    made = batches(samples, batch)
    steps = range(epoch * made.per_epoch, (epoch + 1) * made.per_epoch)
    rows = [made.rows(s).tolist() for s in steps]
    assert sorted(chain.from_iterable(rows)) == list(range(samples))
    sizes = {len(r) for r in rows}
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1


@given(count=st.integers(0, 100), parts=st.integers(1, 12))
def test_parts_are_a_partition(count: int, parts: int) -> None:
    cuts = [range(count)[part(count, parts, i)] for i in range(parts)]
    assert list(chain.from_iterable(cuts)) == list(range(count))
    assert max(map(len, cuts)) - min(map(len, cuts)) <= 1


def test_order_changes_with_epoch_and_seed() -> None:
    made = batches(50, 50)
    first, second, other = made.rows(0), made.rows(1), batches(50, 50, seed=1).rows(0)
    assert not np.array_equal(first, second) and not np.array_equal(first, other)
    assert np.array_equal(first, batches(50, 50).rows(0))


def test_pieces_together_are_the_step() -> None:
    """However a step is cut, its samples get the same random changes and weigh the same."""
    split = make_split(30)
    whole, pieces = (Batches(split, 10, n, CropAndFlip(2), 0)(4) for n in (1, 3))
    assert [len(p.labels) for p in pieces] == [3, 3, 4]
    assert torch.equal(torch.cat([p.inputs[0] for p in pieces]), whole[0].inputs[0])
    assert torch.equal(torch.cat([p.labels for p in pieces]), whole[0].labels)
    assert sum(p.share for p in pieces) == pytest.approx(1)
    assert whole[0].share == 1


def test_processes_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    split, found = make_split(31), list[Piece]()
    alone = Batches(split, 11, 1, CropAndFlip(2), 0)(2)[0]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found += Batches(split, 11, 1, CropAndFlip(2), 0)(2)
    assert torch.equal(torch.cat([p.inputs[0] for p in found]), alone.inputs[0])
    assert sum(p.share for p in found) == pytest.approx(1)


def test_a_step_is_the_same_whatever_ran_before() -> None:
    augmentation: Augmentation = CropAndFlip(2)
    made = Batches(make_split(30), 10, 1, augmentation, 5)
    for step in range(7):
        made(step)
    direct = Batches(make_split(30), 10, 1, augmentation, 5)(7)[0]
    assert torch.equal(made(7)[0].inputs[0], direct.inputs[0])


def test_augmentation_changes_from_epoch_to_epoch() -> None:
    made = Batches(make_split(8), 8, 1, CropAndFlip(2), 0)
    by_sample = [dict(zip(made.rows(s).tolist(), made(s)[0].inputs[0], strict=True)) for s in (0, 1)]
    assert any(not torch.equal(by_sample[0][i], by_sample[1][i]) for i in range(8))


def test_noise_differs_by_step_and_seed() -> None:
    assert len({noise_seed(seed, step) for seed in range(10) for step in range(10)}) == 100


def test_reading_ahead_keeps_the_order() -> None:
    here, places = threading.current_thread(), list[bool]()

    def make(step: int) -> int:
        places.append(threading.current_thread() is here)
        return step * step

    assert list(ahead(make, range(5), threaded=True)) == [0, 1, 4, 9, 16]
    assert list(ahead(make, range(5), threaded=False)) == [0, 1, 4, 9, 16]
    assert places == [False] * 5 + [True] * 5
    assert list(ahead(make, [], threaded=True)) == []


def test_an_error_ahead_comes_when_its_step_is_due() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("image 2")
        return step

    steps = ahead(make, range(4), threaded=True)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(ValueError, match="image 2"):
        next(steps)
