"""W3 in JAX; imported only where JAX is installed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contest import Run
from w3_learned_optimizer import SCALE, STRIDE, Training


def contestants(training: Training) -> dict[str, Run]:
    """jit of value_and_grad of the whole training, its steps scanned or written out."""
    weights = {name: jnp.asarray(each.detach().numpy()) for name, each in training.weights.items()}
    inputs, labels = jnp.asarray(training.inputs.numpy()), jnp.asarray(training.labels.numpy())
    batches = inputs[:-1], labels[:-1]
    ends = np.cumsum([math.prod(shape) for shape in training.shapes])[:-1]
    initial = jnp.asarray(training.start.numpy()), tuple(jnp.asarray(cell.numpy()) for cell in training.cells())

    def loss(params: Any, x: Any, y: Any) -> Any:
        parts = jnp.split(params, ends)
        first, bias, second, second_bias = (
            part.reshape(shape) for part, shape in zip(parts, training.shapes, strict=True)
        )
        scores = jax.nn.log_softmax(jax.nn.sigmoid(x @ first + bias) @ second + second_bias)
        return -jnp.take_along_axis(scores, y[:, None], 1).mean()

    def cell(x: Any, out: Any, kept: Any, weight: Any, bias: Any) -> Any:
        enter, forget, new, leave = jnp.split(weight @ jnp.concatenate([x, out]) + bias, 4)
        kept = jax.nn.sigmoid(forget) * kept + jax.nn.sigmoid(enter) * jnp.tanh(new)
        return jax.nn.sigmoid(leave) * jnp.tanh(kept), kept

    def step(weights: Any, state: Any, batch: Any) -> Any:
        params, (first, kept_first, second, kept_second) = state
        value, grad = jax.value_and_grad(loss)(params, *batch)
        size = jnp.log(jnp.maximum(jnp.abs(grad), math.exp(-SCALE))) / SCALE
        seen = jnp.stack([size, jnp.clip(grad * math.exp(SCALE), -1, 1)])
        first, kept_first = cell(seen, first, kept_first, weights["first"], weights["first bias"])
        second, kept_second = cell(first, second, kept_second, weights["second"], weights["second bias"])
        params = params + STRIDE * (weights["out"] @ second)[0]
        return (params, (first, kept_first, second, kept_second)), value

    def scanned(weights: Any) -> Any:
        state, values = jax.lax.scan(lambda state, batch: step(weights, state, batch), initial, batches)
        return values.sum() + loss(state[0], inputs[-1], labels[-1])

    def written_out(weights: Any) -> Any:
        state, total = initial, 0.0
        for batch in zip(*batches, strict=True):
            state, value = step(weights, state, batch)
            total = total + value
        return total + loss(state[0], inputs[-1], labels[-1])

    def timed(total: Any) -> Run:
        compiled = jax.jit(jax.value_and_grad(total))

        def run() -> Any:
            _, grads = jax.block_until_ready(compiled(weights))
            return [grads[name] for name in weights]

        return run

    return {"jax scan": timed(scanned), "jax, written out": timed(written_out)}
