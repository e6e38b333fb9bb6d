"""The second door: a network that torch.fx cannot follow, captured by torch.export and lifted to plain torch.

torch.export runs a network on tensors without numbers and records operators of ATen. Every one of them is
written here as the function or method of torch that it belongs to, with the parameters that it reads by their
own names, so that `ir.lifting` makes layers of them and the rest of graphcomp sees what it always sees.
Heights and widths are numbers in such a graph: it is for those of the example.
"""

import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from graphcomp.base import muted
from graphcomp.errors import first_line
from graphcomp.ir.arguments import call_with
from graphcomp.ir.interface import Arguments
from graphcomp.ir.program import with_tensors
from graphcomp.ir.tracer import plain_output

_END = 2**63 - 1
"""What ATen has for the end of an axis."""


class NotLiftedError(Exception):
    """A node that has no form in plain torch; the message names it."""


def export(model: nn.Module, inputs: tuple[Tensor, ...], arguments: Arguments) -> ExportedProgram:
    """Capture a network, in eval mode, with an open batch; from one sample of each input."""
    pairs = tuple(torch.cat([x, x]) for x in inputs)  # a batch of one would be taken for a constant
    args, kwargs = call_with(model.forward, pairs, arguments)
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(lambda x: {0: Dim.DYNAMIC} if isinstance(x, Tensor) and x.ndim else None, given)
    with muted():  # what stops it is logged with the whole graph, and raised
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def of_script(model: torch.jit.ScriptModule, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """What a TorchScript module computes, by torch's own converter.

    Raises:
        NotLiftedError: torch has none, or it fails.
    """
    try:
        from torch._export.converter import TS2EPConverter

        with muted():
            return TS2EPConverter(model, tuple(torch.cat([x, x]) for x in inputs), None).convert()
    # Whatever it finds, or that it has moved: it is no public part of torch.
    except Exception as error:
        raise NotLiftedError(f"what torch cannot convert: {first_line(error)}") from error


def classes_of_script(model: torch.jit.ScriptModule) -> dict[str, str]:
    """Of every module by path the class that it was made from, with the module that defines it."""
    names = {path: str(part._c._type().qualified_name()) for path, part in model.named_modules()}
    return {path: re.sub(r"__torch__\.|___torch_mangle_\d+\.", "", name) for path, name in names.items()}


def lifted(
    program: ExportedProgram, model: nn.Module | None, script: Mapping[str, str] | None = None
) -> tuple[nn.Module, fx.Graph]:
    """Modules with the tensors of an exported program, and its graph in plain torch.

    Args:
        program: with an open batch.
        model: that it was made from, whose modules are kept; None builds those that hold its tensors.
        script: classes of modules, by path, of a program that does not know them (`classes_of_script`).

    Raises:
        NotLiftedError: naming the operator.
    """
    root = _modules(program, script or {}) if model is None else with_tensors(model, lambda t: t)
    graph, new = fx.Graph(), dict[fx.Node, Any]()
    specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    users = set(program.graph_signature.user_inputs)
    inputs.sort(key=lambda n: n.name not in users)  # a program has its inputs first
    for node in [*inputs, *(n for n in program.graph.nodes if n.op != "placeholder")]:
        if node.op == "placeholder":
            new[node] = _input(program, root, graph, node, specs.get(node.name))
        elif node.op == "call_function":
            new[node] = _call(graph, node, new)
        elif node.op == "output":
            flat = [new.get(v, v) if isinstance(v, fx.Node) else v for v in node.args[0]]
            mutated = len(flat) - len(program.graph_signature.user_outputs)
            spec = cast(pytree.TreeSpec, program.call_spec.out_spec)
            graph.output(plain_output(pytree.tree_unflatten(flat[mutated:], spec)))
        else:
            raise NotLiftedError(f"{node.name} ({node.op} {node.target})")
    return root, graph


def has_open_batch(program: ExportedProgram) -> bool:
    """Whether an exported program takes any number of samples."""
    names = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    return all(not isinstance(v.shape[0], int) for v in values if isinstance(v, Tensor) and v.ndim)


def _input(program: ExportedProgram, root: nn.Module, graph: fx.Graph, node: fx.Node, spec: Any) -> Any:
    if spec is None or spec.kind is InputKind.USER_INPUT:
        constant = getattr(getattr(spec, "arg", None), "value", None)
        value = node.meta.get("val")
        return graph.placeholder(node.name) if isinstance(value, Tensor) else constant
    if not node.users:
        return None
    if spec.kind is InputKind.CONSTANT_TENSOR:
        name = spec.target.replace(".", "_")
        while hasattr(root, name):
            name += "_"
        root.register_buffer(name, program.constants[spec.target].detach().clone())
        return graph.get_attr(name)
    if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
        raise NotLiftedError(f"{node.name} (an input of kind {spec.kind.name})")
    return graph.get_attr(spec.target)


def _modules(program: ExportedProgram, script: Mapping[str, str]) -> nn.Module:
    """Modules that hold the tensors; normalisations are what they were, which says how they are trained."""
    root = nn.Module()
    tensors = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    for name, tensor in tensors.items():
        owner = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner._modules[part] = nn.Module()
            owner = cast(nn.Module, owner._modules[part])
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
    kinds = dict(script)
    for node in program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack:
            kinds[stack[-1][0]] = str(stack[-1][1])
    for path, module in root.named_modules():
        if path and (kind := _NORMS.get(kinds.get(path, ""))):
            _retype(module, kind)
    return root


_NORMS: dict[str, type[nn.Module]] = {
    f"torch.nn.modules.batchnorm.{kind.__name__}": kind
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}


def _retype(module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module) is nn.Module and "running_mean" in module._buffers:
        size = cast(Tensor, module._buffers["running_mean"]).numel()
        fresh = kind(size, affine="weight" in module._parameters)
        tensors = (module._parameters, module._buffers)
        module.__class__ = kind
        module.__dict__.update(vars(fresh))
        module._parameters, module._buffers = tensors
        module._buffers.setdefault("num_batches_tracked", torch.tensor(0))


# ---------------------------------------------------------------------- operators


def _call(graph: fx.Graph, node: fx.Node, new: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: new[n])
    target = node.target
    if not isinstance(target, OpOverload):
        if getattr(target, "__module__", "") in ("_operator", "math", "builtins"):
            return _add(graph, node, "call_function", target, args, kwargs)
        if "sym_" in getattr(target, "__name__", ""):  # torch.sym_max and its like, on sizes
            return _add(graph, node, "call_function", target, args, kwargs)
        raise NotLiftedError(f"{node.name} ({target})")
    if target.namespace != "aten":
        return _add(graph, node, "call_function", _of_library(node, target), args, kwargs)
    name = target._schema.name.removeprefix("aten::")
    if name.startswith(("_assert", "sym_constrain")):
        return None
    if name in _SAME:
        return args[0]
    given = _by_name(target, args, kwargs)
    for ignored in ("layout", "pin_memory", "memory_format", "non_blocking", "copy"):
        given.pop(ignored, None)
    if isinstance(given.get("device"), torch.device) and target._schema.arguments[0].name == "self":
        given.pop("device")  # of the example: the tensor's own is meant
    return _write(graph, node, target, name, given)


def _write(graph: fx.Graph, node: fx.Node, target: OpOverload, name: str, given: dict[str, Any]) -> fx.Node:
    row = _ROWS.get(name)
    if row is not None:
        return _add(graph, node, *row(given))
    if name in _METHODS or name.endswith("_") and hasattr(Tensor, name):
        return _add(graph, node, "call_method", name, *_placed(target, given))
    function = getattr(torch, name, None) or getattr(F, name, None)
    if function is None and hasattr(Tensor, name) and next(iter(given), "") == "self":
        return _add(graph, node, "call_method", name, *_placed(target, given))
    if function is None or name.startswith("_") or not callable(function):
        raise NotLiftedError(f"{node.name} (aten::{name})")
    return _add(graph, node, "call_function", function, *_placed(target, given))


def _placed(target: OpOverload, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position where the schema has them there, the rest by name."""
    first = [a.name for a in target._schema.arguments if not a.kwarg_only and a.name in given]
    return tuple(given[n] for n in first), {k: v for k, v in given.items() if k not in first}


def _add(
    graph: fx.Graph, node: fx.Node, op: str, target: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> fx.Node:
    return graph.create_node(op, target, tuple(args), kwargs, name=node.name)


def _by_name(target: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by their names, in the order of the schema.

    Those behind the last that is not what it is by default are left out, and none before it: it stands where
    it stands.
    """
    schema = target._schema.arguments
    given = {**dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
    placed = [a for a in schema if not a.kwarg_only]
    while placed and placed[-1].has_default_value() and _is_default(placed[-1], given):
        placed.pop()
    named = [a for a in schema if a.kwarg_only and not _is_default(a, given)]
    return {a.name: given.get(a.name, a.default_value) for a in (*placed, *named)}


def _is_default(argument: Any, given: dict[str, Any]) -> bool:
    return argument.name not in given or _equal(given[argument.name], argument.default_value)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b)


def _of_library(node: fx.Node, target: OpOverload) -> Callable[..., Any]:
    import torchvision

    name = target._schema.name.partition("::")[2]
    function = getattr(torchvision.ops, name, None) if target.namespace == "torchvision" else None
    if function is None or name == "deform_conv2d":  # whose arguments are other ones
        raise NotLiftedError(f"{node.name} ({target._schema.name})")
    return cast(Callable[..., Any], function)


_SAME = set("lift_fresh_copy lift_fresh detach detach_ alias dropout dropout_ feature_dropout".split())
"""The identity, in eval mode."""
_METHODS = {"view", "expand", "contiguous", "repeat", "view_as", "expand_as", "reshape_as", "type_as", "to"}

Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
"""What a node of fx is made of: op, target, args, kwargs."""
Row = Callable[[dict[str, Any]], Call]
"""From an operator's arguments, by their names in the schema, how it is called in plain torch."""


def _function(target: Any, *names: str) -> Row:
    """A function of torch, whose arguments have these names in the schema, in its own order."""

    def row(given: dict[str, Any]) -> Call:
        values = [given.get(n) for n in names]
        while values and values[-1] is None:
            values.pop()
        return "call_function", target, tuple(values), {}

    return row


def _batch_norm(given: dict[str, Any]) -> Call:
    order = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    return "call_function", F.batch_norm, (given["input"], *(given.get(n) for n in order)), {}


def _slice(given: dict[str, Any]) -> Call:
    end = None if given.get("end", _END) == _END else given["end"]
    start = given.get("start") or None
    step = given.get("step", 1)
    item = slice(start, end, None if step == 1 else step)
    return "call_function", operator.getitem, (given["self"], _at(given.get("dim", 0), item)), {}


def _select(given: dict[str, Any]) -> Call:
    if given["dim"] < 0:
        return "call_function", torch.select, (given["self"], given["dim"], given["index"]), {}
    return "call_function", operator.getitem, (given["self"], _at(given["dim"], given["index"])), {}


def _at(dim: int, item: Any) -> Any:
    if dim < 0:
        return (Ellipsis, item, *([slice(None)] * (-dim - 1)))
    return (*([slice(None)] * dim), item)


def _index(given: dict[str, Any]) -> Call:
    items = tuple(slice(None) if i is None else i for i in given["indices"])
    return "call_function", operator.getitem, (given["self"], items), {}


def _resize(mode: str) -> Row:
    def row(given: dict[str, Any]) -> Call:
        size, scale = given.get("output_size"), given.get("scale_factors")
        kwargs: dict[str, Any] = {"size": None if size is None else tuple(size), "mode": mode}
        if scale is not None and size is None:
            kwargs["scale_factor"] = tuple(scale)
        if given.get("align_corners"):
            kwargs["align_corners"] = True
        return "call_function", F.interpolate, (given["input"],), kwargs

    return row


def _convolution(given: dict[str, Any]) -> Call:
    """Of any dimensions, transposed or not, as TorchScript's traces have it."""
    kind = f"conv{'_transpose' * bool(given['transposed'])}{len(given['stride'])}d"
    return _ROWS[kind](given)


def _embedding(given: dict[str, Any]) -> Call:
    return "call_function", F.embedding, (given["indices"], given["weight"]), {}


def _attention(given: dict[str, Any]) -> Call:
    names = ("query", "key", "value")
    kwargs = {k: v for k, v in given.items() if k not in (*names, "dropout_p")}
    return "call_function", F.scaled_dot_product_attention, tuple(given[n] for n in names), kwargs


def _made(target: Any) -> Row:
    """torch.zeros and its like: where it is made follows the program."""

    def row(given: dict[str, Any]) -> Call:
        rest = {k: v for k, v in given.items() if k not in ("size", "fill_value")}
        first = [given[k] for k in ("size", "fill_value") if k in given]
        return "call_function", target, tuple(first), rest

    return row


_ROWS: dict[str, Row] = {
    **{
        f"conv{d}d": _function(f, "input", "weight", "bias", "stride", "padding", "dilation", "groups")
        for d, f in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d))
    },
    **{
        f"conv_transpose{d}d": _function(
            f, "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"
        )
        for d, f in ((1, F.conv_transpose1d), (2, F.conv_transpose2d), (3, F.conv_transpose3d))
    },
    "convolution": _convolution,
    "_convolution": _convolution,
    "_weight_norm": _function(torch._weight_norm, "v", "g", "dim"),
    "linalg_vector_norm": _function(torch.linalg.vector_norm, "self", "ord", "dim", "keepdim"),
    "linear": _function(F.linear, "input", "weight", "bias"),
    "batch_norm": _batch_norm,
    "layer_norm": _function(F.layer_norm, "input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": _function(F.group_norm, "input", "num_groups", "weight", "bias", "eps"),
    "slice": _slice,
    "select": _select,
    "index": _index,
    "sym_size": lambda g: ("call_method", "size", (g["self"], g["dim"]), {}),
    "_to_copy": lambda g: ("call_method", "to", (g["self"], g["dtype"]), {}),
    "pad": _function(F.pad, "self", "pad", "mode", "value"),
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    **{f"upsample_nearest{d}d": _resize("nearest") for d in (1, 2, 3)},
    "upsample_linear1d": _resize("linear"),
    "upsample_bilinear2d": _resize("bilinear"),
    "upsample_bicubic2d": _resize("bicubic"),
    "upsample_trilinear3d": _resize("trilinear"),
    **{name: _made(getattr(torch, name)) for name in ("zeros", "ones", "empty", "full", "rand", "randn")},
    "gelu": lambda g: ("call_function", F.gelu, (g["self"],), {k: v for k, v in g.items() if k != "self"}),
    **{
        name: _function(getattr(F, name), "self")
        for name in ("relu", "silu", "hardswish", "hardsigmoid", "mish", "relu6")
    },
    "relu_": lambda g: ("call_function", F.relu, (g["self"],), {"inplace": True}),
    "silu_": lambda g: ("call_function", F.silu, (g["self"],), {"inplace": True}),
    "hardswish_": lambda g: ("call_function", F.hardswish, (g["self"],), {"inplace": True}),
    "hardsigmoid_": lambda g: ("call_function", F.hardsigmoid, (g["self"],), {"inplace": True}),
    "mish_": lambda g: ("call_function", F.mish, (g["self"],), {"inplace": True}),
    "hardtanh": lambda g: ("call_function", F.hardtanh, tuple(g.values()), {}),
    "hardtanh_": lambda g: ("call_function", F.hardtanh, tuple(g.values()), {"inplace": True}),
    "leaky_relu": lambda g: ("call_function", F.leaky_relu, tuple(g.values()), {}),
    "leaky_relu_": lambda g: ("call_function", F.leaky_relu, tuple(g.values()), {"inplace": True}),
    "softmax": lambda g: ("call_function", F.softmax, (g["self"], g["dim"]), {}),
    "log_softmax": lambda g: ("call_function", F.log_softmax, (g["self"], g["dim"]), {}),
}
"""ATen operator -> how it is called in plain torch, where that is not by the same name and arguments."""
