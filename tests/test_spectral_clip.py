"""The transformation: leaves as matrices, scales, vectors, schedules, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.optimizers import (
    coupled_threshold,
    decayed_threshold,
    hard_spectral_clip,
    orthogonalize,
    pre_spectral_clip,
    soft_spectral_clip,
    spectra_adamw,
    spectral_clip,
)

Dims = optax.contrib.MuonDimensionNumbers


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def apply(tx, updates, params=None):
    return jax.jit(tx.update)(updates, tx.init(updates), params)[0]


def count(jaxpr, wanted):
    """Count the equations that satisfy a predicate: loops unrolled, longest branch."""
    total = 0
    for eqn in jaxpr.eqns:
        total += bool(wanted(eqn))
        inner = [
            count(getattr(p, "jaxpr", p), wanted)
            for value in eqn.params.values()
            for p in (value if isinstance(value, tuple | list) else [value])
            if hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ]
        trips = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        # Only one branch runs: of a condition, or for the platform at hand.
        combine = max if eqn.primitive.name == "cond" else sum
        total += trips * combine(inner or [0])
    return total


def is_product(shape):
    return lambda eqn: (
        eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape == shape
    )


@pytest.mark.parametrize(
    ("method", "products"),
    # The Gram matrix itself is one more m×m result, a product of m×n matrices.
    [("polynomial", 1 + 12), ("newton_schulz", 1 + 30)],
)
def test_number_of_products(method, products):
    clip = jax.make_jaxpr(lambda x: soft_spectral_clip(x, 1.0, method=method))
    jaxpr = clip(jnp.ones((6, 16))).jaxpr
    assert count(jaxpr, is_product((6, 6))) == products
    assert count(jaxpr, is_product((6, 16))) == 1


class TestMatrices:
    def test_default_is_flax_orientation(self):
        tall, wide = normal(0, (4, 9)), normal(1, (9, 4))  # fan_out 9 and 4
        clipped = apply(spectral_clip(1.0), {"up": tall, "down": wide})
        expected = soft_spectral_clip(tall, 1.0) * 1.5
        np.testing.assert_allclose(clipped["up"], expected, rtol=1e-5)
        expected = soft_spectral_clip(wide, 1.0)
        np.testing.assert_allclose(clipped["down"], expected, rtol=1e-5)

    def test_torch_orientation_is_the_transpose(self):
        x = normal(0, (4, 9))
        flax = apply(spectral_clip(1.0), x)
        torch = apply(spectral_clip(1.0, dimension_numbers=Dims(1, 0)), x.T)
        np.testing.assert_allclose(torch.T, flax, rtol=1e-5, atol=1e-7)

    def test_no_aspect_scale(self):
        x = normal(0, (4, 9))
        clipped = apply(spectral_clip(1.0, aspect_scale=False), x)
        np.testing.assert_allclose(clipped, soft_spectral_clip(x, 1.0), rtol=1e-6)

    @pytest.mark.parametrize("method", ["auto", "newton_schulz", "polynomial"])
    def test_same_shapes_in_one_batch(self, method):
        """Stacking changes rounding at most, whatever the scales beside it.

        Both sides are within 1e-5 of the exact result.
        """
        tree = {f"w{i}": normal(i, (4, 9)) * 10.0**i for i in range(4)}
        tree |= {"transposed": normal(9, (9, 4)), "other": normal(8, (5, 5))}
        batched = apply(spectral_clip(1.0, method=method), tree)
        alone = apply(spectral_clip(1.0, method=method, batch_same_shapes=False), tree)
        for name in tree:
            np.testing.assert_allclose(
                batched[name], alone[name], rtol=0, atol=1e-5, err_msg=name
            )

    def test_one_decomposition_for_equal_shapes(self):
        tree = [normal(0, (4, 9)), normal(1, (9, 4)), normal(2, (4, 9))]
        for batch, calls in ((True, 1), (False, 3)):
            tx = spectral_clip(1.0, method="eigh", batch_same_shapes=batch)
            jaxpr = jax.make_jaxpr(lambda u, tx=tx: apply(tx, u))(tree).jaxpr
            assert count(jaxpr, lambda eqn: eqn.primitive.name == "eigh") == calls

    @pytest.mark.parametrize(
        ("shape", "dims", "order", "sizes"),
        [
            ((3, 4, 9), Dims(-2, -1), (0, 1, 2), (3, 4, 9)),
            ((4, 3, 9), Dims(0, 2), (1, 0, 2), (3, 4, 9)),
            ((3, 3, 2, 5), Dims((0, 1, 2), 3), (0, 1, 2, 3), (1, 18, 5)),
            ((6, 2, 4), Dims(0, (1, 2)), (0, 1, 2), (1, 6, 8)),
            ((2, 6, 2, 4), Dims((1,), (-2, -1)), (0, 1, 2, 3), (2, 6, 8)),
        ],
    )
    def test_dimension_numbers(self, shape, dims, order, sizes):
        x = normal(0, shape)
        clipped = apply(spectral_clip(1.0, dimension_numbers=dims), x)
        alpha = np.sqrt(max(1, sizes[2] / sizes[1]))
        stack = x.transpose(order).reshape(sizes)
        expected = soft_spectral_clip(stack, 1.0) * alpha
        actual = clipped.transpose(order).reshape(sizes)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)

    def test_tree_of_dimension_numbers(self):
        tree = {
            "conv": normal(0, (3, 3, 2, 5)),
            "blocks": {"up": normal(1, (2, 4, 9)), "bias": normal(2, (9,))},
            "embedding": normal(3, (20, 6)),
        }
        prefix = {"conv": None, "blocks": Dims(-2, -1), "embedding": Dims(1, 0)}
        by_tree = apply(spectral_clip(1.0, dimension_numbers=prefix), tree)
        np.testing.assert_array_equal(by_tree["conv"], tree["conv"])
        by_call = apply(spectral_clip(1.0, dimension_numbers=lambda _: prefix), tree)
        jax.tree.map(np.testing.assert_array_equal, by_tree, by_call)
        alpha = np.sqrt(20 / 6)
        top = np.linalg.norm(by_tree["embedding"], 2)
        assert 0.9 * alpha < top < alpha
        v = tree["blocks"]["bias"]
        expected = v / np.sqrt(1 + np.sum(v**2))
        np.testing.assert_allclose(by_tree["blocks"]["bias"], expected, rtol=1e-6)

    def test_kinds(self):
        x = normal(0, (9, 4)) * 5
        for kind, expected in (
            ("soft", soft_spectral_clip(x, 2.0)),
            ("hard", hard_spectral_clip(x, 2.0)),
            ("normalize", orthogonalize(x)),
        ):
            clipped = apply(spectral_clip(2.0, kind=kind), x)
            np.testing.assert_allclose(clipped, expected, rtol=0, atol=5e-6)


class TestVectors:
    @pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
    def test_policies(self, scale):
        v = scale * jnp.array([0.6, 0.8])  # norm `scale`, threshold 1
        smooth = v / np.sqrt(1 + scale**2)
        reference = v if scale <= 1 else smooth
        for policy, expected in (
            ("smooth", smooth),
            ("reference", reference),
            ("skip", v),
        ):
            clipped = apply(spectral_clip(1.0, vectors=policy), v)
            np.testing.assert_allclose(clipped, expected, rtol=1e-6)
        clipped = apply(spectral_clip(1.0, kind="hard"), v)
        np.testing.assert_allclose(clipped, v / max(scale, 1), rtol=1e-6)
        clipped = apply(spectral_clip(1.0, kind="normalize"), v)
        np.testing.assert_allclose(clipped, v / scale, rtol=1e-5)

    def test_same_as_a_row(self):
        v = normal(0, (7,))
        row = soft_spectral_clip(v[None], 0.7)[0]
        np.testing.assert_allclose(apply(spectral_clip(0.7), v), row, rtol=1e-6)

    @pytest.mark.parametrize("kind", ["soft", "hard", "normalize"])
    def test_edges(self, kind):
        tx = spectral_clip(1.0, kind=kind)
        np.testing.assert_array_equal(apply(tx, jnp.zeros(3)), np.zeros(3))
        assert apply(tx, jnp.zeros((0,))).shape == (0,)
        assert apply(tx, jnp.asarray(5.0)).shape == ()
        assert jnp.isnan(apply(tx, jnp.array([1.0, jnp.nan]))).all()
        huge = apply(tx, jnp.full(4, 3e38))
        np.testing.assert_allclose(huge, np.full(4, 0.5), rtol=1e-6)

    def test_zero_and_infinite_threshold(self):
        v = normal(0, (5,))
        assert not apply(spectral_clip(0.0), v).any()
        np.testing.assert_array_equal(apply(spectral_clip(np.inf), v), v)


class TestBadInput:
    @pytest.mark.parametrize("bad", [-1.0, float("nan"), np.float32(-0.5)])
    def test_threshold_value(self, bad):
        for make in (spectral_clip, pre_spectral_clip, lambda c: spectra_adamw(0.1, c)):
            with pytest.raises(ValueError, match="threshold must be >= 0"):
                make(bad)

    def test_threshold_type(self):
        with pytest.raises(TypeError, match="threshold must be a number"):
            spectral_clip("big")

    def test_words(self):
        with pytest.raises(ValueError, match="method='lu' is unknown; use one of auto"):
            spectral_clip(1.0, method="lu")
        with pytest.raises(ValueError, match="kind='medium'"):
            spectral_clip(1.0, kind="medium")
        with pytest.raises(ValueError, match="vectors='clip'"):
            spectral_clip(1.0, vectors="clip")
        with pytest.raises(ValueError, match="shape='step'"):
            decayed_threshold(1.0, 10, 0.1, shape="step")

    def test_leaf_without_dimension_numbers(self):
        x = {"conv": jnp.ones((2, 3, 4))}
        with pytest.raises(ValueError, match=r"\['conv'\].*\(2, 3, 4\).*MuonDim"):
            apply(spectral_clip(1.0), x)

    def test_axes(self):
        with pytest.raises(ValueError, match="disjoint"):
            spectral_clip(1.0, dimension_numbers=Dims(0, 0))
        with pytest.raises(ValueError, match="disjoint"):
            apply(spectral_clip(1.0, dimension_numbers=Dims(1, -1)), jnp.ones((2, 3)))
        with pytest.raises(ValueError, match="has no axis 2"):
            apply(spectral_clip(1.0, dimension_numbers=Dims(1, 2)), jnp.ones((2, 3)))

    def test_tree_of_axes(self):
        tx = spectral_clip(1.0, dimension_numbers={"a": Dims()})
        with pytest.raises(ValueError, match="do not fit the tree"):
            apply(tx, {"b": jnp.ones((2, 3))})
        with pytest.raises(TypeError, match="MuonDimensionNumbers"):
            spectral_clip(1.0, dimension_numbers=(0, 1))

    @pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
    @pytest.mark.parametrize("shape", [(2, 3), (3,), ()])
    def test_leaf_dtype(self, dtype, shape):
        x = {"a": jnp.ones(shape, dtype)}
        with pytest.raises(TypeError, match=rf"got {dtype.__name__} at \['a'\]"):
            apply(spectral_clip(1.0), x)

    def test_steps_and_counts(self):
        with pytest.raises(TypeError, match="static_args"):
            spectral_clip(1.0, steps=2.5)
        with pytest.raises(TypeError, match="warmup_steps must be an int"):
            coupled_threshold(1.0, lambda k: k, 2.5)
        with pytest.raises(ValueError, match="warmup_steps must be >= 0"):
            coupled_threshold(1.0, lambda k: k, -1)
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
            decayed_threshold(1.0, 10, 1.5)
        with pytest.raises(ValueError, match="final_scale must be >= 0"):
            decayed_threshold(1.0, 10, 0.5, final_scale=-1)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_vmap_over_several_shapes(kind):
    """Seeds side by side: equal to one at a time, and it ends."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (6, 9), "b": (9, 12), "c": (12, 4)}
    seeds = {
        n: jax.random.normal(k, (3, *shapes[n]))
        for n, k in zip("abc", keys, strict=True)
    }
    method = "eigh" if kind == "soft" else "auto"
    tx = spectral_clip(0.5, kind=kind, method=method)

    def clip(tree):
        return tx.update(tree, tx.init(tree))[0]

    together = jax.jit(jax.vmap(clip))(seeds)
    for i in range(3):
        alone = clip(jax.tree.map(lambda x, i=i: x[i], seeds))
        for n in shapes:
            np.testing.assert_allclose(together[n][i], alone[n], rtol=0, atol=1e-5)
