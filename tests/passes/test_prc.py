"""The controller's rules: the trace by hand, units, and where the game stands after any course."""

from typing import Any

import numpy as np
import pytest

from graphcomp.errors import PassError
from graphcomp.measure.cost import macs, params_trainable
from graphcomp.models import MODELS
from graphcomp.passes.play_and_prune.filters import candidates, emptied
from graphcomp.passes.play_and_prune.prc import Limits, Standing, is_enough, points, rate, stand
from graphcomp.records import Score
from tests.tiny import traced

LONG = Limits(patience=10, stall=10, epochs=100)


def score(top1: float) -> Score:
    return Score(measure="accuracy", value=top1, samples=1000, low=0.0, high=1.0)


def test_g3_2_trace() -> None:
    """G3.2, T3.1, T3.2: rates, thresholds and what goes, from the accuracies measured before each epoch."""
    norms = np.array([0.1, 0.2, 0.35, 0.9, 1.5, 2, 2.2, 3])
    filters, rates, thresholds, removed, left = np.arange(8), [], [], [], []
    for accuracy in (93.0, 92.6, 92.9, 91.9, 92.3):
        now = rate(accuracy, 93.0, 1.0)
        threshold = 1.0 * now * 0.4
        gone = emptied(norms, candidates(norms, 0.25), threshold)
        rates.append(now)
        thresholds.append(threshold)
        removed.append(set(filters[gone].tolist()))
        norms, filters = np.delete(norms, gone), np.delete(filters, gone)
        left.append(len(norms))
    assert rates == pytest.approx([1.0, 0.6, 0.9, 0.0, 0.3])
    assert [1e-3 * r for r in rates] == pytest.approx([1e-3, 6e-4, 9e-4, 0.0, 3e-4])
    assert thresholds == pytest.approx([0.4, 0.24, 0.36, 0.0, 0.12])
    assert removed == [{0, 1}, set(), {2}, set(), set()]
    assert left == [6, 6, 5, 5, 5]


def test_g3_1_what_the_papers_factors_mean() -> None:
    """G3.1: what 6.43x and 17.5x of the paper's VGG-16 leave: of MACs and parameters as we count them."""
    program = traced(MODELS["vgg16-cifar"].factory(), 1, 3, 32, 32)
    percent = [100 * (1 - 1 / factor) for factor in (6.43, 17.5)]
    assert [round(p, 3) for p in percent] == [84.448, 94.286]
    assert round(macs(program) / 6.43 / 1e6, 2) == 48.75
    assert round(params_trainable(program) / 17.5 / 1e6, 3) == 0.857


def test_t3_2_no_negative_rate() -> None:
    """T3.2: below E - eps, and exactly there, the rate is zero."""
    assert [rate(c, 93.0, 1.0) for c in (92.0, 91.999, 50.0, 0.0)] == [0.0] * 4


def test_a_rate_above_the_baseline_is_clamped() -> None:
    assert [rate(c, 93.0, 1.0) for c in (93.9, 94.0, 94.1, 100.0)] == pytest.approx([1.9, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("accuracy", "baseline", "name"),
    [(0.93, 0.93, "accuracy"), (0.93, 93.0, "accuracy"), (92.5, 0.93, "baseline"), (1.0, 93.0, "accuracy"),
     (101.0, 93.0, "accuracy"), (-1.0, 93.0, "accuracy"), (float("nan"), 93.0, "accuracy")],
)  # fmt: skip
def test_t3_5_fractions_are_refused(accuracy: float, baseline: float, name: str) -> None:
    """T3.5: an accuracy in [0, 1] where points are expected, on either side."""
    with pytest.raises(PassError, match=f"{name}: found .*, expected percentage points such as 93.5"):
        rate(accuracy, baseline, 1.0)


def test_points_are_never_a_fraction() -> None:
    """A network that collapsed, of a thousand classes, is no fraction taken for points."""
    assert [points(score(t)) for t in (1.0, 0.93, 0.011, 0.01, 0.001, 0.0)] == [
        100.0, 93.0, pytest.approx(1.1), 0.0, 0.0, 0.0,
    ]  # fmt: skip
    assert rate(points(score(0.001)), 93.0, 1.0) == 0.0
    with pytest.raises(PassError, match="accuracy: found none"):
        points(None)
    with pytest.raises(PassError, match="baseline: found 0 points of accuracy"):
        rate(50.0, points(score(0.001)), 1.0)


def test_enough_but_for_rounding() -> None:
    accuracy = 100 * (0.1 + 0.2)
    assert accuracy != 30.0 and is_enough(accuracy - 1, 30.000000000001, 1.0)
    assert not is_enough(28.99, 30.0, 1.0)


# ---------------------------------------------------------------------- where the game stands


def test_from_the_beginning() -> None:
    assert stand([93.0], [], 1.0, LONG) == Standing(0, "epoch", 1.0, 0)
    assert stand([93.0, 92.0], [False], 1.0, LONG) == Standing(0, "cut", 1.0, 0)
    after = stand([93.0, 92.0, 92.6], [False, True], 1.0, LONG)
    assert (after.best, after.move, after.epochs) == (2, "epoch", 1) and after.rate == pytest.approx(0.6)


def test_below_the_bound_an_epoch_only_trains() -> None:
    """No cut follows; and when the accuracy is back the game goes on from there."""
    course = [93.0, 93.0, 91.5]
    assert stand(course, [False, True], 1.0, LONG) == Standing(0, "epoch", 0.0, 1)
    back = stand([*course, 92.4], [False, True, False], 1.0, LONG)
    assert (back.best, back.move, back.epochs) == (3, "epoch", 2) and back.rate == pytest.approx(0.4)


def test_exactly_at_the_bound_the_network_counts_but_nothing_is_removed() -> None:
    at = stand([93.0, 93.0, 92.0], [False, True], 1.0, LONG)
    assert at == Standing(2, "epoch", 0.0, 1)
    assert stand([93.0, 93.0, 92.0, 92.0], [False, True, False], 1.0, LONG) == Standing(3, "epoch", 0.0, 2)


@pytest.mark.parametrize("good", [0, 1, 2, 5])
def test_t3_4_a_collapse_returns_the_snapshot_before(good: int) -> None:
    """T3.4: after `good` epochs of pruning the network never recovers: the last good one is the result."""
    course, removed = [93.0], list[bool]()
    limits = Limits(patience=3, stall=10, epochs=100)
    while (at := stand(course, removed, 1.0, limits)).move is not None:
        course.append(92.5 if at.epochs < good else 10.0)
        removed.append(at.move == "cut")
    assert at.best == 2 * good
    assert len(removed) == 2 * good + 2 + 3  # the epoch that destroyed it, and the patience
    assert at.ending == "3 epochs did not bring the accuracy back"


@pytest.mark.parametrize(
    ("limits", "rounds", "ending"),
    [
        ({"stall": 2}, 4, "2 epochs removed nothing"),
        ({"epochs": 3}, 6, "3 epochs were played"),
    ],
)
def test_the_end_of_a_game_in_which_nothing_happens(limits: Any, rounds: int, ending: str) -> None:
    course, removed = [93.0], list[bool]()
    rules = Limits(**{"patience": 10, "stall": 10, "epochs": 100, **limits})
    while (at := stand(course, removed, 1.0, rules)).move is not None:
        course.append(93.0)
        removed.append(False)
    assert (at.best, len(removed), at.ending) == (rounds, rounds, ending)


def test_a_removal_ends_a_stall_and_recovery_is_none() -> None:
    limits = Limits(patience=10, stall=2, epochs=100)
    quiet, busy, low = ([93.0, 93.0], [False, False]), ([93.0, 93.0], [False, True]), ([91.0], [False])

    def after(*parts: Any) -> Standing:
        course, removed = [93.0], list[bool]()
        for accuracies, cuts in parts:
            course, removed = course + accuracies, removed + cuts
        return stand(course, removed, 1.0, limits)

    assert after(quiet, busy, quiet).move == "epoch"
    assert after(quiet, quiet).move is None
    falls = ([93.0, 91.0], [False, True])
    assert after(quiet, falls, low, low, low).move == "epoch"
    assert after(quiet, falls, low, low, low).epochs == 5


def test_invariants_of_random_games() -> None:
    """The result always has C >= E - eps, never moves back, and no cut follows an epoch without a rate."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        limits = Limits(*rng.integers(1, 5, 2).tolist(), int(rng.integers(1, 12)))
        course, removed, best = [93.0], list[bool](), 0
        while (at := stand(course, removed, 1.0, limits)).move is not None:
            assert at.best >= best and course[at.best] >= 92.0
            assert at.move == "epoch" or at.rate > 0
            best = at.best
            course.append(float(rng.choice([93.5, 92.7, 92.0, 91.5, 60.0])))
            removed.append(at.move == "cut" and bool(rng.integers(2)))
        assert at.best >= best and course[at.best] >= 92.0 and at.epochs <= limits.epochs
