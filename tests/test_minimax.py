"""The minimax compositions, checked against properties no generator can fake."""

import numpy as np
import pytest
from numpy.polynomial.polynomial import polyval
from scipy.optimize import linprog

from basinax.optimizers import _minimax

LOWEST = 2.0**-_minimax.OCTAVES


def compose(rows, x):
    for row in rows:
        x = x * polyval(x**2, row)
    return x


@pytest.mark.parametrize(("low", "high"), [(1 / 64, 1.0), (0.3, 1.0), (0.8, 1.2)])
@pytest.mark.parametrize("degree", [3, 5, 9])
def test_equioscillates(low, high, degree):
    """Chebyshev: best if and only if the error alternates at size + 1 points."""
    coefficients, error = _minimax.minimax_odd(low, high, degree)
    x = np.linspace(low, high, 200_001)
    deviation = x * polyval(x**2, coefficients) - 1
    assert np.abs(deviation).max() == pytest.approx(error, rel=1e-6)
    peaks = deviation[np.abs(deviation) > 0.9999 * error]
    signs = np.sign(peaks)
    alternations = 1 + np.sum(signs[1:] != signs[:-1])
    assert alternations == (degree + 1) // 2 + 1


def test_equals_linear_program():
    """The same polynomial from an unrelated algorithm."""
    low, degree = 0.2, 5
    x = np.linspace(low, 1, 2001)
    powers = x[:, None] ** (2 * np.arange(3) + 1)
    ones = np.ones((len(x), 1))
    solution = linprog(
        [0, 0, 0, 1],
        A_ub=np.block([[powers, -ones], [-powers, -ones]]),
        b_ub=np.r_[np.ones(len(x)), -np.ones(len(x))],
        bounds=[(None, None)] * 3 + [(0, None)],
    )
    coefficients, error = _minimax.minimax_odd(low, 1.0, degree)
    assert solution.fun == pytest.approx(error, rel=1e-5)
    np.testing.assert_allclose(coefficients, solution.x[:3], rtol=1e-4)


@pytest.mark.parametrize("row", range(25))
def test_table_row(row):
    """Every row is what the generator gives, at most 1, monotone below its end."""
    low = 2.0 ** (-row / _minimax.ROWS_PER_OCTAVE)
    rows, error = _minimax.composed_inverse_sqrt(low)
    np.testing.assert_array_equal(_minimax.inverse_sqrt_table()[row], rows)
    inside = compose(rows, np.linspace(low, 1, 20_001))
    assert inside.max() <= 1 + 1e-14
    assert 1 - inside.min() == pytest.approx(error, rel=1e-4, abs=1e-12)
    assert error <= 5e-4
    below = compose(rows, np.linspace(0, low, 20_001))
    assert np.all(np.diff(below) > -1e-14)  # flat to rounding near 1
    # Steeper at zero than ten Newton-Schulz steps (1.5^10): small directions keep more.
    if low == LOWEST:
        assert below[1] / (low / 20_000) > 1.5**10


def test_first_row_is_exact():
    """A spectrum of a single point needs q(1) = 1 in any precision."""
    rows = _minimax.inverse_sqrt_table()[0]
    for dtype in (np.float16, np.float32, np.float64):
        assert np.all(rows.astype(dtype).sum(1) == 1)


def test_taylor_coefficients():
    taylor = _minimax.inverse_sqrt_taylor(5)
    np.testing.assert_allclose(taylor * 128, [315, -420, 378, -180, 35], rtol=1e-14)
