"""What the nodes of a program yield, without arithmetic: it is run on tensors without numbers."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.errors import TraceError
from graphcomp.ir.frozen import FrozenBatchNorm2d
from graphcomp.ir.operators import function_name
from graphcomp.ir.program import Program, with_tensors


def run_on_meta(
    program: Program,
    before: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], None] = lambda node, args, kwargs: None,
    after: Callable[[fx.Node, Any], None] = lambda node, value: None,
) -> dict[fx.Node, Any]:
    """Run the graph on the meta device at batch 1: shapes without arithmetic.

    Args:
        program: is not changed.
        before: is shown every node with what it is about to be called with; what it raises stops the run.
        after: is shown every node with its value.

    Raises:
        TraceError: naming the node that does not run.
    """

    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    modules = {t: with_tensors(m, meta).eval() for t, m in program.called_modules().items()}
    inputs = iter(program.example_inputs)
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        try:
            with torch.no_grad():
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                before(node, args, kwargs)
                values[node] = _run_node(node, args, kwargs, values, modules, inputs, program, meta)
                after(node, values[node])
        except Exception as error:
            shapes = [tuple(values[n].shape) for n in node.all_input_nodes if hasattr(values[n], "shape")]
            raise TraceError(
                f"{node.name} ({node.target}): {error} (input shapes {shapes}); expected shapes that follow "
                f"from the example inputs {[tuple(x.shape) for x in program.example_inputs]}; "
                "check --input-shape"
            ) from error
    return values


_SHAPE_KEEPING = """BatchNorm1d BatchNorm2d BatchNorm3d LayerNorm ReLU ReLU6 SiLU GELU ELU LeakyReLU Hardswish
    Hardsigmoid Sigmoid Tanh Softmax Dropout Identity"""


SAME_SHAPE = {FrozenBatchNorm2d, *(getattr(nn, name) for name in _SHAPE_KEEPING.split())}


SAME_SHAPE_FUNCTIONS = {
    F.relu,
    F.relu6,
    F.silu,
    F.gelu,
    F.hardswish,
    F.hardsigmoid,
    torch.relu,
    torch.sigmoid,
}


BROADCASTS = {operator.add, operator.mul, operator.sub, torch.add, torch.mul}


def _quick_module(module: nn.Module, x: Any) -> Any:
    """Shape of the commonest modules without the meta device, which is slow at them; None for others."""
    if type(module) in SAME_SHAPE:
        same = getattr(module, "inplace", False) or isinstance(module, nn.Dropout | nn.Identity)
        return x if same else _empty(x, x.shape)  # views matter: see `same_memory`
    if type(module) is nn.Linear and x.shape[-1] == module.weight.shape[1]:
        return _empty(x, (*x.shape[:-1], module.weight.shape[0]))
    if type(module) is nn.Conv2d and x.ndim == 4 and x.shape[1] == module.weight.shape[1] * module.groups:
        shape = None if isinstance(module.padding, str) else _convolved(module, module.padding, x.shape)
        return _empty(x, shape) if shape and min(shape) > 0 else None
    if type(module) is nn.AdaptiveAvgPool2d:
        size = module.output_size
        height, width = size if isinstance(size, tuple) else (size, size)
        if isinstance(height, int) and isinstance(width, int):
            return _empty(x, (*x.shape[:-2], height, width))
    return None


def _convolved(module: nn.Conv2d, padding: tuple[int, ...], shape: Sequence[int]) -> tuple[int, ...]:
    """Output shape of a convolution, as torch documents it."""
    axes = zip(shape[2:], padding, module.dilation, module.kernel_size, module.stride, strict=True)
    sizes = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes)
    return (shape[0], module.weight.shape[0], *sizes)


def _quick_function(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The same for activations, what is put together or turned, and arithmetic on two tensors of one type."""
    if function in SAME_SHAPE_FUNCTIONS and len(args) == 1:
        return args[0] if kwargs.get("inplace") else _empty(args[0], args[0].shape)
    if function is torch.roll:
        return _empty(args[0], args[0].shape)
    if function is torch.cat and args and isinstance(args[0], tuple | list):
        return _joined(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
    size = kwargs.get("size")
    if (
        function is F.interpolate
        and len(args) == 1
        and isinstance(size, tuple)
        and args[0].ndim == len(size) + 2
    ):
        return _empty(args[0], (*args[0].shape[:2], *size))
    if function not in BROADCASTS or len(args) != 2 or kwargs or not all(isinstance(a, Tensor) for a in args):
        return None
    a, b = args
    if a.dtype != b.dtype:
        return None
    shape = a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return _empty(a, shape)


def _joined(parts: Sequence[Tensor], axis: Any) -> Tensor | None:
    """Tensors of one type one behind another; None where their other axes differ, or they have none."""
    first = parts[0].shape if parts else ()
    if not isinstance(axis, int) or not -len(first) <= axis < len(first):
        return None
    axis %= len(first)
    if len({(p.dtype, p.shape[:axis], p.shape[axis + 1 :]) for p in parts}) > 1:
        return None
    return _empty(parts[0], (*first[:axis], sum(p.shape[axis] for p in parts), *first[axis + 1 :]))


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta")


_FILLED = {"full": 1, "full_like": 1, "new_full": 2}
"""Where the value is among the arguments with which these fill a tensor."""


def filled_with_zero(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call. The number of a tensor, by which others are filled, is 0: there is none here, and
    no shape depends on it.
    """
    at = _FILLED.get(function_name(node.target))
    if at is None:
        return args, kwargs
    new = tuple(_zero(x) if i == at else x for i, x in enumerate(args))
    return new, {k: _zero(x) if k == "fill_value" else x for k, x in kwargs.items()}


def _zero(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (
        0j
        if value.is_complex()
        else 0.0
        if value.is_floating_point()
        else value.dtype is not torch.bool and 0
    )


def _run_node(
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Mapping[fx.Node, Any],
    modules: Mapping[str, nn.Module],
    inputs: Iterator[Tensor],
    program: Program,
    meta: Callable[[Tensor], Tensor],
) -> Any:
    if node.op == "placeholder":
        missing = next(inputs, None)
        return meta(missing) if missing is not None else node.args[0]
    if node.op == "get_attr":
        return meta(program.tensors[cast(str, node.target)])
    if node.op == "call_module":
        module = modules[cast(str, node.target)]
        quick = _quick_module(module, args[0]) if len(args) == 1 else None
        return module(*args, **kwargs) if quick is None else quick
    if node.op in ("call_function", "call_method"):
        args, kwargs = filled_with_zero(node, args, kwargs)
    if node.op == "call_function":
        quick = _quick_function(node.target, args, kwargs)
        if quick is not None:
            return quick
        makes = not any(isinstance(values[n], Tensor) for n in node.all_input_nodes)  # torch.ones(…), for one
        with torch.device("meta") if makes else contextlib.nullcontext():
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
    return args[0]
