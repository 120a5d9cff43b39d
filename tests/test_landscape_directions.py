"""Directions in parameter space: random ones, eigenvectors, those of a training run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from landscape_models import GOLDEN, flatten, problem, unflatten

from basinax.landscape import (
    coordinates,
    eigen_directions,
    hessian,
    line,
    normalize_direction,
    random_directions,
    trajectory_directions,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
NET = {
    "conv": jnp.asarray(RNG.normal(size=(3, 3, 2, 4)), jnp.float32),
    "dense": jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32),
    "bias": jnp.ones(6),
    "step": 3,
    "none": None,
    "key": KEY,
}
TENSORS = ("conv", "dense")
LINE = jnp.arange(3.0)[:, None] * jnp.ones((1, 4))
ROUNDED = 0.3 + LINE * jnp.array([[0.3, 0.7, 0.11, 0.13]])
LAST_BIT = jnp.zeros((3, 4)).at[0, 0].set(7.5e-9)


def length(tree):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.sqrt(sum(np.sum(x**2) for x in leaves))


# --- random ----------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["filter", "layer"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "tf"])
def test_normalized_as_by_torch(x64, name, normalize):
    _, params, _, _ = problem(name, jnp.float64)
    raw = unflatten(name, GOLDEN[f"{name}.d1"], params)
    found = flatten(name, normalize_direction(raw, params, normalize))
    wanted = GOLDEN[f"{name}.d1_{normalize}"]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("axis", [-1, 0])
def test_filters_are_as_long_as_those_of_the_parameters(axis):
    first, second = random_directions(NET, KEY, filter_axis=axis)
    for name in TENSORS:
        w = NET[name]
        inputs = tuple(i for i in range(w.ndim) if i != axis % w.ndim)
        for d in (first[name], second[name]):
            norms = jnp.sqrt(jnp.sum(d**2, inputs))
            wanted = jnp.sqrt(jnp.sum(w**2, inputs))
            np.testing.assert_allclose(norms, wanted, rtol=1e-5)
    # Not the same direction twice, nor along the weights.
    cosine = jnp.sum(first["dense"] * second["dense"]) / jnp.sum(NET["dense"] ** 2)
    assert abs(cosine) < 0.5  # 5 standard deviations of 1/sqrt(96)
    np.testing.assert_array_equal(first["bias"], np.zeros(6))
    assert (first["step"], first["none"], first["key"]) == (None, None, None)


def test_layers_are_as_long_as_those_of_the_parameters():
    (found,) = random_directions(NET, KEY, "layer", num=1)
    for name in TENSORS:
        assert abs(length(found[name]) / length(NET[name]) - 1) < 1e-5
    # Within a tensor the entries are as they were drawn: of one variance.
    spread = jnp.linalg.norm(found["dense"], axis=0) / jnp.linalg.norm(found["dense"])
    assert spread.min() > 0.2
    np.testing.assert_array_equal(found["bias"], np.zeros(6))


def test_without_normalisation_all_leaves_share_one_length():
    (found,) = random_directions(NET, KEY, None, num=1)
    assert abs(length(found) - 1) < 1e-6
    assert np.abs(found["bias"]).min() > 0
    # Gaussian: the fourth moment is three times the squared second. Its standard error
    # for the 174 numbers is 0.5 or so.
    x = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])
    assert 1.8 < np.mean(x**4) / np.mean(x**2) ** 2 < 5


def test_key_decides():
    like = {"dense": NET["dense"]}
    one, other, again = (
        random_directions(like, jax.random.key(seed), num=1)[0]["dense"]
        for seed in (0, 1, 0)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("normalize", ["filter", "layer", None])
def test_length_of_the_raw_direction_does_not_matter(size, normalize):
    raw = {"conv": NET["conv"][..., ::-1], "dense": NET["dense"][::-1], "bias": None}
    like = {name: NET[name] for name in raw}
    wanted = normalize_direction(raw, like, normalize)
    scaled = jax.tree.map(lambda x: x * size, raw)
    found = normalize_direction(scaled, like, normalize)
    for name in raw:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)


def test_zero_filters_stay_zero():
    raw = NET["dense"].at[:, 1].set(0)
    w = NET["dense"][:, ::-1].at[:, 2].set(0)
    found = normalize_direction(raw, w)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(jnp.any(found != 0, 0), [1, 0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    "mask",
    [
        {"conv": {"a": True, "b": False}, "dense": False},
        {"conv": {"a": True, "b": np.False_}, "dense": {"a": False}},
        lambda path, leaf: path[0].key == "conv" and leaf.ndim == 4,
    ],
)
def test_mask(mask):
    conv, dense = NET["conv"], NET["dense"]
    params = {"conv": {"a": conv, "b": dense}, "dense": {"a": dense}}
    (whole,) = random_directions(params, KEY, None, num=1)
    (part,) = random_directions(params, KEY, None, num=1, mask=mask)
    found, wanted = part["conv"]["a"], whole["conv"]["a"]
    np.testing.assert_allclose(found, wanted / length(wanted), rtol=1e-5)
    assert length(part) == length(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes(x64, dtype):
    w = NET["dense"].astype(dtype)
    (found,) = random_directions(w, KEY, num=1)
    assert found.dtype == ("float64" if dtype == "float64" else "float32")
    wanted = np.linalg.norm(np.asarray(w, np.float64), axis=0)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_directions(NET, KEY, "filters"), "normalize='filters' is"),
        (lambda: random_directions(NET, KEY, num=0), "num must be at least 1"),
        (lambda: random_directions({"b": jnp.ones(3)}, KEY), "nothing is left to move"),
        (lambda: random_directions({}, KEY, None), "nothing is left to move"),
        (lambda: random_directions(jnp.ones((0, 3)), KEY), "nothing is left to move"),
        (lambda: random_directions(jnp.arange(4), KEY, None), "nothing is left"),
        (lambda: random_directions(NET, KEY, mask=False), "nothing is left to move"),
        (
            lambda: random_directions(NET, KEY, filter_axis=2),
            r"params\['dense'\].*2 ax",
        ),
        (
            lambda: random_directions(NET, KEY, mask={"conv": True}),
            "mask must be a tree",
        ),
        (lambda: random_directions(NET, KEY, mask=1.0), "a mask holds booleans"),
        (lambda: random_directions([NET, abs], KEY), "one leaf is <built-in function"),
        (lambda: eigen_directions(abs, LINE, 1, key=KEY, which="X"), "which must be"),
        (
            lambda: jax.jit(lambda w: random_directions(w, KEY))(NET["dense"]),
            "random_directions was called with traced",
        ),
        (
            lambda: normalize_direction({"conv": NET["conv"]}, NET),
            "direction must have the structure of the parameters",
        ),
        (
            lambda: normalize_direction(NET, NET),
            r"direction\['key'\] is not zero, but the parameter there is key",
        ),
        (
            lambda: normalize_direction(jnp.ones((6, 16)), NET["dense"]),
            r"direction must have the shape of the parameter, \(16, 6\); got \(6, 16\)",
        ),
        (
            lambda: normalize_direction([{"a": jnp.ones(1)}], [NET["dense"]]),
            r"direction\[0\] must have the shape",
        ),
        (lambda: normalize_direction(1j * LINE, LINE), "direction must be real"),
        (lambda: normalize_direction(0 * LINE, LINE), "direction is zero everywhere"),
        (
            lambda: normalize_direction(
                [jnp.full((2, 2), jnp.nan)], [jnp.ones((2, 2))]
            ),
            r"direction\[0\] holds NaN",
        ),
        (
            lambda: normalize_direction(
                [jnp.zeros((2, 2)), jnp.ones(3)], [jnp.ones((2, 2)), jnp.ones(3)]
            ),
            "what normalize and mask leave of the direction is zero",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- meshes ----------------------------------------------------------------------


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def place(request):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(request.param,) * 2)
    return lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))


def test_random_directions_lie_where_the_parameters_lie(place):
    params = {"w": NET["dense"], "b": NET["bias"]}
    sharded = {"w": place(NET["dense"], "data", "model"), "b": place(NET["bias"])}
    wanted = random_directions(params, KEY, num=1)[0]
    found = random_directions(sharded, KEY, num=1)[0]
    for name in params:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)
    assert found["w"].sharding.is_equivalent_to(sharded["w"].sharding, 2)


def test_trajectory_on_a_mesh(place):
    points = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8, 4)), jnp.float32)
    wanted = trajectory_directions({"w": points})
    stacked = {"w": place(points, None, "data", "model")}
    apart = [{"w": place(point, "data", "model")} for point in points]
    for trajectory in (stacked, apart):
        found = trajectory_directions(trajectory)
        direction = found.directions[1]["w"]
        np.testing.assert_allclose(direction, wanted.directions[1]["w"], atol=1e-5)
        assert direction.sharding.is_equivalent_to(apart[0]["w"].sharding, 2)
        np.testing.assert_allclose(found.coordinates, wanted.coordinates, atol=1e-5)
    at = coordinates(apart[1], apart[-1], found.directions)
    np.testing.assert_allclose(at, wanted.coordinates[1], atol=1e-5)


# --- eigenvectors ----------------------------------------------------------------


def test_curvature_along_eigenvectors_is_the_eigenvalue():
    rng = np.random.default_rng(5)
    basis, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    values = np.array([7.0, 4.0, *np.linspace(-2, 1, 10)])
    matrix = jnp.asarray(basis * values @ basis.T, jnp.float32)

    def loss(w):
        return w.ravel() @ matrix @ w.ravel() / 2 + jnp.sum(w**4) / 10 + jnp.sum(w)

    w = jnp.zeros((4, 3))
    found = eigen_directions(hessian(loss, w), w, 2, key=KEY, max_matvecs=50)
    t = 0.05
    for direction, value in zip(found, values[:2], strict=True):
        assert abs(length(direction) - 1) < 1e-5
        left, middle, right = line(loss, w, direction, steps=[-t, 0, t]).losses
        # The quartic adds 2 t² / 10 at most, rounding 1e-8 / t².
        np.testing.assert_allclose((left - 2 * middle + right) / t**2, value, rtol=1e-3)
    assert abs(jnp.sum(found[0] * found[1])) < 1e-5


# --- trajectories ----------------------------------------------------------------


def planar(steps=12, size=1.0, offset=0.0):
    """Return points on a spiral in a plane of a tree, and that plane."""
    rng = np.random.default_rng(2)
    plane, _ = np.linalg.qr(rng.normal(size=(20, 2)))
    angle = np.linspace(0, 3, steps)
    path = size * np.stack([angle * np.cos(angle), np.sin(angle)], 1)
    flat = path @ plane.T + offset
    return {"a": flat[:, :8].reshape(-1, 2, 4), "b": flat[:, 8:]}, flat, plane


def rows(tree):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], 1)


def flat(directions):
    return rows(jax.tree.map(lambda *x: np.stack(x), *directions))


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_planar_path_is_found_exactly(size):
    tree, points, plane = planar(size=size)
    found = trajectory_directions(jax.tree.map(jnp.float32, tree))
    directions = flat(found.directions)
    np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-6)
    outside = directions - directions @ plane @ plane.T
    np.testing.assert_allclose(outside, 0, atol=1e-5)
    moved = points - points[-1]
    np.testing.assert_allclose(
        found.coordinates @ directions, moved, atol=1e-5 * np.abs(moved).max()
    )
    np.testing.assert_array_equal(found.coordinates[-1], 0)
    assert abs(found.explained.sum() - 1) < 1e-5
    assert found.explained[0] > found.explained[1]


def test_directions_are_singular_vectors(x64):
    """Also those of little weight, whose squares a Gram matrix in float32 loses."""
    rng = np.random.default_rng(3)
    left, _ = np.linalg.qr(rng.normal(size=(9, 3)))
    right, _ = np.linalg.qr(rng.normal(size=(30, 3)))
    moved = left * np.array([1, 1e-3, 1e-5]) @ right.T
    points = np.concatenate([moved, np.zeros((1, 30))])
    _, scale, wanted = np.linalg.svd(points)
    found = trajectory_directions(jnp.asarray(points, jnp.float32), num=3)
    assert found.coordinates.dtype == "float32"
    cosines = np.abs(flat(found.directions) @ wanted[:3].T)
    # The third one is 1e-5 of the path, whose entries are known to 6e-8.
    np.testing.assert_allclose(cosines, np.eye(3), atol=1e-2)
    np.testing.assert_allclose(cosines[:2, :2], np.eye(2), atol=1e-4)
    share = scale**2 / np.sum(scale**2)
    np.testing.assert_allclose(found.explained, share[:3], rtol=0.02)
    assert float(found.explained.sum()) <= 1 + 1e-7
    # The largest coordinate along each direction is positive.
    for turn in range(4):
        path = jnp.asarray([*np.roll(moved, turn, 0), points[-1]], jnp.float32)
        at = trajectory_directions(path, num=3).coordinates
        assert (np.asarray(at)[np.abs(at).argmax(0), range(3)] > 0).all()


def test_a_list_of_trees_is_the_stacked_tree():
    tree, _, _ = planar()
    tree = jax.tree.map(jnp.float32, tree)
    points = [
        {**jax.tree.map(lambda x, t=t: x[t], tree), "step": t, "none": None}
        for t in range(12)
    ]
    found, wanted = trajectory_directions(points), trajectory_directions(tree)
    np.testing.assert_array_equal(found.coordinates, wanted.coordinates)
    assert found.directions[0]["step"] is None
    # The directions fit the parameters, as `line` checks.
    line(lambda w: jnp.sum(w["a"]), points[-1], found.directions[0], steps=[0, 1])


def test_coordinates_of_the_path_are_recovered():
    tree, _, _ = planar()
    points = [jax.tree.map(lambda x, t=t: jnp.float32(x[t]), tree) for t in range(12)]
    found = trajectory_directions(points)
    for t in (0, 5, 11):
        at = coordinates(points[t], points[-1], found.directions)
        np.testing.assert_allclose(at, found.coordinates[t], atol=1e-5)


def test_coordinates_in_a_skewed_plane_of_any_scale():
    rng = np.random.default_rng(4)
    origin, first, second = (jnp.float32(rng.normal(size=(3, 4))) for _ in range(3))
    second = 1e3 * (first + 0.1 * second)
    off = jnp.float32(np.linalg.qr(rng.normal(size=(12, 3)))[0])
    system = np.stack([np.ravel(first), np.ravel(second)], 1)
    off = np.ravel(rng.normal(size=12))
    off -= system @ np.linalg.lstsq(system, off)[0]  # to the side of the plane
    point = origin + 2 * first - 3e-3 * second + jnp.float32(off.reshape(3, 4))
    found = coordinates([point, None], [origin, None], ([first, None], [second, None]))
    np.testing.assert_allclose(found, [2, -3e-3], rtol=1e-3)
    pinned = coordinates([point, 1], [origin, 2], [[first, None]])
    np.testing.assert_allclose(
        pinned[0], np.vdot(first, point - origin) / length(first) ** 2, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trajectory_directions([jnp.ones(3)]), "at least two points"),
        (lambda: trajectory_directions([]), "at least two points"),
        (lambda: trajectory_directions(jnp.ones((1, 3))), "at least two points"),
        (lambda: trajectory_directions({"a": jnp.ones(()), "b": LINE}), "two points"),
        (lambda: trajectory_directions({"a": jnp.ones((2, 3)), "b": LINE}), "leading"),
        (lambda: trajectory_directions([jnp.ones(3), jnp.ones(4)]), "point 1 has"),
        (lambda: trajectory_directions(jnp.ones((4, 3))), "are equal"),
        (lambda: trajectory_directions(LINE), "span 1 direction.*num=2"),
        (lambda: trajectory_directions(ROUNDED), "span 1 direction"),
        (lambda: trajectory_directions(0.1 * LINE**0 + LAST_BIT), "are equal"),
        (lambda: trajectory_directions(LINE[:2]), "span 1 direction.*num=2"),
        (lambda: trajectory_directions(LINE, num=0), "num must be at least 1"),
        (lambda: trajectory_directions(LINE / 0), "must be finite"),
        (
            lambda: jax.jit(trajectory_directions)(LINE),
            "trajectory_directions was call",
        ),
        (lambda: coordinates(LINE, LINE, [LINE, 2 * LINE]), "linearly dependent"),
        (lambda: coordinates(LINE, LINE, [0 * LINE]), r"directions\[0\] is zero"),
        (lambda: coordinates(LINE, LINE[0], [LINE[0]]), "params must be shaped like"),
    ],
)
def test_mistakes_about_trajectories_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
