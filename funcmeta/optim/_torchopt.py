"""Transforms to and from torchopt, which is optional."""

from typing import Any

import torch

from funcmeta import tree
from funcmeta._errors import ArgumentError, MissingExtraError
from funcmeta._typing import Tree
from funcmeta.optim._transform import Transform, check_transform


def from_torchopt(transformation: Any) -> Transform:
    """Wrap a torchopt GradientTransformation as a Transform.

    update(g, state, θ) = transformation.update(g, state, params=θ, inplace=False): torchopt writes into the gradients
    it is given unless told otherwise, and it is told otherwise here.

    Args:
        transformation: what a function such as `torchopt.sgd(0.1)` returns.

    Returns:
        A transform whose state is torchopt's own.

    Raises:
        ArgumentError: the argument is not a GradientTransformation.

    Examples:
        >>> import torchopt
        >>> transform = fm.optim.from_torchopt(torchopt.sgd(0.5))
        >>> params = {"w": torch.tensor([1.0])}
        >>> transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)[0]
        {'w': tensor([-1.])}

    Source: torchopt 0.7.3 (https://torchopt.readthedocs.io).
    """
    if not isinstance(transformation, _torchopt().base.GradientTransformation):
        raise ArgumentError(
            f"got {transformation!r} ({type(transformation).__name__}), expected a torchopt GradientTransformation. "
            "Pass what torchopt.sgd(...), torchopt.adam(...) or torchopt.chain(...) returns."
        )

    def update(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        updates, new = transformation.update(grads, state, params=params, inplace=False)
        return updates, new

    return Transform(transformation.init, update)


def to_torchopt(transform: Transform) -> Any:
    """Wrap a Transform as a torchopt GradientTransformation.

    With `inplace=False`, which torchopt's differentiable optimizers pass, update is that of the transform. With
    `inplace=True`, torchopt's default, update runs without a graph and writes the updates into the gradient tensors
    that it is given, as torchopt's own transformations do. The state is never written to.

    Args:
        transform: any transform of this library.

    Returns:
        A torchopt GradientTransformation; its update needs the keyword `params`.

    Raises:
        ArgumentError: the argument is not a Transform.

    Examples:
        >>> import torchopt
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torchopt.Optimizer([weight], fm.optim.to_torchopt(fm.optim.sgd(0.5)))
        >>> (3 * weight).sum().backward()
        >>> _ = optimizer.step()
        >>> weight.data
        tensor([-0.5000])

    Source: torchopt 0.7.3 (https://torchopt.readthedocs.io).
    """
    check_transform(transform)

    def update(updates: Tree, state: Any, *, params: Tree | None = None, inplace: bool = True) -> tuple[Tree, Any]:
        if params is None:
            raise ArgumentError("params is None, expected the parameters. Call update(grads, state, params=params).")
        if not inplace:
            return transform.update(updates, state, params)
        with torch.no_grad():
            new, state = transform.update(updates, state, params)
            return tree.map(lambda old, value: None if value is None else old.copy_(value), updates, new), state

    return _torchopt().base.GradientTransformation(transform.init, update)


def _torchopt() -> Any:
    """The module, or an error that says which extra brings it."""
    try:
        import torchopt
    except ImportError as error:
        raise MissingExtraError(
            "torchopt is not installed; it comes with the extra funcmeta[torchopt], on Python 3.11. "
            'Run pip install ".[torchopt]" in a checkout of funcmeta.'
        ) from error
    return torchopt
