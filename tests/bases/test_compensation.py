"""What stays of the error once others make up for a channel: against dense algebra, and on whole networks."""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcomp.base import quiet
from graphcomp.base.cache import VARIABLE
from graphcomp.bases import movements, sensitivity
from graphcomp.bases.compensation import Compensation
from graphcomp.bases.elimination import Part, eliminate
from graphcomp.bases.reading import TOO_FEW
from graphcomp.bases.sums import own_shares
from graphcomp.channels import ChannelGroup, Channels, analyse
from graphcomp.data.split import Data, Split
from graphcomp.errors import DataError
from graphcomp.ir.program import Program
from graphcomp.measure import calibrate, gradients, grams, output_weights
from graphcomp.measure.patches import Positions, patches_at
from graphcomp.passes import L1, FoldBN, Obs, Refit
from graphcomp.pipeline import Pipeline, verify
from tests.processes import in_processes
from tests.tiny import SHAPE, context, random_data, tiny_program, traced

measure_grams = sys.modules["graphcomp.measure.grams"]  # the function has the module's name


def many(count: int, *shape: int) -> Data:
    """Unlabelled normal samples to calibrate with."""
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))
    labels = torch.zeros(count, dtype=torch.int64)
    train = Split(labels, np.arange(count), lambda at: (x[torch.from_numpy(at)],), labelled=False)
    return replace(random_data(*shape), train=train)


def part(n: int, m: int, outputs: int, seed: int = 0) -> tuple[Part, Tensor, Tensor]:
    """A reader of n channels with m columns each, its damped Gram matrix and its weights."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(5 * n * m, n * m, generator=generator, dtype=torch.float64)
    a[:, m:] += 0.5 * a[:, :-m]
    gram = a.T @ a / len(a) + 1e-3 * torch.eye(n * m)
    w = torch.randn(outputs, n * m, generator=generator, dtype=torch.float64)
    return Part(np.arange(n), torch.linalg.inv(gram), w.clone()), gram, w


def left(gram: Tensor, w: Tensor, gone: list[int], m: int) -> float:
    """The least E |W a - W' a|^2 over all W' without these channels, by solving for W'."""
    columns = [c * m + i for c in gone for i in range(m)]
    kept = [i for i in range(len(gram)) if i not in columns]
    new = torch.zeros_like(w)
    if kept:
        new[:, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ w.T).T
    return float(((w - new) @ gram * (w - new)).sum())


@given(st.integers(2, 7), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_losses_are_those_of_the_best_weights_without_the_channels(n: int, m: int, o: int, seed: int) -> None:
    reader, gram, w = part(n, m, o, seed)
    curve = eliminate([reader], np.zeros(n, np.int64))
    for keep in range(n + 1):
        gone = curve.order[: n - keep].tolist()
        assert curve.lost[keep] == pytest.approx(left(gram, w, gone, m), rel=1e-6, abs=1e-9)


@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_step_takes_what_costs_least(n: int, m: int, seed: int) -> None:
    reader, gram, w = part(n, m, 3, seed)
    order = eliminate([reader], np.zeros(n, np.int64)).order.tolist()
    for i, channel in enumerate(order):
        costs = {c: left(gram, w, [*order[:i], c], m) for c in range(n) if c not in order[:i]}
        assert costs[channel] == pytest.approx(min(costs.values()), rel=1e-6, abs=1e-9)


def test_readers_add_up_and_an_order_may_be_given() -> None:
    one, gram, w = part(5, 2, 3)
    two, gram2, w2 = part(5, 1, 4, seed=1)
    scores = np.array([3.0, 1.0, 5.0, 2.0, 4.0])
    curve = eliminate([one, two], np.zeros(5, np.int64), scores)
    assert curve.order.tolist() == [1, 3, 0, 4, 2]
    assert curve.lost[3] == pytest.approx(left(gram, w, [1, 3], 2) + left(gram2, w2, [1, 3], 1), rel=1e-6)


def test_blocks_lose_as_many() -> None:
    blocks = np.array([0, 0, 0, 1, 1, 1])
    order = eliminate([part(6, 1, 4)[0]], blocks).order
    assert all(sorted(blocks[order[i : i + 2]]) == [0, 1] for i in range(0, 6, 2))


def test_duplicates_go_first_and_for_nothing() -> None:
    _, gram, w = part(4, 1, 3)
    twice = torch.zeros(5, 4, dtype=torch.float64)
    twice[:4], twice[4, 2] = torch.eye(4), 1  # channel 4 repeats channel 2
    wide = twice @ gram @ twice.T + 1e-9 * torch.eye(5)
    both = Part(np.arange(5), torch.linalg.inv(wide), torch.cat([w, w[:, :1]], 1))
    curve = eliminate([both], np.zeros(5, np.int64))
    assert curve.order[0] in (2, 4) and curve.lost[4] < 1e-6 < curve.lost[3]


# ---------------------------------------------------------------------- statistics


def test_grams_are_second_moments() -> None:
    program, data = tiny_program(), many(24, *SHAPE[1:])
    found = grams(program, data.train, ["inner", "fc"], positions=7, seed=3, memory=1)
    n = len(data.train)
    x = next(data.train.batches(n))[0][0]
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, y: Tensor) -> None:
        seen[name] = args[0]

    for name in ("inner", "fc"):
        program.layer(name).register_forward_hook(partial(keep, name))
    program(x)
    for name, size in (("inner", 64), ("fc", 1)):
        a = patches_at(program.layer(name), seen[name], Positions(7, 3).of(size, 0, n))[:, 0].double()
        assert found[name].rows == len(a) == n * min(size, 7)
        assert torch.allclose(found[name].mean[0], a.mean(0), atol=1e-6)
        assert torch.allclose(found[name].matrix[0], a.T.cov(correction=0), atol=1e-5)


def test_grams_go_on_where_they_were_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same bits, and no sample is looked at twice but for the batch that finds the shift."""
    monkeypatch.setattr(calibrate, "batch_size", lambda program: 8)
    monkeypatch.setattr(measure_grams, "CHECKPOINT", 16)
    program, data = tiny_program(), many(60, *SHAPE[1:])
    measured = partial(grams, program, data.train, ["inner", "fc"], positions=7, seed=3, memory=1 << 30)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "one"))
    whole = measured()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other"))
    told: list[float] = []

    def interrupt(message: str, done: float) -> None:
        told.append(done)
        if done == 40 / 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(progress=interrupt)
    told.clear()
    again = measured(progress=lambda message, done: told.append(done))
    assert told == [40 / 60, 48 / 60, 56 / 60, 1]  # kept at 16 and 32
    for name, gram in whole.items():
        assert gram.rows == again[name].rows
        assert torch.equal(gram.mean, again[name].mean) and torch.equal(gram.matrix, again[name].matrix)
    assert len(list((tmp_path / "other").rglob("*.safetensors"))) == 2  # what was under way is gone


def test_output_weights_are_squared_gradients() -> None:
    program, data = tiny_program(), many(6, *SHAPE[1:])
    found = output_weights(program, data.train, ["inner", "fc"], seed=5, memory=1 << 30)
    n = len(data.train)
    x = next(data.train.batches(n))[0][0]
    total = torch.zeros(16, dtype=torch.float64)
    for i in range(n):
        generator = torch.Generator().manual_seed(hash((5, i)) % (1 << 63))
        v = torch.randint(0, 2, (4,), generator=generator).float() * 2 - 1
        v -= v.mean()
        kept: list[Tensor] = []

        def hold(module: nn.Module, args: Any, y: Tensor, kept: list[Tensor] = kept) -> None:
            y.retain_grad()
            kept.append(y)

        handle = program.layer("inner").register_forward_hook(hold)
        (program(x[i : i + 1])[0] * v).sum().backward()
        handle.remove()
        gradient = kept[0].grad
        assert gradient is not None
        total += gradient[0].double().square().sum((1, 2))
    assert torch.allclose(found["inner"], total / n, rtol=1e-4)


def narrowed(program: Program, group: Any, gone: list[int], statistics: Compensation) -> Program:
    """The network without some channels of a group, whose readers were fitted again, written anew."""
    copy = program.clone()
    for found in statistics._of(group):
        reader, columns = found.reader, found.columns
        assert columns is not None
        gram = statistics.grams[reader.layer].matrix[0]
        weight = copy.layer(reader.layer).weight
        w = weight.detach().double().flatten(1)
        s = columns[gone].flatten().tolist()
        k = [i for i in range(w.shape[1]) if i not in s]
        damped = gram[k][:, k] + 1e-3 * gram.diagonal().mean() * torch.eye(len(k))
        new = torch.zeros_like(w)
        new[:, k] = w[:, k] + torch.linalg.solve(damped, gram[k][:, s] @ w[:, s].T).T
        offset = (w - new) @ statistics.grams[reader.layer].mean[0]
        weight.data = new.reshape(weight.shape).float()
        copy.layer(reader.layer).register_parameter(
            "bias",
            nn.Parameter(
                offset.float()
                + (copy.layer(reader.layer).bias if copy.layer(reader.layer).bias is not None else 0)
            ),
        )
    return copy


def test_sensitivities_are_how_far_outputs_move() -> None:
    program, data = tiny_program(), many(400, *SHAPE[1:])
    channels = analyse(program)
    statistics = Compensation(channels, context(data), "obs", 300, 16)
    groups = [g for g in channels.groups if g.pinned is None]
    curves = {g: (statistics.curve(g), 8) for g in groups}
    found = statistics.sensitivities(curves)
    x = torch.cat([x for (x,), _ in statistics.held_out.batches(64)])
    base = program(x)
    base = base - base.mean(1, keepdim=True)
    for group, (curve, _) in curves.items():
        output = narrowed(program, group, curve.order[:8].tolist(), statistics)(x)
        moved = (output - output.mean(1, keepdim=True) - base).detach().double().square().sum() / len(x)
        assert found[group] * curve.lost[8] == pytest.approx(float(moved), rel=1e-3)


class Added(nn.Module):
    """A sum of inputs: of each channel one of its own and one of other size, that are independent."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(8, 4, 1, bias=False) for _ in range(2))
        self.reader = nn.Conv2d(4, 3, 1)
        with torch.no_grad():
            for conv, start, scale in ((self.a, 0, 1.0), (self.b, 4, 3.0)):
                conv.weight.zero_()
                for i in range(4):
                    conv.weight[i, start + i] = scale * (1 + i)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader((self.a(x) + self.b(x)).relu()).mean((2, 3))


@pytest.mark.parametrize(("layer", "scale"), [("a", 1.0), ("b", 3.0)])
def test_operands_of_padded_sums_count_as_what_is_theirs(layer: str, scale: float) -> None:
    """Losing one of two independent operands loses its part of the sum's variance: 1/10, or 9/10."""
    torch.manual_seed(0)
    program, data = traced(Added(), 1, 8, 6, 6), many(600, 8, 6, 6)
    padded, coupled = (Compensation(analyse(program, j), context(data), "obs") for j in ("pad", "couple"))
    (own,) = padded.channels.group_of(layer)
    (whole,) = coupled.channels.group_of(layer)
    for position in range(4):
        order = np.arange(4.0)
        order[position] = -1
        lost = [
            s.curve(g, _scores(s.channels, g, order)).lost[3] for s, g in ((padded, own), (coupled, whole))
        ]
        assert lost[0] / lost[1] == pytest.approx(scale**2 / 10, rel=0.1)


def _scores(channels: Channels, group: ChannelGroup, values: Any) -> Any:
    scores = np.zeros(len(channels.channel_of))
    scores[group.channels] = values
    return scores


def test_what_the_other_operand_says_as_well_is_not_lost() -> None:
    torch.manual_seed(0)
    net = Added()
    net.b.load_state_dict(net.a.state_dict())
    program, data = traced(net, 1, 8, 6, 6), many(200, 8, 6, 6)
    channels = analyse(program, "pad")
    ((join, (a, b)),) = own_shares(channels, data.train).items()
    assert np.abs(a).max() < 1e-6 and np.abs(b).max() < 1e-6 and len(a) == len(join.result)


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"target": {"macs": 0.6}}])
def test_padded_sums_are_removed_from(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    program, data = traced(Added(), 1, 8, 6, 6), many(200, 8, 6, 6)
    _, (step,) = Pipeline([Obs(multiple=1, join="pad", **options)]).run(program, context(data))
    assert step.verify_error < verify.TOLERANCE and step.changed


# ---------------------------------------------------------------------- the pass


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"target": {"macs": 0.5}}])
@pytest.mark.parametrize("fold", [False, True])
def test_the_pass(options: dict[str, Any], fold: bool) -> None:
    program, data = tiny_program(), many(200, *SHAPE[1:])
    passes = [FoldBN()] if fold else []
    _, steps = Pipeline([*passes, Obs(multiple=4, **options)]).run(program, context(data))
    step = steps[-1]
    assert step.verify_error < verify.TOLERANCE
    measured = [row.get("sensitivity") for row in step.plan.evidence["groups"]]
    assert all(x > 0 for x in measured) if "target" in options else measured and set(measured) == {None}


@pytest.mark.slow
def test_refitted_it_is_closer_than_by_norms() -> None:
    program, data = tiny_program(), many(300, *SHAPE[1:])
    distance = {}
    x = next(data.eval.batches(64))[0][0]
    for criterion in (L1, Obs):
        passes = [FoldBN(), criterion(ratio=0.5, multiple=1), Refit()]
        small, _ = Pipeline(passes).run(program, context(data))
        distance[criterion] = float((small(x) - program(x)).detach().square().sum())
    assert distance[Obs] < distance[L1]


def test_any_criterion_can_be_calibrated() -> None:
    program, data = tiny_program(), many(200, *SHAPE[1:])
    chosen = L1(target={"macs": 0.6}, multiple=1, allocation="calibrated")
    _, steps = Pipeline([chosen]).run(program, context(data))
    assert all(row["sensitivity"] > 0 for row in steps[0].plan.evidence["groups"])


def test_data_are_needed_before_anything_runs() -> None:
    for chosen in (Obs(ratio=0.5), L1(target={"macs": 0.6}, allocation="calibrated")):
        with pytest.raises(DataError, match="found no data"):
            chosen.plan(tiny_program(), context())


class Wide(nn.Module):
    """Its classifier reads more columns than samples can tell apart (T9.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.conv(x).relu()).relu().flatten(1))  # type: ignore[no-any-return]


def test_groups_whose_readers_have_too_few_rows_stay() -> None:
    data = many(100, 3, 8, 8)
    _, steps = Pipeline([Obs(ratio=0.5, multiple=1)]).run(traced(Wide(), 1, 3, 8, 8), context(data))
    assert ("last", f"a layer that reads it {TOO_FEW}") in {(k.where, k.reason) for k in steps[0].plan.kept}
    assert [row["group"] for row in steps[0].plan.evidence["groups"]] == ["conv"]


def test_a_network_in_float64_is_left_as_it_is() -> None:
    """Its weights are views where others are copied."""
    program, data = tiny_program().to(torch.float64), many(400, *SHAPE[1:])
    train = data.train
    data = replace(data, train=replace(train, fetch=lambda at: (train.fetch(at)[0].double(),)))
    before = {name: tensor.clone() for name, tensor in program.tensors.items()}
    Obs(target={"macs": 0.5}, multiple=1).plan(program, context(data))
    assert all(torch.equal(program.tensors[name], tensor) for name, tensor in before.items())


def test_layers_that_memory_has_no_room_for_stay_by_name() -> None:
    data = many(400, *SHAPE[1:])
    plan = Obs(ratio=0.5, multiple=1).plan(tiny_program(), replace(context(data), memory=5000))
    assert any("has more columns than memory has room for: give --memory of" in k.reason for k in plan.kept)


def test_the_evaluation_data_are_not_looked_at() -> None:
    """T9.8: nothing but accuracy depends on them."""
    program, data = tiny_program(), many(200, *SHAPE[1:])
    plans = [
        Obs(target={"macs": 0.5}, multiple=1).plan(program, context(d)).decisions
        for d in (data, replace(data, eval=data.train.subset(np.arange(3))))
    ]
    assert plans[0] == plans[1]


def test_other_samples_are_other_statistics_of_one_program() -> None:
    """Nothing is remembered but by content."""
    program, data = tiny_program(), many(300, *SHAPE[1:])
    train = data.train
    other = replace(data, train=replace(train, fetch=lambda at: (3 * train.fetch(at)[0] + 1,)))
    asked = Obs(target={"macs": 0.5}, multiple=1)
    found = [asked.plan(program, context(d)).evidence["groups"] for d in (data, other, data)]
    assert found[0] == found[2]
    assert all(a["sensitivity"] != b["sensitivity"] for a, b in zip(found[0], found[1], strict=True))


# ---------------------------------------------------------------------- over processes


def judged_in_a_process() -> dict[str, Tensor]:
    """All statistics, in batches of 32, none of which was known before."""
    os.environ["GRAPHCOMP_CACHE"] = ""
    for module in (calibrate, gradients):
        module.batch_size = lambda program, memory=0: 32  # type: ignore[assignment]
    torch.manual_seed(0)
    channels = analyse(traced(Added(), 1, 8, 6, 6), "pad")
    statistics = Compensation(channels, context(many(200, 8, 6, 6)), "obs")
    curves = {g: statistics.curve(g) for g in channels.groups if g.pinned is None}
    moved = statistics.sensitivities({g: (curve, 2) for g, curve in curves.items()})
    found = {f"{g.name} lost": torch.from_numpy(curve.lost) for g, curve in curves.items()}
    found |= {f"{g.name} order": torch.from_numpy(curve.order) for g, curve in curves.items()}
    return found | {f"{g.name} moved": torch.tensor(x, dtype=torch.float64) for g, x in moved.items()}


@pytest.mark.slow
def test_two_processes_find_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCOMP_CACHE", "")
    for module in (calibrate, gradients):
        monkeypatch.setattr(module, "batch_size", module.batch_size)
    alone = judged_in_a_process()
    for together in in_processes(2, judged_in_a_process):
        assert together.keys() == alone.keys() and alone
        for name, tensor in alone.items():
            assert torch.allclose(together[name], tensor, rtol=1e-10, atol=1e-12), name


def test_sensitivities_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And an interrupted measurement goes on behind the sets that are known."""
    monkeypatch.setenv("GRAPHCOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(sensitivity, "AT_ONCE", 1)
    program, split = tiny_program(), many(40, *SHAPE[1:]).eval
    weight = program.tensors["inner.weight"].detach()
    changes = {i: {"inner": (weight * (1 + i), torch.zeros(16))} for i in range(1, 4)}
    ran: list[int] = []
    over = sensitivity._Runs.over

    def counted(self: Any, changes: Any, *args: Any) -> Any:
        if len(ran) == 2 and stop:
            raise KeyboardInterrupt
        ran.extend(changes)
        return over(self, changes, *args)

    monkeypatch.setattr(sensitivity._Runs, "over", counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        movements(program, split, changes, 1 << 30, quiet)
    stop = False
    found = movements(program, split, changes, 1 << 30, quiet)
    assert ran == [1, 2, 3] and list(found) == [1, 2, 3] and len(set(found.values())) == 3
    assert movements(program, split, changes, 1 << 30, quiet) == found and len(ran) == 3
