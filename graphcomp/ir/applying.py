"""A program's layers back in the network that it was traced from: the user's own class, smaller inside.

Layers are put in by path, and the network's own code goes on calling them; what it does between them stays.
That is the program only if no pass added anything between layers (channels padded, gathered or projected).
So the result is traced again and compared with the program: there is no rule here about passes.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import GraphcompError, SurgeryError, TraceError, first_line
from graphcomp.ir.baking import copied
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.program import PASS_KEY, Program, evaluating, output_tensors
from graphcomp.ir.region import Region
from graphcomp.ir.tracing import trace, unwrapped

_AGREES = 1e-9
"""Largest difference in float64, relative to the largest output."""


def apply(
    program: Program, module: nn.Module, example_inputs: Tensor | tuple[Any, ...] | None = None
) -> nn.Module:
    """A copy of the network with the layers of a program that was made from it.

    The copy has the network's class, attributes and methods, so what is around the traced part (the
    post-processing of a detector, a training loop) works on. Where a pass has added operations between
    layers, as `join=pad` does, the part cannot be called by the network's own code; if it is one module
    (`start` and `until` are the same), the program takes the place of that module.

    Args:
        program: traced from the network, and rewritten by passes.
        module: the network; left as it is. Computed weights (parametrizations) become plain ones in the copy.
        example_inputs: what the network takes; only needed for a part that has a `start` (see `trace`).

    Raises:
        SurgeryError: naming what the network's own code does not do, or where the two differ.
        TraceError: the program was not traced from this network.
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
    before = trace(module, inputs, start=start, until=until)
    result, refusal = module, None
    for own in (True, False):
        result = copied(module)
        _put_in(program, before, result, own)
        try:
            _compare(program, trace(result, inputs, start=start, until=until, copy_weights=False))
            break
        except (GraphcompError, RuntimeError) as error:
            refusal = refusal or error
    else:
        if not start or start != until:
            raise _refusal(program, type(module).__name__, cast(Exception, refusal)) from refusal
        result = copied(module)
        _set(result, start, _in_its_place(program))
    for path, new in result.named_modules():
        new.training = _is_training(module, path)
    if start or until:
        _run(result, inputs, str(Region(start, until)))
    return result


def _run(result: nn.Module, inputs: Tensor | tuple[Any, ...], region: str) -> None:
    """What is behind the part may read more of it than what the last module returns."""
    try:
        with evaluating(result), torch.no_grad():
            result(*((inputs,) if isinstance(inputs, Tensor) else inputs))
    # Whatever a network raises when its parts do not fit.
    except Exception as error:
        raise SurgeryError(
            f"{type(result).__name__}: found {type(error).__name__}: {first_line(error)} with the program's "
            f"layers from {region}, expected a part whose values are read by nothing else; end it earlier"
        ) from error


def _put_in(program: Program, before: Program, result: nn.Module, own: bool) -> None:
    """Layers and tensors by path; what the program does not call any more becomes nothing.

    Args:
        own: classes of the user's own stay, since they may do more than the layers that they are for the
            program, and get tensors and widths. Else the layers take their place, since they may compute
            their weights from what they hold.
    """
    layers = before.called_modules()
    named = dict(result.named_modules(remove_duplicate=False))
    again = {path: [p for p, m in named.items() if m is named.get(path)] for path in layers}
    for path in layers.keys() - program.called_modules().keys():
        factors = list(program.modules.get(path, nn.Identity()).children())
        new = nn.Sequential(*map(copy.deepcopy, factors)) if factors else nn.Identity()
        for name in again[path] or [path]:
            _set(result, name, new)
    for path, layer in program.called_modules().items():
        if path in layers:
            for name in again[path] or [path]:  # one module may have several names
                _renew(result, name, layer, own)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = cast(str, node.target).rpartition(".")
            _set_tensor(result, owner, leaf, program.tensors[node.target])


def _renew(result: nn.Module, path: str, layer: nn.Module, own: bool) -> None:
    old = dict(result.named_modules(remove_duplicate=False)).get(path)
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
    module = dict(result.named_modules(remove_duplicate=False)).get(owner)
    if module is None:
        return
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor.detach().clone()


def _compare(program: Program, made: Program) -> None:
    """Raises SurgeryError: the two compute different things."""
    wanted, found = (p.to(torch.float64) for p in (program, made))
    for batch in (1, 2):
        inputs = fresh_inputs(wanted, batch, seed=batch, dtype=torch.float64)
        with torch.no_grad():
            pairs = [output_tensors(p(*(x.clone() for x in inputs))) for p in (found, wanted)]
        for index, (x, y) in enumerate(zip(*pairs, strict=True)):
            peak = float(y.abs().max()) if y.numel() else 0.0
            if x.shape != y.shape or not torch.allclose(x, y, rtol=0.0, atol=_AGREES * peak, equal_nan=True):
                raise SurgeryError(f"output {index}: found another result than the program's")


def _refusal(program: Program, name: str, error: Exception) -> SurgeryError:
    added = [n.name for n in program.graph.nodes if _is_added(program, n)]
    more = f" and {len(added) - 3} more" if len(added) > 3 else ""
    if added:
        return SurgeryError(
            f"{name}: found {', '.join(added[:3])}{more} between layers, which passes have added or changed "
            "and its own code does not do so, expected changed layers only; use join=couple, leave layers "
            "around them alone (exclude), or use the program itself"
        )
    return SurgeryError(
        f"{name}: found {first_line(error)} with the program's layers in it, expected the program's result; "
        "its code counts on the old widths; use the program itself"
    )


def _is_added(program: Program, node: fx.Node) -> bool:
    return node.op != "call_module" and node.meta.get(PASS_KEY) != "trace" and node.op != "output"


class _InPlace(nn.Module):
    """A program that is called as the module was whose place it takes."""

    def __init__(self, program: Program, names: tuple[str, ...]) -> None:
        super().__init__()
        self.program, self._names = program.clone().module, names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors by position or name, nested ones in order."""
        given = [*args, *(kwargs[name] for name in self._names if name in kwargs)]
        return self.program(*output_tensors(given))


def _in_its_place(program: Program) -> nn.Module:
    names = tuple(str(n.target) for n in program.graph.nodes if n.op == "placeholder")
    return _InPlace(program, names)


def _is_training(module: nn.Module, path: str) -> bool:
    """As the module there was, or the innermost one around it that there was."""
    known: dict[str, bool] = {name: m.training for name, m in module.named_modules(remove_duplicate=False)}
    while path not in known:
        path = path.rpartition(".")[0]
    return known[path]
