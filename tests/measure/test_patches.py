"""Layers as products with a matrix: every kind, at sampled positions, against what the layer computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcomp.ir import DctConv2d, DctLinear
from graphcomp.measure import (
    Positions,
    as_weight,
    is_linear,
    is_mixing,
    matrix,
    matrix_shape,
    outputs_at,
    patches_at,
)

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
COUNT = 5
"""Positions a map."""

Built = tuple[nn.Module, Tensor]


def at_of(module: nn.Module, y: Tensor, maps: int) -> Tensor:
    """Positions drawn for an output, by its shape alone."""
    plane = y.shape[:-1].numel() // maps if is_linear(module) else y.shape[2:].numel()
    return Positions(COUNT, 0).of(plane, 0, maps)


def by_hand(module: nn.Module, y: Tensor, at: Tensor) -> Tensor:
    """`outputs_at` one position after the other."""
    rows = []
    for i, places in enumerate(at.tolist()):
        for place in places:
            if is_linear(module):
                rows.append(y.reshape(-1, y.shape[-1])[i * (y.shape[:-1].numel() // len(at)) + place])
            else:
                rows.append(y[i].reshape(y.shape[1], -1)[:, place])
    return torch.stack(rows)


@torch.no_grad()
def check(module: nn.Module, x: Tensor, maps: int = 2) -> None:
    """What the layer yields at sampled positions is its matrix times what it reads there."""
    y = module(x)
    at = at_of(module, y, maps)
    expected = by_hand(module, y, at)
    assert torch.equal(outputs_at(module, y, at), expected)
    a, w = patches_at(module, x, at), matrix(module)
    assert w.shape == matrix_shape(module) and a.shape == (at.numel(), w.shape[0], w.shape[2])
    found = torch.einsum("ngk,gok->ngo", a, w).flatten(1)
    bias = getattr(module, "bias", None)
    found = found if bias is None else found + bias
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def check_weight(module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    assert torch.equal(as_weight(module, matrix(module)), weight)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sizes(dims: int, low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(low, high)] * dims)


@st.composite
def convolutions(draw: st.DrawFn) -> Built:
    """A convolution over 1, 2 or 3 dimensions with anything that it can have, and an input."""
    dims = draw(st.integers(1, 3))
    groups, inner, outer = (draw(st.integers(1, 3)) for _ in range(3))
    stride = draw(sizes(dims, 1, 3))
    same = all(s == 1 for s in stride) and draw(st.booleans())
    module = CONVOLUTION[dims](
        groups * inner,
        groups * outer,
        draw(sizes(dims, 1, 3)),
        stride=stride,
        padding=draw(st.sampled_from(["same", "valid"])) if same else draw(sizes(dims, 0, 2)),
        dilation=draw(sizes(dims, 1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    return module, normal(2, groups * inner, *draw(sizes(dims, 5, 7)))


@st.composite
def transposed(draw: st.DrawFn) -> Built:
    dims = draw(st.integers(1, 3))
    groups, inner, outer = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, stride, dilation = draw(sizes(dims, 1, 3)), draw(sizes(dims, 1, 3)), draw(sizes(dims, 1, 2))
    more = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    options: dict[str, Any] = {
        "stride": stride,
        "padding": draw(sizes(dims, 0, 2)),
        "output_padding": tuple(more),
        "groups": groups,
        "dilation": dilation,
        "bias": draw(st.booleans()),
    }
    module = TRANSPOSED[dims](groups * inner, groups * outer, kernel, dtype=torch.float64, **options)
    return module, normal(2, groups * inner, *draw(sizes(dims, 5, 6)))


@st.composite
def linear(draw: st.DrawFn) -> Built:
    """On vectors, tokens or maps whose channels are last."""
    inner, outer = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    module = nn.Linear(inner, outer, bias=draw(st.booleans()), dtype=torch.float64)
    return module, normal(2, *draw(st.lists(st.integers(1, 4), max_size=3)), inner)


@st.composite
def dct_layers(draw: st.DrawFn) -> Built:
    """Any rows, terms, order and basis."""
    kinds: list[Callable[..., nn.Module]] = [DctConv2d, DctLinear]
    make = draw(st.sampled_from(kinds))
    groups = draw(st.integers(1, 2))
    options: dict[str, Any] = {
        "bias": draw(st.booleans()),
        "basis": draw(st.sampled_from(["dct", "standard"])),
        "reordered": draw(st.booleans()),
    }
    if make is DctConv2d:
        kernel = draw(sizes(2, 1, 3))
        shape: tuple[int, ...] = (2 * groups, draw(st.integers(1, 3)), *kernel)
        options |= {"groups": groups, "padding": draw(sizes(2, 0, 1)), "stride": draw(sizes(2, 1, 2))}
        arguments: tuple[Any, ...] = (shape[1] * groups, shape[0], kernel)
        x = normal(2, shape[1] * groups, 5, 5)
    else:
        shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)))
        arguments = (shape[1], shape[0])
        x = normal(2, 3, shape[1])
    count = torch.Size(shape).numel()
    options["rows"] = draw(st.sampled_from([r for r in range(1, count + 1) if count % r == 0]))
    options["terms"] = draw(st.integers(1, count // options["rows"]))
    module = make(*arguments, **options).double()
    filled = {name: normal(*t.shape, seed=1) for name, t in module.named_parameters()}
    if options["reordered"]:
        index = module.index
        assert isinstance(index, Tensor)
        places = torch.randperm(len(index), generator=torch.Generator().manual_seed(2))
        filled["index"] = places.to(index.dtype)
    module.load_state_dict(filled)
    return module, x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_convolutions(built: Built) -> None:
    check(*built)
    check_weight(built[0])


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(transposed())
def test_transposed_convolutions(built: Built) -> None:
    check(*built)
    check_weight(built[0])


@settings(max_examples=50, deadline=None)
@given(linear())
def test_linear_layers(built: Built) -> None:
    check(*built)
    check_weight(built[0])


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(dct_layers())
def test_layers_of_coefficients(built: Built) -> None:
    check(*built)


def test_tokens_may_be_folded_into_the_batch() -> None:
    """A linear layer on [n * T, F] and on [T, n, F]: the maps are those of n samples."""
    module = nn.Linear(3, 4, dtype=torch.float64)
    check(module, normal(12, 3))
    check(module, normal(6, 2, 3))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(2, 2, 1),
        nn.ConvTranspose1d(2, 2, 1),
        nn.Linear(2, 2),
        DctLinear(2, 2),
        DctConv2d(2, 2, (1, 1)),
    ],
)
def test_what_mixes(module: nn.Module) -> None:
    assert is_mixing(module)


def test_what_does_not_mix() -> None:
    """Also a subclass: it may compute anything."""

    class Other(nn.Conv2d):
        pass

    assert not any(map(is_mixing, (Other(2, 2, 1), nn.Bilinear(2, 2, 2), nn.BatchNorm2d(2), nn.LSTM(2, 2))))


# ---- Positions


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99), st.integers(0, 2**32 - 1))
@example(64, 64, 0, 0)
def test_positions(size: int, count: int, first: int, seed: int) -> None:
    drawn = Positions(count, seed)
    at = drawn.of(size, first, 4)
    assert at.shape == (4, min(size, count)) and int(at.min()) >= 0 and int(at.max()) < size
    assert (at.diff(dim=1) > 0).all()
    halves = [drawn.of(size, first, 1), drawn.of(size, first + 1, 3)]
    assert torch.equal(at, torch.cat(halves)), "what a sample gets depends on its batch"
    assert torch.equal(at, Positions(count, seed).of(size, first, 4))


def test_positions_are_random() -> None:
    """Of samples, seeds and sizes; all positions of a map come up."""
    at = Positions(8, 0).of(32, 0, 100)
    assert len({tuple(row) for row in at.tolist()}) == 100
    assert not torch.equal(at, Positions(8, 1).of(32, 0, 100))
    counts = torch.bincount(at.flatten(), minlength=32)
    assert counts.min() > 10 and counts.max() < 45
