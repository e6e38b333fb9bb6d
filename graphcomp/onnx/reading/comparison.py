"""A program that was read is compared with ONNX Runtime on the file: a wrong row cannot be silent."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from graphcomp.errors import BenchError, GraphcompError, LoadError, first_line
from graphcomp.ir import Program, fresh_inputs, output_tensors
from graphcomp.onnx.agreement import TOLERANCES, disagreement
from graphcomp.onnx.alone import apart
from graphcomp.onnx.reading.file import OnnxSource
from graphcomp.onnx.reading.ports import Case, Input
from graphcomp.onnx.rounding import Allowance, Samples, allowance, remark
from graphcomp.onnx.rows import VALUE_KEY
from graphcomp.runtime import open_session, run_errors

_FEEDS: dict[int, Any] = {TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}

Arrays = list[NDArray[Any]]


def compare(
    program: Program,
    source: OnnxSource,
    inputs: Sequence[Input],
    fixed: int | None,
    others: Sequence[Case],
    odd: Case | None,
) -> tuple[str, ...]:
    """Compare the program with the file.

    More than the tolerance is allowed where the network amplifies rounding (`onnx.rounding`).

    Args:
        program: that was read for the batch sizes that are compared.
        source: of the file.
        inputs: of the file.
        fixed: the only batch size that the file takes; None for any.
        others: cases of other sizes than the examples', which are compared, too.
        odd: one that is only compared if the file takes it.

    Returns:
        Remarks: that rounding took it further from ONNX Runtime than the tolerance.

    Raises:
        LoadError: naming the output that differs, or if ONNX Runtime does not run the file.
    """
    file = _File(source, inputs)
    alone = program.interface.inputs and not any(0 in p.axes for p in program.interface.inputs)
    count = 1 if alone else fixed if fixed is not None and fixed > 1 else 2
    together = _samples(program, file, count, fixed)
    single = [tuple(x[i : i + 1] for x in together) for i in range(count)]
    nodes = {n: str(n.meta[VALUE_KEY]) for n in program.graph.nodes if VALUE_KEY in n.meta}

    def differs(samples: Samples, most: float) -> str | None:
        found = apart(program, nodes, source.model, file.feed(samples), samples, most)
        return found or (_mixed(program, file, together, single) if count > 1 else None)

    def explained(cases: Sequence[Samples]) -> Callable[[], Allowance]:
        return cache(lambda: allowance(program, cases, file.tolerance, differs))

    usual = explained(single if fixed == 1 else [together])
    ours = [_run(program, s) for s in single]
    all_ours = ours[0] if count == 1 else _run(program, together)
    if fixed == count or fixed is None:
        file.check(all_ours, file.run(together), f"at batch {count}", usual)
    if fixed in (None, 1):
        theirs = [file.run(s) for s in single]
        for mine, other in zip(ours, theirs, strict=True):
            file.check(mine, other, "at batch 1", usual)
    else:
        theirs = ours
    if count > 1:
        joined = _joined(file, theirs, ours[0], all_ours)
        file.check(all_ours, joined, f"of {count} samples together and alone", usual)
    for case in (*others, odd) if odd is not None else others:
        larger = tuple(torch.randn(i.shape(case)) if x.is_floating_point() else x.new_zeros(i.shape(case))
                       for i, x in zip(inputs, together, strict=True))  # fmt: skip
        try:
            theirs_here = file.run(larger)
        except LoadError:
            if case is odd:
                continue
            raise
        place = f"at other sizes ({dict(case.sizes)})"
        file.check(_run(program, larger), theirs_here, place, explained([larger]))
    return file.remarks


def _mixed(program: Program, file: "_File", together: Samples, single: Sequence[Samples]) -> str | None:
    """That samples do not yield together what they yield alone, in float64: there nothing hides it."""
    wide = program.to(torch.float64)
    all_, *alone = (
        _run(wide, tuple(x.double() if x.is_floating_point() else x for x in s)) for s in (together, *single)
    )
    pairs = zip(all_, _joined(file, alone, alone[0], all_), strict=True)
    error = max(disagreement(a, b, file.tolerance) for a, b in pairs)
    return None if error <= file.tolerance else f"samples: {error:.3g} from what they yield together"


def _joined(file: "_File", parts: Sequence[Arrays], one: Arrays, all_: Arrays) -> Arrays:
    """What samples yield alone, put together along the axis that grows with them."""
    joined = []
    for index, (a, b) in enumerate(zip(one, all_, strict=True)):
        grows = [d for d in range(a.ndim) if a.ndim == b.ndim and a.shape[d] != b.shape[d]]
        if len(grows) > 1:
            raise LoadError.at(
                file.outputs[index], f"{a.shape} and {b.shape}", "one axis that grows", "samples mix"
            )
        joined.append(np.concatenate([p[index] for p in parts], grows[0]) if grows else parts[0][index])
        for other in parts[1:] if not grows else ():
            if not disagreement(parts[0][index], other[index], file.tolerance) <= file.tolerance:
                raise LoadError.at(
                    f"output {file.outputs[index]!r:.120}",
                    "one value for all samples, which yield others alone",
                    "a value a sample",
                    "samples mix",
                )
    return joined


_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x.abs().clamp(0.1, 1.0),
    lambda x: x * 0.1,
)
"""Normal inputs; positive ones, for networks that take a logarithm; small ones."""


def _samples(program: Program, file: "_File", count: int, fixed: int | None) -> Samples:
    """Different samples for which the file says something finite."""
    found: Samples = ()
    for seed, change in enumerate(_CHANGES):
        given = fresh_inputs(program, count, seed)
        found = tuple(change(x) if x.is_floating_point() else x for x in given)
        if file.half:
            found = tuple(x.half().float() if x.is_floating_point() else x for x in found)
        tried = found if fixed is None or fixed == count else tuple(x[:1] for x in found)
        if all(np.isfinite(y).all() for y in file.run(tried) if y.dtype.kind == "f"):
            return found
    return found


def _run(program: Program, samples: Samples) -> Arrays:
    batch = samples[0].shape[0]
    try:
        with torch.inference_mode():
            return [t.numpy() for t in output_tensors(program(*(x.clone() for x in samples)))]
    except GraphcompError:
        raise
    # Whatever the operators of torch raise.
    except Exception as error:
        raise LoadError.at(
            "program",
            f"{first_line(error)!r:.300} at batch {batch}",
            "a network that runs",
            "a batch size may be baked in",
        ) from error


class _File:
    """The file in ONNX Runtime."""

    def __init__(self, source: OnnxSource, inputs: Sequence[Input]) -> None:
        self.name = source.path.name
        self.inputs = inputs
        self.outputs = [o.name for o in source.model.graph.output]
        kinds = {i.kind for i in inputs} | {t.data_type for t in source.model.graph.initializer}
        self.half = TensorProto.FLOAT16 in kinds
        name = "float16" if self.half else "bfloat16" if TensorProto.BFLOAT16 in kinds else "float32"
        self.tolerance = TOLERANCES[name]
        self.remarks: tuple[str, ...] = ()
        # Weights of 8 bits are those that the program has, whatever kernels make of them.
        file = source.model.SerializeToString() if source.remarks else source.path
        try:
            self.session = open_session(file, "cpu", torch.get_num_threads()).session
        except BenchError as error:
            self.session = self._unfused(file, error)

    def _unfused(self, file: bytes | Path, refused: BenchError) -> Any:
        """A session that fuses nothing, for valid files that some of the runtime's own fusions break."""
        why = f"{first_line(refused)!r:.300} by ONNX Runtime"
        try:
            session = open_session(file, "cpu", torch.get_num_threads(), plain=True).session
        except BenchError as error:
            raise LoadError.at(
                self.name, why, "a file that it runs, to compare with", "check the file"
            ) from error
        self.remarks = (f"compared with ONNX Runtime as it runs without fusions; with them it found {why}",)
        return session

    def feed(self, samples: Samples) -> dict[str, NDArray[Any]]:
        """Inputs in the types that the file takes."""
        return {
            i.name: x.numpy().astype(_FEEDS.get(i.kind, x.numpy().dtype))
            for i, x in zip(self.inputs, samples, strict=True)
        }

    def run(self, samples: Samples) -> Arrays:
        """What the file yields."""
        try:
            return [np.asarray(y) for y in self.session.run(self.outputs, self.feed(samples))]
        except run_errors() as error:
            raise LoadError.at(
                self.name,
                f"{first_line(error)!r:.300} by ONNX Runtime at batch {samples[0].shape[0]}",
                "a file that it runs",
                "a batch size may be baked in",
            ) from error

    def check(self, found: Arrays, expected: Arrays, where: str, explained: Callable[[], Allowance]) -> None:
        """Refuse what differs by more than rounding explains."""
        for name, ours, theirs in zip(self.outputs, found, expected, strict=True):
            place = f"output {name!r:.120} {where}"
            if ours.shape != theirs.shape:
                raise LoadError.at(
                    place, f"shape {ours.shape}", f"{theirs.shape}", "a batch size may be baked in"
                )
            if theirs.dtype.kind != "f" and ours.dtype != theirs.dtype:
                raise LoadError.at(place, f"{ours.dtype}", f"{theirs.dtype}", "please report this file")
            finite = np.isfinite(theirs) if theirs.dtype.kind == "f" else np.ones(theirs.shape, bool)
            hidden = ~finite
            error = disagreement(ours[finite], theirs[finite], self.tolerance)
            same = np.array_equal(ours[hidden], theirs[hidden].astype(ours.dtype), equal_nan=True)
            whole = theirs.dtype.kind != "f"
            # Not `error > tolerance`: NaN must fail.
            if not same or not error <= (0 if whole else self.tolerance):
                allowed = Allowance() if whole else explained()
                most = 0.0 if whole else max(self.tolerance, allowed.most)
                if not same or not error <= most:
                    raise LoadError.at(
                        place,
                        f"a relative error of {error:.3g} against ONNX Runtime{allowed.advice}",
                        f"at most {most:.3g}",
                        "nothing was read; please report the operators of this file",
                    )
                self.remarks = (*self.remarks, remark(error))
