"""A module as a recipe: how to build it again around other tensors, as often as wanted, and what a call changed in it.

The objects that a module refers to are walked once. What can change, and what refers to something that is built anew,
is built anew for each copy: modules, containers, plain objects, functions that close over them. The rest is shared. So
nothing that one call keeps reaches another call or thread, and a second way to a tensor (a list, a closure, a hook)
leads to the tensor of this call.
"""

import operator
import types
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcmeta._errors import ArgumentError
from funcmeta._structure_walk import Walk
from funcmeta._writes import storage, unwrapped

_LARGE = 4096
"""From this many entries on, only their number tells whether a container has changed."""


class Change(NamedTuple):
    """An attribute that a call left different from what it was."""

    path: str
    place: int | None = None
    """The place of the registered tensor whose name now holds something else, if it is one."""
    value: Any = None
    """What it now holds."""
    final: bool = False
    """Whether the next copy has it too, because what changed cannot be copied."""


class Copy(NamedTuple):
    """One copy: its objects by place, what each container held at first, and the kept tensors made for it alone."""

    objects: list[Any]
    held: list[tuple[Any, list[Any]]]
    own: dict[str, Tensor]


class Structure:
    """The recipe of an object that refers to tensors; it keeps neither the object nor these tensors.

    Args:
        module: the object.
        extra: further objects that refer to it, of which a copy has copies too.
        tensors: the tensors that each copy gets anew, by name.
        title: what to call the module in a message.
        again: whether the module is itself a copy, so that what it shares may be shared.
        fill: whether a call may fill the containers of modules that are empty (hooks); if not, it raises ``Filled``.

    Raises:
        ArgumentError: something that refers to these tensors cannot be built again.
    """

    def __init__(
        self,
        module: nn.Module,
        extra: Any,
        tensors: Mapping[str, Tensor],
        title: str,
        *,
        again: bool = False,
        fill: bool = False,
    ) -> None:
        walk = Walk(tensors, title, clone=not again, fill=fill)
        try:
            with torch._C.DisableTorchFunction():
                self._root, self._extra = walk.place(module, ""), walk.place(extra, "the hooks on parameters")
        except RecursionError as error:
            raise ArgumentError(
                f"{title} cannot be copied: the objects that it refers to are nested too deeply. Let it hold less."
            ) from error
        self._modules = walk.modules()
        walk.finish()
        self.kept = {path: tensor for path, _, tensor in walk.kept}
        self.captured = walk.captured
        """Tensors that are held without being registered, by the way to them."""
        self.second = walk.second
        """A second way to a tensor outside of ``_parameters`` and ``_buffers``, by the place of the tensor."""
        self._registered = walk.registered
        self._kept_places = {path: place for path, place, _ in walk.kept}
        self._shells, self._made, self._fills = walk.shells, walk.made, walk.fills
        self._copied, self._iterators = walk.copied, walk.iterators
        self._empty = [None] * len(walk.made)

    def build(self, tensors: Sequence[Tensor], own: frozenset[str] = frozenset()) -> Copy:
        """A copy around these tensors, in the order of the names, and around clones of the kept ones in ``own``."""
        objects = [*tensors, *[make() for make in self._shells], *self._empty]
        clones = {path: tensor.clone() for path, tensor in self.kept.items() if path in own}
        for path, tensor in clones.items():
            objects[self._kept_places[path]] = tensor
        for place, make in self._made:
            objects[place] = make(objects)
        return Copy(objects, [fill(objects) for _, fill in self._fills], clones)

    def root(self, copy: Copy) -> Any:
        """The copy of the module."""
        return copy.objects[self._root]  # type: ignore[index]

    def extra(self, copy: Copy) -> Any:
        """The copy of the further objects."""
        return None if self._extra is None else copy.objects[self._extra]

    def modules(self, copy: Copy) -> list[nn.Module]:
        """All modules of a copy."""
        return [copy.objects[place] for place in self._modules]

    def put_back(self, copy: Copy, tensors: Sequence[Tensor]) -> None:
        """Give the registered tensors of a copy these values, and leave everything else as a call left it."""
        for old, new in zip(copy.objects, tensors, strict=False):
            if not new.requires_grad and storage(old) != storage(new):
                old.copy_(new)
        for place, owner, key in self._registered:
            copy.objects[owner][key] = copy.objects[place]

    def clear(self, copy: Copy) -> None:
        """Take the copy apart."""
        for place in self._modules:
            vars(copy.objects[place]).clear()
        for each in copy.objects:
            if isinstance(each, dict | list | set | deque):
                each.clear()
            elif isinstance(each, types.CellType):
                del each.cell_contents
        copy.objects.clear()
        copy.held.clear()

    def changes(self, copy: Copy) -> list[Change]:
        """What differs in the copy from what it was at first; tensors that it got are its own affair."""
        found = [
            Change(path, place, value)
            for (names, _), (container, values) in zip(self._fills, copy.held, strict=True)
            if len(container) != len(values) or (len(values) < _LARGE and not all(map(operator.is_, container, values)))
            for path, place, value in names.changed(container, values)
        ]
        found += [Change(path) for path, place, state, before in self._copied if state(copy.objects[place]) != before]
        found += [Change(path, final=True) for path, state, before in self._iterators if state() != before]
        return found + [Change(path) for path, own in copy.own.items() if distance(tensors_in(own), [self.kept[path]])]


def tensors_in(value: Any, depth: int = 8) -> list[Tensor]:
    """The tensors and numbers in what a module returned, whatever holds them, detached and as plain tensors."""
    if isinstance(value, Tensor):
        return [unwrapped(value.detach())]
    if isinstance(value, int | float):
        return [torch.tensor(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, list | tuple):
        value = list(vars(value).values())
    if depth == 0 or not isinstance(value, list | tuple):
        return []
    return [tensor for each in value for tensor in tensors_in(each, depth - 1)]


def distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest difference of two entries; infinite when the shapes differ. A NaN equals another one."""
    if [each.shape for each in left] != [each.shape for each in right]:
        return float("inf")
    largest = 0.0
    for one, other in zip(left, right, strict=True):
        if one.is_meta or not one.numel() or bool(((one == other) | (one != one) & (other != other)).all()):
            continue
        gap = (one - other).abs().max() if one.is_floating_point() or one.is_complex() else torch.tensor(1.0)
        largest = max(largest, float("inf") if gap.isnan() else float(gap))
    return largest
