"""Execution providers: what they are called and told, and the runtime that has them."""

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from graphcomp.base import cache, json_sha256
from graphcomp.errors import BenchError, ProviderError

Provider = Literal["cpu", "cuda", "tensorrt", "openvino"]
PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINO",  # a runtime of its own, see `runtime.openvino`
}
HOST: frozenset[Provider] = frozenset({"cpu", "openvino"})
"""Those that compute on the processor that asks, whose own clock tells how long they took."""
HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Reduced precision and algorithm search stated rather than inherited, so that the record says what was timed.
OPTIONS: dict[Provider, dict[str, str]] = {
    "cpu": {},
    "cuda": {"device_id": "0", "use_tf32": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"},
    "tensorrt": {"device_id": "0", "trt_fp16_enable": "0", "trt_int8_enable": "0"},
    "openvino": {},
}
ADVICE: dict[Provider, str] = {
    "cpu": "reinstall onnxruntime",
    "cuda": "install the NVIDIA driver, CUDA and cuDNN that this onnxruntime-gpu was built for, or use "
    "provider 'cpu'",
    "tensorrt": "install the NVIDIA driver and the TensorRT libraries (pip install tensorrt), or use "
    "provider 'cpu'",
    "openvino": "pip install graphcomp[openvino], or use provider 'cpu'",
}


ENGINES = "tensorrt"
"""Kind of the cache's entries that TensorRT writes."""
TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
"""Distributions that it comes in."""


@functools.cache
def installed_runtimes() -> dict[str, str]:
    """Every installed distribution that provides the module `onnxruntime`, with its version."""
    found = {d.name: d.version for d in importlib.metadata.distributions() if _provides(d, "onnxruntime")}
    return dict(sorted(found.items()))


def _provides(distribution: importlib.metadata.Distribution, module: str) -> bool:
    """Whether it says so, or has its files; `packages_distributions` parses every file list, for a second."""
    said = distribution.read_text("top_level.txt")
    if said is not None:
        return module in said.split()
    return f"\n{module}/__init__.py," in f"\n{distribution.read_text('RECORD') or ''}"


def run_errors() -> tuple[type[BaseException], ...]:
    """The exceptions that the installed runtime raises when a session cannot be opened or run."""
    state = import_runtime().capi.onnxruntime_pybind11_state
    names = (
        "Fail",
        "InvalidArgument",
        "NoSuchFile",
        "NoModel",
        "EngineError",
        "RuntimeException",
        "InvalidProtobuf",
        "NotImplemented",
        "InvalidGraph",
        "EPFail",
    )
    return (RuntimeError, ValueError, *(getattr(state, name) for name in names))


def import_runtime() -> Any:
    """The module `onnxruntime`. ProviderError unless there is one that tells where nodes run."""
    found = installed_runtimes()
    if len(found) > 1:
        listed = " and ".join(f"{name} {version}" for name, version in found.items())
        raise ProviderError(
            f"onnxruntime: found {listed} installed at once, expected one distribution; they overwrite each "
            "other's "
            f"files: run `pip uninstall {' '.join(found)}` and install only the one you want"
        )
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProviderError(
            f"onnxruntime: cannot be imported ({error}); reinstall onnxruntime or onnxruntime-gpu"
        ) from error
    if not hasattr(getattr(ort, "InferenceSession", None), "get_provider_graph_assignment_info"):
        raise ProviderError(
            f"onnxruntime: found {getattr(ort, '__version__', 'a broken install')}, expected 1.24 or later, "
            "whose sessions tell where each node runs; upgrade or reinstall it"
        )
    return ort


GRAPHS: dict[Provider, dict[str, str]] = {
    "cuda": {"enable_cuda_graph": "1"},
    "tensorrt": {"trt_cuda_graph_enable": "1"},
}
"""What switches CUDA graphs on."""


def asked_of(providers: Sequence[Provider]) -> frozenset[Provider]:
    """Those that options of GPUs are for: beside a GPU processors go without, alone they refuse them."""
    return (frozenset(providers) - HOST) or frozenset(providers)


def graph_options(provider: Provider, cuda_graphs: bool) -> dict[str, str]:
    """What switches CUDA graphs on, if they are asked for. BenchError for a provider without."""
    if not cuda_graphs:
        return {}
    if provider not in GRAPHS:
        raise BenchError(
            f"CUDA graphs: found provider {provider!r}, expected one of {', '.join(GRAPHS)}; leave them off"
        )
    return GRAPHS[provider]


def tensorrt_options(
    provider: Provider, shapes: Mapping[str, Sequence[int]] | None, cache_key: str | None
) -> dict[str, str]:
    """A profile of exactly these shapes, and where its engines are kept; none for others."""
    if provider != "tensorrt":
        return {}
    options: dict[str, str] = {}
    if shapes:
        # One profile that is exactly the timed shape: an engine built for a range is slower inside it.
        profile = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
        options |= {f"trt_profile_{bound}_shapes": profile for bound in ("min", "opt", "max")}
    place = cache.place(ENGINES, _engine_name(cache_key, options)) if cache_key else None
    if place is not None:
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(place)}
    return options


def _engine_name(cache_key: str, options: dict[str, str]) -> str:
    """Of everything that an engine is built by and for; TensorRT refuses those of another version or GPU."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    parts = [cache_key, OPTIONS["tensorrt"] | options, installed_runtimes(), _tensorrt_versions(), gpu]
    return json_sha256(parts)


def _tensorrt_versions() -> list[str]:
    found = []
    for name in TENSORRT:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def allows_tf32(provider: Provider, options: Mapping[str, str]) -> bool | None:
    """TensorRT has no option for it: its builder allows TF32 unless NVIDIA_TF32_OVERRIDE=0 forbids it."""
    if provider in ("cpu", "openvino"):
        return None
    return options.get("use_tf32", "1") == "1" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
