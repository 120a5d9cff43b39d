"""How negative a spectrum is: the criteria of loss landscape analysis.

Both compare the negative part of the Hessian's spectrum with the positive one:

    r_e = mean over probes of |θ_min / θ_max|,
    K_n = mean over probes of Σ_{θ<0} |θ w|^n / Σ_{θ>0} (θ w)^n,

with the nodes θ and weights w of Lanczos quadrature.

Caution. For n != 1 the second is not a property of the spectrum. Its sums hold one
term per node, and each step splits the weight among more nodes: as n < 1 favours many
small terms over few large ones, K_n grows with the number of steps, by two thirds
between 20 and 200 of them on one Hessian. Compare it between equal settings only. With
the weight outside of the power it converges to a ratio of integrals,

    K'_n = ∫_{t<0} |t|^n φ(t) dt / ∫_{t>0} t^n φ(t) dt,

which is the default here.

Before either is read as a sign of generalization, the type of the spectrum is to be
known: mainly positive if C_t = mean over probes of θ_min / θ_max is at least -0.6, else
mainly negative, where the criteria say nothing.

References: Gabdullin, *Investigating generalization capabilities of neural networks by
means of loss landscapes and Hessian analysis*, arXiv:2412.10146, 2024, and *The effects
of Hessian eigenvalue spectral density type on the applicability of Hessian analysis to
generalization capability assessment of neural networks*, arXiv:2504.17618, 2025.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from basinax.landscape._density import Density
from basinax.landscape._lanczos import BREAKDOWN
from basinax.landscape._probes import Estimate, make, mean

# Bound on C_t in the author's library Loss Landscape Analysis, as of December 2025.
_MAINLY_POSITIVE = -0.6


def _on_host(density: Density) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.asarray(density.nodes, np.float64),
        np.asarray(density.weights, np.float64),
    )


def extreme_ratio(density: Density) -> Estimate:
    """Compute r_e, the most negative eigenvalue over the largest, as magnitudes.

    Near zero in a minimum, of order one at a saddle.

    Args:
        density: result of `spectral_density`; only the nodes matter.

    Returns:
        The mean over probes with its standard error, infinite for one probe. For a
        spectrum without negative nodes it is the smallest over the largest; for the
        zero operator NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import extreme_ratio, spectral_density
        >>> scale = jnp.array([4.0, 1.0, 0.0, -1.0])
        >>> found = spectral_density(
        ...     lambda v: scale * v,
        ...     scale,
        ...     key=jax.random.key(0),
        ...     num_probes=2,
        ...     num_steps=4,
        ... )
        >>> round(float(extreme_ratio(found).value), 3)
        0.25

    Reference: Gabdullin, arXiv:2412.10146, 2024.
    """
    nodes, _ = _on_host(density)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.abs(nodes.min(1) / nodes.max(1))
    return mean(ratios, density.nodes.dtype)


class SpectrumType(NamedTuple):
    """Whether a spectrum is mainly positive.

    Attributes:
        ratio: C_t, the mean over probes of the smallest over the largest eigenvalue,
            with its sign, and its standard error.
        mainly_positive: whether it is at or above the bound; False where it is NaN.
    """

    ratio: Estimate
    mainly_positive: Bool[Array, ""]


def spectrum_type(
    density: Density, threshold: float = _MAINLY_POSITIVE
) -> SpectrumType:
    """Tell a mainly positive spectrum from a mainly negative one.

    To be asked before `extreme_ratio` and `negativity_ratio` are compared between
    models: by their author they say something about generalization for mainly positive
    spectra only. Mainly negative ones were seen after training with manipulated
    gradients.

    The rule and its bound of -0.6 are those of the author's library, version of
    December 2025, which returns one of these two types. The third type of the paper,
    quasi-singular, has no rule there, and none is made up here.

    Args:
        density: result of `spectral_density`; only the nodes matter.
        threshold: bound on C_t.

    Returns:
        C_t and the answer. A probe without a positive node counts as minus infinity:
        the bare quotient of two negative numbers would pass for mainly positive. NaN,
        and not mainly positive, for the zero operator.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import spectral_density, spectrum_type
        >>> scale = jnp.array([4.0, 1.0, 0.0, -1.0])
        >>> found = spectral_density(
        ...     lambda v: scale * v,
        ...     scale,
        ...     key=jax.random.key(0),
        ...     num_probes=2,
        ...     num_steps=4,
        ... )
        >>> kind = spectrum_type(found)
        >>> round(float(kind.ratio.value), 3), bool(kind.mainly_positive)
        (-0.25, True)

    Reference: Gabdullin, arXiv:2504.17618, 2025.
    """
    nodes, _ = _on_host(density)
    smallest, largest = nodes.min(1), nodes.max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = smallest / largest
    ratios = np.where((largest <= 0) & (smallest < 0), -np.inf, ratios)
    ratio = mean(ratios, density.nodes.dtype)
    return SpectrumType(ratio, jnp.asarray(ratio.value >= threshold))


def negativity_ratio(
    density: Density, n: float = 0.5, *, literal: bool = False
) -> Estimate:
    """Compute K'_n, or K_n: the negative part of the spectrum over the positive one.

    Low for a mostly positive spectrum, that is near a minimum.

    Args:
        density: result of `spectral_density`; only nodes and weights matter.
        n: exponent; 0 < n < 1 lets the many small eigenvalues count. For n = 1 both
            forms integrate the same thing.
        literal: compute K_n as published. It depends on the number of Lanczos steps,
            for the reason given above, so it is meant for comparison with published
            numbers at their settings.

    Returns:
        K'_n as the ratio of the means over probes, with a standard error by the delta
        method; K_n as the mean of the ratios. Both errors are infinite for one probe.
        In K'_n nodes within rounding of zero count as zero. Without any positive part
        the value is infinite, without both it is NaN.

    Raises:
        ValueError: if n is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from basinax.landscape import negativity_ratio, spectral_density
        >>> scale = jnp.array([4.0, 1.0, 0.0, -1.0])
        >>> found = spectral_density(
        ...     lambda v: scale * v,
        ...     scale,
        ...     key=jax.random.key(0),
        ...     num_probes=2,
        ...     num_steps=4,
        ... )
        >>> round(float(negativity_ratio(found).value), 3)  # 1 / (2 + 1)
        0.333

    Reference: Gabdullin, arXiv:2412.10146, 2024.
    """
    if not n > 0:
        raise ValueError(f"n must be positive, got {n}.")
    nodes, weights = _on_host(density)
    dtype = density.nodes.dtype
    if literal:
        terms = np.abs(nodes * weights) ** n
    else:
        noise = BREAKDOWN * np.finfo(dtype).eps * np.abs(nodes).max()
        terms = weights * np.where(np.abs(nodes) > noise, np.abs(nodes), 0) ** n
    negative = np.sum(np.where(nodes > 0, 0, terms), 1)
    positive = np.sum(np.where(nodes < 0, 0, terms), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        if literal:
            return mean(negative / positive, dtype)
        return _ratio(negative, positive, dtype)


def _ratio(
    top: Float[np.ndarray, "probes"], bottom: Float[np.ndarray, "probes"], dtype: Any
) -> Estimate:
    """Divide two means, with the error of the quotient to first order."""
    value, count = top.mean() / bottom.mean(), len(top)
    rest = top - value * bottom
    deviation = rest.std(ddof=1) if count > 1 else np.inf + value
    return make(value, deviation / np.sqrt(count) / bottom.mean(), dtype)
