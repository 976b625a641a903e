"""Where the real data lie that some tests read; they are not in the repository."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("FUNCMETA_DATA", Path(__file__).parents[2] / "shared" / "data"))
OMNIGLOT, WIKITEXT = DATA / "omniglot", DATA / "wikitext-2"


def needs(path: Path) -> pytest.MarkDecorator:
    """A mark for tests that read this file or folder."""
    reason = f"{path} does not exist; set FUNCMETA_DATA to the folder that holds omniglot/ and wikitext-2/"
    return pytest.mark.skipif(not path.exists(), reason=reason)
