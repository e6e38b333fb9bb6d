"""Plots for HTML: matplotlib figures as `<svg>` elements that can share one page, and their common look."""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct under every common colour blindness, and in grey.
BEFORE, AFTER, THEORY, INK, GRID = "#b4bac4", "#0072B2", "#D55E00", "#1c2430", "#e3e6eb"
INCHES_WIDE = 10.0
LONGEST_LABEL = 44
SIZES = (THEORY, "s--", 9), (AFTER, "o-", 5)
"""Lines of `draw_sizes`; they often lie on each other."""


def style(ax: Axes, grid: str) -> None:
    """The look of every plot; grid lines across `grid`, "x" or "y"."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(BEFORE)
    ax.tick_params(colors=INK)
    ax.grid(axis="x" if grid == "x" else "y", color=GRID)
    ax.set_axisbelow(True)


def draw_sizes(ax: Axes, sizes: Mapping[str, Sequence[int]], label: str) -> None:
    """At most two lines in per cent of their first value, which for one that begins with nothing is none."""
    for (name, values), (colour, line_style, size) in zip(sizes.items(), SIZES, strict=False):
        if values[0]:
            percent = [100 * value / values[0] for value in values]
            line = ax.plot(percent, line_style, color=colour, linewidth=1.6, markersize=size, label=name)[0]
            line.set_markerfacecolor("none" if size > 6 else colour)
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    ax.set_ylabel(label)
    ax.margins(x=0.06)
    ax.legend(frameon=False, loc="lower left")


def elide(name: str) -> str:
    """A label that fits."""
    # XML cannot hold control characters, and a label wider than the plot would squeeze it.
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    half = LONGEST_LABEL // 2
    return text if len(text) <= LONGEST_LABEL else f"{text[: half - 1]}…{text[-half:]}"


def svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an `<svg>` element for HTML: its ids start with `name`, its text stays text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser draws the text with its own fonts, so what matplotlib's font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ET.fromstring(buffer.getvalue())
    _strip_namespaces(root)
    _scope_ids(root, name)
    _describe(root, name, title, description)
    return Markup(ET.tostring(root, encoding="unicode"))


def _strip_namespaces(root: ET.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(attributes)


def _scope_ids(root: ET.Element, name: str) -> None:
    """Prefix the ids that something refers to, drop the others: several figures share one document."""
    used = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "href" or "url(#" in value:
                used.update(re.findall(r"#([\w-]+)", value))
    for element in root.iter():
        if element.get("id") in used:
            element.set("id", f"{name}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        for key in ("href", "clip-path"):
            if key in element.attrib:
                element.set(key, element.attrib[key].replace("#", f"#{name}-"))


def _describe(root: ET.Element, name: str, title: str, description: str) -> None:
    for tag in ("width", "height"):
        root.attrib.pop(tag)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(tag, id=f"{name}-{tag}")
        element.text = text
        root.insert(place, element)
