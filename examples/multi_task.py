"""Two tasks on one network in a bare loop: SAMO's gradients, combined by MGDA.

`samo_value_and_grad` returns one sharpness-aware gradient per task, `aggregate`
combines those of the shared layer into one update, and every head follows its own task.
What comes after is any optax optimizer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from basinax.optimizers import aggregate, mgda_weights, samo_value_and_grad

STEPS, BATCH, TASKS = 200, 128, ("is the digit even", "is it above four")

Params = dict[str, Any]  # the body, a matrix, and a list of heads

OWNER = {"body": -1, "heads": [0, 1]}  # -1: shared by all tasks


def logits_fn(params: Params, images: jax.Array) -> jax.Array:
    """Apply the shared layer and both heads; shape (samples, tasks)."""
    hidden = jax.nn.relu(images @ params["body"])
    return jnp.stack([hidden @ head for head in params["heads"]], axis=-1)


def targets(labels: np.ndarray) -> np.ndarray:
    """Answer both questions; shape (samples, tasks)."""
    return np.stack([labels % 2 == 0, labels > 4], axis=-1)


def losses_fn(params: Params, images: jax.Array, answers: jax.Array) -> jax.Array:
    """One loss per task, shape (tasks,)."""
    losses = optax.sigmoid_binary_cross_entropy(logits_fn(params, images), answers)
    return jnp.mean(losses, axis=0)


value_and_grads = samo_value_and_grad(losses_fn, rho=0.05, owner=OWNER)
tx = optax.chain(aggregate(mgda_weights, num_tasks=len(TASKS)), optax.adam(1e-2))


@jax.jit
def train_step(
    params: Params,
    state: optax.OptState,
    key: jax.Array,
    images: jax.Array,
    answers: jax.Array,
) -> tuple[Params, optax.OptState, jax.Array]:
    """One step; the key draws the directions in which tasks are probed."""
    losses, grads = value_and_grads(params, images, answers, key=key)
    updates, state = tx.update(grads, state, params, losses=losses)
    return optax.apply_updates(params, updates), state, losses


def main() -> None:
    """Train, and check both tasks."""
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        (images / 16).astype(np.float32), targets(labels), random_state=0
    )
    rng = np.random.default_rng(0)
    params = {
        "body": jnp.asarray(rng.normal(0, 1 / 8, (64, 48)), jnp.float32),
        "heads": [jnp.asarray(rng.normal(0, 1 / 7, 48), jnp.float32) for _ in TASKS],
    }
    state = tx.init(params)
    keys = jax.random.split(jax.random.key(0), STEPS)
    for step in range(STEPS):
        batch = rng.integers(len(x), size=BATCH)
        params, state, losses = train_step(
            params, state, keys[step], x[batch], y[batch]
        )
        if (step + 1) % 50 == 0:
            weights, cosines = (
                optax.tree.get(state, k) for k in ("weights", "cosines")
            )
            print(
                f"step {step + 1}: losses {losses.round(3)}, weights "
                f"{weights.round(2)}, cosine of the gradients {cosines[0, 1]:.2f}"
            )

    right = np.mean((logits_fn(params, x_test) > 0) == y_test, axis=0)
    assert np.all(right > 0.93), right
    answers = ", ".join(f"{t}: {r:.1%}" for t, r in zip(TASKS, right, strict=True))
    print(f"Checked: right answers on {len(x_test)} unseen digits, {answers}.")


if __name__ == "__main__":
    main()
