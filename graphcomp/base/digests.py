"""sha256, in hex: what fingerprints, caches, cells and engines are told apart by."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Buffer = bytes | memoryview


def sha256(parts: Iterable[Buffer]) -> str:
    """Of bytes that come in parts; where one ends and the next begins is not told apart."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """Of a JSON value, whatever the order of its keys."""
    return sha256([json.dumps(value, sort_keys=True).encode()])


def tensor_parts(tensors: "Mapping[str, Tensor]") -> Iterator[Buffer]:
    """Names, types, shapes and values of tensors, in the order of their names."""
    import torch

    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
