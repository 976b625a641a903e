"""Ink on paper: decoding the images of a drawing, and averaging it down."""

import io

import numpy as np
import torch
from torch import Tensor

from funcmeta._errors import DataError, MissingExtraError


def decode(content: bytes, name: str, side: int) -> Tensor:
    """Where the ink is, booleans [side, side], in a black on white PNG of that size."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            "Pillow, which decodes the PNG files, is not installed. "
            "Install the extra 'demo': pip install \".[demo]\" in a checkout of the repository."
        ) from error
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (side, side):
                raise DataError(f"{name} is an image of {image.size} pixels, expected {(side, side)}. Remove the file.")
            return torch.from_numpy(np.asarray(image.convert("L")) < 128)
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is truncated or not a PNG ({type(error).__name__}). Download it again.") from error


def average_areas(ink: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Images [..., height, width] resized to [..., size, size], each pixel the mean over the area that it covers."""
    down, right = (_shares(side, size).to(ink.device) for side in ink.shape[-2:])
    return (down @ ink.double() @ right.T).to(dtype)


def _shares(side: int, size: int) -> Tensor:
    """The share of each of ``side`` pixels in the mean of each of ``size`` pixels: [size, side], rows that sum to 1."""
    edges = torch.arange(size + 1, dtype=torch.float64)[:, None] * (side / size)
    pixels = torch.arange(side, dtype=torch.float64)
    overlap = torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)
    return overlap.clamp(min=0) * (size / side)
