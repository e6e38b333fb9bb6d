"""Networks that ask for sizes: Python runs with numbers, and the program computes what the module does."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp
from graphcomp.errors import GraphcompWarning, InputError, TraceError
from graphcomp.ir import load, save
from graphcomp.ir.meta import _quick_function


class Net(nn.Module):
    """A convolution, and whatever a test does with its output."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.register_buffer(
            "kernel", torch.tensor([[1.0, 2.0, 1.0]]).T @ torch.tensor([[1.0, 2.0, 1.0]]) / 16
        )
        self.gain = nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)
        self.rows = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.conv(x))


def _same_padding(net: Net, x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    tall = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0)
    wide = max((math.ceil(width / 2) - 1) * 2 + 3 - width, 0)
    return F.avg_pool2d(F.pad(x, [wide // 2, wide - wide // 2, tall // 2, tall - tall // 2]), 3, 2)


def _branch(net: Net, x: Tensor) -> Tensor:
    return x * 2 if x.shape[-2] < 7 else x.relu()


def _asserts(net: Net, x: Tensor) -> Tensor:
    assert x.shape[1] == 8, "channels"
    assert x.dim() == 4
    if x.device.type == "meta" or x.is_meta or x.dtype == torch.float16:
        raise ValueError
    return x


def _loop(net: Net, x: Tensor) -> Tensor:
    total = x[:, 0]
    for i in range(1, x.shape[1]):
        total = total + x[:, i] * i
    return total


def _lists(net: Net, x: Tensor) -> Tensor:
    y = list(x.chunk(2, 1))
    y.extend(part.relu() for part in y[-1].split(2, 1))
    first, *rest = y
    return torch.cat([first, *reversed(rest)], 1)


def _unbind(net: Net, x: Tensor) -> Tensor:
    return sum(part * (i + 1) for i, part in enumerate(x.unbind(1)))  # type: ignore[return-value]


def _window(net: Net, x: Tensor) -> Tensor:
    size = 7
    batch, channels, height, width = x.shape
    down, right = (size - height % size) % size, (size - width % size) % size
    if down or right:
        x = F.pad(x, (0, right, 0, down))
    return x.reshape(batch, channels, -1, size, x.shape[-1]).mean(3)


def _scaled(net: Net, x: Tensor) -> Tensor:
    return F.interpolate(x, size=(int(x.shape[2] * 1.5), int(x.shape[3] * 0.5)), mode="nearest")


def _square(net: Net, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    side = int(math.sqrt(tokens.shape[1]))
    return tokens.transpose(1, 2).reshape(len(x), -1, side, side)


def _made(net: Net, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    zeros = torch.zeros(batch, 2, height, width, dtype=x.dtype, device=x.device)
    ones = x.new_ones((batch, 1, height, width))
    grid = torch.arange(width, dtype=x.dtype).expand(batch, 1, height, width)
    return torch.cat([x, zeros, ones, grid, torch.full((batch, 1, height, width), 2.0)], 1)


def _shift(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :2, 1:] = x[:, :2, :-1]
    out[:, 2:4, :-1] = x[:, 2:4, 1:]
    out[:, 4:] = x[:, 4:]
    return out


def _writes(net: Net, x: Tensor) -> Tensor:
    y = x.relu()
    y[..., 0] = 1.0
    y[:, -1] = x[:, 0] * 2
    y[:, 1:3, 2:4, 2:4] += 1
    y[:, 5][:, 0] = 3.0
    y[x > 1] = 0.5
    return y * 2


def _covering(net: Net, x: Tensor) -> Tensor:
    y = x.relu()
    y[:, :, :12] = 2.0  # all rows of the example, some of a larger one
    return y


def _computed_setting(net: Net, x: Tensor) -> Tensor:
    return F.conv2d(x, net.rows, padding=x.shape[-1] // 6)


def _planes_as_widths(net: Net, x: Tensor) -> Tensor:
    planes = x.flatten(2)  # attention among channels, whose scale follows from height and width
    return F.scaled_dot_product_attention(planes, planes, planes)


def _late_view(net: Net, x: Tensor) -> Tensor:
    y = x.relu()
    y[:, 0] = 0
    part = y[:, :2]
    part[:, 1] = 7.0
    return y + part.sum(1, keepdim=True)


def _autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast(device_type=x.device.type, enabled=False):
        return x.float() * 2


IDIOMS = {
    f.__name__.strip("_"): f
    for f in (
        _same_padding, _branch, _asserts, _loop, _lists, _unbind, _window, _scaled, _square, _made, _shift,
        _writes, _covering, _computed_setting, _planes_as_widths, _late_view, _autocast,
    )
}  # fmt: skip
SPECIAL = {"scaled", "square", "window", "covering", "computed_setting"}
"""Those that hold at the example's height and width only."""


@pytest.mark.parametrize("idiom", IDIOMS)
def test_program_computes_what_the_module_does(idiom: str) -> None:
    model = Net(IDIOMS[idiom]).eval()
    program = graphcomp.trace(model, torch.randn(1, 3, 12, 12))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 12, 12)
        torch.testing.assert_close(program(x), model(x))
    x = torch.randn(2, 3, 16, 18)
    if idiom in SPECIAL:
        with pytest.raises(
            InputError, match=r"input 0: found \(3, 16, 18\), expected \(3, 12, 12\).*test_shapes.py|Net:"
        ):
            program(x)
    else:
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("idiom", sorted(SPECIAL))
def test_specialised_places_are_kept_with_the_program(idiom: str, tmp_path: Any) -> None:
    program = graphcomp.trace(Net(IDIOMS[idiom]).eval(), torch.randn(1, 3, 12, 12))
    assert program.interface.specialised
    save(program, tmp_path / "p")
    assert load(tmp_path / "p").interface == program.interface


def test_a_network_that_asks_nothing_is_for_all_sizes() -> None:
    program = graphcomp.trace(Net(lambda net, x: x.relu()).eval(), torch.randn(1, 3, 12, 12))
    assert program.interface.specialised == ()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (lambda net, x: x if x.shape[0] == 1 else x * 2, "depends on the batch size|another result.*batch 1"),
        (lambda net, x: sum(x), "its length depends on the batch size"),
        (lambda net, x: x if x.sum() > 0 else -x, "whose values only a run knows"),
        (lambda net, x: x * float(x.mean()), "whose values only a run knows"),
    ],
)
def test_what_no_size_answers_is_refused_with_its_line(body: Callable[..., Any], found: str) -> None:
    with pytest.raises(TraceError, match=rf"test_shapes.py:\d+: .*({found})|({found}).*test_shapes.py:\d+: "):
        graphcomp.trace(Net(body).eval(), torch.randn(1, 3, 12, 12))


def test_a_write_that_an_older_view_sees_goes_through_the_second_door() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = x.relu()
        view = y.flatten(1)
        y[:, 0] = 0
        return view

    model, x = Net(body).eval(), torch.randn(2, 3, 12, 12)
    program = graphcomp.trace(model, x)
    assert "another view of its memory" in program.interface.remarks[0]
    torch.testing.assert_close(program(x), model(x))


class Optional(nn.Module):
    """Arguments beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *extra: Tensor, double: bool = False, **more: Any
    ) -> Tensor:
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        for y in extra:
            x = x + y
        return x * 2 if double or more else x


def test_arguments_without_an_example_are_their_defaults() -> None:
    model, x = Optional().eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(graphcomp.trace(model, x)(x), model(x))
    mask = torch.rand(2, 8, 6, 6)
    torch.testing.assert_close(graphcomp.trace(model, (x, mask))(x, mask), model(x, mask))


@dataclasses.dataclass
class Answer:
    """Two results."""

    scores: Tensor
    features: list[Tensor]


def test_a_dataclass_is_a_dict_of_its_fields() -> None:
    model = Net(lambda net, x: Answer(net.head(x.mean((2, 3))), [x, x.relu()])).eval()
    x = torch.randn(2, 3, 8, 8)
    found, expected = graphcomp.trace(model, x)(x), model(x)
    torch.testing.assert_close(found, {"scores": expected.scores, "features": expected.features})


def test_wrapped_networks_are_taken_out() -> None:
    model, x = Net(_asserts).eval(), torch.randn(2, 3, 8, 8)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        torch.testing.assert_close(graphcomp.trace(wrapped, x)(x), model(x))


def _standardised(net: Net, x: Tensor) -> Tensor:
    weight = net.rows * net.gain
    weight = F.batch_norm(weight.reshape(1, 8, -1), None, None, training=True).reshape_as(weight)
    return F.conv2d(x, weight, net.gain.flatten() * 2)


def _blurred(net: Net, x: Tensor) -> Tensor:
    kernel = net.kernel[None, None].repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel, stride=2, groups=x.shape[1])


@pytest.mark.parametrize("body", [_standardised, _blurred])
def test_computed_weights_are_folded_into_plain_layers(body: Callable[..., Any]) -> None:
    model, x = Net(body).eval(), torch.randn(2, 3, 12, 12)
    with pytest.warns(GraphcompWarning, match="their values are baked in"):
        program = graphcomp.trace(model, x)
    torch.testing.assert_close(program(x), model(x))
    assert [n.op for n in program.graph.nodes if "get_attr" in n.op] == []
    assert sum(isinstance(m, nn.Conv2d) for m in program.called_modules().values()) == 2
    kept = graphcomp.trace(model, x, fold=False)
    torch.testing.assert_close(kept(x), model(x))
    assert sum(isinstance(m, nn.Conv2d) for m in kept.called_modules().values()) == 1


def test_what_others_read_stays_tied() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        return F.conv2d(x.repeat(1, 3, 1, 1)[:, :3], net.conv.weight * 2, net.conv.bias)

    model, x = Net(body).eval(), torch.randn(2, 3, 12, 12)
    program = graphcomp.trace(model, x)
    torch.testing.assert_close(program(x), model(x))
    assert sum(isinstance(m, nn.Conv2d) for m in program.called_modules().values()) == 1


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (torch.cat, ([(2, 3, 4), (2, 5, 4)], 1), {}),
        (torch.cat, ([(2, 3), (4, 3)],), {}),
        (torch.cat, ([(2, 3), (2, 1), (2, 0)],), {"dim": -1}),
        (torch.cat, ([(0,), (2, 3)],), {}),
        (torch.roll, ((2, 3, 4),), {"shifts": (1, -1), "dims": (1, 2)}),
        (torch.roll, ((2, 3), 1), {}),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_shapes_without_the_meta_device_are_its_own(
    function: Callable[..., Tensor], args: Any, kwargs: Any
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(v) for v in value]
        return torch.zeros(value, dtype=torch.float64, device="meta") if isinstance(value, tuple) else value

    args = tuple(map(filled, args))
    quick, made = _quick_function(function, args, kwargs), function(*args, **kwargs)
    assert quick is None or (quick.shape, quick.dtype) == (made.shape, made.dtype)
    assert (quick is None) == (function is torch.cat and args[0][0].shape == (0,))


def test_joins_of_several_types_are_left_to_torch() -> None:
    parts = [torch.zeros(2, dtype=t, device="meta") for t in (torch.float32, torch.float64)]
    assert _quick_function(torch.cat, (parts,), {}) is None
