"""Save a run with orbax, resume it, and get the very same numbers.

The checkpoint holds parameters, optimizer state and the number of steps.  The state
brings along what a monitor remembers and the random key of a weighting that draws; the
data order is a function of the step.  Restoring takes an abstract target: without one,
orbax returns dicts and lists in place of the optimizer's named tuples.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

from basinax.landscape import metrics, monitor
from basinax.optimizers import aggregate, random_weights, task_gradients

STOP, END, BATCH = 20, 40, 128

Params = dict[str, jax.Array]


def losses_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Losses of two tasks on one network: is the digit even, is it above four."""
    logits = jnp.tanh(images @ params["w1"]) @ params["w2"]
    tasks = jnp.stack([labels % 2 == 0, labels > 4], axis=-1)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, tasks), axis=0)


tx = optax.chain(
    aggregate(random_weights(), num_tasks=2, key=0),  # draws from a key in its state
    monitor({"sharpness": metrics.lambda_max()}, every=7),  # keeps an eigenvector
    optax.adamw(1e-2),
)


def start() -> tuple[Params, optax.OptState]:
    """Return parameters and optimizer state before the first step."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (64, 32)) / 8,
        "w2": jax.random.normal(keys[1], (32, 2)) / 6,
    }
    return params, tx.init(params)


@jax.jit
def train_step(
    params: Params, state: optax.OptState, images: jax.Array, labels: jax.Array
) -> tuple[Params, optax.OptState, jax.Array]:
    """One step on the combined gradient of both tasks."""
    losses, grads = task_gradients(losses_fn)(params, images, labels)
    updates, state = tx.update(
        grads, state, params, value_fn=lambda p: jnp.mean(losses_fn(p, images, labels))
    )
    return optax.apply_updates(params, updates), state, losses


def main() -> None:
    """Run without a break and with one, and compare bit for bit."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)

    def run(params: Params, state: optax.OptState, first: int, last: int) -> tuple:
        for step in range(first, last):
            # A generator of its own for every step needs no state to be saved.
            batch = np.random.default_rng([0, step]).integers(len(images), size=BATCH)
            params, state, losses = train_step(
                params, state, images[batch], labels[batch]
            )
        sharpness = optax.tree.get(state, "sharpness")
        print(f"step {last}: losses {losses}, sharpness {sharpness:.3f}")
        return params, state

    expected = run(*start(), 0, END)

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder).resolve() / "checkpoint"
        params, state = run(*start(), 0, STOP)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {"params": params, "opt": state, "step": STOP})
        del params, state

        # What follows needs nothing from the run above: shapes cost no computation.
        params, state = jax.eval_shape(start)
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(
                path, {"params": params, "opt": state, "step": 0}
            )
    resumed = run(found["params"], found["opt"], found["step"], END)

    assert jax.tree.structure(resumed) == jax.tree.structure(expected)
    same = jax.tree.map(lambda x, y: bool(jnp.all(x == y)), resumed, expected)
    assert jax.tree.all(same), same
    print(
        f"Checked: stopped at step {STOP} and resumed to {END}, all "
        f"{len(jax.tree.leaves(same))} arrays of parameters and state are bit for bit "
        "those of the run without a break."
    )


if __name__ == "__main__":
    main()
