"""Sharpness-aware training of a flax nnx model that has a state of its own.

`nnx.Optimizer.update` hands further keyword arguments on to the optax chain, so `sam`
gets the loss as `value_fn`.  That must be a pure function of the parameters: split the
model into parameters and rest, and evaluate a *copy*, whose running statistics are
thrown away.  Without the copy the second evaluation of a step would move those of the
model, at the perturbed weights, and flax refuses that with a TraceContextError.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from basinax.optimizers import sam

EPOCHS, BATCH = 10, 128


class Network(nnx.Module):
    """A perceptron with batch normalization."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits."""
        return self.out(jax.nn.relu(self.norm(self.hidden(x))))


def loss_fn(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy; moves the running statistics of `model`."""
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
    )


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """One step of whatever optimizer; those that need no `value_fn` ignore it."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)

    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def value_fn(params: nnx.State) -> jax.Array:
        return loss_fn(nnx.merge(graph, params, rest, copy=True), images, labels)

    optimizer.update(model, grads, value_fn=value_fn)
    return loss


def main() -> None:
    """Train, then check accuracy and running statistics."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    x, x_test, y, y_test = train_test_split(images, labels, random_state=0)

    def start(tx: optax.GradientTransformation) -> tuple[Network, nnx.Optimizer]:
        model = Network(nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    # After one step from the same weights SAM and plain AdamW have seen the same clean
    # batch: their weights differ, their running statistics do not.
    flat, optimizer = start(optax.chain(sam(0.05), optax.adamw(1e-2)))
    plain, plain_optimizer = start(optax.adamw(1e-2))
    train_step(flat, optimizer, x[:BATCH], y[:BATCH])
    train_step(plain, plain_optimizer, x[:BATCH], y[:BATCH])
    np.testing.assert_allclose(flat.norm.mean[...], plain.norm.mean[...], rtol=1e-5)
    assert np.any(flat.hidden.kernel[...] != plain.hidden.kernel[...])

    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(x))
        losses = [
            train_step(flat, optimizer, x[batch], y[batch])
            for batch in np.split(order, range(BATCH, len(x), BATCH))[:-1]
        ]
        if (epoch + 1) % 5 == 0:
            print(f"epoch {epoch + 1}: mean training loss {np.mean(losses):.3f}")

    flat.eval()  # from here on the running statistics are used
    accuracy = float(np.mean(np.argmax(nnx.jit(flat)(x_test), -1) == y_test))
    assert accuracy > 0.94, accuracy
    print(
        f"Checked: {accuracy:.1%} of {len(y_test)} unseen digits are right, and a step "
        "with SAM moves the running statistics once, as one without does."
    )


if __name__ == "__main__":
    main()
