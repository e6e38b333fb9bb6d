"""How a study is read: names of classes, axes of repetitions, and what the source that it repeats says."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from graphcomp.errors import RecipeError
from graphcomp.study.axes import as_text

Value = str | int | float | None

EXPECTABLE = (
    *("params_before", "params", "params_left", "params_state", "params_order", "macs_before", "macs"),
    *("macs_left", "top1_before", "top1", "top1_change", "top5_before", "top5", "top5_change"),
    *("mae_before", "mae", "mae_change"),
    *("class_variance", "hardest_class"),
)
"""Columns of `results.csv` that a source may have numbers for; and those of `PATTERN`."""
PATTERN = re.compile(r"(accuracy|mislabel|(top1|mae)(_before)?)\[.+\]|speedup_batch\d+")


class Paper(BaseModel):
    """What a source says of a study's cells.

    Attributes:
        source: which table or figure of whose paper it is.
        rows: each names cells by their labels on some axes, and has numbers under the names of columns of
            `results.csv`. Cells that agree on these axes share them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[str, Field(min_length=1)]
    rows: Annotated[list[dict[str, str | int | float]], Field(min_length=1)]


@dataclass(frozen=True)
class Reading:
    """What is known of a study besides its cells.

    Attributes:
        class_names: instead of those of the data.
        repeats: axes along which nothing differs but chance: a mean is taken over them.
        source: of what is expected.
        expected: cell name -> column -> what the source says.
    """

    class_names: Sequence[str] | None = None
    repeats: Sequence[str] = ()
    source: str | None = None
    expected: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)


def expected(
    paper: Paper | None, axes: Sequence[str], cells: Mapping[str, Mapping[str, str]], place: str, whole: bool
) -> dict[str, dict[str, Value]]:
    """What a source says of each cell.

    Args:
        paper: the source; None says nothing.
        axes: of the study.
        cells: labels by name.
        place: for messages.
        whole: whether every row has to be about some cell; a quick study has not all of them.

    Raises:
        RecipeError: a row of no cell, of no number, or beside another one; a name that is no axis or column.
    """
    found: dict[str, dict[str, Value]] = {}
    for index, row in enumerate(paper.rows if paper else ()):
        at = f"{place}: paper.rows.{index}"
        wanted = {axis: as_text(value) for axis, value in row.items() if axis in axes}
        numbers = {column: value for column, value in row.items() if column not in axes}
        _check_columns(at, numbers, axes)
        about = [name for name, labels in cells.items() if wanted.items() <= labels.items()]
        if whole and not about:
            said = ", ".join(f"{axis} {label}" for axis, label in wanted.items())
            raise RecipeError(f"{at}: found no cell with {said}, expected one; correct the row or the grid")
        for name in about:
            known = found.setdefault(name, {})
            if twice := known.keys() & numbers:
                raise RecipeError(
                    f"{at}: found {min(twice)} of cell {name} a second time, expected it once; remove one"
                )
            known |= numbers
    return found


def _check_columns(at: str, numbers: Mapping[str, Any], axes: Iterable[str]) -> None:
    if not numbers:
        raise RecipeError(f"{at}: found no number, expected one at least; name a column of results.csv")
    for column in numbers:
        if column not in EXPECTABLE and not PATTERN.fullmatch(column):
            raise RecipeError(
                f"{at}: found {column}, expected an axis ({', '.join(axes)}) or a column of results.csv "
                f"({', '.join(EXPECTABLE)}, accuracy[CLASS], mislabel[CLASS], speedup_batchN)"
            )
