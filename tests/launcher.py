"""What `tests/base/test_distributed.py` does in two processes: `python -m tests.launcher FOLDER`.

An interpreter of its own, because it forks: graphcomp is imported once, not once a process and scenario.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from graphcomp.base import distributed
from graphcomp.base.cache import VARIABLE
from graphcomp.budget.stopwatch import Stopwatch
from graphcomp.cli import main as command_line
from graphcomp.data.split import Data
from graphcomp.errors import DataError, DistributedError, GraphcompError
from graphcomp.ir.program import Program
from graphcomp.measure import calibrate, gradients
from graphcomp.measure.statistics import Covariance, Request, Statistic
from graphcomp.passes import L1, LowRank
from graphcomp.pipeline import Context, Pass
from graphcomp.records import Plan
from tests.running import run_pass
from tests.stopwatch import Machine
from tests.tiny import SPEC, context, random_data, tiny_program, traced

REQUESTS = [Request("stem", "covariance"), Request("relu", "zeros"), Request("fc", "covariance")]
SAMPLES = (61, 5)
"""Batches of 8: four for each process, the last one smaller; and one only."""
COMPILE = ["compile", SPEC, "--input-shape", "1,3,8,8", "--passes", "fold-bn, apoz{ratio=0.5}"]
COMPILE += ["--data", "random", "--target", "cpu-avx2", "--no-bench", "-o", "out"]
LABELLED = "labelled.npz"
"""In the folder, for what needs labels."""
CC = "cc{rate=0.3, multiple=1, samples=61}"
"""Of 72 samples; 8 at a time, so both processes have some, and the last batch is smaller."""


def statistics(samples: int) -> list[list[torch.Tensor]]:
    """Of the tiny network's nodes."""
    found = calibrate.collect(tiny_program(), random_data(3, 8, 8).train, REQUESTS, samples=samples, batch=8)
    return [tensors(found[r]) for r in REQUESTS]


def tensors(statistic: Statistic) -> list[torch.Tensor]:
    if isinstance(statistic, Covariance):
        return [torch.tensor(statistic.samples), statistic.mean, statistic.matrix]
    return [statistic.zeros, torch.tensor(statistic.entries)]


def labelled_data() -> Data:
    """Half of the labels are what the tiny network says."""
    data = random_data(3, 8, 8)
    with torch.no_grad():
        labels = torch.cat([tiny_program()(x).argmax(1) for (x,), _ in data.eval.batches(64)])
    labels[::2] = (labels[::2] + 1) % 4
    return replace(data, eval=replace(data.eval, labels=labels, labelled=True))


def wide(width: int = 64) -> Program:
    """Two layers of as many channels between inputs and outputs that stay; quick to export."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = ((4, width, 1), (width, width, 3), (width, 4, 1))
        return traced(nn.Sequential(*(nn.Conv2d(a, b, k) for a, b, k in sizes)), 1, 4, 8, 8)


TIMED: dict[str, Pass] = {
    "l1 by latency": L1(target={"latency": 0.5}),
    "l1, what pays": L1(ratio=0.05, multiple=1),
    "low-rank by latency": LowRank(target={"latency": 0.85}),
    "low-rank, what pays": LowRank(rank=18, multiple=1),
}
"""Passes that measure times, the channels by both ways of doing so, and the layers."""
IMPOSSIBLE = L1(target={"latency": "600ms"})
"""Of a network that takes less by the first stopwatch, and more by the second one."""


def quickly(_: Stopwatch, program: Program, name: str) -> bytes:
    """A chain of convolutions as ONNX without the exporter, which takes seconds; in place of `_exported`."""
    nodes, weights, value = [], [], "input"
    for node in program.graph.nodes:
        if node.op == "call_module":
            weight = program.tensors[f"{node.target}.weight"].detach().numpy()
            weights.append(numpy_helper.from_array(weight, f"{node.name}.w"))
            inputs = [value, f"{node.name}.w"]
            nodes.append(helper.make_node("Conv", inputs, [node.name], kernel_shape=weight.shape[2:]))
            value = node.name
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("input", program.example_inputs[0].shape), (value, None))
    ]
    graph = helper.make_graph(nodes, "whole", ends[:1], ends[1:], weights)
    return bytes(helper.make_model(graph).SerializeToString())


def disagreeing(rank: int) -> Machine:
    """The stopwatch of a process: by the first one odd widths take long, by the second one every operator."""
    return Machine(launch=0.0, odd=50.0) if rank == 0 else Machine(slower=2.0, launch=60.0)


def timed(rank: int) -> tuple[Machine, Context]:
    """A run that measures, by the stopwatch of `rank`."""
    machine = disagreeing(rank)
    return machine, replace(context(), timer=machine, timed=True)


class Undecided:
    """A pass that decides something else in every process."""

    name: ClassVar[str] = "undecided"

    def plan(self, program: Program, _: Any) -> Plan:
        return Plan(name=self.name, decisions={"rank": distributed.rank()})

    def simulate(self, program: Program, plan: Plan) -> Program:
        return program

    rewrite = simulate


class Careless:
    """A pass that lets every process measure for itself."""

    name: ClassVar[str] = "careless"

    def plan(self, program: Program, context: Context) -> Plan:
        return Plan(name=self.name, decisions={"ms": context.clock.stopwatch(program).milliseconds()})

    def simulate(self, program: Program, plan: Plan) -> Program:
        return program

    rewrite = simulate


# ---------------------------------------------------------------------- scenarios: what each process does


def together() -> None:
    """Everything that both do in a session, for the test to compare."""
    with distributed.session():
        accuracy = context(labelled_data()).evaluate(tiny_program())
        assert accuracy is not None
        found = {
            "rank": distributed.rank(),
            "device": str(distributed.device()),
            "statistics": [statistics(n) for n in SAMPLES],
            "share": [distributed.share(n, 8).tolist() for n in (*SAMPLES, 0)],
            "accuracy": accuracy.model_dump(),
            "decisions": run_pass(Undecided(), tiny_program(), context())[1].decisions,
            "on_first": distributed.on_first(lambda: f"made by {distributed.rank()}"),
            "passes": cached(),
        }
        torch.save(found, f"found.{distributed.rank()}")
    assert distributed.world_size() == 1


def stopwatches() -> None:
    """What passes decide by times, where the two processes would measure different ones."""
    Stopwatch._exported = quickly  # type: ignore[method-assign]
    with distributed.session():
        machine, where = timed(distributed.rank())
        found: dict[str, Any] = {"fingerprints": {}, "evidence": {}, "errors": []}
        for name, pass_ in TIMED.items():
            _, plan, result = run_pass(pass_, wide(), where)
            found["fingerprints"][name] = result.fingerprint()
            found["evidence"][name] = json.dumps(plan.evidence)
        found["asked"] = machine.asked
        for pass_ in (IMPOSSIBLE, Careless()):
            try:
                run_pass(pass_, wide(), where)
            except GraphcompError as error:
                found["errors"].append(f"{type(error).__name__}: {error}")
                if isinstance(error, DistributedError):
                    return
            finally:
                torch.save(found, f"times.{distributed.rank()}")


def cached() -> list[int]:
    """How many passes over the data this process has made after the first and after the second call."""
    done: list[int] = []
    measure = calibrate._measure

    def counting(*args: Any) -> Any:
        done.append(1)
        return measure(*args)

    calibrate._measure = counting
    counts = []
    for _ in range(2):
        calibrate.collect(tiny_program(), random_data(3, 8, 8).train, REQUESTS)
        counts.append(len(done))
    calibrate._measure = measure
    return counts


def graphcomp(*arguments: str) -> None:
    sys.argv = ["graphcomp", *arguments]
    command_line.main()


def compiles() -> None:
    graphcomp(*COMPILE)


def compiles_cc() -> None:
    gradients.BATCH = 8
    graphcomp(*COMPILE, "--passes", CC, "--data", f"npz:{LABELLED}", "-o", "cc")


def fails_in_the_first() -> None:
    Path("taken").touch()
    graphcomp(*COMPILE, "-o", "taken")


def fails_in_both() -> None:
    graphcomp(*COMPILE, "--weights", "absent.pt")


def in_the_second(do: Callable[[], None]) -> None:
    """Compile, and in the second process do something else in the middle of it."""

    def instead(*_: Any) -> Any:
        return do() if distributed.rank() else measure(*_)

    os.environ[VARIABLE] = ""  # there would be nothing to do
    measure, calibrate._measure = calibrate._measure, instead
    graphcomp(*COMPILE, "-o", do.__qualname__.partition(".")[0])


def fails_in_the_second() -> None:
    def fail() -> None:
        raise DataError("the second process: found no data, expected some")

    in_the_second(fail)


def has_a_bug_in_the_second() -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    in_the_second(fail)


def loses_the_second() -> None:
    in_the_second(lambda: os.kill(os.getpid(), signal.SIGKILL))


def another_command() -> None:
    graphcomp("passes")


def wrong_usage() -> None:
    graphcomp("compile", "--nonsense")


SCENARIOS = [
    together,
    stopwatches,
    compiles,
    compiles_cc,
    fails_in_the_first,
    fails_in_both,
    fails_in_the_second,
    has_a_bug_in_the_second,
    loses_the_second,
    another_command,
    wrong_usage,
]
UNATTENDED = [loses_the_second]
"""Without an agent that would end the first process when the second is gone."""


# ---------------------------------------------------------------------- starting processes


def scenario(index: int, folder: Path) -> None:
    """Run one in this process, with what it prints in files of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's own handler was forked as well
    torch.set_num_threads(1)
    name = SCENARIOS[index].__name__
    for stream in (sys.stdout, sys.stderr):
        file = folder / f"{name}.{os.environ['RANK']}.{stream.name.strip('<>')}"
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), stream.fileno())
    os.chdir(folder)
    try:
        SCENARIOS[index]()
    except Exception:  # as the interpreter does for a script
        traceback.print_exc()
        sys.exit(1)


def as_torchrun(index: int, folder: Path) -> str:
    """Two processes under torchrun's agent."""
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    config.max_restarts, config.monitor_interval = 0, 0.05
    try:
        elastic_launch(config, scenario)(index, folder)
    except ChildFailedError as error:
        return f"failed {error.get_first_failure()[1].exitcode}"
    return "done"


def by_hand(index: int, folder: Path) -> str:
    """Two processes that nobody looks after; how the first one ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    children = [_forked(rank, index, folder) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return f"failed {codes[0]}" if codes[0] else "done"


def _forked(rank: int, index: int, folder: Path) -> int:
    child = os.fork()
    if not child:
        code = 1
        try:
            os.environ["RANK"] = str(rank)
            scenario(index, folder)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)  # without going back to what the parent does
    return child


def main(folder: Path) -> None:
    """Run every scenario; how each ended goes to files named after them."""
    signal.alarm(600)  # rather than hang
    for index, function in enumerate(SCENARIOS):
        start = by_hand if function in UNATTENDED else as_torchrun
        (folder / f"{function.__name__}.end").write_text(start(index, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
