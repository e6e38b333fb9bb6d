"""onnx2torch and onnxsim on one ONNX file after another: paths come in, a line of JSON each goes out.

Run by `onnx_in.py`, in the venv that has them (`onnx_in.py --create`). Of onnx2torch's module: whether it is
what the file computes, for two samples in one batch and each alone, and how many channels may be removed from
it. Of onnxsim's structured pruning: the weights that are left at half, and whether ONNX Runtime runs that.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the venv does not have graphcomp installed

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
import torch  # noqa: E402
from onnx_nhwc import weights  # noqa: E402
from rows import Row  # noqa: E402

import graphcomp  # noqa: E402
from graphcomp.errors import GraphcompError, first_line  # noqa: E402

PACKAGES = ("onnx2torch==1.5.15", "onnxsim==0.8.1")
TOLERANCE = 1e-3


class Others:
    """The process that has them."""

    def __init__(self, venv: Path) -> None:
        python = venv / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{python}: not found; create it with --create")
        self.command = [str(python), str(Path(__file__).resolve())]
        self.process: subprocess.Popen[str] | None = None

    def of(self, file: Path, prune: bool) -> Row:
        """What they make of a file; a crash of theirs is a result, too."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(file), prune]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"onnx2torch": f"ended with {self.process.wait()}"}


def onnx2torch(file: Path) -> Row:
    """Whether its module is the file."""
    from onnx2torch import convert  # type: ignore[import-not-found] # only in its own venv

    module = convert(str(file)).eval()
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    x = torch.randn(2, *given.shape[1:], generator=torch.Generator().manual_seed(3))
    for part in (x, *x.split(1)):
        with torch.inference_mode():
            made = module(part)
        ours = [y.numpy() for y in (made if isinstance(made, list | tuple) else [made])]
        for mine, theirs in zip(ours, session.run(None, {given.name: part.numpy()}), strict=True):
            error = float(np.abs(mine - theirs).max() / max(np.abs(theirs).max(), 1e-6))
            if not error <= TOLERANCE:
                return {"onnx2torch": f"wrong: {error:.0e} at batch {len(part)}"}
    try:
        groups = graphcomp.analyse(graphcomp.trace(module, x[:1])).removable
    except GraphcompError as error:
        return {"onnx2torch": "equal", "not traced": first_line(error)[:200]}
    return {"onnx2torch": "equal", "their_removable": sum(len(g.channels) for g in groups)}


def onnxsim(file: Path) -> Row:
    """What its structured pruning leaves."""
    from onnxsim import apply_structured_pruning  # type: ignore[import-not-found] # only in its own venv

    model = onnx.load(file)
    clock = time.process_time()
    cut = apply_structured_pruning(model, 0.5)
    row: Row = {"their_s": time.process_time() - clock, "their_left": weights(cut) / weights(model)}
    session = ort.InferenceSession(cut.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    session.run(None, {given.name: np.zeros([2, *given.shape[1:]], np.float32)})
    return row | {"onnxsim": "runs"}


def _tried(name: str, made: Callable[[], Row]) -> Row:
    """Other people's code, which raises whatever it likes."""
    try:
        return made()
    except Exception as error:
        return {name: f"{type(error).__name__}: {first_line(error)[:160]}"}


def main() -> None:
    """Until there are no more files."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    said: Any = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what they print is no result
    for line in sys.stdin:
        path, prune = json.loads(line)
        file = Path(path)
        row = _tried("onnx2torch", lambda file=file: onnx2torch(file))
        if prune:
            row |= _tried("onnxsim", lambda file=file: onnxsim(file))
        print(json.dumps(row), file=said, flush=True)


if __name__ == "__main__":
    main()
