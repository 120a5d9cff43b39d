"""Small smooth networks on digits, trained on all examples at once.

Everything here is dense and small, so that a whole run with its measurements is one
compiled program and a whole Hessian fits in memory.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from basinax.benchmarks._models import Functional
from basinax.benchmarks._tasks import Batch, Params
from basinax.landscape import metrics, monitor

Loss = Callable[[Params, Batch], jax.Array]


def digits(count: int, classes: int = 10, *, centred: bool = False) -> Batch:
    """Return the first digits of the first classes: pixels in [0, 1] and labels.

    Args:
      count: number of examples.
      classes: digits 0 to ``classes - 1``.
      centred: whether to subtract the mean image.
    """
    bunch: Any = load_digits()
    inputs = np.asarray(bunch["data"], np.float32) / 16.0  # grey levels 0..16
    labels = np.asarray(bunch["target"], np.int32)
    rows = np.flatnonzero(labels < classes)[:count]
    inputs = inputs[rows]
    if centred:
        inputs = inputs - inputs.mean(axis=0, keepdims=True)
    return jnp.asarray(inputs), jnp.asarray(labels[rows])


def tanh_network(sizes: Sequence[int]) -> Functional:
    """Build ``init`` and ``apply`` of a dense network with tanh between the layers.

    Weights start normal with variance one over fan-in, biases at zero.
    """
    pairs = list(itertools.pairwise(sizes))

    def init(key: jax.Array) -> Params:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return [
            {
                "kernel": jnp.asarray(
                    rng.standard_normal((m, n)) / m**0.5, jnp.float32
                ),
                "bias": jnp.zeros(n),
            }
            for m, n in pairs
        ]

    def apply(params: Params, x: jax.Array) -> jax.Array:
        for index, layer in enumerate(params):
            x = (jnp.tanh(x) if index else x) @ layer["kernel"] + layer["bias"][None]
        return x

    return Functional(init, apply)


def cross_entropy(apply: Callable[[Params, jax.Array], jax.Array]) -> Loss:
    """Mean cross-entropy of the softmax."""

    def loss(params: Params, batch: Batch) -> jax.Array:
        inputs, labels = batch
        cost = optax.losses.softmax_cross_entropy_with_integer_labels
        return jnp.mean(cost(apply(params, inputs), labels))

    return loss


def squared_error(apply: Callable[[Params, jax.Array], jax.Array]) -> Loss:
    """Half the squared error to one-hot labels, summed over classes, mean over rows."""

    def loss(params: Params, batch: Batch) -> jax.Array:
        inputs, labels = batch
        outputs = apply(params, inputs)
        wanted = jax.nn.one_hot(labels, outputs.shape[-1])
        return 0.5 * jnp.mean(jnp.sum((outputs - wanted) ** 2, axis=-1))

    return loss


class Course(NamedTuple):
    """A run, looked at every few steps; arrays of shape (looks,)."""

    step: np.ndarray
    loss: np.ndarray
    sharpness: np.ndarray
    """Largest eigenvalue of the Hessian, preconditioned if asked for."""


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    watch: optax.GradientTransformation | None,
    steps: int,
    every: int,
    params: Params,
    batch: Batch,
) -> tuple[Params, Any]:
    chain = tx if watch is None else optax.chain(watch, tx)
    chain = optax.with_extra_args_support(chain)

    def step(carry: tuple[Any, Any], _: None) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = chain.update(
            grads,
            state,
            params,
            value_fn=lambda p: loss_fn(p, batch),
            opt_state=state,
        )
        return (optax.apply_updates(params, updates), state), loss

    def chunk(carry: tuple[Any, Any], _: None) -> tuple[Any, Any]:
        carry, losses = jax.lax.scan(step, carry, length=every)
        seen = jnp.nan if watch is None else optax.tree.get(carry[1], "sharpness")
        return carry, (losses[0], seen)

    carry = params, chain.init(params)
    (params, _), seen = jax.lax.scan(chunk, carry, length=steps // every)
    return params, seen


def descend(
    loss: Loss,
    tx: optax.GradientTransformation,
    params: Params,
    batch: Batch,
    *,
    steps: int,
) -> Params:
    """Train on the whole batch and return the weights."""
    return _run(loss, tx, None, steps, steps, params, batch)[0]


def follow(
    loss: Loss,
    tx: optax.GradientTransformation,
    params: Params,
    batch: Batch,
    *,
    steps: int,
    every: int,
    products: int,
    preconditioner: metrics.Preconditioner | None = None,
) -> Course:
    """Train on the whole batch and watch the sharpness.

    Args:
      loss: called as ``loss(params, batch)``.
      tx: the optimizer.
      params: where to start.
      batch: all examples.
      steps: training steps, a multiple of ``every``.
      every: steps between looks.
      products: Hessian products per look; each goes on from the last eigenvector.
      preconditioner: as in `basinax.landscape.metrics.lambda_max`.
    """
    if steps % every:
        raise ValueError(f"steps {steps} is not a multiple of every {every}")
    sharpness = metrics.lambda_max(products, preconditioner=preconditioner)
    watch = monitor({"sharpness": sharpness}, every)
    _, seen = _run(loss, tx, watch, steps, every, params, batch)
    losses, values = jax.device_get(seen)
    return Course(np.arange(0, steps, every), losses, values)
