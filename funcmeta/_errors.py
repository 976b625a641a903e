"""Every error the library raises on purpose. A message says what came, what was expected, and what to do."""

from collections.abc import Iterable
from typing import Self


class FuncmetaError(Exception):
    """Base of every error raised by funcmeta, so that one ``except`` can catch them all.

    Examples:
        >>> issubclass(ArgumentError, FuncmetaError)
        True

    Source: this library.
    """


class ArgumentError(FuncmetaError, ValueError):
    """An argument has a value or a type that the function cannot work with.

    Examples:
        >>> issubclass(ArgumentError, ValueError)
        True

    Source: this library.
    """


class StructureError(FuncmetaError, ValueError):
    """Two trees that must agree differ in keys, shapes, dtypes or devices.

    Examples:
        >>> issubclass(StructureError, ValueError)
        True

    Source: this library.
    """


class LossError(FuncmetaError, ValueError):
    """A loss is not a scalar floating-point tensor.

    Examples:
        >>> issubclass(LossError, ValueError)
        True

    Source: this library.
    """


class NonFiniteError(FuncmetaError, ArithmeticError):
    """A loss is NaN or infinite.

    Examples:
        >>> issubclass(NonFiniteError, ArithmeticError)
        True

    Source: this library.
    """


class GraphError(FuncmetaError, RuntimeError):
    """The autograd graph does not carry the derivative that the estimator promises.

    Examples:
        >>> issubclass(GraphError, RuntimeError)
        True

    Source: this library.
    """


class DetachedError(GraphError):
    """A loss does not depend on what it has to be differentiated by, or a compiled loss hides how it does.

    Examples:
        >>> issubclass(DetachedError, GraphError)
        True

    Source: this library.
    """


class CapturedTensorError(GraphError):
    """A tensor that requires grad is used without having been passed in ``meta``.

    Examples:
        >>> issubclass(CapturedTensorError, GraphError)
        True

    Source: this library.
    """


class UnreachedLeafError(GraphError):
    """A leaf of ``meta`` requires grad but the loss does not depend on it.

    Args:
        leaves: the names of the leaves, kept as ``error.leaves``.
        advice: what to do about it.

    Examples:
        >>> UnreachedLeafError(["meta['lr']"], "Use it.").leaves
        ("meta['lr']",)

    Source: this library.
    """

    def __init__(self, leaves: Iterable[str], advice: str) -> None:
        self.leaves, self.advice = tuple(leaves), advice
        super().__init__(
            f"No gradient reaches {', '.join(self.leaves)}, which requires grad: "
            f"the loss does not depend on it. {advice}"
        )

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[str, ...], str]]:
        """How to make the error again in another process."""
        return type(self), (self.leaves, self.advice)


class ReplayError(FuncmetaError, RuntimeError):
    """A step that was run again gave something else than the first time.

    Examples:
        >>> issubclass(ReplayError, RuntimeError)
        True

    Source: this library.
    """


class CompileError(FuncmetaError, RuntimeError):
    """A function cannot be compiled, or would not compute the same when compiled.

    Examples:
        >>> issubclass(CompileError, RuntimeError)
        True

    Source: this library.
    """


class MemoryBudgetError(FuncmetaError, RuntimeError):
    """No memory policy stays within the budget that was given.

    Args:
        given: the budget in bytes.
        smallest: the smallest budget that would do, in bytes; kept as ``error.smallest``.

    Examples:
        >>> MemoryBudgetError(1_000, 64_000).smallest
        64000

    Source: this library.
    """

    def __init__(self, given: int, smallest: int) -> None:
        self.given, self.smallest = given, smallest
        super().__init__(
            f"No memory policy stays within the budget of {given} bytes. The smallest budget that would do is "
            f"{smallest} bytes ({smallest / 1e6:.2f} MB), by the policy that keeps least. Pass budget({smallest}) or "
            f"more, make batches smaller, or, where windows or tasks are alive at once, take fewer of them."
        )

    def __reduce__(self) -> tuple[type[Self], tuple[int, int]]:
        """How to make the error again in another process."""
        return type(self), (self.given, self.smallest)


class DataError(FuncmetaError, ValueError):
    """A file or folder is missing, truncated, foreign or of an unexpected size.

    Examples:
        >>> issubclass(DataError, ValueError)
        True

    Source: this library.
    """


class SaveError(FuncmetaError, OSError):
    """A file of a run could not be written; what was saved before is whole.

    Examples:
        >>> issubclass(SaveError, OSError)
        True

    Source: this library.
    """


class DivergenceError(FuncmetaError, ArithmeticError):
    """Meta-training was told to stop where a meta-gradient is not finite or too large.

    Examples:
        >>> issubclass(DivergenceError, ArithmeticError)
        True

    Source: this library.
    """


class LostProcessError(FuncmetaError, RuntimeError):
    """One of the processes that train together does not answer any more.

    Examples:
        >>> issubclass(LostProcessError, RuntimeError)
        True

    Source: this library.
    """


class MissingExtraError(FuncmetaError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it.

    Examples:
        >>> issubclass(MissingExtraError, ImportError)
        True

    Source: this library.
    """


class FallbackWarning(UserWarning):
    """Something was computed in another way than asked for; the result is as exact.

    Examples:
        >>> issubclass(FallbackWarning, UserWarning)
        True

    Source: this library.
    """


class NonFiniteWarning(UserWarning):
    """A loss became NaN or infinite, and what depended on it was skipped, as was asked for.

    Examples:
        >>> issubclass(NonFiniteWarning, UserWarning)
        True

    Source: this library.
    """
