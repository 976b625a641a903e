"""A flat function of tensors as kernels: traced to ATen operations once, with its derivative, and lowered by inductor.

``make_fx`` records what happens to the tensors, whatever Python does on the way, and ``torch.autograd`` has run before
anything is compiled. So a derivative inside the function is a part of what is recorded, and can not be lost.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from funcmeta import rng
from funcmeta._errors import CompileError, FuncmetaError
from funcmeta._graph import check_declared
from funcmeta._watch import watched

Flat = Callable[[Sequence[Tensor], int], list[Tensor]]
"""A function from contiguous tensors and a seed to tensors."""

Kernel = Callable[[list[Tensor]], Sequence[Tensor]]


class Lowered:
    """A flat function for inputs like some example, as a kernel, and on demand its vector-Jacobian product.

    Args:
        fn: the function; called with fake tensors, for recording.
        examples: the inputs, by example.
        seed: the seed, by example.
        dynamic: which dimensions of each input may differ from the example's.
        options: settings of inductor, or None to run the recorded operations as they are.
        where: what to search for the name of a tensor that ``fn`` captured.
    """

    def __init__(
        self,
        fn: Flat,
        examples: Sequence[Tensor],
        seed: int,
        dynamic: Sequence[Sequence[bool]],
        options: Mapping[str, Any] | None,
        where: Any,
    ) -> None:
        self.fn, self.seed, self.where = fn, seed, where
        self._options = options
        self._shapes = ShapeEnv() if any(map(any, dynamic)) else None
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self._shapes)
        self.inputs = [self._fake(*pair) for pair in zip(examples, dynamic, strict=True)]
        with torch.no_grad():
            graph, other = (self.recorded(lambda *flat, s=s: fn(flat, s), self.inputs) for s in (seed, seed ^ 1))
        _check_same(graph, other)
        self._draws = any(_is_draw(node) for node in graph.graph.nodes)
        self._kernel = self.kernel(graph, self.inputs)

    def __call__(self, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        """The results, without a graph."""
        with torch.no_grad():
            if not self._draws:
                return list(self._kernel([*tensors]))
            with rng.forked(seed):
                return list(self._kernel([*tensors]))

    def plain(self, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        """The same by the function itself."""
        with torch.no_grad():
            return self.fn([tensor.detach() for tensor in tensors], seed)

    def accepts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the kernels hold for inputs of these shapes too."""
        return self._shapes is not None and bool(self._shapes.evaluate_guards_for_args(self.inputs, tensors))  # type: ignore[arg-type]

    def recorded(self, fn: Callable[..., list[Tensor]], inputs: list[Tensor]) -> GraphModule:
        """The ATen graph of a function: functional, and decomposed as inductor wants it."""
        table = select_decomp_table()
        with self.mode, explained():
            graph = make_fx(fn, decomposition_table=table, _allow_non_fake_inputs=True)(*inputs)
            pure = torch.func.functionalize(graph, remove="mutations")
            graph = make_fx(pure, decomposition_table=table, _allow_non_fake_inputs=True)(*inputs)
        _check_pure(graph)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph

    def kernel(self, graph: GraphModule, inputs: list[Tensor]) -> Kernel:
        """The graph as one function of a list of contiguous tensors."""
        if self._options is None:
            return lambda tensors: graph(*tensors)
        try:
            with (
                inductor_config.patch({"fallback_random": True, **self._options}),
                tracing(TracingContext(self.mode)),
                torch.no_grad(),
            ):
                return compile_fx_inner(graph, inputs)
        except Exception as error:
            raise CompileError(
                f"inductor could not compile what was recorded: {_first_line(error)} It needs a C++ compiler on a CPU "
                f"and Triton on a GPU. Install it, or pass backend='aten'."
            ) from error

    def _fake(self, tensor: Tensor, dynamic: Sequence[bool]) -> Tensor:
        if not any(dynamic):
            return self.mode.from_tensor(tensor.detach(), static_shapes=True)
        kinds = [DimDynamic.DYNAMIC if each else DimDynamic.STATIC for each in dynamic]
        return self.mode.from_tensor(tensor.detach(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


class Derivative:
    """λ ↦ λᵀ ∂f/∂(wanted inputs) for a lowered function f; compiled when it is first needed, and then compared.

    Attributes:
        differentiable: which results have a cotangent.
        reached: which inputs have a gradient.
    """

    def __init__(self, lowered: Lowered, wanted: Sequence[bool]) -> None:
        self._lowered, self._wanted = lowered, wanted
        self._kernel: Kernel | None = None
        with lowered.mode, torch.enable_grad(), explained():
            inputs = self._leaves(lowered.inputs)
            results = lowered.fn(inputs, lowered.seed)
            check_declared(results, [each for each in inputs if each.requires_grad], lowered.where)
            self.differentiable = [each.requires_grad for each in results]
            self._cotangents = [torch.empty(each.shape).to(each) for each in results if each.requires_grad]
            self.reached = [grad is not None for grad in self._gradients(inputs, results, self._cotangents)]

    def __call__(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
        """The gradients of the inputs that are reached, for cotangents of the differentiable results."""
        flat = [*tensors, *[each.contiguous() for each in cotangents]]
        with torch.no_grad(), rng.forked(seed):
            if self._kernel is not None:
                return iter(self._kernel(flat))
            self._kernel = self._compiled(len(tensors))
            found = self._kernel([*flat])
        compare(found, self._plain(tensors, cotangents, seed), "gradient")
        return iter(found)

    def _compiled(self, count: int) -> Kernel:
        seed, examples = self._lowered.seed, [*self._lowered.inputs, *self._cotangents]
        graph = self._lowered.recorded(lambda *flat: self._plain(flat[:count], flat[count:], seed), examples)
        return self._lowered.kernel(graph, examples)

    def _plain(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], seed: int) -> list[Tensor]:
        with torch.enable_grad():
            inputs = self._leaves(tensors)
            found = self._gradients(inputs, self._lowered.fn(inputs, seed), cotangents)
        return [grad for grad in found if grad is not None]

    def _leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [each.detach().requires_grad_(want) for each, want in zip(tensors, self._wanted, strict=True)]

    def _gradients(
        self, inputs: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor | None]:
        leaves = [each for each in inputs if each.requires_grad]
        ends = [each for each in results if each.requires_grad]
        if not ends:
            return [None] * len(inputs)
        with watched(False):
            found = iter(torch.autograd.grad(ends, leaves, list(cotangents), allow_unused=True))
        return [next(found) if each.requires_grad else None for each in inputs]


def compare(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Raise unless kernels gave what the function itself gives, to half of the digits."""
    largest = max((_size(each) for each in expected), default=0.0)
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if not _agree(ours, theirs.detach(), largest):
            raise CompileError(
                f"The compiled {what} {index} differs from what the function itself gives by "
                f"{float((ours - theirs).abs().max()):.1e} of {float(theirs.abs().max()):.1e}. Most often the function "
                f"depends on more than its arguments: a counter, an iterator, draws with a generator of its own."
            )


def _agree(got: Tensor, expected: Tensor, largest: float) -> bool:
    """Whether two results are close; what is zero but for rounding, next to the largest of all results, is zero."""
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    scale, eps = _size(expected), torch.finfo(expected.dtype).eps
    tolerance = max(eps**0.5 * scale, 100 * eps * largest)
    return torch.allclose(got, expected, rtol=0.0, atol=tolerance, equal_nan=True) or not isfinite(scale)


def _size(tensor: Tensor) -> float:
    """The largest number of a floating-point tensor, in magnitude."""
    return float(tensor.detach().abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0


def _is_draw(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _check_pure(graph: GraphModule) -> None:
    """Raise when what was recorded draws from a generator of its own, or writes into something."""
    for node in graph.graph.nodes:
        if _is_draw(node) and node.kwargs.get("generator") is not None:
            raise CompileError(
                f"The function draws from a torch.Generator of its own ({node.target}), which every call would "
                f"advance. Draw without a generator: torch's global one is seeded for every step."
            )
        if node.target is torch.ops.aten.copy_.default:
            raise CompileError(
                "The function writes into a tensor that it was given or has captured. Let it return new tensors."
            )


def _check_same(graph: GraphModule, other: GraphModule) -> None:
    """Raise when another seed gives another graph."""
    constants = [dict(each.named_buffers()) | vars(each) for each in (graph, other)]
    tensors = [[value for value in each.values() if isinstance(value, Tensor)] for each in constants]
    same = len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))
    if graph.code != other.code or not same:
        raise CompileError(
            "The function computes with its seed, so that every step would be compiled anew. Draw from torch's global "
            "generator, which is seeded for every step, or pass the numbers in the batch."
        )


class explained:
    """Turns what goes wrong while recording into a ``CompileError`` that names the line."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Explain the error, unless it is one of ours."""
        if not isinstance(error, Exception) or isinstance(error, FuncmetaError):
            return
        own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
        outside = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith(own)]
        at = f" at '{outside[-1].line}' ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
        raise CompileError(
            f"The function could not be recorded{at}: {_first_line(error)} What it does may not depend on the values "
            f"of tensors in Python (item(), if, loops over nonzero()): use torch.where and masks, or do not compile it."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
