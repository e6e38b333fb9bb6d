"""What a network costs in time: predicted from operators that were measured one by one on this machine.

Every kernel (operator, window, stride, groups, plane) is measured at a few widths around those that the
network has, kept on disk, and fitted (`budget.kernel_fit`).

Besides convolutions and linear layers, operators that move as much memory are counted: additions, unfused
activations and normalisations, pooling, concatenations, selections. What is fused is measured together with
what it is fused into: a ReLU costs nothing there, a ReLU6 up to as much as the convolution. Operators are
measured as networks find them, after other weights and activations went through the caches. Time at batch
1, of the whole computation but not of its borders: a network predicted at 1 ms may run in 1.05 ms, and ratios
are what predictions are for.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from graphcomp.base import Progress, cache, quiet
from graphcomp.budget.calls import Operator, calls
from graphcomp.budget.kernel_fit import Fit, KernelForm, Point, Points, computed, design, fit, form_of
from graphcomp.ir import Program
from graphcomp.runtime import HOST, Kernel, Target, Timer, environment, measure, race_timer

MEASURING = "graphcomp.runtime.kernel"
"""The module that measured times are kept by: how they are fitted does not change them."""

CACHES = 32 << 20
"""Bytes; more than any core's own caches, and about what it gets of a shared one."""


def cold_bytes(program: Program, target: Target) -> int:
    """How much other memory a network reads between two uses of a weight, as a power of two; 0 on a GPU."""
    size = sum(t.numel() * 4 for t in program.tensors.values())
    return min(CACHES, 1 << size.bit_length()) if target.provider in HOST and size >= 1 << 20 else 0


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
