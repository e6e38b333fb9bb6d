"""Weights are rounded one after another, and those that follow make up for what was lost.

With C = L L^T the covariance of what a layer reads, an output whose weights w become s q changes by a
variance of

    e^T C e = sum_k (L_kk e_k + sum_{j>k} L_jk e_j)^2,        e = w - s q

and a mean that the bias takes. From the last tap to the first, q_k is the nearest to

    (w_k + sum_{j>k} (L_jk / L_kk) e_j) / s

which makes its own term least, given those behind it. Where two neighbouring taps must not saturate (see
`grids`), one stays within what the other has left.

E. Frantar et al., GPTQ, ICLR 2023; in this form J. Chee et al., QuIP, NeurIPS 2023, section 4.1.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper
from torch import Tensor, nn

from graphcomp.measure import Moments, Positions, patches_at
from graphcomp.onnx.quantization import grids
from graphcomp.onnx.quantization.grids import Grid
from graphcomp.onnx.quantization.layers import Layer
from graphcomp.onnx.quantization.sessions import Feeds, plain_session

Steps = Mapping[str, NDArray[np.int8]]
"""(output channels, taps) by a weight's name: by how many multiples of the scale a tap is not the nearest."""

POSITIONS = 32
"""Of an output, in every sample, whose patches are looked at."""
RIDGE = 0.1
"""Of the mean variance, on the diagonal: what few samples happen to say should not be made up for."""
MEMORY = 1 << 30
"""Bytes of sums at a time, more of them take another pass; a layer that has more alone is not looked at."""
_BLOCK = 64
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def compensated(
    model: ModelProto,
    layers: Sequence[Layer],
    scales: Mapping[str, NDArray[np.float32]],
    grid: Grid,
    batches: Sequence[Feeds],
) -> Steps:
    """How weights are rounded for the outputs of their layers to change least on these samples.

    Args:
        model: float.
        layers: of this model.
        scales: (output channels,) of every weight, by its name.
        grid: of the weights; no pair of taps saturates that would not without.
        batches: at least one.
    """
    by_weight: dict[str, list[Layer]] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight, []).append(layer)
    nodes = {node.name: node for node in model.graph.node}
    found: dict[str, NDArray[np.int8]] = {}
    for part in _within(by_weight):
        for name, moments in _moments(model, nodes, part, batches).items():
            layer, scale = part[name][0], scales[name]
            pairs = grid == "pairs" and not layer.depthwise
            best = rounded(layer, moments, scale, grids.LARGEST[grid], pairs=pairs)
            found[name] = (best.astype(np.int16) - grids.quantised(layer.taps(), scale)).astype(np.int8)
    return found


def rounded(
    layer: Layer, moments: Moments, scale: NDArray[np.float32], largest: int, *, pairs: bool
) -> NDArray[np.int8]:
    """Multiples (output channels, taps) of a layer's scales, see the module.

    Args:
        layer: whose weight it is.
        moments: of what it reads, in the order of its weight.
        scale: (output channels,).
        largest: magnitude of a multiple.
        pairs: whether neighbouring taps must not saturate.
    """
    taps = torch.from_numpy(np.ascontiguousarray(layer.taps(), np.float64))
    count = taps.shape[1]
    values = taps.reshape(layer.groups, -1, count)
    steps = torch.from_numpy(scale.astype(np.float64)).reshape(layer.groups, -1)
    normal = moments.centred()
    order = _kernel_order(layer)
    normal.gram = normal.gram[:, order][:, :, order]
    factor = normal.factor(RIDGE)
    ratio = factor / factor.diagonal(dim1=1, dim2=2).unsqueeze(1)
    lost, found = torch.zeros_like(values), torch.zeros_like(values)
    for end in range(count, 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        aim = values[..., start:end] + lost[..., end:] @ ratio[:, end:, start:end]
        for k in reversed(range(start, end)):
            low, high = torch.tensor(-float(largest)), torch.tensor(float(largest))
            if pairs and k % 2 == 0 and k + 1 < count:
                other = found[..., k + 1]
                low = torch.where(other < 0, (-grids.PAIR - other).clamp(min=-largest), low)
                high = torch.where(other > 0, (grids.PAIR - other).clamp(max=largest), high)
            one = (aim[..., k - start] / steps).round().clamp(low, high)
            error = values[..., k] - one * steps
            found[..., k], lost[..., k] = one, error
            aim[..., : k - start] += error.unsqueeze(2) * ratio[:, k, start:k].unsqueeze(1)
    return np.asarray(found.reshape(taps.shape).to(torch.int8))


def _kernel_order(layer: Layer) -> Tensor:
    """Which columns of a patch (channels, kernel) the taps are, in their order."""
    inner = layer.values.shape[1] if layer.op == "Conv" else layer.taps().shape[1]
    return torch.arange(layer.taps().shape[1]).reshape(inner, -1).T.flatten()


def _within(by_weight: Mapping[str, Sequence[Layer]]) -> Iterator[dict[str, Sequence[Layer]]]:
    """Weights whose sums fit into memory together; those that do not alone are left out."""
    part: dict[str, Sequence[Layer]] = {}
    held = 0
    for name, layers in by_weight.items():
        # a float32 product beside the float64 sum
        size = 12 * layers[0].groups * layers[0].taps().shape[1] ** 2
        if size > MEMORY:
            continue
        if held + size > MEMORY:
            yield part
            part, held = {}, 0
        part[name] = layers
        held += size
    if part:
        yield part


def _moments(
    model: ModelProto,
    nodes: Mapping[str, NodeProto],
    part: Mapping[str, Sequence[Layer]],
    batches: Sequence[Feeds],
) -> dict[str, Moments]:
    """Of what layers read, by the name of their weight."""
    inputs = {value.name for value in model.graph.input}
    names = sorted({layer.x for layers in part.values() for layer in layers})
    inner = [name for name in names if name not in inputs]
    run = plain_session(model, inner) if inner else None
    found: dict[str, Moments] = {}
    first = 0
    for feeds in batches:
        seen = {**feeds, **(run(feeds) if run is not None else {})}
        for name, layers in part.items():
            for layer in layers:
                rows = _rows(layer, nodes[layer.name], torch.from_numpy(seen[layer.x]), first)
                if name not in found:
                    found[name] = Moments(rows.mean(0), rows.new_zeros(rows.shape[1], 0))
                found[name].add(rows, rows.new_zeros(len(rows), rows.shape[1], 0))
        first += len(next(iter(feeds.values())))
    return found


def _rows(layer: Layer, node: NodeProto, x: Tensor, first: int) -> Tensor:
    """What the layer reads at some positions: (rows, groups, taps), taps in the order of the weight.

    `first` numbers the samples.
    """
    drawn = Positions(POSITIONS, 0)
    if layer.op != "Conv":
        linear = nn.Linear(x.shape[-1], 1, device="meta")
        return patches_at(linear, x, drawn.of(x[0, ..., 0].numel(), first, len(x)))
    rank = x.ndim - 2
    told = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    kernel, ones = layer.values.shape[2:], [1] * rank
    strides, dilations = told.get("strides", ones), told.get("dilations", ones)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    x = F.pad(x, _pads(told, x.shape[2:], strides, reach))
    sizes = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    kind: Any = _CONVOLUTIONS[rank]
    made = kind(x.shape[1], layer.groups, kernel, strides, 0, dilations, layer.groups, device="meta")
    return patches_at(made, x, drawn.of(math.prod(sizes), first, len(x)))


def _pads(
    told: Mapping[str, object], sizes: Sequence[int], strides: Sequence[int], reach: Sequence[int]
) -> list[int]:
    """Of a node with these attributes, as torch takes them: the last axis first, before and after."""
    rank, auto = len(sizes), told.get("auto_pad", b"NOTSET")
    pads = told.get("pads", [0] * 2 * rank)
    assert isinstance(pads, Sequence)
    before, after = list(pads[:rank]), list(pads[rank:])
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, strides, reach, strict=True)]
        less, more = [n // 2 for n in total], [n - n // 2 for n in total]
        before, after = (less, more) if auto == b"SAME_UPPER" else (more, less)
    return [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
