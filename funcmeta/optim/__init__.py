"""Inner optimizers: pure, differentiable in every hyper-parameter, over any tree of tensors.

Each function here returns a `Transform`. A hyper-parameter is one of

- a number, whose range is checked at once;
- a floating-point tensor, 0-d or broadcastable to each parameter; differentiable, its values are not checked;
- a tree like the parameters, of numbers and tensors: one value for each parameter, or for each of its entries;
- a callable of the step, a 0-d int64 tensor that counts from 0 (see `schedules`); it returns any of the above.

A parameter whose gradient is None stays as it is, and so does what the state keeps for it. States are NamedTuples of
trees of tensors, whose fields have torch.optim's names; ``step`` counts the steps of the optimizer, ``missed`` in how
many of them each parameter had no gradient, where torch.optim has a count for each. Updates and states keep the dtype
of the parameters, whatever the dtype of the hyper-parameters; bias corrections are computed in double precision.
"""

from funcmeta.optim import schedules
from funcmeta.optim._adadelta import adadelta
from funcmeta.optim._adagrad import adagrad
from funcmeta.optim._adam import adam, adamw, amsgrad
from funcmeta.optim._adamax import adamax
from funcmeta.optim._gradients import add_weight_decay, clip_by_global_norm, clip_by_norm, clip_by_value, scale
from funcmeta.optim._lion import lion
from funcmeta.optim._nadam import nadam
from funcmeta.optim._radam import radam
from funcmeta.optim._rmsprop import rmsprop
from funcmeta.optim._sgd import sgd
from funcmeta.optim._torch_optim import from_torch_optim_state, to_torch_optim_state
from funcmeta.optim._torchopt import from_torchopt, to_torchopt
from funcmeta.optim._transform import Transform, advance, apply_updates, chain, masked

__all__ = [
    "Transform",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "add_weight_decay",
    "advance",
    "amsgrad",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "from_torch_optim_state",
    "from_torchopt",
    "lion",
    "masked",
    "nadam",
    "radam",
    "rmsprop",
    "scale",
    "schedules",
    "sgd",
    "to_torch_optim_state",
    "to_torchopt",
]
