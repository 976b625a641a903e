"""The few-shot problem in JAX; imported only where JAX is installed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from contest import Run
from few_shot import FewShot

Forward = Callable[[list[Any], Any], Any]
"""A network as a function of torch's parameters, in torch's order and layout, and of its inputs."""


def contestants(case: FewShot, forward: Forward, loss: Callable[[Any, Any], Any]) -> dict[str, Run]:
    """jit of value_and_grad of the tasks' mean loss: steps written out or scanned, tasks vmapped or mapped."""
    start = [jnp.asarray(param.detach().numpy()) for param in case.net.parameters()]
    data = [jnp.asarray(each.numpy()) for each in (*case.tasks.support, *case.tasks.query)]

    def objective(params: Any, x: Any, y: Any) -> Any:
        return loss(forward(params, x), y)

    def step(params: Any, x: Any, y: Any) -> Any:
        return jax.tree.map(lambda param, by: param - case.lr * by, params, jax.grad(objective)(params, x, y))

    def written_out(params: Any, x: Any, y: Any, x_query: Any, y_query: Any) -> Any:
        for _ in range(case.steps):
            params = step(params, x, y)
        return objective(params, x_query, y_query)

    def scanned(params: Any, x: Any, y: Any, x_query: Any, y_query: Any) -> Any:
        params, _ = jax.lax.scan(lambda params, _: (step(params, x, y), None), params, length=case.steps)
        return objective(params, x_query, y_query)

    def mapped(params: Any, *data: Any) -> Any:
        return jnp.mean(jax.lax.map(lambda task: written_out(params, *task), data))

    def vmapped(one: Any) -> Any:
        return lambda params, *data: jnp.mean(jax.vmap(one, in_axes=(None, 0, 0, 0, 0))(params, *data))

    def timed(total: Any) -> Run:
        compiled = jax.jit(jax.value_and_grad(total))
        return lambda: jax.block_until_ready(compiled(start, *data))[1]

    return {
        "jax vmap": timed(vmapped(written_out)),
        "jax vmap, scan": timed(vmapped(scanned)),
        "jax map": timed(mapped),
    }
