"""Draw the pictures of docs/tutorial: ``python docs/scripts/tutorial_pictures.py``.

It writes docs/images/tutorial_step.svg, tutorial_unroll.svg, and tutorial_race.png, for which it runs the blocks of the
page on training an optimizer.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).parents[1]
IMAGES = DOCS / "images"
DATA, STATE, WORK, LEARNED, BACK = "#eceff1", "#cfd8dc", "#ffffff", "#ffe0b2", "#bf360c"


def canvas(width: float, height: float) -> Axes:
    """Axes in inches, without a frame."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.1, height: float = 0.5) -> None:
    """A box around a point, with a text."""
    corner = (x - width / 2, y - height / 2)
    shape = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec="#455a64")
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=11)


def arrow(
    axes: Axes, begin: tuple[float, float], end: tuple[float, float], *, back: bool = False, bend: float = 0.0
) -> None:
    """An arrow; that of a derivative is dashed."""
    axes.add_patch(
        FancyArrowPatch(
            begin,
            end,
            arrowstyle="-|>",
            mutation_scale=12,
            color=BACK if back else "#263238",
            linestyle="--" if back else "-",
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=0,
            shrinkB=0,
        )
    )


def step() -> None:
    """One training step."""
    axes = canvas(7.2, 2.05)
    middle = 0.75
    box(axes, 0.7, middle, "parameters θ", STATE, 1.2)
    box(axes, 2.3, middle, "model,\nloss ℓ", WORK, 0.95, 0.6)
    box(axes, 3.95, middle, "gradient g", WORK, 1.1)
    box(axes, 5.35, middle, "optimizer", LEARNED, 1.0)
    box(axes, 6.65, middle, "θ′", STATE, 0.6)
    box(axes, 2.3, 1.75, "batch", DATA, 0.9, 0.4)
    arrow(axes, (1.3, middle), (1.82, middle))
    arrow(axes, (2.3, 1.55), (2.3, 1.05))
    arrow(axes, (2.78, middle), (3.4, middle), back=True)
    arrow(axes, (4.5, middle), (4.85, middle))
    arrow(axes, (5.85, middle), (6.35, middle))
    arrow(axes, (0.7, 0.5), (5.35, 0.5), bend=0.16)
    axes.text(5.35, 1.1, "with numbers φ", ha="center", fontsize=9)
    axes.text(3.08, 0.83, "∂ℓ/∂θ", ha="center", fontsize=9, color=BACK)
    plt.gcf().savefig(IMAGES / "tutorial_step.svg", metadata={"Date": None})


def unroll() -> None:
    """Some training steps, judged at the end, and the way back."""
    axes = canvas(7.2, 3.2)
    row = 1.75
    places = (0.55, 2.35, 4.15)
    names = ("θ₀", "θ₁", "θ₂")
    for place, name in zip(places, names, strict=True):
        box(axes, place, row, name, LEARNED if name == "θ₀" else STATE, 0.6)
        box(axes, place + 0.9, row, "step", WORK, 0.7)
        box(axes, place + 0.9, 0.95, "batch", DATA, 0.7, 0.4)
        arrow(axes, (place + 0.9, 1.15), (place + 0.9, 1.5))
        arrow(axes, (place + 0.3, row + 0.08), (place + 0.55, row + 0.08))
        arrow(axes, (place + 0.55, row - 0.1), (place + 0.3, row - 0.1), back=True)
        arrow(axes, (place + 1.25, row + 0.08), (place + 1.5, row + 0.08))
        arrow(axes, (place + 1.5, row - 0.1), (place + 1.25, row - 0.1), back=True)
        arrow(axes, (place + 0.82, 2.6), (place + 0.82, 2.0))
        arrow(axes, (place + 0.98, 2.0), (place + 0.98, 2.6), back=True)
    box(axes, 3.25, 2.85, "numbers φ of the optimizer", LEARNED, 5.0)
    box(axes, 5.95, row, "θ₃", STATE, 0.6)
    box(axes, 6.75, row, "meta-\nloss", WORK, 0.7, 0.6)
    box(axes, 6.75, 0.95, "query", DATA, 0.7, 0.4)
    arrow(axes, (6.75, 1.15), (6.75, 1.45))
    arrow(axes, (6.25, row + 0.08), (6.4, row + 0.08))
    arrow(axes, (6.4, row - 0.1), (6.25, row - 0.1), back=True)
    arrow(axes, (0.4, 0.38), (1.0, 0.38))
    axes.text(1.1, 0.38, "meta-forward pass", va="center", fontsize=10)
    arrow(axes, (4.0, 0.38), (3.4, 0.38), back=True)
    axes.text(4.1, 0.38, "meta-backward pass: the meta-gradient", va="center", fontsize=10, color=BACK)
    plt.gcf().savefig(IMAGES / "tutorial_unroll.svg", metadata={"Date": None})


def race() -> None:
    """The race, as the page draws it."""
    page = (DOCS / "tutorial" / "4_train_it.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec("\n".join(blocks), {"__name__": "__main__"})
        shutil.copy("race.png", IMAGES / "tutorial_race.png")
        os.chdir(DOCS)


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "funcmeta"
    step()
    unroll()
    race()
