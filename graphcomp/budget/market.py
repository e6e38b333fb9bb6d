"""What every way of meeting a goal does: one share for all, greedy buying, and giving back.

Items (groups of channels, layers) have states from whole to small (widths, ranks). A choice is a state for
each of them; it has a cost, and a step of an item to a smaller state loses something.

    uniform    the largest share, the same for all, whose choice costs no more than the goal       `largest`
    greedy     one step at a time, the one of the largest  saved cost / loss                       `purchases`
    give back  what there is room for in the end returns, item by item                             `give_back`

What things cost and what they lose are functions: MACs, parameters, predicted times; importance, energy.
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item", bound=Hashable)
State = TypeVar("State")


@dataclass(frozen=True)
class Step(Generic[State]):
    """A smaller state that an item can go to.

    Attributes:
        state: of the item.
        cost: of the whole choice, once it is there.
        loss: of going there from where it is, above 0.
    """

    state: State
    cost: float
    loss: float


@dataclass(frozen=True)
class Purchase(Generic[Item, State]):
    """A step that was taken: the item, its state before, and what the whole choice costs now."""

    item: Item
    before: State
    cost: float


class Offers(Protocol[Item, State]):
    """What there is to buy."""

    def steps(self, item: Item, choice: Mapping[Item, State], cost: float) -> Iterable[Step[State]]:
        """What an item can go to from a choice of this cost; only what costs less."""

    def taken(self, item: Item, before: State, choice: Mapping[Item, State]) -> None:
        """Be told of a purchase, by which an item came from its state before into the one of the choice."""


def largest(rungs: Sequence[float], meets: Callable[[float], bool]) -> int | None:
    """Index of the largest of ascending `rungs` that meets a goal, by binary search; None if none does.

    What a rung costs must not fall from one rung to the next.
    """
    index = bisect_left(rungs, True, key=lambda rung: not meets(rung)) - 1
    return index if index >= 0 else None


def purchases(
    choice: dict[Item, State], cost: float, offers: Offers[Item, State]
) -> Iterator[Purchase[Item, State]]:
    """Make a choice cheaper step by step, by what saves most for its loss; until nothing saves any more.

    Gains are looked at again only when they come to the top, so they should not rise while others are bought:
    removing channels seldom makes other channels dearer.

    Args:
        choice: where to begin; every purchase is written into it.
        cost: of this choice.
        offers: asked for the steps of one item after the other.
    """
    items = list(choice)
    heap = [(-math.inf, i) for i in range(len(items))]
    while heap:
        _, i = heapq.heappop(heap)
        item = items[i]
        gains = [((cost - step.cost) / step.loss, step) for step in offers.steps(item, choice, cost)]
        if not gains:
            continue
        gain, best = max(gains, key=lambda found: (found[0], found[1].loss))
        is_best = not heap or gain >= -heap[0][0]
        heapq.heappush(heap, (-gain, i))
        if is_best:
            before, choice[item], cost = choice[item], best.state, best.cost
            offers.taken(item, before, choice)
            yield Purchase(item, before, cost)


def give_back(
    choice: Mapping[Item, State],
    earlier: Iterable[tuple[Item, State]],
    meets: Callable[[Mapping[Item, State]], bool],
) -> dict[Item, State]:
    """The choice, with items back in earlier states, in this order, where the goal is met all the same."""
    kept = dict(choice)
    for item, state in earlier:
        trial = {**kept, item: state}
        if meets(trial):
            kept = trial
    return kept


def greedy(
    whole: Mapping[Item, State],
    cost_of: Callable[[Mapping[Item, State]], float],
    goal: float,
    offers: Offers[Item, State],
) -> dict[Item, State] | None:
    """Buy until the goal is met, then give back, the last first; None if all that there is saves too little.

    The last step may save far more than was missing: so there may be room for earlier ones.
    """
    choice, cost = dict(whole), cost_of(whole)
    bought = list[tuple[Item, State]]()
    if cost > goal:
        for purchase in purchases(choice, cost, offers):
            bought.append((purchase.item, purchase.before))
            cost = purchase.cost
            if cost <= goal:
                break
    if cost > goal:
        return None
    return give_back(choice, reversed(bought), lambda trial: cost_of(trial) <= goal)
