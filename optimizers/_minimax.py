"""Composed minimax polynomials for the inverse square root.

For a symmetric A with spectrum in [l², 1] we want A^(-1/2) from matrix products only.
On x = sqrt(eigenvalue) the task is an odd polynomial p(x) = x q(x²) close to 1 on
[l, 1].  Composing small ones multiplies their degrees:

    p = p_T ∘ … ∘ p_1,   p_1 minimax on [l, 1],   p_{i+1} minimax on [1 - e_i, 1 + e_i],

and A^(-1/2) ≈ q_T(·) … q_1(A).  Each p_i is found by the Remez exchange in float64.
The last factor is divided by 1 + e_T, so that p never exceeds 1.  The idea is that of
Polar Express (Amsel et al., 2025, arXiv:2505.16932), here with a lower end l that is
known exactly from the clipping threshold.
"""

import functools

import numpy as np
from numpy.polynomial.polynomial import polyval

DEGREE = 9
FACTORS = 3
ROWS_PER_OCTAVE = 4
OCTAVES = 6  # the lowest tabulated end is 2^-6 = 1/64

# Below one percent of width the exchange works on rounding noise, and the expansion
# of t^(-1/2) around t = 1 is already exact to single precision.
_NARROW = 0.01


def minimax_odd(low: float, high: float, degree: int) -> tuple[np.ndarray, float]:
    """Find the odd polynomial closest to 1 on [low, high] by the Remez exchange.

    The error of the best p(x) = Σ c_k x^(2k+1) takes its maximum with alternating
    sign at both ends and at every interior extremum, which are roots of p'(x), a
    polynomial in x².

    Args:
        low: lower end, 0 < low <= high.
        high: upper end.
        degree: odd degree of the polynomial.

    Returns:
        (degree + 1) / 2 coefficients, lowest power first, and the maximum error.
    """
    size = (degree + 1) // 2
    if high - low < _NARROW:
        taylor = inverse_sqrt_taylor(size)
        ends = np.array([low, high])
        return taylor, float(np.max(np.abs(1 - ends * polyval(ends**2, taylor))))
    odd = 2 * np.arange(size) + 1
    signs = (-1.0) ** np.arange(size + 1)
    points = (high + low) / 2 - (high - low) / 2 * np.cos(
        np.pi * np.arange(size + 1) / size
    )
    error = 0.0
    for _ in range(50):
        system = np.column_stack([points[:, None] ** odd, signs])
        solution = np.linalg.solve(system, np.ones(size + 1))
        coefficients, level = solution[:-1], abs(solution[-1])
        roots = np.roots((odd * coefficients)[::-1])
        extrema = np.sqrt(np.sort(roots[np.abs(roots.imag) < 1e-9].real))
        points = np.concatenate([[low], extrema, [high]])
        if abs(level - error) <= 1e-14:
            break
        error = level
    return coefficients, level


def inverse_sqrt_taylor(size: int) -> np.ndarray:
    """Expand t^(-1/2) around t = 1 and return coefficients in powers of t."""
    u = np.polynomial.Polynomial([1.0, -1.0])  # u = 1 - t
    term, total = np.polynomial.Polynomial([1.0]), np.polynomial.Polynomial([0.0])
    for k in range(size):
        total = total + term
        term = term * u * ((2 * k + 1) / (2 * k + 2))
    return total.coef


def composed_inverse_sqrt(
    low: float, *, degree: int = DEGREE, factors: int = FACTORS
) -> tuple[np.ndarray, float]:
    """Compose minimax factors for a spectrum of square roots in [low, 1].

    Args:
        low: lower end of the square roots of the eigenvalues.
        degree: odd degree of each factor.
        factors: number of factors.

    Returns:
        Coefficients of q_1 … q_T, shape (factors, (degree + 1) / 2), and the largest
        value of 1 - p on [low, 1] (p itself never exceeds 1).
    """
    rows, interval, error = [], (low, 1.0), 0.0
    for _ in range(factors):
        coefficients, error = minimax_odd(*interval, degree)
        rows.append(coefficients)
        interval = (1.0 - error, 1.0 + error)
    rows[-1] = rows[-1] / (1.0 + error)
    return np.stack(rows), 2.0 * error / (1.0 + error)


@functools.cache
def inverse_sqrt_table() -> np.ndarray:
    """Tabulate the composition for low = 2^(-j/4), j = 0 … 24.

    A spectrum known to start at l takes the row of the largest tabulated end that is
    at most l; the error then falls from 5e-4 at the last row to rounding at the first.

    Returns:
        Coefficients, shape (25, 3, 5), float64.
    """
    ends = 2.0 ** (-np.arange(ROWS_PER_OCTAVE * OCTAVES + 1) / ROWS_PER_OCTAVE)
    return np.stack([composed_inverse_sqrt(low)[0] for low in ends])
