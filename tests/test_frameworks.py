"""Training steps inside flax nnx and equinox, with every registered transformation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from registry import CASES, with_variants_later

from basinax.testing._trees import assert_same_structure

pytestmark = pytest.mark.usefixtures("quick_compile")
RATE = 0.02
STEPS = 15

rng = np.random.default_rng(0)
INPUTS = jnp.asarray(rng.standard_normal((32, 4)), jnp.float32)
TARGETS = jnp.sin(INPUTS)


def mean_square(predictions):
    return jnp.mean(jnp.square(predictions - TARGETS))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.gain = nnx.Variable(jnp.float32(1.0))  # not a Param: not trained
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.gain[...] * self.hidden(x)))


@pytest.mark.parametrize("case", with_variants_later(CASES))
def test_flax_nnx(case):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, case.as_optimizer(RATE), wrt=nnx.Param)

    def loss_fn(model):
        return mean_square(model(INPUTS))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        extra = case.extras(lambda p: loss_fn(nnx.merge(graph, p, rest)))
        optimizer.update(model, grads, **extra)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("case", with_variants_later(CASES))
def test_equinox(case):
    model = eqx.nn.MLP(4, 4, 8, 1, activation=jax.nn.tanh, key=jax.random.key(0))
    tx = case.as_optimizer(RATE)
    # The activation is a leaf of the model, so the filtered tree has None in it.
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert None in jax.tree.leaves(params, is_leaf=lambda x: x is None)

    def loss_fn(params):
        return mean_square(jax.vmap(eqx.combine(params, static))(INPUTS))

    @eqx.filter_jit
    def step(params, state):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, **case.extras(loss_fn))
        assert_same_structure(updates, params, "updates")
        return eqx.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0], losses
