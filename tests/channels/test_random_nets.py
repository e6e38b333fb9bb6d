"""Random CNN graphs: half of everything goes, exactly, or is refused by name.

Unnamed layers, two and more residual streams, concatenations, depthwise and grouped convolutions, gates,
shuffles, splits, modules used twice, several outputs (T0.7: nothing may depend on a known architecture).
"""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from graphcomp.budget.cost import cost_of
from graphcomp.channels import Channels, Granularity, JoinPolicy, Removal, analyse
from graphcomp.errors import SurgeryError
from graphcomp.ir.program import Program
from graphcomp.measure.cost import macs
from graphcomp.pipeline.verify import TOLERANCE, check, difference
from tests.nets import OPS, Spec, build, random_cnn
from tests.removing import ByRows, exact_program, half, half_and_whole, random_scores, some

pytestmark = pytest.mark.slow

RANDOM = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def feasible_half(
    channels: Channels, seed: int, chosen: Callable[[Channels, int], Removal] = half
) -> tuple[Removal, Program, dict[str, str]]:
    """(choice, smaller program, reasons by node): half of the channels, or what of them is not refused."""
    program = channels.program
    score, wanted = random_scores(channels, seed), chosen(channels, seed)
    drop = wanted.legal(score)
    # nothing goes only where nothing can: channels that each are all of a piece that is needed
    alone = (Removal.of(channels, [c]).legal(score) for c in np.flatnonzero(wanted.gone).tolist())
    assert drop or not any(alone)
    assert np.array_equal(Removal.from_rows(channels, drop.rows).gone, drop.gone)
    try:
        return drop, drop.apply("test"), {}
    except SurgeryError as refusal:
        assert refusal.channels and refusal.node in {n.name for n in program.graph.nodes}
        drop, kept = drop.feasible(score)
        return drop, drop.apply("test"), kept


@pytest.mark.parametrize(
    ("join", "count", "chosen"),
    [("couple", 300, half), ("pad", 100, half), ("couple", 150, half_and_whole), ("pad", 50, half_and_whole)],
)
def test_half_of_a_random_network_goes_exactly(
    join: JoinPolicy, count: int, chosen: Callable[[Channels, int], Removal]
) -> None:
    """Or half of everything and all of something: whole layers go where only concatenations read them."""
    refused: list[dict[str, str]] = []

    @settings(RANDOM, max_examples=count)
    @given(random_cnn())
    def check_half(spec: Spec) -> None:
        program = exact_program(build(spec))
        channels = analyse(program, join)
        drop, smaller, kept = feasible_half(channels, spec["seed"], chosen)
        assert difference(drop.mask(), smaller) <= TOLERANCE
        check(smaller)
        assert cost_of("macs", channels)(drop) == pytest.approx(macs(smaller))
        refused.extend([kept] if kept else [])

    check_half()
    assert len(refused) <= count // 100, refused


@pytest.mark.parametrize("chosen", [half, half_and_whole, some])
@pytest.mark.parametrize("join", ["couple", "pad"])
@pytest.mark.parametrize("tricky", ["mixing", "product", "recurrent"])
def test_networks_that_compute_with_all_channels_go_exactly(
    tricky: str, join: JoinPolicy, chosen: Callable[[Channels, int], Removal]
) -> None:
    """Half of the operations do; what goes is exact, and nothing but groups of them refuses."""
    refused: list[dict[str, str]] = []

    @settings(RANDOM, max_examples=60)
    @given(random_cnn([*OPS, *[tricky] * len(OPS)]))
    def check_streams(spec: Spec) -> None:
        program = exact_program(build(spec))
        drop, smaller, kept = feasible_half(analyse(program, join), spec["seed"], chosen)
        assert difference(drop.mask(), smaller) <= 100 * TOLERANCE
        check(smaller)
        refused.extend([kept] if kept else [])

    check_streams()
    assert len(refused) <= 2, refused


@pytest.mark.parametrize(("granularity", "tricky"), [("head", "product"), ("group", "mixing")])
@pytest.mark.parametrize("join", ["couple", "pad"])
def test_whole_heads_and_groups_of_random_networks_go_exactly(
    granularity: Granularity, tricky: str, join: JoinPolicy
) -> None:
    @settings(RANDOM, max_examples=60)
    @given(random_cnn([*OPS, *[tricky] * len(OPS)]))
    def check_whole(spec: Spec) -> None:
        channels = analyse(exact_program(build(spec)), join, granularity)
        for chosen in (half, some):
            drop, smaller, _ = feasible_half(channels, spec["seed"], chosen)
            assert difference(drop.mask(), smaller) <= 100 * TOLERANCE
            check(smaller)

    check_whole()


@settings(RANDOM, max_examples=15)
@given(random_cnn([*OPS, "mixing", "mixing", "mixing", "product"]))
@pytest.mark.parametrize("join", ["couple", "pad"])
def test_a_plan_is_replayed_on_the_masked_program_and_removal_goes_on(join: JoinPolicy, spec: Spec) -> None:
    program = exact_program(build(spec))
    for _ in range(2):
        channels = analyse(program, join)
        drop, smaller, _ = feasible_half(channels, spec["seed"])
        masked = drop.mask()
        replayed = ByRows(join).rewrite(masked, drop.rows)
        assert difference(masked, replayed) <= TOLERANCE
        assert str(replayed) == str(smaller)
        program = smaller
