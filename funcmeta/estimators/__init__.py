"""Estimators: how the meta-gradient of an unroll is computed."""

from funcmeta.estimators._base import Estimator, Outcome, Primal
from funcmeta.estimators.first_order import FirstOrder
from funcmeta.estimators.forward_mode import ForwardMode
from funcmeta.estimators.mixed_mode import MixedMode
from funcmeta.estimators.reptile import Reptile
from funcmeta.estimators.reverse import Reverse

__all__ = ["Estimator", "FirstOrder", "ForwardMode", "MixedMode", "Outcome", "Primal", "Reptile", "Reverse"]
