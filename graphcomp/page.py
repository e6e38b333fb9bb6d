"""Pages of HTML from the templates beside this file."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2


def render(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Fill a template; what it is given is escaped, unless it is `Markup`.

    Args:
        template: name of the file.
        filters: that it uses.
        values: that it shows; a name that it lacks is an error.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    source = files("graphcomp").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(values)
