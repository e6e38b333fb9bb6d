"""How many channels or ranks go, and what they cost: allocation, predicted and measured time."""

from graphcomp.budget import latency
from graphcomp.budget.allocation import (
    Allocation,
    AllocationRule,
    Judgement,
    Preserved,
    Scores,
    fewest,
    rungs,
)
from graphcomp.budget.cost import Cost, cost_of
from graphcomp.budget.factors import Factors, LayerClock
from graphcomp.budget.market import Step, give_back, greedy, largest
from graphcomp.budget.model import LatencyCost, Points
from graphcomp.budget.revert import (
    REVERT,
    REVERT_FACTORS,
    Paying,
    Revert,
    group_left_alone,
    is_asked,
    latency_model,
    layer_left_alone,
    paying,
    paying_factors,
    stopwatch,
)
from graphcomp.budget.staircase import calibrate, tables

__all__ = [
    "Allocation",
    "AllocationRule",
    "Cost",
    "Factors",
    "Judgement",
    "LatencyCost",
    "LayerClock",
    "Paying",
    "Points",
    "Preserved",
    "REVERT",
    "REVERT_FACTORS",
    "Revert",
    "Scores",
    "Step",
    "calibrate",
    "cost_of",
    "fewest",
    "give_back",
    "greedy",
    "group_left_alone",
    "is_asked",
    "largest",
    "latency",
    "latency_model",
    "layer_left_alone",
    "paying",
    "paying_factors",
    "rungs",
    "stopwatch",
    "tables",
]
