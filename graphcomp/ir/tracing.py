"""A network becomes a program: traced in eval mode, with what computes weights baked in."""

import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from graphcomp.errors import GraphcompWarning, TraceError, first_line, some_of
from graphcomp.ir.arguments import arguments_of, call_with
from graphcomp.ir.baking import bake_parametrizations, copied, is_parametrized
from graphcomp.ir.concrete import FollowsBatch, Unknown, Values
from graphcomp.ir.exported import NotLiftedError, classes_of_script, export, has_open_batch, lifted, of_script
from graphcomp.ir.factories import drop_empty, hold_constants, state_sizes
from graphcomp.ir.folding import fold_weights
from graphcomp.ir.frozen import as_layers, holds_frozen
from graphcomp.ir.hooks import is_hooked
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.interface import Arguments, Interface
from graphcomp.ir.lifting import lift_layers
from graphcomp.ir.literals import state_numbers
from graphcomp.ir.opening import holds_closed, open_modules, unwrapped
from graphcomp.ir.operators import OUT_OF_PLACE, spell_alike
from graphcomp.ir.program import (
    OWNER_KEY,
    PASS_KEY,
    Program,
    cloning,
    disagrees,
    eliminate_dead_nodes,
    evaluating,
    graph_module,
    is_read_later,
    with_tensors,
)
from graphcomp.ir.refusals import refuse_exported, require_names
from graphcomp.ir.region import Region, RegionTracer, call_of, one_sample
from graphcomp.ir.remembered import (
    doubts,
    forgot,
    left_as_it_is,
    require_constants,
    require_values_of_now,
)
from graphcomp.ir.tracer import ShapedTracer, own_frames, plain_output, recorded


def trace(
    model: nn.Module | ExportedProgram,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    copy_weights: bool = True,
    fold: bool = True,
    start: str = "",
    until: str = "",
    arguments: Mapping[str, Any] | None = None,
) -> Program:
    """Trace `model` in eval mode with torch.fx into a Program.

    Python's control flow runs with the sizes of the example inputs (`ir.concrete`): the batch stays open, and
    so do height and width where no decision follows from them; where one does, the program is for the
    example's sizes only, and `Program.interface.specialised` names the places. Writes into parts of a tensor
    (`y[:, :4] = x`) become concatenations.

    Args:
        model: left as it is. What `torch.compile`, DataParallel and DistributedDataParallel wrap is
            taken out. Programs of torch.export and TorchScript modules get layers again. Computed
            weights (`torch.nn.utils.parametrize`, and the hooks of pruning, spectral norm and weight
            norm) are baked in; with a GraphcompWarning if training on would differ. Frozen batch
            normalisations become layers (`ir.frozen`).
        example_inputs: one tensor an input; only the first sample of each is kept.
        copy_weights: False shares the tensors with `model`, for callers that drop the model.
        fold: whether weights that forward computes from parameters alone (standardised, rescaled) become
            parameters of plain layers (`ir.folding`), with a GraphcompWarning, since training then moves
            these. False keeps the computation; what it reads is then left alone by most passes.
        start, until: module paths: only what happens from the first call of `start` to what `until` returns,
            of a network whose ends cannot be traced, as a detector's (`ir.region`). With `start` the example
            inputs are whatever the network takes (a list of images), and that call's tensors are the
            program's inputs. `apply` puts the program back.
        arguments: values of arguments of forward that are no inputs, by name: None, truth values, numbers,
            texts, and lists of these (which it gets as tuples). Example inputs are those of the others, in
            order; what then is left has its default. The program is for these values, and keeps them.

    Raises:
        TraceError: naming the module and source line that neither torch.fx nor torch.export can follow, or
            the node whose shape cannot be derived from the example inputs; hooks on the network itself; no
            call of `start` or `until`; arguments that forward does not take.
    """
    model = unwrapped(model)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    region = Region(start, until)
    told = arguments_of(model, arguments or {})
    if isinstance(model, ExportedProgram):
        captured = _of_exported(model, _firsts(inputs), fold, region)
    elif isinstance(model, torch.jit.ScriptModule):
        captured = _of_script(model, _firsts(inputs), fold, region)
    else:
        captured = _of_module(model, inputs, copy_weights, fold, region, told)
    graph, root = captured.graph, captured.root
    eliminate_dead_nodes(graph, root)
    augmented = {n.name for n in graph.nodes if n.target in OUT_OF_PLACE}
    for node in graph.nodes:  # `x += y` becomes `x + y` for now
        node.target = (
            OUT_OF_PLACE.get(node.target, node.target) if node.op == "call_function" else node.target
        )
    lift_layers(root, graph)
    module = graph_module(root, graph, captured.name).eval()
    for node in module.graph.nodes:
        owner = next(reversed(node.meta.get("nn_module_stack") or {"": ()}))
        node.meta = {PASS_KEY: "trace", OWNER_KEY: owner}
        _place_operand(node)
    _say_folded(captured.folded)
    interface = Interface(
        specialised=captured.specialised,
        remarks=(*captured.remarks, *_said_of(told)),
        arguments=told,
        start=start or None,
        until=until or None,
    )
    program = Program(module, captured.inputs, interface=interface)
    # shapes are derived now, so that a wrong input shape fails here
    program = _without_seen_writes(program, [n for n in module.graph.nodes if n.name in augmented])
    state_numbers(program)
    if captured.original is not None:
        _compare(program, captured)
    return program


_AGREES = 1e-4
"""Largest difference from the original, relative to its largest output."""


def _compare(program: Program, captured: "_Captured") -> None:
    """torch.export picks a side of `if x.shape[0] == 1` in silence, a row may be wrong, and nobody knows what
    functions of the user's own do beside returning something: run both, at batches that the network takes.
    """
    original = cast(Callable[..., Any], captured.original)
    for batch in captured.batches:
        inputs = fresh_inputs(program, batch, seed=batch)
        with torch.no_grad():
            try:
                wanted = plain_output(original(*(x.clone() for x in inputs)))
            except RuntimeError:
                if batch == captured.batches[0]:
                    raise
                continue  # a literal batch size in the network
            found = program(*(x.clone() for x in inputs))
        if disagrees(found, wanted, _AGREES) is not None:
            why = captured.doubt or "; ".join(captured.remarks)
            raise TraceError(
                f"{captured.name}: found another result than the network's at batch {batch} from its "
                f"trace, expected the same; {why}"
            )


@dataclass(frozen=True)
class _Captured:
    """A network as a graph over modules that hold its tensors.

    Attributes:
        inputs: one sample of each.
        folded, specialised: see `ir.folding` and `Interface`. remarks: what has to be said of how it came.
        original: what it is compared with, at `batches`, for a graph that is not all ours.
        doubt: why, if not for the door it came through.
    """

    name: str
    root: nn.Module
    graph: fx.Graph
    inputs: tuple[Tensor, ...]
    folded: list[str]
    specialised: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    original: Callable[..., Any] | None = None
    batches: tuple[int, ...] = (1, 3)
    doubt: str = ""


def _firsts(inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    for index, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TraceError(
                f"example_inputs: found {type(x).__name__} for input {index}, expected one tensor an input; "
                "for a network that takes others, name the module whose call takes tensors first (start)"
            )
        if x.dim() == 0 or len(x) != len(inputs[0]):
            found = f"{len(x)} sample(s)" if x.dim() else "no axis of samples"
            expected = f"{len(inputs[0])}, as many as of the first" if index else "at least one dimension"
            raise TraceError(
                f"example_inputs: found {found} in input {index}, of shape {tuple(x.shape)}, expected "
                f"{expected}; a number that is the same for all samples is no input: give it by name "
                "(arguments=, --input), a tensor as a buffer of the network"
            )
    return tuple(x[:1].detach().clone() for x in inputs)


def _said_of(arguments: Arguments) -> tuple[str, ...]:
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return (f"traced with {given}, which it is for",) if given else ()


def _tracer(model: nn.Module, inputs: tuple[Any, ...], region: Region, arguments: Arguments) -> ShapedTracer:
    whole = call_with(model.forward, inputs, arguments)
    if not region:
        return ShapedTracer(model, _firsts(inputs), arguments)
    region.require(model)
    call = call_of(model, region.start, whole) if region.start else (_firsts(inputs), {})
    return RegionTracer(model, region, whole, one_sample(call), arguments)


def _of_module(
    model: nn.Module,
    given: tuple[Any, ...],
    copy_weights: bool,
    fold: bool,
    region: Region,
    arguments: Arguments,
) -> _Captured:
    """By torch.fx; where that fails, by torch.export."""
    refuse_exported(model)
    original = partial(_evaluated, model, arguments)
    changes = holds_frozen(model) or holds_closed(model) or any(map(is_parametrized, model.modules()))
    # a hook of a copy would keep what it sees in the original, where the copy's forward does not look
    copy_later = copy_weights and not changes and any(map(is_hooked, model.modules()))
    if changes or (copy_weights and not copy_later):
        model = copied(model)
        bake_parametrizations(model)
        as_layers(model)
        open_modules(model)
    if is_hooked(model):
        raise TraceError(
            f"{type(model).__name__}: found forward hooks on the network itself, which no trace sees, "
            "expected none; move what they do into forward, or remove them"
        )
    require_names(model)
    tracer = _tracer(model, given, region, arguments)
    name, inputs = type(model).__name__, tracer.inputs
    try:
        with left_as_it_is(model):
            try:
                graph = recorded(model, tracer)
            except FollowsBatch:
                if region.start or not forgot(model, tracer.inputs, arguments):
                    raise
                tracer = _tracer(model, given, region, arguments)
                graph = recorded(model, tracer)
            require_values_of_now(model, graph)
            spell_alike(graph)
            state_sizes(model, graph)
            doubt = "" if region else doubts(model, graph)
            # shallow copies: the caller's modules keep their training mode, these are in eval mode
            root = with_tensors(model, cloning() if copy_later else lambda t: t)
            values = Values(root, inputs)
            hold_constants(root, graph, values)
            drop_empty(graph, values)
            folded = fold_weights(root, graph, values) if fold else []
        remarks = (f"the part of {name} from {region}",) if region else ()
        checked, specialised = original if doubt else None, tuple(tracer.specialised)
        return _Captured(name, root, graph, inputs, folded, specialised, remarks, checked, doubt=doubt)
    except Exception as error:
        refusal = _trace_error(model, tracer.path, error)
        if region:  # torch.export knows whole networks
            raise (error if isinstance(error, TraceError) else refusal) from error
        try:
            with evaluating(model):
                exported = export(model, inputs, arguments)
            require_constants(model, exported.constants, inputs, arguments)
            captured = _lifted(exported, model, inputs, fold, name)
        # Whatever torch.export finds.
        except Exception as second:
            raise TraceError(
                f"{refusal}. torch.export does not take it either: {first_line(second)}"
            ) from error
        where = str(refusal).partition("; expected")[0]
        why = f"captured by torch.export, since torch.fx could not follow {where}"
        return replace(captured, remarks=(why,), original=original)


def _evaluated(model: nn.Module, arguments: Arguments, *inputs: Tensor) -> Any:
    args, kwargs = call_with(model.forward, inputs, arguments)
    with left_as_it_is(model), evaluating(model):
        return model(*args, **kwargs)


def _of_exported(
    program: ExportedProgram, inputs: tuple[Tensor, ...], fold: bool, region: Region
) -> _Captured:
    if region:
        raise TraceError(
            f"ExportedProgram: found a part of it asked for ({region}), expected a torch.nn.Module for that"
        )
    if not has_open_batch(program):
        raise TraceError(
            "ExportedProgram: found a program for one batch size, expected one that takes any; export it "
            "with dynamic_shapes={'x': {0: torch.export.Dim.DYNAMIC}} and a batch of two"
        )
    try:
        captured = _lifted(program, None, inputs, fold, "ExportedProgram")
    except NotLiftedError as error:
        raise TraceError(
            f"ExportedProgram: found {error}, which has no form as a function of torch, expected operators "
            "that have; give the module that it was made from"
        ) from error
    return replace(captured, original=program.module(), batches=(2, 3))  # it may not take one sample


def _of_script(
    model: torch.jit.ScriptModule, inputs: tuple[Tensor, ...], fold: bool, region: Region
) -> _Captured:
    name = type(model).__name__
    if region:
        raise TraceError(
            f"{name}: found a part of a TorchScript module asked for ({region}), expected a torch.nn.Module"
        )
    try:
        program = of_script(model, inputs)
        captured = _lifted(program, None, inputs, fold, name, classes_of_script(model))
    except NotLiftedError as error:
        raise TraceError(
            f"{name}: found a TorchScript module with {error}, expected one of plain layers and functions; "
            "give the module that it was made from"
        ) from error
    remarks = ("converted from TorchScript, which has no layers: their settings are those of the operators",)
    return replace(captured, remarks=remarks, original=partial(_evaluated, model, {}))


def _lifted(
    exported: ExportedProgram,
    model: nn.Module | None,
    inputs: tuple[Tensor, ...],
    fold: bool,
    name: str,
    script: Mapping[str, str] | None = None,
) -> _Captured:
    root, graph = lifted(exported, model, script)
    values = Values(root, inputs)
    hold_constants(root, graph, values)
    drop_empty(graph, values)
    folded = fold_weights(root, graph, values) if fold else []
    return _Captured(name, root, graph, inputs, folded, ("torch.export, which knows no other sizes",))


def _say_folded(names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"{some_of(names)}: found weights that forward computes from parameters alone; their "
            "values are baked in, and training on moves these freely (fold=False keeps the computation)",
            GraphcompWarning,
            stacklevel=3,
        )


def _without_seen_writes(program: Program, augmented: Sequence[fx.Node]) -> Program:
    """Turn `x + y` back into `x += y` where something else sees the change of x."""
    while True:
        values = program.values
        seen = [n for n in augmented if isinstance(values[n], Tensor) and is_read_later(program, n)]
        if not seen:
            break
        for node in seen:
            node.target = next(k for k, v in OUT_OF_PLACE.items() if v is node.target)
        augmented = [n for n in augmented if n not in seen]
        program = Program(program.module, program.example_inputs)
        program.module.recompile()
    if any(not n.users for n in augmented):
        eliminate_dead_nodes(program.graph, program.module)
        program.module.recompile()
    return program


def _place_operand(node: fx.Node) -> None:
    """torch.cat(tensors=…), conv(input=…): the operand comes first, where every rule looks for it."""
    torch_owned = str(getattr(node.target, "__module__", "")).partition(".")[0] == "torch"
    if node.args or not (node.op == "call_module" or node.op == "call_function" and torch_owned):
        return
    name = next((k for k in ("input", "tensors", "tensor") if k in node.kwargs), None)
    if name is not None:
        node.args = (node.kwargs[name],)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != name}


def _trace_error(model: nn.Module, path: str, error: Exception) -> TraceError:
    frames = own_frames(traceback.extract_tb(error.__traceback__))
    here = frames[-1] if frames else None
    module = model.get_submodule(path) if path else model
    where = f"{path or type(model).__name__} ({type(module).__name__})"
    line = f"{here.filename}:{here.lineno}: `{here.line}`" if here else "no source line"
    said = str(error) if isinstance(error, Unknown) else f"{type(error).__name__}: {error}"
    return TraceError(
        f"{where}: {line}: {said}; expected a forward whose control flow does not "
        "depend on tensor values; move the branch out of forward, wrap it in a function marked with "
        "torch.fx.wrap (its channels are then left alone), or name a part without it (start, until)"
    )
