"""Optimizers that are learned: small networks from gradients to updates, shared over coordinates."""

from funcmeta.learned._coordinatewise import Coordinatewise
from funcmeta.learned._file import load, save
from funcmeta.learned._gates import gates
from funcmeta.learned._hierarchical import hierarchical
from funcmeta.learned._hyperparameters import hyperparameters
from funcmeta.learned._linear import linear
from funcmeta.learned._lstm import lstm
from funcmeta.learned._mlp import mlp
from funcmeta.learned._optimizer import LearnedOptimizer, as_transform
from funcmeta.learned._pretrained import pretrained
from funcmeta.learned._rnnprop import rnnprop
from funcmeta.learned._torch_optim import TorchOptimizer

__all__ = [
    "Coordinatewise",
    "LearnedOptimizer",
    "TorchOptimizer",
    "as_transform",
    "gates",
    "hierarchical",
    "hyperparameters",
    "linear",
    "load",
    "lstm",
    "mlp",
    "pretrained",
    "rnnprop",
    "save",
]
