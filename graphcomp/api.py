"""The functions of the public namespace that are more than a re-export: they take paths and short recipes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphcomp.compiler import compiler
from graphcomp.data import Data
from graphcomp.errors import RecipeError
from graphcomp.explanation import explanation
from graphcomp.ir import Program, trace
from graphcomp.onnx import export
from graphcomp.pipeline import Pass
from graphcomp.records import records
from graphcomp.runtime import bench


def compile(
    model: Program | nn.Module,
    passes: str | Sequence[Pass],
    *,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    data: Data | str | None = None,
    target: str = "auto",
    seed: int = 0,
) -> compiler.Compiled:
    """Run passes on a model and verify each.

    Args:
        model: a Program, or a network to trace (then `example_inputs` are needed). It is left as it is.
        passes: `"fold-bn, l1{ratio=0.5}"`, or pass objects.
        example_inputs: one tensor an input, batch 1.
        data: calibration and evaluation data: what `load_data` returns, or its spec.
        target: `auto` (this CPU) or a target's name; channel counts are rounded to its multiple.
        seed: of everything random.

    Raises:
        RecipeError: an unknown pass or option. PassError: a pass that failed. TraceError, DataError.
    """
    from graphcomp.compiler import parse_passes
    from graphcomp.passes import PASSES

    if not isinstance(model, Program):
        if example_inputs is None:
            raise RecipeError(
                "example_inputs: found none, expected one tensor an input to trace the model with"
            )
        model = trace(model, example_inputs)
    made = parse_passes(passes, PASSES) if isinstance(passes, str) else list(passes)
    loaded = compiler.need_data(data, model, seed) if isinstance(data, str) else data
    return compiler.compile_program(model, made, data=loaded, target=target, seed=seed)


def export_onnx(program: Program, path: str | Path, **options: Any) -> records.Export:
    """Write a program as ONNX and check that ONNX Runtime computes the same; see `onnx.export`."""
    return export.export_onnx(program, Path(path), **options)


def benchmark(base: str | Path, new: str | Path, **options: Any) -> records.Bench:
    """Time two ONNX files against each other; see `runtime.bench`."""
    return bench.benchmark(Path(base), Path(new), **options)


def explain(base: str | Path, new: str | Path, **options: Any) -> records.Explanation:
    """Why `new` is not as much faster as it is smaller; see `explanation.explanation`."""
    return explanation.explain(Path(base), Path(new), **options)


def load(directory: str | Path) -> Program:
    """Load a saved program, without the source of the model; LoadError if it is damaged."""
    return Program.load(directory)
