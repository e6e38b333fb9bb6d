# ruff: noqa: E501 - a table of flaws
"""Files by attackers end in graphcomp's own error, without memory, time or files of anybody."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto
from onnx.helper import make_node as node

from graphcomp.errors import LoadError
from graphcomp.onnx import read_onnx
from tests.onnx.onnx_files import OPEN, make
from tests.onnx.read_examples import ints, weight

F32 = np.float32
SECONDS = 20.0


def check_refused(model: ModelProto | bytes, tmp_path: Path, match: str = "expected") -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    start = time.process_time()
    with pytest.raises(LoadError, match=match):
        read_onnx(path)
    assert time.process_time() - start < SECONDS  # a bomb would take minutes


def grown(nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> ModelProto:
    """Adds what the nodes compute, `big`, to the input."""
    return make([*nodes, node("Add", ["x", "big"], ["y"])], {"x": (OPEN, 4)}, constants)


BOMBS: dict[str, Callable[[], ModelProto]] = {
    "expand": lambda: grown([node("Expand", ["c", "s"], ["big"])], {"c": F32(1), "s": ints(2**40, 4)}),
    "constant-of-shape": lambda: grown([node("ConstantOfShape", ["s"], ["big"])], {"s": ints(2**20, 2**20, 4)}),
    "range": lambda: grown(
        [node("Range", ["a", "b", "d"], ["big"])], {"a": F32(0), "b": F32(1e30), "d": F32(1e-3)}
    ),
    "tile": lambda: grown([node("Tile", ["c", "s"], ["big"])], {"c": weight(4), "s": ints(2**50)}),
    "outer": lambda: grown([node("Mul", ["a", "b"], ["big"])], {"a": weight(1 << 15, 1), "b": weight(1, 1 << 15)}),
    "doubling": lambda: grown(
        [node("Concat", [f"c{i}"] * 64, [f"c{i + 1}" if i < 9 else "big"], axis=0) for i in range(10)],
        {"c0": weight(4)},
    ),
    "pad": lambda: grown([node("Pad", ["c", "s"], ["big"])], {"c": weight(4), "s": ints(2**50, 0)}),
    "resize": lambda: make(
        [node("Resize", ["x", "", "", "s"], ["y"])], {"x": (OPEN, 3, 8, 8)}, {"s": ints(1, 3, 2**20, 2**20)}
    ),
    "one-hot": lambda: make(
        [node("OneHot", ["x", "d", "v"], ["y"])], {"x": (OPEN, 4)}, {"d": ints(2**40), "v": weight(2)},
        kinds={"x": TensorProto.INT64},
    ),
    "huge-input": lambda: make([node("Relu", ["x"], ["y"])], {"x": (OPEN, 2**31, 2**31)}),
    "huge-kernel": lambda: make([node("MaxPool", ["x"], ["y"], kernel_shape=[2**31, 2])], {"x": (OPEN, 3, 8, 8)}),
    "huge-pads": lambda: make([node("Pad", ["x", "p"], ["y"])], {"x": (OPEN, 3)}, {"p": ints(0, 2**40, 0, 0)}),
    "long-equation": lambda: make([node("Einsum", ["x"], ["y"], equation="__import__('os')")], {"x": (OPEN, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_they_are_built(bomb: str, tmp_path: Path) -> None:
    check_refused(BOMBS[bomb](), tmp_path)


def cut_off() -> ModelProto:
    model = make([node("Conv", ["x", "w"], ["y"])], {"x": (OPEN, 3, 8, 8)}, {"w": weight(4, 3, 3, 3)})
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:100]
    return model


def claims(*dims: int) -> ModelProto:
    """A tensor that is said to be larger than its bytes."""
    model = cut_off()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    return model


def functions(depth: int) -> ModelProto:
    """Each function calls the next ten times."""
    model = make([node("f0", ["x"], ["y"], domain="own")], {"x": (OPEN, 4)})
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    for i in range(depth):
        last = i == depth - 1
        inner = "Relu" if last else f"f{(i + 1)}"
        body = [node(inner, [f"v{k}"], [f"v{k + 1}"], domain="" if last else "own") for k in range(10)]
        sets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("own", 1)]
        model.functions.append(onnx.helper.make_function("own", f"f{i}", ["v0"], ["v10"], body, sets))
    return model


def recursive() -> ModelProto:
    model = functions(1)
    model.functions[0].node[0].CopyFrom(node("f0", ["v0"], ["v1"], domain="own"))
    return model


def nameless() -> ModelProto:
    """A choice of which one result is left out; ONNX Runtime ends the process when it loads it."""
    made = [node("Relu", ["x"], ["a"]), node("Neg", ["x"], ["b"])]
    body = onnx.helper.make_graph(
        made, "body", [], [onnx.helper.make_empty_tensor_value_info(n) for n in "ab"]
    )
    choice = node("If", ["c"], ["y", ""], then_branch=body, else_branch=body)
    return make([choice], {"x": (OPEN, 4)}, {"c": np.array([True])})


INVALID: dict[str, Callable[[], ModelProto | bytes]] = {
    "cycle": lambda: make([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"])], {"x": (OPEN, 4)}),
    "unknown": lambda: make([node("Add", ["x", "nobody"], ["y"])], {"x": (OPEN, 4)}),
    "twice": lambda: make([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], {"x": (OPEN, 4)}),
    "cut-off": cut_off,
    "too-large": lambda: claims(2**40, 3, 3, 3),
    "negative": lambda: claims(-4, 3, 3, 3),
    "overflowing": lambda: claims(2**32, 2**32, 2**32, 2**32),
    "functions": lambda: functions(8),
    "recursive": recursive,
    "empty": lambda: b"",
    "text": lambda: b"version https://git-lfs.github.com/spec/v1\n",
    "zeros": lambda: bytes(1000),
    "no-inputs": lambda: make([node("Relu", ["c"], ["y"])], {}, {"c": weight(4)}),
    "no-opset": lambda: make([node("Relu", ["x"], ["y"])], {"x": (OPEN, 4)}, opset=10**6),
    "old-opset": lambda: make([node("Relu", ["x"], ["y"])], {"x": (OPEN, 4)}, opset=1),
    "text-input": lambda: make([node("Identity", ["x"], ["y"])], {"x": (OPEN, 4)}, kinds={"x": TensorProto.STRING}),
    "integers": lambda: make([node("Conv", ["x", "w"], ["y"])], {"x": (OPEN, 3, 8, 8)}, {"w": np.ones((4, 3, 3, 3), np.int8)}),
    "wrong-kind": lambda: make([node("Flatten", ["x"], ["y"], axis=1.5)], {"x": (OPEN, 3, 8)}),
    "far-axis": lambda: make([node("Softmax", ["x"], ["y"], axis=2**40)], {"x": (OPEN, 3, 8)}),
    "no-groups": lambda: make([node("Conv", ["x", "w"], ["y"], group=0)], {"x": (OPEN, 3, 8, 8)}, {"w": weight(4, 3, 3, 3)}),
    "no-stride": lambda: make([node("Conv", ["x", "w"], ["y"], strides=[0, 0])], {"x": (OPEN, 3, 8, 8)}, {"w": weight(4, 3, 3, 3)}),
    "no-axes": lambda: make([node("Unsqueeze", ["x"], ["y"])], {"x": (OPEN, 4)}),
    "nameless-piece": lambda: make([node("Split", ["x"], ["y", ""], axis=1)], {"x": (OPEN, 4)}, opset=13),
    "nameless-result": nameless,
    "scalar": lambda: make([node("Relu", ["x"], ["y"])], {"x": ()}),
}  # fmt: skip


@pytest.mark.parametrize("flaw", INVALID)
def test_invalid_files_are_refused(flaw: str, tmp_path: Path) -> None:
    check_refused(INVALID[flaw](), tmp_path)


def test_names_are_data(tmp_path: Path) -> None:
    """Whatever a file calls things, they are words in a program, which can be saved."""
    from graphcomp.ir import load, save

    name = "__class__.\"]; import os\n/../'{}\u202e.forward"
    nodes = [
        node("Conv", ["self", name], [f"{name}v"], name=name),
        node("Add", [f"{name}v", "lambda"], ["print"]),
    ]
    model = make(
        nodes, {"self": (OPEN, 3, 8, 8)}, {name: weight(4, 3, 3, 3), "lambda": weight(1, 4, 6, 6)}, ["print"]
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    program = read_onnx(path)
    save(program, tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint() == program.fingerprint()


def samples() -> list[bytes]:
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]), node("Relu", ["a"], ["b"]),
        node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]), node("Shape", ["c"], ["s"]),
        node("Slice", ["s", "zero", "one"], ["n"]), node("Concat", ["n", "rest"], ["t"], axis=0),
        node("Reshape", ["c", "t"], ["r"]), node("Gemm", ["r", "m"], ["y"], transB=1),
    ]  # fmt: skip
    constants = {
        "w": weight(4, 3, 3, 3),
        "zero": ints(0),
        "one": ints(1),
        "rest": ints(-1),
        "m": weight(5, 64),
    }
    resize = [node("Resize", ["x", "", "f"], ["y"], mode="linear")]
    return [
        make(nodes, {"x": (OPEN, 3, 8, 8)}, constants).SerializeToString(),
        make(nodes, {"x": (1, 3, 8, 8)}, constants).SerializeToString(),
        make(resize, {"x": (OPEN, 3, 8, 8)}, {"f": np.array([1, 1, 2, 1.5], F32)}).SerializeToString(),
    ]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes of it changed, taken out or repeated."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 2:
            del data[at : at + rng.randint(1, 4)]
        else:
            data[at:at] = data[at : at + rng.randint(1, 8)]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_mutated_files_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    rng, path = random.Random(seed), tmp_path / "model.onnx"
    outcomes = {True: 0, False: 0}
    for index in range(120):
        sample = samples()[index % 3]
        # Structure lies before and behind the weights; these are most of the bytes.
        path.write_bytes(mutated(sample, rng))
        try:
            read_onnx(path)
        except LoadError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert all(outcomes.values())


@pytest.mark.parametrize("field", ["op_type", "name", "input"])
def test_names_that_are_no_text(field: str, tmp_path: Path) -> None:
    """protobuf hands them out as bytes."""
    model = make([node("Relu", ["x"], ["y"], name="name")], {"x": (OPEN, 4)})
    old = {"op_type": b"\x22\x04Relu", "name": b"\x1a\x04name", "input": b"\x0a\x01x\x12\x01y"}[field]
    content = model.SerializeToString()
    assert old in content
    check_refused(content.replace(old, old[:2] + b"\xff" + old[3:]), tmp_path, f"{field}: found bytes")
