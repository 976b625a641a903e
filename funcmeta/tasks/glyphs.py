"""Few-shot classification of printed characters of 142 scripts, from the data that come with the package."""

import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from funcmeta._check import check_choice, check_count, check_device, check_floating, is_number
from funcmeta._errors import ArgumentError, DataError
from funcmeta.tasks._few_shot import ClassName, FewShot
from funcmeta.tasks._warp import NUMBERS, edge_distance, warp

SPLITS = ("train", "validation", "test")
DATA = Path(__file__).parent / "data" / "glyphs.bin"
_LARGEST = 1 << 24  # bytes that the data may take when unpacked
_MEMORY = 1 << 27  # bytes that unpacking may use


def glyphs(
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    split: str = "train",
    *,
    size: int = 28,
    variation: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> FewShot:
    """Few-shot classification of the characters of the world's scripts.

    6,147 letters and numbers of 142 scripts, one bitmap each, rendered from the Noto fonts; look-alikes are left out,
    whichever script they are of. The splits share no script (91 train, 23 validation, 28 test), and scripts that share
    many shapes are in one split. The variation within a class is SYNTHETIC: each example is the same bitmap,
    rotated, scaled, stretched, sheared, shifted, elastically deformed, and with strokes of another width. So a class
    differs less from itself than a handwritten one does; for real variation see `omniglot`.

    Args:
        ways: classes a task.
        shots: support examples a class.
        queries: query examples a class; 0 for tasks without a query.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        size: pixels a side.
        variation: factor on every variation, from 0 (all examples of a class alike) to 1.
        dtype: floating-point dtype of the images; they are computed in float32.
        device: where the images are computed and returned.

    Returns:
        A sampler of tasks with images [ways · shots, 1, size, size] in [0, 1], ink 1, and labels [ways · shots].

    Raises:
        ArgumentError: `variation` is not from 0 to 1, or another argument is out of range.

    Examples:
        >>> sampler = glyphs(ways=5, shots=1, queries=15)
        >>> images, labels = sampler.sample(seed=0).support
        >>> images.shape, labels.tolist()
        (torch.Size([5, 1, 28, 28]), [0, 1, 2, 3, 4])
        >>> len(sampler.classes), sampler.classes[0]
        (3937, ('Adlam', '𞤀'))

    Source:
        The Noto fonts, SIL Open Font License 1.1; the deformations follow Simard, Steinkraus and Platt 2003, section 2.
    """
    check_choice("split", split, SPLITS)
    check_count("size", size)
    check_floating(dtype)
    if not is_number(variation) or not 0 <= variation <= 1:
        raise ArgumentError(f"variation is {variation!r}, expected a number from 0 to 1. Pass 1.0 for all of it.")
    names, bitmaps = read(DATA, split)
    return FewShot(_Glyphs(names, bitmaps.to(check_device(device)), size, variation, dtype), ways, shots, queries)


@dataclass(frozen=True, eq=False)
class _Glyphs:
    """One bitmap a class, varied without end."""

    names: Sequence[ClassName]
    bitmaps: Tensor
    size: int
    variation: float
    dtype: torch.dtype
    examples: int | None = None

    def noise(self, ways: int, examples: int, generator: torch.Generator) -> Tensor:
        """Uniform in [-1, 1]: [ways, examples, NUMBERS]."""
        return torch.rand(ways, examples, NUMBERS, generator=generator) * 2 - 1

    def images(self, classes: Tensor, noise: Tensor) -> Tensor:
        """The classes' bitmaps, warped by the noise."""
        distance = edge_distance(self.bitmaps[classes.flatten().to(self.bitmaps.device)])
        variation = (noise * self.variation).to(distance.device).flatten(0, 1)
        images = warp(distance, variation, self.size).to(self.dtype)
        return images.view(*noise.shape[:3], 1, self.size, self.size)


def read(path: Path, split: str) -> tuple[tuple[ClassName, ...], Tensor]:
    """Names and bitmaps (booleans [classes, size, size]) of a split's classes, from a file of ``render.py``."""
    try:
        unpacker = lzma.LZMADecompressor(memlimit=_MEMORY)
        content = unpacker.decompress(path.read_bytes(), max_length=_LARGEST)
        header, body = content.split(b"\n", 1) if unpacker.eof else (b"", b"")
        table = json.loads(header)
        size, rows = table["size"], table["scripts"]
        names = [(script, character, part) for script, part, characters in rows for character in characters]
        packed = np.frombuffer(body, np.uint8).reshape(len(names), -(-(size**2) // 8))
        bitmaps = np.unpackbits(packed, axis=1, count=size**2).reshape(-1, size, size)
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is missing, truncated or not a glyph file ({type(error).__name__}). "
            "Install the package again, or render the file with tasks/data/render.py."
        ) from error
    wanted = [index for index, name in enumerate(names) if name[2] == split]
    return tuple(names[index][:2] for index in wanted), torch.from_numpy(bitmaps[wanted]).bool()
