"""OpenVINO on the CPU, a second runtime for the same files: `pip install graphcomp[openvino]`.

It stands where ONNX Runtime's sessions stand, so both are timed by the same turns. The arithmetic is float32
where the file's is (on some processors bfloat16 would be its default), and its threads are not pinned: two
models take turns on one core. What it computes is compared with ONNX Runtime before any time is quoted.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphcomp.errors import BenchError, ProviderError

NAME = "OpenVINO"
MOST_APART, MOST_APART_8_BITS, TIMES_ROUNDING = 1e-3, 0.1, 3.0
"""What outputs may differ by from ONNX Runtime's, of their norm. Where bytes are rounded in another order a
network may amplify it: there so many times what ONNX Runtime's own kernels differ by from the file as
written."""
Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Output:
    """As ONNX Runtime describes one."""

    name: str


class Compiled:
    """A compiled model that is run as a session of ONNX Runtime is."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = [output.get_any_name() for output in model.outputs]

    def get_outputs(self) -> list[Output]:
        """In the order of the file."""
        return [Output(name) for name in self.names]

    def run(self, names: Sequence[str] | None, feeds: Feeds) -> list[NDArray[Any]]:
        """Outputs by name, all for None."""
        request = self.request(feeds)
        request.infer()
        found = {name: np.array(request.get_tensor(name).data) for name in self.names}
        return [found[name] for name in names or self.names]

    def request(self, feeds: Feeds) -> Any:
        """A request whose inputs lie in these arrays."""
        import openvino

        request = self.model.create_infer_request()
        for name, array in feeds.items():
            request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(array)))
        return request


class Requested:
    """One model with its inputs set, for one shape: what is timed."""

    def __init__(self, compiled: Compiled, feeds: Feeds, path: Path) -> None:
        self.path = path
        self._request = compiled.request(feeds)
        self.run = self._request.infer

    def first(self) -> float:
        """The first inference, in ms."""
        start = time.perf_counter_ns()
        try:
            self.run()
        except RuntimeError as error:
            raise BenchError(
                f"{self.path}: found an error when run by OpenVINO ({error}), expected an output; export it "
                "again"
            ) from error
        return (time.perf_counter_ns() - start) / 1e6

    def run_end_to_end(self) -> None:
        """The same: nothing is copied on the CPU."""
        self.run()


def options(threads: int) -> dict[str, Any]:
    """What a model is compiled with."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }


def compile_model(
    model: Path | bytes, threads: int, shapes: Mapping[str, Sequence[int]] | None
) -> tuple[Compiled, int]:
    """The model, compiled for these shapes, and how many operators it has become.

    Raises:
        ProviderError: without OpenVINO. BenchError: if it does not take the model.
    """
    core = _core()
    place = str(model) if isinstance(model, Path) else "model"
    try:
        read = core.read_model(os.fspath(model) if isinstance(model, Path) else model)
        if shapes:
            read.reshape({name: list(shape) for name, shape in shapes.items()})
        compiled = core.compile_model(read, "CPU", options(threads))
    except RuntimeError as error:
        text = str(error).strip().splitlines()
        raise BenchError(
            f"{place}: OpenVINO cannot load it ({text[-1] if text else error}); use provider 'cpu'"
        ) from error
    return Compiled(compiled), len(compiled.get_runtime_model().get_ops())


def _core() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ProviderError(
            f"provider 'openvino': it cannot be imported ({error}); pip install graphcomp[openvino], or use "
            "provider 'cpu'"
        ) from error
    return openvino.Core()


def require_agreement(
    place: str,
    found: Sequence[NDArray[Any]],
    expected: Sequence[NDArray[Any]],
    written: Sequence[NDArray[Any]] | None = None,
    *,
    name: str = NAME,
    most: float = MOST_APART,
) -> None:
    """BenchError if outputs are not those of ONNX Runtime on the CPU.

    Args:
        place: of the file, for messages.
        found, expected: of what is compared and of ONNX Runtime.
        written: of a file that rounds to bytes on the way: what ONNX Runtime computes node by node.
        name, most: of what is compared, and how far it may be away, of the norm.
    """
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not np.issubdtype(b.dtype, np.floating):
            continue
        limit, advice = most, "use provider 'cpu'"
        if written is not None:
            limit = max(MOST_APART_8_BITS, TIMES_ROUNDING * _apart(b, written[index]))
            advice = "8 bit sums may saturate there; quantise with grid=pairs"
        apart = _apart(a, b)
        if not apart <= limit:
            raise BenchError(
                f"{place}: found output {index} of {name} {apart:.2g} of its norm away from ONNX "
                f"Runtime's, expected at most {limit:.2g}: times of another network say nothing; {advice}"
            )


def _apart(a: NDArray[Any], b: NDArray[Any]) -> float:
    norm = float(np.linalg.norm(b.astype(np.float64).ravel()))
    return float(np.linalg.norm((a.astype(np.float64) - b).ravel())) / (norm or 1.0)
