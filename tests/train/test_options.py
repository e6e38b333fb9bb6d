"""Options of a training: counts, defaults, what is refused, and the usual loss and score."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from graphcomp.train.network import Mode
from graphcomp.train.options import Seen, TrainOptions, cross_entropy, is_correct


@pytest.mark.parametrize(
    ("options", "samples", "steps"),
    [
        ({"epochs": 3, "batch": 128}, 50_000, 3 * 391),
        ({"epochs": 3, "batch": 128}, 128, 3),
        ({"epochs": 3, "batch": 128}, 5, 3),
        ({"epochs": 3, "batch": 128, "max_steps": 100}, 50_000, 100),
        ({"epochs": 1, "batch": 128, "max_steps": 1000}, 50_000, 391),
        ({"epochs": 0}, 50_000, 0),
    ],
)
def test_steps(options: dict[str, int], samples: int, steps: int) -> None:
    assert TrainOptions(**options).steps(samples) == steps


def test_modes_to_choose_from() -> None:
    plain, wide = Mode(), Mode("float32", "channels_last")
    half, half_wide = Mode("bf16", "contiguous"), Mode("bf16", "channels_last")
    assert TrainOptions().modes() == [plain, wide, half_wide]
    assert TrainOptions(precision="float32").modes() == [plain, wide]
    assert TrainOptions(precision="bf16").modes() == [half_wide, half]
    assert TrainOptions(layout="contiguous").modes() == [plain, half]
    assert TrainOptions(precision="bf16", layout="contiguous").modes() == [half]


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1},
        {"batch": 0},
        {"lr": -0.1},
        {"momentum": 1.0},
        {"ema": 1.0},
        {"clip": 0.0},
        {"held_out": 1.0},
        {"optimizer": "adam"},
        {"label_smoothing": 1.0},
        {"max_steps": 0},
        {"nesterov": True},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        TrainOptions(**options)  # type: ignore[arg-type]


def test_every_option_says_what_it_does() -> None:
    from pydantic import TypeAdapter

    schema = TypeAdapter(TrainOptions).json_schema()["properties"]
    assert [n for n, s in schema.items() if not s.get("description")] == []


def test_smoothed_cross_entropy_by_hand() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
    seen = Seen(torch.zeros(2, 1), labels, logits, {})
    logs = F.log_softmax(logits, 1)
    plain = -(logs[0, 0] + logs[1, 2]) / 2
    assert cross_entropy()(seen) == pytest.approx(float(plain), rel=1e-6)
    smooth = 0.7 * plain - 0.3 * logs.mean(1).mean()
    assert cross_entropy(0.3)(seen) == pytest.approx(float(smooth), rel=1e-6)


def test_score_is_accuracy() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    assert is_correct(logits, torch.tensor([0, 1, 1])).tolist() == [1, 1, 0]
