"""Trees of tensors: the few operations the library needs, over ``torch.utils._pytree``.

Every other module goes through here, so that one file knows where torch keeps its pytrees.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcmeta._errors import StructureError
from funcmeta._typing import Tree

Spec = pytree.TreeSpec


class Hole:
    """Where a tensor was in a tree that keeps none."""


HOLE = Hole()

_SINGLE = frozenset({Hole, Tensor, torch.nn.Parameter, int, float, bool, str, bytes, type(None)})
"""Types that are leaves for certain: most leaves need no look into torch's registry."""


def flatten(tree: Tree) -> tuple[list[Any], Spec]:
    """The leaves of a tree, left to right, and what is needed to put them back."""
    return pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], spec: Spec) -> Tree:
    """The tree of the given structure with the given leaves."""
    return pytree.tree_unflatten(leaves, spec)


def leaves(tree: Tree) -> list[Any]:
    """The leaves of a tree, left to right."""
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(tree: Tree, found: list[Any]) -> None:
    kind = type(tree)
    if kind in _SINGLE:
        found.append(tree)
    elif kind is dict:
        for each in tree.values():
            _collect(each, found)
    elif kind is tuple or kind is list or _is_namedtuple(kind):
        for each in tree:
            _collect(each, found)
    else:
        found.extend(pytree.tree_leaves(tree))


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields") and kind not in pytree.SUPPORTED_NODES


def tensors(tree: Tree) -> list[Tensor]:
    """The tensors among the leaves of a tree, left to right."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def like(tree: Tree, leaves: Iterable[Any]) -> Tree:
    """A tree of the same structure with other leaves, given left to right."""
    following = iter(leaves)
    return _rebuild(lambda _: next(following), tree)


def hollow(tree: Tree) -> Tree:
    """The same tree with a hole for every tensor."""
    return _rebuild(lambda leaf: HOLE if isinstance(leaf, Tensor) else leaf, tree)


def filled(hollow: Tree, tensors: Iterable[Tensor]) -> Tree:
    """A hollow tree with these tensors in its holes."""
    following = iter(tensors)
    return _rebuild(lambda leaf: next(following) if leaf is HOLE else leaf, hollow)


def opened(value: Any) -> tuple[list[Any], Any] | None:
    """The parts of a container that torch knows, and what it is besides (keys, a factory); None for a leaf."""
    node = pytree.SUPPORTED_NODES.get(type(value))
    return None if node is None else node.flatten_fn(value)


def named_leaves(tree: Tree, name: str = "") -> list[tuple[str, Any]]:
    """Each leaf with the expression that reaches it: ``("meta['params']['0.weight']", tensor)``."""
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return [(name + pytree.keystr(path), leaf) for path, leaf in pairs]


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply ``fn`` to each leaf of ``tree`` and the leaves at the same place of ``rest``."""
    if not rest:
        return _rebuild(fn, tree)
    columns = [leaves(tree), *[aligned(tree, other) for other in rest]]
    return like(tree, [fn(*row) for row in zip(*columns, strict=True)])


def _rebuild(fn: Callable[[Any], Any], tree: Tree) -> Tree:
    kind = type(tree)
    if kind in _SINGLE:
        return fn(tree)
    if kind is dict:
        return {key: _rebuild(fn, each) for key, each in tree.items()}
    if kind is list:
        return [_rebuild(fn, each) for each in tree]
    if kind is tuple:
        return tuple([_rebuild(fn, each) for each in tree])
    if _is_namedtuple(kind):
        return kind(*[_rebuild(fn, each) for each in tree])
    return pytree.tree_map(fn, tree)


def aligned(expected: Tree, got: Tree, *, name: str = "tree", advice: str = "") -> list[Any]:
    """The leaves of ``got`` in the order of ``expected``; ``StructureError`` unless both have the same keys.

    Dicts agree when their keys do, in whatever order these were inserted.
    """
    have: list[Any] = []
    if _collect_along(expected, got, have):
        return have
    wanted = [path for path, _ in named_leaves(expected, name)]
    named = dict(named_leaves(got, name))
    missing = [path for path in wanted if path not in named]
    unexpected = [path for path in named if path not in set(wanted)]
    if missing or unexpected:
        raise StructureError(
            f"{name} has other keys than expected: missing {_some(missing) or 'nothing'}, "
            f"unexpected {_some(unexpected) or 'nothing'}. {advice or 'Pass a tree with exactly the expected keys.'}"
        )
    return [named[path] for path in wanted]


def _collect_along(expected: Tree, got: Tree, found: list[Any]) -> bool:
    """Collect the leaves of ``got``; False as soon as the containers are not obviously the same."""
    kind = type(expected)
    if kind in _SINGLE:
        found.append(got)
        return type(got) in _SINGLE
    if type(got) is not kind:
        return False
    if kind is dict:
        return expected.keys() == got.keys() and all(
            _collect_along(each, got[key], found) for key, each in expected.items()
        )
    if kind is tuple or kind is list or _is_namedtuple(kind):
        return len(expected) == len(got) and all(
            _collect_along(*pair, found) for pair in zip(expected, got, strict=True)
        )
    return False


def check_same(expected: Tree, got: Tree, *, name: str = "tree", advice: str = "") -> None:
    """Raise ``StructureError`` unless both trees agree in keys and, leaf by leaf, in shape, dtype and device."""
    if _agree(expected, got):
        return
    wanted = leaves(expected)
    for index, (want, have) in enumerate(zip(wanted, aligned(expected, got, name=name, advice=advice), strict=True)):
        if not isinstance(want, Tensor) or not isinstance(have, Tensor):
            same = type(want) is type(have)
        else:
            same = want.shape == have.shape and want.dtype == have.dtype and want.device == have.device
        if not same:
            path = named_leaves(expected, name)[index][0]
            raise StructureError(f"{path} is {describe(have)}, expected {describe(want)}. {advice}".rstrip())


def _agree(expected: Tree, got: Tree) -> bool:
    """Whether two trees agree, seen at a glance; if not, it takes a longer look to tell."""
    kind = type(expected)
    if expected is got:
        return True
    if type(got) is not kind:
        return False
    if kind is Tensor or kind is torch.nn.Parameter:
        shapes_agree: bool = expected.shape == got.shape and expected.dtype is got.dtype
        return shapes_agree and expected.device == got.device
    if kind is dict:
        return expected.keys() == got.keys() and all(_agree(each, got[key]) for key, each in expected.items())
    if kind is tuple or kind is list or _is_namedtuple(kind):
        return len(expected) == len(got) and all(_agree(*pair) for pair in zip(expected, got, strict=True))
    return kind in _SINGLE


def detach(tree: Tree) -> Tree:
    """The same tree with every tensor detached; other leaves pass."""
    return map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def nudged(tree: Tree, units: int) -> Tree:
    """The tree, its numbers changed by some units in the last place; a function of the step gives such trees."""

    def leaf(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return (lambda step: nudged(each(step), units)) if callable(each) else each
        if not each.is_floating_point() or each.layout is not torch.strided:
            return each
        exact = torch.float64 if each.dtype is torch.float64 else torch.float32  # in which 1 + eps is not 1
        places = 1 + torch.arange(each.numel(), dtype=exact, device=each.device) % 3
        by = 1 + units * torch.finfo(each.dtype).eps * places
        moved = each.detach() * by.to(each.dtype).reshape(each.shape)
        return moved.requires_grad_() if each.requires_grad else moved

    return map(leaf, tree)


def describe(leaf: Any) -> str:
    """A leaf in words for an error message: ``float32[3, 4] on cpu``."""
    if isinstance(leaf, Tensor):
        layout = "" if leaf.layout is torch.strided else f"{str(leaf.layout).removeprefix('torch.')} "
        return f"{layout}{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"
    return f"{leaf!r} ({type(leaf).__name__})"


def check_tensors(tree: Tree, *, name: str) -> None:
    """Raise ``StructureError`` unless every leaf is a tensor."""
    for index, leaf in enumerate(leaves(tree)):
        if not isinstance(leaf, Tensor):
            path = named_leaves(tree, name)[index][0]
            raise StructureError(f"{path} is {describe(leaf)}, expected a tensor. Wrap numbers in torch.tensor(...).")


def dot(left: Tree, right: Tree) -> Tensor:
    """The inner product Σ left·right over all coordinates of all leaves, a 0-d tensor."""
    products = [(a * b).sum() for a, b in zip(leaves(left), aligned(left, right), strict=True)]
    return torch.stack(products).sum() if products else torch.zeros(())


def norm(tree: Tree) -> Tensor:
    """The Euclidean norm over all coordinates of all leaves, a 0-d tensor."""
    norms = [torch.linalg.vector_norm(leaf) for leaf in leaves(tree)]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def is_flat(tree: Tree) -> bool:
    """Whether this is a dict of tensors, as parameters are, which needs no specs to be mapped."""
    return type(tree) is dict and all(isinstance(leaf, Tensor) for leaf in tree.values())


def _some(paths: Sequence[str], most: int = 5) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")
