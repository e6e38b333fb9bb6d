"""Why a result is not as much faster as it is smaller."""

from typing import Literal

from pydantic import Field

from graphcomp.records.record import Record
from graphcomp.records.timing import Bench, Interval

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

    kind: PartKind = Field(
        description="`mix`, `padding`, `kernel`, `fusion`, `layout`, `intensity` or `host`"
    )
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
    new_form: str = Field(description="the same")
    made_by: str | None = Field(description="the pass that made or last changed it; null if none did")
    base_ms: float = Field(description="of all of its operators in the baseline")
    new_ms: float = Field(description="in the candidate")
    theory_ms: float = Field(description="base_ms by the ratio of MACs, of elements where there are none")
    base_macs: int = Field(description="that the network asks for, of a whole batch")
    new_macs: int = Field(description="the same")
    base_computed: int = Field(description="MACs that are carried out, whole blocks included")
    new_computed: int = Field(description="the same")
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

    schema_version: Literal[1] = Field(default=1, description="raised as the report's is")
    provider: str = Field(description="execution provider, e.g. cpu")
    threads: int = Field(description="intra-op threads")
    batch: int = Field(description="samples a run")
    clock: Literal["wall", "CPU"] = Field(description="CPU where the machine was busy")
    theoretical: float = Field(description="MACs of the baseline / MACs of the candidate")
    speedup: Interval = Field(description="as measured")
    theory_ms: float = Field(description="what the MACs promised: the baseline's time / theoretical")
    gap: Interval = Field(description="milliseconds that the candidate takes beyond that")
    base: TracedFile = Field(description="the baseline")
    new: TracedFile = Field(description="the candidate")
    parts: list[Part] = Field(description="they sum to the gap")
    rows: list[ExplainedRow] = Field(description="in the order of the candidate's graph")
    gathers: list[Gather] = Field(
        default_factory=list, description="that passes left in the candidate; known of a compilation only"
    )
    bench: Bench | None = Field(
        default=None, description="what `speedup` was taken from; null in a report, which has it"
    )
