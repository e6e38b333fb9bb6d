"""What ONNX tests its own backends with: every file is read and computes what is expected, or is refused.

As they are, and with all inputs but the first as constants of the file, which makes weights of them.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper

from graphcomp.errors import LoadError
from graphcomp.ir import output_tensors
from graphcomp.onnx import read_onnx
from graphcomp.onnx.reading.given import turn_inputs

Case = tuple[str, Any, Any, Any]

DATA = Path(onnx.backend.test.__file__).parent / "data"
OTHERWISE = {
    "test_resize_downsample_scales_linear_align_corners",
    "test_resize_downsample_scales_cubic_align_corners",
}
"""What ONNX Runtime, with which every file is compared, computes otherwise than ONNX expects."""


def nodes() -> Iterator[Case]:
    """A file for each operator, in all of its ways."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            for inputs, outputs in case.data_sets:
                yield case.name, case.model, inputs, outputs


def weighted() -> Iterator[Case]:
    for name, model, inputs, outputs in nodes():
        if len(inputs) > 1 and all(isinstance(x, np.ndarray) for x in inputs):
            model = ModelProto.FromString(model.SerializeToString())
            held = zip(model.graph.input[1:], inputs[1:], strict=False)
            model.graph.initializer.extend(numpy_helper.from_array(x, v.name) for v, x in held)
            del model.graph.input[1:]
            yield name, model, inputs[:1], outputs


def files() -> Iterator[Case]:
    """Files that PyTorch 0.3 wrote, of operator set 6, and some of several nodes."""
    for folder in ("pytorch-converted", "pytorch-operator", "simple"):
        for path in sorted((DATA / folder).glob("*/model.onnx")):
            for data in sorted(path.parent.glob("test_data_set_*")):
                arrays = {way: _arrays(data, way) for way in ("input", "output")}
                if all(x is not None for found in arrays.values() for x in found):
                    yield path.parent.name, onnx.load(path), arrays["input"], arrays["output"]


def _arrays(folder: Path, way: str) -> list[Any]:
    """None for what is no tensor."""
    found: list[Any] = []
    for index in range(len(list(folder.glob(f"{way}_*.pb")))):
        tensor = TensorProto.FromString((folder / f"{way}_{index}.pb").read_bytes())
        found.append(numpy_helper.to_array(tensor) if tensor.data_type else None)
    return found


def _is_read(path: Path, case: Case) -> bool:
    """Whether a file is read; AssertionError if it then computes something else."""
    _, model, inputs, expected = case
    onnx.save(model, path)
    stored = {i.name for i in model.graph.initializer}  # which old files list among the inputs
    names = [v.name for v in model.graph.input if v.name not in stored]
    tensors = [(name, x) for name, x in zip(names, inputs, strict=False) if not isinstance(x, list)]
    shapes = {name: x.shape for name, x in tensors if np.ndim(x)}
    try:
        program = read_onnx(path, shapes)
    except LoadError as error:
        assert "found" in str(error) and "expected" in str(error)
        return False
    given = [torch.from_numpy(np.array(x)) for x in inputs]
    orders = turn_inputs(ModelProto.FromString(model.SerializeToString()))
    given = [x.permute(orders.get(n, (*range(x.ndim),))) for n, x in zip(names, given, strict=True)]
    given = [x.float() if x.is_floating_point() else x for x in given]
    if not all(x.isfinite().all() for x in given if x.is_floating_point()):
        return True  # numbers of float64 that float32 does not have
    with torch.no_grad():
        found = [y.numpy() for y in output_tensors(program(*given))]
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.astype(np.float32) if theirs.dtype.kind == "f" else theirs
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "least"), [(nodes, 485), (weighted, 300), (files, 110)])
def test_is_equal_or_refused_by_name(cases: Any, least: int, tmp_path: Path) -> None:
    read = 0
    for case in cases():
        if case[0] not in OTHERWISE:
            try:
                read += _is_read(tmp_path / "model.onnx", case)
            except Exception as error:
                raise AssertionError(f"{case[0]}: {error}") from error
    assert read >= least
