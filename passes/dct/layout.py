"""How many rows and terms a weight gets in `dct`: numbers only, no weights (METHODS 4.4 to 4.6).

A weight of N elements is g rows of M = N / g columns, of which t = floor(M / r) coefficients a row stay:

    uniform          r_l = r                 g_l = g
    progressive-r    r_l = 1 + r rho_l       g_l = g                            (4.6)
    progressive-g    r_l = r                 g_l = 2^floor(log2(g rho_l))       (4.7)

with rho_l = sqrt(N_l / N_ref) and N_ref the smallest weight that is compressed. Where g does not divide N,
the largest power of two below g that does takes its place.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graphcomp.records import Record

LayoutRule = Literal["uniform", "progressive-r", "progressive-g"]


class Layout(Record):
    """What one weight becomes."""

    layer: str
    weights: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1)]
    terms: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weights % self.rows or self.terms > self.columns:
            raise ValueError(f"{self.layer}: found {self.rows} rows of {self.terms} terms of {self.weights}")
        return self

    @property
    def columns(self) -> int:
        """M."""
        return self.weights // self.rows

    @property
    def coefficients(self) -> int:
        """g t, the numbers that are trained."""
        return self.rows * self.terms


def layouts(counts: Mapping[str, int], strategy: LayoutRule, rate: float, groups: int) -> list[Layout]:
    """Rows and terms of every weight.

    Args:
        counts: layer -> N.
        strategy: how `rate` (r) and `groups` (g) become those of a layer.
    """
    smallest = min(counts.values(), default=1)
    return [_layout(layer, n, math.sqrt(n / smallest), strategy, rate, groups) for layer, n in counts.items()]


def _layout(layer: str, count: int, rho: float, strategy: LayoutRule, rate: float, groups: int) -> Layout:
    if strategy == "progressive-r":
        rate = 1 + rate * rho
    elif strategy == "progressive-g":
        groups = 2 ** math.floor(math.log2(groups * rho) + 1e-12)
    rows = divisor(count, groups)
    return Layout(layer=layer, weights=count, rows=rows, terms=max(1, math.floor(count // rows / rate)))


def divisor(count: int, groups: int) -> int:
    """`groups` if it divides `count`, else the largest power of two up to it that does."""
    if count % groups == 0:
        return groups
    power = 1 << (groups.bit_length() - 1)
    while count % power:
        power //= 2
    return power
