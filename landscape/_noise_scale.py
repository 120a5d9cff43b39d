"""Gradient noise scale: the batch size beyond which larger batches stop helping.

    B = tr S / ‖G‖²

with S the covariance of the gradient of one example and G the true gradient. A batch of
b examples has E ‖g_b‖² = ‖G‖² + tr S / b, whence two batch sizes b < c give

    ‖G‖² = (c ‖g_c‖² - b ‖g_b‖²) / (c - b),   tr S = (‖g_b‖² - ‖g_c‖²) / (1/b - 1/c),

and n gradients g_i of b examples each, with the mean ḡ,

    tr S = b Σ ‖g_i - ḡ‖² / (n - 1),          ‖G‖² = ‖ḡ‖² - tr S / (n b),

all unbiased. Their ratio is not, but consistent.

Reference: McCandlish, Kaplan, Amodei et al., *An empirical model of large-batch
training*, arXiv:1812.06162, appendix A.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from basinax.landscape._gradient_deviations import GradientDeviations, as_deviations
from basinax.landscape._probes import Estimate
from basinax.landscape._stacked import power_of_two
from basinax.landscape._vectors import wide_dtype


class NoiseScale(NamedTuple):
    """Size of the noise in stochastic gradients.

    To follow it in training, average `trace` and `squared_norm` over steps and divide
    the averages: a mean of ratios is biased.

    Attributes:
        scale: B in examples, `trace.value / squared_norm.value`.
        trace: tr S, the variance of the gradient of one example.
        squared_norm: ‖G‖². An unbiased estimate of a small square may be negative; it
            says, as does an error of the size of the value, that the gradient cannot be
            told from zero, and then neither B nor its sign means anything.
    """

    scale: Estimate
    trace: Estimate
    squared_norm: Estimate


def gradient_noise_scale(
    grads: PyTree[Float[Array, "n ..."]] | GradientDeviations,
    *,
    batch_size: float = 1,
) -> NoiseScale:
    """Estimate the simple noise scale from per-example or micro-batch gradients.

    Much smaller batches waste no examples, much larger ones waste them; near B training
    takes about twice as many steps and twice as many examples as it must. B grows in
    training, and says nothing about curvature.

    Args:
        grads: tree of arrays (n, ...), n >= 2 independent gradients, or
            `gradient_deviations(...)`, which does not keep them. None leaves are
            skipped.
        batch_size: number of examples that each gradient is the mean over.

    Returns:
        The estimates, in at least float32, with standard errors by the jackknife, which
        leaves out one gradient at a time. They are infinite for two gradients, and of
        ‖G‖² and B up to √2 too large where the noise in ḡ exceeds G. `scale` is that of
        gradients of any size, while squares may leave the range. NaN if an entry is not
        finite.

    Raises:
        ValueError: for a tree without arrays, leaves that are not real floating point,
            leading axes that differ, fewer than two gradients, or a batch size that is
            not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from basinax.landscape import gradient_noise_scale
        >>> grads = jnp.array([[4.0, 1.0], [4.0, -1.0], [4.0, 3.0], [4.0, -3.0]])
        >>> noise = gradient_noise_scale(grads, batch_size=8)
        >>> round(float(noise.trace.value), 3)  # 8 · (1 + 1 + 9 + 9) / 3
        53.333
        >>> round(float(noise.scale.value), 3)
        3.721

    Reference:
        arXiv:1812.06162, section 2.2 and appendix A.
    """
    _check_positive("batch_size", batch_size)
    return _from_deviations(as_deviations(grads, 2, "gradient_noise_scale"), batch_size)


def noise_scale_from_norms(
    small_norms: Float[Array, "*k"] | float,
    big_norms: Float[Array, "*k"] | float,
    *,
    small_batch: float,
    big_batch: float,
) -> NoiseScale:
    """Estimate the simple noise scale from gradient norms at two batch sizes.

    The cheap way in data-parallel training: the norm of one device's gradient before
    averaging and that of the average after it. One step is very noisy, so hand in the
    norms of many, over which the gradient should not change much.

    Args:
        small_norms: norms ‖g‖ at the small batch size, one per step, shape (k,), or one
            number. Of the norms of several devices take the root mean square.
        big_norms: norms at the big batch size, shaped like `small_norms`.
        small_batch: number of examples behind each small norm.
        big_batch: number of examples behind each big norm.

    Returns:
        The estimates over all steps, in at least float32, with standard errors from
        their spread, as if steps were independent; infinite for one step.

    Raises:
        ValueError: for shapes that differ or are neither () nor (k,), or batch sizes
            that are not positive and ascending.

    Example:
        >>> from basinax.landscape import noise_scale_from_norms
        >>> noise = noise_scale_from_norms(5.0, 4.0, small_batch=1, big_batch=4)
        >>> float(noise.trace.value), float(noise.squared_norm.value)
        (12.0, 13.0)

    Reference:
        arXiv:1812.06162, appendix A.1.
    """
    _check_positive("small_batch", small_batch)
    _check_positive("big_batch", big_batch)
    if not isinstance(big_batch - small_batch, Tracer) and big_batch <= small_batch:
        raise ValueError(
            "small_batch must be smaller than big_batch, got "
            f"small_batch={small_batch} and big_batch={big_batch}."
        )
    small, big = jnp.asarray(small_norms), jnp.asarray(big_norms)
    if small.shape != big.shape or small.ndim > 1 or not small.size:
        raise ValueError(
            "small_norms and big_norms must be one number each, or one per step each, "
            f"got shapes {small.shape} and {big.shape}."
        )
    return _from_norms(small, big, small_batch, big_batch)


@jax.jit
def _from_deviations(
    deviations: GradientDeviations, batch_size: Float[Array, ""]
) -> NoiseScale:
    (mean, lengths, projections), unit = deviations.in_units()
    n, squares = len(lengths), lengths**2

    def estimates(n: int, scatter: Array, square: Array) -> tuple[Array, Array]:
        variance = scatter / (n - 1)
        return batch_size * variance, square - variance / n

    scatter = jnp.sum(squares)
    whole = estimates(n, scatter, mean**2)
    if n == 2:
        return _noise_scale(whole, None, unit)
    # Without gradient i: ḡ - d_i / (n - 1), and Σ ‖d‖² - n / (n - 1) ‖d_i‖².
    without = estimates(
        n - 1,
        scatter - squares * n / (n - 1),
        mean**2 - 2 * mean * projections / (n - 1) + squares / (n - 1) ** 2,
    )
    return _noise_scale(whole, without, unit)


@jax.jit
def _from_norms(
    small: Array, big: Array, small_batch: Array, big_batch: Array
) -> NoiseScale:
    dtype = jnp.promote_types(wide_dtype(small), wide_dtype(big))
    norms = jnp.stack([small, big]).astype(dtype).reshape(2, -1)
    unit, inverse = power_of_two(jnp.max(norms))
    b, c = small_batch.astype(dtype), big_batch.astype(dtype)
    small, big = (inverse * norms) ** 2
    trace = (small - big) / (1 / b - 1 / c)
    square = (c * big - b * small) / (c - b)
    whole = jnp.mean(trace), jnp.mean(square)
    if (k := trace.size) == 1:
        return _noise_scale(whole, None, unit)
    without = [k * mean - x for mean, x in zip(whole, (trace, square), strict=True)]
    return _noise_scale(whole, (without[0] / (k - 1), without[1] / (k - 1)), unit)


def _noise_scale(
    whole: tuple[Array, Array], without: tuple[Array, Array] | None, unit: Array
) -> NoiseScale:
    """Make a result of tr S and ‖G‖², and what these are without each sample."""
    trace, square = whole
    nothing = (trace == 0) & (square == 0)
    denominator = jnp.where(nothing, 1, square)
    scale = trace / denominator
    if without is None:
        errors = (jnp.full_like(trace, jnp.inf),) * 3
    else:
        moved_trace, moved_square = (x - jnp.mean(x, keepdims=True) for x in without)
        # The change of a ratio to first order; leaving out one sample may move the
        # denominator across zero.
        moved = (moved_trace - scale * moved_square) / jnp.abs(denominator)
        errors = (_jackknife(moved), _jackknife(moved_trace), _jackknife(moved_square))
    squares = unit * unit
    return NoiseScale(
        Estimate(scale, errors[0]),
        Estimate(trace * squares, errors[1] * squares),
        Estimate(square * squares, errors[2] * squares),
    )


def _jackknife(moved: Float[Array, "n"]) -> Float[Array, ""]:
    """Turn leave-one-out values, less their mean, into a standard error."""
    return jnp.sqrt((len(moved) - 1) * jnp.mean(moved**2))


def _check_positive(name: str, value: float) -> None:
    if not isinstance(value, Tracer) and not value > 0:
        raise ValueError(f"{name} must be a positive number of examples, got {value}.")
