"""torch.fx's tracer with two additions: it knows shapes, and it says where it is when it fails."""

import builtins
import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, fx, nn

from graphcomp.ir.attention import TRANSFORMERS
from graphcomp.ir.coefficients import DctLayer
from graphcomp.ir.concrete import Unknown, Values
from graphcomp.ir.frozen import FrozenBatchNorm2d
from graphcomp.ir.interface import Arguments
from graphcomp.ir.program import evaluating, is_foreign, map_leaves
from graphcomp.ir.proxies import Proxies, ShapedProxy
from graphcomp.ir.recurrent import RecurrentLayer


class ShapedTracer(fx.Tracer):
    """Keeps `torch.nn` modules whole, answers what Python asks of sizes, and remembers where it is.

    Attributes:
        values: what nodes yield (`ir.concrete`). proxies: those that are in use.
        inputs: of one sample, for the placeholders in order.
        arguments: values of other arguments of forward (`ir.arguments`).
        path: the module that runs, for error messages.
        specialised: where answers were given that hold at the example's height and width only.
    """

    def __init__(
        self, model: nn.Module, inputs: tuple[Tensor, ...], arguments: Arguments | None = None
    ) -> None:
        super().__init__(autowrap_functions=_LEAVES)
        self.values = Values(model, inputs)
        self.proxies = Proxies()
        self.path = ""
        self.specialised: dict[str, None] = {}
        self.inputs = inputs
        self.arguments = dict(arguments or {})

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters are recorded."""
        return attr_val if self.values.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of torch, and those of this room."""
        if isinstance(m, TRANSFORMERS):
            return False
        return isinstance(m, DctLayer | FrozenBatchNorm2d | RecurrentLayer) or super().is_leaf_module(
            m, module_qualified_name
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node."""
        return ShapedProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Functions of the user's own that take sizes alone are called: a record of them would hand out its
        own lists, which nobody may write into.
        """
        if is_foreign(target):
            with suppress(Unknown):
                given, named = self._numbers((args, kwargs))
                return target(*given, **named)
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)

    def _numbers(self, arguments: Any) -> Any:
        """Proxies as the numbers that they stand for. Raises Unknown: one is a tensor or the batch."""
        special = False

        def number(value: Any) -> Any:
            nonlocal special
            if isinstance(value, Tensor | slice):
                raise Unknown("it is a tensor, or may hold one")
            if not isinstance(value, fx.Proxy):
                return value
            found, follows_size = self.values.number(value.node)
            special |= follows_size
            return found

        numbers = map_leaves(arguments, number)
        if special:  # not before all are known: else nothing is decided by them
            self.specialise()
        return numbers

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Remembers the module."""
        if self.values.running:
            return forward(*args, **kwargs)
        outer, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = outer  # not in a `finally`: after a failure it names the innermost module
        return result

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Arguments without an example input are what they are told to be, or by default."""
        # fx would change the code of what it calls, which is another function where forward is decorated
        with patch.object(fx._symbolic_trace, "_patch_function", lambda function, _: function):
            _, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        waiting, told = len(self.inputs), dict(self.arguments)
        for at, proxy in enumerate(args):
            if not isinstance(proxy, fx.Proxy):
                continue
            node, name = proxy.node, str(proxy.node.target)
            if name in told:
                args[at] = told.pop(name)
            elif name.startswith("**"):
                args[at] = told
            elif waiting:
                waiting -= 1
                continue
            elif node.args or name.startswith("*"):
                args[at] = () if name.startswith("*") else node.args[0]
            else:
                continue
            self.graph.erase_node(node)
        return lambda *given: plain_output(_called(root_fn, given)), args

    def to_bool(self, obj: fx.Proxy) -> bool:
        """For control flow. Raises Unknown."""
        return bool(self.number(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """One after the other. Raises Unknown."""
        return iter([cast(Any, obj)[i] for i in range(self.length(obj))])

    def number(self, proxy: fx.Proxy) -> Any:
        """What a size or a condition is. Raises Unknown."""
        found, special = self.values.number(proxy.node)
        if special:
            self.specialise()
        return found

    def length(self, proxy: fx.Proxy) -> int:
        """How many parts something has. Raises Unknown."""
        found, special = self.values.length(proxy.node)
        if special:
            self.specialise()
        return found

    def specialise(self) -> None:
        """Remember where something was decided that would be otherwise at other heights and widths."""
        frames = traceback.walk_stack(None)  # innermost first, and without the text of their lines
        here = next((line for frame, line in frames if _is_own(frame.f_code.co_filename)), None)
        line = "" if here is None else f":{here}"
        self.specialised.setdefault(f"{self.path or type(self.root).__name__}{line}")


def recorded(model: nn.Module, tracer: ShapedTracer) -> fx.Graph:
    """The graph of a network in eval mode, sizes of what it makes included."""
    with evaluating(model), recording_factories(), open_functions():
        return tracer.trace(model)


def _called(function: Callable[..., Any], values: Sequence[Any]) -> Any:
    """Call forward, decorated or not, with a value for each name of its code: fx has those by position first,
    then those by name alone, `*args` and `**kwargs`.
    """
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    args: list[Any] = []
    named: dict[str, Any] = {}
    for parameter, value in zip(sorted(parameters, key=lambda p: _ORDER.index(p.kind)), values, strict=True):
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            named |= value
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = value
        else:
            args.append(value)
    return function(*args, **named)


_ORDER = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
)

_LEAVES = (
    torchvision.ops.deform_conv2d,
    torchvision.ops.nms,
    torchvision.ops.batched_nms,
    torchvision.ops.roi_align,
    torchvision.ops.roi_pool,
    torchvision.ops.ps_roi_align,
    torchvision.ops.ps_roi_pool,
)
"""Functions that are kept whole."""


def plain_output(value: Any) -> Any:
    """Dataclasses and mappings of one's own as dicts: what a saved program can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain_output(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(plain_output, value))
    return value


_FACTORIES = ("zeros", "ones", "empty", "full", "arange", "linspace", "rand", "randn", "eye", "tensor")
"""Functions of torch that take sizes alone, so that torch.fx does not see them."""
_METHODS = ("expand", "view", "reshape", "repeat", "tile", "new_zeros", "new_ones", "new_full", "new_empty")
"""Methods that take sizes, called on a tensor that is no proxy."""


@contextmanager
def recording_factories() -> Iterator[None]:
    """While the block lasts, `torch.zeros(x.shape[0], 4)`, `len(x)` and their like are recorded."""
    torch.overrides.get_overridable_functions()  # torch remembers its first answer, which must not be ours
    with ExitStack() as stack:
        for name in _FACTORIES:
            stack.enter_context(_recording(torch, name))
        stack.enter_context(_recording(builtins, "len"))
        stack.enter_context(patch.object(torch, "is_tensor", _is_tensor))
        for name in _METHODS:
            stack.enter_context(_recording(Tensor, name))
        yield


def _is_tensor(value: Any) -> bool:
    """Also of what stands for one."""
    stands = cast(Any, value).tracer.values.of(value.node) if isinstance(value, fx.Proxy) else value
    return isinstance(stands, Tensor)


@contextmanager
def open_functions() -> Iterator[None]:
    """While the block lasts, functions that torchvision keeps whole (`torch.fx.wrap`) are traced through.

    There is attention in them, and with it all channels of a network. A network's own wraps stay.
    """
    wrapped = cast(dict[Any, dict[str, Any]], fx._symbolic_trace._wrapped_fns_to_patch)
    theirs = [key for key, space in wrapped.items() if _is_torchvisions(space)]
    held = {key: wrapped.pop(key) for key in theirs}
    try:
        yield
    finally:
        wrapped |= held


def _is_torchvisions(space: Mapping[str, Any]) -> bool:
    return str(space.get("__name__", "")).startswith("torchvision.models.")


def _recording(owner: ModuleType | type[Tensor], name: str) -> AbstractContextManager[Any]:
    function = getattr(owner, name)
    kind, target = ("call_method", name) if owner is Tensor else ("call_function", function)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        items = [i for a in given for i in (a if isinstance(a, tuple | list) else (a,))]
        proxy = next((i for i in items if isinstance(i, fx.Proxy)), None)
        if proxy is None or owner is builtins and proxy is not args[0]:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy(kind, target, args, kwargs)

    return patch.object(owner, name, call)


def own_frames(stack: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The frames of a network's own code."""
    return [f for f in stack if _is_own(f.filename)]


_NOT_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def _is_own(file: str) -> bool:
    """Neither torch's nor of this room."""
    return not file.startswith(_NOT_OWN)
