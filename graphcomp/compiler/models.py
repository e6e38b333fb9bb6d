"""Where models come from: `load_model(spec)` builds a network, `load_weights` (of `checkpoints`) fills it.

| spec | what it builds |
| --- | --- |
| `torchvision:NAME` | a classifier (of images or videos), segmenter or detector of torchvision, untrained |
| `models:NAME` | a network of `graphcomp.models.MODELS` |
| `path/to/file.py:factory` | what `factory()` in that file returns: a network, or (network, example inputs) |

Saved program directories and ONNX files are not built here: ask `is_program_dir`, then use `load`, and
`is_onnx`, then use `onnx.read_onnx`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from graphcomp.base import call_in_file, is_dir, is_file
from graphcomp.compiler.checkpoints import load_weights
from graphcomp.errors import LoadError

__all__ = ["LoadedModel", "is_program_dir", "load_model", "load_weights"]

FORMS = "torchvision:NAME, models:NAME, path/to/file.py:factory, a file.onnx or a saved program directory"
PROGRAM_FILE = "program.json"
FRAMES = 16
"""Of a clip, for networks of videos."""
RANDOM = "the weights are random: no file was given (--weights), so accuracy says nothing"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network in eval mode, with fresh weights, and what is known about it.

    Attributes:
        module: the network.
        input_shape: shape of one sample (C, H, W) or (C, T, H, W), no batch; None if only the user knows.
        default_weights: a file with weights that come with the model, not yet loaded.
        name: short name for reports.
        default_data: data spec that belongs to the model.
        untrained: what to say if no weights are loaded: that these are random; None if they need not be.
        examples: a tensor an input, with the batch, where a user's file gives them.
    """

    module: nn.Module
    input_shape: tuple[int, ...] | None
    default_weights: Path | None
    name: str
    default_data: str | None = None
    untrained: str | None = None
    examples: tuple[Tensor, ...] | None = None


def is_program_dir(spec: str) -> bool:
    """Whether `spec` is a directory that a Program was saved in."""
    return is_file(Path(spec) / PROGRAM_FILE)


def is_onnx(spec: str) -> bool:
    """Whether `spec` names an ONNX file, be it there or not."""
    return Path(spec).suffix.lower() == ".onnx"


def load_model(spec: str) -> LoadedModel:
    """Build the network that `spec` names (see the module's table), in eval mode.

    Raises LoadError for an unknown form or name, and for anything that fails inside a user's file.
    """
    source, _, name = spec.partition(":")
    if source == "torchvision":
        return _torchvision(name)
    if source == "models":
        return _bundled(name)
    path, _, factory = spec.rpartition(":")
    if path.endswith(".py"):
        return _from_file(Path(path), factory)
    raise LoadError.at(f"model {spec!r}", _what(spec), FORMS, _near_spec(spec))


def _what(spec: str) -> str:
    if is_program_dir(spec):
        return "a saved program"
    if is_dir(Path(spec)):
        return f"a directory without {PROGRAM_FILE}"
    return "a file without ':factory'" if is_file(Path(spec)) else "no such thing"


def _near_spec(spec: str) -> str:
    from graphcomp.models import MODELS

    known = [*(f"models:{n}" for n in MODELS), *(f"torchvision:{n}" for n in _torchvision_names())]
    bare = [k for k in known if k.partition(":")[2] == spec]
    return _advice(bare or difflib.get_close_matches(spec, known, 3), "give one of these forms")


def _advice(near: list[str], otherwise: str) -> str:
    return f"did you mean {' or '.join(near)}?" if near else otherwise


# --- torchvision --------------------------------------------------------------------------------------------


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [name for kind in (models, *_kinds()) for name in models.list_models(module=kind)]


def _kinds() -> tuple[ModuleType, ...]:
    from torchvision import models

    return models.segmentation, models.detection, models.video


def _torchvision(name: str) -> LoadedModel:
    """Training-only auxiliary heads are left out, and nothing is downloaded.

    Like torchvision without weights, inception and googlenet take their input as it is: with torchvision's
    own weights, normalise by mean and std 0.5.
    """
    from torchvision import models

    if name not in (names := _torchvision_names()):
        near = _advice(
            difflib.get_close_matches(name, names, 3), "see torchvision's documentation for the names"
        )
        expected = "one for classification, segmentation or detection"
        raise LoadError.at(f"torchvision:{name}", "no such network", expected, near)
    options: dict[str, Any] = {"weights": None}
    if any(name in models.list_models(module=kind) for kind in (models.segmentation, models.detection)):
        options["weights_backbone"] = None
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    module = models.get_model(name, **options).eval()
    clip = (FRAMES,) if name in models.list_models(module=models.video) else ()
    size = _evaluation_size(name, module)
    return LoadedModel(module, (3, *clip, *size), None, name, untrained=RANDOM)


def _evaluation_size(name: str, module: nn.Module) -> tuple[int, int]:
    """The image size that torchvision evaluates the network at, or the only one that it takes."""
    from torchvision.models import get_model_weights
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    if isinstance(size := getattr(module, "image_size", None), int):
        return size, size
    if isinstance(own := getattr(module, "transform", None), GeneralizedRCNNTransform):  # a detector's
        return own.min_size[-1], own.min_size[-1]
    transform = get_model_weights(name).DEFAULT.transforms()
    size = (getattr(transform, "crop_size", None) or transform.resize_size)[0]
    return size, size


# --- graphcomp.models ---------------------------------------------------------------------------------------


def _bundled(name: str) -> LoadedModel:
    from graphcomp.models import MODELS

    if name not in MODELS:
        near = _advice(difflib.get_close_matches(name, MODELS, 3), "correct the name")
        raise LoadError.at(f"models:{name}", "no such network", f"one of {', '.join(MODELS)}", near)
    spec = MODELS[name]
    return LoadedModel(spec.factory().eval(), spec.input_shape, spec.weights, name, spec.data, RANDOM)


# --- a user's file ------------------------------------------------------------------------------------------


def _from_file(path: Path, name: str) -> LoadedModel:
    made = call_in_file(path, name, nn.Module)
    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise LoadError.at(
            f"{path}:{name}",
            f"a {type(module).__name__}",
            "a torch.nn.Module, or one and its example inputs",
            f"return that from {name}()",
        )
    return LoadedModel(
        module.eval(), None, None, f"{path.stem}:{name}", examples=_examples(path, name, examples)
    )


def _examples(path: Path, name: str, given: Any) -> tuple[Tensor, ...] | None:
    """Example inputs that a user's file gives with a network."""
    if given is None:
        return None
    found = (given,) if isinstance(given, Tensor) else tuple(given) if isinstance(given, tuple | list) else ()
    if not found or not all(isinstance(x, Tensor) and x.ndim for x in found):
        raise LoadError.at(
            f"{path}:{name}",
            f"a network and a {type(given).__name__}",
            "a network and a tensor with the batch for each of its inputs",
            f"return (network, (x, ...)) from {name}()",
        )
    return found
