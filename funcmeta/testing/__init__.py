"""Checks for users as well as for this library: finite differences, meta-gradients, tolerances."""

from funcmeta._live_bytes import LiveBytes
from funcmeta.testing import mutants, strategies
from funcmeta.testing._differences import Derivative, finite_difference
from funcmeta.testing._failures import CheckError, MetaGradientMismatch, VacuousCheckWarning
from funcmeta.testing._meta_gradient import MetaGradientCheck, check_meta_grad
from funcmeta.testing._tolerances import TOLERANCES, Tolerances
from funcmeta.testing._transform import check_transform

__all__ = [
    "TOLERANCES",
    "CheckError",
    "Derivative",
    "LiveBytes",
    "MetaGradientCheck",
    "MetaGradientMismatch",
    "Tolerances",
    "VacuousCheckWarning",
    "check_meta_grad",
    "check_transform",
    "finite_difference",
    "mutants",
    "strategies",
]
