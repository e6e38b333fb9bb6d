"""What CC finds out about one layer: its curve and its order of removal, kept by content.

Neither depends on the rate, on the other layers or on rounding, so one analysis serves all rates and regions.
The order is extended as far as somebody asks for, and kept on disk (`base.cache`).
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from graphcomp.base import cache
from graphcomp.passes.cc.forms import Compression, first_form, least_macs, step_back
from graphcomp.passes.cc.gcro import Fit, fit_exponential, removal_curve
from graphcomp.passes.cc.mshc import Lookahead, Search, is_exact, step_size
from graphcomp.passes.cc.units import Unit, WeightShape

T = TypeVar("T")
Item = TypeVar("Item")

KIND = "cc"
"""Of entries in the cache."""

SLACK = 1e-6
"""MACs are whole numbers; a goal is a product with a rate."""


class Analysis:
    """One layer.

    Args:
        weight, gradient: (n, c, ...), of equal shapes.
        gamma, step, lookahead: see `Search`.

    Attributes:
        shape: of the weight.
        fit: of the loss over the rate; None if the layer has none, see `fit_exponential`.
        units: the order of removal, as far as it is known.
        exact: whether the lookahead is exact.
    """

    def __init__(
        self,
        weight: Tensor,
        gradient: Tensor,
        gamma: float = 0.9,
        step: int | None = None,
        lookahead: Lookahead = "auto",
    ) -> None:
        self.shape = WeightShape.of(weight)
        self.exact = is_exact(self.shape, lookahead, step)
        self._weight, self._gradient, self._gamma = weight.detach(), gradient.detach(), gamma
        self._step = step_size(self.shape, step)
        self.fit, self.units = self._known() or (fit_exponential(*removal_curve(weight, gradient)), [])

    def form(self, goal: float, multiple: int = 1) -> Compression:
        """The first form along the order whose MACs a position are at most `goal`, or the fewest possible."""
        goal = max(goal, least_macs(self.shape, multiple)) + SLACK
        found = first_form(self.shape, self.units, goal, multiple)
        if found is None:
            self._extend(goal, multiple)
            found = first_form(self.shape, self.units, goal, multiple)
        assert found is not None  # the last state of every order has the fewest MACs
        return found

    def step_back(self, form: Compression, multiple: int = 1) -> Compression:
        """The form that a slightly larger goal would have led to."""
        return step_back(self.shape, self.units, form, multiple)

    def _extend(self, goal: float, multiple: int) -> None:
        mode: Lookahead = "exact" if self.exact else "held"
        search = Search(self._weight, self._gradient, self._gamma, self._step, mode, self.units)
        while first_form(self.shape, search.units, goal, multiple) is None and search.advance():
            pass
        self.units = search.units
        fit = [self.fit.log_a, self.fit.b] if self.fit else []
        content = {
            "fit": torch.tensor(fit, dtype=torch.float64),
            "units": torch.tensor(self.units, dtype=torch.int32),
        }
        cache.store(KIND, self._key, content)

    def _known(self) -> tuple[Fit | None, list[Unit]] | None:
        content = cache.load(KIND, self._key)
        if content is None:
            return None
        fit = content["fit"].tolist()
        return (Fit(*fit) if fit else None), content["units"].tolist()

    @cached_property
    def _key(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self._weight, self._gradient):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return cache.key(
            __name__, tensors=digest.hexdigest(), gamma=self._gamma, step=self._step, exact=self.exact
        )


def side_by_side(
    function: Callable[[Item], T], items: Iterable[Item], told: Callable[[int], None] = lambda done: None
) -> list[T]:
    """`function` of every item, in as many threads as torch has, each of which computes on its own.

    Layers are independent and most of them small: several threads on one matrix would mostly wait for each
    other, and for long where others want the cores too.

    Args:
        function: of one layer.
        items: layers.
        told: called with the number of items that are done, in order.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))
    try:
        found = []
        for future in [pool.submit(function, item) for item in items]:
            found.append(future.result())
            told(len(found))
        return found
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # torch has the number for each thread, and once for new ones
