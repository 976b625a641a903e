"""A second net against lost orders: backward passes that torch differentiates only in part, without an error.

What torch itself records knows its own derivative. A Python ``autograd.Function``, an operator from C++ and a hook may
return a gradient whose graph leaves something out: they take it by ``torch.autograd.grad`` without ``create_graph``,
save an intermediate result, or compute the gradient in the forward pass. These are tried out, each kind once in an
unroll: a Function by itself, at inputs and cotangents that are moved a little; hooks and C++ all at once, by the
cotangent of the loss.
"""

import cProfile
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from types import CellType, CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import Node
from torch.nn.modules._functions import BackwardHookFunction

from funcmeta import rng, tree
from funcmeta._context import Autocast
from funcmeta._errors import DetachedError
from funcmeta._exact_layers import exact_layers
from funcmeta._graph import inner_leaf, original_function, reaches, retire
from funcmeta._watch import hooks_noted, watched


class Tried:
    """What was tried out so far in an unroll."""

    def __init__(self) -> None:
        self.hooks: set[Any] = set()
        self._known: set[Any] = set()

    def doubts(self, foreign: Collection[Node], leaves: Sequence[Tensor]) -> "Doubts | None":
        """What must be tried out before a gradient through these nodes counts as differentiable; mostly nothing."""
        if not foreign and self.hooks <= self._known:
            return None
        unknown = [(kind, node) for node in foreign if (kind := _kind(node)) not in self._known]
        new = {kind for kind, node in unknown if reaches(node, leaves)}
        functions = {kind for kind in new if isinstance(kind, tuple) and kind != _HOOKED}
        new |= self.hooks - self._known
        self._known |= new
        return Doubts(functions, lambda: self._known.difference_update(new)) if new else None


class trying:
    """Note in ``tried`` what hooks are registered inside the block, and try nothing twice there."""

    def __init__(self, tried: Tried) -> None:
        self._tried = tried

    def __enter__(self) -> Tried:
        """Begin."""
        self._token = hooks_noted.set(self._tried)
        return self._tried

    def __exit__(self, *error: object) -> None:
        """End."""
        hooks_noted.reset(self._token)


def tried_here() -> Tried:
    """What was tried in the unroll that runs here; nothing, when none does."""
    return hooks_noted.get() or Tried()


def _kind(node: Node) -> Any:
    """What a node is known by: the Function that its author wrote, or the name of one from C++."""
    function = getattr(node, "_forward_cls", None)
    return node.name() if function is None else _kind_of(function)


def _kind_of(function: Any) -> tuple[Any, ...]:
    """What a Function is known by: its text, as a class made inside the loss is another one each time."""
    written = original_function(function)
    return written.__qualname__, *(_text(getattr(written, name)) for name in ("forward", "backward"))


def _text(function: Any, depth: int = 2) -> Any:
    """The code of a function, and of those that it closes over."""
    code = getattr(function, "__code__", None)
    if code is None or not depth:
        return code or type(function)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != _EMPTY]
    return code, *[_text(each, depth - 1) for each in cells]


_EMPTY = CellType()
_HOOKED = _kind_of(BackwardHookFunction)


class Doubts:
    """A gradient whose graph may leave something out."""

    def __init__(self, functions: set[Any], forget: Callable[[], None]) -> None:
        self._functions, self._forget = functions, forget
        self._complete = True

    def gradient(self, total: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradient with its graph; and whether that knows that each part is proportional to the cotangent.

        A hook may be anything but linear (a clip is not). So if it is not proportional, its derivative along the
        cotangent is compared with a difference.
        """

        def pulled(by: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
            with watched(False), rng.returned_to(draws):
                return torch.autograd.grad(total, leaves, by, retain_graph=True, allow_unused=True, **options)

        draws, cotangent = rng.states(), inner_leaf(torch.ones_like(total))
        found = pulled(cotangent, create_graph=True)
        retire([cotangent])
        parts = {place: each.detach() for place, each in enumerate(found) if each is not None and each.any()}
        along = {place: each / each.norm() ** 2 for place, each in parts.items()}

        def projected(grads: Sequence[Tensor | None]) -> Tensor:
            each = [(by * grads[place]).sum() for place, by in along.items()]
            return torch.stack(each).sum()

        if parts:
            close, move = _COTANGENT_ACCURACY.get(total.dtype, (0.1, 0.1))
            slope = _slope(projected(found), [cotangent], [torch.ones_like(cotangent)])
            if abs(slope - len(parts)) > close * len(parts):
                dtypes = {*Autocast(leaves).dtypes, *[each.dtype for each in leaves], total.dtype}

                def value(by: float) -> float:
                    return float(projected(pulled(torch.full_like(total, by))).detach())

                self._complete = any(
                    abs(slope - difference) <= close * max(abs(difference), len(parts))
                    for difference in _differences(value, move, finer=dtypes <= _COTANGENT_ACCURACY.keys())
                )
        return found

    def settle(self, evaluate: Callable[[], Any], outside: Callable[[], Any]) -> None:
        """Evaluate the loss once more, to see how each Function is called, and try it; raise if something is lost.

        What was refused is tried again when it is met again: another estimator may take over from one that refused it.

        Args:
            evaluate: the loss.
            outside: a block for the library's own work.
        """
        try:
            self._settle(evaluate, outside)
        except BaseException:
            self._forget()
            raise

    def _settle(self, evaluate: Callable[[], Any], outside: Callable[[], Any]) -> None:
        if self._functions:
            with _Calls(self._functions) as calls, rng.returned_to(rng.states()):
                evaluate()
            with outside(), watched(False):
                for call in calls.different():
                    lost = call.lost()
                    if lost:
                        raise DetachedError(
                            f"The inner loss runs {call.name}, an autograd.Function whose backward returns a gradient "
                            f"that depends on {lost}, but whose graph does not know it: the meta-gradient would "
                            f"silently be of first order there. Compute in backward with differentiable operations, "
                            f"from saved inputs and outputs: what forward computes on the way has no graph, and "
                            f"torch.autograd.grad needs create_graph=True. Or use FirstOrder()."
                        )
        if not self._complete:
            raise DetachedError(
                "The inner loss runs a hook or a backward pass of its own that returns a gradient without the graph "
                "of the one that it gets: the meta-gradient would silently be of first order there. Compute it with "
                "differentiable operations, torch.autograd.grad with create_graph=True, and detach nothing. Or use "
                "FirstOrder()."
            )


def _differences(value: Callable[[float], float], move: float, *, finer: bool) -> Iterator[float]:
    """Differences on both sides of 1, ever closer: where an entry jumps in between (a clip), others do not.

    Half precision does not see the small moves.
    """
    here = value(1.0)
    for size in (move, move / 10, move / 100) if finer else (move,):
        after, before = value(1 + size), value(1 - size)
        yield (after - before) / (2 * size)
        if finer:
            yield from ((after - here) / size, (here - before) / size)


_APPLY: CodeType = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


class _Calls:
    """Notes the calls of some Functions inside the block.

    No mode of torch sees ``Function.apply``, and the graph does not know what a Function was called with. It is a
    function in Python, so a profiler does.
    """

    def __init__(self, functions: set[Any]) -> None:
        self._functions = functions
        self._found: dict[Any, _Call] = {}

    def __enter__(self) -> "_Calls":
        """Begin to watch this thread."""
        self._before: Any = sys.getprofile()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        """As before."""
        sys.setprofile(self._before if callable(self._before) else None)
        if isinstance(self._before, cProfile.Profile):
            self._before.enable()  # written in C, it is an object that cannot be called

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code is _APPLY:
            function, args, options = (frame.f_locals[name] for name in ("cls", "args", "kwargs"))
            if _kind_of(function) in self._functions:
                call = _Call(function, args, options)
                self._found.setdefault(call.sort, call)

    def different(self) -> list["_Call"]:
        """One call of each sort; inside ``vmap`` the one for all tasks at once."""
        return [call for call in self._found.values() if not call.inside_functorch]


class _Call:
    """A Function and what it was called with."""

    def __init__(self, function: type, args: Sequence[Any], options: dict[str, Any]) -> None:
        tensors = [each for each in args if isinstance(each, Tensor)]
        self.inside_functorch = any(is_functorch_wrapped_tensor(each) for each in tensors)
        self.sort = _kind_of(function), self.inside_functorch, *map(_sort, args)
        self.name = original_function(function).__name__
        self._function, self._options, self._draws = function, options, rng.states()
        self._args = [each.detach() if isinstance(each, Tensor) else each for each in args]
        self._moved = [isinstance(each, Tensor) and each.requires_grad and each.is_floating_point() for each in args]

    def lost(self) -> str:
        """What the gradient depends on without a graph, if anything; nothing where it cannot be told.

        In float64 where the Function can be run so: differences of anything shorter are coarse.
        """
        for dtype in (torch.float64, torch.float32):
            try:
                return self._lost(dtype)
            except Exception:
                continue
        return ""

    def _lost(self, dtype: torch.dtype) -> str:
        accuracy = _accuracy(dtype)
        points, by, grads = self._gradient(dtype, graph=True)
        if not grads:
            return ""
        whole = torch.cat([each.reshape(-1) for each in grads])
        for name, moved, number, way in (
            ("its inputs", points, _INPUTS, (1, 0)),
            ("the gradient that it gets", by, _COTANGENTS, (0, 1)),
        ):
            coarse, fine = (self._difference(dtype, way, size) for size in (accuracy, accuracy / 2))
            # Where an entry jumps (a mask, a kink), the two differ by a factor of 2: that is no derivative.
            smooth = (coarse - fine).abs() <= 0.2 * torch.maximum(coarse.abs(), fine.abs())
            along = torch.where(smooth, fine, 0.0)
            change = float(along.norm())
            if not change > 1e-6 * float(whole.detach().norm()):
                continue
            spread = float(torch.where(smooth, coarse - fine, 0.0).norm()) / change
            slope = _slope((whole * along).sum(), moved, [_direction(each, number) for each in moved])
            if abs(slope - change**2) > max(accuracy, 10 * spread) * change**2:
                return name
        return ""

    def _difference(self, dtype: torch.dtype, way: tuple[int, int], size: float) -> Tensor:
        """The central difference of the gradient, as a vector, along inputs or cotangents."""
        ends = [self._gradient(dtype, *[sign * size * each for each in way])[2] for sign in (1, -1)]
        after, before = (torch.cat([each.reshape(-1) for each in end]) for end in ends)
        return ((after - before) / (2 * size)).detach()

    def _gradient(
        self, dtype: torch.dtype, by_inputs: float = 0.0, by_cotangent: float = 0.0, *, graph: bool = False
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Inputs and cotangents, both moved that far in their fixed directions, and the gradient there."""
        args, points = [], []
        for each, moved in zip(self._args, self._moved, strict=True):
            if isinstance(each, Tensor):
                each = each.to(dtype) if each.is_floating_point() else each
                if moved:
                    points.append(inner_leaf(each + by_inputs * _direction(each, _INPUTS)))
                    each = points[-1]
                each = each.clone()  # which the Function may write to
            args.append(each)
        with torch.enable_grad(), rng.returned_to(self._draws):
            with exact_layers():
                results = self._function.apply(*args, **self._options)  # type: ignore[attr-defined]
            outputs = [each for each in tree.tensors(results) if each.requires_grad]
            by = [
                inner_leaf(_direction(each, _UNMOVED) + by_cotangent * _direction(each, _COTANGENTS))
                for each in outputs
            ]
            if not outputs:
                return points, by, []
            found = torch.autograd.grad(outputs, points, by, create_graph=graph, materialize_grads=True)
        return points, by, list(found)


def _sort(value: Any) -> Any:
    """What tells the calls of a Function apart, so far as its backward may depend on it."""
    if isinstance(value, Tensor):
        return value.dtype, value.requires_grad, value.dim()
    return value if value is None or isinstance(value, bool | int | float | str) else _text(value)


_INPUTS, _COTANGENTS, _UNMOVED = range(3)


def _direction(tensor: Tensor, number: int) -> Tensor:
    """A fixed direction for a tensor; for an input, on the scale on which that varies."""
    index = torch.arange(tensor.numel(), dtype=torch.float64)
    unit = (0.7 * (index + number) ** 2 + number).cos().reshape(tensor.shape).to(tensor)
    if number != _INPUTS:
        return unit
    scale = tensor.detach().std() if tensor.numel() > 1 else tensor.detach().abs().sum()
    return unit * torch.where(scale > 0, scale, 1.0)


def _slope(value: Tensor, inputs: Sequence[Tensor], directions: Sequence[Tensor]) -> float:
    """The derivative of a number along directions, so far as its graph knows."""
    if not value.requires_grad:
        return 0.0
    with watched(False):
        found = torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True, allow_unused=True)
    return sum(float((slope * by).sum()) for slope, by in zip(found, directions, strict=True))


def _accuracy(dtype: torch.dtype) -> float:
    """The size of a move of a Function's inputs, relative, and of what counts as equal."""
    return 1e-3 if dtype is torch.float64 else 1e-2


_COTANGENT_ACCURACY = {torch.float64: (1e-5, 1e-3), torch.float32: (3e-3, 3e-2)}
"""What counts as equal, and the size of a move of the cotangent, of which most gradients are a linear function."""
