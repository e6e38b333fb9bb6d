"""Removal is exact, legal choices are legal, and nothing else changes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcomp.channels import Channels, JoinPolicy, Removal, analyse
from graphcomp.errors import SurgeryError
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.program import PASS_KEY, Program, output_tensors
from graphcomp.measure.cost import macs, params_state
from graphcomp.models.resnet_cifar import ResNet
from graphcomp.pipeline.verify import TOLERANCE, check, difference, relative_error, verify_pass
from tests.nets import TRAPS, Net, ShuffleUnit, _block, _conv, _head, scramble
from tests.removing import (
    JOINS,
    ByRows,
    digest,
    every_other,
    exact_program,
    half,
    plain_program,
    random_scores,
    rows_of,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = (1, 3, 8, 8)


def net(function: object, **parts: nn.Module | Tensor) -> Program:
    """A scrambled network in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return exact_program((Net(function, **parts), SHAPE))  # type: ignore[arg-type]


def trap(name: str) -> Program:
    return exact_program(TRAPS[name]())


def check_exact(program: Program, join: JoinPolicy, seed: int = 0) -> tuple[Channels, Removal, Program]:
    """Half of everything goes: the smaller program is the masked one's function, and is sound."""
    channels = analyse(program, join)
    score = random_scores(channels, seed)
    drop = half(channels, seed).legal(score)
    try:
        direct = drop.apply("test")
    except SurgeryError:
        drop, _ = drop.feasible(score)
        direct = drop.apply("test")
    masked = drop.mask()
    smaller = ByRows(join).rewrite(masked, drop.rows)
    assert difference(masked, smaller) <= TOLERANCE
    assert digest(direct) == digest(smaller)
    check(smaller)
    return channels, drop, smaller


# ---- Exactness


@pytest.mark.slow
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str, join: JoinPolicy) -> None:
    program = trap(name)
    before = digest(program)
    channels, drop, smaller = check_exact(program, join)
    assert digest(program) == before
    for group in channels.removable:
        lost, width = len(group.channels) - drop.kept(group), len(group.channels)
        assert lost > 0 or width == 1 or len(set(group.blocks.tolist())) == width, group.name
    outputs = zip(output_tensors(program(*program.example_inputs)), _outputs(smaller), strict=True)
    assert all(old.shape == new.shape for old, new in outputs)
    assert not drop or params_state(smaller) < params_state(program)


def _outputs(program: Program) -> list[Tensor]:
    return output_tensors(program(*program.example_inputs))


def strided_view_in_place(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    x[:, ::2].relu_()
    return m.head(x)  # type: ignore[no-any-return]


def view_in_place(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    x.view(x.size(0), 2, 8, 8, 8)[:, 0].relu_()
    return m.head(x)  # type: ignore[no-any-return]


def shuffled_copy_in_place(m: Net, x: Tensor) -> Tensor:
    """The copy that reshape makes becomes a view when one half has a single channel left."""
    x = m.a(x)
    y = x.view(x.size(0), 2, x.size(1) // 2, 8, 8).transpose(1, 2).reshape(x.size(0), x.size(1), 8, 8)
    y.relu_()
    return m.head(torch.cat([x, y], 1))  # type: ignore[no-any-return]


def written_before_the_move(m: Net, x: Tensor) -> Tensor:
    """The shuffle copies before the write, its halves are taken after it."""
    x = m.a(x)
    y = x.view(x.size(0), 4, 4, 8, 8).transpose(1, 2).reshape(x.size(0), 16, 8, 8)
    x.relu_()
    a, b = y.chunk(2, 1)
    return m.head(torch.cat([m.b(a), b, x], 1))  # type: ignore[no-any-return]


def repeated_by_count(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head(m.one(x).repeat(1, x.size(1), 1, 1))  # type: ignore[no-any-return]


def unflatten_of_a_join(m: Net, x: Tensor) -> Tensor:
    return m.head(m.u(m.a(x) + m.b(x))[:, :, 1:].flatten(1, 2))  # type: ignore[no-any-return]


def augmented_view(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    y = x[:, :8]
    y += m.b(x)
    return m.head(x)  # type: ignore[no-any-return]


class Indexed(nn.Module):
    """A module of the user's own that holds an index and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 9, 8, 7, 6]))
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order] * self.scale


def a(width: int = 16) -> nn.Module:
    return _conv(3, width)


FOUND: dict[str, Callable[[], Program]] = {
    "strided view written in place": lambda: net(strided_view_in_place, a=a(), head=_head(16)),
    "view written in place": lambda: net(view_in_place, a=a(), head=_head(16)),
    "copy that becomes a view": lambda: net(shuffled_copy_in_place, a=a(4), head=_head(8)),
    "moved after a write": lambda: net(written_before_the_move, a=a(), b=_conv(8, 8), head=_head(32)),
    "augmented view": lambda: net(augmented_view, a=a(), b=_conv(16, 8), head=_head(16)),
    "repeat by a count": lambda: net(repeated_by_count, a=a(), one=_conv(16, 1), head=_head(16)),
    "module that cannot follow a join": lambda: net(
        unflatten_of_a_join, a=a(), b=a(), u=nn.Unflatten(1, (4, 4)), head=_head(12)
    ),
    "grouped reader of a join": lambda: net(
        lambda m, x: m.head(m.g(m.a(x) + m.b(x))), a=a(), b=a(), g=_conv(16, 12, groups=4), head=_head(12)
    ),
    "max of two by keyword": lambda: net(
        lambda m, x: m.head(torch.max(m.a(x), other=m.b(x))), a=a(), b=a(), head=_head(16)
    ),
    "tuple in a row": lambda: net(
        lambda m, x: m.head(torch.cat(m.a(x).split([3, 6, 7], 1)[1:], 1)), a=a(), head=_head(13)
    ),
    "stack of a tuple": lambda: net(
        lambda m, x: m.head(torch.stack(m.a(x).unflatten(1, (4, 4)).unbind(2), 1).flatten(1, 2)),
        a=a(),
        head=_head(16),
    ),
    "keyword operands": lambda: net(
        lambda m, x: m.head(torch.cat(tensors=torch.chunk(input=m.a(input=x), chunks=2, dim=1)[::-1], dim=1)),
        a=a(),
        head=_head(16),
    ),
    "select by keyword": lambda: net(
        lambda m, x: m.head(torch.select(m.a(x), dim=1, index=3).unsqueeze(1)), a=a(), head=_head(1)
    ),
    "index of a module of one's own": lambda: net(
        lambda m, x: m.head(m.indexed(m.a(x))), a=a(), indexed=Indexed(), head=_head(8)
    ),
    "own zeros of a pad": lambda: net(
        lambda m, x: m.head(m.b(x) + F.pad(x, (0, 0, 0, 0, 2, 3))), b=_conv(3, 8), head=_head(8)
    ),
    "grouped convs in a chain": lambda: net(
        lambda m, x: m.head(m.h(F.channel_shuffle(m.g(m.a(x)), 4))),
        a=a(),
        g=_conv(16, 24, groups=4),
        h=_conv(24, 12, groups=3),
        head=_head(12),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, join: JoinPolicy) -> None:
    """Every network here was once wrong, or raised."""
    program = FOUND[name]()
    for seed in range(4):
        check_exact(program, join, seed)


def test_a_refusal_names_the_node_and_keeps_its_channels() -> None:
    program = net(strided_view_in_place, a=a(), head=_head(16))
    channels = analyse(program)
    drop = channels.marks()
    drop[rows_of(channels, "a")[[0, 4, 6, 1]]] = True
    with pytest.raises(
        SurgeryError, match=r"^getitem: found memory shared with a, and written in place"
    ) as e:
        Removal(channels, drop).apply("test")
    assert e.value.node == "getitem"
    assert set(np.flatnonzero(drop).tolist()) >= e.value.channels > frozenset()
    legal, kept = Removal(channels, drop).feasible(random_scores(channels))
    assert list(kept) == ["getitem"]
    assert kept["getitem"] == str(e.value)
    assert not legal.gone[list(e.value.channels)].any()


@pytest.mark.slow
def test_two_removals_in_a_row() -> None:
    for name in ("option-a-shortcuts", "shuffle-units", "grouped-resnext", "densenet-block", "se-linear"):
        for join in JOINS:
            program = trap(name)
            for seed in (1, 2):
                _, drop, smaller = check_exact(program, join, seed)
                assert drop
                assert macs(smaller) < macs(program)
                program = smaller


@pytest.mark.parametrize("join", JOINS)
def test_odd_sizes_and_another_batch(join: JoinPolicy) -> None:
    program = exact_program((ResNet(20), (1, 3, 33, 33)))
    check_exact(program, join)


# ---- The traps of the methods (T0.x)


def zeroed_inputs(program: Program, gone: dict[str, Sequence[int]], x: Tensor) -> Tensor:
    """The outputs when reader -> input channels are zeroed by hooks: a mask that knows nothing of ours."""
    copy = program.clone()

    def hook(columns: Sequence[int]) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def zero(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            changed = args[0].clone()
            changed[:, list(columns)] = 0
            return (changed,)

        return zero

    for layer, columns in gone.items():
        copy.layer(layer).register_forward_pre_hook(hook(columns))
    return output_tensors(copy(x))[0].detach()


def test_byte_size_and_work_shrink_and_no_filter_is_left_empty() -> None:
    """T0.2: pruning is not a mask."""
    program = trap("inception-block")
    _, _, smaller = check_exact(program, "couple")

    def stored(p: Program) -> int:
        return sum(t.numel() * t.element_size() for t in p.tensors.values())

    assert stored(smaller) < 0.5 * stored(program)
    assert macs(smaller) < 0.5 * macs(program)
    for name, tensor in smaller.tensors.items():
        if tensor.ndim > 1:
            assert tensor.flatten(1).abs().sum(1).min() > 0, name
            assert tensor.transpose(0, 1).flatten(1).abs().sum(1).min() > 0, name


def test_option_a_map() -> None:
    """T0.3: stage-1 channel j is stage-2 channel j + 8 and stage-3 channel j + 24."""
    program = exact_program((ResNet(20), (1, 3, 32, 32)))
    channels = analyse(program)
    drop = channels.marks()
    drop[rows_of(channels, "conv1")[[1, 6, 11]]] = True
    smaller = Removal(channels, drop).legal(random_scores(channels)).apply("test")
    stages = {1: [1, 6, 11], 2: [9, 14, 19], 3: [25, 30, 35]}
    readers = {f"layer{s}.{b}.conv1": rows for s, rows in stages.items() for b in range(3)}
    readers |= {f"layer{s}.0.conv1": stages[s - 1] for s in (2, 3)} | {"linear": stages[3]}
    (x,) = fresh_inputs(program, 2, 0, torch.float64)
    expected = zeroed_inputs(program, readers, x)
    assert relative_error(smaller(x).detach(), expected) <= TOLERANCE
    assert [smaller.layer(f"layer{s}.1.conv2", nn.Conv2d).out_channels for s in (1, 2, 3)] == [13, 29, 61]  # type: ignore[attr-defined]


def test_flatten_of_a_2x2_map() -> None:
    """T0.4: channel k of the map is columns 4k to 4k + 3."""
    program = net(
        lambda m, x: m.fc(F.adaptive_avg_pool2d(m.a(x), 2).view(-1, 32)), a=a(8), fc=nn.Linear(32, 5)
    )
    channels = analyse(program)
    drop = channels.marks()
    drop[rows_of(channels, "a")[[1, 2, 7]]] = True
    smaller = Removal(channels, drop).apply("test")
    columns = [4 * k + i for k in (0, 3, 4, 5, 6) for i in range(4)]
    assert torch.equal(smaller.tensors["fc.weight"], program.tensors["fc.weight"][:, columns])
    assert difference(Removal(channels, drop).mask(), smaller) <= TOLERANCE


def test_beta_and_bias_of_removed_channels_do_not_leak() -> None:
    """T0.5: a removed channel is zero where it is read, whatever its normalisation adds."""
    program = net(lambda m, x: m.head(m.b(m.a(x))), a=_block(3, 8), b=_block(8, 6), head=_head(6))
    with torch.no_grad():
        program.tensors["a.1.bias"].fill_(5)
    channels = analyse(program)
    drop = channels.marks()
    drop[rows_of(channels, "a.0")[[2, 5]]] = True
    (x,) = fresh_inputs(program, 2, 0, torch.float64)
    expected = zeroed_inputs(program, {"b.0": [2, 5]}, x)
    assert relative_error(Removal(channels, drop).apply("t")(x).detach(), expected) <= TOLERANCE
    assert relative_error(Removal(channels, drop).mask()(x).detach(), expected) <= TOLERANCE
    assert relative_error(program(x).detach(), expected) > 1e-3


def test_the_pass_check_scrambles_and_uses_float64() -> None:
    """T0.6: the one check holds for a network as it was initialised, in float32, at an odd size."""
    program = plain_program(ResNet(20), 1, 3, 17, 19)
    channels = analyse(program)
    plan = half(channels).legal(random_scores(channels)).rows
    assert verify_pass(ByRows(), program, plan) <= TOLERANCE


@pytest.mark.parametrize("join", JOINS)
def test_training_goes_on_after_a_removal(join: JoinPolicy) -> None:
    """T0.8: an optimizer of the smaller program has state of its shapes, and moves every weight."""
    module, shape = TRAPS["option-a-shortcuts"]()
    program = plain_program(scramble(module, 0), *shape)
    channels = analyse(program, join)
    drop = half(channels).legal(random_scores(channels))
    smaller = drop.apply("test")
    parameters = dict(smaller.module.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    original = digest(program)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
    smaller.module.train()
    (x,) = fresh_inputs(smaller, 4, 0)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(smaller.module(x), torch.arange(4)).backward()
        optimizer.step()
    for name, parameter in parameters.items():
        assert optimizer.state[parameter]["momentum_buffer"].shape == before[name].shape
        if name.endswith("weight"):  # a bias before a normalisation has no gradient
            assert not torch.equal(parameter, before[name]), name
    assert digest(program) == original


# ---- What stays as it is


@pytest.mark.parametrize("join", JOINS)
def test_nothing_of_the_original_changes_or_is_shared(join: JoinPolicy) -> None:
    program = trap("option-a-shortcuts")
    before = digest(program)
    channels = analyse(program, join)
    drop = half(channels).legal(random_scores(channels))
    for changed in (drop.mask(), drop.apply("test"), program.clone()):
        with torch.no_grad():
            for tensor in changed.tensors.values():
                tensor.zero_()
        assert digest(program) == before


def test_removing_nothing_changes_nothing() -> None:
    for name in ("shuffle-units", "option-a-shortcuts", "tied-convs"):
        for join in JOINS:
            program = trap(name)
            channels = analyse(program, join)
            nothing = Removal(channels, channels.marks()).legal(random_scores(channels))
            assert not nothing
            assert nothing.rows == {}
            assert digest(nothing.apply("test")) == digest(program)
            assert digest(nothing.mask()) == digest(program)


def test_frozen_weights_stay_frozen() -> None:
    module, shape = TRAPS["frozen-stem"]()
    program = exact_program((module, shape))
    _, _, smaller = check_exact(program, "couple")

    def frozen(p: Program) -> list[str]:
        return [name for name, tensor in p.module.named_parameters() if not tensor.requires_grad]

    assert frozen(smaller) == frozen(program) == ["before.0.weight", "before.1.weight", "before.1.bias"]


def test_tied_weights_stay_tied() -> None:
    _, drop, smaller = check_exact(trap("tied-convs"), "couple")
    assert drop
    assert smaller.tensors["a.weight"] is smaller.tensors["b.weight"]


def test_evaluation_mode_stays() -> None:
    _, _, smaller = check_exact(trap("dropout2d"), "couple")
    assert not any(m.training for m in smaller.module.modules())


def test_changed_nodes_name_the_pass() -> None:
    program = trap("literal-view-flat")
    channels = analyse(program)
    smaller = every_other(channels, "body.0").apply("mine")
    changed = {n.name for n in smaller.graph.nodes if n.meta[PASS_KEY] == "mine"}
    assert changed == {"body_0", "body_1", "view", "fc"}
    assert {n.meta[PASS_KEY] for n in smaller.graph.nodes} == {"trace", "mine"}


def test_nodes_that_removal_leaves_without_users_go() -> None:
    """The shuffle whose halves lose different channels is bypassed; the shuffle and its buffers go."""
    program = trap("index-select-buffer")
    _, drop, smaller = check_exact(program, "couple")
    assert drop
    check(smaller)
    assert "order" not in smaller.tensors


# ---- Which choices are legal

LEGAL = ["grouped-resnext", "grouped-after-cat", "shuffle-units", "option-a-shortcuts", "cat-self", "mixer"]
ANALYSED: dict[tuple[str, JoinPolicy], Channels] = {}


def analysed(name: str, join: JoinPolicy) -> Channels:
    if (name, join) not in ANALYSED:
        ANALYSED[name, join] = analyse(trap(name), join)
    return ANALYSED[name, join]


@pytest.mark.slow
@given(st.sampled_from(LEGAL), st.sampled_from(JOINS), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_legalise(name: str, join: JoinPolicy, seed: int, share: float) -> None:
    channels = analysed(name, join)
    random = np.random.default_rng(seed)
    score = random.random(len(channels.channel_of))
    wanted = random.random(len(score)) < share
    drop = Removal(channels, wanted).legal(score)
    derived = channels.marks()
    derived[[c for g in channels.groups if g.derived for c in g.channels]] = True
    assert not (drop.gone & ~wanted & ~derived & ~drop.idle.channels).any()
    assert not drop.gone[0]
    assert not drop.gone[list(channels.pinned)].any()
    assert not list(drop.idle.missed())
    for balance in channels.balanced:
        counts = set((~drop.gone[balance.rows]).sum(1).tolist()) - ({0} if balance.spare else set())
        assert balance.node in drop.idle.names or len(counts) <= 1
    for join_ in channels.joins:
        gone = drop.gone[join_.operands[0]] & drop.gone[join_.operands[1]]
        assert not (drop.gone[join_.result] & ~gone).any()
    assert np.array_equal(drop.legal(score).gone, drop.gone)
    assert np.array_equal(Removal.from_rows(channels, drop.rows).gone, drop.gone)


@pytest.mark.parametrize("join", JOINS)
def test_everything_cannot_go(join: JoinPolicy) -> None:
    """The best channel of every tensor stays; of every group of a grouped conv."""
    for name in LEGAL:
        channels = analysed(name, join)
        drop = Removal(channels, ~channels.marks()).legal(random_scores(channels))
        smaller = drop.apply("test")
        check(smaller)
        assert difference(drop.mask(), smaller) <= TOLERANCE


def test_the_highest_score_stays() -> None:
    channels = analysed("cat-self", "couple")
    rows = rows_of(channels, "before.0")
    score = np.zeros(len(channels.channel_of))
    score[rows[11]] = 1
    drop = channels.marks()
    drop[rows] = True
    assert rows[~Removal(channels, drop).legal(score).gone[rows]].tolist() == [rows[11]]


def test_groups_stay_balanced_by_score() -> None:
    channels = analysed("grouped-resnext", "couple")  # 12 channels in 3 groups
    rows = rows_of(channels, "reduce.0")
    score = np.zeros(len(channels.channel_of))
    score[rows] = np.arange(12)
    drop = channels.marks()
    drop[rows[[0, 1, 4, 8, 9, 10]]] = True
    assert np.flatnonzero(Removal(channels, drop).legal(score).gone[rows]).tolist() == [0, 4, 8]


# ---- Choices as plain data


def test_rows_of_a_choice() -> None:
    channels = analysed("cat-self", "couple")
    drop = channels.marks()
    drop[rows_of(channels, "before.0")[[3, 1]]] = True
    assert Removal(channels, drop).rows == {"before.0.weight": [1, 3]}
    again = Removal.from_rows(channels, {"before.0.weight": [3, 1, 3], "after.0.weight": []})
    assert np.array_equal(again.gone, drop)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"nowhere.weight": [0]}, r"^nowhere\.weight: found no such layer, expected one of \d+"),
        ({"before.0.weight": [16]}, r"^before\.0\.weight: found row 16, expected 0 to 15"),
        ({"before.0.weight": [2, -1]}, r"^before\.0\.weight: found row -1, expected 0 to 15"),
        ({"before.0.weight": list(range(16))}, r"^plan: found 1 channels that cannot be removed"),
        ({"head.2.weight": [0]}, r"^plan: found 1 channels that cannot be removed"),
    ],
)
def test_plans_that_do_not_fit(rows: dict[str, list[int]], message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        Removal.from_rows(analysed("cat-self", "couple"), rows)


def test_plans_that_split_coupled_channels() -> None:
    channels = analysed("option-a-shortcuts", "couple")
    with pytest.raises(SurgeryError, match=r"^one\.1\.weight: found a plan that splits coupled channels"):
        Removal.from_rows(channels, {"stem.0.weight": [0]})


def test_unbalanced_plans() -> None:
    channels = analysed("grouped-resnext", "couple")
    with pytest.raises(SurgeryError, match=r"^plan: found \d channels that cannot be removed"):
        Removal.from_rows(channels, {"reduce.0.weight": [0, 1]})


# ---- Golden printed programs


def residual() -> Program:
    return net(
        lambda m, x: m.head(F.relu(m.branch(y := m.stem(x)) + y)),
        stem=_block(3, 6),
        branch=_block(6, 6),
        head=_head(6),
    )


def shuffle() -> Program:
    return net(
        lambda m, x: m.head(m.two(m.one(m.stem(x)))),
        stem=_block(3, 8),
        one=ShuffleUnit(8),
        two=ShuffleUnit(8),
        head=_head(8),
    )


PRINTED: dict[str, tuple[Callable[[], Program], JoinPolicy, dict[str, list[int]]]] = {
    "residual": (residual, "couple", {"stem.0": [0, 3], "branch.0": [0, 3]}),
    "padded_join": (residual, "pad", {"branch.0": [0, 3]}),
    "shuffle": (shuffle, "couple", {"stem.0": [0, 1, 5], "one.branch.2.0": [3]}),
}


@pytest.mark.parametrize("name", PRINTED)
def test_golden(name: str) -> None:
    build, join, rows = PRINTED[name]
    program, plan = build(), {f"{layer}.weight": gone for layer, gone in rows.items()}
    removal = ByRows(join)
    masked = removal.simulate(program, plan)
    smaller = removal.rewrite(masked, plan)
    assert difference(masked, smaller) <= TOLERANCE
    found = f"{program}\n\n# without {rows}\n\n{smaller}\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GRAPHCOMP_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()
