"""What stands for tensors and sizes while a network is traced: recorded if it can be, else a number."""

import math
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

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
    node = target.node
    while _is_part(tracer, node):  # a write into a part of x is one into x
        whole = cast(fx.Node, node.args[0])
        replaced[whole] = _put(_proxy(tracer, whole), node.args[1], replaced[node])
        node = whole
    memory = _memory(tracer.values.of(target.node))
    for proxy in list(tracer.proxies):
        if isinstance(proxy, Attribute) or proxy is value:  # `x[i] += y` writes the part that it read
            continue
        if proxy.node in replaced:
            proxy.node = replaced[proxy.node].node
        elif memory is not None and _sees(tracer, proxy.node, memory) and proxy.node not in _new(replaced):
            raise NotImplementedError(
                f"a write into {target.node.name} that {proxy.node.name} sees, another view of its memory; "
                "write before the view is taken, or into a copy"
            )


def _new(replaced: dict[fx.Node, fx.Proxy]) -> set[fx.Node]:
    return {p.node for p in replaced.values()}


def _proxy(tracer: Any, node: fx.Node) -> ShapedProxy:
    return ShapedProxy(node, tracer)


def _is_part(tracer: Any, node: fx.Node) -> bool:
    """Whether a node is `x[…]` of a tensor and views its memory."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    whole = cast(fx.Node, node.args[0])
    values = tracer.values
    memory = _memory(values.of(whole))
    return memory is not None and memory == _memory(values.of(node))


def _memory(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _sees(tracer: Any, node: fx.Node, memory: int) -> bool:
    return _memory(tracer.values.of(node)) == memory


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
    return _placed(whole, items, value, found.shape, 0)


def _placed(whole: Any, items: list[Any], value: Any, shape: torch.Size, first: int) -> Any:
    """`value`, and around it what stays of `whole`, one axis after the other."""
    for axis in range(first, len(items)):
        item = items[axis]
        begin, end = _bounds(item, shape[axis])
        if isinstance(item, slice) and (begin, end) == (0, shape[axis]):
            continue
        before = (slice(None),) * axis
        # bounds as they were given: negative ones hold for every size
        start, stop = (item.start, item.stop) if isinstance(item, slice) else (item, item + 1 or None)
        inner = _placed(whole[(*before, slice(start, stop))], items, value, shape, axis + 1)
        parts = [inner]
        if begin > 0:
            parts = [whole[(*before, slice(None, start))], *parts]
        if end < shape[axis]:
            parts = [*parts, whole[(*before, slice(stop, None))]]
        return torch.cat(parts, axis) if len(parts) > 1 else inner
    return value


def _bounds(item: Any, size: int) -> tuple[int, int]:
    if isinstance(item, slice):
        begin, end, step = slice(*(_index(i) for i in (item.start, item.stop, item.step))).indices(size)
        if step != 1:
            raise NotImplementedError(f"a write with step {step}, expected one without")
        return begin, max(begin, end)
    at = range(size)[_index(item)]
    return at, at + 1


def _index(item: Any) -> Any:
    return None if item is None else operator.index(item)


def _full(index: Any, ndim: int) -> list[Any]:
    """One number or slice an axis."""
    items = list(index) if isinstance(index, tuple) else [index]
    known = (int, slice, fx.Proxy)
    if any(not isinstance(i, known) and i is not Ellipsis for i in items):
        raise NotImplementedError("a write at an index that is neither a number, a slice nor a mask")
    if Ellipsis in [i for i in items if i is Ellipsis]:
        at = next(k for k, i in enumerate(items) if i is Ellipsis)
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
