"""What surrounds a computation and has to be the same when it is run again."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class Autocast:
    """Autocast as it is now, for each kind of device among some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        kinds = sorted({tensor.device.type for tensor in tensors})
        self._options: list[dict[str, Any]] = [
            {"device_type": kind, "enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
            for kind in kinds
        ]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal settings."""
        return tuple([tuple(each.values()) for each in self._options if each["enabled"]])

    @property
    def dtypes(self) -> list[torch.dtype]:
        """What is computed in on devices where autocast is on."""
        return [each["dtype"] for each in self._options if each["enabled"]]

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same inside the block."""
        with ExitStack() as stack:
            for each in self._options:
                stack.enter_context(torch.autocast(**each))
            yield
