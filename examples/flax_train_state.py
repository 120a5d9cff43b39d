"""Nexus inside flax's `TrainState`, whose `apply_gradients` takes no extra arguments.

`nexus_multi_steps` wraps an optimizer like `optax.MultiSteps`: the loop hands over one
micro-batch gradient per call and stays as it is.  Every K-th call is a step of the
optimizer inside; in between `state.params` are look-ahead points, and the parameters to
evaluate and to save are `nexus_params(state.opt_state)`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from basinax.optimizers import nexus_multi_steps, nexus_params

MICROBATCHES, SIZE, STEPS = 4, 64, 80
INNER_RATE = 0.01  # how far to walk per micro-batch, as the gradients get unit length


class Network(nn.Module):
    """A perceptron."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits."""
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


@functools.partial(jax.jit, donate_argnums=0)
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, jax.Array]:
    """The step from flax's tutorials, unchanged."""

    def loss_fn(params: dict) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> None:
    """Train, stop inside a walk and after one, and check where the parameters are."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    x, x_test, y, y_test = train_test_split(images, labels, random_state=0)

    model = Network()
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x[:1])["params"],
        # Schedules, clipping and decay belong inside: they then count and see steps.
        tx=nexus_multi_steps(optax.adamw(1e-2), INNER_RATE, every_k=MICROBATCHES),
    )

    rng = np.random.default_rng(0)
    distances = []
    for step in range(STEPS):
        losses = []
        for batch in rng.permutation(len(x))[: MICROBATCHES * SIZE].reshape(-1, SIZE):
            state, loss = train_step(state, x[batch], y[batch])
            losses.append(loss)
            ahead = jax.tree.map(
                jnp.subtract, state.params, nexus_params(state.opt_state)
            )
            distances.append(float(optax.tree.norm(ahead)))
        if (step + 1) % 20 == 0:
            walk = ", ".join(f"{d:.4f}" for d in distances[-MICROBATCHES:])
            print(
                f"step {step + 1}: loss {np.mean(losses):.3f}; "
                f"distance of the live from the true parameters: {walk}"
            )

    # Each call adds a unit vector times INNER_RATE; the last one ends the walk.  The
    # tolerance is float32's rounding of parameters of order one.
    walked = np.reshape(distances, (STEPS, MICROBATCHES))
    np.testing.assert_allclose(walked[:, 0], INNER_RATE, atol=1e-5)
    assert np.all(walked[:, :-1] < INNER_RATE * np.arange(1, MICROBATCHES) + 1e-5)
    np.testing.assert_allclose(walked[:, -1], 0, atol=1e-5)

    logits = state.apply_fn({"params": nexus_params(state.opt_state)}, x_test)
    accuracy = float(np.mean(np.argmax(logits, -1) == y_test))
    assert accuracy > 0.94, accuracy
    print(
        f"Checked: {accuracy:.1%} of {len(y_test)} unseen digits are right, and every "
        f"{MICROBATCHES}th call returns to the true parameters."
    )


if __name__ == "__main__":
    main()
