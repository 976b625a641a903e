"""The inner training as pure functions: the nouns, and the usual problem made from a module and a loss."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from funcmeta import rng, tree
from funcmeta._check import check_flag, is_function
from funcmeta._errors import ArgumentError
from funcmeta._gradient import value_and_grad
from funcmeta._typing import Batch, Buffers, Meta, Params, Tree
from funcmeta.model import FunctionalModel, functionalize
from funcmeta.optim import Transform, advance
from funcmeta.tasks import Task


class InnerState(NamedTuple):
    """Everything that one inner step hands to the next.

    Attributes:
        params: the tensors being trained, by name.
        buffers: the module's buffers and frozen parameters, by name.
        opt_state: the inner optimizer's state.
        step: 0-d int64 tensor, the number of steps taken.

    Examples:
        >>> InnerState({}, {}, (), torch.tensor(0)).step
        tensor(0)

    Source: this library.
    """

    params: Params
    buffers: Buffers
    opt_state: Tree
    step: Tensor


class StepInfo(NamedTuple):
    """What one inner step tells beside its new state.

    Attributes:
        loss: 0-d tensor, the inner loss before the update.
        meta_loss: 0-d tensor, this step's share of the meta-loss, or None.
        aux: anything else, kept (detached) in the unroll's info.

    Examples:
        >>> StepInfo(torch.tensor(1.5)).meta_loss is None
        True

    Source: this library.
    """

    loss: Tensor
    meta_loss: Tensor | None = None
    aux: Any = None


class Problem(NamedTuple):
    """An inner training as three pure functions; what they depend on besides their arguments must be constant.

    Attributes:
        init: (meta, task, seed) → state, the state before the first step.
        step: (meta, state, batch, seed) → (state, ``StepInfo``), one step; its gradient comes from ``value_and_grad``.
        meta_loss: (meta, state, query, seed) → 0-d tensor, or None when the steps' shares are all of the meta-loss.

    Examples:
        A scalar parameter, one gradient step on a x², judged by the same loss:

        >>> def step(meta, a, x, seed):
        ...     loss, slope = value_and_grad(lambda a: a * x**2)(a)
        ...     return a - meta["lr"] * slope, StepInfo(loss)
        >>> problem = Problem(lambda meta, task, seed: meta["a"], step, lambda meta, a, x, seed: a * x**2)

    Source: this library.
    """

    init: Callable[[Meta, Task, int], Any]
    step: Callable[[Meta, Any, Batch, int], tuple[Any, StepInfo]]
    meta_loss: Callable[[Meta, Any, Batch, int], Tensor] | None


class Predict:
    """The module with the current inner parameters, as the loss sees it: ``predict(x)``.

    Attributes:
        params: every parameter of the module, by name, for penalties and the like.
        buffers: the buffers after the latest call.
    """

    def __init__(self, model: FunctionalModel, params: Params, buffers: Buffers, *, train: bool | None) -> None:
        self.params = params
        self.buffers = buffers
        self._model = model
        self._train = train

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output on these inputs."""
        out, self.buffers = self._model(self.params, self.buffers, *args, train=self._train, **kwargs)
        return out


_START = "Pass init_params(module): its names are those of the parameters that require grad in the module."

_TRANSFORM = (
    "expected a Transform or a function from meta to one. Pass e.g. funcmeta.optim.sgd(0.1) or "
    "lambda meta: funcmeta.optim.sgd(meta['lr'])."
)

InnerLoss = Callable[[Meta, Predict, Batch], Tensor]


def inner_problem(
    module: nn.Module,
    loss_fn: InnerLoss,
    *,
    optimizer: Transform | Callable[[Meta], Transform],
    meta_loss_fn: InnerLoss | None = None,
    trajectory_loss: bool | Callable[[Tensor], float | Tensor] = False,
    train: bool | None = None,
    query_train: bool | Literal["same"] | None = "same",
    adapt: Callable[[str], bool] | None = None,
) -> Problem:
    """The usual problem: train a module on a task's support by an inner optimizer, judge it on the query.

    One step is θ' = θ + update(∇_θ ℓ(meta, θ, batch)); the meta-loss is ℓ(meta, θ_K, query), or Σ_k w_k ℓ_k over the
    inner losses, or their sum. ``meta["params"]``, when present, is the initial point θ_0; otherwise the module's own
    parameters, as they are now, are.

    Args:
        module: the network; neither changed nor kept.
        loss_fn: (meta, predict, batch) → 0-d loss. ``predict(*inputs)`` runs the module, ``predict.params`` are its
            parameters.
        optimizer: a ``Transform``, or a function meta → ``Transform`` when its hyper-parameters are learned.
        meta_loss_fn: (meta, predict, query) → 0-d loss after the last step; default ``loss_fn``, or nothing with a
            ``trajectory_loss``.
        trajectory_loss: False; True for the sum of the inner losses; or a function of the step (0-d int64 tensor,
            from 0) that gives the weight of its loss.
        train: train mode (True), eval mode (False), or each submodule in its own mode (None).
        query_train: the same for ``meta_loss_fn``; "same" is the mode of the inner training, False judges by running
            statistics and without dropout.
        adapt: which parameters the inner loop trains, by name; the others stay at their initial point, which is
            still part of ``meta``. Default: all.

    Returns:
        A ``Problem`` whose state is an ``InnerState``.

    Raises:
        ArgumentError: ``module`` cannot be made functional, a loss or ``adapt`` is no function, ``optimizer`` is or
            gives no ``Transform``, ``train`` or ``query_train`` is no mode, a weight is no number, ``adapt`` selects
            nothing, or a task without a query meets a meta-loss that needs one.
        StructureError: ``meta["params"]`` does not fit the module in names, shapes, dtypes or device.

    Examples:
        >>> from funcmeta.optim import sgd
        >>> def loss(meta, predict, batch):
        ...     x, y = batch
        ...     return ((predict(x) - y) ** 2).mean()
        >>> problem = inner_problem(nn.Linear(2, 1), loss, optimizer=lambda meta: sgd(meta["lr"]))
        >>> batch = torch.ones(3, 2), torch.zeros(3, 1)
        >>> state = problem.init({"lr": torch.tensor(0.1)}, Task(batch, batch), 0)
        >>> state, info = problem.step({"lr": torch.tensor(0.1)}, state, batch, 0)
        >>> int(state.step)
        1

    Source: the inner loop of Finn et al. (2017), "Model-Agnostic Meta-Learning"; trajectory losses as in
    Andrychowicz et al. (2016), equation 3.
    """
    check_flag("train", train, or_none=True)
    if query_train != "same" and not (query_train is None or isinstance(query_train, bool)):
        raise ArgumentError(f"query_train is {query_train!r}, expected True, False, None or 'same'. Pass one of them.")
    judged = train if query_train == "same" else query_train
    model, own_params, own_buffers = functionalize(module)
    for name, value, optional in (
        ("loss_fn", loss_fn, False),
        ("meta_loss_fn", meta_loss_fn, meta_loss_fn is None),
        ("trajectory_loss", trajectory_loss, isinstance(trajectory_loss, bool)),
        ("adapt", adapt, adapt is None),
    ):
        if not optional and not is_function(value):
            raise ArgumentError(f"{name} is {value!r}, expected a function. Pass one, or leave it out where it may be.")
    adapted = [name for name in own_params if adapt is None or adapt(name)]
    if not adapted:
        raise ArgumentError(f"adapt selects none of the parameters {list(own_params)}. Select at least one.")
    if meta_loss_fn is None and not trajectory_loss:
        meta_loss_fn = loss_fn

    def initial(meta: Meta) -> Params:
        given: Params = meta["params"] if isinstance(meta, Mapping) and "params" in meta else own_params
        return given

    if isinstance(optimizer, torch.optim.Optimizer) or not (isinstance(optimizer, Transform) or is_function(optimizer)):
        raise ArgumentError(f"optimizer is {optimizer!r}, {_TRANSFORM}")

    def transform(meta: Meta) -> Transform:
        made = optimizer if isinstance(optimizer, Transform) else optimizer(meta)
        if not isinstance(made, Transform):
            raise ArgumentError(f"optimizer(meta) returned {made!r}, {_TRANSFORM}")
        return made

    def all_of(meta: Meta, params: Params) -> Params:
        return params if adapt is None else {**initial(meta), **params}

    def init(meta: Meta, task: Task, seed: int) -> InnerState:
        tree.check_same(own_params, initial(meta), name="meta['params']", advice=_START)
        params = {name: initial(meta)[name] for name in adapted}
        device = params[adapted[0]].device
        return InnerState(
            params, own_buffers, transform(meta).init(params), torch.zeros((), dtype=torch.int64, device=device)
        )

    def step(meta: Meta, state: InnerState, batch: Batch, seed: int) -> tuple[InnerState, StepInfo]:
        def objective(params: Params) -> tuple[Tensor, Buffers]:
            predict = Predict(model, all_of(meta, params), state.buffers, train=train)
            with rng.forked(seed), model.guarding(predict.params):
                return loss_fn(meta, predict, batch), predict.buffers

        # as after backward() in torch: what the loss does not use has no gradient, and the optimizer leaves it alone
        (loss, buffers), grads = value_and_grad(objective, has_aux=True, materialize_grads=False)(state.params)
        if model.hooked:
            grads = model.apply_hooks(grads, all_of(meta, state.params), buffers, train=train)
        params, opt_state = advance(transform(meta), grads, state.opt_state, state.params)
        share = weighted(state.step, loss) if callable(trajectory_loss) else loss if trajectory_loss else None
        return InnerState(params, buffers, opt_state, state.step + 1), StepInfo(loss, share)

    def weighted(step: Tensor, loss: Tensor) -> Tensor:
        assert callable(trajectory_loss)
        weight = trajectory_loss(step)
        if not isinstance(weight, Tensor | int | float):
            raise ArgumentError(
                f"trajectory_loss(step) is {weight!r}, expected the weight of this step's loss. Return a number or a "
                f"0-d tensor."
            )
        return weight * loss

    def meta_loss(meta: Meta, state: InnerState, query: Batch, seed: int) -> Tensor:
        if query is None:
            raise ArgumentError(
                "The task has no query, which the meta-loss reads. Give the task a query, or use trajectory_loss."
            )
        assert meta_loss_fn is not None
        with rng.forked(seed):
            predict = Predict(model, all_of(meta, state.params), state.buffers, train=judged)
            with model.guarding(predict.params):
                return meta_loss_fn(meta, predict, query)

    return Problem(init, step, None if meta_loss_fn is None else meta_loss)
