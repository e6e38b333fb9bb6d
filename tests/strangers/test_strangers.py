"""Networks as users write them, each through everything: traced, made smaller, written to a file, read again.

What is removed must be exact. How much may go is written down for those of which something stays, with what keeps it.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphcomp
from graphcomp.channels import Channels, analyse
from graphcomp.ir import output_tensors
from graphcomp.ir.program import Program
from graphcomp.pipeline import relative_error
from tests.nets import scramble
from tests.removing import half, random_scores
from tests.strangers import attention, dense, images, sequences
from tests.strangers.registry import NETWORKS, Stranger

ROOMS = (attention, dense, images, sequences)
EXACT, ROUNDED = 1e-10, 1e-3
OUTPUT = "network output"


def built(stranger: Stranger) -> nn.Module:
    torch.manual_seed(0)
    return scramble(stranger.build(), 0).double().eval()


def share(channels: Channels) -> float:
    """Of the rows of all layers, those of outputs aside, how many may go."""
    rows = np.concatenate([a.channels.ravel() for a in channels.axes if a.role == "out"])
    outputs = channels.marks(c for c, (_, why) in channels.pinned.items() if why == OUTPUT)
    stays = channels.marks(channels.pinned)
    return 1 - float((stays & ~outputs)[rows].sum() / (~outputs)[rows].sum())


def reasons(channels: Channels) -> Counter[str]:
    """Why rows stay, and how many."""
    rows = np.concatenate([a.channels.ravel() for a in channels.axes if a.role == "out"])
    found = Counter(channels.pinned[c][1] for c in rows.tolist() if c in channels.pinned)
    del found[OUTPUT]
    return found


def distance(found: object, wanted: object) -> float:
    return max(map(relative_error, output_tensors(found), output_tensors(wanted)))


def with_zeros(module: nn.Module, program: Program, masked: Program, inputs: tuple[Tensor, ...]) -> object:
    """What the network itself yields with the zeros of a simulation in its weights; None if more changes."""
    if len(masked.graph.nodes) != len(program.graph.nodes) or masked.tensors.keys() != program.tensors.keys():
        return None
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    changed = {n: t for n, t in masked.tensors.items() if not torch.equal(t, program.tensors[n])}
    if any(n not in own or not torch.equal(own[n], program.tensors[n]) for n in changed):
        return None  # computed, and the result is what the program holds
    before = {n: own[n].clone() for n in changed}
    for name, tensor in changed.items():
        own[name].copy_(tensor)
    found = module(*inputs)
    for name, tensor in before.items():
        own[name].copy_(tensor)
    return found


def removed(program: Program, inputs: tuple[Tensor, ...], module: nn.Module | None = None) -> Program:
    """Without half of what may go; what is left computes what zeros do, and another thing than before."""
    channels = analyse(program)
    removal, kept = half(channels).feasible(random_scores(channels))
    assert not kept
    smaller, masked = removal.apply("test"), removal.mask()
    wanted = masked(*inputs)
    assert distance(smaller(*inputs), wanted) < EXACT
    if module is not None and channels.removable:
        assert distance(program(*inputs), wanted) > 1e-6
    by_hand = None if module is None else with_zeros(module, program, masked, inputs)
    assert by_hand is None or distance(by_hand, wanted) < EXACT
    return smaller


def run(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    given = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, given)]


def single(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() if x.is_floating_point() else x for x in inputs)


LAID_OUT = "meets what was computed of all channels, laid out along them"
STAYS: dict[str, tuple[float, str]] = {
    "SoftExperts": (0.98, LAID_OUT),
    "CondConvNet": (0.66, "conv2d by computed weights without these channels"),
    "Mixer": (0.73, "works along another axis than that of the channels"),
    "BilinearPooling": (0.81, "view of a table of channels by channels"),
    "NetVLAD": (0.87, LAID_OUT),
    "SpatialTransformer": (0.96, "no rule for affine_grid"),
    "Recursive": (0.91, "network input"),
    "OldStyle": (0.85, "no rule for LocalResponseNorm"),
    "CBAM": (0.98, "is broadcast over other channels"),
    "ECA": (0.58, "Conv1d slides over the channels"),
    "SpatialGating": (0.8, "works along another axis than that of the channels"),
    "AttentionUNet": (0.99, "is broadcast over other channels"),
    "Yolo": (0.97, LAID_OUT),
    "SuperResolution": (0.98, "network input"),
    "Flow": (0.98, LAID_OUT),
    "Deformable": (0.34, "no rule for torchvision.ops.deform_conv.deform_conv2d"),
    "TextCNN": (0.65, "Conv2d slides over the channels"),
    "TextGRU": (0.99, "is broadcast over other channels"),
    "LanguageModel": (0.57, "one weight makes these channels and reads them"),
    "PointNet": (0.96, "bmm meets no channels along them"),
    "StyleGenerator": (0.79, "conv2d of what has no channels by computed weights"),
    "Coupling": (0.89, "network input"),
    "StateSpace": (0.83, "getitem of a table of channels by channels"),
}
"""Network -> the share that may go where it is not all, and the first reason why the others stay."""
FROM_FILE: dict[str, tuple[float, str]] = {
    "SoftExperts": (0.88, LAID_OUT),
    "Yolo": (1.0, ""),
    "SuperResolution": (1.0, ""),
    "LanguageModel": (1.0, ""),
}
"""The same of what is read from its file, where it is not the share that it had before."""
REFUSED = {
    "CondConvNet": "conv2d",  # groups that follow the batch
    "StyleGenerator": "conv2d",
    "Deformable": "DeformConv",  # younger than the operator set that is written by default
}
"""Network that no exporter writes -> what is said of it."""
_ADDED, _WIDTHS = "between layers, which passes have added or changed", "its code counts on the old widths"
OWN_CODE = {
    "ShuffleUnits": _ADDED,  # halves that lost different channels
    "Antialiased": _WIDTHS,  # filters in a buffer, one a channel
    "FeatureTaps": _WIDTHS,  # hooks of a copy write into the original
    "SpatialTransformer": _ADDED,  # numbers in its code, and so in the next
    "Retrieval": _WIDTHS,  # a weight that forward computes
    "OldStyle": _ADDED,
    "ShiftedWindows": _WIDTHS,  # scales of attention that follow from widths
    "Causal": _WIDTHS,
    "Queries": "the feature number of src and tgt must be equal to d_model",
    "Keypoints": _ADDED,  # places that are woven together are others
    "RotaryTransformer": _ADDED,
    "Latents": _WIDTHS,
    "ReducedAttention": _WIDTHS,
    "Flow": _ADDED,
    "WaveNet": "expected no calls of layers whose results nothing reads",
    "LanguageModel": _ADDED,
    "PointNet": _ADDED,
    "Conditioned": _ADDED,
    "VAE": _ADDED,
    "Denoiser": _ADDED,
    "LearnedFilters": _WIDTHS,
}
"""Network whose own code cannot call the smaller layers -> what is said."""
UNREAD = {"MaxUnpooling": "found output 1, which something reads"}
"""Network whose file is not read -> why."""


def put_back(name: str, smaller: Program, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The network's own class with the smaller layers in it, or why its code cannot call them."""
    if name in OWN_CODE:
        with pytest.raises(graphcomp.GraphcompError, match=OWN_CODE[name]):
            graphcomp.apply(smaller, module, inputs)
        return
    made = graphcomp.apply(smaller, module, inputs)
    assert type(made) is type(module)
    assert distance(made(*inputs), smaller(*inputs)) < EXACT


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_a_stranger(name: str, tmp_path: Path) -> None:
    stranger = NETWORKS[name]
    module, inputs = built(stranger), stranger.batch(2)
    program = graphcomp.trace(module, inputs)
    assert distance(program(*inputs), module(*inputs)) < EXACT
    channels = analyse(program)
    least, why = STAYS.get(name, (1.0, ""))
    assert share(channels) == pytest.approx(least, abs=0.01), reasons(channels)
    assert next(iter(dict(reasons(channels).most_common(1))), "") == why
    smaller = removed(program, inputs, module)
    if channels.removable:
        graphcomp.compile(program, "l1{ratio=0.5, multiple=1}")
    put_back(name, smaller, module, inputs)
    smaller = smaller.to(torch.float32)

    path = tmp_path / "smaller.onnx"
    if name in REFUSED:
        with pytest.raises(graphcomp.GraphcompError, match=REFUSED[name]):
            graphcomp.export_onnx(smaller, path, provider="cpu")
        return
    graphcomp.export_onnx(smaller, path, provider="cpu")
    for batch in (1, 3):
        x = single(stranger.batch(batch, seed=batch))
        assert distance(run(path, x), smaller(*x)) < ROUNDED
    if name in UNREAD:
        with pytest.raises(graphcomp.GraphcompError, match=UNREAD[name]):
            graphcomp.read_onnx(path)
        return
    again = graphcomp.read_onnx(path).to(torch.float64)
    if any("one sample at a time" in remark for remark in again.interface.remarks):
        inputs = stranger.batch(1)
    assert distance(again(*inputs), smaller.to(torch.float64)(*inputs)) < ROUNDED
    least, why = FROM_FILE.get(name, (share(analyse(smaller)), why))
    assert share(analyse(again)) == pytest.approx(least, abs=0.01), reasons(analyse(again))
    removed(again, inputs)


def test_all_networks_are_in_the_table() -> None:
    assert {kind.__module__ for kind in (s.build for s in NETWORKS.values())} == {r.__name__ for r in ROOMS}
    assert len(NETWORKS) > 80
    tables = (STAYS, FROM_FILE, REFUSED, UNREAD, OWN_CODE)
    assert NETWORKS.keys() >= {name for table in tables for name in table}
