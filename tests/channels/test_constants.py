"""Filters of zeros leave constants behind; their removal is lossless where these can go into biases."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from torch import Tensor, nn

from graphcomp.channels import Marks, Removal, Shift, analyse
from graphcomp.channels.constants import constants
from graphcomp.channels.model import Channels
from graphcomp.ir.program import Program, editable
from graphcomp.ir.tracing import trace
from graphcomp.passes.l1 import L1
from graphcomp.pipeline.verify import TOLERANCE, check, difference
from tests.channels.test_random_nets import RANDOM
from tests.nets import TRAPS, Net, Spec, build, random_cnn, scramble
from tests.removing import exact_program, half, random_scores, rows_of
from tests.running import run_pass
from tests.tiny import context, tiny_program


def zeroed(program: Program, channels: Channels, drop: Marks) -> Program:
    """The program with zeros in all filters that make these channels."""
    new: dict[str, Tensor] = {}
    for axis in channels.axes:
        if axis.role == "out":
            (name, dim), *_ = axis.tensors
            weight = new.get(name, program.tensors[name].detach()).clone()
            blocks = weight.reshape(axis.groups, -1, *weight.shape[1:]).movedim(dim + 1, 1)
            gone = torch.from_numpy(drop[axis.channels]).reshape(axis.groups, -1)
            for block, rows in zip(blocks, gone, strict=True):
                block[rows] = 0
            new[name] = weight
    return Program(editable(program, new), program.example_inputs)


def padded_with_own(module: nn.Module) -> None:
    """No convolution pads with zeros any more."""
    for part in module.modules():
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) and any(part.padding):
            part.padding_mode = "replicate"
            part._reversed_padding_repeated_twice = [p for p in reversed(part.padding) for _ in range(2)]  # type: ignore[misc]


def plain(spec: Spec) -> Spec:
    """Without what cannot be lossless: layers called twice, gates that the input moves, writes in place."""
    ops = tuple({**op, "inplace": False} for op in spec["ops"] if op["op"] not in ("reuse", "se"))
    return {**spec, "ops": ops}


def lossless(program: Program, seed: int = 0) -> tuple[float, float]:
    """How far the outputs move when filters are removed that were zero before, and in the rewrite."""
    channels = analyse(program)
    padded_with_own(program.module)
    drop, _ = half(channels, seed).feasible(random_scores(channels, seed))
    dead = zeroed(program, channels, drop.gone)
    masked = Removal(analyse(dead), drop.gone).mask()
    smaller = Removal.from_rows(analyse(masked), drop.rows).apply("test")
    check(smaller)
    return difference(dead, masked), difference(masked, smaller)


@pytest.mark.slow
@settings(RANDOM, max_examples=40, phases=[Phase.generate])
@given(random_cnn())
def test_what_was_zero_goes_without_a_trace(spec: Spec) -> None:
    """But for pools that average zeros in at their border: no bias is a pattern."""
    program = exact_program(build(plain(spec)))
    pools = [n for n in program.graph.nodes if "avg_pool" in n.name and n.kwargs.get("padding")]
    simulated, rewritten = lossless(program, spec["seed"])
    assert rewritten <= TOLERANCE
    assert simulated <= TOLERANCE or pools


LOSSY = {
    "pixel-shuffle": "constants become patterns of the plane",
    "position-parameter": "is added to the constant",
    "conv-used-twice": "one bias for calls that lose different constants",
    "conv-bn-used-twice": "the same",
    "conv-used-on-two-scales": "the same",
    "inplace-relu-reused": "values change after they were read",
    "inplace-module-reused": "the same",
    "inplace-on-slice": "the same",
    "broadcast-one-channel": "the constant times what is not known",
    "depthwise-pads-itself": "zeros around the constant",
    "grouped-pads-itself": "the same",
    "conv-transpose": "its border sees less of the constant",
    "conv-transpose-grouped": "the same",
    "conv-transpose-depthwise": "the same",
    "functional-transposed-conv": "the same",
    "attention-matmul": "what a product makes of a constant is not known",
    "attention-heads": "the same",
    "einsum": "the same",
    **dict.fromkeys(
        """spatial-attention softmax-channels layernorm-channels layernorm-maps groupnorm
        l2-normalised-channels nhwc-linear transformer-mlp mixer attention-module""".split(),
        "a channel of zeros counts in statistics over channels",
    ),
}
"""Traps of which some constant cannot go into a bias."""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_traps(part: int) -> None:
    for trap in list(TRAPS)[part::4]:
        simulated, rewritten = lossless(exact_program(TRAPS[trap]()))
        assert rewritten <= TOLERANCE, trap
        assert (simulated <= TOLERANCE) == (trap not in LOSSY), trap


# ---- what becomes of a constant on its way


def chain(middle: nn.Module, reader: nn.Module, shape: tuple[int, ...] = (1, 2, 6, 6)) -> Program:
    """A layer whose channel 0 is the constant 0.75, something, and a reader; in float64."""
    dims = len(shape) - 2
    torch.manual_seed(0)
    first: nn.Module = nn.Linear(2, 3) if dims < 1 else (nn.Conv1d if dims == 1 else nn.Conv2d)(2, 3, 1)
    with torch.no_grad():
        first.weight[0] = 0  # type: ignore[operator]
        first.bias[0] = 0.75  # type: ignore[operator]
    net = nn.Sequential(first, middle, reader)
    return trace(net.double(), torch.randn(shape, dtype=torch.float64))


def moved(program: Program) -> tuple[float, list[Shift]]:
    """How much is lost without channel 0, and what went into biases."""
    channels = analyse(program)
    drop = channels.marks()
    drop[rows_of(channels, "0")[0]] = True
    masked = Removal(channels, drop).mask()
    assert difference(masked, Removal(analyse(masked), drop).apply("test")) <= TOLERANCE
    return difference(program, masked), Removal(channels, drop).shifts


PLANES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.5),
    "hardshrink": lambda: nn.Hardshrink(0.5),
    "threshold": lambda: nn.Threshold(0.8, -3.0),
    "prelu": lambda: nn.PReLU(3),
    "batch norm": lambda: scramble(nn.BatchNorm2d(3), 0),
    "batch norm of the batch": lambda: scramble(nn.BatchNorm2d(3, track_running_stats=False), 0),
    "instance norm": lambda: scramble(nn.InstanceNorm2d(3, affine=True), 0),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "avg pool": lambda: nn.AvgPool2d(2),
    "avg pool that counts what is there": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(2),
    "upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "depthwise": lambda: nn.Conv2d(3, 3, 3, groups=3),
}


@pytest.mark.parametrize("name", PLANES)
def test_constants_reach_the_reader(name: str) -> None:
    program = chain(PLANES[name](), nn.Conv2d(3, 4, 2, bias=False))
    lost, found = moved(program)
    assert lost <= TOLERANCE
    assert [(s.layer, s.exact, s.channels) for s in found] == [("2", True, 1)]


def test_readers_of_every_kind() -> None:
    readers = {
        "grouped": (nn.Conv2d(3, 6, 2, groups=1), (1, 2, 6, 6)),
        "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (1, 2, 6, 6)),
        "same of one": (nn.Conv2d(3, 4, 1, padding="same"), (1, 2, 6, 6)),
        "one position": (nn.Conv2d(3, 4, 3, padding=1, stride=9), (1, 2, 6, 6)),
        "1d": (nn.Conv1d(3, 4, 3), (1, 2, 6)),
        "transposed, its kernel as wide as its stride": (nn.ConvTranspose2d(3, 4, 1), (1, 2, 6, 6)),
        "linear": (nn.Linear(3, 4, bias=False), (1, 2)),
    }
    for name, (reader, shape) in readers.items():
        lost, found = moved(chain(nn.ReLU(), reader, shape))
        assert lost <= TOLERANCE and found[0].exact, name


@pytest.mark.parametrize("reader", [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(3, 4, 3, stride=2)])
def test_a_padded_reader_gets_the_mean_and_says_so(reader: nn.Module) -> None:
    """Closer than to read zeros, and the closest that a bias can get."""
    program = chain(nn.Sigmoid(), reader, (1, 2, 9, 9))
    channels = analyse(program)
    drop = channels.marks()
    drop[rows_of(channels, "0")[0]] = True
    (shift,) = Removal(channels, drop).shifts
    assert not shift.exact
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    lost = (program(x) - Removal(channels, drop).mask()(x)).detach()
    assert lost.mean((0, 2, 3)).abs().max() < 1e-12
    assert lost.square().mean() < (lost + shift.amount.view(1, -1, 1, 1)).square().mean()


def test_not_known_is_never_wrong() -> None:
    """Dropout that a function asks for is random; pads bring zeros in."""
    for function in (
        lambda x: F.dropout(x, 0.5, True),
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: F.softmax(x, 1),
    ):
        torch.manual_seed(0)
        layers = {"a": nn.Conv2d(2, 3, 1), "b": nn.Conv2d(3, 4, 1)}
        net = Net(lambda m, x, f=function: m.b(f(m.a(x))), **layers)  # type: ignore[misc]
        program = trace(net, torch.randn(1, 2, 6, 6))
        with torch.no_grad():
            program.tensors["a.weight"].zero_()
        node = next(n for n in program.graph.nodes if n.target == "b").all_input_nodes[0]
        assert not constants(program)[node].sure.any()


KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": lambda x: F.glu(x, 1),
    "glu along a row": lambda x: F.glu(x[..., :4]),
    "mean of the plane": lambda x: x.mean((2, 3)),
    "mean of the plane, kept": lambda x: x.mean((2, 3), keepdim=True),
    "sum of rows": lambda x: x.sum(-1),
    "largest of each column": lambda x: x.amax(2),
    "mean of the channels": lambda x: x.mean(1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_is_what_does_not_move(name: str) -> None:
    """Where a value is the same for all inputs it is known, and where it is not it is not."""
    program = trace(Net(lambda m, x: KNOWN[name](m.a(x)), a=nn.Conv2d(2, 6, 1)), torch.randn(1, 2, 4, 5))
    with torch.no_grad():
        program.tensors["a.weight"][[0, 1, 3, 5]] = 0
        program.tensors["a.bias"][1] = 0  # whatever its gate is
    with torch.no_grad():
        found = torch.stack([program(torch.randn(1, 2, 4, 5)) for _ in range(3)])
    node = next(n for n in program.graph.nodes if n.op == "output").all_input_nodes[0]
    known = constants(program)[node]
    still = (found == found[0]).all(0)
    assert torch.equal(known.sure.expand(still.shape), still)
    assert torch.allclose(known.value.expand(still.shape)[still], found[0][still].to(known.value))


# ---- through a pass


def test_a_pass_says_what_went_into_biases() -> None:
    program = chain(nn.ReLU(), nn.Conv2d(3, 4, 1))
    pass_ = L1(ratio=0.4, multiple=1)
    result = run_pass(pass_, program, context())
    step, plan = result[0], result[1]
    assert step.summary.endswith("; what was constant of them went into the biases of 1 layers")
    assert plan.evidence["constants"] == {"2": 1} and plan.evidence["inexact_at_the_border"] == []
    assert difference(program, result[2]) <= TOLERANCE
    padded = chain(nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))
    assert "but for the padded borders of 2" in pass_.plan(padded, context()).summary
    assert "constant" not in pass_.plan(tiny_program(), context()).summary


def test_a_normalisation_of_scale_zero_is_a_constant_too() -> None:
    program = chain(scramble(nn.BatchNorm2d(3), 0), nn.Conv2d(3, 4, 1))
    with torch.no_grad():
        program.tensors["0.weight"].normal_()
        program.tensors["1.weight"][0] = 0
    assert moved(program)[0] <= TOLERANCE


def test_one_bias_for_two_names_of_a_layer() -> None:
    """The same module under two paths gets one bias; layers that share one get it if they lose the same."""
    shared = nn.Conv2d(3, 3, 1, bias=False)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 3, 1), shared, shared

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return self.b(x) + self.c(x)

    program = trace(Twice().double(), torch.randn(1, 2, 4, 4, dtype=torch.float64))
    with torch.no_grad():
        program.tensors["a.weight"][0] = 0
    channels = analyse(program)
    drop = channels.marks()
    drop[rows_of(channels, "a")[0]] = True
    masked = Removal(channels, drop).mask()
    assert difference(program, masked) <= TOLERANCE
    biases = [t for n, t in masked.tensors.items() if n in ("b.bias", "c.bias")]
    assert len({id(t) for t in biases}) == 1
