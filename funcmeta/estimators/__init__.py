"""Estimators: how the meta-gradient of an unroll is computed."""

from funcmeta.estimators._base import Estimator, Outcome, Particles, Primal
from funcmeta.estimators.evolution_strategies import EvolutionStrategies
from funcmeta.estimators.first_order import FirstOrder
from funcmeta.estimators.forward_mode import ForwardMode
from funcmeta.estimators.mixed_mode import MixedMode
from funcmeta.estimators.persistent_es import PersistentES
from funcmeta.estimators.reptile import Reptile
from funcmeta.estimators.reverse import Reverse
from funcmeta.estimators.truncated import Truncated

__all__ = [
    "Estimator",
    "EvolutionStrategies",
    "FirstOrder",
    "ForwardMode",
    "MixedMode",
    "Outcome",
    "Particles",
    "PersistentES",
    "Primal",
    "Reptile",
    "Reverse",
    "Truncated",
]
