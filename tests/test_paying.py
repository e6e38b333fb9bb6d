"""Removals that do not pay: which are looked at, which are restored, and who has the last word."""

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from graphcomp.channels import analyse
from graphcomp.closing import Stopwatch
from graphcomp.errors import PassError, ProviderError
from graphcomp.passes.l1 import L1
from graphcomp.paying import Paying
from graphcomp.pipeline import Context, run_pass
from graphcomp.program import Program
from graphcomp.surgery import no_drop
from tests.stopwatch import Machine
from tests.tiny import context, seeded, traced

__all__ = ["seeded"]

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


def test_a_slower_group_is_left_alone_and_named() -> None:
    """Reading 61 channels takes twice as long as reading 64; 76 are as good as 80."""
    step, plan, result = run_pass(L1(**KEEP_95), net(), where(Machine(odd=2.0)))
    assert widths(plan) == {"0": 64, "1": 76}
    ((place, reason),) = [(k.where, k.reason) for k in plan.kept if "slower" in k.reason]
    assert place == "0" and reason == "61 of 64 channels predicted 1.94x slower; left alone"
    assert len(plan.kept) == 2  # and the output
    times = plan.evidence["reverted"]["milliseconds"]
    assert times["restored"] < times["planned"] and times["restored"] <= times["before"]
    assert plan.evidence["reverted"]["groups"] == {"0": pytest.approx(2.0, rel=0.05)}
    assert step.kept == plan.kept
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
        pass_.plan(net(), where(Machine(odd=2.0)))
    plan = replace(pass_, allow_nothing=True).plan(net(), where(Machine(odd=2.0)))
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
    drop, group = no_drop(channels), channels.removable[0]
    met = {"latency": {"asked": 0.5, "measured": 0.51}}
    pass_ = L1(target={"latency": 0.5})
    told = pass_._reached(channels, drop, met, Paying(drop, {}))
    assert told == {"target": {"of": "latency", "asked": 0.5, "reached": 0.51}}
    told = pass_._reached(channels, drop, met, Paying(drop, {group: 1.3}, (4.0, 3.8, 3.0)))
    assert told == {"target": {"of": "latency", "asked": 0.5, "reached": 0.75}}
