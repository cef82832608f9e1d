"""A share of a picture made black, by cells of a grid: numpy and pictures only, no torch. What a mask is for is in hscr/perturb.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def blackened(image: Image.Image, keep: NDArray[np.bool_]) -> Image.Image:
    """The picture in RGB with those cells of the grid `keep` [rows, columns], stretched over it, black that are false."""
    pixels = np.array(image.convert("RGB"))
    (height, width), (rows, columns) = pixels.shape[:2], keep.shape
    hidden = ~keep[np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)]
    pixels[hidden] = 0
    return Image.fromarray(pixels)


def drawn_cells(side: int, ratio: float, seed: Any) -> NDArray[np.bool_]:
    """Which of side × side cells are kept: round(ratio·side²) are not, at least one is. The seed is numpy's: a number or several."""
    n = side * side
    keep = np.ones(n, dtype=bool)
    keep[np.random.default_rng(seed).permutation(n)[: min(round(ratio * n), n - 1)]] = False
    return keep.reshape(side, side)
