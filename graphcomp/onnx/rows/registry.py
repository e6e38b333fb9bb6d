"""Which ONNX operator is which function of torch: the two tables that the rows of this folder fill."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from graphcomp.onnx.rows.node import Node
    from graphcomp.onnx.rows.reading import Reading
    from graphcomp.onnx.rows.values import Value

Read = Callable[["Node", "Reading"], "Value | tuple[Value, ...]"]
"""A read row: from a node of a file its outputs, which it adds to the program that is being read."""

Write = Callable[..., Any]
"""A write row: called with a `Writing` and the arguments of the call, named as torch's signature has them (of
a module its settings and tensors), it adds nodes to the file. It returns what the call yields: the name of a
value or a tuple of names, or a wire or tensor that it was given, where nothing is to do.

Raises `NoRow` for calls that it has no form for."""

READS: dict[str, Read] = {}
"""ONNX operator -> its read row."""

WRITES: dict[str, Write] = {}
"""Name of an operator, as `graphcomp.ir.op_name` has it -> its write row."""

_Row = TypeVar("_Row", bound=Callable[..., Any])


def reads(*operators: str) -> Callable[[_Row], _Row]:
    """Register a read row for these operators of the default ONNX domain."""
    return _register(READS, operators)


def writes(*names: str) -> Callable[[_Row], _Row]:
    """Register a write row for these operators, by the name that `graphcomp.ir.op_name` has for them."""
    return _register(WRITES, names)


def _register(table: dict[str, Any], keys: tuple[str, ...]) -> Callable[[_Row], _Row]:
    def add(row: _Row) -> _Row:
        taken = [key for key in keys if key in table]
        if taken:
            raise ValueError(f"{row.__module__}: found a second row for {', '.join(taken)}, expected one")
        table.update(dict.fromkeys(keys, row))
        return row

    return add
