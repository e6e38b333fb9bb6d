"""The report of a compilation: `report.json` (the record itself) and `report.html` (one file, no script).

The text, the tables and the plots are all derived from `records.Report`, so a saved `report.json` can be
rendered again. Nothing is measured here, and a number is shown only if the record holds it.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from graphcomp.base import read_record, write_texts
from graphcomp.records import Report
from graphcomp.report.advice import advice
from graphcomp.report.explanation import COLUMNS, describe, label_of, layers
from graphcomp.report.figures import plots_of
from graphcomp.report.html import render
from graphcomp.report.layer_pairs import pair_layers
from graphcomp.report.quantized import describe_quantized, quantized_layers, quantized_rows, runtime_rows
from graphcomp.report.rounds import removals
from graphcomp.report.scores import measure_of, range_text, score_text, value_text
from graphcomp.report.words import (
    bytes_text,
    comparison,
    count_text,
    describe_dct,
    error_text,
    group_kept,
    headlines,
    interval_text,
    ms_text,
    notes,
    percent_text,
    points_text,
    ratio_text,
    robustness_rows,
    short_text,
    why_no_accuracy,
)

# -- writing and reading -------------------------------------------------------------------------------


def write_report(report: Report, out: Path) -> None:
    """Write `report.json` and `report.html` into the folder `out`, both or neither.

    Raises:
        OutputError: a file cannot be written (full disk, no permission); names the file. What stood there
            before is left as it was, and no temporary file stays behind.
    """
    texts = {
        out / "report.json": report.model_dump_json(indent=2) + "\n",
        out / "report.html": render_html(report),
    }
    write_texts(texts)


def read_report(path: Path) -> Report:
    """The report saved in the file `path`.

    Raises:
        LoadError: the file cannot be read or is no report of this schema version; names the first field.
    """
    return read_record(path, Report, "a report of schema version 2 or 1; compile the model again")


# -- the page ------------------------------------------------------------------------------------------


def render_html(report: Report) -> str:
    """The report as one HTML document that makes no request and runs no script."""
    filters: dict[str, Callable[..., Any]] = {
        "accuracy": score_text,
        "bytes": bytes_text,
        "compact_json": lambda value: json.dumps(to_jsonable_python(value), ensure_ascii=False),
        "count": count_text,
        "error": error_text,
        "interval": interval_text,
        "ms": ms_text,
        "ratio": ratio_text,
        "why_no_accuracy": why_no_accuracy,
        "range": range_text,
        "short": short_text,
        "value": value_text,
        "signed_ms": lambda value: f"{value:+.4f}" if abs(value) >= 5e-5 else "",
    }
    pairs = pair_layers(report.baseline.layers, report.final.layers)
    return render(
        "graphcomp.report",
        "report.html.j2",
        filters,
        report=report,
        change=percent_text,
        points=points_text,
        measure_of=measure_of,
        headlines=headlines(report),
        advice=advice(report),
        quantized=describe_quantized(report),
        quantized_layers=quantized_layers(report.quantized) if report.quantized else [],
        runtimes=runtime_rows(report),
        dct=describe_dct(report),
        explained=report.explanation,
        reasons=describe(report.explanation) if report.explanation else [],
        explained_layers=layers(report.explanation) if report.explanation else [],
        part_columns=COLUMNS,
        label_of=label_of,
        rows=[*comparison(report), *quantized_rows(report)],
        pairs=pairs,
        kept=group_kept(report),
        notes=notes(report),
        robustness=robustness_rows(report),
        plots=plots_of(report, pairs),
        removals={step.index: removals(step) for step in report.steps},
        recipe=yaml.safe_dump(to_jsonable_python(report.recipe), sort_keys=False, allow_unicode=True),
        command=_command(report),
    )


def _command(report: Report) -> str:
    """What computes the same again, in a shell, with the recipe in `recipe.yaml`: whatever the command line
    said, and whatever else the recipe does not hold. Paths are as they were given.
    """
    recipe = report.recipe
    options: list[tuple[str, object]] = [
        ("--recipe", "recipe.yaml"),
        ("--weights", recipe.get("weights")),  # those that come with a model are found again
        ("--input-shape", ",".join(map(str, report.input_shape or ())) or None),
        *(("--input-shape", f"{n}={','.join(map(str, s))}") for n, s in report.input_shapes.items()),
        ("--data", recipe.get("data", report.data)),
        ("--classes", ",".join(map(str, recipe.get("classes", ()))) or None),
        ("--head", recipe.get("head") if recipe.get("classes") else None),
        ("--target", report.target),
        ("--seed", report.seed),
        ("-o", "OUT"),
    ]
    given = [(name, str(value)) for name, value in options if value is not None]
    return shlex.join(["graphcomp", "compile", report.model, *(word for pair in given for word in pair)])
