"""The perturbation of sharpness-aware methods: one step of length rho up a direction.

    ε = ρ A² q / ‖A q‖₂,    A = 1 (SAM)  or  A = |w| + η elementwise (ASAM)

maximises ⟨q, ε⟩ over the ball ‖A⁻¹ ε‖₂ <= ρ; the norm spans all leaves.  Foret et al.,
"Sharpness-Aware Minimization for Efficiently Improving Generalization" (ICLR 2021,
arXiv:2010.01412); Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for
Scale-Invariant Learning of Deep Neural Networks" (ICML 2021, arXiv:2102.11600).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from basinax.optimizers._checks import is_function


def ascent(
    direction: PyTree,
    params: PyTree,
    rho: Any,
    *,
    adaptive: bool = False,
    eta: Any = 0.0,
    mask: Any = None,
    unscaled: Any = None,
) -> PyTree:
    """Compute ε, in at least float32 and over the whole range of exponents.

    Args:
        direction: tree q, usually a gradient; None for a leaf that stays put.
        params: tree w with the structure of `direction`.
        rho: radius ρ, a scalar; the length of q does not matter.
        adaptive: whether A = |w| + η rather than 1.
        eta: η, a scalar.
        mask: tree (prefix) of booleans, or callable of the parameters returning one;
            leaves marked False stay put and do not count in the norm.
        unscaled: likewise; leaves marked True have A = 1 although `adaptive`.

    Returns:
        ε in the structure of `direction`, with None for every leaf that stays put; all
        zero where A q is, all NaN where an entry of q is not finite.  A constant to
        differentiation.

    Raises:
        TypeError: a leaf is not real floating point, or a mark is no boolean.
        ValueError: `mask` or `unscaled` does not fit the parameters.
    """
    kept = marks(True if mask is None else mask, params, "mask")
    q = jax.tree.map(
        lambda leaf, keep: leaf if keep else None, direction, kept, is_leaf=is_none
    )
    _check_real_leaves(q)
    # A leaf that stays put may be anything, even a function.
    w = jax.tree.map(
        lambda leaf, w: None if leaf is None else w, q, params, is_leaf=is_none
    )
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((q, w)))
    q = _unit(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), q), dtype)
    if adaptive:
        ones = marks(False if unscaled is None else unscaled, params, "unscaled")

        def scale(leaf: Any, one: Any) -> Any:
            if leaf is None:
                return None
            size = jnp.abs(jnp.asarray(leaf, dtype))
            return jnp.ones_like(size) if one else size + jnp.asarray(eta, dtype)

        a = jax.tree.map(scale, w, ones, is_leaf=is_none)
        # Scaled once more: the large weights may be those with small gradients.
        aq = _unit(jax.tree.map(jnp.multiply, a, q), dtype)
        step = jax.tree.map(jnp.multiply, a, aq)
    else:
        step = aq = q
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(aq)]
    norm = jnp.sqrt(functools.reduce(jnp.add, squares, jnp.zeros([], dtype)))
    factor = jnp.asarray(rho, dtype) / jnp.where(norm == 0, 1, norm)
    return jax.lax.stop_gradient(jax.tree.map(lambda leaf: factor * leaf, step))


def shifted(params: PyTree, perturbation: PyTree) -> PyTree:
    """Return w + ε in at least float32, with w itself where ε is None.

    The sum is not rounded to the dtype of a half-precision leaf.  An entry of ε is of
    the order ρ/√D for D parameters, below half a unit in the last place of most
    bfloat16 weights, so that rounding would undo the step.
    """

    def shift(step: Any, w: Any) -> Any:
        if step is None:
            return w
        w = jnp.asarray(w)
        wide = jnp.promote_types(w.dtype, jnp.float32)
        return w.astype(wide) + step.astype(wide)

    return jax.tree.map(shift, perturbation, params, is_leaf=is_none)


def marks(choice: Any, params: PyTree, name: str) -> PyTree:
    """Spread a boolean tree prefix, or a callable's answer, over the parameters."""
    prefix = choice(params) if is_function(choice) else choice

    def spread(mark: Any, branch: PyTree) -> PyTree:
        if not isinstance(mark, bool | np.bool_):
            raise TypeError(
                f"{name} must hold booleans known while tracing, one per leaf or per "
                f"subtree, got {type(mark).__name__}."
            )
        return jax.tree.map(lambda _: bool(mark), branch)

    try:
        return jax.tree.map(spread, prefix, params)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a tree (prefix) of booleans that fits the parameters, or "
            f"a callable of them returning one: got {jax.tree.structure(prefix)} for "
            f"{jax.tree.structure(params)}."
        ) from error


def check_radius(rho: Any, name: str = "rho") -> None:
    """Refuse what is known now to be no finite, non-negative scalar."""
    if isinstance(rho, Tracer):
        return
    try:
        value = np.asarray(rho, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {type(rho).__name__}.") from None
    if value.ndim:
        raise ValueError(f"{name} must be a scalar, got shape {value.shape}.")
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {rho}.")


def _unit(tree: PyTree, dtype: Any) -> PyTree:
    """Divide by the largest absolute entry, so that squares stay in range."""
    peaks = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(tree)]
    peak = functools.reduce(jnp.maximum, peaks, jnp.zeros([], dtype))
    # The reciprocal of the largest numbers is subnormal, which devices flush to zero.
    shrink = jnp.where(peak > 1, 0.25, 1).astype(dtype)
    inverse = 1 / jnp.where(peak == 0, 1, peak * shrink)
    # Products, unlike quotients, are repeated where they are used, not stored.
    return jax.tree.map(lambda leaf: leaf * shrink * inverse, tree)


def _check_real_leaves(tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"cannot perturb {jax.tree_util.keystr(path) or 'a leaf'} of dtype "
                f"{dtype}: only real floating point; leave it out with mask=."
            )


def is_none(x: Any) -> bool:
    """Make None a leaf, for `jax.tree.map`."""
    return x is None
