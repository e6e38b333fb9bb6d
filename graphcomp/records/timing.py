"""How long two files take, and where that was measured."""

from typing import Literal

from pydantic import Field

from graphcomp.records.record import Record


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
