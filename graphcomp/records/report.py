"""What a whole run yields: `report.json` is `Report.model_dump_json()`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from graphcomp.records import old
from graphcomp.records.explanation import Explanation
from graphcomp.records.passes import Step
from graphcomp.records.program import Score, Snapshot
from graphcomp.records.quantized import Quantized
from graphcomp.records.record import Record
from graphcomp.records.timing import Bench, Environment


class DctWeights(Record):
    """How the weights of DCT layers are stored in an ONNX file."""

    stored: Literal["coefficients", "dense"] = Field(
        description="coefficients, from which the runtime rebuilds the weights when it loads the file, or "
        "the dense weights themselves"
    )
    layers: int = Field(description="how many")
    coefficient_bytes: int = Field(description="0 if dense")
    order_bytes: int = Field(description="of the columns of all weights; 0 if dense")


class HalfWeights(Record):
    """Weights of an ONNX file that are stored as float16; the arithmetic is float32."""

    tensors: int = Field(description="how many")
    float32_bytes: int = Field(description="that they would take")
    float16_bytes: int = Field(description="that they take")
    kept: dict[str, str] = Field(description="weights that stayed in float32 -> why")


class Export(Record):
    """The exported ONNX file and how equal it is to the program."""

    path: str = Field(description="relative to the output directory")
    data: str | None = Field(
        default=None, description="file beside it that holds its numbers; null where they are in it"
    )
    bytes: int = Field(description="size of the file, and of the one beside it")
    opset: int = Field(description="as found in the file")
    nodes: int = Field(description="after the clean-up")
    parity: dict[str, float] = Field(
        description="per batch size, and per other size of the first input where height or width are open: "
        "max |onnx - torch| / max |torch|, the worst of several inputs"
    )
    remarks: list[str] = Field(
        default_factory=list, description="that rounding took the parity above the tolerance, and how far"
    )
    cleanup: list[str] = Field(description="what the clean-up did, with the count of nodes it saved")
    fallback: str | None = Field(
        default=None,
        description="null if the file was written directly; else the call that could not be, and why: then "
        "torch's exporter made the file",
    )
    dct: DctWeights | None = Field(default=None, description="null if the program has no DCT layers")
    half: HalfWeights | None = Field(
        default=None, description="null if weights are stored as they are; parity is that of what is stored"
    )


class CorruptedScore(Record):
    """How good a program is on evaluation images that were damaged."""

    corruption: str = Field(description="motion-blur, occlusion or brightness")
    amount: float = Field(
        description="motion-blur: length as a fraction of the shorter side; occlusion: hidden part of the "
        "area; brightness: factor of the pixel values"
    )
    score: Score = Field(description="on the damaged images")


class Evaluation(Record):
    """Result of `graphcomp evaluate`."""

    schema_version: Literal[2] = Field(default=2, description="the same as the report's")
    model: str = Field(description="as it was named")
    weights: str | None = Field(description="file of the weights, null for the model's own")
    remarks: list[str] = Field(
        default_factory=list, description="what to know of the weights: random ones, or where in the file"
    )
    data: str = Field(description="what was evaluated on, in a line")
    seed: int = Field(description="of the damage, and of what `?limit=N` keeps")
    snapshot: Snapshot = Field(description="the model")
    robustness: list[CorruptedScore] = Field(
        default_factory=list, description="empty if it was not asked for"
    )

    _schema_1 = model_validator(mode="before")(old.report)


class Robustness(Record):
    """The baseline and the result on the same damaged images, in the same order."""

    baseline: list[CorruptedScore] = Field(description="one for each kind of damage and strength")
    final: list[CorruptedScore] = Field(description="the same")


class Report(Record):
    """Result of `graphcomp compile`."""

    schema_version: Literal[2] = Field(
        default=2, description="raised when a field changes its meaning or goes away"
    )
    model: str = Field(description="as it was named to the compiler, e.g. torchvision:resnet18")
    weights: str | None = Field(description="file of the weights, null for the model's own")
    remarks: list[str] = Field(
        default_factory=list, description="what to know of the weights: random ones, or where in the file"
    )
    data: str = Field(description="a description; what the compiler was told is in `recipe`")
    target: str = Field(description="what widths were rounded for, e.g. cpu-avx2")
    seed: int = Field(description="of every random choice")
    input_shape: tuple[int, ...] | None = Field(
        default=None, description="that was asked for, with the batch; null for the model's own"
    )
    input_shapes: dict[str, tuple[int, ...]] = Field(
        default_factory=dict, description="that were asked for, of inputs by name"
    )
    recipe: dict[str, Any] = Field(description="the passes and options that ran, as a recipe file holds them")
    baseline: Snapshot = Field(description="the program before the first pass")
    final: Snapshot = Field(description="the program after the last pass")
    steps: list[Step] = Field(description="the passes, in the order they ran")
    export: Export = Field(description="of the result")
    baseline_export: Export = Field(description="of the baseline, by the same exporter")
    dense_export: Export | None = Field(
        default=None, description="the result once more, with the weights of its DCT layers stored dense"
    )
    bench: Bench | None = Field(description="null if nothing was timed")
    other_benches: list[Bench] = Field(
        default_factory=list, description="the same two files in the other runtimes that were asked for"
    )
    dct_bench: Bench | None = Field(
        default=None, description="the result with dense weights (base) against DCT coefficients (new)"
    )
    quantized: Quantized | None = Field(
        default=None, description="the result in 8 bits; null if the recipe does not end with quantize"
    )
    robustness: Robustness | None = Field(default=None, description="null if it was not asked for")
    explanation: Explanation | None = Field(
        default=None,
        description="theory against practice at the first batch size; null if nothing was timed, or not "
        "on a CPU",
    )
    environment: Environment = Field(description="where the compilation ran")
    started: str = Field(description="ISO 8601, UTC")
    seconds: float = Field(description="wall time of the whole run")

    @property
    def benches(self) -> list[Bench]:
        """One for each runtime that was asked for."""
        return [one for one in (self.bench, *self.other_benches) if one is not None]

    _schema_1 = model_validator(mode="before")(old.report)
