"""The mean gradient of the loss with respect to weights: what a first-order Taylor criterion looks at.

    G = 1/m sum_i d CE(f(x_i), y_i) / dW        eval mode, at the weights as they are          (METHODS 1.2)

Summed in float64 sample by sample as it were: neither the batch size nor the number of processes matters, but
for float32 rounding inside a batch. Results are kept by content (`base.cache`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.base import Progress, distributed, quiet
from graphcomp.base import cache as disk
from graphcomp.data import Split
from graphcomp.errors import AnalysisError, DataError
from graphcomp.ir import Program, editable, moved, named_tensors
from graphcomp.measure.evaluate import is_classifier, require_outputs
from graphcomp.measure.samples import at_once, elements

BATCH = 250
"""Samples at a time, at most."""

ELEMENTS = 1 << 27
"""Of all activations of a batch together, which the backward pass needs: 512 MiB."""

TIMES = 3
"""So often activations are held at once: with their gradients, and what these are made of."""

KIND = "gradients"
"""Of entries in the cache."""


def mean_gradients(
    program: Program,
    split: Split,
    tensors: Sequence[str],
    *,
    samples: int | None = None,
    batch: int | None = None,
    cache: bool = True,
    progress: Progress = quiet,
) -> dict[str, Tensor]:
    """The mean gradient of the cross-entropy for each of `tensors`; collective (see `distributed`).

    Args:
        program: a classifier; left as it is, its `grad` and `requires_grad` too.
        split: labelled samples.
        tensors: dotted names of floating point parameters or buffers; frozen ones may be asked for.
        samples: so many, evenly spaced over the split (which may be sorted by class); None for all.
        batch: samples at a time; by default as many as fit. The result does not depend on it.
        cache: read and write the cache on disk.
        progress: told a message and the fraction of the samples that were seen.

    Returns:
        Name -> gradient, with the tensor's shape and type, on the CPU; zeros where the loss does not depend
        on it.

    Raises:
        AnalysisError: no classifier, or no such tensor.
        DataError: no samples or labels, labels that the network has no output for, or gradients that are not
            finite.
    """
    names = list(dict.fromkeys(tensors))
    _check(program, split, names)
    part = split if samples is None else split.spread(samples)
    key = _key(program, part, names) if cache else ""
    found = distributed.on_first(lambda: disk.load(KIND, key) if cache else None)
    if found is None:
        found = _measure(program, part, names, batch or batch_size(program), progress)
        if cache and distributed.is_first():
            disk.store(KIND, key, found)
    return found


def _key(program: Program, part: Split, names: Sequence[str]) -> str:
    return disk.key(__name__, program=program.fingerprint(), data=part.fingerprint(), tensors=list(names))


def batch_size(program: Program, memory: int | None = None) -> int:
    """Samples at a time whose activations together stay within `ELEMENTS`, or a quarter of memory; or one."""
    most = ELEMENTS if memory is None else min(ELEMENTS, memory // 4 // (4 * TIMES))
    return at_once(program, most // max(sum(elements(program)), 1), 1, BATCH)


def _check(program: Program, split: Split, names: Sequence[str]) -> None:
    if not is_classifier(program):
        raise AnalysisError(
            "gradients: found a network whose output is not (batch, classes), expected a classifier, whose "
            "loss is the cross-entropy"
        )
    for name in names:
        if name not in program.tensors or not program.tensors[name].is_floating_point():
            raise AnalysisError(f"gradients: found {name!r}, expected a floating point tensor of the program")
    if not len(split):
        raise DataError("gradients: found no samples, expected at least one; give --data a non-empty source")
    if split.regression:
        raise DataError("gradients: found values as labels, expected classes; give --data other labels")
    if not split.labelled:
        raise DataError(
            "gradients: found samples without labels, expected labelled ones, since the loss needs them; "
            "give --data a source with labels"
        )


def _measure(
    program: Program, split: Split, names: Sequence[str], batch: int, progress: Progress
) -> dict[str, Tensor]:
    """Sums over this process's share of the samples, added up over all processes."""
    device = distributed.device()
    module = editable(program).to(device).eval().requires_grad_(False)
    own = named_tensors(module)
    leaves = [own[name].requires_grad_(True) for name in names]
    sums = [torch.zeros(t.shape, dtype=torch.float64, device=device) for t in leaves]
    mine = split.subset(distributed.share(len(split), batch))
    seen = 0
    for x, y in mine.batches(batch):
        logits = module(*moved(x, device))
        require_outputs(logits, y)
        loss = F.cross_entropy(logits, y.to(device), reduction="sum")
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        for total, gradient in zip(sums, found, strict=True):
            if gradient is not None:
                total += gradient
        seen += len(y)
        progress(f"gradients: {seen * len(split) // len(mine):,} of {len(split):,} samples", seen / len(mine))
    distributed.all_reduce(sums)
    means = {
        name: (total / len(split)).to(program.tensors[name].dtype).cpu()
        for name, total in zip(names, sums, strict=True)
    }
    for name, mean in means.items():
        if not bool(torch.isfinite(mean).all()):
            raise DataError(
                f"gradients: {name}: found NaN or infinite values, expected finite ones; check the weights "
                "and the normalisation of --data"
            )
    return means
