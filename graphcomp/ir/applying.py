"""A program's layers back in the network that it was traced from: the user's own class, smaller inside.

Layers are put in by path, and the network's own code goes on calling them; what it does between them stays.
That is the program only if no pass added anything between layers (channels padded, gathered or projected).
So the result is traced again and compared with the program: there is no rule here about passes.
"""

import copy
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import GraphcompError, GraphcompWarning, SurgeryError, TraceError, first_line, some_of
from graphcomp.ir.arguments import call_with
from graphcomp.ir.attention import OpenAttention
from graphcomp.ir.baking import copied
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.interface import Arguments
from graphcomp.ir.opening import holds_closed, open_modules, unwrapped
from graphcomp.ir.program import PASS_KEY, Program, disagrees, evaluating, output_tensors
from graphcomp.ir.region import Region
from graphcomp.ir.remembered import left_as_it_is
from graphcomp.ir.renumbering import renumber
from graphcomp.ir.tracing import trace

_AGREES = 1e-9
"""Largest difference in float64, relative to the largest output."""


def apply(
    program: Program, module: nn.Module, example_inputs: Tensor | tuple[Any, ...] | None = None
) -> nn.Module:
    """A copy of the network with the layers of a program that was made from it.

    The copy has the network's class, attributes and methods, so what is around the traced part (the
    post-processing of a detector, a training loop) works on. Where a pass has added operations between
    layers, as `join=pad` does, the part cannot be called by the network's own code; if it is one module
    (`start` and `until` are the same), the program takes the place of that module. Attention and recurrent
    layers of torch whose parts a pass has changed are what they were opened to (`ir.opening`), called alike.
    Numbers that modules hold, and their code counts channels by, become the program's (`ir.renumbering`).

    Args:
        program: traced from the network, and rewritten by passes.
        module: the network; left as it is. Computed weights (parametrizations) become plain ones in the copy.
        example_inputs: what the network takes; only needed for a part that has a `start` (see `trace`).

    Raises:
        SurgeryError: naming what the network's own code does not do, or where the two differ.
        TraceError: no example inputs for a part that has a `start`, or a network that has no such part.
    """
    told = program.interface
    module = unwrapped(module)
    start, until = told.start or "", told.until or ""
    if example_inputs is None and start:
        raise TraceError(
            f"example_inputs: found none for a part that begins with the call of {start}, expected what "
            f"{type(module).__name__} takes"
        )
    inputs = program.example_inputs if example_inputs is None else example_inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphcompWarning)  # said when the program was traced
        result = _substituted(program, module, inputs, Region(start, until), told.arguments)
    known = {path: m.training for path, m in module.named_modules(remove_duplicate=False)}
    for path, new in result.named_modules():
        while path not in known:  # as the innermost module around it that there was
            path = path.rpartition(".")[0]
        new.training = known[path]
    with left_as_it_is(module):
        _run(result, inputs, told.arguments, Region(start, until))
    return result


_WAYS = ("closed", "narrower", "fewer heads")
"""What modules of torch that a trace opens may be in the result; what is compared says which it is."""


def _substituted(
    program: Program, module: nn.Module, inputs: Any, region: Region, arguments: Arguments
) -> nn.Module:
    """A copy with the layers, or with the program, in their place."""
    traced = partial(
        trace, example_inputs=inputs, start=region.start, until=region.until, arguments=arguments
    )
    before = traced(module)
    layers = before.called_modules()
    refusals: list[Exception] = []
    ways = _WAYS if holds_closed(module) else _WAYS[:1]
    for own, way, renumbers in product((True, False), ways, (False, True)):
        result = copied(module)
        if way != "closed":
            open_modules(result)
        _put_in(program, layers, result, own)
        if renumbers and not renumber(before, program, result):
            continue
        try:
            with left_as_it_is(module):  # hooks of a copy may write into it
                _settle(program, result, way == "fewer heads")
                _compare(program, traced(result, copy_weights=False))
            return result
        except (GraphcompError, RuntimeError) as error:
            refusals.append(error)
    if not region.start or region.start != region.until:
        raise _refusal(program, type(module).__name__, refusals[0]) from refusals[0]
    result = copied(module)
    _set(result, region.start, _InPlace(program))
    return result


def _settle(program: Program, result: nn.Module, whole_heads: bool) -> None:
    for path, module in result.named_modules():
        if isinstance(module, OpenAttention):
            called = [p.removeprefix(f"{path}.") for p in program.called_modules()]
            module.settle(called, whole_heads)


def _run(result: nn.Module, inputs: Tensor | tuple[Any, ...], arguments: Arguments, region: Region) -> None:
    """What is behind a part may read more of it than what the last module returns, and a network may call
    layers whose results nothing reads: these are in no program, and as wide as they were.
    """
    given = (inputs,) if isinstance(inputs, Tensor) else inputs
    args, kwargs = call_with(result.forward, given, arguments)
    try:
        with evaluating(result), torch.no_grad():
            result(*args, **kwargs)
    # Whatever a network raises when its parts do not fit.
    except Exception as error:
        expected = (
            "a part whose values are read by nothing else; end it earlier"
            if region
            else "no calls of layers whose results nothing reads; take them out of forward"
        )
        raise SurgeryError(
            f"{type(result).__name__}: found {type(error).__name__}: {first_line(error)} with the program's "
            f"layers from {region}, expected {expected}"
        ) from error


def _put_in(program: Program, layers: Iterable[str], result: nn.Module, own: bool) -> None:
    """Layers and tensors by path; what the program does not call any more becomes nothing.

    Args:
        layers: paths of those that there were.
        own: classes of the user's own stay, since they may do more than the layers that they are for the
            program, and get tensors and widths. Else the layers take their place, since they may compute
            their weights from what they hold.
    """
    names: dict[int, list[str]] = {}  # one module may have several
    named = dict(result.named_modules(remove_duplicate=False))
    for path, old in named.items():
        names.setdefault(id(old), []).append(path)
    called = program.called_modules()
    for path in layers:
        # None for layers that tracing has made of functions or of an opened module: the network has no place
        # for them, and whether its own code says the same is compared afterwards.
        for name in names[id(named[path])] if path in named else ():
            if path in called:
                _renew(result, name, called[path], own)
            else:  # factors lie where the layer was
                factors = list(program.modules.get(path, nn.Identity()).children())
                new = nn.Sequential(*map(copy.deepcopy, factors)) if factors else nn.Identity()
                _set(result, name, new)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = cast(str, node.target).rpartition(".")
            _set_tensor(result, owner, leaf, program.tensors[node.target])


def _renew(result: nn.Module, path: str, layer: nn.Module, own: bool) -> None:
    old = _module(result, path)
    if not own or old is None or type(old) is type(layer) or type(old).__module__.startswith("torch.nn"):
        _set(result, path, copy.deepcopy(layer))
        return
    for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        _set_tensor(result, path, name, tensor)
    for name, value in vars(layer).items():
        if isinstance(value, int | tuple) and name != "training" and hasattr(old, name):
            setattr(old, name, value)


def _set(result: nn.Module, path: str, new: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    try:
        result.get_submodule(owner)._modules[leaf] = new
    except AttributeError as error:
        raise TraceError(
            f"{path}: found no such module, expected the network that the program was traced from"
        ) from error


def _set_tensor(result: nn.Module, owner: str, leaf: str, tensor: Tensor) -> None:
    module = _module(result, owner)
    if module is not None and leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    elif module is not None and leaf in module._buffers:
        module._buffers[leaf] = tensor.detach().clone()


def _module(result: nn.Module, path: str) -> nn.Module | None:
    with suppress(AttributeError):
        return result.get_submodule(path)
    return None


def _compare(program: Program, made: Program) -> None:
    """Raises SurgeryError: the two compute different things."""
    wanted, found = (p.to(torch.float64) for p in (program, made))
    for batch in (1, 2):
        inputs = fresh_inputs(wanted, batch, seed=batch, dtype=torch.float64)
        with torch.no_grad():
            outputs = [p(*(x.clone() for x in inputs)) for p in (found, wanted)]
        index = disagrees(outputs[0], outputs[1], _AGREES)
        if index is not None:
            raise SurgeryError(f"output {index}: found another result than the program's")


def _refusal(program: Program, name: str, error: Exception) -> SurgeryError:
    added = [n.name for n in program.graph.nodes if _is_added(n)]
    if added:
        return SurgeryError(
            f"{name}: found {some_of(added)} between layers, which passes have added or changed "
            "and its own code does not do so, expected changed layers only; use join=couple, leave layers "
            "around them alone (exclude), or use the program itself"
        )
    return SurgeryError(
        f"{name}: found {first_line(error)} with the program's layers in it, expected the program's result; "
        "its code counts on the old widths; use the program itself"
    )


def _is_added(node: fx.Node) -> bool:
    return node.op not in ("call_module", "output") and node.meta.get(PASS_KEY) != "trace"


class _InPlace(nn.Module):
    """A program that is called as the module was whose place it takes."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program.clone().module
        self._names = [str(n.target) for n in program.graph.nodes if n.op == "placeholder"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors by position or name, nested ones in order."""
        given = [*args, *(kwargs[name] for name in self._names if name in kwargs)]
        return self.program(*output_tensors(given))
