"""What files are fed with when they are timed: the same random inputs, if they take the same."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphcomp.errors import BenchError
from graphcomp.runtime import onnxfile
from graphcomp.runtime.onnxfile import OnnxFile

DTYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "FLOAT16": np.float16,
    "DOUBLE": np.float64,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


def check_inputs(base: OnnxFile, new: OnnxFile) -> None:
    """Both files must take the same inputs; a batch fixed on one side only is for `_macs` to judge."""
    left, right = (
        {item.name: (item.dtype, item.shape[1:], len(item.shape)) for item in file.inputs}
        for file in (base, new)
    )
    if left != right:
        raise mismatch(base, new)


def mismatch(base: OnnxFile, new: OnnxFile) -> BenchError:
    """The error that two files are not of the same task."""
    left, right = (", ".join(map(str, file.inputs)) for file in (base, new))
    return BenchError(
        f"inputs: found {left} in {base.path} and {right} in {new.path}, expected the same names, types and "
        "sizes; compare exports of the same task"
    )


def random_inputs(file: OnnxFile, batch: int, seed: int) -> dict[str, NDArray[Any]]:
    """Standard normal floats, and zeros and ones for other types, which are valid indices and masks."""
    rng = np.random.default_rng(seed)
    shapes = onnxfile.feed_shapes(file.inputs, batch, str(file.path))
    feeds: dict[str, NDArray[Any]] = {}
    for item in file.inputs:
        if item.dtype not in DTYPES:
            raise BenchError(
                f"{file.path}: input {item} cannot be generated, expected one of {', '.join(DTYPES)}"
            )
        dtype, shape = DTYPES[item.dtype], shapes[item.name]
        real = np.issubdtype(dtype, np.floating)
        feeds[item.name] = (rng.standard_normal(shape) if real else rng.integers(2, size=shape)).astype(dtype)
    return feeds
