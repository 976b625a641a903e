"""Where the real data lie that some tests read; they are not in the repository."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("FUNCMETA_DATA", Path(__file__).parents[2] / "shared" / "data"))
OMNIGLOT, WIKITEXT = DATA / "omniglot", DATA / "wikitext-2"

needs_omniglot, needs_wikitext = (
    pytest.mark.skipif(
        not each.is_dir(), reason=f"{each.name} is not in {DATA}; set FUNCMETA_DATA to the folder that has it"
    )
    for each in (OMNIGLOT, WIKITEXT)
)
