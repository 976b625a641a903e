"""What the checks raise, assertion errors, so that a test fails with their message; and what they warn of."""

from funcmeta._errors import FuncmetaError


class CheckError(FuncmetaError, AssertionError):
    """A check of ``funcmeta.testing`` does not hold.

    Examples:
        >>> issubclass(CheckError, AssertionError)
        True

    Source: this library.
    """


class MetaGradientMismatch(CheckError):
    """A meta-gradient differs from finite differences.

    Examples:
        >>> issubclass(MetaGradientMismatch, CheckError)
        True

    Source: this library.
    """


class VacuousCheckWarning(UserWarning):
    """A check passes, but the first-order meta-gradient would have passed it too.

    Examples:
        >>> issubclass(VacuousCheckWarning, UserWarning)
        True

    Source: this library.
    """
