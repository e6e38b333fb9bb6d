"""The file that a program becomes, while it is written: what write rows add their nodes to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcomp.ir import Shape
from graphcomp.onnx.rows.wires import DTYPES, NoRow, Op, Size, Wire, constant, identity, is_open, values_of

_FEW = 16
"""Elements up to which equal tensors are stored once."""


class Writing:
    """Nodes and stored numbers, as they are added.

    Attributes:
        ops: in order.
        stored: name -> numbers.
        results: of the call that is being written: what it yields, without numbers, in every setting.
        operator, target: of that call: its name, and the function, method or module.
        again: that call with another first operand.
        extra: further inputs of the file: name -> shape and type.
    """

    def __init__(self, names: Mapping[Any, str], reserved: Sequence[str] = ()) -> None:
        """`names` are those of the program's tensors, by `identity`; `reserved` ones are given to nothing."""
        self.ops: list[Op] = []
        self.stored: dict[str, Tensor] = {}
        self.results: tuple[Any, ...] = ()
        self.again: Callable[[Tensor], Any] = lambda x: x
        self.extra: dict[str, tuple[Shape, torch.dtype]] = {}
        self.makers: dict[str, Op] = {}
        self._names = names
        self._taken = set(reserved)
        self._by_content: dict[Any, str] = {}
        self._kept: list[Tensor] = []
        self.operator = ""
        self.target: Any = None
        self._source = self._base = ""
        self._turned: dict[Any, str] = {}
        self._started = 0

    # ---------------------------------------------------------------------- what a row adds

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node with one output; the name of the output.

        Args:
            inputs: wires, names of values, tensors (stored), None for what is left out.
            attributes: those that are None are left out, too.
        """
        return self.several(kind, 1, *inputs, **attributes)[0]

    def several(self, kind: str, outputs: int, *inputs: Any, **attributes: Any) -> tuple[str, ...]:
        """Add a node with several outputs; their names."""
        stem = self.free(f"{self._base}/{kind.lower()}")
        names = [stem, *(self.free(f"{stem}_{i}") for i in range(1, outputs))]
        given = [self.name(value) for value in inputs]
        while given and not given[-1]:
            given.pop()
        said = {k: v for k, v in attributes.items() if v is not None}
        for name, value in said.items():
            if any(is_open(part) for part in (value if isinstance(value, tuple | list) else (value,))):
                raise NoRow(f"{name} of {kind}, which is fixed in a file, from an open size")
        op = Op(kind, stem, given, names, said, self._source)
        self.ops.append(op)
        self.makers.update(dict.fromkeys(names, op))
        return tuple(names)

    def name(self, value: Any) -> str:
        """The name of a value in the file; tensors and numbers become stored ones, None is ""."""
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if isinstance(value, Wire):
            return value.name
        if isinstance(value, Tensor):
            return self.store(value)
        raise NoRow(f"{type(value).__name__} where a tensor was expected")

    def store(self, tensor: Tensor, stem: str = "") -> str:
        """The name of stored numbers: that of the program's tensor, or one of many that are equal and small.

        Large tensors are one only where they are one tensor of the program: what two layers happen to have
        equal may differ tomorrow.
        """
        tensor = tensor.detach()
        key: Any = identity(tensor)
        own = self._names.get(key, "")
        if tensor.numel() <= _FEW and not own:
            key = (tensor.dtype, tuple(tensor.shape), *tensor.flatten().tolist())
        key = (key, stem)
        if key not in self._by_content:
            name = self.free(own or f"{self._base}{f'.{stem}' if stem else '/constant'}")
            self.stored[name] = tensor
            self._by_content[key] = name
            self._kept.append(tensor)  # so that no other gets its address
        return self._by_content[key]

    def ints(self, *numbers: int) -> str:
        """A stored vector of int64."""
        return self.store(torch.tensor(numbers, dtype=torch.int64), "")

    def number(self, value: Any, dtype: torch.dtype) -> str:
        """A number, stored or computed, as a scalar of a type."""
        if is_open(value):
            scalar = self.op("Squeeze", self.size(value), self.ints(0))
            whole = all(isinstance(v, int) for v in value.values)
            return scalar if dtype is (torch.int64 if whole else torch.float32) else self.cast(scalar, dtype)
        return self.store(torch.tensor(value, dtype=dtype))

    def typed(self, value: Any, dtype: torch.dtype) -> str:
        """A tensor or number in a type; the name of the value."""
        if isinstance(value, Wire):
            return value.name if value.dtype is dtype else self.cast(value, dtype)
        if isinstance(value, Tensor):
            return self.name(value if value.dtype is dtype else value.to(dtype))
        return self.number(value, dtype)

    def turned(self, matrix: Any, stem: str = "weight") -> str:
        """A matrix on its side: stored so, under its own name (or the stem), if it is stored."""
        if not constant(matrix):
            return self.op("Transpose", matrix, perm=[1, 0])
        if matrix.t().is_contiguous():
            return self.store(matrix.t())
        key = identity(matrix.detach())
        if key not in self._turned:
            name = self.free(self._names.get(key, f"{self._base}.{stem}"))
            self._turned[key] = name
            self.stored[name] = matrix.detach().t()
            self._kept.append(matrix)
        return self._turned[key]

    def cast(self, value: Any, dtype: torch.dtype) -> str:
        """A value in another type."""
        if dtype not in DTYPES:
            raise NoRow(f"{dtype}")
        return self.op("Cast", value, to=int(DTYPES[dtype]))

    # ---------------------------------------------------------------------- open numbers

    def size(self, value: Any) -> str:
        """A number as a vector of one int64 (float32 for what is no whole number)."""
        if not is_open(value):
            dtype = torch.int64 if isinstance(value, int) else torch.float32
            return self.store(torch.tensor([value], dtype=dtype))
        if value.operator == "dim":
            wire, axis = value.args
            return self.op("Shape", wire, start=axis, end=axis + 1)
        kind = _ARITHMETIC.get(value.operator)
        if kind is None:
            raise NoRow(f"a size that is not known beforehand ({value.operator or value.values})")
        whole = all(isinstance(v, int) for v in value.values)
        parts = [self.size(a) for a in value.args]
        if not whole or value.operator == "div":
            floats = [
                part if _is_fraction(a) else self.cast(part, torch.float32)
                for part, a in zip(parts, value.args, strict=True)
            ]
            found = self.op(kind, *floats)
            if value.operator == "floordiv":
                found = self.op("Floor", found)
            return found
        if value.operator == "floordiv" and any(v < 0 for a in value.args for v in values_of(a)):
            raise NoRow("a division of negative sizes")
        return self.op(kind, *parts)

    def sizes(self, values: Sequence[Any]) -> str:
        """Several numbers as a vector of int64: stored, if none is open."""
        if not any(map(is_open, values)):
            return self.ints(*values)
        parts: list[str] = []
        closed: list[int] = []
        for value in [*values, None]:
            if value is not None and not is_open(value):
                closed.append(value)
                continue
            if closed:
                parts.append(self.ints(*closed))
                closed = []
            if value is not None:
                parts.append(self.size(value))
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def reshape(self, value: Any, shapes: Sequence[Shape], hints: Sequence[Any] = ()) -> str:
        """A value in another shape.

        Open sizes are copied where the value has the same at the same axis, one is left to the runtime, and
        others must be among the hints.

        Args:
            value: a wire or a tensor.
            shapes: the new one, in every setting.
            hints: numbers, of which some may be open, that sizes may be found in.
        """
        before = value.shapes if isinstance(value, Wire) else [tuple(value.shape)] * len(shapes)
        if all(a == b for a, b in zip(before, shapes, strict=True)):
            return self.name(value)
        old, target = list(zip(*before, strict=True)), list[Any]()
        for axis, sizes in enumerate(zip(*shapes, strict=True)):
            if len(set(sizes)) == 1:
                target.append(sizes[0])
            elif axis < len(old) and old[axis] == sizes:
                target.append(0)
            else:
                target.append(Size(sizes))
        if 0 in [s for shape in shapes for s in shape]:
            raise NoRow("a tensor without elements")
        rest = [axis for axis, size in enumerate(target) if is_open(size)]
        if rest:
            target[rest[-1]] = -1
        for axis in rest[:-1]:
            sizes = target[axis].values
            found = [h for h in hints if is_open(h) and h.values == sizes and h.operator]
            if not found and isinstance(value, Wire):
                found = [s for s in value.shape if is_open(s) and s.values == sizes]
            if not found:
                raise NoRow("a shape with several open sizes")
            target[axis] = found[0]
        return self.op("Reshape", value, self.sizes(target))

    # ---------------------------------------------------------------------- around a row

    def begin(
        self,
        base: str,
        source: str,
        operator: str,
        target: Any,
        results: tuple[Any, ...],
        again: Callable[[Tensor], Any],
    ) -> None:
        """The next nodes are written for the program's node `source` and called after `base`."""
        self._base, self._source, self.results, self.again = base, source, results, again
        self.operator, self.target = operator, target
        self._started = len(self.ops)

    def finish(self, name: str, wanted: str) -> str:
        """Call what the row made `wanted`, its node with it, if it made `name`; the name that it has now."""
        made = self.makers.get(name)
        new = self.ops[self._started :]
        if made is None or all(made is not op for op in new):
            return name
        wanted = self.free(wanted)
        self.rename(name, wanted)
        if made.outputs[0] == wanted:
            made.name = wanted
        return wanted

    def rename(self, old: str, new: str) -> None:
        """Call a value that a node makes otherwise."""
        self.makers[new] = self.makers.pop(old)
        for op in self.ops[self._started :]:
            op.inputs = [new if name == old else name for name in op.inputs]
            op.outputs = [new if name == old else name for name in op.outputs]

    def reserve(self, name: str) -> None:
        """Give a name to nothing else."""
        if name in self._taken:
            raise NoRow(f"the name {name}, which something else has")
        self._taken.add(name)

    def free(self, stem: str) -> str:
        """A name that nothing has yet."""
        name, count = stem, 0
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name

    # ---------------------------------------------------------------------- the call that is being written

    @property
    def result(self) -> Wire:
        """What the call yields, if that is one tensor."""
        if not isinstance(self.results[0], Tensor):
            raise NoRow(f"{type(self.results[0]).__name__} where one tensor was expected")
        return Wire("", self.results)

    @property
    def dtype(self) -> torch.dtype:
        """The type of what the call yields."""
        return self.result.dtype

    @property
    def parts(self) -> list[Wire]:
        """What the call yields, if that is several tensors."""
        return [Wire("", metas) for metas in zip(*self.results, strict=True)]


def _is_fraction(value: Any) -> bool:
    return any(isinstance(v, float) for v in values_of(value))


_ARITHMETIC = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "floordiv": "Div", "remainder": "Mod",
    "neg": "Neg", "pow": "Pow", "max": "Max", "min": "Min", "abs": "Abs", "sqrt": "Sqrt",
}  # fmt: skip
"""Operators on numbers that ONNX has as well; whole numbers here are sizes, which are not negative."""
