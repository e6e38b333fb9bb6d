"""Train the bundled ResNet-20 on scikit-learn's digits: `python -m graphcomp.models.train_digits`.

Sees only the train split of `data.sources`'s `digits` (80 %, fixed), shifted by up to two pixels. The last
epoch is kept, so the accuracy on the evaluation split chose nothing. A few minutes on one CPU thread.

The scales of the normalisations carry an l1 term (network slimming, Liu et al. 2017), so that the network
learns which channels it can do without, as one would train what is to be compressed.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from graphcomp.data import Split, load_data
from graphcomp.models.resnet_cifar import ResNet

SHIFT = 2
BATCH = 64
PEAK_RATE = 0.1
WEIGHT_DECAY = 5e-4
SPARSITY = 1.2e-2
DEFAULT_OUT = Path(__file__).with_name("resnet20_digits.safetensors")


def shifted(images: Tensor, rng: np.random.RandomState) -> Tensor:
    """Move every image of `[N, C, H, W]` by up to SHIFT pixels each way; the border repeats."""
    height, width = images.shape[2:]
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    offsets = rng.randint(0, 2 * SHIFT + 1, size=(len(images), 2))
    return torch.stack(
        [p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, offsets, strict=True)]
    )


def train(model: nn.Module, split: Split, epochs: int, seed: int) -> None:
    """Train in place: SGD with Nesterov momentum, one-cycle rate, cross-entropy."""
    rng = np.random.RandomState(seed)
    optimiser = torch.optim.SGD(model.parameters(), PEAK_RATE, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = epochs * -(-len(split) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps)
    scales = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for (images,), labels in split.batches(BATCH, shuffle_seed=seed + epoch):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(shifted(images, rng)), labels)
            penalty = SPARSITY * torch.stack([s.abs().sum() for s in scales]).sum()
            (loss + penalty).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += loss.item() * len(labels)
        print(f"epoch {epoch + 1:2d}/{epochs}  loss {total / len(split):.4f}", flush=True)
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split) -> float:
    """Top-1 accuracy in [0, 1]."""
    correct = sum(int((model(x).argmax(1) == y).sum()) for (x,), y in split.batches(256))
    return correct / len(split)


def main() -> None:
    """Train, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the result, depends on the number of threads
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    data = load_data("digits", input_shape=(3, 32, 32), seed=args.seed)
    model = ResNet(20)
    train(model, data.train, args.epochs, args.seed)
    top1 = accuracy(model, data.eval)
    print(f"top-1 on {len(data.eval)} evaluation samples: {top1:.4f}")
    facts = {"top1": f"{top1:.4f}", "eval_samples": len(data.eval), "epochs": args.epochs, "seed": args.seed}
    versions = {name: version(name) for name in ("torch", "numpy", "scikit-learn")}
    metadata = {"model": "resnet20-digits", "data": "digits", **facts, **versions}
    save_file(model.state_dict(), args.out, metadata={k: str(v) for k, v in metadata.items()})


if __name__ == "__main__":
    main()
