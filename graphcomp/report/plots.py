"""Plots for HTML: matplotlib figures as `<svg>` elements that can share one page, and their common look.

A figure is drawn twice, wide for a desktop and narrow for a phone, where a wide one would be cut or too small
to read; the page's style shows one of them. Its colours are variables of that style, light and dark.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct under every common colour blindness, and in grey.
BEFORE, AFTER, THEORY, INK, GRID = "#b4bac4", "#0072B2", "#D55E00", "#1c2430", "#e3e6eb"
FASTER, SLOWER = "#009E73", "#CC79A7"
DARK = {
    BEFORE: "#6b7585",
    AFTER: "#4aa3df",
    THEORY: "#f0863c",
    INK: "#e4e8ee",
    GRID: "#333b47",
    FASTER: "#2fb993",
    SLOWER: "#d68cb5",
}
"""What stands for each colour on a dark page."""

WIDE, NARROW = 10.0, 4.4
"""Widths of figures in inches, for a desktop and for a phone."""

LONGEST_LABEL = {WIDE: 44, NARROW: 20}
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


def elide(name: str, inches: float = WIDE) -> str:
    """A label that fits a figure of this width."""
    # XML cannot hold control characters, and a label wider than the plot would squeeze it.
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    longest = LONGEST_LABEL[inches]
    half = longest // 2
    return text if len(text) <= longest else f"{text[: half - 1]}…{text[-half:]}"


def responsive(draw: Callable[[float], Figure], name: str, title: str, description: str) -> Markup:
    """A figure for a page, wide and narrow; `draw` makes it of a width in inches. See `svg` for the rest."""
    wide = svg(draw(WIDE), name, title, description)
    narrow = svg(draw(NARROW), f"{name}-narrow", title, description)
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(wide, narrow)


def theme() -> str:
    """Rules that give the colours of plots their values, on light and dark screens; paper is light."""
    light = " ".join(f"{_variable(colour)}: {colour};" for colour in DARK)
    dark = " ".join(f"{_variable(colour)}: {other};" for colour, other in DARK.items())
    return (
        f":root {{ {light} --plot-ink: {INK}; }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} --plot-ink: {DARK[INK]}; }} }}\n"
    )


def _variable(colour: str) -> str:
    return f"--plot-{colour[1:].lower()}"


def _themed(style: str) -> str:
    """Colours of the palette as variables; black is the default of matplotlib's texts and lines."""
    known = {colour.lower(): f"var({_variable(colour)})" for colour in DARK} | {"#000000": "var(--plot-ink)"}
    return re.sub("#[0-9a-fA-F]{6}", lambda found: known.get(found[0].lower(), found[0]), style)


def svg(figure: Figure, name: str, title: str, description: str, *, themed: bool = True) -> Markup:
    """The figure as an `<svg>` element for HTML: its ids start with `name`, its text stays text.

    `themed`: it takes its colours from the style of the page (`theme`) and has none behind it; otherwise it
    stands for itself, on white.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser draws the text with its own fonts, so what matplotlib's font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph")
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        layout = figure.get_layout_engine()
        if layout is not None:  # once: `savefig` draws all of it twice to lay it out
            layout.execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=themed)
    root = ET.fromstring(buffer.getvalue())
    _strip_namespaces(root)
    for element in root.iter() if themed else ():
        if "style" in element.attrib:
            element.set("style", _themed(element.attrib["style"]))
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
