"""Gradient geometry in chunks, per matrix, on meshes, and called by mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradient_rows import close, many
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from basinax.landscape import (
    coherence,
    gradient_cosines,
    gradient_deviations,
    gradient_noise_scale,
    gradient_spectrum,
    gradient_variance,
    noise_scale_from_norms,
)

# --- per-example gradients -----------------------------------------------------------


def example_loss(params, x, y):
    return (jnp.sum(jnp.tanh(x @ params["w"])) + params["b"] - y) ** 2


def examples(dtype=np.float32):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)), "b": np.float64(0.3), "none": None}
    batch = rng.normal(size=(10, 4)), rng.normal(size=10)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, batch))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_chunks_change_nothing(dtype):
    params, batch = examples(dtype)
    grads = jax.vmap(jax.grad(example_loss), (None, 0, 0))(params, *batch)
    for chunk_size in (None, 4, 10, 99):
        found = gradient_deviations(example_loss, params, batch, chunk_size=chunk_size)
        assert found.lengths.dtype == jnp.float32
        kept = [gradient_noise_scale(source) for source in (found, grads)]
        # A matrix product may be summed in another order, visibly in bfloat16.
        tolerance = 1e-5 if dtype == np.float32 else 3e-2
        for a, b in zip(*map(jax.tree.leaves, kept), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance)
    assert found.projections.shape == (10,)
    np.testing.assert_allclose(found.projections.sum(), 0, atol=1e-4)


def test_chunks_share_their_code():
    calls = []

    def loss(params, x, y):
        calls.append(1)
        return example_loss(params, x, y)

    params, batch = examples()
    for scale in (1.0, 2.0):
        moved = params | {"b": scale * params["b"]}
        gradient_deviations(loss, moved, batch, chunk_size=2)
    assert len(calls) == 2  # once for the mean and once for the deviations


# --- spectra -------------------------------------------------------------------------


def ranks(s):
    p = s / s.sum()
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum()
    return s.sum(), np.exp(entropy), (s**2).sum() / s.max() ** 2


def prescribed(s, shape, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, len(s))))[0] for n in shape)
    return (u * s[None]) @ v.T


@settings(max_examples=10, deadline=None)
@given(seed=many, size=st.sampled_from([1e-30, 1.0, 1e30]))
def test_spectrum_by_definition(seed, size):
    rng = np.random.default_rng(seed)
    s = rng.exponential(size=4) + 1e-3
    matrix = prescribed(s, (6, 4), seed)
    found = gradient_spectrum(jnp.asarray(np.float32(size) * np.float32(matrix)))
    nuclear, effective, stable = ranks(s)
    np.testing.assert_allclose(found.nuclear_norm / np.float32(size), nuclear, 1e-5)
    np.testing.assert_allclose(found[1:], (effective, stable), 1e-5)
    assert 1 <= found.stable_rank <= found.effective_rank * (1 + 1e-5) <= 4.0001


def test_small_singular_values_count():
    """Of a Gram matrix in float32 nothing below 3e-4 of the largest would be left."""
    s = np.array([1.0, *[3e-5] * 15])
    matrix = jnp.asarray(prescribed(s, (24, 16)), jnp.float32)
    found = gradient_spectrum(matrix)
    # Values of 3e-5 with errors of 1e-7 in entries of order 0.1.
    for value, exact in zip(found, ranks(s), strict=True):
        np.testing.assert_allclose(value, exact, rtol=2e-5)
    assert found.effective_rank > 1.005


def test_which_leaves_are_matrices(x64):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2, 4, 5))
    tree = {
        "conv": jnp.asarray(kernel),
        "dense": jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16),
        "bias": jnp.ones(3),
        "scale": jnp.ones(()),
        "steps": jnp.arange(3),
        "none": None,
        "empty": jnp.ones((0, 3)),
        "zero": jnp.zeros((2, 2)),
    }
    found = gradient_spectrum(tree)
    for result in found:
        assert all(result[name] is None for name in ("bias", "scale", "steps", "none"))
        assert result["zero"] == result["empty"] == 0
    assert found.nuclear_norm["dense"].dtype == jnp.float32

    def assert_ranks(found, matrix):
        s = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(found, ranks(s), rtol=1e-12)

    assert_ranks([x["conv"] for x in found], kernel.reshape(-1, 5))
    torch = gradient_spectrum(
        tree["conv"], axes=lambda path, leaf: range(1, jnp.ndim(leaf))
    )
    assert_ranks(torch, kernel.reshape(3, -1))
    assert_ranks(
        gradient_spectrum(tree["conv"], axes=(-1, 1)),
        kernel.transpose(1, 3, 0, 2).reshape(10, 12),
    )
    layers = jax.vmap(gradient_spectrum)(tree["conv"])
    assert_ranks([x[1] for x in layers], kernel[1].reshape(-1, 5))
    assert gradient_spectrum({}) == ({}, {}, {})


# --- meshes --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("over", ["parameters", "examples"])
def test_on_eight_devices(kind, over):
    """Rows in place with sharded parameters, and rows spread over the devices."""
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    leaves = {"w": (8, 4, 2), "b": (8, 4), "c": (8,)}
    grads = {name: np.float32(rng.normal(size=s)) for name, s in leaves.items()}
    specs = {"w": P(None, "data", "model"), "b": P(None, "data"), "c": P()}
    if over == "examples":
        specs = {name: P(("data", "model")) for name in leaves}
    sharded = {
        name: jax.device_put(x, NamedSharding(mesh, specs[name]))
        for name, x in grads.items()
    }

    def measures(grads):
        return (
            gradient_cosines(grads),
            coherence(grads),
            gradient_spectrum({"w": grads["w"]}, axes=0),
        )

    expected = jax.tree.leaves(measures(grads))
    for a, b in zip(jax.tree.leaves(jax.jit(measures)(sharded)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    if kind == AxisType.Explicit:
        eager = gradient_spectrum(sharded, axes=0).nuclear_norm["w"]
        np.testing.assert_allclose(
            eager, np.linalg.norm(grads["w"].reshape(8, -1), "nuc"), rtol=1e-5
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_examples(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params, (x, y) = examples()
    batch = x[:8], y[:8]
    expected = gradient_deviations(example_loss, params, batch)
    params = jax.device_put(params, NamedSharding(mesh, P()))
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    found = gradient_deviations(example_loss, params, batch)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- mistakes ------------------------------------------------------------------------


MEASURES = (gradient_cosines, coherence, gradient_variance, gradient_noise_scale)
BAD_TREES = {
    "without arrays": {"a": None},
    "is a scalar": {"a": jnp.ones(3), "b": jnp.ones(())},
    "2 in grads\\['b'\\]": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))},
    "grads\\['b'\\] is int32": {"a": jnp.ones(3), "b": jnp.ones(3, jnp.int32)},
    "is complex64": jnp.ones((3, 2), jnp.complex64),
    "at least . of them, but found 0": jnp.ones((0, 2)),
}


@pytest.mark.parametrize("message", BAD_TREES)
def test_trees_that_are_not_rows(message):
    for measure in MEASURES:
        with pytest.raises(ValueError, match=message):
            measure(BAD_TREES[message])


def test_too_few_gradients():
    assert coherence(jnp.ones((1, 2))) == (1, 1)
    for measure in MEASURES[:1] + MEASURES[2:]:
        with pytest.raises(ValueError, match="at least 2"):
            measure(jnp.ones((1, 2)))
    params, (x, y) = examples()
    single = gradient_deviations(example_loss, params, (x[:1], y[:1]))
    with pytest.raises(ValueError, match="deviations are those of 1"):
        gradient_variance(single)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gradient_noise_scale(jnp.ones((3, 1)), batch_size=0),
            ValueError,
            "po",
        ),
        (lambda: from_norms([1.0, 2.0], [1.0]), ValueError, "shapes"),
        (lambda: from_norms([[1.0]], [[1.0]]), ValueError, "shapes"),
        (lambda: from_norms([], []), ValueError, "shapes"),
        (lambda: from_norms(1.0, 1.0, 4, 4), ValueError, "smaller than"),
        (lambda: from_norms(1.0, 1.0, -1, 4), ValueError, "small_batch must be"),
        (lambda: gradient_spectrum(jnp.ones((2, 2)), axes=2), ValueError, "axes"),
        (lambda: gradient_spectrum(jnp.ones((2, 2)), axes=()), ValueError, "axes"),
        (lambda: gradient_spectrum(jnp.ones((2, 2)), axes=(0, 1)), ValueError, "axes"),
        (lambda: gradient_spectrum(jnp.ones((2, 2)), axes=(0, -2)), ValueError, "axes"),
        (lambda: gradient_spectrum(jnp.ones((2, 2), int)), TypeError, "int32"),
        (lambda: deviations(chunk_size=0), ValueError, "chunk_size"),
        (lambda: deviations(batch=jnp.ones(3)), ValueError, "must be a tuple"),
        (lambda: deviations(loss=lambda w, x: w * x), ValueError, "scalar|real"),
        (lambda: deviations(params={}), ValueError, "no numbers"),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def from_norms(small, big, small_batch=1, big_batch=2):
    return noise_scale_from_norms(
        jnp.array(small), jnp.array(big), small_batch=small_batch, big_batch=big_batch
    )


def deviations(loss=lambda w, x: jnp.sum(w * x), params=None, batch=None, **options):
    params = jnp.ones(2) if params is None else params
    batch = (jnp.ones((3, 2)),) if batch is None else batch
    return gradient_deviations(loss, params, batch, **options)


def test_gradients_of_tasks():
    """The shared part of multi-task gradients is such a tree."""
    from basinax.optimizers import task_gradients

    def losses_fn(params, x):
        h = jnp.tanh(params["body"] * x)
        return jnp.stack([jnp.sum(h * head) for head in params["heads"]])

    params = {"body": jnp.ones(3), "heads": [jnp.ones(3), -jnp.ones(3), 2.0]}
    owner = {"body": -1, "heads": [0, 1, 2]}
    _, grads = task_gradients(losses_fn, owner=owner)(params, jnp.arange(3.0))
    angles = gradient_cosines(grads.shared)
    close(angles.cosines, np.outer([1, -1, 1], [1, -1, 1]))
    with pytest.raises(ValueError, match="field `shared`"):
        gradient_cosines(grads)


def test_stationary_cosines_say_nothing():
    """Sources that differ by a factor of 1000 in size have the same cosines."""
    angles = 2 * np.pi * np.arange(3) / 3
    rows = np.stack([np.cos(angles), np.sin(angles)], 1)
    for size in (1, 1e-3):
        grads = jnp.asarray(size * rows, jnp.float32)
        close(gradient_cosines(grads).mean, -1 / 2)
        close(gradient_variance(grads, unbiased=False).total, size**2, atol=0)
