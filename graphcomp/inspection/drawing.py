"""The picture of an inspection, as SVG."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree as ET

from graphcomp.base import write_text
from graphcomp.inspection.characters import legal
from graphcomp.inspection.inspection import Group, Inspection, NodeRow, Segment
from graphcomp.inspection.layout import Row, Skip, assign_lanes, find_skips, place_rows
from graphcomp.inspection.text import (
    beginning,
    counted,
    coupling_nodes,
    describe_totals,
    ending,
    fitting,
    how_coupled,
    tied,
    why,
)
from graphcomp.records import LayerRow


def write_svg(inspection: Inspection, path: str | Path) -> None:
    """Draw the network with its groups as one self-contained SVG file, whole or not at all; OutputError.

    Top to bottom, a row for every layer, join and rearrangement of channels; nodes that leave the channels as
    they are (normalisation, activation, pooling) are named in the row of the node they follow. A row's bar is
    its output's channel axis: as long as the cube root of the width, coloured by group.
    """
    svg = _Drawing(inspection).draw()
    ET.indent(svg, " ")
    write_text(Path(path), ET.tostring(svg, encoding="unicode") + "\n")


# Paul Tol's "muted" and "light" schemes: distinct for every kind of colour vision. Both counts are odd, so
# that layers which take turns (as in a dense block) do not share the same few colours.
_COUPLED = "#332288 #CC6677 #44AA99 #DDCC77 #882255 #88CCEE #117733 #AA4499 #999933".split()
_ALONE = "#77AADD #EE8866 #BBCC33 #FFAABB #44BB99 #EEDD88 #99DDFF".split()
_PINNED, _NONE, _INK, _FAINT = "#C4C9D1", "#FFFFFF", "#1F2430", "#667085"


def _palette(groups: Sequence[Group]) -> dict[int | None, tuple[str, str]]:
    """Group number -> (fill of its bars, colour of its lines): strong if coupled, pale if alone."""
    colours: dict[int | None, tuple[str, str]] = {}
    used = {True: 0, False: 0}
    for group in groups:
        if group.pinned is not None:
            colours[group.number] = (_PINNED, _FAINT)
            continue
        coupled = bool(group.coupled_by)
        scheme = _COUPLED if coupled else _ALONE
        colour = scheme[used[coupled] % len(scheme)]
        used[coupled] += 1
        pair = (colour, colour) if coupled else (_pale(colour), _mixed(colour, _INK, 0.2))
        colours[group.number] = pair
    return colours


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _mixed(colour: str, other: str, share: float) -> str:
    pairs = zip(_channels(colour), _channels(other), strict=True)
    return "#" + "".join(f"{round((1 - share) * a + share * b):02X}" for a, b in pairs)


def _pale(colour: str) -> str:
    return _mixed(colour, "#FFFFFF", 0.35)


def _ink_on(colour: str) -> str:
    red, green, blue = _channels(colour)
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#FFFFFF"


_TOP, _PITCH, _BAR, _MARGIN, _LANE = 136.0, 38.0, 20.0, 24.0, 9.0
_BAR_WIDTH, _TEXT_WIDTH, _LEGEND_WIDTH, _CORNER = 220.0, 340.0, 420.0, 6.0
_MOST_STRIPES, _SUBTITLE_CHARS, _LEGEND_CHARS = 48, 58, 68

_STYLE = f"""
text {{ font-family: Inter, 'Segoe UI', Roboto, Arial, 'DejaVu Sans', sans-serif; fill: {_INK} }}
.title {{ font-size: 20px; font-weight: 700 }}
.name {{ font-size: 12.5px; font-weight: 600 }}
.key {{ stroke: #98A2B3; stroke-width: .6 }}
.small {{ font-size: 11px; fill: {_FAINT} }}
.pin {{ font-weight: 600; fill: {_INK} }}
.chip {{ font-size: 10.5px; font-weight: 700; text-anchor: middle; pointer-events: none }}
.box {{ fill: none; stroke: #475467; stroke-width: .8 }}
.empty {{ stroke-dasharray: 3 2 }}
.line {{ fill: none; stroke-width: 1.7 }}
.hit {{ fill: #FFFFFF }}
.row:hover .hit {{ fill: #F2F4F7 }}
"""


def _add(parent: ET.Element, tag: str, text: str = "", **attributes: str | float) -> ET.Element:
    """A child element; `_` in a name stands for `-`, and a trailing one is dropped."""
    shown = {
        key.rstrip("_").replace("_", "-"): f"{value:g}" if isinstance(value, float) else legal(str(value))
        for key, value in attributes.items()
    }
    child = ET.SubElement(parent, tag, shown)
    child.text = legal(text) or None
    return child


def _arrow(text: str) -> str:
    return text.replace("->", " \N{RIGHTWARDS ARROW} ")


@dataclass(frozen=True)
class _Drawing:
    """The picture of an inspection. Lanes, bars, texts and legend stand side by side, left to right."""

    inspection: Inspection

    @cached_property
    def rows(self) -> list[Row]:
        return place_rows(self.inspection)

    @cached_property
    def groups(self) -> dict[int | None, Group]:
        return {group.number: group for group in self.inspection.groups}

    @cached_property
    def colours(self) -> dict[int | None, tuple[str, str]]:
        return _palette(self.inspection.groups)

    @cached_property
    def layers(self) -> dict[str, LayerRow]:
        return {row.name: row for row in self.inspection.layers}

    @cached_property
    def lanes(self) -> dict[int, int]:
        return assign_lanes(find_skips(self.rows))

    @cached_property
    def left(self) -> float:
        """Where bars begin."""
        return _MARGIN + 20 + _LANE * (max(self.lanes.values(), default=-1) + 1)

    @cached_property
    def widest(self) -> int:
        return max((sum(s.channels for s in row.node.segments) for row in self.rows), default=1)

    def y(self, index: int) -> float:
        """Top of a row's bar."""
        return _TOP + _PITCH * index

    def draw(self) -> ET.Element:
        """The whole picture."""
        text_at = self.left + _BAR_WIDTH + 52
        legend_at = text_at + _TEXT_WIDTH + 24
        svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
        _add(svg, "title", f"{self.inspection.model}: coupled channels")
        _add(svg, "style", _STYLE + self._highlights())
        self._hatch(svg)
        background = _add(svg, "rect", width="100%", height="100%", fill="#FFFFFF")
        self._header(svg)
        rows = _add(svg, "g")
        for row in self.rows:
            self._row(rows, row, text_at)
        self._spine(svg)
        for skip in find_skips(self.rows):
            self._skip(svg, skip)
        bottom = self._legend(svg, legend_at)
        width = legend_at + _LEGEND_WIDTH + _MARGIN
        height = max(bottom, self.y(len(self.rows))) + _MARGIN
        svg.attrib |= {"width": f"{width:g}", "height": f"{height:g}", "viewBox": f"0 0 {width:g} {height:g}"}
        background.attrib |= {"width": f"{width:g}", "height": f"{height:g}"}
        return svg

    def _highlights(self) -> str:
        """Pointing at a group dims all others: style sheets can do that, so there is no script."""
        return "".join(
            f"svg:has(.g{n}:hover) .of:not(.g{n}) {{ opacity: .12 }}\n" for n in self.groups if n is not None
        )

    def _hatch(self, svg: ET.Element) -> None:
        turned = {"patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
        pattern = _add(_add(svg, "defs"), "pattern", id="pinned", width=6.0, height=6.0, **turned)
        _add(pattern, "rect", width=6.0, height=6.0, fill=_PINNED)
        _add(pattern, "rect", width=2.0, height=6.0, fill="#9AA2AE")

    def _header(self, svg: ET.Element) -> None:
        inputs = ", ".join("x".join(map(str, shape)) for shape in self.inspection.input_shapes)
        _add(svg, "text", f"{self.inspection.model} ({inputs})", x=_MARGIN, y=34.0, class_="title")
        for i, line in enumerate(describe_totals(self.inspection).splitlines()):
            _add(svg, "text", line, x=_MARGIN, y=54.0 + 16 * i, class_="small")
        x = _MARGIN
        for fill, text in (
            (_COUPLED[0], "coupled layers: same colour, same number"),
            (_pale(_ALONE[0]), "a layer of its own"),
            ("url(#pinned)", "pinned"),
            (_NONE, "of no layer, or not on one axis"),
        ):
            _add(svg, "rect", x=x, y=82.0, width=18.0, height=12.0, rx=2.0, fill=fill, class_="key")
            _add(svg, "text", text, x=x + 24, y=92.0, class_="small")
            x += 44 + 5.7 * len(text)
        _add(svg, "text", "bar length: cube root of the channels", x=x, y=92.0, class_="small")

    # -- rows

    def _row(self, parent: ET.Element, row: Row, text_at: float) -> None:
        g, y = _add(parent, "g", class_="row", data_node=row.node.name), self.y(row.index)
        _add(g, "title", self._details(row))
        width = text_at + _TEXT_WIDTH - self.left
        _add(g, "rect", class_="hit", x=self.left - 4, y=y - 9, width=width, height=_PITCH, rx=4.0)
        end = self._bar(g, row.node, y)
        count = sum(s.channels for s in row.node.segments)
        if count:
            _add(g, "text", str(count), x=end + 6, y=y + 14, class_="small")
        name = row.node.layer or row.node.name
        _add(g, "text", ending(name, 38), x=text_at, y=y + 7, class_="name")
        if row.node.shape is not None:
            shape = "x".join(map(str, row.node.shape[1:]))
            _add(g, "text", shape, x=text_at + _TEXT_WIDTH - 8, y=y + 7, class_="small", text_anchor="end")
        subtitle, reason = self._subtitle(row), next((s.pinned for s in row.node.segments if s.pinned), None)
        line = _add(g, "text", subtitle, x=text_at, y=y + 22, class_="small")
        if reason:
            shown = beginning(f"pinned: {reason}", max(_SUBTITLE_CHARS - len(subtitle), 20))
            _add(line, "tspan", shown, dx=8.0, class_="pin")

    def _subtitle(self, row: Row) -> str:
        """What the row is and, where there is room, what follows it."""
        if row.node.kind == "output":
            return ""
        pinned = any(s.pinned for s in row.node.segments)
        words = [_BATCHNORM.sub("bn", node.kind.split()[0]) for node in row.folded if not pinned]
        kinds = [_arrow(row.node.kind), *(word for word, _ in groupby(words))]
        return ", ".join(kinds[:5] + ["\N{HORIZONTAL ELLIPSIS}"] * (len(kinds) > 5))

    def _bar(self, g: ET.Element, node: NodeRow, y: float) -> float:
        """Draws the segments; returns where the bar ends."""
        total = sum(s.channels for s in node.segments)
        length = max(26.0, _BAR_WIDTH * math.cbrt(total / self.widest)) if total else 26.0
        x = self.left
        for segment in _stripes(node.segments):
            width = length * segment.channels / total
            self._segment(g, segment, x, y, width)
            x += width
        frame = "box" if total else "box empty"
        _add(g, "rect", class_=frame, x=self.left, y=y, width=length, height=_BAR, rx=1.5)
        return self.left + length

    def _segment(self, g: ET.Element, segment: Segment, x: float, y: float, width: float) -> None:
        fill = "url(#pinned)" if segment.pinned else self.colours.get(segment.group, (_NONE, _FAINT))[0]
        _add(g, "rect", class_=self._class(segment.group), x=x, y=y, width=width, height=_BAR, fill=fill)
        if segment.group is not None and width >= 7.0 * len(str(segment.group)) + 3:
            ink = _INK if segment.pinned else _ink_on(fill)
            _add(g, "text", str(segment.group), x=x + width / 2, y=y + 14, class_="chip", style=f"fill:{ink}")

    def _class(self, group: int | None) -> str:
        return "of" if group is None else f"of g{group}"

    def _details(self, row: Row) -> str:
        """What hovering shows."""
        node, layer = row.node, self.layers.get(row.node.layer or row.node.name)
        lines = [f"{node.layer or node.name}: {node.op}"]
        lines += [f"then {f.name}: {f.op}" for f in row.folded]
        if layer is not None:
            lines.append(f"{layer.params:,} params, {layer.macs:,} MACs a sample")
        counts: dict[int | None, int] = {}
        for segment in node.segments:
            counts[segment.group] = counts.get(segment.group, 0) + segment.channels
        for number, count in counts.items():
            group = self.groups.get(number)
            lines.append(f"{count} of " + (f"{_headline(group)}: {why(group)}" if group else "no layer"))
        lines += [f"pinned: {reason}" for reason in dict.fromkeys(s.pinned for s in node.segments) if reason]
        return "\n".join(lines)

    # -- lines

    def _line_colour(self, index: int) -> tuple[str, str]:
        """(colour, class) of lines that carry a row's value."""
        groups = {segment.group for segment in self.rows[index].node.segments}
        group = groups.pop() if len(groups) == 1 else None
        return self.colours.get(group, (_NONE, _FAINT))[1], self._class(group)

    def _spine(self, svg: ET.Element) -> None:
        """Lines from a row to the next one."""
        for row in self.rows:
            if row.index - 1 in row.sources:
                colour, kind = self._line_colour(row.index - 1)
                x, start, end = self.left + 13, self.y(row.index - 1) + _BAR, self.y(row.index)
                _add(svg, "path", class_=f"line {kind}", stroke=colour, d=f"M{x:g} {start:g}V{end - 4:g}")
                _add(svg, "path", class_=kind, fill=colour, d=f"M{x:g} {end:g}l-4 -6h8z")

    def _skip(self, svg: ET.Element, skip: Skip) -> None:
        """One line down a lane, turning off to every reader."""
        colour, kind = self._line_colour(skip.source)
        lane = self.left - 20 - _LANE * self.lanes[skip.source]
        r, ends = _CORNER, [self._entry(reader, skip.source) for reader in skip.readers]
        y = self.y(skip.source) + _BAR - 4
        path = f"M{self.left:g} {y:g}H{lane + r:g}q{-r:g} 0 {-r:g} {r:g}V{ends[-1] - r:g}"
        turns = [f"M{lane:g} {end - r:g}q0 {r:g} {r:g} {r:g}H{self.left - 5:g}" for end in ends]
        _add(svg, "path", class_=f"line {kind}", stroke=colour, d=path + "".join(turns))
        heads = "".join(f"M{self.left:g} {end:g}l-6 -4v8z" for end in ends)
        _add(svg, "path", class_=kind, fill=colour, d=heads)

    def _entry(self, reader: int, source: int) -> float:
        """Height at which a skip enters a row: inner lanes above outer ones, so that ends do not cross."""
        lanes = sorted(self.lanes[s] for s in self.rows[reader].sources if s != reader - 1)
        return self.y(reader) + 12 * (lanes.index(self.lanes[source]) + 1) / (len(lanes) + 1)

    # -- legend

    def _legend(self, svg: ET.Element, x: float) -> float:
        """The list of groups; returns where it ends."""
        y = _TOP
        _add(svg, "text", counted(len(self.groups), "group"), x=x, y=y - 14, class_="name")
        for group in self.inspection.groups:
            g = _add(svg, "g", class_="row")
            _add(g, "title", "\n".join(_full(group)))
            fill = "url(#pinned)" if group.pinned else self.colours[group.number][0]
            ink = _INK if group.pinned else _ink_on(fill)
            kind = self._class(group.number)
            _add(g, "rect", class_=kind, x=x, y=y, width=30.0, height=18.0, rx=2.0, fill=fill)
            _add(g, "text", str(group.number), x=x + 15, y=y + 13, class_="chip", style=f"fill:{ink}")
            _add(g, "text", ending(group.name, 48), x=x + 40, y=y + 9, class_="name")
            for i, line in enumerate(_lines(group)):
                _add(g, "text", line, x=x + 40, y=y + 24 + 14 * i, class_="small")
            y += 34 + 14 * (len(_lines(group)) - 1)
        return y


_BATCHNORM = re.compile(r"batchnorm[123]d")


def _stripes(segments: Sequence[Segment]) -> Iterator[Segment]:
    """The segments as they are or, if they would be too thin to see, one for each group."""
    if len(segments) <= _MOST_STRIPES:
        yield from segments
        return
    counts: dict[tuple[int | None, str | None], int] = {}
    for s in segments:
        counts[s.group, s.pinned] = counts.get((s.group, s.pinned), 0) + s.channels
    for (group, pinned), count in counts.items():
        yield Segment(group=group, channels=count, pinned=pinned)


def _headline(group: Group) -> str:
    return f"group {group.number} {group.name} ({counted(group.channels, 'channel')})"


def _lines(group: Group) -> list[str]:
    """A group in the legend, below its name."""
    others, nodes = [layer for layer in group.producers if layer != group.name], coupling_nodes(group)
    first = counted(group.channels, "channel") + tied(group, group.name)
    lines = [first + (f" with {fitting(others, _LEGEND_CHARS - len(first) - 6)}" if others else "")]
    if nodes:
        lines.append(how_coupled(group) + fitting(nodes, _LEGEND_CHARS - 11))
    if group.pinned is not None:
        lines.append(f"pinned: {group.pinned.reason} at {group.pinned.node}")
    return [beginning(line, _LEGEND_CHARS) for line in lines]


def _full(group: Group) -> list[str]:
    """A group with nothing left out."""
    return [
        _headline(group),
        "made by " + ", ".join(f"{layer} ({count})" for layer, count in group.producers.items()),
        "read by " + (", ".join(group.readers) or "no layer"),
        *(f"coupled by {c.node}: {c.what}" for c in group.coupled_by),
        *([f"pinned: {group.pinned.reason} at {group.pinned.node}"] if group.pinned else []),
        f"{group.params:,} params and {group.macs:,} MACs a sample sit on these channels",
    ]
