"""The picture of a fit: both errors of every layer, in the order of the network."""

import pytest

from graphcomp.report.fitted import LEAST, fit_figure
from graphcomp.report.plots import NARROW, WIDE, svg
from tests.report.test_report import FITTED


@pytest.mark.slow
@pytest.mark.parametrize("inches", [WIDE, NARROW])
def test_errors_along_the_depth(inches: float) -> None:
    assert FITTED.fit is not None
    figure = fit_figure(FITTED.fit, inches)
    (ax,) = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}  # type: ignore[union-attr]
    assert drawn == {
        "cut": [[1, LEAST], [2, 0.32], [3, 0.5]],
        "fitted again": [[1, LEAST], [2, 0.081], [3, 0.5]],
    }
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "layer, from stem to head"
    assert "fitted again" in str(svg(figure, "fit", "title", "description"))
