"""What does not pay: what is looked at, what is restored, and who has the last word."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import nn

from graphcomp.budget.restoring import Paying, restore
from graphcomp.budget.restoring_factors import layer_left_alone, paying_factors
from graphcomp.budget.stopwatch import Stopwatch
from graphcomp.channels import Removal, analyse
from graphcomp.errors import PassError, ProviderError
from graphcomp.factors.decompose import Factor
from graphcomp.factors.surgery import rewrite, simulate
from graphcomp.ir.program import Program
from graphcomp.measure.cost import macs
from graphcomp.passes.l1 import L1
from graphcomp.passes.low_rank import LowRank
from graphcomp.pipeline import Context, Pipeline
from graphcomp.pipeline.verify import TOLERANCE
from graphcomp.records import Plan
from tests.removing import digest
from tests.running import run_pass
from tests.stopwatch import Machine
from tests.tiny import context, traced

KEEP_95 = {"ratio": 0.05, "multiple": 1}
"""61 of 64 channels, 76 of 80: no multiple of 4 and one."""


def net() -> Program:
    """Layers of 64 and 80 channels between inputs and outputs that stay."""
    sizes = ((4, 64, 1), (64, 80, 3), (80, 4, 1))
    return traced(nn.Sequential(*(nn.Conv2d(a, b, k) for a, b, k in sizes)), 1, 4, 8, 8)


def where(machine: Machine, timed: bool = True) -> Context:
    return replace(context(), timer=machine, timed=timed)


def widths(plan: Any) -> dict[str, int]:
    return {row["group"]: row["kept"] for row in plan.evidence["groups"]}


@pytest.mark.slow
def test_a_slower_group_is_left_alone_and_named() -> None:
    """Reading 61 channels takes twice as long as reading 64; 76 are as good as 80."""
    _, plan, result = run_pass(L1(**KEEP_95), net(), where(Machine(odd=2.0)))
    assert widths(plan) == {"0": 64, "1": 76}
    ((place, reason),) = [(k.where, k.reason) for k in plan.kept if "slower" in k.reason]
    assert place == "0" and reason == "61 of 64 channels predicted 1.94x slower; left alone"
    assert len(plan.kept) == 2  # and the output
    times = plan.evidence["reverted"]["milliseconds"]
    assert times["restored"] < times["planned"] and times["restored"] <= times["before"]
    assert plan.evidence["reverted"]["groups"] == {"0": pytest.approx(2.0, rel=0.05)}
    assert dict(result.module.named_modules())["1"].weight.shape[:2] == (76, 64)


def measured(monkeypatch: pytest.MonkeyPatch, before: float, planned: float, restored: float) -> None:
    """What whole networks are going to take; nothing is exported for it."""
    monkeypatch.setattr(Stopwatch, "times", lambda self, others: [before, planned, restored])


def test_what_is_measured_overrules_what_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single kernels are slow at 61 channels, the whole network is not: the plan stays."""
    measured(monkeypatch, 3.0, 2.0, 2.0)
    plan = L1(**KEEP_95).plan(net(), where(Machine(odd=2.0)))
    assert widths(plan) == {"0": 61, "1": 76}
    times = {"before": 3.0, "planned": 2.0, "restored": 2.0}
    assert plan.evidence["reverted"] == {"groups": {}, "milliseconds": times}


@pytest.mark.parametrize(
    ("options", "timed"),
    [
        ({**KEEP_95, "revert": "never"}, True),
        (KEEP_95, False),  # a run that measures nothing: counts as in a paper
        ({"ratio": 0.5}, True),  # whole blocks never leave the layout
        ({"ratio": 0.0625, "multiple": 4}, True),
    ],
)
def test_nothing_is_measured_in_vain(options: dict[str, Any], timed: bool) -> None:
    machine = Machine(odd=2.0)
    plan = L1(**options).plan(net(), where(machine, timed))
    assert machine.asked == 0 and "reverted" not in plan.evidence
    assert all(kept < full for kept, full in zip(widths(plan).values(), (64, 80), strict=True))


def test_always_looks_at_all_widths_in_every_run() -> None:
    """Also where nothing leaves the layout; on a machine where nothing is slower, nothing comes back."""
    machine = Machine()
    plan = L1(ratio=0.5, revert="always").plan(net(), where(machine, timed=False))
    assert machine.asked > 0 and widths(plan) == {"0": 32, "1": 40} and "reverted" not in plan.evidence


def test_always_needs_the_target() -> None:
    with pytest.raises(ProviderError, match="provider 'tensorrt'"):
        L1(ratio=0.5, revert="always").plan(net(), context(target="tensorrt-int8"))


def test_nothing_that_pays_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 3.0, 4.0, 3.0)
    pass_ = L1(**KEEP_95, include=["0"])
    with pytest.raises(PassError, match=r"0: 61 of 64 channels predicted \d\.\d\dx slower; left alone"):
        Pipeline([pass_]).run(net(), where(Machine(odd=2.0)))
    plan = pass_.plan(net(), where(Machine(odd=2.0)))
    assert plan.decisions["rows"] == {}


def test_the_reached_part_of_a_target_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is missing from the target: evidence and summary say so."""
    measured(monkeypatch, 3.0, 4.0, 2.5)
    asked = L1(target={"macs": 0.91}, multiple=1)
    met = replace(asked, revert="never").plan(net(), where(Machine()))
    assert met.evidence["target"] == {"of": "macs", "asked": 0.91, "reached": pytest.approx(0.91, abs=0.01)}
    assert met.evidence["target"]["reached"] <= 0.91 and "asked for" not in met.summary
    missed = asked.plan(net(), where(Machine(odd=3.0)))
    reached = missed.evidence["target"]["reached"]
    assert reached > 0.91 and missed.summary.endswith(f"{reached:.3f} of the macs left, 0.91 asked for")


def test_a_latency_is_what_the_restored_network_takes() -> None:
    channels = analyse(net())
    drop, group = Removal.of(channels), channels.removable[0]
    met = {"latency": {"asked": 0.5, "measured": 0.51}}
    pass_ = L1(target={"latency": 0.5})
    told = pass_._reached(drop, met, Paying(drop, {}))
    assert told == {"target": {"of": "latency", "asked": 0.5, "reached": 0.51}}
    told = pass_._reached(drop, met, Paying(drop, {group: 1.3}, (4.0, 3.8, 3.0)))
    assert told == {"target": {"of": "latency", "asked": 0.5, "reached": 0.75}}


# ---------------------------------------------------------------------- the search


def test_the_dearest_come_first_and_all_are_looked_at_again() -> None:
    """Items a and b share an operator: once b is restored, a pays."""
    times = {"ab": [9.0, 4.0], "a": [2.0, 4.0], "b": [6.0, 4.0], "": [3.0, 4.0]}
    asked: list[str] = []

    def instead(choice: str, item: str) -> list[str]:
        asked.append(item)
        return [choice.replace(item, "")] if item in choice else []

    left, slower = restore("ab", ["a", "b"], instead, lambda choice: np.array(times[choice]))
    assert left == "a" and slower == {"b": pytest.approx(9 / 2)}
    assert asked[:3] == ["a", "b", "b"] and asked.count("a") >= 3


def test_an_item_that_goes_back_in_two_steps() -> None:
    """The first thing to try is tried first, though the second is faster; then the second, from there."""
    times = {"split": 8.0, "plain": 4.0, "whole": 3.0}
    steps = {"split": ["plain", "whole"], "plain": ["whole"], "whole": []}
    left, slower = restore(
        "split", ["layer"], lambda choice, _: steps[choice], lambda choice: np.array([times[choice], 1.0])
    )
    assert left == "whole" and slower == {"layer": pytest.approx(8 / 3)}


@pytest.mark.parametrize(("ratio", "left"), [(1.01, "split"), (1.05, "whole")])
def test_what_is_within_the_margin_stays(ratio: float, left: str) -> None:
    times = {"split": ratio, "whole": 1.0}
    found = restore(
        "split", ["layer"], lambda c, _: ["whole"] if c == "split" else [], lambda c: np.array([times[c]])
    )
    assert found == (left, {} if left == "split" else {"layer": ratio})


# ---------------------------------------------------------------------- factors

LAUNCH = 30.0
"""ms of any operator, so that two take long."""


def wide() -> Program:
    """Rank 16 pays in the second layer only: the others have too little to do."""
    sizes = ((4, 64, 3), (64, 64, 3), (64, 64, 1))
    return traced(nn.Sequential(*(nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in sizes)), 1, 4, 8, 8)


@pytest.mark.slow
def test_slower_factors_are_not_made_and_named() -> None:
    program, machine, pass_ = wide(), Machine(launch=LAUNCH), LowRank(rank=16)
    step, plan, result = run_pass(pass_, program, where(machine))
    assert [f["layer"] for f in plan.decisions["factors"]] == ["1"] == [
        row["layer"] for row in plan.evidence["layers"]
    ]  # fmt: skip
    assert {k.where: k.reason for k in plan.kept} == {
        "0": "rank 16 predicted 1.07x slower; left alone",
        "2": "rank 16 predicted 1.13x slower; left alone",
    }
    reverted = plan.evidence["reverted"]
    assert reverted["layers"] == {"0": pytest.approx(1.075, abs=1e-3), "2": pytest.approx(1.134, abs=1e-3)}
    watch = Stopwatch(program, where(machine).target, timer=machine)
    every = [Factor(layer=name, rank=16) for name in "012"]
    planned = rewrite(simulate(program, every), every, "low-rank")
    times = dict(zip(("before", "planned", "restored"), watch.times([planned, result]), strict=True))
    assert reverted["milliseconds"] == times and times["restored"] < times["planned"] < times["before"]
    assert plan.summary == "factored 1 of 3 layers (svd)" and step.verify_error <= TOLERANCE
    again = Plan.model_validate_json(plan.model_dump_json())  # the decisions are the final ones
    assert digest(pass_.rewrite(pass_.simulate(program, again), again)) == digest(result)


def test_what_is_measured_overrules_what_was_predicted_of_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single kernels seem to be slower in two; the network is not slower: the plan stays."""
    untimed = LowRank(rank=16).plan(wide(), where(Machine(launch=LAUNCH), timed=False))
    measured(monkeypatch, 3.0, 2.0, 2.0)
    plan = LowRank(rank=16).plan(wide(), where(Machine(launch=LAUNCH)))
    times = {"before": 3.0, "planned": 2.0, "restored": 2.0}
    assert plan.evidence["reverted"] == {"layers": {}, "milliseconds": times}
    assert plan.decisions == untimed.decisions and plan.kept == untimed.kept == []
    assert plan.summary == "factored 3 of 3 layers (svd)"


@pytest.mark.parametrize(("revert", "timed"), [("auto", False), ("never", False), ("never", True)])
def test_nothing_is_measured_where_it_is_not_asked_for(revert: Any, timed: bool) -> None:
    """And the plan is what it was, but for the option itself."""
    machine = Machine(launch=LAUNCH)
    plan = LowRank(rank=16, revert=revert).plan(wide(), where(machine, timed))
    assert machine.asked == 0 and plan.evidence.keys() == {"multiple", "energy", "layers"}
    assert len(plan.decisions["factors"]) == 3 and plan.kept == []


def test_always_measures_factors_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 3.0, 2.5, 2.0)
    machine = Machine(launch=LAUNCH)
    plan = LowRank(rank=16, revert="always").plan(wide(), where(machine, timed=False))
    assert machine.asked and [f["layer"] for f in plan.decisions["factors"]] == ["1"]
    with pytest.raises(ProviderError, match="provider 'tensorrt'"):
        LowRank(rank=16, revert="always").plan(wide(), context(target="tensorrt-int8"))


def test_factors_that_all_pay_are_not_timed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Stopwatch, "times")
    plan = LowRank(rank=16, include="1").plan(wide(), where(Machine(launch=LAUNCH)))
    assert len(plan.decisions["factors"]) == 1 and "reverted" not in plan.evidence


def test_no_factors_that_pay_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 3.0, 4.0, 3.0)
    pass_ = LowRank(rank=16, include=("0", "2"))
    with pytest.raises(PassError, match=r"0: rank 16 predicted 1\.07x slower; left alone; 2: rank 16 pred"):
        Pipeline([pass_]).run(wide(), where(Machine(launch=LAUNCH)))
    plan = pass_.plan(wide(), where(Machine(launch=LAUNCH)))
    assert plan.decisions["factors"] == [] and len(plan.kept) == 3


def test_a_target_of_macs_that_is_missed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 3.0, 2.5, 2.0)
    program, asked = wide(), LowRank(target={"macs": 0.35}, multiple=16)
    met = asked.plan(program, where(Machine(launch=LAUNCH), timed=False))
    assert len(met.decisions["factors"]) == 3 and "asked for" not in met.summary
    missed = asked.plan(program, where(Machine(launch=LAUNCH)))
    target = missed.evidence["target"]
    assert len(missed.decisions["factors"]) == 1 and target["reached"] > 0.35
    assert missed.summary.endswith(f"; {target['reached']:.3f} of the macs left, 0.35 asked for")
    result = asked.rewrite(asked.simulate(program, missed), missed)
    assert target["reached"] == macs(result) / macs(program)


@pytest.mark.slow
def test_a_target_of_times_leaves_nothing_to_restore() -> None:
    """What is not faster is not factored there to begin with."""
    plan = LowRank(target={"latency": 0.8}).plan(wide(), where(Machine(launch=LAUNCH)))
    assert "reverted" not in plan.evidence and "latency" in plan.evidence


def test_kept_channels_with_a_rank_fall_back_to_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading half of the channels pays without the second launch; reading 61 of 64 does not even then."""
    measured(monkeypatch, 9.0, 8.0, 7.0)
    factors = [
        Factor(layer="1", keep=list(range(32)), rank=32),
        Factor(layer="2", keep=list(range(61)), rank=32),
    ]
    paid = paying_factors(wide(), factors, "always", where(Machine(launch=400.0, odd=3.0)).clock, 8)
    assert paid.choice == {"1": Factor(layer="1", keep=list(range(32)))}
    assert paid.slower == {"1": pytest.approx(1.56, abs=0.01), "2": pytest.approx(3.81, abs=0.01)}
    assert paid.milliseconds == (9.0, 8.0, 7.0)


def test_reasons_say_what_was_planned_and_what_it_is_now() -> None:
    keep = list(range(12))
    both = Factor(layer="a", keep=keep, rank=8)
    split = Factor(layer="a", rank=8, rank_in=4, kind="tucker2")
    assert layer_left_alone(both, None, 1.234, 16) == (
        "rank 8 with 12 of 16 channels predicted 1.23x slower; left alone"
    )
    assert layer_left_alone(both, both.as_one_weight(), 1.5, 16) == (
        "rank 8 with 12 of 16 channels predicted 1.50x slower; one weight that reads 12 of 16 channels"
    )
    assert layer_left_alone(both.as_one_weight(), None, 2, 16) == (
        "12 of 16 channels predicted 2.00x slower; left alone"
    )
    assert layer_left_alone(split, None, 1.1, 16) == "rank (4, 8) predicted 1.10x slower; left alone"
