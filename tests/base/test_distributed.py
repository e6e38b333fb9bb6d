"""Two real processes against one: the same statistics and plans, one voice, one message when something fails.

They run in `tests/launcher.py`, under torchrun's own agent.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from graphcomp.base import distributed
from graphcomp.base.cache import VARIABLE
from graphcomp.budget.stopwatch import Stopwatch
from graphcomp.compiler.recipe import parse_passes
from graphcomp.data.sources import load_data
from graphcomp.errors import DistributedError, GraphcompWarning
from graphcomp.ir import load
from graphcomp.passes import PASSES, APoZ, FoldBN
from graphcomp.pipeline import Pipeline
from graphcomp.pipeline.verify import difference
from tests.launcher import (
    CC,
    IMPOSSIBLE,
    LABELLED,
    SAMPLES,
    SCENARIOS,
    TIMED,
    labelled_data,
    quickly,
    statistics,
    timed,
    wide,
)
from tests.running import run_pass
from tests.tiny import context, random_data, tiny_program

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="the launcher forks")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scenarios left what they printed and found."""
    place = tmp_path_factory.mktemp("two")
    rng = np.random.RandomState(0)
    labels = np.arange(144) % 4
    np.savez(place / LABELLED, x=rng.standard_normal((144, 3, 8, 8)).astype(np.float32), y=labels)
    environment = {**os.environ, VARIABLE: str(place / "cache"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "tests.launcher", str(place)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=700)
    assert run.returncode == 0, run.stderr
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two processes of a session computed."""
    assert outcome(folder, "together") == "done", printed(folder, "together")
    first, second = (torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(2))
    return first, second


def outcome(folder: Path, name: str) -> str:
    assert name in [function.__name__ for function in SCENARIOS]
    return (folder / f"{name}.end").read_text()


def printed(folder: Path, name: str, stream: str = "stderr") -> tuple[str, str]:
    """By the first and by the second process."""
    first, second = ((folder / f"{name}.{rank}.{stream}").read_text() for rank in range(2))
    return first, second


# ---------------------------------------------------------------------- what is computed


def test_statistics_are_those_of_one_process(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """To 1e-10, also where a process has a smaller last batch, and where it has no samples at all."""
    for samples, mine, others in zip(SAMPLES, *(f["statistics"] for f in found), strict=True):
        for one, first, second in zip(statistics(samples), mine, others, strict=True):
            for a, b, c in zip(one, first, second, strict=True):
                assert a.dtype == b.dtype and torch.equal(b, c)
                assert torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-10 * float(a.abs().max()))


def test_every_sample_is_seen_by_one_process(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """In whole batches of 8, in turn."""
    for samples, first, second in zip((*SAMPLES, 0), *(f["share"] for f in found), strict=True):
        assert sorted(first + second) == list(range(samples))
        assert all(p // 8 % 2 == 0 for p in first) and all(p // 8 % 2 == 1 for p in second)


def test_accuracy_is_that_of_one_process(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    alone = context(labelled_data()).evaluate(tiny_program())
    assert alone is not None and alone.value == 0.5
    assert found[0]["accuracy"] == found[1]["accuracy"] == alone.model_dump()


def test_the_first_process_decides(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert [f["rank"] for f in found] == [0, 1]
    assert [f["decisions"] for f in found] == [{"rank": 0}] * 2
    assert [f["on_first"] for f in found] == ["made by 0"] * 2


def test_processes_agree_on_what_the_cache_has(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """One pass over the data for both calls, in both processes."""
    assert [f["passes"] for f in found] == [[1, 1], [1, 1]]


def test_without_gpus_they_compute_on_the_cpu(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    if torch.cuda.device_count() < 2:
        assert [f["device"] for f in found] == ["cpu"] * 2


# ---------------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def times(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of it in the two processes, whose stopwatches disagree."""
    first, second = (torch.load(folder / f"times.{rank}", weights_only=True) for rank in range(2))
    return first, second


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """Fingerprint and evidence of the same in a single process, with the first and with the second stopwatch.

    In the order in which the two processes run them: predictions rest on what was measured before.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphcompWarning)  # the second one alone misses its target
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("alone")))
        patch.setattr(Stopwatch, "_exported", quickly)
        found = {n: [run_pass(p, wide(), timed(rank)[1]) for rank in range(2)] for n, p in TIMED.items()}
    return {n: [(p.fingerprint(), json.dumps(plan.evidence)) for _, plan, p in f] for n, f in found.items()}


@pytest.mark.parametrize("name", TIMED)
def test_one_process_measures_and_all_use_it(
    times: tuple[dict[str, Any], dict[str, Any]], name: str, alone: dict[str, list[tuple[str, str]]]
) -> None:
    """The program, and what the plan says, of a single process with the first one's stopwatch."""
    first, second = alone[name]
    assert first[0] != second[0], "the two stopwatches have to lead to different programs"
    assert [(f["fingerprints"][name], f["evidence"][name]) for f in times] == [first] * 2


def test_the_others_do_not_measure(times: tuple[dict[str, Any], dict[str, Any]]) -> None:
    first, second = times
    assert first["asked"] > 0 and second["asked"] == 0


def test_a_failed_measurement_fails_in_all(
    times: tuple[dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same words; the second process's stopwatch would not have failed."""
    monkeypatch.setattr(Stopwatch, "_exported", quickly)
    first, second = times
    assert first["errors"][0] == second["errors"][0]
    assert "PassError: target latency: found" in first["errors"][0]
    assert run_pass(IMPOSSIBLE, wide(), timed(1)[1])[2].history


def test_measuring_without_asking_the_others_is_refused(
    times: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    assert "stopwatch: found it in process 1 of 2, expected the first one only" in times[1]["errors"][1]


# ---------------------------------------------------------------------- a whole run


def test_compile_gives_what_one_process_gives(folder: Path) -> None:
    assert outcome(folder, "compiles") == "done", printed(folder, "compiles")
    pipeline = Pipeline([FoldBN(), APoZ(ratio=0.5)])
    alone, _ = pipeline.run(tiny_program(), context(random_data(3, 8, 8)))
    program = load(folder / "out" / "program")
    assert program.history == alone.history
    assert difference(program, alone) == 0


def test_cc_gives_what_one_process_gives(folder: Path) -> None:
    """Gradients of both halves of the samples, one decision, the same weights."""
    assert outcome(folder, "compiles_cc") == "done", printed(folder, "compiles_cc")
    data = load_data(f"npz:{folder / LABELLED}", input_shape=(3, 8, 8), seed=0)
    (pass_,) = parse_passes(CC, PASSES)
    _, plan, alone = run_pass(pass_, tiny_program(), context(data))
    program = load(folder / "cc" / "program")
    (record,) = program.history
    assert len(plan.decisions["factors"]) == 2
    assert record["decisions"] == plan.decisions
    for one, both in zip(plan.evidence["layers"], record["evidence"]["layers"], strict=True):
        assert both["removed"] == one["removed"] and both["rate"] == pytest.approx(one["rate"], rel=1e-4)
    assert difference(program, alone) == 0
    seen = [printed(folder, "compiles_cc")[rank].count("of 61 samples") for rank in range(2)]
    assert seen[0] > 0 and seen[1] == 0


def test_one_process_prints_and_writes(folder: Path) -> None:
    out, err = printed(folder, "compiles", "stdout"), printed(folder, "compiles")
    assert out[0].count("results in out") == 1 and "2. apoz: removed 8" in out[0]
    assert err[0].count("100%  done") == 1 and err[0].count("calibrate: 64 of 64 samples") == 1
    assert out[1] == err[1] == ""
    assert {p.name for p in (folder / "out" / "plans").iterdir()} == {"01-fold-bn.json", "02-apoz.json"}


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails_in_the_first", "/taken: found a file, expected a directory"),
        ("fails_in_both", "error: absent.pt: found no such file"),
        (
            "fails_in_the_second",
            "error: pass 'apoz' failed after trace > fold-bn: the second process: found no data",
        ),
        ("has_a_bug_in_the_second", "ZeroDivisionError: a bug"),
        ("another_command", "error: graphcomp passes: found 2 processes, expected one"),
        ("wrong_usage", "No such option: --nonsense"),
    ],
)
def test_a_failure_ends_all_and_is_told_once(folder: Path, name: str, message: str) -> None:
    assert outcome(folder, name) == ("failed 2" if name == "wrong_usage" else "failed 1")
    everything = "".join(printed(folder, name))
    assert everything.count(message) == 1, everything
    assert everything.count("error:") + everything.count("Error: ") + everything.count("Error ─") == 1, (
        everything
    )
    assert "results in" not in "".join(printed(folder, name, "stdout"))


def test_a_lost_process_is_noticed(folder: Path) -> None:
    """Killed, so that it says nothing itself."""
    assert outcome(folder, "loses_the_second") == "failed 1"
    first, second = printed(folder, "loses_the_second")
    assert first.count("process 0 of 2: found no answer from another process") == 1
    assert second == ""


# ---------------------------------------------------------------------- one process


def test_alone_nothing_is_communicated() -> None:
    sums = [torch.arange(3)]
    distributed.all_reduce(sums)
    with distributed.session():
        assert not dist.is_initialized()
    assert sums[0].tolist() == [0, 1, 2]
    assert distributed.broadcast("value") == distributed.on_first(lambda: "value") == "value"
    assert (distributed.rank(), distributed.world_size(), distributed.is_first()) == (0, 1, True)
    assert distributed.share(5, 2).tolist() == [0, 1, 2, 3, 4]
    assert distributed.device() == torch.device("cpu") and distributed.is_first_to_fail()


@pytest.fixture
def no_group() -> Iterator[None]:
    yield
    distributed.leave()
    assert not dist.is_initialized()


def test_nobody_to_meet(monkeypatch: pytest.MonkeyPatch, no_group: None) -> None:
    """The other process never comes."""
    monkeypatch.setattr(distributed, "MEETING", distributed.MEETING * 0)
    for name, value in zip(distributed.VARIABLES, ("1", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        DistributedError, match=r"processes: found .* at RANK=1, .*expected all to meet there"
    ):
        distributed.join()


def test_a_group_of_the_callers_own_is_used_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in distributed.VARIABLES:
        monkeypatch.setenv(name, "1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with distributed.session():
            assert distributed.world_size() == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
