"""Rows and terms of every weight: counts only. Golden numbers of METHODS 4.6."""

import re
from collections import Counter

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn

from graphcomp.passes.dct.layout import Layout, LayoutRule, divisor, layouts


def counted(net: nn.Module, pattern: str) -> dict[str, int]:
    found = {n.removesuffix(".weight"): p.numel() for n, p in net.named_parameters() if p.ndim in (2, 4)}
    return {name: count for name, count in found.items() if re.fullmatch(pattern, name)}


with torch.device("meta"):
    RESNET50 = counted(torchvision.models.resnet50(weights=None), r"layer.*|fc")
    MOBILENET = counted(
        torchvision.models.mobilenet_v2(weights=None),
        r"features\.([89]|1[0-7])\.conv\.(0\.0|2)|features\.18\.0|classifier\.1",
    )
DENSE50 = 25_557_032 - 25_493_504


def totals(found: list[Layout]) -> tuple[int, int]:
    return sum(x.coefficients for x in found), sum(x.columns for x in found)


def test_the_set_is_that_of_the_paper() -> None:
    assert (len(RESNET50), sum(RESNET50.values()), DENSE50) == (53, 25_493_504, 63_528)


@pytest.mark.parametrize(
    ("groups", "rate", "coefficients", "positions", "params"),
    [
        (4, 0.125, 8_879_520, 6_373_376, 15_316_424),
        (4, 0.25, 5_530_336, 6_373_376, 11_967_240),
        (4, 1.0, 1_732_024, 6_373_376, 8_168_928),
        (8, 0.5, 3_183_584, 3_186_688, 6_433_800),
        (8, 1.0, 1_731_944, 3_186_688, 4_982_160),
    ],
)
def test_g4_1_t4_5_progressive_r(
    groups: int, rate: float, coefficients: int, positions: int, params: int
) -> None:
    """T4.5: r = 1 + r' rho, rho is a square root, and the reference is the smallest weight."""
    found = layouts(RESNET50, "progressive-r", rate, groups)
    assert totals(found) == (coefficients, positions)
    assert DENSE50 + sum(totals(found)) == params


@pytest.mark.parametrize(
    ("rate", "coefficients"),
    [(0.25, 1_723_820), (0.5, 1_207_088), (1, 768_060), (2, 449_740), (4, 247_216)],
)
def test_g4_1_progressive_r_of_mobilenet_v2(rate: float, coefficients: int) -> None:
    assert (len(MOBILENET), sum(MOBILENET.values())) == (22, 3_342_336)
    assert totals(layouts(MOBILENET, "progressive-r", rate, 4)) == (coefficients, 835_584)


@pytest.mark.parametrize(
    ("groups", "rate", "params"),
    [
        (4, 2, 19_183_656),
        (4, 4, 12_810_280),
        (4, 8, 9_623_592),
        (4, 16, 8_030_248),
        (4, 32, 7_233_576),
        (8, 2, 15_996_968),
        (8, 4, 9_623_592),
        (8, 8, 6_436_904),
        (8, 16, 4_843_560),
        (8, 32, 4_046_888),
        (2, 2, 25_557_032),
    ],
)
def test_g4_2_t4_4_uniform(groups: int, rate: int, params: int) -> None:
    """T4.4: orders count; with two groups and half of the coefficients nothing at all is gained."""
    found = layouts(RESNET50, "uniform", rate, groups)
    assert DENSE50 + sum(totals(found)) == params


@pytest.mark.parametrize(
    ("layer", "groups", "rate", "columns", "terms"),
    [
        ("layer1.0.conv1", 4, 1.0, 1024, 512),
        ("layer1.0.conv3", 4, 1.0, 4096, 1365),
        ("layer1.0.conv2", 8, 0.5, 4608, 1843),
        ("layer4.0.conv2", 4, 0.125, 589_824, 147_456),
        ("layer4.0.conv2", 4, 1.0, 589_824, 23_592),
        ("layer4.0.conv2", 8, 1.0, 294_912, 11_796),
        ("fc", 4, 1.0, 512_000, 21_917),
    ],
)
def test_g4_3_t4_7_terms_are_rounded_down(
    layer: str, groups: int, rate: float, columns: int, terms: int
) -> None:
    found = {x.layer: x for x in layouts(RESNET50, "progressive-r", rate, groups)}
    assert (found[layer].columns, found[layer].terms) == (columns, terms)


@pytest.mark.parametrize(
    ("rate", "params"), [(2, 13_414_184), (4, 7_040_808), (8, 3_854_120), (16, 2_260_776)]
)
def test_g4_4_progressive_g(rate: int, params: int) -> None:
    found = layouts(RESNET50, "progressive-g", rate, 4)
    assert Counter(x.rows for x in found) == {4: 1, 8: 10, 16: 13, 32: 19, 64: 10}
    assert sum(x.columns for x in found) == 603_904
    assert DENSE50 + sum(totals(found)) == params


@pytest.mark.parametrize(
    ("proportion", "groups", "rows"),
    [(1, 4, 4), (4, 4, 8), (4, 3, 4), (9, 4, 8), (16, 1, 4), (1, 1, 1), (1, 3, 2), (1, 6, 4)],
)
def test_progressive_g_rounds_down_to_a_power_of_two(proportion: int, groups: int, rows: int) -> None:
    counts = {"small": 4096, "layer": 4096 * proportion}
    assert layouts(counts, "progressive-g", 2, groups)[1].rows == rows


def test_powers_of_two_are_not_missed_by_rounding() -> None:
    """(4.7) with log2 computed an ulp too low would halve the groups."""
    for power in range(1, 12):
        counts = {"small": 64, "layer": 64 * 4**power}
        assert layouts(counts, "progressive-g", 2, 1)[1].rows == 2**power


@pytest.mark.parametrize(
    ("count", "groups", "expected"),
    [
        (270, 4, 2),
        (270, 3, 3),
        (271, 4, 1),
        (272, 32, 16),
        (4096, 4, 4),
        (288, 6, 6),
        (286, 6, 2),
        (7, 100, 1),
    ],
)
def test_t4_6_groups_that_do_not_divide(count: int, groups: int, expected: int) -> None:
    """T4.6: a convolution 10x3x3x3 has 270 weights; the official code drops the last two."""
    assert divisor(count, groups) == expected
    found = layouts({"layer": count}, "uniform", 1, groups)[0]
    assert found.rows * found.columns == count == found.coefficients


@pytest.mark.parametrize("strategy", ["uniform", "progressive-r", "progressive-g"])
def test_t4_7_a_term_stays_of_the_smallest_layer(strategy: LayoutRule) -> None:
    """T4.7: t is at least 1."""
    assert [x.terms for x in layouts({"a": 8, "b": 16}, strategy, 1000, 4)] == [1, 1]


def test_nothing_to_lay_out() -> None:
    assert layouts({}, "progressive-r", 1, 4) == []


@pytest.mark.parametrize("damage", [{"rows": 3}, {"terms": 5}, {"rows": 0}, {"terms": 0}, {"extra": 1}])
def test_records_are_checked(damage: dict[str, int]) -> None:
    record = {"layer": "a", "weights": 16, "rows": 4, "terms": 2}
    assert Layout.model_validate(record).columns == 4
    with pytest.raises(ValidationError):
        Layout.model_validate({**record, **damage})
