"""Random keys kept in an optimizer's state, one new key for each update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def as_key(key: Any) -> Array | None:
    """Make a typed random key, in a buffer of its own; None stays None.

    Args:
        key: typed key, uint32 data of one, or an int to be used as a seed.

    Raises:
        TypeError: it is none of these.
        ValueError: it is an array of several keys.
    """
    if key is None:
        return None
    dtype = jnp.result_type(key) if isinstance(key, jax.Array | np.ndarray) else None
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        # The state may be donated, and the caller keeps the key.
        data = jnp.array(jax.random.key_data(key))
        made = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    elif dtype == jnp.uint32 and np.ndim(key):
        made = jax.random.wrap_key_data(jnp.array(key))
    elif not isinstance(key, bool) and (
        isinstance(key, int | np.integer)
        or (dtype is not None and jnp.issubdtype(dtype, jnp.integer))
    ):
        made = jax.random.key(key)
    else:
        raise TypeError(
            "key is a random key, as made by jax.random.key, or an int as its seed; "
            f"got {type(key).__name__}."
        )
    if made.shape:
        raise ValueError(f"one random key is needed, got an array of {made.shape}.")
    return made


def next_key(given: Any, kept: Array | None) -> tuple[Array | None, Array | None]:
    """Choose the key of an update.

    Args:
        given: key handed to the update, which takes precedence, or None.
        kept: key in the state, or None.

    Returns:
        The key to use now and the one to keep, which does not change if one was given.
    """
    if given is not None:
        return as_key(given), kept
    if kept is None:
        return None, None
    later, now = jax.random.split(kept)
    return now, later
