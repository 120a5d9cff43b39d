"""One assertion for each mathematical property, over every weighting it holds for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from weighting_cases import (
    EVERY,
    JACOBIANS,
    NON_CONFLICTING,
    ORDER,
    POWERS,
    UNIQUE,
    WEIGHTINGS,
    assert_conflict_averse,
    assert_equal_projections,
    assert_fair,
    assert_finite,
    assert_in_simplex,
    assert_non_conflicting,
    assert_same_update,
    assert_shortest,
    gram,
    size,
    weigh,
)

from basinax import optimizers as bx


@pytest.mark.usefixtures("x64")
class TestProperties:
    """In double precision, for four tasks."""

    @EVERY
    def test_finite_for_every_gramian(self, name):
        for jacobian in JACOBIANS.values():
            assert_finite(weigh(name, jacobian))

    @EVERY
    def test_permuting_tasks_permutes_weights(self, name):
        order = np.array([2, 0, 3, 1])
        permuted = WEIGHTINGS[name]
        if name == "pcgrad":
            visited = np.argsort(order)[ORDER[order]]
            permuted = functools.partial(bx.pcgrad_weights, order=visited)
        for label, jacobian in JACOBIANS.items():
            weights = weigh(name, jacobian)[order]
            other = np.asarray(permuted(gram(jacobian[order])))
            if label in UNIQUE:
                np.testing.assert_allclose(
                    other, weights, rtol=1e-6, atol=1e-9, err_msg=label
                )
            unclear = {"stationary", "opposite"}
            if name == "aligned_mtl":  # an inverse root, of condition 1e12 there
                unclear.add("nearly duplicated")
            if label not in unclear:
                assert_same_update(other, weights, jacobian[order], 1e-6)

    @EVERY
    def test_power_law_of_the_scale(self, name):
        for label in UNIQUE:
            g = gram(JACOBIANS[label])
            weights = WEIGHTINGS[name](g)
            for scale in (1e-12, 1e12):
                expected = weights * scale ** POWERS.get(name, 0)
                actual = WEIGHTINGS[name](scale * g)
                np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-12)

    @EVERY
    def test_identical_gradients_add_up(self, name):
        jacobian = JACOBIANS["identical"]
        weights = weigh(name, jacobian)
        update = weights @ jacobian
        factor = update @ jacobian[0] / (jacobian[0] @ jacobian[0])
        assert factor > 0.1
        np.testing.assert_allclose(update, factor * jacobian[0], rtol=1e-12)
        if name != "pcgrad":
            np.testing.assert_allclose(weights, weights[0], rtol=1e-9)

    @pytest.mark.parametrize("name", NON_CONFLICTING)
    def test_no_loss_rises(self, name):
        for label, jacobian in JACOBIANS.items():
            # The ridge of T ε moves updates by its root where gradients are dependent.
            stationary = label in ("stationary", "opposite")
            rtol = 1e-7 if stationary else 1e-11
            assert_non_conflicting(weigh(name, jacobian), jacobian, rtol)

    @pytest.mark.parametrize("name", ["mean", "cagrad", "aligned_mtl", "pcgrad"])
    def test_the_others_let_a_loss_rise(self, name):
        """So the assertion above can fail."""
        jacobian = np.array([[2, 1, 0], [-2, -1, -3], [-3, -3, -2], [2, 1, 3.0]])
        with pytest.raises(AssertionError):
            assert_non_conflicting(weigh(name, jacobian), jacobian, 1e-7)

    def test_mgda_is_the_shortest_vector(self):
        for jacobian in JACOBIANS.values():
            weights = weigh("mgda", jacobian)
            assert_in_simplex(weights, 1e-14)
            assert_shortest(weights, jacobian, 1e-11)

    def test_mgda_against_all_supports(self):
        for label in ("random", "conflicting", "dominated", "aligned"):
            jacobian = JACOBIANS[label]
            expected = shortest_by_enumeration(jacobian)
            np.testing.assert_allclose(weigh("mgda", jacobian), expected, atol=1e-10)

    def test_mgda_of_two_tasks(self):
        for a, cross, b in [(4, 0, 1), (1, 3, 10), (2, 2, 2), (5, -1, 2), (0, 0, 3)]:
            weights = np.asarray(
                bx.mgda_weights(jnp.array([[a, cross], [cross, b]], float))
            )
            span = a + b - 2 * cross
            first = 0.5 if span == 0 else np.clip((b - cross) / span, 0, 1)
            np.testing.assert_allclose(weights, [first, 1 - first], atol=1e-15)

    @pytest.mark.parametrize("c", [0.0, 0.4, 0.9, 1.5])
    def test_cagrad_is_optimal(self, c):
        for label, jacobian in JACOBIANS.items():
            weights = np.asarray(bx.cagrad_weights(gram(jacobian), c))
            if c == 0:
                np.testing.assert_array_equal(weights, 1 / 4)
            elif label != "all zero":
                assert_conflict_averse(weights, jacobian, c, 1e-7)

    def test_cagrad_scales(self):
        g = gram(JACOBIANS["random"])
        plain, authors, linear = (
            bx.cagrad_weights(g, 0.4, rescale=rescale) for rescale in (0, 1, 2)
        )
        np.testing.assert_allclose(authors, plain / 1.16, rtol=1e-14)
        np.testing.assert_allclose(linear, plain / 1.4, rtol=1e-14)

    def test_cagrad_points_along_mgda_for_large_c(self):
        for label in ("random", "aligned", "dominated"):
            weights = np.asarray(bx.cagrad_weights(gram(JACOBIANS[label]), 1e6))
            expected = weigh("mgda", JACOBIANS[label])
            np.testing.assert_allclose(weights / weights.sum(), expected, atol=1e-5)

    @pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 5.0])
    def test_fairgrad_solves_its_equation(self, alpha):
        for label in UNIQUE:
            for scale in (1e-6, 1.0, 1e6):
                jacobian = scale * JACOBIANS[label]
                weights = np.asarray(bx.fairgrad_weights(gram(jacobian), alpha))
                assert (weights > 0).all()
                assert_fair(weights, jacobian, alpha, 1e-8)

    def test_nash_knows_no_units(self):
        units = np.array([1e-3, 10.0, 1.0, 1e4])
        for label in UNIQUE:
            jacobian = JACOBIANS[label]
            weights = weigh("nash", jacobian)
            other = weigh("nash", units[:, None] * jacobian)
            np.testing.assert_allclose(other, weights / units, rtol=1e-8)

    @pytest.mark.parametrize("name", ["nash", "fairgrad", "upgrad", "mgda"])
    def test_updates_shrink_at_stationary_points(self, name):
        for label in ("stationary", "opposite"):
            jacobian = JACOBIANS[label]
            weights = weigh(name, jacobian)
            update = np.linalg.norm(weights @ jacobian)
            assert update <= 1e-7 * size(weights, jacobian)
            assert update <= 1e-4

    def test_imtl_projections_are_equal(self):
        for label in [*UNIQUE, "duplicated", "identical"]:
            jacobian = JACOBIANS[label]
            if label == "dominated":  # four gradients in three dimensions
                continue
            weights = weigh("imtl_g", jacobian)
            assert_equal_projections(weights, jacobian, 1e-9)
            assert abs(weights.sum() - 1) <= 1e-9

    def test_upgrad_against_scipy(self):
        for label in [*UNIQUE, "rank two", "duplicated", "one zero"]:
            jacobian = JACOBIANS[label]
            for preference in (None, [0.1, 0.0, 2.0, 1.0]):
                weights = bx.upgrad_weights(gram(jacobian), preference)
                u = np.full(4, 0.25) if preference is None else np.array(preference)
                expected = 0.0
                for task, row in enumerate(jacobian):
                    x, _ = nnls(jacobian.T, -u[task] * row, maxiter=1000)
                    expected = expected + u[task] * row + x @ jacobian
                error = np.linalg.norm(np.asarray(weights) @ jacobian - expected)
                assert error <= 1e-9 * size(np.asarray(weights), jacobian), label
                assert (np.asarray(weights) >= u).all()

    def test_upgrad_keeps_the_preference_without_conflict(self):
        preference = np.array([0.5, 0.1, 0.2, 0.7])
        g = gram(np.abs(JACOBIANS["random"]))
        np.testing.assert_array_equal(bx.upgrad_weights(g, preference), preference)

    def test_aligned_gradients_are_orthogonal(self):
        for label in UNIQUE:
            jacobian = JACOBIANS[label]
            u, s, vt = np.linalg.svd(jacobian, full_matrices=False)
            expected = (s.min() * u @ vt).mean(0)
            update = weigh("aligned_mtl", jacobian) @ jacobian
            np.testing.assert_allclose(update, expected, atol=1e-9 * s.min())

    def test_pcgrad_of_two_tasks(self):
        a, b = JACOBIANS["conflicting"][:2] * np.array([[1.0], [-4.0]])
        b = b if a @ b < 0 else -b
        order = jnp.array([[1], [0]])
        weights = np.asarray(bx.pcgrad_weights(gram(np.stack([a, b])), order))
        expected = a - a @ b / (b @ b) * b + b - a @ b / (a @ a) * a
        update = weights @ np.stack([a, b])
        np.testing.assert_allclose(update, expected, atol=1e-13)
        assert min(update @ a, update @ b) >= -1e-13

    def test_pcgrad_follows_its_order(self):
        jacobian = JACOBIANS["stationary"]
        for order in (ORDER, ORDER[:, ::-1]):
            expected = 0.0
            for task, others in enumerate(order):
                row = jacobian[task]
                for other in others:
                    row = row - min(row @ jacobian[other], 0) * jacobian[other] / (
                        jacobian[other] @ jacobian[other]
                    )
                expected = expected + row
            weights = bx.pcgrad_weights(gram(jacobian), order)
            np.testing.assert_allclose(weights @ jacobian, expected, atol=1e-13)

    def test_pcgrad_sums_without_conflict(self):
        g = gram(np.abs(JACOBIANS["random"]))
        np.testing.assert_array_equal(bx.pcgrad_weights(g, ORDER), 1.0)

    def test_pcgrad_draws_a_permutation_for_each_task(self):
        g = gram(JACOBIANS["stationary"])
        outcomes = set()
        for seed in range(6):
            weights = bx.pcgrad_weights(g, key=jax.random.key(seed))
            again = bx.pcgrad_weights(g, key=jax.random.key(seed))
            np.testing.assert_array_equal(weights, again)
            outcomes.add(tuple(np.round(np.asarray(weights), 9)))
        assert len(outcomes) > 1

    def test_pcgrad_passes_over_the_task_itself(self):
        g = gram(np.array([[0, 0, 2], [0, 2, -3], [0, -1, -3], [1, 0, -3]], float))
        with_self = np.concatenate([ORDER, np.arange(4)[:, None]], axis=1)
        without = bx.pcgrad_weights(g, ORDER)
        np.testing.assert_array_equal(bx.pcgrad_weights(g, with_self), without)
        # Once projected, a gradient can be in conflict with what it was.
        visited = bx.pcgrad_weights(g, with_self, visit_self=True)
        assert np.abs(visited - without).max() > 0.05

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(-3, 3), min_size=12, max_size=12), st.integers(-6, 6))
    def test_small_integers(self, entries, exponent):
        """Ties, dependence and stationarity come by themselves."""
        jacobian = 10.0**exponent * np.array(entries, float).reshape(4, 3)
        with jax.enable_x64(True):
            found = {name: weigh(name, jacobian) for name in WEIGHTINGS}
        for weights in found.values():
            assert_finite(weights)
        assert_in_simplex(found["mgda"], 1e-14)
        assert_shortest(found["mgda"], jacobian, 1e-7)
        for name in ("mgda", "nash", "fairgrad", "upgrad"):
            assert_non_conflicting(found[name], jacobian, 1e-6)
        if np.linalg.norm(jacobian.mean(0)) > 0:
            assert_conflict_averse(found["cagrad"], jacobian, 0.4, 1e-6)


def shortest_by_enumeration(jacobian):
    """Solve the equality-constrained problem on every support; keep the best."""
    g, tasks = jacobian @ jacobian.T, len(jacobian)
    best = None
    for count in range(1, tasks + 1):
        for support in map(list, itertools.combinations(range(tasks), count)):
            system = np.ones((count + 1, count + 1))
            system[:-1, :-1], system[-1, -1] = g[np.ix_(support, support)], 0
            solution = np.linalg.lstsq(system, np.eye(count + 1)[-1], rcond=None)[0]
            w = np.zeros(tasks)
            w[support] = solution[:-1]
            feasible = (w >= -1e-12).all() and abs(w.sum() - 1) < 1e-9
            if feasible and (best is None or w @ g @ w < best @ g @ best):
                best = w
    return best
