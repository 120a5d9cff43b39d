"""Blocks of operators and means over batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_net import data, loss, model, point

from basinax.landscape import (
    check_operator,
    dense,
    eigenpairs,
    empirical_fisher,
    fisher,
    gauss_newton,
    hessian,
    over_batches,
    restrict,
    trace,
)

KEY = jax.random.key(0)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# --- restrict ---------------------------------------------------------------------


def partly(path, leaf):
    return leaf.ndim == 2 and path[0].key == "w"


ONE = np.zeros((2, 3), bool)
ONE[1, 2] = True


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ({"w": True, "v": False, "none": None}, slice(3, 9)),
        ({"w": jnp.array(True), "v": np.bool_(False), "none": None}, slice(3, 9)),
        (partly, slice(3, 9)),
        ({"w": ONE, "v": False, "none": None}, slice(8, 9)),
        (True, slice(0, 9)),
        (False, slice(0, 0)),
    ],
)
def test_block_of_the_matrix(x64, mask, kept):
    """Leaves are in the order v, w."""
    params = point()
    whole = hessian(loss, params, *data(5), linearize=True)
    expected = np.zeros((9, 9))
    expected[kept, kept] = dense(whole, params)[kept, kept]
    matrix = dense(restrict(whole, mask), params)
    np.testing.assert_allclose(matrix, expected, atol=1e-13)


def test_block_as_subtree_or_mask(x64):
    """The trace of a masked block is that of the operator on the block alone."""
    params, (x, y) = point(), data(5)

    def of_block(block, rest, x, y):
        return loss({**rest, **block}, x, y)

    block = {"w": params["w"]}
    small = dense(hessian(of_block, block, params, x, y), block)
    masked = restrict(hessian(loss, params, x, y), partly)
    top = eigenpairs(masked, params, 2, key=KEY, tol=1e-6)
    np.testing.assert_allclose(top.values, np.linalg.eigvalsh(small)[:-3:-1], rtol=1e-8)
    assert np.linalg.norm(top.vectors["v"]) < 1e-5
    total = trace(masked, params, key=KEY, num_probes=200)
    assert abs(total.value - np.trace(small)) < 4 * total.standard_error


def test_what_is_outside_does_not_matter():
    vector = {"a": jnp.ones(2), "b": jnp.full(2, jnp.nan)}
    block = restrict(
        lambda v: {"a": v["a"] + v["b"], "b": v["b"] / 0}, {"a": True, "b": False}
    )
    product = block(vector)
    np.testing.assert_array_equal(product["a"], [1, 1])
    np.testing.assert_array_equal(product["b"], [0, 0])


def test_masks_are_data():
    outer_traces = []

    @jax.jit
    def outer(operator, v):
        outer_traces.append(None)
        return operator(v)

    params = point(jnp.float32)
    whole = hessian(loss, params, *data(5, jnp.float32))
    products = [
        outer(restrict(whole, {"w": w, "v": not w, "none": None}), params)
        for w in (True, False)
    ]
    assert len(outer_traces) == 1
    assert products[0]["w"].any()
    assert not products[0]["v"].any()
    assert products[1]["v"].any()
    assert not products[1]["w"].any()


def test_mask_must_be_boolean():
    with pytest.raises(ValueError, match=r"mask\['w'\] is 1"):
        restrict(lambda v: v, {"w": 1, "v": False})


# --- over_batches -----------------------------------------------------------------


class Loader:
    """Hand out batches anew on every pass, as data loaders do."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def split(arrays, ends):
    return [
        tuple(part) for part in zip(*(jnp.split(a, ends) for a in arrays), strict=True)
    ]


@pytest.mark.parametrize("container", [list, Loader])
def test_unequal_batches_make_the_operator_of_the_whole_set(x64, container):
    """Equal weights would be far off, which is a known defect of other packages."""
    params, (x, y) = point(), data(56)
    y = y.at[50:].add(10)  # the short batch differs from the long one
    exact = flat(hessian(loss, params, x, y)(params))
    batches = split((x, y), [50])
    operator = over_batches(
        lambda x, y: hessian(loss, params, x, y), container(batches)
    )
    np.testing.assert_allclose(flat(operator(params)), exact, rtol=1e-12)
    equal = over_batches(
        lambda x, y: hessian(loss, params, x, y), container(batches), weights=[1, 1]
    )
    error = np.linalg.norm(flat(equal(params)) - exact) / np.linalg.norm(exact)
    assert error > 0.3


def per_example(params, x, y):
    return loss(params, x[None], y[None])


FACTORIES = {
    "hessian": lambda params: lambda x, y: hessian(loss, params, x, y),
    "kept": lambda params: lambda x, y: hessian(loss, params, x, y, linearize=True),
    "gauss_newton": lambda params: (
        lambda x, y: gauss_newton(model, "squared_error", params, 2 * x)
    ),
    "empirical_fisher": lambda params: (
        lambda x, y: empirical_fisher(per_example, params, (x, y))
    ),
    "restrict": lambda params: (
        lambda x, y: restrict(hessian(loss, params, x, y), partly)
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_stacked_batches(x64, name):
    """Arrays of a batch, of every batch, and computed ones all find their place."""
    params, (x, y) = point(), data(12)
    factory = FACTORIES[name](params)
    exact = flat(factory(x, y)(params))
    stacked = (x.reshape(4, 3, 2), y.reshape(4, 3, 1))
    operator = over_batches(factory, stacked)
    for product in (operator(params), jax.jit(lambda o, v: o(v))(operator, params)):
        np.testing.assert_allclose(flat(product), exact, rtol=1e-11, atol=1e-14)
    weighted = over_batches(factory, stacked, weights=[2, 0, 0, 1])
    parts = [flat(factory(x[:3], y[:3])(params)), flat(factory(x[9:], y[9:])(params))]
    np.testing.assert_allclose(
        flat(weighted(params)), (2 * parts[0] + parts[1]) / 3, rtol=1e-11, atol=1e-14
    )


def test_one_stacked_batch():
    params, (x, y) = point(jnp.float32), data(5, jnp.float32)
    operator = over_batches(FACTORIES["hessian"](params), (x[None], y[None]))
    expected = hessian(loss, params, x, y)(params)
    np.testing.assert_allclose(flat(operator(params)), flat(expected), rtol=1e-5)


@pytest.mark.parametrize("stacked", [True, False])
def test_new_parameters_batches_and_factories_do_not_retrace(stacked):
    """The factory closes over parameters, and they are data nevertheless."""
    traces, outer_traces, results = [], [], []

    def counted(params, x, y):
        traces.append(None)
        return loss(params, x, y)

    @jax.jit
    def outer(operator, v):
        outer_traces.append(None)
        return operator(v)

    for seed in range(3):
        params, (x, y) = point(jnp.float32, seed), data(12, jnp.float32, seed)
        batches = (x.reshape(4, 3, 2), y.reshape(4, 3, 1))
        if not stacked:
            batches = split((x, y), [5, 10])
        operator = over_batches(
            lambda x, y, params=params: hessian(counted, params, x, y), batches
        )
        results.append(float(operator(params)["v"][0, 0]))
        np.testing.assert_allclose(
            outer(operator, params)["v"][0, 0], results[-1], rtol=1e-4
        )
    # One trace for every shape of a batch: 3 rows, or 5 and 2.
    assert len(traces) == (1 if stacked else 2)
    assert len(outer_traces) == 1
    assert len(set(results)) == 3


def test_parameters_are_not_copied_for_every_batch():
    params, (x, y) = point(jnp.float32), data(12, jnp.float32)
    operator = over_batches(
        FACTORIES["hessian"](params), (x.reshape(6, 2, 2), y.reshape(6, 2, 1))
    )
    numbers = sum(leaf.size for leaf in jax.tree.leaves(operator))
    assert numbers == 9 + x.size + y.size + 6


def test_operator_over_batches_can_be_made_under_jit(x64):
    params, (x, y) = point(), data(12)

    @jax.jit
    def product(params, x, y, v):
        return over_batches(FACTORIES["hessian"](params), (x, y))(v)

    got = product(params, x.reshape(4, 3, 2), y.reshape(4, 3, 1), params)
    expected = hessian(loss, params, x, y)(params)
    np.testing.assert_allclose(flat(got), flat(expected), rtol=1e-12)


def test_every_batch_may_have_its_own_key():
    params, (x, _) = point(jnp.float32), data(12, jnp.float32)
    keys = jax.random.split(KEY, 4)

    def factory(x, key):
        return fisher(model, params, x, criterion="bernoulli", key=key)

    x = x.reshape(4, 3, 2)
    operator = over_batches(factory, (x, keys))
    looped = over_batches(factory, list(zip(x, keys, strict=True)))
    np.testing.assert_allclose(
        flat(operator(params)), flat(looped(params)), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("container", [tuple, list, Loader])
def test_sums_over_batches_are_wide(container):
    """1,024 shares added in turn in bfloat16 stop at a quarter; 1/48 rounds."""
    w, ones = jnp.ones(1, jnp.bfloat16), jnp.ones((1024, 1), jnp.bfloat16)

    def quadratic(w, x):
        return jnp.sum(x * w**2) / 2

    batches = (ones,) if container is tuple else container([(x,) for x in ones[:48]])
    product = over_batches(lambda x: hessian(quadratic, w, x), batches)(w)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, [1], rtol=1e-3)


def test_loaders_need_no_weights_and_are_read_once_per_product():
    params, (x, y) = point(jnp.float32), data(12, jnp.float32)
    passes = []

    class Counting(Loader):
        def __iter__(self):
            passes.append(None)
            return super().__iter__()

    operator = over_batches(
        FACTORIES["hessian"](params), Counting(split((x, y), [5, 10]))
    )
    assert not passes
    check_operator(operator, params, key=KEY)
    assert len(passes) == 4


SQUARE = functools.partial(hessian, lambda w, x: jnp.sum(x) * w**2, jnp.float32(1))
X3, X2 = jnp.ones(3), jnp.ones(2)


@pytest.mark.parametrize(
    ("batches", "weights", "message"),
    [
        ((X3, X2), None, r"one leading axis in common.*in a list"),
        ((jnp.float32(1),), None, "one leading axis in common"),
        ((), None, "one leading axis in common"),
        ((jnp.ones((0, 2)),), None, "one leading axis in common"),
        ((X3,), [1, 2], "weights must be numbers of examples"),
        ((X3,), [1, 2, -1], "weights must be numbers of examples"),
        ([(X3,), (X2,)], [0, 0], "at least one of them positive"),
        ([(X3,), (X2,)], [1, np.nan], "weights must be numbers of examples"),
        ([], None, "at least one"),
        ([X3, X2], None, "each a tuple of the arguments"),
        (iter([(X3,)]), None, "gone through only once"),
        ([((X3, X2),), ((X2, X2),)], None, "cannot tell how many examples"),
        (Loader([((X3, X2),)]), None, "cannot tell how many examples"),
        (Loader([]), None, "no examples"),
    ],
)
def test_mistakes_are_named(batches, weights, message):
    def factory(x):
        return SQUARE(x[0] if isinstance(x, tuple) else x)

    with pytest.raises(ValueError, match=message):
        over_batches(factory, batches, weights=weights)(jnp.float32(1))


def test_a_plain_function_cannot_be_stacked():
    with pytest.raises(ValueError, match=r"jax\.tree_util\.Partial"):
        over_batches(lambda x: lambda v: v * x, (X3,))
    looped = over_batches(lambda x: lambda v: v * x, [(x,) for x in (2.0, 4.0)])
    assert looped(jnp.float32(1)) == 3


def test_a_loss_that_hides_the_batch_is_rejected():
    """Stacking would silently take the first batch for all of them."""
    params, (x, y) = point(jnp.float32), data(4, jnp.float32)

    def factory(x, y):
        return hessian(lambda params: loss(params, x, y), params)

    with pytest.raises(ValueError, match="Define the loss once"):
        over_batches(factory, (x.reshape(2, 2, 2), y.reshape(2, 2, 1)))
    looped = over_batches(factory, split((x, y), [2]))
    expected = hessian(loss, params, x, y)(params)
    np.testing.assert_allclose(flat(looped(params)), flat(expected), rtol=1e-5)
