"""The functions of the public namespace that are more than a re-export: they take short recipes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from graphcomp.compiler import Compiled, allows_nothing, compile_program, open_data, parse_passes
from graphcomp.data import Data
from graphcomp.errors import RecipeError
from graphcomp.ir import Program, trace
from graphcomp.pipeline import Pass


def compile(
    model: Program | nn.Module,
    passes: str | Sequence[Pass],
    *,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    data: Any = None,
    target: str = "auto",
    seed: int = 0,
    allow_nothing: bool = False,
) -> Compiled:
    """Run passes on a model and verify each.

    Args:
        model: a Program, or a network to trace (then `example_inputs` are needed). It is left as it is.
        passes: `"fold-bn, l1{ratio=0.5}"`, or pass objects.
        example_inputs: one tensor an input, batch 1.
        data: calibration and evaluation data: what `load_data` returns, or what it takes: a spec, or a
            dataset.
        target: `auto` (this CPU) or a target's name; channel counts are rounded to its multiple.
        seed: of everything random.
        allow_nothing: that no pass changes anything is no error.

    Raises:
        RecipeError: an unknown pass or option. PassError: a pass that failed, or none that changed anything.
        TraceError, DataError.
    """
    from graphcomp.passes import PASSES

    if not isinstance(model, Program):
        if example_inputs is None:
            raise RecipeError(
                "example_inputs: found none, expected one tensor an input to trace the model with"
            )
        model = trace(model, example_inputs)
    made = parse_passes(passes, PASSES) if isinstance(passes, str) else list(passes)
    loaded = data if data is None or isinstance(data, Data) else open_data(data, model, seed)
    nothing = allow_nothing or (isinstance(passes, str) and allows_nothing([passes]))
    return compile_program(model, made, data=loaded, target=target, seed=seed, allow_nothing=nothing)
