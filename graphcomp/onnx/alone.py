"""Every row alone: what a node makes of the runtime's own values, beside what the runtime makes of them.

Where a network amplifies rounding its outputs say little. Here nothing can add up: the file is run with all
of its values as outputs, and a node of the program is given these, whatever the nodes before it yielded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, helper
from torch import Tensor, fx

from graphcomp.errors import BenchError
from graphcomp.ir import Program, output_tensors
from graphcomp.onnx import storage
from graphcomp.onnx.agreement import disagreement
from graphcomp.runtime import open_session, run_errors


def apart(
    program: Program,
    nodes: Mapping[fx.Node, str],
    model: ModelProto,
    feed: dict[str, NDArray[Any]],
    samples: Sequence[Tensor],
    most: float,
) -> str | None:
    """The first node or output that differs from the file by more than `most`, and by how much; None if none.

    Args:
        program: that was read from the model, or written as it.
        nodes: of the program, and what their values are called in the file.
        model: the whole file.
        feed, samples: the same inputs, for the runtime and for the program.
        most: a disagreement (see `onnx.agreement`).
    """
    outputs = [o.name for o in model.graph.output]
    theirs = _values(model, [*dict.fromkeys([*nodes.values(), *outputs])], feed)
    if theirs is None:
        return "the file's values cannot be had"
    judge = _Judge(program, nodes, theirs, most)
    # What an operator of torch raises at these values raises at the program's own, too.
    with torch.inference_mode():
        found = output_tensors(judge.run(*(x.clone() for x in samples)))
    # Whatever lies behind the last value that has a name.
    for name, value in zip(outputs, found, strict=True):
        judge.judge("output", value, name)
    return judge.found


class _Judge(fx.Interpreter):
    """Runs the program; every node that is a value of the file hands on the file's."""

    def __init__(
        self, program: Program, names: Mapping[fx.Node, str], theirs: dict[str, NDArray[Any]], most: float
    ) -> None:
        super().__init__(program.module)
        self.names, self.theirs, self.most = names, theirs, most
        self.found: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = self.names.get(n)
        return value if name is None else self.judge(n.name, value, name)

    def judge(self, place: str, value: Any, name: str) -> Any:
        """The file's value of this name in the place of ours, which is compared with it."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        theirs, ours = self.theirs[name], value.numpy()
        if ours.shape != theirs.shape:
            self.found = self.found or f"{place}: shape {ours.shape} of {theirs.shape}"
            return value
        finite = np.isfinite(theirs)
        error = disagreement(ours[finite], theirs[finite], self.most)
        same = np.array_equal(ours[~finite], theirs[~finite].astype(ours.dtype), equal_nan=True)
        if not same or not error <= self.most:
            self.found = self.found or f"{place}: {error:.3g} from {name!r:.120}"
        return torch.from_numpy(np.array(theirs, ours.dtype))


def _values(
    model: ModelProto, names: Sequence[str], feed: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]] | None:
    """What the runtime computes on the way; None where it does not tell."""
    known = {*(o.name for o in model.graph.output), *(i.name for i in model.graph.input)}
    if model.ByteSize() > storage.MOST_BYTES:
        return None
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in known)
    try:
        session = open_session(copy.SerializeToString(), "cpu", torch.get_num_threads()).session
        asked = [n for n in names if n not in feed]
        found = dict(zip(asked, session.run(asked, feed), strict=True))
    except BenchError:
        return None
    except run_errors():
        return None
    return {**{n: np.asarray(x) for n, x in feed.items()}, **{n: np.asarray(x) for n, x in found.items()}}
