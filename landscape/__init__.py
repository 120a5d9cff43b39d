"""Matrix-free instruments that measure where training ended up."""

from basinax.landscape._eigenpairs import Eigenpairs, eigenpairs
from basinax.landscape._nlm_alignment import (
    MonitorNLMState,
    NLMAlignment,
    monitor_nlm,
    nlm_alignment,
)
from basinax.landscape._operators import dense, hessian
from basinax.landscape._softmax_collapse import SoftmaxCollapse, softmax_collapse
from basinax.landscape._trace import Estimate, trace

__all__ = [  # noqa: RUF022
    # operators
    "dense",
    "hessian",
    # spectra
    "Eigenpairs",
    "Estimate",
    "eigenpairs",
    "trace",
    # numerical collapse
    "MonitorNLMState",
    "NLMAlignment",
    "SoftmaxCollapse",
    "monitor_nlm",
    "nlm_alignment",
    "softmax_collapse",
]
