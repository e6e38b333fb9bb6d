"""One row an operator, both ways side by side: `@reads` makes nodes of torch, `@writes` nodes of ONNX."""

from graphcomp.onnx.rows import (
    activations,
    arithmetic,
    attention,
    comparisons,
    convolutions,
    matrices,
    movement,
    normalisations,
    parts,
    pools,
    recurrent,
    reductions,
    resizing,
    sampling,
    scattering,
    shapes,
)
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import ORIGIN_KEY, VALUE_KEY, Reading
from graphcomp.onnx.rows.registry import READS, WRITES
from graphcomp.onnx.rows.values import Array, Known, Made, Value
from graphcomp.onnx.rows.wires import DTYPES, NoRow, Op, Size, Wire, identity
from graphcomp.onnx.rows.writing import Writing

FAMILIES = (
    activations,
    arithmetic,
    attention,
    comparisons,
    convolutions,
    matrices,
    movement,
    normalisations,
    parts,
    pools,
    recurrent,
    reductions,
    resizing,
    sampling,
    scattering,
    shapes,
)
"""The files that hold the rows."""

__all__ = [
    "Array",
    "DTYPES",
    "FAMILIES",
    "Known",
    "Made",
    "NoRow",
    "Node",
    "ORIGIN_KEY",
    "Op",
    "READS",
    "Reading",
    "Size",
    "VALUE_KEY",
    "Value",
    "WRITES",
    "Wire",
    "Writing",
    "identity",
]
