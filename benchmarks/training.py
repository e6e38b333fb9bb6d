"""Training throughput of `train.training` beside a bare PyTorch loop on the same work.

Both train a ResNet of CIFAR's size with SGD and momentum, step by step in turn in one process (A B B A), so
that what else the machine does falls on both alike. The bare loop is the shortest that learns: its batches
are normalised tensors that lie ready, and nothing is augmented, logged or checked. Ours fetches and
normalises uint8 images, pads, crops and mirrors them, and does all that a step of a real training does. So
the ratio says what the whole of graphcomp costs, and not only its loop.

CPU time of the process is the measure: on a busy machine wall time is that of the others.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from section import replace_section
from torch import Tensor

from graphcomp import trace
from graphcomp.data.augment import CropAndFlip
from graphcomp.data.split import Indices, Split
from graphcomp.models.resnet_cifar import ResNet
from graphcomp.records import Interval
from graphcomp.runtime.bench import ratio_interval
from graphcomp.runtime.machine import environment
from graphcomp.train.loop import Loop
from graphcomp.train.network import LAYOUTS, Mode
from graphcomp.train.options import Task, TrainOptions, cross_entropy, is_correct

DOCS = Path(__file__).parent.parent / "docs" / "results.md"
BEGIN, END = (
    "<!-- training: begin, written by benchmarks/training.py --render -->",
    "<!-- training: end -->",
)
MODES = (Mode(), Mode(layout="channels_last"), Mode("bf16", "channels_last"))
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4


def images(samples: int) -> Split:
    """uint8 images of noise, normalised when they are fetched, as those of CIFAR are."""
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (samples, 32, 32, 3), dtype=np.uint8)
    mean, std = MEAN.view(-1, 1, 1), STD.view(-1, 1, 1)

    def fetch(indices: Indices) -> tuple[Tensor]:
        batch = np.ascontiguousarray(pixels[indices].transpose(0, 3, 1, 2))
        return (torch.from_numpy(batch).float().div_(255).sub_(mean).div_(std),)

    return Split(torch.from_numpy(rng.randint(0, 10, samples)), np.arange(samples), fetch)


def bare(depth: int, mode: Mode, split: Split, batch: int) -> Callable[[], None]:
    """One step of the loop that everybody writes."""
    layout = LAYOUTS[mode.layout]
    net = ResNet(depth).to(memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    ready = [(x.contiguous(memory_format=layout), y) for (x,), y in split.batches(batch)]
    count = 0

    def step() -> None:
        nonlocal count
        x, y = ready[count % len(ready)]
        count += 1
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.precision == "bf16"):
            outputs = net(x)
        F.cross_entropy(outputs.float(), y).backward()
        optimizer.step()

    return step


def ours(depth: int, mode: Mode, split: Split, batch: int) -> Callable[[], None]:
    """One step of `fit`, with what it does between two steps."""
    program = trace(ResNet(depth), torch.randn(1, 3, 32, 32))
    options = TrainOptions(
        epochs=1000, batch=batch, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, schedule="constant"
    )
    task = Task(program, split, options, None, cross_entropy(), is_correct, (), None, CropAndFlip(4), seed=0)
    loop = Loop(task, mode)
    loop.end_epoch()

    def step() -> None:
        loop.step(loop.batches(loop.at))
        loop.step_message()

    return step


def compare(depth: int, mode: Mode, batch: int, rounds: int) -> tuple[Interval, float, float]:
    """Ratio of CPU times (bare / ours) with its interval, and the median milliseconds of both."""
    split = images(4 * batch)
    steps = bare(depth, mode, split, batch), ours(depth, mode, split, batch)
    times = np.empty((2, rounds, 2))
    for number in range(-1, rounds):  # the first round warms up
        for place, which in enumerate((0, 1, 1, 0)):
            started = time.process_time()
            steps[which]()
            times[which, max(number, 0), place // 2] = 1e3 * (time.process_time() - started)
    return ratio_interval(times[0], times[1]), float(np.median(times[0])), float(np.median(times[1]))


def section(args: argparse.Namespace, rows: list[str]) -> str:
    """What goes into the document."""
    machine = environment()
    return f"""{BEGIN}

## Training throughput

ResNet-{args.depth} on 32x32 images, batches of {args.batch}, {2 * args.rounds} steps of each side in turn,
{args.threads} thread(s); {machine.cpu} ({machine.isa}), {machine.cores} shared cores, Python
{platform.python_version()}, torch {torch.__version__}. The bare PyTorch loop is given ready tensors; `fit`
fetches, normalises and augments images too. CPU time; a ratio of 1 is the speed of the bare loop.

```
python benchmarks/training.py --render
```

| arithmetic | bare, ms a step | `fit`, ms a step | samples per CPU s | throughput of bare |
|---|---|---|---|---|
{chr(10).join(rows)}

{END}"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15, help="of two steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true", help="write the section of docs/results.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for mode in MODES:
        ratio, base, own = compare(args.depth, mode, args.batch, args.rounds)
        rows.append(
            f"| {mode} | {base:.0f} | {own:.0f} | {1e3 * args.batch / own:.0f} "
            f"| {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] |"
        )
        print(rows[-1], flush=True)
    if args.render:
        replace_section(DOCS, BEGIN, END, section(args, rows))


if __name__ == "__main__":
    main()
