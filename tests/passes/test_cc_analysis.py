"""Analyses are kept by content: what was found out once is not computed again."""

import pytest
import torch

from graphcomp.passes.cc import analysis
from graphcomp.passes.cc.analysis import Analysis
from graphcomp.passes.cc.forms import first_form, least_macs
from graphcomp.passes.cc.gcro import fit_exponential, removal_curve
from graphcomp.passes.cc.mshc import Search
from tests.naive_cc import weights


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed."""
    seen: list[str] = []
    curve, search = analysis.removal_curve, analysis.Search
    monkeypatch.setattr(analysis, "removal_curve", lambda *a: (seen.append("curve"), curve(*a))[1])
    monkeypatch.setattr(analysis, "Search", lambda *a: (seen.append("search"), search(*a))[1])
    return seen


def test_is_the_search_and_the_fit() -> None:
    weight, gradient = weights(6, 5, 3, 3)
    found = Analysis(weight, gradient)
    assert found.fit == fit_exponential(*removal_curve(weight, gradient))
    search = Search(weight, gradient)
    while search.advance():
        pass
    for goal in (200, 120, 60):
        assert found.form(goal) == first_form(found.shape, search.units, goal)
    assert found.units == search.units[: len(found.units)]


def test_a_second_analysis_computes_nothing(counted: list[str]) -> None:
    weight, gradient = weights(6, 5, 3, 3)
    first = Analysis(weight, gradient)
    form = first.form(100)
    assert counted == ["curve", "search"]
    again = Analysis(weight.clone(), gradient.clone())
    assert (again.form(100), again.fit, again.units) == (form, first.fit, first.units)
    assert again.form(150).removed <= form.removed
    assert counted == ["curve", "search"]
    assert again.form(50).removed > form.removed  # goes on from there
    assert counted == ["curve", "search", "search"]


@pytest.mark.parametrize("options", [{"gamma": 0.5}, {"step": 3}, {"lookahead": "held"}])
def test_other_options_are_another_analysis(counted: list[str], options: dict[str, object]) -> None:
    weight, gradient = weights(6, 5, 3, 3)
    Analysis(weight, gradient).form(100)
    Analysis(weight, gradient, **options).form(100)  # type: ignore[arg-type]
    Analysis(weight, gradient + 1e-9).form(100)
    assert counted == ["curve", "search"] * 3


def test_no_fit_is_kept_too(counted: list[str]) -> None:
    weight, gradient = weights(6, 5, 3, 3)
    for _ in range(2):
        found = Analysis(weight, torch.zeros_like(gradient))
        assert found.fit is None
        found.form(100)
    assert counted == ["curve", "search"]


def test_goals_that_no_form_meets() -> None:
    """The smallest form there is, never an empty layer (T1.16)."""
    found = Analysis(*weights(6, 3, 3, 3))
    for multiple in (1, 2, 16):
        form = found.form(0, multiple)
        assert form.macs == least_macs(found.shape, multiple) and form.keep
