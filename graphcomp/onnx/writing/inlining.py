"""Functions that fx was told not to look into (`torch.fx.wrap`), as the calls that they make.

Such a function branches on shapes, so it is run, on tensors without numbers, once in every setting, and what
it calls is recorded. It must call the same in all of them; numbers that differ are open.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from graphcomp.onnx.rows.wires import NoRow, Size, Wire

_MOST = 2000
"""Calls that a function may make: more is a loop over something that is not for one file."""


@dataclass(frozen=True)
class Ref:
    """The result of an earlier call (or an argument of the function); `item` of it, if it is a tuple."""

    index: int
    item: int | None = None


@dataclass(frozen=True)
class Record:
    """One call: results are meta tensors, one a setting."""

    target: Callable[..., Any]
    args: Any
    kwargs: Any
    results: tuple[Any, ...]


class _Recorder(TorchFunctionMode):
    """Writes down every function of torch that yields or changes a tensor."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.refs: dict[int, Ref] = {id(x): Ref(i) for i, x in enumerate(known)}
        self.count = len(known)
        self.kept: list[Any] = list(known)
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = self.referred(args), self.referred(kwargs or {})
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__" or not (_holds_tensor(result) or name == "__setitem__"):
            return result
        if len(self.calls) == _MOST:
            raise NoRow(f"a function of more than {_MOST} calls")
        self.calls.append((func, *given, result))
        self.kept.append(result)
        if isinstance(result, Tensor):
            self.refs[id(result)] = Ref(self.count)
        elif isinstance(result, tuple | list):
            self.refs |= {id(x): Ref(self.count, i) for i, x in enumerate(result) if isinstance(x, Tensor)}
        self.count += 1
        return result

    def referred(self, value: Any) -> Any:
        """A value with references in the place of tensors."""

        def one(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            if id(part) not in self.refs:
                raise NoRow("a tensor that is not among the function's arguments")
            return self.refs[id(part)]

        return fx.node.map_aggregate(value, one)


Found = tuple[list[Record], Any]
"""The calls of a function, and what it returns, in references."""


def record(
    function: Callable[..., Any], args: Any, kwargs: Any, settings: int, known: dict[Any, Found]
) -> tuple[list[Any], list[Record], Any]:
    """What a function calls.

    Args:
        function, args, kwargs: the call; tensors are wires and stored ones.
        settings: how many there are.
        known: found before, read and extended: blocks of one network call with the same shapes.

    Returns:
        Its tensor operands (what references below their number mean), its calls, and what it returns, in
        references.
    """
    operands: list[Any] = []

    def collect(part: Any) -> Any:
        if isinstance(part, Wire | Tensor):
            operands.append(part)
        return part

    fx.node.map_aggregate((args, kwargs), collect)
    key = function, _told((args, kwargs))
    if key not in known:
        known[key] = _recorded(function, args, kwargs, operands, settings)
    return operands, *known[key]


def _told(value: Any) -> Any:
    """All that a function can tell of its arguments while tensors have no numbers."""
    if isinstance(value, Wire | Tensor):
        metas = value.metas if isinstance(value, Wire) else (value,)
        return type(value), *((m.dtype, m.shape, m.stride(), m.storage_offset()) for m in metas)
    if isinstance(value, tuple | list):
        return type(value), *map(_told, value)
    if isinstance(value, dict):
        return dict, *((name, _told(part)) for name, part in value.items())
    if isinstance(value, slice):
        return slice, *map(_told, (value.start, value.stop, value.step))
    if isinstance(value, Size):
        return Size, *map(_told, value.values)
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0; what is not a plain number or word is only itself
    plain = isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device)
    return type(value), repr(value) if plain else id(value)


def _recorded(
    function: Callable[..., Any], args: Any, kwargs: Any, operands: list[Any], settings: int
) -> Found:
    runs = []
    for setting in range(settings):
        metas = iter(
            [
                x.metas[setting].clone() if isinstance(x, Wire) else torch.empty_like(x, device="meta")
                for x in operands
            ]
        )
        known: list[Tensor] = []

        def fresh(part: Any, setting: int = setting, metas: Any = metas, known: Any = known) -> Any:
            if isinstance(part, Wire | Tensor):
                known.append(next(metas))
                return known[-1]
            return part.values[setting] if isinstance(part, Size) else part

        given, named = fx.node.map_aggregate((args, kwargs), fresh)
        with torch.no_grad(), _Recorder(known) as recorder:
            try:
                result = function(*given, **named)
            except NoRow:
                raise
            # Whatever a function of somebody else's raises on tensors without numbers.
            except Exception as error:
                raise NoRow(f"a function that does not run without numbers ({error})") from error
        runs.append((recorder.calls, recorder.referred(result)))
    calls = [
        Record(
            parts[0][0],
            _unified([p[1] for p in parts]),
            _unified([p[2] for p in parts]),
            tuple(p[3] for p in parts),
        )
        for parts in _aligned([run[0] for run in runs])
    ]
    return calls, _unified([run[1] for run in runs])


def _aligned(runs: Sequence[list[Any]]) -> list[tuple[Any, ...]]:
    if len({len(run) for run in runs}) > 1 or any(
        len({id(getattr(part[0], "__func__", part[0])) for part in parts}) > 1
        for parts in zip(*runs, strict=False)
    ):
        raise NoRow("a function that calls others at another batch size")
    return list(zip(*runs, strict=True))


def _unified(values: Sequence[Any]) -> Any:
    """The same in all settings, or numbers that are open."""
    first = values[0]
    if isinstance(first, tuple | list):
        if any(len(v) != len(first) for v in values):
            raise NoRow("a function that calls with other arguments at another batch size")
        parts = [_unified(part) for part in zip(*values, strict=True)]
        return tuple(parts) if isinstance(first, tuple) else parts
    if isinstance(first, dict):
        return {key: _unified([v[key] for v in values]) for key in first}
    if isinstance(first, slice):
        ends = [_unified([getattr(v, end) for v in values]) for end in ("start", "stop", "step")]
        return slice(*ends)
    if all(type(v) is type(first) and v == first for v in values):
        return first
    if all(isinstance(v, int | float) for v in values):
        return Size(tuple(values))
    raise NoRow("a function that calls with other arguments at another batch size")


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


__all__ = ["Found", "Record", "Ref", "record"]
