"""A bare training loop: one compiled `lax.scan` per epoch, with donated buffers.

Nothing but JAX: parameters are a dict, the epoch is one program, and parameters and
optimizer state are overwritten in place.  `nexus` takes all micro-batches of a step at
once, so the data of an epoch have the axes (step, micro-batch, sample, pixel).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from basinax.optimizers import nexus

EPOCHS, MICROBATCHES, SIZE = 15, 4, 32

Params = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array]


def init(rng: np.random.Generator) -> Params:
    """Draw a perceptron with one hidden layer."""
    return {
        "w1": jnp.asarray(rng.normal(0, 64**-0.5, (64, 48)), jnp.float32),
        "b1": jnp.zeros(48),
        "w2": jnp.asarray(rng.normal(0, 48**-0.5, (48, 10)), jnp.float32),
        "b2": jnp.zeros(10),
    }


def logits_fn(params: Params, images: jax.Array) -> jax.Array:
    """Apply the network."""
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


def loss_fn(params: Params, batch: Batch) -> jax.Array:
    """Mean cross-entropy on one micro-batch."""
    images, labels = batch
    logits = logits_fn(params, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def main() -> None:
    """Train, and check accuracy, donation and the number of compilations."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    x, x_test, y, y_test = train_test_split(images, labels, random_state=0)
    rng = np.random.default_rng(0)

    tx = optax.chain(nexus(0.01), optax.adamw(1e-2))
    traces = 0

    def epoch(
        params: Params, state: optax.OptState, batches: Batch
    ) -> tuple[Params, optax.OptState, jax.Array]:
        nonlocal traces
        traces += 1  # runs when JAX traces the function, not when the program runs

        def step(carry: tuple, microbatches: Batch) -> tuple[tuple, jax.Array]:
            params, state = carry
            # Of the first argument only shapes are used: there is no gradient yet.
            updates, state = tx.update(
                params, state, params, value_fn=loss_fn, microbatches=microbatches
            )
            params = optax.apply_updates(params, updates)
            return (params, state), optax.tree.get(state, "value")

        (params, state), losses = jax.lax.scan(step, (params, state), batches)
        return params, state, losses

    run_epoch = jax.jit(epoch, donate_argnums=(0, 1))
    steps = len(x) // (MICROBATCHES * SIZE)
    params = init(rng)
    state = tx.init(params)
    for number in range(EPOCHS):
        order = rng.permutation(len(x))[: steps * MICROBATCHES * SIZE]
        order = order.reshape(steps, MICROBATCHES, SIZE)
        given = jax.tree.leaves((params, state))
        params, state, losses = run_epoch(params, state, (x[order], y[order]))
        if (number + 1) % 5 == 0:
            print(f"epoch {number + 1}: loss {jnp.mean(losses):.3f}")

    freed = sum(leaf.is_deleted() for leaf in given)
    assert freed == len(given), f"{freed} of {len(given)} buffers were donated"
    assert traces == 1, traces
    accuracy = float(np.mean(np.argmax(logits_fn(params, x_test), -1) == y_test))
    assert accuracy > 0.94, accuracy
    print(
        f"Checked: {accuracy:.1%} of {len(y_test)} unseen digits are right after "
        f"{EPOCHS} epochs of {steps} steps, one compilation, and all {len(given)} "
        "buffers overwritten in place."
    )


if __name__ == "__main__":
    main()
