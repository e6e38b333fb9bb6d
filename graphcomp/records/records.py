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


class MeanError(Record):
    """Mean absolute error on evaluation data whose labels are values (regression)."""

    mae: float = Field(description="mean over samples of the mean |output - label| over a sample's values")
    samples: int
    low: float = Field(description="lower end of the 95 % interval of the mean (normal)")
    high: float = Field(description="upper end of the 95 % interval of the mean (normal)")


class Snapshot(Record):
    """What one program costs and how good it is."""

    params_trainable: int
    params_state: int = Field(description="trainable + frozen parameters and all buffers")
    params_order: int = Field(
        default=0, description="of those, integers that say where rebuilt weights belong; never trained"
    )
    macs: int = Field(description="multiply-accumulates for one sample")
    accuracy: Accuracy | None = None
    error: MeanError | None = Field(default=None, description="in place of accuracy where labels are values")
    layers: list[LayerRow] = Field(default_factory=list)


class Drift(Record):
    """How far a lossy step moved the outputs, on the calibration batches."""

    relative_l2: float = Field(description="||new - old|| / ||old|| of the outputs")
    top1_agreement: float | None = Field(
        description="fraction of samples with the same argmax; null if not a classifier"
    )


class LeftAlone(Record):
    """Something a pass left alone, and why."""

    where: str = Field(description="node or module path")
    reason: str


class Width(Record):
    """What was decided for one channel group; `evidence["groups"]` of a removal's plan is a list of them."""

    group: str = Field(description="the layer that the group is named after")
    channels: int = Field(description="before the pass")
    share: float | None = Field(
        description="what part (of the channels, of the energy, …) was to be preserved; null if the "
        "criterion has a rule of its own"
    )
    wanted: int = Field(description="channels that preserve it, before rounding")
    kept: int = Field(description="channels after the pass")


class Spectrum(Width):
    """A channel group's decision with the spectrum of its responses' covariance (`pfa`)."""

    eigenvalues: list[float] = Field(
        description="of the responses' covariance, largest first, normalised to sum 1 (all 0 if nothing "
        "varies), six significant digits"
    )
    samples: int = Field(description="that the covariance was estimated from")
    dead: int = Field(description="channels whose responses do not vary")
    statistics: list[str] = Field(description="nodes whose outputs were analysed")


class ModeTrial(Record):
    """One kind of arithmetic that a network could be trained with."""

    precision: str = Field(description="float32 (the program's own type) or bf16 (autocast)")
    layout: str = Field(description="of images in memory: contiguous or channels_last")
    ms: float | None = Field(
        description="a step's CPU time, on a GPU its wall time; null if it does not run here"
    )


class EpochRow(Record):
    """One epoch of a training; number 0 is the program as it came."""

    epoch: int
    steps: int = Field(description="of the optimiser, from the beginning")
    rate: float | None = Field(description="learning rate of the last step; null for number 0")
    loss: float | None = Field(description="mean over the epoch's samples as it trained; null for number 0")
    held_out: float | None = Field(
        description="score on held-out training data: top-1 accuracy, or minus the mean absolute error where "
        "labels are values; null if there is none"
    )
    samples: int
    seconds: float = Field(description="of the steps alone")


class Training(Record):
    """How a program was trained."""

    samples: int
    held_out_samples: int = Field(description="of the training data, to choose the best epoch by")
    batch: int = Field(description="samples a step at most, over all processes")
    processes: int
    device: str
    precision: str
    layout: str
    trials: list[ModeTrial] = Field(description="what the choice of precision and layout was made from")
    epochs: list[EpochRow]
    kept_epoch: int
    bn_samples: int = Field(description="that normalisation statistics were estimated from at the end")
    held_out: float | None = Field(description="score of the result on held-out training data")
    samples_per_second: float | None = Field(description="in the steps; null if there was none")
    seconds: float = Field(description="of the steps alone")
    resumed: int = Field(description="how often the training went on after an interruption")
    teacher: str | None = Field(
        default=None, description="which program it learned from: a step of the run, or a directory"
    )

    @property
    def summary(self) -> str:
        """One line."""
        last = self.epochs[-1]
        kept = f"trained {last.steps} steps, kept epoch {self.kept_epoch} of {last.epoch}"
        parts = [kept] if last.epoch else []
        parts += [f"learned from {self.teacher}"] if self.teacher else []
        parts += [f"statistics from {self.bn_samples} samples"] if self.bn_samples else []
        if self.held_out is not None and self.epochs[0].held_out is not None:
            parts.append(f"held-out score {self.epochs[0].held_out:.4f} -> {self.held_out:.4f}")
        return "; ".join(parts)


class Round(Record):
    """One inner step of a pass that goes over several rounds; number 0 is the program as it came."""

    number: int
    name: str = Field(description="of the inner pass; `start` for number 0")
    summary: str = Field(description="one line: what the round did")
    accuracy: Accuracy | None = Field(description="on held-out training samples")
    params_trainable: int
    macs: int = Field(description="multiply-accumulates for one sample")
    removed: dict[str, int] = Field(
        default_factory=dict, description="layer -> output channels that this round removed"
    )
    kept: bool = Field(
        description="whether the pass's result has it behind it; rounds that do not were undone"
    )
    verify_error: float = 0.0
    evidence: dict[str, Any] = Field(default_factory=dict, description="why it was decided so")
    training: Training | None = None
    seconds: float = 0.0


class Step(Record):
    """One pass of the pipeline."""

    index: int
    name: str
    options: dict[str, Any]
    summary: str = Field(description="one line: what the pass did")
    plan_file: str = Field(description="path of the plan, relative to the output directory")
    kept: list[LeftAlone] = Field(default_factory=list)
    drift: Drift | None = Field(description="null for a pass that changes no value")
    verify_error: float = Field(
        description="max |rewrite - simulate| / max |simulate|, float64, scrambled statistics"
    )
    seconds: float
    evidence: dict[str, Any] = Field(
        default_factory=dict, description="why the pass decided so, as its method puts it; see the plan"
    )
    training: Training | None = Field(default=None, description="null for a pass that does not train")
    rounds: list[Round] = Field(
        default_factory=list, description="of a pass that goes over several; empty for the others"
    )
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

    @property
    def quoted(self) -> Interval:
        """The speedup to quote: wall time, or CPU time where the machine was busy."""
        return self.cpu_speedup if self.busy else self.speedup

    @property
    def quoted_ms(self) -> tuple[float, float]:
        """Median times of baseline and candidate by the same clock."""
        base, new = (s.cpu_median_ms if self.busy else s.median_ms for s in (self.base, self.new))
        return base, new


class ModelFile(Record):
    """An ONNX file that was timed."""

    path: str
    sha256: str
    bytes: int
    macs: int = Field(description="for one sample")
    load_seconds: float
    load_cpu_seconds: float | None = Field(
        default=None, description="CPU time to open the session, of the whole process"
    )
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


PartKind = Literal["mix", "padding", "kernel", "fusion", "layout", "intensity", "host"]
"""What the gap between theory and practice consists of; `explanation.explanation` defines each."""


class TracedFile(Record):
    """One file's time: as it was timed, and as the runtime's trace of other runs accounts for it."""

    measured_ms: float = Field(description="median of the benchmark, which no trace was written in")
    operators_ms: float = Field(description="sum over the operators of the trace, less what tracing costs")
    trace_cost_ms: float = Field(description="what was taken off the time of every operator for being traced")
    traced_run_ms: float = Field(description="a whole run while the trace was written")
    runs: int = Field(description="that were traced")
    operators: int = Field(description="of the runtime's graph, fused ones counted once")
    busy: bool = Field(description="something else had the processor while the trace was written")


class Part(Record):
    """One reason for the gap, summed over the network."""

    kind: PartKind
    ms: float = Field(description="above 0: slower than theory")
    by_pass: dict[str, float] = Field(
        description="milliseconds by the pass that made it so; under an empty name where none did"
    )


class ExplainedRow(Record):
    """One layer, or one operator between layers, of both files."""

    layer: str = Field(
        description="module path of the convolution or linear layer, for other operators of the one in front"
    )
    base_operators: list[str] = Field(description="of the runtime; empty for what the original does not have")
    new_operators: list[str] = Field(
        description="of the runtime (Select: picks channels); empty for what is gone"
    )
    base_form: str = Field(description="blocked, plain, tensor cores or CUDA cores; empty if there is none")
    new_form: str
    made_by: str | None = Field(description="the pass that made or last changed it; null if none did")
    base_ms: float
    new_ms: float
    theory_ms: float = Field(description="base_ms by the ratio of MACs, of elements where there are none")
    base_macs: int = Field(description="that the network asks for, of a whole batch")
    new_macs: int
    base_computed: int = Field(description="MACs that are carried out, whole blocks included")
    new_computed: int
    parts: dict[PartKind, float] = Field(description="milliseconds; they sum to new_ms - theory_ms")


GatherForm = Literal["gather", "convolution", "merged"]
"""How an exported file picks channels; `explanation.gathers` defines each."""


class Gather(Record):
    """Channels that a pass has picked out of a tensor, since others need more of it, and what that costs."""

    node: str = Field(description="the fx node, an index_select")
    readers: list[str] = Field(description="module paths of layers, names of other nodes")
    made_by: str = Field(description="the pass that left it")
    channels: int = Field(description="that are picked")
    of: int = Field(description="so many")
    form: GatherForm = Field(
        description="in the file: an operator, a 1x1 convolution, or merged into weights"
    )
    ms: float | None = Field(description="of the operator that picks, in the trace; null if there is none")
    layout_ms: float | None = Field(description="of the reorders that it brings")
    share: float | None = Field(description="of the network's time, that both take")


class Explanation(Record):
    """Result of `graphcomp explain`: theory against practice at one batch size."""

    schema_version: Literal[1] = 1
    provider: str
    threads: int
    batch: int
    clock: Literal["wall", "CPU"] = Field(description="CPU where the machine was busy")
    theoretical: float = Field(description="MACs of the baseline / MACs of the candidate")
    speedup: Interval = Field(description="as measured")
    theory_ms: float = Field(description="what the MACs promised: the baseline's time / theoretical")
    gap: Interval = Field(description="milliseconds that the candidate takes beyond that")
    base: TracedFile
    new: TracedFile
    parts: list[Part] = Field(description="they sum to the gap")
    rows: list[ExplainedRow] = Field(description="in the order of the candidate's graph")
    gathers: list[Gather] = Field(
        default_factory=list, description="that passes left in the candidate; known of a compilation only"
    )
    bench: Bench | None = Field(
        default=None, description="what `speedup` was taken from; null in a report, which has it"
    )


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
