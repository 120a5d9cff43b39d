"""The transformation: scopes, options, chains, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.optimizers import perp_adamw, perp_grad, perp_sgd, project_orthogonal


def wide(x):
    return np.asarray(x, np.float64)


def abs_cosine(x, y):
    x, y = (wide(v) / np.abs(wide(v)).max() for v in (x, y))
    return abs(np.vdot(x, y)) / np.linalg.norm(x) / np.linalg.norm(y)


def norm(x):
    return np.linalg.norm(wide(x))


def update(tx, g, w):
    return tx.update(g, tx.init(w), w)[0]


def tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (4, 5), "bias": (5,), "gain": ()}
    return {
        n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()
    }


class TestTransformation:
    def test_leaf_scope_projects_every_leaf_but_single_numbers(self):
        g, w = tree(1), tree(0)
        out = update(perp_grad(), g, w)
        for name in ("kernel", "bias"):
            np.testing.assert_array_equal(
                out[name], project_orthogonal(g[name], w[name])
            )
        np.testing.assert_array_equal(out["gain"], g["gain"])
        assert update(perp_grad(min_size=1), g, w)["gain"] == 0
        small = update(perp_grad(min_size=6), g, w)
        np.testing.assert_array_equal(small["bias"], g["bias"])

    def test_global_scope_is_one_vector(self):
        g, w = (
            {"a": tree(1)["kernel"], "b": tree(1)["bias"]},
            {
                "a": tree(0)["kernel"],
                "b": tree(0)["bias"],
            },
        )
        flat = lambda t: jnp.concatenate([t["a"].ravel(), t["b"]])  # noqa: E731
        out = update(perp_grad(scope="global"), g, w)
        wanted = project_orthogonal(flat(g), flat(w))
        np.testing.assert_allclose(flat(out), wanted, rtol=0, atol=1e-6)
        assert abs_cosine(flat(out), flat(w)) < 1e-6
        assert abs_cosine(out["a"], w["a"]) > 1e-3  # not leaf by leaf
        one = {"a": g["a"]}
        leaf, whole = (
            update(perp_grad(scope=scope), one, {"a": w["a"]})["a"]
            for scope in ("leaf", "global")
        )
        np.testing.assert_array_equal(leaf, whole)

    def test_neuron_scope_projects_the_fan_in_of_each_output(self):
        g, w = tree(1), tree(0)
        out = update(perp_grad(scope="neuron"), g, w)
        wanted = jax.vmap(project_orthogonal, 1, 1)(g["kernel"], w["kernel"])
        np.testing.assert_allclose(out["kernel"], wanted, atol=2e-6)
        np.testing.assert_array_equal(
            out["bias"], project_orthogonal(g["bias"], w["bias"])
        )
        torch = perp_grad(
            scope="neuron", axes=lambda path, leaf: tuple(range(1, leaf.ndim))
        )
        found = update(torch, g, w)
        wanted = jax.vmap(project_orthogonal)(g["kernel"], w["kernel"])
        np.testing.assert_allclose(found["kernel"], wanted, atol=2e-6)
        np.testing.assert_array_equal(found["bias"], g["bias"])  # slices of one

    def test_options_of_the_split(self):
        g, w = {"a": tree(1)["kernel"]}, {"a": tree(0)["kernel"]}
        plain = update(perp_grad(rescale=False), g, w)["a"]
        radial = g["a"] - plain
        for beta in (0.5, jnp.float32(1.0), -2.0):
            out = update(perp_grad(rescale=False, radial_scale=beta), g, w)["a"]
            np.testing.assert_allclose(out, plain + beta * radial, atol=2e-6)
        steep = {"a": w["a"] + 0.1 * g["a"]}
        free, capped = (
            update(perp_grad(max_rescale=m), steep, w)["a"] for m in (None, 2.0)
        )
        assert norm(free) > 5 * norm(capped)
        tangent = update(perp_grad(rescale=False), steep, w)["a"]
        np.testing.assert_allclose(capped, 2 * tangent, rtol=1e-6)
        high = update(perp_grad(max_rescale=1e6), steep, w)["a"]
        np.testing.assert_array_equal(high, free)

    def test_what_passes_untouched(self):
        g = tree(1) | {"none": None, "count": jnp.arange(3), "empty": jnp.zeros((0, 2))}
        w = tree(0) | {"none": jnp.ones(2), "count": jnp.ones(3, int)}
        w |= {"empty": jnp.zeros((0, 2))}
        mask = lambda p: jax.tree.map(lambda x: jnp.ndim(x) >= 2, p)  # noqa: E731
        out = update(perp_grad(), g, w)
        assert out["none"] is None
        np.testing.assert_array_equal(out["count"], g["count"])
        assert out["empty"].shape == (0, 2)
        masked = update(perp_grad(mask=mask), tree(1), tree(0))
        np.testing.assert_array_equal(masked["bias"], g["bias"])
        assert abs_cosine(masked["kernel"], w["kernel"]) < 1e-6

    def test_masked_leaves_do_not_count_in_global_scope(self):
        mask = {"kernel": True, "bias": False, "gain": False}
        out = update(perp_grad(scope="global", mask=mask), tree(1), tree(0))
        alone = project_orthogonal(tree(1)["kernel"], tree(0)["kernel"])
        np.testing.assert_allclose(out["kernel"], alone, atol=1e-6)

    def test_mixed_precision(self):
        g = {"a": tree(1)["kernel"]}
        w = {"a": tree(0)["kernel"].astype(jnp.bfloat16)}
        out = update(perp_grad(), g, w)["a"]
        assert out.dtype == jnp.float32
        assert abs_cosine(out, w["a"]) < 1e-6

    def test_commutes_with_clipping(self):
        clip, g, w = optax.clip_by_global_norm(0.5), tree(1), tree(0)
        first = update(optax.chain(clip, perp_grad()), g, w)
        last = update(optax.chain(perp_grad(), clip), g, w)
        for name in g:
            np.testing.assert_allclose(first[name], last[name], atol=1e-6)

    def test_pythagoras_of_plain_descent(self, x64):
        w, rate = {"a": jnp.asarray(tree(0)["kernel"], jnp.float64)}, 0.1
        tx = perp_sgd(rate, momentum=None)
        state = tx.init(w)
        for seed in range(3):
            g = {"a": jnp.asarray(tree(seed + 1)["kernel"], jnp.float64)}
            before = norm(w["a"])
            updates, state = tx.update(g, state, w)
            w = optax.apply_updates(w, updates)
            expected = before**2 + rate**2 * norm(g["a"]) ** 2
            np.testing.assert_allclose(norm(w["a"]) ** 2, expected, rtol=1e-14)

    def test_after_preconditioning_the_step_itself_is_orthogonal(self):
        g, w = {"a": tree(1)["kernel"]}, {"a": tree(0)["kernel"]}
        before = update(optax.chain(perp_grad(), optax.scale_by_adam()), g, w)["a"]
        after = update(optax.chain(optax.scale_by_adam(), perp_grad()), g, w)["a"]
        assert abs_cosine(after, w["a"]) < 1e-6 < 1e-3 < abs_cosine(before, w["a"])

    def test_minimum_on_the_sphere(self):
        """A loss that ignores the scale is minimized as by plain gradients."""
        rng = np.random.default_rng(0)
        b = rng.standard_normal((6, 6))
        a = jnp.asarray(b + b.T, jnp.float32)
        loss = lambda w: w @ a @ w / (w @ w)  # noqa: E731
        tx = perp_adamw(optax.linear_schedule(0.1, 0.0, 300))

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.asarray(rng.standard_normal(6), jnp.float32)
        run = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), length=300)[0][0])
        lowest = np.linalg.eigvalsh(wide(a))[0]
        np.testing.assert_allclose(loss(run(w)), lowest, rtol=1e-5)

    def test_decoupled_decay_survives_and_coupled_decay_in_front_does_not(self):
        w = {"a": tree(0)["kernel"]}
        zero = {"a": jnp.zeros((4, 5))}
        decoupled = update(perp_adamw(0.1, weight_decay=0.5), zero, w)["a"]
        np.testing.assert_allclose(decoupled, -0.05 * w["a"], rtol=1e-6)
        coupled = update(perp_sgd(0.1, weight_decay=0.5), zero, w)["a"]
        np.testing.assert_allclose(coupled, -0.05 * w["a"], rtol=1e-6)
        front = optax.chain(optax.add_decayed_weights(0.5), perp_grad())
        np.testing.assert_array_equal(update(front, zero, w)["a"], zero["a"])


class TestMistakes:
    def test_missing_params(self):
        with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
            perp_grad().update(tree(1), optax.EmptyState())

    def test_trees_that_differ(self):
        tx, state = perp_grad(), optax.EmptyState()
        with pytest.raises(ValueError, match="different structure"):
            tx.update(tree(1), state, {"kernel": jnp.ones((4, 5))})
        with pytest.raises(ValueError, match=r"shape \(5,\).*shape \(6,\).*bias"):
            tx.update(tree(1), state, tree(0) | {"bias": jnp.ones(6)})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scope": "row"}, "leaf, global, neuron"),
            ({"axes": 0}, 'scope="neuron"'),
            ({"min_size": 0}, "at least 1"),
            ({"min_size": jnp.int32(2)}, "static_args"),
            ({"max_rescale": 0.5}, "at least 1"),
            ({"max_rescale": 2.0, "rescale": False}, "rescale=False"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            perp_grad(**options)

    @pytest.mark.parametrize("axes", [2, (0, 3), -3])
    def test_axes_out_of_range(self, axes):
        with pytest.raises(ValueError, match="out of range"):
            project_orthogonal(jnp.ones((2, 2)), jnp.ones((2, 2)), axes=axes)
        tx = perp_grad(scope="neuron", axes=axes)
        w = {"w": jnp.ones((2, 2))}
        with pytest.raises(ValueError, match=r"out of range for \['w'\]"):
            tx.update(w, optax.EmptyState(), w)

    def test_axes_named_twice(self):
        with pytest.raises(ValueError, match="twice"):
            project_orthogonal(jnp.ones((2, 2)), jnp.ones((2, 2)), axes=(0, -2))

    def test_operands_of_the_kernel(self):
        with pytest.raises(TypeError, match="int32"):
            project_orthogonal(jnp.arange(3), jnp.ones(3))
        with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
            project_orthogonal(jnp.ones(3), jnp.ones(4))
        with pytest.raises(TypeError, match="complex weight"):
            project_orthogonal(jnp.ones(3), jnp.ones(3, jnp.complex64))
