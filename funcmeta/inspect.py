"""Ask a module, before training, which derivatives and transforms it supports."""

import copy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from funcmeta import rng, tree
from funcmeta._errors import ArgumentError
from funcmeta._graph import check_differentiable_again
from funcmeta._guard import check_has_data
from funcmeta._typing import Buffers, Params
from funcmeta.model import functionalize, tied_names

Status = Literal["works", "fails", "none"]


class Finding(NamedTuple):
    """What was found about one property of a module.

    Attributes:
        name: the property.
        status: "works", "fails", or "none" where the module has nothing of the kind.
        detail: what was seen.
        advice: what to do when it fails, else empty.

    Examples:
        >>> Finding("vmap", "works", "equal to a loop", "").status
        'works'

    Source: this library.
    """

    name: str
    status: Status
    detail: str
    advice: str


class Readiness(NamedTuple):
    """The findings about one module; ``str()`` is a table.

    Attributes:
        module: class name of the module.
        findings: one ``Finding`` a property, in the order of the table.

    Examples:
        >>> print(Readiness("Linear", (Finding("vmap", "works", "equal to a loop", ""),)))
        Linear
          vmap  works  equal to a loop

    Source: this library.
    """

    module: str
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        width = max(len(each.name) for each in self.findings)
        lines = [self.module]
        for each in self.findings:
            lines.append(f"  {each.name:{width}}  {each.status:5}  {each.detail}".rstrip())
            if each.advice:
                lines.append(f"  {'':{width}}         → {each.advice}")
        return "\n".join(lines)

    def __getitem__(self, key: Any) -> Any:
        """A finding by its name, or a field by its index."""
        if not isinstance(key, str):
            return tuple(self)[key]
        named = {each.name: each for each in self.findings}
        if key not in named:
            raise ArgumentError(f"There is no finding {key!r}. Ask for one of {list(named)}.")
        return named[key]


def inspect(module: nn.Module, *inputs: Any, seed: int = 0) -> Readiness:
    """Try a module on real inputs and say which transforms it supports, and what to do where it does not.

    The module is run as the library runs it (``functionalize``), each submodule in its own mode, on copies. The scalar
    that is differentiated is the mean square of its floating-point outputs.

    - double backward: the derivative of the gradient along a direction exists, and agrees with a difference quotient.
    - forward AD: forward-over-reverse gives the same derivative.
    - vmap: two parameter sets at once give what each gives alone, gradients included.
    - buffers: which tensors a call changes.
    - randomness: whether outputs depend on the seed, and on nothing but the seed.
    - tied weights: which names share one tensor.

    Args:
        module: the network; not changed.
        *inputs: what its forward takes; a small batch is enough.
        seed: seed of the draws and of the direction.

    Returns:
        A ``Readiness``; ``print`` it for a table, index it by a property's name.

    Raises:
        ArgumentError: the module cannot be made functional, does not run on these inputs, or has no data; a bad seed.

    Examples:
        >>> print(inspect(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.ones(2, 3)))
        Sequential
          double backward  works  agrees with finite differences
          forward AD       works  agrees with double backward
          vmap             works  equal to a loop
          buffers          none   no buffers
          randomness       none   deterministic
          tied weights     none   no shared tensors

    Source: this library.
    """
    subject = _Subject(module, inputs, seed)
    findings = (
        subject.double_backward(),
        subject.forward_mode(),
        subject.batched(),
        subject.buffers(),
        subject.randomness(),
        subject.tied(),
    )
    return Readiness(type(module).__name__, findings)


class _Subject:
    """The module as a scalar function of its parameters, and the questions asked of it."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], seed: int) -> None:
        self._module, self._inputs, self._seed = module, inputs, rng.check_seed(seed)
        self._model, self._params, self._buffers = functionalize(module)
        generator = torch.Generator().manual_seed(seed)
        self._direction = tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator).to(leaf), self._params)
        for name, value in (("inputs", inputs), ("params", self._params), ("buffers", self._buffers)):
            check_has_data(value, name)
        try:
            self._run(self._params, self._buffers)
        except Exception as error:
            raise ArgumentError(
                f"{type(module).__name__} does not run on these inputs: {error}. Pass what its forward takes."
            ) from error

    def double_backward(self) -> Finding:
        name = "double backward"
        try:
            self._second(self._params)
        except RuntimeError as error:
            advice = "use FirstOrder(), or replace the operation by one whose backward is differentiable"
            return Finding(name, "fails", _first_line(error), advice)
        try:
            distance = self._in_double().distance_from_quotient()
        except (RuntimeError, ArgumentError):
            return Finding(name, "works", "exists; not compared with differences: does not run in float64", "")
        if distance > 1e-3:
            advice = "look for detach(), no_grad, argmax or a custom backward in the forward pass"
            return Finding(name, "fails", f"differs from finite differences by {distance:.1%}", advice)
        return Finding(name, "works", "agrees with finite differences", "")

    def forward_mode(self) -> Finding:
        name = "forward AD"
        try:
            _, forward = torch.func.jvp(torch.func.grad(self._scalar), (self._params,), (self._direction,))[:2]
            exact = self._second(self._params)
        except (RuntimeError, NotImplementedError) as error:
            return Finding(name, "fails", _first_line(error), "Reverse() needs double backward only")
        rounding = 1e-3 * float(tree.norm(self._first(self._params)))
        if _distance(forward, exact, floor=rounding) > 1e-3:
            return Finding(name, "fails", "differs from double backward", "trust Reverse() after check_meta_grad only")
        return Finding(name, "works", "agrees with double backward", "")

    def batched(self) -> Finding:
        name = "vmap"
        sets = [self._params, tree.map(lambda leaf, step: leaf + 0.1 * step, self._params, self._direction)]
        both = tree.map(lambda *pair: torch.stack(pair), *sets)
        buffers = tree.map(lambda leaf: torch.stack([leaf, leaf]), self._buffers)
        try:
            mapped = torch.func.vmap(torch.func.grad(self._scalar), randomness="different")(both, buffers)
        except RuntimeError as error:
            return Finding(name, "fails", _first_line(error), 'use unroll_batch(strategy="loop")')
        alone = [self._first(each) for each in sets]
        if self._random():
            return Finding(name, "works", "not compared with a loop: draws differ under vmap", "")
        distance = max(
            _distance(tree.map(lambda leaf, i=index: leaf[i], mapped), each) for index, each in enumerate(alone)
        )
        if distance > 1e-3:
            return Finding(name, "fails", "differs from a loop", 'use unroll_batch(strategy="loop")')
        return Finding(name, "works", "equal to a loop", "")

    def buffers(self) -> Finding:
        _, after = self._run(self._params, self._buffers)
        own = dict(self._module.named_buffers())
        if not own:
            return Finding("buffers", "none", "no buffers", "")
        changed = [name for name in own if not torch.equal(after[name], self._buffers[name])]
        detail = f"returned anew by a call: {', '.join(changed)}" if changed else "constant"
        return Finding("buffers", "works", detail, "")

    def randomness(self) -> Finding:
        first, second = self._outputs(self._seed), self._outputs(self._seed)
        if _distance(first, second) > 0:
            advice = "draw from torch's global generator, which the library seeds, or keep the draw in a buffer"
            return Finding("randomness", "fails", "one seed gives two results", advice)
        if not self._random():
            return Finding("randomness", "none", "deterministic", "")
        return Finding("randomness", "works", "draws follow the seed", "")

    def tied(self) -> Finding:
        names = tied_names(self._module)
        if not names:
            return Finding("tied weights", "none", "no shared tensors", "")
        pairs = ", ".join(f"{alias} is {name}" for alias, name in names.items())
        return Finding("tied weights", "works", f"one entry each: {pairs}", "")

    def _run(self, params: Params, buffers: Buffers) -> tuple[Any, Buffers]:
        return self._model(params, buffers, *self._inputs, seed=self._seed)

    def _outputs(self, seed: int) -> list[Tensor]:
        with torch.no_grad():
            return _floating(self._model(self._params, self._buffers, *self._inputs, seed=seed)[0])

    def _random(self) -> bool:
        return _distance(self._outputs(self._seed), self._outputs(self._seed + 1)) > 0

    def _scalar(self, params: Params, buffers: Buffers | None = None) -> Tensor:
        out, _ = self._run(params, self._buffers if buffers is None else buffers)
        return torch.stack([leaf.square().mean() for leaf in _floating(out)]).sum()

    def _first(self, params: Params) -> Params:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        grads = torch.autograd.grad(self._scalar(leaves), list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, grads, strict=True))

    def _second(self, params: Params) -> Params:
        """The derivative of the gradient along the direction, by reverse over reverse."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        every = list(leaves.values())
        loss = self._scalar(leaves)
        check_differentiable_again(loss, every)
        first = torch.autograd.grad(loss, every, create_graph=True, materialize_grads=True)
        slope = tree.dot(list(first), list(self._direction.values()))
        if not slope.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        return dict(zip(leaves, torch.autograd.grad(slope, every, materialize_grads=True), strict=True))

    def distance_from_quotient(self) -> float:
        """Relative distance of the second derivative from a central difference of gradients."""
        step = 1e-6
        ahead, behind = (
            self._first(tree.map(lambda leaf, by, s=sign: leaf + s * step * by, self._params, self._direction))
            for sign in (1, -1)
        )
        return _distance(self._second(self._params), tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind))

    def _in_double(self) -> "_Subject":
        inputs = tree.map(lambda leaf: leaf.double() if _is_floating(leaf) else leaf, self._inputs)
        return _Subject(copy.deepcopy(self._module).double(), inputs, self._seed)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _floating(out: Any) -> list[Tensor]:
    found = [leaf for leaf in tree.leaves(out) if _is_floating(leaf)]
    if not found:
        raise ArgumentError("The module returns no floating-point tensor, so there is nothing to differentiate.")
    return found


def _distance(left: Any, right: Any, floor: float = 0.0) -> float:
    """Euclidean distance of two trees relative to their size, or to ``floor`` if that is more; 0 when both vanish."""
    size = max(float(tree.norm(left)), float(tree.norm(right)), floor)
    return float(tree.norm(tree.map(torch.sub, left, right))) / size if size else 0.0


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160]
