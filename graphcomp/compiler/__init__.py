"""From a model and a recipe to a directory that can be deployed, checked and resumed."""

from graphcomp.compiler.compiler import Compiled, build, compile_program, evaluate_source
from graphcomp.compiler.models import is_program_dir
from graphcomp.compiler.reading import read_value, read_yaml
from graphcomp.compiler.recipe import (
    BenchOptions,
    PassTable,
    Recipe,
    RobustnessOptions,
    allows_nothing,
    load_recipe,
    make_passes,
    parse_passes,
    validated,
)
from graphcomp.compiler.source import InputShape, Job, data_of, digests, load_source, open_data

__all__ = [
    "BenchOptions",
    "Compiled",
    "InputShape",
    "Job",
    "PassTable",
    "Recipe",
    "RobustnessOptions",
    "allows_nothing",
    "build",
    "compile_program",
    "data_of",
    "digests",
    "evaluate_source",
    "is_program_dir",
    "load_recipe",
    "load_source",
    "make_passes",
    "open_data",
    "parse_passes",
    "read_value",
    "read_yaml",
    "validated",
]
