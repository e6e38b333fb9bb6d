"""Data sources: images, arrays and bundled sets as splits of samples, and their augmentation."""
