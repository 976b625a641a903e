"""Reptile's pseudo-gradient: from where training ended towards where it began."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from funcmeta import tree
from funcmeta._errors import ArgumentError
from funcmeta._typing import Meta
from funcmeta._watch import watched
from funcmeta.estimators._attach import attach, refuse
from funcmeta.estimators._base import Outcome, Primal
from funcmeta.memory import Memory, StoreAll


@dataclass(frozen=True)
class Reptile:
    """The pseudo-gradient θ_0 − θ_K on the initial parameters, averaged over tasks; the loss is the last inner loss.

    Nothing is differentiated through the steps, so the memory policy has no effect. The meta-loss of the problem is
    not read. The result is not the gradient of ``loss`` and has no derivative of its own.

    Raises:
        ArgumentError: no steps are taken, or the problem's state has no ``params``.

    Examples:
        >>> Reptile()
        Reptile()

    Source: Nichol et al. (2018), "On First-Order Meta-Learning Algorithms", algorithm 1.
    """

    follows_memory: ClassVar[bool] = False
    unreached_advice: ClassVar[str] = (
        "Reptile moves the initial parameters only: set requires_grad=False on the rest of `meta`."
    )

    def __call__(self, primal: Primal, meta: Meta, memory: Memory) -> Outcome:
        """Train without a graph, and attach the way back as a gradient."""
        if primal.stop == primal.start:
            raise ArgumentError("Reptile was asked for 0 steps, expected at least 1: its loss is the last inner loss.")
        state = primal.init(meta)
        if not hasattr(state, "params"):
            raise ArgumentError(
                f"Reptile reads state.params, but the state is a {type(state).__name__}. Let init return an InnerState."
            )
        with torch.no_grad(), watched(False):
            path = StoreAll().run(primal.step, meta, tree.detach(state), primal.start, primal.stop)
            last = path.losses[-1]
            way_back = tree.map(lambda before, after: (before - after) / last.numel(), state.params, path.state.params)
        loss = attach(last.mean(), tree.leaves(way_back), tree.leaves(state.params))
        return Outcome(loss, path._replace(state=refuse(path.state, "Reptile", meta)) if loss.requires_grad else path)
