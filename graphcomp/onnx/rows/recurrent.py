"""Rows of recurrent layers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphcomp.ir import GruLayer, LstmLayer
from graphcomp.onnx.rows.layers import fill
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.shapes import expanded
from graphcomp.onnx.rows.values import Array, Known, Made
from graphcomp.onnx.rows.wires import NoRow, Wire
from graphcomp.onnx.rows.writing import Writing

# ---- reading

_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
"""The rows of torch's gates among those of the file: i o f c becomes i f g o, and z r h becomes r z n."""

_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh")}
_STATES = {"LSTM": (5, 6), "GRU": (5,)}
_MOST = 1 << 16


@reads("LSTM", "GRU")
def read_recurrent(node: Node, reading: Reading) -> tuple[Made, ...]:
    """A layer; time comes first, as in torch."""
    x, gates = reading.tensor(node.input(0)), _GATES[node.operator]
    direction, size = node.word("direction", "forward"), node.integer("hidden_size", 0)
    batch_first = bool(node.integer("layout", 0))
    _check(node, direction, size)
    count = 2 if direction == "bidirectional" else 1
    if x.rank != 3:
        raise node.refusal(f"{x.rank} axes", "3", "the file is not valid ONNX")
    weight = _weight(node, 1, (count, len(gates) * size, x.shape[2]))
    recurrent = _weight(node, 2, (count, len(gates) * size, size))
    bias = _weight(node, 3, (count, 2 * len(gates) * size)) if node.optional(3) is not None else None
    kind = LstmLayer if node.operator == "LSTM" else GruLayer
    with torch.device("meta"):
        module = kind(x.shape[2], size, bias is not None, count == 2)
    for i, end in enumerate(("", "_reverse")[:count]):
        tensors = {f"weight_ih{end}": weight[i], f"weight_hh{end}": recurrent[i]}
        if bias is not None:
            tensors |= dict(zip((f"bias_ih{end}", f"bias_hh{end}"), np.split(bias[i], 2), strict=True))
        fill(module, **{k: Known((_ordered(v, gates),)) for k, v in tensors.items()})
    if batch_first:
        x = reading.call(torch.transpose, x, 0, 1)
    _check_lengths(node, x)
    states = [_state(node, reading, i, x, count, size, batch_first) for i in _STATES[node.operator]]
    if direction == "reverse":
        x = reading.call(torch.flip, x, (0,))
    y, *last = reading.parts(reading.layer(node, module, x, *_trimmed(states)))
    if direction == "reverse":
        y = reading.call(torch.flip, y, (0,))
    y = reading.call(torch.unflatten, y, 2, (count, size))
    y = reading.call(torch.permute, y, (1, 0, 2, 3) if batch_first else (0, 2, 1, 3))
    if batch_first:
        last = [reading.call(torch.transpose, s, 0, 1) for s in last]
    return (y, *last)


def _check(node: Node, direction: str, size: int) -> None:
    """Refuse what torch's layers do not compute."""
    if direction not in ("forward", "reverse", "bidirectional") or not 0 < size <= _MOST:
        raise node.refusal(f"direction {direction!r} of {size}", "a layer", "the file is not valid ONNX")
    own = _ACTIVATIONS[node.operator]
    activations = node.words("activations") or own
    if tuple(a.capitalize() for a in activations) not in (own, own * 2):
        raise node.refusal(f"activations {activations}", f"{own}", "torch's layer has no others")
    if node.has("clip"):
        raise node.refusal("clip", "none", "torch's layer does not clip")
    if node.operator == "LSTM":
        node.only("input_forget", 0, 0)
        peepholes = node.constant(7, "peepholes")
        if peepholes is not None and peepholes.array.any():
            raise node.refusal("peepholes", "none", "torch's layer has none")
    elif node.integer("linear_before_reset", 0) != 1:
        raise node.refusal(
            "linear_before_reset=0", "1", "torch's layer applies the gate behind the matrix; train it so"
        )


def _weight(node: Node, index: int, shape: tuple[int, ...]) -> Array:
    value = node.constant(index, "a weight")
    if value is None or value.array.shape != shape:
        found = "none" if value is None else value.array.shape
        raise node.refusal(f"input {index}: {found}", f"{shape}", "the file is not valid ONNX")
    return value.array


def _ordered(rows: Array, gates: tuple[int, ...]) -> Array:
    pieces = np.split(rows, len(gates))
    return np.concatenate([pieces[g] for g in gates])


def _check_lengths(node: Node, x: Made) -> None:
    lengths = node.known(4, "lengths of sequences")
    if lengths is not None and any((v != s[0]).any() for v, s in zip(lengths.values, x.shapes, strict=True)):
        raise node.refusal("shorter sequences", "whole ones", "torch's layer runs over all of them")


def _state(
    node: Node, reading: Reading, index: int, x: Made, count: int, size: int, batch_first: bool
) -> Made | None:
    """A state to begin with, one a sample; None for zeros."""
    value = node.optional(index)
    if value is None or isinstance(value, Known) and not any(v.any() for v in value.values):
        return None
    state = reading.tensor(value)
    if batch_first:
        state = reading.call(torch.transpose, state, 0, 1)
    return expanded(reading, state, [(count, s[1], size) for s in x.shapes])


def _trimmed(states: list[Made | None]) -> list[Any]:
    while states and states[-1] is None:
        states.pop()
    return states


# ---- writing

_ROWS = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
"""The rows of the file's gates among those of torch: i f g o becomes i o f c, and r z n becomes z r h."""


@writes("lstm", "gru")
def write_layer(writing: Writing, x: Wire, hidden: Any = None, cell: Any = None, module: Any = None) -> Any:
    """One layer of ours."""
    kind = "LSTM" if isinstance(module, LstmLayer) else "GRU"
    ends = ("", "_reverse") if module.bidirectional else ("",)
    tensors = [[getattr(module, name + end) for end in ends] for name in _tensors(module.bias)]
    states = [hidden, cell] if kind == "LSTM" else [hidden]
    y, *last = _written(writing, kind, x, tensors, states, module.hidden_size)
    return (y, *last)


@writes("LSTM", "GRU")
def write_torch(writing: Writing, input: Wire, hx: Any = None, module: Any = None) -> Any:
    """torch's layers, one behind the other."""
    if not isinstance(input, Wire) or input.rank != 3:
        raise NoRow("one sample without a batch")
    if module.proj_size:
        raise NoRow("proj_size")
    kind, count = writing.operator, 2 if module.bidirectional else 1
    given = [] if hx is None else list(hx) if kind == "LSTM" else [hx]
    value: Any = writing.op("Transpose", input, perm=[1, 0, 2]) if module.batch_first else input
    last: list[list[str]] = []
    for layer in range(module.num_layers):
        ends = [f"_l{layer}{end}" for end in ("", "_reverse")[:count]]
        tensors = [[getattr(module, name + end) for end in ends] for name in _tensors(module.bias)]
        at = [writing.ints(n) for n in (layer * count, (layer + 1) * count, 0)]
        states = [s if module.num_layers == 1 else writing.op("Slice", s, *at) for s in given]
        value, *ending = _written(writing, kind, value, tensors, states, module.hidden_size)
        last.append(ending)
    if module.batch_first:
        value = writing.op("Transpose", value, perm=[1, 0, 2])
    ends_of = [p[0] if len(p) == 1 else writing.op("Concat", *p, axis=0) for p in zip(*last, strict=True)]
    return value, tuple(ends_of) if kind == "LSTM" else ends_of[0]


def _tensors(bias: bool) -> tuple[str, ...]:
    return ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if bias else ()))


def _written(
    writing: Writing, kind: str, x: Any, tensors: list[list[Tensor]], states: list[Any], size: int
) -> tuple[str, ...]:
    """A node; its outputs with the directions side by side, and its last states."""
    ordered = [torch.stack([_by_gate(t, kind) for t in ends]) for ends in tensors]
    weights = [writing.store(t, name) for t, name in zip(ordered[:2], _tensors(False), strict=True)]
    bias = writing.store(torch.cat(ordered[2:], 1), "bias") if len(ordered) > 2 else None
    count = len(tensors[0])
    names = writing.several(
        kind, 1 + len(_STATES[kind]), x, *weights, bias, None, *states, hidden_size=size,
        direction="bidirectional" if count == 2 else None,
        linear_before_reset=1 if kind == "GRU" else None,
    )  # fmt: skip
    y = writing.op("Transpose", names[0], perm=[0, 2, 1, 3])
    return (writing.op("Reshape", y, writing.ints(0, 0, count * size)), *names[1:])


def _by_gate(rows: Tensor, kind: str) -> Tensor:
    pieces = rows.detach().chunk(len(_ROWS[kind]))
    return torch.cat([pieces[i] for i in _ROWS[kind]])
