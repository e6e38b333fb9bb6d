"""What rows write is read again as what was written: every row, in every spelling, on drawn numbers."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphcomp.errors import LoadError
from graphcomp.ir.program import Program, output_tensors
from graphcomp.ir.tracing import trace
from graphcomp.onnx.agreement import TOLERANCES
from graphcomp.onnx.rows import WRITES, NoRow
from graphcomp.onnx.writing import write
from tests.ir.test_operators import ROWS, branches, network
from tests.onnx.onnx_files import read_unchecked
from tests.onnx.test_writing import MORE, written

NARROWED = {"half": "float16", "bfloat16": "bfloat16"}
"""Rows whose rounding a reader, which computes in float32, does not have."""


@cache
def ways(row: str) -> tuple[Program, ...]:
    """A network for every spelling that is written by rows."""
    torch.manual_seed(0)
    found = [network([way]) for way in branches(row)] if row in ROWS else []
    found += [trace(build().eval(), torch.randn(1, 4, 6, 6)) for build in MORE.get(row, [])]
    return tuple(p for p in found if _has_rows(p))


def _has_rows(program: Program) -> bool:
    try:
        written(program)
    except NoRow:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(WRITES))
def test_a_row_is_read_as_it_was_written(row: str) -> None:
    """At what hypothesis draws: a spelling, its weights, its inputs and how many samples there are."""
    assert ways(row)

    @settings(max_examples=3 * len(ways(row)), deadline=None)
    @given(
        st.sampled_from(ways(row)), st.integers(0, 2**16), st.integers(1, 5), st.sampled_from([0.1, 1.0, 3.0])
    )
    def holds(program: Program, seed: int, batch: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = redrawn(program, generator)
        again = read_unchecked(written(drawn))
        x = torch.randn(batch, *drawn.example_inputs[0].shape[1:], generator=generator) * scale
        assert_equal(drawn, again, x, TOLERANCES[NARROWED.get(row, "float32")])

    holds()


def redrawn(program: Program, generator: torch.Generator) -> Program:
    """Other weights of the same size; buffers and vectors, which may have to be positive, as they are."""
    copy = program.clone()
    with torch.no_grad():
        for parameter in copy.module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter[torch.randperm(len(parameter), generator=generator)])
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return copy


def assert_equal(program: Program, again: Program, x: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        expected, found = (output_tensors(p(x.clone())) for p in (program, again))
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype or one.is_floating_point() and other.is_floating_point()
        scale = max(float(one.double().abs().nan_to_num(0, 0, 0).max()) if one.numel() else 0.0, 1e-2)
        torch.testing.assert_close(
            other.double(), one.double(), rtol=0, atol=tolerance * scale, equal_nan=True
        )


def test_numbers_of_samples_that_differ_are_refused() -> None:
    """A constant that is another for every sample, but no count of them."""
    program = trace(Squares(), torch.randn(1, 4))
    model = write(program, ["x"], ["y"], ({0: "n"},)).model
    with pytest.raises(LoadError, match="found numbers that differ from sample to sample"):
        read_unchecked(model)


class Squares(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.arange(x.size(0)) ** 2)[:, None]
