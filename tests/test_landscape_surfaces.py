"""Losses along lines and over planes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from landscape_models import GOLDEN, problem, unflatten

from basinax.landscape import line, normalize_direction, plane, random_directions

KEY = jax.random.key(0)


def square(w, x=0.0):
    return jnp.mean((w - x) ** 2)


# --- the values --------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["filter", "layer"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "tf"])
def test_surfaces_are_those_of_torch(x64, name, normalize):
    loss, params, *data = problem(name, jnp.float64)
    directions = [
        normalize_direction(
            unflatten(name, GOLDEN[f"{name}.{d}"], params), params, normalize
        )
        for d in ("d1", "d2")
    ]
    grid = GOLDEN[f"{name}.grid"]
    found = plane(loss, params, *directions, *data, x=grid)
    wanted = GOLDEN[f"{name}.surf_{normalize}"]
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-12)
    np.testing.assert_array_equal(found.y, grid)


def test_line_along_the_sharpest_direction(x64):
    loss, params, *data = problem("mlp", jnp.float64)
    top = unflatten("mlp", GOLDEN["mlp.hess_top5_vec"][:, 0], params)
    steps = np.array([0, 0.05, 0.1, 0.2])
    right = line(loss, params, top, *data, steps=steps).losses
    left = line(loss, params, top, *data, steps=-steps).losses
    wanted = GOLDEN["mlp.line_top_eigvec"]
    np.testing.assert_allclose((left + right) / 2, wanted, rtol=1e-12)


W = jnp.array([1.0, -2.0, 0.5])
D1, D2 = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 3.0, 1.0])
X, Y = np.array([-1.0, 0.0, 2.0]), np.array([0.0, 0.5, 1.0, -1.0])


def by_hand(loss, x=X, y=Y):
    return np.array([[loss(W + a * D1 + b * D2) for b in y] for a in x])


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 12, 100])
def test_rows_follow_the_first_direction(chunk_size):
    found = plane(square, W, D1, D2, x=X, y=Y, chunk_size=chunk_size)
    np.testing.assert_allclose(found.losses, by_hand(square), rtol=1e-6)
    np.testing.assert_array_equal(found.x, X)
    np.testing.assert_array_equal(found.y, Y)


def test_default_grids():
    found = line(square, W, D1, W)
    assert found.steps.shape == found.losses.shape == (51,)
    np.testing.assert_allclose(found.steps, np.linspace(-1, 1, 51), rtol=1e-6)
    np.testing.assert_allclose(found.losses, found.steps**2 / 3, atol=1e-6)
    found = plane(square, W, D1, D2, chunk_size=625)
    assert (found.x.shape, found.y.shape, found.losses.shape) == (
        (25,),
        (25,),
        (25, 25),
    )
    assert float(found.losses[12, 12]) == float(square(W))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_trees_of_losses(chunk_size):
    def both(w):
        return {"loss": square(w), "more": [jnp.sum(w).astype(jnp.bfloat16)]}

    found = plane(both, W, D1, D2, x=X, y=Y, chunk_size=chunk_size).losses
    np.testing.assert_allclose(found["loss"], by_hand(square), rtol=1e-6)
    np.testing.assert_allclose(found["more"][0], by_hand(jnp.sum), rtol=0.01)
    assert found["more"][0].dtype == jnp.float32


def test_nan_and_infinity_stay_where_they_are():
    found = plane(lambda w: jnp.log(w[0]) + 0 * w[1], W, D1, D2, x=[-2, -1, 0], y=Y)
    np.testing.assert_array_equal(found.losses, np.array([[np.nan, -np.inf, 0]] * 4).T)


# --- batches -----------------------------------------------------------------------


class Loader:
    """Give the same batches every time, without saying how many."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


DATA = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
UNEQUAL = [(DATA[:4],), (DATA[4:],)]


def rows_loss(w, x):
    return jnp.mean((w[None] - x) ** 2)


@pytest.mark.parametrize(
    ("batches", "weights"),
    [
        (UNEQUAL, None),
        (UNEQUAL, [4, 2]),
        (Loader(UNEQUAL), None),
        (Loader(UNEQUAL), [2.0, 1.0]),
        (iter(UNEQUAL), None),
        ((DATA.reshape(3, 2, 3),), None),
        ([[DATA[:3]], [DATA[3:]]], None),
    ],
)
def test_mean_over_batches_is_that_of_the_whole_set(batches, weights):
    found = plane(rows_loss, W, D1, D2, x=X, y=Y, batches=batches, weights=weights)
    wanted = by_hand(lambda w: rows_loss(w, DATA))
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-6)


def test_weights_decide_and_args_come_first():
    def loss(w, scale, x):
        return scale * rows_loss(w, x)

    batches = ([DATA[:3]], [DATA[3:]])
    found = line(loss, W, D1, 2.0, steps=X, batches=list(batches), weights=[3, 1])
    wanted = [
        2 * (3 * rows_loss(W + a * D1, DATA[:3]) + rows_loss(W + a * D1, DATA[3:])) / 4
        for a in X
    ]
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-6)


def test_progress_counts_evaluations():
    def seen(**options):
        calls = []
        line(rows_loss, W, D1, progress=lambda *x: calls.append(x), **options)
        return calls

    steps = np.linspace(0, 1, 5)
    options = {"steps": steps, "chunk_size": 2}
    assert seen(batches=[(DATA,)], **options) == [(2, 5), (4, 5), (5, 5)]
    wanted = [(2, 10), (4, 10), (5, 10), (7, 10), (9, 10), (10, 10)]
    assert seen(batches=UNEQUAL, **options) == wanted
    assert seen(batches=Loader(UNEQUAL), **options)[-1] == (10, None)


# --- what the loss gets --------------------------------------------------------------


def test_nothing_is_traced_again():
    traces = 0

    def loss(params, x):
        nonlocal traces
        traces += 1
        return jnp.mean((params["w"] - x) ** 2)

    rng = np.random.default_rng(1)
    for batches, scale in itertools.product((None, [(np.float32(1),)] * 2), (1, 2)):
        w, d1, d2, x = (jnp.float32(scale * rng.normal(size=3)) for _ in range(4))
        args = (x,) if batches is None else ()
        grid = np.linspace(0, scale, 3 * scale)
        options = {"x": grid, "y": [0, 1], "batches": batches, "weights": None}
        if batches is not None:
            options["weights"] = [1, scale]
        plane(loss, {"w": w}, {"w": d1}, {"w": d2}, *args, **options)
    assert traces == 2  # once for each shape of the data


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_points_are_not_rounded_to_half_precision(x64, dtype):
    def loss(w):
        assert w.dtype == ("float64" if dtype == "float64" else "float32")
        return jnp.sum(w)

    w = jnp.ones(2, dtype)
    steps = 1e-5 * np.arange(4)
    found = line(loss, w, jnp.array([1, 0], dtype), steps=steps).losses
    assert found.dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_allclose(found - 2, steps, atol=3e-7)


def test_leaves_that_stay_put():
    params = {"w": W, "count": jnp.arange(2), "power": 2, "none": None, "key": KEY}

    def loss(params):
        assert params["count"].dtype == jnp.int32
        assert params["none"] is None
        noise = jax.random.normal(params["key"])
        return jnp.sum(params["w"] ** params["power"]) + params["count"][1] + 0 * noise

    directions = random_directions(params, KEY, None)
    zeros = {**directions[1], "count": jnp.zeros(2, int), "power": 0.0}
    found = plane(loss, params, directions[0], zeros, x=[0, 1], y=[0, 1]).losses
    w = params["w"] + directions[0]["w"] + directions[1]["w"]
    np.testing.assert_allclose(found[1, 1], 1 + np.sum(w**2), rtol=1e-5)


def test_scalars_and_numbers_are_parameters_too():
    found = plane(lambda w: w[0] * w[1], (2.0, jnp.float32(3)), (1.0, None), (0, 1.0))
    np.testing.assert_allclose(found.losses[0, 0], 1 * 2)
    np.testing.assert_allclose(found.losses[-1, -1], 3 * 4)


# --- normalisation layers ------------------------------------------------------------


def standardized(h):
    return (h - jnp.mean(h, 0, keepdims=True)) / jnp.std(h, 0, keepdims=True)


def scale_invariant_loss(params, x):
    """Put a normalisation behind a linear layer, whose scale then means nothing."""
    h = jnp.tanh(standardized(x @ params["in"]))
    return jnp.mean((h @ params["out"] - x[:, :1]) ** 2)


def test_filter_normalised_surface_ignores_the_scale_in_front_of_a_norm():
    rng = np.random.default_rng(2)
    x = jnp.float32(rng.normal(size=(20, 5)))
    params = {
        "in": jnp.float32(rng.normal(size=(5, 4))),
        "out": jnp.float32(rng.normal(size=(4, 1))),
    }
    # By another factor per filter, of which layer normalisation knows nothing.
    factors = jnp.array([[0.1, 1.0, 3.0, 20.0]])
    rescaled = {**params, "in": params["in"] * factors}

    def surface(params, normalize):
        directions = random_directions(params, KEY, normalize)
        grid = np.linspace(-1, 1, 3)
        options = {"x": grid, "chunk_size": 9}
        return plane(scale_invariant_loss, params, *directions, x, **options).losses

    for normalize, same in (("filter", True), ("layer", False), (None, False)):
        before, after = surface(params, normalize), surface(rescaled, normalize)
        change = np.abs(before - after).max() / np.ptp(before)
        assert (change < 1e-4) if same else (change > 0.05), normalize


def evaluated(params, x, y):
    """Batch normalisation in evaluation mode, by statistics among the parameters."""
    h = x @ params["in"]
    h = (h - params["mean"][None]) / jnp.sqrt(params["var"][None])
    return jnp.mean((jnp.tanh(h) @ params["out"] - y) ** 2)


def with_statistics(params, x, y):
    h = x @ params["in"]
    return {**params, "mean": jnp.mean(h, 0), "var": jnp.var(h, 0)}


def test_recalibrate():
    rng = np.random.default_rng(3)
    x, y = jnp.float32(rng.normal(size=(20, 5))), jnp.float32(rng.normal(size=(20, 1)))
    params = {
        "in": jnp.float32(rng.normal(size=(5, 4))),
        "out": jnp.float32(rng.normal(size=(4, 1))),
    }
    params = with_statistics(params, x, y)
    directions = random_directions(params, KEY)
    np.testing.assert_array_equal(directions[0]["mean"], np.zeros(4))
    draw = functools.partial(
        plane, evaluated, params, *directions, x, y, x=[0, 1], y=[0, 1, 2]
    )
    found = draw(recalibrate=with_statistics, chunk_size=3).losses
    for i, j in itertools.product(range(2), range(3)):
        steps = [
            jax.tree.map(lambda d, t=t: t * d, d)
            for t, d in zip((i, j), directions, strict=True)
        ]
        point = jax.tree.map(lambda w, a, b: w + a + b, params, *steps)
        wanted = evaluated(with_statistics(point, x, y), x, y)
        np.testing.assert_allclose(found[i, j], wanted, rtol=1e-4)
    stale = draw().losses
    np.testing.assert_allclose(stale[0, 0], found[0, 0], rtol=1e-5)
    assert np.abs(stale / found - 1).max() > 0.1


def test_recalibrate_gets_the_arguments_and_not_the_batches():
    def loss(params, whole, x):
        return jnp.mean(x - params["mean"]) + 0 * jnp.sum(whole)

    def recalibrate(params, whole):
        return {**params, "mean": jnp.mean(whole) + params["w"]}

    params = {"w": jnp.float32(0), "mean": jnp.float32(9)}
    direction = {"w": jnp.float32(1), "mean": None}
    found = line(
        loss,
        params,
        direction,
        DATA,
        steps=[0, 1],
        batches=UNEQUAL,
        recalibrate=recalibrate,
    )
    np.testing.assert_allclose(found.losses, [0, -1], atol=1e-6)


# --- meshes --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_and_data(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    rng = np.random.default_rng(4)
    w, d1, d2, x = (jnp.float32(rng.normal(size=(8, 4))) for _ in range(4))

    def place(leaf, *spec):
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    def loss(w, x):
        return jnp.mean(jnp.sin(w + x) ** 2)

    wanted = plane(loss, w, d1, d2, x, x=X, y=Y).losses
    for chunk_size, spec in ((1, ("data", "model")), (5, ("data", "model")), (1, ())):
        placed = (place(w, "data", "model"), place(d1, *spec), place(d2, *spec))
        found = plane(
            loss, *placed, place(x, "data"), x=X, y=Y, chunk_size=chunk_size
        ).losses
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


# --- mistakes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plane(square, W, D1, D2[:2]), r"d2 must have the shape.*\(3,\); got"),
        (
            lambda: plane(square, {"a": W}, {"a": W}, {"b": W}),
            "d2 must have the struct",
        ),
        (lambda: plane(square, W, 0 * D1, D2), "d1 is zero everywhere"),
        (lambda: plane(square, W, None, D2), "d1 is zero everywhere"),
        (lambda: line(square, W, D1 / 0), "direction holds NaN or infinity"),
        (lambda: plane(square, W, D1, D2, x=[1.0]), r"x must be .*two finite.*\[1.0\]"),
        (lambda: plane(square, W, D1, D2, y=np.ones((9, 9))), r"y must be.*\(9, 9\)"),
        (lambda: line(square, W, D1, steps=[0, np.inf]), "steps must be a list of"),
        (lambda: line(square, W, D1, chunk_size=0), "chunk_size must be at least 1"),
        (lambda: line(lambda w: w, W, D1), r"must return one real.*array of shape \(3"),
        (lambda: line(lambda w: {"a": jnp.int32(1)}, W, D1), r"int32 at \['a'\]"),
        (lambda: line(lambda w: None, W, D1), "but returned nothing"),
        (lambda: line(lambda w: [w[0], None], W, D1), r"returned nothing at \[1\]"),
        (lambda: line(square, W, D1, batches=[]), "must hold at least one"),
        (lambda: line(square, W, D1, batches=[W]), "each a tuple of the further"),
        (lambda: line(square, W, D1, batches=iter([])), "batches are empty"),
        (lambda: line(square, W, D1, batches=()), "one leading axis in common"),
        (lambda: line(square, W, D1, batches=[(W,)], weights=[1, 2]), "one per batch"),
        (lambda: line(square, W, D1, W, weights=[1]), "got weights, no batches"),
        (lambda: line(square, W, D1, batches=iter([(1.0,)])), "how many examples"),
        (
            lambda: jax.jit(lambda w: line(square, w, D1))(W),
            "line was called with trac",
        ),
        (
            lambda: jax.vmap(lambda x: plane(square, W, D1, D2, x))(W),
            "plane was called",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
