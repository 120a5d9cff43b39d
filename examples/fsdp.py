"""Fully sharded training: parameters and optimizer state split over eight devices.

Every device holds an eighth of each matrix and of Adam's two moments, and an eighth of
the batch.  SPECTRA clips spectra, which are properties of whole matrices; it contracts
over the split axis, at the cost of at most two all-reduces per matrix split along its
long side.  Inside `jax.set_mesh` it can also pin where its products lie.
"""

import os

# More threads than simulated devices, which wait for one another.
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from sklearn.datasets import load_digits

from basinax.optimizers import spectra_adamw

# Simulated devices, set up before anything runs.  With eight real ones leave this out.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

STEPS, BATCH, WIDTH = 20, 256, 96

Params = dict[str, jax.Array]

# "polynomial" is what "auto" means on GPU and TPU: matrix products only.
tx = spectra_adamw(1e-2, threshold=2.0, method="polynomial")


def init() -> Params:
    """Draw a perceptron with two hidden layers."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (64, WIDTH), "w2": (WIDTH, WIDTH), "w3": (WIDTH, 10)}
    return {
        name: jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)
        for name, shape in shapes.items()
    } | {"b1": jnp.zeros(WIDTH), "b3": jnp.zeros(10)}


def fsdp_layout(leaf: jax.Array, mesh: jax.sharding.Mesh) -> NamedSharding:
    """Split the longest axis that the devices divide; copy what has none."""
    fits = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
    spec: list[str | None] = [None] * leaf.ndim
    if fits:
        spec[max(fits, key=lambda axis: leaf.shape[axis])] = "devices"
    return NamedSharding(mesh, jax.P(*spec))


def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    hidden = jnp.tanh(images @ params["w1"] + params["b1"][None])
    logits = jnp.tanh(hidden @ params["w2"]) @ params["w3"] + params["b3"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def train_step(
    params: Params, state: optax.OptState, images: jax.Array, labels: jax.Array
) -> tuple[Params, optax.OptState, jax.Array]:
    """The step of a single device, unchanged."""
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def main() -> None:
    """Train sharded and on one device, and compare sizes and results."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)

    def train(
        params: Params, batch_layout: NamedSharding | None = None
    ) -> tuple[Params, optax.OptState, float]:
        state = tx.init(params)  # outside jit: every moment lies as its parameter does
        layout = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        step = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*layout, None))
        for number in range(STEPS):
            batch = np.random.default_rng(number).integers(len(images), size=BATCH)
            x, y = jax.device_put((images[batch], labels[batch]), batch_layout)
            params, state, loss = step(params, state, x, y)
        return params, state, float(loss)

    expected, _, expected_loss = train(init())

    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        params = init()
        layout = jax.tree.map(lambda leaf: fsdp_layout(leaf, mesh), params)
        params, state, loss = train(
            jax.device_put(params, layout), NamedSharding(mesh, jax.P("devices"))
        )

    moments = optax.tree.get(state, "mu")
    for name, leaf in params.items():
        shard, moment = (x.addressable_shards[0].data for x in (leaf, moments[name]))
        print(f"{name}: {leaf.shape}, on each device {shard.shape}")
        copies = 1 if name == "b3" else 8  # ten biases cannot be split by eight
        assert shard.size == leaf.size // copies
        assert moment.shape == shard.shape
    print(f"loss after {STEPS} steps: {loss:.5f} sharded, {expected_loss:.5f} not")

    # Sums over the batch in another order: float32 rounding, which Adam's division by
    # small second moments enlarges.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], atol=1e-5)
    print(
        "Checked: an eighth on each device, and the parameters of one device to 1e-5."
    )


if __name__ == "__main__":
    main()
