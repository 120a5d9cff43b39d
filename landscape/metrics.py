"""What `monitor` can measure while training.

Metrics of curvature take the Hessian of `value_fn` at the parameters through a
linearised gradient: one evaluation that all products of a measurement share, after
which a product costs about 1.8 gradients.

>>> from basinax.landscape import metrics, monitor
>>> watch = monitor({"sharpness": metrics.lambda_max()}, every=100)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from basinax.landscape._draws import hashed_signs, signs_like
from basinax.landscape._monitor import Metric, Observation
from basinax.landscape._sandwich import scalar
from basinax.landscape._sharpness import unit
from basinax.landscape._short_lanczos import short_lanczos
from basinax.landscape._stability import edge_of_stability, preconditioned
from basinax.landscape._vectors import check_vector, inner, norm, size, wide_dtype

__all__ = [
    "Leading",
    "Probed",
    "gradient_cosine",
    "gradient_norm",
    "hessian_trace",
    "lambda_max",
    "parameter_norm",
    "stability",
    "update_norm",
]

Preconditioner = Callable[[Observation], PyTree]

# What the start of `lambda_max` mixes in. Eigenvalues overtake one another from batch
# to batch, and an eigenvector of one batch alone would be followed after it has ceased
# to lead. The gradient costs nothing and lies mostly along the leading eigenvectors of
# its own batch; the pattern of signs helps where it does not.
_GRADIENT = 1.0
_NOISE = 0.01
# Rounds of the first measurement, which has no eigenvector to start from.
_COLD_ROUNDS = 3


class Leading(NamedTuple):
    """Memory of `lambda_max` and `stability`.

    Attributes:
        vector: unit vector close to the leading eigenvector, in at least float32; the
            next measurement starts from it.
        residual: ‖H u - λ u‖ of the last measurement; an eigenvalue lies within that
            distance of λ.
    """

    vector: PyTree
    residual: Float[Array, ""]


class Probed(NamedTuple):
    """Memory of `hessian_trace`.

    Attributes:
        standard_error: that of the last measurement.
    """

    standard_error: Float[Array, ""]


def lambda_max(
    num_steps: int = 4,
    *,
    tol: float = 0.05,
    max_rounds: int = 6,
    preconditioner: Preconditioner | None = None,
) -> Metric:
    """Measure the largest eigenvalue of the Hessian, the sharpness.

    Rounds of a few Lanczos steps, the first from the leading eigenvector of the
    previous measurement, which is kept in the state, and the gradient; one round
    usually does. The very first measurement, and the first after a NaN, has a fixed
    pattern of signs in place of the eigenvector. `update` needs `params` and
    `value_fn`. The residual can be read as `optax.tree.get(state, "residual")`.

    On CPU a model with convolutions is slow here, because XLA runs them some 30 times
    slower inside loops; use `eigenpairs` between steps.

    Args:
        num_steps: products per round; one more vector than that is held.
        tol: residual, relative to the eigenvalue, at which rounds end. The error of the
            eigenvalue is of the order of its square, where the eigenvalue stands alone.
        max_rounds: most rounds per measurement. The first measurement takes three,
            or as many as are allowed.
        preconditioner: function of an `Observation` that returns a positive tree D like
            the parameters; the eigenvalue is then that of D^(-1/2) H D^(-1/2). For Adam
            hand the optimizer's state to `update` as a further argument:

                lambda seen: adam_diagonal(seen.extra["opt_state"], seen.updates)
                tx.update(grads, state, params, value_fn=..., opt_state=state)

    Returns:
        A metric whose memory is `Leading`.

    Raises:
        ValueError: for fewer than one step or round; from `update` without `params` or
            `value_fn`, or with parameters that are not real floating point.

    Example:
        >>> from basinax.landscape import metrics, monitor
        >>> tx = monitor({"sharpness": metrics.lambda_max(num_steps=3)}, every=100)
    """
    for name, count in (("num_steps", num_steps), ("max_rounds", max_rounds)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")

    def init(params: PyTree) -> Leading:
        return Leading(_wide_zeros(params), jnp.zeros((), jnp.float32))

    def evaluate(memory: Leading, seen: Observation) -> tuple[Leading, Array]:
        gradient, operator = _curvature(seen)
        if preconditioner is not None:
            diagonal = preconditioner(seen)
            operator = preconditioned(operator, diagonal)
            gradient = jax.tree.map(lambda g, d: g / jnp.sqrt(d), gradient, diagonal)
        signs = signs_like(memory.vector)
        share = size(signs) ** -0.5  # makes a unit vector of them
        warm = norm(memory.vector) > 0  # neither zero, as at first, nor NaN
        start = jax.tree.map(
            lambda v, g, s: (
                jnp.where(warm, v + _NOISE * share * s, share * s) + _GRADIENT * g
            ),
            memory.vector,
            unit(_like(gradient, signs)),
            signs,
        )

        least = jnp.where(warm, 1, min(_COLD_ROUNDS, max_rounds))

        def unfinished(carry: tuple) -> Array:
            rounds, _, value, residual = carry
            open_ = (rounds < max_rounds) & (residual > tol * jnp.abs(value))
            return (rounds < least) | open_  # and a NaN ends it

        def lanczos(carry: tuple) -> tuple:
            found = short_lanczos(operator, carry[1], num_steps)
            numbers = (x.astype(jnp.float32) for x in (found.value, found.residual))
            return carry[0] + 1, found.vector, *numbers

        zero = jnp.zeros((), jnp.float32)
        carry = (jnp.zeros((), jnp.int32), start, zero, zero)
        _, vector, value, residual = jax.lax.while_loop(unfinished, lanczos, carry)
        return Leading(vector, residual), value

    return Metric(init, evaluate)


def stability(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    ema: bool = False,
    **options: Any,
) -> Metric:
    """Measure how close training is to the edge of stability: 1 is on the edge.

    The eigenvalue of `lambda_max` in units of what `edge_of_stability` allows. Use one
    of the two, not both: the other follows from it.

    Args:
        learning_rate: step size, or a schedule of the number of updates so far.
        momentum: as in `edge_of_stability`.
        nesterov: as in `edge_of_stability`.
        ema: as in `edge_of_stability`.
        **options: those of `lambda_max`. Adam needs a `preconditioner`, and `ema=True`.

    Returns:
        A metric whose memory is `Leading`.

    Raises:
        ValueError: as `lambda_max`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import metrics, monitor
        >>> tx = monitor({"edge": metrics.stability(learning_rate=0.5)}, every=100)
        >>> loss, w = lambda w: 0.5 * jnp.sum(4.0 * w**2), jnp.ones(3)
        >>> _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> round(float(state.values["edge"]), 3)  # 4 / (2 / 0.5)
        1.0
    """
    init, evaluate = lambda_max(**options)

    def evaluate_ratio(memory: Leading, seen: Observation) -> tuple[Leading, Array]:
        memory, value = evaluate(memory, seen)
        rate = learning_rate(seen.step) if callable(learning_rate) else learning_rate
        edge = edge_of_stability(value, rate, momentum, nesterov=nesterov, ema=ema)
        return memory, edge

    return Metric(init, evaluate_ratio)


def hessian_trace(num_probes: int = 4, *, seed: int = 0) -> Metric:
    """Measure the trace of the Hessian with random signs, new ones every time.

    The mean over the probes of zᵀ H z. The standard error can be read as
    `optax.tree.get(state, "standard_error")`. `update` needs `params` and `value_fn`.
    The signs are a hash of seed, step and position, so a run that is resumed goes on
    with the probes it would have had.

    Args:
        num_probes: products per measurement, at least two for a standard error.
        seed: two monitors with different seeds use different signs.

    Returns:
        A metric whose memory is `Probed`.

    Raises:
        ValueError: for fewer than two probes; from `update` as for `lambda_max`.

    Example:
        >>> from basinax.landscape import metrics, monitor
        >>> tx = monitor({"trace": metrics.hessian_trace(num_probes=8)}, every=100)
    """
    if num_probes < 2:
        raise ValueError(
            f"num_probes must be at least 2 for a standard error, got {num_probes}."
        )

    def init(params: PyTree) -> Probed:
        del params
        return Probed(jnp.zeros((), jnp.float32))

    def evaluate(memory: Probed, seen: Observation) -> tuple[Probed, Array]:
        del memory
        _, operator = _curvature(seen)
        like = _wide_zeros(seen.params)

        def probe(index: Array) -> Array:
            z = hashed_signs(like, seed, seen.step * num_probes + index)
            return inner(z, operator(z))

        samples = jax.lax.map(probe, jnp.arange(num_probes)).astype(jnp.float32)
        error = jnp.std(samples, ddof=1) / num_probes**0.5
        return Probed(error), jnp.mean(samples)

    return Metric(init, evaluate)


def gradient_norm() -> Metric:
    """Measure the norm of the gradient.

    That of the argument `grad` of `update` if there is one, as optax's line searches
    take it, so that it also works behind other transformations; otherwise of what comes
    into the monitor.

    Returns:
        A metric without memory.

    Example:
        >>> from basinax.landscape import metrics, monitor
        >>> tx = monitor({"gradient_norm": metrics.gradient_norm()})
    """
    return _stateless(lambda seen: norm(_gradient(seen)))


def update_norm() -> Metric:
    """Measure the norm of what comes into the monitor; last in a chain, of the step.

    Returns:
        A metric without memory.

    Example:
        >>> from basinax.landscape import metrics, monitor
        >>> tx = monitor({"step_length": metrics.update_norm()})
    """
    return _stateless(lambda seen: norm(seen.updates))


def parameter_norm() -> Metric:
    """Measure the norm of the parameters.

    Returns:
        A metric without memory. `update` needs `params`.

    Example:
        >>> from basinax.landscape import metrics, monitor
        >>> tx = monitor({"weight_norm": metrics.parameter_norm()})
    """
    return _stateless(lambda seen: norm(_params(seen)))


def gradient_cosine() -> Metric:
    """Measure the cosine of the gradient with that of the previous measurement.

    At the edge of stability successive full-batch gradients oscillate, and the cosine
    goes to -1; within a valley it is near 1. With `every` above 1 it compares gradients
    that many steps apart. It is 0 at the first measurement and where a gradient is 0.

    Returns:
        A metric that remembers the direction of one gradient, in at least float32. For
        `grad` see `gradient_norm`.

    Example:
        >>> from basinax.landscape import metrics, monitor
        >>> tx = monitor({"cosine": metrics.gradient_cosine()})
    """

    def evaluate(memory: PyTree, seen: Observation) -> tuple[PyTree, Array]:
        direction = unit(_like(_gradient(seen), memory))
        return direction, jnp.clip(inner(direction, memory), -1, 1)

    return Metric(_wide_zeros, evaluate)


def _stateless(measure: Callable[[Observation], Array]) -> Metric:
    return Metric(lambda _: (), lambda memory, seen: (memory, measure(seen)))


def _gradient(seen: Observation) -> PyTree:
    return seen.extra.get("grad", seen.updates)


def _params(seen: Observation) -> PyTree:
    if seen.params is None:
        raise ValueError(
            "a metric of this monitor needs params, which are missing; call "
            "tx.update(grads, state, params, ...)."
        )
    return seen.params


def _curvature(seen: Observation) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Return the gradient of the loss that `update` was given, and v -> H v."""
    params, value_fn = _params(seen), seen.extra.get("value_fn")
    if value_fn is None:
        raise ValueError(
            "a metric of this monitor needs the loss as a function of params; call "
            "tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, batch))."
        )
    check_vector(params, "params")
    gradient = jax.grad(lambda p: scalar(value_fn(p), "value_fn"))
    value, product = jax.linearize(gradient, params)
    return value, Partial(_product, product, params)


def _product(
    linear: Callable[[PyTree], PyTree], params: PyTree, vector: PyTree
) -> PyTree:
    return linear(_like(vector, params))


def _like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _wide_zeros(tree: PyTree) -> PyTree:
    def zeros(leaf: Any) -> Array:
        return jnp.zeros_like(leaf, dtype=wide_dtype(leaf))

    return jax.tree.map(zeros, tree)
