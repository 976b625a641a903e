"""One estimator at work on the problem of a comparison."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from funcmeta import tree
from funcmeta._errors import DetachedError, UnreachedLeafError
from funcmeta._typing import Meta
from funcmeta.compare._measure import Counted
from funcmeta.estimators import Estimator
from funcmeta.memory import Memory, StoreAll
from funcmeta.problem import Problem
from funcmeta.tasks import Task
from funcmeta.unroll import unroll

Gradient = dict[str, Tensor]
"""A meta-gradient, or a direction in ``meta``, by leaf."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all estimators."""

    problem: Problem
    meta: Meta
    task: Task
    steps: int
    seed: int

    @cached_property
    def learned(self) -> Gradient:
        """The leaves of ``meta`` that require grad, by name."""
        return {name: leaf for name, leaf in tree.named_leaves(self.meta, "meta") if leaf.requires_grad}

    def own_meta(self, constant: frozenset[str] = frozenset()) -> Meta:
        """``meta`` as leaves of its own on the same memory, of which some do not require grad."""
        leaves = [
            leaf.detach().requires_grad_(name in self.learned and name not in constant)
            for name, leaf in tree.named_leaves(self.meta, "meta")
        ]
        return tree.unflatten(leaves, tree.flatten(self.meta)[1])


@dataclass(frozen=True)
class Result:
    """What an estimator gave: its loss, its gradient, and the leaves at which that is zero for want of a way there."""

    loss: float
    gradient: Gradient
    unreached: frozenset[str]


@dataclass(frozen=True)
class Candidate:
    """An estimator with its memory policy; some leaves of ``meta`` may be constant for it."""

    estimator: Estimator
    memory: Memory = StoreAll()  # noqa: RUF009
    constant: frozenset[str] = frozenset()

    def gradient(self, setting: Setting) -> Result:
        """The meta-gradient; raises what ``unroll`` raises."""
        meta = setting.own_meta(self.constant)
        out = unroll(
            setting.problem,
            meta,
            setting.task,
            steps=setting.steps,
            estimator=self.estimator,
            memory=self.memory,
            seed=setting.seed,
        )
        wanted = {name: leaf for name, leaf in tree.named_leaves(meta, "meta") if leaf.requires_grad}
        grads = torch.autograd.grad(out.loss, list(wanted.values())) if wanted else ()
        zeros = {name: torch.zeros_like(leaf) for name, leaf in setting.learned.items()}
        return Result(out.loss.item(), zeros | dict(zip(wanted, grads, strict=True)), self.constant)

    def reached(self, setting: Setting) -> Result:
        """The meta-gradient, with the leaves that the estimator cannot reach as constants."""
        counted = Counted(setting.problem)
        try:
            return self.gradient(replace(setting, problem=counted.problem))
        except UnreachedLeafError as error:
            constant = self.constant.union(error.leaves)
        except DetachedError:
            if not counted.constant_after(setting.steps):
                raise
            constant = frozenset(setting.learned)
        return replace(self, constant=constant).reached(setting)
