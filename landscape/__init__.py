"""Matrix-free instruments that measure where training ended up."""

from basinax.landscape import metrics, plots
from basinax.landscape._average_case import average_sharpness
from basinax.landscape._barrier import Barrier, barrier
from basinax.landscape._bezier_path import CurvedPath, bezier_path
from basinax.landscape._check_operator import check_operator
from basinax.landscape._cka import cka, minibatch_cka
from basinax.landscape._closeness import Closeness, closeness
from basinax.landscape._closeness_bound import closeness_bound
from basinax.landscape._coherence import Coherence, coherence
from basinax.landscape._criteria import (
    SpectrumType,
    extreme_ratio,
    negativity_ratio,
    spectrum_type,
)
from basinax.landscape._density import Density, spectral_density, spectral_mean
from basinax.landscape._diagonal import Moments, diagonal, moments
from basinax.landscape._directions import normalize_direction, random_directions
from basinax.landscape._eigen_directions import eigen_directions
from basinax.landscape._eigenpairs import Eigenpairs, eigenpairs
from basinax.landscape._epsilon_sharpness import EpsilonSharpness, epsilon_sharpness
from basinax.landscape._fisher import fisher
from basinax.landscape._flatness import fisher_rao_norm, relative_flatness
from basinax.landscape._gauss_newton import gauss_newton
from basinax.landscape._gradient_cosines import GradientCosines, gradient_cosines
from basinax.landscape._gradient_deviations import (
    GradientDeviations,
    gradient_deviations,
)
from basinax.landscape._gradient_spectrum import GradientSpectrum, gradient_spectrum
from basinax.landscape._gradient_variance import GradientVariance, gradient_variance
from basinax.landscape._linear_path import Path, linear_path
from basinax.landscape._monitor import Metric, MonitorState, Observation, monitor
from basinax.landscape._nlm_alignment import (
    MonitorNLMState,
    NLMAlignment,
    monitor_nlm,
    nlm_alignment,
)
from basinax.landscape._noise_scale import (
    NoiseScale,
    gradient_noise_scale,
    noise_scale_from_norms,
)
from basinax.landscape._operators import dense, hessian
from basinax.landscape._over_batches import over_batches
from basinax.landscape._pac_bayes import PacBayesSharpness, pac_bayes_sharpness
from basinax.landscape._path_point import path_point
from basinax.landscape._per_example import empirical_fisher, gradient_covariance
from basinax.landscape._probes import Estimate
from basinax.landscape._quadrature import effective_dimension, log_determinant
from basinax.landscape._restrict import restrict
from basinax.landscape._sharpness import (
    gradient_norm,
    normalize_logits,
    sam_sharpness,
)
from basinax.landscape._softmax_collapse import SoftmaxCollapse, softmax_collapse
from basinax.landscape._stability import (
    adam_diagonal,
    edge_of_stability,
    preconditioned,
    sam_edge,
)
from basinax.landscape._surface import Line, Plane, line, plane
from basinax.landscape._trace import frobenius_norm, trace
from basinax.landscape._trajectory_directions import (
    TrajectoryDirections,
    coordinates,
    trajectory_directions,
)
from basinax.landscape._worst_case import worst_case_sharpness

__all__ = [  # noqa: RUF022
    # operators
    "check_operator",
    "dense",
    "empirical_fisher",
    "fisher",
    "gauss_newton",
    "gradient_covariance",
    "hessian",
    "over_batches",
    "restrict",
    # spectra
    "Density",
    "Eigenpairs",
    "Estimate",
    "Moments",
    "SpectrumType",
    "diagonal",
    "effective_dimension",
    "eigenpairs",
    "extreme_ratio",
    "frobenius_norm",
    "log_determinant",
    "moments",
    "negativity_ratio",
    "spectral_density",
    "spectral_mean",
    "spectrum_type",
    "trace",
    # paths and representations
    "Barrier",
    "CurvedPath",
    "Path",
    "barrier",
    "bezier_path",
    "cka",
    "linear_path",
    "minibatch_cka",
    "path_point",
    # sharpness
    "EpsilonSharpness",
    "PacBayesSharpness",
    "average_sharpness",
    "epsilon_sharpness",
    "fisher_rao_norm",
    "gradient_norm",
    "normalize_logits",
    "pac_bayes_sharpness",
    "relative_flatness",
    "sam_sharpness",
    "worst_case_sharpness",
    # stability
    "adam_diagonal",
    "edge_of_stability",
    "preconditioned",
    "sam_edge",
    # numerical collapse
    "MonitorNLMState",
    "NLMAlignment",
    "SoftmaxCollapse",
    "monitor_nlm",
    "nlm_alignment",
    "softmax_collapse",
    # gradient geometry
    "Closeness",
    "Coherence",
    "GradientCosines",
    "GradientDeviations",
    "GradientSpectrum",
    "GradientVariance",
    "NoiseScale",
    "closeness",
    "closeness_bound",
    "coherence",
    "gradient_cosines",
    "gradient_deviations",
    "gradient_noise_scale",
    "gradient_spectrum",
    "gradient_variance",
    "noise_scale_from_norms",
    # surfaces
    "Line",
    "Plane",
    "TrajectoryDirections",
    "coordinates",
    "eigen_directions",
    "line",
    "normalize_direction",
    "plane",
    "random_directions",
    "trajectory_directions",
    # monitors
    "Metric",
    "MonitorState",
    "Observation",
    "metrics",
    "monitor",
    # plots
    "plots",
]
