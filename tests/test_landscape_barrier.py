"""Barriers on paths, by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basinax.landscape import Path, barrier


@pytest.mark.parametrize(
    ("positions", "losses", "expected"),
    [
        # height, position, maximum, score
        ([0, 0.25, 0.5, 1], [1, 4, 3, 3], (2.5, 0.25, 4, -2)),
        ([0, 0.5, 1], [3, 1, 3], (0, 0, 3, 2)),
        # The score's t* is an end here.
        ([0, 0.5, 1], [0, 2.5, 4], (0.5, 0.5, 4, 2)),
        # Any order; beyond the ends nothing counts.
        ([2, 1, -1, 0, 0.5], [99, 1, 98, 1, 3], (2, 0.5, 3, -2)),
        ([0, 0.5, 1], [1, np.inf, 1], (np.inf, 0.5, np.inf, -np.inf)),
        ([0, 0.5, 1], [1, np.nan, 1], (np.nan,) * 4),
        ([0, 0.5, 1], [np.nan, 1, 1], (np.nan,) * 4),
        ([0, 0.5, 1], [np.inf, 1, 1], (np.nan,) * 4),
        # In floats 0.1 (1 - t) + 0.1 t is not always 0.1.
        (np.linspace(0, 1, 101), np.full(101, 0.1), (0, 0, 0.1, 0)),
    ],
)
def test_barrier_by_hand(positions, losses, expected):
    path = Path(jnp.array(positions, float), jnp.array(losses, float))
    np.testing.assert_allclose(barrier(path), expected, rtol=1e-6, atol=0)


def test_barrier_of_any_path():
    path = types.SimpleNamespace(positions=[0, 0.5, 1], losses=np.array([1, 5, 1]))
    assert barrier(path) == (4, 0.5, 5, -4)
    assert barrier(path).height.dtype == jnp.float32


def test_mistakes():
    with pytest.raises(ValueError, match=r"must hold 0 and 1; got \[0.0, 0.5\]"):
        barrier(Path([0.0, 0.5], [1.0, 1.0]))
    with pytest.raises(ValueError, match=r"of shape \(2,\), got \(3,\)"):
        barrier(Path(jnp.array([0.0, 1.0]), jnp.ones(3)))
    with pytest.raises(ValueError, match="call it outside jit"):
        jax.jit(lambda x: barrier(Path(jnp.arange(2.0), x)).height)(jnp.ones(2))
