"""Layers before and after."""

import pytest

from graphcomp.records import LayerRow
from graphcomp.report.layer_pairs import owner, pair_layers


def layer(name: str, into: int = 3, out: int = 8, macs: int = 1) -> LayerRow:
    return LayerRow(name=name, kind="Conv2d", in_channels=into, out_channels=out, params=2 * macs, macs=macs)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (["a", "z"], ["a.0", "a.1", "z"], [("a", ["a.0", "a.1"]), ("z", ["z"])]),
        (["a", "b"], ["a", "b.0", "b.1", "b.2"], [("a", ["a"]), ("b", ["b.0", "b.1", "b.2"])]),
        (["x", "a.b", "z"], ["x", "a.b.0.1", "z"], [("x", ["x"]), ("a.b", ["a.b.0.1"]), ("z", ["z"])]),
        (["a", "a", "z"], ["a.0", "a.1", "a.0", "a.1"], [("a", ["a.0", "a.1"])] * 2 + [("z", [])]),
        (["a", "z"], ["a", "a.0", "z"], [("a", ["a"]), ("a.0", ["a.0"]), ("z", ["z"])]),
        (["a", "z"], ["z", "new"], [("a", []), ("z", ["z"]), ("new", ["new"])]),
        (["a", "z"], ["ab.0", "a", "z"], [("ab.0", ["ab.0"]), ("a", ["a"]), ("z", ["z"])]),
        ([], ["a.0"], [("a.0", ["a.0"])]),
    ],
)
def test_factors_belong_to_the_layer_that_they_replace(
    before: list[str], after: list[str], expected: list[tuple[str, list[str]]]
) -> None:
    pairs = pair_layers([layer(name) for name in before], [layer(name) for name in after])
    assert [(pair.name, [row.name for row in pair.after]) for pair in pairs] == expected
    assert all((pair.before is None) == (pair.name not in before) for pair in pairs)


def test_a_layer_that_is_called_twice_is_paired_in_turn() -> None:
    before, after = ([layer("a", macs=m) for m in some] for some in ((2, 3), (7, 8)))
    found = [
        (pair.before and pair.before.macs, pair.result and pair.result.macs)
        for pair in pair_layers(before, after)
    ]
    assert found == [(2, 7), (3, 8)]


def test_factors_as_one_layer() -> None:
    (pair,) = pair_layers([layer("a", 3, 8, 100)], [layer("a.0", 3, 2, 10), layer("a.1", 2, 8, 20)])
    assert pair.factors == pair.after and pair.result is not None
    result = pair.result
    assert (result.kind, result.in_channels, result.out_channels) == ("2 factors", 3, 8)
    assert (result.params, result.macs) == (60, 30)
    (whole,) = pair_layers([layer("a")], [layer("a", 3, 5)])
    assert whole.factors == () and whole.result == whole.after[0]
    (gone,) = pair_layers([layer("a")], [])
    assert gone.result is None and gone.factors == ()


def test_owner() -> None:
    assert owner("a.b.0", {"a.b"}) == "a.b" and owner("a.b", {"a.b", "a"}) == "a.b"
    assert owner("ab.0", {"a"}) is None and owner("", {"a"}) is None
