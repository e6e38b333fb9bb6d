"""One measure of agreement: relative to the largest value, beside a floor, by the types of a network."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcomp.onnx.agreement import FLOOR, disagreement, tolerance_for

TOLERANCE = 1e-4


@given(st.floats(-12, 4), st.floats(-14, 2), st.sampled_from([1e-4, 2e-2, 1e-1]))
def test_it_accepts_what_is_within_the_tolerance_or_below_the_floor(
    peak: float, error: float, tolerance: float
) -> None:
    expected = np.array([10.0**peak, 0.0])
    found = expected + np.array([0.0, 10.0**error])
    accepted = disagreement(found, expected, tolerance) <= tolerance
    bound = max(tolerance * 10.0**peak, FLOOR)
    if abs(10.0**error - bound) > 1e-9 * bound:
        assert accepted == (10.0**error < bound)


def test_a_detector_that_sees_nothing_agrees_with_itself() -> None:
    expected = np.linspace(0, 8e-6, 100, dtype=np.float32)
    rounded = expected + np.float32(2e-8)  # of sigmoids, which runtimes approximate differently
    assert np.abs(rounded - expected).max() / expected.max() > TOLERANCE
    assert disagreement(rounded, expected, TOLERANCE) <= TOLERANCE
    assert disagreement(np.zeros_like(expected), expected, TOLERANCE) > TOLERANCE


def test_numbers_that_are_none_never_agree() -> None:
    ones = np.ones(3, np.float32)
    assert not disagreement(np.array([1, np.nan, 1], np.float32), ones, TOLERANCE) <= TOLERANCE
    assert not disagreement(np.array([1, np.inf, 1], np.float32), ones, TOLERANCE) <= TOLERANCE
    assert disagreement(np.zeros((0, 3)), np.zeros((0, 3)), TOLERANCE) == 0.0


@pytest.mark.parametrize(
    ("types", "tolerance"),
    [
        ([torch.float32, torch.int64], 1e-4),
        ([torch.float32, torch.float16], 2e-2),
        ([torch.bfloat16, torch.float32], 1e-1),
        ([torch.float64], 1e-4),
        ([torch.int64], 1e-4),
        ([], 1e-4),
    ],
)
def test_the_coarsest_type_decides(types: list[torch.dtype], tolerance: float) -> None:
    assert tolerance_for(torch.zeros(1, dtype=t) for t in types) == tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_a_short_type_is_within_its_tolerance_and_not_within_another(dtype: torch.dtype) -> None:
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(0)).double()
    error = disagreement(exact.to(dtype).double().numpy(), exact.numpy(), tolerance_for([exact.to(dtype)]))
    assert 1e-4 < error <= tolerance_for([exact.to(dtype)])
