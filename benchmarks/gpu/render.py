"""From what `run.sh` measured to a section of docs/results.md.

python benchmarks/gpu/render.py out/gpu/results.json [--document docs/results.md]
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from section import replace_section

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results.md"
BEGIN, END = "<!-- gpu: begin, written by benchmarks/gpu/render.py -->", "<!-- gpu: end -->"
WHERE = {"cpu": "CPU, ONNX Runtime", "cuda": "GPU, ONNX Runtime", "torch": "GPU, torch"}
PAPER = "Play and Prune's source: theory 6.43x, GPU 4.02x, CPU 6.24x for VGG-16 at batch 512."


def section(results: Mapping[str, Any]) -> str:
    """What goes into the document."""
    told = [
        BEGIN,
        "",
        "## On a GPU",
        "",
        _machine(results),
        "",
        "```",
        "benchmarks/gpu/run.sh --data cifar10:DIR --weights resnet56.th",
        "```",
        "",
        *_tests(results.get("tests")),
        *_speed(results),
        *_finetune(results.get("finetune")),
        *_failures(results),
        END,
    ]
    return "\n".join(told)


def _machine(results: Mapping[str, Any]) -> str:
    found = results["machine"]
    versions = found.get("versions", {})
    gpu = versions.get("gpu", "no GPU")
    kept = ", ".join(f"{name} {versions[name]}" for name in sorted(versions) if name != "gpu")
    dry = (
        "**A dry run on the CPU: it says that the benchmark works, and nothing of a GPU.** "
        if results["dry"]
        else ""
    )
    return (
        f"{dry}{gpu}; {found.get('cpu', 'unknown CPU')}, {found.get('cores', '?')} cores, Python "
        f"{found.get('python', '?')}, {kept}; commit {found.get('commit', '?')}; "
        f"{results['seconds']:.0f} s in all. Speedups are of dense against compressed, in turn. {PAPER}"
    )


def _tests(part: Mapping[str, Any] | None) -> list[str]:
    if not part or not part["rows"]:
        return []
    row = part["rows"][-1]
    failed = row["failures"] + row["errors"]
    passed = row["tests"] - failed - row["skipped"]
    return [f"`pytest -m gpu`: {passed} passed, {failed} failed, {row['skipped']} skipped.", ""]


def _speed(results: Mapping[str, Any]) -> list[str]:
    rows = [(where, row) for where in WHERE for row in _measured(results.get(where))]
    if not rows:
        return []
    batches = sorted({row["batch"] for _, row in rows})
    lines: dict[tuple[str, str, str, str], dict[int, str]] = {}
    for where, row in rows:
        how = WHERE[where] + (", CUDA graphs" if row["graphs"] else "")
        key = (row["network"], f"{row['theory']:.2f}x", how, row["precision"])
        lines.setdefault(key, {})[row["batch"]] = _cell(row)
    head = ["network", "by MACs", "where", "precision", *(f"batch {b}" for b in batches)]
    return [
        *table(head, ([*key, *(cells.get(b, "") for b in batches)] for key, cells in sorted(lines.items()))),
        "",
    ]


def _measured(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return [row for row in (part or {"rows": []})["rows"] if "speedup" in row]


def _cell(row: Mapping[str, Any]) -> str:
    interval = f" [{row['low']:.2f}, {row['high']:.2f}]" if "low" in row else ""
    return f"{row['speedup']:.2f}x{interval}, {row['dense_ms']:.3g} to {row['small_ms']:.3g} ms"


def _finetune(part: Mapping[str, Any] | None) -> list[str]:
    rows = [row for row in (part or {"rows": []})["rows"] if "after" in row]
    head = ["model", "MACs left", "top-1 before", "cut", "trained", "epochs", "ms a step", "seconds"]
    cells = [
        [
            row["model"],
            f"{100 * row['left']:.1f} %",
            *(f"{100 * row[k]:.2f} %" for k in ("before", "cut", "after")),
            str(row["epochs"]),
            f"{row['step_ms']:.1f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return [*table(head, cells), ""] if cells else []


def _failures(results: Mapping[str, Any]) -> list[str]:
    """What was not measured, each reason once."""
    parts = {name: part for name, part in results.items() if isinstance(part, dict) and "rows" in part}
    told = {"machine": results["machine"].get("error"), **{name: p["error"] for name, p in parts.items()}}
    said = [f"- {name}: {error}" for name, error in told.items() if error]
    for name, part in parts.items():
        reasons: dict[str, int] = {}
        for row in part["rows"]:
            if "error" in row:
                reasons[row["error"]] = reasons.get(row["error"], 0) + 1
        said += [f"- {name}, {count} of {len(part['rows'])} rows: {why}" for why, count in reasons.items()]
    return ["Not measured:", "", *said, ""] if said else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """As Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--document", type=Path, default=DOCS)
    given = parser.parse_args()
    replace_section(given.document, BEGIN, END, section(json.loads(given.results.read_text())))


if __name__ == "__main__":
    main()
