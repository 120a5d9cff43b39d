"""Spectral clipping on meshes: same numbers, same sharding, few collectives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from basinax.optimizers import (
    hard_spectral_clip,
    orthogonalize,
    soft_spectral_clip,
    spectral_clip,
)

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
)
STACKED = optax.contrib.MuonDimensionNumbers(-2, -1)
KINDS = [AxisType.Auto, AxisType.Explicit]
METHODS = ["auto", "polynomial"]


def make_mesh(kind, shape=(8,), names=("d",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def place(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def compiled_text(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def collectives(text):
    """Count collectives; combined ones count once for each result they carry."""
    found = dict.fromkeys(COLLECTIVES, 0)
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if match:
            # A tuple is several arrays reduced together, or one split for all-to-all.
            combined = match[1].startswith("(") and match[2] != "all-to-all"
            found[match[2]] += match[1].count("[") if combined else 1
    return found


def clip_tree(tx, tree):
    return tx.update(tree, tx.init(tree))[0]


SPECS = {
    "short side": (P("d", None), P(None, "d")),
    "long side": (P(None, "d"), P("d", None)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", SPECS)
def test_same_result_and_sharding(kind, method, side):
    """Wide and tall matrices with either side sharded, and a vector."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"wide": (16, 64), "tall": (64, 16), "vector": (32,), "twin": (16, 64)}
    tree = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    wide, tall = SPECS[side]
    specs = {"wide": wide, "tall": tall, "vector": P("d"), "twin": wide}
    tx = spectral_clip(2.0, method=method)
    expected = jax.jit(lambda t: clip_tree(tx, t))(tree)
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        placed = {n: place(x, mesh, specs[n]) for n, x in tree.items()}
        clipped = jax.jit(lambda t: clip_tree(tx, t))(placed)
        for name in tree:
            np.testing.assert_allclose(
                clipped[name], expected[name], rtol=0, atol=1e-5, err_msg=name
            )
            # Trailing None may come and go in a spec; the placement must not.
            ndim = tree[name].ndim
            assert clipped[name].sharding.is_equivalent_to(
                placed[name].sharding, ndim
            ), name
            assert jax.typeof(clipped[name]) == jax.typeof(placed[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "kernel",
    [
        lambda x: soft_spectral_clip(x, 2.0),
        lambda x: hard_spectral_clip(x, 2.0),
        orthogonalize,
    ],
    ids=["soft", "hard", "orthogonalize"],
)
@pytest.mark.parametrize("spec", [P("d", None), P(None, "d")])
def test_kernels_outside_and_inside_jit(kind, kernel, spec):
    x = jax.random.normal(jax.random.key(0), (16, 64))
    expected = kernel(x)
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        placed = place(x, mesh, spec)
        for run in (kernel, jax.jit(kernel)):
            np.testing.assert_allclose(run(placed), expected, rtol=0, atol=1e-5)
            assert run(placed).sharding.is_equivalent_to(placed.sharding, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [*METHODS, "eigh"])
def test_long_side_costs_two_all_reduces(kind, method):
    """One for the largest entry, one for the Gram matrix; nothing else moves."""
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        for shape, spec in (((16, 64), P(None, "d")), ((64, 16), P("d", None))):
            x = place(jnp.ones(shape), mesh, spec)
            tx = spectral_clip(2.0, method=method)
            found = collectives(compiled_text(lambda x, tx=tx: clip_tree(tx, x), x))
            assert found["all-reduce"] <= 2, found
            assert sum(found.values()) == found["all-reduce"], found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (16, 20), (3, 16, 64)])
def test_short_side_on_an_auto_mesh(method, shape):
    """The type does not tell, yet nothing between Gram matrix and Z communicates."""
    mesh = make_mesh(AxisType.Auto)
    short = 0 if shape[-2] < shape[-1] else 1
    spec = P(*[None] * (len(shape) - 2), *(("d", None) if short == 0 else (None, "d")))
    with jax.set_mesh(mesh):
        x = place(jnp.ones(shape), mesh, spec)
        tx = spectral_clip(2.0, method=method, dimension_numbers=STACKED)
        found = collectives(compiled_text(lambda x: clip_tree(tx, x), x))
    # The largest entry, the matrix to form G, the matrix for Z X, and G itself.
    assert sum(found.values()) <= 4, found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("as_kernel", [False, True])
@pytest.mark.parametrize("spec", [P(None, "d", None), P(None, None, "d")])
def test_stacked_layers_move_to_the_layer_axis(method, spec, as_kernel):
    """Each device then owns whole matrices: data moves in and out, nothing else."""
    mesh = make_mesh(AxisType.Explicit)
    tx = spectral_clip(2.0, method=method, dimension_numbers=STACKED)

    def run(x):
        if as_kernel:
            return soft_spectral_clip(x, 2.0, method=method)
        return clip_tree(tx, x)

    with jax.set_mesh(mesh):
        found = collectives(
            compiled_text(run, place(jnp.ones((16, 32, 64)), mesh, spec))
        )
    # One way in, one way out.  On CPU "auto" also takes a vote, one scalar.
    assert found.pop("all-to-all") == 2
    assert found.pop("all-reduce") <= (method == "auto")
    assert not any(found.values()), found


@pytest.mark.parametrize("method", METHODS)
def test_stack_sharded_over_layers_never_communicates(method):
    for kind in KINDS:
        mesh = make_mesh(kind)
        with jax.set_mesh(mesh):
            x = place(jnp.ones((16, 32, 64)), mesh, P("d", None, None))
            tx = spectral_clip(2.0, method=method, dimension_numbers=STACKED)
            found = collectives(compiled_text(lambda x, tx=tx: clip_tree(tx, x), x))
        assert sum(found.values()) <= (method == "auto"), (kind, found)


@pytest.mark.parametrize("kind", KINDS)
def test_two_dimensional_mesh(kind):
    """Fully sharded data parallel and tensor parallel at once; odd sizes too."""
    mesh = make_mesh(kind, (2, 4), ("data", "model"))
    x = jax.random.normal(jax.random.key(0), (12, 20))
    tx = spectral_clip(2.0)
    expected = clip_tree(tx, x)
    with jax.set_mesh(mesh):
        for spec in (P("data", "model"), P(("data",), None), P("model", "data")):
            placed = place(x, mesh, spec)
            clipped = jax.jit(lambda x: clip_tree(tx, x))(placed)
            np.testing.assert_allclose(clipped, expected, rtol=0, atol=1e-5)
            assert clipped.sharding.is_equivalent_to(placed.sharding, 2)


def test_inside_shard_map():
    """Replicated weights, sharded data: the usual manual data-parallel step."""
    mesh = make_mesh(AxisType.Auto)
    x = jax.random.normal(jax.random.key(0), (8, 6, 9))
    for method in ("auto", "polynomial", "newton_schulz"):
        tx = spectral_clip(1.0, method=method)

        def step(x, tx=tx):
            return clip_tree(tx, jax.lax.pmean(x[0], "d"))

        run = jax.shard_map(step, mesh=mesh, in_specs=P("d"), out_specs=P())
        expected = clip_tree(tx, x.mean(0))
        np.testing.assert_allclose(jax.jit(run)(x), expected, rtol=0, atol=1e-5)

        def own(x, tx=tx):
            return clip_tree(tx, x[0])[None]

        run = jax.shard_map(own, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        expected = jnp.stack([clip_tree(tx, m) for m in x])
        np.testing.assert_allclose(jax.jit(run)(x), expected, rtol=0, atol=1e-5)
