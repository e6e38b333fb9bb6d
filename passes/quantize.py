"""quantize: the exported file once more, in 8 bits, for CPUs; the last pass of a recipe.

    q = round(w / s),   w' = s q        s8, a scale s an output channel
    q = round(x / s) + z                u8, a scale and a zero point a tensor

A program stays float, exact and trainable: scales are of an ONNX file's tensors, so they are chosen when that
file is there, by a pass over it. What is decided (ranges of activations, means of channels, the grid of the
weights, what stays in float) is the plan in `plans/`, with which the same file is written again without data.
See docs/onnx.md for the ranges, the grids and the checks.
"""

from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from graphcomp.bases import OPTIONS, Globs, options_of
from graphcomp.data import Data
from graphcomp.errors import DataError, PassError
from graphcomp.ir import Program
from graphcomp.measure import is_classifier
from graphcomp.onnx import LEAST, SAMPLES, Grid, Timing, quantize_file
from graphcomp.pipeline import Context, Outlook, require_data
from graphcomp.records import LeftAlone, Plan, Quantized

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True, config=OPTIONS)
class Quantize:
    """Write the result once more as an 8 bit file, model-int8.onnx, where that is faster; the last pass."""

    name: ClassVar[str] = "quantize"

    grid: Annotated[
        Grid | None,
        Field(
            description="of the weights: pairs (no two neighbouring taps saturate int16), plain (8 bit), "
            "reduced (7 bit); default from the target"
        ),
    ] = None
    samples: Annotated[
        int,
        Field(ge=LEAST, description="of the calibration data, for ranges and means; a quarter is held out"),
    ] = SAMPLES
    exclude: Annotated[Globs, Field(description="globs on names of layers that stay in float")] = ()

    def require(self, outlook: Outlook) -> None:
        """Samples of the network's own kind, labelled or not, and something to quantise."""
        data = require_data(self.name, outlook.context)
        wide = [x.dtype for x in outlook.program.example_inputs if x.is_floating_point()]
        if any(dtype != torch.float32 for dtype in wide):
            raise PassError(
                f"{self.name}: found a network that reads {', '.join(map(str, wide))}, expected "
                "torch.float32, whose range is that of samples; leave it out"
            )
        _check_samples(self.name, data)
        if outlook.plain and not any(
            isinstance(m, LAYERS) for m in outlook.program.called_modules().values()
        ):
            raise PassError(
                f"{self.name}: found no convolution and no linear layer, expected at least one; leave it out"
            )

    def foresee(self, outlook: Outlook) -> Outlook:
        """The program as it is."""
        return outlook

    def plan(self, program: Program, context: Context) -> Plan:
        """What was asked for; the rest is decided on the file."""
        return Plan(
            name=self.name, options=options_of(self), summary="carried out when the result is exported"
        )

    def simulate(self, program: Program, plan: Plan) -> Program:
        """The program as it is."""
        return program

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """The program as it is."""
        return program

    def follow(self, program: Program, plan: Plan) -> Program:
        """The program as it is."""
        return program

    def export(
        self, program: Program, file: Path, out: Path, plan: Plan, context: Context, timing: Timing | None
    ) -> tuple[Plan, Quantized]:
        """Quantise the file, see `graphcomp.quantize_onnx`."""
        data = require_data(self.name, context)
        judged = data.labelled and not data.regression and is_classifier(program)
        made, choice = quantize_file(
            file,
            out,
            data.train,
            grid=self.grid,
            own="plain" if context.target.saturates is False else "pairs",
            count=self.samples,
            exclude=self.exclude,
            kernels="tensorrt" if context.target.provider == "tensorrt" else "cpu",
            evaluate=data.eval if judged else None,
            timing=timing,
            progress=context.progress,
        )
        decisions, bulk = choice.plan()
        kept = [LeftAlone(where=name, reason=reason) for name, reason in made.in_float.items()]
        done = {"decisions": decisions, "bulk": bulk, "kept": kept, "summary": _summary(made)}
        return plan.model_copy(update=done), made


def _check_samples(name: str, data: Data) -> None:
    if data.spec.partition("?")[0] == "random":
        raise DataError(
            f"{name}: found random samples, expected some that the network is made for, since ranges of "
            "activations come of them; give --data, without labels if there are none"
        )
    if len(data.train) < LEAST:
        raise DataError(
            f"{name}: found {len(data.train)} samples to calibrate on, expected at least {LEAST}; give more"
        )


def _summary(made: Quantized) -> str:
    named = {layer.name for layer in made.layers}
    count, of = len(named - made.in_float.keys()), len(named | made.in_float.keys())
    said = f"{count} of {of} layers in 8 bits, {made.snr_db:.1f} dB of the outputs"
    ships = f"ships {made.shipped}" if made.bench is not None else "no race was run"
    return f"{said}, {made.int8_bytes:,} bytes for {made.float_bytes:,}; {ships}"
