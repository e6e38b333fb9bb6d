"""Channel removal on every torchvision classification and segmentation network, beside Torch-Pruning.

    python benchmarks/zoo.py --create                    # once: .venv-zoo, which Torch-Pruning runs in
    python benchmarks/zoo.py                             # all networks, smallest first; resumes
    python benchmarks/zoo.py --models 'resnet*' --again  # measure some of them anew
    python benchmarks/zoo.py --onnx                      # add ONNX parity after removal
    python benchmarks/zoo.py --render                    # write the table into docs/results.md

Every engine has a server process that has imported everything and pruned a toy network, and forks for each
measurement: both start from the same warm state, and memory goes back when the child ends. A child that takes
more memory or CPU time than it may is ended, and the network counts as not finished. For one network the two
engines run one after the other, so that a busy machine meets both. Networks have random weights: nothing is
downloaded.
"""

import argparse
import copy
import fnmatch
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the venv of Torch-Pruning does not have graphcomp installed

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from own_venv import make_venv  # noqa: E402
from section import replace_section  # noqa: E402
from torch import Tensor, nn  # noqa: E402

Result = dict[str, Any]
Array = np.ndarray[Any, Any]

OURS, THEIRS, ONNX = "graphcomp", "torch-pruning", "onnx"
PINNED = "torch-pruning==1.6.1"
RESULTS, DOCS = ROOT / "out" / "zoo.json", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- zoo: begin, written by benchmarks/zoo.py --render -->", "<!-- zoo: end -->"
RATIO = 0.5
NATIVE, SMALL, CHECKED = 224, 64, {"vit_": 224, "maxvit": 224, "inception": 96}
"""Pixels of the timed input, of the exactness check, and of that of networks that do not take so few."""
EXACT = 1e-9
"""Largest float64 error, relative to how much the output depends on the input, that counts as exact."""
LONG, REPEATS = 2.0, 3
"""CPU seconds above which one repeat must do; repeats of the others."""
POLL = 0.05
"""Seconds between two looks at what a child takes."""

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

    drop, score = channels.marks(), np.zeros(len(channels.channel_of))
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
    from graphcomp.channels import Removal
    from graphcomp.errors import SurgeryError

    wanted, score = half(channels)
    drop = Removal(channels, wanted).legal(score)
    try:
        return drop.apply("l1"), drop, {}
    except SurgeryError:
        drop, kept = Removal(channels, wanted).feasible(score)
        return drop.apply("l1"), drop, kept


def ours_timed(name: str) -> dict[str, float]:
    """CPU seconds of one trace + analysis + removal."""
    from graphcomp.channels import analyse
    from graphcomp.ir.tracing import trace

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
    from graphcomp.channels import Removal, analyse
    from graphcomp.ir.tracing import trace

    program = trace(lively(name), image(check_pixels(name)).double(), copy_weights=False)
    facts: Result = {"params": params(program.module), "nodes": len(program.graph.nodes)}
    channels = analyse(program)
    drop, kept = halved(program, channels)[1:]  # the smaller program is let go: masking comes first
    facts |= {"dropped": len(drop), "kept": kept, **census(channels)}
    rows, simulated = drop.rows, drop.mask()
    del program, channels, drop
    again = analyse(simulated)
    x = image(check_pixels(name), 2).double()
    with torch.no_grad():
        expected = outputs(simulated(x))
    smaller = Removal.from_rows(again, rows).apply("l1")
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
    from graphcomp.channels import analyse
    from graphcomp.ir.tracing import trace
    from graphcomp.onnx.export import export_onnx

    program = trace(build(name), image(check_pixels(name)), copy_weights=False)
    smaller, _, _ = halved(program, analyse(program))
    with TemporaryDirectory() as folder:
        export = export_onnx(smaller, Path(folder) / "model.onnx", batches=(1, 2))
    return {"parity": max(export.parity.values()), "opset": export.opset}


def params(module: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------- Torch-Pruning


def their_layers(model: nn.Module) -> list[nn.Module]:
    """What Torch-Pruning is told to ignore: the classifier."""
    classes = {1000, 21}
    return [
        m
        for m in model.modules()
        if getattr(m, "out_features", None) in classes or getattr(m, "out_channels", None) in classes
    ]


def their_pruner(
    model: nn.Module,
    x: Tensor,
    ratio: float = RATIO,
    round_to: int | None = None,
    ignored: list[nn.Module] | None = None,
) -> Any:
    """Set up as its README does: this part of all channels, all but the classifier's (None: by width)."""
    import torch_pruning as tp  # type: ignore[import-not-found] # only in its own venv

    importance = tp.importance.GroupMagnitudeImportance(p=2)
    return tp.pruner.BasePruner(
        model,
        x,
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=their_layers(model) if ignored is None else ignored,
        round_to=round_to,
    )


def theirs_timed(name: str) -> dict[str, float]:
    """CPU seconds of one dependency graph + groups + removal."""
    model, x = build(name), image(NATIVE)
    gc.collect()
    start = time.process_time()
    their_pruner(model, x).step()
    return {"total": time.process_time() - start}


def theirs_exact(name: str) -> Result:
    """Prune the float64 network, and judge what is left."""
    pixels = check_pixels(name)
    return judged(lively(name), image(pixels).double(), image(pixels, 2).double())


def judged(model: nn.Module, one: Tensor, x: Tensor, ignored: list[nn.Module] | None = None) -> Result:
    """Prune a network, and compare with the network whose removed weights read nothing.

    Every weight is unique, so the values that are left say which positions were kept; the reference is the
    unpruned network with zeros in all other positions of the rows that were kept. That asks nothing of the
    engine and accepts whatever it chose to remove, as long as producers and readers agree.

    Args:
        model: in float64.
        one: example input, which Torch-Pruning traces it with.
        x: two samples to compare with.
        ignored: see `their_pruner`.
    """
    reference, widths = copy.deepcopy(model), norm_widths(model)
    their_pruner(model, one, ignored=ignored).step()
    after = params(model)
    facts: Result = {"params_after": after, "params": params(reference)}
    if after == facts["params"]:
        return {**facts, "outcome": "removes nothing"}
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
    old, new = (t.reshape(*t.shape[:2], -1)[..., 0].numpy() for t in (reference, pruned))
    kept = np.ones(old.shape, dtype=bool)  # rows that are gone, or of channels that nothing reads, stay whole
    for row, values in zip(rows_of(old, new), new, strict=True):
        kept[row] = np.isin(old[row], values)
        if kept[row].sum() != len(values):
            raise ValueError(FOREIGN)
    reference.mul_(torch.from_numpy(kept).reshape(*old.shape, *[1] * (reference.ndim - 2)))


FOREIGN = "a pruned tensor holds values that the network did not have, or in other rows"


def rows_of(old: Array, new: Array) -> Array:
    """Row of `old` that every row of `new` comes from, by the row's first value.

    Row by row because sorting a whole layer, 100 million values in a VGG, takes longer than what is measured.
    """
    firsts, order = np.sort(new[:, 0]), np.argsort(new[:, 0])
    at = np.searchsorted(firsts, old.ravel()).clip(max=len(firsts) - 1)
    hits = np.flatnonzero(firsts[at] == old.ravel())
    if len(hits) != len(firsts):
        raise ValueError(FOREIGN)
    rows = np.empty(len(firsts), dtype=np.int64)
    rows[order[at[hits]]] = hits // old.shape[1]
    return rows


# ---------------------------------------------------------------------- servers


def timed(once: Callable[[str], dict[str, float]]) -> Callable[[str], Result]:
    """The step that repeats `once` on a network."""
    return lambda name: repeated(lambda: once(name))


STEPS: dict[str, dict[str, Callable[[str], Result]]] = {
    OURS: {"time": timed(ours_timed), "exact": ours_exact},
    THEIRS: {"time": timed(theirs_timed), "exact": theirs_exact},
    ONNX: {"parity": ours_onnx},
}
"""What an engine is asked about every network, in this order, up to the first step that gives no result."""


@dataclass(frozen=True)
class Limits:
    """What one step on one network may take."""

    memory: float = 14.0
    """Resident GiB."""
    seconds: float = 900.0
    """CPU seconds: on a busy machine wall time would end the same work sooner."""

    def exceeded(self, process: psutil.Process) -> str | None:
        """The limit that the process is beyond, in words."""
        if process.memory_info().rss > self.memory * 2**30:
            return f"out of {self.memory:g} GiB"
        used = process.cpu_times()
        return f"no answer in {self.seconds:g} CPU s" if used.user + used.system > self.seconds else None


def warm_up(engine: str) -> None:
    """Prune the toy network."""
    if engine == THEIRS:
        their_pruner(Toy().eval(), image(16)).step()
    else:
        from graphcomp.channels import analyse
        from graphcomp.ir.tracing import trace

        program = trace(Toy(), image(16), copy_weights=False)
        halved(program, analyse(program))


def serve(engine: str, limits: Limits) -> None:
    """Answer one JSON line for each step and network name on stdin, each in a child of its own."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints must not get between the answers
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    warm_up(engine)
    gc.collect()
    gc.freeze()
    answers.write("ready\n")
    for line in sys.stdin:
        step, name = json.loads(line)
        answers.write(json.dumps(in_child(partial(STEPS[engine][step], name), limits)) + "\n")


def in_child(work: Callable[[], Result], limits: Limits) -> Result:
    """The result of work that a fork of this process does, or what ended it."""
    with TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            volunteer()
            json.dump(guarded(work), answer)
            answer.flush()
            os._exit(0)
        ended = watch(child, limits)
        answer.seek(0)
        return ended or dict(json.load(answer))


def volunteer() -> None:
    """Be the first that Linux ends if the machine runs out of memory: other processes shall not pay."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")


def watch(child: int, limits: Limits) -> Result:
    """Wait for a child, and end it if it is beyond a limit; what ended it, or nothing if it has answered."""
    process = psutil.Process(child)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return died(status) if status else {}
        if beyond := limits.exceeded(process):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"unfinished": beyond}
        time.sleep(POLL)


def died(status: int) -> Result:
    """A crash is the engine's; SIGKILL comes from outside, in general for want of memory."""
    if not os.WIFSIGNALED(status):
        return {"raised": f"exit code {os.waitstatus_to_exitcode(status)}"}
    word = "unfinished" if os.WTERMSIG(status) == signal.SIGKILL else "raised"
    return {word: signal.Signals(os.WTERMSIG(status)).name}


class Server:
    """A process that has one engine loaded."""

    def __init__(self, python: str, engine: str, limits: Limits) -> None:
        self.engine = engine
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        limited = ["--memory", str(limits.memory), "--seconds", str(limits.seconds)]
        self.process = subprocess.Popen(
            [python, __file__, "--serve", engine, *limited],
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
        """Measure one network, step by step."""
        result: Result = {}
        for step in STEPS[self.engine]:
            stdin = self._pipe(self.process.stdin)
            stdin.write(json.dumps([step, name]) + "\n")
            stdin.flush()
            result |= json.loads(self._pipe(self.process.stdout).readline())
            if ending(result):
                break
        return result

    def close(self) -> None:
        """End the process."""
        self._pipe(self.process.stdin).close()
        self.process.wait()


# ---------------------------------------------------------------------- driver


def measure(names: list[str], venv: Path, engines: list[str], limits: Limits, again: bool) -> None:
    """Ask the engines about every network that lacks a result, and save after each.

    `engines` are `OURS`, `THEIRS`, or `ONNX` for the export of what graphcomp made smaller. A limit that was
    hit is a result too: `again` asks anew.
    """
    theirs = venv / "bin" / "python"
    if THEIRS in engines and not theirs.exists():
        raise SystemExit(f"{theirs}: not found; create it with --create --venv {venv}")
    results = load()
    networks = results["networks"]
    todo = [n for n in names if again or not set(engines) <= set(networks.get(n, {}))]
    if not todo:
        return
    known = results.get("environment", {}).get("versions", {})
    results["environment"] = describe(theirs if theirs.exists() else None, known)
    servers = {e: Server(str(theirs) if e == THEIRS else sys.executable, e, limits) for e in engines}
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
    whole = RESULTS.with_suffix(".partial")
    whole.write_text(json.dumps(results, indent=1))
    whole.replace(RESULTS)


def describe(theirs: Path | None, known: Mapping[str, str]) -> Result:
    """Machine, versions (on top of those known from earlier runs) and date."""
    from graphcomp.runtime.machine import environment

    here = environment()
    shown = ("torch", "torchvision", "onnxruntime-gpu", "onnxruntime")
    versions = {**known, "python": here.python, **{k: v for k, v in here.versions.items() if k in shown}}
    if theirs is not None:
        code = "import importlib.metadata as m; print(m.version('torch-pruning'))"
        asked = subprocess.run([str(theirs), "-c", code], check=True, capture_output=True, text=True)
        versions[THEIRS] = asked.stdout.strip()
    machine = f"{here.cpu}, {here.cores} cores ({here.isa}), {here.platform}"
    return {"machine": machine, "versions": versions, "date": datetime.now(UTC).date().isoformat()}


def in_words(engine: str, result: Result) -> str:
    """A result for the progress line."""
    seconds = f"{result['seconds']['total']:.2f} s, " if "seconds" in result else ""
    if engine == THEIRS:
        return seconds + their_outcome(result)
    figure = "parity" if engine == ONNX else "error"
    return seconds + (ending(result) or f"{figure} {result[figure]:.0e}")


# ---------------------------------------------------------------------- table

UNMEASURED: Result = {"outcome": "not measured"}


def ending(result: Result) -> str:
    """Why a result is incomplete: what was raised or which limit was hit; empty if it is whole."""
    if "raised" in result:
        return f"raises {result['raised']}"
    return f"not finished: {result['unfinished']}" if "unfinished" in result else ""


def their_outcome(theirs: Result) -> str:
    """What happened to Torch-Pruning, in words."""
    if words := ending(theirs):
        return words
    outcome = str(theirs["outcome"])
    return f"{outcome} ({theirs['error']:.0e})" if "error" in theirs else outcome


def is_right(ours: Result) -> bool:
    """Whether graphcomp removed something and the result is exact."""
    return not ending(ours) and ours["dropped"] > 0 and ours["error"] <= EXACT


def ratio_of(found: Result) -> float | None:
    """CPU seconds of Torch-Pruning over ours, where both came to an end."""
    if "seconds" not in found[OURS] or "seconds" not in found[THEIRS]:
        return None
    return float(found[THEIRS]["seconds"]["total"] / found[OURS]["seconds"]["total"])


def row(name: str, found: Result) -> str:
    """One network in Markdown."""
    theirs, ratio = found[THEIRS], ratio_of(found)
    cells = [name, *our_cells(found[OURS]), onnx_cell(found.get(ONNX, {}))]
    cells += [f"{theirs['seconds']['total']:.2f}" if "seconds" in theirs else "", their_outcome(theirs)]
    cells += [f"{ratio:.1f}" if ratio else ""]
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def our_cells(ours: Result) -> list[str]:
    """Size, seconds by stage, what was removed, and the error or why there is none."""
    stages = ("trace", "analyse", "remove", "total")
    seconds = [f"{ours['seconds'][s]:.3f}" if "seconds" in ours else "" for s in stages]
    if words := ending(ours):
        return ["", "", *seconds, "", "", words]
    channels = f"{ours['removable']} / {sum(ours['pinned'].values())}"
    left = f"{100 * ours['params_after'] / ours['params']:.0f} %"
    size = [f"{ours['params'] / 1e6:.1f}", str(ours["nodes"])]
    return [*size, *seconds, channels, left, f"{ours['error']:.0e}"]


def onnx_cell(onnx: Result) -> str:
    """Parity, or why there is none."""
    return (ending(onnx) or f"{onnx['parity']:.0e}") if onnx else "not run"


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
up to {EXACT:.0e} is called exact. *ONNX parity*: largest relative difference in float32 after export.
*Not finished*: ended by one of the benchmark's limits on one network, which says nothing about the result."""


def totals(networks: dict[str, Result]) -> list[str]:
    """The sentences above the table."""
    right = sum(is_right(f[OURS]) for f in networks.values())
    return [
        f"- graphcomp is right on {right} of {len(networks)}; Torch-Pruning: {their_counts(networks)}.",
        *speed_lines(networks),
        *onnx_lines(networks),
    ]


def their_counts(networks: dict[str, Result]) -> str:
    """How often which outcome, the most frequent first."""
    outcomes = [their_outcome(f[THEIRS]).split(":")[0].split(" (")[0] for f in networks.values()]
    kinds = ["raises" if o.startswith("raises ") else o for o in outcomes]
    return "; ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds), key=kinds.count, reverse=True))


def speed_lines(networks: dict[str, Result]) -> list[str]:
    """CPU seconds of both engines, in total and network by network."""
    ratios = {n: r for n, f in networks.items() if (r := ratio_of(f)) is not None}
    if not ratios:
        return []
    ours, theirs = (sum(networks[n][e]["seconds"]["total"] for n in ratios) for e in (OURS, THEIRS))
    least = min(ratios, key=ratios.__getitem__)
    median = statistics.median(ratios.values())
    return [
        f"- CPU seconds over the {len(ratios)} networks on which both come to an end: {ours:.1f} against "
        f"{theirs:.1f}, {theirs / ours:.1f} times as many (median of the ratios {median:.1f}, smallest "
        f"{ratios[least]:.1f} on {least}).",
        f"- graphcomp is slower on: {', '.join(n for n, r in ratios.items() if r < 1) or 'none'}.",
    ]


def onnx_lines(networks: dict[str, Result]) -> list[str]:
    """How many networks were exported after removal, and the largest difference."""
    parity = {n: f[ONNX]["parity"] for n, f in networks.items() if "parity" in f.get(ONNX, {})}
    if not parity:
        return []
    worst = max(parity, key=parity.__getitem__)
    failed = [n for n, f in networks.items() if ending(f.get(ONNX, {}))]
    without = f"; no result on {', '.join(failed)}" if failed else ""
    pending = sum(ONNX not in f for f in networks.values())
    rest = f"; not run on {pending}" if pending else ""
    return [
        f"- ONNX parity on {len(parity)}, largest difference {parity[worst]:.0e} ({worst}){without}{rest}."
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
    replace_section(DOCS, BEGIN, END, section(results))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-zoo", help="the venv of Torch-Pruning")
    parser.add_argument("--create", action="store_true", help="create the venv and stop")
    parser.add_argument("--models", default="*", help="glob of network names, several separated by commas")
    parser.add_argument(
        "--limit-params", type=float, default=float("inf"), help="leave out networks above this"
    )
    parser.add_argument("--memory", type=float, default=Limits.memory, help="GiB for one network")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="CPU seconds for one step")
    parser.add_argument("--again", action="store_true", help="measure what has a result too")
    parser.add_argument("--onnx", action="store_true", help="measure ONNX parity after removal instead")
    parser.add_argument("--engine", choices=[OURS, THEIRS], help="measure one of the two alone")
    parser.add_argument("--render", action="store_true", help="only write the table into docs/results.md")
    options = parser.parse_args()
    limits = Limits(options.memory, options.seconds)
    if options.serve:
        return serve(options.serve, limits)
    if options.create:
        return make_venv(options.venv, PINNED)
    if options.render:
        return render(load())
    patterns = options.models.split(",")
    names = [
        n
        for n, size in zoo().items()
        if size <= options.limit_params and any(fnmatch.fnmatch(n, p) for p in patterns)
    ]
    engines = [ONNX] if options.onnx else [options.engine] if options.engine else [OURS, THEIRS]
    return measure(names, options.venv, engines, limits, options.again)


if __name__ == "__main__":
    main()
