"""Coefficient layers: the transforms against their matrices, layers against those that they replace."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcomp.errors import LoadError, PassError, VerifyError
from graphcomp.ir import load, save
from graphcomp.ir.coefficients import (
    Basis,
    DctConv2d,
    DctLayer,
    DctLinear,
    compressed,
    dct,
    decode,
    encode,
    idct,
    narrowest,
    spectrum,
)
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.measure.cost import layer_rows, macs, params_order, params_state, params_trainable
from graphcomp.pipeline.verify import check, scrambled
from tests.tiny import traced

LENGTHS = [*range(1, 20), 31, 32, 45, 64, 97, 128]

# G4.5: two rows of four columns, and the place of the columns in their chain
TOY = torch.tensor([[0.5, -1.0, 0.4, 2.0], [0.1, 0.3, 0.2, -1.5]]).reshape(2, 4, 1, 1)
ORDER = torch.tensor([3, 0, 2, 1])
INDEX = torch.tensor([1, 3, 2, 0])
SPECTRUM = torch.tensor([[0.95, 1.986904, 0.05, 0.746466], [-0.45, -1.202966, -0.75, -0.421748]])


def basis(length: int) -> Tensor:
    """B of METHODS (4.3): the definition, a row a frequency."""
    k = torch.arange(length, dtype=torch.float64)[:, None]
    j = torch.arange(length, dtype=torch.float64)
    scale = torch.full((length, 1), math.sqrt(2 / length), dtype=torch.float64)
    scale[0] = math.sqrt(1 / length)
    return scale * torch.cos(math.pi * (2 * j + 1) * k / (2 * length))


# ---------------------------------------------------------------------- transforms


@pytest.mark.parametrize("length", LENGTHS)
def test_t4_1_the_fft_form_is_the_orthonormal_dct_2(length: int) -> None:
    """T4.1: the matrix of (4.3), not DCT-I or III and not unnormalised; B B^T = I."""
    b = basis(length)
    torch.testing.assert_close(b @ b.T, torch.eye(length, dtype=torch.float64))
    x = torch.randn(3, length, dtype=torch.float64)
    torch.testing.assert_close(dct(x), x @ b.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(idct(x, length), x @ b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_parseval_and_inverse_to_the_last_bits(length: int) -> None:
    x = torch.randn(3, length, dtype=torch.float64)
    y = dct(x)
    torch.testing.assert_close(y.square().sum(1), x.square().sum(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(idct(y, length), x, rtol=0, atol=1e-13)


def test_g4_6_of_ones_and_back() -> None:
    expected = torch.zeros(8)
    expected[0] = math.sqrt(8)  # 2.828427
    torch.testing.assert_close(dct(torch.ones(8)), expected, rtol=0, atol=1e-6)
    x = torch.randn(7)
    torch.testing.assert_close(idct(dct(x), 7), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("length", "terms"), [(1, 1), (2, 1), (5, 1), (9, 4), (12, 12), (16, 5)])
def test_missing_coefficients_are_zeros(length: int, terms: int) -> None:
    y = torch.randn(2, terms, dtype=torch.float64)
    torch.testing.assert_close(idct(y, length), y @ basis(length)[:terms], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_gradients(length: int) -> None:
    """METHODS 4.3: dL/dY is the first t columns of the DCT of dL/dx."""
    terms = max(1, length // 2)
    y = torch.randn(2, terms, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: idct(t, length), (y,))
    assert torch.autograd.gradcheck(dct, (torch.randn(2, length, dtype=torch.float64, requires_grad=True),))
    weights = torch.randn(2, length, dtype=torch.float64)
    (idct(y, length) * weights).sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, dct(weights)[:, :terms], rtol=0, atol=1e-12)


def test_t4_9_the_largest_layer_needs_no_matrix() -> None:
    """T4.9: N = 2,359,296 weights; the dense DCT matrix of M = 589,824 would take 2.8 TB."""
    x = torch.randn(4, 589_824)
    rebuilt = idct(dct(x.double()).float(), 589_824)
    assert float((rebuilt - x).abs().max()) < 1e-5


# ---------------------------------------------------------------------- Alg. 2 and 3


def test_g4_5_the_spectrum_of_the_toy() -> None:
    torch.testing.assert_close(spectrum(TOY, 2, ORDER), SPECTRUM, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("terms", "expected"), [(4, 0.0), (3, 0.094241), (2, 0.166677), (1, 0.858333)])
def test_g4_5_nsse_is_the_energy_beyond_t(terms: int, expected: float) -> None:
    rebuilt = decode(encode(TOY.double(), 2, terms, ORDER), 4, INDEX).reshape(TOY.shape)
    nsse = float((TOY - rebuilt).square().sum() / TOY.double().square().sum())
    assert nsse == pytest.approx(expected, abs=1e-6)
    y = spectrum(TOY.double(), 2, ORDER).square()
    assert nsse == pytest.approx(float(y[:, terms:].sum() / y.sum()), abs=1e-12)


def test_g4_5_without_order() -> None:
    rebuilt = decode(encode(TOY.double(), 2, 2, None), 4, None).reshape(TOY.shape)
    nsse = float((TOY - rebuilt).square().sum() / TOY.double().square().sum())
    assert nsse == pytest.approx(0.474221, abs=1e-6)


def test_t4_2_the_inverse_of_the_order_puts_columns_back() -> None:
    """T4.2: order and its inverse differ here, and only the inverse gives the weight at t = M."""
    y = encode(TOY.double(), 2, 4, ORDER)
    assert torch.argsort(ORDER).tolist() == INDEX.tolist()
    torch.testing.assert_close(decode(y, 4, INDEX).reshape(TOY.shape), TOY.double(), rtol=0, atol=1e-12)
    wrong = decode(y, 4, ORDER).reshape(TOY.shape)
    assert float((wrong - TOY).abs().max()) > 1


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99), st.data())
def test_t4_3_what_is_stored_are_the_lowest_frequencies(
    rows: int, columns: int, seed: int, data: Any
) -> None:
    """T4.3: dense [g, t], no index of coefficients; the rebuilt weight has nothing beyond frequency t."""
    generator = torch.Generator().manual_seed(seed)
    terms = data.draw(st.integers(1, columns))
    weight = torch.randn(rows * columns, generator=generator, dtype=torch.float64)
    order = torch.randperm(columns, generator=generator)
    y = encode(weight, rows, terms, order)
    assert y.shape == (rows, terms)
    again = spectrum(decode(y, columns, torch.argsort(order)), rows, order)
    torch.testing.assert_close(again[:, :terms], y, rtol=0, atol=1e-12)
    assert float(again[:, terms:].abs().sum()) < 1e-10


def test_the_standard_basis_keeps_the_first_columns() -> None:
    order = torch.tensor([3, 1, 0, 2])
    y = encode(TOY, 2, 2, order, "standard")
    assert y.tolist() == TOY.reshape(2, 4)[:, [3, 1]].tolist()
    rebuilt = decode(y, 4, torch.argsort(order), "standard")
    expected = TOY.reshape(2, 4).clone()
    expected[:, [0, 2]] = 0
    assert torch.equal(rebuilt, expected)


@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32_768, torch.int16),
        (32_769, torch.uint16),
        (65_536, torch.uint16),
        (65_537, torch.int32),
        (589_824, torch.int32),
        (2**31 + 1, torch.int64),
    ],
)
def test_orders_are_as_narrow_as_they_can_be(count: int, dtype: torch.dtype) -> None:
    assert narrowest(count) == dtype
    assert torch.iinfo(dtype).max >= count - 1


# ---------------------------------------------------------------------- layers

CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(8, 12, 3),
    "1x1 without bias": lambda: nn.Conv2d(8, 12, 1, bias=False),
    "strided, dilated": lambda: nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2)),
    "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4),
    "same": lambda: nn.Conv2d(8, 12, (2, 3), padding="same"),
    "valid": lambda: nn.Conv2d(8, 12, 3, padding="valid", padding_mode="circular"),
    "reflected": lambda: nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="reflect"),
    "same, replicated": lambda: nn.Conv2d(8, 12, (4, 3), padding="same", padding_mode="replicate"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_with_all_frequencies_a_convolution_is_what_it_was(name: str) -> None:
    """G4.6: t = M reproduces W."""
    conv = CONVOLUTIONS[name]().double()
    columns = conv.weight.numel() // 4
    layer = compressed(conv, 4, columns, torch.randperm(columns))
    assert isinstance(layer, DctConv2d)
    x = torch.randn(2, 8, 11, 10, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.weight(), conv.weight, rtol=0, atol=1e-12)


def test_g4_6_in_float32_to_1e_6() -> None:
    conv = nn.Conv2d(64, 64, 3)
    layer = compressed(conv, 4, 9216, torch.randperm(9216))
    assert float((layer.weight() - conv.weight).detach().abs().max()) < 1e-6


def test_a_linear_layer_over_tokens() -> None:
    linear = nn.Linear(6, 10).double()
    layer = compressed(linear, 5, 12, torch.randperm(12))
    assert isinstance(layer, DctLinear)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("of", ["dct", "standard"])
def test_the_weight_of_a_layer_is_alg_3(of: Basis) -> None:
    linear, order = nn.Linear(6, 10).double(), torch.randperm(12)
    layer = compressed(linear, 5, 4, order, of)
    y = encode(linear.weight, 5, 4, order, of)
    expected = decode(y, 12, torch.argsort(order), of).reshape(10, 6)
    torch.testing.assert_close(layer.weight(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.coefficients, y, rtol=0, atol=1e-12)


def test_a_layer_leaves_the_old_one_alone_but_for_the_bias() -> None:
    linear = nn.Linear(6, 10).eval()
    linear.weight.requires_grad_(False)
    before = copy.deepcopy(linear)
    layer = compressed(linear, 5, 4, torch.randperm(12))
    assert torch.equal(linear.weight, before.weight)
    assert layer.bias is linear.bias
    assert not layer.training and not layer.coefficients.requires_grad


def test_without_order_there_is_no_index() -> None:
    layer = compressed(nn.Linear(6, 10), 5, 12, None)
    assert layer.index is None and not layer.reordered
    assert set(layer.state_dict()) == {"coefficients", "bias"}


def test_t4_4_the_index_is_no_parameter() -> None:
    """T4.4: integers in a buffer, which no optimiser sees and no weight decay shrinks."""
    layer = compressed(nn.Linear(64, 40), 4, 100, torch.randperm(640))
    assert layer.index is not None
    assert layer.index.dtype == torch.int16 and not layer.index.requires_grad
    assert dict(layer.named_parameters()).keys() == {"coefficients", "bias"}
    assert dict(layer.named_buffers()).keys() == {"index"}
    before = layer.index.clone()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(torch.randn(4, 64)).square().sum().backward()
    optimiser.step()
    assert torch.equal(layer.index, before)


def test_a_layer_moves_between_types_with_its_order() -> None:
    layer = compressed(nn.Linear(64, 40), 4, 640, torch.randperm(640))
    double = copy.deepcopy(layer).double()
    assert double.index is not None and double.index.dtype == torch.int16
    torch.testing.assert_close(double.weight().float(), layer.weight(), rtol=0, atol=1e-6)
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight().dtype == torch.bfloat16
    torch.testing.assert_close(half.weight().float(), layer.weight(), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("rows", "terms"), [(0, 1), (7, 1), (5, 0), (5, 13)])
def test_rows_and_terms_must_fit(rows: int, terms: int) -> None:
    with pytest.raises(PassError, match=f"rows={rows} and terms={terms} for 60 weights"):
        DctLinear(6, 10, rows=rows, terms=terms)


# ---------------------------------------------------------------------- in programs


def net(bias: bool = True) -> tuple[Program, nn.Sequential]:
    """conv -> relu -> flatten -> linear with both layers coded, and the layers that they replaced."""
    conv, linear = nn.Conv2d(3, 8, 3, stride=2, bias=bias), nn.Linear(72, 10, bias=bias)
    plain = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear)
    coded = copy.deepcopy(plain)
    for at, rows, terms in ((0, 4, 20), (3, 4, 40)):
        columns = plain[at].weight.numel() // rows  # type: ignore[operator]
        coded[at] = compressed(plain[at], rows, terms, torch.randperm(columns))  # type: ignore[arg-type]
    return traced(coded, 1, 3, 7, 7), plain


def test_tracing_keeps_layers_whole() -> None:
    program, _ = net()
    kinds = [type(m).__name__ for m in program.called_modules().values()]
    assert kinds == ["DctConv2d", "ReLU", "Flatten", "DctLinear"]
    assert "dctconv 3->8 k3 s2 4x20 of 4x54" in str(program)
    assert "dctlinear 72->10 4x40 of 4x180" in str(program)
    check(program)
    again = trace(program.module, program.example_inputs)
    assert [n.target for n in again.graph.nodes] == [n.target for n in program.graph.nodes]


def test_costs_count_stored_parameters_and_the_arithmetic_of_the_weight() -> None:
    """METHODS 4.6: coefficients and orders; MACs are those of the dense layers."""
    program, plain = net()
    conv, linear = layer_rows(program)
    assert (conv.params, linear.params) == (4 * 20 + 54 + 8, 4 * 40 + 180 + 10)
    assert (conv.kind, conv.in_channels, conv.out_channels, conv.kernel) == ("DctConv2d", 3, 8, (3, 3))
    assert params_trainable(program) == 4 * 20 + 8 + 4 * 40 + 10
    assert params_order(program) == 54 + 180
    assert params_state(program) == params_trainable(program) + 234
    assert macs(program) == macs(traced(plain, 1, 3, 7, 7))


def test_saved_programs_compute_the_same(tmp_path: Path) -> None:
    program, _ = net()
    save(program, tmp_path / "p")
    loaded = load(tmp_path / "p")
    assert loaded.fingerprint() == program.fingerprint()
    x = torch.randn(3, 3, 7, 7)
    assert torch.equal(loaded(x), program(x))
    layer = loaded.modules["3"]
    assert isinstance(layer, DctLinear)
    assert layer.index is not None and layer.index.dtype == torch.uint8
    assert layer.coefficients.requires_grad


@pytest.mark.parametrize("columns", [200, 300, 40_000, 70_000])
def test_every_type_of_index_is_saved(tmp_path: Path, columns: int) -> None:
    linear = nn.Linear(columns // 10, 10, bias=False)
    program = traced(nn.Sequential(compressed(linear, 1, 3, torch.randperm(columns))), 1, columns // 10)
    save(program, tmp_path / "p")
    loaded = load(tmp_path / "p")
    assert loaded.tensors["0.index"].dtype == narrowest(columns)
    assert loaded.fingerprint() == program.fingerprint()
    entry = columns * narrowest(columns).itemsize
    assert entry < (tmp_path / "p" / "weights.safetensors").stat().st_size < entry + columns * 4 / 10 + 1000


def test_without_order_and_bias_it_is_saved_too(tmp_path: Path) -> None:
    module = nn.Sequential(compressed(nn.Linear(6, 10, bias=False), 5, 4, None, "standard"))
    program = traced(module, 1, 6)
    save(program, tmp_path / "p")
    assert load(tmp_path / "p").fingerprint() == program.fingerprint()


def damaged(program: Program, values: Tensor) -> None:
    program.modules["3"].register_buffer("index", values)


FLAWS = {
    "twice": torch.tensor([0, 0, *range(2, 180)], dtype=torch.uint8),
    "beyond": torch.tensor([*range(179), 200], dtype=torch.uint8),
    "negative": torch.tensor([-1, *range(1, 180)], dtype=torch.int16),
    "float": torch.arange(180.0),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_an_index_that_is_no_permutation_is_refused(tmp_path: Path, flaw: str) -> None:
    program, _ = net()
    damaged(program, FLAWS[flaw])
    program = Program(program.module, program.example_inputs)
    with pytest.raises(VerifyError, match=r"3\.index: found no permutation, expected every integer from 0"):
        check(program)
    save(program, tmp_path / "p")
    with pytest.raises(LoadError, match=r"weights\.safetensors: 3\.index: found no permutation"):
        load(tmp_path / "p")


def test_other_flaws_are_named() -> None:
    layer = compressed(nn.Linear(6, 10), 5, 4, torch.randperm(12))
    assert layer.flaw() is None
    layer.coefficients = nn.Parameter(torch.zeros(5, 3))
    assert layer.flaw() == "coefficients: found shape (5, 3), expected (5, 4)"
    layer = compressed(nn.Linear(6, 10), 5, 4, torch.randperm(12))
    layer.index = None
    assert "index: found none" in (layer.flaw() or "")


def test_scrambling_keeps_the_signal_alive() -> None:
    """The one check of later passes needs outputs of a sensible size behind coefficient layers."""
    program, _ = net(bias=False)
    with torch.no_grad():
        for module in program.called_modules().values():
            if isinstance(module, DctLayer):
                module.coefficients.mul_(1e-9)
    program = Program(program.module, program.example_inputs)
    with torch.no_grad():
        outputs = scrambled(program)(torch.randn(4, 3, 7, 7, dtype=torch.float64))
    assert float((outputs - outputs.mean(0)).std()) > 0.1


def test_the_forward_is_differentiable_in_the_coefficients() -> None:
    layer = compressed(nn.Conv2d(2, 4, 3).double(), 4, 5, torch.randperm(18))
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)

    def loss(y: Tensor) -> Tensor:
        rebuilt = decode(y, 18, layer.index).reshape(layer.weight_shape)
        return F.conv2d(x, rebuilt, layer.bias).square().sum()

    assert torch.autograd.gradcheck(loss, (layer.coefficients,))
    layer(x).square().sum().backward()
    (expected,) = torch.autograd.grad(loss(layer.coefficients), layer.coefficients)
    assert layer.coefficients.grad is not None
    torch.testing.assert_close(layer.coefficients.grad, expected)
