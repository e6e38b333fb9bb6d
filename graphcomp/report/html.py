"""Pages of HTML from templates: one look, for light and dark, desktop and phone."""

import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from graphcomp.report.plots import theme

MOST_COLUMNS = 3
"""That a phone has room for; the rows of wider tables become cards."""


def render(package: str, template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Fill a template; what it is given is escaped, unless it is `Markup`.

    A template calls `style()` for the rules that all pages share. Cells of its tables learn the names of
    their columns, by which they are shown where the screen is narrow.

    Args:
        package: that the template lies in.
        template: name of the file.
        filters: that it uses.
        values: that it shows; a name that it lacks is an error.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    environment.globals["style"] = lambda: Markup(theme() + _read("graphcomp.report", "page.css"))
    return _label_cells(environment.from_string(_read(package, template)).render(values))


def _read(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _label_cells(html: str) -> str:
    """Every cell of a table with a head says which column it is of; values are escaped, so tags are ours."""
    return re.sub(r"<table([^>]*)>(.*?)</table>", _labelled, html, flags=re.DOTALL)


def _labelled(table: re.Match[str]) -> str:
    attributes, content = table.groups()
    head, end, body = content.partition("</thead>")
    names = [_words(cell) for cell in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", head, re.DOTALL)]
    if not end or "matrix" in attributes:
        return table[0]
    if len(names) > MOST_COLUMNS:
        attributes += ' class="cards"'
    rows = re.sub(r"<tr\b.*?</tr>", lambda row: _row(row[0], names), body, flags=re.DOTALL)
    return f"<table{attributes}>{head}{end}{rows}</table>"


def _row(row: str, names: list[str]) -> str:
    labels = iter(names)
    return re.sub(r"<(t[hd])\b", lambda tag: f'<{tag[1]} data-label="{next(labels, "")}"', row)


def _words(cell: str) -> str:
    """The text of a cell of the head, as the value of an attribute."""
    return " ".join(re.sub(r"<[^>]*>", " ", cell).split()).replace('"', "&quot;")
