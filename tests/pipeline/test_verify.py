"""The checker: what it refuses, and that no deliberate bug of the surgery gets past it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.channels import JoinPolicy, analyse, masks, moves, rules
from graphcomp.channels.surgery import Surgeon
from graphcomp.errors import VerifyError
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.program import Program, named_tensors
from graphcomp.ir.tracing import trace
from graphcomp.passes import FoldBN
from graphcomp.pipeline import verify
from graphcomp.pipeline.verify import (
    TOLERANCE,
    check,
    check_outputs,
    difference,
    relative_error,
    scrambled,
    verify_pass,
    verify_trained,
)
from tests.nets import TRAPS, Net, _block, _conv, _head, scramble
from tests.removing import ByRows, Rows, digest, half, plain_program, random_scores
from tests.running import run_pass
from tests.tiny import context, tiny, tiny_program, traced

SHAPE = (1, 3, 8, 8)
FRESH_TOLERANCE = 1e-5  # what is usual for float32


def net(function: object, **parts: nn.Module) -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return plain_program(Net(function, **parts), *SHAPE)  # type: ignore[arg-type]


def trap(name: str) -> Program:
    module, shape = TRAPS[name]()
    return plain_program(module, *shape)


# ---- Deliberate bugs


@dataclass(frozen=True)
class Mutation:
    """A bug, where it shows, and how to put it in."""

    program: Callable[[], Program]
    install: Callable[[pytest.MonkeyPatch], None]
    join: JoinPolicy = "couple"


def slicing(owner: str, change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """`change` gets the right slice and the whole tensor, of those whose name ends in `owner`."""
    right = Surgeon.slice

    def wrong(self: Surgeon, name: str, dims: Any) -> Tensor:
        out = right(self, name, dims)
        return change(out, self.program.tensors[name].detach()) if name.endswith(owner) else out

    return lambda patch: patch.setattr(Surgeon, "slice", wrong)


def half_masked(patch: pytest.MonkeyPatch) -> None:
    right = masks._zero

    def wrong(weight: Tensor, dim: int, gone: Any, groups: int) -> Tensor:
        whole = weight.clone()
        zeroed = right(weight, dim, gone, groups)
        rows = len(zeroed) // 2
        return torch.cat([zeroed[:rows], whole[rows:]])

    patch.setattr(masks, "_zero", wrong)


def reversed_cat(patch: pytest.MonkeyPatch) -> None:
    right = moves.MOVES["cat"]
    patch.setitem(moves.MOVES, "cat", lambda tensors, dim=0: right(list(tensors)[::-1], dim))


def swapped_pads(patch: pytest.MonkeyPatch) -> None:
    right = Surgeon.fix_pad

    def wrong(self: Surgeon, node: fx.Node) -> None:
        right(self, node)
        *planes, before, after = self.new[node].args[1]  # type: ignore[misc]
        self.new[node].update_arg(1, [*planes, after, before])

    patch.setattr(Surgeon, "fix_pad", wrong)


def shifted_spread(patch: pytest.MonkeyPatch) -> None:
    right = Surgeon.spread

    def wrong(self: Surgeon, source: fx.Node, join: Any, present: Any, name: str) -> fx.Node:
        return right(self, source, join, np.roll(present, 1), name)

    patch.setattr(Surgeon, "spread", wrong)


def by_channel(out: Tensor, whole: Tensor) -> Tensor:
    """The columns that one would keep if a channel were one column."""
    return whole[:, : out.size(1)]


def wrong_groups(patch: pytest.MonkeyPatch) -> None:
    right = Surgeon.slice_grouped

    def wrong(self: Surgeon, tensor: Tensor, dims: Any, grouped: int) -> Tensor:
        groups = dims[grouped].groups
        rolled = tensor.reshape(groups, -1, *tensor.shape[1:]).roll(1, 0)
        return right(self, rolled.reshape(tensor.shape), dims, grouped)

    patch.setattr(Surgeon, "slice_grouped", wrong)


def uncoupled(patch: pytest.MonkeyPatch) -> None:
    """An addition that forgets to tie its operands: the first one's channels are the result's."""

    def wrong(tracker: Any, node: fx.Node) -> Tensor:
        return tracker.labels(node.all_input_nodes[0])  # type: ignore[no-any-return]

    patch.setitem(rules.FUNCTION_RULES, "add", wrong)


MUTATIONS = {
    "running mean in another order": Mutation(
        lambda: trap("depthwise"), slicing("running_mean", lambda out, _: out.roll(1, 0))
    ),
    "bias of the first rows": Mutation(
        lambda: net(lambda m, x: m.head(F.relu(m.a(x))), a=_conv(3, 8), head=_head(8)),
        slicing("a.bias", lambda out, whole: whole[: len(out)]),
    ),
    "columns reversed": Mutation(
        lambda: trap("nested-sequential"), slicing("after.0.weight", lambda out, _: out.flip(1))
    ),
    "flatten without blocks": Mutation(lambda: trap("literal-view-flat"), slicing("fc.weight", by_channel)),
    "cat in another order": Mutation(lambda: trap("densenet-block"), reversed_cat),
    "mask on half of the rows": Mutation(lambda: trap("nested-sequential"), half_masked),
    "depthwise weight stays behind": Mutation(
        lambda: trap("depthwise"), slicing("trap.0.weight", lambda out, whole: whole[: len(out)])
    ),
    "columns of another group": Mutation(lambda: trap("grouped-resnext"), wrong_groups),
    "pads of option A swapped": Mutation(lambda: trap("option-a-shortcuts"), swapped_pads),
    "zeros of a padded join shifted": Mutation(lambda: trap("inplace-add"), shifted_spread, "pad"),
    "addition that couples nothing": Mutation(
        lambda: net(lambda m, x: m.head(m.a(x) + m.b(x)), a=_conv(3, 8), b=_conv(3, 8), head=_head(8)),
        uncoupled,
    ),
}


def plan_for(program: Program, join: JoinPolicy) -> Rows:
    channels = analyse(program, join)
    drop = half(channels, 2).legal(random_scores(channels))
    return drop.rows


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_checker_catches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    program, removal = mutation.program(), ByRows(mutation.join)
    plan = plan_for(program, mutation.join)
    assert verify_pass(removal, program, plan) <= TOLERANCE
    mutation.install(monkeypatch)
    anew = program.clone()
    with pytest.raises(VerifyError):
        verify_pass(removal, anew, plan_for(anew, mutation.join))


def missed_when_fresh(mutation: Mutation, patch: pytest.MonkeyPatch) -> bool:
    """Whether a check on the network as it was initialised, in float32, lets the bug through."""
    program, removal = mutation.program(), ByRows(mutation.join)
    mutation.install(patch)
    plan = plan_for(program, mutation.join)
    try:
        masked = removal.simulate(program, plan)
        return difference(masked, removal.rewrite(masked, plan)) < FRESH_TOLERANCE
    except VerifyError:
        return False


@pytest.mark.slow
def test_a_fresh_network_hides_some_of_them() -> None:
    """Why the check scrambles: statistics of a fresh normalisation are all equal, their order is not seen."""
    missed = []
    for name, mutation in MUTATIONS.items():
        with pytest.MonkeyPatch.context() as patch:
            if missed_when_fresh(mutation, patch):
                missed.append(name)
    assert "running mean in another order" in missed
    assert len(missed) < len(MUTATIONS)


# ---- What it measures


def test_relative_error() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative_error(a, a) == 0
    assert relative_error(torch.tensor([1.0, -3.0]), a) == 0.25
    assert relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert relative_error(torch.tensor([1.0]), torch.tensor([float("inf")])) == float("inf")
    assert (
        relative_error(torch.tensor([255, 0], dtype=torch.uint8), torch.tensor([0, 1], dtype=torch.uint8))
        == 255
    )
    assert relative_error(torch.tensor([True]), torch.tensor([False])) == 1


def test_difference_needs_equal_shapes_and_something_to_compare() -> None:
    a, b = (trace(nn.Linear(4, n), torch.zeros(1, 4)) for n in (5, 6))
    with pytest.raises(VerifyError, match=r"outputs: found shapes \[\(1, 6\)\], expected \[\(1, 5\)\]"):
        difference(a, b)
    empty = trace(net_without_tensors(), torch.zeros(1, 4))
    with pytest.raises(VerifyError, match="found no tensor"):
        difference(empty, empty)


def net_without_tensors() -> nn.Module:
    return Net(lambda m, x: x.size(1))


def test_difference_tries_a_second_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    """A literal 1 in the rewritten program is right for one sample only."""
    whole = trace(Net(lambda m, x: x.flatten(1)), torch.zeros(SHAPE))
    literal = trace(Net(lambda m, x: x.reshape(1, 192)), torch.zeros(SHAPE))
    with pytest.raises(VerifyError, match=r"batch 3: found .*, expected a program that runs"):
        difference(whole, literal)
    assert difference(literal, literal) == 0
    assert capsys.readouterr().err == ""  # fx would print its code


def test_difference_of_what_does_not_run_at_all() -> None:
    broken = trace(nn.Sequential(nn.Linear(4, 5)), torch.zeros(1, 4))
    broken.layer("0").weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(RuntimeError):
        difference(broken, broken)


def test_scrambling_is_seeded_and_touches_a_copy() -> None:
    program = trap("frozen-weights")
    before = digest(program)
    one, same, other = scrambled(program, 0), scrambled(program, 0), scrambled(program, 1)
    assert digest(program) == before
    assert digest(one) == digest(same) != digest(other)
    for name, tensor in named_tensors(one.module).items():
        assert not tensor.is_floating_point() or tensor.dtype == torch.float64
        assert not name.endswith(("bias", "running_mean", "running_var")) or tensor.unique().numel() > 1


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_scrambling_keeps_signals_in_proportion(scale: float) -> None:
    """A layer whose outputs are far from 1 is scaled as a whole; others are left alone."""
    program = net(lambda m, x: m.a(x), a=nn.Conv2d(3, 8, 3, bias=False))
    with torch.no_grad():
        program.tensors["a.weight"].mul_(scale)
    before, after = program.tensors["a.weight"].double(), scrambled(program).tensors["a.weight"]
    ratio = after / before
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio))
    assert (ratio.flatten()[0] == 1) == (scale == 1.0)
    spread = scrambled(program)(*fresh_inputs(program, 2, 0, torch.float64)).std()
    assert 0.1 < spread < 10


def test_scrambled_biases_do_not_drown_signals() -> None:
    """Normalisations that were folded leave biases that are right for images; noise dies behind a few."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(24 if i else 3, 24, 3, padding=1) for i in range(12)]
    with torch.no_grad():
        for layer in layers:
            layer.bias.copy_(8 * torch.randn(24))
    program = trace(nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU6()))), torch.zeros(SHAPE))
    one, other = (fresh_inputs(program, 1, seed, torch.float64) for seed in (1, 2))
    changed = scrambled(program)
    assert relative_error(changed(*one), changed(*other)) > 1e-2


def test_scrambling_leaves_what_is_constant_to_its_bias() -> None:
    program = net(lambda m, x: m.a(x), a=_conv(3, 8))
    with torch.no_grad():
        program.tensors["a.weight"][2] = 0
    (x,) = fresh_inputs(program, 2, 0, torch.float64)
    changed = scrambled(program)
    found = changed(x)[:, 2]
    assert bool((found == found.flatten()[0]).all()) and bool(found.abs().max() > 1e-3)


def test_a_layer_that_is_scaled_yields_what_it_computes_from_then_on() -> None:
    """Its bias is not scaled: what comes after it is calibrated on the very signals that it will get."""
    program = net(lambda m, x: m.a(x), a=_conv(3, 8)).to(torch.float64)
    with torch.no_grad():
        program.tensors["a.weight"].mul_(1e4)
        (x,) = fresh_inputs(program, 2, 0, torch.float64)
        found = verify._Calibration(program, torch.Generator().manual_seed(0)).run(x)
        assert relative_error(found, program(x)) < TOLERANCE


def test_scrambled_statistics_are_about_those_of_what_arrives() -> None:
    """Disturbed by a part of the spread: further off, and signals would die in a deep network."""
    program = net(lambda m, x: m.bn(m.a(x)), a=nn.Conv2d(3, 64, 3, bias=False), bn=nn.BatchNorm2d(64))
    changed = scrambled(program)
    (x,) = fresh_inputs(program, 2, 0, torch.float64)
    rows = F.conv2d(x, changed.tensors["a.weight"]).movedim(1, 0).flatten(1)
    mean, var = (changed.tensors[f"bn.running_{name}"] for name in ("mean", "var"))
    distance = ((mean - rows.mean(1)) / rows.var(1).sqrt()).abs()
    assert distance.min() > 0 and 0.02 < distance.mean() < 0.3
    ratio = var / rows.var(1)
    assert 0.4 < ratio.min() < ratio.max() < 2.5 and ratio.std() > 0.1


def test_scrambling_randomises_constant_parameters() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.full((3, 1, 1), 1e-6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    assert scrambled(trace(Scaled(), torch.zeros(SHAPE))).tensors["gamma"].unique().numel() == 3


@pytest.mark.parametrize(("by", "is_equal"), [(2**-52, True), (2**-30, False)])
def test_rounding_is_no_bug_where_a_network_is_ill_conditioned(by: float, is_equal: bool) -> None:
    """The logistic map doubles every difference sixteen times: one rounding does more than TOLERANCE."""

    class Scaling:
        name = "scaling"

        def simulate(self, program: Program, plan: Any) -> Program:
            return program

        @torch.no_grad()
        def rewrite(self, program: Program, plan: Any) -> Program:
            scaled = program.clone()
            scaled.tensors["a.weight"].mul_(1 + by)
            return scaled

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.sigmoid(m.a(x))
        for _ in range(16):
            h = 4 * h * (1 - h)
        return m.head(h)  # type: ignore[no-any-return]

    program = net(forward, a=_conv(3, 8), head=_head(8))
    if is_equal:
        assert verify_pass(Scaling(), program, {}) > TOLERANCE
    else:
        with pytest.raises(VerifyError, match=r"scaling: found outputs that differ by .* this is a bug"):
            verify_pass(Scaling(), program, {})


@pytest.mark.parametrize(("times", "is_equal"), [(50, True), (200, False)])
def test_how_far_above_one_rounding_a_difference_is_none(
    times: float, is_equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred roundings, whatever one does; all of it above TOLERANCE and below BLIND."""
    monkeypatch.setattr(verify, "rounding", lambda program, seed: 1e-11)
    monkeypatch.setattr(verify, "difference", lambda *_: times * 1e-11)
    program = net(lambda m, x: m.head(m.a(x)), a=_block(3, 8), head=_head(8))
    removal = ByRows()
    if is_equal:
        assert verify_pass(removal, program, {}) == times * 1e-11
    else:
        with pytest.raises(VerifyError, match=r"differ by 2e-09 .* expected at most 1e-09"):
            verify_pass(removal, program, {})


def test_what_is_not_finite_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far rounding moves the outputs, a difference above BLIND is none of it."""

    class Doubling(ByRows):
        def rewrite(self, program: Program, plan: Rows) -> Program:
            changed = program.clone()
            with torch.no_grad():
                changed.tensors["head.2.weight"].mul_(float("inf"))
            return changed

    monkeypatch.setattr(verify, "rounding", lambda program, seed: float("inf"))
    program = net(lambda m, x: m.head(m.a(x)), a=_block(3, 8), head=_head(8))
    with pytest.raises(VerifyError, match=r"differ by inf .* expected at most 1e-07"):
        verify_pass(Doubling(), program, {})


def test_verify_pass_names_the_pass_and_the_error() -> None:
    class Doubling(ByRows):
        def rewrite(self, program: Program, plan: Rows) -> Program:
            changed = program.clone()
            with torch.no_grad():
                changed.tensors["head.2.weight"].mul_(2)
            return changed

    program = net(lambda m, x: m.head(m.a(x)), a=_block(3, 8), head=_head(8))
    with pytest.raises(
        VerifyError, match=r"removal: found outputs that differ by .* expected at most 2.22e-13"
    ):
        verify_pass(Doubling(), program, {})


# ---- What a sound program is


def broken(change: Callable[[fx.GraphModule], None]) -> Program:
    program = net(lambda m, x: m.fc(m.a(x).flatten(1)), a=_block(3, 4), fc=nn.Linear(256, 5))
    check(program)
    change(program.module)
    return Program(program.module, program.example_inputs)


def set_attribute(path: str, name: str, value: object) -> Callable[[fx.GraphModule], None]:
    return lambda module: setattr(module.get_submodule(path), name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_attribute("a.0", "out_channels", 5), r"^a\.0\.out_channels: found 5, expected 4"),
        (set_attribute("a.0", "in_channels", 1), r"^a\.0\.in_channels: found 1, expected 3"),
        (set_attribute("a.1", "num_features", 3), r"^a\.1\.num_features: found 3, expected 4"),
        (set_attribute("fc", "in_features", 255), r"^fc\.in_features: found 255, expected 256"),
        (
            set_attribute("fc", "weight", nn.Parameter(torch.zeros(5, 255))),
            r"^graph: found .*fc",
        ),
        (lambda m: m.register_buffer("spare", torch.zeros(2)), "^spare: found a tensor that no node uses"),
        (lambda m: m.fc.weight.data[0].fill_(float("nan")), "^fc.weight: found 256 NaN or infinite"),
        (
            lambda m: m.get_submodule("a.1").running_var[1:3].fill_(float("inf")),
            r"^a\.1\.running_var: found 2",
        ),
    ],
)
def test_check_names_the_place(change: Callable[[fx.GraphModule], None], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        check(broken(change))


def test_check_lints_the_graph() -> None:
    def use_before_definition(module: fx.GraphModule) -> None:
        nodes = list(module.graph.nodes)
        nodes[1].prepend(nodes[2])

    with pytest.raises(VerifyError, match=r"^graph: found .*expected a well-formed graph"):
        check(broken(use_before_definition))


@pytest.mark.parametrize(
    "name", ["conv-transpose-grouped", "depthwise-multiplier-2", "tied-convs", "frozen-batchnorm", "conv3d"]
)
def test_check_accepts_every_kind_of_layer(name: str) -> None:
    module, shape = TRAPS[name]()
    check(plain_program(scramble(module, 0), *shape))


def test_trained_programs_differ_in_values_only() -> None:
    before, after = tiny_program(), tiny_program()
    after.tensors["fc.bias"].data += 1
    assert verify_trained("finetune", before, after) == 0
    after.module.train()
    with pytest.raises(VerifyError, match="finetune: found a network in training mode, expected eval mode"):
        verify_trained("finetune", before, after)


def test_trained_programs_keep_their_shapes() -> None:
    before = tiny_program()
    folded = run_pass(FoldBN(), before, context())[2]
    with pytest.raises(VerifyError, match=r"finetune: found .* after training, expected '%bn0"):
        verify_trained("finetune", before, folded)


@pytest.mark.parametrize("name", ["bn0", "bn2"])
def test_negative_variances_are_named(name: str) -> None:
    net = tiny()
    net.get_submodule(name).running_var[3] = -1e-6  # type: ignore[index, operator]
    with pytest.raises(VerifyError, match=rf"^{name}\.running_var: found a negative variance, expected 0"):
        check(traced(net, *SHAPE))


def test_weights_that_overflow_are_named() -> None:
    """Each is finite, and so is what the first layers yield."""
    net = tiny()
    with torch.no_grad():
        net.get_submodule("inner").weight.fill_(3e38)  # type: ignore[union-attr, operator]
    program = traced(net, *SHAPE)
    check(program)
    with pytest.raises(VerifyError, match=r"^inner: found NaN or infinity .* inner\.weight has the largest"):
        check_outputs(program)
    check_outputs(tiny_program())


def test_a_division_by_what_a_removal_makes_zero_is_named() -> None:
    """As exporters leave `x / (norm + 1e-10)`: the network is at fault at such inputs, not the surgery."""
    program = net(
        lambda m, x: m.b((y := m.a(x).relu()) / y.square().sum(1, keepdim=True).sqrt()),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 2, 1),
    )
    with pytest.raises(VerifyError, match=r"found NaN or infinity in truediv of what is to be left"):
        verify_pass(ByRows(), program, {"a.weight": [0, 1, 2]})
