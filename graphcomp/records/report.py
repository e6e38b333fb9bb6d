"""What a whole run yields: `report.json` is `Report.model_dump_json()`."""

from typing import Any, Literal

from pydantic import Field

from graphcomp.records.explanation import Explanation
from graphcomp.records.passes import Step
from graphcomp.records.program import Accuracy, MeanError, Snapshot
from graphcomp.records.record import Record
from graphcomp.records.timing import Bench, Environment


class DctWeights(Record):
    """How the weights of DCT layers are stored in an ONNX file."""

    stored: Literal["coefficients", "dense"] = Field(
        description="coefficients, from which the runtime rebuilds the weights when it loads the file, or "
        "the dense weights themselves"
    )
    layers: int
    coefficient_bytes: int = Field(description="0 if dense")
    order_bytes: int = Field(description="of the columns of all weights; 0 if dense")


class Export(Record):
    """The exported ONNX file and how equal it is to the program."""

    path: str
    bytes: int
    opset: int
    nodes: int
    parity: dict[str, float] = Field(
        description="per batch size: max |onnx - torch| / max |torch|, the worst of several inputs"
    )
    cleanup: list[str] = Field(description="what the clean-up did, with the count of nodes it saved")
    dct: DctWeights | None = Field(default=None, description="null if the program has no DCT layers")


class CorruptedScore(Record):
    """How good a program is on evaluation images that were damaged."""

    corruption: str = Field(description="motion-blur, occlusion or brightness")
    amount: float = Field(
        description="motion-blur: length as a fraction of the shorter side; occlusion: hidden part of the "
        "area; brightness: factor of the pixel values"
    )
    score: Accuracy | MeanError


class Evaluation(Record):
    """Result of `graphcomp evaluate`."""

    schema_version: Literal[1] = 1
    model: str
    weights: str | None
    remarks: list[str] = Field(
        default_factory=list, description="what to know of the weights: random ones, or where in the file"
    )
    data: str
    seed: int
    snapshot: Snapshot
    robustness: list[CorruptedScore] = Field(default_factory=list)


class Robustness(Record):
    """The baseline and the result on the same damaged images, in the same order."""

    baseline: list[CorruptedScore]
    final: list[CorruptedScore]


class Report(Record):
    """Result of `graphcomp compile`."""

    schema_version: Literal[1] = 1
    model: str
    weights: str | None
    remarks: list[str] = Field(
        default_factory=list, description="what to know of the weights: random ones, or where in the file"
    )
    data: str
    target: str
    seed: int
    input_shape: tuple[int, ...] | None = Field(
        default=None, description="that was asked for, with the batch; null for the model's own"
    )
    recipe: dict[str, Any]
    baseline: Snapshot
    final: Snapshot
    steps: list[Step]
    export: Export
    baseline_export: Export
    dense_export: Export | None = Field(
        default=None, description="the result once more, with the weights of its DCT layers stored dense"
    )
    bench: Bench | None
    dct_bench: Bench | None = Field(
        default=None, description="the result with dense weights (base) against DCT coefficients (new)"
    )
    robustness: Robustness | None = Field(default=None, description="null if it was not asked for")
    explanation: Explanation | None = Field(
        default=None,
        description="theory against practice at the first batch size; null if nothing was timed, or not "
        "on a CPU",
    )
    environment: Environment
    started: str = Field(description="ISO 8601, UTC")
    seconds: float
