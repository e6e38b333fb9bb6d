"""The gap between theory and practice: every part by its definition, and that they sum to it."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graphcomp
from graphcomp.base import muted
from graphcomp.errors import BenchError
from graphcomp.explanation import explanation
from graphcomp.explanation.attribution import AttributedKernel, Source
from graphcomp.explanation.explanation import KINDS, explain, explain_bench, split
from graphcomp.explanation.profiling import Node, Operator, Profile
from graphcomp.models.resnet_cifar import ResNet
from graphcomp.onnx import export_onnx, read_onnx
from graphcomp.passes.l1 import L1
from graphcomp.passes.low_rank import LowRank
from graphcomp.pipeline import Pass
from graphcomp.records import ExplainedRow, Explanation
from tests.explaining import base, bench, kernels, pruned, recorded, timing
from tests.nets import scramble
from tests.running import run_pass
from tests.tiny import context

QUICK: dict[str, Any] = {"runs": 12, "seconds": 0.2, "traced_runs": 8, "traced_seconds": 0.2}


def recorded_explanation(folder: Path, name: str, base_ms: float = 0.1, new_ms: float = 0.09) -> Explanation:
    sides = kernels(folder, "base"), kernels(folder, name)
    theoretical = sum(k.macs for k in sides[0]) / sum(k.macs for k in sides[1])
    row = timing(base_ms, new_ms, theoretical)
    return split(bench(row), row, sides, (recorded("base"), recorded(name)))


def parts_of(found: Explanation) -> dict[str, float]:
    return {part.kind: part.ms for part in found.parts}


def check_identity(found: Explanation) -> None:
    """The parts sum to the gap, those of a row to the row, and all rows to all operators."""
    assert [part.kind for part in found.parts] == list(KINDS)
    assert sum(part.ms for part in found.parts) == pytest.approx(found.gap.value, abs=1e-12)
    assert found.gap.low <= found.gap.value <= found.gap.high
    assert found.gap.value == pytest.approx(found.new.measured_ms - found.theory_ms)
    for row in found.rows:
        assert (
            sum(row.parts.values()) == pytest.approx(row.new_ms - row.theory_ms, abs=1e-12) or not row.new_ms
        )
    for side in ("base", "new"):
        total = sum(getattr(row, f"{side}_ms") for row in found.rows)
        assert total == pytest.approx(getattr(found, side).operators_ms, abs=1e-12)
    for part in found.parts:
        assert part.ms == pytest.approx(sum(part.by_pass.values()))


# small networks that were never run


def op(name: str, kind: str, ms: float, *, domain: str = "", shape: Sequence[int] = (1, 1)) -> Operator:
    return Operator(Node(name, kind, domain, (), ()), ms, "CPUExecutionProvider", (), (tuple(shape),))


def source(key: str, kind: str, macs: int = 0, elements: int = 0) -> Source:
    return Source(f"node_{key}", kind, key, key.replace("_", "."), "l1", macs, elements, (), ())


def conv(
    key: str, ms: float, macs: int, computed: int = 0, form: str = "blocked", *fused: Source
) -> AttributedKernel:
    made = source(key, "Conv", macs)
    sources = (made, *fused)
    return AttributedKernel(
        op(key, "Conv", ms), sources, made.module, "l1", sources[-1].key, computed or macs, form
    )


def light(key: str, kind: str, ms: float, elements: int = 100, form: str = "plain") -> AttributedKernel:
    return AttributedKernel(op(key, kind, ms), (source(key, kind, 0, elements),), "a", "l1", key, 0, form)


def reorder(ms: float, carries: str, size: int = 10) -> AttributedKernel:
    return AttributedKernel(
        op("r", "ReorderOutput", ms, shape=(1, size)), (), "a", "l1", carries, 0, "blocked"
    )


def explained(
    base: Sequence[AttributedKernel], new: Sequence[AttributedKernel], cost_ms: float = 0.0, **times: float
) -> Explanation:
    """Timed exactly as long as the operators take together."""
    sides = {"base_ms": sum(k.ms for k in base), "new_ms": sum(k.ms for k in new)} | times
    row = timing(theoretical=sum(k.macs for k in base) / sum(k.macs for k in new), **sides)
    profiles = (Profile((), 9, 1.0, cost_ms),) * 2
    found = split(bench(row), row, (base, new), profiles)
    check_identity(found)
    return found


def only(found: Explanation) -> dict[str, float]:
    return {kind: round(ms, 9) for kind, ms in parts_of(found).items() if abs(ms) > 1e-9}


def test_as_much_faster_as_smaller_leaves_nothing_to_explain() -> None:
    assert only(explained([conv("a", 4.0, 100)], [conv("a", 1.0, 25)])) == {}


def test_padding_is_what_blocks_compute_beyond_the_macs() -> None:
    """Half of the MACs, three quarters with the blocks, and time goes with what is computed."""
    assert only(explained([conv("a", 4.0, 100)], [conv("a", 3.0, 50, 75)])) == {"padding": 1.0}


def test_blocks_that_were_half_empty_before_are_a_gain() -> None:
    assert only(explained([conv("a", 4.0, 100, 200)], [conv("a", 1.0, 50, 50)])) == {"padding": -1.0}


def test_another_kernel_has_all_beyond_what_it_computes() -> None:
    new = [conv("a", 3.0, 50, 50, "plain")]
    assert only(explained([conv("a", 4.0, 100)], new)) == {"kernel": 1.0}


def test_the_same_kernel_beyond_what_it_computes_is_low_intensity() -> None:
    assert only(explained([conv("a", 4.0, 100)], [conv("a", 3.5, 50, 75)])) == {
        "padding": 1.0,
        "intensity": 0.5,
    }


def test_a_fusion_that_is_lost_and_one_that_is_won() -> None:
    fused = conv("a", 4.0, 100, 0, "blocked", source("relu", "Relu", 0, 40))
    alone = [conv("a", 2.0, 50), light("relu", "Relu", 0.25)]
    assert only(explained([fused], alone)) == {"fusion": 0.25}
    before = [conv("a", 4.0, 100), light("relu", "Relu", 0.5, 80)]
    after = [conv("a", 2.0, 50, 0, "blocked", source("relu", "Relu", 0, 40))]
    found = explained(before, after)
    assert parts_of(found)["fusion"] == pytest.approx(-0.25)  # half of the elements would have taken 0.25
    assert found.parts[KINDS.index("fusion")].by_pass == {"l1": pytest.approx(-0.25)}


def test_layout_is_what_moves_data_and_did_not_before() -> None:
    new = [conv("a", 2.0, 50), reorder(0.25, "a"), light("pad", "Pad", 0.5)]
    assert only(explained([conv("a", 4.0, 100)], new)) == {"layout": 0.75}


def test_a_reorder_of_the_same_value_is_compared_by_size_and_any_other_is_new() -> None:
    before = [conv("a", 4.0, 100), reorder(1.0, "a", size=20)]
    same = explained(before, [conv("a", 2.0, 50), reorder(0.75, "a", size=10)])
    assert parts_of(same)["layout"] == pytest.approx(0.25)
    other = explained(before, [conv("a", 2.0, 50), reorder(0.75, "b", size=10)])
    assert parts_of(other)["layout"] == pytest.approx(0.75)


def test_operators_without_macs_are_compared_by_what_they_read_and_write() -> None:
    before = [
        conv("a", 4.0, 100),
        light("add", "Add", 1.0, 100),
        light("pool", "MaxPool", 1.0, 100, "blocked"),
    ]
    after = [conv("a", 2.0, 50), light("add", "Add", 0.75, 50), light("pool", "MaxPool", 0.75, 50)]
    assert only(explained(before, after)) == {"intensity": 0.25, "kernel": 0.25}


def test_time_that_is_not_spread_like_macs_is_a_part_of_its_own() -> None:
    """All MACs go from a layer that had a quarter of the time."""
    before = [conv("a", 1.0, 50), conv("b", 3.0, 50)]
    assert only(explained(before, [conv("b", 3.0, 50)])) == {"mix": 1.0}


def test_what_is_in_no_operator_does_not_shrink_with_macs() -> None:
    found = explained([conv("a", 4.0, 100)], [conv("a", 2.0, 50)], base_ms=5.0, new_ms=3.0)
    assert only(found) == {"host": 0.5}
    assert found.base.measured_ms - found.base.operators_ms == pytest.approx(1.0)


def test_factors_are_one_layer_and_each_has_its_own_form() -> None:
    new = [conv("a_0", 1.0, 30), conv("a_1", 1.5, 20, 20, "plain")]
    found = explained([conv("a", 4.0, 100)], new)
    assert only(found) == {"intensity": -0.2, "kernel": 0.7}
    row = next(row for row in found.rows if row.layer == "a")
    assert (row.base_operators, row.new_operators) == (["Conv"], ["Conv", "Conv"])
    assert (row.theory_ms, row.new_ms, row.new_form) == (2.0, 2.5, "blocked + plain")


def test_a_layer_without_a_counterpart_is_priced_at_the_average() -> None:
    found = explained([conv("a", 4.0, 100)], [conv("a", 2.0, 50), conv("new", 1.5, 25)])
    assert only(found) == {"intensity": 0.5}


def test_a_convolution_that_only_picks_channels_is_layout() -> None:
    """Priced like any other without a counterpart: theory has 1.0 for its 25 MACs."""
    made = Source("s", "Conv", "select", "select", "l1", 25, 0, ("x", "s/select"), ())
    picks = AttributedKernel(op("s", "Conv", 1.5), (made,), "a", "l1", "select", 50, "plain")
    found = explained([conv("a", 4.0, 100)], [conv("a", 2.0, 50), picks])
    assert only(found) == {"layout": 0.5}
    assert found.rows[1].new_operators == ["Select"]
    assert found.rows[1].layer == "a"


def test_a_layer_that_is_called_twice_is_matched_call_by_call() -> None:
    def twice(ms: float, macs: int) -> list[AttributedKernel]:
        calls = [conv("a", ms, macs), conv("a_1", 3 * ms, macs)]
        return [replace(k, layer="a") for k in calls]

    found = explained(twice(1.0, 100), twice(0.5, 50))
    assert [(row.base_ms, row.new_ms) for row in found.rows] == [(1.0, 0.5), (3.0, 1.5)]
    assert only(found) == {}


def test_operators_do_not_take_longer_than_the_run_they_are_part_of() -> None:
    """Tracing seems to cost 0.2 more an operator: that much is taken off all, but not more than again."""
    before = [conv("a", 2.2, 50), conv("b", 2.2, 50)]
    after = [conv("a", 1.2, 25), conv("b", 1.2, 25)]
    found = explained(before, after, cost_ms=0.3, base_ms=4.0, new_ms=2.0)
    assert found.base.trace_cost_ms == pytest.approx(0.5)
    assert only(found) == {}
    capped = explained(before, after, cost_ms=0.1, base_ms=4.0, new_ms=2.0)
    assert capped.base.trace_cost_ms == pytest.approx(0.2)
    assert parts_of(capped)["host"] == pytest.approx(-0.2 + 0.1)


def test_on_a_busy_machine_cpu_time_is_explained() -> None:
    base, new = [conv("a", 4.0, 100)], [conv("a", 2.0, 50)]
    row = timing(4.0, 2.0, 2.0, busy=True)
    found = split(bench(row), row, (base, new), (Profile((), 9, 1.0),) * 2)
    assert (found.clock, found.base.measured_ms) == ("CPU", pytest.approx(3.96))


def test_files_of_different_networks() -> None:
    with pytest.raises(BenchError, match="layers: found none that both files have by the same name"):
        explained([conv("a", 4.0, 100)], [conv("b", 2.0, 50)])


# recorded on AVX-512


def test_a_recorded_removal_that_leaves_the_blocks(tmp_path: Path) -> None:
    found = recorded_explanation(tmp_path, "pruned")
    check_identity(found)
    rows = {row.layer: row for row in found.rows if row.base_macs}
    assert set(rows) == {"stem", "block.conv1", "block.conv2", "last", "fc"}
    changed = rows["block.conv2"]
    assert (changed.base_form, changed.new_form, changed.made_by) == ("blocked", "plain", "l1")
    assert changed.new_operators == ["Conv"] and changed.base_operators == ["Conv"]
    assert changed.parts["kernel"] > 0.5 * changed.new_ms and changed.parts["padding"] == 0
    padded = rows["block.conv1"]  # 21 of 32 filters, all 32 computed
    assert padded.parts["padding"] == pytest.approx(padded.base_ms * (1 - 21 / 32))
    moved = {op for row in found.rows if "layout" in row.parts for op in row.new_operators}
    assert {"Pad", "ReorderInput", "ReorderOutput"} <= moved
    lost = [op for row in found.rows if "fusion" in row.parts for op in row.new_operators]
    assert lost == ["Add", "Relu"]
    assert all(parts_of(found)[kind] > 0 for kind in ("padding", "kernel", "fusion", "layout"))
    assert all(set(part.by_pass) <= {"l1", ""} for part in found.parts)


def test_a_recorded_factorisation(tmp_path: Path) -> None:
    found = recorded_explanation(tmp_path, "factored")
    check_identity(found)
    factored = [row.layer for row in found.rows if len(row.new_operators) == 2]
    assert factored == ["block.conv1", "last"]
    parts = parts_of(found)
    assert parts["kernel"] == parts["fusion"] == parts["padding"] == 0 and parts["intensity"] > 0


# here and now


@pytest.mark.slow
def test_a_gap_that_is_measured_now(tmp_path: Path) -> None:
    files = base(tmp_path / "a.onnx"), pruned(tmp_path / "b.onnx")
    told: list[float] = []
    tell = lambda _, fraction: told.append(fraction)  # noqa: E731
    found = graphcomp.explain(*map(str, files), batch=2, progress=tell, **QUICK)
    check_identity(found)
    assert found.bench is not None and found.bench.batches[0].batch == found.batch == 2
    assert (found.provider, found.threads, found.base.runs) == ("cpu", 1, 8)
    assert found.theoretical == found.bench.batches[0].theoretical
    assert told[-1] == 1.0 and told == sorted(told)
    assert Explanation.model_validate_json(found.model_dump_json()) == found


@pytest.mark.slow
@pytest.mark.parametrize("pass_", [L1(ratio=0.5, multiple=1), LowRank(energy=0.6)], ids=lambda p: p.name)
def test_a_file_of_another_exporter_is_explained_as_our_copy_of_it(pass_: Pass, tmp_path: Path) -> None:
    """Rows have the same layers and operators; names of its nodes are nothing like ours."""
    foreign = tmp_path / "foreign.onnx"
    with warnings.catch_warnings(), muted():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            scramble(ResNet(8), 0).eval(), (torch.randn(1, 3, 32, 32),), str(foreign), dynamo=False,
            input_names=["x"], dynamic_axes={"x": {0: "batch"}}, opset_version=17,
        )  # fmt: skip
    program = read_onnx(foreign)
    export_onnx(program, tmp_path / "ours.onnx")
    export_onnx(run_pass(pass_, program, context())[2], tmp_path / "new.onnx")
    found, ours = (
        explain(tmp_path / base, tmp_path / "new.onnx", **QUICK) for base in ("foreign.onnx", "ours.onnx")
    )
    check_identity(found)
    rows, expected = (
        [(r.layer, r.new_operators, r.base_macs, r.made_by) for r in e.rows if r.base_macs or r.new_macs]
        for e in (found, ours)
    )
    assert rows == expected and len(rows) == 8
    assert all(row.base_operators and row.new_operators for row in found.rows if row.base_macs)


def test_the_first_batch_of_a_benchmark_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = base(tmp_path / "a.onnx"), pruned(tmp_path / "b.onnx")
    timed = bench(timing(0.2, 0.1, 2.0).model_copy(update={"batch": 3}))
    found = explain_bench(timed, files, traced_runs=6, traced_seconds=0.1)
    assert (found.batch, found.bench, found.speedup.value) == (3, None, 2.0)
    with pytest.raises(BenchError, match="tensorrt"):
        explain_bench(bench(timing(0.2, 0.1, 2.0), "tensorrt"), files)
    asked: list[Any] = []
    monkeypatch.setattr(explanation, "trace_pair", lambda *args, **_: asked.append(args[2]) or pytest.skip())
    with pytest.raises(pytest.skip.Exception):
        explain_bench(bench(timing(0.2, 0.1, 2.0), "cuda"), files)
    assert asked == ["cuda"]


def test_files_with_other_inputs(tmp_path: Path) -> None:
    from tests.runtime.test_bench import write

    with pytest.raises(BenchError, match="compare exports of the same task"):
        explain(base(tmp_path / "a.onnx"), write(tmp_path / "b.onnx", size=12))


def test_rows_are_plain_data() -> None:
    row = explained([conv("a", 4.0, 100)], [conv("a", 3.0, 50, 75)]).rows[0]
    assert ExplainedRow.model_validate(row.model_dump()) == row
