"""What `run.sh` runs: tests, times and a training on a GPU, each part in a process of its own.

    tests       pytest -m gpu
    torch       dense against compressed networks by torch itself: eager and CUDA graphs, in three precisions
    cpu, cuda   the same files by ONNX Runtime: theory, CPU, and CUDA in fp32, TF32 and fp16, with and without
                CUDA graphs
    finetune    ResNet-56 at half of the MACs, trained for as many epochs as fit

Times of two networks are taken in turn (A B B A) and their ratio is of medians. What is compressed are random
weights: times do not depend on them. Widths are multiples of 8, as tensor cores want them.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = {
    "VGG-16-CIFAR": ("models:vgg16-cifar", "macs:0.1555"),
    "ResNet-50": ("torchvision:resnet50", "macs:0.5"),
    "MobileNet-V2": ("torchvision:mobilenet_v2", "macs:0.5"),
}
BATCHES = (1, 512, 32, 128, 8)
"""The ends first: what does not fit into the time lies between them."""
PARTS = {"tests": 0.15, "torch": 0.25, "cuda": 0.3, "cpu": 0.12, "finetune": 0.18}
"""Name -> share of the time."""
Tell = Callable[[Any], None]


@dataclass(frozen=True)
class Asked:
    """What the command line says, and how large everything is."""

    out: Path
    seconds: float
    data: str | None = None
    weights: Path | None = None
    dry: bool = False

    @property
    def networks(self) -> Mapping[str, tuple[str, str]]:
        """Name -> model and target."""
        return {"quick": ("models:quick", "macs:0.5")} if self.dry else NETWORKS

    @property
    def batches(self) -> tuple[int, ...]:
        """Samples in a run."""
        return (1, 2) if self.dry else BATCHES


# ---------------------------------------------------------------------- the parts


def tests(asked: Asked, tell: Tell) -> None:
    """The tests that need a GPU."""
    report = asked.out / "gpu-tests.xml"
    report.unlink(missing_ok=True)
    paths = [ROOT / "tests/runtime/test_session.py"] if asked.dry else gpu_tests()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    ran = subprocess.run([*command, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, check=False)
    if not report.exists():
        raise RuntimeError(f"pytest ended with {ran.returncode}: {(ran.stdout + ran.stderr)[-2000:]}")
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    tell({**counts, "seconds": float(suite.attrib["time"]), "tail": ran.stdout[-2000:]})


def gpu_tests() -> list[Path]:
    """The files with tests for a GPU: to collect all others takes longer than to run these."""
    return [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "@pytest.mark.gpu" in p.read_text()]


def pairs(asked: Asked) -> dict[str, tuple[Any, Any]]:
    """Dense and compressed program of every network; made by the part that needs them first."""
    import graphcomp
    from graphcomp.compiler import load_source

    found = {}
    for name, (model, target) in asked.networks.items():
        places = [asked.out / "programs" / f"{name}-{kind}" for kind in ("dense", "small")]
        if not all(place.exists() for place in places):
            dense = graphcomp.compile(load_source(model).program, "fold-bn", allow_nothing=True).program
            small = graphcomp.compile(dense, f"l1{{target={target}, multiple=8}}").program
            for program, place in zip((dense, small), places, strict=True):
                graphcomp.save(program, place)
        dense, small = map(graphcomp.load, places)
        found[name] = dense, small
    return found


def jobs(asked: Asked, programs: Mapping[str, tuple[Any, Any]], cheap: bool = False) -> list[tuple[str, int]]:
    """Networks and batches in the order of `BATCHES`, of each the cheapest network first.

    All by their MACs if `cheap`: on a few cores one run of a large batch would take all the time there is.
    """
    from graphcomp.measure import macs

    cost = {name: macs(dense) for name, (dense, _) in programs.items()}
    every = [(name, batch) for batch in asked.batches for name in sorted(programs, key=cost.__getitem__)]
    return sorted(every, key=lambda job: cost[job[0]] * job[1]) if cheap else every


def theory(dense: Any, small: Any) -> float:
    """The ratio of MACs."""
    from graphcomp.measure import macs

    return macs(dense) / macs(small)


def by_torch(asked: Asked, tell: Tell) -> None:
    """Eager, and replayed as a CUDA graph, in fp32, TF32 and fp16."""
    import torch

    device = torch.device("cpu" if asked.dry and not torch.cuda.is_available() else "cuda")
    modes = [("fp32", torch.float32, False), ("tf32", torch.float32, True), ("fp16", torch.float16, True)]
    programs = pairs(asked)
    for name, batch in jobs(asked, programs):
        for precision, dtype, tf32 in modes:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            for graphs in (False, True):
                row = {"network": name, "precision": precision, "batch": batch, "graphs": graphs}
                row["theory"] = theory(*programs[name])
                with told(tell, row):
                    runs = [_runner(p, dtype, device, batch, graphs) for p in programs[name]]
                    row |= _in_turn(*runs, 0.05 if asked.dry else 0.4)


def _runner(program: Any, dtype: Any, device: Any, batch: int, graphs: bool) -> Callable[[], float]:
    """A function that runs a network once and says how many milliseconds that took."""
    import torch

    module = program.to(dtype).module.to(device=device, memory_format=torch.channels_last).eval()
    shape = (batch, *program.example_inputs[0].shape[1:])
    x = torch.randn(shape, device=device).to(dtype=dtype, memory_format=torch.channels_last)
    if device.type == "cpu":
        if graphs:
            raise RuntimeError("CUDA graphs: found no GPU, expected one")
        return lambda: _clocked(lambda: module(x))
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                module(x)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                module(x)

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.inference_mode():
            start.record()
            graph.replay() if graphs else module(x)
            end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    return run


def _clocked(work: Callable[[], Any]) -> float:
    import torch

    started = time.perf_counter()
    with torch.inference_mode():
        work()
    return 1e3 * (time.perf_counter() - started)


def _in_turn(base: Callable[[], float], new: Callable[[], float], seconds: float) -> dict[str, Any]:
    """Medians of both and their ratio, A B B A until the time is over, three rounds at least."""
    for _ in range(3):
        base(), new()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 6 or time.perf_counter() < end:
        for which, run in ((0, base), (1, new), (1, new), (0, base)):
            times[which].append(run())
    old, fresh = map(statistics.median, times)
    return {"dense_ms": old, "small_ms": fresh, "speedup": old / fresh, "runs": len(times[0])}


def by_runtime(provider: str) -> Callable[[Asked, Tell], None]:
    """ONNX Runtime on a provider."""

    def part(asked: Asked, tell: Tell) -> None:
        import torch

        from graphcomp import benchmark, export_onnx
        from graphcomp.runtime import probe
        from graphcomp.runtime.providers import OPTIONS

        if not (asked.dry and provider == "cuda"):
            probe(provider)  # type: ignore[arg-type]  # fails now, in words, where the runtime has no such provider
        used = "cpu" if asked.dry else provider
        types = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
        programs, files = pairs(asked), dict[tuple[str, Any], tuple[Path, Path]]()

        def exported(name: str, dtype: Any) -> tuple[Path, Path]:
            if (name, dtype) not in files:
                kind = "fp16" if dtype == torch.float16 else "fp32"
                made = tuple(asked.out / f"{name}-{which}-{kind}.onnx" for which in ("dense", "small"))
                for program, file in zip(programs[name], made, strict=True):
                    export_onnx(program.to(dtype), file, batches=(1,))
                files[name, dtype] = made  # type: ignore[assignment]
            return files[name, dtype]

        for name, batch in jobs(asked, programs, cheap=provider == "cpu"):
            for precision in types if provider == "cuda" else ("fp32",):
                for graphs in (False, True) if provider == "cuda" else (False,):
                    row: dict[str, Any] = {"network": name, "precision": precision, "batch": batch}
                    row |= {"graphs": graphs, "theory": theory(*programs[name])}
                    with told(tell, row):
                        OPTIONS["cuda"]["use_tf32"] = str(int(precision != "fp32"))
                        found = benchmark(
                            *exported(name, types[precision]),
                            provider=used,  # type: ignore[arg-type]
                            batches=[batch],
                            threads=1 if used == "cuda" or asked.dry else os.cpu_count() or 1,
                            runs=12 if asked.dry else 60,
                            seconds=0.1 if asked.dry else 0.5,
                            warmup_runs=2,
                            warmup_seconds=0.02 if asked.dry else 0.3,
                            cuda_graphs=graphs and used == "cuda",
                        )
                        (timing,) = found.batches
                        dense_ms, small_ms = timing.quoted_ms
                        row |= {"dense_ms": dense_ms, "small_ms": small_ms, "runs": timing.base.runs}
                        row |= {"speedup": timing.quoted.value, "tf32": found.tf32}
                        row |= {"low": timing.quoted.low, "high": timing.quoted.high}

    return part


def finetune(asked: Asked, tell: Tell) -> None:
    """Half of the MACs of ResNet-56, then as many epochs as fit; of dry runs a tiny network and digits."""
    import graphcomp
    from graphcomp.compiler import load_source, open_data
    from graphcomp.data import find_augmentation
    from graphcomp.measure import macs
    from graphcomp.train import TrainOptions, fit

    model = "models:quick" if asked.dry else "models:resnet56"
    if not asked.dry and (asked.data is None or asked.weights is None):
        raise RuntimeError("found no --data or --weights, expected cifar10:DIR and a trained ResNet-56")
    program = load_source(model, asked.weights).program
    data = open_data(asked.data or "digits?limit=60", program, 0)
    small = graphcomp.compile(program, "l1{target=macs:0.5, multiple=8}").program
    row: dict[str, Any] = {"model": model, "macs": macs(program), "left": macs(small) / macs(program)}
    row["samples"] = len(data.eval)

    def trained(**options: Any) -> Any:
        batch = 16 if asked.dry else 256
        how = TrainOptions(batch=batch, lr=0.05, held_out=0, keep="last", **options)
        augmentation = find_augmentation("auto", data.spec, [(3, 32, 32)], None)
        return fit(small, data.train, how, augmentation=augmentation).program

    with told(tell, row):
        row["before"], row["cut"] = (accuracy(p, data.eval) for p in (program, small))
        steps = 2 if asked.dry else 30
        trained(max_steps=2)  # what is slow once
        started = time.perf_counter()
        trained(max_steps=steps)
        step = (time.perf_counter() - started) / steps
        per_epoch = step * -(-len(data.train) // 256)
        left = asked.seconds - (time.perf_counter() - STARTED) - 15
        epochs = 1 if asked.dry else max(1, int(0.8 * left / per_epoch))
        row |= {"step_ms": 1e3 * step, "epochs": epochs}
        started = time.perf_counter()
        after = trained(epochs=epochs, schedule="one-cycle")
        row["seconds"] = time.perf_counter() - started
        row["after"] = accuracy(after, data.eval)


def accuracy(program: Any, split: Any) -> float:
    """Top-1, on the GPU where there is one: on few cores 10,000 images take longer than there is time."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, right = program.module.to(device).eval(), 0
    with torch.inference_mode():
        for (x,), y in split.batches(500):
            right += int((module(x.to(device)).argmax(1).cpu() == y).sum())
    program.module.to("cpu")
    return right / len(split)


@contextlib.contextmanager
def told(tell: Tell, row: dict[str, Any]) -> Iterator[None]:
    """Keep a row with what was measured, or with why nothing was."""
    try:
        yield
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    tell(row)


RUN: dict[str, Callable[[Asked, Tell], None]] = {
    "tests": tests,
    "torch": by_torch,
    "cuda": by_runtime("cuda"),
    "cpu": by_runtime("cpu"),
    "finetune": finetune,
}
STARTED = time.perf_counter()


# ---------------------------------------------------------------------- around them


def run_part(name: str, asked: Asked) -> dict[str, Any]:
    """One part in this process; rows are written as they are known."""
    asked.out.mkdir(parents=True, exist_ok=True)
    file, rows = asked.out / f"{name}.json", list[Any]()

    def tell(row: Any) -> None:
        rows.append(row)
        write(file, {"rows": rows, "error": "it was ended in the middle"})

    error = None
    try:
        RUN[name](asked, tell)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"[:2000]
        traceback.print_exc()
    found = {"rows": rows, "error": error}
    write(file, found)
    return found


def write(file: Path, content: Any) -> None:
    """As JSON, whole or not at all: the process may be ended at any time."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(file)


def run_apart(command: list[str], file: Path, seconds: float) -> dict[str, Any]:
    """A command in a process group of its own, which ends with the time; what it wrote into `file`."""
    file.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code, late = process.wait(seconds), ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code, late = process.wait(), f"it took more than {seconds:.0f} s"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)  # its session is not that of the terminal
        raise
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": [], "error": None}
    if late or (code and found["error"] is None):
        found["error"] = late or f"its process ended with exit code {code}"
    return {**found, "seconds": time.perf_counter() - started}


def machine() -> dict[str, Any]:
    """Where this runs, as far as it can be told."""
    try:
        from graphcomp.runtime.machine import environment

        found = environment().model_dump(mode="json")
    except ImportError as error:  # of what graphcomp asks for; every part says it again
        found = {"error": f"{error}: use run.sh, and a Python with all that graphcomp asks for"}
    try:
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {**found, "commit": commit or "unknown"}


def main() -> int:
    """Command line; 0 if every part has something to say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--seconds", type=float, default=460.0, help="for all parts together")
    parser.add_argument("--data", help="cifar10:DIR, for finetune")
    parser.add_argument("--weights", type=Path, help="of ResNet-56, for finetune")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: to see that it works")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, e.g. torch,cuda")
    parser.add_argument("--part", choices=RUN, help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = [name for name in given.parts.split(",") if name]
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"--parts: found {unknown[0]}, expected some of {', '.join(PARTS)}")
    asked = Asked(given.out.resolve(), given.seconds, given.data, given.weights, given.dry_run)
    if given.part:
        return int(run_part(given.part, asked)["error"] is not None)
    asked.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    whole, results = sum(PARTS[name] for name in names), dict[str, Any]()
    results["machine"] = machine()
    for place, name in enumerate(names):
        rest = sum(PARTS[n] for n in names[place:])
        seconds = max(1.0, asked.seconds - (time.perf_counter() - began)) * PARTS[name] / rest
        print(f"== {name}: up to {seconds:.0f} s", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--part", name, "--seconds", str(seconds)]
        results[name] = run_apart(command, asked.out / f"{name}.json", seconds)
        print(
            f"== {name}: {len(results[name]['rows'])} rows, {results[name]['error'] or 'complete'}",
            flush=True,
        )
        results["complete"] = whole > 0 and all(results[n]["error"] is None for n in names[: place + 1])
        results["seconds"], results["dry"] = time.perf_counter() - began, asked.dry
        write(asked.out / "results.json", results)
    print(f"{asked.out / 'results.json'}; python benchmarks/gpu/render.py {asked.out / 'results.json'}")
    return int(not results.get("complete", False))


if __name__ == "__main__":
    sys.exit(main())
