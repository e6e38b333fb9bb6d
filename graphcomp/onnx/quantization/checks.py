"""What stands in for the exactness oracle.

An 8 bit network cannot equal its float network. Each of its layers can equal its own definition; the rest is
measured.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from graphcomp.onnx.quantization.layers import Layer
from graphcomp.onnx.quantization.sessions import Feeds, float_tensors, plain_session
from graphcomp.onnx.subgraphs import makers_of
from graphcomp.runtime import open_session

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
EQUAL = 1e-2
"""Of a step: float sums in another order are no difference."""
_SUFFIX = "_DequantizeLinear_Output"  # how ONNX Runtime's quantizer calls what stands for a float tensor


def snr(expected: Iterable[NDArray[Any]], found: Iterable[NDArray[Any]]) -> float:
    """Signal to noise in dB, 10 log10(sum e^2 / sum (e - f)^2).

    inf where nothing differs, -inf where there is no signal, or what was found is infinite or no number.
    """
    signal = noise = 0.0
    for e, f in zip(expected, found, strict=True):
        wide = e.astype(np.float64)
        signal += float((wide**2).sum())
        noise += float(((wide - f) ** 2).sum())
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal and math.isfinite(noise) else float("-inf")


def run_all(model: bytes, batches: Iterable[Feeds], *, plain: bool = False) -> list[list[NDArray[Any]]]:
    """All outputs of a model as the runtime optimises it, or as it is written (`plain`), batch by batch."""
    session = open_session(model, plain=plain).session
    return [session.run(None, dict(feeds)) for feeds in batches]


def snr_by_tensor(
    model: ModelProto, quantised: ModelProto, layers: Sequence[Layer], batches: Sequence[Feeds]
) -> dict[str, float]:
    """dB of what every layer's output has become in the whole quantised network, by the layer's name.

    Of a layer whose output is not rounded on its own (a removed ReLU's is) the next rounded tensor counts.
    """
    known = {name for node in quantised.graph.node for name in node.output}
    readers = {name: node for node in model.graph.node for name in node.input}
    results = {output.name for output in quantised.graph.output}
    named: dict[str, str] = {}
    for layer in layers:
        follower = readers.get(layer.y)
        candidates = [layer.y, *(follower.output[:1] if follower is not None else [])]
        name = next((name for name in candidates if name + _SUFFIX in known or name in results), None)
        if name is not None:
            named[layer.name] = name
    wanted = {
        name: name if name in results else name + _SUFFIX
        for name in sorted(set(named.values()) & set(float_tensors(model)))
    }
    before, after = plain_session(model, list(wanted)), plain_session(quantised, list(wanted.values()))
    pairs = [(before(feeds), after(feeds)) for feeds in batches]
    found = {b: snr([x[b] for x, _ in pairs], [y[a] for _, y in pairs]) for b, a in wanted.items()}
    return {layer: found[name] for layer, name in named.items() if name in found}


def errors_by_layer(
    quantised: ModelProto, layers: Sequence[Layer], feeds: Feeds, *, seed: int = 0
) -> dict[str, int]:
    """How far every fused layer is from its definition, in steps of its own output, by the layer's name.

    The definition is the layer as it stands in the file: dequantise, compute in float, quantise. Both get
    the same
    bytes: those of the unfused network on `feeds`, and as many that are 0 or 255 by chance, all 0 and all
    255. Of a Gemm that yields numbers and no bytes a step is a 255th of what they span on `feeds`, and part
    of a step counts as one. Any other layer whose output is not quantised (nothing fuses there) is not among
    them.

    Args:
        quantised: a QDQ model.
        layers: of the float model.
        feeds: some samples.
        seed: of the chance.
    """
    units = {layer.name: unit for layer in layers if (unit := _unit(quantised, layer.name)) is not None}
    inputs = sorted({unit.x for unit in units.values()})
    seen = plain_session(quantised, inputs)(feeds) if inputs else {}
    rng = np.random.default_rng(seed)
    return {name: _error(quantised, unit, _bytes(seen[unit.x], rng)) for name, unit in units.items()}


def census(quantised: ModelProto, layers: Sequence[Layer]) -> tuple[dict[str, int], list[str]]:
    """What the runtime makes of a model: its operators by number, and which of these layers it did not fuse.

    A fused layer reads its 8 bit weight; another one reads what became of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "optimised.onnx"
        open_session(quantised.SerializeToString(), dump=dump)
        nodes = onnx.load(dump).graph.node
    read = {name for node in nodes if node.op_type != _DEQUANTIZE for name in node.input}
    makers = makers_of(quantised)
    written = {node.name: node for node in quantised.graph.node}
    unfused = []
    for layer in layers:
        node = written.get(layer.name)
        weight = None if node is None else makers.get(node.input[1])
        if weight is None or weight.op_type != _DEQUANTIZE or weight.input[0] not in read:
            unfused.append(layer.name)
    return dict(Counter(node.op_type for node in nodes)), unfused


@dataclass(frozen=True)
class _Unit:
    """A layer from bytes to bytes, or to numbers at the end: their names, and the nodes between."""

    x: str
    y: str
    nodes: tuple[NodeProto, ...]


def _unit(model: ModelProto, name: str) -> _Unit | None:
    makers = makers_of(model)
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for read in node.input:
            readers.setdefault(read, []).append(node)
    layer = next(node for node in model.graph.node if node.name == name)
    before = [makers[read] for read in layer.input if read in makers]
    if len(before) != len([read for read in layer.input if read]) or any(
        n.op_type != _DEQUANTIZE for n in before
    ):
        return None
    inner = [layer]
    after = readers.get(layer.output[0], [])
    if len(after) == 1 and after[0].op_type in ("Relu", "Clip") and len(after[0].input) == 1:
        inner.append(after[0])
        after = readers.get(after[0].output[0], [])
    last = [node for node in after if node.op_type == _QUANTIZE]
    if not after and layer.op_type == "Gemm":  # at the end
        return _Unit(before[0].input[0], layer.output[0], (*before, layer))
    if len(last) != 1:
        return None
    return _Unit(before[0].input[0], last[0].output[0], (*before, *inner, last[0]))


def _error(model: ModelProto, unit: _Unit, inputs: Sequence[NDArray[Any]]) -> int:
    stored = {i.name: i for i in model.graph.initializer}
    used = {name for node in unit.nodes for name in node.input if name in stored}
    shape = ["batch", *inputs[0].shape[1:]]
    rounds = unit.nodes[-1].op_type == _QUANTIZE
    kind = helper.np_dtype_to_tensor_dtype(inputs[0].dtype)
    graph = helper.make_graph(
        unit.nodes,
        "unit",
        [helper.make_tensor_value_info(unit.x, kind, shape)],
        [helper.make_tensor_value_info(unit.y, kind if rounds else onnx.TensorProto.FLOAT, None)],
        [stored[name] for name in sorted(used)],
    )
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    reference = plain_session(alone, [unit.y])
    fused = open_session(alone.SerializeToString()).session
    pairs = [(reference({unit.x: x})[unit.y], fused.run(None, {unit.x: x})[0]) for x in inputs]
    if rounds:
        return max(int(np.abs(a.astype(np.int32) - b).max()) for a, b in pairs)
    span = float(np.ptp(pairs[0][0])) or 1.0
    return max(math.ceil(float(np.abs(a - b).max()) * 255 / span - EQUAL) for a, b in pairs)


def _bytes(seen: NDArray[Any], rng: np.random.Generator) -> list[NDArray[Any]]:
    """What was seen, and extremes: 0 and 255 of u8, -128 and 127 of s8."""
    limits = np.iinfo(seen.dtype)
    chance = np.where(rng.integers(0, 2, seen.shape) > 0, limits.max, limits.min).astype(seen.dtype)
    return [seen, chance, np.full_like(seen[:1], limits.min), np.full_like(seen[:1], limits.max)]
