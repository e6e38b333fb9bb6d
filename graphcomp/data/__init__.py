"""Data sources: images, arrays and bundled sets as splits of samples, and their augmentation."""

from graphcomp.data.augment import Augmentation, Name, Unchanged, augmented, find_augmentation
from graphcomp.data.layout import as_planes, as_taken
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data, Indices, Pixels, Split

__all__ = [
    "Augmentation",
    "Data",
    "Indices",
    "Name",
    "Pixels",
    "Split",
    "Unchanged",
    "as_planes",
    "as_taken",
    "augmented",
    "find_augmentation",
    "load_data",
]
