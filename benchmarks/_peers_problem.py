"""What basinax and its peers are compared on: two small trained classifiers.

A problem is a loss with its parameters and data. A contender solves one task on it,
and float64 says how well: the product with one vector, the five largest eigenvalues
and, without any sampling, the trace.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from basinax.benchmarks._digits import read_embedded
from basinax.benchmarks._speed_products import EXAMPLES, MODELS, Params, initial

TOP = 5  # eigenvalues asked for
LOSS = 0.1  # trained until here, so that outliers stand out as they do in practice
CHUNK = 32  # examples whose Jacobians are held at once

arpack: Any = scipy.sparse.linalg  # its inferred types want whole tolerances
rows_loss = optax.losses.softmax_cross_entropy_with_integer_labels


class Problem(NamedTuple):
    """A loss, called as `loss(params, x, y)`, and the point at which it is bent."""

    name: str
    loss: Callable[[Params, jax.Array, jax.Array], jax.Array]
    params: Params
    x: jax.Array
    y: jax.Array


class Contender(NamedTuple):
    """One way to solve one task.

    Attributes:
      task: what is computed.
      by: package and method.
      call: solves the task; takes a seed and returns NumPy arrays.
      scale: how many times as much the whole task costs, where the call does a part.
      repeats: calls per timing.
    """

    task: str
    by: str
    call: Callable[[int], Any]
    scale: float = 1.0
    repeats: int = 1


class Settings(NamedTuple):
    """How much of each task the peers do.

    Attributes:
      probes: of Hutchinson's method.
      scale: how many times as many the target takes.
      budget: products of Hutch++.
      steps: of Lanczos for a density.
    """

    probes: int
    scale: float
    budget: int
    steps: int


class Exact(NamedTuple):
    """The answers, in float64; vectors are flat, in the order of `jax.tree.leaves`."""

    direction: np.ndarray
    product: np.ndarray
    top: np.ndarray
    trace: float


def make(name: str, params: Params, x: jax.Array, y: jax.Array) -> Problem:
    """Define the mean cross-entropy of a network by name."""
    model = MODELS[name]

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(rows_loss(model(params, x), y))

    return Problem(name, loss, params, x, y)


def trained(name: str, examples: int | None = None) -> Problem:
    """Train a network on the first digits with Adam until the loss is small."""
    parts = read_embedded()
    inputs, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    count = examples or EXAMPLES[name]
    x, y = jnp.asarray(inputs[:count]), jnp.asarray(labels[:count])
    problem = make(name, initial(name), x, y)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(problem.loss)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = problem.params, optimizer.init(problem.params)
    for _ in range(1000):
        after, state, value = step(params, state, x, y)
        if value <= LOSS:
            break
        params = after
    return problem._replace(params=params)


@jax.jit
def perceptron_trace(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum the second derivatives by every weight of the tanh perceptron.

    A weight W_ij moves the pre-activation z_j of its layer by the activation a_i alone,
    so ∂²L/∂W_ij² = a_i² ∂²L/∂z_j², and a bias has a_i = 1.
    """
    total, inputs = jnp.zeros((), x.dtype), x
    for layer in range(3):

        def tail(z: jax.Array, layer: int = layer) -> jax.Array:
            for k in range(layer + 1, 3):
                z = jnp.tanh(z) @ params[f"w{k}"] + params[f"b{k}"][None]
            return jnp.sum(rows_loss(z, y))

        z = inputs @ params[f"w{layer}"] + params[f"b{layer}"][None]
        gradient, moved = jax.grad(tail), 1 + jnp.sum(inputs**2, 1)

        def second(
            unit: jax.Array,
            z: jax.Array = z,
            gradient: Any = gradient,
            moved: jax.Array = moved,
        ) -> jax.Array:
            direction = jnp.zeros_like(z).at[:, unit].set(1)
            return moved @ jax.jvp(gradient, (z,), (direction,))[1][:, unit]

        total += jnp.sum(jax.lax.map(second, jnp.arange(z.shape[1])))
        inputs = jnp.tanh(z)
    return total / len(x)


def convolutional_trace(params: Params, x: jax.Array, y: jax.Array) -> float:
    """Sum the second derivatives by every weight of the ReLU network.

    In any single weight its logits are piecewise linear, so what bends the loss is the
    softmax alone, and the diagonal is that of the Fisher matrix: the mean square of the
    gradient of log p_c over classes c drawn from p.
    """
    del y  # which the Fisher matrix does not ask for

    @jax.jit
    def squares(params: Params, x: jax.Array) -> jax.Array:
        def one(row: jax.Array) -> jax.Array:
            def log_p(params: Params) -> jax.Array:
                return jax.nn.log_softmax(MODELS["convolutional"](params, row[None])[0])

            jacobian = jax.tree.leaves(jax.jacrev(log_p)(params))
            lengths = sum(
                jnp.sum(leaf.reshape(len(leaf), -1) ** 2, 1) for leaf in jacobian
            )
            return jnp.exp(log_p(params)) @ lengths

        return jnp.sum(jax.vmap(one)(x))

    chunks = [x[start : start + CHUNK] for start in range(0, len(x), CHUNK)]
    return sum(float(squares(params, chunk)) for chunk in chunks) / len(x)


TRACES: dict[str, Callable[..., Any]] = {
    "perceptron": perceptron_trace,
    "convolutional": convolutional_trace,
}


def exact(problem: Problem) -> Exact:
    """Solve every task in float64, without the instruments under test."""
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), problem.params
        )
        x = jnp.asarray(np.asarray(problem.x, np.float64))
        point, unravel = ravel_pytree(params)

        @jax.jit
        def product(point: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
            def gradient(point: jax.Array) -> jax.Array:
                return jax.grad(lambda w: problem.loss(unravel(w), x, problem.y))(point)

            return jax.jvp(gradient, (point,), (v,))[1]

        def multiply(v: np.ndarray) -> np.ndarray:
            return np.asarray(product(point, jnp.asarray(v.ravel()), x))

        # Entries that float32 holds exactly, for everyone to multiply the same vector.
        rng = np.random.default_rng(0)
        direction = rng.standard_normal(point.size, np.float32).astype(np.float64)
        matrix = arpack.LinearOperator(
            (point.size, point.size), multiply, dtype=np.float64
        )
        top = arpack.eigsh(matrix, TOP, which="LA", tol=1e-6, v0=direction)[0]
        return Exact(
            direction,
            multiply(direction),
            np.sort(top)[::-1],
            float(TRACES[problem.name](params, x, problem.y)),
        )
