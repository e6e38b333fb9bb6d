"""A program in words: one node a line."""

from typing import TYPE_CHECKING, Any, cast

from torch import fx, nn

from graphcomp.ir.coefficients import DctConv2d, DctLayer, DctLinear
from graphcomp.ir.operators import MODULE_NAMES, function_name, spelling

if TYPE_CHECKING:
    pass
from graphcomp.ir.program import Program


def format_node(program: Program, node: fx.Node) -> str:
    """One line of the printed program: `%name: 1x64x56x56 = conv 64->64 k3 s1 (%input)`."""
    shape = program.shape(node)
    shown = "x".join(map(str, shape)) if shape is not None else type(program.values[node]).__name__
    return f"%{node.name}: {shown} = {describe(program, node)}"


def describe(program: Program, node: fx.Node) -> str:
    """What a node computes, for people: `conv 64->64 k3 s1 (%maxpool)`."""
    if node.op in ("placeholder", "get_attr"):
        return f"{'input' if node.op == 'placeholder' else 'tensor'} {node.target}"
    args = ", ".join(_format_arg(a) for a in node.args)
    if node.op == "call_module":
        return f"{describe_module(program.layer(cast(str, node.target)))} ({args})"
    if node.op == "output":
        return f"output ({args})"
    extra = "".join(f", {k}={_format_arg(v)}" for k, v in node.kwargs.items())
    return f"{spelling(node.target)} ({args}{extra})"


def op_name(program: Program, node: fx.Node) -> str:
    """The name of the operator that a node calls (`ir.operators`); of other nodes what they are.

    It follows from the function, the method or the module's class, never from an attribute's name.
    """
    if node.op == "call_module":
        kind = type(program.layer(cast(str, node.target)))
        return MODULE_NAMES.get(kind, kind.__name__)
    return function_name(node.target) if node.op in ("call_function", "call_method") else node.op


def _format_arg(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, tuple | list):
        return "[" + ", ".join(map(_format_arg, arg)) + "]"
    if isinstance(arg, slice):
        return ":".join("" if a is None else _format_arg(a) for a in (arg.start, arg.stop, arg.step))
    if isinstance(arg, dict):
        return "{" + ", ".join(f"{k}: {_format_arg(v)}" for k, v in arg.items()) + "}"
    return str(arg)


def describe_module(module: nn.Module) -> str:
    """A module in a few words: `conv 64->64 k3 s1 g1`, `linear 512->10`, `batchnorm2d 64`, `relu`."""
    kind = type(module).__name__.lower()
    if isinstance(module, nn.modules.conv._ConvNd | DctConv2d):
        words = [
            kind.removesuffix("1d").removesuffix("2d").removesuffix("3d"),
            f"{module.in_channels}->{module.out_channels}",
            "k" + _square(module.kernel_size),
            "s" + _square(module.stride),
        ]
        return " ".join(words + ([f"g{module.groups}"] if module.groups > 1 else []) + _stored(module))
    if isinstance(module, nn.Linear | DctLinear):
        return " ".join([f"{kind} {module.in_features}->{module.out_features}", *_stored(module)])
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return f"{kind} {module.num_features}"
    return kind


def _stored(module: nn.Module) -> list[str]:
    """How many coefficients of each row a computed weight has: `4x512 of 4x1024`."""
    if not isinstance(module, DctLayer):
        return []
    return [f"{module.rows}x{module.terms} of {module.rows}x{module.columns}"]


def _square(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))
