"""One rule for what widths and ranks are rounded to, whichever method decides: there is always a half."""

from typing import Any

import pytest
import torch
from torch import nn

import graphcomp
from graphcomp.channels import multiple_for
from graphcomp.ir import trace


def narrow() -> graphcomp.Program:
    """16 channels throughout."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
    ]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 4))
    return trace(net.eval(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("passes", "narrower"),
    [
        ("l1{ratio=0.5, multiple=16}", {8}),
        ("l1{target=macs:0.5, multiple=16}", {8}),
        ("l1{target=macs:0.5, allocation=greedy, multiple=16}", {8}),
        ("random{ratio=0.6, multiple=16}", {8}),
        ("pfa{energy=0.5, multiple=16}", {8}),
        ("obs{target=macs:0.7, multiple=16}", {8}),
    ],
)
def test_channels(passes: str, narrower: set[int]) -> None:
    done = graphcomp.compile(narrow(), passes, data="random?limit=64")
    widths = {row["kept"] for row in done.steps[0].plan.evidence["groups"]}
    assert narrower <= widths <= {0, 16, *narrower}


@pytest.mark.parametrize(
    "passes",
    [
        "low-rank{target=macs:0.7, kind=svd, multiple=16}",
        "cc{rate=0.3, fit=responses, multiple=16}",
    ],
)
def test_ranks(passes: str) -> None:
    done = graphcomp.compile(narrow(), passes, data="random?limit=64")
    factors: list[dict[str, Any]] = done.steps[0].plan.decisions["factors"]
    ranks = {f["rank"] for f in factors if f["rank"] is not None}
    kept = {len(f["keep"]) for f in factors if f.get("keep") is not None}
    assert ranks | kept and ranks | kept <= {4, 8, 16}


@pytest.mark.parametrize(
    ("width", "multiple", "found"),
    [(64, 16, 16), (32, 16, 16), (31, 16, 8), (16, 16, 8), (8, 16, 4), (2, 16, 1), (1, 16, 1), (24, 12, 12)],
)
def test_the_largest_divisor_that_is_at_most_half(width: int, multiple: int, found: int) -> None:
    assert multiple_for(width, multiple) == found
