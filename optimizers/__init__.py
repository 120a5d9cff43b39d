"""Pure-function optax transformations for research optimizers.

Every name is a pure function.  Kernels work on arrays, transformations on trees:

>>> import optax
>>> from basinax.optimizers import spectral_clip
>>> tx = optax.chain(
...     optax.scale_by_adam(), spectral_clip(10.0), optax.scale_by_learning_rate(1e-3)
... )
"""

from basinax.optimizers._aggregate import AggregateState, aggregate
from basinax.optimizers._aligned_mtl import aligned_mtl_weights
from basinax.optimizers._cagrad import cagrad_weights
from basinax.optimizers._collapse_free import (
    collapse_free_cross_entropy_with_integer_labels,
)
from basinax.optimizers._dwa import DWAState, dwa
from basinax.optimizers._f_mtl import FlatTaskGrads, f_mtl_value_and_grad
from basinax.optimizers._fairgrad import fairgrad_weights, nash_weights
from basinax.optimizers._famo import FAMOState, famo
from basinax.optimizers._grad_drop import (
    GradDropState,
    grad_drop,
    grad_drop_aggregate,
)
from basinax.optimizers._grokfast import GrokfastState, grokfast_ema
from basinax.optimizers._hard_clip import hard_spectral_clip
from basinax.optimizers._imtl_g import imtl_g_weights
from basinax.optimizers._mars import VarianceReductionState, scale_by_mars
from basinax.optimizers._mean import mean_weights
from basinax.optimizers._mgda import mgda_weights
from basinax.optimizers._nexus import nexus_value_and_grad
from basinax.optimizers._nexus_multi_steps import (
    NexusMultiStepsState,
    nexus_multi_steps,
    nexus_params,
)
from basinax.optimizers._nexus_transformation import NexusState, nexus, reptile
from basinax.optimizers._orthogonalize import orthogonalize
from basinax.optimizers._pcgrad import pcgrad_weights
from basinax.optimizers._perp_grad import perp_grad, project_orthogonal
from basinax.optimizers._perp_optimizers import perp_adamw, perp_sgd
from basinax.optimizers._random_weights import random_weights
from basinax.optimizers._sam import asam_value_and_grad, sam_value_and_grad
from basinax.optimizers._sam_transformation import SAMState, asam, sam
from basinax.optimizers._samo import samo_value_and_grad
from basinax.optimizers._samo_transformation import SAMOState, samo
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
from basinax.optimizers._task_gradients import (
    TaskDiagnostics,
    TaskGrads,
    task_gradients,
)
from basinax.optimizers._thresholds import coupled_threshold, decayed_threshold
from basinax.optimizers._tickets import KeepMaskedState, keep_masked, magnitude_mask
from basinax.optimizers._uncertainty import UncertaintyState, uncertainty
from basinax.optimizers._upgrad import upgrad_weights
from basinax.optimizers._weight_norm import KeepWeightNormState, keep_weight_norm
from basinax.optimizers._weighting import Weighting

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
    # Sharpness-aware minimization
    "sam",
    "asam",
    "sam_value_and_grad",
    "asam_value_and_grad",
    "SAMState",
    # Aggregation of task gradients
    "aggregate",
    "AggregateState",
    "grad_drop",
    "grad_drop_aggregate",
    "GradDropState",
    # Task weightings
    "mean_weights",
    "mgda_weights",
    "pcgrad_weights",
    "cagrad_weights",
    "imtl_g_weights",
    "nash_weights",
    "fairgrad_weights",
    "upgrad_weights",
    "aligned_mtl_weights",
    # Weightings by losses or at random
    "Weighting",
    "random_weights",
    "dwa",
    "DWAState",
    "famo",
    "FAMOState",
    "uncertainty",
    "UncertaintyState",
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
    # Multi-task
    "task_gradients",
    "TaskGrads",
    "samo_value_and_grad",
    "samo",
    "SAMOState",
    "f_mtl_value_and_grad",
    "FlatTaskGrads",
    "TaskDiagnostics",
    # Common minima
    "nexus",
    "nexus_value_and_grad",
    "NexusState",
    "nexus_multi_steps",
    "nexus_params",
    "NexusMultiStepsState",
    "reptile",
]
