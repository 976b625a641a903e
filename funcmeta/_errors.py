"""Every error the library raises on purpose. A message says what came, what was expected, and what to do."""

from collections.abc import Iterable


class FuncmetaError(Exception):
    """Base of every error raised by funcmeta, so that one ``except`` can catch them all."""


class ArgumentError(FuncmetaError, ValueError):
    """An argument has a value or a type that the function can not work with."""


class StructureError(FuncmetaError, ValueError):
    """Two trees that must agree differ in keys, shapes, dtypes or devices."""


class LossError(FuncmetaError, ValueError):
    """A loss is not a scalar floating-point tensor."""


class NonFiniteError(FuncmetaError, ArithmeticError):
    """A loss is NaN or infinite."""


class GraphError(FuncmetaError, RuntimeError):
    """The autograd graph does not carry the derivative that the estimator promises."""


class DetachedError(GraphError):
    """A loss does not depend on what it has to be differentiated by, or a compiled loss hides how it does."""


class CapturedTensorError(GraphError):
    """A tensor that requires grad is used without having been passed in ``meta``."""


class UnreachedLeafError(GraphError):
    """A leaf of ``meta`` requires grad but the loss does not depend on it; ``leaves`` holds the names."""

    def __init__(self, leaves: Iterable[str], advice: str) -> None:
        self.leaves = tuple(leaves)
        super().__init__(
            f"No gradient reaches {', '.join(self.leaves)}, which requires grad: "
            f"the loss does not depend on it. {advice}"
        )


class ReplayError(FuncmetaError, RuntimeError):
    """A step that was run again gave something else than the first time."""


class DataError(FuncmetaError, ValueError):
    """A file or folder is missing, truncated, foreign or of an unexpected size."""


class MissingExtraError(FuncmetaError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
