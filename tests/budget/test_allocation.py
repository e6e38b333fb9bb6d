"""How many channels stay: shares, rounding, the exact search for a target, costs."""

from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphcomp.budget.allocation import Allocation, Judgement, fewest
from graphcomp.budget.cost import Counter, cost_of
from graphcomp.budget.losses import InputLosses
from graphcomp.budget.market import largest
from graphcomp.channels import ChannelGroup, Removal, analyse
from graphcomp.channels.widths import round_up
from graphcomp.errors import TraceError
from graphcomp.ir.program import Program
from graphcomp.measure.cost import macs, params_trainable
from tests.nets import TRAPS
from tests.removing import half, half_and_whole, random_scores
from tests.tiny import tiny_program, traced

COUNTERS = {"macs": macs, "params": params_trainable}


def allocation(program: Program, multiple: int = 1, min_channels: int = 1, seed: int = 0) -> Allocation:
    """Random scores, and random increasing shares for every group."""
    channels = analyse(program)
    rng = np.random.default_rng(seed)
    preserved = {g: np.cumsum(rng.dirichlet(np.ones(len(g.channels)))) for g in channels.removable}
    judgement = Judgement(random_scores(channels, seed), preserved)
    return Allocation(channels, channels.removable, judgement, multiple, min_channels)


def group_of(width: int, blocks: int = 1) -> ChannelGroup:
    """A group of so many channels in equal blocks."""
    each = np.arange(width) // max(width // blocks, 1)
    return ChannelGroup("g", np.arange(1, width + 1), {}, (), (), None, np.minimum(each, blocks - 1), False)


# ---------------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 1), (0.3, 1), (0.31, 2), (0.8, 3), (0.80001, 4), (1.0, 4), (1.5, 4)]
)
def test_fewest(share: float, count: int) -> None:
    assert fewest(np.array([0.3, 0.6, 0.8, 1.0]), share) == count


def test_fewest_forgives_rounding() -> None:
    """T5.6: eight times 0.1 is less than 0.8 in floating point, and is 0.8."""
    held = np.cumsum(np.full(10, 0.1))
    assert held[7] < 0.8
    assert fewest(held, 0.8) == 8


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).map(sorted), st.floats(0, 1))
def test_fewest_is_the_definition(held: list[float], share: float) -> None:
    expected = next((k for k, h in enumerate(held, 1) if h >= share - 1e-12), len(held))
    assert fewest(np.array(held), share) == expected


@pytest.mark.slow
@given(st.lists(st.integers(0, 99), max_size=20).map(sorted), st.integers(-1, 100))
def test_largest_is_the_definition(rungs: list[int], goal: int) -> None:
    expected = max((i for i, r in enumerate(rungs) if r <= goal), default=None)
    assert largest(rungs, lambda r: r <= goal) == expected


def test_largest_asks_for_few() -> None:
    asked: list[float] = []
    largest(range(10_000), lambda r: asked.append(r) or r < 1234)  # type: ignore[func-returns-value]
    assert len(asked) <= 14


# ---------------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    ("keep", "width", "blocks", "multiple", "least", "found"),
    [
        (5, 10, 1, 1, 1, 5),
        (5, 10, 1, 4, 1, 8),
        (9, 10, 1, 4, 1, 10),
        (1, 10, 1, 1, 3, 3),
        (5, 12, 3, 1, 1, 6),
        (5, 12, 3, 4, 1, 12),
        (5, 12, 4, 2, 1, 8),
        (3, 16, 1, 16, 0, 8),
        (9, 16, 1, 16, 0, 16),
        (0, 16, 1, 16, 0, 0),
        (1, 15, 1, 16, 0, 4),  # what divides the multiple and is at most half
        (1, 3, 1, 16, 0, 1),
        (33, 64, 1, 16, 0, 48),
        (1, 24, 3, 16, 0, 24),  # 8, and equal numbers in three blocks
        (1, 16, 1, 7, 0, 7),
        (1, 12, 1, 7, 0, 1),
        (5, 10, 3, 1, 1, 10),  # blocks of unequal size cannot lose equal numbers
    ],
)
def test_round_up(keep: int, width: int, blocks: int, multiple: int, least: int, found: int) -> None:
    assert round_up(keep, group_of(width, blocks), multiple, least) == found


def test_the_lowest_of_every_block_go() -> None:
    net = nn.Sequential(nn.Conv2d(2, 12, 1), nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 2, 1))
    made = allocation(traced(net, 1, 2, 4, 4))
    drop = made.removal(dict.fromkeys(made.groups, 6))
    for group in made.groups:
        for block in range(3):
            members = group.channels[group.blocks == block]
            order = members[np.argsort(made.judgement.scores[members])]
            assert drop.gone[order].tolist() == [True, True, False, False]


# ---------------------------------------------------------------------- targets


@pytest.mark.parametrize("counter", get_args(Counter))
@pytest.mark.parametrize("fraction", [0.02, 0.15, 0.4, 0.77, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_target_is_the_largest_share_that_meets_it(counter: Counter, fraction: float, seed: int) -> None:
    """T5.9: against all break points, one by one; what rounding takes away is given back."""
    made = allocation(tiny_program(), seed=seed)
    cost = cost_of(counter, made.channels)
    goal = fraction * cost(Removal.of(made.channels))
    rungs = sorted({s for held in made.judgement.preserved.values() for s in held})
    met = [r for r in rungs if cost(made.choose(made.uniform(r))) <= goal]
    shares = made.meet(goal, cost)
    assert shares == (made.uniform(max(met)) if met else None)
    if shares:
        assert cost(made.choose(shares)) <= goal < cost(made.choose(made.uniform(rungs[len(met)])))


def test_nothing_smaller_is_infeasible() -> None:
    made = allocation(tiny_program())
    cost = cost_of("params", made.channels)
    least = cost(made.choose(made.uniform(0.0)))
    assert made.meet(least - 1, cost) is None
    at_least = made.meet(least, cost)
    assert at_least is not None
    assert all(count == 1 for count in made.wanted(at_least).values())


def test_nothing_at_all_is_infeasible() -> None:
    made = allocation(traced(nn.ReLU(), 1, 3))
    assert made.meet(0.5, lambda drop: 1.0) is None


def test_any_cost_will_do() -> None:
    """A target needs nothing of a counter but a number that does not fall when more stays."""
    made = allocation(tiny_program())
    shares = made.meet(9, lambda drop: float((~drop.gone[made.groups[0].channels]).sum()))
    assert shares is not None
    assert made.wanted(shares)[made.groups[0]] == 9


def test_given_back_what_rounding_took() -> None:
    """Three groups jump together at one share; those regain it first that lost most of their importance."""
    layers = [nn.Conv2d(a, b, 1) for a, b in ((4, 16), (16, 16), (16, 16), (16, 4))]
    channels = analyse(traced(nn.Sequential(*layers), 1, 4, 4, 4))
    scores = np.ones(len(channels.channel_of))
    one, two, three = channels.removable
    for group, low in ((one, 0.2), (two, 0.8), (three, 0.5)):
        scores[group.channels[:8]] = low
    preserved = {g: np.arange(1, 17) / 16 for g in channels.removable}
    made = Allocation(channels, channels.removable, Judgement(scores, preserved), 8, 1)
    cost = cost_of("macs", channels)
    shares = made.meet(0.8 * cost(Removal.of(channels)), cost)
    assert shares is not None
    widths = {g: int((~made.choose(shares).gone[g.channels]).sum()) for g in channels.removable}
    assert widths == {one: 8, two: 16, three: 16}  # 480 of 640; with `one` it would be all


# ---------------------------------------------------------------------- costs


@pytest.mark.slow
def test_costs_equal_the_counters_after_removal() -> None:
    """On every trap net, under both policies: tied, functional, used twice, grouped, bare parameters."""
    checked = 0
    for name, build in TRAPS.items():
        module, shape = build()
        try:
            program = traced(module, *shape)
        except TraceError:
            continue
        joins: Any = ("couple", "pad")
        for join in joins:
            channels = analyse(program, join)
            scores = random_scores(channels)
            for chosen in (half, half_and_whole):
                drop, _ = chosen(channels).legal(scores).feasible(scores)
                small = drop.apply("test")
                for counter in get_args(Counter):
                    cost, count = cost_of(counter, channels), COUNTERS[counter]
                    assert cost(Removal.of(channels)) == pytest.approx(count(program)), (name, join, counter)
                    assert cost(drop) == pytest.approx(count(small)), (name, join, counter)
                checked += bool(drop)
    assert checked > 200


# ---------------------------------------------------------------------- step by step


def test_greedy_buys_what_saves_most_for_the_loss() -> None:
    """Two groups of equal scores: only the dear one is touched; with a cost that sees no third, never it."""
    layers = [nn.Conv2d(a, b, 1) for a, b in ((4, 16), (16, 16), (16, 16), (16, 4))]
    channels = analyse(traced(nn.Sequential(*layers), 1, 4, 4, 4))
    preserved = {g: np.arange(1, 17) / 16 for g in channels.removable}
    judgement = Judgement(np.ones(len(channels.channel_of)), preserved)
    made = Allocation(channels, channels.removable, judgement, 4, 1)
    one, two, three = channels.removable

    def cost(removal: Removal) -> float:
        kept = [float((~removal.gone[g.channels]).sum()) for g in (one, two, three)]
        return 10 * kept[0] + kept[1]

    shares = made.buy(150, cost)
    assert shares is not None
    assert made.wanted(shares) == {one: 12, two: 16, three: 16}  # 136, and 140 by `two` is not dearer
    least = made.buy(44, cost)
    assert least is not None
    assert made.wanted(least) == {one: 4, two: 4, three: 16}  # what saves nothing is never removed
    assert made.buy(43, cost) is None


def test_greedy_counts_a_loss_in_every_layer_that_reads_it() -> None:
    """A stream that three layers read saves twice as much as a branch, and loses three times as much."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 1)
            self.left, self.right, self.head = (nn.Conv2d(16, 4, 1) for _ in range(3))

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            return self.head(self.inner(x)) + self.left(x) + self.right(x)

    channels = analyse(traced(Net(), 1, 4, 4, 4))
    stream, branch = channels.removable
    assert (len(stream.readers), len(branch.readers)) == (3, 1)
    preserved = {g: np.arange(1, 17) / 16 for g in channels.removable}
    judgement = Judgement(np.ones(len(channels.channel_of)), preserved)
    made = Allocation(channels, channels.removable, judgement, 4, 1)

    def cost(removal: Removal) -> float:
        kept = [float((~removal.gone[g.channels]).sum()) for g in (stream, branch)]
        return 2 * kept[0] + kept[1]

    shares = made.buy(44, cost)
    assert shares is not None
    assert made.wanted(shares) == {stream: 16, branch: 12}


def test_greedy_counts_a_loss_by_its_part_of_what_a_layer_reads() -> None:
    """A quarter of a concatenation, lost whole, is less than half of a layer's only input."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(4, 16, 1) for _ in range(4)])
            self.alone, self.tail, self.head = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(64, 4, 1)

        def forward(self, x: Any) -> Any:
            return self.head(torch.cat([part(x) for part in self.parts], 1)) + self.tail(self.alone(x))

    channels = analyse(traced(Net(), 1, 4, 4, 4))
    *parts, _ = channels.removable
    assert [g.name for g in channels.removable] == [*(f"parts.{i}" for i in range(4)), "alone"]
    preserved = {g: np.arange(1, 17) / 16 for g in channels.removable}
    made = Allocation(
        channels, channels.removable, Judgement(np.ones(len(channels.channel_of)), preserved), 4, 1
    )

    def kept(goal: float) -> dict[str, int]:
        shares = made.buy(goal, lambda drop: float((~drop.gone).sum()))
        assert shares is not None
        return {g.name: k for g, k in made.wanted(shares).items()}

    whole = float((~channels.marks()).sum())
    four, eight = kept(whole - 4), kept(whole - 8)
    assert four["alone"] == eight["alone"] == 16
    assert sum(four[g.name] for g in parts) == 60 and sum(eight[g.name] for g in parts) == 56
    assert kept(whole - 56)["alone"] < 16  # log(64 / 16) for 48 of the parts, log(4) for 12 of the other


def test_greedy_counts_a_summand_by_its_part_of_the_sum() -> None:
    """A third of what the head reads, padded with zeros, is worth a third of a layer's only input."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(4, 16, 1) for _ in range(3)])
            self.alone, self.tail, self.head = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Any) -> Any:
            a, b, c = (part(x) for part in self.parts)
            return self.head(a + b + c) * self.tail(self.alone(x))

    channels = analyse(traced(Net(), 1, 4, 4, 4), "pad")
    groups = channels.removable
    assert [g.name for g in groups] == [*(f"parts.{i}" for i in range(3)), "alone"]
    inputs = InputLosses(channels)
    assert [inputs.loss(g, 0.75) for g in groups] == pytest.approx([*[-np.log(0.75)] * 3, -np.log(0.25)])


@pytest.mark.parametrize("counter", get_args(Counter))
@pytest.mark.parametrize("multiple", [1, 4])
def test_greedy_meets_a_goal_and_only_just(counter: Counter, multiple: int) -> None:
    made = allocation(tiny_program(), multiple)
    cost = cost_of(counter, made.channels)
    goal = 0.6 * cost(Removal.of(made.channels))
    shares = made.buy(goal, cost)
    assert shares is not None
    kept = made.wanted(shares)
    assert cost(made.removal(kept)) <= goal
    one_back = [
        {**kept, g: min(k + multiple, len(g.channels))} for g, k in kept.items() if k < len(g.channels)
    ]
    assert any(cost(made.removal(more)) > goal for more in one_back)


def test_greedy_steps_over_widths_that_save_nothing() -> None:
    """Costs in whole blocks of 8, widths one by one: a step is a block."""
    layers = [nn.Conv2d(a, b, 1) for a, b in ((4, 16), (16, 16), (16, 4))]
    channels = analyse(traced(nn.Sequential(*layers), 1, 4, 4, 4))
    one, two = channels.removable
    preserved = {g: np.arange(1, 17) / 16 for g in channels.removable}
    made = Allocation(
        channels, channels.removable, Judgement(np.ones(len(channels.channel_of)), preserved), 1, 1
    )

    def cost(removal: Removal) -> float:
        blocks = [-(-int((~removal.gone[g.channels]).sum()) // 8) for g in (one, two)]
        return 2 * blocks[0] + blocks[1]

    shares = made.buy(4, cost)
    assert shares is not None
    assert made.wanted(shares) == {one: 8, two: 16}


def test_greedy_gives_back_what_the_last_step_made_needless() -> None:
    """The wide group's one step saves nine times what the narrow one's did, and was bought after it."""
    layers = [nn.Conv2d(a, b, 1) for a, b in ((4, 16), (16, 16), (16, 4))]
    channels = analyse(traced(nn.Sequential(*layers), 1, 4, 4, 4))
    one, two = channels.removable
    scores = np.ones(len(channels.channel_of))
    preserved = {one: np.array([0.0] * 7 + [1e-6] + [0.5] * 7 + [1.0]), two: np.array([0.5] * 15 + [1.0])}
    made = Allocation(channels, channels.removable, Judgement(scores, preserved), 8, 1)

    def cost(removal: Removal) -> float:
        return sum(n * float((~removal.gone[g.channels]).sum() > 8) for g, n in ((one, 90), (two, 10)))

    shares = made.buy(95, cost)
    assert shares is not None
    assert made.wanted(shares)[one] == 16 and made.wanted(shares)[two] < 16  # 10 is enough
    shares = made.buy(50, cost)
    assert shares is not None
    assert made.wanted(shares)[one] < 16 and made.wanted(shares)[two] == 16  # 10 was bought and given back


@pytest.mark.parametrize("goal", [0.9, 0.75, 0.6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_by_curves_of_what_every_width_loses(goal: float, seed: int) -> None:
    """They add up over groups; against all choices: the best loses at most a step less."""
    layers = [nn.Conv2d(a, b, 1) for a, b in ((4, 4), (4, 4), (4, 4), (4, 4))]
    channels = analyse(traced(nn.Sequential(*layers), 1, 4, 4, 4))
    groups = channels.removable
    rng = np.random.default_rng(seed)
    # every further channel that goes loses more than the one before
    losses = {g: [*np.cumsum(np.sort(rng.random(4))).tolist()[::-1], 0.0] for g in groups}
    judgement = Judgement(
        random_scores(channels, seed),
        {g: np.arange(1, 5) / 4 for g in groups},
        losses={g: np.array(x) for g, x in losses.items()},
    )
    made = Allocation(channels, groups, judgement, 1, 1)

    def cost(removal: Removal) -> float:
        return float(
            sum(n * (~removal.gone[g.channels]).sum() for n, g in zip((3, 1, 2), groups, strict=True))
        )

    def lost(kept: Any) -> float:
        return float(sum(losses[g][k] for g, k in kept.items()))

    whole = cost(Removal.of(channels))
    shares = made.buy(goal * whole, cost)
    assert shares is not None
    every = [dict(zip(groups, widths, strict=True)) for widths in product(range(1, 5), repeat=3)]
    best = min(lost(kept) for kept in every if cost(made.removal(kept)) <= goal * whole)
    assert cost(made.choose(shares)) <= goal * whole
    dearest = max(x[k - 1] - x[k] for x in losses.values() for k in range(2, 5))
    assert best <= lost(made.wanted(shares)) <= best + dearest


# ---------------------------------------------------------------------- whole layers


class Dense(nn.Module):
    """Three layers of 8 channels; the next one reads what all before have made, the head reads everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 1)
        self.inner = nn.ModuleList([nn.Conv2d(8 * n, 16, 1) for n in (1, 2, 3)])
        self.outer = nn.ModuleList([nn.Conv2d(16, 8, 1) for _ in range(3)])
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: Any) -> Any:
        found = [self.stem(x)]
        for inner, outer in zip(self.inner, self.outer, strict=True):
            found.append(outer(torch.relu(inner(torch.cat(found, 1)))))
        return self.head(torch.cat(found, 1))


def dense(min_channels: int) -> Allocation:
    """Blocks of 8; every channel is worth the same."""
    channels = analyse(traced(Dense(), 1, 4, 4, 4))
    given = np.ones(len(channels.channel_of))
    preserved = {g: np.arange(1, len(g.channels) + 1) / len(g.channels) for g in channels.removable}
    return Allocation(channels, channels.removable, Judgement(given, preserved), 8, min_channels)


def test_greedy_takes_layers_whole_where_nobody_misses_them() -> None:
    """The last layer is a quarter of what one layer reads, and nothing to anybody else."""
    made = dense(min_channels=0)
    cost = cost_of("macs", made.channels)
    whole = cost(Removal.of(made.channels))
    shares = made.buy(whole - 1, cost)
    assert shares is not None
    drop = made.choose(shares)
    small = drop.apply("test")
    assert {n.target for n in small.graph.nodes if n.op == "call_module"} == {
        "stem", "inner.0", "inner.1", "outer.0", "outer.1", "head",
    }  # fmt: skip
    assert whole - cost(drop) == macs(made.channels.program) - macs(small) == 16 * (24 * 16 + 16 * 8 + 8 * 4)


def test_a_least_number_of_channels_keeps_every_layer() -> None:
    made = dense(min_channels=1)
    cost = cost_of("macs", made.channels)
    shares = made.buy(0.7 * cost(Removal.of(made.channels)), cost)
    assert shares is not None
    assert all(count >= 4 for count in made.wanted(shares).values())
    least = dense(min_channels=0)
    assert cost(made.removal(dict.fromkeys(made.groups, 0))) > cost(
        least.removal(dict.fromkeys(least.groups, 0))
    )


def test_all_layers_cannot_go() -> None:
    """What reads a concatenation needs one of its operands, and keeps it in whole blocks."""
    made = dense(min_channels=0)
    drop = made.removal(dict.fromkeys(made.groups, 0))
    small = drop.apply("test")
    assert small.layer("head").in_channels == 4


def test_layers_that_went_lose_nothing_any_more() -> None:
    """What only a layer reads that has gone costs nothing to remove, and saves nothing: it is left alone."""
    made = dense(min_channels=0)
    cost = cost_of("macs", made.channels)
    shares = made.buy(0.4 * cost(Removal.of(made.channels)), cost)
    assert shares is not None
    drop = made.choose(shares)
    idle = drop.idle.names
    gone = [g for g in made.groups if drop.gone[g.channels].all()]
    inner = [g for g in gone if g.name.startswith("inner") and f"{g.name.replace('.', '_')}" in idle]
    assert inner and all(made.wanted(shares)[g] == 16 for g in inner)


@pytest.mark.parametrize("goal", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("counter", get_args(Counter))
def test_one_share_for_what_stays(counter: Counter, goal: float) -> None:
    """The goal is met, what went whole went whole, and less is lost than by one share for all."""
    made = dense(min_channels=0)
    cost = cost_of(counter, made.channels)
    wanted = goal * cost(Removal.of(made.channels))
    shares, even = made.meet_with_whole_layers(wanted, cost), made.meet(wanted, cost)
    assert shares is not None
    drop = made.choose(shares)
    assert cost(drop) <= wanted
    gone = [g for g, share in shares.items() if share == 0]
    assert gone and all(drop.gone[g.channels].all() for g in gone)
    assert even is None or made._lost(drop) < made._lost(made.choose(even))
    for group in gone:  # none could have stayed beside the others
        assert cost(made.choose({**shares, group: 1.0})) > wanted


@pytest.mark.parametrize("goal", [0.3, 0.6, 0.9])
def test_without_layers_that_may_go_one_share_is_for_all(goal: float) -> None:
    for made in (allocation(tiny_program(), min_channels=0), dense(min_channels=1)):
        cost = cost_of("macs", made.channels)
        wanted = goal * cost(Removal.of(made.channels))
        assert made.meet_with_whole_layers(wanted, cost) == made.meet(wanted, cost)


def test_losses_add_up() -> None:
    """Bought one after the other or all together: what an input loses is the same."""
    made = dense(min_channels=0)
    one, two, *_ = [g for g in made.groups if g.name.startswith("outer")]
    together, apart = InputLosses(made.channels), InputLosses(made.channels)
    total = together.total({one: 0.5, two: 1.0})
    first = apart.loss(one, 0.5)
    apart.lose(one, 0.5)
    assert total == pytest.approx(first + apart.loss(two, 1.0))


def test_a_layer_counts_for_more_than_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much it saves, it stays where what it computes counts for enough."""
    monkeypatch.setattr("graphcomp.budget.losses.DEPTH", 1e6)
    made = dense(min_channels=0)
    cost = cost_of("macs", made.channels)
    goal = 0.7 * cost(Removal.of(made.channels))
    assert made.meet_with_whole_layers(goal, cost) == made.meet(goal, cost)
    bought = made.buy(goal, cost)
    assert bought is not None
    assert min(made.wanted(bought).values()) > 0
