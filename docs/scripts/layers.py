"""Draw the layers of the library for docs/developers.md: ``python docs/scripts/layers.py``.

It reads the table in tests/test_layers.py and writes docs/images/layers.svg.
"""

import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).parents[1]
sys.path.insert(0, str(DOCS.parent / "tests"))

from test_layers import LAYERS  # noqa: E402

WIDTH, LINE, GAP, COLOR = 6.4, 62, 0.14, "#455a64"


def main() -> None:
    """Draw a box for each layer, the bottom one first, and the way that imports go."""
    rows = [textwrap.wrap(", ".join(sorted(layer, key=str.lower)), LINE) for layer in LAYERS]
    heights = [0.2 + 0.19 * len(lines) for lines in rows]
    total = sum(heights) + GAP * (len(rows) + 1)
    figure = plt.figure(figsize=(WIDTH, total))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, total))
    axes.axis("off")
    y = GAP
    for level, (lines, height) in enumerate(zip(rows, heights, strict=True)):
        shape = "round,pad=0,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch((0.4, y), 5.4, height, boxstyle=shape, fc="#eceff1", ec=COLOR))
        axes.text(0.2, y + height / 2, str(level), ha="center", va="center", fontsize=11, color=COLOR)
        axes.text(3.1, y + height / 2, "\n".join(lines), ha="center", va="center", fontsize=9, family="monospace")
        y += height + GAP
    axes.add_patch(FancyArrowPatch((5.97, total - GAP), (5.97, GAP), arrowstyle="-|>", mutation_scale=14, color=COLOR))
    axes.text(6.2, total / 2, "imports", rotation=270, ha="center", va="center", fontsize=11, color=COLOR)
    figure.savefig(DOCS / "images" / "layers.svg", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "funcmeta"
    plt.rcParams["svg.fonttype"] = "none"
    main()
