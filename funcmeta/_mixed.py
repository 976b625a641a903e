"""The inner gradient without a graph of its own, and its derivative by forward over reverse.

For g = ∂ℓ/∂θ at z = (θ, φ), φ being all else that ℓ depends on, the Hessian is symmetric: vᵀ ∂g/∂z is the derivative of
∂ℓ/∂z along (v, 0). So the derivative of an inner gradient needs neither its graph nor a second reverse pass, only one
more evaluation of ∂ℓ/∂z in which every tensor carries a tangent.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode

from funcmeta import rng, tree
from funcmeta._batching import Level, task_level
from funcmeta._context import Autocast
from funcmeta._duals import is_gradient, obstacle, room_of
from funcmeta._errors import FallbackWarning, ReplayError
from funcmeta._exact_layers import DualLayers, exact_layers
from funcmeta._gradient import Gradient, Objective, Steering, check_depends, exact, left, steered
from funcmeta._graph import alias, check_differentiable_again, coarsest, inner_leaf, inside_functorch, retire, walk
from funcmeta._typing import Tree
from funcmeta._watch import watched


class Mixed:
    """The rule of ``MixedMode``: the exact gradient, which keeps only its inputs for the backward pass.

    One object serves one unroll: once there is a reason to fall back it says so, and takes every further gradient as
    ``Reverse`` does.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    @property
    def fallen_back(self) -> bool:
        """Whether gradients are taken as by ``Reverse`` from now on."""
        return bool(self._told)

    def fall_back(self, why: str) -> None:
        """Take every further gradient as ``Reverse`` does, and say so, once for each reason."""
        if why not in self._told:
            self._told.add(why)
            warnings.warn(
                f"MixedMode takes the derivative of an inner gradient by reverse over reverse, as Reverse does, "
                f"because {why}. The result is as exact; memory and time are those of Reverse.",
                FallbackWarning,
                stacklevel=2,
            )

    def __call__(self, objective: Objective, params: Tree) -> Gradient:
        """The gradient by this rule."""
        return _mixed(self, objective, params)


def _mixed(rule: Mixed, objective: Objective, params: Tree) -> Gradient:
    tasks = task_level()
    by_functorch = inside_functorch() and tasks is None
    if rule.fallen_back or not torch.is_grad_enabled() or torch.compiler.is_compiling() or by_functorch:
        return exact(objective, params)
    with left(tasks, tree.leaves(params)) as thetas:
        leaves = [inner_leaf(each) for each in thetas]
    inner = _Inner(rule, objective, params, tasks, thetas)
    found = inner.first(leaves)
    if found is None:
        with rng.returned_to(inner.states):
            return exact(objective, params)
    results, grads = found
    with left(tasks, []):
        if inner.phis or any(each.requires_grad for each in thetas):
            together = _Mixed.apply(inner, [*results, *grads], len(thetas), *thetas, *inner.phis)  # type: ignore[no-untyped-call]
            results, grads = together[: len(results)], together[len(results) :]
    back = (lambda each: each) if tasks is None else tasks.lift
    value, aux = tree.filled(inner.results, [back(each) for each in results])
    pairs = zip(grads, inner.used, strict=True)
    return Gradient(value, aux, tree.like(params, [back(each) if used else None for each, used in pairs]))


class _Inner:
    """An objective with everything that it depends on taken apart, so that it can be evaluated elsewhere again."""

    def __init__(
        self, rule: Mixed, objective: Objective, params: Tree, tasks: Level | None, thetas: Sequence[Tensor]
    ) -> None:
        self.rule = rule
        self._objective, self._params, self._tasks = objective, tree.hollow(params), tasks
        self.states, self._autocast = rng.states(), Autocast(thetas)
        self._captured: list[Tensor] = []
        self.phis: list[Tensor] = []
        self.used: list[bool] = []
        self.obstacle = ""
        self.results: Tree = None

    def first(self, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]] | None:
        """Results and gradient without a graph; None when the derivative has to be taken in another way."""
        with torch.enable_grad():
            with steered(self.rule) as inside:
                finder, layers = _Finder(self._tasks, leaves, inside), DualLayers()
                results = self._evaluated(leaves, finder, layers, nullcontext())
            with left(self._tasks, []):
                why = finder.trouble or layers.trouble
                if why:  # what the finder saw may be cut in pieces
                    self.rule.fall_back(why)
                    return None
                total = self.total(results)
                check_depends(total.requires_grad)
                check_differentiable_again(total, leaves)
                graph = walk(results)
                ends = {id(leaf) for leaf in graph.leaves}
                why = obstacle(graph.nodes) or finder.missed(graph.leaves, leaves)
                if finder.made & ends:  # which the unroll refuses
                    return None
                if why:
                    self.rule.fall_back(why)
                    return None
                used = [index for index, leaf in enumerate(finder.stand_ins) if id(leaf) in ends]
                with watched(False):
                    found = torch.autograd.grad(total, leaves, allow_unused=True)
                self.used = [grad is not None for grad in found]
                check_depends(any(self.used))
                retire([*leaves, *finder.stand_ins])
        self._value = total.detach()
        self._captured = [finder.captured[index] for index in used]
        self.phis = [finder.originals[index] for index in used]
        grads = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]
        return [each.detach() for each in results], [grad.detach() for grad in grads]

    def again(self, thetas: Sequence[Tensor], phis: Sequence[Tensor]) -> list[Tensor]:
        """The results once more, from other tensors in the place of those that it depended on."""
        mode = _Replaced({id(each): self._lifted(phi, each) for each, phi in zip(self._captured, phis, strict=True)})
        level = nullcontext() if self._tasks is None else self._tasks.entered_again()
        with level, rng.returned_to(self.states), self._autocast.again(), exact_layers():
            layers = DualLayers()
            results = self._evaluated(thetas, mode, layers, watched(False))
        own = {id(each) for each in (*thetas, *phis)}
        graph = walk(results, [each for each in (*thetas, *phis) if each.grad_fn])
        self.obstacle = layers.trouble or obstacle(graph.nodes)  # TorchScript compiles a function when it is run again
        if any(id(leaf) not in own for leaf in graph.leaves):
            raise ReplayError(
                "The inner loss was evaluated again in the backward pass and depended on other tensors than the first "
                "time. Let it read what it needs from its arguments and from `meta` and `state`, or use Reverse()."
            )
        value = self.total(results).detach()
        if type(value) is Tensor and not _close(value, self._value):
            raise ReplayError(
                f"The inner loss was evaluated again in the backward pass and came out as {float(value):.8g}, the "
                f"first time as {float(self._value):.8g}. Let it depend on its arguments alone: no loop variables, "
                f"counters or generators from outside, no batch that is written over. Or use Reverse()."
            )
        return results

    @property
    def precision(self) -> float:
        """How far two ways to compute a slope of the loss may be apart, relative to it."""
        dtypes = [self._value.dtype, *self._autocast.dtypes]
        return math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))

    def total(self, results: Sequence[Tensor]) -> Tensor:
        """The loss that is differentiated: the sum over tasks."""
        return results[0] if self._tasks is None else results[0].sum()

    def _evaluated(
        self, thetas: Sequence[Tensor], mode: TorchFunctionMode, layers: DualLayers, watch: Any
    ) -> list[Tensor]:
        lift = (lambda each: each) if self._tasks is None else self._tasks.lift
        inputs = tree.filled(self._params, [lift(each) for each in thetas])
        with mode, layers, watch:
            results = self._objective(inputs)
        self.results = tree.hollow(results)
        return [each if self._tasks is None else self._tasks.lower(each) for each in tree.tensors(results)]

    def _lifted(self, phi: Tensor, captured: Tensor) -> Tensor:
        return phi if self._tasks is None else self._tasks.put_back(phi, captured)


class _Replaced(TorchFunctionMode):
    """Inside this mode torch's functions see other tensors in the place of some."""

    def __init__(self, stand_ins: dict[int, Tensor]) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree.map(self._replaced, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    def _replaced(self, leaf: Any) -> Any:
        return self._stand_ins.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf


class _Finder(_Replaced):
    """Finds the tensors that a function depends on besides its arguments, and puts a leaf in the place of each."""

    def __init__(self, tasks: Level | None, leaves: Sequence[Tensor], inside: Steering) -> None:
        super().__init__({})
        self._tasks, self._inside = tasks, inside
        self._start = _sequence_number()
        self._own = {id(each) for each in leaves}
        self.captured: list[Tensor] = []
        self.originals: list[Tensor] = []
        self.stand_ins: list[Tensor] = []
        self._made: list[Tensor] = []
        self._trouble = ""

    @property
    def made(self) -> set[int]:
        """The leaves that the function has made for itself, by id."""
        return {id(each) for each in self._made}

    @property
    def trouble(self) -> str:
        """Why the function cannot be taken apart, or nothing; its result may be cut in pieces then."""
        return self._trouble or (_NESTED if self._inside.begun else "")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return super().__torch_function__(func, types, args, kwargs)
        if func is torch.autograd.grad or func is Tensor.backward:
            self._trouble = _NESTED
        elif inside_functorch() and task_level() is None:
            self._trouble = "the inner loss uses torch.func"
        if self.trouble:
            return func(*args, **(kwargs or {}))
        result = super().__torch_function__(func, types, args, kwargs)
        made = args[0] if func == _SET_REQUIRES_GRAD else result
        if isinstance(made, Tensor) and made.requires_grad and made.is_leaf and id(made) not in self._own:
            self._made.append(made)  # a leaf made by the function itself is no tensor from outside
            self._own.add(id(made))
        return result

    def _replaced(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        known = self._stand_ins.get(id(leaf))
        if known is not None:
            return known
        original = get_unwrapped(leaf) if is_batchedtensor(leaf) else leaf
        if not original.requires_grad or id(original) in self._own:
            return leaf
        made = getattr(original.grad_fn, "_sequence_nr", None)  # torch.compile traces tensors with a bool for grad_fn
        if made is not None and made() > self._start:
            return leaf
        with left(self._tasks, []):
            stand_in = inner_leaf(original)
        self.captured.append(leaf)
        self.originals.append(original)
        self.stand_ins.append(stand_in)
        self._own.add(id(stand_in))
        self._stand_ins[id(leaf)] = stand_in if self._tasks is None else self._tasks.put_back(stand_in, leaf)
        return self._stand_ins[id(leaf)]

    def missed(self, ends: Sequence[Tensor], leaves: Sequence[Tensor]) -> str:
        """What to say when the results depend on more than was found."""
        expected = {id(each) for each in (*leaves, *self.stand_ins)}
        return "" if all(id(end) in expected for end in ends) else "the inner loss depends on a tensor in a hidden way"


_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class _Mixed(torch.autograd.Function):
    """Results and gradient of an objective, (θ, φ) ↦ (results, ∂ℓ/∂θ), as they were computed before."""

    @staticmethod
    def forward(ctx: Any, inner: _Inner, outputs: list[Tensor], count: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.inner, ctx.count, ctx.results = inner, count, len(outputs) - count
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[each for each in outputs if not each.is_floating_point()])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        by_results, along = cotangents[: ctx.results], cotangents[ctx.results :]
        by_graph = torch.is_grad_enabled() or ctx.inner.rule.fallen_back
        found = None if by_graph else _forward_over_reverse(ctx, by_results, along)
        if found is None:
            found = _reverse_over_reverse(ctx, by_results, along)
        return (None, None, None, *found)


def _forward_over_reverse(
    ctx: Any, by_results: Sequence[Tensor | None], along: Sequence[Tensor | None]
) -> list[Tensor | None] | None:
    """∂/∂ε ∂ℓ/∂z (θ + ε v, φ), and what comes in by the results; None when an operation has no forward mode."""
    leaves = [inner_leaf(each.contiguous()) for each in ctx.saved_tensors]
    thetas = leaves[: ctx.count]
    try:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():
            duals = [
                leaf if by is None else forward_ad.make_dual(leaf, by.contiguous())  # type: ignore[no-untyped-call]
                for leaf, by in zip(thetas, along, strict=True)
            ]
            results = ctx.inner.again(duals, leaves[ctx.count :])
            if ctx.inner.obstacle:
                ctx.inner.rule.fall_back(ctx.inner.obstacle)
                return None
            sums = _pull_back(results, leaves, by_results, keep=True)
            total = ctx.inner.total(results)
            slopes = torch.autograd.grad(total, leaves, allow_unused=True)
            tangents = [None if each is None else _tangent(each) for each in slopes]
            # a recording has no numbers; it is compared with this function
            if not isinstance(total, FakeTensor):
                told = partial(is_gradient, slopes, along, _tangent(total), room_of(thetas, tangents))
                if not told(ctx.inner.precision) and not told(coarsest(results) ** 0.5):
                    ctx.inner.rule.fall_back("the gradient that torch computes is not the derivative of the inner loss")
                    return None
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "ZeroTensor" not in str(error):
            raise
        ctx.inner.rule.fall_back(f"torch said: {str(error).splitlines()[0]}")
        return None
    finally:
        retire(leaves)
    return [_sum(*pair) for pair in zip(sums, tangents, strict=True)]


def _tangent(tensor: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call, no-any-return]


def _reverse_over_reverse(
    ctx: Any, by_results: Sequence[Tensor | None], along: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The same through the graph of the gradient; differentiable when grad mode is on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [alias(each) if again and each.requires_grad else inner_leaf(each) for each in ctx.saved_tensors]
        thetas = inputs[: ctx.count]
        results = ctx.inner.again(thetas, inputs[ctx.count :])
        total = ctx.inner.total(results)
        slopes = torch.autograd.grad(total, thetas, create_graph=True, allow_unused=True)
        return _pull_back([*results, *slopes], inputs, [*by_results, *along], keep=again, again=again)


def _pull_back(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    *,
    keep: bool,
    again: bool = False,
) -> list[Tensor | None]:
    """The gradients of the inputs for cotangents of the outputs."""
    pairs = [
        (out, by)
        for out, by in zip(outputs, cotangents, strict=True)
        if out is not None and by is not None and out.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    ends, by = zip(*pairs, strict=True)
    return list(torch.autograd.grad(ends, inputs, by, allow_unused=True, retain_graph=keep, create_graph=again))


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return left if right is None else right if left is None else left + right


def _close(value: Tensor, before: Tensor) -> bool:
    tolerance = torch.finfo(before.dtype).eps ** 0.5
    return bool(torch.isclose(value, before, rtol=tolerance, atol=tolerance, equal_nan=True))


def _sequence_number() -> int:
    """The number of the latest node of the graph in this thread."""
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        node = alias(torch.zeros((), requires_grad=True)).grad_fn
    assert node is not None
    return node._sequence_nr()


_NESTED = "the inner loss takes a gradient by itself"
