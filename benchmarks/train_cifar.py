"""Networks for CIFAR-10 that `latency_vs_macs.py` compares allocations on.

    python benchmarks/train_cifar.py --model mobilenet-v2-cifar --imagenet mobilenet_v2-b0353104.pth \\
        --data cifar10:DIR --out FILE
    python benchmarks/train_cifar.py --model densenet-cifar --epochs 8 --lr 0.1 --data cifar10:DIR --out FILE

With `--imagenet`, all layers but the classifier start from that checkpoint of torchvision. 20 to 30 minutes.
The last epoch is kept, so the accuracy on the test images chose nothing.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

import graphcomp
from graphcomp.data.augment import CropAndFlip
from graphcomp.data.sources import load_data
from graphcomp.measure.evaluate import accuracy
from graphcomp.models import MODELS
from graphcomp.train.options import TrainOptions
from graphcomp.train.training import fit

CLASSIFIER = "classifier."


def main() -> None:
    """Train, evaluate, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--imagenet", type=Path, help="torchvision's checkpoint of the same network")
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    model = MODELS[chosen.model].factory()
    if chosen.imagenet is not None:
        start = torch.load(chosen.imagenet, map_location="cpu", weights_only=True)
        found = {name: tensor for name, tensor in start.items() if not name.startswith(CLASSIFIER)}
        missing = model.load_state_dict(found, strict=False).missing_keys
        assert missing and all(name.startswith(CLASSIFIER) for name in missing), missing
    data = load_data(chosen.data, input_shape=(3, 32, 32), seed=0)
    trained = fit(
        graphcomp.trace(model, torch.zeros(1, 3, 32, 32)),
        data.train,
        TrainOptions(epochs=chosen.epochs, lr=chosen.lr, schedule="one-cycle", keep="last", held_out=0.0),
        augmentation=CropAndFlip(),
        progress=lambda message, done: print(f"{100 * done:5.1f} %  {message}", flush=True),
    ).program
    save_file({n: t.contiguous() for n, t in trained.module.state_dict().items()}, chosen.out)
    top1 = accuracy(trained, data.eval)
    assert top1 is not None
    print(f"top-1 on {len(data.eval)} test images: {100 * top1.value:.2f} %")


if __name__ == "__main__":
    main()
