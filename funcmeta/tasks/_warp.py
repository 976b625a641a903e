"""Variations of a shape, for whole batches: affine, elastic, and in the width of its strokes."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 4  # pixels around an edge within which distances are known
INNER = 0.7  # share of the image's side that an unvaried shape takes
ROTATION = 0.25  # radians
SCALE = 0.15  # logarithm of the factor
STRETCH = 0.12  # logarithm of width against height
SHEAR = 0.25
SHIFT = 0.12  # of half a side
ELASTIC = 0.35  # of half a side, at a control point
BOLDER, LIGHTER = 1.2, 0.4  # pixels by which a stroke's edge moves
CONTROLS = 5  # control points of the elastic field along a side

NUMBERS = 7 + 2 * CONTROLS**2
"""How many numbers in [-1, 1] describe one variation; all zero is the shape as it is."""


def edge_distance(ink: Tensor) -> Tensor:
    """Distance from each pixel's centre to the edge of the ink, positive inside, at most ``REACH`` either way.

    Booleans [shapes, height, width] become float32 [shapes, height + 2 · REACH, width + 2 · REACH].
    """
    padded = F.pad(ink, (REACH,) * 4)
    signed = torch.where(padded, _to_nearest(~padded) - 0.5, 0.5 - _to_nearest(padded))
    return signed.clamp(-REACH, REACH)


def warp(distance: Tensor, variation: Tensor, size: int) -> Tensor:
    """Images in [0, 1] of shapes given by their edge distance, each under its variations.

    Distances [shapes, height, width] and variations [shapes, examples, NUMBERS] become [shapes, examples, size, size].
    """
    shapes, examples = variation.shape[:2]
    side = distance.shape[-1] - 2 * REACH
    angle, scale = ROTATION * variation[..., 0], SCALE * variation[..., 1]
    stretch, shear = STRETCH * variation[..., 2], SHEAR * variation[..., 3]
    shift, stroke = SHIFT * variation[..., 4:6], variation[..., 6, None, None]
    elastic = ELASTIC * variation[..., 7:].view(shapes, examples, CONTROLS**2, 2)
    wide, high = torch.exp(scale + stretch), torch.exp(scale - stretch)
    right = torch.stack([angle.cos(), angle.sin()], -1) * wide[..., None]
    down = torch.stack([shear * angle.cos() - angle.sin(), shear * angle.sin() + angle.cos()], -1) * high[..., None]
    controls = torch.cat([torch.stack([right, down, shift], -2), elastic], -2) * (side / distance.shape[-1] / INNER)
    grid = (_basis(size, variation) @ controls.flatten(0, 1)).view(shapes, examples * size, size, 2)
    sampled = F.grid_sample(distance[:, None], grid, padding_mode="border", align_corners=False)
    moved = (BOLDER + LIGHTER) / 2 * stroke + (BOLDER - LIGHTER) / 2 * stroke.abs()
    pixel = side / INNER / size
    return ((sampled.view(shapes, examples, size, size) + moved) / pixel + 0.5).clamp(0, 1)


def _to_nearest(mask: Tensor) -> Tensor:
    """Distance to the nearest true pixel, infinite where there is none within ``REACH`` of both row and column."""
    squared = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.inf)
    for padding, dim in (((REACH, REACH), -1), ((0, 0, REACH, REACH), -2)):
        padded = F.pad(squared, padding, value=torch.inf)
        steps = range(2 * REACH + 1)
        shifted = [padded.narrow(dim, step, mask.shape[dim]) + (step - REACH) ** 2 for step in steps]
        squared = functools.reduce(torch.minimum, shifted)
    return squared.sqrt()


def _basis(size: int, like: Tensor) -> Tensor:
    """The functions x, y, 1 and the products of cubic B-splines, at the pixels of an image: [size², 3 + CONTROLS²]."""
    centres = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) * (2 / size) - 1
    knots = torch.arange(CONTROLS, dtype=like.dtype, device=like.device) - 1
    away = ((centres[:, None] + 1) / 2 * (CONTROLS - 3) - knots).abs()
    spline = torch.where(away < 1, 2 / 3 - away**2 + away**3 / 2, (2 - away).clamp(min=0) ** 3 / 6)
    products = (spline[:, None, :, None] * spline[None, :, None, :]).reshape(size**2, -1)
    down, right = torch.meshgrid(centres, centres, indexing="ij")
    return torch.cat([torch.stack([right.flatten(), down.flatten(), torch.ones_like(products[:, 0])], 1), products], 1)
