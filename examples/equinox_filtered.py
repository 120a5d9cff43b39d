"""SPECTRA on an equinox model: filtered trees, orientation and callable masks.

Three things differ from trees of plain arrays.  `eqx.partition` leaves None in place of
what is not trained; transformations pass over it.  `eqx.nn.Linear` keeps its weight as
(out, in), which the optimizer is told by `dimension_numbers`.  And an equinox module is
callable: optax's masks that are made from a model would be taken for functions of the
parameters and called, so hand over a function that returns the tree.  (Options of
basinax may be such trees; the function works for both.)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from basinax.optimizers import spectra_adamw

STEPS, BATCH = 240, 128
RATE, THRESHOLD, DECAY = 1e-2, 2.0, 0.1
OUT_IN = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)


def main() -> None:
    """Train, and check the bound on the steps."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    x, x_test, y, y_test = train_test_split(images, labels, random_state=0)

    model = eqx.nn.MLP(64, 10, 48, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    # The activation is a leaf of the model, and now None in `params`.
    assert params.activation is None
    assert callable(static.activation)

    def orientation(params: eqx.Module) -> eqx.Module:
        return jax.tree.map(lambda p: OUT_IN if p.ndim == 2 else None, params)

    assert callable(orientation(params)), "a tree, but of a class with __call__"
    tx = spectra_adamw(
        RATE,
        THRESHOLD,
        weight_decay=DECAY,
        dimension_numbers=orientation,  # not orientation(params)
        weight_decay_mask=lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
    )

    def loss_fn(params: eqx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jax.vmap(eqx.combine(params, static))(images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    @jax.jit  # the trees hold arrays only, so eqx.filter_jit is not needed
    def train_step(
        params: eqx.Module, state: optax.OptState, images: jax.Array, labels: jax.Array
    ) -> tuple[eqx.Module, optax.OptState, eqx.Module, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates, loss

    state = tx.init(params)
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        batch = rng.integers(len(x), size=BATCH)
        before = params
        params, state, updates, loss = train_step(params, state, x[batch], y[batch])
        if (step + 1) % 80 == 0:
            print(f"step {step + 1}: loss {loss:.3f}")

    for layer, old in zip(updates.layers, before.layers, strict=True):
        step = np.asarray(layer.weight + DECAY * RATE * old.weight)  # without decay
        fan_out, fan_in = step.shape
        bound = RATE * THRESHOLD * np.sqrt(max(1, fan_out / fan_in))
        length = np.linalg.norm(step, 2)
        print(f"last step of a {fan_out}x{fan_in} matrix: {length:.5f} < {bound:.5f}")
        assert length <= bound * (1 + 1e-4)

    model = eqx.combine(params, static)
    accuracy = float(np.mean(np.argmax(jax.vmap(model)(x_test), -1) == y_test))
    assert accuracy > 0.94, accuracy
    print(
        f"Checked: {accuracy:.1%} of {len(y_test)} unseen digits are right, and no "
        "step is longer than the threshold allows."
    )


if __name__ == "__main__":
    main()
