"""The loop: optimisers and averages, states to go on from, messages, and nets of every kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphcomp.channels import analyse
from graphcomp.data.augment import CropAndFlip
from graphcomp.data.split import Split
from graphcomp.errors import LoadError, PassError
from graphcomp.ir.program import output_tensors
from graphcomp.pipeline.verify import check
from graphcomp.train import loop
from graphcomp.train.loop import Average, make_optimizer
from graphcomp.train.options import Seen, cross_entropy
from graphcomp.train.training import Fitted, fit
from tests.learnable import make_split, normalised_net, plain_net, same
from tests.nets import TRAPS
from tests.removing import exact_program, half, random_scores
from tests.tiny import traced
from tests.training import Stops, options, trained


def test_decay_of_weights_alone() -> None:
    tensors = {n: t for n, t in normalised_net().tensors.items() if t.requires_grad}
    groups = make_optimizer(options(decay="weights", weight_decay=0.1), tensors).param_groups
    found = [({t.ndim for t in g["params"]}, g["weight_decay"]) for g in groups]
    assert found == [({2, 4}, 0.1), ({1}, 0.0)]
    assert sum(len(g["params"]) for g in groups) == len(tensors)
    (every,) = make_optimizer(options(weight_decay=0.1), tensors).param_groups
    assert every["weight_decay"] == 0.1 and len(every["params"]) == len(tensors)


def test_average_by_hand() -> None:
    """shadow_t = d_t shadow + (1 - d_t) w_t with d_t = min(decay, (1 + t) / (10 + t))."""
    average = Average(0.5, {"w": torch.tensor(0.0), "n": torch.tensor(0)})
    shadow = 0.0
    for step in range(1, 20):
        value = float(step * step)
        average.update({"w": torch.tensor(value), "n": torch.tensor(step)}, step)
        decay = min(0.5, (1 + step) / (10 + step))
        shadow = decay * shadow + (1 - decay) * value
        assert float(average.tensors["w"]) == pytest.approx(shadow, rel=1e-6)
        assert int(average.tensors["n"]) == step


def test_progress() -> None:
    told: list[tuple[str, float]] = []
    fit(
        normalised_net(), make_split(), options(), held_out=make_split(40, 2),
        progress=lambda message, fraction: told.append((message, fraction)),
    )  # fmt: skip
    ends = [message for message, _ in told if "]: " in message]
    assert len(ends) == 2 and ends[0].startswith("epoch [1/2]: loss ") and ends[0].endswith(" left")
    assert ", held-out " in ends[1] and ends[1].endswith("0:00 left")
    assert "epoch [1/2], step 1/4, loss " in told[0][0]
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1


# ---------------------------------------------------------------------- interruptions


EVERYTHING = {
    "ema": 0.9,
    "clip": 1.0,
    "accumulate": 2,
    "warmup": 0.2,
    "epochs": 3,
    "bn_reestimate": 48,
    "layout": "channels_last",
}


def resumable(
    state: Path | None, stop_at: int | None = None, told: list[str] | None = None, **changes: Any
) -> Fitted:
    loss = cross_entropy() if stop_at is None else Stops(stop_at * 2)
    made = options(**EVERYTHING, **changes)
    return fit(
        normalised_net(dropout=0.3), make_split(), made, held_out=make_split(40, 2), loss=loss,
        augmentation=CropAndFlip(1), state=state, seed=5,
        progress=lambda message, fraction: (told if told is not None else []).append(message),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, optimizer: str, keep: str) -> None:
    """To the last bit; stopped in the middle of epochs, at the end of one, and in the very last step."""
    state, whole = tmp_path / "state", resumable(None, optimizer=optimizer, keep=keep)
    for stop_at in (1, 1, 3, 2, 0):
        with pytest.raises(KeyboardInterrupt, match="stopped after step"):
            resumable(state, stop_at, optimizer=optimizer, keep=keep)
    told: list[str] = []
    resumed = resumable(state, optimizer=optimizer, keep=keep, told=told)
    assert told[0] == "goes on after step 12 of 12"
    assert same(resumed.program, whole.program)
    assert resumed.record.resumed == 5 and whole.record.resumed == 0
    untimed = {"epochs": {"__all__": {"seconds"}}}
    for record in (resumed.record, whole.record):
        assert record.kept_epoch == whole.record.kept_epoch
        assert record.held_out == whole.record.held_out
    left, right = (
        r.record.model_dump(exclude={**untimed, "seconds": True, "samples_per_second": True, "resumed": True})
        for r in (resumed, whole)
    )
    assert left == right


def test_a_stop_says_how_to_go_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt) as stopped:
        resumable(state, 5)
    assert str(stopped.value) == (
        f"stopped after step 6 of 12 (epoch 2 of 3); its state is in {state}: the same command with --resume "
        "goes on from there"
    )
    with pytest.raises(KeyboardInterrupt, match="nothing was saved"):
        resumable(None, 5)


def test_a_finished_state_costs_nothing(tmp_path: Path) -> None:
    """Killed between the end of the training and what comes after it."""
    first = resumable(tmp_path / "state")

    def never(seen: Seen) -> Tensor:
        raise AssertionError("a step was taken")

    again = fit(
        normalised_net(dropout=0.3), make_split(), options(**EVERYTHING), held_out=make_split(40, 2),
        loss=never, augmentation=CropAndFlip(1), state=tmp_path / "state", seed=5,
    )  # fmt: skip
    assert same(first.program, again.program)


def test_saved_at_every_epoch_and_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death without a word loses at most the running epoch, or less if that is long."""
    for seconds, at in ((1e9, 4), (0.0, 6)):
        monkeypatch.setattr(loop, "SAVE_SECONDS", seconds)
        state, left = tmp_path / f"state{at}", [6]

        def dies(seen: Seen, left: list[int] = left) -> Tensor:
            if left[0] == 0:
                raise MemoryError
            left[0] -= 1
            return cross_entropy()(seen)

        with pytest.raises(MemoryError):
            fit(normalised_net(), make_split(), options(), loss=dies, state=state)
        seen: list[str] = []
        resumed = fit(
            normalised_net(), make_split(), options(), state=state,
            progress=lambda message, fraction, seen=seen: seen.append(message),
        )  # fmt: skip
        assert same(resumed.program, trained()) and resumed.record.epochs[-1].steps == 8
        assert resumed.record.resumed == 1


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.06}, {"seed": 6}, {"samples": 95}, {"program": plain_net}, {"held": 41}],
    ids=lambda c: next(iter(c)),
)
def test_state_of_another_training_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    state = tmp_path / "state"

    def run(lr: float = 0.05, seed: int = 0, samples: int = 96, held: int = 40, program: Any = None) -> None:
        split, held_out = make_split(samples), make_split(held, 2)
        made = options(lr=lr, epochs=1)
        fit((program or normalised_net)(), split, made, held_out=held_out, state=state, seed=seed)

    run()
    with pytest.raises(LoadError, match="the state of another training"):
        run(**change)


# ---------------------------------------------------------------------- after surgery


@pytest.mark.parametrize("name", sorted(TRAPS.keys() - {"frozen-weights"}))
def test_t0_8_one_step_after_a_removal(name: str) -> None:
    """T0.8: nets of one trap each, half of their channels gone, take a step; no state of the old shapes."""
    program = exact_program(TRAPS[name]())
    channels = analyse(program)
    drop, _ = half(channels).feasible(random_scores(channels))
    smaller = drop.apply("test")
    inputs = torch.randn((4, *program.example_inputs[0].shape[1:]), dtype=torch.float64)
    split = Split(
        torch.zeros(4, dtype=torch.int64), np.arange(4), lambda i: (inputs[torch.from_numpy(i)],), False
    )

    def loss(seen: Seen) -> Tensor:
        return sum((t.square().mean() for t in output_tensors(seen.outputs)), torch.zeros(()))

    found = fit(smaller, split, options(epochs=1, lr=1e-6), loss=loss).program
    check(found)
    assert str(found) == str(smaller) and not same(found, smaller)


def test_one_sample_to_normalise() -> None:
    """A linear layer's outputs of one sample have no variance."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)
    )
    with pytest.raises(
        PassError, match=r"found one sample to normalise .* larger batch or a smaller accumulate"
    ):
        fit(traced(net, 1, 3, 8, 8), make_split(), options(batch=2, accumulate=2))
