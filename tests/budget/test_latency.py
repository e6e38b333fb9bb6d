"""Compiling to a latency: the loop against machines whose error is known, and the passes that use it."""

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from graphcomp.budget.latency import NEAR, ROUNDS, Trial, best, close
from graphcomp.budget.stopwatch import Stopwatch
from graphcomp.errors import GraphcompWarning, PassError, ProviderError
from graphcomp.measure.cost import macs
from graphcomp.passes.l1 import L1
from graphcomp.passes.low_rank import LowRank
from graphcomp.passes.pfa.pfa import PFA
from graphcomp.runtime.targets import TARGETS
from tests.running import run_pass
from tests.stopwatch import Machine
from tests.tiny import context, random_data, tiny_program, traced

# ---------------------------------------------------------------------- the loop


def loop(asked: float, error: float, step: float) -> list[Trial[float]]:
    """A network of any multiple of `step`, predicted right, measured `error` times as long."""
    return close(
        asked,
        propose=lambda goal: (goal // step) * step or None,
        predict=lambda choice: choice,
        measure=lambda choice: (10.0, 10.0 * choice * error),
    )


@pytest.mark.parametrize("error", [0.5, 0.8, 1.0, 1.25, 1.9])
def test_a_constant_error_is_corrected_in_one_round(error: float) -> None:
    trials = loop(0.5, error, 1e-6)
    assert len(trials) == 1 + (error != 1.0)
    assert best(trials, 0.5).ratio == pytest.approx(0.5, rel=1e-4)


def test_coarse_widths_end_the_loop() -> None:
    """0.4 is predicted and measured for 0.5, and nothing lies between."""
    trials = loop(0.5, 1.0, 0.4)
    assert [t.choice for t in trials] == [0.4]
    assert best(trials, 0.5).choice == 0.4


def test_no_more_than_some_rounds() -> None:
    """A machine on which time does not depend on the network."""
    found = iter(range(100))
    trials = close(0.5, lambda goal: next(found), lambda choice: 0.5, lambda choice: (1.0, 0.9))
    assert len(trials) == ROUNDS


def test_nothing_is_small_enough() -> None:
    assert loop(0.3, 1.0, 0.4) == []


def test_the_largest_that_is_fast_enough() -> None:
    trials = [Trial(i, 0.5, 0.5, (1.0, r)) for i, r in enumerate((0.3, 0.5 * (1 + NEAR), 0.6))]
    assert best(trials, 0.5).choice == 1


def test_the_fastest_with_a_warning() -> None:
    trials = [Trial(i, 0.5, 0.5, (1.0, r)) for i, r in enumerate((0.8, 0.6))]
    with pytest.warns(GraphcompWarning, match=r"measured 0\.600 of the time after 2 rounds, expected 0\.5"):
        assert best(trials, 0.5).choice == 1


# ---------------------------------------------------------------------- times of whole programs


@pytest.mark.slow
def test_stopwatch() -> None:
    watch = Stopwatch(tiny_program(), TARGETS["cpu-avx2"], timer=Machine())
    before, after = watch.race(tiny_program())
    assert before == after > 0
    assert watch.ratio_of(0.25) == 0.25
    assert watch.ratio_of(f"{before / 2}ms") == pytest.approx(0.5)
    with pytest.raises(PassError, match="ms before the pass, expected more than the 1000ms asked for"):
        watch.ratio_of("1000ms")


# ---------------------------------------------------------------------- the passes


def wide() -> Any:
    """Three layers of 64 channels, in the order: cheap to remove, dear, cheap."""
    sizes = ((4, 64, 1), (64, 64, 3), (64, 4, 1))
    return traced(nn.Sequential(*(nn.Conv2d(a, b, k) for a, b, k in sizes)), 1, 4, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("slower", [1.0, 1.4])
@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_l1_meets_a_latency(allocation: Any, slower: float) -> None:
    """Whole networks take longer than the sum of their layers: ratios do not see it, and are met."""
    machine = Machine(slower=slower)
    where = replace(context(), timer=machine)
    pass_ = L1(target={"latency": 0.5}, allocation=allocation)
    _, plan, result = run_pass(pass_, wide(), where)
    evidence = plan.evidence["latency"]
    before, after = Stopwatch(wide(), where.target, timer=machine).race(result)
    assert evidence["milliseconds"] == pytest.approx([before, after])
    assert evidence["measured"] == pytest.approx(after / before) and after / before <= 0.5 * (1 + NEAR)
    assert after / before > 0.35
    assert evidence["predicted"] == pytest.approx(evidence["measured"], abs=0.02)
    assert evidence["rounds"] and evidence["asked"] == 0.5 and evidence["threads"] == 1
    assert macs(result) < macs(wide())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("goal", "usual", "other"), [("latency", "greedy", "uniform"), ("macs", "uniform", "greedy")]
)
def test_what_a_target_is_allocated_by_unless_said(goal: Any, usual: Any, other: Any) -> None:
    program = wide()

    def rows(**options: Any) -> Any:
        pass_ = L1(target={goal: 0.7}, multiple=8, **options)
        return pass_.plan(program, replace(context(), timer=Machine())).decisions["rows"]

    assert rows() == rows(allocation=usual) != rows(allocation=other)


@pytest.mark.slow
def test_milliseconds_are_met() -> None:
    machine = Machine()
    now, _ = Stopwatch(wide(), TARGETS["cpu-avx2"], timer=machine).race(wide())
    _, plan, _ = run_pass(L1(target={"latency": f"{0.6 * now}ms"}), wide(), replace(context(), timer=machine))
    assert plan.evidence["latency"]["asked"] == pytest.approx(0.6)
    assert plan.evidence["latency"]["measured"] <= 0.6 * (1 + NEAR)


@pytest.mark.slow
def test_pfa_meets_a_latency() -> None:
    """Issue 3: the energy follows from predicted times."""
    where = replace(context(random_data(3, 8, 8)), timer=Machine())
    pass_ = PFA(target={"latency": 0.8}, multiple=8)
    _, plan, _ = run_pass(pass_, tiny_program(), where)
    assert plan.evidence["latency"]["measured"] <= 0.8 * (1 + NEAR)


def test_infeasible_latency() -> None:
    where = replace(context(), timer=Machine())
    with pytest.raises(PassError, match=r"target latency: found 0\.\d+ of the latency left when every group"):
        L1(target={"latency": 0.01}).plan(wide(), where)


def test_a_target_that_does_not_work_here_says_so() -> None:
    """No time is invented for a GPU that is not there."""
    with pytest.raises(ProviderError, match="provider 'tensorrt'"):
        L1(target={"latency": 0.5}).plan(wide(), context(target="tensorrt-int8"))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("latency:0.5", {"latency": 0.5}),
        ("latency:0.5x", {"latency": 0.5}),
        ("latency: 3.5ms", {"latency": "3.5ms"}),
        ({"latency": "0.5x"}, {"latency": 0.5}),
        ({"macs": "0.5"}, {"macs": 0.5}),
    ],
)
def test_amounts(given: Any, kept: Any) -> None:
    assert L1(target=given).target == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("latency:2x", "Input should be less than 1"),
        ("latency:0ms", "Input should be greater than 0"),
        ("latency:soon", "Input should be a valid number"),
        ("macs:3.5ms", "found 3.5ms of macs, expected a fraction such as 0.5"),
        ({"latency": True}, "Input should be a valid number"),
        ("latency:nanms", "Input should be greater than 0"),
    ],
)
def test_amounts_that_make_no_sense(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L1(target=given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["svd", "spatial", "tucker2"])
def test_low_rank_meets_a_latency(kind: Any) -> None:
    """The energy follows from predicted times, and what factors would slow down stays and is named."""
    machine = Machine()
    where = replace(context(), timer=machine)
    net = nn.Sequential(nn.Conv2d(4, 64, 1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 4, 1))
    program = traced(net, 1, 4, 8, 8)
    _, plan, result = run_pass(LowRank(target={"latency": 0.8}, kind=kind), program, where)
    before, after = Stopwatch(program, where.target, timer=machine).race(result)
    assert plan.evidence["latency"]["measured"] == pytest.approx(after / before)
    assert after / before <= 0.8 * (1 + NEAR)
    assert plan.evidence["latency"]["predicted"] == pytest.approx(after / before, abs=0.02)
    assert [layer["layer"] for layer in plan.evidence["layers"]] == ["1"]
    assert {k.where for k in plan.kept} == {"0", "2"}


@pytest.mark.slow
def test_factors_that_would_be_slower_stay_whole() -> None:
    """Fewer MACs, but two launches: named with both times."""
    where = replace(context(), timer=Machine(launch=30.0))
    net = nn.Sequential(nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1))
    pass_ = LowRank(target={"latency": 0.8}, multiple=8)
    plan = pass_.plan(traced(net, 1, 4, 4, 4), where)
    kept = {k.where: k.reason for k in plan.kept}
    assert "is predicted to take" in kept["2"] and "ms, one weight" in kept["2"]
