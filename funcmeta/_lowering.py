"""A flat function of tensors as kernels: traced to ATen operations once, with its derivative, and lowered by inductor.

``make_fx`` records what happens to the tensors, whatever Python does on the way, and ``torch.autograd`` has run before
anything is compiled. So a derivative inside the function is a part of what is recorded, and can not be lost.
"""

import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from funcmeta import rng
from funcmeta._errors import CompileError, FuncmetaError
from funcmeta._graph import check_declared
from funcmeta._watch import watched

Flat = Callable[[Sequence[Tensor], int], list[Tensor]]
"""A function from contiguous tensors and a seed to tensors."""

Kernel = Callable[[list[Tensor]], Sequence[Tensor]]


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor with the strides that kernels expect.

    One with a dimension of size 1 may be contiguous and at the same time in the format "channels last", by which a
    convolution chooses the format of its result; here it is not.
    """
    tensor = tensor.contiguous()
    return tensor.flatten().view(tensor.shape) if tensor.dim() in (4, 5) and 1 in tensor.shape else tensor


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
        self._varies, self._sizes = dynamic, [tensor.shape for tensor in examples]
        self.dynamic = any(map(any, dynamic))
        self._shapes = ShapeEnv() if self.dynamic else None
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self._shapes)
        self.inputs = [self._fake(*pair) for pair in zip(examples, dynamic, strict=True)]
        with torch.no_grad():
            graph, other = (self.recorded(lambda *flat, s=s: fn(flat, s), self.inputs) for s in (seed, seed ^ 1))
        _check_same(graph, other)
        self._graph = graph
        self._draws = any(_is_draw(node) for node in graph.graph.nodes)
        self._kernel: Kernel | None = None

    def __call__(self, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        """The results, without a graph; compiled when they are first needed, and then compared."""
        if self._kernel is not None:
            return self.run(self._kernel, tensors, seed)
        kernel = self.kernel(self._graph, self.inputs)
        results = self.run(kernel, tensors, seed)
        compare(results, self.plain(tensors, seed), "result")
        self._kernel = kernel
        return results

    def run(self, kernel: Kernel, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        """What a kernel makes of some tensors."""
        with torch.no_grad():
            if not self._draws:
                return list(kernel([*tensors]))
            with rng.forked(seed):
                return list(kernel([*tensors]))

    def plain(self, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        """The same by the function itself."""
        with torch.no_grad():
            return self.fn([tensor.detach() for tensor in tensors], seed)

    def accepts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the kernels hold for inputs of these shapes too."""
        if self._shapes is None:
            return False
        sizes = zip(self._varies, self._sizes, tensors, strict=True)
        fixed = all(
            varies or size == own
            for each, sizes_then, tensor in sizes
            for varies, size, own in zip(each, sizes_then, tensor.shape, strict=True)
        )
        return fixed and bool(self._shapes.evaluate_guards_for_args(self.inputs, tensors))  # type: ignore[arg-type]

    def recorded(self, fn: Callable[..., list[Tensor]], inputs: list[Tensor]) -> GraphModule:
        """The ATen graph of a function: functional, and decomposed as inductor wants it."""
        with inductor_config.patch({"fallback_random": True}):
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
    """λ ↦ λᵀ ∂f/∂(wanted inputs) for a lowered function f, in two kernels.

    The forward kernel gives the results of f, and with them those of its matrix products, convolutions and draws, if
    they are needed again; the backward kernel computes the rest from its inputs anew. Each is compiled when it is first
    needed, and then compared.

    Attributes:
        differentiable: which results have a cotangent.
        reached: which inputs have a gradient.
    """

    def __init__(self, lowered: Lowered, wanted: Sequence[bool]) -> None:
        self._lowered, self._wanted = lowered, wanted
        with lowered.mode, torch.enable_grad(), explained():
            inputs = self._leaves(lowered.inputs)
            results = lowered.fn(inputs, lowered.seed)
            check_declared(results, [each for each in inputs if each.requires_grad], lowered.where)
            self.differentiable = [each.requires_grad for each in results]
            cotangents = [torch.empty(each.shape).to(each) for each in results if each.requires_grad]
            self.reached = [grad is not None for grad in self._gradients(inputs, results, cotangents)]
        self._ends = [*lowered.inputs, *cotangents]
        whole = lowered.recorded(self._both, self._ends)
        self._split = split(whole, len(inputs), len(results))
        self._forward: Kernel | None = None
        self._backward: Kernel | None = None

    def forward(self, tensors: Sequence[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """The results, and what ``backward`` needs besides the inputs."""
        kernel = self._forward or self._lowered.kernel(self._split.forward, self._lowered.inputs)
        both = self._lowered.run(kernel, tensors, seed)
        results, kept = both[: len(self.differentiable)], both[len(self.differentiable) :]
        if self._lowered.dynamic:
            kept = [each.contiguous() for each in kept]
        if self._forward is None:
            compare(results, self._lowered.plain(tensors, seed), "result")
            self._forward = kernel
        return results, kept

    def backward(
        self, tensors: Sequence[Tensor], kept: Sequence[Tensor], cotangents: Sequence[Tensor], seed: int
    ) -> Iterator[Tensor]:
        """The gradients of the inputs that are reached, for cotangents of the differentiable results."""
        ready = [contiguous(each) for each in cotangents]
        kernel = self._backward or self._lowered.kernel(self._split.backward, self._places(kept))
        with torch.no_grad():
            found = kernel([*tensors, *kept, *ready])
        if self._backward is None:
            with rng.forked(seed):
                compare(found, self._plain(tensors, ready, seed), "gradient")
            self._backward = kernel
        return iter(found)

    def _places(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """Fake inputs of the backward kernel; what the forward kernel kept has the strides that this one gave it."""
        places = [node.meta["val"] for node in self._split.backward.graph.nodes if node.op == "placeholder"]
        if not self._lowered.dynamic:
            with self._lowered.mode:
                for index, each in enumerate(kept, start=len(self._wanted)):
                    places[index] = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=each.device)
        return places

    def _both(self, *flat: Tensor) -> list[Tensor]:
        """Results and gradients in one, to be recorded."""
        count = len(self._wanted)
        with torch.enable_grad():
            inputs = self._leaves(flat[:count])
            results = self._lowered.fn(inputs, self._lowered.seed)
            found = self._gradients(inputs, results, flat[count:])
        return [*[each.detach() for each in results], *[grad for grad in found if grad is not None]]

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


class Split(NamedTuple):
    """Two graphs made from one: inputs → results and what is kept; inputs, what is kept, cotangents → gradients."""

    forward: GraphModule
    backward: GraphModule


def split(graph: GraphModule, inputs: int, results: int) -> Split:
    """Take a graph (inputs, cotangents) → (results, gradients) apart."""
    nodes = list(graph.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    (ends,) = nodes[-1].args
    late = set(places[inputs:])
    for node in nodes:
        if not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    gradients = ends[results:]
    dear = {node for node in nodes if node not in late and _is_dear(node)}
    needed = _behind(gradients, dear)
    kept = [node for node in nodes if node in dear and node in needed]
    forward = _extracted(graph, places[:inputs], [*ends[:results], *kept])
    return Split(forward, _extracted(graph, [*places[:inputs], *kept, *places[inputs:]], gradients))


def _extracted(graph: GraphModule, inputs: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
    """The part of a graph that leads from some nodes to others."""
    made = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = made.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    needed = _behind(outputs, set(inputs))
    for node in graph.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output([copies[node] for node in outputs])
    return GraphModule(graph, made)


def _behind(ends: Iterable[Node], stop: set[Node]) -> set[Node]:
    """All nodes on the way from some nodes back to where to stop, both included."""
    found: set[Node] = set()
    todo = list(ends)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend([] if node in stop else node.all_input_nodes)
    return found


def _is_dear(node: Node) -> bool:
    """Whether it is better kept than computed again."""
    if node.target is operator.getitem:
        return _is_dear(node.args[0])  # type: ignore[arg-type]
    return _is_draw(node) or getattr(node.target, "_opname", None) in _DEAR


_DEAR = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}


def compare(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Raise unless kernels gave what the function itself gives, but for rounding and what it makes of a kink."""
    sizes = [_norm(each) for each in expected]
    for index, (ours, theirs, size) in enumerate(zip(got, expected, sizes, strict=True)):
        if not theirs.is_floating_point():
            apart, allowed = float((ours != theirs).sum()), 0.0
        else:
            apart = _norm(torch.where(ours.isnan() & theirs.isnan(), 0.0, ours - theirs))
            allowed = torch.finfo(theirs.dtype).eps ** 0.3 * max(size, 1e-3 * max(sizes))
        if apart > allowed:
            raise CompileError(
                f"The compiled {what} {index} is {apart:.1e} from what the function itself gives, which has norm "
                f"{size:.1e}. Most often the function depends on more than its arguments: a counter, an iterator, "
                f"draws with a generator of its own."
            )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach())) if tensor.is_floating_point() else 0.0


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
    """What an error says, as a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
