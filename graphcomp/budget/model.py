"""What a network costs in time: predicted from operators that were measured one by one on this machine.

    ms(kernel, x, y) = a + b x + c y + d x y      x, y: channels in and out, rounded up to what is computed

Every kernel (operator, window, stride, groups, plane) is measured at a few widths around those that the
network has, kept on disk, and fitted with a, b, c, d >= 0 (least squares of relative errors): a prediction
never falls when a width rises. Rounding follows the runtime: on CPUs MLAS computes whole blocks of channels
(`Target.multiple`), reads images of few channels as they are, and leaves its blocked layout where the number
of input channels is not a multiple of 4, or where groups do not fill their blocks. Linear layers are not
rounded.

Besides convolutions and linear layers, operators that move as much memory are counted: additions, unfused
activations and normalisations, pooling, concatenations, selections. What is fused is measured together with
what it is fused into: a ReLU costs nothing there, a ReLU6 up to as much as the convolution. Operators are
measured as networks find them, after other weights and activations went through the caches. Time at batch
1, of the whole computation but not of its borders: a network predicted at 1 ms may run in 1.05 ms, and ratios
are what predictions are for.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, fx

from graphcomp.base import Progress, cache, quiet
from graphcomp.channels import CONCATENATIONS, Channels, Drop, Ints, compact, live_of, no_drop
from graphcomp.ir import Program, op_name
from graphcomp.measure import layer_row
from graphcomp.runtime import ACTIVATIONS, Kernel, Target, Timer, environment, measure, race_timer

KernelForm = Literal["blocked", "direct", "plain"]
Operator = tuple[Kernel, int, int]
"""With its channels in and out."""

Point = tuple[int, int]
"""Channels in and out."""

Points = Mapping[Point, float]
"""Milliseconds of a kernel by its channels in and out."""

Marks = NDArray[np.bool_]
"""Of operators, in their order."""

NOISE = 0.05
"""Of the largest time of a kernel: smaller ones are not known better than this, and must not bend the fit."""

MEASURING = "graphcomp.runtime.kernel"
"""The module that measured times are kept by: how they are fitted does not change them."""

MOST_POINTS = 9
"""That a kernel is measured at: a fit has four coefficients."""


@dataclass(frozen=True)
class Call:
    """One operator of a network with its widths."""

    node: fx.Node
    source: fx.Node
    kernel: Kernel
    into: int
    out: int

    @property
    def operator(self) -> Operator:
        """Without its place."""
        return self.kernel, self.into, self.out


# ---------------------------------------------------------------------- the operators of a network

LIGHT_OPS = {
    "add": "add",
    "sub": "add",
    "mul": "mul",
    **dict.fromkeys(CONCATENATIONS, "concat"),
    **dict.fromkeys(["index_select", "pad", "channel_shuffle"], "move"),
    **dict.fromkeys(["transpose", "permute"], "shuffle"),
    **dict.fromkeys(["max_pool2d", "adaptive_max_pool2d"], "max_pool"),
    **dict.fromkeys(["avg_pool2d", "adaptive_avg_pool2d", "mean"], "avg_pool"),
    "batch_norm": "norm",
}
"""Operators without multiplications, by the name that `ir.operators` gives them."""
FUSABLE = {"relu", "relu6", "leaky_relu", "sigmoid", "tanh", "hardsigmoid"}
"""Activations that the runtime computes inside the convolution, addition or normalisation in front."""
FREE = {"relu"}
"""Those that its kernels compute before they store a result; the others go over what was stored once more."""


def calls(program: Program) -> list[Call]:
    """Every operator of a network that takes time, in the order of the graph."""
    found = []
    for node in program.graph.nodes:
        call = _layer_call(program, node) or _light_call(program, node)
        if call is not None:
            kernel = replace(call.kernel, activation=_activation(program, node))
            found.append(replace(call, kernel=kernel))
    return found


def _layer_call(program: Program, node: fx.Node) -> Call | None:
    row = layer_row(program, node)
    if row is None:
        return None
    source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
    before, after = program.shape(source) or (), program.shape(node) or ()
    if not row.kernel:
        return Call(node, source, Kernel("linear", tuple(before[1:-1])), row.in_channels, row.out_channels)
    rank = len(row.kernel)
    is_transposed = "transpose" in row.kind.lower()
    if is_transposed:  # the adjoint of a convolution from its output to its input, as much work
        before, after = after, before
    into, out = (row.in_channels, row.out_channels) if not is_transposed else (
        row.out_channels,
        row.in_channels,
    )  # fmt: skip
    module = program.modules.get(str(node.target)) if node.op == "call_module" else None
    depthwise = row.groups > 1 and row.groups == into == out
    kernel = _windowed(
        "depthwise" if depthwise else "conv", before[-rank:], after[-rank:], row.kernel,
        getattr(module, "stride", None), getattr(module, "dilation", None), 1 if depthwise else row.groups,
    )  # fmt: skip
    return Call(node, source, kernel, into, out)


def _windowed(
    op: str,
    before: Sequence[int],
    after: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int] | None,
    dilation: Sequence[int] | None,
    groups: int = 1,
) -> Kernel:
    """Padding follows from the two planes, so that it need not be understood."""
    steps = (
        tuple(stride) if stride else tuple(max(1, round(b / a)) for b, a in zip(before, after, strict=True))
    )
    gaps = tuple(dilation) if dilation else (1,) * len(size)
    total = [
        max(0, (a - 1) * s + d * (k - 1) + 1 - b)
        for b, a, k, s, d in zip(before, after, size, steps, gaps, strict=True)
    ]
    pads = (*(t // 2 for t in total), *(t - t // 2 for t in total))
    return Kernel(op, tuple(before), tuple(size), steps, gaps, pads, groups)


def _light_call(program: Program, node: fx.Node) -> Call | None:
    op, shape = _light_op(program, node), program.shape(node)
    if op is None or shape is None:
        return None
    source = node.all_input_nodes[0]
    before = tuple(program.shape(source) or ())
    if op == "shuffle":  # of an image whose channels were split in two
        op, before = "move", (before[0], math.prod(before[1:3]), *before[3:]) if len(before) == 5 else ()
    if len(before) != 4:  # what is not an image is small
        return None
    plane = tuple(before[2:])
    if op in ("max_pool", "avg_pool"):
        after = tuple(shape[2:]) if len(shape) == 4 else (1, 1)
        return Call(node, source, _pool(program, node, op, plane, after), before[1], before[1])
    if op in ("add", "mul", "concat"):
        operands: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), operands.append)
        images = [s for n in operands if (s := program.shape(n)) is not None and len(s) == 4]
        if len(images) < 2:
            return None
        planes = {s[2:] for s in images}
        plane = max(planes, key=math.prod)
        op = "scale" if op == "mul" and len(planes) > 1 else op
        return Call(node, node, Kernel(op, plane), shape[1], shape[1])
    return Call(node, source, Kernel(op, plane), before[1], before[1])


def _light_op(program: Program, node: fx.Node) -> str | None:
    """Its name, if it is known and not fused into what is in front of it."""
    op = _op(program, node)
    if op is None or not node.all_input_nodes:
        return None
    if (op == "norm" and _is_folded(program, node)) or _is_absorbed(program, node):
        return None
    return op


def _op(program: Program, node: fx.Node) -> str | None:
    """The name that an operator without multiplications has here, if it is known."""
    name = op_name(program, node)
    return LIGHT_OPS.get(name, name if name in ACTIVATIONS else None)


def _activation(program: Program, node: fx.Node) -> str:
    """The activation that is computed as part of `node` and takes time; "" if there is none."""
    after = next(iter(node.users), None)
    if after is None:
        return ""
    op = _op(program, after)
    if op == "norm" and _is_folded(program, after):
        return _activation(program, after)
    return op if op is not None and op not in FREE and _is_absorbed(program, after) else ""


def _is_absorbed(program: Program, node: fx.Node) -> bool:
    """Whether `node` is an activation that is computed as part of what is in front of it."""
    before = next(iter(node.all_input_nodes), None)
    if before is None or _op(program, node) not in FUSABLE:
        return False
    return len(before.users) == 1 and _can_absorb(program, before)


def _is_folded(program: Program, norm: fx.Node) -> bool:
    """Whether a normalisation becomes part of the convolution in front of it."""
    before = norm.all_input_nodes[0]
    return len(before.users) == 1 and layer_row(program, before) is not None


def _can_absorb(program: Program, node: fx.Node) -> bool:
    """Whether an activation behind `node` is computed as part of it."""
    return layer_row(program, node) is not None or _op(program, node) in ("add", "norm")


def _window(program: Program, node: fx.Node) -> tuple[Any, Any]:
    """Size and stride of a pooling in either form; None where it has none."""
    if node.op == "call_module":
        module = program.layer(cast(str, node.target))
        return getattr(module, "kernel_size", None), getattr(module, "stride", None)
    if op_name(program, node) not in ("max_pool2d", "avg_pool2d"):
        return None, None
    given = dict(zip(("kernel_size", "stride"), node.args[1:], strict=False)) | node.kwargs
    given = fx.node.map_arg(given, program.values.__getitem__)
    return given.get("kernel_size"), given.get("stride")


def _pool(program: Program, node: fx.Node, op: str, before: Sequence[int], after: Sequence[int]) -> Kernel:
    size, stride = _window(program, node)
    if size is None:  # adaptive, or a mean: windows that tile the plane
        stride = tuple(max(1, b // a) for b, a in zip(before, after, strict=True))
        size = tuple(b - (a - 1) * s for b, a, s in zip(before, after, stride, strict=True))
    size, stride = ((v, v) if isinstance(v, int) else tuple(v) for v in (size, stride or size))
    return _windowed(op, before, after, size, stride, None)


# ---------------------------------------------------------------------- what is computed for a width


def form_of(kernel: Kernel, into: int, out: int, target: Target) -> KernelForm:
    """In which way the runtime computes this (the rules of ONNX Runtime's NCHWc transformer, on CPUs)."""
    if target.provider != "cpu":
        return "blocked"
    if kernel.op == "linear" or len(kernel.plane) != 2:
        return "plain"
    if kernel.op != "conv":
        return "blocked" if into % 4 == 0 else "plain"
    if kernel.groups > 1:
        fills = not (into // kernel.groups % target.multiple or out // kernel.groups % target.multiple)
        return "blocked" if fills else "plain"
    if into < target.multiple:
        return "direct"
    return "blocked" if into % 4 == 0 else "plain"


def computed(form: KernelForm, into: int, out: int, multiple: int) -> Point:
    """The widths that time is paid for: whole blocks of outputs, and of inputs if not read directly."""
    if form == "plain":
        return into, out
    return into if form == "direct" else _ceil(into, multiple), _ceil(out, multiple)


def _ceil(width: int, multiple: int) -> int:
    return math.ceil(width / multiple) * multiple


# ---------------------------------------------------------------------- the fit


@dataclass(frozen=True)
class Fit:
    """`ms(x, y) = a + b x + c y + d x y`, all coefficients at least 0."""

    coefficients: tuple[float, float, float, float]

    def __call__(self, x: float, y: float) -> float:
        """Milliseconds at the widths that are computed."""
        a, b, c, d = self.coefficients
        return a + b * x + c * y + d * x * y


def fit(points: Points) -> Fit:
    """Least squares of relative errors, exact if the points are of this form."""
    places = np.array(list(points), np.float64)
    times = np.array(list(points.values()))
    scale = places.max(0)
    x, y = (places / scale).T
    scatter = np.maximum(times, NOISE * times.max())[:, None]
    terms = np.stack([np.ones_like(x), x, y, x * y], 1) / scatter
    found, _ = nnls(terms, times / scatter[:, 0])
    a, b, c, d = found
    return Fit((float(a), float(b / scale[0]), float(c / scale[1]), float(d / scale[0] / scale[1])))


def design(widths: Iterable[Point], steps: Point, is_square: bool) -> list[Point]:
    """Where to measure a kernel: at widths that the network has, and at half of them in either direction.

    Args:
        widths: that are needed, as computed.
        steps: what widths are multiples of.
        is_square: both are always the same.
    """
    wanted = set()
    for x, y in widths:
        low = tuple(max(s, _ceil(w // 2, s)) for w, s in zip((x, y), steps, strict=True))
        if is_square:
            wanted |= {(x, x), (low[0], low[0])}
        else:
            wanted |= {(a, b) for a in (x, low[0]) for b in (y, low[1])}
    ordered = sorted(wanted, key=lambda p: (p[0] * p[1], p))
    if len(ordered) <= MOST_POINTS:
        return ordered
    return [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, MOST_POINTS)]


# ---------------------------------------------------------------------- the model

CACHES = 32 << 20
"""Bytes; more than any core's own caches, and about what it gets of a shared one."""


def cold_bytes(program: Program, target: Target) -> int:
    """How much other memory a network reads between two uses of a weight, as a power of two; 0 on a GPU."""
    size = sum(t.numel() * 4 for t in program.tensors.values())
    return min(CACHES, 1 << size.bit_length()) if target.provider == "cpu" and size >= 1 << 20 else 0


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicts the time of networks on a target, measuring what it does not know yet.

    Attributes:
        target: where the network will run; its provider has to work here.
        threads: intra-op threads.
        timer: measures ONNX models; the default races them on the target's provider.
        progress: told what is being measured.
        cold: see `runtime.kernel.race_timer`; `cold_bytes` of a network.
        memory: what models of the same timer measured before, by content; read and extended.
    """

    target: Target
    threads: int = 1
    timer: Timer | None = None
    progress: Progress = quiet
    cold: int = 0
    memory: MutableMapping[str, Points] = field(default_factory=dict, repr=False)
    _fits: dict[tuple[Kernel, KernelForm], Fit] = field(default_factory=dict)
    _points: dict[tuple[Kernel, KernelForm], Points] = field(default_factory=dict)
    _widths: dict[tuple[Kernel, KernelForm], set[Point]] = field(default_factory=lambda: defaultdict(set))

    def predict(self, program: Program) -> float:
        """Milliseconds of a network at batch 1. ProviderError or BenchError if it cannot be measured here."""
        found = calls(program)
        self.prepare(call.operator for call in found)
        return sum(self.milliseconds(*call.operator) for call in found)

    def prepare(self, operators: Iterable[Operator]) -> None:
        """Measure what these need, all of a kernel's widths together: the widest that will be asked for."""
        wanted: dict[tuple[Kernel, KernelForm], set[Point]] = defaultdict(set)
        for kernel, into, out in operators:
            form = form_of(kernel, into, out, self.target)
            wanted[kernel, form].add(computed(form, into, out, self.target.multiple))
        for index, ((kernel, form), widths) in enumerate(wanted.items()):
            self.progress(f"measure {kernel.describe()}", index / len(wanted))
            self._learn(kernel, form, widths)

    def milliseconds(self, kernel: Kernel, into: int, out: int) -> float:
        """Predicted time of one operator; 0 of one without channels."""
        if min(into, out) < 1:
            return 0.0
        form = form_of(kernel, into, out, self.target)
        x, y = computed(form, into, out, self.target.multiple)
        if not any(x <= a and y <= b for a, b in self._widths[kernel, form]):  # nothing is extrapolated
            self._learn(kernel, form, {(x, y)})
        return self._fits[kernel, form](x, y)

    def measured(self, kernel: Kernel, into: int, out: int) -> float:
        """Milliseconds of one operator, measured now; what predictions are compared with."""
        return self._measure(kernel, (into, out))

    def points(self, kernel: Kernel, form: KernelForm) -> Points:
        """What was measured: widths -> ms."""
        return self._points.get((kernel, form), {})

    def _learn(self, kernel: Kernel, form: KernelForm, widths: set[Point]) -> None:
        """Fit a kernel from what is on disk and what has to be measured for these widths."""
        if widths <= self._widths[kernel, form]:
            return
        self._widths[kernel, form] |= widths
        known = self._points.get((kernel, form)) or self._load(kernel, form)
        steps = self._steps(kernel, form)
        new = [p for p in design(widths, steps, kernel.is_square) if p not in known]
        measured = {p: self._measure(kernel, p) for p in new}
        known = {**known, **measured}
        if measured:
            self._store(kernel, form, known)
        self._points[kernel, form] = known
        self._fits[kernel, form] = fit(known)

    def _steps(self, kernel: Kernel, form: KernelForm) -> Point:
        """Widths to measure at must be of the form that they stand for."""
        multiple, groups = self.target.multiple, kernel.groups
        if form == "plain":
            return groups, groups
        return groups if form == "direct" else math.lcm(multiple, groups), math.lcm(multiple, groups)

    def _measure(self, kernel: Kernel, point: Point) -> float:
        return measure(kernel, *point, timer=self._timer)

    @cached_property
    def _timer(self) -> Timer:
        return self.timer or race_timer(self.target.provider, self.threads, cold=self.cold)

    def _key(self, kernel: Kernel, form: KernelForm) -> str:
        here = environment()
        return cache.key(
            MEASURING,
            kernel=kernel.json(),
            form=form,
            provider=self.target.provider,
            threads=self.threads,
            multiple=self.target.multiple,
            cold=self.cold,
            machine=[here.cpu, here.isa, here.platform, here.cores],
            runtime=here.versions,
        )

    def _load(self, kernel: Kernel, form: KernelForm) -> Points:
        key = self._key(kernel, form)
        if key in self.memory:
            return self.memory[key]
        stored = cache.load("latency", key)
        if stored is None:
            return {}
        pairs = zip(stored["widths"].tolist(), stored["ms"].tolist(), strict=True)
        return {(x, y): ms for (x, y), ms in pairs}

    def _store(self, kernel: Kernel, form: KernelForm, points: Points) -> None:
        key = self._key(kernel, form)
        self.memory[key] = points
        widths, times = torch.tensor(list(points)), torch.tensor(list(points.values()), dtype=torch.float64)
        cache.store("latency", key, {"widths": widths, "ms": times})


# ---------------------------------------------------------------------- after a removal


class Remaining:
    """The operators of a program after a removal, from its labels alone."""

    def __init__(self, channels: Channels) -> None:
        self.live = live_of(channels)
        self.calls = calls(channels.program)
        self.joins = [(j, _plane(channels, j.node)) for j in channels.joins]
        self._of: dict[fx.Node, tuple[NDArray[Any], NDArray[Any]]] = {}
        for call in self.calls:
            for node in (call.node, call.source):
                if node not in self._of:
                    self._of[node] = _channel_shares(channels, node)

    def operators(self, drop: Drop) -> list[Operator | None]:
        """Every call with the widths that stay, then every join; None for one that costs nothing."""
        left = {node: 1 - float(drop[ids] @ share) for node, (ids, share) in self._of.items()}
        idle = self.live.idle(drop)
        found: list[Operator | None] = []
        for call in self.calls:
            if idle[self.live.index[call.node]]:
                found.append(None)
                continue
            into, out = round(call.into * left[call.source]), round(call.out * left[call.node])
            if call.kernel.is_square:
                into = out = max(into, out)
            found.append((call.kernel, into, out))
        return found + [part for join, plane in self.joins for part in self._selections(join, plane, drop)]

    def touching(self, members: Ints) -> Marks:
        """Which of them read or make any of these channels; in the order of `operators`."""
        holds = {node: bool(np.isin(ids, members).any()) for node, (ids, _) in self._of.items()}
        found = [holds[call.source] or holds[call.node] for call in self.calls]
        found += [bool(np.isin(ids, members).any()) for join, _ in self.joins for ids in join.operands]
        return np.array(found)

    def widest(self) -> list[Operator]:
        """All that can be asked for at their full widths."""
        selections = [_selection(join.node, plane, len(join.result)) for join, plane in self.joins]
        return [call.operator for call in (*self.calls, *selections) if call is not None]

    def _selections(self, join: Any, plane: tuple[int, ...] | None, drop: Drop) -> list[Operator | None]:
        """Zeros that are put back where one operand of an addition has lost what the other keeps."""
        kept = ~drop[join.result]
        call = _selection(join.node, plane, int(kept.sum()))
        padded = [bool((drop[operand] & kept).any()) for operand in join.operands]
        return [call.operator if call is not None and p else None for p in padded]


class LatencyCost:
    """Predicted milliseconds of a program after a removal.

    Args:
        channels: of the program.
        model: predicts its operators.
        only: which of `Remaining.operators` to count; None: all.
    """

    def __init__(self, channels: Channels, model: LatencyModel, only: Marks | None = None) -> None:
        self.model, self.only = model, only
        self.after = Remaining(channels)
        if only is None:
            model.prepare(self.after.widest())
        else:
            model.prepare(op for op in self._counted(no_drop(channels)) if op is not None)

    def __call__(self, drop: Drop) -> float:
        """Milliseconds without the channels that go."""
        return float(self.parts(drop).sum())

    def parts(self, drop: Drop) -> NDArray[np.float64]:
        """The same by operator."""
        found = self._counted(drop)
        return np.array([0.0 if op is None else self.model.milliseconds(*op) for op in found])

    def _counted(self, drop: Drop) -> list[Operator | None]:
        found = self.after.operators(drop)
        return found if self.only is None else [op for op, use in zip(found, self.only, strict=True) if use]


def _plane(channels: Channels, node: fx.Node) -> tuple[int, ...] | None:
    shape = channels.program.shape(node)
    return tuple(shape[2:]) if shape is not None and len(shape) == 4 else None


def _selection(node: fx.Node, plane: tuple[int, ...] | None, width: int) -> Call | None:
    return None if plane is None else Call(node, node, Kernel("move", plane), width, width)


def _channel_shares(channels: Channels, node: fx.Node) -> tuple[NDArray[Any], NDArray[Any]]:
    """The channels that a node's value consists of, and what share of it each is."""
    labels = channels.values[node]
    if not isinstance(labels, Tensor):
        return np.zeros(1, np.int64), np.zeros(1)
    ids, counts = np.unique(channels.channel_of[compact(labels).flatten().numpy()], return_counts=True)
    return ids, counts / counts.sum()
