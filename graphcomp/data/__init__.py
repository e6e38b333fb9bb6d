"""Data sources: images, arrays and bundled sets as splits of samples, and their augmentation."""

from graphcomp.data.augment import Augmentation, Name, Unchanged, find_augmentation
from graphcomp.data.sources import Data, Indices, Split, load_data

__all__ = ["Augmentation", "Data", "Indices", "Name", "Split", "Unchanged", "find_augmentation", "load_data"]
