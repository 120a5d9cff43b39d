"""The check of an operator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_net import data, loss, point

from basinax.landscape import (
    check_operator,
    hessian,
)

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(jnp.float32, 1e-30), (jnp.float32, 1e30), (jnp.bfloat16, 1)],
)
def test_right_operators_pass(dtype, scale):
    params, batch = point(dtype), data(5, dtype)

    def scaled(params, x, y):
        return jnp.asarray(scale, dtype) * loss(params, x, y)

    check_operator(hessian(scaled, params, *batch), params, key=KEY)
    check_operator(lambda v: jax.tree.map(jnp.zeros_like, v), params, key=KEY)


def test_wrong_operators_are_named():
    like = {"a": jnp.ones((30, 40)), "b": None}
    count = iter(range(100))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(30, 30)), jnp.float32)

    def apply(function):
        return lambda v: {"a": function(v["a"]), "b": None}

    for function, message in (
        (lambda a: a * (1 + 0.01 * next(count)), "not deterministic.*dropout"),
        (lambda a: jnp.sin(1e-1 * a), "not linear.*finite difference"),
        (lambda a: weights @ a, "not symmetric"),
        (lambda a: a / 0, "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            check_operator(apply(function), like, key=KEY)
    symmetric = weights + weights.T
    check_operator(apply(lambda a: symmetric @ a), like, key=KEY)
    # Half a percent is seen among 1,200 numbers, and is within a wide tolerance.
    slightly = symmetric + 0.005 * weights
    check_operator(apply(lambda a: slightly @ a), like, key=KEY, tol=0.1)
    with pytest.raises(ValueError, match="not symmetric"):
        check_operator(apply(lambda a: slightly @ a), like, key=KEY)
    with pytest.raises(ValueError, match="must be shaped like"):
        check_operator(lambda v: v["a"], like, key=KEY)
