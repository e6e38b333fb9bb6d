"""What a run writes, as data: reports, plans, timings, explanations."""

from graphcomp.records.explanation import (
    ExplainedRow,
    Explanation,
    Gather,
    GatherForm,
    Part,
    PartKind,
    TracedFile,
)
from graphcomp.records.passes import (
    Drift,
    EpochRow,
    Fit,
    FittedLayer,
    LeftAlone,
    ModeTrial,
    Plan,
    Spectrum,
    Step,
    Training,
    Width,
)
from graphcomp.records.program import LayerRow, Score, Snapshot
from graphcomp.records.quantized import GivenBack, Quantized, QuantizedChoice, QuantizedLayer
from graphcomp.records.record import Record
from graphcomp.records.report import (
    CorruptedScore,
    DctWeights,
    Evaluation,
    Export,
    HalfWeights,
    Report,
    Robustness,
)
from graphcomp.records.timing import BatchTiming, Bench, Environment, Interval, ModelFile, TimingStats

__all__ = [
    "BatchTiming",
    "Bench",
    "CorruptedScore",
    "DctWeights",
    "Drift",
    "Environment",
    "EpochRow",
    "Evaluation",
    "ExplainedRow",
    "Explanation",
    "Export",
    "Fit",
    "FittedLayer",
    "Gather",
    "GatherForm",
    "GivenBack",
    "HalfWeights",
    "Interval",
    "LayerRow",
    "LeftAlone",
    "ModeTrial",
    "ModelFile",
    "Part",
    "PartKind",
    "Plan",
    "Quantized",
    "QuantizedChoice",
    "QuantizedLayer",
    "Record",
    "Report",
    "Robustness",
    "Score",
    "Snapshot",
    "Spectrum",
    "Step",
    "TimingStats",
    "TracedFile",
    "Training",
    "Width",
]
