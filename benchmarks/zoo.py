"""Channel removal on every torchvision classification and segmentation network, beside Torch-Pruning.

    python benchmarks/zoo.py --create                    # once: .venv-zoo, which Torch-Pruning runs in
    python benchmarks/zoo.py                             # all networks, smallest first; resumes
    python benchmarks/zoo.py --models 'resnet*' --again  # measure some of them anew
    python benchmarks/zoo.py --onnx                      # add ONNX parity after removal
    python benchmarks/zoo.py --render                    # write the table into docs/results.md

Every engine has a server process that has imported everything and pruned a toy network, and forks for each
network: both start from the same warm state, and memory goes back when the child ends. For one network the
two engines run one after the other, so that a busy machine meets both. Networks have random weights: nothing
is downloaded.
"""

import argparse
import copy
import fnmatch
import gc
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the venv of Torch-Pruning does not have graphcomp installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import Tensor, nn  # noqa: E402

Result = dict[str, Any]

OURS, THEIRS, ONNX = "graphcomp", "torch-pruning", "onnx"
RESULTS, DOCS = ROOT / "out" / "zoo.json", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- zoo: begin, written by benchmarks/zoo.py --render -->", "<!-- zoo: end -->"
RATIO = 0.5
NATIVE, SMALL, CHECKED = 224, 64, {"vit_": 224, "maxvit": 224, "inception": 96}
"""Pixels of the timed input, of the exactness check, and of that of networks that do not take so few."""
EXACT = 1e-9
"""Largest float64 error, relative to how much the output depends on the input, that counts as exact."""
LONG, REPEATS, TIMEOUT = 2.0, 3, 900
"""CPU seconds above which one repeat must do; repeats of the others; wall seconds that a child may take."""

# ---------------------------------------------------------------------- networks


def zoo() -> dict[str, int]:
    """Name -> published parameter count of every network, smallest first."""
    spaces = (torchvision.models, torchvision.models.segmentation)
    names = [n for space in spaces for n in torchvision.models.list_models(module=space)]

    def size(name: str) -> int:
        return int(next(iter(torchvision.models.get_model_weights(name))).meta["num_params"])

    return dict(sorted(((n, size(n)) for n in names), key=lambda item: item[1]))


RANDOM_INITS = [n for n in dir(nn.init) if re.fullmatch("(kaiming|xavier|trunc)_.*_|normal_", n)]


@contextmanager
def without_random_inits() -> Iterator[None]:
    """Leave weights empty: the zoo's own initialisation takes longer than everything that is measured."""
    saved = {n: getattr(nn.init, n) for n in RANDOM_INITS}
    for n in RANDOM_INITS:
        setattr(nn.init, n, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for n, function in saved.items():
            setattr(nn.init, n, function)


@torch.no_grad()
def build(name: str) -> nn.Module:
    """The network in eval mode, its weights from one block of noise, scaled by the fan-in."""
    options: dict[str, Any] = {"weights": None}
    if name in torchvision.models.list_models(module=torchvision.models.segmentation):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    with without_random_inits():
        model: nn.Module = torchvision.models.get_model(name, **options).eval()
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for p in model.parameters():
        if p.ndim >= 2:
            flat = p.view(-1)
            for at in range(0, flat.numel(), noise.numel()):
                piece = flat[at : at + noise.numel()]
                torch.mul(noise[: piece.numel()], (2 / p[0].numel()) ** 0.5, out=piece)
    return model


@torch.no_grad()
def lively(name: str) -> nn.Module:
    """The network in float64 with weights of which no two are equal, and an output that depends on the input.

    In a fresh network (or one with random statistics) the signal may die on the way: then the output is a
    constant, and any removal looks exact. So batch statistics are measured on two images, and then shifted.
    """
    model = build(name).double()
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        flat = p.view(-1)
        flat.mul_(torch.arange(1, flat.numel() + 1, dtype=torch.float64).mul_(1e-3 / flat.numel()).add_(1))
        if p.ndim == 1:
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        model(image(check_pixels(name), 2, seed=3).double())
    for norm in norms:
        shift = torch.randn(norm.num_features, generator=generator, dtype=torch.float64)
        norm.eval().running_mean.add_(shift, alpha=0.1)  # type: ignore[union-attr]
        norm.running_var.mul_(shift.abs() + 0.5)  # type: ignore[union-attr]
    return model


def image(pixels: int, batch: int = 1, seed: int = 1) -> Tensor:
    """Seeded random images."""
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(seed))


def check_pixels(name: str) -> int:
    """Input size of the exactness check."""
    return next((pixels for start, pixels in CHECKED.items() if name.startswith(start)), SMALL)


class Toy(nn.Module):
    """What both engines prune before anything is timed, so that lazy imports are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(16, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Residual add, concatenation and flatten."""
        x = torch.relu(self.bn(self.a(x)))
        y = torch.cat([x + self.b(x), x], 1)
        out: Tensor = self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(y, 1), 1))
        return out


# ---------------------------------------------------------------------- measuring


def outputs(result: Any) -> list[Tensor]:
    """All tensors of a network's output: one, or a dict of them (segmentation)."""
    return list(result.values()) if isinstance(result, Mapping) else [result]


def error_of(expected: list[Tensor], found: list[Tensor]) -> Result:
    """How far two answers to the same two images are apart.

    Returns:
        error: the largest difference, relative to that between the answers to the two images (an output that
        is mostly a constant would hide everything from an error relative to its size);
        spread: how much of the output depends on the image, relative to its size.
    """
    error, spread = 0.0, float("inf")
    for e, f in zip(expected, found, strict=True):
        if e.shape != f.shape:
            raise ValueError(f"output has shape {tuple(f.shape)}, was {tuple(e.shape)}")
        depends = (e[0] - e[1]).abs().max()
        error = max(error, float((e - f).abs().max() / depends))
        spread = min(spread, float(depends / e.abs().max()))
    return {"error": error, "spread": spread}


def repeated(once: Callable[[], dict[str, float]]) -> Result:
    """Median CPU seconds by stage over fresh repeats; one repeat if it takes long."""
    runs = [once()]
    while len(runs) < REPEATS and runs[0]["total"] < LONG:
        runs.append(once())
    runs.sort(key=lambda r: r["total"])
    return {"seconds": runs[len(runs) // 2], "repeats": len(runs)}


def guarded(work: Callable[[], Result]) -> Result:
    """The result, or what was raised: its type and first line."""
    try:
        return work()
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        return {"raised": f"{type(error).__name__}: {first[0] if first else 'no message'}"[:300]}


# ---------------------------------------------------------------------- graphcomp


def half(channels: Any) -> tuple[Any, Any]:
    """Drop half of every removable group by the L1 norm of the producing rows: (drop, score)."""
    from graphcomp.surgery import no_drop

    drop, score = no_drop(channels), np.zeros(len(channels.channel_of))
    for axis in channels.axes:
        if axis.role == "out":
            name, dim = axis.tensors[0]
            weight = channels.program.tensors[name].detach()
            norms = weight.abs().sum([d for d in range(weight.ndim) if d != dim]).double().numpy()
            np.add.at(score, axis.channels, norms)
    for group in channels.removable:
        for block in np.unique(group.blocks):
            members = group.channels[group.blocks == block]
            drop[members[np.argsort(score[members])][: int(len(members) * RATIO)]] = True
    return drop, score


def halved(program: Any, channels: Any) -> tuple[Any, Any, dict[str, str]]:
    """(smaller program, drop, what was kept because it cannot be removed exactly)."""
    from graphcomp.errors import SurgeryError
    from graphcomp.surgery import feasible, legalise, remove

    wanted, score = half(channels)
    drop = legalise(channels, wanted, score)
    try:
        return remove(program, channels, drop, "l1"), drop, {}
    except SurgeryError:
        drop, kept = feasible(channels, wanted, score)
        return remove(program, channels, drop, "l1"), drop, kept


def ours_timed(name: str) -> dict[str, float]:
    """CPU seconds of one trace + analysis + removal."""
    from graphcomp.channels import analyse
    from graphcomp.program import trace

    model, x = build(name), image(NATIVE)
    gc.collect()
    at = [time.process_time()]
    program = trace(model, x, copy_weights=False)
    at.append(time.process_time())
    channels = analyse(program)
    at.append(time.process_time())
    halved(program, channels)
    at.append(time.process_time())
    stages = dict(zip(("trace", "analyse", "remove"), np.diff(at).tolist(), strict=True))
    return {**stages, "total": at[-1] - at[0]}


def ours_exact(name: str) -> Result:
    """What can be removed, and whether removing half of it changes what the masked network computes."""
    from graphcomp.channels import analyse
    from graphcomp.program import trace
    from graphcomp.surgery import drop_of, dropped_rows, mask, remove

    program = trace(lively(name), image(check_pixels(name)).double(), copy_weights=False)
    facts: Result = {"params": params(program.module), "nodes": len(program.graph.nodes)}
    channels = analyse(program)
    _, drop, kept = halved(program, channels)
    facts |= {"dropped": int(drop.sum()), "kept": kept, **census(channels)}
    rows, simulated = dropped_rows(channels, drop), mask(program, channels, drop)
    del program, channels
    again = analyse(simulated)
    x = image(check_pixels(name), 2).double()
    with torch.no_grad():
        expected = outputs(simulated(x))
    smaller = remove(simulated, again, drop_of(again, rows), "l1")
    del simulated, again
    with torch.no_grad():
        return {**facts, "params_after": params(smaller.module), **error_of(expected, outputs(smaller(x)))}


def census(channels: Any) -> Result:
    """Channels that are removable and pinned, the latter by reason."""
    reasons: dict[str, int] = {}
    for group in channels.groups:
        if group.pinned is not None:
            reasons[group.pinned[1]] = reasons.get(group.pinned[1], 0) + len(group.channels)
    return {"removable": sum(len(g.channels) for g in channels.removable), "pinned": reasons}


def ours_onnx(name: str) -> Result:
    """Parity of the exported ONNX file with the smaller program."""
    from tempfile import TemporaryDirectory

    from graphcomp.channels import analyse
    from graphcomp.export import export_onnx
    from graphcomp.program import trace

    program = trace(build(name), image(check_pixels(name)), copy_weights=False)
    smaller, _, _ = halved(program, analyse(program))
    with TemporaryDirectory() as folder:
        export = export_onnx(smaller, Path(folder) / "model.onnx", batches=(1, 2))
    return {"parity": max(export.parity.values()), "opset": export.opset}


def params(module: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------- Torch-Pruning


def their_pruner(model: nn.Module, x: Tensor) -> Any:
    """Set up as its README does: half of all channels, all but the classifier."""
    import torch_pruning as tp  # type: ignore[import-not-found] # only in its own venv

    classes = {1000, 21}
    ignored = [
        m
        for m in model.modules()
        if getattr(m, "out_features", None) in classes or getattr(m, "out_channels", None) in classes
    ]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    return tp.pruner.BasePruner(model, x, importance=importance, pruning_ratio=RATIO, ignored_layers=ignored)


def theirs_timed(name: str) -> dict[str, float]:
    """CPU seconds of one dependency graph + groups + removal."""
    model, x = build(name), image(NATIVE)
    gc.collect()
    start = time.process_time()
    their_pruner(model, x).step()
    return {"total": time.process_time() - start}


def theirs_exact(name: str) -> Result:
    """Prune the float64 network, and compare with the network whose removed weights read nothing.

    Every weight is unique, so the values that are left say which positions were kept; the reference is the
    unpruned network with zeros in all other positions of the rows that were kept. That asks nothing of the
    engine and accepts whatever it chose to remove, as long as producers and readers agree.
    """
    model, x = lively(name), image(check_pixels(name)).double()
    reference, widths = copy.deepcopy(model), norm_widths(model)
    their_pruner(model, x).step()
    after = params(model)
    facts: Result = {"params_after": after, "params": params(reference)}
    if after == facts["params"]:
        return {**facts, "outcome": "removes nothing"}
    x = image(check_pixels(name), 2).double()
    with torch.no_grad():
        try:
            found = model(x)
        except Exception as error:
            first = str(error).strip().splitlines()[:1]
            return {**facts, "outcome": f"pruned network raises {type(error).__name__}: {first[0]}"[:300]}
        found = outputs(found)
        if norm_widths(model) != widths:  # then its statistics are those of no masked network
            return {**facts, "outcome": "runs, not judged: LayerNorm over fewer channels"}
        pruned = dict(model.named_parameters())
        for parameter_name, p in reference.named_parameters():
            keep_only(p, pruned[parameter_name])
        facts |= error_of(outputs(reference(x)), found)
    return {**facts, "outcome": "exact" if facts["error"] <= EXACT else "wrong output"}


def norm_widths(model: nn.Module) -> dict[str, int]:
    """Channels that every LayerNorm takes its statistics over."""
    norms = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm))
    return {n: m.weight.numel() for n, m in norms if m.weight is not None}


def keep_only(reference: Tensor, pruned: Tensor) -> None:
    """Write zeros into the positions of kept rows whose values are not left in the pruned tensor."""
    if reference.shape == pruned.shape or reference.ndim < 2:
        return
    old = reference.flatten(2)[..., 0] if reference.ndim > 2 else reference
    new = pruned.flatten(2)[..., 0] if pruned.ndim > 2 else pruned
    flat = old.flatten().numpy()
    order = np.argsort(flat)
    at = order[np.searchsorted(flat, new.flatten().numpy(), sorter=order).clip(max=len(flat) - 1)]
    if not np.array_equal(flat[at], new.flatten().numpy()):
        raise ValueError("a pruned tensor holds values that the network did not have")
    kept = torch.zeros(flat.shape, dtype=torch.bool)
    kept[torch.from_numpy(at)] = True
    kept = kept.reshape(old.shape)
    kept[~kept.any(1)] = True  # rows that are gone, or of channels that nothing reads
    reference.mul_(kept.reshape(*old.shape, *[1] * (reference.ndim - 2)))


# ---------------------------------------------------------------------- servers


def job_ours(name: str) -> Result:
    """What can be removed, whether it is exact, and how long it takes."""
    exact = guarded(lambda: ours_exact(name))
    return {**exact, **guarded(lambda: repeated(lambda: ours_timed(name)))}


def job_theirs(name: str) -> Result:
    """How long it takes, and whether it is exact."""
    timed = guarded(lambda: repeated(lambda: theirs_timed(name)))
    return timed if "raised" in timed else {**timed, **guarded(lambda: theirs_exact(name))}


JOBS: dict[str, Callable[[str], Result]] = {OURS: job_ours, THEIRS: job_theirs, ONNX: ours_onnx}


def warm_up(engine: str) -> None:
    """Prune the toy network."""
    if engine == THEIRS:
        their_pruner(Toy().eval(), image(16)).step()
    else:
        from graphcomp.channels import analyse
        from graphcomp.program import trace

        program = trace(Toy(), image(16), copy_weights=False)
        halved(program, analyse(program))


def serve(engine: str) -> None:
    """Answer one JSON line for each network name on stdin, each in a child of its own."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints must not get between the answers
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    warm_up(engine)
    gc.collect()
    gc.freeze()
    answers.write("ready\n")
    for line in sys.stdin:
        name = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT)
            result = guarded(lambda: JOBS[engine](name))  # noqa: B023 - called at once
            result["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
            answers.write(json.dumps(result) + "\n")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed = signal.Signals(os.WTERMSIG(status)).name
            what = f"no answer in {TIMEOUT} s" if killed == "SIGALRM" else f"killed by {killed}"
            answers.write(json.dumps({"raised": what}) + "\n")


class Server:
    """A process that has one engine loaded."""

    def __init__(self, python: str, engine: str) -> None:
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [python, __file__, "--serve", engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **single},
        )
        if self._pipe(self.process.stdout).readline() != "ready\n":
            raise SystemExit(f"{engine}: the server did not start; see its message above")

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def ask(self, name: str) -> Result:
        """Measure one network."""
        stdin = self._pipe(self.process.stdin)
        stdin.write(json.dumps(name) + "\n")
        stdin.flush()
        result: Result = json.loads(self._pipe(self.process.stdout).readline())
        return result

    def close(self) -> None:
        """End the process."""
        self._pipe(self.process.stdin).close()
        self.process.wait()


def make_venv(folder: Path) -> None:
    """A venv for Torch-Pruning that borrows torch from the running interpreter.

    A second copy of torch takes 6 GB of disk and the two engines must run on the same one anyway, so a `.pth`
    file adds our site-packages behind its own. Torch-Pruning itself stays out of our environment; all that it
    needs beside torch is numpy, which is borrowed too.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "torch-pruning"], check=True)
    borrowed = Path(torch.__file__).parent.parent
    own = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(own) / "borrowed.pth").write_text(f"{borrowed}\n")


# ---------------------------------------------------------------------- driver


def measure(names: list[str], venv: Path, engines: list[str], again: bool) -> None:
    """Ask the engines about every network that lacks a result, and save after each.

    `engines` are `OURS`, `THEIRS`, or `ONNX` for the export of what graphcomp made smaller.
    """
    theirs = venv / "bin" / "python"
    if THEIRS in engines and not theirs.exists():
        raise SystemExit(f"{theirs}: not found; create it with --create --venv {venv}")
    results = load()
    networks = results["networks"]
    todo = [n for n in names if again or not set(engines) <= set(networks.get(n, {}))]
    if not todo:
        return
    results["environment"] = describe(theirs if theirs.exists() else None)
    servers = {e: Server(str(theirs) if e == THEIRS else sys.executable, e) for e in engines}
    for position, name in enumerate(todo, 1):
        found = networks.setdefault(name, {})
        for engine, server in servers.items():
            if again or engine not in found:
                found[engine] = server.ask(name)
        save(results)
        words = ", ".join(f"{e}: {in_words(e, found[e])}" for e in engines)
        print(f"[{position}/{len(todo)}] {name}: {words}", flush=True)
    for server in servers.values():
        server.close()


def load() -> Result:
    """What was measured so far."""
    result: Result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"networks": {}}
    return result


def save(results: Result) -> None:
    """Write the results whole or not at all."""
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1))
    partial.replace(RESULTS)


def describe(theirs: Path | None) -> Result:
    """Machine, versions and date."""
    from graphcomp.doctor import environment

    here = environment()
    version = ""
    if theirs is not None:
        code = "import importlib.metadata as m; print(m.version('torch-pruning'))"
        version = subprocess.run([str(theirs), "-c", code], check=True, capture_output=True, text=True).stdout
    kept = {
        k: v
        for k, v in here.versions.items()
        if k in ("torch", "torchvision", "onnxruntime-gpu", "onnxruntime")
    }
    versions = {"python": here.python, **kept, THEIRS: version.strip()}
    machine = f"{here.cpu}, {here.cores} cores ({here.isa}), {here.platform}"
    return {"machine": machine, "versions": versions, "date": datetime.now(UTC).date().isoformat()}


def in_words(engine: str, result: Result) -> str:
    """A result for the progress line."""
    seconds = f"{result['seconds']['total']:.2f} s, " if "seconds" in result else ""
    if engine == THEIRS:
        return seconds + their_outcome(result)
    if "raised" in result:
        return seconds + str(result["raised"])
    return f"parity {result['parity']:.0e}" if engine == ONNX else f"{seconds}error {result['error']:.0e}"


# ---------------------------------------------------------------------- table

UNMEASURED: Result = {"outcome": "not measured"}


def their_outcome(theirs: Result) -> str:
    """What happened to Torch-Pruning, in words."""
    if "raised" in theirs:
        return f"raises {theirs['raised']}"
    outcome = str(theirs["outcome"])
    return f"{outcome} ({theirs['error']:.0e})" if "error" in theirs else outcome


def is_right(ours: Result) -> bool:
    """Whether graphcomp removed something and the result is exact."""
    return "raised" not in ours and ours["dropped"] > 0 and ours["error"] <= EXACT


def ratio_of(found: Result) -> float | None:
    """CPU seconds of Torch-Pruning over ours, where both came to an end."""
    if "seconds" not in found[OURS] or "seconds" not in found[THEIRS]:
        return None
    return float(found[THEIRS]["seconds"]["total"] / found[OURS]["seconds"]["total"])


def row(name: str, found: Result) -> str:
    """One network in Markdown."""
    ours, theirs = found[OURS], found[THEIRS]
    cells = [name]
    if "raised" in ours:
        cells += ["", "", ours["raised"], *[""] * 6]
    else:
        stages = [f"{ours['seconds'][s]:.3f}" for s in ("trace", "analyse", "remove", "total")]
        pinned = sum(ours["pinned"].values())
        left = f"{100 * ours['params_after'] / ours['params']:.0f} %"
        cells += [f"{ours['params'] / 1e6:.1f}", str(ours["nodes"]), *stages]
        cells += [
            f"{ours['removable']} / {pinned}",
            left,
            f"{ours['error']:.0e}",
            onnx_cell(found.get(ONNX, {})),
        ]
    ratio = ratio_of(found)
    seconds = f"{theirs['seconds']['total']:.2f}" if "seconds" in theirs else ""
    outcome = their_outcome(theirs).replace("|", "\\|")
    cells += [seconds, outcome, f"{ratio:.1f}" if ratio else ""]
    return f"| {' | '.join(cells)} |"


def onnx_cell(onnx: Result) -> str:
    """Parity, or why there is none."""
    if not onnx:
        return "not run"
    return str(onnx["raised"]).split(":")[0] if "raised" in onnx else f"{onnx['parity']:.0e}"


HEAD = [
    "network", "params (M)", "nodes", "trace (s)", "analyse (s)", "remove (s)", "total (s)",
    "channels removable / pinned", "params left", "error", "ONNX parity", "Torch-Pruning (s)",
    "Torch-Pruning's result", "its time / ours",
]  # fmt: skip

INTRO = f"""\
Every network of torchvision's classification and segmentation zoos, with random weights; half of all
removable channels go. Written by `benchmarks/zoo.py`; `benchmarks/README.md` says how it judges. Times are
CPU seconds on one thread at {NATIVE} px, both engines warm, the median of {REPEATS} fresh networks (one where
a run takes more than {LONG:.0f} s); Torch-Pruning is set up as its README does. *Error*: largest difference
between the smaller and the masked network in float64, relative to how much the output depends on the input;
up to {EXACT:.0e} is called exact. *ONNX parity*: largest relative difference in float32 after export."""


def totals(networks: dict[str, Result]) -> list[str]:
    """The sentences below the table."""
    both = {n: f for n, f in networks.items() if ratio_of(f) is not None}
    ours = sum(f[OURS]["seconds"]["total"] for f in both.values())
    theirs = sum(f[THEIRS]["seconds"]["total"] for f in both.values())
    outcomes = [f[THEIRS].get("outcome", "raises").split(":")[0] for f in networks.values()]
    counts = {o: outcomes.count(o) for o in sorted(set(outcomes), key=outcomes.count, reverse=True)}
    slower = [n for n, f in both.items() if (ratio_of(f) or 0) < 1]
    ratios = [r for f in both.values() if (r := ratio_of(f)) is not None]
    return [
        f"- graphcomp is right on {sum(is_right(f[OURS]) for f in networks.values())} of {len(networks)}; "
        f"Torch-Pruning: {', '.join(f'{n} {o}' for o, n in counts.items())}.",
        f"- CPU seconds over the {len(both)} networks on which both finish: {ours:.1f} against {theirs:.1f}, "
        f"{theirs / ours:.1f} times as many (median of the ratios {statistics.median(ratios):.1f}).",
        f"- graphcomp is slower on: {', '.join(slower) or 'none'}.",
    ]


def pin_lines(networks: dict[str, Result]) -> list[str]:
    """Why channels stay, with how many and where."""
    where: dict[str, dict[str, int]] = {}
    for name, found in networks.items():
        for reason, count in found[OURS].get("pinned", {}).items():
            where.setdefault(reason, {})[name] = count
    lines = []
    for reason, counts in sorted(where.items(), key=lambda item: -sum(item[1].values())):
        some = ", ".join(sorted(counts, key=lambda n: -counts[n])[:3])
        places = f"{len(counts)} networks, most in {some}" if len(counts) > 3 else some
        lines.append(f"- {reason}: {sum(counts.values())} channels ({places})")
    kept = {n: f[OURS]["kept"] for n, f in networks.items() if f[OURS].get("kept")}
    return lines + [f"- {n}: {reason}" for n, reasons in kept.items() for reason in reasons.values()]


def section(results: Result) -> str:
    """The whole Markdown section."""
    measured = results["networks"]
    networks = {n: {THEIRS: UNMEASURED, **measured[n]} for n in zoo() if OURS in measured.get(n, {})}
    absent = [n for n in zoo() if n not in networks]
    missing = [f"- Not measured: {', '.join(absent)}."] if absent else []
    there = results["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in there["versions"].items() if v)
    table = [f"| {' | '.join(HEAD)} |", "|---|" + "---:|" * 10 + "---:|---|---:|"]
    table += [row(n, f) for n, f in networks.items()]
    where = f"{there['machine']}; {versions}; {there['date']}."
    stay = ["Channels that stay, and why:", "", *pin_lines(networks)]
    parts = [
        BEGIN,
        "## Zoo",
        "",
        INTRO,
        "",
        where,
        "",
        *totals(networks),
        *missing,
        "",
        *table,
        "",
        *stay,
        END,
    ]
    return "\n".join(parts)


def render(results: Result) -> None:
    """Put the section into the document, in the place of the one before."""
    text = DOCS.read_text() if DOCS.exists() else "# Results\n"
    new = section(results)
    if BEGIN in text:
        head, rest = text.split(BEGIN, 1)
        text = head + new + rest.split(END, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{new}\n"
    DOCS.write_text(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-zoo", help="the venv of Torch-Pruning")
    parser.add_argument("--create", action="store_true", help="create the venv and stop")
    parser.add_argument("--models", default="*", help="glob of network names, several separated by commas")
    parser.add_argument(
        "--limit-params", type=float, default=float("inf"), help="leave out networks above this"
    )
    parser.add_argument("--again", action="store_true", help="measure what has a result too")
    parser.add_argument("--onnx", action="store_true", help="measure ONNX parity after removal instead")
    parser.add_argument("--engine", choices=[OURS, THEIRS], help="measure one of the two alone")
    parser.add_argument("--render", action="store_true", help="only write the table into docs/results.md")
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    if options.create:
        return make_venv(options.venv)
    if options.render:
        return render(load())
    patterns = options.models.split(",")
    names = [
        n
        for n, size in zoo().items()
        if size <= options.limit_params and any(fnmatch.fnmatch(n, p) for p in patterns)
    ]
    engines = [ONNX] if options.onnx else [options.engine] if options.engine else [OURS, THEIRS]
    return measure(names, options.venv, engines, options.again)


if __name__ == "__main__":
    main()
