"""Options that passes share: targets, globs, how a target is met; and the errors about them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator, TypeAdapter
from pydantic_core import PydanticKnownError

from graphcomp.budget import AllocationRule
from graphcomp.errors import PassError

OPTIONS = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def _parse_target(value: Any) -> Any:
    """`macs:0.5` as on the command line, or {"macs": 0.5} as in a recipe."""
    if isinstance(value, str):
        name, found, amount = value.partition(":")
        if not found:
            raise ValueError(
                "expected macs:FRACTION or params:FRACTION, or latency:0.5 or latency:3.5ms for times"
            )
        return {name.strip(): amount.strip()}
    return value


def _parse_amount(value: Any) -> float | str:
    """A fraction, `0.5x` of a time, or milliseconds, which stay a string: `3.5ms`."""
    text = value.strip() if isinstance(value, str) else value
    is_time = isinstance(text, str) and text.endswith("ms")
    number = text.removesuffix("ms").removesuffix("x").strip() if isinstance(text, str) else text
    try:
        if isinstance(number, bool):
            raise TypeError
        parsed = float(number)
    except (TypeError, ValueError):
        raise PydanticKnownError("float_parsing") from None
    if not parsed > 0:
        raise PydanticKnownError("greater_than", {"gt": 0})
    if is_time and math.isfinite(parsed):
        return f"{number}ms"
    if not parsed < 1:
        raise PydanticKnownError("less_than", {"lt": 1})
    return parsed


def _only_latency_is_a_time(target: dict[str, float | str]) -> dict[str, float | str]:
    for name, amount in target.items():
        if name != "latency" and isinstance(amount, str):
            raise ValueError(f"found {amount} of {name}, expected a fraction such as 0.5")
    return target


Goal = Literal["macs", "params", "latency"]
Amount = Annotated[float | str, PlainValidator(_parse_amount, json_schema_input_type=float | str)]
TargetOption = Annotated[
    dict[Goal, Amount],
    BeforeValidator(_parse_target),
    AfterValidator(_only_latency_is_a_time),
    Field(min_length=1, max_length=1),
]
TARGET = (
    "macs:x, params:x or latency:x: what is to be left of the whole network that the pass is given; "
    "latency:3.5ms is measured on the target at batch 1"
)
Globs = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
JoinOption = Literal["couple", "pad", "project"]
JOIN = "couple: both sides of an addition lose the same channels; pad: each keeps its own, padded with zeros"


Asked = AllocationRule | Literal["auto"]
"""How a target is to be met; auto: what `is_greedy` says."""


def is_greedy(allocation: str, target: Mapping[Goal, Any] | None) -> bool:
    """Whether a target is met greedily: if that is asked for, or if it is a latency and nothing is."""
    return allocation == "greedy" or (allocation == "auto" and "latency" in (target or {}))


def options_of(pass_: Any) -> dict[str, Any]:
    """A pass's options as plain JSON values."""
    dumped: dict[str, Any] = TypeAdapter(type(pass_)).dump_python(pass_, mode="json")
    return dumped


def only_one(given: Mapping[str, bool], example: str) -> None:
    """ValueError unless exactly one of the named options is given."""
    found = [name for name, is_given in given.items() if is_given]
    if len(found) > 1:
        raise ValueError(f"found both {' and '.join(found)}, expected one of them")
    if not found:
        raise ValueError(f"found neither {' nor '.join(given)}, expected one of them, e.g. {example}")


def require_matches(globs: Iterable[str], layers: Iterable[str], place: str = "include/exclude") -> None:
    """PassError if a glob matches no layer."""
    known = sorted(layers)
    for glob in globs:
        if glob != "*" and not any(fnmatch(layer, glob) for layer in known):
            raise PassError(
                f"{place}: found no layer that {glob!r} matches, expected one of {', '.join(known[:8])}, …"
            )


def not_asked(paths: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why layers of these paths are not considered; None if one of them is included and none is excluded."""
    found = list(paths)
    if not matches(found, include):
        return "not included"
    return "excluded" if matches(found, exclude) else None


def matches(paths: Iterable[str], globs: Sequence[str]) -> bool:
    """Whether any of the module paths matches any of the globs."""
    return any(fnmatch(path, glob) for path in paths for glob in globs)
