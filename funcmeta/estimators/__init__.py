"""Estimators: how the meta-gradient of an unroll is computed."""

from funcmeta.estimators._base import Estimator, Outcome, Primal
from funcmeta.estimators.first_order import FirstOrder
from funcmeta.estimators.reptile import Reptile
from funcmeta.estimators.reverse import Reverse

__all__ = ["Estimator", "FirstOrder", "Outcome", "Primal", "Reptile", "Reverse"]
