"""Where models and weights come from: `load_model(spec)` builds a network, `load_weights` fills it.

| spec | what it builds |
| --- | --- |
| `torchvision:NAME` | a classification or segmentation network of torchvision, untrained |
| `models:NAME` | a network of `graphcomp.models.MODELS` |
| `path/to/file.py:factory` | what `factory()` in that file returns |

A saved program directory is not built here: ask `is_program_dir`, then use `Program.load`.
No pickle that could run code is ever read.
"""

import difflib
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graphcomp.errors import LoadError

__all__ = ["LoadedModel", "is_program_dir", "load_model", "load_weights"]

FORMS = "torchvision:NAME, models:NAME, path/to/file.py:factory or a saved program directory"
PROGRAM_FILE = "program.json"
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
COUNTER = "num_batches_tracked"
LISTED = 10

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network in eval mode, with fresh weights, and what is known about it.

    Attributes:
        module: the network.
        input_shape: shape of one sample (C, H, W), without the batch; None if only the user knows.
        default_weights: a file with weights that come with the model, not yet loaded.
        name: short name for reports.
        default_data: data spec that belongs to the model.
    """

    module: nn.Module
    input_shape: tuple[int, ...] | None
    default_weights: Path | None
    name: str
    default_data: str | None = None


def is_program_dir(spec: str) -> bool:
    """Whether `spec` is a directory that a Program was saved in."""
    return (Path(spec) / PROGRAM_FILE).is_file()


def _bad(place: object, found: str, expected: str, advice: str) -> LoadError:
    return LoadError(f"{place}: found {found}, expected {expected}; {advice}")


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
    raise _bad(f"model {spec!r}", _what(spec), FORMS, _near_spec(spec))


def _what(spec: str) -> str:
    if is_program_dir(spec):
        return "a saved program"
    if Path(spec).is_dir():
        return f"a directory without {PROGRAM_FILE}"
    return "a file without ':factory'" if Path(spec).is_file() else "no such thing"


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

    return [*models.list_models(module=models), *models.list_models(module=models.segmentation)]


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
        raise _bad(f"torchvision:{name}", "no such network", "a classification or segmentation network", near)
    options: dict[str, Any] = {"weights": None}
    if name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    module = models.get_model(name, **options).eval()
    return LoadedModel(module, (3, *_evaluation_size(name, module)), None, name)


def _evaluation_size(name: str, module: nn.Module) -> tuple[int, int]:
    """The image size that torchvision evaluates the network at, or the only one that it takes."""
    from torchvision.models import get_model_weights

    if isinstance(size := getattr(module, "image_size", None), int):
        return size, size
    transform = get_model_weights(name).DEFAULT.transforms()
    size = (getattr(transform, "crop_size", None) or transform.resize_size)[0]
    return size, size


# --- graphcomp.models ---------------------------------------------------------------------------------------


def _bundled(name: str) -> LoadedModel:
    from graphcomp.models import MODELS

    if name not in MODELS:
        near = _advice(difflib.get_close_matches(name, MODELS, 3), "correct the name")
        raise _bad(f"models:{name}", "no such network", f"one of {', '.join(MODELS)}", near)
    spec = MODELS[name]
    return LoadedModel(spec.factory().eval(), spec.input_shape, spec.weights, name, spec.data)


# --- a user's file ------------------------------------------------------------------------------------------


def _from_file(path: Path, name: str) -> LoadedModel:
    if not path.is_file():
        raise _bad(path, "no such file", "a Python file", "correct the path")
    with _user_code(path):
        made = _factory(_import(path), path, name)
        module = made if isinstance(made, nn.Module) else made()
    if not isinstance(module, nn.Module):
        raise _bad(
            f"{path}:{name}", f"a {type(module).__name__}", "a torch.nn.Module", f"return one from {name}()"
        )
    return LoadedModel(module.eval(), None, None, f"{path.stem}:{name}")


def _import(path: Path) -> ModuleType:
    name = f"graphcomp_user_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.fx look modules up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _factory(module: ModuleType, path: Path, name: str) -> Any:
    made = getattr(module, name, None)
    if callable(made):
        return made
    own = [
        n
        for n, v in vars(module).items()
        if callable(v) and getattr(v, "__module__", None) == module.__name__
    ]
    found = f"{name!r} that cannot be called" if hasattr(module, name) else f"no {name!r}"
    near = _advice(
        difflib.get_close_matches(name, own, 3), f"it has {', '.join(own) or 'no functions or classes'}"
    )
    raise _bad(path, found, "a function or class without required arguments", near)


@contextmanager
def _user_code(path: Path) -> Iterator[None]:
    """Run user code as `python FILE` would: with its folder importable. What fails becomes a LoadError.

    Modules beside the file are forgotten afterwards, so that another file finds its own neighbours.
    """
    folder, before = str(path.resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    except LoadError:
        raise
    except (Exception, SystemExit) as error:
        raise _bad(
            _place(path, error), f"{type(error).__name__}: {error}", "a file that loads", "correct it there"
        ) from error
    finally:
        with suppress(ValueError):  # user code may have taken it out itself
            sys.path.remove(folder)
        for name in [n for n in set(sys.modules) - before if n.partition(".")[0] not in before]:
            if _is_beside(name, Path(folder)):
                del sys.modules[name]


def _is_beside(module: str, folder: Path) -> bool:
    """Whether an imported module is a file or a package in `folder`, not just below it (a .venv, say)."""
    origin = Path(getattr(sys.modules[module], "__file__", None) or "/")
    top = module.partition(".")[0]
    return origin.is_relative_to(folder) and Path(origin.relative_to(folder).parts[0]).stem == top


def _place(path: Path, error: BaseException) -> str:
    """File and line of the innermost frame of the user's own folder."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    folder = str(path.resolve().parent)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if str(Path(f.filename).resolve().parent) == folder
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(path)


# --- weights ------------------------------------------------------------------------------------------------


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a state dict of `module`'s architecture from safetensors or a `torch.save` file, onto its devices.

    Wrappings are taken off: dictionaries (state_dict, model) and key prefixes (module., _orig_mod., model.).
    Floating point numbers are cast to the module's types. Absent BatchNorm counters (files of old versions)
    are no error; heads that torchvision only trains with are ignored.

    Raises LoadError, and leaves the module unchanged, if the file cannot be read without running code in it,
    if keys or shapes differ, or if a weight is NaN or infinite.
    """
    path = Path(path)
    own = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    state = _without_auxiliary(module, _unwrapped(path, _read(path), own))
    _require_same_keys(path, module, state, own)
    state = {key: tensor.to(own[key].dtype) for key, tensor in state.items()}
    _require_finite(path, state)
    module.load_state_dict(state, strict=False)


def _read(path: Path) -> Any:
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no such file"
        raise _bad(path, found, "a file of weights", "correct the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything at all
        raise _bad(path, *_unreadable(error)) from error


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _bad(path, f"an unreadable file ({error})", "safetensors", "fetch or save it again") from error


def _unreadable(error: Exception) -> tuple[str, str, str]:
    """What was found, what was expected, what to do."""
    text = str(error).strip()
    if refused := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"objects that need unrestricted pickle, which can run code ({refused[1]})",
            "tensors in dictionaries",
            "load it where you trust it, and save model.state_dict() with torch.save or as safetensors",
        )
    reason = text.partition("\n")[0][:200] or type(error).__name__
    return f"an unreadable file ({reason})", "one that torch.save wrote", "fetch or save it again"


def _unwrapped(path: Path, content: Any, own: State) -> State:
    while (
        isinstance(content, Mapping)
        and (inner := next((content[k] for k in WRAPPERS if k in content), None)) is not None
    ):
        content = inner
    if not isinstance(content, Mapping) or not content:
        found = f"a {type(content).__name__}" if not isinstance(content, Mapping) else "an empty dictionary"
        raise _bad(path, found, "a state dict", "save model.state_dict()")
    if other := [str(k) for k, v in content.items() if not isinstance(v, Tensor)]:
        raise _bad(
            path, f"entries that are no tensors ({_some(other)})", "a state dict", "save model.state_dict()"
        )
    return _without_prefixes({str(k): v for k, v in content.items()}, own)


def _without_prefixes(state: State, own: State) -> State:
    """Take a prefix off while every key has it and the module's own keys do not."""
    for _ in range(len(next(iter(state)).split("."))):
        for prefix in PREFIXES:
            if all(k.startswith(prefix) for k in state) and not all(k.startswith(prefix) for k in own):
                state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _without_auxiliary(module: nn.Module, state: State) -> State:
    if not type(module).__module__.startswith("torchvision."):
        return state
    absent = tuple(p for p in AUXILIARY if getattr(module, p[:-1], None) is None)
    return {k: v for k, v in state.items() if not k.startswith(absent)}


def _require_same_keys(path: Path, module: nn.Module, state: State, own: State) -> None:
    missing = [k for k in own if k not in state and not k.endswith(COUNTER)]
    unexpected = [k for k in state if k not in own]
    different = [_difference(k, state[k], own[k]) for k in own if k in state and not _fits(state[k], own[k])]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": different}
    lines = [f"\n  {len(keys)} {what}: {_some(keys)}" for what, keys in problems.items() if keys]
    if lines:
        raise _bad(
            path,
            f"other weights than {type(module).__name__} has",
            f"its {len(own)} keys",
            f"use weights of this very architecture{''.join(lines)}",
        )


def _fits(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and found.is_floating_point() == expected.is_floating_point()


def _difference(key: str, found: Tensor, expected: Tensor) -> str:
    texts = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (found, expected)]
    return f"{key} (found {texts[0]}, expected {texts[1]})"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more


def _require_finite(path: Path, state: State) -> None:
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise _bad(
            path,
            f"NaN or infinite values in {_some(bad)}",
            "finite weights",
            "use a checkpoint that did not diverge",
        )
