"""Gauss-Newton operators: exactness, cost in time and memory, and no retracing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from basinax.landscape import dense, gauss_newton, hessian

MODES = pytest.mark.parametrize("linearize", [False, True])


def model(params, x):
    """Map sequences to sequences of outputs; the None leaf takes no part."""
    hidden = jnp.tanh(x @ params["inner"])
    return params["scale"] * (hidden @ params["outer"])


def point(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "inner": rng.normal(size=(3, 4)),
        "outer": rng.normal(size=(4, 5)),
        "frozen": None,
        "scale": rng.normal(),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def batch(dtype=np.float64, seed=0, rows=3):
    rng = np.random.default_rng((1, seed))
    x = jnp.asarray(rng.normal(size=(rows, 2, 3)), dtype)
    return x, jnp.asarray(rng.integers(0, 5, (rows, 2)))


def cross_entropy(z, labels):
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(z, labels))


def squared_error(z, labels):
    return 0.5 * jnp.mean(jnp.sum((z - jax.nn.one_hot(labels, 5)) ** 2, -1))


def bernoulli(z, labels):
    targets = jax.nn.one_hot(labels, 5)
    return jnp.mean(jnp.sum(optax.losses.sigmoid_binary_cross_entropy(z, targets), -1))


CRITERIA = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
    "bernoulli": bernoulli,
}
NAMES = pytest.mark.parametrize("name", CRITERIA)


@functools.partial(jax.jit, static_argnames="name")
def oracle(name, params, x, y):
    """Build J, the Hessian of the written-out criterion, and that of the whole."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def outputs(w):
        return model(unravel(w), x)

    def loss(w):
        return CRITERIA[name](outputs(w), y)

    z = outputs(flat)
    jacobian = jax.jacfwd(outputs)(flat).reshape(-1, flat.size)
    inner = jax.hessian(lambda z: CRITERIA[name](z, y))(z).reshape(z.size, z.size)
    return jacobian.T @ inner @ jacobian, jax.hessian(loss)(flat)


@NAMES
def test_matrix_is_jacobian_hessian_jacobian(x64, name):
    params, (x, y) = point(), batch()
    expected, whole = oracle(name, params, x, y)
    close = {"rtol": 0, "atol": 1e-13 * abs(expected).max()}
    for operator in (
        gauss_newton(model, name, params, x),
        gauss_newton(model, CRITERIA[name], params, x, y, linearize=True),
    ):
        np.testing.assert_allclose(dense(operator, params), expected, **close)
    # Not the Hessian, which has the curvature of the model too.
    assert np.linalg.norm(whole - expected) > 0.01 * np.linalg.norm(expected)


def test_kept_and_fresh_agree(x64):
    params, (x, y) = point(), batch()
    for criterion in ("cross_entropy", cross_entropy):
        fresh, kept = (
            gauss_newton(model, criterion, params, x, y, linearize=linearize)(params)
            for linearize in (False, True)
        )
        for got, want in zip(*map(jax.tree.leaves, (kept, fresh)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_product_is_linear_and_exact_at_any_length(x64):
    """A finite difference would fail on both very short and very long vectors."""
    params, (x, _) = point(), batch()
    operator = gauss_newton(model, "cross_entropy", params, x)
    v = point(seed=5)
    expected = operator(v)
    for exponent in (-200, 200):
        scaled = operator(jax.tree.map(lambda a, e=exponent: jnp.ldexp(a, e), v))
        for got, want in zip(*map(jax.tree.leaves, (scaled, expected)), strict=True):
            np.testing.assert_allclose(np.ldexp(got, -exponent), want, rtol=1e-12)


def test_linear_model_has_no_other_curvature(x64):
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.normal(size=(7, 3)))
    y = jnp.asarray(rng.integers(0, 5, 7))

    def linear(w, x):
        return x @ w

    for name, criterion in CRITERIA.items():
        expected = dense(hessian(lambda w, c=criterion: c(linear(w, x), y), w), w)
        matrix = dense(gauss_newton(linear, name, w, x), w)
        np.testing.assert_allclose(matrix, expected, atol=1e-14)


def test_outputs_may_be_a_tree_if_the_criterion_is_a_function(x64):
    def two_heads(params, x):
        return {"mean": x * params["a"], "spread": jnp.exp(params["b"])}

    def criterion(z, target):
        return jnp.mean((z["mean"] - target) ** 2) / z["spread"]

    params = {"a": jnp.float64(2), "b": jnp.float64(0)}
    x, target = jnp.array([1.0, 3.0]), jnp.array([2.0, 0.0])
    matrix = dense(gauss_newton(two_heads, criterion, params, x, target), params)
    # q = E (xa - t)² = 18; second derivatives of q / s at s = 1, E x² = 5, J = (x, 1)
    # in the outputs: aa 2 E x², ab -2 E x (xa - t), bb 2 q.
    np.testing.assert_allclose(matrix, [[10, -18], [-18, 36]], rtol=1e-12)


@MODES
def test_new_parameters_and_data_do_not_retrace(linearize):
    traces, outer_traces = [], []

    def counted(params, x):
        traces.append(None)
        return model(params, x)

    @jax.jit
    def outer(operator, v):
        outer_traces.append(None)
        return operator(v)

    results = []
    for seed in range(3):
        params, (x, _) = point(jnp.float32, seed), batch(jnp.float32, seed)
        operator = gauss_newton(
            counted, "cross_entropy", params, x, linearize=linearize
        )
        results.append(float(operator(params)["scale"]))
        outer(operator, params)
    assert len(traces) == len(outer_traces) == 1
    assert len(set(results)) == 3
    longer, _ = batch(jnp.float32, rows=4)
    gauss_newton(counted, "cross_entropy", params, longer, linearize=linearize)(params)
    assert len(traces) == 2


def test_functions_may_carry_their_own_arrays():
    traces = []

    def scaled(factor, params, x):
        traces.append(None)
        return factor * model(params, x)

    def weighted(weight, z, y):
        return weight * cross_entropy(z, y)

    params, (x, y) = point(jnp.float32), batch(jnp.float32)
    plain = gauss_newton(model, cross_entropy, params, x, y)(params)["scale"]
    for factor in (1.0, 2.0):
        twice = Partial(weighted, jnp.float32(factor))
        carried = Partial(scaled, jnp.float32(1))
        product = gauss_newton(carried, twice, params, x, y)(params)["scale"]
        np.testing.assert_allclose(product, factor * plain, rtol=1e-5)
    assert len(traces) == 1


VOCABULARY, ROWS, WIDTH = 50_000, 64, 8


def readout(params, x):
    return jnp.tanh(x @ params["inner"]) @ params["outer"]


def test_memory_at_a_large_vocabulary():
    """Two arrays of the size of the logits, the Hessian three; measured 2.00, 3.00."""

    def shapes(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    params = {"inner": shapes(WIDTH, WIDTH), "outer": shapes(WIDTH, VOCABULARY)}
    x, y = shapes(ROWS, WIDTH), jax.ShapeDtypeStruct((ROWS,), jnp.int32)

    def loss(params, x, y):
        return cross_entropy(readout(params, x), y)

    def in_logits(make, *data):
        product = jax.jit(lambda params, v, *data: make(params, *data)(v))
        compiled = product.lower(params, params, *data).compile()
        bytes_needed = compiled.memory_analysis().temp_size_in_bytes
        return bytes_needed / (4 * ROWS * VOCABULARY)

    named = in_logits(lambda p, x: gauss_newton(readout, "cross_entropy", p, x), x)
    assert named < 2.1
    full = in_logits(lambda p, x, y: hessian(loss, p, x, y), x, y)
    assert full > 2.9
    function = in_logits(
        lambda p, x, y: gauss_newton(readout, cross_entropy, p, x, y), x, y
    )
    assert function < 3.1


def test_product_at_a_large_vocabulary():
    rng = np.random.default_rng(0)

    def normal(*sizes):
        return jnp.asarray(rng.normal(size=sizes), jnp.float32)

    w, x, v = normal(WIDTH, VOCABULARY), normal(4, WIDTH), normal(WIDTH, VOCABULARY)
    y = jnp.zeros(4, jnp.int32)

    def linear(w, x):
        return x @ w

    product = gauss_newton(linear, "cross_entropy", w, x)(v)
    expected = hessian(lambda w, x, y: cross_entropy(x @ w, y), w, x, y)(v)
    error = np.linalg.norm(product - expected) / np.linalg.norm(expected)
    assert error < 1e-5


def test_confident_outputs():
    """Curvature e^-50 is small, not zero, and there is no overflow at 1e4."""

    def identity(z, _):
        return z

    z = jnp.array([[50.0], [-50.0]])
    variance = np.exp(-50.0) / 2
    product = gauss_newton(identity, "bernoulli", z, None)(jnp.ones((2, 1)))
    np.testing.assert_allclose(product, np.full((2, 1), variance), rtol=1e-5)
    far = jnp.array([[1e4, 0.0, -1e4]])
    product = gauss_newton(identity, "cross_entropy", far, None)(jnp.ones((1, 3)))
    np.testing.assert_array_equal(product, np.zeros((1, 3)))


def test_logits_of_one_example_may_be_a_vector():
    z = jnp.zeros(4)
    product = gauss_newton(lambda z, _: z, "cross_entropy", z, None)
    np.testing.assert_allclose(dense(product, z), np.eye(4) / 4 - 1 / 16, atol=1e-7)


@MODES
def test_low_precision_parameters(linearize):
    params, (x, _) = point(jnp.bfloat16), batch(jnp.bfloat16)
    operator = gauss_newton(model, "cross_entropy", params, x, linearize=linearize)
    product = operator(jax.tree.map(jnp.ones_like, params))
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    exact = gauss_newton(model, "cross_entropy", wide, x.astype(jnp.float32))
    expected = exact(jax.tree.map(jnp.ones_like, wide))
    for got, want in zip(*map(jax.tree.leaves, (product, expected)), strict=True):
        assert got.dtype == jnp.bfloat16
        atol = 0.05 * float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=atol)


def test_sums_over_classes_are_wide():
    """Summing 4,096 bfloat16 terms in turn would stall at 256 of them."""
    z = jnp.zeros((1, 4096), jnp.bfloat16)
    v = jnp.zeros((1, 4096), jnp.bfloat16).at[0, 0].set(4096)
    expected = np.full((1, 4096), -1 / 4096)
    expected[0, 0] += 1
    label = jnp.zeros(1, jnp.int32)
    for criterion in ("cross_entropy", cross_entropy):
        product = gauss_newton(lambda z, _: z, criterion, z, None, label)(v)
        assert product.dtype == jnp.bfloat16
        np.testing.assert_allclose(product.astype(jnp.float32), expected, rtol=2**-8)


def test_probabilities_are_wide():
    """Adding a constant to the logits changes nothing; rounded p leave 4e-3."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.bfloat16)
    product = gauss_newton(lambda z, _: z, "cross_entropy", z, None)
    np.testing.assert_allclose(
        product(jnp.ones_like(z)).astype(jnp.float32), np.zeros((5, 8)), atol=1e-7
    )


def test_cost_in_gradients():
    """Per dense layer: 3 products a gradient, 5 a fresh product, 4 a linearised one.

    The first layer, whose input has no derivative, takes 2, 3 and 2. Here that makes
    1.62 gradients fresh and 1.23 linearised.
    """

    def perceptron(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x

    widths = (32, 64, 64, 8)
    weights = [jnp.ones(shape) for shape in itertools.pairwise(widths)]
    x = jnp.ones((128, widths[0]))

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    def product(operator, v):
        return operator(v)

    gradient = flops(
        jax.grad(lambda w, x: jnp.sum(perceptron(w, x) ** 2) / 256), weights, x
    )
    fresh = flops(
        product, gauss_newton(perceptron, "squared_error", weights, x), weights
    )
    kept = gauss_newton(perceptron, "squared_error", weights, x, linearize=True)
    assert fresh / gradient == pytest.approx(1.62, rel=0.06)
    assert flops(product, kept, weights) / gradient == pytest.approx(1.23, rel=0.06)


def rows(p, x):
    return x * p


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("function", "criterion", "inputs", "message"),
    [
        (rows, "hinge", X, "cross_entropy, squared_error, bernoulli, or pass a func"),
        (rows, "squared_error", X[0], r"outputs\[:, None\]"),
        (rows, "bernoulli", X[0], r"outputs\[:, None\]"),
        (rows, "cross_entropy", X[:0], "empty"),
        (lambda p, x: (x * p, x), "cross_entropy", X, "model that returns one array"),
        (lambda p, x: jnp.argmax(x * p, -1), "cross_entropy", X, "outputs is int32"),
        (lambda p, x: [x * p, 1j * x], squared_error, X, r"outputs\[1\] is complex64"),
        (rows, lambda z, _: jnp.sum(z**2, -1), X, r"criterion must return one real"),
    ],
)
def test_mistakes_are_named(function, criterion, inputs, message):
    with pytest.raises(ValueError, match=message):
        gauss_newton(function, criterion, jnp.float32(1), inputs)(jnp.float32(1))


def test_parameters_and_vectors_are_checked():
    with pytest.raises(ValueError, match="params is int32"):
        gauss_newton(rows, "cross_entropy", jnp.int32(1), X)
    operator = gauss_newton(rows, "cross_entropy", jnp.float32(1), X)
    with pytest.raises(ValueError, match="the vector must be shaped like"):
        operator(jnp.ones(2))
