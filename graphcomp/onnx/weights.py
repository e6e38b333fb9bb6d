"""DCT layers in ONNX: nodes that rebuild a weight from its stored coefficients when the file is loaded.

A runtime that folds constants (ONNX Runtime does, unless optimisation is off) computes every node whose
inputs are all stored, once, while it loads a file. So a weight that is *computed* costs nothing later: the
session is the same as with the weight itself, only the file is smaller. Stored are the coefficients as they
are (float32) and the order as narrowly as it goes; cosines are generated. Arithmetic is in float64, so a
weight is right to the last bit or so of float32.

**Inverse DCT.** With v the even places of a row in ascending order and then the odd ones in descending order,
METHODS 4.3 is

    v_j = sum_k s_k Y_k cos(2 pi k (4j + 1) / 4M),    k = 0 ... t-1,  j = 0 ... M-1

For M = A B write k = A k2 + k1 and j = B j1 + j2. The angle, up to whole turns, is psi + phi + theta:

    psi = 2 pi k2 (4 j2 + 1) / 4B,    phi = 2 pi k1 (4 j2 + 1) / 4M,    theta = 2 pi k1 j1 / A

and cos(psi + phi + theta) = (cos psi, sin psi) (rotation by phi) (cos theta, -sin theta): a product of three
tables, one Einsum for all rows of a layer, with 2 (B t + A M) multiplications a row instead of M t. Nothing
is padded but t, to a multiple of A; how v is arranged goes into the stored order.

ONNX's DFT operator, the obvious choice, is left with the lengths that do not factor (a large prime). On other
lengths it loses even when they are split into a product and DFTs of a power of two: for ResNet-50 at g = 4
prototypes of both took ONNX Runtime 1.31 8.1 s of CPU time and 2.9 GB more memory to load, the Einsum 5.3 s
and 0.8 GB. Results between nodes stay in memory until the last weight of a file is folded; those inside an
Einsum do not.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from graphcomp.ir import DctLayer
from graphcomp.onnx.lowering import weight_name

__all__ = ["Rebuilt", "rebuild_weights"]

Array = NDArray[Any]

# Costs in multiply-adds of a matrix product, measured on one core with ONNX Runtime 1.31 (about 10 GMAC/s).
_COSINE = 200
_BUTTERFLY = 250
_INEXACT = 10**8
"""What ONNX's DFT must save (10 ms a layer): of no power of two it is right to 2e-7, the Einsum to 6e-8."""

_WIDTHS = (1, 2, 4, 8)
"""Bits of the fields that the upper part of an index is packed in."""


@dataclass(frozen=True)
class StoredBytes:
    """Bytes that weights take in a file."""

    coefficients: int = 0
    order: int = 0

    def __add__(self, other: "StoredBytes") -> "StoredBytes":
        return StoredBytes(self.coefficients + other.coefficients, self.order + other.order)


@dataclass(frozen=True)
class Rebuilt:
    """What `rebuild_weights` added.

    Attributes:
        nodes: names of all new nodes.
        last: module path of a layer -> name of the new node that yields its weight.
        stored: what the weights take in the file.
    """

    nodes: list[str]
    last: dict[str, str]
    stored: StoredBytes


def rebuild_weights(model: ModelProto, layers: Mapping[str, DctLayer]) -> Rebuilt:
    """Replace the inputs of `model` that are weights by nodes that compute them; `model` is changed.

    Args:
        model: exported from what `lowering.taking_weights` yields.
        layers: the program's `lowering.dct_layers`.
    """
    build, last, stored = _Nodes(), dict[str, str](), StoredBytes()
    wanted = {value.name: value for value in model.graph.input}
    for target, layer in layers.items():
        if (name := weight_name(target)) in wanted:  # a layer under two paths has the name of the first
            stored += _rebuild(build, layer, name)
            last[target] = name
            model.graph.input.remove(wanted[name])
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*build.nodes, *old])
    model.graph.initializer.extend(build.initializers)
    return Rebuilt([node.name for node in build.nodes], last, stored)


class _Nodes:
    """Nodes in the making. What several weights need (tables, small constants) is made once."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._made: dict[Any, Any] = {}

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node with one output; names are short because there are many."""
        name = name or f"dct/{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def store(self, name: str, values: Array) -> str:
        """A stored tensor."""
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, values: Any, dtype: type[np.generic]) -> str:
        """A small stored tensor, one for all that are equal."""
        array = np.asarray(values, dtype)
        key = (dtype, array.shape, array.tobytes())
        return cast(str, self.once(key, lambda: self.store(f"dct/c{len(self.initializers)}", array)))

    def ints(self, *values: int) -> str:
        """A stored vector of integers: a shape, axes, …"""
        return self.constant(values, np.int64)

    def double(self, values: Any) -> str:
        """A small stored tensor of float64."""
        return self.constant(values, np.float64)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` yields, made when it is first asked for under `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def numbers(self, start: int, stop: int, step: int = 1) -> str:
        """start, start + step, … below stop, in float64, as a row."""
        return self.op("Range", *map(self.double, (start, stop, step)))

    def cosines(self, rows: str, columns: str, unit: float, shifts: Any) -> str:
        """cos(unit * rows[i] * columns[j] + shift) for each of the shifts, whose axes come first."""
        column = self.op("Reshape", rows, self.ints(-1, 1))
        angles = self.op("Mul", self.op("Mul", column, self.double(unit)), columns)
        return self.op("Cos", self.op("Add", angles, self.double(np.asarray(shifts)[..., None, None])))


def _rebuild(build: _Nodes, layer: DctLayer, name: str) -> StoredBytes:
    """Nodes for one weight, METHODS (4.5): coefficients -> columns in their order -> columns as they were."""
    coefficients = layer.coefficients.detach().cpu().numpy()
    stored = build.store(f"{name}/coefficients", coefficients)
    index = None if layer.index is None else layer.index.detach().cpu().long().numpy()
    dtype = helper.np_dtype_to_tensor_dtype(coefficients.dtype)
    if layer.basis == "standard":
        columns, places = _padded_columns(build, stored, layer), index
    else:
        transform = _transform(layer.rows, layer.columns, layer.terms)
        columns = transform.columns(build, stored, layer, dtype)
        places = None if index is None else transform.place(index)
    order, size = _order(build, name, layer, places)
    if order is not None:
        columns = build.op("Gather", columns, order, axis=0)
    rows = build.op("Transpose", columns, perm=[1, 0])
    build.op("Reshape", rows, build.ints(*layer.weight_shape), name=name)
    return StoredBytes(coefficients.nbytes, size)


def _padded_columns(build: _Nodes, stored: str, layer: DctLayer) -> str:
    """The stored columns of the weight and zeros for the others, shape (M, g)."""
    columns = build.op("Transpose", stored, perm=[1, 0])
    return build.op("Pad", columns, build.ints(0, 0, layer.columns - layer.terms, 0))


# ---------------------------------------------------------------------- the inverse transform


@dataclass(frozen=True)
class _Einsum:
    """The inverse DCT by M = `inner` * `outer` (A and B of the module's text)."""

    inner: int
    outer: int

    @property
    def length(self) -> int:
        return self.inner * self.outer

    def blocks(self, terms: int) -> int:
        """How many k2 there are."""
        return -(-terms // self.inner)

    def cost(self, rows: int, terms: int) -> int:
        """Multiply-adds, or what takes as long."""
        tables = 2 * self.outer * self.blocks(terms) + 2 * self.inner**2
        products = self.outer * self.blocks(terms) * self.inner + self.inner * self.length
        return 2 * rows * products + _COSINE * tables

    def columns(self, build: _Nodes, stored: str, layer: DctLayer, dtype: int) -> str:
        """Nodes that yield v, shape (M, g), at `place`."""
        blocks = self.blocks(layer.terms)
        y = _scaled(build, stored, layer, 1.0)
        y = build.op("Pad", y, build.ints(0, 0, 0, blocks * self.inner - layer.terms))
        y = build.op("Reshape", y, build.ints(layer.rows, blocks, self.inner))
        psi, phi, theta = build.once((self, blocks), lambda: self._tables(build, blocks))
        v = build.op("Einsum", psi, y, phi, theta, equation="cbk,gka,cdba,daj->bjg")
        # The cast comes first: what a node yields stays in memory while the file is loaded.
        v = build.op("Cast", v, to=dtype)
        return build.op("Reshape", v, build.ints(self.length, layer.rows))

    def _tables(self, build: _Nodes, blocks: int) -> tuple[str, str, str]:
        quarter, turn = math.pi / 2, 2 * math.pi
        places = build.numbers(1, 4 * self.outer, 4)
        inner = build.numbers(0, self.inner)
        return (
            build.cosines(places, build.numbers(0, blocks), turn / (4 * self.outer), [0, -quarter]),
            build.cosines(places, inner, turn / (4 * self.length), [[0, -quarter], [quarter, 0]]),
            build.cosines(inner, inner, turn / self.inner, [0, quarter]),
        )

    def place(self, n: Array) -> Array:
        """Where `columns` has the n-th value of a row."""
        j = _folded(n, self.length)
        return cast(Array, j % self.outer * self.inner + j // self.outer)


@dataclass(frozen=True)
class _Dft:
    """The inverse DCT by ONNX's DFT operator: v = Re IFFT(M s_k Y_k exp(2 pi i k / 4M))."""

    length: int

    def cost(self, rows: int, terms: int) -> int:
        """Multiply-adds that take as long; a length that is no power of two takes three longer transforms."""
        bits = (self.length - 1).bit_length()
        if self.length == 1 << bits:
            return _INEXACT + rows * _BUTTERFLY * (bits << bits) // 2
        return _INEXACT + 3 * rows * _BUTTERFLY * (bits + 1 << bits + 1) // 2

    def columns(self, build: _Nodes, stored: str, layer: DctLayer, dtype: int) -> str:
        """Nodes that yield v, shape (M, g), at `place`."""
        y = _scaled(build, stored, layer, float(self.length))
        table = build.once((self, layer.terms), lambda: self._table(build, layer.terms))
        parts = build.op("Mul", build.op("Unsqueeze", y, build.ints(-1)), table)
        parts = build.op("Pad", parts, build.ints(0, 0, 0, 0, self.length - layer.terms, 0))
        # The axis is the last but one by default, as an attribute (opset 17) and as an input (opset 20).
        v = build.op("Gather", build.op("DFT", parts, inverse=1), build.constant(0, np.int64), axis=2)
        return build.op("Transpose", build.op("Cast", v, to=dtype), perm=[1, 0])

    def _table(self, build: _Nodes, terms: int) -> str:
        unit, k = 2 * math.pi / (4 * self.length), build.numbers(0, terms)
        table = build.cosines(k, build.double([1.0]), unit, [0, -math.pi / 2])
        return build.op("Transpose", build.op("Squeeze", table, build.ints(2)), perm=[1, 0])

    def place(self, n: Array) -> Array:
        """Where `columns` has the n-th value of a row."""
        return _folded(n, self.length)


def _transform(rows: int, length: int, terms: int) -> _Einsum | _Dft:
    """The cheapest way to `length` values a row."""
    ways: Iterator[_Einsum | _Dft] = (_Einsum(a, length // a) for a in _divisors(length))
    return min([*ways, _Dft(length)], key=lambda way: way.cost(rows, terms))


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return [*small, *(number // d for d in small)]


def _folded(n: Array, length: int) -> Array:
    """Where v has the n-th value: evens ascending, then odds descending."""
    return np.where(n % 2 == 0, n // 2, length - 1 - n // 2)


def _scaled(build: _Nodes, stored: str, layer: DctLayer, factor: float) -> str:
    """factor s_k Y_k in float64."""
    others = factor * math.sqrt(2 / layer.columns)

    def scale() -> str:
        count, value = build.ints(layer.terms - 1), numpy_helper.from_array(np.array([others]))
        tail = build.op("ConstantOfShape", count, value=value)
        return build.op("Pad", tail, build.ints(1, 0), build.double(factor * math.sqrt(1 / layer.columns)))

    vector = build.once(("scale", layer.columns, layer.terms, factor), scale)
    return build.op("Mul", build.op("Cast", stored, to=TensorProto.DOUBLE), vector)


# ---------------------------------------------------------------------- the order


def _order(build: _Nodes, name: str, layer: DctLayer, places: Array | None) -> tuple[str | None, int]:
    """Where every column is, as int32, and the bytes that are stored for it; None if they are in place."""
    if places is not None:
        return _unpacked(build, name, places)
    if layer.basis == "standard":
        return None, 0
    transform = _transform(layer.rows, layer.columns, layer.terms)
    return cast(str, build.once((transform, "order"), lambda: _generated(build, transform))), 0


def _generated(build: _Nodes, transform: _Einsum | _Dft) -> str:
    """`transform.place` of 0 … M-1, in nodes."""

    def op(kind: str, a: str, b: str | int) -> str:
        return build.op(kind, a, b if isinstance(b, str) else build.constant(b, np.int64))

    n = build.op("Range", *(build.constant(x, np.int64) for x in (0, transform.length, 1)))
    half, odd = op("Div", n, 2), op("Mod", n, 2)
    mirrored = build.op("Sub", build.constant(transform.length - 1, np.int64), op("Mul", half, 2))
    j = op("Add", half, op("Mul", odd, mirrored))
    if isinstance(transform, _Dft):
        return j
    rest = op("Mul", op("Mod", j, transform.outer), transform.inner)
    return op("Add", rest, op("Div", j, transform.outer))


def _unpacked(build: _Nodes, name: str, places: Array) -> tuple[str, int]:
    """Store `places` in whole bytes and what is above them in fields of a few bits."""
    low, high = _packed(places)
    order = build.op("Cast", build.store(f"{name}/order", low), to=TensorProto.INT32)
    if high is None:
        return order, low.nbytes
    width, fields = 8 // high.fields, build.store(f"{name}/order_high", high.bytes[:, None])
    shifts = build.constant(np.arange(0, 8, width), np.uint8)
    shifted = build.op("BitShift", fields, shifts, direction="RIGHT")
    masked = build.op("BitwiseAnd", shifted, build.constant((1 << width) - 1, np.uint8))
    upper = build.op("Reshape", masked, build.ints(-1))
    if high.bytes.size * high.fields != places.size:
        upper = build.op("Slice", upper, build.ints(0), build.ints(places.size))
    upper = build.op("Cast", upper, to=TensorProto.INT32)
    upper = build.op("Mul", upper, build.constant(1 << 8 * low.itemsize, np.int32))
    return build.op("Add", upper, order), low.nbytes + high.bytes.nbytes


@dataclass(frozen=True, eq=False)
class _Fields:
    """Numbers packed into bytes, the first in the lowest bits.

    Attributes:
        bytes: uint8.
        fields: how many are in a byte.
    """

    bytes: Array = field(repr=False)
    fields: int


def _packed(places: Array) -> tuple[Array, _Fields | None]:
    """The lower bytes of every place, and the bits above them, for as many bits as the largest place has.

    The orders of ResNet-50 (g = 4) take 14.7 MB this way, 18.0 as uint16 with a plane of uint8 above, 23.3 as
    uint16 and int32. No code for permutations, which have log2(M!) bits, could do better than 13.1.
    """
    bits = int(places.max()).bit_length()
    whole = 8 if bits <= 12 else 16 if bits <= 24 else 32
    low = (places & ((1 << whole) - 1)).astype(f"uint{whole}")
    if bits <= whole:
        return low, None
    width = next(w for w in _WIDTHS if w >= bits - whole)
    fields = 8 // width
    high = np.zeros(-(-places.size // fields) * fields, np.uint8)
    high[: places.size] = places >> whole
    shifted = high.reshape(-1, fields) << np.arange(0, 8, width, dtype=np.uint8)
    return low, _Fields(np.bitwise_or.reduce(shifted, axis=1).astype(np.uint8), fields)
