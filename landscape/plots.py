"""Plots of what the instruments measure, on matplotlib axes of your choice.

Every function draws on `ax`, or on a new figure of its own, and returns the axis, so
that plots go side by side, get other titles and are saved like any other:

    >>> import jax, jax.numpy as jnp
    >>> from matplotlib.figure import Figure
    >>> from basinax.landscape import plots, spectral_density
    >>> scale = jnp.array([0.0, 1.0, 1.0, 5.0])
    >>> found = spectral_density(
    ...     lambda v: scale * v, scale, key=jax.random.key(0), num_probes=2, num_steps=3
    ... )
    >>> figure = Figure()
    >>> axis = plots.density(found, ax=figure.subplots(), outliers=[5.0])
    >>> axis.get_xlabel()
    'eigenvalue'

Matplotlib is needed only here, when a function is called: `pip install basinax[plot]`.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; text and lines
are readable on light and on dark pages. Figures made here have no background; for one
of your own it is `figure.savefig("surface.png", transparent=True)`.
"""

from basinax.landscape._plot_curves import grokking, lines, monitored, paths
from basinax.landscape._plot_spectra import (
    cosines,
    density,
    eigenvalues,
    singular_values,
)
from basinax.landscape._plot_surface import surface, trajectory

__all__ = [
    "cosines",
    "density",
    "eigenvalues",
    "grokking",
    "lines",
    "monitored",
    "paths",
    "singular_values",
    "surface",
    "trajectory",
]
