"""The meta-learner LSTM: an LSTM cell whose cell state are the parameters, learned with where they begin."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from funcmeta import rng, tree
from funcmeta._check import check_count, check_positive
from funcmeta._gradient import value_and_grad
from funcmeta._typing import Batch, Buffers, Meta, Params
from funcmeta.algorithms._algorithm import Algorithm, algorithm_of
from funcmeta.estimators import Estimator, FirstOrder
from funcmeta.learned._coordinatewise import Dense, LSTMCell
from funcmeta.learned._features import log_sign
from funcmeta.memory import Memory, StoreAll
from funcmeta.model import functionalize, init_params
from funcmeta.optim import Transform, advance
from funcmeta.problem import InnerLoss, InnerState, Predict, Problem, StepInfo, inner_problem
from funcmeta.unroll_batch import Strategy

__all__ = ["Cell", "CellState", "build", "problem"]


def build(
    module: nn.Module,
    loss_fn: InnerLoss,
    *,
    steps: int,
    hidden: int = 20,
    p: float = 10.0,
    estimator: Estimator = FirstOrder(),  # noqa: B008
    memory: Memory = StoreAll(),  # noqa: B008
    strategy: Strategy = "auto",
    train: bool | None = None,
) -> Algorithm:
    """Meta-LSTM: θ_{k+1} = f_k ∘ θ_k − i_k ∘ ∇ℓ(θ_k), with gates that an LSTM opens, and θ_0 learned with them.

    h_k = LSTM(x_k, h_{k−1}), where x_k are the logarithms and signs of ∇ℓ(θ_k) and of ℓ(θ_k);
    f_k = σ(W_F [h_k, θ_k, f_{k−1}] + b_F) and i_k = σ(W_I [h_k, θ_k, i_{k−1}] + b_I). All weights are shared by all
    coordinates, each of which has its own h, f and i. At first f is about 0.99 and i about 0.01 everywhere. By
    ``FirstOrder()``, as in the paper, the gradients and losses that the LSTM sees count as constants.

    Args:
        module: the network, whose parameters are where meta-training begins.
        loss_fn: (meta, predict, batch) → 0-d loss, on the support inside and on the query outside.
        steps: K, at least 1 (12 for one shot, 5 for five shots in the paper).
        hidden: units of the LSTM.
        p: gradients and losses below e⁻ᵖ are seen linearly, those above by logarithm and sign.
        estimator: how the meta-gradient is computed; exact by ``Reverse()``.
        memory: what the estimator keeps of the trajectory.
        strategy: how stacked tasks are run: "vmap", "loop" or "auto".
        train: train mode (True), eval mode (False), or each submodule in its own mode (None).

    Returns:
        ``Algorithm``; its meta is ``{"params": ..., "cell": ...}``. The weights of the LSTM are drawn from torch's
        global generator. BatchNorm uses the statistics of the batch; its running averages begin anew at the module's
        own for every task, and ``adapt(..., evaluate=True)`` predicts by them, as in the paper.

    Raises:
        ArgumentError: ``steps``, ``hidden`` or ``p`` is out of range, or the module cannot be made functional.
        StructureError: in ``loss`` and ``adapt``, ``meta`` does not fit the module or the LSTM.

    Examples:
        >>> from funcmeta.tasks import sinusoids
        >>> def loss(meta, predict, batch):
        ...     x, y = batch
        ...     return ((predict(x) - y) ** 2).mean()
        >>> net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
        >>> algorithm = build(net, loss, steps=5)
        >>> meta = algorithm.init()
        >>> algorithm.loss(meta, sinusoids().sample_batch(seed=0, tasks=4)).backward()
        >>> predict = algorithm.adapt(meta, sinusoids().sample(seed=9))
        >>> predict(torch.zeros(3, 1)).shape
        torch.Size([3, 1])

    Source: Ravi and Larochelle (2017), "Optimization as a Model for Few-Shot Learning", sections 3.1 to 3.5.
    """
    begin = next(iter(functionalize(module)[1].values()))
    cell = Cell(hidden=hidden, p=p).to(begin)
    return algorithm_of(
        problem(module, loss_fn, cell, train=train),
        module,
        init=lambda: {"params": init_params(module), "cell": init_params(cell)},
        steps=steps,
        names=("params", "cell"),
        estimator=estimator,
        memory=memory,
        strategy=strategy,
        train=train,
    )


def problem(module: nn.Module, loss_fn: InnerLoss, cell: "Cell", *, train: bool | None = None) -> Problem:
    """The problem that meta-LSTM unrolls, for `unroll`, `compare`, `compile` and checks.

    One step is θ' = f ∘ θ − i ∘ ∇ℓ(θ), with the gates of the cell whose weights are ``meta["cell"]``.

    Args:
        module: the network; ``meta["params"]``, when present, is the initial point, otherwise its own parameters are.
        loss_fn: (meta, predict, batch) → 0-d loss, on the support inside and on the query outside.
        cell: the LSTM; of its own weights only names, shapes, dtype and device count.
        train: train mode (True), eval mode (False), or each submodule in its own mode (None).

    Returns:
        A ``Problem`` whose state is an ``InnerState`` with a ``CellState``.

    Raises:
        ArgumentError: the module cannot be made functional.
        StructureError: where it begins, ``meta["params"]`` or ``meta["cell"]`` does not fit.

    Examples:
        >>> def loss(meta, predict, batch):
        ...     return predict(batch).square().mean()
        >>> net, cell, x = nn.Linear(2, 1), Cell(hidden=3), torch.ones(4, 2)
        >>> meta = {"cell": init_params(cell)}
        >>> out = fm.unroll(problem(net, loss, cell), meta, fm.Task(x, x), steps=2)
        >>> out.state.opt_state.forget.shape
        torch.Size([1, 3])

    Source: Ravi and Larochelle (2017), "Optimization as a Model for Few-Shot Learning", algorithm 1.
    """
    model, _, _ = functionalize(module)
    usual = inner_problem(module, loss_fn, optimizer=lambda meta: _transform(cell, meta["cell"]), train=train)

    def step(meta: Meta, state: InnerState, batch: Batch, seed: int) -> tuple[InnerState, StepInfo]:
        def objective(params: Params) -> tuple[Tensor, Buffers]:
            predict = Predict(model, params, state.buffers, train=train)
            with rng.forked(seed), model.guarding(params):
                return loss_fn(meta, predict, batch), predict.buffers

        (loss, buffers), grads = value_and_grad(objective, has_aux=True)(state.params)
        if model.hooked:
            grads = model.apply_hooks(grads, state.params, buffers, train=train)
        # ℓ is ∂(sℓ)/∂s too, and so to the estimator as much of a constant as the gradient is
        _, seen = value_and_grad(torch.mul)(torch.ones_like(loss), loss)
        entered = state.opt_state._replace(loss=seen)
        params, following = advance(_transform(cell, meta["cell"]), grads, entered, state.params)
        return InnerState(params, buffers, following, state.step + 1), StepInfo(loss)

    return usual._replace(step=step)


class CellState(NamedTuple):
    """What the cell hands from step to step, coordinates of all tensors last.

    Attributes:
        loss: 0-d tensor, the loss at the parameters as they are, entered before each update.
        hidden: output and cell of the first layer, [hidden, coordinates] each.
        forget: f of the step before, [1, coordinates].
        enter: i of the step before, [1, coordinates].

    Examples:
        >>> CellState._fields
        ('loss', 'hidden', 'forget', 'enter')

    Source: Ravi and Larochelle (2017), "Optimization as a Model for Few-Shot Learning", section 3.2.
    """

    loss: Tensor
    hidden: tuple[Tensor, Tensor]
    forget: Tensor
    enter: Tensor


class Cell(nn.Module):
    """Both layers of the meta-learner: an LSTM on preprocessed gradient and loss, and the gates of the parameters.

    Args:
        hidden: units of the LSTM.
        p: gradients and losses below e⁻ᵖ are seen linearly, those above by logarithm and sign.

    Raises:
        ArgumentError: ``hidden`` or ``p`` is not positive.

    Examples:
        >>> sum(weight.numel() for weight in Cell().parameters())
        2046

    Source: Ravi and Larochelle (2017), "Optimization as a Model for Few-Shot Learning", sections 3.2 and 3.3; the small
        weights of the gates are this library's choice.
    """

    def __init__(self, *, hidden: int = 20, p: float = 10.0) -> None:
        super().__init__()
        self.hidden, self._p = check_count("hidden", hidden), check_positive("p", p)
        self.first = LSTMCell(4, hidden)
        self.forget, self.enter = Dense(hidden + 2, 1), Dense(hidden + 2, 1)
        for gate, low, high in ((self.forget, 4.0, 5.0), (self.enter, -5.0, -4.0)):
            nn.init.uniform_(gate.weight, -0.01, 0.01)
            nn.init.uniform_(gate.bias, low, high)

    def forward(self, param: Tensor, grad: Tensor, state: CellState) -> tuple[Tensor, Tensor, CellState]:
        """1 − f and i for the coordinates [coordinates], and the next state."""
        seen = log_sign(state.loss, self._p)[:, None].expand(2, len(grad))
        hidden = self.first(torch.cat([log_sign(grad, self._p), seen]), state.hidden)
        above = torch.cat([hidden[0], param[None]])
        forget = self.forget(torch.cat([above, state.forget]))
        enter = self.enter(torch.cat([above, state.enter])).sigmoid()
        following = CellState(state.loss, hidden, forget.sigmoid(), enter)
        return forget.neg().sigmoid()[0], enter[0], following


def _transform(cell: Cell, weights: Params) -> Transform:
    """The cell with these weights, as an update −(1 − f) θ − i g of all tensors at once."""
    dtype = next(iter(weights.values())).dtype

    def flat(leaves: list[Tensor]) -> Tensor:
        return torch.cat([leaf.flatten().to(dtype) for leaf in leaves])

    def init(params: Params) -> CellState:
        tree.check_same(
            dict(cell.named_parameters()),
            weights,
            name="meta['cell']",
            advice="Pass what init() returned, or what was trained from it.",
        )
        zero = flat(list(params.values())).new_zeros
        coordinates = sum(leaf.numel() for leaf in params.values())
        memory, gate = zero((cell.hidden, coordinates)), zero((1, coordinates))
        return CellState(zero(()), (memory, memory), gate, gate)

    def update(grads: Params, state: CellState, params: Params) -> tuple[Params, CellState]:
        leaves = list(params.values())
        given = [grads[name] for name in params]
        known = state._replace(loss=state.loss.to(dtype))
        closed, enter, state = functional_call(cell, weights, (flat(leaves), flat(given), known))
        sizes = [leaf.numel() for leaf in leaves]
        rows = zip(leaves, given, closed.split(sizes), enter.split(sizes), strict=True)
        updates = [
            -(gone.view_as(leaf) * leaf + rate.view_as(leaf) * grad).to(leaf.dtype) for leaf, grad, gone, rate in rows
        ]
        return dict(zip(params, updates, strict=True)), state

    return Transform(init, update)
