"""The command line: ``funcmeta compare``."""

import sys


def main() -> None:
    """Run the command line; it needs typer, rich and matplotlib, which the extra ``demo`` brings."""
    try:
        from funcmeta.cli._app import app
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.exit(f'The command line needs {error.name}. Run pip install ".[demo]" in a checkout of funcmeta.')
    app(prog_name="funcmeta")
