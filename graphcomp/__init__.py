"""graphcomp: makes trained CNNs smaller and measurably faster."""
