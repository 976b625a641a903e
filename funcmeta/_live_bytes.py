"""How many bytes of tensors are alive at once, counted where they are made."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from funcmeta import tree


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside this mode the bytes of all tensors that come to life are counted until they die.

    A storage counts once, however many views it has, and what a graph saves counts as long as the graph lives. Tensors
    made before do not count. What a kernel allocates is not seen, so a problem made by ``compile`` runs its recorded
    operations one by one inside the mode. Operations take many times longer there.

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


def counting() -> bool:
    """Whether bytes are counted here, which kernels would escape."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        isinstance(mode, LiveBytes) for mode in _get_current_dispatch_mode_stack()
    )


def uncounted() -> AbstractContextManager[Any]:
    """Inside the block no bytes are counted."""
    return _disable_current_modes() if counting() else nullcontext()


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
    """The tensors that take room: not sparse ones, whose parts count where they are made, nor those without data."""
    return [leaf for leaf in tree.tensors(value) if leaf.layout is torch.strided and not leaf.is_meta]


def storage_key(tensor: Tensor) -> int:
    """What tells the storages apart that are alive."""
    return int(tensor.untyped_storage()._cdata)
