"""Where the real data lie that some tests read; they are not in the repository."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("FUNCMETA_DATA", Path(__file__).parents[2] / "shared" / "data"))
OMNIGLOT, WIKITEXT = DATA / "omniglot", DATA / "wikitext-2"


def _needs(folder: Path, *names: str) -> pytest.MarkDecorator:
    reason = f"{', '.join(names)} are not all in {folder}; set FUNCMETA_DATA to the folder above it"
    return pytest.mark.skipif(not all((folder / name).is_file() for name in names), reason=reason)


needs_omniglot = _needs(OMNIGLOT, "images_background_small1.zip", "images_background_small2.zip", "all_runs.zip")
needs_wikitext = _needs(WIKITEXT, "valid.txt", "test.txt")
