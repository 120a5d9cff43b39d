"""⊥Grad: remove from the gradient its component along the weights.

    g_⊥ = g - (⟨w, g⟩ / ⟨w, w⟩) w,        output = g_⊥ ‖g‖ / ‖g_⊥‖

Once a model fits its training data it can lower the loss without changing its
predictions, by scaling its weights up.  Without that direction the step must change the
function, and generalization comes with the fit instead of long after it.
Prieto et al., "Grokking at the Edge of Numerical Stability" (ICLR 2025,
arXiv:2501.04697), Definition 7; the rescaling to the full norm is their code's.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Inexact

from basinax.optimizers._blocks import (
    Axes,
    AxesOf,
    Scope,
    check_scope,
    match,
    slice_axes,
)
from basinax.optimizers._tangent import project


def project_orthogonal(
    gradient: Inexact[Array, "..."],
    weight: Inexact[Array, "..."],
    *,
    rescale: bool = True,
    axes: Axes = None,
) -> Inexact[Array, "..."]:
    """Project a gradient onto the orthogonal complement of the weights.

    The sign and the scale of `weight` do not matter.  A gradient parallel to the
    weights, to rounding, gives exact zeros; zero weights leave it as it is.  The
    arithmetic is in at least float32 and holds over the whole range of exponents:
    |cos| between output and weights stays near rounding, however parallel they were.
    A NaN or an infinity makes the whole block NaN.

    Args:
        gradient: array of any shape, real or complex (with the real inner product).
        weight: array of the same shape.
        rescale: whether to restore the norm the gradient had.
        axes: axes that form one vector, the others being a batch; default all.

    Returns:
        The projection, in the shape and dtype of `gradient`.

    Raises:
        TypeError: an operand is not floating point.
        ValueError: the shapes differ or an axis is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.optimizers import project_orthogonal
        >>> project_orthogonal(jnp.array([3.0, 4.0]), jnp.array([2.0, 0.0]))
        Array([0., 5.], dtype=float32)

    Reference:
        arXiv:2501.04697, Definition 7.
    """
    g, w = jnp.asarray(gradient), jnp.asarray(weight)
    for name, x in (("gradient", g), ("weight", w)):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating point or complex, got {x.dtype}.")
    if g.shape != w.shape:
        raise ValueError(
            f"gradient of shape {g.shape} and weight of shape {w.shape} must agree."
        )
    if axes is not None:
        axes, whole = slice_axes(axes, (), g)
        axes = None if whole else axes
    return project([g], [w], axes, rescale, None, None)[0]


def perp_grad(
    *,
    rescale: bool = True,
    scope: Scope = "leaf",
    axes: AxesOf = None,
    min_size: int = 2,
    max_rescale: Any = None,
    radial_scale: Any = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Project the updates orthogonally to the parameters.

    Place it before the optimizer, after clipping: `chain(clip_by_global_norm(1.0),
    perp_grad(), adamw(1e-2))`.  Adam's elementwise division then tilts the step again,
    so the weights still grow, if slowly; `chain(scale_by_adam(), perp_grad(), ...)`
    makes the step itself orthogonal.  Decoupled weight decay is radial and survives; an
    L2 term in the loss, or `add_decayed_weights` placed before, is projected away.
    Under `optax.MultiSteps` put it inside, so that it meets the mean gradient.

    Biases, gains of norm layers and matrices that start at zero have gradients nearly
    parallel to themselves, which rescaling blows up: mask them out, with
    `mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)`.

    Args:
        rescale: whether to restore the norm that the block's gradient had.
        scope: what one projection spans: "leaf" (as the authors), "global" (the tree),
            or "neuron" (the weights of one output).
        axes: for scope "neuron", the axes of a slice, or a callable of (key path, leaf)
            that returns them.  Default: all but the last, for Flax's (..., in, out);
            for PyTorch's and Equinox's (out, in, ...) it is all but the first.  Leaves
            of one axis are one slice.
        min_size: leaves or slices with fewer entries pass unchanged; projected, a
            single number would never move.
        max_rescale: largest factor of the rescaling, at least 1; default unlimited.
            It is 1/sin of the angle between gradient and weights.
        radial_scale: weight of the radial part that is added back; 1 and
            `rescale=False` give the identity.
        mask: tree of booleans, or callable of the parameters returning one; leaves
            marked False pass unchanged and do not count in scope "global".

    Returns:
        A stateless transformation.  None and integer leaves pass unchanged; a NaN in
        a block's gradient or weights makes that block NaN.

    Raises:
        ValueError: scope is unknown, axes do not fit, `max_rescale` is below 1 or
            without rescaling, `min_size` is below 1; in `update`, params are missing or
            differ from the updates in structure or shape.

    Example:
        >>> import optax
        >>> from basinax.optimizers import perp_grad
        >>> tx = optax.chain(perp_grad(), optax.adamw(1e-2))

    Reference:
        arXiv:2501.04697, Definition 7 and equation 12.
    """
    check_scope(scope, axes)
    if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 1:
        raise ValueError(
            f"min_size must be a compile-time int of at least 1, got {min_size!r}; "
            "under optax.inject_hyperparams list it in static_args."
        )
    _check_max_rescale(max_rescale, rescale)
    # Zero known now saves the term.
    known = not isinstance(radial_scale, Tracer | jax.Array)
    radial = None if known and radial_scale == 0 else radial_scale

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        flat, weights, treedef = match(updates, params, "perp_grad")
        out = [g for _, g in flat]
        blocks: list[tuple[list[int], tuple[int, ...] | None]] = []
        for i, (path, g) in enumerate(flat):
            if g is None or not jnp.issubdtype(jnp.result_type(g), jnp.inexact):
                continue
            g = out[i] = jnp.asarray(g)
            kept, whole = tuple(range(g.ndim)), True
            if scope == "neuron":
                kept, whole = slice_axes(axes, path, g)
            if g.size and math.prod(g.shape[axis] for axis in kept) >= min_size:
                blocks.append(([i], None if whole else kept))
        if scope == "global" and blocks:
            blocks = [([i for members, _ in blocks for i in members], None)]
        for members, block_axes in blocks:
            projected = project(
                [out[i] for i in members],
                [jnp.asarray(weights[i]) for i in members],
                block_axes,
                rescale,
                max_rescale,
                radial,
            )
            for i, leaf in zip(members, projected, strict=True):
                out[i] = leaf
        return treedef.unflatten(out), state

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    return tx if mask is None else optax.masked(tx, mask)


def _check_max_rescale(max_rescale: Any, rescale: bool) -> None:
    if max_rescale is None:
        return
    if not rescale:
        raise ValueError("max_rescale limits a rescaling that rescale=False turns off.")
    if not isinstance(max_rescale, Tracer) and not max_rescale >= 1:
        raise ValueError(
            f"max_rescale must be at least 1, the factor of an orthogonal gradient, "
            f"got {max_rescale}."
        )
