"""Data sources: images, arrays and bundled sets as splits of samples, and their augmentation."""

from graphcomp.data.augment import Augmentation, Name, Unchanged, find_augmentation
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data, Indices, Split

__all__ = ["Augmentation", "Data", "Indices", "Name", "Split", "Unchanged", "find_augmentation", "load_data"]
