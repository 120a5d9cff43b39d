"""What `aggregate` calls: (weights, state) = update(state, gramian, losses, key).

A weighting turns the T×T Gram matrix of the task gradients, or the T task losses, into
one weight per task.  Those that need no memory are plain functions of the Gram matrix;
the others are pairs (init, update).
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WeightingFunction = Callable[..., Float[Array, " T"]]

_MISSING = {
    "losses": "the task losses: pass losses=, of shape (num_tasks,), to each update",
    "key": "random numbers: pass a random key or seed, key=, where the transformation "
    "is made, or key= to each update",
}


class Weighting(NamedTuple):
    """A weighting with memory, as a pair of pure functions.

    Write your own like this, for weights inversely proportional to the losses:

        def update(state, *, gramian, losses, key):
            return 1 / losses, state

        inverse = Weighting(init=lambda num_tasks: (), update=update)

    Attributes:
        init: `init(num_tasks) -> state`; num_tasks may be None for weightings that do
            not need it.
        update: `update(state, *, gramian, losses, key) -> (weights, state)`, where
            each keyword may be None and weights have shape (num_tasks,).
    """

    init: Callable[[int | None], Any]
    update: Callable[..., tuple[Float[Array, " T"], Any]]


def as_weighting(weighting: Weighting | WeightingFunction) -> Weighting:
    """Make a pair of a function of the Gram matrix; pairs stay as they are.

    The function may also name `losses` or `key` among its parameters.
    """
    if isinstance(weighting, Weighting):
        return weighting
    if not callable(weighting):
        raise TypeError(
            "a weighting is a function of the Gram matrix, such as mgda_weights, or a "
            f"Weighting, such as famo(); got {type(weighting).__name__}."
        )
    named = inspect.signature(weighting).parameters
    wanted = [named[name] for name in _MISSING if name in named]

    def update(state: Any, *, gramian: Any, **available: Any) -> tuple[Array, Any]:
        given = {}
        for parameter in wanted:
            if available[parameter.name] is not None:
                given[parameter.name] = available[parameter.name]
            elif parameter.default is parameter.empty:
                needed(
                    None, parameter.name, getattr(weighting, "__name__", "weighting")
                )
        return weighting(gramian, **given), state

    return Weighting(no_state, update)


def no_state(num_tasks: int | None) -> tuple[()]:
    """Start a weighting that remembers nothing."""
    del num_tasks
    return ()


def needed(value: Any, name: str, weighting: str) -> Any:
    """Return `losses` or `key`, or say how to provide it."""
    if value is None:
        raise ValueError(f"{weighting} needs {_MISSING[name]}.")
    return value


def needed_num_tasks(num_tasks: Any, weighting: str) -> int:
    """Return the number of tasks, or say how to provide it."""
    if num_tasks is None:
        raise ValueError(
            f"{weighting} keeps numbers for each task in the optimizer state, which is "
            "made before any task gradient is seen: pass num_tasks=."
        )
    return check_count(num_tasks, "num_tasks")


def check_count(value: Any, name: str) -> int:
    """Refuse what cannot be a number of tasks or steps."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name} is a compile-time int, got {type(value).__name__}; under "
            "optax.inject_hyperparams list it in static_args."
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return int(value)


def unless_finite(
    losses: Float[Array, " T"], weights: Float[Array, " T"], state: Any, previous: Any
) -> tuple[Array, Any]:
    """Answer losses that are not finite by NaN weights and the previous state.

    The NaN shows in the update at hand, but does not stay in the weighting's memory.
    """
    finite = jnp.all(jnp.isfinite(losses))
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    return keep(weights, jnp.nan), jax.tree.map(keep, state, previous)
