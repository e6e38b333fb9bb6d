"""Whether a file computes what its program computes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphcomp.errors import BenchError, ExportError, ProviderError, first_line
from graphcomp.ir import Program, fresh_inputs, output_tensors
from graphcomp.onnx.origins import place_of
from graphcomp.onnx.translate import UNBAKE
from graphcomp.runtime import open_session, run_errors

# Scale and shift of the random inputs: plain normal, and values far outside of it.
_INPUT_KINDS = ((1.0, 0.0), (4.0, 1.0))


@dataclass(frozen=True)
class Case:
    """One comparison: the inputs, and what the program says to them."""

    batch: int
    inputs: tuple[Tensor, ...]
    expected: list[Tensor]


def make_cases(program: Program, batch: int, seed: int, names: Sequence[str]) -> Iterator[Case]:
    """What the program answers to every kind of input at one batch size."""
    for index, (scale, shift) in enumerate(_INPUT_KINDS):
        inputs = tuple(
            (x * scale + shift).to(example.dtype) if example.is_floating_point() else x
            for x, example in zip(
                fresh_inputs(program, batch, seed + index), program.example_inputs, strict=True
            )
        )
        expected = _run(program, inputs, batch)
        for name, tensor in zip(names, expected, strict=True):
            if not tensor.isfinite().all():
                raise ExportError(
                    f"output {name!r}: found NaN or infinity from the program itself at batch {batch}, "
                    "expected finite numbers to compare with; check its weights"
                )
        yield Case(batch, inputs, expected)


def _run(program: Program, inputs: tuple[Tensor, ...], batch: int) -> list[Tensor]:
    try:
        with torch.inference_mode():
            # Clones, because a network may work on its input in place.
            output = fx.Interpreter(program.module).run(*(x.clone() for x in inputs))
        return [tensor.detach() for tensor in output_tensors(output)]
    # Whatever a network's operators raise; the message says what and where.
    except Exception as error:
        advice = "check its inputs" if batch == 1 else f"a batch size may be baked into the graph; {UNBAKE}"
        raise ExportError(
            f"{place_of(error, program)}: found '{first_line(error)}', expected a network that runs at batch "
            f"{batch}; {advice}"
        ) from error


def compare(
    content: bytes,
    cases: Sequence[Case],
    inputs: Sequence[str],
    outputs: Sequence[str],
    tolerance: float,
    constant: Sequence[str] = (),
) -> dict[str, float]:
    """Worst relative error at every batch size.

    ExportError if one is above `tolerance`, or if one of the nodes named in `constant` is left to every run.
    """
    try:
        session = open_session(content, "cpu", torch.get_num_threads()).session
    except ProviderError:
        raise
    except BenchError as error:
        raise ExportError(
            f"export: {error}, expected a file that runs; try cleanup=False or another opset"
        ) from error
    _check_folded(session, constant)
    worst: dict[str, float] = {}
    for case in cases:
        feed = {name: x.numpy() for name, x in zip(inputs, case.inputs, strict=True)}
        try:
            results = session.run(list(outputs), feed)
        except run_errors() as error:
            raise ExportError(
                f"batch {case.batch}: ONNX Runtime found '{first_line(error)}', expected a file that runs; "
                f"the batch size may be baked into the graph; {UNBAKE}"
            ) from error
        for name, found, expected in zip(outputs, results, case.expected, strict=True):
            error_here = _checked_error(name, case.batch, found, expected.numpy(), tolerance)
            worst[str(case.batch)] = max(worst.get(str(case.batch), 0.0), error_here)
    return worst


def _check_folded(session: Any, constant: Sequence[str]) -> None:
    parts = session.get_provider_graph_assignment_info()
    left = {node.name for part in parts for node in part.get_nodes()} & set(constant)
    if left:
        raise ExportError(
            f"{min(left)}: found it among the nodes that ONNX Runtime computes at every run ({len(left)} in "
            "all), expected weights that are rebuilt once when the file is loaded; nothing was written; use "
            "dct='dense'"
        )


def _checked_error(
    name: str, batch: int, found: NDArray[Any], expected: NDArray[Any], tolerance: float
) -> float:
    place = f"output {name!r} at batch {batch}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"{place}: found {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}; the "
            f"batch size may be baked into the graph; {UNBAKE}"
        )
    error = _relative_error(found, expected)
    # Not `error > tolerance`: NaN must fail.
    if not error <= tolerance:
        raise ExportError(
            f"{place}: found a relative error of {error:.3g} of ONNX Runtime against torch, expected at most "
            f"{tolerance:g}; nothing was written; try cleanup=False or another opset, or raise the tolerance"
        )
    return error


def _relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |found - expected| / max |expected|; absolute where all expected values are zero."""
    if not expected.size:
        return 0.0
    peak = float(np.abs(expected.astype(np.float64)).max())
    error = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    return error / peak if peak else error
