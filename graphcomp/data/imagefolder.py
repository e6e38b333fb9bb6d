"""Folders of images: which samples there are, and whose class each one is."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch

from graphcomp.base import is_dir
from graphcomp.data.arrays import statistics
from graphcomp.data.classes import Folders, carry_indices, folder_classes
from graphcomp.data.images import CROP_FRACTION, DECODED, SUFFIXES, decode, is_image
from graphcomp.data.layout import COLOURS, as_taken, in_front
from graphcomp.data.request import Request, either, sizes
from graphcomp.data.split import (
    Data,
    Fetch,
    Indices,
    Source,
    Split,
    describe,
    split_in_two,
    unlabelled,
    whole_split,
)
from graphcomp.errors import DataError
from graphcomp.ir import Batch


def load_imagefolder(request: Request) -> Data:
    """The data of class folders of images, or of one folder of images without labels."""
    root = Path(request.where)
    if not is_dir(root):
        raise DataError.at(root, "no such directory", "class folders of images", "correct the path")
    if len(request.shape) != 3 or in_front(request.shape)[0] not in COLOURS:
        raise DataError.at(
            request.spec,
            f"a model that takes {sizes(request.shape)}",
            "1xHxW or 3xHxW for images (or HxWx1, HxWx3)",
            "use npz",
        )
    parts = {name for name in ("train", "val", "test") if is_dir(root / name)}
    if not parts and _is_loose(root):
        return _unlabelled(request, root)
    return _separate(request, root, parts) if parts else _halved(request, root)


def _is_loose(root: Path) -> bool:
    """Whether a folder holds images and no folders that could be classes."""
    seen = [p for p in root.iterdir() if not p.name.startswith(".")]
    return not any(p.is_dir() for p in seen) and any(map(is_image, seen))


def _unlabelled(request: Request, root: Path) -> Data:
    """Images without labels: enough to calibrate and to fit, and to measure how far outputs move."""
    if request.classes is not None:
        raise DataError.at(
            request.spec, "classes and a folder without class folders", "one of them", "leave classes out"
        )
    paths = _images(root, may_be_empty=False)
    labels = np.zeros(len(paths), np.int64)
    halves = split_in_two(labels, _file_fetch(paths, request), 0.5)
    train, evaluation = map(unlabelled, halves)
    if not len(train) or not len(evaluation):
        raise DataError.at(root, f"{len(paths)} image", "at least 2, for two halves", "add images")
    what = f"{root}, images without labels, fixed split into halves"
    return Data(train, evaluation, None, request.spec, describe(what, train, evaluation))


def _separate(request: Request, root: Path, parts: set[str]) -> Data:
    held_out = "val" if "val" in parts else "test"
    if not {"train", held_out} <= parts:
        raise DataError.at(
            root,
            f"{either(tuple(sorted(parts)))} alone",
            "train and val (or test)",
            "add the other, or give the folder of class folders itself",
        )
    folders = _folders(root / "train")
    extra = sorted(set(_folders(root / held_out)) - set(folders))
    are_named = request.classes != "sorted" and carry_indices([*folders, *extra])
    if extra and not _is_mapped(request) and not are_named:
        raise DataError.at(
            root / held_out,
            f"class folder {extra[0]!r}",
            f"only those of {root / 'train'}",
            "make them the same, or begin the names with the index of the output (0017_goldfish)",
        )
    classes = folder_classes(root, sorted([*folders, *extra]), request.outputs, request.classes)
    train, evaluation = (
        whole_split(*_image_samples(request, root / part, classes.index)) for part in ("train", held_out)
    )
    what = f"{root}, {_counted(classes)}, train and {held_out}"
    return _labelled(request, classes, what, train, evaluation)


def _halved(request: Request, root: Path) -> Data:
    classes = folder_classes(root, _folders(root), request.outputs, request.classes)
    train, evaluation = split_in_two(*_image_samples(request, root, classes.index), 0.5)
    what = f"{root}, {_counted(classes)}, fixed stratified split into halves"
    return _labelled(request, classes, what, train, evaluation)


def _labelled(request: Request, classes: Folders, what: str, train: Split, evaluation: Split) -> Data:
    said = describe(what, train, evaluation)
    return Data(train, evaluation, classes.count, _explicit(request, classes), said, names=classes.index)


def _counted(classes: Folders) -> str:
    found = len(classes.index)
    return f"{classes.count} classes" if found == classes.count else f"{found} of {classes.count} classes"


def _explicit(request: Request, classes: Folders) -> str:
    """The spec, with the reading of the folders' names in it, if the number of outputs decided about it."""
    if request.classes is not None or classes.reading == "sorted":
        return request.spec
    return f"{request.spec}{'&' if '?' in request.spec else '?'}classes={classes.reading}"


def _is_mapped(request: Request) -> bool:
    """Whether a file names the folders."""
    return request.classes not in (None, "sorted", "index")


def _folders(folder: Path) -> list[str]:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        loose = sum(is_image(p) for p in folder.iterdir())
        raise DataError.at(
            folder,
            f"{loose} images and no class folders",
            "<class>/<image>",
            "move every image into a folder named after its class, or pack the images as npz",
        )
    return classes


def _image_samples(request: Request, folder: Path, classes: Mapping[str, int]) -> tuple[Indices, Fetch]:
    mapped = _is_mapped(request)
    found = [(p, i) for name, i in classes.items() for p in _images(folder / name, may_be_empty=mapped)]
    labels = np.array([label for _, label in found], dtype=np.int64)
    return labels, _file_fetch([path for path, _ in found], request)


def _images(folder: Path, *, may_be_empty: bool) -> list[Path]:
    """Images of one class; a class that has a folder in train only has none."""
    if not is_dir(folder):
        return []
    images = sorted(p for p in folder.iterdir() if is_image(p))
    if not images and not may_be_empty:
        raise DataError.at(
            folder,
            "no images",
            f"files ending in {', '.join(sorted(SUFFIXES))}",
            "add images, remove the folder, or name it in ?classes=FILE",
        )
    return images


def _file_fetch(paths: list[Path], request: Request) -> Fetch:
    mean, std = statistics(request)
    real = cache(lambda i: paths[i].resolve())

    def fetch(indices: Indices) -> Batch:
        batch = torch.stack([decode(paths[i], in_front(request.shape)) for i in indices])
        return (as_taken(batch.float().div_(255).sub_(mean).div_(std), request.shape),)

    def identify(indices: Indices) -> Iterator[bytes]:
        yield f"{request.shape} {request.mean} {request.std} {CROP_FRACTION} {DECODED}\n".encode()
        for i in indices:
            try:
                status = paths[i].stat()
            except OSError as error:
                raise DataError.at(
                    paths[i], f"no file ({error})", "the image that was listed", "restore it"
                ) from error
            yield f"{real(i)} {status.st_size} {status.st_mtime_ns}\n".encode()

    pixels = as_taken(mean, request.shape), as_taken(std, request.shape)
    return Source(fetch, identify, (pixels,), held=False)
