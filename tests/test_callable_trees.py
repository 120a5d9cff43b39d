"""Options given as an Equinox module, which is a tree and can be called as well."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax import landscape
from basinax import optimizers as bx

MODULE = eqx.filter(eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.is_inexact_array)
# The same parameters in a tree that cannot be called.
PLAIN = {"weight": MODULE.weight, "bias": MODULE.bias}


def as_plain(module):
    return {"weight": module.weight, "bias": module.bias}


def loss(params):
    return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(params))


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def transposed(params):
    numbers = optax.contrib.MuonDimensionNumbers(1, 0)
    return jax.tree.map(lambda leaf: numbers if leaf.ndim == 2 else None, params)


MAKERS = {
    "sam mask": lambda p: bx.sam(0.1, mask=matrices(p)),
    "sam unscaled": lambda p: bx.sam(0.1, adaptive=True, unscaled=matrices(p)),
    "keep_masked": lambda p: bx.keep_masked(matrices(p)),
    "dimension_numbers": lambda p: bx.spectral_clip(
        0.1, dimension_numbers=transposed(p)
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_transformations_take_it_for_a_tree(make):
    assert callable(matrices(MODULE))
    found = []
    for params in (MODULE, PLAIN):
        tx = make(params)
        updates, _ = tx.update(params, tx.init(params), params, value_fn=loss)
        found.append(updates)
    for leaf, same in zip(*map(as_leaves, found), strict=True):
        np.testing.assert_array_equal(leaf, same)


def as_leaves(tree):
    plain = tree if isinstance(tree, dict) else as_plain(tree)
    return [plain["weight"], plain["bias"]]


def test_owners_and_masks_of_instruments():
    owner = jax.tree.map(lambda leaf: -1 if leaf.ndim == 2 else 0, MODULE)
    losses = lambda p: jnp.stack([loss(p), jnp.sum(p.weight)])  # noqa: E731
    _, grads = bx.task_gradients(losses, owner=owner)(MODULE)
    assert grads.shared.weight.shape == (2, *MODULE.weight.shape)
    assert grads.shared.bias is None
    (step,) = landscape.random_directions(
        MODULE, jax.random.key(0), None, num=1, mask=matrices(MODULE)
    )
    assert step.weight.any()
    assert not step.bias.any()
    found = landscape.nlm_alignment(MODULE, MODULE, mask=matrices(MODULE))
    same = landscape.nlm_alignment(PLAIN, PLAIN, mask=matrices(PLAIN))
    np.testing.assert_array_equal(jax.tree.leaves(found), jax.tree.leaves(same))
