"""Whether a file computes what its program computes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphcomp.errors import BenchError, ExportError, ProviderError, first_line
from graphcomp.ir import Program, fresh_inputs, output_tensors
from graphcomp.onnx.agreement import disagreement
from graphcomp.onnx.origins import place_of
from graphcomp.onnx.rounding import Allowance, remark
from graphcomp.onnx.translate import UNBAKE, UNBAKE_SIZE
from graphcomp.runtime import open_session, run_errors

# Scale and shift of the random inputs: plain normal, and values far outside of it.
_INPUT_KINDS = ((1.0, 0.0), (4.0, 1.0))


@dataclass(frozen=True)
class Case:
    """One comparison: the inputs, and what the program says to them.

    Attributes:
        size: of the first input, where it is another than the example's, e.g. `3x256x288`; else "".
    """

    batch: int
    inputs: tuple[Tensor, ...]
    expected: list[Tensor]
    size: str = ""

    @property
    def place(self) -> str:
        """For messages."""
        return f"batch {self.batch}" + (f" and size {self.size}" if self.size else "")

    @property
    def advice(self) -> str:
        """What to do if it cannot be run."""
        return (
            f"a size may be baked into the graph; {UNBAKE_SIZE}"
            if self.size
            else f"the batch size may be baked into the graph; {UNBAKE}"
        )


def make_cases(
    program: Program,
    batches: Sequence[int],
    seed: int,
    names: Sequence[str],
    sizes: Iterable[tuple[Tensor, ...]] = (),
    odd: Iterable[tuple[Tensor, ...]] = (),
) -> list[Case]:
    """What the program answers to every kind of input: one after another at the first size, else by turns.

    Args:
        program: run at all `batches` at the sizes of its example inputs.
        batches, seed, names: sizes, of the random inputs, of the outputs.
        sizes: example inputs of other sizes, at which it runs with the last of `batches` up to two.
        odd: the same, left out where the program does not run, or yields other axes.
    """
    cases: list[Case] = []
    for batch in batches:
        kinds = [] if cases else [(kind,) * batch for kind in _INPUT_KINDS]
        cases += _cases(program, batch, seed, names, "", kinds)
    batch = max((b for b in batches if b <= 2), default=batches[0])
    for resized in sizes:
        cases += _cases(replace(program, example_inputs=resized), batch, seed, names, _text(resized))
    for resized in odd:
        with contextlib.suppress(ExportError):
            found = list(_cases(replace(program, example_inputs=resized), batch, seed, names, _text(resized)))
            cases += [case for case in found if _ranks(case) == _ranks(cases[0])]
    return cases


def _ranks(case: Case) -> list[int]:
    """Where torch keeps an axis that a file would squeeze, the network does not run."""
    return [t.dim() for t in case.expected]


def _text(inputs: Sequence[Tensor]) -> str:
    return "x".join(map(str, inputs[0].shape[1:]))


def _cases(
    program: Program,
    batch: int,
    seed: int,
    names: Sequence[str],
    size: str,
    kinds: Sequence[Sequence[tuple[float, float]]] = (),
) -> Iterator[Case]:
    by_turns = [_INPUT_KINDS[i % len(_INPUT_KINDS)] for i in range(batch)]
    for index, samples in enumerate(kinds or [by_turns]):
        scale, shift = torch.tensor(samples).t()
        inputs = tuple(
            (x * _by_sample(scale, x) + _by_sample(shift, x)).to(example.dtype)
            if example.is_floating_point()
            else x
            for x, example in zip(
                fresh_inputs(program, batch, seed + index), program.example_inputs, strict=True
            )
        )
        case = Case(batch, inputs, [], size)
        expected = _run(program, case)
        for name, tensor in zip(names, expected, strict=True):
            if not tensor.isfinite().all():
                raise ExportError(
                    f"output {name!r}: found NaN or infinity from the program itself at {case.place}, "
                    "expected finite numbers to compare with; check its weights"
                )
        yield replace(case, expected=expected)


def _by_sample(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.reshape(-1, *(1,) * (x.dim() - 1))


def _run(program: Program, case: Case) -> list[Tensor]:
    try:
        with torch.inference_mode():
            # Clones, because a network may work on its input in place.
            output = fx.Interpreter(program.module).run(*(x.clone() for x in case.inputs))
        return [tensor.detach() for tensor in output_tensors(output)]
    # Whatever a network's operators raise; the message says what and where.
    except Exception as error:
        advice = "check its inputs" if case.batch == 1 and not case.size else case.advice
        raise ExportError(
            f"{place_of(error, program)}: found '{first_line(error)}', expected a network that runs at "
            f"{case.place}; {advice}"
        ) from error


def unexplained(case: Case) -> Allowance:
    """Where rounding is no excuse."""
    return Allowance()


def compare(
    content: bytes | Path,
    cases: Sequence[Case],
    inputs: Sequence[str],
    outputs: Sequence[str],
    tolerance: float,
    constant: Sequence[str] = (),
    allowed: Callable[[Case], Allowance] = unexplained,
) -> tuple[dict[str, float], list[str]]:
    """Worst error (see `onnx.agreement`) at every batch size, and at every other size of the first input.

    Args:
        content: of the file.
        cases: to compare.
        inputs, outputs: what they are called in the file.
        tolerance: of the errors.
        constant: nodes that are to be computed when the file is loaded.
        allowed: asked for what rounding explains, where an error is above the tolerance.

    Returns:
        The errors, and remarks: that rounding took one above the tolerance.

    Raises:
        ExportError: if one is above what is allowed, or if one of the nodes in `constant` is left to every
            run.
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
        rounding = cache(partial(allowed, case))
        key = case.size or str(case.batch)
        feed = {name: x.numpy() for name, x in zip(inputs, case.inputs, strict=True)}
        try:
            results = session.run(list(outputs), feed)
        except run_errors() as error:
            raise ExportError(
                f"{case.place}: ONNX Runtime found '{first_line(error)}', expected a file that runs; "
                f"{case.advice}"
            ) from error
        for name, found, expected in zip(outputs, results, case.expected, strict=True):
            error_here = _checked_error(name, case, found, expected.numpy(), tolerance, rounding)
            worst[key] = max(worst.get(key, 0.0), error_here)
    largest = max(worst.values(), default=0.0)
    return worst, [] if largest <= tolerance else [remark(largest)]


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
    name: str,
    case: Case,
    found: NDArray[Any],
    expected: NDArray[Any],
    tolerance: float,
    rounding: Callable[[], Allowance],
) -> float:
    place = f"output {name!r} at {case.place}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"{place}: found {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}; "
            f"{case.advice}"
        )
    error = disagreement(found, expected, tolerance)
    # Not `error > tolerance`: NaN must fail.
    if not error <= tolerance and not error <= rounding().most:
        most = max(tolerance, rounding().most or tolerance)
        raise ExportError(
            f"{place}: found a relative error of {error:.3g} of ONNX Runtime against torch"
            f"{rounding().advice}, expected at most {most:.3g}; nothing was "
            "written; try cleanup=False or another opset, or raise the tolerance"
        )
    return error
