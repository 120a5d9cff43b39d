"""Hessian operators: exactness, symmetry, cost, and no retracing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

from basinax.landscape import dense, hessian

MODES = pytest.mark.parametrize("linearize", [False, True])


def loss(params, x):
    """Couple a matrix, a vector and a number; the None leaf takes no part."""
    hidden = jnp.tanh(x @ params["layer"]["w"] + params["layer"]["b"][None])
    return jnp.mean(jnp.exp(params["scale"] * hidden) ** 2)


def point(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "layer": {
            "w": rng.normal(size=(3, 2)),
            "b": rng.normal(size=2),
            "frozen": None,
        },
        "scale": rng.normal(),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def batch(dtype=np.float64, seed=0, rows=5):
    rng = np.random.default_rng((1, seed))
    return jnp.asarray(rng.normal(size=(rows, 3)), dtype)


def oracle(params, x):
    """Compute the dense Hessian by reverse over reverse mode."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.jacrev(jax.grad(lambda w: loss(unravel(w), x)))(flat)


@MODES
def test_matrix_is_the_hessian(x64, linearize):
    params, x = point(), batch()
    matrix = dense(hessian(loss, params, x, linearize=linearize), params)
    expected = oracle(params, x)
    assert matrix.dtype == jnp.float64
    np.testing.assert_allclose(matrix, expected, atol=1e-13 * abs(expected).max())


VECTORS = st.lists(
    st.floats(-1e6, 1e6, allow_subnormal=False), min_size=9, max_size=9
).map(np.asarray)


@MODES
def test_product_is_symmetric_linear_and_exact_at_any_length(x64, linearize):
    """A finite difference would fail on both very short and very long vectors."""
    params, x = point(), batch()
    operator = hessian(loss, params, x, linearize=linearize)
    largest = np.abs(np.linalg.eigvalsh(oracle(params, x))).max()
    unravel = jax.flatten_util.ravel_pytree(params)[1]

    def product(v):
        return np.asarray(jax.flatten_util.ravel_pytree(operator(unravel(v)))[0])

    @settings(max_examples=30, deadline=None)
    @given(u=VECTORS, v=VECTORS, exponent=st.integers(-200, 200))
    def check(u, v, exponent):
        rounding = 1e-13 * largest * np.linalg.norm(u) * np.linalg.norm(v)
        assert abs(u @ product(v) - v @ product(u)) <= rounding
        total = product(u + v)
        lengths = largest * (np.linalg.norm(u) + np.linalg.norm(v))
        assert np.linalg.norm(total - product(u) - product(v)) <= 1e-13 * lengths
        scaled = np.ldexp(product(np.ldexp(v, exponent)), -exponent)
        np.testing.assert_allclose(scaled, product(v), rtol=1e-12, atol=1e-250)

    check()


@MODES
def test_new_parameters_and_data_do_not_retrace(linearize):
    traces, outer_traces = [], []

    def counted(params, x):
        traces.append(None)
        return loss(params, x)

    @jax.jit
    def outer(operator, v):
        outer_traces.append(None)
        return operator(v)

    results = []
    for seed in range(3):
        params, x = point(jnp.float32, seed), batch(jnp.float32, seed)
        operator = hessian(counted, params, x, linearize=linearize)
        results.append(operator(params)["scale"])
        np.testing.assert_allclose(outer(operator, params)["scale"], results[-1], 1e-4)
    # An outer trace per operator would mean that it holds its arrays as constants.
    assert len(traces) == len(outer_traces) == 1
    assert len({float(result) for result in results}) == 3
    # The count does see a retrace where one is due.
    longer = batch(jnp.float32, rows=6)
    hessian(counted, params, longer, linearize=linearize)(params)
    assert len(traces) == 2


def test_loss_may_carry_its_own_arrays():
    traces = []

    def weighted(weight, params, x):
        traces.append(None)
        return weight * loss(params, x)

    params, x = point(jnp.float32), batch(jnp.float32)
    single = hessian(Partial(weighted, jnp.float32(1)), params, x)(params)
    double = hessian(Partial(weighted, jnp.float32(2)), params, x)(params)
    np.testing.assert_allclose(double["scale"], 2 * single["scale"], rtol=1e-6)
    assert len(traces) == 1


def test_operator_can_be_made_under_jit_and_scan():
    """Averages over batches build their operators inside compiled loops."""
    params = point(jnp.float32)
    batches = jnp.stack([batch(jnp.float32, seed) for seed in range(3)])

    @jax.jit
    def mean_product(v):
        def body(total, x):
            product = hessian(loss, params, x, linearize=True)(v)
            return jax.tree.map(jnp.add, total, product), None

        zeros = jax.tree.map(jnp.zeros_like, v)
        return jax.tree.map(lambda t: t / 3, jax.lax.scan(body, zeros, batches)[0])

    expected = hessian(loss, params, batches.reshape(-1, 3))(params)
    for got, want in zip(
        jax.tree.leaves(mean_product(params)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_cost_in_gradients():
    """Per dense layer: 3 products a gradient, 8 a fresh product, 6 a linearised one.

    The first layer, whose input has no derivative, takes 2, 3 and 2. Here that makes
    2.40 gradients fresh and 1.77 linearised.
    """

    def perceptron(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    widths = (32, 64, 64, 8)
    weights = [jnp.ones(shape) for shape in itertools.pairwise(widths)]
    x = jnp.ones((128, widths[0]))

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    def product(operator, v):
        return operator(v)

    gradient = flops(jax.grad(perceptron), weights, x)
    fresh = flops(product, hessian(perceptron, weights, x), weights)
    kept = hessian(perceptron, weights, x, linearize=True)
    cached = flops(product, kept, weights)
    assert fresh / gradient == pytest.approx(2.40, rel=0.05)
    assert cached / gradient == pytest.approx(1.77, rel=0.05)


@MODES
def test_low_precision_parameters(linearize):
    params, x = point(jnp.bfloat16), batch(jnp.bfloat16)
    operator = hessian(loss, params, x, linearize=linearize)
    ones = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), params)
    product = operator(ones)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(product))
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    expected = hessian(loss, wide, x.astype(jnp.float32))(ones)
    for got, want in zip(
        jax.tree.leaves(product), jax.tree.leaves(expected), strict=True
    ):
        scale = float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05 * scale)
    assert dense(operator, params).dtype == jnp.float32


def test_dense_takes_numbers_and_leaves_of_several_dtypes(x64):
    params = {"a": 2.0, "b": np.float32([1, 3]), "none": None}

    def product(p):
        return jnp.sum(p["a"] * p["b"] ** 2)

    matrix = dense(hessian(product, params), params)
    np.testing.assert_array_equal(matrix, [[0, 2, 6], [2, 4, 0], [6, 0, 4]])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(2), "step": jnp.zeros((), int)}, r"params\['step'\] is int32"),
        ({"w": jnp.ones(2) * 1j}, "complex64"),
        ({"w": 3}, "int32"),
        ({"w": None}, "no numbers"),
    ],
)
def test_parameters_must_be_real_and_floating(params, message):
    with pytest.raises(ValueError, match=message):
        hessian(lambda p: jnp.sum(p["w"] ** 2), params)


@MODES
def test_vector_must_be_shaped_like_the_parameters(linearize):
    params = {"w": jnp.ones(3), "b": None}
    operator = hessian(lambda p: jnp.sum(p["w"] ** 3), params, linearize=linearize)
    for wrong in ({"w": jnp.ones(2), "b": None}, {"w": jnp.ones(3)}, jnp.ones(3)):
        with pytest.raises(ValueError, match="the vector must be shaped like"):
            operator(wrong)


def test_dense_checks_the_operator():
    with pytest.raises(ValueError, match="operator's result must be shaped like"):
        dense(lambda v: v[:1], jnp.ones(3))
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda like: dense(lambda v: v, like))(jnp.ones(3))


@MODES
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w: w**2, r"an array of shape \(3,\) and type float32"),
        (lambda w: jnp.sum(w**2, keepdims=True), r"an array of shape \(1,\)"),
        (lambda w: (jnp.sum(w**2), w), "a tuple"),
        (lambda w: {"loss": jnp.sum(w**2)}, "a dict"),
        (lambda w: None, "a NoneType"),
        (lambda w: jnp.sum(w**2) * 1j, "complex64"),
        (lambda w: jnp.argmax(w), "int32"),
    ],
)
def test_loss_must_return_one_real_number(wrong, message, linearize):
    with pytest.raises(ValueError, match=f"loss_fn must return one real.*{message}"):
        hessian(wrong, jnp.ones(3), linearize=linearize)(jnp.ones(3))
