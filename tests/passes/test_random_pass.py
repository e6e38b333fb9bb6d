"""random: the seed of the run decides, and nothing else."""

import numpy as np

from graphcomp.channels import analyse
from graphcomp.passes import Random
from graphcomp.pipeline.verify import TOLERANCE
from tests.running import run_pass
from tests.tiny import context, tiny_program


def rows(seed: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = Random(ratio=0.5).plan(tiny_program(), context(seed=seed)).decisions["rows"]
    return found


def test_seeded() -> None:
    assert rows(3) == rows(3)


def test_seeds_differ_and_take_as_many() -> None:
    drawn = [rows(seed) for seed in range(4)]
    assert len({str(r) for r in drawn}) == 4
    assert len({tuple(len(v) for v in r.values()) for r in drawn}) == 1


def test_leaves_the_global_generator_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    rows(1)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_weights_do_not_matter() -> None:
    program = tiny_program()
    channels = analyse(program)
    before, _ = Random(ratio=0.5).score(channels, context())
    program.tensors["stem.weight"].data.mul_(100)
    after, _ = Random(ratio=0.5).score(analyse(program), context())
    assert np.array_equal(before, after)
    assert len(before) == len(channels.channel_of)


def test_runs_verified() -> None:
    step, _, _ = run_pass(Random(ratio=0.25, multiple=1), tiny_program(), context())
    assert step.verify_error <= TOLERANCE
