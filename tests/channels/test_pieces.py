"""Splits of which some pieces are read: every way to split, every way to read, every channel that can go.

Also what else only looks like a number of channels, or like channels: assertions on other axes, layers that
work along other axes than that of the channels, and the same operand twice.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from graphcomp.channels import Ints, JoinPolicy, Removal, analyse, surgery
from graphcomp.channels.tracker import Tracker
from graphcomp.errors import SurgeryError
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.program import Program, output_tensors
from graphcomp.pipeline.verify import TOLERANCE, check, difference, relative_error
from tests.channels.test_random_nets import RANDOM
from tests.nets import (
    ASSERTIONS,
    READS,
    SPLITS,
    TRICKY,
    TWICE,
    Built,
    Net,
    Spec,
    build,
    random_cnn,
    read_pieces,
    scramble,
)
from tests.removing import JOINS, exact_program, random_scores, rows_of, some

SHAPE = (1, 3, 4, 4)


def traced(function: Callable[[Any, Tensor], Any], **parts: nn.Module | Tensor) -> Program:
    """A scrambled network in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return exact_program((Net(function, **parts), SHAPE))


def check_removal(program: Program, ids: Ints) -> Program:
    """The smaller program is sound, and the masked one's function."""
    channels = analyse(program)
    drop = Removal.of(channels, ids).legal(random_scores(channels))
    smaller = drop.apply("test")
    check(smaller)
    assert difference(drop.mask(), smaller) <= TOLERANCE
    return smaller


# ---- Pieces


@pytest.mark.slow
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("by", SPLITS)
def test_every_channel_of_a_split_can_go(by: str, read: str) -> None:
    """Three numbers of pieces, whether a piece that is read comes after the one that goes or before."""
    i, j = 1, (2 if read == "two" and len(SPLITS[by](torch.empty(1, 5), 2, 1)) > 2 else 1)

    def forward(m: Any, x: Tensor) -> tuple[Any, Any]:
        y = m.a(x)
        return m.b(read_pieces(SPLITS[by](y, 2, 1), by, read, i, j)), m.c(y)

    width = read_pieces(SPLITS[by](torch.empty(1, 5, 1, 1), 2, 1), by, read, i, j).shape[1]
    program = traced(forward, a=nn.Conv2d(3, 5, 1), b=nn.Conv2d(width, 2, 1), c=nn.Conv2d(5, 3, 1))
    channels, inputs = analyse(program), fresh_inputs(program, 2, 0, torch.float64)
    for channel in np.unique(rows_of(channels, "a")).tolist():
        drop = Removal.of(channels, [channel]).legal(random_scores(channels))
        smaller, masked = drop.apply("test"), drop.mask()
        found, wanted = output_tensors(smaller(*inputs)), output_tensors(masked(*inputs))
        assert max(map(relative_error, found, wanted)) <= TOLERANCE


@pytest.mark.slow
@settings(RANDOM, max_examples=25)
@given(random_cnn([*TRICKY, "pieces", "conv", "cat", "add"]))
@pytest.mark.parametrize("join", JOINS)
def test_what_goes_from_a_random_network_of_pieces_is_what_the_original_does_without(
    join: JoinPolicy, spec: Spec
) -> None:
    """Few channels, often one: equal to the masked program, and to the module itself with masked weights."""
    program = exact_program(build(spec))
    channels = analyse(program, join)
    drop, _ = some(channels, spec["seed"]).feasible(random_scores(channels, spec["seed"]))
    masked, smaller = drop.mask(), drop.apply("test")
    check(smaller)
    assert difference(masked, smaller) <= TOLERANCE
    opened = any(isinstance(m, nn.RNNBase) for m in build(spec)[0].modules())  # into layers of other names
    masks = any(drop.gone[m.channels].any() for m in channels.mixings)  # of values
    if join == "couple" and not masks and not opened:  # else it is not a matter of weights
        check_original(build(spec), masked, smaller)


def check_original(built: Built, masked: Program, smaller: Program) -> None:
    module = scramble(built[0], 0).double().eval()
    module.load_state_dict({name: masked.tensors[name] for name in module.state_dict()})
    inputs = fresh_inputs(smaller, 1, 3, torch.float64)
    with torch.no_grad():
        found, wanted = output_tensors(smaller(*inputs)), output_tensors(module(*inputs))
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) <= TOLERANCE


def test_a_piece_in_the_middle_goes_and_the_items_behind_it_are_renumbered() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Any, Any]:
        y = m.a(x)
        return m.b(y.unbind(1)[2].unsqueeze(1)), m.c(y)

    program = traced(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(1, 2, 1), c=nn.Conv2d(4, 5, 1))
    channels = analyse(program)
    drop = Removal.of(channels, rows_of(channels, "a")[[0]])
    smaller = drop.apply("test")
    assert "%getitem: 1x4x4 = getitem (%unbind, 1)" in str(smaller)
    assert difference(drop.mask(), smaller) <= TOLERANCE


def test_pieces_that_no_slice_picks_are_refused_by_name() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Any, Any]:
        y = m.a(x)
        return m.b(torch.cat(y.split(1, 1)[::2], 1)), m.c(y)

    program = traced(forward, a=nn.Conv2d(3, 7, 1), b=nn.Conv2d(4, 2, 1), c=nn.Conv2d(7, 5, 1))
    channels = analyse(program)
    drop = Removal.of(channels, rows_of(channels, "a")[[1]])
    with pytest.raises(SurgeryError, match=r"^getitem: found pieces that no slice picks") as refusal:
        drop.apply("test")
    assert refusal.value.channels
    left, kept = drop.feasible(random_scores(channels))
    assert not left and list(kept) == ["getitem"]


def test_a_slice_of_pieces_may_be_counted_in_channels() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Any, Any]:
        y = m.a(x)
        return m.b(torch.cat(y.split(1, 1)[: y.size(1) // 2], 1)), m.c(y)

    program = traced(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 2, 1), c=nn.Conv2d(6, 5, 1))
    for row in range(6):
        check_removal(program, rows_of(analyse(program), "a")[[row]])


# ---- A removal that is not exact is loud


BROKEN: dict[str, tuple[str, Callable[[Any, Tensor], Any]]] = {
    "sizes-of-a-split": ("is_affected_move", lambda m, y: torch.cat(y.split([3, 4], 1)[::-1], 1)),
    "sizes-of-a-view": ("is_affected_move", lambda m, y: y.view(-1, 7, 16).unflatten(2, (4, 4))),
    "item-of-a-split": ("fix_piece", lambda m, y: F.pad(y.split([1, 2, 4], 1)[1], [0] * 5 + [5])),
}
"""A step of the surgery, and what is wrong without it."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_shape_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, body = BROKEN[name]
    parts = {"a": nn.Conv2d(3, 7, 1), "b": nn.Conv2d(7, 2, 1), "c": nn.Conv2d(7, 2, 1)}
    program = traced(lambda m, x: (m.b(body(m, y := m.a(x))), m.c(y)), **parts)
    channels = analyse(program)
    drop = Removal.of(channels, rows_of(channels, "a")[[0]])
    drop.apply("test")
    monkeypatch.setattr(surgery.Surgeon, step, lambda *_: False)
    with pytest.raises(SurgeryError, match="this is a bug in graphcomp"):
        drop.apply("test")


def test_a_number_of_channels_must_not_change_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surgery does not take the analysis's word for it."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.b(y / (y.shape[1] * x.shape[2]))

    monkeypatch.setattr(Tracker, "pin_count", lambda *_: None)
    program = traced(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1))
    channels = analyse(program)
    drop = Removal.of(channels, rows_of(channels, "a")[[0]])
    with pytest.raises(SurgeryError, match=r"^truediv: found a number of channels that another operator"):
        drop.apply("test")


# ---- Assertions


def reasons(program: Program, layer: str) -> set[str]:
    """Why what a layer produces has to stay."""
    channels = analyse(program)
    return {channels.pinned[c][1] for c in rows_of(channels, layer).tolist() if c in channels.pinned}


@pytest.mark.parametrize("name", ASSERTIONS)
def test_an_assertion_on_another_axis_pins_nothing(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        torch._assert(ASSERTIONS[name](x, 4), "size")
        return m.b(x)

    program = traced(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1))
    assert not reasons(program, "a")
    assert "_assert" in str(check_removal(program, rows_of(analyse(program), "a")[[1, 4]]))


OF_CHANNELS: dict[str, Callable[[Tensor], Any]] = {
    "whole": lambda x: x.shape == (1, 6, 4, 4),
    "part": lambda x: x.shape[:2] == (1, 6),
    "product": lambda x: x.shape[1] * x.shape[2] == 24,
    "flat": lambda x: x.flatten(1).shape[1] == 96,
    "numel": lambda x: x.numel() == 96,
}


@pytest.mark.parametrize("name", OF_CHANNELS)
def test_an_assertion_on_channels_pins_them(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        torch._assert(OF_CHANNELS[name](x), "size")
        return m.b(x)

    program = traced(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1))
    assert reasons(program, "a") == {"the number of channels is asserted"}


def test_a_part_of_a_shape_that_is_computed_with_pins_what_it_counts() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x, y = m.a(x), m.b(x)
        return m.c(x / x.shape[2:][0]), m.d(y / (y.shape[1:][0] * y.shape[1:][1]))

    parts = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(3, 6, 1)}
    program = traced(forward, **parts, c=nn.Conv2d(6, 2, 1), d=nn.Conv2d(6, 2, 1))
    assert not reasons(program, "a")
    assert reasons(program, "b") == {"the number of channels is used as a number"}


OF_WIDTHS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape[1] == 6,
    "negative": lambda x: x.shape[-3] == 6,
    "size": lambda x: x.size(dim=1) == 6,
    "item-of-part": lambda x: x.shape[1:3][0] == 6,
    "sum": lambda x: (x.shape[2:] + x.shape[:2])[3] == 6,
    "divisible": lambda x: x.shape[1] % 3 == 0,
}


@pytest.mark.parametrize("name", OF_WIDTHS)
def test_an_assertion_on_the_width_alone_holds_and_goes(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        torch._assert(OF_WIDTHS[name](x), "size")
        return m.b(x)

    program = traced(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1))
    assert not reasons(program, "a")
    assert "_assert" not in str(check_removal(program, rows_of(analyse(program), "a")[[1, 4]]))


def test_a_number_of_tokens_is_none_of_channels() -> None:
    """A class token in front: its labels are others than those of patches until a normalisation ties them."""

    def forward(m: Any, x: Tensor) -> Any:
        x = m.a(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)
        torch._assert(x.shape[1] == 1 + m.side(x) ** 2, "tokens")
        return m.b(m.norm(x / x.shape[1] ** 0.5))

    program = traced(
        forward,
        a=nn.Conv2d(3, 6, 1),
        token=nn.Parameter(torch.randn(1, 1, 6)),
        side=_Side(),
        norm=nn.LayerNorm(6),
        b=nn.Linear(6, 2),
    )
    assert not reasons(program, "a")
    check_removal(program, rows_of(analyse(program), "a")[[1, 4]])


class _Side(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return int((x.shape[1] - 1) ** 0.5)


def test_an_assertion_that_does_not_hold_stays() -> None:
    """As for three samples at most, which all batches that are tried have."""

    def forward(m: Any, x: Tensor) -> Any:
        torch._assert(x.shape[0] < 4, "batch")
        return m.b(m.a(x))

    program = traced(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1))
    assert "_assert" in str(program)
    with pytest.raises(AssertionError, match="batch"):
        program(torch.zeros(4, 3, 4, 4, dtype=torch.float64))


# ---- Layers that work along another axis than that of the channels


def channels_last(x: Tensor) -> Tensor:
    """(1, C, H, W) as (1, 1, C), the mean of every plane."""
    return x.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2)


def gate(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.sigmoid(y.transpose(-1, -2).unsqueeze(-1))


BESIDE: dict[str, tuple[nn.Module, Callable[[Any, Tensor], Tensor], str | None]] = {
    "eca": (
        nn.Conv1d(1, 1, 3, padding=1),
        lambda m, x: gate(x, m(channels_last(x))),
        "Conv1d slides over the channels",
    ),
    "eca-2d": (
        nn.Conv2d(1, 1, 3, padding=1),
        lambda m, x: x + m(x.flatten(2).unsqueeze(1)).squeeze(1).unflatten(2, (4, 4)),
        "Conv2d slides over the channels",
    ),
    "dilated": (
        nn.Conv1d(1, 1, 3, padding=4, dilation=4, bias=False),
        lambda m, x: gate(x, m(channels_last(x))),
        "Conv1d slides over the channels",
    ),
    "transposed": (
        nn.ConvTranspose1d(1, 1, 3, padding=1),
        lambda m, x: gate(x, m(channels_last(x))),
        "ConvTranspose1d slides over the channels",
    ),
    "grouped": (
        nn.Conv1d(16, 16, 3, padding=1, groups=4),
        lambda m, x: x + m(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 4)),
        "Conv1d slides over the channels",
    ),
    "depthwise": (
        nn.Conv1d(16, 16, 3, padding=1, groups=16),
        lambda m, x: x + m(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 4)),
        "Conv1d slides over the channels",
    ),
    "strided": (
        nn.Conv1d(1, 4, 3, stride=2, padding=1),
        lambda m, x: x * m(channels_last(x)).mean(),
        "Conv1d slides over the channels",
    ),
    "pool": (
        nn.AvgPool1d(3, 1, 1),
        lambda m, x: gate(x, m(channels_last(x))),
        "AvgPool1d slides over the channels",
    ),
    "pool-halves": (
        nn.AdaptiveMaxPool1d(2),
        lambda m, x: x * m(channels_last(x)).sum(),
        "AdaptiveMaxPool1d slides over the channels",
    ),
    "instancenorm": (
        nn.InstanceNorm1d(1, affine=True),
        lambda m, x: gate(x, m(channels_last(x))),
        "InstanceNorm1d's statistics mix the channels",
    ),
    "pointwise": (nn.Conv1d(1, 1, 1), lambda m, x: gate(x, m(channels_last(x))), None),
    "pointwise-places": (
        nn.Conv1d(16, 16, 1),
        lambda m, x: x + m(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 4)),
        None,
    ),
    "batchnorm": (nn.BatchNorm1d(1), lambda m, x: gate(x, m(channels_last(x))), None),
    "batchnorm-places": (
        nn.BatchNorm1d(16),
        lambda m, x: x + m(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 4)),
        None,
    ),
    "prelu-places": (
        nn.PReLU(16),
        lambda m, x: x + m(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 4)),
        None,
    ),
    "linear-places": (nn.Linear(16, 16), lambda m, x: x + m(x.flatten(2)).unflatten(2, (4, 4)), None),
}
"""A layer, its use, and why the channels have to stay (None if it sees one at a time)."""


@pytest.mark.parametrize("name", BESIDE)
def test_a_layer_beside_the_channels(name: str) -> None:
    """What mixes channels pins them by name; nothing ties them into one that counts as removable."""
    layer, function, reason = BESIDE[name]
    program = traced(
        lambda m, x: m.b(function(m.layer, m.a(x))), a=nn.Conv2d(3, 6, 1), layer=layer, b=nn.Conv2d(6, 2, 1)
    )
    channels = analyse(program)
    assert len(np.unique(rows_of(channels, "a"))) == 6
    assert reasons(program, "a") == ({reason} if reason else set())
    own = ["layer"] if name == "strided" else []  # its windows make channels of their own
    assert [g.name for g in channels.removable] == (own if reason else ["a"])
    check_removal(program, rows_of(channels, "a")[[0, 3] if reason is None else []])


def test_a_layer_that_is_also_used_beside_the_channels_stays() -> None:
    """Its rows and columns are other things there."""

    def forward(m: Any, x: Tensor) -> Any:
        x = m.a(x).flatten(2)
        return m.c(m.shared(F.relu(m.shared(x)))), m.shared(x.transpose(1, 2))

    program = traced(forward, a=nn.Conv2d(3, 16, 1), shared=nn.Conv1d(16, 16, 1), c=nn.Conv1d(16, 2, 1))
    assert reasons(program, "shared") == {"works along another axis than that of the channels"}
    channels = analyse(program)
    score = random_scores(channels)
    check_removal(program, np.flatnonzero(Removal(channels, ~channels.marks()).legal(score).gone))


# ---- The same operand twice


@pytest.mark.parametrize("name", TWICE)
def test_the_same_operand_twice(name: str) -> None:
    width = TWICE[name](x := torch.rand(1, 6, 4, 4), x).shape[1]

    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.b(TWICE[name](y, y)), m.c(y)

    program = traced(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(width, 2, 1), c=nn.Conv2d(6, 2, 1))
    channels = analyse(program)
    assert not reasons(program, "a")
    check_removal(program, rows_of(channels, "a")[[0, 3]])
