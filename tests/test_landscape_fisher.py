"""Fisher matrices and the covariance of gradients.

Keys are fixed, so a statistical bound either always holds or never.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from basinax.landscape import (
    dense,
    empirical_fisher,
    fisher,
    gauss_newton,
    gradient_covariance,
)

KEY = jax.random.key(0)
CRITERIA = pytest.mark.parametrize(
    "criterion", ["cross_entropy", "squared_error", "bernoulli"]
)


def model(params, x):
    return jnp.tanh(x) @ params["w"] + params["b"].reshape((1,) * (x.ndim - 1) + (3,))


def example_loss(params, x, y):
    return -jax.nn.log_softmax(model(params, x[None])[0])[y]


def point(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(2, 3)), "b": rng.normal(size=3), "none": None}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def batch(dtype=np.float64, seed=0, rows=7):
    rng = np.random.default_rng((1, seed))
    x = jnp.asarray(rng.normal(size=(rows, 2)), dtype)
    return x, jnp.asarray(rng.integers(0, 3, rows))


@functools.partial(jax.jit, static_argnames="loss")
def gradients(loss, params, batch):
    """Return one flat gradient per row."""
    per_example = jax.vmap(jax.grad(loss), (None, *[0] * len(batch)))
    leaves = jax.tree.leaves(per_example(params, *batch))
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


@CRITERIA
def test_sampled_matrix_approaches_gauss_newton(criterion):
    """The error falls with the root of the samples; without a key there is none."""
    params, (x, _) = point(jnp.float32), batch(jnp.float32)
    make = functools.partial(fisher, model, params, x, criterion=criterion)
    exact = dense(gauss_newton(model, criterion, params, x), params)
    np.testing.assert_array_equal(dense(make(), params), exact)
    size = np.linalg.norm(exact)
    errors = [
        np.linalg.norm(dense(make(key=KEY, num_samples=s), params) - exact) / size
        for s in (16, 4096)
    ]
    # Times the root of the samples, errors were 0.3 to 1.3 for several keys.
    assert errors[1] < 2.5 / np.sqrt(4096)
    assert errors[0] > 3 * errors[1]


@CRITERIA
def test_sampled_matrix_has_low_rank_and_is_fixed(x64, criterion):
    params, (x, _) = point(), batch(rows=2)
    make = functools.partial(fisher, model, params, x, criterion=criterion)
    matrix = np.asarray(dense(make(key=KEY, num_samples=2), params))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-15)
    values = np.linalg.eigvalsh(matrix)
    tiny = 1e-12 * values[-1]
    assert values[0] > -tiny
    assert np.sum(values > tiny) <= 4
    kept = make(key=KEY, num_samples=2, linearize=True)
    np.testing.assert_allclose(dense(kept, params), matrix, atol=1e-14)
    other = dense(make(key=jax.random.key(1), num_samples=2), params)
    assert np.linalg.norm(other - matrix) > 0.01 * np.linalg.norm(matrix)


def test_sampled_labels_follow_the_model(x64):
    """A single row of known labels: the score is that of the drawn class."""
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    p = np.exp(logits[0])
    scores = np.eye(3) - p
    seen = np.zeros(3)

    def identity(z, _):
        return z

    for seed in range(200):
        operator = fisher(identity, logits, None, key=jax.random.key(seed))
        product = np.asarray(operator(jnp.array([[1.0, 2.0, 4.0]])))[0]
        expected = scores * (scores @ [1, 2, 4])[:, None]
        matches = np.linalg.norm(expected - product, axis=1) < 1e-12
        assert matches.sum() == 1
        seen += matches
    deviation = np.sqrt(200 * p * (1 - p))
    assert (abs(seen - 200 * p) < 4 * deviation).all()


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 20])
def test_matrices_of_per_example_gradients(x64, chunk_size):
    """Three in a chunk leave one example over, twenty are more than there are."""
    params, data = point(), batch()
    g = np.asarray(gradients(example_loss, params, data))
    for make, expected in (
        (empirical_fisher, g.T @ g / 7),
        (gradient_covariance, np.cov(g.T)),
        (functools.partial(gradient_covariance, unbiased=False), np.cov(g.T, ddof=0)),
    ):
        operator = make(example_loss, params, data, chunk_size=chunk_size)
        np.testing.assert_allclose(dense(operator, params), expected, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_kept_and_fresh_agree(x64, chunk_size):
    params, data = point(), batch()
    for make in (empirical_fisher, gradient_covariance):
        fresh, kept = (
            make(
                example_loss, params, data, chunk_size=chunk_size, linearize=linearize
            )(params)
            for linearize in (False, True)
        )
        for got, want in zip(*map(jax.tree.leaves, (kept, fresh)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_covariance_does_not_cancel():
    """Subtracting the squared mean, 1e8, from 1e8 + 1 leaves nothing of single."""
    noise = np.random.default_rng(0).normal(size=1000)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    x = jnp.asarray(1e4 + noise, jnp.float32)

    def linear(w, x):
        return w * x

    operator = gradient_covariance(linear, jnp.float32(0), (x,))
    # Rounding 1e4 to single precision moves each gradient by up to 5e-4.
    np.testing.assert_allclose(operator(jnp.float32(1)), 1, rtol=1e-2)
    same = gradient_covariance(linear, jnp.float32(0), (jnp.ones(5),))
    assert same(jnp.float32(1)) == 0


@pytest.mark.parametrize("make", [empirical_fisher, gradient_covariance])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_new_parameters_and_data_do_not_retrace(make, chunk_size):
    traces, outer_traces = [], []

    def counted(params, x, y):
        traces.append(None)
        return example_loss(params, x, y)

    @jax.jit
    def outer(operator, v):
        outer_traces.append(None)
        return operator(v)

    results, counts = [], []
    for seed in range(3):
        params, data = point(jnp.float32, seed), batch(jnp.float32, seed)
        operator = make(counted, params, data, chunk_size=chunk_size)
        results.append(float(operator(params)["b"][0]))
        outer(operator, params)
        counts.append(len(traces))
    assert counts == [1] * 3
    assert len(outer_traces) == 1
    assert len(set(results)) == 3
    make(counted, params, batch(jnp.float32, rows=9), chunk_size=chunk_size)(params)
    assert len(traces) > counts[-1]


def test_new_keys_do_not_retrace():
    traces, results = [], []

    def counted(params, x):
        traces.append(None)
        return model(params, x)

    for seed in range(3):
        params, (x, _) = point(jnp.float32, seed), batch(jnp.float32, seed)
        key = jax.random.key(seed)
        operator = fisher(counted, params, x, key=key)
        results.append(float(operator(params)["b"][0]))
    assert len(traces) == 1
    assert len(set(results)) == 3


def test_chunks_bound_the_memory():
    def wide(params, x):
        hidden = jnp.tanh(jnp.outer(x, params[0]))
        return jnp.sum(jnp.tanh(hidden * params[1][None]) ** 2)

    params = [jnp.ones(256), jnp.ones(256)]
    x = jnp.ones((64, 32))

    def temporary(chunk_size):
        operator = empirical_fisher(wide, params, (x,), chunk_size=chunk_size)
        product = jax.jit(lambda operator, v: operator(v)).lower(operator, params)
        return product.compile().memory_analysis().temp_size_in_bytes

    assert temporary(4) < temporary(None) / 8


def test_loss_may_carry_its_own_arrays():
    def weighted(weight, params, x, y):
        return weight * example_loss(params, x, y)

    params, data = point(jnp.float32), batch(jnp.float32)
    products = [
        empirical_fisher(Partial(weighted, jnp.float32(w)), params, data)(params)["b"]
        for w in (1, 2)
    ]
    np.testing.assert_allclose(products[1], 4 * products[0], rtol=1e-5)


@pytest.mark.parametrize("make", [empirical_fisher, gradient_covariance])
def test_low_precision_parameters(make):
    params, (x, y) = point(jnp.bfloat16), batch(jnp.bfloat16)
    product = make(example_loss, params, (x, y))(params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    expected = make(example_loss, wide, (x.astype(jnp.float32), y))(wide)
    for got, want in zip(*map(jax.tree.leaves, (product, expected)), strict=True):
        assert got.dtype == jnp.bfloat16
        atol = 0.05 * float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=atol)


ROW = jnp.ones((3, 2))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (ROW, {}, r"must be a tuple .* got a \w*Array"),
        ((ROW, jnp.ones(4)), {}, "one leading axis in common"),
        ((ROW, jnp.float32(1)), {}, "one leading axis in common"),
        ((), {}, "one leading axis in common"),
        ((ROW[:0],), {}, "at least 1 examples"),
        ((ROW,), {"chunk_size": 0}, "chunk_size must be at least 1"),
        ((ROW,), {}, r"must return one real .* array of shape \(2,\)"),
    ],
)
def test_mistakes_are_named(data, options, message):
    with pytest.raises(ValueError, match=message):
        empirical_fisher(lambda w, x: w * x, jnp.float32(1), data, **options)(
            jnp.float32(1)
        )


def test_unbiased_covariance_needs_two_examples():
    loss, data = lambda w, x: w * x, (jnp.ones(1),)
    with pytest.raises(ValueError, match="at least 2 examples"):
        gradient_covariance(loss, jnp.float32(1), data)
    biased = gradient_covariance(loss, jnp.float32(1), data, unbiased=False)
    assert biased(jnp.float32(1)) == 0


def test_samples_need_a_key():
    params, (x, _) = point(jnp.float32), batch(jnp.float32)
    for options in ({"num_samples": 2}, {"num_samples": 0, "key": KEY}):
        with pytest.raises(ValueError, match="num_samples must be at least 1"):
            fisher(model, params, x, **options)
    with pytest.raises(ValueError, match="criterion='hinge' is unknown"):
        fisher(model, params, x, criterion="hinge")
