"""Ink on paper: decoding the images of a drawing, and averaging it down."""

import io
import struct

import numpy as np
import torch
from torch import Tensor

from funcmeta._errors import DataError, MissingExtraError


def decode(content: bytes, name: str, side: int) -> Tensor:
    """Where the ink is, booleans [side, side], in a black on white PNG whose header has that size."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            "Pillow, which decodes the PNG files, is not installed. "
            "Install the extra 'demo': pip install \".[demo]\" in a checkout of the repository."
        ) from error
    size = struct.unpack(">II", content[16:24]) if content[12:16] == b"IHDR" and len(content) >= 24 else None
    if size not in (None, (side, side)):
        raise DataError(f"{name} is an image of {size} pixels, expected {(side, side)}. Remove the file.")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            return torch.from_numpy(np.asarray(image.convert("L")) < 128)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
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
