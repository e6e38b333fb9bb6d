"""Tasks and studies on a cluster of two nodes, both on this machine, against one process here."""

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from graphcomp.base.workers import Tell, run_tasks
from graphcomp.compiler import results
from graphcomp.passes import PASSES
from graphcomp.records import Export
from graphcomp.study.grid import Cell, Study, expand
from graphcomp.study.run import run_study
from tests.base.test_workers import check_failures, divide, done, double, fail, train
from tests.learnable import arrays
from tests.tiny import SPEC

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
EXPORT = Export(path="model.onnx", bytes=1, opset=18, nodes=1, parity={}, cleanup=[])
STORE = 80 << 20
"""Bytes of a node's object store."""


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """Two nodes of one core each; who asks for Ray finds them by `RAY_ADDRESS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # of the workers, which import the tests
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 is for ever on a machine that others use
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its warning of what will change
        node = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield
        ours = psutil.Process().children(recursive=True)
        ray.shutdown()
        cluster.shutdown()
        assert ours and not psutil.wait_procs(ours, timeout=60)[1]  # none outlives the tests


# ---------------------------------------------------------------------- tasks


def meet(folder: Path, name: str, tell: Tell) -> str:
    """The node that this runs on; ends when another task has come as well."""
    (folder / name).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    return str(ray.get_runtime_context().get_node_id())


def test_tasks() -> None:
    """Each on the cores of one node, however many were asked for."""
    results, _ = done({"a": partial(double, 1), "fails": fail, "divides": divide}, "ray", threads=8)
    assert results["a"][:2] == (2, 1)
    check_failures(results)


def test_tasks_run_side_by_side_on_both_nodes(tmp_path: Path) -> None:
    results, _ = done({name: partial(meet, tmp_path, name) for name in "ab"}, "ray")
    assert len(set(results.values())) == 2


def test_a_task_that_is_stopped_saves_its_state_before_the_end(tmp_path: Path) -> None:
    tasks = {"ends": partial(double, 1), "trains": partial(train, tmp_path)}
    results = run_tasks(tasks, "ray", 2, 1, lambda *_: None)
    assert next(results)[0] == "ends"
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    results.close()
    assert (tmp_path / "saved").exists()


# ---------------------------------------------------------------------- a study


def cells() -> list[Cell]:
    """Two, one after the other: the first one prepares what both need."""
    passes = ["fold-bn", {"l1": {"ratio": "$ratio", "multiple": 1}}]
    recipe = {"model": SPEC, "data": "npz:d.npz", "target": "cpu-avx2", "passes": passes}
    grid = {"ratio": [0.25, 0.5]}
    return expand(Study(recipe=recipe, grid=[grid], input_shape=(1, 3, 8, 8)), PASSES)


def kill_worker(out: Path, killed: list[int], over: threading.Event) -> None:
    """Once a cell in `out` is in the middle of its passes: end the process that it runs in."""
    while not list(out.glob("cells/*/state.json")):
        if over.wait(0.01):
            return
    for process in psutil.process_iter(["name", "cmdline"]):
        if any("ray::_far" in word for word in process.info["cmdline"] or ()) and _is_ours(process):
            process.kill()
            killed.append(process.pid)


def _is_ours(process: psutil.Process) -> bool:
    """Whether a process runs in this folder, and not in another run of these tests."""
    try:
        return Path(process.cwd()) == Path.cwd()
    except psutil.Error:
        return False


def comparable(result: Any) -> dict[str, Any]:
    return result.model_dump(exclude={"seconds"})  # type: ignore[no-any-return]


def test_a_study_whose_worker_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cell fails, the other does not; run again it is finished, and all is as one process here has it."""
    monkeypatch.chdir(tmp_path)
    (x, y), (u, v) = arrays(96, 0), arrays(40, 1)
    np.savez("d.npz", x_train=x, y_train=y, x_test=u, y_test=v)
    found, out, killed, over = cells(), tmp_path / "far", list[int](), threading.Event()
    killer = threading.Thread(target=kill_worker, args=(out, killed, over))
    killer.start()
    try:
        outcome = run_study(found, out, engine="ray")
    finally:
        over.set()
        killer.join()
    assert len(killed) == 1 and killed[0] != os.getpid()
    ((name, failure),) = outcome.failures.items()
    assert "WorkerCrashedError" in failure.message and len(outcome.results) == 1
    assert "WorkerCrashedError" in (out / "cells" / f"{name}.error.txt").read_text()
    again = run_study(found, out, engine="ray")
    monkeypatch.setattr(results, "_export", lambda *_: EXPORT)  # no part of a cell's result
    local = run_study(found, tmp_path / "near")
    assert not again.failures and not local.failures
    assert {n: comparable(r) for n, r in again.results.items()} == {
        n: comparable(r) for n, r in local.results.items()
    }
    assert not list(out.glob("cells/*.error.txt"))
