"""Least squares from sums, against `torch.linalg.lstsq` with the ridge written out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphcomp.errors import AnalysisError
from graphcomp.ir import encode
from graphcomp.ir.coefficients import decode
from graphcomp.measure import (
    Moments,
    Normal,
    Positions,
    matrix,
    outputs_at,
    patches_at,
    regression,
    root,
    row_space,
)
from tests.fitting import dense

RIDGE = 1e-2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(a: Tensor, t: Tensor, parts: int = 3, *, intercept: bool = True) -> Moments:
    """Of rows `[n, g, K]` and targets `[n, g, o]`, in several batches."""
    shifts = (a[:7].mean(0), t[:7].mean(0)) if intercept else (0 * a[0], 0 * t[0])
    sums = Moments(*shifts)
    for x, y in zip(a.chunk(parts), t.chunk(parts), strict=True):
        sums.add(x, y)
    return sums


def check(a: Tensor, t: Tensor, w0: Tensor, *, intercept: bool, tolerance: float = 1e-9) -> None:
    found = moments(a, t, intercept=intercept).centred(intercept)
    w = found.solve(w0, found.factor(RIDGE))
    b = found.bias(w)
    errors = found.error(w, b)
    for g in range(a.shape[1]):
        expected, offset = dense(a[:, g], t[:, g], w0[g], RIDGE, intercept=intercept)
        size = float(expected.abs().max())
        assert torch.allclose(w[g], expected, rtol=0, atol=tolerance * size)
        assert torch.allclose(b[g], offset, rtol=tolerance, atol=tolerance * size)
        rest = t[:, g].double() - a[:, g].double() @ w[g].T - b[g]
        assert torch.allclose(errors[g], rest.square().mean(0), rtol=max(tolerance, 1e-8))


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1), normal(30, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, 3, padding=1, dilation=2), normal(30, 4, 7, 7)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2), normal(30, 2, 4, 4, 4)),
    "grouped": lambda: (nn.Conv2d(6, 4, 3, groups=2), normal(30, 6, 6, 6)),
    "depthwise": lambda: (nn.Conv2d(5, 10, 3, groups=5, padding=1), normal(30, 5, 6, 6)),
    "transposed": lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), normal(30, 4, 4, 4)),
    "linear": lambda: (nn.Linear(8, 5), normal(100, 8)),
    "tokens": lambda: (nn.Linear(8, 5), normal(30, 6, 8)),
}


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_kind_of_layer(name: str, intercept: bool) -> None:
    """On inputs whose mean is far from zero, towards targets that no weights reach."""
    layer, x = LAYERS[name]()
    layer, x = layer.double(), x + 3
    y = layer(x)
    plane = y[0].numel() // y.shape[-1 if isinstance(layer, nn.Linear) else 1]
    at = Positions(8, 0).of(plane, 0, len(x))
    a, w = patches_at(layer, x, at), matrix(layer)
    t = outputs_at(layer, y, at)
    t = (t.square() + normal(*t.shape, seed=1)).reshape(len(t), w.shape[0], -1)
    check(a, t, w, intercept=intercept)
    check(a.float(), t.float(), w, intercept=intercept, tolerance=2e-5)


def test_what_a_layer_computes_is_found_again() -> None:
    """Without a ridge, from weights that have nothing to do with it."""
    a, w, b = normal(400, 1, 6), normal(4, 6, seed=1), normal(4, seed=2)
    t = (a[:, 0] @ w.T + b).unsqueeze(1)
    found = moments(a, t).centred()
    new = found.solve(torch.zeros(1, 4, 6, dtype=torch.float64), found.factor(0))
    assert torch.allclose(new[0], w, atol=1e-8) and torch.allclose(found.bias(new)[0], b, atol=1e-8)
    assert float(found.error(new, found.bias(new)).max()) < 1e-12


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    """In float32, with means a thousand times the deviation."""
    a, t = normal(2000, 1, 8) + 1000, normal(2000, 1, 2, seed=1) - 500
    t += a[:, :, :2]
    check(a.float(), t.float(), torch.zeros(1, 2, 8, dtype=torch.float64), intercept=True, tolerance=1e-3)


def test_halves_add_up() -> None:
    a, t = normal(50, 2, 4), normal(50, 2, 3, seed=1)
    whole, first, second = Moments(a[0], t[0]), Moments(a[0], t[0]), Moments(a[0], t[0])
    whole.add(a, t)
    first.add(a[:20], t[:20])
    second.add(a[20:], t[20:])
    for x, y in zip(whole.sums, first.plus(second).sums, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("intercept", [True, False])
def test_few_rows_are_solved_in_the_space_of_them(intercept: bool) -> None:
    """The same weights as of all columns, and the same errors; a copy of a row adds nothing."""
    a, t, zeros = normal(20, 2, 64) + 3, normal(20, 2, 5, seed=1), torch.zeros(5, 64, dtype=torch.float64)
    a[7] = a[3]
    space = row_space(a)
    rows = torch.einsum("ngk,gkm->ngm", a, space)
    found = moments(rows, t, intercept=intercept).centred(intercept, columns=64)
    w = found.solve(torch.zeros(2, 5, 20, dtype=torch.float64), found.factor(RIDGE))
    errors = found.error(w, found.bias(w))
    for g, whole in enumerate(w @ space.transpose(1, 2)):
        expected, offset = dense(a[:, g], t[:, g], zeros, RIDGE, intercept=intercept)
        assert torch.allclose(whole, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
        assert torch.allclose(found.bias(w)[g], offset, rtol=1e-9, atol=1e-9)
        rest = t[:, g] - a[:, g] @ expected.T - offset
        assert torch.allclose(errors[g], rest.square().mean(0), rtol=1e-6)


@pytest.mark.parametrize("intercept", [True, False])
def test_pooled_rows_are_those_of_both(intercept: bool) -> None:
    a, t = normal(50, 2, 4) + 2, normal(50, 2, 3, seed=1)
    one, other, whole = (
        moments(x, y, intercept=intercept).centred(intercept)
        for x, y in ((a[:20], t[:20]), (a[20:], t[20:]), (a, t))
    )
    pooled = one.pooled(other)
    for name in ("gram", "cross", "power", "mean_a", "mean_t", "rows"):
        found, expected = (torch.as_tensor(getattr(n, name)) for n in (pooled, whole))
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("block", [1, 3, 8])
def test_products_in_blocks_are_whole(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, t = normal(50, 2, 8), normal(50, 2, 3, seed=1)
    expected = moments(a, t).centred().gram
    monkeypatch.setattr(regression, "BLOCK", block)
    found = moments(a, t).centred().gram
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12) and torch.equal(found, found.mT)


def test_other_targets_for_the_same_rows() -> None:
    a, t, other = normal(50, 2, 4), normal(50, 2, 3, seed=1), normal(50, 2, 3, seed=2)
    again = moments(a, t).without_targets()
    for x, y in zip(a.chunk(4), other.chunk(4), strict=True):
        again.retarget(x, y)
    expected = Moments(again.shift_a, again.shift_t)
    expected.add(a, other)
    expected.aa = again.aa
    for x, y in zip(again.sums, expected.sums, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


def test_t9_5_inputs_that_say_nothing() -> None:
    """All of them constant, or some: weights stay where nothing is learned, and nothing is divided by 0."""
    w0 = normal(1, 3, 4, seed=1)
    a, t = torch.ones(40, 1, 4, dtype=torch.float64), normal(40, 1, 3)
    found = moments(a, t).centred()
    w = found.solve(w0, found.factor(1e-3))
    assert torch.allclose(w, w0) and torch.allclose(found.bias(w)[0], t[:, 0].mean(0) - w0[0].sum(1))
    a = normal(40, 1, 4)
    a[:, :, 2] = 5.0
    found = moments(a, t).centred()
    w = found.solve(w0, found.factor(1e-3))
    assert torch.allclose(w[:, :, 2], w0[:, :, 2]) and w.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_say_the_same(dtype: torch.dtype) -> None:
    """Copies of one input, and no ridge: what rounding leaves of the Gram matrix may be anything."""
    a = normal(200, 1, 2).repeat(1, 1, 8).to(dtype) * 100
    t = a[:, :, :3]
    found = moments(a, t).centred()
    w = found.solve(torch.zeros(1, 3, 16, dtype=torch.float64), found.factor(0))
    assert w.isfinite().all() and float((found.error(w, found.bias(w)) / found.power).max()) < 1e-6


def test_what_is_not_finite_is_an_error() -> None:
    a = normal(40, 1, 4)
    a[3, 0, 2] = float("nan")
    with pytest.raises(AnalysisError, match="not finite"):
        moments(a, normal(40, 1, 3)).centred().factor(1e-3)


def subspace(found: Normal, w0: Tensor, ridge: float, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """`solve_within` by the dense normal equations of the subspace's coordinates."""
    unit = torch.eye(w0.numel(), dtype=torch.float64).reshape(-1, *w0.shape)
    images = torch.stack([nearest(x).flatten() for x in unit])
    vectors, values, _ = torch.linalg.svd(images.T)
    q = vectors[:, values > 0.5]
    level = ridge * found.gram.diagonal(dim1=1, dim2=2).mean(1)
    product = torch.stack(
        [
            (x.reshape(w0.shape) @ found.gram + level.reshape(-1, 1, 1) * x.reshape(w0.shape)).flatten()
            for x in q.T
        ]
    )
    right = (found.cross.transpose(1, 2) - w0 @ found.gram).flatten()
    return w0 + (q @ torch.linalg.solve(product @ q, q.T @ right)).reshape(w0.shape)


@pytest.mark.parametrize("basis", ["dct", "standard"])
@pytest.mark.parametrize(("rows", "terms"), [(1, 7), (3, 4), (6, 2), (2, 12), (24, 1)])
def test_within_a_subspace(rows: int, terms: int, basis: str) -> None:
    """Weights of which a few coefficients of reordered columns are free."""
    groups, outputs, k = 2, 3, 4
    order = torch.randperm(24 // rows, generator=torch.Generator().manual_seed(3))
    index = order.argsort()

    def nearest(w: Tensor) -> Tensor:
        stored = encode(w, rows, terms, order, basis)  # type: ignore[arg-type]
        return decode(stored, 24 // rows, index, basis).reshape(w.shape)  # type: ignore[arg-type]

    a, t = normal(60, groups, k) + 1, normal(60, groups, outputs, seed=1)
    found, w0 = moments(a, t).centred(), nearest(normal(groups, outputs, k, seed=2))
    w = found.solve_within(w0, RIDGE, nearest)
    assert torch.allclose(nearest(w), w, atol=1e-12)
    assert torch.allclose(w, subspace(found, w0, RIDGE, nearest), atol=1e-7)


@pytest.mark.slow
def test_t9_7_many_columns_in_single_precision() -> None:
    """4,608 of them, correlated as maps behind a ReLU are, with a mean; float32 against float64."""
    rows, columns = 6000, 4608
    mix = normal(64, columns, seed=1)
    a = ((normal(rows, 64) @ mix + normal(rows, columns, seed=2)).relu() + 0.5).unsqueeze(1)
    t = (a[:, 0] @ normal(columns, 8, seed=3) / columns**0.5 + normal(rows, 8, seed=4)).unsqueeze(1)
    w0 = normal(1, 8, columns, seed=5) / columns**0.5
    exact, single = moments(a, t).centred(), moments(a.float(), t.float()).centred()
    w, v = (x.solve(w0, x.factor(1e-3)) for x in (exact, single))
    assert float((w - v).norm() / (w - w0).norm()) < 1e-3
    errors, expected = exact.error(v, single.bias(v)), exact.error(w, exact.bias(w))
    assert torch.allclose(errors, expected, rtol=1e-4)  # kernels of AVX-512 add up in another order


def test_roots_of_what_rounding_left_indefinite() -> None:
    """As little is added as that takes, to those that need it; others are as they were."""
    x = normal(6, 1, 3)[:, 0]
    good, copies = x.T @ x, torch.ones(3, 3, dtype=torch.float64) - 1e-13 * torch.eye(3, dtype=torch.float64)
    zero = torch.zeros(3, 3, dtype=torch.float64)
    matrices = torch.stack([good, copies, zero])
    found = root(matrices)
    assert torch.equal(found[0], torch.linalg.cholesky(good))
    assert torch.allclose(found @ found.mT, matrices, rtol=0, atol=1e-10)
    with pytest.raises(AnalysisError, match="not finite"):
        root(matrices * torch.inf)
