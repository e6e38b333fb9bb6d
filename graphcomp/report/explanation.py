"""An explanation for people: the biggest reasons in words, tables for a terminal, a waterfall plot."""

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from graphcomp.records import ExplainedRow, Explanation, Part, PartKind
from graphcomp.report.plots import (
    AFTER,
    BEFORE,
    FASTER,
    INK,
    LONGEST_LABEL,
    NARROW,
    SLOWER,
    THEORY,
    WIDE,
    elide,
    responsive,
    style,
    svg,
)

__all__ = [
    "COLUMNS",
    "describe",
    "describe_gathers",
    "label_of",
    "layer_table",
    "layers",
    "part_table",
    "waterfall",
    "waterfall_file",
    "waterfall_svg",
]

LABELS: dict[PartKind, str] = {
    "mix": "time is not spread like MACs",
    "padding": "padding to whole blocks",
    "kernel": "another kernel",
    "fusion": "lost fusion",
    "layout": "layout",
    "intensity": "low intensity",
    "host": "outside of operators",
}
COLUMNS: tuple[PartKind, ...] = ("padding", "kernel", "fusion", "layout", "intensity")
"""The parts that layers have."""

TITLE = "From the time that the MACs promise to the time that was measured"
WORTH_A_WORD = 0.05
"""Of the gap; smaller parts are in the tables only."""

MOST_LAYERS = 24
SUMMED = ("base_ms", "new_ms", "theory_ms", "base_macs", "new_macs", "base_computed", "new_computed")


# ---------------------------------------------------------------------- words


def describe(found: Explanation) -> list[str]:
    """What was measured beside what was promised, then the biggest reasons, largest first."""
    lines = [_headline(found)]
    gap = found.gap
    if gap.low <= 0 <= gap.high:
        lines.append("That is what the MACs promise, as far as the measurement can tell.")
        return lines + describe_gathers(found)
    whole = abs(gap.value)
    for part in sorted(found.parts, key=lambda p: -abs(p.ms)):
        if abs(part.ms) >= WORTH_A_WORD * whole:
            lines.append(_reason(part, found))
    return lines + describe_gathers(found)


def describe_gathers(found: Explanation) -> list[str]:
    """What picking channels costs, in a sentence; nothing where none are picked."""
    unit, lines = _Unit(found), list[str]()
    alone = [g for g in found.gathers if g.share is not None]
    merged = [g for g in found.gathers if g.share is None]
    if alone:
        layout, share = sum(g.layout_ms or 0.0 for g in alone), sum(g.share or 0.0 for g in alone)
        whole = sum(g.ms or 0.0 for g in alone) + layout
        most = max(alone, key=lambda g: g.share or 0.0)
        lines.append(
            f"Picking channels takes {unit(whole)} {unit.name}, {100 * share:.1f} % of the time, "
            f"{unit(layout)} of them in reorders: {_plural(len(alone), 'gather')}, by "
            f"{', '.join(sorted({g.made_by for g in alone}))}; most for {' and '.join(most.readers)} "
            f"({most.channels} of {most.of} channels)."
        )
    if merged:
        lines.append(
            f"{_plural(len(merged), 'gather')} merged into weights: the layers there compute all channels "
            "again, and no operator of its own has a time."
        )
    return lines


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _headline(found: Explanation) -> str:
    speedup, gap, unit = found.speedup, found.gap, _Unit(found)
    threads = f"{found.threads} thread{'s' if found.threads != 1 else ''}"
    less = "more" if gap.value >= 0 else "less"
    low, high = sorted((abs(gap.low), abs(gap.high)))
    spread = f"[{unit(low)}, {unit(high)}]" if gap.low * gap.high > 0 else "perhaps nothing"
    return (
        f"{speedup.value:.2f}x instead of {found.theoretical:.2f}x (batch {found.batch}, {found.provider}, "
        f"{threads}, {found.clock} time): {unit(found.new.measured_ms)} {unit.name} where the MACs promise "
        f"{unit(found.theory_ms)} (before: {unit(found.base.measured_ms)}); "
        f"{unit(abs(gap.value))} {unit.name} {less}, {spread}."
    )


def _reason(part: Part, found: Explanation) -> str:
    unit = _Unit(found)
    share, ms = _share(part.ms, found), f"{unit(part.ms, '+')} {unit.name}"
    text = f"{share} ({ms}) {label_of(part.kind, found)}" if share else f"{ms} {label_of(part.kind, found)}"
    if part.kind == "mix":
        amount = "less" if part.ms > 0 else "more"
        return f"{text}: what went took {amount} of the original's time than of its MACs."
    if part.kind == "host":
        outside = [side.measured_ms - side.operators_ms for side in (found.base, found.new)]
        times = " and ".join(unit(ms) for ms in outside)
        return f"{text}: {times} {unit.name} of base and new are in no operator of the traces."
    where = _places([row for row in found.rows if row.parts.get(part.kind, 0.0) * part.ms > 0], part.kind)
    passes = [name for name in sorted(part.by_pass, key=lambda n: -abs(part.by_pass[n])) if name]
    by = f", by {', '.join(passes)}" if passes else ""
    return f"{text}: {where}{by}."


def label_of(kind: PartKind, found: Explanation) -> str:
    """A part in words, with what it consists of in this network."""
    rows = [row for row in found.rows if row.parts.get(kind, 0.0)]
    if kind == "kernel":
        changes = dict.fromkeys(f"{r.base_form} -> {r.new_form}" for r in rows if r.base_form != r.new_form)
        return f"{LABELS[kind]} ({', '.join(changes)})" if changes else LABELS[kind]
    if kind in ("fusion", "layout"):
        times: dict[str, float] = defaultdict(float)
        for row in rows:
            for operator in row.new_operators or row.base_operators:
                times[operator] += abs(row.parts[kind])
        most = sorted(times, key=lambda name: -times[name])[:3]
        most = [name for name in most if times[name] >= WORTH_A_WORD * sum(times.values())]
        return f"{LABELS[kind]} ({', '.join(most)})" if most else LABELS[kind]
    return LABELS[kind]


def _places(rows: Sequence[ExplainedRow], kind: PartKind, most: int = 3) -> str:
    """The parts of the network that most of a part comes from: `layer1.*, layer2.*`."""
    times: dict[str, float] = defaultdict(float)
    members: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        head = row.layer.partition(".")[0]
        times[head] += abs(row.parts[kind])
        members[head].add(row.layer)
    total, told = sum(times.values()), 0.0
    names: list[str] = []
    for head in sorted(times, key=lambda h: -times[h]):
        if told >= 0.8 * total or len(names) == most:
            break
        told += times[head]
        names.append(next(iter(members[head])) if len(members[head]) == 1 else f"{head}.*")
    rest = "" if len(names) == len(times) else f" and {len(times) - len(names)} more"
    return f"{', '.join(names)}{rest}"


class _Unit:
    """Milliseconds as text, in microseconds where a network takes less than one."""

    def __init__(self, found: Explanation) -> None:
        longest = max(found.base.measured_ms, found.new.measured_ms)
        self.name, self.factor = ("us", 1e3) if longest < 1 else ("ms", 1.0)
        self.decimals = 1 if longest < 1 or longest >= 100 else 3 if longest < 10 else 2

    def __call__(self, ms: float, sign: str = "") -> str:
        return f"{ms * self.factor:{sign}.{self.decimals}f}"

    def shows(self, ms: float) -> bool:
        """Whether a digit of it is not 0."""
        return round(abs(ms) * self.factor, self.decimals) > 0


# ---------------------------------------------------------------------- tables


def layers(found: Explanation) -> list[ExplainedRow]:
    """One row a layer: with the operators behind it, in the candidate's order."""
    groups: dict[str, list[ExplainedRow]] = defaultdict(list)
    for row in found.rows:
        groups[row.layer].append(row)
    return [_merged(name, rows) for name, rows in groups.items()]


def _merged(name: str, rows: Sequence[ExplainedRow]) -> ExplainedRow:
    parts: dict[PartKind, float] = defaultdict(float)
    for row in rows:
        for kind, ms in row.parts.items():
            parts[kind] += ms
    return rows[0].model_copy(
        update={
            "layer": name,
            "base_operators": [o for row in rows for o in row.base_operators],
            "new_operators": [o for row in rows for o in row.new_operators],
            "made_by": next((row.made_by for row in rows if row.made_by), None),
            "parts": dict(parts),
            **{key: sum(getattr(row, key) for row in rows) for key in SUMMED},
        }
    )


def shortened(rows: Sequence[ExplainedRow], most: int = MOST_LAYERS) -> list[ExplainedRow]:
    """The layers that are farthest from theory, in their order, and one row for all others."""
    if len(rows) <= most:
        return list(rows)
    far = sorted(rows, key=lambda row: -abs(row.new_ms - row.theory_ms))[: most - 1]
    ids = {id(row) for row in far}
    others = [row for row in rows if id(row) not in ids]
    return [*(row for row in rows if id(row) in ids), _merged(f"{len(others)} others", others)]


def part_table(found: Explanation) -> Table:
    """The gap in its parts, and which pass has which of them."""
    unit = _Unit(found)
    table = Table(title=f"Beyond theory, {unit.name} a run", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for name in (unit.name, "of the gap"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("by pass")
    for part in found.parts:
        by = ", ".join(
            f"{name} {unit(ms, '+')}" for name, ms in part.by_pass.items() if name and unit.shows(ms)
        )
        table.add_row(Text(LABELS[part.kind]), unit(part.ms, "+"), _share(part.ms, found), Text(by))
    table.add_section()
    gap = found.gap
    table.add_row(
        "gap, as measured", unit(gap.value, "+"), "", f"95 %: {unit(gap.low, '+')} to {unit(gap.high, '+')}"
    )
    return table


def _share(ms: float, found: Explanation) -> str:
    """Of a gap that there is beyond doubt, and that is more than a trifle."""
    gap = found.gap
    worth = gap.low > 0 and gap.value >= WORTH_A_WORD * found.new.measured_ms
    return f"{100 * ms / gap.value:+.0f} %" if worth else ""


def layer_table(found: Explanation) -> Table:
    """Theory against practice by layer, with the parts that layers have."""
    unit, rows = _Unit(found), layers(found)
    several = len({row.made_by for row in rows}) > 1
    table = Table(
        title=f"By layer, {unit.name} a run (operators behind a layer are counted with it)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer", overflow="fold", min_width=20)
    for name in ("base", "theory", "new", "padding", "kernel", "fusion", "layout", "intens."):
        table.add_column(name, justify="right", no_wrap=True)
    if several:
        table.add_column("pass", overflow="fold")
    for row in shortened(rows):
        table.add_row(*_cells(row, unit), *([Text(row.made_by or "")] if several else []))
    table.add_section()
    table.add_row(*_cells(_merged("sum", rows), unit))
    return table


def _cells(row: ExplainedRow, unit: _Unit) -> list[Text]:
    times = [unit(ms) for ms in (row.base_ms, row.theory_ms, row.new_ms)]
    parts = [row.parts.get(kind, 0.0) for kind in COLUMNS]
    return [
        Text(cell) for cell in (row.layer, *times, *(unit(ms, "+") if unit.shows(ms) else "" for ms in parts))
    ]


# ---------------------------------------------------------------------- the plot


def waterfall(found: Explanation, inches: float = WIDE) -> Figure:
    """From the original's time down to theory, and step by step up to what was measured."""
    unit, narrow = _Unit(found), inches == NARROW
    steps = [(label_of(part.kind, found), part.ms) for part in found.parts]
    figure = Figure(figsize=(inches, 1.2 + 0.42 * (len(steps) + 3)), layout="constrained")
    ax = figure.subplots()
    factor = unit.factor
    ends = [found.base.measured_ms, found.theory_ms]
    ax.barh([0, 1], [factor * ms for ms in ends], 0.66, color=[BEFORE, THEORY])
    at, edges = found.theory_ms, list(ends)
    texts = [(0, ends[0], unit(ends[0])), (1, ends[1], f"{unit(ends[1])} ({found.theoretical:.2f}x)")]
    for index, (_, ms) in enumerate(steps, start=2):
        ax.barh(index, factor * ms, 0.66, left=factor * at, color=SLOWER if ms > 0 else FASTER)
        ax.plot([factor * at] * 2, [index - 1.33, index + 0.33], color=INK, linewidth=0.8)
        share = _share(ms, found)
        texts.append((index, max(at, at + ms), unit(ms, "+") + (f" ({share})" if share else "")))
        at += ms
        edges.append(at)
    last = len(steps) + 2
    ax.plot([factor * at] * 2, [last - 1.33, last + 0.33], color=INK, linewidth=0.8)
    new = found.new.measured_ms
    gap = found.gap
    spread = [[factor * max(0.0, length)] for length in (gap.value - gap.low, gap.high - gap.value)]
    ax.barh(last, factor * new, 0.66, color=AFTER)
    ax.errorbar([factor * new], [last], xerr=spread, color=INK, capsize=4, linestyle="none", elinewidth=1.2)
    texts.append((last, new + gap.high - gap.value, f"{unit(new)} ({found.speedup.value:.2f}x)"))
    widest = factor * max(*edges, new)
    for row, ms, text in texts:
        ax.text(factor * ms + 0.012 * widest, row, text, va="center", fontsize=10, color=INK, in_layout=False)
    names = ["before, measured", "promised by the MACs", *(name for name, _ in steps), "after, measured"]
    names = [textwrap.fill(elide(name), LONGEST_LABEL[NARROW]) for name in names] if narrow else names
    ax.set_yticks(range(last + 1), names, parse_math=False)
    ax.set_ylim(last + 0.6, -0.6)
    ax.set_xlim(min(0.0, factor * min(edges)), (1.7 if narrow else 1.17) * widest)
    ax.set_xlabel(
        f"{unit.name} a run, batch {found.batch}, {found.clock} time{chr(10) if narrow else ' '}"
        "(bar: 95 % interval of the gap)"
    )
    ax.tick_params(axis="y", length=0)
    style(ax, "x")
    return figure


def waterfall_svg(found: Explanation) -> Markup:
    """The waterfall for a page."""
    return responsive(partial(waterfall, found), "plot-explain", TITLE, " ".join(describe(found)))


def waterfall_file(found: Explanation) -> str:
    """The waterfall as an SVG file, on white."""
    element = str(svg(waterfall(found), "plot-explain", TITLE, " ".join(describe(found)), themed=False))
    return element.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
