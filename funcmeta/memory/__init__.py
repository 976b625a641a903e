"""Memory policies: what an exact estimator keeps of the trajectory."""

from funcmeta.memory._base import Memory, Step, Trajectory, advance
from funcmeta.memory._follow import follow
from funcmeta.memory._plan import Action, Advance, Backward, Drop, Estimate, Plan, Planned, Restore, Store, plan
from funcmeta.memory.budget import Budget, budget
from funcmeta.memory.offload import Offload
from funcmeta.memory.revolve import Revolve
from funcmeta.memory.segments import Segments
from funcmeta.memory.store_all import StoreAll

__all__ = [
    "Action",
    "Advance",
    "Backward",
    "Budget",
    "Drop",
    "Estimate",
    "Memory",
    "Offload",
    "Plan",
    "Planned",
    "Restore",
    "Revolve",
    "Segments",
    "Step",
    "Store",
    "StoreAll",
    "Trajectory",
    "advance",
    "budget",
    "follow",
    "plan",
]
