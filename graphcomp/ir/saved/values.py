"""Values in a saved program: arguments of nodes and of constructors, as JSON and back.

What JSON has no word for is an object of one key (`{"node": "relu"}`, `{"tuple": [1, 2]}`). The set is
closed: numbers, text, nodes, containers, slices and constants of torch. Nothing that
can be called has a form.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphcomp.errors import LoadError

MAX_DEPTH = 64
"""How deep values may nest, so that no reader of them runs out of stack."""

_MAX_BITS = 128  # of an integer; torch takes 64, and nothing may grow from a literal
_DEVICE = re.compile(r"[a-z]+(:\d{1,4})?", re.ASCII)
_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}
_BY_NAME: dict[str, dict[str, Any]] = {
    tag: {name: value for name, value in vars(torch).items() if isinstance(value, kind)}
    for tag, kind in _CONSTANTS.items()
}


def torch_name(constant: object) -> str:
    """`float32` of `torch.float32`."""
    return str(constant).removeprefix("torch.")


def encode(value: Any) -> Any:
    """An argument as JSON; what JSON has no word for is an object of one key. TypeError if it has no form."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str.__str__(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Size):
        return {"size": [int(n) for n in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if type(value) is tuple:
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for tag, kind in _CONSTANTS.items():
        if isinstance(value, kind):
            return {tag: torch_name(value)}
    raise TypeError(
        f"found a {type(value).__module__}.{type(value).__qualname__}, expected nodes, numbers, strings, "
        "tuples, lists, dicts, slices or torch constants; rewrite the node with those"
    )


def decode_at(place: str, value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse of `encode`.

    Args:
        place: what the value belongs to, for messages.
        nodes: those that it may refer to, by name.

    Raises:
        LoadError: naming `place` and what is no value that graphcomp writes.
    """
    try:
        return decode(value, nodes)
    except KeyError as error:
        raise LoadError(f"{place}: found node {error}, expected one that comes before it") from error
    except (ValueError, TypeError) as error:
        raise LoadError(f"{place}: {error}; save the program again") from error


def decode(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """The inverse of `encode`; KeyError for an unknown node, ValueError or TypeError for anything else."""
    if depth > MAX_DEPTH:
        raise ValueError(f"found values nested more than {MAX_DEPTH} deep, expected less")
    if isinstance(value, list):
        return [decode(v, nodes, depth + 1) for v in value]
    if not isinstance(value, dict):
        return _scalar(value)
    if len(value) != 1:
        raise ValueError(f"found an object with keys {sorted(value)}, expected one key")
    ((tag, content),) = value.items()
    match tag, content:
        case "node", str():
            return nodes[content]
        case "tuple", list():
            return tuple(decode(v, nodes, depth + 1) for v in content)
        case "dict", list():
            return dict(_item(pair, nodes, depth + 1) for pair in content)
        case "slice", [start, stop, step]:
            return slice(*(decode(v, nodes, depth + 1) for v in (start, stop, step)))
        case "float", "inf" | "-inf" | "nan":
            return float(content)
        case "size", list() if all(type(n) is int and 0 <= n < 2**63 for n in content):
            return torch.Size(content)
        case "ellipsis", True:
            return ...
        case "device", str() if _DEVICE.fullmatch(content):
            return _device(content)
        case "dtype" | "memory_format" | "layout", str() if content in _BY_NAME[tag]:
            return _BY_NAME[tag][content]
    raise ValueError(f"found {tag} {content!r:.100}, expected a value that graphcomp writes")


def _scalar(value: Any) -> Any:
    if isinstance(value, str):
        value.encode()  # a lone surrogate, which no file and no terminal takes, is a ValueError
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError(f"found an integer of {value.bit_length()} bits, expected at most {_MAX_BITS}")
    return value


def _item(pair: Any, nodes: Mapping[str, fx.Node], depth: int) -> tuple[Any, Any]:
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str | int):
        raise ValueError(f"found dict item {pair!r:.100}, expected a pair of text or a number and a value")
    return _scalar(pair[0]), decode(pair[1], nodes, depth)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"found device {name!r}, expected one of torch's") from error
