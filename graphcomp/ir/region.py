"""A part of a network: from the call of one module to the return of another.

A detector resizes and batches images in front of its backbone, and chooses boxes behind its heads by what
tensors hold; no trace can follow either. Between the two lies all that has weights. So the network runs as it
does for its users, on their example; where it calls the module `start` the recording begins, with that
call's tensors as inputs, and with what the module `until` returns it ends.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import TraceError, first_line
from graphcomp.ir.arguments import Call
from graphcomp.ir.interface import Arguments
from graphcomp.ir.program import evaluating, map_leaves
from graphcomp.ir.tracer import ShapedTracer, plain_output


@dataclass(frozen=True)
class Region:
    """Module paths; "" is the network itself."""

    start: str = ""
    until: str = ""

    def __bool__(self) -> bool:
        return bool(self.start or self.until)

    def __str__(self) -> str:
        begin = f"the call of {self.start}" if self.start else "its inputs"
        return f"{begin} to {f'what {self.until} returns' if self.until else 'its outputs'}"

    def require(self, model: nn.Module) -> None:
        """Raises TraceError: a path that no module of the network has."""
        known = dict(model.named_modules(remove_duplicate=False))
        for what, path in (("start", self.start), ("until", self.until)):
            if path not in known:
                raise TraceError(
                    f"{what}: found {path!r:.200}, expected the path of a module of {type(model).__name__}, "
                    f"e.g. {', '.join(list(known)[1:4])}"
                )


WHOLE = Region()
"""The whole network."""


class _Left(BaseException):
    """The region is over; not an Exception, so that no network's own handler takes it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def call_of(model: nn.Module, path: str, given: Call) -> Call:
    """What a network calls one of its modules with, the first time, for this call of its own.

    Raises:
        TraceError: it is never called, or the network does not run.
    """

    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        raise _Left((args, kwargs))

    hook = model.get_submodule(path).register_forward_pre_hook(seen, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            model(*given[0], **given[1])
    except _Left as left:
        return cast(Call, left.value)
    # Whatever a network raises for inputs that it does not take.
    except Exception as error:
        raise TraceError(
            f"start: found {type(error).__name__}: {first_line(error)} on the way to {path}, expected "
            "example inputs that the network takes"
        ) from error
    finally:
        hook.remove()
    raise TraceError(
        f"start: found no call of {path} for the example inputs, expected a module that runs in eval mode"
    )


def one_sample(call: Call) -> Call:
    """The same with the first sample of every tensor; random ones where there is none (boxes found)."""
    generator = torch.Generator().manual_seed(0)

    def first(x: Any) -> Any:
        if not _has_samples(x):
            return x
        if len(x):
            return x[:1].detach().clone()
        return torch.randn(1, *x.shape[1:], generator=generator).to(x.dtype)

    return cast(Call, map_leaves(call, first))


def inputs_in(call: Any) -> tuple[Tensor, ...]:
    """The tensors of a call that have samples, in order."""
    found: list[Any] = []
    map_leaves(call, found.append)
    return tuple(filter(_has_samples, found))


def _has_samples(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


class RegionTracer(ShapedTracer):
    """Records what happens between two modules only.

    Args:
        model, region: the network, and between which of its modules.
        given: the call of the network with which it runs up to the region.
        call: what `start` is called with, of one sample; without a start that is the network itself.
        arguments: see `ShapedTracer`.
    """

    def __init__(
        self, model: nn.Module, region: Region, given: Call, call: Call, arguments: Arguments
    ) -> None:
        super().__init__(model, inputs_in(call), arguments)
        self.region = region
        self._start, self._until = (model.get_submodule(path) for path in (region.start, region.until))
        self._given, self._call = given, call
        self._entered = not region.start

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters are parameters until the recording begins."""
        if not self._entered:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Begins and ends the recording."""
        if not self._entered:
            if m is not self._start:
                return forward(*args, **kwargs)
            self._entered = True
            args, kwargs = self._call
        result = super().call_module(m, forward, args, kwargs)
        if m is self._until and not self.values.running:
            raise _Left(result)
        return result

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The network runs on its own inputs; the call of `start` gets what stands for its tensors."""
        run, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        if self.region.start:
            for node in list(self.graph.nodes):
                self.graph.erase_node(node)
            names = _names_of(self._start, self._call)
            self._call = map_leaves(
                self._call, lambda x: self._placeholder(next(names)) if _has_samples(x) else x
            )
            args = [args[0], *self._given[0]]
            run = partial(root_fn, **self._given[1])

        def region(*given: Any) -> Any:
            try:
                result = run(*given)
            except _Left as left:
                return plain_output(left.value)
            if self.region.until:
                raise TraceError(
                    f"until: found no call of {self.region.until} behind "
                    f"{self.region.start or 'the inputs'}, expected a module that runs in eval mode"
                )
            return plain_output(result)

        return region, args

    def _placeholder(self, name: str) -> fx.Proxy:
        return cast(fx.Proxy, self.create_proxy("placeholder", name, (), {}))


def _names_of(module: nn.Module, call: Call) -> Iterator[str]:
    """A name for every tensor: that of the parameter, with a number where that one holds several."""
    args, kwargs = call
    try:
        bound: Mapping[str, Any] = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError:  # a leaf of C
        bound = {"x": args, **kwargs}
    for name, value in bound.items():
        for index, _ in enumerate(inputs_in(value)):
            yield f"{name}_{index}" if index else name
