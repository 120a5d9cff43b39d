"""Paths between two trees of parameters: golden losses, curves found, barriers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from landscape_models import GOLDEN, problem, unflatten

from basinax.landscape import barrier, bezier_path, linear_path, path_point

KEY = jax.random.key(0)


def ring(w):
    """Minimal, at 0, on the unit circle."""
    return (jnp.sum(w**2) - 1) ** 2


A, B = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])


def chord(control, kind, t):
    """Points of a curve from A to B by its definition, in float64."""
    a, b, c = (np.asarray(x, np.float64) for x in (A, B, control))
    if kind == "bezier":
        return (1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b
    return (1 - 2 * t) * a + 2 * t * c if t < 0.5 else (2 - 2 * t) * c + (2 * t - 1) * b


# Golden losses --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_golden(x64, name):
    loss, start, x, y = problem(name, jnp.float64)
    end, control = (
        unflatten(name, GOLDEN[f"{name}.{w}"], start) for w in ("w_b", "w_mid")
    )
    options = {"positions": GOLDEN[f"{name}.ts"]}
    path = linear_path(loss, start, end, x, y, **options)
    np.testing.assert_allclose(path.losses, GOLDEN[f"{name}.linear_path"], rtol=1e-12)
    np.testing.assert_array_equal(path.positions, GOLDEN[f"{name}.ts"])
    if name == "cnn":  # batches and chunks change nothing
        options |= {"batches": [(x[:10], y[:10]), (x[10:], y[10:])], "chunk_size": 4}
    data = () if name == "cnn" else (x, y)
    for kind in ("bezier", "polygon"):
        curve = bezier_path(
            loss, start, end, *data, control=control, num_steps=0, kind=kind, **options
        )
        wanted = GOLDEN[f"{name}.{'polychain' if kind == 'polygon' else kind}_path"]
        np.testing.assert_allclose(curve.losses, wanted, rtol=1e-12)
        assert curve.training_losses.shape == (0,)
        for part, given in control.items():
            np.testing.assert_array_equal(curve.control[part], given)


# Points ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bezier", "polygon"])
def test_point(x64, kind):
    control = jnp.array([0.7, -0.3])
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        point = path_point(A, B, t, control, kind)
        np.testing.assert_allclose(point, chord(control, kind, t), atol=1e-15)
        line = path_point(A, B, t, kind=kind)
        np.testing.assert_allclose(line, (1 - t) * A + t * B, atol=1e-15)


def test_point_of_a_model():
    """Counters and keys come from the nearer end; None stays; both ends are exact."""
    rng = np.random.default_rng(0)

    def model(count):
        return {
            "w": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
            "h": jnp.asarray(rng.normal(size=2), jnp.float16),
            "none": None,
            "count": jnp.int32(count),
            "key": jax.random.key(count),
            "scalar": float(rng.normal()),
        }

    a, b, c = model(1), model(2), model(3)
    for control in (None, c):
        for t, end in ((0, a), (1, b)):
            point = path_point(a, b, t, control)
            for name in ("w", "h", "count", "scalar"):
                np.testing.assert_array_equal(point[name], jnp.asarray(end[name]))
                assert point[name].dtype == jnp.asarray(end[name]).dtype
            assert point["none"] is None
            assert (point["key"] == end["key"]).all()
    # In float32 and rounded once: 1/3 and 2/3 are no bfloat16 numbers.
    exact = np.asarray(a["w"], np.float32) * np.float32(2 / 3)
    exact = exact + np.asarray(b["w"], np.float32) * np.float32(1 / 3)
    found = jax.jit(path_point)(a, b, 1 / 3)["w"]
    np.testing.assert_allclose(
        np.asarray(found, np.float32), exact.astype(jnp.bfloat16), rtol=2**-8
    )


# Paths ----------------------------------------------------------------------------


def test_line_goes_on_beyond_its_ends():
    path = linear_path(ring, A, B, positions=np.array([-1.0, 0.5, 2.0]))
    np.testing.assert_allclose(path.losses, [16.0, 0.25, 16.0], rtol=1e-6)
    one = linear_path(ring, A, B, positions=[0.5])
    np.testing.assert_allclose(one.losses, [0.25], rtol=1e-6)


def test_trees_of_losses_and_barriers():
    def both(w, scale):
        return {"ring": scale * ring(w), "first": w[0]}

    path = linear_path(both, A, B, 4.0)
    found = barrier(path)
    np.testing.assert_allclose(found.height["ring"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found.position["ring"], 0.5)
    np.testing.assert_allclose(found.height["first"], 0.0, atol=1e-7)
    curve = bezier_path(both, A, B, 4.0, num_steps=0)
    np.testing.assert_allclose(curve.losses["ring"], path.losses["ring"], atol=1e-6)
    with pytest.raises(ValueError, match=r"loss_fn must return one real.*dict"):
        bezier_path(both, A, B, 4.0, key=KEY, num_steps=1)


def test_recalibrate():
    """Statistics of the ends, interpolated, are those of no point in between."""

    def loss(params, x):
        return (params["w"] * jnp.mean(x) - params["mean"]) ** 2

    def recalibrate(params, x):
        return params | {"mean": params["w"] * jnp.mean(x)}

    def curved(params, x):
        return loss(params, x) + params["w"] ** 2 * params["mean"]

    ends = [{"w": jnp.float32(w), "mean": jnp.float32(w**2)} for w in (1.0, 3.0)]
    x = jnp.ones(4)
    raw = linear_path(loss, *ends, x, positions=[0.0, 0.5, 1.0])
    np.testing.assert_allclose(raw.losses, [0, 9, 36], rtol=1e-6)
    path = linear_path(loss, *ends, x, positions=[0.5], recalibrate=recalibrate)
    np.testing.assert_allclose(path.losses, [0.0])
    curve = bezier_path(curved, *ends, x, recalibrate=recalibrate, key=KEY, num_steps=1)
    # With the mean recomputed the loss is w³, at a point of the line from 1 to 3.
    t = (np.cbrt(curve.training_losses[0]) - 1) / 2
    assert 0 < t < 1
    assert curve.control["w"] < 2  # downhill
    np.testing.assert_allclose(curve.control["mean"], 5.0)  # no gradient reaches it
    np.testing.assert_allclose(curve.losses[::24], [1.0, 27.0], rtol=1e-6)


# The search -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bezier", "polygon"])
def test_search_finds_the_best_control_point(kind):
    """By symmetry it is on the diagonal, where a fine grid finds it."""
    curve = bezier_path(ring, A, B, key=KEY, kind=kind, num_steps=600)
    t = (np.arange(400) + 0.5) / 400

    def mean_loss(x):
        points = np.array([chord([x, x], kind, s) for s in t])
        return np.mean((np.sum(points**2, 1) - 1) ** 2)

    grid = np.linspace(0.5, 1.1, 601)
    best = grid[np.argmin([mean_loss(x) for x in grid])]
    # Its steps shrink to nothing, so that what is left is one swing of the positions.
    np.testing.assert_allclose(curve.control, [best, best], atol=0.01)
    straight = barrier(linear_path(ring, A, B)).height
    limit = {"bezier": 0.005, "polygon": 0.1}[kind]  # the polygon has corners
    assert barrier(curve).height < limit * straight
    assert curve.training_losses.shape == (600,)


def test_search_is_what_it_says():
    """Plain gradient descent, step by step, from the positions it reports."""
    optimizer = optax.sgd(0.1)
    start, end = jnp.array([2.0]), jnp.array([6.0])
    curve = bezier_path(
        lambda w: jnp.sum(w), start, end, key=KEY, num_steps=50, optimizer=optimizer
    )
    # On the loss w a position follows from the loss, and so does the gradient 2t(1-t).
    c, positions = 4.0, []
    for seen in np.asarray(curve.training_losses, np.float64):
        roots = np.roots([2 + 6 - 2 * c, 2 * c - 4, 2 - seen])
        t = next(r.real for r in roots if -1e-3 <= r.real <= 1.001)
        positions.append(t)
        c -= 0.1 * 2 * t * (1 - t)
    np.testing.assert_allclose(curve.control, [c], rtol=1e-4)
    # Uniform: any few in a row are spread, here no gap above twice the mean gap.
    gaps = np.diff(np.sort([0, *positions, 1]))
    assert gaps.max() < 2 * 1.7 / 50
    again = bezier_path(
        lambda w: jnp.sum(w), start, end, key=KEY, num_steps=50, optimizer=optimizer
    )
    np.testing.assert_array_equal(again.training_losses, curve.training_losses)
    other = bezier_path(
        lambda w: jnp.sum(w), start, end, key=jax.random.key(1), num_steps=1
    )
    assert abs(other.training_losses[0] - curve.training_losses[0]) > 1e-3


def test_search_goes_on_and_compiles_once():
    traces = []

    def loss(w, shift):
        traces.append(1)
        return ring(w - shift)

    zero = jnp.zeros(2)
    first = bezier_path(loss, A, B, zero, key=KEY, num_steps=20)
    count = len(traces)
    more = bezier_path(
        loss, A, 2 * B, zero, key=KEY, num_steps=7, control=first.control
    )
    assert len(traces) == count
    assert more.control.shape == (2,)
    still = bezier_path(
        loss, A, B, zero, key=KEY, num_steps=3, control=first.control, learning_rate=0.0
    )
    np.testing.assert_array_equal(still.control, first.control)


def weigh(w, x):
    return jnp.mean(x) * jnp.sum(w)


@pytest.mark.parametrize("form", ["list", "stacked", "loader", "weights"])
def test_batches(form):
    """Drawn by their weight; the losses are means over all of them."""
    sizes = (3, 3) if form == "stacked" else (6, 2)
    parts = [(jnp.full(sizes[0], 1.0),), (jnp.full(sizes[1], 5.0),)]
    weights, shares = None, np.array(sizes) / sum(sizes)
    batches = parts
    if form == "stacked":
        batches = (jnp.stack([part[0] for part in parts]),)
    if form == "loader":
        batches = {"first": parts[0], "second": parts[1]}.values()
    if form == "weights":
        weights, shares = [0.0, 2.0], np.array([0.0, 1.0])
    start, end = jnp.array([1.0]), jnp.array([1.0])
    curve = bezier_path(
        weigh,
        start,
        end,
        batches=batches,
        weights=weights,
        key=KEY,
        num_steps=200,
        learning_rate=0.0,
    )
    mean = shares @ np.array([1.0, 5.0])
    np.testing.assert_allclose(curve.losses, np.full(25, mean), rtol=1e-6)
    ones = np.mean(np.abs(curve.training_losses - 1) < 1e-5)
    fives = np.mean(np.abs(curve.training_losses - 5) < 1e-5)
    assert ones + fives == 1
    if form == "loader":  # in turn
        np.testing.assert_allclose(curve.training_losses[:4], [1, 5, 1, 5], rtol=1e-6)
    else:  # three standard deviations of 200 draws
        assert abs(ones - shares[0]) <= 3 * np.sqrt(shares.prod() / 200)


def test_progress():
    calls = []
    bezier_path(
        weigh,
        A,
        B,
        batches=[(A,), (B,)],
        key=KEY,
        num_steps=2,
        positions=[0.0, 1.0],
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 6) for done in range(1, 7)]


def test_equal_ends_and_broken_losses():
    """A loop stays at a minimum; NaN is never a barrier of zero."""
    loop = bezier_path(ring, A, A, key=KEY, num_steps=5)
    np.testing.assert_allclose(loop.control, A, atol=0.1)
    assert barrier(loop).height < 0.05
    broken = bezier_path(lambda w: ring(w) / 0.0 * 0.0, A, B, key=KEY, num_steps=2)
    assert np.isnan(broken.control).all()
    assert np.isnan(jnp.stack(barrier(broken))).all()


def test_search_keeps_dtypes():
    start = {"w": jnp.ones(2, jnp.bfloat16), "none": None, "count": jnp.int32(3)}
    end = {"w": -jnp.ones(2, jnp.bfloat16), "none": None, "count": jnp.int32(5)}

    def loss(params):
        return jnp.sum(params["w"], dtype=jnp.float32) + 0 * params["count"]

    # Rounded to bfloat16 after each of its steps of 1e-3 the control point would stay.
    control = start | {"w": jnp.full(2, 0.75, jnp.bfloat16)}
    curve = bezier_path(
        loss,
        start,
        end,
        control=control,
        key=KEY,
        num_steps=30,
        learning_rate=1e-3,
    )
    assert curve.control["w"].dtype == jnp.bfloat16
    assert curve.control["none"] is None
    assert curve.control["count"] == 3
    assert (curve.control["w"] < 0.745).all()
    assert curve.losses.dtype == jnp.float32


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_mesh(axis):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis,) * 2)
    place = NamedSharding(mesh, P("data", "model"))
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(8, 4)).astype(np.float32) for _ in range(2))

    def loss(w):
        return jnp.sum(jnp.sin(w) ** 2) + jnp.sum(w) ** 2

    find = functools.partial(bezier_path, loss, key=KEY, num_steps=3)
    alone = find(jnp.asarray(a), jnp.asarray(b))
    spread = find(jax.device_put(a, place), jax.device_put(b, place))
    assert spread.control.sharding.is_equivalent_to(place, 2)
    np.testing.assert_allclose(spread.control, alone.control, rtol=1e-5)
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-4)
    path = linear_path(loss, jax.device_put(a, place), jax.device_put(b, place))
    np.testing.assert_allclose(path.losses[12], loss(0.5 * (a + b)), rtol=1e-4)


# Mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"start": {"w": A}, "end": {"w": A, "b": B}}, r"end\['b'\] is missing in st"),
        ({"end": {"w": A}}, "end is PyTreeDef"),
        ({"end": jnp.ones(3)}, r"end has shape \(3,\) and start has shape \(2,\)"),
        ({"start": {"w": A}, "end": {}}, r"start\['w'\] is missing in end"),
        ({"start": [A, None], "end": (A, None)}, "end is PyTreeDef"),
        ({"start": jnp.array([1, 2]), "end": jnp.array([1, 2])}, "no floating-point"),
        ({"start": {}, "end": {}}, "no floating-point"),
        ({"control": jnp.ones(3)}, r"control has shape \(3,\) and start has shape"),
        ({"kind": "spline"}, "kind='spline' is unknown; use one of bezier, polygon"),
        ({"num_steps": -1}, "num_steps must be at least 0, got -1"),
        ({"key": None}, r"needs key=jax.random.key\(0\), or num_steps=0"),
        ({"positions": []}, "at least one finite number"),
        ({"positions": [[0.0]]}, "a vector of at least one"),
        ({"positions": [0.0, np.nan]}, "finite number"),
        ({"positions": [0.0, 1.5]}, r"in \[0, 1\], got 0.0 to 1.5"),
        ({"batches": []}, "a list of batches must hold at least one"),
        ({"batches": {}.values()}, "batches are empty"),
        ({"batches": iter([()])}, "only once"),
        ({"weights": [1.0]}, "got weights, no batches"),
        ({"optimizer": optax.sgd(0.1), "learning_rate": 0.1}, "got an optimizer"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        ({"start": A + 0j, "end": B + 0j}, "real parameters only"),
    ],
)
def test_mistakes(overrides, message):
    options = {"start": A, "end": B, "key": KEY, "num_steps": 1} | overrides
    with pytest.raises(ValueError, match=message):
        bezier_path(ring, options.pop("start"), options.pop("end"), **options)


def test_more_mistakes():
    with pytest.raises(ValueError, match=r"end has shape \(3,\)"):
        linear_path(ring, A, jnp.ones(3))
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        linear_path(ring, A, B, chunk_size=0)
    with pytest.raises(ValueError, match="call it outside jit"):
        jax.jit(lambda a: linear_path(ring, a, B).losses)(A)
    with pytest.raises(ValueError, match="kind='arc' is unknown"):
        path_point(A, B, 0.5, A, "arc")
