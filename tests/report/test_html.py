"""Filling templates, and the look that all pages share: light and dark, desktop and phone."""

import itertools
import re
from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup

from graphcomp.report import html as page
from graphcomp.report import plots
from tests.explanation.test_explanation import recorded_explanation
from tests.report.test_report import Page, make, report, with_rounds, with_spectra
from tests.study.test_page import page as study_page

__all__ = ["study_page"]


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page, "files", lambda package: tmp_path)
    return tmp_path / "page.j2"


def test_values_are_escaped(template: Path) -> None:
    template.write_text("{{ n | twice }} {{ evil }} {{ plot }}\n{% if true %}\nshown\n{% endif %}\n")
    shown = {"n": 21, "evil": "<b>&", "plot": Markup("<svg/>")}
    text = page.render("graphcomp.report", "page.j2", {"twice": lambda n: 2 * n}, **shown)
    assert text == "42 &lt;b&gt;&amp; <svg/>\nshown\n"


def test_a_name_that_is_missing_is_an_error(template: Path) -> None:
    template.write_text("{{ absent }}")
    with pytest.raises(jinja2.UndefinedError, match="'absent' is undefined"):
        page.render("graphcomp.report", "page.j2", {})


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, study_page: str) -> list[str]:
    """A report with every plot and every table, and a study."""
    rounds = with_rounds().model_copy(update={"index": 0})
    explanation = recorded_explanation(tmp_path_factory.mktemp("nets"), "pruned")
    return [report.render_html(make(steps=[rounds, with_spectra(7)], explanation=explanation)), study_page]


def tables(html: str) -> list[tuple[str, str]]:
    """Attributes and content of each."""
    return re.findall(r"<table([^>]*)>(.*?)</table>", html, re.S)


@pytest.mark.slow
def test_no_table_is_wider_than_a_phone(pages: list[str]) -> None:
    """One with many columns turns into cards, in which every number says which column it is of; a matrix is
    in a box of its own that scrolls."""
    seen = 0
    for attributes, content in itertools.chain(*map(tables, pages)):
        head, _, body = content.partition("</thead>")
        names = [page._words(cell) for cell in re.findall(r"<th\b[^>]*>(.*?)</th>", head, re.S)]
        if "matrix" in attributes or not body:
            continue
        seen += 1
        assert ("cards" in attributes) == (len(re.findall(r"<t[hd]\b", head)) > page.MOST_COLUMNS), names
        for row in re.findall(r"<tr\b.*?</tr>", body, re.S):
            cells = re.findall(r'<t[hd] data-label="([^"]*)"', row)
            assert len(cells) == len(re.findall(r"<t[hd]\b", row)) <= len(re.findall(r"<t[hd]\b", head))
            assert {c for c in cells if c} <= set(names)
    assert seen >= 15
    for html in pages:
        for place in re.finditer(r'<table class="matrix"', html):
            assert html[: place.start()].rstrip().endswith('<div class="scroll">')


@pytest.mark.slow
def test_every_figure_has_a_form_for_a_phone(pages: list[str]) -> None:
    """No wider than the text is legible at; the other one is hidden."""
    for html in pages:
        figures = re.findall(r"<figure>(.*?)</figure>", html, re.S)
        assert figures
        for figure in figures:
            widths = dict(re.findall(r'<div class="(wide|narrow)"><svg[^>]*viewBox="0 0 ([\d.]+)', figure))
            assert {kind: float(width) for kind, width in widths.items()} == {
                "wide": 72 * plots.WIDE, "narrow": pytest.approx(72 * plots.NARROW),
            }  # fmt: skip
        css = page._read("graphcomp.report", "page.css")
        (narrow,) = re.findall(r"\(max-width: 640px\) \{\n.*?\n\}\n", css, re.S)
        assert "figure .wide { display: none; }" in narrow and "min-width: 720px" not in html
        assert 'name="viewport"' in html and Page(html).open == []


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themes(html: str) -> list[dict[str, str]]:
    """The variables on a light and on a dark screen."""
    dark = "".join(re.findall(r"@media screen and \(prefers-color-scheme: dark\) \{(.*?\})\s*\}", html, re.S))
    light = html.replace(dark, "")
    found = [dict(re.findall(r"--([\w-]+): (#\w{6})", text)) for text in (light, dark)]
    assert found[0].keys() == found[1].keys()
    return found


def test_everything_can_be_read_in_light_and_dark(pages: list[str]) -> None:
    """Contrasts of WCAG 2.2: 4.5 for text, 3 for what is drawn. Grid, rules and the bars of what was are less
    on purpose: they stand behind the others."""
    themed = zip(("light", "dark"), themes(pages[0]), strict=True)
    for html, (name, colours) in itertools.product(pages, themed):
        assert set(re.findall(r"var\(--(plot-\w+|ink|soft|\w+ed)\)", html)) <= {*colours, "verdict"}
        for text, ground in itertools.product(
            ("ink", "soft", "accent", "good", "mixed", "bad"), ("page", "panel", "said", "warned")
        ):
            assert contrast(colours[text], colours[ground]) >= 4.5, (name, text, ground)
        drawn = ("plot-ink", *(f"plot-{c[1:].lower()}" for c in (plots.AFTER, plots.THEORY, plots.FASTER)))
        for line in drawn:
            assert contrast(colours[line], colours["page"]) >= 3, (name, line)


def test_plots_take_their_colours_from_the_page(pages: list[str]) -> None:
    """Nothing is black or white by itself, and nothing covers the page."""
    for html in pages:
        for plot in re.findall(r"<svg.*?</svg>", html, re.S):
            fixed = {colour.lower() for colour in re.findall(r"#[0-9a-fA-F]{6}\b", plot)}
            assert not fixed & {"#000000", "#ffffff", *(colour.lower() for colour in plots.DARK)}
            assert "var(--plot-" in plot
