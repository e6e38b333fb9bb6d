"""A program is gone through, node by node, and every call is written by its row."""

import inspect
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.ir import DctConv2d, DctLayer, Program, acts_in_place, function_name, is_hooked, op_name
from graphcomp.onnx.lowering import weight_name
from graphcomp.onnx.rows import WRITES, NoRow, Size, Wire, Writing
from graphcomp.onnx.writing.inlining import Found, Ref, record
from graphcomp.onnx.writing.settings import Settings

_LIKE = frozenset("zeros_like ones_like full_like new_zeros new_ones new_full empty_like new_empty".split())
"""What is made of the shape of a tensor alone."""

_RANDOM = frozenset(
    """rand randn randint randperm normal bernoulli multinomial rand_like randn_like randint_like
    poisson""".split()
)
_SAID_OTHERWISE = {
    "axis": "dim",
    "keepdims": "keepdim",
    "x": "input",
    "self": "input",
    "train": "training",
    "ord": "p",
}
_ORDERS = {
    torch.batch_norm: (
        "input weight bias running_mean running_var training momentum eps cudnn_enabled".split()
    ),
    torch.instance_norm: (
        "input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled".split()
    ),
}
"""Functions whose arguments have another order than those of their namesakes."""

_NOT_OF_VALUES = (
    "inplace",
    "_stacklevel",
    "memory_format",
    "non_blocking",
    "copy",
    "requires_grad",
    "device",
)
"""Arguments that say nothing of what is computed."""


class Driver:
    """What the nodes of a program are in the file.

    Attributes:
        values: the name of what a node yields, by its name, as it is when it is written.
    """

    def __init__(self, program: Program, settings: Settings, writing: Writing) -> None:
        self.program, self.settings, self.writing = program, settings, writing
        self.env: dict[fx.Node, Any] = {}
        self.values: dict[str, str] = {}
        self.own = {t.untyped_storage()._cdata for t in program.tensors.values()}
        self.called: set[str] = set()
        self.recorded: dict[Any, Found] = {}
        self.weights: dict[DctLayer, Wire] = {}

    def run(self, inputs: list[str]) -> Any:
        """Write all nodes; what the program yields, in wires and tensors.

        Raises:
            NoRow: saying which node cannot be written, and why.
        """
        names = iter(inputs)
        for node in self.program.graph.nodes:
            metas = tuple(values[node] for values in self.settings.values)
            if node.op == "placeholder":
                # what is left of forward's arguments has a default
                is_input = isinstance(metas[0], Tensor)
                self.env[node] = Wire(next(names), metas) if is_input else metas[0]
            elif node.op == "get_attr":
                self.env[node] = self.program.tensors[cast(str, node.target)].detach()
            else:
                args, kwargs = self._load(node.args), self._load(node.kwargs)
                if node.op == "output":
                    return args[0]
                try:
                    found = self.env[node] = self._node(node, args, kwargs, metas)
                except NoRow as reason:
                    raise NoRow(f"{_place(node)}: {op_name(self.program, node)}: {reason}") from None
                if isinstance(found, Wire):
                    self.values[node.name] = found.name
        raise NoRow("a graph without an output")

    def _load(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda n: self.env[n])

    def _node(self, node: fx.Node, args: Any, kwargs: Any, metas: tuple[Any, ...]) -> Any:
        name = op_name(self.program, node)
        if not _tensors(metas[0]) and name != "setitem":
            return _plain(name, args, kwargs, metas)
        module = self.program.modules[cast(str, node.target)] if node.op == "call_module" else None
        base = node.name
        if module is not None:
            path = cast(str, node.target)
            base = node.name if path in self.called else path
            self.called.add(path)
            if is_hooked(module):
                raise NoRow("a module with hooks")
        target = module or node.target
        found = self._call(_Call(name, target, base, node.name), args, kwargs, metas)
        if acts_in_place(self.program.module, node):
            self._written_in_place(node, found)
        return found

    def _written_in_place(self, node: fx.Node, new: Any) -> None:
        """What else sees the change of the operand: the operand itself under all of its names."""
        order, operand = self.program.order, node.all_input_nodes[0]
        old = self.env[operand]
        if isinstance(old, Tensor):
            return  # it was changed itself
        for other in self.program.sharing(operand):
            if order[other] >= order[node] or all(order[user] <= order[node] for user in other.users):
                continue
            if not (isinstance(self.env[other], Wire) and self.env[other].name == old.name):
                raise NoRow("a change in place that others see through a view")
            self.env[other] = new

    def _call(self, call: "_Call", args: Any, kwargs: Any, metas: tuple[Any, ...]) -> Any:
        """One call: computed now, written by a row, or as the calls that it makes itself."""
        known = self._computed(call, args, kwargs, metas)
        if known is not _NOTHING:
            return known
        if isinstance(call.target, DctLayer):
            return self._coefficients(call, args, metas)
        row = WRITES.get(call.name)
        if row is None and isinstance(call.target, types.FunctionType):
            return self._inlined(call, args, kwargs)
        if row is None:
            raise NoRow("no row")
        again = _repeated(call, args, kwargs)
        self.writing.begin(call.base, call.source, call.name, call.target, metas, again)
        given, named = _bound(row, call, args, kwargs)
        return self._wires(self._written(row, given, named), call.base, metas)

    def _written(self, row: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a row yields, which asks wires for more than their names; constants can be in any place."""
        bound = _signature(row).bind(self.writing, *args, **kwargs)
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor) and _signature(row).parameters[name].annotation is Wire:
                metas = (value.to("meta"),) * len(self.settings.values)
                bound.arguments[name] = Wire(self.writing.name(value), metas)
        return row(*bound.args, **bound.kwargs)

    def _coefficients(self, call: "_Call", args: Any, metas: tuple[Any, ...]) -> Any:
        """A layer of coefficients as the plain one, whose weight the file is given (see `onnx.weights`)."""
        layer = call.target
        if layer not in self.weights:
            name = weight_name(next(t for t, m in self.program.called_modules().items() if m is layer))
            self.writing.reserve(name)
            self.writing.extra[name] = (tuple(layer.weight_shape), layer.coefficients.dtype)
            meta = torch.empty(layer.weight_shape, dtype=layer.coefficients.dtype, device="meta")
            self.weights[layer] = Wire(name, (meta,) * len(metas))
        is_conv = isinstance(layer, DctConv2d)
        name = "conv2d" if is_conv else "linear"
        settings = (
            ("bias", "stride", "padding", "dilation", "groups", "padding_mode") if is_conv else ("bias",)
        )
        given = {s: getattr(layer, s) for s in settings}
        self.writing.begin(call.base, call.source, name, layer, metas, layer)
        made = self._written(WRITES[name], (args[0], self.weights[layer]), given)
        return self._wires(made, call.base, metas)

    def _wires(self, made: Any, base: str, metas: tuple[Any, ...]) -> Any:
        """What a row yields, under the call's name."""
        if isinstance(made, Tensor | Wire):
            return made
        if isinstance(made, str):
            return Wire(self.writing.finish(made, base), metas)
        parts: list[Any] = []
        for index, (part, values) in enumerate(zip(made, zip(*metas, strict=True), strict=True)):
            wanted = f"{base}_{index}" if len(made) > 1 else base
            parts.append(self._wires(part, wanted, values))
        return tuple(parts)

    def _computed(self, call: "_Call", args: Any, kwargs: Any, metas: tuple[Any, ...]) -> Any:
        """The value, if it is the same whatever the inputs hold."""
        parts = _parts((args, kwargs))
        if call.name in _RANDOM:
            raise NoRow("random numbers")
        shapes = [tuple(m.shape) for m in metas if isinstance(m, Tensor)]
        if call.name in _LIKE and len(set(shapes)) == 1 and shapes:
            parts = [p for p in parts if not isinstance(p, Wire)]
            args, kwargs = (_each(given, _empty) for given in (args, kwargs))
        if any(isinstance(p, Wire | Size) for p in parts) or isinstance(call.target, DctLayer):
            return _NOTHING
        if call.in_place and any(
            isinstance(p, Tensor) and p.untyped_storage()._cdata in self.own for p in parts
        ):
            raise NoRow("a change of the network's own tensors")
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        with torch.no_grad():
            return call.run(args, kwargs)

    def _inlined(self, call: "_Call", args: Any, kwargs: Any) -> Any:
        """A function without a row, as what it calls."""
        values, calls, result = record(call.target, args, kwargs, len(self.settings.values), self.recorded)
        if any(one.target is call.target for one in calls):
            raise NoRow("no row")  # a function of torch's own, which is its only call

        def load(given: Any) -> Any:
            return _each(given, lambda v: _item(values, v) if isinstance(v, Ref) else v)

        for one in calls:
            name = function_name(one.target)
            name = {"__getitem__": "getitem", "__setitem__": "setitem"}.get(name, name.strip("_"))
            inner = _Call(name, one.target, call.base, call.source)
            if inner.in_place and not isinstance(load(one.args)[0], Tensor):
                raise NoRow(f"{name} in place, within the function")
            try:
                values.append(self._call(inner, load(one.args), load(one.kwargs), one.results))
            except NoRow as reason:
                raise NoRow(f"{name}: {reason}") from None
        return load(result)


class _Call:
    """What is called: by which name, and for which node of the program."""

    def __init__(self, name: str, target: Any, base: str, source: str) -> None:
        self.name, self.target, self.base, self.source = name, target, base, source
        said = target if isinstance(target, str) else getattr(target, "__name__", "")
        self.in_place = (said.endswith("_") and not said.endswith("__")) or name == "setitem"

    def run(self, args: Any, kwargs: Any) -> Any:
        """Call it."""
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


_NOTHING = object()


def _place(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _item(values: list[Any], ref: Ref) -> Any:
    return values[ref.index] if ref.item is None else values[ref.index][ref.item]


def _repeated(call: _Call, args: Any, kwargs: Any) -> Callable[[Tensor], Any]:
    def again(operand: Tensor) -> Any:
        return call.run((operand, *args[1:]), kwargs)

    return again


# ---------------------------------------------------------------------- arguments


@cache
def _signature(row: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(row)


def _bound(
    row: Callable[..., Any], call: _Call, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a row is called: with what is given, and a module's own settings and tensors."""
    signature = _signature(row)
    wanted = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL][1:]
    named = {p.name for p in wanted}
    given: dict[str, Any] = {}
    order = _ORDERS.get(call.target)
    if isinstance(call.target, nn.Module):
        forward = list(_signature(type(call.target).forward).parameters)[1:]
        kwargs, args = {**dict(zip(forward, args, strict=False)), **kwargs}, ()
        for parameter in wanted:
            if hasattr(call.target, parameter.name):
                value = getattr(call.target, parameter.name)
                given[parameter.name] = value.detach() if isinstance(value, Tensor) else value
        if "module" in named:
            given["module"] = call.target
    elif order is not None:
        kwargs, args = {**dict(zip(order, args, strict=False)), **kwargs}, ()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in wanted)
    for key, value in kwargs.items():
        name = key if key in named else _SAID_OTHERWISE.get(key, key)
        if name in named or open_ended:
            given[name] = value
        elif key not in _NOT_OF_VALUES and value is not None:
            raise NoRow(f"the argument {key}")
    if isinstance(call.target, nn.Module) and "input" in given and _takes_rest(row):
        args = (given.pop("input"),)
    try:
        signature.bind(None, *args, **given)
    except TypeError as error:
        raise NoRow(f"arguments that its row does not have ({error})") from None
    return args, given


def _takes_rest(row: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in _signature(row).parameters.values())


# ---------------------------------------------------------------------- values that are no tensors


def _plain(name: str, args: Any, kwargs: Any, values: tuple[Any, ...]) -> Any:
    """A value that no tensor is in: itself, or sizes that are open."""
    first = values[0]
    if isinstance(first, torch.device):
        return torch.device("cpu")
    if all(type(v) is type(first) and v == first for v in values):
        return first
    if args and isinstance(args[0], Wire):
        shape, dims = args[0].shape, [*args[1:], *kwargs.values()]
        if (
            name == "getattr"
            and args[1] == "shape"
            or name == "size"
            and not [d for d in dims if d is not None]
        ):
            return shape
        if name == "size":
            return shape[dims[0]]
        if name == "numel":
            return _product(shape, values)
    if name in ("getitem", "concat", "add") and args and isinstance(args[0], tuple):
        return args[0][args[1]] if name == "getitem" else tuple(args[0]) + tuple(args[1])
    if isinstance(first, tuple | list):
        found = tuple(_plain("", (), {}, part) for part in zip(*values, strict=True))
        return found if isinstance(first, tuple) else list(found)
    if isinstance(first, bool) or not isinstance(first, int | float):
        raise NoRow(f"a {type(first).__name__} that follows from an open size")
    return Size(values, name, tuple(args))


def _product(sizes: Any, values: tuple[Any, ...]) -> Any:
    found: Any = 1
    for size in sizes:
        pair = [
            a * b
            for a, b in zip(
                *(s.values if isinstance(s, Size) else (s,) * len(values) for s in (found, size)), strict=True
            )
        ]
        found = pair[0] if len(set(pair)) == 1 else Size(tuple(pair), "mul", (found, size))
    return found


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """`change` of everything in nested tuples, lists, dicts and slices."""
    if isinstance(value, tuple | list):
        parts = [_each(v, change) for v in value]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, Mapping):
        return {k: _each(v, change) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_each(v, change) for v in (value.start, value.stop, value.step)))
    return change(value)


def _parts(value: Any) -> list[Any]:
    found: list[Any] = []
    _each(value, found.append)
    return found


def _empty(value: Any) -> Any:
    """Something of the shape and type of a wire."""
    if not isinstance(value, Wire):
        return value
    return torch.empty(1, dtype=value.dtype).expand(value.metas[0].shape)


def _tensors(value: Any) -> bool:
    return any(isinstance(v, Tensor) for v in _parts(value))


__all__ = ["Driver"]
