"""Memory policies: what an exact estimator keeps of the trajectory."""

from funcmeta.memory._base import Memory, Step, Trajectory, advance
from funcmeta.memory.segments import Segments
from funcmeta.memory.store_all import StoreAll

__all__ = ["Memory", "Segments", "Step", "StoreAll", "Trajectory", "advance"]
