"""Files, caches, processes, progress: what knows no network."""
