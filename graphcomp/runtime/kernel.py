"""One operator, timed as it runs inside a network.

    trunk --> operator --> sink        K copies of the operator, each with weights and a sink of its own
    ms = (time with the operators - time with the sinks alone) / K

The trunk is a convolution of one input channel: it leaves its result in the layout that convolutions hand to
each other, so that no border of the network is paid for. The sink is a pooling that looks at one position and
costs next to nothing in that layout. K is larger for small operators, whose time would drown in the noise.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto

from graphcomp.base import distributed
from graphcomp.errors import BenchError
from graphcomp.runtime.providers import Provider
from graphcomp.runtime.turns import race

Feeds = Mapping[str, NDArray[Any]]
Timer = Callable[[Sequence[bytes], Feeds], list[float]]
"""Median ms of several ONNX models that take the same inputs, run in turn; `runtime.turns.race` is one."""

GATES = {"lstm": 4, "gru": 3}
"""Recurrent operators -> rows of their weights for each of their units."""

COPIES, WORK = 8, 2e8
"""At most so many copies of an operator, or as many as make this much work (MACs)."""

RUNS, SECONDS = 16, 1.0
"""Of each model, or seconds for all, whichever ends first: an operator is one term of a sum of many."""


@dataclass(frozen=True)
class Kernel:
    """An operator, all but its widths.

    Attributes:
        op: conv, depthwise or linear; add, mul, scale (by one number a channel), concat, move (a selection of
            channels), norm, max_pool, avg_pool, or the name of an activation; lstm or gru: what one direction
            of a recurrent layer does step by step, the product with all inputs being a linear one in front.
        plane: spatial sizes of the input; of a linear layer the tokens, () if there is one; steps of time.
        size, stride, dilation: of the window, by dimension; empty where there is none.
        pads: in front by dimension, then behind.
        groups: of a convolution; 1 for depthwise ones, whose groups are their channels.
        activation: behind it, computed inside of it if the runtime can; "" for none, or one at no cost.
    """

    op: str
    plane: tuple[int, ...]
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    groups: int = 1
    activation: str = ""

    @property
    def is_square(self) -> bool:
        """Whether as many channels go out as come in."""
        return self.op not in ("conv", "linear")

    @property
    def out_plane(self) -> tuple[int, ...]:
        """Spatial sizes of the output."""
        if not self.size:
            return self.plane
        rank = len(self.plane)
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.size, strict=True)]
        padded = [p + self.pads[i] + self.pads[i + rank] for i, p in enumerate(self.plane)]
        return tuple((p - s) // t + 1 for p, s, t in zip(padded, spans, self.stride, strict=True))

    def work(self, into: int, out: int) -> int:
        """About how many multiply-accumulates it takes."""
        each = math.prod(self.size) * (1 if self.is_square else into // self.groups)
        each *= GATES.get(self.op, 0) * into or 1
        return math.prod(self.out_plane) * out * each

    def describe(self) -> str:
        """In the words of a printed program, e.g. `conv k3 s1 @ 56x56`."""
        words = [self.op]
        if self.size and self.op != "linear":
            words += [f"k{'x'.join(map(str, dict.fromkeys(self.size)))}", f"s{self.stride[0]}"]
        words += [f"g{self.groups}"] if self.groups > 1 else []
        words += ["+", self.activation] if self.activation else []
        return " ".join([*words, "@", "x".join(map(str, self.plane)) or "1"])

    def json(self) -> str:
        """For keys of a cache."""
        return json.dumps(asdict(self), sort_keys=True)


def race_timer(
    provider: Provider,
    threads: int,
    runs: int = RUNS,
    seconds: float = SECONDS,
    loads: int = 1,
    cold: int = 0,
) -> Timer:
    """The timer that measures here. ProviderError, when it is called, if the provider does not work.

    Before every run `cold` bytes of other memory are read: a network reads so much before it comes back to
    the same weights, and what is left in the caches of what was read before is what it finds there.
    """
    elsewhere = np.ones(cold // 4, np.float32)

    def timer(models: Sequence[bytes], feeds: Feeds) -> list[float]:
        return race(
            models,
            feeds,
            provider,
            threads,
            runs=runs,
            seconds=seconds,
            loads=loads,
            before_each=elsewhere.sum,
        )

    return timer


def measure(kernel: Kernel, into: int, out: int, timer: Timer) -> float:
    """Milliseconds of one operator with so many channels in and out, at batch 1.

    Raises:
        BenchError: if the widths do not fit the kernel's groups, or the timer's error.
    """
    if min(into, out) < 1 or into % kernel.groups or out % kernel.groups:
        raise BenchError(
            f"{kernel.describe()}: found widths {into} and {out}, expected positive multiples of "
            f"{kernel.groups}"
        )
    distributed.require_first("microbenchmark")
    copies = max(1, min(COPIES, math.ceil(WORK / max(kernel.work(into, out), 1))))
    base, full = (build(kernel, into, out, copies, with_operator=w) for w in (False, True))
    before, after = timer([base.SerializeToString(), full.SerializeToString()], _feeds(kernel, into))
    return max(after - before, 1e-6) / copies  # noise may exceed the time of an operator that costs nothing


def build(kernel: Kernel, into: int, out: int, copies: int, *, with_operator: bool) -> ModelProto:
    """The network that is timed: with the operators, or what is left without them."""
    graph = _Graph(_feeds(kernel, into)["x"].shape)
    trunk = graph.trunk(into) if _is_blocked(kernel) else graph.x
    if kernel.op in FRESH and _is_blocked(kernel):
        graph.sink(trunk, kernel.plane, copies, True)  # or the runtime drops it where nothing else reads it
    for copy in range(copies):
        value = trunk
        if kernel.op in FRESH:  # of its own producer, which may fuse it, and equal copies are not merged
            value = graph.trunk(into)
        if with_operator:
            value = graph.operator(kernel, value, trunk, into, out)
            value = graph.activation(kernel.activation, value) if kernel.activation else value
        graph.sink(value, kernel.out_plane if with_operator else kernel.plane, copy, _is_blocked(kernel))
    return cast(ModelProto, gs.export_onnx(graph, ir_version=8))


def _is_blocked(kernel: Kernel) -> bool:
    """Only images have a layout of their own."""
    return len(kernel.plane) == 2 and kernel.op != "linear"


def _feeds(kernel: Kernel, into: int) -> dict[str, NDArray[Any]]:
    if kernel.op == "linear":
        shape = (1, *kernel.plane, into)
    elif kernel.op in GATES:
        shape = (*kernel.plane, 1, 1)
    else:
        shape = (1, 1 if _is_blocked(kernel) else into, *kernel.plane)
    return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "relu": ("Relu",),
    "relu6": ("Clip",),
    "leaky_relu": ("LeakyRelu",),
    "sigmoid": ("Sigmoid",),
    "tanh": ("Tanh",),
    "hardsigmoid": ("HardSigmoid",),
    "elu": ("Elu",),
    "silu": ("Sigmoid", "Mul"),
    "hardswish": ("HardSigmoid", "Mul"),
    "gelu": ("Erf", "Mul"),
}
"""Name -> ONNX operators that it becomes; `Mul` multiplies by what the activation was given."""

CLIP = [np.array(limit, np.float32) for limit in (0, 6)]

FRESH = {*ACTIVATIONS, "add", "mul", "scale", "concat", "move", "max_pool", "avg_pool"}


class _Graph(gs.Graph):  # type: ignore[misc]
    """An ONNX graph that grows."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.x = gs.Variable("x", np.float32, shape)
        super().__init__(inputs=[self.x], opset=18)
        self.rng = np.random.default_rng(0)

    def add(self, op: str, *inputs: Any, **attributes: Any) -> gs.Variable:
        """A node's result; arrays among the inputs become constants."""
        return self.layer(list(inputs), ["t"], op=op, attrs=attributes)[0]

    def weight(self, *shape: int) -> NDArray[np.float32]:
        return self.rng.uniform(0.01, 0.1, shape).astype(np.float32)

    def trunk(self, width: int) -> gs.Variable:
        return self.add("Conv", self.x, self.weight(width, 1, 1, 1), kernel_shape=[1, 1])

    def sink(self, value: gs.Variable, plane: Sequence[int], copy: int, is_blocked: bool) -> None:
        if is_blocked:
            strides = [plane[0] + copy, plane[1]]  # equal sinks of one trunk would become one
            value = self.add("MaxPool", value, kernel_shape=[1, 1], strides=strides)
        elif value is self.x:
            value = self.add("Identity", value)
        value.dtype = np.float32
        self.outputs.append(value)

    def operator(
        self, kernel: Kernel, value: gs.Variable, trunk: gs.Variable, into: int, out: int
    ) -> gs.Variable:
        if kernel.op in ("conv", "depthwise"):
            groups = into if kernel.op == "depthwise" else kernel.groups
            weight, bias = self.weight(out, into // groups, *kernel.size), self.weight(out)
            return self.add(
                "Conv", value, weight, bias, group=groups, **_window(kernel), dilations=kernel.dilation
            )
        if kernel.op == "linear" and kernel.plane:
            return self.add("MatMul", value, self.weight(into, out))
        if kernel.op == "linear":
            return self.add("Gemm", value, self.weight(out, into), self.weight(out), transB=1)
        if kernel.op in GATES:
            rows, said = GATES[kernel.op] * out, {"linear_before_reset": 1} if kernel.op == "gru" else {}
            weights = self.weight(1, rows, 1), self.weight(1, rows, out), self.weight(1, 2 * rows)
            return self.add(kernel.op.upper(), value, *weights, hidden_size=out, **said)
        if kernel.op == "norm":
            return self.add("BatchNormalization", value, *(self.weight(into) for _ in range(4)))
        if kernel.op == "max_pool":
            return self.add("MaxPool", value, **_window(kernel))
        if kernel.op == "avg_pool":
            return self.add("AveragePool", value, **_window(kernel))
        if kernel.op in ("add", "mul"):
            return self.add(kernel.op.capitalize(), value, trunk)
        if kernel.op == "scale":
            return self.add("Mul", value, self.weight(1, into, 1, 1))
        if kernel.op == "concat":
            return self.add("Concat", value, trunk, axis=1)
        if kernel.op == "move":
            return self.add("Gather", value, np.arange(into)[::-1].copy(), axis=1)
        return self.activation(kernel.op, value)

    def activation(self, name: str, value: gs.Variable) -> gs.Variable:
        result = value
        for op in ACTIVATIONS[name]:
            more = [value] if op == "Mul" else CLIP if op == "Clip" else []
            result = self.add(op, result, *more)
        return result


def _window(kernel: Kernel) -> dict[str, tuple[int, ...]]:
    return {"kernel_shape": kernel.size, "strides": kernel.stride, "pads": kernel.pads}
