"""Compiled oracles, directions and comparisons that the tests of SAMO share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from small_tasks import (
    bowls,
    perturbations,
)

from basinax.optimizers import (
    samo_value_and_grad,
)

AXES = ["map", "unroll", "vmap"]
LOCALS = ["spsa", "exact", "none"]


def owner_of_network(params):
    """As a callable, so that it can be part of a cache key."""
    return {"body": -1, "bias": -1, "heads": list(range(len(params["heads"])))}


@functools.cache
def compiled(losses_fn, **options):
    """Compile once per set of options; numbers are traced."""

    def fn(params, *args, numbers, **kwargs):
        oracle = samo_value_and_grad(
            losses_fn, diagnostics=True, **options, **dict(numbers)
        )
        return oracle(params, *args, **kwargs)

    return jax.jit(fn)


def on_bowls(problem, numbers, **options):
    """Return losses, perturbations, norms in the metric used, diagnostics."""
    params, slopes = problem
    extra = {k: options.pop(k) for k in ("key", "directions") if k in options}
    fn = compiled(bowls, **options)
    losses, grads, diagnostics = fn(params, slopes, numbers=numbers, **extra)
    return losses, perturbations(params, slopes, grads.shared), diagnostics


def same(found, wanted, rtol=1e-12):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = float(jnp.max(jnp.abs(y), initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale + 1e-300)


def random_directions(params, tasks, samples, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.standard_normal((tasks, samples, *jnp.shape(w)))),
        params,
    )
