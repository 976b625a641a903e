"""Bad inputs to public functions: the type of the error, what it says came, and what it says to do."""

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcmeta as fm
from funcmeta import _errors, optim, rng, tasks
from funcmeta._duals import TangentError

NET = nn.Linear(2, 1)


def summed(meta: Any, predict: Any, batch: Any) -> torch.Tensor:
    return predict(batch[0]).sum()


X, Y = torch.ones(4, 2), torch.zeros(4, 1)
TASK = fm.Task((X, Y), (X, Y))
PARAMS = {"w": torch.ones(2), "b": torch.ones(1)}
OUTSIDE = torch.tensor(2.0, requires_grad=True)
Step = Callable[..., Any]


def mse(meta: Any, predict: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((predict(x) - y) ** 2).mean()


def meta() -> dict[str, Any]:
    return {"params": fm.init_params(NET), "lr": torch.tensor(0.1, requires_grad=True)}


def problem(loss: Any = mse, **options: Any) -> fm.Problem:
    return fm.inner_problem(NET, loss, optimizer=lambda meta: optim.sgd(meta["lr"]), **options)


def unroll(**changes: Any) -> Any:
    arguments = {"problem": problem(), "meta": meta(), "task": TASK, "steps": 2} | changes
    return fm.unroll(arguments.pop("problem"), arguments.pop("meta"), arguments.pop("task"), **arguments)


def backward(**changes: Any) -> None:
    unroll(**changes).loss.backward()


def by_hand(step: Step, judge: Any = lambda meta, w, query, seed: (w**2).sum(), **changes: Any) -> Any:
    """Unroll a hand-written step on one vector."""
    own = fm.Problem(lambda meta, task, seed: meta["w"] * 1, step, judge)
    return unroll(problem=own, meta={"w": torch.ones(2, requires_grad=True)}, **changes)


def descend(loss: Callable[[Tensor], Any]) -> Step:
    def step(meta: Any, w: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
        value, gradient = fm.value_and_grad(loss)(w)
        return w - 0.1 * gradient, fm.StepInfo(value)

    return step


def square(w: Tensor) -> Tensor:
    return (w**2).sum()


def uses_autograd(meta: Any, w: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
    loss = square(w)
    return w - 0.1 * torch.autograd.grad(loss, w, create_graph=True)[0], fm.StepInfo(loss)


def changes_shape(meta: Any, w: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
    return torch.cat([w, w]), fm.StepInfo(square(w))


def changes_dtype(meta: Any, w: Tensor, batch: Any, seed: int) -> tuple[Tensor, fm.StepInfo]:
    return w.double(), fm.StepInfo(square(w))


def changing_support() -> Callable[[int], Any]:
    return lambda step: (torch.rand(4, 2), Y)


def forgetful() -> Step:
    """A step that is another function each time it runs."""
    count = iter(range(1, 100))
    return descend(lambda w: square(w) * next(count))


class Owner(Exception):
    """What Python cannot make without its constructor."""


class Lonely(nn.Module):
    """Is known to something that cannot be built again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.kept = Owner(self)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str, str]] = {
    "functionalize a function": (
        lambda: fm.functionalize(len),
        fm.ArgumentError,
        "module is a builtin_function_or_method, expected a torch.nn.Module",
        "Wrap it in one",
    ),
    "functionalize a lazy module": (
        lambda: fm.functionalize(nn.LazyLinear(2)),
        fm.ArgumentError,
        "'weight' is not initialized yet (a lazy module)",
        "Run the module once on an input",
    ),
    "functionalize without parameters": (
        lambda: fm.functionalize(nn.ReLU()),
        fm.ArgumentError,
        "ReLU has no parameter that requires grad",
        "Call requires_grad_()",
    ),
    "functionalize what cannot be copied": (
        lambda: fm.functionalize(Lonely()),
        fm.ArgumentError,
        "Lonely cannot be copied: 'kept' is of type Owner, which refers to the module",
        "Keep it outside of the module",
    ),
    "init_params of a frozen module": (
        lambda: fm.init_params(nn.Linear(1, 1).requires_grad_(False)),
        fm.ArgumentError,
        "Linear has no parameter that requires grad",
        "Call requires_grad_()",
    ),
    "call a model without a parameter": (
        lambda: fm.functionalize(NET)[0]({"weight": torch.ones(1, 2)}, {}, X),
        fm.StructureError,
        "params lacks ['bias'] and has unexpected []",
        "Pass all of them and no others",
    ),
    "call a model with a foreign buffer": (
        lambda: fm.functionalize(NET)[0](fm.init_params(NET), {"mean": torch.ones(1)}, X),
        fm.StructureError,
        "buffers lacks [] and has unexpected ['mean']",
        "Pass all of them and no others",
    ),
    "call a model with a wrong shape": (
        lambda: fm.functionalize(NET)[0]({"weight": torch.ones(2, 2), "bias": torch.ones(1)}, {}, X),
        fm.StructureError,
        "params['weight'] has shape [2, 2], expected [1, 2]",
        "Start from init_params(module)",
    ),
    "sgd with a negative rate": (
        lambda: optim.sgd(-0.1),
        fm.ArgumentError,
        "lr is -0.1, expected a number at least 0",
        "Pass such a number, or a tensor",
    ),
    "sgd with a word": (
        lambda: optim.sgd("fast"),
        fm.ArgumentError,
        "'fast' (str), expected a number",
        "or a callable of the step",
    ),
    "sgd with an integer tensor": (
        lambda: optim.sgd(torch.tensor(1)),
        fm.StructureError,
        "int64[] on cpu, expected a dense floating-point tensor",
        "Convert it by .float()",
    ),
    "nesterov without momentum": (
        lambda: optim.sgd(0.1, nesterov=True),
        fm.ArgumentError,
        "nesterov=True with momentum=0.0 and dampening=0.0",
        "Pass for example momentum=0.9",
    ),
    "adam with one beta": (
        lambda: optim.adam(0.1, betas=0.9),
        fm.ArgumentError,
        "betas is 0.9, expected a pair (beta1, beta2)",
        "Pass for example betas=(0.9, 0.999)",
    ),
    "adam with a beta of 1": (
        lambda: optim.adam(0.1, betas=(0.9, 1.0)),
        fm.ArgumentError,
        "beta2 is 1.0, expected a number in [0, 1)",
        "Pass such a number",
    ),
    "a rate that does not broadcast": (
        lambda: step_once(optim.sgd(torch.ones(3))),
        fm.StructureError,
        "lr is float32[3] on cpu, which does not broadcast to",
        "Pass a 0-d tensor, or a tree like the parameters",
    ),
    "gradients without a key": (
        lambda: optim.sgd(0.1).update({"w": torch.ones(2)}, optim.sgd(0.1).init(PARAMS), PARAMS),
        fm.StructureError,
        "grads has other keys than expected: missing grads['b']",
        "Pass a tree with exactly the expected keys",
    ),
    "gradients of another shape": (
        lambda: optim.sgd(0.1).update({"w": torch.ones(3), "b": torch.ones(1)}, optim.sgd(0.1).init(PARAMS), PARAMS),
        fm.StructureError,
        "a gradient is float32[3] on cpu, but its parameter is float32[2] on cpu",
        "Pass one dense gradient of the same shape",
    ),
    "chain of a function": (
        lambda: fm.chain(len),
        fm.ArgumentError,
        "(builtin_function_or_method), expected a Transform",
        "Pass what sgd(...), adam(...)",
    ),
    "mask of words": (
        lambda: optim.masked(optim.sgd(0.1), lambda name: "yes").init(PARAMS),
        fm.ArgumentError,
        "where gives 'yes' (str) for 'w'",
        "expected True or False",
    ),
    "clip to a negative norm": (
        lambda: optim.clip_by_global_norm(-1.0),
        fm.ArgumentError,
        "max_norm is -1.0, expected a number at least 0",
        "Pass such a number",
    ),
    "schedule over no steps": (
        lambda: optim.schedules.linear(1.0, 0.0, steps=0),
        fm.ArgumentError,
        "steps is 0, expected a positive integer",
        "Pass the number of optimizer steps",
    ),
    "adapt nothing": (
        lambda: problem(adapt=lambda name: False),
        fm.ArgumentError,
        "adapt selects none of the parameters ['weight', 'bias']",
        "Select at least one",
    ),
    "initial parameters of another net": (
        lambda: unroll(meta={**meta(), "params": {"weight": torch.ones(1, 2)}}),
        fm.StructureError,
        "missing meta['params']['bias']",
        "Pass init_params(module)",
    ),
    "initial parameters of another shape": (
        lambda: unroll(meta={**meta(), "params": {"weight": torch.ones(1, 3), "bias": torch.ones(1)}}),
        fm.StructureError,
        "meta['params']['weight'] is float32[1, 3] on cpu, expected float32[1, 2] on cpu",
        "Pass init_params(module)",
    ),
    "initial parameters of another dtype": (
        lambda: unroll(meta={**meta(), "params": fm.init_params(nn.Linear(2, 1).double())}),
        fm.StructureError,
        "is float64[1, 2] on cpu, expected float32[1, 2] on cpu",
        "Pass init_params(module)",
    ),
    "a task without a query": (
        lambda: unroll(task=fm.Task((X, Y), None)),
        fm.ArgumentError,
        "The task has no query, which the meta-loss reads",
        "Give the task a query, or use trajectory_loss",
    ),
    "negative steps": (
        lambda: unroll(steps=-1),
        fm.ArgumentError,
        "steps is -1, expected an integer of 0 or more",
        "Pass e.g. steps=5",
    ),
    "steps as a float": (
        lambda: unroll(steps=2.0),
        fm.ArgumentError,
        "steps is 2.0, expected an integer of 0 or more",
        "Pass e.g. steps=5",
    ),
    "a negative seed": (
        lambda: unroll(seed=-1),
        fm.ArgumentError,
        "seed is -1, expected an integer from 0 to 2**63 - 1",
        "Pass a non-negative int",
    ),
    "a module as meta": (
        lambda: unroll(meta=NET),
        fm.ArgumentError,
        "meta is a Module, expected a tree of tensors",
        "Pass dict(module.named_parameters())",
    ),
    "a number in meta": (
        lambda: unroll(meta={**meta(), "lr": 0.1}),
        fm.StructureError,
        "meta['lr'] is 0.1 (float), expected a tensor",
        "Wrap numbers in torch.tensor(...)",
    ),
    "a pair as task": (
        lambda: unroll(task=((X, Y), (X, Y))),
        fm.ArgumentError,
        "task is a tuple, expected a Task",
        "Pass Task(support, query)",
    ),
    "an iterator as support": (
        lambda: unroll(task=fm.Task(iter([(X, Y)]), (X, Y))),
        fm.ArgumentError,
        "task.support is a list_iterator, expected tensors or a function of the step index",
        "wrap the data in a function",
    ),
    "a loader as query": (
        lambda: unroll(task=fm.Task((X, Y), torch.utils.data.DataLoader([1, 2]))),
        fm.ArgumentError,
        "task.query is a DataLoader, expected tensors or a function of the step index",
        "wrap the data in a function",
    ),
    "arrays in a batch": (
        lambda: unroll(task=fm.Task((X, Y.numpy()), (X, Y))),
        fm.ArgumentError,
        "task.support[1] is a ndarray, expected a tensor",
        "Convert it by torch.as_tensor",
    ),
    "a string as support": (
        lambda: unroll(task=fm.Task("data", (X, Y))),
        fm.ArgumentError,
        "task.support is a str, expected tensors or a function of the step index",
        "a function that returns the batch of a given step",
    ),
    "the name of an estimator": (
        lambda: unroll(estimator="first"),
        fm.ArgumentError,
        "estimator is 'first', expected an object that can do the work",
        "Pass e.g. Reverse()",
    ),
    "the class of an estimator": (
        lambda: unroll(estimator=fm.FirstOrder),
        fm.ArgumentError,
        "expected an object that can do the work",
        "Pass e.g. FirstOrder()",
    ),
    "a number as memory": (
        lambda: unroll(memory=4),
        fm.ArgumentError,
        "memory is 4, expected an object that can do the work",
        "Pass e.g. StoreAll()",
    ),
    "a torch optimizer": (
        lambda: fm.inner_problem(NET, summed, optimizer=torch.optim.SGD(NET.parameters(), lr=0.1)),
        fm.ArgumentError,
        "expected a Transform or a function from meta to one",
        "Pass e.g. funcmeta.optim.sgd(0.1)",
    ),
    "the class of a torch optimizer": (
        lambda: fm.inner_problem(NET, summed, optimizer=torch.optim.SGD),
        fm.ArgumentError,
        "expected a Transform or a function from meta to one",
        "Pass e.g. funcmeta.optim.sgd(0.1)",
    ),
    "a function that gives no transform": (
        lambda: fm.unroll(
            fm.inner_problem(NET, summed, optimizer=lambda meta: None), meta(), fm.Task((X, Y), (X, Y)), steps=1
        ),
        fm.ArgumentError,
        "optimizer(meta) returned None, expected a Transform",
        "Pass e.g. funcmeta.optim.sgd(0.1)",
    ),
    "inference mode": (
        lambda: torch.inference_mode()(unroll)(),
        fm.ArgumentError,
        "takes gradients, which torch.inference_mode forbids",
        "Use torch.no_grad() there",
    ),
    "a head that begins no name": (
        lambda: fm.anil.build(NET, summed, head="classifier.", steps=1, lr=0.1),
        fm.ArgumentError,
        "head is 'classifier.', with which none of ['weight', 'bias'] begins",
        "Pass e.g. '2.'",
    ),
    "a state as carry": (
        lambda: unroll(carry={"step": 0}),
        fm.ArgumentError,
        "carry is a dict, expected a Carry",
        "Pass an earlier unroll's out.carry",
    ),
    "no meta-loss at all": (
        lambda: by_hand(descend(square), judge=None),
        fm.ArgumentError,
        "There is no meta-loss",
        "or give the problem a meta_loss",
    ),
    "a step that returns its state only": (
        lambda: by_hand(lambda meta, w, batch, seed: w),
        fm.StructureError,
        "step returned a Tensor",
        "expected the pair (state, StepInfo(loss))",
    ),
    "a state that changes shape": (
        lambda: by_hand(changes_shape),
        fm.StructureError,
        "state is float32[4] on cpu, expected float32[2] on cpu",
        "let every step return the state as it came",
    ),
    "a state that changes dtype": (
        lambda: by_hand(changes_dtype),
        fm.StructureError,
        "state is float64[2] on cpu, expected float32[2] on cpu",
        "let every step return the state as it came",
    ),
    "an inner loss per example": (
        lambda: by_hand(descend(lambda w: w**2)),
        fm.LossError,
        "The inner loss has shape [2], expected []",
        "Reduce it by mean() or sum()",
    ),
    "an inner loss as a number": (
        lambda: by_hand(descend(lambda w: 1.0)),
        fm.LossError,
        "The inner loss is a float, expected a 0-d tensor",
        "Return the loss itself",
    ),
    "an inner loss of integers": (
        lambda: by_hand(descend(lambda w: w.sum().long())),
        fm.LossError,
        "The inner loss is torch.int64, expected a floating-point tensor",
        "Convert it before reducing",
    ),
    "a meta-loss per example": (
        lambda: by_hand(descend(square), judge=lambda meta, w, query, seed: w),
        fm.LossError,
        "The meta-loss has shape [2], expected []",
        "Reduce it by mean() or sum()",
    ),
    "integer parameters": (
        lambda: fm.value_and_grad(square)(torch.tensor([1, 2])),
        fm.StructureError,
        "params is int64[2] on cpu, expected a floating-point tensor",
        "Keep what is not trained out of the parameters",
    ),
    "a detached inner loss": (
        lambda: by_hand(descend(lambda w: square(w.detach()))),
        fm.DetachedError,
        "The inner loss does not depend on the parameters",
        "Compute it from the parameters that the function receives",
    ),
    "a detached meta-loss": (
        lambda: by_hand(descend(square), judge=lambda meta, w, query, seed: square(w.detach())),
        fm.DetachedError,
        "The meta-loss does not depend on meta",
        "Compute it from the arguments",
    ),
    "an infinite inner loss": (
        lambda: by_hand(descend(lambda w: square(w) / 0.0)),
        fm.NonFiniteError,
        "The inner loss of step 0 is inf",
        "Lower the inner learning rate",
    ),
    "a meta-loss that is no number": (
        lambda: by_hand(descend(square), judge=lambda meta, w, query, seed: square(w) * float("nan")),
        fm.NonFiniteError,
        "The meta-loss is nan, though all inner losses are finite",
        "Look at the query",
    ),
    "a captured tensor in the inner loss": (
        lambda: by_hand(descend(lambda w: OUTSIDE * square(w))),
        fm.CapturedTensorError,
        "`OUTSIDE`",
        "put it into `meta`",
    ),
    "a captured tensor under Segments": (
        lambda: by_hand(descend(lambda w: OUTSIDE * square(w)), memory=fm.Segments(1)),
        fm.CapturedTensorError,
        "`OUTSIDE`",
        "pass .detach() of it",
    ),
    "a leaf of meta that is not used": (
        lambda: unroll(meta={**meta(), "unused": torch.ones(1, requires_grad=True)}),
        fm.UnreachedLeafError,
        "No gradient reaches meta['unused']",
        "Use it in the loss or the optimizer, take it out of `meta`",
    ),
    "first order without value_and_grad": (
        lambda: by_hand(uses_autograd, estimator=fm.FirstOrder()),
        fm.GraphError,
        "the step took none through funcmeta.value_and_grad",
        "Use it in place of torch.autograd.grad",
    ),
    "Reptile without steps": (
        lambda: unroll(steps=0, estimator=fm.Reptile()),
        fm.ArgumentError,
        "Reptile was asked for 0 steps, expected at least 1",
        "its loss is the last inner loss",
    ),
    "Reptile on a state without parameters": (
        lambda: by_hand(descend(square), estimator=fm.Reptile()),
        fm.ArgumentError,
        "Reptile reads state.params, but the state is a Tensor",
        "Let init return an InnerState",
    ),
    "no directions at once": (
        lambda: fm.ForwardMode(0),
        fm.ArgumentError,
        "chunk is 0, expected a positive integer or None",
        "Pass e.g. chunk=8",
    ),
    "forward mode from a state that requires grad": (
        lambda: unroll(estimator=fm.ForwardMode(), carry=fm.Carry(unroll().state, 2)),
        fm.ArgumentError,
        "The initial state requires grad by itself",
        "Pass an earlier unroll's out.carry",
    ),
    "a captured tensor under ForwardMode": (
        lambda: by_hand(descend(lambda w: OUTSIDE * square(w)), estimator=fm.ForwardMode()),
        fm.CapturedTensorError,
        "`OUTSIDE`",
        "put it into `meta`",
    ),
    "forward mode differentiated again": (
        lambda: unroll(estimator=fm.ForwardMode()).loss.backward(create_graph=True),
        fm.GraphError,
        "create_graph=True, but this estimator's cannot be differentiated again",
        "Use Reverse() or MixedMode()",
    ),
    "forward mode through what torch gets wrong": (
        lambda: torch.func.jvp(
            lambda w: fm.value_and_grad(lambda w: torch.outer(w, w).det())(w)[1], (torch.ones(2),), (torch.ones(2),)
        ),
        TangentError,
        "because torch differentiates the gradient of torch.linalg.det wrongly in forward mode",
        "Use reverse mode: Reverse()",
    ),
    "a captured tensor under MixedMode": (
        lambda: by_hand(descend(lambda w: OUTSIDE * square(w)), estimator=fm.MixedMode()),
        fm.CapturedTensorError,
        "`OUTSIDE`",
        "pass .detach() of it",
    ),
    "windows of no steps": (
        lambda: fm.Truncated(0),
        fm.ArgumentError,
        "length is 0, expected a positive integer",
        "Pass e.g. length=20",
    ),
    "windows differentiated by nothing": (
        lambda: fm.Truncated(3, None),
        fm.ArgumentError,
        "estimator is None, expected an estimator",
        "Pass e.g. FirstOrder()",
    ),
    "initial parameters that truncation does not reach": (
        lambda: unroll(estimator=fm.Truncated(1)),
        fm.UnreachedLeafError,
        "Truncated(length=1) goes back to the cut before a share of the meta-loss",
        "take a length of at least all steps, or give every step a share",
    ),
    "evolution strategies without perturbations": (
        lambda: fm.EvolutionStrategies(sigma=0, pairs=3),
        fm.ArgumentError,
        "sigma is 0, expected a positive number",
        "Pass e.g. sigma=0.1",
    ),
    "a captured tensor under EvolutionStrategies": (
        lambda: by_hand(descend(lambda w: OUTSIDE * square(w)), estimator=fm.EvolutionStrategies(0.1, 2)),
        fm.CapturedTensorError,
        "`OUTSIDE`",
        "put it into `meta`",
    ),
    "particles that vmap cannot run": (
        lambda: by_hand(
            lambda meta, w, batch, seed: (w * w[0].item(), fm.StepInfo(square(w))),
            estimator=fm.EvolutionStrategies(0.1, 2),
        ),
        fm.ArgumentError,
        "4 particles of EvolutionStrategies cannot run at once under vmap",
        "Pass chunk=1",
    ),
    "a carry without particles": (
        lambda: unroll(estimator=fm.PersistentES(0.1, 2, 1), carry=unroll().carry),
        fm.ArgumentError,
        "carry is at step 2 and holds no particles",
        "Pass the out.carry of an unroll by PersistentES, or carry=None",
    ),
    "particles for an estimator that has none": (
        lambda: unroll(carry=unroll(estimator=fm.PersistentES(0.1, 2, 1)).carry),
        fm.ArgumentError,
        "carry holds particles, which Reverse() does not go on with",
        "Pass the estimator that made the carry, or Carry(carry.state, carry.step)",
    ),
    "compile a function": (
        lambda: fm.compile(square),
        fm.ArgumentError,
        "problem is a function, expected a Problem",
        "Pass what inner_problem makes",
    ),
    "compile by another backend": (
        lambda: fm.compile(problem(), backend="eager"),
        fm.ArgumentError,
        "backend is 'eager', expected 'inductor' or 'aten'",
        "Pass one of them",
    ),
    "compile with a setting that there is not": (
        lambda: fm.compile(problem(), speed="high"),
        fm.ArgumentError,
        "'speed' is no setting of the backend 'inductor'",
        "Pass names of torch._inductor.config",
    ),
    "segments of no steps": (
        lambda: fm.Segments(0),
        fm.ArgumentError,
        "length is 0, expected a positive integer or None",
        "Pass e.g. length=10",
    ),
    "a support that differs from call to call": (
        lambda: unroll(task=fm.Task(changing_support(), (X, Y)), memory=fm.Segments(1)),
        fm.ReplayError,
        "support(0) gave two different batches in a row",
        "or use StoreAll()",
    ),
    "a step that differs from call to call": (
        lambda: by_hand(forgetful(), memory=fm.Segments(1)).loss.backward(),
        fm.ReplayError,
        "Step 0 was run again and gave the loss",
        "Or use StoreAll()",
    ),
    "a strategy of another name": (
        lambda: fm.unroll_batch(problem(), meta(), TASK, steps=1, strategy="parallel"),
        fm.ArgumentError,
        "strategy is 'parallel', expected 'auto', 'vmap' or 'loop'",
        "Pass one of them",
    ),
    "a list of tasks": (
        lambda: fm.unroll_batch(problem(), meta(), [TASK, TASK], steps=1),
        fm.ArgumentError,
        "tasks is a list, expected one Task with stacked tensors",
        "Stack them",
    ),
    "tasks without a common dimension": (
        lambda: fm.unroll_batch(problem(), meta(), fm.Task((X, Y), (X[:3], Y)), steps=1),
        fm.StructureError,
        "tasks have no common leading task dimension",
        "Stack the tasks, as sample_batch(seed, tasks) does",
    ),
    "no ways": (
        lambda: tasks.glyphs(ways=0),
        fm.ArgumentError,
        "ways is 0, expected a positive integer",
        "Pass a larger ways",
    ),
    "more ways than classes": (
        lambda: tasks.glyphs(ways=10**6),
        fm.ArgumentError,
        "ways is 1000000, expected at most",
        "Ask for fewer ways, or another split",
    ),
    "a split of another name": (
        lambda: tasks.glyphs(split="training"),
        fm.ArgumentError,
        "split is 'training', expected one of 'train'",
        "Choose one",
    ),
    "a task of a negative seed": (
        lambda: tasks.sinusoids(shots=5).sample(seed=-3),
        fm.ArgumentError,
        "seed is -3, expected an integer from 0 to 2**63 - 1",
        "Pass a non-negative int",
    ),
    "a stack of nothing": (
        lambda: tasks.stack([]),
        fm.ArgumentError,
        "tasks is empty, expected at least one task",
        "Pass a list of tasks",
    ),
    "a stack of functions": (
        lambda: tasks.stack([fm.Task(lambda step: (X, Y), None)]),
        fm.ArgumentError,
        "tasks[0].support is a function of the step, expected a batch",
        "write one function that returns stacked batches",
    ),
    "a stack of two shapes": (
        lambda: tasks.stack([TASK, fm.Task((X[:2], Y), (X, Y))]),
        fm.StructureError,
        "is float32[2, 2] on cpu, expected float32[4, 2] on cpu",
        "Stack tasks of one shape",
    ),
    "a generator of a fraction": (
        lambda: rng.generator(0.5),
        fm.ArgumentError,
        "seed is 0.5, expected an integer",
        "Pass a non-negative int",
    ),
}


def step_once(transform: optim.Transform) -> Any:
    return transform.update(PARAMS, transform.init(PARAMS), PARAMS)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize(("call", "kind", "fact", "advice"), CASES.values(), ids=CASES.keys())
def test_bad_input(call: Callable[[], Any], kind: type[Exception], fact: str, advice: str) -> None:
    with pytest.raises(kind, match=re.escape(fact)) as caught:
        call()
    assert type(caught.value) is kind
    assert isinstance(caught.value, fm.FuncmetaError)
    message = str(caught.value)
    assert advice in message[message.index(fact) + len(fact) :]
    assert message.endswith(".")


def error_types() -> list[type[Exception]]:
    values = vars(_errors).values()
    return [each for each in values if isinstance(each, type) and issubclass(each, fm.FuncmetaError)]


@pytest.mark.parametrize("kind", error_types(), ids=lambda kind: kind.__name__)
def test_errors_are_public_and_are_python_errors_too(kind: type[Exception]) -> None:
    assert getattr(fm, kind.__name__) is kind
    usual = (ValueError, RuntimeError, ArithmeticError, ImportError, OSError)
    assert kind is fm.FuncmetaError or issubclass(kind, usual)


def test_errors_cross_process_borders() -> None:
    """A data loader or a test runner sends errors by pickle."""
    error = fm.UnreachedLeafError(["meta['a']"], "Use it.")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.leaves) == (fm.UnreachedLeafError, str(error), ("meta['a']",))
