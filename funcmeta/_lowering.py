"""A flat function of tensors as kernels: traced to ATen operations once, with its derivative, and lowered by inductor.

``make_fx`` records what happens to the tensors, whatever Python does on the way, and ``torch.autograd`` has run before
anything is compiled. So a derivative inside the function is a part of what is recorded, and cannot be lost.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from funcmeta import rng
from funcmeta._errors import CompileError
from funcmeta._graph import check_declared
from funcmeta._live_bytes import counting, uncounted
from funcmeta._lowering_checks import Plain, check_pure, check_same, compare, explained, first_line, rounding
from funcmeta._split import is_draw, split
from funcmeta._watch import watched

Flat = Callable[[Sequence[Tensor], int], list[Tensor]]
"""A function from contiguous tensors and a seed to tensors."""

Kernel = Callable[[list[Tensor]], Sequence[Tensor]]

Sizes = tuple[torch.Size, ...]


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
            if self.dynamic and graph.code != other.code:
                # what the first recording learned of the sizes may have changed the second: reshape(-1) does that
                graph = self.recorded(lambda *flat: fn(flat, seed), self.inputs)
        check_same(graph, other)
        self._graph = graph
        self._draws = any(is_draw(node) for node in graph.graph.nodes)
        self._kernel: Kernel | None = None
        self._met: set[Sizes] = set()
        self._refused: set[Sizes] = set()
        self._accepted: dict[Sizes, tuple[int, bool]] = {}

    def __call__(self, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        """The results, without a graph; compiled when they are first needed."""
        if self.sizes(tensors) in self._met:
            return self._by_kernel(tensors, seed)
        return self.checked(partial(self._by_kernel, tensors), self.plain, "result", tensors, seed, self._met)[0]

    def checked(
        self,
        run: Callable[[int], list[Tensor]],
        plain: Plain,
        what: str,
        tensors: Sequence[Tensor],
        seed: int,
        met: set[Sizes],
    ) -> tuple[list[Tensor], bool]:
        """What a kernel gives for sizes that it meets first; or what the function gives, and False, where they differ.

        At the first sizes of all they are compared for a second seed too, which shows values that were made from the
        seed. A kernel for a single combination of sizes raises where they differ.
        """
        sizes = self.sizes(tensors)
        with uncounted():
            expected = plain(tensors, seed)
            if sizes in self._refused:
                return expected, False
            try:
                if not met and what == "result":
                    other = rng.fold(seed, 1)
                    compare(run(other), plain(tensors, other), what, partial(rounding, plain, tensors, other))
                found = run(seed)
                compare(found, expected, what, partial(rounding, plain, tensors, seed))
            except Exception:
                if not self.dynamic:
                    raise
                self.refuse(tensors)
                return expected, False
        if self.dynamic and not self.accepts(tensors):  # compiling a kernel may add conditions
            self.refuse(tensors)
            return expected, False
        met.add(sizes)
        return (run(seed) if counting() else found), True

    def _by_kernel(self, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        if self._kernel is None:
            self._kernel = self.kernel(self._graph, self.inputs)
        return self.run(self._kernel, tensors, seed)

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

    def sizes(self, tensors: Sequence[Tensor]) -> Sizes:
        """What tells apart the inputs that the kernels are compared for, each by itself."""
        return tuple([tensor.shape for tensor in tensors]) if self.dynamic else ()

    def accepts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the kernels hold for inputs of these shapes, by what is known by now."""
        if self._shapes is None:
            return all(map(operator.eq, self._sizes, [tensor.shape for tensor in tensors]))
        sizes, known = self.sizes(tensors), len(self._shapes.guards) + len(self._shapes.replacements)
        if sizes in self._refused:
            return False
        when, accepted = self._accepted.get(sizes, (-1, False))
        if when != known:
            accepted = self._fixed(tensors) and self._guarded(tensors)
            self._accepted[sizes] = known, accepted
        return accepted

    def _fixed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether dimensions that were recorded as fixed are as they were."""
        return all(
            varies or size == own
            for each, sizes_then, tensor in zip(self._varies, self._sizes, tensors, strict=True)
            for varies, size, own in zip(each, sizes_then, tensor.shape, strict=True)
        )

    def _guarded(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the sizes meet the conditions under which the recording, and what was compiled since, holds.

        ``ignore_static=False``: a size that became a number while it was recorded (``len(x)``, a loop over rows) is a
        condition too, which torch leaves to the tensor guards of dynamo unless it is asked.
        """
        assert self._shapes is not None
        fits = self._shapes.evaluate_guards_for_args(self.inputs, tensors, ignore_static=False)  # type: ignore[arg-type]
        return bool(fits)

    def refuse(self, tensors: Sequence[Tensor]) -> None:
        """Never accept these sizes again, which showed that something else was recorded."""
        self._refused.add(self.sizes(tensors))

    def refuses(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these sizes were accepted once, and then refused."""
        return self.dynamic and self.sizes(tensors) in self._refused

    def recorded(self, fn: Callable[..., list[Tensor]], inputs: list[Tensor]) -> GraphModule:
        """The ATen graph of a function: functional, and decomposed as inductor wants it."""
        with inductor_config.patch({"fallback_random": True}):
            table = select_decomp_table()
        table = {**table, torch.ops.aten.bernoulli.default: _bernoulli}
        with self.mode, explained():
            graph = make_fx(fn, decomposition_table=table, _allow_non_fake_inputs=True)(*inputs)
            pure = torch.func.functionalize(graph, remove="mutations")
            graph = make_fx(pure, decomposition_table=table, _allow_non_fake_inputs=True)(*inputs)
        check_pure(graph)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph

    def kernel(self, graph: GraphModule, inputs: list[Tensor]) -> Kernel:
        """The graph as one function of a list of contiguous tensors."""
        if self._options is None:
            return lambda tensors: graph(*tensors)
        compiled = self._compiled(graph, inputs)
        # what kernels allocate cannot be counted
        return lambda tensors: graph(*tensors) if counting() else compiled(tensors)

    def _compiled(self, graph: GraphModule, inputs: list[Tensor]) -> Kernel:
        """The graph by inductor."""
        assert self._options is not None
        try:
            with (
                inductor_config.patch({"fallback_random": True, **self._options}),
                tracing(TracingContext(self.mode)),
                torch.no_grad(),
            ):
                return compile_fx_inner(graph, inputs)
        except Exception as error:
            raise CompileError(
                f"inductor could not compile what was recorded: {first_line(error)} It needs a C++ compiler on a CPU "
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
        self._forward_met: set[Sizes] = set()
        self._backward_met: set[Sizes] = set()
        self._strides: list[tuple[int, ...]] | None = None

    def forward(self, tensors: Sequence[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """The results, and what ``backward`` needs besides the inputs."""
        if self._lowered.sizes(tensors) in self._forward_met:
            return self._forward_kernel(tensors, seed)
        kept: list[Tensor] = []

        def run(seed: int) -> list[Tensor]:
            nonlocal kept
            results, kept = self._forward_kernel(tensors, seed)
            return results

        plain = self._lowered.plain
        results, fits = self._lowered.checked(run, plain, "result", tensors, seed, self._forward_met)
        return results, kept if fits else []  # where it does not fit, the backward pass is the function's own

    def backward(
        self, tensors: Sequence[Tensor], kept: Sequence[Tensor], cotangents: Sequence[Tensor], seed: int
    ) -> Iterator[Tensor]:
        """The gradients of the inputs that are reached, for cotangents of the differentiable results."""
        ready = [contiguous(each) for each in cotangents]
        if self._lowered.sizes(tensors) in self._backward_met:
            return iter(self._backward_kernel(tensors, kept, ready))

        def run(_: int) -> list[Tensor]:
            return self._backward_kernel(tensors, kept, ready)

        def plain(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
            with rng.forked(seed):
                return self._plain(tensors, ready, seed)

        return iter(self._lowered.checked(run, plain, "gradient", tensors, seed, self._backward_met)[0])

    def _forward_kernel(self, tensors: Sequence[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
        if self._forward is None:
            self._forward = self._lowered.kernel(self._split.forward, self._lowered.inputs)
        both = self._lowered.run(self._forward, tensors, seed)
        results, kept = both[: len(self.differentiable)], both[len(self.differentiable) :]
        if self._lowered.dynamic:
            kept = [each.contiguous() for each in kept]
        if self._strides is None:
            self._strides = [each.stride() for each in kept]
        return results, kept

    def _backward_kernel(
        self, tensors: Sequence[Tensor], kept: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor]:
        if self._backward is None:
            self._backward = self._lowered.kernel(self._split.backward, self._places(kept))
        with torch.no_grad():
            return list(self._backward([*tensors, *self._laid_out(kept), *cotangents]))

    def _places(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """Fake inputs of the backward kernel; what the forward kernel kept has the strides that this one gave it."""
        places = [node.meta["val"] for node in self._split.backward.graph.nodes if node.op == "placeholder"]
        if not self._lowered.dynamic and self._strides is not None:
            with self._lowered.mode:
                for index, (each, stride) in enumerate(zip(kept, self._strides, strict=True), start=len(self._wanted)):
                    places[index] = torch.empty_strided(each.shape, stride, dtype=each.dtype, device=each.device)
        return places

    def _laid_out(self, kept: Sequence[Tensor]) -> Sequence[Tensor]:
        """What was kept, with the strides that the backward kernel was compiled for: single operations gave others."""
        if self._lowered.dynamic or self._strides == [each.stride() for each in kept]:
            return kept
        assert self._strides is not None
        return [
            each if each.stride() == stride else torch.empty_strided(each.shape, stride).to(each).copy_(each)
            for each, stride in zip(kept, self._strides, strict=True)
        ]

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


def _bernoulli(p: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """``torch.bernoulli(p)`` as torch draws it; its usual decomposition draws in float32 whatever ``p`` is."""
    return torch.ops.aten.bernoulli.Tensor(p, p, generator=generator)  # type: ignore[no-any-return]
