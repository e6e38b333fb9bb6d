"""The sections of docs/results.md that `collections_in.py` writes."""

import statistics
from collections.abc import Sequence
from typing import Any

from rows import DOCS, Lines, Row, Rows, page, written
from section import read_section, replace_section

TITLES = {
    "timm": "Networks of timm, of every family",
    "smp": "Networks of segmentation_models_pytorch",
    "torchvision": "Detectors and networks of videos of torchvision",
}
HEAD = [
    "network", "kind", "door", "may go", "left", "error", "of the module", "CPU s", "ONNX", "Torch-Pruning",
    "what stays, and why",
]  # fmt: skip
SAID = (
    "`kind`: with products of two computed matrices (attention) or without (CNN). `may go`: of the rows of "
    "all layers, those of the network's outputs aside. `left`: parameters when half of these went. `error`: "
    "of the program against the module and of the smaller program against zeros, float64; `of the module`: "
    "of the smaller program against the module that has these zeros, where its code has a place for them. "
    "`CPU s`: trace + analysis. `ONNX`: parity of the smaller program's file, float32. `Torch-Pruning`: half "
    "of the same network by it, judged as in the zoo; CPU s."
)
TARGETS = {"CNN": 0.95, "attention": 0.85}


def render(collection: str) -> None:
    """Write the section: what was measured now, and the lines that the document has already."""
    begin = f"<!-- {collection}: begin, written by benchmarks/collections_in.py --render -->"
    end = f"<!-- {collection}: end -->"
    there = read_section(DOCS, begin, end)
    _, *rest = there.split("\n\n", 2)
    rows = Rows.load(collection)
    said = f"`benchmarks/collections_in.py --of {collection}`. {SAID}"
    lines = written(rest[1] if rest else "", said, HEAD, 1)
    refused = []
    for name, row in rows.found.items():
        if "rows" in row:
            lines[f"`{name}`",] = cells(name, row), row["where"]
        else:
            why = row.get("refused") or row.get("raised") or row.get("unfinished")
            refused.append(f"`{name}`: {str(why).partition('; ')[0]:.160}")
    lacking = f" Not in the table: {'; '.join(refused)}." if refused else ""
    body = page(said, HEAD, lines)
    text = f"{begin}\n## {TITLES[collection]}\n\n{totals(lines)}{lacking}\n\n{body}\n{end}"
    replace_section(DOCS, begin, end, text)


def cells(name: str, row: Row) -> list[str]:
    """One line."""
    return [
        f"`{name}`",
        "attention" if row["products"] else "CNN",
        row["door"] + (", one size" if row["specialised"] else ""),
        f"{row['rows']:.2f}",
        f"{row['params']:.2f}",
        f"{max(row['program'], row['error']):.0e}" + ("" if row["exact"] else " **wrong**"),
        f"{row['module']:.0e}" if "module" in row else "-",
        f"{row['trace_s']:.1f} + {row['analyse_s']:.2f}",
        _file(row.get("onnx")),
        _theirs(row.get("theirs")),
        "; ".join(row["pins"]) or "-",
    ]


def _file(found: Row | None) -> str:
    if found is None:
        return "-"
    if "parity" not in found:
        return str(found.get("refused") or found.get("raised") or found["unfinished"]).partition("; ")[0][
            :160
        ]
    return f"{found['parity']:.0e}" + ("" if found["writer"] == "rows" else " (torch's exporter)")


def _theirs(found: Row | None) -> str:
    if found is None:
        return "-"
    seconds = f", {found['s']:.1f} s" if "s" in found else ""
    if "error" in found:
        return f"{found['outcome']} ({found['error']:.0e}){seconds}"
    if "outcome" in found:
        return f"{found['outcome'].partition(': ')[0]}{seconds}"
    return f"raises {found['raised'].partition(': ')[0]}" if "raised" in found else found["unfinished"]


def totals(lines: Lines) -> str:
    """What all lines say together, and how far that is from what is aimed at."""
    table = [dict(zip(HEAD, line, strict=True)) for line, _ in lines.values()]
    seconds = [float(row["CPU s"].partition("+ ")[2]) for row in table]
    exact, whole, first = (
        sum(test(row) for row in table)
        for test in (
            lambda row: "wrong" not in row["error"],
            lambda row: row["of the module"] != "-",
            lambda row: row["door"].startswith("torch.fx"),
        )
    )
    parts = [
        f"{len(table)} networks, {exact} exact, {whole} of them against the module itself; torch.fx took "
        f"{first}"
    ]
    for kind, target in TARGETS.items():
        shares = [float(row["may go"]) for row in table if row["kind"] == kind]
        if shares:
            met = sum(share >= target for share in shares)
            parts.append(
                f"{kind}: median {statistics.median(shares):.2f}, {met} of {len(shares)} at {target} or more"
            )
    parts.append(
        f"median analysis {statistics.median(seconds):.2f} CPU s (aim: below 0.3), longest "
        f"{max(seconds):.1f}, {sum(s > 5 for s in seconds)} above 5 s"
    )
    parts += _outcomes("ONNX", [row["ONNX"] for row in table])
    parts += _outcomes("Torch-Pruning", [row["Torch-Pruning"] for row in table])
    return ". ".join(parts) + "."


def _outcomes(what: str, found: Sequence[Any]) -> list[str]:
    asked = [str(cell) for cell in found if cell != "-"]
    if not asked:
        return []
    counts: dict[str, int] = {}
    for cell in asked:
        kind = "a file, parity checked" if what == "ONNX" and cell[0].isdigit() else cell.partition(" (")[0]
        kind = "raises" if kind.startswith("raises") else kind.partition(", ")[0] if what != "ONNX" else kind
        counts[kind] = counts.get(kind, 0) + 1
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda c: -c[1]))
    return [f"{what}, asked of {len(asked)}: {told}"]
