"""Which channels are coupled, which are pinned and why: every trap net, and each fact in its smallest net."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.channels import Channels, JoinPolicy, analyse
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.models.resnet_cifar import ResNet
from graphcomp.onnx import export_onnx, read_onnx
from tests.nets import TRAPS, Net, ShuffleUnit
from tests.removing import JOINS, half, plain_program, rows_of

# Trap -> removable channels as `layer:channels`, one number a group of that layer, then what is pinned (but
# for "network output") as `channels node: words of the reason`. A change here is a change of what is exact
# or of what is given up: look for the reason first.
COUPLED: dict[str, tuple[str, ...]] = {
    "glu-functional": ("before.0:8 after.0:12",),
    "glu-module": ("before.0:8 after.0:12",),
    "maxout-sizes": ("before.0:8 after.0:12",),
    "maxout-literals": ("before.0:8 after.0:12",),
    "sum-over-view-groups": ("before.0:4 after.0:12",),
    "slice-strided": ("before.0:8+8 after.0:12",),
    "slice-contiguous": ("before.0:8+8 after.0:12",),
    "slice-negative": ("before.0:16 after.0:12",),
    "slice-of-slice": ("before.0:12+4 after.0:12",),
    "slice-sizes": ("before.0:8 after.0:12",),
    "slice-overlap-add": ("before.0:6 after.0:12",),
    "slice-of-space": ("before.0:16 after.0:12",),
    "index-negative": ("before.0:16 after.0:12",),
    "index-list": ("before.0:4+12 after.0:12",),
    "narrow": ("before.0:8+8 after.0:12",),
    "input-read-by-slices": ("a.0:6 b.0:10 after.0:12",),
    "stack-flatten": ("before.0:16 a:8 after.0:12",),
    "stack-interleaved": ("before.0:16 a:8 after.0:12",),
    "stack-max": ("before.0:16 a:8 after.0:12",),
    "cat-of-flattened-maps": ("stem.0:8 down.0:12",),
    "cat-self": ("before.0:16 after.0:12",),
    "cat-self-and-other": ("before.0:8 conv:8 after.0:12",),
    "cat-relu-shuffle": ("before.0:16 conv:12 after.0:12",),
    "cat-crelu": ("before.0:16 conv:12 after.0:12",),
    "cat-zeros": ("before.0:8 after.0:12",),
    "pixel-shuffle": ("before.0:4 after.0:12",),
    "pixel-unshuffle": ("before.0:6 after.0:12",),
    "space-to-depth-slices": ("before.0:6 after.0:12",),
    "space-to-depth-view": ("before.0:6 after.0:12",),
    "buffer-multiplied": ("before.0:16 after.0:12",),
    "buffer-added": ("before.0:16 after.0:12",),
    "buffer-input-normalised": ("body.0:16",),
    "frozen-batchnorm": ("before.0:16 after.0:12",),
    "position-parameter": ("before.0:16 after.0:12",),
    "layer-scale": ("before.0:16 after.0:12",),
    "scalar-parameter": ("before.0:16 after.0:12",),
    "index-select-buffer": ("before.0:5+11 after.0:12",),
    "literal-view-flat": ("body.0:16",),
    "literal-view-shuffle": ("before.0:16 after.0:12",),
    "size-as-divisor": ("before.0:16 after.0:12",),
    "size-as-scale": ("before.0:16 after.0:12",),
    "option-a-shortcuts": ("stem.0:6 one.0.0:6 two.0.0:12 two.1:6 three.0.0:24 three.1:12",),
    "two-outputs": ("stem.0:16 deep.0:12",),
    "dict-output": ("stem.0:16 deep.0:12",),
    "nested-output-of-maps": ("",),
    "map-output": ("body.0:16",),
    "conv-used-twice": ("before.0:16 after.0:12",),
    "conv-bn-used-twice": ("before.0:16 after.0:12",),
    "conv-used-on-two-scales": ("stem.0:12 shared.0:16",),
    "bn-used-twice": ("before.0:16 a:16 after.0:12",),
    "tied-convs": ("before.0:16 after.0:12",),
    "tied-transposed": ("", "16 fc: used as a tensor", "12 linear: no rule for linear"),
    "frozen-weights": ("before.0:16 after.0:12",),
    "frozen-stem": ("before.0:16 after.0:12",),
    "unused-module": ("before.0:16 conv:16 after.0:12",),
    "unused-value": ("before.0:16 conv:16 after.0:12",),
    "nested-sequential": ("before.0:16 trap.0.0.0:12 trap.1.0:16 after.0:12",),
    "inplace-relu-reused": ("conv:16 after.0:12",),
    "inplace-module-reused": ("conv:8 after.0:12",),
    "inplace-functional": ("stem:16 conv:12",),
    "inplace-on-slice": ("conv:16 after.0:12",),
    "inplace-add": ("stem.0:16",),
    "depthwise": ("before.0:16 after.0:12",),
    "depthwise-multiplier-2": ("before.0:12 after.0:12",),
    "depthwise-after-cat": ("before.0:8 conv:12 after.0:12",),
    "grouped-resnext": ("before.0:16 reduce.0:12 grouped.0:12 after.0:12",),
    "grouped-unequal-widths": ("before.0:16 trap.0:24 after.0:12",),
    "grouped-after-cat": ("before.0:10 conv:6 grouped:12 after.0:12",),
    "se-conv-hardsigmoid": ("before.0:16 down:4 after.0:12",),
    "se-linear": ("before.0:16 down:4 after.0:12",),
    "shuffle-units": (
        "before.0:1+1+2+4+8 trap.0.branch.0.0:8 trap.0.branch.2.0:1+1+2+4 trap.1.branch.0.0:8 "
        "trap.1.branch.2.0:2+2+4 trap.2.branch.0.0:8 trap.2.branch.2.0:4+4 "
        "trap.3.branch.0.0:8 trap.3.branch.2.0:8 after.0:12",
    ),
    "shuffle-module": ("before.0:16 after.0:12",),
    "split-sizes": ("before.0:8+8 conv:8 after.0:12",),
    "unbind": ("before.0:8 after.0:12",),
    "ragged-chunk": ("before.0:6+4 conv:5 after.0:12",),
    "densenet-block": ("before.0:8 one.2:4 two.2:4 three.2:4 after.0:12",),
    "inception-block": (
        "before.0:12 one.0:4 three.0.0:6 three.1.0:8 twice.0.0:3 twice.1.0:5 twice.2.0:5 pool.0:3 after.0:12",
    ),
    "add-self": ("before.0:16 after.0:12",),
    "mul-self": ("before.0:16 after.0:12",),
    "sub": ("before.0:16 after.0:12",),
    "where": ("before.0:16 after.0:12",),
    "broadcast-one-channel": ("before.0:16 after.0:12", "1 mul: broadcast over"),
    "expand-one-channel": ("before.0:1 after.0:12",),
    "repeat-one-channel": ("before.0:16 map:1 after.0:12",),
    "repeat-channels": ("before.0:12 after.0:12",),
    "repeat-interleaved": ("before.0:12 after.0:12",),
    "prelu-per-channel": ("before.0:16 after.0:12",),
    "roll-channels": ("before.0:1 after.0:12",),
    "flip-channels": ("before.0:8 after.0:12",),
    "dropout2d": ("before.0:16 after.0:12",),
    "spatial-attention": ("before.0:16 after.0:12", "1 mul: broadcast over"),
    "softmax-channels": ("before.0:16 after.0:12",),
    "layernorm-channels": ("before.0:16 after.0:12",),
    "layernorm-maps": ("before.0:16 after.0:12",),
    "groupnorm": ("before.0:16 after.0:12",),
    "instancenorm-affine": ("before.0:16 after.0:12",),
    "local-response-norm": ("after.0:12", "16 trap: no rule for LocalResponseNorm"),
    "l2-normalised-channels": ("before.0:16 after.0:12",),
    "cumsum-channels": ("after.0:12", "16 cumsum: cumsum mixes"),
    "topk-channels": ("after.0:12", "16 topk: no rule for topk"),
    "einsum": ("before.0:16 after.0:12",),
    "gram-matrix": ("", "8 flatten_1: flatten of a table of channels by channels"),
    "functional-conv": ("before.0:16 conv2d:12 after.0:12",),
    "functional-linear": ("body.0:16 linear:12",),
    "functional-transposed-conv": ("before.0:16 conv_transpose2d:12 after.0:12",),
    "functional-norm": ("before.0:16 after.0:12",),
    "norm-with-activation": ("before.0:16 after.0:12",),
    "depthwise-pads-itself": ("before.0:16 after.0:12",),
    "grouped-pads-itself": ("before.0:16 trap:12 after.0:12",),
    "weight-standardised": ("before.0:16 conv2d:12 after.0:12",),
    "weight-norm": ("before.0:16 trap:12 after.0:12",),
    "conv-transpose": ("before.0:16 trap:12 after.0:12",),
    "conv-transpose-grouped": ("before.0:16 trap:12 after.0:12",),
    "conv-transpose-depthwise": ("before.0:16 after.0:12",),
    "conv-reflect-padding": ("before.0:16 trap:12 after.0:12",),
    "conv1d": ("0.0.0:12 0.2.0:16",),
    "conv3d": ("0.0.0:12 0.2.0:16",),
    "batchnorm1d-after-linear": ("body.0.0:12 hidden:16",),
    "batchnorm-no-affine": ("before.0:16 after.0:12",),
    "batchnorm-of-batch": ("before.0:16 after.0:12",),
    "preactivation": ("stem:16",),
    "batchnorm-on-input": ("body.0:16",),
    "nhwc-linear": ("before.0:16 up:24 after.0:12",),
    "mean-global": ("body.0:16",),
    "adaptive-pool-flatten": ("body.0:16",),
    "interpolate-to-map": ("before.0:8 down.0:12 after.0:12",),
    "unet-skip": ("stem.0:12 down.0:16 bottom.0:12 up.0:12",),
    "transformer-mlp": ("embed:16 up:24",),
    "mixer": (
        "embed:16 channel_in:24",
        "12 token_in: another axis",
        "10 token_out: another axis",
    ),
    "attention-matmul": ("embed:16 query:12 value:20",),
    "attention-heads": ("embed:16 qkv:4",),
    "attention-module": ("embed:16 attention.in_proj:4+4",),
}

PADDED: dict[str, tuple[str, ...]] = {
    "slice-overlap-add": ("before.0:16 after.0:12",),
    "cat-zeros": ("before.0:8 c:16 after.0:12",),
    "layer-scale": ("before.0:16 conv:16 after.0:12",),
    "option-a-shortcuts": ("stem.0:6 one.0.0:6 one.1:6 two.0.0:12 two.1:12 three.0.0:24 three.1:24",),
    "conv-used-on-two-scales": ("stem.0:12 shared.0:16 head_a.2:5 head_b.2:5",),
    "frozen-weights": ("before.0:16 conv:16 after.0:12",),
    "frozen-stem": ("before.0:16 conv:16 after.0:12",),
    "inplace-add": ("stem.0:16 branch.0:16",),
    "grouped-resnext": ("before.0:16 reduce.0:12 grouped.0:12 expand:16 after.0:12",),
    "ragged-chunk": ("before.0:12+4 conv:5 after.0:12",),
    "roll-channels": ("before.0:16 after.0:12",),
    "preactivation": ("stem:16 conv_a:16 conv_b:16",),
    "nhwc-linear": ("before.0:16 up:24 down:16 after.0:12",),
    "transformer-mlp": ("embed:16 up:24 down:16",),
    "mixer": (
        "embed:16 channel_in:24 channel_out:16",
        "12 token_in: another axis",
        "10 token_out: another axis",
    ),
    "attention-matmul": ("embed:16 query:12 value:20 project:16",),
    "attention-heads": ("embed:16 qkv:4 project:16",),
    "attention-module": ("embed:16 attention.in_proj:4+4 attention.out_proj:16",),
}


def facts(channels: Channels) -> tuple[str, ...]:
    """The row of a network in the tables above, reasons in full."""
    sizes: dict[str, list[str]] = {}
    for group in channels.removable:
        sizes.setdefault(group.name, []).append(str(len(group.channels)))
    pinned: dict[tuple[str, str], int] = {}
    for group in channels.groups:
        if group.pinned is not None and group.pinned[1] != "network output":
            pinned[group.pinned] = pinned.get(group.pinned, 0) + len(group.channels)
    removable = " ".join(f"{layer}:{'+'.join(counts)}" for layer, counts in sizes.items())
    return removable, *(f"{count} {node}: {reason}" for (node, reason), count in pinned.items())


def test_every_trap_has_a_row() -> None:
    assert set(TRAPS) == set(COUPLED)
    assert set(PADDED) <= set(COUPLED)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str, join: JoinPolicy) -> None:
    module, shape = TRAPS[name]()
    channels = analyse(plain_program(module, *shape), join)
    found = facts(channels)
    expected = COUPLED[name] if join == "couple" else PADDED.get(name, COUPLED[name])
    assert found[0] == expected[0]
    assert len(found) == len(expected)
    for reason, words in zip(found[1:], expected[1:], strict=True):
        place, _, what = words.partition(": ")
        assert reason.startswith(f"{place}: ")
        assert what in reason
    check_silence(channels)


def check_silence(channels: Channels) -> None:
    """Every output row of every layer is in one group, which can lose channels or says why not."""
    program = channels.program
    grouped = [c for g in channels.groups for c in g.channels.tolist()]
    assert len(grouped) == len(set(grouped))
    rows = {a.weight: a.channels for a in channels.axes if a.role == "out"}
    for target, module in program.called_modules().items():
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.modules.conv._ConvNd) and (module.groups == 1 or f"{target}.weight" in rows)
        ):
            weights = {n for n, t in program.tensors.items() if t is module.weight}
            assert set(rows[next(n for n in rows if n in weights)].tolist()) <= set(grouped)
    pinned = {g.name: g.pinned for g in channels.groups if g.pinned is not None}
    nodes = {n.name for n in program.graph.nodes}
    assert all(node in nodes and reason for node, reason in pinned.values())
    outputs = [c for c, (_, reason) in channels.pinned.items() if reason == "network output"]
    assert outputs


# ---- One fact a net


def net(function: object, **parts: nn.Module) -> Program:
    return plain_program(Net(function, **parts), 1, 3, 8, 8)  # type: ignore[arg-type]


def conv(inner: int, outer: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, **options)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def test_an_addition_couples_position_by_position_and_is_named() -> None:
    program = net(lambda m, x: m.head(m.a(x) + m.b(x)), a=conv(3, 8), b=conv(3, 8), head=head(8))
    channels = analyse(program)
    (group,) = channels.removable
    assert np.array_equal(rows_of(channels, "a"), rows_of(channels, "b"))
    assert group.coupled_by == ("add",)
    assert group.readers == ("head_2",)
    assert list(group.producers) == ["a", "b"]
    assert np.array_equal(group.producers["b"], np.arange(8))


def test_padded_joins_leave_operands_their_own_channels() -> None:
    program = net(lambda m, x: m.head(m.a(x) + m.b(x)), a=conv(3, 8), b=conv(3, 8), head=head(8))
    channels = analyse(program, "pad")
    assert not set(rows_of(channels, "a")) & set(rows_of(channels, "b"))
    assert [(g.name, g.derived) for g in channels.groups][:2] == [("a", False), ("b", False)]
    (join,) = channels.joins
    assert join.node.name == "add"
    assert np.array_equal(join.operands[1], rows_of(channels, "b"))
    assert [g.derived for g in channels.groups if np.array_equal(g.channels, join.result)] == [True]


def test_option_a_shortcuts_shift_channels() -> None:
    """Stage-1 channel j is stage-2 channel j + 8, which is stage-3 channel j + 24; the rest stand alone."""
    program = plain_program(ResNet(20, option="A"), 1, 3, 32, 32)
    channels = analyse(program)
    one, two, three = (rows_of(channels, f"layer{i}.0.conv2") for i in (1, 2, 3))
    assert np.array_equal(one, rows_of(channels, "conv1"))
    assert np.array_equal(two[8:24], one)
    assert np.array_equal(three[16:48], two)
    assert not set(two[:8]) & set(two[8:])
    assert len(set(three)) == 64
    assert sorted(len(g.channels) for g in channels.removable if len(g.producers) > 1) == [16, 16, 32]


def test_flatten_makes_blocks_of_positions() -> None:
    program = net(lambda m, x: m.fc(m.a(x).flatten(1)), a=conv(3, 4), fc=nn.Linear(256, 5))
    channels = analyse(program)
    columns = next(a.channels for a in channels.axes if a.reads and a.tensors == (("fc.weight", 1),))
    assert np.array_equal(columns, np.repeat(rows_of(channels, "a"), 64))


def test_flatten_of_channels_last_interleaves() -> None:
    program = net(
        lambda m, x: m.fc(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 4), fc=nn.Linear(256, 5)
    )
    channels = analyse(program)
    columns = next(a.channels for a in channels.axes if a.reads and a.tensors == (("fc.weight", 1),))
    assert np.array_equal(columns, np.tile(rows_of(channels, "a"), 64))


def test_grouped_convolutions_are_balanced() -> None:
    program = net(lambda m, x: m.head(m.g(m.a(x))), a=conv(3, 8), g=conv(8, 12, groups=4), head=head(12))
    channels = analyse(program)
    first, second = channels.removable
    assert first.blocks.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] or len(set(first.blocks.tolist())) == 4
    assert [first.blocks.tolist().count(b) for b in sorted(set(first.blocks.tolist()))] == [2] * 4
    assert [second.blocks.tolist().count(b) for b in sorted(set(second.blocks.tolist()))] == [3] * 4
    assert [b.rows.shape for b in channels.balanced] == [(4, 2), (4, 3)]
    assert channels.balanced[0].rows.flatten().tolist() == rows_of(channels, "a").tolist()


def test_depthwise_follows_its_producer() -> None:
    program = net(lambda m, x: m.head(m.d(m.a(x))), a=conv(3, 8), d=conv(8, 16, groups=8), head=head(16))
    channels = analyse(program)
    (group,) = channels.removable
    assert list(group.producers) == ["a"]
    (depthwise,) = (a for a in channels.axes if a.weight == "d.weight")
    assert (depthwise.role, depthwise.tensors) == ("norm", (("d.weight", 0), ("d.bias", 0)))
    assert np.array_equal(depthwise.channels, np.repeat(rows_of(channels, "a"), 2))


def test_cat_of_a_tensor_with_itself_reads_it_twice() -> None:
    program = net(lambda m, x: m.head(torch.cat([y := m.a(x), y], 1)), a=conv(3, 8), head=head(16))
    channels = analyse(program)
    (columns,) = (a.channels for a in channels.axes if a.tensors == (("head.2.weight", 1),))
    assert np.array_equal(columns, np.tile(rows_of(channels, "a"), 2))


def test_cat_offsets_follow_the_order_of_the_operands() -> None:
    program = net(
        lambda m, x: m.head(torch.cat([m.b(y := m.a(x)), y], 1)), a=conv(3, 8), b=conv(8, 4), head=head(12)
    )
    channels = analyse(program)
    (columns,) = (a.channels for a in channels.axes if a.tensors == (("head.2.weight", 1),))
    assert columns.tolist() == [*rows_of(channels, "b"), *rows_of(channels, "a")]


def test_squeeze_and_excitation_gate_is_coupled_its_bottleneck_is_not() -> None:
    module, shape = TRAPS["se-linear"]()
    channels = analyse(plain_program(module, *shape))
    assert np.array_equal(rows_of(channels, "up"), rows_of(channels, "before.0"))
    gated = next(g for g in channels.removable if "up" in g.producers)
    assert gated.coupled_by == ("mul",)
    assert [len(g.channels) for g in channels.group_of("down")] == [4]


def test_shuffle_couples_nothing_but_splits_by_reader() -> None:
    """Two units: after a shuffle of 8, the second unit passes on channels 0, 4, 1, 5 and reads the others."""
    program = net(
        lambda m, x: m.head(m.two(m.one(m.a(x)))),
        a=conv(3, 8),
        one=ShuffleUnit(8),
        two=ShuffleUnit(8),
        head=head(8),
    )
    channels = analyse(program)
    kept = rows_of(channels, "a")[:4]
    made = rows_of(channels, "one.branch.2.0")
    shuffled = [c for pair in zip(kept, made, strict=True) for c in pair]
    columns = next(a.channels for a in channels.axes if a.tensors == (("two.branch.0.0.weight", 1),))
    assert columns.tolist() == shuffled[4:]
    assert not any(g.coupled_by for g in channels.groups)


def test_tied_weights_tie_rows_and_columns() -> None:
    module, shape = TRAPS["tied-convs"]()
    channels = analyse(plain_program(module, *shape))
    group = next(g for g in channels.removable if "a" in g.producers)
    assert group.name == "before.0"
    assert len(group.channels) == 16


def test_glu_couples_halves() -> None:
    program = net(lambda m, x: m.head(F.glu(m.a(x), 1)), a=conv(3, 8), head=head(4))
    rows = rows_of(analyse(program), "a")
    assert np.array_equal(rows[:4], rows[4:])
    assert len(set(rows)) == 4


def test_the_first_reason_to_stay_is_kept_by_node() -> None:
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.head(x - x.cumsum(1))

    channels = analyse(net(forward, a=conv(3, 8), head=head(8)))
    group = next(g for g in channels.groups if g.name == "a")
    assert group.pinned == ("cumsum", "cumsum mixes the channels")
    assert not channels.removable


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.head((y := m.a(x)) / y.numel()),
        lambda m, x: m.head((y := m.a(x)) * (1.0 / y.stride(0))),
        lambda m, x: m.head((y := m.a(x)) / (y.shape[1] * y.shape[2])),
    ],
    ids=["numel", "stride", "shape"],
)
def test_counts_used_as_numbers_pin(function: object) -> None:
    channels = analyse(net(function, a=conv(3, 8), head=head(8)))
    assert not channels.removable
    group = next(g for g in channels.groups if g.name == "a")
    assert group.pinned is not None
    assert group.pinned[1] == "the number of channels is used as a number"


def test_widths_that_are_calculated_with_stay_what_they_were() -> None:
    channels = analyse(net(lambda m, x: m.head((y := m.a(x)) / y.shape[1]), a=conv(3, 8), head=head(8)))
    assert [g.name for g in channels.removable] == ["a"]


def test_spatial_sizes_used_as_numbers_do_not_pin() -> None:
    channels = analyse(net(lambda m, x: m.head((y := m.a(x)) / y.shape[2]), a=conv(3, 8), head=head(8)))
    assert [g.name for g in channels.removable] == ["a"]


def test_wrapped_functions_and_hooks_are_opaque_and_named() -> None:
    hooked = conv(3, 8)
    hooked.register_forward_hook(lambda *_: None)
    channels = analyse(net(lambda m, x: m.head(m.b(m.a(x))), a=hooked, b=conv(8, 6), head=head(6)))
    assert [g.name for g in channels.removable] == ["b"]
    assert ("a", "Conv2d has forward hooks") in channels.pinned.values()


def test_analysis_leaves_the_program_alone_and_repeats_itself() -> None:
    module, shape = TRAPS["shuffle-units"]()
    program = plain_program(module, *shape)
    before = str(program)
    first, second = analyse(program), analyse(program)
    assert np.array_equal(first.channel_of, second.channel_of)
    assert [g.name for g in first.groups] == [g.name for g in second.groups]
    assert str(program) == before


def test_inputs_in_one_batch(tmp_path: Path) -> None:
    """One encoder for two images at once: the batch is no axis of channels."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            parts = self.b(self.a(torch.cat([x, y])).relu()).chunk(2)
            return cast(Tensor, self.head(torch.cat(parts, 1)))

    program = trace(Siamese().eval(), (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)))
    channels = analyse(program)
    assert [list(g.producers) for g in channels.removable] == [["a"], ["b"]]
    small = half(channels).apply("test")
    export_onnx(small, tmp_path / "x.onnx")
    again = analyse(read_onnx(tmp_path / "x.onnx"))
    assert [len(g.channels) for g in again.removable] == [4, 4]


def test_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 8), conv(2, 8), head(8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.head(self.a(x) + self.b(y))

    channels = analyse(trace(Two(), (torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 8))))
    assert [list(g.producers) for g in channels.removable] == [["a", "b"]]
