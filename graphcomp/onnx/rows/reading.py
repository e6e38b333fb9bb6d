"""The program that a file becomes, while it is read: what read rows add their nodes to."""

import operator
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphcomp.errors import GraphcompError, LoadError, first_line
from graphcomp.ir import PASS_KEY, with_tensors
from graphcomp.onnx.rows.naming import Names, pass_of
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.values import Array, Known, Made, Value, map_made

ORIGIN_KEY = "graphcomp_onnx"
"""`node.meta` key: the first output of the file's node that a node of the program was read from."""

VALUE_KEY = "graphcomp_onnx_value"
"""`node.meta` key: the value of the file that a node of the program yields."""


class Reading:
    """A graph that grows, with the modules that it calls.

    Every node is run on the meta device in all cases when it is added, so that its shapes are known to the
    rows of what reads it, and what does not run is refused where it stands.

    Attributes:
        root: holds the modules and tensors.
        graph: of the program.
        batches: the batch size of every case.
        freed: the one batch size that the file was written for, where it is read for others all the same;
            None where it leaves the batch open, or is read for one only.
        inputs: of the network.
        made: every node with its values.
        origin: the first output of the file's node that is being read, which its nodes are tagged with.
        made_by: the pass that this node says it was made by.
        remarks: what has to be said of how nodes were read.
    """

    def __init__(self, batches: Sequence[int], freed: int | None = None) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.batches = tuple(batches)
        self.freed = freed
        self.inputs: list[Made] = []
        self.made: dict[fx.Node, Made] = {}
        self.origin, self.made_by = "", "trace"
        self.remarks: list[str] = []
        self._names = Names()
        self._layers: dict[tuple[Any, ...], str] = {}
        self._meta: dict[str, nn.Module] = {}
        self._held: WeakKeyDictionary[Known, Made] = WeakKeyDictionary()

    def begin(self, node: Node) -> None:
        """The next nodes of the program are made for this one of the file."""
        self.origin, self.made_by = next(filter(None, node.outputs), ""), pass_of(node)

    # ---- nodes

    def placeholder(self, name: str, values: Sequence[Tensor]) -> Made:
        """An input of the network; its meta tensor in every case."""
        node = self.graph.placeholder(name)
        node.meta[PASS_KEY] = "trace"
        made = self.made[node] = Made(node, tuple(values))
        self.inputs.append(made)
        return made

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Made:
        """Call a function of torch on values and literals."""
        node = self.graph.call_function(function, *self._nodes(args, kwargs))
        return self._add(node, function, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> Made:
        """Call a method of the first argument."""
        node = self.graph.call_method(name, *self._nodes(args, kwargs))
        return self._add(node, lambda x, *rest, **more: getattr(x, name)(*rest, **more), args, kwargs)

    def layer(self, node: Node, module: nn.Module, *args: Any, key: tuple[Any, ...] | None = None) -> Made:
        """Call a module on values.

        Args:
            node: that the module comes from, and is named after.
            module: new, in eval mode from now on.
            args: its inputs.
            key: where two nodes have equal ones they are calls of one layer (see `layers.shared`).
        """
        path = None if key is None else self._layers.get(key)
        if path is None:
            path = self._names.place(self.root, node, module)
            self._meta[path] = with_tensors(module.eval(), _on_meta)
            if key is not None:
                self._layers[key] = path
        made = self.graph.call_module(path, *self._nodes(args, {}))
        return self._add(made, self._meta[path], args, {})

    def parts(self, value: Made) -> tuple[Made, ...]:
        """The items of a node that yields several tensors, each as a node of its own."""
        return tuple(self.call(operator.getitem, value, i) for i in range(len(value.values[0])))

    # ---- constants

    def tensor(self, value: Value, what: str = "constant") -> Made:
        """A value as a node: known numbers become a tensor that the program holds.

        Floating point initialisers become parameters; numbers that were computed, stand in a node, or have
        infinities among them (masks) are buffers: they are not weights that somebody trained. What is the
        same for every sample is held once and expanded to the batch. What is read again is held once, but for
        vectors: exporters merge equal ones, and one tensor would couple the channels of unrelated layers.
        """
        if isinstance(value, Made):
            return value
        if not value.is_constant:
            return self._expanded(value, what)
        if value in self._held:
            return self._held[value]
        held = as_tensor(value.array)
        is_numbers = held.is_floating_point() and held.ndim > 0 and not bool(held.isinf().any())
        trained = bool(value.name) and is_numbers
        made = self._hold(value.name or what, nn.Parameter(held) if trained else held)
        if sum(n > 1 for n in held.shape) > 1:
            self._held[value] = made
        return made

    def operand(self, value: Value, beside: Made) -> Any:
        """A value for arithmetic with `beside`: single numbers as literals or sizes, others as nodes."""
        if isinstance(value, Made) or {v.size for v in value.values} != {1} or value.array.ndim > beside.rank:
            return self.tensor(value)
        if not value.is_constant:
            numbers = [v.reshape(()).item() for v in value.values]
            whole = [int(n) for n in numbers if n == int(n)]
            return self.size(whole) if len(whole) == len(numbers) else self.tensor(value)
        array = value.array
        return array.reshape(()).astype(np.float32 if _is_float(array) else array.dtype).item()

    def _hold(self, name: str, tensor: Tensor) -> Made:
        node = self.graph.get_attr(self._names.place_tensor(self.root, name, tensor))
        node.meta[PASS_KEY] = "trace"
        return Made(node, (_on_meta(tensor),) * len(self.batches))

    def _expanded(self, value: Known, what: str) -> Made:
        shapes = value.shapes
        open_ = [d for d in range(len(shapes[0])) if len({s[d] for s in shapes}) > 1]
        thin = [
            v[tuple(slice(0, 1) if d in open_ else slice(None) for d in range(v.ndim))] for v in value.values
        ]
        same = all(_equal(v, thin[0]) for v in value.values)
        if not same and len(open_) == 1 and all(map(_counts, value.values)):
            one = self.tensor(Known((np.ones(1, thin[0].dtype),)), what)
            ones = self.method("expand", one, self.size([v.size for v in value.values]))
            count = self.call(operator.sub, self.call(torch.cumsum, ones, 0), 1)
            return self.method("reshape", count, *(-1 if d in open_ else 1 for d in range(len(shapes[0]))))
        if not open_ or not same:
            raise LoadError.at(
                what,
                "numbers that differ from sample to sample, or follow from the size of an input",
                "numbers that are known when the file is read",
                "give --input-shape, or export the network for one size",
            )
        sizes = [self.size([s[d] for s in shapes]) if d in open_ else -1 for d in range(len(shapes[0]))]
        return self.method("expand", self.tensor(Known((thin[0],)), what), *sizes)

    # ---- sizes

    def size(self, values: Sequence[int], near: Sequence[Made] = ()) -> Any:
        """A whole number that may depend on the sizes of inputs: a literal, or a node that computes it.

        Args:
            values: the number in every case.
            near: values whose sizes are looked at before those of the inputs.

        Raises:
            LoadError: if it is no size of these or of another node, nor a multiple, a fraction or a shifted
                one of these.
        """
        if len(set(values)) == 1:
            return int(values[0])
        sizes = {
            tuple(s[d] for s in made.shapes): (made, d)
            for made in reversed([*near, *self.inputs])
            for d in reversed(range(made.rank))
            if len({s[d] for s in made.shapes}) > 1
        }
        wanted = tuple(map(int, values))
        if wanted in sizes:
            return self._size_of(*sizes[wanted])
        place = self._computed(wanted)
        if place is not None:
            return self._size_of(*place)
        for known, place in sizes.items():
            pairs = list(zip(wanted, known, strict=True))
            if (factor := _common(pairs, lambda a, b: a // b if a % b == 0 else None)) is not None:
                return self.call(operator.mul, self._size_of(*place), factor)
            if (divisor := _common(pairs, lambda a, b: b // a if a and b % a == 0 else None)) is not None:
                return self.call(operator.floordiv, self._size_of(*place), divisor)
            if (shift := _common(pairs, operator.sub)) is not None:
                return self.call(operator.add, self._size_of(*place), shift)
        raise LoadError.at(
            "size",
            f"{wanted} for inputs of {[m.shapes for m in self.inputs]}",
            "a size of an input, or a multiple, a fraction or a shifted one",
            "give --input-shape, or export the network for one size",
        )

    def sizes(self, values: Sequence[Sequence[int]], near: Sequence[Made] = ()) -> list[Any]:
        """Several such numbers, given in every case."""
        return [self.size(column, near) for column in zip(*values, strict=True)]

    def _computed(self, wanted: tuple[int, ...]) -> tuple[Made, int] | None:
        """The first node and axis of these sizes: what a result is resized to is mostly one, of a skip."""
        for made in self.made.values():
            if isinstance(made.values[0], Tensor):
                for axis in range(made.rank):
                    if tuple(s[axis] for s in made.shapes) == wanted:
                        return made, axis
        return None

    def _size_of(self, made: Made, axis: int) -> Made:
        return self.method("size", made, axis)

    # ---- inside

    def _nodes(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def nodes(value: Any) -> Any:
            return map_made(value, lambda m: m.node)

        return nodes(args), {k: nodes(v) for k, v in kwargs.items()}

    def _add(
        self, node: fx.Node, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Made:
        node.meta |= {PASS_KEY: self.made_by, ORIGIN_KEY: self.origin}
        cases = range(len(self.batches))
        self.made[node] = Made(node, tuple(self._run(node, run, args, kwargs, case) for case in cases))
        return self.made[node]

    def _run(
        self, node: fx.Node, run: Callable[..., Any], args: Any, kwargs: dict[str, Any], case: int
    ) -> Any:
        def here(value: Any) -> Any:
            return map_made(value, lambda m: m.values[case])

        try:
            with torch.no_grad():
                return run(*here(args), **{k: here(v) for k, v in kwargs.items()})
        except GraphcompError:
            raise
        # Whatever the operators of torch raise; the reader adds the node of the file.
        except Exception as error:
            raise LoadError.at(
                node.name,
                f"{first_line(error)!r:.300} at batch {self.batches[case]}",
                "shapes that torch takes",
                "the file is not valid, or bakes in a size",
            ) from error


def _common(pairs: Sequence[tuple[int, int]], relation: Callable[[int, int], int | None]) -> int | None:
    """The number that all pairs have in this relation; None if there is none."""
    found = {relation(a, b) if b else None for a, b in pairs}
    return found.pop() if len(found) == 1 else None


def as_tensor(array: Array) -> Tensor:
    """Numbers of a file as a tensor of its own memory; every floating point type becomes float32."""
    if _is_float(array):
        array = array.astype(np.float32)
    try:
        return torch.from_numpy(np.array(array, order="C", copy=True))
    except TypeError as error:
        raise LoadError.at(
            "constant", f"numbers of type {array.dtype}", "one that torch has", "convert the file"
        ) from error


def _equal(numbers: Array, one: Array) -> bool:
    """Whether every sample has the numbers of `one`, but for the rounding of sums of more or fewer."""
    if numbers.dtype.kind == "f":
        return bool(np.allclose(numbers, one, rtol=0, atol=1e-5 * float(np.abs(one).max(initial=0))))
    return bool((numbers == one).all())


def _counts(numbers: Array) -> bool:
    """Whether it is 0, 1, 2, … along one axis."""
    return max(numbers.shape) == numbers.size and bool((numbers.reshape(-1) == np.arange(numbers.size)).all())


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
