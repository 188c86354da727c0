"""Spaceport GS: photos in, a published 3D Gaussian-splat scene out."""

__version__ = "0.1.0"
