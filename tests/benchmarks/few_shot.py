"""Learning an initial point for few-shot tasks, in every torch library: the contestants of W1 and W2.

Each library is used as its own documentation uses it for this problem; the source stands beside it.
"""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from contest import Run
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import funcmeta as fm


class FewShot(NamedTuple):
    """Train ``net`` by gradient descent on each task; the meta-loss is the mean of the losses on the queries."""

    net: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    tasks: fm.Task
    steps: int
    lr: float

    @property
    def count(self) -> int:
        """The number of tasks."""
        return len(self.tasks.query[0])

    def double(self) -> "FewShot":
        """The same in double precision."""
        tasks = [tuple(each.double() if each.is_floating_point() else each for each in pair) for pair in self.tasks[:2]]
        return self._replace(net=copy.deepcopy(self.net).double(), tasks=fm.Task(*tasks))


def torch_contestants(case: FewShot, *, peers: bool) -> dict[str, Run]:
    """By hand, by funcmeta, and by the peers that are installed."""
    found = {
        "by hand, loop": by_hand_loop(case),
        "funcmeta eager": funcmeta(case),
        "funcmeta compiled": funcmeta(case, compiled=True),
    }
    if peers and find_spec("torchopt"):
        found["torchopt MetaSGD"] = torchopt_meta_sgd(case)
    if peers and find_spec("higher"):
        found["higher"] = higher_innerloop(case)
    return found


def funcmeta(case: FewShot, *, compiled: bool = False, **options: Any) -> Run:
    """This library, all tasks in one call."""

    def loss(meta: Any, predict: Any, batch: Any) -> Tensor:
        x, y = batch
        return case.loss(predict(x), y)

    problem = fm.inner_problem(case.net, loss, optimizer=fm.optim.sgd(case.lr))
    problem = fm.compile(problem) if compiled else problem
    meta = {"params": fm.init_params(case.net)}

    def run() -> Any:
        out = fm.unroll_batch(problem, meta, case.tasks, steps=case.steps, **options)
        return torch.autograd.grad(out.loss, list(meta["params"].values()))

    return run


def by_hand_loop(case: FewShot) -> Run:
    """Plain torch, task after task."""
    start = fm.init_params(case.net)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return case.loss(functional_call(case.net, params, (x,)), y)

    def run() -> Any:
        losses = []
        for x, y, x_query, y_query in zip(*case.tasks.support, *case.tasks.query, strict=True):
            params = start
            for _ in range(case.steps):
                grads = torch.autograd.grad(loss(params, x, y), list(params.values()), create_graph=True)
                params = {name: param - case.lr * by for (name, param), by in zip(params.items(), grads, strict=True)}
            losses.append(loss(params, x_query, y_query))
        return torch.autograd.grad(torch.stack(losses).mean(), list(start.values()))

    return run


def by_hand_vmap(case: FewShot) -> Run:
    """Plain torch.func, all tasks at once; as PyTorch's tutorials on per-sample gradients and ensembling do it."""
    start = fm.init_params(case.net)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return case.loss(functional_call(case.net, params, (x,)), y)

    def one(x: Tensor, y: Tensor, x_query: Tensor, y_query: Tensor) -> Tensor:
        params = start
        for _ in range(case.steps):
            grads = grad(loss)(params, x, y)
            params = {name: param - case.lr * grads[name] for name, param in params.items()}
        return loss(params, x_query, y_query)

    def run() -> Any:
        return torch.autograd.grad(vmap(one)(*case.tasks.support, *case.tasks.query).mean(), list(start.values()))

    return run


def torchopt_meta_sgd(case: FewShot) -> Run:
    """Its MetaSGD with states taken out and put back: its examples/few-shot/maml_omniglot.py."""
    import torchopt

    net = copy.deepcopy(case.net)
    inner = torchopt.MetaSGD(net, lr=case.lr)
    start = list(net.parameters())

    def run() -> Any:
        net.zero_grad()
        net_state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        inner_state = torchopt.extract_state_dict(inner, by="reference")
        losses = []
        for x, y, x_query, y_query in zip(*case.tasks.support, *case.tasks.query, strict=True):
            for _ in range(case.steps):
                inner.step(case.loss(net(x), y))
            losses.append(case.loss(net(x_query), y_query))
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(inner, inner_state)
        torch.stack(losses).mean().backward()
        return [param.grad for param in start]

    return run


def torchopt_vmap(case: FewShot) -> Run:
    """Its functional sgd under torch.func's vmap and grad: its examples/FuncTorch/maml_omniglot_vmap.py."""
    import torchopt

    start = fm.init_params(case.net)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return case.loss(functional_call(case.net, params, (x,)), y)

    def one(x: Tensor, y: Tensor, x_query: Tensor, y_query: Tensor) -> Tensor:
        inner = torchopt.sgd(lr=case.lr)
        params, state = start, inner.init(start)
        for _ in range(case.steps):
            updates, state = inner.update(grad(loss)(params, x, y), state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return loss(params, x_query, y_query)

    def run() -> Any:
        return torch.autograd.grad(vmap(one)(*case.tasks.support, *case.tasks.query).mean(), list(start.values()))

    return run


def higher_innerloop(case: FewShot) -> Run:
    """Its innerloop_ctx, one backward pass a task: its examples/maml-omniglot.py."""
    import higher

    net = copy.deepcopy(case.net)
    inner = torch.optim.SGD(net.parameters(), lr=case.lr)

    def run() -> Any:
        net.zero_grad()
        for x, y, x_query, y_query in zip(*case.tasks.support, *case.tasks.query, strict=True):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (functional, stepper):
                for _ in range(case.steps):
                    stepper.step(case.loss(functional(x), y))
                (case.loss(functional(x_query), y_query) / case.count).backward()
        return [param.grad for param in net.parameters()]

    return run
