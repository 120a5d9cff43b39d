"""SAM and ASAM: golden vectors, equations, microbatches, two forms of one thing."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_checks import close, identical, norm

from basinax import optimizers as bx
from basinax.optimizers._ascent import ascent, shifted

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "samo.npz")

is_bias = lambda tree: {name: name.endswith("bias") for name in tree}  # noqa: E731
FORMS = {
    "sam": {},
    "asam_davda": {"adaptive": True},
    "asam_samsung": {"adaptive": True, "eta": 0.01, "unscaled": is_bias},
}
rng = np.random.default_rng(0)


def golden(prefix):
    prefix = f"sam_mlp/{prefix}/"
    found = {k.removeprefix(prefix): GOLDEN[k] for k in GOLDEN if k.startswith(prefix)}
    return jax.tree.map(jnp.asarray, found)


def network_loss(params, x, y):
    hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"][None])
    outputs = hidden @ params["2.weight"].T + params["2.bias"][None]
    return jnp.mean(jnp.square(outputs - y))


# --- against the reference code ------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_golden(form, x64):
    x, y, rho, lr = (
        jnp.asarray(GOLDEN[f"sam_mlp/{k}"]) for k in ("x", "y", "rho", "lr")
    )
    loss_fn = functools.partial(network_loss, x=x, y=y)
    tx = optax.chain(bx.sam(rho, **FORMS[form]), optax.sgd(lr))

    @jax.jit
    def run(params):
        gradient = jax.grad(loss_fn)(params)
        perturbation = ascent(gradient, params, rho, **FORMS[form])
        point = shifted(params, perturbation)
        value, ahead = bx.sam_value_and_grad(loss_fn, rho=rho, **FORMS[form])(params)
        updates, _ = tx.update(gradient, tx.init(params), params, value_fn=loss_fn)
        return {
            "g": gradient,
            "eps": perturbation,
            "w_pert": point,
            "loss": value,
            "loss_pert": loss_fn(point),
            "g_pert": ahead,
            "w_after_sgd": optax.apply_updates(params, updates),
        }

    found = run(golden("w"))
    wanted = {
        key: golden(f"{form}/{key}") for key in ("w_pert", "g_pert", "w_after_sgd")
    }
    wanted |= {"g": golden("g"), "loss": GOLDEN["sam_mlp/loss"]}
    wanted |= {"loss_pert": GOLDEN[f"sam_mlp/{form}/loss_pert"]}
    if form == "asam_samsung":
        wanted["eps"] = golden(f"{form}/eps")
    close({key: found[key] for key in wanted}, wanted, rtol=1e-9)


# --- equations -----------------------------------------------------------------------


def quadratic(seed=0, size=5):
    """Return ½ wᵀHw + bᵀw as a function of a two-leaf tree, H, b and a point."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((size, size))
    h, b = jnp.asarray(h + h.T), jnp.asarray(rng.standard_normal(size))
    split = lambda v: {"head": v[:2], "tail": v[2:]}  # noqa: E731
    join = lambda tree: jnp.concatenate([tree["head"], tree["tail"]])  # noqa: E731
    loss_fn = lambda tree: 0.5 * join(tree) @ h @ join(tree) + b @ join(tree)  # noqa: E731
    return loss_fn, h, b, split(jnp.asarray(rng.standard_normal(size))), join


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_closed_form_on_a_quadratic(adaptive, x64):
    loss_fn, h, b, params, join = quadratic()
    eta = 0.1 if adaptive else 0.0
    oracle = bx.sam_value_and_grad(loss_fn, rho=0.3, adaptive=adaptive, eta=eta)
    value, gradient = jax.jit(oracle)(params)
    w = join(params)
    g = h @ w + b
    a = jnp.abs(w) + eta if adaptive else jnp.ones_like(w)
    worst = w + 0.3 * a**2 * g / jnp.linalg.norm(a * g)
    close(join(gradient), h @ worst + b)
    close(value, loss_fn(params))


def test_no_derivative_passes_through_the_perturbation(x64):
    loss_fn, h, _, params, join = quadratic()
    oracle = bx.sam_value_and_grad(loss_fn, rho=0.3)
    tangent = jax.tree.map(lambda x: x + 1, params)
    derivative = jax.jit(lambda p, t: jax.jvp(lambda p: oracle(p)[1], (p,), (t,))[1])
    moved = derivative(params, tangent)
    close(join(moved), h @ join(tangent))  # not h (1 + dε/dw) tangent


SCALES = st.sampled_from([1e-34, 1e-30, 1e-6, 1.0, 1e6, 1e30, 1e37])
lengths = jax.jit(
    lambda g, w, rho: [ascent(g, w, rho, adaptive=a, eta=0.1 * a) for a in (0, 1)]
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=SCALES, rho=st.floats(1e-6, 1e3))
def test_length_is_rho_at_every_scale_of_the_gradient(seed, scale, rho):
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (4, 3), "scalar": (), "empty": (0, 2)}
    w, g = (
        {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        for _ in range(2)
    )
    g = {k: np.float32(x * scale) for k, x in g.items()}
    plain, adaptive = lengths(g, w, np.float32(rho))
    relative = jax.tree.map(lambda e, w: e / (np.abs(w) + 0.1), adaptive, w)
    # A few roundings of float32 in each entry.
    np.testing.assert_allclose(norm(plain), rho, rtol=2e-6)
    np.testing.assert_allclose(norm(relative), rho, rtol=2e-6)
    # The direction is the gradient's, not merely something of that length.
    u = {k: np.float64(x) / scale for k, x in g.items()}
    inner = sum(np.sum(np.float64(plain[k]) * u[k]) for k in shapes)
    np.testing.assert_allclose(inner, rho * norm(u), rtol=2e-6)


def test_ends_of_the_range_of_float32():
    near = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    climb = jax.jit(lambda g, w: [ascent(g, w, 0.5, adaptive=a) for a in (0, 1)])
    for extreme in (3e38, 4e-38):
        gradient, w = np.float32([extreme, -extreme / 3]), np.float32([extreme, 0])
        plain, adaptive = climb(gradient, w)
        near(plain, np.array([1.5, -0.5]) / 10**0.5)
        near(adaptive, 0.5 * w)
    # The large weight has the small gradient.
    gradient, w = np.float32([1e-30, 1]), np.float32([1, 1e-30])
    near(climb(gradient, w)[1], 0.5 * w / 2**0.5)


def test_scaling_the_loss_changes_nothing():
    params = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(3.0)}
    gradient = {"a": jnp.array([0.3, 1.7, -2.0]), "b": jnp.array(-0.9)}
    for adaptive in (False, True):
        once = ascent(gradient, params, 0.1, adaptive=adaptive)
        for power in (2.0**-60, 2.0**60):  # exact in floating point
            scaled = jax.tree.map(lambda g: power * g, gradient)  # noqa: B023
            identical(ascent(scaled, params, 0.1, adaptive=adaptive), once)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_adaptive_step_follows_a_reparametrisation(seed):
    """For L'(v) = L(D⁻¹v) at v = Dw, the gradient is D⁻¹g and ε must be Dε."""
    rng = np.random.default_rng(seed)
    w, g = rng.standard_normal((2, 6)).astype(np.float32)
    d = (10.0 ** rng.uniform(-3, 3, 6)).astype(np.float32)
    here = ascent(g, w, 0.1, adaptive=True)
    there = ascent(g / d, w * d, 0.1, adaptive=True)
    np.testing.assert_allclose(there, d * here, rtol=5e-6)
    plain = ascent(g / d, w * d, 0.1)
    assert not np.allclose(plain, d * ascent(g, w, 0.1), rtol=1e-2)


@pytest.mark.parametrize("form", ["sam", "asam_samsung"])
def test_radius_zero_is_the_plain_gradient(form):
    params, x = jax.tree.map(np.float32, golden("w")), np.float32(GOLDEN["sam_mlp/x"])
    y = np.float32(GOLDEN["sam_mlp/y"])
    oracle = jax.jit(bx.sam_value_and_grad(network_loss, rho=0.0, **FORMS[form]))
    plain = jax.jit(jax.value_and_grad(network_loss))
    identical(oracle(params, x, y), plain(params, x, y))
    identical(oracle(params, x, y, rho=jnp.float32(0)), plain(params, x, y))


# --- the clean pass ------------------------------------------------------------------


def normalised_loss(params, statistics, x):
    """A loss with running statistics, as of a batch normalisation."""
    hidden = x @ params["w"]
    mean = jnp.mean(hidden, 0)
    loss = jnp.mean(jnp.square(hidden - mean[None] - params["b"][None]))
    return loss, 0.9 * statistics + 0.1 * mean


def test_value_and_statistics_are_those_of_the_clean_parameters():
    params = {
        "w": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32),
        "b": jnp.ones(4),
    }
    before = jax.tree.map(np.array, params)
    statistics, x = jnp.zeros(4), jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)
    plain = jax.value_and_grad(normalised_loss, has_aux=True)
    oracle = bx.sam_value_and_grad(normalised_loss, rho=0.5, has_aux=True)
    (value, aux), gradient = oracle(params, statistics, x)
    (wanted, wanted_aux), clean = plain(params, statistics, x)
    identical((value, aux), (wanted, wanted_aux))
    assert norm(jax.tree.map(jnp.subtract, gradient, clean)) > 0.1
    identical(params, before)


def test_arguments_are_those_of_value_and_grad():
    def loss_fn(scale, w, x, *, shift):
        return jnp.sum(jnp.square(scale * w - x)) + shift * jnp.sum(w), {"w": w}

    scale, w, x = jnp.float32(2.0), jnp.arange(3.0), jnp.ones(3)
    options = {"argnums": (1, 0), "has_aux": True}
    oracle = bx.sam_value_and_grad(loss_fn, rho=0.1, **options)
    plain = jax.value_and_grad(loss_fn, **options)
    (value, aux), gradient = oracle(scale, w, x, shift=0.5)
    (wanted, wanted_aux), clean = plain(scale, w, x, shift=0.5)
    identical((value, aux), (wanted, wanted_aux))
    # One ball for both arguments.
    ahead = shifted((w, scale), ascent(clean, (w, scale), 0.1))
    identical(gradient, plain(ahead[1], ahead[0], x, shift=0.5)[1])
    only = bx.sam_value_and_grad(loss_fn, rho=0.1, argnums=-2, has_aux=True)
    assert only(scale, w, x, shift=0.5)[1].shape == w.shape


# --- microbatches --------------------------------------------------------------------


def test_microbatches_inside_are_the_whole_batch_and_outside_m_sharpness(x64):
    params = golden("w")
    x, y = rng.standard_normal((8, 3)), rng.standard_normal((8, 1))
    accumulate = functools.partial(
        optax.microbatch,
        argnums=(1, 2),
        microbatch_size=2,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )

    def accumulated(loss_fn, **options):
        return accumulate(jax.value_and_grad(loss_fn, **options))

    plain = bx.sam_value_and_grad(network_loss, rho=0.5)
    inside = bx.sam_value_and_grad(network_loss, rho=0.5, value_and_grad=accumulated)
    whole = jax.jit(plain)(params, x, y)
    close(jax.jit(inside)(params, x, y), whole, rtol=1e-11)

    # optax.microbatch groups every fourth row.
    rows = lambda data: data.reshape(2, 4, -1).swapaxes(0, 1)  # noqa: E731
    groups = jax.jit(jax.vmap(plain, in_axes=(None, 0, 0)))(params, rows(x), rows(y))
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), groups)
    outside = jax.jit(accumulate(plain))(params, x, y)
    close(outside, mean, rtol=1e-11)
    assert norm(jax.tree.map(jnp.subtract, outside, whole)) > 1e-3


# --- the two forms -------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_bit_identical(form):
    params = jax.tree.map(np.float32, golden("w"))
    x, y = np.float32(GOLDEN["sam_mlp/x"]), np.float32(GOLDEN["sam_mlp/y"])
    chained = optax.chain(bx.sam(0.3, **FORMS[form]), optax.adamw(1e-2))
    adamw = optax.adamw(1e-2)
    oracle = bx.sam_value_and_grad(network_loss, rho=0.3, **FORMS[form])

    @jax.jit
    def by_chain(params, state):
        gradient = jax.grad(network_loss)(params, x, y)
        value_fn = lambda p: network_loss(p, x, y)  # noqa: E731
        updates, state = chained.update(gradient, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def by_oracle(params, state):
        _, gradient = oracle(params, x, y)
        updates, state = adamw.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    one, one_state = params, chained.init(params)
    two, two_state = params, adamw.init(params)
    for _ in range(3):
        one, one_state = by_chain(one, one_state)
        two, two_state = by_oracle(two, two_state)
    identical(one, two)
    identical(one_state[1], two_state)
    assert norm(jax.tree.map(jnp.subtract, one, params)) > 0


def test_aliases_are_adaptive():
    loss_fn, params = lambda w: jnp.sum(w**4), jnp.array([1.0, -2.0, 0.0])
    options = {"eta": 0.1, "mask": True, "unscaled": False}
    alias = bx.asam_value_and_grad(loss_fn, rho=0.3, **options)(params)
    identical(
        alias, bx.sam_value_and_grad(loss_fn, rho=0.3, adaptive=True, **options)(params)
    )
    tx = bx.asam(0.3, **options)
    gradient = jax.grad(loss_fn)(params)
    updates, _ = tx.update(gradient, tx.init(params), params, value_fn=loss_fn)
    identical(updates, alias[1])
    plain = bx.sam_value_and_grad(loss_fn, rho=0.3)(params)
    assert norm(plain[1] - alias[1]) > 0.1


def test_radius_by_schedule_and_by_call():
    loss_fn = lambda w: jnp.sum(w**2)  # noqa: E731
    params = jnp.array([3.0, 4.0])
    schedule = optax.linear_schedule(0.5, 0.0, 2)
    oracle = bx.sam_value_and_grad(loss_fn, rho=9.0)
    tx = bx.sam(schedule)
    state = tx.init(params)
    for count, length in enumerate([0.5, 0.25, 0.0]):
        assert state.count == count
        updates, state = tx.update(2 * params, state, params, value_fn=loss_fn)
        close(updates, (1 + length / 5) * 2 * params, 1e-6)
        close(oracle(params, rho=schedule(count))[1], updates, 1e-6)
