"""Filling templates."""

from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup

from graphcomp import page


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page, "files", lambda package: tmp_path)
    return tmp_path / "page.j2"


def test_values_are_escaped(template: Path) -> None:
    template.write_text("{{ n | twice }} {{ evil }} {{ plot }}\n{% if true %}\nshown\n{% endif %}\n")
    text = page.render("page.j2", {"twice": lambda n: 2 * n}, n=21, evil="<b>&", plot=Markup("<svg/>"))
    assert text == "42 &lt;b&gt;&amp; <svg/>\nshown\n"


def test_a_name_that_is_missing_is_an_error(template: Path) -> None:
    template.write_text("{{ absent }}")
    with pytest.raises(jinja2.UndefinedError, match="'absent' is undefined"):
        page.render("page.j2", {})
