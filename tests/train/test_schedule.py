"""Learning rates: exact values, torch's own schedulers as oracles."""

import math
import warnings

import pytest
import torch
from pydantic import ValidationError
from torch.optim import lr_scheduler

from graphcomp.train.schedule import Schedule


def rates(steps: int, **options: object) -> list[float]:
    schedule = Schedule(**options)  # type: ignore[arg-type]
    return [schedule.rate(step, steps) for step in range(steps)]


def optimiser() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.4)


def torch_rates(made: lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(made.optimizer.param_groups[0]["lr"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedulers that step before their optimiser
            made.step()
    return found


def test_constant() -> None:
    assert rates(5, lr=0.3, schedule="constant") == [0.3] * 5


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_cosine_is_torchs(steps: int) -> None:
    expected = torch_rates(lr_scheduler.CosineAnnealingLR(optimiser(), steps), steps)
    assert rates(steps, lr=0.4, schedule="cosine") == pytest.approx(expected, rel=1e-9)


def test_cosine_by_hand() -> None:
    assert rates(4, lr=1.0) == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_steps_at_half_and_three_quarters() -> None:
    """CC's official set-up (METHODS 1.6): 300 epochs, a tenth at 150 and at 225."""
    found = rates(300, lr=0.1, schedule="step")
    expected = torch_rates(lr_scheduler.MultiStepLR(optimiser(), [150, 225]), 300)
    assert found == pytest.approx([r / 4 for r in expected])
    assert [found[149], found[150], found[224], found[225]] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_one_milestone() -> None:
    """METHODS 4.7: 20 epochs, a tenth from epoch 15 on."""
    found = rates(20, lr=1e-3, schedule="step", milestones=(0.75,))
    assert found == pytest.approx([1e-3] * 15 + [1e-4] * 5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 97])
def test_one_cycle_is_torchs(steps: int) -> None:
    made = lr_scheduler.OneCycleLR(optimiser(), 0.4, total_steps=steps, cycle_momentum=False)
    expected = [*torch_rates(made, steps - 1), made.optimizer.param_groups[0]["lr"]]
    assert rates(steps, lr=0.4, schedule="one-cycle") == pytest.approx(expected, rel=1e-9)


def test_warmup_rises_to_the_peak_and_goes_on() -> None:
    found = rates(10, lr=1.0, schedule="constant", warmup=0.4)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 6)
    cosine = rates(10, lr=1.0, schedule="cosine", warmup=0.4)
    assert cosine[:4] == found[:4] and cosine[4:] == pytest.approx(rates(6, lr=1.0, schedule="cosine"))


def test_steps_count_from_the_beginning_with_warmup() -> None:
    found = rates(10, lr=1.0, schedule="step", warmup=0.2, milestones=(0.5,))
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1] + [0.1] * 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0}, "greater than 0"),
        ({"milestones": (150,)}, "less than 1"),
        ({"schedule": "cosin"}, "'cosine'"),
        ({"schedule": "one-cycle", "warmup": 0.1}, "which has its own"),
    ],
)
def test_bad_options(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Schedule(**options)  # type: ignore[arg-type]
