"""How many bytes of tensors are alive at once, counted where they are made."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcmeta import tree


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside this mode the bytes of all tensors that come to life are counted until they die.

    A storage counts once, however many views it has, and what a graph saves counts as long as the graph lives. Tensors
    made before do not count. What a kernel takes and gives back by itself is not seen. Operations take many times
    longer inside the mode.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once; it may be set back to ``live`` between two parts of a computation.
        storages: bytes of each storage alive now, by its address.

    Examples:
        >>> with LiveBytes() as counter:
        ...     a = torch.zeros(1000)
        ...     b = a.sin().exp()
        >>> counter.live, counter.peak
        (8000, 12000)

    Source: this library, over ``torch.utils._python_dispatch``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count the storages that it made."""
        given = {storage_key(leaf) for leaf in _stored((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in _stored(result):
            if storage_key(leaf) not in given and storage_key(leaf) not in self.storages:
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.storages[key] = size
        self.live += size
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self.storages.pop(key)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that were in use on the device during the run, above those in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with LiveBytes() as live:
        run()
    return int(live.peak)


def bytes_of(value: Any, besides: Any = ()) -> int:
    """The bytes of the storages of a tree's tensors, each counted once, that hold no tensor of another tree."""
    known = {storage_key(leaf) for leaf in _stored(besides)}
    sizes = {storage_key(leaf): leaf.untyped_storage().nbytes() for leaf in _stored(value)}
    return sum(size for key, size in sizes.items() if key not in known)


def _stored(value: Any) -> list[Tensor]:
    """The tensors that have a storage: not the sparse ones, whose parts count where they are made."""
    return [leaf for leaf in tree.tensors(value) if leaf.layout is torch.strided]


def storage_key(tensor: Tensor) -> int:
    """What tells the storages apart that are alive."""
    return int(tensor.untyped_storage()._cdata)
