"""What stands for tensors and sizes while a network is traced: recorded if it can be, else a number."""

import math
import operator
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from graphcomp.ir.concrete import BATCHES, Unknown
from graphcomp.ir.operators import OUT_OF_PLACE


class ShapedProxy(fx.Proxy):
    """Records what is done to it, and answers what Python asks of it with a number (`ir.concrete`).

    `x += y` is recorded as what it is; under fx it would be `x + y`, and views of x would miss the change.
    `x[i] = y` becomes a concatenation of what stays and of y, and the proxy stands for that from there on,
    as do all others that see the memory.
    """

    tracer: Any  # a tracer with `number`, `length` and `proxies`

    def __init__(self, node: fx.Node, tracer: Any) -> None:
        super().__init__(node, tracer)
        tracer.proxies.add(self)

    def __getattr__(self, name: str) -> "ShapedAttribute":
        return ShapedAttribute(self, name)

    def __len__(self) -> int:
        return cast(int, self.tracer.length(self))

    def __int__(self) -> int:
        return int(self.tracer.number(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.number(self))

    def __float__(self) -> float:
        return float(self.tracer.number(self))

    def __complex__(self) -> complex:
        return complex(self.tracer.number(self))

    def __contains__(self, item: Any) -> bool:
        return item in self.tracer.number(self)

    def __round__(self, digits: int | None = None) -> fx.Proxy:
        return self._recorded(round, *(() if digits is None else (digits,)))

    def __ceil__(self) -> fx.Proxy:
        return self._recorded(math.ceil)

    def __floor__(self) -> fx.Proxy:
        return self._recorded(math.floor)

    def __trunc__(self) -> fx.Proxy:
        return self._recorded(math.trunc)

    def __divmod__(self, other: Any) -> tuple[fx.Proxy, fx.Proxy]:
        return self._recorded(operator.floordiv, other), self._recorded(operator.mod, other)

    def __setitem__(self, index: Any, value: Any) -> None:
        write(self, index, value)

    def _recorded(self, function: Callable[..., Any], *others: Any) -> fx.Proxy:
        return cast(fx.Proxy, self.tracer.create_proxy("call_function", function, (self, *others), {}))


class ShapedAttribute(Attribute, ShapedProxy):
    """`x.shape`, recorded when it is used as a value; `x.view(…)` records a method."""

    def __init__(self, root: ShapedProxy, name: str) -> None:
        Attribute.__init__(self, root, name)  # not ShapedProxy's: there is no node yet

    def __getattr__(self, name: str) -> Any:
        if self.attr == "device":  # asked for by what takes no proxies (torch.autocast)
            return getattr(self.tracer.values.device, name)
        return super().__getattr__(name)


def _recorder(function: Callable[..., Any]) -> Callable[[ShapedProxy, Any], fx.Proxy]:
    return lambda self, other: self._recorded(function, other)


for _function in OUT_OF_PLACE:
    setattr(ShapedProxy, f"__{_function.__name__}__", _recorder(_function))


class Proxies:
    """The proxies that Python still holds."""

    def __init__(self) -> None:
        self._held: list[weakref.ref[ShapedProxy]] = []

    def add(self, proxy: ShapedProxy) -> None:
        """Remember a proxy as long as somebody else does."""
        self._held.append(weakref.ref(proxy))

    def __iter__(self) -> Iterator[ShapedProxy]:
        return (p for r in self._held if (p := r()) is not None)


# ---------------------------------------------------------------------- writes


def write(target: ShapedProxy, index: Any, value: Any) -> None:
    """`target[index] = value` without memory: all proxies that see the change stand for new values after it.

    Raises NotImplementedError for indices that are neither numbers, slices nor masks, and for writes that
    other views see in a way that cannot be followed.
    """
    tracer = target.tracer
    replaced = {target.node: _put(target, index, value)}
    node, memory = target.node, _memory(tracer.values.of(target.node))
    while _is_part(tracer, node, memory):  # a write into a part of x is one into x
        whole = cast(fx.Node, node.args[0])
        replaced[whole] = _put(ShapedProxy(whole, tracer), node.args[1], replaced[node])
        node = whole
    made = {p.node for p in replaced.values()}
    for proxy in list(tracer.proxies):
        if isinstance(proxy, Attribute) or proxy is value:  # `x[i] += y` writes the part that it read
            continue
        if proxy.node in replaced:
            proxy.node = replaced[proxy.node].node
        elif proxy.node not in made and _memory(tracer.values.of(proxy.node)) == memory:
            raise NotImplementedError(
                f"a write into {target.node.name} that {proxy.node.name} sees, another view of its memory; "
                "write before the view is taken, or into a copy"
            )


def _is_part(tracer: Any, node: fx.Node, memory: int | None) -> bool:
    """Whether a node is `x[…]` of a tensor in this memory."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    return _memory(tracer.values.of(cast(fx.Node, node.args[0]))) == memory


def _memory(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _put(whole: Any, index: Any, value: Any) -> Any:
    """What `whole` is after `whole[index] = value`."""
    values = whole.tracer.values
    found = values.of(whole.node)
    if not isinstance(found, Tensor):
        raise NotImplementedError(f"a write into {whole.node.name}, which is no tensor")
    if _is_mask(whole, index):
        return _masked(whole, index, value, found.ndim)
    items = _full(index, found.ndim)
    part = whole[index]
    shape = tuple(values.of(part.node).shape)
    if isinstance(value, fx.Proxy) and isinstance(values.of(value.node), Tensor):
        given = values.of(value.node)
        if given.dtype != found.dtype:
            value = value.to(found.dtype)
        if tuple(given.shape) != shape:
            value = value.expand_as(part)
    elif isinstance(value, Tensor):
        value = value.to(found.dtype).expand_as(part)
    else:
        value = torch.full_like(part, value)
    for axis, item in enumerate(items):
        if not isinstance(item, slice):
            value = value.unsqueeze(axis)
    return _placed(whole, items, _sides(whole, items), value, 0)


@dataclass(frozen=True)
class _Side:
    """What of an axis stays as it is: in front of what is written, behind it; `whole` where nothing does.

    With a step: where the positions of the result lie in the old ones with the written ones behind them.
    """

    front: bool
    behind: bool
    whole: bool
    positions: tuple[int, ...] = ()


def _sides(target: Any, items: list[Any]) -> list[_Side]:
    """One an axis. `y[:, :12] = x` writes all of 12 columns and some of 20: then the network is for the
    example's sizes only.
    """
    values, node = target.tracer.values, target.node

    def found(**sizes: Any) -> list[_Side]:
        shape = values.of(node, **sizes).shape
        return [_side(item, size) for item, size in zip(items, shape, strict=True)]

    sides = found()
    if any(found(batch=batch) != sides for batch in BATCHES):
        raise NotImplementedError(f"a write into {node.name} at samples that depend on the batch size")
    try:
        is_special = found(grown=True) != sides
    except Unknown:
        is_special = True
    if is_special:
        target.tracer.specialise()
    return sides


def _side(item: Any, size: int) -> _Side:
    begin, end, step = _bounds(item, size)
    if step != 1:
        written = {at: size + i for i, at in enumerate(range(begin, end, step))}
        return _Side(False, False, False, tuple(written.get(at, at) for at in range(size)))
    return _Side(begin > 0, end < size, isinstance(item, slice) and (begin, end) == (0, size))


def _placed(whole: Any, items: list[Any], sides: list[_Side], value: Any, first: int) -> Any:
    """`value`, and around it what stays of `whole`, one axis after the other."""
    axis = next((axis for axis in range(first, len(items)) if not sides[axis].whole), None)
    if axis is None:
        return value
    item, before = items[axis], (slice(None),) * axis
    if sides[axis].positions:
        written = _placed(whole[(*before, item)], items, sides, value, axis + 1)
        both: Any = torch.cat([whole, written], axis)
        return both[(*before, list(sides[axis].positions))]
    # bounds as they were given: negative ones hold for every size
    start, stop = (item.start, item.stop) if isinstance(item, slice) else (item, item + 1 or None)
    parts = [_placed(whole[(*before, slice(start, stop))], items, sides, value, axis + 1)]
    if sides[axis].front:
        parts = [whole[(*before, slice(None, start))], *parts]
    if sides[axis].behind:
        parts = [*parts, whole[(*before, slice(stop, None))]]
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0]


def _bounds(item: Any, size: int) -> tuple[int, int, int]:
    if isinstance(item, slice):
        begin, end, step = slice(*(_index(i) for i in (item.start, item.stop, item.step))).indices(size)
        return begin, max(begin, end), step
    at = range(size)[_index(item)]
    return at, at + 1, 1


def _index(item: Any) -> Any:
    return None if item is None else operator.index(item)


def _full(index: Any, ndim: int) -> list[Any]:
    """One number or slice an axis."""
    items = list(index) if isinstance(index, tuple) else [index]
    known = (int, slice, fx.Proxy)
    if any(not isinstance(i, known) and i is not Ellipsis for i in items):
        raise NotImplementedError("a write at an index that is neither a number, a slice nor a mask")
    at = next((k for k, item in enumerate(items) if item is Ellipsis), None)
    if at is not None:  # not `in`: a proxy is asked whether it is equal
        items[at : at + 1] = [slice(None)] * (ndim - len(items) + 1)
    return items + [slice(None)] * (ndim - len(items))


def _is_mask(whole: ShapedProxy, index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.dtype == torch.bool
    if not isinstance(index, fx.Proxy):
        return False
    found = whole.tracer.values.of(index.node)
    if isinstance(found, Tensor) and found.dtype != torch.bool:
        raise NotImplementedError("a write at positions that are computed")
    return isinstance(found, Tensor)


def _masked(whole: Any, mask: Any, value: Any, ndim: int) -> Any:
    shaped = whole.tracer.values.of(value.node) if isinstance(value, fx.Proxy) else value
    if isinstance(shaped, Tensor) and shaped.ndim:
        raise NotImplementedError("a write of several values through a mask")
    dims = mask.dim() if isinstance(mask, Tensor) else whole.tracer.values.of(mask.node).dim()
    for _ in range(ndim - dims):
        mask = mask.unsqueeze(-1)
    return torch.where(mask, value, whole)
