"""Which operator of the candidate answers to which of the base, and what the gap between the two is."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphcomp.errors import BenchError
from graphcomp.explanation.attribution import AttributedKernel
from graphcomp.records import ExplainedRow, PartKind

LAYOUT = frozenset(
    {"ReorderInput", "ReorderOutput", "Transpose", "Pad", "Slice", "Split", "Concat", "Reshape", "Flatten"}
    | {"Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "Squeeze", "Unsqueeze"}
    | {"Expand", "Tile", "Identity", "Cast", "MemcpyFromHost", "MemcpyToHost"}
)
"""Operators that move data and compute nothing."""


@dataclass
class _Pair:
    """Operators of the base and those that took their place."""

    base: list[AttributedKernel] = field(default_factory=list)
    new: list[AttributedKernel] = field(default_factory=list)


class Matching:
    """Rows of two lists of operators; every operator is in one row."""

    def __init__(self, base: Sequence[AttributedKernel], new: Sequence[AttributedKernel]) -> None:
        self.base, self.new = base, new
        self.heavy = [k for k in base if k.macs]
        self.inside = {s.key: (s.elements, k.made_by) for k in new for s in k.sources if s is not k.main}

    def rows(self) -> list[ExplainedRow]:
        """In the order of the candidate; what is gone comes last."""
        made = [self.heavy_row(pair) for pair in self.heavy_pairs()]
        pairs = {id(pair.new[0]): row for pair, row in made if pair.new}
        gone = [row for pair, row in made if not pair.new]
        light = _Light(self)
        rows = []
        for kernel in self.new:
            if id(kernel) in pairs:
                rows.append(pairs[id(kernel)])
            elif not kernel.macs:
                rows.append(light.row(kernel))
        return [*rows, *gone, *light.gone()]

    def heavy_pairs(self) -> list[_Pair]:
        """Multiplications by fx node where both files have it, the others by module and its factors."""
        new = [k for k in self.new if k.macs]
        keys = {_key(k): k for k in self.heavy}
        pairs = {_key(k): _Pair([keys[_key(k)]], [k]) for k in new if _key(k) in keys}
        picked = {_key(k): _Pair([], [k]) for k in new if k.selects and _key(k) not in keys}
        if not pairs and not any(_within(k, b) for k in new for b in self.heavy):
            raise BenchError(
                "layers: found none that both files have by the same name, expected exports of one network "
                "before and after; compare files that graphcomp wrote, or of one exporter"
            )
        groups: dict[str, _Pair] = defaultdict(_Pair)
        for kernel in self.heavy:
            if _key(kernel) not in pairs:
                groups[kernel.layer].base.append(kernel)
        for kernel in new:
            if _key(kernel) not in pairs | picked:
                parent = next((b.layer for b in self.heavy if _within(kernel, b)), kernel.layer)
                groups[parent].new.append(kernel)
        return [*pairs.values(), *picked.values(), *groups.values()]

    def heavy_row(self, pair: _Pair) -> tuple[_Pair, ExplainedRow]:
        """Theory by MACs, padding by what is carried out, the rest by the form."""
        base = pair.base or self.heavy
        ms, macs, computed = sum(k.ms for k in base), sum(k.macs for k in base), sum(k.computed for k in base)
        forms = {k.form for k in base}
        parts: dict[PartKind, float] = defaultdict(float)
        for kernel in pair.new:
            if kernel.selects and not pair.base:
                parts["layout"] += kernel.ms - ms * kernel.macs / macs
                continue
            parts["padding"] += ms * (kernel.computed / computed - kernel.macs / macs)
            changed: PartKind = "intensity" if kernel.form in forms else "kernel"
            parts[changed] += kernel.ms - ms * kernel.computed / computed
        theory = ms * sum(k.macs for k in pair.new) / macs
        return pair, _row(pair.base, pair.new, theory, parts)


def _key(kernel: AttributedKernel) -> str:
    return kernel.main.key if kernel.main is not None else kernel.operator.node.name


def _within(kernel: AttributedKernel, base: AttributedKernel) -> bool:
    """Whether an operator is a factor of a layer."""
    return kernel.layer.startswith(f"{base.layer}.")


class _Light:
    """Rows of operators without MACs."""

    def __init__(self, matching: Matching) -> None:
        self.matching = matching
        self.of: dict[tuple[str, str], list[AttributedKernel]] = defaultdict(list)
        for kernel in matching.base:
            for key in () if kernel.macs else self.keys(kernel):
                self.of[key].append(kernel)
        self.used: set[int] = set()

    def keys(self, kernel: AttributedKernel) -> list[tuple[str, str]]:
        """What it is known by: its exported nodes; what the runtime added, by the value that it moves."""
        return [("node", s.key) for s in kernel.sources] or [(kernel.operator.node.op, kernel.carries)]

    def row(self, new: AttributedKernel) -> ExplainedRow:
        """One operator of the candidate beside that of the base, if it has one of its own."""
        base = next((b for key in self.keys(new) for b in self.of[key] if id(b) not in self.used), None)
        if base is None:
            kind: PartKind = "layout" if _moves(new) else "fusion"
            return _row([], [new], 0.0, {kind: new.ms})
        self.used.add(id(base))
        theory = base.ms * _ratio(_elements(base), _elements(new))
        kind = "layout" if _moves(new) else "intensity" if new.form == base.form else "kernel"
        return _row([base], [new], theory, {kind: new.ms - theory})

    def gone(self) -> list[ExplainedRow]:
        """Operators of the base that the candidate has not: fused now, or no more."""
        rows = []
        for base in self.matching.base:
            if base.macs or id(base) in self.used:
                continue
            inside = self.matching.inside
            after = None if base.main is None or _moves(base) else inside.get(base.main.key)
            theory = 0.0 if after is None else base.ms * _ratio(_elements(base), after[0])
            row = _row([base], [], theory, {} if after is None else {"fusion": -theory})
            rows.append(row if after is None else row.model_copy(update={"made_by": after[1]}))
        return rows


def _moves(kernel: AttributedKernel) -> bool:
    return kernel.operator.node.op in LAYOUT


def _elements(kernel: AttributedKernel) -> int:
    """What it reads and writes: of the network, or of memory where the network knows nothing of it."""
    if kernel.main is not None:
        return kernel.main.elements
    shapes = (*kernel.operator.inputs, *kernel.operator.outputs)
    return sum(math.prod(shape) for shape in shapes)


def _ratio(base: int, new: int) -> float:
    """As much as before where nothing is known."""
    return new / base if base and new else 1.0


def _row(
    base: Sequence[AttributedKernel],
    new: Sequence[AttributedKernel],
    theory: float,
    parts: dict[PartKind, float],
) -> ExplainedRow:
    some = new or base
    return ExplainedRow(
        layer=(base[0] if some[0].macs and base else some[0]).layer,
        base_operators=list(map(_name, base)),
        new_operators=list(map(_name, new)),
        base_form=_forms(base),
        new_form=_forms(new),
        made_by=next((k.made_by for k in some if k.made_by is not None), None),
        base_ms=sum(k.ms for k in base),
        new_ms=sum(k.ms for k in new),
        theory_ms=theory,
        base_macs=sum(k.macs for k in base),
        new_macs=sum(k.macs for k in new),
        base_computed=sum(k.computed for k in base),
        new_computed=sum(k.computed for k in new),
        parts=dict(parts),
    )


def _name(kernel: AttributedKernel) -> str:
    return "Select" if kernel.selects else kernel.operator.node.op


def _forms(kernels: Sequence[AttributedKernel]) -> str:
    return " + ".join(dict.fromkeys(k.form for k in kernels))
