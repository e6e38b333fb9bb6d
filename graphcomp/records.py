"""The records that graphcomp writes: `report.json` is `Report.model_dump_json()`, and its schema is
`Report.model_json_schema()`. Pure data: no torch, no files, no logic beyond ratios.

Units: times in milliseconds unless a name says seconds; sizes in bytes; MACs as METHODS count them
(convolutions, linear layers and matrix products; nothing for bias, normalisation, activation, pooling).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class Record(BaseModel):
    """Base of all records: frozen, an unknown field is an error, NaN and infinity are strings in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerRow(Record):
    """One convolution or linear layer of a program."""

    name: str = Field(description="module path, e.g. layer1.0.conv1")
    kind: str = Field(description="class name, e.g. Conv2d")
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    params: int = Field(description="elements of weight and bias")
    macs: int = Field(description="multiply-accumulates for one sample")


class Accuracy(Record):
    """Top-1 accuracy on the evaluation data."""

    top1: float = Field(description="fraction in [0, 1]")
    samples: int
    low: float = Field(description="lower end of the 95 % Wilson interval")
    high: float = Field(description="upper end of the 95 % Wilson interval")


class Snapshot(Record):
    """What one program costs and how good it is."""

    params_trainable: int
    params_state: int = Field(description="trainable + frozen parameters and all buffers")
    macs: int = Field(description="multiply-accumulates for one sample")
    accuracy: Accuracy | None = None
    layers: list[LayerRow] = Field(default_factory=list)


class Drift(Record):
    """How far a lossy step moved the outputs, on the calibration batches."""

    relative_l2: float = Field(description="||new - old|| / ||old|| of the outputs")
    top1_agreement: float | None = Field(
        description="fraction of samples with the same argmax; null if not a classifier"
    )


class Kept(Record):
    """Something a pass left alone, and why."""

    where: str = Field(description="node or module path")
    reason: str


class Step(Record):
    """One pass of the pipeline."""

    index: int
    name: str
    options: dict[str, Any]
    summary: str = Field(description="one line: what the pass did")
    plan_file: str = Field(description="path of the plan, relative to the output directory")
    kept: list[Kept] = Field(default_factory=list)
    drift: Drift | None = Field(description="null for a pass that changes no value")
    verify_error: float = Field(
        description="max |rewrite - simulate| / max |simulate|, float64, scrambled statistics"
    )
    seconds: float
    after: Snapshot


class Interval(Record):
    """An estimate with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


class TimingStats(Record):
    """Times of one model at one batch size."""

    runs: int
    first_ms: float = Field(description="the first inference after loading, not part of the other columns")
    median_ms: float
    p90_ms: float
    p99_ms: float
    cpu_median_ms: float = Field(
        description="CPU time per run: the calling thread's at one thread, otherwise the whole process's"
    )
    end_to_end_median_ms: float | None = Field(
        default=None, description="with host copies; accelerators only"
    )


class BatchTiming(Record):
    """Baseline against candidate at one batch size, interleaved in one process."""

    batch: int
    base: TimingStats
    new: TimingStats
    speedup: Interval = Field(description="median base time / median new time (wall)")
    cpu_speedup: Interval = Field(description="the same in CPU time")
    theoretical: float = Field(description="MACs of the baseline / MACs of the candidate")
    busy: bool = Field(
        description="wall time exceeded CPU time by more than 10 % at one thread: quote CPU time"
    )
    verdict: str = Field(description="faster, slower, or no measurable difference")


class ModelFile(Record):
    """An ONNX file that was timed."""

    path: str
    sha256: str
    bytes: int
    macs: int = Field(description="for one sample")
    load_seconds: float
    nodes_per_provider: dict[str, int]
    memcpy_nodes: int = 0


class Environment(Record):
    """Where numbers were taken."""

    python: str
    platform: str
    cpu: str
    isa: str
    cores: int
    versions: dict[str, str]


class Bench(Record):
    """Result of `graphcomp bench`."""

    schema_version: Literal[1] = 1
    provider: str
    provider_options: dict[str, str]
    threads: int
    tf32: bool | None = Field(default=None, description="TF32 state on CUDA; null on the CPU")
    base: ModelFile
    new: ModelFile
    batches: list[BatchTiming]
    environment: Environment


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


class Report(Record):
    """Result of `graphcomp compile`."""

    schema_version: Literal[1] = 1
    model: str
    weights: str | None
    data: str
    target: str
    seed: int
    recipe: dict[str, Any]
    baseline: Snapshot
    final: Snapshot
    steps: list[Step]
    export: Export
    baseline_export: Export
    bench: Bench | None
    environment: Environment
    started: str = Field(description="ISO 8601, UTC")
    seconds: float
