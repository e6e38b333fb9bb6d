"""A loaded program is run once before anybody gets it, on tensors without numbers, within bounds.

So what is too large, endless or no network at all is refused in a moment, whatever its arguments say. Every
kernel that the run asks for is counted, those inside of layers too, and every value is checked to be data: a
tensor, a number, text, a constant of torch, or a container of those.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._python_dispatch import TorchDispatchMode

from graphcomp.errors import LoadError, TraceError, first_line
from graphcomp.ir.meta import run_on_meta
from graphcomp.ir.program import Program

ELEMENTS = 1 << 30
"""How many elements all results together may have in any program."""

_PER_INPUT = 1 << 10  # more for large images,
_PER_WEIGHT = 1 << 4  # and for large networks
KERNELS, KERNELS_PER_NODE = 100_000, 1_000
"""How many kernels a program may call in all, and how many more in long graphs."""

_ITEMS = 1 << 16  # of a container, with what is inside of it; pieces of a split
_NUMBER_BITS = 64
_GROWING = frozenset("pow ipow lshift ilshift __pow__ __rpow__ __lshift__ __rlshift__".split())
_REPEATING = frozenset("mul imul __mul__ __rmul__ __imul__".split())
_WRITING = frozenset("setitem __setitem__ iconcat".split())
_COUNTING = frozenset("chunk unsafe_chunk tensor_split hsplit vsplit dsplit diff".split())
_READING_TEXT = frozenset("getitem eq ne contains is_ is_not _assert getattr".split())
_SCALARS = (int, float, complex, str, torch.dtype, torch.layout, torch.memory_format, torch.device, slice)


class _OutOfBoundsError(Exception):
    """Of the run; its message is `found X, expected Y`."""


def check_runs(program: Program) -> None:
    """Run `program` on the meta device within bounds; its `values` are known afterwards.

    Args:
        program: with its example inputs, whose sizes and those of the weights the bounds grow with.

    Raises:
        LoadError: naming the node that does not run, or that asks for too much.
    """
    weights = sum(t.numel() for t in {id(t): t for t in program.tensors.values()}.values())
    inputs = sum(x.numel() for x in program.example_inputs)
    limit = ELEMENTS + _PER_INPUT * inputs + _PER_WEIGHT * weights
    reached: list[fx.Node] = []

    def before(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        reached.append(node)
        _check_operands(node, args, kwargs)

    try:
        with _Counting(limit, KERNELS + KERNELS_PER_NODE * len(program.graph.nodes)):
            values = run_on_meta(program, before=before, after=_check_value)
    except TraceError as error:
        node, why = reached[-1], first_line(error.__cause__ or error)
        raise LoadError(
            f"nodes.{node.name} ({_name(node)}): {why}; expected a program that runs on its example inputs; "
            "save the program again"
        ) from error
    vars(program)["values"] = values  # of the cached property


# ---- kernels ---------------------------------------------------------------------------------------------


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts kernels and the elements of their results."""

    def __init__(self, elements: int, kernels: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.elements, self.kernels = elements, elements, kernels

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.kernels -= 1
        if self.kernels < 0:
            raise _OutOfBoundsError("found no end of kernels, expected those of a network")
        _check_pieces(func, args)
        operands = _tensors((*args, *kwargs.values()))
        if not all(t.is_meta for t in operands) or not operands:
            self._rehearse(func, args, kwargs)
        result = func(*args, **kwargs)
        self._take(result)
        return result

    def _rehearse(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn the sizes of a result with numbers before there is one."""
        placed = dict(kwargs)
        if any(a.name == "device" for a in func._schema.arguments):
            placed["device"] = torch.device("meta")
        before = self.elements
        self._take(func(*_on_meta(args), **_on_meta(placed)))
        self.elements = before

    def _take(self, result: Any) -> None:
        self.elements -= sum(t.numel() for t in _tensors(result))
        if self.elements < 0:
            raise _OutOfBoundsError(
                f"found results of more than {self.limit} elements, expected less of these weights and inputs"
            )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple | list) else []


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, dict):
        return {k: _on_meta(v) for k, v in value.items()}
    return type(value)(map(_on_meta, value)) if type(value) in (tuple, list) else value


def _check_pieces(func: Any, args: Sequence[Any]) -> None:
    """Views cost no elements, but each is an object."""
    name = func._schema.name.removeprefix("aten::").removeprefix("unsafe_")
    pieces = 0
    if name in ("unbind", "split") and isinstance(args[0], Tensor) and args[0].dim():
        axis = args[-1] if len(args) > (1 if name == "unbind" else 2) else 0
        size = args[0].shape[axis]
        each = args[1] if name == "split" else 1
        pieces = math.ceil(size / each) if isinstance(each, int) and each > 0 else 0
    if pieces > _ITEMS:
        raise _OutOfBoundsError(f"found {pieces} pieces, expected at most {_ITEMS}")


# ---- values ----------------------------------------------------------------------------------------------


def _check_operands(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check what a node computes with, before it does: Python's numbers and lists have no bounds."""
    if node.op not in ("call_function", "call_method"):
        return
    name = _name(node)
    operands = (*args, *kwargs.values())
    tensors = [isinstance(a, Tensor) for a in operands]
    if node.op == "call_method" and not isinstance(args[0], Tensor | torch.Size):
        raise _OutOfBoundsError(f"found a method of a {type(args[0]).__name__}, expected one of a tensor")
    if name in _WRITING and not tensors[0]:
        raise _OutOfBoundsError(f"found a write into a {type(args[0]).__name__}, expected one into a tensor")
    if name in _COUNTING:
        _check_counts(operands)
    if any(tensors):
        return
    python = node.op == "call_method" or getattr(node.target, "__module__", "") in (
        "_operator",
        "builtins",
        "math",
    )
    if python and name not in _READING_TEXT and any(isinstance(a, str) for a in operands):
        raise _OutOfBoundsError("found arithmetic on text, expected numbers")
    if name in _GROWING and all(isinstance(a, int) for a in operands[:2]):
        _check_growth(name, operands[0], operands[1])
    if name in _REPEATING:
        _check_repeats(operands)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


def _check_counts(operands: Sequence[Any]) -> None:
    for operand in operands:
        if isinstance(operand, int) and abs(operand) > _ITEMS:
            raise _OutOfBoundsError(f"found {operand} pieces, expected at most {_ITEMS}")


def _check_growth(name: str, base: int, exponent: int) -> None:
    base, exponent = (exponent, base) if name.startswith("__r") else (base, exponent)
    bits = base.bit_length() + exponent if "shift" in name else base.bit_length() * exponent
    if bits > 4 * _NUMBER_BITS:
        raise _OutOfBoundsError(f"found a number of {bits} bits, expected at most {_NUMBER_BITS}")


def _check_repeats(operands: Sequence[Any]) -> None:
    lengths = [len(a) for a in operands if isinstance(a, tuple | list)]
    counts = [a for a in operands if isinstance(a, int)]
    if lengths and counts and lengths[0] * counts[0] > _ITEMS:
        raise _OutOfBoundsError(f"found a list of {lengths[0] * counts[0]} items, expected at most {_ITEMS}")


def _check_value(node: fx.Node, value: Any) -> None:
    """Check what a node yields: data, and not more than a network needs."""
    _count_items(value, 0)


def _count_items(value: Any, count: int) -> int:
    """`count` and the items of `value`, with those inside of them."""
    count += 1
    if count > _ITEMS:
        raise _OutOfBoundsError(f"found a value of more than {_ITEMS} items, expected less")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise _OutOfBoundsError(f"found a tensor of layout {value.layout}, expected a dense one")
    elif type(value) in (dict, immutable_dict):
        for item in value.values():
            count = _count_items(item, count)
    elif (
        type(value) in (tuple, list, immutable_list, torch.Size)
        or type(value).__module__ == "torch.return_types"
    ):
        for item in value:
            count = _count_items(item, count)
    elif isinstance(value, int) and value.bit_length() > 2 * _NUMBER_BITS:
        raise _OutOfBoundsError(
            f"found a number of {value.bit_length()} bits, expected at most {_NUMBER_BITS}"
        )
    elif not (value is None or value is ... or isinstance(value, _SCALARS)):
        raise _OutOfBoundsError(f"found a {type(value).__name__}, expected data")
    return count
