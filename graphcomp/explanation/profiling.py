"""What the runtime makes of an ONNX file, and how long each of its operators takes.

The runtime's own trace (`SessionOptions.enable_profiling`) has an event for every operator of every run, and
its dump of the optimised graph says which operators there are and how they hang together. Both come from one
session. Two files are traced by turns, A B B A, as they are timed; but a traced run is never a timed run,
since writing the trace takes time between the operators.

An operator's time is the interquartile mean over the runs: as robust as a median, and finer than the trace's
whole microseconds. Events are wall time: where the machine is busy (one thread whose runs take 10 % longer
than they have the processor), it is the mean of the fastest quarter instead, which nobody interrupted.

On CPUs two things are put right, or networks of many small operators would seem to spend their time
elsewhere. The runtime cuts fractions of a microsecond off, half of one on average: it is added. And an
operator that is traced takes longer, since what it needs is not in the nearest caches any more after an event
was written: by about 2 us, which is more than small operators take. How much is measured each time, on a
chain of operators that are too small to count, traced and not (`trace_cost`), and taken off every operator.
In larger networks it may be more; `explanation.explanation` says what becomes of that.

On GPUs an operator's event is the time to launch it. What it takes there is in the events of category
`Kernel` behind it, which only runtimes built with CUPTI write; without them a trace explains nothing and is
refused. Written from the runtime's documentation and tested on traces made by hand: **not yet run on a GPU**.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphcomp.base import Progress, quiet
from graphcomp.errors import BenchError
from graphcomp.ir import Shape
from graphcomp.runtime import BUSY, PROVIDERS, OnnxFile, OpenSession, Provider, open_session, run_errors

__all__ = ["Graph", "Operator", "Profile", "read_trace", "trace_cost", "trace_pair"]

Event = Mapping[str, Any]
SUFFIX = "_kernel_time"
CUT_OFF_MS = 0.0005
"""What the runtime's clock loses of an event on average: it counts whole microseconds."""

CHAIN = 64
"""Operators that the cost of tracing is measured on."""

LEAST_RUNS, WARM_UP = 6, 3
"""Runs of each file: that a trace has at least, and before them that are not looked at."""


@dataclass(frozen=True)
class Node:
    """One operator of the optimised graph, as the runtime dumps it."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


Graph = tuple[Node, ...]
"""The optimised graph in the order in which it is stored: producers before readers."""


@dataclass(frozen=True)
class Operator:
    """One operator of the optimised graph with its time.

    Attributes:
        node: what it is and what it is connected with.
        ms: of one run; of its kernels where they run on a GPU.
        provider: the runtime's name of where it ran.
        inputs, outputs: shapes as they are in memory, whole blocks included; () for a scalar.
        kernels: names of the GPU kernels, in order.
    """

    node: Node
    ms: float
    provider: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """One file's operators in the order of their graph.

    Attributes:
        runs: that count.
        run_ms: a whole traced run.
        cost_ms: of tracing, what was taken off every operator.
        busy: whether something else had the processor meanwhile.
    """

    operators: tuple[Operator, ...]
    runs: int
    run_ms: float
    cost_ms: float = 0.0
    busy: bool = False


@dataclass
class _Seen:
    """The events of one operator: host times, kernel times, in microseconds, a list a run."""

    event: Event
    host: list[float] = field(default_factory=list)
    kernels: list[list[tuple[str, float]]] = field(default_factory=list)


def trace_pair(
    files: tuple[OnnxFile, OnnxFile],
    feeds: Mapping[str, NDArray[Any]],
    provider: Provider = "cpu",
    threads: int = 1,
    *,
    runs: int = 100,
    seconds: float = 5.0,
    tell: Progress = quiet,
) -> tuple[Profile, Profile]:
    """Trace two files that take the same inputs, by turns.

    `runs` of each or `seconds` for both, whichever ends first, but never fewer than six; three more of each
    come first and are not looked at.

    Raises:
        ProviderError: the provider does not work here. BenchError: a file does not run, or the runtime wrote
            a trace that does not say where its time went.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = [_open(file, feeds, provider, threads, folder, i) for i, file in enumerate(files)]
        try:
            busy = _run_by_turns(opened, feeds, runs, seconds, tell) and provider == "cpu" and threads == 1
        except run_errors() as error:
            raise BenchError(f"profile: found an error when run ({error}), expected an output") from error
        finally:
            traces = [Path(one.session.end_profiling()) for one in opened]
        cost = trace_cost(threads) if provider == "cpu" else 0.0
        base, new = (
            read_trace(
                _events(path), _graph(_dump(folder, i)), provider, str(file.path), cost_ms=cost, busy=busy
            )
            for i, (path, file) in enumerate(zip(traces, files, strict=True))
        )
    return base, new


def _open(
    file: OnnxFile,
    feeds: Mapping[str, NDArray[Any]],
    provider: Provider,
    threads: int,
    folder: Path,
    index: int,
) -> OpenSession:
    if provider in ("tensorrt", "openvino"):
        raise BenchError(
            f"{file.path}: found provider {provider!r}, which tells no time of each operator, expected one "
            "that has a time for every operator: cpu or cuda"
        )
    shapes = {name: array.shape for name, array in feeds.items()}
    trace = folder / f"trace{index}"
    return open_session(file.path, provider, threads, shapes=shapes, dump=_dump(folder, index), profile=trace)


def _dump(folder: Path, index: int) -> Path:
    return folder / f"optimised{index}.onnx"


def _run_by_turns(
    opened: Sequence[OpenSession],
    feeds: Mapping[str, NDArray[Any]],
    runs: int,
    seconds: float,
    tell: Progress,
) -> bool:
    """Whether the calling thread did not have the processor for all of the time."""
    cpu_start, start = time.thread_time(), time.perf_counter()
    order, done, share = list(opened), 0, 0.0
    while done < WARM_UP + LEAST_RUNS or share < 1:
        for one in order:
            one.session.run(None, dict(feeds))
        order.reverse()
        done += 1
        elapsed = time.perf_counter() - start
        share = max(done / (WARM_UP + runs), elapsed / seconds if seconds > 0 else 1.0)
        tell("profile", min(share, 1.0))
    return time.perf_counter() - start > BUSY * (time.thread_time() - cpu_start)


def _events(path: Path) -> list[Event]:
    try:
        events = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: found no trace ({error}), expected the runtime's profile") from error
    return list(events)


def _graph(path: Path) -> Graph:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return tuple(Node(n.name, n.op_type, n.domain, tuple(n.input), tuple(n.output)) for n in nodes)


def read_trace(
    events: Iterable[Event],
    graph: Graph,
    provider: Provider,
    place: str,
    *,
    cost_ms: float = 0.0,
    busy: bool = False,
) -> Profile:
    """Join a trace with the graph that was run.

    Args:
        events: of the runtime's JSON file.
        graph: the optimised graph of the same session.
        provider: that was asked for.
        place: of errors.
        cost_ms: see `trace_cost`; taken off what ran on the host.
        busy: whether something else had the processor meanwhile.

    Raises:
        BenchError: no operator is in the trace, it does not fit the graph, or it lacks the times of kernels
            on a GPU.
    """
    seen, whole = _collect(events)
    if not seen:
        raise BenchError(f"{place}: found no operator in the trace, expected one event a run of each")
    runs = len(whole)
    if runs <= WARM_UP:
        raise BenchError(f"{place}: found {runs} runs in the trace, expected more than {WARM_UP}")
    _check_kernels(seen, provider, place)
    operators = []
    for node in _named(graph, seen):
        found = seen.get(node.name)
        if found is None or len(found.host) != runs:
            count = 0 if found is None else len(found.host)
            raise BenchError(
                f"{place}: found {count} events of {node.op} {node.name!r} in {runs} runs, expected one a "
                "run; give every node a name of its own, as graphcomp's exports have"
            )
        operators.append(_operator(node, found, cost_ms, busy))
    return Profile(tuple(operators), runs - WARM_UP, _typical(whole[WARM_UP:], busy), cost_ms, busy)


def _named(graph: Graph, seen: Mapping[str, "_Seen"]) -> Graph:
    """Nodes without a name (of functions that the runtime inlined, as HardSwish), with that of the trace.

    It calls them after operator and number; those of one operator come in the order in which they run.
    """
    names = {node.name for node in graph}
    spare: dict[str, list[str]] = {}
    for name, one in seen.items():
        if name not in names:
            spare.setdefault(str(one.event.get("args", {}).get("op_name", "")), []).append(name)
    nameless = Counter(node.op for node in graph if not node.name)
    following = {op: iter(found) for op, found in spare.items() if len(found) == nameless[op]}
    return tuple(
        node if node.name or node.op not in following else replace(node, name=next(following[node.op]))
        for node in graph
    )


def _collect(events: Iterable[Event]) -> tuple[dict[str, _Seen], list[float]]:
    """Operators by name, and the times of whole runs."""
    seen: dict[str, _Seen] = {}
    whole: list[float] = []
    last: _Seen | None = None
    for event in events:
        category, name = event.get("cat"), str(event.get("name", ""))
        if category == "Session" and name == "model_run":
            whole.append(float(event["dur"]))
        elif category == "Node" and name.endswith(SUFFIX):
            last = seen.setdefault(name.removesuffix(SUFFIX), _Seen(event))
            last.host.append(float(event["dur"]))
            last.kernels.append([])
        elif category == "Kernel":
            parent = str(event.get("args", {}).get("parent_name", "")).removesuffix(SUFFIX)
            owner = seen.get(parent, last)
            if owner is not None:
                owner.kernels[-1].append((name, float(event["dur"])))
    return seen, whole


def _check_kernels(seen: Mapping[str, _Seen], provider: Provider, place: str) -> None:
    wanted = PROVIDERS[provider]
    there = [s for s in seen.values() if s.event.get("args", {}).get("provider") == wanted]
    if provider != "cpu" and not any(any(s.kernels) for s in there):
        raise BenchError(
            f"{place}: found no Kernel events in the trace, only the times to launch them, expected a "
            "runtime that was built with CUPTI (--enable_cuda_profiling); explain on provider 'cpu'"
        )


def _operator(node: Node, seen: _Seen, cost_ms: float, busy: bool) -> Operator:
    args = seen.event.get("args", {})
    provider = str(args.get("provider", ""))
    names = tuple(dict.fromkeys(name for run in seen.kernels[WARM_UP:] for name, _ in run))
    if names or provider not in ("", PROVIDERS["cpu"]):
        ms = _typical([sum(time for _, time in run) for run in seen.kernels[WARM_UP:]])
    else:
        ms = max(0.0, _typical(seen.host[WARM_UP:], busy) + CUT_OFF_MS - cost_ms)
    return Operator(
        node,
        ms,
        provider,
        _shapes(args.get("input_type_shape")),
        _shapes(args.get("output_type_shape")),
        names,
    )


def _shapes(listed: Any) -> tuple[Shape, ...]:
    """`[{"float": [1, 3, 8, 8]}, …]` without the types."""
    return tuple(tuple(map(int, size)) for one in listed or () for size in one.values())


def trace_cost(threads: int = 1, runs: int = 100) -> float:
    """Milliseconds by which an operator on the CPU takes longer when it is traced, measured now.

    Of chains of operators on four numbers each: what one more takes in a run that is not traced (with all
    that the runtime does around it), against its event in one that is.
    """
    feeds = {"t0": np.ones((1, 4), np.float32)}
    short, long = (_untraced(_chain(length), feeds, threads, runs) for length in (1, CHAIN + 1))
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(_chain(CHAIN), "cpu", threads, profile=Path(folder) / "trace").session
        for _ in range(runs):
            session.run(None, feeds)
        seen, _ = _collect(_events(Path(session.end_profiling())))
    traced = _typical([time for one in seen.values() for time in one.host[WARM_UP:]]) + CUT_OFF_MS
    return max(0.0, traced - (long - short) / CHAIN)


def _untraced(model: bytes, feeds: Mapping[str, NDArray[Any]], threads: int, runs: int) -> float:
    session, times = open_session(model, "cpu", threads).session, []
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    for _ in range(runs):
        start = clock()
        session.run(None, feeds)
        times.append((clock() - start) / 1e3)
    return _typical(times)


def _chain(length: int) -> bytes:
    ends = [gs.Variable(f"t{i}", np.float32, (1, 4)) for i in range(length + 1)]
    nodes = [gs.Node("Relu", f"relu{i}", inputs=[ends[i]], outputs=[ends[i + 1]]) for i in range(length)]
    graph = gs.Graph(nodes, ends[:1], ends[-1:], opset=18)
    return bytes(gs.export_onnx(graph, ir_version=8).SerializeToString())


def _typical(microseconds: Sequence[float], busy: bool = False) -> float:
    """Interquartile mean in milliseconds; on a busy machine the mean of the fastest quarter."""
    times = np.sort(np.asarray(microseconds, np.float64))
    if busy:
        return float(times[: max(1, len(times) // 4)].mean()) / 1e3
    cut = len(times) // 4
    return float(times[cut : len(times) - cut].mean()) / 1e3
