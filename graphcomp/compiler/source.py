"""What a run starts from: a model with its weights, and the data that belong to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphcomp.compiler.classes import restrict_head
from graphcomp.compiler.examples import check_memory, examples_for
from graphcomp.compiler.models import is_onnx, is_program_dir, load_model, load_weights
from graphcomp.compiler.recipe import Recipe
from graphcomp.data import Data, load_data
from graphcomp.errors import LoadError
from graphcomp.ir import WHOLE, Program, Region, load, trace
from graphcomp.measure import count_outputs, require_classes
from graphcomp.onnx import read_onnx
from graphcomp.pipeline import Pass, verify

InputShape = tuple[int, ...] | Mapping[str, tuple[int, ...]] | None
"""With the batch, e.g. (1, 3, 224, 224): of the only input, or of inputs by name ("" is the only one)."""


@dataclass(frozen=True)
class Job:
    """Everything that decides what a run computes.

    Attributes:
        model: `torchvision:NAME`, `models:NAME`, `file.py:factory`, `file.onnx` or a saved program directory.
        recipe: data, target, seed, export and benchmark options.
        passes: made from the recipe.
        weights: file of weights, None for those that come with the model (if any).
        input_shape: see `InputShape`; None for the model's own.
    """

    model: str
    recipe: Recipe
    passes: Sequence[Pass]
    weights: Path | None = None
    input_shape: InputShape = None


@dataclass(frozen=True)
class Source:
    """A model that was loaded.

    Attributes:
        program: the network.
        weights: the file that its weights came from, if they came from one.
        data: spec of data that belongs to it.
        remarks: what has to be said about its weights, wherever results are shown.
        trained: False if its weights are known to be random.
    """

    program: Program
    weights: Path | None
    data: str | None
    remarks: tuple[str, ...] = ()
    trained: bool = True


def load_source(
    model: str,
    weights: Path | None = None,
    input_shape: InputShape = None,
    region: Region = WHOLE,
    arguments: Mapping[str, Any] | None = None,
    *,
    rounding: bool = True,
) -> Source:
    """Load and trace a model, or a part of it, or read it from an ONNX file.

    For ONNX files, and `rounding`, see `onnx.read_onnx`; for `region` and `arguments`, see `ir.trace`.

    Raises:
        LoadError: unknown model, unreadable or unfitting weights, NaN weights, no input shape.
        TraceError: a model that cannot be traced, or an input shape that it does not take.
        VerifyError: weights that no result could be exported with, naming the tensor.
    """
    if arguments and is_program_dir(model):
        raise LoadError(
            f"{model}: found values for {', '.join(arguments):.100}, expected a network with its own code: "
            "a program has taken all of its decisions; leave --input (`arguments:` in a recipe) out"
        )
    if region and (is_program_dir(model) or is_onnx(model)):
        raise LoadError(
            f"{model}: found a part asked for ({region}), expected a module that is called: a file has no "
            "modules; leave start and until out"
        )
    if is_program_dir(model):
        program = load(model)
        if weights is not None or input_shape is not None:
            raise LoadError(
                f"{model}: found a saved program with --weights or --input-shape, expected neither"
            )
        return _checked(Source(program, None, None))
    shapes = {"": input_shape} if isinstance(input_shape, tuple) else dict(input_shape or {})
    for given in shapes.values():
        check_memory(given)
    if is_onnx(model):
        return _checked(_from_onnx(model, weights, shapes, arguments or {}, rounding))
    loaded = load_model(model)
    weights = weights or loaded.default_weights
    said = load_weights(loaded.module, weights) if weights is not None else loaded.untrained
    program = trace(
        loaded.module,
        examples_for(loaded, model, shapes, arguments or {}),
        copy_weights=False,
        start=region.start,
        until=region.until,
        arguments=arguments,
    )
    untrained = weights is None and loaded.untrained is not None
    return _checked(Source(program, weights, loaded.default_data, (said,) if said else (), not untrained))


def _from_onnx(
    model: str,
    weights: Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    inputs: Mapping[str, Any],
    rounding: bool,
) -> Source:
    if weights is not None:
        raise LoadError(f"{model}: found an ONNX file with --weights, expected none; the file holds its own")
    program = read_onnx(model, shapes, inputs=inputs, rounding=rounding)
    told = program.interface
    said = f"the network was read from {model}, which {told.producer or 'something unnamed'} wrote"
    opset = f" with opset {told.opset}" if told.opset else ""
    return Source(program, None, None, (said + opset,))


def data_of(job: Job, source: Source) -> tuple[str, Data, tuple[int, ...] | None]:
    """The spec of a job's data, the data and their ids: of the recipe's classes only, if it names some.

    Raises:
        DataError: see `open_data`, `Data.ids_of` and `Data.only`.
    """
    spec = job.recipe.data or source.data or "random"
    data = open_data(spec, source.program, job.recipe.seed)
    if job.recipe.classes is None:
        return spec, data, None
    ids = data.ids_of(job.recipe.classes)
    return spec, data.only(ids), ids


def digests(data: Data) -> dict[str, str]:
    """Hashes of the samples, by which work on them is recognised (`Split.fingerprint`)."""
    return {"train": data.train.fingerprint(), "eval": data.eval.fingerprint()}


def _checked(source: Source) -> Source:
    verify.check(source.program)
    verify.check_outputs(source.program)
    return replace(source, remarks=(*source.remarks, *_how_it_came(source.program)))


def _how_it_came(program: Program) -> tuple[str, ...]:
    """What has to be said of how a program was read or traced."""
    told = program.interface
    if not told.specialised:
        return told.remarks
    sizes = " and ".join("x".join(map(str, x.shape[1:])) for x in program.example_inputs)
    places = ", ".join(told.specialised[:3]) + (", …" if len(told.specialised) > 3 else "")
    return (*told.remarks, f"specialised to inputs of {sizes} by {places}")


def restricted(source: Source, classes: Sequence[int], recipe: Recipe) -> Source:
    """The source with a head for some classes only, as the recipe says."""
    return replace(source, program=restrict_head(source.program, classes, recipe.head, recipe.seed))


def open_data(spec: Any, program: Program, seed: int) -> Data:
    """The data that `spec` names or is, for this program: for its inputs, with as many classes as outputs.

    Raises:
        DataError: see `data.sources`; or a number of classes that is not that of a classifier's outputs.
    """
    outputs = count_outputs(program)
    data = load_data(spec, program=program, seed=seed, outputs=outputs)
    require_classes(program, data)
    return data
