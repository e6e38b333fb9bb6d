"""Tasks and studies on a cluster of two nodes, both on this machine, against the pool of processes here."""

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

from graphcomp.passes import PASSES
from graphcomp.study import Cell, Study, expand
from graphcomp.study_run import run_study
from graphcomp.workers import Failure, Tell, run_tasks
from tests.learnable import arrays
from tests.test_workers import check_failures, die, divide, done, double, fail, train
from tests.tiny import SPEC

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
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
        ray.shutdown()
        cluster.shutdown()


# ---------------------------------------------------------------------- tasks


def meet(folder: Path, name: str, tell: Tell) -> str:
    """The node that this runs on; ends when another task has come as well."""
    (folder / name).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    return str(ray.get_runtime_context().get_node_id())


def test_tasks() -> None:
    results, _ = done({"a": partial(double, 1), "fails": fail, "divides": divide, "dies": die}, "ray")
    assert results["a"][:2] == (2, 1)
    check_failures(results)
    assert isinstance(results["dies"], Failure) and "WorkerCrashedError" in results["dies"].message


def test_tasks_run_side_by_side_on_both_nodes(tmp_path: Path) -> None:
    results, _ = done({name: partial(meet, tmp_path, name) for name in "ab"}, "ray")
    assert len(set(results.values())) == 2


def test_a_task_that_is_stopped_saves_its_state_before_the_end(tmp_path: Path) -> None:
    results = run_tasks({"dies": die, "trains": partial(train, tmp_path)}, "ray", 2, 1, lambda *_: None)
    assert next(results)[0] == "dies"
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


def kill_worker(out: Path, killed: list[int]) -> None:
    """Once a cell in `out` is in the middle of its passes: end the process that it runs in."""
    while not list(out.glob("cells/*/state.json")):
        time.sleep(0.01)
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
    """One cell fails, the other does not; run again it is finished, and all is as the local pool has it."""
    monkeypatch.chdir(tmp_path)
    (x, y), (u, v) = arrays(96, 0), arrays(40, 1)
    np.savez("d.npz", x_train=x, y_train=y, x_test=u, y_test=v)
    found, out, killed = cells(), Path("far"), list[int]()
    killer = threading.Thread(target=kill_worker, args=(out, killed))
    killer.start()
    outcome = run_study(found, out, engine="ray")
    killer.join()
    assert len(killed) == 1 and killed[0] != os.getpid()
    ((name, failure),) = outcome.failures.items()
    assert "WorkerCrashedError" in failure.message and len(outcome.results) == 1
    assert "WorkerCrashedError" in (out / "cells" / f"{name}.error.txt").read_text()
    again = run_study(found, out, engine="ray")
    local = run_study(found, Path("near"), workers=2)
    assert not again.failures and not local.failures
    assert {n: comparable(r) for n, r in again.results.items()} == {
        n: comparable(r) for n, r in local.results.items()
    }
    assert not list(out.glob("cells/*.error.txt"))
