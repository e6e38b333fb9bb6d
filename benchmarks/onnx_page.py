"""What `onnx_in.py` measured, as a section of docs/results.md."""

from collections import Counter
from collections.abc import Mapping
from statistics import median

from rows import Row, table

COMPARED = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "densenet121", "regnet_y_400mf")
EXACT, PARITY = 1e-9, 1e-3
EXPORTERS = ("legacy", "dynamo", "nhwc")


def section(rows: Mapping[str, Row], settings: Row, places: str) -> str:
    """Counts, one line a network, what others make of the same files, and how it was measured."""
    size = settings["size"]
    said = (
        f"`python benchmarks/onnx_in.py --size {size}`: networks with random weights through torch's two "
        "exporters, opsets and constant folding in turn, and some as channels-last graphs; images of at most "
        f"{size} px, where the network takes them. Read, compared with ONNX Runtime on three samples in one "
        "batch and each alone, `l1{ratio=0.5}` verified in float64, exported again. *Removable* are the "
        "channels that a pass may remove, beside those of the traced network; *left* is the part of the "
        f"parameters that `l1` leaves. {places}."
    )
    return "\n\n".join([said, "\n".join(_counts(rows)), _files(rows), *_others(rows)])


def _counts(rows: Mapping[str, Row]) -> list[str]:
    files = {k: r for k, r in rows.items() if "no file" not in r}
    read = {k: r for k, r in files.items() if "agreement" in r}
    refused = Counter(r["refused"] for r in files.values() if "refused" in r)
    apart = [k for k, r in files.items() if r.get("agreement", 0) > PARITY and r.get("alone", "?")]
    wrong = [*apart, *(k for k, r in files.items() if "wrong" in r)]
    rounded = [k for k, r in read.items() if r.get("alone") == ""]
    equal = [k for k, r in read.items() if r["removable"] == r["removable_traced"]]
    more = [k for k, r in read.items() if r["removable"] > r["removable_traced"]]
    exact = [k for k, r in read.items() if r.get("verify_error", 1) <= EXACT]
    written = [k for k, r in read.items() if r.get("parity", 1) <= PARITY]
    networks = {key.split()[0] for key in rows}
    seconds = [r["read_s"] for r in read.values()]
    cut = [r["remove_s"] for r in read.values() if "remove_s" in r]
    out = [r["export_s"] for r in read.values() if "export_s" in r]
    lines = [
        f"- {len(files)} files of {len(networks)} networks ({len(rows) - len(files)} that no exporter "
        f"wrote): {len(read)} read, {sum(refused.values())} refused, {len(wrong)} wrong{_named(wrong)}.",
        "- Further than 1e-4 from ONNX Runtime, though every row alone is within 1e-5 of it, so that "
        f"rounding is amplified: {len(rounded)}{_named(rounded)}.",
        f"- As many channels removable as from the traced network: {len(equal)} of {len(read)}; more: "
        f"{len(more)}{_named(more)}; fewer: {len(read) - len(equal) - len(more)}"
        f"{_named([k for k in read if k not in equal and k not in more])}.",
        f"- Half of all channels removed exactly: {len(exact)} of {len(read)}"
        f"{_named([k for k in read if k not in exact])}; exported and equal to the program: {len(written)}.",
    ]
    if seconds and cut and out:
        lines.append(
            "- CPU seconds, median and largest: "
            + ", ".join(
                f"{name} {median(found):.1f} and {max(found):.1f}"
                for name, found in (("reading", seconds), ("`l1` with its proof", cut), ("export", out))
            )
            + "."
        )
    return lines + [f"- Refused ({count}): {reason}" for reason, count in refused.items()]


def _named(keys: list[str]) -> str:
    return f" ({'; '.join(keys)})" if keys else ""


def _files(rows: Mapping[str, Row]) -> str:
    head = ["network", "file", "ONNX Runtime", "removable / traced", "left / traced", "removal", "parity",
            "read, l1, export (s)"]  # fmt: skip
    return table(head, [_file(key, row) for key, row in rows.items()])


def _file(key: str, row: Row) -> list[str]:
    network, _, file = key.partition(" ")
    name = network.partition(":")[2]
    if "agreement" not in row:
        why = row.get("wrong") or row.get("refused") or f"no file: {row['no file']}"
        return [name, file, why.replace("|", "\\|"), *[""] * 5]
    cells = [name, file, f"{row['agreement']:.0e}", f"{row['removable']} / {row['removable_traced']}"]
    if "parity" not in row:
        return [*cells, row["error"].replace("|", "\\|"), "", "", f"{row['read_s']:.1f}"]
    return [
        *cells,
        f"{row['left']:.3f} / {row['left_traced']:.3f}",
        f"{row['verify_error']:.0e}",
        f"{row['parity']:.0e}",
        f"{row['read_s']:.1f}, {row['remove_s']:.1f}, {row['export_s']:.1f}",
    ]


def _others(rows: Mapping[str, Row]) -> list[str]:
    files = {k: r for k, r in rows.items() if "onnx2torch" in r}
    if not files:
        return []
    kinds = Counter(r["onnx2torch"].partition(":")[0] for r in files.values())
    equal = [r for r in files.values() if r["onnx2torch"] == "equal"]
    traced = [r for r in equal if "their_removable" in r]
    same = sum(r["their_removable"] == r["removable_traced"] for r in traced if "removable_traced" in r)
    raised = Counter(
        r["onnx2torch"][:100].replace("|", "\\|")
        for r in files.values()
        if r["onnx2torch"].partition(":")[0] not in ("equal", "wrong")
    )
    wrong = [k for k, r in files.items() if r["onnx2torch"].startswith("wrong")]
    text = (
        f"### The same files by onnx2torch 1.5.15\n\nOf {len(files)} files {kinds['equal']} become a module "
        f"that computes the same for two samples in one batch and each alone, {kinds['wrong']} one that does "
        f"not{_named(wrong)}, and {len(files) - kinds['equal'] - kinds['wrong']} none. Of the equal ones "
        f"{len(traced)} can be traced afterwards, {same} of them with as many removable channels as the "
        "network itself."
    )
    reasons = "\n".join(f"- {count} times: {reason}" for reason, count in raised.most_common(12))
    pruned = [(k, r) for k, r in files.items() if k.startswith("ten-classes:") and "their_left" in r]
    lines = [
        [
            key.partition(":")[2],
            f"{row['their_left']:.2f}",
            row["onnxsim"],
            f"{row['after'] / row['before']:.2f}" if "after" in row else "-",
            f"{row['their_s']:.1f}",
            f"{row['remove_s']:.1f}" if "remove_s" in row else "-",
        ]
        for key, row in pruned
    ]
    head = [
        "file",
        "onnxsim: left",
        "in ONNX Runtime",
        "graphcomp: left",
        "onnxsim (s)",
        "graphcomp with proof (s)",
    ]
    sim = [
        "### The same files by onnxsim 0.8.1\n\n`apply_structured_pruning(model, 0.5)` beside "
        "`l1{ratio=0.5}`: numbers of floating point in the file that are left, as a part of those before; "
        "networks with heads of ten classes, so that the head does not hide the rest. graphcomp keeps "
        "widths at multiples of the target's 8, which groups of 8 channels (RegNet) or 58 (ShuffleNet) feel.",
        table(head, lines),
    ]
    return [text, *([reasons] if reasons else []), *(sim if lines else [])]
