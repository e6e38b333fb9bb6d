"""MSHC: importances against the double loop, the order of removal, and where a layer stops."""

import pytest
import torch

from graphcomp.channels import multiple_for
from graphcomp.passes.cc import lookahead
from graphcomp.passes.cc.forms import Compression, first_form, least_macs, step_back
from graphcomp.passes.cc.lookahead import importances
from graphcomp.passes.cc.mshc import Search, is_exact, step_size
from graphcomp.passes.cc.units import Remainder, Unit, WeightShape
from tests.naive_cc import Naive, search, weights
from tests.passes.test_cc_units import SHAPES, TOY_G, TOY_W

TOY = WeightShape(2, 3, 1)
TOY_ORDER = [2, 3 + 1, 0]


def whole_order(search: Search) -> list[Unit]:
    while search.advance():
        pass
    return search.units


def test_g1_1_importances() -> None:
    found = importances(Remainder(TOY_W, TOY_G), 0.9).tolist()
    assert found == pytest.approx([10.755294, 12.3125, 9.315, 12.555100, 16.257400], abs=5e-7)
    means = [7.505882, 8.125, 7.85, 8.208655, 9.485310]
    more = importances(Remainder(TOY_W, TOY_G), 1.9).tolist()
    assert [b - a for a, b in zip(found, more, strict=True)] == pytest.approx(means, abs=5e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_g1_3_closed_form_is_the_double_loop(shape: tuple[int, ...]) -> None:
    """T1.7: of channels and directions, also after removals, down to the last two."""
    weight, gradient = weights(*shape, seed=1)
    state, naive = Remainder(weight, gradient), Naive(weight, gradient)
    order = torch.randperm(len(state.units), generator=torch.Generator().manual_seed(7)).tolist()
    for unit in order:
        expected = [naive.importance(u, 0.9) for u in naive.units]
        assert importances(state, 0.9).tolist() == pytest.approx(expected, rel=1e-9)
        if state.removable(unit):
            state.remove(unit)
            naive.remove(unit)
    assert len(state.units) == 2


@pytest.mark.parametrize("chunk", [1, 700, 10**9])
def test_batches_of_candidates(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    state = Remainder(*weights(4, 6, 3, 3))
    expected = importances(state, 0.9)
    monkeypatch.setattr(lookahead, "CHUNK", chunk)
    torch.testing.assert_close(importances(state, 0.9), expected, rtol=1e-12, atol=0)


def test_held_lookahead() -> None:
    """Directions are as exact as ever; channels are looked at with the triples that X has, cut."""
    weight, gradient = weights(4, 5, 3, 3)
    state = Remainder(weight, gradient, [1, 5 + 2])
    exact, held = importances(state, 0.9), importances(state, 0.9, exact=False)
    channels = len(state.channels)
    torch.testing.assert_close(held[channels:], exact[channels:], rtol=1e-12, atol=0)
    for j in range(channels):
        gap = (exact - held)[j] * (len(state.units) - 1) / 0.9
        cut = state.right.clone()
        cut[:, j] = 0
        triples = torch.einsum("ar,rcx->racx", state.left, cut)
        last = float((state.importance * triples.square()).sum())
        assert float(lookahead.channel_spectra(state)[j]) - last == pytest.approx(float(gap), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (6, 5, 1, 1), (3, 8, 1, 1), (5, 6)], ids=str)
def test_t1_9_order_is_the_definition(shape: tuple[int, ...], step: int) -> None:
    """Also where several units go at once, and places of directions move (the authors' code slips there)."""
    weight, gradient = weights(*shape, seed=4)
    assert whole_order(Search(weight, gradient, step=step)) == search(weight, gradient, step)


def test_a_search_goes_on() -> None:
    weight, gradient = weights(4, 6, 3, 3)
    whole = whole_order(Search(weight, gradient, step=2))
    for done in (0, 2, 6, len(whole)):
        assert whole_order(Search(weight, gradient, step=2, units=whole[:done])) == whole


def test_t1_5_what_the_loss_ignores_goes_first() -> None:
    """A channel without gradient goes first whatever its norm."""
    weight, gradient = weights(6, 5, 3, 3)
    weight[:, 3] *= 100
    gradient[:, 3] = 0
    found = Search(weight, gradient)
    assert found.advance() and found.units == [3]


def test_t1_13_twice_the_same() -> None:
    weight, gradient = weights(4, 5, 3, 3)
    before = weight.clone(), gradient.clone()
    assert whole_order(Search(weight, gradient)) == whole_order(Search(weight, gradient))
    assert torch.equal(weight, before[0]) and torch.equal(gradient, before[1])


def test_one_channel_loses_directions_only() -> None:
    weight, gradient = weights(5, 1, 3, 3)
    assert all(unit >= 1 for unit in whole_order(Search(weight, gradient)))


# ---------------------------------------------------------------------- where it stops


@pytest.mark.parametrize(
    ("target", "form"),
    [
        (0.0, Compression((0, 1, 2), None, 0, 6)),
        (0.3, Compression((0, 1), None, 1, 4)),
        (0.5, Compression((1,), 1, 3, 3)),
        (0.6, Compression((1,), None, 3, 2)),
        (0.7, None),
    ],
)
def test_g1_1_targets(target: float, form: Compression | None) -> None:
    """Of the toy's 6 MACs; at 50 % (a) comes before (b); for 70 % the layer would have to be empty."""
    assert whole_order(Search(TOY_W, TOY_G)) == TOY_ORDER
    assert first_form(TOY, TOY_ORDER, 6 * (1 - target)) == form


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_t1_16_no_layer_is_emptied(shape: tuple[int, ...]) -> None:
    weight, gradient = weights(*shape)
    found = Search(weight, gradient)
    units = whole_order(found)
    assert len(found.state.channels) == len(found.state.directions) == 1
    layer = WeightShape.of(weight)
    least = first_form(layer, units, least_macs(layer))
    assert least is not None and least.macs == least_macs(layer) and len(least.keep) >= 1
    assert first_form(layer, units, least_macs(layer) - 1) is None
    assert first_form(layer, units, 0.05 * layer.macs()) is None or least_macs(layer) <= 0.05 * layer.macs()


@pytest.mark.parametrize("multiple", [1, 2, 4, 16])
@pytest.mark.parametrize("shape", [(6, 8, 3, 3), (8, 6, 1, 1), (5, 7)], ids=str)
def test_t1_8_goals_are_met_with_what_is_counted(shape: tuple[int, ...], multiple: int) -> None:
    """MACs of the form, rounding and the second factor included, are within the goal."""
    weight, gradient = weights(*shape)
    layer, units = WeightShape.of(weight), whole_order(Search(weight, gradient))
    before = 0
    for goal in range(layer.macs() + 3, least_macs(layer, multiple) - 1, -1):
        form = first_form(layer, units, goal, multiple)
        assert form is not None
        assert layer.macs(len(form.keep), form.rank) == form.macs <= goal
        assert form.removed >= before
        width, rank = (multiple_for(n, multiple) for n in (layer.channels, layer.directions))
        assert len(form.keep) % width == 0 or len(form.keep) == layer.channels
        assert form.rank is None or form.rank % rank == 0 or form.rank == layer.directions
        before = form.removed
    assert first_form(layer, units, least_macs(layer, multiple) - 1, multiple) is None


def test_rounding_takes_back_what_went_last() -> None:
    """Three channels and four directions are left: 1 went last of the channels, and makes them four again."""
    layer, units = WeightShape(8, 8, 9), [5, 0, 3, 6, 1, 8 + 7, 8 + 6, 8 + 2, 8 + 0, 2]
    assert first_form(layer, units, layer.macs(4), 4) == Compression((1, 2, 4, 7), None, 4, 288)
    assert first_form(layer, units, layer.macs(4) - 1, 4) == Compression((1, 2, 4, 7), 4, 9, 176)


def test_pruning_alone_once_it_is_enough() -> None:
    """Stop rule (b): a direction is gone, factors would cost more than the goal, and one weight does not."""
    layer = WeightShape(4, 4, 1)
    assert first_form(layer, [4 + 3, 0, 1], 8) == Compression((2, 3), None, 3, 8)
    assert layer.macs(2, 3) > 8


def test_step_back() -> None:
    """The form that the next larger goal leads to."""
    for multiple in (1, 2, 4):
        layer = WeightShape(6, 8, 9)
        weight, gradient = weights(6, 8, 3, 3)
        units = whole_order(Search(weight, gradient))
        form = first_form(layer, units, 0.4 * layer.macs(), multiple)
        seen = 0
        while form is not None and form.removed:
            back = step_back(layer, units, form, multiple)
            assert back.macs > form.macs and back.removed < form.removed
            below = first_form(layer, units, back.macs - 1, multiple)
            assert below == form or below is not None and below.removed == form.removed
            form, seen = back, seen + 1
        assert seen >= 2 and form is not None
        assert step_back(layer, units, form, multiple) == form


# ---------------------------------------------------------------------- how it is done


def test_units_at_a_time() -> None:
    assert step_size(WeightShape(64, 64, 9), None) == 1
    assert step_size(WeightShape(512, 512, 9), None) == 10
    assert step_size(WeightShape(512, 512, 9), 3) == 3


def test_auto_holds_the_largest_layers_only() -> None:
    assert is_exact(WeightShape(64, 64, 9), "auto", None) and is_exact(WeightShape(128, 128, 9), "auto", None)
    assert not is_exact(WeightShape(512, 512, 9), "auto", None)
    assert is_exact(WeightShape(512, 512, 9), "exact", None)
    assert not is_exact(WeightShape(2, 3, 1), "held", None)
