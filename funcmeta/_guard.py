"""What an unroll refuses: arguments it cannot work with, and losses that do not carry what was promised."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._check import is_function
from funcmeta._errors import ArgumentError, DetachedError, NonFiniteError, ReplayError, UnreachedLeafError
from funcmeta._graph import Reached, check_declared, inside_functorch, retire, walk
from funcmeta._typing import Batch, Meta, Tree
from funcmeta.estimators import Estimator, Primal
from funcmeta.memory import Memory
from funcmeta.memory._follow import expect_use
from funcmeta.problem import Problem
from funcmeta.tasks import Task


def check_arguments(
    problem: Problem, meta: Meta, task: Task, steps: int, seed: int, estimator: Estimator, memory: Memory
) -> None:
    """Raise unless an unroll can begin with these arguments."""
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem is a {type(problem).__name__}, expected a Problem. Pass Problem(init, step, meta_loss) or what "
            f"inner_problem returns."
        )
    for name, part in zip(problem._fields, problem, strict=True):
        if not is_function(part) and (part is not None or name != "meta_loss"):
            raise ArgumentError(f"problem.{name} is {part!r}, expected a function. Pass one.")
    rng.check_seed(seed)
    if torch.is_inference_mode_enabled():
        raise ArgumentError("An unroll takes gradients, which torch.inference_mode forbids. Use torch.no_grad() there.")
    for name, value, method, usual in (
        ("estimator", estimator, "unreached_advice", "Reverse()"),
        ("memory", memory, "run", "StoreAll()"),
    ):
        if isinstance(value, type) or not hasattr(value, method):
            hint = f"{value.__name__}()" if isinstance(value, type) else usual
            raise ArgumentError(f"{name} is {value!r}, expected an object that can do the work. Pass e.g. {hint}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ArgumentError(f"steps is {steps!r}, expected an integer of 0 or more. Pass e.g. steps=5.")
    if steps >= 2**31:
        raise ArgumentError(f"steps is {steps}, expected less than 2**31. Pass fewer, and go on by carry=.")
    if isinstance(meta, torch.nn.Module):
        raise ArgumentError("meta is a Module, expected a tree of tensors. Pass dict(module.named_parameters()).")
    tree.check_tensors(meta, name="meta")
    check_has_data(meta, "meta")
    if not isinstance(task, Task):
        raise ArgumentError(f"task is a {type(task).__name__}, expected a Task. Pass Task(support, query).")
    for index, leaf in enumerate(tree.leaves(task[:2])):
        if not isinstance(leaf, Tensor):
            _check_data(tree.named_leaves(task[:2], "task")[index][0], leaf)
    check_has_data(task[:2], "task")
    if isinstance(task.support, type):
        raise ArgumentError(f"task.support is {task.support!r}, expected a function of the step index. Pass one.")
    if not callable(task.support) and not any(isinstance(leaf, Tensor) for leaf in tree.leaves(task.support)):
        raise ArgumentError(
            f"task.support is a {type(task.support).__name__}, expected tensors or a function of the step index. Pass "
            f"the batch of every step, or a function that returns the batch of a given step."
        )


def check_has_data(value: Tree, name: str) -> None:
    """Raise when a tensor is on the device ``meta``."""
    for index, leaf in enumerate(tree.leaves(value)):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            path = tree.named_leaves(value, name)[index][0]
            raise ArgumentError(
                f"{path} is {tree.describe(leaf)}, a device where tensors have no data. Pass it on 'cpu' or 'cuda'."
            )


def _check_data(name: str, leaf: object) -> None:
    """Raise when this part of a task looks like data, but is no tensor."""
    name = name.replace("[0]", ".support", 1) if name.startswith("task[0]") else name.replace("[1]", ".query", 1)
    if hasattr(leaf, "__array__"):
        raise ArgumentError(f"{name} is a {type(leaf).__name__}, expected a tensor. Convert it by torch.as_tensor.")
    if isinstance(leaf, Iterable) and not isinstance(leaf, str | bytes):
        raise ArgumentError(
            f"{name} is a {type(leaf).__name__}, expected tensors or a function of the step index. An iterator cannot "
            f"be run again: wrap the data in a function that returns the batch of a given step."
        )


def check_replayable(support: Callable[[int], Batch], index: int) -> None:
    """Raise unless a source of batches gives the same batch twice."""
    first, second = tree.leaves(support(index)), tree.leaves(support(index))
    check_has_data([first, second], f"support({index})")
    same = len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(first, second, strict=True)
    )
    if not same:
        raise ReplayError(
            f"support({index}) gave two different batches in a row, but this memory policy runs steps twice. Return "
            f"the batch as a function of the index alone, or use StoreAll()."
        )


def check_finite(loss: Tensor, losses: Tensor, start: int) -> None:
    """Raise when a loss is NaN or infinite, and name the step."""
    if inside_functorch():
        return
    if losses.numel() and not all(end.isfinite() for end in losses.detach().aminmax()):  # without a tensor of its size
        index = (~losses.isfinite()).nonzero()[0].tolist()
        where = f"step {start + index[0]}" + (f", task {index[1]}" if len(index) > 1 else "")
        raise NonFiniteError(
            f"The inner loss of {where} is {losses[tuple(index)].item()}. Lower the inner learning rate, clip the "
            f"inner gradients, or look at that batch."
        )
    if not loss.isfinite():
        raise NonFiniteError(f"The meta-loss is {loss.item()}, though all inner losses are finite. Look at the query.")


def check_attached(loss: Tensor, declared: Tree, problem: Problem, estimator: Estimator) -> Reached:
    """Raise when the loss is detached or depends on a tensor that was not declared; what it depends on."""
    if not loss.requires_grad:
        raise DetachedError(
            f"The meta-loss does not depend on meta: somewhere it was detached or computed under no_grad, or no leaf "
            f"of meta that requires grad has a way to it. Compute it from the arguments `meta` and `state`. "
            f"{estimator.unreached_advice} Note that inner_problem begins at meta['params'] if there is one, and at "
            f"the module's own parameters otherwise."
        )
    return check_declared([loss], tree.tensors(declared), problem)


def looked_at_once(primal: Primal, problem: Problem) -> Primal:
    """The same functions where nothing declared requires grad; the first calls have a graph for a moment.

    So a tensor that was captured shows, which would count as a constant without an error.
    """
    judge = primal.meta_loss

    def init(meta: Meta) -> Any:
        with torch.enable_grad():
            return primal.init(meta)  # with its graph, which the first step shows

    return replace(
        primal,
        init=init,
        step=_looked_at_once(primal.step, problem),
        meta_loss=None if judge is None else _looked_at_once(judge, problem),
    )


def _looked_at_once(function: Callable[..., Any], problem: Problem) -> Callable[..., Any]:
    looked = False

    def run(*arguments: Any) -> Any:
        nonlocal looked
        if looked or inside_functorch():
            return function(*arguments)
        looked = True
        with torch.enable_grad():
            results = function(*arguments)
        found = walk(tree.tensors(results)).leaves
        if found:  # a leaf that the function makes for itself is another one each time
            with torch.enable_grad():
                again = tree.tensors(function(*arguments))
            own = [leaf for leaf in walk(again).leaves if all(leaf is not each for each in found)]
            retire(own)
            check_declared(again, [], problem)
        return tree.detach(results)

    return run


def check_every_leaf_used(reached: Reached, meta: Meta, estimator: Estimator) -> None:
    """Raise when a leaf of ``meta`` asks for a gradient that the loss does not give; under replay, later."""
    missed = {
        leaf.grad_fn: name
        for name, leaf in tree.named_leaves(meta, "meta")
        if leaf.requires_grad and leaf.grad_fn not in reached.nodes
    }
    if missed and not expect_use(reached.nodes, missed, estimator.unreached_advice):
        raise UnreachedLeafError(missed.values(), estimator.unreached_advice)
