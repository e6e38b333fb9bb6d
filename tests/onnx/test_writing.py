"""Rows that write: every one, in every way that torch has of calling it, against torch itself.

The ways come from the table of operators (`tests/ir/test_operators.py`), and those that no channel rule
follows from `MORE`; a row without an example fails here. Nothing goes through torch's exporter.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import Tensor, nn

from graphcomp.ir import GruLayer, LstmLayer
from graphcomp.ir.program import Program, output_tensors
from graphcomp.ir.recurrent import RecurrentLayer
from graphcomp.ir.tracing import trace
from graphcomp.onnx.rows import WRITES, NoRow
from graphcomp.onnx.writing import write
from tests.ir.test_operators import EXAMPLES, ROWS, branches, branches_by_name, network
from tests.nets import scramble

LAYERS_OF_COEFFICIENTS = {"DctConv2d", "DctLinear"}
UNPOOLING = {
    *(f"max_unpool{rank}d" for rank in (1, 2, 3)),
    *(f"{kind}_pool{rank}d_with_indices" for kind in ("max", "adaptive_max") for rank in (1, 2, 3)),
}
"""Places in a plane, which torch's exporter writes: those of ONNX count through the batch."""
"""Written as the plain layers; `tests/onnx/test_weights.py` looks at their weights."""


class Net(nn.Module):
    """A function of its input, with what it needs."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def positive(x: Tensor) -> Tensor:
    return x.abs() + 0.5


def whole(x: Tensor) -> Tensor:
    return (x * 10).to(torch.int64)


def heads(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def attended(m: Any, x: Tensor) -> Any:
    return m.attention(heads(x), heads(x), heads(x), need_weights=True)


def recurrent(kind: type[nn.RNNBase], batch_first: bool, width: int = 6, **settings: Any) -> Net:
    """Outputs and last states of torch's layers, of a state where `given` says so."""
    given = settings.pop("given", False)
    layer = kind(width, 5, batch_first=batch_first, **settings)
    count = layer.num_layers * (1 + layer.bidirectional)

    def call(m: Any, x: Tensor) -> Any:
        x = x.flatten(1, 2)
        states = x.mean((1, 2)).expand(count, 5, -1).transpose(1, 2)
        hx = (states, states * 2) if kind is nn.LSTM else states
        y, last = m.layer(x if batch_first else x.transpose(0, 1), hx if given else None)
        return (y, *last) if kind is nn.LSTM else (y, last)

    return Net(call, layer=layer)


def one_layer(kind: type[RecurrentLayer], **settings: Any) -> Net:
    layer = kind(6, 5, **settings)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return Net(lambda m, x: m.layer(x.flatten(1, 2).transpose(0, 1)), layer=layer)


def elementwise(name: str) -> Net:
    return Net(lambda m, x: getattr(torch, name)(torch.sigmoid(x) * 0.9))


MORE: dict[str, list[Callable[[], Net]]] = {
    "matmul": [lambda: Net(lambda m, x: x @ x.transpose(-1, -2))],
    "mm": [lambda: Net(lambda m, x: torch.mm(x.flatten(1), m.w), w=torch.randn(144, 3))],
    "bmm": [lambda: Net(lambda m, x: torch.bmm(heads(x), heads(x).transpose(1, 2)))],
    "mv": [lambda: Net(lambda m, x: torch.mv(x.flatten(1), m.w), w=torch.randn(144))],
    "addmm": [
        lambda: Net(
            lambda m, x: torch.addmm(m.b, x.flatten(1), m.w, beta=2, alpha=0.5),
            w=torch.randn(144, 3),
            b=torch.randn(3),
        )
    ],
    "baddbmm": [lambda: Net(lambda m, x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2], alpha=0.5))],
    "einsum": [
        lambda: Net(lambda m, x: torch.einsum("bchw,bcvw->bchv", x, x)),
        lambda: Net(lambda m, x: torch.einsum("bchw,bdhw->bcd", x, x)),
    ],
    "scaled_dot_product_attention": [
        lambda: Net(lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        lambda: Net(
            lambda m, x: F.scaled_dot_product_attention(x, x + 1, x, m.mask, scale=0.3), mask=torch.eye(6) > 0
        ),
    ],
    "MultiheadAttention": [
        lambda: Net(attended, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        lambda: Net(attended, attention=nn.MultiheadAttention(4, 2)),
    ],
    "LocalResponseNorm": [lambda: Net(lambda m, x: m.norm(x), norm=nn.LocalResponseNorm(3))],
    "local_response_norm": [lambda: Net(lambda m, x: F.local_response_norm(x, 3))],
    "Embedding": [lambda: Net(lambda m, x: m.table(whole(x).abs() % 7), table=nn.Embedding(7, 3))],
    "embedding": [lambda: Net(lambda m, x: F.embedding(whole(x).abs() % 7, m.w), w=torch.randn(7, 3))],
    "topk": [lambda: Net(lambda m, x: torch.topk(x, 2, dim=1)[0])],
    "argmax": [
        lambda: Net(lambda m, x: x.argmax(1)),
        lambda: Net(lambda m, x: x.flatten(1).argmax(1, keepdim=True)),
    ],
    "argmin": [lambda: Net(lambda m, x: x.argmin(2))],
    "gather": [lambda: Net(lambda m, x: torch.gather(x, 1, whole(x).abs() % 4))],
    "masked_fill": [lambda: Net(lambda m, x: x.masked_fill(x > 0, 2.0))],
    "isnan": [lambda: Net(lambda m, x: torch.isnan(torch.log(x)))],
    "isinf": [lambda: Net(lambda m, x: torch.isinf(1 / F.relu(x)))],
    "trunc": [lambda: Net(lambda m, x: torch.trunc(x * 3))],
    "log2": [lambda: Net(lambda m, x: torch.log2(positive(x)))],
    "log10": [lambda: Net(lambda m, x: torch.log10(positive(x)))],
    **{name: [partial(elementwise, name)] for name in "tan asin acos atan sinh cosh asinh atanh".split()},
    "acosh": [lambda: Net(lambda m, x: torch.acosh(positive(x) + 1))],
    "view_as": [lambda: Net(lambda m, x: x.view_as(x.transpose(2, 3)))],
    "reshape_as": [lambda: Net(lambda m, x: x.reshape_as(x.transpose(1, 2)))],
    "expand_as": [lambda: Net(lambda m, x: x[:, :1].expand_as(x))],
    "broadcast_to": [lambda: Net(lambda m, x: x[:, :1].broadcast_to((-1, 4, 6, 6)))],
    "adjoint": [lambda: Net(lambda m, x: x.adjoint())],
    "split_with_sizes": [lambda: Net(lambda m, x: x.split_with_sizes([1, 3], 1)[1])],
    "zeros": [lambda: Net(lambda m, x: torch.cat([x, torch.zeros(x.size(0), 2, 6, 6)], 1))],
    "ones": [lambda: Net(lambda m, x: x * torch.ones(x.size(0), 1, 1, 1))],
    "new_zeros": [lambda: Net(lambda m, x: torch.cat([x, x.new_zeros(x.size(0), 2, 6, 6)], 1))],
    "new_ones": [lambda: Net(lambda m, x: x + x.new_ones((x.size(0), 1, 1, 1)))],
    "new_full": [lambda: Net(lambda m, x: x + x.new_full((x.size(0), 1, 1, 1), 0.5))],
    "full_like": [lambda: Net(lambda m, x: x * torch.full_like(x, 0.5))],
    "arange": [lambda: Net(lambda m, x: x + torch.arange(x.size(0)).view(-1, 1, 1, 1))],
    "one_hot": [lambda: Net(lambda m, x: F.one_hot(whole(x).abs() % 4, 5))],
    "bool": [lambda: Net(lambda m, x: F.relu(x).bool())],
    **{
        name: [
            partial(recurrent, kind, True, bidirectional=True),
            partial(recurrent, kind, False, num_layers=2, bidirectional=True, given=True),
            partial(recurrent, kind, True, num_layers=2, bias=False, given=True),
        ]
        for name, kind in (("LSTM", nn.LSTM), ("GRU", nn.GRU))
    },
    "lstm": [
        partial(one_layer, LstmLayer, bidirectional=True),
        partial(one_layer, LstmLayer, bias=False),
    ],
    "gru": [partial(one_layer, GruLayer), partial(one_layer, GruLayer, bias=False, bidirectional=True)],
    "scatter": [lambda: Net(lambda m, x: x.scatter(1, whole(x).abs() % 4, x * 2))],
    "scatter_add": [lambda: Net(lambda m, x: x.scatter_add(2, whole(x).abs() % 6, x * 2))],
    "scatter_reduce": [
        lambda: Net(lambda m, x: x.scatter_reduce(3, whole(x).abs() % 6, x * 2, "amax")),
        lambda: Net(lambda m, x: torch.scatter_reduce(x, 1, whole(x).abs() % 4, x, "prod")),
    ],
}
"""Rows that channels are not followed through -> networks of an input of 4 x 6 x 6."""


def written(program: Program) -> ModelProto:
    outputs = [f"y{i}" for i in range(len(output_tensors(program.output)))]
    model = write(program, ["x"], outputs, ({0: "batch"},)).model
    onnx.checker.check_model(model, full_check=True)
    return model


def assert_same(program: Program, batches: tuple[int, ...] = (1, 3)) -> None:
    model = written(program)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shape = program.example_inputs[0].shape
    for batch in batches:
        x = torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = output_tensors(program(x.clone()))
        for found, tensor in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
            assert found.dtype == tensor.numpy().dtype and found.shape == tuple(tensor.shape)
            scale = float(tensor.double().abs().max()) if tensor.numel() else 1.0
            np.testing.assert_allclose(found, tensor.numpy(), rtol=0, atol=4e-6 * max(scale, 1e-2))


def test_every_row_has_an_example() -> None:
    assert set(WRITES) - set(ROWS) == set(MORE) - set(ROWS)
    assert set(ROWS) - set(WRITES) == LAYERS_OF_COEFFICIENTS | UNPOOLING


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(set(ROWS) & set(WRITES)))
def test_row(row: str) -> None:
    """In every spelling; what only some have (positions of maxima) may be left to the exporter."""
    count = 0
    for way in branches(row):
        try:
            assert_same(network([way]))
            count += 1
        except NoRow as reason:
            assert "positions of the maxima" in str(reason)
    assert count


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(set(EXAMPLES) & set(WRITES)))
def test_row_with_arguments_by_name(row: str) -> None:
    for way in branches_by_name(row):
        if way.label != "torch.adaptive_max_pool1d":  # with positions of the maxima
            assert_same(network([way]))


@pytest.mark.parametrize("row", sorted(MORE))
def test_row_that_no_channel_rule_follows(row: str) -> None:
    for build in MORE[row]:
        torch.manual_seed(0)
        assert_same(trace(build().eval(), torch.randn(1, 4, 6, 6)))


@torch.fx.wrap
def windowed(x: Tensor, size: int) -> Tensor:
    """Branches on shapes, fills a mask in place, and views by the batch."""
    batch, channels, height, width = x.shape
    if height % size:
        raise ValueError("a height that windows do not fill")
    mask = x.new_zeros((height, width))
    mask[: height // 2] = 1.0
    x = (x * mask).view(batch, channels, height // size, size, width // size, size)
    x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch * (height // size) * (width // size), -1)
    return x.softmax(-1).view(batch, -1)


def test_wrapped_functions_are_written_as_what_they_call() -> None:
    program = trace(Net(lambda m, x: windowed(x, 3)).eval(), torch.randn(1, 4, 6, 6))
    assert_same(program, batches=(1, 2, 5))
    assert not {n.op_type for n in written(program).graph.node} & {"Shape", "ScatterND", "Gather"}


def test_sizes_are_computed_only_where_they_are_open() -> None:
    def shuffled(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.size(0), x.size(1), x.size(2), x.size(3)
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    program = trace(Net(shuffled).eval(), torch.randn(1, 4, 6, 6))
    assert [n.op_type for n in written(program).graph.node] == ["Reshape", "Transpose", "Reshape"]
    open_plane = write(program, ["x"], ["y"], ({0: "batch", 2: "height", 3: "width"},)).model
    session = onnxruntime.InferenceSession(open_plane.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 4, 5, 9)
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], program(x).numpy())


def test_a_call_without_a_row_is_named() -> None:
    program = trace(Net(lambda m, x: torch.logcumsumexp(x, 1)).eval(), torch.randn(1, 4, 6, 6))
    with pytest.raises(NoRow, match=r"^logcumsumexp: logcumsumexp: no row$"):
        write(program, ["x"], ["y"], ({0: "batch"},))


def test_a_change_through_a_view_is_not_written() -> None:
    def changed(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :2].sub_(0.5)
        return y

    with pytest.raises(NoRow, match="in place that others see through a view"):
        written(trace(Net(changed).eval(), torch.randn(1, 4, 6, 6)))


@pytest.mark.parametrize("groups", [1, 2])
def test_normalisations_go_into_what_is_before_them(groups: int) -> None:
    layers = [nn.Conv2d(4, 6, 3, groups=groups), nn.ConvTranspose2d(6, 4, 3, groups=groups)]
    norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(4)]
    model = nn.Sequential(
        layers[0],
        norms[0],
        nn.ReLU(),
        layers[1],
        norms[1],
        nn.Flatten(),
        nn.Linear(144, 5),
        nn.BatchNorm1d(5),
    )
    program = trace(scramble(model, 0).eval(), torch.randn(1, 4, 6, 6))
    assert "BatchNormalization" not in {n.op_type for n in written(program).graph.node}
    assert_same(program)
