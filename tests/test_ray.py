"""Tasks on a cluster of two nodes, both on this machine."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from graphcomp.workers import Failure, Tell, run_tasks
from tests.test_workers import check_failures, die, divide, done, double, fail, train

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
