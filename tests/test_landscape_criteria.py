"""The type of a Hessian spectrum, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from basinax.landscape import Density, spectrum_type


def density(*nodes):
    """Make what the criteria look at from the nodes of some probes."""
    nodes = jnp.array(nodes, jnp.float32)
    empty = jnp.zeros(1)
    return Density(empty, empty, empty, nodes, jnp.full_like(nodes, 1 / nodes.shape[1]))


@pytest.mark.parametrize(
    ("nodes", "ratio", "mainly_positive"),
    [
        ([[-1.0, 0.0, 4.0]], -0.25, True),
        ([[-6.0, 0.0, 10.0]], -0.6, True),  # the bound counts as positive
        ([[-6.1, 0.0, 10.0]], -0.61, False),
        # The mean over probes, not the ratio of the outermost nodes.
        ([[-1.0, 1.0], [-1.0, 10.0]], -0.55, True),
        ([[1.0, 4.0]], 0.25, True),
        # Without a positive part; the bare quotients are 2 and -4 / 0.
        ([[-4.0, -2.0]], -np.inf, False),
        ([[-4.0, 0.0]], -np.inf, False),
        ([[0.0, 0.0]], np.nan, False),
        ([[np.nan, 1.0]], np.nan, False),
    ],
)
def test_spectrum_type(nodes, ratio, mainly_positive):
    found = spectrum_type(density(*nodes))
    np.testing.assert_allclose(found.ratio.value, ratio, rtol=1e-6)
    assert bool(found.mainly_positive) == mainly_positive
    if len(nodes) == 2:  # of -1 and -0.1
        np.testing.assert_allclose(found.ratio.standard_error, 0.45, rtol=1e-6)


def test_other_thresholds():
    found = density([-1.0, 4.0])
    assert not spectrum_type(found, -0.2).mainly_positive
    assert spectrum_type(found, -0.3).mainly_positive
