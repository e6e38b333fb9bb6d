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
from graphcomp.budget.calibration import calibrate, tables
from graphcomp.budget.cost import Cost, cost_of
from graphcomp.budget.factor_times import Factors, LayerClock
from graphcomp.budget.kernel_fit import Points
from graphcomp.budget.market import Step, give_back, greedy, largest
from graphcomp.budget.remaining import LatencyCost
from graphcomp.budget.restoring import REVERT, REVERT_FACTORS, Paying, Revert, is_asked
from graphcomp.budget.restoring_factors import layer_left_alone, paying_factors
from graphcomp.budget.restoring_groups import group_left_alone, paying
from graphcomp.budget.stopwatch import Clock, Stopwatch

__all__ = [
    "Allocation",
    "AllocationRule",
    "Clock",
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
    "Stopwatch",
    "calibrate",
    "cost_of",
    "fewest",
    "give_back",
    "greedy",
    "group_left_alone",
    "is_asked",
    "largest",
    "latency",
    "layer_left_alone",
    "paying",
    "paying_factors",
    "rungs",
    "tables",
]
