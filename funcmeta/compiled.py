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
from funcmeta._check import check_flag
from funcmeta._context import Autocast
from funcmeta._errors import ArgumentError, CompileError, GraphError
from funcmeta._exact_layers import exact_layers
from funcmeta._gradient import exact, steered, steering
from funcmeta._graph import inside_functorch
from funcmeta._live_bytes import uncounted
from funcmeta._lowering import Derivative, Lowered, contiguous
from funcmeta._typing import Tree
from funcmeta._value_key import shared, value_key
from funcmeta.problem import Problem, StepInfo

Backend = Literal["inductor", "aten"]

MOST = 16
"""How many combinations of structure and Python values a function is compiled for."""


def compile(problem: Problem, *, backend: Backend = "inductor", dynamic: bool = True, **options: Any) -> Problem:
    """The same problem, its step and its meta-loss compiled: the same numbers in less time.

    Step and one-step vector-Jacobian product (λ ↦ λᵀ ∂step/∂(meta, state), derivatives of inner gradients included) are
    recorded and compiled once each for every combination of shapes, dtypes, estimator and number of stacked tasks, so
    the time to compile does not depend on the number of steps. At each combination of sizes that it meets for the first
    time, either is compared with the plain one.
    What a function captures besides its arguments is a part of what was recorded, and keeps the value it had then.
    For the backward pass a step keeps its inputs and the results of its matrix products, convolutions and draws.

    Args:
        problem: any problem; ``init`` stays as it is.
        backend: "inductor" for kernels (needs a C++ compiler on a CPU, Triton on a GPU); "aten" runs the recorded
            operations one by one, which compiles at once.
        dynamic: whether sizes that differ from call to call become variables, so that a third size compiles nothing;
            a size that the function turns into a Python number, and with False every size, is compiled for itself.
        **options: settings of inductor by their names in ``torch._inductor.config``, with ``__`` for a dot, such as
            ``max_autotune=True``.

    Returns:
        A ``Problem`` for every estimator, memory policy and strategy. Its meta-loss can be differentiated once.

    Raises:
        ArgumentError: not a problem, an unknown backend or option, ``dynamic`` is no flag.
        CompileError: when it is run: what a function does cannot be recorded, or what was recorded gives other numbers
            or Python values than the function itself, because it depends on more than its arguments; or there are too
            many combinations of sizes or values to compile for.
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
    check_flag("dynamic", dynamic)
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
            head, others = _structure(trees[:2], tensors), len(tensors)
            data = _structure(trees[2:], tensors)
            # among batches alone: at the first step the state may be a part of meta
            structure = (head, data, *_setting(tensors), *shared(tensors[others:]))
            tensors = [contiguous(tensor) for tensor in tensors]
            shapes = tuple([tensor.shape for tensor in tensors])
            variant = self._variants.get((structure, shapes))
        if variant is None or (variant.lowered.dynamic and not variant.fits(tensors)):
            with uncounted():
                variant = self._variants[structure, shapes] = self._variant(trees, tensors, seed, structure)
        try:
            return variant(tensors, seed)
        except CompileError:
            if not variant.lowered.dynamic:
                raise
        variant.lowered.refuse(tensors)
        return self(*arguments)

    def _variant(self, trees: list[Tree], tensors: list[Tensor], seed: int, structure: Hashable) -> "_Variant":
        others = self._by_structure.setdefault(structure, [])
        for other in others:
            if other.fits(tensors):
                return other
        if not others and len(self._by_structure) > MOST:
            raise CompileError(
                f"The function would be compiled for more than {MOST} combinations of structure and Python values, the "
                f"last ones {_constants(trees)}. Keep what changes from step to step in tensors."
            )
        if self._dynamic and len(others) >= MOST:
            raise CompileError(
                f"The function would be compiled for more than {MOST} combinations of sizes, the last one with "
                f"{_sizes(trees)}. A size that it turns into a Python number (len(x), int(x.shape[0]), a loop over "
                f"rows) is compiled for itself. Compute with x.shape[0] as it is, pad to a few sizes, or pass "
                f"dynamic=False, which sets no limit."
            )
        variant = self._made(trees, tensors, seed, others)
        others.append(variant)
        return variant

    def _made(self, trees: list[Tree], tensors: list[Tensor], seed: int, others: Sequence["_Variant"]) -> "_Variant":
        """A variant whose varying sizes are variables, as far as that goes; else one for these sizes alone."""
        make = partial(_Variant, self._plain, self._fn, trees, tensors, seed, options=self._options)
        vary = [
            [self._dynamic and any(size != other.shapes[index][dim] for other in others) for dim, size in sizes]
            for index, sizes in enumerate([list(enumerate(tensor.shape)) for tensor in tensors])
        ]
        if any(map(any, vary)) and not any(other.lowered.refuses(tensors) for other in others):
            try:
                variant = make(vary=vary)
            except CompileError:
                pass  # an operation that cannot be recorded with variable sizes may be recorded with these
            else:
                if variant.fits(tensors):
                    return variant
        return make(vary=[[False] * tensor.dim() for tensor in tensors])


class _Variant:
    """A compiled function for one kind of arguments."""

    def __init__(
        self,
        plain: Callable[..., Tree],
        where: Any,
        trees: list[Tree],
        tensors: list[Tensor],
        seed: int,
        *,
        vary: Sequence[Sequence[bool]],
        options: Mapping[str, Any] | None,
    ) -> None:
        self._plain = plain
        self._arguments, self._results, self._taken = tree.hollow(trees), _NOTHING, 0
        self.shapes = [tensor.shape for tensor in tensors]
        others = len(tree.tensors(trees[:2]))
        again = shared(tree.tensors(trees[2:])) or range(len(tensors) - others)
        self._places = [*range(others), *[others + place for place in again]]
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
            if not self.lowered.dynamic:
                self._failure = str(error)
            raise

    def fits(self, tensors: list[Tensor]) -> bool:
        """Whether it holds for tensors of these shapes; the derivative is recorded first, which may add conditions."""
        if self.lowered.dynamic and not self._failure and self.lowered.accepts(tensors):
            try:
                self._derivative(tensors)
            except CompileError as error:
                self._failure = str(error)
        return not self._failure and self.lowered.accepts(tensors)

    def _derivative(self, tensors: list[Tensor]) -> Derivative | None:
        """The derivative that these tensors want, recorded when it is first needed."""
        with torch._C.DisableTorchFunction():
            moving = [tensor.requires_grad for tensor in tensors] if torch.is_grad_enabled() else []
        if not any(moving):
            return None
        wanted = tuple(map(operator.or_, moving, self._state))  # a first step has constants where the others have not
        if wanted not in self._derivatives:
            with uncounted():
                self._derivatives[wanted] = Derivative(self.lowered, wanted)
        return self._derivatives[wanted]

    def _run(self, tensors: list[Tensor], seed: int) -> Tree:
        current, derivative = steering(), self._derivative(tensors)
        if current is not None:
            current.taken += self._taken
        if derivative is None:
            return tree.filled(self._results, self.lowered(tensors, seed))
        with torch._C.DisableTorchFunction():
            inputs = [
                tensor if reached else tensor.detach()
                for tensor, reached in zip(tensors, derivative.reached, strict=True)
            ]
            return tree.filled(self._results, _Step.apply(derivative, seed, *inputs))  # type: ignore[no-untyped-call]

    def _flat(self, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        tensors = [tensors[place] for place in self._places]
        with rng.forked(seed), exact_layers(), self._autocast.again(), steered(self._rule) as current:
            results = _without_reports(self._plain(*tree.filled(self._arguments, tensors), seed))
        hollow = tree.map(_number, tree.hollow(results))
        if self._results is _NOTHING:
            self._taken, self._results = current.taken, hollow
        elif value_key(hollow, own=False) != value_key(self._results, own=False):
            raise CompileError(
                f"{_changed(self._results, hollow)}. Compiled, every call would return what the first one did. Return "
                f"a tensor that is computed from the arguments, or leave it out."
            )
        return tree.tensors(results)


_NOTHING = object()
"""What a function returned, before it was called."""


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
                "The meta-gradient of a compiled problem was asked for with create_graph=True, but it cannot be "
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
    kind: Any = type(value)
    if kind is dict:
        keys = [key if type(key) is str else value_key(key) for key in value]
        return (kind, *keys, *[_structure(each, tensors) for each in value.values()])
    if kind is tuple or kind is list or hasattr(value, "_fields"):
        return (kind, *[_structure(each, tensors) for each in value])
    opened = tree.opened(value)
    if opened is None:
        return _hashable(value)
    parts, rest = opened
    return (kind, value_key(rest), *[_structure(each, tensors) for each in parts])


def _hashable(value: Any) -> Hashable:
    """The key of a value that is no tensor."""
    try:
        hash(value)
    except TypeError as error:
        raise CompileError(
            f"An argument is {tree.describe(value)}, which cannot be hashed, so that it cannot be told when to "
            f"compile anew. Make it a tensor."
        ) from error
    return value_key(value)


def _number(leaf: Any) -> Any:
    """A leaf that is no size of a recording: one that is returned holds for the sizes that it came from."""
    if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
        return leaf.node.pytype(leaf)
    return leaf


def _changed(before: Tree, after: Tree) -> str:
    """The first difference between two results without their tensors, in words."""
    for (name, old), (other, new) in zip(_named(before), _named(after), strict=False):
        if name == other and value_key(old, own=False) != value_key(new, own=False):
            return f"{name} is {_shown(old)} in one call of the function and {_shown(new)} in another"
    return "The function returned trees of different structures in two calls"


def _named(results: Tree) -> list[tuple[str, Any]]:
    """The leaves of what a function returned, by the names that they have for the user."""
    if isinstance(results, tuple) and isinstance(results[-1], StepInfo):
        return tree.named_leaves(results[0], "state") + tree.named_leaves(results[-1], "info")
    return tree.named_leaves(results, "result")


def _shown(leaf: Any) -> str:
    return "a tensor" if leaf is tree.HOLE else repr(leaf)


def _setting(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """What else decides what a function computes: the rule of inner gradients, and autocast."""
    current = steering()
    return current.rule if current else exact, Autocast(tensors).key, torch.get_default_dtype()


def _constants(trees: list[Tree]) -> str:
    """The Python values among the arguments of a problem's function, by name."""
    named = [pair for pair in tree.named_leaves(tuple(trees), "arguments") if not isinstance(pair[1], Tensor)]
    return ", ".join(f"{name} = {value!r}" for name, value in named[:5]) or "(none)"


def _sizes(trees: list[Tree]) -> str:
    """The shapes of the tensors among the arguments of a problem's function, by name."""
    named = [pair for pair in tree.named_leaves(tuple(trees), "arguments") if isinstance(pair[1], Tensor)]
    return ", ".join(f"{name} = {list(value.shape)}" for name, value in named[-5:])
