"""Channel selections: every form computes the same, and the measured one is taken."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from graphcomp.errors import ProviderError
from graphcomp.onnx import export, selection
from graphcomp.onnx.export import export_onnx
from graphcomp.onnx.selection import FORMS, POLICIES, cheapest, find_sites
from graphcomp.passes import L1
from tests.running import run_pass
from tests.tiny import context, tiny_program

RNG = np.random.default_rng(0)
BRANCH, TRUNK = 5, 8


def constant(name: str, values: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values), name)


def weight(name: str, *shape: int) -> TensorProto:
    return constant(name, RNG.standard_normal(shape).astype(np.float32))


def model(
    nodes: Sequence[Any],
    constants: Sequence[TensorProto],
    inputs: dict[str, int],
    outputs: tuple[str, ...] = ("y",),
) -> ModelProto:
    """Inputs of (batch, C, 6, 6); nodes are (op, inputs, output, attributes), named after their output."""
    made = [helper.make_node(op, list(ins), [out], name=out, **attrs) for op, ins, out, attrs in nodes]
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, 6, 6]) for n, c in inputs.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", None, None, None]) for n in outputs]
    graph = helper.make_graph(made, "g", shapes, ends, list(constants))
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(built)
    return built


def padded_branch(index: Sequence[int], outputs: tuple[str, ...] = ("y",)) -> ModelProto:
    """relu(trunk(x) + select(branch(x))) read by a convolution; `index` -1 is a channel of zeros."""
    where = [i if i >= 0 else BRANCH for i in index]
    nodes = [
        ("Conv", ("x", "wb", "bb"), "branch", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("Conv", ("x", "wt"), "trunk", {"kernel_shape": [1, 1]}),
        ("Pad", ("branch", "pads"), "padded", {}),
        ("Gather", ("padded", "index"), "spread", {"axis": 1}),
        ("Add", ("trunk", "spread"), "sum", {}),
        ("Relu", ("sum",), "relu", {}),
        ("Conv", ("relu", "wr"), "y", {"kernel_shape": [1, 1]}),
    ]
    constants = [
        weight("wb", BRANCH, 3, 3, 3),
        weight("bb", BRANCH),
        weight("wt", len(index), 3, 1, 1),
        weight("wr", 4, len(index), 1, 1),
        constant("pads", np.array([0, 0, 0, 0, 0, 1, 0, 0])),
        constant("index", np.array(where)),
    ]
    return model(nodes, constants, {"x": 3}, outputs)


def partial_reader(index: Sequence[int]) -> ModelProto:
    """A convolution that reads some of the channels of a sum."""
    nodes = [
        ("Relu", ("x",), "wide", {}),
        ("Gather", ("wide", "index"), "picked", {"axis": 1}),
        ("Conv", ("picked", "w", "b"), "one", {"kernel_shape": [3, 3]}),
        ("Conv", ("picked", "v"), "two", {"kernel_shape": [3, 3], "dilations": [1, 1]}),
        ("Concat", ("one", "two"), "y", {"axis": 1}),
    ]
    n = len(index)
    constants = [weight("w", 4, n, 3, 3), weight("b", 4), weight("v", 2, n, 3, 3)]
    return model(nodes, [*constants, constant("index", np.array(index))], {"x": TRUNK})


def run(built: ModelProto, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        built.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[NDArray[Any]] = session.run(None, feeds)
    return results


def feeds(built: ModelProto, batch: int = 1) -> dict[str, NDArray[Any]]:
    widths = {i.name: i.type.tensor_type.shape.dim[1].dim_value for i in built.graph.input}
    return {name: RNG.standard_normal((batch, w, 6, 6)).astype(np.float32) for name, w in widths.items()}


def surgeon(built: ModelProto) -> Any:
    return gs.import_onnx(onnx.shape_inference.infer_shapes(built))


def in_form(built: ModelProto, form: str) -> ModelProto:
    graph = surgeon(built)
    (site,) = find_sites(graph)
    assert FORMS[form].extra(graph, site) is not None
    FORMS[form].apply(graph, site)
    changed = gs.export_onnx(graph.cleanup().toposort())
    onnx.checker.check_model(changed, full_check=True)
    return changed


def ops(built: ModelProto) -> list[str]:
    return sorted(n.op_type for n in built.graph.node)


def everything(built: ModelProto) -> set[str]:
    return {n.name for n in built.graph.node}


INDICES = [[0, -1, 1, 2, -1, 3, 4, -1], [4, 3, 2, 1, 0, -1], [1, 1, -1, 1], [0, 2], [-1, -1, 3]]


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("form", ["moves", "conv", "producer"])
def test_forms_of_a_padded_branch(form: str, index: list[int]) -> None:
    before = padded_branch(index)
    after = in_form(before, form)
    for batch in (1, 3):
        x = feeds(before, batch)
        assert np.allclose(run(after, x)[0], run(before, x)[0], rtol=0, atol=1e-5)
    assert ("Pad" in ops(after)) == ("Gather" in ops(after)) == (form == "moves")
    assert ops(after).count("Conv") == (4 if form == "conv" else 3)


@pytest.mark.parametrize("index", [[0, 2, 5], [7, 0, 0, 3], list(range(TRUNK))])
@pytest.mark.parametrize("form", ["moves", "conv", "consumer"])
def test_forms_of_a_partial_reader(form: str, index: list[int]) -> None:
    before = partial_reader(index)
    after = in_form(before, form)
    for batch in (1, 3):
        x = feeds(before, batch)
        assert np.allclose(run(after, x)[0], run(before, x)[0], rtol=0, atol=1e-5)
    assert ("Gather" in ops(after)) == (form == "moves")


def test_extra_macs_by_hand() -> None:
    """At 6x6: 8 x 5 for the 1x1 kernel; 3 more rows of 3x3x3 for the producer; no reader is a convolution."""
    graph = surgeon(padded_branch(INDICES[0]))
    (site,) = find_sites(graph)
    assert [FORMS[f].extra(graph, site) for f in FORMS] == [0, 8 * 5 * 36, 3 * 27 * 36, None]
    graph = surgeon(partial_reader([0, 2, 5]))
    (site,) = find_sites(graph)
    assert [FORMS[f].extra(graph, site) for f in FORMS] == [0, 3 * 8 * 36, None, 5 * (4 + 2) * 9 * 16]


def test_the_merged_policy_takes_the_least_arithmetic() -> None:
    graph = surgeon(padded_branch(INDICES[0]))  # 40 MACs a position against 81
    assert POLICIES["merged"](graph, find_sites(graph)[0]) == "conv"
    graph = surgeon(padded_branch([4, 3, 2, 1, 0, -1]))  # 30 against 27
    assert POLICIES["merged"](graph, find_sites(graph)[0]) == "producer"
    graph = surgeon(padded_branch([0, 2]))  # fewer channels than the branch has
    assert POLICIES["merged"](graph, find_sites(graph)[0]) == "producer"


def test_a_producer_that_others_read_is_left_alone() -> None:
    graph = surgeon(padded_branch(INDICES[0], ("y", "branch")))
    (site,) = find_sites(graph)
    assert FORMS["producer"].extra(graph, site) is None


def other_pad(pads: list[int], fill: float | None = None, mode: str = "constant") -> ModelProto:
    extra = [] if fill is None else [constant("fill", np.float32(fill))]
    names = ("x", "pads", *(c.name for c in extra))
    return model([("Pad", names, "y", {"mode": mode})], [constant("pads", np.array(pads)), *extra], {"x": 3})


@pytest.mark.parametrize(
    ("built", "found"),
    [
        (other_pad([0, 2, 0, 0, 0, 1, 0, 0]), True),
        (other_pad([0, 2, 0, 0, 0, 1, 0, 0], 0.0), True),
        (other_pad([0, 2, 0, 0, 0, 1, 0, 0], 1.0), False),
        (other_pad([0, 1, 0, 0, 0, 1, 0, 0], mode="reflect"), False),
        (other_pad([0, 0, 1, 1, 0, 0, 1, 1]), False),
        (other_pad([0, 1, 1, 0, 0, 0, 0, 0]), False),
        (other_pad([0, -1, 0, 0, 0, 1, 0, 0]), False),
    ],
    ids=["channels", "zero", "ones", "reflect", "plane", "both", "crop"],
)
def test_what_is_a_selection(built: ModelProto, found: bool) -> None:
    sites = find_sites(surgeon(built))
    assert bool(sites) == found
    if found:
        assert sites[0].index.tolist() == [-1, -1, 0, 1, 2, -1]


@pytest.mark.parametrize(("times", "kinds"), [([1, 2, 3], 2), ([3, 1, 2], 0), ([3, 2, 1], 0)])
def test_the_fastest_policy_is_taken(monkeypatch: pytest.MonkeyPatch, times: list[float], kinds: int) -> None:
    monkeypatch.setattr(selection, "race", lambda models, *_: times)
    before = padded_branch(INDICES[1])
    after, (line,) = cheapest(before, everything(before), feeds(before), "cpu")
    assert sum(op in ("Pad", "Gather") for op in ops(after)) == kinds
    best = ["moves", "conv", "merged"][int(np.argmin(times))]
    assert line.startswith(f"channel selections as {best}, the fastest on cpu: moves {times[0]} ms, conv ")


def test_equal_forms_are_timed_once_and_known_ones_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """`merged` is `conv` where that adds the least arithmetic; a run asks again for what it has timed."""
    timed: list[int] = []

    def race(models: Sequence[bytes], *_: Any) -> list[float]:
        timed.append(len(models))
        return [2.0, 1.0]

    monkeypatch.setattr(selection, "race", race)
    before, known = padded_branch(INDICES[0]), dict[str, dict[str, float]]()
    first = cheapest(before, everything(before), feeds(before), "cpu", known=known)
    assert timed == [2] and "as conv, the fastest on cpu: moves 2 ms, conv 1 ms" in first[1][0]
    assert cheapest(before, everything(before), feeds(before), "cpu", known=known) == first
    assert timed == [2]
    cheapest(before, everything(before), feeds(before), "cpu", threads=2, known=known)
    assert timed == [2, 2]


def test_measured_for_real() -> None:
    before = padded_branch(INDICES[1])
    x = feeds(before)
    after, (line,) = cheapest(before, everything(before), x, "cpu")
    assert np.allclose(run(after, x)[0], run(before, x)[0], rtol=0, atol=1e-5)
    assert all(f"{policy} " in line for policy in POLICIES)


def test_only_what_passes_made_is_replaced() -> None:
    before = padded_branch(INDICES[0])
    after, done = cheapest(before, {"padded"}, feeds(before), "cpu")
    assert (ops(after), done) == (ops(before), [])


@pytest.mark.slow
def test_a_padded_program_is_exported_without_pads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "race", lambda models, *_: [2.0, 1.0, 3.0][: len(models)])
    pass_ = L1(ratio=0.5, join="pad", multiple=1, include=("outer",))
    _, _, program = run_pass(pass_, tiny_program(), context())
    plain = export_onnx(program, tmp_path / "plain.onnx")
    chosen = export_onnx(program, tmp_path / "chosen.onnx", provider="cpu")
    assert {"Pad", "Gather"} & set(ops(onnx.load(tmp_path / "plain.onnx")))
    assert not {"Pad", "Gather"} & set(ops(onnx.load(tmp_path / "chosen.onnx")))
    assert chosen.cleanup[-1].startswith("channel selections as conv, the fastest on cpu")
    assert chosen.nodes < plain.nodes and max(chosen.parity.values()) < 1e-5


@pytest.mark.slow
def test_without_the_provider_nothing_is_chosen_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise ProviderError("provider 'cuda': not here")

    monkeypatch.setattr(export, "cheapest", absent)
    record = export_onnx(tiny_program(), tmp_path / "m.onnx", provider="cuda")
    assert (
        record.cleanup[-1]
        == "channel selections left as exported, for want of cuda: provider 'cuda': not here"
    )
