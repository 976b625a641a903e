"""Functional meta-learning in PyTorch: a training loop as a pure function, and its derivative.

One inner step is ``state', info = step(meta, state, batch, seed)``. The library writes, runs, differentiates, bounds,
compares and checks the repetition of that function.
"""

from funcmeta import algorithms, estimators, memory, optim, tasks
from funcmeta._errors import (
    ArgumentError,
    CapturedTensorError,
    DataError,
    DetachedError,
    FuncmetaError,
    GraphError,
    LossError,
    MissingExtraError,
    NonFiniteError,
    ReplayError,
    StructureError,
    UnreachedLeafError,
)
from funcmeta._gradient import value_and_grad
from funcmeta.compare import Comparison, compare
from funcmeta.estimators import FirstOrder, Reptile, Reverse
from funcmeta.inspect import Finding, Readiness, inspect
from funcmeta.memory import Segments, StoreAll
from funcmeta.model import FunctionalModel, functionalize, init_params
from funcmeta.optim import Transform, apply_updates, chain
from funcmeta.problem import InnerState, Problem, StepInfo, inner_problem
from funcmeta.tasks import Task
from funcmeta.unroll import Carry, Unrolled, UnrollInfo, unroll
from funcmeta.unroll_batch import unroll_batch

__all__ = [
    "ArgumentError",
    "CapturedTensorError",
    "Carry",
    "Comparison",
    "DataError",
    "DetachedError",
    "Finding",
    "FirstOrder",
    "FuncmetaError",
    "FunctionalModel",
    "GraphError",
    "InnerState",
    "LossError",
    "MissingExtraError",
    "NonFiniteError",
    "Problem",
    "Readiness",
    "ReplayError",
    "Reptile",
    "Reverse",
    "Segments",
    "StepInfo",
    "StoreAll",
    "StructureError",
    "Task",
    "Transform",
    "UnreachedLeafError",
    "UnrollInfo",
    "Unrolled",
    "algorithms",
    "apply_updates",
    "chain",
    "compare",
    "estimators",
    "functionalize",
    "init_params",
    "inner_problem",
    "inspect",
    "memory",
    "optim",
    "tasks",
    "unroll",
    "unroll_batch",
    "value_and_grad",
]
