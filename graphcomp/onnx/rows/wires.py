"""What write rows read: numbers that are known, tensors that the file computes, sizes that are open.

A program is written for several *settings*: sizes that its inputs may have, which differ wherever an axis is
left open. What a node yields is, to a row,

    a Tensor         numbers that are the same whatever the inputs hold: they are stored, never computed
    a Wire           a tensor that the file computes
    a Size           a number that is not the same in all settings: the batch, or what follows from it
    anything else    itself: numbers, types, slices, None; tuples, lists and dicts of all of these

so a row argues about numbers only, and shape arithmetic is written where a number is open and nowhere else.
"""

from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from onnx import TensorProto
from torch import Tensor

from graphcomp.ir import Shape

DTYPES = {
    torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16, torch.bool: TensorProto.BOOL, torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8, torch.int16: TensorProto.INT16, torch.uint16: TensorProto.UINT16,
    torch.int32: TensorProto.INT32, torch.int64: TensorProto.INT64,
}  # fmt: skip
"""Types of torch -> the same of ONNX."""

LARGEST = 2**63 - 1
"""The end of a slice that has none."""


class NoRow(Exception):  # noqa: N818 - a signal inside this room, not an error
    """A call that no row writes; the message says which and why."""


@dataclass(frozen=True, eq=False)
class Wire:
    """A tensor that the file computes.

    Attributes:
        name: of the value in the file.
        metas: it, without numbers, in every setting.
    """

    name: str
    metas: tuple[Tensor, ...] = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""
        return self.metas[0].dtype

    @property
    def rank(self) -> int:
        """The number of its axes."""
        return self.metas[0].ndim

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """In every setting."""
        return tuple(tuple(m.shape) for m in self.metas)

    @property
    def shape(self) -> tuple["int | Size", ...]:
        """Sizes as rows see them: numbers, and open ones."""
        return tuple(
            sizes[0] if len(set(sizes)) == 1 else Size(sizes, "dim", (self, axis))
            for axis, sizes in enumerate(zip(*self.shapes, strict=True))
        )

    def axis(self, dim: int) -> int:
        """A dimension counted from the front."""
        return dim % self.rank if self.rank else 0


@dataclass(frozen=True, eq=False)
class Size:
    """A number that differs between settings, and how it comes about.

    Attributes:
        values: in every setting.
        operator: "dim" (of args: a wire, an axis), the name of an operator, or "" if nobody knows.
        args: numbers and sizes that the operator takes.
    """

    values: tuple[Any, ...]
    operator: str = ""
    args: tuple[Any, ...] = ()


@dataclass(eq=False)
class Op:
    """A node of the file in the making; `source` is the name of the program's node that it is written for."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    source: str


def is_open(value: Any) -> TypeGuard[Size]:
    """Whether a number differs between settings."""
    return isinstance(value, Size)


def fixed(value: Any, what: str) -> int:
    """A size that is the same in all settings; NoRow, naming `what` it is of, if it is open."""
    if is_open(value):
        raise NoRow(f"{what} of an open size")
    return int(value)


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in the same memory."""
    return (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.data_ptr())


def values_of(value: Any) -> tuple[Any, ...]:
    """A number in every setting, or the one that it is in all."""
    return value.values if is_open(value) else (value,)


def constant(value: Any) -> TypeGuard[Tensor]:
    """Whether numbers are known."""
    return isinstance(value, Tensor)


def pairs(value: Any, rank: int) -> tuple[int, ...]:
    """A setting of a window, one number or one an axis, as one an axis."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,) * rank
    if len(numbers) == 1:
        numbers = numbers * rank
    if len(numbers) != rank or not all(isinstance(n, int) for n in numbers):
        raise NoRow(f"a setting of {value} for {rank} axes")
    return numbers


def example(value: Any) -> Any:
    """What stands for a value where only its type counts."""
    return value.metas[0] if isinstance(value, Wire) else value.values[0] if is_open(value) else value
