"""Spectral clipping of a tree of updates, the transformation of SPECTRA.

For a matrix direction U and a threshold c_k the update becomes

    alpha C(U),   alpha = sqrt(max(1, fan_out / fan_in)),

with C the soft clip U ↦ (I + U Uᵀ/c²)^(-1/2) U, the hard clip σ ↦ min(σ, c), or an
orthogonalisation.  Vectors follow the same formula with their Euclidean norm as only
singular value.  Jiang, Semenov and Stich, "Enhancing LLM Training via Spectral
Clipping" (ICML 2026, arXiv:2603.14315).
"""

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from basinax.optimizers._checks import (
    check_choice,
    check_real,
    check_steps,
    check_threshold,
)
from basinax.optimizers._hard_clip import hard_clip
from basinax.optimizers._layout import move_shards, on_auto_axes
from basinax.optimizers._matrices import (
    Matrices,
    as_matrices,
    assign_dimension_numbers,
    check_dimension_numbers,
)
from basinax.optimizers._options import takes_options_of
from basinax.optimizers._orthogonalize import EPS, STEPS, orthogonalize_wide
from basinax.optimizers._scaling import unit_scale
from basinax.optimizers._soft_clip import NEWTON_SCHULZ_STEPS, Method, clip_wide

Kind = Literal["soft", "hard", "normalize"]
Vectors = Literal["smooth", "reference", "skip"]


class SpectralClipState(NamedTuple):
    """State of `spectral_clip`.

    Attributes:
        count: number of updates so far, int32 scalar; the argument of the threshold's
            schedule.
    """

    count: Int[Array, ""]


def spectral_clip(
    threshold: optax.ScalarOrSchedule,
    *,
    kind: Kind = "soft",
    method: Method = "auto",
    dimension_numbers: Any = None,
    aspect_scale: bool = True,
    vectors: Vectors = "smooth",
    batch_same_shapes: bool = True,
    steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip the singular values of every matrix in the updates.

    Put it after a base direction and before weight decay and learning rate, so that
    neither is clipped: `optax.chain(optax.scale_by_adam(), spectral_clip(10.0),
    optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3))`, which is what
    `spectra` builds.

    Cost for an m×n matrix, m <= n, with the polynomial method: two products of 2m²n and
    twelve of 2m³ flops; no state but a counter.

    Args:
        threshold: c >= 0 in the units of the incoming updates, a number or a schedule
            of the step.  0 gives zero updates, ∞ leaves them as they are.
        kind: "soft" (SPECTRA's code), "hard" (its theory; singular value
            decompositions) or "normalize" (Muon-like; ignores the threshold).
        method: how "soft" is computed, see `soft_spectral_clip`.
        dimension_numbers: which axes of a leaf make the matrix.  By default a 2-D leaf
            is (in, out) as in Flax, and a leaf with more axes is an error.  Otherwise
            one `optax.contrib.MuonDimensionNumbers` for every leaf with at least two
            axes, a tree (prefix) of them with None for "not a matrix, leave it alone",
            or a callable of params returning one of these.  PyTorch's (out, in) is
            `MuonDimensionNumbers(1, 0)`; an embedding table (vocab, d), whose output
            is the vocabulary side in the authors' scaling, likewise; layers stacked on
            leading axes are `MuonDimensionNumbers(-2, -1)`.
        aspect_scale: multiply clipped matrices by alpha.
        vectors: what to do with leaves of at most one axis.  "smooth":
            v / sqrt(1 + ‖v‖²/c²), the matrix formula.  "reference": the same, but
            unchanged while ‖v‖ <= c as in the authors' code, which jumps at ‖v‖ = c.
            "skip": unchanged.
        batch_same_shapes: process matrices of equal shape as one stack.
        steps: iterations of method "newton_schulz" (default 10) and of kind
            "normalize" (default 5); a compile-time int.

    Returns:
        A transformation with `SpectralClipState`.  Updates keep shape, dtype and
        sharding.  A matrix with a non-finite entry becomes NaN as a whole, others are
        not affected.

    Raises:
        TypeError: on integer or complex leaves, a threshold that is not a number, or
            dimension numbers of another kind.
        ValueError: on a negative or NaN threshold, an unknown word, overlapping axes,
            axes that a leaf does not have, a tree prefix that does not fit, or a leaf
            with three axes or more and no dimension numbers.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from basinax.optimizers import spectral_clip
        >>> tx = optax.chain(spectral_clip(1.0, aspect_scale=False), optax.sgd(1.0))
        >>> params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
        >>> grads = {"w": 100 * jnp.eye(2, 3), "b": jnp.array([0.0, 0.0, 1.0])}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> updates["w"].round(2)
        Array([[-1., -0., -0.],
               [-0., -1., -0.]], dtype=float32)
        >>> round(float(updates["b"][2]), 4)  # -1 / sqrt(1 + 1)
        -0.7071

    Reference:
        arXiv:2603.14315; aspect scale and vector rule from the authors' code.
    """
    check_choice("kind", kind, get_args(Kind))
    check_choice("method", method, get_args(Method))
    check_choice("vectors", vectors, get_args(Vectors))
    check_dimension_numbers(dimension_numbers)
    if not callable(threshold):
        check_threshold(threshold)
    default_steps = STEPS if kind == "normalize" else NEWTON_SCHULZ_STEPS
    steps = check_steps(default_steps if steps is None else steps)
    clip = StackClip(kind, method, steps)

    def init_fn(params: optax.Params) -> SpectralClipState:
        del params
        return SpectralClipState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SpectralClipState]:
        del params, extra_args
        c = jnp.asarray(threshold(state.count) if callable(threshold) else threshold)
        named, treedef = jax.tree.flatten_with_path(updates)
        names = [jax.tree_util.keystr(path) for path, _ in named]
        leaves = [leaf for _, leaf in named]
        specs = assign_dimension_numbers(dimension_numbers, updates)
        groups: dict[Any, list[tuple[int, Matrices]]] = {}
        for i, (leaf, spec, name) in enumerate(zip(leaves, specs, names, strict=True)):
            check_real(leaf, f" at {name}")
            if jnp.size(leaf) == 0:
                continue
            if jnp.ndim(leaf) < 2:
                leaves[i] = _clip_vector(leaf, c, kind, vectors)
            elif (reading := as_matrices(leaf, spec, name)) is not None:
                alone = None if batch_same_shapes else i
                key = (reading.short_long, jnp.result_type(leaf), alone)
                groups.setdefault(key, []).append((i, reading))
        for members in groups.values():
            indices, readings = zip(*members, strict=True)
            results = _clip_matrices(
                [leaves[i] for i in indices], c, readings, clip, aspect_scale
            )
            for i, result in zip(indices, results, strict=True):
                leaves[i] = result
        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.unflatten(treedef, leaves), SpectralClipState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@takes_options_of(spectral_clip)
def pre_spectral_clip(
    threshold: optax.ScalarOrSchedule,
    *,
    aspect_scale: bool = False,
    vectors: Vectors = "skip",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Clip raw gradients spectrally, before the optimizer sees them.

    Place it first in a chain, ahead of any global-norm clipping.  It is `spectral_clip`
    with the authors' choices for raw gradients: no aspect scale, vectors untouched.

    Args:
        threshold: c >= 0 in the units of the gradient; the authors use 0.1.
        aspect_scale: as in `spectral_clip`.
        vectors: as in `spectral_clip`.
        **options: further keyword arguments of `spectral_clip`.

    Returns:
        The transformation.

    Example:
        >>> import optax
        >>> from basinax.optimizers import pre_spectral_clip
        >>> tx = optax.chain(pre_spectral_clip(0.1), optax.adamw(1e-3))
    """
    return spectral_clip(
        threshold, aspect_scale=aspect_scale, vectors=vectors, **options
    )


def aspect_ratio_scale(reading: Matrices) -> float:
    """Return sqrt(max(1, fan_out / fan_in))."""
    return math.sqrt(max(1.0, reading.fan_out / reading.fan_in))


class StackClip(NamedTuple):
    """The clip of a stack of matrices (batch, short, long); hashable, hence static."""

    kind: Kind
    method: Method
    steps: int

    def __call__(self, x: Array, c: Array) -> Array:
        """Clip every matrix of the stack by itself."""
        kind, method, steps = self
        if kind == "hard":
            return hard_clip(x, c)
        if kind == "normalize":
            return orthogonalize_wide(x, steps)
        if method == "newton_schulz":  # on a stack it would share one spectral bound
            return jax.vmap(lambda x: clip_wide(x, c, method, steps))(x)
        return clip_wide(x, c, method, steps)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _clip_matrices(
    leaves: list[Array],
    threshold: Array,
    readings: tuple[Matrices, ...],
    clip: StackClip,
    aspect_scale: bool,
) -> list[Array]:
    def run(
        axes: tuple[str, ...], leaves: list[Array], threshold: Array
    ) -> list[Array]:
        stacks = [r.wide(leaf) for r, leaf in zip(readings, leaves, strict=True)]
        stack = stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)
        clipped = move_shards(clip(move_shards(stack, axes), threshold), axes)
        results, start = [], 0
        for reading in readings:
            part = reading.leaf(clipped[start : start + reading.batch])
            scale = aspect_ratio_scale(reading) if aspect_scale else 1.0
            results.append(part if scale == 1 else part * scale)
            start += reading.batch
        return results

    return on_auto_axes(run, leaves, threshold)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _clip_vector(
    v: Float[Array, "..."], threshold: Array, kind: Kind, vectors: Vectors
) -> Float[Array, "..."]:
    if vectors == "skip":
        return v
    work = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    c = threshold.astype(work.dtype)
    scaled, scale = unit_scale(work, None)
    scale = scale.reshape(())
    norm = jnp.sqrt(jnp.sum(scaled**2))  # of v / scale
    norm = jnp.where(norm > 0, norm, 1)
    r = jnp.where(scale > 0, scale / c * norm, 0)  # ‖v‖ / c, may be ∞
    if kind == "normalize":
        out = scaled / (norm + EPS / jnp.where(scale > 0, scale, 1))
    else:
        # Inside and outside the ball, each in the form that cannot overflow.
        smooth = kind == "soft"
        inside = work / jnp.sqrt(1 + r**2) if smooth and vectors == "smooth" else work
        shrink = 1 / jnp.sqrt(1 + 1 / jnp.maximum(r, 1) ** 2) if smooth else 1
        out = jnp.where(r <= 1, inside, c * shrink * (scaled / norm))
    return jnp.where(jnp.isfinite(scale), out, jnp.nan).astype(v.dtype)
