"""Algorithms: one module each, with ``build(...) -> Algorithm(init, loss, adapt)``."""

from funcmeta.algorithms import anil, dynamic_lm, l2l, maml, meta_lstm, meta_sgd, reptile
from funcmeta.algorithms._algorithm import Algorithm

__all__ = ["Algorithm", "anil", "dynamic_lm", "l2l", "maml", "meta_lstm", "meta_sgd", "reptile"]
