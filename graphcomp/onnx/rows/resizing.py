"""Rows that resize planes.

Along every axis a resize is a matrix: what weight every element of the input has in every element of the
result. The operator's matrix is computed from its definition, torch's by running it on the identity. Where
both are equal the result is one `interpolate`; elsewhere it is written as a choice of positions (nearest) or
a weighted sum of such.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made
from graphcomp.onnx.rows.wires import NoRow, Wire, is_open
from graphcomp.onnx.rows.writing import Writing

# ---- reading

_MOST = 1 << 24
"""Elements of a matrix that is compared."""

_TORCH = {
    ("linear", 3): "linear",
    ("linear", 4): "bilinear",
    ("linear", 5): "trilinear",
    ("cubic", 4): "bicubic",
}


@dataclass(frozen=True)
class _Rule:
    """How a place in the result becomes places in the input."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    excludes: bool


@dataclass(frozen=True)
class _Axis:
    """One axis that is resized: from how many elements to how many, by which scale."""

    axis: int
    old: int
    new: int
    scale: float


@reads("Resize", "Upsample")
def read_resize(node: Node, reading: Reading) -> Made:
    """One call of interpolate, or positions along every axis."""
    x = reading.tensor(node.input(0))
    rule = _rule(node)
    cases = [_axes(node, shape, case) for case, shape in enumerate(x.shapes)]
    if any(a.axis == 0 for axes in cases for a in axes):
        raise node.refusal("a resize of the batch", "one of planes", "the file is not valid ONNX")
    if not any(cases):
        return x
    call = _interpolation(node, x, rule, cases)
    if call is not None:
        mode, corners = call
        sizes = tuple(
            reading.sizes([_sizes(s, axes)[2:] for s, axes in zip(x.shapes, cases, strict=True)], [x])
        )
        given: dict[str, Any] = {} if corners is None else {"align_corners": corners}
        return reading.call(F.interpolate, x, size=sizes, mode=mode, **given)
    if any(axes != cases[0] for axes in cases):
        raise node.refusal(
            f"{rule.mode} by {rule.coordinates} on an open size", "a fixed size", "give --input-shape"
        )
    for axis in cases[0]:
        x = _picked(reading, x, rule, axis)
    return x


def _rule(node: Node) -> _Rule:
    mode = node.word("mode", "nearest")
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(mode, mode)
    if mode not in ("nearest", "linear", "cubic"):
        raise node.refusal(f"mode={mode!r}", "nearest, linear or cubic", "the file is not valid ONNX")
    old = node.operator == "Upsample" or node.opset < 11
    node.only("antialias", 0, 0)
    node.only("keep_aspect_ratio_policy", "stretch", "stretch")
    node.ignore("extrapolation_value")  # of tf_crop_and_resize, which is refused
    coordinates = node.word("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    nearest = node.word("nearest_mode", "floor" if old else "round_prefer_floor")
    cubic, excludes = node.number("cubic_coeff_a", -0.75), bool(node.integer("exclude_outside", 0))
    if coordinates not in _COORDINATES or nearest not in _NEAREST:
        raise node.refusal(f"{coordinates} and {nearest}", f"{', '.join(_COORDINATES)}", "export it again")
    return _Rule(mode, coordinates, nearest, cubic, excludes)


def _axes(node: Node, shape: tuple[int, ...], case: int) -> list[_Axis]:
    """The axes whose size changes."""
    scales, sizes = _given(node, case)
    listed = node.integers("axes")
    along = list(range(len(shape))) if listed is None else [node.along(a, len(shape)) for a in listed]
    numbers = scales if scales is not None else sizes
    if numbers is None or len(numbers) != len(along):
        raise node.refusal(
            f"scales or sizes {numbers}", f"{len(along)} numbers", "the file is not valid ONNX"
        )
    found = []
    for axis, number in zip(along, numbers, strict=True):
        old = shape[axis]
        if not np.isfinite(number) or not 0 < number <= 1 << 20:
            raise node.refusal(f"scale or size {number}", "a positive number", "the file is not valid ONNX")
        if scales is None and axis == 0 and int(number) == (shape[0] if case == 0 else number):
            continue
        new = int(np.floor(np.float32(old) * np.float32(number))) if scales is not None else int(number)
        scale = float(number) if scales is not None else new / old
        if new != old or scale != 1.0:
            found.append(_Axis(axis, old, new, scale))
    if node.opset < 11 and node.word("mode", "nearest") == "nearest" and any(a.new < a.old for a in found):
        raise node.refusal("a nearest reduction before opset 11", "an enlargement", "export it with opset 13")
    return found


def _given(node: Node, case: int) -> tuple[list[float] | None, list[float] | None]:
    """(scales, sizes): one of them."""
    if node.has("scales"):
        return list(node.numbers("scales") or ()), None
    if node.opset < 11:
        scales, sizes = node.known(1, "scales"), None
    else:
        node.optional(1)  # the region of tf_crop_and_resize
        scales, sizes = node.known(2, "scales"), node.known(3, "sizes")
    return _numbers(scales, case), _numbers(sizes, case)


def _numbers(value: Known | None, case: int) -> list[float] | None:
    return (
        None if value is None or not value.array.size else [float(n) for n in value.values[case].reshape(-1)]
    )


def _sizes(shape: tuple[int, ...], axes: Sequence[_Axis]) -> list[int]:
    new = {a.axis: a.new for a in axes}
    return [new.get(d, n) for d, n in enumerate(shape)]


# ---- what an axis does


def _half_pixel(i: Any, a: _Axis) -> Any:
    return (i + 0.5) / np.float32(a.scale) - 0.5


def _symmetric(i: Any, a: _Axis) -> Any:
    adjustment = a.new / (a.scale * a.old)
    return a.old / 2 * (1 - adjustment) + _half_pixel(i, a)


_COORDINATES: dict[str, Any] = {
    "half_pixel": _half_pixel,
    "pytorch_half_pixel": lambda i, a: _half_pixel(i, a) if a.new > 1 else i * 0,
    "align_corners": lambda i, a: i * np.float32(a.old - 1) / np.float32(a.new - 1) if a.new > 1 else i * 0,
    "asymmetric": lambda i, a: i / np.float32(a.scale),
    "half_pixel_symmetric": _symmetric,
    "tf_half_pixel_for_nn": lambda i, a: (i + 0.5) / np.float32(a.scale),
}
_NEAREST: dict[str, Any] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _taps(rule: _Rule, a: _Axis) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(positions, weights), a row for every element that counts, in single precision as runtimes compute."""
    x = _COORDINATES[rule.coordinates](np.arange(a.new, dtype=np.float32), a).astype(np.float32)
    if rule.mode == "nearest":
        at = _NEAREST[rule.nearest](x)[None]
        weights = np.ones_like(at)
    elif rule.mode == "linear":
        x = np.clip(x, 0, a.old - 1)
        low = np.floor(x)
        at, weights = np.stack([low, low + 1]), np.stack([1 - (x - low), x - low])
    else:
        low = np.floor(x)
        at = np.stack([low + k for k in (-1, 0, 1, 2)])
        weights = _cubic(np.abs(x[None] - at), rule.cubic)
        if rule.excludes:
            weights = np.where((at < 0) | (at >= a.old), 0, weights)
            weights = weights / weights.sum(0)
    return np.clip(at, 0, a.old - 1).astype(np.int64), weights.astype(np.float32)


def _cubic(distance: NDArray[Any], a: float) -> NDArray[Any]:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.asarray(np.where(distance <= 1, near, far))


def _matrix(rule: _Rule, a: _Axis) -> NDArray[np.float32]:
    at, weights = _taps(rule, a)
    matrix = np.zeros((a.new, a.old), np.float32)
    for row, weight in zip(at, weights, strict=True):
        np.add.at(matrix, (np.arange(a.new), row), weight)
    return matrix


def _torch_matrix(mode: str, corners: bool | None, a: _Axis) -> NDArray[np.float32]:
    eye = torch.eye(a.old)[None, :, :, None]
    plane = {"linear": "bilinear", "trilinear": "bilinear"}.get(mode, mode)
    found = F.interpolate(eye, size=(a.new, 1), mode=plane, align_corners=corners)
    return np.asarray(found[0, :, :, 0].T)


# ---- the two forms


def _interpolation(
    node: Node, x: Made, rule: _Rule, cases: Sequence[Sequence[_Axis]]
) -> tuple[str, bool | None] | None:
    """(mode, align_corners) of the interpolate that does the same in every case; None if there is none."""
    axes = {a for axes in cases for a in axes}
    if any(a.old * a.new > _MOST for a in axes):
        raise node.refusal(
            "a resize of very long axes", f"at most {_MOST} pairs of elements", "use a smaller size"
        )
    if x.rank not in (3, 4, 5) or any(a.axis < 2 for a in axes) or not x.dtype.is_floating_point:
        return None
    mode = _TORCH.get((rule.mode, x.rank))
    forms: list[tuple[str, bool | None]] = (
        [("nearest", None), ("nearest-exact", None)] if rule.mode == "nearest" else []
    )
    forms += [(mode, False), (mode, True)] if mode is not None else []
    for form in forms:
        if all(np.allclose(_matrix(rule, a), _torch_matrix(*form, a), atol=2e-5) for a in axes):
            return form
    return None


def _picked(reading: Reading, x: Made, rule: _Rule, a: _Axis) -> Made:
    """A weighted sum of positions along one axis."""
    at, weights = _taps(rule, a)
    shape = [-1 if d == a.axis else 1 for d in range(x.rank)]
    total: Made | None = None
    for row, weight in zip(at, weights, strict=True):
        part = reading.call(torch.index_select, x, a.axis, reading.tensor(Known((row,)), "positions"))
        if not (weight == 1).all():
            part = reading.call(
                operator.mul, part, reading.tensor(Known((weight.reshape(shape),)), "weights")
            )
        total = part if total is None else reading.call(operator.add, total, part)
    assert total is not None
    return total


# ---- writing

_MODES = {
    "nearest": "nearest", "nearest-exact": "nearest", "linear": "linear", "bilinear": "linear",
    "trilinear": "linear", "bicubic": "cubic",
}  # fmt: skip


@writes("interpolate")
def write_interpolate(
    writing: Writing,
    input: Wire,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> str:
    """Resize, with torch's coordinates."""
    if mode not in _MODES or antialias:
        raise NoRow(f"mode {mode!r}" + (" with antialias" if antialias else ""))
    coordinates = "align_corners" if align_corners else "pytorch_half_pixel"
    if mode == "nearest":
        coordinates = "asymmetric"
    elif mode == "nearest-exact":
        coordinates = "half_pixel"
    settings: dict[str, Any] = {
        "mode": _MODES[mode],
        "coordinate_transformation_mode": coordinates,
        "nearest_mode": {"nearest": "floor", "nearest-exact": "round_prefer_ceil"}.get(mode),
        "cubic_coeff_a": -0.75 if mode == "bicubic" else None,
    }
    plane = list(range(2, input.rank))
    before, after = input.shape[2:], writing.result.shape[2:]
    if scale_factor is not None and not recompute_scale_factor:
        factors = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,) * len(plane)
        scales = writing.store(torch.tensor([1.0, 1.0, *map(float, factors)]))
        return writing.op("Resize", input, None, scales, **settings)
    if not any(map(is_open, (*before, *after))):
        if before == after:
            return input.name
        wanted = writing.ints(*(n for n in after if isinstance(n, int)))
    else:
        given = list(size) if isinstance(size, tuple | list) else [size] * len(plane)
        if size is None or any(n is None for n in given):
            raise NoRow("a size that is computed from an open one")
        wanted = writing.sizes(given)
    return writing.op("Resize", input, None, None, wanted, axes=plane, **settings)
