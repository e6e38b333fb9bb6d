"""Random CNN graphs: half of everything goes, exactly, or is refused by name.

Unnamed layers, two and more residual streams, concatenations, depthwise and grouped convolutions, gates,
shuffles, splits, modules used twice, several outputs (T0.7: nothing may depend on a known architecture).
"""

import collections

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from graphcomp.channels import JoinPolicy, analyse
from graphcomp.errors import SurgeryError
from graphcomp.program import Program
from graphcomp.surgery import Drop, drop_of, dropped_rows, feasible, legalise, mask, remove
from graphcomp.verify import TOLERANCE, check, difference
from tests.nets import Spec, build, random_cnn
from tests.removing import Removal, exact_program, half, random_scores

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
REFUSALS: collections.Counter[str] = collections.Counter()
"""Nodes that could not be rewritten, over all examples."""


def smaller_or_refused(program: Program, join: JoinPolicy, spec: Spec) -> tuple[Drop, Program, Program]:
    """(choice, masked, smaller) for half of the channels, or as many of them as are not refused by name."""
    channels = analyse(program, join)
    score, wanted = random_scores(channels, spec["seed"]), half(channels, spec["seed"])
    drop = legalise(channels, wanted, score)
    assert drop.any() or not wanted.any()
    assert np.array_equal(drop_of(channels, dropped_rows(channels, drop)), drop)
    try:
        smaller = remove(program, channels, drop, "test")
    except SurgeryError as refusal:
        assert refusal.channels and refusal.node in {n.name for n in program.graph.nodes}
        REFUSALS[join] += 1
        drop, _ = feasible(channels, drop, score)
        smaller = remove(program, channels, drop, "test")
    return drop, mask(program, channels, drop), smaller


def check_half(spec: Spec, join: JoinPolicy) -> None:
    program = exact_program(build(spec))
    _, masked, smaller = smaller_or_refused(program, join, spec)
    assert difference(masked, smaller) <= TOLERANCE
    check(smaller)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(random_cnn())
def test_coupled(spec: Spec) -> None:
    check_half(spec, "couple")


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(random_cnn())
def test_padded(spec: Spec) -> None:
    check_half(spec, "pad")


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(random_cnn())
@pytest.mark.parametrize("join", ["couple", "pad"])
def test_a_plan_is_replayed_on_the_masked_program_and_again_on_the_result(
    join: JoinPolicy, spec: Spec
) -> None:
    program, removal = exact_program(build(spec)), Removal(join)
    for _ in range(2):
        drop, masked, smaller = smaller_or_refused(program, join, spec)
        replayed = removal.rewrite(masked, dropped_rows(analyse(program, join), drop))
        assert difference(masked, replayed) <= TOLERANCE
        assert str(replayed) == str(smaller)
        program = smaller


def test_refusals_are_rare() -> None:
    """After the tests above: no network but one in a hundred has a node that cannot be rewritten."""
    assert REFUSALS.total() <= 4
