import errno
import io
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from graphcomp import records
from graphcomp.errors import LoadError, OutputError
from graphcomp.measure.evaluate import drift
from graphcomp.report import figures, layer_pairs, report, tables, words
from tests.explanation.test_explanation import recorded_explanation
from tests.nets import Net
from tests.tiny import SHAPE, traced

ENVIRONMENT = records.Environment(
    python="3.11.9", platform="Linux", cpu="some CPU", isa="avx2", cores=2, versions={"torch": "2.14.1"}
)


def layer(name: str, out: int, macs: int) -> records.LayerRow:
    return records.LayerRow(
        name=name, kind="Conv2d", in_channels=3, out_channels=out, kernel=(3, 3), params=27 * out, macs=macs
    )


def accuracy(value: float, samples: int, low: float, high: float) -> records.Score:
    return records.Score(measure="accuracy", value=value, samples=samples, low=low, high=high)


def snapshot(layers: list[records.LayerRow], top1: float | None = None) -> records.Snapshot:
    score = None if top1 is None else accuracy(top1, 360, top1 - 0.0123, top1 + 0.0089)
    return records.Snapshot(
        params_trainable=sum(row.params for row in layers),
        params_state=sum(row.params for row in layers) + 17,
        macs=sum(row.macs for row in layers),
        score=score,
        layers=layers,
    )


BEFORE = snapshot([layer("stem", 64, 5_432_111), layer("head", 10, 9_999)], top1=0.9712)
AFTER = snapshot([layer("stem", 48, 3_210_987), layer("head", 10, 7_654)], top1=0.9434)
PLAN = records.Plan(
    name="l1",
    options={"ratio": 0.25, "target": {"macs": 0.5}},
    summary="removed 16 of 64 channels",
    kept=[
        records.LeftAlone(where="head", reason="an output of the model"),
        records.LeftAlone(where="head2", reason="too small"),
        records.LeftAlone(where="head3", reason="too small"),
    ],
)
STEP = records.Step(
    index=1,
    plan=PLAN,
    drift=records.Drift(relative_l2=0.123, top1_agreement=0.875),
    verify_error=2.5e-15,
    seconds=1.25,
    after=AFTER,
)


def timing(batch: int, low: float, value: float, high: float, **changes: Any) -> records.BatchTiming:
    base = records.TimingStats(
        runs=321, first_ms=9.876, median_ms=4.321, p90_ms=4.567, p99_ms=4.891, cpu_median_ms=4.234
    )
    fields: dict[str, Any] = {
        "batch": batch,
        "base": base,
        "new": base.model_copy(update={"median_ms": 2.345, "cpu_median_ms": 2.222}),
        "speedup": records.Interval(value=value, low=low, high=high),
        "cpu_speedup": records.Interval(value=1.91, low=1.81, high=1.99),
        "theoretical": 2.0,
        "busy": False,
        "verdict": "faster" if low > 1 else "slower" if high < 1 else "no measurable difference",
    }
    return records.BatchTiming(**(fields | changes))


def bench(*batches: records.BatchTiming) -> records.Bench:
    file = records.ModelFile(
        path="baseline.onnx",
        sha256="ab" * 32,
        bytes=123_456,
        macs=1,
        load_seconds=0.1,
        nodes_per_provider={"CPUExecutionProvider": 31},
    )
    return records.Bench(
        provider="cpu",
        provider_options={},
        threads=1,
        base=file,
        new=file,
        batches=list(batches),
        environment=ENVIRONMENT,
    )


def fitted_layer(name: str, before: float, after: float, **more: Any) -> records.FittedLayer:
    facts = {"original": name, "rows": 6400, "columns": 27, "ridge": 0.001}
    return records.FittedLayer(layer=name, before=before, after=after, **(facts | more))


FITTED = STEP.model_copy(
    update={
        "index": 2,
        "plan": PLAN.model_copy(update={"name": "refit", "kept": []}),
        "fit": records.Fit(
            original="the run's input",
            samples=100,
            positions=64,
            layers=[
                fitted_layer("stem", 0.0, 0.0, ridge=None),
                fitted_layer("body.1", 0.32, 0.081, original="body"),
                fitted_layer("head", 0.5, 0.5, ridge=None, note="6 rows for 27 columns are too few"),
            ],
            seconds=1.0,
            resumed=0,
        ),
    }
)


def make(**changes: Any) -> records.Report:
    export = records.Export(
        path="model.onnx",
        bytes=1_234_567,
        opset=20,
        nodes=52,
        parity={"1": 3.1e-7},
        cleanup=["dropped 2 nodes"],
    )
    fields: dict[str, Any] = {
        "model": "models:tiny",
        "weights": None,
        "data": "digits",
        "target": "cpu-avx2",
        "seed": 7,
        "recipe": {"passes": [{"l1": {"ratio": 0.25}}]},
        "baseline": BEFORE,
        "final": AFTER,
        "steps": [STEP],
        "export": export,
        "baseline_export": export.model_copy(update={"bytes": 2_469_134}),
        "bench": bench(timing(1, 1.82, 1.84, 1.86), timing(8, 0.97, 1.01, 1.05)),
        "environment": ENVIRONMENT,
        "started": "2026-01-02T03:04:05Z",
        "seconds": 12.3,
    }
    return records.Report(**(fields | changes))


@pytest.fixture(scope="module")
def html() -> str:
    return report.render_html(make())


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of text and files: the plots take nearly all of the time."""
    monkeypatch.setattr(
        report, "plots_of", lambda record, pairs: dict.fromkeys(("steps", "layers", "time"), "")
    )


class Page(HTMLParser):
    """What a browser would load or run, the ids, and the visible text."""

    VOID: ClassVar = {"meta", "link", "img", "br", "input", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def shown(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.mark.slow
def test_both_files_are_written_and_the_record_survives_the_round_trip(tmp_path: Path) -> None:
    original = make()
    report.write_report(original, tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["report.html", "report.json"]
    assert report.read_report(tmp_path / "new" / "folder" / "report.json") == original


@pytest.mark.slow
def test_infinite_and_undefined_numbers_survive_the_round_trip_and_the_page(tmp_path: Path) -> None:
    lost = STEP.model_copy(
        update={"drift": records.Drift(relative_l2=math.nan, top1_agreement=None), "verify_error": math.inf}
    )
    odd = timing(1, math.nan, math.nan, math.inf, theoretical=math.inf)
    report.write_report(make(steps=[lost], bench=bench(odd)), tmp_path)
    again = report.read_report(tmp_path / "report.json")
    assert again.steps[0].drift is not None
    assert math.isnan(again.steps[0].drift.relative_l2)
    assert again.steps[0].verify_error == math.inf


@pytest.mark.slow
def test_the_page_is_self_contained(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.open == []
    assert {"script", "link", "img", "iframe", "object", "image", "base"}.isdisjoint(page.tags)
    assert page.tags.count("svg") == 2 * 3  # wide and narrow
    loads = [
        value for key, value in page.attributes if key in ("src", "href", "xlink:href", "action", "data")
    ]
    assert loads
    assert all(value.startswith("#") for value in loads)
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    outside = [value for key, value in page.attributes if "//" in value and not key.startswith("xmlns")]
    assert outside == []
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {f"#{i}" for k, i in page.attributes if k == "id"}


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> str:
    explanation = recorded_explanation(tmp_path_factory.mktemp("nets"), "pruned")
    return report.render_html(make(explanation=explanation))


@pytest.mark.slow
def test_theory_and_practice_have_a_section_of_their_own(explained: str, html: str) -> None:
    page, without = Page(explained), Page(html)
    assert page.open == [] and page.tags.count("svg") == 2 * 4
    assert ("href", "#explain") in page.attributes and ("href", "#explain") not in without.attributes
    assert "Theory against practice" in page.shown() and "Theory against practice" not in without.shown()
    for text in ("instead of", "another kernel (blocked -> plain)", "block.conv2", "the gap, as measured"):
        assert text in page.shown()
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_gathers_have_a_table_with_their_times(tmp_path: Path) -> None:
    """And none of it where no channels are picked."""
    explanation = recorded_explanation(tmp_path, "pruned")
    some = {"readers": ["layer.a", "layer.b"], "made_by": "cc", "channels": 9, "of": 16}
    timed, merged = (
        records.Gather(node=name, form=form, ms=ms, layout_ms=ms, share=ms, **some)  # type: ignore[arg-type]
        for name, form, ms in (("index_select", "gather", 0.0125), ("index_select_1", "merged", None))
    )
    explanation = explanation.model_copy(update={"gathers": [timed, merged]})
    page = Page(report.render_html(make(explanation=explanation)))
    assert page.open == []
    shown = " ".join(page.shown().split())
    assert "index_select layer.a, layer.b cc 9 of 16 gather 0.0125 0.0125 1.2 %" in shown
    assert "index_select_1 layer.a, layer.b cc 9 of 16 merged" in shown
    without = recorded_explanation(tmp_path, "pruned")
    assert "Channels that are picked" not in report.render_html(make(explanation=without))


@pytest.mark.slow
def test_ids_are_unique_and_every_reference_has_its_target(html: str) -> None:
    page = Page(html)
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for key, value in page.attributes if key == "href"}
    wanted |= {word for key, value in page.attributes if key == "aria-labelledby" for word in value.split()}
    assert wanted <= set(ids)


def test_plots_have_a_title_and_tables_have_scoped_headers(html: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert [child.tag for child in root[:2]] == ["title", "desc"]
        assert all(child.text for child in root[:2])
    assert not re.findall(r"<th(?![^>]*scope=)[ >]", html)


@pytest.mark.slow
def test_everything_from_the_record_is_escaped() -> None:
    evil = '<script>alert("1")</script>&$x_1$'
    rows = [layer(evil, 8, 100)]
    left = [records.LeftAlone(where=evil, reason=evil)]
    step = planned(name=evil, summary=evil, options={evil: evil}, kept=left).model_copy(
        update={
            "after": snapshot(rows, 0.5),
        }
    )
    page = Page(
        report.render_html(
            make(
                model=evil,
                data=evil,
                weights=evil,
                target=evil,
                recipe={evil: evil},
                steps=[step],
                baseline=snapshot(rows, 0.5),
                final=snapshot(rows, 0.5),
            )
        )
    )
    assert "script" not in page.tags
    assert page.shown().count(evil) >= 10


def planned(**changes: Any) -> records.Step:
    """The step with another plan."""
    return STEP.model_copy(update={"plan": PLAN.model_copy(update=changes)})


def with_spectra(count: int) -> records.Step:
    """A step that decided by the spectra of `count` groups of four channels."""
    groups = [
        records.Spectrum(
            group=f"layer{i}<conv>", channels=4, share=0.9, wanted=2, kept=3, samples=100, dead=1,
            eigenvalues=[0.7, 0.2, 0.1, 0.0], statistics=[f"layer{i}"],
        ).model_dump(mode="json")
        for i in range(count)
    ]  # fmt: skip
    return planned(evidence={"groups": groups})


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 6, 13])
def test_spectra_have_a_panel_a_group(count: int) -> None:
    page = Page(report.render_html(make(steps=[with_spectra(count)])))
    assert "Spectra: how step 2 (l1) chose" in page.shown()
    for i in range(count):
        assert f"layer{i}<conv>" in page.shown()
    assert page.shown().count("3/4") == 2 * count


def with_rounds() -> records.Step:
    """A step of three rounds, of which the last was undone."""

    def after(number: int) -> records.Snapshot:
        params = 1000 - number
        return records.Snapshot(
            params_trainable=params,
            params_state=params,
            macs=20_000 - number,
            score=accuracy(0.97 - 0.011 * number, 140, 0.9, 0.99),
        )

    def row(number: int, name: str, evidence: dict[str, Any] | None = None, **facts: Any) -> records.Step:
        plan = records.Plan(name=name, summary=f"did <{number}>", evidence=evidence or {})
        known = {"drift": None, "verify_error": 0.0, "seconds": 0.0}
        return records.Step(index=number - 1, plan=plan, after=after(number), **(known | facts))

    rows = [
        row(1, "apoz", removed={"head": 2, "stem": 11}),
        row(2, "finetune", {"rate": 0.625, "thresholds": {"stem": 0.1}}, seconds=12.34),
        row(3, "apoz", removed={"stem": 7}),
    ]
    step = planned(summary="kept 2 of 3 rounds: 13 channels removed")
    return step.model_copy(update={"start": after(0), "rounds": rows, "kept_rounds": 2})


@pytest.mark.slow
def test_rounds_have_a_table_and_another_of_what_each_layer_lost() -> None:
    html = report.render_html(make(steps=[with_rounds()]))
    page = Page(html)
    assert "Rounds of step 2 (l1)" in page.shown() and "Channels removed per layer" in page.shown()
    assert "Held-out accuracy and size after every round of l1" in html
    assert "Channels that the rounds of l1 removed from each layer" in html
    for text in ("did <3>", "93.70 %", "19,997", "997", "rate 0.625", "12.3", "undone"):
        assert text in page.shown()
    assert "thresholds" not in page.shown()
    section = html[html.index('id="rounds-2"') : html.index('id="layers"')]
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        for row in re.findall(r"<tr>(.*?)</tr>", section, re.S)
    ]
    assert rows[-2:] == [["stem", "11", "7"], ["head", "2", ""]]
    assert [row[5] for row in rows[1:5]] == ["", "13", "", "7"]
    assert [row[6] for row in rows[1:5]] == ["yes", "yes", "yes", "no"]


def test_without_rounds_there_is_no_such_section(html: str) -> None:
    assert "Rounds of step" not in Page(html).shown()


def test_without_spectra_there_is_no_such_section(html: str) -> None:
    assert "Spectra" not in Page(html).shown()


def stored(kind: Literal["coefficients", "dense"], size: int) -> records.Export:
    of_weights = (5_000, 9_000) if kind == "coefficients" else (0, 0)
    dct = records.DctWeights(
        stored=kind, layers=3, coefficient_bytes=of_weights[0], order_bytes=of_weights[1]
    )
    return make().export.model_copy(update={"path": f"{kind}.onnx", "bytes": size, "dct": dct})


def with_dct(**changes: Any) -> records.Report:
    """A result in two files that were timed against each other: 0.02 MB in 3.2 s, 0.11 MB in 0.1 s."""
    timed = bench(timing(1, 0.99, 1.0, 1.01), timing(8, 0.98, 0.99, 1.0, busy=True))
    slow = timed.new.model_copy(update={"load_seconds": 3.21, "load_cpu_seconds": 2.5})
    fields: dict[str, Any] = {
        "export": stored("coefficients", 20_000),
        "dense_export": stored("dense", 110_000),
        "dct_bench": timed.model_copy(update={"new": slow}),
    }
    return make(**(fields | changes))


@pytest.mark.slow
def test_two_files_of_dct_layers_stand_side_by_side() -> None:
    result = with_dct()
    page = Page(report.render_html(result)).shown()
    for text in ("How DCT layers are stored", "20.00 kB", "110.00 kB", "5.00 kB", "9.00 kB", "3.21", "2.50"):
        assert text in page
    assert "coefficients.onnx" in page and "dense.onnx" in page
    (said,) = words.describe_dct(result)
    assert said in page
    assert said == (
        "The weights of 3 layers are stored as DCT coefficients: 20.00 kB, with dense weights 110.00 kB. "
        "The gain is size, not speed: the weights are rebuilt when the file is loaded (3.21 s with 2.50 s of "
        "CPU time; dense: 0.10 s). Then it runs at this multiple of the dense file's speed: batch 1: 1.00x "
        "[0.99, 1.01]; batch 8: 1.91x [1.81, 1.99]."
    )
    labels = [row.label.strip() for row in words.comparison(result)]
    assert labels.index("with dense weights") == labels.index("ONNX file") + 1


@pytest.mark.slow
def test_one_file_of_dct_layers_says_what_it_is() -> None:
    small = with_dct(dense_export=None, dct_bench=None)
    assert words.describe_dct(small) == [
        "The weights of 3 layers are stored as DCT coefficients: 20.00 kB. The gain is size, not speed: the "
        "weights are rebuilt when the file is loaded."
    ]
    assert "How DCT layers are stored" in report.render_html(small)
    dense = make(export=stored("dense", 110_000))
    assert words.describe_dct(dense) == [
        "The weights of 3 layers with DCT coefficients are stored dense: the file gains nothing."
    ]
    assert "How DCT layers are stored" in report.render_html(dense)


def test_without_dct_layers_nothing_is_said(html: str) -> None:
    assert "DCT" not in Page(html).shown()
    assert words.describe_dct(make()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["\x00\x1b[31m", "$\\frac{$", "日本語", "a" * 400], ids=repr)
def test_an_odd_layer_name_does_not_break_the_plots(name: str) -> None:
    pairs = layer_pairs.pair_layers([layer(name, 8, 100)], [layer(name, 4, 50)])
    step = planned(name=name)
    plots = figures.plots_of(make(steps=[step], bench=None), pairs)
    assert set(plots) == {"steps", "layers"}
    start = re.escape(name[:5]) if name.isprintable() else "\N{REPLACEMENT CHARACTER}"
    assert all(re.search(rf">[2 ]*{start}", svg) for svg in plots.values())


def test_the_page_shows_the_numbers_of_the_record(html: str) -> None:
    shown = Page(html).shown()
    for number in ("1,998", "1,566", "5,442,110", "3,218,641", "97.12 %", "94.34 %", "-2.78 points"):
        assert number in shown, number
    for number in (
        "2.47 MB",
        "1.23 MB",
        "1,234,567 B",
        "4.321 ms",
        "2.345 ms",
        "4.567 ms",
        "9.876 ms",
        "321",
    ):
        assert number in shown, number
    for number in ("1.84x [1.82, 1.86]", "1.01x [0.97, 1.05]", "2.00x", "0.12", "87.5 % agree", "2.5e-15"):
        assert number in shown, number
    for text in ("64 → 48", "removed 16 of 64 channels", 'target={"macs": 0.5}', "plans/02-l1.json"):
        assert text in shown, text
    for text in ("dropped 2 nodes", "3.1e-07", "some CPU", "2.14.1", "ratio: 0.25"):
        assert text in shown, text
    assert (
        "graphcomp compile models:tiny --recipe recipe.yaml --data digits --target cpu-avx2 --seed 7" in shown
    )


@pytest.mark.usefixtures("no_plots")
def test_the_command_to_reproduce_is_quoted_for_a_shell() -> None:
    """What the data are called in reports is not what the command line takes; see test_reproduce.py."""
    recipe = {"passes": ["fold-bn"], "weights": "my weights.safetensors", "data": "npz:a b.npz"}
    shown = Page(report.render_html(make(weights="elsewhere", data="a.b (9 samples)", recipe=recipe))).shown()
    assert (
        "graphcomp compile models:tiny --recipe recipe.yaml --weights 'my weights.safetensors' "
        "--data 'npz:a b.npz' --target cpu-avx2 --seed 7 -o OUT"
    ) in shown


def test_the_terminal_table_shows_the_same_rows_and_never_reads_markup() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    with console.file:
        console.print(tables.summary_table(make(model="[red]net[/red]")))
    text = console.export_text()
    assert "[red]net[/red]: before and after" in text
    for cell in (
        "5,442,110",
        "3,218,641",
        "97.12 %",
        "[95.9, 98.0]",
        "1.84x [1.82, 1.86]",
        "2.00x",
        "2.345 ms",
    ):
        assert cell in text, cell


FELL, HELD = (BEFORE.score, AFTER.score), (BEFORE.score, snapshot([], 0.965).score)


@pytest.mark.parametrize(
    ("one", "scores", "expected", "verdict"),
    [
        (
            timing(4, 1.6, 1.68, 1.7),
            FELL,
            "Batch 4: 1.68x faster, 2.8 points less accurate (95 % interval of the speedup 1.60 to 1.70); "
            "realised 84 % of the theoretical 2.00x.",
            "mixed",
        ),
        (
            timing(4, 1.6, 1.68, 1.7),
            HELD,
            "Batch 4: 1.68x faster, as accurate within its interval (-0.62 points) "
            "(95 % interval of the speedup 1.60 to 1.70); realised 84 % of the theoretical 2.00x.",
            "good",
        ),
        (
            timing(4, 1.6, 1.68, 1.7),
            (None, None),
            "Batch 4: 1.68x faster, accuracy not measured (95 % interval of the speedup 1.60 to 1.70); "
            "realised 84 % of the theoretical 2.00x.",
            "plain",
        ),
        (
            timing(4, 0.98, 1.01, 1.05),
            FELL,
            "Batch 4: no measurable difference (1.01x the original's speed), 2.8 points less accurate "
            "(95 % interval of the speedup 0.98 to 1.05); theory says 2.00x.",
            "bad",
        ),
        (
            timing(4, 0.7, 0.74, 0.8),
            HELD,
            "Batch 4: slower (0.74x the original's speed), as accurate within its interval (-0.62 points) "
            "(95 % interval of the speedup 0.70 to 0.80); theory says 2.00x.",
            "bad",
        ),
        (
            timing(4, 0.7, 0.74, 0.8, busy=True, verdict="faster (by CPU time: the machine was busy)"),
            (BEFORE.score, BEFORE.score),
            "Batch 4: 1.91x faster (by CPU time: the machine was busy), equally accurate "
            "(95 % interval of the speedup 1.81 to 1.99); realised 96 % of the theoretical 2.00x.",
            "good",
        ),
    ],
    ids=["fast and worse", "fast", "unknown", "same and worse", "slow", "busy"],
)
def test_a_timing_in_words(one: records.BatchTiming, scores: Any, expected: str, verdict: str) -> None:
    assert words.describe_timing(one, *scores) == (expected, verdict)


@pytest.mark.slow
def test_page_and_terminal_judge_speed_and_accuracy_together(html: str) -> None:
    """A loss is never behind a green number."""
    assert re.search(r'<p class="mixed">Batch 1: 1.84x faster, 2.8 points less accurate', html)
    assert re.search(r'<p class="bad">Batch 8: no measurable difference', html)
    assert len(re.findall(r'<div class="tile mixed">', html)) == 2
    assert 'class="good"' not in html and "tile good" not in html
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    console.print(tables.summary_table(make()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\x1b\[33m *Batch 1: 1.84x faster", text) and re.search(r"\x1b\[31m *Batch 8: no", text)
    bare = make(bench=None)
    ((said, verdict),) = words.headlines(bare)
    assert said.startswith("Time not measured, 2.8 points less accurate.") and verdict == "bad"
    assert '<p class="bad">Time not measured' in report.render_html(bare)


@pytest.mark.usefixtures("no_plots")
def test_a_busy_machine_is_told_and_cpu_time_is_quoted() -> None:
    busy = make(bench=bench(timing(4, 0.7, 0.74, 0.8, busy=True, verdict="faster (by CPU time)")))
    row = words.comparison(busy)[-1]
    assert row == words.Row("CPU time, batch 4", "4.234 ms", "2.222 ms", "1.91x [1.81, 1.99]", "2.00x")
    assert "The machine was busy at batch 4" in Page(report.render_html(busy)).shown()


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("missing", [None, bench()], ids=["no bench", "no batch"])
def test_without_a_measurement_the_report_says_so(missing: records.Bench | None) -> None:
    shown = Page(report.render_html(make(bench=missing))).shown()
    assert "No time was measured" in shown
    assert "faster," not in shown
    assert [row.label for row in words.comparison(make(bench=missing))][-1] == "ONNX file"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "agreement", "reason"),
    [
        ("random", None, "the data are random and have no labels"),
        ("npz:x.npz", None, "the outputs are not those of a classifier"),
        ("npz:x.npz", 0.5, "the data (npz:x.npz) gave no labels to compare with"),
    ],
)
def test_without_accuracy_the_report_says_why(data: str, agreement: float | None, reason: str) -> None:
    bare = snapshot(BEFORE.layers)
    moved = records.Drift(relative_l2=0.1, top1_agreement=agreement)
    step = STEP.model_copy(update={"after": bare, "drift": moved})
    found = make(data=data, baseline=bare, final=bare, steps=[step])
    shown = Page(report.render_html(found)).shown()
    assert shown.count(f"Accuracy was not measured: {reason}.") == 2  # in the tile, and among the notes
    assert "top-1 accuracy, %" not in shown
    assert f"Accuracy was not measured: {reason}." in " ".join(terminal(found).split())


def terminal(found: records.Report) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    with console.file:
        console.print(tables.summary_table(found))
    return console.export_text()


@pytest.mark.slow
def test_with_accuracy_nothing_says_that_it_is_missing() -> None:
    assert "Accuracy was not measured" not in terminal(make()) + report.render_html(make())


@pytest.mark.slow
@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param(lambda x: (x.flatten(1), x.mean((1, 2))), id="two outputs"),
        pytest.param(lambda x: x, id="dense targets"),
        pytest.param(lambda x: x.mean((1, 2, 3)), id="a value"),
    ],
)
def test_networks_that_are_no_classifiers_are_told_by_what_they_yield(
    outputs: Callable[[Tensor], Any],
) -> None:
    program = traced(Net(lambda m, x: outputs(m.conv(x)), conv=nn.Conv2d(3, 4, 1)), *SHAPE)
    bare = snapshot(BEFORE.layers)
    step = STEP.model_copy(
        update={"after": bare, "drift": drift(program, program, [(torch.ones(2, *SHAPE[1:]),)])}
    )
    found = make(data="npz:x.npz", baseline=bare, final=bare, steps=[step])
    reason = "Accuracy was not measured: the outputs are not those of a classifier."
    assert reason in " ".join(terminal(found).split())
    assert Page(report.render_html(found)).shown().count(reason) == 2


def test_a_run_without_passes_layers_or_change_says_so() -> None:
    empty = snapshot([])
    page = Page(report.render_html(make(steps=[], baseline=empty, final=empty, bench=None)))
    assert "svg" not in page.tags
    for text in (
        "No pass ran",
        "No layer was recorded",
        "No pass left anything alone",
        "Nothing became smaller",
    ):
        assert text in page.shown(), text


def test_differences_within_the_interval_are_pointed_out_and_clear_losses_are_not() -> None:
    overlap = "What was measured after lies within the interval before"
    near = make(final=snapshot(AFTER.layers, 0.965))
    assert any(note.startswith(overlap) for note in words.notes(near))
    assert not any(note.startswith(overlap) for note in words.notes(make()))


def test_a_clear_loss_that_nothing_repairs_has_advice() -> None:
    fold = planned(name="fold-bn").model_copy(update={"index": 2, "drift": None})
    (said,) = words.describe_loss(make(steps=[STEP, fold]))
    assert said == (
        "Accuracy fell by 2.78 points, and nothing behind l1 repairs it: add refit, which needs neither "
        "labels nor training, or train on with finetune (in front of fold-bn), or both."
    )
    assert "in front of" not in "".join(words.describe_loss(make(steps=[STEP])))
    training = records.Training.model_construct()
    repair = planned(name="finetune").model_copy(update={"index": 2, "training": training})
    assert words.describe_loss(make(steps=[STEP, repair])) == []
    assert words.describe_loss(make(steps=[STEP, FITTED])) == []
    again = planned(name="pfa").model_copy(update={"index": 3})
    assert "behind pfa" in words.describe_loss(make(steps=[STEP, repair, again]))[0]
    assert words.describe_loss(make(steps=[fold])) == []
    assert words.describe_loss(make(final=snapshot(AFTER.layers, top1=0.965))) == []
    assert words.describe_loss(make(final=snapshot(AFTER.layers))) == []


@pytest.mark.slow
def test_factors_are_shown_with_the_layer_that_they_replace() -> None:
    before = [layer("a", 8, 1), layer("twice", 8, 2), layer("twice", 8, 3), layer("z", 8, 4)]
    after = [
        layer("a.0", 4, 5),
        layer("a.1", 8, 6),
        layer("twice", 8, 7),
        layer("twice", 8, 8),
        layer("z", 8, 9),
    ]
    html = report.render_html(make(baseline=snapshot(before), final=snapshot(after)))
    assert "8 → 4, 8" in html and "2 factors" in html and "gone" not in Page(html).shown()
    rows = re.findall(r'scope="row" class="name">([\w.]+)', html)
    assert rows[:6] == ["a", "a.0", "a.1", "twice", "twice", "z"]


@pytest.mark.slow
def test_the_layer_plot_grows_with_the_network() -> None:
    def height(n: int) -> float:
        rows = [layer(f"block{i}.conv", 8, 100) for i in range(n)]
        svg = figures.plots_of(make(steps=[], bench=None), layer_pairs.pair_layers(rows, rows))["layers"]
        assert all(f">block{i}.conv<" in svg for i in range(n))
        return float(re.findall(r'viewBox="0 0 \S+ (\S+)"', svg)[0])

    assert height(30) - height(10) > 20 * 14


def test_kept_is_grouped_by_reason_most_frequent_first() -> None:
    assert words.group_kept(make()) == [
        words.KeptGroup("too small", (("2 l1", "head2"), ("2 l1", "head3"))),
        words.KeptGroup("an output of the model", (("2 l1", "head"),)),
    ]


@pytest.mark.slow
def test_rounding_in_an_interval_does_not_break_the_plots() -> None:
    perfect = accuracy(1.0, 9, 0.7, 1.0 - 1e-12)
    snap = BEFORE.model_copy(update={"score": perfect})
    odd = timing(1, 1.5, 1.4999999, 1.6)
    assert "<svg" in report.render_html(make(baseline=snap, bench=bench(odd)))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1_000, "1 k"), (999_999, "1 M"), (4_089_184_256, "4.09 G")]
)
def test_short_numbers(value: int, text: str) -> None:
    assert words.short_text(value) == text


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_report_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    old = make()
    report.write_report(old, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(OutputError, match=r"report\.json: found 'No space left on device'"):
        report.write_report(make(seed=8), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("no_plots")
def test_a_disk_that_fills_up_at_the_second_file_leaves_both_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write_report(make(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    calls = iter([lambda descriptor: None, no_space])
    monkeypatch.setattr(os, "fsync", lambda descriptor: next(calls)(descriptor))
    with pytest.raises(OutputError, match=r"report\.html: found 'No space left on device'"):
        report.write_report(make(seed=8), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("no_plots")
def test_an_interrupt_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(make(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_plots")
def test_an_output_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OutputError, match=r"out/report\.json: found 'File exists'"):
        report.write_report(make(), tmp_path / "out")


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(LoadError, match=r"report\.json: No such file or directory"):
        report.read_report(path)
    path.write_text("{")
    with pytest.raises(LoadError, match=r"report\.json: the file: Invalid JSON"):
        report.read_report(path)
    data = json.loads(make().model_dump_json())
    path.write_text(json.dumps(data | {"seed": "many"}))
    with pytest.raises(LoadError, match=r"report\.json: seed: Input should be a valid integer"):
        report.read_report(path)
    path.write_text(json.dumps(data | {"surprise": 1}))
    with pytest.raises(LoadError, match=r"report\.json: surprise: Extra inputs are not permitted"):
        report.read_report(path)


# ---------------------------------------------------------------------- values, and damaged images


def with_errors(mae: float, low: float, high: float) -> records.Score:
    return records.Score(measure="error", value=mae, samples=360, low=low, high=high)


@pytest.mark.usefixtures("no_plots")
def test_errors_stand_where_accuracy_does() -> None:
    old, new = with_errors(0.4125, 0.39, 0.43), with_errors(0.5, 0.47, 0.53)
    before, after = (s.model_copy(update={"score": e}) for s, e in ((BEFORE, old), (AFTER, new)))
    step = STEP.model_copy(update={"after": after})
    found = make(baseline=before, final=after, steps=[step])
    row = next(r for r in words.comparison(found) if r.label == "Mean absolute error")
    assert (row.before, row.after, row.change) == ("0.4125 [0.39, 0.43]", "0.5 [0.47, 0.53]", "+21.2 %")
    page = report.render_html(found)
    assert "95 % interval 0.47 to 0.53" in page and "accuracy" not in page.partition('id="layers"')[0].lower()
    assert "Mean absolute error, where it was measured" in page
    assert any(note.startswith("The mean absolute error is on 360 samples") for note in words.notes(found))


def test_top5_has_a_row_where_both_have_one() -> None:
    high, low = (accuracy(0.5, 360, 0.4, 0.6).model_copy(update={"top5": t}) for t in (0.96, 0.9125))
    before, after = (s.model_copy(update={"score": e}) for s, e in ((BEFORE, high), (AFTER, low)))
    (row,) = (r for r in words.comparison(make(baseline=before, final=after)) if "top-5" in r.label)
    assert (row.before, row.after, row.change) == ("96.00 %", "91.25 %", "-4.75 points")
    assert not [r for r in words.comparison(make(baseline=before)) if "top-5" in r.label]


@pytest.mark.slow
def test_errors_are_drawn() -> None:
    error = with_errors(0.5, 0.47, 0.53)
    after = AFTER.model_copy(update={"score": error})
    found = make(baseline=after, final=after, steps=[STEP.model_copy(update={"after": after})])
    assert "mean absolute error" in report.render_html(found)


@pytest.mark.usefixtures("no_plots")
def test_damaged_images() -> None:
    """A row each, baseline against result; undamaged first; nothing if it was not asked for."""
    scores = [accuracy(t, 360, t - 0.02, t + 0.02) for t in (0.9, 0.75)]
    pair = [[records.CorruptedScore(corruption="occlusion", amount=0.25, score=score)] for score in scores]
    found = make(robustness=records.Robustness(baseline=pair[0], final=pair[1]))
    assert [row.label for row in words.robustness_rows(found)] == ["none", "occlusion, 25 % of the area"]
    table = tables.robustness_table(found)
    assert table is not None
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "90.00 % [88.0, 92.0]" in text and "75.00 % [73.0, 77.0]" in text and "-15.00 points" in text
    page = report.render_html(found)
    assert 'id="robustness"' in page and "occlusion, 25 % of the area" in page
    assert "-7.12 points, -19.34 points" in page  # lost to the damage
    assert tables.robustness_table(make()) is None and 'id="robustness"' not in report.render_html(make())


@pytest.mark.slow
def test_a_fit_has_a_picture_and_a_table() -> None:
    html = report.render_html(make(steps=[STEP, FITTED]))
    section = html[html.index('id="fit-3"') : html.index('id="layers"')]
    assert "from what the run&#39;s input computes there" in section and "<svg" in section
    rows = section[section.index("<tbody>") :]
    assert "body.1 (body)" in rows and "0.32" in rows and "0.081" in rows
    assert "6 rows for 27 columns are too few" in rows
    assert 'id="fit-' not in report.render_html(make(steps=[STEP]))
