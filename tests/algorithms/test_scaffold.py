"""The transforms around a learned optimizer, where a parameter has no gradient."""

import torch

import funcmeta as fm
from funcmeta.algorithms._scaffold import imitating, mismatch, rescaled


def test_a_parameter_without_a_gradient_stays() -> None:
    """The others move as if it were not there, and count alone in how far a pupil is from its teacher."""
    params = {"w": torch.ones(2).double(), "b": torch.full((3,), 2.0).double()}
    torch.manual_seed(0)
    transform = rescaled(imitating(fm.optim.sgd(0.3), fm.optim.adamw(0.1, weight_decay=0.5)), 1.0)
    state = transform.init(params)
    grads = {"w": torch.tensor([0.5, -1.0]).double(), "b": None}
    updates, after = transform.update(grads, state, params)
    moved = fm.apply_updates(params, updates)
    assert torch.equal(moved["b"], params["b"])
    alone = imitating(fm.optim.sgd(0.3), fm.optim.adamw(0.1, weight_decay=0.5))
    scale, own = state.scales["w"], {"w": params["w"] / state.scales["w"]}
    expected, other = alone.update({"w": grads["w"] * scale}, alone.init(own), own)
    torch.testing.assert_close(updates["w"], expected["w"] * scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(mismatch(after), mismatch(other), rtol=1e-12, atol=0)
    assert mismatch(after) > 0
