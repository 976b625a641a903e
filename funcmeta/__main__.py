"""``python -m funcmeta`` is ``funcmeta``."""

from funcmeta.cli import main

main()
