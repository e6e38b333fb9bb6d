"""How good a program is: accuracy with its interval, and drift between two programs."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from graphcomp import distributed
from graphcomp.calibrate import batch_size
from graphcomp.data import Split
from graphcomp.errors import DataError
from graphcomp.program import Program, output_tensors
from graphcomp.records import Accuracy, Drift

BATCH = 250


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95 % by default)."""
    if total == 0:
        return 0.0, 1.0
    p = correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def is_classifier(program: Program) -> bool:
    """Whether the program yields one tensor (batch, classes)."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    value = program.values[output]
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] > 1


@torch.no_grad()
def accuracy(
    program: Program, split: Split, progress: Callable[[int], None] | None = None, *, shared: bool = False
) -> Accuracy | None:
    """Top-1 accuracy on a split; None for unlabelled data or a network that is no classifier.

    Args:
        program: the network.
        split: labelled samples.
        progress: told the size of each batch.
        shared: every process calls this and looks at its share of the samples (see `distributed`).

    Raises:
        DataError: if the split is empty or has labels that the network has no output for.
    """
    if not split.labelled or not is_classifier(program):
        return None
    if not len(split):
        raise DataError("evaluation data: found no samples, expected at least one")
    batch = batch_size(program)
    part = split.subset(distributed.share(len(split), batch)) if shared else split
    correct = torch.zeros((), dtype=torch.int64)
    for x, y in part.batches(batch):
        logits = program(x)
        require_outputs(logits, y)
        correct += (logits.argmax(1) == y).sum()
        if progress:
            progress(len(y))
    if shared:
        distributed.all_reduce([correct])
    low, high = wilson(int(correct), len(split))
    return Accuracy(top1=int(correct) / len(split), samples=len(split), low=low, high=high)


def require_outputs(logits: Tensor, labels: Tensor) -> None:
    """DataError if the network has no output for some label."""
    if int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"labels: found class {int(labels.max())}, expected classes below {logits.shape[1]}, the number "
            "of the network's outputs; check that the data belongs to this network"
        )


@torch.no_grad()
def confusion(program: Program, split: Split, progress: Callable[[int], None] | None = None) -> Tensor | None:
    """How often each class was taken for which one; None as for `accuracy`, which is its trace's share.

    Args:
        program: the network.
        split: labelled samples.
        progress: told the size of each batch.

    Returns:
        int64 (classes, classes), a row for each true class, a column for each predicted one.

    Raises:
        DataError: as for `accuracy`.
    """
    if not split.labelled or not is_classifier(program):
        return None
    if not len(split):
        raise DataError("evaluation data: found no samples, expected at least one")
    pairs: list[Tensor] = []
    classes = 0
    for x, y in split.batches(batch_size(program)):
        logits = program(x)
        require_outputs(logits, y)
        classes = logits.shape[1]
        pairs.append(y * classes + logits.argmax(1))
        if progress:
            progress(len(y))
    return torch.bincount(torch.cat(pairs), minlength=classes * classes).view(classes, classes)


@torch.no_grad()
def drift(before: Program, after: Program, batches: Iterable[Tensor]) -> Drift:
    """Relative L2 of the outputs, and the share of samples with the same top-1 class."""
    difference = norm = 0.0
    same = total = 0
    classifier = is_classifier(before)
    for x in batches:
        old, new = output_tensors(before(x)), output_tensors(after(x))
        difference += sum(float((a - b).double().square().sum()) for a, b in zip(old, new, strict=True))
        norm += sum(float(a.double().square().sum()) for a in old)
        if classifier:
            same += int((old[0].argmax(1) == new[0].argmax(1)).sum())
        total += len(x)
    ratio = math.sqrt(difference / norm) if norm else math.sqrt(difference)
    return Drift(relative_l2=ratio, top1_agreement=same / total if classifier and total else None)


def first_inputs(split: Split, samples: int) -> list[Tensor]:
    """The inputs of the first `samples` samples, in batches."""
    found: list[Tensor] = []
    left = samples
    for x, _ in split.batches(BATCH):
        found.append(x[:left])
        left -= len(x)
        if left <= 0:
            break
    return found
