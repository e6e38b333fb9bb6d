"""The rules of Play-and-Prune's controller, as functions of accuracies (METHODS 3.3, 3.5).

With C the accuracy now, E that of the network as it came, eps what may be lost, all in percentage points:

    T_r = min(max(0, C - (E - eps)), 2 eps)        the rate at which the pruner plays             (3.5)
    lambda_A = T_r lambda_0                        weight of its l1 term                          (3.6)
    W_A,i = delta_w T_r W_gamma,i                  below which a candidate of layer i goes        (3.7)

The factor 2 eps is a clamp of ours: training may bring the network above E.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graphcomp.errors import PassError
from graphcomp.records import Score

CLAMP = 2.0
SLACK = 1e-9
"""Accuracies are counts over samples, in points but for rounding."""


def points(score: Score | None) -> float:
    """An accuracy in percentage points.

    At most one point (worse than chance, but with very many classes) counts as none, so that a number in
    (0, 1] is always a fraction that was taken for points.

    Raises:
        PassError: if it was not measured: the network is no classifier.
    """
    if score is None or score.measure != "accuracy":
        raise PassError("accuracy: found none, expected that of a classifier on labelled samples")
    return 100 * score.value if score.value > 0.01 else 0.0


def rate(accuracy: float, baseline: float, eps: float) -> float:
    """T_r (3.5), in points; 0 if the accuracy is not above what is allowed.

    Args:
        accuracy, baseline, eps: C, E and eps, in points.

    Raises:
        PassError: for a number that is a fraction, or no accuracy at all.
    """
    for name, value in (("accuracy", accuracy), ("baseline", baseline)):
        if 0 < value <= 1 or not 0 <= value <= 100:
            raise PassError(f"{name}: found {value:g}, expected percentage points such as 93.5")
    if not baseline:
        raise PassError("baseline: found 0 points of accuracy, expected that of a trained network")
    return min(max(0.0, accuracy - (baseline - eps)), CLAMP * eps)


def is_enough(accuracy: float, baseline: float, eps: float) -> bool:
    """C >= E - eps."""
    return accuracy >= baseline - eps - SLACK


Move = Literal["epoch", "cut"]


@dataclass(frozen=True)
class Limits:
    """When the game ends: epochs in a row that do not recover, that remove nothing; epochs in all."""

    patience: int
    stall: int
    epochs: int


@dataclass(frozen=True)
class Standing:
    """Where the game stands.

    Attributes:
        best: the round after which the network last had enough accuracy, 0 as it came; with the fewest
            filters of those, since there are never more.
        move: what comes next; None at the end.
        rate: T_r of the epoch that comes next, or that a cut belongs to.
        epochs: that were played.
        ending: why there is no next move.
    """

    best: int
    move: Move | None
    rate: float
    epochs: int
    ending: str = ""


def stand(accuracies: Sequence[float], removed: Sequence[bool], eps: float, limits: Limits) -> Standing:
    """Where the game stands after some rounds (METHODS 3.5): a function of what was measured.

    An epoch is one round of training and, if T_r was above 0 before it, one that removes. With T_r = 0 it
    only trains: the network is to recover.

    Args:
        accuracies: C of the network as it came, and after every round; in points.
        removed: for every round, whether it removed a filter.
        eps: what may be lost, in points.
        limits: when to stop.
    """
    baseline = accuracies[0]
    at = best = epochs = behind = idle = 0
    recovering = False
    while True:
        now = rate(accuracies[at], baseline, eps)
        enough = is_enough(accuracies[at], baseline, eps)
        best = at if enough else best
        behind = 0 if enough or not recovering else behind + 1
        for count, most, why in (
            (behind, limits.patience, "epochs did not bring the accuracy back"),
            (idle, limits.stall, "epochs removed nothing"),
            (epochs, limits.epochs, "epochs were played"),
        ):
            if count >= most:
                return Standing(best, None, 0.0, epochs, f"{count} {why}")
        now, recovering = (now, False) if now > SLACK else (0.0, not enough)
        if at == len(removed):
            return Standing(best, "epoch", now, epochs)
        at += 1
        if now:
            if at == len(removed):
                return Standing(best, "cut", now, epochs)
            at += 1
        epochs += 1
        idle = 0 if removed[at - 1] else idle + (not recovering)
