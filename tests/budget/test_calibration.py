"""calibrate-target: the staircase, errors of predictions, and what is refused."""

import json

import pytest
from rich.console import Console

from graphcomp.budget.calibration import GRID, STAIRS, WIDTHS, Error, calibrate, median, tables
from graphcomp.errors import ProviderError, RecipeError
from graphcomp.runtime.targets import TARGETS
from tests.stopwatch import Machine, staircase


@pytest.mark.slow
def test_a_known_machine_is_known() -> None:
    """On a machine of the fitted form: its stairs to the digit, layers that were not measured as well."""
    found = calibrate(TARGETS["cpu-avx512"], timer=Machine(block=16))
    work = 9 * 28 * 28
    assert found.stairs == {w: pytest.approx(staircase(w, w, 16, work)) for w in WIDTHS}
    assert found.stairs[61] == found.stairs[64] < found.stairs[65]
    assert len(found.layers) > len(GRID)
    convs = [e for e in found.layers if e.name.startswith("conv")]
    assert [e.relative for e in convs] == pytest.approx([0] * len(convs), abs=1e-6)
    assert found.networks == []
    text = json.loads(json.dumps(found.as_json()))
    assert text["median_layers"] < 0.1 and text["median_networks"] is None


@pytest.mark.slow
def test_tables() -> None:
    found = calibrate(TARGETS["cpu-avx2"], timer=Machine())
    console = Console(width=110)
    with console.capture() as capture:
        for table in tables(found):
            console.print(table)
    text = capture.get()
    assert STAIRS.describe() in text and "by MACs" in text and "layers that were not measured: median" in text


def test_errors_are_signed() -> None:
    assert Error("x", 1.1, 1.0).relative == pytest.approx(0.1)
    assert median([Error("x", 1.1, 1.0), Error("y", 0.7, 1.0), Error("z", 1.0, 1.0)]) == pytest.approx(0.1)
    assert median([]) is None


def test_unknown_networks_are_refused_before_any_work() -> None:
    machine = Machine()
    with pytest.raises(RecipeError, match="--networks: found 'resnet'"):
        calibrate(TARGETS["cpu-avx2"], networks=["resnet"], timer=machine)
    assert machine.asked == 0


def test_a_target_that_does_not_work_here() -> None:
    with pytest.raises(ProviderError, match="provider 'cuda'"):
        calibrate(TARGETS["cuda-tf32"])
