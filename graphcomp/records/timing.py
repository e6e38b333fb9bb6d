"""How long two files take, and where that was measured."""

from pathlib import PurePath, PurePosixPath
from typing import Literal

from pydantic import Field

from graphcomp.records.record import Record


class Interval(Record):
    """An estimate with its bootstrap 95 % interval."""

    value: float = Field(description="the estimate")
    low: float = Field(description="lower end")
    high: float = Field(description="upper end")


class TimingStats(Record):
    """Times of one model at one batch size."""

    runs: int = Field(description="how many were timed, warm-up left out")
    first_ms: float = Field(description="the first inference after loading, not part of the other columns")
    median_ms: float = Field(description="wall time of a whole batch")
    p90_ms: float = Field(description="90th percentile")
    p99_ms: float = Field(description="99th percentile")
    cpu_median_ms: float = Field(
        description="CPU time per run: the calling thread's at one thread, otherwise the whole process's"
    )
    end_to_end_median_ms: float | None = Field(
        default=None, description="with host copies; accelerators only"
    )


class BatchTiming(Record):
    """Baseline against candidate at one batch size, interleaved in one process."""

    batch: int = Field(description="samples in a run")
    base: TimingStats = Field(description="the baseline")
    new: TimingStats = Field(description="the candidate")
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

    path: str = Field(description="as it was given; of a run or a study, from the output directory on")
    sha256: str = Field(description="of the file, in hex")
    bytes: int = Field(description="size of the file")
    macs: int = Field(description="for one sample")
    load_seconds: float = Field(description="to open the session")
    load_cpu_seconds: float | None = Field(
        default=None, description="CPU time to open the session, of the whole process"
    )
    nodes_per_provider: dict[str, int] = Field(description="how many nodes each execution provider runs")
    memcpy_nodes: int = Field(default=0, description="copies between host and device inside the graph")


class Environment(Record):
    """Where numbers were taken."""

    python: str = Field(description="version")
    platform: str = Field(description="operating system")
    cpu: str = Field(description="name of the processor")
    isa: str = Field(description="widest vector instructions, e.g. avx2")
    cores: int = Field(description="usable by the process")
    versions: dict[str, str] = Field(description="package to version")


class Bench(Record):
    """Result of `graphcomp bench`."""

    schema_version: Literal[1] = Field(default=1, description="raised as the report's is")
    provider: str = Field(description="execution provider, e.g. cpu")
    provider_options: dict[str, str] = Field(description="as given to the runtime")
    precision: str = Field(
        default="fp32", description="arithmetic that a GPU was told to use: fp32, fp16 or bf16"
    )
    threads: int = Field(description="intra-op threads")
    tf32: bool | None = Field(default=None, description="TF32 state on CUDA; null on the CPU")
    base: ModelFile = Field(description="the baseline")
    new: ModelFile = Field(description="the candidate")
    batches: list[BatchTiming] = Field(description="one for each batch size")
    environment: Environment = Field(description="where the times were taken")

    @property
    def runtime(self) -> str:
        """`openvino`, `cuda in fp16`."""
        return self.provider if self.precision == "fp32" else f"{self.provider} in {self.precision}"

    def moved(self, folder: str) -> "Bench":
        """The same files, in another folder."""
        base, new = (
            file.model_copy(update={"path": str(PurePosixPath(folder, PurePath(file.path).name))})
            for file in (self.base, self.new)
        )
        return self.model_copy(update={"base": base, "new": new})
