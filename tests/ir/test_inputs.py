"""Inputs are drawn from what the network takes, and casts follow what it computes in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.channels import analyse
from graphcomp.compiler.source import open_data
from graphcomp.errors import TraceError
from graphcomp.ir.inputs import fresh_inputs, numbers_of
from graphcomp.ir.program import Program
from graphcomp.ir.ranges import Numbers
from graphcomp.ir.tracing import trace
from graphcomp.onnx.export import export_onnx
from graphcomp.pipeline.verify import difference, verify_pass
from tests.nets import Net, _conv, _head
from tests.removing import ByRows, half, random_scores

SIZE, LENGTH = 50, 12
Read = Callable[[Any, Any], Any]


def tokens(read: Read, example: Tensor) -> Program:
    """What `read` makes of the numbers, [1, LENGTH, 8], goes through two convolutions."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.fc(F.relu(m.b(F.relu(m.a(read(m, x).transpose(1, 2))))).mean(2))

    torch.manual_seed(0)
    parts = {
        "table": nn.Embedding(SIZE, 8),
        "places": nn.Embedding(LENGTH, 8),
        "a": nn.Conv1d(8, 16, 3),
        "b": nn.Conv1d(16, 16, 3),
        "fc": nn.Linear(16, 3),
        "one": nn.Linear(7, 8),
        "rows": torch.randn(SIZE, 8),
    }
    return trace(Net(forward, **parts).eval(), example)


def image(example: Tensor) -> Program:
    def forward(m: Any, x: Tensor) -> Any:
        return m.head(F.relu(m.a(x.float() / 255)))

    torch.manual_seed(0)
    return trace(Net(forward, a=_conv(3, 16), head=_head(16)).eval(), example)


def verify_half(program: Program) -> None:
    """The whole way: half of the channels go, and the check sees that outputs depend on inputs."""
    channels = analyse(program)
    drop, _ = half(channels).feasible(random_scores(channels))
    assert drop.gone.any()
    verify_pass(ByRows(), program, drop.rows)


ZEROS, ONES = torch.zeros(1, LENGTH, dtype=torch.int64), torch.ones(1, LENGTH, dtype=torch.int64)

RANGES: dict[str, tuple[Read, Tensor, tuple[int, int]]] = {
    "embedding": (lambda m, x: m.table(x), ZEROS, (0, SIZE - 1)),
    "int32": (lambda m, x: m.table(x), ZEROS.int(), (0, SIZE - 1)),
    "function": (lambda m, x: F.embedding(x, m.rows), ZEROS, (0, SIZE - 1)),
    "item": (lambda m, x: m.rows[x], ZEROS, (0, SIZE - 1)),
    "index_select": (lambda m, x: m.rows.index_select(0, x[0]).unsqueeze(0), ZEROS, (0, SIZE - 1)),
    "one_hot": (lambda m, x: m.one(F.one_hot(x, 7).float()), ZEROS, (0, 6)),
    "next": (lambda m, x: m.table(x + 1), ZEROS, (0, SIZE - 2)),
    "from one": (lambda m, x: m.table(x - 1), ONES, (1, SIZE)),
    "halves": (lambda m, x: m.table(x // 2), ZEROS, (0, 2 * SIZE - 1)),
    "bounded": (lambda m, x: m.table(x.clamp(0, SIZE - 1)), 3 * ONES, (0, 255)),
    "with places": (
        lambda m, x: m.table(x) + m.places(torch.arange(x.size(1)).unsqueeze(0)),
        ZEROS,
        (0, SIZE - 1),
    ),
    "two tables": (lambda m, x: m.table(x) + m.places(x), ZEROS, (0, LENGTH - 1)),
    "cast": (lambda m, x: m.rows[x.long()], ZEROS.to(torch.uint8), (0, SIZE - 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RANGES)
def test_whole_numbers_come_from_the_range_that_the_layers_take(name: str) -> None:
    read, example, (low, high) = RANGES[name]
    program = tokens(read, example)
    assert numbers_of(program) == (Numbers(example.dtype, low, high),)
    ends = {"item": (None, high), "next": (None, high), "bounded": (None, None)}  # take -1; anything
    assert numbers_of(program)[0].ends == ends.get(name, (low, high))  # type: ignore[union-attr]
    (x,), (y,) = fresh_inputs(program, 64, 0), fresh_inputs(program, 64, 1)
    assert x.shape == (64, LENGTH) and x.dtype == example.dtype and not torch.equal(x, y)
    assert low <= int(x.min()) < int(x.max()) <= high
    assert torch.equal(x, fresh_inputs(program, 64, 0)[0])
    verify_half(program)


@pytest.mark.parametrize(
    ("example", "high"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 255),
        (torch.full((1, 3, 8, 8), 7), 255),
        (torch.full((1, 3, 8, 8), 7, dtype=torch.int8), 127),
        (torch.ones(1, 3, 8, 8, dtype=torch.int64), 1),
        (torch.ones(1, 3, 8, 8, dtype=torch.bool), 1),
    ],
)
def test_what_nothing_bounds_is_an_image_or_a_mask(example: Tensor, high: int) -> None:
    program = image(example)
    assert numbers_of(program) == (Numbers(example.dtype, 0, high),)
    verify_half(program)


def test_codes_that_are_made_by_comparison_bound_what_they_code() -> None:
    """Without one a layer's channels get the same at every place, and a normalisation divides by nothing."""

    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.arange(SIZE))
            self.fc = nn.Linear(SIZE, 3)

        def forward(self, x: Tensor) -> Any:
            return self.fc((x.unsqueeze(2) == self.codes).float())

    program = trace(OneHot(), torch.zeros(1, 6, dtype=torch.int64))
    assert numbers_of(program) == (Numbers(torch.int64, 0, SIZE - 1),)


def test_inputs_that_index_one_table_together_repeat_the_example() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(SIZE, 8), nn.Linear(8, 3)

        def forward(self, a: Tensor, b: Tensor) -> Any:
            return self.fc(self.table(a * 10 + b))

    program = trace(Two(), (3 * ONES, 7 * ONES))
    assert numbers_of(program) == (None, None)
    assert torch.equal(fresh_inputs(program, 2, 0)[1], 7 * ONES.expand(2, -1))
    data = open_data("random", program, 0)
    assert torch.equal(data.train.fetch(data.train.indices[:2])[1], 7 * ONES.expand(2, -1))
    other = open_data("random", trace(Two(), (3 * ONES, 6 * ONES)), 0)
    assert other.train.fingerprint() != data.train.fingerprint()


def test_floats_are_drawn_as_ever() -> None:
    program = image(torch.zeros(1, 3, 8, 8))
    assert numbers_of(program) == (None,)
    generator = torch.Generator().manual_seed(5)
    expected = torch.randn((2, 3, 8, 8), generator=generator, dtype=torch.float64).float()
    assert torch.equal(fresh_inputs(program, 2, 5)[0], expected)


@pytest.mark.slow
def test_random_data_and_exports_take_token_ids(tmp_path: Path) -> None:
    program = tokens(*RANGES["embedding"][:2])
    data = open_data("random?limit=16", program, 0)
    (((x,), _),) = data.train.batches(64)
    assert x.dtype == torch.int64 and 0 <= int(x.min()) < int(x.max()) < SIZE
    assert "0 to 49" in data.description
    program(x)
    assert data.train.fingerprint() == open_data("random?limit=16", program, 0).train.fingerprint()
    assert export_onnx(program, tmp_path / "x.onnx", batches=(2,)).nodes


# ---- casts

CASTS: dict[str, Read] = {
    "float": lambda m, x: x.float(),
    "to": lambda m, x: x.to(torch.float32),
    "to by name": lambda m, x: x.to(dtype=torch.float32, copy=True),
    "type": lambda m, x: x.type(torch.float32),
    "type by string": lambda m, x: x.type("torch.FloatTensor"),
    "there and back": lambda m, x: x.half().double().bfloat16().float(),
    "as another": lambda m, x: x.to(m.a(x)),
    "of another's type": lambda m, x: x.double().to(m.a(x).dtype),
    "type_as": lambda m, x: x.double().type_as(m.a(x)),
    "of a weight's type": lambda m, x: x.to(m.a.weight.dtype),
    "softmax": lambda m, x: torch.softmax(x, 2, dtype=torch.float32),
    "mean": lambda m, x: x.mean((2, 3), keepdim=True, dtype=torch.double).float(),
    "made": lambda m, x: F.conv2d(x, torch.ones_like(m.a.weight, dtype=torch.float32)),
    "through integers": lambda m, x: (4 * x).int().long().float(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASTS)
def test_casts_follow_the_type_that_a_program_computes_in(name: str) -> None:
    """Float64 for the check: no mixed types, and no rounding on the way that another order would move."""

    def forward(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        return m.head(m.c(F.relu(m.b(CASTS[name](m, x)) + x.mean((2, 3), keepdim=True))))

    torch.manual_seed(0)
    parts = {"stem": _conv(3, 16), **{name: _conv(16, 16) for name in "abc"}}
    net = Net(forward, **parts, head=_head(16)).eval()
    program = trace(net, torch.zeros(1, 3, 8, 8))
    before = str(program)
    exact = program.to(torch.float64)
    (x,) = fresh_inputs(program, 2, 0, torch.float64)
    assert exact(x).dtype == torch.float64
    assert str(program) == before
    assert difference(exact, program.to(torch.float32).to(torch.float64)) == 0
    verify_half(program)


def test_memory_that_is_read_as_another_type_stays() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.head(m.a(x)), x.to(torch.int32).view(torch.float32)

    program = trace(Net(forward, a=_conv(3, 16), head=_head(16)).eval(), torch.zeros(1, 3, 8, 8))
    assert program.to(torch.float64)(torch.zeros(1, 3, 8, 8).double())[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor(2.0), r"found no axis of samples in input 1, of shape \(\), expected 1"),
        (
            torch.ones(4),
            r"found 4 sample\(s\) in input 1, of shape \(4,\), expected 1, as many as of the first",
        ),
    ],
)
def test_what_has_no_samples_is_no_input(scale: Tensor, message: str) -> None:
    """It would be cut to its first number; as an argument it is a value."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return cast(Tensor, self.fc(x)) * scale

    with pytest.raises(TraceError, match=message):
        trace(Scaled(), (torch.ones(1, 3), scale))
    program = trace(Scaled(), torch.ones(1, 3), arguments={"scale": 2.0})
    assert torch.equal(program(torch.ones(2, 3)), 2 * program.layer("fc")(torch.ones(2, 3)))
