"""Where trainings begin: fresh parameters for every task, by a seed."""

import copy
from collections.abc import Callable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from funcmeta import rng, tree
from funcmeta._batching import count, stack
from funcmeta._errors import ArgumentError
from funcmeta._typing import Meta, Params
from funcmeta.problem import Problem
from funcmeta.tasks import Task
from funcmeta.tasks._task import unstack
from funcmeta.unroll import Carry

Start = Callable[[int], Params]


def fresh_start(module: nn.Module) -> Start:
    """seed → the parameters that the layers of a module draw for themselves when they are reset."""
    layers = [each for each in module.modules() if _resets(each)]
    drawn = {id(param) for layer in layers for param in layer.parameters()}
    missing = [name for name, param in module.named_parameters() if param.requires_grad and id(param) not in drawn]
    if missing:
        raise ArgumentError(
            f"the parameters {missing} belong to no layer with reset_parameters, so no fresh ones can be drawn. Pass "
            f"start=, a function from the seed to initial parameters."
        )
    shell = copy.deepcopy(module)

    def start(seed: int) -> Params:
        own = copy.deepcopy(shell)
        with rng.forked(seed):
            for layer in filter(_resets, own.modules()):
                layer.reset_parameters()  # type: ignore[operator]
        return {name: param.detach() for name, param in own.named_parameters() if param.requires_grad}

    return start


def carry_of(problem: Problem, meta: Meta, tasks: Task, seed: int, start: Start) -> Carry:
    """The states of stacked tasks before the first step, detached, each from a seed of its own."""

    def state(task: Task, own: int) -> object:
        with rng.forked(own):
            return problem.init({**tree.detach(meta), "params": start(own)}, task, own)

    if not isinstance(tasks, Task):
        raise ArgumentError(f"tasks is a {type(tasks).__name__}, expected stacked tasks. Pass a sample_batch(...).")
    first = tasks.support(0) if callable(tasks.support) else tasks.support
    number = count((first, tasks.query))
    return Carry(
        tree.detach(stack([state(unstack(tasks, index), rng.fold(seed, 0, index)) for index in range(number)])), 0
    )


def _resets(layer: nn.Module) -> bool:
    """Whether a layer draws its own parameters anew; a parametrized one would draw what is computed from them."""
    return callable(getattr(layer, "reset_parameters", None)) and not is_parametrized(layer)
