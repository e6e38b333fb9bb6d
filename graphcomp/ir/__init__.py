"""What a program is: a traced network as a value, its operators, its text, its files."""

from graphcomp.ir.applying import apply
from graphcomp.ir.arguments import plain_argument
from graphcomp.ir.batch import Batch, in_type, moved
from graphcomp.ir.coefficients import (
    LAYERS,
    Basis,
    DctConv2d,
    DctLayer,
    DctLinear,
    compressed,
    decode,
    encode,
    narrowest,
    spectrum,
)
from graphcomp.ir.concrete import Unknown, values_of
from graphcomp.ir.frozen import FrozenBatchNorm2d
from graphcomp.ir.hooks import is_hooked
from graphcomp.ir.inputs import fresh_inputs, input_names, numbers_of
from graphcomp.ir.interface import Interface, Port, Value
from graphcomp.ir.lifting import bound_arguments, form_of
from graphcomp.ir.masked import MASKS, masked_norm, masked_spread
from graphcomp.ir.meta import run_on_meta
from graphcomp.ir.operators import CASTS, MODULE_NAMES, function_name
from graphcomp.ir.program import (
    PASS_KEY,
    Program,
    acts_in_place,
    assemble,
    copy_graph,
    editable,
    eliminate_dead_nodes,
    evaluating,
    graph_module,
    is_read_later,
    is_same,
    named_tensors,
    output_tensors,
    parts,
    same_memory,
    with_tensors,
)
from graphcomp.ir.ranges import Numbers
from graphcomp.ir.recurrent import GruLayer, LstmLayer, RecurrentLayer
from graphcomp.ir.region import WHOLE, Region
from graphcomp.ir.saved.storage import load, save, without_inputs
from graphcomp.ir.shapes import Shape
from graphcomp.ir.soundness import damaged, negative_variances
from graphcomp.ir.text import describe, describe_module, op_name
from graphcomp.ir.tracing import trace

__all__ = [
    "Basis",
    "Batch",
    "CASTS",
    "DctConv2d",
    "DctLayer",
    "DctLinear",
    "FrozenBatchNorm2d",
    "GruLayer",
    "Interface",
    "LAYERS",
    "LstmLayer",
    "MASKS",
    "MODULE_NAMES",
    "Numbers",
    "PASS_KEY",
    "Port",
    "Program",
    "RecurrentLayer",
    "Region",
    "Shape",
    "Value",
    "Unknown",
    "WHOLE",
    "acts_in_place",
    "apply",
    "assemble",
    "bound_arguments",
    "compressed",
    "copy_graph",
    "damaged",
    "decode",
    "describe",
    "describe_module",
    "editable",
    "eliminate_dead_nodes",
    "encode",
    "evaluating",
    "form_of",
    "fresh_inputs",
    "function_name",
    "graph_module",
    "in_type",
    "input_names",
    "is_hooked",
    "is_read_later",
    "is_same",
    "load",
    "masked_norm",
    "masked_spread",
    "moved",
    "named_tensors",
    "narrowest",
    "negative_variances",
    "numbers_of",
    "op_name",
    "output_tensors",
    "parts",
    "plain_argument",
    "run_on_meta",
    "same_memory",
    "save",
    "spectrum",
    "trace",
    "values_of",
    "with_tensors",
    "without_inputs",
]
