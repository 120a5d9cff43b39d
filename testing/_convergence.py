"""Checks that a transformation, at a falling learning rate, finds a minimum."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from basinax.testing._case import Case, LossFn
from basinax.testing._trees import Tree, assert_close, zeros

STEPS = 400


def _descent(
    case: Case, rate: float, loss_fn: LossFn
) -> tuple[Callable[..., Tree], Callable[..., tuple[Tree, Tree]]]:
    """Return init and `update(step, grads, state, params)` of an optimizer.

    Its rate falls to zero because updates that do not shrink with the gradient (sign,
    normalised) would otherwise end up circling the target. It is rebuilt in every step
    if it does not take schedules.
    """
    falling = optax.linear_schedule(rate, 0.0, STEPS)
    if not case.is_optimizer or "learning_rate" in case.schedules:
        tx = case.as_optimizer(falling)
        update = case.updater(tx, loss_fn)
        return tx.init, lambda _, *arguments: update(*arguments)

    def rebuilt(step: jax.Array, *arguments: Tree) -> tuple[Tree, Tree]:
        return case.updater(case.as_optimizer(jnp.asarray(falling(step))), loss_fn)(
            *arguments
        )

    return case.as_optimizer(rate).init, rebuilt


def _run(case: Case, rate: float, start: Tree, target: Tree) -> Tree:
    """Return the parameters after descending the squared distance from `target`."""

    def loss_fn(params: Tree) -> jax.Array:
        errors = jax.tree.map(lambda p, t: jnp.sum(jnp.square(p - t)), params, target)
        return jax.tree.reduce(jnp.add, errors)

    init, update = _descent(case, rate, loss_fn)

    @jax.jit
    def run(params: Tree) -> Tree:
        def step(carry: tuple[Tree, Tree], i: jax.Array) -> tuple[Tree, None]:
            params, state = carry
            updates, state = update(i, jax.grad(loss_fn)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, init(params)), jnp.arange(STEPS))[0][0]

    return run(start)


def _assert_converges(case: Case, start: Tree, target: Tree) -> None:
    misses = []
    for rate in case.learning_rates:
        what = f"params after {STEPS} steps at a rate falling from {rate:g}"
        try:
            return assert_close(
                _run(case, rate, start, target), target, what, atol=0.03
            )
        except AssertionError as miss:
            misses.append(str(miss))
    if len(misses) > 1:
        misses = [miss.split("; got")[0] for miss in misses]
    raise AssertionError("\n".join(misses))


def check_converges_on_parabola(case: Case) -> None:
    """The minimum of a quadratic in one vector is found."""
    _assert_converges(case, jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0]))


def check_converges_on_mixed_target(case: Case) -> None:
    """The minimum of a quadratic in a vector and a matrix is found."""
    target = {
        "vector": jnp.array([1.0, -1.0, 2.0]),
        "matrix": jnp.array([[3.0, -2.0, 0.5], [1.0, 4.0, -0.5]]),
    }
    _assert_converges(case, zeros(target), target)
