"""How much memory torch holds at once while something runs, by what its allocator was asked for.

Whatever is asked for counts, inside of operators too; files that are mapped, and what numpy holds, do not.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_of(call: Callable[[], T]) -> tuple[T, int]:
    """What a call returns, and the most bytes that it held beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = call()
    events = cast(Any, watched).profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return result, most
