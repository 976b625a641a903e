"""What the examples leave behind: a picture and a JSON file in one folder."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def save(out: Path, figures: dict[str, Any], picture: Figure) -> None:
    """Write ``figures.json`` and ``picture.png`` into the folder, which is made, and say so."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.json").write_text(json.dumps(figures, indent=1, allow_nan=False), encoding="utf-8")
    picture.savefig(out / "picture.png", dpi=150)
    print(f"Wrote {out / 'figures.json'} and {out / 'picture.png'}.")
