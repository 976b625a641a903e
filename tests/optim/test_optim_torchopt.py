"""To and from torchopt: values agree, and its habit of writing in place stays outside."""

import sys
from collections.abc import Iterator

import pytest
import torch
from optim_cases import CASES, gradients, outer, run, start

from funcmeta import optim, tree
from funcmeta._errors import ArgumentError, MissingExtraError

torchopt = pytest.importorskip("torchopt")

PAIRS = {
    "sgd": (
        lambda: torchopt.sgd(0.1, momentum=0.6, weight_decay=0.1),
        lambda: optim.sgd(0.1, momentum=0.6, weight_decay=0.1),
    ),
    "adam": (lambda: torchopt.adam(0.05, eps=0.02), lambda: optim.adam(0.05, eps=0.02)),
    "adamax": (lambda: torchopt.adamax(0.05, eps=0.02), lambda: optim.adamax(0.05, eps=0.02)),
}


@pytest.fixture
def double() -> Iterator[None]:
    """torchopt computes its bias corrections in the default dtype, whatever that of the parameters."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", PAIRS)
def test_a_wrapped_transformation_gives_the_values_and_meta_gradients_of_its_namesake(name: str) -> None:
    theirs, ours = PAIRS[name]
    results = []
    for transform in (optim.from_torchopt(theirs()), ours()):
        params = {key: leaf.requires_grad_() for key, leaf in start().items()}
        final = run(transform, dict(params), 4)
        results.append((final, torch.autograd.grad(outer(final), list(params.values()))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_a_wrapped_transformation_does_not_write(name: str) -> None:
    transform, params = optim.from_torchopt(PAIRS[name][0]()), start()
    grads = {key: leaf.detach() for key, leaf in gradients(start(), 0).items()}
    _, state = transform.update(grads, transform.init(params), params)
    given = (grads, state, params)
    before = tree.map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, given)
    first = transform.update(*given)
    torch.testing.assert_close(given, before, rtol=0, atol=0)
    torch.testing.assert_close(transform.update(*given), first, rtol=0, atol=0)


def test_torchopt_itself_does_write() -> None:
    grads = {"w": torch.ones(1)}
    transformation = torchopt.sgd(0.5)
    transformation.update(grads, transformation.init(grads), params=grads)
    assert grads["w"].item() == -0.5


@pytest.mark.parametrize("name", ["adam", "sgd dampening", "lion"])
def test_torchopt_trains_with_our_transforms(name: str) -> None:
    transform = CASES[name].build()
    leaves = [leaf.clone().requires_grad_() for leaf in start().values()]
    optimizer = torchopt.Optimizer(leaves, optim.to_torchopt(transform))
    params = {key: leaf.clone() for key, leaf in start().items()}
    state = transform.init(params)
    for step in range(5):
        grads = {key: leaf.detach() for key, leaf in gradients(params, step).items()}
        for leaf, grad in zip(leaves, grads.values(), strict=True):
            leaf.grad = grad.clone()
        optimizer.step()
        params = {key: leaf.detach() for key, leaf in params.items()}
        updates, state = transform.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    torch.testing.assert_close([leaf.detach() for leaf in leaves], list(params.values()), rtol=1e-12, atol=1e-12)
    assert all(leaf.is_leaf for leaf in leaves)


def test_in_place_is_respected() -> None:
    transformation = optim.to_torchopt(optim.sgd(0.5, momentum=0.5, weight_decay=0.1))
    params = {"w": torch.ones(1, requires_grad=True)}
    grads, state = {"w": torch.ones(1)}, transformation.init(params)
    fresh, _ = transformation.update(grads, state, params=params, inplace=False)
    assert grads["w"].item() == 1.0
    assert fresh["w"].requires_grad
    written, new = transformation.update(grads, state, params=params)
    assert written["w"] is grads["w"]
    torch.testing.assert_close(grads, {"w": fresh["w"].detach()})
    assert not new.momentum_buffer["w"].requires_grad
    assert state.momentum_buffer["w"].item() == 0.0


def test_there_and_back() -> None:
    transform = optim.from_torchopt(optim.to_torchopt(optim.adam(0.1)))
    torch.testing.assert_close(run(transform, start(), 3), run(optim.adam(0.1), start(), 3))


def test_bad_arguments_say_what_to_do() -> None:
    with pytest.raises(ArgumentError, match=r"expected a torchopt GradientTransformation. Pass what torchopt.sgd"):
        optim.from_torchopt(optim.sgd(0.1))
    with pytest.raises(ArgumentError, match=r"expected a Transform.*wrap a torchopt transform by from_torchopt"):
        optim.to_torchopt(torchopt.sgd(0.1))
    with pytest.raises(ArgumentError, match=r"params is None.*params=params"):
        optim.to_torchopt(optim.sgd(0.1)).update({}, ())


def test_without_torchopt_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchopt", None)
    for function in (optim.from_torchopt, optim.to_torchopt):
        with pytest.raises(
            MissingExtraError, match=r"funcmeta\[torchopt\].*pip install \"\.\[torchopt\]\" in a checkout"
        ):
            function(optim.sgd(0.1))
