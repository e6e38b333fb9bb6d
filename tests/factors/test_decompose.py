"""Weights as products: best approximations, their norms, and what they cost (METHODS 1.1, 1.4)."""

import math
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from graphcomp.errors import SurgeryError
from graphcomp.factors.decompose import (
    Factor,
    Kind,
    approximate,
    break_even,
    compose,
    decompose,
    energies,
    full_ranks,
    macs_after,
    params_after,
    ranks,
    read_factors,
    unfold,
)

KINDS: tuple[Kind, ...] = get_args(Kind)
SHAPES = [(6, 5, 3, 3), (4, 9, 2, 5), (12, 2, 3, 1), (3, 40, 1, 3)]


def weight_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(n: int, columns: int, values: list[float]) -> Tensor:
    """A matrix of these singular values, well separated so that every rank has one answer."""
    u, _ = torch.linalg.qr(weight_of(n, n))
    v, _ = torch.linalg.qr(weight_of(columns, columns, seed=1))
    k = len(values)
    s: Tensor = torch.diag(torch.tensor(values, dtype=torch.float64))
    return u[:, :k] @ s @ v[:, :k].T  # type: ignore[no-any-return]


def tails(matrix: Tensor, rank: int) -> float:
    return float((torch.linalg.svdvals(matrix)[rank:] ** 2).sum())


# ---------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((16, 16, 3, 3), 14.4),
        ((32, 32, 3, 3), 28.8),
        ((64, 64, 3, 3), 57.6),
        ((32, 16, 3, 3), 26.18),
        ((64, 32, 3, 3), 52.36),
        ((256, 64, 1, 1), 51.2),
        ((64, 256, 1, 1), 51.2),
    ],
)
def test_g1_2_and_t1_8_break_even(shape: tuple[int, ...], rank: float) -> None:
    """G1.2; T1.8: the 1x1 convolution behind counts, so most ranks cost more than one weight."""
    assert break_even(shape) == pytest.approx(rank, abs=0.005)
    below, above = (
        macs_after(shape, Factor(layer="x", rank=r), (8, 8)) for r in (math.floor(rank), math.ceil(rank))
    )
    assert below < macs_after(shape, Factor(layer="x"), (8, 8)) < above


def test_break_even_of_kept_channels() -> None:
    """c' = 10 of 16: 16 * 90 / (90 + 16)."""
    assert break_even((16, 16, 3, 3), kept=10) == pytest.approx(1440 / 106)


def test_costs_by_hand() -> None:
    """METHODS 1.1, n = 8, c = 6 of which 4 are read, 3 x 3, 10 x 10 -> 5 x 5."""
    shape, out, into = (8, 6, 3, 3), (5, 5), (10, 10)
    keep = [0, 2, 3, 5]
    assert macs_after(shape, Factor(layer="x", keep=keep), out) == 8 * 4 * 9 * 25
    assert macs_after(shape, Factor(layer="x", keep=keep, rank=3), out) == 3 * (4 * 9 + 8) * 25
    spatial = Factor(layer="x", keep=keep, rank=3, kind="spatial")
    assert macs_after(shape, spatial, out, into) == 3 * 4 * 3 * (5 * 10) + 8 * 3 * 3 * (5 * 5)
    tucker = Factor(layer="x", keep=keep, rank=3, kind="tucker2", rank_in=2)
    assert macs_after(shape, tucker, out, into) == 2 * 4 * 100 + 3 * 2 * 9 * 25 + 8 * 3 * 25
    with pytest.raises(ValueError, match="found no input plane"):
        macs_after(shape, tucker, out)
    assert [params_after(shape, f) for f in (spatial, tucker)] == [3 * 12 + 72, 8 + 54 + 24]


@pytest.mark.parametrize("kind", KINDS)
def test_params_are_those_of_the_factors(kind: Kind) -> None:
    factor = Factor(layer="x", keep=[0, 1, 4], rank=2, kind=kind)
    made = decompose(weight_of(6, 5, 3, 3)[:, [0, 1, 4]], factor)
    assert params_after((6, 5, 3, 3), factor) == sum(w.numel() for w in made)
    assert params_after((6, 5, 3, 3), Factor(layer="x", keep=[0, 1, 4])) == 6 * 3 * 9


# ---------------------------------------------------------------------- approximations


@pytest.mark.parametrize("kind", ["svd", "spatial"])
@pytest.mark.parametrize("shape", SHAPES)
def test_t1_10_best_approximation_of_the_kept_columns(kind: Kind, shape: tuple[int, ...]) -> None:
    """T1.10: the squared error is the tail of the spectrum of the original W[:, K], for every rank."""
    weight, keep = weight_of(*shape), list(range(0, shape[1], 2))
    (matrix,) = unfold(weight[:, keep], kind)
    for rank in range(1, full_ranks(weight[:, keep].shape, kind)[0] + 1):
        found = approximate(weight, Factor(layer="x", keep=keep, rank=rank, kind=kind))
        error = float(((found - weight)[:, keep] ** 2).sum())
        assert error == pytest.approx(tails(matrix, rank), rel=1e-9, abs=1e-20)
        assert torch.linalg.matrix_rank(unfold(found, kind)[0]) == rank


def test_linear_weights_are_matrices() -> None:
    weight = with_spectrum(5, 7, [5.0, 3.0, 1.0, 0.5])
    found = approximate(weight, Factor(layer="x", rank=2))
    assert float((found - weight).square().sum()) == pytest.approx(1.25)
    first, last = decompose(weight, Factor(layer="x", rank=2))
    assert (tuple(first.shape), tuple(last.shape)) == ((2, 7), (5, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_tucker2_is_the_truncated_hosvd(shape: tuple[int, ...]) -> None:
    """The squared error is no more than both tails together and no less than the larger one."""
    weight = weight_of(*shape)
    over_n, over_c = unfold(weight, "tucker2")
    for rank in (1, 2, 3):
        for rank_in in (1, 2):
            factor = Factor(layer="x", rank=rank, kind="tucker2", rank_in=rank_in)
            effective, effective_in = ranks(shape, factor)
            error = float((approximate(weight, factor) - weight).square().sum())
            both = tails(over_n, effective), tails(over_c, effective_in)
            assert max(both) * (1 - 1e-9) <= error <= sum(both) * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_weight(kind: Kind, shape: tuple[int, ...]) -> None:
    weight = weight_of(*shape)
    factor = Factor(layer="x", rank=10_000, kind=kind)  # clipped
    assert (approximate(weight, factor) - weight).abs().max() < 1e-12
    assert ranks(shape, factor) == full_ranks(shape, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_approximating_twice_changes_nothing(kind: Kind) -> None:
    weight = weight_of(6, 5, 3, 3)
    factor = Factor(layer="x", keep=[1, 2, 4], rank=3, kind=kind, rank_in=2 if kind == "tucker2" else None)
    once = approximate(weight, factor)
    assert (approximate(once, factor) - once).abs().max() < 1e-13
    assert (compose(decompose(once[:, [1, 2, 4]], factor), kind) - once[:, [1, 2, 4]]).abs().max() < 1e-13


@pytest.mark.parametrize("gone", [(0, 2, 5), (5, 2, 0), (2, 5, 0)])
def test_t1_9_the_other_entries_of_a_diagonal_stay(gone: tuple[int, ...]) -> None:
    """T1.9: the smallest entries stand at 0, 2 and 5, wherever; the spectrum left is that of the others."""
    small = dict(zip(gone, (0.1, 0.2, 0.3), strict=True))
    entries = torch.tensor([small.get(i, float(i + 2)) for i in range(7)], dtype=torch.float64)
    found = approximate(torch.diag(entries), Factor(layer="x", rank=4))
    entries[list(gone)] = 0
    assert torch.allclose(found, torch.diag(entries), atol=1e-14)


def test_t1_9_a_removed_channel_takes_its_direction_along() -> None:
    """K leaves out the largest entry: the two best directions are those of the columns that are left."""
    weight = torch.diag(torch.tensor([9.0, 1.0, 5.0, 3.0], dtype=torch.float64))
    found = approximate(weight, Factor(layer="x", keep=[1, 2, 3], rank=2))
    assert torch.allclose(found, torch.diag(torch.tensor([0.0, 0.0, 5.0, 3.0], dtype=torch.float64)))


@pytest.mark.parametrize("kind", KINDS)
def test_t1_11_all_factors_have_the_same_norm(kind: Kind) -> None:
    """T1.11: not all of the scale in one of them."""
    norms = [
        float(w.norm()) for w in decompose(1e6 * weight_of(6, 5, 3, 3), Factor(layer="x", rank=3, kind=kind))
    ]
    assert norms == pytest.approx([norms[0]] * len(norms))


def test_t1_11_which_is_the_root_of_the_kept_singular_values() -> None:
    weight = with_spectrum(6, 10, [4.0, 3.0, 2.0, 1.0])
    for w in decompose(weight, Factor(layer="x", rank=3)):
        assert float(w.norm()) == pytest.approx(math.sqrt(4 + 3 + 2))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: Kind) -> None:
    for w in decompose(torch.zeros(4, 3, 3, 3), Factor(layer="x", rank=2, kind=kind)):
        assert not w.isnan().any()
    assert not approximate(torch.zeros(4, 3, 3, 3), Factor(layer="x", rank=2, kind=kind)).any()


def test_t1_13_the_weight_is_left_as_it_was() -> None:
    """T1.13: no view of it is written to, and the type is kept."""
    weight = weight_of(6, 5, 3, 3).float()
    before = weight.clone()
    for factor in (Factor(layer="x", keep=[0, 3]), Factor(layer="x"), Factor(layer="x", keep=[1], rank=1)):
        found = approximate(weight, factor)
        found.zero_()
        assert found.dtype == torch.float32
        assert torch.equal(weight, before)


def test_only_the_kept_columns_are_read() -> None:
    """What stands outside of K has no influence: large entries there do not pull the factors."""
    weight = weight_of(6, 5, 3, 3)
    factor = Factor(layer="x", keep=[0, 3], rank=2)
    found = approximate(weight, factor)
    weight[:, [1, 2, 4]] = 1e3
    assert torch.equal(approximate(weight, factor), found)
    assert not found[:, [1, 2, 4]].any()


@pytest.mark.parametrize("shape", [(4, 30), (30, 4), (7, 7)])
def test_energies_are_squared_singular_values(shape: tuple[int, int]) -> None:
    matrix = weight_of(*shape)
    assert torch.allclose(energies(matrix.float()), torch.linalg.svdvals(matrix.float().double()) ** 2)
    assert energies(torch.zeros(shape)).tolist() == [0.0] * min(shape)


# ---------------------------------------------------------------------- ranks and records


def test_full_ranks() -> None:
    """r = min(n, c k), not min(n, c kh) as in the authors' first release."""
    assert full_ranks((64, 3, 7, 7)) == (64,)
    assert full_ranks((64, 3, 7, 7), "spatial") == (21,)
    assert full_ranks((64, 3, 7, 7), "tucker2") == (64, 3)
    assert full_ranks((10, 64)) == (10,)
    assert full_ranks((100, 5, 3)) == (15,)


def test_ranks_of_tucker2_are_clipped_by_each_other() -> None:
    """A core of 3 x 3 taps makes no more than 9 channels of one, and needs no more than 9 for one."""
    one_in = Factor(layer="x", rank=50, kind="tucker2", rank_in=1)
    one_out = Factor(layer="x", rank=1, kind="tucker2", rank_in=50)
    assert ranks((64, 64, 3, 3), one_in) == (9, 1)
    assert ranks((64, 64, 3, 3), one_out) == (1, 9)
    weight = weight_of(64, 64, 3, 3)
    full_out = approximate(weight, one_in.model_copy(update={"rank": 64}))
    assert torch.allclose(approximate(weight, one_in), full_out, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": []}, "increasing channels, at least one"),
        ({"keep": [2, 1]}, "found keep .2, 1."),
        ({"keep": [1, 1]}, "increasing"),
        ({"keep": [-1, 2]}, "increasing"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"rank": 2, "rank_in": 2}, "only for tucker2"),
        ({"kind": "tucker2", "rank_in": 2}, "beside a rank"),
        ({"kind": "cp"}, "svd"),
        ({"ranks": 3}, "Extra inputs"),
    ],
)
def test_invalid_factors(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Factor.model_validate({"layer": "x", **fields})
    with pytest.raises(SurgeryError, match="expected a list of factors"):
        read_factors({"factors": [{"layer": "x", **fields}]})


def test_factors_are_json() -> None:
    factors = [Factor(layer="a.b", keep=[0, 2], rank=3), Factor(layer="c", rank=4, kind="tucker2", rank_in=2)]
    assert read_factors({"factors": [f.model_dump(mode="json") for f in factors]}) == factors
    with pytest.raises(SurgeryError, match="found no factors"):
        read_factors({"rows": {}})
    with pytest.raises(SurgeryError, match="expected a list of factors"):
        read_factors({"factors": None})
