"""Derivative of odd spectral maps.

For a thin singular value decomposition X = U Σ Vᵀ and an odd function f, the map
F(X) = U f(Σ) Vᵀ has the directional derivative (Daleckii and Krein; Noferini 2017,
"A formula for the Fréchet derivative of a generalized matrix function").  With
K = Uᵀ Ẋ V, S and A its symmetric and skew parts:

    Ḟ = U (P ∘ S + N ∘ A) Vᵀ + (Ẋ V - U K) R Vᵀ + U R (Uᵀ Ẋ - K Vᵀ)

    P_ij = (f_i - f_j) / (σ_i - σ_j)     N_ij = (f_i + f_j) / (σ_i + σ_j)
    R = diag(f_i / σ_i)

All three quotients have finite limits for the maps used here, so repeated and zero
singular values are harmless, unlike in the derivative of the decomposition itself.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

PRECISION = "highest"


def spectral_tangent(
    dx: Float[Array, "*batch m n"],
    u: Float[Array, "*batch m k"],
    vt: Float[Array, "*batch k n"],
    same: Float[Array, "*batch k k"],
    opposite: Float[Array, "*batch k k"],
    ratio: Float[Array, "*batch k"],
) -> Float[Array, "*batch m n"]:
    """Apply the derivative of an odd spectral map to a tangent.

    Args:
        dx: tangent of the matrix.
        u: left singular vectors, k = min(m, n).
        vt: right singular vectors, transposed.
        same: divided differences P.
        opposite: quotients of sums N.
        ratio: f(σ) / σ.

    Returns:
        The tangent of the map's value.
    """

    def mul(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=PRECISION)

    u_dx = mul(u.mT, dx)
    k = mul(u_dx, vt.mT)
    core = (same * (k + k.mT) + opposite * (k - k.mT)) / 2
    left_of_range = (mul(dx, vt.mT) - mul(u, k)) * ratio[..., None, :]
    right_of_range = ratio[..., None] * (u_dx - mul(k, vt))
    return mul(mul(u, core) + left_of_range, vt) + mul(u, right_of_range)
