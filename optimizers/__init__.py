"""Pure-function optax transformations for research optimizers.

Every name is a pure function.  Kernels work on arrays, transformations on trees:

>>> import optax
>>> from basinax.optimizers import spectral_clip
>>> tx = optax.chain(
...     optax.scale_by_adam(), spectral_clip(10.0), optax.scale_by_learning_rate(1e-3)
... )
"""

from basinax.optimizers._collapse_free import (
    collapse_free_cross_entropy_with_integer_labels,
)
from basinax.optimizers._grokfast import GrokfastState, grokfast_ema
from basinax.optimizers._hard_clip import hard_spectral_clip
from basinax.optimizers._mars import VarianceReductionState, scale_by_mars
from basinax.optimizers._orthogonalize import orthogonalize
from basinax.optimizers._perp_grad import perp_grad, project_orthogonal
from basinax.optimizers._perp_optimizers import perp_adamw, perp_sgd
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
from basinax.optimizers._stablemax import (
    log_stablemax,
    stablemax,
    stablemax_cross_entropy,
    stablemax_cross_entropy_with_integer_labels,
)
from basinax.optimizers._symlog import symlog
from basinax.optimizers._thresholds import coupled_threshold, decayed_threshold
from basinax.optimizers._tickets import KeepMaskedState, keep_masked, magnitude_mask
from basinax.optimizers._weight_norm import KeepWeightNormState, keep_weight_norm

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
    # Orthogonal projection
    "project_orthogonal",
    "perp_grad",
    "perp_sgd",
    "perp_adamw",
    # Losses that do not collapse
    "symlog",
    "stablemax",
    "log_stablemax",
    "stablemax_cross_entropy",
    "stablemax_cross_entropy_with_integer_labels",
    "collapse_free_cross_entropy_with_integer_labels",
    # Companions of grokking experiments
    "grokfast_ema",
    "GrokfastState",
    "keep_weight_norm",
    "KeepWeightNormState",
    "magnitude_mask",
    "keep_masked",
    "KeepMaskedState",
]
