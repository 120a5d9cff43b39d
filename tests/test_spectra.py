"""SPECTRA as an optimizer: schedules, base optimizers, decay, the paper's theory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.optimizers import (
    coupled_threshold,
    decayed_threshold,
    pre_spectral_clip,
    soft_spectral_clip,
    spectra,
    spectra_adamw,
    spectra_ademamix,
    spectra_signum,
    spectral_clip,
)


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def apply(tx, updates):
    return jax.jit(tx.update)(updates, tx.init(updates))[0]


class TestThreshold:
    def test_schedule_is_read_at_the_count(self):
        x = 100 * jnp.eye(3)
        tx = spectral_clip(lambda count: 1.0 + count, aspect_scale=False)
        state = tx.init(x)
        for k in range(3):
            clipped, state = tx.update(x, state)
            expected = soft_spectral_clip(x, 1.0 + k)
            np.testing.assert_allclose(clipped, expected, rtol=1e-6)
        assert int(state.count) == 3

    def test_warm_up_keeps_the_largest_step(self):
        eta = optax.linear_schedule(1e-5, 1e-3, 50)
        c = coupled_threshold(4.0, eta, 50)
        products = [float(c(k) * eta(k)) for k in range(80)]
        np.testing.assert_allclose(products, 4e-3, rtol=1e-6)
        assert float(coupled_threshold(4.0, eta, 0)(0)) == 4.0
        assert float(coupled_threshold(4.0, 1e-3, 50)(0)) == 4.0

    def test_zero_learning_rate_at_the_start(self):
        eta = optax.linear_schedule(0.0, 1e-3, 50)
        assert float(coupled_threshold(4.0, eta, 50)(0)) == pytest.approx(4e7)

    def test_traced_learning_rate(self):
        """A sweep may trace the peak; the schedule is then part of the program."""

        @jax.jit
        def thresholds(peak):
            eta = optax.linear_schedule(0.0, peak, 10)
            c = coupled_threshold(4.0, eta, 10)
            return jax.vmap(lambda k: c(k) * eta(k))(jnp.arange(1, 20))

        # After the warm-up the schedule rests at the peak.
        np.testing.assert_allclose(thresholds(0.1), 0.4, rtol=1e-5)

    def test_whole_run_decay(self):
        c = decayed_threshold(2.0, 10, 1.0, shape="square", final_scale=0.5)
        assert [round(float(c(k)), 4) for k in (0, 5, 10, 20)] == [2, 1.75, 1, 1]
        assert float(decayed_threshold(2.0, 10, 0.0)(10)) == 2.0


class TestSpectra:
    def tree(self):
        return {"w": normal(0, (4, 9)), "b": normal(1, (9,))}

    @pytest.mark.parametrize(
        ("make", "base"),
        [
            (spectra_adamw, optax.adamw),
            (
                lambda rate, c, **kw: spectra_signum(rate, c, nesterov=False, **kw),
                lambda rate, weight_decay: optax.chain(
                    optax.trace(0.95),
                    optax.scale_by_sign(),
                    optax.add_decayed_weights(weight_decay),
                    optax.scale_by_learning_rate(rate),
                ),
            ),
            (
                spectra_ademamix,
                lambda rate, weight_decay: optax.contrib.ademamix(
                    rate, b3=0.999, alpha=8.0, weight_decay=weight_decay
                ),
            ),
        ],
    )
    def test_without_threshold_it_is_the_base_optimizer(self, make, base):
        ours = make(0.1, jnp.inf, weight_decay=0.3, aspect_scale=False)
        theirs = base(0.1, weight_decay=0.3)
        p, q = self.tree(), self.tree()
        state, other = ours.init(p), theirs.init(q)
        for k in range(4):
            grads = jax.tree.map(lambda x, k=k: jnp.sin(x + k), p)
            u, state = ours.update(grads, state, p)
            v, other = theirs.update(grads, other, q)
            p, q = optax.apply_updates(p, u), optax.apply_updates(q, v)
        jax.tree.map(np.testing.assert_array_equal, p, q)

    def test_decay_is_exact_masked_and_not_clipped(self):
        p = jax.tree.map(lambda x: 1e3 * x, self.tree())
        tx = spectra(
            optax.identity(),
            0.1,
            1e-3,
            weight_decay=0.2,
            weight_decay_mask={"w": True, "b": False},
        )
        updates = tx.update(optax.tree.zeros_like(p), tx.init(p), p)[0]
        np.testing.assert_allclose(updates["w"], -0.02 * p["w"], rtol=1e-6)
        assert not updates["b"].any()

    def test_warm_up_bounds_every_step(self):
        eta = optax.warmup_cosine_decay_schedule(1e-4, 1e-2, 5, 20)
        tx = spectra_signum(
            eta, 0.5, weight_decay=0.0, warmup_steps=5, aspect_scale=False
        )
        p = self.tree()
        state = tx.init(p)
        norms = []
        for k in range(12):
            updates, state = tx.update(jax.tree.map(lambda x: x + 0.1, p), state, p)
            norms.append(float(jnp.linalg.norm(updates["w"], 2)))
            assert norms[-1] <= 0.5 * 1e-2 * (1 + 1e-5), k
        # The coupling makes early steps nearly as large as the bound allows:
        # at 1e-4 times sign matrices of norm >= 3 against a bound of 5e-3.
        assert norms[0] > 2.9e-4

    @pytest.mark.parametrize(
        ("make", "rates"),
        [
            (pre_spectral_clip, {}),
            (spectra_adamw, {"learning_rate": 0.1}),
            (spectra_signum, {"learning_rate": 0.1}),
            (spectra_ademamix, {"learning_rate": 0.1}),
        ],
    )
    def test_options_pass_through_injected_hyperparameters(self, make, rates):
        options = {"kind": "hard", "batch_same_shapes": False}
        static = ["warmup_steps"] if rates else []
        injected = optax.inject_hyperparams(make, static_args=static)
        p = self.tree()
        updates = [
            tx.update(p, tx.init(p), p)[0]
            for tx in (
                injected(**rates, threshold=0.5, **options),
                make(**rates, threshold=0.5, **options),
            )
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *updates)

    def test_warmup_steps_must_not_be_injected(self):
        p = self.tree()
        tx = optax.inject_hyperparams(spectra_adamw)(0.1, 0.5)
        with pytest.raises(TypeError, match=r"warmup_steps .* static_args"):
            tx.init(p)

    def test_pre_clip(self):
        tree = self.tree()
        clipped = apply(pre_spectral_clip(0.1), tree)
        np.testing.assert_array_equal(clipped["b"], tree["b"])
        expected = soft_spectral_clip(tree["w"], 0.1)
        np.testing.assert_allclose(clipped["w"], expected, rtol=1e-5)

    def test_signum_momentum(self):
        """M ← βM + G; with Nesterov the sign is of G + βM."""
        grads = [jnp.array([1.0, 1.0]), jnp.array([-0.9, -0.99])]
        for nesterov, expected in ((True, [1.0, -1.0]), (False, [1.0, -1.0])):
            tx = spectra_signum(
                1.0, np.inf, beta=0.95, nesterov=nesterov, weight_decay=0.0
            )
            p = jnp.zeros(2)
            state = tx.init(p)
            for g in grads:
                updates, state = tx.update(g, state, p)
            m = 0.95 * grads[0] + grads[1]
            direction = grads[1] + 0.95 * m if nesterov else m
            np.testing.assert_array_equal(-updates, jnp.sign(direction))
            assert (updates == -jnp.asarray(expected)).all() or nesterov


@pytest.mark.usefixtures("x64")
class TestTheory:
    def test_composite_frank_wolfe(self):
        """With the hard clip each step is X ← (1-γ)X + γV, V from a linear oracle."""
        rng = np.random.default_rng(0)
        eta, lam, c, alpha = 0.05, 0.2, 1.3, 1.0
        radius, weight, gamma = alpha * c / lam, lam / alpha, lam * eta
        tx = spectra(
            optax.ema(0.9, debias=False), eta, c, weight_decay=lam, kind="hard"
        )
        target = rng.normal(size=(6, 5)) * 3
        x = y = jnp.asarray(rng.normal(size=(6, 5)))
        state, momentum = tx.init(x), 0.0
        for _ in range(50):
            gradient = x - target
            updates, state = tx.update(gradient, state, x)
            momentum = 0.9 * momentum + 0.1 * (y - target)
            # argmin <M,V> + (weight/2)‖V‖² over the ball: project -M/weight onto it.
            u, s, vt = np.linalg.svd(momentum, full_matrices=False)
            v = -u * np.minimum(s / weight, radius) @ vt
            x, y = optax.apply_updates(x, updates), (1 - gamma) * y + gamma * v
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)

    def test_weights_stay_in_the_ball(self):
        lam, c, eta = 0.5, 1.0, 0.2
        tx = spectra_signum(eta, c, weight_decay=lam)
        x = 20 * jnp.eye(6, 4)
        state, start, shrink = tx.init(x), 20.0, 1.0
        for k in range(60):
            updates, state = tx.update(normal(k, (6, 4)), state, x)
            x = optax.apply_updates(x, updates)
            shrink *= 1 - lam * eta
            bound = shrink * start + (1 - shrink) * c / lam
            assert np.linalg.norm(x, 2) <= bound + 1e-12
        assert np.linalg.norm(x, 2) < 2 * c / lam
