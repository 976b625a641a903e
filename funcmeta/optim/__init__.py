"""Inner optimizers: pure, differentiable in every hyper-parameter, over any tree of tensors."""

from funcmeta.optim._transform import Transform, apply_updates, chain, masked
from funcmeta.optim.adam import adam
from funcmeta.optim.sgd import sgd

__all__ = ["Transform", "adam", "apply_updates", "chain", "masked", "sgd"]
