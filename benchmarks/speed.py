"""Real speed beside theory: whole networks, dense, by Torch-Pruning and by graphcomp, timed side by side.

    python benchmarks/zoo.py --create                         # once: .venv-zoo, which Torch-Pruning runs in
    python benchmarks/speed.py                                # all networks at batch 1 and 8; resumes
    python benchmarks/speed.py --networks 'resnet*' --again   # make and measure some of them anew
    python benchmarks/speed.py --render                       # write the section of docs/results.md

Six files a network, all by the same exporter with the same settings:

    dense                  as torchvision builds it, with random weights (nothing is downloaded)
    torch-pruning          as its README sets it up, at the one ratio that leaves half the MACs
    torch-pruning rounded  the same with round_to, the block of this machine's kernels
    macs                   l1{target=macs:0.5}: one share for all
    macs greedy            l1{target=macs:0.5, allocation=greedy}
    latency                l1{target=latency:0.5}: half the measured time instead

Every variant is made in a process of its own, so that memory goes back; then all six files of a network are
timed in turn (A B C D E F F E D C B A, six loads of all) in one process, which is what makes their ratios
comparable. Realised is the measured ratio over that of the MACs; intervals are bootstrapped over loads and
rounds.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the venv of Torch-Pruning does not have graphcomp installed

from section import replace_section  # noqa: E402
from torch import nn  # noqa: E402
from zoo import NATIVE, THEIRS, build, describe, image, their_pruner  # noqa: E402

Result = dict[str, Any]

NETWORKS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121")
DEPTHWISE = frozenset({"mobilenet_v2"})
"""Networks whose depthwise convolutions cost time and hardly any MACs."""
BATCHES = (1, 8)
MACS, LATENCY = 0.5, 0.5
"""Parts of the dense network's that are to be left."""
NEAR = 1e-3
"""Ratios of Torch-Pruning are searched to this width."""
LEAST = 0.9
"""Of theory, that is to be realised."""
OUT, DOCS = ROOT / "out" / "speed", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- speed: begin, written by benchmarks/speed.py --render -->", "<!-- speed: end -->"

DENSE, PLAIN, ROUNDED, BY_MACS, GREEDILY, BY_LATENCY = (
    "dense",
    "torch-pruning",
    "torch-pruning rounded",
    "macs",
    "macs greedy",
    "latency",
)
TITLES = {
    DENSE: "dense",
    PLAIN: "Torch-Pruning",
    ROUNDED: "Torch-Pruning, round_to",
    BY_MACS: "graphcomp, by MACs",
    GREEDILY: "graphcomp, by MACs, greedy",
    BY_LATENCY: "graphcomp, by latency",
}
OURS = (BY_MACS, BY_LATENCY)
"""By default; greedily by MACs shows what the default is for."""

# ---------------------------------------------------------------------- making files


def make(variant: str, name: str) -> Result:
    """Write the ONNX file of a variant; its MACs, and what its maker says of it."""
    return MAKERS[variant](name, file_of(variant, name))


def file_of(variant: str, name: str) -> Path:
    """Where the ONNX file of a variant is."""
    return OUT / name / f"{variant.replace(' ', '-')}.onnx"


def export(module: nn.Module, file: Path) -> Result:
    """Trace and export: the same for every variant."""
    from graphcomp.ir.tracing import trace

    return export_program(trace(module, image(NATIVE), copy_weights=False), file)


def export_program(program: Any, file: Path) -> Result:
    """Write the ONNX file of a program."""
    from graphcomp.measure.cost import macs
    from graphcomp.onnx.export import export_onnx
    from graphcomp.runtime.targets import find_target

    made = export_onnx(program, file, batches=(1, 2), provider=find_target("auto").provider)
    return {"macs": macs(program), "bytes": made.bytes, "cleanup": made.cleanup}


def dense(name: str, file: Path) -> Result:
    """The network as it is."""
    return export(build(name), file)


def theirs(rounded: bool) -> Callable[[str, Path], Result]:
    """Torch-Pruning at the smallest ratio that leaves no more than the MACs asked for."""

    def made(name: str, file: Path) -> Result:
        from graphcomp.runtime.targets import find_target

        round_to = find_target("auto").multiple if rounded else None
        goal = MACS * macs_of(build(name))
        low, high = 0.0, 1.0
        while high - low > NEAR:
            ratio = (low + high) / 2
            if macs_of(their_pruned(name, ratio, round_to)) > goal:
                low = ratio
            else:
                high = ratio
        return {**export(their_pruned(name, high, round_to), file), "ratio": high, "round_to": round_to}

    return made


def their_pruned(name: str, ratio: float, round_to: int | None) -> nn.Module:
    """Set up as its README does: the same ratio for all layers but the classifier."""
    model = build(name)
    their_pruner(model, image(NATIVE), ratio, round_to).step()
    return model


def macs_of(module: nn.Module) -> int:
    """For one image."""
    from graphcomp.ir.tracing import trace
    from graphcomp.measure.cost import macs

    return macs(trace(module, image(NATIVE), copy_weights=False))


def ours(options: str) -> Callable[[str, Path], Result]:
    """Channels removed by their weights' norms, as many as the target asks for."""

    def made(name: str, file: Path) -> Result:
        import graphcomp
        from graphcomp.ir.tracing import trace

        program = trace(build(name), image(NATIVE), copy_weights=False)
        compiled = graphcomp.compile(program, f"l1{{{options}}}")
        evidence = compiled.steps[-1].plan.evidence
        said = {k: evidence[k] for k in ("target", "latency", "reverted") if k in evidence}
        return {**export_program(compiled.program, file), "evidence": said}

    return made


MAKERS: dict[str, Callable[[str, Path], Result]] = {
    DENSE: dense,
    PLAIN: theirs(rounded=False),
    ROUNDED: theirs(rounded=True),
    BY_MACS: ours(f"target=macs:{MACS}"),
    GREEDILY: ours(f"target=macs:{MACS}, allocation=greedy"),
    BY_LATENCY: ours(f"target=latency:{LATENCY}"),
}


def made_apart(variant: str, name: str, venv: Path) -> Result:
    """`make` in a process of its own, of the interpreter that the variant needs."""
    foreign = variant in (PLAIN, ROUNDED)
    python = venv / "bin" / "python" if foreign else Path(sys.executable)
    if not python.exists():
        raise SystemExit(f"{python}: not found; create it with benchmarks/zoo.py --create --venv {venv}")
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    asked = subprocess.run(
        [str(python), str(Path(__file__).resolve()), "--make", variant, name],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **single},
    )
    if asked.returncode:
        raise SystemExit(f"{name}, {variant}: could not be made; see its message above")
    found: Result = json.loads(asked.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------------- measuring


def measure(
    names: Sequence[str], batches: Sequence[int], seconds: float, runs: int, venv: Path, again: bool
) -> None:
    """Make the files that are missing, time the rows that are missing, and save after each."""
    results = load()
    for name in names:
        found = results["networks"].setdefault(name, {"made": {}, "rows": {}})
        if again:
            found |= {"made": {}, "rows": {}}
        for variant in MAKERS:
            if variant not in found["made"] or not file_of(variant, name).exists():
                found["made"][variant] = made_apart(variant, name, venv)
                found["rows"] = {}  # of files that are no more
                save(results)
                print(f"{name}, {variant}: {found['made'][variant]['macs']:,} MACs", flush=True)
        for batch in batches:
            if str(batch) not in found["rows"]:
                found["rows"][str(batch)] = timed(name, batch, seconds, runs)
                results["environment"] = describe(venv / "bin" / "python", {})
                save(results)
                print("\n".join(said(name, str(batch), found)), flush=True)


def timed(name: str, batch: int, seconds: float, runs: int) -> Result:
    """All variants side by side: times, and what dense and Torch-Pruning's take of them."""
    import numpy as np

    from graphcomp.runtime.bench import ratio_interval
    from graphcomp.runtime.turns import in_turn

    files = [file_of(variant, name) for variant in MAKERS]
    turns = dict(zip(MAKERS, in_turn(files, batch=batch, seconds=seconds, runs=runs), strict=True))
    busy = any(t.busy for t in turns.values())
    times = {variant: t.cpu if busy else t.wall for variant, t in turns.items()}

    def ratio(variant: str, other: str) -> Result:
        return ratio_interval(times[other], times[variant]).model_dump()

    rows = {
        v: {"ms": float(np.median(times[v])), "dense": ratio(v, DENSE), "theirs": ratio(v, PLAIN)}
        for v in MAKERS
    }
    return {"busy": busy, "rounds": times[DENSE].size // 2, "variants": rows}


def load() -> Result:
    """What was measured so far."""
    file = OUT / "results.json"
    found: Result = json.loads(file.read_text()) if file.exists() else {"networks": {}}
    return found


def save(results: Result) -> None:
    """Write the results whole or not at all."""
    OUT.mkdir(parents=True, exist_ok=True)
    whole = OUT / "results.partial"
    whole.write_text(json.dumps(results, indent=1))
    whole.replace(OUT / "results.json")


# ---------------------------------------------------------------------- what it says


def theory(found: Result, variant: str) -> float:
    """Speedup by MACs."""
    return float(found["made"][DENSE]["macs"] / found["made"][variant]["macs"])


def realised(found: Result, batch: str, variant: str) -> float:
    """Measured speedup over that by MACs."""
    measured = found["rows"][batch]["variants"][variant]["dense"]["value"]
    return float(measured / theory(found, variant))


def said(name: str, batch: str, found: Result) -> list[str]:
    """One row for the terminal, variant by variant, and what does not hold of it."""
    lines = [f"{name}, batch {batch}{' (CPU time)' if found['rows'][batch]['busy'] else ''}"]
    for variant in MAKERS:
        cells = cells_of(found, batch, variant)
        lines.append(
            f"  {cells[0]:24} {cells[1]:>10}  MACs {cells[2]}  measured {cells[3]}  of it {cells[4]}"
        )
    return lines + [f"  NOT HELD: {text}" for text in shortfalls(name, batch, found)]


def cells_of(found: Result, batch: str, variant: str) -> list[str]:
    """Name, ms, speedup by MACs, measured, realised, against Torch-Pruning's default."""
    row = found["rows"][batch]["variants"][variant]
    share = f"{realised(found, batch, variant):.2f}" if variant != DENSE else ""
    against = _interval(row["theirs"]) if variant not in (DENSE, PLAIN) else ""
    measured = _interval(row["dense"]) if variant != DENSE else ""
    theoretical = f"{theory(found, variant):.2f}x" if variant != DENSE else ""
    return [TITLES[variant], f"{row['ms']:.2f} ms", theoretical, measured, share, against]


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.2f}x [{found['low']:.2f}, {found['high']:.2f}]"


def shortfalls(name: str, batch: str, found: Result) -> list[str]:
    """What is to hold of a row and does not."""
    lines = []
    for variant in OURS:
        row, title = found["rows"][batch]["variants"][variant], TITLES[variant]
        share = realised(found, batch, variant)
        if name not in DEPTHWISE and share < LEAST:
            lines.append(f"{name}, batch {batch}: {title} realises {share:.2f} of theory, not {LEAST}")
        if row["dense"]["high"] < 1:
            lines.append(f"{name}, batch {batch}: {title} is slower than dense, {_interval(row['dense'])}")
        if row["theirs"]["low"] <= 1:
            lines.append(
                f"{name}, batch {batch}: {title} is not ahead of Torch-Pruning's default, "
                f"{_interval(row['theirs'])}"
            )
    return lines


INTRO = f"""\
torchvision's networks with random weights at {NATIVE} px, one thread, written by `benchmarks/speed.py`. All
variants of a network are exported by the same exporter and timed in turn in one process, in six loads;
intervals are 95 % bootstraps over loads and rounds. *By MACs*: dense over the variant. *Realised*: measured
over that.
Torch-Pruning is set up as its README does, at the smallest ratio that leaves {MACS:g} of the MACs;
`round_to` is the block of this machine's kernels. graphcomp by MACs is `l1{{target=macs:{MACS:g}}}`, greedy
with `allocation=greedy`, by latency `l1{{target=latency:{LATENCY:g}}}`, which removes as much as half the
time at batch 1 asks for."""

HEAD = ["network", "batch", "variant", "time", "by MACs", "measured", "realised", "against Torch-Pruning"]


def section(results: Result) -> str:
    """The whole Markdown section."""
    rows = [(n, b, f) for n, f in results["networks"].items() if n in NETWORKS for b in f["rows"]]
    there = results["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in there["versions"].items() if v)
    table = [f"| {' | '.join(HEAD)} |", "|---|---:|---|" + "---:|" * 5]
    for name, batch, found in rows:
        busy = " (CPU time)" if found["rows"][batch]["busy"] else ""
        for variant in MAKERS:
            first = [name, f"{batch}{busy}"] if variant == DENSE else ["", ""]
            table.append(f"| {' | '.join([*first, *cells_of(found, batch, variant)])} |")
    short = [text for name, batch, found in rows for text in shortfalls(name, batch, found)]
    missing = [n for n in NETWORKS if n not in {name for name, _, _ in rows}]
    lines = [
        f"Asked of every row of graphcomp by default: at least {LEAST} realised (networks without depthwise "
        "convolutions), never slower than dense, ahead of Torch-Pruning's default. `allocation=greedy` is "
        "not held to it.",
        "",
        *([f"- Does not hold: {text}." for text in short] or ["- Holds at every row."]),
        *([f"- Not measured: {', '.join(missing)}."] if missing else []),
    ]
    where = f"{there['machine']}; {versions}; {there['date']}."
    parts = [BEGIN, "## Speed beside theory", "", INTRO, "", where, "", *lines, "", *table, END]
    return "\n".join(parts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make", nargs=2, metavar=("VARIANT", "NETWORK"), help=argparse.SUPPRESS)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-zoo", help=f"the venv of {THEIRS}")
    parser.add_argument("--networks", default="*", help="glob of network names, several separated by commas")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing for one row")
    parser.add_argument("--runs", type=int, default=200, help="of each file at most")
    parser.add_argument("--again", action="store_true", help="make and measure what has a result too")
    parser.add_argument("--render", action="store_true", help="only write the section of docs/results.md")
    options = parser.parse_args()
    if options.make:
        print(json.dumps(make(*options.make)))
        return
    if options.render:
        replace_section(DOCS, BEGIN, END, section(load()))
        return
    patterns = options.networks.split(",")
    names = [n for n in NETWORKS if any(fnmatch.fnmatch(n, p) for p in patterns)]
    batches = [int(b) for b in options.batches.split(",")]
    measure(names, batches, options.seconds, options.runs, options.venv, options.again)


if __name__ == "__main__":
    main()
