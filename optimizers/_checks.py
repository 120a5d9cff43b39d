"""Checks of user input: one clear error at construction or trace time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array


def is_function(choice: Any) -> bool:
    """Tell a function of params from a tree that can be called, as Equinox modules can.

    A tree of options made by mapping over such a module is a module itself.
    """
    return callable(choice) and (
        isinstance(choice, Partial) or jax.tree_util.all_leaves([choice])
    )


def check_choice(name: str, value: Any, valid: tuple[str, ...]) -> None:
    """Refuse a word that is not in the list."""
    if value not in valid:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(valid)}.")


def check_steps(steps: Any) -> int:
    """Refuse an iteration count that is not a static positive int."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise TypeError(
            f"steps is a compile-time int, got {type(steps).__name__}; under "
            "optax.inject_hyperparams list it in static_args."
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    return int(steps)


def check_threshold(threshold: Any) -> None:
    """Refuse a threshold that is known now to be negative or NaN."""
    if isinstance(threshold, Tracer):
        return
    try:
        values = np.asarray(threshold, np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"threshold must be a number, got {type(threshold).__name__}."
        ) from None
    if np.any(np.isnan(values)) or np.any(values < 0):
        raise ValueError(f"threshold must be >= 0 (0 and inf are fine): {threshold}.")


def check_matrix_and_threshold(x: Any, threshold: Any) -> tuple[Array, Array]:
    """Check the operands of a clip kernel and turn them into arrays."""
    check_threshold(threshold)
    x, threshold = jnp.asarray(x), jnp.asarray(threshold)
    check_real(x)
    if x.ndim < 2:
        raise ValueError(
            f"need a matrix or a stack of matrices, got shape {x.shape}; for a vector "
            "use x[None]."
        )
    batch = x.shape[:-2]
    if threshold.ndim and threshold.shape != batch:
        raise ValueError(
            f"threshold of shape {threshold.shape} fits no matrix stack of shape "
            f"{batch}; pass a scalar or one value per matrix."
        )
    return x, threshold


def check_real(x: Any, where: str = "") -> None:
    """Refuse integer and complex arrays."""
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"spectral maps need real floating point, got {dtype}{where}; cast "
            "integers, and split complex leaves into real and imaginary parts."
        )
