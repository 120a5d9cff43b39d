"""Every stage of the authors' SAMO trainers, reproduced, and F-MTL's formulas.

`golden/samo.npz` holds inputs and internals of their PyTorch code (OptMN-Lab/SAMO,
commit 3b686c99) running on tiny models: CelebA (`bce3`), QM9 (`mse2`, whose heads move
by their raw gradient) and NYUv2 (`seg3_raw`, without layer-wise normalization).
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from basinax.optimizers import f_mtl_value_and_grad, samo_value_and_grad
from basinax.optimizers._ascent import ascent
from basinax.optimizers._owners import resolve_owners
from basinax.optimizers._samo import joint_direction, perturbed_heads
from basinax.optimizers._spsa import spsa_gradient
from basinax.optimizers._task_gradients import evaluate

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "samo.npz")
STEPS = ["bce3/s0", "bce3/s1", "mse2/s0", "seg3_raw/s0"]
HEADS = {"bce3": "out_layer.{}.", "mse2": "head_{}.", "seg3_raw": "pred_task{}."}
FIRST_HEAD = {"seg3_raw": 1}
RTOL, ATOL = 1e-9, 1e-10


@pytest.fixture(autouse=True)
def _double(x64):
    """Enable float64 in every test here."""


def tree(step, what):
    """Read the arrays below a folder of the file."""
    prefix = f"{step}/{what}/"
    keys = [key for key in GOLDEN.files if key.startswith(prefix)]
    return {key[len(prefix) :]: jnp.asarray(GOLDEN[key]) for key in keys}


def per_task(step, what, tasks):
    """Stack the trees of all tasks."""
    trees = [tree(step, f"{what}/{task}") for task in range(tasks)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def hyper(step, name):
    return GOLDEN[f"{step.split('/')[0]}/hyper/{name}"].item()


def owner_of(case, params):
    """Return the task of every leaf, by its name."""
    prefixes = [HEADS[case].format(i + FIRST_HEAD.get(case, 0)) for i in range(3)]
    return {
        name: next((t for t, p in enumerate(prefixes) if name.startswith(p)), -1)
        for name in params
    }


def linear(params, name, h):
    bias = params[name + "bias"]
    return h @ params[name + "weight"].T + bias.reshape((1,) * (h.ndim - 1) + (-1,))


def features(params, x, prefix):
    """Apply the layers below a prefix, in order."""
    for name in sorted(params):
        if name.startswith(prefix) and name.endswith("weight"):
            x = jnp.tanh(linear(params, name.removesuffix("weight"), x))
    return x


def bce(params, batch):
    h = features(params, batch["x"], "shared_base.")
    losses = []
    for task, y in enumerate(batch["y"]):
        logits = linear(params, f"out_layer.{task}.", h)[:, 0]
        losses.append(jnp.mean(jnp.logaddexp(0, logits) - y * logits))
    return jnp.stack(losses)


def mse(params, batch):
    h = features(params, batch["x"], "enc.")
    found = [linear(params, f"head_{task}.", h)[:, 0] for task in range(2)]
    return jnp.stack(
        [jnp.mean((y - f) ** 2) for y, f in zip(batch["y"].T, found, strict=True)]
    )


def seg(params, batch):
    h = features(params, batch["x"], "enc.")
    logp = jax.nn.log_softmax(linear(params, "pred_task1.", h), -1)
    picked = jnp.take_along_axis(logp, batch["label"][..., None], -1)
    depth = linear(params, "pred_task2.", h)[..., 0]
    target = batch["depth"][:, 0]
    error = jnp.where(target != 0, jnp.abs(depth - target), 0)
    normal = linear(params, "pred_task3.", h)
    normal = normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)
    wanted = jnp.moveaxis(batch["normal"], 1, -1)
    valid = wanted.sum(-1) != 0
    dots = jnp.where(valid, jnp.sum(normal * wanted, -1), 0)
    return jnp.stack(
        [
            -jnp.mean(picked),
            jnp.sum(error) / jnp.sum(target != 0),
            1 - jnp.sum(dots) / jnp.sum(valid),
        ]
    )


MODELS = {"bce3": bce, "mse2": mse, "seg3_raw": seg}


def assert_trees(found, wanted, what):
    assert set(found) == set(wanted), what
    for name, leaf in wanted.items():
        np.testing.assert_allclose(
            found[name], leaf, rtol=RTOL, atol=ATOL, err_msg=f"{what}: {name}"
        )


def present(part):
    return {name: leaf for name, leaf in part.items() if leaf is not None}


@functools.cache
def oracle(case):
    """Compile the trainer's step, and what it computes on the way."""
    owner = owner_of(case, tree(f"{case}/s0", "w"))
    options = {
        "rho": hyper(case, "rho"),
        "adaptive": hyper(case, "adaptive"),
    }
    alpha, mu = 1 - hyper(case, "beta"), hyper(case, "zo_eps")
    layerwise, scaled = hyper(case, "layerwise"), hyper(case, "head_scaled")
    whole = samo_value_and_grad(
        MODELS[case],
        alpha=alpha,
        mu=mu,
        layerwise=layerwise,
        perturb_private=True if scaled else "raw",
        owner=owner,
        axis="unroll",
        diagnostics=True,
        **options,
    )

    @jax.jit
    def run(params, batch, z):
        directions = dict.fromkeys(params) | {n: leaf[:, None] for n, leaf in z.items()}
        owners = resolve_owners(owner, params)
        tasks = evaluate(MODELS[case], owners, params, (batch,), {}, "map", False)
        shared, private = tasks.gradient_of_mean()
        heads = perturbed_heads(tasks, private, *options.values(), raw=not scaled)
        stages = {
            "g_mean": owners.merge(shared, private),
            "eps_head": jax.tree.map(jnp.subtract, heads, tasks.private),
        }
        for task in range(tasks.losses.size):
            _, estimate = spsa_gradient(
                lambda w, t=task: tasks.losses_fn(w, tasks.private)[t],
                tasks.shared,
                lambda sample, t=task: (
                    dict.fromkeys(params) | {name: leaf[t] for name, leaf in z.items()}
                ),
                mu,
                1,
            )
            q = joint_direction(shared, estimate, alpha, layerwise=layerwise)
            stages[f"zo/{task}"] = estimate
            stages[f"eps_shared/{task}"] = ascent(q, tasks.shared, **options)
        return whole(params, batch, directions=directions), stages

    return run


@functools.cache
def run(step):
    """Return what the trainer's step computes, by our functions."""
    tasks = hyper(step, "T")
    return oracle(step.split("/")[0])(
        tree(step, "w"), tree(step, "batch"), per_task(step, "z", tasks)
    )


@pytest.mark.parametrize("step", STEPS)
def test_losses_and_differences(step):
    (losses, _, diagnostics), _ = run(step)
    for name, found in (
        ("losses", losses),
        ("pert_losses", diagnostics.losses),
        ("proj", diagnostics.slopes[:, 0]),
    ):
        np.testing.assert_allclose(
            found, GOLDEN[f"{step}/{name}"], rtol=RTOL, atol=ATOL, err_msg=name
        )


@pytest.mark.parametrize("step", STEPS)
def test_perturbed_gradients(step):
    (_, grads, _), _ = run(step)
    wanted = per_task(step, "sam_grad", hyper(step, "T"))
    assert_trees(present(grads.shared), wanted, "sam_grad")
    final = tree(step, "grad_final")
    heads = {name: final[name] for name in present(grads.private)}
    assert_trees(present(grads.private), heads, "grad_final")
    assert set(wanted) | set(heads) == set(final)


def apply_combiner(step, rows):
    """Combine rows (T, D) as the trainer's class does, with the weights it found."""
    tasks, method = len(rows), hyper(step, "method")
    if method == "mgdawithsamo":
        return tasks**2 * GOLDEN[f"{step}/comb/mgda_w"] @ rows
    weights = GOLDEN[f"{step}/weights"]
    if method == "fairgradwithsamo":
        return tasks * weights @ rows
    c, mixed = hyper(step, "c"), weights @ rows
    radius = c * np.sqrt(np.mean(rows @ rows.T) + 1e-8) + 1e-8
    step = rows.mean(0) + radius / (np.linalg.norm(mixed) + 1e-8) * mixed
    return tasks * step / (1 + c**2)


def flat(step, part, leading=()):
    """Flatten leaves in the trainer's order."""
    names = [str(name) for name in GOLDEN[f"{step}/shared_order"]]
    return np.concatenate([np.reshape(part[n], (*leading, -1)) for n in names], -1)


@pytest.mark.parametrize("step", STEPS)
def test_combined_and_clipped_gradient(step):
    (_, grads, _), _ = run(step)
    combined = apply_combiner(step, flat(step, grads.shared, (hyper(step, "T"),)))
    clipped = combined * min(1, 1 / (np.linalg.norm(combined) + 1e-6))
    wanted = flat(step, tree(step, "grad_final"))
    np.testing.assert_allclose(clipped, wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("case", MODELS)
def test_parameters_after_adam(case):
    steps = [step for step in STEPS if step.startswith(case)]
    tx = optax.adam(hyper(steps[0], "lr"), 0.9, 0.999, 1e-8)
    state = tx.init(tree(steps[0], "w"))
    for step in steps:
        (_, grads, _), _ = run(step)
        params = tree(step, "w")
        gradient = tree(step, "grad_final") | present(grads.private)
        updates, state = tx.update(gradient, state)
        found = optax.apply_updates(params, updates)
        for name, leaf in tree(step, "w_after").items():
            # Adam divides by |g|, so an error of 1e-10 in a small gradient grows.
            np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-7)


@pytest.mark.parametrize("step", STEPS)
def test_stages(step):
    """Common gradient, estimates, and both perturbations."""
    _, stages = run(step)
    tasks = range(hyper(step, "T"))
    heads = {n: x for t in tasks for n, x in tree(step, f"eps_head/{t}").items()}
    for name, found in stages.items():
        wanted = heads if name == "eps_head" else tree(step, name)
        assert_trees(present(found), wanted, name)


def test_f_mtl():
    step, tasks = "bce3/s0", 3
    params, batch = tree(step, "w"), tree(step, "batch")
    rho = GOLDEN[f"{step}/fmtl/rho"].item()
    owner = owner_of("bce3", params)
    fn = f_mtl_value_and_grad(bce, rho=rho, owner=owner)
    losses, grads = jax.jit(fn)(params, batch)
    np.testing.assert_allclose(losses, GOLDEN[f"{step}/losses"], rtol=RTOL)
    loss, extra = (flat(step, part.shared, (tasks,)) for part in grads)
    for name, found in (
        ("J_loss", loss),
        ("J_flat", extra),
        ("J_sam", loss + extra),
        # The authors' linear scalarization is T times the sum.
        ("ls", tasks * loss.sum(0) + tasks * extra.sum(0)),
    ):
        wanted = GOLDEN[f"{step}/fmtl/{name}"]
        np.testing.assert_allclose(found, wanted, rtol=RTOL, atol=ATOL, err_msg=name)
    sums = jax.tree.map(jnp.add, grads.loss.private, grads.flat.private)
    for task in range(tasks):
        wanted = tree(step, f"fmtl/head_grad/{task}")
        found = {name: sums[f"out_layer.{task}.{name}"] for name in wanted}
        assert_trees(found, wanted, f"head {task}")
