"""What quantising a file came to."""

from typing import Literal

from pydantic import Field

from graphcomp.records.program import Score
from graphcomp.records.record import Record
from graphcomp.records.timing import Bench, Interval

Kernels = Literal["cpu", "tensorrt"]
"""Whose terms an 8 bit file is written in: u8 activations with zero points, 8 bit weights and int32 biases,
for runtimes on CPUs; s8 activations without zero points, weights that are rounded in the file and float
biases, for TensorRT."""


class QuantizedLayer(Record):
    """A convolution or product with 8 bit weights."""

    name: str = Field(description="of its node")
    snr_db: float | None = Field(
        description="of its output in the whole network, signal to noise; null where it is not rounded"
    )
    steps: int | None = Field(
        description="how far the fused kernel is from the layer as written, in steps of its output, on "
        "samples and on inputs of 0 and 255 (of numbers at the end: a 255th of what they span); null where "
        "the output is not rounded"
    )


class GivenBack(Record):
    """A layer that could be 8 bit and was tried in float, because alone it does the outputs most harm."""

    name: str = Field(description="of its node")
    alone_db: float = Field(description="signal to noise of the outputs with this one layer in 8 bits")
    snr_db: float = Field(description="of the outputs with it in float, and all others as they were then")
    time: float = Field(description="of one sample then, as a multiple of that with every layer in 8 bits")
    kept: bool = Field(description="whether it stayed in float: better outputs, and no longer a time")


class QuantizedChoice(Record):
    """The decisions of the pass `quantize`, with which its file is written again without data; what is in
    `bulk` are means of channels, and factors of those that are spread.
    """

    grid: Literal["pairs", "plain", "reduced"] = Field(description="of the weights")
    percentile: float | Literal["mean"] | None = Field(
        description="of activations that ranges hold; null: all of them; mean: of the samples' own ends"
    )
    layers: list[str] = Field(description="nodes with 8 bit weights")
    in_float: list[str] = Field(description="nodes that could have, and stay in float")
    ranges: dict[str, tuple[float, float]] = Field(description="tensor -> its least and largest value")
    spread: list[str] = Field(
        default=[], description="tensors whose channels are multiplied to peak alike; by what: `bulk`"
    )
    compensated: list[str] = Field(
        default=[], description="weights that are not rounded to the nearest; by how many steps: `bulk`"
    )
    kernels: Kernels = Field(default="cpu", description="whose terms the file is written in")


class Quantized(Record):
    """A float file, its 8 bit form, and which of them is to be shipped."""

    path: str | None = Field(description="the 8 bit file; null if it lost against the float file")
    kernels: Kernels = Field(default="cpu", description="whose terms the file is written in")
    source: str = Field(description="the float file")
    shipped: Literal["int8", "float32"] = Field(description="the faster file; without a race that in 8 bits")
    why: str = Field(description="one sentence")
    float_bytes: int = Field(description="size of the float file")
    int8_bytes: int = Field(description="size of the 8 bit file")
    grid: str = Field(description="of the weights: pairs, plain or reduced")
    percentile: float | Literal["mean"] | None = Field(
        description="of activations that ranges hold; null: all of them; mean: of the samples' own ends"
    )
    tried_db: dict[str, float] = Field(description="signal to noise of the outputs by ranges that were tried")
    snr_db: float = Field(description="of the outputs, on samples that nothing else was chosen by than this")
    samples: int = Field(description="that ranges and means were taken of")
    held_out: int = Field(description="that signal to noise was measured on")
    layers: list[QuantizedLayer] = Field(description="those with 8 bit weights")
    in_float: dict[str, str] = Field(description="convolutions and products left in float, and why")
    given_back: list[GivenBack] = Field(
        default_factory=list, description="layers that were tried in float; empty without a race"
    )
    saturating: list[str] | None = Field(
        default=None,
        description="layers whose sums can leave int16 on x86 without VNNI, where they saturate without a "
        "word; null in older reports",
    )
    operators: dict[str, int] = Field(description="what the runtime made of the 8 bit file, by number")
    bench: Bench | None = Field(description="the float file (base) against the 8 bit file; null: no race")
    other_benches: list[Bench] = Field(
        default_factory=list, description="the same two files in the other runtimes that were asked for"
    )
    not_timed: dict[str, str] = Field(
        default_factory=dict, description="runtimes that do not compute the 8 bit file, and why"
    )
    score: Score | None = Field(default=None, description="of the 8 bit file; null without labels")
    accuracy: Interval | None = Field(
        default=None, description="top-1 of the 8 bit file less that of the float file, on the same samples"
    )

    @property
    def benches(self) -> list[Bench]:
        """One for each runtime in which both files were timed."""
        return [one for one in (self.bench, *self.other_benches) if one is not None]
