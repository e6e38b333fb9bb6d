"""What goes where in the picture of an inspection: rows, and lanes for values that skip some of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphcomp.channels import CONCATENATIONS
from graphcomp.inspection.inspection import Inspection, NodeRow, Segment


@dataclass
class Row:
    """One line of the picture."""

    node: NodeRow
    index: int
    sources: list[int]
    folded: list[NodeRow] = field(default_factory=list)


def place_rows(inspection: Inspection) -> list[Row]:
    """The nodes that deserve a row; every other node is folded into the row whose value it hands on."""
    coupling = {c.node for group in inspection.groups for c in group.coupled_by}
    layers = {row.name for row in inspection.layers}
    rows: list[Row] = []
    row_of: dict[str, int] = {}
    for node in inspection.nodes:
        sources = sorted({row_of[name] for name in node.inputs if name in row_of})
        if node.kind == "tensor" or not (node.tensors or node.kind == "output"):
            continue
        own = node.name in coupling or bool({node.layer, node.name} & layers) or node.kind in _ALWAYS
        if own or len(sources) != 1 or _mixes(node, rows[sources[0]].node):
            rows.append(Row(node, len(rows), sources))
            row_of[node.name] = len(rows) - 1
        else:
            rows[sources[0]].folded.append(node)
            row_of[node.name] = sources[0]
    return rows


_ALWAYS = {"input", "output", "stack", *CONCATENATIONS}


def _mixes(node: NodeRow, row: NodeRow) -> bool:
    """Whether a node's channels are others, or in another order, than those of the row it follows."""
    return bool(node.segments) and _proportions(node.segments) != _proportions(row.segments)


def _proportions(segments: Sequence[Segment]) -> list[tuple[int | None, str | None, int]]:
    unit = math.gcd(*(s.channels for s in segments))
    return [(s.group, s.pinned, s.channels // unit) for s in segments]


@dataclass(frozen=True)
class Skip:
    """A value that is read further down than in the next row."""

    source: int
    readers: list[int]


def find_skips(rows: Sequence[Row]) -> list[Skip]:
    """The values that some row reads that is not the next one, by the row that makes them."""
    readers: dict[int, list[int]] = {}
    for row in rows:
        for source in row.sources:
            if source != row.index - 1:
                readers.setdefault(source, []).append(row.index)
    return [Skip(source, found) for source, found in readers.items()]


def assign_lanes(skips: Sequence[Skip]) -> dict[int, int]:
    """Source row -> lane, so that no two skips share a stretch of one; short ones get the inner lanes."""
    taken: list[list[tuple[int, int]]] = []
    lane_of: dict[int, int] = {}
    for skip in sorted(skips, key=lambda s: (s.readers[-1] - s.source, s.source)):
        start, end = skip.source, skip.readers[-1]
        free = (i for i, lane in enumerate(taken) if all(end <= a or b <= start for a, b in lane))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((start, end))
        lane_of[start] = lane
    return lane_of
