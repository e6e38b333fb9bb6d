"""Opening an ONNX Runtime session that cannot fall back to another provider.

Asked for CUDA on a machine without it, the runtime quietly opens a session on the CPU. `open_session` lists
only the wanted provider, switches every fallback off, asks the session where each node went, and raises
`ProviderError` unless all convolutions and matrix products are where they were asked to be.

The CUDA and TensorRT paths are written from the runtime's sources and documentation: they have **not yet
been run on a GPU**. What is tested is that they refuse, by name, on a machine without one.
"""

import contextlib
import ctypes
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graphcomp.base import muted
from graphcomp.errors import BenchError, ProviderError, some_of
from graphcomp.runtime import openvino
from graphcomp.runtime.onnxfile import OnnxFile
from graphcomp.runtime.precision import MOST_APART, Precision, in_precision, precision_options
from graphcomp.runtime.providers import (
    ADVICE,
    HEAVY,
    HOST,
    OPTIONS,
    PROVIDERS,
    Provider,
    allows_tf32,
    graph_options,
    import_runtime,
    run_errors,
    tensorrt_options,
)


@dataclass(frozen=True)
class OpenSession:
    """A session whose heavy nodes all run on the provider that was asked for.

    `nodes_per_provider` counts nodes as they were assigned, before the provider's own fusions. `tf32` is
    None on the CPU; on GPUs it is what the options and NVIDIA_TF32_OVERRIDE together allow.
    """

    session: Any
    provider: Provider
    threads: int
    provider_options: dict[str, str]
    tf32: bool | None
    nodes_per_provider: dict[str, int]
    memcpy_nodes: int
    load_seconds: float
    load_cpu_seconds: float

    @property
    def device(self) -> str:
        """Where tensors live that are bound without copies: 'cpu' or 'cuda'."""
        return "cpu" if self.provider in HOST else "cuda"


def open_session(
    model: Path | bytes,
    provider: Provider = "cpu",
    threads: int = 1,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    cache_key: str | None = None,
    cuda_graphs: bool = False,
    precision: Precision = "fp32",
    dump: Path | None = None,
    profile: Path | None = None,
    plain: bool = False,
) -> OpenSession:
    """Open `model` (an ONNX file or its bytes) on `provider` with `threads` intra-op threads.

    `shapes` (input name → shape) fixes TensorRT's optimisation profile; `cache_key` names its engine cache
    (hash of the model and the shape) in `base.cache`, not used without one. Other providers ignore both.
    `cuda_graphs` records the launches of one run and replays them, which takes bound inputs and outputs that
    stay where they are, and a graph that never leaves the GPU; CPUs have none. `precision` of GPUs: see
    `runtime.precision`. `dump` receives the graph that
    the runtime made of the model; with `profile` (how the trace's path begins) every operator of every run is
    timed, until the session's `end_profiling`: never the runs that are quoted. `plain` computes every node as
    it is written, and fuses nothing.

    Raises ProviderError if the provider does not work here, does not take every heavy node, copies between
    host and device inside a recorded graph, or two runtimes are installed; BenchError if the runtime refuses
    the model or an option is out of range.
    """
    if provider not in PROVIDERS:
        raise BenchError(f"provider: found {provider!r}, expected one of {', '.join(PROVIDERS)}")
    if threads < 1:
        raise BenchError(f"threads: found {threads}, expected at least 1; give the number explicitly")
    graphs = graph_options(provider, cuda_graphs) | precision_options(provider, precision)
    if provider == "openvino":
        if dump is not None or profile is not None:
            raise BenchError(
                "provider 'openvino': found a trace or a dump of the graph, expected times alone; explain on "
                "provider 'cpu'"
            )
        return _open_openvino(model, threads, shapes)
    ort = import_runtime()
    options = OPTIONS[provider] | graphs | tensorrt_options(provider, shapes, cache_key)
    if provider == "tensorrt" and _rounds(model):
        options |= {"trt_int8_enable": "1"}
    place = str(model) if isinstance(model, Path) else "model"
    model = in_precision(model, provider, precision)
    with _quiet(ort, provider):
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            session = _create(ort, model, provider, threads, options, dump=dump, profile=profile, plain=plain)
        except run_errors() as error:
            raise _refusal(ort, model, place, provider, options, error) from error
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        nodes = _check_placement(ort, session, place, provider)
        copies = _memcpy_nodes(ort, model, provider, threads, options)
    if cuda_graphs and copies:
        raise ProviderError(
            f"{place}: found {copies} copies between host and device inside the graph, expected none with "
            "CUDA graphs; leave them off or change these nodes"
        )
    chosen = {key: str(value) for key, value in session.get_provider_options()[PROVIDERS[provider]].items()}
    return OpenSession(
        session,
        provider,
        threads,
        options | chosen,
        allows_tf32(provider, options),
        nodes,
        copies,
        seconds,
        cpu_seconds,
    )


def _rounds(model: Path | bytes) -> bool:
    """Whether it has 8 bit tensors."""
    read = onnx.load_model_from_string(model.read_bytes() if isinstance(model, Path) else model)
    return any(node.op_type == "QuantizeLinear" for node in read.graph.node)


def _open_openvino(
    model: Path | bytes, threads: int, shapes: Mapping[str, Sequence[int]] | None
) -> OpenSession:
    start, cpu_start = time.perf_counter(), time.process_time()
    compiled, operators = openvino.compile_model(model, threads, shapes)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    told = {key: str(value) for key, value in openvino.options(threads).items()}
    return OpenSession(
        compiled, "openvino", threads, told, None, {openvino.NAME: operators}, 0, seconds, cpu_seconds
    )


def compare(
    file: OnnxFile, opened: OpenSession, feeds: Mapping[str, NDArray[Any]], precision: Precision = "fp32"
) -> None:
    """BenchError if another runtime or arithmetic computes another network than ONNX Runtime on the CPU."""
    expected = open_session(file.path).session.run(None, dict(feeds))
    if precision != "fp32":
        found, name = opened.session.run(None, dict(feeds)), f"{opened.provider} in {precision}"
        openvino.require_agreement(str(file.path), found, expected, name=name, most=MOST_APART[precision])
        return
    rounds = any(node.op_type == "QuantizeLinear" for node in file.model.graph.node)
    written = open_session(file.path, plain=True).session.run(None, dict(feeds)) if rounds else None
    openvino.require_agreement(str(file.path), opened.session.run(None, feeds), expected, written)


def probe(
    provider: Provider, threads: int = 1, *, cuda_graphs: bool = False, precision: Precision = "fp32"
) -> OpenSession:
    """Run a tiny convolution on `provider` and compare it with the exact result.

    With `cuda_graphs` their setting is checked as well. Raises ProviderError if the provider does not work on
    this machine or computes something else.
    """
    graph_options(provider, cuda_graphs)
    opened = open_session(_probe_model(), provider, threads, precision=precision)
    x = np.ones((1, 8, 4, 4), np.float32)
    try:
        (y,) = opened.session.run(None, {"x": x})
    except run_errors() as error:
        raise ProviderError(
            f"provider {provider!r}: opened but failed to run a convolution ({error}); {ADVICE[provider]}"
        ) from error
    # 8 channels x 2.0 is exact in every precision a provider may choose.
    if not np.array_equal(y, np.full((1, 8, 4, 4), 16, np.float32)):
        raise ProviderError(f"provider {provider!r}: a convolution is wrong, expected 16; {ADVICE[provider]}")
    return opened


def _create(
    ort: Any,
    model: Path | bytes,
    provider: Provider,
    threads: int,
    options: Mapping[str, str],
    *,
    strict: bool = True,
    dump: Path | None = None,
    profile: Path | None = None,
    plain: bool = False,
) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    levels = ort.GraphOptimizationLevel
    settings.graph_optimization_level = levels.ORT_DISABLE_ALL if plain else levels.ORT_ENABLE_ALL
    settings.log_severity_level = 4  # what matters is raised
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Two sessions take turns: the threads of the idle one must not spin on the cores of the other.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if provider != "cpu" and strict:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if dump is not None:
        settings.optimized_model_filepath = str(dump)
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(
        source, settings, providers=[(PROVIDERS[provider], dict(options))], enable_fallback=0
    )


@contextlib.contextmanager
def _quiet(ort: Any, provider: Provider) -> Iterator[None]:
    """Find the pip CUDA libraries and keep the runtime's log off the terminal: the errors raised say it."""
    if provider == "cpu":
        yield
        return
    with muted():
        ort.preload_dlls()
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def _check_placement(ort: Any, session: Any, place: str, provider: Provider) -> dict[str, int]:
    wanted = PROVIDERS[provider]
    if wanted not in session.get_providers():
        raise _unusable(provider, "the runtime dropped it without an error")
    placed = _placement(session)
    stray = [f"{op} {name!r} on {where}" for where, op, name in placed if op in HEAVY and where != wanted]
    if stray:
        raise ProviderError(
            f"{place}: found {some_of(stray)}, expected every {', '.join(sorted(HEAVY))} on {wanted}; "
            "use another provider or change these layers"
        )
    return dict(Counter(where for where, _, _ in placed))


def _placement(session: Any) -> list[tuple[str, str, str]]:
    return [
        (part.ep_name, node.op_type, node.name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def _refusal(
    ort: Any,
    model: Path | bytes,
    place: str,
    provider: Provider,
    options: Mapping[str, str],
    error: BaseException,
) -> BenchError:
    """The error to raise when a session could not be created: is it the provider or the model?"""
    if provider == "cpu":
        return BenchError(
            f"{place}: onnxruntime {ort.__version__} cannot load it ({error}); export the model again"
        )
    if PROVIDERS[provider] not in ort.get_available_providers():
        return _unusable(provider, "this onnxruntime was built without it")
    if fault := _library_fault(ort, provider):
        return _unusable(provider, fault)
    try:
        loose = _create(ort, model, provider, 1, options, strict=False)
    except run_errors():
        return _unusable(provider, str(error))
    if PROVIDERS[provider] not in loose.get_providers():
        return _unusable(provider, "its libraries load but no usable device was found")
    stray = [f"{op} {name!r}" for where, op, name in _placement(loose) if where != PROVIDERS[provider]]
    return ProviderError(
        f"{place}: {PROVIDERS[provider]} does not take {some_of(stray)}, expected the whole model on it; "
        "use another provider or change these nodes"
    )


def _unusable(provider: Provider, why: str) -> ProviderError:
    return ProviderError(
        f"provider {provider!r}: {PROVIDERS[provider]} does not work on this machine ({why}); "
        f"{ADVICE[provider]}; "
        "`graphcomp doctor` lists what works"
    )


def _library_fault(ort: Any, provider: Provider) -> str | None:
    """What the system's loader says of the provider's library; the runtime only logs it. None if it loads."""
    pattern = {"Windows": "onnxruntime_providers_{}.dll"}.get(
        platform.system(), "libonnxruntime_providers_{}.so"
    )
    library = Path(ort.__file__).parent / "capi" / pattern.format(provider)
    if not library.exists():
        return f"{library.name} is not part of this onnxruntime"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        # Unresolved symbols only mean that the library expects the runtime to load it; a missing file is a
        # fault.
        return None if "undefined symbol" in str(error) else str(error)
    return None


def _memcpy_nodes(
    ort: Any, model: Path | bytes, provider: Provider, threads: int, options: Mapping[str, str]
) -> int:
    """Copies between host and device inside the graph: the runtime adds them after assigning the nodes.

    Only CUDA can have any: on the CPU there is no other device, and a model that TensorRT compiled as a
    whole has no border inside it (nor can the runtime write such a model out).
    """
    if provider != "cuda":
        return 0
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "optimised.onnx"
        _create(ort, model, provider, threads, options, dump=dump)
        graph = onnx.load(dump, load_external_data=False).graph
    return sum(node.op_type.startswith("Memcpy") for node in graph.node)


def _probe_model() -> bytes:
    x, y = (gs.Variable(name, np.float32, (1, 8, 4, 4)) for name in "xy")
    weight = gs.Constant("w", np.full((8, 8, 1, 1), 2, np.float32))
    graph = gs.Graph([gs.Node("Conv", "probe", inputs=[x, weight], outputs=[y])], [x], [y], opset=18)
    return bytes(gs.export_onnx(graph, ir_version=8).SerializeToString())
