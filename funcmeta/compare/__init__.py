"""Estimators of the meta-gradient side by side: direction, size, error, time and memory."""

from funcmeta.compare._compare import compare
from funcmeta.compare._comparison import Comparison
from funcmeta.compare._rows import LeafRow, Row

__all__ = ["Comparison", "LeafRow", "Row", "compare"]
