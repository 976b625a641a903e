"""A problem whose step and meta-loss are compiled, each once, with its vector-Jacobian product."""

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch._inductor.config as inductor_config
from torch import Tensor

from funcmeta import rng, tree
from funcmeta._batching import per_task
from funcmeta._context import Autocast
from funcmeta._errors import ArgumentError, CompileError, GraphError
from funcmeta._exact_layers import exact_layers
from funcmeta._gradient import exact, steered, steering
from funcmeta._graph import inside_functorch
from funcmeta._lowering import Derivative, Lowered, contiguous
from funcmeta._typing import Tree
from funcmeta.problem import Problem, StepInfo

Backend = Literal["inductor", "aten"]

MOST = 16
"""How many combinations of structure and Python values a function is compiled for."""


def compile(problem: Problem, *, backend: Backend = "inductor", dynamic: bool = True, **options: Any) -> Problem:
    """The same problem, its step and its meta-loss compiled: the same numbers in less time.

    Step and one-step vector-Jacobian product (λ ↦ λᵀ ∂step/∂(meta, state), derivatives of inner gradients included) are
    recorded and compiled once each for every combination of shapes, dtypes, estimator and number of stacked tasks, so
    the time to compile does not depend on the number of steps. The first time, either is compared with the plain one.
    What a function captures besides its arguments is a part of what was recorded, and keeps the value it had then.
    For the backward pass a step keeps its inputs and the results of its matrix products, convolutions and draws.

    Args:
        problem: any problem; ``init`` stays as it is.
        backend: "inductor" for kernels (needs a C++ compiler on a CPU, Triton on a GPU); "aten" runs the recorded
            operations one by one, which compiles at once.
        dynamic: whether sizes that differ from call to call become variables, so that a third size compiles nothing;
            otherwise every size is compiled for itself.
        **options: settings of inductor by their names in ``torch._inductor.config``, with ``__`` for a dot, such as
            ``max_autotune=True``.

    Returns:
        A ``Problem`` for every estimator, memory policy and strategy. Its meta-loss can be differentiated once.

    Raises:
        ArgumentError: not a problem, an unknown backend or option.
        CompileError: when it is run: what a function does can not be recorded, or what was recorded gives other numbers
            than the function itself, because it depends on more than its arguments.
        CapturedTensorError: when it is run: a tensor that requires grad is used without coming through ``meta``.
        GraphError: the meta-gradient of a compiled problem is differentiated again.

    Examples:
        >>> from funcmeta import value_and_grad
        >>> from funcmeta.problem import StepInfo
        >>> def step(meta, a, batch, seed):
        ...     loss, slope = value_and_grad(lambda a: torch.sin(a * batch) ** 2)(a)
        ...     return a - meta * slope, StepInfo(loss)
        >>> problem = Problem(lambda meta, task, seed: torch.ones(()), step, lambda meta, a, x, seed: a * x)
        >>> fast = compile(problem, backend="aten")
        >>> state, info = fast.step(torch.tensor(0.1), torch.tensor(1.0), torch.tensor(2.0), 0)
        >>> torch.equal(state, problem.step(torch.tensor(0.1), torch.tensor(1.0), torch.tensor(2.0), 0)[0])
        True

    Source: ``torch.fx.experimental.proxy_tensor.make_fx`` and TorchInductor (Ansel et al. 2024, "PyTorch 2").
    """
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem is a {type(problem).__name__}, expected a Problem. Pass what inner_problem makes."
        )
    if backend not in ("inductor", "aten"):
        raise ArgumentError(f"backend is {backend!r}, expected 'inductor' or 'aten'. Pass one of them.")
    settings = {name.replace("__", "."): value for name, value in options.items()}
    known = inductor_config.get_config_copy()
    for name in settings:
        if backend == "aten" or name not in known:
            raise ArgumentError(
                f"{name!r} is no setting of the backend {backend!r}. Pass names of torch._inductor.config, with "
                f"backend='inductor'."
            )
    compiled = partial(Compiled, options=settings if backend == "inductor" else None, dynamic=dynamic)
    meta_loss = None if problem.meta_loss is None else compiled(problem.meta_loss)
    return Problem(problem.init, compiled(problem.step), meta_loss)


class Compiled:
    """A pure function of trees and a seed, compiled for each kind of arguments that it meets."""

    def __init__(
        self,
        fn: Callable[..., Tree],
        *,
        options: Mapping[str, Any] | None,
        dynamic: bool,
        tasks: int | None = None,
    ) -> None:
        self._fn, self._options, self._dynamic = fn, options, dynamic
        self.as_written = fn
        self._plain = fn if tasks is None else per_task(fn, tasks)
        self._variants: dict[Hashable, _Variant] = {}
        self._by_structure: dict[Hashable, list[_Variant]] = {}
        self._over: dict[int, Compiled] = {}

    def over_tasks(self, tasks: int) -> "Compiled":
        """The function over stacked tasks: all but its first argument have a leading task dimension."""
        if tasks not in self._over:
            self._over[tasks] = Compiled(self._fn, options=self._options, dynamic=self._dynamic, tasks=tasks)
        return self._over[tasks]

    def __call__(self, *arguments: Any) -> Tree:
        """The function's result; inside ``torch.func`` by the function itself."""
        if inside_functorch():
            return self._plain(*arguments)
        *trees, seed = arguments
        with torch._C.DisableTorchFunction():
            tensors: list[Tensor] = []
            structure = (_structure(trees, tensors), *_setting(tensors))
            tensors = [contiguous(tensor) for tensor in tensors]
            shapes = tuple([tensor.shape for tensor in tensors])
            variant = self._variants.get((structure, shapes))
        if variant is None or (variant.lowered.dynamic and not variant.lowered.accepts(tensors)):
            variant = self._variants[structure, shapes] = self._variant(trees, tensors, seed, structure)
        return variant(tensors, seed)

    def _variant(self, trees: list[Tree], tensors: list[Tensor], seed: int, structure: Hashable) -> "_Variant":
        others = self._by_structure.setdefault(structure, [])
        for other in others:
            if other.lowered.accepts(tensors):
                return other
        if not others and len(self._by_structure) > MOST:
            raise CompileError(
                f"The function would be compiled for more than {MOST} combinations of structure and Python values, the "
                f"last ones {_constants(trees)}. Keep what changes from step to step in tensors."
            )
        vary = [
            [self._dynamic and any(size != other.shapes[index][dim] for other in others) for dim, size in sizes]
            for index, sizes in enumerate([list(enumerate(tensor.shape)) for tensor in tensors])
        ]
        variant = _Variant(self._plain, self._fn, trees, tensors, seed, vary, self._options)
        others.append(variant)
        return variant


class _Variant:
    """A compiled function for one kind of arguments."""

    def __init__(
        self,
        plain: Callable[..., Tree],
        where: Any,
        trees: list[Tree],
        tensors: list[Tensor],
        seed: int,
        vary: Sequence[Sequence[bool]],
        options: Mapping[str, Any] | None,
    ) -> None:
        self._plain = plain
        self._arguments, self._results = tree.hollow(trees), None
        self.shapes = [tensor.shape for tensor in tensors]
        before, after = (sum(isinstance(leaf, Tensor) for leaf in tree.leaves(trees[:end])) for end in (1, 2))
        self._state = [before <= place < after and each.is_floating_point() for place, each in enumerate(tensors)]
        current = steering()
        self._rule = current.rule if current else exact
        self._autocast = Autocast(tensors)
        self.lowered = Lowered(self._flat, tensors, seed, vary, options, where)
        self._derivatives: dict[tuple[bool, ...], Derivative] = {}
        self._failure = ""

    def __call__(self, tensors: list[Tensor], seed: int) -> Tree:
        """The results as a tree, attached where grad mode wants it; what failed to compile is not tried again."""
        if self._failure:
            raise CompileError(self._failure)
        try:
            return self._run(tensors, seed)
        except CompileError as error:
            self._failure = str(error)
            raise

    def _run(self, tensors: list[Tensor], seed: int) -> Tree:
        current = steering()
        if current is not None:
            current.taken += self._taken
        with torch._C.DisableTorchFunction():
            moving = [tensor.requires_grad for tensor in tensors] if torch.is_grad_enabled() else []
        if not any(moving):
            return tree.filled(self._results, self.lowered(tensors, seed))
        wanted = tuple(map(operator.or_, moving, self._state))  # a first step has constants where the others have not
        if wanted not in self._derivatives:
            self._derivatives[wanted] = Derivative(self.lowered, wanted)
        derivative = self._derivatives[wanted]
        with torch._C.DisableTorchFunction():
            inputs = [
                tensor if reached else tensor.detach()
                for tensor, reached in zip(tensors, derivative.reached, strict=True)
            ]
            return tree.filled(self._results, _Step.apply(derivative, seed, *inputs))  # type: ignore[no-untyped-call]

    def _flat(self, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        with rng.forked(seed), exact_layers(), self._autocast.again(), steered(self._rule) as current:
            results = _without_reports(self._plain(*tree.filled(self._arguments, tensors), seed))
        self._taken, self._results = current.taken, tree.hollow(results)
        return tree.tensors(results)


class _Step(torch.autograd.Function):
    """A compiled function in the graph: its backward pass is the compiled derivative."""

    @staticmethod
    def forward(ctx: Any, derivative: Derivative, seed: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        results, kept = derivative.forward(tensors, seed)
        results = _distinct(results, tensors)
        ctx.derivative, ctx.seed = derivative, seed
        ctx.save_for_backward(*tensors, *kept)
        moving = list(zip(results, derivative.differentiable, strict=True))
        ctx.kinds = [(each.shape, each.dtype, each.device) for each, moves in moving if moves]
        ctx.mark_non_differentiable(*[each for each, moves in moving if not moves])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GraphError(
                "The meta-gradient of a compiled problem was asked for with create_graph=True, but it can not be "
                "differentiated again. Use the problem as it was before compile."
            )
        derivative: Derivative = ctx.derivative
        given = [each for each, moves in zip(cotangents, derivative.differentiable, strict=True) if moves]
        filled = [
            torch.zeros(shape, dtype=dtype, device=device) if each is None else each
            for each, (shape, dtype, device) in zip(given, ctx.kinds, strict=True)
        ]
        tensors, kept = ctx.saved_tensors[: len(derivative.reached)], ctx.saved_tensors[len(derivative.reached) :]
        found = derivative.backward(tensors, kept, filled, ctx.seed)
        return (None, None, *[next(found) if reached else None for reached in derivative.reached])


def _distinct(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results as tensors that are none of the inputs, and different from each other."""
    seen = {id(tensor) for tensor in inputs}
    distinct = []
    for each in results:
        distinct.append(each.view_as(each) if id(each) in seen else each)
        seen.add(id(each))
    return distinct


def _without_reports(results: Tree) -> Tree:
    """What a step returns, whose loss and aux are reports and carry no derivative."""
    if isinstance(results, tuple) and isinstance(results[-1], StepInfo):
        info = results[-1]
        return *results[:-1], info._replace(loss=info.loss.detach(), aux=tree.detach(info.aux))
    return results


def _structure(value: Tree, tensors: list[Tensor]) -> Hashable:
    """What two trees have in common that the same kernel serves, but for shapes; their tensors are collected."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.dtype, value.device, value.dim()
    kind = type(value)
    if kind is dict:
        return (kind, *value, *[_structure(each, tensors) for each in value.values()])
    if kind is tuple or kind is list or hasattr(value, "_fields"):
        return (kind, *[_structure(each, tensors) for each in value])
    leaves, spec = tree.flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return kind, _hashable(value)
    return (spec, *[_structure(each, tensors) for each in leaves])


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError as error:
        raise CompileError(
            f"An argument is {tree.describe(value)}, which can not be hashed, so that it can not be told when to "
            f"compile anew. Make it a tensor."
        ) from error
    return value  # type: ignore[no-any-return]


def _setting(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """What else decides what a function computes: the rule of inner gradients, and autocast."""
    current = steering()
    return current.rule if current else exact, Autocast(tensors).key, torch.get_default_dtype()


def _constants(trees: list[Tree]) -> str:
    """The Python values among the arguments of a problem's function, by name."""
    named = [pair for pair in tree.named_leaves(tuple(trees), "arguments") if not isinstance(pair[1], Tensor)]
    return ", ".join(f"{name} = {value!r}" for name, value in named[:5]) or "(none)"
