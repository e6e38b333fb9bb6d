"""What an explanation says in words, tables and a plot."""

import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from graphcomp.records import Explanation, Gather, GatherForm, Interval
from graphcomp.report.explanation import (
    describe,
    describe_gathers,
    label_of,
    layer_table,
    layers,
    part_table,
    shortened,
    waterfall,
    waterfall_file,
    waterfall_svg,
)
from tests.explanation.test_explanation import conv, explained, light, recorded_explanation, reorder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    return recorded_explanation(tmp_path_factory.mktemp("nets"), "pruned")


def shown(table: Table, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def example() -> Explanation:
    """4 ms -> 3.25 ms for half of the MACs: 1 padding, 0.25 layout."""
    before = [conv("layer1_conv1", 2.0, 50), conv("layer1_conv2", 2.0, 50)]
    after = [conv("layer1_conv1", 1.5, 25, 37), conv("layer1_conv2", 1.5, 25, 38), reorder(0.25, "x")]
    return explained(before, after)


def test_the_first_words_are_practice_theory_and_the_biggest_reasons() -> None:
    lines = describe(example())
    assert lines[0] == (
        "1.23x instead of 2.00x (batch 1, cpu, 1 thread, wall time): 3.250 ms where the MACs promise 2.000 "
        "(before: 4.000); 1.250 ms more, [1.210, 1.290]."
    )
    assert lines[1:] == [
        "+80 % (+1.000 ms) padding to whole blocks: layer1.*, by l1.",
        "+20 % (+0.250 ms) layout (ReorderOutput): a, by l1.",
    ]


def test_nothing_is_explained_that_is_within_the_noise() -> None:
    found = explained([conv("a", 4.0, 100)], [conv("a", 2.0, 50)])
    lines = describe(found)
    assert lines[0].endswith("0.000 ms more, perhaps nothing.")
    assert lines[1:] == ["That is what the MACs promise, as far as the measurement can tell."]
    assert "%" not in shown(part_table(found)).replace("95 %", "")


def test_faster_than_theory_is_said_so() -> None:
    lines = describe(explained([conv("a", 4.0, 100, 200)], [conv("a", 1.0, 50, 50)]))
    assert "1.000 ms less" in lines[0]
    assert lines[1] == "-1.000 ms padding to whole blocks: a, by l1."


def test_what_went_may_have_had_more_or_less_of_the_time() -> None:
    before = [conv("a", 1.0, 50), conv("b", 3.0, 50)]
    assert "took less of the original's time" in describe(explained(before, [conv("b", 3.0, 50)]))[1]
    assert "took more of the original's time" in describe(explained(before, [conv("a", 1.0, 50)]))[1]


def test_what_is_outside_of_operators_is_quoted_with_its_size() -> None:
    found = explained([conv("a", 4.0, 100)], [conv("a", 2.0, 50)], base_ms=5.0, new_ms=3.0)
    assert describe(found)[1] == (
        "+100 % (+0.500 ms) outside of operators: 1.000 and 1.000 ms of base and new are in no operator of "
        "the traces."
    )


def picked(readers: list[str], ms: float | None, layout: float | None) -> Gather:
    share = None if ms is None or layout is None else (ms + layout) / 3.25
    form: GatherForm = "gather" if ms else "merged"
    return Gather(
        node="index_select", readers=readers, made_by="cc", channels=9, of=16, form=form, ms=ms,
        layout_ms=layout, share=share,
    )  # fmt: skip


def test_gathers_are_summed_and_the_dearest_is_named() -> None:
    found = example()
    gathers = [picked(["a"], 0.05, 0.1), picked(["b", "c"], 0.1, 0.1), picked(["d"], None, None)]
    lines = describe(found.model_copy(update={"gathers": gathers}))
    assert lines[:-2] == describe(found) and describe_gathers(found) == []
    assert lines[-2:] == [
        "Picking channels takes 0.350 ms, 10.8 % of the time, 0.200 of them in reorders: 2 gathers, by cc; "
        "most for b and c (9 of 16 channels).",
        "1 gather merged into weights: the layers there compute all channels again, and no operator of its "
        "own has a time.",
    ]
    even = explained([conv("a", 4.0, 100)], [conv("a", 2.0, 50)]).model_copy(update={"gathers": gathers[2:]})
    assert describe(even)[-1] == lines[-1] and "promise" in describe(even)[-2]


def test_labels_name_forms_and_operators(found: Explanation) -> None:
    assert label_of("kernel", found) == "another kernel (blocked -> plain)"
    assert label_of("fusion", found) == "lost fusion (Add, Relu)"
    assert re.fullmatch(r"layout \((Pad|Reorder\w+)(, (Pad|Reorder\w+)){2}\)", label_of("layout", found))
    assert label_of("padding", found) == "padding to whole blocks"
    assert label_of("layout", explained([conv("a", 2.0, 2)], [conv("a", 1.0, 1)])) == "layout"


def test_layers_have_the_operators_behind_them(found: Explanation) -> None:
    merged = {row.layer: row for row in layers(found)}
    assert list(merged) == ["stem", "block.conv1", "block.conv2", "last", "fc"]
    assert merged["block.conv2"].new_operators == ["Conv", "Pad", "Add", "Relu", "ReorderInput"]
    for field in ("base_ms", "new_ms", "theory_ms", "base_macs", "new_computed"):
        whole = sum(getattr(row, field) for row in found.rows)
        assert sum(getattr(row, field) for row in merged.values()) == pytest.approx(whole)


def test_long_networks_show_the_layers_farthest_from_theory() -> None:
    before = [conv(f"l{i}", 2.0, 10) for i in range(9)]
    after = [conv(f"l{i}", 1.0 + i, 5) for i in range(9)]
    rows = shortened(layers(explained(before, after)), most=4)
    assert [row.layer for row in rows] == ["l6", "l7", "l8", "6 others"]
    assert rows[-1].new_ms == pytest.approx(1 + 2 + 3 + 4 + 5 + 6)


def test_tables_fit_80_columns_and_hold_the_sums(found: Explanation) -> None:
    parts, by_layer = shown(part_table(found)), shown(layer_table(found))
    assert max(map(len, (parts + by_layer).splitlines())) <= 80
    for kind in (
        "padding to whole blocks",
        "another kernel",
        "lost fusion",
        "layout",
        "outside of operators",
    ):
        assert kind in parts
    assert f"{1e3 * found.gap.value:+.1f}" in parts
    assert f"{1e3 * found.new.operators_ms:.1f}" in by_layer and "block.conv2" in by_layer
    assert "l1" not in by_layer  # one pass needs no column


def test_several_passes_have_a_column() -> None:
    rows = explained([conv("a", 4.0, 100), light("add", "Add", 1.0)], [conv("a", 2.0, 50)]).rows
    other = rows[0].model_copy(update={"layer": "b", "made_by": "low-rank"})
    found = example().model_copy(update={"rows": [*rows, other]})
    assert "low-rank" in shown(layer_table(found), 120)


def bars(found: Explanation) -> list[tuple[float, float]]:
    """Where every bar of the plot begins and ends, in ms."""
    (ax,) = waterfall(found).axes
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]


def test_the_waterfall_goes_from_theory_to_practice_without_a_gap() -> None:
    before, promised, *steps, after = bars(example())
    assert (before, promised, after) == ((0, 4.0), (0, 2.0), (0, 3.25))
    at = 2.0
    for start, end in steps:
        assert start == pytest.approx(at)
        at = end
    assert at == pytest.approx(3.25) and len(steps) == 7


@pytest.mark.slow
def test_the_plot_is_one_element_of_a_page_and_a_file_of_its_own(found: Explanation) -> None:
    element = str(waterfall_svg(found))
    assert element.count("<svg ") == 2 and "promised by the MACs" in element and "lost fusion" in element
    file = waterfall_file(found)
    root = ET.fromstring(file)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in file and "#ffffff" in file  # readable wherever it is shown


def test_a_gap_below_zero_is_drawn_too() -> None:
    found = explained([conv("a", 4.0, 100, 200)], [conv("a", 1.0, 50, 50)])
    assert bars(found)[-1] == (0, 1.0)
    wide = found.model_copy(update={"gap": Interval(value=-1.0, low=-0.9, high=-1.1)})
    assert waterfall(wide).axes  # an interval that rounding turned around


def test_small_times_are_in_microseconds(tmp_path: Path) -> None:
    assert " us " in describe(recorded_explanation(tmp_path, "factored"))[0]
    assert " ms " in describe(explained([conv("a", 400.0, 4)], [conv("a", 300.0, 1)]))[0]
