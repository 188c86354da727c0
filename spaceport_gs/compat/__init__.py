"""Doors for programs that were written for other libraries: their signatures, this engine's kernels."""
