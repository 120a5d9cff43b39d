"""Small multi-task problems whose perturbations can be read off the gradients."""

import jax
import jax.numpy as jnp
import numpy as np

TASKS = 3


def network(dtype=jnp.float64, tasks=TASKS, seed=0):
    """Draw the parameters of a two-layer body with linear heads, and their owners."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    params = {
        "body": [draw(4, 5), draw(5, 5)],
        "bias": draw(5),
        "heads": [{"kernel": draw(5), "bias": draw()} for _ in range(tasks)],
    }
    owner = {"body": -1, "bias": -1, "heads": list(range(tasks))}
    return params, owner, draw(7, 4)


def task_losses(params, x):
    """Return one loss per head; the last operation stacks them."""
    h = jnp.tanh(x @ params["body"][0] + params["bias"][None])
    h = jnp.tanh(h @ params["body"][1])
    heads = enumerate(params["heads"])
    return jnp.stack(
        [jnp.mean((h @ w["kernel"] + w["bias"] - t) ** 2) for t, w in heads]
    )


def bowls(params, slopes):
    """Return ½‖w‖² + ⟨slope_t, w⟩ for each task.

    The gradient at w + ε is w + ε + slope_t, so a perturbed gradient shows ε.
    """

    def one(w, b):
        linear = jnp.sum((b * w[None]).reshape(len(b), -1), -1)
        return 0.5 * jnp.sum(w**2) + linear

    return sum(jax.tree.leaves(jax.tree.map(one, params, slopes)))


def bowl_problem(tasks=TASKS, seed=0, scale=1.0):
    """Draw parameters and slopes for `bowls`."""
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (3, 4), "twin": (3, 4), "vector": (5,)}
    params = {n: jnp.asarray(rng.standard_normal(s)) for n, s in shapes.items()}
    slopes = {
        n: jnp.asarray(scale * rng.standard_normal((tasks, *s)))
        for n, s in shapes.items()
    }
    return params, slopes


def perturbations(params, slopes, rows):
    """Read each task's ε off the gradients of `bowls`."""
    return jax.tree.map(lambda j, w, b: j - w[None] - b, rows, params, slopes)


def norms(stacked):
    """Return the norm of each task's tree."""
    squares = [
        jnp.sum(x.reshape(len(x), -1) ** 2, -1) for x in jax.tree.leaves(stacked)
    ]
    return jnp.sqrt(sum(squares))
