"""Weights of the authors' code and high-precision solutions of their problems.

`golden/samo.npz`, keys `comb/*`: Jacobians J with G = J Jᵀ, the updates of the authors'
multi-task classes (commit 3b686c99 of OptMN-Lab/SAMO), the weights those used, and
`ref_*`, solutions of the same problems to 1e-10 or better.  Their solvers stop early on
badly scaled gradients, so ours are held to `ref_*`, and the update formulas are checked
with their weights.  Their updates carry factors of T that are not part of the methods.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from basinax import optimizers as bx
from basinax.optimizers import _cagrad

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "samo.npz")
NAMES = sorted(
    {key.rsplit("/", 1)[0] for key in GOLDEN.files if key.endswith("/ref_mgda_w")}
)
EPS = np.finfo(np.float64).eps
C = 0.4
SCALES = [1.0, 1e-12, 1e12]

pytestmark = pytest.mark.usefixtures("x64")


class Case:
    """One Jacobian and what belongs to it."""

    def __init__(self, name):
        self.name = name
        self.jacobian = self["J"]
        self.norms = np.linalg.norm(self.jacobian, axis=1)

    def __getitem__(self, key):
        return GOLDEN[f"{self.name}/{key}"]

    @property
    def gramian(self):
        return jnp.asarray(self.jacobian @ self.jacobian.T)

    def __contains__(self, key):
        return f"{self.name}/{key}" in GOLDEN.files

    def check(self, actual, expected, **tolerance):
        tolerance = {"rtol": 0, "atol": 0, **tolerance}
        np.testing.assert_allclose(actual, expected, **tolerance, err_msg=self.name)


# Cases are looped over within a test: one process compiles a weighting, not each.
CASES = [Case(name) for name in NAMES]


def test_there_are_cases():
    assert len(CASES) >= 9
    assert {len(case.jacobian) for case in CASES} == {2, 3, 5}


def test_mgda():
    for case in CASES:
        for scale in SCALES:
            weights = bx.mgda_weights(scale * case.gramian)
            case.check(weights, case["ref_mgda_w"], atol=1e-12)
        # Their solver stops at 1e-3 where one task has all the weight.
        theirs = case["mgda"] / len(case.jacobian) ** 2
        slack = 2e-3 * case.norms.max()
        case.check(weights @ case.jacobian, theirs, atol=slack)


def test_nash_and_fairgrad():
    for case in CASES:
        for alpha in (1, 2):
            for scale in SCALES:
                weights = bx.fairgrad_weights(scale * case.gramian, alpha)
                weights = weights * scale ** (alpha / (1 + alpha))
                # Their residual is up to 1e-10 of weights that span five decades.
                case.check(weights, case[f"ref_fairgrad{alpha}_w"], rtol=1e-9)
        weights = bx.nash_weights(case.gramian / np.linalg.norm(case.gramian))
        case.check(weights, case["ref_nash_w_normalised_gram"], rtol=1e-9)


@jax.jit
def worst_case(g, smoothing):
    return _cagrad.worst_case(g, jnp.asarray(C), EPS, smoothing)


def test_cagrad():
    for case in CASES:
        for scale in SCALES:
            # The authors have 1e-8 under their roots.
            w, _, _ = worst_case(scale * case.gramian, scale * 1e-8)
            case.check(w, case["ref_cagrad_w"], atol=2e-7)


def test_cagrad_update():
    """The line after the solver: g₀ + λ g_w over 1 + c², T times."""
    for case in CASES:
        jacobian, w = case.jacobian, case["cagrad_w"]
        g0, gw = jacobian.mean(0), w @ jacobian
        theirs = case["cagrad"] / len(jacobian)
        size = np.linalg.norm(theirs)
        mine = (g0 + C * np.linalg.norm(g0) * gw / np.linalg.norm(gw)) / (1 + C**2)
        case.check(mine, theirs, atol=1e-6 * size)  # the 1e-8 next to norms of 0.1
        # The same from our own w, up to what their solver left.
        ours = bx.cagrad_weights(case.gramian, C) @ jacobian
        off = np.abs(w - case["ref_cagrad_w"]) @ case.norms / np.linalg.norm(gw)
        case.check(ours, theirs, atol=(1e-6 + 4 * off) * size)


def test_pcgrad():
    for case in CASES:
        for order in ("identity", "shuffled"):
            visited = jnp.asarray(case[f"pcgrad_{order}_order"], jnp.int32)
            weights = bx.pcgrad_weights(case.gramian, visited, visit_self=True)
            expected = case[f"pcgrad_{order}"]
            atol = 1e-12 * case.norms.max()
            case.check(weights @ case.jacobian, expected, atol=atol)


def test_imtl_g():
    cases = [case for case in CASES if "base_imtlg_w" in case]
    assert len(cases) >= 5
    for case in cases:
        expected = case["base_imtlg_w"]
        # They invert a matrix of differences of the gradients.
        atol = 1e-8 * np.abs(expected).max()
        case.check(bx.imtl_g_weights(case.gramian), expected, atol=atol)


def test_mean():
    for case in CASES:
        update = bx.mean_weights(case.gramian) @ case.jacobian
        expected = case["ls"] / len(case.jacobian) ** 2
        case.check(update, expected, atol=1e-12 * case.norms.max())
