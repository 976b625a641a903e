"""Renders ``glyphs.bin`` from Debian's ``fonts-noto-core``: the same fonts and the same Pillow give the same bytes.

    python funcmeta/tasks/data/render.py [FONT_FOLDER] [OUTPUT]

Needs Pillow and fontTools, which the package itself does not. From each script it takes letters and numbers that do
not decompose into others, at most ``CAP`` of them, evenly spread; crops each to its ink and scales it to ``SIZE``
pixels; and leaves out blank and very long shapes and look-alikes of characters that are in already. Scripts that share
many shapes go to one split.
"""

import itertools
import json
import lzma
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fontTools import unicodedata as scripts  # type: ignore[import-untyped]
from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
from PIL import Image, ImageFont

SIZE = 32  # pixels a side
LEAST, CAP = 10, 100  # characters a script
EM = 160  # pixels at which a font draws before the reduction to SIZE
INK = 90  # coverage of 255 from which a pixel is ink: below one half, so that hairlines survive
LONGEST = 3  # times as long as wide, at most
ALIKE = 0.05  # share of the ink that two shapes may have beyond one pixel of each other and still be look-alikes
RELATED = 0.15  # share of the smaller script's characters with a look-alike from which two scripts stay together
SHARES = {"train": 0.64, "validation": 0.16, "test": 0.2}
KINDS = {"Lu", "Ll", "Lo", "Nd", "Nl", "No"}
NO_SCRIPT = {"Zyyy", "Zinh", "Zzzz"}
FONTS = Path("/usr/share/fonts/truetype/noto")


def coverage(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """For each script, by name, the font that covers most of it (the first by name of several) and the characters."""
    found: dict[str, dict[Path, list[str]]] = defaultdict(lambda: defaultdict(list))
    for font in sorted(folder.glob("Noto*-Regular.ttf")):
        for character in map(chr, sorted(TTFont(font).getBestCmap())):
            script = scripts.script(character)
            plain = unicodedata.category(character) in KINDS and not unicodedata.decomposition(character)
            if script not in NO_SCRIPT and plain:
                found[scripts.script_name(script)][font].append(character)
    return {name: max(fonts.items(), key=lambda item: len(item[1])) for name, fonts in sorted(found.items())}


def draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """The character's ink, centred in SIZE x SIZE pixels; None when there is none or it is too long."""
    mask = font.getmask(character, mode="L")
    image = Image.frombytes("L", mask.size, bytes(mask))
    box = image.getbbox() if all(mask.size) else None
    if box is None:
        return None
    image = image.crop(box)
    long, short = max(image.size), min(image.size)
    if long > LONGEST * short:
        return None
    width, height = (max(1, round(side * SIZE / long)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BOX)) >= INK
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    canvas = np.zeros((SIZE, SIZE), bool)
    canvas[top : top + height, left : left + width] = pixels
    return canvas if canvas.any() else None


def render(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """(script, character, bitmap) of LEAST to CAP characters a script."""
    for script, (path, characters) in coverage(folder).items():
        font = ImageFont.truetype(str(path), EM, layout_engine=ImageFont.Layout.BASIC)
        drawn = [(character, draw(font, character)) for character in characters]
        kept = [(character, bitmap) for character, bitmap in drawn if bitmap is not None]
        count = min(CAP, len(kept)) if len(kept) >= LEAST else 0
        for index in range(count):
            character, bitmap = kept[index * len(kept) // count]
            yield script, character, bitmap


def look_alikes(bitmaps: np.ndarray) -> np.ndarray:
    """Which pairs have all but ALIKE of their ink within one pixel of the other's."""
    padded = np.pad(bitmaps, ((0, 0), (1, 1), (1, 1)))
    shifts = itertools.product(range(3), range(3))
    grown = np.any([padded[:, y : y + SIZE, x : x + SIZE] for y, x in shifts], axis=0)
    flat, wide = (each.reshape(len(bitmaps), -1).astype(np.float32) for each in (bitmaps, grown))
    ink = flat.sum(1)
    beyond = ink[:, None] - flat @ wide.T  # whole numbers, so exact in float32
    alike: np.ndarray = beyond + beyond.T <= ALIKE * (ink[:, None] + ink[None, :])
    return alike


def families(names: list[str], alike: np.ndarray) -> list[list[str]]:
    """The scripts in groups that share shapes, the largest group first."""
    sizes = Counter(names)
    script = np.array(names)
    family = {name: {name} for name in sizes}
    for one, other in itertools.combinations(sizes, 2):
        shared = alike[np.ix_(script == one, script == other)]
        if min(shared.any(0).sum(), shared.any(1).sum()) >= RELATED * min(sizes[one], sizes[other]):
            joined = family[one] | family[other]
            family.update(dict.fromkeys(joined, joined))
    groups = {min(group): sorted(group) for group in family.values()}
    return sorted(groups.values(), key=lambda group: (-len(group), group))


def splits(groups: list[list[str]]) -> dict[str, str]:
    """Each script's split: a family goes where most scripts are missing from SHARES."""
    split: dict[str, str] = {}
    total = sum(map(len, groups))
    for group in groups:
        have = Counter(split.values())
        neediest = max(SHARES, key=lambda name: SHARES[name] * total - have[name])
        split.update(dict.fromkeys(group, neediest))
    return split


def main(folder: Path, output: Path) -> None:
    names, characters, bitmaps = map(list, zip(*render(folder), strict=True))
    alike = look_alikes(np.array(bitmaps))
    split = splits(families(names, alike))
    kept: list[int] = []
    for index in range(len(names)):
        if not alike[index, kept].any():
            kept.append(index)
    table: dict[str, list[str]] = defaultdict(list)
    for index in kept:
        table[names[index]].append(characters[index])
    rows = [[name, split[name], "".join(row)] for name, row in table.items()]
    header = json.dumps({"size": SIZE, "scripts": rows}, ensure_ascii=False, separators=(",", ":"))
    body = np.packbits(np.array(bitmaps)[kept].reshape(len(kept), -1), axis=1).tobytes()
    packing = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}
    packed = lzma.compress(header.encode() + b"\n" + body, check=lzma.CHECK_SHA256, filters=[packing])
    output.write_bytes(packed)
    print(f"{len(kept)} characters of {len(rows)} scripts, {len(packed)} bytes")


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    main(*arguments, *[FONTS, Path(__file__).with_name("glyphs.bin")][len(arguments) :])
