"""What a student minimises: angles between its values and its teacher's, or softened predictions."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.errors import PassError
from graphcomp.ir import output_tensors
from graphcomp.train import Loss, Seen, cross_entropy

EPSILON = 1e-8
"""Vectors whose norms' product is not larger have no direction: D = 1, and no gradient."""


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - the cosine of the angle between a sample's values in `a` and in `b`; shape (n,). (METHODS 2.3)

    Args:
        a, b: `[n, …]` of one shape: nothing is broadcast.

    Raises:
        PassError: if the shapes differ.
    """
    if a.shape != b.shape:
        raise PassError(f"distance: found shapes {tuple(a.shape)} and {tuple(b.shape)}, expected one shape")
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    norms = _norm(a) * _norm(b)
    known = norms > EPSILON
    cosines = (a * b).sum(1) / torch.where(known, norms, 1)
    return 1 - torch.where(known, cosines, 0)


def _norm(rows: Tensor) -> Tensor:
    """Of every row; with gradient 0 instead of NaN at 0."""
    squares = rows.square().sum(1)
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)


def cosine_loss(hints: Sequence[str], prediction: float, reduction: str = "mean", mse: float = 0.0) -> Loss:
    """The loss (2.4) over the watched nodes `hints`, plus `mse` times the squared error of the outputs."""

    def loss(seen: Seen) -> Tensor:
        theirs, own = output_tensors(seen.teacher_outputs), output_tensors(seen.outputs)
        total = prediction * _mean(cosine_distance, theirs, own)
        if hints and prediction < 1:
            a, b = [seen.teacher_watched[h] for h in hints], [seen.watched[h] for h in hints]
            scale = 1 - prediction if reduction == "mean" else len(hints)
            total = total + scale * _mean(cosine_distance, a, b)
        return total + mse * _mean(F.mse_loss, theirs, own) if mse else total

    return loss


def _mean(
    compare: Callable[[Tensor, Tensor], Tensor], theirs: Sequence[Tensor], own: Sequence[Tensor]
) -> Tensor:
    """The mean over pairs of tensors, and over samples."""
    return torch.stack([compare(a, b).mean() for a, b in zip(theirs, own, strict=True)]).mean()


def hinton(temperature: float, alpha: float, label_smoothing: float = 0.0) -> Loss:
    """Softened predictions of the teacher with weight alpha, labels with the rest."""
    labels = cross_entropy(label_smoothing)

    def loss(seen: Seen) -> Tensor:
        theirs, own = (F.log_softmax(x / temperature, 1) for x in (seen.teacher_outputs, seen.outputs))
        soft = temperature**2 * F.kl_div(own, theirs, reduction="batchmean", log_target=True)
        return alpha * soft + (1 - alpha) * labels(seen) if alpha < 1 else soft

    return loss
