"""Pure-function optax transformations for research optimizers.

Every name is a pure function.  Kernels work on arrays, transformations on trees:

>>> import optax
>>> from basinax.optimizers import spectral_clip
>>> tx = optax.chain(
...     optax.scale_by_adam(), spectral_clip(10.0), optax.scale_by_learning_rate(1e-3)
... )
"""

from basinax.optimizers._hard_clip import hard_spectral_clip
from basinax.optimizers._mars import VarianceReductionState, scale_by_mars
from basinax.optimizers._orthogonalize import orthogonalize
from basinax.optimizers._soft_clip import soft_spectral_clip
from basinax.optimizers._spectra import (
    spectra,
    spectra_adamw,
    spectra_ademamix,
    spectra_signum,
)
from basinax.optimizers._spectral_clip import (
    SpectralClipState,
    pre_spectral_clip,
    spectral_clip,
)
from basinax.optimizers._thresholds import coupled_threshold, decayed_threshold

__all__ = [  # noqa: RUF022 - grouped by concept
    # Spectral kernels
    "soft_spectral_clip",
    "hard_spectral_clip",
    "orthogonalize",
    # Spectral clipping of updates
    "spectral_clip",
    "pre_spectral_clip",
    "SpectralClipState",
    "coupled_threshold",
    "decayed_threshold",
    # SPECTRA
    "spectra",
    "spectra_adamw",
    "spectra_signum",
    "spectra_ademamix",
    # Base directions
    "scale_by_mars",
    "VarianceReductionState",
]
