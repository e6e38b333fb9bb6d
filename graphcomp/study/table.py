"""What a study found, as numbers: about classes and layers of each cell, and one table of all cells."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from graphcomp.base import atomic_file
from graphcomp.errors import OutputError
from graphcomp.measure import ClassStatistics, class_statistics
from graphcomp.records import Score, Snapshot
from graphcomp.report import Verdict, change_text, judge, judge_speed, measure_of, owner
from graphcomp.study.axes import number
from graphcomp.study.grid import Cell
from graphcomp.study.reading import Reading, Value
from graphcomp.study.run import CellResult, Outcome, in_order


@dataclass(frozen=True)
class Findings:
    """A result with what it says about classes and layers, and what the source of the study says of it."""

    result: CellResult
    class_names: Sequence[str] | None
    expected: Mapping[str, Value] = field(default_factory=dict)

    @cached_property
    def classes(self) -> ClassStatistics | None:
        """None without a confusion matrix."""
        return class_statistics(self.result.confusion) if self.result.confusion else None

    @cached_property
    def layers(self) -> dict[str, float]:
        """Of every layer's MACs, the part that went."""
        return layer_rates(self.result.baseline, self.result.final)

    @property
    def score(self) -> Score | None:
        """Of the final network: accuracy, or the mean error where labels are values."""
        return self.result.final.score

    @property
    def verdicts(self) -> list[tuple[str, Verdict]]:
        """Speed and score against the original, and how good both together are; one for each batch size."""
        before, after = self.result.baseline.score, self.score
        timings = self.result.bench.batches if self.result.bench else []
        if not timings:
            return [(change_text(before, after), judge(None, before, after)[1])]
        several = len(timings) > 1
        found = [(timing, *judge_speed(timing, before, after)) for timing in timings]
        return [(f"batch {t.batch}: {said}" if several else said, verdict) for t, said, verdict in found]

    @property
    def title(self) -> str:
        """What the cell is, in words."""
        return ", ".join(f"{axis} {label}" for axis, label in self.result.labels.items())

    @property
    def params_left(self) -> float:
        """Of the network's trainable parameters."""
        return left(self.result.baseline.params_trainable, self.result.final.params_trainable)

    @property
    def macs_left(self) -> float:
        """Of the network's MACs."""
        return left(self.result.baseline.macs, self.result.final.macs)

    @property
    def rate(self) -> float:
        """Of the network's MACs, the part that went."""
        return 1 - self.macs_left

    def class_name(self, index: int | None) -> str | None:
        """The study's name for a class, else that of the data, else its number."""
        if index is None:
            return None
        names = self.class_names or self.result.class_names or ()
        return names[index] if index < len(names) else str(index)


def by_measure(found: Sequence[Findings]) -> dict[str, list[Findings]]:
    """The cells that have a score, by what it is called."""
    groups: dict[str, list[Findings]] = {}
    for cell in found:
        if cell.score is not None:
            groups.setdefault(measure_of(cell.score), []).append(cell)
    return groups


def layer_rates(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """Part of each layer's MACs that went; a layer `a` that was split lives on as `a.0`, `a.1`, ….

    A layer that is called several times counts once, with all its calls.
    """
    old: dict[str, int] = {}
    for row in before.layers:
        old[row.name] = old.get(row.name, 0) + row.macs
    new = dict.fromkeys(old, 0)
    for row in after.layers:
        name = owner(row.name, new)
        if name is not None:
            new[name] += row.macs
    return {name: 1 - left(macs, new[name]) for name, macs in old.items()}


def left(before: int, after: int) -> float:
    """A part of one; all of nothing is left."""
    return after / before if before else 1.0


# ---------------------------------------------------------------------- the table


def findings(cells: Sequence[Cell], outcome: Outcome, reading: Reading) -> dict[str, Findings]:
    """What came out of the cells that have a result, by name, in the order of the grid."""
    names, said = reading.class_names, reading.expected
    results = in_order(cells, outcome.results)
    return {result.name: Findings(result, names, said.get(result.name, {})) for result in results}


def table(cells: Sequence[Cell], outcome: Outcome, reading: Reading) -> list[dict[str, Value]]:
    """One row a cell, in the order of the grid, all with the same columns; None where there is no number."""
    found = findings(cells, outcome, reading)
    rows = [_row(cell, outcome, found.get(cell.name), reading) for cell in cells]
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _row(cell: Cell, outcome: Outcome, found: Findings | None, reading: Reading) -> dict[str, Value]:
    row: dict[str, Value] = {"cell": cell.name}
    row |= {axis: label if (n := number(label)) is None else n for axis, label in cell.labels.items()}
    failure = outcome.failures.get(cell.name)
    row |= {"status": "done" if found else "failed" if failure else "not run"}
    said = {f"paper[{column}]": value for column, value in reading.expected.get(cell.name, {}).items()}
    if found is None:
        return row | {"error": failure.message if failure else None} | said
    return row | {"error": None} | measured(found) | said


def measured(found: Findings) -> dict[str, Value]:
    """The numbers of one cell, by column."""
    old, new = found.result.baseline, found.result.final
    row: dict[str, Value] = {
        "params_before": old.params_trainable,
        "params": new.params_trainable,
        "params_left": found.params_left,
        "params_state": new.params_state,
        "params_order": new.params_order,
        "macs_before": old.macs,
        "macs": new.macs,
        "macs_left": found.macs_left,
        "mac_rate": found.rate,
    }
    return row | _score_columns(found.result) | _class_columns(found) | _other(found.result)


def _score_columns(result: CellResult) -> dict[str, Value]:
    """Accuracy as `top1` and `top5`, or the mean absolute error as `mae`."""
    before, after = result.baseline.score, result.final.score
    if before is None or after is None:
        return {}
    name = "mae" if after.measure == "error" else "top1"
    row: dict[str, Value] = {
        f"{name}_before": before.value,
        name: after.value,
        f"{name}_change": after.value - before.value,
        f"{name}_low": after.low,
        f"{name}_high": after.high,
    }
    if before.top5 is not None and after.top5 is not None:
        row |= {"top5_before": before.top5, "top5": after.top5, "top5_change": after.top5 - before.top5}
    return row | {"samples": after.samples}


def _class_columns(findings: Findings) -> dict[str, Value]:
    found = findings.classes
    if found is None:
        return {}
    name = findings.class_name
    row: dict[str, Value] = {"class_variance": found.variance, "hardest_class": name(found.hardest)}
    row |= {f"accuracy[{name(i)}]": value for i, value in enumerate(found.accuracies)}
    return row | {f"mislabel[{name(i)}]": name(wrong) for i, wrong in enumerate(found.mislabels)}


def _other(result: CellResult) -> dict[str, Value]:
    row: dict[str, Value] = {}
    for timing in result.bench.batches if result.bench else []:
        speedup, column = timing.quoted, f"speedup_batch{timing.batch}"
        row |= {column: speedup.value, f"{column}_low": speedup.low, f"{column}_high": speedup.high}
    damaged = result.robustness
    for part, scores in (("_before", damaged.baseline), ("", damaged.final)) if damaged else ():
        for score in scores:
            name = "mae" if score.score.measure == "error" else "top1"
            row[f"{name}{part}[{score.corruption} {score.amount:g}]"] = score.score.value
    return row | {"seconds": result.seconds}


def as_csv(rows: Sequence[Mapping[str, Value]]) -> str:
    """Rows with equal columns as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_parquet(rows: Sequence[Mapping[str, Value]], path: Path) -> None:
    """The same as Parquet; needs pyarrow. OutputError if the file cannot be written."""
    import pyarrow
    import pyarrow.parquet

    # A column with words and numbers ("0.5", "all") has one type: text.
    mixed = {name for name in (rows[0] if rows else {}) if len({_type(row[name]) for row in rows} - {""}) > 1}
    plain = [{k: str(v) if k in mixed and v is not None else v for k, v in row.items()} for row in rows]
    with atomic_file(path) as temporary:
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), temporary)
        except pyarrow.ArrowException as error:
            raise OutputError(
                f"{path}: found {error}, expected rows that fit Parquet; use the CSV"
            ) from error


def _type(value: Value) -> str:
    return "" if value is None else "text" if isinstance(value, str) else "number"
